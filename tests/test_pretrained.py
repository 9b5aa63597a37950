"""Every shipped checkpoint is the file its card names, and measures what its card says."""

import hashlib
import json
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import command

from commands.parser import parse
from commands.resolve import resolve, restore_config, select_learned
from commands.runs import find_all_runs
from training.checkpoint import load_checkpoint
from training.folders import BEST

FOLDER = ROOT / "checkpoints" / "pretrained"
CARDS = {file.parent.name: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*/card.json"))}
FAST = ("sinusoid-maml", "sinusoid-meta-sgd")
DATA = ("omniglot", "icons")  # that lie in a folder


def test_every_folder_has_a_card_and_a_row_in_the_index():
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()}
    index = (FOLDER / "README.md").read_text()
    assert folders == set(CARDS) != set()
    assert all(f"`{name}`" in index for name in folders)
    assert len({frozenset(card) for card in CARDS.values()}) == 1  # the same entries


def test_the_list_of_runs_has_the_numbers_of_the_cards():
    for run in find_all_runs(FOLDER):
        card = CARDS[run.name]
        numbers = [row.get("accuracy", row["loss"]) for row in card["numbers"].values()]
        assert run.test == (None if "-n" in card["tested_by"] else pytest.approx(numbers[0])), run.name


@pytest.mark.parametrize("name", CARDS)
def test_a_file_is_the_one_its_card_names_and_holds_only_an_initialisation(name):
    card, file = CARDS[name], FOLDER / name / BEST
    checkpoint = load_checkpoint(file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card["sha256"]
    assert checkpoint.exp_avg == {} and file.stat().st_size < 2**20
    assert {weight.dtype for weight in checkpoint.parameters.values()} == {torch.float32}
    config = restore_config(checkpoint.settings, file)
    assert select_learned(resolve(parse(shlex.split(card["trained_by"])[2:]))) == select_learned(config)
    assert (checkpoint.iteration, config.training.seed) == (card["iteration"], card["seed"])


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CARDS]
)
def test_a_checkpoint_measures_what_its_card_says(name, tmp_path, monkeypatch, request):
    """Measure the first test tasks only; they are the same for any number of tasks."""
    card = CARDS[name]
    monkeypatch.chdir(ROOT)
    line = shlex.split(card["tested_by"])[2:]
    assert line[:3] == ["--eval", "--load", f"checkpoints/pretrained/{name}"]
    if card["data"] in DATA:
        line += ["--data-root", str(request.getfixturevalue(f"{card['data']}_root"))]
    assert command(*line, "--eval-tasks", card["first_tasks"], "--out", tmp_path) == 0
    record = json.loads(next(Path(tmp_path).glob("*.json")).read_text())
    assert record["tasks"] == card["first_tasks"] and record["test_steps"] == card["test_steps"]
    rows = {row["normalisation"]: row for row in record["per_step"] if row["steps"] == card["test_steps"]}
    assert rows.keys() == card["numbers"].keys() == card["numbers_of_first_tasks"].keys()
    for normalisation, expected in card["numbers_of_first_tasks"].items():
        row = rows[normalisation]
        if "accuracy" in expected:  # on another processor a query or two may differ
            queries = card["first_tasks"] * record["settings"]["ways"] * record["settings"]["queries"]
            assert row["accuracy"] == pytest.approx(expected["accuracy"], abs=2.5 / queries)
        else:
            loss = "loss_without_diverged"
            assert row[loss] == pytest.approx(expected[loss], rel=1e-3)
