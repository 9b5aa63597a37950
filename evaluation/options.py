"""Declare the options of meta-test. The standard library alone."""

from __future__ import annotations

from dataclasses import dataclass

from common.choices import MOST_STEPS
from common.options import at_least, flag


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of measuring a checkpoint on validation and test tasks."""

    # fmt: off
    eval_tasks: int = flag(
        "--eval-tasks", group="evaluation", check=at_least(2), metavar="TASKS", default=600,
        free_on_resume=True, free_on_eval=True, common=True, help="number of test tasks")
    eval_steps: int = flag(
        "--eval-steps", group="evaluation", check=at_least(1, MOST_STEPS), metavar="STEPS", default=10,
        free_on_resume=True, free_on_eval=True, common=True,
        help="measure after 0, 1, ... STEPS inner steps (default: 10, or --test-steps if that is more)")
    test_steps: int = flag("--test-steps", group="evaluation", check=at_least(1, MOST_STEPS), metavar="STEPS",
        free_on_resume=True, free_on_eval=True,
        help="number of inner steps whose result is quoted; at most --eval-steps")
    eval_inner_batch: int | None = flag(
        "--eval-inner-batch", group="evaluation", check=at_least(1), metavar="N", default=None,
        free_on_resume=True, free_on_eval=True,
        help="support examples per inner step on validation and test tasks (default: all)")
    # fmt: on
