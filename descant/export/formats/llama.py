"""transformers: a causal language model as LlamaForCausalLM or MixtralForCausalLM, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descant.export.formats.base import ModelFormat, Parts
from descant.modules.language import CausalLM
from descant.modules.language.llama_format import llama_config, to_llama
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
from descant.recipes.base.recipe import Recipe

#: Names of the special ids before those of text.
_SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>", *(f"<special-{i}>" for i in range(4, SPECIAL))]


class TransformersFormat(ModelFormat):
    """config.json, model.safetensors, generation_config.json and the files of a fast tokenizer."""

    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        lm = _language_model(recipe)
        settings = llama_config(lm)
        ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
        config = AutoConfig.for_model(**settings, **ids, dtype="float32")
        model: Any = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(to_llama(lm))
        model.generation_config = GenerationConfig(do_sample=False, **ids)
        model.save_pretrained(folder)
        tokenizer = next(iter(parts.get("text", [])), None)
        if isinstance(tokenizer, Tokenizer):
            _write_tokenizer(tokenizer, lm, getattr(recipe, "answer_token", None), folder)

    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        from transformers import AutoModelForCausalLM

        lm = _language_model(recipe)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        ids_BT = torch.randint(SPECIAL, lm.vocabulary, (2, min(lm.length, 24)))
        return lm.logits(lm(lm.embed(ids_BT))), model.eval()(ids_BT).logits

    def usage(self, folder: str) -> str:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
            'model.generate(**tokenizer("an example", return_tensors="pt"), max_new_tokens=16)'
        )


def _language_model(recipe: Recipe) -> CausalLM:
    """The recipe's language model; ValueError where transformers' text models cannot hold the recipe."""
    lm = getattr(recipe, "lm", None)
    if not isinstance(lm, CausalLM):
        raise ValueError(f"{type(recipe).__name__}: it has no causal language model, which transformers would hold")
    if len(recipe.towers):
        raise ValueError(f"towers: {', '.join(recipe.towers)}; a model that reads text alone is held")
    return lm


def _write_tokenizer(tokenizer: Tokenizer, lm: CausalLM, answer: int | None, folder: Path) -> None:
    """A fast tokenizer with the ids of ours: ``<bos>`` before a text, no ``<eos>`` after it."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.whole.save_pretrained(folder)
        return
    if isinstance(tokenizer, ByteTokenizer):
        backend = byte_level(lm.vocabulary, answer)
    elif isinstance(tokenizer, BPETokenizer):
        backend = tokenizer.tokenizer
    else:
        raise ValueError(f"text: {type(tokenizer).__name__} has no form in transformers; bytes and byte pairs have")
    names = {"pad_token": _SPECIAL[PAD], "bos_token": _SPECIAL[BOS], "eos_token": _SPECIAL[EOS]}
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=lm.length, **names).save_pretrained(folder)


def byte_level(vocabulary: int, answer: int | None = None) -> Any:
    """ByteTokenizer as one of the tokenizers package: byte pairs without a merge.

    >>> byte_level(266, answer=265).encode("7+5<answer>").ids
    [1, 63, 51, 61, 265]
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    letters = {letter: SPECIAL + byte for byte, letter in _letters().items()}
    named = {name: i for i, name in enumerate(_SPECIAL)}
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
