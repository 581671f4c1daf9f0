"""Compare samples with their starting images by a classifier's activations, layer by layer, and by its classes.

For every starting image, time and layer: the cosine similarity and the distance of standardised activations; and the
logits of both. A whole series of times is done in one pass: each starting image goes through the classifier once, with
its samples of all times. A run that was ended goes on where it was when it is started again with the same flags, and a
time that is done is not done again. Under mpiexec, torchrun or srun, the processes share the images out.

  python evaluate_classifier.py --starting_data_dir datasets/ILSVRC2012/validation --time_series 25 50 75 100 125 \\
      --timestep_respacing 250 --classifier_name convnext_base

reads the samples in results/diffused_ILSVRC2012_validation and the statistics that classifier_statistics.py has written
in classifier_statistics/convnext_base, and writes act_diff_convnext_base-t_K_N.npz and logits_convnext_base-t_K_N.npz
there.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import blobfile as bf
import numpy as np

from guided_diffusion.command_line import ArgumentParser, run, whole_number
from guided_diffusion.errors import UserError
from guided_diffusion.files import read_json, remove_scratch_of

if TYPE_CHECKING:
    import torch

    from guided_diffusion.activations import Compared, Normalization
    from guided_diffusion.image_datasets import LabelledImage
    from guided_diffusion.parts import Parts
    from guided_diffusion.torch_classifiers import Classifier


def main(argv: list[str] | None = None) -> int:
    """Compare. Returns 0, or 1 where images could not be read; raises UserError."""
    args = create_argparser().parse_args(argv)

    # Imported here and not above, so that --help and misspelt flags are answered without waiting for torch.
    from guided_diffusion import dist_util, logger
    from guided_diffusion.activations import load_normalization
    from guided_diffusion.classifier_results import (
        classifier_settings,
        default_folder,
        digest_of,
        images_digest,
        name_in_files,
        parts_folder,
        set_up,
        statistics_file,
        with_labels_of,
    )
    from guided_diffusion.forward_backward import SampleFolder, check_times, default_output
    from guided_diffusion.parts import Parts, remove_parts
    from guided_diffusion.run_record import now
    from guided_diffusion.sample_pairs import check_sizes, find_pairs, samples_digests

    dist_util.setup_dist(args.device)
    logger.configure()
    name, data_dir = name_in_files(args.classifier_name), args.data_dir or default_output(args.starting_data_dir)
    output = args.output or default_folder(name)
    num_steps = dist_util.on_every_rank(number_of_steps, args)
    series = [k for ks in args.time_series for k in ks]
    times = sorted(dist_util.on_every_rank(check_times, series, num_steps, "--time_series"))
    folders = {k: SampleFolder(data_dir, k, num_steps, args.diffusion_steps) for k in times}
    # samples[k][i] is that of starts[i]
    starts, class_names, samples = dist_util.on_main(find_pairs, args.starting_data_dir, args.labels_file, folders)
    dist_util.on_main(check_sizes, folders, samples, args.image_size)

    classifier, autocast, circumstances = set_up(args)
    starts = with_labels_of(classifier, starts, class_names)
    statistics = statistics_file(output, name)
    normalization = dist_util.on_every_rank(load_normalization, statistics, classifier, args.normalization)
    settings = classifier_settings(args, classifier, circumstances["precision"])
    settings["--normalization"] = args.normalization
    digest = dist_util.on_main(statistics_digest, statistics, classifier.digest, args)
    settings["the statistics (classifier_statistics.py)"] = digest
    settings["the number of starting images"] = len(starts)
    settings["the list of starting images (--starting_data_dir, --labels_file)"] = images_digest(starts)
    digests = dist_util.on_main(samples_digests, folders, samples)

    folder = parts_folder(output, name, times, num_steps)
    results = {k: Result(output, name, k, num_steps, {**settings, SAMPLES: digests[k]}) for k in times}
    to_do = dist_util.on_main(unfinished_times, results, folder)
    if not to_do:
        dist_util.on_main(remove_parts, folder)  # of a run that was killed just before
        logger.info(f"all {len(times)} times are done already, with the same settings, in {output}: nothing to do")
        return 0
    starts_per_batch = max(1, args.batch_size // (1 + len(to_do)))
    together = {
        "the times that are computed together (--time_series)": to_do,
        "the number of starting images per batch (--batch_size)": starts_per_batch,
        SAMPLES: digest_of(digests[k] for k in to_do),
    }
    parts = Parts(folder, {**settings, **together}, circumstances)
    batches = cut(starts, {k: [f"{folders[k].path}/{path}" for path in samples[k]] for k in to_do}, starts_per_batch)
    left = dist_util.on_main(unfinished_batches, parts, parts.done(), len(batches))
    processes = dist_util.get_world_size()
    logger.info(
        f"{len(starts)} starting images from {args.starting_data_dir}, with samples of "
        f"k = {', '.join(map(str, to_do))} of N = {num_steps} from {data_dir}: "
        f"{len(left)} of {len(batches)} batches are to be done"
        + (f"; {len(times) - len(to_do)} times are done already" if len(times) > len(to_do) else "")
    )
    logger.info(
        f"{processes} process(es) of {circumstances['threads']} thread(s), {circumstances['hardware']}, "
        f"{circumstances['precision']}, {len(classifier.layers)} layers of {name}; results in {output}"
    )

    started, clock = now(), time.monotonic()
    mine = {index: batches[index] for index in dist_util.share_of(left)}
    lost = compare(classifier, normalization, autocast, mine, parts, args)
    lost = [loss for found in dist_util.gather_objects(lost) for loss in found]
    facts = {"started": started, "ended": now(), "seconds": round(time.monotonic() - clock, 3), "processes": processes}
    facts |= {**circumstances, "arguments": vars(args)}
    dist_util.on_main(finish, parts, batches, {k: results[k] for k in to_do}, classifier, lost, facts)
    for why in dict.fromkeys(why for _, why, _ in lost):
        logger.warn(why)
    if lost and dist_util.is_main():
        logger.error(f"{len({why for _, why, _ in lost})} images could not be read: the results are without them")
    return 1 if lost else 0


def number_of_steps(args: argparse.Namespace) -> int:
    """N, the number of steps after respacing. Raises UserError."""
    from guided_diffusion.respace import space_timesteps

    return len(space_timesteps(args.diffusion_steps, args.timestep_respacing or [args.diffusion_steps]))


# What decides the results, and what is done


SAMPLES = "the samples (--data_dir)"


class Result:
    """The files of one time.

    Args:
        output: the folder of results.
        name: of the classifier.
        step_reverse: k.
        num_steps: N.
        settings: what decides what is in them, by the names that the user knows.
    """

    def __init__(self, output: str, name: str, step_reverse: int, num_steps: int, settings: Mapping[str, Any]):
        from guided_diffusion.classifier_results import differences_file, logits_file

        self.step_reverse, self.settings = step_reverse, settings
        self.differences = differences_file(output, name, step_reverse, num_steps)
        self.logits = logits_file(output, name, step_reverse, num_steps)

    def is_finished(self) -> bool:
        """Whether both files are there and complete. Raises UserError where they were made with other settings."""
        from guided_diffusion.parts import finished_record

        return finished_record(self.differences, self.settings) is not None and bf.exists(self.logits)


def statistics_digest(path: str, classifier: str, args: argparse.Namespace) -> str:
    """SHA-256 of the file of statistics; empty where --normalization needs none.

    Raises UserError unless its record says that they are of this classifier, whose weights' digest is given.
    """
    from guided_diffusion.parts import record_of

    if args.normalization == "none":
        return ""
    try:
        weights = read_json(record_of(path))["settings"]["the classifier's weights (--classifier_path)"]
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{record_of(path)} is missing or damaged: nothing tells whose statistics {path} are.\n"
            "Remove both, and run classifier_statistics.py again"
        ) from None
    if weights != classifier:
        raise UserError(
            f"{path} is of another classifier: its weights were {weights[:12]}..., and are now {classifier[:12]}... "
            "(--classifier_path).\nRun classifier_statistics.py with these weights and another --output"
        )
    with bf.BlobFile(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def unfinished_times(results: Mapping[int, Result], folder: str) -> list[int]:
    """The times that are to be computed together. Where a killed run has left parts: those that it had begun with."""
    from guided_diffusion.parts import record_of

    undone = [k for k, result in results.items() if not result.is_finished()]
    for k in undone:
        for path in (results[k].logits, results[k].differences, record_of(results[k].differences)):
            remove_scratch_of(path)
    if not undone:
        return []
    try:
        begun = read_json(f"{folder}/settings.json")
        times = begun["settings"]["the times that are computed together (--time_series)"] if begun else undone
    except (ValueError, TypeError, KeyError):
        return undone  # damaged: `Parts` says so
    return times if set(undone) <= set(times) <= results.keys() else undone


def unfinished_batches(parts: Parts, done: set[int], count: int) -> list[int]:
    """The batches of which no part is there, or one in which images are missing since they could not be read."""
    return [index for index in range(count) if index not in done or not parts.read(index)["readable"].all()]


# Comparing


class Batch:
    """B starting images, and the paths of their samples, a list of B for each time."""

    def __init__(self, images: list[LabelledImage], samples: list[list[str]]):
        self.images, self.samples = images, samples


def cut(starts: list[LabelledImage], samples: Mapping[int, list[str]], size: int) -> list[Batch]:
    """Cut the list of starting images, in order, every `size`."""
    slices = [slice(first, first + size) for first in range(0, len(starts), size)]
    return [Batch(starts[s], [paths[s] for paths in samples.values()]) for s in slices]


def compare(
    classifier: Classifier,
    normalization: Normalization,
    autocast: AbstractContextManager,
    batches: Mapping[int, Batch],
    parts: Parts,
    args: argparse.Namespace,
) -> list[tuple[str, str, int]]:
    """Compare batches and write their parts.

    A batch of B starting images with samples of T times is one forward pass of (1 + T) B images.

    Returns:
        what could not be read: (path of the starting image, why, 0 for the image itself, 1 + t for its sample of the
        t-th time).
    """
    import torch

    from guided_diffusion import dist_util, logger
    from guided_diffusion.activations import Similarities
    from guided_diffusion.image_datasets import UnreadableImage
    from guided_diffusion.inference import enough_memory
    from guided_diffusion.pipeline import read_ahead
    from guided_diffusion.transfer import upload

    if not batches:
        return []
    lost: list[tuple[str, str, int]] = []
    times = len(next(iter(batches.values())).samples)
    processes = dist_util.get_world_size()
    described = "comparing" if processes == 1 else f"comparing (process 1 of {processes})"
    blank = classifier.preprocess(np.zeros((args.image_size, args.image_size, 3), np.uint8))
    bar = logger.progress_bar(sum(len(batch.images) for batch in batches.values()) * (1 + times), described, "image")
    last: Callable[[], None] | None = None  # writes what the batch before gave
    with torch.inference_mode(), Similarities(classifier, normalization, times) as watch, bar:
        for index, pictures in read_ahead(
            batches, lambda index: readers(classifier, batches[index], args), args.num_workers
        ):
            images = batches[index].images
            unreadable = np.array([isinstance(picture, UnreadableImage) for picture in pictures])
            for row in np.flatnonzero(unreadable):
                lost.append((images[row % len(images)].path, str(pictures[row]), int(row) // len(images)))
            # The place of a picture that cannot be read is left blank: the others keep theirs, and so their numbers.
            x = torch.stack([blank if bad else p for p, bad in zip(pictures, unreadable, strict=True)])
            with autocast, enough_memory(len(x), f",\nand remove {parts.folder}, which was begun with this one"):
                classifier.model(upload(x, dist_util.dev()))  # ((1 + T) B, 3, S, S)
            if last:
                last()  # now, since this batch is under way: a GPU goes on meanwhile
            last = partial(write_part, parts, index, ~unreadable.reshape(1 + times, len(images)), watch.latest)
            bar.update(len(x))
            dist_util.check_peers()
        last()
    return lost


def write_part(parts: Parts, index: int, readable: np.ndarray, found: Callable[[], Compared]) -> None:
    """Write what a batch gave: `readable` (1 + T, B), similarities (T, B, L), logits (1 + T, B, classes)."""
    parts.write(index, readable=readable, **found()._asdict())


def readers(classifier: Classifier, batch: Batch, args: argparse.Namespace) -> list[partial]:
    """The calls that read a batch as the classifier takes it: the starting images, then the samples, time by time.

    They return the exception for an image that cannot be read. They raise UserError for a sample of another size.
    """
    from guided_diffusion.classifier_results import readable_or_error
    from guided_diffusion.image_datasets import read_image
    from guided_diffusion.sample_pairs import read_sample

    def start(path: str) -> torch.Tensor:
        return classifier.preprocess(read_image(f"{args.starting_data_dir}/{path}", args.image_size))

    def sample(path: str) -> torch.Tensor:
        return classifier.preprocess(read_sample(path, args.image_size))

    calls = [partial(readable_or_error, start, image.path) for image in batch.images]
    return calls + [partial(readable_or_error, sample, path) for paths in batch.samples for path in paths]


def finish(
    parts: Parts,
    batches: list[Batch],
    results: Mapping[int, Result],
    classifier: Classifier,
    lost: list[tuple[str, str, int]],
    facts: Mapping[str, Any],
) -> None:
    """Put the parts together, time by time. The parts stay if an image is missing. Raises UserError."""
    from guided_diffusion import logger

    images = [image for batch in batches for image in batch.images]
    for t, (k, result) in enumerate(results.items()):
        unreadable = {path: why for path, why, row in lost if row in (0, 1 + t)}
        if len(unreadable) == len(images):
            raise UserError(f"none of the pairs of k = {k} could be read: there is nothing to write (--data_dir)")
        record = {
            "finished": not unreadable,
            "settings": result.settings,
            "images": {"chosen": len(images), "unreadable": unreadable},
            "last_run": facts,
        }
        write_time(parts, images, range(len(batches)), t, result, classifier, record)
        logger.info(f"k = {k}: {len(images) - len(unreadable)} of {len(images)} pairs are in {result.differences}")
    if not lost:
        parts.remove()


def write_time(
    parts: Parts,
    images: list[LabelledImage],
    indices: Iterable[int],
    t: int,
    result: Result,
    classifier: Classifier,
    record: Mapping[str, Any],
) -> None:
    """Write the two files of the t-th time."""
    from guided_diffusion.classifier_results import SIMILARITIES, labels_of, write_result
    from guided_diffusion.files import whole_file
    from guided_diffusion.parts import plain_write_errors

    pieces = defaultdict(list)
    for index in indices:
        part = parts.read(index)
        fine = part["readable"][0] & part["readable"][1 + t]  # (B,)
        pieces["fine"].append(fine)
        pieces["logits_start"].append(part["logits"][0, fine])
        pieces["logits_sample"].append(part["logits"][1 + t, fine])
        for name in SIMILARITIES:
            pieces[name].append(part[name][t, fine])
    arrays = {name: np.concatenate(found) for name, found in pieces.items()}
    pairs = [image for image, fine in zip(images, arrays["fine"], strict=True) if fine]
    names = np.array([image.path for image in pairs])
    layers = np.array([layer.name for layer in classifier.layers])
    with plain_write_errors(), whole_file(result.logits) as f:
        logits = {name: arrays[name] for name in ("logits_start", "logits_sample")}
        np.savez(f, names=names, labels=labels_of(pairs), **logits)
    write_result(result.differences, {"names": names, "layers": layers, **{s: arrays[s] for s in SIMILARITIES}}, record)


def time_list(text: str) -> list[int]:
    """The type of a flag that is one time or several, separated by commas."""
    times = [whole_number(0)(word) for word in text.replace(",", " ").split()]
    if not times:
        raise argparse.ArgumentTypeError(f"expected times such as 25 50 125, not {text!r}")
    return times


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    from guided_diffusion.classifier_results import add_flags

    parser = ArgumentParser(
        usage="%(prog)s --starting_data_dir FOLDER --time_series K [K ...] [flags]", description=__doc__
    )
    add = parser.add_argument_group("the images").add_argument
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
        help="classes of the images where names do not tell: LOC_val_solution.csv, a wnid per line, or an "
        "ILSVRC2012_ID per line",
    )
    add_flags(
        parser,
        output="the statistics and of the results",
        batch_size=", starting images and samples of all times together",
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
