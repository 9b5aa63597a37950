"""A run: its settings and folder, its curves, and what it saves and shows."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from commands.config import CONFIG_FLAGS, Config, meaningful
from common.batch import TaskDistribution
from common.errors import reason_of
from common.optimizers import Weights
from evaluation.examples import examples_figure
from evaluation.figures import learning_figure
from evaluation.meta_test import Evaluation
from evaluation.tables import write_json
from inner_loop import RATE
from learners.losses import loss_name
from maml import MAML
from training.checkpoint import Checkpoint, Curve, Progress
from training.folders import BEST, RESULTS
from training.step import TAIL
from training.tensorboard import RunLog, settings_as_markdown

BY_STEP = "validation_by_step"
FINAL_ITERATIONS = 500  # whose mean training loss is reported at the end


class Run:
    """What belongs to one run, of the one or the several that are trained at once.

    Arguments:
        parameters: what it begins with, or goes on from.
        start: a checkpoint to go on from, its parameters already those of `parameters`.
        origin: where else the parameters come from, if not from the initialisation; for the record.
        computed_by: what the last bits depend on, for the record.
        writes: whether this process is the one that writes to the folder.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        parameters: Weights,
        start: Checkpoint | None = None,
        origin: str | None = None,
        *,
        computed_by: dict[str, Any] | None = None,
        writes: bool = True,
    ) -> None:
        self.config = config
        self.folder = folder
        self.parameters = parameters
        self.start = start
        self.computed_by = computed_by or {}
        self.writes = writes
        self.iteration = start.iteration if start else 0
        self.progress = Progress(**start.progress) if start else Progress(origin=origin)
        self.log_every = min(
            config.training.log_every, config.training.iterations
        )  # a short run has a curve, too
        self.failure: str | None = None  # the iteration whose numbers are not finite, and why
        self.skipped = 0  # iterations, since it began or went on
        self.warned = False
        self.log = RunLog(None)

    def begin(self) -> None:
        """Opens the event files."""
        if self.writes:
            self.log = RunLog(self.folder, begin_at=self.iteration + 1 if self.iteration else 0)
        if not self.iteration:
            self.log.text("settings", settings_as_markdown(meaningful(self.config) | self._origin()), 0)
            flags = {n: f for n, f in CONFIG_FLAGS.items() if f.group not in ("machine", "logging")}
            self.log.begin(meaningful(self.config), self.tags(), flags)

    def _origin(self) -> dict[str, str]:
        return {"initial_weights": self.progress.origin} if self.progress.origin else {}

    # ---- curves -----------------------------------------------------------------------------

    def add_training(self, means: dict[str, float], rate: float, meta_lr: float) -> None:
        """A point of the training curves: means since the last one."""
        self.progress.window_size = 0
        skipped = means["skipped"]
        self.skipped += int(skipped)
        measured = {name: value for name, value in means.items() if name not in TAIL}
        _extend(self.progress.training, self.iteration, measured)
        if skipped and self.writes and not self.warned:
            self.warned = True
            tqdm.write(
                f"{skipped:,.0f} of the last {self.log_every:,} iterations skipped, the last of them "
                f"{means['last_skipped']:,.0f}: their numbers were not finite (train/skipped counts on)",
                file=sys.stderr,
            )
        shown = measured | ({"skipped": skipped} if self.config.training.on_nan == "skip" else {})
        self.log.scalars({f"train/{name}": value for name, value in shown.items()}, self.iteration)
        self.log.scalars({"speed/iterations_per_second": rate, "optimizer/meta_lr": meta_lr}, self.iteration)
        if self.config.choices.inner_rates != "fixed":
            self.log.scalars(self._inner_rates(), self.iteration)

    def tags(self) -> list[str]:
        """Of all scalars that the run will write."""
        config = self.config
        measures = ["query_loss", *["query_accuracy"] * config.tasks.classification]
        return [
            *(f"train/{measure}" for measure in (*measures, "meta_gradient_norm")),
            *["train/skipped"] * (config.training.on_nan == "skip"),
            "speed/iterations_per_second",
            "optimizer/meta_lr",
            *(f"validation/{measure}" for measure in measures),
            "validation/diverged_tasks",
            f"validation/best_{measures[-1]}",
            *(
                f"{BY_STEP}/{measure}/{step}"
                for measure in measures
                for step in shown_steps(config.choices.trained_steps)
            ),
            *self._inner_rates(),
        ]

    def _inner_rates(self) -> dict[str, float]:
        """Learned inner rates by tag: of each weight and step; of elements, the mean and the least."""
        rates = {name[len(RATE) :]: r for name, r in self.parameters.items() if name.startswith(RATE)}
        values: dict[str, float] = {}
        for name, rate in rates.items():
            if self.config.choices.inner_rates == "layer-step":
                steps = enumerate(rate.tolist(), 1)
                values |= {f"inner_lr/{name}/step_{step}": value for step, value in steps}
            else:
                values[f"inner_lr/{name}/mean"] = rate.mean().item()
                values[f"inner_lr/{name}/least"] = rate.min().item()
        return values

    def add_validation(self, evaluation: Evaluation) -> bool:
        """A point of the validation curves; whether it is the best so far."""
        norm = self.config.choices.query_norm
        results = {"query_loss": evaluation.losses[norm]}
        if evaluation.accuracies:
            results["query_accuracy"] = evaluation.accuracies[norm]
        by_step = {name: [at.mean().item() for at in found.unbind(1)] for name, found in results.items()}
        values = {name: found[-1] for name, found in by_step.items()}
        _extend(self.progress.validation, self.iteration, values)
        score = values.get("query_accuracy", -values["query_loss"])
        best = self.progress.best_score
        better = math.isfinite(score) and (best is None or score > best)
        if better:
            self.progress.best_score, self.progress.best_iteration = score, self.iteration
        shown = values | {"diverged_tasks": float(evaluation.diverged(norm)[:, -1].sum())}
        if self.progress.best_score is not None:
            measure = list(values)[-1]
            shown[f"best_{measure}"] = as_measured(self.progress.best_score, measure)
        scalars = {f"validation/{name}": value for name, value in shown.items()}
        for name, found in by_step.items():
            scalars |= {f"{BY_STEP}/{name}/{step}": found[step] for step in shown_steps(len(found) - 1)}
        self.log.scalars(scalars, self.iteration)
        return better

    def draw_examples(self, maml: MAML, distribution: TaskDistribution) -> None:
        """Draw validation tasks before and after adaptation, where there is a picture of them."""
        if not self.writes:
            return
        figure = examples_figure(
            maml,
            self.parameters,
            distribution,
            "validation",
            steps=self.config.choices.steps,
            test_steps=self.config.evaluation.test_steps,
            normalisation=self.config.choices.query_norm,
            inner_batch=self.config.evaluation.eval_inner_batch,
            title=f"validation tasks, iteration {self.iteration:,}",
        )
        try:
            if figure is not None:
                self.log.figure("examples", figure, self.iteration, self.folder / "examples.png")
        except OSError as error:
            tqdm.write(f"examples.png could not be written ({reason_of(error)})", file=sys.stderr)

    # ---- saving -----------------------------------------------------------------------------

    def checkpoint(
        self,
        moments: list[Weights],
        statistics: Weights,
        window: dict[str, float],
        maml: MAML,
        distribution: TaskDistribution,
    ) -> Checkpoint:
        """The run as it is to be saved."""
        self.progress.window = window
        return Checkpoint(
            self.config.values(),
            self.iteration,
            _owned(self.parameters),
            _owned(moments[0]),
            _owned(moments[1]),
            asdict(self.progress),
            _owned(statistics),
            {name: t.cpu().contiguous() for name, t in maml.fixed.items()},
            distribution.split_names,
            self.computed_by,
        )

    # ---- the end ----------------------------------------------------------------------------

    @property
    def best_file(self) -> Path | None:
        return self.folder / BEST if self.progress.best_iteration else None

    def final_loss(self) -> tuple[float, int, int] | None:
        """Mean training loss of the last 500 iterations, and the first and the last of them.

        Whole points of the curve only: of fewer or more iterations, where these do not divide 500.
        """
        if not self.progress.training:
            return None
        ends = [int(end) for end in self.progress.training["iteration"]]
        losses = self.progress.training["query_loss"]
        total, first = 0.0, ends[-1] + 1
        for position in reversed(range(len(ends))):
            begin = ends[position - 1] + 1 if position else 1
            if ends[-1] - begin >= FINAL_ITERATIONS and first <= ends[-1]:
                break
            total += losses[position] * (ends[position] - begin + 1)
            first = begin
        return total / (ends[-1] - first + 1), first, ends[-1]

    def end(self, *, classification: bool) -> None:
        """Writes what is left for the event files, and the curves as JSON and as a picture."""
        if not self.writes:
            return
        final = self.final_loss()
        result: dict[str, Any] = {
            "settings": meaningful(self.config) | self._origin(),
            "iteration": self.iteration,
            "best_iteration": self.progress.best_iteration,
            "failure": self.failure,
            "final_training_loss": final and dict(zip(("mean", "from", "to"), final, strict=True)),
            "training": self.progress.training,
            "validation": self.progress.validation,
        }
        after = self.iteration + 1  # where a run that goes on drops it
        if self.progress.training and self.progress.validation:
            figure = learning_figure(
                self.progress.training,
                self.progress.validation,
                measure="query_accuracy" if classification else "query_loss",
                label="query accuracy" if classification else f"query {loss_name(self.config.learner.loss)}",
                log_every=self.log_every,
            )
            self.log.figure("training", figure, after, self.folder / "training.png")
        self.log.end(after, failed=self.failure is not None)
        self.log.flush()
        write_json(self.folder / RESULTS, result)  # the last: a run that has it is finished


def shown_steps(steps: int) -> list[int]:
    """The inner steps that have a validation curve: of many, eleven."""
    return sorted({round(steps * tenth / 10) for tenth in range(11)})


def as_measured(score: float, measure: str) -> float:
    """The validation measure of a score, of which more is better: an accuracy, or minus a loss."""
    return score if measure == "query_accuracy" else -score


def _extend(curve: Curve, iteration: int, values: dict[str, float]) -> None:
    for name, value in {"iteration": iteration, **values}.items():
        curve.setdefault(name, []).append(value)


def _owned(weights: Weights) -> dict[str, Tensor]:
    """Of their own: a view would be saved with the whole vector behind it."""
    return {name: w.clone() for name, w in weights.items()}
