"""Peak memory of one meta-gradient over inner steps, tasks at once and engine.

    python benchmarks/memory.py            # some five minutes on one core; up to 2 GB
    python benchmarks/memory.py --quick    # the same path in a minute

Each cell runs in a process of its own, on the CPU in float32: the peak of its resident memory during the
meta-gradient, less what was resident right before it (Linux). The perceptron has eight hidden layers and ten
examples a task, so that weights dominate; conv4's memory is activations.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

from harness import RESULTS, Parser, conditions, launch, markdown, write_json

BYTES = 4  # of a number in float32
EXAMPLES = 5  # support and query, each; of five classes
ENGINES = [f"{engine}, {order}" for order in ("exact", "first-order") for engine in ("unrolled", "adjoint")]
GRID = [*product((1, 2, 5), (1, 4))]  # inner steps and tasks at once
SHAPES = {"mlp": (16,), "torchvision:resnet18": (3, 32, 32), "conv4": (3, 84, 84)}


class Cell(NamedTuple):
    """What one process measures."""

    learner: str
    width: int  # of a perceptron
    engine: str
    steps: int
    tasks: int


def resident(field: str = "VmRSS") -> int:
    """Return resident bytes; VmHWM is the peak. (getrusage's peak begins with that of the parent process.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def measure(cell: Cell) -> tuple[int, int]:
    """Return the number of parameters and the bytes of the meta-gradient's peak."""
    from tool import make_learner, make_maml, make_meta_gradient, noise

    engine, order = cell.engine.split(", ")
    tiny = make_maml(make_learner("mlp", 1, (1,)), steps=2, meta_gradient=order)
    make_meta_gradient(tiny, engine=engine)(tiny.initial_parameters(), noise(2, (1,), 0, 5, 5))  # loads code
    shape = SHAPES[cell.learner]
    is_perceptron = cell.learner == "mlp"
    arguments = {"width": cell.width, "layers": 8} if is_perceptron else {}
    batch = noise(cell.tasks, shape, 0 if is_perceptron else EXAMPLES, EXAMPLES, EXAMPLES)
    learner = make_learner(cell.learner, 1 if is_perceptron else EXAMPLES, shape, **arguments)
    maml = make_maml(learner, steps=cell.steps, meta_gradient=order, example=batch.support_x[0])
    meta_gradient = make_meta_gradient(maml, engine=engine)
    parameters = maml.initial_parameters()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    meta_gradient(parameters, batch)
    return sum(p.numel() for p in parameters.values()), resident("VmHWM") - before


def measure_alone(cell: Cell) -> tuple[int, int]:
    """Measure a cell in a process of its own."""
    # a fixed threshold: freed tensors go back to the system at once, whatever their size
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--alone", json.dumps(cell)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    parameters, peak = json.loads(done.stdout.splitlines()[-1])
    print(f"  {', '.join(map(str, cell))}: {peak / 1e6:,.0f} MB", flush=True)
    return parameters, peak


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="measure a smaller perceptron alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(Cell(*json.loads(options.alone)))))
        return
    rows, cells = [], []
    for learner, engine in product(["mlp"] if options.quick else SHAPES, ENGINES):
        row = []
        for steps, tasks in GRID:
            cell = Cell(learner, 650 if options.quick else 1200, engine, steps, tasks)
            parameters, peak = measure_alone(cell)
            cells.append({**cell._asdict(), "parameters": parameters, "peak": peak})
            row.append(f"{peak / BYTES / parameters:.1f}")
        rows.append([learner, f"{parameters:,}", engine, *row])
    titles = [f"S = {steps}, C = {tasks}" for steps, tasks in GRID]
    print(f"\n{markdown(['peak in units of the parameters', 'P', 'engine', *titles], rows)}")
    write_json(options.out / "memory.json", {"machine": conditions(), "results": {"cells": cells}})
    print(f"\nWritten: {options.out / 'memory.json'}")


if __name__ == "__main__":
    launch(main)
