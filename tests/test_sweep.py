"""--seeds and --sweep: each run is the run alone; in groups, stopped, resumed, joined and refused."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_classes
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_same_run, command, curves, stop_at, train

from commands.call import Call
from commands.members import extract_setting, list_members, parse_seeds
from training import trainer
from training.checkpoint import load_checkpoint
from training.folders import BEST, LAST

SHORT = ["--precision", "float64", "--iterations", 8, "--log-every", 3, "--val-every", 4, "--save-every", 50]
SHORT += ["--meta-batch-size", 2, "-k", 3, "-q", 4, "--compile", "off", "--threads", 1]
CLOSE = {"rtol": 1e-8, "atol": 1e-8, "equal_nan": True}  # in float64

LEARNERS = """
from torch import nn

def dropping(outputs):
    return nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, outputs))

def frozen(outputs):
    first = nn.Linear(1, 12)  # its random weights depend on the seed
    first.requires_grad_(False)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(12, outputs))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return a folder with learners and images."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "learners.py").write_text(LEARNERS)
    write_classes(folder / "images", 12, 3)
    return folder


def assert_same_to_rounding(a: Path, b: Path) -> None:
    """Compare settings exactly, and weights, moments, statistics and curves to rounding."""
    for name in (LAST, BEST):
        one, other = (load_checkpoint(folder / name) for folder in (a, b))
        for part in ("parameters", "exp_avg", "exp_avg_sq", "statistics", "fixed"):
            torch.testing.assert_close(getattr(one, part), getattr(other, part), **CLOSE)
        for part in ("training", "validation"):
            torch.testing.assert_close(one.progress[part], other.progress[part], **CLOSE)
        assert (one.settings, one.iteration) == (other.settings, other.iteration)
        assert one.progress["best_iteration"] == other.progress["best_iteration"]


def assert_each_is_the_run_alone(home: Path, flags: list, many: list, alone: dict[str, list]) -> Path:
    folder = train(home / "many", *flags, *many)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == alone.keys()
    for name, single in alone.items():
        assert_same_to_rounding(folder / name, train(home / f"alone-{name}", *flags, *single))
    first, *others = (load_checkpoint(folder / name / LAST).parameters for name in alone)
    assert all(any(not torch.equal(w, other[name]) for name, w in first.items()) for other in others)
    return folder


def seed_flags(*seeds: int) -> dict[str, list]:
    return {f"seed-{seed}": ["--seed", seed] for seed in seeds}


# ---- each is the run alone -----------------------------------------------------------------------


def test_each_seed_is_the_run_alone_with_its_curves_and_results(tmp_path, capsys):
    seeds = (0, 3, 2**63 - 1)
    many = ["--seeds", f"0,3,{seeds[2]}", "--runs-at-once", 2]
    folder = assert_each_is_the_run_alone(tmp_path, SHORT, many, seed_flags(*seeds))
    output = capsys.readouterr().out
    assert "3 runs in" in output and "trained at once: 2, 1\n" in output
    assert f"python main.py --eval --load {folder}" in output
    for name in seed_flags(*seeds):
        alone = tmp_path / f"alone-{name}"
        assert curves(folder / name) == curves(alone)
        one, other = (json.loads((f / "training.json").read_text()) for f in (folder / name, alone))
        assert one.keys() == other.keys() and one["validation"] == other["validation"]


SWEEPS = [  # the flags swept, and others
    ("inner-lr=0.001,0.02 meta-lr=0.001,0.005", ""),
    ("grad-clip=0.01,0.001", ""),
    ("grad-clip-norm=0.3,0.01", "--grad-clip 0.1"),
    ("meta-lr-final=0.0001,0.0", "--meta-lr-schedule cosine"),
    ("inner-lr=0.001,0.05", "--inner-rates element"),  # initial values of learned rates
]


@pytest.mark.parametrize(("swept", "others"), SWEEPS)
def test_each_of_a_sweep_of_numbers_is_the_run_alone_and_all_are_trained_at_once(
    swept, others, tmp_path, capsys
):
    flags = [*SHORT, *others.split(), "--meta-optimizer", "sgd"]  # sensitive to scale
    alone: dict[str, list] = {"": []}
    for name, values in (axis.split("=") for axis in swept.split()):
        alone = {
            f"{run}{name}-{value}_": [*single, f"--{name}", value]
            for run, single in alone.items()
            for value in values.split(",")
        }
    alone = {f"{run}seed-0": single for run, single in alone.items()}
    folder = assert_each_is_the_run_alone(tmp_path, flags, ["--sweep", *swept.split()], alone)
    assert f"trained at once: {len(alone)}\n" in capsys.readouterr().out
    record = json.loads((folder / "summary.json").read_text())
    assert [run["name"] for run in record["runs"]] == list(alone)


