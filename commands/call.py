"""Declare what one call is to do, and where: the flags that are no part of an experiment's settings.

The standard library alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from commands.config import CONFIG_FLAGS
from common.errors import UsageError
from common.options import (
    above_zero,
    at_least,
    expect,
    find_nearest,
    flag,
    flags_of,
    folder_name,
    key_and_values,
)
from tasks.options import DATASETS, check_dataset

WEIGHTS = (".pt", ".pth", ".pt2", ".safetensors")
network_file = expect(f"a file whose name ends in {', '.join(WEIGHTS)}", lambda file: file.suffix in WEIGHTS)
# of --list
COLUMNS = ("name", "dataset", "tasks", "algorithm", "seed", "iterations", "validation", "test", "when")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One invocation of the command line."""

    # fmt: off
    eval: bool = flag("--eval", group="what to do", default=False, common=True,
        help="measure a checkpoint (--load), or the initialisation, on test tasks")
    load: Path | None = flag("--load", group="what to do", metavar="FILE", default=None, common=True,
        help="checkpoint to evaluate, to adapt or to resume; a run's folder means its best.pt or last.pt")
    resume: bool = flag("--resume", group="what to do", default=False, common=True,
        help="resume the run of this --run-name; start it if it has no checkpoint")
    init_from: Path | None = flag("--init-from", group="learner", metavar="FILE", default=None,
        help="start a new run from the weights of a checkpoint, whatever its algorithm")
    adapt: Path | None = flag("--adapt", group="what to do", metavar="PATH", default=None, common=True,
        help="adapt a checkpoint (--load) to a task of your own, and predict; PATH: a folder with "
        "support/<class>/ and query/ full of images, or a table in which some targets are missing")
    baselines: bool = flag("--baselines", group="what to do", default=False, common=True,
        help="with --eval --load: measure training from scratch on each task as well; for regression also a "
        "pretrained network, and the oracle that is told the task (of a folder of runs: means over seeds)")
    config: Path | None = flag("--config", group="what to do", metavar="FILE", default=None, common=True,
        help="take settings from a TOML file, such as a run's settings.toml; flags win over it")
    print_config: bool = flag("--print-config", group="what to do", default=False,
        help="print the settings of a new run as such a file, and end")
    compare: tuple[str, ...] = flag("--compare", group="what to do", metavar="RUN", default=(), common=True,
        help="compare runs: learning curves, and paired differences on the same tasks; RUN: a run's folder, "
        "a checkpoint, or a folder of many runs, whose seeds are taken together")
    list_runs: Path | None = flag("--list", group="what to do", metavar="[FOLDER]", default=None, common=True,
        bare=Path("checkpoints"),
        help="list the runs below a folder (default: checkpoints), with their validation and test results")
    sort: str = flag("--sort", group="what to do", choices=COLUMNS, default="name", metavar="COLUMN",
        help=f"with --list: {', '.join(COLUMNS)}; the best, the longest or the newest first")
    csv: Path | None = flag("--csv", group="what to do", metavar="FILE", default=None,
        help="with --list: write the list to a CSV file too")
    split: str = flag("--split", group="evaluation", choices=("validation", "test"), default="validation",
        help="with --compare: the tasks to measure on; choose between runs on validation tasks")
    seeds: str | None = flag("--seeds", group="what to do", metavar="LIST", default=None, common=True,
        help="train one run per seed, all at once: 0-7 or 0,3,5-9; --eval --load takes their folder")
    sweep: tuple[str, ...] = flag(
        "--sweep", group="what to do", check=key_and_values, metavar="FLAG=A,B,...", default=(), common=True,
        help="train one run per value of a flag; of several flags and --seeds, one per combination")
    runs_at_once: int | None = flag(
        "--runs-at-once", group="what to do", check=at_least(1), metavar="N", default=None,
        help="with --seeds and --sweep: runs trained together, which bounds memory (default: all that differ "
        "in numbers alone; one if compiled, but for built-in curves)")
    eval_dataset: str | None = flag(
        "--eval-dataset", group="evaluation", check=check_dataset, metavar="NAME", default=None,
        suggestions=tuple(DATASETS),
        help="with --eval --load, or --compare --split test: take the test tasks from another dataset; all "
        "of its classes if it has no split of its own")
    samples: int | None = flag(
        "--samples", group="tasks", check=at_least(2, 100_000), metavar="M", default=None, only="regression",
        common=True, help="points per task, of which -k are support and -q (default: all others) are query")
    first_order: bool = flag("--first-order", group="algorithm", default=False, common=True,
        help="the same as --meta-gradient first-order")

    checkpoint_path: Path = flag("--checkpoint-path", "--checkpoint_path", group="files", metavar="FOLDER",
        default=Path("checkpoints"), common=True, help="the folder of all runs")
    run_name: str | None = flag(
        "--run-name", group="files", check=folder_name, metavar="NAME", default=None, common=True,
        help="name of the run's folder (default: from the settings and the time)")
    out: Path | None = flag("--out", group="files", metavar="FOLDER", default=None,
        help="where --eval, --adapt and --compare write their results (default: next to the checkpoint)")
    save_weights: Path | None = flag(
        "--save-weights", group="files", check=network_file, metavar="FILE", default=None,
        help="with --load: write the meta-trained initialisation and end, with --adapt the adapted network; "
        "FILE.pt, FILE.safetensors: a state_dict for its own class; FILE.pt2: torch.export's program of an "
        "adapted one, which needs no class (default with --adapt: ...-weights.pt, by the results)")
    data_root: Path = flag("--data-root", group="files", metavar="FOLDER", common=True,
        default=Path(os.environ.get("MAML_DATA_ROOT") or "data"),
        help="folder of the named image sets; also from the environment variable MAML_DATA_ROOT")

    device: str = flag("--device", group="machine", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        common=True, metavar="NAME", help="auto, cpu, cuda or mps; auto: CUDA if available, else the CPU")
    threads: int | None = flag(
        "--threads", group="machine", check=at_least(1, 1024), metavar="N", default=None,
        help="CPU threads per process (default: OMP_NUM_THREADS, else 1 with --learner mlp, else all cores)")
    deterministic: bool = flag("--deterministic", group="machine", default=False,
        help="the same command gives the same bits on one machine; operators that may not are refused, and "
        "libraries choose by rule instead of by measuring")
    check_gradients: bool | None = flag("--check-gradients", group="machine", default=None,
        help="before training, compare the meta-gradient with central differences on small tasks (default: "
        "for a learner or a loss that is not built in)")
    timeout: float = flag("--timeout", group="machine", check=above_zero, metavar="MINUTES", default=10.0,
        help="how long a process of torchrun waits for the others' gradients before it gives up")
    # fmt: on

    @property
    def run_folder(self) -> Path | None:
        return self.checkpoint_path / self.run_name if self.run_name else None


