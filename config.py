"""Flags to settings: every flag is declared, documented, given its default and checked here.

Two frozen dataclasses, one field a flag. `Config` is the experiment and is saved in its checkpoints;
`Invocation` is what this call is to do with it, and where. The standard library alone, so that
`--help` and a mistake in the flags answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from errors import UsageError

# ---- facts and defaults --------------------------------------------------------------------------

REGRESSION = ("sinusoid", "harmonic", "sinusoid-line")
DATASETS = (*REGRESSION, "omniglot")

OMNIGLOT_DRAWINGS = 20  # of each character
OMNIGLOT_CLASSES = {  # characters in each split
    "random": {"train": 1100, "validation": 100, "test": 423},
    "alphabet": {"train": 806, "validation": 158, "test": 659},
}


@dataclass(frozen=True)
class LearnerFacts:
    """What the flags need to know of a learner: its data, its defaults, what it can be asked for."""

    regression: bool
    init: str  # the default of --init
    adapt_norm: bool | None  # the default of --adapt-norm; None: it has no batch norm
    inner_lr: float | None = None  # the default of --inner-lr, where it is not the data's
    convolutional: bool = True


LEARNERS = {
    "mlp": LearnerFacts(regression=True, init="paper", adapt_norm=None, convolutional=False),
    "conv": LearnerFacts(regression=False, init="paper", adapt_norm=False),
    "conv-pool": LearnerFacts(regression=False, init="paper", adapt_norm=False),
    # Its last layer has 25,600 inputs: a step of 2.0 is far too long there.
    "convnet": LearnerFacts(regression=False, init="torch", adapt_norm=True, inner_lr=0.01),
    "fc": LearnerFacts(regression=False, init="paper", adapt_norm=False, convolutional=False),
}

# The defaults that depend on the data: those of Finn et al. (2017). "k" and "s" stand for the values
# of those flags. Omniglot's inner rate belongs to the mean cross-entropy: the paper's 0.4 (5-way) and
# 0.1 (20-way) belong to a loss that is `ways` times as large, and both come to 2.0.
DEFAULT_COLUMNS = ("regression", "omniglot, up to 10 ways", "omniglot, above 10 ways")
DEFAULTS: dict[str, tuple[Any, Any, Any]] = {
    "learner": ("mlp", "conv", "conv"),
    "ways": (None, 5, 5),
    "shots": (10, 1, 1),
    "queries": (10, "k", "k"),
    "steps": (1, 1, 5),
    "inner_lr": (0.01, 2.0, 2.0),
    "meta_batch_size": (25, 32, 16),
    "iterations": (70_000, 60_000, 60_000),
    "test_steps": ("s", 3, 5),
    "compile_after": (100, 3, 1),
    "log_every": (100, 10, 10),
    "val_every": (1000, 500, 500),
    "save_every": (1000, 100, 100),
}


# Compiling costs this many uncompiled iterations or more, saved again (benchmarks/README.md).
COMPILED_FROM = {"regression": 10_000, "classification": 1_500}
CHUNK_IMAGES = 40

# ---- how a flag is declared ----------------------------------------------------------------------

Check = Callable[[Any], str | None]  # what was expected, where the value is not that


def at_least(minimum: int) -> Check:
    def check(value: int) -> str | None:
        if value >= 2**31:
            return "a whole number below 2^31"
        return None if value >= minimum else f"a whole number of at least {minimum}"

    return check


def above_zero(value: float) -> str | None:
    return None if math.isfinite(value) and value > 0 else "a number above 0"


def not_negative(value: float) -> str | None:
    return None if math.isfinite(value) and value >= 0 else "a number that is not negative"


def one_of(*choices: str) -> Check:
    return lambda v: None if v in choices else f"one of {', '.join(choices)}"


def seed_range(value: int) -> str | None:
    return None if 0 <= value < 2**63 else "a whole number from 0 to 2^63 - 1"


KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Flag:
    """A flag's declaration, kept in the metadata of its field."""

    names: tuple[str, ...]
    group: str
    help: str
    kind: type
    check: Check | None
    metavar: str | None
    choices: tuple[str, ...] | None
    only: str | None  # where it means something: see `_applies`
    free_on_resume: bool  # may differ from the checkpoint when a run goes on
    free_on_eval: bool  # may differ from the checkpoint in --eval
    optional: bool  # None is a value too
    before: Any  # in checkpoints that are older than the flag
    default: Any

    def problem(self, value: Any) -> str | None:
        """What was expected of the value, or None where it is all right."""
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            return KIND_NAMES.get(self.kind, self.kind.__name__)
        return self.check(value) if self.check else None

    def parse(self, text: str) -> Any:
        """The value of a flag's argument; an argparse `type`."""
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        problem = KIND_NAMES.get(self.kind) if value is None else self.problem(value)
        if problem:
            raise argparse.ArgumentTypeError(f"expected {problem}, got {text!r}")
        return value


