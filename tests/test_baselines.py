"""--baselines: what meta-learning must beat, measured on the test tasks of a checkpoint."""

import math
from types import SimpleNamespace

import pytest
import torch
from runs import command, read_record, stop_at, train

from commands import baselines
from commands.call import Call
from commands.resolve import resolve, resolve_from, restore_config
from common.device import set_up
from dataset import Sinusoid
from learner import build_learner
from training.checkpoint import Checkpoint, load_checkpoint

SHORT = ["--iterations", 12, "--log-every", 2, "--val-every", 6, "--save-every", 100, "-k", 4, "-q", 10]
SHORT += ["--meta-batch-size", 2, "--compile", "off"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(baselines, "RATE_TASKS", {False: 20, True: 20})
    monkeypatch.setattr(baselines, "WINDOW", 30)
    monkeypatch.setattr(baselines, "RATES", {"sgd": (0.01, 0.1), "adam": (0.001, 0.01)})


def test_all_baselines_are_measured_with_a_checkpoint_and_trained_once(
    tmp_path, capsys, monkeypatch, pictures
):
    drawn, draw = {}, baselines.fits_figure
    monkeypatch.setattr(baselines, "fits_figure", lambda fits, title: drawn.update(fits) or draw(fits, title))
    flags = ["--iterations", 70, "--log-every", 10, "--val-every", 70]
    last = train(tmp_path / "run", *SHORT, *flags) / "last.pt"
    line = ["--eval", "--baselines", "--load", last, "--eval-tasks", 20, "--eval-steps", 3]
    assert command(*line) == 0
    output = capsys.readouterr().out
    name = "last-test-sinusoid-4shot-10query-20tasks-baselines"
    record = read_record(tmp_path / "run", f"{name}.json")
    steps = {name: len(method["per_step"]) for name, method in record["methods"].items()}
    assert steps == {"maml": 4, "scratch, sgd": 4, "scratch, adam": 4, "pretrained": 4, "oracle": 1}
    assert "trains pretrained and oracle in" in output and "70 iterations each, about" in output
    assert "MAML, as trained" in output and all(name in output for name in steps if name != "maml")
    assert f"{name}.json, .png and -fits.png" in output
    assert all((tmp_path / "run" / f"{name}{end}").is_file() for end in (".png", "-fits.png"))
    assert [label.rpartition(", ")[0] for label in drawn] == ["MAML", *list(steps)[1:-1]]
    own, scratch, _, pretrained = drawn.values()
    for part in (scratch, pretrained):
        assert part.steps == [0, 1, 3] and torch.equal(part.batch.query_x, own.batch.query_x)
    expected = build_learner("mlp", 1, init="torch", seed=0)(own.batch.query_x)
    assert torch.allclose(scratch.outputs[:, 0], expected, atol=1e-6)

    maml, scratch = record["curves"].values()
    assert maml["iteration"] == scratch["iteration"] == [30, 60]
    points = load_checkpoint(last).progress["training"]["query_loss"]
    assert maml["query_loss"][0] == pytest.approx(sum(points[:3]) / 3, rel=1e-6)
    assert scratch["query_loss"][0] == pytest.approx(scratch_loss_by_hand(30), rel=1e-4)

    file = tmp_path / "run" / "baselines" / "oracle" / "last.pt"
    trained, oracle = file.read_bytes(), load_checkpoint(file)
    assert oracle.iteration == 70 and oracle.settings["oracle"] and oracle.settings["shots"] == 4
    assert command(*line, "-k", 2) == 0
    assert file.read_bytes() == trained


def scratch_loss_by_hand(iterations: int) -> float:
    """Return the mean query loss after ten steps of Adam on the first task of each iteration."""
    losses = []
    for iteration in range(1, iterations + 1):
        batch = Sinusoid(4, 10).sample("train", 0, iteration, range(1))
        network = build_learner("mlp", 1, init="torch", seed=0)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(network(batch.support_x[0]), batch.support_y[0]).backward()
            optimizer.step()
        loss = torch.nn.functional.mse_loss(network(batch.query_x[0]), batch.query_y[0])
        losses.append(loss.item())
    return sum(losses) / len(losses)


def test_the_rate_of_a_baseline_is_the_best_on_validation_tasks(tmp_path, monkeypatch):
    saved = restore_config(load_checkpoint(train(tmp_path / "run", *SHORT) / "last.pt").settings, None)
    tested = []

    def evaluate(maml, parameters, *, distribution, split, tasks, steps, normalisations, world):
        rate = maml.choices.inner_lr
        if split == "test":
            tested.append(rate)
        loss = {("validation", 0.01): 1.0, ("validation", 0.1): math.nan}.get((split, rate), 2.0)
        values = torch.full((3, steps + 1), loss, dtype=torch.float64)
        return baselines.Evaluation({"loss": dict.fromkeys(normalisations, values)})

    monkeypatch.setattr(baselines, "evaluate", evaluate)
    monkeypatch.setattr(baselines, "load_checkpoint", lambda _: Checkpoint({}, 0, {}, {}, {}, {}))
    runtime = set_up(torch.device("cpu"), "float32", small_tensors=True)
    data = SimpleNamespace(scales={})
    about = {"distribution": data, "file": tmp_path, "shown_steps": {1}, "has_curves": False}
    subject = SimpleNamespace(trained=saved, config=saved, runtime=runtime, **about)
    results = baselines.measure_baselines(subject, Call())
    assert list(results) == [
        ("scratch, sgd", "rate 0.01"),
        ("scratch, adam", "rate 0.01"),
        ("pretrained", "rate 0.01"),
        ("oracle", "not adapted"),
    ]
    assert tested[:3] == [0.01] * 3


def test_the_baselines_of_several_seeds_are_measured_together(tmp_path, pictures, refuse):
    train(tmp_path / "runs", *SHORT, "--seeds", "0-1")
    line = ["--eval", "--baselines", "--load", tmp_path / "runs", "--eval-tasks", 20, "--eval-steps", 3]
    assert command(*line, "--out", tmp_path / "many") == 0
    many = read_record(tmp_path / "many", "*-baselines.json")
    alone = []
    for seed in (0, 1):
        line[3], out = tmp_path / "runs" / f"seed-{seed}", tmp_path / str(seed)
        assert command(*line, "--out", out) == 0
        alone.append(read_record(out, "*-baselines.json"))
    assert len(many["over_runs"]) == 5
    for name, rows in many["over_runs"].items():
        of_each = [one["over_runs"][name][-1]["mean"] for one in alone]
        assert of_each[0] != of_each[1]
        assert rows[-1]["mean"] == pytest.approx(sum(of_each) / 2, rel=1e-5), name
        assert (rows[-1]["runs"], rows[-1]["lowest"]) == (2, min(of_each))
    assert many["tasks"] == 20 and "checkpoint" not in many
    assert [run["iteration"] for run in many["runs"]] == [one["iteration"] for one in alone]
    assert many["how"]["oracle"] == ["not adapted"] * 2
    train(tmp_path / "grid", *SHORT, "--sweep", "inner-lr=0.001,0.01")
    assert "runs of several settings" in refuse("--eval", "--baselines", "--load", tmp_path / "grid")


def test_a_stopped_baseline_is_resumed_and_follows_a_longer_run(tmp_path, monkeypatch, capsys, refuse):
    last = train(tmp_path / "run", *SHORT) / "last.pt"
    pretrained = tmp_path / "run" / "baselines" / "pretrained" / "last.pt"
    line = ["--eval", "--baselines", "--load", last, "--eval-tasks", 5]
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert command(*line) == 130
    assert "To resume: the same command" in capsys.readouterr().out
    assert load_checkpoint(pretrained).iteration == 5
    assert command(*line) == 0
    assert load_checkpoint(pretrained).iteration == 12
    assert command("--load", last, "--iterations", 15, "--eval-steps", 4) == 0
    assert command(*line, "--precision", "float64") == 0
    again = load_checkpoint(pretrained)
    assert again.iteration == 15 and all(w.dtype == torch.float32 for w in again.parameters.values())
    other = train(tmp_path / "other", *SHORT, "--seed", 1) / "last.pt"
    (tmp_path / "run" / "baselines").rename(tmp_path / "other" / "baselines")
    line = refuse("--eval", "--baselines", "--load", other, "--eval-tasks", 5)
    assert "--seed 1 disagrees with the checkpoint" in line


def test_baselines_take_the_tasks_and_the_budget_of_the_run_and_no_other_choice():
    saved = resolve({"vectorise": False, "compile": "off", "tasks_at_once": 3, "algorithm": "anil"})
    for algorithm in ("maml", "pretrain"):
        plain = resolve(baselines.plain_flags(saved, algorithm))
        assert (plain.training.vectorise, plain.training.tasks_at_once) == (False, 3)
        assert plain.choices.fast_weights == "all"
    ridge = resolve({"algorithm": "r2d2"})  # which takes no step, and is compared with what does
    scratch = baselines.derive_scratch_settings(ridge)
    assert (ridge.evaluation.eval_steps, scratch.evaluation.eval_steps) == (0, 10)
    reptile = resolve({"algorithm": "reptile", "dataset": "omniglot"})
    tested = resolve_from(reptile, {"queries": 15}, evaluate=True)
    assert baselines.plain_flags(tested, "maml", testing=True)["queries"] == 15


def test_learning_curves_are_averaged_where_their_points_agree():
    long, short = ((10, 20), [4.0, 2.0]), ((10,), [2.0])
    curves = baselines.collect_curves([{"maml": long}, {"maml": short}])
    assert baselines.mean_curve(curves["maml"]) == ((10,), [3.0])
    assert baselines.collect_curves([{"maml": long}, {"maml": ((15, 30), [1.0, 1.0])}]) == {}
    assert baselines.collect_curves([{"maml": long}, {}]) == {}
