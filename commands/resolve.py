"""Resolve flags to settings: what the user typed, the algorithm's preset, the learner's and data's defaults.

Precedence: flag, preset, the learner's default, the data's default. The standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commands.config import CONFIG_FLAGS, OWN_CODE, Config, show
from commands.presets import (
    CHUNK_IMAGES,
    COMPILED_FROM,
    DEFAULTS,
    HARMONIC_DEFAULTS,
    PRESETS,
    SINUSOID_DEFAULTS,
    default_column,
)
from commands.rules import check
from common.choices import passes_once
from common.errors import UsageError
from common.names import is_own_code, parse_name
from common.options import BY_RULE
from common.sizes import Size, Span, find_largest
from learners.options import LEARNERS, find_learner_facts
from tasks.options import FILE_KINDS, find_data_facts, is_classification
from training.options import ENDING

# what a line about a run says by itself, and what other defaults follow
OF_KIND = (
    *("dataset", "ways", "shots", "learner", "algorithm", "meta_gradient", "steps", "inner_lr"),
    *("iterations", "meta_batch_size", "seed"),
)
OF_OTHER_DATA = (
    *("invert", "quarter_turns", "image_range", "columns", "exclude_columns", "dataset_args"),
    *("split_shares", "omniglot_split", "icons_split", "min_examples", "mix"),
)
# a flag as it may be repeated, and what a run has that could not be compiled
FALLBACKS = (("compile", "on", "off"), ("convolution", "im2col", "grouped"))


# ---- a new experiment ----------------------------------------------------------------------------


def resolve(flags: Mapping[str, Any]) -> Config:
    """Return the settings of a new experiment: the given flags, and defaults for the rest."""
    config = _fill_in(flags)
    check(config, flags)
    return config


def derive_usual_settings(config: Config) -> Config:
    """Return the settings that a new experiment of the same kind and length has by default."""
    alike = {name: value for name in OF_KIND if (value := config.get(name)) is not None}
    usual = _fill_in({name: value for name, value in alike.items() if name != "inner_lr"})
    return usual if usual.choices.inner_lr == config.choices.inner_lr else _fill_in(alike)


def _fill_in(flags: Mapping[str, Any]) -> Config:
    """Return the given settings with the defaults that fit them, not yet checked against each other."""
    settings = {name: value for name, value in flags.items() if name in CONFIG_FLAGS}
    dataset, ways = settings.get("dataset", CONFIG_FLAGS["dataset"].default), settings.get("ways")
    facts = find_data_facts(dataset)
    classification = is_classification(dataset, ways)
    column = default_column(classification, dataset, find_largest(ways or DEFAULTS["ways"][1]))
    defaults = {name: by_column[column] for name, by_column in DEFAULTS.items()}
    if dataset == "sinusoid" and settings.get("loss") != "gaussian-nll":  # its gradient is a variance smaller
        defaults |= SINUSOID_DEFAULTS
    if dataset == "harmonic" and settings.get("learner", "sines") == "sines":
        defaults |= HARMONIC_DEFAULTS
    images = {"image_size": facts.image_size, "channels": facts.channels, "invert": facts.invert}
    defaults |= {"dataset": dataset, **images}
    if facts.classification is None:
        defaults["ways"] = None  # a regression, unless -n is given
    values = defaults | _preset(flags, column) | settings
    if facts.inputs != "images" and "learner" not in flags:  # whatever the column of others says
        values["learner"] = "sines" if dataset == "harmonic" else "mlp"
    values |= _expand_shorthands(flags, values["shots"])
    _fill_sizes(values, flags)
    learner = find_learner_facts(values["learner"])
    values = {"init": learner.init, "adapt_norm": bool(learner.adapt_norm)} | values
    if learner.adapt_norm is None:  # a preset's choices about batch norm do not matter
        for name in {"batch_norm", "norm_per_step"} - flags.keys():
            values.pop(name, None)
    return Config.from_values(_settle(values, classification))


def _preset(flags: Mapping[str, Any], column: int) -> dict[str, Any]:
    """Return the algorithm's settings for a column of `DEFAULT_COLUMNS`, with the learner's inner rate."""
    algorithm = flags.get("algorithm", CONFIG_FLAGS["algorithm"].default)
    preset = {n: v[column] if isinstance(v, tuple) else v for n, v in PRESETS[algorithm].items()}
    if flags.get("first_order") and preset.get("meta_gradient", "exact") not in ("exact", "first-order"):
        raise UsageError(f"--first-order has no meaning with --algorithm {algorithm}: leave it out")
    learner = find_learner_facts(flags.get("learner", preset.get("learner", DEFAULTS["learner"][column])))
    usual = DEFAULTS["inner_lr"][column]
    if learner.inner_lr is not None and preset.get("inner_lr", usual) == usual:
        preset["inner_lr"] = learner.inner_lr
    if "inner_lr" in flags:
        preset.pop("inner_lr_max", None)  # it belongs to the preset's --inner-lr
    if flags.get("inner_optimizer") == "momentum":
        preset.pop("inner_momentum", None)  # it is Adam's beta1
    return preset


def _expand_shorthands(flags: Mapping[str, Any], shots: Size) -> dict[str, Any]:
    """Return the settings that --first-order and --samples stand for."""
    values: dict[str, Any] = {}
    if flags.get("first_order"):
        values["meta_gradient"] = "first-order"
    samples = flags.get("samples")
    if samples is not None:
        if not isinstance(shots, int):
            raise UsageError(f"--samples {samples} leaves no one number of queries to -k {shots}: give -q")
        if samples <= shots:
            raise UsageError(f"--samples {samples} leaves no query: it must be above -k {shots}")
        values["queries"] = flags.get("queries", samples - shots)
        if find_largest(values["queries"]) > samples - shots:
            raise UsageError(f"--samples {samples} is less than -k {shots} plus -q {flags['queries']}")
    return values


def _fill_sizes(values: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Settle the sizes that depend on other sizes."""
    sizes = {"k": find_largest(values["shots"]), "s": values["steps"]}
    for name in ("queries", "test_steps"):
        values[name] = sizes.get(values[name], values[name])
    values.setdefault("eval_steps", CONFIG_FLAGS["eval_steps"].default)
    if not values["steps"]:  # a test takes steps if they are asked for
        values |= dict.fromkeys({"eval_steps", "test_steps"} - flags.keys(), 0)
    _fit_steps(values, flags)
    if "train_shots" not in flags and values.get("train_shots") is not None:
        examples = Span.of(values["shots"]), Span.of(values["queries"])
        varies = any(span.varies for span in examples)  # then training draws as evaluation does
        values["train_shots"] = None if varies else max(values["train_shots"], sum(e.most for e in examples))
    if values.get("exact_from") == "half":
        exact = values.get("meta_gradient", "exact") == "exact"
        values["exact_from"] = values["iterations"] // 2 if exact else 0