BY_DATASET = object()  # the default stands in DEFAULTS
BY_LEARNER = object()  # the default stands in LEARNERS
BY_RULE = object()  # "auto" is the default and `resolve_auto` settles it
NOT_THERE = object()  # the flag is as old as the checkpoints' format


def flag(
    *names: str,
    group: str,
    help: str,
    kind: type,
    default: Any = BY_DATASET,
    check: Check | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    only: str | None = None,
    free_on_resume: bool = False,
    free_on_eval: bool = False,
    optional: bool = False,
    before: Any = NOT_THERE,
) -> Any:
    declaration = Flag(
        names=names,
        group=group,
        help=help,
        kind=kind,
        check=one_of(*choices) if choices else check,
        metavar=metavar,
        choices=choices,
        only=only,
        free_on_resume=free_on_resume,
        free_on_eval=free_on_eval,
        optional=optional,
        before=before,
        default=default,
    )
    if default in (BY_DATASET, BY_LEARNER, BY_RULE):
        return field(metadata={"flag": declaration})
    return field(default=default, metadata={"flag": declaration})


def flags_of(settings: type) -> dict[str, Flag]:
    return {f.name: f.metadata["flag"] for f in dataclasses.fields(settings)}


# ---- the flags -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment, every default resolved."""

    dataset: str = flag(
        "--dataset", group="tasks", kind=str, choices=DATASETS, default="sinusoid",
        help="the family of tasks",
    )  # fmt: skip
    ways: int | None = flag(
        "-n", group="tasks", kind=int, check=at_least(2), metavar="WAYS", only="classification",
        optional=True, help="classes of a task",
    )  # fmt: skip
    shots: int = flag(
        "-k", group="tasks", kind=int, check=at_least(1), metavar="SHOTS", free_on_eval=True,
        help="support examples of a task, per class in classification",
    )  # fmt: skip
    queries: int = flag(
        "-q", group="tasks", kind=int, check=at_least(1), metavar="QUERIES", free_on_eval=True,
        help="query examples of a task, per class in classification",
    )  # fmt: skip
    noise: float = flag(
        "--noise", group="tasks", kind=float, check=not_negative, metavar="STD", only="regression",
        default=0.0, help="standard deviation of Gaussian noise on the targets",
    )  # fmt: skip
    omniglot_split: str = flag(
        "--omniglot-split", group="tasks", kind=str, choices=tuple(OMNIGLOT_CLASSES),
        only="classification", default="random",
        help="characters of training, validation and test: 1,100 / 100 / 423 from one fixed shuffle, "
        "or the original background / evaluation alphabets (806 / 158 / 659)",
    )  # fmt: skip
    resize: str = flag(
        "--resize", group="tasks", kind=str, choices=("lanczos", "nearest"), only="classification",
        default="lanczos",
        help="how the drawings come from 105 x 105 to 28 x 28; nearest is what the paper's script "
        "really does",
    )  # fmt: skip

    learner: str = flag(
        "--learner", group="learner", kind=str, choices=tuple(LEARNERS),
        help="mlp: 1-40-40-1; conv: four stride-2 convolutions of 64; conv-pool: with max pooling; "
        "convnet: unpadded and flattened; fc: 256-128-64-64",
    )  # fmt: skip
    init: str = flag(
        "--init", group="learner", kind=str, choices=("paper", "torch"), default=BY_LEARNER,
        help="initial weights: the paper's, or PyTorch's defaults",
    )  # fmt: skip
    batch_norm: str = flag(
        "--batch-norm", group="learner", kind=str, choices=("transductive", "inductive"),
        only="batch norm", default="transductive",
        help="statistics for the query while training: its own, or the support set's under the "
        "adapted weights",
    )  # fmt: skip
    adapt_norm: bool = flag(
        "--adapt-norm", group="learner", kind=bool, only="batch norm", default=BY_LEARNER,
        help="adapt batch norm's shift and scale in the inner loop, too; else they are "
        "meta-learned only",
    )  # fmt: skip

    steps: int = flag(
        "-s", group="inner loop", kind=int, check=at_least(1), metavar="STEPS",
        help="inner gradient steps while training",
    )  # fmt: skip
    inner_lr: float = flag(
        "--inner-lr", group="inner loop", kind=float, check=above_zero, metavar="RATE",
        help="learning rate of the inner loop, on the mean loss of the support set",
    )  # fmt: skip
    first_order: bool = flag(
        "--first-order", group="inner loop", kind=bool, default=False,
        help="first-order MAML: treat the inner gradients as constants",
    )  # fmt: skip

    meta_batch_size: int = flag(
        "--meta-batch-size", group="outer loop", kind=int, check=at_least(1), metavar="TASKS",
        help="tasks in an iteration",
    )  # fmt: skip
    iterations: int = flag(
        "--iterations", group="outer loop", kind=int, check=at_least(1), metavar="N",
        free_on_resume=True, help="meta-gradient steps",
    )  # fmt: skip
    meta_lr: float = flag(
        "--meta-lr", group="outer loop", kind=float, check=above_zero, metavar="RATE",
        default=1e-3, help="learning rate of Adam on the meta-parameters",
    )  # fmt: skip
    grad_clip: float | None = flag(
        "--grad-clip", group="outer loop", kind=float, check=above_zero, metavar="X",
        default=None, optional=True,
        help="clip each element of the meta-gradient to +-X, as the paper does on mini-ImageNet",
    )  # fmt: skip
    grad_clip_norm: float | None = flag(
        "--grad-clip-norm", group="outer loop", kind=float, check=above_zero, metavar="X",
        default=None, optional=True, help="clip the meta-gradient to norm X",
    )  # fmt: skip
    seed: int = flag(
        "--seed", group="outer loop", kind=int, check=seed_range, default=0,
        help="of the initial weights and the training tasks",
    )  # fmt: skip
    precision: str = flag(
        "--precision", group="machine", kind=str, choices=("float64", "float32", "tf32", "bf16"),
        default="float32", free_on_eval=True,
        help="of the arithmetic; tf32 (CUDA: of matrix products) and bf16 are for the learner only: "
        "meta-parameters, fast weights, losses, batch statistics and the optimizer stay float32",
    )  # fmt: skip
    compile: str = flag(
        "--compile", group="machine", kind=str, choices=("auto", "on", "off"), default=BY_RULE,
        before="off",
        help="compile the iteration; auto: where the run is long enough to pay for it, from 10,000 "
        "iterations (omniglot 1,500)",
    )  # fmt: skip
    compile_after: int = flag(
        "--compile-after", group="machine", kind=int, check=at_least(0), metavar="N", before=0,
        help="iterations that run uncompiled at first, to show at once that the run is well",
    )  # fmt: skip
    engine: str = flag(
        "--engine", group="machine", kind=str, choices=("auto", "unrolled", "adjoint"), default=BY_RULE,
        before="unrolled",
        help="how the exact meta-gradient is computed: through the whole inner loop, or step by step "
        "backwards, in memory that hardly grows with -s; the same to rounding. auto: unrolled with one "
        "inner step and for regression, else adjoint",
    )  # fmt: skip
    convolution: str = flag(
        "--conv", group="machine", kind=str, choices=("auto", "im2col", "grouped"), default=BY_RULE,
        before="grouped", only="convolutions",
        help="convolutions as matrix products over patches, or as one grouped convolution over tasks; "
        "auto: im2col where it is compiled",
    )  # fmt: skip
    tasks_at_once: int | None = flag(
        "--tasks-at-once", group="machine", kind=int, check=at_least(1), metavar="N",
        default=BY_RULE, before=None, optional=True, free_on_eval=True,
        help="take the tasks of an iteration in chunks of N, which bounds memory; the result is the same "
        "to rounding. By default all at once, or, of compiled convolutions, what fits a CPU's cache",
    )  # fmt: skip

    log_every: int = flag(
        "--log-every", group="logging", kind=int, check=at_least(1), metavar="N",
        free_on_resume=True, help="iterations in a point of the training curves",
    )  # fmt: skip
    val_every: int = flag(
        "--val-every", group="logging", kind=int, check=at_least(1), metavar="N",
        free_on_resume=True, help="iterations between validations on 200 fixed tasks",
    )  # fmt: skip
    save_every: int = flag(
        "--save-every", group="logging", kind=int, check=at_least(1), metavar="N",
        free_on_resume=True, help="iterations between two savings of last.pt",
    )  # fmt: skip

    eval_tasks: int = flag(
        "--eval-tasks", group="evaluation", kind=int, check=at_least(2), metavar="TASKS",
        default=600, free_on_resume=True, free_on_eval=True, help="test tasks",
    )  # fmt: skip
    eval_steps: int = flag(
        "--eval-steps", group="evaluation", kind=int, check=at_least(1), metavar="STEPS",
        default=10, free_on_resume=True, free_on_eval=True,
        help="measure after 0, 1, ... STEPS inner steps",
    )  # fmt: skip
    test_steps: int = flag(
        "--test-steps", group="evaluation", kind=int, check=at_least(1), metavar="STEPS",
        free_on_resume=True, free_on_eval=True,
        help="the number of steps whose result is quoted; at most --eval-steps",
    )  # fmt: skip

    @property
    def classification(self) -> bool:
        return self.dataset not in REGRESSION

    @property
    def has_batch_norm(self) -> bool:
        return LEARNERS[self.learner].adapt_norm is not None


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What one call is to do, and where."""

    eval: bool = flag(
        "--eval", group="what to do", kind=bool, default=False,
        help="measure on the test tasks: a checkpoint with --load, else the fresh initialisation",
    )  # fmt: skip
    load: Path | None = flag(
        "--load", group="what to do", kind=Path, metavar="FILE", default=None, optional=True,
        help="the checkpoint to evaluate, or, without --eval, the run to go on with",
    )  # fmt: skip
    resume: bool = flag(
        "--resume", group="what to do", kind=bool, default=False,
        help="go on with the run of this --run-name if it has a checkpoint, else begin it",
    )  # fmt: skip
    init_from: Path | None = flag(
        "--init-from", group="what to do", kind=Path, metavar="FILE", default=None, optional=True,
        help="begin a new run with the weights of a checkpoint",
    )  # fmt: skip
    samples: int | None = flag(
        "--samples", group="tasks", kind=int, check=at_least(2), metavar="M", default=None,
        only="regression", optional=True,
        help="points of a task: the query has M - k of them; the same as -q (M - k)",
    )  # fmt: skip
    checkpoint_path: Path = flag(
        "--checkpoint-path", "--checkpoint_path", group="files", kind=Path, metavar="FOLDER",
        default=Path("checkpoints"), help="the folder of all runs",
    )  # fmt: skip
    run_name: str | None = flag(
        "--run-name", group="files", kind=str, metavar="NAME", default=None, optional=True,
        help="the run's folder in it; a fresh one by default",
    )  # fmt: skip
    out: Path | None = flag(
        "--out", group="files", kind=Path, metavar="FOLDER", default=None, optional=True,
        help="where --eval writes its results; beside the checkpoint by default",
    )  # fmt: skip
    data_root: Path = flag(
        "--data-root", group="files", kind=Path, metavar="FOLDER",
        default=Path(os.environ.get("MAML_DATA_ROOT") or "data"),
        help="holds omniglot-py/; also from the environment variable MAML_DATA_ROOT",
    )  # fmt: skip
    device: str = flag(
        "--device", group="machine", kind=str, choices=("auto", "cpu", "cuda", "mps"),
        default="auto", help="auto takes CUDA where there is any, else the CPU",
    )  # fmt: skip
    autotune: bool = flag(
        "--autotune", group="machine", kind=bool, default=False,
        help="measure what --engine and --conv leave open before the first iteration, and keep the fastest",
    )  # fmt: skip


CONFIG_FLAGS = flags_of(Config)
INVOCATION_FLAGS = flags_of(Invocation)
ALL_FLAGS = CONFIG_FLAGS | INVOCATION_FLAGS
GROUPS = (
    "what to do", "tasks", "learner", "inner loop", "outer loop", "evaluation", "logging", "files",
    "machine",
)  # fmt: skip


# ---- the command line ----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (all flags: --help)")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)


def _default_text(name: str, declaration: Flag) -> str:
    if declaration.default is BY_DATASET:
        regression, few_ways, many_ways = map(_show, DEFAULTS[name])
        omniglot = few_ways if few_ways == many_ways else f"{few_ways}, above 10 ways {many_ways}"
        if declaration.only:
            return omniglot
        exceptions = [
            f", {learner} {getattr(facts, name)}"
            for learner, facts in LEARNERS.items()
            if getattr(facts, name, None) is not None
        ]
        return f"{regression}; omniglot {omniglot}{''.join(exceptions)}"
    if name == "tasks_at_once":
        return "all, or what fits the cache"
    if declaration.default is BY_RULE:
        return "auto"
    if declaration.default is BY_LEARNER:
        facts = {learner: getattr(LEARNERS[learner], name) for learner in LEARNERS}
        return ", ".join(f"{k} {_show(v)}" for k, v in facts.items() if v is not None)
    if name == "run_name":
        return "from the settings and the time"
    if name == "out":
        return "beside the checkpoint"
    return _show(declaration.default)


def defaults_table() -> str:
    """The defaults that depend on the data, as `--help` shows them."""
    rows: list[tuple[str, ...]] = [("", *DEFAULT_COLUMNS)]
    for name, values in DEFAULTS.items():
        rows.append((CONFIG_FLAGS[name].names[0], *("-" if v is None else _show(v) for v in values)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, facts in LEARNERS.items():
        if facts.inner_lr is not None:
            lines.append(f"with --learner {name}: --inner-lr {facts.inner_lr}")
    return "\n".join(f"  {line}" for line in lines)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        description="Gradient-based meta-learning (MAML): meta-train, go on, evaluate.",
        epilog="Defaults that depend on the data (k, s: as those flags):\n\n" + defaults_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["what to do"].add_argument("-h", "--help", action="help", help="show this and end")
    for name, declaration in ALL_FLAGS.items():
        text = f"{declaration.help} (default: {_default_text(name, declaration)})"
        options: dict[str, Any] = {"dest": name, "help": text.replace("%", "%%")}
        if declaration.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = declaration.parse
            options["metavar"] = declaration.metavar
            if declaration.choices:
                options["metavar"] = "{" + ",".join(declaration.choices) + "}"
        groups[declaration.group].add_argument(*declaration.names, **options)
    return parser


def parse(arguments: list[str]) -> dict[str, Any]:
    """The flags that were given, by field name, each well-formed by itself."""
    return vars(build_parser().parse_args(arguments))


# ---- resolving and checking ----------------------------------------------------------------------


def resolve(given: Mapping[str, Any]) -> Config:
    """The settings of a new experiment: the flags that were given, and defaults for all others."""
    values = {name: value for name, value in given.items() if name in CONFIG_FLAGS}
    learner_inner_lr = LEARNERS[values["learner"]].inner_lr if "learner" in values else None
    if learner_inner_lr is not None:
        values.setdefault("inner_lr", learner_inner_lr)
    dataset = values.get("dataset", CONFIG_FLAGS["dataset"].default)
    ways = values.get("ways") or DEFAULTS["ways"][1]
    column = 0 if dataset in REGRESSION else 1 if ways <= 10 else 2
    for name, by_column in DEFAULTS.items():
        values.setdefault(name, by_column[column])
    values |= _queries_from_samples(given, values["shots"], dataset)
    for name in ("queries", "test_steps"):
        values[name] = {"k": values["shots"], "s": values["steps"]}.get(values[name], values[name])
    values.setdefault("eval_steps", max(CONFIG_FLAGS["eval_steps"].default, values["test_steps"]))
    if "test_steps" not in given:
        values["test_steps"] = min(values["test_steps"], values["eval_steps"])
    learner = LEARNERS[values["learner"]]
    values.setdefault("init", learner.init)
    values.setdefault("adapt_norm", bool(learner.adapt_norm))
    config = Config(**resolve_auto(values))
    check(config, given)
    return config


def resolve_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with what is "auto" or missing settled by what was measured (benchmarks/README.md)."""
    values = {"dataset": CONFIG_FLAGS["dataset"].default} | dict(values)
    regression = values["dataset"] in REGRESSION
    long = COMPILED_FROM["regression" if regression else "classification"]
    compiled = values["iterations"] >= long
    automatic = {
        "compile": "on" if compiled else "off",
        "engine": "unrolled" if regression or values["steps"] == 1 else "adjoint",
    }
    chosen = {name: values.get(name, "auto") for name in (*automatic, "convolution")}
    settled: dict[str, Any] = {
        name: automatic[name] if chosen[name] == "auto" else chosen[name] for name in automatic
    }
    settled["convolution"] = chosen["convolution"]
    if chosen["convolution"] == "auto":
        patches = settled["compile"] == "on" and LEARNERS[values["learner"]].convolutional
        settled["convolution"] = "im2col" if patches else "grouped"
    if "tasks_at_once" not in values:
        patches = settled["compile"] == "on" and settled["convolution"] == "im2col"
        settled["tasks_at_once"] = _cache_chunk(values) if patches else None
    elif values["tasks_at_once"] is not None and values["tasks_at_once"] >= values["meta_batch_size"]:
        settled["tasks_at_once"] = None
    if values["iterations"] <= DEFAULTS["compile_after"][0 if regression else 1]:
        settled["compile_after"] = values.get("compile_after", 0)
    return values | settled


