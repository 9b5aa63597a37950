"""Measure speed and memory on a CUDA GPU, after a comparison of each meta-gradient with the CPU's in float64.

    pip install -e '.[dev,peers]'                     # without higher, its rows are left out
    python benchmarks/gpu.py                          # under ten minutes; fetches Omniglot into data/
    python benchmarks/gpu.py --device cpu --quick     # a rehearsal in a minute or two, uncompiled

The tests marked `cuda` come first, what needs compiling last. What fails, or finds too little time, is left
out with the reason. Images are noise, except for the time to 98 %.
"""

from __future__ import annotations

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness
import torch
from peers import Contender, higher_loop
from speed import make_work
from speedrun import FILE, REQUIRED, time_run
from tool import TRIES, Assembly, CudaGraph, assemble

EXACT = "--device cpu --precision float64 --compile off --engine unrolled --tasks-at-once 1"
# From here on the error of a meta-gradient, in norm, is more than rounding. (A ReLU at its kink may fall on
# either side in float32: one meta-batch of `TRIES` must agree.) Reduced precision is refused only where it is
# no better than no gradient at all.
BOUNDS = {"float64": 1e-8, "float32": 1e-2, "tf32": 0.5, "bf16": 1.0}
IMAGES = ("float32", "tf32", "bf16")
WORKS = {"sinusoid-1": ("float32",), "omniglot-5-way": IMAGES, "omniglot-20-way": IMAGES}
TESTS = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "cuda"]
Row = dict[str, Any]
Gradient = dict[str, torch.Tensor]


class Session:
    """The results so far, written after each, and the time that is left."""

    def __init__(self, options: Any, folder: Path) -> None:
        self.device, self.quick, self.data_root = options.device, options.quick, options.data_root
        self.folder, self.noise, self.file = folder, folder / "noise", options.out / "gpu.json"
        self.end, self.failed = time.monotonic() + 550, False  # under ten minutes in all
        self.results: dict[str, list[Row]] = defaultdict(list)  # by name of the table

    def attempt(self, table: str, name: str, seconds: float, measure: Callable[..., Any]) -> None:
        """Add rows to a table or, where that fails or may take longer than is left, say why they miss."""
        try:
            if time.monotonic() + seconds > self.end:
                raise harness.UsageError(f"it may take {seconds:.0f} s, and less is left")
            for row in measure(self):
                self._add(table, {"name": name, **row})
        except Exception as error:  # a measurement may fail in any way
            self.failed |= isinstance(error, ArithmeticError)
            self._add("left out", {"name": f"{table}, {name}", "reason": " ".join(str(error).split())})

    def _add(self, table: str, row: Row) -> None:
        self.results[table].append(row)
        print(f"  {table}: {row}", flush=True)
        harness.write_json(self.file, {"machine": harness.collect_conditions(), **self.results})


def gradient_of(run: Assembly, iteration: int) -> Gradient:
    """Return the meta-gradient of an iteration from the run's state: Adam's first moment is a tenth of it."""
    trainer, start = run.trainer, run.trainer.state
    trainer.state, trainer.iteration = start._replace(iteration=start.iteration + iteration), iteration
    run.advance(1)
    gradient = trainer.plain_step.layout.unflatten(10 * trainer.state.exp_avg.double().cpu())
    trainer.state, trainer.iteration = start, 0
    return gradient


@cache
def exact_gradient(iteration: int, *flags: str) -> Gradient:
    """Return an iteration's meta-gradient on the CPU: float64, unrolled, one task after another."""
    return gradient_of(assemble([*flags, *EXACT.split()]), iteration)


def check(gradient: Callable[[int], Gradient], exact: Callable[[int], Gradient], precision: str) -> float:
    """Return the relative error, in norm, of the meta-gradient of the first iteration within the bound.

    Raises ArithmeticError if none of the first `TRIES` is.
    """
    errors = []
    for iteration in range(TRIES):
        ours, right = gradient(iteration), exact(iteration)
        difference = torch.stack([(ours[name] - right[name]).norm() for name in right]).norm()
        errors.append(float(difference / torch.stack([g.norm() for g in right.values()]).norm()))
        if errors[-1] < BOUNDS[precision]:
            return errors[-1]
    words = f"is {min(errors):.1e} off the CPU's in float64, in each of {TRIES} meta-batches"
    raise ArithmeticError(f"its meta-gradient in {precision} {words}")


def run_tests(session: Session) -> Iterator[Row]:
    """Yield the last line of the tests marked `cuda`, and their exit code; print what fails."""
    done = subprocess.run(TESTS, cwd=harness.ROOT, capture_output=True, text=True, timeout=200)
    session.failed |= done.returncode != 0
    print(done.stdout * session.failed, end="", flush=True)
    yield {"result": done.stdout.strip().rpartition("\n")[2], "exit code": done.returncode}


def measure_time(session: Session, advance: Callable[[int], None]) -> float:
    """Return milliseconds an iteration, the median of some rounds."""
    rounds, seconds = (2, 0.1) if session.quick else (5, 0.5)
    timing = Contender(advance, lambda batch: {}).time
    count = max(1, int(seconds / min(timing(2), timing(2))))  # the first warms up
    return 1e3 * statistics.median(timing(count) for _ in range(rounds))


