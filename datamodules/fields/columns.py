"""Find the fields of a corpus that hold images, recordings and captions, by their names and first values.

Letters: B samples of a batch, N of a source, F fields of a modality, G groups of fields.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

import numpy as np

from descant.datamodules.sources.base import IMAGE_ENDINGS, SOUND_ENDINGS, VIDEO_ENDINGS, Raw, Source, media
from descant.modules.core.rng import uniform_N

#: Names of captions; a text field with another name holds captions if it is the only one.
_CAPTIONS = ("caption", "captions", "text", "txt", "description", "sentence", "sentences", "alt_text")
#: Names of texts that are metadata and never captions.
_ABOUT = re.compile(
    r"split|lang(uage)?|label|class|category|folder|file_?(name)?|path|u?id|key|url|uri|license|licence|author|source|"
    r"status|md5|sha\d*|hash|date|time(stamp)?|width|height|size|exif|.*_(id|url|path|name)|__.*__"
)
#: How many values of a column are inspected.
_INSPECTED = 10


class Column:
    """The fields of a modality: one, or several, of which a sample takes the first that it has or a sampled one.

    Args:
        names: F fields. has_NF: bool, which sample has which.
        group_F: fields with equal numbers are parts of one list (``caption.0``, ``caption.1``), and share its weight.
        weight_G: sampling weight of each group.
    """

    def __init__(
        self,
        names: Sequence[str],
        has_NF: np.ndarray,
        group_F: Sequence[int] | None = None,
        weight_G: Sequence[float] | None = None,
    ) -> None:
        self.names, self.has_NF = tuple(names), has_NF
        group = np.arange(len(names)) if group_F is None else np.array(group_F)
        self.member_FG = group[:, None] == np.arange(group.max() + 1)
        self.weight_G = np.ones(self.member_FG.shape[1]) if weight_G is None else np.array(weight_G, dtype=np.float64)

    @property
    def present_N(self) -> np.ndarray:
        return np.asarray(self.has_NF.any(axis=1))

    def pick(self, row_B: np.ndarray, draw_B: np.ndarray | None, purpose: str) -> np.ndarray:
        """Choose the field of each sample, int64 ``[B]``, -1 for none; without ``draw_B``, the first that it has."""
        has_BF = self.has_NF[row_B]
        if draw_B is None or len(self.names) == 1:
            return np.where(has_BF.any(axis=1), has_BF.argmax(axis=1), -1)
        # the parts that the sample has share the weight of their group
        parts_BG = np.maximum(has_BF @ self.member_FG.astype(np.int64), 1)
        weight_BF = has_BF * ((self.weight_G / parts_BG) @ self.member_FG.T)
        reach_BF = weight_BF.cumsum(axis=1)
        u_B = uniform_N(draw_B, purpose).numpy().astype(np.float64)
        chosen_B = (reach_BF > (u_B * reach_BF[:, -1])[:, None]).argmax(axis=1)
        return np.where(has_BF.any(axis=1), chosen_B, -1)


def kinds(source: Source) -> dict[str, str]:
    """Map fields to ``image``, ``audio``, ``video``, ``array``, ``text``, ``number`` or ``unknown`` by first values."""
    cache: dict[int, dict[str, Raw]] = {}  # each sample is read once: one JSON may hold a thousand fields
    return {field: _kind(source, field, cache) for field in source.fields}


def _kind(source: Source, field: str, cache: dict[int, dict[str, Raw]]) -> str:
    texts: list[str] = []
    for index in np.flatnonzero(source.has(field))[:_INSPECTED].tolist():
        if index not in cache:
            cache[index] = _readable(source, index)
        raw = cache[index].get(field)
        if raw is None:
            continue
        if media(raw) not in ("text", "unknown"):
            return media(raw)
        texts += [raw] if isinstance(raw, str) else []
    if texts:
        numbers = all(re.fullmatch(r"[-+\d.,eE%: ]*|true|false", text.strip()) for text in texts)
        return "number" if numbers else "text"
    name = field.rpartition(".")[2].lower()  # no value can be read: go by the name
    endings = {"image": IMAGE_ENDINGS, "audio": SOUND_ENDINGS, "video": VIDEO_ENDINGS, "array": ("npy",)}
    return next((kind for kind, names in endings.items() if name in (*names, kind)), "unknown")


def _readable(source: Source, index: int) -> dict[str, Raw]:
    """Read the fields of a sample that can be read; of bytes, only the first ones."""
    wanted = [field for field in source.fields if source.has(field)[index]]
    with contextlib.suppress(OSError, ValueError, KeyError):
        return {field: _begin(raw) for field, raw in source.read(index, wanted).items()}
    readable: dict[str, Raw] = {}
    for field in wanted:  # one by one, since one of them is broken
        with contextlib.suppress(OSError, ValueError, KeyError):
            readable |= {name: _begin(raw) for name, raw in source.read(index, [field]).items()}
    return readable


def _begin(raw: Raw) -> Raw:
    return raw if isinstance(raw, str) else raw[:64]


def named_column(source: Source, field: str | None, kind: str) -> Column:
    """Join the columns ``a;b``, by default all fields of a kind, into one, if no sample has two of them."""
    if field is not None:
        names = split_names(field)
    else:
        argument = f"data.fields.{kind if kind in ('image', 'audio') else 'others.NAME.init_args'}.field"
        known = kinds(source)
        names = [name for name, of in known.items() if of == kind]
        if not names:
            unread = "".join(f", {name} ({what}, not read)" for name, what in list(source.unread.items())[:20])
            raise ValueError(f"no {kind} field: fields are {_list_columns(known)}{unread}; name one as {argument}")
        if np.any(sum(source.has(name).astype(int) for name in names) > 1):
            raise ValueError(
                f"several {kind} fields ({', '.join(names)}): name one, or several in order as "
                f"{argument}: {';'.join(names[:2])}"
            )
    return Column(names, np.stack([source.has(name) for name in names], axis=1))


def split_names(field: str) -> list[str]:
    return [name.strip() for name in field.split(";") if name.strip()]


def caption_fields(source: Source) -> list[str]:
    """Return the field of captions. Raise ValueError if there is none, or more than one candidate."""
    known = kinds(source)
    groups: dict[str, None] = {}
    for name, kind in known.items():
        whole = re.sub(r"\.\d+$", "", name)
        last = whole.rpartition(".")[2].lower()
        if (kind == "text" and not _ABOUT.fullmatch(last)) or (kind == "number" and last in _CAPTIONS):
            groups[whole] = None
    if "txt" in groups:  # usual in shards; a JSON beside it repeats the text
        return ["txt"]
    choice = [name for name in groups if name.rpartition(".")[2].lower() in _CAPTIONS] or list(groups)
    if len(choice) == 1:
        return choice
    if not choice:
        raise ValueError(
            f"no field of captions: fields are {_list_columns(known)}; name one as data.fields.text.captions"
        )
    raise ValueError(
        f"captions: {', '.join(choice)} may all be: name one as data.fields.text.captions, "
        f"or several with weights, such as {{{choice[0]}: 0.5, {choice[1]}: 0.5}}"
    )


def _list_columns(known: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in list(known.items())[:20])


def list_parts(name: str, fields: Sequence[str]) -> list[str]:
    """Return the parts of a field that is a list (``caption.0``, ...), or the field itself.

    >>> list_parts("caption", ["image", "caption.0", "caption.1"]), list_parts("title", ["title"])
    (['caption.0', 'caption.1'], ['title'])
    """
    if name in fields:
        return [name]
    parts = [f for f in fields if f.startswith(f"{name}.") and f[len(name) + 1 :].isdigit()]
    return sorted(parts, key=lambda f: int(f[len(name) + 1 :])) or [name]
