"""The picture of the results table: valid SVG, every row in it, labels that can be read."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ET

from benchmarks.tradeoff import LETTER, LINE, Point, label_places, write_tradeoff


def test_labels_cover_neither_marks_nor_each_other():
    draw = random.Random(0)
    marks = [(draw.uniform(500, 640), draw.uniform(380, 480)) for _ in range(22)]
    names = [draw.choice(["dpo", "mixed_dpo", "povid_released"]) for _ in marks]
    places = label_places(marks, names)
    boxes = [(u, v - LINE + 3, u + LETTER * len(name), v + 3) for (u, v), name in zip(places, names)]
    boxes += [(a - 4, b - 4, a + 4, b + 4) for a, b in marks]
    for i, one in enumerate(boxes[: len(marks)]):
        for other in boxes[i + 1 :]:
            assert not (one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3])


def test_every_row_is_in_the_picture(tmp_path):
    """More recall lies further right, more hallucination further up, and nothing of the file is left over."""
    points = {"start": Point(87.0, 0.0, 23.0, 0.0), "a<b": Point(80.0, 1.0, 2.0, 3.0, "given pairs")}
    write_tradeoff(tmp_path / "t.svg", points, [(40.0, 3.0), (86.0, 20.0), (87.0, 23.0)])
    root = ET.parse(tmp_path / "t.svg").getroot()
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"start", "a<b"} <= set(texts)
    marks = list(root.iter("{http://www.w3.org/2000/svg}circle"))[:2]
    start, row = ((float(e.get("cx")), float(e.get("cy"))) for e in marks)
    assert start[0] > row[0] and start[1] < row[1]
    assert [p.name for p in tmp_path.iterdir()] == ["t.svg"]
    write_tradeoff(tmp_path / "t.svg", {"start": Point(87.0, 0.0, 0.0, 0.0)}, [])  # nothing hallucinates
