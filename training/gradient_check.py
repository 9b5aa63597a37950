"""Check the meta-gradient that a run will use against its definition, before training.

PyTorch's derivative of an operator may be wrong without an error, in the next version another one's. A
network or loss that is not built in is therefore tried on two small tasks, in float64 if it can: uncompiled
and vectorised on one side; values and first derivatives of a plain loop over tasks on the other.

    exact, joint   central differences of the outer loss along random directions
    first order    the same with constant inner gradients
    Reptile        how far the loop's inner steps move the weights
    implicit       conjugate gradients whose products are central differences of the support gradient

All but the last two are compared with reverse over reverse in the loop as well. That alone counts if the
forward pass stops gradients (`detach`, `no_grad`), which differences do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.func import grad
from torch.nn.utils import get_total_norm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common.batch import TaskBatch, cast_tree, first_tensor, index_tree, tree_map
from common.optimizers import Weights
from common.task import Task
from maml import MAML, RATE
from training.meta_gradients import conjugate_gradients, make_meta_gradient, pooled_loss

STEPS = 2  # at most: later ones start from weights that differ between tasks, as the second one does
# of each task's support and query: batch norm requires some, or positions, which large images have
EXAMPLES, IMAGES, LARGE = 5, 2, 3 * 64 * 64
DIRECTIONS = 2


class Scale(NamedTuple):
    """Sizes that belong to a type of arithmetic."""

    distances: tuple[float, ...]  # of differences, until one agrees: a long one crosses the kinks of ReLUs
    tolerance: float  # relative, in a slope of the part that has second derivatives
    resolution: float  # relative, of a loss
    loop_tolerance: float  # relative, between two orders of the same operations


SCALES = {
    torch.float64: Scale((1e-8, 1e-7, 1e-6, 1e-9, 1e-5, 1e-10, 1e-4), 1e-3, 2e-15, 1e-6),
    torch.float32: Scale((1e-2, 3e-3, 3e-2, 1e-3, 1e-1), 5e-2, 1e-6, 1e-2),
}


class Check(NamedTuple):
    """The outcome of a check."""

    engine: str | None  # the first one that agrees; None: none does
    error: float  # of that, or else of the first engine, in units of the tolerance
    dtype: torch.dtype
    by_loop_alone: str  # why differences do not count, and only the loop was compared with; else empty


def check_meta_gradient(
    maml: MAML, parameters: Weights, batch: TaskBatch, keys: Tensor, engines: Sequence[str]
) -> Check:
    """Return the first of the engines whose meta-gradient agrees with its definition.

    Args:
        batch: at least two tasks; a few of their examples are taken.
        keys: random keys `[tasks, 2]`, see `MAML.meta_gradient`.
    """
    try:
        return _choose(Definition(maml, parameters, batch, keys, torch.float64), engines)
    except (RuntimeError, TypeError, ValueError):  # a tensor inside has another type
        return _choose(Definition(maml, parameters, batch, keys, torch.float32), engines)


def _choose(definition: Definition, engines: Sequence[str]) -> Check:
    errors = []
    for engine in engines:
        errors.append(definition.error(definition.gradient(definition.maml, engine)))
        if errors[-1] <= 1:
            return Check(engine, errors[-1], definition.dtype, definition.by_loop_alone)
    return Check(None, errors[0], definition.dtype, definition.by_loop_alone)


class Definition:
    """A meta-gradient's defining equation, on small tasks in one type of arithmetic."""

    def __init__(
        self, maml: MAML, parameters: Weights, batch: TaskBatch, keys: Tensor, dtype: torch.dtype
    ) -> None:
        self.dtype, self.scale, self.kind = dtype, SCALES[dtype], maml.choices.meta_gradient
        steps = min(maml.steps, STEPS)
        self.maml = maml.in_precision(dtype).with_options(steps=steps, inner_batch=None, tasks_at_once=None)
        self.loop = self.maml.with_options(vectorise=False)
        fresh = self.maml.initial_parameters()  # those of inner steps have fewer rows
        cut = {n: parameters[n][: len(w)] if w.dim() else parameters[n] for n, w in fresh.items()}
        cast = cast_tree(cut, dtype).items()
        self.parameters = {n: _shake(w) if n in maml.initial else w for n, w in cast}
        if maml.choices.head_init != "prototype":  # which needs an example of each class
            shape = first_tensor(batch.support_x).shape[2:]  # of an example
            count = IMAGES if len(shape) > 2 and shape.numel() > LARGE else EXAMPLES
            batch = tree_map(lambda t: t[:, :count] if t.dim() > 1 else t, batch)  # ways have no examples
        self.batch, self.keys = cast_tree(batch, dtype), keys
        self.step_weights = None
        if maml.choices.objective == "multi-step":
            self.step_weights = torch.full((steps,), 1 / steps, dtype=dtype, device=keys.device)
        tasks = Task.of(self.batch, self.maml.call.extras(len(keys), keys))
        self.tasks = [index_tree(tasks, number) for number in range(len(keys))]
        with _FindNarrow(dtype) as mode:
            loss = self.loop.outer_loss(self.parameters, self.tasks[0], self.step_weights)[1].loss
        if dtype is torch.float64 and (mode.narrow or loss.dtype is not dtype):
            raise TypeError("digits are lost")  # as with targets in float32
        self.narrow = mode.narrow
        self.by_loop_alone = ""  # why the last error is that to the loop
        if steps:
            self._shorten_steps()
        self.slopes: dict[tuple[int, float], tuple[float, float]] = {}  # by direction and distance

    def _shorten_steps(self) -> None:
        """Lower the inner rates until a step moves the weights by a hundredth: differences ask for that."""
        start, end, *_ = self.loop.inner_loop(self.parameters, self.tasks[0], 1)
        moved = _norm({name: w - end.fast[name] for name, w in start.fast.items()})
        factor = max(0.01 * _norm(start.fast), 0.01) / max(moved, 1e-12)
        if factor < 1:
            lr = factor * self.maml.choices.inner_lr
            self.maml = self.maml.with_options(inner_lr=lr, inner_lr_max=None)
            self.loop = self.maml.with_options(vectorise=False)
            self.parameters |= {n: factor * w for n, w in self.parameters.items() if n.startswith(RATE)}

    def gradient(self, maml: MAML, engine: str = "unrolled") -> Weights:
        """Return the meta-gradient of the small tasks, as training computes it."""
        compute = make_meta_gradient(maml, engine=engine)
        result = compute(self.parameters, self.batch, keys=self.keys, step_weights=self.step_weights)
        return {name: g.detach() for name, g in result.gradients.items()}

    def error(self, gradient: Weights) -> float:
        """Return how far a meta-gradient is from its definition, in units of what is tolerated."""
        if self.kind in ("reptile", "implicit"):
            of_task = self._reptile if self.kind == "reptile" else self._implicit
            parts = [of_task(task) for task in self.tasks]
            reference = {n: torch.stack([part[n] for part in parts]).mean(0) for n in parts[0]}
            tolerance = self.scale.loop_tolerance if self.kind == "reptile" else self.scale.tolerance
            return _distance({name: gradient[name] for name in reference}, reference) / tolerance
        to_loop = _distance(gradient, self.loop_gradient) / self.scale.loop_tolerance
        if self.narrow:  # its rounding is as large as what differences would resolve
            self.by_loop_alone = f"{str(self.narrow)[6:]} inside is too coarse for differences"
            return to_loop * self.scale.loop_tolerance / (16 * torch.finfo(self.narrow).eps)
        by_differences = self.error_by_differences(gradient)
        self.by_loop_alone = ""
        if by_differences > 1:
            if self.stops_gradients:
                self.by_loop_alone = "the learner or the loss stops gradients on purpose"
            elif not all(self._settles(number) for number in range(DIRECTIONS)):
                self.by_loop_alone = "differences do not settle, the loss is too rough here"
                to_loop *= 1e-3  # rounding is amplified there
            return to_loop if self.by_loop_alone else by_differences
        loop_is_right = to_loop <= 1 or self.error_by_differences(self.loop_gradient) <= 1
        return max(to_loop, by_differences) if loop_is_right else by_differences

    @cached_property
    def loop_gradient(self) -> Weights:
        """Reverse over reverse, one task after another."""
        return self.gradient(self.loop)

    # ---- central differences ----------------------------------------------------------------

    def error_by_differences(self, gradient: Weights) -> float:
        """Return the largest error of a gradient's slopes, each by the distance that fits best.

        The error of an exact gradient is relative to its second-order part, if there are inner steps; that is
        computed only if the error is not small even for a thousandth of the gradient.
        """
        errors = []
        for number, direction in enumerate(self.directions):
            slopes = _dot(gradient, direction)
            size = self.scale.tolerance * slopes.norm().item()
            error = self._slope_error(number, slopes.sum().item(), size, self.scale.distances[:1])
            if error > 1:
                has_second = self.kind == "exact" and self.loop.steps
                first = _dot(self.first_order_gradient, direction) if has_second else 0.0
                size = max(size, (slopes - first).norm().item())
                error = self._slope_error(number, slopes.sum().item(), size, self.scale.distances)
            errors.append(error)
            if error > 1 and not self._settles(number):
                break
        return max(errors)

    def _slope_error(self, number: int, slope: float, size: float, distances: Sequence[float]) -> float:
        """Return the error of a slope along a direction, in units of what is tolerated at this size.

        Distances at which rounding is larger than that tell nothing; if all are, the first counts.
        """
        best, tolerance = torch.inf, self.scale.tolerance * size
        noise = self.scale.resolution * (1 + abs(self._slope(number, distances[0])[1]))
        telling = [distance for distance in distances if noise / distance <= tolerance]
        for distance in telling or distances[:1]:
            error = abs(slope - self._slope(number, distance)[0]) / (tolerance + noise / distance)
            best = min(best, error)
            if best <= 1 or (distance == self.scale.distances[2] and self._jumps(number)):
                break
        return best

    def _jumps(self, number: int) -> bool:
        """Return whether the first three distances give slopes that are far apart, and not by rounding."""
        distances = sorted(self.scale.distances[:3])
        noise = self.scale.resolution * (1 + abs(self._slope(number, distances[0])[1])) / distances[0]
        pairs = pairwise(self._slope(number, distance)[0] for distance in distances)
        return all(abs(a - b) > 0.5 * max(abs(a), abs(b)) + 10 * noise for a, b in pairs)

    def _settles(self, number: int) -> bool:
        """Return whether differences over two neighbouring distances agree in a direction."""
        if self._jumps(number):
            return False
        pairs = pairwise(self._slope(number, distance)[0] for distance in sorted(self.scale.distances))
        return any(abs(a - b) <= 10 * self.scale.tolerance * max(abs(a), abs(b)) for a, b in pairs)

    @cached_property
    def directions(self) -> list[Weights]:
        """The first along the gradient with random signs, the others at random; each tensor's has norm 1."""
        generator = torch.Generator().manual_seed(0)

        def unit(tensor: Tensor) -> Tensor:
            return tensor / tensor.norm().clamp(min=torch.finfo(tensor.dtype).tiny)

        def draw(like: Tensor, *shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)

        along = {n: unit(g) * draw(g).sign() for n, g in self.loop_gradient.items()}
        others = [{n: unit(draw(g, *g.shape)) for n, g in along.items()} for _ in range(DIRECTIONS - 1)]
        return [along, *others]

    def _slope(self, number: int, distance: float) -> tuple[float, float]:
        """Return the slope of the outer loss along a direction, and the loss."""
        if (number, distance) not in self.slopes:
            direction = self.directions[number]
            ahead, behind = (
                self.outer_loss(_move(self.parameters, d, direction)) for d in (distance, -distance)
            )
            self.slopes[number, distance] = (ahead - behind) / (2 * distance), ahead
        return self.slopes[number, distance]

    @torch.no_grad()
    def outer_loss(self, parameters: Weights) -> float:
        """Return the mean over tasks of the function whose gradient is the meta-gradient."""
        losses = [self._loss_of(parameters, number).item() for number in range(len(self.tasks))]
        return sum(losses) / len(losses)

    def _loss_of(self, parameters: Weights, number: int) -> Tensor:
        task = self.tasks[number]
        if self.kind == "exact":
            return self.loop.outer_loss(parameters, task, self.step_weights)[0]
        if self.kind == "first-order":
            return self._first_order_loss(parameters, task, self.constants[number])
        return pooled_loss(self.loop, parameters, task)[0]

    # ---- first order, Reptile and implicit --------------------------------------------------

    @cached_property
    def first_order_gradient(self) -> Weights:
        return self.gradient(self.loop.with_options(meta_gradient="first-order"))

    @cached_property
    def constants(self) -> list[list[tuple[Weights, Weights]]]:
        """The gradients and changed buffers of each task's inner steps."""
        steps = []
        for task in self.tasks:
            state, steps_of_task = self.loop.start(self.parameters, task), []
            for step in range(self.loop.steps):
                shared = self.loop.shared_at(self.parameters, step)
                state, gradient, _, buffers = self.loop.inner_step(state, shared, *task.at_step(step))
                task = task.with_buffers(buffers)
                steps_of_task.append((gradient, buffers))
            steps.append(steps_of_task)
        return steps

    def _first_order_loss(
        self, parameters: Weights, task: Task, constants: list[tuple[Weights, Weights]]
    ) -> Tensor:
        """Return the outer loss as a function of the parameters alone, inner gradients being constants."""
        state, losses = self.loop.start(parameters, task), []
        for step, (gradient, buffers) in enumerate(constants):
            shared = self.loop.shared_at(parameters, step)
            state = self.loop.optimizer.update(state, gradient, shared.rates, shared.anchor)
            task = task.with_buffers(buffers)
            losses.append(self.loop.query_loss(state.fast, shared.weights, task.for_query(step + 1))[0])
        return losses[-1] if self.step_weights is None else (self.step_weights * torch.stack(losses)).sum()

    def _reptile(self, task: Task) -> Weights:
        start, *_, end = self.loop.inner_loop(self.parameters, task.pooled(), self.loop.steps)
        return {name: w - end.fast[name] for name, w in start.fast.items() if name in self.parameters}

    def _implicit(self, task: Task) -> Weights:
        maml, distance = self.loop, self.scale.distances[0]
        choices, strength = maml.choices, maml.optimizer.proximal
        *_, end = maml.inner_loop(self.parameters, task, maml.steps)
        shared_weights, extras = end.shared.weights, replace(end.task.extras, mask=task.support_mask)
        (v, u), _ = grad(maml.query_loss, (0, 1), has_aux=True)(end.fast, shared_weights, end.task)

        def support_gradients(fast: Weights, shared: Weights) -> tuple[Weights, Weights]:
            def loss(fast: Weights, shared: Weights) -> Tensor:
                outputs = maml.call(fast | shared, task.support_x, extras)
                return maml.loss(outputs, task.support_y, extras)

            return grad(loss, (0, 1))(fast, shared)

        def second(x: Weights) -> tuple[Weights, Weights]:
            """Return (d2L/dw dw) x and (d2L/ds dw) x."""
            if self.stops_gradients:
                return grad(lambda *weights: _dot(support_gradients(*weights)[0], x).sum(), (0, 1))(
                    end.fast, shared_weights
                )
            step = distance / max(1.0, _norm(x))
            ahead, behind = (support_gradients(_move(end.fast, d, x), shared_weights) for d in (step, -step))
            of_fast, of_shared = (
                {n: (a[n] - b[n]) / (2 * step) for n in a} for a, b in zip(ahead, behind, strict=True)
            )
            return of_fast, of_shared

        def product(x: Weights) -> Weights:
            hessian, _ = second({n: w[0] for n, w in x.items()})
            return {n: (1 + choices.cg_damping) * x[n] + hessian[n][None] / strength for n in x}

        if not choices.cg_steps:
            return v | u
        x = conjugate_gradients(product, {n: w[None] for n, w in v.items()}, choices.cg_steps)
        x = {n: w[0] for n, w in x.items()}
        return x | {n: g - m / strength for (n, g), m in zip(u.items(), second(x)[1].values(), strict=True)}

    @cached_property
    def stops_gradients(self) -> bool:
        """Return whether the learner or the loss stops gradients on purpose."""
        task, weights = self.tasks[0], self.maml.call.parameters
        weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
        with _FindStops() as mode:
            x, y, extras = task.at_step(0)
            self.maml.loss(self.maml.call(weights, x, extras), y, extras)
        return mode.stopped


