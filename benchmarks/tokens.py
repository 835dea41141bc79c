"""4M's step beside a plain loop over timm's blocks, its compute by tokens, and parallel beside sequential decoding.

Letters: B samples, C channels, H and W pixels, T tokens, K visible and Q target ones, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Row, contrastive
from benchmarks.masked import adamw, our_loss
from benchmarks.timing import AS_FAST, ratio
from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.masking.any_to_any import AnyToAnyDecoder
from descant.modules.masking.discrete_adapters import TokenAdapter
from descant.modules.masking.reductions import MeanOfModalities
from descant.modules.masking.sampler import RandomFirst, Sampler
from descant.modules.masking.two_budgets import DirichletPair, TwoBudgets
from descant.modules.towers.vit import Trunk
from descant.recipes import Masked

#: Pixels of an image and of a patch, codes of an image and ids; inputs and targets of a step; widths, depths, heads.
IMAGE, PATCH, CODES, IDS, SEEN, ASKED = 64, 8, 36, 256, 32, 24
WIDTH, DEPTH, HEADS, OUT, OUT_DEPTH = 192, 6, 3, 96, 4
#: Allowed range of compute over the share of tokens that are inputs and targets.
PROPORTIONAL = (0.85, 1.15)


def recipe(seen: int = SEEN, asked: int = ASKED) -> Masked:
    """Build a recipe with patches of an image as inputs, and its codes as targets: the component rgb2all of 4M."""
    torch.manual_seed(0)
    adapters = Adapters(image=PatchAdapter([IMAGE, IMAGE], PATCH), others={"codes": TokenAdapter(IDS, CODES, pad=None)})
    budgets = TwoBudgets(seen, asked, [DirichletPair({"image": 1000.0}, {"codes": 0.5})])
    return Masked(
        adapters,
        Trunk(WIDTH, DEPTH, HEADS),
        AnyToAnyDecoder(OUT, OUT_DEPTH, HEADS),
        budgets,
        reduction=MeanOfModalities(),
    ).train()


class Plain(nn.Module):
    """The same sizes as a plain loop: noise, argsort, gather, timm's blocks, torch's cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        from timm.layers.mlp import Mlp
        from timm.models.vision_transformer import Attention, VisionTransformer

        self.vit = VisionTransformer(
            img_size=IMAGE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0
        )
        self.inward, self.outward = nn.Linear(WIDTH, OUT), nn.Linear(OUT, IDS)
        self.seen_TE, self.asked_TE = nn.Parameter(torch.zeros(65, OUT)), nn.Parameter(torch.zeros(CODES, OUT))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{f"norm_{k}": nn.LayerNorm(OUT) for k in "1234"},
                    "own": Attention(OUT, HEADS, qkv_bias=True),
                    "cross": nn.MultiheadAttention(OUT, HEADS, batch_first=True),
                    "mlp": Mlp(OUT, 4 * OUT),
                }
            )
            for _ in range(OUT_DEPTH)
        )
        self.norm = nn.LayerNorm(OUT)

    def forward(self, batch: Batch) -> Tensor:
        h_BTD = self.vit.patch_embed(batch.inputs["image"]) + self.vit.pos_embed[:, 1:]
        B, T, _ = h_BTD.shape
        seen_BK = torch.rand(B, T).argsort(dim=1)[:, :SEEN]
        asked_BQ = torch.rand(B, CODES).argsort(dim=1)[:, :ASKED]
        h_BKD = h_BTD.gather(1, seen_BK[..., None].expand(-1, -1, WIDTH))
        first = (self.vit.cls_token + self.vit.pos_embed[:, :1]).expand(B, -1, -1)
        h_BKD = self.vit.norm(self.vit.blocks(torch.cat([first, h_BKD], dim=1)))
        c_BKE = self.inward(h_BKD) + F.pad(self.seen_TE[seen_BK + 1], (0, 0, 1, 0))
        y_BQE = self.asked_TE[asked_BQ]
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            y_BQE = y_BQE + layer["own"](layer["norm_1"](y_BQE))
            c = layer["norm_2"](c_BKE)
            y_BQE = y_BQE + layer["cross"](layer["norm_3"](y_BQE), c, c, need_weights=False)[0]
            y_BQE = y_BQE + layer["mlp"](layer["norm_4"](y_BQE))
        score_BQC = self.outward(self.norm(y_BQE))
        return F.cross_entropy(score_BQC.flatten(0, 1), batch.inputs["codes"].gather(1, asked_BQ).flatten())


def batches(rows: int, number: int = 4) -> list[Batch]:
    g, made = torch.Generator().manual_seed(0), []
    for k in range(number):
        inputs = {"image": torch.randn(rows, 3, IMAGE, IMAGE, generator=g)}
        inputs["codes"] = torch.randint(0, IDS, (rows, CODES), generator=g)
        here = {m: torch.ones(rows, dtype=torch.bool) for m in inputs}
        made.append(Batch(inputs, here, rng_seed=torch.arange(rows) + k * rows))
    return made


def step(pairs: int = 40, rows: int = 32) -> Iterator[Row]:
    """Measure a training step of ours against the plain loop: its time / ours."""
    ours, plain, data = recipe(), Plain().train(), batches(rows)
    result = ratio(
        contrastive.step_of(partial(our_loss, ours), data, adamw(ours)),
        contrastive.step_of(plain, data, adamw(plain)),
        pairs,
    )
    yield Row.at_least("tokens/step_vs_plain", result.value, AS_FAST, result.interval)


def decode(pairs: int = 30, rows: int = 8) -> Iterator[Row]:
    """Decode 36 codes of an image: time of 36 steps of one code / that of 8 parallel steps; by steps alone 4.5."""
    model, (data,) = recipe().eval(), batches(rows, 1)
    fast, slow = Sampler(steps=8), Sampler(steps=CODES, order=RandomFirst())
    result = ratio(
        lambda: fast(model, data, ["image"], ["codes"]), lambda: slow(model, data, ["image"], ["codes"]), pairs
    )
    yield Row.at_least("tokens/parallel_decoding", result.value, 2.5, result.interval)


def compute(pairs: int = 30, rows: int = 32) -> Iterator[Row]:
    """Measure operations and time of a step over a share of the tokens, over that share of those of a step over all."""
    data, share = batches(rows), 0.5
    some, whole = recipe(SEEN, CODES // 2), recipe(2 * SEEN, CODES)
    flops = []
    for model in (some, whole):
        with FlopCounterMode(display=False) as counter:
            our_loss(model, data[0]).backward()
        flops.append(counter.get_total_flops())
    yield Row.within("tokens/operations_by_share", flops[0] / (share * flops[1]), PROPORTIONAL)
    less, more = (contrastive.step_of(partial(our_loss, model), data, adamw(model)) for model in (some, whole))
    yield Row.within("tokens/time_by_share", 1 / (share * ratio(less, more, pairs).value), PROPORTIONAL)
