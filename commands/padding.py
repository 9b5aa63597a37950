"""Fit an algorithm to tasks of different sizes, which share a batch with padding between them.

Built-in learners and losses leave padding out. Whether the user's do is tried on tasks with and without it;
what does not gets its tasks without padding, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

from commands.config import Config
from commands.outputs import are_equal, blame_flags
from common.batch import TaskBatch, TaskDistribution, Tree, first_tensor, tree_map
from common.errors import UsageError
from common.optimizers import Weights
from common.random import derive_keys, task_stream
from common.sizes import Span
from common.task import Task
from learners.losses import LOSSES
from learners.options import LEARNERS
from learners.padding import cut
from maml import MAML

TRIED = 4  # tasks


def fit_to_sizes(
    maml: MAML, distribution: TaskDistribution, split: str, config: Config, say: Callable[[str], None]
) -> MAML:
    """Return the algorithm, which takes tasks one after another where their padding would be noticed.

    Raises UsageError where the number of classes varies and outputs are no scores of classes.
    """
    learner, loss = f"--learner {config.learner.learner}", f"--loss {config.learner.loss}"
    varies = distribution.ways is not None and Span.of(distribution.ways).varies
    if varies and maml.reading and maml.reading.kind != "classes":
        raise UsageError(
            f"-n {distribution.ways}: classes that a task lacks can be hidden among scores of classes, and "
            f"the outputs of {learner} are {maml.reading.describe()}: give one number"
        )
    users = config.learner.learner not in LEARNERS or config.learner.loss not in LOSSES
    if not users or not config.training.vectorise:
        return maml
    for tasks in (distribution, distribution.resized(config.training_shots)):
        batch = tasks.sample(split, 0, 0, range(TRIED))
        if batch.support_mask is None and batch.query_mask is None:
            continue
        device = first_tensor(batch.support_x).device
        keys = derive_keys(task_stream(split, 0, 0, range(TRIED), device))
        with blame_flags(f"{learner} with {loss} fails on a task without padding"):
            if notices_padding(maml, maml.initial_parameters(), batch, keys):
                say(
                    f"main.py: {learner} with {loss}: padding would change the results (attention over the "
                    "batch, a normalisation of the learner's own, a loss that is no mean over examples?): it "
                    "is left out, and tasks are taken one after another, uncompiled"
                )
                return maml.with_options(vectorise=False)
    return maml


def notices_padding(maml: MAML, parameters: Weights, batch: TaskBatch, keys: Tensor) -> bool:
    """Return whether outputs, loss or gradients of a task are others if it is padded."""
    tasks, unpadded = Task.of(batch, maml.call.extras(len(keys), keys)), maml.with_options(vectorise=False)
    for number in range(len(keys)):
        task = tree_map(lambda t, number=number: t[number], tasks)
        expected = _try(unpadded, parameters, task)
        # the gradient of a bias before batch norm is rounding
        rounding = 1e-5 * max(float(part.abs().max()) for part in expected[0].values())
        same = False
        with suppress(Exception):  # a layer may not know what to do with a mask
            same = are_equal(_try(maml, parameters, task), expected, 1e-3, rounding)
        if not same:
            return True
    return False


def _try(maml: MAML, parameters: Weights, task: Task) -> Tree:
    """Return the gradient of a task's support loss and the changed buffers, its query loss and outputs."""
    start, shared, query = maml.start(parameters, task), maml.shared_at(parameters, 0), task.for_query(1)
    _, gradient, _, buffers = maml.inner_step(start, shared, *task.at_step(0))
    loss, (outputs, _) = maml.query_loss(start.fast, shared.weights, query)
    return gradient, buffers, loss.detach(), tree_map(Tensor.detach, cut(outputs, task.query_mask))
