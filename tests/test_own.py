"""One's own network, data and tasks, from the command line: trained, tested, adapted, refused."""

import csv
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image
from runs import assert_same_bits, command
from torch import nn
from torch.nn import functional as F

from commands import build as building
from commands import config
from commands.adapt import adapt_to, load
from common.random import Stream
from dataset import build_distribution
from learner import build_learner
from tasks.omniglot import split_characters
from tasks.options import TaskOptions
from training.checkpoint import LAST, load_checkpoint, save_checkpoint

SHORT = ["--iterations", 1, "--eval-tasks", 4, "--eval-steps", 2, "--test-steps", 2, "--precision", "float64"]
SEQUENCES = f"{ROOT / 'examples' / 'sequences.py'}:"

OWN_NETWORK = """
import torch
from torch import nn
from helper_beside import SIZE

class Net(nn.Module):
    def __init__(self, outputs, inputs, hidden=4, dropout=0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs[0], hidden, SIZE, stride=2), nn.BatchNorm2d(hidden), nn.Tanh(), nn.Flatten(),
            nn.Dropout(dropout))
        self.head = nn.LazyLinear(outputs)
        self(torch.zeros(2, *inputs))  # the lazy layer's size

    def forward(self, x):
        return self.head(self.layers(x))

class Item(Net):
    def forward(self, x):
        return super().forward(x) if x.sum().item() > -1e9 else x

class Wrong(Net):
    def forward(self, x):
        return super().forward(x)[:, :1]

class Strange(nn.Module):
    # a frozen layer, a buffer, a normalisation that is never called, and an argument called name
    def __init__(self, outputs, name="x", flag=2):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(1, 4), nn.Linear(4, 4), nn.Linear(4, outputs)
        self.middle.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("scale", torch.full((4,), 0.5))

    def forward(self, x):
        return self.last(self.scale * self.middle(torch.tanh(self.first(x))))

def nothing(outputs):
    return 3

def failing(outputs):
    raise RuntimeError("it is\\nnot ready")

def cubed(outputs, targets, power=3):
    wanted = torch.nn.functional.one_hot(targets, 2) if False else (targets[:, None] == torch.arange(2))
    return ((outputs - wanted.to(outputs.dtype)).abs() ** power).mean()

def vector(outputs, targets):
    return (outputs - torch.nn.functional.one_hot(targets, 2)).square().mean(1)

class Labels:
    def sample(self, split, seeds):
        x, y = torch.zeros(len(seeds), 4, 1), torch.tensor([0, 1, 2, 0]).expand(len(seeds), 4)
        return x, y, x, y

class Flat:
    def sample(self, split, seeds):
        x = torch.zeros(len(seeds), 4, 1)
        return x, x[..., 0], x, x[..., 0]

class Wider:
    def sample(self, split, seeds):
        x = torch.zeros(len(seeds), 4, 1 + (split == "validation"))
        return x, x[..., :1], x, x[..., :1]

class Shapeless:
    def sample(self, split, seeds):
        return torch.zeros(len(seeds), 3, 1), torch.zeros(len(seeds), 3, 1), torch.zeros(len(seeds), 2, 1), 5

class Silent:
    pass
"""


@pytest.fixture(autouse=True)
def _few_validation_tasks(monkeypatch):
    monkeypatch.setattr("training.trainer.VALIDATION_TASKS", 4)


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder with code of the user's, which imports what lies beside it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_NETWORK)
    (folder / "helper_beside.py").write_text("SIZE = 3\n")
    yield folder
    sys.modules.pop("helper_beside", None)
    sys.path[:] = [path for path in sys.path if path != str(folder)]


def make_images(folder: Path, classes: int, images: int, *, size: int = 12, channels: int = 1) -> Path:
    """A folder per class, of noise around a brightness of the class's own."""
    generator = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
        for image in range(images):
            shape = (size, size) if channels == 1 else (size, size, channels)
            pixels = generator.integers(0, 60, shape) + 190 * number // classes
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{number}" / f"{image}.png")
    return folder


def images_flags(folder: Path) -> list[object]:
    return ["--dataset", f"images:{folder}", "--image-size", 8, "--channels", 1, "-n", 2, "-k", 2, "-q", 2,
            "--split-shares", "2,1,2"]  # fmt: skip


