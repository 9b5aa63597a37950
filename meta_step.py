"""One iteration of meta-training as a function of tensors: tasks, meta-gradient, update, running metrics.

The meta-parameters and the moments of Adam are flat vectors, so that the outer loop is a handful of
operations for any network. Where tasks are computed and not looked up, the whole iteration compiles as
one function; elsewhere its meta-gradient does. On CUDA either is captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maml import MAML, MetaGradient, as_it_is
from optimizers import Weights
from randomness import keys_of, minibatch_order, task_stream
from schedules import meta_lr_at, multi_step_weights
from tasks import TaskBatch, TaskDistribution, first_tensor

# An iteration draws its random numbers by long chains of integer operations. Inductor repeats the chain of
# a value wherever that is used unless it is told to keep values early; compiling took minutes.
SAMPLING_OPTIONS = {"realize_opcount_threshold": 10}


class FlatLayout:
    """Named tensors as one vector, in the order of the names, and back as views of it."""

    def __init__(self, weights: Weights) -> None:
        self.shapes = {name: weight.shape for name, weight in weights.items()}

    def flatten(self, weights: Weights) -> Tensor:
        return torch.cat([weights[name].flatten() for name in self.shapes])

    def unflatten(self, vector: Tensor) -> Weights:
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}


class State(NamedTuple):
    """All that an iteration changes."""

    parameters: Tensor  # [parameters], the meta-parameters
    exp_avg: Tensor  # [parameters], first and
    exp_avg_sq: Tensor  # second moment of Adam
    iteration: Tensor  # int64 scalar, iterations so far
    sums: Tensor  # [metrics], of the iterations since the last point of the curves
    statistics: Tensor  # [numbers], running statistics of per-step batch norm; empty without


@dataclass(frozen=True)
class OuterLoop:
    """The choices of the outer loop.

    Arguments:
        lr: the learning rate at the first iteration; it goes over to `final_lr` at `iterations` as `schedule`
            says.
        clip_value, clip_norm: bounds of the meta-gradient's elements and norm.
        inner_batch: examples in the minibatch of an inner step; None: all.
        msl_iterations: over which the weights of the multi-step loss change; None: only the last step counts.
    """

    lr: float
    optimizer: str = "adam"
    schedule: str = "constant"
    final_lr: float = 0.0
    iterations: int = 1
    clip_value: float | None = None
    clip_norm: float | None = None
    inner_batch: int | None = None
    msl_iterations: int | None = None


STATISTICS_MOMENTUM = 0.1  # PyTorch's


def adam(
    state: State,
    gradient: Tensor,
    *,
    lr: float | Tensor,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    eps: float = 1e-8,
) -> State:
    """Kingma and Ba (2015), as `torch.optim.Adam` computes it: moves parameters, moments and iteration."""
    iteration = state.iteration + 1
    step = iteration.to(gradient.dtype)
    # 1 - beta ** step, which is small at first, without losing digits
    correction_1 = -torch.expm1(step * math.log(beta_1))
    correction_2 = -torch.expm1(step * math.log(beta_2))
    exp_avg = state.exp_avg + (1 - beta_1) * (gradient - state.exp_avg)
    exp_avg_sq = beta_2 * state.exp_avg_sq + (1 - beta_2) * gradient * gradient
    denominator = (exp_avg_sq / correction_2).sqrt() + eps
    parameters = state.parameters - lr * (exp_avg / correction_1) / denominator
    return State(parameters, exp_avg, exp_avg_sq, iteration, state.sums, state.statistics)


def sgd(state: State, gradient: Tensor, *, lr: float | Tensor) -> State:
    """A step along the gradient: moves parameters and iteration."""
    return state._replace(parameters=state.parameters - lr * gradient, iteration=state.iteration + 1)


def clipped(gradient: Tensor, norm: Tensor, value: float | None, max_norm: float | None) -> Tensor:
    """The gradient with elements cut to +-`value`, then shortened to `max_norm`; `norm` is its own."""
    if value is not None:
        gradient = gradient.clamp(-value, value)
        norm = gradient.norm()
    if max_norm is not None:
        gradient = gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return gradient


class MetaStep:
    """The iteration of a run: `step(state)` gives the next state.

    Arguments:
        distribution: of the training tasks.
        layout, statistics_layout: of the meta-parameters and of the running statistics.
        metrics: of an iteration, as `[metrics]`, from the meta-gradient, its norm and the targets.
        draws: whether the learner draws random numbers.
        accelerate: makes a faster function of the whole iteration, where it is one of tensors alone.
    """

    def __init__(
        self,
        maml: MAML,
        distribution: TaskDistribution,
        outer: OuterLoop,
        *,
        layout: FlatLayout,
        statistics_layout: FlatLayout | None = None,
        metrics: Callable[[MetaGradient, Tensor, Tensor], Tensor],
        seed: int,
        tasks: int,
        draws: bool = False,
        accelerate: Callable[..., Callable[..., Any]] = as_it_is,
    ) -> None:
        self.maml = maml
        self.distribution = distribution
        self.outer = outer
        self.layout = layout
        self.statistics_layout = statistics_layout
        self.metrics = metrics
        self.seed = seed
        self.tasks = range(tasks)
        self.draws = draws
        one_function = distribution.computed and maml.tasks_at_once is None
        self.whole = accelerate(self._whole, SAMPLING_OPTIONS) if one_function else self._whole

    def __call__(self, state: State, iteration: int | None = None) -> State:
        """The next state; `iteration` is the number of those before, for tasks that the host looks up: it
        need not be asked of the device then."""
        if iteration is not None and self.distribution.on_host:
            batch = self.distribution.sample("train", self.seed, iteration + 1, self.tasks)
            return self._step(state, batch)
        if self.statistics_layout:
            return State(*self.whole(*state))
        # an empty one is not for a compiler
        return State._make((*self.whole(*state[:-1]), state.statistics))

    def _whole(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = State._make(tensors if self.statistics_layout else (*tensors, tensors[0][:0]))
        batch = self.distribution.sample("train", self.seed, state.iteration + 1, self.tasks)
        new = tuple(self._step(state, batch))
        return new if self.statistics_layout else new[:-1]

    def _step(self, state: State, batch: TaskBatch) -> State:
        result = self.maml.meta_gradient(
            self.layout.unflatten(state.parameters),
            batch,
            **self._random(state, batch),
            step_weights=self._step_weights(state),
        )
        return self._update(state, result, batch)

    def _random(self, state: State, batch: TaskBatch) -> dict[str, Any]:
        """What is random beside the tasks: the examples of the inner steps' minibatches, and the learner's
        own keys."""
        if self.outer.inner_batch is None and not self.draws:
            return {}
        device = first_tensor(batch.support_x).device
        stream = task_stream("train", self.seed, state.iteration + 1, self.tasks, device)
        order = None
        if self.outer.inner_batch is not None:
            examples = self.maml.training_examples(batch)
            order = minibatch_order(
                stream.at("minibatches"), examples, self.outer.inner_batch, self.maml.steps
            )
        return {"order": order, "keys": keys_of(stream) if self.draws else None}

    def _step_weights(self, state: State) -> Tensor | None:
        """The weights of the multi-step loss."""
        if self.outer.msl_iterations is None:
            return None
        return multi_step_weights(
            state.iteration, self.maml.steps, self.outer.msl_iterations, state.parameters.dtype
        )

    def lr_at(self, iteration: Tensor, dtype: torch.dtype = torch.float64) -> Tensor | float:
        """The meta-learning rate of the iteration after so many."""
        outer = self.outer
        return meta_lr_at(outer.schedule, iteration, outer.lr, outer.final_lr, outer.iterations, dtype)

    def _update(self, state: State, result: MetaGradient, batch: TaskBatch) -> State:
        gradient = self.layout.flatten(result.gradients)
        norm = gradient.norm()
        state = state._replace(sums=state.sums + self.metrics(result, norm, first_tensor(batch.query_y)))
        if self.statistics_layout:
            seen = self.statistics_layout.flatten(result.statistics)
            statistics = state.statistics + STATISTICS_MOMENTUM * (seen - state.statistics)
            state = state._replace(statistics=statistics)
        rule = {"adam": adam, "sgd": sgd}[self.outer.optimizer]
        lr = self.lr_at(state.iteration, gradient.dtype)
        return rule(state, clipped(gradient, norm, self.outer.clip_value, self.outer.clip_norm), lr=lr)


class CudaGraph:
    """A step's kernels, recorded once and replayed as a whole: no launch waits for Python."""

    def __init__(self, step: Callable[[State], State], state: State) -> None:
        self.state = State(*(tensor.clone() for tensor in state))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy initialisations must not be recorded
            for _ in range(3):
                step(self.state)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for own, new in zip(self.state, step(self.state), strict=True):
                own.copy_(new)

    def __call__(self, state: State, iteration: int | None = None) -> State:
        """The next state; `state` is the one that the last call gave, or any other to go on from."""
        if state is not self.state:
            for own, given in zip(self.state, state, strict=True):
                own.copy_(given)
        self.graph.replay()
        return self.state
