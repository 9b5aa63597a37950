"""Recurrent networks step by step: PyTorch's fused kernels have no rule for `vmap`.

A cell takes what comes from the input and what comes from the state, both `[batch, gates * hidden]`, and the
state: a tuple of `[batch, hidden]` whose first tensor is the output. It returns the next state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from learners.draws import Draws
from learners.spellings import Replacements, spell_out

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm_cell(from_input: Tensor, from_state: Tensor, state: State) -> State:
    input_gate, forget_gate, candidate, output_gate = (from_input + from_state).chunk(4, -1)
    cell = forget_gate.sigmoid() * state[1] + input_gate.sigmoid() * candidate.tanh()
    return output_gate.sigmoid() * cell.tanh(), cell


def _gru_cell(from_input: Tensor, from_state: Tensor, state: State) -> State:
    reset_x, update_x, candidate_x = from_input.chunk(3, -1)
    reset_h, update_h, candidate_h = from_state.chunk(3, -1)
    candidate = (candidate_x + (reset_x + reset_h).sigmoid() * candidate_h).tanh()
    return (candidate + (update_x + update_h).sigmoid() * (state[0] - candidate),)


def _plain_cell(activation: Any, from_input: Tensor, from_state: Tensor, state: State) -> State:
    return (activation(from_input + from_state),)


def _run_cell(
    cell: Cell,
    draws: Draws,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | State:
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    state = cell(F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
    return state[0] if isinstance(hx, Tensor) else state


def _scan(cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], bias: bool) -> tuple[Tensor, State]:
    """Run one layer in one direction; return its outputs `[time, batch, hidden]` and its last state."""
    w_input, w_state, *others = weights
    b_input, b_state = others[:2] if bias else (None, None)
    projection = others[-1] if len(others) % 2 else None
    outputs = []
    for from_input in F.linear(x, w_input, b_input).unbind(0):  # one product for all times
        state = cell(from_input, F.linear(state[0], w_state, b_state), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs), state


def _run_layers(
    cell: Cell,
    draws: Draws,
    input: Tensor,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """Run `torch.lstm` and the like; return outputs, last states `[layers * directions, batch, hidden]`."""
    if not isinstance(has_biases, bool):  # another overload: batch sizes follow the data
        raise ValueError("a recurrent layer cannot take a PackedSequence: give it a padded batch and a mask")
    states = [hx] if isinstance(hx, Tensor) else hx
    directions = 2 if bidirectional else 1
    per_direction = len(params) // (num_layers * directions)
    x = input.transpose(0, 1) if batch_first else input
    last_states = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            row = layer * directions + direction
            row_weights = params[row * per_direction : (row + 1) * per_direction]
            in_order = x.flip(0) if direction else x
            output, state = _scan(cell, in_order, tuple(s[row] for s in states), row_weights, has_biases)
            outputs.append(output.flip(0) if direction else output)
            last_states.append(state)
        x = torch.cat(outputs, -1)
        if layer < num_layers - 1:
            x = draws.drop(x, dropout, train, x.shape)
    x = x.transpose(0, 1) if batch_first else x
    return x, *(torch.stack(parts) for parts in zip(*last_states, strict=True))


REPLACEMENTS: Replacements = spell_out(
    {
        "lstm": partial(_run_layers, _lstm_cell),
        "gru": partial(_run_layers, _gru_cell),
        "rnn_tanh": partial(_run_layers, partial(_plain_cell, torch.tanh)),
        "rnn_relu": partial(_run_layers, partial(_plain_cell, torch.relu)),
        "lstm_cell": partial(_run_cell, _lstm_cell),
        "gru_cell": partial(_run_cell, _gru_cell),
        "rnn_tanh_cell": partial(_run_cell, partial(_plain_cell, torch.tanh)),
        "rnn_relu_cell": partial(_run_cell, partial(_plain_cell, torch.relu)),
    }
) | {
    # weights under `vmap` have no address; at one address, cuDNN does not lay them out in a buffer of its own
    Tensor.data_ptr: lambda draws, tensor: 0
}
