"""Give a network away (--save-weights): as weights for its own class, or as a program without it.

    Adapted -> fill_module -> FILE.pt, FILE.safetensors, a `state_dict`; or FILE.pt2, `torch.export`'s program
    checkpoint -> give_initialisation -> FILE.pt, FILE.safetensors

An adapted network in evaluation mode should predict what `predict` does by the support set's statistics. Some
cannot: each is tried before it is written.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils import _pytree as pytree

from commands.build import build_module
from commands.call import Call
from commands.config import Config
from commands.initialisation import Initialisation, Solution, predict
from commands.names import select_meaningful
from commands.outputs import are_equal, count_outputs
from commands.resolve import restore_config
from commands.settings import as_toml
from common.batch import Tree, tree_map
from common.errors import UsageError, fold_message
from common.files import Writer, write_whole
from common.names import parse_name
from common.optimizers import Weights
from common.task import Adapted, UserTask
from learner import GreyAsColour
from learners.batch_norm import record_statistics
from learners.copies import copy_module, describe_layer
from learners.heads import context_names
from learners.modules import in_evaluation_mode
from learners.reading import Reading
from learners.spectral_norm import vector_names
from maml import MAML, SQUARE
from tasks.scales import Scales, apply_scale, undo_scale
from training.checkpoint import load_checkpoint

INSTEAD = "--save-weights FILE.pt2 writes a program instead"
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest output


@torch.no_grad()
def fill_module(learner: nn.Module, maml: MAML, adapted: Adapted, *, as_program: bool = False) -> nn.Module:
    """Give the learner the adapted weights, set it to evaluation mode, and return it.

    Running statistics of its batch norm layers become those of the support set, or those that `MAML.adapt`
    was given. `as_program`: layers without such buffers get some, which the learner's class would not have.
    """
    weights, task = adapted.weights, adapted.task
    changed: Weights = {}  # buffers as a pass leaves them
    with in_evaluation_mode(maml.learner), record_statistics(maml.learner) as recorded:
        maml.call(weights, task.support_x, task.extras, changed=changed)
    vectors = {n: changed[n] for n in vector_names(maml.learner) & changed.keys()}  # of the final weights
    tensors = maml.call.as_kept(weights) | task.extras.buffers | vectors
    learner.load_state_dict(tensors, strict=False)  # others stay as they were
    layers: dict[str, Any] = dict(learner.named_modules())
    for name, statistics in recorded.items():
        layer = layers[name.rpartition(".")[0]]
        mean, variance = weights.get(name, statistics).to(statistics.dtype)  # biased, as `eval` takes it
        if layer.running_mean is not None:
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
            layer.num_batches_tracked.fill_(1)
        elif as_program:
            layer.running_mean, layer.running_var, layer.track_running_stats = mean, variance, True
    for layer in layers.values():
        if as_program and isinstance(layer, _InstanceNorm) and layer.training:  # see `convert_batch_norm`
            layer.running_mean = layer.running_var = None
            layer.track_running_stats = False
    return learner.eval()


class InUnits(nn.Module):
    """Give a network of standardised numbers the units of its table: float64 in and, for regression, out.

    Outputs that are normal distributions become means and standard deviations.
    """

    def __init__(self, network: nn.Module, scales: Scales, dtype: torch.dtype, reading: Reading) -> None:
        super().__init__()
        self.network, self.dtype, self.reading = network, dtype, reading
        for part, scale in scales.items():
            self.register_buffer(part, scale)

    def forward(self, x: Tensor) -> Tree:
        scales = dict(self.named_buffers(recurse=False))
        x = apply_scale(x, scales, "input", "x").to(self.dtype) if scales else x
        outputs, in_units = self.network(x), partial(undo_scale, scales=scales, part="target")
        if self.reading.kind == "normal":
            return self.reading.moments(outputs, in_units=in_units)
        return tree_map(in_units, outputs)


def give_network(
    file: Path | None, default: Path, start: Initialisation, solution: Solution, task: UserTask
) -> str:
    """Write a task's network to the user's file or the default one, and return a line for people.

    The default file is not written where it would predict something else: the line says why. Raises
    UsageError where the user's would.
    """
    path, remarks, reading = file or default, [], solution.reading
    try:
        write_network(path, start, solution, task)
    except UsageError as error:
        if file:
            raise
        return f"Not written: {error}"
    if start.normalisation == "transductive" and solution.maml.has_batch_norm:
        remarks += ["predicts inductively: each example by itself, with the support set's statistics"]
    if start.source.scales and path.suffix != ".pt2":
        remarks += ["takes and gives standardised numbers, by the scales of the checkpoint"]
    if reading.kind == "normal":
        deviations = f"numbers whose softplus + {reading.floor:g} is the variance"
        remarks += [f"gives means and {'standard deviations' if path.suffix == '.pt2' else deviations}"]
    return f"Written: {path}{', which ' * bool(remarks)}{', and '.join(remarks)}"


def write_network(file: Path, start: Initialisation, solution: Solution, task: UserTask) -> None:
    """Write the network as the file's suffix says; raise UsageError where it would predict something else."""
    (built, maml, adapted), x, scales = solution, task.query_x, start.source.scales
    if maml.call.compute_dtype is not None:
        maml = maml.with_options(compute_dtype=None)  # a plain network is as wide as its weights
    if file.suffix == ".pt2":
        network = fill_module(copy_module(built), maml, adapted, as_program=True)
        _check_network(file, copy_module(network), maml, adapted, x)
        x = torch.cat([adapted.task.support_x, x])
        if scales or solution.reading.kind == "normal":
            network = InUnits(network, scales, x.dtype, solution.reading)
            x = undo_scale(x, scales, "input")
        _write(file, _make_program_writer(file, network, x))
        return
    if context_names(built):
        raise UsageError(f"{file}: a context is no part of the learner's class: {INSTEAD}")
    state = fill_module(built, maml, adapted).state_dict()
    config, outputs = start.config, len(task.classes) or count_outputs(start.config, task.support_y)
    seed = config.training.seed ^ 1  # as by a program that loads the weights
    fresh = build_module(config, start.runtime, outputs, task.support_x, seed, fetch_weights=False)
    try:
        fresh.load_state_dict(state)
    except RuntimeError as error:
        reason = f"{fold_message(error):.200}"
        raise UsageError(f"{file}: the weights do not fit the learner built anew: {reason}") from error
    _check_network(file, fresh.eval(), maml, adapted, x)
    if isinstance(fresh, GreyAsColour):
        state = {name.removeprefix("network."): tensor for name, tensor in state.items()}
    write_weights(file, state, config)


