"""What a comparison of floats may differ by, named by the reason.

Kernels of another processor (AVX2, AVX-512, none) or library (OpenBLAS, MKL, oneDNN) add the same numbers in another
order and fuse other products, so that no two of them agree in every bit. They may differ by a count of roundings times
the condition of the problem. Where code, shapes and the order of operations are the same, compare bits instead
(``torch.equal``).
"""

from __future__ import annotations

from typing import TypedDict

import torch

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Tolerances(TypedDict):
    """Keywords of ``torch.testing.assert_close`` and ``torch.allclose``."""

    rtol: float
    atol: float


def ulps(terms: float, dtype: torch.dtype) -> float:
    """What two sums of ``terms`` numbers may differ by, in whatever order they are added: ``terms * eps``.

        |s_1 - s_2| <= 2 (terms - 1) u sum_i |x_i|,    u = eps / 2

    ``eps`` is the unit in the last place of numbers from 1 to 2: 2^-23 of float32, 2^-52 of float64, 2^-7 of bfloat16.
    The bound is relative to ``sum_i |x_i|``: an ``atol`` where that is about 1 (unit vectors, shares, losses), an
    ``rtol`` or ``rel`` where the terms have one sign. In a chain of sums, such as the layers of a network, the terms of
    all of them count.

    Source: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2.

    >>> ulps(1, torch.float64) == 2**-52, ulps(8, torch.float32) == 2**-20
    (True, True)
    >>> x = torch.tensor([1.0] + [2.0**-24] * 64)  # after 1, every small one is rounded away
    >>> forth, back = sum(x), sum(x.flip(0))
    >>> 0 < float(abs(forth - back)) <= ulps(len(x), torch.float32)
    True
    """
    return terms * torch.finfo(dtype).eps


def rounding(terms: float, dtype: torch.dtype) -> Tolerances:
    """:func:`ulps` as both tolerances of ``torch.testing.assert_close``; ``atol`` is for values of about 1.

    >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([1 + 2.0**-22, 2.0**-22])
    >>> torch.testing.assert_close(a, b, **rounding(2, torch.float32))
    >>> torch.testing.assert_close(a, b, **rounding(0.5, torch.float32))
    Traceback (most recent call last):
    AssertionError: ...
    """
    return {"rtol": ulps(terms, dtype), "atol": ulps(terms, dtype)}


def conditioned(condition: float, dtype: torch.dtype, terms: float = 1) -> float:
    """Relative error of a solution whose problem magnifies that of its input by ``condition``: ``condition * ulps``.

    ``condition`` is that of the matrix of a linear system, the size of what is subtracted over what is left, or by how
    much a step multiplies what goes into it (Adam's first: lr over the least gradient).

    >>> conditioned(1e4, torch.float64) == 1e4 * 2**-52
    True
    """
    return condition * ulps(terms, dtype)


def statistical(sigma: float, n: int, errors: float = 4) -> float:
    """What the mean of ``n`` independent draws may be off by: ``errors`` standard errors ``sigma / sqrt(n)``.

    Four are exceeded by one seed in 16,000: a seed that passes says little, but one that draws wrongly fails.

    >>> statistical(0.5, 10_000)  # a coin
    0.02
    """
    return errors * sigma / n**0.5


def printed(digits: int) -> float:
    """Half a unit of the last of ``digits`` decimals: what a number that was written down has lost.

    >>> printed(2)
    0.005
    """
    return 0.5 * 10.0**-digits


def quotient(dtype: torch.dtype, scale: float = 1) -> float:
    """Error of a central difference at its best step, ``eps^(1/3)``: ``scale * eps^(2/3)``.

    Truncation, h^2 f''' / 6, and rounding, eps f / h, are then alike; ``scale`` is the size of f and of f''' / 6.

    >>> f"{quotient(torch.float64):.1e}"
    '3.7e-11'
    """
    return scale * torch.finfo(dtype).eps ** (2 / 3)
