"""What an answer earns: named rewards with weights, any of which may not apply to it.

Letters: B answers, K rewards.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Entry(Protocol):
    """What a task knows of one of its problems: ``score(said)``, 1 for what is right."""

    def score(self, said: str, /) -> float: ...


class Answer(NamedTuple):
    """What was said to a question, and what is right, spelled out.

    ``tokens``: of what was said, an end counted. ``ended``: whether it came to an end by itself. ``entry``: what the
    task knows of the problem, where it knows more than one right answer.
    """

    said: str
    right: str
    tokens: int = 0
    ended: bool = True
    entry: Entry | None = None


class Verifier:
    """``verifier(answer)`` -> what it earns, or None if the question is no case for it."""

    def __call__(self, answer: Answer) -> float | None:
        raise NotImplementedError


class ExactAnswer(Verifier):
    """1 for what is right, letter by letter, but for case and spaces; else 0.

    >>> ExactAnswer()(Answer(" Red  apple", "red apple")), ExactAnswer()(Answer("", "red apple"))
    (1.0, 0.0)
    """

    def __call__(self, answer: Answer) -> float | None:
        return float(plain(answer.said) == plain(answer.right))


class TaskAnswer(ExactAnswer):
    """What the task itself says of an answer, such as the scores of reasoning-gym; of a task that says nothing of it
    what ExactAnswer says.

    >>> class Even:
    ...     def score(self, said: str) -> float:
    ...         return float(said.isdigit() and int(said) % 2 == 0)
    >>> TaskAnswer()(Answer("6", "4", entry=Even())), TaskAnswer()(Answer("6", "4"))
    (1.0, 0.0)
    """

    def __call__(self, answer: Answer) -> float | None:
        return super().__call__(answer) if answer.entry is None else float(answer.entry.score(answer.said))


class NumericAnswer(Verifier):
    """1 for an expression of the same value ("1/2", "0.5"), else 0; does not apply where no number is right.

    Expressions are read and compared by math-verify, in a process of its own: "9^9^9" takes five letters to say, and
    all memory and time to work out. What takes longer than ``seconds``, or more than 2 GB, earns 0.

    Args:
        seconds: for one answer.

    Raises:
        ValueError: without that package; in use, if the process cannot be started.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("NumericAnswer needs the package math-verify: pip install math-verify")
        if not seconds > 0:
            raise ValueError(f"NumericAnswer: seconds {seconds:g}: more than 0")
        self.judge = Judge(_COMPARE, seconds)

    def __call__(self, answer: Answer) -> float | None:
        # what is right is read first, and alone: an answer that brings the judge down has still a right one
        if not self.judge([answer.right]):
            return None
        return float(bool(self.judge([answer.right, answer.said])))


#: Lines of JSON in, lines of JSON out: is it a number, or are these two the same? Without math-verify's own timeouts,
#: which cannot stop arithmetic that is under way.
_COMPARE = """
import json, logging, resource, sys
from functools import cache
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
import math_verify
for name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
read = lambda text: math_verify.parse(text, parsing_timeout=None)
known = cache(read)
print(0, flush=True)
for line in sys.stdin:
    right, *said = json.loads(line)
    try:
        found = known(right)
        if said:
            found = math_verify.verify(found, read(said[0]), timeout_seconds=None)
    except (MemoryError, OverflowError, ValueError, RecursionError):
        found = False
    print(json.dumps(bool(found)), flush=True)
"""


#: Seconds that a judge may take to load what it needs.
_READY = 120.0


class Judge:
    """A Python program beside this one that answers a line of JSON by another; ended and begun anew where it is late.

    ``judge(question)`` is what it says, or None where it says nothing within ``seconds``. Its first line says that it
    is ready.

    Raises:
        ValueError: in use, for a program that is not ready within two minutes.

    >>> echo = "import sys; print(0, flush=True); [print(line, end='', flush=True) for line in sys.stdin]"
    >>> Judge(echo, seconds=9)({"six": 6})
    {'six': 6}
    """

    def __init__(self, program: str, seconds: float) -> None:
        self.program, self.seconds = program, seconds
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, question: Any) -> Any:
        if self._process is None:
            pipe = subprocess.PIPE
            command = [sys.executable, "-P", "-c", self.program]
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
            if not self._line(_READY):
                self.end()
                raise ValueError(f"{type(self).__name__}: its process did not begin")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone; then there is no line either
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._line(self.seconds)
        if not line:
            self.end()
            return None
        return json.loads(line)

    def _line(self, seconds: float) -> str:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else ""

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate()
            self._process = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the interpreter anything may be gone
            self.end()


