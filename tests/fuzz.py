"""Damaged files for every reader, without end: ``python -m tests.fuzz --seconds 600``, or ``make fuzz``.

Valid files are mutated (bits, cuts, repeats, foreign pieces, numbers of formats, broken JSON and tables) and read.
Each outcome has to be a success or an error of one line, in five seconds and ``MEMORY``; nothing may be written outside
the folder of the case, begun as a process or asked of a network. A case is a function of (kind, seed), which a finding
prints: ``--only KIND --seed SEED --cases 1`` repeats it.
"""

# Neither hypothesis nor atheris: what is read here is mostly binary, and hypothesis's strength is values of a structure
# that it can shrink; atheris wants a clang that few machines have, and instruments Python while pyarrow, Pillow and
# libsndfile do the reading. Mutations of valid files reach deep without both, and a case is repeated by its seed.

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import torch

from descant.__main__ import main as descant
from descant.cli.errors import Refusal, one_line
from descant.datamodules.fields.fields import AudioField, ImageField, kinds
from descant.datamodules.sources import find
from descant.datamodules.sources.base import Source
from descant.datamodules.sources.stream import Stream, read_samples
from descant.modules.io import manifest
from descant.modules.io.saved import find as find_saved
from descant.modules.io.saved import read_checkpoint, read_yaml
from tests.descant.report.test_compare import make as make_run
from tests.files import jpeg, wav, write_tar

#: Seconds that one case may take, and bytes that it may add to the process.
SECONDS, MEMORY = 5.0, 1 << 30
#: Outcomes that are no findings; each has to be one line.
REPORTED = (Refusal, ValueError, OSError)

Files = dict[str, bytes]


@dataclass
class Kind:
    """Valid files, which of them are mutated, and what reads the folder that they are in."""

    files: Callable[[], Files]
    names: tuple[str, ...]
    read: Callable[[Path], object]


# what reads ----------------------------------------------------------------------------------------------------------


def _all(folder: Path | str, damaged: bool = False) -> None:
    """Every sample of a corpus, decoded."""
    for source in find(folder, "skip" if damaged else "refuse").values():
        _sources(source)


def _sources(source: Source) -> None:
    kinds(source)
    corpus = source.corpus()
    if corpus is not None:
        corpus.changes(corpus.state())
    image, sound = ImageField(size=8), AudioField(rate=8000, seconds=0.1)
    for index in range(min(len(source), 12)):
        assert source.name(index) and source.place(index)
        try:
            found = source.read(index, [name for name in source.fields if source.has(name)[index]])
        except (OSError, ValueError) as error:
            _require_line(error)
            continue
        for raw in found.values():
            for decode in (image.decode, sound.decode) if isinstance(raw, bytes) else ():
                why = decode([raw], None)[1][0]
                assert why is None or "\n" not in why, why


def _both(folder: Path) -> None:
    """With damage refused, and skipped; raises what was output."""
    output: Exception | None = None
    for damaged in (True, False):
        try:
            _all(folder, damaged)
        except (OSError, ValueError) as error:
            _require_line(error)
            assert str(folder) in str(error), f"no place: {error}"
            output = error
    if output is not None:
        raise output


def _tar(folder: Path) -> None:
    reported: list[str] = []
    for sample in read_samples(str(folder / "a.tar"), lambda place, why: reported.append(why)):
        assert sample.name is not None
    assert all("\n" not in why for why in reported), reported
    try:
        Stream(str(folder / "a.tar"), samples=4).require_whole()
    except (OSError, ValueError) as error:
        _require_line(error)
    _both(folder)


def _packed(folder: Path) -> None:
    reported: list[str] = []
    assert sum(1 for _ in read_samples(str(folder / "a.tar.gz"), lambda place, why: reported.append(why))) < 100
    assert all("\n" not in why for why in reported), reported
    if reported:
        raise ValueError(reported[0])


def _media(folder: Path) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        for field_ in (ImageField(size=8), AudioField(rate=8000, seconds=0.1)):
            why = field_.decode([data], np.array([1], dtype=np.uint64))[1][0]
            assert why is None or "\n" not in why, why