def give_initialisation(call: Call) -> None:
    """Write a checkpoint's initialisation by the names of its learner's `state_dict`.

    The checkpoint is read as data: neither the learner's code nor its data set is needed.
    """
    file = call.save_weights
    assert call.load is not None and file is not None
    source = load_checkpoint(call.load)
    config = restore_config(source.settings, call.load)
    choices, learner, head = config.choices, config.learner, config.choices.head_init
    if file.suffix == ".pt2":
        raise UsageError(f"{file}: a program is of an adapted network: add --adapt, or name FILE.safetensors")
    if choices.fast_weights == "context":
        raise UsageError(f"{file}: a context is no part of the learner's class: --adapt with {INSTEAD}")
    state = source.fixed | {n: w for n, w in source.parameters.items() if not n.startswith(SQUARE)}
    if parse_name(learner.learner).kind == "torchvision" and config.tasks.channels == 1:  # `GreyAsColour`
        state = {name.replace("network.", "", 1): tensor for name, tensor in state.items()}
    write_weights(file, state, config)
    remarks = {  # what a loader should know
        f"without the head, which is {head} before the first step": head != "learned",
        "with its learned rates, inner_lr/...": choices.inner_rates != "fixed",
        "with a row for each inner step in batch norm": choices.norm_per_step and learner.has_batch_norm,
        "for standardised numbers, by the scales of the checkpoint": bool(source.scales),
    }
    title = f"{file}, the initialisation of {call.load}, iteration {source.iteration:,}"
    print("Written:", ", ".join([title, *(remark for remark, applies in remarks.items() if applies)]))


