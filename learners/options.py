"""Declare the options of learners, and the facts about them that flags need. The standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

from common.names import check_code_name, parse_name
from common.options import BY_LEARNER, BY_RULE, flag, key_and_value, list_names

LOSS_NAMES = ("mse", "cross-entropy", "bce", "huber", "gaussian-nll")
OUTPUTS = ("auto", "classes", "ordinal", "labels", "numbers")


@dataclass(frozen=True)
class LearnerFacts:
    """Facts about a learner that decide which flags fit it and what their defaults are."""

    inputs: str  # "vectors", "images", or "any"
    init: str  # default of --init
    adapt_norm: bool | None  # default of --adapt-norm; None: it has no batch norm
    inner_lr: float | None = None  # default of --inner-lr, if not the dataset's
    convolutional: bool = True


LEARNERS = {
    "mlp": LearnerFacts("vectors", init="paper", adapt_norm=None, convolutional=False),
    "sines": LearnerFacts("vectors", init="torch", adapt_norm=None, convolutional=False),
    "conv": LearnerFacts("images", init="paper", adapt_norm=False),
    "conv-flat": LearnerFacts("images", init="torch", adapt_norm=False),
    "conv-pool": LearnerFacts("images", init="paper", adapt_norm=False),
    "conv4": LearnerFacts("images", init="paper", adapt_norm=False),
    # Its last layer has 25,600 inputs: a step of 2.0 is far too long there.
    "convnet": LearnerFacts("images", init="torch", adapt_norm=True, inner_lr=0.01),
    "fc": LearnerFacts("images", init="paper", adapt_norm=False, convolutional=False),
    "conv1d": LearnerFacts("vectors", init="torch", adapt_norm=False),
}
OTHER_LEARNER = LearnerFacts("any", init="torch", adapt_norm=True, inner_lr=0.01)  # torchvision's or your own


def find_learner_facts(learner: str) -> LearnerFacts:
    return LEARNERS.get(learner, OTHER_LEARNER)


def check_learner_name(name: str) -> str | None:
    kind, model, _ = parse_name(name)
    good = name in LEARNERS or (kind == "torchvision" and model)
    return None if good else check_code_name(name, f"{list_names(LEARNERS)}, torchvision:MODEL")


def check_loss_name(name: str) -> str | None:
    return None if name in LOSS_NAMES else check_code_name(name, ", ".join(LOSS_NAMES))


@dataclass(frozen=True, kw_only=True)
class LearnerOptions:
    """The network that is meta-learned, and its loss."""

    # fmt: off
    learner: str = flag("--learner", group="learner", check=check_learner_name, metavar="NAME", common=True,
        suggestions=tuple(LEARNERS),
        help=f"{', '.join(LEARNERS)}, torchvision:MODEL, or file.py:factory; mlp: 1-40-40-1; "
        "sines: 1-64-64-1, for harmonic; conv: four stride-2 convolutions of 64 channels; conv-pool: max "
        "pooling; conv4: 32 channels; conv1d: over time; fc: 256-128-64-64")
    learner_args: tuple[str, ...] = flag(
        "--learner-args", group="learner", check=key_and_value, metavar="NAME=VALUE", default=(),
        help="arguments of the learner's factory")
    init: str = flag("--init", group="learner", choices=("paper", "torch"), default=BY_LEARNER,
        help="initial weights: the paper's, or PyTorch's (default: paper; torch for "
        f"{', '.join(name for name, facts in LEARNERS.items() if facts.init == 'torch')} and what is not "
        "built in)")
    loss: str = flag("--loss", group="learner", check=check_loss_name, metavar="NAME", default=BY_RULE,
        suggestions=LOSS_NAMES,
        help="mse, cross-entropy, bce (binary, of logits), huber, gaussian-nll (a mean and a variance for "
        "each target), or file.py:function; auto: mse, or cross-entropy in classification")
    loss_args: tuple[str, ...] = flag(
        "--loss-args", group="learner", check=key_and_value, metavar="NAME=VALUE", default=(),
        help="arguments of the loss")
    outputs: str = flag("--outputs", group="learner", choices=OUTPUTS, default="auto", free_on_eval=True,
        help="what outputs are, for accuracy and predictions: scores of classes, logits of being above each "
        "class but the last, logits of labels that are 0 or 1, or numbers; auto: classes with -n or integer "
        "targets, labels with --loss bce, else numbers")
    # fmt: on

    @property
    def facts(self) -> LearnerFacts:
        return find_learner_facts(self.learner)

    @property
    def has_batch_norm(self) -> bool:
        """Return whether batch-norm options apply: true for every learner that may have such layers."""
        return self.facts.adapt_norm is not None
