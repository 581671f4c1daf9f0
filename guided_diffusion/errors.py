"""Errors that scripts report in a line or two instead of a traceback."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import blobfile as bf


class UserError(ValueError):
    """Bad input: a flag, a path, a checkpoint, a data set.

    The message takes one or two lines: what was found, what was expected, and which flag to change.
    """

    status = 2  # exit status of a script


class ResultError(UserError):
    """A result that must not be recorded: a number is not finite, or files have disappeared."""

    status = 1


class NothingReadable(UserError):
    """None of a run's images could be read."""

    status = 1


class WriteError(UserError):
    """The operating system or the remote storage refused to write a file, such as on a full disk."""

    status = 1


class LostPeer(RuntimeError):
    """Another process of the run is gone; the message names it."""

    status = 3


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or the exception's type if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def named_write_errors(path: str = "") -> Iterator[None]:
    """Turn a system's or storage's error in the block into a WriteError that names the file: `path`, or its own."""
    try:
        yield
    except (OSError, bf.Error) as error:
        name = path or getattr(error, "filename", None) or "the output"
        raise WriteError(
            f"cannot write {name}: {write_problem(error)}. Choose another --output,\nor fix this and rerun the same "
            "command to resume"
        ) from error


def write_problem(error: OSError | bf.Error) -> str:
    """Why a file could not be written, in one line."""
    return getattr(error, "strerror", None) or first_line(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the machine ran out of memory.

    PyTorch raises OutOfMemoryError only for its own tensors. Libraries and the driver raise a RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    pattern = r"out of memory|_ALLOC(ATION)?_FAILED|can(no|')t allocate memory|not enough memory|bad_alloc"
    return isinstance(error, RuntimeError) and re.search(pattern, str(error), re.IGNORECASE) is not None


def print_to_stderr(text: str) -> None:
    """Print text on a line of its own, even next to a progress bar; nothing if stderr is closed or full."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"\n{text}\n" if sys.stderr.isatty() else f"{text}\n")
        sys.stderr.flush()
