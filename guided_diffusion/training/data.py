"""The stream of training images, which depends on the run's seed alone.

Position p = 0, 1, 2, ... of the stream is image order[p % n] of epoch p // n, where n images are shuffled anew for each
epoch. Step s of a run takes the next batch of positions, and each process its own rows of it. So a run that was killed
and goes on from position p, or one on any number of processes, meets the images, crops and flips of a run that was not.
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
from ..images.io import MIN_CROP_FRAC, UnreadableImage, center_crop_arr, open_for_crop, random_crop_arr, to_float
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
        data_dir: the folder; every process lists it by itself.
        batch_size: images per batch of each process.
        image_size: side of the square images, in pixels.
        class_cond: give each image its class, by `label_images`.
        deterministic: take the images in the order of their paths, instead of shuffled anew in each epoch.
        random_crop: cut a random square out of the image, instead of its middle one.
        random_flip: mirror half of the images.
        labels_file: classes of the images where names do not tell; see `read_labels_file`.
        class_order, recorded: how classes are numbered; see `label_images`.
        seed: of the order, the crops and the flips; 0 or more.
        num_workers: worker processes, for each process, that read images ahead; 0: none.
        flag: the flag that gave `data_dir`, for the messages.

    Raises UserError where `data_dir` has no images, or, with `class_cond`, no classes, too many or unknown ones.
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
    images = _Batches(data_dir, paths, labels, image_size, seed, deterministic, random_crop, random_flip)
    return DataStream(images, batch_size, num_workers, flag, classes)


class DataStream:
    """Batches of training images, for ever: (images, extra).

    The images are float32 (batch_size, 3, image_size, image_size) in [-1, 1], on the CPU. `extra` is {"y": int64
    (batch_size,)}, the class indices, where the images have classes; else {}.

    An image that cannot be read is named, and the next one of its epoch takes its place. The next batch raises
    UserError where no image can be read.

    Attributes:
        position: how many images all processes together have been handed.
        num_images: n, the images of an epoch.
        classes: the classes that they have; None where they have none.
        class_names: class index -> name, of these.
        digest: SHA-256, in hexadecimal, of their paths and classes, by which the data set is recognised.
        unreadable: of the images that this process could not read so far, path -> why.
    """

    def __init__(self, images: _Batches, batch_size: int, num_workers: int, flag: str, classes: Classes | None) -> None:
        self.position = 0
        self.num_images = len(images.paths)
        self.classes = classes
        self.class_names = None if classes is None else classes.names
        self.digest = hashlib.sha256(json.dumps([images.paths, images.classes]).encode()).hexdigest()
        self.unreadable: dict[str, str] = {}
        self._images, self._batch_size, self._num_workers, self._flag = images, batch_size, num_workers, flag
        self._rank, self._world_size = dist_util.get_rank(), dist_util.get_world_size()
        self._batches: Iterator | None = None  # what the workers have begun to read
        self._workers: set[multiprocessing.Process] = set()

    def compare_with_record(self, record: str, owner: str) -> bool:
        """Compare the files with a record of their content, or record it: see `inputs.compare_with_record`."""
        return compare_with_record(self._images.data_dir, self._images.paths, self._flag, record, owner)

    def seek(self, position: int) -> None:
        """Let the next batch begin at `position`."""
        self.position, self._batches = position, None

    def __iter__(self) -> DataStream:
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self._batches is None:
            self._batches = self._read_ahead()
        try:
            images, extra, unreadable = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:  # some of what the end of a worker looks like from here
            ended = wait([worker.sentinel for worker in self._workers], timeout=1)
            if not ended:
                raise
            raise UserError(
                f"a process that reads images of {self._images.data_dir!r} ({self._flag}) was killed.\n"
                "If this machine's memory was full, lower --num_workers"
            ) from error
        new = {path: why for path, why in unreadable.items() if path not in self.unreadable}
        self.unreadable |= new
        if images is None:
            self._batches = None  # ends the workers; the stream stays where it is
            raise UserError(
                f"none of the images in {self._images.data_dir!r} ({self._flag}) can be read; "
                f"the first: {next(iter(unreadable.values()))}"
            )
        for why in new.values():
            logger.warn(f"{why}; the next one takes its place")
        self.position += self._batch_size * self._world_size
        return images, extra

    def _read_ahead(self) -> Iterator:
        size, of_all = self._batch_size, self._batch_size * self._world_size
        starts = itertools.count(self.position + self._rank * size, of_all)
        loader = DataLoader(
            self._images,
            batch_size=None,  # an item is a batch
            sampler=(range(start, start + size) for start in starts),  # without `self`, lest it keep itself alive
            num_workers=self._num_workers,
            pin_memory=dist_util.dev().type == "cuda",
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else it draws from torch's own, which may be the training's
        )
        others = set(multiprocessing.active_children())
        with _signals_held(), _child_handler_kept():  # workers must not be stopped before they ignore signals
            batches = iter(loader)
        self._workers = set(multiprocessing.active_children()) - others
        for worker in self._workers:
            # torch and Python wait for its end, then send SIGTERM, which it ignores.
            worker._popen.terminate = worker._popen.kill
        return batches


# Launchers send signals to all processes of a job, and a terminal's Ctrl-C reaches a whole group. When a worker ends is
# up to the process that it reads for, which may want a few more batches before it saves a checkpoint.


def _outlive_signals(worker: int) -> None:
    """Have a worker process ignore the signals that ask a run to stop, and end with the process that it reads for."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Within the block, signals that ask to stop wait; so do they in processes that begin there."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _child_handler_kept() -> Iterator[None]:
    """Undo the block's change to the SIGCHLD handler.

    torch's handler raises an exception wherever the main thread happens to be when a worker dies: in the middle of a
    training step or of a save. Without it, the next batch reports the dead worker.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


@dataclass(frozen=True)
class _Batches:
    """A map-style dataset for torch: positions of the stream -> their batch.

    Attributes:
        data_dir: what `paths` are relative to.
        paths: the n images.
        classes: their class indices, or None.
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
        """Images (B, 3, resolution, resolution), None where no image can be read; extra; and path -> why of the images
        that could not be. Only data, since an exception would lose its words on the way from a worker.
        """
        pixels, labels, unreadable = [], [], {}
        for position in positions:
            for index in self._candidates(position):
                path = self.paths[index]
                try:
                    pixels.append(self._read(path, position))
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
        """The image at a position, then those that may take its place."""
        n = len(self.paths)
        epoch, place = divmod(position, n)
        order = range(n) if self.deterministic else epoch_order(n, self.seed, epoch)
        return (order[(place + i) % n] for i in range(n))

    def _read(self, path: str, position: int) -> np.ndarray:
        rng = random.Random(f"{self.seed} {position}")
        return read_augmented(
            os.path.join(self.data_dir, path), self.resolution, self.random_crop, self.random_flip, rng
        )


@lru_cache(maxsize=4)  # a batch may begin in one epoch and end in the next, and there may be two streams
def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in one epoch: a permutation of 0 .. num_images - 1."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(num_images)


def read_augmented(
    path: str, resolution: int, random_crop: bool, random_flip: bool, rng: random.Random | ModuleType
) -> np.ndarray:
    """Read an image file as a square, uint8 (resolution, resolution, 3), cropped and mirrored as `rng` draws.

    Raises UnreadableImage.
    """
    image = open_for_crop(path, math.ceil(resolution / MIN_CROP_FRAC))
    pixels = random_crop_arr(image, resolution, rng=rng) if random_crop else center_crop_arr(image, resolution)
    return pixels[:, ::-1] if random_flip and rng.random() < 0.5 else pixels
