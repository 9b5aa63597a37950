"""Speed of this tool and of other ways to the same meta-gradient.

    pip install -e '.[peers]'                             # a missing peer is left out
    python benchmarks/speed.py                            # every table; some 25 minutes on two cores, cold
    python benchmarks/speed.py sinusoid-1 omniglot-5-way
    python benchmarks/speed.py evaluation                 # 100 tasks of 5-way Omniglot, 15 queries, 10 steps
    python benchmarks/speed.py --precision                # float32 and bf16: speed, and error against float64

The timings of each processor are a file in results/speed/; the table on the page is made of all of them.
All contenders have the same network, tasks and optimizer. First their meta-gradients are compared; then they
are timed in turn, round after round, and ratios are taken within a round.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import RESULTS, Parser, UsageError
from peers import PEERS, Contender, Work, as_numpy
from tables import slug
from targets import (
    ADAPT,
    ONE,
    describe,
    describe_processor,
    describe_record,
    measure_others,
    tabulate,
    time_adapt,
)
from tool import MAML, Compiler, Evaluation, TaskBatch, assemble, evaluate, make_learner, make_maml
from torch.utils.flop_counter import FlopCounterMode

OURS, EAGER = "this tool", "this tool, uncompiled"
EVALUATION, TESTED = "evaluation", 100  # a work of its own, and its tasks
CHECKED = 5  # examples of a task with which meta-gradients are compared
IMAGES = (  # as in the peers, batch norm's shift is adapted
    "--dataset images:FOLDER --image-size 28 --channels 1 --quarter-turns --learner conv --init torch "
    "--adapt-norm"
)
SINUSOID = "--init torch --inner-lr 0.01 -k 10 -q 15 --meta-batch-size 25"


# flags, and iterations of one timing
WORKS = {
    "sinusoid-1": (f"{SINUSOID} -s 1", 300),
    "sinusoid-5": (f"{SINUSOID} -s 5", 100),
    "omniglot-5-way": (f"{IMAGES} -n 5 -k 1 -q 1 -s 1 --meta-batch-size 32 --inner-lr 0.4", 3),
    "omniglot-20-way": (f"{IMAGES} -n 20 -k 1 -q 1 -s 5 --meta-batch-size 16 --inner-lr 0.1", 1),
}
NAMES = (*WORKS, EVALUATION)


def make_work(name: str, folder: Path) -> Work:
    """Return a work; its images are noise, since their content does not change the work."""
    text, iterations = WORKS[name]
    if "FOLDER" in text and not folder.exists():
        harness.write_images(folder, 125, 20, 28)
    flags = [*text.replace("FOLDER", str(folder)).split(), "--iterations", "60000"]
    run = assemble([*flags, "--compile", "off"])
    ways = run.distribution.ways if run.distribution.classification else None
    learner = make_learner("conv", int(ways), (1, 28, 28)) if ways else make_learner("mlp", 1, (1,))
    learner.load_state_dict(run.parameters, strict=False)  # all but fixed scales and running statistics
    value = dict(pairwise(flags))
    rate = float(value["--inner-lr"])
    tasks, steps = int(value["--meta-batch-size"]), int(value["-s"])
    return Work(name, flags, learner, run.distribution, tasks, steps, rate, iterations)


def make_ours(work: Work, *flags: str) -> Contender:
    """Return this tool's own step under its own rules, with more flags."""
    run = assemble([*work.flags, *flags])

    def gradient(batch: TaskBatch) -> dict[str, np.ndarray]:
        return as_numpy(run.maml.meta_gradient(run.parameters, batch).gradients)

    return Contender(run.advance, gradient)


# ---- against the peers ---------------------------------------------------------------------------


def make_contenders(work: Work) -> dict[str, Contender]:
    contenders = {OURS: make_ours(work, "--compile", "on"), EAGER: make_ours(work, "--compile", "off")}
    for name, make in PEERS.items():
        try:
            contenders[name] = make(work)
        except ImportError as error:
            print(f"  {name}: left out ({error})", flush=True)
    return contenders


def compare_gradients(work: Work, contenders: Mapping[str, Contender]) -> dict[str, float]:
    """Return each largest difference from our meta-gradient over its largest element; raise above 1e-4.

    The smallest of eight batches of three tasks with few examples counts: in single precision a ReLU at its
    kink may fall on either side, which moves a second-order gradient. A wrong one would differ in all.
    """
    differences = dict.fromkeys(contenders, math.inf)
    for iteration in range(8):
        sample = work.distribution.sample("train", 1, iteration, range(3))
        batch = TaskBatch(*(part[:, :CHECKED] for part in sample))
        expected = contenders[OURS].gradient(batch)
        scale = max(np.abs(g).max() for g in expected.values())
        for name, contender in contenders.items():
            gradient = contender.gradient(batch)
            difference = max(np.abs(gradient[k] - expected[k]).max() for k in expected) / scale
            differences[name] = min(differences[name], difference)
    for name, difference in differences.items():
        if not difference < 1e-4:
            raise UsageError(f"{name} computes another meta-gradient: {difference:.1e} off")
    return differences


