"""Compare samples with their starting images by a classifier's activations, layer by layer, and by its logits.

Writes, for every starting image, time and layer, the cosine similarity and the distances of standardised activations;
and the logits of both images. All times are computed together: a batch has starting images and their samples at all
times. If images have several samples (--num_trajectories of forward_backward_dataset_sample.py), every pair of an image
and one of its samples has a row in the results; samples of later turns are ignored. Rerun the same command to resume a
run that was stopped; finished times are kept. Under mpiexec, torchrun or srun, images are split across processes.

  python evaluate_classifier.py --starting_data_dir datasets/ILSVRC2012/validation --time_series 25 50 75 100 125 \\
      --timestep_respacing 250 --classifier_name convnext_base

This reads the samples in results/diffused_ILSVRC2012_validation and the statistics that classifier_statistics.py wrote
to classifier_statistics/convnext_base, and writes act_diff_convnext_base-t_K_N.npz and
logits_convnext_base-t_K_N.npz there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from guided_diffusion import dist_util, logger
from guided_diffusion.classifier.activations import Comparison, Normalization, Similarities, load_normalization
from guided_diffusion.classifier.networks import Classifier
from guided_diffusion.classifier.pairs import (
    SAMPLES,
    STARTS,
    PairBatch,
    batch_shape,
    check_sizes,
    check_starts,
    describe_trajectories,
    find_pairs,
    join_parts,
    pair_batches,
    read_sample,
    samples_digests,
    settings_of_batches,
)
from guided_diffusion.classifier.repair import SampleResult, digest_for_parts
from guided_diffusion.classifier.results import (
    SIMILARITIES,
    classifier_settings,
    default_folder,
    differences_file,
    images_digest,
    labels_of,
    logits_file,
    name_in_files,
    parts_folder,
    set_up,
    statistics_digest,
    statistics_file,
    with_labels_of,
)
from guided_diffusion.command_line.flags import CLASSIFYING, REQUIRED, RUN, SAMPLES_DIR, add_flags, flag
from guided_diffusion.command_line.parser import ArgumentParser
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import explain_out_of_memory
from guided_diffusion.compute.transfer import upload
from guided_diffusion.errors import NothingReadable, named_write_errors
from guided_diffusion.forward_backward import SampleFolder, check_times, default_output
from guided_diffusion.images.classes import read_classes
from guided_diffusion.images.folder import LabelledImage
from guided_diffusion.images.io import Check, read_image
from guided_diffusion.runs.inputs import Inputs
from guided_diffusion.runs.records import Record, report_unreadable, write_result
from guided_diffusion.runs.resumable import Pictures, Result, ResultRun, describe_batches, times_to_do
from guided_diffusion.runs.shards import shard_of
from guided_diffusion.script_util import number_of_steps
from guided_diffusion.system.files import whole_file

import numpy as np
import torch


def main(argv: list[str] | None = None) -> int:
    """Compare. Returns 0, or 1 if images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)
    dist_util.setup_dist(args.device)
    logger.make_dir()
    shard = dist_util.on_every_rank(shard_of, args)
    name, data_dir = name_in_files(args.classifier_name), args.data_dir or default_output(args.starting_data_dir)
    output = args.output or default_folder(name)
    num_steps = dist_util.on_every_rank(number_of_steps, args.diffusion_steps, args.timestep_respacing)
    times = sorted(dist_util.on_every_rank(check_times, args.time_series, num_steps, "--time_series"))
    folders = {k: SampleFolder(data_dir, k, num_steps, args.diffusion_steps) for k in times}
    # samples[k][i] has the samples of starts[i], one per trajectory
    starts, class_names, samples = dist_util.on_main(find_pairs, args.starting_data_dir, args.labels_file, folders)
    dist_util.on_main(check_sizes, folders, samples, args.image_size)

    classifier, autocast, machine = set_up(args)
    recorded = dist_util.on_main(read_classes, args.classifier_path)
    starts = dist_util.on_every_rank(with_labels_of, classifier, starts, class_names, args.class_order, recorded)
    statistics = statistics_file(output, name)
    normalization = dist_util.on_every_rank(load_normalization, statistics, classifier, args.normalization)
    settings = decisive_settings(args, classifier, machine["precision"], statistics, starts)
    digests = dist_util.on_main(samples_digests, folders, samples)
    start_paths = [image.path for image in starts]
    results = {}
    for k in times:
        samples[k] = [[folders[k].within_output(path) for path in paths] for paths in samples[k]]
        results[k] = SampleResult(
            differences_file(output, name, k, num_steps),
            {**settings, "samples_digest": digests[k]},
            files={STARTS: start_paths, SAMPLES: list(chain(*samples[k]))},
            companions=[logits_file(output, name, k, num_steps)],
            data_dir=data_dir,
        )
    inputs = {STARTS: Inputs(args.starting_data_dir, "--starting_data_dir"), SAMPLES: Inputs(data_dir, "--data_dir")}
    dist_util.on_main(check_starts, inputs[STARTS], start_paths, folders, data_dir)
    folder = parts_folder(output, name, times, num_steps)
    with ResultRun(list(results.values()), folder, settings, machine, inputs, args, shard) as comparison:
        if not comparison.unfinished:
            logger.info(f"all {len(times)} times are done already, with the same settings, in {output}: nothing to do")
            return 0
        to_do = dist_util.on_main(times_to_do, comparison, results, folder)
        comparison.unfinished = [results[k] for k in to_do]
        shape = batch_shape([len(samples[k][0]) for k in to_do], args.batch_size)
        batches = pair_batches(starts, [samples[k] for k in to_do], shape)
        samples_digest = dist_util.on_main(digest_for_parts, folder, digests, results, to_do)
        cut_settings = settings_of_batches(shape, batches)
        left = comparison.remaining_units(batches, times=to_do, samples_digest=samples_digest, **cut_settings)
        logger.info(
            f"{len(starts)} starting images from {args.starting_data_dir}, with samples of "
            f"k = {', '.join(map(str, to_do))} of N = {num_steps} from {data_dir}{describe_trajectories(samples)}: "
            f"{describe_batches(left, batches, shard, len(times) - len(to_do))}"
        )
        comparison.log_machine(f", {len(classifier.layers)} layers of {name}; results in {output}")
        compare(classifier, normalization, autocast, left, comparison, args)
        write = partial(write_results, comparison, batches, {k: results[k] for k in to_do}, classifier)
        return comparison.finish(len(batches), write)


