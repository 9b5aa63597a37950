"""The sizes that tasks draw from ranges: each task is the one of its numbers, with padding behind it."""

from pathlib import Path

import pytest
import torch
from conftest import build_tasks, read_table, refused, write_classes
from runs import command
from test_image_tasks import image_set, on_the_host
from test_tables import numbered, write

from commands.adapt import load
from common.batch import TaskBatch, tree_map
from dataset import Custom, Harmonic, Sinusoid
from tasks.images import ImageTasks
from tasks.tables import TableTasks
from training.checkpoint import load_checkpoint

MANY = range(200)
SHORT = ("--threads", 1, "--val-tasks", 4)


def counted(batch: TaskBatch, task: int) -> list[torch.Tensor]:
    """Return the parts of a task without its padding, which is at the end."""
    parts = []
    for name in ("support", "query"):
        mask = getattr(batch, f"{name}_mask")
        count = None if mask is None else int(mask[task].sum())
        assert mask is None or mask[task, :count].all()
        parts += [getattr(batch, f"{name}_{part}")[task, :count] for part in "xy"]
    return parts


def assert_is_fixed_task(batch: TaskBatch, task: int, fixed: TaskBatch) -> None:
    for ours, theirs in zip(counted(batch, task), fixed, strict=True):
        assert torch.equal(ours, theirs[0])


