"""Many runs as one (--seeds, --sweep): each is the run alone; stopped, gone on with, evaluated, refused."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from runs import assert_same_bits, command, curves, start, wait_for
from test_family import RUNS, few_drawings, stop_at  # noqa: F401 (a fixture)

from commands import config, members
from commands.presets import ALGORITHMS
from common.errors import UsageError
from evaluation import seeds as spread
from training import trainer
from training.checkpoint import BEST, LAST, load_checkpoint

TOLERANCE = 1e-8  # in float64
SHORT = ["--precision", "float64", "--iterations", 10, "--log-every", 3, "--val-every", 4, "--save-every", 50]
SHORT += ["--meta-batch-size", 2, "-k", 3, "-q", 4]

OWN_LEARNERS = """
from torch import nn

def dropping(outputs):
    return nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, outputs))

def frozen(outputs):
    first = nn.Linear(1, 12)  # random, and as the seed has it
    first.requires_grad_(False)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(12, outputs))
"""


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch):
    """Those of single runs, which have tests of their own, take longer than these runs."""
    monkeypatch.setattr("training.run.Run.draw_examples", lambda *_: None)
    monkeypatch.setattr("training.run.learning_figure", lambda *_, **__: Figure(figsize=(1, 1)))
    monkeypatch.setattr("commands.measuring.evaluation_figure", lambda *_: Figure(figsize=(1, 1)))


# ---- a member is the run alone ------------------------------------------------------------------


def assert_close(a: object, b: object, where: str) -> None:
    """Equal, numbers to rounding."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert isinstance(b, list) and len(a) == len(b), where
        for position, pair in enumerate(zip(a, b, strict=True)):
            assert_close(*pair, f"{where}/{position}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), where
    else:
        assert a == b, where


def assert_same_run_to_rounding(
    a: Path, b: Path, *, of: tuple[str, ...] = (LAST, BEST), but: tuple[str, ...] = ()
) -> None:
    """Both checkpoints: weights, moments, statistics, curves, best iteration and settings, `but` for some."""
    for name in of:
        first, second = (vars(load_checkpoint(folder / name)) for folder in (a, b))
        for content in (first, second):
            content["config"] = {n: v for n, v in vars(content["config"]).items() if n not in but}
            assert content.pop("computed_by")["processes"] == 1  # and so many runs at once
        assert_close(first, second, f"{a.name}/{name}")


def trained(folder: Path, *flags: object) -> Path:
    assert command(*flags, "--checkpoint-path", folder.parent, "--run-name", folder.name) == 0
    return folder


def assert_members_are_the_runs_alone(
    home: Path, flags: list, many: list, alone: dict[str, list], *, but: tuple[str, ...] = ()
) -> Path:
    folder = trained(home / "many", *flags, *many)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == alone.keys()
    weights = []
    for name, own in alone.items():
        run = trained(home / f"alone-{name}", *flags, *own)
        assert_same_run_to_rounding(folder / name, run, but=but)
        saved = load_checkpoint(folder / name / LAST)
        assert (
            saved.iteration == saved.config.iterations and saved.config.seed == own[own.index("--seed") + 1]
        )
        weights.append(torch.cat([w.flatten() for w in saved.parameters.values()]))
    pairs = [(w, v) for number, w in enumerate(weights) for v in weights[:number]]
    assert not any(w.shape == v.shape and torch.allclose(w, v, rtol=0, atol=1e-6) for w, v in pairs)
    return folder


def of_seeds(*seeds: int) -> dict[str, list]:
    return {f"seed-{seed}": ["--seed", seed] for seed in seeds}


LONGER = [
    "--precision",
    "float64",
    "--iterations",
    200,
    "--log-every",
    30,
    "--val-every",
    40,
    "--init",
    "torch",
]


def test_each_of_several_seeds_is_the_run_alone(tmp_path, capsys):
    seeds = (0, 3, 2**63 - 1)
    listed = ["--seeds", ",".join(map(str, seeds))]
    folder = assert_members_are_the_runs_alone(tmp_path, LONGER, listed, of_seeds(*seeds))
    assert "3 runs in" in (said := capsys.readouterr().out) and "trained at once: 3\n" in said
    for name in of_seeds(*seeds):
        assert curves(folder / name) == curves(tmp_path / f"alone-{name}")
        a, b = (
            json.loads((f / "training.json").read_text()) for f in (folder / name, tmp_path / f"alone-{name}")
        )
        assert_close(a, b, name)


def test_each_of_a_sweep_is_the_run_alone(tmp_path, capsys):
    swept = ["--sweep", "inner-lr=0.001,0.02", "meta-lr=0.001,0.005", "--seed", 4]
    alone = {
        f"inner-lr-{inner}_meta-lr-{outer}_seed-4": ["--inner-lr", inner, "--meta-lr", outer, "--seed", 4]
        for inner in (0.001, 0.02)
        for outer in (0.001, 0.005)
    }
    folder = assert_members_are_the_runs_alone(tmp_path, LONGER, swept, alone)
    said = capsys.readouterr().out
    assert "trained at once: 4\n" in said
    record = json.loads((folder / "summary.json").read_text())
    assert [run["name"] for run in record["runs"]] == list(alone)
    best = {name: load_checkpoint(folder / name / LAST).progress["best_score"] for name in alone}
    for name, score in best.items():
        row = record["settings"][name.removesuffix("_seed-4")]["best_validation"]
        assert row["runs"] == 1 and row["mean"] == pytest.approx(-score, rel=1e-6)


def test_compiled_members_are_the_runs_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("training.compiler.cache_folder", lambda: tmp_path / "cache")
    flags = [*LONGER, "--save-every", 100]
    line = ["--compile", "on", "--compile-after", 5, "--seeds", "0,1", "--sweep", "inner-lr=0.01,0.02"]
    folder = trained(tmp_path / "many", *flags, *line)
    said = capsys.readouterr()
    assert "trained at once: 4\n" in said.out and "Compiled in" in said.err and "Not compiled" not in said.err
    for seed, rate in ((0, 0.01), (1, 0.02)):
        run = trained(tmp_path / f"alone-{seed}", *flags, "--inner-lr", rate, "--seed", seed)
        but = ("compile", "compile_after")
        assert_same_run_to_rounding(folder / f"inner-lr-{rate}_seed-{seed}", run, but=but)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_members_of_every_algorithm_are_the_runs_alone(algorithm, tmp_path, capsys):
    flags = ["--algorithm", algorithm, *SHORT, *RUNS[algorithm]]
    if "omniglot" in flags:
        flags += ["-n", 2, "-k", 1, "-q", 1, "-s", 2]
    assert_members_are_the_runs_alone(tmp_path, flags, ["--seeds", "1,4"], of_seeds(1, 4))
    assert "trained at once: 2\n" in capsys.readouterr().out


IMAGES = [*SHORT, "--dataset", "omniglot", "-n", 2, "-k", 1, "-q", 1, "--iterations", 3, "--init", "torch"]
NOISY = ["--dataset", "harmonic", "--noise", 0.2]
RATES = ["--inner-rates", "element", "--inner-lr-max", 0.05]
CHOICES: dict[str, list] = {
    "images": IMAGES,
    "images, maml++": [*IMAGES, "--algorithm", "maml++", "-s", 2, "--exact-from", 2, "--msl-iterations", 3],
    "images, adjoint": [*IMAGES, "-s", 2, "--engine", "adjoint", "--inner-lr", 0.4],
    "images, tasks at once": [*IMAGES, "--tasks-at-once", 1],
    "adjoint": [*SHORT, "-s", 2, "--engine", "adjoint"],
    "adam": [*SHORT, "-s", 2, "--inner-optimizer", "adam"],
    "minibatches": [*SHORT, "-s", 3, "--inner-batch", 2],
    "noise": [*SHORT, *NOISY],
    "rates": [*SHORT, *RATES],
    "prototypes": [*IMAGES, "--head-init", "prototype"],
    "schedule": [*SHORT, "--meta-lr-schedule", "cosine", "--meta-lr-final", 1e-4],
    "sgd": [*SHORT, "--meta-optimizer", "sgd", "--grad-clip-norm", 0.5],
    "chunks": [*SHORT, "--tasks-at-once", 1],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_members_with_other_choices_are_the_runs_alone(choice, tmp_path, capsys):
    assert_members_are_the_runs_alone(tmp_path, CHOICES[choice], ["--seeds", "0-1"], of_seeds(0, 1))
    assert "trained at once: 2\n" in capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "many" / "seed-0" / LAST)
    if choice.startswith("images"):
        assert len(saved.parameters["0.weight"].shape) == 4 and bool(saved.statistics) == ("maml++" in choice)


SWEEPS = {
    "grad-clip": (["0.01", "0.001"], []),
    "grad-clip-norm": (["0.3", "0.01"], ["--grad-clip", 0.1]),
    "meta-lr": (["0.001", "0.01"], ["--meta-lr-schedule", "linear"]),
    "meta-lr-final": (["0.0001", "0.0"], ["--meta-lr-schedule", "cosine"]),
    "inner-lr": (["0.001", "0.05"], []),
    "inner-lr, where learned ones begin": (["0.001", "0.05"], RATES[:2]),
    "inner-lr-max": (["0.02", "0.05"], RATES[:2]),
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_members_of_sweeps_of_numbers_are_trained_at_once_and_are_the_runs_alone(sweep, tmp_path, capsys):
    (values, others), flag = SWEEPS[sweep], sweep.partition(",")[0]
    flags = [*SHORT, "--meta-optimizer", "sgd", "--meta-lr", 0.01, *others]  # which sees the gradient's scale
    if flag == "meta-lr":
        flags = [*SHORT, *others]
    alone = {f"{flag}-{value}_seed-0": [f"--{flag}", value, "--seed", 0] for value in values}
    assert_members_are_the_runs_alone(tmp_path, flags, ["--sweep", f"{flag}={','.join(values)}"], alone)
    assert "trained at once: 2\n" in capsys.readouterr().out


def test_images_are_learned_at_once_uncompiled_and_compiled_one_after_another(tmp_path, monkeypatch, capsys):
    flags = [*IMAGES, "--iterations", 2000, "--compile-after", 0]
    stop_at(3, monkeypatch)
    options = ["--checkpoint-path", tmp_path, "--run-name"]
    assert command(*flags, "--seeds", "0-1", "--runs-at-once", 2, *options, "many") == 130
    said = capsys.readouterr()
    assert "trained at once: 2\n" in said.out and "compile off" in said.out and "ompiled" not in said.err
    assert command(*flags, "--seed", 1, "--compile", "off", *options, "alone") == 130
    assert_same_run_to_rounding(tmp_path / "many" / "seed-1", tmp_path / "alone", of=(LAST,))
    capsys.readouterr()
    monkeypatch.setattr("training.trainer.Trainer.train", lambda self: print(self.config.compile) or 130)
    assert command(*flags, "--seeds", "0-1", *options, "others") == 130
    said = capsys.readouterr().out
    assert "trained at once: 1, 1\n" in said and "\non\n" in said


@pytest.mark.parametrize(("learner", "groups"), [("dropping", "2"), ("frozen", "1, 1")])
def test_members_of_ones_own_learner_draw_their_own_numbers_and_keep_their_own_frozen_weights(
    learner, groups, tmp_path, capsys
):
    (tmp_path / "own.py").write_text(OWN_LEARNERS)
    flags = [*SHORT, "-s", 2, "--learner", f"{tmp_path / 'own.py'}:{learner}"]
    folder = assert_members_are_the_runs_alone(tmp_path, flags, ["--seeds", "0-1"], of_seeds(0, 1))
    assert f"trained at once: {groups}\n" in capsys.readouterr().out
    if learner == "frozen":
        first, second = (load_checkpoint(folder / name / LAST).fixed["0.weight"] for name in of_seeds(0, 1))
        assert not torch.equal(first, second)


# ---- in groups, one after another ---------------------------------------------------------------


def test_runs_that_differ_in_more_than_numbers_are_trained_in_groups_and_are_the_runs_alone(tmp_path, capsys):
    swept = ["--sweep", "s=1,2", "oracle=yes,no", "--seeds", "2,3"]
    alone = {
        f"s-{steps}_oracle-{switch}_seed-{seed}": ["-s", steps, f"--{no}oracle", "--seed", seed]
        for steps in (1, 2)
        for switch, no in (("yes", ""), ("no", "no-"))
        for seed in (2, 3)
    }
    assert_members_are_the_runs_alone(tmp_path, [*SHORT, "--iterations", 4], swept, alone)
    assert "trained at once: 2, 2, 2, 2\n" in capsys.readouterr().out


def test_a_sweep_of_learners_has_groups_of_each(tmp_path, capsys):
    folder = trained(tmp_path / "many", *IMAGES, "--sweep", "learner=fc,conv", "--seeds", "0-1")
    assert "trained at once: 2, 2\n" in capsys.readouterr().out
    run = trained(tmp_path / "alone", *IMAGES, "--learner", "conv", "--seed", 1)
    assert_same_run_to_rounding(folder / "learner-conv_seed-1", run)


@pytest.mark.parametrize(("at_once", "groups"), [(1, "1, 1, 1"), (2, "2, 1"), (7, "3")])
def test_how_many_runs_are_trained_at_once_changes_nothing(at_once, groups, tmp_path, capsys):
    whole = trained(tmp_path / "whole", *SHORT, "--seeds", "0-2")
    capsys.readouterr()
    few = trained(tmp_path / "few", *SHORT, "--seeds", "0-2", "--runs-at-once", at_once)
    assert f"trained at once: {groups}\n" in capsys.readouterr().out
    for name in of_seeds(0, 1, 2):
        assert_same_run_to_rounding(whole / name, few / name)


def test_a_fresh_folder_is_made_where_there_is_none(tmp_path, capsys):
    assert command(*SHORT, "--seeds", "0-1", "--checkpoint-path", tmp_path / "not" / "there") == 0
    (folder,) = (tmp_path / "not" / "there").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "runs.json",
        "seed-0",
        "seed-1",
        "summary.json",
        "summary.png",
    }
    said = capsys.readouterr().out
    assert f"python main.py --eval --load {folder}" in said and "seed 0, 1 · " in said


# ---- stopped, and gone on with ------------------------------------------------------------------

WHOLE = ["--iterations", 160, "--log-every", 7, "--val-every", 50, "--save-every", 20, "-k", 5]
WHOLE += ["--meta-batch-size", 4, "--seeds", "0-1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Two runs at once that were never stopped."""
    return trained(tmp_path_factory.mktemp("many") / "whole", *WHOLE)


def assert_same_runs(a: Path, b: Path, names: list[str]) -> None:
    for name in names:
        for file in (LAST, BEST):
            assert_same_bits(
                *(vars(load_checkpoint(folder / name / file)) for folder in (a, b)), f"{name}/{file}"
            )
        assert curves(a / name) == curves(b / name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_runs_go_on_to_the_same_bits(number, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the process that is stopped has all validation tasks
    options = [*WHOLE, "--checkpoint-path", tmp_path, "--run-name", "many", "--resume"]
    process = start(*options)
    wait_for(tmp_path / "many" / "seed-1" / LAST, process)
    if number == signal.SIGKILL:
        time.sleep(0.05)  # some iterations past the checkpoints
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    saved = [load_checkpoint(tmp_path / "many" / name / LAST).iteration for name in of_seeds(0, 1)]
    assert saved[0] == saved[1] < 160
    assert not (tmp_path / "many" / "summary.json").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number and "Traceback" not in said
        assert "Saved; the same command with --run-name many --resume goes on." in said
    assert command(*options) == 0
    assert "trained at once: 2\n" in capsys.readouterr().out
    assert_same_runs(whole, tmp_path / "many", list(of_seeds(0, 1)))
    assert (whole / "summary.json").read_bytes() == (tmp_path / "many" / "summary.json").read_bytes()


def test_runs_in_groups_that_are_stopped_in_the_second_go_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    flags = [*SHORT, "--sweep", "s=1,2", "--seeds", "0-1", "--checkpoint-path", tmp_path]
    assert command(*flags, "--run-name", "whole") == 0
    plain = trainer.Trainer.step

    def step(self, bar):
        if self.config.steps == 2 and self.iteration == 4:
            self.signal = signal.SIGINT
        return plain(self, bar)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", step)
        assert command(*flags, "--run-name", "parts") == 130
    names = [path.name for path in (tmp_path / "whole").iterdir() if path.is_dir()]
    assert {load_checkpoint(tmp_path / "parts" / name / LAST).iteration for name in names} == {5, 10}
    done = {name: (tmp_path / "parts" / name / LAST).read_bytes() for name in names if name.startswith("s-1")}
    capsys.readouterr()
    assert command(*flags, "--run-name", "parts", "--resume") == 0
    assert "4 runs in" in (said := capsys.readouterr().out) and "trained at once: 2\n" in said
    assert len(done) == 2
    assert all((tmp_path / "parts" / name / LAST).read_bytes() == content for name, content in done.items())
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", names)
    summaries = [(tmp_path / name / "summary.json").read_bytes() for name in ("whole", "parts")]
    assert summaries[0] == summaries[1]


def test_finished_runs_say_so_and_others_can_join_them(tmp_path, capsys):
    folder = trained(tmp_path / "many", *SHORT, "--seeds", "0-1")
    content = {name: (folder / name / LAST).read_bytes() for name in of_seeds(0, 1)}
    capsys.readouterr()
    trained(folder, *SHORT, "--seeds", "0-1", "--resume")
    said = capsys.readouterr().out
    assert "trained at once: none, all are finished\n" in said and "best validation" in said
    trained(folder, *SHORT, "--seeds", "0-2", "--resume")
    assert "3 runs in" in (said := capsys.readouterr().out) and "trained at once: 1\n" in said
    assert_same_run_to_rounding(folder / "seed-2", trained(tmp_path / "alone", *SHORT, "--seed", 2))
    assert content == {name: (folder / name / LAST).read_bytes() for name in content}
    record = json.loads((folder / "summary.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [0, 1, 2]
    assert record["settings"]["all"]["best_validation"]["runs"] == 3


def test_a_member_can_be_gone_on_with_alone_and_all_of_them_together(tmp_path, capsys):
    folder = trained(tmp_path / "many", *SHORT, "--iterations", 12, "--seeds", "0-1")
    assert command("--load", folder / "seed-0" / LAST, "--iterations", 16) == 0
    longer = [*SHORT, "--iterations", 16]
    alone = trained(tmp_path / "alone", *longer, "--seed", 0)
    assert_same_run_to_rounding(folder / "seed-0", alone, of=(LAST,))  # best.pt may be from before
    capsys.readouterr()
    trained(folder, *longer, "--seeds", "0-1", "--resume")  # the other one catches up
    assert "trained at once: 1\n" in capsys.readouterr().out
    alone = trained(tmp_path / "other", *longer, "--seed", 1)
    assert_same_run_to_rounding(folder / "seed-1", alone, of=(LAST,))


# ---- evaluation ---------------------------------------------------------------------------------


def evaluations(folder: Path, name: str, out: Path, *flags: object) -> dict[str, dict]:
    """The results of each run of a folder, measured by itself."""
    found = {}
    for run in sorted(path for path in folder.iterdir() if path.is_dir()):
        assert command("--eval", "--load", run / name, *flags, "--out", out / run.name) == 0
        (file,) = (out / run.name).glob("*.json")
        found[run.name] = json.loads(file.read_text())
    return found


def assert_table_is_of(record: dict, singles: dict[str, dict], measure: str) -> None:
    for setting, by_norm in record["settings"].items():
        runs = [r for name, r in singles.items() if setting == "all" or name.startswith(f"{setting}_")]
        for norm, steps in by_norm.items():
            assert len(steps) == len(runs[0]["per_task"][measure][norm][0])
            for step, row in enumerate(steps):
                means = [mean_of(run["per_task"], measure, norm, step) for run in runs]
                expected = {
                    "runs": len(runs), "mean": sum(means) / len(means),
                    "lowest": min(means), "highest": max(means),
                }  # fmt: skip
                assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def mean_of(per_task: dict, measure: str, norm: str, step: int) -> float:
    """The mean over the tasks that have not diverged."""
    losses, values = (torch.tensor(per_task[name][norm], dtype=torch.float64) for name in ("loss", measure))
    bound = 10 * torch.maximum(losses[:, 0], losses[:, 0].median())
    kept = losses[:, step].isfinite() & (losses[:, step] <= bound)
    return values[kept, step].mean().item()


@pytest.mark.parametrize("name", [BEST, LAST])
def test_the_table_of_many_runs_is_that_of_the_single_ones(name, tmp_path, capsys):
    flags = [*SHORT, "--init", "torch", "--iterations", 40, "--sweep", "inner-lr=0.01,0.3", "--seeds", "0-2"]
    folder = trained(tmp_path / "many", *flags)
    measure = ["--eval-tasks", 30, "--eval-steps", 3]
    singles = evaluations(folder, name, tmp_path / "singles", *measure)
    capsys.readouterr()
    assert command("--eval", "--load", folder if name == BEST else folder / name, *measure) == 0
    said = capsys.readouterr().out
    stem = "test-sinusoid-3shot-4query-30tasks"
    assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / f"{stem}.json").read_text())
    assert [run["name"] for run in record["runs"]] == [
        f"inner-lr-{rate}_seed-{seed}" for rate in (0.01, 0.3) for seed in range(3)
    ]
    assert_table_is_of(record, singles, "loss")
    for run, single in singles.items():
        own = json.loads((folder / run / f"{Path(name).stem}-{stem}.json").read_text())
        assert own["per_task"] == single["per_task"] and own["iteration"] == single["iteration"]
    header, *rows = said[said.index("\nsteps ") + 1 :].splitlines()
    assert re.fullmatch(r"steps +inner-lr-0.01 +inner-lr-0.3 +diverged", header)
    row = record["settings"]["inner-lr-0.01"]["transductive"][1]
    numbers = "{mean:.4f} ± {interval_95_over_tasks:.4f} ({lowest:.4f} to {highest:.4f})".format(**row)
    assert numbers in rows[1] and rows[1].endswith("trained for")
    diverged = record["settings"]["inner-lr-0.3"]["transductive"][3]["diverged_tasks"]
    assert diverged == sum(r["per_step"][3]["diverged_tasks"] for n, r in singles.items() if "0.3" in n) > 0
    assert rows[3].endswith(f" {diverged}")
    assert "mean over 3 runs of each setting ± the mean 95 % interval over 30 tasks" in said


def test_many_classifiers_are_measured_with_both_kinds_of_batch_norm(tmp_path, capsys):
    folder = trained(tmp_path / "many", *IMAGES, "--learner", "fc", "--seeds", "0-1")
    measure = ["--eval-tasks", 10, "--eval-steps", 2, "--test-steps", 1, "-q", 5]
    singles = evaluations(folder, BEST, tmp_path / "singles", *measure)
    capsys.readouterr()
    assert command("--eval", "--load", folder, *measure, "--out", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "test-omniglot-2way-1shot-5query-10tasks.json").read_text())
    assert record["settings"]["all"].keys() == {"transductive", "inductive"}
    assert_table_is_of(record, singles, "accuracy")
    assert len(list((tmp_path / "out").glob("seed-?-best-test-*.json"))) == 2
    said = capsys.readouterr().out
    row = record["settings"]["all"]["inductive"][1]
    assert f"{100 * row['mean']:.2f} ± {100 * row['interval_95_over_tasks']:.2f} (" in said
    assert re.search(r"\nsteps +accuracy % .*accuracy %.*\n +transductive +inductive\n", said)


def test_runs_with_different_tasks_and_steps_are_named_after_their_own(tmp_path, monkeypatch, capsys):
    seen, plain = [], spread.test_figure
    monkeypatch.setattr(
        spread, "test_figure", lambda results, words, _: seen.append(words) or plain(results, words)
    )
    folder = trained(tmp_path / "many", *SHORT[:-4], "-q", 4, "--iterations", 2, "--sweep", "k=3,5", "s=1,2")
    assert command("--eval", "--load", folder, "--eval-tasks", 4, "--eval-steps", 2) == 0
    said = capsys.readouterr().out
    files = {str(path.relative_to(folder)) for path in folder.rglob("*test-*.json")}
    assert files == {"test-sinusoid-4query-4tasks.json"} | {
        f"k-{shots}_s-{steps}_seed-0/best-test-sinusoid-{shots}shot-4query-4tasks.json"
        for shots in (3, 5)
        for steps in (1, 2)
    }
    lines = said[said.index("setting  ", said.index("Evaluating")) :].splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["k-3_s-1", "k-3_s-2", "k-5_s-1", "k-5_s-2"]
    assert seen[0].trained_steps is None and seen[0].title == "sinusoid, 4 test tasks"
    assert "shots 3, 5" in said and "steps 1, 2" in said
    assert max(map(len, lines[:5])) < 130 and "mean and 95 % interval over 4 tasks" in said


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"runs": []}', '{"runs": [{"name": "../seed-0", "setting": "", "seed": 0}]}',
     '{"runs": [{"name": "seed-0", "setting": "", "seed": "0"}]}', '{"runs": {"a": 1}}', '{"runs": 3}'],
)  # fmt: skip
def test_a_damaged_list_of_runs_is_refused(content, tmp_path, capsys):
    (tmp_path / "runs.json").write_text(content)
    assert command("--eval", "--load", tmp_path) == 2
    said = capsys.readouterr().err
    assert "runs.json is damaged: name the checkpoint of one run" in said and said.count("\n") == 1


