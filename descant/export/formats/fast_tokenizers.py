"""Tokenizers as transformers' fast tokenizers with unchanged ids, and the chat template of a dialogue."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from descant.modules.tokenizers.text import (
    BOS,
    EOS,
    PAD,
    PLACE,
    SPECIAL,
    BPETokenizer,
    ByteTokenizer,
    PretrainedTokenizer,
    Tokenizer,
)

#: Names of the special ids, which precede those of text.
NAMES = ["<pad>", "<bos>", "<eos>", "<mask>", *(f"<special-{i}>" for i in range(4, SPECIAL))]
#: Names of the id that an image replaces, and of the id after which an answer begins.
IMAGE, ANSWER = "<image>", "<answer>"


def fast(
    tokenizer: Tokenizer, vocabulary: int, length: int, marks: Mapping[int, str] | None = None, eos: int | None = None
) -> Any:
    """Return a ``PreTrainedTokenizerFast``, or a copy of the pretrained tokenizer itself.

    Args:
        vocabulary: number of ids of the model that reads them. length: its longest text.
        marks: names of ids after those of the tokenizer, such as ``<answer>``.
        eos: the id of ``<eos>`` if a text's ids are ``<bos> text <eos>``; None for ``<bos> text``.
    """
    from transformers import PreTrainedTokenizerFast

    marks = dict(marks or {})
    for i, name in marks.items():
        if i < tokenizer.vocabulary:
            raise ValueError(f"text: {name} has id {i}, and {type(tokenizer).__name__} has a token of that id")
    if isinstance(tokenizer, PretrainedTokenizer):
        whole = copy.deepcopy(tokenizer.whole)
        _add(whole.backend_tokenizer, tokenizer.vocabulary, marks)
        return whole
    if isinstance(tokenizer, ByteTokenizer):
        backend = byte_level(vocabulary, marks)
    elif isinstance(tokenizer, BPETokenizer):
        backend = tokenizer.tokenizer
    else:
        raise ValueError(f"text: {type(tokenizer).__name__} has no form in transformers; bytes and byte pairs have")
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
    names = {key: backend.id_to_token(i) for key, i in special.items()}
    if isinstance(tokenizer, BPETokenizer):
        missing = [key for key, name in names.items() if name is None]
        if missing:
            raise ValueError(f"text: the tokenizer's file has no {missing[0]}, which has id {special[missing[0]]} here")
    backend = _add_ends(backend, EOS if eos is None else eos, ends=eos is not None)
    _add(backend, max(tokenizer.vocabulary, backend.get_vocab_size()), marks)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **names)


def _add(backend: Any, first: int, marks: Mapping[int, str]) -> None:
    """Add marks with these ids to a tokenizer whose ids are below ``first``."""
    names = [marks.get(i, f"<special-{i}>") for i in range(first, max(marks, default=-1) + 1)]
    backend.add_special_tokens(names)
    for i, name in marks.items():
        if backend.token_to_id(name) != i:
            raise ValueError(f"text: {name} has id {i} here, and would have {backend.token_to_id(name)} there")


def _add_ends(backend: Any, eos: int, ends: bool) -> Any:
    """Return a copy that puts ``<bos>`` before a text and, if ``ends``, ``<eos>`` with this id after it."""
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
    template = f"{begin} $A {end}" if ends else f"{begin} $A"
    made.post_processor = processors.TemplateProcessing(template, special_tokens=pieces if ends else pieces[:1])
    return made


def byte_level(vocabulary: int, marks: Mapping[int, str] | None = None) -> Any:
    """Return ByteTokenizer as a tokenizer of the tokenizers package: byte pairs without a merge.

    >>> byte_level(266, {265: "<answer>"}).encode("7+5<answer>").ids
    [1, 63, 51, 61, 265]
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    letters = {letter: SPECIAL + byte for byte, letter in _letters().items()}
    named = {name: i for i, name in enumerate(NAMES)}
    marks = dict(marks or {})
    further = {marks.get(i, f"<special-{i}>"): i for i in range(SPECIAL + 256, vocabulary)}
    made = tokenizers.Tokenizer(models.BPE(named | letters | further, []))
    made.add_special_tokens([name for name, _ in sorted((named | further).items(), key=lambda pair: pair[1])])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    return made


def _letters() -> dict[int, str]:
    """Map each byte to the printable letter that byte-level encodings write for it (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.index0 > 1 or message.role != ('user', 'assistant')[loop.index0] -%}
{{ raise_exception('one question of the user, and its answer: the model was trained on these alone') }}
{%- endif -%}
{{- BEFORE if loop.first else '' -}}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}{{ '<image>' if part.type == 'image' else part.text }}{%- endfor -%}
{%- endif -%}
{{- AFTER if loop.first else END -}}
{%- endfor -%}"""


def chat_template(tokenizer: Tokenizer, whole: Any) -> str:
    """Return a Jinja template of one question and its answer, as ``tokenizer.question`` and dialogue rows have them.

    Args:
        tokenizer: that of the run. whole: the result of :func:`fast` for it, with ``<answer>``.
    """
    before, after = whole.bos_token, ""
    if isinstance(tokenizer, PretrainedTokenizer):
        turn = [{"role": "user", "content": PLACE}]
        text = tokenizer.whole.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        before, after = text.split(PLACE)
    values = {"BEFORE": before, "AFTER": after + ANSWER, "END": whole.eos_token}
    lines = "".join("{%- set " + name + " = " + json.dumps(value) + " -%}\n" for name, value in values.items())
    return lines + _TEMPLATE


def require_question(tokenizer: Tokenizer, whole: Any, image: int | None, answer: int) -> None:
    """Raise ValueError if a question has other ids by ``whole``'s chat template than it has here."""
    text = "Which of two?"
    parts = [*([{"type": "image"}] if image is not None else []), {"type": "text", "text": text}]
    written = whole.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    theirs, ours = whole(written, add_special_tokens=False).input_ids, tokenizer.question(text, image, answer)
    if theirs != ours:
        raise ValueError(f"text: {type(tokenizer).__name__}: a question has ids {theirs} there, and {ours} here")
