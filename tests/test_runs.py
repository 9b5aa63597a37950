"""Whole runs through the command line: train, stop, go on, evaluate, and look at TensorBoard."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.nn import functional as F

import dataset
import main
from commands import build as building
from commands import config
from common.errors import LostError
from dataset import Sinusoid, SinusoidLine
from learner import build_learner
from training import trainer
from training.checkpoint import BEST, LAST, initialisation_of, load_checkpoint, save_checkpoint

# Points of the curves, validations and savings that fall together in all ways.
ITERATIONS = 240
SCHEDULE = ["--iterations", str(ITERATIONS), "--log-every", "7", "--val-every", "50", "--save-every", "20"]
SETTINGS = ["--meta-batch-size", "4", "-k", "5", "--grad-clip", "10", "--seed", "3"]


def command(*arguments: object) -> int:
    return main.main([str(a) for a in arguments])


def start(*arguments: object) -> subprocess.Popen:
    """The command line as a process of its own, in a group, so that it can be killed."""
    line = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.002)


def curves(folder: Path) -> dict[str, list[int]]:
    """The steps of each scalar curve, as TensorBoard's own reader sees them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


TRAINING_CURVES = (
    "train/query_loss",
    "train/meta_gradient_norm",
    "optimizer/meta_lr",
    "speed/iterations_per_second",
)
EXPECTED_CURVES = {tag: list(range(7, ITERATIONS + 1, 7)) for tag in TRAINING_CURVES} | {
    tag: [50, 100, 150, 200, 240]
    for tag in (
        "validation/query_loss",
        "validation/best_query_loss",
        "validation/diverged_tasks",
        "validation_by_step/query_loss/0",
        "validation_by_step/query_loss/1",
    )
}


