"""The steps of the self-supervised benchmark on a tiny size, each required to be lightly's; no speed is judged here."""

from __future__ import annotations

import pytest

from benchmarks.ssl import Size, steps

TINY = Size(image=16, patch=8, width=24, depth=1, heads=3, hidden=16, out=8, prototypes=8, batch=4)


@pytest.mark.parametrize("name", ["simclr", "byol", "dino", "vicreg", "swav"])
def test_both_steps_run_and_ours_is_required_to_be_lightlys(name: str) -> None:
    pytest.importorskip("lightly")
    for run in steps(TINY, name):
        run()
