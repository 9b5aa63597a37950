"""One iteration of meta-training as a function of tensors: tasks, meta-gradient, Adam, running metrics.

The meta-parameters and the moments of Adam are flat vectors, so that the outer loop is a handful of
operations for any network. Where tasks are computed and not looked up, the whole iteration compiles as
one function; elsewhere its meta-gradient does. On CUDA either is captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset import TaskDistribution
from maml import MAML, MetaGradient, Weights, as_it_is
from tasks import TaskBatch

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


def adam(
    state: State,
    gradient: Tensor,
    *,
    lr: float,
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
    return State(parameters, exp_avg, exp_avg_sq, iteration, state.sums)


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
        metrics: of an iteration, as `[metrics]`, from the meta-gradient, its norm and the targets.
        accelerate: makes a faster function of the whole iteration, where it is one of tensors alone.
    """

    def __init__(
        self,
        maml: MAML,
        distribution: TaskDistribution,
        *,
        layout: FlatLayout,
        metrics: Callable[[MetaGradient, Tensor, Tensor], Tensor],
        seed: int,
        tasks: int,
        meta_lr: float,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        accelerate: Callable[..., Callable[..., Any]] = as_it_is,
    ) -> None:
        self.maml = maml
        self.distribution = distribution
        self.layout = layout
        self.metrics = metrics
        self.seed = seed
        self.tasks = range(tasks)
        self.meta_lr = meta_lr
        self.clip_value = clip_value
        self.clip_norm = clip_norm
        one_function = distribution.computed and maml.tasks_at_once is None
        self.whole = accelerate(self._whole, SAMPLING_OPTIONS) if one_function else self._whole

    def __call__(self, state: State) -> State:
        return State(*self.whole(*state))

    def _whole(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = State(*tensors)
        batch = self.distribution.sample("train", self.seed, state.iteration + 1, self.tasks)
        result = self.maml.meta_gradient(self.layout.unflatten(state.parameters), batch)
        return tuple(self._update(state, result, batch))

    def _update(self, state: State, result: MetaGradient, batch: TaskBatch) -> State:
        gradient = self.layout.flatten(result.gradients)
        norm = gradient.norm()
        state = state._replace(sums=state.sums + self.metrics(result, norm, batch.query_y))
        return adam(state, clipped(gradient, norm, self.clip_value, self.clip_norm), lr=self.meta_lr)


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

    def __call__(self, state: State) -> State:
        """The next state; `state` is the one that the last call gave, or any other to go on from."""
        if state is not self.state:
            for own, given in zip(self.state, state, strict=True):
                own.copy_(given)
        self.graph.replay()
        return self.state
