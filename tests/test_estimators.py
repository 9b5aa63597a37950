"""Estimators predict what --adapt writes for the same task, and keep scikit-learn's conventions."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import command, train

from commands.estimators import FewShotClassifier, FewShotRegressor

PRETRAINED = ROOT / "checkpoints" / "pretrained"
CURVES, CHARACTERS = PRETRAINED / "sinusoid-maml", PRETRAINED / "omniglot-one-training-prototype-head"
SHORT = ["--iterations", 1, "--val-every", 1, "--eval-tasks", 2, "--meta-batch-size", 2]
X = np.random.default_rng(0).normal(size=(9, 2))
Y = np.stack([5 * X[:, 0] + 3, X.sum(1) - 90], 1)


class Frame:
    """A data frame, as far as an estimator looks: columns by name."""

    def __init__(self, **columns: np.ndarray) -> None:
        self.columns, self.data = [*columns], columns

    def __getitem__(self, names: list[str]) -> "Frame":
        return Frame(**{name: self.data[name] for name in names})

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        array = np.stack([*self.data.values()], 1)
        array.flags.writeable = False  # as pandas' are
        return array


def write_table(path: Path, names: str, *columns: object) -> None:
    rows = zip(*(map(str, column) for column in columns), strict=True)
    path.write_text("\n".join(map(",".join, [names.split(), *rows])))


def with_gaps(values: np.ndarray, known: int) -> list[object]:
    return [*values[:known].tolist(), *[""] * (len(values) - known)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Train on two targets of a table, and on its classes 9 and 10: with a learned head, and with ridge."""
    folder = tmp_path_factory.mktemp("estimators")
    tasks = [f"t{row % 9}" for row in range(72)]
    x, y, names = np.tile(X, (8, 1)), np.tile(Y, (8, 1)), [9 + row % 2 for row in range(72)]
    write_table(folder / "table.csv", "task a b u v name", tasks, *x.T, *y.T, names)
    table = ["--dataset", f"table:{folder / 'table.csv'}", "-k", 2, "-q", 2, "--columns", "input=a,b"]
    for run, flags in {
        "numbers": "target=u,v --test-steps 2",
        "classes": "target=name -n 2 --test-steps 2",
        "ridge": "target=u,v --algorithm r2d2",
        "ridge-classes": "target=name -n 2 --test-steps 2 --head-init ridge",
    }.items():
        train(folder / run, *SHORT, *table, *flags.split())
    return folder


@pytest.fixture
def adapt(tmp_path, monkeypatch):
    """Return what --adapt writes for a task: its columns, by heading."""
    monkeypatch.setattr("commands.adapt.write_figure", lambda *_: None)

    def run(checkpoint: Path, task: Path, *flags: object) -> dict[str, list]:
        assert command("--adapt", task, "--load", checkpoint, "--out", tmp_path, *flags) == 0
        return json.loads((tmp_path / f"best-adapted-{task.stem}.json").read_text())["tasks"][0]["predicted"]

    return run


@pytest.fixture
def settings() -> Iterator[Callable[[], tuple]]:
    """Give the process unusual settings of PyTorch; return a function that reads them."""

    def read() -> tuple:
        products, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
        return products, threads, torch.are_deterministic_algorithms_enabled()

    before = read()
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True)
    yield read
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])
    torch.use_deterministic_algorithms(before[2])


def test_an_estimator_leaves_the_settings_of_the_process(settings):
    before = settings()
    FewShotRegressor.load(CURVES).fit(X[:5, :1], Y[:5, 0]).predict(X[5:, :1])
    assert settings() == before == ("high", 3, True)
    with pytest.raises(ValueError, match="a setting of the whole process"):
        FewShotRegressor.load(CURVES, precision="bf16-products")


