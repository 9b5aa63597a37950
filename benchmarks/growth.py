"""How an iteration's time and peak memory grow with tasks, inner steps, width, ways, processes and seeds.

    python benchmarks/growth.py    # some five minutes on two cores, up to 4 GB; Linux; `higher` if installed
    python benchmarks/growth.py --quick --out /tmp/growth    # a rehearsal

Every point has processes of its own, on the CPU in float32, one thread each. The points of a panel take
turns, and the least of several timings counts. Memory is the peak of an iteration beyond what was resident
before it. Of an engine, the meta-gradient alone is measured. An exponent is the slope of the log-log line
over the upper half of a curve.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
import torch._decomp.decompositions_for_jvp
import torch._inductor.compile_fx  # as the line above: imported before processes are forked
from growth_report import describe, draw, tabulate
from harness import RESULTS, ROOT, Parser
from peers import Work, func_vmap, higher_loop
from tool import World, assemble, join, make_learner, make_meta_gradient

WAYS = OURS, PLAIN, FUNC, HIGHER = "this tool", "this tool, uncompiled", "torch.func, eager", "higher, loop"
ENGINES = [f"{engine}, {order}" for order in ("exact", "first-order") for engine in ("unrolled", "adjoint")]
IMAGES = "--dataset images:FOLDER --channels {} --image-size {} --adapt-norm -k 1 -q 1 --learner {} -n"
CONV, CONV4, FC = (IMAGES.format(*network) for network in ((1, 28, "conv"), (3, 84, "conv4"), (1, 28, "fc")))
RESNET = IMAGES.format(3, 32, "torchvision:resnet18")
WIDE = "-k 5 -q 5 --learner-args layers=8"  # 10 million weights with 1,200 units
FORK = multiprocessing.get_context("fork")


class Cell(NamedTuple):
    """What one process measures, or several that share the tasks."""

    way: str
    tasks: int = 25
    steps: int = 1
    width: int = 40  # of the perceptron
    ways: int = 0  # 0: sinusoids
    processes: int = 1
    seeds: int = 1
    flags: str = "-k 10 -q 15 --learner-args"


def make_cells(flags: str, steps: int = 1, ways: int = 5) -> dict[str, Cell]:
    return {engine: Cell(engine, 1, steps, 1200, ways, flags=flags) for engine in ENGINES}


EAGER = (PLAIN, FUNC, *[HIGHER] * bool(importlib.util.find_spec("higher")))
ALL, CONVS = {way: Cell(way) for way in (OURS, *EAGER)}, {way: Cell(way, 8, flags=CONV) for way in EAGER}
SEEDS = {"compiled": Cell(OURS), "uncompiled": Cell(PLAIN), "5-way, fc": Cell(PLAIN, 32, ways=5, flags=FC)}
SHARED = {"sinusoid": Cell(PLAIN), "5-way, conv": Cell(PLAIN, 32, ways=5, flags=CONV)}
PANELS = {  # the field of a cell that grows, its values, and the curves over it
    "tasks": ("tasks", (1, 4, 25, 64, 256), ALL),
    "inner steps": ("steps", (1, 2, 5, 10, 20), ALL),
    "units in a layer": ("width", (20, 40, 80, 160, 320), ALL),
    "ways (conv, 8 tasks)": ("ways", (2, 5, 10, 20), CONVS),
    "seeds at once (sinusoid; fc)": ("seeds", (1, 2, 4, 8), SEEDS),
    "processes, uncompiled": ("processes", (1, 2, 4), SHARED),
    "inner steps, 10 M weights": ("steps", (1, 2, 5), make_cells(WIDE, ways=0)),
    "tasks, 10 M weights, 2 steps": ("tasks", (1, 2, 4), make_cells(WIDE, 2, 0)),
    "inner steps, conv4, 84 px": ("steps", (1, 2, 5), make_cells(CONV4)),
    "inner steps, ResNet-18, 32 px": ("steps", (1, 2, 5), make_cells(RESNET)),
}


def prepare(cell: Cell, world: World, images: Path) -> tuple[Callable[[int], Any], int]:
    """Return a function that takes some iterations, and the number of parameters."""
    engine, _, order = cell.way.partition(", ")
    text = f"--meta-batch-size {cell.tasks} -s {cell.steps} --compile {'on' if cell.way == OURS else 'off'} "
    text += "--first-order " * (order == "first-order") + "--iterations 60000 --threads 1 --init torch "
    text += f"--no-check-gradients {cell.flags} {cell.ways or f'width={cell.width}'}"
    run = assemble(text.replace("FOLDER", str(images)).split(), world, cell.seeds)
    parameters = sum(weight.numel() for weight in run.parameters.values())
    if cell.way in ENGINES:
        batch = run.distribution.sample("train", 0, 0, range(cell.tasks))
        gradient = partial(make_meta_gradient(run.maml, engine=engine), run.maml.initial_parameters())
        return lambda iterations: [gradient(batch) and None for _ in range(iterations)], parameters
    if cell.way in (OURS, PLAIN):
        return run.advance, parameters
    kind, outputs, shape = ("conv", cell.ways, (1, 28, 28)) if cell.ways else ("mlp", 1, (1,))
    learner = make_learner(kind, outputs, shape, **({} if cell.ways else {"width": cell.width}))
    work = Work("", [], learner, run.distribution, cell.tasks, cell.steps, 0.001, 1)
    return (higher_loop if cell.way == HIGHER else func_vmap)(work).run, parameters


def serve(pipe: Connection, gate: Any, cell: Cell, rank: int, port: int, images: Path) -> None:
    """Send peak and parameters; then time as many iterations as are asked for, until none are."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # ends with its parent
    world = World(rank, cell.processes, rank, cell.processes)
    with gate if world.size == 1 else nullcontext():  # several wait for each other
        if world.size > 1:
            place = {"RANK": rank, "WORLD_SIZE": world.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()}
            world = join(world, torch.device("cpu"), 5.0, 5.0)
        run, parameters = prepare(cell, world, images)
        pipe.send((harness.measure_peak(run), parameters))
    while iterations := pipe.recv():
        begin = time.perf_counter()
        run(iterations)
        pipe.send((time.perf_counter() - begin) / iterations)


