"""The picture of the results table, as plain SVG: hallucination against what a caption still names.

    write_tradeoff("table.svg", {"start": Point(87.4, 0, 23.3, 0), "dpo": Point(83.9, .6, 3.4, 1.7)}, cuts)

A mark is a row's mean, its cross one standard deviation to each side. Down is better (fewer captions with an
absent object), right is better (more of the present objects named). The grey line is what costs no training:
the start's captions, cut after their first sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from common import written_whole

WIDTH, HEIGHT = 860, 560
LEFT, RIGHT, TOP, BOTTOM = 60, 30, 46, 50  # margins
LINE, LETTER = 14, 6.4  # height of a label, mean width of a letter at 11 px
GROUPS = {"start and control": "#444444", "given pairs": "#1f77b4", "samples of its own": "#d1500a",
          "on other pairs": "#2a8a3e"}


class Point(NamedTuple):
    """A row of the table: recall and CHAIR_s in percent, with their standard deviations."""

    recall: float
    recall_sd: float
    chair: float
    chair_sd: float
    group: str = "start and control"


def write_tradeoff(path: str | Path, points: Mapping[str, Point], cuts: Sequence[tuple[float, float]]) -> None:
    """Write the diagram; the file appears whole or not at all.

    cuts: (recall, CHAIR_s) of the start's captions after 1, 2, .. sentences.
    """
    low = min(p.recall - p.recall_sd for p in points.values()) - 2
    high = max(p.recall + p.recall_sd for p in points.values()) + 5  # room for the labels
    top = 1.08 * max(1.0, *(p.chair + p.chair_sd for p in points.values()))

    def x(recall: float) -> float:
        return LEFT + (recall - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(chair: float) -> float:
        return HEIGHT - BOTTOM - max(0.0, chair) / top * (HEIGHT - TOP - BOTTOM)

    parts = _axes(x, y, low, high, top)
    line = " ".join(f"{x(recall):.1f},{y(chair):.1f}" for recall, chair in cuts if recall >= low)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#999999" stroke-dasharray="4 3"/>')
    places = label_places([(x(p.recall), y(p.chair)) for p in points.values()], list(points))
    for (name, p), (u, v) in zip(points.items(), places):
        a, b, colour = x(p.recall), y(p.chair), GROUPS[p.group]
        parts.append(f'<path d="M{x(p.recall - p.recall_sd):.1f} {b:.1f}H{x(p.recall + p.recall_sd):.1f}'
                     f'M{a:.1f} {y(p.chair - p.chair_sd):.1f}V{y(p.chair + p.chair_sd):.1f}"'
                     f' stroke="{colour}" stroke-opacity="0.3"/>')
        parts.append(f'<path d="M{a:.1f} {b:.1f}L{u - 2:.1f} {v - 4:.1f}" stroke="{colour}" stroke-opacity="0.5"/>')
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>')
        parts.append(_text(u, v, name, f'fill="{colour}"'))
    for i, (group, colour) in enumerate(GROUPS.items()):
        parts.append(f'<circle cx="{LEFT + 10 + 150 * i}" cy="22" r="4" fill="{colour}"/>')
        parts.append(_text(LEFT + 18 + 150 * i, 26, group))
    parts.append(f'<path d="M{LEFT + 605} 22h22" stroke="#999999" stroke-dasharray="4 3"/>')
    parts.append(_text(LEFT + 632, 26, "start, captions cut short"))
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
            f' font-family="sans-serif" font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>')
    with written_whole(path) as temporary:
        temporary.write_text("\n".join([head, *parts, "</svg>", ""]), encoding="utf-8")


def label_places(marks: Sequence[tuple[float, float]], names: Sequence[str]) -> list[tuple[float, float]]:
    """Where each label begins: the free place nearest to its mark that covers no mark and no other label."""
    taken = [(a - 5, b - 5, a + 5, b + 5) for a, b in marks]  # left, top, right, bottom
    places = []
    for (a, b), name in zip(marks, names):
        width = LETTER * len(name)
        tries = [(a + 8 + right, b + 4 + down) for right in (0, 12, 24, 40, 60, -width - 16, -width - 40)
                 for down in range(-10 * LINE, 10 * LINE + 1, LINE // 2)]
        tries = [(u, v) for u, v in tries if u + width < WIDTH and TOP < v < HEIGHT - BOTTOM - 2]
        tries.sort(key=lambda place: abs(place[0] - a - 8) + abs(place[1] - b - 4))
        boxes = [(u, v - LINE + 3, u + width, v + 3) for u, v in tries]
        free = next((i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)), 0)
        places.append(tries[free])
        taken.append(boxes[free])
    return places


def _overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _axes(x, y, low: float, high: float, top: float) -> list[str]:
    """Both axes with ticks, and what they mean."""
    parts = [f'<path d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="black"/>']
    for value in range(int(low) + 1, int(high) + 1):
        if value % 5 == 0:
            parts.append(_text(x(value), HEIGHT - BOTTOM + 16, str(value), 'text-anchor="middle"'))
    for value in range(0, int(top) + 1, 5):
        parts.append(_text(LEFT - 8, y(value) + 4, str(value), 'text-anchor="end"'))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "recall: share of the present objects that a caption"
                       " names, percent (right is better)", 'text-anchor="middle"'))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(_text(16, middle, "CHAIR_s: share of captions that name an absent object, percent (down is better)",
                       f'text-anchor="middle" transform="rotate(-90 16 {middle})"'))
    return parts


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'
