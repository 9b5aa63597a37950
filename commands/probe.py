"""Try out a learner and a loss before training: shapes, one meta-gradient, and whether that is right.

The user's code may fail in any way, and PyTorch may be wrong without a word. Either becomes one line, which
names the layer and what to do.
"""

from __future__ import annotations

import time
from textwrap import shorten

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from commands.config import Config
from commands.outputs import naming
from common.batch import TaskBatch, TaskDistribution, Tree, first_tensor, in_type, tree_map
from common.errors import UsageError, is_out_of_memory, one_line
from common.optimizers import Weights
from common.random import keys_of, task_stream
from common.task import Extras, Task
from learners.diagnosis import find_counters, find_failure, find_followers, find_wrong_layer
from learners.spectral_norm import vector_names
from maml import MAML
from training.gradient_check import SCALES, Check, check_meta_gradient
from training.meta_gradients import make_meta_gradient

# By the problem that `find_failure` finds: what the layer lacks, and how to train without it.
PROBLEMS = {
    "forward pass": ("fails", ""),
    "derivative": ("has no derivative", ""),
    "vectorise": ("cannot be vectorised over tasks", ": --no-vectorise takes the tasks one after another"),
    "second derivative": ("has no second derivative", ": --first-order needs none"),
    "forward mode": ("has no derivative in forward mode", ": --engine unrolled needs none"),
}

# What a meta-gradient is compared with; see training/gradient_check.py.
REFERENCES = {
    "exact": "central differences",
    "first-order": "central differences with constant inner gradients",
    "joint": "central differences",
    "reptile": "the moves of a plain loop's weights",
    "implicit": "conjugate gradients over differences of the support gradient",
}

LONG = 0.5  # seconds of repeated calls


def probe_learner(maml: MAML, parameters: Weights, distribution: TaskDistribution, config: Config) -> None:
    """Compute one meta-gradient; raise UsageError that names the failing layer and a workaround."""
    seed, learner = config.training.seed, f"--learner {config.learner.learner}"
    loss = f"--loss {config.learner.loss}"
    tasks = distribution.resized(config.training_shots).sample("train", seed, 1, range(2))
    keys = keys_of(task_stream("train", seed, 1, range(2), first_tensor(tasks.support_x).device))
    x, y = (tree_map(lambda part: part[0], tree) for tree in (tasks.support_x, tasks.support_y))
    flags = {  # which may help, by the problem that they avoid
        "vectorise": config.training.vectorise and "--no-vectorise",
        "forward mode": config.training.engine == "adjoint" and "--engine unrolled",
        "second derivative": config.choices.meta_gradient == "exact" and "--first-order",
    }
    hint = " or ".join(flag for flag in flags.values() if flag)
    with naming(f"{learner} with {loss} cannot be meta-trained{f' ({hint} may help)' if hint else ''}"):
        outputs = _call_repeatedly(maml, tasks, keys[0], learner, loss)
        outputs = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), outputs)
        with naming(f"{loss} fails"):
            value = maml.loss(outputs, y)
        if not value.requires_grad:
            raise UsageError(f"{loss} does not depend on the learner's outputs")
        if not value.isfinite() and _are_finite((x, y)):
            raise UsageError(f"{loss if _are_finite(outputs) else learner} gives numbers that are not finite")
        try:
            result = make_meta_gradient(maml, engine=config.training.engine)(parameters, tasks, keys=keys)
            gradients = result.gradients if result.losses.isfinite().all() else {}
            if value.isfinite():
                gradients = _inner_gradient(maml, parameters, tasks, keys) | gradients
        except Exception as error:  # an operator may fail in any way
            if is_out_of_memory(error):
                raise
            problems = [problem for problem in PROBLEMS if flags.get(problem, True)]
            failure = find_failure(maml.call, x, keys[0], maml.over_tasks, problems)
            if failure is None:
                raise
            lack, way_round = PROBLEMS[failure.problem]
            text = f"{learner}: {failure.layer_text} {lack} ({failure.reason}){way_round}"
            raise UsageError(text) from error
    if names := [name for name, gradient in gradients.items() if not gradient.isfinite().all()]:
        raise UsageError(
            f"{learner} with {loss}: the gradient by {_listed(names)} is not finite at the initial weights, "
            "though the loss is (a root of zeros, the determinant of a singular matrix?): add a small number "
            "under the root, or to the diagonal"
        )


