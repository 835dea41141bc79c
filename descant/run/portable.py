"""Make a model's configuration and parts independent of the files that they were made from, for an export."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import torch
from torch import nn

from descant.cli.errors import fail, hint
from descant.cli.schema import names_class
from descant.cli.signatures import find_class
from descant.datamodules.fields.fields import AudioField
from descant.modules.adaptation.grow import shape
from descant.modules.adaptation.growth import growable
from descant.modules.adaptation.lora import Lora
from descant.modules.adaptation.quantize import Quantize
from descant.modules.adaptation.saved_tower import SavedTower
from descant.modules.adaptation.stage_changes import StageChange
from descant.modules.io import merge
from descant.modules.io.saved import PLACE, WEIGHTS, Node
from descant.modules.tokenizers.text import BPETokenizer, NgramTokenizer, PretrainedTokenizer, Tokenizer
from descant.modules.towers import PretrainedTower, TransformersTower
from descant.recipes.base.rebuild import without_training
from descant.recipes.base.recipe import Recipe

#: Fields of a transformers configuration that do not describe the model.
_PASSING = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "model_type")


def only(model: Node, keep: Sequence[str]) -> Node:
    """Return the recipe's configuration with only some of its towers."""
    arguments = copy.deepcopy(model["init_args"])
    towers = (arguments.get("towers") or {}).get("init_args") or {}
    known = [name for name, node in towers.items() if node is not None]
    for name in keep:
        if name not in known:
            fail(f"--towers {name}: no such tower{hint(name, known)}")
    towers |= dict.fromkeys(towers_to_drop(model, keep))
    if arguments.get("pairs"):
        arguments["pairs"] = [pair for pair in arguments["pairs"] if set(pair) <= set(keep)]
    adapt = arguments.get("adapt") or []
    for part in adapt:
        if (part.get("init_args") or {}).get("towers") is not None:
            part["init_args"]["towers"] = [name for name in part["init_args"]["towers"] if name in keep]
    if adapt:
        arguments["adapt"] = [part for part in adapt if (part.get("init_args") or {}).get("towers") != []]
    for key, value in arguments.items():  # parts of a dropped modality
        if names_class(value) and (value.get("init_args") or {}).get("modality") in towers_to_drop(model, keep):
            arguments[key] = None
    return {**model, "init_args": arguments}


def towers_to_drop(model: Node, keep: Sequence[str]) -> list[str]:
    """Return the names of the towers to leave out."""
    towers = ((model.get("init_args") or {}).get("towers") or {}).get("init_args") or {}
    return [name for name, node in towers.items() if keep and node is not None and name not in keep]


def without_adapters(model: Node) -> Node:
    """Return the recipe's configuration without Lora and Quantize, which ``merge.plain`` folds into the layers."""
    arguments = dict(model["init_args"])
    folded = (Lora, Quantize)
    arguments["adapt"] = [
        part for part in arguments.get("adapt") or [] if not issubclass(find_class(part["class_path"]), folded)
    ] or None
    return {**model, "init_args": arguments}


def portable_config(model: Node, recipe: Recipe, folder: Path, tokenizer: Tokenizer | None) -> Node:
    """Return a configuration of ``recipe`` that needs ``folder`` alone; towers of other runs become plain ones.

    This changes ``recipe`` in place if a tower wraps another, and writes ``towers/NAME`` for those of transformers.
    """
    node = {"class_path": model["class_path"], "init_args": copy.deepcopy(without_training(model))}
    adapt = node["init_args"].get("adapt") or []  # changed parts have their structure in their arguments
    if any(issubclass(find_class(part["class_path"]), StageChange) for part in adapt):
        kept = [part for part in adapt if not issubclass(find_class(part["class_path"]), StageChange)]
        node["init_args"]["adapt"] = kept or None
    return _portable_node(node, recipe, folder, (), tokenizer)


