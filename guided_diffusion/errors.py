"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in what the user gave: a flag, a path, a checkpoint, a data set.

    Its message is one or two lines that say what was found, what was expected and which flag to change. The scripts
    print it without a traceback and end with status 2.
    """
