"""Encoders of other packages from their folders, which :class:`PretrainedTower` holds: one class an owner.

Each computes with its owner's own modules, and holds no parameter that its output does not use. Letters: B samples, T
tokens, D width.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.errors import closest, no_such, one_line, warn
from descant.modules.io.owners import OPEN_CLIP, SENTENCE, Owner, content, require_open_clip
from descant.modules.io.pretrained import Place, inside, json_of, padding_of, read, tokenizer_of
from descant.modules.towers.base import Tokens
from descant.modules.towers.heads import FirstPool, LastPool, MaxPool, MeanPool
from descant.modules.towers.image import all_real
from descant.modules.towers.timm import TimmTower, load_exactly, read_weights
from descant.modules.towers.transformers import from_place, outer_blocks, width_of

Part = Literal["image", "text"]
Output = Literal["embedding", "tokens"]


class Encoder(nn.Module):
    """``encode(x, mask)``: an embedding ``[B, 1, D]``, or tokens ``[B, T, D]``, with their mask.

    ``kind``: of the model, for error lines. ``reads``: images or texts. Of texts ``vocabulary``, ``pad`` and ``end`` as
    of towers; ``most``: ids of the longest text; ``exactly``: a text has as many, padding included; ``closed``: its end
    is the id that pads; ``sees_padding``: padding is attended to, as it was in training.
    """

    kind: str
    width: int
    reads: Part = "image"
    vocabulary: int | None = None
    pad: int = 0
    end: int | None = None
    most: int | None = None
    exactly: bool = False
    closed: bool = False
    sees_padding: bool = False

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        return outer_blocks(self)

    def learn_ids(self, place: Place, pad: int) -> None:
        """``pad``, and whether texts end with it, of the folder's tokenizer; ``pad`` as given where it has none."""
        self.pad = pad
        if (place.folder / "tokenizer_config.json").is_file():
            tokenizer = tokenizer_of(place)
            known, ids = padding_of(tokenizer), tokenizer("a")["input_ids"]
            self.pad = self.pad if known is None else known
            self.closed = ids[-1:] == [self.pad]


def encoder_of(place: Place, owner: Owner, part: Part | None, output: Output, weights: bool) -> Encoder:
    """The encoder of a folder; arguments as of :class:`PretrainedTower`.

    Raises:
        ValueError: for a part or output that the model has not, an unknown architecture, or files that do not fit it.
    """
    if owner == "transformers":
        return _TransformersEncoder(place, part, output, weights)
    if owner == "open_clip":
        return _OpenClipEncoder(place, part, output, weights)
    return _TimmEncoder(place, output, weights) if owner == "timm" else _SentenceEncoder(place, output, weights)


def one_token(z_BD: Tensor) -> Tokens:
    h_B1D = z_BD.flatten(1)[:, None]
    return Tokens(h_B1D, all_real(h_B1D))


# transformers -------------------------------------------------------------------------------------------------------

#: Models of an image and a text tower that are read, and whether linear maps project what the towers pool.
PAIRS = {"clip": True, "siglip": False}


