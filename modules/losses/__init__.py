"""Contrastive losses: one value a sample, negatives gathered over ranks."""

from descant.modules.core.ranks import gather
from descant.modules.losses.contrastive import ContrastiveLoss, InfoNCE, Intra, SigLIP
from descant.modules.losses.hinge import HardestInBatchHinge, PairMarginLoss
from descant.modules.losses.ring import RingSigLIP

__all__ = [
    "ContrastiveLoss",
    "HardestInBatchHinge",
    "InfoNCE",
    "Intra",
    "PairMarginLoss",
    "RingSigLIP",
    "SigLIP",
    "gather",
]
