"""Pairing samples with their starting images, and reporting what is missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import blobfile as bf
import numpy as np

from .. import logger
from ..errors import UserError
from ..forward_backward import SampleFolder
from ..images.folder import (
    LabelledImage,
    check_stems,
    label_where_known,
    list_images,
    list_some,
    parse_sample,
    without_extension,
)
from ..images.io import Check, UnreadableImage, open_image
from ..runs.inputs import Inputs
from ..runs.parts import Parts
from ..runs.settings import digest_of
from ..runs.shards import cut
from ..sample_folders import recorded_inputs
from ..system.files import walk
from .results import SIMILARITIES, class_names_of

STARTS, SAMPLES = "starting images", "samples"  # kinds of files


def find_pairs(
    starting_data_dir: str, labels_file: str | None, folders: Mapping[int, SampleFolder]
) -> tuple[list[LabelledImage], list[str], dict[int, list[list[str]]]]:
    """Pair samples with their starting images: all trajectories of the first turn.

    Samples of later turns are left out: they are further from the image than the time k says.

    Args:
        starting_data_dir: folder of the starting images; those without any sample are skipped.
        labels_file: see `label_images`. Classes may be unknown.
        folders: folders of samples by k.

    Returns:
        starts: the starting images that have samples, in the order of their paths.
        class_names: the classes of all images.
        samples: by k, a list of the M samples of each of `starts`, as paths relative to their folder. M may depend on
            k.

    Raises:
        UserError: a sample has no starting image, a time lacks samples, or an image lacks samples that others have at
            the same time.
    """
    flag = "--starting_data_dir"
    paths = list_images(starting_data_dir, flag)
    images, why_unknown = label_where_known(starting_data_dir, paths, labels_file, "text", flag)
    if why_unknown:
        logger.warn(f"{why_unknown}: their classes are unknown (--labels_file)")
    found = {k: find_samples(folder) for k, folder in folders.items()}
    check_complete(found, {without_extension(image.path) for image in images}, folders, starting_data_dir)
    with_samples = set(starts_with_samples(paths, found, starting_data_dir))
    starts = [image for image in images if image.path in with_samples]
    return starts, class_names_of(images), samples_of_starts([image.path for image in starts], found)


Found = dict[str, dict[int, str]]  # path of a starting image without its extension -> paths of samples, by trajectory


def starts_with_samples(paths: Sequence[str], found: Mapping[int, Found], starting_data_dir: str) -> list[str]:
    """The starting images, out of `paths`, that have samples. `found` has the results of `find_samples` by k.

    Raises UserError if two of them differ in their extensions alone.
    """
    stems = set().union(*found.values())
    starts = [path for path in paths if without_extension(path) in stems]
    check_stems(starts, "--starting_data_dir")
    if without := len(paths) - len(starts):
        logger.info(f"{without} of {len(paths)} images in {starting_data_dir} have no sample: they are left out")
    return starts


def samples_of_starts(starts: Sequence[str], found: Mapping[int, Found]) -> dict[int, list[list[str]]]:
    """By k, the paths of each start's samples in the order of trajectories, relative to their folder."""
    stems = [without_extension(path) for path in starts]
    return {k: [[path for _, path in sorted(samples[stem].items())] for stem in stems] for k, samples in found.items()}


def find_samples(folder: SampleFolder) -> Found:
    """The samples of the first turn in a folder.

    Raises UserError if there are none, or if images have other names than samples.
    """
    ending = without_extension(folder.sample(""))  # _t0500
    paths = sorted(path for path in walk(folder.path) if is_sample(path))
    names = {path: parse_sample(without_extension(path)) for path in paths}
    later = {path for path, name in names.items() if name and name.turn > 1}
    if not names.keys() - later:
        times: dict[int, list[int]] = defaultdict(list)
        for entry in bf.listdir(folder.output) if bf.isdir(folder.output) else ():
            match = re.fullmatch(r"t_(\d+)_(\d+)_images/?", entry)
            if match and any(map(is_sample, walk(f"{folder.output}/{entry.rstrip('/')}"))):
                times[int(match[2])].append(int(match[1]))
        listed = "; ".join(f"N = {n}: k = {', '.join(map(str, sorted(ks)))}" for n, ks in sorted(times.items()))
        problem = "has no samples" if bf.isdir(folder.path) else "does not exist"
        raise UserError(
            f"no samples for k = {folder.step_reverse} of N = {folder.num_steps}: {folder.path} {problem}.\n"
            f"Times with samples: {listed or 'none'} (--time_series, --timestep_respacing, --data_dir)"
        )
    if odd := [path for path, name in names.items() if name is None or f"_{name.time}" != ending]:
        raise UserError(
            f"{len(odd)} image(s) in {folder.path} are not named like samples of that time: {list_some(odd)};\n"
            f"expected names ending in {ending}.JPEG or {ending}.png (--diffusion_steps, --timestep_respacing)"
        )
    samples: Found = defaultdict(dict)
    for path in paths:
        name = names[path]
        if path not in later and (other := samples[name.start].setdefault(name.trajectory, path)) != path:
            raise UserError(f"{folder.path} has two files of a sample, {other} and {path}: move one away (--data_dir)")
    if later:
        logger.info(f"k = {folder.step_reverse}: {len(later)} samples of later turns are left out")
    return dict(samples)


