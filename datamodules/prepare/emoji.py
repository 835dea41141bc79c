"""Build the emoji pack: one concept per row, drawn by four vendors, named in 28 languages.

    python -m descant.datamodules.prepare emoji [--cache DIR] [--out DIR]

The order of this file is the order of the method: fetch pinned packages, join concepts, draw them, group look-alikes
into families, split by concept, set the lock-box aside, write shards, train the tokenizer, write `pack.json`. Running
it twice with the same tools (`pack.json` lists their versions) gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from descant.datamodules.prepare.emoji_families import bare, code_key, name_key
from descant.datamodules.prepare.grouping import connected_groups
from descant.datamodules.prepare.npm import Package, fetch_package, read_package
from descant.modules.io.files import sha256_of

PACK_DIR = Path(__file__).resolve().parent.parent / "packs" / "emoji"
OUT = PACK_DIR
VERSION = 1
VENDORS = ("noto", "twemoji", "openmoji", "fluent")
HELD_OUT_VENDOR = "fluent"
HELD_OUT_LANGUAGE = "pt"
SIDE = 64

SALT = "descant-emoji-v1"
TEST_CONCEPTS = 200
SHARDS = 4

#: The lock-box: concepts of training and drawings by one more vendor, which only claims at their effect stage read.
SEALED_VENDOR = "emojione"
SEALED_SALT = "descant-emoji-sealed-v1"
SEALED_CONCEPTS = 100
SEALED = "sealed.parquet"

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")
VOCABULARY = 8192
# Most experiments read English; repeated this often, its words win merges over 26 other languages.
ENGLISH_REPEATS = 8

PACKAGES = {
    "noto": Package(
        "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
    ),
    "twemoji": Package(
        "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
    ),
    "openmoji": Package("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68"),
    "fluent": Package(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"
    ),
    "emojione": Package(
        "@iconify-json/emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"
    ),
    "text": Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
}


@dataclass
class Concept:
    """One emoji as Unicode lists it, without skin tones."""

    hexcode: str
    emoji: str
    group: str
    subgroup: str
    names: dict[str, str | None]
    keywords: dict[str, list[str]]
    images: dict[str, bytes] = field(default_factory=dict)
    pixels: dict[str, str] = field(default_factory=dict)
    family: str = ""
    split: str = "train"


# 1. Concepts: what CLDR calls one emoji, without flags, components and skin tones.


def without_name(keywords: Iterable[str], name: str) -> list[str]:
    """Keep a keyword only if it has a word that the name lacks: the two texts must differ in content."""
    name_words = set(re.findall(r"\w+", name.casefold()))
    return [keyword for keyword in keywords if not set(re.findall(r"\w+", keyword.casefold())) <= name_words]


def read_concepts(text: dict[str, bytes]) -> list[Concept]:
    """Join the locales by hexcode. Skin tones are nested under their base, so they are left out."""
    keys = json.loads(text["meta/groups.json"])
    locales = {path.split("/")[0]: json.loads(text[path]) for path in text if path.endswith("/data.json")}
    by_locale = {lang: {row["hexcode"]: row for row in rows} for lang, rows in sorted(locales.items())}
    concepts = []
    for row in locales["en"]:
        group = keys["groups"].get(str(row.get("group")))
        if group in (None, "component", "flags"):
            continue
        subgroup = keys["subgroups"][str(row["subgroup"])]
        concept = Concept(row["hexcode"], row["emoji"], group, subgroup, {}, {})
        for lang, rows in by_locale.items():
            entry = rows.get(row["hexcode"], {})
            name = entry.get("label") or None
            concept.names[lang] = name
            concept.keywords[lang] = without_name(entry.get("tags") or [], name or "")
        concepts.append(concept)
    return sorted(concepts, key=lambda concept: concept.hexcode)


# 2. Drawings: each vendor becomes a table from bare hexcode to a 64-pixel RGBA image.


def draw_svg(svg: str) -> Image.Image:
    """Rasterise without system libraries or system fonts, so every machine draws the same pixels."""
    try:
        import resvg_py
    except ImportError:
        raise ValueError('SVG needs resvg-py: pip install "descant[prepare]"') from None
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, skip_system_fonts=True))
    return Image.open(io.BytesIO(png))


def read_datasource(tarball: Path, vendor: str) -> dict[str, Image.Image]:
    """Read an emoji-datasource package (there are two), whose PNGs are 64 px already."""
    folder = f"img/{vendor}/{SIDE}/"
    content = read_package(tarball, lambda path: path == "emoji.json" or path.startswith(folder))
    return {
        bare(row["unified"]): Image.open(io.BytesIO(content[folder + row["image"]]))
        for row in json.loads(content["emoji.json"])
        if row[f"has_img_{vendor}"] and folder + row["image"] in content
    }


def read_openmoji(tarball: Path, wanted: set[str]) -> dict[str, Image.Image]:
    folder = "color/svg/"
    content = read_package(tarball, lambda path: path.startswith(folder) and bare(Path(path).stem) in wanted)
    return {bare(Path(path).stem): draw_svg(body.decode()) for path, body in content.items()}


def read_fluent(tarball: Path, wanted: set[str]) -> dict[str, Image.Image]:
    """Draw the icons of a set that keeps SVG bodies by name, and the name of each code."""
    icons, chars = read_icons(tarball)
    return {
        code: draw_icon(icons, chars[code]) for code in sorted(wanted & chars.keys()) if chars[code] in icons["icons"]
    }


def read_emojione(tarball: Path, concepts: Iterable[Concept]) -> dict[str, Image.Image]:
    """Draw the icons of a set without codes: its names are the English ones of the concepts, as "grinning-face"."""
    icons, _ = read_icons(tarball)
    named = {
        concept.hexcode: re.sub(r"[^a-z0-9]+", "-", (concept.names["en"] or "").casefold()) for concept in concepts
    }
    return {bare(code): draw_icon(icons, name) for code, name in named.items() if name in icons["icons"]}


def read_icons(tarball: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read an icon set: the frame and the SVG bodies of its icons, and bare code -> name of an icon."""
    content = read_package(tarball, lambda path: path in ("icons.json", "chars.json"))
    chars = json.loads(content["chars.json"])
    return json.loads(content["icons.json"]), {bare(code): name for code, name in dict(chars).items()}


