"""The reference that tests compare with: meta-learning as a plain loop over tasks, in float64.

The loop runs the user's own module, PyTorch's layers as they are, one task after the other, and
differentiates in reverse over reverse. It uses nothing of the tool except the keys of random numbers.
"""

import copy
from contextlib import nullcontext

import torch
from algorithms import Algorithm
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.batch import TaskBatch, make_arguments, tree_map
from common.task import Extras
from learners.elementary import Elementary
from maml import MAML
from training.meta_gradients import make_meta_gradient

ENGINES = ("unrolled", "adjoint")
ORDERS = ("exact", "first-order")
TASKS, EXAMPLES, STEPS, LR = 2, 5, 2, 0.1
KEYS = torch.tensor([[11, 12], [13, 14]])  # [tasks, 2]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(below: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def vectors(*shape: int, targets: int = 2) -> TaskBatch:
    x, more_x = (normal(TASKS, EXAMPLES, *shape, seed=seed) for seed in (1, 2))
    y, more_y = (normal(TASKS, EXAMPLES, targets, seed=seed) for seed in (3, 4))
    return TaskBatch(x, y, more_x, more_y)


def images() -> TaskBatch:
    return vectors(2, 4, 4)


def filled(module: nn.Module) -> nn.Module:
    """Return the module in float64, with the same parameters every time, none of them zeros or ones."""
    generator = torch.Generator().manual_seed(1)
    module = module.double()
    for parameter in module.parameters():
        numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.6 * numbers + 0.7 * (parameter.dim() == 1))
    return module


def convolutions(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))


def layers(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 2))


def algorithm(module: nn.Module, loss=F.mse_loss, **options) -> MAML:
    return Algorithm(module, loss, **{"inner_lr": LR, "steps": STEPS, "adapt_norm": True} | options)


def meta_gradient(maml: MAML, batch: TaskBatch, engine: str, **arguments):
    return make_meta_gradient(maml, engine=engine)(maml.initial_parameters(), batch, **arguments)


# ---- the plain loop -------------------------------------------------------------------------


def key_of(keys, purpose: str, step: int = 0):
    return Extras(keys).for_pass(purpose, step).keys


def run(module: nn.Module, weights: dict, x, key=None):
    """Return the module's outputs; its changed buffers stay, detached, as running statistics do."""
    positional, named = make_arguments(x)
    # the kernel that has two derivatives; PyTorch's functions, unless random numbers have to be the same
    with sdpa_kernel(SDPBackend.MATH), nullcontext() if key is None else Elementary(key):
        # of a copy: the call would leave its tensors in a module that is used twice
        called = copy.deepcopy(module)
        outputs = functional_call(called, weights, positional, named)
    for layer, called_layer in zip(module.modules(), called.modules(), strict=True):
        for name, buffer in called_layer._buffers.items():
            layer._buffers[name] = None if buffer is None else buffer.detach().clone()
    return outputs


def inner_loop(
    module, loss, weights, task, *, adapted=None, steps=STEPS, order="exact", keys=None, carry=True
):
    """Yield one task's weights after 0, 1, ... steps; buffers are carried along if `carry`."""
    adapted = adapted or list(weights)
    yield weights
    for step in range(steps):
        # independent of each other, however they began
        fast = {n: w.detach() if order == "first-order" else w.clone() for n, w in weights.items()}
        fast = {n: w if w.requires_grad else w.requires_grad_() for n, w in fast.items()}
        called = module if carry else copy.deepcopy(module)
        outputs = run(called, fast, task.support_x, key_of(keys, "support", step))
        gradients = torch.autograd.grad(
            loss(outputs, task.support_y),
            [fast[n] for n in adapted],
            create_graph=order == "exact",
            allow_unused=True,
        )
        moves = {n: LR * g for n, g in zip(adapted, gradients, strict=True) if g is not None}
        weights = weights | {n: weights[n] - s for n, s in moves.items()}
        yield weights


def tasks_of(batch: TaskBatch) -> list[TaskBatch]:
    return [TaskBatch(*(tree_map(lambda t, i=i: t[i], part) for part in batch)) for i in range(TASKS)]


def learned(module: nn.Module) -> dict:
    return {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters() if p.requires_grad}


