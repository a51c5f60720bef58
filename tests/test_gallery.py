"""The gallery drawn again: every figure says what it said, looks as it looked, and is legible in one column.

What a figure says (texts, scales, the data of its lines, areas and bars) is compared with any Matplotlib. Pixels are
compared only with the minor version that drew the stored picture, whose number is in the file: others place text
differently, and a tolerance wide enough for that would let a missing curve pass.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text
from PIL import Image

import fluidsched as fs

ROOT = Path(__file__).parents[1]
STORED = ROOT / "docs" / "gallery"
SAID: dict[str, Any] = json.loads((STORED / "gallery.json").read_text())
DRAWN = sorted(set(fs.plots.__all__) - {"COLOURS", "COLUMN", "LINES", "style"})
SMALLEST_TYPE = 6.0
"""Points: what can be read in print."""


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_gallery", ROOT / "scripts" / "make_gallery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, Path]]:
    """Name → figure, what it says, and its picture; and no setting of Matplotlib is touched by all of it."""
    module, folder, before = script(), tmp_path_factory.mktemp("gallery"), dict(mpl.rcParams)
    found = {}
    for name, example in module.examples():
        figure = module.draw(example)
        figure.savefig(folder / f"{name}.png", dpi=module.DPI)
        found[name] = (figure, module.what_it_says(figure), folder / f"{name}.png")
    assert dict(mpl.rcParams) == before
    return found


def test_every_plot_function_is_in_the_gallery(gallery: dict[str, Any]) -> None:
    assert sorted(gallery) == sorted(SAID) == DRAWN
    assert sorted(file.stem for file in STORED.glob("*.png")) == DRAWN
    assert (STORED.parent / "gallery.md").read_text() == script().page(list(SAID))


@pytest.mark.parametrize("name", DRAWN)
def test_it_says_what_it_said(name: str, gallery: dict[str, Any]) -> None:
    """Texts equal, mean and spread of all data within 1 %: seeds are fixed, so only solvers and last digits differ."""

    def compare(now: Any, then: Any) -> None:
        if isinstance(then, dict):
            assert sorted(now) == sorted(then)
            for key in then:
                compare(now[key], then[key])
        elif (
            isinstance(then, list)
            and len(then) == 5
            and all(isinstance(value, int | float) for value in then)
        ):
            assert now[0] == then[0]
            for mean, spread in ((1, 3), (2, 4)):
                room = 0.01 * (abs(then[mean]) + then[spread])
                assert now[mean] == pytest.approx(then[mean], abs=room)
                assert now[spread] == pytest.approx(then[spread], abs=room)
        elif isinstance(then, list):
            assert len(now) == len(then)
            for one, other in zip(now, then, strict=True):
                compare(one, other)
        else:
            assert now == then

    compare(gallery[name][1], SAID[name])


@pytest.mark.parametrize("name", DRAWN)
def test_it_looks_as_it_looked(name: str, gallery: dict[str, Any]) -> None:
    """Pixels, with the Matplotlib that drew the stored picture."""
    with Image.open(STORED / f"{name}.png") as stored:
        drawn_with = stored.info["Software"]
    if ".".join(mpl.__version__.split(".")[:2]) + "." not in drawn_with:
        pytest.skip(f"stored picture drawn with {drawn_with}")
    assert compare_images(str(STORED / f"{name}.png"), str(gallery[name][2]), tol=3.0) is None


@pytest.mark.parametrize("name", DRAWN)
def test_it_is_legible_in_one_column(name: str, gallery: dict[str, Any]) -> None:
    """3.4 inches wide; no text outside the figure, none smaller than 6 points, a unit or word on every axis."""
    figure = gallery[name][0]
    assert figure.get_figwidth() == fs.plots.COLUMN[0]
    figure.canvas.draw()
    unseen = unseen_ticks(figure)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text():
            assert text.get_fontsize() >= SMALLEST_TYPE, text
            box = text.get_window_extent()
            inside = figure.bbox.padded(1.0)
            if text not in unseen:
                assert inside.x0 <= box.x0, text
                assert box.x1 <= inside.x1, text
                assert inside.y0 <= box.y0, text
                assert box.y1 <= inside.y1, text
    for axes in figure.axes:
        assert axes.get_ylabel() or len(axes.get_yticklabels())


def unseen_ticks(figure: Any) -> set[Text]:
    """Labels of ticks beyond the limits of an axis, which Matplotlib keeps and does not draw."""
    found: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low <= tick.get_loc() <= high:
                    found |= {tick.label1, tick.label2}
    return found
