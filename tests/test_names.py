"""Names of functions are a verb and what it acts on, or the noun of a value; a bare participle leaves that open."""

from __future__ import annotations

import ast

import pytest

from tests.test_layout import TOP

#: Participles that do not end in -ed, and words that are not nouns.
_WORDS = """
asked begun born bound brought built chosen cut done drawn fed found given gone grown held hidden kept known laid learnt
left lent lost made meant met paid said seen sent shown sold spent stuck sung taken taught thought told torn understood
won worn written
most one own shared there together whole
"""
#: Verbs that end in -ed.
_VERBS = "embed exceed feed need proceed seed speed"
#: Functions, methods and properties that still have such a name, by file. The list may only shrink.
LEFT: dict[str, list[str]] = {
    "datamodules/sources/columnar.py": ["known"],
    "datamodules/sources/joined.py": ["merged"],
    "descant/cli/new.py": ["named"],
    "descant/cli/precheck.py": ["_allowed"],
    "descant/data/look.py": ["one"],
    "descant/export/formats/clip.py": ["moved"],
    "descant/plan/contention.py": ["passed"],
    "descant/plan/fake_device.py": ["known"],
    "descant/plan/kernels.py": ["normed"],
    "descant/report/compare.py": ["decided"],
    "descant/templates/datamodule/test_my_data.py": ["saved"],
    "modules/core/batch.py": ["changed"],
    "modules/core/part.py": ["nested"],
    "modules/fusion/boosted.py": ["made"],
    "modules/fusion/classifiers.py": ["made", "made", "made", "made", "made", "made", "made"],
    "modules/fusion/mmcosine.py": ["made"],
    "modules/fusion/mmtm.py": ["made"],
    "modules/io/parts.py": ["named"],
    "modules/io/saved.py": ["exported"],
    "modules/language/generate.py": ["hidden"],
    "modules/language/projectors.py": ["made", "made", "made", "made"],
    "modules/masking/one_of.py": ["chosen"],
    "modules/moe/layer.py": ["chosen"],
    "modules/training_setup/operation_profile.py": ["own"],
    "modules/training_setup/sharding.py": ["called", "gathered", "reached"],
}


def is_participle(name: str) -> bool:
    word = name.strip("_")
    return word in _WORDS.split() or (word.endswith("ed") and word not in _VERBS.split() and "_" not in word)


def names() -> dict[str, list[str]]:
    """Map a file to the names of its functions, methods and properties that are one participle or no noun."""
    found: dict[str, list[str]] = {}
    for top in ("callbacks", "datamodules", "descant", "modules", "recipes"):
        for file in sorted((TOP / top).rglob("*.py")):
            functions = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef))
            if some := sorted(function.name for function in functions if is_participle(function.name)):
                found[str(file.relative_to(TOP))] = some
    return found


@pytest.mark.parametrize("name", ["drawn", "_kept", "named", "whole"])
def test_such_a_name_is_found(name: str) -> None:
    assert is_participle(name) and not is_participle(f"draw_{name}") and not is_participle("embed")


def test_functions_are_verbs_or_nouns() -> None:
    """A new participle needs a better name, and a name that is gone leaves the list."""
    assert names() == LEFT
    assert sum(map(len, LEFT.values())) <= 60
