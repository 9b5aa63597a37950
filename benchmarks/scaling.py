"""Time of an iteration with several processes (torchrun), and of several seeds as one run (--seeds).

    python benchmarks/scaling.py              # both tables; some 15 minutes on two cores
    python benchmarks/scaling.py --works "sinusoid, uncompiled" --rounds 1

Runs of main.py, one thread a process, in turn; ratios are taken within a round. An iteration's time is that
of a long run less that of a short one, so that what happens at start and end drops out, compiling included.
Omniglot is looked for in MAML_DATA_ROOT.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
from harness import RESULTS, Parser, UsageError

OMNIGLOT = "--dataset omniglot --compile off"


class Work(NamedTuple):
    """A run, and what it is timed with."""

    flags: str
    iterations: tuple[int, int]  # of a short and of a long run
    processes: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (1,)


WORKS = {
    "sinusoid, uncompiled": Work("--compile off", (100, 800), (1, 2, 4), (1, 2, 4, 8)),
    "sinusoid, compiled": Work("--compile on", (3000, 9000), (1,), (1, 2, 4, 8)),
    "Omniglot 5-way 1-shot, uncompiled": Work(OMNIGLOT, (4, 28), (1, 2, 4)),
    "Omniglot 5-way 1-shot, fc, uncompiled": Work(f"{OMNIGLOT} --learner fc", (4, 28), seeds=(1, 2, 4, 8)),
}


def seconds_of_run(work: Work, iterations: int, processes: int, seeds: int) -> float:
    """Return the wall time of one command."""
    with tempfile.TemporaryDirectory() as folder:
        end = str(iterations)
        flags = [*work.flags.split(), "--iterations", end, "--val-every", end, "--save-every", end]
        flags += ["--threads", "1", "--checkpoint-path", folder, "--run-name", "run"]
        flags += ["--seeds", f"0-{seeds - 1}"] if seeds > 1 else []
        return harness.run_main(flags, processes)


def seconds_of_iteration(work: Work, processes: int, seeds: int) -> float:
    few, many = work.iterations
    short, long = (seconds_of_run(work, iterations, processes, seeds) for iterations in (few, many))
    if long <= short:
        raise UsageError(f"{work.flags}: the longer run was the shorter one; is the machine busy?")
    return (long - short) / (many - few)


def measure(work: Work, rounds: int) -> dict[str, list[float]]:
    """Return seconds of an iteration by number of processes and seeds."""
    counts = {f"{n} process{'es' * (n > 1)}": (n, 1) for n in work.processes}
    counts |= {f"{n} seeds": (1, n) for n in work.seeds if n > 1}
    timings = {name: partial(seconds_of_iteration, work, *pair) for name, pair in counts.items()}
    return harness.in_turn(timings, rounds)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--works", nargs="+", choices=WORKS, help="(default: those whose data are here)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    works = options.works or [w for w in WORKS if "Omniglot" not in w or "MAML_DATA_ROOT" in os.environ]
    results: dict[str, Any] = {}
    rows: list[list[str]] = []
    for work in works:
        results[work] = measure(WORKS[work], options.rounds)
        single = results[work]["1 process"]
        for name, seconds in results[work].items():
            ratio = harness.median_ratio(seconds, single)
            rows.append([work, name, f"{1e3 * statistics.median(seconds):.3g} ms", f"{ratio:.2f} x"])
            print(f"  {', '.join(rows[-1])}", flush=True)
    print("\n" + harness.markdown(["", "", "an iteration", "over one"], rows))
    harness.write_json(options.out / "scaling.json", {"machine": harness.conditions(), "seconds": results})
    print(f"\nWritten: {options.out / 'scaling.json'}")


if __name__ == "__main__":
    harness.launch(main)