def is_sample(path: str) -> bool:
    """Whether a file is a sample, and not one that is still being written."""
    return path.endswith((".JPEG", ".png")) and not path.rpartition("/")[2].startswith(".")


def check_complete(
    found: Mapping[int, Found],
    starts: set[str],
    folders: Mapping[int, SampleFolder],
    starting_data_dir: str,
) -> None:
    """Raise UserError unless every sample has its starting image, every time has samples of the same images, and every
    image has as many samples as the others at the same time.

    `found` has the results of `find_samples` by k, `starts` the paths of the starting images without extensions.
    """
    for k, samples in found.items():
        if orphans := sorted(path for stem, own in samples.items() if stem not in starts for path in own.values()):
            total = sum(map(len, samples.values()))
            raise UserError(
                f"{len(orphans)} of {total} samples in {folders[k].path} have no starting image in "
                f"{starting_data_dir}: {list_some(orphans)}.\nExpected the folder that the samples were computed from "
                "(--starting_data_dir, --data_dir)"
            )
    stems = set().union(*found.values())
    missing = {k: sorted(stems - samples.keys()) for k, samples in found.items() if len(samples) < len(stems)}
    if missing:
        counts = [f"k = {k} lacks {len(lacks)} of {len(stems)} ({list_some(lacks)})" for k, lacks in missing.items()]
        raise UserError(
            f"some times in {next(iter(folders.values())).output} lack samples: {'; '.join(counts)}.\n"
            "Compute them with forward_backward_dataset_sample.py, or leave these times out (--time_series)"
        )
    for k, samples in found.items():
        count = max(max(own) for own in samples.values())
        if lacks := sorted(stem for stem, own in samples.items() if len(own) < count):
            raise UserError(
                f"{len(lacks)} of {len(samples)} images lack some of their {count} samples in {folders[k].path}: "
                f"{list_some(lacks)}.\nComplete them with forward_backward_dataset_sample.py --num_trajectories {count}"
            )


def check_sizes(
    folders: Mapping[int, SampleFolder], samples: Mapping[int, Sequence[Sequence[str]]], image_size: int
) -> None:
    """Raise UserError unless the first sample of every time has the size given by --image_size."""
    for k, folder in folders.items():
        with suppress(UnreadableImage):
            read_sample(f"{folder.path}/{samples[k][0][0]}", image_size)


def read_sample(path: str, image_size: int, check: Check | None = None) -> np.ndarray:
    """Read a sample: uint8 (image_size, image_size, 3). `check` is called with the open file.

    Raises UserError if it has another size, UnreadableImage if it cannot be read.
    """
    pixels = np.array(open_image(path, check))
    if pixels.shape[:2] != (image_size, image_size):
        height, width = pixels.shape[:2]
        raise UserError(f"{path} has {width}x{height} pixels, expected {image_size}x{image_size} (--image_size)")
    return pixels


def check_starts(inputs: Inputs, starts: Sequence[str], folders: Mapping[int, SampleFolder], data_dir: str) -> None:
    """Raise UserError if the samples were made, according to their records, from images with other contents."""
    for folder in folders.values():
        recorded = recorded_inputs(folder) or {}
        inputs.merge({path: recorded[path] for path in starts if path in recorded}, folder.path)
    inputs.compare(starts, data_dir, "make the samples again")


def samples_digests(
    folders: Mapping[int, SampleFolder], samples: Mapping[int, Sequence[Sequence[str]]]
) -> dict[int, str]:
    """SHA-256 of the names and sizes of the samples, by k."""
    return {
        k: digest_of(f"{path}\t{bf.stat(f'{folders[k].path}/{path}').size}" for path in chain(*lists))
        for k, lists in samples.items()
    }


