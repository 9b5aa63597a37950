"""The same iteration as others write it: their loops over tasks, and JAX.

Each entry of `PEERS` is a function from a `Work` to a `Contender`, and imports its library itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from common.batch import TaskBatch, TaskDistribution

META_LR = 1e-3


@dataclass(frozen=True)
class Work:
    """What is timed: a network, a family of tasks and the sizes."""

    name: str
    learner: nn.Module  # its weights are where everybody begins
    distribution: TaskDistribution
    tasks: int
    steps: int
    inner_lr: float
    iterations: int  # of a timing
    slow_iterations: int  # the same for loops over tasks

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.cross_entropy if self.distribution.classification else F.mse_loss

    def batch(self, iteration: int) -> TaskBatch:
        return self.distribution.sample("train", 0, iteration, range(self.tasks))


@dataclass(frozen=True)
class Contender:
    run: Callable[[int], None]  # that many iterations of training, done when it returns
    gradient: Callable[[TaskBatch], dict[str, np.ndarray]]  # meta-gradient at the initial weights
    slow: bool = False


def _numpy(gradients: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: g.detach().double().numpy() for name, g in gradients.items()}


# ---- PyTorch --------------------------------------------------------------------------------


def higher_loop(work: Work) -> Contender:
    """`higher`, as its examples use it."""
    import higher

    def meta_backward(learner: nn.Module, batch: TaskBatch) -> None:
        inner = torch.optim.SGD(learner.parameters(), lr=work.inner_lr)
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            with higher.innerloop_ctx(learner, inner, copy_initial_weights=False) as (fast, optimizer):
                for _ in range(work.steps):
                    optimizer.step(work.loss(fast(support_x), support_y))
                (work.loss(fast(query_x), query_y) / len(batch.query_x)).backward()

    return _with_backward(work, meta_backward)


def learn2learn_loop(work: Work) -> Contender:
    """`learn2learn.algorithms.MAML`, as its examples use it."""
    from learn2learn.algorithms import MAML

    def meta_backward(learner: nn.Module, batch: TaskBatch) -> None:
        maml = MAML(learner, lr=work.inner_lr)
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            clone = maml.clone()
            for _ in range(work.steps):
                clone.adapt(work.loss(clone(support_x), support_y))
            (work.loss(clone(query_x), query_y) / len(batch.query_x)).backward()

    return _with_backward(work, meta_backward)


def _with_backward(work: Work, meta_backward: Callable[[nn.Module, TaskBatch], None]) -> Contender:
    learner = copy.deepcopy(work.learner)
    optimizer = torch.optim.Adam(learner.parameters(), lr=META_LR)

    def run(iterations: int) -> None:
        for i in range(iterations):
            optimizer.zero_grad()
            meta_backward(learner, work.batch(i))
            optimizer.step()

    def gradient(batch: TaskBatch) -> dict[str, np.ndarray]:
        fresh = copy.deepcopy(work.learner)
        meta_backward(fresh, batch)
        return _numpy({name: w.grad for name, w in fresh.named_parameters() if w.grad is not None})

    return Contender(run, gradient, slow=True)


def torch_func(work: Work) -> Contender:
    """`torch.func`: `grad` in `vmap`, eager, as PyTorch's tutorials write it."""
    learner = copy.deepcopy(work.learner)
    weights = dict(learner.named_parameters())
    optimizer = torch.optim.Adam(weights.values(), lr=META_LR)

    def query_loss(weights: dict[str, Tensor], *task: Tensor) -> Tensor:
        support_x, support_y, query_x, query_y = task

        def support_loss(weights: dict[str, Tensor]) -> Tensor:
            return work.loss(functional_call(learner, weights, (support_x,)), support_y)

        for _ in range(work.steps):
            gradients = grad(support_loss)(weights)
            weights = {name: w - work.inner_lr * gradients[name] for name, w in weights.items()}
        return work.loss(functional_call(learner, weights, (query_x,)), query_y)

    def meta_loss(weights: dict[str, Tensor], batch: TaskBatch) -> Tensor:
        return vmap(query_loss, (None, 0, 0, 0, 0))(weights, *batch).mean()

    def run(iterations: int) -> None:
        for i in range(iterations):
            optimizer.zero_grad()
            meta_loss(weights, work.batch(i)).backward()
            optimizer.step()

    initial = {name: w.detach().clone() for name, w in work.learner.named_parameters()}
    return Contender(run, lambda batch: _numpy(grad(meta_loss)(initial, batch)))


# ---- JAX ------------------------------------------------------------------------------------


