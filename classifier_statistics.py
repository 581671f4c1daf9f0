"""Measure mean and variance of a classifier's activations, layer by layer, and its accuracy.

evaluate_classifier.py standardises activations with these statistics, which are per channel for feature maps and
tokens, and over all classes for the logits. The images are spread evenly over the sorted list of the folder. The result
does not depend on the number of processes, and on --batch_size only by rounding; under mpiexec, torchrun or srun,
images are split across processes. Rerun the same command to resume a run that was stopped.

  python classifier_statistics.py --data_dir datasets/ILSVRC2012/validation --classifier_name convnext_base

This writes classifier_statistics/convnext_base/act_stat_convnext_base.npz.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby

from guided_diffusion import dist_util, logger
from guided_diffusion.classifier.activations import ActivationMoments
from guided_diffusion.classifier.networks import Classifier
from guided_diffusion.classifier.results import (
    class_names_of,
    classifier_settings,
    default_folder,
    images_digest,
    labels_of,
    set_up,
    statistics_file,
    with_labels_of,
)
from guided_diffusion.classifier.statistics import (
    Statistics,
    as_arrays,
    images_per_unit,
    merged,
    ranks_of,
    read_part,
    write_part,
)
from guided_diffusion.command_line.flags import CLASSIFYING, REQUIRED, RUN, add_flags, flag
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import explain_out_of_memory
from guided_diffusion.compute.transfer import download, upload
from guided_diffusion.images.classes import read_classes
from guided_diffusion.images.folder import LabelledImage, label_where_known, list_images
from guided_diffusion.images.io import Check, read_image
from guided_diffusion.runs.inputs import Inputs
from guided_diffusion.runs.records import Record, check_finite, report_unreadable, write_result
from guided_diffusion.runs.resumable import IMAGES, ImageBatch, Pictures, Result, ResultRun, image_batches
from guided_diffusion.runs.shards import cut, shard_of

import numpy as np
import torch


def main(argv: list[str] | None = None) -> int:
    """Measure. Returns 0, or 1 if images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)
    dist_util.setup_dist(args.device)
    logger.make_dir()
    shard = dist_util.on_every_rank(shard_of, args)
    images, class_names = dist_util.on_main(find_images, args)
    classifier, autocast, machine = set_up(args)
    recorded = dist_util.on_main(read_classes, args.classifier_path)
    images = dist_util.on_every_rank(with_labels_of, classifier, images, class_names, args.class_order, recorded)
    settings = classifier_settings(args, classifier, machine["precision"])
    settings |= {"num_images": len(images), "images_digest": images_digest(images)}
    path = statistics_file(args.output or default_folder(classifier.name), classifier.name)
    result = Result(path, settings, {IMAGES: [image.path for image in images]})
    inputs, folder = {IMAGES: Inputs(args.data_dir, "--data_dir")}, f"{path.removesuffix('.npz')}_parts"
    with ResultRun([result], folder, settings, machine, inputs, args, shard) as measurement:
        if not measurement.unfinished:
            logger.info(f"{path} exists already, with the same settings: nothing to do")
            return 0
        size = images_per_unit(len(images), args.batch_size)
        units = image_batches(images, size)
        left = measurement.remaining_units(units, images_per_unit=size)
        to_do = sum(len(unit.images) for unit in left)
        logger.info(
            f"{len(images)} images from {args.data_dir}, {len(classifier.layers)} layers of {classifier.name}: {to_do} "
            f"images to measure{f' by {shard}' if shard.count > 1 else ''}"
        )
        measurement.log_machine(f"; the result will be {path}")
        measure(classifier, autocast, left, measurement, args)
        return measurement.finish(len(units), partial(write, measurement, classifier, len(units)))


def measure(
    classifier: Classifier,
    autocast: AbstractContextManager,
    units: Sequence[ImageBatch],
    measurement: ResultRun,
    args: argparse.Namespace,
) -> None:
    """Pass the units that this rank takes through the classifier, batch by batch, and write their parts.

    Raises ResultError if the classifier gives NaN or infinity.
    """

    def read(path: str, check: Check) -> torch.Tensor:
        return classifier.preprocess.on_cpu(read_image(path, args.image_size, check))

    def batches(unit: ImageBatch) -> list[ImageBatch]:
        return [ImageBatch(unit.index, images) for images in cut(unit.images, args.batch_size)]

    reading = measurement.read(
        units, {IMAGES: read}, None, lambda unit: len(unit.images), "measuring", "image", pieces=batches
    )
    with torch.inference_mode():
        for index, of_unit in groupby(reading, key=lambda entry: entry[0].index):
            write_part(measurement.parts, index, statistics_of(classifier, autocast, of_unit, measurement))


