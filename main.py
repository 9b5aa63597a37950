#!/usr/bin/env python3
"""Gradient-based meta-learning (MAML) from the command line.

    python main.py                                          # the paper's sinusoid
    python main.py --dataset omniglot -n 5 -k 1             # 5-way 1-shot Omniglot
    python main.py --first-order --meta-batch-size 1 --samples 50 --iterations 40000
    python main.py --load checkpoints/RUN/last.pt           # go on with a run
    python main.py --algorithm meta-sgd                     # another of the family, or choice by choice
    python main.py --eval --load checkpoints/RUN/best.pt    # measure it on the test tasks
    python main.py --compare checkpoints/RUN checkpoints/OTHER      # learning curves, paired differences
    python main.py --adapt FOLDER --load checkpoints/RUN/best.pt    # adapt it to a task of one's own
    python main.py --dataset images:FOLDER --learner torchvision:resnet18
    tensorboard --logdir checkpoints

Every flag is declared in config.py and shown by --help.
"""

from __future__ import annotations

import atexit
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from commands.call import Call, check_call
from commands.members import Member, members_of
from commands.parser import parse
from commands.resolve import resolve
from common.errors import (
    AgreedError,
    LostError,
    UsageError,
    describe_os_error,
    for_terminal,
    is_out_of_memory,
    one_line,
)
from tasks.options import CURVES

if TYPE_CHECKING:
    from commands.measuring import Subject
    from common.batch import TaskDistribution
    from common.device import Runtime
    from common.processes import World
    from evaluation.meta_test import Evaluation
    from training.folders import SavedRun
    from training.run import Run


# of those that torchrun has started
FIRST_PROCESS = os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ
FIRST_ON_MACHINE = os.environ.get("LOCAL_RANK", "0") == "0" or "MASTER_ADDR" not in os.environ
BEFORE_MEETING = 30.0  # seconds by which the first process may be the later one
PREPARING, A_YEAR = 120.0, 60.0 * 24 * 365  # in minutes


def main(arguments: list[str]) -> int:
    """Runs one command line; the exit code: 0, 2 for bad input, 3 where another process of the job is lost,
    4 where numbers that are not finite ended training, 128 + signal where a signal did."""
    if not FIRST_PROCESS:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (to the end of the process)
    try:
        return command(arguments)
    except BrokenPipeError:  # nobody reads the output any more
        return 141
    except (UsageError, OSError, MemoryError, RuntimeError) as error:
        text = _said_of(error)
        if text is None:
            raise
        if FIRST_PROCESS:
            print(f"main.py: error: {text}", file=sys.stderr)
        elif isinstance(error, AgreedError):
            time.sleep(error.seconds)  # torchrun ends all where one has ended
        else:
            print(f"main.py: error: process {os.environ['RANK']}: {text}", file=sys.stderr)
        return 2
    except LostError as error:
        print(
            f"main.py: error: another process of the job has ended or does not answer ({error}); the run "
            "goes on from its last checkpoint with --resume, or --load",
            file=sys.stderr,
            flush=True,
        )
        os._exit(3)  # what is still under way between processes would be waited for
    except KeyboardInterrupt:
        if FIRST_PROCESS:
            print("\nmain.py: interrupted", file=sys.stderr)
        return 130


def check_current_folder() -> None:
    """Raises UsageError where it has been deleted: a library of PyTorch's would end the process."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the current folder is not there any more: cd into one that is") from error


def _said_of(error: BaseException) -> str | None:
    """What is said of an error that ends the command; None: it is this tool's own."""
    if "torch" in sys.modules:
        from common.device import not_deterministic

        text = not_deterministic(error)
        if text is not None:
            return for_terminal(text)
    if is_out_of_memory(error):
        return (
            "out of memory: lower --tasks-at-once, take smaller tasks (-q, -k, --image-size) or a smaller "
            "--learner, or another --device"
        )
    if isinstance(error, OSError):
        return for_terminal(describe_os_error(error))
    return for_terminal(one_line(error)) if isinstance(error, UsageError) else None


