"""The inner loop, for one task: a function of meta-parameters and of the task's tensors.

Meta-parameters are a dictionary by name: the learner's weights and, where they are learned, the inner
rates (`inner_lr/` and the name of the weight). What belongs to an inner step has the steps as its first
axis: rates per layer and step `[steps]`, per-step batch norm `[steps, channels]`. A step beyond the ones
that are trained uses the last one's.

What is a task's own beside its examples travels with them as `extras`, a dictionary of tensors: the order of
the examples ("order"), the keys of its random numbers ("keys") and the buffers that the learner changes. Of
these a single forward pass needs its own keys and the buffers, its `around`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from common.batch import Tree, arguments_of, first_tensor, in_type, joined, tree_map
from common.choices import CONVOLUTIONS, HEAD_INITS, INNER_RATES, NORMALISATIONS, check_choice
from common.optimizers import Carried, InnerOptimizer, InnerState, Weights
from common.random import Stream
from common.vectorise import over_tasks
from learners.batch_norm import (
    BatchNorm,
    convert_batch_norm,
    fresh_statistics,
    given_statistics,
    norm_parameter_names,
    recorded_statistics,
    statistics_from_first,
)
from learners.elementary import Elementary, NoGradHolds, is_elementary
from learners.heads import adapted_names, context_names, linear_head, without_head
from learners.im2col import convert_convolutions

Loss = Callable[[Any, Any], Tensor]

RATE = "inner_lr/"  # before the name of the weight whose rate it is
SQUARE = "inner_square/"  # before the name of the weight whose carried second moment it is
MASS = SQUARE + "mass/"  # and the name of what they are divided by
BUFFER = "buffer/"  # before the name of a buffer, in what surrounds a pass


class Shared(NamedTuple):
    """What all tasks share in an inner step."""

    weights: Weights  # those that are not adapted
    rates: Weights  # learned inner rates; empty: the optimizer's own
    anchor: Weights  # where the proximal term pulls to; empty: there is none


class Step(NamedTuple):
    """The result of an inner step."""

    state: InnerState
    gradients: Weights  # of the support loss, before the step
    statistics: Weights  # that batch norm has seen, where they are recorded
    buffers: Weights  # as the step leaves them


class Passed(NamedTuple):
    """What is seen on the way through the inner loop and the query."""

    loss: Tensor  # query loss after the last step
    outputs: Tree  # [query examples, ...], the learner's, behind it
    statistics: Weights  # [steps, 2, channels] by layer, where they are recorded


class InnerLoop:
    """A learner, a loss, and the choices that concern one task; see `MAML` for the arguments."""

    def __init__(
        self,
        learner: nn.Module,
        loss: Loss,
        optimizer: InnerOptimizer,
        *,
        steps: int,
        fast_weights: str,
        head: str | None,
        head_init: str,
        inner_rates: str,
        inner_lr_max: float | None,
        first_order: bool,
        normalisation: str,
        norm_per_step: bool,
        adapt_norm: bool,
        convolution: str,
        compute_dtype: torch.dtype | None,
        example: Tree | None,
        vectorised: bool,
    ) -> None:
        check_choice("inner_rates", inner_rates, INNER_RATES)
        check_choice("normalisation", normalisation, NORMALISATIONS)
        check_choice("convolution", convolution, CONVOLUTIONS)
        check_choice("head_init", head_init, HEAD_INITS)
        self.over_tasks = over_tasks(vectorised)
        self.fixed = fixed_tensors(learner)
        self.learner = convert_batch_norm(copy.deepcopy(learner))
        everything = {
            name: parameter.detach().clone()
            for name, parameter in self.learner.named_parameters()
            if parameter.requires_grad
        }
        contexts = context_names(self.learner)
        self.head_init = head_init
        self.head = head
        self._head = linear_head(self.learner, head) if head_init != "learned" else ""
        self._head_weights = {
            name: w
            for name, w in everything.items()
            if head_init != "learned" and name in _of_layer(self._head)
        }
        computed = contexts | self._head_weights.keys()
        self._initial = {name: w for name, w in everything.items() if name not in computed}
        norms = norm_parameter_names(self.learner)
        self.per_step = norms if norm_per_step else frozenset()
        chosen = adapted_names(self.learner, fast_weights, head)
        self.adapted = frozenset(chosen if adapt_norm and not self.per_step else chosen - norms)
        if not self.adapted:
            raise ValueError(f"adapting {fast_weights} leaves nothing to adapt beside batch norm")
        if not self._head_weights.keys() <= self.adapted:
            raise ValueError(f"head_init {head_init!r} needs a head that the inner loop adapts")
        if head_init == "prototype" and optimizer.proximal:
            raise ValueError("head_init 'prototype' goes with no proximal term: tasks begin apart")
        self._contexts = {name: everything[name] for name in sorted(contexts)}
        if convolution == "im2col":
            convert_convolutions(self.learner)
        self._statistics = fresh_statistics(self.learner) if normalisation == "per-step" else {}
        if compute_dtype is not None:
            self.learner.to(compute_dtype)
        narrow = example if compute_dtype is None or example is None else in_type(example, compute_dtype)
        self._elementary = is_elementary(self.learner)
        self._buffers = changing_buffers(self.learner, narrow)
        self._body = without_head(self.learner, self._head) if head_init == "prototype" else self.learner
        self.loss = loss
        self.optimizer = optimizer
        self.steps = steps
        self.inner_rates = inner_rates
        self.inner_lr_max = inner_lr_max
        self.first_order = first_order
        self.normalisation = "transductive" if normalisation == "per-step" else normalisation
        self.compute_dtype = compute_dtype

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(layer, BatchNorm) for layer in self.learner.modules())

    @property
    def not_adapted(self) -> frozenset[str]:
        """Names of the learner's weights that all tasks share."""
        return frozenset(self._initial) - self.adapted

    def initial_parameters(self, seed: int = 0) -> Weights:
        """Fresh meta-parameters: the learner's own weights, and the initial inner rates.

        The seed is that of rates which begin at random.
        """
        parameters = {name: weight.clone() for name, weight in self._initial.items()}
        for name in self.per_step:
            parameters[name] = parameters[name].expand(self.steps, -1).clone()
        generator = torch.Generator().manual_seed(seed)
        everything = self._initial | self._contexts | self._head_weights
        adapted = {name: w for name, w in everything.items() if name in self.adapted}
        for name, weight in adapted.items() if self.inner_rates != "fixed" else ():
            shape = (self.steps,) if self.inner_rates == "layer-step" else weight.shape
            rate = torch.full(shape, float(self.optimizer.lr), dtype=weight.dtype)
            if self.inner_lr_max is not None:
                rate += (self.inner_lr_max - self.optimizer.lr) * torch.rand(
                    shape, generator=generator, dtype=weight.dtype
                )
            parameters[RATE + name] = rate.to(weight.device)
        if self.optimizer.carried:
            parameters |= {SQUARE + name: torch.zeros_like(weight) for name, weight in adapted.items()}
            parameters[MASS] = torch.zeros_like(next(iter(adapted.values())).flatten()[0])
        return parameters

    def initial_statistics(self) -> Weights:
        """Running statistics of per-step batch norm, `[steps, 2, channels]` by layer; else empty."""
        return {name: s.expand(self.steps, -1, -1).clone() for name, s in self._statistics.items()}

    # ---- the learner ------------------------------------------------------------------------

    def forward(self, weights: Weights, x: Tree, around: Weights | None = None) -> Tree:
        """The learner's outputs under these weights; batch norm uses the statistics of `x`."""
        return self._call(self.learner, weights, x, around or {})

    def _call(
        self, module: nn.Module, weights: Weights, x: Tree, around: Weights, after: Weights | None = None
    ) -> Tree:
        """The module's outputs; the buffers that the pass has changed are put into `after`."""
        kind = next(iter(weights.values()), first_tensor(x)).dtype
        if self.compute_dtype is not None:
            narrow = {n: w if n in self._statistics else w.to(self.compute_dtype) for n, w in weights.items()}
            weights, x = narrow, in_type(x, self.compute_dtype)
        # of its own: a pass may change them in place
        buffers = {name: around[BUFFER + name].clone() for name in self._buffers if BUFFER + name in around}
        mode = nullcontext() if self._elementary else Elementary(around.get("keys"), first_tensor(x))
        with mode, _read_buffers(module, buffers, after):
            outputs = functional_call(module, weights | buffers, *arguments_of(x))
        return outputs if self.compute_dtype is None else in_type(outputs, kind)

    def query_outputs(
        self,
        weights: Weights,
        query_x: Tree,
        support_x: Tree,
        normalisation: str,
        around: Weights | None = None,
    ) -> Tree:
        """Outputs on a query set; "inductive": with the support set's statistics under these weights."""
        if normalisation != "inductive":
            return self.forward(weights, query_x, around)
        shots = len(first_tensor(support_x))
        with statistics_from_first(shots, self.learner):
            outputs = self.forward(weights, joined([support_x, query_x]), around)
        return tree_map(lambda part: part[shots:], outputs)

    def support_loss(
        self,
        fast: Weights,
        shared: Weights,
        x: Tree,
        y: Tree,
        around: Weights | None = None,
        after: Weights | None = None,
    ) -> Tensor:
        return self.loss(self._call(self.learner, fast | shared, x, around or {}, after), y)

    def query_loss(
        self,
        fast: Weights,
        shared: Weights,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree,
        query_y: Tree,
        around: Weights | None = None,
    ) -> tuple[Tensor, tuple[Tree, Weights]]:
        """Loss on one task's query set under adapted weights; outputs, and statistics where recorded."""
        with self._recorded() as statistics:
            outputs = self.query_outputs(fast | shared, query_x, support_x, self.normalisation, around)
        return self.loss(outputs, query_y), (outputs, statistics or {})

    def _recorded(self) -> Any:
        return recorded_statistics(self.learner) if self._statistics else nullcontext()

    def predicting(self) -> Any:
        """Within it the learner predicts, as `nn.Module.eval` has it: dropout drops nothing."""
        return _not_training(self.learner)

    def buffers_of(self, tasks: int) -> Weights:
        """The buffers that the learner changes, for each of so many tasks, among their extras."""
        return {BUFFER + name: b.expand(tasks, *b.shape) for name, b in self._buffers.items()}

    # ---- the loop ---------------------------------------------------------------------------

    @property
    def starts_apart(self) -> bool:
        """Whether tasks have weights of their own before the first step."""
        return self.head_init == "prototype"

    def start(
        self,
        parameters: Weights,
        support_x: Tree | None = None,
        support_y: Tree | None = None,
        extras: Weights | None = None,
        statistics: Weights | None = None,
    ) -> InnerState:
        """The state before the first step. A context begins at zero, as does a "zero" head; a "prototype"
        head begins as the classifier by distance to the means of the task's classes, and needs its support
        set, and running `statistics` where batch norm is to use them."""
        fast = {name: parameters[name] for name in parameters if name in self.adapted}
        context = {n: torch.zeros_like(w) for n, w in self._contexts.items() if n in self.adapted}
        if self.head_init == "prototype":
            around = pass_around(extras, "prototypes")
            head = self._prototypes(parameters, support_x, support_y, around, statistics)
        else:
            head = {name: torch.zeros_like(w) for name, w in self._head_weights.items()}
        fast |= context | head
        if not self.optimizer.carried:
            return self.optimizer.start(fast)
        squares = {name: parameters[SQUARE + name] for name in fast}
        return self.optimizer.start(fast, Carried(squares, parameters[MASS]))

    def _prototypes(
        self, parameters: Weights, x: Tree, y: Any, around: Weights, statistics: Weights | None
    ) -> Weights:
        """Triantafillou et al. (2020): a class with mean embedding c has weights 2 c and bias -|c|^2, so
        that logits are minus the squared distances, but for what is the same for all classes."""
        weights = {name: w for name, w in parameters.items() if not name.startswith((RATE, SQUARE))}
        weights |= self.shared_at(parameters, 0, statistics).weights
        embeddings = self._call(self._body, weights, x, around)
        weight, bias = _of_layer(self._head)
        ways = len(self._head_weights[weight])
        of_class = (y[:, None] == torch.arange(ways, device=y.device)).to(embeddings.dtype)
        means = (of_class.mT @ embeddings) / of_class.sum(0)[:, None]
        return {weight: 2 * means, bias: -(means * means).sum(1)}

    def shared_at(self, parameters: Weights, step: int, statistics: Weights | None = None) -> Shared:
        """What the tasks share in the inner step of that number, from 0; running statistics join the
        weights where they are given."""
        row = min(step, self.steps - 1)

        def at(name: str) -> Tensor:
            return parameters[name][row] if name in self.per_step else parameters[name]

        weights = {name: at(name) for name in self._initial if name not in self.adapted}
        weights |= {name: s[row] for name, s in (statistics or {}).items()}
        rates = {name[len(RATE) :]: rate for name, rate in parameters.items() if name.startswith(RATE)}
        if self.inner_rates == "layer-step":
            rates = {name: rate[row] for name, rate in rates.items()}
        return Shared(weights, rates, self.start(parameters).fast if self.optimizer.proximal else {})

    def shared_by_query(self, parameters: Weights, steps: int, statistics: Weights | None = None) -> Shared:
        """The same for the query after that many steps: that of the last one, or of the first to come."""
        return self.shared_at(parameters, max(steps - 1, 0), statistics)

    def inner_step(
        self, state: InnerState, shared: Shared, x: Tree, y: Tree, around: Weights | None = None
    ) -> Step:
        """A step along the gradient of the support loss, which `first_order` takes for a constant."""
        fast, weights = state.fast, shared.weights
        if self.first_order:
            fast, weights = _detached(fast), _detached(weights)

        def loss(fast: Weights) -> tuple[Tensor, tuple[Weights, Weights]]:
            after: Weights = {}
            with self._recorded() as statistics:
                value = self.support_loss(fast, weights, x, y, around, after)
            return value, (statistics or {}, after)

        gradients, (statistics, buffers) = grad(loss, has_aux=True)(fast)
        state = self.optimizer.update(state, gradients, shared.rates, shared.anchor)
        return Step(state, gradients, statistics, buffers)

    def trajectory(
        self,
        parameters: Weights,
        support_x: Tree,
        support_y: Tree,
        extras: Weights | None = None,
        *,
        steps: int,
        statistics: Weights | None = None,
    ) -> Iterator[tuple[Weights, Weights]]:
        """The task's weights after 0, 1, ... `steps` inner steps, as its query is to use them, and what
        surrounds the query's pass."""
        extras = dict(extras or {})
        state = self.start(parameters, support_x, support_y, extras, statistics)
        weights = state.fast | self.shared_by_query(parameters, 0, statistics).weights
        yield weights, pass_around(extras, "query")
        for step in range(steps):
            shared = self.shared_at(parameters, step, statistics)
            examples = minibatch(support_x, support_y, extras.get("order"), step)
            taken = self.inner_step(state, shared, *examples, pass_around(extras, "support", step))
            state = taken.state
            extras |= taken.buffers
            yield state.fast | shared.weights, pass_around(extras, "query", step + 1)

    def adapt(
        self,
        parameters: Weights,
        support_x: Tree,
        support_y: Tree,
        steps: int,
        extras: Weights | None = None,
    ) -> Weights:
        """The weights adapted to one task: `support_x` is `[examples, ...]`."""
        *_, (adapted, _) = self.trajectory(parameters, support_x, support_y, extras, steps=steps)
        return adapted

    def objective(
        self,
        parameters: Weights,
        schedule: Weights,
        support_x: Tree,
        support_y: Tree,
        query_x: Tree,
        query_y: Tree,
        extras: Weights | None = None,
    ) -> tuple[Tensor, Passed]:
        """What meta-training minimises, of one task: the query loss after the last inner step or, with
        `schedule["step_weights"]` `[steps]`, a weighted sum of those after each (Antoniou et al. 2019)."""
        extras = dict(extras or {})
        state = self.start(parameters, support_x, support_y, extras)
        weights = schedule.get("step_weights")
        losses, seen = [], []
        for step in range(self.steps):
            shared = self.shared_at(parameters, step)
            examples = minibatch(support_x, support_y, extras.get("order"), step)
            taken = self.inner_step(state, shared, *examples, pass_around(extras, "support", step))
            state = taken.state
            extras |= taken.buffers
            of_query: Weights = {}
            if weights is not None or step == self.steps - 1:
                loss, (outputs, of_query) = self.query_loss(
                    state.fast, shared.weights, support_x, support_y, query_x, query_y,
                    pass_around(extras, "query", step + 1),
                )  # fmt: skip
                losses.append(loss)
            seen.append(mean_of_both(taken.statistics, of_query))
        total = losses[-1] if weights is None else (weights * torch.stack(losses)).sum()
        return total, Passed(losses[-1], outputs, stacked(seen))

    # ---- derivatives of one step ------------------------------------------------------------

    def query_gradient(
        self, fast: Weights, shared: Weights, *task: Any
    ) -> tuple[tuple[Weights, Weights], tuple[Tensor, Tree, Weights]]:
        """Of the query loss, in adapted and in shared weights; the loss, the outputs, the statistics."""

        def loss(fast: Weights, shared: Weights) -> tuple[Tensor, tuple[Tensor, Tree, Weights]]:
            value, (outputs, statistics) = self.query_loss(fast, shared, *task)
            return value, (value, outputs, statistics)

        return grad(loss, (0, 1), has_aux=True)(fast, shared)

    def slope(self, fast: Weights, shared: Weights, v: Weights, x: Tree, y: Tree, around: Weights) -> Tensor:
        """The derivative of the support loss when the fast weights move along `v`."""

        def loss(fast: Weights) -> Tensor:
            with NoGradHolds():
                return self.support_loss(fast, shared, x, y, around)

        return jvp(loss, (fast,), (v,))[1]

    def check_statistics(self, normalisations: Iterable[str], statistics: Weights | None) -> None:
        """Raises ValueError where "per-step" has no running statistics to normalise with."""
        if "per-step" in normalisations and self.has_batch_norm and not statistics:
            raise ValueError('"per-step" normalises with running statistics: give `statistics`')

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, batch norm normalises with the statistics that come with the weights."""
        with given_statistics(self.learner), given_statistics(self._body):
            yield


def minibatch(x: Tree, y: Tree, order: Tensor | None = None, step: int = 0) -> tuple[Tree, Tree]:
    """The examples of one inner step of one task: all, or those that `order` `[steps, batch]` names."""
    if order is None:
        return x, y
    chosen = order[step]
    return tree_map(lambda t: t[chosen], x), tree_map(lambda t: t[chosen], y)


def pass_around(extras: Weights | None, purpose: str, step: int = 0) -> Weights:
    """Of a task's extras, or of several tasks', what a forward pass needs: keys for this pass alone, and
    the buffers."""
    extras = extras or {}
    around = {name: tensor for name, tensor in extras.items() if name.startswith(BUFFER)}
    if "keys" in extras:
        around["keys"] = Stream.from_keys(extras["keys"]).at(purpose).at(step).keys
    return around


def _of_layer(layer: str) -> tuple[str, str]:
    """Names of a linear layer's weight and bias."""
    prefix = f"{layer}." if layer else ""
    return f"{prefix}weight", f"{prefix}bias"


