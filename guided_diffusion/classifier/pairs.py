"""Samples and the starting images that they were made of: pairing them, and saying exactly what is missing."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import blobfile as bf
import numpy as np

from .. import logger
from ..errors import UserError
from ..forward_backward import SampleFolder
from ..images.folder import LabelledImage, label_where_known, list_images
from ..images.io import Check, open_image
from ..runs.settings import digest_of
from ..system.files import is_remote, walk
from .results import class_names_of, readable_or_error


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
    try:
        paths = list_images(starting_data_dir)
        images, why_unknown = label_where_known(starting_data_dir, paths, labels_file, "text")
    except UserError as error:
        raise UserError(str(error).replace("--data_dir", "--starting_data_dir")) from None
    if why_unknown:
        logger.warn(
            f"{why_unknown.replace('--data_dir', '--starting_data_dir')}: their classes are not known (--labels_file)"
        )
    found = {k: find_samples(folder) for k, folder in folders.items()}
    check_complete(found, {stem_of(image.path) for image in images}, folders, starting_data_dir)
    stems = set().union(*found.values())
    starts = [image for image in images if stem_of(image.path) in stems]
    uses = Counter(stem_of(image.path) for image in starts)
    if twice := [image.path for image in starts if uses[stem_of(image.path)] > 1]:
        raise UserError(
            f"{twice[0]} and {twice[1]} would have samples of the same name: move one of them away "
            "(--starting_data_dir)"
        )
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


def samples_digests(folders: Mapping[int, SampleFolder], samples: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """By k, SHA-256 of the names and sizes of its samples."""

    def size(path: str) -> int:
        return bf.stat(path).size if is_remote(path) else os.path.getsize(path)

    return {
        k: digest_of(f"{path}\t{size(f'{folders[k].path}/{path}')}" for path in paths) for k, paths in samples.items()
    }
