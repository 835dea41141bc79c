"""Any encoder of Hugging Face transformers as a tower, from a local folder or with random weights.

Letters: B samples, T tokens, D width.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import all_real

Option = bool | int | float | str | list[int] | list[float] | list[str] | None


class TransformersTower(Tower):
    """``h_BTD = AutoModel(x, attention_mask).last_hidden_state``, whatever the model's main input is.

    Token ids ``[B, T]`` for text models (padding where ``mask`` is False, by default where the id is the
    model's padding id), pixels for image models, samples or features for audio models. Of an encoder-decoder,
    the encoder.
    A pooler is left out: pooling is a separate part. Nothing is downloaded.

    Args:
        folder: a local folder with config.json and weights, as ``save_pretrained`` writes it.
        config: random weights instead: ``model_type`` (such as bert, vit) and fields of its configuration.

    Raises:
        ValueError: if not exactly one of the two is given, the folder is missing or its weights are of
            another architecture, or the model type or a field is unknown.

    >>> tower = TransformersTower(config=dict(
    ...     model_type="bert", vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> tower(torch.tensor([[1, 5, 2, 0]])).mask_BT.tolist()
    [[True, True, True, False]]
    """

    def __init__(self, folder: Path | None = None, config: dict[str, Option] | None = None) -> None:
        super().__init__()
        if (folder is None) == (config is None):
            raise ValueError("folder, config: give one of them: a local folder, or a model_type for random weights")
        model: Any = _from_folder(folder) if folder is not None else _from_config(dict(config or {}))
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # its parameters would never see a gradient
        self.kind, self.width = str(model.config.model_type), _width(model.config)
        self.input, self.pad = str(model.main_input_name), getattr(model.config, "pad_token_id", None) or 0
        self.model = model

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        inputs: dict[str, Tensor] = {self.input: x}
        if self.input == "input_ids":
            mask = x != self.pad if mask is None else mask
        if mask is not None:
            if self.input == "pixel_values":
                raise ValueError(f"mask: {self.kind} has no tokens to mask at its input; use PatchTower")
            # a sample of nothing but padding looks at everything: softmax over no key is NaN in some kernels
            inputs["attention_mask"] = (mask | ~mask.any(dim=1, keepdim=True)).long()
        output = self.model(**inputs, return_dict=True)
        h_BTD = getattr(output, "last_hidden_state", None)
        if h_BTD is None:
            raise ValueError(f"model_type {self.kind!r}: it has no last_hidden_state; use one of its encoders")
        if h_BTD.ndim == 4:  # a conv net's map
            h_BTD = h_BTD.flatten(2).transpose(1, 2)
        if mask is None:
            return Tokens(h_BTD, all_real(h_BTD))
        if mask.shape[1] != h_BTD.shape[1]:  # audio models shorten time
            mask = self.model._get_feature_vector_attention_mask(h_BTD.shape[1], mask)
        return Tokens(h_BTD, mask.bool())

    def blocks(self) -> list[nn.Module]:
        """The items of the outermost lists of layers."""
        lists = {name: part for name, part in self.model.named_modules() if isinstance(part, nn.ModuleList)}
        outer = [part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
        return [block for part in outer for block in part]


def _from_folder(folder: Path) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    if not (folder / "config.json").is_file():
        raise ValueError(f"folder {folder}: {'no config.json in it' if folder.is_dir() else 'no such folder'}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what does not fit is a page; ours is a line
    try:
        # in float32, as the rest trains; the trainer's precision decides what is computed in
        model, found = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # each loader has its own errors
        raise ValueError(f"folder {folder}: cannot be read ({_one_line(error)})") from None
    finally:
        logging.set_verbosity(verbosity)
    # transformers fills what a file lacks with random numbers and a warning; a pooler is not used
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing or found["mismatched_keys"]:
        shapes = len(found["mismatched_keys"])
        raise ValueError(
            f"folder {folder}: its weights are not of {model.config.model_type}: {len(missing)} missing, "
            f"{len(found['unexpected_keys'])} unexpected, {shapes} of another shape"
        )
    return model


def _from_config(config: dict[str, Option]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    kind = str(config.pop("model_type", ""))
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=3, cutoff=0.5)
        raise ValueError(f"config: no model_type {kind!r}; the nearest are {', '.join(close or ['bert', 'vit'])}")
    known = AutoConfig.for_model(kind)
    unknown = [key for key in config if not hasattr(known, key)]
    if unknown:  # transformers would store a misspelt field and build the default size
        close = difflib.get_close_matches(unknown[0], list(known.to_dict()), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"config: {kind} has no field {unknown[0]!r}{hint}")
    try:
        return AutoModel.from_config(AutoConfig.for_model(kind, **config))
    except Exception as error:  # each model checks in its own way
        raise ValueError(f"config: {kind} cannot be built ({_one_line(error)})") from None


def _width(config: Any) -> int:
    """D, which a few families call by another name."""
    return int(config.hidden_sizes[-1] if getattr(config, "hidden_sizes", None) else config.hidden_size)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
