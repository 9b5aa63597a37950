"""Measure checkpoints, or the fresh initialisation, on test tasks, and write the results.

    Subject.read -> build -> evaluate, which sets `result` -> write

--eval, --baselines and --compare measure a `Subject` each.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from commands import build
from commands.call import Call
from commands.config import OWN_CODE, Config
from commands.names import (
    describe_tasks,
    file_name,
    name_data,
    name_method,
    name_split,
    select_meaningful,
    task_size,
)
from commands.resolve import resolve, resolve_from, restore_config
from common.batch import TaskDistribution
from common.device import Runtime, collect_versions
from common.errors import UsageError, escape_text
from common.names import is_own_code
from common.optimizers import Weights
from common.options import list_names
from common.processes import ALONE, World
from common.sizes import as_file_part, find_largest
from evaluation import meta_test
from evaluation.examples import Examples, adapt_examples, examples_figure
from evaluation.figures import results_figure, write_results
from evaluation.ledger import RESULTS, TIME, add_result, quote_result
from evaluation.meta_test import Evaluation, list_normalisations
from evaluation.tables import (
    ALL,
    Caption,
    after_steps,
    by_dataset,
    evaluation_record,
    results_of,
    results_table,
    sizes_record,
    sizes_table,
)
from learners.options import LEARNERS
from learners.reading import choose_reading
from maml import MAML
from tasks.splits import check_unseen
from training.checkpoint import Checkpoint, History, check_same_data, load_checkpoint
from training.compiler import Compiler, explain_uncompiled
from training.folders import BEST, LAST, LIST, find_runs, has_ended
from training.log import RunLog
from training.tensorboard import TEST, Description, has_log

COMPILED_IMAGES = 1_000_000  # times inner steps: compiling then saves more than it takes (docs/speed.md)


def measure_runs(call: Call, flags: Mapping[str, Any], command: str, world: World) -> list[Subject]:
    """Measure a checkpoint or the fresh initialisation; or all runs of a folder, one by one and together."""
    with world.together():
        runs = find_runs(call.load) if call.load is not None else []
    subjects = measure([run["file"] for run in runs] or [call.load], call, flags, command, world)
    if not runs:
        return subjects
    early = [run["name"] for run in runs if not has_ended(run["file"].parent)]
    if early and world.first:
        build.print_once(f"main.py: not trained to the end, or not with finite numbers: {list_names(early)}")
    results: dict[str, list[Evaluation]] = {}
    for run, subject in zip(runs, subjects, strict=True):
        for name, part in by_dataset(subject.result).items():
            label = ", ".join(word for word in (run["setting"], name) if word and word != ALL)
            results.setdefault(label or ALL, []).append(part)
    caption, name = summarise(subjects)
    summary = results_of(results)
    print(results_table(summary, caption))
    print_by_size(results, caption)
    stem = (call.out or runs[0]["file"].parent.parent) / name
    if world.first:
        settings = {label: part.record() for label, part in summary.items()}
        record = {"command": command, **common_record(subjects, runs), "settings": settings}
        line = write_results(stem, record | by_size(results), results_figure(summary, caption))
        print(f"{line}, and those of each run")
    return subjects


def measure(
    files: Sequence[Path | None], call: Call, flags: Mapping[str, Any], command: str, world: World
) -> list[Subject]:
    """Measure checkpoints on test tasks and write each one's result; print that of a single one."""
    with world.together():
        if "report_to" in flags and None in files:
            raise UsageError("--report-to with --eval needs --load: it adds to the log of a run")
        subjects = [Subject.read(file, call, flags) for file in files]
        first, configs = subjects[0], [subject.config for subject in subjects]
        if len({(c.evaluation.eval_steps, c.evaluation.eval_tasks) for c in configs}) > 1:
            raise UsageError("the runs differ in --eval-steps or --eval-tasks: give both")
        if world.first:
            for file in (first.stem(call), first.results_file(call)):
                build.make_writable(file.parent)
        runtime = build.prepare(first.config, call, world)
    world.check_same(build.collect_facts(first.config, runtime, first.source))
    build.preload_tasks(configs, call, world)
    others = f" and {len(files) - 1} other runs" if files[1:] else ""
    title = f"Evaluating {first.name}{others} on {first.config.evaluation.eval_tasks} test tasks"
    build.print_settings(first.config, runtime, title, *configs[1:])
    for subject in subjects:
        with world.together():
            subject.build(call, world)
        if subject is first:
            build.print_data(subject.distribution, world)
        with world.together():
            subject.check_measure(first)
        subject.evaluate()
        if world.first:
            stem = subject.stem(call)
            subject.write(stem, command, prints=len(files) == 1)
            add_result(subject.results_file(call), subject.row(call, command))
            subject.log_result(call)
            if "report_to" in flags:
                subject.report(flags["report_to"], stem)
    return subjects


