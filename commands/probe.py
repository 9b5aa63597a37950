"""Try out before training what may fail during it: the user's learner and loss.

`build` and `assemble` call these checks.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from commands.config import Config
from common.batch import TaskDistribution, Tree, arguments_of, first_tensor, tree_map
from common.errors import UsageError, is_out_of_memory
from common.optimizers import Weights
from common.random import keys_of, task_stream
from common.task import Extras
from learners.diagnosis import find_failure
from learners.elementary import Elementary
from learners.losses import LOSSES
from maml import MAML
from training.meta_gradients import make_meta_gradient

# By the problem that `find_failure` finds: what the layer lacks, and how to train without it.
PROBLEMS = {
    "vectorise": ("cannot be vectorised over tasks", "--no-vectorise takes the tasks one after another"),
    "second derivative": ("has no second derivative", "--first-order needs none"),
    "forward mode": ("has no derivative in forward mode", "--engine unrolled needs none"),
}


def check_outputs(learner: nn.Module, example: Tree, outputs: int, config: Config) -> None:
    """Raise UsageError where the learner fails on a task's inputs, or gives outputs of another shape.

    Args:
        example: inputs of one task, `[examples, ...]`.
        outputs: numbers per example that the learner should give.
    """
    name = f"--learner {config.learner.learner}"
    shapes = tree_map(lambda part: tuple(part.shape), example)
    positional, named = arguments_of(example)
    first = first_tensor(example)
    try:
        keys = torch.zeros(2, dtype=torch.int64, device=first.device)
        with torch.no_grad(), Elementary(keys, first):
            output = first_tensor(copy.deepcopy(learner)(*positional, **named))
    except Exception as error:  # the user's code may fail in any way
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{name} fails on the inputs of a task, {shapes}: {_in_short(error)}") from error
    expected = (len(first), outputs)
    if config.learner.loss in LOSSES and tuple(output.shape) != expected:
        raise UsageError(
            f"{name} gives outputs {tuple(output.shape)} for inputs {shapes}: they should be {expected}, "
            "[examples, outputs]"
        )


def probe_learner(maml: MAML, parameters: Weights, distribution: TaskDistribution, config: Config) -> None:
    """Compute one meta-gradient; raise UsageError that names the layer that fails, and the way round."""
    seed, learner = config.training.seed, config.learner
    tasks = distribution.resized(config.training_shots).sample("train", seed, 1, range(2))
    keys = keys_of(task_stream("train", seed, 1, range(2), first_tensor(tasks.support_x).device))
    x, y = (tree_map(lambda part: part[0], tree) for tree in (tasks.support_x, tasks.support_y))
    weights = maml.whole_weights(parameters)
    try:
        with torch.no_grad():
            maml.loss(maml.call(weights, x, Extras(keys[0]).for_pass("support")), y)
        make_meta_gradient(maml, engine=config.training.engine)(parameters, tasks, keys=keys)
    except UsageError:
        raise
    except Exception as error:  # an operator may fail in any way
        if is_out_of_memory(error):
            raise
        positional, named = arguments_of(x)
        failure = None if named else find_failure(maml.learner, weights, positional, keys[0])
        if failure is None:
            raise UsageError(
                f"--learner {learner.learner} with --loss {learner.loss} cannot be meta-trained: "
                f"{_in_short(error)}; --no-vectorise, --engine unrolled or --first-order ask less of it"
            ) from error
        lack, way_round = PROBLEMS[failure.problem]
        layer = f"its layer {failure.layer} ({failure.kind})" if failure.layer else f"{failure.kind} itself"
        text = f"--learner {learner.learner}: {layer} {lack} ({failure.reason}): {way_round}"
        raise UsageError(text) from error


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
