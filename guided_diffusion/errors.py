"""Exceptions that the scripts answer with a line instead of a traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a path, a checkpoint, a data set.

    Its message is one or two lines that say what was found, what was expected and which flag to change. The scripts
    print it without a traceback and end with status 2.
    """


class LostPeer(RuntimeError):
    """Another process of the run is gone, so that this one cannot complete its work. The message says which."""

    exit_status = 3  # of a script that ends because of it


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its kind where it has none, for use in another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
