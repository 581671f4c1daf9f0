"""Image data sets with the interface of guided-diffusion and of the released experiment.

Our own scripts use `images.folder`, `images.io` and `training.data`.
"""

from __future__ import annotations

import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from . import dist_util, logger
from .errors import UserError
from .images.classes import Classes
from .images.folder import choose_images, find_entry, label_where_known, list_images, without_extension
from .images.io import center_crop_arr as center_crop_arr
from .images.io import random_crop_arr as random_crop_arr
from .images.io import to_float
from .script_util import NUM_CLASSES
from .training.data import BatchDataset, DataStream, read_augmented


class ImageDataset(Dataset):
    """A map-style dataset for torch: item i is (image, extra), with image float32 (3, resolution, resolution) in
    [-1, 1], and extra {"y": class index} if there are `classes`, else {}.

    Contains every `num_shards`-th image, starting with number `shard`. Items raise UnreadableImage. Random crops and
    flips use Python's `random`, which a DataLoader seeds from torch in each of its workers.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ) -> None:
        self.resolution = resolution
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        image = read_augmented(self.local_images[index], self.resolution, self.random_crop, self.random_flip, random)
        extra = {} if self.local_classes is None else {"y": np.array(self.local_classes[index], dtype=np.int64)}
        return to_float(image).transpose(2, 0, 1), extra


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    list_images: Sequence[str] | None = None,
    drop_last: bool = True,
    preprocess_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    num_workers: int = 2,
) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Endless batches (images, extra) of the images below a folder, until `close()`; our own scripts use
    `training_stream`.

    By default the same stream, except that `extra["y"]` numbers the part of the file names before the first "_",
    whatever the folders. With `list_images`, `drop_last=False` or `preprocess_fn` as in the released experiment:
    batches end with the epoch, and `extra["img_name"]` has the images' file names.

    Args:
        data_dir, batch_size, image_size, deterministic, random_crop, random_flip, num_workers: see `training_stream`.
        class_cond: give each image its class.
        list_images: paths of the images, instead of those below `data_dir`.
        drop_last: drop the last images of an epoch if they do not fill a batch.
        preprocess_fn: transform of each image, (3, image_size, image_size) in [-1, 1].
        seed: seed of the stream; the released experiment's batches use the global generators of torch and `random`.

    Raises UserError if there are no images, or too few to fill a batch.
    """
    paths = _list_image_files_recursively(data_dir) if list_images is None else list(list_images)
    names, labels = _classes_by_prefix(paths) if class_cond else (None, None)
    if names and len(names) > NUM_CLASSES:
        logger.warn(
            f"found {len(names)} classes in {data_dir!r}, more than the {NUM_CLASSES} of create_model: load_data takes "
            'the part of a file name before the first "_" as its class'
        )
    if list_images is None and drop_last and preprocess_fn is None:
        if seed < 0:
            raise UserError(f"--seed is {seed}; expected 0 or more")
        below = [path[len(os.path.join(data_dir, "")) :] for path in paths]
        images = BatchDataset(data_dir, below, labels, image_size, seed, deterministic, random_crop, random_flip)
        return DataStream(images, batch_size, num_workers, "--data_dir", names and Classes(names, "text", data_dir))
    shard = dist_util.get_rank(), dist_util.get_world_size()
    images = _NamedImages(image_size, paths, labels, *shard, random_crop, random_flip, preprocess_fn=preprocess_fn)
    if len(images) < (batch_size if drop_last else 1):
        raise UserError(
            f"load_data: found {len(images)} images for this process, expected a batch of {batch_size} or more "
            "(batch_size, drop_last=False)"
        )
    loader = DataLoader(images, batch_size, shuffle=not deterministic, drop_last=drop_last, num_workers=num_workers)
    return _epochs(loader)


def _epochs(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def _classes_by_prefix(paths: Sequence[str]) -> tuple[dict[int, str], list[int]]:
    """Class index -> name, and the class index of each image: the part of its name before the first "_"."""
    prefixes = [os.path.basename(path).split("_")[0] for path in paths]
    names = sorted(set(prefixes))
    index = {name: i for i, name in enumerate(names)}
    return dict(enumerate(names)), [index[name] for name in prefixes]


class _NamedImages(ImageDataset):
    """An `ImageDataset` whose `extra` includes the image's file name, "img_name"; `preprocess_fn` as in `load_data`."""

    def __init__(self, *args: Any, preprocess_fn: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__(*args)
        self.preprocess_fn = preprocess_fn

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        pixels, extra = super().__getitem__(index)
        image = torch.from_numpy(np.ascontiguousarray(pixels))
        if self.preprocess_fn is not None:
            image = self.preprocess_fn(image)
        return image, {**extra, "img_name": os.path.basename(self.local_images[index])}


def _list_image_files_recursively(data_dir: str) -> list[str]:
    """Paths, including the folder, of the images below it, sorted folder by folder.

    Raises UserError if the folder does not exist or has no images.
    """
    return [os.path.join(data_dir, path) for path in sorted(list_images(data_dir), key=lambda path: path.split("/"))]


def _list_images_per_classes(data_dir: str, num_per_class: int, num_classes: int) -> list[str]:
    """Paths, including the folder, of the images that forward_backward_dataset_sample.py takes, class by class.

    If their classes are unknown: all images, with a warning.

    Raises UserError if the folder does not exist or has no images, or if a number is less than 1.
    """
    images, why_unknown = label_where_known(data_dir, list_images(data_dir))
    if why_unknown:
        logger.warn(f"{why_unknown}: all {len(images)} are listed")
    return [os.path.join(data_dir, image.path) for image in choose_images(images, num_classes, num_per_class)]


def _list_starting_images(starting_data_dir: str, samples: Sequence[str]) -> list[str]:
    """Path, including `starting_data_dir`, of the starting image of each sample.

    Args:
        starting_data_dir: folder of the starting images.
        samples: paths of the samples, [folders/]NAME_t0500.JPEG, with _s002 or _u02 after the time for other
            trajectories and turns. Their folders may differ from those of the starting images if file names are unique.

    Raises UserError if a sample has no starting image, or several candidates.
    """
    starts: dict[str, set[str]] = defaultdict(set)
    for path in list_images(starting_data_dir):
        stem = without_extension(path)
        for name in (stem, os.path.basename(stem)):
            starts[name].add(os.path.join(starting_data_dir, path))
    starting_images: list[str] = []
    for path in samples:
        candidates = find_entry(starts, re.sub(r"_t\d+(_s\d+)?(_u\d+)?$", "", without_extension(path))) or set()
        if len(candidates) != 1:
            raise UserError(
                f"{path!r} has {len(candidates) or 'no'} starting images in {starting_data_dir!r}; expected one, of "
                "the same name without _tNNNN"
            )
        starting_images += candidates
    return starting_images
