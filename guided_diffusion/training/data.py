"""The stream of training images, which depends only on the run's seed.

Position p = 0, 1, 2, ... of the stream is image order[p % n] of epoch p // n; the n images are reshuffled for each
epoch. Step s of a run takes the next batch of positions, and each process its own rows of it. So the images, crops and
flips depend neither on interruptions of the run nor on the number of processes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait
from types import ModuleType

import numpy as np
import torch
from torch.utils.data import DataLoader

from .. import dist_util, logger
from ..command_line.stopping import STOP_SIGNALS
from ..errors import UserError
from ..images.classes import Classes
from ..images.folder import check_labels, classes_of, label_images, list_images
from ..images.io import MIN_CROP_FRAC, UnreadableImage, center_crop_arr, open_image, random_crop_arr, to_float
from ..runs.inputs import compare_with_record


def training_stream(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    labels_file: str | None = None,
    class_order: str = "",
    recorded: Classes | None = None,
    seed: int = 0,
    num_workers: int = 2,
    flag: str = "--data_dir",
) -> DataStream:
    """The images below a folder, local or remote, as an endless stream of batches; see `DataStream`.

    Args:
        data_dir: folder of images; every process lists it.
        batch_size: images per batch of each process.
        image_size: side of the square images, in pixels.
        class_cond: give each image its class, see `label_images`.
        deterministic: take the images in the order of their paths instead of shuffling.
        random_crop: crop a random square instead of the central one.
        random_flip: mirror half of the images.
        labels_file: file of the images' classes, see `read_labels_file`.
        class_order, recorded: numbering of the classes, see `label_images`.
        seed: seed of the order, the crops and the flips; 0 or more.
        num_workers: number of processes that read ahead, for each process; 0: none.
        flag: flag that gave `data_dir`, for messages.

    Raises UserError if `data_dir` has no images, or, with `class_cond`, no classes, too many or unknown ones.
    """
    if seed < 0:
        raise UserError(f"--seed is {seed}; expected 0 or more")
    paths = list_images(data_dir, flag)
    labelled, labels = None, None
    if class_cond:
        labelled = label_images(data_dir, paths, labels_file, class_order, recorded, flag)
        check_labels(labelled, data_dir, flag)
        labels = [image.label for image in labelled]
    order = recorded.order if recorded else class_order
    classes = None if labelled is None else classes_of(labelled, order, data_dir)
    images = BatchDataset(data_dir, paths, labels, image_size, seed, deterministic, random_crop, random_flip)
    return DataStream(images, batch_size, num_workers, flag, classes)


class DataStream:
    """Endless batches of training images: (images, extra).

    The images are float32 (batch_size, 3, image_size, image_size) in [-1, 1], on the CPU. `extra` is {"y": int64
    (batch_size,)}, the class indices, if the images have classes; else {}.

    An unreadable image is reported and replaced by the next one of its epoch. The next batch raises UserError if no
    image is readable.

    Attributes:
        position: number of images taken by all processes.
        paths: paths of all images, relative to their folder.
        classes: classes of the images, if any.
        digest: SHA-256, in hexadecimal, of paths and classes, to identify the data set.
        unreadable: path -> reason, of the unreadable images that this process has met.
    """

    def __init__(
        self, images: BatchDataset, batch_size: int, num_workers: int, flag: str, classes: Classes | None
    ) -> None:
        self.position = 0
        self.paths = images.paths
        self.classes = classes
        self.digest = hashlib.sha256(json.dumps([images.paths, images.classes]).encode()).hexdigest()
        self.unreadable: dict[str, str] = {}
        self._images, self._batch_size, self._num_workers, self._flag = images, batch_size, num_workers, flag
        self._rank, self._world_size = dist_util.get_rank(), dist_util.get_world_size()
        self._batches: Iterator | None = None  # of the loader that reads ahead
        self._workers: set[multiprocessing.Process] = set()
        self._closed = False

    def compare_with_record(self, record: str, owner: str) -> bool:
        """Compare the files with a record of their content, or record it: see `inputs.compare_with_record`."""
        return compare_with_record(self._images.data_dir, self._images.paths, self._flag, record, owner)

    def seek(self, position: int) -> None:
        """Start the next batch at `position`."""
        self.position, self._batches = position, None

    def close(self) -> None:
        """End the stream and the processes that read ahead."""
        self._closed, self._batches = True, None

    def __iter__(self) -> DataStream:
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self._closed:
            raise StopIteration
        if self._batches is None:
            self._batches = self._start_loader()
        try:
            images, extra, unreadable = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:  # possible symptoms of a dead worker
            if not wait([worker.sentinel for worker in self._workers], timeout=1):
                raise
            raise UserError(
                f"a process that reads images of {self._images.data_dir!r} ({self._flag}) was killed.\n"
                "If this machine ran out of memory, lower --num_workers"
            ) from error
        new = {path: why for path, why in unreadable.items() if path not in self.unreadable}
        self.unreadable |= new
        if images is None:
            self._batches = None  # ends the workers; the stream keeps its position
            raise UserError(
                f"none of the images in {self._images.data_dir!r} ({self._flag}) can be read; "
                f"the first: {next(iter(unreadable.values()))}"
            )
        for why in new.values():
            logger.warn(f"{why}; replaced by the next image")
        self.position += self._batch_size * self._world_size
        return images, extra

    def _start_loader(self) -> Iterator:
        size = self._batch_size
        starts = itertools.count(self.position + self._rank * size, size * self._world_size)
        loader = DataLoader(
            self._images,
            batch_size=None,  # an item is a batch
            sampler=(range(start, start + size) for start in starts),  # a reference to `self` would keep it alive
            num_workers=self._num_workers,
            pin_memory=dist_util.dev().type == "cuda",
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # the default is torch's global one, which training may use
        )
        others = set(multiprocessing.active_children())
        with _signals_protected():
            batches = iter(loader)
        self._workers = set(multiprocessing.active_children()) - others
        for worker in self._workers:
            # torch and Python wait for a worker to end, then send SIGTERM, which it ignores.
            worker._popen.terminate = worker._popen.kill
        return batches


# Launchers send signals to all processes of a job, and Ctrl-C reaches a whole process group. But workers must outlive
# the signal: the process that they read for may need more batches before it saves a checkpoint.


def _init_worker(worker: int) -> None:
    """Have a worker ignore the stop signals, and exit with its parent."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _signals_protected() -> Iterator[None]:
    """A block that starts workers: stop signals are blocked until the workers ignore them; SIGCHLD keeps its handler.

    When a worker dies, torch's handler raises an exception wherever the main thread is, even in the middle of a
    training step or a save. Without it, the next batch reports the dead worker.
    """
    mask, handler = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS), signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@dataclass(frozen=True)
