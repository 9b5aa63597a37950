"""Whole runs of every algorithm through the command line: trained, stopped, tested, compared."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from test_runs import assert_same_run, command, curves

import dataset
from commands import baselines, config
from commands.presets import ALGORITHMS
from common.random import minibatch_order, task_stream
from dataset import Sinusoid, SinusoidFrequency, SinusoidLine
from inner_loop import RATE
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


def test_baselines_take_tasks_as_the_run_does():
    saved = config.resolve({"vectorise": False, "compile": "off", "tasks_at_once": 3, "algorithm": "anil"})
    for algorithm in ("maml", "pretrain"):
        found = baselines.plain(saved, algorithm)
        assert (found.vectorise, found.tasks_at_once, found.fast_weights) == (False, 3, "all")


def test_checkpoints_with_the_old_name_of_first_order_load():
    for first_order, expected in ((True, "first-order"), (False, "exact")):
        plain = config.config_to_plain(config.resolve({}))
        old = {n: v for n, v in plain.items() if config.CONFIG_FLAGS[n].before is config.NOT_THERE}
        old.pop("meta_gradient")
        loaded = config.config_from_plain(old | {"first_order": first_order})
        assert (loaded.meta_gradient, loaded.algorithm, loaded.fast_weights) == (expected, "maml", "all")
        assert (loaded.loss, loaded.head_init, loaded.vectorise) == ("mse", "learned", True)
    head = {n: v for n, v in config.config_to_plain(config.resolve({})).items() if n != "fast_weights"}
    assert config.config_from_plain(head | {"adapt": "head"}).fast_weights == "head"


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


def test_a_reptile_checkpoint_is_tested_with_any_number_of_queries():
    saved = config.resolve({"algorithm": "reptile", "dataset": "omniglot"})
    assert (saved.train_shots, saved.training_shots) == (10, 9)
    tested = config.resolve_from(saved, {"queries": 15}, evaluate=True)
    assert (tested.shots, tested.queries) == (1, 15)
    assert baselines.plain(tested, "maml", testing=True).queries == 15
    large = config.resolve({"algorithm": "reptile", "dataset": "omniglot", "shots": 5, "queries": 12})
    assert (large.train_shots, large.training_shots) == (17, 5)


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


# ---- baselines ------------------------------------------------------------------------------


@pytest.fixture
def short_baselines(monkeypatch):
    monkeypatch.setattr(baselines, "VALIDATION_TASKS", 20)
    monkeypatch.setattr(baselines, "RATES", {"sgd": (0.01, 0.1), "adam": (0.001, 0.01)})


def test_baselines_stand_beside_a_checkpoint(tmp_path, capsys, short_baselines):
    options = [*SHORT, "--iterations", 700, "--log-every", 100, "--checkpoint-path", tmp_path]
    assert command(*options, "--run-name", "run", "--init", "torch") == 0
    line = ["--eval", "--baselines", "--load", tmp_path / "run" / LAST, "--eval-tasks", 50, "--eval-steps", 3]
    assert command(*line) == 0
    said = capsys.readouterr().out
    for name in ("maml", "scratch, sgd", "scratch, adam", "pretrained", "oracle"):
        assert name in said
    file = tmp_path / "run" / "last-test-sinusoid-4shot-10query-50tasks-baselines"
    assert file.with_suffix(".png").stat().st_size > 10_000
    record = json.loads(file.with_suffix(".json").read_text())
    steps = {name: len(method["per_step"]) for name, method in record["methods"].items()}
    assert steps == {"maml": 4, "scratch, sgd": 4, "scratch, adam": 4, "pretrained": 4, "oracle": 1}

    # from scratch, by hand: Adam from one initialisation on the first task of each iteration
    from learner import build_learner

    assert record["curves"]["maml"]["iteration"] == [300, 600]
    losses = []
    for iteration in range(1, 301):
        batch = Sinusoid(4, 10).sample("train", 0, iteration, range(1))
        network = build_learner("mlp", 1, init="torch", seed=0)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.001)
        for _ in range(10):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(network(batch.support_x[0]), batch.support_y[0]).backward()
            optimizer.step()
        loss = torch.nn.functional.mse_loss(network(batch.query_x[0]), batch.query_y[0])
        losses.append(loss.item())
    (scratch,) = [curve for name, curve in record["curves"].items() if name != "maml"]
    assert scratch["query_loss"][0] == pytest.approx(sum(losses) / 300, rel=1e-4)
    training = load_checkpoint(tmp_path / "run" / LAST).progress["training"]["query_loss"]
    assert record["curves"]["maml"]["query_loss"][0] == pytest.approx(sum(training[:3]) / 3, rel=1e-6)

    # again, with fewer shots: what is trained stays
    trained = (tmp_path / "run" / "baselines" / "oracle" / LAST).read_bytes()
    oracle = load_checkpoint(tmp_path / "run" / "baselines" / "oracle" / LAST)
    assert oracle.iteration == 700 and oracle.config.oracle and oracle.config.shots == 4
    assert command(*line, "-k", 2) == 0
    assert (tmp_path / "run" / "baselines" / "oracle" / LAST).read_bytes() == trained


def test_the_rate_of_a_baseline_is_the_best_on_validation_tasks(
    tmp_path, capsys, monkeypatch, short_baselines
):
    asked = []

    def fake(maml, parameters, distribution, split, *, tasks, steps, normalisations, world):
        asked.append((split, maml.optimizer.lr))
        loss = {("validation", 0.01): 1.0, ("validation", 0.1): math.nan}.get((split, maml.optimizer.lr), 2.0)
        values = torch.full((3, steps + 1), loss, dtype=torch.float64)
        return baselines.Evaluation(dict.fromkeys(normalisations, values), {})

    monkeypatch.setattr(baselines, "evaluate", fake)
    options = [*SHORT, "--dataset", "omniglot", "--learner", "fc", "--checkpoint-path", tmp_path]
    assert command(*options, "--run-name", "run") == 0
    saved = load_checkpoint(tmp_path / "run" / LAST).config
    call = config.check_invocation({})
    found = baselines.measured(saved, saved, call, baselines_runtime(), Path())
    assert [(b.name, b.how) for b in found] == [("scratch, sgd", "rate 0.01"), ("scratch, adam", "rate 0.01")]
    assert [a for a in asked if a[0] == "test"] == [("test", 0.01), ("test", 0.01)]


def baselines_runtime():
    from common.device import set_up

    return set_up(torch.device("cpu"), "float32", small_tensors=True)


def test_baselines_of_a_compiled_run_are_trained_where_there_is_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    given = config.parse([*map(str, SHORT), "--dataset", "harmonic", "--compile", "on"])
    saved, call = config.resolve(given), config.check_invocation({})
    baselines.trained(baselines.plain(saved, "pretrain"), call, tmp_path / "pretrained")
    found = load_checkpoint(tmp_path / "pretrained" / LAST)
    assert (found.config.dataset, found.config.compile, found.iteration) == ("harmonic", "off", ITERATIONS)
    before = (tmp_path / "pretrained" / LAST).read_bytes()
    baselines.trained(baselines.plain(saved, "pretrain"), call, tmp_path / "pretrained")
    assert (tmp_path / "pretrained" / LAST).read_bytes() == before


def test_a_stopped_baseline_goes_on(tmp_path, monkeypatch, capsys, short_baselines):
    options = [*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*options) == 0
    line = ["--eval", "--baselines", "--load", tmp_path / "run" / LAST, "--eval-tasks", 5]
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert command(*line) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "baselines" / "pretrained" / LAST).iteration == 5
    assert command(*line) == 0
    assert load_checkpoint(tmp_path / "run" / "baselines" / "pretrained" / LAST).iteration == ITERATIONS
    # a longer run has longer baselines; in another precision than the call's
    longer = ["--iterations", ITERATIONS + 3, "--log-every", 3, "--eval-steps", 4]
    assert command("--load", tmp_path / "run" / LAST, *longer) == 0
    assert command(*line, "--precision", "float64") == 0
    again = load_checkpoint(tmp_path / "run" / "baselines" / "pretrained" / LAST)
    assert again.iteration == ITERATIONS + 3
    assert all(w.dtype == torch.float32 for w in again.parameters.values())
    assert command(*options[:-1], "elsewhere", "--seed", 1) == 0
    (tmp_path / "elsewhere" / "baselines").mkdir()
    (tmp_path / "run" / "baselines" / "pretrained").rename(
        tmp_path / "elsewhere" / "baselines" / "pretrained"
    )
    line[3] = tmp_path / "elsewhere" / LAST
    assert command(*line) == 2
    assert "holds a run with other settings" in capsys.readouterr().err
