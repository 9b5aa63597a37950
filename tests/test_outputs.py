"""Outputs other than one vector of scores, and the user's metric: numpy's values, or a line that says why."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from plain_loop import plain_loop
from runs import adapt, command, curves, train
from torch import nn
from torch.nn import functional as F

from commands.adapt import load, predict
from common.batch import TaskBatch
from common.choices import Choices
from common.errors import UsageError
from evaluation.predictions import read_predictions
from learners.losses import cross_entropy, ignored_label
from learners.metrics import _load_library, build_metric
from learners.reading import Metric, Reading, has_overflowed, read_outputs
from maml import MAML
from training.checkpoint import load_checkpoint
from training.folders import BEST
from training.gradient_check import check_meta_gradient

CODE = """
import dataclasses
import torch
from torch import nn
from torch.nn import functional as F

class Pixels:
    def sample(self, split, seeds):
        x = torch.stack([torch.rand(6, 1, 5, 5, generator=torch.Generator().manual_seed(s % 2**31))
                         for s in seeds.tolist()])
        y = (x[:, :, 0] > 0.4).long() + (x[:, :, 0] > 0.7)
        y[:, :, 0] = 255
        return x[:, :3], y[:, :3], x[:, 3:], y[:, 3:]

@dataclasses.dataclass
class Both:
    features: torch.Tensor
    out: torch.Tensor
    nothing: torch.Tensor | None = None

class Dense(nn.Module):
    def __init__(self, outputs, form=None):
        super().__init__()
        self.body, self.head, self.form = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 3, 1), form

    def forward(self, x):
        features = self.body(x).tanh()
        logits = self.head(features)
        return Both(features, logits) if self.form else logits

def pixel_loss(outputs, targets, ignore_index=255):
    return F.cross_entropy(outputs.out, targets, ignore_index=ignore_index)

class MeanAndVariance(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layers = nn.Linear(1, 2 * outputs)

    def forward(self, x):
        return dict(zip(("mean", "log_variance"), self.layers(x).split(1, 1)))

def gauss(outputs, targets):
    error = (outputs["mean"] - targets) ** 2
    return (outputs["log_variance"] + error * torch.exp(-outputs["log_variance"])).mean()

class Quantiles(nn.Linear):
    def __init__(self, outputs):
        super().__init__(1, 3 * outputs)

def pinball(outputs, targets):
    shares, error = torch.tensor([0.1, 0.5, 0.9], dtype=outputs.dtype), targets - outputs
    return torch.maximum(shares * error, (shares - 1) * error).mean()

def narrow(outputs, wide=False):
    layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, outputs)).half()
    return layers.float() if wide else layers

class Tokens:
    def sample(self, split, seeds):
        x = torch.stack([torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(s % 2**31))
                         for s in seeds.tolist()])
        y = x.float().mean(2, keepdim=True)
        return x[:, :3], y[:, :3], x[:, 3:], y[:, 3:]

def words(outputs):
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, outputs))

def own_bce(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets)

class Nothing(MeanAndVariance):
    def forward(self, x):
        return self.layers(x)[:, :1], None

def mse(outputs, targets):
    return (outputs[:, :1] - targets).square().mean()


def spread(outputs, targets):
    return outputs.std()
