"""The exceptions that end a script with one or two lines instead of a traceback."""


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


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its kind where it has none, for use in another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
