"""TextTower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from descant.modules.towers import BagTower, TextTower, Tokens
from descant.modules.towers.heads import MeanPool
from tests.modules.towers import _asserts
from tests.tolerance import F32, rounding, ulps

X = torch.tensor(
    [[1, 5, 6, 2, 0, 0, 0, 0], [1, 7, 2, 0, 0, 0, 0, 0], [1, 9, 8, 7, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]]
)


def text(**options):
    torch.manual_seed(0)
    return TextTower(**{"vocab": 12, "width": 16, "depth": 2, "heads": 2, "length": 8, **options})


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["plain", "causal"])
def test_properties(options):
    tower = text(**options)
    _asserts.check_tokens(tower, X, 8)
    _asserts.check_rows_independent(tower, X)
    _asserts.check_deterministic(tower, X)
    _asserts.check_frozen(tower, X)
    _asserts.check_keys_unchanged(text(**options))


def test_every_gradient():
    # as long as the tower is: positions beyond the longest text have no gradient, rightly
    _asserts.check_every_gradient(text(), X.where(X != 0, 3))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_halves_activations_and_keeps_gradients(dropout):
    _asserts.check_checkpointing(text(dropout=dropout), X)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_content_does_not_matter(causal):
    tower = text(causal=causal).eval()
    mask_BT = X != 0
    noise = torch.where(mask_BT, X, torch.randint(1, 12, X.shape, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(tower(noise, mask_BT).h_BTD, tower(X).h_BTD, rtol=0, atol=ulps(8, F32))


def test_padding_comes_out_as_zeros_and_an_empty_row_is_finite():
    x = torch.cat([X, torch.zeros(1, 8, dtype=torch.long)])
    tower = text()
    h_BTD, mask_BT = tower(x)
    assert not h_BTD[~mask_BT].any() and not mask_BT[-1].any()
    h_BTD.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters() if p.grad is not None)


def test_padding_columns_are_not_computed():
    tower, seen = text(), []
    tower.layers[0].register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1]))
    assert tower(X).h_BTD.shape[1] == 8
    assert seen == [5]


def test_left_padding_under_causal_is_finite():
    tower = text(causal=True).eval()
    x = X.flip(1)
    assert torch.isfinite(tower(x).h_BTD).all()


def test_causal_tokens_do_not_attend_to_later_ones():
    tower = text(causal=True).eval()
    changed = X.clone()
    changed[:, 1] = 11
    torch.testing.assert_close(tower(X).h_BTD[:, 0], tower(changed).h_BTD[:, 0], **rounding(64, F32))
    assert not torch.allclose(text().eval()(X).h_BTD[:, 0], text().eval()(changed).h_BTD[:, 0])


def test_padding_that_is_attended_to_is_a_token_like_any_other():
    tower, same = text(attend_padding=True).eval(), text(causal=False).eval()
    tokens = tower(X)
    assert tokens.mask_BT.all() and torch.equal(tower(X, X != 0).h_BTD, same(X).h_BTD)  # a mask that is given counts
    same.load_state_dict(tower.state_dict())
    torch.testing.assert_close(tokens.h_BTD, same(X, X >= 0).h_BTD, **rounding(64, F32))
    tokens.h_BTD[:, -1].square().sum().backward()
    assert tower.embedding.weight.grad[0].any() and tower.positions_TD.grad.any(dim=1).all()
    _asserts.check_rows_independent(text(attend_padding=True), X)


@pytest.mark.parametrize("depth", [0, -1])
def test_a_tower_without_blocks_is_refused_and_the_bag_named(depth):
    with pytest.raises(ValueError, match=f"depth {depth}: at least 1; .* BagTower"):
        text(depth=depth)


def test_a_longer_text_is_refused_in_one_line():
    with pytest.raises(ValueError, match="length 8: a text of 9 tokens does not fit"):
        text()(torch.ones(1, 9, dtype=torch.long))


def test_a_bag_is_the_mean_of_its_embeddings():
    """Value and gradient equal those of the embeddings of all tokens, pooled by the mean."""
    torch.manual_seed(0)
    bag, slow = BagTower(vocab=12, width=16), nn.Embedding(12, 16, padding_idx=0)
    slow.weight.data.copy_(bag.embedding.weight.data)
    x = torch.cat([X, torch.zeros(1, 8, dtype=torch.long)])
    outs = [MeanPool()(bag(x)), MeanPool()(Tokens(slow(x), x != 0))]
    torch.testing.assert_close(*outs, **rounding(8, F32))
    weight = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(0))
    grads = [
        torch.autograd.grad((h_BD * weight).sum(), table)[0]
        for h_BD, table in zip(outs, (bag.embedding.weight, slow.weight), strict=True)
    ]
    torch.testing.assert_close(*grads, **rounding(8, F32))
    assert bag(x).mask_BT.flatten().tolist() == [True] * 4 + [False]


def test_bag_properties():
    torch.manual_seed(0)
    tower = BagTower(vocab=12, width=16)
    _asserts.check_tokens(tower, X, 1)
    _asserts.check_rows_independent(tower, X)
    _asserts.check_deterministic(tower, X)
    _asserts.check_frozen(tower, X)
    _asserts.check_every_gradient(tower, X)
    masked = tower(X.where(X != 9, 3), X != 9)
    torch.testing.assert_close(masked.h_BTD, tower(X.where(X != 9, 0)).h_BTD, **rounding(8, F32))
