"""Pairing samples with their starting images, and reporting what is missing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import blobfile as bf
import numpy as np

from .. import logger
from ..errors import UserError
from ..forward_backward import SampleFolder
from ..images.folder import LabelledImage, check_stems, label_where_known, list_images, list_some, without_extension
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
) -> tuple[list[LabelledImage], list[str], dict[int, list[str]]]:
    """Pair samples with their starting images.

    Args:
        starting_data_dir: folder of the starting images; those without any sample are skipped.
        labels_file: see `label_images`. Classes may be unknown.
        folders: folders of samples by k.

    Returns:
        starts: the starting images that have samples, in the order of their paths.
        class_names: the classes of all images.
        samples: by k, the samples' paths relative to their folder, in the order of `starts`.

    Raises:
        UserError: a sample has no starting image, or a time lacks samples.
    """
    flag = "--starting_data_dir"
    paths = list_images(starting_data_dir, flag)
    images, why_unknown = label_where_known(starting_data_dir, paths, labels_file, "text", flag)
    if why_unknown:
        logger.warn(f"{why_unknown}: their classes are unknown (--labels_file)")
    found = {k: find_samples(folder) for k, folder in folders.items()}
    check_complete(found, {without_extension(image.path) for image in images}, folders, starting_data_dir)
    stems = set().union(*found.values())
    starts = [image for image in images if without_extension(image.path) in stems]
    check_stems([image.path for image in starts], flag)
    if without := len(images) - len(starts):
        logger.info(f"{without} of {len(images)} images in {starting_data_dir} have no sample: they are left out")
    in_order = {k: [samples[without_extension(image.path)] for image in starts] for k, samples in found.items()}
    return starts, class_names_of(images), in_order


def find_samples(folder: SampleFolder) -> dict[str, str]:
    """The samples in a folder: path of the starting image without its extension -> path of the sample.

    Raises UserError if there are none, or if images have other names than samples.
    """
    ending = without_extension(folder.sample(""))  # _t0500
    paths = sorted(path for path in walk(folder.path) if is_sample(path))
    if not paths:
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
    if odd := [path for path in paths if not without_extension(path).endswith(ending)]:
        raise UserError(
            f"{len(odd)} image(s) in {folder.path} are not named like samples of that time: {list_some(odd)};\n"
            f"expected names ending in {ending}.JPEG or {ending}.png (--diffusion_steps, --timestep_respacing)"
        )
    samples = {without_extension(path).removesuffix(ending): path for path in paths}
    if len(samples) < len(paths):
        twice = next(path for path in paths if samples[without_extension(path).removesuffix(ending)] != path)
        raise UserError(f"{folder.path} has two samples of an image, {twice} and another: move one away (--data_dir)")
    return samples


def is_sample(path: str) -> bool:
    """Whether a file is a sample, and not one that is still being written."""
    return path.endswith((".JPEG", ".png")) and not path.rpartition("/")[2].startswith(".")


def check_complete(
    found: Mapping[int, Mapping[str, str]],
    starts: set[str],
    folders: Mapping[int, SampleFolder],
    starting_data_dir: str,
) -> None:
    """Raise UserError unless every sample has its starting image, and every time has the same samples.

    `found` has the results of `find_samples` by k, `starts` the paths of the starting images without extensions.
    """
    for k, samples in found.items():
        if orphans := sorted(path for stem, path in samples.items() if stem not in starts):
            raise UserError(
                f"{len(orphans)} of {len(samples)} samples in {folders[k].path} have no starting image in "
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


def check_sizes(folders: Mapping[int, SampleFolder], samples: Mapping[int, Sequence[str]], image_size: int) -> None:
    """Raise UserError unless the first sample of every time has the size given by --image_size."""
    for k, folder in folders.items():
        with suppress(UnreadableImage):
            read_sample(f"{folder.path}/{samples[k][0]}", image_size)


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
    """Raise UserError if the samples are on record as made from starting images with other contents."""
    for folder in folders.values():
        inputs.merge(recorded_inputs(folder) or {}, folder.path)
    inputs.known = inputs.entries(starts)
    inputs.compare(starts, data_dir, "make the samples again")


def samples_digests(folders: Mapping[int, SampleFolder], samples: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """SHA-256 of the names and sizes of the samples, by k."""
    return {
        k: digest_of(f"{path}\t{bf.stat(f'{folders[k].path}/{path}').size}" for path in paths)
        for k, paths in samples.items()
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