class BatchDataset:
    """A map-style dataset for torch: positions of the stream -> batch.

    Attributes:
        data_dir: folder of images.
        paths: paths of the n images, relative to the folder.
        classes: class indices of the images, if any.
        resolution: side of the square images, in pixels.
        seed, deterministic, random_crop, random_flip: see `training_stream`.
    """

    data_dir: str
    paths: Sequence[str]
    classes: Sequence[int] | None
    resolution: int
    seed: int
    deterministic: bool
    random_crop: bool
    random_flip: bool

    def __getitem__(
        self, positions: Sequence[int]
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor], dict[str, str]]:
        """Images (B, 3, resolution, resolution), or None if none is readable; extra; path -> reason if unreadable.

        Reasons are returned, not raised, since an exception loses its message on the way from a worker.
        """
        pixels, labels, unreadable = [], [], {}
        augmentation = self.resolution, self.random_crop, self.random_flip
        for position in positions:
            for index in self._candidates(position):
                path, rng = self.paths[index], random.Random(f"{self.seed} {position}")
                try:
                    pixels.append(read_augmented(os.path.join(self.data_dir, path), *augmentation, rng))
                except UnreadableImage as error:
                    unreadable[path] = str(error)
                    continue
                labels.append(None if self.classes is None else self.classes[index])
                break
            else:
                return None, {}, unreadable
        images = np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2))
        extra = {} if self.classes is None else {"y": torch.tensor(labels)}
        return torch.from_numpy(to_float(images)), extra, unreadable

    def _candidates(self, position: int) -> Iterator[int]:
        """The image at a position, then its possible replacements."""
        n = len(self.paths)
        epoch, place = divmod(position, n)
        order = range(n) if self.deterministic else epoch_order(n, self.seed, epoch)
        return (order[(place + i) % n] for i in range(n))


@lru_cache(maxsize=4)  # a batch may span two epochs, and there may be two streams
def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in one epoch: a permutation of 0 .. num_images - 1."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(num_images)


def read_augmented(
    path: str, resolution: int, random_crop: bool, random_flip: bool, rng: random.Random | ModuleType
) -> np.ndarray:
    """Read an image file as a square, uint8 (resolution, resolution, 3), cropped and flipped at random by `rng`.

    Raises UnreadableImage.
    """
    image = open_image(path, crop_side=math.ceil(resolution / MIN_CROP_FRAC))
    pixels = random_crop_arr(image, resolution, rng=rng) if random_crop else center_crop_arr(image, resolution)
    return pixels[:, ::-1] if random_flip and rng.random() < 0.5 else pixels