def compare(
    classifier: Classifier,
    normalization: Normalization,
    autocast: AbstractContextManager,
    batches: Sequence[PairBatch],
    comparison: ResultRun,
    args: argparse.Namespace,
) -> None:
    """Compare the batches that this rank takes and write their parts.

    A batch of B starting images with S samples of each is one forward pass of (1 + S) B images. Raises ResultError if
    the classifier gives NaN or infinity.
    """
    blank = classifier.preprocess.blank(args.image_size)

    def read(function: Callable[..., np.ndarray], path: str, check: Check) -> torch.Tensor:
        return classifier.preprocess.on_cpu(function(path, args.image_size, check))

    readers = {STARTS: partial(read, read_image), SAMPLES: partial(read, read_sample)}
    reading = comparison.read(batches, readers, blank, lambda batch: batch.num_images, "comparing", "image")
    pending: Callable[[], None] | None = None
    with torch.inference_mode(), Similarities(classifier, normalization) as watch:
        for batch, pictures in reading:
            watch.num_samples = len(batch.samples)
            x = torch.stack(pictures.values)  # ((1 + S) B, 3, H, W)
            advice = f",\nand remove {comparison.parts.folder}, which was started with this batch size"
            with autocast, explain_out_of_memory(len(x), advice):
                classifier.model(classifier.preprocess.on_device(upload(x, dist_util.dev())))
            if pending:
                pending()  # write the previous batch, while a GPU works on this one
            pending = partial(write_part, comparison, batch, pictures, partial(watch.latest, pictures.readable))
            comparison.bar.update(len(x))
            dist_util.check_peers()
        if pending:
            pending()


