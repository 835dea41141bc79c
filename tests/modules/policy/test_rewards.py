"""Rewards of answers. Letters: K rewards."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from typing import Any

import pytest

from descant.modules.policy.rewards import (
    Answer,
    ExactAnswer,
    Format,
    JsonTable,
    NumericAnswer,
    Part,
    Rewards,
    Verifier,
    VerifierProcess,
)
from tests.tolerance import F64, ulps


class Constant(Verifier):
    def __init__(self, value: float | None) -> None:
        self.value = value

    def __call__(self, answer: Answer) -> float | None:
        return self.value


class Breaks(Verifier):
    def __call__(self, answer: Answer) -> float | None:
        return 1.0 / len(answer.text)


def test_rewards_have_names_weights_and_may_not_apply() -> None:
    rewards = Rewards({"right": ExactAnswer(), "form": Format(r"[a-z]+"), "never": Constant(None)}, {"form": 0.1})
    r_BK = rewards([Answer("pear", "pear"), Answer("Pear!", "pear"), Answer("", "pear")])
    assert r_BK[:, :2].tolist() == [[1, 1], [0, 0], [0, 0]] and r_BK[:, 2].isnan().all()
    assert rewards.names == ("right", "form", "never") and rewards.weight_K.tolist() == [1, 0.1, 1]
    assert rewards([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("verifier", "says"),
    [
        (Breaks(), r"reward 'mine' of the answer '': ZeroDivisionError: "),
        (Constant(math.nan), r"reward 'mine' of the answer '': nan; a number, or None"),
        (Constant(math.inf), r"reward 'mine' of the answer '': inf"),
    ],
)
def test_a_verifier_that_fails_is_named(verifier: Verifier, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rewards({"fine": Constant(1.0), "mine": verifier})([Answer("", "")])


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: Rewards({}), "none given; such as"),
        (lambda: Rewards({"a": Constant(1.0)}, {"b": 1.0}), "no reward 'b'; there is a"),
        (lambda: Rewards({"a": Constant(1.0)}, {"a": 0.0}), "all are 0"),
        (lambda: Format("("), "pattern '[(]'"),
        (lambda: JsonTable(-1.0), "tolerance -1"),
    ],
)
def test_invalid_arguments_are_refused(made: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made()


def test_the_last_match_counts_and_no_match_gives_zero() -> None:
    part = Part(r"<answer>(.*?)</answer>", ExactAnswer())
    texts = ["<answer>pear</answer>", "<answer>pear</answer><answer>fig</answer>", "pear", "<answer>pear"]
    assert [part(Answer(x, "pear")) for x in texts] == [1, 0, 0, 0]


TABLE = [{"name": "ann", "age": 30, "tall": True}, {"name": "bob", "age": 41, "tall": None}]


@pytest.mark.parametrize(
    ("answer", "earned"),
    [
        (TABLE, 1.0),
        (TABLE[::-1], 1.0),
        ([TABLE[0]], 2 * 3 / (3 + 6)),
        ([*TABLE, TABLE[0]], 2 * 6 / (9 + 6)),  # a repeated row counts once
        ([{"name": "ANN ", "age": 30.00000001, "tall": True}, TABLE[1]], 1.0),
        ([{"name": "ann", "age": 41, "tall": True}, {"name": "bob", "age": 30, "tall": None}], 2 * 4 / 12),
        ([{"name": "ann", "age": "30", "tall": 1}, TABLE[1]], 2 * 4 / 12),  # neither text nor 1 is the value itself
        ([], 0.0),
        ("no table", 0.0),
        ({"name": "ann"}, 0.0),
    ],
)
def test_table_f1_of_cells(answer: Any, earned: float) -> None:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    assert JsonTable()(Answer(text, json.dumps(TABLE))) == pytest.approx(earned, abs=ulps(2, F64))
    assert JsonTable()(Answer(text, "pear")) is None, "does not apply"


def test_deep_nesting_is_no_table_and_no_crash() -> None:
    assert JsonTable()(Answer("[" * 100_000, json.dumps(TABLE))) == 0


def test_numeric_answers_of_equal_value() -> None:
    pytest.importorskip("math_verify")
    numeric = NumericAnswer()
    earned = {
        text: numeric(Answer(text, "1/2")) for text in ("0.5", "$\\frac{1}{2}$", "the answer is 2/4", "5", "", "pear")
    }
    assert list(earned.values()) == [1, 1, 1, 0, 0, 0], earned
    assert numeric(Answer("0.5", "pear")) is None


def test_endless_arithmetic_times_out_and_the_next_answer_is_scored() -> None:
    pytest.importorskip("math_verify")
    numeric = NumericAnswer(seconds=2.0)
    texts = ["9^9^9", "1/2", "10^{10^{10}}", "9" * 5000, "0.5"]
    assert [numeric(Answer(text, "1/2")) for text in texts] == [0, 1, 0, 0, 1]
    assert copy.deepcopy(numeric)(Answer("0.5", "1/2")) == 1, "a process of its own"


def test_a_verifier_process_is_restarted_after_a_timeout_or_crash() -> None:
    program = """
import sys, time
print(0, flush=True)
for line in sys.stdin:
    n = int(line)
    time.sleep(60 * (n == 1))
    assert n != 2
    print(n, flush=True)
"""
    process = VerifierProcess(program, seconds=1.0)
    assert [process(n) for n in (3, 1, 4, 2, 5)] == [3, None, 4, None, 5]
    with pytest.raises(ValueError, match="its process did not start"):
        VerifierProcess("1 / 0", seconds=1.0)(3)


def test_any_answer_can_be_scored() -> None:
    part = Part(r"answer (\d+)|none", ExactAnswer())
    assert [part(Answer(text, "7")) for text in ("none", "answer 7", "")] == [0, 1, 0]
    table = JsonTable()
    assert table(Answer('[{"a": 1' + "0" * 400 + "}]", json.dumps(TABLE))) == 0
    assert table(Answer("[]", "[]")) == 1 and table(Answer("[]", json.dumps(TABLE))) == 0
    with pytest.raises(ValueError, match=r"reward 'mine' of the answer 'a': 'no'; a number, or None"):
        Rewards({"mine": Constant("no")})([Answer("a", "a")])  # type: ignore[arg-type]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"NumericAnswer needs the package math-verify: pip install math-verify"):
        NumericAnswer()
