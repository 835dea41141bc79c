"""``descant report``: one self-contained page, whatever the runs contain, that works in a browser."""

from __future__ import annotations

import base64
import csv
import fcntl
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from descant.report.curves import mean, scalars, thin
from descant.report.report import LIMIT
from descant.run.events import pictures
from descant.run.groups import group, load
from tests.conftest import Result
from tests.descant.report.test_compare import make

Cli = Callable[..., Result]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>document.title='owned'</script><img src=//evil.test/x onerror=\"document.title='owned'\">"


def log(run: str, columns: dict[str, float] | None = None, steps: int = 20, first: float = 1.0) -> None:
    """A ``metrics.csv`` as runs write it: training at every step, validation at every fifth."""
    columns = columns or {}
    names = ["epoch", "step", "train/loss", "val/r1", *columns]
    with (Path("runs") / run / "metrics.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(names)
        for step in range(steps):
            writer.writerow([0, step, first / (step + 1), "", *columns.values()])
            if step % 5 == 4:
                writer.writerow([0, step, "", 0.01 * step, *("" for _ in columns)])


def noise(size: int, seed: int = 0) -> np.ndarray:
    """An image that does not compress."""
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)


def draw(run: str, tags: dict[str, list[np.ndarray]]) -> None:
    """Log images to TensorBoard at steps 0, 1, ..."""
    with SummaryWriter(str(Path("runs") / run)) as writer:
        for tag, images in tags.items():
            for step, image in enumerate(images):
                writer.add_image(tag, image, step, dataformats="HWC")


@pytest.fixture
def two(workplace: Path) -> None:
    """``a`` and ``b`` with another learning rate: two seeds each, with curves."""
    for name, more in (("a", {}), ("b", {"model__optimizer__lr": 0.01})):
        for seed in range(2):
            folder = make(f"{name}/00{seed + 1}", seed, **more)  # type: ignore[arg-type]
            log(f"{name}/00{seed + 1}", first=seed + 1.0)
            packages = {"torch": f"2.{seed}", "numpy": "2.0"}
            (folder / "versions.json").write_text(json.dumps({"revision": "abc", "packages": packages}))


