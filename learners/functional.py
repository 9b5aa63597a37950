"""Call a learner as a function of its weights, as the inner loop differentiates it.

Batch norm layers use the statistics of the batch at hand, spectral norms the singular value of the weight at
hand, fused layers have right second derivatives, random numbers come from keys. Tensors that a pass changes
are returned, and whatever else it leaves in the module is put back: a pass is a pure function of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.batch import Tree, cast_tree, concatenate_trees, first_tensor, make_arguments, tree_map
from common.choices import CONVOLUTIONS, check_choice
from common.errors import fold_message, is_out_of_memory
from common.optimizers import Weights
from common.task import Extras, Task
from learners.batch_norm import convert_batch_norm, fresh_statistics, join_names, set_norms
from learners.copies import (
    Alias,
    UnfitError,
    copy_module,
    describe_layer,
    describe_owner,
    find_aliases,
    find_holders,
    find_tensors,
    restore_containers,
)
from learners.elementary import Elementary, is_elementary
from learners.im2col import convert_convolutions
from learners.modules import convert_type, has_lazy, unwrap
from learners.padding import cut, pad_again
from learners.reading import hide_classes
from learners.spectral_norm import convert_spectral_norms


class FunctionalLearner:
    """A module as a function of weights and inputs: `outputs = learner(weights, x)`.

    Args:
        module: maps `[examples, ...]` to outputs. Several inputs are a tuple, or a dictionary by name.
        convolution: how `nn.Conv1d` and `nn.Conv2d` are computed, "grouped" or "im2col" (see im2col.py).
        compute_dtype: type of the learner's arithmetic; None: that of its parameters.
        example: one task's inputs, to see what a pass changes; None: all buffers count as changed.
        unpads: the module gets examples without padding; not under `vmap`.

    Callers see complex weights as real ones, `[..., 2]`. Raises UnfitError, which names the layer, if a pass
    cannot be made a function of tensors.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        convolution: str = "grouped",
        compute_dtype: torch.dtype | None = None,
        example: Tree | None = None,
        unpads: bool = False,
    ) -> None:
        check_choice("convolution", convolution, CONVOLUTIONS)
        if has_lazy(module):
            raise UnfitError(f"{describe_layer('', module)} has lazy layers: call it on inputs of a task")
        _refuse_gradient_hooks(module)  # which a copy would drop
        plain = unwrap(copy_module(module))
        self.fixed = collect_fixed_tensors(plain)
        self.module = convert_spectral_norms(convert_batch_norm(plain))
        parameters = self.module.named_parameters()
        learned = {name: p.detach().clone() for name, p in parameters if p.requires_grad}
        self.complex = frozenset(name for name, p in learned.items() if p.is_complex())
        self.parameters = learned | {name: torch.view_as_real(learned[name]) for name in self.complex}
        if convolution == "im2col":
            convert_convolutions(self.module)
        self.statistics = fresh_statistics(self.module)  # of batch norm, [2, channels]
        self.compute_dtype, self.unpads = compute_dtype, unpads
        if compute_dtype is not None:
            convert_type(self.module, compute_dtype)
            example = None if example is None else cast_tree(example, compute_dtype)
        self.is_elementary = is_elementary(self.module)  # then the mode and its cost can be saved
        # by module: what a pass may leave something in, and other places with its tensors
        self._belongings: dict[nn.Module, tuple[list[Any], list[Alias]]] = {}
        norms = self.statistics.keys()
        buffers = {n: b.detach().clone() for n, b in self.module.named_buffers() if n not in norms}
        # others that a pass changes
        self.buffers = buffers if example is None else self._find_changing(module, example)

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

        `module` is another one of the same parameters, whose outputs are no scores of classes. `changed`
        receives the buffers that the pass changes.
        """
        extras = extras or Extras()
        if extras.mask is not None and self.unpads:
            x, mask = cut(x, extras.mask), extras.mask
            outputs = self(weights, x, replace(extras, mask=None), module=module, changed=changed)
            return pad_again(outputs, mask)
        ways, module = None if module else extras.ways, module or self.module
        dtype = next(iter(weights.values()), first_tensor(x)).dtype
        if self.compute_dtype is not None:
            wide = self.statistics.keys() | self.complex
            weights = {n: w if n in wide else w.to(self.compute_dtype) for n, w in weights.items()}
            x = cast_tree(x, self.compute_dtype)
        weights = self.as_kept(weights)
        # copies, which the pass may change in place
        buffers = {name: b.clone() for name, b in (extras.buffers or self.buffers).items()}
        with nullcontext() if extras.mask is None else set_norms(module, mask=extras.mask):
            if self.is_elementary:
                outputs, after = call_with(module, weights | buffers, x)
            else:
                with Elementary(extras.keys, first_tensor(x)), self._restore(module) as aliases:
                    outputs, after = call_with(module, weights | buffers, x, aliases)
        if changed is not None:
            changed.update({name: after[name].detach() for name in buffers})
        outputs = outputs if self.compute_dtype is None else cast_tree(outputs, dtype)
        return outputs if ways is None else hide_classes(outputs, ways)

    def as_kept(self, weights: Weights) -> Weights:
        """Return the weights as the module keeps them: complex ones as complex numbers."""
        return weights | {n: torch.view_as_complex(weights[n]) for n in self.complex & weights.keys()}

    def query(
        self, weights: Weights, task: Task, normalisation: str, *, module: nn.Module | None = None
    ) -> Tree:
        """Return outputs on the query set; "inductive": with the support set's batch statistics."""
        if normalisation != "inductive":
            return self(weights, task.query_x, task.extras, module=module)
        reference = shots = len(first_tensor(task.support_x))
        examples = concatenate_trees([task.support_x, task.query_x])
        count, extras = len(first_tensor(examples)), replace(task.extras, mask=task.pooled_mask())
        if self.unpads and task.support_mask is not None:
            reference = int(task.support_mask.sum())
        with set_norms(module or self.module, reference=reference):
            outputs = self(weights, examples, extras, module=module)
        # an output that is no example's, such as an additional loss, stays whole
        return tree_map(lambda part: part[shots:] if part.shape[:1] == (count,) else part, outputs)

    def extras(self, tasks: int, keys: Tensor | None) -> Extras:
        """Return the extras of several tasks: keys `[tasks, 2]`, and each buffer expanded over tasks."""
        return Extras(keys, {name: b.expand(tasks, *b.shape) for name, b in self.buffers.items()})

    def draws(self, x: Tree) -> bool:
        """Return whether a training pass draws random numbers, as dropout does, and so needs keys."""
        x = x if self.compute_dtype is None else cast_tree(x, self.compute_dtype)
        return self._try({name: b.clone() for name, b in self.buffers.items()}, x)[1] > 0

    @contextmanager
    def _restore(self, module: nn.Module) -> Iterator[list[Alias]]:
        """Put back what a pass leaves in the module; yield where it keeps its tensors besides."""
        if module not in self._belongings:
            names = {id(t): name for name, t in _named_tensors(module).items()}
            self._belongings[module] = find_holders(module), find_aliases(module, names)
        holders, aliases = self._belongings[module]
        with restore_containers(holders):
            yield aliases

    def _try(self, tensors: Weights, x: Tree) -> tuple[Weights, int]:
        """Call the module once; return the tensors as the pass leaves them, and the number of draws."""
        keys = torch.zeros(2, dtype=torch.int64, device=first_tensor(x).device)
        mode = Elementary(keys, first_tensor(x))
        with torch.no_grad(), mode, self._restore(self.module) as aliases:
            names = _named_tensors(self.module).keys()
            _, after = call_with(self.module, tensors, x, aliases)
            for name in sorted(_named_tensors(self.module).keys() - names):
                raise UnfitError(
                    f"{describe_owner(self.module, name)} makes {name} in a forward pass, "
                    "which would be another one each time: make it in __init__, or use a lazy layer"
                )
        return after, mode.draws.calls

    def _find_changing(self, original: nn.Module, x: Tree) -> Weights:
        """Return the buffers and frozen parameters that a pass changes, batch norm's aside.

        Raises UnfitError where a pass changes what is not given to it, or calls the layers of `original`.
        """
        module, tensors = self.module, _named_tensors(self.module)
        copies = {name: t.detach().clone() for name, t in tensors.items() if name not in self.statistics}
        places = {name: t.data_ptr() for name, t in copies.items()}
        others = [(t, t._version) for t in find_tensors(module)]
        try:
            with _refuse_calls(original):
                after, _ = self._try(dict(copies), x)
        except Exception as error:  # the user's module may fail in any way
            if isinstance(error, UnfitError) or is_out_of_memory(error):
                raise
            arithmetic = f" in {str(self.compute_dtype)[6:]}" if self.compute_dtype else ""
            raise UnfitError(
                f"{describe_layer('', module)} fails{arithmetic}: {fold_message(error):.200}"
            ) from error
        changed = {
            name
            for name, t in copies.items()
            if after[name] is not t
            or t._version  # written to
            or t.data_ptr() != places[name]  # given other memory, by `.data`
            or not torch.equal(t, tensors[name])
        }
        for name in sorted(changed & self.parameters.keys()):
            raise UnfitError(
                f"{describe_owner(module, name)} overwrites its weight {name} in a forward pass, which no "
                "gradient sees: compute with a new tensor (torch.nn.utils.parametrize)"
            )
        for name in sorted(n for n, t in copies.items() if t.data_ptr() != places[n]):
            raise UnfitError(
                f"{describe_owner(module, name)} assigns to {name}.data in a forward pass: let it be a "
                "buffer, and write to it by copy_() under torch.no_grad()"
            )
        if any(t._version != version for t, version in others):
            raise UnfitError(
                f"{describe_layer('', module)} writes in a forward pass to a tensor that is no buffer, and "
                "so would go from task to task: use register_buffer"
            )
        return {name: tensors[name].detach().clone() for name in copies if name in changed}


