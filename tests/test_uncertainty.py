"""A loss of normal distributions: calibration, bands in pictures, and predictions with their deviations."""

import math
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
import torch
from runs import command, read_csv, read_record
from torch.nn import functional as F

from commands.adapt import load, predict
from commands.estimators import FewShotRegressor
from common.batch import TaskBatch
from common.choices import Choices
from common.task import UserTask
from dataset import Sinusoid
from evaluation.examples import Examples, examples_figure
from evaluation.meta_test import evaluate
from evaluation.predictions import predictions_figure, read_predictions
from learner import build_learner
from learners.losses import build_loss, gaussian_nll
from learners.reading import Reading
from maml import MAML
from training.checkpoint import load_checkpoint

HALF_WIDTHS = {50: NormalDist().inv_cdf(0.75), 90: NormalDist().inv_cdf(0.95)}


def test_an_evaluation_measures_the_mean_and_the_bands_of_each_task_and_step():
    reading = Reading("normal", numbers=2, floor=0.01)
    network = build_learner("mlp", 2, init="torch", seed=0).double()
    loss = partial(gaussian_nll, floor=0.01)
    maml = MAML(network, loss, Choices(inner_lr=0.01), reading=reading)
    parameters, tasks = maml.initial_parameters(), Sinusoid(5, 8, dtype=torch.float64)
    result = evaluate(maml, parameters, tasks, "test", tasks=3, steps=2, normalisations=("transductive",))
    batch = tasks.sample("test", 0, 0, range(3))
    outputs = maml.predictions(parameters, batch, 2)["transductive"]
    for task in range(3):
        for step in range(3):
            inside, errors, logs = {50: 0, 90: 0}, [], []
            for (mean, raw), y in zip(
                outputs[task, step].tolist(), batch.query_y[task, :, 0].tolist(), strict=True
            ):
                spread = NormalDist(mean, math.sqrt(math.log1p(math.exp(raw)) + 0.01))
                logs.append(-math.log(spread.pdf(y)))
                errors.append((y - mean) ** 2)
                for percent in inside:
                    inside[percent] += abs(y - mean) <= HALF_WIDTHS[percent] * spread.stdev
            got = {name: v["transductive"][task, step].item() for name, v in result.measures.items()}
            expected = {"loss": sum(logs) / 8, "mse": sum(errors) / 8}
            expected |= {f"coverage_{percent}": count / 8 for percent, count in inside.items()}
            assert got == pytest.approx(expected)


def test_predictions_of_a_table_are_means_and_deviations_in_its_units(tmp_path, capsys):
    rows = [f"{t},{i},{100 + 30 * math.sin(t + i)},{5 * t - i}" for t in range(9) for i in range(8)]
    (tmp_path / "data.csv").write_text("\n".join(["task,x,y,z", *rows]))
    data = ["--dataset", f"table:{tmp_path / 'data.csv'}", "--columns", "target=y,z", "-k", 3, "-q", 3]
    short = ["--iterations", 2, "--meta-batch-size", 2, "--eval-tasks", 3, "--loss", "gaussian-nll"]
    assert command(*data, *short, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    last = tmp_path / "run" / "last.pt"
    (tmp_path / "new.csv").write_text("x,y,z\n0,100,3\n2,,\n1,90,5\n3.5,,\n")
    program = tmp_path / "program.pt2"
    assert command("--adapt", tmp_path / "new.csv", "--load", last, "--save-weights", program) == 0
    header, *predicted = read_csv(tmp_path / "run" / "last-adapted-new.csv")
    assert header == ["row", "y", "z", "std(y)", "std(z)"]
    scales = load_checkpoint(last).scales
    x, support = torch.tensor([[0.0], [1.0], [2.0], [3.5]]), torch.tensor([[100.0, 3.0], [90.0, 5.0]])
    (shift, scale), (centre, deviation) = scales["input"], scales["target"]
    x, y = ((x - shift) / scale).float(), ((support - centre) / deviation).float()
    maml, parameters, _ = load(last, x, outputs=4)
    mean, raw = predict(maml, maml.adapt(parameters, x[:2], y, 1), x[2:]).double().chunk(2, 1)
    expected = mean * deviation + centre, (F.softplus(raw) + 1e-4).sqrt() * deviation
    found = torch.tensor([[float(cell) for cell in row[1:]] for row in predicted], dtype=torch.float64)
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    regressor = FewShotRegressor.load(last)
    estimated = regressor.fit([[0.0], [1.0]], support).predict([[2.0], [3.5]], return_std=True)
    torch.testing.assert_close(torch.tensor(np.hstack(estimated)), found, rtol=1e-4, atol=1e-4)
    given = torch.export.load(program).module()(torch.tensor([[2.0], [3.5]], dtype=torch.float64))
    torch.testing.assert_close(torch.cat(given, 1), found, rtol=1e-4, atol=1e-4)
    assert command("--eval", "--load", last) == 0
    assert "The MSE is that of standardised targets." in capsys.readouterr().out
    after = read_record(tmp_path / "run", "last-test-*.json")["per_step"][1]
    assert {"loss", "mse", "mse_interval_95", "coverage_50", "coverage_90"} <= after.keys()


def test_the_bands_of_a_picture_are_central_parts_of_the_distributions():
    x = torch.linspace(-1, 1, 7).expand(3, 7)[..., None]
    means, deviations = torch.zeros(3, 2, 7, 1), torch.full((3, 2, 7, 1), 2.0)
    examples = Examples(TaskBatch(x[:, :2], x[:, :2], x, x.sin()), means, [0, 3], None, deviations)
    panel, *_ = examples_figure(examples, "title").axes
    task = UserTask("", x[0, :2], x[0, :2], x[0], [], [])
    made = read_predictions(
        torch.zeros(7, 2),
        means[0, 0],
        Reading("normal"),
        [],
        ["y"],
        predicts_targets=True,
        deviations=deviations[0, 0],
    )
    for drawn in (panel, *predictions_figure([task], [made], "title").axes):
        bands = [band.get_paths()[0].vertices[:, 1] for band in drawn.collections[: len(HALF_WIDTHS)]]
        for width, band in zip(HALF_WIDTHS.values(), bands, strict=True):
            assert (band.min(), band.max()) == pytest.approx((-2 * width, 2 * width))


def test_what_makes_no_sense_with_the_loss_is_refused_in_one_line(refuse, tmp_path):
    loss = ["--loss", "gaussian-nll"]
    assert "does not fit classification" in refuse(*loss, "--dataset", "omniglot")
    assert "--head-init ridge computes what predicts" in refuse(*loss, "--head-init", "ridge")
    assert "--outputs numbers has no meaning with" in refuse(*loss, "--outputs", "numbers")
    for floor in ("floor=0", "floor=low", "delta=1"):
        assert "--loss-args" in refuse(*loss, "--loss-args", floor, "--checkpoint-path", tmp_path)
    assert build_loss("gaussian-nll", ("floor=0.1",))(torch.zeros(3, 2), torch.zeros(3, 1)) > 0
