"""Few-shot estimators with scikit-learn's conventions: a trained run, a few examples, predictions.

    from commands.estimators import FewShotClassifier

    classifier = FewShotClassifier.load("checkpoints/RUN")
    classifier.fit(x, y)                # a few examples [examples, ...] and their labels, of any kind
    classifier.predict(new_x)           # and predict_proba, score, classes_

They predict what --adapt writes for the same examples. scikit-learn itself is not required.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from commands.config import CONFIG_FLAGS
from commands.initialisation import Initialisation, Solution
from common.batch import Tree
from common.errors import UsageError
from common.options import find_nearest
from common.task import UserTask
from learners.losses import LOSSES
from learners.reading import Reading
from tasks.pixels import Form
from tasks.scales import apply_scale
from tasks.tables import sort_classes
from tasks.user_tasks import read_numbers, read_pixels

Array = np.ndarray[Any, Any]
SETTINGS = (
    *("test_steps", "batch_norm", "eval_inner_batch", "precision", "outputs"),
    *("invert", "image_range", "learner", "loss"),
)
OF_PROCESS = ("tf32", "bf16-products")  # an estimator leaves PyTorch's own settings alone


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """Raise ValueError for a mistake in checkpoint, settings or data, as scikit-learn does."""
    try:
        yield
    except UsageError as error:
        raise ValueError(str(error)) from error


class FewShotEstimator:
    """Adapt a trained run to a few examples; see `FewShotClassifier` and `FewShotRegressor`.

    Args:
        run: a run's folder, of which best.pt is taken, or a checkpoint.
        device: "cpu", "cuda", "mps" or "auto".
        settings: those that --adapt takes as flags, by name: `SETTINGS`.
    """

    classification: bool

    def __init__(self, run: Path | str, *, device: str = "cpu", **settings: Any) -> None:
        self.run, self.device, self.settings = run, device, settings
        self._start: Initialisation | None = None
        self._fitted: tuple[UserTask, Solution] | None = None

    @classmethod
    @_as_value_errors()
    def load(cls, run: Path | str, *, device: str = "cpu", **settings: Any) -> Self:
        """Return the estimator of a trained run; ValueError where the run or a setting does not fit."""
        estimator = cls(run, device=device, **settings)
        estimator._open()
        return estimator

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return run, device and settings by name."""
        return {"run": self.run, "device": self.device, **self.settings}

    def set_params(self, **parameters: Any) -> Self:
        """Change run, device or settings; it has to be fitted again."""
        FewShotEstimator.__init__(self, **self.get_params() | parameters)
        return self

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return f"{type(self).__name__}({str(self.run)!r}{settings})"

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's description of an estimator, for which it alone asks."""
        from sklearn.utils import ClassifierTags, RegressorTags, Tags, TargetTags

        target = TargetTags(required=True, multi_output=not self.classification)
        if self.classification:
            return Tags("classifier", target, classifier_tags=ClassifierTags())
        return Tags("regressor", target, regressor_tags=RegressorTags())

    def _open(self) -> Initialisation:
        """Return the checkpoint with its settings; UsageError where they do not fit."""
        if self._start is None:
            settings = {name: _check_setting(name, value) for name, value in self.settings.items()}
            start = Initialisation.read(self.run, settings, self.device)
            if start.config.tasks.classification != self.classification:
                right = "regression: take FewShotRegressor", "classes: take FewShotClassifier"
                raise UsageError(f"{start.file} has learned {right[not self.classification]}")
            self._start = start
        return self._start

    def _inputs(self, x: Any) -> Tensor:
        """Return examples as the learner gets them: scaled as the run's images, or its table, were."""
        start = self._open()
        source, options, runtime = start.source, start.config.tasks, start.runtime
        kind = options.facts.inputs
        if source.inputs and hasattr(x, "columns"):  # a data frame: by name, in whatever order
            if missing := [name for name in source.inputs if name not in x.columns]:
                raise UsageError(f"x has no column {missing[0]!r}, an input of the run's table")
            x = x[source.inputs]
        values = read_numbers("x", x, axes=2)
        if kind == "images":
            user_range = options.black_and_white if "image_range" in self.settings else None
            pixels = read_pixels(values, Form.of(options), source.image_range, user_range)
            inputs = pixels.to(runtime.dtype) / 255
        else:
            inputs = apply_scale(torch.tensor(values), source.scales, "input", "x")
        is_integer = kind == "any" and not inputs.is_floating_point()  # such as tokens
        return inputs.to(runtime.device, torch.int64 if is_integer else runtime.dtype)

    def _adapt(self, x: Tensor, y: Tensor, classes: int = 0) -> Solution:
        """Adapt to examples; UsageError, which has their shapes, where they do not fit the run."""
        start = self._open()
        y = y.to(start.runtime.device)
        task = UserTask("", x, y, x[:0], [str(label) for label in range(classes)], [])
        try:
            solution = start.adapt(task)
        except UsageError as error:
            raise UsageError(f"x {(*x.shape,)} and y {(*y.shape,)}: {error}") from error
        self._fitted, self.n_features_in_ = (task, solution), x.shape[1]
        return solution

    def _outputs(self, x: Any) -> tuple[Reading, Tree, Tensor, Tensor | None]:
        """Return how outputs are read, and what `Initialisation.outputs` gives for examples."""
        if self._fitted is None:
            raise UsageError(f"{type(self).__name__}: call fit with a few examples first")
        (task, solution), inputs = self._fitted, self._inputs(x)
        if inputs.shape[1:] != task.support_x.shape[1:]:
            before, now = ((len(t), *t.shape[1:]) for t in (task.support_x, inputs))
            raise UsageError(f"x is {now}, and fit had {before}: give examples of the same shape")
        task = replace(task, query_x=inputs.to(task.support_x.dtype))
        return solution.reading, *self._open().outputs(solution, task)