CALL_FLAGS = flags_of(Call)
ALL_FLAGS = CONFIG_FLAGS | CALL_FLAGS
# by --no-NAME
CAN_BE_SWITCHED_OFF = {"invert", "adapt_norm", "norm_per_step", "vectorise", "check_gradients", "standardise"}
BY_FLAG = {form.lstrip("-"): name for name, declared in ALL_FLAGS.items() for form in declared.names}
OTHER_NAMES = {  # flags as other libraries call them
    "--lr": "--meta-lr",
    "--outer-lr": "--meta-lr",
    "--epochs": "--iterations",
    "--inner-steps": "-s",
}

# Each flag of the first list contradicts each of the second.
CLASHES = (
    ("load", "init_from", "one resumes a run, the other starts one"),
    ("load", "resume", "both resume a run"),
    ("load", "run_name checkpoint_path", "files go to the checkpoint's folder, or to --out"),
    ("init_from", "init", "the checkpoint has the initial weights"),
    ("seeds sweep", "eval adapt load", "the former start runs, or resume them with --resume"),
    ("seeds", "seed", "the former names every seed"),
    ("eval adapt", "resume init_from", "name the checkpoint with --load"),
    ("eval", "adapt", "they are two commands"),
    ("print_config", "eval adapt compare load resume seeds sweep", "the former is for a single new run"),
    ("adapt compare", "report_to", "results go to files"),
    ("adapt", "metric metric_mode val_tasks", "there are no targets to measure by"),
    (
        "compare",
        "eval adapt load resume init_from seeds sweep run_name checkpoint_path timeout",
        "the former measures runs that have been trained",
    ),
    ("eval adapt compare", "engine convolution", "the latter is for training"),
    ("adapt", "compile", "one task takes less time than compiling"),
    ("adapt", "ways shots queries eval_tasks eval_steps samples", "the files say what there is"),
    ("eval_dataset", "dataset", "the checkpoint says what it learned from"),
    ("eval_dataset", "baselines", "these train on the data of the checkpoint"),
    ("first_order", "meta_gradient", "they make the same choice"),
)
# A flag needs one of the others.
NEEDS = (
    ("resume", "run_name"),
    ("runs_at_once", "seeds sweep"),
    ("split", "compare"),
    ("sort", "list_runs"),
    ("csv", "list_runs"),
    ("adapt", "load"),
    ("save_weights", "load"),
    ("out", "eval adapt compare"),
    ("baselines", "eval"),
    ("baselines", "load"),
    ("eval_dataset", "eval split"),
    ("eval_dataset", "load compare"),
)


def find_setting(flag: str) -> str | None:
    """Return the name of a flag's setting, however its dashes are written; None if there is no such flag."""
    return BY_FLAG.get(flag.strip().lstrip("-").replace("_", "-"))


def suggest_flag(word: str) -> str:
    """Ask whether the flag was meant that is nearest to a misspelt one, or whose setting has this name."""
    names = {f"--{name.replace('_', '-')}": declared.name for name, declared in ALL_FLAGS.items()}
    names |= OTHER_NAMES | {form: form for declared in ALL_FLAGS.values() for form in declared.names}
    names |= {off: off for name in CAN_BE_SWITCHED_OFF if (off := f"--no-{ALL_FLAGS[name].name[2:]}")}
    near = find_nearest(f"--{word.lstrip('-')}", names)
    return f"; did you mean {names[near]}?" if near else ""


def check_call(flags: Mapping[str, Any]) -> Call:
    """Return the call that the flags ask for; raise UsageError where they contradict each other."""
    call = Call(**{name: flags[name] for name in flags if name in CALL_FLAGS})
    names = {name: flag.name for name, flag in ALL_FLAGS.items()}
    alone = {"list_runs": {"sort", "csv"}} | ({} if call.adapt else {"save_weights": {"load"}})
    for name in alone.keys() & flags.keys():
        for strange in sorted(flags.keys() - {name} - alone[name]):
            raise UsageError(f"{names[strange]} has no meaning with {names[name]}: leave it out")
    for firsts, seconds, reason in CLASHES:
        for first, second in product(firsts.split(), seconds.split()):
            if first in flags and second in flags:
                raise UsageError(f"{names[first]} and {names[second]} do not go together: {reason}")
    for name, others in NEEDS:
        if name in flags and not flags.keys() & set(others.split()):
            raise UsageError(f"{names[name]} needs {' or '.join(names[other] for other in others.split())}")
    if call.save_weights and call.save_weights.suffix == ".safetensors" and not find_spec("safetensors"):
        raise UsageError("--save-weights FILE.safetensors needs a package: pip install safetensors")
    return call
