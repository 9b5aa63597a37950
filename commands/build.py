"""From settings to the objects that do the work: device, tasks, algorithm. What machine and disk allow."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from commands import config as settings
from commands.call import Call
from commands.config import Config
from commands.resolve import resolve
from common.batch import TaskBatch, TaskDistribution, Tree, arguments_of, first_tensor, tree_map
from common.device import Runtime, device_of, machine_memory, set_up
from common.errors import UsageError, is_out_of_memory
from common.optimizers import Weights
from common.own_code import is_own_code, parse_arguments
from common.processes import ALONE, World
from common.random import keys_of, task_stream
from common.task import Extras
from dataset import build_distribution
from learner import LEARNERS, build_learner, load_factory
from learners.diagnosis import find_failing_layer
from learners.elementary import Elementary
from learners.functional import fixed_tensors
from learners.losses import LOSSES, build_loss
from maml import MAML
from training.checkpoint import Checkpoint
from training.compiler import cpp_compiler
from training.meta_gradients import MetaGradientOf
from training.run import Run

# Numbers by which a learner may exceed four times what a checkpoint has, and what the least tensor counts as
FREE_SIZE, LEAST_SIZE = 2**24, 10_000
LEAST_NUMBERS = 10  # of an example, in a learner's layers


def prepare(config: Config, call: Call, world: World = ALONE) -> Runtime:
    """The device, or a refusal."""
    runtime = set_up(
        device_of(call.device, world), config.training.precision, small_tensors=config.learner.learner == "mlp",
        threads=call.threads, world=world, deterministic=call.deterministic,
    )  # fmt: skip
    if runtime.device.type == "cpu":
        check_memory(config, world.size, testing=bool(call.eval or call.adapt or call.compare))
    return runtime


def check_memory(config: Config, processes: int, *, testing: bool) -> None:
    """Raises UsageError where the least that has to be in this machine's memory has no room there: a file may
    say any size, and a kernel that runs out of memory ends the process without a word."""
    pixels = (
        config.tasks.channels * config.tasks.image_size**2
        if config.tasks.channels and config.tasks.image_size
        else 0
    )
    shots = config.tasks.shots if testing else config.training_shots
    examples = (config.tasks.ways or 1) * (shots + config.tasks.queries)
    tasks = 1 if testing else -(-config.training.meta_batch_size // processes)
    sizes = ["-k", "-q", *["--meta-batch-size"] * (not testing), *["--image-size"] * bool(pixels)]
    least = [
        (f"{tasks:,} tasks of {examples:,} examples", 4 * tasks * examples * (pixels + LEAST_NUMBERS), sizes),
    ]
    if testing:
        results = f"the results of {config.evaluation.eval_tasks:,} tasks after {config.evaluation.eval_steps:,} steps"
        size = 8 * config.evaluation.eval_tasks * (config.evaluation.eval_steps + 1)
        least.append((results, size, ["--eval-tasks", "--eval-steps"]))
    there = machine_memory()
    for what, needed, flags in least:
        if there is not None and needed > there:
            raise UsageError(
                f"{what} take {needed / 2**30:,.0f} GiB at the least, and there are {there / 2**30:,.0f} GiB "
                f"of memory: lower {' or '.join(flags)}"
            )


def build(
    config: Config,
    call: Call,
    runtime: Runtime,
    *,
    saved: Checkpoint | None = None,
    distribution: TaskDistribution | None = None,
) -> tuple[TaskDistribution, MAML]:
    """Tasks and algorithm for these settings; the learner in it has its initial weights.

    `saved`: the checkpoint whose weights are to be put in: what is built is as large, and what of it is not
    learned (see `MAML.fixed`) is the checkpoint's. `distribution`: the tasks, where another run has built the
    same.
    """
    load_factory(config.learner.learner)  # before there is work with the data
    build_loss(config.learner.loss, config.learner.loss_args)
    distribution = distribution or tasks_of(config, call, runtime)
    example = distribution.sample("test" if call.eval_dataset else "train", 0, 0, range(1))
    outputs = config.tasks.ways if config.tasks.classification else first_tensor(example.support_y).shape[-1]
    one_task = tree_map(lambda part: part[0], example.support_x)
    learner = module_of(config, runtime, outputs or 1, one_task, saved=saved)
    return distribution, algorithm_of(config, runtime, learner, one_task)


def make_run(
    config: Config, folder: Path, parameters: Weights, *, start: Checkpoint | None = None, **others: Any
) -> Run:
    """Return a training run with these settings; `others` are further fields of `Run`."""
    flags = settings.CONFIG_FLAGS.items()
    return Run(
        folder=folder,
        parameters=parameters,
        training=config.training,
        choices=config.choices,
        evaluation=config.evaluation,
        settings=config.values(),
        meaningful=list(settings.meaningful(config)),
        flags={name: flag for name, flag in flags if flag.group not in ("machine", "logging")},
        classification=config.tasks.classification,
        start=start,
        **others,
    )


def data_of(config: Config) -> tuple[Any, ...]:
    """The settings that decide what the tasks are, and where: runs that agree in these can share them."""
    names = (name for name, flag in settings.CONFIG_FLAGS.items() if flag.group == "tasks")
    return tuple(config.get(name) for name in (*names, "precision"))


def read_first(config: Config, call: Call, runtime: Runtime) -> TaskDistribution | None:
    """The tasks, in the first process of a machine, which fetches and decodes what there is; the others read
    what it leaves behind, and get None."""
    return tasks_of(config, call, runtime) if runtime.world.local_rank == 0 else None


def facts(config: Config, runtime: Runtime, source: Checkpoint | None) -> dict[str, Any]:
    """In what the processes of a job have to agree, by names for people."""
    return {
        "torch": str(torch.__version__),
        "--device": runtime.device.type,
        "checkpoint": source.iteration if source else None,
        **settings.by_flag(config),
    }


def tasks_of(config: Config, call: Call, runtime: Runtime) -> TaskDistribution:
    """Return the task distribution that the settings name."""
    return build_distribution(
        config.tasks,
        data_root=call.data_root,
        device=runtime.device,
        dtype=runtime.dtype,
        for_test=call.eval_dataset is not None,
    )


def module_of(
    config: Config, runtime: Runtime, outputs: int, example: Tree, *, saved: Checkpoint | None = None
) -> nn.Module:
    """The learner with its initial weights, and that many outputs; `example` is one task's inputs. Of a
    checkpoint, nothing is fetched for it, and nothing built that is much larger than what is `saved`."""
    arguments = parse_arguments(config.learner.learner_args)
    if saved and config.learner.learner.startswith("torchvision:"):
        for name in ("weights", "pretrained"):  # the checkpoint has all of them
            arguments.pop(name, None)
    with as_large_as(saved, config) if saved and not is_own_code(config.learner.learner) else nullcontext():
        learner = build_learner(
            config.learner.learner,
            outputs,
            inputs=tree_map(lambda part: tuple(part.shape[1:]), example),
            arguments=arguments,
            init=config.learner.init,
            context=config.choices.context_size if config.choices.fast_weights == "context" else 0,
            seed=config.training.seed,
        )
    if saved and saved.fixed:
        restore_fixed(learner, saved.fixed, config.learner.learner)
    learner = learner.to(runtime.device, runtime.dtype)
    check_outputs(learner, example, outputs, config)
    return learner


def algorithm_of(config: Config, runtime: Runtime, learner: nn.Module, example: Tree) -> MAML:
    """Return the algorithm for a learner; raise UsageError if its choices do not fit the learner."""
    try:
        return MAML(
            learner,
            build_loss(config.learner.loss, config.learner.loss_args),
            config.choices,
            convolution=config.training.convolution,
            compute_dtype=runtime.compute_dtype,
            example=None if config.learner.learner in LEARNERS else example,
            tasks_at_once=config.training.tasks_at_once,
            vectorise=config.training.vectorise,
        )
    except ValueError as error:
        head = "" if config.choices.head is None else f" --head {config.choices.head}"
        choice = f"--fast-weights {config.choices.fast_weights}{head} --head-init {config.choices.head_init}"
        raise UsageError(f"{choice} with --learner {config.learner.learner}: {error}") from error


# ---- learners that are not ours -------------------------------------------------------------


@contextmanager
def as_large_as(saved: Checkpoint, config: Config) -> Iterator[None]:
    """Within it, building a learner ends with UsageError where it becomes much larger than what is saved,
    before its memory is touched: a checkpoint may say that it is for any learner.

    Heads that are computed, and inner rates, are in one of the two alone.
    """

    def size(tensor: Tensor | None) -> int:
        return 0 if tensor is None else max(tensor.numel(), LEAST_SIZE)

    left = FREE_SIZE + 4 * sum(map(size, (*saved.parameters.values(), *saved.fixed.values())))

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= size(parameter)
        if left < 0:
            words = " ".join((config.learner.learner, *config.learner.learner_args))[:100]
            raise UsageError(f"the checkpoint does not fit the learner {words}: that is far larger")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def restore_fixed(learner: nn.Module, fixed: Weights, name: str) -> None:
    """Puts frozen parameters and buffers, as a checkpoint has them, in the place of the learner's own."""
    own = dict(learner.named_parameters()) | dict(learner.named_buffers())
    for key in sorted(fixed.keys() | fixed_tensors(learner).keys()):
        saved, there = fixed.get(key), own.get(key)
        if (
            saved is None or there is None or there.requires_grad or there.shape != saved.shape
            or there.is_floating_point() != saved.is_floating_point() or saved.is_complex()
        ):  # fmt: skip
            raise UsageError(f"the checkpoint does not fit the learner {name}: {key} differs")
        there.data.copy_(saved)


