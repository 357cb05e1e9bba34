"""SVG images: valid, complete, every value where it belongs, labels that can be read."""

import random
import re
import xml.etree.ElementTree as ET

import pytest

from common import write_text
from svg import (
    BOTTOM,
    LARGE,
    LEFT,
    LETTER,
    LINE,
    RIGHT,
    Axes,
    Panel,
    Point,
    Scatter,
    curves,
    histograms,
    label_places,
    scatters,
    shares,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


def texts(root: ET.Element) -> list[str]:
    return [element.text for element in root.iter(f"{SVG}text")]


def test_labels_cover_neither_marks_nor_each_other():
    draw = random.Random(0)
    marks = [(draw.uniform(500, 640), draw.uniform(380, 480)) for _ in range(22)]
    names = [draw.choice(["dpo", "mixed_dpo", "povid_released"]) for _ in marks]
    places = label_places(marks, names, Axes(0, 1, 0, 1, *LARGE, 46))
    boxes = [(u, v - LINE + 3, u + LETTER * len(name), v + 3) for (u, v), name in zip(places, names)]
    assert all(box[2] < LARGE[0] and 46 < box[3] < LARGE[1] - BOTTOM + 3 for box in boxes)
    boxes += [(a - 4, b - 4, a + 4, b + 4) for a, b in marks]
    for i, one in enumerate(boxes[: len(marks)]):
        for other in boxes[i + 1 :]:
            assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


def test_scatter():
    """More of x lies further right, more of y further up; the cross is one deviation long on each side; names are
    escaped and shortened; groups and the guide are in the legend."""
    points = {"start": Point(87, 23), "a<b": Point(80, 2, 1, 3, "given"), "long" * 100: Point(84, 10, 0, 2)}
    root = ET.fromstring(scatters([Scatter("title", "recall", "CHAIR", points, [(40, 3), (86, 20), (87, 23)], "cut")]))
    assert {"title", "recall", "CHAIR", "start", "a<b", "given", "cut"} <= set(texts(root)) and "" not in texts(root)
    assert [len(text) for text in texts(root) if text.startswith("long")] == [40]
    start, row, _ = ((float(e.get("cx")), float(e.get("cy"))) for e in root.iter(f"{SVG}circle"))
    assert start[0] > row[0] and start[1] < row[1]
    per_percent = (start[0] - row[0]) / 7
    paths = [e.get("d") for e in root.iter(f"{SVG}path")]
    left, right = next(map(float, m.groups()) for d in paths if (m := re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)M.*", d))
                       and float(m[1]) < row[0] < float(m[2]))  # fmt: skip
    assert row[0] - left == pytest.approx(per_percent, abs=0.2) and right - row[0] == pytest.approx(per_percent, abs=0.2)
    guide = next(e.get("d") for e in root.iter(f"{SVG}path") if e.get("stroke") == "#999999" and "L" in e.get("d"))
    assert guide == "M" + "L".join(f"{start[0] - per_percent * (87 - x):.1f} {y:.1f}" for x, y in [
        (86, start[1] + 3 * (row[1] - start[1]) / 21), (87, start[1])])  # without the point far to the left


def test_scatter_of_points_where_nothing_hallucinates():
    ET.fromstring(scatters([Scatter("", "x", "y", {"start": Point(87, 0)})]))


def test_histogram_shares():
    """0, 0.9, 1, 2 of 0 ... 2 in two bins: half in each, the border in the upper bin and the upper end in the last."""
    assert shares([0, 0.9, 1, 2], 0, 2, 2) == [50, 50]
    assert shares([0, 1, 1, 2], 0, 2, 2) == [25, 75]


def test_axes_fill_the_panel():
    axes = Axes(0, 10, 5, 15, 420, 260, 50)
    assert [axes.x(0), axes.x(10), axes.y(5), axes.y(15)] == [LEFT, 420 - RIGHT, 260 - BOTTOM, 50]


def test_histograms():
    """One bar per bin in use, as high as its share; panels with one x-label over one range; names escaped."""
    root = ET.fromstring(histograms([
        Panel("before & after", "score", {"correct": [0.0, 10.0, 10.0], "hallucinated": [0.0]}),
        Panel("more", "score", {"<all>": [5.0]}),
        Panel("other", "another score", {"all": [2.0, 3.0]}),
    ], bins=10))  # fmt: skip
    assert {"before & after", "correct: 3, mean 6.67", "<all>: 1, mean 5", "% of each series"} <= set(texts(root))
    shown = [e.text for e in root.iter(f"{SVG}text") if e.get("text-anchor") == "middle"]
    assert shown.count("10") == 2 and shown.count("2.2") == 1  # the x-axes
    bars = [e for e in root.iter(f"{SVG}rect") if e.get("fill-opacity")]
    assert len(bars) == 3 + 1 + 2
    heights = [float(bar.get("height")) for bar in bars[:3]]
    assert heights == pytest.approx([heights[2] / 3, heights[2] * 2 / 3, heights[2]], abs=0.2)
    assert float(bars[0].get("x")) < float(bars[3].get("x")) < float(bars[1].get("x"))  # 0, 5, 10 of one range


def test_curves():
    """Every point of a line where its x and y say; one point alone is a dot; series beyond the colours are dashed."""
    root = ET.fromstring(curves([Panel("loss", "step", {"dpo": [(0, 1), (5, 3), (10, 2)], "b": [(10, 1)]})]))
    lines = [e for e in root.iter(f"{SVG}path") if e.get("stroke-linecap")]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split()) for p in re.findall(r"[\d.]+ [\d.]+", lines[0].get("d")))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y0 > y2 > y1 and y0 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert lines[1].get("d") == f"M{x2} {y0}h0" and {"loss", "step", "dpo", "b"} <= set(texts(root))
    many = ET.fromstring(curves([Panel("", "", {f"run{i}": [(0, i), (1, i)] for i in range(9)})]))
    style = [(e.get("stroke"), e.get("stroke-dasharray")) for e in many.iter(f"{SVG}path") if e.get("stroke-linecap")]
    assert len(set(style)) == 9


@pytest.mark.parametrize("low, high, expected", [
    (0, 10, [0, 2, 4, 6, 8, 10]), (-0.5, 0.5, [-0.4, -0.2, 0, 0.2, 0.4]), (1000, 1006, [1000, 1001, 1002, 1003, 1004,
    1005, 1006]), (0.3, 0.33, [0.3, 0.305, 0.31, 0.315, 0.32, 0.325, 0.33]), (0, 60, [0, 10, 20, 30, 40, 50, 60])])
def test_ticks(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_file_appears_whole(tmp_path):
    write_text(tmp_path / "new" / "a.svg", "<svg>é</svg>")
    assert (tmp_path / "new" / "a.svg").read_text(encoding="utf-8") == "<svg>é</svg>"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.svg"]