SLOW = pytest.mark.slow
IMAGES = ["-n", 2, "-k", 1, "-q", 1, "--image-size", 8, "--channels", 1, "--learner", "fc", "--iterations", 4]
CHOICES = {
    "images, maml++": [*IMAGES, "--algorithm", "maml++", "-s", 2, "--exact-from", 2, "--msl-iterations", 3],
    "images, adjoint in chunks": [*IMAGES, "-s", 2, "--engine", "adjoint", "--tasks-at-once", 1],
    "minibatches, noise": ["-s", 3, "--inner-batch", 2, "--dataset", "harmonic", "--noise", 0.2],
    "dropout": ["-s", 2, "--learner", "{learners}:dropping"],
    "images, conv": [*IMAGES, "--learner", "conv"],
    "images, prototypes": [*IMAGES, "--head-init", "prototype"],
    "images, protonet": [*IMAGES, "--algorithm", "protonet"],
    "ridge alone": ["--algorithm", "r2d2"],
    "tasks of different sizes": ["-s", 2, "-k", "1-5", "-q", "1-4"],
    **{f"algorithm {name}": ["--algorithm", name, "-s", 2] for name in ("reptile", "cavia", "r2d2", "imaml")},
}
SLOW_CHOICES = ("images, conv", "images, prototypes", "algorithm imaml")


@pytest.mark.parametrize("choice", [pytest.param(c, marks=[SLOW] * (c in SLOW_CHOICES)) for c in CHOICES])
def test_each_seed_is_the_run_alone_with_other_choices(choice, data, tmp_path, capsys):
    flags = [str(flag).format(learners=data / "learners.py") for flag in [*SHORT, *CHOICES[choice]]]
    if choice.startswith("images"):
        flags += ["--dataset", f"images:{data / 'images'}"]
    assert_each_is_the_run_alone(tmp_path, flags, ["--seeds", "1,4"], seed_flags(1, 4))
    assert "trained at once: 2\n" in capsys.readouterr().out


