#!/usr/bin/env python3
"""Speed and memory of this tool, of other ways to the same meta-gradient, and of the arithmetic alone.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/speed.py                      # every table; some 25 minutes on two cores, cold
    python benchmarks/speed.py sinusoid-1 omniglot-5-way
    python benchmarks/speed.py --growth             # time and memory over meta-batch, inner steps, width
    python benchmarks/speed.py --precision          # float32 and bf16: speed, and error against float64

All contenders have the same network, tasks and optimizer. First their meta-gradients are compared; then
they are timed in turn, round after round, so that whatever slows the machine slows them all. Medians
and quartiles of the rounds are printed and saved, with ratios taken round by round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

# below the path and the threads, which they need (E402)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from peers import META_LR, PEERS, Contender, Work  # noqa: E402
from script import Parser, conditions, launch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from commands.config import resolve  # noqa: E402
from common.batch import TaskBatch  # noqa: E402
from common.files import read_json  # noqa: E402
from dataset import Sinusoid  # noqa: E402
from evaluation.tables import write_json  # noqa: E402
from learner import build_learner  # noqa: E402
from maml import MAML, as_it_is  # noqa: E402
from tasks.image_tasks import ImageTasks  # noqa: E402
from tasks.images import ImageSet  # noqa: E402
from training.compiler import Compiler  # noqa: E402
from training.step import TAIL, FlatLayout, MetaStep, OuterLoop, State  # noqa: E402

OURS = "this tool"
EAGER = "this tool, uncompiled"
ROUNDS = 9
CHECKED = 5  # examples of a task with which meta-gradients are compared


# ---- what is timed --------------------------------------------------------------------------


def sinusoid(steps: int, *, tasks: int = 25, width: int = 40) -> Work:
    torch.manual_seed(0)
    learner = nn.Sequential(
        nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
    )
    return Work(
        f"sinusoid-{steps}", learner, Sinusoid(10, 15), tasks, steps, 0.01, 100 * max(1, 3 // steps), 2
    )


def omniglot(ways: int, shots: int, steps: int, *, tasks: int, inner_lr: float = 0.4) -> Work:
    """Images of noise: what they show does not change the work."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (100, 20, 28, 28), dtype=torch.uint8)
    splits = {name: torch.arange(100) for name in ("train", "validation", "test")}
    count, names = torch.full((100,), 20), [str(number) for number in range(100)]
    noise = ImageSet(names, count, splits, lambda: images.flatten(0, 1)[:, None], "noise")
    distribution = ImageTasks(noise, ways=ways, shots=shots, queries=shots, quarter_turns=True)
    learner = build_learner("conv", ways, init="torch", seed=0)
    name = f"omniglot-{ways}-way-{shots}-shot-{steps}"
    return Work(name, learner, distribution, tasks, steps, inner_lr, 3 if steps == 1 else 1, 1)


WORKS: dict[str, Callable[[], Work]] = {
    "sinusoid-1": lambda: sinusoid(1),
    "sinusoid-5": lambda: sinusoid(5),
    "omniglot-5-way": lambda: omniglot(5, 1, 1, tasks=32),
    "omniglot-20-way": lambda: omniglot(20, 1, 5, tasks=16, inner_lr=0.1),
}


def settings_for(work: Work, **given: Any) -> Any:
    """What the tool's rules choose for such a run."""
    sizes: dict[str, Any] = {"steps": work.steps, "meta_batch_size": work.tasks}
    if work.distribution.classification:
        sizes |= {"dataset": "omniglot", "ways": work.distribution.ways, "shots": work.distribution.shots}
    return resolve(sizes | {"iterations": 60_000, "compile": "on"} | given)