def write_weights(file: Path, state: Weights, config: Config) -> None:
    """Write tensors by name as the file's suffix says; a .safetensors file has the settings too, as text."""
    state = {name: tensor.cpu().contiguous().clone() for name, tensor in state.items()}  # no shared memory
    if file.suffix != ".safetensors":
        _write(file, partial(torch.save, state))
        return
    from safetensors.torch import save

    settings = {name: str(value) for name, value in as_toml(select_meaningful(config)).items()}
    content = save(state, {"format": "pt"} | settings)
    _write(file, lambda opened: opened.write(content))


def _write(file: Path, write: Writer) -> None:
    if _is_checkpoint(file):
        raise UsageError(f"{file} is a checkpoint, which would be lost: name another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, write)


def _is_checkpoint(file: Path) -> bool:
    try:
        load_checkpoint(file)
    except UsageError:
        return False
    return True


def _make_program_writer(file: Path, network: nn.Module, x: Tensor) -> Writer:
    """Return what writes `torch.export`'s program of the network, for any number of examples."""
    network, x, content = network.cpu(), x.cpu(), io.BytesIO()
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            shapes = ({0: torch.export.Dim("examples")},)
            torch.export.save(torch.export.export(network, (x,), dynamic_shapes=shapes), content)
            for part in (x[:1], x):
                program = torch.export.load(io.BytesIO(content.getvalue())).module()
                if not are_equal(program(part), copy_module(network)(part), 1e-3):
                    raise ValueError("the program gives something else than the network")
    except Exception as error:  # an export may fail in any way
        reason = f"{fold_message(error):.200}"
        raise UsageError(f"{file}: torch.export cannot make a program of it: {reason}") from error
    return lambda opened: opened.write(content.getvalue())


# ---- does it predict the same? -------------------------------------------------------------------


@torch.no_grad()
def _check_network(file: Path, network: nn.Module, maml: MAML, adapted: Adapted, x: Tensor) -> None:
    """Raise UsageError, which names a layer, where the network predicts something else than `predict`."""
    tolerance = TOLERANCES.get(x.dtype, 1e-3)  # whole numbers, such as tokens, are read by float32
    draws = not are_equal(copy_module(network)(x), copy_module(network)(x), 0)
    expected, expected_layers = _call_noting_layers(maml.learner, lambda: predict(maml, adapted, x), len(x))
    outputs, layers = _call_noting_layers(network, lambda: network(x), len(x))
    if are_equal(outputs, expected, tolerance):
        return
    if draws:
        raise UsageError(f"{file}: it draws random numbers in evaluation mode, which no file can repeat")
    both = {n: (o, expected_layers[n]) for n, o in layers.items() if n in expected_layers}
    name = next((n for n, pair in both.items() if not are_equal(*pair, tolerance)), "")
    layer = describe_layer(name, network.get_submodule(name))
    layer += "" if name else ", which keeps more than parameters and buffers,"
    instead = "" if file.suffix == ".pt2" else f": {INSTEAD}"
    raise UsageError(f"{file}: {layer} gives something else in evaluation mode than --adapt{instead}")


def _call_noting_layers(
    module: nn.Module, call: Callable[[], Tree], examples: int
) -> tuple[Tree, dict[str, list[Tree]]]:
    """Return what a call returns, and the outputs of each layer on the last examples, by name."""
    outputs: dict[str, list[Tree]] = defaultdict(list)

    def note(name: str, _layer: nn.Module, _inputs: Any, output: Tree) -> None:
        tensors = (t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.dim())
        outputs[name].append([t[-examples:] for t in tensors])

    with ExitStack() as hooks:
        for name, layer in module.named_modules():
            if not list(layer.children()):
                hooks.enter_context(layer.register_forward_hook(partial(note, name)))
        return call(), outputs