def plain_loop(
    learner: nn.Module, loss: Callable, batch, *, steps: int, inner_lr: float
) -> dict[str, torch.Tensor]:
    """MAML's exact meta-gradient, one task after the other, on the user's module itself."""
    parameters = dict(learner.named_parameters())
    total = 0.0
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for support_x, support_y, query_x, query_y in zip(*batch, strict=True):
            weights = dict(parameters)
            for _ in range(steps):
                value = loss(torch.func.functional_call(learner, weights, (support_x,)), support_y)
                found = torch.autograd.grad(value, list(weights.values()), create_graph=True)
                pairs = zip(weights.items(), found, strict=True)
                weights = {name: w - inner_lr * g for (name, w), g in pairs}
            total = total + loss(torch.func.functional_call(learner, weights, (query_x,)), query_y)
    gradients = torch.autograd.grad(total / len(batch.support_x), list(parameters.values()))
    return dict(zip(parameters, gradients, strict=True))


def assert_a_step_is_that_of_a_plain_loop(tmp_path: Path, flags: list[object], *, steps: int) -> None:
    """One iteration from the command line, with SGD at rate 1, moves the weights by the meta-gradient."""
    flags = [*flags, "-s", steps, "--inner-lr", 0.05, "--meta-optimizer", "sgd", "--meta-lr", 1.0,
             "--grad-clip", 1e6, "--meta-batch-size", 2, *SHORT]  # fmt: skip
    home = ["--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*flags, *home) == 0
    given = config.parse([str(flag) for flag in flags])
    settings, call = config.resolve(given), config.check_invocation(given)
    runtime = building.prepare(settings, call)
    batch = building.tasks_of(settings, call, runtime).sample("train", 0, 1, range(2))
    outputs = settings.ways or batch.support_y.shape[-1]
    learner = building.module_of(settings, runtime, outputs, batch.support_x[0])
    before = {name: w.detach().clone() for name, w in learner.named_parameters()}
    loss = F.cross_entropy if settings.classification else F.mse_loss
    gradients = plain_loop(learner, loss, batch, steps=steps, inner_lr=0.05)
    after = load_checkpoint(tmp_path / "run" / LAST).parameters
    scale = max(g.abs().max().item() for g in gradients.values())
    assert scale > 1e-4
    for name, gradient in gradients.items():
        assert (before[name] - gradient - after[name]).abs().max().item() < 1e-9 * scale, name
    code = building.own_code_flags(settings)
    assert command("--eval", "--load", tmp_path / "run" / LAST, *code) == 0
    (result,) = (tmp_path / "run").glob("last-test-*.json")
    assert len(json.loads(result.read_text())["per_task"]["loss"]["transductive"]) == 4


def test_resnet18_on_a_folder_of_images(tmp_path):
    folder = make_images(tmp_path / "data", 10, 4, size=40, channels=3)
    flags = images_flags(folder)
    flags[flags.index("--image-size") + 1] = 32
    flags[flags.index("--channels") + 1] = 3
    assert_a_step_is_that_of_a_plain_loop(tmp_path, [*flags, "--learner", "torchvision:resnet18"], steps=1)


def test_a_trained_network_of_torchvisions_keeps_its_body_and_gets_a_new_head(monkeypatch):
    trained = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: trained)
    network = build_learner("torchvision:resnet18", 3, inputs=(1, 32, 32), arguments={"weights": "DEFAULT"})
    assert network.eval()(torch.rand(2, 1, 32, 32)).shape == (2, 3)  # and takes grey images
    for name, w in network.network.state_dict().items():
        assert name.startswith("fc.") or torch.equal(w, trained[name]), name


@pytest.mark.parametrize(
    "learner", [["transformer", "--learner-args", "width=8", "heads=2"], ["gru"], ["gru", "--learner-args",
                "cell=lstm", "width=6"]], ids=["transformer", "gru", "lstm"],
)  # fmt: skip
def test_a_transformer_and_recurrent_networks_on_sequences(learner, tmp_path):
    data = ["--dataset", f"{SEQUENCES}Sequences", "--dataset-args", "length=6", "-n", 2, "-k", 3, "-q", 3]
    flags = [*data, "--learner", SEQUENCES + learner[0], *learner[1:]]
    assert_a_step_is_that_of_a_plain_loop(tmp_path, flags, steps=2)


