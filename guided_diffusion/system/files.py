"""Files that appear whole or not at all, on a local disk or on remote storage."""

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

SCRATCH = ".part"  # the end of the names of files that are being written
LFS_POINTER = b"version https://git-lfs"  # the beginning of what Git LFS leaves in the place of a file


def is_remote(path: str) -> bool:
    """Whether `path` is on remote storage (gs://, az://, https://...)."""
    return "://" in path


def folder_name(path: str) -> str:
    """A name for results by the last two parts of a folder's path: ILSVRC2012_validation."""
    if not is_remote(path):
        path = os.path.abspath(path)
    return "_".join([part for part in path.replace(os.sep, "/").split("/") if part][-2:])


def write_whole(path: str, data: bytes) -> None:
    """Write a file that appears whole or not at all; see `whole_file`."""
    with whole_file(path) as f:
        f.write(data)


@contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """A file, open for writing, that other processes, and a run after a crash, see whole or not at all.

    On a local disk the bytes are written beside the file, forced to the disk and renamed at the end of the `with`
    block. Remote storage has this property by itself. The folder is made where it is missing.

    Raises OSError, with `path` as its file name and nothing left behind, where the file cannot be written.
    """
    if is_remote(path):
        with tempfile.TemporaryFile() as held:  # sent when it is complete, since a file that fails is sent as it is
            yield held
            held.seek(0)
            with bf.BlobFile(path, "wb") as f:
                shutil.copyfileobj(held, f, 2**24)
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
    """Remove a file if it is there."""
    if bf.exists(path):
        bf.remove(path)


def set_aside(*paths: str) -> dict[str, str]:
    """Rename those of the files that exist to NAME.1.EXT, or the next number that is free for all of them.

    Returns old path -> new path. Raises OSError.
    """
    paths = tuple(path for path in paths if bf.exists(path))
    for number in itertools.count(1):
        renamed = {path: f"{number}".join(_around_number(path)) for path in paths}
        if not any(map(bf.exists, renamed.values())):
            break
    for path, other in renamed.items():
        if is_remote(path):  # which has no renaming
            bf.copy(path, other)
            bf.remove(path)
        else:
            os.rename(path, other)
    return renamed


def _around_number(path: str) -> tuple[str, str]:
    stem, extension = os.path.splitext(path)
    return f"{stem}.", extension


def write_json(path: str, content: Any) -> None:
    """Write JSON, indented, whole or not at all. Raises OSError, and ResultError for numbers that are not finite."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except ValueError as error:
        raise ResultError(f"{path} is not written: it would contain NaN or infinity") from error
    write_whole(path, (text + "\n").encode())


def read_json(path: str) -> Any:
    """Read JSON; None where there is no such file. Raises ValueError where the file holds something else."""
    if not bf.exists(path):
        return None
    with bf.BlobFile(path, "rb") as f:
        return json.load(f)


def walk(folder: str) -> Iterator[str]:
    """The files below a folder, as paths relative to it with "/" between the parts; none where there is no folder."""
    if not bf.isdir(folder):
        return
    for root, _, files in bf.walk(folder):
        below = root[len(folder) :].replace(os.sep, "/").strip("/")
        for name in files:
            yield f"{below}/{name}" if below else name


def remove_scratch(folder: str) -> None:
    """Remove what a killed process had begun to write below a local folder."""
    if not is_remote(folder):
        for name in walk(folder):
            if name.endswith(SCRATCH) and name.rpartition("/")[2].startswith("."):
                os.unlink(os.path.join(folder, name))


def remove_scratch_of(path: str) -> None:
    """Remove what a killed process had begun to write of one local file; its neighbours may be other processes'."""
    folder, name = os.path.split(path)
    if not is_remote(path) and os.path.isdir(folder or "."):
        for other in os.listdir(folder or "."):
            if other.startswith(_scratch_prefix(name)) and other.endswith(SCRATCH):
                os.unlink(os.path.join(folder, other))


def _scratch_prefix(name: str) -> str:
    """Start of the names of a file's scratch files, and of no other file's; short, since a name may be as long as names
    can be.
    """
    return f".{name[:20]}.{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}."
