#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Gradient-based meta-learning (MAML) from the command line.

    python main.py                                          # the paper's sinusoid
    python main.py --dataset omniglot -n 5 -k 1             # 5-way 1-shot Omniglot
    python main.py --dataset images:FOLDER --learner torchvision:resnet18
    python main.py --load checkpoints/RUN/last.pt           # resume a run
    python main.py --eval --load checkpoints/RUN            # measure it on test tasks
    python main.py --compare checkpoints/RUN checkpoints/OTHER      # learning curves, paired differences
    python main.py --adapt FOLDER --load checkpoints/RUN    # adapt it to a task of your own
    python main.py --list                                   # all runs, with their results
    tensorboard --logdir checkpoints

Flags are parsed and checked before PyTorch is imported. `--help` shows the usual ones, `--help-all` all.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.call import Call, check_call
from commands.members import list_members
from commands.parser import parse
from commands.resolve import resolve
from commands.settings import add_lines, render_settings
from common.errors import AgreedError, LostError, UsageError, explain, show_warnings

if TYPE_CHECKING:
    from common.processes import World

JOB = os.environ if "MASTER_ADDR" in os.environ else {}  # torchrun's
RANK, LOCAL_RANK = int(JOB.get("RANK", 0)), int(JOB.get("LOCAL_RANK", 0))  # in the job, and on this machine
PATIENCE = 30.0  # seconds: torchrun ends the other processes once the first has printed the error and ended


def main(arguments: list[str]) -> int:
    """Run a command line; return 0, or 2: bad input, 3: lost process, 4: non-finite numbers, 130: Ctrl+C."""
    show_warnings(silent=RANK > 0)
    # how long threads spin for each other before they sleep: PyTorch's OpenMP takes milliseconds, which
    # beside other work made iterations many times as long (docs/speed.md)
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    if RANK:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    try:
        return run(arguments)
    except (UsageError, OSError, MemoryError, RuntimeError) as error:
        text = None if isinstance(error, BrokenPipeError) else explain(error)
        if text is None:
            raise
        if isinstance(error, AgreedError) and LOCAL_RANK:
            time.sleep(PATIENCE)
        else:
            process = f"process {RANK}: " if RANK else ""
            print(f"main.py: error: {process}{text}", file=sys.stderr)
        return 2
    except LostError as error:
        lost = f"another process of the job has ended or does not answer ({error})"
        print(f"main.py: error: {lost}; resume with --resume, or --load", file=sys.stderr, flush=True)
        os._exit(3)  # Python would wait for what is under way between processes
    except KeyboardInterrupt:
        if not RANK:
            print("\nmain.py: interrupted", file=sys.stderr)
        return 130


def run(arguments: list[str]) -> int:
    """Parse and run one command line; errors propagate to `main`."""
    flags, command = {}, shlex.join(["main.py", *arguments])
    try:
        flags = parse(arguments)
        call = check_call(flags)
        if call.seeds or call.sweep:  # mistakes answer before PyTorch is imported
            list_members(call, flags)
        elif not (call.load or call.resume or call.compare):
            config = resolve(flags)
            if call.print_config:
                print(render_settings(command, flags, config), end="")
                return 0
        from commands.build import join_job

        call, world = join_job(call)
    except UsageError as error:  # in all processes alike
        raise AgreedError(add_lines(str(error), flags)) from error
    return dispatch(call, flags, command, world)


def dispatch(call: Call, flags: Mapping[str, Any], command: str, world: World) -> int:
    """Call the command that the flags ask for; return its exit code."""
    from commands import adapt, baselines, compare, evaluate, network, runs, sweep, train

    if call.list_runs:
        runs.list_runs(call)
    elif call.adapt:
        adapt.adapt(call, flags, command)
    elif call.save_weights:
        network.give_initialisation(call)
    elif call.compare:
        compare.compare(call, flags, command)
    elif call.baselines:
        return baselines.baselines(call, flags, command, world)
    elif call.eval:
        evaluate.measure_runs(call, flags, command, world)
    elif call.seeds or call.sweep:
        return sweep.sweep(call, flags, command, world)
    else:
        return train.train(call, flags, command, world)
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # a Windows console cannot write every character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads the output any more, as in `main.py --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    if JOB:  # threads between processes may outlive Python, and abort
        os._exit(code)
    sys.exit(code)