def _named_tensors(module: nn.Module) -> Weights:
    """Return a module's parameters and buffers, each by the first of its names."""
    return dict([*module.named_parameters(), *module.named_buffers()])


def collect_fixed_tensors(module: nn.Module) -> Weights:
    """Return a module's frozen parameters and the buffers of its `state_dict`, by name."""
    state = module.state_dict(keep_vars=True)
    learned = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    fixed = {name: t for name, t in state.items() if name not in learned and isinstance(t, Tensor)}
    return {name: t.detach().clone() for name, t in fixed.items()}


def _refuse_gradient_hooks(module: nn.Module) -> None:
    """Raise UnfitError for a hook on a parameter: `torch.func`'s gradients do not pass there."""
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UnfitError(
                f"{describe_owner(module, name)} has a hook on the gradient of {name}, which would not run: "
                "mask it in the forward pass, w * mask + (w * (1 - mask)).detach(), or freeze the weight"
            )


def call_with(
    module: nn.Module, tensors: Weights, x: Tree, aliases: Sequence[Alias] = ()
) -> tuple[Tree, Weights]:
    """Call a module with parameters and buffers by name; a tied one goes by the first of its names.

    Returns the outputs, and the tensors as the pass leaves them. The module keeps its own, but for `aliases`:
    other places with tensors of the module.
    """
    first_names: dict[int, str] = {}
    values = {}
    for layer_name, layer in module.named_modules():  # once, even if it is used twice
        for name, tensor in (layer._parameters | layer._buffers).items():
            full_name = join_names(layer_name, name)
            first_name = first_names.setdefault(id(tensor), full_name)
            if first_name in tensors:
                values[full_name] = tensors[first_name]
    for holder, key, name in aliases:
        holder[key] = tensors.get(name, holder[key])
    # `tie_weights` would put back the wrong tensors where a module is used twice
    outputs = functional_call(module, values, *make_arguments(x), tie_weights=False)
    return outputs, values


@contextmanager
def _refuse_calls(module: nn.Module) -> Iterator[None]:
    """Raise UnfitError where a layer of the module is called: its copy, which is meant, would not learn."""

    def refuse(name: str, layer: nn.Module, *_: Any) -> None:
        raise UnfitError(
            f"{describe_layer(name, layer)} is called by a function that has kept it from before the network "
            "was copied: make it a method, or let it use the module that it is given"
        )

    layers = module.named_modules()
    handles = [layer.register_forward_pre_hook(partial(refuse, name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
