"""Learners, losses and tasks of a user's code, from the command line: trained, resumed, tested, refused."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, write_noise
from plain_loop import LR, STEPS, plain_loop
from runs import assert_same_bits, command, train
from torch.nn import functional as F

from commands.build import build, build_algorithm, prepare
from commands.call import check_call
from commands.config import OWN_CODE
from commands.parser import parse
from commands.resolve import resolve
from common.errors import UsageError
from learner import build_learner
from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoints
from training.folders import LAST

FEW = ["--eval-tasks", 4, "--eval-steps", 2, "--test-steps", 2]
SHORT = ["--iterations", 1, "--precision", "float64", *FEW]
SEQUENCES = f"{ROOT / 'examples' / 'sequences.py'}:"

CODE = """
import torch
from torch import nn
from neighbour import SIZE

class Net(nn.Module):
    def __init__(self, outputs, inputs, hidden=4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs[0], hidden, SIZE, stride=2), nn.BatchNorm2d(hidden), nn.Tanh(), nn.Flatten())
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

def cubed(outputs, targets, power=3):
    one_hot = targets[:, None] == torch.arange(2)
    return ((outputs - one_hot.to(outputs.dtype)).abs() ** power).mean()

def vector(outputs, targets):
    return (outputs - torch.nn.functional.one_hot(targets, 2)).square().mean(1)

def alone(outputs):
    return outputs.mean()

def constant(outputs, targets):
    return torch.tensor(1.0)

def swapped(y_true, y_pred):
    return (y_true - y_pred).square().mean()

def counted(outputs, targets, seen=[]):
    seen.append(outputs)
    return len(seen)

scale = nn.Parameter(torch.ones(()))

def weighted(outputs, targets):
    return nn.functional.cross_entropy(outputs * scale, targets)

class Centres(nn.Module):
    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(torch.zeros(2))

    def forward(self, outputs, targets):
        return (outputs[:, 0] - self.points[targets]).square().mean()

centres = Centres()
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> str:
    """Return the file of the user's code, which imports a neighbour."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "code_file.py").write_text(CODE)
    (folder / "neighbour.py").write_text("SIZE = 3\n")
    yield f"{folder / 'code_file.py'}"
    sys.modules.pop("neighbour", None)
    sys.path[:] = [path for path in sys.path if path != str(folder)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[object]:
    """Write ten classes of noise; return the flags of tasks on them."""
    root = tmp_path_factory.mktemp("images")
    write_noise(root, 8, *"abcdefghij")
    flags = f"--dataset images:{root} --image-size 8 --channels 1 -n 2 -k 2 -q 1"
    return [*flags.split(), "--split-shares", "2,1,2"]


def assert_a_step_is_a_plain_loops(tmp_path: Path, flags: list[object]) -> None:
    """Compare one iteration of SGD at rate 1 from the command line with the plain loop's meta-gradient."""
    sgd = f"-s {STEPS} --inner-lr {LR} --meta-optimizer sgd --meta-lr 1.0 --grad-clip 1e6 --meta-batch-size 2"
    flags = [*flags, *sgd.split(), *SHORT]
    run = train(tmp_path / "run", *flags)
    settings = parse([str(flag) for flag in flags])
    config, call = resolve(settings), check_call(settings)
    runtime = prepare(config, call)
    distribution, maml = build(config, call, runtime)
    batch = distribution.sample("train", 0, 1, range(2))
    outputs = config.tasks.ways or batch.support_y.shape[-1]
    module, _ = build_algorithm(config, runtime, outputs, batch.support_x[0])
    loss = F.cross_entropy if config.tasks.classification else F.mse_loss
    gradients, *_ = plain_loop(module, loss, batch)
    before, after = maml.initial_parameters(), load_checkpoint(run / LAST).parameters
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    assert scale > 1e-4
    for name, gradient in gradients.items():
        assert (before[name] - gradient - after[name]).abs().max().item() < 1e-9 * scale, name


