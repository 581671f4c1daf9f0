"""Exceptions that the scripts answer with a line instead of a traceback."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a path, a checkpoint, a data set.

    Its message is one or two lines that say what was found, what was expected and which flag to change. The scripts
    print it without a traceback and end with its status.
    """

    status = 2  # exit status of a script


class ResultError(UserError):
    """A result that must not be reported or recorded: a number that is not finite, or files that have disappeared.

    The scripts print it as they do a UserError, and end with status 1.
    """

    status = 1


class LostPeer(RuntimeError):
    """Another process of the run is gone, so that this one cannot complete its work. The message says which."""

    status = 3  # exit status of a script


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its kind where it has none, for use in another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextmanager
def named_write_errors(path: str) -> Iterator[None]:
    """Within the block, an OSError is a UserError: `path`, in the output folder, cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. Choose another --output") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a GPU's memory, or this machine's, did not suffice.

    PyTorch raises OutOfMemoryError for its own tensors only. The libraries and the driver, which need memory too, raise
    a RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = r"out of memory|_ALLOC(ATION)?_FAILED|can(no|')t allocate memory|not enough memory|bad_alloc"
    return isinstance(error, RuntimeError) and re.search(words, str(error), re.IGNORECASE) is not None


def say(words: str) -> None:
    """Print words to stderr, on a line of their own even if a progress bar is there."""
    sys.stderr.write(f"\n{words}\n" if sys.stderr.isatty() else f"{words}\n")
    sys.stderr.flush()