def test_a_run_without_checkpoint_is_refused_and_what_is_no_folder_of_runs_too(tmp_path, capsys):
    folder = trained(tmp_path / "many", *SHORT, "--iterations", 2, "--seeds", "0-1")
    (folder / "seed-1" / BEST).unlink()
    assert command("--eval", "--load", folder, "--eval-tasks", 3, "--baselines") == 2
    assert "--baselines is measured beside one run" in capsys.readouterr().err
    assert command("--load", folder) == 2
    assert f"{folder}: there is no such checkpoint, but many runs: name" in capsys.readouterr().err
    (folder / "seed-1" / LAST).unlink()
    for path in (folder, folder / LAST):
        assert command("--eval", "--load", path) == 2
        said = capsys.readouterr().err
        assert f"{folder / 'seed-1'} has no " in said and said.count("\n") == 1
    (folder / "seed-1" / BEST).write_bytes(b"no checkpoint")
    for path in (folder, folder / "other.pt", tmp_path):
        assert command("--eval", "--load", path) == 2
        assert capsys.readouterr().err.count("\n") == 1


# ---- what is refused ----------------------------------------------------------------------------


def seeds_in_words(ranges: list[tuple[int, int]]) -> str:
    return ",".join(f"{a}-{a + more}" if more else str(a) for a, more in ranges)