def compare(work: Work, rounds: int) -> dict[str, Any]:
    """Time all contenders of a work; return what is recorded."""
    print(f"\n{work.name}: {work.tasks} tasks, {work.steps} inner steps", flush=True)
    begin = time.monotonic()
    contenders = make_contenders(work)
    differences = compare_gradients(work, contenders)
    timings = {name: partial(c.time, 1 if c.slow else work.iterations) for name, c in contenders.items()}
    for timing in [*timings.values()] * 2:  # compile, warm up
        timing()
    print(f"  ready after {time.monotonic() - begin:.0f} s; timing", flush=True)
    seconds = harness.take_turns(timings, rounds)
    facts = {"machine": harness.collect_conditions(), "tasks": work.tasks, "inner_steps": work.steps}
    if work.distribution.classification:
        facts |= arithmetic(work, min(seconds[OURS]))
    return facts | {"rounds": rounds, "contenders": list_contenders(seconds, differences)}


def list_contenders(
    seconds: Mapping[str, list[float]], differences: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Return what is recorded of each contender: its times, and by how much its results differ from ours."""
    rows = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        rows[name] = {
            "median_ms": 1e3 * middle,
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "ours_is_faster_by": harness.median_ratio(values, seconds[OURS]),
            "difference": differences[name],
        }
    return rows


def arithmetic(work: Work, seconds: float) -> dict[str, float]:
    """Return the operations of an iteration's products, and how many times as long as they alone it takes."""
    run = assemble([*work.flags, "--conv", "im2col", "--compile", "off"])
    with FlopCounterMode(display=False) as counter:
        run.advance(1)
    gflop, rate = counter.get_total_flops() / 1e9, harness.matmul_rates()["float32"]
    return {"gflop": gflop, "gflop_per_second": rate, "times_the_products": seconds * rate / gflop}


# ---- evaluation ----------------------------------------------------------------------------------


def measure_evaluation(folder: Path, rounds: int) -> dict[str, Any]:
    """Time 100 tasks of 5-way 1-shot Omniglot, 15 queries, steps 0 to 10, both readings of batch norm."""
    work = make_work("omniglot-5-way", folder)
    run = assemble([*work.flags, "-q", "15", "--conv", "grouped", "--compile", "off"])
    compiler = Compiler(torch.device("cpu"))
    compiler.active = True
    fast = run.maml.with_options(convolution="im2col", accelerate=compiler.or_plain, tasks_at_once=None)
    slow = run.maml.with_options(tasks_at_once=None)

    def test(maml: MAML, tasks: int = TESTED) -> Evaluation:
        norms = ("transductive", "inductive")
        options = {"tasks": tasks, "steps": 10, "normalisations": norms}
        return evaluate(maml, run.parameters, run.distribution, "test", **options)

    def time_test(maml: MAML) -> float:
        begin = time.perf_counter()
        test(maml)
        return time.perf_counter() - begin

    losses = [test(maml).losses["inductive"] for maml in (fast, slow)]  # compiles
    difference = float((losses[0] - losses[1]).abs().max())
    timings = {OURS: partial(time_test, fast), EAGER: partial(time_test, slow)}
    seconds = harness.take_turns(timings, min(rounds, 3))
    with FlopCounterMode(display=False) as counter:
        test(run.maml.with_options(convolution="im2col", tasks_at_once=None))
    gflop, rate = counter.get_total_flops() / 1e9, harness.matmul_rates()["float32"]
    facts = {"gflop": gflop, "gflop_per_second": rate}
    facts |= {"times_the_products": min(seconds[OURS]) * rate / gflop, "tasks": TESTED, "inner_steps": 10}
    rows = list_contenders(seconds, {OURS: 0.0, EAGER: difference})
    return {"machine": harness.collect_conditions()} | facts | {"contenders": rows}


# ---- tables --------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """Return the timings of one work, for the terminal."""
    rows = []
    for name, row in result["contenders"].items():
        low, high = row["quartiles_ms"]
        times = f"{row['median_ms']:.4g} ({low:.4g} to {high:.4g})"
        rows.append([name, times, f"{row['ours_is_faster_by']:.3g}", f"{row['difference']:.0e}"])
    head = ["", "ms: median (quartiles)", "this tool is faster by", "gradient (loss) differs by"]
    return harness.markdown(head, rows)


def page_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the timings of all works and machines in milliseconds, ratios in brackets, for the page."""

    def ms(row: Mapping[str, Any]) -> str:
        return f"{row['median_ms']:,.0f}" if row["median_ms"] >= 100 else f"{row['median_ms']:.3g}"

    rows = []
    for name, record in product(NAMES, records):
        if not (result := record["results"].get(name)):
            continue
        timed, steps = result["contenders"], result["inner_steps"]
        rest = [timed.get(other) for other in (EAGER, *PEERS)]
        others = [f"{ms(row)} ({row['ours_is_faster_by']:.3g})" if row else "" for row in rest]
        about = f"{name}: {result['tasks']} tasks, {steps} step{'s' * (steps > 1)}"
        rows.append([about, describe_processor(record["machine"]), f"**{ms(timed[OURS])}**", *others])
    return harness.markdown(["", "processor", OURS, "uncompiled", *PEERS], rows) + "\n"


def page_texts(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the tables of the page by their marks; targets are of processors on which all were measured."""
    measured = [describe_record(record) for record in records if ADAPT in record["results"]]
    return {"speed": page_table(records), "targets": "\n".join(measured)}


def read_records() -> list[dict[str, Any]]:
    """Return the timings of all processors."""
    return [harness.read_json(file) for file in sorted((RESULTS / "speed").glob("*.json"))]


# ---- precision -----------------------------------------------------------------------------------


def measure_precision(rounds: int, folder: Path) -> dict[str, Any]:
    """Time 5-way 1-shot Omniglot, and measure the meta-gradient's distance from that in float64."""
    work = make_work("omniglot-5-way", folder)
    batch = work.batch(1)
    wide = TaskBatch(*(part.double() if part.is_floating_point() else part for part in batch))
    maml = make_maml(work.learner.double(), steps=1, inner_lr=work.inner_lr, adapt_norm=True)
    exact = as_numpy(maml.meta_gradient(maml.initial_parameters(), wide).gradients)
    norm = math.sqrt(sum(float((g**2).sum()) for g in exact.values()))
    contenders, results = {}, {}
    for compiled, precision in product(("on", "off"), ("float32", "bf16")):
        contender = make_ours(work, "--precision", precision, "--compile", compiled)
        contender.run(1)
        contenders[precision + ", uncompiled" * (compiled == "off")] = contender
    timings = {name: partial(contender.time, 1) for name, contender in contenders.items()}
    for name, values in harness.take_turns(timings, rounds).items():
        gradient = contenders[name].gradient(batch)
        error = math.sqrt(sum(float(((gradient[k] - exact[k]) ** 2).sum()) for k in exact)) / norm
        results[name] = {"median_ms": 1e3 * statistics.median(values), "relative_error": error}
        print(f"  {name}: {results[name]['median_ms']:.1f} ms, error {error:.1e}", flush=True)
    return results


# ---- the command line ----------------------------------------------------------------------------


def measure(name: str, folder: Path, options: Any) -> dict[str, Any]:
    """Measure a work by its name, with --targets all that has a target; print what is no target's."""
    if name == ADAPT:
        return {"seconds": time_adapt(folder.parent, options.rounds)}
    if name == EVALUATION:
        result = measure_evaluation(folder, options.rounds)
        print(f"\n{name}\n{table(result)}", flush=True)
        return result
    work = make_work(name, folder)
    result = compare(work, options.rounds)
    print(table(result), flush=True)
    if options.targets:
        make = partial(make_ours, work, "--compile", "on")
        result |= measure_others(work, make, result["contenders"], options.rounds, quick=options.quick)
    return result


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"{', '.join(NAMES)} (default: all)")
    parser.add_argument("--precision", action="store_true", help="measure speed and error of precisions")
    parser.add_argument("--targets", action="store_true", help="measure all that has a target")
    parser.add_argument("--quick", action="store_true", help="rehearse --targets: one step on sinusoids")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder of the JSON (default: the repository's)")
    options = parser.parse_args()
    choices = (*NAMES, *[ADAPT] * options.targets)
    unknown = [name for name in options.works if name not in choices]
    if unknown:
        parser.error(f"no work {unknown[0]}; choose from {', '.join(choices)}")
    if options.precision and (options.works or options.targets):
        parser.error("--precision has a work of its own: leave out the names, and --targets")
    if options.quick and not (options.targets and options.out):
        parser.error("--quick rehearses --targets, and needs --out")
    if options.rounds < 2:
        parser.error("--rounds: at least 2")
    abilities = {"instructions": harness.instructions(), "gflop_per_second": harness.matmul_rates()}
    machine = harness.collect_conditions() | abilities | {"date": f"{date.today()}"}
    print(describe(machine), flush=True)
    name = "precision" if options.precision else slug(describe_processor(machine)).strip("-")
    file = (options.out or (RESULTS if options.precision else RESULTS / "speed")) / f"{name}.json"
    record: dict[str, Any] = {"machine": machine, "results": {}}
    if file.exists() and (before := harness.read_json(file))["machine"]["torch"] == machine["torch"]:
        record = before if options.works else record | {"results": before["results"]}  # others stay
    elif file.exists() and options.works:
        parser.error(f"{file} is of another PyTorch: measure all of it, without names")
    names = options.works or choices
    names = () if options.precision else (ONE, ADAPT) if options.quick else names
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "noise"
        if options.precision:
            record["results"] = measure_precision(options.rounds, folder)
            harness.write_json(file, record)
        for name in names:
            record["results"].setdefault(name, {}).update(measure(name, folder, options))
            print(f"\n{tabulate(record['results'], [name])}", flush=True)
            harness.write_json(file, record)
    if options.targets:
        print(f"\n{describe_record(record)}", end="")
    if not options.out and not options.precision:
        for mark, text in page_texts(read_records()).items():
            harness.put(harness.ROOT / "docs" / "speed.md", mark, text)
    print(f"\nWritten: {file}")


if __name__ == "__main__":
    harness.launch(main)
