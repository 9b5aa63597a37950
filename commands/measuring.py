"""Meta-test of a checkpoint, or of a fresh initialisation: what --eval measures and writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.build import build, data_of
from commands.call import Call
from commands.config import Config, config_of
from commands.names import file_name, task_size, task_words
from commands.resolve import resolve, resolve_from
from common.batch import TaskDistribution
from common.device import Runtime, versions
from common.optimizers import Weights
from evaluation import meta_test as evaluation
from evaluation import tables as report
from evaluation.examples import Examples, adapt_examples, examples_figure
from evaluation.figures import evaluation_figure
from evaluation.meta_test import Evaluation, normalisations_of
from evaluation.style import write_figure
from learners.losses import loss_name
from maml import MAML
from training.checkpoint import Checkpoint, check_same_split, fitting_parameters, load_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Subject:
    """What is to be measured, and how."""

    file: Path | None  # None: the fresh initialisation
    source: Checkpoint | None
    config: Config

    @classmethod
    def read(cls, file: Path | None, call: Call, given: Mapping[str, Any]) -> Subject:
        """A checkpoint with its settings, and those flags that may differ; uncompiled, whatever it was."""
        return cls.of(file, None if file is None else load_checkpoint(file), call, given)

    @classmethod
    def of(
        cls, file: Path | None, source: Checkpoint | None, call: Call, given: Mapping[str, Any]
    ) -> Subject:
        """The same of a checkpoint that has been read."""
        if source is None:
            config = resolve(given)
        else:
            other = call.eval_dataset
            config = resolve_from(config_of(source.settings, file), given, evaluate=True, eval_dataset=other)
        config = config.replaced(convolution="grouped", tasks_at_once=given.get("tasks_at_once"))
        return cls(file, source, config)

    @property
    def trained(self) -> Config:
        """The settings that the checkpoint was trained with."""
        assert self.source is not None
        return config_of(self.source.settings, self.file)

    @property
    def name(self) -> str:
        if self.source is None:
            return "the fresh initialisation (no --load)"
        return f"{self.file}, iteration {self.source.iteration:,}"

    @property
    def when(self) -> str:
        return "fresh initialisation" if self.source is None else f"iteration {self.source.iteration:,}"

    def stem(self, *, with_run: bool) -> str:
        """The beginning of its results' names; `with_run`, if those of several runs may meet."""
        if self.file is None:
            config = self.config
            return (
                f"fresh-{file_name(config.learner.learner)}-{config.learner.init}-seed{config.training.seed}"
            )
        return f"{self.file.resolve().parent.name}-{self.file.stem}" if with_run else self.file.stem

    @property
    def tasks(self) -> dict[str, str]:
        """What tells its test tasks from others, in words and in the names of results."""
        config = self.config
        return {
            file_name(config.tasks.dataset): file_name(config.tasks.dataset),
            task_words(config.tasks): task_size(config.tasks),
            "": f"{config.tasks.queries}query",
            f"{config.evaluation.eval_tasks} test tasks": f"{config.evaluation.eval_tasks}tasks",
        }

    @property
    def words(self) -> report.Caption:
        return of_all([self])[0]

    def record(self, runtime: Runtime) -> dict[str, Any]:
        """What a result file says about where the numbers come from."""
        return {
            "checkpoint": self.file,
            "iteration": self.source.iteration if self.source else 0,
            "split": "test",
            "tasks": self.config.evaluation.eval_tasks,
            "tasks_seed": evaluation.SEED,
            "trained_steps": self.config.choices.trained_steps,
            "test_steps": self.config.evaluation.test_steps,
            "settings": self.config.values(),
            "versions": versions(),
            "device": runtime.describe(),
        }

    def built(
        self, call: Call, runtime: Runtime, known: dict[Any, TaskDistribution | None] | None = None
    ) -> Built:
        """Its algorithm, tasks and weights; raises UsageError where they do not fit.

        `known`: tasks that others have built, and to which its own are added.
        """
        config, source = self.config, self.source
        known = {} if known is None else known
        data = data_of(config)
        distribution, maml = build(config, call, runtime, saved=source, distribution=known.get(data))
        known[data] = distribution
        parameters, statistics = maml.initial_parameters(config.training.seed), maml.initial_statistics()
        if source is not None and self.file is not None:
            if call.eval_dataset is None:
                check_same_split(self.file, source.splits, distribution.split_names)
            parameters = fitting_parameters(self.file, source.parameters, parameters, config.learner.learner)
            statistics = fitting_parameters(self.file, source.statistics, statistics, config.learner.learner)
        return Built(self, maml, distribution, parameters, statistics)


