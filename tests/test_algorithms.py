"""The family of algorithms: every choice against a plain loop, and the identities between them."""

from dataclasses import replace

import pytest
import torch
from algorithms import (
    Algorithm,
    forward_by_hand,
    loop_over_tasks,
    make_maml,
    make_tasks,
    smooth_maml,
    smooth_network,
    vary,
)
from plain_loop import ENGINES, ORDERS, assert_close
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from commands.resolve import resolve
from common.batch import TaskBatch
from common.choices import Choices
from learner import build_learner
from learners.batch_norm import norm_parameter_names
from learners.heads import ContextLayer, adapted_names, add_context, head_names
from maml import MAML, MASS, RATE, SQUARE
from training.meta_gradients import conjugate_gradients
from training.step import meta_lr_at, multi_step_weights

# ---- plain loops --------------------------------------------------------------------------

COMBINATIONS = [
    {"fast_weights": "head", "inner_rates": "element"},
    {"fast_weights": "body", "inner_rates": "layer-step", "objective": True},
    {"fast_weights": "context", "context_size": 4, "inner_rates": "layer-step", "objective": True},
    {"inner_optimizer": "adam", "inner_momentum": 0.0, "inner_rates": "element", "inner_lr": 0.02},
    {"fast_weights": "head", "inner_optimizer": "momentum", "proximal": 0.3},
    {"inner_optimizer": "adam", "inner_momentum": 0.8, "inner_lr": 0.02},
    {"inner_rates": "element", "inner_optimizer": "momentum", "inner_momentum": 0.7},
    {"inner_optimizer": "momentum", "inner_clip": 0.2, "objective": True},
    {"order": True},
    {"order": True, "inner_optimizer": "adam", "inner_lr": 0.02, "inner_rates": "layer-step"},
]
STEP_WEIGHTS = torch.tensor([0.2, 0.5, 0.3]).double()
ORDER = torch.tensor([[[0, 1], [2, 3], [4, 0]], [[3, 1], [0, 4], [2, 2]], [[4, 4], [1, 0], [3, 2]]])


@pytest.mark.parametrize("meta_gradient", ORDERS)
@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_every_combination_of_choices_matches_a_plain_loop(number, meta_gradient):
    options, batch = dict(COMBINATIONS[number]), make_tasks("mlp")
    inputs = {"step_weights": STEP_WEIGHTS} if options.pop("objective", False) else {}
    inputs |= {"order": ORDER} if options.pop("order", False) else {}
    for engine in ENGINES:
        maml = smooth_maml(**options, meta_gradient=meta_gradient, engine=engine)
        parameters = vary(maml.initial_parameters())
        expected, _ = loop_over_tasks(maml, parameters, batch, **inputs)
        assert_close(maml.meta_gradient(parameters, batch, **inputs).gradients, expected)
        assert all(g.abs().max() > 0 for g in expected.values())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", [False, True])
def test_per_step_batch_norm_has_parameters_and_statistics_for_each_step(objective, engine):
    batch = make_tasks("fc")
    maml = make_maml("fc", batch_norm="per-step", norm_per_step=True, steps=2, engine=engine, tasks_at_once=2)
    parameters = maml.initial_parameters()
    assert maml.per_step == norm_parameter_names(maml.learner) and not maml.per_step & maml.adapted
    assert all(parameters[n].shape[0] == 2 for n in maml.per_step)
    parameters = vary({n: w + 0.1 * (n in maml.per_step) for n, w in parameters.items()})
    step_weights = torch.tensor([0.4, 0.6]).double() if objective else None
    leaves = {n: w.clone().requires_grad_() for n, w in parameters.items()}
    losses, seen = [], ([], [])
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        fast = {n: leaves[n] for n in maml.adapted}
        for step in range(2):
            norms = {n: leaves[n][step] for n in maml.per_step}
            y, statistics = forward_by_hand(maml, fast | norms, support_x)
            gradients = torch.autograd.grad(F.cross_entropy(y, support_y), fast.values(), create_graph=True)
            fast = {n: w - maml.optimizer.lr * g for (n, w), g in zip(fast.items(), gradients, strict=True)}
            if objective or step == 1:
                y, of_query = forward_by_hand(maml, fast | norms, query_x)
                losses.append((step_weights[step] if objective else 1.0) * F.cross_entropy(y, query_y))
                statistics = {n: (s + of_query[n]) / 2 for n, s in statistics.items()}
            seen[step].append(statistics)
    expected = torch.autograd.grad(sum(losses) / len(batch.support_x), leaves.values())
    result = maml.meta_gradient(parameters, batch, step_weights=step_weights)
    assert_close(result.gradients, dict(zip(leaves, expected, strict=True)))
    for name, statistics in result.statistics.items():
        means = [torch.stack([task[name] for task in tasks]).mean(0) for tasks in seen]
        torch.testing.assert_close(statistics, torch.stack(means))


