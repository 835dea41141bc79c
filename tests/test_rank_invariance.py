"""Two of the experiments that ship, in turn, learn the same on one rank and on two."""

from __future__ import annotations

import pytest

from tests.rank_invariance import BOUND, SINGLE, compare
from tests.rotation import turn
from tests.test_experiments import RUNNABLE, name, need

NAMES = [name(path) for path in RUNNABLE if not need(path)]
#: Those with a part that looks at samples of its rank alone, of which a run on several ranks is warned.
BY_RANK = (
    *("distill/emoji-rank", "distill/emoji-rank-dual", "distill/emoji-teacher", "papers/dcd", "papers/mcr"),
    *("papers/moma", "staged/code-experts"),
)


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("experiment", turn(NAMES, -(-len(NAMES) // 2)))
def test_two_ranks_learn_what_one_learns(experiment: str) -> None:
    single = experiment in SINGLE
    compared = compare(experiment, double=not single)
    assert bool(compared.by_rank) == (experiment in BY_RANK), compared
    assert (compared.first if single else compared.all) <= BOUND or compared.by_rank, compared