@dataclass(eq=False)
class Subject:
    """A checkpoint or the fresh initialisation, with its test settings, tasks, algorithm and result."""

    file: Path | None  # None: the fresh initialisation
    source: Checkpoint | None
    trained: Config  # the settings of its training
    config: Config
    compiled: bool = False  # whether predictions are to be; after `evaluate`, whether they were
    runtime: Runtime = field(init=False)
    distribution: TaskDistribution = field(init=False)
    loss_name: str = field(init=False, default="loss")  # with its unit, once the data are known
    maml: MAML = field(init=False)
    parameters: Weights = field(init=False)
    statistics: Weights = field(init=False)  # running ones of per-step batch norm, or none
    result: Evaluation = field(init=False)

    @classmethod
    def read(cls, file: Path | None, call: Call, flags: Mapping[str, Any]) -> Subject:
        """Load a checkpoint and resolve its settings with the given flags."""
        source, choice = None, flags.get("compile", "auto")
        if file is None:
            trained = config = resolve(flags)
        else:
            source = load_checkpoint(file)
            trained = restore_config(source.settings, file)
            if call.eval_dataset:
                flag = f"--eval-dataset {call.eval_dataset}"
                check_unseen(trained.tasks.datasets, [call.eval_dataset], flag, "test")
            if call.compare:  # the user's code is for the runs that have some
                tools = {n for n in OWN_CODE if n != "metric" and not is_own_code(trained.get(n))}
                flags = {n: value for n, value in flags.items() if n not in tools or not is_own_code(value)}
            flags = {n: value for n, value in flags.items() if n != "compile"}  # the run's may differ
            try:
                config = resolve_from(trained, flags, evaluate=True, eval_dataset=call.eval_dataset)
            except UsageError as error:
                raise UsageError(f"{file}: {error}") from error
        tested = config.replace_settings(convolution="grouped", tasks_at_once=flags.get("tasks_at_once"))
        return cls(file, source, trained, tested, is_compiled(config, choice))

    @property
    def name(self) -> str:
        fresh = "the fresh initialisation (no --load)"
        return f"{self.file}, iteration {self.source.iteration:,}" if self.source else fresh

    def stem(self, call: Call) -> Path:
        """Return the common prefix of the result files; with --out it includes the run's name."""
        file, learner = self.file, self.config.learner
        name = f"fresh-{file_name(learner.learner)}-{learner.init}-seed{self.config.training.seed}"
        if file is not None:
            name = f"{file.resolve().parent.name}-{file.stem}" if call.out else file.stem
        folder = call.out or (file.parent if file else call.checkpoint_path)
        return folder / f"{name}-{summarise([self])[1]}"

    def results_file(self, call: Call) -> Path:
        """Return where its row goes: in --out, or in the folder of all runs."""
        if call.out or not self.file:
            return (call.out or call.checkpoint_path) / RESULTS
        runs = self.file.resolve().parent.parent
        if runs.is_relative_to(call.checkpoint_path.resolve()):
            runs = call.checkpoint_path
        return (runs.parent if (runs / LIST).is_file() else runs) / RESULTS

    def build(self, call: Call, world: World = ALONE) -> None:
        """Build algorithm, tasks and weights; raise UsageError where they do not fit."""
        self.runtime = build.prepare(self.config, call, world)
        saved, scales = self.source, self.source.scales if self.source else None
        self.distribution, self.maml = build.build(
            self.config, call, self.runtime, saved=saved, scales=scales
        )
        self.loss_name = build.name_measure(self.config, self.distribution.scales)
        self.parameters = self.maml.initial_parameters(self.config.training.seed)
        self.statistics = self.maml.initial_statistics()
        if self.file and self.source:
            other_data = call.eval_dataset is not None
            check_same_data(self.file, self.source, self.distribution.record, other_data=other_data)
            weights = build.fit_weights(self.file, self.source, self.maml, self.config)
            self.parameters, self.statistics = weights

    def check_measure(self, first: Subject, *, same_loss: bool = False) -> None:
        """Raise UsageError if the outputs have another measure than the first subject's.

        With `same_loss`, losses have to be the same in the same unit.
        """
        one, other = (choose_reading(s.maml.reading, s.distribution.most_ways).measure for s in (first, self))
        if same_loss and one == other == "loss":
            one, other = first.loss_name, self.loss_name
            scales = [s.distribution.scales for s in (first, self)]
            units = [scale["target"][1] for scale in scales if "target" in scale]
            if units[1:] and (units[0] / units[1] - 1).abs().max() > 1e-9:
                raise UsageError(
                    f"{first.name} and {self.name} standardise targets differently, and their losses have "
                    "different units: give --metric mae, or another, which has the table's"
                )
        if one != other:
            raise UsageError(
                f"{first.name} is measured by {one}, and {self.name} by {other}: give one --metric, or take "
                "runs of one measure (--outputs says what a learner's outputs are)"
            )

    def evaluate(self, split: str = "test", *, first_task: int = 0) -> None:
        """Measure on the fixed tasks of a split from `first_task` on, with each reading of batch norm."""
        options, maml = self.config.evaluation, self.maml
        compiler = Compiler(self.runtime.device)
        compiler.active = self.compiled and not maml.call.unpads
        if compiler.active and (reason := explain_uncompiled(self.runtime.device)):
            if self.runtime.world.first:
                build.print_once(reason)
            compiler.active = False
        if compiler.active:
            maml = maml.with_options(convolution="im2col", accelerate=compiler.or_plain)
        self.result = meta_test.evaluate(
            maml,
            self.parameters,
            self.distribution,
            split,
            tasks=options.eval_tasks,
            steps=options.eval_steps,
            normalisations=list_normalisations(self.maml, self.statistics),
            statistics=self.statistics,
            inner_batch=options.eval_inner_batch,
            skipped=first_task,
            world=self.runtime.world,
        )
        self.compiled = compiler.active and not compiler.failed

    def curves(self) -> dict[str, History]:
        """Return the curves of the whole run, "training" and "validation", also after its best checkpoint."""
        source = self.source
        if self.file and self.file.name == BEST and (last := self.file.with_name(LAST)).is_file():
            source = load_checkpoint(last, weights=False)
        return {part: source.progress[part] if source else {} for part in ("training", "validation")}

    @property
    def has_curves(self) -> bool:
        return self.distribution.kind == "curves"

    @property
    def shown_steps(self) -> set[int]:
        """The numbers of inner steps in pictures of its tasks."""
        options = self.config.evaluation
        steps = {min(self.maml.choices.trained_steps, options.eval_steps), options.eval_steps}
        return steps if self.has_curves else {options.test_steps}

    def examples(self) -> Examples | None:
        """Adapt to the first test tasks, for a picture; None where tasks have none."""
        steps, inner_batch = self.shown_steps, self.config.evaluation.eval_inner_batch
        return adapt_examples(self.maml, self.parameters, self.distribution, "test", steps, inner_batch)

    def caption(self) -> Caption:
        """Return the words of its tables and pictures, with the method and the run in the title."""
        common, method = summarise([self])[0], name_method(self.trained.choices)
        run = f", run {escape_text(self.file.resolve().parent.name)}" if self.file else ", not trained"
        return replace(common, title=f"{method}{run}: {common.title}")

    def record(self) -> dict[str, Any]:
        """Return what a result file says about where its numbers come from."""
        return {
            "checkpoint": self.file,
            "iteration": self.source.iteration if self.source else 0,
            "loss": self.loss_name,
            "split": "test",
            "tasks": self.config.evaluation.eval_tasks,
            "tasks_seed": meta_test.SEED,
            "trained_steps": self.config.choices.trained_steps,
            "test_steps": self.config.evaluation.test_steps,
            "settings": self.config.values(),
            "versions": collect_versions(),
            "device": self.runtime.describe(),
            "compiled": self.compiled,
        }

    def row(self, call: Call, command: str) -> dict[str, Any]:
        """Return the row of `results.csv`."""
        config, folder = self.config, self.results_file(call).resolve().parent
        options, norm = config.evaluation, config.choices.query_norm
        place = self.file.resolve() if self.file else Path(self.stem(call).name)
        measure = self.loss_name if self.result.measure == "loss" else self.result.measure
        return {
            "when": time.strftime(TIME),
            "checkpoint": (place.relative_to(folder) if place.is_relative_to(folder) else place).as_posix(),
            "iteration": self.source.iteration if self.source else 0,
            # files that have moved are called as the run calls them
            "dataset": config.get("dataset") if call.eval_dataset else self.trained.get("dataset"),
            "dataset_split": name_split(config.tasks),
            **{name: config.get(name) for name in ("ways", "shots", "queries")},
            "tasks": options.eval_tasks,
            **{name: config.get(name) for name in ("algorithm", "meta_gradient", "learner", "seed")},
            "steps": options.test_steps,
            "inner_batch": options.eval_inner_batch,
            "precision": config.training.precision,
            "batch_norm": norm if self.maml.has_batch_norm else None,
            "measure": measure,
            **quote_result(self.result, norm, options.test_steps),
            "command": command,
        }

    def log_result(self, call: Call) -> None:
        """Add the quoted result to TensorBoard's log of the run, if it is a test as the run was trained."""
        tasks, trained = self.config.tasks, self.trained.tasks
        if not call.eval_dataset:
            # its files may have moved, and any number of queries measures the same adaptation
            tasks = replace(tasks, dataset=trained.dataset, queries=trained.queries)
        if call.out or not self.file or not self.source or tasks != trained or not has_log(self.file.parent):
            return
        norm, step, result = self.trained.choices.query_norm, self.config.evaluation.test_steps, self.result
        values = {f"{TEST}query_loss": result.losses[norm][:, step].mean().item()}
        values[f"{TEST}query_{result.measure}"] = result.measured(norm)[:, step].nanmean().item()
        self._append("tensorboard", values)

    def report(self, trackers: str, stem: Path) -> None:
        """Add the result's table and picture to the log of the checkpoint's run."""
        name, table = summarise([self])[1], evaluation_record(self.result)["per_step"]
        self._append(trackers, {name: table, f"{name}-curves": Path(f"{stem}.png").read_bytes()})

    def _append(self, trackers: str, values: Mapping[str, Any]) -> None:
        """Add values to the log of the checkpoint's run, at its iteration."""
        assert self.file is not None and self.source is not None
        description = Description(select_meaningful(self.trained))
        log = RunLog(self.file.parent, trackers, description, begin_at=None)
        log.add(values, self.source.iteration)
        log.sync()
        log.close()

    def write(self, stem: Path, command: str, *, prints: bool) -> None:
        """Write the result as JSON, and as a picture; image tasks get a picture of examples as well."""
        numbers, examples, caption = evaluation_record(self.result), self.examples(), self.caption()
        parts = {name: [part] for name, part in by_dataset(self.result).items()}
        results = results_of(parts)
        fits, more = examples if self.has_curves else None, {}
        if examples and not fits:
            more["examples"] = examples_figure(examples, caption.title_of_examples)
        record = {"command": command, **self.record(), **numbers, **by_size(parts)}
        line = write_results(stem, record, results_figure(results, caption, fits=fits), **more)
        if prints:
            print(results_table(results, caption, losses=True))
            print_by_size(parts, caption)
            print(line)


