"""A table's columns are standardised by its training rows: in training, in tests, and back in --adapt."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_table
from runs import command, read_csv, train

from commands.call import check_call
from commands.evaluate import Subject
from commands.parser import parse
from common.errors import UsageError
from tasks.scales import apply_scale, measure_scale, undo_scale
from tasks.tables import TableTasks
from training.checkpoint import load_checkpoint

SHORT = ["--iterations", 3, "--val-every", 3, "--eval-tasks", 4, "--meta-batch-size", 2, "-k", 3, "-q", 3]


def write_table(path, tasks=12, rows=8, change=lambda columns: columns) -> dict[str, np.ndarray]:
    """Write columns of hugely different scales, one of them constant, and return them."""
    generator = np.random.default_rng(0)
    task = np.repeat(np.arange(tasks), rows)
    year = 1.7e9 + generator.normal(0, 10, len(task))  # float32 has steps of 128 there
    columns = {
        "task": task,
        "year": year,
        "tiny": generator.normal(0, 1e-7, len(task)),
        "same": np.full(len(task), 0.1),
        "y": 5e6 + 1e3 * (task + 1) * (year - 1.7e9),
    }
    columns = change(columns)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return columns


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Return the folder of a.csv and of a run on it."""
    folder = tmp_path_factory.mktemp("scales")
    write_table(folder / "a.csv")
    train(folder / "run", *SHORT, "--dataset", f"table:{folder / 'a.csv'}")
    return folder


def test_scales_are_numpys_mean_and_deviation_of_the_training_rows(tmp_path):
    columns = write_table(tmp_path / "a.csv")
    table = read_table(tmp_path / "a.csv")
    scales = table.measure_scales(targets=True)
    train = np.isin(columns["task"].astype(str), table.split_names["train"])
    assert 0 < train.sum() < len(train)
    raw = np.stack([columns[name] for name in ("year", "tiny", "same")], 1)
    mean, deviation = raw[train].mean(0), raw[train].std(0)
    assert np.allclose(scales["input"].numpy()[:, :2], [mean[:2], deviation[:2]], rtol=1e-9)
    assert scales["input"][:, 2].tolist() == [0.1, 1]  # the constant column: exactly 0 afterwards
    y = columns["y"][train]
    assert np.allclose(scales["target"].numpy()[:, 0], [y.mean(), y.std()], rtol=1e-12)
    tasks = TableTasks(table=table, ways=None, shots=3, queries=5, scales=scales)
    batch = tasks.sample("train", 0, 0, range(400))
    values = torch.from_numpy((raw - mean) / [*deviation[:2], 1])
    for x, y in zip(batch.query_x.flatten(0, 1), batch.query_y.flatten(), strict=True):
        distance, row = (values - x).abs().amax(1).min(0)
        assert distance < 1e-6 and train[row]
        expected = (columns["y"][row] - columns["y"][train].mean()) / columns["y"][train].std()
        assert y.item() == pytest.approx(expected, abs=1e-5)


def test_losses_in_different_units_are_not_compared_and_metrics_are(trained, tmp_path, refuse):
    write_table(tmp_path / "b.csv", change=lambda columns: columns | {"y": columns["y"] / 100})
    other = train(tmp_path / "other", *SHORT, "--dataset", f"table:{tmp_path / 'b.csv'}")
    write_table(tmp_path / "c.csv")
    write_table(tmp_path / "d.csv", change=lambda columns: columns | {"y": columns["y"] + 1e6})
    shifted = train(tmp_path / "shifted", *SHORT, "--dataset", f"table:{tmp_path / 'd.csv'}")
    line = ["--eval-dataset", f"table:{tmp_path / 'c.csv'}", "--split", "test", "--out", tmp_path]
    message = "standardise targets differently, and their losses have different units"
    assert message in refuse("--compare", trained / "run", other, *line)
    assert command("--compare", trained / "run", other, *line, "--metric", "mae") == 0
    assert command("--compare", trained / "run", shifted, *line) == 0  # the same unit


def test_a_table_that_has_changed_is_refused_and_one_that_has_moved_is_not(trained, tmp_path, refuse):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    write_table(tmp_path / "moved.csv")
    moved = ["--load", run, "--dataset", f"table:{tmp_path / 'moved.csv'}"]
    assert command("--eval", *moved) == 0
    assert command(*moved, "--iterations", 4) == 0
    write_table(tmp_path / "moved.csv", change=lambda columns: columns | {"y": columns["y"] / 100})
    for line in (["--eval", *moved], [*moved, "--iterations", 5]):
        assert "the table has other values, or rows in another order: restore it" in refuse(*line)


