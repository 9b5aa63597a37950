"""Call a learner as a function of its weights, as the inner loop differentiates it.

The module itself is copied, not changed. Its batch norm layers use the statistics of the batch at hand, its
fused layers have right second derivatives, its random numbers come from keys, and the buffers that a pass
changes are returned instead of kept: a pass is a pure function of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.batch import Tree, arguments_of, first_tensor, in_type, joined, tree_map
from common.choices import CONVOLUTIONS, check_choice
from common.optimizers import Weights
from common.task import Extras
from learners.batch_norm import convert_batch_norm, fresh_statistics, set_norms
from learners.elementary import Elementary, is_elementary
from learners.im2col import convert_convolutions


class FunctionalLearner:
    """A module as a function of weights and inputs: `outputs = learner(weights, x)`.

    Its attributes are by name: the trainable `parameters`, what is `fixed`, fresh running `statistics` of
    batch norm layers, `[2, channels]`, and the other `buffers` that a pass changes.

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
        learned = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.parameters = {name: p.detach().clone() for name, p in learned.items()}
        if convolution == "im2col":
            convert_convolutions(self.module)
        self.statistics = fresh_statistics(self.module)
        self.compute_dtype = compute_dtype
        if compute_dtype is not None:
            self.module.to(compute_dtype)
            example = None if example is None else in_type(example, compute_dtype)
        self.buffers = _changing_buffers(self.module, example)
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
        buffers = {name: b.clone() for name, b in extras.buffers.items()}  # a pass may change them in place
        mode = nullcontext() if self._is_elementary else Elementary(extras.keys, first_tensor(x))
        with mode, _reading_buffers(module, self.buffers, changed):
            outputs = functional_call(module, weights | buffers, *arguments_of(x))
        return outputs if self.compute_dtype is None else in_type(outputs, dtype)

    def query(
        self,
        weights: Weights,
        query_x: Tree,
        support_x: Tree,
        normalisation: str,
        extras: Extras | None = None,
    ) -> Tree:
        """Return outputs on a query set; "inductive": with the support set's batch statistics."""
        if normalisation != "inductive":
            return self(weights, query_x, extras)
        shots = len(first_tensor(support_x))
        with set_norms(self.module, reference=shots):
            outputs = self(weights, joined([support_x, query_x]), extras)
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

    def draws(self, weights: Weights, x: Tree) -> bool:
        """Return whether a training pass draws random numbers, as dropout does, and so needs keys."""
        keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(x).device)
        if self.compute_dtype is not None:
            weights, x = in_type(weights, self.compute_dtype), in_type(x, self.compute_dtype)
        with torch.no_grad(), Elementary(keys, first_tensor(x)) as mode:
            functional_call(copy.deepcopy(self.module), weights, *arguments_of(x))
        return mode.draws.calls > 0


def fixed_tensors(module: nn.Module) -> Weights:
    """Return a module's frozen parameters and the buffers of its `state_dict`, by name."""
    state = module.state_dict(keep_vars=True)
    learned = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {name: t.detach().clone() for name, t in state.items() if name not in learned}


def _changing_buffers(module: nn.Module, example: Tree | None) -> Weights:
    """Return the buffers that a pass on `example` changes, batch norm's aside; all of them without one."""
    norms = fresh_statistics(module)
    buffers = {name: b.detach().clone() for name, b in module.named_buffers() if name not in norms}
    if not buffers or example is None:
        return buffers
    probe = copy.deepcopy(module)
    before = {name: (buffer, buffer._version) for name, buffer in probe.named_buffers()}
    keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(example).device)
    positional, named = arguments_of(example)
    with torch.no_grad(), Elementary(keys):
        probe(*positional, **named)
    after = dict(probe.named_buffers())
    same = {n for n, (b, version) in before.items() if after.get(n) is b and b._version == version}
    return {name: buffer for name, buffer in buffers.items() if name not in same}


@contextmanager
def _reading_buffers(module: nn.Module, names: Iterable[str], changed: Weights | None) -> Iterator[None]:
    """Put these buffers, as they are when the module's forward ends, into `changed`."""
    if changed is None or not names:
        yield
        return

    def read(*_: Any) -> None:
        buffers = dict(module.named_buffers())
        changed.update({name: buffers[name].detach() for name in names})

    handle = module.register_forward_hook(read)
    try:
        yield
    finally:
        handle.remove()
