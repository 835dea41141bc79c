"""Decoders against their formula, a sample at a time. Letters: B samples, N tokens, D and E widths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from descant.modules.masking.corruptions import Grid
from descant.modules.masking.decoders import At, CrossDecoder, Encoded, JointDecoder
from tests.tolerance import F64, ulps

GRIDS: dict[str, Grid] = {"image": (2, 3), "depth": (4,)}
D, E = 10, 12


def masks(p: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {m: torch.rand(4, n, generator=generator) < p for m, n in (("image", 6), ("depth", 4))}


def encoded_of(visible: dict[str, Tensor]) -> Encoded:
    at = {m: At.of(mask) for m, mask in visible.items()}
    torch.manual_seed(1)
    h = {m: torch.randn(len(a.row_N), D, dtype=torch.float64, requires_grad=True) for m, a in at.items()}
    return Encoded(h, at, torch.randn(4, D, dtype=torch.float64, requires_grad=True))


def built(kind: type[JointDecoder] | type[CrossDecoder]) -> Any:
    torch.manual_seed(0)
    decoder = kind(width=E, depth=1, heads=2)
    decoder.build(GRIDS, D)
    return decoder.double()


ALIKE = {
    "image": torch.tensor([[True, False, False, True, False, False]] * 4),
    "depth": torch.arange(4).expand(4, 4) > 2,
}
CASES = {"ragged": (masks(0.5, 0), masks(0.5, 1)), "dense": (ALIKE, ALIKE)}


def case(name: str) -> tuple[Encoded, dict[str, Tensor]]:
    visible, target = CASES[name]
    return encoded_of(visible), {m: target[m] & ~visible[m] if name == "ragged" else ~visible[m] for m in visible}


def block(layer: Any, h_KE: Tensor) -> Tensor:
    """A pre-norm block on the tokens of one sample."""
    q, k, v = layer.qkv(layer.norm_1(h_KE)).view(-1, 3, 2, E // 2).permute(1, 2, 0, 3)
    mixed = torch.softmax(q @ k.transpose(1, 2) / (E // 2) ** 0.5, dim=-1) @ v
    h_KE = h_KE + layer.out(mixed.transpose(0, 1).reshape(-1, E))
    return h_KE + layer.mlp(layer.norm_2(h_KE))


def place(places: Any, m: str, at: At, b: int) -> Tensor:
    return getattr(places, f"place_{m}")[at.place_N[at.row_N == b]] + places.modality[m]


@pytest.mark.parametrize("name", CASES)
def test_the_joint_decoder_is_a_transformer_over_all_tokens_of_a_sample(name: str) -> None:
    decoder, (encoded, target) = built(JointDecoder), case(name)
    targets = {m: At.of(mask) for m, mask in target.items()}
    output = decoder(encoded, targets)
    for b in range(4):
        tokens, sizes = [decoder.inward(encoded.global_BD[b : b + 1])], [1]
        for m, at in encoded.at.items():
            tokens.append(decoder.inward(encoded.h[m][at.row_N == b]) + place(decoder.places, m, at, b))
        for m, at in targets.items():
            tokens.append(decoder.mask_E + place(decoder.places, m, at, b))
        sizes = [len(t) for t in tokens]
        y = decoder.norm(block(decoder.layers[0], torch.cat(tokens))).split(sizes)[-2:]
        for (m, at), mine in zip(targets.items(), y, strict=True):
            # a block of sums over widths of up to 48 and some ten tokens
            torch.testing.assert_close(output[m][at.row_N == b], mine, rtol=0, atol=ulps(512, F64))


@pytest.mark.parametrize("name", CASES)
def test_the_cross_decoder_attends_to_all_and_then_to_its_own(name: str) -> None:
    decoder, (encoded, target) = built(CrossDecoder), case(name)
    targets = {m: At.of(mask) for m, mask in target.items()}
    output = decoder(encoded, targets)
    for m, at in targets.items():
        look = decoder.each[m]
        for b in range(4):
            if not at.count_B[b]:
                continue
            seen = {
                k: look.inward(encoded.h[k][a.row_N == b]) + place(look.places, k, a, b) for k, a in encoded.at.items()
            }
            q = torch.cat([seen[m], look.mask_E + place(look.places, m, at, b)])
            c = torch.cat([look.inward(encoded.global_BD[b : b + 1]), *seen.values()])
            q_HK = look.query(look.query_norm(q)).view(-1, 2, E // 2).transpose(0, 1)
            k_HK, v_HK = look.context(look.context_norm(c)).view(-1, 2, 2, E // 2).permute(1, 2, 0, 3)
            y = look.out(F.scaled_dot_product_attention(q_HK, k_HK, v_HK).transpose(0, 1).reshape(-1, E))
            y = block(look.layers[0], y + look.mlp(look.out_norm(y)))
            # as above, twice
            torch.testing.assert_close(output[m][at.row_N == b], y[len(seen[m]) :], rtol=0, atol=ulps(512, F64))


@pytest.mark.parametrize("kind", [JointDecoder, CrossDecoder])
def test_predictions_of_one_modality_depend_on_visible_tokens_of_the_other(kind: type[CrossDecoder]) -> None:
    decoder, (encoded, target) = built(kind), case("dense")
    output = decoder(encoded, {"image": At.of(target["image"])})["image"]
    output.square().sum().backward()
    assert all(h.grad is not None and h.grad.abs().sum() > 0 for h in (*encoded.h.values(), encoded.global_BD))


@pytest.mark.parametrize("kind", [JointDecoder, CrossDecoder])
def test_without_targets_no_output_and_every_parameter_has_a_gradient(kind: type[CrossDecoder]) -> None:
    decoder, (encoded, target) = built(kind), case("ragged")
    none = {m: At.of(torch.zeros_like(mask)) for m, mask in target.items()}
    output = decoder(encoded, none)
    assert all(h.shape == (0, E) for h in output.values())
    sum(h.sum() for h in output.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())