def ours(work: Work, *, compute_dtype: torch.dtype | None = None, **given: Any) -> Contender:
    """This tool's own step, under its own rules unless `given` says otherwise."""
    config = settings_for(work, **given)
    accelerate: Any = as_it_is
    if config.compile == "on":
        accelerate = Compiler(torch.device("cpu"))
        accelerate.active = True
    maml = MAML(
        work.learner, work.loss, inner_lr=work.inner_lr, steps=work.steps, engine=config.engine,
        convolution=config.convolution, tasks_at_once=config.tasks_at_once,
        compute_dtype=compute_dtype, accelerate=accelerate,
    )  # fmt: skip
    parameters = maml.initial_parameters()
    layout = FlatLayout(parameters)
    step = MetaStep(
        maml, work.distribution, OuterLoop(META_LR), layout=layout,
        member={"seed": torch.tensor(0)}, tasks=work.tasks, accelerate=accelerate,
    )  # fmt: skip
    vector = layout.flatten(parameters)
    moments = torch.zeros_like(vector), torch.zeros_like(vector)
    sums = torch.zeros(2 + len(TAIL), dtype=vector.dtype)
    state = [State(vector, *moments, torch.tensor(0), sums, vector[:0])]

    def run(iterations: int) -> None:
        with Threads(1 if not work.distribution.classification else torch.get_num_threads()):
            for _ in range(iterations):
                state[0] = step(state[0])

    def gradient(batch: TaskBatch) -> dict[str, np.ndarray]:
        result = maml.meta_gradient(parameters, batch)
        return {name: g.double().numpy() for name, g in result.gradients.items()}

    return Contender(run, gradient)


class Threads:
    """The tool's rule: one thread for the sinusoid network."""

    def __init__(self, number: int) -> None:
        self.number, self.before = number, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.number)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


# ---- measuring ------------------------------------------------------------------------------


def matrix_rate() -> float:
    """FLOP/s of a large product of matrices, just now."""
    a, b = torch.randn(2, 1536, 1536)
    a @ b
    begin = time.perf_counter()
    for _ in range(3):
        a @ b
    return 3 * 2 * 1536**3 / (time.perf_counter() - begin)


def operations(work: Work) -> float:
    """FLOPs of the matrix products of one exact meta-gradient."""
    maml = MAML(work.learner, work.loss, inner_lr=work.inner_lr, steps=work.steps, convolution="im2col")
    with FlopCounterMode(display=False) as counter:
        maml.meta_gradient(maml.initial_parameters(), work.batch(0))
    return float(counter.get_total_flops())


def contenders(work: Work, without: list[str]) -> dict[str, Contender]:
    found = {OURS: ours(work), EAGER: ours(work, compile="off")}
    for name, make in PEERS.items():
        if name in without:
            continue
        try:
            found[name] = make(work)
        except ImportError as error:
            print(f"  {name}: left out ({error})", flush=True)
    return found


def check_gradients(work: Work, found: dict[str, Contender]) -> dict[str, float]:
    """Largest difference from this tool's meta-gradient, over its largest element; raises above 1e-4.

    The smallest of eight batches of three tasks with few examples: in single precision a ReLU at its kink
    may fall on either side, whatever computes it, which moves a second-order gradient; in a whole meta-batch
    of images some ReLU is always there. Another gradient would differ in all of them.
    """
    differences = dict.fromkeys(found, math.inf)
    for iteration in range(8):
        whole = work.distribution.sample("train", 1, iteration, range(3))
        batch = TaskBatch(*(part[:, :CHECKED] for part in whole))
        expected = found[OURS].gradient(batch)
        scale = max(np.abs(g).max() for g in expected.values())
        for name, contender in found.items():
            theirs = contender.gradient(batch)
            if theirs.keys() != expected.keys():
                raise SystemExit(f"{name} has other parameters")
            difference = max(np.abs(theirs[k] - expected[k]).max() for k in expected) / scale
            differences[name] = min(differences[name], difference)
    for name, difference in differences.items():
        if not difference < 1e-4:
            raise SystemExit(f"{name} computes another meta-gradient: {difference:.1e} off")
    return differences


def timed(contender: Contender, iterations: int) -> float:
    begin = time.perf_counter()
    contender.run(iterations)
    return (time.perf_counter() - begin) / iterations


