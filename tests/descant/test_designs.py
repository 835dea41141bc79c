"""Arms of claims that were not run yet: each is a run that `descant check` accepts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from descant.claims import spec
from tests.conftest import Result
from tests.rotation import turn


def arms() -> list[tuple[str, str]]:
    """Of claims without a result, those that begin from no other run."""
    new = [spec.load(name) for name in spec.names() if not any((spec.folder() / "results").glob(f"{name}.*json"))]
    return [(claim.name, arm) for claim in new for arm in claim.arms if not claim.begins_from(arm)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arm"), turn(arms(), 4))
def test_an_arm_is_accepted_as_it_is_and_on_the_lock_box(cli: Callable[..., Result], name: str, arm: str) -> None:
    claim = spec.load(name)
    settled = claim.with_settings({arm: 0 for arm, of in claim.arms.items() if of.settings})
    done = cli("check", *settled.command(arm, 0, "full", str))
    assert done.rc == 0, done.err
