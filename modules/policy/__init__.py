"""Policy-gradient and preference losses for language models (GRPO, Dr. GRPO, DAPO, BNPO, GSPO, CISPO, DPO), and
advantages."""

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
