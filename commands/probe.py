"""Try out a learner and a loss before training: shapes, one meta-gradient, and whether that is right.

The user's code may fail in any way, and PyTorch may be wrong without a word. Either becomes one line, which
names the layer and what to do.

Tasks of different sizes share a batch with padding between them, which built-in learners and losses leave
out. Code that does not gets its tasks without padding, one after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from textwrap import shorten

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from commands.config import Config
from commands.outputs import are_equal, blame_flags
from common.batch import TaskBatch, TaskDistribution, Tree, cast_tree, first_tensor, index_tree, tree_map
from common.errors import UsageError, fold_message, is_out_of_memory
from common.optimizers import Weights
from common.options import list_names
from common.random import derive_keys, task_stream
from common.sizes import Span
from common.task import Extras, Task
from learners.copies import count_hidden_parameters
from learners.diagnosis import find_carried, find_failure, find_followers, find_wrong_layer, mixes_examples
from learners.losses import LOSSES
from learners.options import LEARNERS
from learners.padding import cut
from learners.reading import Reading
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
TRIED = 4  # tasks, with and without their padding


def is_built_in(config: Config) -> bool:
    """Return whether learner and loss are this tool's, which need no trying."""
    return config.learner.learner in LEARNERS and config.learner.loss in LOSSES


