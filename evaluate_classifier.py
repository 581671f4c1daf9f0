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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from guided_diffusion.command_line import ArgumentParser, Flattened, run, time_list, whole_number

# isort: split
import blobfile as bf
import numpy as np

from guided_diffusion.classes import add_class_order, read_classes
from guided_diffusion.errors import UserError
from guided_diffusion.files import read_json, remove_scratch_of
from guided_diffusion.script_util import HELP, number_of_steps
from guided_diffusion.shards import Shard, add_shard_flags, shard_of

if TYPE_CHECKING:
    import torch

    from guided_diffusion.activations import Compared, Normalization
    from guided_diffusion.forward_backward import SampleFolder
    from guided_diffusion.image_datasets import LabelledImage
    from guided_diffusion.locks import Locks
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
    from guided_diffusion.locks import hold
    from guided_diffusion.parts import Parts, compare_with_parts, lock_of, remove_parts
    from guided_diffusion.run_record import now
    from guided_diffusion.sample_pairs import check_sizes, find_pairs, samples_digests

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

    classifier, autocast, circumstances = set_up(args)
    recorded = dist_util.on_main(read_classes, args.classifier_path)
    starts = dist_util.on_every_rank(with_labels_of, classifier, starts, class_names, args.class_order, recorded)
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
    pairs = Pairs(args.starting_data_dir, data_dir, starts, {k: (folders[k], samples[k]) for k in times})
    units = {lock_of(result.differences, shard): result.differences for result in results.values()}
    with hold(units, about=settings) as locks:
        to_do = dist_util.on_main(unfinished_times, results, folder, shard, pairs)
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
        parts = Parts(folder, {**settings, **together}, circumstances, shard, locks)
        dist_util.on_main(compare_with_parts, pairs.inputs, pairs.paths(to_do), parts)
        pairs.inputs = dist_util.broadcast_object(pairs.inputs)
        batches = cut(starts, {k: pairs.samples_of(k) for k in to_do}, starts_per_batch)
        mine = shard.units(range(len(batches)))
        left = dist_util.on_main(unfinished_batches, parts, parts.done(), mine)
        processes = dist_util.get_world_size()
        logger.info(
            f"{len(starts)} starting images from {args.starting_data_dir}, with samples of "
            f"k = {', '.join(map(str, to_do))} of N = {num_steps} from {data_dir}: "
            f"{len(left)} of {len(mine)} batches are to be done"
            + (f" by {shard}" if shard.count > 1 else "")
            + (f"; {len(times) - len(to_do)} times are done already" if len(times) > len(to_do) else "")
        )
        logger.info(
            f"{processes} process(es) of {circumstances['threads']} thread(s), {circumstances['hardware']}, "
            f"{circumstances['precision']}, {len(classifier.layers)} layers of {name}; results in {output}"
        )

        started, clock = now(), time.monotonic()
        share = {index: batches[index] for index in dist_util.share_of(left)}
        compare(classifier, normalization, autocast, share, parts, pairs, locks, args)
        dist_util.barrier()
        facts = {"started": started, "ended": now(), "seconds": round(time.monotonic() - clock, 3)}
        facts |= {"processes": processes, **circumstances, "arguments": vars(args)}
        todo_results = {k: results[k] for k in to_do}
        return dist_util.on_main(finish, parts, batches, todo_results, classifier, pairs, facts, locks)


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

    def is_finished(self, shard: Shard) -> bool:
        """Whether both files are there and complete. Raises UserError if they were made with other settings."""
        from guided_diffusion.parts import finished_record

        return finished_record(self.differences, self.settings, shard) is not None and bf.exists(self.logits)


STARTS, SAMPLE_FILES = "starting images", "samples"  # the two kinds of files that results are computed from