def test_the_first_pass_of_a_network_is_recorded_as_later_ones_are():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 3))
    choices = Choices(inner_lr=0.1, steps=2, batch_norm="per-step", norm_per_step=True)
    maml = MAML(network.double(), F.cross_entropy, choices)
    batch = make_tasks("fc")
    parameters = maml.initial_parameters()
    first, second = (maml.meta_gradient(parameters, batch).statistics for _ in range(2))
    assert first.keys() == {"2.statistics"}
    torch.testing.assert_close(first, second)


def test_per_step_statistics_are_used_and_a_step_beyond_uses_the_last_ones():
    batch = make_tasks("fc")
    maml = make_maml("fc", batch_norm="per-step", norm_per_step=True, steps=2, inner_rates="layer-step")
    parameters = vary({n: w + 0.1 * (n in maml.per_step) for n, w in maml.initial_parameters().items()})
    statistics = {n: s + torch.rand_like(s) for n, s in maml.initial_statistics().items()}
    both = ("transductive", "per-step")
    outputs = maml.predictions(parameters, batch, 4, both, statistics=statistics)
    assert (outputs["transductive"] - outputs["per-step"]).abs().max() > 1e-2

    def forward(fast, x, row):
        norms = {n: parameters[n][row] for n in maml.per_step}
        return forward_by_hand(maml, fast | norms, x, {n: s[row] for n, s in statistics.items()})[0]

    fast = {n: parameters[n] for n in maml.adapted}
    expected = [forward(fast, batch.query_x[0], 0)]
    for row in (0, 1, 1, 1):  # the third and the fourth step are like the second
        leaves = {n: w.detach().requires_grad_() for n, w in fast.items()}
        loss = F.cross_entropy(forward(leaves, batch.support_x[0], row), batch.support_y[0])
        gradients = torch.autograd.grad(loss, leaves.values())
        moves = zip(leaves.items(), gradients, strict=True)
        fast = {n: w - parameters[RATE + n][row] * g for (n, w), g in moves}
        expected.append(forward(fast, batch.query_x[0], row))
    assert torch.allclose(torch.stack(expected), outputs["per-step"][0], atol=1e-9)


# ---- identities -----------------------------------------------------------------------------


def gradients_of(maml: Algorithm, batch: TaskBatch, **options) -> dict:
    return maml.meta_gradient(maml.initial_parameters(), batch, **options).gradients


def test_reptile_with_one_step_is_joint_training():
    batch = make_tasks("mlp")
    reptile = gradients_of(smooth_maml(meta_gradient="reptile", steps=1), batch)
    joint = gradients_of(smooth_maml(meta_gradient="joint"), batch)
    assert_close({n: g / 0.1 for n, g in reptile.items()}, joint, 1e-12)
    pooled = smooth_network()
    loss = torch.tensor(0.0).double()
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        outputs = pooled(torch.cat([support_x, query_x]))
        loss += F.mse_loss(outputs, torch.cat([support_y, query_y])) / len(batch.support_x)
    expected = torch.autograd.grad(loss, pooled.parameters())
    assert_close(joint, dict(zip(joint, expected, strict=True)))


