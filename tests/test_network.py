"""The adapted network predicts in plain PyTorch what --adapt wrote; a network that cannot is not written.

The classes below are PyTorch's alone, as in a program that knows nothing of this tool.
"""

import copy
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import runs
import torch
from conftest import write_classes, write_noise
from PIL import Image
from runs import command
from torch import nn

OWN_CODE = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.rand(4)  # no buffer: a program that loads the weights draws another
    def forward(self, x):
        return x * self.scale

class Twice(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(1, 4), nn.Linear(4, outputs), nn.BatchNorm1d(4)
    def forward(self, x):
        return self.last(self.norm(3 * self.norm(self.first(x))))

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
    def forward(self, x):
        self.passes += 1
        return x / self.passes

class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)

def body(layer, outputs):
    return nn.Sequential(nn.Linear(1, 4), layer, nn.Tanh(), nn.Linear(4, outputs))

def layers(outputs): return body(nn.LayerNorm(4), outputs)
def momentum(outputs): return body(nn.BatchNorm1d(4, eps=0.1, momentum=None), outputs)
def bare(outputs): return body(nn.BatchNorm1d(4, track_running_stats=False), outputs)
def instances(outputs):
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    return body(nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Upsample(scale_factor=3, mode="linear"), norm,
                              nn.Flatten(), nn.Linear(12, 4)), outputs)
def counting(outputs): return body(Counting(), outputs)
def noisy(outputs): return body(Noisy(), outputs)
def scaled(outputs): return body(Scaled(), outputs)
def twice(outputs): return Twice(outputs)
"""


def conv(outputs: int) -> nn.Module:
    """Build what `--learner conv` is, of PyTorch's layers."""
    blocks = []
    for channels in (1, 64, 64, 64):
        convolution = nn.Conv2d(channels, 64, 3, stride=2, padding=1, bias=False)
        blocks += [convolution, nn.BatchNorm2d(64, eps=1e-3), nn.ReLU()]
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*blocks, mean, nn.Linear(64, outputs))


