"""Rotary positions of three axes: against transformers' Qwen2-VL, Qwen3-VL and Qwen2.5-Omni, and explicit loops.

Letters: B rows, T tokens, F frequencies, N frames.
"""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniPreTrainedModelForConditionalGeneration as Qwen2Omni,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel, Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from descant.modules.language import CausalLM
from descant.modules.language.axis_rope import (
    AxisRoPE,
    InterleavedAxisRoPE,
    axis_factors,
    axis_positions,
    grid_offsets,
    sound_offsets,
)
from descant.modules.language.model import apply_rope, rope_frequencies
from descant.modules.language.positions import VisualAxes
from tests.tolerance import F32, F64, rounding

BOTH = [AxisRoPE, InterleavedAxisRoPE]


def small(positions: AxisRoPE | None = None) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(11, 32, 2, 2, length=64, positions=positions)


@pytest.mark.parametrize("kind", BOTH)
def test_text_is_rope_to_the_bit(kind: type[AxisRoPE]) -> None:
    plain, axes = small(), small(kind())
    ids_BT = torch.randint(11, (2, 40))
    h_BTD = plain(plain.embed(ids_BT))
    assert torch.equal(h_BTD, axes(axes.embed(ids_BT)))
    count_BT = torch.arange(40).expand(2, 40)
    for position_BT in (count_BT, count_BT * 0.75):
        position_BT3 = position_BT[..., None].expand(-1, -1, 3)
        assert torch.equal(plain.rope(position_BT), axes.rope(position_BT3))
    assert torch.equal(h_BTD, axes(axes.embed(ids_BT), position_BT=count_BT[..., None].expand(-1, -1, 3)))


def test_frequencies_are_those_of_qwen() -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    turns = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]}
    theirs = [
        Qwen2VLRotaryEmbedding(Qwen2VLTextConfig(**shape, rope_parameters=sections)),
        Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**shape, head_dim=32, rope_parameters=turns)),
    ]
    position_BT3 = torch.randint(64, (2, 9, 3))
    for ours, rotary in zip((AxisRoPE(), InterleavedAxisRoPE()), theirs, strict=True):
        cos_BTE, sin_BTE = rotary(torch.zeros(1), position_BT3.permute(2, 0, 1))
        found_BTF = axis_factors(position_BT3.float(), ours.axes(16), rope_frequencies(10000.0, 32))
        expected_BTF = torch.complex(cos_BTE[..., :16], sin_BTE[..., :16])
        # frequencies of one rounding, times positions up to 64
        torch.testing.assert_close(found_BTF, expected_BTF, **rounding(4 * 64, F32))


@pytest.mark.parametrize("kind", BOTH)
def test_scores_depend_on_differences_along_each_axis(kind: type[AxisRoPE]) -> None:
    axis_F, frequency_F = kind().axes(8), 100.0 ** -torch.linspace(0, 1, 8, dtype=F64)
    q_TE, k_TE = torch.randn(2, 5, 16, dtype=F64).unbind()
    place_T3 = 20 * torch.rand(5, 3, dtype=F64)

    def scores(shift_3: Tensor) -> Tensor:
        rope = axis_factors((place_T3 + shift_3)[None], axis_F, frequency_F)[:, None]
        q_TE_, k_TE_ = apply_rope(q_TE[None, None], rope)[0, 0], apply_rope(k_TE[None, None], rope)[0, 0]
        return q_TE_ @ k_TE_.T

    expected_TT = torch.zeros(5, 5, dtype=F64)
    for t in range(5):
        for s in range(5):
            for f in range(8):
                angle = float((place_T3[t] - place_T3[s])[axis_F[f]] * frequency_F[f])
                a, b, c, d = (float(x) for x in (*q_TE[t, 2 * f : 2 * f + 2], *k_TE[s, 2 * f : 2 * f + 2]))
                expected_TT[t, s] += (a * c + b * d) * math.cos(angle) + (a * d - b * c) * math.sin(angle)
    close = partial(torch.testing.assert_close, **rounding(16 * 64, F64))  # angles up to 50, sums of 16
    close(scores(torch.zeros(3, dtype=F64)), expected_TT)
    for axis in range(3):
        close(scores(7.25 * torch.eye(3, dtype=F64)[axis]), expected_TT)


def row(*parts: int | Tensor) -> tuple[Tensor, Tensor]:
    """Offsets ``[1, T, 3]`` and spans ``[1, T]`` of numbers of text tokens, and grids."""
    pieces = [torch.zeros(part, 3, dtype=torch.long) if isinstance(part, int) else part for part in parts]
    spans = [0 if isinstance(part, int) else i for i, part in enumerate(parts, 1)]
    lengths = torch.tensor([len(piece) for piece in pieces])
    return torch.cat(pieces)[None], torch.tensor(spans).repeat_interleave(lengths)[None]