def test_a_network_of_sines_on_harmonic_tasks(tmp_path):
    learner = ["--learner", f"{ROOT / 'examples' / 'sines.py'}:sines", "--learner-args", "width=6"]
    assert_a_step_is_that_of_a_plain_loop(tmp_path, ["--dataset", "harmonic", *learner], steps=2)


def test_a_module_from_another_folder(elsewhere, tmp_path):
    folder = make_images(tmp_path / "data", 10, 4)
    flags = [*images_flags(folder), "--learner", f"{elsewhere / 'own.py'}:Net", "--learner-args", "hidden=3"]
    assert_a_step_is_that_of_a_plain_loop(tmp_path, flags, steps=2)


def test_one_task_after_another_is_the_same_to_rounding(elsewhere, tmp_path, capsys):
    flags = [*images_flags(make_images(tmp_path / "data", 10, 4)), "--learner-args", "hidden=3"]
    home = ["--checkpoint-path", tmp_path, *SHORT, "--meta-batch-size", 2]
    item, net = (["--learner", f"{elsewhere / 'own.py'}:{name}"] for name in ("Item", "Net"))
    assert command(*flags, *item, *home, "--run-name", "item") == 2
    said = capsys.readouterr().err
    assert "Item itself cannot be vectorised" in said and "--no-vectorise" in said
    assert not (tmp_path / "item").exists()
    assert command(*flags, *item, *home, "--run-name", "item", "--no-vectorise") == 0
    assert command(*flags, *net, *home, "--run-name", "net") == 0
    runs = [load_checkpoint(tmp_path / name / LAST).parameters for name in ("item", "net")]
    for name, w in runs[0].items():
        assert torch.allclose(w, runs[1][name], atol=1e-9), name


def test_with_dropout_and_ones_own_tasks_a_run_that_goes_on_ends_with_the_same_bits(tmp_path):
    flags = ["--dataset", f"{SEQUENCES}Sequences", "-n", 2, "-k", 2, "-q", 2, "-s", 2, "--meta-batch-size", 2,
             "--learner", f"{SEQUENCES}transformer", "--learner-args", "width=8", "heads=2", "dropout=0.3",
             "--val-every", 2, "--log-every", 2, "--checkpoint-path", tmp_path]  # fmt: skip
    assert command(*flags, "--iterations", 4, "--run-name", "whole") == 0
    assert command(*flags, "--iterations", 2, "--run-name", "stopped") == 0
    code = ["--dataset", f"{SEQUENCES}Sequences", "--learner", f"{SEQUENCES}transformer"]
    last = tmp_path / "stopped" / LAST
    assert command("--load", last, "--iterations", 4, *code) == 0
    runs = [load_checkpoint(tmp_path / name / LAST) for name in ("whole", "stopped")]
    assert_same_bits(*({"w": run.parameters, "adam": run.optimizer} for run in runs))
    other = ["--learner-args", "width=8", "heads=2", "dropout=0.0"]
    assert command(*flags, *other, "--iterations", 4, "--run-name", "without") == 0
    a, b = (
        load_checkpoint(tmp_path / name / LAST).parameters["head.weight"] for name in ("whole", "without")
    )
    assert not torch.equal(a, b)


