"""Whole runs: what training computes, how it stops and resumes, and what it leaves in its folder."""

import itertools
import json
import math
import os
import re
import resource
import signal
import statistics
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_loop import LR, plain_loop
from runs import assert_same_bits, assert_same_run, command, curves, stop_at
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import LostError
from dataset import Regression, Sinusoid, SinusoidLine
from evaluation.meta_test import evaluate
from learner import build_learner
from training import compiler, trainer
from training.checkpoint import Checkpoint, load_checkpoint
from training.folders import BEST, LAST, RESULTS
from training.run import final_loss
from training.step import LABELLED
from training.trainer import FAILED, Trainer

ITERATIONS = 120
# points, validations and checkpoints coincide in every combination
SCHEDULE = ["--iterations", ITERATIONS, "--log-every", 7, "--val-every", 50, "--save-every", 20]
SETTINGS = ["--meta-batch-size", 4, "-k", 5, "--grad-clip", 10, "--seed", 3]
SETTINGS += ["--val-tasks", 50]  # by which the last validation is the best
BAD = 37  # the iteration whose targets are made NaN
SHORT = ["--iterations", 60, "--log-every", 10, "--val-every", 20, "--save-every", 25, "--meta-batch-size", 4]


def train(folder: Path, *flags: object) -> int:
    return command(*flags, "--checkpoint-path", folder.parent, "--run-name", folder.name)


def last_of(folder: Path) -> Checkpoint:
    return load_checkpoint(folder / LAST)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder, *SETTINGS, *SCHEDULE) == 0
    return folder


@pytest.fixture
def after_step(monkeypatch):
    """Return a dictionary of actions to carry out after an iteration, by its number."""
    actions, step = {}, Trainer.step

    def step_and_act(self):
        step(self)
        actions.pop(self.iteration, lambda: None)()

    monkeypatch.setattr(Trainer, "step", step_and_act)
    return actions


@pytest.fixture
def before_evaluation(monkeypatch):
    """Return a dictionary of actions to carry out before a validation, by its position in the run, from 1."""
    actions, count = {}, itertools.count(1)

    def act_and_evaluate(*arguments, **options):
        actions.pop(next(count), lambda: None)()
        return evaluate(*arguments, **options)

    monkeypatch.setattr("training.run.evaluate", act_and_evaluate)
    return actions


# ---- what training computes -----------------------------------------------------------------


def test_training_is_adam_on_the_exact_meta_gradient_with_its_elements_clipped(tmp_path):
    options = ["--iterations", 3, "--meta-batch-size", 2, "--precision", "float64", "--grad-clip", 0.01]
    assert train(tmp_path / "run", *options, "--inner-lr", LR, "--log-every", 1) == 0
    network, losses = build_learner("mlp", 1, init="paper", seed=0).double(), []
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for iteration in (1, 2, 3):
        batch = Sinusoid(10, 10, dtype=torch.float64).sample("train", 0, iteration, range(2))
        gradients, query_losses, _ = plain_loop(network, F.mse_loss, batch, steps=1)
        assert any(g.abs().max() > 0.01 for g in gradients.values())  # there is something to clip
        for name, weight in network.named_parameters():
            weight.grad = gradients[name].clamp(-0.01, 0.01)
        optimizer.step()
        losses.append(query_losses.mean().item())
    saved = last_of(tmp_path / "run")
    for name, weight in network.named_parameters():
        assert torch.allclose(weight, saved.parameters[name], rtol=0, atol=1e-12), name
    assert saved.progress["training"]["query_loss"] == pytest.approx(losses, rel=1e-6)


def test_every_option_reaches_the_one_iteration_of_a_run_which_has_a_curve(tmp_path):
    options = ["--iterations", 1, "--meta-batch-size", 2, "--precision", "float64", "-k", 4, "-q", 6, "-s", 3]
    options += ["--inner-lr", LR, "--first-order", "--noise", 0.3, "--init", "torch", "--seed", 5]
    options += ["--dataset", "sinusoid-line", "--tasks-at-once", 1, "--grad-clip-norm", 0.01]
    assert train(tmp_path / "run", *options) == 0
    network = build_learner("mlp", 1, init="torch", seed=5).double()
    batch = SinusoidLine(4, 6, noise=0.3, dtype=torch.float64).sample("train", 5, 1, range(2))
    gradients, *_ = plain_loop(network, F.mse_loss, batch, steps=3, order="first-order")
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm > 0.01  # there is something to clip
    saved = last_of(tmp_path / "run")
    for name, moment in saved.exp_avg.items():  # (1 - beta1) times the gradient
        expected = gradients[name] * 0.01 / (norm + 1e-6)
        assert torch.allclose(moment / 0.1, expected, rtol=1e-9, atol=1e-12), name
    assert curves(tmp_path / "run")["train/query_loss"] == [1] and saved.settings["log_every"] == 100