def plain(page: str) -> str:
    """The text of a page."""
    text = re.sub(r"<(style|script|title)[^>]*>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(re.sub(r"</?(small|b|pre|span)>|<[^>]+>", lambda tag: "" if tag[1] else " ", text).split())


# curves ---------------------------------------------------------------------------------------------------------------


def test_scalars_from_metrics_csv(workplace: Path) -> None:
    make("a/001")
    log("a/001", steps=10, first=2.0)
    found = scalars(Path("runs/a/001"))
    assert list(found) == ["train/loss", "val/r1"]
    assert found["train/loss"][3] == 0.5 and found["val/r1"] == {4: 0.04, 9: 0.09}


def test_values_that_cannot_be_plotted_are_left_out(workplace: Path) -> None:
    lines = ["step,x,y", "3,1,nan", "1,2,inf", "1,4,oops", f"{'9' * 5000},1,1", "x,1,1", "5", "7,1e300,8"]
    Path("metrics.csv").write_text("\n".join(lines))
    assert scalars(Path()) == {"x": {1: 4.0, 3: 1.0}, "y": {7: 8.0}}


def test_scalars_from_event_files_without_a_csv(workplace: Path) -> None:
    make("a/001")
    with SummaryWriter("runs/a/001") as writer:
        for step in range(3):
            writer.add_scalar("train/loss", 0.5 * step, step)
    assert scalars(Path("runs/a/001")) == {"train/loss": {0: 0.0, 1: 0.5, 2: 1.0}}


def test_mean_is_over_common_steps() -> None:
    assert mean([{0: 1.0, 1: 2.0, 2: 3.0}, {1: 4.0, 2: 5.0, 3: 0.0}]) == {1: 3.0, 2: 4.0}


def test_chance_is_a_dashed_line_in_the_chart_of_its_metric(cli: Cli, workplace: Path) -> None:
    make("a/001", 0, {"val/i2t_r1": 0.5, "val/chance/i2t_r1": 0.125})
    rows = ["step,val/i2t_r1,val/chance/i2t_r1,val/loss", "1,0.25,0.125,2.0", "5,0.5,0.125,1.0"]
    Path("runs/a/001/metrics.csv").write_text("\n".join(rows))
    assert cli("report", "a", "--output", "r.html").rc == 0
    charts = Path("r.html").read_text().split("<figcaption>")[1:]
    recall, loss = ([one for one in charts if one.startswith(name)] for name in ("val/i2t_r1", "val/loss"))
    assert len(recall) == len(loss) == 1 and not any(one.startswith("val/chance") for one in charts)
    assert recall[0].count('class="chance"') == 1 and "<title>by chance 0.125</title>" in recall[0]
    assert (
        "stroke-dasharray"
        in recall[0].partition('class="chance"')[0][-300:] + recall[0].partition('class="chance"')[2][:200]
    )
    assert 'class="chance"' not in loss[0]


def test_thinning_keeps_ends_and_spikes() -> None:
    curve = {step: float(step % 7) for step in range(1000)} | {503: 99.0, 700: -99.0}
    thinned = thin(curve, 50)
    assert len(thinned) <= 52 and thinned.items() <= curve.items() and list(thinned) == sorted(thinned)
    assert {0, 503, 700, 999} <= set(thinned)
    assert thin(thinned, 100) is thinned


# the page -------------------------------------------------------------------------------------------------------------


def test_one_page_with_table_curves_configurations_and_versions(cli: Cli, two: None) -> None:
    result = cli("report", "a", "b", "--output", "out/page.html")
    assert result.rc == 0 and result.out.startswith("wrote out/page.html: 4 runs in 2 groups, 0.0")
    page = Path("out/page.html").read_text()
    text = plain(page)
    assert "0.5312 +0 [+0, +0] 0 of 2 better 10" in text  # the table
    assert page.count('<figure class="chart">') == 2
    for title in ("train/loss", "val/r1"):
        chart = page[page.index(f"<figcaption>{title}") :].partition("</figure>")[0]
        assert chart.count('class="seed c0"') == chart.count('class="seed c1"') == 2
        assert chart.count('class="mean c0"') == chart.count('class="mean c1"') == 1
        assert chart.count('text-anchor="middle"') >= 4 and chart.count('text-anchor="end"') >= 3  # ticks, and "step"
    assert "setting lr=0.001 (baseline) lr=0.01 model.optimizer.lr 0.001 0.01" in text
    assert "weight_decay: 0.1" in text  # the configuration itself
    assert "revision abc torch 2.0 (a/001, b/001) 2.1 (a/002, b/002) numpy 2.0" in text
    assert re.findall(r'(?:src|href)=["\'](?!data:)', page) == []
    assert " style=" not in page  # which the page's policy forbids


def test_groups_without_a_common_seed_still_have_curves(cli: Cli, workplace: Path) -> None:
    make("a/001", 0)
    make("b/001", 1, data__batch_size=4)
    assert cli("report", "a", "b").rc == 0
    text = plain(Path("report.html").read_text())
    assert "batch_size=4 1 0.5625 - 10" in text and "None of these runs logged a scalar at two steps." in text


def test_text_of_runs_is_escaped(cli: Cli, workplace: Path) -> None:
    folder = make("a/001", 0, {f"val/{HOSTILE}": 0.5}, model__optimizer__lr=HOSTILE)
    make(f"{HOSTILE.replace('/', '')}/001", 0, {f"val/{HOSTILE}": 0.25})
    log("a/001", {f"val/{HOSTILE}": 1.0, "\x1b[31m": 2.0})
    (folder / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE, "packages": {HOSTILE: [HOSTILE]}}))
    draw("a/001", {f"x/{HOSTILE}": [noise(8)]})
    assert cli("report", "a", "*", "--metrics", "*").rc == 0
    page = Path("report.html").read_text()
    assert page.count("<script") == page.count("</script") == 1 and "\x1b" not in page
    assert page.count("<img ") == 1 and "<img src=//" not in page and page.count("&lt;script&gt;") > 8


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"packages": null}'])
def test_versions_that_cannot_be_read_are_left_out(cli: Cli, two: None, content: str) -> None:
    Path("runs/a/001/versions.json").write_text(content)
    assert cli("report", "a").rc == 0
    assert "revision abc" in plain(Path("report.html").read_text())


