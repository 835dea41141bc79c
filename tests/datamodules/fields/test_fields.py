from __future__ import annotations

import numpy as np
import pytest
import torch

from descant.datamodules.fields.columns import Column, kinds
from descant.datamodules.fields.fields import (
    ENDED,
    AudioField,
    Fields,
    ImageField,
    LabelField,
    TextField,
)
from descant.datamodules.sources.synthetic import Taken
from tests.files import bomb, jpeg, wav
from tests.tolerance import statistical


def taken(*samples: dict) -> Taken:
    return Taken([(str(k), raw) for k, raw in enumerate(samples)])


def test_kinds_of_fields_by_content() -> None:
    source = taken(
        {"a": b"", "b": wav(), "c": "a cat", "d": "17", "e": b"\0\1", "f": jpeg(format="PNG")},
        {"a": jpeg(), "d": "3.5"},
    )
    assert kinds(source) == {"a": "image", "b": "audio", "c": "text", "d": "number", "e": "unknown", "f": "image"}


def test_a_lone_field_of_a_kind_is_found() -> None:
    source = taken({"jpg": jpeg(), "txt": "x", "id": "7b", "split": "train"}, {"png": jpeg(format="PNG"), "txt": "y"})
    assert ImageField().column(source).names == ("jpg", "png"), "two formats that no sample has both of"
    assert TextField().column(source).names == ("txt",)
    with pytest.raises(ValueError, match=r"no audio field: fields are jpg \(image\), txt \(text\)"):
        AudioField().column(source)
    both = taken({"photo": jpeg(), "mask": jpeg()})
    with pytest.raises(ValueError, match=r"several image fields \(photo, mask\): name one.* data.fields.image.field"):
        ImageField().column(both)
    assert ImageField("mask").column(both).names == ("mask",)


@pytest.mark.parametrize(
    ("sample", "choice"),
    [
        ({"image": "i", "caption": "a b"}, ["caption"]),
        ({"title": "a b", "split": "train", "label": "cat", "url": "x y"}, ["title"]),
        ({"caption": "a b", "note": "c d"}, ["caption"]),
        ({"txt": "a", "json.caption": "a", "json.url": "u"}, ["txt"]),
        ({"caption.0": "a b", "caption.1": "c", "source_url": "x"}, ["caption.0", "caption.1"]),
        ({"json.caption": "a b", "json.width": "17"}, ["json.caption"]),
    ],
)
def test_a_single_caption_field_is_found(sample: dict, choice: list[str]) -> None:
    assert list(TextField().column(taken({k: v for k, v in sample.items() if v != "i"})).names) == choice


def test_several_caption_fields_are_listed() -> None:
    with pytest.raises(ValueError, match=r"captions: alt, title may all be: name one as data\.fields\.text\.captions"):
        TextField().column(taken({"alt": "a b", "title": "c d"}))
    with pytest.raises(ValueError, match=r"no field of captions: fields are jpg \(image\), label \(text\)"):
        TextField().column(taken({"jpg": jpeg(), "label": "cat"}))


def test_weights_of_captions() -> None:
    with pytest.raises(ValueError, match="the weights of alt, title are all zero"):
        TextField({"alt": 0, "title": 0.0})
    with pytest.raises(ValueError, match=r"alt -1 is no weight"):
        TextField({"alt": -1, "title": 1})
    source = taken({"alt": "a", "title": "t", "never": "n"}, {"title": "t"}, {"alt": "a"}, {"never": "n"})
    column = TextField({"alt": 0.3, "title": 0.7, "never": 0}).column(source)
    assert column.names == ("alt", "title") and column.present_N.tolist() == [True, True, True, False]
    draw_B = np.arange(20_000)
    for row, share in ((0, 0.7), (1, 1.0), (2, 0.0)):
        pick_B = column.pick(np.full(len(draw_B), row), draw_B, "x")
        assert (pick_B == 1).mean() == pytest.approx(share, abs=statistical(0.458, 20_000))
    assert (column.pick(np.full(9, 3), np.arange(9), "x") == -1).all()
    assert column.pick(np.arange(4), None, "x").tolist() == [0, 1, 0, -1], "evaluation: the first that is there"
    again = column.pick(np.zeros(9, int), draw_B[:9], "x")
    assert np.array_equal(again, column.pick(np.zeros(20_000, int), draw_B, "x")[:9]), "whatever the batch"