@given(st.lists(st.tuples(st.integers(0, 2**63 - 100), st.integers(0, 50)), min_size=1, max_size=6))
def test_any_list_of_ranges_is_read(ranges):
    expected = [a + number for a, more in ranges for number in range(more + 1)]
    if len(set(expected)) < len(expected):
        with pytest.raises(UsageError, match="names a seed twice"):
            members.seeds_of(seeds_in_words(ranges))
    else:
        assert members.seeds_of(seeds_in_words(ranges)) == expected
        assert members.seeds_of(seeds_in_words(ranges).replace(",", " , ")) == expected


@given(st.text("0123456789-,x ", max_size=8))
@settings(max_examples=200)
def test_any_other_text_is_refused(text):
    try:
        found = members.seeds_of(text)
    except UsageError:
        return
    assert re.fullmatch(r" *\d+(-\d+)? *(, *\d+(-\d+)? *)*", text) and len(set(found)) == len(found) > 0


REFUSED = {
    "--seeds 0-": "expected numbers and ranges",
    "--seeds 3-1": "3-1 is no range",
    "--seeds 1,1": "names a seed twice",
    "--seeds x": "expected numbers and ranges",
    "--seeds 0-99999999999999999999": "is no range of up to 1,000 seeds",
    "--seeds 9223372036854775808": "below 2^63",
    "--seeds 0-999 --sweep s=1,2": "ask for 2,000 runs: at most 1,000",
    "--sweep depth=1,2": "depth is no setting",
    "--sweep s=1,two": "expected a whole number",
    "--sweep s=1,1": "names a value twice",
    "--sweep s=1,2 s=3,4": "has -s twice",
    "--sweep oracle=1,0": "--oracle is yes or no, not '1'",
    "--sweep learner-args=1,2": "a list of arguments cannot be swept",
    "--sweep seed=1,2": "use --seeds",
    "--sweep s": "expected FLAG=A,B,...",
    "--sweep s=1,,2": "expected FLAG=A,B,...",
    "--sweep s=1,2 -s 3": "-s is given, and in --sweep too",
    "--sweep algorithm=maml,imaml -s 2 --objective multi-step": "run algorithm-imaml_seed-0: ",
    "--sweep dataset=sinusoid,omniglot": "regression and classification have no measure in common",
    "--seeds 0,1 --eval": "leave out --eval",
    "--seeds 0,1 --load x": "--load",
    "--seeds 0,1 --adapt x": "--adapt",
    "--seeds 0,1 --autotune": "--autotune and --shard are for one run",
    "--seeds 0,1 --shard": "--autotune and --shard are for one run",
    "--seeds 0,1 --seed 3": "--seed and --seeds: give one of them",
    "--seeds 0,1 --compile on --runs-at-once 2 --dataset omniglot": "--compile on: many runs at once are",
    "--runs-at-once 2": "--runs-at-once is for many runs",
    "--seeds 0,1 --resume": "--resume needs the --run-name",
    "--seeds 0,1 --init-from x": "there is no such checkpoint",
    "--seeds 0,1 --learner nothing.py:net": "nothing.py",
    "--sweep learner=mlp,conv --run-name new": "run learner-conv_seed-0: ",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_makes_no_runs_is_refused_in_one_line_and_leaves_nothing_behind(line, tmp_path, capsys):
    home = ["--checkpoint-path", tmp_path / "home"] * ("--load" not in line)
    assert command(*line.split(), *home) == 2
    said = capsys.readouterr()
    assert REFUSED[line] in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "notes.txt").write_text("mine")
    options = ["--checkpoint-path", tmp_path, "--run-name", "many", *SHORT, "--iterations", 1]
    assert command(*options, "--seeds", "0-1") == 2
    assert "is not empty: choose another --run-name, or --resume" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["notes.txt"]
    assert command(*options, "--seeds", "0-1", "--resume") == 0
    assert command(*options, "--seeds", "0-1", "--resume", "-s", 2) == 2  # other runs than those
    assert "-s 2 disagrees" in capsys.readouterr().err


