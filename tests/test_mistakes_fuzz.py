"""Mistakes in a user's code, images and files end in a run, or in one printable line; never a traceback.

A seeded sample of combinations: which of them are right matters less than that none is a surprise.
"""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np
from conftest import write_classes, write_images
from PIL import Image
from runs import command, train

SHORT = ["--iterations", 1, "--val-tasks", 2, "--eval-tasks", 2, "--meta-batch-size", 2, "-q", 2]
SHORT += ["--eval-steps", 1, "--test-steps", 1, "--compile", "off"]
IMAGES = ["--image-size", 6, "-n", 2, "-k", 1, "--learner", "fc", "--split-shares", "1,1,1"]
OUTPUTS = """
y | y[:, :0] | y[0] | y.sum() | y.tolist() | None | (y, None) | {} | [] | y.detach() | y.half() | y / 0
y.int() | y.to(torch.complex64) | y.numpy() | y.item() | y.argmax(1) | missing | 1 / 0 | y + torch.randn(3)
y.sum().backward() | setattr(self, "kept", y) or y | y[torch.randperm(len(y))] | y.unique() | y[y > 0]
y.expand(3, -1, -1) | torch.tensor([1.0]) | object() | self.layer.weight.data.mul_(0.5) * y | x.add_(1) and y
{"logits": y, "kept": [y, None]} | torch.autograd.grad(y.sum(), x) | self.layer(y) | y[:, 0] | "text"
y.double() | y.bfloat16() | torch.cat([y, y]) | y[:1] | y.t() | (y, {"more": y}) | y * torch.rand_like(y)
"""
LOSSES = """
F.mse_loss(o, t) | o - t | None | o.sum().item() | torch.tensor(1.0) | F.cross_entropy(o, t)
(o - t).unique().sum() | o[t] | 1 / 0 | (o.mean(), t) | F.mse_loss(o.detach(), t) | torch.log(-o.abs()).mean()
o.sum().to(torch.complex64) | int(o.sum()) | {"loss": o.mean()} | o.mean() / 0 | t.mean() | o["a"].mean()
F.mse_loss(o + torch.rand_like(o), t) | o.mean().backward() | o.sum(1) | o.mean().int()
"""
HEAD = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n"


def assert_answered(capsys, *line: object) -> int:
    """Run a command line; check that it succeeds, or ends in one printable line."""
    capsys.readouterr()
    code = command(*line)
    last = ([*capsys.readouterr().err.splitlines(), ""])[-1 if code == 0 else -2]
    assert code == 0 or (last.startswith("main.py: error: ") and last.isprintable()), (line, code, last)
    return code


def test_any_network_and_loss(tmp_path, capsys):
    outputs, losses = (re.split(r"\s+\|\s+|\n", text.strip()) for text in (OUTPUTS, LOSSES))
    (tmp_path / "mine.csv").write_text("x,y\n0,1\n1,2\n3,\n4,\n5,\n")
    draw, codes = random.Random(0), []
    pairs = [(output, draw.choice([*losses[:1] * 40, *losses])) for output in outputs]
    pairs += [("y", loss) for loss in losses]
    for number, (output, loss) in enumerate(pairs):
        code = tmp_path / f"code{number}.py"
        code.write_text(
            f"{HEAD}class Net(nn.Module):\n"
            "    def __init__(self, outputs):\n        super().__init__()\n"
            "        self.layer = nn.Linear(1, outputs)\n"
            f"    def forward(self, x):\n        y = self.layer(x)\n        return {output}\n"
            f"def loss(o, t):\n    return {loss}\n"
        )
        own, out = ["--learner", f"{code}:Net", "--loss", f"{code}:loss"], ["--checkpoint-path", tmp_path]
        codes.append(assert_answered(capsys, *SHORT, "-k", 2, *own, *out, "--run-name", number))
        if codes[-1] == 0:
            for doing in (["--eval", "--out", tmp_path / "out"], ["--adapt", tmp_path / "mine.csv"]):
                assert assert_answered(capsys, *doing, "--load", tmp_path / f"{number}", *own) == 0
    assert codes.count(0) > 3 and codes.count(2) > 25


