"""The trainers that are timed beside each other do the same work."""

from __future__ import annotations

import pytest

from benchmarks.reinforce import NEW, Gate, Ours, Theirs, even, model
from tests.rotation import by_turns


@by_turns(1, 4)
@pytest.mark.slow
def test_both_trainers_step_when_told_and_answer_at_the_same_length() -> None:
    pytest.importorskip("trl")
    made, ours, theirs = model(), Ours(), Theirs()
    gates = [Gate(lambda gate: ours.run(gate, made)), Gate(lambda gate: theirs.run(gate, made))]
    for gate in gates:
        for _ in range(4):
            gate()
    assert len(ours.lengths) == 4 and len(theirs.lengths) == 4, "one step at a time"
    for gate in gates:
        gate.end()
    a, b = (sum(of.lengths) / 4 for of in (ours, theirs))
    assert abs(a / b - 1) < 0.3 and 10 < a < NEW * 0.7
    assert 0 < ours.generating < ours.whole


def test_what_a_step_raises_is_raised_where_it_was_asked_for() -> None:
    def run(gate: Gate) -> None:
        gate.wait()
        raise ValueError("no")

    gate = Gate(run)
    with pytest.raises(ValueError, match="no"):
        gate()


def test_the_reward() -> None:
    assert even("w4 w5 w6 w8") == even("w4w5w6w8") == 0.75 and even("") == 0
