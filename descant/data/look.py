"""What a data set holds, in numbers and pictures: counts, missingness, captions, sizes, duplicates."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from descant.data.media import fault, seconds_of, size_of
from descant.data.sheet import Tile, sheet
from descant.data.twins import echoes, equal
from descant.data.views import PIXELS, View, view_of, view_of_module

#: Samples whose bytes are read, and whose content is decoded, without ``--all``: seconds, not hours.
READ, DECODED = 20_000, 500
#: Shares of samples of which a length is told.
_SHARES = {"least": 0.0, "5%": 0.05, "half": 0.5, "95%": 0.95, "most": 1.0}
_TILES = 24
#: Unreadable samples that are named; the JSON names all.
_NAMED = 50


@dataclass
class Content:
    """What one sample's bytes say of it."""

    digests: dict[str, bytes] = field(default_factory=dict)
    size: tuple[int, int, str] | None = None
    seconds: float | None = None
    fault: str | None = None
    decoded: bool = False


def look(
    what: Sequence[str],
    configs: Sequence[str] = (),
    options: Sequence[tuple[str, str]] = (),
    trust: Sequence[str] = (),
    csv: Path | None = None,
    caption: str | None = None,
    holdout: float = 0.05,
    every: bool = False,
    sheet: Path | None = None,
    numbers: Path | None = None,
) -> dict[str, Any]:
    """Print what a data set holds, draw its sheet, and return the numbers.

    Raises:
        Refusal, ValueError: in one line, for what is not there or cannot be read at all.
    """
    # a picture above the limit is told by its name, once
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    if configs:
        from descant.data.configured import datamodule

        view: View = view_of_module(datamodule(configs, options, trust), f"--config {' '.join(configs)}")
        name = Path(configs[0]).stem
    else:
        view = view_of(what, csv, caption, holdout)
        name = re.sub(r"[^\w]+", "-", Path(what[0]).name.partition("{")[0].partition("*")[0]).strip("-") or "data"
    found = report(view, every)
    print("\n".join(lines(found)))
    target = sheet or Path(f"look-{name}.png")
    draw(view).save(target)
    print(f"sheet       {target}")
    if numbers is not None:
        numbers.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return found


# the numbers ---------------------------------------------------------------------------------------------------


def report(view: View, every: bool = False) -> dict[str, Any]:
    """All numbers, as JSON holds them."""
    total = sum(len(numbers) for numbers in view.splits.values())
    read = _spread(view, total if every else READ)
    decoded = set(_spread(view, total if every else DECODED))
    contents = _contents(view, read, decoded)
    split_at = {int(i): split for split, numbers in view.splits.items() for i in numbers}
    # test sets may share samples by design; with training they may not
    first = next(iter(view.splits))
    unique = {(split_at[i] == first, view.identity(i)): i for i in reversed(contents)}
    different = {i: contents[i] for i in sorted(unique.values())}
    texts = {
        split: [text for i in numbers.tolist() for text in view.captions(i)] for split, numbers in view.splits.items()
    }
    return {
        "what": view.title,
        "samples": total,
        "rows": _rows(view, total),
        "splits": {split: _split(view, numbers) for split, numbers in view.splits.items()},
        "fields": {name: {"kind": kind, "samples": n} for name, (kind, n) in view.fields.items()},
        "captions": {split: _lengths(view, numbers, texts[split]) for split, numbers in view.splits.items()},
        "codec": None if view.codec is None else f"{type(view.codec).__name__}, rows of {view.codec.length}",
        "content": _content(view, contents),
        "duplicates": {
            kind: asdict(
                equal((c.digests[kind], split_at[i], view.name(i)) for i, c in different.items() if kind in c.digests)
            )
            for kind in dict.fromkeys(kind for c in contents.values() for kind in c.digests)
        },
        "echoes": _echoes(texts),
    }


def _rows(view: View, total: int) -> dict[str, int]:
    """Rows of tables and shards: all that were read, those merged with another, left out, and files not there."""
    sources = getattr(view, "sources", [])
    merged, left_out = sum(s.merged for s in sources), sum(len(s.faults) for s in sources)
    read = sum(len(s) for s in sources) + merged + left_out if sources else total
    return {"read": read, "merged": merged, "left_out": left_out, "absent": sum(s.absent for s in sources)}


def _split(view: View, numbers: np.ndarray) -> dict[str, Any]:
    """Samples of a split, of each modality, and of each pattern of presence."""
    has = {m: mask_N[numbers] for m, mask_N in view.has.items()}
    rows = zip(*(mask.tolist() for mask in has.values()), strict=True)
    patterns = Counter("+".join(m for m, there in zip(has, row, strict=True) if there) or "nothing" for row in rows)
    return {
        "samples": len(numbers),
        "has": {m: int(mask.sum()) for m, mask in has.items()},
        "patterns": dict(patterns.most_common()),
    }