# Bookkeeping


def decisive_settings(
    args: argparse.Namespace,
    classifier: Classifier,
    precision: str,
    statistics: str,
    starts: Sequence[LabelledImage],
) -> dict[str, Any]:
    """The settings that determine the bytes of the results, except for the samples. Raises UserError."""
    digest = ""
    if args.normalization != "none":
        digest = dist_util.on_main(statistics_digest, statistics, classifier.digest)
    return {
        **classifier_settings(args, classifier, precision),
        "normalization": args.normalization,
        "statistics_digest": digest,
        "num_starts": len(starts),
        "starts_digest": images_digest(starts),
    }


def write_part(comparison: ResultRun, batch: PairBatch, pictures: Pictures, compared: Callable[[], Comparison]) -> None:
    """Write similarities (S, B, L) and logits (1 + S, B, classes) of a batch."""
    comparison.write(batch, pictures, **compared()._asdict())


def write_results(
    comparison: ResultRun,
    batches: Sequence[PairBatch],
    results: Mapping[int, Result],
    classifier: Classifier,
    facts: Record,
) -> int:
    """Write the results, time by time. Returns the exit status."""
    for t, (k, result) in enumerate(results.items()):
        count = write_time(comparison, batches, t, k, result, classifier, facts)
        logger.info(f"k = {k}: {count} of {len(result.files[SAMPLES])} pairs are in {result.path}")
    return report_unreadable(comparison.unreadable, "the results exclude them")


def write_time(
    comparison: ResultRun,
    batches: Sequence[PairBatch],
    t: int,
    k: int,
    result: Result,
    classifier: Classifier,
    facts: Record,
) -> int:
    """Write the files of the t-th time, k. Returns the number of pairs; raises UserError if none was readable."""
    images, trajectories, unreadable, arrays = join_parts(comparison.parts, batches, t, comparison.unreadable)
    if not images:
        raise NothingReadable(f"none of the pairs of k = {k} could be read: there is nothing to write (--data_dir)")
    record = {
        "finished": not unreadable,
        "num_shards": comparison.shard.count,
        "settings": result.settings,
        "images": {"chosen": len(result.files[STARTS]), "unreadable": unreadable},
        "logits_layers": [layer.name for layer in classifier.layers if layer.is_logits],
        "last_run": facts,
    }
    pairs = {"names": np.array([image.path for image in images])}
    if len(result.files[SAMPLES]) > len(result.files[STARTS]):
        pairs["trajectories"] = trajectories
    layers = np.array([layer.name for layer in classifier.layers])
    comparison.write_lists(result)
    with named_write_errors(), whole_file(result.companions[0]) as f:
        logits = {name: arrays[name] for name in ("logits_start", "logits_sample")}
        np.savez(f, **pairs, labels=labels_of(images), **logits)
    write_result(result.path, {**pairs, "layers": layers, **{s: arrays[s] for s in SIMILARITIES}}, record)
    return len(images)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(
        usage="%(prog)s --starting_data_dir FOLDER --time_series K [K ...] [flags]", description=__doc__
    )
    add_flags(
        parser.add_argument_group("the images"),
        ["starting_data_dir", "data_dir", "time_series", "timestep_respacing", "diffusion_steps", "image_size"],
        starting_data_dir=REQUIRED,
        data_dir=replace(SAMPLES_DIR, empty="results/diffused_STARTING_DATA_DIR"),
        timestep_respacing="250",
        image_size=256,
        labels_file="",
        class_order="",
    )
    classifier = ["normalization", *CLASSIFYING]
    path = flag("classifier_path", empty="torchvision's, downloaded")
    add_flags(parser.add_argument_group("the classifier"), classifier, classifier_path=path)
    output = flag("output", empty="classifier_statistics/CLASSIFIER_NAME, with the statistics")
    add_flags(parser.add_argument_group("the run"), RUN, output=output, batch_size=128)
    return parser


if __name__ == "__main__":
    run(main)
