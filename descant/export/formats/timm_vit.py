"""timm: the encoder of a masked model, a PatchTower or a TimmTower, as a folder for ``timm.create_model``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from descant.export.formats.base import ImageSteps, ModelFormat, Parts, unfrozen
from descant.modules.masking.adapters import Adapters, PatchAdapter
from descant.modules.towers import PatchTower, TimmTower
from descant.modules.towers.vit import EPS, TIMM_NAMES, Layout, Trunk, rename_key
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


def to_timm(trunk: Trunk, adapter: PatchAdapter) -> dict[str, Tensor]:
    """Return a state dict with which a plain timm ViT computes the trunk's features on one modality.

    It fits timm's ``VisionTransformer`` of the same sizes with ``class_token=True, num_classes=0``.

    >>> adapter = PatchAdapter(size=[8, 8], patch=4)
    >>> adapter.build(width=8, out=0)
    >>> state = to_timm(Trunk(width=8, depth=1, heads=2), adapter)
    >>> state["patch_embed.proj.weight"].shape, state["pos_embed"].shape
    (torch.Size([8, 3, 4, 4]), torch.Size([1, 5, 8]))
    """
    if len(adapter.patch) != 2 or (adapter.mean, adapter.spread) != (0.0, 1.0):
        raise ValueError("to_timm: a ViT of timm takes raw pixels in patches of two axes; this adapter does not")
    to_timm_names = {f"{ours}.": f"{timm}." for ours, timm in TIMM_NAMES.items()}
    state = {
        rename_key(k, "layers.", "blocks.", to_timm_names): v for k, v in trunk.state_dict().items() if k != "cls_D"
    }
    position_TD = adapter.place_TD + adapter.modality_D.detach()
    inward = adapter.inward.state_dict()
    return {
        **state,
        "cls_token": trunk.cls_D.detach()[None, None],
        "pos_embed": torch.cat([torch.zeros_like(position_TD[:1]), position_TD])[None],
        "patch_embed.proj.weight": inward["weight"].unflatten(1, (adapter.channels, *adapter.patch)),
        "patch_embed.proj.bias": inward["bias"],
    }


#: Parameters of a timm ViT that write into its residual stream.
_INTO_STREAM = ("patch_embed.proj.", "pos_embed", ".attn.proj.", ".mlp.fc2.")


def patch_tower_to_timm(tower: PatchTower) -> dict[str, Tensor]:
    """Return a state dict with which timm's ``VisionTransformer`` without class token computes what a PatchTower does.

    timm's layer norms have an epsilon of 1e-6, those of a PatchTower 1e-5. A norm of ``c h`` with epsilon ``e c^2``
    equals that of ``h`` with epsilon ``e``, and only norms read the residual stream. So everything written into it is
    multiplied by ``c = sqrt(1e-6 / 1e-5)``.

    >>> tower = PatchTower(size=8, patch=4, width=8, depth=1, heads=2)
    >>> state = patch_tower_to_timm(tower)
    >>> state["pos_embed"].shape, torch.equal(state["blocks.0.norm1.weight"], tower.layers[0].norm_1.weight)
    (torch.Size([1, 4, 8]), True)
    """
    names = {f"{ours}.": f"{timm}." for ours, timm in TIMM_NAMES.items()}
    kept = {"positions_TD", "patches.weight", "patches.bias"}
    state = {rename_key(k, "layers.", "blocks.", names): v for k, v in tower.state_dict().items() if k not in kept}
    state |= {"pos_embed": tower.positions_TD[None], **tower.patches.state_dict(prefix="patch_embed.proj.")}
    scale = (EPS / tower.norm.eps) ** 0.5
    written = {name: scale for name in state if any(part in name for part in _INTO_STREAM)}
    return {name: x.detach() * written.get(name, 1.0) for name, x in state.items()}
