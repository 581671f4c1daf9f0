"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a path, a checkpoint, a data set.

    Its message is one or two lines that say what was found, what was expected and which flag to change. The scripts
    print it without a traceback and end with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its kind where it has none, for use in another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