def compare(work: Work, rounds: int, without: list[str]) -> dict[str, Any]:
    print(f"\n{work.name}: {work.tasks} tasks, {work.steps} inner steps", flush=True)
    begin = time.monotonic()
    found = contenders(work, without)
    differences = check_gradients(work, found)
    counts = {name: work.slow_iterations if c.slow else work.iterations for name, c in found.items()}
    for name, contender in found.items():  # compile, warm up
        contender.run(100 if "scan" in name else 1)
        timed(contender, counts[name])
    print(f"  ready after {time.monotonic() - begin:.0f} s; timing", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    rates = []
    for _ in range(rounds):
        rates.append(matrix_rate())
        for name, contender in found.items():
            seconds[name].append(timed(contender, counts[name]))
    flops = operations(work)
    limit = [flops / rate for rate in rates]
    rows = {}
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4)
        rows[name] = {
            "median_ms": 1e3 * statistics.median(values),
            "quartiles_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]],
            "ours_is_faster_by": statistics.median(v / o for v, o in zip(values, seconds[OURS], strict=True)),
            "gradient_difference": differences[name],
            "peak_memory_mb": peak_memory(work.name, name, 1 if found[name].slow else 3),
        }
    result = {
        "machine": conditions(),
        "tasks": work.tasks,
        "inner_steps": work.steps,
        "rounds": rounds,
        "gflop": flops / 1e9,
        "matrix_gflop_per_s": statistics.median(rates) / 1e9,
        "limit_ms": 1e3 * statistics.median(limit),
        "ours_over_limit": statistics.median(o / x for o, x in zip(seconds[OURS], limit, strict=True)),
        "contenders": rows,
    }
    print(table(result), flush=True)
    return result


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | ms an iteration: median (quartiles) | this tool is faster by | gradient differs by "
        "| peak memory |",
        "|-|-|-|-|-|",
    ]
    for name, row in result["contenders"].items():
        low, high = row["quartiles_ms"]
        lines.append(
            f"| {name} | {row['median_ms']:.4g} ({low:.4g} to {high:.4g}) | {row['ours_is_faster_by']:.3g} "
            f"| {row['gradient_difference']:.0e} | {row['peak_memory_mb']:.0f} MB |"
        )
    lines.append(
        f"| arithmetic: {result['gflop']:.3g} GFLOP at {result['matrix_gflop_per_s']:.0f} GFLOP/s "
        f"| {result['limit_ms']:.4g} | {1 / result['ours_over_limit']:.3g} | | |"
    )
    return "\n".join(lines)


# ---- memory: each in a process of its own ---------------------------------------------------