def test_names_of_runs_are_fit_for_folders_and_all_different():
    long = "a" * 50
    given = {"dataset": "sinusoid", "checkpoint_path": "x"}
    values = [f"{long}/{end}.py:net" for end in ("x", "y")] + [f"b{long}/x.py:net"]
    call = config.check_invocation({"sweep": (f"learner={','.join(values)}", "s=1,2"), "seeds": "0,1"})
    found = members.members_of(call, given)
    names = [member.name for member in found]
    assert len(set(names)) == len(names) == 12 and len({m.setting for m in found}) == 6
    assert all(
        len(name) < 80 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-_") for name in names
    )
    assert [m.config.learner for m in found[::4]] == values


# ---- several processes --------------------------------------------------------------------------


def test_processes_share_the_runs_out(tmp_path, monkeypatch):
    flags = [*SHORT, "--iterations", 6, "--seeds", "0-2", "--checkpoint-path", tmp_path]
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        ROOT / "main.py",
    ]
    line += [*flags, "--run-name", "shared"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(part) for part in line],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "3 runs, 2 of them in this process in" in out and out.count("best validation") == 1
    shared = json.loads((tmp_path / "shared" / "summary.json").read_text())
    assert [run["name"] for run in shared["runs"]] == ["seed-0", "seed-1", "seed-2"]
    assert shared["settings"]["all"]["best_validation"]["runs"] == 3
    monkeypatch.undo()  # the processes have all validation tasks
    alone = trained(tmp_path / "alone", *flags)
    for name in of_seeds(0, 1, 2):
        assert_same_run_to_rounding(tmp_path / "shared" / name, alone / name)


def test_a_folder_of_many_takes_no_other_settings_and_no_single_run(tmp_path, capsys):
    short = ["--iterations", 1, "--meta-batch-size", 2, "--compile", "off", "--checkpoint-path", tmp_path]
    assert command(*short, "--seeds", "0", "--run-name", "many") == 0
    assert command(*short, "--run-name", "one") == 0
    capsys.readouterr()
    refused = {
        "has the run seed-0 with another --inner-lr": [
            "--seeds",
            "1",
            "--inner-lr",
            0.5,
            "--run-name",
            "many",
        ],
        "has many runs": ["--run-name", "many"],
        "is a run, not a folder of many": ["--seeds", "0", "--run-name", "one"],
    }
    for said, line in refused.items():
        assert command(*short, *line, "--resume") == 2
        assert said in capsys.readouterr().err
    assert command(*short, "--seeds", "1", "--eval-steps", 3, "--run-name", "many", "--resume") == 0
    assert command("--eval", "--load", tmp_path / "many", "--eval-tasks", 5) == 2
    assert "differ in --eval-steps" in capsys.readouterr().err
    assert command("--eval", "--load", tmp_path / "many", "--eval-tasks", 5, "--eval-steps", 2) == 0
