"""Ragged attention, and timm's ViT weight for weight. Letters: B samples, N tokens of all, K of one, D width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from descant.export.formats.timm_vit import to_timm
from descant.modules.adaptation.lora import Lora
from descant.modules.core.batch import Batch
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.masking.decoders import JointDecoder
from descant.modules.towers.image import Block
from descant.modules.towers.vit import Layout, RaggedBlock, Trunk, attend, take
from descant.modules.training_setup.activation_checkpointing import Checkpointing
from descant.recipes import Masked
from tests.tolerance import BF16, F32, F64, rounding, ulps


def counts(*kinds: list[int]) -> list[Tensor]:
    return [torch.tensor(kind) for kind in kinds]


@pytest.mark.parametrize(
    "kinds", [([2, 2, 2], [3, 3, 3]), ([1, 1, 1], [2, 0, 5]), ([2, 0, 3], [1, 3, 0]), ([0, 0, 0],)]
)
def test_join_and_part_are_inverse_and_samples_are_contiguous(kinds: tuple[list[int], ...]) -> None:
    layout, each = Layout(counts(*kinds)), []
    for s, kind in enumerate(kinds):
        each.append(torch.tensor([[100.0 * s + b, k] for b, n in enumerate(kind) for k in range(n)]).view(-1, 2))
    joined = layout.join(each)
    for there, back in zip(each, layout.part(joined), strict=True):
        assert torch.equal(there, back)
    assert torch.equal(joined[:, 0] % 100, layout.rows.float())
    done = 0
    for (samples, tokens), piece in zip(layout.pieces, layout.split(joined), strict=True):
        assert piece.shape[:2] == (samples, tokens)
        for row in piece:
            assert len((row[:, 0] % 100).unique()) <= 1
            done += len(row)
    assert done == sum(map(sum, kinds))


def test_two_layouts_by_the_same_have_the_same_pieces() -> None:
    queries, context = torch.tensor([4, 0, 4, 2]), torch.tensor([3, 9, 5, 3])
    by_B = queries * 10 + context
    a, b = Layout([queries], by_B), Layout([context], by_B)
    assert torch.equal(a.sample_B, b.sample_B)
    assert a.pieces == [(1, 0), (1, 2), (1, 4), (1, 4)] and b.pieces == [(1, 9), (1, 3), (1, 3), (1, 5)]


def test_a_row_that_is_taken_once_has_the_gradient_of_indexing() -> None:
    h_ND = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([3, 0, 4])
    assert torch.autograd.gradcheck(lambda h: take(h, index), (h_ND,))
    torch.testing.assert_close(take(h_ND, index), h_ND[index], rtol=0, atol=0)


def test_ragged_attention_stays_within_a_sample() -> None:
    """Against the plain block, a sample at a time."""
    torch.manual_seed(0)
    ragged, plain = RaggedBlock(16, 4).double(), Block(16, 4).double()
    plain.load_state_dict(ragged.state_dict())
    plain.norm_1.eps = plain.norm_2.eps = 1e-6
    lengths = [3, 1, 3, 7, 0]
    layout = Layout(counts(lengths))
    h_ND = torch.randn(sum(lengths), 16, dtype=torch.float64)
    (out,) = layout.part(ragged(layout.join([h_ND]), layout))
    for mine, alone in zip(out.split(lengths), h_ND.split(lengths), strict=True):
        if len(alone):
            # a block of sums over 16 to 64 numbers
            torch.testing.assert_close(mine, plain(alone[None])[0], rtol=0, atol=ulps(512, F64))


@pytest.mark.parametrize("queries", [5, 9])
def test_unfused_attention_equals_fused(queries: int) -> None:
    torch.manual_seed(0)
    q, k, v = exact = [torch.randn(2, 3, n, 8, requires_grad=True) for n in (queries, 9, 9)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    far = attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(*far)
    ours = attend(rounded[0], rounded[1], rounded[2])
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), far[0], rtol=0, atol=ulps(4, BF16))
    weight = torch.randn(far[0].shape)
    (far[0] * weight).sum().backward()
    (ours * weight).sum().backward()
    for a, b in zip(exact, rounded, strict=True):
        assert a.grad is not None and b.grad is not None
        # bfloat16 in four products whose gradients are of size 5: 2.5 ulps of it
        torch.testing.assert_close(b.grad.float(), a.grad, rtol=0, atol=0.1)
        # the root of it is 4 ulps of bfloat16
        assert (b.grad.float() - a.grad).square().mean() < 1e-3 * a.grad.square().mean()


def test_inner_modules_get_the_sample_of_each_token() -> None:
    seen: list[Any] = []
    trunk: Any = Trunk(8, 1, 2)
    trunk.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(trunk.row_tracker.current))
    trunk(torch.randn(5, 8), Layout(counts([1, 1], [1, 4])))
    assert seen[0].tolist() == [0, 0, 1, 1, 1, 1, 1] and trunk.row_tracker.current is None


def test_compute_falls_with_what_is_absent() -> None:
    trunk, flops = Trunk(32, 2, 2), []
    for kinds in ([8] * 6, [8, 0] * 3, [4] * 6):
        with FlopCounterMode(display=False) as counter:
            trunk(torch.randn(sum(kinds), 32), Layout(counts([1] * 6, kinds)))
        flops.append(counter.get_total_flops())
    # attention and heads count beside the linear maps: up to 2%
    assert flops[1] / flops[0] == pytest.approx((24 + 6) / (48 + 6), rel=0.02)
    assert flops[2] < 0.56 * flops[0]


def test_dense_and_ragged_inputs_agree() -> None:
    torch.manual_seed(0)
    trunk = Trunk(16, 2, 2)
    x_BKD, mask_BK = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.bool)
    dense = trunk(x_BKD).h_BTD
    mask_BK[1, 3:] = False
    ragged = trunk(x_BKD, mask_BK)
    torch.testing.assert_close(ragged.h_BTD[[0, 2]], dense[[0, 2]], **rounding(64, F32))
    # two blocks of sums over 16 to 64 numbers
    torch.testing.assert_close(ragged.h_BTD[1, :3], trunk(x_BKD[1:2, :3]).h_BTD[0], **rounding(64, F32))
    assert (ragged.h_BTD[1, 3:] == 0).all()


def timm_vit() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=7)


def test_a_pretrained_plain_vit_loads_and_gives_its_own_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm_vit().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    file = tmp_path / "vit.pth"
    torch.save(model.state_dict(), file)
    trunk = Trunk(24, 2, 3, weights=file)
    adapter: Any = PatchAdapter([16, 16], 4, weights=file)
    adapter.build(24, 0)
    x = torch.randn(3, 3, 16, 16)
    x_BTP, _ = adapter.raw(x)
    positions = model.pos_embed.detach()[0]
    h_ND = adapter.inward(x_BTP.flatten(0, 1)) + positions[1:].repeat(3, 1)
    with torch.no_grad():
        trunk.cls_D.add_(positions[0])
        ours = trunk(h_ND, Layout(counts([1] * 3, [16] * 3))).h_BTD
        theirs = model.forward_features(x)
    torch.testing.assert_close(ours[:3], theirs[:, 0], rtol=0, atol=ulps(64, F32))
    torch.testing.assert_close(ours[3:].view(3, 16, 24), theirs[:, 1:], rtol=0, atol=ulps(64, F32))


def test_a_trained_one_loads_as_a_plain_vit_of_timm() -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    adapters = Adapters(image=PatchAdapter([16, 16], 4), sketch=PatchAdapter([16, 16], 4, channels=1))
    model: Any = Masked(adapters, Trunk(24, 2, 3), JointDecoder(12, 1, 3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0).eval()
    plain.load_state_dict(to_timm(model.towers["encoder"], model.adapters["image"]))
    x, nothing = torch.randn(3, 3, 16, 16), torch.zeros(3, 1, 16, 16)
    there = torch.ones(3, dtype=torch.bool)
    batch = Batch({"image": x, "sketch": nothing}, {"image": there, "sketch": ~there})
    with torch.no_grad():
        mean_BD = plain.forward_features(x)[:, 1:].mean(dim=1)
        torch.testing.assert_close(model.embed(batch)["image"], F.normalize(mean_BD, dim=1), rtol=0, atol=ulps(64, F32))
    with pytest.raises(ValueError, match="in patches of two axes"):
        to_timm(model.towers["encoder"], PatchAdapter([4, 4, 4], 2, channels=1))


@pytest.mark.parametrize(
    ("width", "depth", "message"), [(24, 3, "not of a ViT of width 24 and depth 3: 12 keys missing"), (12, 2, "shape")]
)
def test_weights_of_another_vit_are_refused(width: int, depth: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "vit.pth"
    torch.save(timm_vit().state_dict(), file)
    with pytest.raises(ValueError, match=message):
        Trunk(width, depth, 3, weights=file)


def recipe_of(trunk: Trunk) -> torch.nn.Module:
    recipe = torch.nn.Module()
    recipe.towers = torch.nn.ModuleDict({"encoder": trunk})
    return recipe


@pytest.mark.parametrize("part", [Checkpointing(), Lora(r=2, targets=["qkv"])], ids=["checkpointing", "lora"])
def test_the_trunk_is_changed_as_any_tower(part: Checkpointing | Lora) -> None:
    torch.manual_seed(0)
    trunk = Trunk(16, 2, 2)
    layout, h_ND = Layout(counts([1, 1], [2, 3])), torch.randn(5, 16)
    before = trunk(h_ND, layout).h_BTD
    recipe = recipe_of(trunk)
    part.apply(recipe)
    after = trunk(h_ND, layout).h_BTD
    torch.testing.assert_close(before, after, **rounding(64, F32))
    after.square().sum().backward()
    grown = {name for name, p in trunk.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in grown) if isinstance(part, Lora) else len(grown) > 20
