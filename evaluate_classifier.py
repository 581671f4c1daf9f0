"""Compare samples with their starting images by a classifier's activations, layer by layer, and by its classes.

For every starting image, time and layer: cosine similarity and distance of standardised activations; and the logits of
both images. A whole series of times takes one pass: each starting image goes through the classifier once, together with
its samples of all times. Rerun the same command to resume a run that was stopped; finished times are kept. Under
mpiexec, torchrun or srun, images are split across processes.

  python evaluate_classifier.py --starting_data_dir datasets/ILSVRC2012/validation --time_series 25 50 75 100 125 \\
      --timestep_respacing 250 --classifier_name convnext_base

reads the samples in results/diffused_ILSVRC2012_validation and the statistics that classifier_statistics.py has written
in classifier_statistics/convnext_base, and writes act_diff_convnext_base-t_K_N.npz and logits_convnext_base-t_K_N.npz
there.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

from guided_diffusion import dist_util, logger
from guided_diffusion.classifier.activations import Normalization, Similarities, load_normalization
from guided_diffusion.classifier.networks import Classifier
from guided_diffusion.classifier.pairs import check_sizes, find_pairs, read_sample, samples_digests
from guided_diffusion.classifier.results import (
    SIMILARITIES,
    add_flags,
    classifier_settings,
    default_folder,
    differences_file,
    images_digest,
    labels_of,
    logits_file,
    name_in_files,
    parts_folder,
    set_up,
    statistics_file,
    with_labels_of,
)
from guided_diffusion.command_line.parser import ArgumentParser, Flattened, time_list, whole_number
from guided_diffusion.command_line.stopping import run
from guided_diffusion.compute.memory import enough_memory
from guided_diffusion.compute.transfer import upload
from guided_diffusion.errors import UserError, named_write_errors
from guided_diffusion.forward_backward import SampleFolder, check_times, default_output
from guided_diffusion.images.classes import add_class_order, read_classes
from guided_diffusion.images.folder import LabelledImage
from guided_diffusion.images.io import Check, read_image
from guided_diffusion.runs.inputs import Inputs
from guided_diffusion.runs.parts import recorded_settings
from guided_diffusion.runs.records import Record, read_record, record_of, report_unreadable, write_result
from guided_diffusion.runs.resumable import Pictures, Result, ResultRun
from guided_diffusion.runs.settings import digest_of
from guided_diffusion.runs.shards import add_shard_flags, cut, shard_of
from guided_diffusion.sample_folders import recorded_inputs
from guided_diffusion.script_util import HELP, number_of_steps
from guided_diffusion.system.files import whole_file

import blobfile as bf
import numpy as np
import torch

STARTS, SAMPLES = "starting images", "samples"  # the two kinds of files that results are computed from


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
    # samples[k][i] is that of starts[i]
    starts, class_names, samples = dist_util.on_main(find_pairs, args.starting_data_dir, args.labels_file, folders)
    dist_util.on_main(check_sizes, folders, samples, args.image_size)

    classifier, autocast, machine = set_up(args)
    recorded = dist_util.on_main(read_classes, args.classifier_path)
    starts = dist_util.on_every_rank(with_labels_of, classifier, starts, class_names, args.class_order, recorded)
    statistics = statistics_file(output, name)
    normalization = dist_util.on_every_rank(load_normalization, statistics, classifier, args.normalization)
    settings = classifier_settings(args, classifier, machine["precision"])
    settings |= {
        "normalization": args.normalization,
        "statistics_digest": dist_util.on_main(statistics_digest, statistics, classifier.digest, args),
        "num_starts": len(starts),
        "starts_digest": images_digest(starts),
    }
    digests = dist_util.on_main(samples_digests, folders, samples)
    of_starts = [image.path for image in starts]
    # Paths of the samples, relative to the folder of the samples of all times.
    of_samples = {k: [f"{folders[k].path}/{path}".removeprefix(f"{data_dir}/") for path in samples[k]] for k in times}
    results = {
        k: Result(
            differences_file(output, name, k, num_steps),
            {**settings, "samples_digest": digests[k]},
            files={STARTS: of_starts, SAMPLES: of_samples[k]},
            companions=[logits_file(output, name, k, num_steps)],
        )
        for k in times
    }
    inputs = {STARTS: Inputs(args.starting_data_dir, "--starting_data_dir"), SAMPLES: Inputs(data_dir, "--data_dir")}
    dist_util.on_main(check_starts, inputs[STARTS], of_starts, folders, data_dir)
    folder = parts_folder(output, name, times, num_steps)
    with ResultRun(list(results.values()), folder, settings, machine, inputs, args, shard) as comparison:
        if not comparison.unfinished:
            logger.info(f"all {len(times)} times are done already, with the same settings, in {output}: nothing to do")
            return 0
        to_do = dist_util.on_main(times_together, comparison, results, folder)
        comparison.unfinished = [results[k] for k in to_do]
        starts_per_batch = max(1, args.batch_size // (1 + len(to_do)))
        batches = pair_batches(starts, [of_samples[k] for k in to_do], starts_per_batch)
        left = comparison.remaining_units(
            batches,
            times=to_do,
            starts_per_batch=starts_per_batch,
            samples_digest=digest_of(digests[k] for k in to_do),
        )
        logger.info(
            f"{len(starts)} starting images from {args.starting_data_dir}, with samples of "
            f"k = {', '.join(map(str, to_do))} of N = {num_steps} from {data_dir}: "
            f"{len(left)} of {len(shard.units(batches))} batches are to be done"
            + (f" by {shard}" if shard.count > 1 else "")
            + (f"; {len(times) - len(to_do)} times are done already" if len(times) > len(to_do) else "")
        )
        comparison.log_machine(f", {len(classifier.layers)} layers of {name}; results in {output}")
        compare(classifier, normalization, autocast, left, comparison, args)
        return comparison.finish(
            len(batches), partial(put_together, comparison, batches, {k: results[k] for k in to_do}, classifier)
        )


# What decides the results, and what is done


def check_starts(inputs: Inputs, starts: Sequence[str], folders: Mapping[int, SampleFolder], data_dir: str) -> None:
    """Raise UserError unless the starting images are those that the samples were made from, if that is recorded."""
    for folder in folders.values():
        inputs.merge(recorded_inputs(folder) or {}, folder.path)
    inputs.known = inputs.entries(starts)
    inputs.compare(starts, data_dir, "make the samples again")


def statistics_digest(path: str, classifier: str, args: argparse.Namespace) -> str:
    """SHA-256 of the file of statistics; empty where --normalization needs none.

    Raises UserError unless its record says that they are of this classifier, whose weights' digest is given.
    """
    if args.normalization == "none":
        return ""
    record = read_record(record_of(path), {"settings": dict}, path)
    weights = record["settings"].get("classifier_digest") if record else None
    if weights is None:
        raise UserError(
            f"{record_of(path)} is missing or damaged: nothing tells whose statistics {path} are.\n"
            "Remove both, and run classifier_statistics.py again"
        )
    if weights != classifier:
        raise UserError(
            f"{path} is of another classifier: its weights were {weights[:12]}..., and are now {classifier[:12]}... "
            "(--classifier_path).\nRun classifier_statistics.py with these weights and another --output"
        )
    with bf.BlobFile(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def times_together(comparison: ResultRun, results: Mapping[int, Result], folder: str) -> list[int]:
    """The times that are to be computed together. If a killed run has left parts: those that it had begun with."""
    undone = [k for k, result in results.items() if result in comparison.unfinished]
    times = recorded_settings(folder).get("times", undone)
    return times if set(undone) <= set(times) <= results.keys() else undone


# Comparing


class PairBatch(NamedTuple):
    """B starting images, and their samples.

    Attributes:
        index: number of the batch.
        images: the starting images.
        samples: for each time, paths of the B samples in the folder of all times.
    """

    index: int
    images: Sequence[LabelledImage]
    samples: Sequence[Sequence[str]]

    @property
    def files(self) -> dict[str, list[str]]:
        """Paths of the starting images, then of the samples, time by time."""
        return {
            STARTS: [image.path for image in self.images],
            SAMPLES: [p for of_time in self.samples for p in of_time],
        }


def pair_batches(starts: Sequence[LabelledImage], samples: Sequence[Sequence[str]], size: int) -> list[PairBatch]:
    """Cut the list of starting images, in order, every `size`; `samples` has a list of paths for each time."""
    of_times = zip(*(cut(paths, size) for paths in samples), strict=True)
    return [PairBatch(i, *batch) for i, batch in enumerate(zip(cut(starts, size), of_times, strict=True))]


def compare(
    classifier: Classifier,
    normalization: Normalization,
    autocast: AbstractContextManager,
    batches: Sequence[PairBatch],
    comparison: ResultRun,
    args: argparse.Namespace,
) -> None:
    """Compare batches and write their parts.

    A batch of B starting images with samples of T times is one forward pass of (1 + T) B images. Raises ResultError if
    the classifier gives NaN or infinity.
    """
    if not batches:
        return
    times = len(batches[0].samples)
    blank = classifier.preprocess(np.zeros((args.image_size, args.image_size, 3), np.uint8))

    def read(function: Callable[..., np.ndarray], path: str, check: Check) -> torch.Tensor:
        return classifier.preprocess(function(path, args.image_size, check))

    readers = {STARTS: partial(read, read_image), SAMPLES: partial(read, read_sample)}
    work = (lambda batch: len(batch.images) * (1 + times)), "comparing", "image"
    write: Callable[[], None] = lambda: None  # noqa: E731
    with torch.inference_mode(), Similarities(classifier, normalization, times) as watch:
        for batch, pictures in comparison.read(batches, readers, blank, *work):
            x = torch.stack(pictures.values)
            advice = f",\nand remove {comparison.parts.folder}, which was begun with this one"
            with autocast, enough_memory(len(x), advice):
                classifier.model(upload(x, dist_util.dev()))  # ((1 + T) B, 3, S, S)
            write()  # what the batch before gave: a GPU works on this one meanwhile
            write = partial(write_part, comparison, batch, pictures, watch.latest)
            comparison.bar.update(len(x))
            dist_util.check_peers()
        write()


def write_part(comparison: ResultRun, batch: PairBatch, pictures: Pictures, found: Callable[[], Any]) -> None:
    """Write what a batch gave: similarities (T, B, L) and logits (1 + T, B, classes)."""
    comparison.write(batch, pictures, **found()._asdict())


def put_together(
    comparison: ResultRun,
    batches: Sequence[PairBatch],
    results: Mapping[int, Result],
    classifier: Classifier,
    facts: Record,
) -> int:
    """Write the results, time by time. Returns the exit status."""
    for t, (k, result) in enumerate(results.items()):
        count = write_time(comparison, batches, t, k, result, classifier, facts)
        logger.info(f"k = {k}: {count} of {len(result.files[STARTS])} pairs are in {result.path}")
    return report_unreadable(comparison.unreadable, "the results are without them")


def write_time(
    comparison: ResultRun,
    batches: Sequence[PairBatch],
    t: int,
    k: int,
    result: Result,
    classifier: Classifier,
    facts: Record,
) -> int:
    """Write the files of the t-th time, k. Returns the number of pairs; raises UserError if none could be read."""
    pieces = defaultdict(list)
    images: list[LabelledImage] = []
    unreadable: dict[str, str] = {}  # path of the starting image -> why the pair is missing
    why = comparison.unreadable
    for batch in batches:
        part = comparison.parts.read(batch.index)
        readable = part["readable"].reshape(-1, len(batch.images))  # (1 + T, B)
        both = readable[0] & readable[1 + t]
        for image, sample, is_readable in zip(batch.images, batch.samples[t], both, strict=True):
            if is_readable:
                images.append(image)
            else:
                unreadable[image.path] = why.get(image.path) or why.get(sample, "unreadable")
        pieces["logits_start"].append(part["logits"][0, both])
        pieces["logits_sample"].append(part["logits"][1 + t, both])
        for name in SIMILARITIES:
            pieces[name].append(part[name][t, both])
    if not images:
        raise UserError(f"none of the pairs of k = {k} could be read: there is nothing to write (--data_dir)")
    record = {
        "finished": not unreadable,
        "num_shards": comparison.shard.count,
        "settings": result.settings,
        "images": {"chosen": len(result.files[STARTS]), "unreadable": unreadable},
        "last_run": facts,
    }
    arrays = {name: np.concatenate(found) for name, found in pieces.items()}
    names = np.array([image.path for image in images])
    layers = np.array([layer.name for layer in classifier.layers])
    comparison.write_lists(result)
    with named_write_errors(), whole_file(result.companions[0]) as f:
        logits = {name: arrays[name] for name in ("logits_start", "logits_sample")}
        np.savez(f, names=names, labels=labels_of(images), **logits)
    write_result(result.path, {"names": names, "layers": layers, **{s: arrays[s] for s in SIMILARITIES}}, record)
    return len(images)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    parser = ArgumentParser(
        usage="%(prog)s --starting_data_dir FOLDER --time_series K [K ...] [flags]", description=__doc__
    )
    images = parser.add_argument_group("the images")
    add = images.add_argument
    add("--starting_data_dir", required=True, metavar="FOLDER", help="the starting images")
    add(
        "--data_dir",
        default="",
        metavar="FOLDER",
        help="the samples: the results of forward_backward_dataset_sample.py (default: results/diffused_ and "
        "starting_data_dir)",
    )
    add(
        "--time_series",
        required=True,
        nargs="+",
        action=Flattened,
        type=time_list,
        metavar="K",
        help="the times of the samples, in steps: 0..N; separated by spaces or commas",
    )
    add(
        "--timestep_respacing",
        default="250",
        metavar="TEXT",
        help="number of steps N that the samples were made with, as it was given there (default: %(default)s)",
    )
    add(
        "--diffusion_steps",
        default=1000,
        type=whole_number(1),
        metavar="INT",
        help="number of diffusion steps that the model was trained with (default: %(default)s)",
    )
    add(
        "--image_size",
        default=256,
        type=whole_number(1),
        metavar="INT",
        help="side of the samples, in pixels; the starting images are cut to it (default: %(default)s)",
    )
    add(
        "--labels_file",
        metavar="FILE",
        help=HELP["labels_file"],
    )
    add_class_order(images)
    add_shard_flags(
        add_flags(
            parser,
            output="the statistics and of the results",
            batch_size=", starting images and samples of all times together",
        )
    )
    add = parser.add_argument_group("the measure").add_argument
    add(
        "--normalization",
        default="std",
        choices=["std", "rms", "none"],
        help="std: activations less their mean, over the standard deviation, as the paper says; rms: over the root of "
        "the second moment, as the released code computes; none: as they are (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    run(main)
