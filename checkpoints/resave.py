"""Re-save checkpoints of format version 2 in the current one; their tensors keep every bit.

    python checkpoints/resave.py checkpoints/pretrained/*/best.pt

A card next to a checkpoint (card.json) gets the new file's SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from commands.config import CONFIG_FLAGS  # noqa: E402 (path first)
from commands.resolve import restore_config  # noqa: E402 (path first)
from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoints  # noqa: E402 (path first)

# Settings that are gone, and the only value that a checkpoint may have of them.
GONE = {
    "task_type": None,
    "split_seed": 0,
    "inner_weight_decay": 0.0,
    "images_on": "auto",
    "save_every_minutes": 10.0,
    "inner_carry": False,
}


def convert_settings(old: dict[str, Any]) -> dict[str, Any]:
    """Return settings under their current names; raises ValueError for a value without a counterpart."""
    settings = dict(old)
    for name, default in GONE.items():
        if settings.pop(name, default) != default:
            raise ValueError(f"{name} = {old[name]!r} has no counterpart")
    settings.pop("compile_after", None)  # how long a run waits before it compiles
    columns = [settings.pop(name, None) for name in ("task_column", "target_columns", "input_columns")]
    if columns != ["task", "y", None]:
        raise ValueError(f"columns {columns} have no counterpart")
    beta_1 = settings.pop("inner_beta_1")
    if settings["inner_optimizer"] != "momentum":
        settings["inner_momentum"] = beta_1
    return {name: settings[name] for name in CONFIG_FLAGS if name in settings}


def resave(path: Path) -> None:
    """Rewrite one checkpoint, and its card."""
    old = torch.load(path, map_location="cpu", weights_only=True)
    if old["version"] != 2:
        print(f"{path} has version {old['version']}: left as it is")
        return
    moments = list(old["optimizer"].get("state", {}).values())  # numbered in the order of the parameters
    names = list(old["parameters"]) if moments else []
    checkpoint = Checkpoint(
        settings=restore_config(convert_settings(old["config"]), path).values(),
        iteration=old["iteration"],
        parameters=old["parameters"],
        exp_avg={name: entry["exp_avg"] for name, entry in zip(names, moments, strict=True)},
        exp_avg_sq={name: entry["exp_avg_sq"] for name, entry in zip(names, moments, strict=True)},
        progress=old["progress"],
        statistics=old["statistics"],
        fixed=old["fixed"],
        splits=old["splits"],
        computed_by=old["computed_by"],
    )
    save_checkpoints({path: checkpoint})
    saved = load_checkpoint(path)
    for kind in ("parameters", "statistics", "fixed"):
        before, now = old[kind], getattr(saved, kind)
        assert before.keys() == now.keys() and all(torch.equal(before[n], now[n]) for n in now), path
    card = path.with_name("card.json")
    if card.exists():
        facts = json.loads(card.read_bytes()) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        card.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: re-saved")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        resave(Path(argument))
