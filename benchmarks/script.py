"""What the scripts of this folder share: how they answer bad input, and what they ran on."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import UsageError, describe_os_error, one_line, reason_of  # noqa: E402

# ---- the command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A mistake in the flags is one line, and exit code 2."""

    def __init__(self, described: str | None) -> None:
        super().__init__(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def launch(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script; what was wrong with its input or its files is one line, and exit code 2."""
    try:
        sys.exit(main())
    except (UsageError, OSError) as error:
        said = describe_os_error(error) if isinstance(error, OSError) else one_line(error)
        print(f"{Path(sys.argv[0]).name}: error: {said}", file=sys.stderr)
        sys.exit(2)


def folder_for(path: Path, flag: str) -> Path:
    """The folder, made where it is not there; raises UsageError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {reason_of(error)}; name a folder") from error
    return path


# ---- the machine ---------------------------------------------------------------------------------


def machine() -> str:
    """This computer in a few words: processor, cores, GPU."""
    import torch

    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    graphics = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{graphics}"


def conditions() -> dict[str, Any]:
    """The computer and the versions that a timing depends on, for a JSON file."""
    import torch

    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
