"""The outer loop: when to step, to validate, to log and to save.

An iteration is a function of the state (meta_step.py). Metrics stay on the device and are summed there;
they are read when a point of a curve is due or the progress bar is redrawn, so that no iteration waits
for the device.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import BEST, LAST, Checkpoint, Curve, Progress, adam_state, moments_of, save_checkpoint
from compiler import CompilationError, Compiler
from config import Config, meaningful
from evaluation import accuracy, can_be_drawn, evaluate, examples
from inner_loop import RATE
from learner import LEARNERS
from losses import loss_name
from maml import MAML, MetaGradient
from meta_step import CudaGraph, FlatLayout, MetaStep, OuterLoop, State
from optimizers import Weights
from report import (
    RunLog,
    fits_figure,
    learning_figure,
    settings_as_markdown,
    tasks_figure,
    write_figure,
    write_json,
)
from tasks import TaskDistribution, tree_map

VALIDATION_TASKS = 200
REDRAW_SECONDS = 0.5
FINAL_ITERATIONS = 500  # whose mean training loss is reported at the end


def _extend(curve: Curve, iteration: int, values: dict[str, float]) -> None:
    for name, value in {"iteration": iteration, **values}.items():
        curve.setdefault(name, []).append(value)


def _is_power_of_four(number: int) -> bool:
    return number & (number - 1) == 0 and number.bit_length() % 2 == 1


def metrics_of_regression(result: MetaGradient, norm: Tensor, targets: Tensor) -> Tensor:
    """Of an iteration of regression: query loss and norm of the meta-gradient."""
    return torch.stack([result.losses.mean(), norm])


def metrics_of_classification(result: MetaGradient, norm: Tensor, targets: Tensor) -> Tensor:
    """The same, and query accuracy."""
    share = accuracy(result.outputs, targets).mean().to(norm.dtype)
    return torch.stack([result.losses.mean(), norm, share])


class Trainer:
    """Meta-trains in a folder, from an iteration on.

    Arguments:
        compiler: what makes compiled functions of `maml`'s and of the whole iteration.
        distribution: of validation tasks; training ones may have more support examples.
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
        compiler: Compiler,
        start: Checkpoint | None = None,
        origin: str | None = None,
    ) -> None:
        self.config = config
        self.maml = maml
        self.distribution = distribution
        self.folder = folder
        self.compiler = compiler
        self.layout = FlatLayout(parameters)
        self.iteration = 0
        self.progress = Progress(origin=origin)
        self.metrics = ["query_loss", "meta_gradient_norm"]  # of an iteration
        if distribution.classification:
            self.metrics.append("query_accuracy")
        vector = self.layout.flatten(parameters)
        first, second = torch.zeros_like(vector), torch.zeros_like(vector)
        if start is not None:
            first, second = (
                self.layout.flatten(moment).to(vector) for moment in moments_of(start, self.layout.shapes)
            )
            self.iteration = start.iteration
            self.progress = Progress(**start.progress)
        statistics = maml.initial_statistics()
        self.statistics_layout = FlatLayout(statistics) if statistics else None
        if start is not None:
            statistics = start.statistics
        sums = [self.progress.window.get(name, 0.0) for name in self.metrics]
        self.state = State(
            vector,
            first,
            second,
            torch.tensor(self.iteration, device=vector.device),
            torch.tensor(sums, device=vector.device, dtype=vector.dtype),
            self.statistics_layout.flatten(statistics).to(vector) if self.statistics_layout else vector[:0],
        )
        self.draws = self._learner_draws()
        self.plain_step = self._plain_step()
        self.meta_step: MetaStep | CudaGraph = self.plain_step
        self.log_every = min(config.log_every, config.iterations)  # a short run has a curve, too
        self.signal: int | None = None
        self.warned = False

    @property
    def parameters(self) -> Weights:
        """The meta-parameters, as views of the state's."""
        return self.layout.unflatten(self.state.parameters)

    @property
    def statistics(self) -> Weights:
        """The running statistics of per-step batch norm, as views of the state's; else empty."""
        return self.statistics_layout.unflatten(self.state.statistics) if self.statistics_layout else {}

    def _learner_draws(self) -> bool:
        if self.config.learner in LEARNERS:
            return False
        batch = self.distribution.sample("train", self.config.seed, 0, range(1))
        return self.maml.draws(tree_map(lambda part: part[0], batch.support_x))

    # ---- one iteration ----------------------------------------------------------------------

    def _plain_step(self) -> MetaStep:
        """The iteration to come: first order up to `config.exact_from`, if it is exact at all."""
        config = self.config
        first_order = self.iteration < config.exact_from
        outer = OuterLoop(
            config.meta_lr,
            config.meta_optimizer,
            config.meta_lr_schedule,
            config.meta_lr_final,
            config.iterations,
            config.grad_clip,
            config.grad_clip_norm,
            config.inner_batch,
            config.msl_iterations if config.objective == "multi-step" else None,
        )
        classification = self.distribution.classification
        return MetaStep(
            self.maml.with_options(meta_gradient="first-order") if first_order else self.maml,
            self.distribution.resized(config.training_shots),
            outer,
            layout=self.layout,
            statistics_layout=self.statistics_layout,
            metrics=metrics_of_classification if classification else metrics_of_regression,
            seed=config.seed,
            tasks=config.meta_batch_size,
            draws=self.draws,
            accelerate=self.compiler,
        )

    def step(self, bar: tqdm) -> bool:
        """One iteration; the first ones of a run, as many as are set, run uncompiled.

        False where a signal came while it was being compiled: the iteration was not taken.
        """
        if self.iteration == self.config.exact_from and self.iteration:
            self.meta_step = self.plain_step = self._plain_step()
            self.compiler.active = False  # the exact step is another function
        due = self.config.compile == "on" and self.iteration >= self.config.compile_after
        if due and not self.compiler.active and not self._compile(bar):
            return False
        self.state = self.meta_step(self.state, self.iteration)
        self.iteration += 1
        self.progress.window_size += 1
        return True

    def _compile(self, bar: tqdm) -> bool:
        """Compiles the step by taking it, or goes on without, and says so; False if interrupted."""
        state = State(*(tensor.clone() for tensor in self.state))
        self.compiler.on_wait = lambda seconds: bar.set_postfix_str(f"compiling, {seconds:.0f} s")
        self.compiler.interrupted = lambda: self.signal is not None
        self.compiler.active = True
        seconds, compiled = self.compiler.seconds, self.compiler.compiled
        try:
            self.meta_step(state, self.iteration)
        except CompilationError as error:
            self.compiler.active = False
            if self.signal is not None:
                return False
            self.config = replace(self.config, compile="off")
            tqdm.write(f"Not compiled, the run goes on without: {error}", file=sys.stderr)
        else:
            done = "Compiled" if self.compiler.compiled > compiled else "Found compiled code"
            tqdm.write(f"{done} in {self.compiler.seconds - seconds:.1f} s", file=sys.stderr)
            if state.parameters.is_cuda and not self.distribution.on_host:
                self._record(state)
        return True

    def _record(self, state: State) -> None:
        """Replays the compiled step as a CUDA graph from here on, if it can be recorded as one."""
        try:
            self.meta_step = CudaGraph(self.meta_step, state)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            tqdm.write(f"Not recorded as a CUDA graph, kernels are launched one by one: {first_line}")

    # ---- the loop ---------------------------------------------------------------------------

    def train(self) -> int | None:
        """Up to `config.iterations`; saves, and returns the signal that ended it early, if any."""
        config = self.config
        log = RunLog(self.folder, begin_at=self.iteration + 1 if self.iteration else 0)
        if not self.iteration:
            log.text("settings", settings_as_markdown(meaningful(config) | self._origin()), 0)
        window_start, window_first = time.monotonic(), self.iteration
        bar = tqdm(total=config.iterations, initial=self.iteration, unit="it", dynamic_ncols=True)
        redrawn, shown_first = time.monotonic(), self.iteration + 1
        with bar, self._signals():
            while self.iteration < config.iterations:
                if not self.step(bar):
                    self.save(log, LAST)
                    break
                bar.update()
                if time.monotonic() - redrawn > REDRAW_SECONDS or self.iteration == shown_first:
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
        self.progress.window = dict(zip(self.metrics, self.state.sums.tolist(), strict=True))
        # of their own: a view would be saved with the whole vector behind it
        parameters, *moments = (
            {key: w.clone() for key, w in self.layout.unflatten(vector).items()} for vector in self.state[:3]
        )
        content = Checkpoint(
            self.config,
            self.iteration,
            parameters,
            adam_state(self.iteration, *moments),
            asdict(self.progress),
            {name: s.clone() for name, s in self.statistics.items()},
            {name: t.cpu() for name, t in self.maml.fixed.items()},
            self.distribution.split_names,
        )
        save_checkpoint(self.folder / name, content)

    def _origin(self) -> dict[str, str]:
        return {"initial_weights": self.progress.origin} if self.progress.origin else {}

    # ---- what is shown ----------------------------------------------------------------------

    def _window_means(self) -> dict[str, float]:
        means = (self.state.sums / self.progress.window_size).tolist()
        return dict(zip(self.metrics, means, strict=True))

    def _show(self, bar: tqdm) -> None:
        if self.progress.window_size == 0:
            return
        means = self._window_means()
        shown = f"query loss {means['query_loss']:.4f}"
        if self.distribution.classification:
            shown += f", accuracy {100 * means['query_accuracy']:.2f} %"
        bar.set_postfix_str(shown)

    def _log_window(self, log: RunLog, rate: float) -> None:
        """A point of the training curves: means since the last one."""
        means = self._window_means()
        self.state = self.state._replace(sums=torch.zeros_like(self.state.sums))
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
        meta_lr = float(self.plain_step.lr_at(torch.tensor(self.iteration - 1)))
        log.scalars({"speed/iterations_per_second": rate, "optimizer/meta_lr": meta_lr}, self.iteration)
        if self.config.inner_rates != "fixed":
            log.scalars(self._inner_rates(), self.iteration)

    def _inner_rates(self) -> dict[str, float]:
        """Learned inner rates by tag: of each weight and step; of elements, the mean and the least."""
        rates = {name[len(RATE) :]: r for name, r in self.parameters.items() if name.startswith(RATE)}
        values: dict[str, float] = {}
        for name, rate in rates.items():
            if self.config.inner_rates == "layer-step":
                steps = enumerate(rate.tolist(), 1)
                values |= {f"inner_lr/{name}/step_{step}": value for step, value in steps}
            else:
                values[f"inner_lr/{name}/mean"] = rate.mean().item()
                values[f"inner_lr/{name}/least"] = rate.min().item()
        return values

    # ---- validation -------------------------------------------------------------------------

    def _validate(self, log: RunLog, *, last: bool) -> None:
        """After the trained number of steps; saves best.pt, and draws at 1, 4, 16, ... validations."""
        config = self.config
        norm = config.query_norm
        evaluation = evaluate(
            self.maml,
            self.parameters,
            self.distribution,
            "validation",
            tasks=VALIDATION_TASKS,
            steps=config.trained_steps,
            normalisations=(norm,),
            inner_batch=config.eval_inner_batch,
        )
        values = {"query_loss": evaluation.losses[norm][:, -1].mean().item()}
        if self.distribution.classification:
            values["query_accuracy"] = evaluation.accuracies[norm][:, -1].mean().item()
        log.scalars({f"validation/{name}": value for name, value in values.items()}, self.iteration)
        _extend(self.progress.validation, self.iteration, values)
        score = values.get("query_accuracy", -values["query_loss"])
        best = self.progress.best_score
        if math.isfinite(score) and (best is None or score > best):
            self.progress.best_score, self.progress.best_iteration = score, self.iteration
            self.save(log, BEST)
        number = self.iteration // config.val_every
        if last or _is_power_of_four(number):
            self._draw_examples(log)

    def _draw_examples(self, log: RunLog) -> None:
        config = self.config
        regression = not self.distribution.classification
        if not can_be_drawn(self.distribution):
            return
        batch, outputs = examples(
            self.maml,
            self.parameters,
            self.distribution,
            "validation",
            tasks=4 if regression else 3,
            steps=max(config.steps, config.test_steps),
            normalisation=config.query_norm,
            inner_batch=config.eval_inner_batch,
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
        log.figure("examples", figure, self.iteration, self.folder / "examples.png")

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
            label="query accuracy" if classification else f"query {loss_name(self.config.loss)}",
            log_every=self.log_every,
        )
        write_figure(self.folder / "training.png", figure)