def mlp(inputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make images to learn from and to adapt to, a table with gaps, and a user's code."""
    folder = tmp_path_factory.mktemp("network")
    write_classes(folder / "data", 10, 4)
    write_noise(folder / "task", 16, "support/a", "support/b", "query")
    (folder / "mine.csv").write_text("x,y\n0,1\n1,\n2,5\n3,\n4,9\n5,\n")
    (folder / "own.py").write_text(OWN_CODE)
    return folder


def train(out: Path, *flags: object) -> Path:
    short = ["--iterations", 1, "--val-every", 1, "--val-tasks", 2, "--eval-tasks", 2, "--compile", "off"]
    return runs.train(out / "run", *short, "-k", 2, "-q", 2, "--meta-batch-size", 2, *flags) / "last.pt"


def predictions(folder: Path, stem: str) -> torch.Tensor:
    """Return the numbers of the CSV file, `[query examples, outputs]`."""
    header, *rows = runs.read_csv(next(folder.glob(f"*-adapted-{stem}.csv")))
    columns = [n for n, name in enumerate(header) if name == "y" or name.startswith("p(")]
    return torch.tensor([[float(row[n]) for n in columns] for row in rows])


def queries(place: Path, channels: int = 1) -> torch.Tensor:
    pixels = [np.array(Image.open(file)) for file in sorted((place / "task" / "query").iterdir())]
    return (torch.from_numpy(np.stack(pixels))[:, None] / 255).expand(-1, channels, -1, -1)


def assert_predicts(network, x: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare a network's predictions, of all examples together and of each by itself."""
    with torch.no_grad():
        together = copy.deepcopy(network)(x)
        for outputs in (together, torch.cat([copy.deepcopy(network)(row[None]) for row in x])):
            predicted = outputs.softmax(1) if outputs.shape[1] > 1 else outputs
            torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)


def load_weights(network: nn.Module, file: Path) -> nn.Module:
    network.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return network.eval()


def load_program(file: Path):
    return torch.export.load(file).module()


@pytest.mark.parametrize("learner", ["conv", pytest.param("torchvision:resnet18", marks=pytest.mark.slow)])
def test_images_are_predicted_alike_by_weights_and_program(learner, place, tmp_path, capsys):
    images = ["--dataset", f"images:{place / 'data'}", "--image-size", 16, "--channels", 1, "-n", 2]
    last = train(tmp_path, *images, "--learner", learner, "-s", 1, "--no-check-gradients")
    flags = ["--adapt", place / "task", "--load", last, "--test-steps", 2]
    assert command(*flags, "--out", tmp_path / "a") == 0
    expected = predictions(tmp_path / "a", "task")
    if learner == "conv":
        plain, x = conv(2), queries(place)
    else:
        plain, x = pytest.importorskip("torchvision").models.resnet18(num_classes=2), queries(place, 3)
    weights = tmp_path / "a" / "last-adapted-task-weights.pt"
    assert_predicts(load_weights(plain, weights), x, expected)
    assert {int(n) for name, n in plain.state_dict().items() if name.endswith("num_batches_tracked")} == {1}
    capsys.readouterr()
    flags += ["--out", tmp_path / "b", "--batch-norm", "transductive"]
    assert command(*flags, "--save-weights", tmp_path / "b" / "net.pt2") == 0
    assert "net.pt2, which predicts inductively" in capsys.readouterr().out
    assert (predictions(tmp_path / "b", "task") - expected).abs().max() > 1e-3
    assert_predicts(load_program(tmp_path / "b" / "net.pt2"), queries(place), expected)


@pytest.mark.parametrize(
    ("flags", "has_weights"),
    [
        ("own.py:layers", True),
        ("own.py:momentum", True),
        ("own.py:counting", True),
        ("mlp --algorithm r2d2", True),
        ("mlp --algorithm cavia", False),
        ("own.py:bare", False),
        ("own.py:instances", False),
        ("own.py:scaled", False),
    ],
)
def test_vectors_are_predicted_alike(flags, has_weights, place, tmp_path, monkeypatch, capsys):
    flags = ["--learner", *flags.split()]
    monkeypatch.chdir(place)
    last = train(tmp_path, *flags)
    own = flags[:2] if "own.py" in str(flags) else []
    line = ["--adapt", "mine.csv", "--load", last, *own]
    capsys.readouterr()
    assert command(*line) == 0
    weights, x = last.parent / "last-adapted-mine-weights.pt", torch.tensor([[1.0], [3.0], [5.0]])
    expected = predictions(last.parent, "mine")
    if has_weights:
        plain = run_path("own.py")[flags[1].partition(":")[2]](1) if own else mlp()
        assert_predicts(load_weights(plain, weights), x, expected)
    else:
        assert f"Not written: {weights}: " in capsys.readouterr().out and not weights.exists()
    assert command(*line, "--save-weights", tmp_path / "new" / "net.pt2") == 0
    assert_predicts(load_program(tmp_path / "new" / "net.pt2"), x, expected)


def test_what_no_file_can_hold_is_refused_by_its_layer(place, tmp_path, monkeypatch, refuse):
    monkeypatch.chdir(place)
    names = ("twice", "noisy", "layers")
    trained = {name: train(tmp_path / name, "--learner", f"own.py:{name}") for name in names}
    for name, file, expected in (
        ("twice", "net.pt", "layer norm (BatchNorm1d) gives something else in evaluation mode than --adapt"),
        ("twice", "net.pt2", "layer norm (BatchNorm1d) gives something else in evaluation mode than --adapt"),
        ("noisy", "net.pt", "net.pt: it draws random numbers in evaluation mode, which no file can repeat"),
        ("noisy", "net.pt2", "net.pt2: it draws random numbers in evaluation mode"),
        ("layers", "layers/run/best.pt", "best.pt is a checkpoint, which would be lost: name another file"),
        ("layers", "net.onnx", "a file whose name ends in .pt, .pth, .pt2, .safetensors"),
    ):
        flags = ["--adapt", "mine.csv", "--load", trained[name], "--learner", f"own.py:{name}"]
        assert expected in refuse(*flags, "--save-weights", tmp_path / file)


def test_a_standardised_table_is_predicted_in_its_units(place, tmp_path, capsys):
    rows = [f"{t},{1e6 + i},{i % 3},{500 + t * i}" for t in range(10) for i in range(6)]
    (tmp_path / "data.csv").write_text("\n".join(["task,a,b,y", *rows]), encoding="utf-8")
    (tmp_path / "mine.csv").write_text("a,b,y\n1000001,1,503\n1000003,0,509\n1000002,2,\n1000004,1,\n")
    last = train(tmp_path, "--dataset", f"table:{tmp_path / 'data.csv'}")
    line = ["--adapt", tmp_path / "mine.csv", "--load", last]
    assert command(*line) == 0
    expected = predictions(last.parent, "mine").double()
    assert "weights.pt, which takes and gives standardised numbers" in capsys.readouterr().out
    arrays = {"support_x": [[1000001, 1], [1000003, 0]], "query_x": [[1000002, 2], [1000004, 1]]}
    np.savez(tmp_path / "mine.npz", **arrays, support_y=[503, 509])  # whole numbers, as in the table
    assert command("--adapt", tmp_path / "mine.npz", "--load", last, "--out", tmp_path / "arrays") == 0
    torch.testing.assert_close(predictions(tmp_path / "arrays", "mine").double(), expected)
    x = torch.tensor([[1000002.0, 2.0], [1000004.0, 1.0]], dtype=torch.float64)
    scales = torch.load(last, weights_only=True)["scales"]
    plain = load_weights(mlp(2), last.parent / "last-adapted-mine-weights.pt")
    standardised = plain(((x - scales["input"][0]) / scales["input"][1]).float()).double()
    torch.testing.assert_close(standardised * scales["target"][1] + scales["target"][0], expected)
    assert command(*line, "--save-weights", tmp_path / "net.pt2") == 0
    torch.testing.assert_close(load_program(tmp_path / "net.pt2")(x), expected)
