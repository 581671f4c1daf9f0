"""Reading and writing images beside the computation, not in its way."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image

from ..errors import UserError
from ..system.files import write_whole

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(units: Iterable[T], read: Callable[[T], list[Callable[[], R]]], num_workers: int) -> Iterator:
    """Yield (unit, results) in order, while threads already read the next unit.

    Args:
        units: what is worked on, one after the other.
        read: gives for a unit the calls, one per image, that read it.
        num_workers: number of threads; 0 reads each unit when it is asked for.
    """
    if num_workers == 0:
        for unit in units:
            yield unit, [call() for call in read(unit)]
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="read") as pool:
        waiting: tuple[T, list[Future[R]]] | None = None
        try:
            for unit in units:
                begun = unit, [pool.submit(call) for call in read(unit)]
                if waiting:
                    yield waiting[0], [future.result() for future in waiting[1]]
                waiting = begun
            if waiting:
                yield waiting[0], [future.result() for future in waiting[1]]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class ImageWriter:
    """Encodes and writes images in a thread of its own, in the order in which they are submitted.

    An image appears whole or not at all. The first failure of any kind ends the run at the next `submit`, or at the end
    of the `with` block: the images before it are written, those after it are absent.

    Args:
        image_format: "jpeg" or "png".
        jpeg_quality: 1..100; colours are stored at full resolution.
        ahead: number of images that may wait; beyond it, `submit` waits for the thread.
    """

    def __init__(self, image_format: str, jpeg_quality: int, ahead: int = 256):
        self.image_format, self.jpeg_quality = image_format, jpeg_quality
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._room = threading.Semaphore(ahead)
        self._failure: BaseException | None = None

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._check()

    def submit(
        self,
        path: str,
        pixels: np.ndarray | Callable[[], np.ndarray],
        written: Callable[[], None] = lambda: None,
    ) -> None:
        """Have an image written to `path`.

        Args:
            path: file of the image.
            pixels: uint8 (H, W, 3), or a function that returns them when the thread calls it, and may wait for them.
            written: called by the thread once the file is on the disk.

        Raises the exception of an earlier failure; a UserError if a file could not be written.
        """
        self.call(partial(self._write, path, pixels, written))

    def call(self, work: Callable[[], None]) -> None:
        """Have the thread call a function, after the images that were submitted before. Raises as `submit` does."""
        self._check()
        self._room.acquire()
        self._pool.submit(self._run, work)

    def _write(self, path: str, pixels: np.ndarray | Callable[[], np.ndarray], written: Callable[[], None]) -> None:
        pixels = pixels() if callable(pixels) else pixels
        write_whole(path, encode(pixels, self.image_format, self.jpeg_quality))
        written()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            if self._failure is None:
                work()
        except BaseException as error:  # raised again in the main thread, whatever it is
            self._failure = error
        finally:
            self._room.release()

    def _check(self) -> None:
        error = self._failure
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {error.filename or 'an image'}: {error.strerror or error} (--output). What is there is "
                "whole:\nwhen there is space, rerun the same command to resume"
            ) from error
        if error is not None:
            raise error


def encode(pixels: np.ndarray, image_format: str, jpeg_quality: int) -> bytes:
    """The file of an image: `pixels` is (H, W, 3) of uint8, `image_format` "jpeg" or "png"."""
    options = {"quality": jpeg_quality, "subsampling": 0} if image_format == "jpeg" else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()
