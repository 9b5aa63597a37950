"""Declare the algorithm's choices once: for the command line, `MAML` and checkpoints, with their rules.

Every published variant is a row over five choices (adapted parameters, inner learning rates, meta-gradient,
objective, normalisation), the head before the first step, and the inner loop's update rule. The standard
library alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.options import BY_LEARNER, above_zero, at_least, below_one, flag, flags_of, not_negative

# rows of `commands.presets.PRESETS`
ALGORITHMS = (
    *("maml", "fomaml", "anil", "boil", "reptile", "meta-sgd", "maml++", "imaml", "cavia"),
    *("r2d2", "protonet", "pretrain"),
)
FAST_WEIGHTS = ("all", "head", "body", "context")
ENDS = ("head", "context")  # of a network, which begins with weights that are not adapted
HEAD_INITS = ("learned", "zero", "prototype", "ridge")
INNER_RATES = ("fixed", "layer-step", "element")
META_GRADIENTS = ("exact", "first-order", "reptile", "implicit", "joint")
# Of the meta-gradients that do not go through the inner loop: what rules out some other choices.
MEANING = {
    "implicit": "differentiates the solution of one support loss, which does not depend on the rates",
    "reptile": "moves only what the inner loop adapts, to where the inner loop ends, without a query loss",
    "joint": "has no inner loop: support and query are one batch",
}
NO_STEP = "-s 0 takes no inner step"
OBJECTIVES = ("last", "multi-step")
NORMALISATIONS = ("transductive", "inductive", "per-step")
INNER_OPTIMIZERS = ("sgd", "momentum", "adam", "adam-carried")
ENGINES = ("unrolled", "adjoint")
CONVOLUTIONS = ("im2col", "grouped")
MOST_STEPS = 100_000  # of the inner loop


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError if a value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(choices)}, not {value!r}")


def passes_once(fast_weights: str, norm_per_step: bool, batch_norm: str) -> bool:
    """Return whether what comes before the adapted weights is the same in all inner steps."""
    return fast_weights in ENDS and not norm_per_step and batch_norm != "per-step"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The algorithm: what the inner loop adapts and how, and what the outer loop learns from it.

    Each field is described by the help text of its flag.
    """

    # fmt: off
    algorithm: str = flag("--algorithm", group="algorithm", choices=ALGORITHMS, default="maml", common=True,
        metavar="NAME",
        help=f"{', '.join(ALGORITHMS)}; a preset of the choices in this group and of its paper's settings, "
        "which other flags override")
    fast_weights: str = flag("--fast-weights", group="algorithm", choices=FAST_WEIGHTS, default="all",
        help="weights that the inner loop adapts: all (MAML), the head (ANIL), all but the head (BOIL), or a "
        "context vector that modulates a layer (CAVIA)")
    head: str | None = flag("--head", group="algorithm", metavar="NAMES", default=None, only="head",
        help="the head's modules or parameters by name, with commas between (default: the last module with "
        "weights of its own that is no normalisation layer)")
    head_init: str = flag("--head-init", group="algorithm", choices=HEAD_INITS, default="learned",
        help="the head before the first inner step: meta-learned, zero, or computed from the support set: a "
        "prototype classifier (ProtoNet, Proto-MAML) or a ridge regression (R2D2); all but the first allow "
        "another number of classes (-n) at test")
    ridge_lambda: float = flag(
        "--ridge-lambda", group="algorithm", check=above_zero, metavar="LAMBDA", only="ridge", in_python=1.0,
        help="penalty of the ridge regression, for each support example; meta-learned from there")
    ridge_scale: float = flag(
        "--ridge-scale", group="algorithm", check=above_zero, metavar="X", only="ridge", in_python=1.0,
        help="factor of the ridge head's outputs; meta-learned from there")
    context_size: int = flag("--context-size", group="algorithm", check=at_least(1, 100_000), metavar="N",
        default=5, only="context", help="length of the context vector")
    inner_rates: str = flag("--inner-rates", group="algorithm", choices=INNER_RATES, default="fixed",
        help="inner learning rates: --inner-lr; or meta-learned from there, one for each weight tensor and "
        "step (MAML++), or one for each element (Meta-SGD)")
    inner_lr_max: float | None = flag("--inner-lr-max", group="algorithm", check=above_zero, metavar="RATE",
        default=None, only="learned rates",
        help="learned rates start uniformly between --inner-lr and this (default: all at --inner-lr)")
    meta_gradient: str = flag("--meta-gradient", group="algorithm", choices=META_GRADIENTS, default="exact",
        help="exact; first-order: inner gradients count as constants; reptile: how far the inner loop has "
        "moved; implicit: from its end alone (iMAML); joint: no inner loop while training")
    cg_steps: int = flag("--cg-steps", group="algorithm", check=at_least(0, MOST_STEPS), metavar="N",
        default=5, only="implicit", help="steps of conjugate gradients; 0 is first order")
    cg_damping: float = flag("--cg-damping", group="algorithm", check=not_negative, metavar="X", default=0.0,
        only="conjugate gradients", help="solve (1 + X) I + H / lambda instead of I + H / lambda")
    objective: str = flag("--objective", group="algorithm", choices=OBJECTIVES, default="last",
        help="the query loss after the last inner step, or a weighted sum over all steps whose weight moves "
        "to the last (MAML++)")
    batch_norm: str = flag(
        "--batch-norm", group="algorithm", choices=NORMALISATIONS, only="batch norm", default="transductive",
        help="statistics for the query while training: its own; inductive: the support set's under the "
        "adapted weights; per-step: its own, with running statistics kept for each inner step (MAML++)")
    norm_per_step: bool = flag("--norm-per-step", group="algorithm", default=False, only="batch norm",
        help="learn batch norm's shift and scale for each inner step (MAML++); these are never adapted")
    adapt_norm: bool = flag(
        "--adapt-norm", group="algorithm", only="norm that can adapt", default=BY_LEARNER, in_python=True,
        help="adapt batch norm's shift and scale in the inner loop as well as meta-learning them (default: "
        "no; yes for convnet and what is not built in)")

    steps: int = flag("-s", group="inner loop", check=at_least(0, MOST_STEPS), metavar="STEPS", common=True,
        in_python=1, help="inner gradient steps while training; 0 for a head computed from the support set")
    inner_lr: float = flag("--inner-lr", group="inner loop", check=above_zero, metavar="RATE", common=True,
        only="steps",
        help="learning rate of the inner loop; 0.01 for convnet and for learners that are not built in")
    inner_optimizer: str = flag(
        "--inner-optimizer", group="inner loop", choices=INNER_OPTIMIZERS, default="sgd", only="steps",
        help="update rule of the inner loop; adam-carried keeps Adam's second moments from task to task, as "
        "the code of Reptile's authors does")
    inner_momentum: float = flag(
        "--inner-momentum", group="inner loop", check=below_one, metavar="X", default=0.9, only="momentum",
        help="decay of the inner gradients' running mean: momentum, or Adam's beta1")
    inner_clip: float | None = flag("--inner-clip", group="inner loop", check=above_zero, metavar="X",
        default=None, only="steps", help="clip the inner gradient of each task to norm X")
    proximal: float = flag(
        "--proximal", group="inner loop", check=not_negative, metavar="LAMBDA", default=0.0,
        help="add LAMBDA / 2 times the squared distance from the initialisation to the support loss (iMAML)")
    inner_batch: int | None = flag("--inner-batch", group="inner loop", check=at_least(1), metavar="N",
        default=None, help="support examples per inner step while training (default: all)")
    # fmt: on

    @property
    def trained_steps(self) -> int:
        """Inner steps that training prepares for; a validation takes as many."""
        return 0 if self.meta_gradient == "joint" else self.steps

    @property
    def starts_apart(self) -> bool:
        """Return whether each task has its own start: a head computed from its support set."""
        return self.head_init in ("prototype", "ridge")

    @property
    def passes_once(self) -> bool:
        """Return whether what comes before the adapted weights is the same in all inner steps."""
        return passes_once(self.fast_weights, self.norm_per_step, self.batch_norm)

    @property
    def query_norm(self) -> str:
        """Statistics that a validation uses for the query: those that training uses."""
        return "inductive" if self.batch_norm == "inductive" else "transductive"

    def check(self, *, has_batch_norm: bool = False, classification: bool | None = None) -> None:
        """Raise ValueError for a choice that does not exist, and for choices that contradict each other.

        Args:
            has_batch_norm: whether the learner has batch norm; without it the choices about it do not matter.
            classification: whether targets are classes; None: unknown.
        """
        for name, declaration in flags_of(Choices).items():
            value = getattr(self, name)
            if problem := declaration.problem(value):
                raise ValueError(f"{name} should be {problem}, not {value!r}")
        for refused, reason in self._contradictions(has_batch_norm, classification):
            if refused:
                raise ValueError(reason)

    def _contradictions(
        self, has_batch_norm: bool, classification: bool | None
    ) -> Iterator[tuple[bool, str]]:
        yield from self._meta_gradient_rules(has_batch_norm)
        if not self.steps:
            yield not self.starts_apart, f"{NO_STEP}: it requires --head-init prototype or ridge"
            yield self.meta_gradient != "exact", f"--meta-gradient {self.meta_gradient}: {NO_STEP}"
        if self.inner_lr_max is not None and self.inner_rates != "fixed":
            too_low = self.inner_lr_max <= self.inner_lr
            yield too_low, f"--inner-lr-max {self.inner_lr_max} is not above --inner-lr {self.inner_lr}"
        if self.inner_optimizer == "adam-carried":
            carried = "--inner-optimizer adam-carried: moments go from task to task"
            yield self.meta_gradient != "reptile", f"{carried} with --meta-gradient reptile alone; use adam"
            yield self.head_init != "learned", f"{carried} for a learned head alone; use adam"
        head, weights = f"--head-init {self.head_init}", self.fast_weights
        if self.head_init != "learned":
            fixed, element = weights not in ("all", "head"), self.inner_rates == "element"
            yield fixed, f"{head}: the inner loop must adapt the head, not --fast-weights {weights}"
            yield element, f"{head}: --inner-rates element needs a learned head; use layer-step"
            yield self.meta_gradient == "joint", f"{head}: --meta-gradient joint has no inner loop"
        if self.starts_apart:
            yield self.proximal > 0, f"{head}: each task has its own start; --proximal pulls all to one"
        no_classes = self.head_init == "prototype" and classification is False
        yield no_classes, f"{head}: prototypes are of classes, and this is regression"

    def _meta_gradient_rules(self, has_batch_norm: bool) -> Iterator[tuple[bool, str]]:
        """Yield what a meta-gradient that does not go through inner steps cannot be combined with."""
        way, weights = self.meta_gradient, self.fast_weights
        if way not in MEANING and self.steps:
            return
        reason = f"--meta-gradient {way} {MEANING[way]}" if way in MEANING else NO_STEP
        norm = self.batch_norm if has_batch_norm else ""
        frozen_norm = has_batch_norm and not self.adapt_norm
        yield self.inner_rates != "fixed", f"--inner-rates {self.inner_rates}: {reason}"
        yield self.objective == "multi-step", f"--objective multi-step: {reason}"
        yield has_batch_norm and self.norm_per_step, f"--norm-per-step: {reason}"
        yield norm == "per-step", f"--batch-norm per-step: {reason}"
        yield norm == "inductive" and way in ("reptile", "joint"), f"--batch-norm inductive: {reason}"
        yield self.inner_batch is not None and way != "reptile", f"--inner-batch: {reason}"
        yield way == "reptile" and weights != "all", f"--fast-weights {weights}: {reason}"
        yield way == "joint" and weights == "context", f"--fast-weights context: {reason}"
        yield way == "reptile" and frozen_norm, f"--no-adapt-norm: {reason}"
        yield way == "reptile" and self.head_init == "ridge", f"--head-init ridge: {reason}"
        no_problem = way == "implicit" and not self.proximal
        yield no_problem, f"{reason}: it needs a --proximal above 0, which defines the problem"
