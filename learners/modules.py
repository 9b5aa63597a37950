"""Putting layers of our own in the place of a learner's, its parameters untouched."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_layers(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module with every layer exchanged for which `replacement` gives another, in place.

    A layer that is used in several places stays one layer.
    """
    return _replaced(module, replacement, {})


def _replaced(
    module: nn.Module,
    replacement: Callable[[nn.Module], nn.Module | None],
    done: dict[nn.Module, nn.Module],
) -> nn.Module:
    if module not in done:
        done[module] = replacement(module) or module
        for name, child in module._modules.items():  # named_children() names a shared layer once
            if child is not None:
                setattr(done[module], name, _replaced(child, replacement, done))
    return done[module]
