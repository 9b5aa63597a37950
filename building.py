"""From settings to the objects that do the work: device, tasks, algorithm. What machine and disk allow."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.nn import functional as F

import config as settings
from compiler import Compiler, cpp_compiler
from config import Config, Invocation
from dataset import TaskDistribution, build_distribution
from errors import UsageError
from learner import build_learner
from maml import MAML, as_it_is
from optimizers import InnerOptimizer
from runtime import Runtime, set_up


def prepare(config: Config, call: Invocation) -> Runtime:
    """The device, or a refusal."""
    return set_up(call.device, config.precision, small_tensors=config.learner == "mlp")


def build(
    config: Config, call: Invocation, runtime: Runtime, accelerate: Compiler | None = None
) -> tuple[TaskDistribution, MAML]:
    """Tasks and algorithm for these settings; the learner in it has its initial weights."""
    distribution = build_distribution(
        config.dataset,
        ways=config.ways,
        shots=config.shots,
        queries=config.queries,
        noise=config.noise,
        oracle=config.oracle,
        omniglot_split=config.omniglot_split,
        resize=config.resize,
        data_root=call.data_root,
        device=runtime.device,
        dtype=runtime.dtype,
    )
    learner = build_learner(
        config.learner,
        config.ways or 1,
        inputs=getattr(distribution, "input_size", 1),
        init=config.init,
        context=config.context_size if config.adapt == "context" else 0,
        seed=config.seed,
    )
    rule = InnerOptimizer(
        config.inner_lr,
        config.inner_optimizer,
        momentum=config.inner_momentum,
        beta_1=config.inner_beta_1,
        weight_decay=config.inner_weight_decay,
        clip_norm=config.inner_clip,
        proximal=config.proximal,
    )
    try:
        maml = MAML(
            learner.to(runtime.device, runtime.dtype),
            F.cross_entropy if config.classification else F.mse_loss,
            inner_lr=config.inner_lr,
            steps=config.steps,
            fast_weights=config.adapt,
            head=config.head,
            inner_rates=config.inner_rates,
            inner_lr_max=config.inner_lr_max,
            meta_gradient=config.meta_gradient,
            normalisation=config.batch_norm,
            norm_per_step=config.norm_per_step and config.has_batch_norm,
            adapt_norm=config.adapt_norm,
            optimizer=rule,
            cg_steps=config.cg_steps,
            cg_damping=config.cg_damping,
            engine=config.engine,
            convolution=config.convolution,
            compute_dtype=runtime.compute_dtype,
            tasks_at_once=config.tasks_at_once,
            accelerate=accelerate or as_it_is,
        )
    except ValueError as error:
        head = "" if config.head is None else f" --head {config.head}"
        raise UsageError(f"--adapt {config.adapt}{head} with --learner {config.learner}: {error}") from error
    return distribution, maml


def writable(folder: Path, flag: str) -> Path:
    """The folder, made if need be, or a refusal that names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: cannot write there ({error.strerror or error}); name another folder"
        ) from error
    return folder


def print_settings(config: Config, runtime: Runtime, first_line: str) -> None:
    print(f"{first_line}\n{settings.describe(config)}\n  device      {runtime.describe()}", flush=True)


def fitted(config: Config, given: Mapping[str, Any], runtime: Runtime, *, new: bool) -> Config:
    """The settings for this machine: uncompiled where it cannot compile; a GPU takes all tasks at once."""
    if new and runtime.device.type == "cuda" and "tasks_at_once" not in given:
        config = replace(config, tasks_at_once=None)
    if not new and given.get("compile") == "on" and config.compile == "off":
        print("main.py: the run began uncompiled, and goes on so", file=sys.stderr)
    if config.compile == "off":
        return config
    if runtime.device.type == "mps":
        reason = "--device mps cannot compile"
    elif cpp_compiler() is None:
        reason = "no C++ compiler was found (install g++, or name one in CXX)"
    else:
        return config
    print(f"main.py: {reason}: the run goes uncompiled", file=sys.stderr)
    if new:
        return settings.resolve({**given, "compile": "off"})
    return replace(config, compile="off")
