#!/usr/bin/env python3
"""Peak memory of one meta-gradient over parameters, inner steps, tasks at once and engine; what that allows.

    python benchmarks/memory.py            # some seven minutes on one core; up to 2 GB
    python benchmarks/memory.py --quick    # the same path in a minute

Each cell runs in a process of its own, on the CPU in float32: the peak of its resident memory during the
meta-gradient, less what was resident right before it. A tiny meta-gradient has run by then, so that the
libraries' code is not counted. The multi-layer perceptrons have eight hidden layers and ten examples of a
task, so that weights dominate; to them the model

    bytes = 4 P (a0 + C (a1 + a2 S))      P parameters, S inner steps, C tasks at once

is fitted for each engine, by least squares of the relative errors: to all numbers of inner steps, then apart
to one (before which all tasks share their weights) and to more. ResNet-18 and conv4, whose activations the
model leaves out, are compared with it. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from script import Parser, conditions, launch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

BYTES = 4  # of a number in float32
LAYERS = 8
EXAMPLES = 5  # support and query, each; of five classes
ENGINES = {
    "unrolled, exact": ("unrolled", False),
    "adjoint, exact": ("adjoint", False),
    "unrolled, first-order": ("unrolled", True),
    "adjoint, first-order": ("adjoint", True),
}
MODELS = (10**5, 10**7, 10**8, 10**9)  # parameters, of the table of what fits
DEVICES = (16, 80, 141)  # GB of 1e9 bytes
STEPS = (1, 5)
REGIMES = {"all": (1, 99), "1": (1, 1), "2 and more": (2, 99)}  # inner steps that a fit is for
ADAM = 2  # moments of the outer loop, in units of the parameters


class Cell(NamedTuple):
    """What one process measures."""

    learner: str
    width: int  # of a perceptron
    engine: str
    steps: int
    tasks: int


class Measured(NamedTuple):
    parameters: int
    held: int  # bytes of the learner, MAML's copies of its weights and the meta-parameters
    peak: int  # bytes beyond these, during the meta-gradient


class Fit(NamedTuple):
    """Coefficients of the model, in units of the parameters."""

    a0: float  # whatever the tasks
    a1: float  # for each task
    a2: float = 0.0  # for each task and inner step

    def bytes(self, parameters: int, steps: int, tasks: int) -> float:
        return BYTES * parameters * (self.a0 + tasks * (self.a1 + self.a2 * steps))


Fits = dict[str, dict[str, Fit]]  # by engine and regime


# ---- in a process of its own ----------------------------------------------------------------


def resident(field: str = "VmRSS") -> int:
    """Bytes; "VmHWM" is the peak. Not getrusage's: there a child begins with its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def measure(cell: Cell) -> Measured:
    import torch
    from torch.nn import functional as F

    from common.batch import TaskBatch
    from learner import build_learner
    from maml import MAML

    engine, first_order = ENGINES[cell.engine]
    shape, arguments = {
        "mlp": ((16,), {"width": cell.width, "layers": LAYERS}),
        "torchvision:resnet18": ((3, 32, 32), {}),
        "conv4": ((3, 84, 84), {}),
    }[cell.learner]

    def batch(tasks: int, shape: tuple[int, ...], regression: bool) -> TaskBatch:
        x, y = torch.randn(2, tasks, EXAMPLES, *shape), torch.randn(2, tasks, EXAMPLES, 1)
        y = y if regression else torch.arange(EXAMPLES).expand(2, tasks, EXAMPLES)
        return TaskBatch(x[0], y[0], x[1], y[1])

    tiny = MAML(
        build_learner("mlp", 1), F.mse_loss, inner_lr=0.01, steps=2, engine=engine, first_order=first_order
    )
    tiny.meta_gradient(tiny.initial_parameters(), batch(2, (1,), True))  # loads code

    regression = cell.learner == "mlp"
    tasks = batch(cell.tasks, shape, regression)
    empty = resident()
    learner = build_learner(
        cell.learner, 1 if regression else EXAMPLES, inputs=shape, arguments=dict(arguments)
    )
    maml = MAML(
        learner, F.mse_loss if regression else F.cross_entropy, inner_lr=0.01, steps=cell.steps,
        engine=engine, first_order=first_order, example=tasks.support_x[0],
    )  # fmt: skip
    parameters = maml.initial_parameters()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    maml.meta_gradient(parameters, tasks)
    count = sum(p.numel() for p in parameters.values())
    return Measured(count, before - empty, resident("VmHWM") - before)


def measured_alone(cell: Cell) -> Measured:
    # a fixed threshold: freed tensors go back to the system at once, whatever their size
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--alone", json.dumps(cell)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


# ---- which, and what follows ----------------------------------------------------------------


def width_for(parameters: float) -> int:
    """Of a perceptron with that many parameters, nearly all in its square layers."""
    return round(math.sqrt(parameters / (LAYERS - 1)))


