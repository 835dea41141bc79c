"""``descant schema``: a JSON schema of configurations, for completion and checks in editors.

It is JSON Schema draft 7, which YAML language servers read. Keys of known classes are checked; those of unknown
classes, such as your own, are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from descant.claims import spec
from descant.claims.claim import ARMS, BUDGETS, EQUAL
from descant.cli import dump, schema
from descant.cli.dump import Written
from descant.cli.errors import fail
from descant.cli.schema import Entry, Key, Part, Type

DRAFT = "http://json-schema.org/draft-07/schema#"
#: JSON Schema types of plain parts; if no text is expected, a text is read as the value that it looks like.
_PLAIN: dict[str, dict[str, Any]] = {
    "int": {"type": "integer"},
    "float": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^[-+.\d][\d.]*([eE][-+]?\d+)?$"}]},
    "bool": {"type": "boolean"},
    "str": {"type": "string"},
    "null": {"type": "null"},
    "any": {},
}
_HELP = """\
descant schema: a JSON schema of configurations, for editors

usage: descant schema [data|claim] > FILE

  descant schema > descant.schema.json         of experiments and overlays
  descant schema data > data.schema.json       of what stands under data, as for --data FILE
  descant schema claim > claim.schema.json     of claims

A YAML file that begins with this line is then completed and checked in editors with a YAML language server:
  # yaml-language-server: $schema=descant.schema.json"""


def main(args: Sequence[str]) -> int:
    """Run ``descant schema [data|claim]``."""
    if args and args[0] in ("--help", "-h"):
        print(_HELP)
        return 0
    if list(args) not in ([], ["data"], ["claim"]):
        fail(f"schema {' '.join(args)}: nothing, data or claim")
    if args and args[0] == "claim":
        print(json.dumps(claim(), indent=1))
        return 0
    if (known := dump.read("fit")) is None:
        dump.write()
        known = dump.read("fit")
    if known is None:
        fail(f"schema: it could not be written under {dump.place().parent}")
    print(json.dumps(of(known, *args), indent=1))
    return 0


def of(known: Written, root: str = "") -> dict[str, Any]:
    """Build the JSON schema of a configuration, or of the value of its key ``root``."""
    made, command = _Schema(known), known.command
    keys = {name: made.key(key) for name, key in command.items() if "." not in name}
    for group in {name.partition(".")[0] for name in command if "." in name}:
        inner = {n.partition(".")[2]: key for n, key in command.items() if n.startswith(f"{group}.")}
        keys[group] = {"anyOf": [{"type": "string"}, made.keys(inner)]}
    content = keys[root] if root else {"type": "object", "properties": keys, "additionalProperties": False}
    title = f"Descant: {root or 'a configuration'}"
    return {"$schema": DRAFT, "title": title, **content, "definitions": made.definitions}


def claim() -> dict[str, Any]:
    """Build the JSON schema of a claim; ``descant claims run`` checks the names of metrics, arms and options."""
    number, text, options = {"type": "number"}, {"type": "string"}, {"type": "object"}
    texts = {"type": "array", "items": text}
    seeds, way = {"type": "array", "items": {"type": "integer"}}, {"enum": list(spec.WAYS)}

    def an_object(keys: Iterable[str], kinds: Mapping[str, Any], needed: Sequence[str] = ()) -> dict[str, Any]:
        properties = {key: kinds.get(key, text) for key in keys}
        return {"type": "object", "properties": properties, "required": list(needed), "additionalProperties": False}

    arm = {"configs": texts, "config": options, "options": options, "settings": {"type": "array", "minItems": 1}}
    before = {
        "seed": {"type": "integer", "description": "of one such run for all seeds"},
        **dict.fromkeys(spec.BEFORE_KEYS, options),
        **arm,
    }
    metric = an_object(spec.METRIC_KEYS, {"better": way, "margin": {**number, "exclusiveMinimum": 0}}, spec.METRIC_KEYS)
    bound = {key: number for key in ("times", "at_least", "at_most")}
    condition = an_object(spec.CONDITION_KEYS, bound, ("metric", "arm"))
    condition["anyOf"] = [{"required": ["at_least"]}, {"required": ["at_most"]}]
    an_arm = {"anyOf": [{"type": "null"}, an_object(spec.ARM_KEYS, arm)]}
    kinds = {
        "seed": {"type": "integer", "description": "of the paper, in the list of papers"},
        "options": options,
        "arms": {"type": "object", "additionalProperties": an_arm},
        "before": an_object(("experiment", "seed", *spec.BEFORE_KEYS, *spec.ARM_KEYS), before, ("experiment",)),
        "metric": metric,
        "also": {"anyOf": [{"type": "null"}, {"type": "array", "items": condition}]},
        "oracle": {"type": ["string", "null"]},
        "secondary": texts,
        "signal": condition,
        "lockbox": options,
        "seeds": an_object(BUDGETS, dict.fromkeys(BUDGETS, seeds), BUDGETS),
        "budget": an_object(spec.BUDGET_KEYS, {"equal": {"enum": list(EQUAL)}, "reference": text, "apart": texts}),
        "tuning": an_object(spec.TUNING_KEYS, {"seeds": seeds, "options": options}, ("seeds",)),
    }
    whole = an_object(spec.KEYS, kinds)
    ways = [["like"], [*spec.NEEDED, "simple"], [*spec.NEEDED, "no_simple"]]
    of_ways = [{}, *[{"arms": {"required": list(ARMS)}}] * 2]  # a claim that is like another one has its arms
    whole["anyOf"] = [{"required": keys, "properties": of} for keys, of in zip(ways, of_ways, strict=True)]
    return {"$schema": DRAFT, "title": "Descant: a claim", **whole}


