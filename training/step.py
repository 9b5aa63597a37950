"""One iteration of meta-training as a function of tensors: tasks, meta-gradient, update, running metrics.

    step = MetaStep(maml, distribution, options, {"seed": seed})
    state = step(state)

Meta-parameters and Adam's moments are flat vectors, so that the outer loop is a handful of operations for
any network. Where sampling is a function of tensors, the whole iteration compiles as one function, or, if it
takes its tasks in chunks, as three: sampling, the meta-gradient of a chunk, update. Else the meta-gradient
compiles alone. On CUDA all of it is captured as a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from common.batch import TaskBatch, TaskDistribution, first_tensor, index_tree, stack_trees
from common.optimizers import Weights, bias_correction
from common.processes import ALONE, World
from common.random import derive_keys, minibatch_order, task_stream
from common.task import Extras, Task
from learners.reading import Reading, choose_reading
from maml import MAML
from training.adjoint import run_as_is
from training.meta_gradients import make_meta_gradient
from training.options import TrainingOptions

# An iteration draws its random numbers by long chains of integer operations. Inductor repeats the chain of
# a value wherever that is used unless it is told to keep values early; compiling took minutes.
SAMPLING_OPTIONS = {"realize_opcount_threshold": 10}
STATISTICS_MOMENTUM = 0.1  # PyTorch's
STAGES = 10  # in which the multi-step loss moves to the last step
FLOOR = 0.03  # the earlier steps keep this share of their first weights
# The last two of the sums: how many iterations were skipped because of non-finite numbers, and the last of
# them (exact up to 2^24). If the latter is infinite, the run has stopped; `iteration` is its last good one.
TAIL = ("skipped", "last_skipped")
LABELLED = "labelled_tasks"  # of which an accuracy is the mean, where others have no label

Members = Mapping[str, Tensor]  # what tells runs apart, by name of the option: scalars, or [runs]


class FlatLayout:
    """Named tensors as one vector, in the order of the names, and back as views of it."""

    def __init__(self, weights: Weights) -> None:
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.size = sum(self.sizes)

    def flatten(self, weights: Weights) -> Tensor:
        return torch.cat([weights[n].flatten() for n in self.shapes]) if self.shapes else torch.empty(0)

    def unflatten(self, vector: Tensor) -> Weights:
        parts = zip(self.shapes.items(), vector.split(self.sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}


class State(NamedTuple):
    """State carried from one iteration to the next; with several runs, they are the first axis of all."""

    parameters: Tensor  # [parameters], the meta-parameters
    exp_avg: Tensor  # [parameters], Adam's first moment
    exp_avg_sq: Tensor  # [parameters], Adam's second moment
    iteration: Tensor  # int64 scalar, iterations so far
    updates: Tensor  # int64 scalar, those that were not skipped
    sums: Tensor  # [metrics] since the last point of the curves: measures, meta-gradient norm, and TAIL
    statistics: Tensor  # [numbers], running statistics of per-step batch norm; empty without


# ---- schedules over iterations, which count from 0 -----------------------------------------------


def multi_step_weights(iteration: Tensor, steps: int, iterations: int, dtype: torch.dtype) -> Tensor:
    """Return the weights `[steps]` of the query losses after each inner step (Antoniou et al. 2019).

    They are equal at first. The earlier steps' fall linearly, in ten equal stages over `iterations`, to
    0.03 / steps, as in their code; the last step takes the rest.
    """
    stage = (iteration * STAGES // iterations).clamp(max=STAGES)
    earlier = (1 - stage.to(dtype) / STAGES).clamp(min=FLOOR) / steps
    last = 1 - (steps - 1) * earlier
    return torch.cat([earlier.expand(steps - 1), last[None]])


def meta_lr_at(options: TrainingOptions, members: Mapping[str, Tensor], iteration: Tensor) -> Tensor | float:
    """Return the learning rate of the outer loop, in the type of `iteration`.

    It is constant, is halved every so many iterations, or goes from the first to the final one: linearly, or
    by half a cosine wave. `members` has the rates of runs that differ in them.
    """
    first, final = (members.get(n, getattr(options, n)) for n in ("meta_lr", "meta_lr_final"))
    if options.meta_lr_schedule == "constant":
        return first
    if options.meta_lr_schedule == "halving":
        return first * torch.exp2(-torch.floor(iteration / options.meta_lr_halving))
    done = (iteration / options.iterations).clamp(max=1.0)
    if options.meta_lr_schedule == "linear":
        return first + (final - first) * done
    return final + (first - final) * 0.5 * (1 + torch.cos(math.pi * done))


# ---- the update ----------------------------------------------------------------------------------


def adam(state: State, gradient: Tensor, *, lr: float | Tensor) -> State:
    """Move parameters and moments as `torch.optim.Adam` does (Kingma and Ba 2015)."""
    beta_1, beta_2, eps = 0.9, 0.999, 1e-8
    step = (state.updates + 1).to(gradient.dtype)
    correction_1, correction_2 = bias_correction(beta_1, step), bias_correction(beta_2, step)
    exp_avg = state.exp_avg + (1 - beta_1) * (gradient - state.exp_avg)
    exp_avg_sq = beta_2 * state.exp_avg_sq + (1 - beta_2) * gradient * gradient
    denominator = (exp_avg_sq / correction_2).sqrt() + eps
    parameters = state.parameters - lr * (exp_avg / correction_1) / denominator
    return state._replace(parameters=parameters, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)


def sgd(state: State, gradient: Tensor, *, lr: float | Tensor) -> State:
    """Move parameters along the gradient."""
    return state._replace(parameters=state.parameters - lr * gradient)


def clip(
    gradient: Tensor, norm: Tensor, value: Tensor | float | None, max_norm: Tensor | float | None
) -> Tensor:
    """Cut the elements of a gradient of this `norm` to +-`value`, then shorten it to `max_norm`."""
    if value is not None:
        gradient = torch.clamp(gradient, -value, value)  # type: ignore[arg-type]  # tensors or numbers
        norm = gradient.norm()
    if max_norm is not None:
        gradient = gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return gradient


# ---- the iteration -------------------------------------------------------------------------------


def name_metrics(reading: Reading) -> list[str]:
    """Return the names of the metrics of an iteration, in the order of `State.sums`."""
    accuracy = ["query_accuracy", *[LABELLED] * reading.is_masked] if reading.has_accuracy else []
    return ["query_loss", *accuracy, "meta_gradient_norm", *TAIL]


class MetaStep:
    """The iteration of a run, or of several runs at once: `step(state)` returns the next state.

    It has two halves: the *message*, which is what an iteration learns from its tasks (meta-gradient,
    measures and statistics, in one vector), and the update. Each of several processes has a share of the
    tasks, and the messages are summed in between.

    Args:
        members: what tells runs apart, scalars by name of the option (with several runs `[runs]`): "seed",
            int64; and those of "inner_lr", "meta_lr", "meta_lr_final", "grad_clip", "grad_clip_norm" that
            differ between runs.
    """

    def __init__(
        self,
        maml: MAML,
        distribution: TaskDistribution,
        options: TrainingOptions,
        members: Members,
        *,
        world: World = ALONE,
        accelerate: Callable[..., Callable[..., Any]] = run_as_is,
    ) -> None:
        self.maml, self.distribution, self.options = maml, distribution, options
        self.reading = choose_reading(maml.reading, distribution.most_ways)
        self.members, self.world, self.tasks = dict(members), world, options.meta_batch_size
        parameters = maml.initial_parameters()
        self.layout, self.dtype = FlatLayout(parameters), next(iter(parameters.values())).dtype
        self.statistics_layout = FlatLayout(maml.initial_statistics())
        self.several = members["seed"].dim() > 0
        self.seeds: list[int] = members["seed"].reshape(-1).tolist()
        example = index_tree(distribution.sample("train", 0, 0, range(1)).support_x, 0)
        self.draws = maml.call.draws(example)  # random numbers
        self.share = world.share(self.tasks)
        numbers = torch.arange(self.share.start, self.share.stop, device=members["seed"].device)
        self.numbers = numbers.expand(len(self.seeds), -1) if self.several else numbers
        self.at_once = distribution.computed and (maml.tasks_at_once or self.tasks) >= self.tasks
        self.meta_gradient = make_meta_gradient(
            maml,
            engine=options.engine,
            accelerate=run_as_is if self.at_once else accelerate,  # at once: part of a larger function
            in_transform=self.several,
        )
        self.stop = False  # whether this process asks all of them to stop
        self.stop_asked: Tensor | None = None  # above 0 if any asked so in the last iteration
        speed_up = partial(accelerate, options=SAMPLING_OPTIONS) if distribution.computed else run_as_is
        self._fast_iterate = self._at_edge(self._iterate, speed_up)
        self._fast_sample = self._at_edge(self._sample, speed_up)
        message, fast = (self._message_of_numbers, speed_up) if self.at_once else (self._message, run_as_is)
        self._send = self._at_edge(message, fast)
        self._receive = self._at_edge(self._update, speed_up)

    def _at_edge(
        self,
        function: Callable[..., State | Tensor | TaskBatch],
        accelerate: Callable[..., Callable[..., Any]],
    ) -> Callable[..., Any]:
        """Make a fast function of one that takes a state, other tensors by name, and one value more.

        The others are the members, and what tasks are read from. A compiler is quickest with a flat tuple of
        tensors, none of them empty: they are packed and unpacked here and nowhere else. With several runs,
        all of them go through at once.
        """
        fields = State._fields if self.statistics_layout.size else State._fields[:-1]
        tensors = self.distribution.tensors if self.distribution.computed else {}
        others = {**self.members, **tensors}
        names = (*fields, *others)
        axes = (*[0] * (len(fields) + len(self.members)), *[None] * len(tensors), 0)  # of several runs

        def unpack(tensors: Mapping[str, Tensor]) -> State:
            return State(**{"statistics": tensors["parameters"][..., :0]} | {n: tensors[n] for n in fields})

        def flat(*tensors: Any) -> tuple[Any, ...]:
            inputs = dict(zip(names, tensors[:-1], strict=True))
            result = function(unpack(inputs), {name: inputs[name] for name in others}, tensors[-1])
            return result[: len(fields)] if isinstance(result, State) else (result,)

        fast = accelerate(vmap(flat, axes) if self.several else flat)

        def call(state: State, last: Any) -> Any:
            outputs = fast(*state[: len(fields)], *others.values(), last)
            return unpack(dict(zip(fields, outputs, strict=True))) if len(outputs) > 1 else outputs[0]

        return call

    # ---- from one state to the next -----------------------------------------------------------

    def __call__(self, state: State, iteration: int | None = None, *, alone: bool = False) -> State:
        """Return the next state; `alone`: by this process's tasks, which compiles what there is to compile.

        `iteration` are those done: None waits for the device to tell.
        """
        if self.at_once and self.world.size == 1:
            return self._fast_iterate(state, self.numbers)
        message = self.message(state, iteration)
        if self.world.size > 1 and not alone:
            message[-1] = float(self.stop)
            message = self.world.sum(message)
            self.stop_asked = message[-1]
        return self._receive(state, message)

    def message(self, state: State, iteration: int | None) -> Tensor:
        """Return what this process learns from its tasks: `[numbers]`, the last of which is 0."""
        if self.at_once:
            return self._send(state, self.numbers)
        if self.distribution.computed:
            return self._send(state, (self.numbers, self._fast_sample(state, self.numbers)))
        coming = 1 + (state.iteration.flatten()[0] if iteration is None else iteration)
        parts = [self.distribution.sample("train", seed, coming, self.share) for seed in self.seeds]
        batch = stack_trees(parts) if self.several else parts[0]
        return self._send(state, (self.numbers, batch))

    # ---- functions of tensors, for one run ------------------------------------------------------

    def _iterate(self, state: State, members: Members, numbers: Tensor) -> State:
        return self._update(state, members, self._message_of_numbers(state, members, numbers))

    def _sample(self, state: State, members: Members, numbers: Tensor) -> TaskBatch:
        distribution = self.distribution.with_tensors(members)
        return distribution.sample("train", members["seed"], state.iteration + 1, numbers)

    def _message_of_numbers(self, state: State, members: Members, numbers: Tensor) -> Tensor:
        return self._message(state, members, (numbers, self._sample(state, members, numbers)))

    def _message(self, state: State, members: Members, tasks: tuple[Tensor, TaskBatch]) -> Tensor:
        numbers, batch = tasks
        with self.maml.use_rate(members.get("inner_lr")):
            result = self.meta_gradient(
                self.layout.unflatten(state.parameters),
                batch,
                **self._inputs(members["seed"], state.iteration, numbers, batch),
            )
        measures = [result.losses.sum()]  # this part's contributions to means over tasks
        if self.reading.has_accuracy:
            shares = self.reading.accuracy(result.outputs, batch.query_y, batch.query_mask)
            masked = self.reading.is_masked  # NaN of a task that has no label
            sums = [shares.nansum(), (~shares.isnan()).sum()] if masked else [shares.sum()]
            measures += [part.to(result.losses.dtype) for part in sums]
        means = torch.stack(measures).to(state.parameters.dtype) / self.tasks  # whatever the loss computes in
        parts = [self.layout.flatten(result.gradients), means]
        if self.statistics_layout.size:
            parts.append(self.statistics_layout.flatten(result.statistics))
        return torch.cat([*parts, state.parameters.new_zeros(1)])

    def _update(self, state: State, members: Members, message: Tensor) -> State:
        size, length = self.layout.size, self.statistics_layout.size
        gradient, measures, statistics, _ = message.split([size, len(message) - size - length - 1, length, 1])
        norm = gradient.norm()
        tail = norm.new_zeros(len(TAIL))
        counted = state._replace(sums=state.sums + torch.cat([measures, norm[None], tail]))
        if length:
            change = STATISTICS_MOMENTUM * (statistics - state.statistics)
            counted = counted._replace(statistics=state.statistics + change)
        options = self.options
        value, max_norm = (members.get(n, getattr(options, n)) for n in ("grad_clip", "grad_clip_norm"))
        rule = {"adam": adam, "sgd": sgd}[options.meta_optimizer]
        lr = meta_lr_at(options, members, state.iteration.to(gradient.dtype))
        moved = rule(counted, clip(gradient, norm, value, max_norm), lr=lr)
        moved = moved._replace(iteration=state.iteration + 1, updates=state.updates + 1)
        # the norm before clipping, which would hide it; a second moment that overflows would end Adam's steps
        parts = [measures, norm[None], moved.parameters, moved.exp_avg_sq, *[moved.statistics] * bool(length)]
        return self._guard(state, moved, torch.stack([part.isfinite().all() for part in parts]).all())

    def _guard(self, state: State, moved: State, finite: Tensor) -> State:
        """Return `moved` if its numbers are finite, else what --on-nan says; the device is not asked."""
        skipped, last = state.sums[-2], state.sums[-1]
        if self.options.on_nan == "skip":
            tail, iteration = [skipped + 1, moved.iteration.to(last.dtype)], moved.iteration
        else:
            tail, iteration = [skipped, torch.full_like(last, torch.inf)], state.iteration
            finite = finite & last.isfinite()
        fallback = state._replace(sums=torch.cat([state.sums[:-2], torch.stack(tail)]), iteration=iteration)
        return State(*(torch.where(finite, new, old) for new, old in zip(moved, fallback, strict=True)))

    def _inputs(self, seed: Tensor, iteration: Tensor, numbers: Tensor, batch: TaskBatch) -> dict[str, Any]:
        """Return what the meta-gradient takes besides parameters and tasks, by name."""
        choices, steps = self.maml.choices, self.maml.steps
        inputs: dict[str, Any] = {"tasks": self.tasks}
        if choices.inner_batch is not None or self.draws:
            stream = task_stream("train", seed, iteration + 1, numbers, numbers.device)
            pools, mask = choices.meta_gradient == "reptile", batch.support_mask
            sets = [batch.support_x, batch.query_x][: 1 + pools]
            examples = sum(first_tensor(part).shape[1] for part in sets)
            mask = Task.of(batch, Extras()).pooled_mask(axis=1) if pools else mask
            batches = stream.at("minibatches"), examples, choices.inner_batch, steps, mask
            inputs["order"] = minibatch_order(*batches)
            inputs["keys"] = derive_keys(stream) if self.draws else None
        if choices.objective == "multi-step":
            last = self.options.msl_iterations
            inputs["step_weights"] = multi_step_weights(iteration, steps, last, self.dtype)
        return inputs

    def sample_tasks(self, seed: int, iteration: int) -> tuple[TaskBatch, dict[str, Any]]:
        """Return this process's tasks of a run's next iteration, and the meta-gradient's other inputs."""
        device = self.numbers.device
        batch = self.distribution.sample("train", seed, iteration + 1, self.share)
        done, numbers = torch.tensor(iteration, device=device), self.numbers.view(-1)[: len(self.share)]
        return batch, self._inputs(torch.tensor(seed, device=device), done, numbers, batch)


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
            for tensor, new in zip(self.state, step(self.state), strict=True):
                tensor.copy_(new)

    def __call__(self, state: State, iteration: int | None = None) -> State:
        """Return the next state; `state` is what the last call returned, or any other to continue from."""
        if state is not self.state:
            for tensor, new in zip(self.state, state, strict=True):
                tensor.copy_(new)
        self.graph.replay()
        return self.state