def test_two_hundred_runs_stay_below_the_size_limit(cli: Cli, workplace: Path) -> None:
    for n in range(200):
        make(f"a/{n + 1:03d}", n % 4, {f"val/m{k}": 0.5 for k in range(40)}, model__optimizer__lr=n // 4)
        log(f"a/{n + 1:03d}", {f"train/term{k}": 1.0 for k in range(25)}, 100)
    result = cli("report", "a")
    assert result.rc == 0 and "Curves left out, as the page would be too large: train/term" in result.err
    assert Path("report.html").stat().st_size < LIMIT


def test_torch_is_not_imported(two: None) -> None:
    draw("a/001", {"x": [noise(8)]})
    code = (
        "import sys; from descant.__main__ import main; assert main(['report', 'a', 'b']) == 0;"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


# the file -------------------------------------------------------------------------------------------------------------


def test_only_a_report_is_overwritten_and_the_same_runs_give_the_same_bytes(cli: Cli, two: None) -> None:
    assert cli("report", "a").rc == 0
    first = Path("report.html").read_bytes()
    assert cli("report", "a").rc == 0 and Path("report.html").read_bytes() == first
    for content in (b"mine", b"\xff\xfe"):
        Path("notes.html").write_bytes(content)
        line = cli("report", "a", "--output", "notes.html").refusal
        assert line == "report: --output notes.html: exists and is not a report; give another FILE"
        assert Path("notes.html").read_bytes() == content
    Path("folder").mkdir()
    assert "exists and is not a report" in cli("report", "a", "--output", "folder").refusal
    assert "cannot be written: " in cli("report", "a", "--output", "notes.html/x.html").refusal
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]


def test_wrong_requests_are_refused_as_by_compare(cli: Cli, two: None) -> None:
    assert cli("report", "aa").refusal.endswith("report aa: no such run under runs; nearest: a")
    assert cli("report", "--runs", "runs").refusal.startswith("report: no run given")
    Path("runs/a/001/metrics.csv").write_bytes(b"step\n\xff")
    assert cli("report", "a").refusal.startswith("report a/001: its curves cannot be read: ")


# pictures -------------------------------------------------------------------------------------------------------------


def shown(budget: int) -> tuple[list[tuple[str, str, int]], list[str]]:
    chosen, lines = pictures(group(load("report", ["*"], Path("runs"))), budget)
    assert sum(len(one.uri) for one in chosen) <= budget
    return [(one.tag, one.run.name, one.step) for one in chosen], lines


def test_newest_images_come_first_and_oldest_are_left_out(two: None) -> None:
    for n, run in enumerate(("a/001", "a/002", "b/001", "b/002")):
        draw(run, {tag: [noise(100, 10 * n + k) for k in range(6)] for tag in ("x", "y")})
    everything, lines = shown(10_000_000)
    newest = [(tag, run, 5) for run in ("a/001", "b/001", "a/002", "b/002") for tag in ("x", "y")]
    assert everything[:8] == newest and len(everything) == 32 and lines == []
    assert {step for _, _, step in everything} == {2, 3, 4, 5}
    size = len(pictures(group(load("report", ["a/001"], Path("runs"))), 10_000_000)[0][0].uri) + 1000
    some, lines = shown(11 * size)
    assert some[:8] == newest and 9 <= len(some) <= 12 and {step for _, _, step in some[8:]} == {4}
    assert lines == [f"{32 - len(some)} images are left out, the oldest first: the page would be too large."]
    few, lines = shown(3 * size)
    assert few == newest[: len(few)] and 2 <= len(few) <= 3
    assert lines[0] == "Images of 2 more runs are left out: the page would be too large."


def test_images_are_scaled_down_before_one_is_left_out(two: None) -> None:
    draw("a/001", {"x": [noise(1000, 0)]})
    draw("b/001", {"x": [noise(1000, 1)]})
    groups = group(load("report", ["a", "b"], Path("runs")))
    wide = [pictures(groups, budget)[0] for budget in (4_000_000, 1_200_000, 400_000)]
    assert [[one.size[0] for one in some] for some in wide] == [[960, 960], [720, 720], [480, 480]]
    assert pictures(groups, 400_000)[1] == ["Images are smaller here than in the runs' folders."]


@pytest.mark.slow
def test_a_report_full_of_images_stays_below_the_size_limit(cli: Cli, two: None) -> None:
    for n, run in enumerate(("a/001", "b/001")):
        draw(run, {f"tag{k:02d}": [noise(480, 100 * n + k)] for k in range(15)})
    result = cli("report", "a", "b")
    page = Path("report.html")
    assert LIMIT * 0.9 < page.stat().st_size <= LIMIT
    notes, text = [line.removeprefix("descant: ") for line in result.err.splitlines()], plain(page.read_text())
    assert "images are left out, the oldest first" in notes[-1] and all(note in text for note in notes)


def test_images_are_re_encoded_and_broken_ones_counted(workplace: Path) -> None:
    make("a/001")
    matrix = noise(8).repeat(40, 0).repeat(40, 1)  # sharp squares: larger as a JPEG
    out = io.BytesIO()
    Image.fromarray(matrix).save(out, "PNG")
    with SummaryWriter("runs/a/001") as writer:
        for step, data in enumerate((b"<svg onload=alert(1)>", out.getvalue() + b"<script>hidden</script>")):
            value = Summary.Value(tag="x", image=Summary.Image(encoded_image_string=data))
            writer._get_file_writer().add_summary(Summary(value=[value]), step)
    (good,), lines = pictures(group(load("report", ["a"], Path("runs"))), 1_000_000)
    assert lines == ["1 images could not be decoded."]
    data = base64.b64decode(good.uri.partition(",")[2])
    assert good.uri.startswith("data:image/png;base64,") and b"hidden" not in data
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), matrix)