def test_a_regressor_predicts_what_adapt_writes(runs, adapt, tmp_path):
    x, y = np.arange(5.0), np.sin(np.arange(5.0))
    write_table(tmp_path / "curve.csv", "x y", x, with_gaps(y, 3))
    for steps in (1, 5):
        regressor = FewShotRegressor.load(CURVES, test_steps=steps).fit(x[:3, None], y[:3])
        written = adapt(CURVES, tmp_path / "curve.csv", "--test-steps", steps)["y"]
        assert regressor.predict(x[3:, None]) == pytest.approx(written, rel=1e-6)
    write_table(tmp_path / "two.csv", "a b u v", *X.T, *(with_gaps(part, 5) for part in Y.T))
    for run in ("numbers", "ridge"):
        written = adapt(runs / run, tmp_path / "two.csv")
        expected = pytest.approx(np.stack([written["u"], written["v"]], 1), rel=1e-8)
        regressor = FewShotRegressor.load(runs / run).fit(X[:5], Y[:5])
        assert regressor.predict(X[5:]) == expected
        with warnings.catch_warnings(action="error"):
            by_name = regressor.fit(Frame(b=X[:5, 1], note=X[:5, 0], a=X[:5, 0]), Y[:5])
        assert by_name.predict(X[5:]) == expected


def test_a_classifier_of_a_table_predicts_what_adapt_writes(runs, adapt, tmp_path):
    names = np.array(["10", "9", "9", "10", "9", "10", "9", "9", "10"])
    write_table(tmp_path / "classes.csv", "a b name", *X.T, with_gaps(names, 6))
    written = adapt(runs / "classes", tmp_path / "classes.csv")
    for labels, order in ((names, ["10", "9"]), (names.astype(int), [9, 10])):  # text is sorted as text
        classifier = FewShotClassifier.load(runs / "classes").fit(X[:6], labels[:6])
        assert classifier.classes_.tolist() == order
        shares = classifier.predict_proba(X[6:])
        assert shares == pytest.approx(np.stack([written[f"p({name})"] for name in order], 1), abs=1e-6)
        assert classifier.predict(X[6:]).astype(str).tolist() == written["prediction"]
        assert classifier.predict(X[6:]).dtype == labels.dtype
    three = np.array(["b", "a", "c", "b", "a", "c", "", "", ""])
    write_table(tmp_path / "three.csv", "a b name", *X.T, three)
    written = adapt(runs / "ridge-classes", tmp_path / "three.csv")
    shares = FewShotClassifier.load(runs / "ridge-classes").fit(X[:6], three[:6]).predict_proba(X[6:])
    assert shares == pytest.approx(np.stack([written[f"p({name})"] for name in "abc"], 1), abs=1e-6)


def test_images_are_those_of_files_whatever_their_type_and_any_number_of_classes(adapt, tmp_path):
    """Three classes of a run that has learned 20-way tasks of inverted images of another size."""
    random = np.random.default_rng(1)
    kinds = [random.integers(0, 2, (1, 40, 40)) for _ in range(3)]
    pixels = np.concatenate([255 * kind * random.uniform(0.7, 1, (4, 40, 40)) for kind in kinds])
    pixels = pixels.astype(np.uint8)
    names, support = np.repeat(["bee", "ant", "owl"], 4), np.tile([True, True, True, False], 3)
    for number, (image, name) in enumerate(zip(pixels, names, strict=True)):
        folder = tmp_path / "task" / (f"support/{name}" if support[number] else "query")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02}.png")
    written = adapt(CHARACTERS, tmp_path / "task")
    expected = np.stack([written[f"p({name})"] for name in ("ant", "bee", "owl")], 1)
    classifier = FewShotClassifier.load(CHARACTERS)
    order = np.argsort(names[support], kind="stable")  # that of folders
    colour = np.repeat(pixels[:, None], 3, 1)
    for images in (pixels, pixels / 255, pixels[:, None], colour, pixels.astype(np.int64)):
        classifier.fit(images[support][order], names[support][order])
        assert classifier.predict_proba(images[~support]) == pytest.approx(expected, abs=2e-5)
    assert classifier.predict(pixels[~support]).tolist() == written["prediction"] == ["bee", "ant", "owl"]
    assert classifier.score(pixels[~support], ["bee", "ant", "ant"]) == pytest.approx(2 / 3)


