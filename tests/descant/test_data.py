from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset
import yaml
from PIL import Image

from descant.data.duplicates import caption_overlap
from descant.data.look import lines, report
from descant.data.make import make, resize_to_jpeg
from descant.data.sheet import Tile, sheet
from descant.data.views import thumbnail, view_of
from descant.datamodules.sources.shards import Shards
from descant.datamodules.user.user_data import UserData
from tests.files import bomb

SHAPES, COLOURS = ("square", "circle"), {"red": (220, 30, 30), "blue": (30, 60, 200), "green": (20, 160, 70)}


def image(n: int, size: tuple[int, int] = (40, 30), form: str = "JPEG") -> bytes:
    noise = np.random.default_rng(n).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, form)
    return out.getvalue()


def write_table(folder: Path, rows: list[dict[str, str]], name: str = "captions.csv") -> None:
    with (folder / name).open("w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESCANT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 images: one is truncated, one is a copy of another, four lack a caption."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for i in range(40):
        form = "PNG" if i % 8 == 0 else "JPEG"
        name = f"{i:02d}.{'png' if form == 'PNG' else 'jpg'}"
        data = image(i, form=form)
        (folder / name).write_bytes(data[: len(data) // 2] if i == 3 else data)
        caption = "" if i % 10 == 7 else f"picture {i} of {list(COLOURS)[i % 3]} dots"
        rows.append({"image": name, "caption": caption, "label": SHAPES[i % 2]})
    (folder / "05.jpg").write_bytes((folder / "06.jpg").read_bytes())
    write_table(folder, rows)
    return folder


@pytest.fixture
def data(cli: Callable[..., Any]) -> Callable[..., Any]:
    """``data("make", ...)`` runs a command that must succeed."""

    def call(*args: str | Path) -> Any:
        result = cli("data", *args)
        assert result.rc == 0, result.err
        return result

    return call


# make ----------------------------------------------------------------------------------------------------------


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def samples(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """Name of the source file -> members by extension."""
    result: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        rows: dict[str, dict[str, bytes]] = {}
        for name, content in members(shard).items():
            key, _, ending = name.partition(".")
            rows.setdefault(key, {})[ending] = content
        result |= {json.loads(row["json"])["file"]: row for row in rows.values()}
    return result


def test_shards_hold_the_bytes_of_the_folder(photos: Path, data: Callable[..., Any]) -> None:
    out = data("make", photos, "--out", "shards", "--samples-per-shard", "10", "--holdout", "0.2").out
    train, val = samples(Path("shards"), "train"), samples(Path("shards"), "val")
    assert set(train) | set(val) == {p.name for p in photos.iterdir()} - {"captions.csv", "03.jpg"}
    assert not set(train) & set(val) and len(val) >= 2
    for name, row in {**train, **val}.items():
        assert row["png" if name.endswith("png") else "jpg"] == (photos / name).read_bytes()
        i = int(name[:2])
        assert row.get("txt", b"").decode() == ("" if i % 10 == 7 else f"picture {i} of {list(COLOURS)[i % 3]} dots")
        assert json.loads(row["json"])["label"] == SHAPES[i % 2]
    counts = [sum(n.endswith(".json") for n in members(p)) for p in sorted(Path("shards").glob("train-*.tar"))]
    assert set(counts[:-1]) == {10} and sum(counts) == len(train)
    ledger = [json.loads(line) for line in Path("shards/ledger.jsonl").read_text().splitlines()]
    assert [entry["sample"] for entry in ledger] == ["03.jpg: image"] and "truncated" in ledger[0]["why"]
    assert "left out         1" in out and "--data.path shards" in out


def test_the_manifest_counts_and_hashes(photos: Path, data: Callable[..., Any]) -> None:
    import hashlib

    data("make", photos, "--out", "shards", "--size", "0.05")
    manifest = json.loads(Path("shards/manifest.json").read_text())
    assert sum(split["samples"] for split in manifest["splits"].values()) == 39 and manifest["left_out"] == 1
    for split, listed in manifest["splits"].items():
        assert len(listed["shards"]) == len(list(Path("shards").glob(f"{split}-*.tar")))
        assert sum(shard["samples"] for shard in listed["shards"]) == listed["samples"] == listed["fields"]["json"]
        for shard in listed["shards"]:
            content = (Path("shards") / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"] and len(content) == shard["bytes"]
    sizes = [shard["bytes"] for shard in manifest["splits"]["train"]["shards"]]
    assert len(sizes) > 1 and max(sizes) <= 50_000 + 10_240  # a tar is filled up to its record size


def test_the_same_seed_writes_the_same_bytes_and_another_shuffles(photos: Path, data: Callable[..., Any]) -> None:
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        data("make", photos, "--out", out, "--seed", seed)
    a, b, c = (Path(out, "train-000000.tar").read_bytes() for out in "abc")
    assert a == b != c
    assert list(samples(Path("a"), "train")) != sorted(samples(Path("a"), "train"))
    assert samples(Path("a"), "train").keys() == samples(Path("c"), "train").keys()


def test_a_split_column_assigns_splits(photos: Path, data: Callable[..., Any]) -> None:
    rows = list(csv.DictReader((photos / "captions.csv").open()))
    words = ["training", "validation", "test"]
    write_table(photos, [{**row, "split": words[i % 3]} for i, row in enumerate(rows)])
    data("make", photos, "--out", "shards")
    for n, split in enumerate(("train", "val", "test")):
        assert {int(name[:2]) % 3 for name in samples(Path("shards"), split)} == {n}
    user_data = UserData(path="shards")
    assert {name: len(rows) for name, (_, rows) in user_data.splits.items()} == {"train": 13, "val": 13, "test": 13}


def test_holdout_is_that_of_training_on_the_folder(photos: Path, data: Callable[..., Any]) -> None:
    data("make", photos, "--out", "shards", "--holdout", "0.3")
    user_data = UserData(path=str(photos), holdout=0.3)
    name, rows = user_data.splits["val"]
    held = {user_data.sources[name].name(row) for row in rows.tolist()} - {"03.jpg"}
    assert samples(Path("shards"), "val").keys() == held


def test_resize_shrinks_larger_images_only(tmp_path: Path, data: Callable[..., Any]) -> None:
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, size in (("small.png", (20, 50)), ("wide.png", (200, 80)), ("tall.jpg", (64, 640))):
        (folder / name).write_bytes(image(1, size, "PNG" if name.endswith("png") else "JPEG"))
    data("make", folder, "--out", "shards", "--resize", "32", "--holdout", "0")
    rows = samples(Path("shards"), "train")
    assert rows["small.png"]["png"] == (folder / "small.png").read_bytes()
    assert Image.open(io.BytesIO(rows["wide.png"]["jpg"])).size == (80, 32)
    assert Image.open(io.BytesIO(rows["tall.jpg"]["jpg"])).size == (32, 320)


def test_a_resized_image_is_upright_over_white_and_close_to_the_original() -> None:
    ramp = np.tile(np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated camera: rows are columns
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "JPEG", exif=exif, quality=95)
    with Image.open(out) as turned:
        small = Image.open(io.BytesIO(resize_to_jpeg(turned, 50)))
    assert small.size == (50, 100)
    x = np.asarray(small.convert("L"), dtype=float)
    assert x[0].mean() < 10 and x[-1].mean() > 245 and np.abs(np.diff(x.mean(axis=1))).max() < 6
    clear = Image.new("RGBA", (80, 80), (255, 0, 0, 0))
    white = np.asarray(Image.open(io.BytesIO(resize_to_jpeg(clear, 40))))
    assert white.min() > 250


def test_recordings_and_captions_of_several(tmp_path: Path, data: Callable[..., Any]) -> None:
    folder = tmp_path / "spoken"
    folder.mkdir()
    rows = []
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(image(i))
        sound = folder / f"{i}.wav"
        soundfile.write(sound, np.sin(np.arange(4000) * 0.05 * (i + 1)), 8000)
        if i == 2:
            sound.write_bytes(b"")
        rows += [{"image": f"{i}.jpg", "speech": f"{i}.wav", "caption": f"{word} {i}"} for word in ("one", "another")]
    write_table(folder, rows)
    result = data("make", folder, "--out", "shards", "--holdout", "0")
    assert "left out         1" in result.out
    shards = Shards("shards/train-000000.tar")
    assert len(shards) == 6 and "txt" not in shards.fields
    assert {"jpg", "wav", "json.caption.0", "json.caption.1"} <= set(shards.fields)
    assert int(shards.has("wav").sum()) == 5  # without the empty recording, its image stays


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(
    photos: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("shards").mkdir()
    assert cli("data", "make", photos, "--out", "shards").refusal == (
        "--out shards: exists, and nothing is overwritten; give a new folder"
    )
    write = webdataset.TarWriter.write

    def spoiled(self: Any, sample: dict[str, Any]) -> int:
        if sample["__key__"] == "000000007":
            sample = {**sample, "json": sample["json"][:-1] + b"!"}
        return write(self, sample)

    monkeypatch.setattr(webdataset.TarWriter, "write", spoiled)
    before = sorted(Path().iterdir())
    refusal = cli("data", "make", photos, "--out", "other").refusal
    assert refusal.startswith("train-000000.tar: 1 members do not read back as written, the first is 000000007.json")
    assert sorted(Path().iterdir()) == before


# look ----------------------------------------------------------------------------------------------------------


def numbers(call: Callable[..., Any], *args: str | Path) -> dict[str, Any]:
    call("look", *args, "--json", "numbers.json")
    result: dict[str, Any] = json.loads(Path("numbers.json").read_text())
    return result


def test_look_counts_samples_fields_and_captions(photos: Path, data: Callable[..., Any]) -> None:
    found = numbers(data, photos, "--holdout", "0.2", "--out", "sheet.png")
    train, val = found["splits"]["train"], found["splits"]["val"]
    assert found["samples"] == train["samples"] + val["samples"] == 40
    assert train["has"]["text"] + val["has"]["text"] == 36
    patterns = {p: train["patterns"].get(p, 0) + val["patterns"].get(p, 0) for p in ("image+text", "image")}
    assert patterns == {"image+text": 36, "image": 4}
    assert found["fields"]["label"] == {"kind": "text", "samples": 40}
    captions = found["captions"]
    assert captions["train"]["words"] == dict.fromkeys(("least", "5%", "half", "95%", "most"), 5)
    assert captions["train"]["without"] + captions["val"]["without"] == 4
    assert captions["train"]["cut"] == 0
    content = found["content"]
    assert content["formats"] == {"JPEG": 35, "PNG": 5} and content["width"]["most"] == 40
    assert (content["decoded"], content["unreadable"]) == (40, 1) and "03.jpg" in content["examples"]
    assert found["duplicates"]["image"]["extra"] == 1
    assert Image.open("sheet.png").size[0] == 1058


def test_look_lists_unreadable_samples_and_counts_merged_rows(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("01.jpg", "02.jpg", "04.jpg", "05.jpg", "06.jpg", "07.jpg", "09.jpg"):
        (photos / name).write_bytes(b"nothing")
    with (photos / "captions.csv").open("a", encoding="utf-8") as table:
        row = (photos / "captions.csv").read_text().splitlines()[1]
        table.write(f"{row}\n{row}\n")
    found = report(view_of([str(photos)], None, "caption", 0.05), every=True)
    assert found["rows"] == {"read": 42, "merged": 2, "left_out": 0, "absent": 0}
    text = lines(found)
    assert "rows        42 read; 2 merged with another row of the same file" in text
    assert found["content"]["unreadable"] == 8 == sum(line.startswith("            0") for line in text)
    monkeypatch.setattr("descant.data.look._NAMED", 3)
    text = lines(found)
    assert "            and 5 more: --json FILE lists all of them" in text and len(found["content"]["examples"]) == 8


def test_look_finds_duplicates_across_splits(photos: Path, data: Callable[..., Any]) -> None:
    rows = list(csv.DictReader((photos / "captions.csv").open()))
    rows = [{**row, "split": "val" if i in (6, 11) else "train"} for i, row in enumerate(rows)]
    rows[11]["caption"] = "Picture 12 of red dots!"  # except for case and punctuation, a training caption
    write_table(photos, rows)
    found = numbers(data, photos)
    assert found["duplicates"]["image"]["across"] == {"train/val": 1}
    assert found["duplicates"]["image"]["examples"] == [["train: 05.jpg", "val: 06.jpg"]]
    shared = found["echoes"]["val in train"]
    assert (shared["captions"], shared["equal"], shared["near"]) == (2, 1, 0)


def test_look_names_an_image_above_the_pixel_limit_without_a_warning(
    photos: Path, data: Callable[..., Any], recwarn: pytest.WarningsRecorder
) -> None:
    (photos / "00.png").write_bytes(bomb(side=10_000))  # Pillow alone would warn, without the file's name
    result = data("look", photos)
    assert "00.png: 10,000 x 10,000 pixels, more than the limit" in result.out
    assert not [warning for warning in recwarn if warning.category is Image.DecompressionBombWarning]


def test_look_counts_captions_that_the_tokenizer_cuts(photos: Path, data: Callable[..., Any]) -> None:
    tokenizer = {"class_path": "NgramTokenizer", "init_args": {"length": 12}}
    text = {"class_path": "TextField", "init_args": {"tokenizer": tokenizer}}
    image = {"class_path": "ImageField", "init_args": {"size": 16}}
    fields = {"class_path": "Fields", "init_args": {"image": image, "text": text}}
    user_data = {"class_path": "UserData", "init_args": {"path": str(photos), "fields": fields}}
    Path("short.yaml").write_text("# rows of 12\n" + yaml.safe_dump({"data": user_data}))
    found = numbers(data, "--config", "contrastive/own", "--config", "short.yaml")
    assert found["captions"]["train"]["cut_share"] == 1 and found["codec"] == "NgramTokenizer, rows of 12"
    assert found["captions"]["train"]["tokens"]["least"] > 12


def test_shards_and_parquet_give_the_statistics_of_the_folder(photos: Path, data: Callable[..., Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data("make", photos, "--out", "shards")
    rows = list(csv.DictReader((photos / "captions.csv").open()))
    images = [(photos / row["image"]).read_bytes() for row in rows]
    pq.write_table(pa.table({"image": images, "caption": [row["caption"] or None for row in rows]}), "all.parquet")
    folder, shards = numbers(data, photos), numbers(data, "shards/*.tar")
    parquet = numbers(data, "all.parquet")
    assert shards["samples"] == 39 and parquet["samples"] == folder["samples"] == 40
    for found in (shards, parquet):
        assert sum(split["has"]["text"] for split in found["splits"].values()) == (35 if found is shards else 36)
        assert found["duplicates"]["image"]["extra"] == 1
    assert parquet["content"]["formats"] == folder["content"]["formats"]


def test_look_at_a_configuration(data: Callable[..., Any]) -> None:
    found = numbers(data, "--config", "contrastive/emoji", "--data.tiny", "true", "--data.languages=[de]")
    assert list(found["splits"]) == ["train", "val", "vendor", "concept", "both", "apart"]
    train = found["splits"]["train"]
    assert train["patterns"] == {"image+text": train["samples"]}
    assert found["splits"]["concept"]["patterns"].keys() == {"image+text", "image"}
    assert 0 <= found["captions"]["vendor"]["cut_share"] < 1 and found["captions"]["train"]["tokens"]["least"] >= 2


def test_near_captions_have_a_jaccard_similarity_above_the_threshold() -> None:
    rng = np.random.default_rng(0)
    words = [f"w{k}" for k in range(30)]
    ours, theirs = (
        [" ".join(rng.choice(words, rng.integers(3, 12), replace=False)) for _ in range(n)] for n in (60, 200)
    )
    theirs += [" ".join(text.split()[:-1]) for text in ours[:20]]

    def similar(a: str, b: str) -> float:
        x, y = set(a.split()), set(b.split())
        return len(x & y) / len(x | y)

    best = [max(similar(a, b) for b in theirs) for a in ours]
    found = caption_overlap(ours, theirs)
    assert found.equal == sum(value == 1 for value in best)
    assert found.near == sum(0.8 <= value < 1 for value in best) > 0


def test_a_contact_sheet_of_unusual_samples() -> None:
    tiles = [
        Tile(None, "train", "no image at all, and a caption that is much longer than three lines of a tile " * 3),
        Tile(Image.new("RGB", (1, 900)), "val", ""),
        Tile(Image.new("RGB", (3000, 2)), "val", "Ein Wort-das-nicht-aufhört" * 20),
        Tile(Image.new("RGB", (8, 8), "red"), "test", "кошка"),
    ]
    page = sheet(tiles, "a title that is too long for the page " * 10)
    assert page.size[0] == 14 + 4 * 174
    colours = {colour for _, colour in page.getcolors(1 << 20) or []}
    assert (255, 0, 0) in colours


# from the folder to a trained model ----------------------------------------------------------------------------


def test_a_folder_becomes_shards_that_a_fit_reads(
    photos: Path, data: Callable[..., Any], cli: Callable[..., Any]
) -> None:
    data("make", photos, "--out", "shards")
    data("look", "shards")
    place = ("--config", "contrastive/own", "--config", "shards/data.yaml", "--config", "on/cpu")
    small = ("--data.batch_size", "8", "--data.num_workers", "0", "--data.fields.image.size", "32")
    steps = ("--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--trainer.log_every_n_steps", "1")
    result = cli("fit", *place, *small, *steps, "--name", "x", "--trainer.check_val_every_n_epoch", "1")
    assert result.rc == 0, result.err
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["steps"] == 2 and np.isfinite(metrics["train/loss"]) and "val/i2t_r10" in metrics


# wrong requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["lok"], "data lok: no such command; nearest: look"),
        (["make"], "data make: the following arguments are required: FOLDER, --out"),
        (["make", "photo", "--out", "x"], "photo: no such folder; nearest: photos"),
        (
            ["make", "photos", "--out", "x", "--seeed", "1"],
            "data make: --seeed: no such option; nearest: --seed",
        ),
        (["make", "photos", "--out", "x", "--size", "0"], "data make: argument --size: 0 is not above 0"),
        (["make", "photos", "--out", "x", "--holdout", "2"], "data make: argument --holdout: 2 is not a share"),
        (["make", "photos", "--out", "x", "--csv", "caption.csv"], "no such table; nearest: captions.csv"),
        (["make", "photos", "--out", "x", "--caption", "captoin"], "no column 'captoin'; nearest: caption"),
        (["make", "photos", "--out", "x", "--caption", "image"], "--caption image: holds image, not texts"),
        (["look"], "data look: give either a folder, parquet files or shards, or --config NAME"),
        (["look", "photos", "--config", "contrastive/emoji"], "give either a folder"),
        (["look", "photos", "--data.size", "3"], "data look: --data.size: only with --config"),
        (["look", "shard-*.tar"], "shard-*.tar: no such file"),
        (["look", "--config", "contrastive/emojy"], "nearest: contrastive/emoji"),
        (["look", "--config", "contrastive/emoji", "--data.sice", "3"], "nearest: size"),
    ],
)
def test_a_wrong_request_is_one_line(photos: Path, cli: Callable[..., Any], args: list[str], line: str) -> None:
    assert line in cli("data", *args).refusal
    assert not Path("x").exists()


def test_a_folder_in_which_nothing_can_be_read_is_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(b"no picture")
    refusal = cli("data", "make", folder, "--out", "x").refusal
    assert "none of 3 samples can be read" in refusal and not Path("x").exists()


@pytest.mark.parametrize("command", [["data", "--help"], ["data", "make", "--help"], ["data", "look", "--help"]])
def test_help_is_short_and_needs_no_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom descant.__main__ import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert 5 < len(lines) <= 32 and max(map(len, lines)) <= 110


def test_the_named_caption_field_is_used(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for i in range(6):
        (tmp_path / "d" / f"{i}.jpg").write_bytes(image(i))
        (tmp_path / "d" / f"{i}.txt").write_text(f"from text {i}")
        (tmp_path / "d" / f"{i}.json").write_text(json.dumps({"caption": f"from json {i}", "file": "theirs"}))
    make(tmp_path / "d", tmp_path / "out", caption="caption", holdout=0.0)
    for name, held in samples(tmp_path / "out", "train").items():
        texts = json.loads(held["json"])
        assert held["txt"].decode().startswith("from text "), name
        assert texts["json.caption"].startswith("from json ") and texts["file"] == "theirs" and "file_name" in texts


def test_missing_files_of_a_column_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    rows = []
    for i in range(8):
        (tmp_path / "d" / f"{i}.jpg").write_bytes(image(i))
        rows.append({"image": f"{i}.jpg", "other": f"o{i}.jpg", "third": f"t{i}.jpg", "caption": f"number {i}"})
    (tmp_path / "d" / "o0.jpg").write_bytes(image(0))
    (tmp_path / "d" / "t0.jpg").write_bytes(image(0))
    write_table(tmp_path / "d", rows)
    assert make(tmp_path / "d", tmp_path / "out", holdout=0.0).samples("train") == 8


def test_sixteen_bit_grey_images_keep_their_range() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 200 * 200).reshape(200, 200).astype(np.uint16))
    out = io.BytesIO()
    ramp.save(out, "PNG")
    with Image.open(io.BytesIO(out.getvalue())) as opened:
        small = np.asarray(Image.open(io.BytesIO(resize_to_jpeg(opened, 64))))
    assert abs(small.mean() - 127.5) < 2 and small.std() > 60
    assert abs(np.asarray(thumbnail(out.getvalue())).mean() - 127.5) < 2