def test_a_pretrained_torchvision_network_keeps_its_body_and_gets_a_new_head(monkeypatch):
    trained = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: trained)
    arguments = {"weights": "DEFAULT"}
    network = build_learner("torchvision:resnet18", 3, inputs=(1, 32, 32), arguments=arguments)
    assert network.eval()(torch.rand(2, 1, 32, 32)).shape == (2, 3)  # and takes grey images
    for name, w in network.network.state_dict().items():
        assert name.startswith("fc.") or torch.equal(w, trained[name]), name
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: 1 / 0)
    build_learner("torchvision:resnet18", 3, arguments=arguments, fetch_weights=False)


DATA = f"--dataset {SEQUENCES}Sequences --dataset-args length=6 -n 2 -k 3 -q 3 --learner {SEQUENCES}"
LEARNED = {
    "transformer": f"{DATA}transformer --learner-args width=8 heads=2",
    "gru": f"{DATA}gru",
    "sines": "--dataset harmonic --learner-args width=6",
}


@pytest.mark.parametrize("kind", LEARNED)
def test_a_users_network_and_tasks_learn_as_in_a_plain_loop(kind, tmp_path):
    assert_a_step_is_a_plain_loops(tmp_path, LEARNED[kind].split())


def test_a_module_that_imports_its_neighbours_learns_images_as_in_a_plain_loop(code, images, tmp_path):
    net = ["--learner", f"{code}:Net", "--learner-args", "hidden=3"]
    assert_a_step_is_a_plain_loops(tmp_path, [*images, *net])


def test_a_learner_that_cannot_be_vectorised_is_refused_and_trains_with_no_vectorise(
    code, images, tmp_path, capsys
):
    flags = [*images, "--checkpoint-path", tmp_path, *SHORT, "--meta-batch-size", 2]
    assert command(*flags, "--learner", f"{code}:Item", "--run-name", "item") == 2
    error = capsys.readouterr().err
    assert "the network (Item) cannot be vectorised" in error and "--no-vectorise" in error
    assert not (tmp_path / "item").exists()
    assert command(*flags, "--learner", f"{code}:Item", "--run-name", "item", "--no-vectorise") == 0
    assert command(*flags, "--learner", f"{code}:Net", "--run-name", "net") == 0
    item, net = (load_checkpoint(tmp_path / name / LAST).parameters for name in ("item", "net"))
    assert all(torch.allclose(w, net[name], atol=1e-9) for name, w in item.items())


def test_a_run_with_dropout_and_a_users_tasks_resumes_exactly(tmp_path):
    code = ["--dataset", f"{SEQUENCES}Sequences", "--learner", f"{SEQUENCES}transformer"]
    sizes = "-n 2 -k 2 -q 2 -s 2 --meta-batch-size 2 --val-every 2 --log-every 2"
    flags = [*code, *sizes.split(), "--learner-args", "width=8", "heads=2", "dropout=0.3"]
    whole = train(tmp_path / "whole", *flags, "--iterations", 4)
    stopped = train(tmp_path / "stopped", *flags, "--iterations", 2)
    assert command("--load", stopped / LAST, "--iterations", 4, *code) == 0
    assert_same_bits(*(vars(load_checkpoint(run / LAST)) for run in (whole, stopped)))


def test_frozen_layers_and_buffers_are_saved_and_the_code_may_have_moved(code, tmp_path):
    first, moved = (Path(code).with_name(name) for name in ("first.py", "moved.py"))
    first.write_text(CODE)
    flags = ["--learner", f"{first}:Strange", "--learner-args", "name=y", "flag=3", "-k", 3, "-q", 3]
    last = train(tmp_path / "run", *flags, "--iterations", 2, "--precision", "bf16") / LAST
    first.rename(moved)
    assert set(load_checkpoint(last).fixed) >= {"middle.weight", "scale", "norm.running_mean"}
    few = ["--eval-tasks", 4, "--eval-steps", 1]
    assert command("--eval", "--load", last, "--learner", f"{moved}:Strange", *few) == 0
    assert command("--eval", "--load", last, "--learner", f"{moved}:Net", *few) == 2