def _manifest(folder: Path) -> None:
    assert "\n" not in (manifest.fault(folder / "a.ckpt") or "")
    manifest.last_facts(folder / "a.ckpt")
    manifest.newest(folder, "*.ckpt")
    _both(folder)


def _checkpoint(folder: Path) -> None:
    for name in ("checkpoints/last.ckpt", "model.safetensors"):
        saved = find_saved(folder / name)
        read_checkpoint(saved)


def _run(folder: Path) -> None:
    read_yaml(folder / "runs/a/001/config.yaml", folder)


def _commands(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)
    try:
        for words in (["compare", "a", "b"], ["report", "a", "b"], ["compare", "a", "--format", "json"]):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as reported:
                code = descant(words)
            assert code in (0, 2), (words, code)
            lines = reported.getvalue().strip().splitlines()
            assert all(line.startswith("descant: ") for line in lines), lines[:5]
    finally:
        os.chdir(here)
    _run(folder)


# what is read --------------------------------------------------------------------------------------------------------


def _members() -> list[tuple[str, bytes]]:
    found = []
    for i in range(6):
        found += [(f"{i:03}.jpg", jpeg("red", (9 + i, 8))), (f"{i:03}.txt", f"caption {i}".encode())]
        found += [(f"{i:03}.json", json.dumps({"a": {"b": i}, "c": ["x", "y"]}).encode())]
    return [*found, ("x" * 120 + ".txt", b"long"), ("zoë.wav", wav(0.02))]


@cache
def _tar_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_tar(Path(folder) / "a.tar", _members()).read_bytes()


def _shards() -> Files:
    data = _tar_bytes()
    reported = {"file": "a.tar", "samples": 8, "bytes": len(data), "sha256": "0" * 64}
    text = json.dumps({"descant": "0", "splits": {"train": {"samples": 8, "shards": [reported]}}})
    return {"a.tar": data, "manifest.json": text.encode()}


def _images() -> Files:
    found = {f"{i}.png": jpeg("blue", (7, 5 + i), "PNG") for i in range(4)}
    return found | {"4.gif": jpeg("red", (5, 5), "GIF"), "5.webp": jpeg("red", (5, 5), "WEBP"), "6.jpg": jpeg()}


def _table() -> Files:
    rows = "".join(f'{name},"caption, ""{k}""",{k}\n' for k, name in enumerate(_images()))
    return {**_images(), "captions.csv": f"image,caption,n\n{rows}".encode()}


def _lines() -> Files:
    rows = ({"image": name, "caption": {"en": "a", "de": ["b", "c"]}, "n": k} for k, name in enumerate(_images()))
    return {**_images(), "a.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


def _beside() -> Files:
    texts = {f"{k}.txt": f"text {k}".encode() for k in range(4)}
    return {**_images(), **texts, "5.json": b'{"caption": ["a", {"b": 1}]}'}


@cache
def _parquet_bytes(compression: str) -> bytes:
    images = [{"bytes": jpeg("red", (6, 6 + i)), "path": None} for i in range(12)]
    rows = [{"image": x, "caption": f"c {i}", "n": i, "parts": ["a", "b"][: i % 3]} for i, x in enumerate(images)]
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=5, compression=compression)
    return out.getvalue()


def _parquet() -> Files:
    return {"a.parquet": _parquet_bytes("snappy"), "b.parquet": _parquet_bytes("none")}


def _stream(table: pa.Table, rows: int = 5) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return out.getvalue()


