"""The one evaluation: the numbers of a plain loop, their intervals, and diverged tasks in plain sight."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.batch import TaskBatch, TaskDistribution
from common.choices import Choices
from common.processes import World
from dataset import Sinusoid
from evaluation import meta_test
from evaluation.examples import adapt_examples, examples_figure
from evaluation.meta_test import DIVERGENCE, Evaluation, evaluate, find_diverged, mean_and_interval
from evaluation.tables import Caption, evaluation_record, results_of, results_table
from learner import build_learner
from maml import MAML


class Blobs(TaskDistribution):
    """Images of three classes, each a level of grey; a distribution by its protocol alone."""

    kind, ways = "images", 3

    def sample(self, split: str, seed: int, iteration: int, tasks: range) -> TaskBatch:
        random = torch.Generator().manual_seed(seed)
        noise = torch.rand(1000, 9, 1, 8, 8, generator=random)[tasks.start : tasks.stop]
        labels = torch.arange(3).repeat(3).expand(len(tasks), -1)
        x = 0.3 * noise + labels[..., None, None, None] / 2
        return TaskBatch(x[:, :3], labels[:, :3], x[:, 3:], labels[:, 3:])


class Flat(Sinusoid):
    """Sinusoids whose targets are `[examples]`."""

    def sample_to_draw(self, split: str, seed: int, tasks: int) -> TaskBatch:
        batch = super().sample_to_draw(split, seed, tasks)
        return replace(batch, support_y=batch.support_y[..., 0])


def classifier(**choices: object) -> MAML:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)]
    return MAML(nn.Sequential(*layers), F.cross_entropy, Choices(inner_lr=0.05, **choices))


def regressor(tasks_at_once: int | None = None) -> MAML:
    network = build_learner("mlp", 1, init="torch", seed=0)
    return MAML(network, F.mse_loss, Choices(inner_lr=0.01), tasks_at_once=tasks_at_once)


def measured(
    maml: MAML, *, tasks: int = 6, normalisations: tuple[str, ...] = ("transductive",), **how: object
):
    source = Blobs() if maml.has_batch_norm else Sinusoid(5, 10)
    parameters = maml.initial_parameters()
    return evaluate(
        maml, parameters, source, "test", tasks=tasks, steps=2, normalisations=normalisations, **how
    )


# ---- measuring ----------------------------------------------------------------------------------


def test_losses_are_those_of_a_plain_loop_over_tasks_and_steps():
    maml = regressor()
    losses = torch.zeros(6, 3, dtype=torch.float64)
    network = build_learner("mlp", 1, init="torch", seed=0)
    for task, (support_x, support_y, query_x, query_y) in enumerate(
        zip(*Sinusoid(5, 10).sample("test", 0, 0, range(6)), strict=True)
    ):
        network.load_state_dict(maml.initial_parameters())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for step in range(3):
            losses[task, step] = F.mse_loss(network(query_x), query_y).item()
            optimizer.zero_grad()
            F.mse_loss(network(support_x), support_y).backward()
            optimizer.step()
    torch.testing.assert_close(measured(maml).losses["transductive"], losses, rtol=1e-5, atol=1e-6)


def test_chunks_processes_and_skipped_tasks_change_no_number(monkeypatch):
    whole = measured(regressor()).losses["transductive"]
    chunked = measured(regressor(tasks_at_once=4)).losses["transductive"]
    torch.testing.assert_close(chunked, whole)
    last = measured(regressor(), tasks=2, skipped=4).losses["transductive"]
    torch.testing.assert_close(last, whole[4:])
    monkeypatch.setattr(World, "sum", lambda self, tensor, patiently: tensor)
    shares = [measured(regressor(tasks_at_once=2), world=World(rank, 2)).losses for rank in (0, 1)]
    torch.testing.assert_close(sum(share["transductive"] for share in shares), whole)
    assert all((share["transductive"] == 0).any() for share in shares)


def test_both_readings_of_batch_norm_and_the_running_statistics_are_measured():
    maml = classifier(steps=2, batch_norm="per-step")
    statistics = maml.initial_statistics()
    names = meta_test.list_normalisations(maml, statistics)
    assert names == ("transductive", "inductive", "per-step")
    result = measured(maml, normalisations=names, statistics=statistics)
    assert [*result.losses] == [*result.measures["accuracy"]] == [*names]
    assert len({values[:, -1].mean().item() for values in result.losses.values()}) == 3
    before, _, after = result.measured("transductive").mean(0)
    assert before < 0.5 < after
    assert meta_test.list_normalisations(regressor(), {}) == ("transductive",)


def test_an_evaluation_can_be_interrupted_before_a_chunk():
    answers = iter([False, True])
    with pytest.raises(InterruptedError):
        measured(regressor(tasks_at_once=2), interrupted=lambda: next(answers))


def test_examples_are_the_tasks_that_are_measured_and_curves_have_a_dense_grid():
    maml, source = regressor(), Sinusoid(5, 10)
    curves = adapt_examples(maml, maml.initial_parameters(), source, "test", {3, 1})
    x = curves.batch.query_x[0, :, 0]
    assert len(x) == 200 and (x.diff() > 0).all()
    assert curves.steps == [0, 1, 3] and curves.outputs.shape == (3, 3, 200, 1)
    assert torch.equal(curves.batch.support_x, source.sample("test", meta_test.SEED, 0, range(3)).support_x)
    flat = MAML(nn.Sequential(nn.Linear(1, 1), nn.Flatten(0)), F.mse_loss, Choices(inner_lr=0.01))
    flat_curves = adapt_examples(flat, flat.initial_parameters(), Flat(5, 10), "test", {1})
    assert flat_curves.outputs.shape == (3, 2, 200, 1)
    maml = classifier()
    images = adapt_examples(maml, maml.initial_parameters(), Blobs(), "test", {2})
    figure = examples_figure(images, "tasks")
    assert figure.get_suptitle() == "tasks: before and after 2 steps" and len(figure.axes) == 3


# ---- statistics ---------------------------------------------------------------------------------


def test_a_loss_has_diverged_where_it_has_grown_tenfold_and_not_where_it_has_fallen():
    losses = torch.tensor([[-3.0, -3.5, -4.0], [-2.0, -2.1, 40.0], [0.01, -1.0, 5.0], [-1.0, 7.0, torch.nan]])
    assert find_diverged(losses).tolist() == [[False] * 3, [False, False, True]] * 2
    positive = losses.abs().nan_to_num(200.0)
    limit = DIVERGENCE * torch.fmax(positive[:, :1], positive[:, 0].median())
    assert torch.equal(find_diverged(positive), positive > limit) and find_diverged(positive).any()


def test_a_hard_task_has_not_diverged_and_a_majority_can():
    losses = torch.full((10, 2), 1.0)
    losses[0] = torch.tensor([20.0, 150.0])  # hard, and not ten times its own loss
    assert not find_diverged(losses).any()
    losses[:6] = torch.inf  # most of them, and before adaptation
    assert find_diverged(losses).sum(0).tolist() == [6, 6]


def test_the_interval_covers_the_mean_in_95_of_100_experiments():
    generator = torch.Generator().manual_seed(0)
    mean, interval = mean_and_interval(torch.randn(400, 2000, generator=generator, dtype=torch.float64))
    assert ((mean.abs() < interval).double().mean() - 0.95).abs() < 0.02


# ---- tables and records -------------------------------------------------------------------------


def test_a_table_has_each_reading_after_each_step_and_the_accuracy_of_diverged_tasks():
    values = torch.rand(9, 3, dtype=torch.float64)
    losses = values.clone()
    losses[0, 1] = torch.nan
    both = {"transductive": values, "inductive": values / 2}
    evaluation = Evaluation({"loss": dict.fromkeys(both, losses), "accuracy": both})
    table = results_table(results_of({"all": [evaluation]}), Caption("", "cross-entropy", 2, (1,)))
    mean, interval = mean_and_interval(100 * values[:, 1])
    heading, _, after_one, *_ = table.splitlines()
    assert heading.split() == ["steps", "transductive", "diverged", "inductive", "diverged"]
    assert f"1  {mean:.2f} ± {interval:.2f}         1  " in after_one
    assert "Query accuracy %" in table and table.endswith("over 9 tasks.")
    measures = {"loss": {"inductive": values}, "accuracy": {"inductive": values / 2}}
    quiet = results_of({"all": [Evaluation(measures)]})
    heading, before, *_ = results_table(
        quiet, Caption("", "cross-entropy", 2, (1,)), losses=True
    ).splitlines()
    assert heading.split() == ["steps", "accuracy", "%", "cross-entropy"]
    assert before.split()[-1] == f"{values[:, 0].mean():.4g}"


def test_the_record_has_the_mean_without_diverged_tasks_or_the_worst_percent_and_the_median():
    losses = torch.rand(200, 2, dtype=torch.float64) / 10 + 0.5
    losses[7, 1], losses[8] = torch.nan, torch.inf
    before, after = evaluation_record(Evaluation({"loss": {"inductive": losses}}))["per_step"]
    assert (before["diverged_tasks"], after["diverged_tasks"]) == (1, 2)
    others = [value for number, value in enumerate(losses[:, 1].tolist()) if number not in (7, 8)]
    assert after["loss_without_diverged"] == pytest.approx(sum(others) / 198)
    ordered = sorted(losses[:, 0].tolist())
    assert before["loss_median"] == pytest.approx((ordered[99] + ordered[100]) / 2)
    assert before["loss_without_worst_percent"] == pytest.approx(sum(ordered[:198]) / 198)
    ordered = sorted(losses[:, 1].nan_to_num(torch.inf).tolist())
    assert after["loss_without_worst_percent"] == pytest.approx(sum(ordered[:198]) / 198)
