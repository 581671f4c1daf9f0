"""Measure mean and variance of a classifier's activations, layer by layer, and its accuracy.

evaluate_classifier.py standardises activations with them: per channel for feature maps and tokens, one number for the
logits. The images are spread evenly over the sorted list of the folder. The result does not depend on --batch_size or
the number of processes; under mpiexec, torchrun or srun, images are split across processes.

  python classifier_statistics.py --data_dir datasets/ILSVRC2012/validation --classifier_name convnext_base

writes classifier_statistics/convnext_base/act_stat_convnext_base.npz.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from guided_diffusion import dist_util, logger
from guided_diffusion.classifier.activations import ActivationMoments, Moments
from guided_diffusion.classifier.networks import Classifier
from guided_diffusion.classifier.results import (
    add_flags,
    class_names_of,
    class_ranks,
    classifier_settings,
    default_folder,
    images_digest,
    labels_of,
    set_up,
    statistics_file,
    with_labels_of,
)
from guided_diffusion.command_line.parser import ArgumentParser, whole_number
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import enough_memory
from guided_diffusion.compute.transfer import download, upload
from guided_diffusion.errors import UserError
from guided_diffusion.images.classes import add_class_order, read_classes
from guided_diffusion.images.folder import LabelledImage, label_where_known, list_images
from guided_diffusion.images.io import read_image
from guided_diffusion.runs.inputs import Entries, Inputs
from guided_diffusion.runs.records import Record, check_finite, report_unreadable, write_result
from guided_diffusion.runs.resumable import IMAGES, ImageBatch, Result, ResultRun, image_batches
from guided_diffusion.runs.shards import add_shard_flags, shard_of
from guided_diffusion.script_util import HELP

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
    with ResultRun([result], folder, settings, machine, inputs, args, shard) as statistics:
        if not statistics.unfinished:
            logger.info(f"{path} is there already, made with the same settings: nothing to do")
            return 0
        left = statistics.remaining_units(range(shard.count)) if shard.count > 1 else [0]  # remaining shards
        logger.info(f"{len(images)} images from {args.data_dir}, {len(classifier.layers)} layers of {classifier.name}")
        statistics.log_machine(f"; the result will be {path}")
        if left:
            batches = shard.units(image_batches(images, args.batch_size))
            measured = measure(classifier, autocast, batches, statistics, args)
            reports = dist_util.gather_objects(tuple(measured))
            if shard.count == 1:
                return dist_util.on_main(write, statistics, result, classifier, reports, statistics.facts())
            dist_util.on_main(write_part, statistics, reports)
        else:
            logger.info(f"{shard} is done already, with the same settings")
        return statistics.finish(shard.count, partial(put_together, statistics, result, classifier))


def find_images(args: argparse.Namespace) -> tuple[list[LabelledImage], list[str]]:
    """The images that the flags choose, and the classes of all that are there. Raises UserError."""
    images, why_unknown = label_where_known(args.data_dir, list_images(args.data_dir), args.labels_file, "text")
    if why_unknown:
        logger.warn(f"{why_unknown}: the accuracy will not be known (--labels_file)")
    if len(images) < args.num_samples:
        logger.warn(f"{args.num_samples} images asked for (--num_samples), {len(images)} found in {args.data_dir}")
    return spread(images, args.num_samples), class_names_of(images)


def spread(images: list[LabelledImage], num_samples: int) -> list[LabelledImage]:
    """`num_samples` images spread evenly over the list, so that all classes have a share; all where there are fewer."""
    n, m = len(images), min(len(images), num_samples)
    return [images[i * n // m] for i in range(m)]


class Measured(NamedTuple):
    """What a process, or a shard, found out about its images.

    Attributes:
        moments: moments of every layer, by name.
        ranks: per image that could be read, the number of classes with a larger logit than its own; -1 if its class is
            not known.
        unreadable: images that could not be read: path -> why.
        entries: sizes and digests of the others.
    """

    moments: dict[str, Moments]
    ranks: np.ndarray
    unreadable: dict[str, str]
    entries: Entries


def measure(
    classifier: Classifier,
    autocast: AbstractContextManager,
    batches: Sequence[ImageBatch],
    statistics: ResultRun,
    args: argparse.Namespace,
) -> Measured:
    """Pass batches through the classifier. Raises ResultError if it gives NaN or infinity."""
    logits_and_labels, unreadable, entries = [], {}, {}

    def read(path: str, check: Any) -> torch.Tensor:
        return classifier.preprocess(read_image(path, args.image_size, check))

    reading = statistics.read(batches, {IMAGES: read}, None, lambda batch: len(batch.images), "measuring", "image")
    with torch.inference_mode(), ActivationMoments(classifier) as watch:
        for batch, pictures in reading:
            if pictures.readable.any():
                readable = [picture for picture in pictures.values if picture is not None]
                x = upload(torch.stack(readable), dist_util.dev())  # (B, 3, S, S)
                with autocast, enough_memory(len(x)):
                    logits = classifier.model(x)  # (B, classes)
                labels = labels_of(batch.images)[pictures.readable]
                logits_and_labels.append((download(logits.float()), labels))
            unreadable |= pictures.unreadable[IMAGES]
            entries |= statistics.entries(batch, pictures)[IMAGES]
            statistics.bar.update(len(batch.images))
            dist_util.check_peers()
    ranks = [np.empty(0, np.int64)]
    for wait, labels in logits_and_labels:
        (logits,) = wait()
        check_finite({"a logit": logits}, classifier.name)
        ranks.append(ranks_of(logits, labels))
    for layer, moments in watch.moments.items():
        check_finite({f"the {name}": values for name, values in moments.as_arrays().items()}, f"layer {layer}")
    return Measured(watch.moments, np.concatenate(ranks), unreadable, entries)


def ranks_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The place of each image's class in the order of its logits, from 0: (B,) of (B, classes); -1 for label -1."""
    return np.where(labels >= 0, class_ranks(logits, labels.clip(min=0)), -1)


