"""Pools and projections. Letters: B samples, T tokens, D width."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from descant.modules.towers import Tokens
from descant.modules.towers.heads import (
    AttentionPool,
    FirstPool,
    FlattenPool,
    LastPool,
    MAPPool,
    MaxPool,
    MeanPool,
    Pools,
    Projection,
)
from tests.tolerance import F32, rounding

H_BTD = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
MASK_BT = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
POOLS = [
    MeanPool(),
    FirstPool(),
    LastPool(),
    AttentionPool(8, 2),
    FlattenPool(4, 8),
    MaxPool(),
    MaxPool(8),
    MAPPool(8, 2),
]


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: type(p).__name__)
def test_only_real_tokens_count(pool):
    expected = pool(Tokens(H_BTD, MASK_BT))
    assert expected.shape == (3, 8)
    for junk in (1e3, float("inf")):
        # a finite projection of padding is all that attention needs; other pools must not even see inf
        if junk == 1e3 or not isinstance(pool, AttentionPool):
            again = pool(Tokens(H_BTD.masked_fill(~MASK_BT[..., None], junk), MASK_BT))
            torch.testing.assert_close(again, expected, **rounding(32, F32))


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: type(p).__name__)
def test_a_sample_without_tokens_gives_zeros_and_finite_gradients(pool):
    h_BTD = H_BTD.clone().requires_grad_()
    z_BD = pool(Tokens(h_BTD, MASK_BT))
    assert not z_BD[2].any() and z_BD[1].any()
    z_BD.square().sum().backward()
    assert h_BTD.grad is not None
    assert torch.isfinite(h_BTD.grad).all() and not h_BTD.grad[~MASK_BT].any()


def test_values():
    tokens = Tokens(H_BTD, MASK_BT)
    torch.testing.assert_close(MeanPool()(tokens)[0], H_BTD[0, :3].mean(dim=0), **rounding(3, F32))
    assert torch.equal(FirstPool()(tokens)[:2], torch.stack([H_BTD[0, 0], H_BTD[1, 1]]))
    assert torch.equal(LastPool()(tokens)[:2], torch.stack([H_BTD[0, 2], H_BTD[1, 1]]))


def test_a_flatten_pool_depends_on_position():
    pool, real_BT = FlattenPool(4, 8), torch.ones(3, 4, dtype=torch.bool)
    h_BD = pool(Tokens(H_BTD, real_BT))
    w_DTD = pool.linear.weight.view(8, 4, 8)
    torch.testing.assert_close(h_BD, torch.einsum("dte,bte->bd", w_DTD, H_BTD) + pool.linear.bias, **rounding(32, F32))
    turned_BD = pool(Tokens(H_BTD.flip(1), real_BT))
    assert (turned_BD - h_BD).abs().max() > 0.1
    torch.testing.assert_close(
        MeanPool()(Tokens(H_BTD.flip(1), real_BT)), MeanPool()(Tokens(H_BTD, real_BT)), **rounding(4, F32)
    )
    with pytest.raises(ValueError, match="tokens 5: this tower gives 4"):
        FlattenPool(5, 8)(Tokens(H_BTD, real_BT))


def test_pools_of_modalities():
    text = LastPool()
    pools = Pools(text=text)
    assert pools.of("text") is text
    assert isinstance(pools.of("image"), MeanPool) and pools.of("image") is not pools.of("audio")


def test_one_token_is_its_own_attention_pool():
    pool = AttentionPool(8, 2)
    v_D = pool.kv(pool.norm(H_BTD[1, 1])).view(2, 8)[1]
    torch.testing.assert_close(pool(Tokens(H_BTD, MASK_BT))[1], pool.out(v_D), **rounding(32, F32))


def test_a_map_pool_is_the_head_of_siglip_and_the_latent_pool_of_timm():
    from timm.layers import AttentionPoolLatent
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    torch.manual_seed(0)
    pool, real_BT = MAPPool(8, 2, mlp_ratio=2.0, eps=1e-6, tanh=True), torch.ones(3, 4, dtype=torch.bool)
    for parameter in pool.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    config = SiglipVisionConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
    head = SiglipMultiheadAttentionPoolingHead(config)
    latent = AttentionPoolLatent(8, num_heads=2, mlp_ratio=2.0, act_layer=TANH, norm_layer=torch.nn.LayerNorm)
    latent.norm.eps = 1e-6
    ours = pool.state_dict()
    kinds = ("weight", "bias")
    own = {f"mlp.fc{n}.{kind}": ours[f"mlp.{2 * (n - 1)}.{kind}"] for n in (1, 2) for kind in kinds}
    theirs = {f"attention.out_proj.{kind}": ours[f"out.{kind}"] for kind in kinds}
    theirs |= {f"attention.in_proj_{kind}": torch.cat([ours[f"q.{kind}"], ours[f"kv.{kind}"]]) for kind in kinds}
    theirs |= {f"layernorm.{kind}": ours[f"norm.{kind}"] for kind in kinds}
    head.load_state_dict({**own, **theirs, "probe": ours["probe_1D"][None]})
    named = {f"{to}.{kind}": ours[f"{at}.{kind}"] for at, to in MAPPED.items() for kind in kinds}
    latent.load_state_dict({**own, **named, "latent": ours["probe_1D"][None]})
    for of_owner in (head, latent):
        torch.testing.assert_close(pool(Tokens(H_BTD, real_BT)), of_owner(H_BTD), **rounding(64, F32))


TANH = partial(torch.nn.GELU, approximate="tanh")
MAPPED = {"q": "q", "kv": "kv", "out": "proj", "norm": "norm"}


@pytest.mark.parametrize("layers", [1, 3])
def test_projection(layers):
    projection = Projection(8, 5, layers=layers, hidden=16)
    z_BD = projection(H_BTD[:, 0])
    assert z_BD.shape == (3, 5)
    z_BD.sum().backward()
    assert all(p.grad is not None for p in projection.parameters())
    assert projection.layers[-1].bias is None
    # LayerNorm first: the scale of a feature does not matter
    # 1e-5 beside a variance of 0.5, and then beside one 10,000 times as large
    torch.testing.assert_close(projection(100 * H_BTD[:, 0]), z_BD, **rounding(512, F32))


def test_refusals():
    with pytest.raises(ValueError, match="heads 3 does not divide width 8; the nearest that does is 2"):
        AttentionPool(8, 3)
    with pytest.raises(ValueError, match="layers 0"):
        Projection(8, 4, layers=0)
