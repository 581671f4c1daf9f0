"""Images as scripts written for guided-diffusion list and load them, and those of the released experiment.

Our own scripts use `image_folder`, `image_io` and `training_data`.
"""

from __future__ import annotations

import itertools
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from . import dist_util, logger
from .errors import UserError
from .images.classes import Classes
from .images.folder import choose_images, find_entry, label_where_known, list_images, without_extension
from .images.io import center_crop_arr as center_crop_arr
from .images.io import random_crop_arr as random_crop_arr
from .images.io import to_float
from .script_util import NUM_CLASSES
from .training.data import DataStream, _Batches, read_augmented


class ImageDataset:
    """A map-style dataset for torch: item i is (image, extra), the image float32 (3, resolution, resolution) in
    [-1, 1], and extra {"y": class index} where there are `classes`, else {}.

    Holds every `num_shards`-th of the images, from number `shard` on. Its items raise UnreadableImage. Random crops
    and flips draw from Python's `random`, which a DataLoader seeds from torch in each of its workers.
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
    """Endless batches (images, extra) of the images below a folder; our own scripts use `training_stream`.

    By default it is such a stream, except that `extra["y"]` numbers what stands before the first "_" of the file names,
    whatever the folders. With any of `list_images`, `drop_last=False` and `preprocess_fn` it is as the released
    experiment has it: batches end with the epoch, and `extra["img_name"]` has the file names of the images.

    Args:
        data_dir, batch_size, image_size, deterministic, random_crop, random_flip, num_workers: see `training_stream`.
        class_cond: give each image its class.
        list_images: paths of the images to take, instead of those below `data_dir`.
        drop_last: leave out the last images of an epoch if they do not fill a batch.
        preprocess_fn: applied to every image, (3, image_size, image_size) in [-1, 1].
        seed: of a stream; what is not one draws from the global generators of torch and `random`.

    Raises UserError if there are no images, or too few to fill a batch.
    """
    paths = _list_image_files_recursively(data_dir) if list_images is None else list(list_images)
    names, labels = _classes_by_prefix(paths) if class_cond else (None, None)
    if names and len(names) > NUM_CLASSES:
        logger.warn(
            f"found {len(names)} classes in {data_dir!r}, more than the {NUM_CLASSES} of create_model: load_data takes "
            'what stands before the first "_" of a file name for its class'
        )
    if list_images is None and drop_last and preprocess_fn is None:
        if seed < 0:
            raise UserError(f"--seed is {seed}; expected 0 or more")
        below = [path[len(os.path.join(data_dir, "")) :] for path in paths]
        images = _Batches(data_dir, below, labels, image_size, seed, deterministic, random_crop, random_flip)
        return DataStream(images, batch_size, num_workers, "--data_dir", names and Classes(names, "text", data_dir))
    shard = dist_util.get_rank(), dist_util.get_world_size()
    images = _NamedImages(image_size, paths, labels, *shard, random_crop, random_flip, preprocess_fn=preprocess_fn)
    if len(images) < (batch_size if drop_last else 1):
        raise UserError(
            f"load_data: found {len(images)} images for this process, expected a batch of {batch_size} or more "
            "(batch_size, drop_last=False)"
        )
    loader = DataLoader(images, batch_size, shuffle=not deterministic, drop_last=drop_last, num_workers=num_workers)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def _classes_by_prefix(paths: Sequence[str]) -> tuple[dict[int, str], list[int]]:
    """Names of the classes by their numbers, and the number of each image: what precedes the first "_" of its name."""
    prefixes = [os.path.basename(path).split("_")[0] for path in paths]
    numbers = {name: number for number, name in enumerate(sorted(set(prefixes)))}
    return {number: name for name, number in numbers.items()}, [numbers[name] for name in prefixes]


class _NamedImages(ImageDataset):
    """An `ImageDataset` whose `extra` has the file name of the image, as "img_name".

    Args:
        args: those of `ImageDataset`.
        preprocess_fn: applied to every image, (3, resolution, resolution) in [-1, 1].
    """

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
    """The images below a folder: paths that begin with it, folder by folder in the order of their names.

    Raises UserError where there is no such folder, or no image in it.
    """
    return [os.path.join(data_dir, path) for path in sorted(list_images(data_dir), key=lambda path: path.split("/"))]


def _list_images_per_classes(data_dir: str, num_per_class: int, num_classes: int) -> list[str]:
    """The images that forward_backward_dataset_sample.py takes, class by class: paths that begin with the folder.

    If their classes are unknown, these are all images, with a warning.

    Raises UserError where there is no such folder or no image in it, or a number is less than 1.
    """
    images, why_unknown = label_where_known(data_dir, list_images(data_dir))
    if why_unknown:
        logger.warn(f"{why_unknown}: all {len(images)} are listed")
    return [os.path.join(data_dir, image.path) for image in choose_images(images, num_classes, num_per_class)]


def _list_starting_images(starting_data_dir: str, samples: Sequence[str]) -> list[str]:
    """The starting image of each sample, in this order: paths that begin with `starting_data_dir`.

    Args:
        starting_data_dir: folder of the starting images.
        samples: paths of their samples, [folders/]NAME_t0500.JPEG. The folders of a sample need not be those of its
            starting image if there is only one image of that name.

    Raises UserError where a sample has no starting image, or several might be.
    """
    starts: dict[str, set[str]] = defaultdict(set)
    for path in list_images(starting_data_dir):
        stem = without_extension(path)
        for name in (stem, os.path.basename(stem)):
            starts[name].add(os.path.join(starting_data_dir, path))
    found: list[str] = []
    for path in samples:
        those = find_entry(starts, re.sub(r"_t\d+$", "", without_extension(path))) or set()
        if len(those) != 1:
            raise UserError(
                f"{path!r} has {len(those) or 'no'} starting images in {starting_data_dir!r}; expected one, of the "
                "same name without _tNNNN"
            )
        found += those
    return found
