"""Reinforcement of answers: how much better than others one was, and the losses that make it likelier."""

from descant.modules.policy.advantages import Advantage, BatchScaled, Centred, EachScaled, GroupScaled, Judged
from descant.modules.policy.losses import (
    CISPO,
    KL,
    Aggregation,
    AnswerRatio,
    Clipped,
    Counts,
    Drawn,
    LocalTokenMean,
    PolicyLoss,
    Ratio,
    SequenceMean,
    SequenceSum,
    Surrogate,
    TokenMean,
    TokenRatio,
)
from descant.modules.policy.preference import DPO

__all__ = [
    "CISPO",
    "DPO",
    "KL",
    "Advantage",
    "Aggregation",
    "AnswerRatio",
    "BatchScaled",
    "Centred",
    "Clipped",
    "Counts",
    "Drawn",
    "EachScaled",
    "GroupScaled",
    "Judged",
    "LocalTokenMean",
    "PolicyLoss",
    "Ratio",
    "SequenceMean",
    "SequenceSum",
    "Surrogate",
    "TokenMean",
    "TokenRatio",
]
