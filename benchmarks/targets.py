"""The targets of speed.py: how each that is no plain timing is measured, and the table of those met and not.

A number lies in the results under its work and its name; one that is missing was not measured.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import harness
import torch
from harness import UsageError
from peers import Contender, Work
from tool import time_libraries

HIGHER, JAX = "higher, loop", "JAX, jit and scan"
COMPILED, BUSY, COLD = "percent in compiled code", "times as long alongside two", "seconds of compiling"
PRODUCTS, REDUCED, REDUCED_HIGHER = "times_the_products", "bf16-products", "higher, loop: bf16-products"
ADAPT, GPU = "adapt", "gpu"
AMX, PEERS = "a processor with AMX", "`pip install -e '.[peers]'`"
LOOP = "import os\nparent = {}\nwhile os.getppid() == parent: pass"  # so that it ends with its parent
INITIALISATION = harness.ROOT / "checkpoints" / "pretrained" / "omniglot-5way-1shot-maml"


class Target(NamedTuple):
    """A number of the results that is to be at least, or at most, a limit."""

    work: str
    number: str
    limit: float
    text: str  # with {} for the limit
    needs: str = ""  # what measures it, where that is not always there

    def value(self, results: Mapping[str, Any]) -> float | None:
        result = results.get(self.work, {})
        contender = result.get("contenders", {}).get(self.number, {})
        return contender.get("ours_is_faster_by", result.get(self.number))

    def row(self, results: Mapping[str, Any]) -> list[str]:
        """Return its row in the table."""
        text, value = self.text.format(f"{self.limit:g}"), self.value(results)
        if value is None:
            lacks = self.needs and (self.needs != PEERS or self.work in results)  # not just left out
            return [text, "", f"not measured: needs {self.needs}" if lacks else "not measured"]
        is_met = value >= self.limit if "at least" in text else value <= self.limit
        return [text, f"{value:.3g}", "met" if is_met else "not met"]


ONE, FIVE, FIVE_WAY, TWENTY_WAY = "sinusoid-1", "sinusoid-5", "omniglot-5-way", "omniglot-20-way"
TARGETS = (
    Target(ONE, JAX, 2, "sinusoid, 1 step: at least {} times as fast as JAX", PEERS),
    Target(FIVE, JAX, 2, "sinusoid, 5 steps: at least {} times as fast as JAX", PEERS),
    Target(ONE, HIGHER, 150, "sinusoid, 1 step: at least {} times as fast as `higher`", PEERS),
    Target(FIVE, HIGHER, 100, "sinusoid, 5 steps: at least {} times as fast as `higher`", PEERS),
    Target(FIVE_WAY, HIGHER, 5.5, "Omniglot 5-way: at least {} times as fast as `higher`", PEERS),
    Target(TWENTY_WAY, HIGHER, 2, "Omniglot 20-way: at least {} times as fast as `higher`", PEERS),
    Target(FIVE_WAY, COMPILED, 95, "Omniglot 5-way: at least {} % of an iteration in compiled code"),
    Target(FIVE_WAY, PRODUCTS, 2, "Omniglot 5-way: at most {} times as long as its products alone"),
    Target(TWENTY_WAY, PRODUCTS, 2, "Omniglot 20-way: at most {} times as long as its products alone"),
    Target("evaluation", PRODUCTS, 2, "evaluation: at most {} times as long as its products alone"),
    Target(FIVE_WAY, BUSY, 3, "Omniglot 5-way alongside two busy processes: at most {} times as long"),
    Target(ADAPT, "seconds", 3, "`--adapt` to one task of images, from the shell, warm: at most {} s"),
    Target(ONE, COLD, 8, "compiling without a cache, sinusoid, 1 step: at most {} s"),
    Target(TWENTY_WAY, COLD, 45, "compiling without a cache, Omniglot 20-way: at most {} s"),
    Target(TWENTY_WAY, REDUCED, 0.5, "Omniglot 20-way, bf16-products: at most {} of float32's time", AMX),
    Target(FIVE_WAY, REDUCED_HIGHER, 8, "Omniglot 5-way, bf16-products: at least {} times `higher`", AMX),
    Target(TWENTY_WAY, REDUCED_HIGHER, 3, "Omniglot 20-way, bf16-products: at least {} times `higher`", AMX),
    Target(GPU, "seconds", 60, "Omniglot 5-way to 98 %, `gpu.py`: at most {} s", "a CUDA GPU"),
)


def tabulate(results: Mapping[str, Any], works: Sequence[str] = ()) -> str:
    """Return the table of all targets, or of those of some works."""
    rows = [target.row(results) for target in TARGETS if not works or target.work in works]
    return harness.markdown(["target", "measured", ""], rows)


def describe_record(record: Mapping[str, Any]) -> str:
    """Return what the page says of a record: on what it was measured, and the table."""
    command = "`python benchmarks/speed.py --targets`"
    return f"{command}, {describe(record['machine'])}:\n\n{tabulate(record['results'])}\n"


def describe(machine: Mapping[str, Any]) -> str:
    """Return what was measured on: processor, its instructions, rates of products, versions and date."""
    rates = ", ".join(f"{name} {rate:.3g}" for name, rate in machine["gflop_per_second"].items())
    where = f"{describe_processor(machine)}, torch {machine['torch']}, {machine['date']}"
    return f"{where}; products, GFLOP/s: {rates} (as installed)"


def describe_processor(machine: Mapping[str, Any]) -> str:
    """Return the processor, its cores and its instructions."""
    return f"{machine['machine']} ({', '.join(machine['instructions']) or 'unknown instructions'})"


def measure_others(
    work: Work, make: Callable[..., Contender], contenders: Mapping[str, Any], rounds: int, *, quick: bool
) -> dict[str, Any]:
    """Return the numbers of a work's targets beyond its timing; in a rehearsal, all there are.

    Args:
        make: this tool's compiled contender, with more flags.
        contenders: what was measured of them.
    """
    wanted = {target.number for target in TARGETS if target.work == work.name or quick}
    numbers: dict[str, Any] = {}
    if COMPILED in wanted:
        numbers[COMPILED] = measure_share(make, 3 * work.iterations, rounds)
    if BUSY in wanted:
        numbers |= measure_busy(make(), 3 * work.iterations, rounds)
    if COLD in wanted:
        numbers[COLD] = time_compiling(work.flags)
    if REDUCED_HIGHER in wanted and (quick or "amx_bf16" in harness.instructions()):
        numbers[REDUCED] = measure_reduced(make, work.iterations, rounds)
        if HIGHER in contenders:
            numbers[REDUCED_HIGHER] = contenders[HIGHER]["ours_is_faster_by"] / numbers[REDUCED]
    return numbers


def measure_share(make: Callable[[], Contender], iterations: int, rounds: int) -> float:
    """Return the percentage of an iteration's time that passes inside compiled libraries, the median."""
    with time_libraries() as inside:
        contender, shares = make(), []
        contender.run(2)  # compiles
        for _ in range(rounds):
            inside.clear()
            seconds = iterations * contender.time(iterations)
            shares.append(100 * sum(inside) / seconds)
    return statistics.median(shares)


