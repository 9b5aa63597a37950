"""Whole runs of every algorithm: trained, stopped, resumed, measured, and begun from each other's weights."""

import pytest
import torch
from conftest import write_classes
from matplotlib.figure import Figure
from runs import assert_same_run, command, curves, stop_at

from commands.presets import ALGORITHMS
from maml import RATE
from training import trainer
from training.checkpoint import load_checkpoint, save_checkpoint
from training.folders import LAST, RESULTS
from training.schedules import meta_lr_at

ITERATIONS = 12
SHORT = ["--iterations", ITERATIONS, "--log-every", 2, "--val-every", 6, "--save-every", 100, "-k", 4]
SHORT += ["--meta-batch-size", 2, "--compile", "off", "--threads", 1]
IMAGES = [
    "--learner",
    "fc",
    "--image-size",
    8,
    "-n",
    2,
    "-k",
    1,
    "-q",
    1,
    "--msl-iterations",
    10,
]  # of the fixture `folder`
RUNS = {
    "maml": [],
    "fomaml": ["-s", 2, "--inner-optimizer", "momentum"],
    "anil": ["--inner-rates", "element", "--inner-clip", 1.0],
    "boil": ["--head", "2,4"],
    "reptile": ["--inner-batch", 3, "--eval-inner-batch", 2, "--inner-optimizer", "adam"],
    "meta-sgd": [],
    "maml++": IMAGES,
    "imaml": ["-s", 3, "--cg-steps", 2],
    "cavia": ["--objective", "multi-step", "-s", 2],
    "pretrain": ["--oracle", "--eval-inner-batch", 3],
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Pictures have tests of their own, and take longer than these runs."""
    monkeypatch.setattr(trainer, "VALIDATION_TASKS", 4)
    monkeypatch.setattr("training.run.Run.draw_examples", lambda *_: None)
    monkeypatch.setattr("training.run.learning_figure", lambda *_, **__: Figure(figsize=(1, 1)))


@pytest.fixture
def flags_of(tmp_path):
    """The flags of a short run of an algorithm, in the test's folder."""

    def flags(algorithm: str) -> list:
        common = [*SHORT, "--algorithm", algorithm, *RUNS[algorithm], "--checkpoint-path", tmp_path]
        if RUNS[algorithm] is not IMAGES:
            return common
        if not (tmp_path / "classes").exists():
            write_classes(tmp_path / "classes", 12, 3)
        return [*common, "--dataset", f"images:{tmp_path / 'classes'}"]

    return flags


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_resumes_to_the_bit_and_is_measured(
    algorithm, flags_of, tmp_path, monkeypatch, capsys
):
    flags = flags_of(algorithm)
    assert command(*flags, "--run-name", "whole") == 0
    weights = {}
    for iteration in (1, 4, 6):  # half way, maml++ becomes exact
        with monkeypatch.context() as patch:
            stop_at(iteration, patch)
            assert command(*flags, "--run-name", "parts", "--resume") == 130
        stopped = load_checkpoint(tmp_path / "parts" / LAST)
        assert stopped.iteration == iteration
        weights[iteration] = stopped.parameters
    assert command(*flags, "--run-name", "parts", "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    learned = load_checkpoint(tmp_path / "whole" / LAST).parameters
    assert all(weight.isfinite().all() for weight in learned.values())
    assert any((weight - weights[1][name]).abs().max() > 1e-4 for name, weight in learned.items())
    capsys.readouterr()
    assert command("--eval", "--load", tmp_path / "whole" / LAST, "--eval-tasks", 5, "--threads", 1) == 0
    table = capsys.readouterr().out
    assert "5 test tasks" in table and ("per-step" in table.partition("steps ")[2]) == (algorithm == "maml++")


def test_maml_plus_plus_learns_rates_and_keeps_statistics_for_each_step(flags_of, tmp_path, capsys):
    run = tmp_path / "run"
    assert command(*flags_of("maml++"), "--run-name", "run") == 0
    saved = load_checkpoint(run / LAST)
    rates = {name: rate for name, rate in saved.parameters.items() if name.startswith(RATE)}
    assert rates and all(rate.shape == (5,) and (rate != 0.1).all() for rate in rates.values())
    assert saved.parameters["2.bias"].shape == (5, 256)
    assert len(saved.statistics) == 4
    for statistics in saved.statistics.values():
        mean, variance = statistics.unbind(1)
        assert (mean != 0).any(1).all() and ((variance - 1).abs() > 1e-3).any(1).all()
        assert not torch.equal(mean[0], mean[1])
    assert curves(run).keys() >= {f"inner_lr/1.weight/step_{step}" for step in range(1, 6)}
    (run / RESULTS).unlink()  # so that there is something to resume
    for broken in ({}, {name: s[:2] for name, s in saved.statistics.items()}):
        save_checkpoint(run / LAST, type(saved)(**vars(saved) | {"statistics": broken}))
        assert command("--load", run / LAST) == 2
        assert "does not fit the learner fc" in capsys.readouterr().err


def test_a_run_begins_with_another_algorithms_weights_and_learned_rates(tmp_path):
    flags = [*SHORT, "--checkpoint-path", tmp_path]

    def train(name: str, *more: object) -> dict[str, torch.Tensor]:
        assert command(*flags, *more, "--run-name", name) == 0
        return load_checkpoint(tmp_path / name / LAST).parameters

    still = ["--meta-lr", 1e-12, "--iterations", 1, "--init-from"]
    source = train("source", "--algorithm", "meta-sgd")
    plain = train("plain", "--algorithm", "maml", *still, tmp_path / "source" / LAST)
    again = train("again", "--algorithm", "meta-sgd", *still, tmp_path / "source" / LAST)
    assert plain.keys() == {name for name in source if not name.startswith(RATE)}
    for parameters in (plain, again):
        assert all(torch.allclose(w, source[name], atol=1e-9) for name, w in parameters.items())
    rates = ["--algorithm", "meta-sgd", "--inner-lr", 0.2]
    fresh = train("fresh", *rates, *still, tmp_path / "plain" / LAST)  # which has no rates to take
    assert torch.allclose(fresh[f"{RATE}0.weight"], torch.tensor(0.2))
    assert torch.allclose(fresh["0.weight"], source["0.weight"], atol=1e-9)
    origin = load_checkpoint(tmp_path / "fresh" / LAST).progress["origin"]
    assert origin == f"{tmp_path / 'plain' / LAST}, iteration 1"


def test_the_meta_learning_rate_follows_its_schedule_to_the_end(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--meta-lr-schedule", "cosine", *SHORT, "--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*flags) == 0
    assert command("--load", tmp_path / "run" / LAST, "--iterations", 20) == 2  # it ends at 12
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for event in events.Scalars("optimizer/meta_lr"):
        rate = meta_lr_at("cosine", torch.tensor(event.step - 1), 1e-3, 0.0, ITERATIONS, torch.float64)
        assert event.value == pytest.approx(float(rate), rel=1e-5)