def draw_icon(icons: dict[str, Any], name: str) -> Image.Image:
    """Draw an icon, and add the frame that its SVG body lacks."""
    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    view = f'viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}"'
    return draw_svg(f'<svg xmlns="http://www.w3.org/2000/svg" {view}>{icon["body"]}</svg>')


def encode(image: Image.Image) -> bytes:
    """Encode as lossless WebP; method 4 is twenty times faster than method 6 and 4 % larger.

    WebP drops an alpha channel that is opaque everywhere, so readers ask for RGBA when they decode.
    """
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=100, method=4, exact=False)
    return buffer.getvalue()


def pixel_hash(image: Image.Image) -> str | None:
    """Hash the visible pixels, or return None for a blank image: colour under full transparency does not count."""
    if image.getchannel("A").getextrema()[1] == 0:
        return None
    visible = Image.new("RGBA", image.size)
    visible.paste(image, mask=image.getchannel("A").point(lambda alpha: 255 if alpha else 0))
    return hashlib.sha256(visible.tobytes()).hexdigest()


def attach_images(concepts: list[Concept], drawings: dict[str, dict[str, Image.Image]]) -> list[Concept]:
    """Keep the concepts that all four vendors draw, and drop those that any vendor leaves blank."""
    complete = []
    for concept in concepts:
        code = bare(concept.hexcode)
        if not all(code in drawings[vendor] for vendor in VENDORS):
            continue
        for vendor in VENDORS:
            image = drawings[vendor][code].convert("RGBA")
            pixels = pixel_hash(image)
            if image.size == (SIDE, SIDE) and pixels is not None:
                concept.images[vendor], concept.pixels[vendor] = encode(image), pixels
        if len(concept.images) == len(VENDORS):
            complete.append(concept)
    return complete


# 3. Families: concepts so alike that seeing one in training would answer the other in the test.


def twin_keys(concept: Concept) -> list[tuple[str, str]]:
    """Return keys of the exact pixels, in any vendor: two names for one image."""
    return list(concept.pixels.items())


def family_keys(concept: Concept) -> list[tuple[str, str]]:
    """Return keys of pixels, code and name, without gender, colour, size, state and direction: look-alikes."""
    name = concept.names["en"] or concept.hexcode
    return [("code", code_key(concept.hexcode)), ("name", name_key(name)), *twin_keys(concept)]


