#!/usr/bin/env python3
"""Whether a long run stays as it begins: memory, open files, threads and the size of its folder.

    python benchmarks/long_run.py                  # 100,000 iterations, or ten minutes, of each run
    python benchmarks/long_run.py --seconds 60     # a minute of each

Real runs of main.py are looked at from outside, twice a second: /proc says how much memory a process has
resident and how much of that is its own (not mapped from files), how many files and threads it has open, the
progress bar at which iteration it is. After a warm-up, a fifth of the run, the rest is cut into ten parts of
equally many iterations; the slopes of lines through each of them are reported, as median and quartiles, and
the growth from the first part to the last. Writes benchmarks/results/long_run.json and .png; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from faults import write_images  # noqa: E402
from script import Parser, launch  # noqa: E402

WARM_UP = 0.2  # of the iterations
PARTS = 10
EVERY = 0.5  # seconds
SHOWN = 300  # samples of a run that are written
IMAGES = "--image-size 14 --channels 1 --learner fc -n 3 -k 1 -q 2 -s 1 --images-on host"
BAR = re.compile(rb"[\r\n]\s*\d+%\|[^|]*\| (\d+)/\d+ \[")  # of the training: it has no title
WORKS = {
    "sinusoid, compiled": "--compile on",
    "sinusoid, uncompiled": "--compile off",
    "images on the host, uncompiled": f"--compile off --meta-batch-size 2 {IMAGES}",
}


class Sample(NamedTuple):
    """A process and its run's folder at a moment."""

    seconds: float
    iteration: int
    resident: int  # bytes
    own: int  # of them, not mapped from files
    peak: int
    files: int
    threads: int
    folder: int  # bytes


class Growth(NamedTuple):
    """Of a field, after the warm-up."""

    slope: float  # per iteration: the median over parts of the run
    quartiles: tuple[float, float]
    whole: float  # from the first part to the last one


def sample(process: subprocess.Popen[bytes], begin: float, log: Path, folder: Path) -> Sample | None:
    """None before the first iteration, and after the end."""
    bars = BAR.findall(log.read_bytes()[-4000:])
    proc = Path(f"/proc/{process.pid}")
    try:
        status = (proc / "status").read_text()
        files = len(list((proc / "fd").iterdir()))
        sizes = [path.stat().st_size for path in folder.iterdir()]
        values = {
            name: int(status.split(f"{name}:")[1].split()[0])
            for name in ("VmRSS", "RssAnon", "VmHWM", "Threads")
        }
    except (OSError, IndexError):  # no folder yet; a file has just been renamed; it has ended
        return None
    if not bars or not int(bars[-1]):
        return None
    resident, own, peak = (1024 * values[name] for name in ("VmRSS", "RssAnon", "VmHWM"))
    seconds, threads = time.monotonic() - begin, values["Threads"]
    return Sample(seconds, int(bars[-1]), resident, own, peak, files, threads, sum(sizes))


def watched(flags: list[str], iterations: int, seconds: float, root: Path) -> list[Sample]:
    """A run of so many iterations, or as many as there is time for."""
    line = [sys.executable, str(HERE.parent / "main.py"), *flags, "--iterations", str(iterations)]
    line += ["--threads", "1", "--checkpoint-path", str(root), "--run-name", "run"]
    log, samples = root / "log", []
    with log.open("wb") as out:
        process = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT)
    begin, first = time.monotonic(), None
    try:
        while process.poll() is None:
            time.sleep(EVERY)
            found = sample(process, begin, log, root / "run")
            if found is not None:
                samples.append(found)
                first = first or time.monotonic()
            if first is not None and time.monotonic() - first > seconds:
                process.send_signal(signal.SIGTERM)
                process.wait()
    finally:
        process.kill()
    if process.wait() not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(log.read_text(errors="replace")[-1000:])
    return samples


def parts_of(samples: list[Sample]) -> list[list[Sample]]:
    """Of the run after its warm-up."""
    first, last = samples[0].iteration, samples[-1].iteration
    begin = first + WARM_UP * (last - first)
    parts: list[list[Sample]] = [[] for _ in range(PARTS)]
    for each in samples:
        if each.iteration >= begin:
            parts[min(PARTS - 1, int(PARTS * (each.iteration - begin) / (last - begin)))].append(each)
    return [part for part in parts if len({each.iteration for each in part}) > 1]