def test_a_scale_is_exact_for_any_size_and_is_undone():
    values = torch.tensor([[1e300, 3.0], [-1e300, 3.0]], dtype=torch.float64)
    scale = measure_scale(values)
    assert scale.tolist() == [[0, 3], [1e300, 1]]
    scaled = apply_scale(values, {"input": scale}, "input", "")
    assert scaled.tolist() == [[1, 0], [-1, 0]]
    assert torch.equal(undo_scale(scaled, {"input": scale}, "input"), values)
    assert apply_scale(values, {}, "input", "") is values


def test_targets_are_left_alone_where_another_loss_may_need_them(tmp_path, capsys):
    write_table(tmp_path / "a.csv", change=lambda c: c | {"y": c["task"] % 2})
    data = ["--dataset", f"table:{tmp_path / 'a.csv'}", "--checkpoint-path", tmp_path]
    assert command(*SHORT, *data, "--run-name", "bce", "--loss", "bce") == 0
    assert set(load_checkpoint(tmp_path / "bce" / "last.pt").scales) == {"input"}
    assert "  data     96 rows; tasks: 8 train, 2 validation, 2 test" in capsys.readouterr().out
    assert command(*SHORT, *data, "--run-name", "raw", "--loss", "bce", "--no-standardise") == 0
    assert load_checkpoint(tmp_path / "raw" / "last.pt").scales == {}


def test_another_table_is_standardised_as_the_training_table_was(trained, tmp_path):
    columns = write_table(tmp_path / "b.csv", change=lambda c: c | {"y": 3 * c["y"], "tiny": 2 + c["tiny"]})
    last = trained / "run" / "last.pt"
    flags = parse(["--eval", "--load", str(last), "--eval-dataset", f"table:{tmp_path / 'b.csv'}"])
    subject = Subject.read(last, check_call(flags), flags)
    subject.build(check_call(flags))
    mean, deviation = load_checkpoint(last).scales["target"].numpy()[:, 0]
    y = subject.distribution.sample("test", 0, 0, range(200)).query_y.numpy().flatten()
    expected = (columns["y"] - mean) / deviation
    assert max(abs(expected - value).min() for value in y) < 1e-4 and len(np.unique(y)) > 80


def test_adapt_undoes_the_scales(trained, tmp_path):
    """Predictions equal those of a plain computation that standardises and undoes by numpy's numbers."""
    from commands.adapt import load, predict

    last = trained / "run" / "last.pt"
    year = 1.7e9 + np.array([-9.0, -3.0, 3.0, 9.0])
    cells = [f"{t!r},0,0.1,{'' if i == 3 else 5e6 + 1e4 * (t - 1.7e9)}" for i, t in enumerate(year.tolist())]
    (tmp_path / "mine.csv").write_text("\n".join(["year,tiny,same,y", *cells]))
    line = ["--adapt", tmp_path / "mine.csv", "--load", last, "--out", tmp_path]
    assert command(*line, "--test-steps", 2) == 0
    heading, (row, predicted) = read_csv(tmp_path / "last-adapted-mine.csv")
    assert heading == ["row", "y"] and row == "4"
    scales = {name: scale.numpy() for name, scale in load_checkpoint(last).scales.items()}
    x = (np.stack([year, 0 * year, 0 * year + 0.1], 1) - scales["input"][0]) / scales["input"][1]
    y = (5e6 + 1e4 * (year[:3, None] - 1.7e9) - scales["target"][0]) / scales["target"][1]
    x, y = (torch.tensor(part, dtype=torch.float32) for part in (x, y))
    maml, parameters, _ = load(last, example=x)
    outputs = predict(maml, maml.adapt(parameters, x[:3], y, steps=2), x[3:])
    expected = outputs.double().numpy() * scales["target"][1] + scales["target"][0]
    assert float(predicted) == pytest.approx(expected.item(), rel=1e-8) and abs(float(predicted) - 5e6) < 5e5
    (task,) = json.loads((tmp_path / "last-adapted-mine.json").read_text())["tasks"]
    assert task["predicted"]["y"] == [float(predicted)]


def test_unscaled_numbers_are_blamed_not_the_inner_rate(tmp_path, capsys):
    write_table(tmp_path / "a.csv")
    line = [*SHORT, "--dataset", f"table:{tmp_path / 'a.csv'}", "--checkpoint-path", tmp_path]
    assert command(*line, "--run-name", "run", "--no-standardise") == 4
    (error,) = (text for text in capsys.readouterr().err.splitlines() if "main.py: error" in text)
    assert "reach 1.7e+09: scale them (a table: leave --no-standardise out)" in error


def test_numbers_that_no_type_holds_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("task,x,y\na,1,0\na,1e60,1\n")
    table = read_table(tmp_path / "a.csv", shares={"train": 1})
    with pytest.raises(UsageError, match="an input is too large for"):
        TableTasks(table=table, ways=None, shots=1, queries=1, scales={"input": torch.tensor([[1.0], [1.0]])})