def group_by(
    concepts: Sequence[Concept], keys: Callable[[Concept], list[tuple[str, str]]] = family_keys
) -> list[list[Concept]]:
    """Group concepts that share a key, directly or through others."""
    return [[concepts[n] for n in group] for group in connected_groups([keys(concept) for concept in concepts])]


# 4. Split: concepts in the order of a salted hash, until exactly 200 are held out; concepts that share an image stay
# together. A held-out concept may have relatives in training (a woman runs, a man runs). Its family is stored, so that
# concepts without relatives can be evaluated separately.


def split_groups(groups: Sequence[list[Concept]], test_concepts: int = TEST_CONCEPTS) -> None:
    """Mark the test side. A group that would overshoot is skipped, never cut."""
    for concept in held_out(groups, test_concepts, SALT):
        concept.split = "test"


def held_out(groups: Sequence[list[Concept]], number: int, salt: str) -> list[Concept]:
    """Select ``number`` concepts in whole groups by a salted hash."""

    def rank(group: list[Concept]) -> str:
        return hashlib.sha256(f"{salt}:{group[0].hexcode}".encode()).hexdigest()

    chosen: list[Concept] = []
    for group in sorted(groups, key=rank):
        chosen += group if len(chosen) + len(group) <= number else []
    if len(chosen) < number:
        raise ValueError(f"no set of whole groups holds {number} concepts: {number - len(chosen)} are missing")
    return chosen


# The lock-box: concepts that share an image with one in it are in it too, and the further vendor draws all of them.


def write_sealed(concepts: Sequence[Concept], drawings: dict[str, Image.Image], out: Path) -> Path:
    """Write a row per concept that the sealed vendor draws: its drawing, and whether the concept is in the lock-box."""
    images = {}
    for concept in concepts:
        image = drawings[code].convert("RGBA") if (code := bare(concept.hexcode)) in drawings else None
        if image is not None and image.size == (SIDE, SIDE) and pixel_hash(image) is not None:
            images[concept.hexcode] = encode(image)
    groups = group_by([concept for concept in concepts if concept.split == "train"], twin_keys)
    drawn = [group for group in groups if all(concept.hexcode in images for concept in group)]
    sealed = {concept.hexcode for concept in held_out(drawn, SEALED_CONCEPTS, SEALED_SALT)}
    schema = pa.schema([("hexcode", pa.string()), ("sealed", pa.bool_()), (SEALED_VENDOR, pa.binary())])
    rows = [{"hexcode": code, "sealed": code in sealed, SEALED_VENDOR: image} for code, image in images.items()]
    pq.write_table(
        pa.Table.from_pylist(rows, schema=schema),
        out / SEALED,
        **WRITING,
        use_dictionary=False,
        row_group_size=len(rows),
    )
    return out / SEALED


# 5. Shards: the settings are all fixed here, because a changed default would change the bytes.

WRITING: dict[str, Any] = {
    "version": "2.6",
    "data_page_version": "1.0",
    "compression": "zstd",
    "compression_level": 19,
    "write_statistics": False,
}


def pack_schema(languages: Sequence[str]) -> Any:
    return pa.schema(
        [(name, pa.string()) for name in ("hexcode", "emoji", "group", "subgroup", "family", "split")]
        + [(vendor, pa.binary()) for vendor in VENDORS]
        + [
            ("names", pa.struct([(lang, pa.string()) for lang in languages])),
            ("keywords", pa.struct([(lang, pa.list_(pa.string())) for lang in languages])),
        ]
    )


def write_shards(concepts: Sequence[Concept], out: Path) -> list[Path]:
    """Write the concepts in equal contiguous runs, so that reading the shards in order keeps the sorting."""
    for stale in out.glob("emoji-*.parquet"):
        stale.unlink()
    schema = pack_schema(list(concepts[0].names))
    step = -(-len(concepts) // SHARDS)
    names = ("hexcode", "emoji", "group", "subgroup", "family", "split", "names", "keywords")
    every, paths = [{name: getattr(concept, name) for name in names} | concept.images for concept in concepts], []
    for shard in range(SHARDS):
        rows = every[shard * step : (shard + 1) * step]
        path = out / f"emoji-{shard}.parquet"
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema),
            path,
            **WRITING,
            use_dictionary=["group", "subgroup", "family", "split"],
            row_group_size=step,
        )
        paths.append(path)
    return paths


