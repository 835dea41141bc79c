"""IMTL-L: learned scales that bring all terms to the value 1 (Liu 2021, Towards Impartial Multi-task Learning)."""

from __future__ import annotations

from descant.modules.multitask.uncertainty import UncertaintyWeighting


class IMTLL(UncertaintyWeighting):
    """Learned scales that bring the values of all terms to 1 (IMTL-L, Liu 2021).

        loss = sum_k exp(s_k) L_k - s_k,        s_k <- s_k - lr (exp(s_k) L_k - 1),       weight_k = exp(s_k)

    It needs only values. With s = -log variance, each step equals one of uncertainty weighting. The two papers differ
    in their motivation (equal values of scaled terms, or a likelihood), and in the factor 1/2 of Kendall's form, which
    is a factor of ``lr``. Source: Liu 2021, ICLR; as in LibMTL's IMTL, whose other half is IMTLG.

    >>> import torch
    >>> rule = IMTLL(lr=0.5)
    >>> for _ in range(100):
    ...     weight_BK = rule.weights(torch.zeros(0), torch.tensor([4.0, 0.5]), 0)
    ...     rule.learn(lambda seen: seen)
    >>> [round(x, 9) for x in weight_BK[0].tolist()]
    [0.25, 2.0]
    """
