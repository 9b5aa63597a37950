"""Try out a learner and a loss before training: shapes, one meta-gradient, and whether that is right.

The user's code may fail in any way, and PyTorch may be wrong without a word. Either becomes one line, which
names the layer and what to do.
"""

from __future__ import annotations

import time
from textwrap import shorten

import torch
from torch import Tensor

from commands.config import Config
from commands.outputs import naming
from common.batch import TaskBatch, TaskDistribution, first_tensor, in_type, tree_map
from common.errors import UsageError, is_out_of_memory, one_line
from common.optimizers import Weights
from common.random import keys_of, task_stream
from common.task import Extras
from learners.diagnosis import find_failure, find_followers, find_wrong_layer
from learners.spectral_norm import vector_names
from maml import MAML
from training.gradient_check import check_meta_gradient
from training.meta_gradients import make_meta_gradient

# By the problem that `find_failure` finds: what the layer lacks, and how to train without it.
PROBLEMS = {
    "forward pass": ("fails", ""),
    "derivative": ("has no derivative", ""),
    "vectorise": ("cannot be vectorised over tasks", ": --no-vectorise takes the tasks one after another"),
    "second derivative": ("has no second derivative", ": --first-order needs none"),
    "forward mode": ("has no derivative in forward mode", ": --engine unrolled needs none"),
}


def probe_learner(maml: MAML, parameters: Weights, distribution: TaskDistribution, config: Config) -> None:
    """Compute one meta-gradient; raise UsageError that names the failing layer and a workaround."""
    seed, learner = config.training.seed, f"--learner {config.learner.learner}"
    loss = f"--loss {config.learner.loss}"
    tasks = distribution.resized(config.training_shots).sample("train", seed, 1, range(2))
    keys = keys_of(task_stream("train", seed, 1, range(2), first_tensor(tasks.support_x).device))
    x, y = (tree_map(lambda part: part[0], tree) for tree in (tasks.support_x, tasks.support_y))
    weights = maml.call.parameters
    flags = {  # which may help, by the problem that they avoid
        "vectorise": config.training.vectorise and "--no-vectorise",
        "forward mode": config.training.engine == "adjoint" and "--engine unrolled",
        "second derivative": config.choices.meta_gradient == "exact" and "--first-order",
    }
    hint = " or ".join(flag for flag in flags.values() if flag)
    with naming(f"{learner} with {loss} cannot be meta-trained{f' ({hint} may help)' if hint else ''}"):
        with torch.no_grad():
            outputs = maml.call(weights, x, Extras(keys[0]).for_pass("support"))
        outputs = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), outputs)
        with naming(f"{loss} fails"):
            if not maml.loss(outputs, y).requires_grad:
                raise UsageError(f"{loss} does not depend on the learner's outputs")
        try:
            make_meta_gradient(maml, engine=config.training.engine)(parameters, tasks, keys=keys)
        except Exception as error:  # an operator may fail in any way
            if is_out_of_memory(error):
                raise
            problems = [problem for problem in PROBLEMS if flags.get(problem, True)]
            failure = find_failure(maml.call, x, keys[0], maml.over_tasks, problems)
            if failure is None:
                raise
            lack, way_round = PROBLEMS[failure.problem]
            layer = f"its layer {failure.layer}" if failure.layer else "itself"
            text = f"{learner}: {layer} ({failure.kind}) {lack} ({failure.reason}){way_round}"
            raise UsageError(text) from error


def describe_state(maml: MAML, distribution: TaskDistribution, config: Config) -> str:
    """Return a line on the buffers that each task has a copy of; "" without such."""
    state = sorted(maml.call.buffers.keys() - vector_names(maml.learner))
    if not state:
        return ""
    x = tree_map(
        lambda part: part[0], distribution.sample("train", config.training.seed, 1, range(1)).support_x
    )
    keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(x).device)
    line = f"Each task starts with the learner's {_listed(state)}, updates a copy in its steps, and drops it"
    if followers := find_followers(maml.call, x, keys):
        line += (
            f"; {_listed(followers)} will stay behind the learned weights (a power iteration?): "
            "torch.nn.utils.parametrizations.spectral_norm does not"
        )
    return line


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def choose_engine(
    maml: MAML, parameters: Weights, distribution: TaskDistribution, config: Config, *, free: bool
) -> tuple[str, str]:
    """Check the meta-gradient on small tasks; return the engine to use, and the outcome in words.

    `free`: the engine may be another one than configured. Raises UsageError where it is not right.
    """
    begin, seed, engine = time.monotonic(), config.training.seed, config.training.engine
    tasks = distribution.resized(config.training_shots).sample("train", seed, 1, range(2))
    keys = keys_of(task_stream("train", seed, 1, range(2), first_tensor(tasks.support_x).device))
    engines = list(dict.fromkeys([engine, "unrolled"]))
    try:
        check = check_meta_gradient(maml, parameters, tasks, keys, engines)
    except Exception as error:  # the user's code may not run on few examples, or not in this precision
        if is_out_of_memory(error):
            raise
        return engine, f"the meta-gradient could not be checked: {shorten(one_line(error), 200)}"
    if check.engine == engine:
        reference = "a plain loop" if check.by_loop_alone else "central differences"
        words = f"the meta-gradient agrees with {reference}"
        words += f" ({check.by_loop_alone})" if check.by_loop_alone else ""
    else:
        words = _locate(maml, tasks, keys, check.dtype)
        if check.engine is None or not free:
            way_round = "write that from other operators, use --first-order"
            raise UsageError(
                f"--learner {config.learner.learner} with --loss {config.learner.loss}: the meta-gradient is "
                f"wrong, {words}: {f'use --engine {check.engine}' if check.engine else way_round}, or "
                "--no-check-gradients if its derivatives are meant so"
            )
        words = f"--engine {engine} is wrong here, {words}; --engine {check.engine} is right, and taken"
    return check.engine, f"{words} ({str(check.dtype)[6:]}, {time.monotonic() - begin:.1f} s)"


def _locate(maml: MAML, tasks: TaskBatch, keys: Tensor, dtype: torch.dtype) -> str:
    """Return in words which layer has wrong second derivatives, and how far off they are."""
    wrong = None
    if dtype == torch.float64:  # float32 does not resolve the differences
        x = tree_map(lambda part: part[0], in_type(tasks.support_x, dtype))
        call = maml.in_precision(dtype).call
        wrong = find_wrong_layer(call.module, call.as_kept(call.parameters), x, keys[0])
    if wrong is None:
        return "for which no single layer can be named"
    layer = f"layer {wrong.layer}" if wrong.layer else "the learner itself"
    return f"{layer} ({wrong.kind}) being {wrong.reason}"