def _lengths(view: View, numbers: np.ndarray, texts: Sequence[str]) -> dict[str, Any]:
    """Captions of a split: how many, how long in words and tokens, how many the codec cuts, how many are missing."""
    found: dict[str, Any] = {"captions": len(texts), "words": _quantiles([len(text.split()) for text in texts])}
    if "text" in view.has:
        found["without"] = int(len(numbers) - view.has["text"][numbers].sum())
    if view.codec is not None and texts:
        few = numbers[:: -(-len(numbers) // READ)].tolist()
        tokens, cut = view.tokens(few)
        found |= {"tokens": _quantiles(tokens), "cut": cut, "cut_share": cut / max(len(tokens), 1)}
    return found


def _content(view: View, contents: Mapping[int, Content]) -> dict[str, Any]:
    sizes = [c.size for c in contents.values() if c.size is not None]
    seconds = [c.seconds for c in contents.values() if c.seconds is not None]
    faults = {view.name(i): c.fault for i, c in contents.items() if c.fault is not None}
    decoded = sum(c.decoded for c in contents.values())
    found: dict[str, Any] = {"read": len(contents), "decoded": decoded, "unreadable": len(faults)}
    found["examples"] = faults
    if sizes:
        found["width"], found["height"] = (_quantiles([float(size[k]) for size in sizes]) for k in (0, 1))
        found["formats"] = dict(Counter(size[2] for size in sizes).most_common())
    if seconds:
        found["seconds"] = _quantiles(seconds)
    return found


def _echoes(texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Captions of every other split that the first one, which is trained on, has too."""
    first, *others = texts
    return {f"{other} in {first}": asdict(echoes(texts[other], texts[first])) for other in others if texts[other]}


def _spread(view: View, most: int) -> list[int]:
    """Up to ``most`` samples, evenly spread over the splits, from each in proportion and at least some."""
    total = sum(len(numbers) for numbers in view.splits.values())
    chosen: list[int] = []
    for numbers in view.splits.values():
        few = len(numbers) if most >= total else min(len(numbers), max(most * len(numbers) // total, min(most, 50)))
        chosen += numbers[np.linspace(0, len(numbers) - 1, few).round().astype(int)].tolist() if few else []
    return chosen


def _contents(view: View, read: Sequence[int], decoded: set[int]) -> dict[int, Content]:
    def one(i: int) -> Content:
        try:
            raw = view.raw(i)
        except (OSError, ValueError) as error:
            return Content(fault=str(error), decoded=True)
        digests = {kind: hashlib.sha256(data).digest() for kind, data in raw.items()}
        found = Content(digests, decoded=i in decoded or PIXELS in raw)
        if "image" in raw:
            found.size = size_of(raw["image"])
        if "audio" in raw:
            found.seconds = seconds_of(raw["audio"])
        for kind, data in raw.items():
            # what has no readable header is no picture, and costs nothing to decode
            if kind in ("image", "audio") and (
                i in decoded or (found.size if kind == "image" else found.seconds) is None
            ):
                found.fault, found.decoded = found.fault or fault(kind, data), True
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(read, pool.map(one, read), strict=True))


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    at = np.quantile(np.array(values, dtype=np.float64), list(_SHARES.values()), method="nearest")
    return {name: float(f"{value:.4g}") for name, value in zip(_SHARES, at, strict=True)}


# in words ------------------------------------------------------------------------------------------------------


def lines(found: Mapping[str, Any]) -> list[str]:
    """The numbers as a person reads them."""
    out = [f"{found['what']}: {found['samples']:,} samples", ""]
    out += _table(found["splits"])
    rows = found["rows"]
    told = [f"{rows['merged']:,} merged with another row of the same file"] if rows["merged"] else []
    told += [f"{rows['left_out']:,} left out"] if rows["left_out"] else []
    told += [f"{rows['absent']:,} files named but not there"] if rows["absent"] else []
    if told:
        out += ["", f"rows        {rows['read']:,} read; {'; '.join(told)}"]
    if found["fields"]:
        told = [f"{name} ({f['kind']}) {f['samples']:,}" for name, f in found["fields"].items()]
        out += ["", *_wrapped("fields", ", ".join(told))]
    out += ["", *_caption_lines(found)]
    out += ["", *_content_lines(found["content"], found["samples"])]
    return [*out, "", *_twin_lines(found), ""]


def _table(splits: Mapping[str, Any]) -> list[str]:
    """A row a split: samples, those with each modality, and the patterns of presence."""
    modalities = list(dict.fromkeys(m for split in splits.values() for m in split["has"]))
    head = ["", "samples", *modalities, "patterns"]
    rows = []
    for name, split in splits.items():
        n = max(split["samples"], 1)
        shares = [f"{split['has'].get(m, 0):,} ({split['has'].get(m, 0) / n:.1%})" for m in modalities]
        patterns = "  ".join(f"{pattern} {count:,}" for pattern, count in list(split["patterns"].items())[:6])
        rows.append([name, f"{split['samples']:,}", *shares, patterns])
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    cells = [
        [row[0].ljust(max(widths[0], 10)), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)), row[-1]]
        for row in [head, *rows]
    ]
    return ["  ".join(row).rstrip() for row in cells]


def _caption_lines(found: Mapping[str, Any]) -> list[str]:
    out = []
    for split, told in found["captions"].items():
        if not told["captions"]:
            out.append(f"captions    {split}: none")
            continue
        line = f"captions    {split}: {told['captions']:,}"
        line += f", {told['without']:,} samples without" if told.get("without") else ""
        line += f"; words {_range(told['words'])}"
        if "tokens" in told:
            line += f"; tokens {_range(told['tokens'])}, {told['cut_share']:.1%} cut off"
        out.append(line)
    out.append(f"            (least, 5 %, half, 95 %, most; codec: {found['codec']})" if out and found["codec"] else "")
    return [line for line in out if line]


def _content_lines(content: Mapping[str, Any], samples: int) -> list[str]:
    out = []
    if "width" in content:
        formats = ", ".join(f"{name} {n:,}" for name, n in content["formats"].items())
        out.append(f"pictures    width {_range(content['width'])}; height {_range(content['height'])}; {formats}")
    if "seconds" in content:
        out.append(f"recordings  seconds {_range(content['seconds'])}")
    part = "" if content["decoded"] >= samples else " (--all decodes every one)"
    out.append(f"unreadable  {content['unreadable']:,} of {content['decoded']:,} decoded{part}")
    named = list(content["examples"].items())
    out += [f"            {name}: {why}" for name, why in named[:_NAMED]]
    if len(named) > _NAMED:
        out.append(f"            and {len(named) - _NAMED:,} more: --json FILE lists all of them")
    return out


def _twin_lines(found: Mapping[str, Any]) -> list[str]:
    out = []
    read = found["content"]["read"]
    part = "" if read >= found["samples"] else f" among the {read:,} read (--all reads every one)"
    for kind, twins in found["duplicates"].items():
        across = ", ".join(f"{pair} {n:,}" for pair, n in twins["across"].items())
        copies = f"{twins['extra']:,} cop{'y' if twins['extra'] == 1 else 'ies'} of another"
        out.append(f"duplicates  {kind}: {copies}{part}; across splits: {across or 'none'}")
        out += [f"            {' = '.join(names)}" for names in twins["examples"]]
    for pair, told in found["echoes"].items():
        out.append(
            f"captions    {pair}: {told['equal']:,} equal, {told['near']:,} nearly, of {told['captions']:,} different"
        )
        out += [f"            {a!r} ~ {b!r}" for a, b in told["examples"]]
    return out


def _range(quantiles: Mapping[str, float]) -> str:
    return " ".join(f"{value:g}" for value in quantiles.values())


def _wrapped(label: str, text: str, width: int = 110) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, initial_indent=f"{label:<12}", subsequent_indent=" " * 12)


# in pictures ---------------------------------------------------------------------------------------------------


def draw(view: View) -> Any:
    """The sheet: samples spread evenly over each split, the first split with the most of them."""
    names = [name for name, numbers in view.splits.items() if len(numbers)]
    few = max(_TILES // 6, 1)
    others = min(few, _TILES // max(2 * len(names), 1)) if len(names) > 1 else 0
    tiles = []
    for name in names:
        numbers = view.splits[name]
        most = _TILES - others * (len(names) - 1) if name == names[0] else others
        at = np.unique(np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int))
        for i in numbers[at].tolist():
            caption = " / ".join(view.captions(i)[:2])
            tiles.append(Tile(view.picture(i), name, caption, note=_note(view, i)))
    total = sum(len(numbers) for numbers in view.splits.values())
    return sheet(tiles, f"{view.title}: {total:,} samples")


def _note(view: View, i: int) -> str:
    """Why a sample has no picture to show."""
    if "image" in view.has and view.has["image"][i]:
        return "unreadable"
    return "recording" if "audio" in view.has and view.has["audio"][i] else "no picture"
