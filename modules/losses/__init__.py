"""Contrastive losses: one value per sample, with negatives from all ranks."""

from descant.modules.core.ranks import gather as gather
from descant.modules.losses.contrastive import ContrastiveLoss as ContrastiveLoss
from descant.modules.losses.contrastive import InfoNCE as InfoNCE
from descant.modules.losses.contrastive import SigLIP as SigLIP
from descant.modules.losses.exchange import AllGather as AllGather
from descant.modules.losses.exchange import Chunks as Chunks
from descant.modules.losses.exchange import Exchange as Exchange
from descant.modules.losses.exchange import Ring as Ring
from descant.modules.losses.hinge import HardestInBatchHinge as HardestInBatchHinge
from descant.modules.losses.hinge import PairMarginLoss as PairMarginLoss
from descant.modules.losses.ring import RingSigLIP as RingSigLIP
