"""timm: the encoder of a masked model, a PatchTower or a TimmTower, as a folder for ``timm.create_model``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descant.export.formats.base import ImageSteps, ModelFormat, Parts, unfrozen
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.towers import PatchTower, TimmTower
from descant.modules.towers.vit import Layout, Trunk, patch_tower_to_timm, to_timm
from descant.recipes.base.recipe import Recipe


class TimmFormat(ModelFormat):
    """config.json and model.safetensors, as timm's own ``save_for_hf`` writes them."""

    def write(self, recipe: Recipe, parts: Parts, folder: Path) -> None:
        from timm.models import save_for_hf

        encoder = _encoder(recipe)
        if isinstance(encoder, tuple):
            model = _vit(*encoder)
        else:
            model = encoder.model if isinstance(encoder, TimmTower) else _patch_vit(encoder)
        save_for_hf(model, str(folder), safe_serialization=True, data_config=_data_config(model, parts))

    def outputs(self, recipe: Recipe, folder: Path) -> tuple[Tensor, Tensor]:
        import timm

        encoder, model = _encoder(recipe), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        x_BCHW = torch.randn(2, *model.pretrained_cfg["input_size"])
        theirs = model.forward_features(x_BCHW)
        if isinstance(encoder, TimmTower):
            return encoder.model.forward_features(x_BCHW), theirs
        if isinstance(encoder, PatchTower):
            return encoder(x_BCHW).h_BTD, theirs
        trunk, adapter = encoder
        T = adapter.tokens
        h_ND = adapter.embed(adapter.raw(x_BCHW)[0].flatten(0, 1), torch.arange(T).repeat(2))
        h_MD = trunk(h_ND, Layout([torch.ones(2, dtype=torch.long), torch.full((2,), T)])).h_BTD
        return torch.cat([h_MD[:2, None], h_MD[2:].view(2, T, -1)], dim=1), theirs

    def usage(self, folder: str) -> str:
        model = f'timm.create_model("local-dir:{folder}", pretrained=True)'
        return f"import timm\n\nmodel = {model}  # without a classifier: it returns features"


def _encoder(recipe: Recipe) -> TimmTower | PatchTower | tuple[Trunk, PatchAdapter]:
    """Return the part that timm can hold: a tower, or the encoder of a masked model with one of its adapters."""
    adapters, towers = getattr(recipe, "adapters", None), recipe.towers
    if isinstance(adapters, Adapters):
        trunk = towers["encoder"]
        if not isinstance(trunk, Trunk) or trunk.arguments.get("experts") is not None:
            raise ValueError(f"encoder: {type(trunk).__name__} with experts; timm has plain vision transformers")
        each = adapters.each().items()
        pictures = {name: one for name, one in each if type(one) is PatchAdapter and len(one.size) == 2}
        adapter = pictures.get("image", next(iter(pictures.values()), None))
        if adapter is None:
            raise ValueError("adapters: none reads patches of pictures, which timm's vision transformers do")
        return trunk, adapter
    bare = {name: unfrozen(tower) for name, tower in towers.items()}
    held = [tower for tower in bare.values() if isinstance(tower, TimmTower) or type(tower) is PatchTower]
    if len(held) == 1:
        return held[0]
    kinds = ", ".join(f"{name} {type(tower).__name__}" for name, tower in bare.items())
    raise ValueError(f"towers: {kinds}; timm holds one TimmTower or PatchTower, or the encoder of a masked model")


def _vit(trunk: Trunk, adapter: PatchAdapter) -> nn.Module:
    settings: dict[str, Any] = trunk.arguments
    if adapter.size[0] != adapter.size[1] or adapter.patch[0] != adapter.patch[1]:
        raise ValueError(
            f"adapter: pictures of {list(adapter.size)}, patches of {list(adapter.patch)}; squares are held"
        )
    return _build_vit(settings, adapter.size[0], adapter.patch[0], adapter.channels, to_timm(trunk, adapter))


def _patch_vit(tower: PatchTower) -> nn.Module:
    """Build a ViT without a class token; its mean pool equals ours (MeanPool)."""
    size, patch = tower.shape[1], tower.patches.kernel_size[0]
    pool = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return _build_vit(tower.arguments, size, patch, tower.shape[0], patch_tower_to_timm(tower), **pool)


def _build_vit(
    settings: dict[str, Any], size: int, patch: int, channels: int, state: dict[str, Tensor], **more: Any
) -> nn.Module:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=size,
        patch_size=patch,
        in_chans=channels,
        embed_dim=settings["width"],
        depth=settings["depth"],
        num_heads=settings["heads"],
        mlp_ratio=settings.get("mlp_ratio", 4.0),
        num_classes=0,
        **more,
    )
    model.load_state_dict(state)
    of_weights = ("tag", "license", "url", "hf_hub_id", "origin_url", "paper_ids", "notes")
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in of_weights}
    return model.eval()


def _data_config(model: Any, parts: Parts) -> dict[str, Any]:
    """Return timm's description of the preprocessing: size, crop, mean and standard deviation of pixels in 0..1."""
    steps = ImageSteps.of(parts)
    size = model.patch_embed.img_size if hasattr(model, "patch_embed") else (steps.size,) * 2 if steps else (224, 224)
    channels = model.pretrained_cfg.get("input_size", (3,))[0]
    config = {"input_size": (getattr(model, "in_chans", channels), *size), "crop_pct": 1.0}
    if steps is None:
        return config | {"interpolation": "bilinear"}
    crop = "center" if steps.square else "squash"
    return config | {"interpolation": steps.filter, "crop_mode": crop, "mean": steps.mean, "std": steps.std}
