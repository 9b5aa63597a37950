"""Declare what one call is to do, and where: the flags that are no part of an experiment's settings.

The standard library alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.config import CONFIG_FLAGS
from common.errors import UsageError
from common.options import above_zero, at_least, flag, flags_of, key_and_values
from tasks.options import check_dataset


@dataclass(frozen=True, kw_only=True)
class Call:
    """One invocation of the command line."""

    # fmt: off
    eval: bool = flag("--eval", group="what to do", default=False, common=True,
        help="measure a checkpoint (--load), or the initialisation, on test tasks")
    load: Path | None = flag("--load", group="what to do", metavar="FILE", default=None, common=True,
        help="checkpoint to evaluate, to adapt or to resume; a run's folder stands for its best.pt, or for its "
        "last.pt to resume")
    resume: bool = flag("--resume", group="what to do", default=False, common=True,
        help="resume the run of this --run-name; start it if it has no checkpoint")
    init_from: Path | None = flag("--init-from", group="what to do", metavar="FILE", default=None,
        help="start a new run from the weights of a checkpoint, whatever its algorithm; a run's folder stands for "
        "its best.pt")
    adapt: Path | None = flag("--adapt", group="what to do", metavar="PATH", default=None, common=True,
        help="adapt a checkpoint (--load) to a task of your own, and predict; PATH is a folder with "
        "support/<class>/ and query/ full of images, or a table in which some targets are missing")
    baselines: bool = flag("--baselines", group="what to do", default=False, common=True,
        help="with --eval --load: measure training from scratch on each task as well; for regression also a "
        "pretrained network, and the oracle that is told the task, which are trained first")
    compare: tuple[str, ...] = flag("--compare", group="what to do", metavar="RUN", default=(), common=True,
        help="compare runs: learning curves, and paired differences on the same tasks; RUN is a run's folder, a "
        "checkpoint, or a folder of many runs, whose seeds are taken together")
    split: str = flag("--split", group="evaluation", choices=("validation", "test"), default="validation",
        help="with --compare: the tasks to measure on; choose between runs on validation tasks, and measure "
        "the choice on test tasks")
    seeds: str | None = flag("--seeds", group="what to do", metavar="LIST", default=None, common=True,
        help="train one run per seed, all at once: 0-7 or 0,3,5-9; --eval --load takes their folder")
    sweep: tuple[str, ...] = flag(
        "--sweep", group="what to do", check=key_and_values, metavar="FLAG=A,B,...", default=(), common=True,
        help="train one run per value of a flag; of several flags and --seeds, one per combination")
    runs_at_once: int | None = flag(
        "--runs-at-once", group="machine", check=at_least(1), metavar="N", default=None,
        help="with --seeds and --sweep: runs trained together, which bounds memory (default: all that differ "
        "in numbers alone; compiled runs on images always follow each other)")
    eval_dataset: str | None = flag(
        "--eval-dataset", group="evaluation", check=check_dataset, metavar="NAME", default=None,
        help="with --eval --load, or --compare --split test: take the test tasks from another dataset; all "
        "of its classes count as test classes if it has no split of its own")
    samples: int | None = flag(
        "--samples", group="tasks", check=at_least(2), metavar="M", default=None, only="regression",
        common=True, help="points per task, of which -k are support; the same as -q (M - k)")
    first_order: bool = flag("--first-order", group="algorithm", default=False, common=True,
        help="the same as --meta-gradient first-order")

    checkpoint_path: Path = flag("--checkpoint-path", "--checkpoint_path", group="files", metavar="FOLDER",
        default=Path("checkpoints"), common=True, help="the folder of all runs")
    run_name: str | None = flag("--run-name", group="files", metavar="NAME", default=None, common=True,
        help="name of the run's folder (default: from the settings and the time)")
    out: Path | None = flag("--out", group="files", metavar="FOLDER", default=None,
        help="where --eval, --adapt and --compare write their results (default: next to the checkpoint)")
    data_root: Path = flag("--data-root", group="files", metavar="FOLDER", common=True,
        default=Path(os.environ.get("MAML_DATA_ROOT") or "data"),
        help="folder of the named image sets; also from the environment variable MAML_DATA_ROOT")

    device: str = flag(
        "--device", group="machine", choices=("auto", "cpu", "cuda", "mps"), default="auto", common=True,
        metavar="NAME",
        help="auto, cpu, cuda or mps; auto: CUDA if available, else the CPU")
    threads: int | None = flag(
        "--threads", group="machine", check=at_least(1, 1024), metavar="N", default=None,
        help="CPU threads per process (default: OMP_NUM_THREADS, else one with --learner mlp, else all "
        "cores, shared among the processes of torchrun)")
    deterministic: bool = flag("--deterministic", group="machine", default=False,
        help="refuse operators that may give other bits for the same numbers, and let compilers and "
        "libraries choose by rule, not by measuring: the same command gives the same bits on one machine")
    timeout: float = flag("--timeout", group="machine", check=above_zero, metavar="MINUTES", default=10.0,
        help="how long a process of torchrun waits for the others' gradients before it gives up (for data "
        "and compilation at least two hours)")
    # fmt: on


CALL_FLAGS = flags_of(Call)
ALL_FLAGS = CONFIG_FLAGS | CALL_FLAGS
# flags of a call that --compare takes
WITH_COMPARE = frozenset(
    ("compare", "split", "eval_dataset", "out", "data_root", "device", "threads", "deterministic", "samples")
)


def check_call(given: Mapping[str, Any]) -> Call:
    """Return the call that the flags ask for; raise UsageError where they contradict each other."""
    call = Call(**{name: given[name] for name in given if name in CALL_FLAGS})
    for refused, reason in _contradictions(call, given):
        if refused:
            raise UsageError(reason)
    return call


def _contradictions(call: Call, given: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    yield from _training_rules(call, given)
    yield from _measuring_rules(call, given)
    yield from _file_rules(call, given)


def _training_rules(call: Call, given: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield what starting and resuming runs cannot be combined with."""
    many = call.seeds or call.sweep
    yield call.load and call.init_from, "--load resumes a run, --init-from starts one: give one of them"
    yield call.load and call.resume, "--load and --resume both resume a run: give one of them"
    yield call.init_from and "init" in given, "--init-from gives the initial weights: leave out --init"
    yield call.resume and not call.run_name, "--resume needs the --run-name of the run to resume"
    yield (
        many and (call.eval or call.adapt or call.load),
        "--seeds and --sweep start runs, or resume them with --resume: leave out --eval, --adapt and --load",
    )
    yield call.seeds and "seed" in given, "--seed and --seeds: give one of them"
    yield call.runs_at_once and not many, "--runs-at-once is for many runs: give --seeds or --sweep"


