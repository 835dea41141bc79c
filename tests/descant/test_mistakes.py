"""Mistakes drawn by lot: each is answered in a line that names what was meant, and nothing is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from descant.cli.dump import Written
from tests.conftest import Result
from tests.mistakes import drawn

Cli = Callable[..., Result]
COUNT = 108


def test_mistakes_by_lot(cli: Cli, workplace: Path, written_content: dict[str, Any]) -> None:
    before = sorted(workplace.iterdir())
    missed = []
    for mistake in itertools.islice(drawn(lambda command: Written(written_content, command), 0), COUNT):
        result = cli(*mistake.args)
        assert result.rc == 2 and len(result.err.splitlines()) <= 5 and not result.out, (mistake, result)
        if not all(name in result.err for name in mistake.names):
            missed.append((mistake, result.err))
    assert len(missed) <= 0.05 * COUNT, missed
    assert sorted(workplace.iterdir()) == before
