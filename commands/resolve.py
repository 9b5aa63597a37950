"""Resolve flags to settings: what the user typed, the algorithm's preset, the learner's and data's defaults.

A flag overrides the preset, the preset the learner's default, and that the data's. The standard library
alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commands.config import CONFIG_FLAGS, OWN_CODE, Config, show
from commands.presets import ALGORITHMS, CHUNK_IMAGES, COMPILED_FROM, DEFAULTS, ByData, default_column
from commands.rules import check
from common.errors import UsageError
from common.options import BY_DATASET, BY_LEARNER, BY_RULE
from common.own_code import is_own_code
from learners.options import LEARNERS, learner_facts
from tasks.options import FILE_KINDS, data_facts, is_classification

FREE_ON_ADAPT = ("invert", "columns")
FREE_WITH_EVAL_DATASET = (
    "invert", "quarter_turns", "dataset_args", "columns", "split_shares", "omniglot_split",
)  # fmt: skip
TASK_TYPES = {False: "regression", True: "classification"}


# ---- a new experiment ----------------------------------------------------------------------------


def resolve(given: Mapping[str, Any]) -> Config:
    """Return the settings of a new experiment: the given flags, and defaults for all others."""
    given = dict(given) | _meta_gradient_from_first_order(given)
    values = {name: value for name, value in given.items() if name in CONFIG_FLAGS}
    dataset = values.get("dataset", CONFIG_FLAGS["dataset"].default)
    classification = is_classification(dataset, values.get("ways"))
    column = default_column(classification, dataset, values.get("ways") or DEFAULTS["ways"][1])
    preset = _preset(values, given, column)
    if data_facts(dataset).inputs != "images" and "learner" not in given:
        preset["learner"] = "mlp"  # whatever the column of other classification says
    values = preset | values
    _fill_from_data(values, dataset, column)
    values |= _queries_from_samples(given, values["shots"], classification)
    _fill_sizes(values, given)
    _fill_from_learner(values, given)
    config = Config.from_values(resolve_auto_settings(values))
    check(config, given)
    return config


def _preset(values: Mapping[str, Any], given: Mapping[str, Any], column: int) -> dict[str, Any]:
    """Return the algorithm's settings for a column of `DEFAULT_COLUMNS`, with the learner's inner rate."""
    algorithm = values.get("algorithm", CONFIG_FLAGS["algorithm"].default)
    preset = {n: v[column] if isinstance(v, ByData) else v for n, v in ALGORITHMS[algorithm].items()}
    differentiated = preset.get("meta_gradient", "exact") in ("exact", "first-order")
    if given.get("first_order") and not differentiated:
        raise UsageError(
            f"--first-order has no meaning with --algorithm {algorithm}: leave it out, or choose with "
            "--meta-gradient"
        )
    learner = learner_facts(values.get("learner", preset.get("learner", DEFAULTS["learner"][column])))
    usual = DEFAULTS["inner_lr"][column]
    if learner.inner_lr is not None and preset.get("inner_lr", usual) == usual:
        preset["inner_lr"] = learner.inner_lr
    if "inner_lr" in given:
        preset.pop("inner_lr_max", None)  # it belongs to the preset's --inner-lr
    return preset


def _meta_gradient_from_first_order(given: Mapping[str, Any]) -> dict[str, str]:
    """Return what --first-order, if given, says about --meta-gradient."""
    if not given.get("first_order"):
        return {}
    if given.get("meta_gradient", "first-order") != "first-order":
        raise UsageError(
            f"--first-order disagrees with --meta-gradient {given['meta_gradient']}: give one of them"
        )
    return {"meta_gradient": "first-order"}


def _queries_from_samples(given: Mapping[str, Any], shots: int, classification: bool) -> dict[str, int]:
    """Return what --samples, if given, says about the size of the query."""
    samples = given.get("samples")
    if samples is None:
        return {}
    if classification:
        raise UsageError("--samples counts the points of a curve: use -k and -q in classification")
    if samples <= shots:
        raise UsageError(f"--samples {samples} leaves no query: it must be above -k {shots}")
    if "queries" in given and given["queries"] != samples - shots:
        raise UsageError(
            f"--samples {samples} is not -k {shots} plus -q {given['queries']}: give one of --samples and -q"
        )
    return {"queries": samples - shots}


def _fill_from_data(values: dict[str, Any], dataset: str, column: int) -> None:
    facts = data_facts(dataset)
    if facts.classification is None and "ways" not in values:
        values["ways"] = None  # a regression
    for name, by_column in DEFAULTS.items():
        values.setdefault(name, by_column[column])
    values.setdefault("image_size", facts.image_size)
    values.setdefault("channels", facts.channels)
    values.setdefault("invert", facts.invert)


def _fill_sizes(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Settle the sizes that depend on other sizes."""
    for name in ("queries", "test_steps"):
        values[name] = {"k": values["shots"], "s": values["steps"]}.get(values[name], values[name])
    values.setdefault("eval_steps", max(CONFIG_FLAGS["eval_steps"].default, values["test_steps"]))
    if "test_steps" not in given:
        values["test_steps"] = min(values["test_steps"], values["eval_steps"])
    if "train_shots" not in given and values.get("train_shots") is not None:
        values["train_shots"] = max(values["train_shots"], values["shots"] + values["queries"])
    if values.get("exact_from") == "half":
        exact = values.get("meta_gradient", "exact") == "exact"
        values["exact_from"] = values["iterations"] // 2 if exact else 0


