"""Linear algebra with right second derivatives.

PyTorch's forward-mode derivatives of `solve`, of determinants and of products of Householder reflections are
silently wrong when they are differentiated again (2.11 to 2.14 at least): they treat a matrix's factors as
constants. The derivatives of the LU factors themselves, and of triangular systems, are right; those of a
singular matrix are NaN, where PyTorch's determinants have some.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from learners.spellings import Replacements, spell_out


def _pivots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal of U in A = P L U, `[..., n]`, and the determinant of P, 1 or -1."""
    factors, rows, _ = torch.linalg.lu_factor_ex(matrix)
    exchanges = (rows != torch.arange(1, rows.shape[-1] + 1, device=rows.device)).sum(-1)
    return factors.diagonal(dim1=-2, dim2=-1), 1 - 2 * (exchanges % 2)


def _det(A: Tensor) -> Tensor:
    pivots, sign = _pivots(A)
    return pivots.prod(-1) * sign


def _slogdet(A: Tensor) -> Any:
    pivots, sign = _pivots(A)
    tuple_type = torch.return_types.linalg_slogdet  # type: ignore[attr-defined]  # missing from the stubs
    return tuple_type((pivots.sgn().prod(-1) * sign, pivots.abs().log().sum(-1)))


def _logdet(input: Tensor) -> Tensor:
    sign, logarithm = _slogdet(input)
    if input.is_complex():
        return logarithm + sign.log()
    return torch.where(sign == -1, torch.nan, logarithm)


def solve(A: Tensor, B: Tensor, left: bool = True) -> Tensor:
    """Return X of A X = B, or of X A = B, for `[..., n, n]` and a matrix or vectors."""
    if B.dim() == 1 or A.shape[:-1] == B.shape:  # vectors
        return solve(A, B.unsqueeze(-1), left).squeeze(-1)
    if not left:
        return solve(A.mT, B.mT).mT
    # no error for a singular matrix, which one diverged task may have; `vmap` has no rule for `lu`
    p, lower, upper = torch.lu_unpack(*torch.linalg.lu_factor_ex(A)[:2])
    half = solve_triangular(lower, p.mT @ B, upper=False, unitriangular=True)
    return solve_triangular(upper, half, upper=True)


def _solve_ex(A: Tensor, B: Tensor, left: bool = True, check_errors: bool = False) -> Any:
    info = torch.zeros(A.shape[:-2], dtype=torch.int32, device=A.device)
    tuple_type = torch.return_types.linalg_solve_ex  # type: ignore[attr-defined]  # missing from the stubs
    return tuple_type((solve(A, B, left), info))


def _tensorsolve(A: Tensor, B: Tensor, dims: Any = None) -> Tensor:
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    return solve(A.reshape(B.numel(), -1), B.flatten()).reshape(A.shape[B.dim() :])


def _cholesky_inverse(input: Tensor, upper: bool = False) -> Tensor:
    factor = input.mH if upper else input
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = solve_triangular(factor, eye, upper=False)
    return inverse.mH @ inverse


def _triangular_solve(
    input: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    if transpose:
        A, upper = A.mT, not upper
    solution = solve_triangular(A, input, upper=upper, unitriangular=unitriangular)
    return torch.return_types.triangular_solve((solution, A))


def _householder_product(A: Tensor, tau: Tensor) -> Tensor:
    """Multiply reflections I - tau v v^H, where v is 0 above the diagonal and 1 on it."""
    rows, columns = A.shape[-2:]
    eye = torch.eye(rows, columns, dtype=A.dtype, device=A.device)
    vectors, product = A.tril(-1) + eye, eye
    for number in reversed(range(tau.shape[-1])):
        v = vectors[..., number, None]
        product = product - tau[..., number, None, None] * (v @ (v.mH @ product))
    return product


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    if p != 2:
        return torch.cdist(x1, x2, p)  # which has no derivative in forward mode
    squares = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


REPLACEMENTS: Replacements = spell_out(
    {
        "det": lambda input: _det(input),
        "linalg_det": _det,
        "logdet": _logdet,
        "slogdet": lambda input: _slogdet(input),
        "linalg_slogdet": _slogdet,
        "linalg_solve": solve,
        "linalg_solve_ex": _solve_ex,
        "linalg_tensorsolve": _tensorsolve,
        "cholesky_inverse": _cholesky_inverse,
        "triangular_solve": _triangular_solve,
        "orgqr": lambda input, input2: _householder_product(input, input2),
        "linalg_householder_product": _householder_product,
    }
) | {torch.cdist: _cdist}