def merged(reports: list[Measured]) -> Measured:
    """What several processes, or shards, found out together."""
    moments: dict[str, Moments] = {}
    for report in reports:
        for layer, of_layer in report.moments.items():
            if layer in moments:
                moments[layer].merge(of_layer)
            else:
                moments[layer] = of_layer
    unreadable, entries = ({key: value for r in reports for key, value in r[i].items()} for i in (2, 3))
    return Measured(moments, np.concatenate([report.ranks for report in reports]), unreadable, entries)


def write_part(statistics: ResultRun, reports: list[tuple]) -> None:
    """Write what the processes of a shard found out."""
    measured = merged([Measured(*report) for report in reports])
    states = {f"{name}/{layer}": array for layer, m in measured.moments.items() for name, array in m.state().items()}
    notes = {"inputs": {IMAGES: measured.entries}, "unreadable": {IMAGES: measured.unreadable}}
    statistics.parts.write(statistics.shard.index, notes, ranks=measured.ranks, **states)


def read_part(statistics: ResultRun, index: int) -> Measured:
    """What `write_part` wrote."""
    arrays = statistics.parts.read(index)
    ranks = arrays.pop("ranks")
    states: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, array in arrays.items():
        name, _, layer = key.partition("/")
        states[layer][name] = array
    moments = {layer: Moments.from_state(state) for layer, state in states.items()}
    unreadable = statistics.parts.notes(index)["unreadable"][IMAGES]
    return Measured(moments, ranks, unreadable, statistics.parts.entries(index)[IMAGES])


def put_together(statistics: ResultRun, result: Result, classifier: Classifier, facts: Record) -> int:
    """Write the result of all shards. Returns the exit status."""
    parts = [read_part(statistics, index) for index in range(statistics.shard.count)]
    return write(statistics, result, classifier, parts, facts)


def write(
    statistics: ResultRun, result: Result, classifier: Classifier, reports: Sequence[tuple], facts: Record
) -> int:
    """Write the result of all processes, or shards, and say what it is. Returns the exit status."""
    statistics.locks.check()
    total = merged([Measured(*report) for report in reports])
    statistics.inputs[IMAGES].known |= total.entries
    arrays = as_arrays(classifier, total)
    chosen = len(result.files[IMAGES])
    record = {"settings": result.settings, "images": {"chosen": chosen, "unreadable": total.unreadable}}
    record |= {"last_run": facts, "finished": not total.unreadable}
    if statistics.shard.count > 1:
        record["num_shards"] = statistics.shard.count
    statistics.write_lists(result)
    write_result(result.path, arrays, record)
    accuracy = "its accuracy is not known: the images do not name its classes"
    if "top1" in arrays:
        accuracy = f"accuracy {arrays['top1']:.2%} (top 1), {arrays['top5']:.2%} (top 5)"
    logger.info(f"{classifier.name} on {arrays['num_images']} images: {accuracy}. Statistics are in {result.path}")
    return report_unreadable(total.unreadable, "the statistics are without them", chosen)


def as_arrays(classifier: Classifier, measured: Measured) -> dict[str, Any]:
    """The arrays of the file; top1 and top5 only if the classes of all images are known.

    Raises UserError if no image could be read.
    """
    ranks = measured.ranks
    if not len(ranks):
        raise UserError("none of the images could be read: there is nothing to write (--data_dir)")
    arrays: dict[str, Any] = {"layers": np.array([layer.name for layer in classifier.layers])}
    for layer in classifier.layers:
        moments = measured.moments[layer.name].as_arrays()
        arrays |= {f"{moment}/{layer.name}": values for moment, values in moments.items()}
    arrays["num_images"] = np.int64(len(ranks))
    if (ranks >= 0).all():
        arrays["top1"], arrays["top5"] = [np.float64((ranks < n).mean()) for n in (1, 5)]
    return arrays


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(usage="%(prog)s --data_dir FOLDER [flags]", description=__doc__)
    images = parser.add_argument_group("the images")
    add = images.add_argument
    add("--data_dir", required=True, metavar="FOLDER", help="the images; subfolders are looked through")
    add(
        "--num_samples",
        default=10000,
        type=whole_number(1),
        metavar="INT",
        help="images to take, spread evenly over the sorted list (default: %(default)s)",
    )
    add(
        "--labels_file",
        metavar="FILE",
        help=HELP["labels_file"],
    )
    add_class_order(images)
    add(
        "--image_size",
        default=256,
        type=whole_number(1),
        metavar="INT",
        help="side in pixels to which images are cut before the classifier's own preprocessing (default: %(default)s)",
    )
    add_shard_flags(add_flags(parser, output="results", batch_size=""))
    return parser


if __name__ == "__main__":
    run(main)
