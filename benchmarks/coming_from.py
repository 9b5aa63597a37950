"""Whether other libraries compute the same meta-gradient, by the code of docs/coming-from.md, in float64.

    pip install higher torchopt && python benchmarks/coming_from.py

Three tasks, one inner step, a network of one hidden layer. A library that is not installed is left out.
"""

from __future__ import annotations

import re
from typing import Any

import harness
import torch
from torch.nn.functional import mse_loss

PAGE = harness.ROOT / "docs" / "coming-from.md"
IMPORTS = {"higher": "higher", "learn2learn": "learn2learn", "TorchOpt": "torchopt"}


def snippets() -> dict[str, str]:
    """Return the first Python block of each section of the page, by its heading."""
    sections = re.findall(r"^## (.+?)$\n+```python\n(.+?)```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return dict(sections)


def meta_gradient(code: str, names: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Run a block of the page; return its `gradients` by the names of the network's parameters."""
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(4, 3, 10, 1, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    hidden, output = torch.nn.Linear(1, 40), torch.nn.Linear(40, 1)
    network = torch.nn.Sequential(hidden, torch.nn.Tanh(), output).double()
    parts = dict(zip(("support_x", "support_y", "query_x", "query_y"), tensors, strict=True))
    scope = {"torch": torch, "mse_loss": mse_loss, "network": network, "loss": 0, **parts, **names}
    exec(code, scope)
    return scope["gradients"]


def main() -> None:
    harness.Parser(__doc__).parse_args()
    code = snippets()
    ours = meta_gradient(code["Here"], {})
    for heading, name in IMPORTS.items():
        try:
            module = __import__(name)
        except ImportError as error:
            print(f"{heading}: left out ({error})")
            continue
        theirs = meta_gradient(code[heading], {name: module})
        difference = max(float((theirs[n] - g).abs().max()) for n, g in ours.items())
        print(f"{heading}: {difference:.1e}")
        if difference > 1e-12:
            raise SystemExit(f"{heading} computes another meta-gradient")


if __name__ == "__main__":
    harness.launch(main)
