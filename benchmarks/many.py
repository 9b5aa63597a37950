#!/usr/bin/env python3
"""Many runs as one (--seeds): the time of several seeds at once over that of one.

    python benchmarks/many.py                 # both tables; some 15 minutes on two cores
    python benchmarks/many.py --iterations 0  # an iteration alone, without the whole commands

An iteration of one, two, four and eight seeds is timed in turn, round after round, so that whatever slows the
machine slows all of them; ratios are taken within a round. Then the whole command of eight seeds is timed
against that of one seed and against eight commands one after another; what there is to compile is compiled
before.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the command line has it for the sinusoid's network

# below the path and the threads, which they need (E402)
import torch  # noqa: E402
from script import Parser, conditions, launch  # noqa: E402

from commands import config as settings  # noqa: E402
from commands.build import build, make_run, prepare  # noqa: E402
from common.processes import ALONE  # noqa: E402
from training.compiler import Compiler  # noqa: E402
from training.trainer import Trainer  # noqa: E402

MEMBERS = (1, 2, 4, 8)
ROUNDS = 7
SECONDS = 0.5  # of one seed's iterations, in a round

# What is timed: the flags, and whether it can be compiled.
WORKS: dict[str, tuple[list[str], bool]] = {
    "sinusoid, compiled": (["--compile", "on"], True),
    "sinusoid, uncompiled": (["--compile", "off"], False),
    "Omniglot 5-way 1-shot, fc, uncompiled": (
        ["--dataset", "omniglot", "--learner", "fc", "--compile", "off"],
        False,
    ),
}


# ---- an iteration ---------------------------------------------------------------------------


def stepper(flags: list[str], seeds: int, *, compiled: bool) -> Callable[[int], None]:
    """A function that takes so many iterations of so many seeds at once."""
    given = settings.parse(flags)
    call = settings.check_invocation(given)
    configs = [settings.resolve({**given, "seed": seed}) for seed in range(seeds)]
    runtime = prepare(configs[0], call, ALONE)
    compiler = Compiler(runtime.device)
    distribution, maml = build(configs[0], call, runtime, compiler)
    runs = [
        make_run(each, Path(), maml.initial_parameters(each.training.seed), writes=False) for each in configs
    ]
    if seeds > 1:
        maml = maml.with_options(in_transform=True)
    training_tasks = distribution.resized(configs[0].training_shots)
    trainer = Trainer(runs, maml, training_tasks, distribution, compiler, show=False)
    compiler.active = compiled

    def run(iterations: int) -> None:
        for _ in range(iterations):
            trainer.state = trainer.meta_step(trainer.state, trainer.iteration)
            trainer.iteration += 1
        trainer.state.sums.tolist()  # it is done

    run(2)  # compiles
    return run


def seconds_of(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def iterations_in_turn(name: str, rounds: int) -> dict[str, Any]:
    flags, compiled = WORKS[name]
    runs = {count: stepper(flags, count, compiled=compiled) for count in MEMBERS}
    once = max(1, round(SECONDS / (seconds_of(partial(runs[1], 10)) / 10)))
    times: dict[int, list[float]] = {count: [] for count in MEMBERS}
    for _ in range(rounds):
        for count, run in runs.items():
            fewer = max(1, once // count)
            times[count].append(1e3 * seconds_of(partial(run, fewer)) / fewer)
    found = {}
    for count, values in times.items():
        ratios = [value / one for value, one in zip(values, times[1], strict=True)]
        found[str(count)] = {
            "ms": statistics.median(values),
            "quartiles_ms": statistics.quantiles(values, n=4)[::2],
            "over_one": statistics.median(ratios),
            "quartiles_over_one": statistics.quantiles(ratios, n=4)[::2],
        }
    return found


def table_of_iterations(results: dict[str, dict[str, Any]]) -> str:
    rows = ["| an iteration of | " + " | ".join(f"{n} seed{'s' * (n > 1)}" for n in MEMBERS) + " |"]
    rows.append("|-" * (len(MEMBERS) + 1) + "|")
    for name, found in results.items():
        cells = []
        for count in map(str, MEMBERS):
            times = f" ({found[count]['over_one']:.2f} x)" if count != "1" else ""
            cells.append(f"{found[count]['ms']:.3g} ms{times}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


# ---- whole commands -------------------------------------------------------------------------


def commands(iterations: int, rounds: int) -> dict[str, Any]:
    """Seconds of the command line, in turn: one seed, eight at once, eight one after another."""
    with tempfile.TemporaryDirectory() as folder:

        def main(*flags: str) -> None:
            line = [sys.executable, str(HERE.parent / "main.py"), "--iterations", str(iterations)]
            line += ["--compile", "on", "--checkpoint-path", folder, *flags]
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        def one_after_another() -> None:
            for seed in range(8):
                main("--seed", str(seed))

        kinds: dict[str, Callable[[], None]] = {
            "one seed": partial(main, "--seed", "0"),
            "eight seeds at once": partial(main, "--seeds", "0-7"),
            "eight commands one after another": one_after_another,
        }
        for name in ("one seed", "eight seeds at once"):
            kinds[name]()  # fills the cache of compiled code
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(rounds):
            for name, kind in kinds.items():
                times[name].append(seconds_of(kind))
    return {
        name: {
            "seconds": statistics.median(values),
            "all_seconds": values,
            "over_one": statistics.median(v / one for v, one in zip(values, times["one seed"], strict=True)),
        }
        for name, values in times.items()
    }


def table_of_commands(found: dict[str, Any], iterations: int) -> str:
    rows = [
        f"| sinusoid, {iterations:,} iterations, the whole command, code compiled before | s | |",
        "|-|-|-|",
    ]
    for name, row in found.items():
        rows.append(f"| {name} | {row['seconds']:.1f} | {row['over_one']:.2f} x |")
    return "\n".join(rows)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the iterations")
    parser.add_argument(
        "--iterations", type=int, default=3000, help="of the whole commands; 0: none of these"
    )
    parser.add_argument("--command-rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.command_rounds < 1:
        parser.error("--rounds: at least 2; --command-rounds: at least 1")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    results: dict[str, Any] = {"iteration": {}}
    for name in WORKS:
        results["iteration"][name] = iterations_in_turn(name, arguments.rounds)
    print("\n" + table_of_iterations(results["iteration"]))
    if arguments.iterations:
        found = commands(arguments.iterations, arguments.command_rounds)
        results["command"] = {"iterations": arguments.iterations, "kinds": found}
        print("\n" + table_of_commands(found, arguments.iterations))
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "many.json"
    file.write_text(json.dumps({"machine": conditions(), "results": results}, indent=1))
    print(f"\nWritten: {file}")


if __name__ == "__main__":
    launch(main)