def _measuring_rules(call: Call, given: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield what --eval, --adapt and --compare cannot be combined with."""
    not_with_compare = [ALL_FLAGS[name].name for name in given if name not in {*CONFIG_FLAGS, *WITH_COMPARE}]
    yield (
        call.compare and not_with_compare,
        f"--compare measures runs that have been trained: leave out {' and '.join(not_with_compare)}",
    )
    yield "split" in given and not call.compare, "--split is for --compare: --eval measures on test tasks"
    yield call.eval and call.resume, "--resume continues training: leave out --eval"
    yield call.eval and call.init_from, "--init-from starts a run: use --load with --eval"
    yield (
        (call.eval or call.adapt or call.compare) and given.keys() & {"compile", "engine", "convolution"},
        "--compile, --engine and --conv are for training: leave them out with --eval, --adapt and --compare",
    )
    yield call.adapt and not call.load, "--adapt uses a trained checkpoint: name it with --load"
    yield call.adapt and call.eval, "--adapt and --eval are two commands: give one of them"
    yield (
        call.adapt and given.keys() & {"ways", "shots", "queries", "eval_tasks", "eval_steps", "samples"},
        "-n, -k, -q, --samples, --eval-tasks and --eval-steps have no meaning with --adapt: the files say "
        "what there is; --test-steps is the number of inner steps",
    )
    yield (
        call.eval_dataset and not ((call.eval and call.load) or (call.compare and call.split == "test")),
        "--eval-dataset tests a checkpoint: give --eval and --load, or --compare and --split test",
    )
    yield (
        call.eval_dataset and "dataset" in given,
        "--dataset and --eval-dataset: give the latter alone, the checkpoint says what it learned from",
    )
    yield (
        call.eval_dataset and call.baselines,
        "--baselines trains on the data of the checkpoint: leave out --eval-dataset",
    )
    yield (
        call.baselines and not (call.eval and call.load),
        "--baselines accompanies the evaluation of a checkpoint: give --eval and --load",
    )


def _file_rules(call: Call, given: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """Yield what names of folders and files cannot be combined with."""
    yield (
        call.out and not (call.eval or call.adapt or call.compare),
        "--out is where --eval, --adapt and --compare write: it has no meaning without them",
    )
    yield (
        call.load and call.run_name,
        "--run-name names a new run; --load takes the folder of the checkpoint",
    )
    yield (
        call.load and (call.eval or call.adapt) and "checkpoint_path" in given,
        "--checkpoint-path has no meaning here: results go next to the file of --load, or to --out",
    )
    name = call.run_name
    is_name = name is None or (name.strip(". ") and not set(name) & set("/\\") and len(name) <= 100)
    yield not is_name, f"--run-name {name!r:.100} is no name for a folder"
