"""Try out before training what may fail during it: memory, processes, the user's learner and loss.

`build` and `assemble` call these checks. Each raises UsageError with one line that says what to do, where
PyTorch would raise its own error hours later, or end the process without a word.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from commands.config import Config
from common.batch import TaskBatch, TaskDistribution, Tree, arguments_of, first_tensor, tree_map
from common.device import machine_memory
from common.errors import UsageError, is_out_of_memory
from common.optimizers import Weights
from common.random import keys_of, task_stream
from common.task import Extras
from learners.diagnosis import find_failure
from learners.elementary import Elementary
from learners.losses import LOSSES
from maml import MAML
from training.meta_gradients import make_meta_gradient

NUMBERS_PER_EXAMPLE = 10  # in a learner's layers, at the least
# By the problem that `find_failure` finds: what the layer lacks, and how to train without it.
PROBLEMS = {
    "vectorise": ("cannot be vectorised over tasks", "--no-vectorise takes the tasks one after another"),
    "second derivative": ("has no second derivative", "--first-order needs none"),
    "forward mode": ("has no derivative in forward mode", "--engine unrolled needs none"),
}


def check_memory(config: Config, processes: int, *, testing: bool) -> None:
    """Raise UsageError where the machine cannot hold even the examples and results of one iteration.

    A kernel that runs out of memory ends the process without a message.
    """
    tasks, evaluation = config.tasks, config.evaluation
    pixels = (tasks.channels or 0) * (tasks.image_size or 0) ** 2
    shots = tasks.shots if testing else config.training_shots
    examples = (tasks.ways or 1) * (shots + tasks.queries)
    together = 1 if testing else -(-config.training.meta_batch_size // processes)
    flags = ["-k", "-q", *["--meta-batch-size"] * (not testing), *["--image-size"] * bool(pixels)]
    size = 4 * together * examples * (pixels + NUMBERS_PER_EXAMPLE)
    parts = [(f"{together:,} tasks of {examples:,} examples", size, flags)]
    if testing:
        results = f"the results of {evaluation.eval_tasks:,} tasks after {evaluation.eval_steps:,} steps"
        size = 8 * evaluation.eval_tasks * (evaluation.eval_steps + 1)
        parts.append((results, size, ["--eval-tasks", "--eval-steps"]))
    memory = machine_memory()
    for part, size, flags in parts:
        if memory is not None and size > memory:
            raise UsageError(
                f"{part} take at least {size / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f} "
                f"GiB of memory: lower {' or '.join(flags)}"
            )


def check_processes(config: Config, processes: int) -> None:
    """Raise UsageError where there are more processes than tasks to share."""
    tasks = config.training.meta_batch_size
    if processes > tasks:
        raise UsageError(
            f"{processes} processes for a meta-batch of {tasks} tasks: take fewer "
            "(torchrun --nproc-per-node), or a larger --meta-batch-size"
        )


def check_splits(distribution: TaskDistribution, config: Config) -> None:
    """Raise UsageError where training and validation tasks differ in the shape of an example."""
    training = distribution.resized(config.training_shots).sample("train", config.training.seed, 1, range(1))
    validation = distribution.sample("validation", 0, 0, range(1))
    shapes = [tree_map(lambda t: tuple(t.shape[2:]), batch.support_x) for batch in (training, validation)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"--dataset {config.tasks.dataset}: examples of training tasks have the shape {shapes[0]}, those "
            f"of validation tasks {shapes[1]}: a network takes one"
        )


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
    seed = config.training.seed
    tasks = distribution.resized(config.training_shots).sample("train", seed, 1, range(2))
    keys = keys_of(task_stream("train", seed, 1, range(2), first_tensor(tasks.support_x).device))
    _check_loss(maml, tasks, config)
    try:
        make_meta_gradient(maml, engine=config.training.engine)(parameters, tasks, keys=keys)
    except Exception as error:  # an operator may fail in any way
        if is_out_of_memory(error):
            raise
        raise UsageError(_explain(error, maml, parameters, tasks, keys[0], config)) from error


def _explain(
    error: Exception, maml: MAML, parameters: Weights, tasks: TaskBatch, key: Tensor, config: Config
) -> str:
    """Return which layer makes the meta-gradient fail, what it lacks, and how to train without that."""
    learner = config.learner
    positional, named = arguments_of(tree_map(lambda part: part[0], tasks.support_x))
    weights = maml.whole_weights(parameters)
    finding = None if named else find_failure(maml.learner, weights, positional, key)
    if finding is None:
        return (
            f"--learner {learner.learner} with --loss {learner.loss} cannot be meta-trained: "
            f"{_in_short(error)}; --no-vectorise, --engine unrolled or --first-order ask less of it"
        )
    lack, way_round = PROBLEMS[finding.problem]
    layer = f"its layer {finding.layer} ({finding.kind})" if finding.layer else f"{finding.kind} itself"
    return f"--learner {learner.learner}: {layer} {lack} ({finding.reason}): {way_round}"


def _check_loss(maml: MAML, tasks: TaskBatch, config: Config) -> None:
    """Raise UsageError where the loss of a task is not one number that depends on the outputs."""
    name = f"--loss {config.learner.loss}"
    keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(tasks.support_x).device)
    x, y = (tree_map(lambda part: part[0], tree) for tree in (tasks.support_x, tasks.support_y))
    with torch.no_grad():
        weights = maml.whole_weights(maml.initial_parameters())
        outputs = maml.call(weights, x, Extras(keys).for_pass("support"))
    outputs = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), outputs)
    try:
        value = maml.loss(outputs, y)
    except Exception as error:  # the user's code may fail in any way
        raise UsageError(f"{name} fails: {_in_short(error)}") from error
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        kind = tuple(value.shape) if isinstance(value, Tensor) and value.dim() else type(value).__name__
        raise UsageError(f"{name} gives {kind}: it should give one number that depends on the outputs")


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
