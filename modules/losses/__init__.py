"""Losses: pure functions of tensors, one value a sample."""

from descant.modules.losses.contrastive import ContrastiveLoss, InfoNCE, Intra, SigLIP

__all__ = ["ContrastiveLoss", "InfoNCE", "Intra", "SigLIP"]