class Format(Verifier):
    """1 where all that was said has a form, else 0.

    Args:
        pattern: a regular expression; a dot is any letter, a new line too.

    Raises:
        ValueError: for an expression that is none.

    >>> form = Format(r"<think>.*</think><answer>[^<]*</answer>")
    >>> form(Answer("<think>red, round</think><answer>apple</answer>", "")), form(Answer("apple", ""))
    (1.0, 0.0)
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"Format: pattern {pattern!r}: {error}") from None

    def __call__(self, answer: Answer) -> float | None:
        return float(self.pattern.fullmatch(answer.said) is not None)


class Part(Verifier):
    """Another verifier of a part of what was said, such as what stands between two tags; 0 where there is no such part.

    Args:
        pattern: a regular expression; its first group, or all of it, is the part; of several the last one.
        of: judges the part.

    >>> Part(r"<answer>(.*?)</answer>", ExactAnswer())(Answer("<answer>a</answer> no, <answer>pear</answer>", "pear"))
    1.0
    """

    def __init__(self, pattern: str, of: Verifier) -> None:
        self.pattern, self.of = Format(pattern).pattern, of

    def __call__(self, answer: Answer) -> float | None:
        found = list(self.pattern.finditer(answer.said))
        part = found[-1].group(1 if self.pattern.groups else 0) if found else None
        return 0.0 if part is None else self.of(answer._replace(said=part))


class JsonTable(Verifier):
    """F1 of the cells of a table, ``2 hits / (cells said + cells right)``: JSON, a list of objects with alike keys.

    A cell is the first key's value of its row, its own key and its own value, so rows may come in any order. Numbers
    are equal within ``tolerance``, relative; texts but for case and spaces. No table earns 0; the reward does not apply
    where what is right is none.

    >>> right = '[{"name": "ann", "age": 30}, {"name": "bob", "age": 41}]'
    >>> JsonTable()(Answer('[{"name": "bob", "age": 41}, {"name": "ann", "age": 31}]', right))
    0.75
    """

    def __init__(self, tolerance: float = 1e-6) -> None:
        if not tolerance >= 0:
            raise ValueError(f"JsonTable: tolerance {tolerance:g}: 0 or more")
        self.tolerance = tolerance

    def __call__(self, answer: Answer) -> float | None:
        right, said = _cells(answer.right), _cells(answer.said)
        if right is None:
            return None
        if not said:
            return float(said == right)
        left = Counter(right)
        hits = 0
        for place, value in said:
            match = next((cell for cell in left if cell[0] == place and self._same(cell[1], value)), None)
            if match is not None:
                left[match] -= 1
                left += Counter()  # without those that are used up
                hits += 1
        return 2 * hits / (len(said) + len(right))

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=self.tolerance)
        return type(a) is type(b) and bool(a == b)  # to Python True is 1


class Overlong(Verifier):
    """What length costs: 0 up to ``most - cushion`` tokens, then less and less, and -1 at ``most``, where it is cut.

    Source: DAPO (Yu 2025, arXiv 2503.14476; there 4,096 of 20,480).

    Raises:
        ValueError: for a cushion that is none, or larger than the whole.

    >>> [Overlong(most=10, cushion=4)(Answer("", "", tokens)) for tokens in (6, 8, 10)]
    [0.0, -0.5, -1.0]
    """

    def __init__(self, most: int, cushion: int) -> None:
        if not 0 < cushion <= most:
            raise ValueError(f"Overlong: cushion {cushion}: from 1 to most, which is {most}")
        self.most, self.cushion = most, cushion

    def __call__(self, answer: Answer) -> float | None:
        return max(min((self.most - self.cushion - answer.tokens) / self.cushion, 0.0), -1.0)


class Rewards:
    """``rewards(answers)`` -> double ``[B, K]``, nan where one does not apply; ``names`` and ``weight_K``.

    Args:
        of: name -> who says what an answer earns.
        weights: name -> its weight, 1 where not given.

    Raises:
        ValueError: for none, a weight of another name, or weights that are all 0; in use, naming reward and answer, for
            one that raises or says nan or infinity.
    """

    def __init__(self, of: dict[str, Verifier], weights: dict[str, float] | None = None) -> None:
        if not of:
            raise ValueError("Rewards: none; such as {right: {class_path: ExactAnswer}}")
        for name in weights or {}:
            if name not in of:
                raise ValueError(f"Rewards: weights: no reward {name!r}; there is {', '.join(of)}")
        self.of, self.names = of, tuple(of)
        self.weight_K = torch.tensor([(weights or {}).get(name, 1.0) for name in of], dtype=torch.float64)
        if not self.weight_K.any():
            raise ValueError("Rewards: weights: all are 0, so nothing is better than anything")

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        rows = [[self._one(name, verifier, answer) for name, verifier in self.of.items()] for answer in answers]
        return torch.tensor(rows, dtype=torch.float64).view(len(answers), len(self.of))

    def _one(self, name: str, verifier: Verifier, answer: Answer) -> float:
        where = f"reward {name!r} of the answer {_short(answer.said)}"
        try:
            value = verifier(answer)
        except Exception as error:
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        if value is None:
            return math.nan
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: {value!r}; a number, or None where it does not apply")
        return float(value)


def plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")


def _cells(text: str) -> list[tuple[tuple[Any, str], Any]] | None:
    """((value of the row's first key, key), value) of each cell; None where the text is no table."""
    try:
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) and row for row in rows):
            return None
        return [cell for row in rows for cell in _row(row)]
    except (ValueError, OverflowError, RecursionError):  # a whole number may be larger than any float
        return None


def _row(row: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, str], Any]]:
    first = _value(next(iter(row.values())))
    for key, value in row.items():
        yield (first, plain(key)), _value(value)


def _value(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        return plain(value)
    return json.dumps(value, sort_keys=True)
