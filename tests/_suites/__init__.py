"""Property suites that a paper's test picks by name: one line a property.

    class TestMine(GradientExact, MissingModalities, Ranks, Resume, OnDevice):
        def recipe(self) -> Recipe:
            return Contrastive(towers(), loss=Mine())

A suite asks the class for ``recipe()``, a new recipe in float64 without dropout, and for what else it names.
"""

from tests._suites.data import CLASSES, MODALITIES, SampleData, Samples, samples, towers
from tests._suites.recipes import GradientExact, MissingModalities, OnDevice, Ranks, Resume, ShamNeutral
from tests._suites.rules import RuleExact

__all__ = [
    "CLASSES",
    "MODALITIES",
    "GradientExact",
    "MissingModalities",
    "OnDevice",
    "Ranks",
    "Resume",
    "RuleExact",
    "SampleData",
    "Samples",
    "ShamNeutral",
    "samples",
    "towers",
]
