"""timm backbones as image towers, random or from a local file. Letters: B samples, T tokens, D width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from descant.modules.core.errors import closest, nearest, one_line
from descant.modules.io.plain import load_plain, require_sums
from descant.modules.towers.base import Tokens, Tower
from descant.modules.towers.image import all_real

#: Options of timm.create_model that load weights from a path or the network.
_READS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
Option = bool | int | float | str | list[int] | list[float] | None


class TimmTower(Tower):
    """timm backbone as a tower: ``h_BTD = timm.create_model(name).forward_features(x_BCHW)``.

    Tokens are patches (class tokens first) or the cells of a feature map. Nothing is downloaded: weights are random
    unless ``weights`` names a file.

    Args:
        name: name of the model, such as vit_tiny_patch16_224 or resnet18.
        weights: a local file of the same model, safetensors or torch's (loaded without running code); its classifier is
            dropped.
        size: side of the square image in pixels, for models that need it.
        options: further arguments of the model, such as in_chans, drop_path_rate, embed_dim.

    >>> import torch
    >>> tower = TimmTower("vit_tiny_patch16_224", size=32, options=dict(depth=1, embed_dim=16, num_heads=2))
    >>> tower(torch.zeros(2, 3, 32, 32)).h_BTD.shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self, name: str, weights: Path | None = None, size: int | None = None, options: dict[str, Option] | None = None
    ) -> None:
        super().__init__()
        import timm

        if not timm.is_model(name.split(".")[0]):  # also refuses hf-hub:..., which downloads
            close = closest(name, timm.list_models())
            raise ValueError(f"name {name!r}: timm has no such model; the nearest are {', '.join(close) or 'none'}")
        if outside := sorted(_READS & {*(options or {})}):
            raise ValueError(f"options {outside[0]}: it loads files or downloads; weights names a local file")
        arguments: dict[str, Option] = {"num_classes": 0, **(options or {})}
        if size is not None:
            arguments["img_size"] = size
        try:
            try:
                self.model = timm.create_model(name, pretrained=False, **arguments)
            except TypeError as error:
                if size is None or "img_size" not in str(error):
                    raise
                del arguments["img_size"]  # a conv net takes any size
                self.model = timm.create_model(name, pretrained=False, **arguments)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"options of {name}: {one_line(error, 200)}") from None
        self.name, self.width = name, int(self.model.num_features)
        for part in _after_features(self.model):
            part.requires_grad_(False)  # unused: under DDP a parameter without a gradient is an error
        if weights is not None:
            classifier = self.model.default_cfg.get("classifier") or ()
            drop = (classifier,) if isinstance(classifier, str) else tuple(classifier)
            state = {k: v for k, v in read_weights(weights).items() if not k.startswith(tuple(f"{d}." for d in drop))}
            load_exactly(self.model, state, weights, name)
            self.loaded = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        if mask is not None:
            raise ValueError(f"mask: {self.name} has no input tokens to mask; use PatchTower")
        h = self.model.forward_features(x)
        if isinstance(h, Tensor) and h.ndim == 4:
            if getattr(self.model, "output_fmt", "NCHW") != "NHWC" and h.shape[1] == self.width:
                h = h.permute(0, 2, 3, 1)
            h = h.flatten(1, 2)
        if not isinstance(h, Tensor) or h.ndim != 3 or h.shape[2] != self.width:
            shape = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(f"name {self.name!r}: its features are {shape}, neither tokens nor a feature map")
        return Tokens(h, all_real(h))

    def blocks(self) -> list[nn.Module]:
        """List the transformer blocks, or the residual blocks of all stages."""
        parts = ("blocks", "stages", "layers", "layer1", "layer2", "layer3", "layer4")
        return [block for part in parts for block in _flat(getattr(self.model, part, None))]


def _after_features(model: nn.Module) -> list[nn.Module]:
    """List the parts of a timm model that ``forward_features`` does not run (mostly norms of the classifier)."""
    names = ["head", "head_dist", "classifier", "fc", "fc_norm", "pre_logits"]
    if type(model).__name__ == "MobileNetV3":  # an EfficientNet runs its own in forward_features
        names += ["conv_head", "norm_head"]
    return [part for part in (getattr(model, name, None) for name in names) if isinstance(part, nn.Module)]


def _flat(part: object) -> list[nn.Module]:
    if not isinstance(part, nn.Sequential | nn.ModuleList):
        return []
    blocks: list[nn.Module] = []
    for module in part:
        inner = module if isinstance(module, nn.Sequential | nn.ModuleList) else getattr(module, "blocks", None)
        inside = _flat(inner)
        if inside:
            blocks += inside
        elif next(module.parameters(), None) is not None:
            blocks.append(module)
    return blocks


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or from a torch file that holds only tensors."""
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file{_neighbour(path)}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        require_sums(path)
        loaded = load_plain(path, map_location="cpu")
    except Exception as error:  # each format has its own errors
        raise ValueError(f"weights {path}: cannot be read ({one_line(error, 200)})") from None
    state = next((loaded[k] for k in ("state_dict", "model") if isinstance(loaded, dict) and k in loaded), loaded)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights {path}: it holds no state dict of tensors")
    return cast(dict[str, Tensor], dict(state))


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Load a state dict if all keys fit; otherwise raise ValueError with the number of keys that do not."""
    wanted = model.state_dict()
    missing, unexpected = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    shaped = {key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape}
    if missing or unexpected or shaped:
        first = min(missing | unexpected | shaped)
        raise ValueError(
            f"weights {path}: not of {name}: {len(missing)} keys missing, {len(unexpected)} unexpected, "
            f"{len(shaped)} of another shape, such as {first}"
        )
    model.load_state_dict(state)


def _neighbour(path: Path) -> str:
    files = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, files)
    return f"; did you mean {path.parent / near}?" if near else ""