@cache
def _saved() -> Files:
    """A DatasetDict as `datasets` saves it, and one split with an order, as early releases did."""
    images = [{"bytes": jpeg("red", (6, 6 + i)), "path": None} for i in range(12)]
    rows = [
        {
            "image": x,
            "caption": f"c {i}",
            "label": i % 2,
            "parts": ["a", "b"][: i % 3],
            "v": [float(i)],
            "s": {"x": [i]},
        }
        for i, x in enumerate(images)
    ]
    label = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    features = {"image": {"_type": "Image"}, "caption": {"_type": "Value", "dtype": "string"}, "label": label}
    info = json.dumps({"info": {"features": features}}).encode()
    table = pa.Table.from_pylist(rows).replace_schema_metadata({b"huggingface": info})
    coded = table.set_column(1, "caption", table["caption"].dictionary_encode())
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0f", "_format_type": None}
    order = {**state, "_indices_data_files": [{"filename": "indices.arrow"}]}
    files = {"dataset_dict.json": b'{"splits": ["train", "test"]}'}
    for split, content, part in (("train", table, state), ("test", coded, order)):
        files |= {f"{split}/state.json": json.dumps(part).encode(), f"{split}/dataset_info.json": info[9:-1]}
        files[f"{split}/data-00000-of-00001.arrow"] = _stream(content)
    files["test/indices.arrow"] = _stream(pa.table({"indices": pa.array([3, 1, 11, 1], pa.uint64())}))
    return files


def _arrow() -> Files:
    """Cached files: a stream, and an Arrow file."""
    table = pa.table({"text": [f"t {i}" for i in range(9)], "n": list(range(9)), "b": [b"x" * i for i in range(9)]})
    out = io.BytesIO()
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return {"a.arrow": _stream(table), "b.arrow": out.getvalue()}


def _sounds() -> Files:
    return {**_images(), "a.wav": wav(0.05), "b.flac": wav(0.05, format="FLAC"), "c.ogg": wav(0.05, format="OGG")}


def _manifests() -> Files:
    with tempfile.TemporaryDirectory() as name:
        manifest.write(Path(name) / "a.ckpt", lambda stream: stream.write(b"weights" * 20), {"step": 3})
        found = {file.name: file.read_bytes() for file in Path(name).iterdir()}
    return {**found, **_shards()}


def _checkpoints() -> Files:
    from safetensors.torch import save

    weights = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    out = io.BytesIO()
    torch.save({"state_dict": weights, "callbacks": {"x": {"monitor": "a"}}, "epoch": 1}, out)
    config = b"model:\n  class_path: descant.recipes.clip.Clip\n"
    return {"checkpoints/last.ckpt": out.getvalue(), "model.safetensors": save(weights), "config.yaml": config}


@cache
def _run_files() -> Files:
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            for run in ("a/001", "a/002", "b/001"):
                folder = make_run(run, int(run[-1]))
                rows = "".join(f"0,{n},{1 / (n + 1)},\n" for n in range(9))
                (folder / "metrics.csv").write_text(f"epoch,step,train/loss,val/r1\n{rows}")
            return {str(f.relative_to(name)): f.read_bytes() for f in Path(name).rglob("*") if f.is_file()}
        finally:
            os.chdir(here)


KINDS = {
    "tar": Kind(_shards, ("a.tar",), _tar),
    "packed": Kind(lambda: {"a.tar.gz": gzip.compress(_tar_bytes())}, ("a.tar.gz",), _packed),
    "manifest": Kind(_manifests, ("manifest.json", "a.ckpt.manifest", "a.ckpt"), _manifest),
    "csv": Kind(_table, ("captions.csv",), _both),
    "lines": Kind(_lines, ("a.jsonl",), _both),
    "beside": Kind(_beside, ("1.txt", "5.json"), _both),
    "parquet": Kind(_parquet, ("a.parquet", "b.parquet"), _both),
    "saved": Kind(_saved, tuple(_saved()), _both),
    "arrow": Kind(_arrow, ("a.arrow", "b.arrow"), _both),
    "media": Kind(_sounds, tuple(_sounds()), _media),
    "checkpoint": Kind(_checkpoints, ("checkpoints/last.ckpt", "model.safetensors", "config.yaml"), _checkpoint),
    "run": Kind(_run_files, tuple(_run_files()), _commands),
}


@cache
def valid(kind: str) -> Files:
    """The files of a kind before they are mutated."""
    return KINDS[kind].files()


