"""Tokenizers of numbers that need no network: columns of a table, and the colours of a palette.

Letters: B samples, T ids, N training samples, C columns, Q borders, K codes of a column, M colours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from descant.modules.core.host import derive, has_host_copy, host_copy, to_device
from descant.modules.tokenizers.codes import CodeTokenizer


class ScalarTokens(CodeTokenizer):
    """Tokenizer of columns, one id each: the bin of a number, or the category (metadata of 4M-21).

        id_c = c codes + sum_q [x_c > border_cq],   border_cq: quantile q / bins of training,   x'_c: mean of a bin

    Each column is a layer with its own block of ids. Its place identifies it, as key tokens do in 4M-21. nan is a
    missing cell, and no token. Bins are fitted once, before the first step, and saved with the model.
    Source: Bachmann 2024 (4M-21, arXiv 2406.09406), where bins have equal width.

    Args:
        columns: one entry per column: 0 for a number, otherwise its number of categories.
        bins: number of bins of each number.
        samples: number of training samples that bins are fitted on.

    >>> tokenizer = ScalarTokens(columns=[0, 3], bins=2)
    >>> x_BC = torch.tensor([[0.0, 2.0], [1.0, 0.0], [4.0, 1.0], [7.0, torch.nan]])
    >>> tokenizer.fit(x_BC)
    >>> tokenizer.encode(x_BC).tolist(), tokenizer.real(x_BC)[3].tolist()
    ([[0, 5], [0, 3], [1, 4], [1, 3]], [True, False])
    >>> tokenizer.decode(torch.tensor([[1, 5]])).tolist()
    [[5.5, 2.0]]
    """

    border_CQ: Tensor
    mean_CK: Tensor

    def __init__(self, columns: list[int], bins: int = 16, samples: int = 400) -> None:
        if len(columns) < 2 or min(columns) < 0 or 1 in columns or bins < 2 or samples < 1:
            few = "at least two columns, each 0 for a number or its categories (2 or more), two bins and a sample"
            raise ValueError(f"columns {columns}, bins {bins}, samples {samples}: {few}")
        super().__init__([1], max(bins, *columns), len(columns))
        self.columns, self.bins = tuple(columns), bins
        self.samples = samples if 0 in columns else 0
        category_C = torch.tensor(columns)[:, None] > 0
        self.register_buffer("border_CQ", torch.full((len(columns), bins - 1), torch.nan).masked_fill(category_C, 0.0))
        self.register_buffer("mean_CK", torch.arange(float(self.codes)).repeat(len(columns), 1))
        self.fitted = not self.samples

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.fitted = not bool(self.border_CQ.isnan().any())

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        at_Q = torch.arange(1, self.bins, dtype=torch.float64) / self.bins
        for c in (c for c, categories in enumerate(self.columns) if not categories):
            x_N = x[:, c].detach().cpu().double()
            x_N = x_N[x_N.isfinite()]
            if not len(x_N):
                raise ValueError(f"column {c}: no number among {len(x)} samples: more samples, or leave it out")
            border_Q = x_N.quantile(at_Q).to(self.border_CQ)
            id_N = (x_N[:, None] > border_Q.cpu()).sum(dim=1)
            count_K, sum_K = (id_N.bincount(weights=w_N, minlength=self.codes) for w_N in (torch.ones_like(x_N), x_N))
            # an empty bin, between equal quantiles, gets its border
            edge_K = border_Q.cpu().double()[torch.arange(self.codes).clamp(max=self.bins - 2)]
            self.border_CQ[c], self.mean_CK[c] = (
                border_Q,
                torch.where(count_K > 0, sum_K / count_K.clamp(min=1), edge_K),
            )
        self.fitted = True

    def real(self, x: Tensor) -> Tensor:
        return derive(lambda x_BC: ~x_BC.isnan(), x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        if not self.fitted:
            raise ValueError("ScalarTokens: not fitted; a fit with Masked does it, or `fit(x)`")
        if x.ndim != 2 or x.shape[1] != self.layers:
            raise ValueError(f"input {list(x.shape[1:])}: this tokenizer takes {self.layers} columns")
        most_C = torch.tensor(self.columns)
        if has_host_copy(x):
            x_BC = host_copy(x).nan_to_num(0.0)
            for b, c in ((most_C > 0) & ((x_BC < 0) | (x_BC >= most_C))).nonzero()[:1].tolist():
                has = f"0 to {self.columns[c] - 1}"
                raise ValueError(f"column {c} of row {b}: category {float(x_BC[b, c]):g}, and it has {has}")
        bin_BC = (x[..., None] > self.border_CQ).sum(dim=2)
        category_BC = x.nan_to_num(0.0).long().clamp(0, self.codes - 1)
        return self.join_layers(torch.where(to_device(most_C, x.device) > 0, category_BC, bin_BC)[:, None])

    def decode(self, code_BT: Tensor) -> Tensor:
        id_BC = self.split(code_BT).squeeze(1)
        return self.mean_CK.expand(len(id_BC), -1, -1).gather(2, id_BC[..., None]).squeeze(2)

    def cover(self, x_BT: Tensor) -> Tensor:
        return x_BT


class PaletteTokens(CodeTokenizer):
    """Tokenizer of a palette's colours, one id per channel: ``id_mc = c levels + floor((x_mc + 1) levels / 2)``.

    :func:`descant.modules.transforms.palette.dominant_colours` finds those of a picture, the most frequent first. Ids
    keep the order of the colours.
    Source: Bachmann 2024 (4M-21, arXiv 2406.09406), which writes palettes as texts of quantised values.

    Args:
        colours: M.
        levels: number of levels of each channel, of equal width in -1..1.

    >>> tokenizer = PaletteTokens(colours=1, levels=4)
    >>> code_BT = tokenizer.encode(torch.tensor([[[-1.0, 0.1, 1.0]]]))
    >>> code_BT.tolist(), tokenizer.decode(code_BT).tolist()
    ([[0, 6, 11]], [[[-0.75, 0.25, 0.75]]])
    """

    def __init__(self, colours: int = 4, levels: int = 16) -> None:
        if colours < 1 or levels < 2:
            raise ValueError(f"colours {colours}, levels {levels}: at least 1 and 2")
        super().__init__([colours], levels, 3)

    def encode(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (*self.grid, 3):
            raise ValueError(f"input {list(x.shape[1:])}: this tokenizer takes {self.grid[0]} colours of 3 numbers")
        return self.join_layers(((x + 1) * (self.codes / 2)).floor().clamp(0, self.codes - 1).long())

    def decode(self, code_BT: Tensor) -> Tensor:
        return (self.split(code_BT) + 0.5) * (2 / self.codes) - 1

    def cover(self, x_BT: Tensor) -> Tensor:
        return x_BT[:, : self.grid[0], None].expand(-1, -1, 3)
