"""WebDataset shards from a folder: written beside, read back and compared with the source, then renamed into place."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import webdataset
import yaml
from PIL import Image, ImageOps

from descant import __version__
from descant.cli.errors import fail
from descant.data.media import fault
from descant.data.views import captions_of
from descant.datamodules.fields.fields import kinds
from descant.datamodules.fields.images import rgb_of
from descant.datamodules.sources.base import Source, text_of
from descant.datamodules.sources.folder import Folder
from descant.datamodules.sources.ledger import Ledger
from descant.datamodules.user_data import UserData

SPLITS = ("train", "val", "test")
#: Extension of a member by the format that Pillow names; anything else keeps its kind as extension.
_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_SOUNDS = {b"OggS": "ogg", b"fLaC": "flac", b"RIFF": "wav", b"ID3": "mp3", b"\xff\xfb": "mp3", b"\xff\xf3": "mp3"}
#: Of what is made by ``--resize``: higher ones cost a third more bytes for differences that no tower sees.
QUALITY = 95
#: Samples that wait for their turn while others are read: they bound the memory.
_AHEAD = 64


@dataclass
class Shard:
    """One written tar: its file, how many samples, bytes, and their SHA-256."""

    file: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""


@dataclass
class Made:
    """What came of it; also the content of ``manifest.json``."""

    out: Path
    shards: dict[str, list[Shard]] = field(default_factory=dict)
    fields: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: int = 0
    members: int = 0

    def samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.shards[split])

    def report(self) -> str:
        lines = []
        for split, shards in self.shards.items():
            size = sum(shard.bytes for shard in shards) / 1e6
            count = f"{len(shards):,} shard{'s' if len(shards) > 1 else ''}"
            held = ", ".join(f"{name} {n:,}" for name, n in self.fields[split].items())
            lines.append(f"{split:<9}{self.samples(split):>9,} samples  {count}, {size:,.1f} MB  ({held})")
        if self.skipped:
            lines.append(f"left out {self.skipped:>9,} fields that cannot be read: {self.out / 'ledger.jsonl'}")
        lines.append(f"verified {self.members:>9,} members, each equal to its source")
        lines += ["", "next:", f"  descant data look {self.out}"]
        return "\n".join([*lines, f"  descant fit --config contrastive/own --data.path {self.out}"])


@dataclass
class _Sample:
    """One sample on its way into a shard: its members, and their digests."""

    split: str
    members: dict[str, bytes]
    faults: list[tuple[str, str]]


def make(
    folder: Path,
    out: Path,
    csv: Path | None = None,
    caption: str | None = None,
    samples: int | None = None,
    megabytes: float = 256.0,
    resize: int | None = None,
    holdout: float = 0.05,
    seed: int = 0,
) -> Made:
    """Write shards of ``folder`` to the new folder ``out``.

    Args:
        folder, csv: as :class:`Folder` reads them.
        caption: field that becomes ``txt``.
        samples: of a shard, else by ``megabytes``.
        resize: pixels of the shorter side of pictures that are larger.
        holdout: share of the samples that becomes ``val``, where nothing says which split they belong to.
        seed: of the order of the samples.

    Raises:
        Refusal, ValueError: in one line; then nothing is left behind.
    """
    out = Path(out)
    if out.exists():
        fail(f"--out {out}: already there, and nothing is overwritten; give a new folder")
    own = UserData(source=Folder(folder, csv), holdout=holdout)
    source = own.sources["train"]
    plan = Plan(source, caption, resize)
    splits = {row: split for split, (_, row_N) in own.splits.items() for row in row_N.tolist()}
    order = sorted(range(len(source)), key=lambda i: hashlib.sha256(f"{seed}/{source.name(i)}".encode()).digest())
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        made = _write(source, plan, splits, order, temporary, samples, megabytes)
        made.out = out
        if not made.shards:
            fail(f"{folder}: not one of {len(source):,} samples can be read; the first: {plan.first_fault}")
        settings = {"folder": str(Path(folder).resolve()), "seed": seed, "holdout": holdout, "resize": resize}
        _describe(temporary, out, made, settings)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return made


class Plan:
    """Which fields of a source become which members.

    The caption becomes ``txt``; the other texts and the file's own name become one ``json``; a picture or recording is
    a member with its format's extension, the second one of a kind with its field's name before that.
    """

    def __init__(self, source: Source, caption: str | None, resize: int | None) -> None:
        self.source, self.resize = source, resize
        found = kinds(source)
        self.media = {name: kind for name, kind in found.items() if kind in ("image", "audio")}
        if not self.media:
            raise ValueError(f"{source.place(0)}: no field holds pictures or recordings, only {', '.join(found)}")
        files = getattr(source, "files", ())  # a column of files that are neither is no text
        self.texts = [name for name in source.fields if name not in self.media and name not in files]
        names = captions_of(source, caption)
        self.caption = names[0] if len(names) == 1 else None  # several captions of one picture stay a list
        self.prefix: dict[str, str] = {}
        for kind in ("image", "audio"):
            same = [name for name, k in self.media.items() if k == kind]
            self.prefix |= {name: "" if n == 0 else f"{name.lower()}." for n, name in enumerate(same)}
        self.first_fault = ""

    def sample(self, index: int, split: str) -> _Sample:
        """Read one sample: the members that a shard will hold, and what of it cannot be read."""
        faults: list[tuple[str, str]] = []
        members: dict[str, bytes] = {}
        for name, kind in self.media.items():
            try:
                raw = self.source.read(index, [name]).get(name)
            except (OSError, ValueError) as error:
                faults.append((name, str(error)))
                continue
            if raw is None:
                continue
            data = raw.encode() if isinstance(raw, str) else raw
            why = fault(kind, data)
            if why is not None:
                faults.append((name, why))
                continue
            if kind == "image":
                data, ending = self._picture(data)
            else:
                ending = next((e for magic, e in _SOUNDS.items() if data.startswith(magic)), "audio")
            members[self.prefix[name] + ending] = data
        if not members:
            return _Sample(split, {}, faults)
        found, texts = self.source.read(index, self.texts), dict[str, str]()
        for name, raw in found.items():
            try:
                text = text_of(raw)
            except ValueError as error:
                faults.append((name, str(error)))
                continue
            if name == self.caption:
                members["txt"] = text.encode()
                continue
            bare = name.removeprefix("json.")
            texts[name if bare in found and bare != name else bare] = text
        texts["file_name" if "file" in texts else "file"] = self.source.name(index)
        members["json"] = json.dumps(texts, ensure_ascii=False).encode("utf-8", "surrogateescape")
        return _Sample(split, members, faults)

    def _picture(self, data: bytes) -> tuple[bytes, str]:
        with Image.open(io.BytesIO(data)) as picture:
            ending = _ENDINGS.get(picture.format or "", "img")
            if self.resize is None or min(picture.size) <= self.resize:
                return data, ending
            return smaller(picture, self.resize), "jpg"


def smaller(picture: Image.Image, side: int) -> bytes:
    """A picture with ``side`` pixels on its shorter side, upright and over white, as JPEG."""
    scale = side / min(picture.size)
    goal = (max(side, round(picture.width * scale)), max(side, round(picture.height * scale)))
    picture.draft("RGB", (2 * goal[0], 2 * goal[1]))
    upright = ImageOps.exif_transpose(picture)
    if upright.size != picture.size:
        goal = goal[::-1]
    small = Image.fromarray(rgb_of(upright)).resize(goal, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY, icc_profile=picture.info.get("icc_profile"))
    return out.getvalue()


def _write(
    source: Source,
    plan: Plan,
    splits: Mapping[int, str],
    order: Sequence[int],
    folder: Path,
    samples: int | None,
    megabytes: float,
) -> Made:
    made = Made(folder)
    most = len(order) * (len(plan.media) + len(plan.texts)) + 1
    ledger = Ledger(folder, in_a_row=most)  # a folder with many broken files is no reason to stop
    limit = (samples, None) if samples else (None, round(megabytes * 1e6))
    writers: dict[str, Writer] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.ExitStack() as stack:
        for index, sample in zip(order, _ahead(pool, plan, order, splits), strict=True):
            for name, why in sample.faults:
                ledger.skip(source.place(index), f"{source.name(index)}: {name}", why)
                plan.first_fault = plan.first_fault or f"{source.name(index)}: {why}"
            if sample.members:
                if sample.split not in writers:
                    writers[sample.split] = stack.enter_context(Writer(folder, sample.split, *limit))
                writers[sample.split].write(sample.members)
    made.skipped = ledger.skipped
    for split in (s for s in SPLITS if s in writers):
        made.shards[split] = writers[split].shards
        made.fields[split] = dict(sorted(writers[split].fields.items()))
        made.members += sum(made.fields[split].values())
    return made


def _ahead(pool: ThreadPoolExecutor, plan: Plan, order: Sequence[int], splits: Mapping[int, str]) -> Iterator[_Sample]:
    """The samples in order, some of them read while others are written."""
    waiting: deque[Future[_Sample]] = deque()
    for index in order:
        waiting.append(pool.submit(plan.sample, index, splits[index]))
        if len(waiting) >= _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Writer:
    """The shards of one split; each is read back and compared when it is full.

    Args:
        folder, split: ``folder/split-000000.tar`` is the first.
        samples, size: of a shard, at most; a sample larger than ``size`` gets a shard of its own.
    """

    def __init__(self, folder: Path, split: str, samples: int | None, size: int | None) -> None:
        self.folder, self.split, self.most, self.size = folder, split, samples, size
        self.shards: list[Shard] = []
        self.fields: Counter[str] = Counter()
        self._tar: webdataset.TarWriter | None = None
        self._digests: dict[str, bytes] = {}
        self._written = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._close(verify=kind is None)

    def write(self, members: dict[str, bytes]) -> None:
        """Append one sample. Raises OSError where the shard before it does not read back as written."""
        size = sum(512 + -(-len(data) // 512) * 512 for data in members.values())
        full = self._tar is not None and (
            self.shards[-1].samples == self.most or (self.size is not None and self._written + size > self.size)
        )
        if full:
            self._close()
        if self._tar is None:
            self.shards.append(Shard(f"{self.split}-{len(self.shards):06d}.tar"))
            # times and owners say nothing of the data: the same files make the same bytes
            path = str((self.folder / self.shards[-1].file).absolute())  # else a folder named http: is an address
            self._tar = webdataset.TarWriter(path, encoder=False, mtime=0, mode=0o644, user="", group="")
            self._written = 0
        key = f"{sum(shard.samples for shard in self.shards):09d}"
        self._tar.write({"__key__": key, **members})
        self._digests |= {f"{key}.{name}": hashlib.sha256(data).digest() for name, data in members.items()}
        self.shards[-1].samples += 1
        self._written += size
        self.fields.update(list(members))

    def _close(self, verify: bool = True) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        shard, wanted = self.shards[-1], self._digests
        self._digests = {}
        path = self.folder / shard.file
        if not verify:
            return
        found = {}
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                found[member.name] = hashlib.sha256(content.read()).digest() if content is not None else b""
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if wrong:
            raise OSError(f"{shard.file}: {len(wrong)} members do not read back as written, the first is {wrong[0]}")
        with path.open("rb") as file:
            shard.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard.bytes = path.stat().st_size


def overlay(out: Path, made: Made) -> str:
    """A configuration that puts these shards in the place of an experiment's data."""
    sizes = ", ".join(f"{made.samples(split):,} {split}" for split in made.shards)
    data = {"data": {"class_path": "UserData", "init_args": {"path": str(out.resolve())}}}
    return f"# Shards on disk: {sizes}.\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}"


def _describe(folder: Path, out: Path, made: Made, settings: dict[str, object]) -> None:
    """``manifest.json`` and ``data.yaml``."""
    splits = {
        split: {
            "samples": made.samples(split),
            "fields": made.fields[split],
            "shards": [dataclasses.asdict(shard) for shard in shards],
        }
        for split, shards in made.shards.items()
    }
    manifest = {"descant": __version__, **settings, "left_out": made.skipped, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "data.yaml").write_text(overlay(out, made), encoding="utf-8")