class Pairs:
    """Starting images, their samples at every time, and what is known of the contents of these files.

    Args:
        starting_data_dir: folder of the starting images.
        data_dir: folder of the samples of all times.
        starts: the starting images.
        times: by k, the folder of the samples, and their paths in it in the order of the starting images.
    """

    def __init__(
        self,
        starting_data_dir: str,
        data_dir: str,
        starts: Sequence[LabelledImage],
        times: Mapping[int, tuple[SampleFolder, Sequence[str]]],
    ):
        from guided_diffusion.inputs import Inputs

        self.starts, self._times, self.data_dir = [image.path for image in starts], times, data_dir
        self.inputs = {
            STARTS: Inputs(starting_data_dir, "--starting_data_dir"),
            SAMPLE_FILES: Inputs(data_dir, "--data_dir"),
        }

    def samples_of(self, k: int) -> list[str]:
        """Paths of the samples of time k, relative to the folder of the samples of all times."""
        folder, paths = self._times[k]
        below = folder.path.removeprefix(f"{folder.output}/")
        return [f"{below}/{path}" for path in paths]

    def paths(self, times: Sequence[int]) -> dict[str, list[str]]:
        """Paths of the files that the results of some times are computed from."""
        return {STARTS: self.starts, SAMPLE_FILES: [path for k in times for path in self.samples_of(k)]}

    def check_starts(self) -> None:
        """Raise UserError unless the starting images are those that the samples were made from, if that is known."""
        from guided_diffusion.sample_folders import recorded_inputs

        inputs = self.inputs[STARTS]
        for folder, _ in self._times.values():
            inputs.merge(recorded_inputs(folder) or {}, folder.path)
        inputs.known = inputs.entries(self.starts)
        inputs.compare(self.starts, self.data_dir, "make the samples again")


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


def unfinished_times(results: Mapping[int, Result], folder: str, shard: Shard, pairs: Pairs) -> list[int]:
    """The times that are to be computed together. If a killed run has left parts: those that it had begun with.

    Raises UserError if results were made with other settings, or of other files than those that are there now.
    """
    from guided_diffusion.inputs import inputs_of
    from guided_diffusion.parts import compare_with_result, record_of

    pairs.check_starts()
    undone = [k for k, result in results.items() if not result.is_finished(shard)]
    for k, result in results.items():
        if k not in undone:
            compare_with_result(pairs.inputs, pairs.paths([k]), result.differences)
        elif shard.count == 1:
            for path in (
                result.logits,
                result.differences,
                record_of(result.differences),
                inputs_of(result.differences),
            ):
                remove_scratch_of(path)
    if not undone:
        return []
    try:
        begun = read_json(f"{folder}/settings.json")
        times = begun["settings"]["the times that are computed together (--time_series)"] if begun else undone
        return times if set(undone) <= set(times) <= results.keys() else undone
    except (ValueError, TypeError, KeyError):
        return undone  # damaged: `Parts` says so


def unfinished_batches(parts: Parts, done: set[int], indices: Sequence[int]) -> list[int]:
    """The batches of which no part is there, or one in which images are missing since they could not be read."""
    return [index for index in indices if index not in done or not parts.read(index)["readable"].all()]


# Comparing