def _portable_node(
    node: Node, module: nn.Module | None, folder: Path, path: tuple[str, ...], tokenizer: Tokenizer | None
) -> Node:
    cls = find_class(node["class_path"])
    while module is not None and not isinstance(module, cls):  # an adaptation may have wrapped the tower
        inner = getattr(module, "tower", None)
        module = inner if isinstance(inner, nn.Module) else None
    arguments = dict(node.get("init_args") or {})
    for key, value in arguments.items():
        if names_class(value):
            spec, child = _inner_part(value, module, key)
            arguments[key] = _portable_node(spec, child, folder, (*path, key), tokenizer)
        elif isinstance(value, list):
            place = (*path, key)
            arguments[key] = [_portable_node(v, None, folder, place, tokenizer) if names_class(v) else v for v in value]
    if isinstance(module, TransformersTower):
        arguments = _transformers(module, folder, _tower_name(path), tokenizer)
    elif isinstance(module, PretrainedTower):
        arguments |= {"folder": _configuration(module, folder, _tower_name(path)), "weights": False}
    else:
        arguments = {key: _without_file(cls, key, value) for key, value in arguments.items()}
        if module is not None and growable(module) == cls:  # it may have grown since it was built
            now = shape(module) | ({"experts": None} if getattr(module, "experts", True) is None else {})
            arguments |= {k: v for k, v in now.items() if v != arguments.get(k, _default(cls, k))}
    return {"class_path": node["class_path"], **({"init_args": arguments} if arguments else {})}


def _inner_part(node: Node, module: nn.Module | None, key: str) -> tuple[Node, nn.Module | None]:
    """Return the part at ``key`` of a module; a SavedTower is replaced by the tower inside it."""
    holder, child = module, _child(module, key)
    while child is not None and not isinstance(child, find_class(node["class_path"])):
        holder, key, child = child, "tower", _child(child, "tower")
    while isinstance(child, SavedTower):
        node, child = child.spec, child.tower
        _put(cast(nn.Module, holder), key, child)
    return node, child


def _without_file(cls: type, key: str, value: Any) -> Any:
    """Drop an argument that names a file, because its content is in the weights."""
    if value is None or not _is_path(cls, key):
        return value
    if inspect.signature(cls).parameters[key].default is not None:
        raise ValueError(f"{cls.__name__}.{key}: {value} is a file, which an export cannot carry")
    return None


def _default(cls: type, key: str) -> Any:
    return inspect.signature(cls).parameters[key].default


def _is_path(cls: Any, key: str) -> bool:
    hint = get_type_hints(cls.__init__).get(key)
    return any(inspect.isclass(part) and issubclass(part, Path) for part in (hint, *get_args(hint)))


def _child(module: nn.Module | None, key: str) -> nn.Module | None:
    child = dict(module.items()).get(key) if isinstance(module, nn.ModuleDict) else getattr(module, key, None)
    return child if isinstance(child, nn.Module) else None


def _put(module: nn.Module, key: str, child: nn.Module) -> None:
    if isinstance(module, nn.ModuleDict):
        module[key] = child
    else:
        setattr(module, key, child)


def _tower_name(path: tuple[str, ...]) -> str:
    """Return ``text`` for ``("towers", "text", "tower")``."""
    return path[1] if len(path) > 1 and path[0] == "towers" else "-".join(path)


def _transformers(tower: TransformersTower, folder: Path, name: str, tokenizer: Tokenizer | None) -> Node:
    """Write a tower's transformers folder to ``towers/NAME``, and return the arguments of the exported tower."""
    place = folder / "towers" / name
    write_transformers(tower, place, tokenizer if name == "text" else None)
    fields = {k: v for k, v in tower.model.config.to_diff_dict().items() if k not in _PASSING and not k.startswith("_")}
    arguments = {"config": {"model_type": tower.kind, **fields, "pad_token_id": tower.pad}}
    shapes = {key: value.shape for key, value in _plain(tower).state_dict().items()}
    if all(_is_plain(value) for value in fields.values()):
        try:
            with torch.device("meta"):
                built = TransformersTower(**arguments)  # type: ignore[arg-type]
        except (ValueError, NotImplementedError):
            built = None
        if built is not None and {key: value.shape for key, value in built.state_dict().items()} == shapes:
            return arguments
    # a nested configuration stays in the form that transformers reads
    return {"folder": f"{PLACE}/towers/{name}"}


