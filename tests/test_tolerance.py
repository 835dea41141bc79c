"""Every comparison of floats in the tests says what it allows, and why."""

from __future__ import annotations

import ast
import doctest
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tolerance
from tests.tolerance import F32, F64, statistical, ulps

TESTS = Path(__file__).resolve().parent
COMPARE = {"allclose", "assert_close", "assert_allclose", "approx", "isclose"}
TOLERANCES = {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol"}
#: "below 1e-6" is about rounding; larger numbers may be what is measured.
SMALL = 2e-3


def test_doctests() -> None:
    for module in (tolerance, sys.modules[__name__]):
        found = doctest.testmod(module, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
        assert found.failed == 0 and found.attempted >= 4


@pytest.mark.parametrize("dtype", [F32, F64])
def test_sums_in_any_order_and_blocking_differ_by_less_than_the_bound(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for n in (3, 64, 1000):
        x_N = torch.randn(n, generator=generator, dtype=dtype)
        sums = [float(sum(x_N[torch.randperm(n, generator=generator)])) for _ in range(5)]
        sums += [float(sum(part.sum() for part in x_N.split(size))) for size in (1, 7, 16)]
        gap = (max(sums) - min(sums)) / float(x_N.double().abs().sum())
        assert gap <= ulps(n, dtype)
        largest = max(largest, gap)
    assert largest > 0, "orders do differ"


def test_a_mean_of_draws_is_within_its_standard_errors_and_a_biased_one_is_not() -> None:
    x_SN = torch.rand(200, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    off_S = (x_SN.mean(dim=1) - 0.5).abs()
    bound = statistical(12**-0.5, 1000)
    assert float(off_S.max()) < bound < 0.05
    assert float((off_S > statistical(12**-0.5, 1000, errors=1)).double().mean()) == pytest.approx(
        0.317, abs=statistical((0.317 * 0.683) ** 0.5, 200)
    )


# comparisons without a reason -----------------------------------------------------------------------------------------


def unexplained(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comparison of floats whose bound is a bare number, or absent, and has no comment.

    A comment counts at it or in the line above. "Differs" needs no bound, nor does equality of bits. A bound that is
    computed or has a name explains itself.

    >>> list(unexplained("assert x == approx(1)"))
    [(1, 'approx(1)')]
    >>> list(unexplained("assert x == approx(1, abs=0.01)  # two digits are printed"))
    []
    >>> list(unexplained("assert x == approx(1, abs=ulps(3, F64)) and not allclose(x, y) and x != approx(2)"))
    []
    >>> list(unexplained("assert gap < 1e-6 or gap > 1e-3"))
    [(1, 'gap < 1e-06')]
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for statement in ast.walk(ast.parse(source)):
        if not isinstance(statement, ast.Assert | ast.Expr | ast.Assign | ast.Return | ast.AugAssign):
            continue
        differs: set[ast.AST] = set()
        for node in ast.walk(statement):
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
                differs |= set(ast.walk(node.operand))
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.NotEq):
                differs |= set(ast.walk(node))
        for node in ast.walk(statement):
            lines = set(range(statement.lineno - 1, (statement.end_lineno or statement.lineno) + 1))
            if node not in differs and (_bare(node) or _small(node)) and not lines & comments:
                yield node.lineno, ast.unparse(node)  # type: ignore[attr-defined]


def _bare(node: ast.AST) -> bool:
    """A call that compares, and whose tolerances are absent, or numbers of which one is not 0."""
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name not in COMPARE or any(keyword.arg is None for keyword in node.keywords):
        return False
    given = [keyword.value for keyword in node.keywords if keyword.arg in TOLERANCES]
    numbers = [value.value for value in given if isinstance(value, ast.Constant)]
    return not given or any(numbers) or any(_has_small(value) for value in given)


def _small(node: ast.AST) -> bool:
    """``gap < 1e-6``, and not ``gap < -1e-6``."""
    if not isinstance(node, ast.Compare):
        return False
    return any(
        isinstance(op, ast.Lt | ast.LtE) and _has_small(right)
        for op, right in zip(node.ops, node.comparators, strict=True)
    )


def _has_small(expression: ast.expr) -> bool:
    minus = {node.operand for node in ast.walk(expression) if isinstance(node, ast.UnaryOp)}
    numbers = [node for node in ast.walk(expression) if isinstance(node, ast.Constant) and node not in minus]
    return any(isinstance(node.value, float) and 0 < node.value < SMALL for node in numbers)


@pytest.mark.parametrize("part", sorted({path.relative_to(TESTS).parts[0] for path in TESTS.rglob("*.py")} - {"slurm"}))
def test_every_comparison_says_what_it_allows(part: str) -> None:
    files = [TESTS / part] if part.endswith(".py") else sorted((TESTS / part).rglob("*.py"))
    found = [
        f"{file.relative_to(TESTS)}:{line}: {text}" for file in files for line, text in unexplained(file.read_text())
    ]
    assert not found, "name the bound (tests/tolerance.py) or say in a comment what it stands for:\n" + "\n".join(found)
