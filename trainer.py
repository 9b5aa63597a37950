"""The outer loop: meta-optimizer, validation, and when to log and to save.

Metrics stay on the device and are summed there; they are read when a point of a curve is due or the
progress bar is redrawn, so that no iteration waits for the device.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import BEST, LAST, Checkpoint, save_checkpoint
from config import Config, meaningful
from dataset import TaskDistribution
from evaluation import accuracy, evaluate, examples
from maml import MAML, Weights
from report import (
    RunLog,
    fits_figure,
    learning_figure,
    settings_as_markdown,
    tasks_figure,
    write_figure,
    write_json,
)

VALIDATION_TASKS = 200
REDRAW_SECONDS = 0.5
FINAL_ITERATIONS = 500  # whose mean training loss is reported at the end

Curve = dict[str, list[float]]  # "iteration" and metrics, by name


@dataclass
class Progress:
    """What a run remembers beside weights and optimizer; saved in its checkpoints."""

    best_score: float | None = None  # of best.pt: validation accuracy, or minus the validation loss
    best_iteration: int | None = None
    window: dict[str, float] = field(default_factory=dict)  # sums behind the next point, by metric
    window_size: int = 0
    training: Curve = field(default_factory=dict)
    validation: Curve = field(default_factory=dict)


def _extend(curve: Curve, iteration: int, values: dict[str, float]) -> None:
    for name, value in {"iteration": iteration, **values}.items():
        curve.setdefault(name, []).append(value)


class Trainer:
    """Meta-trains in a folder, from an iteration on.

    Arguments:
        start: a checkpoint to go on from, its parameters already those of `parameters`.
    """

    def __init__(
        self,
        config: Config,
        maml: MAML,
        parameters: Weights,
        distribution: TaskDistribution,
        folder: Path,
        start: Checkpoint | None = None,
    ) -> None:
        self.config = config
        self.maml = maml
        self.parameters = parameters
        self.distribution = distribution
        self.folder = folder
        self.optimizer = torch.optim.Adam(parameters.values(), lr=config.meta_lr, fused=True)
        self.iteration = 0
        self.progress = Progress()
        if start is not None:
            self.optimizer.load_state_dict(start.optimizer)
            self.iteration = start.iteration
            self.progress = Progress(**start.progress)
        self.metrics = ["query_loss", "meta_gradient_norm"]  # of an iteration
        if distribution.classification:
            self.metrics.append("query_accuracy")
        sums = [self.progress.window.get(name, 0.0) for name in self.metrics]
        self.window = torch.tensor(sums, device=next(iter(parameters.values())).device)
        self.signal: int | None = None

    # ---- one iteration ----------------------------------------------------------------------

    def step(self, iteration: int) -> None:
        """Samples the iteration's tasks and moves the meta-parameters."""
        tasks = range(self.config.meta_batch_size)
        batch = self.distribution.sample("train", self.config.seed, iteration, tasks)
        result = self.maml.meta_gradient(self.parameters, batch)
        for name, parameter in self.parameters.items():
            parameter.grad = result.gradients[name]
        norm = torch.nn.utils.get_total_norm(list(result.gradients.values()))
        self._clip()
        self.optimizer.step()
        metrics = [result.losses.mean(), norm]
        if self.distribution.classification:
            metrics.append(accuracy(result.outputs, batch.query_y).mean())
        self.window += torch.stack(metrics)
        self.progress.window_size += 1

    def _clip(self) -> None:
        """Clips the meta-gradient as configured, its elements first."""
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_value_(self.parameters.values(), self.config.grad_clip)
        if self.config.grad_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip_norm)

    # ---- the loop ---------------------------------------------------------------------------

    def train(self) -> int | None:
        """Up to `config.iterations`; saves, and returns the signal that ended it early, if any."""
        config = self.config
        log = RunLog(self.folder, begin_at=self.iteration + 1 if self.iteration else 0)
        if not self.iteration:
            log.text("settings", settings_as_markdown(meaningful(config)), 0)
        window_start, window_first = time.monotonic(), self.iteration
        bar = tqdm(total=config.iterations, initial=self.iteration, unit="it", dynamic_ncols=True)
        redrawn = time.monotonic()
        with bar, self._signals():
            while self.iteration < config.iterations and self.signal is None:
                self.iteration += 1
                self.step(self.iteration)
                bar.update()
                if time.monotonic() - redrawn > REDRAW_SECONDS:
                    self._show(bar)
                    redrawn = time.monotonic()
                if self.iteration % config.log_every == 0:
                    now = time.monotonic()
                    rate = (self.iteration - window_first) / (now - window_start)
                    self._log_window(log, rate)
                    window_start, window_first = now, self.iteration
                last = self.iteration == config.iterations
                if self.iteration % config.val_every == 0 or last:
                    paused = time.monotonic()
                    self._validate(log, last=last)
                    window_start += time.monotonic() - paused
                if self.iteration % config.save_every == 0 or last:
                    self.save(log, LAST)
            if self.iteration % config.save_every and self.iteration < config.iterations:
                self.save(log, LAST)
        log.close()
        self._write_results()
        return self.signal

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the loop after the iteration at hand; a second one ends at once."""

        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for each in handled:
                signal.signal(each, handled[each])
            print("\nEnding after this iteration; once more to end at once.", file=sys.stderr)

        handled = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        for each in handled:
            signal.signal(each, ask_to_stop)
        try:
            yield
        finally:
            for each, handler in handled.items():
                signal.signal(each, handler)

    def save(self, log: RunLog, name: str) -> None:
        """Curves first: what a checkpoint claims to have seen must be in the event files."""
        log.flush()
        self.progress.window = dict(zip(self.metrics, self.window.tolist(), strict=True))
        parameters = {key: w.detach() for key, w in self.parameters.items()}
        content = Checkpoint(
            self.config, self.iteration, parameters, self.optimizer.state_dict(), asdict(self.progress)
        )
        save_checkpoint(self.folder / name, content)

    # ---- what is shown ----------------------------------------------------------------------

    def _window_means(self) -> dict[str, float]:
        means = (self.window / self.progress.window_size).tolist()
        return dict(zip(self.metrics, means, strict=True))

    def _show(self, bar: tqdm) -> None:
        if self.progress.window_size == 0:
            return
        means = self._window_means()
        shown = f"query loss {means['query_loss']:.4f}"
        if self.distribution.classification:
            shown += f", accuracy {100 * means['query_accuracy']:.2f} %"
        bar.set_postfix_str(shown, refresh=False)

    def _log_window(self, log: RunLog, rate: float) -> None:
        """A point of the training curves: means since the last one."""
        means = self._window_means()
        self.window.zero_()
        self.progress.window_size = 0
        _extend(self.progress.training, self.iteration, means)
        log.scalars({f"train/{name}": value for name, value in means.items()}, self.iteration)
        log.scalars(
            {"speed/iterations_per_second": rate, "optimizer/meta_lr": self.config.meta_lr}, self.iteration
        )

    # ---- validation -------------------------------------------------------------------------

    def _validate(self, log: RunLog, *, last: bool) -> None:
        """After the trained number of steps; saves best.pt, and draws at 1, 2, 4, 8, ... validations."""
        config = self.config
        evaluation = evaluate(
            self.maml,
            self.parameters,
            self.distribution,
            "validation",
            tasks=VALIDATION_TASKS,
            steps=config.steps,
            normalisations=(config.batch_norm,),
        )
        values = {"query_loss": evaluation.losses[config.batch_norm][:, -1].mean().item()}
        if self.distribution.classification:
            values["query_accuracy"] = evaluation.accuracies[config.batch_norm][:, -1].mean().item()
        log.scalars({f"validation/{name}": value for name, value in values.items()}, self.iteration)
        _extend(self.progress.validation, self.iteration, values)
        number = self.iteration // config.val_every
        if last or number & (number - 1) == 0:
            self._draw_examples(log)
        score = values.get("query_accuracy", -values["query_loss"])
        best = self.progress.best_score
        if math.isfinite(score) and (best is None or score > best):
            self.progress.best_score, self.progress.best_iteration = score, self.iteration
            self.save(log, BEST)

    def _draw_examples(self, log: RunLog) -> None:
        config = self.config
        regression = not self.distribution.classification
        batch, outputs = examples(
            self.maml,
            self.parameters,
            self.distribution,
            "validation",
            tasks=4 if regression else 3,
            steps=max(config.steps, config.test_steps),
            normalisation=config.batch_norm,
        )
        title = f"validation tasks, iteration {self.iteration:,}"
        if regression:
            shown = sorted({0, config.steps, config.test_steps})
            figure = fits_figure(batch, outputs, shown, title)
        else:
            assert config.ways is not None
            figure = tasks_figure(
                batch,
                outputs,
                ways=config.ways,
                shots=config.shots,
                queries=config.queries,
                step=config.test_steps,
                title=f"{title}, after {config.test_steps} steps",
            )
        log.figure("examples", figure, self.iteration)
        write_figure(self.folder / "examples.png", figure)

    # ---- the end ----------------------------------------------------------------------------

    def final_loss(self) -> float | None:
        """Mean training loss of the last 500 iterations, of whole points of the curve."""
        curve = self.progress.training or {"iteration": [], "query_loss": []}
        recent = [
            loss
            for iteration, loss in zip(curve["iteration"], curve["query_loss"], strict=True)
            if iteration - self.config.log_every >= self.iteration - FINAL_ITERATIONS
        ]
        return sum(recent) / len(recent) if recent else None

    def _write_results(self) -> None:
        result: dict[str, Any] = {
            "settings": asdict(self.config),
            "iteration": self.iteration,
            "best_iteration": self.progress.best_iteration,
            f"train_query_loss_last_{FINAL_ITERATIONS}": self.final_loss(),
            "training": self.progress.training,
            "validation": self.progress.validation,
        }
        write_json(self.folder / "training.json", result)
        if not self.progress.training or not self.progress.validation:
            return
        classification = self.distribution.classification
        figure = learning_figure(
            self.progress.training,
            self.progress.validation,
            measure="query_accuracy" if classification else "query_loss",
            label="query accuracy" if classification else "query MSE",
            log_every=self.config.log_every,
        )
        write_figure(self.folder / "training.png", figure)
