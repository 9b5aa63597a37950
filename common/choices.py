"""The names that choices go by, on the command line and in Python. The standard library alone."""

from __future__ import annotations

from collections.abc import Sequence

FAST_WEIGHTS = ("all", "head", "body", "context")
HEAD_INITS = ("learned", "zero", "prototype")
INNER_RATES = ("fixed", "layer-step", "element")
META_GRADIENTS = ("exact", "first-order", "reptile", "implicit", "joint")
OBJECTIVES = ("last", "multi-step")
NORMALISATIONS = ("transductive", "inductive", "per-step")
INNER_OPTIMIZERS = ("sgd", "momentum", "adam")
META_OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
ENGINES = ("unrolled", "adjoint")
CONVOLUTIONS = ("im2col", "grouped")
AUGMENTATIONS = ("flip", "crop", "rotate")
THEMES = ("light", "dark")  # of pictures
LOSSES = ("mse", "cross-entropy", "bce", "huber")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError where the value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(choices)}, not {value!r}")
