"""Reading and writing images in threads, while the main thread computes."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image

from ..errors import named_write_errors
from ..system.files import write_whole

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(units: Iterable[T], read: Callable[[T], list[Callable[[], R]]], num_workers: int) -> Iterator:
    """Yield (unit, results) in order, while threads read the next unit.

    Args:
        units: units of work.
        read: returns the calls that read a unit, one per image.
        num_workers: number of threads; 0 reads each unit when it is needed.
    """
    if num_workers == 0:
        for unit in units:
            yield unit, [call() for call in read(unit)]
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="read") as pool:
        started = ((unit, [pool.submit(call) for call in read(unit)]) for unit in units)
        try:
            for (unit, futures), _next in itertools.pairwise(itertools.chain(started, [None])):
                yield unit, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class ImageWriter:
    """Encodes and writes images in a thread, in the order of submission.

    Files appear atomically. After a failure of any kind, nothing more is written, and the exception is raised by the
    next `submit` or at the end of the `with` block.

    Args:
        image_format: "jpeg" or "png".
        jpeg_quality: 1..100; the chroma is not subsampled.
        ahead: number of images that may wait before `submit` blocks.
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
            self._raise_failure()

    def submit(
        self, path: str, pixels: np.ndarray | Callable[[], np.ndarray], written: Callable[[], None] = lambda: None
    ) -> None:
        """Queue an image.

        Args:
            path: file of the image.
            pixels: uint8 (H, W, 3), or a function that returns them, called in the thread; it may block.
            written: called in the thread once the file is on disk.

        Raises the exception of an earlier failure; a UserError if a file could not be written.
        """

        def write() -> None:
            write_whole(path, encode(pixels() if callable(pixels) else pixels, self.image_format, self.jpeg_quality))
            written()

        self.call(write)

    def call(self, work: Callable[[], None]) -> None:
        """Queue a function call, after the images submitted before. Raises as `submit` does."""
        self._raise_failure()
        self._room.acquire()
        self._pool.submit(self._run, work)

    def wait(self) -> None:
        """Wait until everything submitted so far is on disk. Raises as `submit` does."""
        self._pool.submit(lambda: None).result()
        self._raise_failure()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            if self._failure is None:
                work()
        except BaseException as error:  # raised in the main thread
            self._failure = error
        finally:
            self._room.release()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            with named_write_errors():
                raise self._failure


def encode(pixels: np.ndarray, image_format: str, jpeg_quality: int) -> bytes:
    """Content of an image file: `pixels` is uint8 (H, W, 3), `image_format` "jpeg" or "png"."""
    options = {"quality": jpeg_quality, "subsampling": 0} if image_format == "jpeg" else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()