def test_frozen_layers_and_buffers_in_half_precision_saved_and_moved(elsewhere, tmp_path, capsys):
    """Trained in bfloat16, tested after the code has moved, adapted, and its weights loaded."""
    code, moved = elsewhere / "own.py", elsewhere / "moved.py"
    flags = ["--learner", f"{code}:Strange", "--learner-args", "name=y", "flag=3", "-k", 3, "-q", 3]
    home = ["--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*flags, "--iterations", 2, "--precision", "bf16", *home) == 0
    code.rename(moved)
    last = tmp_path / "run" / LAST
    assert set(load_checkpoint(last).fixed) >= {"middle.weight", "scale", "norm.running_mean"}
    there = ["--load", last, "--learner", f"{moved}:Strange"]
    assert command("--eval", *there, "--eval-tasks", 4, "--eval-steps", 1) == 0
    assert command("--eval", "--load", last, "--learner", f"{moved}:Net") == 2
    path = write_table(tmp_path / "mine.csv", [[0, 1], [1, 2], [2, ""]], "x,y")
    assert command("--adapt", path, *there) == 0
    weights = torch.load(tmp_path / "run" / "last-adapted-mine-weights.pt", weights_only=True)
    assert torch.equal(weights["middle.weight"], load_checkpoint(last).fixed["middle.weight"])
    x = torch.tensor([[0.0], [1.0]])
    maml, parameters, _ = load(last, example=x, learner=f"{moved}:Strange")
    adapted = adapt_to(maml, parameters, x, torch.tensor([[1.0], [2.0]]), steps=1)
    with (tmp_path / "run" / "last-adapted-mine.csv").open() as file:
        predicted = float(list(csv.reader(file))[1][1])
    assert adapted.predict(torch.tensor([[2.0]])).item() == pytest.approx(predicted, abs=0.02)  # bfloat16


def test_modules_beside_ones_own_come_before_the_tools_of_that_name(elsewhere, tmp_path, capsys):
    (elsewhere / "config.py").write_text("WIDTH = 7\n")
    text = "import config\nfrom torch import nn\ndef build(outputs):\n    return nn.Sequential("
    (elsewhere / "learner.py").write_text(text + "nn.Linear(1, config.WIDTH), nn.Linear(7, outputs))\n")
    flags = ["--iterations", 1, "--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command("--learner", f"{elsewhere / 'learner.py'}:build", *flags) == 0
    assert load_checkpoint(tmp_path / "run" / LAST).parameters["0.weight"].shape == (7, 1)
    assert sys.modules["config"] is config
    assert command("--learner", "learner:build", *flags[:-1], "other") == 2
    assert "learner is a module of this tool: name the file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["images", "table"])
def test_a_checkpoint_is_not_tested_on_what_it_may_have_been_trained_on(kind, tmp_path, capsys):
    """A class more, and the shuffle deals all of them anew."""
    if kind == "images":
        flags = [*images_flags(make_images(tmp_path / "data", 10, 4)), "--learner", "conv"]
    else:
        flags = ["--dataset", f"table:{curves_table(tmp_path / 'curves.csv')}", "-k", 3, "-q", 3]
    assert command(*flags, *SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    if kind == "images":
        shutil.copytree(tmp_path / "data" / "class0", tmp_path / "data" / "another")
    else:
        rows = "".join(f"another,{x},{x}\n" for x in range(6))
        with (tmp_path / "curves.csv").open("a") as file:
            file.write(rows)
    last = tmp_path / "run" / LAST
    for line in (["--eval", "--load", last], ["--load", last, "--iterations", 2]):
        assert command(*line) == 2
        assert "its data had another" in capsys.readouterr().err
    assert command("--eval", "--load", last, "--eval-dataset", flags[1]) == 2
    assert "is what the checkpoint learned from" in capsys.readouterr().err


def test_a_table_without_validation_tasks_is_refused_before_there_is_a_run(tmp_path, capsys):
    rows = [[t, x, x, "train"] for t in "ab" for x in range(6)]
    path = write_table(tmp_path / "t.csv", rows, "task,x,y,split")
    flags = ["--dataset", f"table:{path}", "-k", 2, "-q", 2]
    assert command(*flags, "--checkpoint-path", tmp_path / "runs") == 2
    assert f"{path} has no validation tasks" in capsys.readouterr().err and not (tmp_path / "runs").exists()


# ---- what a checkpoint may not do -----------------------------------------------------------


@pytest.mark.parametrize("setting", config.OWN_CODE)
@pytest.mark.parametrize("doing", [["--eval"], [], ["--adapt", "x.csv"]], ids=["eval", "go on", "adapt"])
def test_code_that_a_checkpoint_names_is_never_imported(setting, doing, tmp_path, capsys, monkeypatch):
    assert command("--iterations", 1, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    last = tmp_path / "run" / LAST
    saved = load_checkpoint(last)
    harmful = replace(
        saved, config=replace(saved.config, **{setting: "os:system"}, task_type="regression", init="torch")
    )
    save_checkpoint(last, harmful)
    monkeypatch.setattr("common.own_code.load_code", lambda *_: pytest.fail("it was imported"))
    for module in ("learner", "losses", "dataset"):
        monkeypatch.setattr(f"{module}.load_code", lambda *_: pytest.fail("it was imported"))
    capsys.readouterr()
    data_does_not_matter = setting == "dataset" and "--adapt" in doing
    assert command(*doing, "--load", last) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if not data_does_not_matter:
        assert f"if you trust it, add --{setting} os:system" in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--learner {own}:Missing", "has no Missing to call: it has Net, Item, Wrong"),
        ("--learner {own}x.py:Net", "there is no such file"),
        ("--learner not_there.at_all:Net", "ModuleNotFoundError: No module named 'not_there'"),
        ("--learner {own}:nothing", "makes a int, not a torch.nn.Module"),
        ("--learner {own}:failing", "RuntimeError: it is not ready"),
        ("--learner {own}:Net --learner-args width=3", "unexpected keyword argument 'width'"),
        ("--learner {own}:Wrong", "they should be (4, 2), [examples, outputs]"),
        ("--learner {own}:Net --learner-args hidden", "--learner-args: expected NAME=VALUE, got 'hidden'"),
        ("--learner torchvision:resnet19", "no classification model of that name"),
        ("--learner {own}:Net --head nowhere --fast-weights head", "has no part 'nowhere'"),
        ("--loss {own}:hinge", "has no hinge to call"),
        ("--loss {own}:vector --learner {own}:Net", "it should give one number"),
        ("--image-size 3 --learner conv4", "nothing is left for its last layers"),
        ("--head-init zero --inner-rates element", "use layer-step"),
        ("--loss cross-entropy --loss-args x=1", "unexpected keyword argument 'x'"),
        ("--loss mse", "--loss mse is for numbers"),
        ("--head-init prototype --fast-weights body", "it needs a head that the inner loop adapts"),
        ("--head-init prototype --proximal 1", "each at its own"),
        ("--no-vectorise --compile on", "use --compile off"),
        ("--augment flip,blur", "--augment: expected some of flip, crop, rotate"),
        ("--split-shares 0,1,1", "--split-shares: expected three whole numbers"),
    ],
)
def test_a_mistake_about_ones_own_code_is_one_line(flags, expected, elsewhere, tmp_path, capsys):
    folder = make_images(tmp_path / "data", 10, 4)
    line = flags.format(own=elsewhere / "own.py").split()
    assert command(*images_flags(folder), *line, "--checkpoint-path", tmp_path / "runs", *SHORT) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Preparing")]
    assert len(said) == 1 and said[0].startswith("main.py: error: ") and expected in said[0], said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Shapeless", "gives no tensor as query_y"),
        ("Silent", "makes a Silent without a method sample"),
        ("Labels", "gives labels from 0 to 2"),
        ("Flat", "gives targets without an axis of their own"),
        ("Wider", "those of validation tasks (2,)"),
    ],
)
def test_tasks_of_ones_own_that_are_none(name, expected, elsewhere, tmp_path, capsys):
    flags = ["--dataset", f"{elsewhere / 'own.py'}:{name}", *(["-n", 2] if name == "Labels" else [])]
    assert command(*flags, "--checkpoint-path", tmp_path / "runs") == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_loss_of_ones_own_is_minimised(elsewhere, tmp_path):
    flags = [*images_flags(make_images(tmp_path / "data", 10, 4)), "--learner", f"{elsewhere / 'own.py'}:Net"]
    flags += ["--loss", f"{elsewhere / 'own.py'}:cubed", "--loss-args", "power=2", *SHORT]
    assert command(*flags, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    training = json.loads((tmp_path / "run" / "training.json").read_text())
    assert 0.05 < training["training"]["query_loss"][0] < 1.0  # cross-entropy would begin near 0.7 or above


# ---- data -----------------------------------------------------------------------------------


def snapshot(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


def no_image(folder: Path) -> None:
    (folder / "class3" / "1.png").write_text("not an image")


def empty_class(folder: Path) -> None:
    (folder / "empty").mkdir()


def few_images(folder: Path) -> None:
    (folder / "class3" / "1.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "expected"), [(no_image, "1.png"), (empty_class, "empty"), (few_images, "class3")]
)
def test_bad_images_are_named_and_nothing_stays_behind(spoil, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_images(tmp_path / "data", 10, 4)
    spoil(folder)
    before = snapshot(folder)
    assert command(*images_flags(folder), "--checkpoint-path", tmp_path / "runs", *SHORT) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("main.py: error: ") and expected in said
    left = {path for path in snapshot(folder) - before if path.suffix != ".npy"}
    assert not left and not (tmp_path / "runs").exists() and not (tmp_path / "cache").exists()


def write_table(path: Path, rows: list[list[object]], header: str = "task,x,y") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def curves_table(path: Path) -> Path:
    words = Stream.from_seed(1).at(torch.arange(10)).uniform(8, -1.0, 1.0, torch.float64)
    rows = [[f"t{task}", x, task * x] for task in range(10) for x in words[task].tolist()]
    return write_table(path, rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("task,x,y", "task,x,z"), "no column 'y'"),
        (lambda text: text.replace("task,x,y", "group,x,y"), "no column 'task'"),
        (lambda text: text + "t1,nan,2\n", "82"),
        (lambda text: text + "t1,3,\n", "82"),
        (lambda text: text + "late,3,2\n", "task 'late' has 1 row"),
    ],
)
def test_bad_tables_are_named(change, expected, tmp_path, capsys):
    path = curves_table(tmp_path / "curves.csv")
    path.write_text(change(path.read_text()))
    flags = ["--dataset", f"table:{path}", "-k", 3, "-q", 3, "--checkpoint-path", tmp_path / "runs"]
    assert command(*flags, "--iterations", 1) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1 and not (tmp_path / "runs").exists(), said


def test_omniglot_from_its_folders_is_omniglot(small_omniglot, tmp_path):
    """Class lists of the same split make the same tasks to the bit, and so the same accuracy."""
    data = tmp_path / "omniglot-py"
    shutil.unpack_archive(data / "images_evaluation.zip", data)
    (data / "images_evaluation.zip").unlink()
    folders = sorted({path.parent.relative_to(data).as_posix() for path in data.glob("images_*/*/*/*.png")})
    assert len(folders) == 16
    for split, characters in split_characters(folders, "random").items():
        name = "val" if split == "validation" else split
        (data / f"{name}.csv").write_text("\n".join(["label", *characters]) + "\n")
    common = dict(ways=2, shots=2, queries=3, image_size=28, channels=1, invert=True)
    omniglot, folder = (
        build_distribution(TaskOptions(**options, **common), data_root=tmp_path, device=torch.device("cpu"))
        for options in ({"dataset": "omniglot"}, {"dataset": f"images:{data}", "quarter_turns": True})
    )
    for split in ("train", "validation", "test"):
        ours, theirs = (d.sample(split, 3, 5, range(6)) for d in (folder, omniglot))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_trained_on_one_set_and_tested_on_another_with_other_ways(tmp_path, capsys):
    train = make_images(tmp_path / "train", 10, 5)
    other = make_images(tmp_path / "other", 4, 5, size=20, channels=3)
    flags = [*images_flags(train), "--learner", "conv", *SHORT, "--checkpoint-path", tmp_path]
    assert command(*flags, "--run-name", "learned") == 0
    assert command(*flags, "--run-name", "prototype", "--head-init", "prototype") == 0
    test = ["--eval", "--eval-dataset", f"images:{other}", "--load"]
    assert command(*test, tmp_path / "learned" / LAST) == 0
    assert command(*test, tmp_path / "prototype" / LAST, "-n", 4, "-k", 1) == 0
    (result,) = (tmp_path / "prototype").glob("*-4way-1shot-*.json")
    settings = json.loads(result.read_text())["settings"]
    assert settings["dataset"] == f"images:{other}" and settings["channels"] == 1
    capsys.readouterr()
    for line, expected in (
        (["-n", 4], "-n 4 disagrees with the checkpoint, which has 2"),
        (["-n", 4], "a run with --head-init zero or prototype can be tested with any number of ways"),
        (["--dataset", f"images:{other}"], "give the latter alone"),
    ):
        assert command(*test, tmp_path / "learned" / LAST, *line) == 2
        assert expected in capsys.readouterr().err
    assert command("--eval", "--load", tmp_path / "learned" / LAST, "--eval-dataset", "sinusoid") == 2
    assert "is regression, and the checkpoint learned classification" in capsys.readouterr().err
