"""Rewards of answers by verifiers: exact match, numbers, JSON tables, formats, and scores of a task.

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
    """A problem of a task: ``score(text)``, 1 for a right answer."""

    def score(self, text: str, /) -> float: ...


class Answer(NamedTuple):
    """A generated answer and the reference answer, as text.

    ``tokens``: number of generated tokens, end included. ``ended``: whether it ended by itself. ``entry``: the problem
    of a task that scores answers itself.
    """

    text: str
    reference: str
    tokens: int = 0
    ended: bool = True
    entry: Entry | None = None


class Verifier:
    """Base of verifiers: ``verifier(answer)`` -> reward, or None if it does not apply."""

    def __call__(self, answer: Answer) -> float | None:
        raise NotImplementedError


class ExactAnswer(Verifier):
    """Exact match, ignoring case and whitespace: 1, else 0.

    >>> ExactAnswer()(Answer(" Red  apple", "red apple")), ExactAnswer()(Answer("", "red apple"))
    (1.0, 0.0)
    """

    def __call__(self, answer: Answer) -> float | None:
        return float(plain(answer.text) == plain(answer.reference))


class TaskAnswer(ExactAnswer):
    """Score by the task itself, such as reasoning-gym's; exact match for tasks without one.

    >>> class Even:
    ...     def score(self, text: str) -> float:
    ...         return float(text.isdigit() and int(text) % 2 == 0)
    >>> TaskAnswer()(Answer("6", "4", entry=Even())), TaskAnswer()(Answer("6", "4"))
    (1.0, 0.0)
    """

    def __call__(self, answer: Answer) -> float | None:
        return super().__call__(answer) if answer.entry is None else float(answer.entry.score(answer.text))


class NumericAnswer(Verifier):
    """1 for an expression of equal value ("1/2", "0.5"), else 0; does not apply if the reference is not a number.

    math-verify compares expressions in a separate process, because "9^9^9" is short, but endless to evaluate. An answer
    that takes more than ``seconds`` or 2 GB gets 0.

    Args:
        seconds: time limit for one answer.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("NumericAnswer needs the package math-verify: pip install math-verify")
        if not seconds > 0:
            raise ValueError(f"NumericAnswer: seconds {seconds:g}: more than 0")
        self.process = VerifierProcess(_COMPARE, seconds)

    def __call__(self, answer: Answer) -> float | None:
        # the reference alone first: whether the reward applies must not depend on an answer that ends the process
        if not self.process([answer.reference]):
            return None
        return float(bool(self.process([answer.reference, answer.text])))


#: JSON lines in and out: is one text a number, or are two equal? math-verify's own timeouts cannot stop arithmetic.
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
    reference, *text = json.loads(line)
    try:
        result = known(reference)
        if text:
            result = math_verify.verify(result, read(text[0]), timeout_seconds=None)
    except (MemoryError, OverflowError, ValueError, RecursionError):
        result = False
    print(json.dumps(bool(result)), flush=True)
"""

#: Seconds that a process may take to start.
_READY = 120.0


class VerifierProcess:
    """Python program in a separate process that answers JSON lines; it is restarted after a timeout.

    ``process(question)`` returns its answer, or None if it does not answer within ``seconds``. Its first line signals
    that it is ready.

    >>> echo = "import sys; print(0, flush=True); [print(line, end='', flush=True) for line in sys.stdin]"
    >>> VerifierProcess(echo, seconds=9)({"six": 6})
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
                raise ValueError(f"{type(self).__name__}: its process did not start")
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended: no line follows
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
        with contextlib.suppress(Exception):  # at interpreter exit modules may be gone
            self.end()


class Format(Verifier):
    """Format reward: 1 if the whole answer matches a regular expression, else 0.

    Args:
        pattern: a regular expression; a dot also matches a new line.

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
        return float(self.pattern.fullmatch(answer.text) is not None)


class Part(Verifier):
    """Another verifier on a part of the answer, such as the text between two tags; 0 without such a part.

    Args:
        pattern: a regular expression; its first group, or all of it, is the part; the last match counts.
        of: verifier of the part.

    >>> Part(r"<answer>(.*?)</answer>", ExactAnswer())(Answer("<answer>a</answer> no, <answer>pear</answer>", "pear"))
    1.0
    """

    def __init__(self, pattern: str, of: Verifier) -> None:
        self.pattern, self.of = Format(pattern).pattern, of

    def __call__(self, answer: Answer) -> float | None:
        matches = list(self.pattern.finditer(answer.text))
        part = matches[-1].group(1 if self.pattern.groups else 0) if matches else None
        return 0.0 if part is None else self.of(answer._replace(text=part))


class JsonTable(Verifier):
    """F1 of the cells of a JSON table (a list of objects): ``2 hits / (cells of the answer + cells of the reference)``.

    A cell is (first value of its row, key, value), so rows may come in any order. Numbers are compared within a
    relative ``tolerance``, texts without case and spaces. An answer that is not a table gets 0; the reward does not
    apply if the reference is not one.

    >>> reference = '[{"name": "ann", "age": 30}, {"name": "bob", "age": 41}]'
    >>> JsonTable()(Answer('[{"name": "bob", "age": 41}, {"name": "ann", "age": 31}]', reference))
    0.75
    """

    def __init__(self, tolerance: float = 1e-6) -> None:
        if not tolerance >= 0:
            raise ValueError(f"JsonTable: tolerance {tolerance:g}: 0 or more")
        self.tolerance = tolerance

    def __call__(self, answer: Answer) -> float | None:
        reference, text = _cells(answer.reference), _cells(answer.text)
        if reference is None:
            return None
        if not text:
            return float(text == reference)
        left = Counter(reference)
        hits = 0
        for place, value in text:
            match = next((cell for cell in left if cell[0] == place and self._same(cell[1], value)), None)
            if match is not None:
                left[match] -= 1
                left += Counter()  # drops cells that are used up
                hits += 1
        return 2 * hits / (len(text) + len(reference))

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=self.tolerance)
        return type(a) is type(b) and bool(a == b)  # in Python, True == 1


class Rewards:
    """Named rewards with weights: ``rewards(answers)`` -> double ``[B, K]``, nan if one does not apply.

    Args:
        of: name -> verifier.
        weights: name -> weight, 1 by default.
    """

    def __init__(self, of: dict[str, Verifier], weights: dict[str, float] | None = None) -> None:
        if not of:
            raise ValueError("Rewards: none given; such as {right: {class_path: ExactAnswer}}")
        for name in weights or {}:
            if name not in of:
                raise ValueError(f"Rewards: weights: no reward {name!r}; there is {', '.join(of)}")
        self.of, self.names = of, tuple(of)
        self.weight_K = torch.tensor([(weights or {}).get(name, 1.0) for name in of], dtype=torch.float64)
        if not self.weight_K.any():
            raise ValueError("Rewards: weights: all are 0")

    def __call__(self, answers: Sequence[Answer]) -> Tensor:
        rows = [
            [self._call_verifier(name, verifier, answer) for name, verifier in self.of.items()] for answer in answers
        ]
        return torch.tensor(rows, dtype=torch.float64).view(len(answers), len(self.of))

    def _call_verifier(self, name: str, verifier: Verifier, answer: Answer) -> float:
        text = answer.text if len(answer.text) <= 60 else f"{answer.text[:57]}..."
        where = f"reward {name!r} of the answer {text!r}"
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


def _cells(text: str) -> list[tuple[tuple[Any, str], Any]] | None:
    """Return ((first value of the row, key), value) of each cell; None if the text is not a table."""
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
