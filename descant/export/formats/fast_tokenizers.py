"""Tokenizers as transformers' fast ones, with the ids that they have here."""

from __future__ import annotations

import json
from typing import Any

from descant.modules.tokenizers.text import (
    BOS,
    EOS,
    PAD,
    SPECIAL,
    BPETokenizer,
    ByteTokenizer,
    PretrainedTokenizer,
    Tokenizer,
)

#: Names of the special ids before those of text.
NAMES = ["<pad>", "<bos>", "<eos>", "<mask>", *(f"<special-{i}>" for i in range(4, SPECIAL))]


def fast(tokenizer: Tokenizer, vocabulary: int, length: int, answer: int | None = None, eos: int | None = None) -> Any:
    """A ``PreTrainedTokenizerFast``, or the pretrained one itself.

    Args:
        vocabulary: ids of the model that reads them. length: its longest text.
        answer: id of ``<answer>``, where there is one.
        eos: ids of a text are ``<bos> text <eos>``, and this is that of ``<eos>``; where not given, ``<bos> text``.

    Raises:
        ValueError: for a tokenizer that has no such form.
    """
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PretrainedTokenizer):
        return tokenizer.whole
    if isinstance(tokenizer, ByteTokenizer):
        backend = byte_level(vocabulary, answer)
    elif isinstance(tokenizer, BPETokenizer):
        backend = tokenizer.tokenizer
    else:
        raise ValueError(f"text: {type(tokenizer).__name__} has no form in transformers; bytes and byte pairs have")
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    names = {key: backend.id_to_token(i) for key, i in special.items()}
    if eos is not None:
        backend = _ending(backend, eos)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names)


def _ending(backend: Any, eos: int) -> Any:
    """With ``<bos>`` before a text and ``<eos>``, of this id, behind it."""
    import tokenizers
    from tokenizers import processors

    file = json.loads(backend.to_str())
    begin, end = backend.id_to_token(BOS), backend.id_to_token(EOS)
    file["model"]["vocab"] |= {end: eos} if eos == EOS else {end: eos, f"<special-{EOS}>": EOS}
    for token in file["added_tokens"]:
        token["id"] = eos if token["content"] == end else token["id"]
    file["added_tokens"].sort(key=lambda token: token["id"])
    made = tokenizers.Tokenizer.from_str(json.dumps(file))
    pieces = [(begin, BOS), (end, eos)]
    made.post_processor = processors.TemplateProcessing(f"{begin} $A {end}", special_tokens=pieces)
    return made


def byte_level(vocabulary: int, answer: int | None = None) -> Any:
    """ByteTokenizer as one of the tokenizers package: byte pairs without a merge.

    >>> byte_level(266, answer=265).encode("7+5<answer>").ids
    [1, 63, 51, 61, 265]
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    letters = {letter: SPECIAL + byte for byte, letter in _letters().items()}
    named = {name: i for i, name in enumerate(NAMES)}
    further = {f"<special-{i}>": i for i in range(SPECIAL + 256, vocabulary)}
    if answer is not None:
        further = {name: i for name, i in further.items() if i != answer} | {"<answer>": answer}
    made = tokenizers.Tokenizer(models.BPE(named | letters | further, []))
    made.add_special_tokens([name for name, _ in sorted((named | further).items(), key=lambda pair: pair[1])])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    return made


def _letters() -> dict[int, str]:
    """Byte -> the printable letter that byte-level encodings write for it (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
