"""Property suites that a paper's test picks by name: one line a property.

    class TestMine(GradientExact, MissingModalities, Ranks, Resume, HostReads):
        def recipe(self) -> Recipe:
            return Contrastive(towers(), loss=Mine())

A suite asks the class for ``recipe()``, a new recipe in float64 without dropout, and for what else it names.
"""

from tests._suites.data import CLASSES, MODALITIES, SampleData, Samples, samples, towers
from tests._suites.recipes import GradientExact, HostReads, MissingModalities, Ranks, Resume, ShamNeutral
from tests._suites.rules import RuleProperties

__all__ = [
    "CLASSES",
    "MODALITIES",
    "GradientExact",
    "HostReads",
    "MissingModalities",
    "Ranks",
    "Resume",
    "RuleProperties",
    "SampleData",
    "Samples",
    "ShamNeutral",
    "samples",
    "towers",
]
