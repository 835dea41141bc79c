"""A causal language model's weights and settings in transformers' format: LlamaForCausalLM and MixtralForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from descant.modules.language.model import CausalLM
from descant.modules.moe import TopKRouter


def llama_config(lm: CausalLM) -> dict[str, Any]:
    """Return the settings of a model as arguments of LlamaConfig, or of MixtralConfig if its layers have experts.

    >>> config = llama_config(CausalLM(vocab=11, width=8, depth=1, heads=2))
    >>> config["model_type"], config["intermediate_size"]
    ('llama', 24)
    """
    for part, name in ((lm.axis_F, "positions of three axes"), (lm.visual, "visual experts")):
        if part is not None:
            raise ValueError(f"lm: {name} are in no model of the Llama family")
    first, settings = lm.blocks()[0], dict[str, Any]()
    if any(layer is not whole for layer, whole in zip(lm.blocks(), lm.layers, strict=True)):
        raise ValueError("lm.depths: layers that take a part of the tokens are in no model of the Llama family")
    if lm.experts is not None:
        settings = _mixtral(lm)
    tied = lm.head.weight is lm.embedding.weight
    hidden = settings.pop("hidden", None) or first.down.in_features
    return {
        "model_type": "mixtral" if settings else "llama",
        "vocab_size": lm.vocabulary,
        "hidden_size": lm.width,
        "intermediate_size": hidden,
        "num_hidden_layers": len(lm.layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.key_heads,
        "max_position_embeddings": lm.length,
        "rms_norm_eps": first.norm_1.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": lm.theta},
        "tie_word_embeddings": tied,
        **settings,
    }


def _mixtral(lm: CausalLM) -> dict[str, Any]:
    """Return the settings of experts; raise ValueError for those that Mixtral lacks."""
    experts, router = lm.experts, lm.experts and lm.experts.router
    assert experts is not None
    if type(router) is not TopKRouter or router.norm != "after" or router.bias_rate is not None:
        raise ValueError(f"lm.experts.router: {type(router).__name__}; Mixtral routes by TopKRouter(norm=after) alone")
    for name in ("shared", "capacity"):
        if getattr(experts, name):
            raise ValueError(f"lm.experts.{name}: Mixtral has none")
    if experts.every != 1:
        raise ValueError(f"lm.experts.every {experts.every}: all of Mixtral's layers have experts")
    made: Any = lm.blocks()[0].moe
    return {
        "hidden": made.experts.down.shape[-1],
        "num_local_experts": experts.experts,
        "num_experts_per_tok": router.k,
        "router_aux_loss_coef": experts.balance or 0.0,
    }


def to_llama(lm: CausalLM) -> dict[str, Tensor]:
    """Name and order weights as in LlamaForCausalLM or MixtralForCausalLM: the inverse of ``CausalLM.load_llama``.

    >>> import torch
    >>> lm = CausalLM(vocab=11, width=8, depth=1, heads=2, tie=False)
    >>> again = CausalLM(vocab=11, width=8, depth=1, heads=2, tie=False)
    >>> again.load_llama(to_llama(lm))
    >>> torch.equal(again.layers[0].qkv.weight, lm.layers[0].qkv.weight)
    True
    """
    state = {"model.embed_tokens.weight": lm.embedding.weight, "model.norm.weight": lm.norm.weight}
    for i, layer in enumerate(lm.blocks()):
        at, E = f"model.layers.{i}", lm.head_width
        q, k, v = layer.qkv.weight.split([layer.heads * E, layer.key_heads * E, layer.key_heads * E])
        state |= {
            f"{at}.self_attn.{x}_proj.weight": w
            for x, w in (("q", to_llama_pairs(q, E)), ("k", to_llama_pairs(k, E)), ("v", v))
        }
        state[f"{at}.self_attn.o_proj.weight"] = layer.out.weight
        state[f"{at}.input_layernorm.weight"] = layer.norm_1.weight
        state[f"{at}.post_attention_layernorm.weight"] = layer.norm_2.weight
        state |= {f"{at}.mlp.{name}": w for name, w in _mlp(layer).items()}
    state["lm_head.weight"] = lm.head.weight
    return {name: w.detach() for name, w in state.items()}


def _mlp(layer: Any) -> Mapping[str, Tensor]:
    if layer.moe is None:
        gate, up = layer.gate_up.weight.chunk(2)
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": layer.down.weight}
    moe = layer.moe
    return {
        "gate.weight": moe.router.gate_ED,
        "experts.gate_up_proj": moe.experts.gate_up,
        "experts.down_proj": moe.experts.down,
    }


def to_llama_pairs(w_ND: Tensor, head_width: int) -> Tensor:
    """Reorder rows of a head projection from adjacent pairs to pairs half a head apart, as in Llama.

    >>> import torch
    >>> to_llama_pairs(torch.tensor([0.0, 2.0, 1.0, 3.0])[:, None], 4).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    return w_ND.unflatten(0, (-1, head_width // 2, 2)).transpose(1, 2).reshape(w_ND.shape)
