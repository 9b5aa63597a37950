"""Several data sets at once: each task is one of theirs, in proportion, and each is measured by itself."""

import json
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from conftest import build_tasks, refused, write_classes
from PIL import Image
from runs import command, curves
from torch.nn import functional as F

from common.choices import Choices
from evaluation.meta_test import evaluate
from learner import build_learner
from maml import MAML
from tasks.pixels import Form

CURVES = "sinusoid + harmonic + sinusoid-frequency"
SHORT = ["--iterations", 6, "--val-every", 3, "--log-every", 2, "--meta-batch-size", 4, "--eval-tasks", 5]


build = partial(build_tasks, dtype=torch.float64)


def image_folders(tmp_path) -> list[str]:
    write_classes(tmp_path / "dark", 12, prefix="d")
    write_classes(tmp_path / "light", 12, prefix="l", first=150)
    return [f"images:{tmp_path / name}" for name in ("dark", "light")]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["curves", "images"])
def test_each_task_is_the_one_that_its_data_set_gives_alone(kind, tmp_path):
    names = CURVES.split(" + ") if kind == "curves" else image_folders(tmp_path)
    changes = {} if kind == "curves" else {"ways": 2, "quarter_turns": True}
    mixed, alone = build(" + ".join(names), **changes), [build(name, **changes) for name in names]
    for split in ("train", "validation", "test"):
        batch = mixed.sample(split, 3, 7, range(4, 40))
        singles = [part.sample(split, 3, 7, range(4, 40)) for part in alone]
        sources = set()
        for task in range(36):
            one = [tensor[task] for tensor in batch]
            found = [n for n, single in enumerate(singles) if equal(one, [t[task] for t in single])]
            assert len(found) == 1
            sources |= {*found}
        assert sources == {*range(len(names))}
    assert equal(
        mixed.resized(2).sample("train", 0, 0, range(9)),
        build(" + ".join(names), **changes, shots=2).sample("train", 0, 0, range(9)),
    )


def test_new_images_have_the_range_that_all_data_sets_share(tmp_path):
    for folder, one, number in product("ab", range(12), range(3)):
        place = tmp_path / folder / f"{folder}{one}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6), 65535 - one, np.uint16)).save(place / f"{number}.png")
    first, second = (f"images:{tmp_path / folder}" for folder in "ab")
    cases = {second: ["16-bit", "0.0", "65535.0"], image_folders(tmp_path)[0]: []}  # plain, or of several
    for other, expected in cases.items():
        record = build(f"{first} + {other}", ways=2).record.image_range
        assert Form(6, 1).recorded(record).record == expected


@pytest.mark.parametrize(
    ("mix", "shares"), [(None, (1 / 3, 1 / 3, 1 / 3)), ("5,1,2.5", (10 / 17, 2 / 17, 5 / 17))]
)
def test_data_sets_come_in_proportion_and_depend_on_the_task_alone(mix, shares):
    tasks, number = build(CURVES, mix=mix), 60_000
    numbers = tasks.choose("train", 0, 1, range(number))
    for position, share in enumerate(shares):
        deviation = (share * (1 - share) / number) ** 0.5
        assert (numbers == position).double().mean().item() == pytest.approx(share, abs=4 * deviation)
    assert torch.equal(tasks.choose("train", 0, 1, range(50, 70)), numbers[50:70])
    assert not torch.equal(tasks.choose("train", 0, 2, range(number)), numbers)


def test_a_mixture_is_measured_as_its_data_sets_are_alone():
    maml = MAML(build_learner("mlp", 1, init="torch").double(), F.mse_loss, Choices(inner_lr=0.01))
    how = {"tasks": 7, "steps": 2, "normalisations": ("transductive",)}
    parameters = maml.initial_parameters()
    mixed = evaluate(maml, parameters, build(CURVES, mix="8,1,1"), "validation", **how)
    alone = {
        name: evaluate(maml, parameters, build(name), "validation", **how) for name in CURVES.split(" + ")
    }
    for name, result in alone.items():
        assert torch.equal(mixed.parts[name].losses["transductive"], result.losses["transductive"])
    means = torch.stack([result.losses["transductive"].mean(0) for result in alone.values()])
    torch.testing.assert_close(mixed.losses["transductive"].mean(0), means.mean(0))


