"""Speedrun: the shortest wall time of one command to 98 % on Omniglot 5-way 1-shot.

    python benchmarks/speedrun.py                                # the record's command, from five seeds
    python benchmarks/speedrun.py --name NAME --flags="FLAGS"    # a new entry

The rules:
- The clock runs from the start of `python main.py ...` to its end: importing, decoding Omniglot's drawings,
  compiling (no cache is kept from before), training, validating, saving. One machine, all of it.
- best.pt, which validation tasks choose, is tested after the clock on 600 test tasks, 5-way 1-shot, one query
  a class, transductive as in the papers. The mean over five seeds must be at least 98 %.
- Any flag of main.py is allowed, also training with other numbers of ways than 5. Test tasks are seen once.
"""

from __future__ import annotations

import os
import shlex
import statistics
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS, ROOT, Parser

FILE = RESULTS / "speedrun.json"
REQUIRED = 0.98
SEEDS = range(5)
TESTS = {"1 query": "1", "15 queries": "15"}


def time_run(flags: Sequence[str], seed: int, folder: Path) -> float:
    """Return the seconds of one command, without any cache from before."""
    place = ["--dataset", "omniglot", "--run-name", f"seed{seed}", "--checkpoint-path", str(folder)]
    with tempfile.TemporaryDirectory() as cache:
        environment = harness.redirect_caches(Path(cache))
        return harness.run_main([*place, *flags, "--seed", str(seed)], **environment)


def test_run(run: Path) -> dict[str, dict[str, float]]:
    """Return the accuracy after the test steps, by test and normalisation."""
    settings = tomllib.loads((run / "settings.toml").read_text(encoding="utf-8"))
    steps = (settings["resolved"] | settings["given"])["test-steps"]
    accuracies = {}
    for test, queries in TESTS.items():
        sizes = ["-n", "5", "-k", "1", "-q", queries, "--eval-tasks", "600", "--eval-steps", str(steps)]
        rows = harness.rows_after_test_steps(harness.evaluate(run, sizes))
        accuracies[test] = {norm: row["accuracy"] for norm, row in rows.items()}
    return accuracies


def attempt(name: str, flags: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Time and test five seeds; yield the entry after each."""
    runs: list[dict[str, Any]] = []
    for seed in SEEDS:
        seconds = time_run(flags, seed, folder)
        runs.append({"seed": seed, "seconds": round(seconds, 1), "test": test_run(folder / f"seed{seed}")})
        print(runs[-1], flush=True)
        accuracy = statistics.mean(run["test"]["1 query"]["transductive"] for run in runs)
        yield {
            "name": name,
            "command": shlex.join(["python", "main.py", "--dataset", "omniglot", *flags]),
            "machine": harness.describe_machine(),
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "mean_seconds": statistics.mean(run["seconds"] for run in runs),
            "mean_accuracy": accuracy,
            "valid": len(runs) == len(SEEDS) and accuracy >= REQUIRED,
            "runs": list(runs),
        }


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return all entries, the newest last, and their commands."""
    head = ["what is new", "seconds: mean (lowest to highest)", "1 query, transductive", "inductive"]
    head += ["15 queries, transductive", "inductive", "machine"]
    rows = []
    for entry in entries:
        seconds = [run["seconds"] for run in entry["runs"]]
        accuracies = [
            f"{100 * statistics.mean(run['test'][test][norm] for run in entry['runs']):.2f} %"
            for test in TESTS
            for norm in ("transductive", "inductive")
        ]
        partly = f" ({len(seconds)} of {len(SEEDS)} seeds)" * (len(seconds) < len(SEEDS))
        short = " (short of 98 %)" * (not partly and not entry["valid"])
        duration = f"{statistics.mean(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        rows.append([entry["name"] + partly + short, duration, *accuracies, entry["machine"]])
    commands = dict.fromkeys(entry["command"] for entry in entries)
    return "\n".join([harness.markdown(head, rows), "", "```sh", *commands, "```", ""])


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--flags", metavar="FLAGS", type=shlex.split, help="flags of a new entry, in quotes")
    parser.add_argument("--name", default="again", help="what is new in it")
    options = parser.parse_args()
    entries = harness.read_json(FILE)["entries"] if FILE.exists() else []
    valid = [entry for entry in entries if entry["valid"]]
    if options.flags is None and not valid:
        parser.error("there is no record yet: give --flags")
    record = min(valid, key=lambda entry: entry["mean_seconds"], default={"command": ""})
    flags = options.flags or shlex.split(record["command"].partition("omniglot")[2])
    with tempfile.TemporaryDirectory() as folder:
        for entry in attempt(options.name, flags, Path(folder)):
            harness.write_json(FILE, {"entries": [*entries, entry]})
            harness.put(ROOT / "docs" / "results.md", "speedrun", table([*entries, entry]))
    print(f"{entry['mean_seconds']:.1f} s, {100 * entry['mean_accuracy']:.2f} %, valid: {entry['valid']}")


if __name__ == "__main__":
    harness.launch(main)