def _fill_from_learner(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    facts = learner_facts(values["learner"])
    values.setdefault("init", facts.init)
    values.setdefault("adapt_norm", bool(facts.adapt_norm))
    if facts.adapt_norm is None:  # a preset's choices about batch norm do not matter
        for name in {"batch_norm", "norm_per_step"} - given.keys():
            values.pop(name, None)


def resolve_auto_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with each "auto" settled by what was measured (benchmarks/README.md)."""
    values = {"dataset": CONFIG_FLAGS["dataset"].default} | dict(values)
    classification = is_classification(values["dataset"], values["ways"])
    built_in = values["learner"] in LEARNERS and values.get("vectorise", True)
    long = COMPILED_FROM["classification" if classification else "regression"]
    convolutional = learner_facts(values["learner"]).convolutional
    settled = {
        "loss": "cross-entropy" if classification else "mse",
        "compile": "on" if values["iterations"] >= long and built_in else "off",
        "engine": "adjoint" if classification and values["steps"] > 1 else "unrolled",
    }
    settled = {name: _unless_auto(values.get(name), value) for name, value in settled.items()}
    patches = settled["compile"] == "on" and convolutional
    settled["convolution"] = _unless_auto(values.get("convolution"), "im2col" if patches else "grouped")
    chunks: dict[str, Any] = {}
    if "tasks_at_once" not in values:
        in_cache = settled["compile"] == "on" and settled["convolution"] == "im2col" and classification
        chunks["tasks_at_once"] = _cache_chunk(values) if in_cache and convolutional else None
    return values | settled | chunks


def disable_compiling(config: Config, given: Mapping[str, Any]) -> Config:
    """Return a new run's settings without compilation, and with what suits that where no flag decides."""
    changes: dict[str, Any] = {"compile": "off"}
    if given.get("convolution", "auto") == "auto":
        changes["convolution"] = "grouped"
    if "tasks_at_once" not in given:
        changes["tasks_at_once"] = None
    return config.replaced(**changes)


def _unless_auto(value: str | None, otherwise: str) -> str:
    return otherwise if value in (None, "auto") else str(value)


def _cache_chunk(values: Mapping[str, Any]) -> int | None:
    """Return the tasks whose support sets have some `CHUNK_IMAGES` images; None: the whole meta-batch."""
    tasks = values["meta_batch_size"]
    most = max(1, CHUNK_IMAGES // (values["ways"] * values["shots"]))
    chunk = max(size for size in range(1, min(most, tasks) + 1) if tasks % size == 0)
    if 2 * chunk < most:  # few divisors: the last chunk is a smaller one
        chunk = most
    return None if chunk >= tasks else chunk


# ---- from a checkpoint ---------------------------------------------------------------------------


def config_from_plain(values: Any) -> Config:
    """Return the settings that a checkpoint holds; one that it lacks takes its default.

    Raises UsageError for unknown settings, for values that no flag allows, and for contradictions.
    """
    if not isinstance(values, dict):
        raise UsageError("its settings are missing")
    unknown = sorted(map(str, values.keys() - CONFIG_FLAGS.keys()))
    if unknown:
        names = ", ".join(unknown)
        raise UsageError(f"its settings {names!r:.60} are unknown; a newer version may know them")
    complete = {name: flag.default for name, flag in CONFIG_FLAGS.items()} | values
    for name, flag in CONFIG_FLAGS.items():
        value = complete[name]
        if value in (BY_DATASET, BY_LEARNER, BY_RULE):
            raise UsageError(f"its setting {name} is missing")
        problem = flag.problem(value)
        if flag.default is BY_RULE and value == "auto":
            problem = "settled"
        if problem:
            raise UsageError(f"its setting {name} should be {problem}, not {value!r}"[:200])
    config = Config.from_values(complete)
    check(config, {})
    return config


def config_of(plain: Any, source: Path | None) -> Config:
    """Return the settings of a checkpoint; a UsageError names its file."""
    try:
        return config_from_plain(plain)
    except UsageError as error:
        raise UsageError(" ".join(f"{source} cannot be used: {error}".split())) from error


def resolve_from(
    saved: Config,
    given: Mapping[str, Any],
    *,
    evaluate: bool,
    adapt: bool = False,
    eval_dataset: str | None = None,
) -> Config:
    """Return a checkpoint's settings, with the given flags that may differ from it.

    Raises UsageError for any other flag that disagrees with the checkpoint, and for code of the user's that
    the checkpoint names and the flags do not: nothing is imported because a file says so.

    Args:
        evaluate: for a test, instead of resuming the run.
        adapt: for --adapt, a kind of test.
        eval_dataset: test tasks come from this other dataset.
    """
    _check_own_code(saved, given, without_data=adapt or eval_dataset is not None)
    shots = given.get("shots", saved.tasks.shots) if evaluate else saved.tasks.shots
    given = dict(given) | _queries_from_samples(given, shots, saved.tasks.classification)
    given |= _meta_gradient_from_first_order(given)
    _check_schedule(saved, given)
    free = set(FREE_ON_ADAPT if adapt else ()) | set(FREE_WITH_EVAL_DATASET if eval_dataset else ())
    if adapt:
        free.add("batch_norm")
    if evaluate and saved.choices.head_init != "learned":
        free.add("ways")
    changes = {
        name: value
        for name, value in given.items()
        if name in CONFIG_FLAGS and _may_change(saved, name, value, free, evaluate=evaluate)
    }
    if adapt:  # it chooses the statistics of predictions: what was learned stays as it is
        changes.pop("batch_norm", None)
    config = saved.replaced(**changes)
    test_steps, eval_steps = config.evaluation.test_steps, config.evaluation.eval_steps
    if "eval_steps" in given and "test_steps" not in given:
        config = config.replaced(test_steps=min(test_steps, eval_steps))
    if adapt:
        config = config.replaced(eval_steps=max(eval_steps, test_steps))
    if eval_dataset:
        config = _on_other_data(config, eval_dataset, given)
    check(config, given, testing=evaluate)
    return config


def _may_change(saved: Config, name: str, value: Any, free: set[str], *, evaluate: bool) -> bool:
    """Return whether a flag changes a checkpoint's setting; raise UsageError where it must not."""
    flag = CONFIG_FLAGS[name]
    now = saved.get(name)
    if (
        name in free
        or (flag.free_on_eval if evaluate else flag.free_on_resume)
        or (name in OWN_CODE and _may_have_moved(value, now))
    ):
        return True
    settled = value == "auto" and name in ("loss", "compile", "engine", "convolution")
    uncompiled = (name, value, now) == ("compile", "on", "off") and not evaluate
    if value == now or settled or uncompiled:  # an uncompiled run is resumed as it is
        return False
    doing = "evaluating" if evaluate else "resuming"
    hint = ""
    if name == "ways" and evaluate:
        hint = "; a run with --head-init zero or prototype can be tested with any number of ways"
    raise UsageError(
        f"{flag.name} {show(value)} disagrees with the checkpoint, which has {show(now)}: leave it out when "
        f"{doing} a checkpoint{hint}"
    )


def _may_have_moved(name: str, saved: str) -> bool:
    """Return whether two names may mean the same code or the same files at another place."""
    if is_own_code(name) and is_own_code(saved):
        return name.rpartition(":")[2] == saved.rpartition(":")[2]
    kinds = [part.partition(":")[0] for part in (name, saved)]
    return kinds[0] == kinds[1] and kinds[0] in FILE_KINDS


def _check_own_code(saved: Config, given: Mapping[str, Any], *, without_data: bool) -> None:
    missing = [
        f"{CONFIG_FLAGS[name].name} {saved.get(name)}"
        for name in OWN_CODE
        if is_own_code(saved.get(name)) and name not in given and not (name == "dataset" and without_data)
    ]
    if missing:
        raise UsageError(
            f"the checkpoint names code that is not this tool's, and a file is no reason to run it: if you "
            f"trust it, add {' '.join(missing)}"
        )


def _check_schedule(saved: Config, given: Mapping[str, Any]) -> None:
    training = saved.training
    if given.get("iterations", training.iterations) != training.iterations and (
        training.meta_lr_schedule != "constant"
    ):
        raise UsageError(
            f"--iterations {show(given['iterations'])}: the {training.meta_lr_schedule} schedule of the "
            f"checkpoint ends at iteration {show(training.iterations)}: leave it out"
        )


def _on_other_data(config: Config, dataset: str, given: Mapping[str, Any]) -> Config:
    """Return the settings for test tasks of another dataset: images of the same size."""
    now, before = data_facts(dataset), data_facts(config.tasks.dataset)
    _check_other_data(config, dataset)
    image_size = config.tasks.image_size or before.image_size or now.image_size
    channels = config.tasks.channels or before.channels or now.channels
    if dataset == "omniglot" and (image_size, channels) != (28, 1):
        raise UsageError(
            f"--eval-dataset omniglot has 28 x 28 grey images, and the checkpoint learned {image_size} x "
            f"{image_size} with {channels} channels"
        )
    changes: dict[str, Any] = {
        "dataset": dataset,
        "image_size": image_size if now.inputs == "images" else None,
        "channels": channels if now.inputs == "images" else None,
    }
    for name in FREE_WITH_EVAL_DATASET:
        default = now.invert if name == "invert" else CONFIG_FLAGS[name].default
        changes[name] = given.get(name, default)
    return config.replaced(**changes)


def _check_other_data(config: Config, dataset: str) -> None:
    """Raise UsageError where test tasks of another dataset do not fit the checkpoint, or are its own."""
    now, before = data_facts(dataset), data_facts(config.tasks.dataset)
    places = [
        name if is_own_code(name) else os.path.realpath(name.partition(":")[2] or name)
        for name in (dataset, config.tasks.dataset)
    ]
    if places[0] == places[1]:
        raise UsageError(
            f"--eval-dataset {dataset} is what the checkpoint learned from, training classes included: leave "
            "it out to test on its own test tasks"
        )
    if now.classification is not None and now.classification != config.tasks.classification:
        raise UsageError(
            f"--eval-dataset {dataset} is {TASK_TYPES[now.classification]}, and the checkpoint learned "
            f"{TASK_TYPES[config.tasks.classification]}"
        )
    if "any" not in (now.inputs, before.inputs) and now.inputs != before.inputs:
        raise UsageError(
            f"--eval-dataset {dataset} has {now.inputs}, and the checkpoint learned {before.inputs}"
        )


def select_learned(config: Config) -> dict[str, Any]:
    """Return the settings that decide what is learned up to an iteration, to rounding."""
    others = ("machine", "logging", "evaluation")
    learned = {name for name, flag in CONFIG_FLAGS.items() if flag.group not in others}
    return {name: config.get(name) for name in (learned | {"precision"}) - {"iterations"}}
