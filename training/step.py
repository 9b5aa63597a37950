"""One iteration of meta-training as a function of tensors: tasks, meta-gradient, update, running metrics.

The meta-parameters and the moments of Adam are flat vectors, so that the outer loop is a handful of
operations for any network. Where tasks are computed and not looked up, the whole iteration compiles as
one function; elsewhere its meta-gradient does. On CUDA either is captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from common.batch import TaskBatch, TaskDistribution, first_tensor, stacked_trees
from common.optimizers import Weights
from common.processes import ALONE, World
from common.random import keys_of, minibatch_order, task_stream
from learners.losses import accuracy
from maml import MAML, MetaGradient, as_it_is
from training.schedules import meta_lr_at, multi_step_weights

# An iteration draws its random numbers by long chains of integer operations. Inductor repeats the chain of
# a value wherever that is used unless it is told to keep values early; compiling took minutes.
SAMPLING_OPTIONS = {"realize_opcount_threshold": 10}


class FlatLayout:
    """Named tensors as one vector, in the order of the names, and back as views of it."""

    def __init__(self, weights: Weights) -> None:
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.size = sum(math.prod(shape) for shape in self.shapes.values())

    def flatten(self, weights: Weights) -> Tensor:
        return torch.cat([weights[name].flatten() for name in self.shapes])

    def unflatten(self, vector: Tensor) -> Weights:
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts, strict=True)}


class State(NamedTuple):
    """All that an iteration changes; of several runs at once, with these as the first axis of each."""

    parameters: Tensor  # [parameters], the meta-parameters
    exp_avg: Tensor  # [parameters], first and
    exp_avg_sq: Tensor  # second moment of Adam
    iteration: Tensor  # int64 scalar, iterations so far
    sums: (
        Tensor  # [metrics], since the last point of the curves: measures, the meta-gradient's norm, and TAIL
    )
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
        on_nan: what an iteration does whose numbers are not finite: "skip", it changes nothing but the
            `TAIL`; "stop", it ends the run there: later ones change nothing at all.
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
    on_nan: str = "stop"


# The last two of the sums: how many iterations changed nothing, since their numbers were not finite, and the
# last of them (exact up to 2^24). Infinity for the latter says that the run stands still, one before it.
TAIL = ("skipped", "last_skipped")
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


def clipped(
    gradient: Tensor,
    norm: Tensor,
    value: Tensor | float | None,
    max_norm: Tensor | float | None,
    norm_of: Callable[[Tensor], Tensor] = Tensor.norm,
) -> Tensor:
    """The gradient with elements cut to +-`value`, then shortened to `max_norm`; `norm` is its own."""
    if value is not None:
        gradient = torch.clamp(gradient, -value, value)  # type: ignore[arg-type]  # tensors or numbers
        norm = norm_of(gradient)
    if max_norm is not None:
        gradient = gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return gradient


def all_finite(moved: State, measures: Tensor, norm: Tensor) -> Tensor:
    """Whether an iteration's numbers are finite: a bool. `norm` is the meta-gradient's before clipping, which
    would hide it; a square that overflows would end Adam's steps for ever."""
    parts = [measures, norm[None], moved.parameters, moved.exp_avg_sq]
    if moved.statistics.numel():  # a compiler wants no empty tensor
        parts.append(moved.statistics)
    return torch.stack([part.isfinite().all() for part in parts]).all()


Measure = Callable[[MetaGradient, Tensor, int], Tensor]


def loss_of(result: MetaGradient, targets: Tensor, tasks: int) -> Tensor:
    """An iteration's query loss, `[1]`; of a part of its `tasks`, what it adds to their mean."""
    return result.losses.sum()[None] / tasks


def loss_and_accuracy_of(result: MetaGradient, targets: Tensor, tasks: int) -> Tensor:
    """The same, and query accuracy: `[2]`."""
    share = accuracy(result.outputs, targets).sum() / tasks
    return torch.cat([loss_of(result, targets, tasks), share[None].to(result.losses.dtype)])


