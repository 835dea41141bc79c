"""The committed emoji pack keeps its promises; nothing here touches the network."""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tokenizers import Tokenizer

from descant.datamodules.prepare import emoji
from descant.datamodules.prepare.npm import Package, fetch_package, read_package
from descant.datamodules.prepare.package import sha256_of

Facts = dict[str, Any]
Rows = list[dict[str, Any]]
Images = dict[tuple[str, str], Image.Image]


@pytest.fixture(scope="module")
def facts() -> Facts:
    return json.loads((emoji.PACK_DIR / "pack.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows() -> Rows:
    return emoji.read_pack(emoji.PACK_DIR)


@pytest.fixture(scope="module")
def images(rows: Rows) -> Images:
    """(hexcode, vendor) -> the decoded image; WebP forgets an alpha channel that is opaque everywhere."""
    return {
        (row["hexcode"], vendor): Image.open(io.BytesIO(row[vendor]), formats=["WEBP"]).convert("RGBA")
        for row in rows
        for vendor in emoji.VENDORS
    }


@pytest.fixture(scope="module")
def hashes(images: Images) -> dict[tuple[str, str], str | None]:
    return {at: emoji.pixel_hash(image) for at, image in images.items()}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(emoji.PACK_DIR / "tokenizer.json"))


def as_concept(row: dict[str, Any], pixels: dict[str, str | None]) -> emoji.Concept:
    concept = emoji.Concept(row["hexcode"], "", "", "", row["names"], {}, split=row["split"])
    concept.pixels.update({vendor: seen for vendor, seen in pixels.items() if seen is not None})
    return concept


def test_files_are_intact_and_small(facts: Facts) -> None:
    for name, sha256 in facts["files"].items():
        assert sha256_of(emoji.PACK_DIR / name) == sha256, name
    assert sum(path.stat().st_size for path in emoji.PACK_DIR.iterdir()) <= 16 * 2**20


def test_manifest_agrees_with_script_and_rows(facts: Facts, rows: Rows) -> None:
    assert facts["sources"] == {p.name: {"version": p.version, "sha256": p.sha256} for p in emoji.PACKAGES.values()}
    splits = [row["split"] for row in rows]
    assert splits.count("test") == facts["counts"]["test"] == 200
    assert splits.count("train") == facts["counts"]["train"]
    assert len(rows) == facts["counts"]["concepts"] > 1500


def test_rows_are_sorted_concepts_without_flags_and_skin_tones(rows: Rows) -> None:
    codes = [row["hexcode"] for row in rows]
    assert codes == sorted(set(codes))
    tones = {f"1F3F{digit}" for digit in "BCDEF"}
    assert not any(tones & set(code.split("-")) for code in codes)
    assert not any(row["group"] in ("flags", "component") or "flag" in row["subgroup"] for row in rows)


def test_languages(facts: Facts, rows: Rows) -> None:
    languages = list(rows[0]["names"])
    assert languages == facts["languages"] and len(languages) >= 25
    assert facts["held_out_language"] in languages and facts["held_out_vendor"] in emoji.VENDORS
    assert all(row["names"]["en"] for row in rows)
    for row in rows:
        for lang in languages:
            # A keyword that only repeats the name would make "keywords to name" a copying task.
            assert row["keywords"][lang] == emoji.without_name(row["keywords"][lang], row["names"][lang] or "")


def test_images_are_64_px_and_differ_between_vendors(
    images: Images, hashes: dict[tuple[str, str], str | None], rows: Rows
) -> None:
    for image in images.values():
        assert (image.mode, image.size) == ("RGBA", (emoji.SIDE, emoji.SIDE)) == ("RGBA", (64, 64))
    for row in rows:
        seen = {hashes[row["hexcode"], vendor] for vendor in emoji.VENDORS}
        assert len(seen) == len(emoji.VENDORS) and None not in seen, row["hexcode"]


def test_equal_images_are_on_one_side_and_the_split_rebuilds(
    facts: Facts, hashes: dict[tuple[str, str], str | None], rows: Rows
) -> None:
    concepts = [as_concept(row, {v: hashes[row["hexcode"], v] for v in emoji.VENDORS}) for row in rows]
    families = emoji.group_by(concepts)
    assert len(families) == facts["counts"]["families"]
    assert [
        {row["family"] for row in rows if row["hexcode"] in {c.hexcode for c in family}} for family in families
    ] == [{family[0].hexcode} for family in families]
    twins = emoji.group_by(concepts, emoji.twin_keys)
    assert len(families) < len(twins) < len(concepts)
    assert all(len({concept.split for concept in group}) == 1 for group in twins)
    committed = [concept.split for concept in concepts]
    for concept in concepts:
        concept.split = "train"
    emoji.split_groups(twins)
    assert [concept.split for concept in concepts] == committed


def test_the_lock_box_holds_training_concepts_whole_and_by_a_vendor_of_its_own(
    facts: Facts, hashes: dict[tuple[str, str], str | None], rows: Rows
) -> None:
    box = pq.read_table(emoji.PACK_DIR / emoji.SEALED).to_pylist()
    sealed, drawn = {row["hexcode"] for row in box if row["sealed"]}, {row["hexcode"] for row in box}
    assert len(sealed) == facts["sealed"]["concepts"] == 100 and facts["sealed"]["vendor"] not in emoji.VENDORS
    assert sealed <= {row["hexcode"] for row in rows if row["split"] == "train"} and len(drawn) > 1000
    concepts = [as_concept(row, {v: hashes[row["hexcode"], v] for v in emoji.VENDORS}) for row in rows]
    twins = emoji.group_by([concept for concept in concepts if concept.split == "train"], emoji.twin_keys)
    assert all(len({concept.hexcode in sealed for concept in group}) == 1 for group in twins)
    groups = [group for group in twins if all(concept.hexcode in drawn for concept in group)]
    chosen = emoji.held_out(groups, emoji.SEALED_CONCEPTS, emoji.SEALED_SALT)
    assert {concept.hexcode for concept in chosen} == sealed
    for row in box:
        image = Image.open(io.BytesIO(row[emoji.SEALED_VENDOR]), formats=["WEBP"]).convert("RGBA")
        seen = emoji.pixel_hash(image)
        assert image.size == (64, 64) and seen not in {None, *(hashes[row["hexcode"], v] for v in emoji.VENDORS)}


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("1F3C3", "person running"), ("1F3C3-200D-2642-FE0F", "man running")),
        (("1F468-200D-1F692", "man firefighter"), ("1F9D1-200D-1F692", "firefighter")),
        (("1F550", "one o\N{RIGHT SINGLE QUOTATION MARK}clock"), ("1F55C", "one-thirty")),
        (("1F311", "new moon"), ("1F31D", "full moon face")),
        (("1F499", "blue heart"), ("2764", "red heart")),
        (("1F43B", "bear"), ("1F43B-200D-2744-FE0F", "polar bear")),
        (("1F385", "Santa Claus"), ("1F9D1-200D-1F384", "Mx Claus")),
    ],
)
def test_look_alikes_are_one_family(left: tuple[str, str], right: tuple[str, str]) -> None:
    pair = [emoji.Concept(code, "", "", "", {"en": name}, {"en": []}) for code, name in (left, right)]
    assert len(emoji.group_by(pair)) == 1


