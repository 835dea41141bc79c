"""Queue of projections from earlier steps, identical on all ranks.

Letters: B samples on this rank, G samples on all ranks, K rows of the queue, P width of projections.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.ranks import gather, world


class Queue(nn.Module):
    """First-in-first-out queue of the last K rows of all ranks, stored in the state dict for resumed runs.

    It starts with random unit-length rows, as in the releases of MoCo and ReSSL, or ``empty``. Absent samples also take
    a row, which ``valid_K`` excludes. So the replaced rows do not depend on absences or on the order of a batch.

    Args:
        length: K, a multiple of the rows of a step. width: P.
        empty: whether the initial rows are invalid.

    >>> queue = Queue(length=4, width=1, empty=True)
    >>> queue.push(torch.tensor([[1.0], [2.0]]), torch.tensor([True, False]))
    >>> queue.rows_KP[:2].flatten().tolist(), queue.valid_K.tolist()
    ([1.0, 2.0], [True, False, False, False])
    """

    rows_KP: Tensor
    valid_K: Tensor
    pushed: Tensor

    def __init__(self, length: int, width: int, empty: bool = False) -> None:
        super().__init__()
        if length < 1:
            raise ValueError(f"queue {length}: at least 1 row")
        self.length = length
        self.register_buffer("rows_KP", F.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("valid_K", torch.full((length,), not empty))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.long))

    def push(self, z_BP: Tensor, valid_B: Tensor) -> None:
        """Replace the oldest rows by these rows of all ranks."""
        rows = len(z_BP) * world()
        if self.length % rows:
            near = max(round(self.length / rows), 1) * rows
            raise ValueError(f"queue {self.length}: a multiple of the {rows} rows of a step, such as {near}")
        z_GP, valid_G = gather(z_BP.detach()), gather(valid_B)
        at_G = (self.pushed + torch.arange(rows, device=z_GP.device)) % self.length
        self.rows_KP.index_copy_(0, at_G, z_GP.to(self.rows_KP.dtype))
        self.valid_K.index_copy_(0, at_G, valid_G)
        self.pushed.add_(rows)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return copies of ``rows_KP, valid_K``, rows in float32 or finer; a later push does not change them."""
        return promote(self.rows_KP.clone()), self.valid_K.clone()

    @property
    def full(self) -> Tensor:
        """Whether all initial rows have been replaced, as a bool scalar."""
        return self.pushed >= self.length
