"""Refuse settings that do not go together, with the reason and what to do. The standard library alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from commands.call import ALL_FLAGS
from commands.config import CONFIG_FLAGS, Config
from common.errors import UsageError
from common.own_code import is_own_code
from learners.options import LEARNERS
from tasks.options import CURVES, FILE_KINDS, OMNIGLOT_CLASSES, OMNIGLOT_DRAWINGS, data_facts

Place = Callable[[Config], str | None]


# ---- where a flag has a meaning ------------------------------------------------------------------


def _if(applies: Callable[[Config], bool], name: str) -> Place:
    """Return a rule: None if it applies, else the setting that leaves the flag without a meaning."""

    def place(config: Config) -> str | None:
        if applies(config):
            return None
        value = config.get(name)
        return value if name == "dataset" else f"{CONFIG_FLAGS[name].name} {value}"

    return place


def _all(*places: Place) -> Place:
    return lambda config: next(filter(None, (place(config) for place in places)), None)


def _has_images(config: Config) -> bool:
    return data_facts(config.tasks.dataset).inputs == "images"


_batch_norm = _if(lambda c: c.learner.has_batch_norm, "learner")
_implicit = _if(lambda c: c.choices.meta_gradient == "implicit", "meta_gradient")

# By the `only` of a flag: the place where it has no meaning, in words, or None where it has one.
ONLY: dict[str, Place] = {
    "curves": _if(lambda c: c.tasks.dataset in CURVES, "dataset"),
    "regression": lambda c: f"classification ({c.tasks.dataset})" if c.tasks.classification else None,
    "classification": lambda c: None if c.tasks.classification else f"regression ({c.tasks.dataset})",
    "omniglot": _if(lambda c: c.tasks.dataset == "omniglot", "dataset"),
    "any images": _if(_has_images, "dataset"),
    "images": _if(lambda c: _has_images(c) and c.tasks.dataset != "omniglot", "dataset"),
    "files": _if(lambda c: c.tasks.dataset.partition(":")[0] in FILE_KINDS, "dataset"),
    "table": _if(lambda c: c.tasks.dataset.startswith("table:"), "dataset"),
    "own data": _if(lambda c: is_own_code(c.tasks.dataset), "dataset"),
    "batch norm": _batch_norm,
    "convolutions": _if(lambda c: c.learner.facts.convolutional, "learner"),
    "head": _if(
        lambda c: c.choices.fast_weights in ("head", "body") or c.choices.head_init != "learned",
        "fast_weights",
    ),
    "context": _if(lambda c: c.choices.fast_weights == "context", "fast_weights"),
    "learned rates": _if(lambda c: c.choices.inner_rates != "fixed", "inner_rates"),
    "exact": _if(lambda c: c.choices.meta_gradient == "exact", "meta_gradient"),
    "implicit": _implicit,
    "conjugate gradients": _all(_implicit, _if(lambda c: c.choices.cg_steps > 0, "cg_steps")),
    "engines": _if(lambda c: c.choices.meta_gradient in ("exact", "first-order"), "meta_gradient"),
    "multi-step": _if(lambda c: c.choices.objective == "multi-step", "objective"),
    "momentum": _if(lambda c: c.choices.inner_optimizer != "sgd", "inner_optimizer"),
    "schedule": _if(lambda c: c.training.meta_lr_schedule != "constant", "meta_lr_schedule"),
    "norm that can adapt": _all(
        _batch_norm,
        _if(
            lambda c: (
                c.choices.fast_weights in ("all", "body")
                or (c.choices.fast_weights == "head" and bool(c.choices.head))
            ),
            "fast_weights",
        ),
        lambda c: "--norm-per-step" if c.choices.norm_per_step else None,
    ),
}


# ---- settings that do not go together ------------------------------------------------------------


def check(config: Config, given: Mapping[str, Any], *, testing: bool = False) -> None:
    """Raise UsageError where settings contradict each other, or a given flag has no meaning.

    Args:
        given: the flags that the user typed, by name of the setting.
        testing: the sizes of tasks are those of a test, and what concerns training alone is not checked.
    """
    _check_given(config, given)
    _check_learner(config)
    test_steps, eval_steps = config.evaluation.test_steps, config.evaluation.eval_steps
    if test_steps > eval_steps:
        raise UsageError(f"--test-steps {test_steps} is above --eval-steps {eval_steps}")
    if not testing:
        _check_algorithm(config, given)
    if config.tasks.dataset == "omniglot":
        _check_omniglot(config, testing=testing)


def _check_given(config: Config, given: Mapping[str, Any]) -> None:
    for name in given:
        only = ALL_FLAGS[name].only
        place = ONLY[only](config) if only else None
        if place:
            raise UsageError(f"{ALL_FLAGS[name].name} has no meaning with {place}: leave it out")


def _check_learner(config: Config) -> None:
    """Raise UsageError where learner, data and loss do not fit each other."""
    tasks, learner = config.tasks, config.learner
    inputs = data_facts(tasks.dataset).inputs
    if "any" not in (learner.facts.inputs, inputs) and learner.facts.inputs != inputs:
        fitting = [name for name, facts in LEARNERS.items() if facts.inputs == inputs]
        raise UsageError(
            f"--learner {learner.learner} does not fit --dataset {tasks.dataset}: use {' or '.join(fitting)}"
        )
    if learner.init == "paper" and learner.facts.init != "paper":
        raise UsageError(f"--init paper: {learner.learner} is not a network of the paper; use torch")
    if learner.loss == "cross-entropy" and not tasks.classification:
        raise UsageError("--loss cross-entropy is for classes: a regression has mse, huber, bce or your own")
    if learner.loss == "mse" and tasks.classification:
        raise UsageError("--loss mse is for numbers: classification has cross-entropy, bce or your own")


def _check_algorithm(config: Config, given: Mapping[str, Any]) -> None:
    choices, training = config.choices, config.training
    try:
        choices.check(
            has_batch_norm=config.learner.has_batch_norm, classification=config.tasks.classification
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    refusals = [
        (
            choices.objective == "multi-step" and choices.steps == 1 and "objective" in given,
            "--objective multi-step: with one inner step (-s) the last is the only one",
        ),
        (
            choices.inner_optimizer == "adam-carried" and training.meta_optimizer != "sgd",
            "--inner-optimizer adam-carried goes with --meta-optimizer sgd alone; use adam",
        ),
        (
            choices.meta_gradient == "reptile" and config.training_shots < 1,
            f"--train-shots {config.tasks.train_shots} must be above -q {config.tasks.queries}, which "
            "--meta-gradient reptile includes",
        ),
        (
            not training.vectorise and training.compile == "on",
            "--no-vectorise: tasks one after another are not compiled; use --compile off",
        ),
    ]
    for refused, reason in refusals:
        if refused:
            raise UsageError(reason)


def _check_omniglot(config: Config, *, testing: bool) -> None:
    """Raise UsageError for tasks with more drawings or characters than Omniglot has."""
    tasks = config.tasks
    drawings = {f"-k {tasks.shots} plus -q {tasks.queries}": tasks.shots + tasks.queries}
    if tasks.train_shots is not None and not testing:
        reptile = config.choices.meta_gradient == "reptile"
        query = "" if reptile else f" plus -q {tasks.queries}"
        total = tasks.train_shots + (0 if reptile else tasks.queries)
        drawings[f"--train-shots {tasks.train_shots}{query}"] = total
    for flags, number in drawings.items():
        if number > OMNIGLOT_DRAWINGS:
            raise UsageError(f"{flags} is {number}; an Omniglot character has {OMNIGLOT_DRAWINGS} drawings")
    classes = OMNIGLOT_CLASSES[tasks.omniglot_split]
    smallest = min(classes, key=classes.__getitem__)
    if tasks.ways is None or tasks.ways > classes[smallest]:
        raise UsageError(
            f"-n {tasks.ways} is more than the {classes[smallest]} characters of the {smallest} "
            f"split ({tasks.omniglot_split})"
        )
