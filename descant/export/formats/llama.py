"""transformers: a causal language model as LlamaForCausalLM or MixtralForCausalLM, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from descant.export.formats.base import ModelFormat, Parts, tokenizer_of
from descant.export.formats.fast_tokenizers import ANSWER, chat_template, fast, require_question
from descant.modules.language import CausalLM
from descant.modules.language.llama_format import llama_config, to_llama
from descant.modules.tokenizers.text import BOS, EOS, PAD, SPECIAL
from descant.recipes.base.recipe import Recipe


class LlamaFormat(ModelFormat):
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
        if (tokenizer := tokenizer_of(parts)) is not None:
            answer = getattr(recipe, "answer_token", -1)
            marks = {answer: ANSWER} if answer >= tokenizer.vocabulary else {}
            whole = fast(tokenizer, lm.vocabulary, lm.length, marks)
            if marks and getattr(tokenizer, "template", "") is not None:
                whole.chat_template = chat_template(tokenizer, whole)
                require_question(tokenizer, whole, None, answer)
            whole.save_pretrained(folder)

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
    """Return the recipe's language model; raise ValueError if transformers' text models cannot hold the recipe."""
    lm = getattr(recipe, "lm", None)
    if not isinstance(lm, CausalLM):
        raise ValueError(f"{type(recipe).__name__}: it has no causal language model, which transformers would hold")
    require_causal(recipe)
    return lm


def require_causal(recipe: Recipe) -> None:
    """Raise ValueError for a recipe whose prefixes are read in both directions."""
    if getattr(recipe, "prefix_sight", False):
        raise ValueError("prefix_sight: a prefix read in both directions is in no causal model of transformers")