class Batch:
    """B starting images, and the paths of their samples in the folder of all times, a list of B for each time."""

    def __init__(self, images: list[LabelledImage], samples: list[list[str]]):
        self.images, self.samples = images, samples

    def paths(self) -> dict[str, list[str]]:
        """Paths of the files, in the order in which they are read."""
        return {STARTS: [image.path for image in self.images], SAMPLE_FILES: [p for of_k in self.samples for p in of_k]}


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
    pairs: Pairs,
    locks: Locks,
    args: argparse.Namespace,
) -> None:
    """Compare batches and write their parts, which note the images that could not be read.

    A batch of B starting images with samples of T times is one forward pass of (1 + T) B images. Raises ResultError if
    the classifier gives NaN or infinity.
    """
    import torch

    from guided_diffusion import dist_util, logger
    from guided_diffusion.activations import Similarities
    from guided_diffusion.image_datasets import UnreadableImage
    from guided_diffusion.memory import enough_memory
    from guided_diffusion.pipeline import read_ahead
    from guided_diffusion.transfer import upload

    if not batches:
        return
    times = len(next(iter(batches.values())).samples)
    processes = dist_util.get_world_size()
    described = "comparing" if processes == 1 else f"comparing (process 1 of {processes})"
    blank = classifier.preprocess(np.zeros((args.image_size, args.image_size, 3), np.uint8))
    bar = logger.progress_bar(sum(len(batch.images) for batch in batches.values()) * (1 + times), described, "image")
    last: Callable[[], None] | None = None  # writes what the batch before gave
    with torch.inference_mode(), Similarities(classifier, normalization, times) as watch, bar:
        for index, pictures in read_ahead(
            batches, lambda index: readers(classifier, batches[index], pairs, args), args.num_workers
        ):
            locks.check()
            bad = [isinstance(picture, UnreadableImage) for picture in pictures]
            # An unreadable picture is left blank in its place: the others keep theirs, and so their numbers.
            x = torch.stack([blank if is_bad else p for p, is_bad in zip(pictures, bad, strict=True)])
            with autocast, enough_memory(len(x), f",\nand remove {parts.folder}, which was begun with this one"):
                classifier.model(upload(x, dist_util.dev()))  # ((1 + T) B, 3, S, S)
            if last:
                last()  # now, since this batch is under way: a GPU goes on meanwhile
            readable = ~np.array(bad).reshape(1 + times, -1)
            last = partial(write_part, parts, index, notes_of(batches[index], pictures, pairs), readable, watch.latest)
            bar.update(len(x))
            dist_util.check_peers()
        last()


def notes_of(batch: Batch, pictures: Sequence[Any], pairs: Pairs) -> dict[str, Any]:
    """What a part says about its files: sizes and digests of those that were read, and why others were not."""
    notes: dict[str, Any] = {"inputs": {}, "unreadable": {}}
    pictures = iter(pictures)
    for name, paths in batch.paths().items():
        bad = {path: str(p) for path, p in zip(paths, pictures, strict=False) if isinstance(p, Exception)}
        notes["inputs"][name] = pairs.inputs[name].entries(path for path in paths if path not in bad)
        notes["unreadable"][name] = bad
    return notes


def write_part(
    parts: Parts, index: int, notes: dict[str, Any], readable: np.ndarray, found: Callable[[], Compared]
) -> None:
    """Write what a batch gave: `readable` (1 + T, B), similarities (T, B, L), logits (1 + T, B, classes)."""
    parts.write(index, notes, readable=readable, **found()._asdict())


def readers(classifier: Classifier, batch: Batch, pairs: Pairs, args: argparse.Namespace) -> list[partial]:
    """The calls that read a batch as the classifier takes it: the starting images, then the samples, time by time.

    They return the exception for an image that cannot be read. They raise UserError for a sample of another size, and
    for a file that has changed.
    """
    from guided_diffusion.classifier_results import readable_or_error
    from guided_diffusion.image_datasets import read_image
    from guided_diffusion.sample_pairs import read_sample

    def start(path: str) -> torch.Tensor:
        check = pairs.inputs[STARTS].note(path)
        return classifier.preprocess(read_image(f"{args.starting_data_dir}/{path}", args.image_size, check))

    def sample(path: str) -> torch.Tensor:
        check = pairs.inputs[SAMPLE_FILES].note(path)
        return classifier.preprocess(read_sample(f"{pairs.data_dir}/{path}", args.image_size, check))

    calls = {STARTS: start, SAMPLE_FILES: sample}
    return [partial(readable_or_error, calls[name], path) for name, paths in batch.paths().items() for path in paths]


