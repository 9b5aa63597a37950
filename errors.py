"""The one exception that is shown to the user as a single line, with exit code 2."""


class UsageError(Exception):
    """What was given, what was expected, and what to do: one line, no traceback."""


class LostError(Exception):
    """Another process of the job has ended, or has not answered in time."""
