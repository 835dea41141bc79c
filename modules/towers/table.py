"""Tower of tables with missing cells.

Letters: B samples, C columns, N with numbers, K with categories, T = 1 + C tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from descant.modules.core.host import derive, everyone
from descant.modules.core.objects import record_arguments
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import Block


def present_keys(mask_BT: Tensor) -> Tensor:
    """Make an attention mask ``[B, 1, T, T]`` in which a token attends to present tokens and to itself.

        allowed_bqk = mask_bk or q = k

    >>> present_keys(torch.tensor([[True, False]]))[0, 0].tolist()
    [[True, False], [True, True]]
    """
    diagonal_TT = torch.eye(mask_BT.shape[1], dtype=torch.bool, device=mask_BT.device)
    return (mask_BT[:, None] | diagonal_TT)[:, None]


class TableTower(Tower):
    """Transformer over the columns of a table, in which no token attends to missing cells (TIP's encoder).

        h_c = x_c w + b + e_c      of a number (standardised by the data)
        h_c = v[x_c] + e_c         of a category
        h_c = m + e_c              of a missing cell
        h   = norm(block_n(... block_1(norm([class token; h]))))

    ``x_BC -> [B, 1 + C, width]``, the class token first. A cell is missing if it is nan, or if ``mask`` is False; then
    its stored value changes no bit of any token. The token of a missing column attends to all present ones, so that its
    value can be predicted from it. ``missing`` decides which tokens attend to it.

    Source: Du 2024 (TIP, arXiv 2407.07582) and its release: one ``w`` and ``b`` for all numbers, a norm of the
    embeddings, and no attention to missing columns except from themselves. TIP's fusion layers attend to them; by
    default they do not here. The norm at the end and the initialisation are those of our other towers.

    Args:
        columns: one entry per column: 0 for a number, otherwise its number of categories (2 or more).
        width: D.
        depth: number of blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP, divided by D.
        dropout: probability on the attention weights and on both branches of a block.
        missing: which tokens attend to the token of a missing column. ``blocked``: none, and pools ignore it;
            ``fused``: those of fusion layers, as in TIP's release, and pools see it; ``attended``: also those of the
            other columns.

    >>> tower = TableTower([0, 3], width=8, depth=1, heads=2)
    >>> tower(torch.tensor([[0.5, float("nan")]])).mask_BT.tolist()
    [[True, True, False]]
    """

    number_N: Tensor
    category_K: Tensor
    first_K: Tensor
    order_C: Tensor

    def __init__(
        self,
        columns: list[int],
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        missing: Literal["blocked", "fused", "attended"] = "blocked",
    ) -> None:
        self.arguments = record_arguments(locals())
        super().__init__()
        if not columns or min(columns) < 0 or 1 in columns:
            raise ValueError(f"columns {columns}: each 0 for a number, or its number of categories (2 or more)")
        self.width, self.columns = width, tuple(columns)
        self.attended, self.fused = missing == "attended", missing != "blocked"
        numbers = [c for c, count in enumerate(columns) if not count]
        categories = [c for c, count in enumerate(columns) if count]
        first = [sum(columns[:c]) for c in categories]  # one table of embeddings holds all categories
        places = {c: k for k, c in enumerate([*numbers, *categories])}
        for name, values in (("number_N", numbers), ("category_K", categories), ("first_K", first)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.long), persistent=False)
        self.register_buffer("order_C", torch.tensor([places[c] for c in range(len(columns))]), persistent=False)
        self.codes = nn.Embedding(max(sum(columns), 1), width)
        self.weight_D, self.bias_D = nn.Parameter(torch.randn(width) * 0.02), nn.Parameter(torch.zeros(width))
        self.missing_D, self.class_D = (nn.Parameter(torch.randn(width) * 0.02) for _ in range(2))
        self.column_CD = nn.Parameter(torch.randn(len(columns), width) * 0.02)
        nn.init.normal_(self.codes.weight, std=0.02)
        self.norm_in, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(Block(width, heads, mlp_ratio, dropout) for _ in range(depth))

    def require_data(self, name: str, data: Any, stage: str) -> None:
        columns = getattr(data, "table_columns", {}).get(name)
        if columns is not None and stage == "fit":  # an evaluated run has the columns of its checkpoint
            require_columns(name, columns, self)

    def embed(self, x_BC: Tensor, mask_BC: Tensor | None = None) -> Tensor:
        """Embed the class token and all cells, ``[B, C] -> [B, 1 + C, D]``, before the blocks."""
        mask_BC = derive(_present, x_BC) if mask_BC is None else mask_BC
        x_BC = x_BC.masked_fill(~mask_BC, 0.0)
        # products instead of a linear layer, in which autocast would round the numbers
        number_BND = x_BC[:, self.number_N, None] * self.weight_D + self.bias_D
        category_BKD = self.codes(x_BC[:, self.category_K].long() + self.first_K)
        h_BCD = torch.cat([number_BND, category_BKD], dim=1)[:, self.order_C]
        h_BCD = torch.where(mask_BC[..., None], h_BCD, self.missing_D) + self.column_CD
        return self.norm_in(torch.cat([self.class_D.expand(len(x_BC), 1, -1), h_BCD], dim=1))

    def encode(self, h_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Apply blocks and norm; a token whose mask is False is attended to only by itself."""
        allowed_B1TT = None if mask_BT is None else present_keys(mask_BT)
        for layer in self.layers:
            h_BTD = layer(h_BTD, allowed_B1TT)
        return self.norm(h_BTD)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        """Encode a table. ``mask``: bool ``[B, C]``, True at present cells; by default those that are not nan."""
        if x.shape[1:] != (len(self.columns),):
            raise ValueError(f"columns: a table of {tuple(x.shape[1:])} columns; this tower takes {len(self.columns)}")
        if x.dtype in _EXACT and max(self.columns) > _EXACT[x.dtype]:
            raise ValueError(f"columns: {x.dtype} rounds codes above {_EXACT[x.dtype]}; use bf16-mixed")
        mask_BC = derive(_present, x) if mask is None else mask
        mask_BT = derive(_with_class, mask_BC)
        all_BT = everyone(mask_BT.shape, x.device)
        h_BTD = self.encode(self.embed(x, mask_BC), all_BT if self.attended else mask_BT)
        return Tokens(h_BTD, all_BT if self.fused else mask_BT)


#: dtype -> the number up to which all whole numbers are exact.
_EXACT = {torch.bfloat16: 256, torch.float16: 2048}


def _present(x_BC: Tensor) -> Tensor:
    return ~x_BC.isnan()


def _with_class(mask_BC: Tensor) -> Tensor:
    return torch.cat([everyone((len(mask_BC), 1), mask_BC.device), mask_BC], dim=1)


def require_columns(modality: str, columns: Sequence[int], tower: TableTower) -> None:
    """Check that the columns of a data module's table fit a tower.

    Args:
        columns: of the data, 0 for a number, otherwise its number of categories.

    >>> require_columns("table", [0, 3], TableTower([0, 8], width=8, depth=1))
    """
    known = tower.columns
    same = len(known) == len(columns) and all(
        bool(a) == bool(b) and a <= b for a, b in zip(columns, known, strict=True)
    )
    if not same:
        raise ValueError(f"model.towers: {modality}: columns {list(known)}: the data's table has {list(columns)}")
