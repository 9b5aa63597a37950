"""The outer loop: step, log, validate, save.

An iteration is a function of the state (step.py), of one run or of several at once; what belongs to one run
alone is in run.py. Metrics stay on the device and are summed there. They are read when a point of a curve is
due or the progress bar is redrawn, so that no iteration waits for the device.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace

import torch
from torch import Tensor
from tqdm import tqdm

from common.batch import TaskDistribution
from common.errors import LostError, UsageError, describe_os_error, fold_message, is_out_of_memory
from common.processes import ALONE, World
from maml import MAML
from training import nonfinite
from training.adjoint import run_as_is
from training.checkpoint import Checkpoint, save_checkpoints
from training.compiler import CompilationError, Compiler
from training.folders import BEST, LAST
from training.options import TrainingOptions
from training.progress import ProgressBar
from training.run import Run
from training.step import LABELLED, TAIL, CudaGraph, FlatLayout, MetaStep, State, meta_lr_at, name_metrics
from training.stopping import StopRequest

PICTURED = [4**power for power in range(20)]  # validations whose tasks are drawn
REDRAW_SECONDS = 0.5 if sys.stderr.isatty() else 30.0  # a file keeps what a terminal overwrites
SAVE_SECONDS = 600.0  # last.pt is saved at least so often
UNCOMPILED = {False: 100, True: 3}  # iterations first, by `classification`: they show that the run works
# relative difference of two meta-gradients that are the same to rounding, by precision
SAME = {"float64": 1e-6, "float32": 0.05, "tf32": 0.2, "bf16-products": 0.5, "bf16": 0.5}
TRIES = 3  # meta-batches of which one must agree: rounding sends a ReLU to the other side of 0 in some
FAILED = 4  # exit code of a run that stopped because its numbers became non-finite
# settings in which runs that are trained at once may differ
AT_ONCE = ("seed", "inner_lr", "meta_lr", "meta_lr_final", "grad_clip", "grad_clip_norm")


class Trainer:
    """Meta-train a run in its folder, or several at once, each in its own.

    Args:
        runs: at the same iteration, with settings that differ in `AT_ONCE` alone.
        training_tasks, validation_tasks: one distribution; numbers of support examples may differ.
        world: the processes that share the tasks of an iteration.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        maml: MAML,
        training_tasks: TaskDistribution,
        validation_tasks: TaskDistribution,
        compiler: Compiler,
        world: World = ALONE,
        *,
        show: bool = True,
    ) -> None:
        self.runs, self.maml, self.compiler, self.world = list(runs), maml, compiler, world
        self.training_tasks, self.validation_tasks = training_tasks, validation_tasks
        self.show = show and world.first
        self.stop = StopRequest(world, show=self.show)
        compiler.interrupted = lambda: self.stop.signal is not None
        self.predictor = maml  # of validation
        options = runs[0].training
        if options.compile == "on" and options.convolution == "im2col":  # slow unless compiled
            always = copy.copy(compiler)  # a resumed run validates before it compiles its step
            always.active = True
            self.predictor = maml.with_options(accelerate=always.or_plain)
        self.metrics = name_metrics(runs[0].reading)
        self.iteration = self.begun = runs[0].iteration
        self.window_size = runs[0].progress.window_size  # iterations since the last point of the curves
        self.plain_step = self._build_step()
        self.meta_step: MetaStep | CudaGraph = self.plain_step
        states = [self._initial_state(run) for run in runs]
        self.state = State(*map(torch.stack, zip(*states, strict=True))) if len(runs) > 1 else states[0]
        self._update_runs()
        self.bar, self.metrics_text = ProgressBar(disable=True), ""  # the text that it shows
        self.uncompiled = UNCOMPILED[training_tasks.classification]
        self.saved_at = time.monotonic()

    @property
    def options(self) -> TrainingOptions:
        """Return the first run's options; the others' differ in `AT_ONCE` alone."""
        return self.runs[0].training

    def _initial_state(self, run: Run) -> State:
        """Return the state in which a run begins or resumes."""
        layout, statistics, start = self.plain_step.layout, self.plain_step.statistics_layout, run.start
        vector = layout.flatten(run.parameters)
        first, second = torch.zeros_like(vector), torch.zeros_like(vector)
        if start:
            first, second = (layout.flatten(m).to(vector) for m in (start.exp_avg, start.exp_avg_sq))
        running = statistics.flatten(start.statistics if start else self.maml.initial_statistics()).to(vector)
        updated = run.iteration if not start or start.updates is None else start.updates
        iteration, updates = (torch.tensor(n, device=vector.device) for n in (run.iteration, updated))
        window = {LABELLED: float(run.progress.window_size)} | run.progress.window  # of an older version
        sums = vector.new_tensor([window.get(name, 0.0) for name in self.metrics])
        return State(vector, first, second, iteration, updates, sums, running)

    # ---- the loop ---------------------------------------------------------------------------

    def train(self) -> int:
        """Train, save and write the results; return the exit code: 0, `FAILED`, or 128 + signal."""
        try:
            for run in self.runs:
                run.begin()
            self._show_loop()
            return self._end()
        finally:
            for run in self.runs:
                with suppress(OSError):  # what ended the run matters more
                    run.log.close()

    def _show_loop(self) -> None:
        """Run the loop with its progress bar; save the state where memory runs out or a process is lost."""
        total = self.options.iterations
        bar = ProgressBar(total=total, initial=self.begun, mininterval=REDRAW_SECONDS, disable=not self.show)
        with bar as self.bar, self.stop.catch_signals():
            if self.options.compile == "off" or self.uncompiled >= total:
                bar.begin_rate()
                if self.options.compile == "on":
                    self._say(f"Not compiled: the first {self.uncompiled} iterations of a run never are")
            try:
                self._loop()
            except (LostError, MemoryError, RuntimeError) as error:
                if isinstance(error, LostError) or is_out_of_memory(error):
                    with suppress(Exception):  # the last checkpoint is whole, and the error matters more
                        self.save(LAST)
                        self._say(f"Saved at iteration {self.iteration:,}")
                raise

    def _loop(self) -> None:
        options = self.options
        self.window_start, self.window_first = time.monotonic(), self.iteration
        if self._list_runs_to_validate():  # stopped before that
            self._validate()
            self.save(LAST)  # or it would be logged again
        while self.iteration < options.iterations and self._list_living_runs() and not self.stop.now:
            if not self._prepare_step():
                break  # a signal
            self.step()
            self._redraw()
            self.stop.ask_others(self.plain_step.stop_asked, self.iteration)
            log = self.iteration % self.runs[0].log_every == 0
            validate = bool(self._list_runs_to_validate())
            save = self.iteration % options.save_every == 0
            late = self.world.first and time.monotonic() - self.saved_at > SAVE_SECONDS  # it alone writes
            if log or validate or save:
                self._stop_failed_runs()
            if log:
                self._log()
            if validate:
                self._validate()
            if save or late:
                self.save(LAST)
        self._stop_failed_runs()
        self.save(LAST)

    def step(self) -> None:
        self.plain_step.stop = self.stop.signal is not None
        self.state = self.meta_step(self.state, self.iteration)
        self.iteration += 1
        self.window_size += 1

    def _list_runs_to_validate(self) -> list[Run]:
        """Return the runs whose validation of the present iteration is to be done, or was interrupted."""
        due = self.iteration == self.options.iterations or self.iteration % self.options.val_every == 0
        return [run for run in self._list_living_runs() if due and run.last_validation != self.iteration]

    def _end(self) -> int:
        """Write the results, and return the exit code."""
        self._update_runs()
        missing = bool(self._list_runs_to_validate())
        for run in self._list_living_runs():
            run.skipped += int(run.state.sums[-2])  # since the last point of its curves
            if run.skipped >= (done := self.iteration - self.begun) > 0 and self.stop.signal is None:
                run.failure = f"all {done:,} iterations were skipped: {self._find_cause(run)}"
        with self.world.together():
            for run in self.runs:
                if run.writes and not missing:
                    run.end()
        if self.stop.signal is not None and (missing or self.iteration < self.options.iterations):
            return 128 + self.stop.signal
        return FAILED if len(self._list_living_runs()) < len(self.runs) else 0

    # ---- the step, and its compilation ------------------------------------------------------

    def _build_step(self) -> MetaStep:
        """Build the coming iteration: first order up to `exact_from`, if it is exact at all."""
        first_order = self.iteration < self.options.exact_from
        return MetaStep(
            self.maml.with_options(meta_gradient="first-order") if first_order else self.maml,
            self.training_tasks,
            self.options,
            self._collect_member_tensors(),
            world=self.world,
            accelerate=self.compiler if self.options.compile == "on" else run_as_is,
        )

    def _collect_member_tensors(self) -> dict[str, Tensor]:
        """Return the numbers in which the runs differ, `[runs]`, by name; the seed of a single run."""
        like = next(iter(self.runs[0].parameters.values()))
        seeds = torch.tensor([run.training.seed for run in self.runs], device=like.device)
        tensors = {"seed": seeds if len(self.runs) > 1 else seeds[0]}
        learned = self.runs[0].choices.inner_rates != "fixed"
        for name in AT_ONCE[1:]:
            values = [getattr(r.choices if name == "inner_lr" else r.training, name) for r in self.runs]
            if len(set(values)) > 1 and not (learned and name == "inner_lr"):
                tensors[name] = like.new_tensor(values)
        return tensors

    def _prepare_step(self) -> bool:
        """Rebuild or compile the step if that is due; return False if a signal interrupted it."""
        if self.iteration and self.iteration == self.options.exact_from:
            self.meta_step = self.plain_step = self._build_step()
            self.compiler.active = False  # the exact step is another function
        if self.options.compile != "on" or self.compiler.active:
            return True
        # whatever --iterations, so that a longer run repeats the bits of a shorter one
        if self.iteration < self.uncompiled:
            return True
        proceeds = self._compile()
        self.bar.begin_rate()
        return proceeds

    def _compile(self) -> bool:
        """Compile the step by rehearsing it, or say why it stays uncompiled; return False after a signal."""
        begin, compiled = time.monotonic(), self.compiler.compiled
        self.bar.set_postfix_str("compiling")
        failure, right = None, torch.tensor(False)
        try:
            for ahead in range(TRIES):
                with self.stop.cut_short():
                    errors, same = self._compare(ahead)
                right = right | same
                if right.all() or self.stop.signal:
                    break
            if not right.all():
                failure = f"compiled, an iteration is {errors.max():.1%} off"
        except (CompilationError, InterruptedError) as error:
            failure = f"{error}" or "interrupted"
        self._leave_out(begin)
        failures, signals = zip(*self.world.gather((failure, self.stop.signal)), strict=True)
        if any(failures):  # all processes compute alike
            self.compiler.active = False
            self.stop.signal = next(filter(None, signals), None)
            if self.stop.signal:
                return False
            self._stay_uncompiled()
            self._say(f"The run stays uncompiled: {next(filter(None, failures))}")
            return True
        done = "Compiled" if self.compiler.compiled > compiled else "Found compiled code"
        self._say(f"{done} in {time.monotonic() - begin:.1f} s")
        if self.state.parameters.is_cuda and not self.training_tasks.on_host and self.world.size == 1:
            try:
                self.meta_step = CudaGraph(self.plain_step, self.state)
            except RuntimeError as error:
                reason = fold_message(error)
                self._say(f"Not recorded as a CUDA graph, kernels are launched one by one: {reason}")
        return True

    def _compare(self, ahead: int) -> tuple[Tensor, Tensor]:
        """Return how far off each run compiled is on the tasks of a coming iteration, and if it is right."""
        coming, number = self.state._replace(iteration=self.state.iteration + ahead), self.iteration + ahead
        self.compiler.active = False
        uncompiled = self.plain_step(coming, number, alone=True)
        self.compiler.active = True
        compiled = self.plain_step(coming, number, alone=True)
        part = "exp_avg" if self.options.meta_optimizer == "adam" else "parameters"  # moved by the gradient
        before, right, new = (getattr(state, part) for state in (self.state, uncompiled, compiled))
        errors = (new - right).norm(dim=-1) / (right - before).norm(dim=-1)
        return errors, (errors <= SAME[self.options.precision]) | torch.eq(new, right).all(-1)

    def _stay_uncompiled(self) -> None:
        """Continue with what is fastest uncompiled, also when the run is resumed."""
        for run in self.runs:
            run.training = replace(run.training, compile="off", convolution="grouped")
        self.maml = self.predictor = self.maml.with_options(convolution="grouped")
        self.meta_step = self.plain_step = self._build_step()

    # ---- non-finite numbers -----------------------------------------------------------------

    def _list_living_runs(self) -> list[Run]:
        return [run for run in self.runs if run.failure is None]

    def _stop_failed_runs(self) -> None:
        """End the runs that have become non-finite: save their last good state, and say why.

        They have stood still since. This waits for the device; all processes call it together.
        """
        if self.options.on_nan == "stop":
            self._update_runs()
            for run in self._list_living_runs():
                if run.is_non_finite:
                    self._fail(run)

    def _fail(self, run: Run) -> None:
        """End a run at its last good iteration."""
        run.progress.window_size -= self.iteration - int(run.state.iteration)
        run.iteration, sums = int(run.state.iteration), run.state.sums
        run.state = run.state._replace(sums=torch.where(sums.isinf(), 0.0, sums))  # so that it can resume
        run.failure = nonfinite.UNKNOWN
        self.save(LAST, [run])
        run.failure = f"{run.folder.name}, iteration {run.iteration + 1:,}: {self._find_cause(run)}"
        run.log.add({"failure": run.failure}, run.iteration)
        if len(self.runs) > 1:
            self._say(f"{run.failure} (saved before it; the other runs continue)")

    def _find_cause(self, run: Run) -> str:
        """Return why a run's next iteration is non-finite, in words; all processes call it together."""
        step, cause = self.plain_step, None
        with suppress(Exception), self.maml.use_rate(run.choices.inner_lr):  # a hint: it may fail
            tasks = step.sample_tasks(run.training.seed, run.iteration)
            cause = nonfinite.find_cause(step.maml, run.parameters, *tasks, first=step.share.start)
        return next(filter(None, self.world.gather(cause)), nonfinite.UNKNOWN)

    # ---- saving -----------------------------------------------------------------------------

    def _update_runs(self) -> None:
        """Give each run that has not failed the present iteration, and its part of the state as views."""
        several = len(self.runs) > 1
        for number, run in enumerate(self.runs):
            if run.failure is None:
                run.state = State(*(part[number] for part in self.state)) if several else self.state
                run.parameters = self.plain_step.layout.unflatten(run.state.parameters)
                run.iteration, run.progress.window_size = self.iteration, self.window_size

    def save(self, name: str, runs: Sequence[Run] | None = None) -> None:
        """Write a checkpoint of these runs, or of all that have not failed; UsageError if that fails."""
        self._update_runs()
        # a run that has just become non-finite keeps its last checkpoint until `_fail`
        chosen = [run for run in runs or self._list_living_runs() if run.writes and not run.is_non_finite]
        try:
            for run in chosen:
                run.log.sync()  # the points that a checkpoint has seen are on the disk before it
            save_checkpoints({run.folder / name: self._checkpoint_of(run) for run in chosen})
        except OSError as error:
            file, reason = error.filename or chosen[0].folder / name, describe_os_error(error)
            raise UsageError(f"{file}: not saved ({reason}): free some space, and resume") from error
        if name == LAST:
            self.saved_at = time.monotonic()

    def _checkpoint_of(self, run: Run) -> Checkpoint:
        def names(layout: FlatLayout, vector: Tensor) -> dict[str, Tensor]:
            # a view would be saved together with the whole vector behind it
            return {name: part.clone() for name, part in layout.unflatten(vector).items()}

        step, state = self.plain_step, run.state
        run.progress.window = dict(zip(self.metrics, state.sums.tolist(), strict=True))
        return Checkpoint(
            settings={**run.settings, **vars(run.training)},
            iteration=run.iteration,
            updates=int(state.updates),
            parameters=names(step.layout, state.parameters),
            exp_avg=names(step.layout, state.exp_avg),
            exp_avg_sq=names(step.layout, state.exp_avg_sq),
            progress=asdict(run.progress),
            statistics=names(step.statistics_layout, state.statistics),
            fixed={name: tensor.cpu().contiguous() for name, tensor in self.maml.call.fixed.items()},
            **vars(self.validation_tasks.record),
            scales=dict(self.validation_tasks.scales),
            computed_by=run.computed_by,
        )

    # ---- metrics ----------------------------------------------------------------------------

    def _window_means(self) -> list[dict[str, float]]:
        """Return each run's means since the last point of the curves; `TAIL` as it is."""
        means = []
        for sums in self.state.sums.view(len(self.runs), -1).tolist():
            totals = dict(zip(self.metrics, sums, strict=True))
            tail = {name: totals.pop(name) for name in TAIL}
            count = self.window_size - tail["skipped"]
            counts = dict.fromkeys(totals, count) | {"query_accuracy": totals.pop(LABELLED, count)}
            means.append({n: t / counts[n] if counts[n] > 0 else math.nan for n, t in totals.items()} | tail)
        return means

    def _log(self) -> None:
        """Add a point to the training curves."""
        now = time.monotonic()
        rate = (self.iteration - self.window_first) / (now - self.window_start)
        self.window_start, self.window_first = now, self.iteration
        means = self._window_means()
        self._set_text(means)
        failed = self.state.sums[..., -1:].isinf()  # for good: of several runs, some may have failed
        sums = torch.where(failed, torch.inf, torch.zeros_like(self.state.sums))
        self.state = self.state._replace(sums=sums)
        self.window_size = 0
        self._update_runs()
        done = torch.tensor(self.iteration - 1, dtype=torch.float64)
        rates = torch.as_tensor(meta_lr_at(self.options, self.plain_step.members, done))
        lrs = rates.expand(len(self.runs)).tolist()
        for run, values, lr in zip(self.runs, means, lrs, strict=True):
            if run.failure is None:
                run.add_training(values, rate, lr)

    def _redraw(self) -> None:
        """Move the progress bar on; when it is due to be drawn, read the metrics."""
        if self.bar.update():
            self._set_text(self._window_means())
            self.bar.refresh()

    def _set_text(self, means: Sequence[Mapping[str, float]]) -> None:
        """Set the means over all runs behind the progress bar, which shows them when it is drawn next."""
        if going := [values for values in means if math.isfinite(values["last_skipped"])]:
            shown = [name for name in going[0] if name.startswith("query")]
            texts = (f"{n.replace('_', ' ')} {sum(m[n] for m in going) / len(going):.4f}" for n in shown)
            self.metrics_text = ", ".join(texts)
            self.bar.set_postfix_str(self.metrics_text, refresh=False)

    def _leave_out(self, begin: float) -> None:
        """Leave the time since `begin` out of the speed in the curves."""
        self.window_start += time.monotonic() - begin

    def _say(self, text: str) -> None:
        if self.show:
            tqdm.write(text, file=sys.stderr)

    # ---- validation -------------------------------------------------------------------------

    def _validate(self) -> None:
        """Measure the validation tasks, save best.pt, and draw some tasks now and then.

        A signal to a process on its own ends the validation; the resumed run does it again.
        """
        begin, tasks = time.monotonic(), self.validation_tasks
        number, last = self.iteration // self.options.val_every, self.iteration == self.options.iterations
        self._update_runs()
        self.bar.set_postfix_str("validating")
        with suppress(InterruptedError):
            for run in self._list_runs_to_validate():
                lr = run.choices.inner_lr
                with self.maml.use_rate(lr), self.predictor.use_rate(lr):
                    if run.validate(self.predictor, tasks, self.world, self.stop.is_local):
                        self.save(BEST, [run])
                    if run.writes and (last or number in PICTURED):
                        run.draw_examples(self.maml, tasks)
        self._leave_out(begin)
        self.bar.set_postfix_str(self.metrics_text)
