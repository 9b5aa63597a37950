"""Declare the options of meta-test. The standard library alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.choices import MOST_STEPS
from common.names import check_code_name
from common.options import at_least, flag


def check_metric_name(name: str) -> str | None:
    is_name = re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name)
    return None if is_name else check_code_name(name, "a name of torchmetrics, such as f1, auroc, iou or r2")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of measuring a checkpoint on validation and test tasks."""

    # fmt: off
    eval_tasks: int = flag("--eval-tasks", group="evaluation", check=at_least(2), metavar="TASKS",
        default=600, free_on_resume=True, free_on_eval=True, common=True, help="number of test tasks")
    eval_steps: int = flag(
        "--eval-steps", group="evaluation", check=at_least(0, MOST_STEPS), metavar="STEPS", default=10,
        free_on_resume=True, free_on_eval=True, common=True,
        help="measure after 0, 1, ... STEPS inner steps (default: 10, or --test-steps if that is more; with "
        "-s 0: 0)")
    test_steps: int = flag("--test-steps", group="evaluation", check=at_least(0, MOST_STEPS), metavar="STEPS",
        free_on_resume=True, free_on_eval=True,
        help="number of inner steps whose result is quoted; at most --eval-steps")
    eval_inner_batch: int | None = flag(
        "--eval-inner-batch", group="evaluation", check=at_least(1), metavar="N", default=None, only="steps",
        free_on_resume=True, free_on_eval=True,
        help="support examples per inner step on validation and test tasks (default: all)")
    metric: str | None = flag("--metric", group="evaluation", check=check_metric_name, metavar="NAME",
        default=None, free_on_eval=True, common=True,
        help="measure that chooses best.pt and that tables quote, computed for each task: a name of "
        "torchmetrics (f1, auroc, iou, r2, ...), or file.py:function of outputs and targets")
    metric_mode: str | None = flag(
        "--metric-mode", group="evaluation", choices=("min", "max"), default=None, only="metric",
        free_on_eval=True, help="which value is better (default: as torchmetrics or the function's "
        "higher_is_better says)")
    # fmt: on
