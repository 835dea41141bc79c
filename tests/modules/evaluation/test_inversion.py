"""Modality inversion: against a loop written out, sample by sample, and with nothing of the encoders touched."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.protocols import Encodes, Inverts
from descant.modules.evaluation.inversion import Frame, ModalityInversion, normal, patch_frame, text_frame
from descant.modules.tokenizers.text import WordTokenizer
from descant.modules.towers import BagTower, ConvTower, PatchTower, TextTower, Tower, Towers
from descant.recipes import Contrastive
from tests.tolerance import F32, F64, conditioned, rounding, statistical, ulps

#: Starts of 0.02 times up to 4 deviations are scaled in float32.
STARTS = ulps(0.1, F32)
#: A step of Adam divides by a gradient, here of 1e-4 at the least, and sums over 16 to 64 numbers lie before it.
STEPS = conditioned(1e4, F64, terms=64)
CODEC = WordTokenizer(["a", "picture", "of", "fox"], length=8)


class Linear(nn.Module):
    """``z = normalise(W mean over tokens)``: an encoder whose gradient can be written out."""

    towers: Any = {}

    def __init__(self, width: int = 6, out: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(out, width, generator=generator, dtype=torch.float64))
        self.modes: list[bool] = []

    def encode_embeddings(self, h_BTD: Tensor, mask_BT: Tensor, modality: str) -> Tensor:
        self.modes.append(self.training)
        return F.normalize(h_BTD.mean(dim=1) @ self.w.T, dim=-1)


def frame() -> Frame:
    generator = torch.Generator().manual_seed(1)
    return Frame(torch.randn(3, 6, generator=generator, dtype=torch.float64), torch.tensor([1]))


def targets(rows: int, width: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def recipe(text: Tower | None = None, image: Tower | None = None) -> Contrastive:
    torch.manual_seed(0)
    text = text or TextTower(vocab=16, width=16, depth=2, heads=2, length=8, std=0.5, dropout=0.1)
    image = image or PatchTower(size=8, patch=4, width=16, depth=1, heads=2)
    return Contrastive(Towers(image=image, text=text), width=8).double()


def digest(model: nn.Module) -> str:
    values = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values.update(name.encode() + tensor.numpy().tobytes())
    return values.hexdigest()


# the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.01, 3.0])
def test_it_equals_adamw_written_out(decay: float) -> None:
    """One sample at a time, with the gradient of the cosine by hand and the update in numbers."""
    model, here, z_BD, key_B = Linear(), frame(), targets(3, 4), torch.tensor([5, 900, 31])
    values = ModalityInversion(steps=60, weight_decay=decay)(model, "text", here, z_BD, key_B)
    w = model.w.detach()
    for b in range(3):
        v = 0.02 * normal(key_B[b : b + 1], 6)[0].double()
        m, s = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        for step in range(1, 61):
            y = w @ ((here.h_TD.sum(dim=0) + v) / 3)
            cos, norm = z_BD[b] @ y / y.norm(), y.norm()
            g = -(w.T @ (z_BD[b] / norm - cos * y / norm**2)) / 3
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
            v = v * (1 - 0.02 * decay)
            v = v - 0.02 * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        torch.testing.assert_close(values.v_BVD[b, 0], v, rtol=0, atol=STARTS)
        z = F.normalize(w @ ((here.h_TD.sum(dim=0) + v) / 3), dim=0)
        torch.testing.assert_close(values.z_BD[b], z, rtol=0, atol=STARTS)
        assert float(values.cos_B[b]) == pytest.approx(float(z @ z_BD[b]), abs=STARTS)


def test_weight_decay_bounds_the_norm() -> None:
    """With a linear encoder and nothing around, the loss does not see the norm: without decay nothing holds it."""
    alone = Frame(torch.zeros(1, 6, dtype=torch.float64), torch.tensor([0]))
    norms = []
    for decay in (0.0, 0.01, 1.0):
        values = ModalityInversion(steps=300, weight_decay=decay)(Linear(), "", alone, targets(4, 4), torch.arange(4))
        norms.append(float(values.v_BVD.norm(dim=2).mean()))
    assert norms[0] > 1.02 * norms[1] > 2 * norms[2]


def test_the_loss_is_recorded_at_every_50th_step_and_at_the_end() -> None:
    model, z_BD, key_B = Linear(), targets(3, 4), torch.arange(3)
    values = ModalityInversion(steps=120)(model, "text", frame(), z_BD, key_B)
    assert values.loss_KB.shape == (4, 3)  # at 0, 50, 100 and 120
    for k, steps in ((1, 50), (2, 100), (3, 120)):
        short = ModalityInversion(steps=steps)(model, "text", frame(), z_BD, key_B)
        torch.testing.assert_close(values.loss_KB[k], 1 - short.cos_B, **rounding(64, F64))
        torch.testing.assert_close(short.cos_B, (short.z_BD * z_BD).sum(dim=1), **rounding(16, F64))
    assert float(values.monotone()) == 1.0
    backwards = values._replace(loss_KB=torch.tensor([[3.0], [1.0], [2.0], [0.0]]))
    assert float(backwards.monotone()) == pytest.approx(2 / 3, rel=ulps(4, F32))


# no sample sees another ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["text", "image"])
def test_eight_together_equal_one_at_a_time_in_any_order(way: str) -> None:
    model = recipe()
    here = text_frame(model, "text", CODEC, "a picture of {}", 2) if way == "text" else patch_frame(model, "image", 2)
    z_BD, key_B = targets(8, 8), torch.tensor([3, 1, 4, 15, 92, 65, 35, 89])
    whole = ModalityInversion(steps=60, tokens=2)(model, way, here, z_BD, key_B)
    pieces = ModalityInversion(steps=60, tokens=2, batch=3)(model, way, here, z_BD, key_B)
    torch.testing.assert_close(pieces.z_BD, whole.z_BD, rtol=0, atol=STEPS)
    torch.testing.assert_close(pieces.loss_KB, whole.loss_KB, rtol=0, atol=STEPS)
    order = torch.tensor([6, 0, 3, 7, 1, 5, 2, 4])
    turned = ModalityInversion(steps=60, tokens=2)(model, way, here, z_BD[order], key_B[order])
    torch.testing.assert_close(turned.z_BD, whole.z_BD[order], rtol=0, atol=STEPS)
    for b in range(8):
        one = ModalityInversion(steps=60, tokens=2)(model, way, here, z_BD[b : b + 1], key_B[b : b + 1])
        torch.testing.assert_close(one.v_BVD[0], whole.v_BVD[b], rtol=0, atol=STEPS)
    assert (whole.z_BD[0] - whole.z_BD[1]).norm() > 0.5  # and they are not all the same


def test_results_in_float32_do_not_depend_on_the_batch() -> None:
    model = recipe().float()
    here = text_frame(model, "text", CODEC, "a picture of {}", 1)
    z_BD, key_B = targets(8, 8, dtype=torch.float32), torch.arange(8)
    whole, pieces = (ModalityInversion(steps=50, batch=b)(model, "text", here, z_BD, key_B) for b in (8, 3))
    torch.testing.assert_close(pieces.z_BD, whole.z_BD, rtol=0, atol=1e-3)  # steps of Adam amplify rounding
    torch.testing.assert_close(pieces.cos_B, whole.cos_B, rtol=0, atol=1e-5)  # to first order nothing: a maximum


def test_starts_are_normal_and_a_function_of_the_key_alone() -> None:
    x_BN = normal(torch.arange(400), 500)
    assert float(x_BN.mean()) == pytest.approx(0, abs=statistical(1, 200_000)) and float(x_BN.std()) == pytest.approx(
        1, abs=statistical(1, 200_000)
    )
    # the deviation of a share of 0.683
    assert float((x_BN.abs() < 1).float().mean()) == pytest.approx(math.erf(0.5**0.5), abs=statistical(0.466, 200_000))
    assert torch.equal(normal(torch.tensor([77]), 500)[0], x_BN[77])
    torch.manual_seed(5)
    assert torch.equal(normal(torch.arange(400), 500), x_BN)
    assert float(torch.corrcoef(x_BN)[0, 1:].abs().max()) < 0.25


# nothing of the encoders is touched ----------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("way", ["text", "image"])
def test_encoders_do_not_change(way: str, context: Any) -> None:
    model = recipe().train()
    model.heads.eval()
    model.towers["image"].get_parameter("norm.weight").requires_grad_(False)
    before = digest(model), [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    with context():
        here = text_frame(model, "text", CODEC, "a {}", 1) if way == "text" else patch_frame(model, "image", 1)
        z_BD = targets(4, 8).clone()  # of inference mode, where that is on
        values = ModalityInversion(steps=55)(model, way, here, z_BD, torch.arange(4))
    after = digest(model), [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    assert after == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(x.requires_grad for x in values)
    assert values.loss_KB[-1].mean() < values.loss_KB[0].mean() - 0.1
    again = ModalityInversion(steps=55)(model.eval(), way, here, z_BD, torch.arange(4))
    assert torch.equal(again.z_BD, values.z_BD)  # dropout was off the first time too


def test_modes_are_restored_after_an_error() -> None:
    model = Linear().train()
    with pytest.raises(RuntimeError):
        ModalityInversion(steps=1)(model, "text", frame(), targets(2, 9), torch.arange(2))  # of another width
    assert model.training and model.modes == [False]


# through towers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["text", "image"])
def test_150_steps_reach_targets_in_the_range_of_the_tower(way: str) -> None:
    """Targets are embeddings of the modality's own inputs: cosine 0.85 and more, by a loss that only falls."""
    model = recipe().eval()
    generator = torch.Generator().manual_seed(0)
    if way == "text":
        x = torch.cat([torch.ones(16, 1).long(), torch.randint(8, 12, (16, 4), generator=generator)], dim=1)
        here = text_frame(model, way, CODEC, "a picture of {}", 1)
    else:
        x = torch.randn(16, 3, 8, 8, generator=generator).double()
        here = patch_frame(model, way, 1)
    with torch.no_grad():
        z_BD = model.project(model.features(x, way), way, torch.ones(16, dtype=torch.bool))
    values = ModalityInversion()(model, way, here, z_BD, torch.arange(16))
    assert float(values.cos_B.mean()) >= 0.85 > float((1 - values.loss_KB[0]).mean()) + 0.1
    assert float(values.monotone()) == 1.0
    torch.testing.assert_close(values.z_BD.norm(dim=1), torch.ones(16, dtype=torch.float64), **rounding(8, F64))
    # and it is that sample's own: nearest to its target among all
    assert float(((values.z_BD @ z_BD.T).argmax(dim=1) == torch.arange(16)).float().mean()) > 0.5


