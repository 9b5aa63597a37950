"""Declare the options of meta-training: outer loop, logging, machine. The standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

from common.choices import CONVOLUTIONS, ENGINES
from common.options import BY_RULE, above_zero, at_least, expect, flag, not_negative, seed_range

META_OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "linear", "cosine", "halving")
ENDING = ("linear", "cosine")  # those that reach their end with the last iteration
TRACKERS = ("tensorboard", "wandb", "trackio")
check_trackers = expect(
    f"some of {', '.join(TRACKERS)}, with commas between", lambda text: {*text.split(",")} <= {*TRACKERS}
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The outer loop, what it records, and how the machine computes it."""

    # fmt: off
    meta_batch_size: int = flag(
        "--meta-batch-size", group="outer loop", check=at_least(1), metavar="TASKS", common=True,
        help="tasks per iteration")
    iterations: int = flag(
        "--iterations", group="outer loop", check=at_least(1), metavar="N", free_on_resume=True, common=True,
        help="meta-gradient steps")
    meta_lr: float = flag(
        "--meta-lr", group="outer loop", check=above_zero, metavar="RATE", default=1e-3, common=True,
        help="learning rate of the outer loop; with a schedule, at its first iteration")
    meta_optimizer: str = flag(
        "--meta-optimizer", group="outer loop", choices=META_OPTIMIZERS, default="adam",
        help="update rule of the meta-parameters")
    meta_lr_schedule: str = flag(
        "--meta-lr-schedule", group="outer loop", choices=SCHEDULES, default="constant",
        help="course of the learning rate: over --iterations, or halved again and again")
    meta_lr_final: float = flag(
        "--meta-lr-final", group="outer loop", check=not_negative, metavar="RATE", default=0.0,
        only="schedule", help="learning rate at the end of a linear or cosine schedule")
    meta_lr_halving: int = flag(
        "--meta-lr-halving", group="outer loop", check=at_least(1), metavar="N", default=2000, only="halving",
        help="iterations after which the learning rate is halved")
    grad_clip: float | None = flag("--grad-clip", group="outer loop", check=above_zero, metavar="X",
        help="clip each element of the meta-gradient to +-X, as the paper does on mini-ImageNet")
    grad_clip_norm: float | None = flag(
        "--grad-clip-norm", group="outer loop", check=above_zero, metavar="X", default=None,
        help="clip the meta-gradient to norm X")
    exact_from: int = flag(
        "--exact-from", group="outer loop", check=at_least(0), metavar="N", default=0, only="exact",
        help="use first order in the first N iterations, the exact meta-gradient afterwards (MAML++)")
    msl_iterations: int = flag(
        "--msl-iterations", group="outer loop", check=at_least(1), metavar="N", default=5000,
        only="multi-step",
        help="iterations in which the multi-step weights move to the last step, in ten stages")
    on_nan: str = flag(
        "--on-nan", group="outer loop", choices=("stop", "skip"), default="stop", free_on_resume=True,
        help="after a non-finite loss or update: stop with the last good state saved, or skip the iteration")
    seed: int = flag("--seed", group="outer loop", check=seed_range, default=0, metavar="SEED", common=True,
        help="seed of the initial weights and of the training tasks")

    log_every: int = flag("--log-every", group="logging", check=at_least(1), metavar="N", free_on_resume=True,
        help="iterations per point of the training curves")
    val_every: int = flag("--val-every", group="logging", check=at_least(1), metavar="N", free_on_resume=True,
        help="iterations between validations")
    val_tasks: int = flag("--val-tasks", group="logging", check=at_least(1), metavar="TASKS", default=200,
        help="validation tasks, the same at each validation; fewer save time with a large network")
    report_to: str = flag(
        "--report-to", group="logging", check=check_trackers, metavar="NAMES", default="tensorboard",
        suggestions=TRACKERS, joint=",", free_on_resume=True, free_on_eval=True,
        help="where curves, pictures, settings and results go: some of tensorboard, wandb and trackio, with "
        "commas between; with --eval --load: add the result to the run's log there")
    save_every: int = flag(
        "--save-every", group="logging", check=at_least(1), metavar="N", free_on_resume=True,
        help="iterations between savings of last.pt, which is saved every 10 minutes as well")

    precision: str = flag(
        "--precision", group="machine", default="float32",
        choices=("float64", "float32", "tf32", "bf16-products", "bf16"),
        free_on_eval=True, common=True, metavar="TYPE",
        help="the learner's arithmetic: float32, float64, bf16; or float32 whose products round their "
        "inputs: tf32 (CUDA), bf16-products (CPUs with AMX); meta-parameters, fast weights, losses and the "
        "optimizer stay in float32 at least")
    compile: str = flag(
        "--compile", group="machine", choices=("auto", "on", "off"), default=BY_RULE, common=True,
        help="compile the whole iteration, or with --eval the predictions; auto: with a built-in learner, in "
        "runs of at least 10,000 iterations (classification 1,500) and in very large evaluations")
    engine: str = flag(
        "--engine", group="machine", choices=("auto", *ENGINES), default=BY_RULE, only="engines",
        help="how the same meta-gradient is computed: unrolled through the whole inner loop, or adjoint, "
        "step by step in memory that hardly grows with -s; auto: adjoint in classification with -s above 1, "
        "unless the end of a built-in learner alone is adapted (ANIL, CAVIA)")
    convolution: str = flag(
        "--conv", group="machine", choices=("auto", *CONVOLUTIONS), default=BY_RULE, only="convolutions",
        help="convolutions as matrix products over patches, or as one convolution grouped over tasks; "
        "auto: im2col if compiled")
    vectorise: bool = flag("--vectorise", group="machine", default=True,
        help="compute all tasks at once; --no-vectorise: one after another, for a learner that "
        "torch.func.vmap cannot handle")
    tasks_at_once: int | None = flag(
        "--tasks-at-once", group="machine", check=at_least(1), metavar="N", default=BY_RULE,
        free_on_resume=True, free_on_eval=True, common=True,
        help="take tasks in chunks of N, which bounds memory; the result is the same to rounding "
        "(default: all, or what fits the cache)")
    # fmt: on
