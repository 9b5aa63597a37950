"""The checkpoints in the box: each is the file of its card, and says what its card says."""

import hashlib
import json
import os
import shlex

import pytest
import torch
from conftest import ROOT

import main
from commands import config
from training.checkpoint import BEST, load_checkpoint

FOLDER = ROOT / "checkpoints" / "pretrained"
CARDS = {file.parent.name: json.loads(file.read_text()) for file in sorted(FOLDER.glob("*/card.json"))}
NO_DATA = "omniglot" if "MAML_DATA_ROOT" not in os.environ else ""


def cards():
    for name, card in CARDS.items():
        missing = card["data"] == NO_DATA
        yield pytest.param(
            name, card, id=name, marks=pytest.mark.skipif(missing, reason="MAML_DATA_ROOT is not set")
        )


def test_each_folder_has_a_card_and_a_row_in_the_index():
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()}
    index = (FOLDER / "README.md").read_text()
    assert folders == set(CARDS) != set()
    assert all(f"`{name}`" in index for name in folders)
    assert len({frozenset(card) for card in CARDS.values()}) == 1  # all of one version of the script


@pytest.mark.parametrize(("name", "card"), CARDS.items(), ids=CARDS)
def test_the_file_is_the_cards_and_holds_an_initialisation_alone(name, card):
    file = FOLDER / name / BEST
    checkpoint = load_checkpoint(file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card["sha256"]
    assert checkpoint.optimizer == {} and file.stat().st_size < 2**20
    assert {weight.dtype for weight in checkpoint.parameters.values()} == {torch.float32}
    given = config.parse(shlex.split(card["trained_by"])[2:])
    trained = config.resolve(given)
    assert config.what_is_learned(trained) == config.what_is_learned(checkpoint.config)
    assert (checkpoint.iteration, checkpoint.config.seed) == (card["iteration"], card["seed"])


@pytest.mark.parametrize(("name", "card"), list(cards()))
def test_its_command_says_what_the_card_says(name, card, tmp_path, monkeypatch, capsys):
    """Of images but MAML's on the first of the tasks alone, which are the same for any number of them."""
    monkeypatch.chdir(ROOT)
    command = shlex.split(card["tested_by"])
    assert command[:5] == ["python", "main.py", "--eval", "--load", f"checkpoints/pretrained/{name}"]
    whole = name == "omniglot-5way-1shot-maml"
    number, numbers = (
        (card["test_tasks"], card["numbers"])
        if whole
        else (card["first_tasks"], card["numbers_of_first_tasks"])
    )
    tasks = ["--eval-tasks", str(number)]
    assert main.main([*command[2:], *tasks, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert record["tasks"] == number and record["test_steps"] == card["test_steps"]
    rows = {row["normalisation"]: row for row in record["per_step"] if row["steps"] == card["test_steps"]}
    assert rows.keys() == card["numbers"].keys() == card["numbers_of_first_tasks"].keys()
    for normalisation, said in numbers.items():
        found = rows[normalisation]
        if "accuracy" in said:  # another processor may decide a query or two otherwise
            queries = number * record["settings"]["ways"] * record["settings"]["queries"]
            assert found["accuracy"] == pytest.approx(said["accuracy"], abs=2.5 / queries)
        else:
            key = "loss_without_diverged"
            assert found[key] == pytest.approx(said[key], rel=1e-3)