"""
SHORT = ["--iterations", 4, "--val-every", 2, "--val-tasks", 5, "--meta-batch-size", 2, "--eval-tasks", 6]
SHORT += ["--eval-steps", 2, "--test-steps", 2, "-k", 3, "-q", 3]


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("code") / "dense_code.py"
    path.write_text(CODE)
    return str(path)


# ---- how outputs are read ------------------------------------------------------------------------


def test_accuracy_is_per_pixel_or_label_and_leaves_out_what_is_unknown():
    random = np.random.default_rng(0)
    scores, labels = random.standard_normal((2, 4, 3, 5, 6)), random.integers(0, 3, (2, 4, 5, 6))
    labels[:, :, 0] = 255
    labels[1] = -100  # nothing to measure in the second task
    known = labels[0] != 255
    expected = (scores[0].argmax(1) == labels[0])[known].mean()
    reading = read_outputs(torch.tensor(scores[0]), torch.tensor(labels[0]), ways=3, ignored=255)
    measured = reading.accuracy(torch.tensor(scores), torch.tensor(labels))
    assert measured[0].item() == pytest.approx(expected) and measured[1].isnan()
    assert (reading.kind, reading.classes, reading.numbers) == ("classes", 3, 90)

    logits, targets = random.standard_normal((1, 7, 4)), random.integers(0, 2, (1, 7, 4)).astype(float)
    targets[0, :2, 1] = np.nan
    known = ~np.isnan(targets)
    reading = read_outputs(torch.tensor(logits[0]), torch.tensor(targets[0]), loss="bce")
    expected = ((1 / (1 + np.exp(-logits)) > 0.5) == (targets == 1))[known].mean()
    assert reading.accuracy(torch.tensor(logits), torch.tensor(targets)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("outputs", "targets", "options", "kind"),
    [
        (torch.rand(4, 5), torch.tensor([0, 1, 2, 4]), {"ways": 5}, "classes"),
        (torch.rand(4, 4), torch.tensor([0, 1, 2, 4]), {"ways": 5}, "ordinal"),
        (torch.rand(4, 1), torch.tensor([0, 1, 1, 0]), {"ways": 2}, "ordinal"),
        (torch.rand(4), torch.tensor([0, 1, 1, 0]), {"ways": 2}, "labels"),
        (torch.rand(4, 64), torch.tensor([0, 1, 2, 4]), {"ways": 5}, "numbers"),  # an embedding
        ((torch.rand(4, 3), torch.rand(4, 9)), torch.tensor([[0], [1], [2], [1]]), {}, "classes"),
        (torch.rand(4, 3), torch.tensor([[0, 1, 1]] * 4), {}, "labels"),
        (torch.rand(4, 3), torch.tensor([[0, 1, 7]] * 4), {}, "numbers"),
        (torch.rand(4, 3), torch.tensor([[0, 1, 1]] * 4), {"loss": "mse"}, "numbers"),
        (torch.rand(4, 1), torch.tensor([[0.0], [1.0]] * 2), {"loss": "own.py:f"}, "numbers"),
        (torch.rand(4, 1), torch.tensor([[0.0], [1.0]] * 2), {"kind": "labels"}, "labels"),
        (torch.rand(4, 3), torch.eye(4)[:, :3], {"kind": "classes"}, "classes"),
        (torch.rand(4, 3), torch.tensor([[0], [1], [3], [2]]), {"kind": "ordinal"}, "ordinal"),
    ],
)
def test_outputs_are_read_by_shape_loss_and_flag(outputs, targets, options, kind):
    assert read_outputs(outputs, targets, **options).kind == kind


def test_ordinal_logits_are_counted():
    logits = torch.tensor([[3.0, 1.0, -1.0], [-1.0, -2.0, -3.0], [2.0, 2.0, 2.0]])
    reading = read_outputs(logits, torch.tensor([2, 1, 3]), ways=4)
    assert reading.predict(logits).tolist() == [2, 0, 3]
    assert reading.accuracy(logits[None], torch.tensor([[2, 1, 3]])).item() == pytest.approx(2 / 3)
    one = read_outputs(logits[:, :1], torch.tensor([1, 0, 0]), ways=2)
    assert one.predict(logits[:, :1]).tolist() == [1, 0, 1]
    assert torch.allclose(one.probabilities(logits[:, :1])[:, 1], logits[:, 0].sigmoid())


def test_a_loss_says_which_label_it_leaves_out(code):
    assert ignored_label("cross-entropy", ("ignore_index=7",)) == 7
    assert ignored_label(f"{code}:pixel_loss") == 255
    assert ignored_label("bce") is None  # which would take it for none of the classes


def test_the_meta_gradient_of_pixels_without_some_is_a_plain_loops():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    x, y = torch.rand(2, 6, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 6, 4, 4))
    y[:, :, 1] = 255
    batch = TaskBatch(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:])
    choices = Choices(inner_lr=0.1, steps=2)
    result = MAML(network, lambda o, t: cross_entropy(o, t, ignore_index=255), choices)
    result = result.meta_gradient(dict(network.named_parameters()), batch)
    gradients, *_ = plain_loop(network, lambda o, t: F.cross_entropy(o, t, ignore_index=255), batch, steps=2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(result.gradients[name], gradient)


def test_a_loss_in_float32_is_checked_in_float32():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.rand(2, 8, 3), torch.randint(0, 2, (2, 8))
    batch, keys = TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:]), torch.arange(4).view(2, 2)

    def loss(outputs, targets):  # float32 for float64 logits
        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets.float())

    maml = MAML(network, loss, Choices(inner_lr=0.1, steps=2))
    check = check_meta_gradient(maml, maml.initial_parameters(), batch, keys, ["adjoint", "unrolled"])
    assert (check.engine, check.dtype) == ("adjoint", torch.float32)


def test_one_logit_of_two_classes_predicts_their_names():
    logits, reading = torch.tensor([2.0, -1.0]), Reading("labels")
    made = read_predictions(logits, logits, reading, ["cat", "dog"], ["y"], predicts_targets=False)
    assert made.columns["prediction"] == ["dog", "cat"]
    assert torch.allclose(made.columns["p(dog)"], 1 / (1 + torch.exp(-logits)))


def test_no_output_hides_another_or_is_cut():
    logits, hidden, loss = torch.rand(4, 3), torch.rand(4, 1), torch.tensor(0.5)
    outputs = {"logits": logits, "prediction": hidden, "p(0)": hidden, "attention": torch.rand(2, 4)}
    outputs["aux"] = loss
    made = read_predictions(outputs, logits, Reading("classes", 3), [], ["y"], predicts_targets=True)
    assert [*made.columns] == ["prediction", "p(0)", "p(1)", "p(2)", "output prediction", "output p(0)"]
    assert torch.equal(made.columns["output prediction"], hidden[:, 0]) and len([*made.rows(7)]) == 4
    assert torch.allclose(made.columns["p(0)"], logits.softmax(1)[:, 0])
    assert made.arrays["attention"].shape == (2, 4) and made.arrays["aux"] == loss
    many = logits.view(2, 1, 2, 3)
    masks = read_predictions(many, logits, Reading("labels"), [], ["y"], predicts_targets=True)
    shares = (logits > 0).view(2, 6).double().mean(1)
    assert torch.equal(masks.columns["share(1)"], shares) and [*masks.arrays] == ["labels", "p"]
    flat = read_predictions(hidden[:, 0], hidden[:, 0], Reading("numbers"), [], ["y"], predicts_targets=True)
    assert torch.equal(flat.columns["y"], hidden[:, 0]) and flat.of_targets
    prices = {"out": hidden, "price": hidden + 1}
    made = read_predictions(prices, hidden, Reading("numbers"), [], ["price"], predicts_targets=True)
    assert torch.equal(made.columns["price"], hidden[:, 0])
    assert torch.equal(made.columns["output price"], hidden[:, 0] + 1)


def test_an_output_that_is_no_examples_stays_whole_in_an_inductive_pass():
    class WithLoss(nn.Linear):
        def forward(self, x):
            return super().forward(x), (self.weight**2).sum()

    torch.manual_seed(0)
    maml = MAML(WithLoss(1, 1), lambda o, t: F.mse_loss(o[0], t) + o[1], Choices(inner_lr=0.1))
    x = torch.rand(3, 1)
    adapted = maml.adapt(maml.initial_parameters(), x, x, 1)
    outputs, loss = predict(maml, adapted, torch.rand(2, 1), "inductive")
    assert outputs.shape == (2, 1) and torch.equal(loss, (adapted.weights["weight"] ** 2).sum())


# ---- metrics -------------------------------------------------------------------------------------


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the share of pairs in the right order."""
    pairs = scores[positive][:, None] - scores[~positive]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def f1(predicted: np.ndarray, true: np.ndarray) -> float:
    return 2 * (predicted & true).sum() / (predicted.sum() + true.sum())


