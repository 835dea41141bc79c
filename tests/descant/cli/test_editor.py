"""The JSON schema for editors: it takes every configuration that ships, and sees a mistake in one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from descant.claims import spec
from descant.cli import editor
from descant.cli.catalogue import BASE, list_shipped
from descant.cli.document import load
from descant.cli.errors import Refusal
from tests.conftest import Result

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def validators(written_content: dict[str, Any]) -> dict[str, Any]:
    from descant.cli.dump import Written

    schemas = {root: editor.of(Written(written_content, "fit"), root) for root in ("", "data")}
    for schema in schemas.values():
        jsonschema.Draft7Validator.check_schema(schema)
    return {root: jsonschema.Draft7Validator(schema) for root, schema in schemas.items()}


@pytest.mark.parametrize("name", ["base", *(name for name in list_shipped() if not name.startswith("claims/"))])
def test_what_ships_is_valid(validators: dict[str, Any], name: str) -> None:
    root = "data" if name.startswith("data/") else ""
    validators[root].validate(load({"base": BASE, **list_shipped()}[name]).plain)


MISTAKES: list[tuple[tuple[str, ...], Any]] = [
    (("modle",), {}),
    (("seed_everything",), "x"),
    (("trainer", "max_step"), 3),
    (("trainer", "max_steps"), "three"),
    (("trainer", "precision"), "12-true"),
    (("trainer", "callbacks+"), [{"class_path": "EarlyStopping", "init_args": {"monitr": "x"}}]),
    (("model", "init_arg"), {}),
    (("model", "init_args", "widht"), 3),
    (("model", "init_args", "width"), "wide"),
    (("model", "init_args", "optimizer", "init_args", "lrr"), 1.0),
    (("model", "init_args", "towers", "init_args", "image", "init_args", "widths"), 3),
    (("data", "init_args", "batch_size"), 1.5),
]


@pytest.mark.parametrize(("place", "value"), MISTAKES, ids=[".".join(place) for place, _ in MISTAKES])
def test_a_mistake_is_seen(validators: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    config = copy.deepcopy(load(list_shipped()["contrastive/emoji"]).plain)
    node = config
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    assert not validators[""].is_valid(config)


def test_classes_of_the_user_are_not_checked(validators: dict[str, Any]) -> None:
    model = {"class_path": "my.Recipe", "init_args": {"anything": 1}}
    assert validators[""].is_valid({"model": model}) and not validators[""].is_valid({"model": {**model, "more": 1}})


def test_a_command_prints_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_content: dict[str, Any]
) -> None:
    from descant.cli import dump

    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path))
    dump.place().write_text(json.dumps(written_content))
    assert json.loads(cli("schema").out)["properties"]["model"]
    assert json.loads(cli("schema", "data").out)["title"] == "Descant: data"
    assert cli("schema", "modle").refusal == "schema modle: nothing, data or claim"
    assert "yaml-language-server" in cli("schema", "--help").out


CLAIM = jsonschema.Draft7Validator(editor.claim())


@pytest.mark.parametrize("name", spec.names())
def test_a_claim_that_ships_is_valid(name: str) -> None:
    jsonschema.Draft7Validator.check_schema(editor.claim())
    CLAIM.validate(yaml.safe_load((spec.folder() / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("titel",), "x"),
        (("seed",), "23"),
        (("metric", "margin"), 0),
        (("removes",), None),
        (("metric", "margin"), "small"),
        (("metric", "better"), "up"),
        (("arms", "method", "option"), {}),
        (("arms",), {"baseline": {}}),
        (("budget", "equal"), "minutes"),
        (("seeds", "full"), 3),
        (("also",), [{"metric": "a/b", "arm": "method"}]),
    ],
)
def test_a_mistake_in_a_claim_is_seen(place: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    content = yaml.safe_load((spec.folder() / "dcd.yaml").read_text())
    node = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    assert not CLAIM.is_valid(content)
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(Refusal, match=r"wrong\.yaml: "):
        spec.load(str(tmp_path / "wrong.yaml"))
