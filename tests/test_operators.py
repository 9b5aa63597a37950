"""The tables of docs/learners.md: which derivatives of derivatives are exact here."""

from functools import partial

import pytest
import torch
from derivative_table import KEY, PAGE, X, case_of, replace_section, words_of, write_section
from operators import CONVOLUTIONS, ELEMENTWISE, INDEXING, MODULES, OPERATORS, REDUCTIONS
from torch.func import grad, jvp
from torch.utils import _pytree as pytree

from learners.elementary import Elementary
from learners.losses import build_loss

EXACT = ("exact", "exact")
EXCEPTIONS = {
    "F.embedding_bag": ("refused", "refused"),
    "EmbeddingBag": ("refused", "refused"),
    "AlphaDropout": ("refused", "refused"),
    "linalg.eigh, vectors": ("wrong", "exact"),
    "scatter_reduce, prod": ("wrong", "one by one"),
    **dict.fromkeys(("torch.cdist, p=1", "F.pdist", "F.grid_sample"), ("fails", "exact")),
    **dict.fromkeys(("special.zeta", "igamma"), ("fails", "exact")),
    **dict.fromkeys(("F.multi_margin_loss", "F.ctc_loss"), ("fails", "fails")),
}
# what no replacement concerns
PLAIN = {*REDUCTIONS, *CONVOLUTIONS, *ELEMENTWISE, *INDEXING} - {"F.glu", "aten.glu", "aten.hardsigmoid"}
SAMPLE = [name for name in (*OPERATORS, *MODULES) if name not in PLAIN and "Transformer" not in name]


@pytest.mark.parametrize("name", SAMPLE)
def test_derivatives_of_a_derivative_are_exact_by_both_engines(name):
    words = words_of(name, repaired=True)
    older = torch.__version__ < (2, 14) and name in ("torch.cdist, p=1", "F.pdist")
    assert words == (("fails", "fails") if older and "exact" not in words else EXCEPTIONS.get(name, EXACT))


def assert_same_values(function, **options) -> None:
    expected = pytree.tree_leaves(function(X[0]))
    with Elementary(KEY, X[0]):
        values = pytree.tree_leaves(function(X[0]))
    torch.testing.assert_close(values, expected, **options)


REFUSED = {name for name, words in EXCEPTIONS.items() if words == ("refused", "refused")}


@pytest.mark.parametrize(
    "name", [n for n in SAMPLE if "ropout" not in n and "vmap" not in n and n not in REFUSED]
)
def test_a_replacement_has_the_values_of_pytorchs_function(name):
    function, weights = case_of(name)
    assert_same_values(partial(function, weights), rtol=1e-9, atol=1e-12)


