"""All algorithms and baselines on one family of tasks, with the same budget: one table, one picture.

    python benchmarks/algorithms.py                                   # sinusoid, K = 10, tested at 5 and 10
    python benchmarks/algorithms.py --dataset sinusoid-frequency -k 5 --test-shots 5 10 20 \\
        --iterations 60000 --algorithms maml meta-sgd --no-baselines  # the Meta-SGD paper's
    python benchmarks/algorithms.py --quick                           # the same path in a few minutes

Runs `main.py` once for each algorithm and seed, then `main.py --eval` on the checkpoint that is best on
validation tasks, for each number of shots; what is
finished is kept in --folder, so that the command can be repeated until all is there. Writes the table, the
numbers and the picture to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from presets import ALGORITHMS  # noqa: E402

STEPS = (1, 5, 10)  # after which the table shows the error
BASELINES = ("scratch, sgd", "scratch, adam", "pretrained", "oracle")


@dataclass(frozen=True)
class Cell:
    """A method's error at one number of shots and steps, over seeds."""

    means: list[float]  # of each seed's tasks that did not diverge
    intervals: list[float]  # 95 % over the tasks of each seed
    diverged: int  # tasks, of all seeds

    def text(self) -> str:
        """Mean over seeds, its interval over tasks, the lowest and the highest seed."""
        mean, interval = statistics.mean(self.means), statistics.mean(self.intervals)
        spread = f" ({min(self.means):.3f} to {max(self.means):.3f})" if len(self.means) > 1 else ""
        return f"{mean:.3f} ±{interval:.3f}{spread}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", default="sinusoid")
    parser.add_argument("-k", type=int, default=10, help="support points while training (default: 10)")
    parser.add_argument("--test-shots", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--iterations", type=int, default=70_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=10_000, help="test tasks (default: 10,000)")
    parser.add_argument("--algorithms", nargs="+", default=[a for a in ALGORITHMS if a != "pretrain"])
    parser.add_argument("--baselines", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "algorithms")
    parser.add_argument("--quick", action="store_true", help="500 iterations, one seed, 500 tasks")
    given = parser.parse_args()
    if given.quick:
        given.iterations, given.seeds, given.tasks = 500, [0], 500
        given.folder = given.folder.with_name(given.folder.name + "-quick")
    return given


def command(arguments: list[str]) -> None:
    """Runs main.py on one thread; raises RuntimeError with its last words where it fails."""
    line = [sys.executable, str(ROOT / "main.py"), *arguments]
    done = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(line)}:\n{done.stderr[-1000:]}")


def training_flags(given: argparse.Namespace, algorithm: str, seed: int) -> list[str]:
    return [
        *("--dataset", given.dataset, "--algorithm", algorithm, "-k", str(given.k), "--seed", str(seed)),
        *("--iterations", str(given.iterations), "--meta-batch-size", "25"),
    ]


def run(given: argparse.Namespace, algorithm: str, seed: int) -> None:
    """Trains and tests one algorithm from one seed, as far as that has not been done."""
    name = f"{given.dataset}-{given.k}shot-{algorithm}-{given.iterations}-seed{seed}"
    folder = given.folder / name
    if not (folder / "training.json").exists():
        where = ["--run-name", name, "--checkpoint-path", str(given.folder), "--resume"]
        command([*training_flags(given, algorithm, seed), *where])
    for shots in given.test_shots:
        baselines = given.baselines and algorithm == "maml"
        if result_file(given, algorithm, seed, shots, baselines).exists():
            continue
        testing = ["-k", str(shots), "-q", "10", "--eval-tasks", str(given.tasks), "--eval-steps", "16"]
        command(["--eval", "--load", str(folder / "best.pt"), *testing, *["--baselines"] * baselines])
    print(f"done: {algorithm}, seed {seed}", flush=True)


def result_file(given: argparse.Namespace, algorithm: str, seed: int, shots: int, baselines: bool) -> Path:
    name = f"{given.dataset}-{given.k}shot-{algorithm}-{given.iterations}-seed{seed}"
    result = f"best-test-{given.dataset}-{shots}shot-10query-{given.tasks}tasks"
    return given.folder / name / f"{result}{'-baselines' * baselines}.json"


def read(given: argparse.Namespace, method: str, seed: int, shots: int) -> dict[str, Any]:
    """The record of a method's evaluation: an algorithm's own, or a baseline's beside MAML."""
    if method not in BASELINES:
        return json.loads(result_file(given, method, seed, shots, False).read_text())
    return json.loads(result_file(given, "maml", seed, shots, True).read_text())["methods"][method]