def test_a_frame_with_the_embedding_of_a_word_is_the_text_with_that_word() -> None:
    model = recipe().eval()
    tower = model.towers["text"]
    assert isinstance(tower, TextTower)
    here = text_frame(model, "text", CODEC, "a picture of {}", 1)
    fox, ids = CODEC.encode("fox"), CODEC(["a picture of fox"])
    assert here.place_V.tolist() == [4] and len(here.h_TD) == 6
    h_BTD = here.fill(tower.embedding.weight[fox][None])
    z_BD = model.encode_embeddings(h_BTD, torch.ones(1, 6, dtype=torch.bool), "text")
    wanted = model.project(model.features(ids, "text"), "text", torch.tensor([True]))
    torch.testing.assert_close(z_BD, wanted, **rounding(256, F64))
    middle = text_frame(model, "text", CODEC, "a {} of fox", 2)
    assert middle.place_V.tolist() == [2, 3] and len(middle.h_TD) == 7
    torch.testing.assert_close(middle.h_TD[2], tower.positions_TD[2].detach(), rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_text_tower_is_its_two_parts(causal: bool) -> None:
    torch.manual_seed(0)
    tower = TextTower(vocab=16, width=16, depth=2, heads=2, length=8, causal=causal).eval()
    x = torch.tensor([[1, 9, 8, 2, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0], [0] * 8])
    whole = tower(x)
    h_BTD = tower.encode(tower.embed(x), x != 0)  # of all columns, where forward leaves out those of padding
    torch.testing.assert_close(h_BTD, whole.h_BTD, **rounding(64, F32))
    assert not h_BTD[x == 0].any()
    # two layers of sums over 16 to 64 numbers
    torch.testing.assert_close(tower.encode(tower.embed(x[:1, :4])), whole.h_BTD[:1, :4], **rounding(64, F32))
    assert isinstance(recipe(), Inverts) and isinstance(tower, Encodes)
    assert not isinstance(BagTower(16, 16), Encodes) and not isinstance(ConvTower(widths=[8]), Encodes)


def test_the_frame_of_patches_is_their_positions() -> None:
    model = recipe()
    tower = model.towers["image"]
    assert isinstance(tower, PatchTower)
    here = patch_frame(model, "image", 3)
    assert torch.equal(here.h_TD, tower.positions_TD[:3]) and here.place_V.tolist() == [0, 1, 2]
    fixed = recipe(image=PatchTower(size=8, patch=4, width=16, depth=1, heads=2, positions="sincos"))
    assert patch_frame(fixed, "image", 4).h_TD.shape == (4, 16)


def test_refusals_in_one_line() -> None:
    model = recipe()
    with pytest.raises(ValueError, match=r"tower image: .*which ConvTower lacks; TextTower and PatchTower have them$"):
        patch_frame(recipe(image=ConvTower(widths=[8], stem=4)), "image", 1)
    with pytest.raises(ValueError, match=r"tower text: .*which BagTower lacks"):
        text_frame(recipe(text=BagTower(16, 16)), "text", CODEC, "a {}", 1)
    with pytest.raises(ValueError, match="no tower 'audio'; the towers are image, text"):
        patch_frame(model, "audio", 1)
    with pytest.raises(ValueError, match="tokens 5: tower image has places for 4 patches"):
        patch_frame(model, "image", 5)
    with pytest.raises(ValueError, match="9 tokens with its place; this tokenizer has rows of 8"):
        text_frame(model, "text", CODEC, "a picture of a fox {}", 2)
    for name, options in (("tokens 0", {"tokens": 0}), ("lr 0", {"lr": 0}), ("std -1", {"std": -1})):
        with pytest.raises(ValueError, match=f"ModalityInversion: {name}"):
            ModalityInversion(**options)
    with pytest.raises(ValueError, match="no target"):
        ModalityInversion()(Linear(), "text", frame(), torch.zeros(0, 4), torch.arange(0))
