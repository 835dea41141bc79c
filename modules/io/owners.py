"""Which library owns a folder of weights (open_clip, timm, transformers, sentence-transformers), and its image input.

Only configuration is read here, and nothing outside the folder.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Literal, NamedTuple

from descant.modules.core.errors import one_line
from descant.modules.io.pretrained import Place, json_of, read

#: One number per colour channel.
Colour = tuple[float, float, float]
Owner = Literal["open_clip", "timm", "transformers", "sentence-transformers"]
#: The files that identify an owner: see owner_of.
SENTENCE, OPEN_CLIP, CONFIG = "modules.json", "open_clip_config.json", "config.json"
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class ImageInput(NamedTuple):
    """How images become input: a square of ``size`` pixels (0: any size), ``(x - mean) / std`` of pixels in 0..1.

    ``filter``: for resizing. ``fit``: ``crop`` for the central square of the image; any other is described in words.
    """

    size: int
    mean: Colour
    std: Colour
    filter: str
    fit: str


def owner_of(place: Place) -> Owner:
    """Identify the library that wrote a folder; transformers if it also has open_clip's files."""
    folder, config = place.folder, json_of(place.folder / CONFIG)
    if (folder / SENTENCE).is_file():
        return "sentence-transformers"
    if isinstance(config, dict) and "model_type" in config:
        return "transformers"
    if (folder / OPEN_CLIP).is_file():
        return "open_clip"
    if isinstance(config, dict) and "architecture" in config:
        return "timm"
    raise ValueError(
        f"{place.label}: its {CONFIG} has neither a model_type (transformers) nor an architecture (timm), and there is "
        f"no {OPEN_CLIP} and no {SENTENCE}"
    )


def content(place: Place, name: str) -> dict[str, Any]:
    """Read a JSON object from a file of the folder. Raise ValueError if the file holds no object."""
    loaded = json_of(place.folder / name)
    if not isinstance(loaded, dict):
        raise ValueError(f"{place.label}: {name} {'is damaged' if (place.folder / name).is_file() else 'is missing'}")
    return loaded


def image_input(place: Place, owner: Owner) -> ImageInput | None:
    """Read how images are prepared; None if the folder does not list it."""
    if owner == "timm":
        return _of_timm(place)
    if owner == "open_clip":
        return _of_open_clip(place)
    return _of_transformers(place)


def _of_transformers(place: Place) -> ImageInput | None:
    from transformers import AutoImageProcessor

    if not any((place.folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    made = read(place, AutoImageProcessor)
    factor = getattr(made, "rescale_factor", 1 / 255) if getattr(made, "do_rescale", True) else None
    if factor is None or abs(factor * 255 - 1) > 1e-3:  # 1 / 255 is written with more or fewer digits
        raise ValueError(f"{place.label}: its images are not divided by 255 (rescale_factor {factor}); they are here")
    normal = getattr(made, "do_normalize", True)
    mean, std = (made.image_mean, made.image_std) if normal else ((0.0,) * 3, (1.0,) * 3)
    filter = _FILTERS.get(int(made.resample), str(made.resample))
    if hasattr(made, "max_num_patches"):  # NaFlex: the size that a square image gets
        return _any(place, int(made.patch_size) * math.isqrt(int(made.max_num_patches)), mean, std, filter)
    if hasattr(made, "merge_size"):  # Qwen-VL: a minimum and a maximum number of pixels
        return _any(place, 0, mean, std, filter)
    crop, size = getattr(made, "do_center_crop", None), _sides(getattr(made, "size", None))
    final = _sides(getattr(made, "crop_size", None)) if crop else size
    shortest = "shortest_edge" in dict(getattr(made, "size", None) or {})
    fit = "squash" if not shortest else "crop" if size == final else f"crop of {final[0]} from {size[0]}"
    return make_image_input(place, final, mean, std, filter, fit)


def _any(place: Place, size: int, mean: Any, std: Any, filter: str) -> ImageInput:
    """Build the ImageInput of a model that takes images of any size and keeps their aspect."""
    return make_image_input(place, (max(size, 1),) * 2, mean, std, filter, "its aspect kept")._replace(size=size)


def _sides(size: Any) -> tuple[int, int]:
    """Return height and width from transformers' forms of a size; (0, 0) for other forms."""
    if isinstance(size, int):
        return size, size
    sides = {key: value for key, value in dict(size or {}).items() if value is not None}
    edge = sides.get("shortest_edge", 0)
    return sides.get("height", edge), sides.get("width", edge)


def _of_timm(place: Place) -> ImageInput:
    from timm.data import resolve_data_config

    cfg = content(place, CONFIG)
    given = cfg.get("pretrained_cfg", cfg)
    if not isinstance(given, dict):
        raise ValueError(f"{place.label}: pretrained_cfg is no object")
    data = resolve_data_config({}, pretrained_cfg=given)
    share, mode = data["crop_pct"], data["crop_mode"]
    fit = mode if mode != "center" else "crop" if share == 1 else f"crop of {share:g} of the shorter side"
    return make_image_input(place, tuple(data["input_size"][1:]), data["mean"], data["std"], data["interpolation"], fit)


def _of_open_clip(place: Place) -> ImageInput:
    require_open_clip(place)
    from open_clip.transform import PreprocessCfg

    cfg = content(place, OPEN_CLIP)
    try:
        made = PreprocessCfg(**cfg.get("preprocess_cfg", {}))
        size = cfg["model_cfg"]["vision_cfg"].get("image_size", 224)
    except (TypeError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"{place.label}: {OPEN_CLIP}: {one_line(error, 200)}") from None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    fit = "crop" if made.resize_mode == "shortest" else made.resize_mode
    return make_image_input(place, sides, made.mean, made.std, made.interpolation, fit)


def make_image_input(place: Place, sides: Any, mean: Any, std: Any, filter: str, fit: str) -> ImageInput:
    """Build an ImageInput. Raise ValueError for images that are not square, and for a wrong mean or std."""
    if len(sides) != 2 or sides[0] != sides[1] or sides[0] < 1:
        raise ValueError(f"{place.label}: its images are {list(sides)} pixels; squares are read here")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"{place.label}: mean {list(mean)}, std {list(std)}: three numbers each, std above 0")
    return ImageInput(int(sides[0]), tuple(map(float, mean)), tuple(map(float, std)), filter, fit)  # type: ignore[arg-type]


def require_open_clip(place: Place) -> None:
    """Raise ValueError if the package open_clip is missing."""
    if importlib.util.find_spec("open_clip") is None:
        raise ValueError(f"{place.label}: of open_clip, whose package reads it: pip install 'descant[exchange]'")
