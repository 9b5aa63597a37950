"""The outer loop: meta-optimizer, validation, and when to log and to save.

Metrics stay on the device and are summed there; they are read when a point of a curve is due or the
progress bar is redrawn, so that no iteration waits for the device.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from checkpoint import BEST, LAST, Checkpoint, Curve, Progress, save_checkpoint
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


def _extend(curve: Curve, iteration: int, values: dict[str, float]) -> None:
    for name, value in {"iteration": iteration, **values}.items():
        curve.setdefault(name, []).append(value)


class Trainer:
    """Meta-trains in a folder, from an iteration on.

    Arguments:
        start: a checkpoint to go on from, its parameters already those of `parameters`.
        origin: where else the parameters come from, if not from the initialisation; for the record.
    """

    def __init__(
        self,
        config: Config,
        maml: MAML,
        parameters: Weights,
        distribution: TaskDistribution,
        folder: Path,
        start: Checkpoint | None = None,
        origin: str | None = None,
    ) -> None:
        self.config = config
        self.maml = maml
        self.parameters = parameters
        self.distribution = distribution
        self.folder = folder
        self.optimizer = torch.optim.Adam(parameters.values(), lr=config.meta_lr, fused=True)
        self.iteration = 0
        self.progress = Progress(origin=origin)
        if start is not None:
            # The moments are the file's; rates and the like are those of the settings.
            fresh = self.optimizer.state_dict()
            self.optimizer.load_state_dict(fresh | {"state": start.optimizer["state"]})
            self.iteration = start.iteration
            self.progress = Progress(**start.progress)
        self.metrics = ["query_loss", "meta_gradient_norm"]  # of an iteration
        if distribution.classification:
            self.metrics.append("query_accuracy")
        sums = [self.progress.window.get(name, 0.0) for name in self.metrics]
        self.window = torch.tensor(sums, device=next(iter(parameters.values())).device)
        self.log_every = min(config.log_every, config.iterations)  # a short run has a curve, too
        self.signal: int | None = None
        self.warned = False

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
            log.text("settings", settings_as_markdown(meaningful(config) | self._origin()), 0)
        window_start, window_first = time.monotonic(), self.iteration
        bar = tqdm(total=config.iterations, initial=self.iteration, unit="it", dynamic_ncols=True)
        redrawn = time.monotonic()
        with bar, self._signals():
            while self.iteration < config.iterations:
                self.iteration += 1
                self.step(self.iteration)
                bar.update()
                if time.monotonic() - redrawn > REDRAW_SECONDS:
                    self._show(bar)
                    redrawn = time.monotonic()
                if self.iteration % self.log_every == 0:
                    now = time.monotonic()
                    rate = (self.iteration - window_first) / (now - window_start)
                    self._log_window(log, rate)
                    window_start, window_first = now, self.iteration
                last = self.iteration == config.iterations
                if self.iteration % config.val_every == 0 or last:
                    paused = time.monotonic()
                    self._validate(log, last=last)
                    window_start += time.monotonic() - paused
                if self.iteration % config.save_every == 0 or last or self.signal is not None:
                    self.save(log, LAST)
                if self.signal is not None:
                    break
        if not (self.folder / LAST).exists():  # killed between best.pt and last.pt of the last iteration
            self.save(log, LAST)
        log.close()
        self._write_results()
        return self.signal if self.iteration < config.iterations else None

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the loop after the iteration at hand; a second one ends at once."""

        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for each in handled:
                signal.signal(each, handled[each])
            # not print(): the handler may have come in the middle of one
            os.write(2, b"\nEnding after this iteration; once more to end at once.\n")

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

    def _origin(self) -> dict[str, str]:
        return {"initial_weights": self.progress.origin} if self.progress.origin else {}

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
        if not math.isfinite(means["query_loss"]) and not self.warned:
            self.warned = True
            tqdm.write(
                f"The training loss is {means['query_loss']} at iteration {self.iteration:,}: "
                "try a smaller --inner-lr or --meta-lr, or --grad-clip",
                file=sys.stderr,
            )
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
        score = values.get("query_accuracy", -values["query_loss"])
        best = self.progress.best_score
        if math.isfinite(score) and (best is None or score > best):
            self.progress.best_score, self.progress.best_iteration = score, self.iteration
            self.save(log, BEST)
        number = self.iteration // config.val_every
        if last or number & (number - 1) == 0:
            self._draw_examples(log)

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

    def final_loss(self) -> tuple[float, int, int] | None:
        """Mean training loss of the last 500 iterations, and the first and the last of them.

        Whole points of the curve only: of fewer or more iterations, where these do not divide 500.
        """
        if not self.progress.training:
            return None
        ends = [int(end) for end in self.progress.training["iteration"]]
        losses = self.progress.training["query_loss"]
        total, first = 0.0, ends[-1] + 1
        for position in reversed(range(len(ends))):
            begin = ends[position - 1] + 1 if position else 1
            if ends[-1] - begin >= FINAL_ITERATIONS and first <= ends[-1]:
                break
            total += losses[position] * (ends[position] - begin + 1)
            first = begin
        return total / (ends[-1] - first + 1), first, ends[-1]

    def _write_results(self) -> None:
        final = self.final_loss()
        result: dict[str, Any] = {
            "settings": meaningful(self.config) | self._origin(),
            "iteration": self.iteration,
            "best_iteration": self.progress.best_iteration,
            "final_training_loss": final and dict(zip(("mean", "from", "to"), final, strict=True)),
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
            log_every=self.log_every,
        )
        write_figure(self.folder / "training.png", figure)
