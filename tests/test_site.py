"""The documentation as a site: it builds without a warning, has all that it promises, and asks no other host."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from descant.claims import spec, store
from descant.cli.catalogue import experiments, overlays, papers
from descant.modules.io.names import of_kind

ROOT = Path(__file__).parent.parent
ROOTS = {"recipes": "Recipe", "callbacks": "Callback", "datamodules": "DataModule"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # --strict: a link that leads nowhere is a warning, and a warning fails; with --quiet none would be counted
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if not line.startswith("INFO"))
    return folder


@pytest.mark.slow
def test_every_experiment_has_its_place_and_command(site: Path) -> None:
    pages = {file.parent.name: file.read_text() for file in (site / "experiments").glob("*/index.html")}
    for name in experiments():
        family = name.split("/")[0]
        assert f'id="{name.replace("/", "-")}"' in pages[family], name
    assert all(f'id="{name.replace("/", "-")}"' in pages["overlays"] for name in overlays())
    assert "descant fit --config contrastive/emoji" in pages["contrastive"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROOTS)
def test_every_class_that_a_yaml_may_name_is_in_the_reference(site: Path, kind: str) -> None:
    pages = "".join(file.read_text() for file in (site / "reference" / kind).rglob("index.html"))
    for name in of_kind(ROOTS[kind], kind):
        assert re.search(rf'id="descant\.{kind}\.[\w.]*\b{name}"', pages), name


@pytest.mark.slow
def test_a_page_asks_no_other_host_and_every_picture_is_there(site: Path) -> None:
    for file in site.rglob("index.html"):
        text = file.read_text()
        assert not re.search(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//', text), file
        assert not re.search(r'<link[^>]+rel="(?:stylesheet|preconnect|preload)"[^>]+href="(?:https?:)?//', text), file
        for picture in re.findall(r'<img[^>]+src="([^"]+)"', text):
            assert (file.parent / picture).resolve().is_file(), (file, picture)


@pytest.mark.slow
def test_every_notebook_has_a_page_that_leads_to_it_and_to_the_next(site: Path) -> None:
    names = ["own-pictures", "compare-methods", "add-a-method"]
    for name, following in pairwise([*names, "compare-methods"]):
        text = (site / "tutorials" / name / "index.html").read_text()
        assert f'href="../{name}.ipynb"' in text and (site / "tutorials" / f"{name}.ipynb").is_file()
        assert f'href="../{following}/"' in text.partition("<article")[2].partition("</article>")[0]


@pytest.mark.slow
def test_doctests_are_code(site: Path) -> None:
    text = (site / "reference" / "modules" / "losses" / "contrastive" / "index.html").read_text()
    assert "0.3133" in text and "&gt;&gt;&gt;" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)


@pytest.mark.slow
def test_the_gallery_has_a_picture_of_every_experiment(site: Path) -> None:
    text = (site / "experiments" / "index.html").read_text()
    cards = re.findall(r'<a class="card" href="([^"]+)">.*?<img[^>]+src="([^"]+)"', text, re.DOTALL)
    places = {f"{name.split('/')[0]}/#{name.replace('/', '-')}" for name in experiments()}
    assert {place for place, _ in cards} == places
    assert all((site / "experiments" / picture).resolve().is_file() for _, picture in cards)


@pytest.mark.slow
def test_each_command_of_the_gallery_is_a_line_that_can_be_pasted(site: Path) -> None:
    for name, file in experiments().items():
        head = re.findall(
            r"^# (?:Command:|Before:|       ) +(descant .*?)(?: {2,}.*| \(.*\))?$", file.read_text(), re.MULTILINE
        )
        page = (site / "experiments" / name.split("/")[0] / "index.html").read_text()
        part = page.partition(f'id="{name.replace("/", "-")}"')[2].partition("<h2")[0]
        code = re.search(r"<code>(.*?)</code></pre>", part, re.DOTALL)
        assert code is not None, name
        lines = re.sub(r"<[^>]+>", "", code[1]).strip().splitlines()
        assert [line.partition("  # ")[0] for line in lines] == head, name


@pytest.mark.slow
def test_the_reference_has_a_page_at_its_root_and_one_a_folder(site: Path) -> None:
    root = (site / "reference" / "index.html").read_text()
    for kind in (*ROOTS, "modules"):
        assert f'href="{kind}/"' in root
        assert "<table>" in (site / "reference" / kind / "index.html").read_text()


@pytest.mark.slow
def test_every_paper_is_a_row_and_a_built_one_a_page(site: Path) -> None:
    table = (site / "papers" / "index.html").read_text()
    gallery = (site / "experiments" / "papers" / "index.html").read_text()
    assert all(f">{paper['arxiv']}</a>" in table for paper in papers()) and ">planned<" in table
    for paper in (paper for paper in papers() if paper["status"] == "built"):
        page = (site / "papers" / paper["name"] / "index.html").read_text()
        assert f"descant fit --config papers/{paper['name']}" in page
        # a claim without room for an effect has no figure of it, and one that was not run yet neither
        claim = paper.get("claim", "")
        stored = store.read(spec.folder() / "results", claim, "full")
        assert stored is not None or "not run yet" in page
        measured = stored is not None and bool(stored["runs"])
        assert (f"claims/{claim}.svg" in page) == measured
        assert f'href="../../papers/{paper["name"]}/"' in gallery