class _Schema:
    """Definitions, made on demand: one per kind and one per class."""

    def __init__(self, known: Written) -> None:
        self.known, self.definitions = known, dict[str, Any]()

    def key(self, key: Key) -> dict[str, Any]:
        return {**self.type(key.type), **_description(key.about)}

    def keys(self, some: Mapping[str, Key]) -> dict[str, Any]:
        """Build an object of these keys; the name of a list and a plus add to the list."""
        properties = {name: self.key(key) for name, key in some.items()}
        for name, key in some.items():
            if (items := schema.items(key.type)) is not None:
                one = self.type(items)
                properties[f"{name}+"] = {"anyOf": [one, {"type": "array", "items": one}]}
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def type(self, type: Type) -> dict[str, Any]:
        parts = [self.part(part) for part in type]
        if not parts or {} in parts:
            return {}
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def part(self, part: Part) -> dict[str, Any]:
        if isinstance(part, str):
            return _PLAIN[part]
        if "choice" in part:
            return {"enum": part["choice"]}
        if "list" in part:
            return {"type": "array", "items": self.type(part["list"])}
        if "map" in part:
            return {"type": "object", "additionalProperties": self.type(part["map"])}
        return {} if "other" in part else self.kind(part)

    def kind(self, part: dict[str, Any]) -> dict[str, Any]:
        """Accept a name, or a class and its arguments, or arguments of the class that another file names."""
        name = "_".join(str(word) for word in part.values())
        if name not in self.definitions:
            self.definitions[name] = {}  # a class may contain its own kind
            paths = self.known.names([part])
            cases = [self.case(path, part) for path in sorted(paths.values())]
            known = {"class_path": {"anyOf": [{"enum": sorted(paths)}, {"type": "string"}]}}
            spec = {"type": "object", "properties": {**known, "init_args": {}, "dict_kwargs": {}}}
            loose: dict[str, Any] = {"type": "object", "not": {"required": ["class_path"]}}
            if (alone := self.known.alone([part])) is not None:
                loose = self.keys(alone.keys)
            named = {**spec, "additionalProperties": False, **({"allOf": cases} if cases else {})}
            self.definitions[name] = {"anyOf": [{"type": "string"}, named, loose]}
        return {"$ref": f"#/definitions/{name}"}

    def case(self, path: str, part: dict[str, Any]) -> dict[str, Any]:
        """Build the branch that validates ``init_args`` against the class named by ``class_path``."""
        entry: Entry = self.known.find(path, [part])
        name = f"{path}_{part.get('skip', 0)}"
        if name not in self.definitions:
            self.definitions[name] = {}
            self.definitions[name] = {**self.keys(entry.keys), **_description(entry.about)}
        names = sorted({entry.name, path, entry.lineage[0]})
        return {
            "if": {"required": ["class_path"], "properties": {"class_path": {"enum": names}}},
            "then": {"properties": {"init_args": {"$ref": f"#/definitions/{name}"}}},
        }


def _description(about: str) -> dict[str, str]:
    return {"description": about} if about else {}
