"""How many seeds show an effect of one margin, estimated from a pilot's runs. Letters: S seeds, A arms."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Required probability to show an effect of one margin, and the coverage of the upper limit of deviations.
POWER, LIMIT = 0.80, 0.80
#: Coverage of the intervals that judge a claim.
LEVEL = 0.95
#: Seeds of a pilot, and the fewest and most seeds of a claim; a YAML may ask for up to ``ASKED``.
PILOT, LEAST, MOST, ASKED = 3, 5, 10, 20


def upper_deviation(value_AS: Sequence[Sequence[float]]) -> float:
    """Estimate from a pilot an upper limit of the standard deviation of a paired difference of two arms.

        r_as = x_as - mean_s x_a - mean_a x_s + mean x,    limit = sqrt(2 sum r^2 / chi2(1 - LIMIT, (A - 1) (S - 1)))

    The residuals of the table of arms and seeds pool the paired differences of all arms: three arms and three seeds
    give 4 degrees of freedom, a single difference gives 2. A small pilot underestimates the deviation more often than
    not, so the limit lies above the estimate.

    >>> round(upper_deviation([[0.1, 0.2, 0.3], [0.2, 0.4, 0.3], [0.1, 0.1, 0.3]]), 3)
    0.172
    """
    from scipy.special import chdtri  # imported here, because `descant list` imports this package

    A, S = len(value_AS), len(value_AS[0]) if value_AS else 0
    if A < 2 or S < 2:
        raise ValueError(f"upper_deviation: {A} arms and {S} seeds; two of each are the fewest")
    mean_A = [math.fsum(value_S) / S for value_S in value_AS]
    mean_S = [math.fsum(value_A) / A for value_A in zip(*value_AS, strict=True)]
    mean = math.fsum(mean_A) / A
    residual = math.fsum((value_AS[a][s] - mean_A[a] - mean_S[s] + mean) ** 2 for a in range(A) for s in range(S))
    return math.sqrt(2 * residual / float(chdtri((A - 1) * (S - 1), LIMIT)))


def seeds_needed(margin: float, deviation: float, most: int = 999) -> int:
    """Return the fewest seeds with which a paired t test shows a gain of ``margin`` with probability ``POWER``.

        P(T' > t(LEVEL, n - 1)) >= POWER,    T' noncentral, with noncentrality margin sqrt(n) / deviation

    The result is at least ``LEAST``, and ``most + 1`` if more than ``most`` are needed.

    >>> seeds_needed(1.0, deviation=0.5), seeds_needed(1.0, deviation=1.0), seeds_needed(1.0, deviation=5.0)
    (5, 10, 199)
    """
    from scipy.special import nctdtr, stdtrit

    if not margin > 0:
        raise ValueError(f"seeds_needed: margin {margin}: above 0")
    if deviation == 0:
        return LEAST

    def power(seeds: int) -> float:
        quantile = stdtrit(seeds - 1, (1 + LEVEL) / 2)
        missed = float(nctdtr(seeds - 1, margin / deviation * math.sqrt(seeds), quantile))
        return 1 - missed if math.isfinite(missed) else 1.0  # not finite where it underflows: no miss

    low, high = LEAST, most + 1  # power grows with the seeds
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle + 1, high)
    return low