def test_scikit_learn_takes_the_estimators(runs):
    from sklearn.base import clone
    from sklearn.metrics import r2_score
    from sklearn.model_selection import GridSearchCV, cross_val_score

    regressor = FewShotRegressor(str(runs / "numbers"), test_steps=1)
    assert clone(regressor).get_params() == {"run": str(runs / "numbers"), "device": "cpu", "test_steps": 1}
    predicted = regressor.fit(X, Y).predict(X)
    assert regressor.score(X, Y) == pytest.approx(r2_score(Y, predicted))
    assert regressor.score(X, 0 * Y) == r2_score(0 * Y, predicted) == 0
    same = X[[0, 0]]
    assert regressor.score(same, regressor.predict(same)) == 1
    assert math.isnan(regressor.score(X[:1], Y[:1]))
    search = GridSearchCV(regressor, {"test_steps": np.arange(1, 3)}, cv=3).fit(X, Y)
    assert search.best_estimator_.predict(X[:1]).shape == (1, 2)
    labels = np.where(X[:, 0] > 0, "right", "left")
    classifier = FewShotClassifier.load(runs / "classes")
    assert cross_val_score(classifier, X, labels, cv=2, scoring="roc_auc").shape == (2,)


def test_what_does_not_fit_is_one_value_error(runs, tmp_path):
    (tmp_path / "a.pt").write_text("nothing")
    images, two = np.zeros((3, 8, 8), np.uint8), np.array(["a", "b", "b"])
    classes, curves = runs / "classes", partial(FewShotRegressor, CURVES)
    characters = partial(FewShotClassifier, CHARACTERS)
    cases = [
        (lambda: FewShotRegressor.load(tmp_path / "a.pt"), "damaged, or not a checkpoint"),
        (lambda: FewShotClassifier.load(CURVES), "has learned regression: take FewShotRegressor"),
        (lambda: FewShotRegressor.load(classes), "has learned classes: take FewShotClassifier"),
        (lambda: FewShotRegressor.load(CURVES, steps=3), "no setting 'steps': test_steps, batch_norm, "),
        (lambda: curves(device="tpu0").fit(X[:, :1], Y[:, 0]), "there is no device 'tpu0': give cpu"),
        (lambda: FewShotRegressor.load(CURVES, invert=True), "--invert has no meaning with --dataset"),
        (lambda: curves().predict(X), "call fit with a few examples first"),
        (lambda: curves().fit(X, Y[:, 0]), "x (9, 2) and y (9, 1): "),
        (lambda: curves().fit(X[:, 0], Y[:, 0]), "x is (9,): give [examples, numbers]"),
        (lambda: curves().fit(X[:, :1] / 0, Y[:, 0]), "x has NaN or infinity"),
        (lambda: curves().fit(X[:, :1], Y[:8, 0]), "y is (8,): give a target for each of 9"),
        (lambda: curves().fit(X[:, :1], Y[:, 0]).predict(X), "x is (9, 2), and fit had (9, 1)"),
        (lambda: FewShotRegressor(runs / "numbers").fit(X[:, :1], Y), "the run's table has 2 inputs"),
        (lambda: FewShotRegressor(runs / "numbers").fit(Frame(a=X[:, 0]), Y), "x has no column 'b'"),
        (lambda: FewShotClassifier(classes).fit(X[:3], [1, 2, 3]), "3 classes, and the checkpoint learned 2"),
        (lambda: FewShotClassifier(classes).fit(X[:2], [1, 1]), "y has one class"),
        (lambda: FewShotClassifier(classes).fit(X[:2], [1.5, 2]), "y has decimals or NaN: give labels"),
        (lambda: characters().fit(images[:, None, None], two), "give images [n, height, width"),
        (lambda: characters().fit(images + 300.0, two), "values from 300 to 300: give whole"),
    ]
    for call, expected in cases:
        with np.errstate(all="ignore"), pytest.raises(ValueError, match=re.escape(expected)) as error:
            call()
        assert "\n" not in str(error.value)


def test_the_first_blocks_of_the_page_run(monkeypatch):
    """The five lines with a run and a few characters, and the example that needs no training."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "python.md").read_text()
    five_lines, points, *_ = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    x = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    scope = {"x": x, "y": [*"abcabc"], "new_x": x}
    exec(five_lines.replace("checkpoints/RUN", str(CHARACTERS)), scope)
    assert {*scope["labels"]} <= {*"abc"} and scope["shares"].shape == (6, 3)
    exec(points, scope)
    assert scope["regressor"].score([[1.0], [3.0]], [2 * np.sin(2), 2 * np.sin(4)]) > 0.9
