"""The masked recipe beside lightly and a plain loop over timm's ViT, and beside its ideal cost. On the CPU.

Letters: B samples, C channels, H and W pixels, T tokens, K visible ones, D width, P raw numbers of a token.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Row, contrastive
from benchmarks.timing import AS_FAST, median, ratio, time_interleaved
from descant.callbacks import KNN, LinearProbe
from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.masking.corruptions import UniformMask
from descant.modules.masking.decoders import At, Encoded, JointDecoder
from descant.modules.towers.vit import Layout, Trunk, from_timm
from descant.modules.training_setup.optim import parameter_groups
from descant.recipes.masked import Masked


@dataclass(frozen=True)
class Size:
    """Sizes of the model and batch that all sides train: timm's ViT-Tiny on 96 pixels, and a decoder of 96 x 4."""

    image: int = 96
    patch: int = 8
    width: int = 192
    depth: int = 12
    heads: int = 3
    out: int = 96
    out_depth: int = 4
    batch: int = 32
    ratio: float = 0.75


def timm_vit(size: Size) -> Any:
    """Build timm's ViT with random weights; nothing is downloaded."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size.image,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        num_classes=0,
    ).train()


def recipe(size: Size) -> Masked:
    """Build our recipe: one modality, 75 % masked, squared error of raw pixels."""
    return Masked(
        Adapters(image=PatchAdapter(size=[size.image, size.image], patch=size.patch)),
        Trunk(size.width, size.depth, size.heads),
        JointDecoder(size.out, size.out_depth, size.heads),
        UniformMask(size.ratio),
    ).train()


class Owner(nn.Module):
    """The parts that both rivals share: timm's ViT, and a decoder with its mask token and positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        self.size = size
        self.backbone = MaskedVisionTransformerTIMM(vit=timm_vit(size))
        with warnings.catch_warnings(action="ignore"):  # it warns of a rename in its next version
            self.decoder = MAEDecoderTIMM(
                num_patches=(size.image // size.patch) ** 2,
                patch_size=size.patch,
                embed_dim=size.width,
                decoder_embed_dim=size.out,
                decoder_depth=size.out_depth,
                decoder_num_heads=size.heads,
            )


class Lightly(Owner):
    """MAE as lightly's own example trains it."""

    def forward(self, x_BCHW: Tensor, keep_BK: Tensor | None = None, mask_BT: Tensor | None = None) -> Tensor:
        from lightly.models import utils

        rows, tokens = len(x_BCHW), self.backbone.sequence_length
        if keep_BK is None or mask_BT is None:
            keep_BK, mask_BT = utils.random_token_mask((rows, tokens), mask_ratio=self.size.ratio, device=x_BCHW.device)
        h_BKD = self.backbone.encode(images=x_BCHW, idx_keep=keep_BK)
        h_BKE = self.decoder.embed(h_BKD)
        y_BTE = utils.repeat_token(self.decoder.mask_token, (rows, tokens))
        y_BTE = utils.set_at_index(y_BTE, keep_BK, h_BKE.type_as(y_BTE))
        y_BTP = self.decoder.predict(utils.get_at_index(self.decoder.decode(y_BTE), mask_BT))
        target = utils.get_at_index(utils.patchify(x_BCHW, self.size.patch), mask_BT - 1)
        return F.mse_loss(y_BTP, target)


class Plain(Owner):
    """MAE as a plain loop: noise, argsort, gather; a mask token at every masked place; the error times the mask."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        vit, decoder, p = self.backbone.vit, self.decoder, self.size.patch
        h_BTD = vit.patch_embed(x_BCHW) + vit.pos_embed[:, 1:]
        rows, tokens, _ = h_BTD.shape
        order_BT = torch.rand(rows, tokens, device=x_BCHW.device).argsort(dim=1)
        back_BT, kept = order_BT.argsort(dim=1), int(tokens * (1 - self.size.ratio))
        h_BKD = h_BTD.gather(1, order_BT[:, :kept, None].expand(-1, -1, h_BTD.shape[2]))
        h_BKD = torch.cat([(vit.cls_token + vit.pos_embed[:, :1]).expand(rows, -1, -1), h_BKD], dim=1)
        h_BKE = decoder.decoder_embed(vit.norm(vit.blocks(h_BKD)))
        mask_BTE = decoder.mask_token.expand(rows, tokens - kept, -1)
        y_BTE = torch.cat([h_BKE[:, 1:], mask_BTE], dim=1).gather(1, back_BT[..., None].expand(-1, -1, self.size.out))
        y_BTP = decoder.predict(decoder.decode(torch.cat([h_BKE[:, :1], y_BTE], dim=1)))[:, 1:]
        side = self.size.image // p
        target = x_BCHW.view(rows, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1).reshape(rows, tokens, -1)
        mask_BT = (back_BT >= kept).float()
        return ((y_BTP - target).square().mean(dim=2) * mask_BT).sum() / mask_BT.sum()


def alike(model: Any, owner: Any) -> None:
    """Copy the owner's weights and positions to our recipe."""
    size, vit, decoder = owner.size, owner.backbone.vit, owner.decoder
    state = from_timm({k: v for k, v in vit.state_dict().items()})
    adapter, ours = model.adapters["image"], model.decoder
    trunk = model.towers["encoder"]
    trunk.load_state_dict({k: v for k, v in state.items() if k in trunk.state_dict()})
    blocks = {k.replace("decoder_blocks.", "blocks."): v for k, v in decoder.state_dict().items()}
    theirs = from_timm(blocks)
    ours.layers.load_state_dict({k.removeprefix("layers."): v for k, v in theirs.items() if k.startswith("layers.")})
    # their pixels are ordered by row, column, colour; ours, like the patch embedding's, by colour, row, column
    order_P = torch.arange(size.patch**2 * 3).view(size.patch, size.patch, 3).permute(2, 0, 1).flatten()
    with torch.no_grad():
        adapter.inward.weight.copy_(vit.patch_embed.proj.weight.flatten(1))
        adapter.inward.bias.copy_(vit.patch_embed.proj.bias)
        adapter.place_TD.copy_(vit.pos_embed[0, 1:])
        adapter.modality_D.zero_()
        adapter.outward[0].weight.copy_(decoder.decoder_pred.weight[order_P])
        adapter.outward[0].bias.copy_(decoder.decoder_pred.bias[order_P])
        ours.inward.load_state_dict(decoder.decoder_embed.state_dict())
        ours.norm.load_state_dict(decoder.decoder_norm.state_dict())
        ours.mask_E.copy_(decoder.mask_token.flatten())
        ours.places.place_image.copy_(decoder.decoder_pos_embed[0, 1:])
        ours.places.modality["image"].zero_()


def our_loss(model: Masked, batch: Batch) -> Tensor:
    return model.step(model.terms(batch), batch).total


def disagreement(model: Any, owner: Any, batch: Batch) -> tuple[float, float]:
    """Return relative differences of loss and of the first block's weight gradient, with the same tokens masked."""
    model.zero_grad()
    owner.zero_grad()
    _, real = model.raw(batch)
    visible_BT = model.corruption(real, model.grids, batch.rng_seed).visible["image"]
    rows = len(batch)
    first = torch.zeros(rows, 1, dtype=torch.long, device=batch.device)  # their place 0 is the class token's
    keep_BK, mask_BT = (1 + (mask.nonzero()[:, 1]).view(rows, -1) for mask in (visible_BT, ~visible_BT))
    ours, theirs = our_loss(model, batch), owner(batch.inputs["image"], torch.cat([first, keep_BK], dim=1), mask_BT)
    torch.autograd.backward([ours, theirs])
    own, other = model.towers["encoder"].layers[0].qkv.weight.grad, owner.backbone.vit.blocks[0].attn.qkv.weight.grad
    assert own is not None and other is not None
    loss, loss_owner = float(ours.detach()), float(theirs.detach())
    model.zero_grad()
    owner.zero_grad()
    return abs(loss - loss_owner) / loss_owner, float((own - other).abs().max() / other.abs().max())


def batches(size: Size, number: int = 4, device: str = "cpu") -> list[Batch]:
    made = []
    for k in range(number):
        image = torch.randn(size.batch, 3, size.image, size.image).to(device)
        draw = torch.arange(size.batch, device=device) + k * size.batch
        present = torch.ones(size.batch, dtype=torch.bool, device=device)
        made.append(Batch({"image": image}, {"image": present}, rng_seed=draw))
    return made


def steps(size: Size, device: str = "cpu", bf16: bool = False) -> dict[str, Callable[[], None]]:
    """Return training steps of ours, of lightly's MAE and of a plain loop over timm's ViT.

    All three have the same ViT, decoder, batch and optimizer. Ours and lightly's start from the same weights. Before
    that, both must compute the same loss and gradients for the same masked tokens.
    """
    torch.manual_seed(0)
    ours, lightly, plain = recipe(size), Lightly(size), Plain(size)
    alike(ours, lightly)
    for model in (ours, lightly, plain):
        model.to(device)
    data = batches(size, device=device)
    loss, gradient = disagreement(ours, lightly, data[0])
    if not (loss <= 1e-5 and gradient <= 1e-4):
        raise RuntimeError(f"not the same step as lightly's: loss off by {loss:.1e}, gradient by {gradient:.1e}")
    made = {"ours": contrastive.step_of(partial(our_loss, ours), data, adamw(ours), bf16)}
    for name, owner in (("lightly", lightly), ("timm_loop", plain)):
        made[name] = contrastive.step_of(partial(_owner_loss, owner), data, adamw(owner), bf16)
    return made


def _owner_loss(owner: Owner, batch: Batch) -> Tensor:
    return owner(batch.inputs["image"])


def adamw(model: nn.Module) -> AdamW:
    return AdamW(parameter_groups(model), lr=1e-4, weight_decay=0.05, fused=True)


def step(size: Size | None = None, pairs: int = 40) -> Iterator[Row]:
    """Measure our training step against lightly's MAE and a plain loop over timm's ViT: the owner's time / ours."""
    ours, *owners = steps(size or Size()).items()
    for name, owner in owners:
        result = ratio(ours[1], owner, pairs)
        yield Row.at_least(f"masked/step_vs_{name}", result.value, AS_FAST, result.interval)


def ideal(size: Size | None = None, pairs: int = 40) -> Iterator[Row]:
    """Measure the step over the ideal one: ``(1 - ratio) encoder + decoder``, forward and backward of each alone.

    The encoder runs on all tokens of an image, and a quarter of its time is counted. The decoder runs on all tokens, as
    it must. The ideal includes nothing else: no masks, no patches, no loss.
    """
    size = size or Size()
    torch.manual_seed(0)
    model, data = recipe(size), batches(size, 1)[0]
    tokens = (size.image // size.patch) ** 2
    counts = torch.full((size.batch,), tokens)
    whole = Layout([torch.ones_like(counts), counts])
    h_ND = torch.randn(size.batch * tokens, size.width, requires_grad=True)
    row_N = torch.arange(size.batch).repeat_interleave(tokens)
    place_N = torch.arange(tokens).repeat(size.batch)
    kept = round(tokens * (1 - size.ratio))
    is_kept_N = place_N < kept
    seen, asked = (
        At(row_N[k], place_N[k], torch.full_like(counts, n))
        for k, n in ((is_kept_N, kept), (~is_kept_N, tokens - kept))
    )
    encoded = Encoded({"image": h_ND[is_kept_N].detach()}, {"image": seen}, torch.randn(size.batch, size.width))

    def measured() -> None:
        torch.autograd.backward(our_loss(model, data))

    def encoder() -> None:
        torch.autograd.backward(model.towers["encoder"](h_ND, whole).h_BTD.sum())

    def decoder() -> None:
        torch.autograd.backward(model.decoder(encoded, {"image": asked})["image"].sum())

    times = time_interleaved([measured, encoder, decoder], pairs)
    result = median([float(m / ((1 - size.ratio) * e + d)) for m, e, d in times])
    yield Row.at_most("masked/step_vs_ideal", result.value, 1.25, result.interval)


def absent(size: Size | None = None, pairs: int = 40) -> Iterator[Row]:
    """Compare a batch in which each sample lacks one of two modalities with the full batch: time and FLOPs.

    Half of the samples lack the first modality, and half the second.
    """
    size = size or Size(batch=16)
    torch.manual_seed(0)
    adapters = Adapters(others={m: PatchAdapter([size.image, size.image], size.patch) for m in ("image", "depth")})
    model = Masked(
        adapters,
        Trunk(size.width, size.depth, size.heads),
        JointDecoder(size.out, size.out_depth, size.heads),
        UniformMask(size.ratio),
    ).train()
    inputs = {m: torch.randn(size.batch, 3, size.image, size.image) for m in adapters}
    all_B = torch.ones(size.batch, dtype=torch.bool)
    half_B = torch.arange(size.batch) % 2 == 0
    full, half = Batch(inputs, dict.fromkeys(adapters, all_B)), Batch(inputs, {"image": half_B, "depth": ~half_B})

    def run(batch: Batch) -> None:
        torch.autograd.backward(our_loss(model, batch))

    result = ratio(partial(run, full), partial(run, half), pairs)  # the time of the half batch / that of the whole
    yield Row.at_most("masked/half_absent_time", result.value, 0.65, result.interval)
    flops = []
    for batch in (half, full):
        with FlopCounterMode(display=False) as counter:
            run(batch)
        flops.append(counter.get_total_flops())
    # half of the tokens, and the global token of each sample, which is always present
    yield Row.at_most("masked/half_absent_flops", flops[0] / flops[1], 0.52)


def fashion(run: Path = Path("runs/masked-fashion"), bank: int = 20_000) -> Iterator[Row]:
    """Compare the newest run of ``masked/fashion`` here with its twin and with pixels: errors of k-NN and linear probe.

    The twin is the same model with random weights. All three are judged in the same way, on the usual test set, from
    the same training pictures.
    """
    if not (run / "latest").exists():
        print(f"masked/fashion: skipped, no {run} (descant fit --config masked/fashion makes it)", flush=True)
        return
    from descant.datamodules.corpora.fashion import Fashion
    from descant.modules.io import saved
    from descant.recipes.base.rebuild import build, rebuild

    found = saved.find(run)
    data = Fashion(size=int(found.config["data"]["init_args"]["size"]), bank=bank, eval_batch_size=500)
    sets = [data.bank_set(), data.evaluation_sets("test")["test"]]
    batches = [[data.on_after_batch_transfer(batch, 0) for batch in data.evaluation_loader(one)] for one in sets]
    label_N, label_Q = (torch.cat([batch.targets["label"] for batch in of]) for of in batches)
    trained, untrained = rebuild(found), build(found)
    views: dict[str, Callable[[Batch], Tensor]] = {
        "trained": lambda batch: trained.embed(batch)["image"],  # type: ignore[operator]
        "untrained": lambda batch: untrained.embed(batch)["image"],  # type: ignore[operator]
        "pixels": lambda batch: F.normalize(batch.inputs["image"].flatten(1), dim=1),
    }
    judges: dict[str, Any] = {"knn": KNN("label"), "probe": LinearProbe("label")}
    error: dict[str, dict[str, float]] = {judge: {} for judge in judges}
    for name, view in views.items():
        with torch.no_grad():
            z_ND, z_QD = (torch.cat([view(batch) for batch in of]) for of in batches)
        for kind, judge in judges.items():
            score = judge.score(z_ND, label_N, {"test": (z_QD, label_Q)}, int(label_N.max()) + 1)["test"]
            error[kind][name] = 1 - float(score)
            yield Row.informs(f"masked/fashion_{kind}_{name}", 1 - error[kind][name])
    for kind, of in error.items():
        yield Row.at_most(f"masked/fashion_{kind}_error_vs_untrained", of["trained"] / of["untrained"], 0.7)
        yield Row.at_most(f"masked/fashion_{kind}_error_vs_pixels", of["trained"] / of["pixels"], 1.0)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    yield Row.at_most("masked/fashion_minutes", float(metrics["train_seconds"]) / 60, 20.0)