def iou(predicted: np.ndarray, true: np.ndarray) -> float:
    return (predicted & true).sum() / (predicted | true).sum()


def test_metrics_of_torchmetrics_have_numpys_values():
    random = np.random.default_rng(1)
    scores, labels = random.standard_normal((40, 3)), random.integers(0, 3, 40)
    labels[:4] = -100
    kept, known = scores[4:], labels[4:]
    shares = np.exp(kept) / np.exp(kept).sum(1, keepdims=True)
    best = kept.argmax(1)
    expected = {
        "f1": np.mean([f1(best == c, known == c) for c in range(3)]),
        "AUROC": np.mean([auroc(shares[:, c], known == c) for c in range(3)]),
        "iou": np.mean([iou(best == c, known == c) for c in range(3)]),
    }
    reading = Reading("classes", 3, ignored=-100)
    for name, value in expected.items():
        metric = build_metric(name)
        measured = metric(torch.tensor(scores), torch.tensor(labels), reading)
        assert measured == pytest.approx(value, abs=1e-6) and metric.more_is_better
    x, y = random.standard_normal((2, 30, 1))
    r2 = 1 - ((x - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    numbers = Reading("numbers")
    assert build_metric("R2")(torch.tensor(x), torch.tensor(y), numbers) == pytest.approx(r2)
    mae = build_metric("mean_absolute_error")
    assert not mae.more_is_better
    assert mae(torch.tensor(x), torch.tensor(y), numbers) == pytest.approx(np.abs(x - y).mean())
    logits, positive = random.standard_normal((20, 2)), random.integers(0, 2, (20, 2))
    value = np.mean([auroc(logits[:, c], positive[:, c] == 1) for c in range(2)])
    labels_of_two = Reading("labels", numbers=2)
    measured = build_metric("auroc")(torch.tensor(logits), torch.tensor(positive), labels_of_two)
    assert measured == pytest.approx(value, abs=1e-6)


def test_what_is_undefined_is_no_number():
    for name, reading, outputs, targets in (
        ("auroc", Reading("classes", 3), torch.rand(6, 3), torch.tensor([0, 0, 1, 1, 0, 1])),
        ("auroc", Reading("labels"), torch.rand(6, 1), torch.ones(6, 1)),
        ("f1", Reading("classes", 3, ignored=-100), torch.rand(2, 3), torch.tensor([-100, -100])),
        ("r2", Reading("numbers"), torch.rand(6, 1), torch.ones(6, 1)),
    ):
        assert np.isnan(build_metric(name)(outputs, targets, reading)), name


def test_a_task_that_overflows_has_the_worst_value_and_is_not_left_out():
    outputs = torch.tensor([[[[1.0]], [[1e30]], [[math.inf]], [[math.nan]]]])  # [tasks, steps, examples, 1]
    batch = TaskBatch(*[torch.zeros(1, 1, 1)] * 4)
    measured = build_metric("mse").per_step(outputs, batch, Reading("numbers"))
    assert measured[0].tolist() == pytest.approx([1, 1e60, math.inf, math.inf])
    assert has_overflowed((torch.zeros(1, 1), torch.full((1, 1), math.nan)), Reading("normal"))
    second = Metric("second", False, lambda outputs, targets, reading: outputs[1].mean(), "")
    measured = second.per_step((outputs[:, :1], outputs[:, 1:2]), batch, Reading("numbers"))
    assert measured.item() == pytest.approx(1e30)
    sure = [[0.0, -math.inf], [-math.inf, 0.0]]  # of two classes, which is no overflow
    scores = torch.tensor([[sure, [[math.nan, 0.0], [0.0, 1.0]], [[math.inf, 0.0], [0.0, 1.0]]]])
    labels = torch.tensor([[0, 1]])
    classes = TaskBatch(scores, labels, scores, labels)
    measured = build_metric("f1").per_step(scores, classes, Reading("classes", 2))
    assert measured.tolist() == [[1, -math.inf, -math.inf]]
    assert not has_overflowed(torch.tensor(sure), Reading("labels", numbers=2))


def test_a_metric_is_measured_in_the_units_of_the_targets():
    reading = Reading("numbers", in_units=lambda values: 4 * values.double() + 10)
    x, y = torch.rand(1, 2, 5, 1), torch.rand(1, 5, 1)
    expected = 4 * (x - y[:, None]).abs().mean((2, 3))
    measured = build_metric("mae").per_step(x, TaskBatch(y, y, y, y), reading)
    torch.testing.assert_close(measured, expected.double())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--metric pearson", "say with --metric-mode min or max"),
        ("--metric f1", "does not fit the outputs, which are numbers"),
        ("--metric f1_scor", "no such metric: try f1_score"),
        ("--metric accuracy", "accuracy is measured anyway"),
        ("--metric {code}:mse --metric-mode min --loss gaussian-nll", "mse is measured anyway"),
        ("--metric {code}:spread", "say with --metric-mode"),
        ("--metric {code}:missing --metric-mode min", "has no missing to call"),
        ("--metric {code}:gauss --metric-mode min", "gives no number for a task's outputs: "),
        ("--learner {code}:Nothing", "gives a NoneType as an output: outputs should be tensors, or tuples"),
        ("--metric-mode max", "--metric-mode has no meaning with --metric none"),
        (
            "--outputs labels --dataset {code}:Pixels --learner {code}:Dense --loss {code}:gauss",
            "logits (3, 3, 5, 5) are none of labels (3, 5, 5)",
        ),
    ],
)
def test_a_metric_that_cannot_be_measured_is_refused_in_one_line(flags, expected, code, tmp_path, refuse):
    line = flags.format(code=code).split()
    assert expected in refuse(*SHORT, *line, "--checkpoint-path", tmp_path)
    assert not [*tmp_path.glob("*")]


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    _load_library.cache_clear()
    with pytest.raises(UsageError, match="which is missing: pip install torchmetrics"):
        build_metric("f1")


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, "dataclass"])
def test_segmentation_is_trained_measured_and_predicted(form, code, tmp_path, capsys):
    own = ["--learner", f"{code}:Dense"]
    own += ["--loss", f"{code}:pixel_loss"] if form else []
    flags = ["--learner-args", f"form={form}"] if form else ["-n", 3, "--loss", "cross-entropy"]
    flags += [] if form else ["--loss-args", "ignore_index=255"]
    run = train(tmp_path / "run", *SHORT, "--dataset", f"{code}:Pixels", *own, *flags, "--metric", "iou")
    progress = load_checkpoint(run / BEST).progress
    assert progress["best_score"] == max(progress["validation"]["query_jaccard_index"])
    tags = curves(run)
    names = ("query_jaccard_index", "best_query_jaccard_index")
    assert {"train/query_accuracy", *(f"validation/{name}" for name in names)} <= {*tags}
    assert "train/query_jaccard_index" not in tags and "validation_by_step/query_jaccard_index/1" in tags
    assert command("--eval", "--load", run, "--dataset", f"{code}:Pixels", *own) == 0
    (file,) = run.glob("best-test-*.json")
    record = json.loads(file.read_text())
    shares = np.array(record["per_task"]["accuracy"]["transductive"])
    (values,) = (np.array(v) for v in record["per_task"]["jaccard_index"].values())
    assert values.shape == shares.shape == (6, 3) and ((shares > 0) & (shares < 1)).all()
    assert record["per_step"][2]["jaccard_index"] == pytest.approx(values[:, 2].mean(), abs=1e-6)
    assert "jaccard_index  accuracy %" in capsys.readouterr().out

    x = np.random.default_rng(0).random((5, 1, 5, 5)).astype(np.float32)
    y = (x[:3, 0] > 0.5).astype(np.int64)
    y[:, 0] = 255  # the label that is left out
    np.savez(tmp_path / "task.npz", support_x=x[:3], support_y=y, query_x=x[3:])
    header, *rows = adapt(run, tmp_path / "task.npz", *own)
    codes = {flag.strip("-"): value for flag, value in zip(own[::2], own[1::2], strict=True)}
    x = torch.tensor(x)
    maml, parameters, _ = load(run, x, outputs=3, **codes)
    outputs = predict(maml, maml.adapt(parameters, x[:3], torch.tensor(y), 2), x[3:])
    logits = outputs.out if form else outputs
    written = np.load(run / "best-adapted-task-classes.npy")
    assert np.array_equal(written, logits.argmax(1).numpy()) and written.dtype == np.uint8
    shares = np.load(run / "best-adapted-task-p.npy")
    assert np.allclose(shares, logits.softmax(1).numpy(), atol=1e-5)
    assert header == ["row", "share(0)", "share(1)", "share(2)"]
    assert [float(row[1]) for row in rows] == pytest.approx((written == 0).mean((1, 2)).tolist(), abs=1e-6)
    assert (run / "best-adapted-task-features.npy").exists() == bool(form)


