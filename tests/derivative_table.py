"""Which derivatives of derivatives are exact, in PyTorch alone and here: the tables of docs/learners.md.

    python tests/derivative_table.py      # write them for the installed PyTorch

A Hessian-vector product, float64, in the orders that the engines take: reverse over forward (adjoint) and
reverse over reverse (unrolled), under `vmap` over two tasks, once with weights of their own and once with the
same. The reference is central differences of the gradient, which itself is compared with those of the value.
"""

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402 (path first)
from operators import MODULES, OPERATORS  # noqa: E402 (path first)
from torch import Tensor, nn  # noqa: E402 (path first)
from torch.func import functional_call, grad, jvp, vmap  # noqa: E402 (path first)
from torch.utils import _pytree as pytree  # noqa: E402 (path first)

from common.task import loop_over_tasks  # noqa: E402 (path first)
from learners.elementary import Elementary  # noqa: E402 (path first)

PAGE = ROOT / "docs" / "learners.md"
BEGIN, END = "<!-- tests/derivative_table.py: begin -->\n", "<!-- tests/derivative_table.py: end -->\n"
TASKS, STEP, TOLERANCE = 2, 1e-5, 1e-5
KEY = torch.tensor([11, 12])
Weights = dict[str, Tensor]
Function = Callable[[Weights, Tensor], object]  # of the weights and one task's x


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, SHIFT, SCALE = random(TASKS, 3, 4, 4), 0.2 * random(3, 4, 4, seed=1), 1 + 0.3 * random(3, 4, 4, seed=2)


def case_of(name: str) -> tuple[Function, Weights]:
    if name in OPERATORS:
        return lambda w, x: OPERATORS[name](w["x"] * x + SHIFT), {"x": SCALE}
    build, arguments = MODULES[name]
    torch.manual_seed(1)
    module: nn.Module = build().double()
    weights = {n: w.detach() + 0.2 * random(*w.shape, seed=3) for n, w in module.named_parameters()}

    def call(w: Weights, x: Tensor) -> object:
        return functional_call(module, {n: w[n] for n in w if n != "x"}, arguments(w["x"] * x + SHIFT))

    return call, weights | {"x": SCALE}


def measure(case: tuple[Function, Weights], *, repaired: bool) -> tuple[str, str]:
    """Return what the adjoint and the unrolled engine's order gives, in a word."""
    function, weights = case
    directions = {n: random(TASKS, *w.shape, seed=4) for n, w in weights.items()}

    def loss(w: Weights, x: Tensor) -> Tensor:
        torch.manual_seed(0)  # for PyTorch alone
        with Elementary(KEY, x) if repaired else nullcontext():
            outputs = pytree.tree_leaves(function(w, x))
        return sum((y * y.cos() + 0.1 * y**3).sum() for y in outputs if y.is_floating_point())

    try:
        expected = [_differences(loss, weights, _row(directions, task), X[task]) for task in range(TASKS)]
    except ValueError:
        return "refused", "refused"
    except Exception:
        return "fails", "fails"
    if None in expected:
        return "wrong", "wrong"
    reference = {n: torch.stack([part[n] for part in expected]) for n in weights}
    return tuple(_word(order, loss, weights, directions, reference) for order in (_adjoint, _unrolled))


def _row(trees: Weights, task: int) -> Weights:
    return {name: tensor[task] for name, tensor in trees.items()}


def _differences(loss, weights: Weights, direction: Weights, x: Tensor) -> Weights | None:
    """Return the differences of the gradient along a direction; None if the gradient is wrong."""
    ahead, behind = ({n: w + step * direction[n] for n, w in weights.items()} for step in (STEP, -STEP))
    slope = (loss(ahead, x) - loss(behind, x)) / (2 * STEP)
    expected = sum((g * direction[n]).sum() for n, g in grad(loss)(weights, x).items())
    if not (slope - expected).abs() <= TOLERANCE * (1 + slope.abs()):
        return None
    high, low = grad(loss)(ahead, x), grad(loss)(behind, x)
    return {name: (high[name] - low[name]) / (2 * STEP) for name in weights}


def _adjoint(loss, weights: Weights, directions: Weights, x: Tensor, over_tasks, axis: int | None) -> Weights:
    def slope(w: Weights, v: Weights, x: Tensor) -> Tensor:
        return jvp(lambda w: loss(w, x), (w,), (v,))[1]

    return grad(lambda w: over_tasks(slope, (axis, 0, 0))(w, directions, x).sum())(weights)


def _unrolled(
    loss, weights: Weights, directions: Weights, x: Tensor, over_tasks, axis: int | None
) -> Weights:
    leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
    gradients = over_tasks(lambda w, _, x: grad(loss)(w, x), (axis, 0, 0))(leaves, directions, x)
    total = sum((g * directions[n]).sum() for n, g in gradients.items())
    if not total.requires_grad:
        return {n: torch.zeros_like(w) for n, w in weights.items()}
    products = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, products, strict=True))


def _word(order, loss, weights: Weights, directions: Weights, reference: Weights) -> str:
    """Return "exact", "wrong", "one by one" (exact, and an error under `vmap`) or "fails"."""
    several = {n: w.expand(TASKS, *w.shape).clone() for n, w in weights.items()}
    total = {n: r.sum(0) for n, r in reference.items()}
    for over_tasks, word in ((vmap, "exact"), (loop_over_tasks, "one by one")):
        with suppress(Exception):
            own = order(loss, several, directions, X, over_tasks, 0)
            shared = order(loss, weights, directions, X, over_tasks, None)
            return word if _agree(own, reference) and _agree(shared, total) else "wrong"
    return "fails"


def _agree(products: Weights, reference: Weights) -> bool:
    scale = max(r.abs().max().item() for r in reference.values()) + 1e-3
    return all(((products[n] - r).abs() <= TOLERANCE * scale).all() for n, r in reference.items())


@cache
def words_of(name: str, *, repaired: bool) -> tuple[str, str]:
    with warnings.catch_warnings(action="ignore"):
        return measure(case_of(name), repaired=repaired)


def write_table(names) -> str:
    """Return rows of Markdown: operators with the same four words share one."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        words = *words_of(name, repaired=False), *words_of(name, repaired=True)
        rows.setdefault(words, []).append(f"`{name}`")
    exact = ("exact", "exact")
    best_first = sorted(rows.items(), key=lambda row: (row[0] != (*exact, *exact), row[0][2:] != exact))
    lines = ["| PyTorch alone: adjoint, unrolled | here: adjoint, unrolled | |", "|-|-|-|"]
    for words, members in best_first:
        marked = [f"**{word}**" if word == "wrong" else word for word in words]
        lines.append(f"| {', '.join(marked[:2])} | {', '.join(marked[2:])} | {', '.join(members)} |")
    return "\n".join(lines) + "\n"


def write_section() -> str:
    version = torch.__version__.split("+")[0]
    return f"""torch {version}, float64: {len(OPERATORS)} operators and {len(MODULES)} modules.

{write_table(OPERATORS)}
{write_table(MODULES)}"""


def replace_section(page: str, section: str) -> str:
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    return page[:start] + section + page[end:]


if __name__ == "__main__":
    PAGE.write_text(replace_section(PAGE.read_text(), write_section()))
