"""Give a meta-trained initialisation away, to programs without this tool: --load FILE --save-weights FILE.

The checkpoint is read as data: neither the learner's code nor its data set is needed.
"""

from __future__ import annotations

from commands.call import Call
from commands.network import write_weights
from commands.resolve import restore_config
from common.errors import UsageError
from common.names import parse_name
from maml import SQUARE
from training.checkpoint import load_checkpoint


def export(call: Call) -> int:
    """Write the initialisation by the names of its learner's `state_dict`; return the exit code."""
    file = call.save_weights
    assert call.load is not None and file is not None
    source = load_checkpoint(call.load)
    config = restore_config(source.settings, call.load)
    choices, learner = config.choices, config.learner
    if file.suffix == ".pt2":
        raise UsageError(f"{file}: a program is of an adapted network: add --adapt, or name FILE.safetensors")
    if choices.fast_weights == "context":
        program = "--adapt with --save-weights FILE.pt2 writes a program instead"
        raise UsageError(f"{file}: a context is no part of the learner's class: {program}")
    state = source.fixed | {n: w for n, w in source.parameters.items() if not n.startswith(SQUARE)}
    if parse_name(learner.learner).kind == "torchvision" and config.tasks.channels == 1:  # `GreyAsColour`
        state = {name.replace("network.", "", 1): tensor for name, tensor in state.items()}
    write_weights(file, state, config)
    remarks = {  # what a loader should know
        f"without the head, which is {choices.head_init} before the first step": choices.head_init
        != "learned",
        "with its learned rates, inner_lr/...": choices.inner_rates != "fixed",
        "with a row for each inner step in batch norm": choices.norm_per_step and learner.has_batch_norm,
        "for standardised numbers, by the scales of the checkpoint": bool(source.scales),
    }
    title = f"{file}, the initialisation of {call.load}, iteration {source.iteration:,}"
    print("Written:", ", ".join([title, *(remark for remark, applies in remarks.items() if applies)]))
    return 0