def test_images_are_where_qwen2_vl_has_them() -> None:
    grids_N3 = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 2, 8]])  # of patches, merged by two
    offsets = [grid_offsets(torch.tensor([0]), h // 2, w // 2) for _, h, w in grids_N3.tolist()]
    offset_BT3, span_BT = row(3, offsets[0], offsets[1], 2, offsets[2], 1)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    model.get_vision_position_ids = partial(Qwen2VLModel.get_vision_position_ids, model)
    # it tells images apart by the text between them
    apart_BT3, apart_BT = row(3, offsets[0], 1, offsets[1], 2, offsets[2], 1)
    kind_BT = (apart_BT > 0).int()
    expected_3BT, delta_B1 = Qwen2VLModel.get_rope_index(model, kind_BT.long(), kind_BT, image_grid_thw=grids_N3)
    found_BT3 = axis_positions(apart_BT3, apart_BT)
    assert torch.equal(found_BT3[:, :-1], expected_3BT.permute(1, 2, 0))
    assert found_BT3[0, -1].tolist() == [int(delta_B1) + apart_BT.shape[1]] * 3
    adjacent_BT3 = axis_positions(offset_BT3, span_BT)
    assert torch.equal(adjacent_BT3[:, 9:], found_BT3[:, 10:] - 1)


def test_video_in_seconds_is_where_qwen2_5_omni_has_it() -> None:
    IMAGE, VIDEO, AUDIO, START, SOUND = 90, 91, 92, 93, 94
    config = SimpleNamespace(
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, vision_start_token_id=START,
        audio_start_token_id=SOUND, position_id_per_seconds=25, seconds_per_chunk=2,
    )  # fmt: skip
    model = SimpleNamespace(config=config, spatial_merge_size=2)
    model.get_llm_pos_ids_for_vision = partial(Qwen2Omni.get_llm_pos_ids_for_vision, model)
    ids_BT = torch.tensor([[1, 2, START, *18 * [VIDEO], 3, 4]])
    given = {"video_grid_thw": torch.tensor([[3, 4, 6]]), "second_per_grids": torch.tensor([0.33])}
    expected, delta = Qwen2Omni.get_rope_index(model, ids_BT, attention_mask=torch.ones_like(ids_BT), **given)
    time_N = (torch.arange(3) * torch.tensor(0.33) * 25).long()
    found_BT3 = axis_positions(*row(3, grid_offsets(time_N, 2, 3), 2))
    assert torch.equal(found_BT3[0, :-1].T, expected.reshape(3, -1, ids_BT.shape[1])[:, 0])
    assert int(delta) + ids_BT.shape[1] == int(found_BT3[0, -1, 0])


def test_crops_and_sound_are_where_uni_moe_2_has_them() -> None:
    # its loops: crops row by row, each of 2 x 2 tokens; two frames a second and a half apart; 3 seconds of sound a unit
    time_N = torch.round(1.5 * 2.0 * torch.arange(2)).long()
    expected = [
        [t, 2 * y + i, 2 * x + j]
        for t in time_N.tolist() for y in range(1) for x in range(2) for i in range(2) for j in range(2)
    ]  # fmt: skip
    video, sound = grid_offsets(time_N, 2, 4, tile=2), sound_offsets(3 * torch.arange(2), tokens=20)
    assert video.tolist() == expected
    position_BT3 = axis_positions(*row(2, video, sound, 1))
    assert position_BT3[0, 2:18].tolist() == [[2 + t, 2 + y, 2 + x] for t, y, x in expected]
    assert position_BT3[0, 18:38].unique().tolist() == [6] and position_BT3[0, 38:58].unique().tolist() == [9]
    assert position_BT3[0, 58:].tolist() == [[10, 10, 10], [11, 11, 11]]


def test_packed_documents_have_the_positions_of_each_alone() -> None:
    documents = [
        row(2, grid_offsets(torch.tensor([0.0, 0.25]), 2, 2), 1),
        row(grid_offsets(torch.tensor([0.0]), 1, 3), 2),
    ]
    offset_BT3, span_BT = (torch.cat(pieces, dim=1) for pieces in zip(*documents, strict=True))
    segment_BT = torch.tensor([11 * [1] + 5 * [2]])
    found_BT3 = axis_positions(offset_BT3, span_BT, segment_BT)
    first, second = (axis_positions(*document) for document in documents)
    assert torch.equal(found_BT3, torch.cat([first[:, :-1], second], dim=1))


def test_a_head_too_narrow_and_grids_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="split \\[2, 0, 0\\]: a head has 2 frequencies"):
        CausalLM(11, 8, 1, 2, positions=AxisRoPE())
    with pytest.raises(ValueError, match="split \\[1, 2\\]: of time, height and width"):
        AxisRoPE([1, 2])
    with pytest.raises(ValueError, match="fewer turns; such as \\[4, 2, 2\\]"):
        InterleavedAxisRoPE([2, 3, 3]).axes(8)
    with pytest.raises(ValueError, match="set its positions"):
        small().rope(torch.zeros(1, 4, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="tile 3: does not divide a grid of 2 x 4"):
        grid_offsets(torch.tensor([0]), 2, 4, tile=3)
    with pytest.raises(ValueError, match="images of 6 tokens are no grid"):
        VisualAxes().grids(torch.tensor([[1, 9]]), 9, tokens=6)