def check_outputs(learner: nn.Module, example: Tree, outputs: int, config: Config) -> None:
    """Raises UsageError where a learner of the user's does not take these inputs, or gives other outputs."""
    shapes = tree_map(lambda part: tuple(part.shape), example)
    positional, named = arguments_of(example)
    probe = copy.deepcopy(learner)
    try:
        keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(example).device)
        with torch.no_grad(), Elementary(keys, first_tensor(example)):
            found = first_tensor(probe(*positional, **named))
    except Exception as error:  # it is the user's code, and may fail in any way
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--learner {config.learner.learner} fails on the inputs of a task, {shapes}: {reason}"
        ) from error
    expected = (len(first_tensor(example)), outputs)
    if config.learner.loss in LOSSES and tuple(found.shape) != expected:
        raise UsageError(
            f"--learner {config.learner.learner} gives outputs {tuple(found.shape)} for inputs {shapes}: they "
            f"should be {expected}, [examples, outputs]"
        )


def tried(maml: MAML, parameters: Weights, distribution: TaskDistribution, config: Config) -> None:
    """Meta-learns from two tasks; raises UsageError where the learner or the loss cannot be, with the layer
    and the way round."""
    tasks = distribution.resized(config.training_shots).sample("train", config.training.seed, 1, range(2))
    device = first_tensor(tasks.support_x).device
    keys = keys_of(task_stream("train", config.training.seed, 1, range(2), device))
    _check_loss(maml, tasks, config)
    try:
        MetaGradientOf(maml, engine=config.training.engine)(parameters, tasks, keys=keys)
        return
    except Exception as error:  # an operator may stumble in any way
        if is_out_of_memory(error):
            raise
        failed = error
    reason = " ".join(str(failed).split())[:200]
    one_task = tree_map(lambda part: part[0], tasks.support_x)
    weights = maml.whole_weights(parameters)
    positional, named = arguments_of(one_task)
    finding = None if named else find_failing_layer(maml.learner, weights, positional, keys[0])
    if finding is None:
        raise UsageError(
            f"--learner {config.learner.learner} with --loss {config.learner.loss} cannot be meta-trained so: {reason}; "
            "--no-vectorise, --engine unrolled or --first-order ask less of it"
        ) from failed
    ways_round = {
        "vectorise": "--no-vectorise takes the tasks one after another",
        "second derivative": "--first-order needs none",
        "forward mode": "--engine unrolled needs none",
    }
    what = {
        "vectorise": "cannot be vectorised over tasks",
        "second derivative": "has no second derivative",
        "forward mode": "has no derivative in forward mode",
    }
    name = f"its layer {finding.layer} ({finding.kind})" if finding.layer else f"{finding.kind} itself"
    raise UsageError(
        f"--learner {config.learner.learner}: {name} {what[finding.problem]} ({finding.reason}): "
        f"{ways_round[finding.problem]}"
    ) from failed