def _fit_steps(values: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Fit --eval-steps and --test-steps to each other: the one that is not given, or else the former."""
    if "eval_steps" not in flags:
        values["eval_steps"] = max(values["eval_steps"], values["test_steps"])
    elif "test_steps" not in flags:
        values["test_steps"] = min(values["eval_steps"], values["test_steps"])


def _settle(values: Mapping[str, Any], classification: bool) -> dict[str, Any]:
    """Return the values with each "auto" settled by what was measured (docs/speed.md)."""
    built_in = values["learner"] in LEARNERS and values.get("vectorise", True)
    long = COMPILED_FROM["classification" if classification else "regression"]
    convolutional = find_learner_facts(values["learner"]).convolutional
    choices: list[Any] = [values.get(name) for name in ("fast_weights", "norm_per_step", "batch_norm")]
    once = built_in and not values.get("inner_batch") and passes_once(*choices)  # see training/one_pass.py
    several = values["steps"] > 1 and not once
    settled = {
        "loss": "cross-entropy" if classification else "mse",
        "compile": "on" if values["iterations"] >= long and built_in else "off",
        "engine": "adjoint" if classification and several else "unrolled",
    }
    settled |= {name: value for name, value in values.items() if value != "auto"}
    patches = settled["compile"] == "on" and convolutional
    settled = {"convolution": "im2col" if patches else "grouped"} | settled
    chunked = patches and settled["convolution"] == "im2col" and classification
    return {"tasks_at_once": _cache_chunk(values) if chunked else None} | settled


def _cache_chunk(values: Mapping[str, Any]) -> int | None:
    """Return how many tasks have about `CHUNK_IMAGES` support images; None: the whole meta-batch."""
    tasks = values["meta_batch_size"]
    most = max(1, CHUNK_IMAGES // (find_largest(values["ways"]) * find_largest(values["shots"])))
    chunk = max(size for size in range(1, min(most, tasks) + 1) if tasks % size == 0)
    if 2 * chunk < most:  # few divisors: the last chunk is a smaller one
        chunk = most
    return None if chunk >= tasks else chunk


# ---- from a checkpoint ---------------------------------------------------------------------------


def restore_config(plain: Mapping[str, Any], source: Path | None) -> Config:
    """Return the settings that a checkpoint holds; one that it lacks takes its default.

    Raises UsageError, which names the file, for unknown settings, values that no flag allows, contradictions.
    """
    try:
        if unknown := ", ".join(sorted(plain.keys() - CONFIG_FLAGS.keys())):
            raise UsageError(f"its settings {unknown!r:.60} are unknown; a newer version may know them")
        for name, value in plain.items():
            if problem := CONFIG_FLAGS[name].problem(value):
                raise UsageError(f"its setting {name} should be {problem}, not {value!r}"[:200])
        config = _fill_in(plain)
        check(config, {})
    except UsageError as error:
        raise UsageError(" ".join(f"{source} cannot be used: {error}".split())) from error
    return config


def resolve_from(
    saved: Config,
    flags: Mapping[str, Any],
    *,
    evaluate: bool,
    adapt: bool = False,
    eval_dataset: str | None = None,
) -> Config:
    """Return a checkpoint's settings, with the given flags that may differ from it, for a test or to resume.

    Raises UsageError for any other flag that disagrees with the checkpoint, and for code of the user's that
    the checkpoint names and the flags do not: nothing is imported because a file says so.
    """
    unused = {"dataset"} if eval_dataset else {"dataset", "metric"} if adapt else set()
    used = {name: value for name, value in saved.values().items() if name not in unused}
    refuse_unnamed_code(used, flags, "the checkpoint")
    shots = flags.get("shots", saved.tasks.shots) if evaluate else saved.tasks.shots
    flags = {**flags, **_expand_shorthands(flags, shots)}
    schedule, iterations = saved.training.meta_lr_schedule, saved.training.iterations
    if schedule in ENDING and flags.get("iterations", iterations) != iterations:
        raise UsageError(f"--iterations: the {schedule} schedule of the checkpoint fixes it; leave it out")
    of_files = ("invert", "image_range", "columns", "exclude_columns", "batch_norm")
    free = {*(of_files if adapt else OF_OTHER_DATA if eval_dataset else ())}
    learned = find_largest(saved.tasks.ways or 0) if saved.choices.head_init == "learned" else None
    if evaluate and (learned is None or isinstance(saved.tasks.ways, str)):
        free.add("ways")
        if learned and find_largest(flags.get("ways", learned)) > learned:
            raise UsageError(
                f"-n {flags['ways']}: the checkpoint has learned -n {saved.tasks.ways}: lower it"
            )
    values = saved.values() | {
        name: value
        for name, value in flags.items()
        if name in CONFIG_FLAGS and _may_change(saved, name, value, free, evaluate=evaluate)
    }
    if adapt:  # the flag chooses the statistics of predictions: what was learned stays as it is
        values["batch_norm"] = saved.choices.batch_norm
    _fit_steps(values, flags)
    config = Config.from_values(values)
    if eval_dataset:
        config = _on_other_data(config, eval_dataset, flags)
    check(config, flags, testing=evaluate)
    return config


def refuse_unnamed_code(values: Mapping[str, Any], flags: Mapping[str, Any], source: str) -> None:
    """Raise UsageError where values from a file name the user's code, and the flags do not."""
    for name in OWN_CODE:
        if is_own_code(values.get(name)) and name not in flags:
            code = f"{CONFIG_FLAGS[name].name} {values[name]}"
            raise UsageError(f"{source} names code that is not this tool's: if you trust it, add {code}")


def _may_change(saved: Config, name: str, value: Any, free: set[str], *, evaluate: bool) -> bool:
    """Return whether a flag changes a checkpoint's setting; raise UsageError where it must not."""
    flag, now = CONFIG_FLAGS[name], saved.get(name)
    if name in free or (flag.free_on_eval if evaluate else flag.free_on_resume):
        return True
    if name in OWN_CODE and now and _may_have_moved(value, now):
        return True
    uncompiled = saved.training.compile == "off" and (name, value, now) in FALLBACKS and not evaluate
    if value == now or (flag.default is BY_RULE and value == "auto") or uncompiled:
        return False  # an uncompiled run is resumed as it is
    raise UsageError(
        f"{flag.name} {show(value)} disagrees with the checkpoint, which has {show(now)}: leave it out"
    )


def _may_have_moved(name: str, saved: str) -> bool:
    """Return whether two names may mean the same code or the same files at another place."""
    now, before = parse_name(name), parse_name(saved)
    same = (now.kind, now.factory) == (before.kind, before.factory)
    return same and now.kind in (*FILE_KINDS, "code")


def _on_other_data(config: Config, dataset: str, flags: Mapping[str, Any]) -> Config:
    """Return the settings for test tasks of another dataset: the same kind of inputs and of targets."""
    tasks = config.tasks
    if _locate_images(dataset) in map(_locate_images, tasks.datasets):
        raise UsageError(
            f"--eval-dataset {dataset} is what the checkpoint learned from, training classes included: leave "
            "it out to test on its own test tasks"
        )
    now, before = find_data_facts(dataset), tasks.facts
    same_inputs = now.inputs == before.inputs or "any" in (now.inputs, before.inputs)
    if not same_inputs or now.classification not in (None, tasks.classification):
        kind = "classification" if tasks.classification else "regression"
        raise UsageError(
            f"--eval-dataset {dataset} does not fit: the checkpoint learned {kind} of {before.inputs}"
        )
    changes = {name: flags.get(name, CONFIG_FLAGS[name].default) for name in OF_OTHER_DATA}
    changes |= {"dataset": dataset, "invert": flags.get("invert", now.invert)}
    if now.inputs == "images":  # they are resized
        changes["image_size"] = tasks.image_size or now.image_size
        changes["channels"] = tasks.channels or now.channels
    return config.replace_settings(**changes)


def _locate_images(dataset: str) -> Path:
    return Path(parse_name(dataset).source).resolve()


def select_learned(config: Config) -> dict[str, Any]:
    """Return the settings, but for the seed, that decide what is learned up to an iteration, to rounding."""
    others = ("machine", "logging", "evaluation")
    exceptions = ("seed",) if config.training.meta_lr_schedule in ENDING else ("seed", "iterations")
    learned = [n for n, f in CONFIG_FLAGS.items() if f.group not in others or n == "precision"]
    return {name: config.get(name) for name in learned if name not in exceptions}
