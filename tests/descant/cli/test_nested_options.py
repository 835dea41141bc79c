"""Options that the parser takes from a configuration only: null in a part, and keys through two mappings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.conftest import Result

Cli = Callable[..., Result]
STAGES = "model.init_args.stages"
PARTS = "data.init_args.stages.text.init_args.data.init_args.parts"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.init_args.recipe.init_args.lm.init_args.visual", None),
        (f"{STAGES}.concepts.init_args.begin", None),
        (f"{STAGES}.captions.init_args.set", {"chunks": None}),
        (f"{PARTS}.texts.init_args.sealed", True),
        (f"{PARTS}.captions.init_args.drop", {"image": 0.5}),
    ],
)
def test_such_an_option_changes_its_value_and_no_other(cli: Cli, key: str, value: Any) -> None:
    command = ("fit", "--config", "staged/visual-experts", "--print_config")
    before = yaml.safe_load(cli(*command).out)
    after = yaml.safe_load(cli(*command, f"--{key}", yaml.safe_dump(value, default_flow_style=True)).out)
    assert list(after["data"]["init_args"]["stages"]) == ["text", "concepts", "captions"]
    assert list(after["model"]["init_args"]["stages"]) == ["text", "concepts", "captions"]
    *path, last = key.split(".")
    node = before
    for part in path:
        node = node[part]
    assert node[last] != value
    node[last] = value
    assert after == before
