"""Whole runs of every algorithm through the command line: trained, stopped, tested, compared."""

import signal

import pytest
import torch
from inner_loop import RATE
from runs import assert_same_run, command, curves

import dataset
from commands import config
from commands.presets import ALGORITHMS
from common.random import minibatch_order, task_stream
from dataset import Sinusoid, SinusoidFrequency, SinusoidLine
from training import trainer
from training.checkpoint import LAST, Checkpoint, load_checkpoint, save_checkpoint
from training.schedules import meta_lr_at

ITERATIONS = 12
SHORT = ["--iterations", ITERATIONS, "--log-every", 2, "--val-every", 6, "--save-every", 100, "-k", 4]
SHORT += ["--meta-batch-size", 2]
RUNS = {
    "maml": [],
    "fomaml": ["-s", 2, "--inner-optimizer", "momentum"],
    "anil": ["--inner-rates", "element", "--inner-clip", 1.0],
    "boil": ["--head", "2,4"],
    "reptile": ["--inner-batch", 3, "--eval-inner-batch", 2, "--inner-optimizer", "adam"],
    "meta-sgd": [],
    "maml++": ["--dataset", "omniglot", "--learner", "fc", "--msl-iterations", 10],
    "imaml": ["-s", 3, "--cg-steps", 2],
    "cavia": ["--objective", "multi-step", "-s", 2],
    "pretrain": ["--oracle", "--eval-inner-batch", 3],
}


