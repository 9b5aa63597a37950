"""The tool's insides, for scripts that time or measure less than a whole command.

This module and the few lines that call a `MAML` alone follow the tool's Python API.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness  # noqa: F401  (puts the repository on the path)
from torch import Tensor, nn
from torch.nn import functional as F

from commands.adapt import load as load
from commands.build import Start
from commands.build import assemble as assemble_run
from commands.call import check_call
from commands.parser import parse
from commands.resolve import resolve
from common.batch import TaskBatch as TaskBatch
from common.batch import TaskDistribution
from common.choices import Choices
from common.optimizers import Weights
from common.processes import ALONE, World
from common.processes import join as join
from evaluation.meta_test import Evaluation as Evaluation
from evaluation.meta_test import evaluate as evaluate
from learner import build_learner
from learners.elementary import Elementary as Elementary
from maml import MAML, SQUARE
from training.checkpoint import Progress, save_checkpoints
from training.checkpoint import load_checkpoint as load_checkpoint
from training.compiler import Compiler, load_library
from training.folders import BEST
from training.meta_gradients import make_meta_gradient as make_meta_gradient
from training.step import CudaGraph as CudaGraph
from training.trainer import TRIES as TRIES
from training.trainer import Trainer


@dataclass(frozen=True)
class Assembly:
    """A run as main.py assembles it from flags, without a folder."""

    maml: MAML
    distribution: TaskDistribution
    parameters: Weights  # initial meta-parameters
    advance: Callable[[int], None]  # takes that many iterations, and waits for the last
    trainer: Trainer


def assemble(flags: Sequence[str], world: World = ALONE, seeds: int = 1) -> Assembly:
    """Assemble the run of these flags, or of several seeds; the first iteration waits for the compiler."""
    settings = parse(list(flags))
    call, first = check_call(settings), settings.get("seed", 0)
    assemblies = [
        assemble_run(Start(resolve(one)), Path(), one, "", call, world, checked={}, team=world)
        for one in (settings | {"seed": first + number} for number in range(seeds))
    ]
    parts, runs = assemblies[0], [assembly.run for assembly in assemblies]
    config, compiler = parts.start.config, Compiler(parts.runtime.device)
    training_tasks = parts.distribution.resized(config.training_shots)
    trainer = Trainer(runs, parts.maml, training_tasks, parts.distribution, compiler, world, show=False)
    compiler.active = config.training.compile == "on"

    def advance(iterations: int) -> None:
        for _ in range(iterations):
            trainer.step()
        trainer.state.sums.tolist()  # waits

    return Assembly(parts.maml, parts.distribution, parts.run.parameters, advance, trainer)


@contextmanager
def time_libraries() -> Iterator[list[float]]:
    """Yield a list to which each call of a library loaded in the block adds its seconds (on a CPU)."""
    seconds: list[float] = []

    def load(path: Path, structure: Any) -> Callable[[list[Tensor]], Any]:
        library = load_library(path, structure)

        def run(tensors: list[Tensor]) -> Any:
            begin = time.perf_counter()
            outputs = library(tensors)
            seconds.append(time.perf_counter() - begin)
            return outputs

        return run

    with patch("training.compiler.load_library", load):
        yield seconds


def make_learner(name: str, outputs: int, inputs: tuple[int, ...], **arguments: Any) -> nn.Module:
    """Return a base learner by name, for examples of the shape `inputs`."""
    return build_learner(name, outputs, inputs=inputs, arguments=arguments)


def make_maml(learner: nn.Module, **options: Any) -> MAML:
    """Return the algorithm with the loss of the learner's task: one output is regression.

    Args:
        options: choices, or arguments of `MAML`, by name.
    """
    outputs = [module for module in learner.modules() if isinstance(module, nn.Linear)][-1].out_features
    loss = F.mse_loss if outputs == 1 else F.cross_entropy
    names = {choice.name for choice in fields(Choices)} & options.keys()
    choices = Choices(**{"inner_lr": 0.01} | {name: options.pop(name) for name in names})
    return MAML(learner, loss, choices, **options)


def copy_initialisation(run: Path, folder: Path) -> dict[str, Any]:
    """Copy a run's best checkpoint without its optimizer's state; return facts about it."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(run / BEST)
    weights = replace(checkpoint, exp_avg={}, exp_avg_sq={}, progress=vars(Progress()))
    save_checkpoints({folder / BEST: weights})
    parameters = (w.numel() for name, w in checkpoint.parameters.items() if not name.startswith(SQUARE))
    return {
        "iteration": checkpoint.iteration,
        "dataset": checkpoint.settings["dataset"],
        "test_steps": checkpoint.settings["test_steps"],
        "parameters": sum(parameters),
    }
