"""Insides of jsonargparse's parsers: actions, parsers of classes, the YAML loader and the settings.

jsonargparse has to keep: an action of a configuration argument has ``dest`` and ``_typehint``. A parser's
``_check_value_key`` raises an error for a value that it would refuse. ``ActionTypeHint.get_class_parser`` returns the
parser of a class's arguments in the parser of ``parser_context``. ``import_object`` applies the allow-list of imports.
In public, a parser only parses whole configurations, and settings are set but not read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse._actions import ActionConfigFile, filter_non_parsing_actions
from jsonargparse._common import parser_context, parsing_settings
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from jsonargparse._required import iter_required_keys
from jsonargparse._typehints import ActionTypeHint, get_all_subclass_paths
from jsonargparse._util import get_import_path, import_object

__all__ = [
    "ActionConfigFile",
    "ActionTypeHint",
    "check_value",
    "filter_non_parsing_actions",
    "get_all_subclass_paths",
    "get_import_path",
    "get_yaml_default_loader",
    "import_object",
    "iter_required_keys",
    "parser_context",
    "restoring_settings",
]


def check_value(parser: ArgumentParser, action: argparse.Action, value: Any) -> None:
    """Raise TypeError, ValueError, KeyError or ArgumentError unless a parser accepts a value for one of its actions."""
    with parser_context(load_value_mode=parser.parser_mode, parent_parser=parser):
        parser._check_value_key(action, value, action.dest, Namespace())


@contextmanager
def restoring_settings() -> Iterator[None]:
    """Restore the process's parsing settings at the end, such as the allow-list of imports."""
    before = dict(parsing_settings)
    try:
        yield
    finally:
        parsing_settings.clear()
        parsing_settings.update(before)
