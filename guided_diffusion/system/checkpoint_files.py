"""Reading checkpoint files, and explaining what is wrong with a file that cannot be read."""

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

ALIGNMENT = 64  # of PyTorch's allocations on CPUs, in bytes
Shapes = Mapping[str, tuple[int, ...]]  # shape of each entry of a state dict, by name


def shapes_of(state_dict: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each entry of a state dict, by name; () for a nested tensor, which has none."""
    return {name: () if w.is_nested else tuple(w.shape) for name, w in state_dict.items()}


def check_finite_weights(state_dict: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise UserError if a weight is NaN or infinite; `what` names the file and its flag. Reads every weight once."""
    for name, w in state_dict.items():
        if w.is_floating_point() and w.numel() and not torch.stack(w.detach().aminmax()).isfinite().all():
            raise UserError(
                f"{what} is damaged: {name} has weights that are NaN or infinite in float32.\n"
                "Copy or download the file again, or take an earlier checkpoint"
            )


def difference(found: Shapes, expected: Shapes) -> str:
    """One line on how the names and shapes in a file differ from those of a network; "" if they agree."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} weights are missing, such as {missing[0]}")
    if unexpected:
        problems.append(f"it has {len(unexpected)} unexpected weights, such as {unexpected[0]}")
    if wrong:
        shapes = f"{wrong[0]} has shape {list(found[wrong[0]])}, expected {list(expected[wrong[0]])}"
        problems.append(f"{shapes} ({len(wrong)} of {len(expected)} shapes differ)")
    return "; ".join(problems)


@contextmanager
def _open(path: str | os.PathLike, flag: str) -> Iterator[BinaryIO]:
    """Open `path` for reading all of its bytes. Errors that occur in the block while reading become UserErrors."""
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
            if getattr(file, "length", None):  # bytes of an HTTP response that have not arrived
                raise OSError(f"the connection was closed {file.length} bytes early")
    except failures as error:
        raise UserError(f"{flag} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _open_url(url: str, _mode: str) -> http.client.HTTPResponse:
    return urllib.request.urlopen(url, timeout=60)


def read_checkpoint(
    path: str | os.PathLike, flag: str, kwargs: dict[str, Any], expected: Shapes | None = None
) -> dict[str, torch.Tensor]:
    """The state dict in the file `path`: contiguous tensors in aligned memory.

    Args:
        path: file written by torch.save or safetensors.
        flag: flag that specified the path, for messages.
        kwargs: arguments of torch.load.
        expected: names and shapes of the network's state dict, if known. Then the file may contain other entries, and
            the prefix that a wrapper has added to the names is removed.

    Raises UserError if the file has no state dict or several that could be meant, or if a tensor is not dense and real.
    """
    saved = read_saved(path, flag, **kwargs)
    state = saved if expected is None or _is_state_dict(saved) else _only_fitting(saved, expected, f"{flag} {path}")
    if not _is_state_dict(state):
        raise UserError(
            f"{flag} {path} contains {_describe(saved)}; expected a dict of tensors, as from "
            "torch.save(model.state_dict(), path)"
        )
    for name, w in state.items():  # in place, to keep the version that a state dict may have as an attribute
        if w.layout != torch.strided or w.is_nested or w.is_quantized or w.is_complex() or w.is_meta:
            layout = "nested" if w.is_nested else w.layout
            kind = "meta" if w.is_meta else f"{layout}, {w.dtype}".replace("torch.", "")
            raise UserError(f"{flag} {path} contains a tensor of kind {kind}, {name}; expected dense, real tensors")
        state[name] = _in_aligned_memory(w)
    return state if expected is None else _unwrapped(state, expected)


def _in_aligned_memory(w: torch.Tensor) -> torch.Tensor:
    """`w` as PyTorch would allocate it: contiguous, from a multiple of 64 bytes on.

    The kernels that compute a product, and so its last digits, may depend on where and how a matrix is stored. In files
    it may start anywhere (safetensors), be part of another tensor, or have been channels last.
    """
    w = w.flatten().view(w.shape)  # unlike contiguous(), also sets the strides of dimensions of size 1
    return w if w.data_ptr() % ALIGNMENT == 0 else w.clone()


def read_saved(path: str | os.PathLike, flag: str, **kwargs: Any) -> Any:
    """The object that torch.save or safetensors wrote to `path`; `kwargs` are arguments of torch.load.

    Raises UserError, with a diagnosis, if the file cannot be loaded.
    """
    if is_remote(os.fspath(path)):
        return read_file(io.BytesIO(read_remote(path, flag)), path, flag, **kwargs)
    with _open(path, flag) as file:
        return read_file(file, path, flag, **kwargs)


def read_remote(path: str | os.PathLike, flag: str) -> bytes:
    """Content of a file on remote storage. Raises UserError if it cannot be read."""
    with _open(path, flag) as opened:
        content = io.BytesIO()
        shutil.copyfileobj(opened, content, 2**24)
    return content.getvalue()


def read_file(file: BinaryIO, path: str | os.PathLike, flag: str, **kwargs: Any) -> Any:
    """As `read_saved`, given the opened file, or its content in memory."""
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
            warnings.simplefilter("ignore")  # about formats that are rejected anyway
            return torch.load(os.fspath(path) if mapped else file, **{"mmap": mapped, **kwargs})
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = _diagnosis(error, head=head, size=size, whole_zip=whole_zip)
        raise UserError(f"{flag} {path} ({size:,} bytes) {problem}") from error


def _is_safetensors(head: bytes) -> bool:
    """Whether a file starts like a safetensors file: the size of a JSON object in 8 bytes, then the object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27


def _read_safetensors(file: str | bytes) -> dict[str, torch.Tensor]:
    """The tensors in a file, given its path or content. Raises ImportError if safetensors is not installed."""
    from safetensors.torch import load, load_file

    return load(file) if isinstance(file, bytes) else load_file(file)


# Finding the state dict in a file


def _is_state_dict(value: Any) -> bool:
    """Whether a value is a non-empty dict of tensors by name."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(w, torch.Tensor) for name, w in value.items())


def _only_fitting(saved: Any, expected: Shapes, what: str) -> Any:
    """The entry of `saved` that is, or resembles, a state dict of the network; `saved` itself if it has none.

    Raises UserError if several entries qualify.
    """
    entries = {key: value for key, value in saved.items() if _is_state_dict(value)} if isinstance(saved, dict) else {}
    unwrapped = {key: shapes_of(_unwrapped(dict(value), expected)) for key, value in entries.items()}
    exact = [key for key, shapes in unwrapped.items() if shapes == expected]
    similar = [key for key, shapes in unwrapped.items() if shapes.keys() & expected.keys()]
    candidates = exact or similar or list(entries)
    if len(candidates) > 1:
        raise UserError(
            f"{what} has the entries {_keys(saved)}, and several are state dicts of this network: "
            f"{_keys(candidates)}.\n"
            f"Save one of them to its own file: torch.save(torch.load(FILE)[{candidates[0]!r}], NEW_FILE)"
            if similar
            else f"{what} has the entries {_keys(saved)}, and none is a state dict of this network"
        )
    if not candidates:
        return saved
    logger.info(f"{what} has the entries {_keys(saved)}: using {candidates[0]}")
    return entries[candidates[0]]


def _unwrapped(state: dict[str, torch.Tensor], expected: Shapes) -> dict[str, torch.Tensor]:
    """A state dict without the prefix that a wrapper, such as DistributedDataParallel, has added to all names.

    Of all common prefixes, including the empty one, remove the one that makes most names match expected ones.
    """
    if "n_averaged" not in expected:  # counter of torch.optim.swa_utils.AveragedModel
        state.pop("n_averaged", None)
    first = next(iter(state), "")
    prefixes = ["", *(first[: dot.end()] for dot in re.finditer(r"\.", first))]
    in_common = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in state)]
    best = max(in_common, key=lambda prefix: sum(name[len(prefix) :] in expected for name in state))
    for part in best.split(".")[:-1]:  # one at a time, or else the version in the metadata would be lost
        consume_prefix_in_state_dict_if_present(state, f"{part}.")
    return state


def _keys(entries: Iterable[Any]) -> str:
    keys = list(map(str, entries))
    return ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")


# Diagnosing unreadable files


def _diagnosis(error: Exception, head: bytes, size: int, whole_zip: bool) -> str:
    """Explanation of an `error` of torch.load for a file of `size` bytes that begins with `head`."""
    if size == 0:
        return "is empty: not a checkpoint"
    if head.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the checkpoint itself: run git lfs pull in its repository"
    if _is_safetensors(head):
        if isinstance(error, ImportError):
            return 'is a safetensors file, which requires the extra safetensors: pip install -e ".[safetensors]"'
        return f"is a truncated or corrupted safetensors file: {first_line(error)}"
    if head.lstrip().startswith(b"<"):
        return "is a web page, not a checkpoint: the download failed. It begins with " + repr(head[:40])[1:]
    if "TorchScript" in str(error):
        return "is a TorchScript program; expected a state dict, as from torch.save(model.state_dict(), path)"
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return (
            f"contains a Python object other than tensors ({refused[1]}), which could run arbitrary code.\n"
            "Save only the state dict, where the file was created: torch.save(model.state_dict(), path)"
        )
    is_torch = head.startswith((b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9c"))  # zip; pickled magic number of torch
    incomplete = isinstance(error, EOFError) or "EOF" in str(error) or (head.startswith(b"PK") and not whole_zip)
    if is_torch and incomplete:
        return "is truncated: its end is missing. Copy or download it again"
    return f"was not written by torch.save: it begins with {repr(head[:20])[1:]}" + (
        f" ({first_line(error)})" if is_torch else ""
    )


def _describe(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)) and not value:
        return f"an empty {type(value).__name__}"
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    others = [f"{key!r}: {type(entry).__name__}" for key, entry in value.items() if not isinstance(entry, torch.Tensor)]
    return f"entries other than tensors ({_keys(others)})" if others else "unnamed tensors"
