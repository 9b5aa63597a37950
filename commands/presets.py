"""Facts and defaults as tables: what data, learners and algorithms there are, and what their papers set.

The standard library alone (see config.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.own_code import is_own_code as is_own_code

REGRESSION = ("sinusoid", "sinusoid-frequency", "sinusoid-line", "harmonic")


@dataclass(frozen=True)
class DataFacts:
    """What the flags need to know of a dataset."""

    inputs: str  # "vectors", "images", or "any"
    classification: bool | None  # None: --task-type says
    image_size: int | None = None  # pixels of a side, by default
    channels: int | None = None
    invert: bool = False  # by default: ink on paper


DATASETS = {name: DataFacts("vectors", False) for name in REGRESSION} | {
    "omniglot": DataFacts("images", True, 28, 1, invert=True),
    "cifar-fs": DataFacts("images", True, 32, 3),
    "fc100": DataFacts("images", True, 32, 3),
    "mini-imagenet": DataFacts("images", True, 84, 3),
    "tiered-imagenet": DataFacts("images", True, 84, 3),
}
DATA_KINDS = {  # what begins a name, in front of a path
    "images": DataFacts("images", True, 84, 3),
    "table": DataFacts("vectors", None),
}


def data_facts(dataset: str) -> DataFacts:
    """The facts of a dataset by its name, or by its kind."""
    kind, colon, _ = dataset.partition(":")
    return DATA_KINDS.get(kind, DataFacts("any", None)) if colon else DATASETS[dataset]


def is_classification(dataset: str, task_type: str | None) -> bool:
    """What the data say, or where they may be either, --task-type."""
    said = data_facts(dataset).classification
    return task_type == "classification" if said is None else said


OMNIGLOT_DRAWINGS = 20  # of each character
OMNIGLOT_CLASSES = {  # characters in each split
    "random": {"train": 1100, "validation": 100, "test": 423},
    "alphabet": {"train": 806, "validation": 158, "test": 659},
}


@dataclass(frozen=True)
class LearnerFacts:
    """What the flags need to know of a learner: its data, its defaults, what it can be asked for."""

    inputs: str  # "vectors", "images", or "any"
    init: str  # the default of --init
    adapt_norm: bool | None  # the default of --adapt-norm; None: it has no batch norm
    inner_lr: float | None = None  # the default of --inner-lr, where it is not the data's
    convolutional: bool = True


LEARNERS = {
    "mlp": LearnerFacts("vectors", init="paper", adapt_norm=None, convolutional=False),
    "conv": LearnerFacts("images", init="paper", adapt_norm=False),
    "conv-flat": LearnerFacts("images", init="torch", adapt_norm=False),
    "conv-pool": LearnerFacts("images", init="paper", adapt_norm=False),
    "conv4": LearnerFacts("images", init="paper", adapt_norm=False),
    # Its last layer has 25,600 inputs: a step of 2.0 is far too long there.
    "convnet": LearnerFacts("images", init="torch", adapt_norm=True, inner_lr=0.01),
    "fc": LearnerFacts("images", init="paper", adapt_norm=False, convolutional=False),
}
OTHER_LEARNER = LearnerFacts("any", init="torch", adapt_norm=True, inner_lr=0.01)  # torchvision's, one's own


def learner_facts(learner: str) -> LearnerFacts:
    """The facts of a learner by its name."""
    return LEARNERS.get(learner, OTHER_LEARNER)


# The defaults that depend on the data: those of Finn et al. (2017). "k" and "s" stand for the values
# of those flags. Omniglot's inner rate belongs to the mean cross-entropy: the paper's 0.4 (5-way) and
# 0.1 (20-way) belong to a loss that is `ways` times as large, and both come to 2.0. Other classification
# has what they set for mini-ImageNet: 0.01 with that loss, 0.05 on the mean over five classes.
DEFAULT_COLUMNS = (
    "regression",
    "omniglot, up to 10 ways",
    "omniglot, above 10 ways",
    "other classification",
)
DEFAULTS: dict[str, tuple[Any, Any, Any, Any]] = {
    "learner": ("mlp", "conv", "conv", "conv4"),
    "ways": (None, 5, 5, 5),
    "shots": (10, 1, 1, 1),
    "queries": (10, "k", "k", 15),
    "steps": (1, 1, 5, 5),
    "inner_lr": (0.01, 2.0, 2.0, 0.05),
    "meta_batch_size": (25, 32, 16, 4),
    "iterations": (70_000, 60_000, 60_000, 60_000),
    "grad_clip": (None, None, None, 10.0),
    "test_steps": ("s", 3, 5, 10),
    "compile_after": (100, 3, 1, 1),
    "log_every": (100, 10, 10, 10),
    "val_every": (1000, 500, 500, 500),
    "save_every": (1000, 100, 100, 100),
}


def default_column(classification: bool, dataset: str, ways: int) -> int:
    """The position in `DEFAULT_COLUMNS`."""
    if not classification:
        return 0
    return 3 if dataset != "omniglot" else 1 if ways <= 10 else 2


# Compiling costs this many uncompiled iterations or more, saved again (benchmarks/README.md).
COMPILED_FROM = {"regression": 10_000, "classification": 1_500}
CHUNK_IMAGES = 40


SAME_AS_FEW = object()


@dataclass(frozen=True)
class ByData:
    """A default for each column of `DEFAULT_COLUMNS`."""

    regression: Any
    few_ways: Any
    many_ways: Any
    other: Any = SAME_AS_FEW

    def __getitem__(self, column: int) -> Any:
        other = self.few_ways if self.other is SAME_AS_FEW else self.other
        return (self.regression, self.few_ways, self.many_ways, other)[column]


# An algorithm is a row: its choices, and the settings of its paper where they are not MAML's. Whatever
# means nothing for the data or the learner is passed over. "half" is half of --iterations; "train_shots" is
# at least k + q.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "maml": {},
    "fomaml": {"meta_gradient": "first-order"},
    "anil": {"fast_weights": "head"},
    "boil": {"fast_weights": "body"},
    "reptile": {
        "meta_gradient": "reptile",
        "inner_optimizer": ByData("sgd", "adam", "adam"),
        "inner_beta_1": 0.0,
        "inner_carry": ByData(False, True, True),
        "inner_lr": ByData(0.01, 1e-3, 5e-4),
        "steps": ByData(10, 5, 10, 8),
        "train_shots": ByData(None, 10, 10, 15),
        "inner_batch": ByData(10, 10, 20),
        "eval_inner_batch": ByData(None, 5, 10),
        "test_steps": ByData("s", 50, 50),
        "learner": ByData("mlp", "conv-flat", "conv-flat", "conv4"),
        "adapt_norm": True,
        "meta_optimizer": "sgd",
        "meta_lr": 1.0,
        "meta_lr_schedule": "linear",
        "meta_batch_size": ByData(25, 5, 5),
        "iterations": ByData(70_000, 100_000, 200_000),
    },
    "meta-sgd": {
        "inner_rates": "element",
        "inner_lr": ByData(0.005, 2.0, 2.0, 0.01),
        "inner_lr_max": ByData(0.1, None, None),
    },
    "maml++": {
        "inner_rates": "layer-step",
        "objective": "multi-step",
        "msl_iterations": ByData(5000, 5000, 5000, 7500),
        "batch_norm": "per-step",
        "norm_per_step": True,
        "exact_from": ByData(0, "half", "half"),
        "grad_clip_norm": ByData(1.0, None, None),
        "meta_lr_schedule": "cosine",
        "meta_lr_final": 1e-5,
        "learner": ByData("mlp", "conv-pool", "conv-pool", "conv4"),
        "steps": 5,
        "test_steps": "s",
        "inner_lr": ByData(0.01, 0.1, 0.1, 0.01),
        "meta_batch_size": ByData(25, 8, 8, 2),
        "iterations": ByData(70_000, 50_000, 50_000),
    },
    "imaml": {
        "meta_gradient": "implicit",
        "proximal": ByData(3.0, 1.0, 1.0),
        "steps": 16,
        "inner_lr": ByData(0.003, 0.01, 0.01),
        "inner_clip": ByData(10.0, None, None),
        "grad_clip_norm": ByData(10.0, None, None),
        "cg_steps": 5,
        "cg_damping": 1.0,
        "test_steps": "s",
        "meta_batch_size": ByData(25, 16, 16),
        "meta_lr": ByData(1e-3, 1e-2, 1e-2),
    },
    "cavia": {
        "fast_weights": "context",
        "context_size": ByData(5, 100, 100),
        "steps": ByData(1, 1, 5, 2),
        "test_steps": ByData("s", 3, 5, "s"),
        "inner_lr": 1.0,
    },
    "pretrain": {"meta_gradient": "joint"},
}