@pytest.fixture(autouse=True)
def few_drawings(monkeypatch):
    """Characters enough for tasks of five ways, without the real ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 20, 28, 28), generator=generator, dtype=torch.uint8)
    splits = {name: torch.arange(20) + 20 * i for i, name in enumerate(("train", "validation", "test"))}
    monkeypatch.setattr(dataset, "load_omniglot", lambda *_, **__: (images, splits))
    monkeypatch.setattr(trainer, "VALIDATION_TASKS", 4)


def stop_at(iteration: int, monkeypatch) -> None:
    """Ctrl-C comes in that iteration of the next run."""
    plain = trainer.Trainer.step

    def step(self, bar):
        if self.iteration + 1 == iteration:
            self.signal = signal.SIGINT
        return plain(self, bar)

    monkeypatch.setattr(trainer.Trainer, "step", step)


def test_there_is_a_run_of_every_algorithm():
    assert RUNS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("algorithm", RUNS)
def test_every_algorithm_trains_goes_on_exactly_and_is_evaluated(algorithm, tmp_path, monkeypatch, capsys):
    options = ["--algorithm", algorithm, *SHORT, *RUNS[algorithm], "--checkpoint-path", tmp_path]
    assert command(*options, "--run-name", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        assert command(*options, "--run-name", "first") == 130
    for iteration in (4, 6):  # half way, maml++ becomes exact
        with monkeypatch.context() as patch:
            stop_at(iteration, patch)
            assert command(*options, "--run-name", "parts", "--resume") == 130
        assert load_checkpoint(tmp_path / "parts" / LAST).iteration == iteration
    assert command(*options, "--run-name", "parts", "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert curves(tmp_path / "whole") == curves(tmp_path / "parts")
    saved = load_checkpoint(tmp_path / "whole" / LAST)
    assert all(w.isfinite().all() for w in saved.parameters.values())
    first = load_checkpoint(tmp_path / "first" / LAST)
    assert any((w - first.parameters[name]).abs().max() > 1e-4 for name, w in saved.parameters.items())
    capsys.readouterr()
    assert command("--eval", "--load", tmp_path / "whole" / LAST, "--eval-tasks", 5, "--eval-steps", 6) == 0
    said = capsys.readouterr().out
    assert "Mean and 95 % interval over 5 tasks" in said
    assert ("per-step" in said.partition("steps ")[2]) == (algorithm == "maml++")


def test_maml_plus_plus_learns_rates_and_keeps_statistics_for_each_step(tmp_path):
    options = ["--algorithm", "maml++", *SHORT, *RUNS["maml++"], "--checkpoint-path", tmp_path]
    assert command(*options, "--run-name", "run") == 0
    saved = load_checkpoint(tmp_path / "run" / LAST)
    rates = {name: w for name, w in saved.parameters.items() if name.startswith(RATE)}
    assert rates and all(w.shape == (5,) and (w != 0.1).all() for w in rates.values())
    assert saved.parameters["2.bias"].shape == (5, 256)
    assert len(saved.statistics) == 4
    for statistics in saved.statistics.values():
        mean, variance = statistics.unbind(1)
        # a tenth of the way in each of twelve iterations
        assert (mean != 0).any(1).all() and ((variance - 1).abs() > 1e-3).any(1).all()
        assert not torch.equal(mean[0], mean[1])
    shown = curves(tmp_path / "run")
    assert set(shown) >= {f"inner_lr/1.weight/step_{n}" for n in range(1, 6)}


def test_damaged_statistics_are_refused(tmp_path, capsys):
    options = ["--algorithm", "maml++", *SHORT, *RUNS["maml++"], "--checkpoint-path", tmp_path]
    assert command(*options, "--iterations", 1, "--run-name", "run") == 0
    saved = load_checkpoint(tmp_path / "run" / LAST)
    fields = vars(saved)
    (tmp_path / "other").mkdir()
    for broken in ({}, {name: s[:2] for name, s in saved.statistics.items()}):
        save_checkpoint(tmp_path / "other" / LAST, Checkpoint(**fields | {"statistics": broken}))
        for doing in ([], ["--eval", "--eval-tasks", 2]):  # no training.json there: it would go on
            assert command(*doing, "--load", tmp_path / "other" / LAST) == 2
            assert "does not fit the learner fc" in capsys.readouterr().err
    save_checkpoint(tmp_path / "other" / LAST, Checkpoint(**fields | {"statistics": {"a": 1}}))
    assert command("--eval", "--load", tmp_path / "other" / LAST) == 2


def test_a_run_may_begin_with_another_algorithms_weights(tmp_path):
    options = [*SHORT, "--checkpoint-path", tmp_path]
    assert command(*options, "--algorithm", "meta-sgd", "--run-name", "rates") == 0
    rates = load_checkpoint(tmp_path / "rates" / LAST).parameters
    still = ["--meta-lr", 1e-12, "--iterations", 1]
    for algorithm, name in (("maml", "plain"), ("meta-sgd", "again")):
        line = [
            "--algorithm",
            algorithm,
            "--init-from",
            tmp_path / "rates" / LAST,
            *still,
            "--run-name",
            name,
        ]
        assert command(*options, *line) == 0
    plain, again = (load_checkpoint(tmp_path / name / LAST).parameters for name in ("plain", "again"))
    assert plain.keys() == {name for name in rates if not name.startswith(RATE)}
    assert all(torch.allclose(w, rates[n], atol=1e-9) for p in (plain, again) for n, w in p.items())
    line = ["--algorithm", "meta-sgd", "--inner-lr", 0.2, "--init-from", tmp_path / "plain" / LAST, *still]
    assert command(*options, *line, "--run-name", "fresh") == 0
    fresh = load_checkpoint(tmp_path / "fresh" / LAST).parameters
    assert torch.allclose(fresh[f"{RATE}0.weight"], torch.tensor(0.2))
    assert torch.allclose(fresh["0.weight"], rates["0.weight"], atol=1e-9)


def test_a_schedule_ends_where_it_was_set_to(tmp_path, capsys):
    options = ["--meta-lr-schedule", "cosine", *SHORT, "--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*options) == 0
    assert command("--load", tmp_path / "run" / LAST, "--iterations", 20) == 2
    assert "the cosine schedule of the checkpoint ends at iteration 12" in capsys.readouterr().err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for event in events.Scalars("optimizer/meta_lr"):
        rate = meta_lr_at("cosine", torch.tensor(event.step - 1), 1e-3, 0.0, ITERATIONS, torch.float64)
        assert event.value == pytest.approx(float(rate), rel=1e-5)


# ---- data -----------------------------------------------------------------------------------


def test_minibatches_pass_over_the_examples_in_new_orders():
    stream = task_stream("train", 3, 7, range(2), torch.device("cpu"))
    assert minibatch_order(stream, 6, None, 3) is None and minibatch_order(stream, 6, 6, 3) is None
    order = minibatch_order(stream, 6, 4, 5)
    assert order.shape == (2, 5, 4)
    passes = order.flatten(1)
    assert (passes[:, :18].view(2, 3, 6).sort(-1).values == torch.arange(6)).all()
    assert not torch.equal(passes[:, :6], passes[:, 6:12]) and not torch.equal(passes[0], passes[1])


def test_reptile_counts_the_query_into_its_shots_and_others_do_not():
    assert config.resolve({"algorithm": "reptile", "train_shots": 15}).training_shots == 5
    assert config.resolve({"train_shots": 15}).training_shots == 15
    tasks = Sinusoid(10, 10).resized(5).sample("train", 0, 1, range(3))
    assert tasks.support_x.shape == (3, 5, 1) and tasks.query_x.shape == (3, 10, 1)


def test_the_frequency_varies_in_its_family_alone():
    stream = task_stream("train", 0, 0, range(20_000), torch.device("cpu"))
    *_, frequency = SinusoidFrequency(1, 1).parameters(stream)
    assert 0.8 <= frequency.min() < 0.801 and 1.199 < frequency.max() < 1.2
    assert frequency.mean().item() == pytest.approx(1.0, abs=0.003)
    x, y, *_ = SinusoidFrequency(50, 1, dtype=torch.float64).sample("train", 0, 0, range(9))
    amplitude, phase, frequency = SinusoidFrequency(50, 1, dtype=torch.float64).parameters(
        task_stream("train", 0, 0, range(9), torch.device("cpu")).at("parameters")
    )
    assert torch.allclose(y[..., 0], amplitude * torch.sin(frequency * x[..., 0] + phase))


def test_the_oracle_is_told_the_parameters_of_the_same_tasks():
    for family in (Sinusoid, SinusoidLine):
        plain, told = (family(5, 4, oracle=o, dtype=torch.float64) for o in (False, True))
        a, b = (d.sample("test", 0, 0, range(6)) for d in (plain, told))
        assert torch.equal(a.query_x, b.query_x[..., :1]) and torch.equal(a.support_y, b.support_y)
        assert b.query_x.shape[-1] == {Sinusoid: 3, SinusoidLine: 6}[family]
    amplitude, phase = told.sample("test", 0, 0, range(6)).query_x[..., 1:3].unbind(-1)
    is_line = b.query_x[..., -1] == 1
    sinusoids = amplitude * torch.sin(b.query_x[..., 0] + phase)
    assert torch.allclose(b.query_y[..., 0][~is_line], sinusoids[~is_line])