class MetaStep:
    """The iteration of a run, or of several runs at once: `step(state)` gives the next state.

    It has two halves: the message, which is all that an iteration learns from its tasks (meta-gradient,
    measures and statistics, in one vector), and the update. Of several processes, each has a share of the
    tasks, and the messages are summed in between.

    Of several runs at once, everything in the state and in `member` has these as its first axis.

    Arguments:
        distribution: of the training tasks.
        layout, statistics_layout: of the meta-parameters and of the running statistics.
        measure: what is measured of an iteration, as `[measures]`, from the meta-gradient, the targets and
            the number of all tasks.
        member: what tells one run from others, scalars by name: "seed", int64; and, where they are not the
            same for all, "inner_lr" and fields of `outer`.
        tasks: of an iteration, in all processes.
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
        measure: Measure = loss_of,
        member: Mapping[str, Tensor],
        tasks: int,
        draws: bool = False,
        world: World = ALONE,
        accelerate: Callable[..., Callable[..., Any]] = as_it_is,
    ) -> None:
        self.maml = maml
        self.distribution = distribution
        self.outer = outer
        self.layout = layout
        self.statistics_layout = statistics_layout
        self.measure = measure
        self.member = dict(member)
        self.tasks = tasks
        self.draws = draws
        self.world = world
        self.stop = False  # whether this process asks all of them to stop
        self.stop_asked: Tensor | None = None  # above 0 where any has asked, in the iteration before
        self.several = member["seed"].dim() > 0
        self.seeds: list[int] = member["seed"].reshape(-1).tolist()
        self.share = world.share(tasks)
        self.numbers = torch.arange(self.share.start, self.share.stop, device=member["seed"].device)
        self.coming: tuple[int, TaskBatch] | None = None
        over_runs = partial(vmap, in_dims=0) if self.several else as_it_is
        self.computed = distribution.computed and (maml.tasks_at_once or tasks) >= tasks
        accelerated: Callable[..., Callable[..., Any]]
        if self.computed:
            accelerated = partial(accelerate, options=SAMPLING_OPTIONS)
            self._message_of = accelerated(over_runs(self._computed_message))
        else:
            accelerated = as_it_is
            self._message_of = over_runs(self._message)
        self._updated = accelerated(over_runs(self._update))
        self._whole = accelerated(over_runs(self._computed_whole))

    # ---- from one state to the next -----------------------------------------------------------

    def __call__(self, state: State, iteration: int | None = None) -> State:
        """The next state; `iteration` is the number of those before: on the host it need not be asked of the
        device."""
        if self.computed and self.world.size == 1:
            return self._named(self._whole(*self._tensors(state), *self._member(), self._own()))
        message = self.message(state, iteration)
        if self.world.size > 1:
            message[-1] = float(self.stop)
        return self.exchanged(state, message, iteration)

    def exchanged(self, state: State, message: Tensor, iteration: int | None) -> State:
        """The next state, from this process's message and those of the others."""
        sum_of_all = self.world.start_sum(message)
        self._fetch_ahead(iteration)
        message = sum_of_all()
        if self.world.size > 1:
            self.stop_asked = message[-1]
        return self.update(state, message)

    def rehearse(self, state: State, iteration: int | None = None) -> None:
        """Does all of an iteration but what needs other processes: compiles what there is to compile."""
        if self.world.size == 1:
            self(state, iteration)
        else:
            self.update(state, self.message(state, iteration))

    def message(self, state: State, iteration: int | None = None) -> Tensor:
        """What this process has learned from its tasks: `[numbers]`, the last of which is 0."""
        if self.computed:
            inputs: tuple[Any, ...] = (self._own(),)
        else:
            inputs = self._own(), self._batch(state, iteration)
        (message,) = self._message_of(state.parameters, state.iteration, *self._member(), *inputs)
        return message

    def update(self, state: State, message: Tensor) -> State:
        """The next state, from what all processes have learned."""
        return self._named(self._updated(*self._tensors(state), *self._member(), message))

    # ---- flat arguments: an empty tensor is not for a compiler, structures take time ------------

    def _tensors(self, state: State) -> tuple[Tensor, ...]:
        return tuple(state) if self.statistics_layout else tuple(state[:-1])

    def _named(self, tensors: tuple[Tensor, ...]) -> State:
        return State._make(tensors if self.statistics_layout else (*tensors, tensors[0][..., :0]))

    def _member(self) -> tuple[Tensor, ...]:
        return tuple(self.member.values())

    def _own(self) -> Tensor:
        """The numbers of this process's tasks, for each run."""
        return self.numbers.expand(len(self.seeds), -1) if self.several else self.numbers

    # ---- functions of tensors, for one run ------------------------------------------------------

    def _computed_whole(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *state, numbers = tensors
        fields, member = state[: -len(self.member)], state[-len(self.member) :]
        (message,) = self._computed_message(fields[0], self._named(tuple(fields)).iteration, *member, numbers)
        return self._update(*fields, *member, message)

    def _computed_message(self, parameters: Tensor, iteration: Tensor, *others: Tensor) -> tuple[Tensor]:
        *member, numbers = others
        batch = self.distribution.sample("train", self._names(member)["seed"], iteration + 1, numbers)
        return self._message(parameters, iteration, *member, numbers, batch)

    def _message(self, parameters: Tensor, iteration: Tensor, *others: Any) -> tuple[Tensor]:
        *values, numbers, batch = others
        member = self._names(values)
        random = self._random(member["seed"], iteration, numbers, batch)
        with self.maml.at_rate(member.get("inner_lr")):
            result = self.maml.meta_gradient(
                self.layout.unflatten(parameters),
                batch,
                **random,
                step_weights=self._step_weights(iteration, parameters.dtype),
                tasks=self.tasks,
            )
        parts = [
            self.layout.flatten(result.gradients),
            self.measure(result, first_tensor(batch.query_y), self.tasks).to(parameters.dtype),
        ]
        if self.statistics_layout:
            parts.append(self.statistics_layout.flatten(result.statistics))
        return (torch.cat([*parts, parameters.new_zeros(1)]),)

    def _update(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *others, message = tensors
        fields, values = others[: -len(self.member)], others[-len(self.member) :]
        state, member = self._named(tuple(fields)), self._names(values)
        gradient, measures, seen = self._parts(message)
        norm = gradient.norm()
        counted = self._counted(state, measures, norm, seen)
        moved = self._moved(counted, gradient, norm, member, Tensor.norm)
        return self._tensors(self._guarded(state, moved, all_finite(moved, measures, norm)))

    def _parts(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Meta-gradient, measures and statistics."""
        seen = self.statistics_layout.size if self.statistics_layout else 0
        measures = len(message) - self.layout.size - seen - 1
        gradient, of_tasks, statistics, _ = message.split([self.layout.size, measures, seen, 1])
        return gradient, of_tasks, statistics

    def _counted(self, state: State, measures: Tensor, norm: Tensor, seen: Tensor) -> State:
        """The state with the metrics of an iteration, and what batch norm has seen in it."""
        state = state._replace(sums=state.sums + torch.cat([measures, norm[None], norm.new_zeros(len(TAIL))]))
        if self.statistics_layout:
            statistics = state.statistics + STATISTICS_MOMENTUM * (seen - state.statistics)
            state = state._replace(statistics=statistics)
        return state

    def _moved(
        self,
        state: State,
        gradient: Tensor,
        norm: Tensor,
        member: Mapping[str, Tensor],
        norm_of: Callable[[Tensor], Tensor],
    ) -> State:
        """The state after a step along the meta-gradient."""
        outer = self.outer
        clip_value, clip_norm = (member.get(n, getattr(outer, n)) for n in ("clip_value", "clip_norm"))
        rule = {"adam": adam, "sgd": sgd}[outer.optimizer]
        lr = self.lr_at(state.iteration, gradient.dtype, member)
        return rule(state, clipped(gradient, norm, clip_value, clip_norm, norm_of), lr=lr)

    def _guarded(self, state: State, moved: State, finite: Tensor) -> State:
        """The next state: `moved` where its numbers are `finite`, else as `on_nan` says. No value is asked of
        the device: who reads the sums sees it."""
        skipped, last = state.sums[-2], state.sums[-1]
        if self.outer.on_nan == "skip":
            tail = torch.stack([skipped + 1, (state.iteration + 1).to(last.dtype)])
            left = state._replace(sums=torch.cat([state.sums[:-2], tail]), iteration=moved.iteration)
        else:
            tail = torch.stack([skipped, torch.full_like(last, torch.inf)])
            left = state._replace(sums=torch.cat([state.sums[:-2], tail]))
            finite = finite & last.isfinite()
        return State(*(torch.where(finite, new, old) for new, old in zip(moved, left, strict=True)))

    def _names(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.member, values, strict=True))

    def _random(self, seed: Tensor, iteration: Tensor, numbers: Tensor, batch: TaskBatch) -> dict[str, Any]:
        """What is random beside the tasks: the examples of the inner steps' minibatches, and the learner's
        own keys."""
        if self.outer.inner_batch is None and not self.draws:
            return {}
        stream = task_stream("train", seed, iteration + 1, numbers, numbers.device)
        order = None
        if self.outer.inner_batch is not None:
            examples = self.maml.training_examples(batch)
            order = minibatch_order(
                stream.at("minibatches"), examples, self.outer.inner_batch, self.maml.steps
            )
        return {"order": order, "keys": keys_of(stream) if self.draws else None}

    def _step_weights(self, iteration: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weights of the multi-step loss."""
        if self.outer.msl_iterations is None:
            return None
        return multi_step_weights(iteration, self.maml.steps, self.outer.msl_iterations, dtype)

    def lr_at(
        self,
        iteration: Tensor,
        dtype: torch.dtype = torch.float64,
        member: Mapping[str, Tensor] | None = None,
    ) -> Tensor | float:
        """The meta-learning rate of the iteration after so many."""
        outer, own = self.outer, member or {}
        first, final = own.get("lr", outer.lr), own.get("final_lr", outer.final_lr)
        return meta_lr_at(outer.schedule, iteration, first, final, outer.iterations, dtype)

    def tasks_of(self, seed: int, iteration: int) -> tuple[TaskBatch, dict[str, Any]]:
        """This process's tasks of the iteration after so many of a run, and what else `MAML.meta_gradient` is
        given."""
        device = self.numbers.device
        batch = self.distribution.sample("train", seed, iteration + 1, self.share)
        done = torch.tensor(iteration, device=device)
        given = self._random(torch.tensor(seed, device=device), done, self.numbers, batch)
        dtype = first_tensor(batch.support_x).dtype
        return batch, given | {"step_weights": self._step_weights(done, dtype), "tasks": self.tasks}

    # ---- tasks that are looked up -----------------------------------------------------------------

    def _batch(self, state: State, iteration: int | None) -> TaskBatch:
        """This process's tasks of the iteration to come, of each run."""
        if iteration is not None and self.coming is not None and self.coming[0] == iteration:
            batch, self.coming = self.coming[1], None
            return batch
        if iteration is None and not self.several:
            return self._sampled(state.iteration + 1)
        return self._sampled((int(state.iteration.flatten()[0]) if iteration is None else iteration) + 1)

    def _sampled(self, iteration: int | Tensor) -> TaskBatch:
        parts = [self.distribution.sample("train", seed, iteration, self.share) for seed in self.seeds]
        if not self.several:
            return parts[0]
        return TaskBatch(*(stacked_trees(list(trees)) for trees in zip(*parts, strict=True)))

    def _fetch_ahead(self, iteration: int | None) -> None:
        """Looks up the tasks of the iteration after while the messages are under way. What is looked up on
        the host has a thread for that."""
        wanted = self.world.size > 1 and not self.computed and not self.distribution.on_host
        if wanted and iteration is not None:
            self.coming = iteration + 1, self._sampled(iteration + 2)


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
