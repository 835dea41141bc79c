"""Reinforcement of answers: how much better than others one was, and the losses that make it likelier."""

from descant.modules.policy.advantages import Advantage, AdvantageOutput, BatchScaled, Centred, EachScaled, GroupScaled
from descant.modules.policy.losses import (
    CISPO,
    KL,
    Aggregation,
    AnswerRatio,
    Clipped,
    Counts,
    LocalTokenMean,
    PolicyBatch,
    PolicyLoss,
    Ratio,
    SequenceMean,
    SequenceSum,
    Surrogate,
    TokenMean,
    TokenRatio,
)
from descant.modules.policy.preference import DPOLoss

__all__ = [
    "CISPO",
    "KL",
    "Advantage",
    "AdvantageOutput",
    "Aggregation",
    "AnswerRatio",
    "BatchScaled",
    "Centred",
    "Clipped",
    "Counts",
    "DPOLoss",
    "EachScaled",
    "GroupScaled",
    "LocalTokenMean",
    "PolicyBatch",
    "PolicyLoss",
    "Ratio",
    "SequenceMean",
    "SequenceSum",
    "Surrogate",
    "TokenMean",
    "TokenRatio",
]
