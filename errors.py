"""What is shown to the user as a single line: bad input, with exit code 2, and lost processes."""


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
