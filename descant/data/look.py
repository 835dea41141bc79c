"""``descant data look``: counts, missing modalities, captions, image sizes and duplicates of a data set."""

from __future__ import annotations

import hashlib
import json
import os
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from descant.data.duplicates import caption_overlap, duplicates
from descant.data.media import audio_seconds, fault, image_size
from descant.data.sheet import Tile, sheet
from descant.data.views import PIXELS, View, view_of, view_of_module

#: Samples that are read, and samples that are decoded, without ``--all``: seconds instead of hours.
READ, DECODED = 20_000, 500
#: Quantiles that are reported.
_QUANTILES = {"least": 0.0, "5%": 0.05, "half": 0.5, "95%": 0.95, "most": 1.0}
_TILES = 24
#: Largest number of unreadable samples that are printed; the JSON lists all.
_NAMED = 50


@dataclass
class Content:
    """Digests, size and faults of one sample's encoded content."""

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
    """Print the statistics of a data set, write its contact sheet, and return the statistics."""
    # images above the limit are reported by name
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    if configs:
        from descant.data.configured import datamodule

        view: View = view_of_module(datamodule(configs, options, trust), f"--config {' '.join(configs)}")
        name = Path(configs[0]).stem
    else:
        view = view_of(what, csv, caption, holdout)
        name = re.sub(r"[^\w]+", "-", Path(what[0]).name.partition("{")[0].partition("*")[0]).strip("-") or "data"
    statistics = report(view, every)
    print("\n".join(lines(statistics)))
    target = sheet or Path(f"look-{name}.png")
    draw(view).save(target)
    print(f"sheet       {target}")
    if numbers is not None:
        text = json.dumps(statistics, indent=1, ensure_ascii=False, allow_nan=False)
        numbers.write_text(text + "\n", encoding="utf-8")
    return statistics


# statistics ----------------------------------------------------------------------------------------------------


def report(view: View, every: bool = False) -> dict[str, Any]:
    """Return all statistics, as in the JSON file."""
    total = sum(map(len, view.splits.values()))
    read = _spread(view, total if every else READ)
    contents = _contents(view, read, set(_spread(view, total if every else DECODED)))
    split_at = {int(i): split for split, numbers in view.splits.items() for i in numbers}
    # evaluation sets may share samples with each other by design, but not with the training set, which is first
    first = next(iter(view.splits))
    unique = {(split_at[i] == first, view.identity(i)): i for i in reversed(contents)}
    different = {i: contents[i] for i in sorted(unique.values())}
    texts = {name: [text for i in ids.tolist() for text in view.captions(i)] for name, ids in view.splits.items()}
    return {
        "what": view.title,
        "samples": total,
        "rows": _rows(view, total),
        "splits": {split: _split(view, numbers) for split, numbers in view.splits.items()},
        "fields": {name: {"kind": kind, "samples": n} for name, (kind, n) in view.fields.items()},
        "captions": {split: _captions(view, numbers, texts[split]) for split, numbers in view.splits.items()},
        "codec": view.tokenizer and f"{type(view.tokenizer).__name__}, rows of {view.tokenizer.length}",
        "content": _content(view, contents),
        "duplicates": {
            kind: asdict(
                duplicates(
                    (c.digests[kind], split_at[i], view.name(i)) for i, c in different.items() if kind in c.digests
                )
            )
            for kind in dict.fromkeys(kind for c in contents.values() for kind in c.digests)
        },
        "echoes": {
            f"{other} in {first}": asdict(caption_overlap(texts[other], texts[first]))
            for other in texts
            if other != first and texts[other]
        },
    }


def _rows(view: View, total: int) -> dict[str, int]:
    """Count rows of tables and shards: read, merged with another, left out; and named files that are missing."""
    sources = getattr(view, "sources", [])
    merged, left_out = sum(s.merged for s in sources), sum(len(s.faults) for s in sources)
    read = sum(map(len, sources)) + merged + left_out if sources else total
    return {"read": read, "merged": merged, "left_out": left_out, "absent": sum(s.absent for s in sources)}