# mutations -----------------------------------------------------------------------------------------------------------

_NUMBERS = [n.to_bytes(size, "little") for size in (1, 2, 4, 8) for n in (0, 1, 127, 255)]
_NUMBERS += [struct.pack(f, n) for f in (">I", "<I", ">Q", "<Q") for n in (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)]
_TEXTS = [
    *(b'"', b"'", b"\n", b"\r\n", b"\0", b",", b"{", b"}", b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\xed\xa0\x80"),
    *(b"1" * 5000, b"-1e999", b"NaN", b"Infinity", b"null", b"true", b"&a [*a, *a]", b"!!python/object:os.x"),
    *(b"../../x.png", b"/etc/passwd", b"\xf0\x9f\x98\x80" * 50, b"a: " * 500, b"%s%n", b"x" * 70_000, b"\t", b";"),
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(out)
        at = rng.randrange(size + 1)
        end = min(at + rng.choice((1, 2, 8, 64, 512, 4096)), size)
        match rng.randrange(10):
            case 0 | 1 if at < size:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at:]
            case 3:
                del out[at:end]
            case 4:
                out[at:at] = out[at:end] * rng.choice((1, 2, 50))
            case 5:
                out[at:end] = rng.randbytes(end - at)
            case 6:
                out[at:end] = bytes(end - at)
            case 7:
                value = rng.choice(_NUMBERS)
                out[at : at + len(value)] = value
            case 8:
                out[at : at + rng.choice((0, 1, 9))] = rng.choice(_TEXTS)
            case _:
                other = rng.randrange(size + 1)
                out[at:end] = out[other : other + end - at]
    return bytes(out)


# one case ------------------------------------------------------------------------------------------------------------


def _require_line(error: BaseException) -> None:
    line = one_line(error)
    assert line and "\n" not in line and len(line) < 2000, repr(line)[:300]


def case(kind: str, seed: int, folder: Path) -> str:
    """Read one folder of mutated files: the name of the outcome. Raises what is a finding."""
    one, rng = KINDS[kind], random.Random(f"{kind}/{seed}")
    for name, data in valid(kind).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    for name in rng.sample(one.names, rng.choice((1, 1, 1, min(2, len(one.names))))):
        (folder / name).write_bytes(mutated((folder / name).read_bytes(), rng))
    try:
        one.read(folder)
    except REPORTED as error:
        _require_line(error)
        return "reported"
    return "read"


class Watch:
    """An audit hook that finds what is written elsewhere, begun or asked of a network."""

    #: Event -> number of the argument that is a path, and whether the second one says how it is opened.
    WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
    NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "os.kill")

    def __init__(self) -> None:
        self.places: tuple[str, ...] = ()
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event in self.NEVER:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            path, mode, flags = (*arguments, None, None, None)[:3]
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not isinstance(path, int) and not self._inside(path):
                self.seen.append(f"open {path!r:.200} {mode!r}")
        elif event in self.WRITES and not self._inside(arguments[0]):
            self.seen.append(f"{event} {arguments!r:.200}")

    def _inside(self, path: object) -> bool:
        text = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        return text.startswith((*self.places, "/dev/null"))


# many cases ----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Cases by kind and outcome, and findings: (kind, seed, what)."""

    cases: Counter[tuple[str, str]] = field(default_factory=Counter)
    findings: list[tuple[str, int, str]] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        for kind in KINDS:
            outcomes = {name: n for (of, name), n in self.cases.items() if of == kind}
            if outcomes:
                yield f"{kind:<11}{sum(outcomes.values()):>8,}  " + ", ".join(f"{k} {n:,}" for k, n in outcomes.items())
        yield f"{'all':<11}{sum(self.cases.values()):>8,}  {len(self.findings)} findings"