@contextmanager
def occupy_cores(number: int) -> Iterator[None]:
    """Run processes that never wait alongside a block; they end with it, or else with this process."""
    with ExitStack() as stack:
        for _ in range(number):
            loop = stack.enter_context(subprocess.Popen([sys.executable, "-c", LOOP.format(os.getpid())]))
            stack.callback(loop.kill)
        time.sleep(0.5)  # until they run
        yield


def measure_busy(contender: Contender, iterations: int, rounds: int) -> dict[str, float]:
    """Time an iteration alone and alongside two busy processes."""
    contender.run(2)  # compiles

    def busy() -> float:
        with occupy_cores(2):
            return contender.time(iterations)

    seconds = harness.take_turns({"alone": lambda: contender.time(iterations), "busy": busy}, rounds)
    medians = {f"ms {name}": 1e3 * statistics.median(values) for name, values in seconds.items()}
    return medians | {BUSY: harness.median_ratio(seconds["busy"], seconds["alone"])}


def time_compiling(flags: Sequence[str]) -> float:
    """Return the seconds for which main.py says that it compiled, without any cache; end it then.

    The inner rate is small: at a large one, rounding may move the meta-gradient of untrained weights on noise
    by more than the run allows between compiled and uncompiled, and it stays uncompiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*flags, "--inner-lr", "0.001", "--compile", "on", "--checkpoint-path", folder]
        with harness.start_main(arguments, harness.redirect_caches(Path(folder))) as process:
            assert process.stderr
            try:
                for text in process.stderr:
                    if match := re.search(r"Compiled in ([\d.]+) s", text):
                        return float(match[1])
                    if "stays uncompiled" in text:
                        break
            finally:
                process.terminate()
    raise UsageError(text.strip())


def time_adapt(folder: Path, rounds: int) -> float:
    """Return the seconds of --adapt to a task of five classes, from the shell; the least counts."""
    task = folder / "task"
    harness.write_images(task / "support", 6, 1, 28)
    (task / "support" / "005").rename(task / "query")
    flags = ["--adapt", str(task), "--load", str(INITIALISATION), "--out", str(folder)]
    return min(harness.run_main(flags) for _ in range(rounds))


def measure_reduced(make: Callable[..., Contender], iterations: int, rounds: int) -> float:
    """Return the time of bf16-products over that of float32; the library's setting is the process's."""
    timings = {}
    for precision in ("float32", REDUCED):
        contender = make("--precision", precision)
        setting = torch.get_float32_matmul_precision()

        def timing(contender: Contender = contender, setting: str = setting) -> float:
            torch.set_float32_matmul_precision(setting)
            return contender.time(iterations)

        timing()  # compiles
        timings[precision] = timing
    seconds = harness.take_turns(timings, rounds)
    return harness.median_ratio(seconds[REDUCED], seconds["float32"])