def _configuration(tower: PretrainedTower, folder: Path, name: str) -> str:
    """Copy the owner's configuration and tokenizer to ``towers/NAME``; the weights are those of the export."""
    place = folder / "towers" / name
    for pattern in ("*.json", "*.txt", "*.model", "*/*.json"):
        for file in sorted(tower.folder.glob(pattern)):
            if not file.name.endswith(".index.json"):
                target = place / file.relative_to(tower.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    return f"{PLACE}/towers/{name}"


def write_transformers(tower: TransformersTower, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write a folder for ``AutoModel.from_pretrained`` and, with the model's own tokenizer, ``AutoTokenizer``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model = _plain(tower).model
    config = copy.deepcopy(tower.model.config)
    config.architectures, config.pad_token_id = [type(model).__name__], tower.pad
    config.save_pretrained(folder)
    state = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    if isinstance(tokenizer, PretrainedTokenizer):
        _write_tokenizer(tokenizer, folder)


def _plain(tower: TransformersTower) -> TransformersTower:
    """Return the tower itself, or a copy with plain layers if it is adapted or quantized."""
    return cast(TransformersTower, merge.plain(copy.deepcopy(tower))) if merge.has_changed_layers(tower) else tower


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, bool | int | float | str) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _write_tokenizer(tokenizer: PretrainedTokenizer, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    pad = tokenizer.tokenizer.id_to_token(tokenizer.pad)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.tokenizer, pad_token=pad, model_max_length=tokenizer.length, padding_side="right"
    )
    whole.save_pretrained(folder)


def preprocess(parts: Mapping[str, Sequence[Any]], data: Node, folder: Path) -> tuple[dict[str, list[Node]], list[str]]:
    """Write preprocessing files; return modality -> configurations of its preprocessing, and modalities without."""
    nodes: dict[str, list[Node]] = {}
    for modality, steps in parts.items():
        described = [node for node in (_described_node(part, data, folder) for part in steps) if node is not None]
        if len(described) == len(steps):
            nodes[modality] = described
    return nodes, [modality for modality in parts if modality not in nodes]


def _described_node(part: Any, data: Node, folder: Path) -> Node | None:
    cls = type(part)
    path = f"{cls.__module__}.{cls.__qualname__}"
    if isinstance(part, BPETokenizer):
        part.tokenizer.save(str(folder / "tokenizer.json"))
        return {"class_path": path, "init_args": {"path": f"{PLACE}/tokenizer.json", "length": part.length}}
    if isinstance(part, PretrainedTokenizer):
        files = sorted(folder.glob("towers/*/tokenizer.json"))
        if not files:
            return None
        place = f"{PLACE}/{files[0].parent.relative_to(folder).as_posix()}"
        return {"class_path": path, "init_args": {"folder": place, "length": part.length}}
    if isinstance(part, NgramTokenizer):
        return {"class_path": path, "init_args": {"n": part.n, "buckets": part.vocabulary, "length": part.length}}
    if isinstance(part, AudioField):
        inner = _described_node(part.log_mel, data, folder)
        return inner and {
            "class_path": path,
            "init_args": {"rate": part.rate, "seconds": part.samples / part.rate, "log_mel": inner},
        }
    arguments = {name: getattr(part, name) for name in inspect.signature(cls).parameters if hasattr(part, name)}
    arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    if len(arguments) == len(inspect.signature(cls).parameters) and all(map(_is_plain, arguments.values())):
        return {"class_path": path, "init_args": arguments}
    # the part does not store all its arguments; the others are in the configuration, or defaults
    given = [node for node in _nodes(data) if node["class_path"] == path]
    if not given and all(map(_is_plain, arguments.values())) and _same(part, cls, arguments):
        return {"class_path": path, "init_args": arguments}
    if len(given) != 1 or any(v and _is_path(cls, key) for key, v in (given[0].get("init_args") or {}).items()):
        return None
    return copy.deepcopy(given[0])


def _same(part: Any, cls: Any, arguments: Node) -> bool:
    """Whether a module built from these arguments and defaults has the same buffers."""
    if not isinstance(part, nn.Module):
        return False
    here, new = dict(part.named_buffers()), dict(cls(**arguments).named_buffers())
    return here.keys() == new.keys() and all(torch.equal(here[name], new[name]) for name in here)


def _nodes(value: object) -> Iterable[Node]:
    """Yield every class node in a configuration, at any depth."""
    if isinstance(value, Mapping):
        if isinstance(value.get("class_path"), str):
            yield cast(Node, value)
        for inner in value.values():
            yield from _nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _nodes(inner)