def command(arguments: list[str]) -> int:
    """The same, with errors raised."""
    try:
        given = parse(arguments)
        call = check_call(given)
        # mistakes answer before PyTorch is imported
        members = members_of(call, given)
        if call.load is None and not call.resume and not members and not call.compare:
            resolve(given)

        check_current_folder()
        from common.device import device_of
        from common.processes import join, leave, read_world
        from training.folders import BEST, LAST, find_checkpoint

        names = (BEST, LAST) if call.eval or call.adapt else (LAST, BEST)
        call = replace(
            call,
            load=call.load and find_checkpoint(call.load, *names),
            init_from=call.init_from and find_checkpoint(call.init_from, BEST, LAST),
        )
        world = read_world()
        if world.size > 1 and (call.adapt is not None or call.compare):
            name = "--compare" if call.compare else "--adapt"
            raise UsageError(f"{name} is for one process: start it without torchrun")
        device = device_of(call.device, world)
    except UsageError as error:
        if FIRST_ON_MACHINE:
            raise
        agreed = AgreedError(str(error))
        agreed.seconds = BEFORE_MEETING
        raise agreed from error
    if world.size > 1:
        # processes with runs of their own meet at the end, whenever that is
        words_timeout = A_YEAR if members else max(PREPARING, call.timeout)
        world = join(world, device, call.timeout, words_timeout)
    if members:
        code = train_many(call, members, world)
    elif call.adapt is not None:
        code = adapt(call, given, arguments)
    elif call.compare:
        code = compare_runs(call, given, arguments)
    else:
        code = evaluate(call, given, arguments, world) if call.eval else train(call, given, world)
    leave()
    return code


# ---- training -------------------------------------------------------------------------------


def train(call: Call, given: Mapping[str, Any], world: World) -> int:
    """A new run, or one that goes on (--load, --resume); its folder is locked from before its checkpoint is
    read until its results are written."""
    with ExitStack() as locked:
        return train_locked(call, given, world, locked)


def train_locked(call: Call, given: Mapping[str, Any], world: World, locked: ExitStack) -> int:
    """The same; `locked` is what keeps the folder for this process."""
    from commands.beginning import beginning, folder_named, fresh_folder, saved_parameters
    from commands.build import (
        build,
        check_processes,
        check_splits,
        facts,
        fitted,
        make_run,
        no_empty_folder_left,
        own_code_flags,
        prepare,
        print_difference,
        print_settings,
        read_first,
        tried,
        writable,
    )
    from learner import LEARNERS
    from learners.losses import LOSSES
    from training.checkpoint import check_same_split
    from training.compiler import Compiler
    from training.folders import LAST, lock_folder
    from training.trainer import Trainer

    with world.together():
        if world.first and (named := folder_named(call)):
            locked.enter_context(no_empty_folder_left(named))
            locked.enter_context(lock_folder(named))
        at = beginning(call, given)
        runtime = prepare(at.config, call, world)
        config = fitted(at.config, given, runtime, new=at.start is None)
        check_processes(config, runtime)
    world.check_same(facts(config, runtime, at.start))
    if at.finished and at.start is not None:
        iteration = at.start.iteration
        print(f"{at.start_file} is at iteration {iteration:,}: a larger --iterations goes on from there")
        return 0
    home = at.folder or call.checkpoint_path
    with no_empty_folder_left(home) if world.first else nullcontext():
        with world.together():
            if world.first:
                writable(home, "--load" if call.load else "--checkpoint-path")
        # one on each machine fetches and decodes what there is
        with world.together():
            tasks = read_first(config, call, runtime)
        with world.together():
            compiler = Compiler(runtime.device)
            distribution, maml = build(config, call, runtime, saved=at.weights, distribution=tasks)
            if at.start is not None and at.start_file is not None:
                check_same_split(at.start_file, at.start.splits, distribution.split_names)
            check_splits(distribution, config)
            parameters = maml.initial_parameters(config.training.seed)
            if config.learner.learner not in LEARNERS or config.learner.loss not in LOSSES:
                tried(maml, parameters, distribution, config)
            parameters = saved_parameters(at, maml, parameters)
    for name in sorted(parameters):  # initial weights may differ in the last bit between machines
        parameters[name] = world.broadcast(parameters[name].contiguous())
    folder = at.folder or world.from_first(lambda: fresh_folder(call.checkpoint_path, config, locked))
    run = make_run(
        config, folder, parameters, start=at.start, origin=at.origin,
        computed_by=runtime.computed_by(tasks=config.training.tasks_at_once), writes=world.first,
    )  # fmt: skip
    trainer = Trainer(
        [run],
        maml,
        distribution.resized(config.training_shots),
        distribution,
        compiler,
        world,
        resume=shlex.join(["--load", str(folder / LAST), *own_code_flags(config)]),
    )
    doing = f"Going on from iteration {at.start.iteration:,}" if at.start else "Meta-training"
    print_settings(config, runtime, f"{doing} in {folder}")
    if at.start is not None:
        print_difference(at.start.computed_by, run.computed_by)
    code = trainer.train()
    print_end(run, code, world, own_code_flags(config))
    sys.stdout.flush()
    world.wait()  # torchrun ends all where one has ended with a code, and the first may have more to do
    return code


