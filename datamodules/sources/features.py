"""Features of Hugging Face's `datasets` as files store them: names of classes, and which features are read.

A feature is an object with ``_type``; a struct is an object of features, a list ``{"_type": "List", "feature": ...}``,
and in older files a list of one feature (datasets/features/features.py, ``Features.from_dict``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

#: As read from JSON, of any form.
Feature = Any

_LISTS = ("Sequence", "List", "LargeList")
#: Features that are read; Pdf, Nifti, Mesh and others are bytes that no field decodes.
READ = (
    *("Value", "ClassLabel", "Image", "Audio", "Video", "Json", "Translation", "TranslationVariableLanguages"),
    *("Array2D", "Array3D", "Array4D", "Array5D", *_LISTS),
)


def features_of(schema: pa.Schema) -> Mapping[str, Any]:
    """Return column -> its feature, as in the metadata of a schema; empty if it has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def type_of(feature: Feature) -> str | None:
    """Return the type of a feature; None for a struct, and if nothing is known.

    >>> type_of({"_type": "Image"}), type_of({"author": {"dtype": "string", "_type": "Value"}}), type_of(None)
    ('Image', None, None)
    """
    of = feature.get("_type") if isinstance(feature, dict) else None
    return of if isinstance(of, str) else None


def names_of(feature: Feature) -> tuple[str, ...]:
    """Return the class names of a ClassLabel; none for anything else."""
    names = feature.get("names") if type_of(feature) == "ClassLabel" else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(names)


def within(feature: Feature, name: str | None) -> Feature:
    """Return the feature of a part: of a struct by its name, of a list without one; None if it is unknown.

    >>> within({"_type": "List", "feature": {"_type": "Image"}}, None)
    {'_type': 'Image'}
    >>> within({"_type": "Sequence", "feature": {"id": {"_type": "Value"}}}, "id")  # a struct of lists
    [{'_type': 'Value'}]
    """
    inner = feature.get("feature") if type_of(feature) in _LISTS else None
    if name is None:
        return feature[0] if isinstance(feature, list) and feature else inner
    if isinstance(inner, dict) and type_of(inner) is None:
        return [inner.get(name)]
    return feature.get(name) if isinstance(feature, dict) and type_of(feature) is None else None
