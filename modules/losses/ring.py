"""SigLIP without a full logit matrix: ranks pass embeddings around a ring and compute one block of logits at a time."""

from __future__ import annotations

from descant.modules.losses.contrastive import SigLIP
from descant.modules.losses.exchange import Ring


class RingSigLIP(SigLIP):
    """Chunked SigLIP: :class:`SigLIP` with logits computed block by block; the same as ``SigLIP(exchange=Ring())``.

    Algorithm 1 of Zhai 2023 (arXiv 2303.15343, section 3.3). In each of W hops, a rank compares its ``z_a`` with the
    ``z_b`` of one rank and passes that ``z_b`` on, with its keys and presence. Backward goes around the ring again,
    recomputes each block, and returns the gradients of ``z_b``. Memory is ``rows * B`` logits and two ``[B, D]`` for
    any W; gathering takes B * G and G * D (B samples per rank, G on all ranks).

    Args:
        temperature: 1/s at the start (the paper's 0.1).
        bias: c at the start (the paper's -10).
        max_scale: upper bound of s.
        rows: R, rows of one block; None takes all B at once.

    >>> import torch
    >>> z, key, valid = torch.eye(2), torch.arange(2), torch.ones(2, dtype=torch.bool)
    >>> [round(v, 4) for v in RingSigLIP(temperature=1.0, bias=0.0, rows=1)(z, z, key, valid).tolist()]
    [1.0064, 1.0064]
    """

    def __init__(
        self, temperature: float = 0.1, bias: float = -10.0, max_scale: float = 1000.0, rows: int | None = 1024
    ) -> None:
        super().__init__(temperature, bias, max_scale, exchange=Ring(rows))
