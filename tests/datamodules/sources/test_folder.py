from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from descant.datamodules.sources import find
from descant.datamodules.sources.folder import Folder
from tests.files import jpeg, shapes, wav


def table(folder: Path, text: str, name: str = "captions.csv", images: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        (folder / f"{i}.jpg").write_bytes(jpeg(size=(10 + i, 10)))
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_a_csv_gives_files_and_texts(tmp_path: Path) -> None:
    text = '\ufeffimage,caption,split,lang\n0.jpg,"a, b",train,en\n1.jpg, ,val,\n2.jpg,"two\nlines",,de\n'
    source = Folder(table(tmp_path, text))
    assert source.fields == ("image", "caption", "split", "lang")
    assert source.has("caption").tolist() == [True, False, True], "a blank caption is none"
    assert source.read(0, ["image", "caption"]) == {"image": jpeg(size=(10, 10)), "caption": "a, b"}
    assert source.read(1, ["image", "caption"]).keys() == {"image"}
    assert source.texts("split") == ["train", "val", None] and source.texts("caption")[2] == "two\nlines"
    assert [source.name(i) for i in range(3)] == ["0.jpg", "1.jpg", "2.jpg"]
    assert source.place(1) == str(tmp_path / "1.jpg")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "file_name\ttext\n0.jpg\tone\n1.jpg\ttwo\n"),
        ("a.csv", "file_name;text\n0.jpg;one\n1.jpg;two\n"),
        ("a.jsonl", '{"file_name": "0.jpg", "text": "one"}\n\n{"file_name": "1.jpg", "text": "two"}\n'),
    ],
)
def test_other_tables(tmp_path: Path, name: str, text: str) -> None:
    source = Folder(table(tmp_path, text, name))
    assert source.texts("text") == ["one", "two"] and source.read(1, ["file_name"])["file_name"] == jpeg(size=(11, 10))


def test_rows_of_one_image_are_one_sample(tmp_path: Path) -> None:
    text = "image,caption,split\n0.jpg,a,train\n1.jpg,b,val\n0.jpg,c,train\n0.jpg,a,train\n2.jpg,,val\n"
    source = Folder(table(tmp_path, text))
    assert len(source) == 3 and source.fields == ("image", "caption.0", "caption.1", "split")
    assert source.read(0, source.fields[1:]) == {"caption.0": "a", "caption.1": "c", "split": "train"}
    assert source.has("caption.0").tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"0\.jpg is in several splits"):
        Folder(table(tmp_path, "image,split\n0.jpg,train\n0.jpg,val\n"))


