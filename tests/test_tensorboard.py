"""TensorBoard on a short run, looked at in a real browser: curves, pictures and the projector are there."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def board(cli: Any) -> Iterator[str]:
    """The address of a TensorBoard that serves a short run."""
    overlays = ("contrastive/emoji", "with/evaluate/images", "on/tiny")
    result = cli("fit", *(part for c in overlays for part in ("--config", c)), "--name", "seen")
    assert result.rc == 0, result.err
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", str(port)]
    server = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(address, timeout=2).read()
                break
            except OSError:
                assert time.monotonic() < deadline, "TensorBoard did not start"
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def fetch(address: str) -> Any:
    """TensorBoard answers while it still reads the events: ask until something is there."""
    answer: Any = {}
    for _ in range(60):
        answer = json.loads(urllib.request.urlopen(address, timeout=10).read())
        if answer:
            break
        time.sleep(1)
    return answer


def test_scalars_pictures_and_projector_are_served(board: str, tmp_path: Path) -> None:
    scalars = {tag for tags in fetch(f"{board}/data/plugin/scalars/tags").values() for tag in tags}
    assert {"train/loss", "train/image-text", "vendor/i2t_r1"} <= scalars
    assert fetch(f"{board}/data/runs") == ["seen/001"]  # once, though ``latest`` names it too
    first = sorted({tag.split("/")[0] for tag in scalars}, key=lambda group: (group[0].isalpha(), group))[0]
    assert first == "_overview" and "_overview/train/loss" in scalars
    images = {tag for tags in fetch(f"{board}/data/plugin/images/tags").values() for tag in tags}
    assert len(images) >= 2
    assert fetch(f"{board}/data/plugin/projector/runs")
    assert CHROMIUM, "chromium is missing: apt-get install chromium"
    picture = tmp_path / "page.png"
    subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            "--virtual-time-budget=20000",
            f"--screenshot={picture}",
            f"{board}/?darkMode=false#timeseries",
        ],
        check=True,
        capture_output=True,
        timeout=180,
    )
    from PIL import Image

    page = Image.open(picture).convert("L")
    assert page.size == (1400, 1000)
    shades = page.resize((140, 100)).getcolors(maxcolors=256)
    assert shades is not None
    assert len(shades) > 20, "the page is empty"