def print_by_size(settings: Mapping[str, Sequence[Evaluation]], caption: Caption) -> None:
    """Print a table of the runs of each setting whose tasks differ in size."""
    for name, step in product(settings, caption.test_steps):
        if (runs := settings[name])[0].sizes:
            heading = f"By size, {after_steps(step)}" + f", {name}" * (name != ALL)
            print(f"\n{heading}:\n{sizes_table(runs, caption, step)}")
    if any(runs[0].sizes for runs in settings.values()):
        print()


def by_size(settings: Mapping[str, Sequence[Evaluation]]) -> dict[str, Any]:
    """Return the entry of a result file about the sizes of tasks; nothing if they are alike."""
    records = {name: sizes_record(runs) for name, runs in settings.items() if runs[0].sizes}
    return {"by_size": records.get(ALL, records)} if records else {}


def is_compiled(config: Config, choice: str) -> bool:
    """Return whether predictions are compiled: as asked, or, for "auto", if that saves time."""
    tasks, options, learner = config.tasks, config.evaluation, config.learner
    if choice == "off" or not config.training.vectorise:
        return False
    if choice == "on":
        return True
    if learner.learner not in LEARNERS or not learner.facts.convolutional or tasks.ways is None:
        return False
    images = find_largest(tasks.ways) * (find_largest(tasks.shots) + find_largest(tasks.queries))
    once = config.choices.passes_once and options.eval_inner_batch is None  # see training/one_pass.py
    steps = min(1, options.eval_steps) if once else options.eval_steps
    return options.eval_tasks * steps * images >= COMPILED_IMAGES