def _child(pipe: int, kinds_: list[str], seed: int, cases: int, until: float) -> None:
    """Cases until the time is over, each reported before and after."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MEMORY, used + 3 * MEMORY))
    place = Path(tempfile.mkdtemp(prefix="fuzz-")).resolve()
    os.environ["DESCANT_CACHE"] = str(place / "cache")
    watch = Watch()
    watch.places = (str(place),)
    out = os.fdopen(pipe, "wb")

    def tell(*message: object) -> None:
        pickle.dump(message, out)
        out.flush()

    number = 0
    while time.monotonic() < until and number < cases:
        kind = kinds_[(seed + number) % len(kinds_)]
        tell("begin", kind, seed + number)
        folder = place / "case"
        before, _ = _memory()
        watch.on, watch.seen = True, []
        try:
            outcome = case(kind, seed + number, folder)
        except BaseException:
            outcome = traceback.format_exc(limit=-6)
        watch.on = False
        _, peak = _memory()
        if watch.seen:
            outcome = f"outside the folder: {watch.seen[:3]}"
        elif peak - before > MEMORY:
            outcome = f"{(peak - before) / 1e9:.2f} GB of memory"
        tell("end", outcome)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(exist_ok=True)
        number += 1
    shutil.rmtree(place, ignore_errors=True)
    os._exit(0)


def _memory() -> tuple[int, int]:
    """Bytes that the process has, and the most that it had since this was last asked."""
    status = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("Vm")}
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return found["VmRSS"], found["VmHWM"]


def fuzz(seconds: float, seed: int, only: str | None = None, cases: int = 10**9) -> Tally:
    """Run cases in processes of their own; one that hangs or crashes is a finding, and the next goes on after it."""
    tally, until = Tally(), time.monotonic() + seconds
    chosen = [only] if only else list(KINDS)
    for kind in chosen:
        valid(kind)  # made here, where nobody watches what is written
    with contextlib.suppress(ImportError):
        import matplotlib.font_manager  # noqa: F401  # makes its folders and its list of fonts, where there are none
    at = seed
    while time.monotonic() < until and at - seed < cases:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                _child(write, chosen, at, cases - (at - seed), until)
            finally:
                os._exit(1)
        os.close(write)
        at = _listen(read, child, tally, at)
        os.close(read)
    return tally


def _listen(read: int, child: int, tally: Tally, at: int) -> int:
    """Note what a child tells, until it ends; the seed of the next case."""
    kind, hung = "", False

    def alarm(*_: object) -> None:
        nonlocal hung
        hung = True
        os.kill(child, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, alarm)
    open_case = False
    try:
        with os.fdopen(os.dup(read), "rb") as messages:
            while True:
                try:
                    message = pickle.load(messages)
                except (EOFError, pickle.UnpicklingError):
                    break
                if message[0] == "begin":
                    _, kind, at = message
                    open_case = True
                    signal.setitimer(signal.ITIMER_REAL, SECONDS)
                    continue
                signal.setitimer(signal.ITIMER_REAL, 0)
                open_case, outcome = False, str(message[1])
                tally.cases[kind, outcome if outcome in ("read", "reported") else "finding"] += 1
                if outcome not in ("read", "reported"):
                    tally.findings.append((kind, at, outcome))
                at += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    _, status = os.waitpid(child, 0)
    if open_case:
        tally.cases[kind, "finding"] += 1
        what = f"more than {SECONDS:g} s" if hung else f"the process ended with status {status}"
        tally.findings.append((kind, at, what))
        at += 1
    return at


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--only", choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=None, help="of the first case; else a new one")
    parser.add_argument("--cases", type=int, default=10**9)
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    tally = fuzz(given.seconds, seed, given.only, given.cases)
    same: Counter[tuple[str, str]] = Counter()
    for kind, number, what in tally.findings:
        last = (kind, what.strip().splitlines()[-1][:60])
        same[last] += 1
        if same[last] == 1:
            print(f"\nFINDING --only {kind} --seed {number} --cases 1\n{what}")
    print("".join(f"\n{n} x {kind}: {what}" for (kind, what), n in same.items()))
    print("\n".join(tally.lines()))
    return 1 if tally.findings else 0


if __name__ == "__main__":
    sys.exit(main())
