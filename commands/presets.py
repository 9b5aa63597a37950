"""Tabulate the defaults that depend on the data, and what each algorithm's paper sets.

The standard library alone.
"""

from __future__ import annotations

from typing import Any

from common.names import split_mixture

# Defaults that depend on the data: those of Finn et al. (2017). "k" and "s" stand for the values of those
# flags. Drawings, Omniglot's and icons, have Omniglot's settings: its inner rate belongs to the mean
# cross-entropy, as the paper's loss is `ways` times as large, so that its 0.4 (5-way) and 0.1 (20-way) both
# become 2.0. Other classification has their settings for mini-ImageNet: 0.01 with that loss, 0.05 on the mean
# over five classes.
DRAWINGS = ("omniglot", "icons")
DEFAULT_COLUMNS = ("regression", "drawings, 2-10 ways", "drawings, 11+ ways", "other classification")
DEFAULTS: dict[str, tuple[Any, Any, Any, Any]] = {
    "learner": ("mlp", "conv", "conv", "conv4"),
    "ways": (None, 5, 5, 5),
    "shots": (10, 1, 1, 1),
    "queries": (10, "k", "k", 15),
    "steps": (1, 1, 5, 5),
    "inner_lr": (0.01, 2.0, 2.0, 0.05),
    "ridge_lambda": (0.1, 50.0, 50.0, 50.0),
    "ridge_scale": (1.0, 5.0, 5.0, 5e-5),
    "meta_batch_size": (25, 32, 16, 4),
    "iterations": (70_000, 60_000, 60_000, 60_000),
    "grad_clip": (None, None, None, 10.0),
    "test_steps": ("s", 3, 5, 10),
    "log_every": (100, 10, 10, 10),
    "val_every": (1000, 500, 500, 500),
    "save_every": (1000, 100, 100, 100),
}
# The authors' command for the sinusoid names no inner rate, and their code's default is 1e-3; the paper's
# text says 0.01, with which some test tasks diverge (docs/results.md).
SINUSOID_DEFAULTS: dict[str, Any] = {"inner_lr": 1e-3}

# A ReLU network stays at the mean of the harmonic tasks, whatever the algorithm (docs/results.md).
HARMONIC_DEFAULTS: dict[str, Any] = {"learner": "sines", "steps": 5}


def default_column(classification: bool, dataset: str, ways: int) -> int:
    """Return the position in `DEFAULT_COLUMNS`."""
    if not classification:
        return 0
    return 3 if not {*split_mixture(dataset)} <= {*DRAWINGS} else 1 if ways <= 10 else 2


# Iterations from which on a run pays for its compilation (docs/speed.md), and the images in the
# support sets of a chunk of tasks that fits a CPU's cache.
COMPILED_FROM = {"regression": 10_000, "classification": 1_500}
CHUNK_IMAGES = 40

# What R2D2 and ProtoNet share: a head that is computed, no inner loop, four convolutions with max pooling,
# and an outer rate that is halved every 2,000 iterations.
COMPUTED: dict[str, Any] = {
    "steps": 0,
    "test_steps": "s",
    "fast_weights": "head",
    "init": "torch",
    "learner": ("mlp", "conv-pool", "conv-pool", "conv4"),
    "meta_lr_schedule": ("constant", "halving", "halving", "halving"),
    "iterations": (70_000, 20_000, 20_000, 20_000),
}

# An algorithm is a row: its choices, and its paper's settings where they differ from MAML's; a tuple has a
# value for each of `DEFAULT_COLUMNS`. Settings without a meaning for the data or the learner are ignored.
# "half" is half of --iterations; "train_shots" is at least k + q.
PRESETS: dict[str, dict[str, Any]] = {
    "maml": {},
    "fomaml": {"meta_gradient": "first-order"},
    "anil": {"fast_weights": "head"},
    "boil": {"fast_weights": "body"},
    "reptile": {
        "meta_gradient": "reptile",
        "inner_optimizer": ("sgd", "adam-carried", "adam-carried", "adam-carried"),
        "inner_momentum": 0.0,
        "inner_lr": (0.01, 1e-3, 5e-4, 1e-3),
        "steps": (10, 5, 10, 8),
        "train_shots": (None, 10, 10, 15),
        "inner_batch": (10, 10, 20, 10),
        "eval_inner_batch": (None, 5, 10, 5),
        "test_steps": ("s", 50, 50, 50),
        "learner": ("mlp", "conv-flat", "conv-flat", "conv4"),
        "adapt_norm": True,
        "meta_optimizer": "sgd",
        "meta_lr": 1.0,
        "meta_lr_schedule": "linear",
        "meta_batch_size": (25, 5, 5, 5),
        "iterations": (70_000, 100_000, 200_000, 100_000),
    },
    "meta-sgd": {
        "inner_rates": "element",
        "steps": 1,
        "test_steps": ("s", 3, "s", "s"),
        "inner_lr": (0.005, 2.0, 2.0, 0.01),
        "inner_lr_max": (0.1, None, None, None),
    },
    "maml++": {
        "inner_rates": "layer-step",
        "objective": "multi-step",
        "msl_iterations": (5000, 5000, 5000, 7500),
        "batch_norm": "per-step",
        "norm_per_step": True,
        "exact_from": (0, "half", "half", "half"),
        "grad_clip_norm": (1.0, None, None, None),
        "on_nan": ("skip", "stop", "stop", "stop"),  # a task may overflow before the rates have settled
        "meta_lr_schedule": "cosine",
        "meta_lr_final": 1e-5,
        "learner": ("mlp", "conv-pool", "conv-pool", "conv4"),
        "steps": 5,
        "test_steps": "s",
        "inner_lr": (0.01, 0.1, 0.1, 0.01),
        "meta_batch_size": (25, 8, 8, 2),
        "iterations": (70_000, 50_000, 50_000, 50_000),
    },
    "imaml": {
        "meta_gradient": "implicit",
        "proximal": (3.0, 1.0, 1.0, 1.0),
        "steps": 16,
        "inner_lr": (0.003, 0.01, 0.01, 0.01),
        "inner_clip": (10.0, None, None, None),
        "grad_clip_norm": (10.0, None, None, None),
        "cg_steps": 5,
        "cg_damping": 1.0,
        "test_steps": "s",
        "meta_batch_size": (25, 16, 16, 16),
        "meta_lr": (1e-3, 1e-2, 1e-2, 1e-2),
    },
    "cavia": {
        "fast_weights": "context",
        "context_size": (5, 100, 100, 100),
        "steps": (1, 1, 5, 2),
        "test_steps": ("s", 3, 5, "s"),
        "inner_lr": 1.0,
    },
    "r2d2": COMPUTED | {"head_init": "ridge", "meta_lr": (1e-3, 5e-3, 5e-3, 5e-3)},
    "protonet": COMPUTED | {"head_init": "prototype"},
    "pretrain": {"meta_gradient": "joint"},
}
