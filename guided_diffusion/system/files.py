"""Atomic writes, on local disks and remote storage."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import blobfile as bf

from ..errors import ResultError

SCRATCH = ".part"  # suffix of files being written
LFS_POINTER = b"version https://git-lfs"  # first bytes of the placeholder that Git LFS leaves for a file


def is_remote(path: str) -> bool:
    """Whether `path` is on remote storage (gs://, az://, https://...)."""
    return "://" in path


def folder_name(path: str) -> str:
    """Name for results, made of the last two parts of a folder's path: ILSVRC2012_validation."""
    if not is_remote(path):
        path = os.path.abspath(path)
    return "_".join([part for part in path.replace(os.sep, "/").split("/") if part][-2:])


def write_whole(path: str, data: bytes) -> None:
    """Write a file atomically; see `whole_file`."""
    with whole_file(path) as f:
        f.write(data)


@contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Open a file for writing that appears atomically at the end of the `with` block; create its folder if needed.

    A local file is written next to its destination, synced and renamed. Remote storage is atomic by itself.

    Raises OSError with `path` as the file name; nothing is left behind.
    """
    if is_remote(path):
        with tempfile.TemporaryFile() as buffer:  # blobfile would upload a partial file after an exception
            yield buffer
            buffer.seek(0)
            with bf.BlobFile(path, "wb") as f:
                shutil.copyfileobj(buffer, f, 2**24)
        return
    folder, name = os.path.split(path)
    scratch = os.path.join(folder, f"{_scratch_prefix(name)}{secrets.token_hex(8)}{SCRATCH}")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with open(scratch, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
    except BaseException as error:
        if os.path.exists(scratch):
            os.unlink(scratch)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from error
        raise


def remove_file(path: str) -> None:
    """Remove a file if it exists."""
    if bf.exists(path):
        bf.remove(path)


def set_aside(*paths: str) -> dict[str, str]:
    """Rename existing files to NAME.1.EXT, or the next number that is free for all of them.

    Returns old path -> new path. Raises OSError.
    """
    names = [os.path.splitext(path) for path in paths if bf.exists(path)]
    for number in itertools.count(1):
        renamed = {stem + extension: f"{stem}.{number}{extension}" for stem, extension in names}
        if not any(map(bf.exists, renamed.values())):
            break
    for old, new in renamed.items():
        if is_remote(old):  # cannot rename
            bf.copy(old, new)
            bf.remove(old)
        else:
            os.rename(old, new)
    return renamed


def write_json(path: str, content: Any) -> None:
    """Write indented JSON atomically. Raises OSError, or ResultError if a number is not finite."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError as error:
        raise ResultError(f"{path} is not written: it would contain NaN or infinity") from error
    write_whole(path, (text + "\n").encode())


def read_json(path: str) -> Any:
    """Content of a JSON file; None if it does not exist. Raises ValueError if it is not JSON."""
    if not bf.exists(path):
        return None
    with bf.BlobFile(path, "rb") as f:
        return json.load(f)


def walk(folder: str) -> Iterator[str]:
    """Paths of the files below a folder, relative to it and with "/" as separator; none if it does not exist."""
    if not bf.isdir(folder):
        return
    for root, _, files in bf.walk(folder):
        below = root[len(folder) :].replace(os.sep, "/").strip("/")
        for name in files:
            yield f"{below}/{name}" if below else name


def remove_scratch(folder: str) -> None:
    """Remove the unfinished files that killed processes left below a local folder."""
    if not is_remote(folder):
        for name in walk(folder):
            if name.endswith(SCRATCH) and name.rpartition("/")[2].startswith("."):
                os.unlink(os.path.join(folder, name))


def remove_scratch_of(path: str) -> None:
    """Remove unfinished copies of one local file. Scratch files of its neighbours may be in use."""
    folder, name = os.path.split(path)
    if not is_remote(path) and os.path.isdir(folder or "."):
        for other in os.listdir(folder or "."):
            if other.startswith(_scratch_prefix(name)) and other.endswith(SCRATCH):
                os.unlink(os.path.join(folder, other))


def _scratch_prefix(name: str) -> str:
    """Prefix of a file's scratch files, unique to it and short enough for any file system."""
    return f".{name[:20]}.{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}."
