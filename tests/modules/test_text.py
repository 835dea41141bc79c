from __future__ import annotations

from pathlib import Path

import pytest

from descant.datamodules.emoji import PACK
from descant.modules.text import BOS, EOS, PAD, SPECIAL, Bpe, Ngrams

BPE = PACK / "tokenizer.json"


def test_rows_have_ends_commas_and_one_length() -> None:
    bpe = Bpe(BPE, length=8)
    row = bpe.row([bpe.ids("red apple"), bpe.ids("fruit")])
    assert row == [BOS, *bpe.ids("red apple"), *bpe.comma, *bpe.ids("fruit"), EOS, PAD, PAD]
    assert len(bpe.row([bpe.ids("a b c d e f g h i j")])) == 8
    assert bpe(["apple", "red apple"]).shape == (2, 8)


def test_ngrams_by_hand() -> None:
    codec = Ngrams(n=3, buckets=100_000)
    pieces = ["word sun", "<su", "sun", "un>"]
    assert codec.ids("Sun") == [codec._bucket(p) for p in pieces]
    assert codec.ids("sun sun") == codec.ids("sun")
    assert min(codec.ids("any words at all, in 1 row")) >= SPECIAL
    assert max(Ngrams(n=3, buckets=50).ids("any words at all, in 1 row")) < 50
    assert codec.ids("né 日本") == codec.ids("NÉ 日本")


def test_relatives_share_what_strangers_do_not() -> None:
    codec = Ngrams(n=3, buckets=100_000)
    bike = set(codec.ids("biking"))
    assert len(bike & set(codec.ids("bike"))) >= 2
    assert not bike & set(codec.ids("ocean"))


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such tokenizer file"):
        Bpe(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer file"):
        Bpe(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="an empty caption"):
        Ngrams().ids("  ")
    with pytest.raises(ValueError, match="length 2"):
        Ngrams(length=2)
