"""Open a trained initialisation, adapt it to a task, and give its outputs the units of the data.

    checkpoint -> Initialisation -> adapt(UserTask) -> Solution -> outputs(UserTask)

`--adapt` has its tasks from files, `estimators` from arrays: both predict here, and so predict the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from commands.build import build_algorithm, fit_weights, prepare
from commands.call import Call
from commands.config import Config
from commands.outputs import count_outputs
from commands.resolve import resolve_from, restore_config
from common.batch import Tree, tree_map
from common.device import Runtime, find_device, make_runtime
from common.errors import UsageError
from common.processes import ALONE
from common.sizes import find_largest
from common.task import Adapted, UserTask
from evaluation.meta_test import derive_randomness
from learners.reading import Reading, main_tensor
from maml import MAML
from tasks.scales import undo_scale
from training.checkpoint import Checkpoint, load_checkpoint
from training.folders import BEST, LAST, find_checkpoint


@torch.no_grad()
def predict(maml: MAML, adapted: Adapted, x: Tree, normalisation: str = "inductive") -> Tree:
    """Return outputs, logits or numbers, for examples `[examples, ...]`.

    Batch norm is "inductive" or "transductive", or uses the running statistics that `MAML.adapt` was given.
    """
    adapted = adapted._replace(task=replace(adapted.task, query_x=x))
    running = bool(maml.call.statistics.keys() & adapted.shared.weights.keys())
    with maml.use_running_statistics() if running else nullcontext():
        return maml.predict(adapted, "per-step" if running else normalisation)


class Solution(NamedTuple):
    """A task's adapted weights, with the algorithm and the learner that it was built of."""

    learner: nn.Module
    maml: MAML
    adapted: Adapted

    @property
    def reading(self) -> Reading:
        assert self.maml.reading is not None
        return self.maml.reading


@dataclass(frozen=True)
class Initialisation:
    """A checkpoint to adapt, on this machine, with its settings."""

    file: Path
    source: Checkpoint
    config: Config
    runtime: Runtime
    normalisation: str  # of predictions: "inductive", "transductive" or "per-step"

    @classmethod
    def read(cls, run: Path | str, flags: Mapping[str, Any], machine: Call | str) -> Initialisation:
        """Open a checkpoint or a run, with settings by name; UsageError where they do not fit.

        `machine`: the call of a command, which sets up PyTorch, or a device, for a program that has done so.
        """
        file = find_checkpoint(Path(run), BEST, LAST)
        source = load_checkpoint(file)
        config = resolve_from(restore_config(source.settings, file), flags, evaluate=True, adapt=True)
        without = {"metric": None, "metric_mode": None}  # there is nothing to measure, and no code to import
        config = config.replace_settings(convolution="grouped", tasks_at_once=None, **without)
        if isinstance(machine, Call):
            runtime = prepare(config, machine)
        else:
            runtime = make_runtime(find_device(machine, ALONE), config.training.precision)
        norm = flags.get("batch_norm", "per-step" if source.statistics else "inductive")
        if norm == "per-step" and not source.statistics:
            raise UsageError("--batch-norm per-step: the checkpoint has no running statistics")
        return cls(file, source, config, runtime, norm)

    def adapt(self, task: UserTask) -> Solution:
        """Adapt to a task by the inner steps that evaluation quotes; UsageError where it does not fit."""
        x, options = task.support_x, self.config.evaluation
        outputs = len(task.classes) or count_outputs(self.config, task.support_y)
        saved, targets = self.source, task.support_y
        learner, maml = build_algorithm(self.config, self.runtime, outputs, x, saved=saved, targets=targets)
        _check_labels(targets, maml)
        parameters, running = fit_weights(self.file, saved, maml, self.config)
        steps = options.test_steps
        order, keys = derive_randomness("test", x[None], range(1), options.eval_inner_batch, steps)
        order = None if order is None else order[0]
        running = running if self.normalisation == "per-step" else {}
        return Solution(learner, maml, maml.adapt(parameters, x, targets, steps, order, keys[0], running))

    def outputs(self, solution: Solution, task: UserTask) -> tuple[Tree, Tensor, Tensor | None]:
        """Return outputs for a task's query, on the CPU, and the main one in the units of its targets.

        Of normal distributions the latter are the means, and standard deviations come third (None without).
        Raises UsageError if outputs are not finite.
        """
        outputs = predict(solution.maml, solution.adapted, task.query_x, self.normalisation)
        outputs = tree_map(lambda t: t.float().cpu(), outputs)
        if not all(part.isfinite().all() for part in tree_leaves(outputs)):
            parts = {name: getattr(task, name) for name in ("support_x", "support_y", "query_x")}
            wrong = ", ".join(name for name, part in parts.items() if not part.isfinite().all())
            reason = f"{wrong} has numbers that are not: mend them" if wrong else "take fewer --test-steps"
            raise UsageError(f"the predictions are not finite: {reason}")
        in_units = partial(undo_scale, scales=self.source.scales, part="target")
        if solution.reading.kind == "normal":
            return outputs, *solution.reading.moments(outputs, in_units=in_units)
        numbers = main_tensor(outputs)
        return outputs, in_units(numbers) if solution.reading.kind == "numbers" else numbers, None

    def check_classes(self, number: int, source: str) -> None:
        """Raise UsageError, which names the source, where the head has learned another number of classes."""
        options = self.config.tasks
        ways = options.ways or 0
        fits = number <= find_largest(ways) if isinstance(ways, str) else number == ways
        if options.classification and self.config.choices.head_init == "learned" and not fits:
            raise UsageError(
                f"{source}: {number} classes, and the checkpoint learned {options.ways}: give as many, or "
                "train with --head-init zero, prototype or ridge"
            )


def _check_labels(labels: Tensor, maml: MAML) -> None:
    """Raise UsageError where labels are none of the classes that the learner gives scores of."""
    reading = maml.reading
    if reading is None or reading.kind not in ("classes", "ordinal") or labels.is_floating_point():
        return
    wrong = (labels < 0) | (labels >= reading.classes)
    wrong &= True if reading.ignored is None else labels != reading.ignored
    if wrong.any():
        left_out = "" if reading.ignored is None else f" ({reading.ignored} is left out)"
        expected = f"labels are 0 to {reading.classes - 1}{left_out}"
        raise UsageError(f"support_y has a label {labels[wrong][0]}, and {expected}")