def _jax_network(learner: nn.Module) -> Callable[[dict[str, Any], Any], Any]:
    """The learner's layers as a function of its parameters by name; images are channels last."""
    import jax
    import jax.numpy as jnp

    from learners.batch_norm import BatchNorm

    layers = list(learner.named_children())

    def network(weights: dict[str, Any], x: Any) -> Any:
        for name, layer in layers:
            if isinstance(layer, nn.Linear):
                x = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            elif isinstance(layer, nn.Conv2d):
                padding = [(p, p) for p in layer.padding]
                x = jax.lax.conv_general_dilated(
                    x, weights[f"{name}.weight"], layer.stride, padding,
                    dimension_numbers=("NHWC", "OIHW", "NHWC"),
                )  # fmt: skip
            elif isinstance(layer, BatchNorm):
                axes = tuple(range(x.ndim - 1))
                mean, variance = x.mean(axes), x.var(axes)
                x = (x - mean) * jax.lax.rsqrt(variance + layer.eps) + weights[f"{name}.bias"]
            elif isinstance(layer, nn.ReLU):
                x = jax.nn.relu(x)
            else:  # the mean over space
                x = jnp.mean(x, (1, 2))
        return x

    return network


def _jax(work: Work, *, scan: bool) -> Contender:
    import jax
    import jax.numpy as jnp

    classification = work.distribution.classification
    network = _jax_network(work.learner)
    initial = {name: jnp.asarray(w.detach().numpy()) for name, w in work.learner.named_parameters()}

    def loss(weights: Any, x: Any, y: Any) -> Any:
        outputs = network(weights, x)
        if classification:
            return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1).mean()
        return jnp.mean((outputs - y) ** 2)

    def query_loss(weights: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(work.steps):
            gradients = jax.grad(loss)(weights, support_x, support_y)
            weights = jax.tree.map(lambda w, g: w - work.inner_lr * g, weights, gradients)
        return loss(weights, query_x, query_y)

    def meta_loss(weights: Any, batch: Any) -> Any:
        return jax.vmap(query_loss, (None, 0, 0, 0, 0))(weights, *batch).mean()

    def adam(state: Any, gradient: Any) -> Any:
        weights, first, second, step = state
        step = step + 1
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        weights = jax.tree.map(
            lambda w, m, v: w - META_LR * (m / (1 - 0.9**step)) / (jnp.sqrt(v / (1 - 0.999**step)) + 1e-8),
            weights, first, second,
        )  # fmt: skip
        return weights, first, second, step

    shots = getattr(work.distribution, "shots", 0)
    points = work.distribution.examples

    def sinusoids(key: Any) -> Any:
        keys = jax.random.split(key, 3)
        shape = (work.tasks, 1, 1)
        amplitude = jax.random.uniform(keys[0], shape, minval=0.1, maxval=5.0)
        phase = jax.random.uniform(keys[1], shape, maxval=jnp.pi)
        x = jax.random.uniform(keys[2], (work.tasks, points, 1), minval=-5.0, maxval=5.0)
        y = amplitude * jnp.sin(x + phase)
        return x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]

    def step_on(state: Any, batch: Any) -> Any:
        return adam(state, jax.grad(meta_loss)(state[0], batch))

    def step(state: Any, key: Any) -> Any:
        return step_on(state, sinusoids(key)), None

    def as_jax(batch: TaskBatch) -> tuple[Any, ...]:
        arrays = [tensor.numpy() for tensor in batch]
        return tuple(np.moveaxis(a, 2, -1) if a.ndim == 5 else a for a in arrays)

    zeros = jax.tree.map(jnp.zeros_like, initial)
    state = [(initial, zeros, zeros, 0.0)]
    if classification:
        compiled = jax.jit(step_on)

        def run(iterations: int) -> None:
            for i in range(iterations):
                state[0] = compiled(state[0], as_jax(work.batch(i)))
            jax.block_until_ready(state[0])
    elif scan:
        scanned = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0])
        keys = jax.random.split(jax.random.PRNGKey(0), 100)

        def run(iterations: int) -> None:
            for _ in range(max(1, iterations // 100)):  # timed in whole hundreds only
                state[0] = scanned(state[0], keys)
            jax.block_until_ready(state[0])
    else:
        compiled = jax.jit(lambda state, key: step(state, key)[0])
        keys = list(jax.random.split(jax.random.PRNGKey(0), 100))

        def run(iterations: int) -> None:
            for i in range(iterations):
                state[0] = compiled(state[0], keys[i % 100])
            jax.block_until_ready(state[0])

    def gradient(batch: TaskBatch) -> dict[str, np.ndarray]:
        gradients = jax.jit(jax.grad(meta_loss))(initial, as_jax(batch))
        return {name: np.asarray(g, dtype=np.float64) for name, g in gradients.items()}

    return Contender(run, gradient)


def jax_jit(work: Work) -> Contender:
    """JAX, the whole iteration in `jit` (of Omniglot all but the sampling)."""
    return _jax(work, scan=False)


def jax_scan(work: Work) -> Contender:
    """JAX, a `scan` over 100 iterations in `jit`."""
    if work.distribution.classification:
        raise ImportError("tasks that are looked up are not scanned over")
    return _jax(work, scan=True)


PEERS: dict[str, Callable[[Work], Contender]] = {
    "higher, loop": higher_loop,
    "learn2learn, loop": learn2learn_loop,
    "torch.func, eager": torch_func,
    "JAX, jit": jax_jit,
    "JAX, jit and scan": jax_scan,
}
