"""Reading and writing images beside the computation, not in its way."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image

from .errors import UserError
from .files import write_whole

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
    """Encodes and writes images in a thread of its own.

    An image appears whole or not at all. The first failure ends the run at the next `submit`, or at the end of the
    `with` block: what had been written is whole, what had not is absent.

    Args:
        image_format: "jpeg" or "png".
        jpeg_quality: 1..100; colours are stored at full resolution.
        ahead: how many images may wait; `submit` waits for the thread beyond that.
    """

    def __init__(self, image_format: str, jpeg_quality: int, ahead: int = 256):
        self.image_format, self.jpeg_quality = image_format, jpeg_quality
        self.written = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._room = threading.Semaphore(ahead)
        self._failure: OSError | UserError | None = None

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._check()

    def submit(self, path: str, pixels: np.ndarray | Callable[[], np.ndarray]) -> None:
        """Have an image written to `path`.

        `pixels` is (H, W, 3) of uint8; or what gives it when the thread calls it, and may wait for it until then.

        Raises UserError for an earlier failure.
        """
        self._check()
        self._room.acquire()
        self._pool.submit(self._write, path, pixels)

    def _write(self, path: str, pixels: np.ndarray | Callable[[], np.ndarray]) -> None:
        try:
            if self._failure is None:
                pixels = pixels() if callable(pixels) else pixels
                write_whole(path, encode(pixels, self.image_format, self.jpeg_quality))
                self.written += 1
        except (OSError, UserError) as error:
            self._failure = error
        finally:
            self._room.release()

    def _check(self) -> None:
        error = self._failure
        if isinstance(error, UserError):
            raise error
        if error is not None:
            raise UserError(
                f"cannot write {error.filename or 'an image'}: {error.strerror or error} (--output). What is there is "
                "whole:\nwhen there is room, the same command goes on from there"
            ) from error


def encode(pixels: np.ndarray, image_format: str, jpeg_quality: int) -> bytes:
    """The file of an image: `pixels` is (H, W, 3) of uint8, `image_format` "jpeg" or "png"."""
    options = {"quality": jpeg_quality, "subsampling": 0} if image_format == "jpeg" else {}
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, **options)
    return buffer.getvalue()