def plain_loop(
    module,
    loss,
    batch,
    *,
    adapted=None,
    keys=None,
    steps=STEPS,
    order="exact",
    carry=True,
    compute_head=None,
    more=None,
):
    """Return the meta-gradient by name, the query losses `[tasks]` and the outputs of each task.

    `compute_head(module, leaves, task, key)` returns weights that are computed for each task, not learned;
    `more` are leaves that it needs besides the module's weights.
    """
    leaves = learned(module)
    if compute_head:
        leaves = {n: w for n, w in leaves.items() if not n.startswith("head.")}
    weights = dict(leaves)
    leaves |= {n: w.clone().requires_grad_() for n, w in (more or {}).items()}
    losses, outputs = [], []
    for number, task in enumerate(tasks_of(batch)):
        task_module, key = copy.deepcopy(module), None if keys is None else keys[number]
        start = weights | (compute_head(copy.deepcopy(module), leaves, task, key) if compute_head else {})
        options = {"adapted": adapted, "steps": steps, "order": order, "keys": key, "carry": carry}
        *_, fast = inner_loop(task_module, loss, start, task, **options)
        outputs.append(run(task_module, fast, task.query_x, key_of(key, "query", steps)))
        losses.append(loss(outputs[-1], task.query_y))
    gradients = torch.autograd.grad(torch.stack(losses).mean(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True)), torch.stack(losses).detach(), outputs


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def predicting(module: nn.Module) -> nn.Module:
    """Return the module in evaluation mode, but with PyTorch's norm layers using the examples at hand."""
    kinds = (*BATCH_NORMS, nn.InstanceNorm2d)
    at_hand = [layer for layer in module.modules() if type(layer) in kinds and layer.training]
    module.eval()
    for layer in at_hand:
        layer.train()
    return module


@torch.no_grad()
def inductive(module: nn.Module, weights: dict, support_x, x):
    """Return query outputs with the support set's biased statistics, written into PyTorch's own layers."""
    module = predicting(copy.deepcopy(module))
    statistics, handles = {}, []
    for name, layer in module.named_modules():
        if type(layer) in BATCH_NORMS and layer.training:

            def record(layer, inputs, name=name):
                axes = [0, *range(2, inputs[0].dim())]
                statistics[f"{name}.running_mean"] = inputs[0].mean(axes)
                statistics[f"{name}.running_var"] = inputs[0].var(axes, correction=0)

            handles.append(layer.register_forward_pre_hook(record))
    functional_call(module, weights, (support_x,))
    for handle in handles:
        handle.remove()
    return functional_call(module.eval(), weights | statistics, (x,))


def plain_predictions(
    module,
    loss,
    batch,
    *,
    adapted=None,
    keys=None,
    normalisation="transductive",
    compute_head=None,
    more=None,
):
    """Return query outputs after 0, 1, ... steps, `[tasks, steps + 1, ...]`; see `plain_loop`."""
    outputs = []
    for number, task in enumerate(tasks_of(batch)):
        task_module, key = copy.deepcopy(module), None if keys is None else keys[number]
        start = learned(module)
        if compute_head:
            start |= compute_head(copy.deepcopy(module), start | (more or {}), task, key)
        weights = inner_loop(task_module, loss, start, task, adapted=adapted, keys=key)
        if normalisation == "inductive":
            steps = [inductive(task_module, fast, task.support_x, task.query_x) for fast in weights]
        else:
            steps = [run(predicting(copy.deepcopy(task_module)), fast, task.query_x) for fast in weights]
        outputs.append(torch.stack(steps).detach())
    return torch.stack(outputs)


def assert_close(ours: dict, theirs: dict, tolerance: float = 1e-9) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max().item() for g in theirs.values())
    assert scale > 1e-6  # a comparison of zeros would prove nothing
    for name in ours:
        assert ours[name].shape == theirs[name].shape, name
        assert (ours[name] - theirs[name]).abs().max().item() < tolerance * scale, name


def distance(ours: dict, theirs: dict) -> float:
    """Return how far two gradients are apart, relative to the second."""
    scale = max(g.abs().max().item() for g in theirs.values())
    return max((ours[n] - theirs[n]).abs().max().item() for n in theirs) / scale


def assert_matches_plain_loop(
    module,
    batch,
    *,
    reference=None,
    loss=F.mse_loss,
    orders=ORDERS,
    steps=STEPS,
    keys=None,
    adapted=None,
    compute_head=None,
    more=None,
    tolerance=1e-9,
    **options,
):
    """Compare gradients, losses and outputs of both engines, exact and first order, which differ.

    `reference` is the module of the loop, if it is another one.
    """
    gradients = []
    for order in orders:
        how = {"order": order, "keys": keys, "adapted": adapted, "steps": steps}
        how |= {"compute_head": compute_head, "more": more}
        expected, losses, outputs = plain_loop(reference or module, loss, batch, **how)
        gradients.append(expected)
        maml = algorithm(module, loss, steps=steps, meta_gradient=order, **options)
        for engine in ENGINES:
            result = meta_gradient(maml, batch, engine, keys=keys)
            assert_close(result.gradients, expected, tolerance)
            assert torch.allclose(result.losses, losses, rtol=tolerance)
            for number, output in enumerate(outputs):
                tree_map(lambda a, b, n=number: torch.testing.assert_close(a[n], b), result.outputs, output)
    assert len(gradients) == 1 or distance(*gradients) > 1e-3
