"""Capabilities: whether a module has the protocols that a callback needs. A wrapper has those of its inner recipe."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from typing_extensions import TypeIs

P = TypeVar("P")

#: Protocol -> recipes that have it; a callback names them when it refuses another module.
HAD_BY = {
    "AnswersQuestions": "VisionLanguage",
    "Classifies": "Fusion",
    "ContrastsPairs": "Contrastive",
    "Embeds": "Contrastive, Masked, MultiTask and Fusion",
    "Features": "Contrastive and Fusion",
    "ForksFeatures": "Contrastive, MultiTask and Fusion",
    "Fuses": "Fusion",
    "Generates": "VisionLanguage",
    "Inverts": "Contrastive",
    "MultimodalClassifier": "Fusion",
    "PacksDocuments": "VisionLanguage",
    "Predicts": "Masked",
    "PredictsNumbers": "Regression and MultiTask",
    "Reconstructs": "Masked and MultiTask",
    "RolloutPolicy": "VisionLanguage",
    "RoutesTokens": "VisionLanguage",
    "Scores": "Fusion and Masked",
    "StagedRecipe": "Staged",
    "Unimodal": "Fusion",
}


def has(module: object, protocol: type[P]) -> TypeIs[P]:
    """Return True if a module has every member of a protocol.

    >>> from torch import nn
    >>> from descant.modules.core.protocols import Embeds
    >>> has(nn.Linear(1, 1), Embeds)
    False
    """
    return all(hasattr(module, name) for name in _members(protocol))


def require(callback: Any, module: object, *protocols: type) -> None:
    """Raise ValueError for the first protocol that the module lacks, with the callback and recipes that have it."""
    for protocol in protocols:
        if not has(module, protocol):
            name, inner = type(module).__name__, getattr(module, "inner", None)
            name += f" of {type(inner).__name__}" if inner is not None else ""
            who = callback if isinstance(callback, str) else type(callback).__name__
            having = HAD_BY.get(protocol.__name__, "")
            raise ValueError(
                f"{who} needs the protocol {protocol.__name__} ({', '.join(_members(protocol))}); {name} lacks it"
                + (f", {having} have it" if " and " in having else f", {having} has it" if having else "")
            )


def _members(protocol: type) -> list[str]:
    classes = [cls for cls in protocol.__mro__ if getattr(cls, "_is_protocol", False) and cls.__module__ != "typing"]
    names = {name for cls in classes for name in (*inspect.get_annotations(cls), *vars(cls))}
    return sorted(name for name in names if not name.startswith("_") or name == "__call__")
