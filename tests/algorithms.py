"""Small algorithms and tasks for tests of the mathematics, and their meta-gradient by a plain loop."""

import inspect
from dataclasses import fields

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from common.batch import TaskBatch
from common.choices import Choices
from common.task import MetaGradient
from learner import FACTORIES, build_learner
from learners.batch_norm import BatchNorm
from learners.heads import add_context
from maml import MAML, RATE
from training.meta_gradients import make_meta_gradient

WAYS, SHOTS, TASKS, STEPS = 2, 2, 3, 3


class Algorithm(MAML):
    """A `MAML` whose options are given by name, and whose meta-gradient is computed by an engine."""

    def __init__(self, learner: nn.Module, loss, *, engine: str = "unrolled", **options):
        names = {choice.name for choice in fields(Choices)}
        choices = {n: options.pop(n) for n in names & options.keys()}
        super().__init__(learner, loss, Choices(**choices), **options)
        self.engine = engine

    def meta_gradient(self, parameters, batch, *, way=None, **others) -> MetaGradient:
        if way is None:
            # as in training, where steps over patches are compiled one by one
            one_by_one = self._arguments["convolution"] == "im2col"
            how = {"accelerate": lambda function, options=None: function} if one_by_one else {}
            return make_meta_gradient(self, engine=self.engine, **how)(parameters, batch, **others)
        return super().meta_gradient(parameters, batch, way=way, **others)


def inputs_of(learner: str) -> tuple[int, ...]:
    """Return the shape of an example: a number of a curve, a signal, or a small image."""
    shape = inspect.signature(FACTORIES[learner]).parameters["inputs"].default
    return shape if len(shape) < 3 else (1, 28, 28)


def make_tasks(learner: str, *, tasks: int = TASKS) -> TaskBatch:
    shots = 1 if learner == "convnet" else SHOTS  # it costs twenty times as much as `conv`
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = inputs_of(learner)
    if inputs == (1,):
        return TaskBatch(*(4 * random(tasks, 5, 1) - 2 for _ in range(4)))
    labels = torch.arange(WAYS).repeat_interleave(shots).expand(tasks, -1)
    support, query = (random(tasks, WAYS * shots, *inputs) for _ in range(2))
    return TaskBatch(support, labels, query, labels)


def make_maml(learner: str, **options) -> Algorithm:
    """A built-in learner in float64."""
    inputs = inputs_of(learner)
    outputs = 1 if inputs == (1,) else WAYS
    network = build_learner(learner, outputs, inputs=inputs, init="torch", seed=1).double()
    loss = F.mse_loss if inputs == (1,) else F.cross_entropy
    return Algorithm(network, loss, **{"inner_lr": 0.1} | options)


def smooth_network() -> nn.Module:
    """A network without kinks: finite differences agree to many digits."""
    torch.manual_seed(2)
    layers = nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)
    return nn.Sequential(*layers).double()


def smooth_maml(**options) -> Algorithm:
    network = smooth_network()
    if options.get("fast_weights") == "context":
        network = add_context(network, 4, seed=3).double()
    return Algorithm(network, F.mse_loss, **{"inner_lr": 0.1, "steps": STEPS} | options)


def vary(parameters: dict) -> dict:
    """Make steps, layers and elements differ, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: w * (1 + 0.3 * torch.rand(w.shape, generator=generator, dtype=w.dtype))
        for name, w in parameters.items()
    }


# ---- the reference --------------------------------------------------------------------------


def forward_by_hand(maml: Algorithm, weights: dict, x, statistics: dict | None = None) -> tuple:
    """Return outputs, and by layer the mean and variance that batch norm uses: its input's, unless given."""
    seen = {}
    for name, layer in maml.learner.named_modules():
        if isinstance(layer, BatchNorm):
            axes = [0, *range(2, x.dim())]
            at_hand = torch.stack([x.mean(axes), x.var(axes, unbiased=False)])
            seen[f"{name}.statistics"] = at_hand if statistics is None else statistics[f"{name}.statistics"]
            scale, shift = weights.get(f"{name}.weight", torch.ones(())), weights[f"{name}.bias"]
            columns = (*seen[f"{name}.statistics"], scale, shift)
            mean, variance, scale, shift = (c.view(-1, *[1] * (x.dim() - 2)) for c in columns)
            x = (x - mean) / (variance + layer.eps).sqrt() * scale + shift
        elif name and not list(layer.children()):
            x = functional_call(layer, {p: weights[f"{name}.{p}"] for p, _ in layer.named_parameters()}, (x,))
    return x, seen


def outputs_of(maml: Algorithm, weights: dict, x, support_x=None):
    """Return outputs; with a support set, batch norm uses its statistics."""
    if not maml.has_batch_norm:
        return functional_call(maml.learner, weights, (x,))
    statistics = None if support_x is None else forward_by_hand(maml, weights, support_x)[1]
    return forward_by_hand(maml, weights, x, statistics)[0]


def loop_over_tasks(maml: Algorithm, parameters: dict, batch: TaskBatch, order=None, step_weights=None):
    """Return the meta-gradient and the mean loss: one task after the other, written down from the papers."""
    leaves = {name: w.clone().requires_grad_() for name, w in parameters.items()}
    rule, total = maml.optimizer, 0.0
    names = sorted(maml.adapted)
    shared = {n: w for n, w in leaves.items() if n not in maml.adapted and "/" not in n}
    for number, (support_x, support_y, query_x, query_y) in enumerate(zip(*batch, strict=True)):
        fast = {n: leaves[n] if n in leaves else torch.zeros(4).double().requires_grad_() for n in names}
        start = dict(fast)
        velocity = dict.fromkeys(names, 0.0)
        mean, square = dict(velocity), dict(velocity)
        for step in range(maml.steps):
            rows = slice(None) if order is None else order[number, step]
            loss = maml.loss(outputs_of(maml, fast | shared, support_x[rows]), support_y[rows])
            gradients = torch.autograd.grad(
                loss, [fast[n] for n in names], create_graph=not maml.first_order, retain_graph=True
            )
            gradients = dict(zip(names, gradients, strict=True))
            gradients = {n: g + rule.proximal * (fast[n] - start[n]) for n, g in gradients.items()}
            if rule.clip_norm:
                norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
                assert norm > rule.clip_norm  # there is something to clip
                gradients = {n: g * rule.clip_norm / (norm + 1e-6) for n, g in gradients.items()}
            for n, g in gradients.items():
                rate = leaves.get(RATE + n, rule.lr)
                if maml.choices.inner_rates == "layer-step":
                    rate = rate[step]
                if rule.name == "momentum":
                    g = velocity[n] = rule.momentum * velocity[n] + g
                if rule.name == "adam":
                    mean[n] = rule.momentum * mean[n] + (1 - rule.momentum) * g
                    square[n] = rule.beta_2 * square[n] + (1 - rule.beta_2) * g**2
                    unbiased = square[n] / (1 - rule.beta_2 ** (step + 1))
                    g = mean[n] / (1 - rule.momentum ** (step + 1)) / (unbiased.sqrt() + rule.eps)
                fast[n] = fast[n] - rate * g
            if step_weights is not None or step == maml.steps - 1:
                support = support_x if maml.choices.query_norm == "inductive" else None
                loss = maml.loss(outputs_of(maml, fast | shared, query_x, support), query_y)
                total = total + (1.0 if step_weights is None else step_weights[step]) * loss
    total = total / len(batch.support_x)
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True)), total.detach()