def test_a_task_of_images_is_that_of_its_numbers():
    images = image_set([12] * 30)
    options = dict(quarter_turns=True)
    tasks = ImageTasks(images, ways="2-4", shots="1-3", queries="2-5", **options)
    batch = tasks.sample("train", 3, 5, MANY)
    assert batch.support_x.shape[1] == 12 and batch.query_x.shape[1] == 20
    sizes = set()
    for task in MANY:
        ways = int(batch.ways[task])
        shots, queries = (int(m[task].sum()) // ways for m in (batch.support_mask, batch.query_mask))
        sizes.add((ways, shots, queries))
        fixed = ImageTasks(images, ways=ways, shots=shots, queries=queries, **options)
        assert_is_fixed_task(batch, task, fixed.sample("train", 3, 5, range(task, task + 1)))
    assert sizes == {(n, k, q) for n in (2, 3, 4) for k in (1, 2, 3) for q in (2, 3, 4, 5)}
    host = on_the_host(images, ways="2-4", shots="1-3", queries="2-5", **options)
    part, host = (t.sample("train", 3, 5, range(7, 50)) for t in (tasks, host))
    for other in (part, host):
        tree_map(lambda a, b: torch.testing.assert_close(a[7:50], b, rtol=0, atol=0), batch, other)
    assert tasks.resized(2).sample("train", 3, 5, MANY).support_x.shape[1] == 8


def test_what_does_not_vary_has_no_mask():
    batch = ImageTasks(image_set([9] * 12), ways=3, shots="1-4", queries=2).sample("test", 0, 0, MANY)
    assert batch.query_mask is None and batch.ways is None and batch.query_x.shape[1] == 6
    batch = Sinusoid(5, "1-3").sample("test", 0, 0, MANY)
    assert batch.support_mask is None and set(batch.query_mask.sum(1).tolist()) == {1, 2, 3}


def test_small_classes_give_what_they_have():
    counts = [3, 9, 4, 6, 3, 12]
    tasks = ImageTasks(image_set(counts), ways=2, shots="1-5", queries="2-4")
    batch = tasks.sample("train", 0, 0, MANY)
    for task in MANY:
        x, labels, query_x, query_labels = counted(batch, task)
        for label in (0, 1):
            pixels = torch.cat([x[labels == label], query_x[query_labels == label]])[:, 0, 0] * 255
            classes, numbers = pixels.round().long()[:, :2].unbind(1)
            assert (classes == classes[0]).all() and len(set(numbers.tolist())) == len(numbers)
            assert len(numbers) <= counts[classes[0]] and (numbers < counts[classes[0]]).all()
            assert (query_labels == label).sum() >= 2
    with refused("class 'class 0' has 3 images, and -k plus -q is 4"):
        ImageTasks(image_set(counts), ways=2, shots="1-5", queries=3)


def test_a_task_of_a_table_is_that_of_its_numbers_or_all_that_it_has(tmp_path):
    table = numbered(tmp_path, tasks=12, classes=3)  # six rows of each class
    tasks = TableTasks(table=table, ways="2-3", shots="1-3", queries="1-3")
    batch = tasks.sample("train", 3, 5, MANY)
    for task in MANY:
        ways = int(batch.ways[task])
        shots, queries = (int(m[task].sum()) // ways for m in (batch.support_mask, batch.query_mask))
        fixed = TableTasks(table=table, ways=ways, shots=shots, queries=queries)
        if ways < 3:  # the classes of a fixed three keep their order
            assert_is_fixed_task(batch, task, fixed.sample("train", 3, 5, range(task, task + 1)))
    names = ["a"] * 3 + ["b"] * 8 + ["c"] * 20
    write(tmp_path / "a.csv", {"task": names, "x": range(31), "y": range(31)})
    table = read_table(tmp_path / "a.csv", shares={"train": 1})
    batch = TableTasks(table=table, ways=None, shots="2-30", queries="1-5").sample("train", 0, 0, MANY)
    seen = {}
    for task in MANY:
        x, y, query_x, query_y = counted(batch, task)
        rows = torch.cat([x, query_x])[:, 0].long().tolist()
        assert torch.equal(torch.cat([x, query_x]), torch.cat([y, query_y])) and len({*rows}) == len(rows)
        (name,) = {names[row] for row in rows}
        seen.setdefault(name, set()).add((len(x), len(query_x)))
    assert seen["a"] == {(2, 1)} and max(k + q for k, q in seen["c"]) == 20
    with refused("task 'a' has 3 rows, and -k plus -q is 4"):
        TableTasks(table=table, ways=None, shots="3-30", queries="1-5")


@pytest.mark.parametrize("family", [Sinusoid, Harmonic])
def test_curves_draw_their_numbers_of_points(family):
    batch = family("1-10", 5, noise=0.1).sample("train", 0, 3, range(2000))
    counts = torch.bincount(batch.support_mask.sum(1))
    assert counts[0] == 0 and len(counts) == 11 and counts[1:].min() > 120  # 200 expected
    again = family("1-10", 5, noise=0.1).sample("train", 0, torch.tensor(3), range(7, 9))
    tree_map(lambda a, b: torch.testing.assert_close(a[7:9], b, rtol=0, atol=0), batch, again)
    drawn = family("1-10", 5).sample_to_draw("train", 0, 3)
    assert drawn.query_mask is None and drawn.query_x.shape[1] == 200


# ---- the user's own ------------------------------------------------------------------------------

RAGGED = """
import torch

class Ragged:
    def __init__(self, shots, ways=None):
        self.shots, self.ways = shots, ways

    def sample(self, split, seeds):
        parts = []
        for seed in seeds.tolist():
            draw = torch.Generator().manual_seed(seed)
            least, most = self.shots
            mask = torch.zeros(2, most + 1, dtype=torch.bool)
            for row in mask:
                count = int(torch.randint(least, most + 1, (), generator=draw))
                row[torch.randperm(most + 1, generator=draw)[:count]] = True
            x = torch.randn(2, most + 1, 1, generator=draw)
            y = x.sin()
            if self.ways:
                number = int(torch.randint(self.ways[0], self.ways[1] + 1, (), generator=draw))
                y = torch.arange(most + 1).expand(2, -1) % number
                mask[:, :number] = True
            x = x.masked_fill(~mask[..., None], torch.nan)  # whatever
            y = y.masked_fill(~mask, -7) if self.ways else y.masked_fill(~mask[..., None], torch.nan)
            parts.append((x[0], y[0], x[1], y[1], mask[0], mask[1]))
        return tuple(map(torch.stack, zip(*parts)))
"""


def own_tasks(tmp_path: Path, **sizes) -> Custom:
    (tmp_path / "ragged.py").write_text(RAGGED)
    return build_tasks(f"{tmp_path}/ragged.py:Ragged", **sizes)


def test_an_own_sampler_gives_masks_and_any_padding(tmp_path):
    tasks = own_tasks(tmp_path, shots="2-5")
    batch = tasks.sample("train", 0, 0, range(30))
    assert set(batch.support_mask.sum(1).tolist()) == {2, 3, 4, 5} and batch.ways is None
    for task in range(30):
        x, y, query_x, query_y = counted(batch, task)
        assert torch.equal(x.sin(), y) and torch.equal(query_x.sin(), query_y)
        assert set(batch.support_x[task].flatten().tolist()) == set(x.flatten().tolist())
    tasks = own_tasks(tmp_path, shots="3-9", ways="2-3")
    batch = tasks.sample("train", 0, 0, range(30))
    most = [int(torch.cat([y, more]).max()) + 1 for _, y, _, more in (counted(batch, t) for t in range(30))]
    assert batch.ways.tolist() == most and set(most) == {2, 3}


# ---- runs ----------------------------------------------------------------------------------------


def test_a_head_that_learned_a_range_serves_fewer_classes_by_its_first_scores(tmp_path, refuse):
    write_classes(tmp_path / "classes", 40, 2)
    data = ["--dataset", f"images:{tmp_path / 'classes'}", "--image-size", 8, "--channels", 1, "-q", 1]
    line = [*data, "-n", "2-4", "-k", 1, "-s", 1, "--learner", "fc", "--iterations", 1, *SHORT]
    assert command(*line, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    x = torch.rand(3, 1, 8, 8)
    (few, weights, _), (most, whole, _) = (load(tmp_path / "run", x, outputs=n) for n in (3, 4))
    torch.testing.assert_close(few.call(weights, x), most.call(whole, x)[:, :3])
    tested = ["--eval", "--load", tmp_path / "run", "--eval-tasks", 2, "--eval-steps", 1]
    assert command(*tested, "-n", 3) == 0
    assert "has learned -n 2-4: lower it" in refuse(*tested, "-n", 5)


LEARNER = """
from torch import nn

class Attention(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x

def mixing(outputs, inputs):
    return nn.Sequential(nn.Linear(*inputs, 8), nn.Tanh(), Attention(), nn.Linear(8, outputs))

def plain(outputs, inputs):
    return nn.Sequential(nn.Linear(*inputs, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, outputs))

def normalised(outputs, inputs):  # the gradient of a bias before batch norm is rounding
    return nn.Sequential(nn.Linear(*inputs, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, outputs))

def worst(outputs, targets):
    return ((outputs - targets) ** 2).amax()

def mean(outputs, targets):
    return (outputs - targets).abs().mean()
"""


@pytest.mark.parametrize(
    ("learner", "loss", "is_noticed"),
    [
        ("normalised", "mean", False),
        ("mixing", "mean", True),
        ("plain", "worst", True),
    ],
)
def test_own_code_that_would_notice_padding_gets_tasks_without_it(
    learner, loss, is_noticed, tmp_path, capsys
):
    file = tmp_path / "own.py"
    file.write_text(LEARNER)
    line = ["--learner", f"{file}:{learner}", "--loss", f"{file}:{loss}", "-k", "1-5", "-q", 4, *SHORT]
    assert command(*line, "--iterations", 2, "--run-name", "r", "--checkpoint-path", tmp_path) == 0
    said = capsys.readouterr().err
    assert said.count("padding would change the results") == is_noticed
    assert "the meta-gradient agrees" in said
    assert load_checkpoint(tmp_path / "r" / "last.pt").settings["vectorise"] is not is_noticed
    same = ["--learner", line[1], "--loss", line[3]]
    assert command("--eval", "--load", tmp_path / "r", *same, "--eval-tasks", 8, "--eval-steps", 2) == 0