def measure_tool(name: str, precision: str, compiled: str, session: Session) -> Iterator[Row]:
    """Yield this tool's time, with kernels launched one by one and, on a GPU, as a CUDA graph."""
    flags = make_work(name, session.noise).flags
    run = assemble([*flags, "--device", session.device, "--precision", precision, "--compile", compiled])
    trainer, start = run.trainer, run.trainer.state
    for graph in (False, True) if session.device == "cuda" else (False,):
        trainer.meta_step = CudaGraph(trainer.plain_step, start) if graph else trainer.plain_step
        trainer.state, trainer.iteration = start, 0
        error = check(partial(gradient_of, run), lambda number: exact_gradient(number, *flags), precision)
        way = f"compile {compiled}{', CUDA graph' * graph}"
        yield {"precision": precision, "way": way, "ms": measure_time(session, run.advance), "error": error}


def measure_higher(name: str, session: Session) -> Iterator[Row]:
    """Yield the time of a loop over tasks with `higher`, in float32."""
    work = make_work(name, session.noise)
    work.learner.to(session.device)
    peer = higher_loop(work)

    def gradient(iteration: int) -> Gradient:
        return {key: torch.from_numpy(g) for key, g in peer.gradient(work.batch(1 + iteration)).items()}

    error = check(gradient, lambda number: exact_gradient(number, *work.flags), "float32")
    yield {"precision": "float32", "way": "higher", "ms": measure_time(session, peer.run), "error": error}


def measure_memory(engine: str, steps: int, session: Session) -> Iterator[Row]:
    """Yield the peak of an iteration of 20-way with four tasks, less what it begins with."""
    flags = [*make_work("omniglot-20-way", session.noise).flags, "-s", str(steps), "--meta-batch-size", "4"]
    run = assemble([*flags, "--device", session.device, "--compile", "off", "--engine", engine])
    error = check(partial(gradient_of, run), lambda number: exact_gradient(number, *flags), "float32")
    if session.device != "cuda":
        raise harness.UsageError("measured on CUDA alone; benchmarks/growth.py is for the CPU")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run.advance(1)
    yield {"MB": (torch.cuda.max_memory_allocated() - before) / 1e6, "error": error}


def measure_to_98(seed: int, session: Session) -> Iterator[Row]:
    """Yield the seconds of the speedrun's record command on this device, and its accuracy on test tasks."""
    entries = harness.read_json(FILE)["entries"]
    record = min((e for e in entries if e["valid"]), key=lambda entry: entry["mean_seconds"])
    flags = [*shlex.split(record["command"].partition("omniglot")[2]), "--device", session.device]
    place, tasks = ["--dataset", "omniglot", "--data-root", str(session.data_root)], "600"
    if session.quick:
        place, tasks = ["--dataset", f"images:{session.noise}"], "10"
        flags += ["-n", "5", "--image-size", "28", "--channels", "1", "--iterations", "3", "--val-tasks", "5"]
    elif seed == 0:  # fetched before the clock runs
        time_run([*place, "--compile", "off", "--iterations", "1", "--val-tasks", "1"], 9, session.folder)
    seconds = time_run([*place, *flags], seed, session.folder)
    test = ["-n", "5", "-k", "1", "-q", "1", "--eval-tasks", tasks, *place]
    rows = harness.rows_after_test_steps(harness.evaluate(session.folder / f"seed{seed}", test))
    accuracy = rows["transductive"]["accuracy"]
    yield {"seconds": seconds, "accuracy": accuracy, "in 60 s": seconds < 60 and accuracy >= REQUIRED}


def measure_all(session: Session) -> None:
    """Measure what matters most first; float64 shows best that the device computes the same."""
    works = list(WORKS.items())[: 2 if session.quick else None]
    session.attempt("tests", "-m cuda", 200, run_tests)
    for name, precisions in works:
        session.attempt("iterations", name, 30, partial(measure_higher, name))
        for precision in ("float64", *precisions):
            session.attempt("iterations", name, 30, partial(measure_tool, name, precision, "off"))
    for seed in range(1 if session.quick else 3):
        session.attempt("to 98 %", f"seed {seed}", 75, partial(measure_to_98, seed))
    for engine in ("unrolled", "adjoint"):
        for steps in (1,) if session.quick else (1, 2, 5, 10):
            session.attempt("memory", f"{engine}, {steps} steps", 20, partial(measure_memory, engine, steps))
    for name, precisions in () if session.quick else works:
        for precision in precisions:
            session.attempt("iterations", name, 120, partial(measure_tool, name, precision, "on"))


def main() -> int:
    parser = harness.Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="rehearse: less of all, uncompiled")
    parser.add_argument("--data-root", type=Path, default=harness.ROOT / "data", help="folder of Omniglot")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the commands started here, too
    elif not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA GPU here; --device cpu --quick is a rehearsal")
    with tempfile.TemporaryDirectory() as folder:
        measure_all(session := Session(options, Path(folder)))
    for name, rows in session.results.items():
        cells = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row.values()] for row in rows]
        print(f"\n{name}:\n\n{harness.markdown([*rows[0]], cells)}")
    print(f"\nWritten: {session.file}")
    return int(session.failed)


if __name__ == "__main__":
    harness.launch(main)
