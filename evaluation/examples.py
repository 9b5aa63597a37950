"""Pictures of what weights do with tasks of a split, while they are trained and when they are tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from commands.config import Config
from common.batch import TaskBatch, TaskDistribution
from common.optimizers import Weights
from dataset import Regression
from evaluation import meta_test as evaluation
from evaluation.features import until_not_finite
from evaluation.figures import Theme, class_features_figure, curve_features_figure, fits_figure, tasks_figure
from maml import MAML
from tasks.image_tasks import ImageTasks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES, SHEETS = 4, 3  # tasks in a picture
MOST_STEPS = 100  # of features


@dataclass(frozen=True)
class Scene:
    """Weights, and the tasks that they are shown with."""

    maml: MAML
    parameters: Weights
    distribution: TaskDistribution
    config: Config
    split: str
    when: str  # in titles
    theme: Theme

    def examples(self, tasks: int, steps: int) -> tuple[TaskBatch, Tensor]:
        """See `evaluation.examples`."""
        return evaluation.examples(
            self.maml,
            self.parameters,
            self.distribution,
            self.split,
            tasks=tasks,
            steps=steps,
            normalisation=self.config.choices.query_norm,
            inner_batch=self.config.evaluation.eval_inner_batch,
        )

    def tasks(self) -> Figure | None:
        """Tasks before and after adaptation, where there is a picture of them."""
        config, distribution = self.config, self.distribution
        if not evaluation.can_be_drawn(distribution):
            return None
        steps = max(config.choices.steps, config.evaluation.test_steps)
        batch, outputs = self.examples(SHEETS if distribution.classification else CURVES, steps)
        title = f"{self.split} tasks, {self.when}"
        if isinstance(distribution, ImageTasks):
            steps = config.evaluation.test_steps
            return tasks_figure(
                batch,
                outputs,
                ways=distribution.ways,
                shots=distribution.shots,
                queries=distribution.queries,
                step=steps,
                title=f"{title}: before and after {steps} step{'s' * (steps > 1)}",
                theme=self.theme,
            )
        shown = sorted({0, config.choices.steps, config.evaluation.test_steps})
        return fits_figure(batch, outputs, shown, title, self.theme)

    def features(self) -> Figure | None:
        """What goes into the head, of the first task; of classes, and of curves."""
        config = self.config
        curves = isinstance(self.distribution, Regression)
        if not curves and not self.distribution.classification:
            return None
        seen = evaluation.features_of_task(
            self.maml,
            self.parameters,
            self.distribution,
            self.split,
            steps=min(config.evaluation.test_steps, MOST_STEPS),
            normalisation=config.choices.query_norm,
            inner_batch=config.evaluation.eval_inner_batch,
        )
        finite = None if seen is None else until_not_finite(seen.features)
        if seen is None or finite is None or not len(finite):
            return None
        title = f"features that enter the head: a {self.split} task, {self.when}"
        if curves:
            return curve_features_figure(finite, seen.x[:, 0], seen.support, title, self.theme)
        return class_features_figure(finite, seen.y, seen.support, title, self.theme)