def finish(
    parts: Parts,
    batches: list[Batch],
    results: Mapping[int, Result],
    classifier: Classifier,
    pairs: Pairs,
    facts: Mapping[str, Any],
    locks: Locks,
) -> int:
    """Put the parts together, time by time, if all are there. They stay if an image is missing. Returns the status."""
    from guided_diffusion import logger

    locks.check()
    with parts.update():
        if all(result.is_finished(parts.shard) for result in results.values()):
            return 0  # another shard has just done this
        if missing := parts.missing(len(batches)):
            if any(index % parts.shard.count == parts.shard.index for index in missing):
                parts.read(missing[0])  # says that it has disappeared
            logger.info(f"{parts.shard} is done; {len(missing)} of {len(batches)} batches are for the other shards")
            return report([parts.notes(index) for index in sorted(parts.present())], pairs)
        notes = [parts.notes(index) for index in range(len(batches))]
        for t, (k, result) in enumerate(results.items()):
            count = write_time(parts, batches, notes, t, result, classifier, pairs, facts)
            logger.info(f"k = {k}: {count} of {len(pairs.starts)} pairs are in {result.differences}")
        status = report(notes, pairs)
        if not status:
            parts.remove()
        return status


def report(notes: Sequence[Mapping[str, Any]], pairs: Pairs) -> int:
    """Name the files that could not be read. Returns the exit status."""
    from guided_diffusion import logger

    lost = [why for of_part in notes for group in of_part.get("unreadable", {}).values() for why in group.values()]
    for why in lost:
        logger.warn(why)
    if lost:
        logger.error(f"{len(lost)} images could not be read: the results are without them")
    return 1 if lost else 0


def write_time(
    parts: Parts,
    batches: Sequence[Batch],
    notes: Sequence[Mapping[str, Any]],
    t: int,
    result: Result,
    classifier: Classifier,
    pairs: Pairs,
    facts: Mapping[str, Any],
) -> int:
    """Write the files of the t-th time. Returns the number of pairs; raises UserError if none could be read."""
    from guided_diffusion.classifier_results import SIMILARITIES, labels_of, write_result
    from guided_diffusion.files import whole_file
    from guided_diffusion.inputs import as_entries, inputs_of
    from guided_diffusion.parts import plain_write_errors, write_inputs

    pieces = defaultdict(list)
    images: list[LabelledImage] = []
    unreadable: dict[str, str] = {}  # path of the starting image -> why the pair is missing
    for index, batch in enumerate(batches):
        part, of_part = parts.read(index), notes[index]
        for name, entries in as_entries(of_part.get("inputs", {})).items():
            pairs.inputs[name].known |= entries
        why = {path: text for group in of_part.get("unreadable", {}).values() for path, text in group.items()}
        fine = part["readable"][0] & part["readable"][1 + t]  # (B,)
        for image, sample, is_fine in zip(batch.images, batch.samples[t], fine, strict=True):
            if is_fine:
                images.append(image)
            else:
                unreadable[image.path] = why.get(image.path) or why.get(sample, "unreadable")
        pieces["logits_start"].append(part["logits"][0, fine])
        pieces["logits_sample"].append(part["logits"][1 + t, fine])
        for name in SIMILARITIES:
            pieces[name].append(part[name][t, fine])
    if not images:
        raise UserError(
            f"none of the pairs of k = {result.step_reverse} could be read: there is nothing to write (--data_dir)"
        )
    record = {
        "finished": not unreadable,
        "num_shards": parts.shard.count,
        "settings": result.settings,
        "images": {"chosen": len(pairs.starts), "unreadable": unreadable},
        "last_run": facts,
    }
    arrays = {name: np.concatenate(found) for name, found in pieces.items()}
    names = np.array([image.path for image in images])
    layers = np.array([layer.name for layer in classifier.layers])
    write_inputs(inputs_of(result.differences), pairs.inputs, pairs.paths([result.step_reverse]))
    with plain_write_errors(), whole_file(result.logits) as f:
        logits = {name: arrays[name] for name in ("logits_start", "logits_sample")}
        np.savez(f, names=names, labels=labels_of(images), **logits)
    write_result(result.differences, {"names": names, "layers": layers, **{s: arrays[s] for s in SIMILARITIES}}, record)
    return len(images)


def create_argparser() -> argparse.ArgumentParser:
    """The flags of the script."""
    from guided_diffusion.classifier_results import add_flags

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