def growth(parts: list[list[Sample]], field: str) -> Growth:
    values = [[float(getattr(each, field)) for each in part] for part in parts]
    slopes = [
        statistics.linear_regression([each.iteration for each in part], of_part).slope
        for part, of_part in zip(parts, values, strict=True)
    ]
    low, middle, high = statistics.quantiles(slopes, n=4)
    return Growth(middle, (low, high), statistics.median(values[-1]) - statistics.median(values[0]))


def findings(flags: list[str], samples: list[Sample]) -> dict[str, Any]:
    """What is written of a run."""
    parts = parts_of(samples)
    warm = [each for part in parts for each in part]
    growths = {field: growth(parts, field) for field in ("resident", "own", "folder")}
    every = -(-len(samples) // SHOWN)
    return {
        "command": shlex.join(["python", "main.py", *flags]),
        "iterations": samples[-1].iteration,
        "seconds": round(samples[-1].seconds, 1),
        "bytes_per_1000_iterations": {
            name: {
                "median": round(1000 * of_field.slope, 1),
                "quartiles": [round(1000 * each, 1) for each in of_field.quartiles],
            }
            for name, of_field in growths.items()
        },
        "grown_since_warm_up": {name: of_field.whole for name, of_field in growths.items()},
        "peak": samples[-1].peak,
        "files": [min(each.files for each in warm), max(each.files for each in warm)],
        "threads": [min(each.threads for each in warm), max(each.threads for each in warm)],
        "folder": samples[-1].folder,
        "samples": {
            name: [round(value, 2) for value in values]
            for name, values in zip(Sample._fields, zip(*samples[::every], strict=True), strict=True)
        },
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """A column a run: memory, open files and threads, the folder's size."""
    from evaluation.figures import LIGHT, new_figure, style
    from evaluation.tables import write_figure

    rows = [
        ("memory (MB)", {"resident": LIGHT.blue, "own": LIGHT.orange}, 1e6),
        ("number", {"files": LIGHT.blue, "threads": LIGHT.orange}, 1),
        ("the run's folder (kB)", {"folder": LIGHT.grey}, 1e3),
    ]
    with style():
        figure = new_figure(3.4 * len(results), 5.6)
        panels = figure.subplots(len(rows), len(results), squeeze=False, sharex="col")
        for column, (name, result) in enumerate(results.items()):
            found = result["samples"]
            for row, (label, fields, unit) in enumerate(rows):
                panel = panels[row][column]
                for field, colour in fields.items():
                    values = [value / unit for value in found[field]]
                    panel.plot(found["iteration"], values, color=colour, label=field)
                panel.set_ylim(0, 1.25 * max(max(found[field]) for field in fields) / unit)
                if column == 0:
                    panel.set_ylabel(label)
                if len(fields) > 1:
                    panel.legend(loc="lower right")
            panels[0][column].set_title(name)
            panels[-1][column].set_xlabel("iteration")
            panels[-1][column].xaxis.set_major_formatter("{x:,.0f}")
            panels[-1][column].locator_params(axis="x", nbins=5)
        write_figure(path, figure)


def describe(name: str, result: dict[str, Any]) -> str:
    slopes = []
    for field, found in result["bytes_per_1000_iterations"].items():
        middle, low, high = (each / 1e3 for each in (found["median"], *found["quartiles"]))
        whole = result["grown_since_warm_up"][field] / 1e3
        slopes.append(f"{field} {middle:+.1f} kB ({low:+.1f} to {high:+.1f}; in all {whole:+.0f})")
    files, threads = (" to ".join(map(str, sorted({*result[each]}))) for each in ("files", "threads"))
    return (
        f"{name}: {result['iterations']:,} iterations in {result['seconds']:.0f} s; per 1,000 iterations "
        f"{', '.join(slopes)}; peak {result['peak'] / 1e6:.0f} MB, {files} files, {threads} threads, "
        f"folder {result['folder'] / 1e3:.0f} kB"
    )


def parse() -> argparse.Namespace:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=600, help="of a run, at most (default: 600)")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "long_run.json")
    return parser.parse_args()


def main() -> int:
    given = parse()
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name in given.works:
        with tempfile.TemporaryDirectory() as root:
            flags = shlex.split(WORKS[name])
            if "images" in name:
                write_images(Path(root) / "images", 40, 20, 28)
                flags = ["--dataset", f"images:{Path(root) / 'images'}", *flags]
            results[name] = findings(flags, watched(flags, given.iterations, given.seconds, Path(root)))
        print(describe(name, results[name]), flush=True)
        given.out.write_text(json.dumps(results) + "\n")
    draw({name: results[name] for name in WORKS if name in results}, given.out.with_suffix(".png"))
    print(f"Written: {given.out} and .png")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch(main)