def print_end(run: Run, code: int, world: World, own: list[str]) -> None:
    """How training ended, and what to type next."""
    from training.folders import LAST
    from training.run import final_loss

    final = final_loss(run.progress.training)
    if final is not None:
        span = f"iterations {final['from']:,} to {final['to']:,}"
        print(f"Mean training query loss of {span}: {final['mean']:.4f}")
    launcher = ["python"] if world.size == 1 else ["torchrun", f"--nproc-per-node={world.local_size}"]
    go_on = [*launcher, "main.py", "--load", str(run.folder / LAST), *own]
    if run.skipped:
        print(f"Iterations that were left out, since their numbers were not finite: {run.skipped:,}")
    if run.failure is not None:
        if world.first:
            skipping = shlex.join([*go_on, "--on-nan", "skip"])
            print(
                f"main.py: error: {run.failure}; saved at iteration {run.iteration:,}; to leave such "
                f"iterations out: {skipping}",
                file=sys.stderr,
            )
        return
    if code:
        print(f"Saved at iteration {run.iteration:,}. Go on: {shlex.join(go_on)}")
        return
    print("Curves:   ", shlex.join(["tensorboard", "--logdir", str(run.folder)]))
    file = str(run.best_file or run.folder / LAST)
    print("Test it:  ", shlex.join(["python", "main.py", "--eval", "--load", file, *own]))


def train_many(call: Call, members: Sequence[Member], world: World) -> int:
    """Many runs as one (--seeds, --sweep)."""
    from commands import several
    from commands.build import own_code_flags

    with ExitStack() as locked:
        folder, ending = several.train_many(call, members, world, locked)
    if ending > 128:
        print(f"Saved; the same command with --run-name {folder.name} --resume goes on.")
        return ending
    print("Curves:   ", shlex.join(["tensorboard", "--logdir", str(folder)]))
    code = [] if len(codes := {tuple(own_code_flags(m.config)) for m in members}) > 1 else [*codes.pop()]
    print("Test them:", shlex.join(["python", "main.py", "--eval", "--load", str(folder), *code]))
    return ending


# ---- evaluation -----------------------------------------------------------------------------


def evaluate(call: Call, given: Mapping[str, Any], arguments: list[str], world: World) -> int:
    """Measures a checkpoint, or the fresh initialisation, on the test tasks."""
    from commands.build import check_processes, data_of, facts, prepare, print_settings, read_first, writable
    from commands.measuring import Subject, of_all
    from evaluation.tables import evaluation_table
    from training.folders import find_runs

    with world.together():
        many = find_runs(call.load) if call.load is not None else []
    if many:
        return evaluate_many(many, call, given, arguments, world)
    with world.together():
        subject = Subject.read(call.load, call, given)
        config = subject.config
        runtime = prepare(config, call, world)
        if call.baselines:
            check_processes(config, runtime)
        beside = call.checkpoint_path if call.load is None else call.load.parent
        out = writable(call.out or beside, "--out") if world.first else Path()
    world.check_same(facts(config, runtime, subject.source))
    with world.together():
        known = {data_of(config): read_first(config, call, runtime)}
    with world.together():
        built = subject.built(call, runtime, known)
    print_settings(config, runtime, f"Evaluating {subject.name} on {config.evaluation.eval_tasks} test tasks")
    result = built.measured(runtime)
    print(evaluation_table(result, subject.words))
    file = out / f"{subject.stem(with_run=call.out is not None)}-{of_all([subject])[1]}"
    record = {"command": shlex.join(["main.py", *arguments]), **subject.record(runtime)}
    if world.first:
        *others, last = built.write(result, str(file), record)
        print(f"Written: {file}{', '.join(others)} and {last}")
    if call.baselines:
        return compare(subject, call, runtime, result, Path(f"{file}-baselines"), record)
    return 0