class FewShotClassifier(FewShotEstimator):
    """Classify by a run that has learned classes, adapted to a few labelled examples.

    After `fit`, `classes_` are the labels in sorted order: the columns of `predict_proba`.
    """

    classification = True

    @_as_value_errors()
    def fit(self, x: Any, y: Any) -> Self:
        """Adapt to examples `[examples, ...]` with labels of any kind; ValueError where they do not fit."""
        inputs, labels = self._inputs(x), np.asarray(y)
        if labels.shape != inputs.shape[:1]:
            raise UsageError(f"y is {labels.shape}: give a label for each of the {len(inputs)} examples")
        if labels.dtype.kind == "f" and (labels != labels.round()).any():
            raise UsageError("y has decimals or NaN: give labels; FewShotRegressor predicts numbers")
        try:
            classes, positions = np.unique(labels, return_inverse=True)
        except TypeError as error:
            raise UsageError(f"y has labels of several kinds: {error}") from error
        number = len(classes)
        if number < 2:
            raise UsageError(f"y has one class, {classes.tolist()[0]!r}: give examples of two or more")
        self._open().check_classes(number, "y")
        outputs = torch.arange(number)  # of each class: a table orders those that are numbers by size
        if self._open().config.tasks.facts.inputs == "vectors":
            _, outputs = sort_classes([str(label) for label in classes], outputs)
        reading = self._adapt(inputs, outputs[torch.from_numpy(positions)], number).reading
        ordered = reading.kind in ("classes", "ordinal") and reading.classes == number
        if not ordered and (reading.kind, number) != ("labels", 2):
            raise UsageError(f"the learner gives {reading.describe()}, no scores of {number} classes")
        self.classes_, self._places = classes, outputs
        return self

    @_as_value_errors()
    def predict(self, x: Any) -> Array:
        """Return the class of each example."""
        reading, outputs, *_ = self._outputs(x)
        predicted = reading.predict(outputs).view(-1).long()
        return self.classes_[self._places.argsort()[predicted].numpy()]

    @_as_value_errors()
    def predict_proba(self, x: Any) -> Array:
        """Return the probability of each class, `[examples, classes]`; after --loss bce, each by itself."""
        reading, outputs, *_ = self._outputs(x)
        shares = reading.probabilities(outputs).double()
        if reading.kind == "labels":  # one logit, of the second class
            shares = torch.cat([1 - shares.view(-1, 1), shares.view(-1, 1)], 1)
        if shares.shape[1] != len(self.classes_):
            raise UsageError(f"the learner gives {reading.describe()}: classes have no probabilities")
        return shares[:, self._places].numpy()

    def score(self, x: Any, y: Any) -> float:
        """Return the share of examples that are classified correctly."""
        return float((self.predict(x) == np.asarray(y).ravel()).mean())