def test_a_run_is_chosen_by_the_mean_over_data_sets(tmp_path):
    line = [*SHORT, "--dataset", "sinusoid", "harmonic", "--mix", "1,3", "--checkpoint-path", tmp_path]
    assert command(*line, "--run-name", "whole") == 0
    shown = json.loads((tmp_path / "whole" / "training.json").read_text())
    validation = shown["validation"]
    for mean, one, other in zip(
        *(validation[f"query_loss{n}"] for n in ("", "/sinusoid", "/harmonic")), strict=True
    ):
        assert mean == pytest.approx((one + other) / 2, rel=1e-5)
    best = min(range(2), key=validation["query_loss"].__getitem__)
    assert shown["best_iteration"] == validation["iteration"][best]
    assert "validation_by_dataset/query_loss/harmonic" in curves(tmp_path / "whole")
    assert command("--eval", "--load", tmp_path / "whole") == 0
    (file,) = (tmp_path / "whole").glob("*-test-sinusoid+harmonic-*.json")
    record = json.loads(file.read_text())
    parts = [part["per_step"][1]["loss"] for part in record["by_dataset"].values()]
    assert record["per_step"][1]["loss"] == pytest.approx(sum(parts) / 2, rel=1e-5)


@pytest.mark.slow
def test_a_compiled_mixture_of_images_is_the_uncompiled_one(tmp_path, capsys):
    data = ["--dataset", *image_folders(tmp_path), "--image-size", 6, "--channels", 1, "-n", 2, "-q", 1]
    line = [*data, "--learner", "fc", "--iterations", 9, "--val-every", 9, "--log-every", 1]
    for mode in ("on", "off"):
        assert command(*line, "--compile", mode, "--checkpoint-path", tmp_path, "--run-name", mode) == 0
    assert "stays uncompiled" not in capsys.readouterr().err
    losses = [
        json.loads((tmp_path / m / "training.json").read_text())["training"]["query_loss"]
        for m in ("on", "off")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_data_set_that_trains_on_what_tests_another_is_refused(tmp_path):
    dark, light = image_folders(tmp_path)
    (tmp_path / "light" / "aa").mkdir()
    for file in (tmp_path / "dark" / "d00").iterdir():
        (tmp_path / "light" / "aa" / file.name).symlink_to(file)
    for number in range(1, 12):  # all classes, of which the other set trains on others
        (tmp_path / "light" / f"aa{number}").symlink_to(tmp_path / "dark" / f"d{number:02}")
    with refused("trains on what validates or tests"):
        build(f"{dark} + {light}", ways=2)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["sinusoid", "omniglot"], "expected several data sets to be curves"),
        (["table:a.csv", "table:b.csv"], "expected several data sets to be curves"),
        (["harmonic", "harmonic"], "expected each data set once"),
        (["sinusoid", "harmonic", "--mix", "1,2,3"], "--mix has 3 weights"),
        (["sinusoid", "--mix", "1,2"], "--mix has no meaning with --dataset sinusoid"),
        (["sinusoid", "harmonic", "--oracle"], "--oracle has no meaning with"),
        (["omniglot", "mini-imagenet"], "different sizes (28, 84): give --image-size"),
        (["omniglot", "images:x", "--image-size", "28", "--channels", "1", "--invert"], "each takes its own"),
    ],
)
def test_data_sets_that_do_not_go_together_are_refused_in_one_line(flags, problem, refuse, tmp_path):
    assert problem in refuse("--dataset", *flags, "--checkpoint-path", tmp_path)