def evaluate_many(
    many: Sequence[SavedRun],
    call: Call,
    given: Mapping[str, Any],
    arguments: list[str],
    world: World,
) -> int:
    """Measures many runs on the same test tasks: mean and spread over seeds, and each by itself."""
    from commands.build import data_of, prepare, print_settings, read_first, writable
    from commands.measuring import Subject, of_all
    from evaluation import seeds as spread
    from evaluation.style import write_figure
    from evaluation.tables import write_json

    assert call.load is not None
    folder = many[0].file.parent.parent
    with world.together():
        if call.baselines:
            raise UsageError("--baselines is measured beside one run: name its checkpoint")
        subjects = [Subject.read(run.file, call, given) for run in many]
        if (
            len({(each.config.evaluation.eval_steps, each.config.evaluation.eval_tasks) for each in subjects})
            > 1
        ):
            raise UsageError(f"{folder}: the runs differ in --eval-steps or --eval-tasks: give both")
        out = writable(call.out or folder, "--out") if world.first else Path()
    configs = [subject.config for subject in subjects]
    tasks = configs[0].evaluation.eval_tasks
    runtime = prepare(configs[0], call, world)
    print_settings(
        configs[0], runtime, f"Evaluating {len(many)} runs in {folder} on {tasks} test tasks", *configs[1:]
    )
    command = {"command": shlex.join(["main.py", *arguments])}
    results: dict[str, list[Evaluation]] = {}
    distributions: dict[Any, TaskDistribution | None] = {}
    with world.together():
        for config in configs:
            if data_of(config) not in distributions:
                distributions[data_of(config)] = read_first(config, call, prepare(config, call, world))
    for run, subject in zip(many, subjects, strict=True):
        runtime = prepare(subject.config, call, world)
        with world.together():
            built = subject.built(call, runtime, distributions)
        result = built.measured(runtime)
        results.setdefault(run.setting or spread.ALL, []).append(result)
        if world.first:
            name = f"{subject.stem(with_run=call.out is not None)}-{of_all([subject])[1]}"
            file = (out if call.out else run.file.parent) / name
            built.write(result, str(file), {**command, **subject.record(runtime)})
    words, stem = of_all(subjects)
    print(spread.test_table(results, words))
    if world.first:
        file = out / stem
        record = {"runs": [vars(run) for run in many], "settings": spread.test_record(results)}
        write_json(Path(f"{file}.json"), {**command, **record})
        write_figure(Path(f"{file}.png"), spread.test_figure(results, words))
    beside = "them" if call.out else "its checkpoint"
    print(f"Written: {out / stem}.json and .png, and those of each run beside {beside}")
    return 0


def compare(
    subject: Subject,
    call: Call,
    runtime: Runtime,
    result: Evaluation,
    file: Path,
    record: dict[str, Any],
) -> int:
    """The checkpoint's result on the test tasks beside those of the baselines (--baselines)."""
    from commands import baselines
    from evaluation import tables as report
    from evaluation.figures import comparison_figure
    from evaluation.seeds import test_table
    from evaluation.style import write_figure

    assert call.load is not None and subject.source is not None
    source, config, words = subject.source, subject.config, subject.words
    try:
        others = baselines.measured(subject.trained, config, call, runtime, call.load.parent / "baselines")
    except baselines.InterruptedBySignalError as interrupted:
        print("Saved; the same command goes on from there.", flush=True)
        runtime.world.wait()  # see `train`
        return interrupted.code
    mine = baselines.Baseline(config.choices.algorithm, "as trained", result)
    norm = config.choices.query_norm
    results = {f"{b.name}, {b.how}": b.evaluation.select(norm) for b in (mine, *others)}
    print("\n" + test_table({name: [evaluation] for name, evaluation in results.items()}, words))
    if not runtime.world.first:
        return 0
    curves: dict[str, tuple[list[int], list[float]]] = {}
    if config.tasks.dataset in CURVES and source.progress["training"]:
        ends, losses = baselines.windows_of(source.progress["training"])
        scratch = baselines.scratch_curve(subject.trained, call, runtime, ends)
        curves = {
            config.choices.algorithm: (ends, losses),
            "from scratch, Adam 0.001, 10 steps": (ends, scratch),
        }
    methods = {b.name: {"how": b.how} | report.evaluation_record(b.evaluation) for b in (mine, *others)}
    report.write_json(
        Path(f"{file}.json"),
        record
        | {
            "methods": methods,
            "curves": {n: dict(zip(("iteration", "query_loss"), c, strict=True)) for n, c in curves.items()},
        },
    )
    figure = comparison_figure(results, words, curves)
    write_figure(Path(f"{file}.png"), figure)
    print(f"Written: {file}.json and .png")
    return 0


def compare_runs(call: Call, given: Mapping[str, Any], arguments: list[str]) -> int:
    """Sets trained runs side by side (--compare)."""
    from commands.compare import compare

    return compare(call, given, shlex.join(["main.py", *arguments]))


# ---- putting it to use ----------------------------------------------------------------------


def adapt(call: Call, given: Mapping[str, Any], arguments: list[str]) -> int:
    """Adapt a checkpoint to the examples of a task of the user's own, and predict the others."""
    from commands.adapt import adapt

    return adapt(call, given, shlex.join(["main.py", *arguments]))


def end(code: int) -> NoReturn:
    """End this process; one of several at once: threads of theirs may outlive Python, and abort."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        drop_unread_output()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def drop_unread_output() -> None:
    """Drop what nobody reads any more, as in `main.py --help | head`: Python would complain at its exit."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    atexit.register(drop_unread_output)
    end(main(sys.argv[1:]))
