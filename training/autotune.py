"""Choosing by measurement, where the user asks for it, how the meta-gradient is computed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from commands.config import Config
from commands.presets import learner_facts
from training.compiler import CompilationError

ROUNDS = 5


def candidates(config: Config, given: Mapping[str, Any]) -> Iterator[Config]:
    """The settings with every engine and convolution that the flags leave open."""
    choices: dict[str, tuple[Any, ...]] = {}
    if config.meta_gradient in ("exact", "first-order"):
        choices["engine"] = ("unrolled", "adjoint")
    if learner_facts(config.learner).convolutional:
        choices["convolution"] = ("im2col", "grouped")
    for name in choices:
        if given.get(name, "auto") != "auto":
            choices[name] = (given[name],)
    for values in itertools.product(*choices.values()):
        chosen: dict[str, Any] = dict(zip(choices, values, strict=True))
        if chosen.get("convolution") == "grouped" and given.get("tasks_at_once") is None:
            chosen["tasks_at_once"] = None  # what fits the cache is im2col's
        yield replace(config, **chosen)


def fastest(
    config: Config,
    given: Mapping[str, Any],
    make: Callable[[Config], Callable[[], object]],
    show: Callable[[str], None],
) -> Config:
    """The quickest of the candidates; `make` gives a function that takes one iteration, and waits for it.

    `show` is told each candidate's median time. What cannot be compiled does not take part.
    """
    seconds: dict[Config, float] = {}
    for candidate in candidates(config, given):
        named = {"engine": candidate.engine, "convolution": candidate.convolution}
        if not learner_facts(config.learner).convolutional:
            del named["convolution"]
        name = ", ".join(f"{choice} {value}" for choice, value in named.items())
        try:
            iteration = make(candidate)
            iteration()
            times = []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                iteration()
                times.append(time.perf_counter() - begin)
        except CompilationError as error:
            show(f"{name}: not compiled ({error})")
            continue
        seconds[candidate] = statistics.median(times)
        show(f"{name}: {1e3 * seconds[candidate]:.4g} ms an iteration")
    return min(seconds, key=seconds.__getitem__) if seconds else config