class PairBatch(NamedTuple):
    """B starting images and S samples of each.

    Attributes:
        index: number of the batch.
        images: starting images.
        samples: S lists of the paths of B samples, relative to the folder of all times.
        which: for each of these lists, the number of the time, 0, 1, ..., and the trajectory, 1, 2, ...
        first: place of the first starting image in the list of all.
    """

    index: int
    images: Sequence[LabelledImage]
    samples: Sequence[Sequence[str]]
    which: Sequence[tuple[int, int]]
    first: int

    @property
    def files(self) -> dict[str, list[str]]:
        """Paths of the starting images, and of the samples, list by list."""
        return {STARTS: [image.path for image in self.images], SAMPLES: list(chain(*self.samples))}

    @property
    def num_images(self) -> int:
        """Number of starting images and samples, (1 + S) B."""
        return len(self.images) * (1 + len(self.samples))


def batch_shape(counts: Sequence[int], batch_size: int) -> tuple[int, int]:
    """The numbers of starting images and of trajectories per batch.

    A batch has the samples at all times, and of all trajectories if `batch_size` images suffice for that.

    Args:
        counts: M at each time.
        batch_size: images per batch; exceeded if one starting image and its samples at all times are more.
    """
    trajectories = min(max(counts), max(1, (batch_size - 1) // len(counts)))
    samples = sum(min(count, trajectories) for count in counts)
    return max(1, batch_size // (1 + samples)), trajectories


def pair_batches(
    starts: Sequence[LabelledImage], samples: Sequence[Sequence[Sequence[str]]], shape: tuple[int, int]
) -> list[PairBatch]:
    """Cut the list of starting images, in order, and the trajectories of each piece.

    Args:
        starts: all starting images.
        samples: for each time and starting image, the paths of the M samples.
        shape: result of `batch_shape`.
    """
    size, trajectories = shape
    counts = [len(of_time[0]) for of_time in samples]
    batches: list[PairBatch] = []
    for first in range(0, len(starts), size):
        piece = slice(first, first + size)
        for own in cut(range(max(counts)), trajectories):
            which = [(t, j) for t, count in enumerate(counts) for j in own if j < count]
            paths = [[of_start[j] for of_start in samples[t][piece]] for t, j in which]
            numbers = [(t, j + 1) for t, j in which]
            batches.append(PairBatch(len(batches), starts[piece], paths, numbers, first))
    return batches


def settings_of_batches(shape: tuple[int, int], batches: Sequence[PairBatch]) -> dict[str, int]:
    """The settings that determine what each part has."""
    size, trajectories = shape
    starts = {batch.first for batch in batches}
    cut = {"trajectories_per_batch": trajectories} if len(starts) < len(batches) else {}
    return {"starts_per_batch": size, **cut}


def describe_trajectories(samples: Mapping[int, Sequence[Sequence[str]]]) -> str:
    """The number of samples of an image at each time, in words; nothing if it is 1."""
    counts = sorted({len(of_time[0]) for of_time in samples.values()})
    return "" if counts == [1] else f", {' or '.join(map(str, counts))} of each image"


def join_parts(
    parts: Parts, batches: Sequence[PairBatch], t: int, unreadable: Mapping[str, str]
) -> tuple[list[LabelledImage], np.ndarray, dict[str, str], dict[str, np.ndarray]]:
    """Join the parts of all batches at the t-th time. Pairs are in the order of their images, then trajectories.

    Args:
        parts: parts, with similarities (S, B, L) and logits (1 + S, B, classes).
        batches: the batches.
        t: number of the time.
        unreadable: unreadable files: path -> why.

    Returns:
        images: the starting images of the n complete pairs, each as often as it has samples.
        trajectories: their trajectories (n,).
        missing: starting images of the other pairs: path -> why.
        arrays: similarities (n, L), logits_start and logits_sample (n, classes), by name.
    """
    pairs: list[tuple[int, int, LabelledImage]] = []  # place of the image, trajectory, image
    missing: dict[str, str] = {}
    pieces = defaultdict(list)
    for batch in batches:
        part = parts.read(batch.index)
        readable = part["readable"].reshape(-1, len(batch.images))  # (1 + S, B)
        for row, (time, trajectory) in enumerate(batch.which):
            if time != t:
                continue
            both = readable[0] & readable[1 + row]
            for i, (image, sample) in enumerate(zip(batch.images, batch.samples[row], strict=True)):
                if both[i]:
                    pairs.append((batch.first + i, trajectory, image))
                else:
                    missing[image.path] = unreadable.get(image.path) or unreadable.get(sample, "unreadable")
            pieces["logits_start"].append(part["logits"][0, both])
            pieces["logits_sample"].append(part["logits"][1 + row, both])
            for name in SIMILARITIES:
                pieces[name].append(part[name][row, both])
    order = sorted(range(len(pairs)), key=lambda pair: pairs[pair][:2])
    trajectories = np.array([pairs[pair][1] for pair in order], np.int64)
    arrays = {name: np.concatenate(values)[order] for name, values in pieces.items()}
    return [pairs[pair][2] for pair in order], trajectories, missing, arrays
