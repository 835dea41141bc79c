"""LogMelTower."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from descant.modules.towers import LogMelTower
from descant.modules.towers.heads import MeanPool
from tests.modules.towers import _asserts
from tests.tolerance import F32, ulps


def tower(**options):
    torch.manual_seed(0)
    return LogMelTower(**{"mels": 8, "width": 16, "depth": 2, **options})


def sound(*frames: int, T: int = 26):
    x_BFT = torch.randn(len(frames), 8, T, generator=torch.Generator().manual_seed(2)) * 20 - 50
    return x_BFT.masked_fill((torch.arange(T) >= torch.tensor(frames)[:, None])[:, None], -torch.inf)


X = sound(26, 9, 1, 17)


def test_properties():
    _asserts.check_tokens(tower(), X, 7)
    _asserts.check_rows_independent(tower(), X)
    _asserts.check_deterministic(tower(), X)
    _asserts.check_frozen(tower(), X)
    _asserts.check_keys_unchanged(tower())
    _asserts.check_every_gradient(tower(), X)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_halves_activations_and_keeps_gradients(dropout):
    # long enough that blocks keep more than the stem does
    _asserts.check_checkpointing(tower(dropout=dropout, depth=6, width=32), X)


def test_a_token_is_real_where_one_of_its_frames_is():
    assert tower()(X).mask_BT.sum(dim=1).tolist() == [7, 3, 1, 5]


@pytest.mark.parametrize("more", [1, 2, 3, 4, 50])
def test_more_padding_changes_nothing(more):
    net = tower().eval()
    _asserts.stir(net)
    short, long = net(X), net(F.pad(X, (0, more), value=-torch.inf))
    T = short.h_BTD.shape[1]
    assert not long.mask_BT[:, T:].any() and torch.equal(long.mask_BT[:, :T], short.mask_BT)
    torch.testing.assert_close(long.h_BTD[:, :T], short.h_BTD, rtol=0, atol=ulps(64, F32))
    assert not long.h_BTD[~long.mask_BT].any()


def test_masked_frames_do_not_matter():
    net = tower().eval()
    mask_BT = X[:, 0] > -torch.inf
    noise = torch.where(mask_BT[:, None], X, torch.randn(X.shape) * 1000)
    torch.testing.assert_close(net(noise, mask_BT).h_BTD, net(X).h_BTD, rtol=0, atol=ulps(64, F32))


def test_silence_differs_from_padding():
    net = tower()
    _asserts.stir(net)
    x = torch.stack([torch.full((8, 26), -80.0), torch.full((8, 26), -torch.inf)])
    tokens = net(x)
    assert tokens.mask_BT[0].all() and not tokens.mask_BT[1].any()
    pooled_BD = MeanPool()(tokens)
    assert pooled_BD.isfinite().all() and pooled_BD[0].any() and not pooled_BD[1].any()
    pooled_BD.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"features \(8, 26\): this tower takes 64 mel filters"):
        LogMelTower()(X)
    with pytest.raises(ValueError, match="kernel 4 is even; the nearest odd one is 5"):
        LogMelTower(kernel=4)