def peak_memory(work: str, contender: str, iterations: int) -> float:
    """Peak of a fresh process that runs a few iterations, in MB (Linux); compiled code is cached."""
    command = [sys.executable, __file__, "--alone", json.dumps([work, contender, iterations])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def alone(work_name: str, contender: str, iterations: int) -> None:
    kind, *sizes = work_name.split("-")
    if kind == "sinusoid":
        work = sinusoid(int(sizes[0]))
    else:
        ways, shots, steps = int(sizes[0]), int(sizes[2]), int(sizes[4])
        work = omniglot(ways, shots, steps, tasks=32 if (ways, shots) == (5, 1) else 16, inner_lr=0.1)
    special = {OURS: {}, EAGER: {"compile": "off"}, "adjoint": {"engine": "adjoint"}}
    chosen = special.get(contender)
    (ours(work, **chosen) if chosen is not None else PEERS[contender](work)).run(iterations)
    # not getrusage: there a child begins with its parent's peak
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def memory_over_steps() -> dict[str, Any]:
    """Peak memory of the adjoint engine at 2 and at 20 inner steps."""
    result = {}
    for ways, shots in ((5, 5), (5, 1)):
        few, many = (
            peak_memory(f"omniglot-{ways}-way-{shots}-shot-{steps}", "adjoint", 1) for steps in (2, 20)
        )
        result[f"{ways}-way {shots}-shot"] = {"2 steps": few, "20 steps": many, "ratio": many / few}
        print(f"  {ways}-way {shots}-shot: {few:.0f} MB at 2 steps, {many:.0f} at 20: {many / few:.3f}")
    return result


# ---- growth and precision -------------------------------------------------------------------


def growth() -> dict[str, Any]:
    """Milliseconds over meta-batch, inner steps and width, compiled and not."""
    series = {
        "tasks": {n: sinusoid(1, tasks=n) for n in (5, 25, 100)},
        "inner steps": {n: sinusoid(n) for n in (1, 5, 10)},
        "width": {n: sinusoid(1, width=n) for n in (20, 80, 160)},
    }
    result: dict[str, Any] = {"memory over inner steps": memory_over_steps()}
    for axis, works in series.items():
        for size, work in works.items():
            found = {OURS: ours(work), EAGER: ours(work, compile="off")}
            if axis == "inner steps":
                found["this tool, adjoint"] = ours(work, engine="adjoint")
            row = {}
            for name, contender in found.items():
                contender.run(2)
                times = [timed(contender, 50 if "un" in name else 200) for _ in range(5)]
                row[name] = 1e3 * statistics.median(times)
            result.setdefault(axis, {})[size] = row
            print(f"  {axis} {size}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in row.items()), flush=True)
    return result


def precision(rounds: int) -> dict[str, Any]:
    """Time, and the meta-gradient's distance from that in float64, of 5-way 1-shot Omniglot."""
    work = omniglot(5, 1, 1, tasks=32)
    batch = work.batch(1)
    wide = TaskBatch(*(t.double() if t.is_floating_point() else t for t in batch))
    maml = MAML(work.learner.double(), work.loss, inner_lr=work.inner_lr)
    exact = maml.meta_gradient(maml.initial_parameters(), wide).gradients
    work.learner.float()
    found = {
        "float32": ours(work),
        "bf16": ours(work, compute_dtype=torch.bfloat16),
        "float32, uncompiled": ours(work, compile="off"),
        "bf16, uncompiled": ours(work, compile="off", compute_dtype=torch.bfloat16),
    }
    result = {}
    norm = math.sqrt(sum(float((g * g).sum()) for g in exact.values()))
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for contender in found.values():
        contender.run(1)
    for _ in range(rounds):
        for name, contender in found.items():
            seconds[name].append(timed(contender, 2))
    for name, contender in found.items():
        theirs = contender.gradient(batch)
        error = math.sqrt(sum(float(((theirs[k] - exact[k].numpy()) ** 2).sum()) for k in exact)) / norm
        result[name] = {"median_ms": 1e3 * statistics.median(seconds[name]), "relative_error": error}
        print(f"  {name}: {result[name]['median_ms']:.1f} ms, error {error:.1e}", flush=True)
    return result


# ---- results --------------------------------------------------------------------------------


def draw(results: dict[str, Any], file: Path) -> None:
    from matplotlib.ticker import NullFormatter

    from evaluation.figures import new_figure, style
    from evaluation.tables import write_figure

    compared = {name: r for name, r in results.items() if "contenders" in r}
    if not compared:
        return
    with style() as theme:
        figure = new_figure(3.2 * len(compared), 2.8)
        panels = figure.subplots(1, len(compared), squeeze=False)[0]
        for panel, (name, result) in zip(panels, compared.items(), strict=True):
            rows = result["contenders"]
            heights = [row["median_ms"] for row in rows.values()]
            colours = [theme.blue if OURS in row else theme.grey for row in rows]
            panel.barh(range(len(rows)), heights, color=colours)
            panel.axvline(result["limit_ms"], color=theme.red, linewidth=1.2)
            panel.set_yticks(range(len(rows)), list(rows))
            panel.invert_yaxis()
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.set(title=name, xlabel="ms (line: arithmetic alone)")
        write_figure(file, figure)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("works", nargs="*", help=f"of {', '.join(WORKS)}; all by default")
    parser.add_argument("--growth", action="store_true", help="time and memory over sizes instead")
    parser.add_argument("--precision", action="store_true", help="speed and error of the precisions instead")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--without", action="append", default=[], choices=PEERS, help="leave a peer out")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the JSON and the picture"
    )
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(*json.loads(arguments.alone))
        return
    unknown = [name for name in arguments.works if name not in WORKS]
    if unknown or arguments.rounds < 2:
        parser.error(f"no work {unknown[0]}: of {', '.join(WORKS)}" if unknown else "--rounds: at least 2")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    name = "growth" if arguments.growth else "precision" if arguments.precision else "speed"
    file = arguments.out / f"{name}.json"
    try:
        known = read_json(file)["results"] if name == "speed" and file.exists() else {}
    except (ValueError, KeyError, TypeError):
        parser.error(f"{file} is damaged: remove it, or name another --out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if name == "speed":
        for work in arguments.works or WORKS:
            known[work] = compare(WORKS[work](), arguments.rounds, arguments.without)
            write_json(file, {"results": known})  # the others' stay
        draw(known, arguments.out / "speed.png")
    else:
        results = growth() if arguments.growth else precision(arguments.rounds)
        write_json(file, {"machine": conditions(), "results": results})
    print(f"\nWritten: {file}")


if __name__ == "__main__":
    launch(main)