def test_a_role_keeps_its_meaning() -> None:
    roles = (("1F468-200D-1F692", "man firefighter"), ("1F468-200D-1F680", "man astronaut"))
    pair = [emoji.Concept(code, "", "", "", {"en": name}, {"en": []}) for code, name in roles]
    assert len(emoji.group_by(pair)) == 2


def test_tokenizer_round_trip_and_whole_words(rows: Rows, tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in emoji.SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert tokenizer.get_vocab_size() == emoji.VOCABULARY
    for row in rows[::10]:
        for name in row["names"].values():
            # The byte-level prefix space comes back in front of the text.
            assert tokenizer.decode(tokenizer.encode(name).ids) == " " + tokenizer.normalizer.normalize_str(name)
    first, later = tokenizer.encode("Cat").ids, tokenizer.encode("black cat").ids
    assert first == later[-1:]
    text = (line for row in rows if row["split"] == "train" for line in (row["names"]["en"], *row["keywords"]["en"]))
    words = Counter(word for line in text for word in re.findall(r"[a-z]+", line.casefold()))
    frequent = [word for word, count in words.items() if count >= 3]
    single = sum(len(tokenizer.encode(word, add_special_tokens=False).ids) == 1 for word in frequent)
    assert single >= 0.9 * len(frequent)


@pytest.mark.slow
def test_tokenizer_saw_only_training_text(rows: Rows) -> None:
    """Trained again on training rows without the held-out language, it is the committed one byte for byte."""
    allowed = [
        {
            "split": "train",
            "names": {lang: name for lang, name in row["names"].items() if lang != "pt"},
            "keywords": {lang: words for lang, words in row["keywords"].items() if lang != "pt"},
        }
        for row in rows
        if row["split"] == "train"
    ]
    again = emoji.train_tokenizer(emoji.training_lines(allowed))
    assert again.to_str() == (emoji.PACK_DIR / "tokenizer.json").read_text(encoding="utf-8")


def tarball_with(path: Path, *names: str, size: int = 1) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(bytes(size)))
    return path


