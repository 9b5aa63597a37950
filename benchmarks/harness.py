"""What all scripts of this folder share: command line, runs of main.py, paired timing, files of results.

    script -> run_main(flags) -> main.py in a process of its own -> its JSON files -> read_json -> a table

Importing this module puts the repository on the path; a script imports it before the tool's own modules.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MAIN = str(ROOT / "main.py")
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # as main.py does, before PyTorch is imported

from common.errors import UsageError, explain  # noqa: E402 (path first)
from common.files import read_json as read_json  # noqa: E402 (path first)
from common.files import write_bytes  # noqa: E402 (path first)

K = TypeVar("K")

# ---- the command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit code 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def count(text: str) -> int:
    """Return the number of a flag that needs at least 1; raise ValueError for any other."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def launch(main: Callable[[], int | None]) -> NoReturn:
    """Run a script; a mistake in its input or files is one line on stderr and exit code 2."""
    try:
        sys.exit(main())
    except (UsageError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {explain(error)}", file=sys.stderr)
        sys.exit(2)


# ---- files ---------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def put(page: Path, name: str, text: str) -> bool:
    """Replace the text between `<!-- name -->` and `<!-- /name -->`; return False if the page has neither."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if end:
        write_text(page, before + begin + text + end + after)
    return bool(end)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, without a final newline."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|-" * len(head) + "|", *lines[1:]])


# ---- the machine ---------------------------------------------------------------------------------


def cpuinfo() -> str:
    """Return Linux's description of the processors; elsewhere nothing."""
    file = Path("/proc/cpuinfo")
    return file.read_text(encoding="utf-8") if file.exists() else ""


def describe_machine() -> str:
    """Return this computer in a few words: processor, cores, GPU."""
    import torch

    names = re.findall(r"^model name\s*: (.*)$", cpuinfo(), re.MULTILINE)
    name = names[0] if names else platform.machine()
    graphics = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{graphics}"


def collect_conditions() -> dict[str, Any]:
    """Return what a timing depends on, for a JSON file: machine, cores, threads, versions."""
    import torch

    return {
        "machine": describe_machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def instructions() -> list[str]:
    """Return the processor's instructions for wide vectors and for bfloat16, by Linux's names."""
    return sorted({*re.findall(r"\b(?:avx2|avx512f|asimd|sve|avx512_bf16|amx_bf16|bf16)\b", cpuinfo())})


def matmul_rates() -> dict[str, float]:
    """Return GFLOP/s of a product of matrices of 1,024 rows and columns by type, the best within a second."""
    import torch

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, 1024, 1024).to(dtype).unbind()
        seconds: list[float] = []
        while sum(seconds) < 1:
            begin = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - begin)
        rates[str(dtype).removeprefix("torch.")] = 2 * 1024**3 / 1e9 / min(seconds)
    return rates


# ---- runs of main.py -----------------------------------------------------------------------------


def main_line(flags: Sequence[str]) -> list[str]:
    """Return the command line of main.py."""
    return [sys.executable, MAIN, *flags]


def start_main(flags: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start main.py with further environment variables; its standard error is a pipe."""
    line, env = main_line(flags), os.environ | environment
    return subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def call_main(flags: Sequence[str], *, seconds: float | None = None, **environment: str) -> tuple[int, str]:
    """Run main.py, which is asked to save and end when time is up; return its exit code and its last line."""
    process = start_main(flags, environment)
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        _, errors = process.communicate()
    code, line = process.returncode, re.split(r"[\r\n]+", errors.strip())[-1]
    return code, f"ended by signal {-code}" if code < 0 else line.partition("error: ")[2] or line


def redirect_caches(folder: Path) -> dict[str, str]:
    """Return the environment in which nothing compiled before is found; caches are written to a folder."""
    names = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    return {name: str(folder / name) for name in names}


def run_main(flags: Sequence[str], **environment: str) -> float:
    """Run main.py silently; return its seconds of wall time, or raise UsageError with its last line."""
    begin = time.perf_counter()
    code, last_line = call_main(flags, seconds=None, **environment)
    if code:
        raise UsageError(last_line or f"exit code {code}")
    return time.perf_counter() - begin


def evaluate(checkpoint: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Test a checkpoint with `main.py --eval`; return the content of its result file."""
    with tempfile.TemporaryDirectory() as out:
        run_main(["--eval", "--load", str(checkpoint), *flags, "--out", out])
        return read_json(next(Path(out).glob("*.json")))


def rows_after_test_steps(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rows of a result after the run's test steps, by normalisation."""
    rows = (row for row in result["per_step"] if row["steps"] == result["test_steps"])
    return {row["normalisation"]: row for row in rows}


def write_images(folder: Path, classes: int, drawings: int, size: int) -> None:
    """Write grey images of noise, `folder/<class>/<number>.png`; their content does not change the work."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in range(classes):
        (folder / f"{name:03}").mkdir(parents=True)
        for number in range(drawings):
            pixels = draw.integers(0, 256, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name:03}" / f"{number:02}.png")


# ---- time and memory -----------------------------------------------------------------------------


def take_turns(timings: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    """Take every timing once a round, so that whatever slows the machine slows them all."""
    seconds: dict[K, list[float]] = {name: [] for name in timings}
    for _ in range(rounds):
        for name, timing in timings.items():
            seconds[name].append(timing())
    return seconds


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median of the ratios within a round."""
    return statistics.median(value / other for value, other in zip(values, reference, strict=True))


def measure_peak(run: Callable[[int], Any]) -> int:
    """Return by how many bytes the second iteration exceeds what was resident before it."""

    def peak() -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    allocator = ctypes.CDLL(None)
    allocator.mallopt(-3, 1 << 16)  # mmap threshold: freed tensors go back to the system at once
    run(1)  # compiles, loads code
    allocator.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = peak()
    run(1)
    allocator.mallopt(-3, 1 << 25)  # the highest; this and the next keep memory, as a long run does
    allocator.mallopt(-1, 1 << 28)
    return max(peak() - before, 4096)