def check_splits(distribution: TaskDistribution, config: Config) -> None:
    """Raises UsageError where there is no validation task, or it has not the inputs of the training tasks,
    which may have other numbers of examples."""
    training = distribution.resized(config.training_shots).sample("train", config.training.seed, 1, range(1))
    validation = distribution.sample("validation", 0, 0, range(1))
    shapes = [tree_map(lambda t: tuple(t.shape[2:]), b.support_x) for b in (training, validation)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"--dataset {config.tasks.dataset}: examples of training tasks have the shape {shapes[0]}, those of "
            f"validation tasks {shapes[1]}: a network takes one"
        )


def _check_loss(maml: MAML, tasks: TaskBatch, config: Config) -> None:
    """Raises UsageError where the loss of a task is no number that depends on the outputs."""
    keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(tasks.support_x).device)
    x, y = (tree_map(lambda part: part[0], tree) for tree in (tasks.support_x, tasks.support_y))
    with torch.no_grad():
        weights = maml.whole_weights(maml.initial_parameters())
        outputs = maml.call(weights, x, Extras(keys).for_pass("support"))
    outputs = tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), outputs)
    try:
        value = maml.loss(outputs, y)
    except Exception as error:
        raise UsageError(
            f"--loss {config.learner.loss} fails: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(value, torch.Tensor) or value.dim() or not value.requires_grad:
        kind = tuple(value.shape) if isinstance(value, torch.Tensor) and value.dim() else type(value).__name__
        raise UsageError(
            f"--loss {config.learner.loss} gives {kind}: it should give one number, a tensor that depends on the "
            "outputs"
        )


def own_code_flags(config: Config) -> list[str]:
    """The flags that have to be given again beside a checkpoint of these settings."""
    return [
        part
        for name in settings.OWN_CODE
        if is_own_code(config.get(name))
        for part in (f"--{name}", config.get(name))
    ]


@contextmanager
def no_empty_folder_left(folder: Path) -> Iterator[None]:
    """Removes what of a folder and its parents was not there before, where it is left with an error, if it
    is empty."""
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        yield
    except BaseException:
        for part in new:
            with suppress(OSError):  # there is something in it, or it was never made
                part.rmdir()
        raise


def writable(folder: Path, flag: str) -> Path:
    """The folder, made if need be, or a refusal that names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: cannot write there ({error.strerror or error}); name another folder"
        ) from error
    return folder


def check_processes(config: Config, runtime: Runtime) -> None:
    """Raises UsageError where there are more processes than tasks, or too few to share something."""
    if runtime.world.size > config.training.meta_batch_size:
        raise UsageError(
            f"{runtime.world.size} processes for a meta-batch of {config.training.meta_batch_size} tasks: take fewer "
            "(torchrun --nproc-per-node), or a larger --meta-batch-size"
        )


def print_settings(config: Config, runtime: Runtime, first_line: str, *others: Config) -> None:
    """`others`: of runs that are shown together."""
    print(
        f"{first_line}\n{settings.describe(config, *others)}\n  device      {runtime.describe()}", flush=True
    )


def print_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says where a run that goes on is computed in another way than it was: the last bits depend on that."""
    changed = [
        f"{name} {before[name]}, now {now.get(name)}" for name in before if before[name] != now.get(name)
    ]
    if changed:
        print(f"Goes on to rounding, not to the bit: it had {'; '.join(changed)}", flush=True)


def fitted(
    config: Config, given: Mapping[str, Any], runtime: Runtime, *, new: bool, silent: bool = False
) -> Config:
    """The settings for this machine: uncompiled where it cannot compile; a GPU takes all tasks at once."""
    silent = silent or not runtime.world.first
    if new and runtime.device.type == "cuda" and "tasks_at_once" not in given:
        config = config.replaced(tasks_at_once=None)
    if not new and given.get("compile") == "on" and config.training.compile == "off" and not silent:
        print("main.py: the run began uncompiled, and goes on so", file=sys.stderr)
    if config.training.compile == "off":
        return config
    if runtime.device.type == "mps":
        reason = "--device mps cannot compile"
    elif cpp_compiler() is None:
        reason = "no C++ compiler was found (install g++, or name one in CXX)"
    else:
        return config
    if not silent:
        print(f"main.py: {reason}: the run goes uncompiled", file=sys.stderr)
    if new:
        return resolve({**given, "compile": "off"})
    return config.replaced(compile="off")
