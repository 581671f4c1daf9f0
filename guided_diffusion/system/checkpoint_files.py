"""Reading a checkpoint's file, and saying what is wrong with it."""

import argparse
import http.client
import io
import os
import re
import shutil
import urllib.request
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import blobfile
import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .. import logger
from ..errors import UserError, first_line, is_out_of_memory
from .files import LFS_POINTER, is_remote

Shapes = Mapping[str, tuple[int, ...]]  # by name


@contextmanager
def _open(path: str | os.PathLike, flag: str) -> Iterator[BinaryIO]:
    """`path` opened for reading bytes to their end; whatever goes wrong in the block while reading is a UserError."""
    failures: tuple[type[Exception], ...] = (OSError, http.client.HTTPException)
    if not is_remote(os.fspath(path)):
        open_it = open
    elif re.match(r"https?://(?![^/]*\.blob\.core\.windows\.net/)", str(path)):
        open_it = _open_url
    else:
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


def read_checkpoint(
    path: str | os.PathLike, flag: str, kwargs: dict[str, Any], expected: Shapes | None = None
) -> dict[str, torch.Tensor]:
    """The state dict in the file `path`.

    Args:
        path: a file of torch.save or of safetensors.
        flag: the flag that named it, for messages.
        kwargs: for torch.load.
        expected: names and shapes of the network's state dict, if they are known. Then names may have a wrapper's
            prefix, and the file may hold other things too: the state dict is found by what fits.

    Raises UserError that says what is there if there is no state dict, or more than one that could be meant.
    """
    saved = read_saved(path, flag, **kwargs)
    state = saved if expected is None or _is_state_dict(saved) else _only_fitting(saved, expected, f"{flag} {path}")
    if not _is_state_dict(state):
        raise UserError(
            f"{flag} {path} holds {_describe(saved)}; expected a dict of tensors, as from "
            "torch.save(model.state_dict(), path)"
        )
    return state if expected is None else _unwrapped(state, expected)


def read_saved(path: str | os.PathLike, flag: str, **kwargs: Any) -> Any:
    """What torch.save or safetensors wrote to `path`; `kwargs` go to torch.load.

    Raises UserError that says what the file is if it is something else.
    """
    if is_remote(os.fspath(path)):
        return read_file(io.BytesIO(read_remote(path, flag)), path, flag, **kwargs)
    with _open(path, flag) as file:
        return read_file(file, path, flag, **kwargs)


def read_remote(path: str | os.PathLike, flag: str) -> bytes:
    """The content of a file on remote storage. Raises UserError if it cannot be read."""
    with _open(path, flag) as opened:
        content = io.BytesIO()
        shutil.copyfileobj(opened, content, 2**24)
    return content.getvalue()


def read_file(file: BinaryIO, path: str | os.PathLike, flag: str, **kwargs: Any) -> Any:
    """As `read_saved`, given the file itself: the one at `path`, opened, or its content in memory."""
    local = not isinstance(file, io.BytesIO)
    whole_zip = zipfile.is_zipfile(file)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(64)
    file.seek(0)
    mapped = whole_zip and local
    try:
        if _is_safetensors(head):
            return _read_safetensors(os.fspath(path) if local else file.read())
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of formats that are refused in the next moment
            return torch.load(os.fspath(path) if mapped else file, **{"mmap": mapped, **kwargs})
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = _diagnosis(head, size, whole_zip, error)
        raise UserError(f"{flag} {path} ({size:,} bytes) {problem}") from error


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins as those of safetensors: the length of a JSON object, in 8 bytes, and the object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27


def _read_safetensors(file: str | bytes) -> dict[str, torch.Tensor]:
    """The tensors in a file, named or given as bytes. Raises ImportError if the package is missing."""
    from safetensors.torch import load, load_file

    return load(file) if isinstance(file, bytes) else load_file(file)


# Which of the tensors in a file are the network's


def _is_state_dict(value: Any) -> bool:
    """Whether a value is a dict of tensors by name, and not empty."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(w, torch.Tensor) for name, w in value.items())


def _only_fitting(saved: Any, expected: Shapes, what: str) -> Any:
    """The one entry of a dict that is a state dict of the network, or that may be meant as one; else the dict itself.

    Raises UserError if several could be meant.
    """
    entries = {key: value for key, value in saved.items() if _is_state_dict(value)} if isinstance(saved, dict) else {}
    unwrapped = {key: _shapes(_unwrapped(dict(value), expected)) for key, value in entries.items()}
    exact = [key for key, shapes in unwrapped.items() if shapes == expected]
    similar = [key for key, shapes in unwrapped.items() if shapes.keys() & expected.keys()]
    candidates = exact or similar or list(entries)
    if len(candidates) > 1:
        raise UserError(
            f"{what} has the entries {_keys(saved)}, and several are state dicts of this network: "
            f"{_keys(candidates)}.\n"
            f"Save one in a file of its own: torch.save(torch.load(FILE)[{candidates[0]!r}], NEW_FILE)"
            if similar
            else f"{what} has the entries {_keys(saved)}, and none is a state dict of this network"
        )
    if not candidates:
        return saved
    logger.info(f"{what} has the entries {_keys(saved)}: {candidates[0]} is used")
    return entries[candidates[0]]


def _unwrapped(state: dict[str, torch.Tensor], expected: Shapes) -> dict[str, torch.Tensor]:
    """A state dict without the prefix that a wrapper, such as DistributedDataParallel, has put before all names.

    Of all prefixes that the names have in common, none included, it is that without which most names are expected ones.
    """
    if "n_averaged" not in expected:  # the count of torch.optim.swa_utils.AveragedModel, beside the names
        state.pop("n_averaged", None)
    first = next(iter(state), "")
    prefixes = ["", *(first[: dot.end()] for dot in re.finditer(r"\.", first))]
    in_common = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in state)]
    best = max(in_common, key=lambda prefix: sum(name[len(prefix) :] in expected for name in state))
    for part in best.split(".")[:-1]:  # one by one: of more it would leave the network's own version behind
        consume_prefix_in_state_dict_if_present(state, f"{part}.")
    return state


def _shapes(state: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(w.shape) for name, w in state.items()}


def _keys(entries: Iterable[Any]) -> str:
    keys = list(map(str, entries))
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")


# What is wrong with a file


def _diagnosis(head: bytes, size: int, whole_zip: bool, error: Exception) -> str:
    """What torch.load's `error` means for a file of `size` bytes that begins with `head`."""
    if size == 0:
        return "is empty: not a checkpoint"
    if head.startswith(LFS_POINTER):
        return (
            "is a Git LFS pointer, not the checkpoint itself: fetch that by git lfs pull, in the clone that it is from"
        )
    if _is_safetensors(head):
        if isinstance(error, ImportError):
            return 'is a safetensors file, which needs the extra safetensors: pip install -e ".[safetensors]"'
        return f"is a safetensors file that is truncated or damaged: {first_line(error)}"
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
    others = [f"{key!r}: {type(entry).__name__}" for key, entry in value.items() if not isinstance(entry, torch.Tensor)]
    return f"entries that are no tensors ({_keys(others)})" if others else "tensors without names"
