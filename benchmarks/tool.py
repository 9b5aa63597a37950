"""The tool's insides, for scripts that time or measure less than a whole command.

Only this module and the few lines that call a `MAML` follow the tool's Python API.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from commands import adapt
from commands.build import build, make_run, prepare
from commands.call import check_call
from commands.parser import parse
from commands.resolve import resolve
from common.batch import TaskBatch, TaskDistribution
from common.processes import ALONE
from inner_loop import SQUARE
from learner import build_learner
from learners.elementary import Elementary as Elementary
from maml import MAML
from training.checkpoint import load_checkpoint, save_checkpoint, strip_run
from training.compiler import Compiler
from training.folders import BEST
from training.trainer import Trainer

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Assembly:
    """A run as main.py assembles it from flags, without a folder."""

    maml: MAML
    distribution: TaskDistribution
    parameters: Weights  # initial meta-parameters
    advance: Callable[[int], None]  # takes that many iterations, and waits for the last


def assemble(flags: Sequence[str]) -> Assembly:
    """Assemble the run of these flags; the first iteration waits for the compiler."""
    given = parse(list(flags))
    call, config = check_call(given), resolve(given)
    runtime = prepare(config, call, ALONE)
    compiler = Compiler(runtime.device)
    distribution, maml = build(config, call, runtime, compiler)
    parameters = maml.initial_parameters(config.training.seed)
    training_tasks = distribution.resized(config.training_shots)
    run = make_run(config, Path(), parameters, writes=False)
    trainer = Trainer([run], maml, training_tasks, distribution, compiler, show=False)
    compiler.active = config.training.compile == "on"

    def advance(iterations: int) -> None:
        for _ in range(iterations):
            trainer.state = trainer.meta_step(trainer.state, trainer.iteration)
            trainer.iteration += 1
        trainer.state.sums.tolist()  # waits

    return Assembly(maml, distribution, parameters, advance)


def make_learner(name: str, outputs: int, inputs: tuple[int, ...], **arguments: Any) -> nn.Module:
    """Return a base learner by name, for examples of the shape `inputs`."""
    return build_learner(name, outputs, inputs=inputs, arguments=arguments)


def make_maml(learner: nn.Module, *, steps: int, inner_lr: float = 0.01, **options: Any) -> MAML:
    """Return the algorithm with the loss of the learner's task: one output is regression."""
    outputs = [module for module in learner.modules() if isinstance(module, nn.Linear)][-1].out_features
    loss = F.mse_loss if outputs == 1 else F.cross_entropy
    return MAML(learner, loss, inner_lr=inner_lr, steps=steps, **options)


def noise(tasks: int, inputs: tuple[int, ...], classes: int, support: int, query: int) -> TaskBatch:
    """Return tasks of noise with `support` and `query` examples each; no classes: regression."""

    def labels(examples: int) -> Tensor:
        if not classes:
            return torch.randn(tasks, examples, 1)
        return torch.arange(examples).remainder(classes).repeat(tasks, 1)

    x = torch.randn(tasks, support + query, *inputs)
    return TaskBatch(x[:, :support], labels(support), x[:, support:], labels(query))


def load_trained(folder: Path, example: Tensor) -> tuple[MAML, Weights]:
    """Return the algorithm and the meta-parameters of a run's best checkpoint."""
    loaded = adapt.load(folder, example)
    return loaded.maml, loaded.parameters


def copy_initialisation(run: Path, folder: Path) -> dict[str, Any]:
    """Copy a run's best checkpoint without its optimizer's state; return facts about it."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(run / BEST)
    save_checkpoint(folder / BEST, strip_run(checkpoint))
    parameters = (w.numel() for name, w in checkpoint.parameters.items() if not name.startswith(SQUARE))
    settings = checkpoint.settings
    return {
        "iteration": checkpoint.iteration,
        "dataset": settings["dataset"],
        "test_steps": settings["test_steps"],
        "parameters": sum(parameters),
    }