class FewShotRegressor(FewShotEstimator):
    """Predict numbers by a run that has learned a regression, adapted to a few examples."""

    classification = False

    @_as_value_errors()
    def fit(self, x: Any, y: Any) -> Self:
        """Adapt to examples with targets `[examples]` or `[examples, targets]`, in the units of the data."""
        start, inputs, targets = self._open(), self._inputs(x), read_numbers("y", y)
        if len(targets) != len(inputs):
            raise UsageError(f"y is {targets.shape}: give a target for each of {len(inputs)} examples")
        self._shape = targets.shape[1:]
        columns = targets if self._shape else targets[:, None]
        scaled = apply_scale(torch.tensor(columns), start.source.scales, "target", "y")
        reading = self._adapt(inputs, scaled.to(start.runtime.dtype)).reading
        options = start.config.learner
        if reading.has_accuracy:
            raise UsageError(f"the learner gives {reading.describe()}, no numbers: use --adapt")
        if options.loss not in LOSSES and options.outputs != "numbers":
            raise UsageError(f"whether outputs of --loss {options.loss} predict y, say outputs='numbers'")
        return self

    @_as_value_errors()
    def predict(self, x: Any, return_std: bool = False) -> Any:
        """Return predicted targets of the shape that `fit` was given, in the units of the data.

        With `return_std`, return their standard deviations too; ValueError unless --loss gaussian-nll.
        """
        _, _, numbers, deviations = self._outputs(x)
        if numbers.shape[1:].numel() != math.prod(self._shape):
            raise UsageError(f"the learner's outputs are {(*numbers.shape,)}, none of y's {self._shape}")
        if return_std and deviations is None:
            raise UsageError("the run gives no standard deviations: train one with --loss gaussian-nll")
        parts = [numbers, deviations] if return_std and deviations is not None else [numbers]
        mean, *deviation = (part.double().reshape(-1, *self._shape).numpy() for part in parts)
        return (mean, *deviation) if return_std else mean

    def score(self, x: Any, y: Any) -> float:
        """Return the coefficient of determination, R squared; of several targets the mean.

        As in scikit-learn, targets that do not vary have 1 if they are predicted exactly and 0 otherwise, and
        a single example has NaN.
        """
        targets = np.asarray(y, np.float64)
        if len(targets) < 2:
            return math.nan
        residual = ((targets - self.predict(x).reshape(targets.shape)) ** 2).sum(0)
        total = ((targets - targets.mean(0)) ** 2).sum(0)
        constant = total == 0
        return float(np.mean(np.where(constant, residual == 0, 1 - residual / np.where(constant, 1, total))))


def _check_setting(name: str, value: Any) -> Any:
    """Return a setting's value as flags have it; UsageError for an unknown name or a wrong value."""
    if name not in SETTINGS:
        near = find_nearest(name, SETTINGS)
        hint = f"did you mean {near}?" if near else ", ".join(SETTINGS)
        raise UsageError(f"there is no setting {name!r}: {hint}")
    value = value.item() if isinstance(value, np.generic) else value
    if name == "precision" and value in OF_PROCESS:
        raise UsageError(f"precision {value!r} is a setting of the whole process: torch.backends has it")
    if problem := CONFIG_FLAGS[name].problem(value):
        raise UsageError(f"{name} should be {problem}, not {value!r}")
    return value