def spoil_images(folder: Path, draw: random.Random) -> None:
    """Do to a folder of images what people do."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    chosen = draw.choice(classes)
    image = draw.choice(sorted(path for path in chosen.rglob("*.*") if path.is_file()) or [folder / "x.png"])
    grey = np.full((7, 9), 4000, np.uint16)
    mistakes = [
        lambda: image.write_text("no image"),
        lambda: image.write_bytes(b""),
        lambda: image.write_bytes(image.read_bytes()[:40] if image.exists() else b"\x89PNG"),
        lambda: Image.fromarray(grey).save(image, "PNG"),
        lambda: Image.new("RGBA", (1, 1)).save(image, "PNG"),
        lambda: Image.fromarray(np.full((5, 5), np.nan, np.float32)).save(chosen / "f.tif"),
        lambda: image.unlink(missing_ok=True),
        lambda: shutil.rmtree(chosen) or chosen.mkdir(),
        lambda: [shutil.rmtree(path) for path in classes[1:]],
        lambda: chosen.rename(folder / draw.choice(("train", "Test", "val", "a\nb", ".hidden", "x" * 200))),
        lambda: shutil.move(chosen, classes[classes.index(chosen) - 1]),
        lambda: (chosen / "link.png").symlink_to(folder / "nowhere.png"),
        lambda: (folder / "Thumbs.db").write_bytes(b"\0"),
        lambda: shutil.copy(image, folder) if image.exists() else None,
        lambda: (chosen / "folder.png").mkdir(),
        lambda: image.rename(image.with_name("\u202e\u0301 .PNG")) if image.exists() else None,
    ]
    draw.choice(mistakes)()


def test_any_folder_of_images(tmp_path, capsys):
    codes = []
    for seed in range(30):
        draw, folder = random.Random(seed), tmp_path / f"images{seed}"
        write_classes(folder, 9, 3)
        for _ in range(draw.randint(1, 2)):
            if len([path for path in folder.iterdir() if path.is_dir()]) > 1:
                spoil_images(folder, draw)
        flags = ["--dataset", f"images:{folder}", "-q", 1, "--checkpoint-path", tmp_path, "--run-name", seed]
        codes.append(assert_answered(capsys, *SHORT, *IMAGES, *flags))
    assert codes.count(0) > 3 and codes.count(2) > 5


def test_any_folder_to_adapt_to(tmp_path, capsys):
    write_classes(tmp_path / "data", 9, 3)
    flags = [*IMAGES, "--dataset", f"images:{tmp_path / 'data'}", "--head-init", "prototype"]
    train(tmp_path / "run", *SHORT, *flags)
    codes = []
    for seed in range(20):
        draw, task = random.Random(seed), tmp_path / f"task{seed}"
        write_classes(task / "support", 3, 2)
        write_images(task / "query", [3, 90, 4])
        spoil_images(draw.choice([task, task / "support"]), draw)
        codes.append(assert_answered(capsys, "--adapt", task, "--load", tmp_path / "run"))
    assert codes.count(0) > 5 and codes.count(2) > 5


def spoil_arrays(path: Path, draw: random.Random) -> None:
    """Write arrays to adapt to, of which one or two are not what they should be."""
    arrays = {"support_x": np.ones((4, 1)), "support_y": np.ones((4, 1)), "query_x": np.ones((3, 1))}
    kinds = ("float32", "int64", "float16", "complex64", "object", "U3", "bool", "datetime64[s]")
    for name in draw.choices([*arrays], k=2):
        good, kind = arrays[name], draw.choice(kinds)
        shape = draw.choice([(4, 1), (4,), (0, 1), (1, 4, 1), (), (4, 2), (3, 1)])
        value = draw.choice([1.0, 1.0, np.nan, 1e300])
        arrays[name] = draw.choice([np.full(shape, value), np.ones(good.shape).astype(kind), good])
    if draw.random() < 0.1:
        arrays.pop("query_x")
    np.savez(path, **arrays)


def spoil_table(path: Path, draw: random.Random) -> None:
    """Write a table to adapt to, in which a few cells, the header or the encoding are wrong."""
    rows = [["x", "y"], *([f"{row}", f"{2 * row}" if row % 2 else ""] for row in range(6))]
    cells = ["", "x", "nan", "inf", "1e999", "\u00e9", '"', "\0", "1;2"]
    cells += ["9" * 400, "True", "1,2", "-0", " 7 "]
    for _ in range(draw.randint(0, 2)):
        draw.choice(rows)[draw.randint(0, 1)] = draw.choice(cells)
    text = "\n".join(map(",".join, rows[draw.choice([0, 0, 0, 1, 7]) :]))
    path.write_bytes(text.encode(draw.choice(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"])))


def test_any_file_to_adapt_to(tmp_path, capsys):
    train(tmp_path / "run", *SHORT, "-k", 2)
    codes = []
    for seed in range(40):
        path = tmp_path / (f"task{seed}.npz" if seed % 2 else f"task{seed}.csv")
        (spoil_arrays if seed % 2 else spoil_table)(path, random.Random(seed))
        codes.append(assert_answered(capsys, "--adapt", path, "--load", tmp_path / "run"))
    assert codes.count(0) > 5 and codes.count(2) > 15
