"""A sampler of the user's: what it may give, and what is refused because other things rely on it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import build_tasks, refused
from runs import command

from common.own_code import load_code

CODE = """
import numpy as np
import torch

class Lines:
    # y = a x: the task of a seed
    def numbers(self, split, seeds):
        generators = [np.random.default_rng([seed, len(split)]) for seed in seeds.tolist()]
        x = np.stack([generator.normal(size=(2, 5, 1)) for generator in generators])
        y = x * np.stack([generator.normal(size=(1, 1, 1)) for generator in generators])
        return x[:, 0], y[:, 0], x[:, 1], y[:, 1]

    def sample(self, split, seeds):
        return self.numbers(split, seeds)

class OneBuffer(Lines):
    buffers = np.zeros((4, 25, 5, 1))

    def sample(self, split, seeds):
        for buffer, part in zip(self.buffers, self.numbers(split, seeds)):
            buffer[:len(part)] = part
        return tuple(buffer[:len(seeds)] for buffer in self.buffers)

class Global(Lines):
    def numbers(self, split, seeds):
        return super().numbers(split, torch.randint(2**31, seeds.shape))

class FirstSeed(Lines):
    def numbers(self, split, seeds):
        return super().numbers(split, torch.arange(len(seeds)) + seeds[0])

class Hashed(Lines):
    salt = None  # that of the process

    def numbers(self, split, seeds):
        return super().numbers(split, (seeds + hash((split, self.salt))) % 2**31)

class Same(Lines):
    def numbers(self, split, seeds):
        return super().numbers(split, seeds * (split != "train"))

class Gaps(Lines):
    def __init__(self, part, value):
        self.part, self.value = part, value

    def sample(self, split, seeds):
        parts = super().sample(split, seeds)
        parts[self.part][-1, 0] = self.value
        return parts

class Changed(Lines):
    # what the argument makes of the four parts, a to d
    def __init__(self, change):
        self.change = change

    def sample(self, split, seeds):
        parts = dict(zip("abcd", super().sample(split, seeds)))
        return eval(str(self.change), {"np": np, "torch": torch, "split": split, **parts})