@SLOW
def test_compiled_runs_are_the_runs_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("training.compiler.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(trainer, "UNCOMPILED", {False: 3, True: 3})
    line = ["--compile", "on", "--seeds", "0,1", "--sweep", "inner-lr=0.01,0.02", "--iterations", 40]
    folder = train(tmp_path / "many", *SHORT, *line)
    output = capsys.readouterr()
    assert "trained at once: 4\n" in output.out and "Compiled in" in output.err
    for seed, rate in ((0, 0.01), (1, 0.02)):
        single = ["--inner-lr", rate, "--seed", seed, "--iterations", 40, "--compile", "on"]
        alone = train(tmp_path / f"alone-{seed}", *SHORT, *single)
        assert_same_to_rounding(folder / f"inner-lr-{rate}_seed-{seed}", alone)


# ---- in groups -----------------------------------------------------------------------------------


def test_runs_that_differ_in_more_than_numbers_are_trained_in_groups(tmp_path, capsys):
    swept = ["--sweep", "s=1,2", "oracle=yes,no", "--seeds", "2,3"]
    folder = train(tmp_path / "many", *SHORT, *swept)
    assert "trained at once: 2, 2, 2, 2\n" in capsys.readouterr().out
    alone = {"s-2_oracle-no_seed-3": "-s 2 --seed 3", "s-1_oracle-yes_seed-2": "--oracle --seed 2"}
    for name, flags in alone.items():
        assert_same_to_rounding(folder / name, train(tmp_path / name, *SHORT, *flags.split()))


def test_runs_whose_curves_have_other_points_are_trained_one_by_one(tmp_path, capsys):
    line = ["--meta-batch-size", 3, "--val-tasks", 6, "--checkpoint-path", tmp_path, "--resume", "--run-name"]
    for seeds, log_every, iterations in (("0", 5, 10), ("0,1", 7, 10), ("0,1", 7, 21)):
        flags = ["--seeds", seeds, "--log-every", log_every, "--iterations", iterations]
        assert command(*line, "runs", *flags) == 0
    assert "trained at once: 1, 1\n" in capsys.readouterr().out
    assert command(*line, "alone", "--seed", 1, "--log-every", 7, "--iterations", 10) == 0
    assert command(*line, "alone", "--seed", 1, "--log-every", 7, "--iterations", 21) == 0
    assert_same_to_rounding(tmp_path / "runs" / "seed-1", tmp_path / "alone")


def test_runs_with_different_frozen_weights_are_trained_one_by_one(data, tmp_path, capsys):
    flags = [*SHORT, "--learner", f"{data / 'learners.py'}:frozen"]
    folder = assert_each_is_the_run_alone(tmp_path, flags, ["--seeds", "0-1"], seed_flags(0, 1))
    assert "trained at once: 1, 1\n" in capsys.readouterr().out
    first, second = (load_checkpoint(folder / name / LAST).fixed["0.weight"] for name in seed_flags(0, 1))
    assert not torch.equal(first, second)


def test_only_compiled_runs_on_images_are_trained_one_by_one(data, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(trainer.Trainer, "train", lambda self: sizes.append(len(self.runs)) or 130)
    flags = [*SHORT, *IMAGES, "--dataset", f"images:{data / 'images'}", "--seeds", "0-1"]
    for compiled in ("on", "off"):
        line = ["--checkpoint-path", tmp_path, "--run-name", compiled, "--compile", compiled]
        assert command(*flags, *line) == 130
    assert sizes == [1, 2]


# ---- stopped, resumed, joined --------------------------------------------------------------------


def test_stopped_groups_are_resumed_to_the_same_bits(tmp_path, monkeypatch, capsys):
    flags = [*SHORT, "--sweep", "s=1,2", "--seeds", "0-1"]
    whole, parts = train(tmp_path / "whole", *flags), tmp_path / "parts"
    stopped = [*flags, "--checkpoint-path", tmp_path, "--run-name", "parts", "--resume"]
    for iteration in (3, 5):
        with monkeypatch.context() as patch:
            stop_at(iteration, patch)
            assert command(*stopped) == 130
        assert "--run-name parts --resume" in capsys.readouterr().out
        assert load_checkpoint(parts / "s-1_seed-0" / LAST).iteration == iteration
        assert not (parts / "summary.json").exists() and not (parts / "s-2_seed-0" / LAST).exists()
    assert command(*stopped) == 0
    for folder in (path for path in whole.iterdir() if path.is_dir()):
        assert_same_run(folder, parts / folder.name)
    assert (whole / "summary.json").read_bytes() == (parts / "summary.json").read_bytes()


def test_finished_runs_stay_and_others_join_them(tmp_path, capsys, pictures):
    folder = train(tmp_path / "many", *SHORT, "--seeds", "0-1")
    content = {name: (folder / name / LAST).read_bytes() for name in seed_flags(0, 1)}
    capsys.readouterr()
    train(folder, *SHORT, "--seeds", "0-1", "--resume")
    assert "trained at once: none, all are finished\n" in capsys.readouterr().out
    train(folder, *SHORT, "--seeds", "0-2", "--resume")
    assert "trained at once: 1\n" in capsys.readouterr().out
    assert content == {name: (folder / name / LAST).read_bytes() for name in content}
    assert_same_to_rounding(folder / "seed-2", train(tmp_path / "alone", *SHORT, "--seed", 2))
    record = json.loads((folder / "summary.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [0, 1, 2]
    assert record["settings"]["all"]["best_validation"]["runs"] == 3
    assert (folder / "summary.png").stat().st_size > 10_000
    assert command("--load", folder / "seed-0" / LAST, "--iterations", 10) == 0


def test_a_sweep_never_mixes_with_other_settings_or_a_single_run(tmp_path, refuse):
    many, one = train(tmp_path / "many", *SHORT, "--seeds", "0"), train(tmp_path / "one", *SHORT)
    cosine = ["--meta-lr-schedule", "cosine", "--seeds"]
    bent = train(tmp_path / "bent", *SHORT, *cosine, "0")
    resumed = ["--checkpoint-path", tmp_path, "--resume", "--run-name"]
    refused = {
        "has seed-0 with another --inner-lr": ["--seeds", 1, "--inner-lr", 0.5, *resumed, many.name],
        "has seed-0 with another --iterations": [*cosine, 1, "--iterations", 9, *resumed, bent.name],
        "has many runs": [*resumed, many.name],
        "is a run, not a folder of many": ["--seeds", 0, *resumed, one.name],
        "-s 2 disagrees": ["--seeds", 0, "-s", 2, *resumed, many.name],
        "is not empty": ["--seeds", 0, "--checkpoint-path", tmp_path, "--run-name", many.name],
        "resume them with --seeds or --sweep": ["--load", many],
    }
    for message, line in refused.items():
        assert message in refuse(*SHORT, *line)


@SLOW
def test_processes_share_the_runs(tmp_path):
    flags = [*SHORT, "--val-tasks", 4, "--seeds", "0-2", "--checkpoint-path", tmp_path, "--run-name"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*launcher, ROOT / "main.py", *flags, "shared"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, line)], env=environment, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "3 runs, 2 of them in this process in" in done.stdout and done.stdout.count("best validation") == 1
    summary = json.loads((tmp_path / "shared" / "summary.json").read_text())
    assert [run["name"] for run in summary["runs"]] == ["seed-0", "seed-1", "seed-2"]
    assert command(*flags, "alone") == 0
    for name in seed_flags(0, 1, 2):
        assert_same_to_rounding(tmp_path / "shared" / name, tmp_path / "alone" / name)


# ---- which runs ----------------------------------------------------------------------------------


def test_the_table_of_many_runs_has_the_means_of_the_single_ones(tmp_path, refuse):
    folder = train(tmp_path / "many", *SHORT, "--sweep", "loss=mse,huber", "--seeds", "0-1")
    line = ["--eval-tasks", 30, "--eval-steps", 2]
    assert command("--eval", "--load", folder, *line) == 0
    record = json.loads((folder / "test-sinusoid-3shot-4query-30tasks.json").read_text())
    for setting, steps in record["settings"].items():
        means = []
        for run in folder.glob(f"{setting}_seed-*"):
            assert command("--eval", "--load", run, *line, "--out", tmp_path / run.name) == 0
            (file,) = (tmp_path / run.name).glob("*.json")
            means.append(json.loads(file.read_text())["per_step"][2]["loss_without_diverged"])
        assert steps[2]["mean"] == pytest.approx(sum(means) / 2, rel=1e-6) and steps[2]["runs"] == 2
    line = refuse("--eval", "--load", folder, "--baselines")
    assert f"{folder} has runs of several settings: --baselines takes" in line


@given(st.lists(st.tuples(st.integers(0, 2**63 - 100), st.integers(0, 50)), min_size=1, max_size=6))
def test_seeds_are_distinct_numbers_and_ranges(ranges):
    expected = [low + number for low, more in ranges for number in range(more + 1)]
    text = ",".join(f" {low}-{low + more}" if more else str(low) for low, more in ranges)
    assert parse_seeds(text) == list(dict.fromkeys(expected))


def test_a_runs_folder_is_named_after_its_setting_and_seed():
    long = "a" * 50
    call = Call(sweep=(f"learner={long}/x.py:net,{long}/y.py:net", "s=1,2", "oracle=yes"), seeds="0,1")
    _, configs = list_members(call, {})
    assert len(configs) == 8 and len(set(map(extract_setting, configs))) == 4
    assert all(re.fullmatch(r"[a-z0-9._-]{1,90}", name) for name in configs)
    first, *_, last = configs.values()
    assert first.tasks.oracle and last.choices.steps == 2 and last.training.seed == 1


def test_the_command_that_is_printed_tests_one_of_several_learners_of_the_users(data, tmp_path, capsys):
    learners = ",".join(f"{data / 'learners.py'}:{name}" for name in ("dropping", "frozen"))
    line = [*SHORT, "--sweep", f"learner={learners}", "--checkpoint-path", tmp_path, "--data-root", tmp_path]
    assert command(*line) == 0
    _, _, line = capsys.readouterr().out.partition("Test:   python main.py ")
    assert command(*shlex.split(line), "--eval-tasks", 4) == 0
    assert f"--data-root {tmp_path}" in line


REFUSED = {
    "--seeds 3-1": "3-1 is not a number or a range, like 0-7",
    "--seeds 0-999 --sweep s=1,2": "ask for 2,000 runs: at most 1,000",
    "--sweep depth=1,2": "depth cannot be swept",
    "--sweep seed=1,2": "seed cannot be swept: give --seeds",
    "--sweep s=1,two": "expected a whole number",
    "--sweep s=1,1": "names a value twice",
    "--sweep s=1,2 -s 3": "-s is given twice",
    "--sweep algorithm=maml,imaml -s 2 --objective multi-step": "run algorithm-imaml_seed-0: ",
    "--sweep dataset=sinusoid,omniglot": "regression and classification have no measure in common",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_bad_sweep_is_refused_in_one_line_and_leaves_nothing(line, tmp_path, capsys):
    assert command(*line.split(), "--checkpoint-path", tmp_path / "home") == 2
    output = capsys.readouterr()
    assert REFUSED[line] in output.err and output.err.count("\n") == 1 and not output.out
    assert not list(tmp_path.iterdir())
