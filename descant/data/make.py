"""``descant data make``: WebDataset shards from a folder, verified byte by byte and moved into place when complete."""

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
from descant.datamodules.user.user_data import UserData

SPLITS = ("train", "val", "test")
#: File extension by image format and by the first bytes of a recording; others get ``img`` and ``audio``.
_IMAGES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
_AUDIO = {b"OggS": "ogg", b"fLaC": "flac", b"RIFF": "wav", b"ID3": "mp3", b"\xff\xfb": "mp3", b"\xff\xf3": "mp3"}
#: JPEG quality of resized images.
QUALITY = 95
#: Number of samples that are read ahead; it bounds the memory.
_AHEAD = 64


@dataclass
class Shard:
    """One written tar file: name, number of samples, bytes, and SHA-256."""

    file: str
    samples: int = 0
    bytes: int = 0
    sha256: str = ""


@dataclass
class Made:
    """Result of :func:`make`: shards and members by split, and the number of fields that were left out."""

    out: Path
    shards: dict[str, list[Shard]] = field(default_factory=dict)
    fields: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: int = 0
    members: int = 0

    def samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.shards[split])

    def report(self) -> str:
        """Return a summary for the user."""
        lines = []
        for split, shards in self.shards.items():
            size = sum(shard.bytes for shard in shards) / 1e6
            count = f"{len(shards):,} shard{'s' if len(shards) > 1 else ''}"
            held = ", ".join(f"{name} {n:,}" for name, n in self.fields[split].items())
            lines.append(f"{split:<9}{self.samples(split):>9,} samples  {count}, {size:,.1f} MB  ({held})")
        if self.skipped:
            lines.append(f"left out {self.skipped:>9,} fields that cannot be read: {self.out / 'ledger.jsonl'}")
        lines += [f"verified {self.members:>9,} members, each equal to its source", "", "next:"]
        lines += [f"  descant data look {self.out}", f"  descant fit --config contrastive/own --data.path {self.out}"]
        return "\n".join(lines)


