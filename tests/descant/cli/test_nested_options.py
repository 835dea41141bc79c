"""Options that the parser takes from a configuration only: null in a part, and keys through two mappings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import yaml

from tests.conftest import Result

Cli = Callable[..., Result]
STAGES = "model.init_args.stages"
PARTS = "data.init_args.stages.text.init_args.data.init_args.parts"


VALUES: dict[str, Any] = {
    "model.init_args.recipe.init_args.lm.init_args.visual": None,
    f"{STAGES}.concepts.init_args.begin": None,
    f"{STAGES}.captions.init_args.set": {"chunks": None},
    f"{PARTS}.texts.init_args.sealed": True,
    f"{PARTS}.captions.init_args.drop": {"image": 0.5},
}


def test_such_options_change_their_values_and_no_others(cli: Cli) -> None:
    command = ("fit", "--config", "staged/visual-experts", "--print_config")
    options = [word for k, v in VALUES.items() for word in (f"--{k}", yaml.safe_dump(v, default_flow_style=True))]
    before, after = (yaml.safe_load(cli(*command, *more).out) for more in ((), options))
    assert list(after["data"]["init_args"]["stages"]) == ["text", "concepts", "captions"]
    assert list(after["model"]["init_args"]["stages"]) == ["text", "concepts", "captions"]
    for key, value in VALUES.items():
        *path, last = key.split(".")
        node = before
        for part in path:
            node = node[part]
        assert node[last] != value
        node[last] = value
    assert after == before