def test_recordings_and_images_by_column(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0.wav").write_bytes(wav())
    source = Folder(table(tmp_path, "image,speech,caption\n0.jpg,s/0.wav,a\n1.jpg,,b\n"))
    assert source.files == ("image", "speech")
    assert source.read(0, ["speech"]) == {"speech": wav()} and source.has("speech").tolist() == [True, False]


def test_a_text_file_beside_each_image(tmp_path: Path) -> None:
    for place in ("train/cats", "val/dogs"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(2):
            (tmp_path / place / f"{i}.jpg").write_bytes(jpeg())
            (tmp_path / place / f"{i}.txt").write_text(f"{place} {i}\n" if i else "  \n")
    (tmp_path / "train" / "cats" / "1.json").write_text(json.dumps({"title": "one", "tags": ["x", "y"]}))
    (tmp_path / "README.txt").write_text("hello")
    (tmp_path / "train" / ".hidden.jpg").write_bytes(b"")
    source = Folder(tmp_path)
    assert [source.name(i) for i in range(len(source))] == [
        *("train/cats/0.jpg", "train/cats/1.jpg", "val/dogs/0.jpg", "val/dogs/1.jpg")
    ]
    assert source.texts("caption") == [None, "train/cats 1", None, "val/dogs 1"]
    assert source.texts("folder") == ["cats", "cats", "dogs", "dogs"]
    assert source.texts("split") == ["train", "train", "val", "val"]
    assert source.texts("json.tags.1") == [None, "y", None, None]


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    shapes(tmp_path / "photos", 2)
    for call, line in [
        (lambda: Folder(tmp_path / "photo"), "photo: no such folder; nearest: photos"),
        (lambda: Folder(tmp_path / "photos", "caption.csv"), "no such table; nearest: captions.csv"),
        (lambda: Folder(table(tmp_path / "a", "caption,n\na,1\n")), "no column holds names of files.*caption, n"),
        (lambda: Folder(table(tmp_path / "b", "image,caption\n9.jpg,a\n")), "column image: there is no 9.jpg in"),
        (lambda: Folder(table(tmp_path / "c", "image,caption\n0.jpg,a,b\n")), "line 2 has 3 cells, the header 2"),
        (lambda: Folder(table(tmp_path / "d", "image,image\n0.jpg,a\n")), "names the columns, each once; it has"),
        (lambda: Folder(table(tmp_path / "e", "image\n")), "no rows below the header"),
        (lambda: Folder(table(tmp_path / "f", "{bad\n", "x.jsonl")), "line 1: not JSON"),
        (lambda: Folder(table(tmp_path / "g", "image,url\nhttp://x/0.jpg,http://x/0.jpg\n")), "no column holds names"),
        (lambda: Folder(table(tmp_path / "h", "", "x.csv", images=0)), "the first line names the columns"),
        (lambda: Folder(tmp_path / "photos").has("captoin"), "no column 'captoin'; nearest: caption"),
        (lambda: Folder(tmp_path), "no image and no recording here|two files"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            call()
            (tmp_path / "photos" / "000.png").write_bytes(jpeg(format="PNG"))
            (tmp_path / "photos" / "captions.csv").unlink()
            Folder(tmp_path / "photos")
        assert "\n" not in str(caught.value)
    (tmp_path / "photos" / "other.csv").write_text("image,caption\n000.jpg,a\n")
    shapes(tmp_path / "two", 1)
    (tmp_path / "two" / "metadata.csv").write_text("image,caption\n000.jpg,a\n")
    with pytest.raises(ValueError, match=r"captions\.csv, metadata\.csv: several tables"):
        Folder(tmp_path / "two")
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "x.csv").write_bytes(b"image,caption\n0.jpg,\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        Folder(tmp_path / "bytes")


def test_a_hubs_folders_with_a_table_each(tmp_path: Path) -> None:
    """The layout of Hugging Face's imagefolder: names are relative to the table, and folders are splits."""
    for split, text in {
        "train": '{"file_name": "000.jpg", "text": "a"}\n{"file_name": "001.jpg", "text": "b"}\n',
        "validation": '{"file_name": "000.jpg", "text": "c", "more": "m"}\n',
    }.items():
        shapes(tmp_path / "hub" / split, 2)
        (tmp_path / "hub" / split / "captions.csv").unlink()
        (tmp_path / "hub" / split / "metadata.jsonl").write_text(text)
    source = Folder(tmp_path / "hub")
    assert [source.name(i) for i in range(len(source))] == ["train/000.jpg", "train/001.jpg", "validation/000.jpg"]
    assert source.texts("split") == ["train", "train", "val"] and source.texts("text") == ["a", "b", "c"]
    assert source.texts("more") == [None, None, "m"] and source.files == ("file_name",) and not source.faults
    assert source.read(2, ["file_name"])["file_name"] == (tmp_path / "hub/validation/000.jpg").read_bytes()
    # another column of files, in a CSV; and a folder that its table left behind
    shapes(tmp_path / "hub" / "test", 1)
    (tmp_path / "hub" / "test" / "captions.csv").rename(tmp_path / "hub" / "test" / "metadata.csv")
    shapes(tmp_path / "hub" / "new", 3)
    source = Folder(tmp_path / "hub")
    assert source.name(0) == "test/000.jpg" and len(source) == 4
    (fault,) = source.faults
    assert fault.sample == "new" and fault.why == "3 files in a folder without a table, which test has"
    (tmp_path / "hub" / "train" / "metadata.csv").write_text("file_name,text\n000.jpg,a\n")
    with pytest.raises(ValueError, match=r"metadata\.csv and metadata\.jsonl: two tables of one folder"):
        Folder(tmp_path / "hub")
    (tmp_path / "hub" / "train" / "metadata.csv").write_text("file_name,text\n../test/000.jpg,a\n")
    (tmp_path / "hub" / "train" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="outside the data's own folder"):
        Folder(tmp_path / "hub")


def test_a_missing_file_and_a_named_pipe_are_errors_of_that_sample(tmp_path: Path) -> None:
    source = Folder(table(tmp_path, "image,caption\n0.jpg,a\n7.jpg,b\np.jpg,c\n"))
    os.mkfifo(tmp_path / "p.jpg")
    with pytest.raises(OSError, match=r"7\.jpg"):
        source.read(1, ["image"])
    with pytest.raises(ValueError, match="not a regular file"):
        source.read(2, ["image"])
    assert source.read(1, ["caption"]) == {"caption": "b"}


def test_find_knows_a_folder_and_its_table(tmp_path: Path) -> None:
    shapes(tmp_path / "photos", 4)
    for path in (tmp_path / "photos", str(tmp_path / "photos" / "captions.csv")):
        source = find(path)[""]
        assert isinstance(source, Folder) and len(source) == 4
    with pytest.raises(ValueError, match=r"photo: no such file or folder; nearest: photos"):
        find(tmp_path / "photo")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.zip: data is a folder, or files that end in \.csv"):
        find(tmp_path / "x.zip")


def test_rows_of_a_table_alone_are_samples(tmp_path: Path) -> None:
    source = Folder(table(tmp_path / "a", "smiles,logp\nCCO,-0.1\nC,\nCCO,-0.1\n", images=0))
    assert [source.name(i) for i in range(len(source))] == ["captions.csv#0", "captions.csv#1", "captions.csv#2"]
    assert source.read(0, ["smiles", "logp"]) == {"smiles": "CCO", "logp": "-0.1"} and source.merged == 0
    assert source.has("logp").tolist() == [True, False, True] and source.file_of(0, "logp") == source.place(0)
    changed = Folder(table(tmp_path / "b", "smiles,logp\nCCO,-0.1\nC,\nCCO,-0.2\n", images=0))
    digests = [one.corpus().parts["texts of logp"].state()["digest"] for one in (source, changed)]
    assert digests[0] != digests[1]
    sample = tmp_path / "c" / "inner"
    sample.mkdir(parents=True)
    (sample / "0.jpg").write_bytes(jpeg())
    with pytest.raises(ValueError, match="no column holds names of files"):  # images that no row names
        Folder(table(tmp_path / "c", "smiles\nCCO\n", images=0))


def test_a_field_is_in_its_own_file(tmp_path: Path) -> None:
    source = Folder(table(tmp_path, "image,other,caption\n0.jpg,1.jpg,a\n2.jpg,,b\n"))
    assert source.file_of(0, "other") == str(tmp_path / "1.jpg") and source.file_of(0, "image") == source.place(0)
    assert source.file_of(1, "other") == source.file_of(1, "caption") == str(tmp_path / "2.jpg")
