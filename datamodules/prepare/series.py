"""Read sets of labelled time series from the aeon wheel, in the ``.ts`` format of the archive of such sets.

A line is a series: its channels, divided by colons, each a list of numbers, then its class. Letters: W channels, T
steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from descant.datamodules.prepare.wheel import Wheel

WHEEL = Wheel(
    "aeon",
    known={"d05227086706f80111ac5fee8de4d5d3115bb3bcfd1c786c8629393055816409": "1.6.0"},
    under="aeon/datasets/data",
)
#: Name of a set -> its channels, and the steps of its longest series.
SETS: dict[str, tuple[int, int]] = {
    "JapaneseVowels": (12, 29),
    "BasicMotions": (6, 100),
    "ArrowHead": (1, 251),
    "ItalyPowerDemand": (1, 24),
    "PickupGestureWiimoteZ": (1, 361),
}


def load(folder: Path, name: str, part: str) -> tuple[list[np.ndarray], list[str]]:
    """Load series ``[T, W]`` and classes of a set. Raise ValueError naming file and line if it is missing or broken."""
    file = folder / name / f"{name}_{part}.ts"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file.name}: cannot be read ({error})") from None
    return parse(text, file.name)


def parse(text: str, place: str) -> tuple[list[np.ndarray], list[str]]:
    """Parse series float32 ``[T, W]`` and classes from the text of a ``.ts`` file; ``?`` and ``NaN`` are gaps.

    >>> series, classes = parse("@data\\n1,2,3:4,?,6:up", "a.ts")
    >>> series[0].tolist(), classes
    ([[1.0, 4.0], [2.0, nan], [3.0, 6.0]], ['up'])
    """
    series, classes = list[np.ndarray](), list[str]()
    begun = False
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not begun or not line:
            begun = begun or line.lower() == "@data"
            continue
        *channels, label = line.split(":")
        try:
            x_WT = [[np.nan if x in ("?", "NaN") else float(x) for x in channel.split(",")] for channel in channels]
            series.append(np.array(x_WT, dtype=np.float32).T)
        except ValueError:
            raise ValueError(f"{place}:{number}: no series of numbers, with channels of one length") from None
        if series[-1].ndim != 2 or series[-1].shape[1] != series[0].shape[1]:
            raise ValueError(f"{place}:{number}: {len(channels)} channels, where the first series has another number")
        classes.append(label)
    if not series:
        raise ValueError(f"{place}: no series behind a line @data")
    return series, classes