@dataclass
class _Sample:
    """One sample to be written: extension -> bytes, and (field, reason) of content that could not be read."""

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
        samples: most samples of a shard; default: by ``megabytes``.
        resize: shorter side in pixels to which larger images are resized.
        holdout: share of the samples that becomes ``val``, unless the data assigns splits.
        seed: of the order of the samples.
    """
    out = Path(out)
    if out.exists():
        fail(f"--out {out}: exists, and nothing is overwritten; give a new folder")
    data = UserData(source=Folder(folder, csv), holdout=holdout)
    source = data.sources["train"]
    plan = Plan(source, caption, resize)
    splits = {row: split for split, (_, row_N) in data.splits.items() for row in row_N.tolist()}
    order = sorted(range(len(source)), key=lambda i: hashlib.sha256(f"{seed}/{source.name(i)}".encode()).digest())
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    temporary.mkdir(parents=True)
    try:
        made = _write(plan, splits, order, temporary, samples, megabytes)
        made.out = out
        if not made.shards:
            fail(f"{folder}: none of {len(source):,} samples can be read; the first: {plan.first_fault}")
        settings = {"folder": str(Path(folder).resolve()), "seed": seed, "holdout": holdout, "resize": resize}
        _describe(temporary, out, made, settings)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return made


class Plan:
    """Maps the fields of a source to members of a shard.

    The caption becomes ``txt``; other texts and the file's name become one ``json``. An image or recording gets its
    format's extension, preceded by its field's name if it is not the first of its kind.
    """

    def __init__(self, source: Source, caption: str | None, resize: int | None) -> None:
        self.source, self.resize = source, resize
        types = kinds(source)
        self.media = {name: kind for name, kind in types.items() if kind in ("image", "audio")}
        if not self.media:
            raise ValueError(f"{source.place(0)}: no field holds images or recordings, only {', '.join(types)}")
        files = getattr(source, "files", ())  # columns of other files are not text
        self.texts = [name for name in source.fields if name not in self.media and name not in files]
        names = captions_of(source, caption)
        self.caption = names[0] if len(names) == 1 else None  # several captions of an image stay in the json
        self.prefix: dict[str, str] = {}
        for kind in ("image", "audio"):
            same = [name for name, k in self.media.items() if k == kind]
            self.prefix |= {name: "" if n == 0 else f"{name.lower()}." for n, name in enumerate(same)}
        self.first_fault = ""

    def sample(self, index: int, split: str) -> _Sample:
        """Read one sample."""
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
            if (reason := fault(kind, data)) is not None:
                faults.append((name, reason))
                continue
            if kind == "image":
                data, ending = self._image(data)
            else:
                ending = next((e for magic, e in _AUDIO.items() if data.startswith(magic)), "audio")
            members[self.prefix[name] + ending] = data
        if not members:
            return _Sample(split, {}, faults)
        fields, texts = self.source.read(index, self.texts), dict[str, str]()
        for name, raw in fields.items():
            try:
                text = text_of(raw)
            except ValueError as error:
                faults.append((name, str(error)))
                continue
            if name == self.caption:
                members["txt"] = text.encode()
                continue
            bare = name.removeprefix("json.")
            texts[name if bare in fields and bare != name else bare] = text
        texts["file_name" if "file" in texts else "file"] = self.source.name(index)
        members["json"] = json.dumps(texts, ensure_ascii=False).encode("utf-8", "surrogateescape")
        return _Sample(split, members, faults)

    def _image(self, data: bytes) -> tuple[bytes, str]:
        with Image.open(io.BytesIO(data)) as image:
            if self.resize is None or min(image.size) <= self.resize:
                return data, _IMAGES.get(image.format or "", "img")
            return resize_to_jpeg(image, self.resize), "jpg"


def resize_to_jpeg(image: Image.Image, side: int) -> bytes:
    """Return the image as JPEG with ``side`` pixels on its shorter side, upright, transparent parts white."""
    scale = side / min(image.size)
    goal = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image.draft("RGB", (2 * goal[0], 2 * goal[1]))
    upright = ImageOps.exif_transpose(image)
    if upright.size != image.size:
        goal = goal[::-1]
    small = Image.fromarray(rgb_of(upright)).resize(goal, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=QUALITY, icc_profile=image.info.get("icc_profile"))
    return out.getvalue()


def _write(
    plan: Plan,
    splits: Mapping[int, str],
    order: Sequence[int],
    folder: Path,
    samples: int | None,
    megabytes: float,
) -> Made:
    made, source = Made(folder), plan.source
    most = len(order) * (len(plan.media) + len(plan.texts)) + 1
    ledger = Ledger(folder, in_a_row=most)  # never stops, however many files are broken
    limit = (samples, None) if samples else (None, round(megabytes * 1e6))
    writers: dict[str, Writer] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.ExitStack() as stack:
        for index, sample in zip(order, _ahead(pool, plan, order, splits), strict=True):
            for name, reason in sample.faults:
                ledger.skip(source.place(index), f"{source.name(index)}: {name}", reason)
                plan.first_fault = plan.first_fault or f"{source.name(index)}: {reason}"
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
    """Yield the samples in order, read ahead by threads."""
    waiting: deque[Future[_Sample]] = deque()
    for index in order:
        waiting.append(pool.submit(plan.sample, index, splits[index]))
        if len(waiting) >= _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Writer:
    """Writes the shards of one split; each full shard is read back and compared with what was written.

    Args:
        folder, split: ``folder/split-000000.tar`` is the first shard.
        samples, size: most samples and bytes of a shard; a sample larger than ``size`` gets its own shard.
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
        """Append one sample; raises OSError if the full shard before it does not read back as written."""
        size = sum(512 + -(-len(data) // 512) * 512 for data in members.values())
        full = self._tar is not None and (
            self.shards[-1].samples == self.most or (self.size is not None and self._written + size > self.size)
        )
        if full:
            self._close()
        if self._tar is None:
            self.shards.append(Shard(f"{self.split}-{len(self.shards):06d}.tar"))
            # without times and owners, the same files give the same bytes
            path = str((self.folder / self.shards[-1].file).absolute())  # a relative folder named http: would be a URL
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
        digests = {}
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                digests[member.name] = hashlib.sha256(content.read()).digest() if content is not None else b""
        if wrong := sorted(name for name in wanted.keys() | digests.keys() if wanted.get(name) != digests.get(name)):
            raise OSError(f"{shard.file}: {len(wrong)} members do not read back as written, the first is {wrong[0]}")
        with path.open("rb") as file:
            shard.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        shard.bytes = path.stat().st_size


def _describe(folder: Path, out: Path, made: Made, settings: dict[str, object]) -> None:
    """Write ``manifest.json``, and ``data.yaml``: a configuration with these shards as the data of an experiment."""
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
    sizes = ", ".join(f"{made.samples(split):,} {split}" for split in made.shards)
    data = {"data": {"class_path": "UserData", "init_args": {"path": str(out.resolve())}}}
    text = f"# Shards on disk: {sizes}.\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}"
    (folder / "data.yaml").write_text(text, encoding="utf-8")