def _call_repeatedly(maml: MAML, tasks: TaskBatch, keys: Tensor, learner: str, loss: str) -> Tree:
    """Return the learner's outputs for the first task's support set.

    Raises UsageError where the outputs, or the loss of the same outputs, are others after another pass.
    """
    x, y, others = (
        tree_map(lambda t: t[0], part) for part in (tasks.support_x, tasks.support_y, tasks.query_x)
    )
    others = tree_map(lambda t: 0.5 * t if t.is_floating_point() else t, others)

    def call(x: Tree) -> Tree:
        with torch.no_grad():
            return maml.call(maml.call.parameters, x, Extras(keys).for_pass("support"))

    def value() -> Tree:
        with torch.no_grad(), naming(f"{loss} fails"):
            return maml.loss(*tree_map(Tensor.clone, (outputs, y)))

    begin, outputs = time.monotonic(), call(x)
    first = value()
    call(others)
    if not _are_equal(value(), first, 1e-5):
        raise UsageError(
            f"{loss} gives another value for the same outputs once the learner has seen other inputs, or at "
            "random: let the learner return what the loss reads"
        )
    for count in range(16):  # a coin may fall on one side several times
        if not _are_equal(call(x), outputs):
            raise UsageError(
                f"{learner} gives other outputs when called again with the same inputs (random numbers not "
                "of torch, a counter, state outside the module?): draw with torch.rand, keep state in buffers"
            )
        if count and time.monotonic() - begin > LONG:
            break
    return outputs


def _are_equal(a: Tree, b: Tree, tolerance: float = 1e-4) -> bool:
    """Return whether trees of tensors are the same but for rounding, as of atomic sums."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=False)
    return all(
        x.shape == y.shape and torch.allclose(x, y, tolerance, 0.1 * tolerance, equal_nan=True)
        for x, y in pairs
        if isinstance(x, Tensor)
    )


def _inner_gradient(maml: MAML, parameters: Weights, tasks: TaskBatch, keys: Tensor) -> Weights:
    """Return the gradient of the first inner step on the first task."""
    first = tree_map(lambda t: t[0], Task(*tasks, extras=maml.call.extras(len(keys), keys)))
    shared = maml.shared_at(parameters, 0)
    return maml.inner_step(maml.start(parameters, first), shared, *first.at_step(0))[1]


def _are_finite(tree: Tree) -> bool:
    return all(bool(part.isfinite().all()) for part in pytree.tree_leaves(tree))


def describe_state(maml: MAML, distribution: TaskDistribution, config: Config) -> str:
    """Return a line on what passes change in the learner, buffers or counters; "" if nothing."""
    state = sorted(maml.call.buffers.keys() - vector_names(maml.learner))
    x = tree_map(
        lambda part: part[0], distribution.sample("train", config.training.seed, 1, range(1)).support_x
    )
    keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(x).device)
    if counters := find_counters(maml.call, x, keys):
        return (
            f"Each pass starts with the learner's {_listed(counters)} as built, and puts it back: a schedule "
            "by that stands still (a buffer counts within a task)"
        )
    if not state:
        return ""
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
        reference = "a plain loop" if check.by_loop_alone else REFERENCES[config.choices.meta_gradient]
        words = f"the meta-gradient agrees with {reference}"
        words += f" ({check.by_loop_alone})" if check.by_loop_alone else ""
    else:
        words = _locate(maml, tasks, keys, check)
        if check.engine is None or not free:
            way_round = "write that from other operators"
            way_round += ", use --first-order" if config.choices.meta_gradient == "exact" else ""
            raise UsageError(
                f"--learner {config.learner.learner} with --loss {config.learner.loss}: the meta-gradient is "
                f"wrong, {words}: {f'use --engine {check.engine}' if check.engine else way_round}, or "
                "--no-check-gradients if its derivatives are meant so"
            )
        words = f"--engine {engine} is wrong here, {words}; --engine {check.engine} is right, and taken"
    tolerance = f" to {SCALES[torch.float32].tolerance:.0%}" if check.dtype == torch.float32 else ""
    return check.engine, f"{words} ({str(check.dtype)[6:]}{tolerance}, {time.monotonic() - begin:.1f} s)"


def _locate(maml: MAML, tasks: TaskBatch, keys: Tensor, check: Check) -> str:
    """Return in words which layer has wrong second derivatives, and how far off they are."""
    if not check.by_loop_alone:  # otherwise differences tell nothing about a layer, either
        x = tree_map(lambda part: part[0], in_type(tasks.support_x, check.dtype))
        call = maml.in_precision(check.dtype).call
        if wrong := find_wrong_layer(call.module, call.as_kept(call.parameters), x, keys[0]):
            return f"{wrong.layer_text} being {wrong.reason}"
    return "for which no single layer can be named"