def assert_same_bits(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    for name in (LAST, BEST):
        assert_same_bits(vars(load_checkpoint(a / name)), vars(load_checkpoint(b / name)), name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: `whole` has never been interrupted; `killed` has, without warning, and went on."""
    folder = tmp_path_factory.mktemp("runs")
    options = [*SETTINGS, *SCHEDULE, "--checkpoint-path", folder]
    assert command(*options, "--run-name", "whole") == 0
    killed = start(*options, "--run-name", "killed", "--resume")
    wait_for(folder / "killed" / LAST, killed)
    time.sleep(0.05)  # some iterations past the checkpoint: their points must not appear twice
    killed.kill()
    killed.wait()
    assert load_checkpoint(folder / "killed" / LAST).iteration < ITERATIONS
    assert command(*options, "--run-name", "killed", "--resume") == 0
    return folder


# ---- going on -------------------------------------------------------------------------------


def test_a_killed_and_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(runs):
    assert_same_run(runs / "whole", runs / "killed")
    assert load_checkpoint(runs / "whole" / LAST).iteration == ITERATIONS


def test_the_curves_of_both_have_neither_gaps_nor_doubled_points(runs):
    assert len(list((runs / "killed").glob("events*"))) == 2
    assert curves(runs / "whole") == curves(runs / "killed") == EXPECTED_CURVES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_the_run_goes_on_from_there(number, runs, tmp_path):
    process = start(*SETTINGS, *SCHEDULE, "--checkpoint-path", tmp_path, "--run-name", "stopped")
    wait_for(tmp_path / "stopped" / LAST, process)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    last = tmp_path / "stopped" / LAST
    iteration = load_checkpoint(last).iteration
    assert 20 <= iteration < ITERATIONS
    assert f"Saved at iteration {iteration:,}. Go on: python main.py --load {last}" in said
    assert "Traceback" not in said
    assert command("--load", last) == 0
    assert_same_run(runs / "whole", tmp_path / "stopped")
    assert curves(tmp_path / "stopped") == EXPECTED_CURVES


def test_where_another_process_is_lost_in_a_validation_that_is_made_up_for(runs, tmp_path, monkeypatch):
    options = [*SETTINGS, *SCHEDULE, "--checkpoint-path", tmp_path, "--run-name", "lost", "--resume"]

    def lost(*_, **__):
        raise LostError("gone")

    def ended(code):
        raise SystemExit(code)

    with monkeypatch.context() as patch:
        whole = trainer.evaluate
        calls = iter([whole, lost])
        patch.setattr("training.trainer.evaluate", lambda *a, **k: next(calls)(*a, **k))
        patch.setattr("main.os._exit", ended)
        with pytest.raises(SystemExit) as ending:
            command(*options)
    assert ending.value.code == 3
    assert load_checkpoint(tmp_path / "lost" / LAST).iteration == 100
    assert command(*options) == 0
    assert_same_run(runs / "whole", tmp_path / "lost")
    assert curves(tmp_path / "lost") == EXPECTED_CURVES


def test_a_finished_run_can_be_made_longer(runs, tmp_path, capsys):
    short, whole = tmp_path / "short", runs / "whole"
    options = [*SETTINGS, *SCHEDULE, "--checkpoint-path", tmp_path, "--run-name", "short"]
    assert command(*options, "--iterations", 100) == 0  # the last --iterations counts
    assert command("--load", short / LAST) == 0
    assert "is at iteration 100: a larger --iterations" in capsys.readouterr().out
    assert command("--load", short / LAST, "--iterations", ITERATIONS) == 0
    assert_same_run(short, whole)


def test_a_new_run_can_begin_with_a_checkpoints_weights(runs, tmp_path):
    source = runs / "whole" / LAST
    options = ["--checkpoint-path", tmp_path, "--run-name", "new", "--iterations", 1]
    assert command("--init-from", source, "--dataset", "harmonic", "--meta-lr", 1e-9, *options) == 0
    old, new = (load_checkpoint(file) for file in (source, tmp_path / "new" / LAST))
    assert new.config.dataset == "harmonic" and new.iteration == 1
    assert new.progress["origin"] == f"{source}, iteration {ITERATIONS}"
    for name, weights in old.parameters.items():
        assert torch.allclose(weights, new.parameters[name], rtol=0, atol=1e-8)


def test_a_run_is_never_overwritten(runs, tmp_path, capsys):
    before = (runs / "whole" / LAST).read_bytes()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    refusals = [
        (["--checkpoint-path", runs, "--run-name", "whole"], "exists: go on with --resume"),
        (["--checkpoint-path", tmp_path, "--run-name", "foreign"], "is not empty"),
        (["--checkpoint-path", runs, "--run-name", "whole", "--resume", "-k", 7], "-k 7 disagrees"),
        (["--load", runs / "whole" / LAST, "--seed", 4], "--seed 4 disagrees"),
        (["--load", runs / "whole" / LAST, "--checkpoint-path", tmp_path], "leave that out"),
        (
            ["--eval", "--load", runs / "whole" / LAST, "--dataset", "harmonic"],
            "--dataset harmonic disagrees",
        ),
        (["--init-from", runs / "whole" / LAST, "--dataset", "omniglot", "--learner", "fc"], "does not fit"),
    ]
    for arguments, message in refusals:
        if "omniglot" in arguments and "MAML_DATA_ROOT" not in os.environ:
            continue  # the learner is compared after the data is read
        assert command(*arguments) == 2
        assert message in capsys.readouterr().err
    assert (runs / "whole" / LAST).read_bytes() == before


def test_best_is_the_best_validation_and_not_the_last(tmp_path, capsys):
    wild = ["--meta-lr", 0.5, "--meta-batch-size", 2, "--iterations", 60, "--val-every", 5]
    folder = tmp_path / "wild"
    assert command(*wild, "--checkpoint-path", tmp_path, "--run-name", "wild") == 0
    best, last = (load_checkpoint(folder / name) for name in (BEST, LAST))
    losses = last.progress["validation"]["query_loss"]
    assert len(losses) == 12 and losses[-1] > min(losses)
    assert best.iteration == last.progress["best_iteration"] == 5 * (1 + losses.index(min(losses)))
    assert last.progress["best_score"] == -min(losses)
    assert command("--load", folder / BEST, "--iterations", 70) == 2  # it would overwrite last.pt
    assert "last.pt is ahead" in capsys.readouterr().err


def test_a_runs_folder_stands_for_its_best_checkpoint_when_measured_and_its_last_when_going_on(
    runs, tmp_path, capsys
):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (BEST, LAST):
        (folder / name).write_bytes((runs / "whole" / name).read_bytes())
    assert command("--eval", "--load", folder, "--eval-tasks", 2) == 0
    assert f"Evaluating {folder / BEST}, " in capsys.readouterr().out
    assert command("--load", folder, "--iterations", ITERATIONS + 1) == 0
    assert f"Going on from iteration {ITERATIONS}" in capsys.readouterr().out


def test_an_initialisation_alone_is_measured_and_begun_from_but_no_run_goes_on_with_it(
    runs, tmp_path, capsys
):
    whole = load_checkpoint(runs / "whole" / BEST)
    folder = tmp_path / "small"
    folder.mkdir()
    save_checkpoint(folder / BEST, initialisation_of(whole))
    measured = []
    for file in (folder / BEST, runs / "whole" / BEST):
        assert command("--eval", "--load", file, "--eval-tasks", 5, "--out", tmp_path) == 0
        measured.append(capsys.readouterr().out.partition("Mean and")[0].partition("steps")[2])
    assert measured[0] == measured[1] != ""
    new = ["--checkpoint-path", tmp_path, "--run-name", "new", "--iterations", 1]
    assert command(*SETTINGS, "--init-from", folder, *new) == 0
    capsys.readouterr()
    assert command("--load", folder) == 2
    assert "without the optimizer's state: begin a run from them with --init-from" in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == [BEST]


def test_a_run_that_has_only_its_best_checkpoint_goes_on_from_there(runs, tmp_path):
    options = [*SETTINGS, *SCHEDULE, "--checkpoint-path", tmp_path, "--run-name", "run", "--resume"]
    (tmp_path / "run").mkdir()
    content = (runs / "whole" / BEST).read_bytes()
    (tmp_path / "run" / BEST).write_bytes(content)
    assert command(*options, "--seed", 4) == 2  # another run's
    assert (tmp_path / "run" / BEST).read_bytes() == content
    if load_checkpoint(runs / "whole" / BEST).iteration < ITERATIONS:
        assert command(*options) == 0
        assert_same_run(runs / "whole", tmp_path / "run")


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_results(runs, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / BEST).write_bytes((runs / "whole" / LAST).read_bytes())
    options = ["--checkpoint-path", tmp_path, "--run-name", "run", "--resume"]
    assert command(*options, "--init-from", runs / "whole" / LAST) == 2  # it did not begin there
    assert command(*options) == 0
    assert (tmp_path / "run" / "training.json").exists() and (tmp_path / "run" / LAST).exists()
    capsys.readouterr()
    assert command(*options) == 0
    assert f"is at iteration {ITERATIONS}" in capsys.readouterr().out


def test_the_results_of_an_earlier_stop_are_not_taken_for_those_of_the_end(runs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LAST).write_bytes((runs / "whole" / LAST).read_bytes())
    (tmp_path / "run" / "training.json").write_text(json.dumps({"iteration": 20}))
    assert command("--checkpoint-path", tmp_path, "--run-name", "run", "--resume") == 0
    written, expected = ((f / "training.json").read_text() for f in (tmp_path / "run", runs / "whole"))
    assert written == expected


def test_foreign_event_files_are_left_as_they_are(tmp_path):
    from training.tensorboard import RunLog

    foreign = tmp_path / "events.out.tfevents.notes"
    foreign.write_bytes(b"not an event file at all, but somebody's")
    (tmp_path / "events.out.tfevents.folder").mkdir()
    for begin_at in (0, 5):
        log = RunLog(tmp_path, begin_at=begin_at)
        log.scalars({"loss": 1.0}, begin_at)
        log.flush()
    assert foreign.read_bytes() == b"not an event file at all, but somebody's"
    assert not list(tmp_path.glob(".*"))


def test_a_killed_runs_points_are_dropped_even_where_the_schedule_changes(tmp_path):
    from training.tensorboard import RunLog

    for begin_at, points in ((0, range(3, 31, 3)), (11, (20, 40))):
        log = RunLog(tmp_path, begin_at=begin_at)
        for iteration in points:
            log.scalars({"loss": 1.0}, iteration)
        log.flush()
    first, second = sorted(tmp_path.glob("events*"))
    with first.open("ab") as file:
        file.write(b"half a record")
    for path in (first, second):  # each by itself: nothing is left to a reader's own clean-up
        assert (
            curves_of_file(path, tmp_path / path.name.split(".")[3])
            == {
                first: [3, 6, 9],
                second: [20, 40],
            }[path]
        )


def curves_of_file(path: Path, folder: Path) -> list[int]:
    folder.mkdir()
    (folder / path.name).write_bytes(path.read_bytes())
    return curves(folder)["loss"]


# ---- what training does ---------------------------------------------------------------------


def test_training_is_adam_on_the_meta_gradient_with_the_element_clipped(tmp_path):
    """Three iterations again, by hand and in a plain loop."""
    options = ["--iterations", 3, "--meta-batch-size", 2, "--precision", "float64", "--grad-clip", 0.01]
    assert command(*options, "--checkpoint-path", tmp_path, "--run-name", "run", "--log-every", 1) == 0
    network = build_learner("mlp", 1, init="paper", seed=0).double()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for iteration in (1, 2, 3):
        batch = Sinusoid(10, 10, dtype=torch.float64).sample("train", 0, iteration, range(2))
        total = 0.0
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            weights = dict(network.named_parameters())
            loss = F.mse_loss(torch.func.functional_call(network, weights, (support_x,)), support_y)
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: w - 0.01 * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
            total += F.mse_loss(torch.func.functional_call(network, weights, (query_x,)), query_y) / 2
        optimizer.zero_grad()
        total.backward()
        assert any(p.grad.abs().max() > 0.01 for p in network.parameters())  # there is something to clip
        torch.nn.utils.clip_grad_value_(network.parameters(), 0.01)
        optimizer.step()
        losses.append(total.item())
    saved = load_checkpoint(tmp_path / "run" / LAST)
    for name, weights in network.named_parameters():
        assert torch.allclose(weights, saved.parameters[name], rtol=0, atol=1e-12), name
    assert saved.progress["training"]["query_loss"] == pytest.approx(losses, rel=1e-6)
    assert saved.config.precision == "float64"


def test_the_flags_of_the_inner_loop_reach_it(tmp_path):
    """One iteration with none of the defaults, against a plain loop."""
    options = ["--iterations", 1, "--meta-batch-size", 2, "--precision", "float64", "-k", 4, "-q", 6, "-s", 3]
    options += ["--inner-lr", 0.05, "--first-order", "--noise", 0.3, "--init", "torch", "--seed", 5]
    options += ["--dataset", "sinusoid-line", "--tasks-at-once", 1]
    assert command(*options, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    network = build_learner("mlp", 1, init="torch", seed=5).double()
    batch = SinusoidLine(4, 6, noise=0.3, dtype=torch.float64).sample("train", 5, 1, range(2))
    gradients = [torch.zeros_like(p) for p in network.parameters()]
    for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
        adapted = copy.deepcopy(network)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(adapted(support_x), support_y).backward()
            optimizer.step()
        loss = F.mse_loss(adapted(query_x), query_y)
        for total, part in zip(gradients, torch.autograd.grad(loss, adapted.parameters()), strict=True):
            total += part / 2
    state = load_checkpoint(tmp_path / "run" / LAST).optimizer["state"]
    for entry, gradient in zip(state.values(), gradients, strict=True):
        assert torch.allclose(entry["exp_avg"] / 0.1, gradient, rtol=1e-9, atol=1e-12)


def test_the_flags_of_batch_norm_and_omniglot_reach_them(monkeypatch):
    asked = {}
    images = torch.zeros(1623, 20, 28, 28, dtype=torch.uint8)

    def fake_omniglot(root, **options):
        asked.update(options, root=root)
        return images, {"train": torch.arange(1100)}

    monkeypatch.setattr(dataset, "load_omniglot", fake_omniglot)
    line = "--dataset omniglot -n 7 -k 2 -q 3 --batch-norm inductive --adapt-norm --resize nearest"
    given = config.parse([*line.split(), "--omniglot-split", "alphabet", "--data-root", "there"])
    settings, call = config.resolve(given), config.check_invocation(given)
    distribution, maml = building.build(settings, call, building.prepare(settings, call))
    assert asked == {"split": "alphabet", "resize": "nearest", "root": Path("there")}
    assert (distribution.ways, distribution.shots, distribution.queries) == (7, 2, 3)
    assert maml.normalisation == "inductive" and not maml.not_adapted
    given = config.parse(["--dataset", "omniglot"])
    settings = config.resolve(given)
    _, maml = building.build(settings, call, building.prepare(settings, call))
    assert maml.normalisation == "transductive" and len(maml.not_adapted) == 4
    assert maml.optimizer.lr == 2.0 and not maml.first_order


def test_gradient_norm_is_clipped(tmp_path):
    """Adam hardly sees the gradient's scale: compare its first moment, (1 - beta1) times the gradient."""
    options = ["--iterations", 1, "--grad-clip-norm", 0.5, "--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*options) == 0
    state = load_checkpoint(tmp_path / "run" / LAST).optimizer["state"]
    norm = torch.cat([s["exp_avg"].flatten() for s in state.values()]).norm() / 0.1
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


def test_a_short_run_has_a_curve(tmp_path):
    assert command("--iterations", 3, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    assert curves(tmp_path / "run")["train/query_loss"] == [3]
    assert (tmp_path / "run" / "training.png").exists()
    assert load_checkpoint(tmp_path / "run" / LAST).config.log_every == 100


def test_meta_training_learns(tmp_path):
    options = ["--iterations", 600, "--init", "torch", "--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*options) == 0
    result = json.loads((tmp_path / "run" / "training.json").read_text())
    loss = result["training"]["query_loss"]
    assert loss[-1] < 0.6 * loss[0]
    final = result["final_training_loss"]
    assert (final["from"], final["to"]) == (101, 600)
    assert final["mean"] == pytest.approx(sum(loss[1:]) / 5, rel=1e-5)
    for picture in ("training.png", "examples.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")


# ---- evaluation -----------------------------------------------------------------------------


def test_evaluation_of_a_checkpoint_needs_no_other_flag_and_measures_what_a_plain_loop_does(
    runs, tmp_path, capsys
):
    checkpoint = runs / "whole" / BEST
    assert (
        command("--eval", "--load", checkpoint, "--eval-tasks", 20, "--eval-steps", 3, "--out", tmp_path) == 0
    )
    table = capsys.readouterr().out
    assert "20 test tasks" in table and "95 % interval" in table
    record = json.loads((tmp_path / "whole-best-test-sinusoid-5shot-10query-20tasks.json").read_text())
    assert (
        (tmp_path / "whole-best-test-sinusoid-5shot-10query-20tasks.png").read_bytes().startswith(b"\x89PNG")
    )

    network = build_learner("mlp", 1)
    parameters = load_checkpoint(checkpoint).parameters
    batch = Sinusoid(5, 10).sample("test", 0, 0, range(20))
    losses = torch.zeros(20, 4, dtype=torch.float64)
    for task, (support_x, support_y, query_x, query_y) in enumerate(zip(*batch, strict=True)):
        network.load_state_dict(parameters)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        for step in range(4):
            losses[task, step] = F.mse_loss(network(query_x), query_y).item()
            optimizer.zero_grad()
            F.mse_loss(network(support_x), support_y).backward()
            optimizer.step()
    measured = torch.tensor(record["per_task"]["loss"]["transductive"], dtype=torch.float64)
    assert torch.allclose(measured, losses, rtol=1e-4)
    for step, row in enumerate(record["per_step"]):
        values = losses[:, step]
        assert row["steps"] == step and row["loss"] == pytest.approx(values.mean().item(), rel=1e-4)
        assert row["loss_interval_95"] == pytest.approx(1.96 * values.std().item() / 20**0.5, rel=1e-4)
    assert record["settings"]["shots"] == 5 and record["tasks"] == 20 and record["split"] == "test"
    assert record["versions"]["torch"] == torch.__version__ and "--eval-tasks 20" in record["command"]


def test_evaluation_is_repeatable_and_takes_other_shots(runs, tmp_path):
    results = []
    for name, extra in (("a", []), ("b", ["--tasks-at-once", 7]), ("c", ["-k", 8, "-q", 3])):
        options = ["--eval-tasks", 30, "--eval-steps", 2, "--out", tmp_path / name, *extra]
        assert command("--eval", "--load", runs / "killed" / BEST, *options) == 0
        (file,) = (tmp_path / name).glob("*.json")
        results.append(json.loads(file.read_text())["per_task"]["loss"]["transductive"])
    assert torch.allclose(torch.tensor(results[0]), torch.tensor(results[1]), rtol=1e-4)
    assert file.name == "killed-best-test-sinusoid-8shot-3query-30tasks.json"
    assert results[2] != results[0]


def test_evaluation_without_a_checkpoint_says_that_it_is_of_the_fresh_initialisation(tmp_path, capsys):
    assert command("--eval", "--eval-tasks", 5, "--out", tmp_path) == 0
    assert "the fresh initialisation" in capsys.readouterr().out
    assert (tmp_path / "fresh-mlp-paper-seed0-test-sinusoid-10shot-10query-5tasks.json").exists()


# ---- Omniglot -------------------------------------------------------------------------------


def test_omniglot_from_training_to_both_accuracies(omniglot_root, tmp_path, capsys):
    options = ["--data-root", omniglot_root, "--checkpoint-path", tmp_path, "--run-name", "run"]
    training = ["--meta-batch-size", 8, "--init", "torch", "--iterations", 40, "--val-every", 20]
    assert command("--dataset", "omniglot", "-n", 3, *training, *options) == 0
    curve = curves(tmp_path / "run")
    assert curve["train/query_accuracy"] == [10, 20, 30, 40]
    assert curve["validation/query_accuracy"] == [20, 40]
    measure = ["--eval-tasks", 50, "--eval-steps", 3, "-q", 5, "--data-root", omniglot_root]
    assert command("--eval", "--load", tmp_path / "run" / BEST, *measure) == 0
    said = capsys.readouterr().out
    assert "transductive" in said and "inductive" in said and "accuracy %" in said
    record = json.loads((tmp_path / "run" / "best-test-omniglot-3way-1shot-5query-50tasks.json").read_text())
    accuracies = {
        name: torch.tensor(values).mean(0) for name, values in record["per_task"]["accuracy"].items()
    }
    assert accuracies.keys() == {"transductive", "inductive"}
    for values in accuracies.values():
        assert abs(values[0] - 1 / 3) < 0.1 and values[3] > 0.45  # chance before, learnt after
    assert not torch.equal(*accuracies.values())
    assert command("--eval", "--load", tmp_path / "run" / BEST, "-k", 16, "-q", 5) == 2
    assert "-k 16 plus -q 5 is 21" in capsys.readouterr().err


# ---- TensorBoard ----------------------------------------------------------------------------


def get(url: str) -> object:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


@pytest.fixture
def tensorboard(runs):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}/data"
    server.terminate()
    server.wait(timeout=30)


def test_tensorboard_serves_the_run(tensorboard):
    limit = time.monotonic() + 120
    scalars: dict = {}
    while time.monotonic() < limit and len(scalars) < 2:
        time.sleep(0.5)
        try:
            scalars = get(f"{tensorboard}/plugin/scalars/tags")
        except OSError:
            continue
    assert {run: set(tags) for run, tags in scalars.items()} == {
        run: set(EXPECTED_CURVES) for run in ("whole", "killed")
    }
    for tag, steps in EXPECTED_CURVES.items():
        points = get(f"{tensorboard}/plugin/scalars/scalars?run=killed&tag={tag}")
        assert [point[1] for point in points] == steps, tag
    assert get(f"{tensorboard}/plugin/images/tags")["killed"].keys() == {
        "examples",
        "training",
    }
    text = get(f"{tensorboard}/plugin/text/tags")
    assert text["whole"] == ["settings/text_summary"]
    (settings,) = get(f"{tensorboard}/plugin/text/text?run=whole&tag=settings/text_summary")
    assert "meta_batch_size" in settings["text"]