def test_parts_of_a_list_share_its_weight() -> None:
    source = taken({"caption.0": "a", "caption.1": "b", "alt": "x"}, {"caption.0": "a", "alt": "x"})
    column = TextField({"caption": 0.5, "alt": 0.5}).column(source)
    for row, shares in ((0, [0.25, 0.25, 0.5]), (1, [0.5, 0.0, 0.5])):
        pick_B = column.pick(np.full(20_000, row), np.arange(20_000), "x")
        assert (np.bincount(pick_B, minlength=3) / 20_000).tolist() == pytest.approx(
            shares, abs=statistical(0.5, 20_000)
        )


def test_texts_become_ids() -> None:
    field = TextField()
    x_BT, errors = field.decode(["a cat", b"a cat", None, b"\xff", " "], None)
    assert x_BT.shape == (5, field.tokenizer.length) and x_BT.dtype == torch.int64
    assert torch.equal(x_BT[0], x_BT[1]) and torch.equal(x_BT[0], field.tokenizer(["a cat"])[0])
    assert errors[:3] == [None, None, None] and "not UTF-8" in str(errors[3]) and "empty" in str(errors[4])
    length = field.tokenizer.length
    words = [" ".join(f"{k}" for k in range(n)) for n in (1, length - 20, length + 20, length + 50)]
    assert field.count_truncated(words) == 2


def test_images_become_pixels_and_bombs_errors() -> None:
    field = ImageField(size=8)
    x_BCSS, errors = field.decode([jpeg("red", (40, 20)), None, bomb(), jpeg()[:60], b""], None)
    assert x_BCSS.shape == (5, 3, 8, 8) and x_BCSS.dtype == torch.uint8
    assert (x_BCSS[0, 0] > 200).all() and (x_BCSS[0, 1] < 50).all()
    assert errors[:2] == [None, None] and "60,000 x 60,000" in str(errors[2]) and errors[3] and errors[4]


def test_recordings_become_int16_with_a_known_end() -> None:
    field = AudioField(rate=8000, seconds=0.5)
    x_BS, errors = field.decode([wav(0.2), wav(0.2, 16000), wav(2.0), None, b"", b"RIFFnonsense", wav(0.0)], None)
    assert x_BS.shape == (7, 4000) and x_BS.dtype == torch.int16
    assert (x_BS != ENDED).sum(1).tolist() == [1600, 1600, 4000, 0, 0, 0, 0]
    assert errors[:4] == [None] * 4 and errors[4] == "an empty file" and "recognised" in str(errors[5])
    assert errors[6] == "a recording without a sample"
    t = torch.arange(1600) / 8000
    expected = 0.5 * torch.sin(2 * torch.pi * 440 * t)
    for row in (0, 1):  # the second comes from 16 kHz
        assert (x_BS[row, 50:1550].float() / 32768 - expected[50:1550]).abs().max() < 0.01
    features = field.features(x_BS)
    frames = -(-1600 // field.log_mel.hop)
    assert features.isfinite().all(1).sum(1).tolist() == [frames, frames, -(-4000 // field.log_mel.hop), 0, 0, 0, 0]


def test_excerpts_are_random_in_training_and_the_beginning_in_evaluation() -> None:
    ramp = np.linspace(-0.9, 0.9, 8000)
    import io

    import soundfile

    out = io.BytesIO()
    soundfile.write(out, ramp, 8000, format="WAV", subtype="PCM_16")
    field = AudioField(rate=8000, seconds=0.1)
    x_BS, _ = field.decode([out.getvalue()] * 40, np.arange(40))
    starts = x_BS[:, 0].float() / 32768
    assert starts.min() < -0.7 and starts.max() > 0.55
    assert x_BS[:, -1].max() != ENDED
    one, _ = field.decode([out.getvalue()], np.array([7]))
    assert torch.equal(one[0], x_BS[7])
    first, _ = field.decode([out.getvalue()], None)
    assert first[0, 0] == round(-0.9 * 32768) or abs(int(first[0, 0]) + 0.9 * 32768) < 3


def test_labels() -> None:
    field = LabelField("cls")
    assert field.numbers(["b", None, "a "], ["a", "b"], "x.csv#{}".format).tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match=r"x\.csv#0: cls: 'c' is no class; there are a, b"):
        field.numbers(["c"], ["a", "b"], "x.csv#{}".format)
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        LabelField("cls", prompts=["a photo"])


def test_fields_need_one() -> None:
    with pytest.raises(ValueError, match="none given"):
        Fields()
    assert list(Fields(text=TextField(), image=ImageField()).of) == ["image", "text"]


def test_a_column_of_alternatives_takes_the_first_present_one() -> None:
    column = Column(["jpg", "png"], np.array([[True, True], [False, True], [False, False]]))
    assert column.pick(np.arange(3), None, "x").tolist() == [0, 1, -1]