def _split(view: View, numbers: np.ndarray) -> dict[str, Any]:
    """Count the samples of a split, also by modality and by pattern of modalities."""
    has = {m: mask_N[numbers] for m, mask_N in view.has.items()}
    rows = zip(*(mask.tolist() for mask in has.values()), strict=True)
    patterns = Counter("+".join(m for m, present in zip(has, row, strict=True) if present) or "nothing" for row in rows)
    return {
        "samples": len(numbers),
        "has": {m: int(mask.sum()) for m, mask in has.items()},
        "patterns": dict(patterns.most_common()),
    }


def _captions(view: View, numbers: np.ndarray, texts: Sequence[str]) -> dict[str, Any]:
    """Count a split's captions, their words and tokens, the truncated ones, and the samples without any."""
    result: dict[str, Any] = {"captions": len(texts), "words": _quantiles([len(text.split()) for text in texts])}
    if "text" in view.has:
        result["without"] = int(len(numbers) - view.has["text"][numbers].sum())
    if view.tokenizer is not None and texts:
        tokens, cut = view.tokens(numbers[:: -(-len(numbers) // READ)].tolist())
        result |= {"tokens": _quantiles(tokens), "cut": cut, "cut_share": cut / max(len(tokens), 1)}
    return result


def _content(view: View, contents: Mapping[int, Content]) -> dict[str, Any]:
    sizes = [c.size for c in contents.values() if c.size is not None]
    seconds = [c.seconds for c in contents.values() if c.seconds is not None]
    faults = {view.name(i): c.fault for i, c in contents.items() if c.fault is not None}
    decoded = sum(c.decoded for c in contents.values())
    result = {"read": len(contents), "decoded": decoded, "unreadable": len(faults), "examples": faults}
    if sizes:
        result["width"], result["height"] = (_quantiles([float(size[k]) for size in sizes]) for k in (0, 1))
        result["formats"] = dict(Counter(size[2] for size in sizes).most_common())
    if seconds:
        result["seconds"] = _quantiles(seconds)
    return result


def _spread(view: View, most: int) -> list[int]:
    """Choose up to ``most`` samples, evenly spaced in each split, in proportion to its size but with a minimum."""
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
        content = Content(digests, decoded=i in decoded or PIXELS in raw)
        if "image" in raw:
            content.size = image_size(raw["image"])
        if "audio" in raw:
            content.seconds = audio_seconds(raw["audio"])
        for kind, header in (("image", content.size), ("audio", content.seconds)):
            if kind in raw and (i in decoded or header is None):  # without a readable header, decoding is cheap
                content.fault, content.decoded = content.fault or fault(kind, raw[kind]), True
        return content

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(read, pool.map(one, read), strict=True))


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    at = np.quantile(np.array(values, dtype=np.float64), list(_QUANTILES.values()), method="nearest")
    return {name: float(f"{value:.4g}") for name, value in zip(_QUANTILES, at, strict=True)}


# text ----------------------------------------------------------------------------------------------------------


def lines(statistics: Mapping[str, Any]) -> list[str]:
    """Format the statistics as lines of text."""
    rows = statistics["rows"]
    notes = [f"{rows['merged']:,} merged with another row of the same file"] if rows["merged"] else []
    notes += [f"{rows['left_out']:,} left out"] if rows["left_out"] else []
    notes += [f"{rows['absent']:,} files named but missing"] if rows["absent"] else []
    out = [f"{statistics['what']}: {statistics['samples']:,} samples", "", *_table(statistics["splits"])]
    if notes:
        out += ["", f"rows        {rows['read']:,} read; {'; '.join(notes)}"]
    if statistics["fields"]:
        fields = ", ".join(f"{name} ({f['kind']}) {f['samples']:,}" for name, f in statistics["fields"].items())
        out += ["", *textwrap.wrap(f"{'fields':<12}{fields}", 110, subsequent_indent=" " * 12)]
    out += ["", *_caption_lines(statistics), "", *_content_lines(statistics["content"], statistics["samples"])]
    return [*out, "", *_duplicate_lines(statistics), ""]


def _table(splits: Mapping[str, Any]) -> list[str]:
    """Return a row per split: samples, those with each modality, and the patterns of modalities."""
    modalities = list(dict.fromkeys(m for split in splits.values() for m in split["has"]))
    rows = [["", "samples", *modalities, "patterns"]]
    for name, split in splits.items():
        n = max(split["samples"], 1)
        shares = [f"{split['has'].get(m, 0):,} ({split['has'].get(m, 0) / n:.1%})" for m in modalities]
        patterns = "  ".join(f"{pattern} {count:,}" for pattern, count in list(split["patterns"].items())[:6])
        rows.append([name, f"{split['samples']:,}", *shares, patterns])
    first, *middle, last = zip(*rows, strict=True)
    width = max(10, *map(len, first))
    columns = [
        [c.ljust(width) for c in first],
        *([c.rjust(max(map(len, column))) for c in column] for column in middle),
    ]
    return ["  ".join(row).rstrip() for row in zip(*columns, last, strict=True)]


def _caption_lines(statistics: Mapping[str, Any]) -> list[str]:
    out = []
    for split, captions in statistics["captions"].items():
        if not captions["captions"]:
            out.append(f"captions    {split}: none")
            continue
        line = f"captions    {split}: {captions['captions']:,}"
        line += f", {captions['without']:,} samples without" if captions.get("without") else ""
        line += f"; words {_range(captions['words'])}"
        if "tokens" in captions:
            line += f"; tokens {_range(captions['tokens'])}, {captions['cut_share']:.1%} cut"
        out.append(line)
    if out and statistics["codec"]:
        out.append(f"            (minimum, 5 %, median, 95 %, maximum; tokenizer: {statistics['codec']})")
    return out


def _content_lines(content: Mapping[str, Any], samples: int) -> list[str]:
    out = []
    if "width" in content:
        formats = ", ".join(f"{name} {n:,}" for name, n in content["formats"].items())
        out.append(f"images      width {_range(content['width'])}; height {_range(content['height'])}; {formats}")
    if "seconds" in content:
        out.append(f"recordings  seconds {_range(content['seconds'])}")
    part = "" if content["decoded"] >= samples else " (--all decodes all)"
    out.append(f"unreadable  {content['unreadable']:,} of {content['decoded']:,} decoded{part}")
    named = list(content["examples"].items())
    out += [f"            {name}: {why}" for name, why in named[:_NAMED]]
    if len(named) > _NAMED:
        out.append(f"            and {len(named) - _NAMED:,} more: --json FILE lists all of them")
    return out


def _duplicate_lines(statistics: Mapping[str, Any]) -> list[str]:
    out = []
    read = statistics["content"]["read"]
    part = "" if read >= statistics["samples"] else f" among the {read:,} read (--all reads all)"
    for kind, same in statistics["duplicates"].items():
        across = ", ".join(f"{pair} {n:,}" for pair, n in same["across"].items())
        copies = f"{same['extra']:,} cop{'y' if same['extra'] == 1 else 'ies'} of another"
        out.append(f"duplicates  {kind}: {copies}{part}; across splits: {across or 'none'}")
        out += [f"            {' = '.join(names)}" for names in same["examples"]]
    for pair, shared in statistics["echoes"].items():
        counts = f"{shared['equal']:,} equal, {shared['near']:,} nearly equal"
        out.append(f"captions    {pair}: {counts}, of {shared['captions']:,} different")
        out += [f"            {a!r} ~ {b!r}" for a, b in shared["examples"]]
    return out


def _range(quantiles: Mapping[str, float]) -> str:
    return " ".join(f"{value:g}" for value in quantiles.values())


# contact sheet -------------------------------------------------------------------------------------------------


def draw(view: View) -> Image.Image:
    """Draw a contact sheet of samples spread evenly over each split; the first split has most of the tiles."""
    names = [name for name, numbers in view.splits.items() if len(numbers)]
    others = min(_TILES // 6, _TILES // (2 * len(names))) if len(names) > 1 else 0
    tiles = []
    for name in names:
        numbers = view.splits[name]
        most = _TILES - others * (len(names) - 1) if name == names[0] else others
        at = np.unique(np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int))
        ids = numbers[at].tolist()
        tiles += [Tile(view.image(i), name, " / ".join(view.captions(i)[:2]), _note(view, i)) for i in ids]
    return sheet(tiles, f"{view.title}: {sum(map(len, view.splits.values())):,} samples")


def _note(view: View, i: int) -> str:
    """Return why a sample has no image to show."""
    if "image" in view.has and view.has["image"][i]:
        return "unreadable"
    return "recording" if "audio" in view.has and view.has["audio"][i] else "no image"