@pytest.mark.parametrize("cut", [5, 40, -3])
def test_a_truncated_event_file_is_read_to_its_last_whole_record(workplace: Path, cut: int) -> None:
    make("a/001")
    draw("a/001", {"x": [noise(8), noise(8)]})
    (file,) = Path("runs/a/001").glob("events*")
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    assert [step for _, _, step in shown(1_000_000)[0]] == ([0] if cut < 0 else [])
    file.write_bytes(b"\xff" * 4000)
    assert shown(1_000_000) == ([], [])


# a browser ------------------------------------------------------------------------------------------------------------


class Browser:
    """A headless Chromium, driven over the pipes of its debugging protocol: JSON messages that end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM, "chromium is missing: apt-get install chromium"
        child_in, self._out = os.pipe()
        self._in, child_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (child_in, child_out)]
        quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"),
            ],
            preexec_fn=lambda: [os.dup2(end, number) for number, end in enumerate(ends, 3)] and None,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (child_in, child_out, *ends):
            os.close(end)
        self.seen: list[dict[str, Any]] = []
        self._number, self._rest, self._session = 0, b"", ""
        target = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == self._number)["result"]

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while True:
            while b"\0" in self._rest:
                one, self._rest = self._rest.split(b"\0", 1)
                self.seen.append(json.loads(one))
                if wanted(self.seen[-1]):
                    return self.seen[-1]
            ready = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, "no answer from the browser"
            self._rest += os.read(self._in, 1 << 20)

    def open(self, file: Path) -> None:
        self("Page.navigate", url=file.resolve().as_uri())
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def js(self, code: str) -> Any:
        return self("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def requests(self) -> list[str]:
        """Requested URLs, without data URLs."""
        sent = (one["params"] for one in self.seen if one.get("method") == "Network.requestWillBeSent")
        return [one["request"]["url"] for one in sent if not one["request"]["url"].startswith("data:")]

    def complaints(self) -> list[dict[str, Any]]:
        methods = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
        return [one for one in self.seen if one.get("method") in methods]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    one = Browser(tmp_path / "profile")
    yield one
    one.close()


@pytest.mark.slow
def test_a_browser_shows_charts_tooltips_and_dark_mode_without_requests(cli: Cli, browser: Browser) -> None:
    overlays = ("contrastive/emoji", "with/evaluate/images", "on/tiny")
    fit = ("fit", *(part for name in overlays for part in ("--config", name)), "--trainer.max_steps", "4")
    for seed, rate in ((0, 1e-3), (1, 1e-3), (0, 1e-4)):
        result = cli(*fit, "--name", f"r{rate:g}", "--seed_everything", str(seed), "--model.optimizer.lr", str(rate))
        assert result.rc == 0, result.err
    assert cli("report", "r*").rc == 0
    page = Path("report.html")
    assert page.stat().st_size < LIMIT
    browser.open(page)
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.js("document.querySelectorAll('.chart').length") >= 3
    assert browser.js("[...document.images].length") >= 8
    assert browser.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    colours = "[...document.querySelectorAll('#legend svg')].map(k => getComputedStyle(k).color)"
    assert len(set(browser.js(colours))) == 2  # the style is applied
    browser.js("document.querySelector('.chart').scrollIntoView({block: 'center'})")
    middle = "(b => [b.left + b.width / 2, b.top + b.height / 2])"
    x, y = browser.js(f"{middle}(document.querySelector('.chart svg').getBoundingClientRect())")
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tip = browser.js("document.getElementById('tip').innerText").split("\n")
    assert tip[0].startswith("step ") and len(tip) == 3 and "lr=0.0001" in " ".join(tip)
    browser.js("document.querySelector('#legend button').click()")
    assert browser.js("getComputedStyle(document.querySelector('.chart .mean')).display") == "none"
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    assert browser.complaints() == []


@pytest.mark.slow
def test_a_browser_runs_no_script_from_a_run(cli: Cli, workplace: Path, browser: Browser) -> None:
    make("a/001", 0, {f"val/{HOSTILE}": 0.5}, model__optimizer__lr=HOSTILE)
    make("b/001", 0, {f"val/{HOSTILE}": 0.5})
    log("a/001", {f"val/{HOSTILE}": 1.0})
    draw("a/001", {HOSTILE: [noise(8)]})
    assert cli("report", "a", "b", "--metrics", "*").rc == 0
    browser.open(Path("report.html"))
    assert browser.js("document.title") == "a, b" and browser.js("document.scripts.length") == 1
    assert browser.requests() == [Path("report.html").resolve().as_uri()]
    assert browser.complaints() == []


def test_stopped_runs_are_marked_and_chance_is_a_row(cli: Any, workplace: Path) -> None:
    chance = {"val/i2t_r1": 0.5, "val/chance/i2t_r1": 0.125}
    make("a/001", 0, chance | {"steps": 400}, trainer__max_steps=1000)
    make("b/001", 0, chance, trainer__max_steps=100)
    assert cli("report", "a", "b", "--metrics", "val/i2t_r1", "--output", "r.html").rc == 0
    page = Path("r.html").read_text()
    assert "<td>by chance</td><td>-</td><td>0.125</td>" in page
    assert page.count("<td>1 stopped</td>") == 1 and page.count("stopped: 400 of 1,000 steps") == 1