def common_record(subjects: Sequence[Subject], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what result files say about several runs: their checkpoints, and whatever all have in common."""
    records = [subject.record() for subject in subjects]
    same = {name: value for name, value in records[0].items() if all(one[name] == value for one in records)}
    tested = [{**run, "iteration": one["iteration"]} for run, one in zip(runs, records, strict=True)]
    of_one = ("checkpoint", "iteration", "settings")
    return {"runs": tested} | {name: value for name, value in same.items() if name not in of_one}


def summarise(subjects: Sequence[Subject], split: str = "test") -> tuple[Caption, str]:
    """Return what several subjects have in common, in words and as a name for their results."""

    def common(values: Iterable[Any], otherwise: Any = None) -> Any:
        distinct = list(dict.fromkeys(values))
        return distinct[0] if len(distinct) == 1 else otherwise

    configs = [subject.config for subject in subjects]
    tasks = [config.tasks for config in configs]
    number = common(config.evaluation.eval_tasks for config in configs)
    dataset = common(map(name_data, tasks))
    queries = common(part.queries for part in tasks)
    suffix = " of each" * any(len(part.datasets) > 1 for part in tasks)
    titles = [dataset, common(map(describe_tasks, tasks)), f"{number} {split} tasks{suffix}"]
    names = [
        split,
        dataset,
        common(map(task_size, tasks)),
        queries and f"{as_file_part(queries)}query",
        f"{number}tasks",
    ]
    caption = Caption(
        title=", ".join(filter(None, titles)),
        loss_name=common((subject.loss_name for subject in subjects), "loss"),
        trained_steps=common(config.choices.trained_steps for config in configs),
        test_steps=tuple(sorted({config.evaluation.test_steps for config in configs})),
    )
    return caption, "-".join(filter(None, names))
