"""The exceptions that are shown to the user as a single line, and what makes one of them."""

LONGEST = 400  # characters of a message


class UsageError(Exception):
    """What was given, what was expected, and what to do: one line, no traceback."""


class AgreedError(UsageError):
    """One that all processes of the job raise: the first says it, and the others leave it the time to."""

    seconds = 3.0


class LostError(Exception):
    """Another process of the job has ended, or has not answered in time."""


def one_line(text: str) -> str:
    """The text for a terminal: without line breaks and control characters, of a long one both ends."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: 2 * LONGEST // 3]} ... {text[-(LONGEST // 3 - 5) :]}"