def test_a_users_loss_is_minimised(code, images, tmp_path):
    code = ["--learner", f"{code}:Net", "--loss", f"{code}:cubed", "--loss-args", "power=2"]
    run = train(tmp_path / "run", *images, *code, *SHORT)
    training = json.loads((run / "training.json").read_text())
    assert 0.05 < training["training"]["query_loss"][0] < 1.0  # cross-entropy would start near 0.7 or above


# ---- what is imported, and what is not ------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Checkpoint:
    return load_checkpoint(train(tmp_path_factory.mktemp("saved") / "run", "--iterations", 1) / LAST)


@pytest.mark.parametrize("setting", OWN_CODE)
@pytest.mark.parametrize("doing", [["--eval"], [], ["--adapt", "x.csv"]], ids=["test", "resume", "adapt"])
def test_code_that_a_checkpoint_names_is_never_imported(setting, doing, saved, tmp_path, refuse):
    last = tmp_path / LAST
    (tmp_path / "theirs.py").write_text("raise SystemExit('it was imported')")
    code = f"{tmp_path / 'theirs.py'}:f"
    save_checkpoints({last: replace(saved, settings=saved.settings | {setting: code, "init": "torch"})})
    error = refuse(*doing, "--load", last)
    assert "it was imported" not in error
    if setting not in ("dataset", "metric") or "--adapt" not in doing:  # which reads no dataset
        assert f"if you trust it, add --{setting} {code}" in error


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--learner {code}:Missing", "has no Missing to call: it has Net, Item, Wrong"),
        ("--learner {code}:nothing", "makes a int, not a torch.nn.Module"),
        ("--learner {code}:Net --learner-args width=3", "unexpected keyword argument 'width'"),
        ("--learner {code}:Wrong", "they should be (4, 2), [examples, outputs]"),
        ("--learner torchvision:resnet19", "no classification model resnet19: try resnet18"),
        (
            "--learner torchvision:googlenet --learner-args weights=DEFAULT",
            "weights= also changes its layers",
        ),
        ("--loss {code}:vector --learner {code}:Net", "it should give one number"),
        ("--loss {code}:alone --learner {code}:Net", "takes 1 positional argument but 2 were given"),
        ("--loss {code}:swapped --learner {code}:Net", "takes (y_true, y_pred), and is called with outputs"),
        ("--metric {code}:counted --metric-mode min --learner {code}:Net", "another value for the same"),
        ("--loss {code}:weighted --learner {code}:Net", "has a trainable weight, scale, which training"),
        ("--loss {code}:centres --learner {code}:Net", "has a trainable weight, points, which training"),
        ("--loss {code}:constant --learner {code}:Net", "constant does not depend on the learner's outputs"),
    ],
)
def test_a_mistake_in_a_users_code_is_one_line(flags, expected, code, images, tmp_path, capsys):
    line = flags.format(code=code).split()
    assert command(*images, *line, "--checkpoint-path", tmp_path / "runs", *SHORT) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "main.py" in line]
    assert len(lines) == 1 and lines[0].startswith("main.py: error: ") and expected in lines[0], lines
    assert not (tmp_path / "runs").exists()


def test_a_class_with_other_arguments_is_answered_with_what_is_passed_and_a_wrapper(tmp_path):
    code = tmp_path / "net.py"
    head = "from torch import nn\nclass Net(nn.Linear):\n"
    head += "    def __init__(self, device, input_channels, n_classes):"
    code.write_text(head + "\n        super().__init__(input_channels, n_classes, device=device)\n")
    with pytest.raises(UsageError) as refusal:
        build_learner(f"{code}:Net", 5, inputs=(3, 8, 8))
    wrapper = re.search(r"`(def learner.*)`", str(refusal.value))
    assert wrapper and "called with (5)" in str(refusal.value)
    code.with_name("wrapped.py").write_text(code.read_text() + wrapper[1])
    built = build_learner(f"{code.with_name('wrapped.py')}:learner", 5, inputs=(3, 8, 8))
    assert (built.in_features, built.out_features) == (3, 5)