def read_pack(pack: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of all shards, in order."""
    shards = sorted(pack.glob("emoji-*.parquet"), key=lambda path: int(path.stem.split("-")[1]))
    chosen = list(columns) if columns else None
    return [row for shard in shards for row in pq.read_table(shard, columns=chosen).to_pylist()]


# 6. Tokenizer: trained on texts that a training run may see, so the held-out language and concepts stay unseen.


def training_lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Yield names and keywords of the training concepts in all languages except the held-out one."""
    for row in rows:
        if row["split"] != "train":
            continue
        for lang, name in row["names"].items():
            if lang == HELD_OUT_LANGUAGE:
                continue
            lines = [line for line in (name, *(row["keywords"][lang] or ())) if line]
            yield from lines * (ENGLISH_REPEATS if lang == "en" else 1)


def train_tokenizer(lines: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE, which knows every script; its prefix space gives a word one id, first or later."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


# 7. The manifest: what the pack is, where it came from, and hashes that show whether it is intact.


def manifest(concepts: Sequence[Concept], families: int, files: Sequence[Path]) -> dict[str, Any]:
    splits = Counter(concept.split for concept in concepts)
    return {
        "version": VERSION,
        "vendors": list(VENDORS),
        "languages": list(concepts[0].names),
        "held_out_language": HELD_OUT_LANGUAGE,
        "held_out_vendor": HELD_OUT_VENDOR,
        "sealed": {"vendor": SEALED_VENDOR, "concepts": SEALED_CONCEPTS, "salt": SEALED_SALT},
        "image": {"side": SIDE, "mode": "RGBA", "format": "lossless WebP"},
        "counts": {"concepts": len(concepts), "train": splits["train"], "test": splits["test"], "families": families},
        "split_salt": SALT,
        "sources": {
            package.name: {"version": package.version, "sha256": package.sha256} for package in PACKAGES.values()
        },
        "tools": {name: installed_version(name) for name in ("pillow", "pyarrow", "resvg-py", "tokenizers")},
        "files": {path.name: sha256_of(path) for path in files},
    }


def build(cache: Path, out: Path) -> str:
    """Build the pack from scratch; return one line on what was written."""
    tarballs = {role: fetch_package(package, cache) for role, package in PACKAGES.items()}
    text = read_package(tarballs["text"], re.compile(r"meta/groups\.json|[\w-]+/data\.json").fullmatch)
    concepts = read_concepts(text)
    wanted = {bare(concept.hexcode) for concept in concepts}
    drawings = {
        "noto": read_datasource(tarballs["noto"], "google"),
        "twemoji": read_datasource(tarballs["twemoji"], "twitter"),
        "openmoji": read_openmoji(tarballs["openmoji"], wanted),
        "fluent": read_fluent(tarballs["fluent"], wanted),
    }
    concepts = attach_images(concepts, drawings)
    families = group_by(concepts)
    for family in families:
        for concept in family:
            concept.family = family[0].hexcode
    split_groups(group_by(concepts, twin_keys))

    out.mkdir(parents=True, exist_ok=True)
    shards = write_shards(concepts, out)
    sealed = write_sealed(concepts, read_emojione(tarballs[SEALED_VENDOR], concepts), out)
    tokenizer = train_tokenizer(training_lines(read_pack(out, ["split", "names", "keywords"])))
    tokenizer_path = out / "tokenizer.json"
    tokenizer_path.write_text(tokenizer.to_str(), encoding="utf-8")
    facts = manifest(concepts, len(families), [*shards, sealed, tokenizer_path])
    (out / "pack.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    notice = PACK_DIR / "NOTICE.md"
    if notice.is_file() and out.resolve() != PACK_DIR:
        shutil.copyfile(notice, out / "NOTICE.md")  # the licences ask that the attribution travels with the images
    return f"emoji pack: {facts['counts']} in {len(facts['languages'])} languages -> {out}"


if __name__ == "__main__":
    from descant.datamodules.prepare.__main__ import main

    main(["emoji", *sys.argv[1:]])
