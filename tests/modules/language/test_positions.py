"""Positions of image tokens (V2PE). Letters: B samples, F frames of each, S tokens, M answer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from descant.modules.core.batch import Batch
from descant.modules.language import CausalLM, Sampling
from descant.modules.language.axis_rope import AxisRoPE, InterleavedAxisRoPE
from descant.modules.language.positions import VisualAxes, VisualSteps
from descant.modules.language.projectors import PooledGrid
from descant.modules.tokenizers.text import EOS
from descant.modules.towers import ConvTower, Towers
from descant.recipes import VisionLanguage
from tests.tolerance import F32, rounding

IMAGE, ANSWER = 30, 31


def chat(visual: VisualSteps | None = None, length: int = 64, axes: AxisRoPE | None = None) -> VisionLanguage:
    torch.manual_seed(0)
    net = VisionLanguage(
        towers=Towers(image=ConvTower([8, 8], stem=4)),
        lm=CausalLM(32, 16, 2, 2, length=length, positions=axes),
        image_token=IMAGE,
        answer_token=ANSWER,
        projector=PooledGrid(2),
        visual=visual,
        row=256,
    ).eval()
    with torch.no_grad():  # as made, attention looks everywhere alike, and positions hardly matter
        for layer in net.lm.blocks():
            layer.qkv.weight.mul_(20)
            layer.out.weight.mul_(20)
    return net


def batch(F: int = 3, B: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(B, F, 3, 16, 16, generator=generator) * 2 - 1
    rows = [[1, *[IMAGE] * (F - b % F), 10 + b % 8, 6, ANSWER, 7, EOS] for b in range(B)]
    longest = max(map(len, rows))
    text = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    loss_mask = (text == 7) | (text == EOS)
    there = torch.ones(B, dtype=torch.bool)
    return Batch(
        {"image": image, "text": text, "loss_mask": loss_mask},
        {"image": there, "text": there},
        index=torch.arange(B),
        content_id=torch.arange(B),
        rng_seed=torch.arange(B) * 977,
        step={"image": there, "text": there},
    )


def test_a_step_of_one_is_the_plain_model_bit_by_bit() -> None:
    plain, counted = chat(), chat(VisualSteps(1.0, drawn=[1.0]))
    counted.lm.train()  # where it draws, of ones, and so counts by itself
    before_NW, *_ = plain.hidden_before_answers(batch())
    found_NW, *_ = counted.hidden_before_answers(batch())
    assert torch.equal(before_NW, found_NW)
    assert counted.sequence(batch())[1].position_BS is not None and plain.sequence(batch())[1].position_BS is None


VISUAL = [
    (VisualSteps(0.25), None),
    (VisualSteps(0.5), None),
    (VisualAxes(), AxisRoPE()),
    (VisualAxes(columns=4), InterleavedAxisRoPE()),
    (VisualAxes(frame=0.5), AxisRoPE([1, 2, 1])),
]


@pytest.mark.parametrize(("visual", "axes"), VISUAL)
def test_generation_is_at_the_positions_of_the_packed_rows(visual: VisualSteps, axes: AxisRoPE | None) -> None:
    net = chat(visual, axes=axes)
    generated = net.roll(batch(), new=2, group=2, sampling=Sampling(temperature=1.0), stop=())
    again = batch().select(torch.arange(4).repeat_interleave(2))
    text, mask = again.inputs["text"], again.inputs["loss_mask"]
    for r, row in enumerate(generated.token_RN.tolist()):
        at = int(mask[r].nonzero()[0, 0])
        text[r, at : at + 2] = torch.tensor(row)
    before_NW, token_N, _ = net.hidden_before_answers(again)
    log_N = net.lm.logits(before_NW).log_softmax(1).gather(1, token_N[:, None])[:, 0].view(-1, 2)
    # a layer of sums over some 24 numbers, five times
    torch.testing.assert_close(log_N, generated.log_RN, **rounding(128, F32))
    other = chat().hidden_before_answers(again)[0]
    assert float((other - before_NW).abs().max()) > 1e-3, "it does move something"


def test_tokens_are_where_the_loop_puts_them() -> None:
    for b, found in enumerate(chat(VisualSteps(0.25)).sequence(batch())[1].position_BS.tolist()):  # type: ignore[union-attr]
        at, wanted = 0.0, list[float]()
        for token in batch().inputs["text"][b].tolist():
            for _ in range(4 if token == IMAGE else 1):
                wanted.append(at)
                at += 0.25 if token == IMAGE else 1.0
        assert found[: len(wanted)] == wanted


def test_training_draws_a_step_for_each_sample_and_evaluation_none() -> None:
    net = chat(VisualSteps(0.5, drawn=[1.0, 0.25]))
    of: dict[bool, Tensor] = {}
    for training in (True, False):
        net.lm.train(training)
        place: Any = net.sequence(batch(F=1, B=64))[1].position_BS
        of[training] = place[:, 2]  # behind the first of a picture's tokens
    assert set(of[True].tolist()) == {2.0, 1.25} and set(of[False].tolist()) == {1.5}
    assert 16 < int((of[True] == 2).sum()) < 48


def test_a_longer_stack_fits_into_the_positions_of_a_shorter_one() -> None:
    long = batch(F=12)
    with pytest.raises(ValueError, match="length 32: a document of 54 tokens does not fit"):
        chat(length=32).hidden_before_answers(long)
    assert torch.isfinite(chat(VisualSteps(0.25), length=32).hidden_before_answers(long)[0]).all()


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"VisualSteps: 0: above 0, at most 1; such as 0\.25"):
        VisualSteps(0.0)
    with pytest.raises(ValueError, match="VisualSteps: 2: above 0"):
        VisualSteps(drawn=[1.0, 2.0])
