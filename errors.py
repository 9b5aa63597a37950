"""The one exception that is shown to the user as a single line, with exit code 2, and how it is shown."""


class UsageError(Exception):
    """What was given, what was expected, and what to do: one line, no traceback."""


class AgreedError(UsageError):
    """One that all processes of the job raise: the first says it, and the others leave it the time to."""

    seconds = 3.0


class LostError(Exception):
    """Another process of the job has ended, or has not answered in time."""


def printable(text: str) -> str:
    """A text from elsewhere, such as a file's name, with escapes for what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """What an error says, of one line."""
    return " ".join(str(error).split()) or type(error).__name__