def test_a_column_holds_what_its_name_says(code, tmp_path):
    table, rows = tmp_path / "tasks.csv", ["task,x,y"]
    rows += [f"{task},{x},{int(x > 3)}" for task in range(8) for x in range(8)]
    table.write_text("\n".join(rows))
    (tmp_path / "mine.csv").write_text("x,y\n1,0\n2,0\n6,1\n0,\n7,\n")
    own = ["--loss", f"{code}:own_bce"]
    data = ["--dataset", f"table:{table}"]
    built_in = train(tmp_path / "built-in", *SHORT, *data, "--loss", "bce")
    users = train(tmp_path / "users", *SHORT, *data, *own)
    headers = []
    for run, flags in ((built_in, []), (users, own), (users, [*own, "--outputs", "labels"])):
        header, *cells = adapt(run, tmp_path / "mine.csv", *flags)
        headers.append(header)
        if "p(y)" in header:
            assert all(row[1] == str(int(float(row[2]) > 0.5)) for row in cells)
    assert headers == [["row", "y", "p(y)"], ["row", "output(y)"], ["row", "y", "p(y)"]]
    heads = ["--learner", f"{code}:MeanAndVariance", "--loss", f"{code}:gauss"]
    run = train(tmp_path / "heads", *SHORT, *heads, "--metric", "r2")
    assert adapt(run, tmp_path / "mine.csv", *heads)[0] == ["row", "mean", "log_variance"]


