"""The outer loop: when to step, to validate, to log and to save.

An iteration is a function of the state (meta_step.py), of one run or of several at once; what belongs to a
run alone is in run.py. Metrics stay on the device and are summed there; they are read when a point of a
curve is due or the progress bar is redrawn, so that no iteration waits for the device.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from commands.build import own_code_flags
from commands.config import Config
from common.batch import TaskDistribution, tree_map
from common.errors import LostError, UsageError, is_out_of_memory, reason_of
from common.optimizers import Weights
from common.processes import ALONE, Late, World
from evaluation.meta_test import Evaluation, evaluate
from learner import LEARNERS
from maml import MAML
from training import divergence
from training.checkpoint import Checkpoint, save_checkpoints
from training.compiler import CompilationError, Compiler
from training.folders import BEST, LAST
from training.run import Run
from training.schedules import meta_lr_at
from training.step import (
    TAIL,
    CudaGraph,
    FlatLayout,
    MetaStep,
    OuterLoop,
    State,
    loss_and_accuracy_of,
    loss_of,
)

VALIDATION_TASKS = 200
REDRAW_SECONDS = 0.5
SAVE_MINUTES = 10.0
# Iterations that run uncompiled first, in order to show at once that the run works.
UNCOMPILED_ITERATIONS = {"regression": 100, "classification": 3}
FAILED = 4  # exit code of a run whose numbers have become other than finite

# Settings in which runs that are trained at once may differ, and what `MetaStep` calls them.
AT_ONCE = {
    "seed": "seed",
    "inner_lr": "inner_lr",
    "meta_lr": "lr",
    "meta_lr_final": "final_lr",
    "grad_clip": "clip_value",
    "grad_clip_norm": "clip_norm",
}


def _is_power_of_four(number: int) -> bool:
    return number & (number - 1) == 0 and number.bit_length() % 2 == 1


class Trainer:
    """Meta-trains a run in its folder, from an iteration on; or several at once, each in its own.

    Arguments:
        runs: whose settings differ in `AT_ONCE` alone, and which are at the same iteration.
        maml: the algorithm; of several runs, one that can be called `in_transform`.
        distribution: of validation tasks; training ones may have more support examples.
        compiler: what makes compiled functions of `maml`'s and of the whole iteration.
        world: the processes that share the tasks of an iteration.
        shown: show the progress; else it is silent.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        maml: MAML,
        distribution: TaskDistribution,
        compiler: Compiler,
        world: World = ALONE,
        *,
        shown: bool = True,
    ) -> None:
        self.runs = list(runs)
        self.maml = maml
        self.distribution = distribution
        self.compiler = compiler
        self.world = world
        self.shown = shown and world.first
        self.layout = FlatLayout(runs[0].parameters)
        statistics = maml.initial_statistics()
        self.statistics_layout = FlatLayout(statistics) if statistics else None
        self.metrics = ["query_loss", "meta_gradient_norm", *TAIL]  # of an iteration
        if distribution.classification:
            self.metrics.insert(1, "query_accuracy")
        self.iteration = runs[0].iteration
        self.window_size = runs[0].progress.window_size
        states = [self._state_of(run) for run in runs]
        self.state = State(*map(torch.stack, zip(*states, strict=True))) if len(runs) > 1 else states[0]
        self.draws = self._learner_draws()
        self.plain_step = self._plain_step()
        self.meta_step: MetaStep | CudaGraph = self.plain_step
        self.signal: int | None = None
        self.stop_asked = Late(self.state.parameters.device)

    def _state_of(self, run: Run) -> State:
        """The state of one run, as it begins or goes on."""
        vector = self.layout.flatten(run.parameters)
        first, second = torch.zeros_like(vector), torch.zeros_like(vector)
        statistics = self.maml.initial_statistics()
        if run.start is not None:
            first, second = (
                self.layout.flatten(moment).to(vector) for moment in (run.start.exp_avg, run.start.exp_avg_sq)
            )
            statistics = run.start.statistics
        sums = [run.progress.window.get(name, 0.0) for name in self.metrics]
        return State(
            vector,
            first,
            second,
            torch.tensor(run.iteration, device=vector.device),
            torch.tensor(sums, device=vector.device, dtype=vector.dtype),
            self.statistics_layout.flatten(statistics).to(vector) if self.statistics_layout else vector[:0],
        )

    @property
    def config(self) -> Config:
        """The settings, of several runs those of the first."""
        return self.runs[0].config

    @property
    def parameters(self) -> Weights:
        """The meta-parameters, as views of the state's; of several runs those of the first."""
        self._show_runs()
        return self.runs[0].parameters

    def _learner_draws(self) -> bool:
        if self.config.learner.learner in LEARNERS:
            return False
        batch = self.distribution.sample("train", self.config.training.seed, 0, range(1))
        return self.maml.draws(tree_map(lambda part: part[0], batch.support_x))

    # ---- one iteration ----------------------------------------------------------------------

    def _plain_step(self) -> MetaStep:
        """The iteration to come: first order up to `config.training.exact_from`, if it is exact at all."""
        config = self.config
        first_order = self.iteration < config.training.exact_from
        outer = OuterLoop(
            config.training.meta_lr,
            config.training.meta_optimizer,
            config.training.meta_lr_schedule,
            config.training.meta_lr_final,
            config.training.iterations,
            config.training.grad_clip,
            config.training.grad_clip_norm,
            config.choices.inner_batch,
            config.training.msl_iterations if config.choices.objective == "multi-step" else None,
            config.training.on_nan,
        )
        return MetaStep(
            self.maml.with_options(meta_gradient="first-order") if first_order else self.maml,
            self.distribution.resized(config.training_shots),
            outer,
            layout=self.layout,
            statistics_layout=self.statistics_layout,
            measure=loss_and_accuracy_of if self.distribution.classification else loss_of,
            member=self._member(),
            tasks=config.training.meta_batch_size,
            draws=self.draws,
            world=self.world,
            accelerate=self.compiler,
        )

    def _member(self) -> dict[str, Tensor]:
        """What tells the runs apart."""
        vector = self.state.parameters
        found = {"seed": torch.tensor([run.config.training.seed for run in self.runs], device=vector.device)}
        for name in AT_ONCE.keys() - {"seed"}:
            values = [run.config.get(name) for run in self.runs]
            if len(set(values)) > 1 and not (
                name == "inner_lr" and self.config.choices.inner_rates != "fixed"
            ):
                found[AT_ONCE[name]] = torch.tensor(values, device=vector.device, dtype=vector.dtype)
        found = dict(sorted(found.items()))  # compiled code knows them by position
        return found if len(self.runs) > 1 else {"seed": found["seed"][0]}

    def step(self, bar: tqdm) -> bool:
        """One iteration; the first ones of a run, as many as are set, run uncompiled.

        False where a signal came while it was being compiled: the iteration was not taken.
        """
        if self.iteration == self.config.training.exact_from and self.iteration:
            self.meta_step = self.plain_step = self._plain_step()
            self.compiler.active = False  # the exact step is another function
        due = self.config.training.compile == "on" and self.iteration >= self._uncompiled_iterations()
        if due and not self.compiler.active and not self._compile(bar):
            return False
        self.plain_step.stop = self.signal is not None
        self.state = self.meta_step(self.state, self.iteration)
        self.iteration += 1
        self.window_size += 1
        return True

    def _uncompiled_iterations(self) -> int:
        kind = "classification" if self.distribution.classification else "regression"
        few = UNCOMPILED_ITERATIONS[kind]
        return few if self.config.training.iterations > few else 0

    def _compile(self, bar: tqdm) -> bool:
        """Compiles the step by rehearsing it, or goes on without, and says so; False if interrupted."""
        state = State(*(tensor.clone() for tensor in self.state))
        self.compiler.interrupted = lambda: self.signal is not None
        self.compiler.active = True
        seconds, compiled = self.compiler.seconds, self.compiler.compiled
        failure, interrupted = None, False
        try:
            with self._shown_as(bar, "compiling"):
                self.plain_step.rehearse(state, self.iteration)
        except CompilationError as error:
            failure, interrupted = str(error), self.signal is not None
        outcomes = self.world.gathered((failure, interrupted))
        failures = [each for each, _ in outcomes if each is not None]
        if any(each for _, each in outcomes):
            self.compiler.active = False
            self.signal = self.signal or signal.SIGTERM
            return False
        if failures:  # all processes compute alike
            self.compiler.active = False
            for run in self.runs:
                run.config = run.config.replaced(compile="off")
            self._say(f"Not compiled, the run goes on without: {failures[0]}")
            return True
        done = "Compiled" if self.compiler.compiled > compiled else "Found compiled code"
        self._say(f"{done} in {self.compiler.seconds - seconds:.1f} s")
        if state.parameters.is_cuda and not self.distribution.on_host and self.world.size == 1:
            self._record(state)
        return True

    def _record(self, state: State) -> None:
        """Replays the compiled step as a CUDA graph from here on, if it can be recorded as one."""
        try:
            self.meta_step = CudaGraph(self.plain_step, state)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            self._say(f"Not recorded as a CUDA graph, kernels are launched one by one: {first_line}")

    # ---- the loop ---------------------------------------------------------------------------

    def train(self) -> int:
        """Up to `config.training.iterations`; saves, and returns the exit code: 128 + signal where one ended it early,
        `FAILED` where numbers did that are not finite (of several runs: of any of them).

        Raises LostError where another process is lost; what the iterations before have led to is saved.
        UsageError where the end could not be saved, or its results.
        """
        config = self.config
        self._show_runs()
        for run in self.runs:
            run.begin()
        window_start, window_first = time.monotonic(), self.iteration
        bar = tqdm(
            total=config.training.iterations, initial=self.iteration, unit="it", dynamic_ncols=True,
            disable=not self.shown,
        )  # fmt: skip
        redrawn, shown_first = time.monotonic(), self.iteration + 1
        with bar, self._signals():
            if self._validation_is_missing():
                with (
                    self._saved_if_lost(),
                    self._shown_as(bar, "validating"),
                ):
                    self._validate(last=self.iteration == config.training.iterations)
            stopping = self._interrupted()
            while self.iteration < config.training.iterations and not stopping:
                with self._saved_if_lost():
                    taken = self.step(bar)
                if not taken:
                    self._look_for_failures()
                    self.save(LAST)
                    break
                bar.update()
                if self.shown and (
                    time.monotonic() - redrawn > REDRAW_SECONDS or self.iteration == shown_first
                ):
                    self._show_progress(bar)
                    redrawn = time.monotonic()
                stopping = self._stopping()
                last = self.iteration == config.training.iterations
                logging = self.iteration % self.runs[0].log_every == 0
                validating = self.iteration % config.training.val_every == 0 or last
                saving = self.iteration % config.training.save_every == 0 or last
                if logging or validating or saving or stopping:  # in all processes
                    self._look_for_failures()
                    if not self._living():
                        break
                if logging:
                    now = time.monotonic()
                    self._log_window((self.iteration - window_first) / (now - window_start))
                    window_start, window_first = now, self.iteration
                if validating:
                    paused = time.monotonic()
                    with (
                        self._saved_if_lost(),
                        self._shown_as(bar, "validating"),
                    ):
                        self._validate(last=last)
                    window_start += time.monotonic() - paused
                stopping = stopping or self._interrupted()
                if stopping:  # in all processes
                    self._look_for_failures()
                if saving or stopping:
                    self.save(LAST)
        missing = any(run.writes and not (run.folder / LAST).exists() for run in self._living())
        if any(self.world.gathered(missing)):  # killed between best.pt and last.pt of the last iteration
            self.save(LAST)
        self._show_runs()
        ended_early = self.iteration < config.training.iterations or self._validation_is_missing()
        self._end()
        if self.signal is not None and ended_early:
            return 128 + self.signal
        return FAILED if len(self._living()) < len(self.runs) else 0

    def _end(self) -> None:
        """Write the results; raises UsageError in all processes where they cannot be written."""
        with self.world.together():
            for run in self.runs if not self._validation_is_missing() else ():
                run.end(classification=self.distribution.classification)

    # ---- numbers that are not finite ----------------------------------------------------------

    def _living(self) -> list[Run]:
        """The runs that have not failed."""
        return [run for run in self.runs if run.failure is None]

    def _look_for_failures(self) -> None:
        """Ends the runs that stand still since their numbers are not finite: saves them, says why.

        Done only where the device is waited for anyway.
        """
        if self.config.training.on_nan != "stop":
            return
        for run, state in zip(self.runs, self._states(), strict=True):
            if run.failure is None and not math.isfinite(state.sums[-1].item()):
                self._fail(run, state)

    def _fail(self, run: Run, state: State) -> None:
        good = int(state.iteration)
        run.iteration, run.parameters = good, self.layout.unflatten(state.parameters)
        run.progress.window_size = self.window_size - (self.iteration - good)
        run.failure = divergence.UNKNOWN
        self._write(LAST, [(run, state)])
        run.failure = f"{run.folder.name}, iteration {good + 1:,}: {self._cause(run, good)}"
        if run.writes:
            run.log.text("failure", run.failure, good)
        if len(self.runs) > 1:
            self._say(f"{run.failure} (saved before it; the other runs go on)")

    def _cause(self, run: Run, good: int) -> str:
        """What is wrong with the numbers of the iteration after the last good one, in words."""
        step, found = self.plain_step, None
        # it is saved, and this is but a hint
        with suppress(Exception), self.maml.at_rate(run.config.choices.inner_lr):
            tasks = step.tasks_of(run.config.training.seed, good)
            found = divergence.cause(step.maml, run.parameters, *tasks, first=step.share.start)
        causes = [each for each in self.world.gathered(found) if each]
        return causes[0] if causes else divergence.UNKNOWN

    @contextmanager
    def _saved_if_lost(self) -> Iterator[None]:
        """Save the state of the last iteration where another process is lost, or memory runs out.

        The work that was interrupted is done by the resumed run.
        """
        try:
            yield
        except LostError:
            self.save(LAST)
            raise
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory() from None

    def _out_of_memory(self) -> UsageError:
        """Save if possible, and say what to lower and how to resume."""
        saved = False
        with suppress(Exception):  # an older checkpoint exists, and something else has to be said
            self.save(LAST)
            saved = True
        tasks = self.maml.tasks_at_once or len(self.plain_step.share)
        run = self.runs[0]
        command = f"the same command with --run-name {run.folder.parent.name} --resume"
        if len(self.runs) == 1:
            command = shlex.join(["--load", str(run.folder / LAST), *own_code_flags(run.config)])
        since = f"iteration {self.iteration:,}" if saved else "the last checkpoint"
        return UsageError(
            f"out of memory at iteration {self.iteration:,} with {tasks} tasks at once: resume from {since} "
            f"with {command} and a smaller --tasks-at-once"
        )

    def _validation_is_missing(self) -> bool:
        """Whether the run was left before the validation of its last iteration."""
        due = (
            self.iteration % self.config.training.val_every == 0
            or self.iteration == self.config.training.iterations
        )
        if not self.iteration or not due:
            return False
        return any(not self._is_validated(run) for run in self._living())

    def _is_validated(self, run: Run) -> bool:
        """At the present iteration."""
        return self.iteration in run.progress.validation.get("iteration", [])[-1:]

    def _stopping(self) -> bool:
        """Whether all processes stop after this iteration, since one has got a signal."""
        if self.world.size == 1:
            return self.signal is not None
        assert self.plain_step.stop_asked is not None
        if not self.stop_asked(self.plain_step.stop_asked):
            return False
        self.signal = max(self.world.gathered(self.signal or 0)) or signal.SIGTERM
        return True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the loop after the iteration at hand; a second one ends at once."""

        def ask_to_stop(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for each in handled:
                signal.signal(each, handled[each])
            if self.shown:  # not print(): the handler may have come in the middle of one
                with suppress(OSError):  # nobody reads it
                    os.write(2, b"\nEnding after this iteration; once more to end at once.\n")

        handled = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        for each in handled:
            signal.signal(each, ask_to_stop)
        try:
            yield
        finally:
            for each, handler in handled.items():
                signal.signal(each, handler)

    # ---- what runs see of it ----------------------------------------------------------------

    def _states(self) -> list[State]:
        """The state of each run."""
        if len(self.runs) == 1:
            return [self.state]
        return [State(*(field[number] for field in self.state)) for number in range(len(self.runs))]

    def _show_runs(self) -> None:
        """Tells each run its iteration, and its meta-parameters as views of the state's."""
        for run, state in zip(self.runs, self._states(), strict=True):
            if run.failure is None:
                run.iteration = self.iteration
                run.parameters = self.layout.unflatten(state.parameters)
                run.progress.window_size = self.window_size

    def _say(self, text: str) -> None:
        if self.shown:
            tqdm.write(text, file=sys.stderr)

    def save(self, name: str, runs: Sequence[Run] | None = None) -> None:
        """Write a checkpoint of these runs, or of all.

        Of several runs, all files are written before the first is renamed. Raises UsageError where the disk
        does not take them; the previous checkpoints are whole then.
        """
        self._show_runs()
        states = zip(self.runs, self._states(), strict=True)
        self._write(name, [(r, s) for r, s in states if r.failure is None and (runs is None or r in runs)])

    def _write(self, name: str, runs: Sequence[tuple[Run, State]]) -> None:
        writers = [
            (run.folder / name, self._checkpoint_of(run, state))
            for run, state in runs
            if run.writes and (run.failure is not None or not math.isinf(state.sums[-1].item()))
        ]
        try:
            for path, _ in writers:
                path.parent.mkdir(parents=True, exist_ok=True)
            for run, _ in runs:  # what a checkpoint has seen is in the event files first
                run.log.flush()
            save_checkpoints(writers)
        except OSError as error:
            raise UsageError(
                f"{error.filename or writers[0][0]}: not saved at iteration {self.iteration:,} "
                f"({reason_of(error)}); the previous checkpoint is whole: free some space and resume from it"
            ) from error

    def _checkpoint_of(self, run: Run, state: State) -> Checkpoint:
        sums = state.sums.tolist()
        if math.isinf(sums[-1]):  # a failed run can be resumed
            sums[-1] = 0.0
        layout = self.statistics_layout
        return run.checkpoint(
            [self.layout.unflatten(moment) for moment in (state.exp_avg, state.exp_avg_sq)],
            layout.unflatten(state.statistics) if layout else {},
            dict(zip(self.metrics, sums, strict=True)),
            self.maml,
            self.distribution,
        )

    # ---- what is shown ----------------------------------------------------------------------

    @contextmanager
    def _shown_as(self, bar: tqdm, doing: str) -> Iterator[None]:
        """The bar says what takes its time meanwhile."""
        before = getattr(bar, "postfix", None)  # a silent bar has none
        bar.set_postfix_str(doing)
        try:
            yield
        finally:
            bar.set_postfix_str(before or "")

    def _window_means(self) -> list[dict[str, float]]:
        """Of each run, since the last point of the curves; the last two as they are."""
        found = []
        for sums in self.state.sums.view(len(self.runs), -1).tolist():
            taken = self.window_size - sums[-2]
            means = [value / taken if taken > 0 else math.nan for value in sums[:-2]]
            found.append(dict(zip(self.metrics, [*means, *sums[-2:]], strict=True)))
        return found

    def _show_progress(self, bar: tqdm) -> None:
        means = [each for each in self._window_means() if math.isfinite(each["last_skipped"])]
        if self.window_size == 0 or not means:
            return

        def of_runs(metric: str, scale: float, digits: int) -> str:
            values = [scale * each[metric] for each in means]
            mean = f"{sum(values) / len(values):.{digits}f}"
            spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            return mean + spread * (len(values) > 1)

        shown = f"query loss {of_runs('query_loss', 1, 4)}"
        if self.distribution.classification:
            shown += f", accuracy {of_runs('query_accuracy', 100, 2)} %"
        bar.set_postfix_str(shown)

    def _log_window(self, rate: float) -> None:
        """A point of the training curves: means since the last one."""
        means = self._window_means()
        standing = self.state.sums[..., -1:].isinf()  # for good: of several runs, those that have failed
        zeros = torch.zeros_like(self.state.sums)
        self.state = self.state._replace(sums=torch.where(standing, torch.inf, zeros))
        self.window_size = 0
        self._show_runs()
        for run, values in zip(self.runs, means, strict=True):
            if run.failure is not None:
                continue
            config = run.config
            meta_lr = meta_lr_at(
                config.training.meta_lr_schedule, torch.tensor(self.iteration - 1), config.training.meta_lr,
                config.training.meta_lr_final, config.training.iterations, torch.float64,
            )  # fmt: skip
            run.add_training(values, rate, float(meta_lr))

    # ---- validation -------------------------------------------------------------------------

    def _validate(self, *, last: bool) -> None:
        """After the trained number of steps; saves best.pt, and draws at 1, 4, 16, ... validations.

        A signal to a process on its own ends it; the run makes up for it when it goes on.
        """
        with suppress(InterruptedError):
            self._validate_all(last=last)

    def _interrupted(self) -> bool:
        return self.world.size == 1 and self.signal is not None

    def _validate_all(self, *, last: bool) -> None:
        self._show_runs()
        number = self.iteration // self.config.training.val_every
        for run in self._living():
            if self._is_validated(run):
                continue
            with self.maml.at_rate(run.config.choices.inner_lr):
                evaluation = self._evaluated(run, VALIDATION_TASKS, self.world)
                if run.add_validation(evaluation):
                    self.save(BEST, [run])
                if last or _is_power_of_four(number):
                    run.draw_examples(self.maml, self.distribution)

    def _evaluated(self, run: Run, tasks: int, world: World) -> Evaluation:
        config = run.config
        return evaluate(
            self.maml,
            run.parameters,
            self.distribution,
            "validation",
            tasks=tasks,
            steps=config.choices.trained_steps,
            normalisations=(config.choices.query_norm,),
            inner_batch=config.evaluation.eval_inner_batch,
            world=world,
            interrupted=self._interrupted,
        )
