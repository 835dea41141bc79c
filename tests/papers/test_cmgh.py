"""CMGH: the rule against a loop over gradients, and its YAML for two steps. Letters: K gradients of D numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descant.modules.multitask.cmgh import CMGH
from tests._suites import RuleExact
from tests.test_experiments import two_steps


class TestCMGH(RuleExact):
    def rule(self) -> CMGH:
        return CMGH()

    def explicit(self, g_KD: Tensor) -> Tensor:
        total_D = torch.zeros_like(g_KD[0])
        for g_D in g_KD:
            total_D += g_D
            for other_D in g_KD:
                if g_D @ other_D < 0:
                    total_D -= (g_D @ other_D) / (other_D @ other_D) * other_D
        return total_D


def test_its_yaml_trains(cli: Any) -> None:
    assert 0 < two_steps(cli, "papers/cmgh")["harmony/kept"] < 1