def start(cell: Cell, gate: Any, images: Path) -> list[Connection]:
    """Start a cell's processes; return the ends of their pipes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, ends = free.getsockname()[1], []
    for rank in range(cell.processes):
        end, other = FORK.Pipe()
        FORK.Process(target=serve, args=(other, gate, cell, rank, port, images), daemon=True).start()
        other.close()  # so that the death of the process is noticed
        ends.append(end)
    return ends


def time_cell(ends: list[Connection], iterations: int) -> float:
    for end in ends:
        end.send(iterations)
    return max(end.recv() for end in ends)


def measure(cells: dict[tuple[str, int], Cell], rounds: int, images: Path) -> dict[str, Any]:
    """Return values, least seconds, peaks, parameters and exponents by curve."""
    gate = FORK.Semaphore(os.cpu_count() or 1)
    ends = {key: start(cell, gate, images) for key, cell in cells.items()}
    facts = {key: [end.recv() for end in ends[key]] for key in cells}
    counts = {key: max(1, int(0.05 / time_cell(ends[key], 1))) for key in cells}
    times = harness.take_turns({key: partial(time_cell, ends[key], counts[key]) for key in cells}, rounds)
    for end in chain(*ends.values()):
        end.send(0)
    curves: dict[str, Any] = {}
    for curve in dict.fromkeys(name for name, _ in cells):
        keys = [key for key in cells if key[0] == curve]
        results: dict[str, Sequence[float]] = {"values": [value for _, value in keys]}
        results["seconds"] = [min(times[key]) for key in keys]
        results["peak"], results["parameters"] = zip(*(max(facts[key]) for key in keys), strict=True)
        half = min(len(keys) // 2, len(keys) - 2)
        x, *y = (np.log(results[name][half:]) for name in ("values", "seconds", "peak"))
        results["exponents"] = [float(np.polyfit(x, measured, 1)[0]) for measured in y]
        curves[curve] = results
    return curves


def choose_cells(title: str, *, quick: bool) -> dict[tuple[str, int], Cell]:
    """Return the cells of a panel by curve and value; a rehearsal has two values, small and uncompiled."""
    axis, values, curves = PANELS[title]
    if quick:
        values = values[:2]
        curves = {name: c._replace(width=min(c.width, 100)) for name, c in curves.items() if c.way != OURS}
    cells = {(c, v): Cell(**cell._asdict() | {axis: v}) for c, cell in curves.items() for v in values}
    return {key: cell for key, cell in cells.items() if cell.way != OURS or cell.steps <= 5}  # compiles long


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="two values, small and uncompiled")
    parser.add_argument("--rounds", type=harness.count, default=5)
    parser.add_argument("--out", type=Path, help="folder of JSON and picture (default: the repository's)")
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 1)  # of other work
    assemble(["--compile", "off"])  # imports the rest; no autograd before processes are forked
    panels: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        harness.write_images(Path(folder), 125, 4, 28)
        for title in [*PANELS][: 7 if options.quick else None]:
            begin = time.monotonic()
            panels[title] = measure(choose_cells(title, quick=options.quick), options.rounds, Path(folder))
            print(f"  {title}: {time.monotonic() - begin:.0f} s", flush=True)
    machine = harness.collect_conditions() | {"threads": 1, "date": f"{date.today()}", "load": load}
    harness.write_json((options.out or RESULTS) / "growth.json", {"machine": machine, "panels": panels})
    draw(panels, (options.out or ROOT / "docs") / "growth.png")
    print(table := tabulate(panels))
    if not options.out:
        harness.put(ROOT / "docs/scaling.md", "growth", f"{describe(machine)}\n\n{table}\n")


if __name__ == "__main__":
    harness.launch(main)
