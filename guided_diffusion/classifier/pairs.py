"""Samples and the starting images that they were made of: pairing them, and saying exactly what is missing."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import blobfile as bf
import numpy as np

from .. import logger
from ..errors import UserError
from ..forward_backward import SampleFolder
from ..images.folder import LabelledImage, check_stems, label_where_known, list_images
from ..images.io import Check, open_image
from ..runs.inputs import Inputs
from ..runs.parts import Parts
from ..runs.settings import digest_of
from ..runs.shards import cut
from ..sample_folders import recorded_inputs
from ..system.files import is_remote, walk
from .results import SIMILARITIES, class_names_of, readable_or_error

STARTS, SAMPLES = "starting images", "samples"  # kinds of files


def find_pairs(
    starting_data_dir: str, labels_file: str | None, folders: Mapping[int, SampleFolder]
) -> tuple[list[LabelledImage], list[str], dict[int, list[str]]]:
    """Pair samples with their starting images.

    Args:
        starting_data_dir: the starting images; those without a sample at any time are left out.
        labels_file: see `label_images`. Classes need not be known.
        folders: by k, where the samples are.

    Returns:
        starts: the starting images that have samples, in the order of their paths.
        class_names: the classes of all images that are there.
        samples: by k the paths of the samples, in the same order, relative to the folder of their time.

    Raises:
        UserError: a sample has no starting image, a time lacks samples that another has, or has none.
    """
    flag = "--starting_data_dir"
    paths = list_images(starting_data_dir, flag)
    images, why_unknown = label_where_known(starting_data_dir, paths, labels_file, "text", flag)
    if why_unknown:
        logger.warn(f"{why_unknown}: their classes are unknown (--labels_file)")
    found = {k: find_samples(folder) for k, folder in folders.items()}
    check_complete(found, {stem_of(image.path) for image in images}, folders, starting_data_dir)
    stems = set().union(*found.values())
    starts = [image for image in images if stem_of(image.path) in stems]
    check_stems([image.path for image in starts], flag)
    if without := len(images) - len(starts):
        logger.info(f"{without} of {len(images)} images in {starting_data_dir} have no sample: they are left out")
    in_order = {k: [samples[stem_of(image.path)] for image in starts] for k, samples in found.items()}
    return starts, class_names_of(images), in_order


def find_samples(folder: SampleFolder) -> dict[str, str]:
    """The samples in the folder of a time: path of the starting image without its extension -> path of the sample.

    Raises UserError where there is none, or images that are called otherwise.
    """
    ending = stem_of(folder.sample(""))  # _t0500
    paths = sorted(path for path in walk(folder.path) if is_sample(path))
    if not paths:
        raise UserError(no_samples(folder))
    if odd := [path for path in paths if not stem_of(path).endswith(ending)]:
        raise UserError(
            f"{len(odd)} image(s) in {folder.path} are not called as samples of that time: {some(odd)};\n"
            f"expected names that end in {ending}.JPEG or {ending}.png (--diffusion_steps, --timestep_respacing)"
        )
    samples = {stem_of(path).removesuffix(ending): path for path in paths}
    if len(samples) < len(paths):
        twice = next(path for path in paths if samples[stem_of(path).removesuffix(ending)] != path)
        raise UserError(f"{folder.path} has two samples of one image, {twice} and another: move one away (--data_dir)")
    return samples


def is_sample(path: str) -> bool:
    """Whether a file is a sample, and not, say, one that is being written."""
    return path.endswith((".JPEG", ".png")) and not path.rpartition("/")[2].startswith(".")


def stem_of(path: str) -> str:
    """A path without its extension."""
    return os.path.splitext(path)[0]


def no_samples(folder: SampleFolder) -> str:
    """What to say where the folder of a time is missing or empty: which times there are."""
    there: dict[int, list[int]] = defaultdict(list)
    for entry in bf.listdir(folder.output) if bf.isdir(folder.output) else ():
        match = re.fullmatch(r"t_(\d+)_(\d+)_images/?", entry)
        if match and any(map(is_sample, walk(f"{folder.output}/{entry.rstrip('/')}"))):
            there[int(match[2])].append(int(match[1]))
    state = "holds no samples" if bf.isdir(folder.path) else "does not exist"
    lists = "; ".join(f"of N = {n}: k = {', '.join(map(str, sorted(ks)))}" for n, ks in sorted(there.items()))
    return (
        f"there are no samples of k = {folder.step_reverse} of N = {folder.num_steps}: {folder.path} {state}.\n"
        f"Samples are there {lists or 'of no time at all'} (--time_series, --timestep_respacing, --data_dir)"
    )


def check_complete(
    found: Mapping[int, Mapping[str, str]],
    starts: set[str],
    folders: Mapping[int, SampleFolder],
    starting_data_dir: str,
) -> None:
    """Raise UserError unless every sample has its starting image, and every time the samples of the others.

    Args:
        found: by k, the samples: path of the starting image without its extension -> path of the sample.
        starts: paths of the starting images, without their extensions.
        folders: by k, where the samples are.
        starting_data_dir: where the starting images are.
    """
    for k, samples in found.items():
        if alone := sorted(path for stem, path in samples.items() if stem not in starts):
            raise UserError(
                f"{len(alone)} of {len(samples)} samples in {folders[k].path} have no starting image in "
                f"{starting_data_dir}: {some(alone)}.\nGive the folder that the samples were made of "
                "(--starting_data_dir), or its samples (--data_dir)"
            )
    everything = set().union(*found.values())
    lacking = {k: sorted(everything - samples.keys()) for k, samples in found.items() if len(samples) < len(everything)}
    if lacking:
        phrases = [f"k = {k} lacks {len(stems)} of {len(everything)} ({some(stems)})" for k, stems in lacking.items()]
        raise UserError(
            f"samples are missing in {next(iter(folders.values())).output} that other times have: "
            f"{'; '.join(phrases)}.\nMake them with forward_backward_dataset_sample.py, or leave these times out of "
            "--time_series"
        )


def check_sizes(folders: Mapping[int, SampleFolder], samples: Mapping[int, Sequence[str]], image_size: int) -> None:
    """Look at the first sample of every time. Raises UserError where it has another size than --image_size says."""
    for k, folder in folders.items():
        readable_or_error(read_sample, f"{folder.path}/{samples[k][0]}", image_size)


def read_sample(path: str, image_size: int, check: Check | None = None) -> np.ndarray:
    """The pixels of a sample: uint8 (H, W, 3). Raises UserError where it has another size, UnreadableImage.

    `check` is called with the open file.
    """
    pixels = np.array(open_image(path, check))
    if pixels.shape[:2] != (image_size, image_size):
        height, width = pixels.shape[:2]
        raise UserError(f"{path} has {width}x{height} pixels, expected {image_size}x{image_size} (--image_size)")
    return pixels


def some(paths: Sequence[str]) -> str:
    """Up to three paths, for a message."""
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")


def check_starts(inputs: Inputs, starts: Sequence[str], folders: Mapping[int, SampleFolder], data_dir: str) -> None:
    """Raise UserError if the samples are on record as made from starting images with other contents."""
    for folder in folders.values():
        inputs.merge(recorded_inputs(folder) or {}, folder.path)
    inputs.known = inputs.entries(starts)
    inputs.compare(starts, data_dir, "make the samples again")


def samples_digests(folders: Mapping[int, SampleFolder], samples: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """By k, SHA-256 of the names and sizes of its samples."""

    def size(path: str) -> int:
        return bf.stat(path).size if is_remote(path) else os.path.getsize(path)

    return {
        k: digest_of(f"{path}\t{size(f'{folders[k].path}/{path}')}" for path in paths) for k, paths in samples.items()
    }


class PairBatch(NamedTuple):
    """B starting images and their samples.

    Attributes:
        index: number of the batch.
        images: starting images.
        samples: for each time, paths of the B samples relative to the folder of all times.
    """

    index: int
    images: Sequence[LabelledImage]
    samples: Sequence[Sequence[str]]

    @property
    def files(self) -> dict[str, list[str]]:
        """Paths of the starting images, and of the samples, time by time."""
        samples = [path for of_time in self.samples for path in of_time]
        return {STARTS: [image.path for image in self.images], SAMPLES: samples}


def pair_batches(starts: Sequence[LabelledImage], samples: Sequence[Sequence[str]], size: int) -> list[PairBatch]:
    """Cut the list of starting images, in order, every `size`; `samples` has a list of paths for each time."""
    of_times = zip(*(cut(paths, size) for paths in samples), strict=True)
    return [PairBatch(i, *batch) for i, batch in enumerate(zip(cut(starts, size), of_times, strict=True))]


def join_parts(
    parts: Parts, batches: Sequence[PairBatch], t: int, unreadable: Mapping[str, str]
) -> tuple[list[LabelledImage], dict[str, str], dict[str, np.ndarray]]:
    """Join the parts of all batches at the t-th time.

    Args:
        parts: parts, with similarities (T, B, L) and logits (1 + T, B, classes).
        batches: the batches.
        t: number of the time.
        unreadable: unreadable files: path -> why.

    Returns:
        images: starting images of the n complete pairs.
        missing: starting images of the other pairs: path -> why.
        arrays: similarities (n, L), logits_start and logits_sample (n, classes), by name.
    """
    images: list[LabelledImage] = []
    missing: dict[str, str] = {}
    pieces = defaultdict(list)
    for batch in batches:
        part = parts.read(batch.index)
        readable = part["readable"].reshape(-1, len(batch.images))  # (1 + T, B)
        both = readable[0] & readable[1 + t]
        for image, sample, is_readable in zip(batch.images, batch.samples[t], both, strict=True):
            if is_readable:
                images.append(image)
            else:
                missing[image.path] = unreadable.get(image.path) or unreadable.get(sample, "unreadable")
        pieces["logits_start"].append(part["logits"][0, both])
        pieces["logits_sample"].append(part["logits"][1 + t, both])
        for name in SIMILARITIES:
            pieces[name].append(part[name][t, both])
    return images, missing, {name: np.concatenate(values) for name, values in pieces.items()}