def train_on(network: nn.Module, optimizer: torch.optim.Optimizer, task: TaskBatch, order) -> None:
    """Train on the support and query of one task, pooled, one minibatch after the other."""
    x, y = torch.cat([task.support_x, task.query_x]), torch.cat([task.support_y, task.query_y])
    for rows in order:
        optimizer.zero_grad()
        F.mse_loss(network(x[rows]), y[rows]).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("rule", "optimizer_of"),
    [
        ("adam", lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.6, 0.999))),
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.6)),
    ],
)
def test_reptile_moves_to_where_torchs_optimizer_ends_on_the_same_minibatches(rule, optimizer_of):
    batch = make_tasks("mlp")  # pools of ten
    how = {"steps": 4, "inner_lr": 0.01, "inner_optimizer": rule, "inner_momentum": 0.6}
    maml = smooth_maml(meta_gradient="reptile", **how)
    order = torch.stack([torch.randperm(10)[:8].view(4, 2) for _ in batch.support_x])
    result = gradients_of(maml, batch, order=order)
    ends = []
    for *task, rows in zip(*batch, order, strict=True):
        network = smooth_network()
        train_on(network, optimizer_of(network.parameters()), TaskBatch(*task), rows)
        ends.append(dict(network.named_parameters()))
    start = maml.initial_parameters()
    expected = {n: w - torch.stack([end[n] for end in ends]).mean(0) for n, w in start.items()}
    assert_close(result, expected)


def test_carried_second_moments_are_those_of_one_adam_for_all_tasks():
    batch = make_tasks("mlp")
    carried = {"inner_optimizer": "adam-carried", "inner_momentum": 0.0, "inner_lr": 0.01}
    maml = smooth_maml(meta_gradient="reptile", steps=4, **carried)
    singles = [TaskBatch(*(part[i : i + 1] for part in batch)) for i in range(len(batch.support_x))]
    order = torch.stack([torch.randperm(10)[:8].view(4, 2) for _ in singles])
    network = smooth_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, betas=(0.0, 0.999))
    parameters = maml.initial_parameters()
    for task, rows in zip(singles, order, strict=True):  # an iteration each, whose outer step is 1
        result = maml.meta_gradient(parameters, task, order=rows[None])
        parameters = {name: w - result.gradients[name] for name, w in parameters.items()}
        train_on(network, optimizer, TaskBatch(*(part[0] for part in task)), rows)
    state = {n: optimizer.state[p]["exp_avg_sq"] for n, p in network.named_parameters()}
    expected = {n: p.detach() for n, p in network.named_parameters()}
    expected |= {SQUARE + n: square for n, square in state.items()}
    mass = parameters.pop(MASS)
    assert_close(parameters, expected)
    assert mass.item() == pytest.approx(1 - 0.999 ** (4 * len(singles)))
    start = parameters | {MASS: mass}  # of several tasks the mean; at test they begin with what is carried
    together = maml.meta_gradient(start, batch, order=order).gradients
    pairs = zip(singles, order, strict=True)
    apart = [maml.meta_gradient(start, task, order=rows[None]).gradients for task, rows in pairs]
    assert_close(together, {n: torch.stack([g[n] for g in apart]).mean(0) for n in together})
    fresh = start | {n: torch.zeros_like(w) for n, w in start.items() if n.startswith(SQUARE)}
    outputs, before = (maml.predictions(w, batch, 2)["transductive"] for w in (start, fresh))
    uncarried = smooth_maml(meta_gradient="reptile", steps=4, **carried | {"inner_optimizer": "adam"})
    torch.testing.assert_close(before, uncarried.predictions(fresh, batch, 2)["transductive"])
    assert (outputs - before).abs().max() > 1e-3


PROXIMAL = {"proximal": 2.0, "fast_weights": "body"}  # the head is shared: mixed derivatives take part


def test_implicit_is_first_order_without_conjugate_gradients_and_exact_with_them_at_the_solution():
    batch = make_tasks("mlp")
    ours = gradients_of(smooth_maml(meta_gradient="implicit", cg_steps=0, **PROXIMAL), batch)
    expected = gradients_of(smooth_maml(meta_gradient="first-order", **PROXIMAL), batch)
    assert_close(ours, expected, 1e-12)
    solved = PROXIMAL | {"steps": 100, "inner_lr": 0.2}
    implicit = [smooth_maml(meta_gradient="implicit", cg_steps=n, **solved) for n in (40, 0)]
    ours, rough = (gradients_of(maml, batch) for maml in implicit)
    assert_close(ours, gradients_of(smooth_maml(engine="adjoint", **solved), batch), 1e-8)
    assert max((rough[n] - ours[n]).abs().max() for n in ours) > 1e-3


