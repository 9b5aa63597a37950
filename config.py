"""Flags to settings: every flag is declared, documented, given its default and checked here.

Two frozen dataclasses, one field a flag. `Config` is the experiment and is saved in its checkpoints;
`Invocation` is what this call is to do with it, and where. The standard library alone, so that
`--help` and a mistake in the flags answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import choices
from errors import UsageError
from flags import (
    BY_DATASET,
    BY_LEARNER,
    BY_RULE,
    NOT_THERE,
    Flag,
    above_zero,
    at_least,
    below_one,
    flag,
    flags_of,
    not_negative,
    seed_range,
)
from presets import (
    ALGORITHMS,
    CHUNK_IMAGES,
    COMPILED_FROM,
    DATASETS,
    DEFAULT_COLUMNS,
    DEFAULTS,
    LEARNERS,
    OMNIGLOT_CLASSES,
    OMNIGLOT_DRAWINGS,
    REGRESSION,
    ByData,
)

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

    oracle: bool = flag(
        "--oracle", group="tasks", kind=bool, default=False, before=False, only="regression",
        help="tell the learner the task: its parameters (amplitude, phase, ...) join the inputs; a baseline",
    )  # fmt: skip
    train_shots: int | None = flag(
        "--train-shots", group="tasks", kind=int, check=at_least(1), metavar="SHOTS", default=None,
        optional=True, before=None,
        help="support examples of a training task where they are not -k; with the Reptile meta-gradient all "
        "its examples, query included, by default k + q",
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
    algorithm: str = flag(
        "--algorithm", group="algorithm", kind=str, choices=tuple(ALGORITHMS), default="maml",
        before="maml",
        help="a preset of the choices in this group and of its paper's settings; each has its own flag, "
        "which comes first",
    )  # fmt: skip
    adapt: str = flag(
        "--adapt", group="algorithm", kind=str, choices=choices.FAST_WEIGHTS, default="all",
        before="all",
        help="what the inner loop adapts: all weights, the head, all but the head, or a context vector that "
        "modulates a layer",
    )  # fmt: skip
    head: str | None = flag(
        "--head", group="algorithm", kind=str, metavar="NAMES", default=None, optional=True, before=None,
        only="head",
        help="the head's modules or parameters by name, with commas between; by default the last module with "
        "weights of its own that does not normalise",
    )  # fmt: skip
    context_size: int = flag(
        "--context-size", group="algorithm", kind=int, check=at_least(1), metavar="N", default=5,
        before=5, only="context", help="numbers in the context vector",
    )  # fmt: skip
    inner_rates: str = flag(
        "--inner-rates", group="algorithm", kind=str, choices=choices.INNER_RATES,
        default="fixed", before="fixed",
        help="inner learning rates: --inner-lr; or meta-learned from there, for each weight tensor and step, "
        "or for each element",
    )  # fmt: skip
    inner_lr_max: float | None = flag(
        "--inner-lr-max", group="algorithm", kind=float, check=above_zero, metavar="RATE", default=None,
        optional=True, before=None, only="learned rates",
        help="learned rates begin at random between --inner-lr and this; by default all at --inner-lr",
    )  # fmt: skip
    meta_gradient: str = flag(
        "--meta-gradient", group="algorithm", kind=str,
        choices=choices.META_GRADIENTS, default="exact",
        help="exact; first-order: inner gradients count as constants; reptile: how far the inner loop has "
        "moved; implicit: from its end alone (iMAML); joint: no inner loop while training",
    )  # fmt: skip
    exact_from: int = flag(
        "--exact-from", group="algorithm", kind=int, check=at_least(0), metavar="N", default=0, before=0,
        only="exact", help="first order in the first N iterations, exact from there on",
    )  # fmt: skip
    cg_steps: int = flag(
        "--cg-steps", group="algorithm", kind=int, check=at_least(0), metavar="N", default=5, before=5,
        only="implicit", help="steps of conjugate gradients; 0 is first order",
    )  # fmt: skip
    cg_damping: float = flag(
        "--cg-damping", group="algorithm", kind=float, check=not_negative, metavar="X", default=0.0,
        before=0.0, only="conjugate gradients",
        help="solve (1 + X) I + H / lambda in the place of I + H / lambda",
    )  # fmt: skip
    objective: str = flag(
        "--objective", group="algorithm", kind=str, choices=choices.OBJECTIVES, default="last",
        before="last",
        help="the query loss after the last inner step, or a weighted sum of those after each, whose weight "
        "goes over to the last",
    )  # fmt: skip
    msl_iterations: int = flag(
        "--msl-iterations", group="algorithm", kind=int, check=at_least(1), metavar="N", default=5000,
        before=5000, only="multi-step",
        help="iterations in which the multi-step weights go over to the last step, in ten stages",
    )  # fmt: skip

    batch_norm: str = flag(
        "--batch-norm", group="algorithm", kind=str,
        choices=choices.NORMALISATIONS, only="batch norm", default="transductive",
        help="statistics for the query while training: its own, or the support set's under the "
        "adapted weights; per-step: its own, with running statistics kept for each inner step",
    )  # fmt: skip
    norm_per_step: bool = flag(
        "--norm-per-step", group="algorithm", kind=bool, default=False, before=False, only="batch norm",
        help="batch norm's shift and scale for each inner step; these are never adapted",
    )  # fmt: skip
    adapt_norm: bool = flag(
        "--adapt-norm", group="algorithm", kind=bool, only="norm that can adapt", default=BY_LEARNER,
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
    inner_optimizer: str = flag(
        "--inner-optimizer", group="inner loop", kind=str, choices=choices.INNER_OPTIMIZERS,
        default="sgd", before="sgd", help="update rule of the inner loop; each task begins afresh",
    )  # fmt: skip
    inner_momentum: float = flag(
        "--inner-momentum", group="inner loop", kind=float, check=below_one, metavar="X", default=0.9,
        before=0.9, only="momentum", help="of the momentum rule",
    )  # fmt: skip
    inner_beta_1: float = flag(
        "--inner-beta1", group="inner loop", kind=float, check=below_one, metavar="X", default=0.9,
        before=0.9, only="adam", help="decay of the inner Adam's mean gradient",
    )  # fmt: skip
    inner_weight_decay: float = flag(
        "--inner-weight-decay", group="inner loop", kind=float, check=not_negative, metavar="X",
        default=0.0, before=0.0, help="adds X times the fast weights to their gradient",
    )  # fmt: skip
    inner_clip: float | None = flag(
        "--inner-clip", group="inner loop", kind=float, check=above_zero, metavar="X", default=None,
        optional=True, before=None, help="clip a task's inner gradient to norm X",
    )  # fmt: skip
    proximal: float = flag(
        "--proximal", group="inner loop", kind=float, check=not_negative, metavar="LAMBDA", default=0.0,
        before=0.0,
        help="adds LAMBDA / 2 times the squared distance from the initialisation to the support loss",
    )  # fmt: skip
    inner_batch: int | None = flag(
        "--inner-batch", group="inner loop", kind=int, check=at_least(1), metavar="N", default=None,
        optional=True, before=None,
        help="examples in the minibatch of an inner step while training; by default, or where there are no "
        "more, all",
    )  # fmt: skip
    eval_inner_batch: int | None = flag(
        "--eval-inner-batch", group="evaluation", kind=int, check=at_least(1), metavar="N", default=None,
        optional=True, before=None, free_on_resume=True, free_on_eval=True,
        help="support examples in the minibatch of an inner step on validation and test tasks; by default "
        "all",
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
        default=1e-3, help="learning rate of the outer loop, at its first iteration",
    )  # fmt: skip
    meta_optimizer: str = flag(
        "--meta-optimizer", group="outer loop", kind=str, choices=choices.META_OPTIMIZERS, default="adam",
        before="adam", help="update rule of the meta-parameters",
    )  # fmt: skip
    meta_lr_schedule: str = flag(
        "--meta-lr-schedule", group="outer loop", kind=str, choices=choices.SCHEDULES,
        default="constant", before="constant",
        help="course of the learning rate over --iterations",
    )  # fmt: skip
    meta_lr_final: float = flag(
        "--meta-lr-final", group="outer loop", kind=float, check=not_negative, metavar="RATE",
        default=0.0, before=0.0, only="schedule", help="the learning rate where it ends",
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
        "--engine", group="machine", kind=str, choices=("auto", *choices.ENGINES), default=BY_RULE,
        before="unrolled", only="engines",
        help="how the exact or first-order meta-gradient is computed: through the whole inner loop, or step "
        "by step backwards, in memory that hardly grows with -s; the same to rounding. auto: unrolled with "
        "one inner step and for regression, else adjoint",
    )  # fmt: skip
    convolution: str = flag(
        "--conv", group="machine", kind=str, choices=("auto", *choices.CONVOLUTIONS), default=BY_RULE,
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
    def training_shots(self) -> int:
        """Support examples of a training task, per class in classification."""
        if self.meta_gradient == "reptile":
            return (self.train_shots or self.shots + self.queries) - self.queries
        return self.train_shots or self.shots

    @property
    def trained_steps(self) -> int:
        """Inner steps that the training is for: what a validation takes."""
        return 0 if self.meta_gradient == "joint" else self.steps

    @property
    def query_norm(self) -> str:
        """Whose statistics a validation uses for the query: those that the training uses."""
        return "inductive" if self.batch_norm == "inductive" else "transductive"

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
    baselines: bool = flag(
        "--baselines", group="what to do", kind=bool, default=False,
        help="with --eval --load: beside it training from scratch on each task and, for regression, a "
        "pretrained network and the oracle that is told the task; these two are trained first",
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
        help="begin a new run with the weights of a checkpoint, whichever the algorithm",
    )  # fmt: skip
    samples: int | None = flag(
        "--samples", group="tasks", kind=int, check=at_least(2), metavar="M", default=None,
        only="regression", optional=True,
        help="points of a task: the query has M - k of them; the same as -q (M - k)",
    )  # fmt: skip
    first_order: bool | None = flag(
        "--first-order", group="algorithm", kind=bool, default=None, optional=True,
        help="the same as --meta-gradient first-order",
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
    "what to do", "tasks", "learner", "algorithm", "inner loop", "outer loop", "evaluation", "logging",
    "files", "machine",
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
    if name == "first_order":
        return "no"
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


def presets_table() -> str:
    """What the algorithms set, as `--help` shows it: for regression / omniglot / omniglot above 10 ways."""
    lines = []
    for algorithm, row in ALGORITHMS.items():
        cells = []
        for name, value in row.items():
            columns = [value[i] if isinstance(value, ByData) else value for i in range(3)]
            if columns[1] == columns[2]:
                columns.pop()
            if len(set(map(str, columns))) == 1:
                columns = columns[:1]
            cells.append(f"{CONFIG_FLAGS[name].names[0]} {'/'.join(map(_show, columns))}")
        text = ", ".join(cells) or "the defaults"
        lines.append(
            textwrap.fill(f"{algorithm}: {text}", 96, subsequent_indent="    ", break_on_hyphens=False)
        )
    return "\n".join(f"  {line}" for line in "\n".join(lines).split("\n"))


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="main.py",
        description="Gradient-based meta-learning (MAML): meta-train, go on, evaluate.",
        epilog="Defaults that depend on the data (k, s: as those flags):\n\n"
        + defaults_table()
        + "\n\nWhat --algorithm sets beside (half: of --iterations):\n\n"
        + presets_table(),
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
    """The settings of a new experiment: the flags that were given, and defaults for all others.

    A flag comes before the algorithm's preset, that before the learner's default, that before the data's.
    """
    given = dict(given) | _meta_gradient_from_first_order(given)
    values = {name: value for name, value in given.items() if name in CONFIG_FLAGS}
    dataset = values.get("dataset", CONFIG_FLAGS["dataset"].default)
    ways = values.get("ways") or DEFAULTS["ways"][1]
    column = 0 if dataset in REGRESSION else 1 if ways <= 10 else 2
    preset = _preset(values, given, column)
    values = preset | values
    learner = LEARNERS[values.get("learner", DEFAULTS["learner"][column])]
    for name, by_column in DEFAULTS.items():
        values.setdefault(name, by_column[column])
    values |= _queries_from_samples(given, values["shots"], dataset)
    for name in ("queries", "test_steps"):
        values[name] = {"k": values["shots"], "s": values["steps"]}.get(values[name], values[name])
    values.setdefault("eval_steps", max(CONFIG_FLAGS["eval_steps"].default, values["test_steps"]))
    if "test_steps" not in given:
        values["test_steps"] = min(values["test_steps"], values["eval_steps"])
    if "train_shots" not in given and values.get("train_shots") is not None:
        values["train_shots"] = max(values["train_shots"], values["shots"] + values["queries"])
    if values.get("exact_from") == "half":
        values["exact_from"] = values["iterations"] // 2 if _exact(values) else 0
    values.setdefault("init", learner.init)
    values.setdefault("adapt_norm", bool(learner.adapt_norm))
    if learner.adapt_norm is None and "batch_norm" not in given:
        values.pop("batch_norm", None)
    if learner.adapt_norm is None and "norm_per_step" not in given:
        values.pop("norm_per_step", None)
    config = Config(**resolve_auto(values))
    check(config, given)
    return config


def _preset(values: Mapping[str, Any], given: Mapping[str, Any], column: int) -> dict[str, Any]:
    """The algorithm's settings for a column of `DEFAULT_COLUMNS`, and the learner's inner rate."""
    algorithm = values.get("algorithm", CONFIG_FLAGS["algorithm"].default)
    preset = {n: v[column] if isinstance(v, ByData) else v for n, v in ALGORITHMS[algorithm].items()}
    differentiated = preset.get("meta_gradient", "exact") in ("exact", "first-order")
    if given.get("first_order") is not None and not differentiated:
        raise UsageError(
            f"--first-order means nothing with --algorithm {algorithm}: leave it out, or choose with "
            "--meta-gradient"
        )
    learner = LEARNERS[values.get("learner", preset.get("learner", DEFAULTS["learner"][column]))]
    usual = DEFAULTS["inner_lr"][column]
    if learner.inner_lr is not None and preset.get("inner_lr", usual) == usual:
        preset["inner_lr"] = learner.inner_lr
    if "inner_lr" in given:
        preset.pop("inner_lr_max", None)  # it goes with the preset's --inner-lr
    return preset


def _exact(values: Mapping[str, Any]) -> bool:
    return values.get("meta_gradient", "exact") == "exact"


def _meta_gradient_from_first_order(given: Mapping[str, Any]) -> dict[str, str]:
    """What --first-order, if it was given, says of --meta-gradient."""
    first_order = given.get("first_order")
    if first_order is None:
        return {}
    said = "first-order" if first_order else "exact"
    if given.get("meta_gradient", said) != said:
        name = "--first-order" if first_order else "--no-first-order"
        raise UsageError(f"{name} disagrees with --meta-gradient {given['meta_gradient']}: give one of them")
    return {"meta_gradient": said}


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


def what_is_learned(config: Config) -> dict[str, Any]:
    """The settings that decide what is learned up to an iteration, to rounding."""
    others = {n for n, flag in CONFIG_FLAGS.items() if flag.group in ("machine", "logging", "evaluation")}
    kept = (CONFIG_FLAGS.keys() - others | {"precision"}) - {"iterations"}
    return {name: getattr(config, name) for name in kept}


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
    given |= _meta_gradient_from_first_order(given)
    if given.get("iterations", saved.iterations) != saved.iterations and saved.meta_lr_schedule != "constant":
        raise UsageError(
            f"--iterations {_show(given['iterations'])}: the {saved.meta_lr_schedule} schedule of the "
            f"checkpoint ends at iteration {_show(saved.iterations)}: leave it out"
        )
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
    check(config, given, testing=evaluate)
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


def check(config: Config, given: Mapping[str, Any], *, testing: bool = False) -> None:
    """Raises UsageError where settings do not go together, or a given flag means nothing here.

    With `testing`, the sizes of tasks are those of a test, and what concerns training alone is passed over.
    """
    learner = LEARNERS[config.learner]
    if learner.regression == config.classification:
        fitting = [name for name, facts in LEARNERS.items() if facts.regression != learner.regression]
        raise UsageError(
            f"--learner {config.learner} does not fit --dataset {config.dataset}: use {' or '.join(fitting)}"
        )
    for name in given:
        only = ALL_FLAGS[name].only
        place = ONLY[only](config) if only else None
        if place:
            raise UsageError(f"{ALL_FLAGS[name].names[0]} means nothing with {place}: leave it out")
    if config.init == "paper" and learner.init != "paper":
        raise UsageError(f"--init paper: {config.learner} is not a network of the paper; use torch")
    if config.test_steps > config.eval_steps:
        raise UsageError(f"--test-steps {config.test_steps} is above --eval-steps {config.eval_steps}")
    if not testing:
        _check_algorithm(config, given)
    if config.classification:
        _check_omniglot(config, testing=testing)


def _unless(applies: Callable[[Config], bool], name: str) -> Callable[[Config], str | None]:
    """None where it applies; else the setting with which a flag means nothing, as it is written."""

    def place(config: Config) -> str | None:
        if applies(config):
            return None
        value = getattr(config, name)
        return value if name == "dataset" else f"{CONFIG_FLAGS[name].names[0]} {value}"

    return place


# Where a flag means something: the place where it does not, or None.
ONLY: dict[str, Callable[[Config], str | None]] = {
    "regression": _unless(lambda c: not c.classification, "dataset"),
    "classification": _unless(lambda c: c.classification, "dataset"),
    "batch norm": _unless(lambda c: c.has_batch_norm, "learner"),
    "convolutions": _unless(lambda c: LEARNERS[c.learner].convolutional, "learner"),
    "head": _unless(lambda c: c.adapt in ("head", "body"), "adapt"),
    "context": _unless(lambda c: c.adapt == "context", "adapt"),
    "learned rates": _unless(lambda c: c.inner_rates != "fixed", "inner_rates"),
    "exact": _unless(lambda c: c.meta_gradient == "exact", "meta_gradient"),
    "implicit": _unless(lambda c: c.meta_gradient == "implicit", "meta_gradient"),
    "conjugate gradients": lambda c: (
        _unless(lambda c: c.meta_gradient == "implicit", "meta_gradient")(c)
        or _unless(lambda c: c.cg_steps > 0, "cg_steps")(c)
    ),
    "engines": _unless(lambda c: c.meta_gradient in ("exact", "first-order"), "meta_gradient"),
    "multi-step": _unless(lambda c: c.objective == "multi-step", "objective"),
    "momentum": _unless(lambda c: c.inner_optimizer == "momentum", "inner_optimizer"),
    "adam": _unless(lambda c: c.inner_optimizer == "adam", "inner_optimizer"),
    "schedule": _unless(lambda c: c.meta_lr_schedule != "constant", "meta_lr_schedule"),
    "norm that can adapt": lambda c: (
        _unless(lambda c: c.has_batch_norm, "learner")(c)
        or _unless(lambda c: c.adapt in ("all", "body") or (c.adapt == "head" and bool(c.head)), "adapt")(c)
        or ("--norm-per-step" if c.norm_per_step else None)
    ),
}


def _check_algorithm(config: Config, given: Mapping[str, Any]) -> None:
    """Refuses choices that do not go together, with the reason."""
    way = f"--meta-gradient {config.meta_gradient}"
    rates = f"--inner-rates {config.inner_rates}"
    per_step = config.has_batch_norm and (config.batch_norm == "per-step" or config.norm_per_step)
    per_step_flag = "--norm-per-step" if config.norm_per_step else "--batch-norm per-step"
    learned = config.inner_rates != "fixed"
    multi_step = config.objective == "multi-step"
    implicit, reptile, joint = (config.meta_gradient == name for name in ("implicit", "reptile", "joint"))
    refusals = [
        (implicit and learned, f"{rates}: the solution that {way} asks for does not depend on the rates"),
        (
            multi_step and config.steps == 1 and "objective" in given,
            "--objective multi-step: with one inner step (-s) the last is the only one",
        ),
        (implicit and multi_step, f"--objective multi-step: {way} looks at the end of the inner loop alone"),
        (implicit and per_step, f"{per_step_flag}: {way} needs the same support loss in every step"),
        (implicit and config.inner_batch, f"--inner-batch: {way} needs the same support loss in every step"),
        (implicit and not config.proximal, f"{way} needs a --proximal above 0: the problem it solves"),
        (reptile and learned, f"{rates}: {way} gives the rates no gradient"),
        (reptile and multi_step, f"--objective multi-step: {way} has no query loss"),
        (
            reptile and config.adapt != "all",
            f"--adapt {config.adapt}: {way} moves only what the inner loop adapts, the rest would not learn",
        ),
        (reptile and per_step, f"{per_step_flag}: {way} moves only what the inner loop adapts"),
        (
            reptile and config.has_batch_norm and not config.adapt_norm,
            f"--no-adapt-norm: {way} moves only what the inner loop adapts; the shift would never learn",
        ),
        (joint and learned, f"{rates}: {way} has no inner loop that rates could learn from"),
        (joint and multi_step, f"--objective multi-step: {way} has no inner loop"),
        (joint and per_step, f"{per_step_flag}: {way} has no inner loop"),
        (joint and config.inner_batch, f"--inner-batch: {way} has no inner loop"),
        (
            joint and config.adapt == "context",
            f"--adapt context: {way} has no inner loop that the context's weights could learn from",
        ),
        (
            config.inner_lr_max is not None and learned and config.inner_lr_max <= config.inner_lr,
            f"--inner-lr-max {config.inner_lr_max} is not above --inner-lr {config.inner_lr}",
        ),
        (
            reptile and config.training_shots < 1,
            f"--train-shots {config.train_shots} must be above -q {config.queries}, which {way} counts in",
        ),
        (
            "autotune" in given
            and given["autotune"]
            and (implicit or reptile or joint)
            and not LEARNERS[config.learner].convolutional,
            f"--autotune: {way} with --learner {config.learner} leaves nothing to choose",
        ),
        (
            reptile and config.batch_norm == "inductive" and config.has_batch_norm,
            f"--batch-norm inductive: {way} does not learn from a query of its own",
        ),
        (
            joint and config.batch_norm == "inductive" and config.has_batch_norm,
            f"--batch-norm inductive: {way} takes support and query as one batch",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise UsageError(reason)


def _check_omniglot(config: Config, *, testing: bool) -> None:
    needed = {f"-k {config.shots} plus -q {config.queries}": config.shots + config.queries}
    if config.train_shots is not None and not testing:
        reptile = config.meta_gradient == "reptile"
        query = "" if reptile else f" plus -q {config.queries}"
        name = f"--train-shots {config.train_shots}{query}"
        needed[name] = config.train_shots + (0 if reptile else config.queries)
    for name, drawings in needed.items():
        if drawings > OMNIGLOT_DRAWINGS:
            raise UsageError(
                f"{name} is {drawings}, but an Omniglot character has {OMNIGLOT_DRAWINGS} drawings"
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
        (
            call.baselines and not (call.eval and call.load),
            "--baselines is measured beside a checkpoint: give --eval and --load",
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
        if isinstance(values.get("first_order"), bool):  # the name of the choice, when it had two values
            older["meta_gradient"] = "first-order" if values["first_order"] else "exact"
            values = {name: value for name, value in values.items() if name != "first_order"}
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
        if declaration.only is None or ONLY[declaration.only](config) is None
    }


def describe(config: Config) -> str:
    """The settings that mean something, a line a group."""
    values = meaningful(config)
    lines = []
    for group in GROUPS:
        shown = [
            f"{name.replace('_', ' ')} {value if name == 'seed' else _show(value)}"
            for name, value in values.items()
            if CONFIG_FLAGS[name].group == group and value is not None
        ]
        if shown:
            text = textwrap.fill(" · ".join(shown), 96, subsequent_indent=" " * 14)
            lines.append(f"  {group:<11} {text}")
    return "\n".join(lines)