def test_no_iteration_waits_for_the_device(tmp_path, monkeypatch):
    read, step = [], Trainer.step

    class ReadNumbers(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                read.append(args)
            return function(*args, **(kwargs or {}))

    def watch_step(self):
        with ReadNumbers():
            step(self)

    monkeypatch.setattr(Trainer, "step", watch_step)
    assert train(tmp_path / "run", *SHORT, "--on-nan", "skip") == 0
    assert read == []


# ---- curves and files -----------------------------------------------------------------------


def test_every_curve_has_its_points_and_no_others(whole):
    training = ["train/query_loss", "train/meta_gradient_norm"]
    training += ["watch/meta_lr", "watch/iterations_per_second"]
    validation = [f"validation/{name}" for name in ("query_loss", "best_query_loss", "diverged_tasks")]
    validation += [f"validation_by_step/query_loss/{step}" for step in (0, 1)]
    assert curves(whole) == {
        **{tag: list(range(7, ITERATIONS + 1, 7)) for tag in training},
        **{tag: [50, 100, 120] for tag in validation},
    }


def test_the_meta_learning_rate_follows_its_schedule_to_the_end(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert train(run, *SHORT, "--meta-lr-schedule", "cosine") == 0
    assert command("--load", run / LAST, "--iterations", 70) == 2  # the schedule ends at 60
    events = EventAccumulator(str(run))
    events.Reload()
    for event in events.Scalars("watch/meta_lr"):
        rate = 0.5e-3 * (1 + math.cos(math.pi * (event.step - 1) / 60))
        assert event.value == pytest.approx(rate, rel=1e-5)


def test_the_final_loss_is_the_mean_of_the_last_500_iterations():
    curve = {"iteration": [300, 500, 700, 1000], "query_loss": [9.0, 8.0, 2.0, 1.0]}
    assert final_loss(curve) == {"mean": (2.0 * 200 + 1.0 * 300) / 500, "from": 501, "to": 1000}
    longer = {"iteration": [600, 1200], "query_loss": [2.0, 1.0]}  # whole points alone
    assert final_loss(longer) == {"mean": 1.0, "from": 601, "to": 1200}
    skipped = {"iteration": [1, 2, 4], "query_loss": [1.0, math.nan, 4.0]}
    assert final_loss(skipped) == {"mean": 3.0, "from": 1, "to": 4}
    assert final_loss({}) is None


def test_the_best_checkpoint_is_the_best_validation_not_the_last(tmp_path):
    run = tmp_path / "run"
    wild = ["--meta-lr", 0.5, "--meta-batch-size", 2, "--iterations", 60, "--val-every", 5]
    assert train(run, *wild) == 0
    progress = last_of(run).progress
    losses = progress["validation"]["query_loss"]
    assert len(losses) == 12 and losses[-1] > min(losses)
    best = 5 * (1 + losses.index(min(losses)))
    assert load_checkpoint(run / BEST).iteration == progress["best_iteration"] == best
    assert progress["best_score"] == -min(losses)
    assert command("--load", run / BEST, "--iterations", 70) == 2  # it would overwrite last.pt


def test_a_run_leaves_its_results_and_pictures(tmp_path, pictures):
    run = tmp_path / "run"
    assert train(run, *SHORT) == 0
    results = json.loads((run / RESULTS).read_text())
    assert results["iteration"] == 60 and results["failure"] is None
    assert results["training"]["iteration"] == [10, 20, 30, 40, 50, 60]
    assert results["validation"]["iteration"] == [20, 40, 60]
    assert results["iterations"] == 60
    for picture in ("training.png", "examples.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")


# ---- stopping and resuming ------------------------------------------------------------------


def raise_error(error: Exception) -> None:
    raise error


DISTURBANCES = {
    "SIGINT": (lambda: os.kill(os.getpid(), signal.SIGINT), 130, "--load"),
    "memory": (lambda: raise_error(RuntimeError("CUDA out of memory.")), 2, "lower --tasks-at-once"),
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_disturbed_run_is_saved_and_resumes_exactly(disturbance, whole, tmp_path, after_step, capsys):
    after_step[33], code, advice = DISTURBANCES[disturbance]
    run = tmp_path / "run"
    assert train(run, *SETTINGS, *SCHEDULE) == code
    assert last_of(run).iteration == 33
    output = "".join(capsys.readouterr())
    assert "Saved at iteration 33" in output and advice in output
    assert command("--load", run / LAST) == 0
    assert_same_run(whole, run)


UNLABELLED = """
import torch

class Tasks:
    def __init__(self, shots, queries):
        self.shots, self.queries = shots, queries

    def sample(self, split, seeds):
        return [torch.stack(part) for part in zip(*map(self.one, seeds.tolist()))]

    def one(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shots + self.queries, 2, generator=generator)
        y = (x[:, :1] > 0).float()
        if seed % 3 == 0:
            y[self.shots :] = torch.nan
        return x[: self.shots], y[: self.shots], x[self.shots :], y[self.shots :]

def loss(outputs, targets):
    known = targets == targets
    losses = torch.nn.functional.softplus(outputs) - outputs * targets.where(known, 0.0)
    return (losses * known).sum() / known.sum().clamp(min=1)
"""


def test_a_training_accuracy_is_the_mean_over_tasks_that_have_labels(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text(UNLABELLED)
    code = tmp_path / "code.py"
    line = ["--dataset", f"{code}:Tasks", "--loss", f"{code}:loss", "--outputs", "labels", "-q", 4]
    line += ["--iterations", 12, "--val-every", 12, "--val-tasks", 6, "--no-check-gradients"]
    points = []
    for log_every in (1, 12):
        run = tmp_path / f"{log_every}"
        assert train(run, *line, "--meta-batch-size", 1, "--log-every", log_every) == 0
        points.append(json.loads((run / RESULTS).read_text())["training"]["query_accuracy"])
    each, (mean,) = points
    assert None in each and mean == pytest.approx(statistics.mean(a for a in each if a is not None))
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        assert train(tmp_path / "older", *line, "--meta-batch-size", 1, "--log-every", 12) == 130
    file = tmp_path / "older" / LAST  # of a version that did not count the tasks with labels
    content = torch.load(file, weights_only=True)
    del content["progress"]["window"][LABELLED]
    torch.save(content, file)
    assert command("--load", file, "--dataset", f"{code}:Tasks", "--loss", f"{code}:loss") == 0
    counted = 6 + sum(accuracy is not None for accuracy in each[6:])
    (mean,) = last_of(file.parent).progress["training"]["query_accuracy"]
    assert mean == pytest.approx(sum(accuracy or 0 for accuracy in each) / counted)


@pytest.mark.parametrize("validation", [1, 3])
def test_an_interrupted_validation_is_done_after_resuming(
    validation, whole, tmp_path, before_evaluation, after_step
):
    before_evaluation[validation] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    run = tmp_path / "run"
    assert train(run, *SETTINGS, *SCHEDULE) == 128 + signal.SIGTERM
    saved = last_of(run)
    assert saved.iteration == {1: 50, 3: ITERATIONS}[validation]
    assert saved.progress["validation"].get("iteration", []) == [50, 100][: validation - 1]
    assert not (run / RESULTS).exists()
    if validation == 1:  # killed soon afterwards: the validation is not done, and logged, once more
        after_step[52] = lambda: raise_error(RuntimeError("killed"))
        with pytest.raises(RuntimeError, match="killed"):
            command("--load", run / LAST)
        assert last_of(run).progress["validation"]["iteration"] == [50]
    assert command("--load", run / LAST) == 0
    assert_same_run(whole, run)


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_signal_to_this_process_alone_cuts_compiling_short(swallowed, tmp_path, monkeypatch):
    def interrupted_trace(*arguments: object) -> object:
        with suppress(*[InterruptedError] * swallowed):  # as PyTorch may
            os.kill(os.getpid(), signal.SIGTERM)
        return trace(*arguments)

    trace = compiler._trace
    monkeypatch.setattr(compiler, "_trace", interrupted_trace)
    monkeypatch.setattr(compiler.Compiler, "_build", lambda *_: pytest.fail("compiling went on"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert train(tmp_path / "run", *SETTINGS, *SCHEDULE, "--compile", "on") == 128 + signal.SIGTERM
    assert last_of(tmp_path / "run").iteration == 100


def test_a_run_that_loses_another_process_is_saved_first(whole, tmp_path, before_evaluation, monkeypatch):
    before_evaluation[2] = lambda: raise_error(LostError("gone"))
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("") if code != 3 else None)
    run = tmp_path / "run"
    train(run, *SETTINGS, *SCHEDULE)
    assert last_of(run).iteration == 100
    assert command("--load", run / LAST) == 0
    assert_same_run(whole, run)


def test_a_finished_run_can_be_made_longer(whole, tmp_path):
    run = tmp_path / "short"
    assert train(run, *SETTINGS, *SCHEDULE, "--iterations", 100) == 0  # the last --iterations counts
    assert command("--load", run / LAST) == 0  # nothing is left to do
    assert last_of(run).iteration == 100
    assert command("--load", run / LAST, "--iterations", ITERATIONS) == 0
    assert_same_run(whole, run)


def test_a_run_that_has_only_its_best_checkpoint_resumes_from_there(whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / BEST).write_bytes((whole / LAST).read_bytes())  # killed before its last.pt and its results
    flags = ["--checkpoint-path", tmp_path, "--run-name", "run", "--resume"]
    assert command(*flags, "--seed", 4) == 2  # another run's
    assert command(*flags) == 0
    assert_same_bits(vars(last_of(run)), vars(last_of(whole)))
    assert (run / RESULTS).read_text() == (whole / RESULTS).read_text()


def test_the_newest_checkpoint_is_never_older_than_ten_minutes(tmp_path, monkeypatch):
    saved = set()
    monkeypatch.setattr(
        trainer, "save_checkpoints", lambda files: saved.update(c.iteration for c in files.values())
    )
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    assert train(tmp_path / "run", *SHORT, "--save-every", 1000, "--val-every", 1000) == 0
    assert saved == set(range(1, 61))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, after_step, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel cuts off every file of this process at this size
    after_step[26] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert train(tmp_path / "run", *SHORT) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "file too large" in capsys.readouterr().err
    assert last_of(tmp_path / "run").iteration == 25
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert command("--load", tmp_path / "run" / LAST) == 0
    assert train(tmp_path / "whole", *SHORT) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ---- non-finite numbers ---------------------------------------------------------------------


@pytest.fixture
def bad_iteration(monkeypatch):
    """Make the targets of one iteration NaN for seeds 1 and above."""
    sample = Regression.sample

    def spoil(self, split, seed, iteration, tasks, **options):
        batch = sample(self, split, seed, iteration, tasks, **options)
        if split != "train":
            return batch
        bad = torch.as_tensor(iteration == BAD) & torch.as_tensor(seed >= 1)
        return replace(batch, query_y=torch.where(bad, torch.nan, batch.query_y))

    monkeypatch.setattr(Regression, "sample", spoil)


def assert_same_weights_and_moments(a: Checkpoint, b: Checkpoint) -> None:
    for name in ("parameters", "exp_avg", "exp_avg_sq"):
        assert_same_bits(getattr(a, name), getattr(b, name), name)


def test_a_run_stops_before_a_non_finite_iteration(bad_iteration, tmp_path, capsys):
    stopped, short = tmp_path / "stopped", tmp_path / "short"
    assert train(stopped, *SHORT, "--seed", 1) == FAILED
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"iteration {BAD}: the query targets of task 0 are not all finite" in line
    assert f"--load {stopped / LAST} --on-nan skip" in line
    assert json.loads((stopped / RESULTS).read_text())["failure"] in line
    assert curves(stopped)["train/query_loss"] == [10, 20, 30]
    assert last_of(stopped).iteration == BAD - 1 and last_of(stopped).progress["window_size"] == 6
    assert train(short, *SHORT, "--seed", 1, "--iterations", BAD - 1) == 0
    assert_same_weights_and_moments(last_of(stopped), last_of(short))


def test_a_skipped_iteration_changes_nothing_and_counts_in_no_mean(bad_iteration, tmp_path):
    flags, skip = [*SHORT, "--seed", 1], ["--on-nan", "skip"]
    assert train(tmp_path / "whole", *flags, *skip) == 0
    assert train(tmp_path / "skipped", *flags, *skip, "--iterations", BAD) == 0
    assert train(tmp_path / "before", *flags, "--iterations", BAD - 1) == 0
    assert_same_weights_and_moments(last_of(tmp_path / "skipped"), last_of(tmp_path / "before"))
    assert train(tmp_path / "stopped", *flags) == FAILED  # and resumes as the one that skipped it
    assert command("--load", tmp_path / "stopped" / LAST, *skip) == 0
    assert_same_bits(vars(last_of(tmp_path / "stopped")), vars(last_of(tmp_path / "whole")))
    assert all(map(math.isfinite, last_of(tmp_path / "whole").progress["training"]["query_loss"]))
    assert train(tmp_path / "next", *flags, *skip, "--iterations", BAD + 1) == 0
    before, after = last_of(tmp_path / "before"), last_of(tmp_path / "next")
    for name, weight in before.parameters.items():  # Adam has not counted it either
        parameter, moment = torch.nn.Parameter(weight), before.exp_avg[name]
        optimizer = torch.optim.Adam([parameter])
        moments = {"exp_avg": moment.clone(), "exp_avg_sq": before.exp_avg_sq[name]}
        optimizer.state[parameter] = {"step": torch.tensor(BAD - 1.0), **moments}
        parameter.grad = (after.exp_avg[name] - 0.9 * moment) / (1 - 0.9)
        optimizer.step()
        torch.testing.assert_close(parameter.data, after.parameters[name], rtol=1e-6, atol=1e-6)


def test_a_run_that_skips_every_iteration_has_failed(tmp_path, capsys):
    diverging = [*SHORT, "--on-nan", "skip", "--iterations", 15, "--inner-lr", 1e30]
    for flags in (diverging, [*diverging, "--resume"]):  # nothing is left to do
        assert train(tmp_path / "run", *flags) == FAILED
        output = capsys.readouterr()
        line = output.err.splitlines()[-1]
        assert "all 15 iterations were skipped: the inner loop diverges" in line and "--on-nan" not in line
        if "--resume" not in flags:  # those after the last point of the curves, too
            assert "Iterations skipped for non-finite numbers: 15" in output.out
    assert "is finished at iteration 15" in output.out


def test_one_failed_run_of_several_does_not_stop_the_others(bad_iteration, tmp_path, capsys):
    many = tmp_path / "many"
    assert train(many, *SHORT, "--seeds", "0-2") == FAILED
    assert "2 of 3 runs stopped before their end, seed-1, iteration 37: " in capsys.readouterr().err
    assert train(tmp_path / "alone", *SHORT, "--seed", 0) == 0
    survivor, alone = last_of(many / "seed-0"), last_of(tmp_path / "alone")
    assert survivor.iteration == 60
    for name, weight in alone.parameters.items():
        assert torch.allclose(survivor.parameters[name], weight, atol=1e-5)
    assert last_of(many / "seed-2").iteration == BAD - 1
    assert command("--eval", "--load", many, "--eval-tasks", 2) == 0
    assert "not trained to the end, or not with finite numbers: seed-1, seed-2" in capsys.readouterr().err
    assert train(many, *SHORT, "--seeds", "0-2", "--resume", "--on-nan", "skip") == 0
    assert last_of(many / "seed-2").iteration == 60


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--inner-lr", 5, "-s", 5], r"the inner loop diverges in 4 of 4 tasks \(query loss of task"),
        # clipping does not hide it
        (["--loss", "{code}:large", "--inner-lr", 1e-30, "--grad-clip", 10], "the update are too large"),
    ],
)
def test_the_likely_cause_is_named(flags, cause, tmp_path, capsys):
    code = tmp_path / "losses.py"
    code.write_text("def large(outputs, y):\n    return 1e25 * ((outputs - y) ** 2).mean()\n")
    assert train(tmp_path / "run", *SHORT, *(str(flag).format(code=code) for flag in flags)) == FAILED
    assert re.search(cause, capsys.readouterr().err.splitlines()[-1])


def test_the_state_is_saved_before_the_cause_is_searched(bad_iteration, tmp_path, monkeypatch):
    monkeypatch.setattr("training.nonfinite.find_cause", lambda *_, **__: raise_error(RuntimeError()))
    assert train(tmp_path / "run", *SHORT, "--seed", 1) == FAILED
    assert last_of(tmp_path / "run").iteration == BAD - 1