def test_implicit_has_the_closed_form_on_a_quadratic():
    torch.manual_seed(0)
    tasks, size, strength = 3, 4, 0.7
    batch = TaskBatch(*(torch.randn(tasks, n, k).double() for n in (5, 6) for k in (size, 1)))
    network = nn.Linear(size, 1, bias=False).double()
    for damping in (0.0, 1.0):
        problem = {"inner_lr": 0.05, "steps": 1000, "proximal": strength}
        implicit = {"meta_gradient": "implicit", "cg_steps": size, "cg_damping": damping}
        maml = Algorithm(network, F.mse_loss, **problem, **implicit)
        ours = maml.meta_gradient(maml.initial_parameters(), batch).gradients["weight"]
        expected = torch.zeros(1, size).double()
        start = network.weight.detach()[0]
        for x, y, query_x, query_y in zip(*batch, strict=True):
            hessian = 2 * x.T @ x / len(x)
            eye = torch.eye(size).double()
            right = 2 * x.T @ y[:, 0] / len(x) + strength * start
            solution = torch.linalg.solve(hessian + strength * eye, right)
            v = 2 * query_x.T @ (query_x @ solution - query_y[:, 0]) / len(query_x)
            expected[0] += torch.linalg.solve((1 + damping) * eye + hessian / strength, v) / tasks
        assert torch.allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(fast_weights="haed"),
        dict(meta_gradient="reptile", inner_rates="element"),
        dict(meta_gradient="joint", inner_batch=3),
        dict(meta_gradient="implicit"),
        dict(head_init="prototype", proximal=1.0),
        dict(head_init="zero", fast_weights="body"),
        dict(head_init="zero", inner_rates="element"),
        dict(head_init="zero", meta_gradient="joint"),
        dict(head_init="zero", steps=0),
        dict(head_init="ridge", steps=0, objective="multi-step"),
    ],
)
def test_choices_that_do_not_exist_or_contradict_each_other_are_refused(wrong):
    with pytest.raises(ValueError):
        smooth_maml(**wrong)


def test_conjugate_gradients_stop_where_the_residual_is_zero_or_the_matrix_is_not_positive():
    diagonals = torch.tensor([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0], [-2.0, 1.0]]).double()
    b = {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]).double()}
    x = conjugate_gradients(lambda x: {"w": x["w"] * diagonals}, b, 6)["w"]
    assert torch.allclose(x[:3], b["w"][:3] / diagonals[:3])
    assert torch.equal(x[3], b["w"][3])


def test_adams_derivative_is_finite_where_a_unit_is_dead():
    network = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        network[0].bias.fill_(-100.0)
    for engine in ENGINES:
        for rule in ({"inner_optimizer": "adam"}, {"inner_clip": 1.0}):
            maml = Algorithm(network, F.mse_loss, inner_lr=0.01, steps=2, engine=engine, **rule)
            gradients = gradients_of(maml, make_tasks("mlp"))
            assert all(g.isfinite().all() for g in gradients.values())


# ---- what is adapted ------------------------------------------------------------------------


def test_the_head_is_the_last_layer_with_parameters_or_the_one_that_is_named():
    conv = build_learner("conv", 5)
    assert head_names(conv) == {"13.weight", "13.bias"}
    for norm in (nn.LayerNorm(2), nn.RMSNorm(2), nn.BatchNorm1d(2)):
        assert head_names(nn.Sequential(nn.Linear(2, 2), norm)) == {"0.weight", "0.bias"}
    assert head_names(conv, "13.bias, 9") == {"13.bias", "9.weight"}
    learned = {name for name, p in conv.named_parameters() if p.requires_grad}
    assert adapted_names(conv, "body") == learned - head_names(conv)
    with pytest.raises(ValueError, match="no part 'hat': there are 0, 1, 3"):
        head_names(conv, "hat")
    with pytest.raises(ValueError, match="nothing to adapt"):
        adapted_names(conv, "body", ",".join(str(i) for i in range(14) if list(conv[i].parameters())))


