"""What is shown to the user as a single line, and what makes one of a text."""

import errno

LONGEST = 1000  # characters of a message


class UsageError(Exception):
    """What was given, what was expected, and what to do: one line, no traceback."""


class AgreedError(UsageError):
    """One that all processes of the job raise: the first says it, and the others leave it the time to."""

    seconds = 3.0


class LostError(Exception):
    """Another process of the job has ended, or has not answered in time."""


def reason_of(error: OSError) -> str:
    """Why a file could not be read or written, in a few words."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def printable(text: str) -> str:
    """A text from elsewhere, such as a file's name, with escapes for what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def said_of(error: OSError) -> str:
    """The same with the file, and what to do."""
    full = "; free some space, or write to another disk" if error.errno == errno.ENOSPC else ""
    return f"{error.filename}: {reason_of(error)}{full}" if error.filename else one_line(error)


def one_line(error: BaseException) -> str:
    """What an error says, of one line."""
    return " ".join(str(error).split()) or type(error).__name__


def for_terminal(text: str) -> str:
    """A text of one line and nothing that a terminal would obey, of a long one both ends."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[: 2 * LONGEST // 3]} ... {text[-(LONGEST // 3 - 5) :]}"
