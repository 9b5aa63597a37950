"""Speedrun: the shortest wall time of one command to 98 % on Omniglot 5-way 1-shot.

    python benchmarks/speedrun.py                                # the record's command, from five seeds
    python benchmarks/speedrun.py --try "FLAGS"                  # another, by its validation alone: tune so
    python benchmarks/speedrun.py --name NAME --flags "FLAGS"    # a new entry

The rules:
- The clock runs from the start of `python main.py ...` to its end: importing, decoding Omniglot's drawings,
  compiling (no cache is kept from before), training, validating, saving. One machine, all that it has.
- best.pt, which validation tasks choose, is tested after the clock on 600 test tasks, 5-way 1-shot, one query
  a class, transductive as the papers. The mean over five seeds must be at least 98 %.
- Any flag of main.py is allowed, also training with other numbers of ways than 5. Test tasks are seen once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from reproduced import put  # noqa: E402
from script import Parser, launch, machine  # noqa: E402

from common.errors import UsageError  # noqa: E402
from common.files import read_json  # noqa: E402
from evaluation.tables import write_json  # noqa: E402
from training.checkpoint import load_checkpoint  # noqa: E402
from training.folders import BEST  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "speedrun.json"
WANTED = 0.98
SEEDS = range(5)
TESTS = {"1 query": "-q 1", "15 queries": "-q 15"}


def command(line: list[str], environment: Mapping[str, str] | None = None) -> None:
    """Runs it in silence; ends with its last words where it fails."""
    done = subprocess.run(line, env=os.environ | (environment or {}), capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        if done.returncode == 2:
            raise UsageError(said.partition("error: ")[2] or said)
        sys.exit(said)


def timed(flags: list[str], seed: int, folder: Path) -> float:
    """Seconds of one command, with no cache from before."""
    name = f"seed{seed}"
    where = ["--dataset", "omniglot", "--run-name", name, "--checkpoint-path", str(folder)]
    line = [sys.executable, str(ROOT / "main.py"), *where, *flags, "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as cache:
        fresh = {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        fresh["TRITON_CACHE_DIR"] = f"{cache}/triton"
        begin = time.perf_counter()
        command(line, fresh)
        return time.perf_counter() - begin


def tested(checkpoint: Path) -> dict[str, dict[str, float]]:
    """Accuracy after the test steps on 5-way 1-shot test tasks, by test and normalisation."""
    found: dict[str, dict[str, float]] = {}
    steps = ["--eval-steps", str(load_checkpoint(checkpoint / BEST).settings["test_steps"])]
    for test, queries in TESTS.items():
        with tempfile.TemporaryDirectory() as out:
            line = [sys.executable, str(ROOT / "main.py"), "--eval", "--load", str(checkpoint)]
            sizes = ["-n", "5", "-k", "1", *shlex.split(queries), "--eval-tasks", "600", "--out", out, *steps]
            command([*line, *sizes])
            record = read_json(next(Path(out).glob("*.json")))
        rows = [row for row in record["per_step"] if row["steps"] == record["test_steps"]]
        found[test] = {row["normalisation"]: row["accuracy"] for row in rows}
    return found


def best_validation(folder: Path) -> tuple[float, int]:
    """The best validation accuracy of a run, and its iteration: the first of equals, as best.pt is."""
    curve = read_json(folder / "training.json")["validation"]
    pairs = zip(curve["query_accuracy"], curve["iteration"], strict=True)
    return max(pairs, key=lambda pair: pair[0])


def attempt(name: str, flags: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """An entry: five seeds, each timed and then tested; as it is after each."""
    runs: list[dict[str, Any]] = []
    for seed in SEEDS:
        seconds = timed(flags, seed, folder)
        run = folder / f"seed{seed}"
        accuracy, iteration = best_validation(run)
        runs.append(
            {
                "seed": seed,
                "seconds": round(seconds, 1),
                "validation": accuracy,
                "iteration": iteration,
                "test": tested(run),
            }
        )
        print(runs[-1], flush=True)
        reached = statistics.mean(run["test"]["1 query"]["transductive"] for run in runs)
        yield {
            "name": name,
            "command": shlex.join(["python", "main.py", "--dataset", "omniglot", *flags]),
            "machine": machine(),
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "mean_seconds": statistics.mean(run["seconds"] for run in runs),
            "mean_accuracy": reached,
            "valid": len(runs) == len(SEEDS) and reached >= WANTED,
            "runs": list(runs),
        }


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """All entries, the newest last."""
    lines = [
        "| what is new | seconds: mean (lowest to highest) | 1 query, transductive | inductive "
        "| 15 queries, transductive | inductive | machine |",
        "|-|-|-|-|-|-|-|",
    ]
    for entry in entries:
        seconds = [run["seconds"] for run in entry["runs"]]
        cells = [
            f"{100 * statistics.mean(run['test'][test][norm] for run in entry['runs']):.2f} %"
            for test in TESTS
            for norm in ("transductive", "inductive")
        ]
        name = entry["name"]
        if len(entry["runs"]) < len(SEEDS):
            name += f" ({len(entry['runs'])} of {len(SEEDS)} seeds)"
        elif not entry["valid"]:
            name += " (short of 98 %)"
        took = f"{statistics.mean(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f})"
        lines.append(f"| {name} | {took} | {' | '.join(cells)} | {entry['machine']} |")
    commands = dict.fromkeys(entry["command"] for entry in entries)
    return "\n".join([*lines, "", "```sh", *commands, "```", ""])


def split(text: str) -> list[str]:
    """Flags in one text, as a shell takes them apart."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{str(error).lower()}: {text}") from error


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument(
        "--try", dest="tried", metavar="FLAGS", type=split,
        help="seed 0, by validation alone; in quotation marks, behind =: --try='--init torch'",
    )  # fmt: skip
    parser.add_argument(
        "--flags", metavar="FLAGS", type=split,
        help="of a new entry, likewise; by default those of the record",
    )  # fmt: skip
    parser.add_argument("--name", default="again", help="what is new in it")
    given = parser.parse_args()
    records = read_json(RESULTS) if RESULTS.exists() else {"entries": []}
    with tempfile.TemporaryDirectory() as folder:
        if given.tried is not None:
            took = timed(given.tried, 0, Path(folder))
            accuracy, iteration = best_validation(Path(folder) / "seed0")
            print(f"{took:.1f} s, validation {100 * accuracy:.2f} % at iteration {iteration}")
            return
        here = machine()
        valid = [entry for entry in records["entries"] if entry["valid"] and entry["machine"] == here]
        if given.flags is None and not valid:
            parser.error("there is no record of this machine yet: give --flags")
        best = min(valid, key=lambda entry: entry["mean_seconds"], default={"command": ""})
        flags = given.flags or shlex.split(best["command"].partition("omniglot")[2])
        before = records["entries"]
        for entry in attempt(given.name, flags, Path(folder)):
            write_json(RESULTS, {"entries": [*before, entry]})
            put(ROOT / "docs" / "results.md", "speedrun", table([*before, entry]))
    print(f"{entry['mean_seconds']:.1f} s, {100 * entry['mean_accuracy']:.2f} %, valid: {entry['valid']}")


if __name__ == "__main__":
    launch(main)