def statistics_of(
    classifier: Classifier,
    autocast: AbstractContextManager,
    reading: Iterable[tuple[ImageBatch, Pictures]],
    measurement: ResultRun,
) -> Statistics:
    """The statistics of some batches. Raises ResultError if the classifier gives NaN or infinity."""
    logits_and_labels, unreadable, entries = [], {}, {}
    with ActivationMoments(classifier) as watch:
        for batch, pictures in reading:
            if pictures.readable.any():
                readable = [picture for picture in pictures.values if picture is not None]
                x = upload(torch.stack(readable), dist_util.dev())  # (B, 3, S, S)
                with autocast, explain_out_of_memory(len(x)):
                    logits = classifier.model(classifier.preprocess.on_device(x))  # (B, classes)
                labels = labels_of(batch.images)[pictures.readable]
                logits_and_labels.append((download(logits.float()), labels))
            unreadable |= pictures.unreadable[IMAGES]
            entries |= measurement.entries(batch, pictures)[IMAGES]
            measurement.bar.update(len(batch.images))
            dist_util.check_peers()
    ranks = [np.empty(0, np.int64)]
    for wait, labels in logits_and_labels:
        (logits,) = wait()
        check_finite({"a logit": logits}, classifier.name)
        ranks.append(ranks_of(logits, labels))
    for layer, moments in watch.moments.items():
        check_finite({f"the {name}": values for name, values in moments.as_arrays().items()}, f"layer {layer}")
    return Statistics(watch.moments, np.concatenate(ranks), unreadable, entries)


def find_images(args: argparse.Namespace) -> tuple[list[LabelledImage], list[str]]:
    """The chosen images, spread evenly over the folder, and the classes of the whole folder. Raises UserError."""
    images, why_unknown = label_where_known(args.data_dir, list_images(args.data_dir), args.labels_file, "text")
    if why_unknown:
        logger.warn(f"{why_unknown}: the accuracy will not be known (--labels_file)")
    if len(images) < args.num_samples:
        logger.warn(f"{args.num_samples} images asked for (--num_samples), {len(images)} found in {args.data_dir}")
    n, m = len(images), min(len(images), args.num_samples)
    return [images[i * n // m] for i in range(m)], class_names_of(images)


def write(measurement: ResultRun, classifier: Classifier, num_units: int, facts: Record) -> int:
    """Write and report the result of all units. Returns the exit status; raises UserError."""
    total = merged(read_part(measurement.parts, index) for index in range(num_units))
    arrays = as_arrays(classifier, total)
    (result,) = measurement.results
    chosen = len(result.files[IMAGES])
    record = {"settings": result.settings, "images": {"chosen": chosen, "unreadable": total.unreadable}}
    record |= {"last_run": facts, "finished": not total.unreadable}
    if measurement.shard.count > 1:
        record["num_shards"] = measurement.shard.count
    measurement.write_lists(result)
    write_result(result.path, arrays, record)
    unlabelled = int((total.ranks < 0).sum())
    accuracy = f"accuracy unknown: the labels of {unlabelled} images are unknown"
    if "top1" in arrays:
        accuracy = f"accuracy {arrays['top1']:.2%} (top 1), {arrays['top5']:.2%} (top 5)"
    logger.info(f"{classifier.name} on {arrays['num_images']} images: {accuracy}. Statistics are in {result.path}")
    return report_unreadable(total.unreadable, "the statistics exclude them", chosen)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    names = ("data_dir", "num_samples", "labels_file", "class_order", "image_size")
    add_flags(parser.add_argument_group("the images"), names, data_dir=REQUIRED, image_size=256)
    add_flags(
        parser.add_argument_group("the classifier"),
        CLASSIFYING,
        classifier_path=flag("classifier_path", empty="torchvision's, downloaded"),
    )
    output = flag("output", empty="classifier_statistics/CLASSIFIER_NAME")
    add_flags(parser.add_argument_group("the run"), RUN, output=output, batch_size=128)
    return parser


if __name__ == "__main__":
    run(main)
