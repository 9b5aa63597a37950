"""Put settings into words: for people, and in the names of folders, result files and titles."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from commands.call import ALL_FLAGS, Call
from commands.config import CONFIG_FLAGS, OWN_CODE, Config, show
from commands.presets import PRESETS
from commands.resolve import OF_KIND, derive_usual_settings
from commands.rules import what_makes_meaningless
from common.choices import Choices
from common.names import as_file_name, is_own_code, parse_name, split_mixture
from common.sizes import as_file_part
from tasks.options import TaskOptions

SPELLED = {  # methods that are not in capitals
    "fomaml": "MAML",
    "reptile": "Reptile",
    "meta-sgd": "Meta-SGD",
    "imaml": "iMAML",
    "protonet": "ProtoNet",
    "pretrain": "pretraining",
}
SPLITS = {"omniglot": "omniglot_split", "icons": "icons_split"}  # benchmarks with several, and who chooses
OWN_CHOICES = ("fast_weights", "inner_rates", "objective", "head_init")  # named where not the algorithm's


def select_meaningful(config: Config) -> dict[str, Any]:
    """Return the settings that have a meaning with these data and this learner, by name."""
    return {
        name: config.get(name)
        for name, flag in CONFIG_FLAGS.items()
        if what_makes_meaningless(flag, config) is None
    }


def describe_settings(config: Config, names: Iterable[str]) -> dict[str, str]:
    """Return some settings as people read them, by name of the flag."""
    return {CONFIG_FLAGS[name].name: show(config.get(name)) for name in names}


def name_method(choices: Choices) -> str:
    """Return the name of the method for people: `first-order MAML (head)`."""
    name, preset = SPELLED.get(choices.algorithm, choices.algorithm.upper()), PRESETS[choices.algorithm]
    usual = {part: preset.get(part, CONFIG_FLAGS[part].default) for part in OWN_CHOICES}
    own = [value for part in OWN_CHOICES if (value := getattr(choices, part)) != usual[part]]
    name += f" ({', '.join(own)})" * bool(own)
    return "first-order " * (choices.meta_gradient == "first-order") + name


def describe(*configs: Config) -> str:
    """Return in one to three lines what one or more runs are, and their settings other than the defaults.

    A run's `settings.toml` has all of them.
    """

    def join(values: Iterable[Any]) -> str:
        words = list(dict.fromkeys(map(str, values)))
        return f"{words[0]}, ... {words[-1]} ({len(words)} values)" if len(words) > 6 else ", ".join(words)

    def each(name: str) -> str:
        return join(str(c.get(name)) if name == "seed" else show(c.get(name)) for c in configs)

    method = join(name_method(config.choices) for config in configs)
    data = join(f"{config.tasks.dataset} {describe_tasks(config.tasks)}" for config in configs)
    parts = [f"{method} on {data}", each("learner")]
    if any(config.choices.steps for config in configs):
        parts.append(f"{each('steps')} step{'s' * (each('steps') != '1')} at {each('inner_lr')}")
    tasks = f"{each('meta_batch_size')} task{'s' * (each('meta_batch_size') != '1')}"
    iterations = f"{each('iterations')} iteration{'s' * (each('iterations') != '1')}"
    parts += [f"{iterations} of {tasks}", f"seed {each('seed')}"]
    usual = [derive_usual_settings(config) for config in configs]
    meaningful = {name for config in configs for name in select_meaningful(config)} - {*OF_KIND}
    changed = [
        f"{name.replace('_', ' ')} {each(name)}"
        for name, flag in CONFIG_FLAGS.items()
        if name in meaningful
        and (flag.group != "machine" or name in ("precision", "vectorise"))
        and any(config.get(name) != plain.get(name) for config, plain in zip(configs, usual, strict=True))
    ]
    lines = {"run": " · ".join(parts), "changed": " · ".join(changed)}
    return "\n".join(f"  {title:<8} {_fill(text)}" for title, text in lines.items() if text)


def _fill(text: str) -> str:
    """Break a text between its parts, " · ", into two lines at most."""
    text = text.replace(" ", "\0").replace("\0·\0", "\0· ")
    lines = textwrap.wrap(text, 99, break_on_hyphens=False, max_lines=2)
    return f"\n{'':11}".join(lines).replace("\0", " ")


def format_duration(seconds: float) -> str:
    """Return a time for people: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def file_name(name: str) -> str:
    """Return a dataset's or a learner's name for a file name: a path's stem, or the factory's name."""
    kind, source, factory = parse_name(name)
    if not kind:
        return name
    if kind == "mixture":
        return "+".join(map(file_name, split_mixture(name)))[:60]
    return as_file_name(factory or f"{kind}-{Path(source).stem or 'data'}")[:60]


def name_split(tasks: TaskOptions) -> str:
    """Return the split of a benchmark's classes, if it is not the usual one."""
    flags = [flag for name, flag in SPLITS.items() if name in tasks.datasets]
    splits = {flag: getattr(tasks, flag) for flag in flags}
    return "-".join(split for flag, split in splits.items() if split != CONFIG_FLAGS[flag].default)


def name_data(tasks: TaskOptions) -> str:
    """Return the data's name for titles and file names: `omniglot`, `omniglot-alphabet`."""
    return "-".join(filter(None, (file_name(tasks.dataset), name_split(tasks))))


def describe_tasks(tasks: TaskOptions) -> str:
    """Return ways and shots for a title: `5-way 1-shot`."""
    return f"{tasks.ways}-way {tasks.shots}-shot" if tasks.classification else f"{tasks.shots}-shot"


def task_size(tasks: TaskOptions) -> str:
    """Return ways and shots as a part of a file's name: `5way-1to10shot`."""
    shots = f"{as_file_part(tasks.shots)}shot"
    return f"{as_file_part(tasks.ways)}way-{shots}" if tasks.classification and tasks.ways else shots


def list_repeated_flags(config: Config, call: Call) -> list[str]:
    """Return the flags that must be given again with a checkpoint of these settings."""
    flags = {f"--{name}": config.get(name) for name in OWN_CODE if is_own_code(config.get(name))}
    if call.data_root != ALL_FLAGS["data_root"].default:
        flags["--data-root"] = str(call.data_root)
    return [part for flag in flags.items() for part in flag]