"""
LISTS = "change=[part.tolist() for part in (a, b, c, d)]"
TENSORS = "change=[[torch.tensor(t, requires_grad=True) for t in part] for part in (a, b, c, d)]"
WIDE = "change=(np.repeat(a, 1 + (split == 'validation'), 2), b, c, d)"


@pytest.fixture
def build(tmp_path):
    (tmp_path / "tasks.py").write_text(CODE)

    def build(name: str, arguments: Sequence[str] = (), dtype=torch.float64, **changes):
        changes |= dict(shots=5, queries=5, dataset_args=arguments)
        return build_tasks(f"{tmp_path / 'tasks.py'}:{name}", dtype=dtype, **changes)

    return build


@pytest.mark.parametrize(
    ("name", "change"), [("Changed", [LISTS]), ("Changed", [TENSORS]), ("OneBuffer", [])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_lists_and_reused_buffers_give_the_same_tasks(build, name, change, dtype):
    expected, tasks = build("Lines", dtype=dtype), build(name, change, dtype=dtype)
    kept = [
        (tasks.sample("train", 0, i, range(6)), expected.sample("train", 0, i, range(6))) for i in range(3)
    ]
    for batch, same in kept:  # after the next ones were fetched
        for part, other in zip(batch, same, strict=True):
            assert part.dtype == dtype and torch.equal(part, other) and not part.requires_grad
    seeds = expected._draw_seeds("train", 0, 0, range(6)).tolist()
    x = np.stack([np.random.default_rng([seed, 5]).normal(size=(2, 5, 1)) for seed in seeds])
    assert torch.equal(kept[0][1].query_x, torch.tensor(x[:, 1]).to(dtype))


def test_labels_of_any_whole_type_are_labels(build):
    label = "[[0, 1, 0, 1, 0]] * len(a)"
    change = f"change=(a, np.uint8({label}), c, np.int32({label}))"
    batch = build("Changed", [change], ways=2).sample("train", 0, 0, range(3))
    assert batch.support_y.dtype == batch.query_y.dtype == torch.int64
    assert batch.support_y.tolist() == [[0, 1, 0, 1, 0]] * 3


WRONG = {
    "('a', b, c, d)": r"should give tensors \[tasks, examples, ...\]",
    "([list(t[: 2 + i]) for i, t in enumerate(a)], b, c, d)": r"should give tensors \[tasks, examples, ...\]",
    "([], [], [], [])": r"should give tensors \[tasks, examples, ...\]",
    "None": "should give four tensors",
    "(a, b, c)": "should give four tensors",
    "(a, b[:, :2], c, d)": "different numbers of tasks or examples",
    "(a[:, :0], b[:, :0], c, d)": "gives no examples",
    "(a, b + 0j, c, d + 0j)": "gives complex targets: give real and imaginary parts",
    "(a, b[..., 0], c, d[..., 0])": "targets without an axis of their own",
    "(a, b, c, d, a[..., 0] < 9, np.arange(len(a))[:, None] + 0 * c[..., 0] > 0)": "mask leaves no example",
    "(a, b, c, d, a[..., 0] < 9, c[..., 0])": "should give masks that are bool",
}


@pytest.mark.parametrize("change", WRONG)
def test_what_is_no_batch_is_refused_with_its_reason(build, change):
    with refused(rf"sample\('train', 4 seeds\) .*{WRONG[change]}"):
        build("Changed", [f"change={change}"])


@pytest.mark.parametrize(
    "change", ["(a, b[..., 0], c, d[..., 0])", "(a, 0 * b[..., 0].astype(int) + 2, c, d)"]
)
def test_labels_are_whole_numbers_below_the_ways(build, change):
    with refused("labels that are not int64 from 0 to 1"):
        build("Changed", [f"change={change}"], ways=2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Global", [], "other numbers when called again, and resuming, comparing and several processes"),
        ("FirstSeed", [], "other numbers for a seed when it is alone, and chunks of tasks"),
        ("Changed", [WIDE], r"'validation', seeds\) gives .* \[\(2,\), .* and for 'train' \[\(1,\), "),
    ],
)
def test_what_cannot_be_resumed_or_differs_by_split_is_refused_in_a_line(build, name, change, message):
    with refused(message):
        build(name, change)


def test_nan_is_refused_unless_the_loss_may_take_gaps_among_targets(build):
    for number, part in enumerate(("support_x", "support_y", "query_x", "query_y")):
        for value in ("nan", "inf", "-inf"):
            gaps = (f"part={number}", f"value={value}")
            with refused(f"'train', seeds\\) gives NaN or infinity in {part}: "):
                build("Gaps", arguments=gaps)
            if part.endswith("y"):
                build("Gaps", arguments=gaps, scale_targets=False)


def test_a_sampler_that_differs_in_every_process_is_not_resumed(build, tmp_path, monkeypatch, capsys):
    name = f"{tmp_path / 'tasks.py'}:Hashed"
    build("Hashed")
    line = ["--dataset", name, "--learner", "mlp", "--eval-tasks", 2, "-k", 5, "-q", 5]
    run = ["--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*line, *run, "--iterations", 1) == 0
    load = ["--load", tmp_path / "run" / "last.pt", "--dataset", name]
    assert command("--eval", *load) == 0
    monkeypatch.setattr(load_code(name, "--dataset"), "salt", "another process")
    capsys.readouterr()
    for test in (["--eval"], ["--iterations", 2]):
        assert command(*test, *load) == 2
        assert "sample gave other tasks for the same seeds" in capsys.readouterr().err


def test_seeds_that_change_nothing_are_said(build, tmp_path, capsys):
    assert build("Lines").summary == []
    build("Same")
    line = ["--dataset", f"{tmp_path / 'tasks.py'}:Same", "--learner", "mlp", "--iterations", 1]
    assert command(*line, "--eval-tasks", 2, "--checkpoint-path", tmp_path) == 0
    assert "  data     sample gives the same task for every seed: train" in capsys.readouterr().out


def test_binary_cross_entropy_refuses_targets_that_are_no_shares(build, tmp_path, refuse):
    build("Lines")
    line = ["--dataset", f"{tmp_path / 'tasks.py'}:Lines", "--learner", "mlp", "--loss", "bce"]
    message = refuse(*line, "--iterations", 1, "--checkpoint-path", tmp_path)
    assert "--loss bce takes targets from 0 to 1: a task has some from -" in message
