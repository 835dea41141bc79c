"""Curriculum over samples by the conflict of their gradients (CMGH). Letters: B samples."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.core.sham import Sham


class Curriculum:
    """Curriculum that drops samples whose terms have conflicting gradients, such as mismatched pairs.

        keep_i = cos_i > threshold(t),      t a share of the run: ``start`` at ``warmup``, ``end`` at ``until``

    Before ``warmup`` all samples count, because cosines are not meaningful yet. All samples also count in a step that
    would keep less than ``floor`` of them. Source: Wu 2022, arXiv 2211.02077 (CMGH), whose numbers are not published:
    our reading.

    Args:
        start, end: thresholds.
        warmup, until: shares of the run's steps.
        floor: share of the samples of a step.
        only: terms that lose a dropped sample, such as those of a noisy modality; by default all terms at the fork.
        oracle: a target of the data that is true for noisy samples: these are dropped, whatever their cosine.
        sham: ``permute`` drops the same number of samples, by the cosines of other samples.
    """

    def __init__(
        self,
        start: float = -0.3,
        end: float = 0.0,
        warmup: float = 0.1,
        until: float = 1.0,
        floor: float = 0.1,
        only: list[str] | None = None,
        oracle: str | None = None,
        sham: Literal["permute"] | None = None,
    ) -> None:
        if not 0 <= warmup <= until <= 1:
            raise ValueError(
                f"Curriculum: warmup {warmup:g}, until {until:g}: shares of the run, the first the smaller"
            )
        if not 0 <= floor <= 1:
            raise ValueError(f"Curriculum: floor {floor:g}: a share of the samples")
        self.start, self.end, self.warmup, self.until, self.floor = start, end, warmup, until, floor
        self.only, self.oracle, self.sham = only, oracle, Sham(sham)

    def threshold(self, share: float) -> float:
        """Return the threshold at a share of the run; minus infinity while all samples count.

        >>> rise = Curriculum(-0.4, 0.0, warmup=0.2, until=0.6)
        >>> rise.threshold(0.1), rise.threshold(0.2), round(rise.threshold(0.5), 3), rise.threshold(0.9)
        (-inf, -0.4, -0.1, 0.0)
        """
        if share < self.warmup:
            return -math.inf
        done = (share - self.warmup) / (self.until - self.warmup) if self.until > self.warmup else 1.0
        return self.start + (self.end - self.start) * min(done, 1.0)

    def deciding_cosines(self, cos_B: Tensor, valid_B: Tensor, batch: Batch) -> Tensor:
        """Return the cosines that decide; with the sham, those of other samples."""
        return self.sham(cos_B, batch.rng_seed, valid_B)

    def select_samples(self, cos_B: Tensor, valid_B: Tensor, batch: Batch, share: float) -> Tensor:
        """Mark the samples to keep, bool ``[B]``, by :meth:`deciding_cosines`; invalid samples have no conflict."""
        if self.oracle is not None:
            return ~batch.targets[self.oracle].bool()
        return ~valid_B | (cos_B > self.threshold(share))
