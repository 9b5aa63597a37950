"""One training run: its settings and folder, its curves, and the files that it leaves.

The trainer hands over the means of its metrics and its validations; a `Run` keeps them as curves, shows them
in TensorBoard, and remembers the best validation. Several runs that are trained at once have a `Run` each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.batch import TaskDistribution
from common.choices import Choices
from common.errors import escape_text
from common.files import write_bytes
from common.optimizers import Weights
from common.processes import World
from evaluation.examples import adapt_examples, examples_figure
from evaluation.figures import Curves, learning_figure, window_means
from evaluation.meta_test import Evaluation, evaluate
from evaluation.options import EvaluationOptions
from evaluation.tables import plain_values, write_json
from learners.computed_heads import RIDGE
from learners.reading import Reading
from maml import MAML, RATE
from training.checkpoint import Checkpoint, History, Progress
from training.folders import RESULTS, SETTINGS
from training.log import RunLog
from training.options import TrainingOptions
from training.step import TAIL, State
from training.tensorboard import META_LR, SPEED, WEIGHTS, Description

FINAL_ITERATIONS = 500  # the training loss reported at the end is their mean


@dataclass(eq=False, kw_only=True)
class Run:
    """A training run; one that resumes has a `start`, which holds its `parameters` too."""

    folder: Path
    parameters: Weights  # meta-parameters by name, at `iteration`
    training: TrainingOptions
    choices: Choices
    evaluation: EvaluationOptions
    settings: Mapping[str, Any]  # saved as they are, with `training` as it is now
    settings_file: str  # the text of settings.toml
    described_by: Mapping[str, Any]  # the settings that TensorBoard shows
    columns: Mapping[str, Any]  # of TensorBoard's view of all runs: an example value by name
    reading: Reading
    measure_name: str  # for people
    several: bool  # whether the tasks are of several data sets
    start: Checkpoint | None = None
    origin: str | None = None  # of a new run's parameters, if not the initialisation
    computed_by: dict[str, Any] = field(default_factory=dict)  # what the last bits depend on
    writes: bool = True  # whether this process writes to the folder
    failure: str | None = None  # the iteration whose numbers are non-finite, and why

    def __post_init__(self) -> None:
        start = self.start
        self.iteration = start.iteration if start else 0
        self.progress = Progress(**start.progress) if start else Progress(origin=self.origin)
        self.log_every = min(self.training.log_every, self.training.iterations)  # a short run has a curve too
        self.measure = f"query_{self.reading.measure}"
        if start and self.measure not in self.progress.validation:  # chosen by another measure
            self.progress.best_score = None
        self.skipped = -int(self.progress.window.get("skipped", 0))  # iterations, by this process
        self.log = RunLog(None)  # until the run begins, and in all processes but the first
        self.state: State  # of the present iteration; the trainer's

    def begin(self) -> None:
        """Open the log and write the settings; a new run describes itself in both."""
        if self.writes:
            reading, several = self.reading, self.several
            filled = {
                "query accuracy": reading.has_accuracy,
                "query metric": reading.metric,
                "inner rates": self.choices.inner_rates != "fixed",
                "ridge head": self.choices.head_init == "ridge",
                "calibration": reading.further,
                "loss by data set": several,
                "accuracy by data set": several and reading.has_accuracy,
            }
            empty = [chart for chart, has_points in filled.items() if not has_points]
            description = Description(self._description(), self.columns, empty, self.measure)
            begin_at = self.iteration + 1 if self.iteration else 0
            self.log = RunLog(self.folder, self.training.report_to, description, begin_at=begin_at)
            write_bytes(self.folder / SETTINGS, self.settings_file.encode())

    def _description(self) -> dict[str, Any]:
        """Return the settings to show, as they are now, and where the weights come from."""
        origin = {"initial_weights": self.progress.origin} if self.progress.origin else {}
        return {name: getattr(self.training, name, v) for name, v in self.described_by.items()} | origin

    # ---- curves -----------------------------------------------------------------------------

    def add_training(self, means: dict[str, float], rate: float, meta_lr: float) -> None:
        """Add a point to the training curves: means since the last one, `rate` in iterations per second."""
        self.progress.window_size = 0
        skipped = int(means["skipped"])
        metrics = {name: value for name, value in means.items() if name not in TAIL}
        extend_curve(self.progress.training, self.iteration, metrics)
        self.skipped += skipped
        if self.training.on_nan == "skip":
            metrics["skipped"] = skipped
        scalars = {f"train/{name}": value for name, value in metrics.items()}
        scalars |= {SPEED: rate, META_LR: meta_lr}
        for name, rates in self.parameters.items():
            tag = f"{WEIGHTS}{name}"
            if name.startswith(RATE) and self.choices.inner_rates == "layer-step":
                scalars |= {f"{tag}/step_{step}": value for step, value in enumerate(rates.tolist(), 1)}
            elif name.startswith(RATE):
                scalars |= {f"{tag}/mean": rates.mean().item(), f"{tag}/least": rates.min().item()}
            elif name.startswith(RIDGE):
                scalars[tag] = rates.item()
        self.log.add(scalars, self.iteration)

    def validate(
        self, maml: MAML, distribution: TaskDistribution, world: World, interrupted: Callable[[], bool]
    ) -> bool:
        """Measure validation tasks, add a point to the curves, and return whether it is the best so far."""
        norm = self.choices.query_norm
        evaluation = evaluate(
            maml,
            self.parameters,
            distribution,
            "validation",
            tasks=self.training.val_tasks,
            steps=self.choices.trained_steps,
            normalisations=(norm,),
            inner_batch=self.evaluation.eval_inner_batch,
            world=world,
            interrupted=interrupted,
        )
        by_step = self._means_by_step(evaluation)
        values = {name: steps[-1] for name, steps in by_step.items()}
        parts = {
            f"{name}/{part}": steps[-1]
            for part, measured in evaluation.parts.items()
            for name, steps in self._means_by_step(measured).items()
        }
        extend_curve(self.progress.validation, self.iteration, values | parts)
        sign = 1 if self.reading.more_is_better else -1
        score, best = sign * values[self.measure], self.progress.best_score
        is_best = math.isfinite(score) and (best is None or score > best)
        if is_best:
            best = self.progress.best_score = score
            self.progress.best_iteration = self.iteration
        values["diverged_tasks"] = float(evaluation.find_diverged(norm)[:, -1].sum())
        if self.reading.metric or (self.reading.has_accuracy and self.reading.is_masked):
            values["undefined_tasks"] = float(evaluation.measured(norm)[:, -1].isnan().sum())
        if best is not None:
            values[f"best_{self.measure}"] = sign * best
        scalars = {f"validation/{name}": value for name, value in values.items()}
        scalars |= {f"validation_by_dataset/{name}": value for name, value in parts.items()}
        for name, steps in by_step.items():
            shown = {round((len(steps) - 1) * tenth / 10) for tenth in range(11)}  # of many steps, eleven
            scalars |= {f"validation_by_step/{name}/{step}": steps[step] for step in sorted(shown)}
        self.log.add(scalars, self.iteration)
        return is_best

    def _means_by_step(self, evaluation: Evaluation) -> dict[str, list[float]]:
        """Return a validation's means over tasks, after 0, 1, ... steps, by the name of their curve."""
        norm = self.choices.query_norm
        names = {"metric": self.measure}
        return {
            names.get(name, f"query_{name}"): [
                (t if name == "loss" else t[~t.isnan()]).mean().item() for t in values[norm].unbind(1)
            ]
            for name, values in evaluation.measures.items()
        }

    @property
    def last_validation(self) -> float:
        """Return the iteration of the last validation, 0 without one."""
        return self.progress.validation.get("iteration", [0])[-1]

    @property
    def best_validation(self) -> float | None:
        """Return the validation accuracy, loss or metric of best.pt, if there has been one."""
        best = self.progress.best_score
        return best if best is None or self.reading.more_is_better else -best

    @property
    def is_non_finite(self) -> bool:
        """Return whether its numbers have become non-finite; this waits for the device."""
        return bool(self.state.sums[-1].isinf())

    def draw_examples(self, maml: MAML, distribution: TaskDistribution) -> None:
        """Draw validation tasks before and after adaptation, if their kind has a picture."""
        steps = {self.choices.steps, self.evaluation.test_steps}
        inner_batch = self.evaluation.eval_inner_batch
        examples = adapt_examples(maml, self.parameters, distribution, "validation", steps, inner_batch)
        if examples is not None:
            figure = examples_figure(examples, f"validation tasks, iteration {self.iteration:,}")
            self.log.figure("view/tasks", figure, self.iteration, self.folder / "examples.png")

    # ---- results ----------------------------------------------------------------------------

    def end(self) -> None:
        """Write the curves as a picture and, last, as JSON, with the iteration reached. Raises OSError."""
        progress, loss = self.progress, final_loss(self.progress.training)
        results = {
            "iteration": self.iteration,
            "iterations": self.training.iterations,
            "best_iteration": progress.best_iteration,
            "failure": self.failure,
            "final_training_loss": loss,
            "training": progress.training,
            "validation": progress.validation,
        }
        shown = {
            "iterations": self.iteration,
            f"best validation {self.measure_name}": self.best_validation,
            "best iteration": progress.best_iteration,
            "training loss": loss and loss["mean"],
            "failure": self.failure,
        }
        table = [{"result": n, "value": str(plain_values(v))} for n, v in shown.items() if v is not None]
        after = self.iteration + 1  # a resumed run drops it
        if progress.training and progress.validation:
            title = f"{self.described_by['method']}, run {escape_text(self.folder.name)}"
            figure = learning_figure(self._curves(), f"query {self.measure_name}", title)
            self.log.figure("view/training", figure, after, self.folder / "training.png")
        self.log.add({"results": table}, after)
        self.log.sync()
        self.log.close(ended_at=after if self.failure is None else None)
        write_json(self.folder / RESULTS, results)

    def _curves(self) -> Curves:
        """Return the measure over iterations, in training and validation, as it is drawn."""
        curves, progress = {}, self.progress
        if self.measure in progress.training:  # a metric is measured at validations alone
            curve, points = window_means((progress.training["iteration"], progress.training[self.measure]))
            curves[f"training, means of {points * self.log_every:,} iterations"] = [curve]
        validation = progress.validation["iteration"], progress.validation[self.measure]
        return curves | {"validation": [validation]}


def final_loss(training: History) -> dict[str, Any] | None:
    """Return the "mean" training loss of about the last 500 iterations, whole points, "from" and "to"."""
    if not training:
        return None
    ends = [int(end) for end in training["iteration"]]
    points = list(zip([0, *ends[:-1]], ends, training["query_loss"], strict=True))
    points = [point for point in points if math.isfinite(point[2])] or points  # one may be skipped whole
    final = [point for point in points if ends[-1] - point[0] <= FINAL_ITERATIONS] or points[-1:]
    weights = [end - begin for begin, end, _ in final]
    mean = sum(loss * weight for (*_, loss), weight in zip(final, weights, strict=True)) / sum(weights)
    return {"mean": mean, "from": final[0][0] + 1, "to": ends[-1]}


def extend_curve(curve: History, iteration: int, values: dict[str, float]) -> None:
    """Append a point to a curve; what was not measured before is NaN there."""
    points = len(curve.get("iteration", []))
    for name, value in {"iteration": iteration, **values}.items():
        curve.setdefault(name, [math.nan] * points).append(value)
