"""--eval from the command line: what is measured, on which tasks, and what is refused."""

import shutil
from pathlib import Path

import pytest
import runs
import torch
from conftest import write_classes
from runs import command, read_record

from commands import build
from commands.config import Config
from commands.evaluate import Subject, is_compiled, summarise
from commands.parser import parse
from commands.resolve import resolve
from training.compiler import Compiler

SHORT = ["--iterations", 1, "--eval-tasks", 4, "--eval-steps", 2, "--test-steps", 2]
IMAGES = ["--image-size", 8, "--channels", 1, "-n", 2, "-k", 1, "-q", 1, "--split-shares", "2,1,2"]


def train(folder: Path, *flags: object) -> Path:
    """Train on ten classes of images below the folder; return the run's folder."""
    if not (folder / "data").exists():
        write_classes(folder / "data", 10)
    data = ["--dataset", f"images:{folder / 'data'}", "--learner", "conv", *IMAGES]
    return runs.train(folder / "run", *data, *SHORT, *flags)


@pytest.fixture(scope="module")
def conv(tmp_path_factory) -> Path:
    """Return the folder of a run, next to its data/, that tests only read."""
    return train(tmp_path_factory.mktemp("conv"))


def test_the_fresh_initialisation_is_measured_without_a_checkpoint(tmp_path):
    assert command("--eval", "--eval-tasks", 4, "--checkpoint-path", tmp_path) == 0
    name = "fresh-mlp-paper-seed0-test-sinusoid-10shot-10query-4tasks"
    record = read_record(tmp_path, f"{name}.json")
    assert (record["checkpoint"], record["iteration"]) == (None, 0)
    assert record["command"].startswith("main.py")
    assert (tmp_path / f"{name}.png").is_file()


def test_a_checkpoint_is_measured_with_other_shots_next_to_it_or_in_out(conv, tmp_path, pictures):
    assert command("--eval", "--load", conv, "-k", 2) == 0
    assert command("--eval", "--load", conv, "--out", tmp_path / "results") == 0
    assert (conv / "best-test-images-data-2way-2shot-1query-4tasks.json").is_file()
    name = "run-best-test-images-data-2way-1shot-1query-4tasks-examples.png"
    assert (tmp_path / "results" / name).is_file()


def test_another_dataset_may_have_other_ways_where_the_head_is_not_learned(conv, tmp_path, refuse):
    write_classes(tmp_path / "other", 4)
    test = ["--eval", "--eval-dataset", f"images:{tmp_path / 'other'}", "-n", 4, "--load"]
    assert "-n 4 disagrees with the checkpoint" in refuse(*test, conv)
    line = refuse("--eval", "--load", conv, "--eval-dataset", "sinusoid")
    assert "does not fit: the checkpoint learned classification of images" in line
    for flags in ("--head-init prototype", "--algorithm r2d2", "--algorithm protonet"):
        run = train(tmp_path, *flags.split())
        assert command(*test, run) == 0
        settings = read_record(run, "*-4way-1shot-*.json")["settings"]
        assert settings["dataset"] == f"images:{tmp_path / 'other'}"
        shutil.rmtree(run)


def test_a_checkpoint_without_inner_steps_is_measured_after_none_unless_asked(tmp_path, capsys):
    run = train(tmp_path, "--algorithm", "protonet", "--eval-steps", 0, "--test-steps", 0)
    for flags, steps in (([], 1), (["--eval-steps", 2], 3)):
        capsys.readouterr()
        assert command("--eval", "--load", run, *flags) == 0
        table = capsys.readouterr().out.partition("\nsteps ")[2].partition("Query")[0]
        assert len(table.splitlines()) == 1 + steps and "inductive" in table


def test_a_learner_that_is_all_computed_head_is_measured_and_not_trained(tmp_path, refuse):
    line = f"--head-init zero --learner-args layers=0 --eval-tasks 4 --checkpoint-path {tmp_path}".split()
    assert command("--eval", *line) == 0
    assert "--learner mlp has a computed head, and nothing else to learn" in refuse(*line)


def test_classes_that_may_have_been_trained_on_are_not_tested_on(tmp_path, capsys):
    """One class more, and the shuffle deals all of them anew."""
    run = train(tmp_path)
    write_classes(tmp_path / "data", 1, prefix="new")
    for line in (["--eval"], ["--iterations", 2]):
        assert command("--load", run, *line) == 2
        assert "the data had different" in capsys.readouterr().err
    assert command("--eval", "--load", run, "--eval-dataset", f"images:{tmp_path / 'data'}") == 2
    assert "is what the checkpoint learned from" in capsys.readouterr().err