class _FindNarrow(TorchDispatchMode):
    """A mode that notices conversions to a type with fewer digits than `dtype`: `narrow`, the coarsest."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.digits = torch.finfo(dtype).eps
        self.narrow: torch.dtype | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default:
            before, after = args[0].dtype, result.dtype
            real = all(t.is_floating_point or t.is_complex for t in (before, after))
            if real and torch.finfo(after).eps > max(self.digits, torch.finfo(before).eps):
                self.digits, self.narrow = torch.finfo(after).eps, after
        return result


class _FindStops(TorchFunctionMode):
    """A mode that notices functions of tensors that require a gradient, and whose results do not.

    What happens within an `autograd.Function` does not count: that declares its derivative.
    """

    stopped = False

    def __enter__(self) -> _FindStops:
        apply = vars(torch.autograd.Function)["apply"]

        def without_mode(cls: Any, *arguments: Any, **options: Any) -> Any:
            stopped = self.stopped
            result = apply.__get__(None, cls)(*arguments, **options)
            self.stopped = stopped
            return result

        self.patch = mock.patch.object(torch.autograd.Function, "apply", classmethod(without_mode))
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.stop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        result = func(*args, **kwargs or {})
        stops = func in (Tensor.detach, Tensor.detach_) or not torch.is_grad_enabled()
        self.stopped = self.stopped or (bool(tensors) and stops)
        return result


def _shake(weight: Tensor) -> Tensor:
    """Move a weight a little, off the kinks and saddle points where weights of zero begin."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
    return weight + (0.01 + 0.1 * weight.square().mean().sqrt()) * noise


def _dot(a: Weights, b: Weights) -> Tensor:
    """Return the products of two dictionaries of tensors, `[tensors]`."""
    return torch.stack([(a[name] * b[name]).sum() for name in a])


def _norm(weights: Weights) -> float:
    return get_total_norm(weights.values()).item()


def _move(weights: Weights, distance: float, direction: Weights) -> Weights:
    return {name: w + distance * direction[name] for name, w in weights.items()}


def _distance(a: Weights, b: Weights) -> float:
    """Return the distance of two dictionaries of tensors, relative to the norm of the second; inf for NaN."""
    difference = _norm({name: a[name] - b[name] for name in b})
    return difference / max(_norm(b), 1e-12) if difference < torch.inf else torch.inf
