"""VideoTower: its equations, frames that are padding, and the properties of every tower."""

from __future__ import annotations

import pytest
import torch

from descant.modules.towers import PatchTower, VideoTower
from tests.modules.towers import _asserts
from tests.tolerance import F32, F64, rounding, ulps

#: Three clips of four frames of 2 x 2 patches.
X = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([[True] * 4, [True, True, False, False], [False, True, False, True]])


def tower(**options):
    torch.manual_seed(0)
    return VideoTower(**{"size": 16, "patch": 8, "frames": 4, "width": 16, "depth": 2, "heads": 2} | options)


def test_properties():
    video = tower()
    _asserts.check_tokens(video, X, 16)
    _asserts.check_rows_independent(video, X)
    _asserts.check_deterministic(video, X)
    _asserts.check_every_gradient(video, X)
    _asserts.check_frozen(video, X)
    _asserts.check_keys_unchanged(video)
    _asserts.check_checkpointing(video, X)
    assert len(video.blocks()) == 2
    fixed = tower(positions="sincos")
    _asserts.check_every_gradient(fixed, X)
    assert set(dict(video.named_parameters())) - set(fixed.state_dict()) == {"positions_PD", "times_FD"}
    assert torch.equal(fixed.times_FD[0, :8], torch.zeros(8)) and torch.equal(fixed.times_FD[0, 8:], torch.ones(8))


def attention(h_KD, part):
    """Attention of the last of K tokens to all of them, head by head."""
    q, k, v = (x.view(len(h_KD), 2, -1) for x in (h_KD @ part.qkv.weight.T + part.qkv.bias).chunk(3, dim=1))
    heads = [(q[-1, n] @ k[:, n].T / q.shape[-1] ** 0.5).softmax(0) @ v[:, n] for n in range(2)]
    return part.out(torch.cat(heads))


def test_a_block_attends_over_time_then_within_the_frame():
    block = tower().double().layers[0]
    h = torch.randn(1, 4, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real = torch.tensor([True, False, True, True])
    given = block(h, real[None, :, None].expand(1, 4, 4))
    a = h[0].clone()
    for f in range(4):
        for p in range(4):
            frames = [*(g for g in range(4) if real[g] and g != f), f] if real[f] else [g for g in range(4) if real[g]]
            if real[f]:
                a[f, p] += attention(block.time.norm(h[0, frames, p]), block.time)
    for f in real.nonzero().flatten().tolist():
        normed = block.norm_1(a[f])
        for p in range(4):
            b = a[f, p] + attention(torch.cat([normed[:p], normed[p + 1 :], normed[p : p + 1]]), block)
            torch.testing.assert_close(given[0, f, p], b + block.mlp(block.norm_2(b)), **rounding(64, F64))


@pytest.mark.parametrize("other", [torch.nan, torch.inf, -torch.inf, 7.0])
def test_the_content_of_a_padding_frame_changes_no_bit(other):
    video, results = tower().train(), []
    for x in (X, X.masked_fill(~REAL[..., None, None, None], other)):
        video.zero_grad()
        tokens = video(x, REAL)
        _asserts.loss_of(tokens).backward()
        results.append([*tokens, *(p.grad.clone() for p in video.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not results[0][0][~results[0][1]].any()
    assert torch.equal(results[0][1], REAL.repeat_interleave(4, dim=1))


def test_frames_of_minus_infinity_are_padding_and_their_number_changes_nothing():
    video = tower().eval()
    padded = X.masked_fill(~REAL[..., None, None, None], -torch.inf)
    assert torch.equal(video(padded).h_BTD, video(X, REAL).h_BTD)
    short = video(X[1:2, :2])
    assert short.h_BTD.shape[1] == 8
    torch.testing.assert_close(video(padded).h_BTD[1:2, :8], short.h_BTD, rtol=0, atol=ulps(84, F32))


def test_the_order_of_frames_matters_and_one_frame_is_an_image():
    video = tower().eval()
    assert not torch.allclose(video(X).h_BTD.mean(1), video(X.flip(1)).h_BTD.mean(1), atol=1e-3)  # far above rounding
    image, still = PatchTower(16, 8, 16, 2, 2).eval(), tower(frames=1).eval()
    still.times_FD.data.zero_()
    for layer in still.layers:
        layer.time.out.weight.data.zero_()
    image.load_state_dict(still.state_dict() | {"positions_TD": still.positions_PD}, strict=False)
    torch.testing.assert_close(still(X[:, :1]).h_BTD, image(X[:, 0]).h_BTD, **rounding(64, F32))


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ((2, 5, 3, 16, 16), r"clip \(5, 3, 16, 16\): this tower takes up to 4 frames of \(3, 16, 16\)"),
        ((2, 4, 1, 16, 16), r"clip \(4, 1, 16, 16\): this tower takes up to 4 frames of \(3, 16, 16\)"),
    ],
)
def test_what_does_not_fit_is_one_line(shape, line):
    with pytest.raises(ValueError, match=line):
        tower()(torch.zeros(shape))
    with pytest.raises(ValueError, match="frames 0: a clip has at least 1"):
        tower(frames=0)
