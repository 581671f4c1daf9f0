"""Reading a checkpoint's file, and saying what is wrong with it."""

import http.client
import io
import os
import re
import shutil
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch

from .errors import UserError, first_line
from .files import is_remote


@contextmanager
def _open(path: str | os.PathLike, flag: str) -> Iterator[BinaryIO]:
    """`path` opened for reading bytes to their end; whatever goes wrong in the block while reading is a UserError."""
    failures: tuple[type[Exception], ...] = (OSError, http.client.HTTPException)
    if not is_remote(os.fspath(path)):
        open_it = open
    elif re.match(r"https?://(?![^/]*\.blob\.core\.windows\.net/)", str(path)):
        open_it = _open_url
    else:
        import blobfile

        open_it, failures = blobfile.BlobFile, (*failures, blobfile.Error)
    try:
        with open_it(os.fspath(path), "rb") as file:
            yield file
            if getattr(file, "length", None):  # of a http response: what has not come yet
                raise OSError(f"the connection closed {file.length} bytes early")
    except failures as error:
        raise UserError(f"{flag} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _open_url(url: str, _mode: str) -> http.client.HTTPResponse:
    return urllib.request.urlopen(url, timeout=60)


def read_checkpoint(path: str | os.PathLike, flag: str, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The dict of tensors in the file `path`, or a UserError that says what is there instead."""
    state = read_saved(path, flag, **kwargs)
    if not isinstance(state, dict) or not state or not all(isinstance(w, torch.Tensor) for w in state.values()):
        raise UserError(
            f"{flag} {path} holds {_describe(state)}; expected a dict of tensors, as from "
            "torch.save(model.state_dict(), path)"
        )
    return state


def read_saved(path: str | os.PathLike, flag: str, **kwargs: Any) -> Any:
    """What torch.save wrote to `path`, or a UserError that says what the file is; `kwargs` go to torch.load."""
    with _open(path, flag) as opened:
        file = opened
        if is_remote(os.fspath(path)):
            file = io.BytesIO()
            shutil.copyfileobj(opened, file, 2**24)
        whole_zip = zipfile.is_zipfile(file)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        mapped = whole_zip and file is opened
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of formats that are refused in the next moment
                return torch.load(os.fspath(path) if mapped else file, **{"mmap": mapped, **kwargs})
        except Exception as error:
            file.seek(0)
            problem = _diagnosis(file.read(64), size, whole_zip, error)
            raise UserError(f"{flag} {path} ({size:,} bytes) {problem}") from error


def _diagnosis(head: bytes, size: int, whole_zip: bool, error: Exception) -> str:
    """What torch.load's `error` means for a file of `size` bytes that begins with `head`."""
    if size == 0:
        return "is empty: not a checkpoint"
    if head.lstrip().startswith(b"<"):
        return "is a web page, not a checkpoint: the download failed. It begins with " + repr(head[:40])[1:]
    if "TorchScript" in str(error):
        return "is a TorchScript program; expected a state dict, as from torch.save(model.state_dict(), path)"
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return (
            f"holds a Python object besides tensors ({refused[1]}), which is not loaded since it could run any code.\n"
            "Save the state dict alone, where the file comes from: torch.save(model.state_dict(), path)"
        )
    is_torch = head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9c"))  # zip; torch's magic number, pickled
    incomplete = isinstance(error, EOFError) or "EOF" in str(error) or (head.startswith(b"PK") and not whole_zip)
    if is_torch and incomplete:
        return "is truncated: its end is missing. Copy or download it again"
    return f"is not a checkpoint of torch.save: it begins with {repr(head[:20])[1:]}" + (
        f" ({first_line(error)})" if is_torch else ""
    )


def _describe(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return f"a {type(value).__name__}" if value else f"an empty {type(value).__name__}"
    entries = [
        f"{key!r}: {type(entry).__name__}" for key, entry in value.items() if not isinstance(entry, torch.Tensor)
    ]
    return "entries that are no tensors (" + ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "") + ")"
