"""What ANIL and CAVIA gain where examples pass once through what is not adapted, not once in each inner step.

    python benchmarks/one_pass.py    # 20-way 1-shot, the network for Omniglot; some four minutes

The meta-gradient of 16 tasks with one query a class over 1 to 10 inner steps, and predictions for 8 tasks
with 15 queries after all of 10 steps, uncompiled. The ways take turns; ratios are taken within a round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import harness
from harness import RESULTS, Parser
from tool import MAML, assemble, make_meta_gradient

ALGORITHMS, STEPS, TESTED = ("anil", "cavia"), (1, 2, 5, 10), 8
FLAGS = "--dataset images:FOLDER --image-size 28 --channels 1 --learner conv -n 20 -k 1 -q 1"
ONCE = "one pass"


def time_once(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(algorithm: str, folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return by what is computed how many times as long each way takes as one pass does."""
    flags = [*FLAGS.replace("FOLDER", str(folder)).split(), "--algorithm", algorithm]
    flags += ["--conv", "grouped", "--compile", "off"]
    run, test = assemble(flags), assemble([*flags, "-q", "15"])
    batch = run.distribution.sample("train", 0, 1, range(16))
    tested = test.distribution.sample("test", 0, 0, range(TESTED))
    results: dict[str, dict[str, float]] = {}
    calls: dict[str, Callable[[], object]]
    for steps in STEPS:
        once = run.maml.with_options(steps=steps, tasks_at_once=None)
        many = MAML.with_options(once)
        ways = {ONCE: make_meta_gradient(once), "unrolled": make_meta_gradient(many)}
        ways["adjoint"] = make_meta_gradient(many, engine="adjoint")
        calls = {name: partial(way, run.parameters, batch) for name, way in ways.items()}
        results[f"{algorithm}, meta-gradient, {steps} step{'s' * (steps > 1)}"] = compare(calls, rounds)
    arguments = run.parameters, tested, max(STEPS), ("transductive", "inductive")
    tests = {ONCE: once.predictions, "unrolled": many.predictions}
    calls = {name: partial(way, *arguments) for name, way in tests.items()}
    return results | {f"{algorithm}, predictions, {max(STEPS)} steps": compare(calls, rounds)}


def compare(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    timings = {name: partial(time_once, call) for name, call in calls.items()}
    harness.take_turns(timings, 1)  # warm up
    seconds = harness.take_turns(timings, rounds)
    ratios = {name: harness.median_ratio(values, seconds[ONCE]) for name, values in seconds.items()}
    return {f"{ONCE}, ms": 1e3 * min(seconds[ONCE])} | {n: r for n, r in ratios.items() if n != ONCE}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=harness.count, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "noise"
        harness.write_images(folder, 125, 20, 28)
        results: dict[str, dict[str, float]] = {}
        for algorithm in ALGORITHMS:
            results |= measure(algorithm, folder, options.rounds)
    record = {"machine": harness.collect_conditions(), "slower than one pass": results}
    harness.write_json(options.out / "one_pass.json", record)
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    rows = [[name, *(f"{row[n]:.3g}" if n in row else "" for n in names)] for name, row in results.items()]
    text = harness.markdown(["", *names], rows)
    print(text)
    if options.out == RESULTS:
        harness.put(harness.ROOT / "docs" / "speed.md", "one pass", f"{text}\n")


if __name__ == "__main__":
    harness.launch(main)