def cell(records: list[dict[str, Any]], steps: int) -> Cell | None:
    """Over seeds, after so many steps; a method without an inner loop has its only number after 1 step."""
    rows = []
    for record in records:
        by_steps = {row["steps"]: row for row in record["per_step"]}
        if steps not in by_steps and not (len(by_steps) == 1 and steps == 1):
            return None
        rows.append(by_steps.get(steps, by_steps[0]))
    if any(row["loss_without_diverged"] is None for row in rows):
        return None
    return Cell(
        [row["loss_without_diverged"] for row in rows],
        [row["loss_without_diverged_interval_95"] for row in rows],
        sum(row["diverged_tasks"] for row in rows),
    )


def table(given: argparse.Namespace, records: dict[str, dict[int, list[dict[str, Any]]]]) -> str:
    titles = [f"K = {shots}, {n} step{'s' * (n > 1)}" for shots in given.test_shots for n in STEPS]
    lines = [f"| | {' | '.join(titles)} | trained for | diverged |", "|-" * (len(titles) + 3) + "|"]
    for method, by_shots in records.items():
        cells = [cell(by_shots[shots], steps) for shots in given.test_shots for steps in STEPS]
        found = [c for c in cells if c is not None]
        record = by_shots[given.test_shots[0]][0]
        trained = record.get("trained_steps", "") if method not in BASELINES else ""
        texts = " | ".join(c.text() if c else "" for c in cells)
        lines.append(f"| {method} | {texts} | {trained} | {max((c.diverged for c in found), default=0)} |")
    tasks = f"{given.tasks:,} tasks, {len(given.seeds)} seed{'s' * (len(given.seeds) > 1)}"
    lines.append(
        f"\nQuery MSE over {tasks}: mean over seeds, ± 95 % interval over tasks, lowest and highest seed; "
        "diverged tasks left out of the means, and counted (the most in any column, over all seeds)."
    )
    return "\n".join(lines)


def figure(
    given: argparse.Namespace, records: dict[str, dict[int, list[dict[str, Any]]]], path: Path
) -> None:
    """Mean error over inner steps of each method, a panel a number of shots."""
    from figures import curve_style, legend_below, new_figure, over_steps, style
    from report import write_figure

    with style() as theme:
        drawn = new_figure(4.6 * len(given.test_shots), 4.2)
        panels = drawn.subplots(1, len(given.test_shots), sharey=True, squeeze=False)[0]
        for panel, shots in zip(panels, given.test_shots, strict=True):
            for number, (method, by_shots) in enumerate(records.items()):
                rows = [[row["loss_without_diverged"] for row in r["per_step"]] for r in by_shots[shots]]
                means = [statistics.mean(at) for at in zip(*rows, strict=True) if None not in at]
                kind = curve_style(number, theme)
                if len(means) == 1:
                    panel.axhline(means[0], label=method, color=theme.grey, linestyle=":")
                else:
                    panel.plot(range(len(means)), means, label=method, **kind)
            over_steps(panel)
            panel.set(title=f"{given.dataset}, K = {shots}", yscale="log")
        panels[0].set_ylabel("query MSE, mean over seeds and tasks")
        legend_below(drawn, panels[0], columns=5)
        write_figure(path, drawn)


def main() -> None:
    given = parse()
    given.folder.mkdir(parents=True, exist_ok=True)
    jobs = [(algorithm, seed) for algorithm in given.algorithms for seed in given.seeds]
    with ThreadPoolExecutor(given.jobs) as pool:
        for result in [pool.submit(run, given, *job) for job in jobs]:
            result.result()
    methods = [*given.algorithms, *BASELINES * (given.baselines and "maml" in given.algorithms)]
    records = {
        method: {
            shots: [read(given, method, seed, shots) for seed in given.seeds] for shots in given.test_shots
        }
        for method in methods
    }
    text = table(given, records)
    print(text)
    results = ROOT / "benchmarks" / "results"
    name = f"algorithms-{given.dataset}{'-quick' * given.quick}"
    (results / f"{name}.md").write_text(text + "\n")
    plain = {
        method: {
            shots: [{"seed": s, "per_step": r["per_step"]} for s, r in zip(given.seeds, found, strict=True)]
            for shots, found in by_shots.items()
        }
        for method, by_shots in records.items()
    }
    settings = {name: value for name, value in vars(given).items() if name not in ("folder", "jobs")}
    (results / f"{name}.json").write_text(json.dumps({"settings": settings, "methods": plain}) + "\n")
    figure(given, records, results / f"{name}.png")
    print(f"Written: {results / name}.md, .json and .png")


if __name__ == "__main__":
    main()