@contextmanager
def _not_training(module: nn.Module) -> Iterator[None]:
    training = [layer for layer in module.modules() if layer.training]
    for layer in training:
        layer.training = False
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


@contextmanager
def _read_buffers(module: nn.Module, names: Iterable[str], after: Weights | None) -> Iterator[None]:
    """Puts the buffers of these names, as they are when the module's forward ends, into `after`."""
    if after is None or not names:
        yield
        return

    def read(*_: Any) -> None:
        now = dict(module.named_buffers())
        after.update({BUFFER + name: now[name].detach() for name in names})

    handle = module.register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()


def fixed_tensors(learner: nn.Module) -> Weights:
    """Frozen parameters, and the buffers that a `state_dict` has."""
    kept = learner.state_dict(keep_vars=True)
    learned = {name for name, p in learner.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: t.detach().clone() for name, t in kept.items() if name not in learned}


def changing_buffers(learner: nn.Module, example: Tree | None) -> Weights:
    """The buffers that a forward pass changes, of all layers but batch norm's.

    A pass on `example`, one task's inputs, shows which; without one, all may.
    """
    norms = fresh_statistics(learner)
    found = {name: b.detach().clone() for name, b in learner.named_buffers() if name not in norms}
    if not found or example is None:
        return found
    probe = copy.deepcopy(learner)
    before = {name: (buffer, buffer._version) for name, buffer in probe.named_buffers()}
    keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(example).device)
    positional, named = arguments_of(example)
    with torch.no_grad(), Elementary(keys):
        probe(*positional, **named)
    now = dict(probe.named_buffers())
    return {
        name: buffer
        for name, buffer in found.items()
        if now[name] is not before[name][0] or now[name]._version != before[name][1]
    }


def mean_of_both(of_support: Weights, of_query: Weights) -> Weights:
    """Statistics of a step: the mean of support's and query's, where the query has passed."""
    if not of_query:
        return of_support
    return {name: (of_support[name] + of_query[name]) / 2 for name in of_support}


def stacked(steps: list[Weights]) -> Weights:
    return {name: torch.stack([step[name] for step in steps]) for name in steps[0]} if steps else {}


def _detached(weights: Weights) -> Weights:
    return {name: w.detach() for name, w in weights.items()}