def of_all(subjects: Sequence[Subject]) -> tuple[report.Caption, str]:
    """What can be said of several, which is what they have in common, and a name for their results."""

    def same(values: Iterable[Any], otherwise: Any) -> Any:
        found = list(dict.fromkeys(values))
        return found[0] if len(found) == 1 else otherwise

    columns = zip(*(each.tasks.items() for each in subjects), strict=True)
    common = [part for part in (same(column, None) for column in columns) if part]
    configs = [each.config for each in subjects]
    words = report.Caption(
        loss_name=same((loss_name(config.learner.loss) for config in configs), "loss"),
        trained_steps=same((config.choices.trained_steps for config in configs), None),
        test_steps=configs[0].evaluation.test_steps,
        title=", ".join(said for said, _ in common if said),
    )
    return words, "-".join(["test", *(name for _, name in common)])


@dataclass(frozen=True)
class Built:
    """A subject, ready to be measured."""

    subject: Subject
    maml: MAML
    distribution: TaskDistribution
    parameters: Weights
    statistics: Weights

    def measured(self, runtime: Runtime, split: str = "test", skipped: int = 0) -> Evaluation:
        """On the fixed tasks of a split but the first, `skipped` ones, with all that batch norm can do."""
        config = self.subject.config
        normalisations = normalisations_of(self.maml, self.statistics, config.choices.query_norm)
        return evaluation.evaluate(
            self.maml,
            self.parameters,
            self.distribution,
            split,
            tasks=config.evaluation.eval_tasks,
            steps=config.evaluation.eval_steps,
            normalisations=normalisations,
            statistics=self.statistics,
            inner_batch=config.evaluation.eval_inner_batch,
            skipped=skipped,
            world=runtime.world,
        )

    def write(self, result: Evaluation, file: str, record: Mapping[str, Any]) -> list[str]:
        """Write the result as JSON and as pictures; return the ends of the files' names."""
        report.write_json(Path(f"{file}.json"), {**record, **report.evaluation_record(result)})
        fits, sheet = self._pictures()
        write_figure(Path(f"{file}.png"), evaluation_figure(result, self.subject.words, fits))
        if sheet is None:
            return [".json", ".png"]
        write_figure(Path(f"{file}-examples.png"), sheet)
        return [".json", ".png", "-examples.png"]

    def _pictures(self) -> tuple[tuple[Examples, list[int]] | None, Figure | None]:
        """Return some adapted curves with the steps to show, or a sheet of image tasks."""
        config = self.subject.config
        trained, last = config.choices.trained_steps, config.evaluation.eval_steps
        subject = (self.maml, self.parameters, self.distribution, "test")
        adapting: dict[str, Any] = {
            "normalisation": config.choices.query_norm,
            "inner_batch": config.evaluation.eval_inner_batch,
        }
        if self.distribution.kind == "curves":
            examples = adapt_examples(*subject, tasks=3, steps=last, **adapting)
            return (examples, sorted({0, min(trained, last), last})), None
        test_steps = config.evaluation.test_steps
        title = f"test tasks, {self.subject.when}, {task_words(config.tasks)}"
        return None, examples_figure(
            *subject, steps=config.choices.steps, test_steps=test_steps, title=title, **adapting
        )