def test_quantiles_are_adapted_by_their_loss_and_each_is_written(code, tmp_path):
    own = ["--learner", f"{code}:Quantiles", "--loss", f"{code}:pinball"]
    run = train(tmp_path / "run", *SHORT, *own, "--inner-lr", 0.1)
    (tmp_path / "mine.csv").write_text("x,y\n1,0\n2,0\n6,1\n0,\n7,\n")
    header, *rows = adapt(run, tmp_path / "mine.csv", *own)
    network = nn.Linear(1, 3)
    network.load_state_dict(load_checkpoint(run / BEST).parameters)
    shares = torch.tensor([0.1, 0.5, 0.9])
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(2):
        error = torch.tensor([[0.0], [0.0], [1.0]]) - network(torch.tensor([[1.0], [2.0], [6.0]]))
        optimizer.zero_grad()
        torch.where(error > 0, shares * error, (shares - 1) * error).mean().backward()
        optimizer.step()
    expected = network(torch.tensor([[0.0], [7.0]])).detach()
    assert header == ["row", "output 1", "output 2", "output 3"]
    predicted = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-12)


def test_tokens_are_adapted_to_and_the_written_weights_predict_the_same(code, tmp_path):
    own = ["--learner", f"{code}:words"]
    run = train(tmp_path / "run", *SHORT, "--dataset", f"{code}:Tokens", *own)
    x = np.arange(15).reshape(5, 3) % 9
    np.savez(tmp_path / "task.npz", support_x=x[:3], support_y=x[:3].mean(1), query_x=x[3:])
    _, *rows = adapt(run, tmp_path / "task.npz", *own)
    network = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 1))
    network.load_state_dict(torch.load(run / "best-adapted-task-weights.pt", weights_only=True))
    expected = network(torch.tensor(x[3:]))[:, 0].tolist()
    assert [float(row[1]) for row in rows] == pytest.approx(expected, rel=1e-4)