@dataclass
class Probe:
    """An algorithm with its starting weights, tried on the first training tasks."""

    maml: MAML
    parameters: Weights
    distribution: TaskDistribution
    config: Config

    def __post_init__(self) -> None:
        seed, learner = self.config.training.seed, self.config.learner
        self.learner, self.loss = f"--learner {learner.learner}", f"--loss {learner.loss}"
        tasks = self.distribution.resized(self.config.training_shots)
        self.tasks = tasks.sample("train", seed, 1, range(2))
        device = first_tensor(self.tasks.support_x).device
        self.keys = derive_keys(task_stream("train", seed, 1, range(2), device))
        self.first = _take_task(self.maml, self.tasks, self.keys, 0)
        self.x, self.y, _ = self.first.at_step(0)

    def try_metric(self, reading: Reading) -> None:
        """Raise UsageError where there are no validation tasks, or the metric fails on one."""
        batch = self.distribution.sample("validation", 0, 0, range(1))
        if reading.metric:
            outputs = self.maml.predictions(self.parameters, batch, 0)["transductive"]
            first, again = (reading.metric.per_step(outputs, batch, reading) for _ in range(2))
            if not are_equal(again, first, 1e-5):
                raise UsageError(
                    f"{reading.metric.flag} gives another value for the same outputs when called again "
                    "(random numbers, or a sum over calls?)"
                )

    def check_learner(self) -> None:
        """Compute one meta-gradient; raise UsageError that names the failing layer and a workaround."""
        maml, config, keys, learner, loss = self.maml, self.config, self.keys, self.learner, self.loss
        flags = {  # which may help, by the problem that they avoid
            "vectorise": config.training.vectorise and "--no-vectorise",
            "forward mode": config.training.engine == "adjoint" and "--engine unrolled",
            "second derivative": config.choices.meta_gradient == "exact" and maml.steps and "--first-order",
        }
        hint = " or ".join(flag for flag in flags.values() if flag)
        hint = f" ({hint} may help)" if hint else ""
        with blame_flags(f"{learner} with {loss} cannot be meta-trained{hint}"):
            outputs = self._call_repeatedly()
            outputs = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), outputs)
            with blame_flags(f"{loss} fails"):
                value = maml.loss(outputs, self.y)
            if not value.requires_grad:
                raise UsageError(f"{loss} does not depend on the learner's outputs")
            if not value.isfinite() and _are_finite((self.x, self.y)):
                culprit = loss if _are_finite(outputs) else learner
                raise UsageError(f"{culprit} gives numbers that are not finite")
            inner = bool(value.isfinite()) and maml.steps > 0
            try:
                names = self._find_non_finite(config.training.engine, inner=inner)
            except Exception as error:  # an operator may fail in any way
                if is_out_of_memory(error):
                    raise
                needs_all = config.choices.meta_gradient == "implicit"
                problems = [problem for problem in PROBLEMS if needs_all or flags.get(problem, True)]
                failure = find_failure(maml.call, self.x, keys[0], maml.over_tasks, problems)
                if failure is None:
                    raise
                lack, way_round = PROBLEMS[failure.problem]
                text = f"{learner}: {failure.place} {lack} ({failure.reason})"
                text += way_round if flags.get(failure.problem) else ""
                raise UsageError(text) from error
        if names:
            text = f"{learner} with {loss}: the gradient by {list_names(names)} is not finite"
            if flags["forward mode"] and not self._find_non_finite("unrolled", inner=inner):
                raise UsageError(f"{text} with --engine adjoint, where --engine unrolled gives numbers")
            raise UsageError(
                f"{text} at the initial weights, though the loss is (a root of zeros, the determinant of a "
                "singular matrix?): add a small number under the root, or to the diagonal"
            )

    def _find_non_finite(self, engine: str, *, inner: bool) -> list[str]:
        """Return the weights whose gradients are not finite though the losses are; `inner`: a step's, too."""
        result = make_meta_gradient(self.maml, engine=engine)(self.parameters, self.tasks, keys=self.keys)
        gradients = result.gradients if result.losses.isfinite().all() else {}
        gradients = (self._inner_gradient() if inner else {}) | gradients
        return [name for name, gradient in gradients.items() if not gradient.isfinite().all()]

    def _call_repeatedly(self) -> Tree:
        """Return the learner's outputs for the first task's support set.

        Raises UsageError where the outputs, or the loss of the same outputs, are others after another pass.
        """
        others = tree_map(lambda t: 0.5 * t[0] if t.is_floating_point() else t[0], self.tasks.query_x)

        def call(x: Tree) -> Tree:
            with torch.no_grad():
                return self.maml.call(self.maml.call.parameters, x, Extras(self.keys[0]).for_pass("support"))

        def value() -> Tree:
            with torch.no_grad(), blame_flags(f"{self.loss} fails"):
                return self.maml.loss(*tree_map(Tensor.clone, (outputs, self.y)))

        begin, outputs = time.monotonic(), call(self.x)
        first = value()
        call(others)
        if not are_equal(value(), first, 1e-5):
            raise UsageError(
                f"{self.loss} gives another value for the same outputs once the learner has seen other "
                "inputs, or at random: let the learner return what the loss reads"
            )
        for count in range(16):  # a coin may fall on one side several times
            if not are_equal(call(self.x), outputs, 1e-4):
                raise UsageError(
                    f"{self.learner} gives other outputs when called again with the same inputs (random "
                    "numbers not of torch, a counter, state outside the module?): draw with torch.rand, keep "
                    "state in buffers"
                )
            if count and time.monotonic() - begin > LONG:
                break
        return outputs

    def _inner_gradient(self) -> Weights:
        """Return the gradient of the first inner step on the first task."""
        start, shared = self.maml.start(self.parameters, self.first), self.maml.shared_at(self.parameters, 0)
        return self.maml.inner_step(start, shared, *self.first.at_step(0))[1]

    def describe_passes(self) -> list[str]:
        """Return lines on what passes change, what is not learned, and outputs that examples share."""
        call, x, keys, lines = self.maml.call, self.x, self.keys[0], []
        if hidden := count_hidden_parameters(self.maml.learner):
            where = "where PyTorch does not look (a plain list?): they are not learned"
            lines.append(f"The learner keeps {hidden} parameters {where}, as those of nn.ModuleList are")
        state = sorted(call.buffers.keys() - vector_names(self.maml.learner))
        if carried := find_carried(call, x, keys):
            lines.append(
                f"Each pass starts with the learner's {list_names(carried)} as built, and puts it back: "
                "what one pass leaves there does not reach the next (a buffer lasts for a task)"
            )
        elif state:
            lines.append(
                f"Each task starts with the learner's {list_names(state)}, updates a copy in its steps, and "
                "drops it"
            )
            if followers := find_followers(call, x, keys):
                lines[-1] += (
                    f"; {list_names(followers)} will stay behind the learned weights (a power iteration?): "
                    "torch.nn.utils.parametrizations.spectral_norm does not"
                )
        if mixes_examples(call, self.first.for_query(self.maml.steps)):
            lines.append(
                "Outputs for an example depend on the other query examples (a normalisation of the learner's "
                "own, attention over the batch?): results are transductive, inductive ones included"
            )
        return lines

    def choose_engine(self, *, free: bool) -> tuple[str, str]:
        """Check the meta-gradient on small tasks; return the engine to use, and the outcome in words.

        `free`: the engine may be another one than configured. Raises UsageError where it is not right.
        """
        begin, engine = time.monotonic(), self.config.training.engine
        engines = list(dict.fromkeys([engine, "unrolled"]))
        try:
            check = check_meta_gradient(self.maml, self.parameters, self.tasks, self.keys, engines)
        except Exception as error:  # the user's code may not run on few examples, or not in this precision
            if is_out_of_memory(error):
                raise
            return engine, f"the meta-gradient could not be checked: {shorten(fold_message(error), 200)}"
        if check.engine == engine:
            words = f"the meta-gradient agrees with {REFERENCES[self.config.choices.meta_gradient]}"
            if check.by_loop_alone:
                words = f"the meta-gradient agrees with a plain loop ({check.by_loop_alone})"
        else:
            words = self._locate(check)
            if check.engine is None or not free:
                second_order = self.config.choices.meta_gradient == "exact" and self.maml.steps > 0
                instead = "write that from other operators" + ", use --first-order" * second_order
                instead = f"use --engine {check.engine}" if check.engine else instead
                raise UsageError(
                    f"{self.learner} with {self.loss}: the meta-gradient is wrong, {words}: {instead}, or "
                    "--no-check-gradients if its derivatives are meant so"
                )
            words = f"--engine {engine} is wrong here, {words}; --engine {check.engine} is right, and taken"
        tolerance = f" to {SCALES[torch.float32].tolerance:.0%}" if check.dtype == torch.float32 else ""
        return check.engine, f"{words} ({str(check.dtype)[6:]}{tolerance}, {time.monotonic() - begin:.1f} s)"

    def _locate(self, check: Check) -> str:
        """Return in words which layer has wrong second derivatives, and how far off they are."""
        if not check.by_loop_alone:  # otherwise differences tell nothing about a layer, either
            x = cast_tree(self.x, check.dtype)
            call = self.maml.in_precision(check.dtype).call
            if wrong := find_wrong_layer(call.module, call.as_kept(call.parameters), x, self.keys[0]):
                return f"{wrong.place} being {wrong.reason}"
        return "for which no single layer can be named"


def _are_finite(tree: Tree) -> bool:
    return all(bool(part.isfinite().all()) for part in pytree.tree_leaves(tree))


def _take_task(maml: MAML, batch: TaskBatch, keys: Tensor, number: int) -> Task:
    return index_tree(Task.of(batch, maml.call.extras(len(keys), keys)), number)


# ---- tasks of different sizes --------------------------------------------------------------------


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
    if is_built_in(config) or not config.training.vectorise:
        return maml
    for tasks in (distribution, distribution.resized(config.training_shots)):
        batch = tasks.sample(split, 0, 0, range(TRIED))
        if batch.support_mask is None and batch.query_mask is None:
            continue
        keys = derive_keys(task_stream(split, 0, 0, range(TRIED), first_tensor(batch.support_x).device))
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
    unpadded = maml.with_options(vectorise=False)
    for number in range(len(keys)):
        task = _take_task(maml, batch, keys, number)
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
