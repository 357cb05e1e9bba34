"""Histograms of verifier scores, as plain SVG: how well a score separates correct from hallucinated objects.

Paper: FiSAO (arXiv 2410.14148), Figure 1 (scores of words and of sentences, correct against hallucinated) and
Figure 4 (scores of mentioned objects before and after training).

    write_histograms("scores.svg", [
        Panel("Words, before", "score of a word", {"correct": [61.2, ...], "hallucinated": [44.0, ...]}),
        Panel("Sentences, before", "score of a sentence", {"correct": [...], "hallucinated": [...]}),
    ])

Panels with the same label on the x-axis share its range, so they can be compared by eye. Heights are shares
of each series in percent: a small series is as visible as a large one. The legend gives the number of values
and their mean, which a dashed line marks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from common import written_whole

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
WIDTH, HEIGHT = 420, 260  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 48, 20, 66, 40  # margins within it


class Panel(NamedTuple):
    """One diagram: `series` maps a name to its values, at most four."""

    title: str
    xlabel: str
    series: Mapping[str, Sequence[float]]


def write_histograms(path: str | Path, panels: Sequence[Panel], *, bins: int = 30, columns: int = 2) -> None:
    """Write panels of overlaid histograms, `columns` side by side; the file appears whole or not at all.

    Raises ValueError naming a panel without series or with too many, and a series that is empty or has values
    that are not finite.
    """
    for panel in panels:
        _check(panel)
    if not panels or bins < 1 or columns < 1:
        raise ValueError(f"want at least one panel, bin and column, not {len(panels)}, {bins} and {columns}")
    parts = []
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        low, high = _range([p for p in panels if p.xlabel == panel.xlabel])
        parts.append(f'<g transform="translate({column * WIDTH} {row * HEIGHT})">')
        parts += [*_panel(panel, low, high, bins), "</g>"]
    width, height = min(columns, len(panels)) * WIDTH, math.ceil(len(panels) / columns) * HEIGHT
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">')
    background = f'<rect width="{width}" height="{height}" fill="white"/>'
    with written_whole(path) as temporary:
        temporary.write_text("\n".join([head, background, *parts, "</svg>", ""]), encoding="utf-8")


def shares(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    """Percent of the values in each of `bins` equal bins of [low, high]; `high` belongs to the last one."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    return [100 * count / len(values) for count in counts]


def _panel(panel: Panel, low: float, high: float, bins: int) -> list[str]:
    """The elements of one panel, in its own coordinates."""
    heights = {name: shares(values, low, high, bins) for name, values in panel.series.items()}
    top = max(map(max, heights.values()))
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    base = TOP + tall

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * wide

    parts = [_text(LEFT, 18, panel.title, "start", 'font-weight="bold"')]
    for i, (name, values) in enumerate(panel.series.items()):
        colour, mean = COLOURS[i], sum(values) / len(values)
        for b, height in enumerate(heights[name]):
            if height:
                tip = base - height / top * tall
                parts.append(f'<rect x="{LEFT + b * wide / bins:.1f}" y="{tip:.1f}" width="{wide / bins:.1f}"'
                             f' height="{base - tip:.1f}" fill="{colour}" fill-opacity="0.45"/>')
        parts.append(f'<line x1="{x(mean):.1f}" x2="{x(mean):.1f}" y1="{TOP}" y2="{base}" stroke="{colour}"'
                     ' stroke-width="1.5" stroke-dasharray="5 3"/>')
        legend_x, legend_y = LEFT + i % 2 * wide / 2, 34 + i // 2 * 16
        parts.append(f'<rect x="{legend_x:.1f}" y="{legend_y - 9}" width="10" height="10" fill="{colour}"'
                     ' fill-opacity="0.6"/>')
        parts.append(_text(legend_x + 14, legend_y, f"{name}: {len(values)}, mean {mean:.3g}", "start"))
    parts.append(f'<path d="M{LEFT} {TOP}V{base}H{LEFT + wide}" fill="none" stroke="black"/>')
    for i in range(5):
        value = low + i / 4 * (high - low)
        parts.append(_text(x(value), base + 15, f"{value:.3g}", "middle"))
    parts += [_text(LEFT - 5, TOP + 4, f"{top:.3g}%", "end"), _text(LEFT - 5, base + 4, "0%", "end")]
    return [*parts, _text(LEFT + wide / 2, base + 32, panel.xlabel, "middle")]


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _range(panels: Sequence[Panel]) -> tuple[float, float]:
    values = [value for panel in panels for series in panel.series.values() for value in series]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _check(panel: Panel) -> None:
    if not 1 <= len(panel.series) <= len(COLOURS):
        raise ValueError(f"panel {panel.title!r}: want 1 to {len(COLOURS)} series, found {len(panel.series)}")
    for name, values in panel.series.items():
        if not len(values) or not all(math.isfinite(value) for value in values):
            raise ValueError(f"panel {panel.title!r}: series {name!r} is empty or not finite")