def _cache_chunk(values: Mapping[str, Any]) -> int | None:
    """Tasks of a chunk whose support set is some `CHUNK_IMAGES` images; None: all of the meta-batch."""
    if values["dataset"] in REGRESSION or not LEARNERS[values["learner"]].convolutional:
        return None
    tasks = values["meta_batch_size"]
    most = max(1, CHUNK_IMAGES // (values["ways"] * values["shots"]))
    chunk = max(size for size in range(1, min(most, tasks) + 1) if tasks % size == 0)
    if 2 * chunk < most:  # few divisors: the last chunk is a smaller one
        chunk = most
    return None if chunk >= tasks else chunk


def resolve_from(saved: Config, given: Mapping[str, Any], *, evaluate: bool) -> Config:
    """The settings of a checkpoint, with the flags that may differ from it.

    Raises UsageError for any other flag that was given and disagrees.
    """
    changes: dict[str, Any] = {}
    shots = given.get("shots", saved.shots) if evaluate else saved.shots
    given = dict(given) | _queries_from_samples(given, shots, saved.dataset)
    for name, value in given.items():
        if name not in CONFIG_FLAGS:
            continue
        declaration = CONFIG_FLAGS[name]
        if declaration.free_on_eval if evaluate else declaration.free_on_resume:
            changes[name] = value
        elif declaration.default is BY_RULE and value == "auto":
            continue  # settled when the run began
        elif (name, value, saved.compile) == ("compile", "on", "off") and not evaluate:
            continue  # it could not be compiled, or was not to be: it goes on as it is
        elif value != getattr(saved, name):
            doing = "evaluating" if evaluate else "going on with"
            raise UsageError(
                f"{declaration.names[0]} {_show(value)} disagrees with the checkpoint, which has "
                f"{_show(getattr(saved, name))}: leave it out when {doing} a checkpoint"
            )
    values = dataclasses.asdict(saved) | changes
    if "eval_steps" in given and "test_steps" not in given:
        values["test_steps"] = min(values["test_steps"], values["eval_steps"])
    config = Config(**values)
    check(config, given)
    return config


def _queries_from_samples(given: Mapping[str, Any], shots: int, dataset: str) -> dict[str, int]:
    """What --samples, if it was given, says of the size of the query."""
    samples = given.get("samples")
    if samples is None:
        return {}
    if dataset not in REGRESSION:
        raise UsageError("--samples counts the points of a curve: use -k and -q with omniglot")
    if samples <= shots:
        raise UsageError(f"--samples {samples} leaves no query: it must be above -k {shots}")
    if "queries" in given and given["queries"] != samples - shots:
        raise UsageError(
            f"--samples {samples} is not -k {shots} plus -q {given['queries']}: give one of --samples and -q"
        )
    return {"queries": samples - shots}


def check(config: Config, given: Mapping[str, Any]) -> None:
    """Raises UsageError where settings do not go together, or a given flag means nothing here."""
    learner = LEARNERS[config.learner]
    if learner.regression == config.classification:
        fitting = [name for name, facts in LEARNERS.items() if facts.regression != learner.regression]
        raise UsageError(
            f"--learner {config.learner} does not fit --dataset {config.dataset}: use {' or '.join(fitting)}"
        )
    for name in given:
        only = ALL_FLAGS[name].only
        if only and not _applies(only, config):
            of_learner = only in ("batch norm", "convolutions")
            place = f"--learner {config.learner}" if of_learner else config.dataset
            raise UsageError(f"{ALL_FLAGS[name].names[0]} means nothing with {place}: leave it out")
    if config.init == "paper" and learner.init != "paper":
        raise UsageError(f"--init paper: {config.learner} is not a network of the paper; use torch")
    if config.test_steps > config.eval_steps:
        raise UsageError(f"--test-steps {config.test_steps} is above --eval-steps {config.eval_steps}")
    if config.classification:
        _check_omniglot(config)


def _applies(only: str, config: Config) -> bool:
    """Whether a flag for one kind of data or of learner only means something here."""
    return {
        "regression": not config.classification,
        "classification": config.classification,
        "batch norm": config.has_batch_norm,
        "convolutions": LEARNERS[config.learner].convolutional,
    }[only]


def _check_omniglot(config: Config) -> None:
    drawings = config.shots + config.queries
    if drawings > OMNIGLOT_DRAWINGS:
        raise UsageError(
            f"-k {config.shots} plus -q {config.queries} is {drawings}, but an Omniglot character "
            f"has {OMNIGLOT_DRAWINGS} drawings"
        )
    classes = OMNIGLOT_CLASSES[config.omniglot_split]
    smallest = min(classes, key=classes.__getitem__)
    if config.ways is None or config.ways > classes[smallest]:
        raise UsageError(
            f"-n {config.ways} is more than the {classes[smallest]} characters of the {smallest} "
            f"split ({config.omniglot_split})"
        )


def check_invocation(given: Mapping[str, Any]) -> Invocation:
    """This call's part of the flags; raises UsageError where they contradict each other."""
    call = Invocation(**{name: given[name] for name in given if name in INVOCATION_FLAGS})
    refusals = [
        (call.eval and call.resume, "--resume goes on training: leave out --eval"),
        (call.eval and call.init_from, "--init-from begins a run: use --load with --eval"),
        (call.load and call.init_from, "--load goes on with a run, --init-from begins one: give one"),
        (call.load and call.resume, "--load and --resume both go on with a run: give one of them"),
        (
            call.init_from and "init" in given,
            "--init-from gives the initial weights: leave out --init",
        ),
        (call.resume and not call.run_name, "--resume needs the --run-name of the run to go on with"),
        (
            call.eval and given.keys() & {"compile", "compile_after", "engine", "convolution"},
            "--compile, --compile-after, --engine and --conv are for training: leave them out with --eval",
        ),
        (
            call.autotune and (call.eval or call.load),
            "--autotune chooses when a run begins: leave it out with --eval and --load",
        ),
        (call.out and not call.eval, "--out is where --eval writes: it means nothing without"),
        (
            call.load and call.run_name,
            "--run-name names a new run; --load takes the folder of the checkpoint",
        ),
        (
            call.load and call.eval and "checkpoint_path" in given,
            "--checkpoint-path means nothing with --eval --load: results go beside that file, or to --out",
        ),
        (
            call.run_name is not None
            and (
                not call.run_name.strip(". ")
                or not call.run_name.isprintable()
                or set(call.run_name) & set("/\\")
                or len(call.run_name) > 100
            ),
            f"--run-name {call.run_name!r} is no name for a folder",
        ),
    ]
    for refused, message in refusals:
        if refused:
            raise UsageError(message)
    return call


# ---- to and from a checkpoint, and to the terminal -----------------------------------------------


def config_to_plain(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_from_plain(values: Any) -> Config:
    """The inverse; raises UsageError for anything that `config_to_plain` does not give."""
    if isinstance(values, dict):
        older = {name: flag.before for name, flag in CONFIG_FLAGS.items() if flag.before is not NOT_THERE}
        values = older | values
    if not isinstance(values, dict) or values.keys() != CONFIG_FLAGS.keys():
        raise UsageError("its settings are not those of this version")
    for name, declaration in CONFIG_FLAGS.items():
        problem = declaration.problem(values[name])
        if declaration.default is BY_RULE and values[name] == "auto":
            problem = "settled"
        if problem:
            raise UsageError(f"its setting {name} should be {problem}, not {values[name]!r}"[:200])
    config = Config(**values)
    check(config, {})
    return config


def meaningful(config: Config) -> dict[str, Any]:
    """The settings that mean something with these data and this learner."""
    return {
        name: getattr(config, name)
        for name, declaration in CONFIG_FLAGS.items()
        if declaration.only is None or _applies(declaration.only, config)
    }


def describe(config: Config) -> str:
    """The settings that mean something, a line a group."""
    values = meaningful(config)
    lines = []
    for group in GROUPS:
        shown = [
            f"{name.replace('_', ' ')} {value if name == 'seed' else _show(value)}"
            for name, value in values.items()
            if CONFIG_FLAGS[name].group == group
        ]
        if shown:
            text = textwrap.fill(" · ".join(shown), 96, subsequent_indent=" " * 14)
            lines.append(f"  {group:<11} {text}")
    return "\n".join(lines)