def test_a_context_of_zero_changes_nothing_and_the_inner_loop_moves_nothing_else():
    for name in ("conv", "conv-flat", "conv-pool", "fc", "mlp"):
        outputs = 1 if name == "mlp" else 2
        x = torch.rand(4, 1) if name == "mlp" else torch.rand(4, 1, 28, 28)
        network = add_context(build_learner(name, outputs), 6)
        (layer,) = [m for m in network.modules() if isinstance(m, ContextLayer)]
        assert layer.film == (name != "mlp")
        loss = F.mse_loss if name == "mlp" else F.cross_entropy
        maml = Algorithm(network, loss, inner_lr=1.0, fast_weights="context")
        plain = Algorithm(build_learner(name, outputs), loss, inner_lr=1.0)
        parameters = maml.initial_parameters()
        (context,) = maml.adapted
        weights = maml.start(parameters).fast | parameters
        before = plain.call(plain.initial_parameters(), x)
        assert torch.equal(before, maml.call(weights, x))
        moved = maml.call(weights | {context: torch.ones(6)}, x)
        assert (moved - before).abs().max() > 1e-2
        y = torch.rand(4, 1) if name == "mlp" else torch.tensor([0, 1, 0, 1])
        adapted = maml.adapt(parameters, x, y, 1).weights
        assert adapted.keys() - parameters.keys() == maml.adapted
        assert all(torch.equal(adapted[n], parameters[n]) for n in parameters)
        assert adapted[context].shape == (6,) and adapted[context].abs().max() > 1e-6


def test_the_context_of_a_linear_layer_is_the_same_as_joining_it_to_the_inputs():
    layer = ContextLayer(nn.Linear(2, 3), 3, 4, film=False)
    context, x = torch.randn(4), torch.randn(5, 2)
    wide = torch.cat([layer.layer.weight, layer.modulation.weight], 1)
    expected = F.linear(torch.cat([x, context.expand(5, 4)], 1), wide, layer.layer.bias)
    assert torch.allclose(functional_call(layer, {"context": context}, (x,)), expected, atol=1e-6)


# ---- schedules ------------------------------------------------------------------------------


def test_multi_step_weights_fall_over_ten_epochs_and_the_last_takes_the_rest():
    def weights(iteration):
        return multi_step_weights(torch.tensor(iteration), 5, 5000, torch.float64)

    assert torch.allclose(weights(0), torch.full((5,), 0.2).double())
    assert torch.allclose(weights(499), weights(0)) and not torch.allclose(weights(500), weights(0))
    assert torch.allclose(weights(2500), torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6]).double())
    for late in (5000, 1_000_000):
        assert torch.allclose(weights(late), torch.tensor([0.006] * 4 + [0.976]).double())
    short = [multi_step_weights(torch.tensor(i), 2, 25, torch.float64)[0].item() for i in (0, 2, 3, 24, 25)]
    assert short == pytest.approx([0.5, 0.5, 0.45, 0.05, 0.015])
    assert all(weights(i).sum().item() == pytest.approx(1.0) for i in range(0, 6000, 250))


def test_the_meta_learning_rate_follows_its_schedule():
    def rate(kind, iteration):
        course = replace(options, meta_lr_schedule=kind)
        return float(meta_lr_at(course, {}, torch.tensor(iteration).double()))

    numbers = {"meta_lr": 1.0, "meta_lr_final": 0.2, "meta_lr_halving": 30, "iterations": 100}
    options = replace(resolve({}).training, **numbers)

    assert [rate("constant", i) for i in (0, 50, 100)] == [1.0] * 3
    assert [rate("halving", i) for i in (0, 29, 30, 65, 130)] == [1.0, 1.0, 0.5, 0.25, 1 / 16]
    assert [rate("linear", i) for i in (0, 50, 100, 130)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert [rate("cosine", i) for i in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])
    theirs = torch.optim.SGD([torch.zeros(1)], 1.0)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 100, 0.2)
    for i in range(100):
        assert rate("cosine", i) == pytest.approx(theirs.param_groups[0]["lr"])
        theirs.step()
        annealing.step()
