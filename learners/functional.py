"""Call a learner as a function of its weights, as the inner loop differentiates it.

Batch norm layers use the statistics of the batch at hand, fused layers have right second derivatives, random
numbers come from keys, and buffers that a pass changes are returned: a pass is a pure function of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.batch import Tree, arguments_of, first_tensor, in_type, joined, tree_map
from common.choices import CONVOLUTIONS, check_choice
from common.optimizers import Weights
from common.task import Extras, Task
from learners.batch_norm import convert_batch_norm, fresh_statistics, join_names, set_norms
from learners.elementary import Elementary, is_elementary
from learners.im2col import convert_convolutions


class FunctionalLearner:
    """A module as a function of weights and inputs: `outputs = learner(weights, x)`.

    Args:
        module: maps `[examples, ...]` to outputs. Several inputs are a tuple, or a dictionary by name.
        convolution: how `nn.Conv2d` is computed, "grouped" or "im2col" (see im2col.py).
        compute_dtype: type of the learner's arithmetic; None: that of its parameters.
        example: one task's inputs, to see which buffers a pass changes; None: all count as changed.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        convolution: str = "grouped",
        compute_dtype: torch.dtype | None = None,
        example: Tree | None = None,
    ) -> None:
        check_choice("convolution", convolution, CONVOLUTIONS)
        self.fixed = fixed_tensors(module)
        self.module = convert_batch_norm(copy.deepcopy(module))
        parameters = self.module.named_parameters()
        self.parameters = {name: p.detach().clone() for name, p in parameters if p.requires_grad}
        if convolution == "im2col":
            convert_convolutions(self.module)
        self.statistics = fresh_statistics(self.module)  # of batch norm, [2, channels]
        self.compute_dtype = compute_dtype
        if compute_dtype is not None:
            self.module.to(compute_dtype)
            example = None if example is None else in_type(example, compute_dtype)
        self.buffers = _changing_buffers(self.module, example)  # others that a pass changes
        self._is_elementary = is_elementary(self.module)  # then the mode and its cost can be saved

    def __call__(
        self,
        weights: Weights,
        x: Tree,
        extras: Extras | None = None,
        *,
        module: nn.Module | None = None,
        changed: Weights | None = None,
    ) -> Tree:
        """Return the outputs `[examples, ...]` under weights, and running statistics, by name.

        `module` is another one of the same parameters. `changed` receives the buffers that the pass changes.
        """
        extras, module = extras or Extras(), module or self.module
        dtype = next(iter(weights.values()), first_tensor(x)).dtype
        if self.compute_dtype is not None:
            wide = self.statistics.keys()
            weights = {n: w if n in wide else w.to(self.compute_dtype) for n, w in weights.items()}
            x = in_type(x, self.compute_dtype)
        # copies, which the pass may change in place
        buffers = {name: b.clone() for name, b in (extras.buffers or self.buffers).items()}
        with nullcontext() if self._is_elementary else Elementary(extras.keys, first_tensor(x)):
            outputs, after = call_with(module, weights | buffers, x)
        if changed is not None:
            changed.update({name: after[name].detach() for name in buffers})
        return outputs if self.compute_dtype is None else in_type(outputs, dtype)

    def query(self, weights: Weights, task: Task, normalisation: str) -> Tree:
        """Return outputs on the query set; "inductive": with the support set's batch statistics."""
        if normalisation != "inductive":
            return self(weights, task.query_x, task.extras)
        shots = len(first_tensor(task.support_x))
        with set_norms(self.module, reference=shots):
            outputs = self(weights, joined([task.support_x, task.query_x]), task.extras)
        return tree_map(lambda part: part[shots:], outputs)

    def extras(self, tasks: int, keys: Tensor | None = None) -> Extras:
        """Return the extras of several tasks: keys `[tasks, 2]`, and each buffer expanded over tasks."""
        return Extras(keys, {name: b.expand(tasks, *b.shape) for name, b in self.buffers.items()})

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Let the learner predict as in `nn.Module.eval`: dropout drops nothing."""
        modes = {layer: layer.training for layer in self.module.modules()}
        self.module.eval()
        try:
            yield
        finally:
            for layer, training in modes.items():
                layer.training = training

    def draws(self, x: Tree) -> bool:
        """Return whether a training pass draws random numbers, as dropout does, and so needs keys."""
        x = x if self.compute_dtype is None else in_type(x, self.compute_dtype)
        return _try(self.module, {}, x)[1] > 0


def fixed_tensors(module: nn.Module) -> Weights:
    """Return a module's frozen parameters and the buffers of its `state_dict`, by name."""
    state = module.state_dict(keep_vars=True)
    learned = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: t.detach().clone() for name, t in state.items() if name not in learned}


def call_with(module: nn.Module, tensors: Weights, x: Tree) -> tuple[Tree, Weights]:
    """Call a module with parameters and buffers by name; a tied one goes by the first of its names.

    Returns the outputs, and the tensors as the pass leaves them. The module keeps its own.
    """
    first_names: dict[int, str] = {}
    values = {}
    for layer_name, layer in module.named_modules():  # once, even if it is used twice
        for name, tensor in (layer._parameters | layer._buffers).items():
            full_name = join_names(layer_name, name)
            first_name = first_names.setdefault(id(tensor), full_name)
            if first_name in tensors:
                values[full_name] = tensors[first_name]
    # `tie_weights` would put back the wrong tensors where a module is used twice
    outputs = functional_call(module, values, *arguments_of(x), tie_weights=False)
    return outputs, values


def _changing_buffers(module: nn.Module, example: Tree | None) -> Weights:
    """Return the buffers that a pass on `example` changes, batch norm's aside; all of them without one."""
    norms = fresh_statistics(module)
    buffers = {name: b.detach().clone() for name, b in module.named_buffers() if name not in norms}
    if not buffers or example is None:
        return buffers
    before = {name: b.clone() for name, b in buffers.items()}
    after, _ = _try(module, before, example)
    return {n: b for n, b in buffers.items() if after[n] is not before[n] or after[n]._version}


def _try(module: nn.Module, tensors: Weights, x: Tree) -> tuple[Weights, int]:
    """Call a copy once; return the tensors as the pass leaves them, and how often it draws numbers."""
    keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(x).device)
    with torch.no_grad(), Elementary(keys, first_tensor(x)) as mode:
        _, after = call_with(copy.deepcopy(module), tensors, x)
    return after, mode.draws.calls
