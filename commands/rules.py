"""Refuse settings that do not go together, with the reason and what to do. The standard library alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from commands.call import ALL_FLAGS
from commands.config import CONFIG_FLAGS, Config, show
from common.errors import UsageError
from common.names import is_own_code, parse_name
from common.options import Flag
from common.sizes import Span
from learners.options import LEARNERS
from tasks.options import CURVES, FILE_KINDS, find_data_facts
from training.options import ENDING


def _has_images(config: Config) -> bool:
    return config.tasks.facts.inputs == "images"


def _has_head(config: Config) -> bool:
    return config.choices.fast_weights in ("head", "body") or config.choices.head_init != "learned"


BATCH_NORM = ("learner", lambda c: c.learner.has_batch_norm)
IMPLICIT = ("meta_gradient", lambda c: c.choices.meta_gradient == "implicit")
STEPS = ("steps", lambda c: c.choices.steps)
# By the `only` of a flag: conditions under which it has a meaning, each with the setting that decides it.
ONLY: dict[str, tuple[tuple[str, Callable[[Config], object]], ...]] = {
    "curves": (("dataset", lambda c: {*c.tasks.datasets} <= {*CURVES}),),
    "a curve": (("dataset", lambda c: c.tasks.dataset in CURVES),),
    "mixture": (("dataset", lambda c: len(c.tasks.datasets) > 1),),
    "regression": (("dataset", lambda c: not c.tasks.classification),),
    "classification": (("dataset", lambda c: c.tasks.classification),),
    "omniglot": (("dataset", lambda c: "omniglot" in c.tasks.datasets),),
    "icons": (("dataset", lambda c: "icons" in c.tasks.datasets),),
    "any images": (("dataset", _has_images),),
    "images": (("dataset", lambda c: _has_images(c) and c.tasks.dataset != "omniglot"),),
    "files": (("dataset", lambda c: {parse_name(n).kind for n in c.tasks.datasets} & {*FILE_KINDS}),),
    "table": (("dataset", lambda c: parse_name(c.tasks.dataset).kind == "table"),),
    "own data": (("dataset", lambda c: is_own_code(c.tasks.dataset)),),
    "batch norm": (BATCH_NORM,),
    "convolutions": (("learner", lambda c: c.learner.facts.convolutional),),
    "head": (("fast_weights", _has_head),),
    "context": (("fast_weights", lambda c: c.choices.fast_weights == "context"),),
    "learned rates": (("inner_rates", lambda c: c.choices.inner_rates != "fixed"),),
    "exact": (("meta_gradient", lambda c: c.choices.meta_gradient == "exact"), STEPS),
    "implicit": (IMPLICIT,),
    "conjugate gradients": (IMPLICIT, ("cg_steps", lambda c: c.choices.cg_steps > 0)),
    "engines": (("meta_gradient", lambda c: c.choices.meta_gradient in ("exact", "first-order")), STEPS),
    "ridge": (("head_init", lambda c: c.choices.head_init == "ridge"),),
    "steps": (("steps", lambda c: c.choices.steps or c.evaluation.eval_steps),),
    "multi-step": (("objective", lambda c: c.choices.objective == "multi-step"),),
    "metric": (("metric", lambda c: c.evaluation.metric),),
    "momentum": (("inner_optimizer", lambda c: c.choices.inner_optimizer != "sgd"),),
    "schedule": (("meta_lr_schedule", lambda c: c.training.meta_lr_schedule in ENDING),),
    "halving": (("meta_lr_schedule", lambda c: c.training.meta_lr_schedule == "halving"),),
    "norm that can adapt": (
        BATCH_NORM,
        ("fast_weights", lambda c: c.choices.fast_weights in ("all", "body") or c.choices.head),
        ("norm_per_step", lambda c: not c.choices.norm_per_step),
    ),
}


def what_makes_meaningless(flag: Flag, config: Config) -> str | None:
    """Return the setting that leaves a flag without a meaning, as its flag and value, or None."""
    for name, applies in ONLY[flag.only] if flag.only else ():
        if not applies(config):
            return f"{CONFIG_FLAGS[name].name} {show(config.get(name))}"
    return None


def check(config: Config, flags: Mapping[str, Any], *, testing: bool = False) -> None:
    """Raise UsageError where settings contradict each other, or a given flag has no meaning.

    Args:
        flags: what the user typed, by name of the setting.
        testing: what concerns training alone is not checked.
    """
    for name in flags:
        if setting := what_makes_meaningless(ALL_FLAGS[name], config):
            raise UsageError(f"{ALL_FLAGS[name].name} has no meaning with {setting}: leave it out")
    if not testing:
        has_batch_norm, classification = config.learner.has_batch_norm, config.tasks.classification
        try:
            config.choices.check(has_batch_norm=has_batch_norm, classification=classification)
        except ValueError as error:
            raise UsageError(str(error)) from error
    for reason in _find_contradictions(config, flags, testing=testing):
        raise UsageError(reason)


def _find_contradictions(config: Config, flags: Mapping[str, Any], *, testing: bool) -> Iterator[str]:
    """Yield why settings do not go together."""
    for name in flags["report_to"].split(",") if "report_to" in flags else []:
        if not find_spec(name):
            yield f"--report-to {name} needs a package: pip install {name}"
    yield from _table_rules(config)
    yield from _mixture_rules(config, flags)
    yield from _learner_rules(config)
    if not testing:
        yield from _training_rules(config, flags)


def _table_rules(config: Config) -> Iterator[str]:
    """Yield where the roles of columns contradict each other."""
    roles = [pair.partition("=")[0] for pair in config.tasks.columns]
    for role in roles:
        if roles.count(role) > 1:
            yield f"--columns: {role}= is given twice: put commas between its names"
    if "class" in roles and {"task", "target"} & {*roles}:
        yield "--columns: class=NAME makes tasks of the classes: leave task= and target= out"
    if "class" in roles and not config.tasks.ways:
        yield "--columns class=NAME: give -n, the classes of a task"


def _mixture_rules(config: Config, flags: Mapping[str, Any]) -> Iterator[str]:
    """Yield where several data sets are given, and other flags do not fit them."""
    tasks, number, weights = config.tasks, len(config.tasks.datasets), len(config.tasks.weights)
    several = f"--dataset {' '.join(tasks.datasets)}"
    if weights != number:
        yield f"--mix has {weights} weights, and {several} {number} data sets"
    facts = [find_data_facts(name) for name in tasks.datasets]
    for name, what in (("image_size", "sizes"), ("channels", "channels")):
        values = dict.fromkeys(show(getattr(part, name)) for part in facts)
        if len(values) > 1 and getattr(tasks, name) is None:
            flag = CONFIG_FLAGS[name].name
            yield f"{several}: images have different {what} ({', '.join(values)}): give {flag}"
    if "invert" in flags and len({part.invert for part in facts}) > 1:
        yield f"--invert: the data sets of {several} differ in it, and each takes its own: leave it out"


def _learner_rules(config: Config) -> Iterator[str]:
    """Yield where learner, data, loss and steps do not fit each other."""
    tasks, learner = config.tasks, config.learner
    inputs, loss = tasks.facts.inputs, learner.loss
    if "any" not in (learner.facts.inputs, inputs) and learner.facts.inputs != inputs:
        fitting = " or ".join(name for name, facts in LEARNERS.items() if facts.inputs == inputs)
        yield f"--learner {learner.learner} does not fit --dataset {tasks.dataset}: use {fitting}"
    if learner.init == "paper" and learner.facts.init != "paper":
        yield f"--init paper: {learner.learner} is not a network of the paper; use torch"
    if loss == "gaussian-nll" and config.choices.head_init == "ridge":
        head = "--head-init ridge computes what predicts the targets, no variances"
        yield f"{head}: leave --loss gaussian-nll out"
    if loss == "gaussian-nll" and learner.outputs != "auto":
        yield f"--outputs {learner.outputs} has no meaning with --loss gaussian-nll, which says what they are"
    test_steps, eval_steps = config.evaluation.test_steps, config.evaluation.eval_steps
    if test_steps > eval_steps:
        yield f"--test-steps {test_steps} is above --eval-steps {eval_steps}"
    if tasks.classification and loss in ("mse", "gaussian-nll"):
        yield f"--loss {loss} does not fit classification: leave it out, or use bce or your own"
    if not tasks.classification and loss == "cross-entropy":
        yield f"--loss {loss} does not fit regression: leave it out, or use huber, bce or your own"


def _training_rules(config: Config, flags: Mapping[str, Any]) -> Iterator[str]:
    """Yield where choices, tasks and the outer loop do not fit each other."""
    tasks, choices, training = config.tasks, config.choices, config.training
    if choices.objective == "multi-step" and choices.steps == 1 and "objective" in flags:
        yield "--objective multi-step: with one inner step (-s) the last is the only one"
    if choices.inner_optimizer == "adam-carried" and training.meta_optimizer != "sgd":
        yield "--inner-optimizer adam-carried goes with --meta-optimizer sgd alone; use adam"
    if choices.meta_gradient == "reptile" and tasks.train_shots:
        shots, queries = f"--train-shots {tasks.train_shots}", Span.of(tasks.queries)
        if queries.varies:
            yield f"{shots} of Reptile includes -q {tasks.queries}, which must be one number"
        if Span.of(tasks.train_shots).least <= queries.most:
            yield f"{shots} must be above -q {tasks.queries}, which Reptile includes"
    if not training.vectorise and training.compile == "on":
        yield "--no-vectorise: tasks one after another are not compiled; use --compile off"