def cells(quick: bool) -> list[Cell]:
    corners = [(1, 1), (1, 4), (5, 1), (3, 2)]  # inner steps and tasks
    grid = list(product((1, 2, 5), (1, 4)))
    sizes: dict[float, list[tuple[int, int]]] = {1e6: corners[::3], 1e7: grid, 3e7: corners}
    networks = ["torchvision:resnet18", "conv4"]
    if quick:
        sizes, networks = {1e6: corners[:1], 3e6: [*corners, (2, 4)]}, []
    perceptrons = [
        Cell("mlp", width_for(size), engine, *pair)
        for size, pairs in sizes.items()
        for pair in pairs
        for engine in ENGINES
    ]
    others = [
        Cell(name, 0, engine, *pair) for name in networks for pair in corners[::3] for engine in ENGINES
    ]
    return perceptrons + others


def fitted(found: Iterable[tuple[Cell, Measured]], *, slope: bool) -> Fit:
    """By least squares of the errors relative to what was measured; without a slope, a2 is 0."""
    rows = [
        np.array([1, cell.tasks, cell.tasks * cell.steps][: 2 + slope]) * BYTES * m.parameters / m.peak
        for cell, m in found
    ]
    return Fit(*np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0].tolist())


def fit_for(fits: Fits, engine: str, steps: int) -> Fit:
    return fits[engine]["1" if steps == 1 else "2 and more"]


def most_tasks(fit: Fit, held: float, parameters: int, steps: int, device: float) -> int:
    """Tasks at once within so many bytes, beside what a run holds; activations left out."""
    room = device - BYTES * parameters * (held + ADAM) - fit.bytes(parameters, steps, 0)
    return max(0, math.floor(room / (BYTES * parameters * (fit.a1 + fit.a2 * steps))))


def table_of_cells(found: list[tuple[Cell, Measured]], fits: Fits) -> str:
    lines = ["| learner | parameters | engine | S | C | MB | in P | measured / fit |", "|-" * 8 + "|"]
    for cell, m in found:
        ratio = m.peak / fit_for(fits, cell.engine, cell.steps).bytes(m.parameters, cell.steps, cell.tasks)
        lines.append(
            f"| {cell.learner} | {m.parameters:,} | {cell.engine} | {cell.steps} | {cell.tasks} "
            f"| {m.peak / 1e6:,.0f} | {m.peak / BYTES / m.parameters:.2f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def table_of_fits(fits: Fits, errors: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| engine | S | a0 | a1 | a2 | relative error: median | largest |", "|-" * 7 + "|"]
    for engine, regime in product(ENGINES, REGIMES):
        fit, found = fits[engine][regime], errors[engine][regime]
        lines.append(
            f"| {engine} | {regime} | {fit.a0:.2f} | {fit.a1:.2f} | {fit.a2:.2f} "
            f"| {statistics.median(found):.1%} | {max(found):.1%} |"
        )
    return "\n".join(lines)


def table_of_what_fits(fits: Fits, held: float) -> str:
    titles = " | ".join(ENGINES)
    lines = [f"| parameters | device | {titles} |", "|-" * (2 + len(ENGINES)) + "|"]
    for parameters, device in product(MODELS, DEVICES):
        texts = [
            " / ".join(
                f"{most_tasks(fit_for(fits, e, s), held, parameters, s, device * 1e9):,}" for s in STEPS
            )
            for e in ENGINES
        ]
        lines.append(f"| {parameters:.0e} | {device} GB | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cells")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(Cell(*json.loads(arguments.alone)))))
        return
    found = []
    for cell in cells(arguments.quick):
        found.append((cell, measured_alone(cell)))
        print(f"  {', '.join(map(str, cell))}: {found[-1][1].peak / 1e6:,.0f} MB", flush=True)
    perceptrons = [(cell, m) for cell, m in found if cell.learner == "mlp"]
    fits: Fits = {engine: {} for engine in ENGINES}
    errors: dict[str, dict[str, list[float]]] = {engine: {} for engine in ENGINES}
    for engine, (regime, (first, last)) in product(ENGINES, REGIMES.items()):
        own = [(c, m) for c, m in perceptrons if c.engine == engine and first <= c.steps <= last]
        fit = fits[engine][regime] = fitted(own, slope=first < last)
        errors[engine][regime] = [abs(fit.bytes(m.parameters, c.steps, c.tasks) / m.peak - 1) for c, m in own]
    held = statistics.median(m.held / BYTES / m.parameters for _, m in perceptrons)
    print(f"\n{table_of_cells(found, fits)}\n\n{table_of_fits(fits, errors)}\n")
    print(
        f"Greatest number of tasks at once for {' / '.join(map(str, STEPS))} inner steps (0: not even one), "
        f"with {held:.1f} P held and {ADAM} P for Adam's moments, without activations:\n"
    )
    print(table_of_what_fits(fits, held))
    results = {
        "fits": {
            engine: {
                name: fit._asdict() | {"largest_error": max(errors[engine][name])} for name, fit in of.items()
            }
            for engine, of in fits.items()
        },
        "held": held,
        "most_tasks": {
            f"{p:.0e} parameters, {d} GB, {s} steps": {
                e: most_tasks(fit_for(fits, e, s), held, p, s, d * 1e9) for e in ENGINES
            }
            for p, d, s in product(MODELS, DEVICES, STEPS)
        },
        "cells": [cell._asdict() | m._asdict() for cell, m in found],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "memory.json"
    file.write_text(json.dumps({"machine": conditions(), "results": results}, indent=1))
    print(f"\nWritten: {file}")


if __name__ == "__main__":
    launch(main)