def test_parameters_in_half_precision_are_learned_in_that_of_the_run(code, tmp_path):
    own = ["--learner", f"{code}:narrow", "--learner-args"]
    runs = [train(tmp_path / f"{wide}", *SHORT, *own, f"wide={wide}") for wide in (False, True)]
    narrow, wide = (load_checkpoint(run / BEST) for run in runs)
    assert {w.dtype for w in narrow.parameters.values()} == {torch.float32}
    assert all(torch.equal(w, wide.parameters[name]) for name, w in narrow.parameters.items())


def test_runs_are_compared_by_one_metric(tmp_path, refuse, capsys):
    plain = train(tmp_path / "plain", *SHORT)
    measured = train(tmp_path / "measured", *SHORT, "--metric", "r2", "--inner-lr", 0.1)
    line = ["--compare", plain, measured, "--eval-tasks", 6]
    assert "plain has --metric none, and measured has r2: give one for all" in refuse(*line)
    assert command(*line, "--metric", "r2") == 0
    assert "Query r2_score, validation tasks" in capsys.readouterr().out
    (file,) = tmp_path.glob("comparison-*.json")
    record = json.loads(file.read_text())
    assert (record["measure"], record["first_task"]) == ("r2_score", 5)  # as many as --val-tasks chose by
    assert load_checkpoint(plain / BEST).settings["val_tasks"] == 5