def refusal(path: Path, **bounds: int) -> str:
    with pytest.raises(ValueError) as caught:
        read_package(path, lambda name: True, **bounds)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_read_package_reads_what_is_wanted(tmp_path: Path) -> None:
    path = tarball_with(tmp_path / "a.tgz", "package/one", "package/two")
    assert read_package(path, lambda name: name == "two") == {"two": b"\0"}


def test_read_package_refuses_hostile_archives(tmp_path: Path) -> None:
    assert "outside" in refusal(tarball_with(tmp_path / "up.tgz", "package/../../evil"))
    assert "refused member" in refusal(tarball_with(tmp_path / "root.tgz", "/etc/evil"))
    many = tarball_with(tmp_path / "many.tgz", *(f"package/{index}" for index in range(5)))
    assert "more than 4 members" in refusal(many, max_members=4)
    big = tarball_with(tmp_path / "big.tgz", "package/big", size=1000)
    assert "more than 999 bytes" in refusal(big, max_decoded_bytes=999)
    (tmp_path / "broken.tgz").write_bytes(b"no archive")
    assert "unreadable" in refusal(tmp_path / "broken.tgz")


def test_read_package_refuses_links(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "link.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/link")
        member.type, member.linkname = tarfile.SYMTYPE, "inside"
        archive.addfile(member)
    assert "refused member" in refusal(tmp_path / "link.tgz")


def test_fetch_trusts_the_hash_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tarball_with(tmp_path / "thing-1.0.tgz", "package/one")
    good = Package("thing", "1.0", sha256_of(path))
    assert fetch_package(good, tmp_path) == path

    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="npm is needed"):
        fetch_package(Package("thing", "1.0", "0" * 64), tmp_path)


def test_split_never_cuts_a_group() -> None:
    def family(size: int, tag: str) -> list[emoji.Concept]:
        return [emoji.Concept(f"{tag}{index}", "", "", "", {"en": ""}, {}) for index in range(size)]

    families = [family(3, "A"), family(3, "B"), family(1, "C")]
    emoji.split_groups(families, test_concepts=4)
    assert all(len({concept.split for concept in one}) == 1 for one in families)
    assert sum(concept.split == "test" for one in families for concept in one) == 4
    with pytest.raises(ValueError, match="whole groups"):
        emoji.split_groups([family(3, "A")], test_concepts=2)
