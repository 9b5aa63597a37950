"""Whole runs of every algorithm through the command line: trained, stopped, resumed exactly, evaluated."""

from dataclasses import replace

import pytest
import torch
from conftest import write_classes
from runs import assert_same_run, command, curves, stop_at

from commands.presets import PRESETS
from common.random import minibatch_order, task_stream
from maml import RATE
from training.checkpoint import load_checkpoint, save_checkpoints

SHORT = ["--iterations", 12, "--log-every", 2, "--val-every", 6, "--save-every", 100, "-k", 4, "--threads", 1]
SHORT += ["--meta-batch-size", 2]
RUNS: dict[str, list] = {
    "fomaml": ["-s", 2, "--inner-optimizer", "momentum", "-k", "1-6", "-q", "2-5"],
    "meta-sgd": ["--dataset", "sinusoid", "harmonic", "--mix", "1,3"],
    "anil": ["--inner-rates", "element", "--inner-clip", 1.0],
    "boil": ["--head", "2,4"],
    "reptile": ["--inner-batch", 3, "--eval-inner-batch", 2, "--inner-optimizer", "adam"],
    "maml++": ["--learner", "fc", "-n", 2, "-k", 1, "-q", 1, "--msl-iterations", 10],
    "imaml": ["-s", 3, "--cg-steps", 2],
    "cavia": ["--objective", "multi-step", "-s", 2],
    "r2d2": ["--ridge-lambda", 0.3],
    "protonet": ["--learner", "fc", "-n", 2, "-k", 1, "-q", 1, "--loss-args", "label_smoothing=0.2"],
    "pretrain": ["--oracle", "--eval-inner-batch", 3],
}


@pytest.fixture
def flags(tmp_path):
    """Return the command line of a short run of an algorithm; MAML++ and ProtoNet learn from images."""

    def flags_of(algorithm: str) -> list:
        line = ["--algorithm", algorithm, *SHORT, *RUNS.get(algorithm, []), "--checkpoint-path", tmp_path]
        if algorithm not in ("maml++", "protonet"):
            return line
        write_classes(tmp_path / "images", 12, 3)
        return [*line, "--dataset", f"images:{tmp_path / 'images'}", "--image-size", 8, "--channels", 1]

    return flags_of


@pytest.mark.parametrize("algorithm", PRESETS)
def test_every_algorithm_is_resumed_exactly_learns_and_is_evaluated(
    algorithm, flags, tmp_path, monkeypatch, capsys
):
    line = flags(algorithm)
    assert command(*line, "--run-name", "whole") == 0
    for iteration in (4, 6) if algorithm == "maml++" else (5,):  # half way, MAML++ becomes exact
        with monkeypatch.context() as patch:
            stop_at(iteration, patch)
            assert command(*line, "--run-name", "parts", "--resume") == 130
        early = load_checkpoint(tmp_path / "parts" / "last.pt")
        assert early.iteration == iteration
    assert command(*line, "--run-name", "parts", "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    saved = load_checkpoint(tmp_path / "whole" / "last.pt").parameters
    assert all(w.isfinite().all() for w in saved.values())
    assert any((w - early.parameters[name]).abs().max() > 1e-4 for name, w in saved.items())
    capsys.readouterr()
    assert command("--eval", "--load", tmp_path / "whole", "--eval-tasks", 5, "--eval-steps", 6) == 0
    output = capsys.readouterr().out
    assert "mean ± 95 % interval over 5 tasks" in output
    assert ("per-step" in output.partition("steps ")[2]) == (algorithm == "maml++")


def test_maml_plus_plus_learns_rates_and_keeps_statistics_of_each_step(flags, tmp_path, refuse):
    assert command(*flags("maml++"), "--run-name", "run") == 0
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    rates = {name: w for name, w in saved.parameters.items() if name.startswith(RATE)}
    assert rates and all(w.shape == (5,) and (w != 0.1).all() for w in rates.values())
    assert saved.parameters["2.bias"].shape == (5, 256) and len(saved.statistics) == 4
    for statistics in saved.statistics.values():
        mean, variance = statistics.unbind(1)
        # a tenth of the way in each of twelve iterations
        assert (mean != 0).any(1).all() and ((variance - 1).abs() > 1e-3).any(1).all()
        assert not torch.equal(mean[0], mean[1])
    assert set(curves(tmp_path / "run")) >= {f"weights/inner_lr/1.weight/step_{n}" for n in range(1, 6)}
    (tmp_path / "other").mkdir()
    for statistics in ({}, {name: s[:2] for name, s in saved.statistics.items()}):
        save_checkpoints({tmp_path / "other" / "last.pt": replace(saved, statistics=statistics)})
        for doing in ([], ["--eval", "--eval-tasks", 2]):
            line = refuse(*doing, "--load", tmp_path / "other" / "last.pt")
            assert "does not fit the learner fc" in line


def test_a_run_may_start_from_another_algorithms_weights(tmp_path):
    def start(algorithm: str, source: str | None, name: str, *flags: object) -> dict:
        source_flags = ["--init-from", tmp_path / source, "--meta-lr", 1e-12] if source else []
        line = ["--algorithm", algorithm, *source_flags, *flags, "--checkpoint-path", tmp_path]
        assert command(*SHORT, "--iterations", 2, *line, "--run-name", name) == 0
        return load_checkpoint(tmp_path / name / "last.pt").parameters

    rates = start("meta-sgd", None, "rates")
    plain, again = start("maml", "rates", "plain"), start("meta-sgd", "rates", "again")
    assert plain.keys() == {name for name in rates if not name.startswith(RATE)}
    for name, w in (*plain.items(), *again.items()):
        torch.testing.assert_close(w, rates[name], rtol=0, atol=1e-9)
    fresh = start("meta-sgd", "plain", "fresh", "--inner-lr", 0.2)
    assert torch.allclose(fresh[f"{RATE}0.weight"], torch.tensor(0.2))
    assert torch.allclose(fresh["0.weight"], rates["0.weight"], atol=1e-9)


def test_minibatches_pass_over_the_examples_in_new_orders():
    stream = task_stream("train", 3, 7, range(2), torch.device("cpu"))
    assert minibatch_order(stream, 6, None, 3) is None and minibatch_order(stream, 6, 6, 3) is None
    order = minibatch_order(stream, 6, 4, 5)
    assert order.shape == (2, 5, 4)
    passes = order.flatten(1)
    assert (passes[:, :18].view(2, 3, 6).sort(-1).values == torch.arange(6)).all()
    assert not torch.equal(passes[:, :6], passes[:, 6:12]) and not torch.equal(passes[0], passes[1])
