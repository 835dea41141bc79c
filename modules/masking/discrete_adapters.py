"""Adapters of masked models for maps of classes, token ids and table columns, with cross-entropy losses.

Letters: B samples, T tokens of a sample, N tokens of all samples, P raw numbers per token, D width of the encoder, E
width of the decoder, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.dtype import promote
from descant.modules.core.errors import require_value
from descant.modules.core.host import derive, everyone
from descant.modules.masking.adapters import Adapter, PatchAdapter


class CategoryAdapter(Adapter):
    """Adapter for semantic maps, int64 ``[B, H, W]``: patches of pixel embeddings, and cross-entropy.

        loss_n = mean_p -log softmax(y_np)[x_np], in float32 whatever the run's precision

    Source: MultiMAE (arXiv 2204.01678).

    Args:
        classes: C; pixels below 0 are unknown: their embedding is zero and they add no loss.
        size, patch: as in :class:`PatchAdapter`.
        embedding: width of a pixel's embedding (64 in the paper).

    >>> adapter = CategoryAdapter(classes=3, size=[4, 4], patch=2)
    >>> adapter.raw(torch.zeros(1, 4, 4, dtype=torch.long))[0].shape
    torch.Size([1, 4, 4])
    """

    def __init__(self, classes: int, size: list[int], patch: list[int] | int, embedding: int = 16) -> None:
        super().__init__()
        require_value(classes >= 2, f"classes {classes}: at least 2")
        self.cut = PatchAdapter(size, patch, channels=1)
        self.grid, self.classes, self.embedding = self.cut.grid, classes, embedding

    @property
    def numbers(self) -> int:
        return self.cut.numbers

    @property
    def output_size(self) -> int:
        return self.cut.numbers * self.classes

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.table = nn.Embedding(self.classes + 1, self.embedding, padding_idx=self.classes)
        self.inward = nn.Linear(self.cut.numbers * self.embedding, width)
        self.outward = nn.Linear(out, self.cut.numbers * self.classes) if out else nn.Identity()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cut.raw(x.unsqueeze(1) if x.ndim == len(self.cut.size) + 1 else x)

    def to_input_shape(self, x_BTP: Tensor) -> Tensor:
        return self.cut.to_input_shape(x_BTP).squeeze(1)

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        return self.inward(self.table(torch.where(x_NP < 0, self.classes, x_NP)).flatten(1))

    def scores(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        """Return logits ``[N, P, C]``."""
        return self.outward(h_NE).unflatten(1, (self.cut.numbers, self.classes)).float()

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        loss_NP = F.cross_entropy(self.scores(h_NE, place_N).transpose(1, 2), x_NP, ignore_index=-1, reduction="none")
        known_NP = x_NP >= 0
        return {"": loss_NP.masked_fill(~known_NP, 0.0).sum(dim=1) / known_NP.sum(dim=1).clamp(min=1)}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        return self.scores(h_NE, place_N).argmax(dim=2)


class TokenAdapter(Adapter):
    """Adapter for token ids, int64 ``[B, T]``: an embedding per id, and cross-entropy over the vocabulary.

    Args:
        vocab: C. length: T.
        pad: id of the padding, neither visible nor a target; None if every id is real, such as codes of images.

    >>> adapter = TokenAdapter(vocab=9, length=3)
    >>> adapter.raw(torch.tensor([[4, 5, 0]]))[1].tolist()
    [[True, True, False]]
    """

    def __init__(self, vocab: int, length: int, pad: int | None = 0) -> None:
        super().__init__()
        require_value(vocab >= 2 and length >= 2, f"vocab {vocab}, length {length}: at least 2 each")
        self.grid, self.vocab, self.pad = (length,), vocab, pad

    @property
    def vocabulary(self) -> int:
        return self.vocab

    @property
    def output_size(self) -> int:
        return self.vocab

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.table = nn.Embedding(self.vocab, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.outward = nn.Linear(out, self.vocab) if out else nn.Identity()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.tokens:
            raise ValueError(f"input of {x.shape[1]} tokens: this adapter takes {self.tokens}")
        if self.pad is None:
            return x[..., None], everyone(x.shape, x.device)
        return x[..., None], derive(lambda x_BT: x_BT != self.pad, x)

    def to_input_shape(self, x_BTP: Tensor) -> Tensor:
        return x_BTP.squeeze(2)

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        return self.table(x_NP.squeeze(1))

    def scores(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        return promote(self.outward(h_NE))[:, None]

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        return {"": F.cross_entropy(self.scores(h_NE, place_N).squeeze(1), x_NP.squeeze(1), reduction="none")}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        return self.scores(h_NE, place_N).argmax(dim=2)


class TableAdapter(Adapter):
    """Adapter for table columns, float ``[B, T]``, one token each: numbers (squared error), categories (cross-entropy).

        h_t = x_t w_t + b_t of a number,   w_t[x_t] of a category;   nan: a missing cell, neither visible nor a target

    Args:
        columns: one entry per column: 0 for a number (standardise it in the data), else the number of its categories.

    >>> TableAdapter([0, 3]).raw(torch.tensor([[0.5, float("nan")]]))[1].tolist()
    [[True, False]]
    """

    first_T: Tensor
    count_T: Tensor
    number_T: Tensor

    def __init__(self, columns: list[int]) -> None:
        super().__init__()
        if len(columns) < 2 or min(columns) < 0 or 1 in columns:
            raise ValueError(f"columns {columns}: at least two, each 0 for a number or its categories (2 or more)")
        self.grid, self.columns = (len(columns),), tuple(columns)
        # one row holds the outputs of all columns: one output for a number, one per category for a category
        outputs = [max(c, 1) for c in columns]
        first = [sum(outputs[:t]) for t in range(len(outputs))]
        self.outputs = sum(outputs)
        self.register_buffer("first_T", torch.tensor(first), persistent=False)
        self.register_buffer("count_T", torch.tensor(outputs), persistent=False)
        self.register_buffer("number_T", torch.tensor([c == 0 for c in columns]), persistent=False)

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.table = nn.Embedding(self.outputs, width)
        self.bias = nn.Embedding(self.tokens, width)
        for layer in (self.table, self.bias):
            nn.init.normal_(layer.weight, std=0.02 if layer is self.bias else width**-0.5)
        self.outward = nn.Linear(out, self.outputs) if out else nn.Identity()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] != self.tokens:
            raise ValueError(f"input of {x.shape[1]} columns: this adapter takes {self.tokens}")
        real_BT = derive(lambda x_BT: ~x_BT.isnan(), x)
        return x.masked_fill(~real_BT, 0.0)[..., None], real_BT

    def to_input_shape(self, x_BTP: Tensor) -> Tensor:
        return x_BTP.squeeze(2)

    def content(self, x_NP: Tensor, place_N: Tensor) -> Tensor:
        x_N, number_N = x_NP.squeeze(1), self.number_T[place_N]
        row_N = self.first_T[place_N] + torch.where(number_N, 0, x_N.long())
        return self.table(row_N) * torch.where(number_N, x_N, 1.0)[:, None] + self.bias(place_N)

    def _scores(self, h_NE: Tensor, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[N, C]``, ``-inf`` outside each token's column, and predicted numbers ``[N]``."""
        y_NC, first_N = self.outward(h_NE).float(), self.first_T[place_N]
        at_C = torch.arange(self.outputs, device=y_NC.device)
        column_NC = (at_C >= first_N[:, None]) & (at_C < (first_N + self.count_T[place_N])[:, None])
        return y_NC.masked_fill(~column_NC, -torch.inf), y_NC.gather(1, first_N[:, None]).squeeze(1)

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        x_N, number_N = x_NP.squeeze(1), self.number_T[place_N]
        score_NC, y_N = self._scores(h_NE, place_N)
        class_N = self.first_T[place_N] + torch.where(number_N, 0, x_N.long())
        entropy_N = F.cross_entropy(score_NC, class_N, reduction="none")
        return {"": torch.where(number_N, (y_N - x_N.float()).square(), entropy_N)}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        score_NC, y_N = self._scores(h_NE, place_N)
        class_N = (score_NC.argmax(dim=1) - self.first_T[place_N]).to(y_N.dtype)
        return torch.where(self.number_T[place_N], y_N, class_N)[:, None]


