"""What a measurement was made on: for people, and for result files."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """This computer in a few words: processor, cores, GPU."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    graphics = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{graphics}"


def conditions() -> dict[str, Any]:
    """The computer and the versions that a timing depends on, for a JSON file."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
