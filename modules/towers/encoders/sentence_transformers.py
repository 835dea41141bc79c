"""Encoders of sentence-transformers. Letters: B samples, T tokens, D width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from descant.modules.core.errors import no_such, one_line, warn
from descant.modules.io.owners import SENTENCE, content
from descant.modules.io.pretrained import Place, inside, json_of, object_of
from descant.modules.towers.base import Tokens
from descant.modules.towers.encoders.base import Encoder, Output, one_token, weights_of
from descant.modules.towers.encoders.transformers import _TransformersEncoder
from descant.modules.towers.heads import FirstPool, LastPool, MaxPool, MeanPool
from descant.modules.towers.timm import load_exactly, read_weights

#: Supported modules of sentence-transformers, by the last part of their type.
MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
#: Earlier keys of pooling -> their present names, in the order in which several are concatenated.
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
    """Model of sentence-transformers: a transformer, then pooling, then dense layers or a normalisation."""

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
        """Return the number of ids of the longest text that is not truncated; warn of a prompt before each text."""
        own = object_of(place.folder / "sentence_bert_config.json")
        if own.get("do_lower_case"):
            raise ValueError(f"{place.label}: do_lower_case: its texts are lowered before its tokenizer, and not here")
        prompts = object_of(place.folder / "config_sentence_transformers.json")
        default = prompts.get("default_prompt_name")
        if default is not None and (prompt := prompts.get("prompts", {}).get(default)):
            warn(
                f"{place.label}: its owner puts {prompt!r} before each text; here the data's texts are read as they are"
            )
        limit = object_of(place.folder / "tokenizer_config.json").get("model_max_length")
        lengths = (own.get("max_seq_length"), limit, positions)
        return min((int(n) for n in lengths if isinstance(n, int) and n > 0), default=None)

    def encode(self, x: Tensor, mask_BT: Tensor | None) -> Tokens:
        tokens = self.body.encode(x, mask_BT)
        return one_token(self.rest(tokens)) if self.embeds else tokens


class _SentencePool(nn.Module):
    """Pooling of sentence-transformers: ``tokens -> h_BD``, with several modes concatenated."""

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