class DistributionAdapter(Adapter):
    """Adapter for target class probabilities, float ``[B, T, C]``: ``loss_n = sum_c p_nc (log p_nc - log q_nc)``.

    The loss is the Kullback-Leibler divergence from the predicted ``q = softmax(W h)``, in float32 or finer. If one
    class is certain, it is the cross-entropy. Such tokens are only targets, never inputs. Source: masked regions of
    InterBERT (arXiv 2003.13198).

    Args:
        classes: C. length: T.

    >>> adapter = DistributionAdapter(classes=2, length=3)
    >>> adapter.build(1, 2)
    >>> adapter.outward = nn.Identity()
    >>> x_NP, place_N = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([0, 1])
    >>> [round(x, 3) for x in adapter.losses(torch.zeros(2, 2), x_NP, place_N)[""].tolist()]
    [0.693, 0.0]
    """

    def __init__(self, classes: int, length: int) -> None:
        super().__init__()
        require_value(classes >= 2 and length >= 2, f"classes {classes}, length {length}: at least 2 each")
        self.grid, self.classes = (length,), classes

    @property
    def numbers(self) -> int:
        return self.classes

    def build(self, width: int, out: int) -> None:
        super().build(width, out)
        self.outward = nn.Linear(out, self.classes) if out else nn.Identity()

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1:] != (self.tokens, self.classes):
            raise ValueError(f"target of {tuple(x.shape[1:])}: this adapter takes {(self.tokens, self.classes)}")
        return x, derive(lambda x_BTC: x_BTC.sum(dim=2) > 0, x)

    def to_input_shape(self, x_BTP: Tensor) -> Tensor:
        return x_BTP

    def losses(self, h_NE: Tensor, x_NP: Tensor, place_N: Tensor) -> dict[str, Tensor]:
        log_NP = promote(self.outward(h_NE)).log_softmax(dim=1)
        return {"": F.kl_div(log_NP, x_NP.to(log_NP), reduction="none").sum(dim=1)}

    def predict(self, h_NE: Tensor, place_N: Tensor) -> Tensor:
        return promote(self.outward(h_NE)).softmax(dim=1)