class _TransformersEncoder(Encoder):
    """An encoder of transformers, or one of the two of a CLIP or SigLIP; its embedding is what the model pools."""

    def __init__(self, place: Place, part: Part | None, output: Output, weights: bool) -> None:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

        super().__init__()
        kind = self.kind = str(content(place, "config.json").get("model_type"))
        if kind not in CONFIG_MAPPING:
            near = ", ".join(closest(kind, CONFIG_MAPPING.keys())) or "clip, siglip, dinov2"
            raise ValueError(f"{place.label}: transformers has no model_type {kind!r}; the nearest are {near}")
        config = read(place, AutoConfig)
        if kind not in PAIRS and hasattr(config, "vision_config"):
            raise ValueError(f"{place.label}: {kind}: of models of images and texts {' and '.join(PAIRS)} are read")
        embeds = output == "embedding"
        model: Any = from_place(place, pooler=embeds) if weights else AutoModel.from_config(config)
        self.projection: nn.Module = nn.Identity()
        if kind in PAIRS:
            require_part(place, kind, part)
            model, whole = getattr(model, f"{'vision' if part == 'image' else 'text'}_model"), model
            if PAIRS[kind] and embeds:
                self.projection = getattr(whole, f"{'visual' if part == 'image' else 'text'}_projection")
        elif model.config.is_encoder_decoder:
            model = model.get_encoder()
        inputs = {"pixel_values": "image", "input_ids": "text"}
        if model.main_input_name not in inputs:
            raise ValueError(f"{place.label}: {kind} reads {model.main_input_name}, neither images nor texts")
        self.reads = inputs[model.main_input_name]  # type: ignore[assignment]
        if self.reads == "text":
            self._texts(place, model, embeds)
        # no key-value cache: nothing is generated
        self.options = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
        self.model, self.embeds, self.width = model, embeds, width_of(model.config)
        if embeds and self.reads == "text" and kind == "siglip":
            self.width = int(model.config.projection_size)
        if isinstance(self.projection, nn.Linear):
            self.width = self.projection.out_features
        self._leave_unused()

    def _texts(self, place: Place, model: Any, embeds: bool) -> None:
        config = model.config
        if embeds and self.kind not in PAIRS:
            raise ValueError(
                f"{place.label}: {self.kind} has no embedding of texts of its own: output tokens and a pool, or a "
                f"folder of sentence-transformers ({SENTENCE})"
            )
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        self.most = getattr(config, "max_position_embeddings", None)
        self.learn_ids(place, int(getattr(config, "pad_token_id", None) or 0))
        if self.kind == "siglip":
            # pools the last position, and has attended to padding; unless its tokenizer gives a mask
            tokenizer = json_of(place.folder / "tokenizer_config.json") or {}
            self.sees_padding = "attention_mask" not in tokenizer.get("model_input_names", ())
            self.exactly = embeds
        elif self.kind == "clip" and embeds:
            # 2 stands in configurations of before: the highest id of the text
            self.end = self.vocabulary - 1 if config.eos_token_id == 2 else int(config.eos_token_id)

    def _leave_unused(self) -> None:
        """No gradient and no memory for what the output does not use."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)
        if self.embeds:
            return
        if getattr(model, "pooler", None) is not None:
            model.pooler = None
        if getattr(model, "head", None) is not None:  # SigLIP's
            model.head = nn.Identity()
        if self.kind.startswith("clip") and self.reads == "image":
            model.post_layernorm.requires_grad_(False)  # norms the pooled token alone

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        if self.reads == "image":
            output = self.model(pixel_values=x, return_dict=True)
        else:
            seen_BT = None if self.sees_padding or mask_BT is None else mask_BT.long()
            output = self.model(x, attention_mask=seen_BT, return_dict=True, **self.options)
        if self.embeds:
            if output.pooler_output is None:
                raise ValueError(f"{self.kind}: it pools nothing; output tokens")
            return one_token(self.projection(output.pooler_output))
        h_BTD = output.last_hidden_state
        if h_BTD.ndim == 4:  # a conv net's map
            h_BTD = h_BTD.flatten(2).transpose(1, 2)
        return Tokens(h_BTD, all_real(h_BTD) if mask_BT is None else mask_BT)


def require_part(place: Place, kind: str, part: Part | None) -> None:
    """Refusal where one of two towers has to be named."""
    if part is None:
        raise ValueError(f"{place.label}: part: image or text; {kind} has both")


# timm ---------------------------------------------------------------------------------------------------------------


class _TimmEncoder(Encoder):
    """A model of timm without its classifier; its embedding is what the model pools, as with ``num_classes=0``."""

    def __init__(self, place: Place, output: Output, weights: bool) -> None:
        super().__init__()
        config = content(place, "config.json")
        name, options = str(config["architecture"]), dict(config.get("model_args") or {})
        options.pop("num_classes", None)
        file = weights_of(place, "model.safetensors", "pytorch_model.bin") if weights else None
        try:
            tower = TimmTower(name, weights=file, options=options)
        except (ValueError, AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{place.label}: {one_line(error)}") from None
        self.kind, self.tower, self.embeds = name, tower, output == "embedding"
        self.width = int(getattr(tower.model, "head_hidden_size", tower.width)) if self.embeds else tower.width
        if self.embeds:
            tower.requires_grad_(True)

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        return one_token(self.tower.model(x)) if self.embeds else self.tower(x)

    def blocks(self) -> list[nn.Module]:
        return self.tower.blocks()


def weights_of(place: Place, *names: str) -> Path:
    """The first of these files that is there; ValueError for a folder without any."""
    file = next((place.folder / name for name in names if (place.folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{place.label}: no weights in it ({' or '.join(names)})")
    return file


# open_clip ----------------------------------------------------------------------------------------------------------


class _OpenClipEncoder(Encoder):
    """The image or the text tower of a CLIP of open_clip with its projection."""

    def __init__(self, place: Place, part: Part | None, output: Output, weights: bool) -> None:
        super().__init__()
        require_open_clip(place)
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg, _build_text_tower, _build_vision_tower
        from open_clip.model import convert_to_custom_text_state_dict as custom

        self.kind = "open_clip"
        require_part(place, "open_clip", part)
        if output == "tokens":
            raise ValueError(f"{place.label}: of open_clip's models embeddings are read; output: embedding")
        config = content(place, OPEN_CLIP).get("model_cfg")
        if not isinstance(config, dict) or "multimodal_cfg" in config:
            raise ValueError(f"{place.label}: model_cfg of {OPEN_CLIP} is of no CLIP of two towers, which are read")
        side, build, cfg = (
            ("vision_cfg", _build_vision_tower, CLIPVisionCfg)
            if part == "image"
            else ("text_cfg", _build_text_tower, CLIPTextCfg)
        )
        settings = dict(config.get(side) or {})
        _require_here(place, side, settings)
        settings |= {"output_tokens": False} | ({"timm_model_pretrained": False} if part == "image" else {})
        try:
            self.width = int(config["embed_dim"])
            known = cfg(**settings)
            self.model = build(self.width, known, bool(config.get("quick_gelu", False)))
        except (TypeError, KeyError, ValueError, AssertionError, RuntimeError) as error:
            raise ValueError(f"{place.label}: {side} of {OPEN_CLIP}: {one_line(error, 200)}") from None
        if weights:
            file = weights_of(place, "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
            state = read_weights(file)
            if "positional_embedding" in state:
                state = custom(state)
            prefix = "visual." if part == "image" else "text."
            mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            load_exactly(self.model, mine, file, f"{side} of {OPEN_CLIP}")
        self.reads = "image" if part == "image" else "text"
        if part == "text":
            self.vocabulary, self.most = int(known.vocab_size), int(known.context_length)
            self.learn_ids(place, int(known.pad_id))
            self.exactly = known.pool_type == "last" or bool(known.no_causal_mask)
            self.end = {"argmax": self.vocabulary - 1, "eos": int(known.eos_id)}.get(known.pool_type)

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        return one_token(self.model(x))


def _require_here(place: Place, side: str, settings: dict[str, Any]) -> None:
    """Refusal of parts that open_clip would fetch from a hub by their names."""
    import timm

    if settings.get("hf_model_name"):
        raise ValueError(f"{place.label}: {side}.hf_model_name {settings['hf_model_name']}: a model of a hub, not read")
    name = settings.get("timm_model_name")
    if name and not timm.is_model(str(name).split(".")[0]):
        near = ", ".join(closest(str(name), timm.list_models())) or "none"
        raise ValueError(
            f"{place.label}: {side}.timm_model_name {name}: timm has no such model; the nearest are {near}"
        )


# sentence-transformers ----------------------------------------------------------------------------------------------

#: Modules of sentence-transformers that are read, by the last part of their type.
MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
#: Its earlier keys of pooling -> what they are called now, in the order in which several are joined.
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
#: Activations of its Dense layers, by the last part of their name.
ACTIVATIONS = {name: getattr(nn, name) for name in ("Tanh", "Identity", "ReLU", "GELU", "SiLU", "Sigmoid")}


class _SentenceEncoder(Encoder):
    """A model of sentence-transformers: a transformer, pooling, and dense layers or a normalisation behind it."""

    def __init__(self, place: Place, output: Output, weights: bool) -> None:
        super().__init__()
        steps = json_of(place.folder / SENTENCE)
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise ValueError(f"{place.label}: {SENTENCE} is damaged")
        kinds = [str(step.get("type")).rpartition(".")[2] for step in steps]
        for kind in kinds:
            if kind not in MODULES:
                raise ValueError(f"{place.label}: {SENTENCE}: {kind!r}: {no_such(kind, MODULES)}")
        if kinds[:2] != ["Transformer", "Pooling"]:
            raise ValueError(f"{place.label}: {SENTENCE}: {', '.join(kinds)}; a Transformer and a Pooling come first")
        folders = [inside(place, step.get("path", "")) for step in steps]
        body = _TransformersEncoder(Place(folders[0], None, place.label), None, "tokens", weights)
        if body.reads != "text":
            raise ValueError(f"{place.label}: its transformer {body.kind} reads images; read that folder itself")
        self.reads, self.kind, self.body, self.width = "text", body.kind, body, body.width
        self.vocabulary, self.pad, self.closed = body.vocabulary, body.pad, body.closed
        self.most = self._length(Place(folders[0], None, place.label), body.most)
        self.rest = nn.Sequential()
        self.embeds = output == "embedding"
        if not self.embeds:
            return
        for kind, folder in zip(kinds[1:], folders[1:], strict=True):
            at = Place(folder, None, f"{place.label}: {folder.name}")
            made = _Normalized() if kind == "Normalize" else _pooling(at) if kind == "Pooling" else _dense(at, weights)
            self.rest.append(made)
            if isinstance(made, _SentencePool):
                self.width = body.width * len(made.modes)
            elif isinstance(made, nn.Sequential):
                self.width = int(made[0].out_features)  # type: ignore[arg-type]

    @staticmethod
    def _length(place: Place, positions: int | None) -> int | None:
        """Ids of the longest text that is not cut; warns of what is put before each text."""
        own = json_of(place.folder / "sentence_bert_config.json") or {}
        if own.get("do_lower_case"):
            raise ValueError(f"{place.label}: do_lower_case: its texts are lowered before its tokenizer, and not here")
        prompts = json_of(place.folder / "config_sentence_transformers.json") or {}
        default = prompts.get("default_prompt_name")
        if default is not None and (prompt := prompts.get("prompts", {}).get(default)):
            warn(
                f"{place.label}: its owner puts {prompt!r} before each text; here the data's texts are read as they are"
            )
        limit = (json_of(place.folder / "tokenizer_config.json") or {}).get("model_max_length")
        lengths = (own.get("max_seq_length"), limit, positions)
        return min((int(n) for n in lengths if isinstance(n, int) and n > 0), default=None)

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        tokens = self.body.encode(x, mask_BT)
        return one_token(self.rest(tokens)) if self.embeds else tokens


class _SentencePool(nn.Module):
    """Pooling of sentence-transformers: ``tokens -> h_BD``, several ways side by side."""

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, tokens: Tokens) -> Tensor:
        pools = {"cls": FirstPool(), "max": MaxPool(), "mean": MeanPool(), "lasttoken": LastPool()}
        h_BTD, mask_BT = tokens
        count_B1 = mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
        parts = []
        for mode in self.modes:
            if mode == "mean_sqrt_len_tokens":
                parts.append(MeanPool()(tokens) * count_B1.sqrt())
            elif mode == "weightedmean":
                w_BT = mask_BT * torch.arange(1, mask_BT.shape[1] + 1, device=h_BTD.device)
                w_BT = w_BT.to(h_BTD.dtype)
                parts.append((h_BTD * w_BT[..., None]).sum(dim=1) / w_BT.sum(dim=1, keepdim=True).clamp(min=1e-9))
            else:
                parts.append(pools[mode](tokens))
        return torch.cat(parts, dim=1)


class _Normalized(nn.Module):
    def forward(self, h_BD: Tensor) -> Tensor:
        return F.normalize(h_BD, dim=1)


def _pooling(place: Place) -> _SentencePool:
    config = content(place, "config.json")
    given = config.get("pooling_mode")
    if given is None:
        given = [mode for key, mode in POOLINGS.items() if config.get(key)] or ["mean"]
    modes = (given,) if isinstance(given, str) else tuple(given)
    for mode in modes:
        if mode not in POOLINGS.values():
            raise ValueError(f"{place.label}: pooling_mode {mode!r}: {no_such(str(mode), POOLINGS.values())}")
    return _SentencePool(modes)


def _dense(place: Place, weights: bool) -> nn.Sequential:
    config = content(place, "config.json")
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if name not in ACTIVATIONS:
        raise ValueError(f"{place.label}: activation_function {name!r}: {no_such(name, ACTIVATIONS)}")
    ends = {config.get(f"module_{end}_name") or "sentence_embedding" for end in ("input", "output")}
    if config.get("use_residual") or ends != {"sentence_embedding"}:
        raise ValueError(f"{place.label}: a dense layer with a residual, or of tokens, is not read")
    try:
        linear = nn.Linear(int(config["in_features"]), int(config["out_features"]), bool(config.get("bias", True)))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place.label}: config.json: {one_line(error, 200)}") from None
    if weights:
        file = weights_of(place, "model.safetensors", "pytorch_model.bin")
        state = {key.removeprefix("linear."): value for key, value in read_weights(file).items()}
        load_exactly(linear, state, file, "a dense layer")
    return nn.Sequential(linear, ACTIVATIONS[name]())
