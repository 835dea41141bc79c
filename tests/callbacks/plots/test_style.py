"""The style of figures, curves over a run, and when matplotlib is imported."""

from __future__ import annotations

import ast
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from descant.callbacks.plots import style
from descant.callbacks.plots.curves import MOST, Track, cosine_map, curves
from descant.callbacks.plots.style import CYCLE, RC, figure, page, pixels, rgb, text_width, with_style, wrap

CALLBACKS = Path(style.__file__).resolve().parent.parent


def test_no_callback_imports_matplotlib_before_it_draws() -> None:
    for file in sorted(CALLBACKS.rglob("*.py")):
        tree = ast.parse(file.read_text())
        for statement in tree.body:
            if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
                continue
            inner = ast.walk(statement) if not isinstance(statement, ast.FunctionDef | ast.ClassDef) else ()
            names = [ast.unparse(node) for node in inner if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not any("matplotlib" in name for name in names), file
        assert "pyplot" not in "".join(ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Import)), file


def test_figures_have_exact_sizes_and_ignore_the_settings_of_the_process() -> None:
    import matplotlib

    @with_style
    def draw() -> np.ndarray:
        made = figure(200, 37)
        made.text(0.1, 0.4, "some text")
        return pixels(made)

    image = draw()
    assert image.shape == (37, 200, 3) and image.dtype == np.uint8 and image.min() < 100
    with matplotlib.rc_context({"font.size": 30, "font.family": "serif", "figure.facecolor": "red"}):
        assert np.array_equal(draw(), image)
        assert matplotlib.rcParams["font.size"] == 30


def test_a_page_shows_its_image_pixel_by_pixel() -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 61, 3), dtype=np.uint8)
    assert np.array_equal(pixels(page(image)[0]), image)


def test_a_figure_that_was_drawn_keeps_no_pixels_though_its_parts_refer_to_each_other() -> None:
    made, axes = page(np.zeros((40, 61, 3), dtype=np.uint8))
    axes.text(3, 3, "some text")
    made.canvas.draw()
    parts = [made.canvas, made.canvas.get_renderer(), made.images[0], made.images[0].get_array()]  # type: ignore[attr-defined]
    kept = {type(part).__name__: weakref.ref(part) for part in parts}
    del parts
    gc.disable()  # the collector would free a cycle at some later figure
    try:
        pixels(made)
        assert [name for name, part in kept.items() if part() is not None] == []
    finally:
        gc.enable()


def test_text_is_at_least_eleven_pixels_and_colours_differ_without_red_and_green() -> None:
    sizes = [value for name, value in RC.items() if name.endswith("size")]
    assert min([*sizes, style.SMALL, style.TEXT, style.TITLE]) >= 11
    # what a reader without red cones sees (Vienot 1999), in linear light
    sees = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
    colours = np.array([rgb(colour) for colour in CYCLE]) / 255
    apart = np.linalg.norm((colours**2.2 @ sees.T)[:, None] - (colours**2.2 @ sees.T), axis=-1)
    assert apart[~np.eye(len(CYCLE), dtype=bool)].min() > 0.05


@pytest.mark.parametrize("text", ["word " * 40, "W" * 90, "", "пёс и кот"])
def test_wrapped_lines_fit(text: str) -> None:
    lines = wrap(text, 12, 100, 3)
    assert 1 <= len(lines) <= 3 and all(text_width(line, 12) <= 100 for line in lines)


def test_curves_leave_gaps_and_parts_of_a_run_are_equally_wide() -> None:
    x_SK = np.array([[0.1, 0.4], [np.nan, 0.5], [0.3, np.inf]])
    axes = curves("title", {"val": (["a", "b"], [0, 10, 20], x_SK)}, {"first": 0, "second": 2, "third": 18}).axes[0]
    (xa_S, ya_S), (xb_S, yb_S) = (
        np.array(line.get_data()) for line in axes.lines if line.get_label() in ("a 0.300", "b 0.500")
    )
    assert np.isnan(ya_S[1]) and np.isnan(yb_S[2]) and np.array_equal(xa_S, xb_S)
    assert xa_S.tolist() == [0, 1.5, 3]  # steps 0, 10 and 20 of parts 0..2, 2..18 and 18..20
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first\n0", "second\n2", "third\n18", "step\n20"]


def test_curves_of_one_step_or_of_nothing_finite_are_drawn() -> None:
    for x_SK in (np.array([[0.5]]), np.array([[np.nan]]), np.array([[0.0]])):
        assert pixels(curves("title", {"val": (["a"], [3], x_SK)})).shape[2] == 3


def test_conflicts_are_red_and_agreements_blue() -> None:
    made = cosine_map("title", [("a", "b"), ("a", "c")], [0, 9], np.array([[-1.0, 0.5], [1.0, 0.0]]))
    box = made.axes[0].get_window_extent()
    image = pixels(made)
    row = image[len(image) - int(box.y1) + 10, int(box.x0) : int(box.x1)].astype(int)
    left, right = row[20 : len(row) // 2 - 20].mean(0), row[len(row) // 2 + 20 : -20].mean(0)
    assert left[0] > left[2] + 50 and right[2] > right[0] + 50


def test_a_track_is_bounded_and_its_state_restores_it() -> None:
    track, other = Track(), Track()
    for step in range(3 * MOST):
        track.add(step, [float(step), 1.0])
    steps, x_SQ = track.points()
    assert len(steps) <= MOST and x_SQ[:, 1].tolist() == [1.0] * len(steps)
    other.load_state_dict(track.state_dict())
    for each in (track, other):
        each.add(3 * MOST, [0.0, 1.0])
    assert np.array_equal(track.points()[1], other.points()[1])
