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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from commands.names import (
    a_dataset,
    a_learner,
    a_loss,
    augmentations,
    column_names,
    one_or_three,
    three_shares,
)
from commands.presets import (
    ALGORITHMS,
    CHUNK_IMAGES,
    COMPILED_FROM,
    DATA_KINDS,
    DATASETS,
    DEFAULT_COLUMNS,
    DEFAULTS,
    LEARNERS,
    OMNIGLOT_CLASSES,
    OMNIGLOT_DRAWINGS,
    OTHER_LEARNER,
    REGRESSION,
    ByData,
    data_facts,
    default_column,
    is_classification,
    is_own_code,
    learner_facts,
)
from common import choices
from common.errors import UsageError
from common.options import (
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
    key_and_value,
    key_and_values,
    minutes,
    not_negative,
    seed_range,
)

MOST_SHOWN = 6  # values of a setting, of many runs
MOST_POINTS = 100_000  # of a curve, which checkpoints and TensorBoard keep
MOST_STEPS = 100_000  # of the inner loop
OWN_CODE = ("learner", "dataset", "loss")  # the settings that may name the user's code


# ---- the flags -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """An experiment, every default resolved."""

    dataset: str = flag(
        "--dataset", group="tasks", kind=str, check=a_dataset, default="sinusoid", metavar="NAME",
        help=f"the family of tasks: {', '.join(DATASETS)}; images:FOLDER with a folder per class, "
        "table:FILE (CSV or Parquet), or a factory in your own code: package.module:factory, file.py:factory",
    )  # fmt: skip
    dataset_args: tuple[str, ...] = flag(
        "--dataset-args", group="tasks", kind=tuple, check=key_and_value, metavar="NAME=VALUE", default=(),
        before=(), only="own data", help="arguments of your own dataset's factory",
    )  # fmt: skip
    task_type: str | None = flag(
        "--task-type", group="tasks", kind=str, choices=("regression", "classification"), default=None,
        before=None, only="any targets", optional=True,
        help="what the targets of a table or of your own dataset are; by default regression, or "
        "classification where -n is given",
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
        "--noise", group="tasks", kind=float, check=not_negative, metavar="STD", only="curves",
        default=0.0, help="standard deviation of Gaussian noise on the targets",
    )  # fmt: skip
    omniglot_split: str = flag(
        "--omniglot-split", group="tasks", kind=str, choices=tuple(OMNIGLOT_CLASSES),
        only="omniglot", default="random",
        help="characters of training, validation and test: 1,100 / 100 / 423 from one fixed shuffle, "
        "or the original background / evaluation alphabets (806 / 158 / 659)",
    )  # fmt: skip
    resize: str = flag(
        "--resize", group="tasks", kind=str, choices=("lanczos", "nearest"), only="any images",
        default="lanczos",
        help="how images come to their size; nearest is what the paper's script really does to Omniglot",
    )  # fmt: skip
    image_size: int | None = flag(
        "--image-size", group="tasks", kind=int, check=at_least(1), metavar="PIXELS", only="images",
        default=BY_DATASET, optional=True, before=None, help="height and width that images are brought to",
    )  # fmt: skip
    channels: int | None = flag(
        "--channels", group="tasks", kind=int, check=one_or_three, metavar="{1,3}", only="images",
        default=BY_DATASET, optional=True, before=None, help="grey images, or colour",
    )  # fmt: skip
    invert: bool = flag(
        "--invert", group="tasks", kind=bool, default=BY_DATASET, before=False, only="any images",
        help="exchange black and white, so that ink on paper is 1",
    )  # fmt: skip
    quarter_turns: bool = flag(
        "--quarter-turns", group="tasks", kind=bool, default=False, before=False, only="images",
        help="turn each class of a task by a random multiple of 90 degrees, in every split, as Omniglot's",
    )  # fmt: skip
    augment: str | None = flag(
        "--augment", group="tasks", kind=str, check=augmentations, metavar="NAMES", default=None,
        before=None, only="images", optional=True,
        help="change each training image at random: some of flip, crop, rotate, with commas between",
    )  # fmt: skip
    split_shares: str = flag(
        "--split-shares", group="tasks", kind=str, check=three_shares, metavar="A,B,C", default="64,16,20",
        before="64,16,20", only="files",
        help="shares of training, validation and test in the classes of a folder, or in the tasks of a "
        "table, that has no split of its own",
    )  # fmt: skip
    split_seed: int = flag(
        "--split-seed", group="tasks", kind=int, check=seed_range, default=0, before=0, only="files",
        help="of that split",
    )  # fmt: skip
    task_column: str = flag(
        "--task-column", group="tasks", kind=str, metavar="NAME", default="task", before="task", only="table",
        help="the column of a table that says which task a row belongs to",
    )  # fmt: skip
    target_columns: str = flag(
        "--target-columns", group="tasks", kind=str, check=column_names, metavar="NAMES", default="y",
        before="y", only="table", help="the columns of the targets, with commas between",
    )  # fmt: skip
    input_columns: str | None = flag(
        "--input-columns", group="tasks", kind=str, check=column_names, metavar="NAMES", default=None,
        before=None, only="table", optional=True,
        help="the columns of the inputs; by default all others, but one named split",
    )  # fmt: skip
    oracle: bool = flag(
        "--oracle", group="tasks", kind=bool, default=False, before=False, only="curves",
        help="tell the learner the task: its parameters (amplitude, phase, ...) join the inputs; a baseline",
    )  # fmt: skip
    train_shots: int | None = flag(
        "--train-shots", group="tasks", kind=int, check=at_least(1), metavar="SHOTS", default=None,
        optional=True, before=None,
        help="support examples of a training task where they are not -k; with the Reptile meta-gradient all "
        "its examples, query included, by default k + q",
    )  # fmt: skip

    learner: str = flag(
        "--learner", group="learner", kind=str, check=a_learner, metavar="NAME",
        help="mlp: 1-40-40-1; conv: four stride-2 convolutions of 64; conv-flat: the same, flattened; "
        "conv-pool: with max pooling; conv4: with max pooling, of 32, flattened; convnet: unpadded and "
        "flattened; fc: 256-128-64-64; torchvision:MODEL; or a factory in your own code: "
        "package.module:factory, file.py:factory",
    )  # fmt: skip
    learner_args: tuple[str, ...] = flag(
        "--learner-args", group="learner", kind=tuple, check=key_and_value, metavar="NAME=VALUE", default=(),
        before=(), help="arguments of the learner's factory",
    )  # fmt: skip
    init: str = flag(
        "--init", group="learner", kind=str, choices=("paper", "torch"), default=BY_LEARNER,
        help="initial weights: the paper's, or PyTorch's defaults",
    )  # fmt: skip
    loss: str = flag(
        "--loss", group="learner", kind=str, check=a_loss, metavar="NAME", default=BY_RULE, before=None,
        help="mse, cross-entropy, bce (binary cross-entropy of logits), huber, or a function in your own "
        "code: package.module:function, file.py:function; auto: mse, or cross-entropy in classification",
    )  # fmt: skip
    loss_args: tuple[str, ...] = flag(
        "--loss-args", group="learner", kind=tuple, check=key_and_value, metavar="NAME=VALUE", default=(),
        before=(), help="arguments of the loss",
    )  # fmt: skip
    algorithm: str = flag(
        "--algorithm", group="algorithm", kind=str, choices=tuple(ALGORITHMS), default="maml",
        before="maml",
        help="a preset of the choices in this group and of its paper's settings; each has its own flag, "
        "which comes first",
    )  # fmt: skip
    fast_weights: str = flag(
        "--fast-weights", group="algorithm", kind=str, choices=choices.FAST_WEIGHTS, default="all",
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
    head_init: str = flag(
        "--head-init", group="algorithm", kind=str, choices=choices.HEAD_INITS, default="learned",
        before="learned",
        help="the head before the first inner step: meta-learned; zero; or a prototype classifier from the "
        "support set (Proto-MAML). The latter two allow another number of classes (-n) at test",
    )  # fmt: skip
    context_size: int = flag(
        "--context-size", group="algorithm", kind=int, check=at_least(1, 100_000), metavar="N", default=5,
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
        "--cg-steps", group="algorithm", kind=int, check=at_least(0, MOST_STEPS), metavar="N", default=5,
        before=5, only="implicit", help="steps of conjugate gradients; 0 is first order",
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
        "-s", group="inner loop", kind=int, check=at_least(1, MOST_STEPS), metavar="STEPS",
        help="inner gradient steps while training",
    )  # fmt: skip
    inner_lr: float = flag(
        "--inner-lr", group="inner loop", kind=float, check=above_zero, metavar="RATE",
        help="learning rate of the inner loop, on the mean loss of the support set",
    )  # fmt: skip
    inner_optimizer: str = flag(
        "--inner-optimizer", group="inner loop", kind=str, choices=choices.INNER_OPTIMIZERS,
        default="sgd", before="sgd",
        help="update rule of the inner loop; each task begins afresh, but for --inner-carry",
    )  # fmt: skip
    inner_momentum: float = flag(
        "--inner-momentum", group="inner loop", kind=float, check=below_one, metavar="X", default=0.9,
        before=0.9, only="momentum", help="of the momentum rule",
    )  # fmt: skip
    inner_carry: bool = flag(
        "--inner-carry", group="inner loop", kind=bool, default=False, before=False, only="carried",
        help="Adam's second moments go on from task to task, as in the code of Reptile's authors, instead of "
        "beginning at zero",
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
        "--grad-clip", group="outer loop", kind=float, check=above_zero, metavar="X", optional=True,
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
        "iterations (classification 1,500), with a learner of ours",
    )  # fmt: skip
    compile_after: int = flag(
        "--compile-after", group="machine", kind=int, check=at_least(0), metavar="N", before=0,
        help="iterations that run uncompiled at first, to show at once that the run is well",
    )  # fmt: skip
    vectorise: bool = flag(
        "--vectorise", group="machine", kind=bool, default=True, before=True,
        help="take tasks all at once; without, one after another, for a learner that cannot be vectorised: "
        "slower and as exact",
    )  # fmt: skip
    images_on: str = flag(
        "--images-on", group="machine", kind=str, choices=("auto", "device", "host"), default="auto",
        before="auto", only="images", free_on_resume=True, free_on_eval=True,
        help="keep images on the device, or in a memory map on the host from where tasks are fetched ahead; "
        "auto: on the device where they take less than half of its free memory",
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
        default=BY_RULE, before=None, optional=True, free_on_resume=True, free_on_eval=True,
        help="take the tasks of an iteration, a validation or a test in chunks of N, which bounds memory; "
        "the result is the same to rounding. By default all at once, or, of compiled convolutions, what fits "
        "a CPU's cache",
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

    save_every_minutes: float = flag(
        "--save-every-minutes", group="logging", kind=float, check=minutes, metavar="MINUTES", default=10.0,
        before=10.0, free_on_resume=True, help="time after which last.pt is saved in any case",
    )  # fmt: skip
    on_nan: str = flag(
        "--on-nan", group="outer loop", kind=str, choices=("stop", "skip"), default="stop", before="stop",
        free_on_resume=True,
        help="what to do where the loss or what it leads to is not finite: stop, with the state before it "
        "saved; or leave the iteration out, and go on",
    )  # fmt: skip

    eval_tasks: int = flag(
        "--eval-tasks", group="evaluation", kind=int, check=at_least(2), metavar="TASKS",
        default=600, free_on_resume=True, free_on_eval=True, help="test tasks",
    )  # fmt: skip
    eval_steps: int = flag(
        "--eval-steps", group="evaluation", kind=int, check=at_least(1, MOST_STEPS), metavar="STEPS",
        default=10, free_on_resume=True, free_on_eval=True,
        help="measure after 0, 1, ... STEPS inner steps",
    )  # fmt: skip
    test_steps: int = flag(
        "--test-steps", group="evaluation", kind=int, check=at_least(1, MOST_STEPS), metavar="STEPS",
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
        return is_classification(self.dataset, self.task_type)

    @property
    def has_batch_norm(self) -> bool:
        return learner_facts(self.learner).adapt_norm is not None

    @property
    def task_size(self) -> str:
        """Ways and shots in words."""
        return f"{self.ways}way-{self.shots}shot" if self.classification else f"{self.shots}shot"

    @property
    def task_words(self) -> str:
        """The same, as titles have it."""
        return f"{self.ways}-way {self.shots}-shot" if self.classification else f"{self.shots}-shot"

    @property
    def dataset_name(self) -> str:
        """The dataset in a name of a file."""
        return _as_name(self.dataset)

    @property
    def learner_name(self) -> str:
        """The learner in a name of a file."""
        return _as_name(self.learner)


def _as_name(name: str) -> str:
    """Without what a name of a file may not hold: of a path its last part, of code the factory."""
    kind, colon, rest = name.partition(":")
    if not colon:
        return name
    last = name.rpartition(":")[2] if is_own_code(name) else f"{kind}-{Path(rest).stem or 'data'}"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in last)[:60]


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
    compare: tuple[str, ...] = flag(
        "--compare", group="what to do", kind=tuple, metavar="RUN", default=(),
        help="set runs side by side: learning curves, and paired differences on the same tasks. The folder "
        "of a run, a checkpoint, or a folder of many runs; the seeds of a setting are taken together",
    )  # fmt: skip
    split: str = flag(
        "--split", group="evaluation", kind=str, choices=("validation", "test"), default="validation",
        help="with --compare: the tasks to measure on. Choose between runs on validation tasks, and measure "
        "the choice on test tasks",
    )  # fmt: skip
    adapt: Path | None = flag(
        "--adapt", group="what to do", kind=Path, metavar="PATH", default=None, optional=True,
        help="with --load: adapt to a task of your own and predict. A folder with support/<class>/ and "
        "query/ full of images, or a table in which some targets are missing",
    )  # fmt: skip
    save_weights: Path | None = flag(
        "--save-weights", group="files", kind=Path, metavar="FILE", default=None, optional=True,
        help="with --adapt: also write the adapted weights, a state_dict for the learner",
    )  # fmt: skip
    eval_dataset: str | None = flag(
        "--eval-dataset", group="tasks", kind=str, check=a_dataset, metavar="NAME", default=None,
        optional=True,
        help="with --eval --load, or --compare --split test: take the test tasks from another dataset; all "
        "of its classes are for test where it has no split of its own",
    )  # fmt: skip
    load: Path | None = flag(
        "--load", group="what to do", kind=Path, metavar="FILE", default=None, optional=True,
        help="the checkpoint to evaluate or to use, or, without --eval and --adapt, to go on with; or its "
        "run's folder, which stands for best.pt, or for last.pt to go on",
    )  # fmt: skip
    seeds: str | None = flag(
        "--seeds", group="what to do", kind=str, metavar="LIST", default=None, optional=True,
        help="train a run of each of these seeds at once, as 0-7 or 0,3,5-9; --eval --load takes the folder",
    )  # fmt: skip
    sweep: tuple[str, ...] = flag(
        "--sweep", group="what to do", kind=tuple, check=key_and_values, metavar="FLAG=A,B,...", default=(),
        help="train a run of each value of a flag, or of each combination of several flags' values and seeds",
    )  # fmt: skip
    runs_at_once: int | None = flag(
        "--runs-at-once", group="machine", kind=int, check=at_least(1), metavar="N", default=None,
        optional=True,
        help="of --seeds and --sweep, which bounds memory; 1: one after another. By default all that differ "
        "in numbers alone, but compiled runs on images one after another",
    )  # fmt: skip
    resume: bool = flag(
        "--resume", group="what to do", kind=bool, default=False,
        help="go on with the run of this --run-name if it has a checkpoint, else begin it",
    )  # fmt: skip
    init_from: Path | None = flag(
        "--init-from", group="what to do", kind=Path, metavar="FILE", default=None, optional=True,
        help="begin a new run with the weights of a checkpoint, or of the best in a run's folder, whichever "
        "the algorithm",
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
        help="where --eval, --adapt and --compare write their results",
    )  # fmt: skip
    theme: str = flag(
        "--theme", group="files", kind=str, choices=choices.THEMES, default="light",
        help="of all pictures, TensorBoard's among them: dark ink on white, or light on dark",
    )  # fmt: skip
    data_root: Path = flag(
        "--data-root", group="files", kind=Path, metavar="FOLDER",
        default=Path(os.environ.get("MAML_DATA_ROOT") or "data"),
        help="holds omniglot-py/ and the other named sets; also from the environment variable MAML_DATA_ROOT",
    )  # fmt: skip
    device: str = flag(
        "--device", group="machine", kind=str, choices=("auto", "cpu", "cuda", "mps"),
        default="auto", help="auto takes CUDA where there is any, else the CPU",
    )  # fmt: skip
    threads: int | None = flag(
        "--threads", group="machine", kind=int, check=at_least(1, 1024), metavar="N", default=None,
        optional=True,
        help="CPU threads of a process; by default as OMP_NUM_THREADS says, else one with --learner mlp; "
        "of several processes (torchrun) each has its share of the cores",
    )  # fmt: skip
    shard: bool = flag(
        "--shard", group="machine", kind=bool, default=False,
        help="of several processes (torchrun), each keeps and updates a slice of the optimizer's state "
        "(ZeRO), for large networks",
    )  # fmt: skip
    deterministic: bool = flag(
        "--deterministic", group="machine", kind=bool, default=False,
        help="refuse operators that may give other bits for the same numbers, and have compilers and "
        "libraries choose by rule, not by measuring: on one machine the same command gives the same bits",
    )  # fmt: skip
    timeout: float = flag(
        "--timeout", group="machine", kind=float, check=minutes, metavar="MINUTES", default=10.0,
        help="how long a process waits for the others' gradients before it gives up (for data to be read and "
        "code to be compiled, at least two hours)",
    )  # fmt: skip
    autotune: bool = flag(
        "--autotune", group="machine", kind=bool, default=False,
        help="measure what --engine and --conv leave open before the first iteration, and keep the fastest",
    )  # fmt: skip


CONFIG_FLAGS = flags_of(Config)
INVOCATION_FLAGS = flags_of(Invocation)
ALL_FLAGS = CONFIG_FLAGS | INVOCATION_FLAGS
# what --compare takes beside the settings
WITH_COMPARE = frozenset(("compare", "split", "eval_dataset", "out", "data_root", "device", "threads",
                          "deterministic", "samples", "theme"))  # fmt: skip
GROUPS = (
    "what to do", "tasks", "learner", "algorithm", "inner loop", "outer loop", "evaluation", "logging",
    "files", "machine",
)  # fmt: skip


# ---- the command line ----------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Names with hyphens stay whole."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (all flags: --help)")


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)


def _default_text(name: str, declaration: Flag) -> str:
    if declaration.default is BY_DATASET and name in DEFAULTS:
        regression, few_ways, many_ways, other = map(_show, DEFAULTS[name])
        omniglot = few_ways if few_ways == many_ways else f"{few_ways}, above 10 ways {many_ways}"
        if len({few_ways, many_ways, other}) == 1:
            return few_ways if declaration.only else f"{regression}; classification {few_ways}"
        text = f"omniglot {omniglot}; other classification {other}"
        exceptions = [
            f", {learner} {getattr(facts, name)}"
            for learner, facts in LEARNERS.items()
            if getattr(facts, name, None) is not None
        ]
        if getattr(OTHER_LEARNER, name, None) is not None:
            exceptions.append(f", other learners {getattr(OTHER_LEARNER, name)}")
        return f"{'' if declaration.only else regression + '; '}{text}{''.join(exceptions)}"
    if name == "image_size":
        return "84; cifar-fs and fc100 32"
    if name == "channels":
        return "3"
    if name == "invert":
        return "no; omniglot yes"
    if name == "eval_steps":
        return f"{declaration.default}, or --test-steps where that is more"
    if name == "tasks_at_once":
        return "all, or what fits the cache"
    if declaration.default is BY_RULE:
        return "auto"
    if declaration.default is BY_LEARNER:
        values = {learner: getattr(LEARNERS[learner], name) for learner in LEARNERS}
        values["others"] = getattr(OTHER_LEARNER, name)
        return ", ".join(f"{k} {_show(v)}" for k, v in values.items() if v is not None)
    if name == "first_order":
        return "no"
    if name == "run_name":
        return "from the settings and the time"
    if name == "out":
        return "beside the checkpoint, or the first run"
    if name == "runs_at_once":
        return "by the runs"
    if name == "threads":
        return "by the learner and the machine"
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
    lines.append(f"with a learner that is not built in: --inner-lr {OTHER_LEARNER.inner_lr}")
    return "\n".join(f"  {line}" for line in lines)


def presets_table() -> str:
    """What the algorithms set, as `--help` shows it: for the columns of the defaults' table."""
    lines = []
    for algorithm, row in ALGORITHMS.items():
        cells = []
        for name, value in row.items():
            columns = [value[i] if isinstance(value, ByData) else value for i in range(4)]
            if len(set(map(str, columns[1:]))) == 1:
                columns = columns[:2]
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
        formatter_class=_Formatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["what to do"].add_argument("-h", "--help", action="help", help="show this and end")
    for name, declaration in ALL_FLAGS.items():
        text = f"{declaration.help} (default: {_default_text(name, declaration)})"
        options: dict[str, Any] = {"dest": name, "help": text.replace("%", "%%")}
        if declaration.kind is tuple:
            options |= {"nargs": "+", "action": "extend"}
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
    given = vars(build_parser().parse_args(arguments))
    for name, value in given.items():
        if value == []:  # argparse takes the argument of --flag=-- for the end of the flags
            raise UsageError(f"{ALL_FLAGS[name].names[0]}: expected an argument, got '--'")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


# ---- resolving and checking ----------------------------------------------------------------------


def resolve(given: Mapping[str, Any]) -> Config:
    """The settings of a new experiment: the flags that were given, and defaults for all others.

    A flag comes before the algorithm's preset, that before the learner's default, that before the data's.
    """
    given = dict(given) | _meta_gradient_from_first_order(given)
    values = {name: value for name, value in given.items() if name in CONFIG_FLAGS}
    dataset = values.get("dataset", CONFIG_FLAGS["dataset"].default)
    facts = data_facts(dataset)
    if facts.classification is None:
        by_ways = "regression" if values.get("ways") is None else "classification"
        values["task_type"] = values.get("task_type") or by_ways
    classification = is_classification(dataset, values.get("task_type"))
    column = default_column(classification, dataset, values.get("ways") or DEFAULTS["ways"][1])
    preset = _preset(values, given, column)
    if facts.inputs != "images" and "learner" not in given:
        preset["learner"] = "mlp"  # whatever the defaults of other classification are
    values = preset | values
    values.setdefault("learner", DEFAULTS["learner"][column])
    learner = learner_facts(values["learner"])
    for name, by_column in DEFAULTS.items():
        values.setdefault(name, by_column[column])
    values.setdefault("image_size", facts.image_size)
    values.setdefault("channels", facts.channels)
    values.setdefault("invert", facts.invert)
    values |= _queries_from_samples(given, values["shots"], classification)
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
    if "inner_carry" not in given and ONLY["carried"](config) is not None:
        config = replace(config, inner_carry=False)  # a preset's, with other choices beside it
    check(config, given)
    _check_curves(config)
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
    learner = learner_facts(values.get("learner", preset.get("learner", DEFAULTS["learner"][column])))
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
    values = {"dataset": CONFIG_FLAGS["dataset"].default, "task_type": None} | dict(values)
    regression = not is_classification(values["dataset"], values["task_type"])
    long = COMPILED_FROM["regression" if regression else "classification"]
    ours = values["learner"] in LEARNERS and values.get("vectorise", True)
    compiled = values["iterations"] >= long and ours
    automatic = {
        "loss": "mse" if regression else "cross-entropy",
        "compile": "on" if compiled else "off",
        "engine": "unrolled" if regression or values["steps"] == 1 else "adjoint",
    }
    chosen = {name: values.get(name, "auto") for name in (*automatic, "convolution")}
    settled: dict[str, Any] = {
        name: automatic[name] if chosen[name] == "auto" else chosen[name] for name in automatic
    }
    settled["convolution"] = chosen["convolution"]
    if chosen["convolution"] == "auto":
        patches = settled["compile"] == "on" and learner_facts(values["learner"]).convolutional
        settled["convolution"] = "im2col" if patches else "grouped"
    if "tasks_at_once" not in values:
        patches = settled["compile"] == "on" and settled["convolution"] == "im2col"
        settled["tasks_at_once"] = _cache_chunk(values) if patches and not regression else None
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
    if not learner_facts(values["learner"]).convolutional:
        return None
    tasks = values["meta_batch_size"]
    most = max(1, CHUNK_IMAGES // (values["ways"] * values["shots"]))
    chunk = max(size for size in range(1, min(most, tasks) + 1) if tasks % size == 0)
    if 2 * chunk < most:  # few divisors: the last chunk is a smaller one
        chunk = most
    return None if chunk >= tasks else chunk


FREE_ON_ADAPT = ("invert", "task_column", "target_columns", "input_columns")
FREE_WITH_EVAL_DATASET = ("invert", "quarter_turns", "dataset_args", "task_column", "target_columns",
                          "input_columns", "split_shares", "split_seed", "omniglot_split")  # fmt: skip


def resolve_from(
    saved: Config,
    given: Mapping[str, Any],
    *,
    evaluate: bool,
    adapt: bool = False,
    eval_dataset: str | None = None,
) -> Config:
    """The settings of a checkpoint, with the flags that may differ from it: when a run goes on, when it is
    evaluated, on test tasks of another dataset maybe, or when it is put to use (`adapt`).

    Raises UsageError for any other flag that was given and disagrees, and for code of the user's own that
    the checkpoint names and the flags do not: nothing is imported because a file says so.
    """
    _check_own_code(saved, given, without_data=adapt or eval_dataset is not None)
    changes: dict[str, Any] = {}
    shots = given.get("shots", saved.shots) if evaluate else saved.shots
    given = dict(given) | _queries_from_samples(given, shots, saved.classification)
    given |= _meta_gradient_from_first_order(given)
    if given.get("iterations", saved.iterations) != saved.iterations and saved.meta_lr_schedule != "constant":
        raise UsageError(
            f"--iterations {_show(given['iterations'])}: the {saved.meta_lr_schedule} schedule of the "
            f"checkpoint ends at iteration {_show(saved.iterations)}: leave it out"
        )
    free = set(FREE_ON_ADAPT if adapt else ()) | set(FREE_WITH_EVAL_DATASET if eval_dataset else ())
    if evaluate and saved.head_init != "learned":
        free.add("ways")
    for name, value in given.items():
        if name not in CONFIG_FLAGS:
            continue
        if adapt and name == "batch_norm":  # of the predictions: what was learned stays as it is
            continue
        declaration = CONFIG_FLAGS[name]
        if (
            name in free
            or (declaration.free_on_eval if evaluate else declaration.free_on_resume)
            or (name in OWN_CODE and _at_another_place(value, getattr(saved, name)))
        ):
            changes[name] = value
        elif declaration.default is BY_RULE and value == "auto":
            continue  # settled when the run began
        elif (name, value, saved.compile) == ("compile", "on", "off") and not evaluate:
            continue  # it could not be compiled, or was not to be: it goes on as it is
        elif value != getattr(saved, name):
            doing = "adapting" if adapt else "evaluating" if evaluate else "going on with"
            hint = ""
            if name == "ways" and evaluate:
                hint = "; a run with --head-init zero or prototype can be tested with any number of ways"
            raise UsageError(
                f"{declaration.names[0]} {_show(value)} disagrees with the checkpoint, which has "
                f"{_show(getattr(saved, name))}: leave it out when {doing} a checkpoint{hint}"
            )
    values = dataclasses.asdict(saved) | changes
    if "eval_steps" in given and "test_steps" not in given:
        values["test_steps"] = min(values["test_steps"], values["eval_steps"])
    if adapt:
        values["eval_steps"] = max(values["eval_steps"], values["test_steps"])
    config = Config(**values)
    if eval_dataset:
        config = _on_other_data(config, eval_dataset, given)
    check(config, given, testing=evaluate)
    if not evaluate:
        _check_curves(config)
    return config


def _at_another_place(name: str, saved: str) -> bool:
    """Whether two names may stand for the same code or the same files, which have moved."""
    if is_own_code(name) and is_own_code(saved):
        return name.rpartition(":")[2] == saved.rpartition(":")[2]
    kinds = [each.partition(":")[0] for each in (name, saved)]
    return kinds[0] == kinds[1] and kinds[0] in DATA_KINDS


def _check_own_code(saved: Config, given: Mapping[str, Any], *, without_data: bool) -> None:
    """Raises UsageError where the checkpoint names code that the flags do not name, too."""
    missing = [
        f"{CONFIG_FLAGS[name].names[0]} {getattr(saved, name)}"
        for name in OWN_CODE
        if is_own_code(getattr(saved, name))
        and name not in given
        and not (name == "dataset" and without_data)
    ]
    if missing:
        raise UsageError(
            f"the checkpoint names code that is not this tool's, and a file is no reason to run it: if you "
            f"trust it, add {' '.join(missing)}"
        )


_TASK_TYPES = {False: "regression", True: "classification"}


def _on_other_data(config: Config, dataset: str, given: Mapping[str, Any]) -> Config:
    """The settings for test tasks of another dataset: images of the same size, shown as they are."""
    now, then = data_facts(dataset), data_facts(config.dataset)
    places = [each if is_own_code(each) else os.path.realpath(each.partition(":")[2] or each)
              for each in (dataset, config.dataset)]  # fmt: skip
    if places[0] == places[1]:
        raise UsageError(
            f"--eval-dataset {dataset} is what the checkpoint learned from, training classes included: leave "
            "it out, and its own test tasks are taken"
        )
    if now.classification is not None and now.classification != config.classification:
        raise UsageError(
            f"--eval-dataset {dataset} is {_TASK_TYPES[now.classification]}, and the checkpoint learned "
            f"{_TASK_TYPES[config.classification]}"
        )
    if "any" not in (now.inputs, then.inputs) and now.inputs != then.inputs:
        raise UsageError(
            f"--eval-dataset {dataset} has {now.inputs}, and the checkpoint learned {then.inputs}"
        )
    image_size = config.image_size or then.image_size or now.image_size
    channels = config.channels or then.channels or now.channels
    if dataset == "omniglot" and (image_size, channels) != (28, 1):
        raise UsageError(
            f"--eval-dataset omniglot has 28 x 28 grey images, and the checkpoint learned {image_size} x "
            f"{image_size} with {channels} channels"
        )
    changes: dict[str, Any] = {
        "dataset": dataset,
        "task_type": "classification" if config.classification else "regression",
        "image_size": image_size if now.inputs == "images" else None,
        "channels": channels if now.inputs == "images" else None,
    }
    for name in FREE_WITH_EVAL_DATASET:
        default = now.invert if name == "invert" else CONFIG_FLAGS[name].default
        changes[name] = given.get(name, default)
    return dataclasses.replace(config, **changes)


def _queries_from_samples(given: Mapping[str, Any], shots: int, classification: bool) -> dict[str, int]:
    """What --samples, if it was given, says of the size of the query."""
    samples = given.get("samples")
    if samples is None:
        return {}
    if classification:
        raise UsageError("--samples counts the points of a curve: use -k and -q in classification")
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
    learner, data = learner_facts(config.learner), data_facts(config.dataset)
    if "any" not in (learner.inputs, data.inputs) and learner.inputs != data.inputs:
        fitting = [name for name, facts in LEARNERS.items() if facts.inputs == data.inputs]
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
    if config.loss == "cross-entropy" and not config.classification:
        raise UsageError("--loss cross-entropy is for classes: a regression has mse, huber, bce or your own")
    if config.loss == "mse" and config.classification:
        raise UsageError("--loss mse is for numbers: classification has cross-entropy, bce or your own")
    if config.test_steps > config.eval_steps:
        raise UsageError(f"--test-steps {config.test_steps} is above --eval-steps {config.eval_steps}")
    if not testing:
        _check_algorithm(config, given)
    if config.dataset == "omniglot":
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
    "curves": _unless(lambda c: c.dataset in REGRESSION, "dataset"),
    "regression": lambda c: f"classification ({c.dataset})" if c.classification else None,
    "classification": lambda c: None if c.classification else f"regression ({c.dataset})",
    "omniglot": _unless(lambda c: c.dataset == "omniglot", "dataset"),
    "any images": _unless(lambda c: data_facts(c.dataset).inputs == "images", "dataset"),
    "images": _unless(
        lambda c: data_facts(c.dataset).inputs == "images" and c.dataset != "omniglot", "dataset"
    ),
    "files": _unless(lambda c: c.dataset.partition(":")[0] in DATA_KINDS, "dataset"),
    "table": _unless(lambda c: c.dataset.startswith("table:"), "dataset"),
    "own data": _unless(lambda c: is_own_code(c.dataset), "dataset"),
    "any targets": _unless(lambda c: data_facts(c.dataset).classification is None, "dataset"),
    "batch norm": _unless(lambda c: c.has_batch_norm, "learner"),
    "convolutions": _unless(lambda c: learner_facts(c.learner).convolutional, "learner"),
    "head": _unless(lambda c: c.fast_weights in ("head", "body") or c.head_init != "learned", "fast_weights"),
    "context": _unless(lambda c: c.fast_weights == "context", "fast_weights"),
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
    "carried": lambda c: (
        _unless(lambda c: c.inner_optimizer == "adam", "inner_optimizer")(c)
        or _unless(lambda c: c.meta_gradient == "reptile", "meta_gradient")(c)
        or _unless(lambda c: c.meta_optimizer == "sgd", "meta_optimizer")(c)
        or _unless(lambda c: c.head_init == "learned", "head_init")(c)  # whose shape is the task's
    ),
    "schedule": _unless(lambda c: c.meta_lr_schedule != "constant", "meta_lr_schedule"),
    "norm that can adapt": lambda c: (
        _unless(lambda c: c.has_batch_norm, "learner")(c)
        or _unless(
            lambda c: c.fast_weights in ("all", "body") or (c.fast_weights == "head" and bool(c.head)),
            "fast_weights",
        )(c)
        or ("--norm-per-step" if c.norm_per_step else None)
    ),
}


def _check_algorithm(config: Config, given: Mapping[str, Any]) -> None:
    """Refuses choices that do not go together, with the reason."""
    way = f"--meta-gradient {config.meta_gradient}"
    rates = f"--inner-rates {config.inner_rates}"
    per_step = config.has_batch_norm and (config.batch_norm == "per-step" or config.norm_per_step)
    per_step_flag = "--norm-per-step" if config.norm_per_step else "--batch-norm per-step"
    head_init, head = config.head_init != "learned", f"--head-init {config.head_init}"
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
            reptile and config.fast_weights != "all",
            f"--fast-weights {config.fast_weights}: {way} moves only what the inner loop adapts, the rest "
            "would not learn",
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
            joint and config.fast_weights == "context",
            f"--fast-weights context: {way} has no inner loop that the context's weights could learn from",
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
            and not learner_facts(config.learner).convolutional,
            f"--autotune: {way} with --learner {config.learner} leaves nothing to choose",
        ),
        (
            head_init and config.fast_weights not in ("all", "head"),
            f"{head}: it needs a head that the inner loop adapts, not --fast-weights {config.fast_weights}",
        ),
        (
            head_init and config.inner_rates == "element",
            f"{head}: {rates} learns a rate for each weight of a head that is not learned; use layer-step",
        ),
        (head_init and joint, f"{head}: {way} has no inner loop that could adapt the head"),
        (
            config.head_init == "prototype" and not config.classification,
            f"{head}: prototypes are of classes, and this is regression",
        ),
        (
            config.head_init == "prototype" and config.proximal,
            f"{head}: with --proximal the tasks begin at one place, with prototypes each at its own",
        ),
        (
            not config.vectorise and config.compile == "on",
            "--no-vectorise: tasks one after another are not compiled; use --compile off",
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


def _check_curves(config: Config) -> None:
    """Raises UsageError where the curves of training or validation would have too many points."""
    wanted = -(-config.iterations // MOST_POINTS)
    fine = [name for name in ("log_every", "val_every") if getattr(config, name) < wanted]
    if fine:
        enough = " and ".join(f"{CONFIG_FLAGS[name].names[0]} {wanted}" for name in fine)
        raise UsageError(
            f"--iterations {config.iterations} makes a curve of more than {MOST_POINTS:,} points: {enough} "
            "will do"
        )


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
        (
            call.compare and (given.keys() - CONFIG_FLAGS.keys()) - WITH_COMPARE,
            "--compare measures runs that have been trained: leave out "
            + " and ".join(
                ALL_FLAGS[name].names[0] for name in given if name not in {*CONFIG_FLAGS, *WITH_COMPARE}
            ),
        ),
        ("split" in given and not call.compare, "--split is of --compare: --eval measures on test tasks"),
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
            (call.eval or call.adapt or call.compare)
            and given.keys() & {"compile", "compile_after", "engine", "convolution"},
            "--compile, --compile-after, --engine and --conv are for training: leave them out with --eval, "
            "--adapt and --compare",
        ),
        (
            call.autotune and call.deterministic,
            "--autotune measures what is fastest, and may choose otherwise the next time: leave it out with "
            "--deterministic",
        ),
        (
            call.autotune and (call.eval or call.load),
            "--autotune chooses when a run begins: leave it out with --eval and --load",
        ),
        (
            call.adapt and not call.load,
            "--adapt puts a trained checkpoint to use: name it with --load",
        ),
        (call.adapt and call.eval, "--adapt and --eval are two things: give one of them"),
        (
            call.adapt and given.keys() & {"ways", "shots", "queries", "eval_tasks", "eval_steps", "samples"},
            "-n, -k, -q, --samples, --eval-tasks and --eval-steps mean nothing with --adapt: the files say "
            "what there is; --test-steps is the number of inner steps",
        ),
        (
            (call.seeds or call.sweep) and (call.eval or call.adapt or call.load),
            "--seeds and --sweep begin runs, or go on with them with --resume: leave out --eval, --adapt and "
            "--load",
        ),
        (call.seeds and "seed" in given, "--seed and --seeds: give one of them"),
        (
            (call.seeds or call.sweep) and (call.autotune or call.shard),
            "--autotune and --shard are for one run: leave out --seeds and --sweep",
        ),
        (
            call.runs_at_once and not (call.seeds or call.sweep),
            "--runs-at-once is for many runs: give --seeds or --sweep",
        ),
        (call.save_weights and not call.adapt, "--save-weights writes adapted weights: it needs --adapt"),
        (
            call.eval_dataset and not ((call.eval and call.load) or (call.compare and call.split == "test")),
            "--eval-dataset is for testing a checkpoint: give --eval and --load, or --compare and --split "
            "test",
        ),
        (
            call.eval_dataset and "dataset" in given,
            "--dataset and --eval-dataset: give the latter alone, the checkpoint says what it learned from",
        ),
        (
            call.eval_dataset and call.baselines,
            "--baselines trains on the data of the checkpoint: leave out --eval-dataset",
        ),
        (
            call.baselines and not (call.eval and call.load),
            "--baselines is measured beside a checkpoint: give --eval and --load",
        ),
        (
            call.out and not (call.eval or call.adapt or call.compare),
            "--out is where --eval, --adapt and --compare write: it means nothing without",
        ),
        (
            call.load and call.run_name,
            "--run-name names a new run; --load takes the folder of the checkpoint",
        ),
        (
            call.load and (call.eval or call.adapt) and "checkpoint_path" in given,
            "--checkpoint-path means nothing here: results go beside the file of --load, or to --out",
        ),
        (
            call.run_name is not None
            and (
                not call.run_name.strip(". ")
                or not call.run_name.isprintable()
                or set(call.run_name) & set("/\\")
                or len(call.run_name) > 100
                or Path(call.run_name).suffix in (".pt", ".json", ".png")  # which runs call their files
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
        if "adapt" in values and "fast_weights" not in values:  # its name, before --adapt was something to do
            values = {**values, "fast_weights": values["adapt"]}
            del values["adapt"]
        if "loss" not in values:
            regression = values.get("dataset") in REGRESSION
            values = {**values, "loss": "mse" if regression else "cross-entropy"}
        if "image_size" not in values and values.get("dataset") == "omniglot":
            values = {**values, "image_size": 28, "channels": 1, "invert": True}
        values = older | values
    if not isinstance(values, dict):
        raise UsageError("its settings are missing")
    different = sorted(map(str, values.keys() ^ CONFIG_FLAGS.keys()))
    if different:
        newer = "" if values.keys() <= CONFIG_FLAGS.keys() else "; a newer one may know them"
        raise UsageError(
            f"its settings are not those of this version: {', '.join(different)!r:.60} differ{newer}"
        )
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


def in_words(config: Config, names: Iterable[str]) -> dict[str, str]:
    """Some settings as they are shown, by the names of their flags."""
    return {CONFIG_FLAGS[name].names[0]: _show(getattr(config, name)) for name in names}


def by_flag(config: Config) -> dict[str, Any]:
    """All settings, by the names of their flags."""
    return {declaration.names[0]: getattr(config, name) for name, declaration in CONFIG_FLAGS.items()}


def describe(*configs: Config) -> str:
    """The settings that mean something, a line a group; of several runs, all values of each."""
    values: dict[str, list[Any]] = {}
    for config in configs:
        for name, value in meaningful(config).items():
            found = values.setdefault(name, [])
            if value not in found:
                found.append(value)

    def all_of(name: str) -> str:
        shown = [str(value) if name == "seed" else _show(value) for value in values[name]]
        if len(shown) > MOST_SHOWN:
            return f"{shown[0]}, {shown[1]}, ... {shown[-1]} ({len(shown)} of them)"
        return ", ".join(shown)

    lines = []
    for group in GROUPS:
        shown = [
            f"{name.replace('_', ' ')} {all_of(name)}"
            for name in CONFIG_FLAGS
            if CONFIG_FLAGS[name].group == group and any(v not in (None, ()) for v in values.get(name, ()))
        ]
        if shown:
            text = textwrap.fill(" · ".join(shown), 96, subsequent_indent=" " * 14)
            lines.append(f"  {group:<11} {text}")
    return "\n".join(lines)
