"""The same iteration as others write it: a loop over tasks with `higher`, `torch.func`, and JAX.

Each entry of `PEERS` is a function from a `Work` to a `Contender`, and imports its library itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tool import TaskBatch, TaskDistribution
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torch.nn import functional as F

META_LR = 1e-3


@dataclass(frozen=True)
class Work:
    """What is timed: a network, a family of tasks and the sizes."""

    name: str
    flags: list[str]  # of main.py
    learner: nn.Module  # its weights are where everybody begins
    distribution: TaskDistribution
    tasks: int
    steps: int
    inner_lr: float
    iterations: int  # of a timing, unless the contender is slow

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return F.cross_entropy if self.distribution.classification else F.mse_loss

    def batch(self, iteration: int) -> TaskBatch:
        return self.distribution.sample("train", 0, iteration, range(self.tasks))


@dataclass(frozen=True)
class Contender:
    """A way to train a work."""

    run: Callable[[int], None]  # that many iterations of training, done when it returns
    gradient: Callable[[TaskBatch], dict[str, np.ndarray]]  # meta-gradient at the initial weights
    slow: bool = False

    def time(self, iterations: int) -> float:
        """Return seconds an iteration."""
        begin = time.perf_counter()
        self.run(iterations)
        return (time.perf_counter() - begin) / iterations


def as_numpy(gradients: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: g.detach().double().cpu().numpy() for name, g in gradients.items()}


# ---- PyTorch -------------------------------------------------------------------------------------


def higher_loop(work: Work) -> Contender:
    """Return `higher` as its examples use it: a loop over tasks."""
    import higher

    learner = copy.deepcopy(work.learner)
    optimizer = torch.optim.Adam(learner.parameters(), lr=META_LR)

    def meta_backward(learner: nn.Module, batch: TaskBatch) -> None:
        inner = torch.optim.SGD(learner.parameters(), lr=work.inner_lr)
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            with higher.innerloop_ctx(learner, inner, copy_initial_weights=False) as (fast, inner_step):
                for _ in range(work.steps):
                    inner_step.step(work.loss(fast(support_x), support_y))
                (work.loss(fast(query_x), query_y) / len(batch.query_x)).backward()

    def run(iterations: int) -> None:
        for iteration in range(iterations):
            optimizer.zero_grad()
            meta_backward(learner, work.batch(iteration))
            optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def gradient(batch: TaskBatch) -> dict[str, np.ndarray]:
        fresh = copy.deepcopy(work.learner)
        meta_backward(fresh, batch)
        return as_numpy({name: w.grad for name, w in fresh.named_parameters() if w.grad is not None})

    return Contender(run, gradient, slow=True)


def func_vmap(work: Work) -> Contender:
    """Return the iteration as `torch.func` has it: `vmap` over tasks, uncompiled, with PyTorch's Adam."""
    learner = replace_all_batch_norm_modules_(copy.deepcopy(work.learner))  # no running statistics
    weights = dict(learner.named_parameters())
    learned = {name: w for name, w in weights.items() if w.requires_grad}
    optimizer = torch.optim.Adam(learned.values(), lr=META_LR)

    def loss(fast: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return work.loss(functional_call(learner, fast, (x,)), y)

    def query_loss(fast: dict[str, Tensor], support_x: Any, support_y: Any, *query: Tensor) -> Tensor:
        for _ in range(work.steps):
            slopes = grad(loss)(fast, support_x, support_y)
            fast = {name: w - work.inner_lr * slopes[name] for name, w in fast.items()}
        return loss(fast, *query)

    def meta_gradient(batch: TaskBatch) -> dict[str, Tensor]:
        plain = {name: w.detach() for name, w in learned.items()}
        return grad(lambda w: vmap(query_loss, (None, 0, 0, 0, 0))(w, *batch).mean())(plain)

    def run(iterations: int) -> None:
        for iteration in range(iterations):
            for name, slope in meta_gradient(work.batch(iteration)).items():
                weights[name].grad = slope
            optimizer.step()

    return Contender(run, lambda batch: as_numpy(meta_gradient(batch)))


# ---- JAX -----------------------------------------------------------------------------------------


def jax_meta_loss(work: Work) -> Callable[[Any, Any], Any]:
    """Return the mean query loss as a function of weights and a batch of JAX arrays."""
    import jax
    import jax.numpy as jnp

    layers = [name for name, layer in work.learner.named_children() if isinstance(layer, nn.Linear)]

    def loss(weights: Any, x: Any, y: Any) -> Any:
        for name in layers:
            x = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            x = x if name == layers[-1] else jax.nn.relu(x)
        return jnp.mean((x - y) ** 2)

    def query_loss(weights: Any, support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        for _ in range(work.steps):
            gradients = jax.grad(loss)(weights, support_x, support_y)
            weights = jax.tree.map(lambda w, g: w - work.inner_lr * g, weights, gradients)
        return loss(weights, query_x, query_y)

    return lambda weights, batch: jax.vmap(query_loss, (None, 0, 0, 0, 0))(weights, *batch).mean()


def jax_adam(state: Any, gradient: Any) -> Any:
    """Return weights, both moments and step count after an update of Adam."""
    import jax
    import jax.numpy as jnp

    weights, first, second, step = state
    step = step + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)

    def update(w: Any, m: Any, v: Any) -> Any:
        return w - META_LR * (m / (1 - 0.9**step)) / (jnp.sqrt(v / (1 - 0.999**step)) + 1e-8)

    return jax.tree.map(update, weights, first, second), first, second, step


def jax_sinusoids(key: Any, tasks: int, shots: int, points: int) -> tuple[Any, ...]:
    """Return a batch of the paper's sinusoids, sampled in JAX: `[tasks, examples, 1]` each."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(key, 3)
    amplitude = jax.random.uniform(keys[0], (tasks, 1, 1), minval=0.1, maxval=5.0)
    phase = jax.random.uniform(keys[1], (tasks, 1, 1), maxval=jnp.pi)
    x = jax.random.uniform(keys[2], (tasks, points, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x + phase)
    return x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:]


def jax_scan(work: Work) -> Contender:
    """Return a compiled `scan` over 100 iterations, sampling included; of curves alone."""
    import jax
    import jax.numpy as jnp

    if work.distribution.classification:
        raise ImportError("its `scan` needs tasks that are computed, not looked up")
    meta_loss = jax_meta_loss(work)
    initial = {name: jnp.asarray(w.detach().numpy()) for name, w in work.learner.named_parameters()}
    zeros = jax.tree.map(jnp.zeros_like, initial)
    state = [(initial, zeros, zeros, 0.0)]
    batch = work.batch(0)
    shots = batch.support_x.shape[1]
    points = shots + batch.query_x.shape[1]

    def step(state: Any, key: Any) -> Any:
        batch = jax_sinusoids(key, work.tasks, shots, points)
        return jax_adam(state, jax.grad(meta_loss)(state[0], batch)), None

    keys = jax.random.split(jax.random.PRNGKey(0), 100)
    scan = jax.jit(lambda state: jax.lax.scan(step, state, keys)[0])

    def run(iterations: int) -> None:
        for _ in range(iterations // 100):  # timed in whole hundreds only
            state[0] = scan(state[0])
        jax.block_until_ready(state[0])

    def gradient(batch: TaskBatch) -> dict[str, np.ndarray]:
        gradients = jax.jit(jax.grad(meta_loss))(initial, tuple(part.numpy() for part in batch))
        return {name: np.asarray(g, dtype=np.float64) for name, g in gradients.items()}

    return Contender(run, gradient)


PEERS: dict[str, Callable[[Work], Contender]] = {"higher, loop": higher_loop, "JAX, jit and scan": jax_scan}