ones, aten = torch.ones(4, dtype=torch.float64), torch.ops.aten
statistics = {"running_mean": -ones, "running_var": 2 * ones}
none = {"running_mean": None, "running_var": None}
options = {"momentum": 0.3, "eps": 0.1}
FORMS = {
    "layer norm": lambda x: torch.layer_norm(input=x, normalized_shape=(4,), bias=ones, cudnn_enable=False),
    "layer norm, eps": lambda x: aten.layer_norm.default(x, [4], None, ones, 0.1),
    "native layer norm": lambda x: torch.native_layer_norm(x, [4], weight=None, bias=ones, eps=0.1),
    "batch norm": lambda x: torch.batch_norm(
        x, bias=ones, weight=None, training=False, cudnn_enabled=False, **statistics, **options
    ),
    "native batch norm": lambda x: torch.native_batch_norm(x, None, ones, None, None, True, 0.3, eps=0.1),
    "no statistics": lambda x: aten._native_batch_norm_legit.no_stats(
        x, None, ones, training=True, **options
    ),
    "no training": lambda x: aten._native_batch_norm_legit_no_training(
        x, ones, None, -ones, 2 * ones, 0.3, 0.1
    )[0],
    "instance norm": lambda x: torch.instance_norm(
        x, None, bias=ones, use_input_stats=True, cudnn_enabled=False, **none, **options
    ),
    "rms norm": lambda x: torch.rms_norm(x, normalized_shape=[4], weight=ones, eps=0.1),
    "rms norm, no eps": lambda x: torch.nn.functional.rms_norm(x.float(), (4, 4)),
    "weight norm of the whole": lambda x: torch._weight_norm(x, g=ones[0], dim=-1),
    "weight norm, last axis": lambda x: torch._weight_norm(x, ones.view(1, 1, 4), dim=2),
    "embedding": lambda x: torch.embedding(weight=x[0], indices=torch.tensor([1, 2]), padding_idx=2),
    "no dropout": lambda x: torch.dropout(x, p=0.5, train=False),
    "gru cell": lambda x: torch.gru_cell(x[0], hx=x[1], w_ih=x.flatten(0, 1), w_hh=x.flatten(0, 1)),
    "determinant": lambda x: (torch.det(input=x), torch.linalg.det(A=x), x.det(), aten.det.default(x)),
    "singular": lambda x: (torch.linalg.det(x**0), torch.slogdet(x**0)[1]),
    "logarithms": lambda x: (*torch.slogdet(input=x), *torch.linalg.slogdet(A=x), x.logdet()),
    "complex logarithms": lambda x: (*torch.slogdet(torch.complex(x, x.mT)), torch.complex(x, x).logdet()),
    "solution": lambda x: torch.linalg.solve(A=x, B=x[0], left=False),
    "solution, a vector": lambda x: torch.linalg.solve(x, ones.expand(3, 4)),
    "solution, broadcast": lambda x: torch.linalg.solve(x[:, None], x),
    "solution, tensors": lambda x: torch.linalg.tensorsolve(
        x[0].view(2, 4, 2), x[1].view(2, 8)[:, :2], dims=(1,)
    ),
    "upper factor": lambda x: torch.cholesky_inverse(x.triu() + 3 * torch.eye(4), upper=True),
    "transposed": lambda x: x.triangular_solve(x + 4, transpose=True, unitriangular=True).solution,
    "reflections": lambda x: torch.orgqr(input=x[..., :3], input2=x[:, 0, :2]),
    "equal points": lambda x: torch.cdist(x, x[0]),
    "gate": lambda x: aten.glu(x, 1),
    "hard sigmoid": lambda x: torch.nn.functional.hardsigmoid(4 * x),
    "select": lambda x: x.select_scatter(src=x[0], dim=0, index=2),
    "likelihood": lambda x: torch.nn.functional.gaussian_nll_loss(x, x[0], x[..., :1] ** 2, full=True),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_way_to_call_a_function_keeps_its_arguments(name):
    assert_same_values(FORMS[name], equal_nan=True)


def test_an_argument_that_a_replacement_lacks_is_refused():
    x = torch.randn(3, 4)
    arguments = (x, ones, ones, None, None, True, 0.3, 0.1)
    with Elementary(), pytest.raises(TypeError, match="out"):
        torch.native_batch_norm(*arguments, out=(torch.empty(0), torch.empty(0), torch.empty(0)))


def test_a_singular_matrix_gives_numbers_that_are_not_finite_instead_of_an_error():
    with Elementary():
        assert not torch.linalg.solve(0 * X[0], X[0]).isfinite().any()


def test_a_loss_of_the_users_runs_from_replaced_functions(tmp_path):
    (tmp_path / "losses.py").write_text(
        "import torch\ndef f(y, _): return torch.linalg.slogdet(torch.layer_norm(y, (4,)) + 3 * y)[1]"
    )
    loss = build_loss(f"{tmp_path / 'losses.py'}:f")
    x, direction = X[0, 0] + 3 * torch.eye(4), X[0, 1]
    forward = grad(lambda x: jvp(lambda x: loss(x, None), (x,), (direction,))[1])(x)
    high, low = (grad(loss)(x + step * direction, None) for step in (1e-5, -1e-5))
    torch.testing.assert_close(forward, (high - low) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_the_documentation_says_what_is_exact():
    if not torch.__version__.startswith("2.14"):
        pytest.skip("the tables are those of torch 2.14")
    page = PAGE.read_text()
    assert replace_section(page, write_section()) == page
    for name in (*OPERATORS, *MODULES):
        assert words_of(name, repaired=True) == EXCEPTIONS.get(name, EXACT), name