def test_classes_with_names_of_learned_ones_are_pointed_out(tmp_path, capsys):
    run = train(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    other, words = f"images:{tmp_path / 'copy'}", "the checkpoint learned classes with names of"
    assert command("--eval", "--load", run) == 0 and words not in capsys.readouterr().err
    build.print_once.cache_clear()
    assert command("--eval", "--load", run, "--eval-dataset", other) == 0 and words in capsys.readouterr().err
    train(tmp_path, "--init-from", run.rename(tmp_path / "first"), "--split-shares", "1,2,2")
    assert words in capsys.readouterr().err
    for number, folder in enumerate(sorted((tmp_path / "copy").glob("*"))):
        folder.rename(tmp_path / "copy" / f"other{number}")
    assert command("--eval", "--load", run, "--eval-dataset", other) == 0
    assert words not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "compiled"),
    [
        ("--dataset omniglot", False),
        ("--dataset omniglot --eval-tasks 10000", True),
        ("--dataset omniglot --eval-tasks 10000 --no-vectorise", False),
        ("--dataset sinusoid --eval-tasks 100000", False),
        ("--dataset omniglot --eval-tasks 10000 --compile off", False),
        ("--dataset sinusoid --compile on", True),
    ],
)
def test_an_evaluation_is_compiled_as_asked_or_where_that_saves_time(flags, compiled):
    settings = parse(flags.split())
    assert is_compiled(resolve(settings), settings.get("compile", "auto")) is compiled


def test_a_step_and_the_predictions_after_it_are_compiled(conv, tmp_path, monkeypatch):
    seen = []

    def note(compiler, function):
        seen.append(compiler.active)
        return function

    monkeypatch.setattr(Compiler, "or_plain", note)
    assert command("--eval", "--load", conv, "--compile", "on", "--out", tmp_path) == 0
    assert read_record(tmp_path)["compiled"] is True and seen == [True] * 2


def test_an_evaluation_that_cannot_be_compiled_says_so(conv, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    build.print_once.cache_clear()  # another test of this process may have said it
    assert command("--eval", "--load", conv, "--compile", "on", "--out", tmp_path) == 0
    assert capsys.readouterr().err.count("not compiled: that needs a C++ compiler") == 1
    assert read_record(tmp_path)["compiled"] is False


def test_an_evaluation_on_ranges_is_reported_by_size(tmp_path, capsys):
    run = runs.train(tmp_path / "run", "-k", "1-3", "--iterations", 2, "--val-tasks", 2)
    assert command("--eval", "--load", run, "--eval-tasks", 40, "--eval-steps", 1) == 0
    assert "By size, after 1 step:" in capsys.readouterr().out
    result = read_record(run, "*-1to3shot-*.json")
    losses = torch.tensor(result["per_task"]["loss"]["transductive"])[:, 1]
    shots = torch.tensor(result["sizes"]["shots"])
    for size in (1, 2, 3):
        mean = result["by_size"]["shots"][str(size)]["transductive"][1]["mean"]
        assert mean == pytest.approx(losses[shots == size].mean().item(), rel=1e-5)


def test_a_size_that_does_not_vary_is_not_reported(tmp_path):
    write_classes(tmp_path / "classes", 30, 2)
    data = ["--dataset", f"images:{tmp_path / 'classes'}", "--image-size", 8, "--channels", 1, "-q", 1]
    line = [*data, "-n", "2-4", "-k", 1, "--learner", "fc", "--eval-tasks", 20, "--eval-steps", 1]
    assert command("--eval", *line, "--out", tmp_path / "out") == 0
    record = read_record(tmp_path / "out")
    assert record["by_size"].keys() == record["sizes"].keys() == {"ways"}


def test_several_subjects_are_named_after_what_they_share():
    def subject(**flags: object) -> Subject:
        config: Config = resolve(flags)
        return Subject(None, None, config, config)

    same, other = subject(seed=1), subject(shots=5)
    assert summarise([same, same])[1] == "test-sinusoid-10shot-10query-600tasks"
    assert summarise([same, other])[1] == "test-sinusoid-10query-600tasks"
    split = subject(dataset="omniglot", omniglot_split="alphabet")
    assert summarise([split])[1] == "test-omniglot-alphabet-5way-1shot-1query-600tasks"
    assert summarise([subject(loss="mse"), subject(loss="huber")])[0].loss_name == "loss"
