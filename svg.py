"""Plain SVG images: histograms, points with labels, and curves, in panels. Each function returns the text of a file.

    histograms([Panel("Words, before", "score", {"correct": [61.2, ...], "hallucinated": [...]})])
    scatters([Scatter("", "recall", "CHAIR_s", {"dpo": Point(83.9, 3.4, 0.6, 1.7)})])
    curves([Panel("loss", "step", {"dpo": [(1, 0.69), (2, 0.66)]})])
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#d1500a", "#17becf", "#8c564b", "#444444")
DASHES = ("none", "6 3", "2 2", "8 2 2 2")  # once the colours are used up
GREY = 'stroke="#999999" stroke-dasharray="4 3"'
SMALL, LARGE = (420, 260), (860, 560)  # width and height of a panel
LEFT, RIGHT, BOTTOM = 62, 20, 44  # margins; the upper one has the title and the legend
LINE, LETTER = 14, 6.4  # height of a line and mean width of a letter
LONGEST = 40  # letters of a label


class Panel(NamedTuple):
    """A diagram of some series: values in a histogram, (x, y) points in curves; finite, and at least one of each."""

    title: str
    xlabel: str
    series: Mapping[str, Sequence]


class Point(NamedTuple):
    """A mark at the mean of its runs, with a cross of one standard deviation to each side."""

    x: float
    y: float
    x_sd: float = 0.0
    y_sd: float = 0.0
    group: str = ""


class Scatter(NamedTuple):
    """A diagram of labelled points, both axes in percent; the guide is a dashed line."""

    title: str
    xlabel: str
    ylabel: str
    points: Mapping[str, Point]
    guide: Sequence[tuple[float, float]] = ()
    guide_name: str = ""


class Axes(NamedTuple):
    """Where a panel shows a value, in pixels; head is the upper margin."""

    left: float
    right: float
    bottom: float
    top: float
    width: int
    height: int
    head: int

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        base = self.height - BOTTOM
        return base - (value - self.bottom) / (self.top - self.bottom) * (base - self.head)

    def frame(self, title: str, xlabel: str, ylabel: str) -> list[str]:
        """Both axes with their ticks and labels, and the title."""
        base, end, middle = self.height - BOTTOM, self.width - RIGHT, (self.head + self.height - BOTTOM) / 2
        parts = [f'<path d="M{LEFT} {self.head}V{base}H{end}" fill="none" stroke="black"/>']
        parts += [_text(self.x(v), base + 15, f"{v:g}", 'text-anchor="middle"') for v in ticks(self.left, self.right)]
        parts += [_text(LEFT - 5, self.y(v) + 4, f"{v:g}", 'text-anchor="end"') for v in ticks(self.bottom, self.top)]
        turned = f'text-anchor="middle" transform="rotate(-90 14 {middle:g})"'
        return [*parts, _text((LEFT + end) / 2, base + 33, xlabel, 'text-anchor="middle"'),
                _text(14, middle, ylabel, turned), _text(LEFT, 18, title, 'font-weight="bold"')]


def histograms(panels: Sequence[Panel], *, bins: int = 30) -> str:
    """Overlaid histograms; panels with the same label of the x-axis share its range.

    Heights are percent of each series, so a small one is as visible as a large one. The legend gives the number of
    values and their mean, which a dashed line marks.
    """
    drawn = []
    for panel in panels:
        alike = [p for p in panels if p.xlabel == panel.xlabel]
        drawn.append(_histogram(panel, *_range(v for p in alike for series in p.series.values() for v in series), bins))
    return _page(drawn, *SMALL)


def curves(panels: Sequence[Panel]) -> str:
    """Lines through (x, y) points."""
    return _page([_curves(panel) for panel in panels], *SMALL)


def scatters(panels: Sequence[Scatter]) -> str:
    """Labelled points in the colours of their groups."""
    return _page([_scatter(panel) for panel in panels], *LARGE, columns=1)


def shares(values: Sequence[float], low: float, high: float, bins: int) -> list[float]:
    """Percent of the values in each of `bins` equal bins of [low, high]; `high` belongs to the last one."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low) * bins))] += 1
    return [100 * count / len(values) for count in counts]


def ticks(low: float, high: float) -> list[float]:
    """At most seven round values in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    least = (high - low) / 6 * (1 - 1e-9)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= least)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def label_places(marks: Sequence[tuple[float, float]], names: Sequence[str], axes: Axes) -> list[tuple[float, float]]:
    """Where each label begins: the free place nearest to its mark that covers no mark and no other label."""
    taken = [(a - 5, b - 5, a + 5, b + 5) for a, b in marks]  # left, top, right, bottom
    places = []
    for (a, b), name in zip(marks, names):
        width = LETTER * len(name)
        tries = [(a + 8 + right, b + 4 + down) for right in (0, 12, 24, 40, 60, -width - 16, -width - 40)
                 for down in range(-10 * LINE, 10 * LINE + 1, LINE // 2)]
        tries = [(u, v) for u, v in tries if u + width < axes.width and axes.head < v < axes.height - BOTTOM - 2]
        tries.sort(key=lambda place: abs(place[0] - a - 8) + abs(place[1] - b - 4))
        boxes = [(u, v - LINE + 3, u + width, v + 3) for u, v in tries]
        free = next((i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)), 0)
        places.append(tries[free])
        taken.append(boxes[free])
    return places


def _histogram(panel: Panel, low: float, high: float, bins: int) -> list[str]:
    heights = [shares(values, low, high, bins) for values in panel.series.values()]
    means = [sum(values) / len(values) for values in panel.series.values()]
    names = [f"{name}: {len(v)}, mean {mean:.3g}" for (name, v), mean in zip(panel.series.items(), means)]
    parts, head = _legend({name: _stroke(i) for i, name in enumerate(names)}, SMALL[0])
    axes = Axes(low, high, 0, max(map(max, heights)), *SMALL, head)
    wide = (axes.x(high) - axes.x(low)) / bins
    for i, (series, mean) in enumerate(zip(heights, means)):
        parts += [f'<rect x="{LEFT + b * wide:.1f}" y="{axes.y(share):.1f}" width="{wide:.1f}"'
                  f' height="{axes.y(0) - axes.y(share):.1f}" fill="{COLOURS[i % len(COLOURS)]}" fill-opacity="0.45"/>'
                  for b, share in enumerate(series) if share]
        parts.append(f'<path d="M{axes.x(mean):.1f} {head}V{axes.y(0):.1f}" stroke="{COLOURS[i % len(COLOURS)]}"'
                     ' stroke-width="1.5" stroke-dasharray="5 3"/>')
    return parts + axes.frame(panel.title, panel.xlabel, "% of each series")


def _curves(panel: Panel) -> list[str]:
    parts, head = _legend({name: _stroke(i) for i, name in enumerate(panel.series)}, SMALL[0])
    points = [point for series in panel.series.values() for point in series]
    axes = Axes(*_range(x for x, _ in points), *_range(y for _, y in points), *SMALL, head)
    for i, series in enumerate(panel.series.values()):
        line = "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in series)
        parts.append(f'<path d="M{line}h0" fill="none" stroke-width="1.5" stroke-linecap="round" {_stroke(i)}/>')
    return parts + axes.frame(panel.title, panel.xlabel, "")


def _scatter(panel: Scatter) -> list[str]:
    points = panel.points.values()
    groups = {group: i for i, group in enumerate(dict.fromkeys(point.group for point in points))}
    named = {group: _stroke(i) for group, i in groups.items() if group}
    parts, head = _legend(named | ({panel.guide_name: GREY} if panel.guide else {}), LARGE[0])
    low, high = min(p.x - p.x_sd for p in points) - 2, max(p.x + p.x_sd for p in points) + 5  # room for the labels
    axes = Axes(low, high, 0, 1.08 * max(1.0, *(p.y + p.y_sd for p in points)), *LARGE, head)
    if line := "L".join(f"{axes.x(x):.1f} {axes.y(y):.1f}" for x, y in panel.guide if x >= low):
        parts.append(f'<path d="M{line}" fill="none" {GREY}/>')
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in panel.points]
    for name, p, (u, v) in zip(names, points, label_places([(axes.x(p.x), axes.y(p.y)) for p in points], names, axes)):
        a, b, colour = axes.x(p.x), axes.y(p.y), COLOURS[groups[p.group] % len(COLOURS)]
        parts += [f'<path d="M{axes.x(p.x - p.x_sd):.1f} {b:.1f}H{axes.x(p.x + p.x_sd):.1f}'
                  f'M{a:.1f} {axes.y(max(0.0, p.y - p.y_sd)):.1f}V{axes.y(p.y + p.y_sd):.1f}"'
                  f' stroke="{colour}" stroke-opacity="0.3"/>',
                  f'<path d="M{a:.1f} {b:.1f}L{u - 2:.1f} {v - 4:.1f}" stroke="{colour}" stroke-opacity="0.5"/>',
                  f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"/>',
                  _text(u, v, name, f'fill="{colour}"')]
    return parts + axes.frame(panel.title, panel.xlabel, panel.ylabel)


def _legend(strokes: Mapping[str, str], width: int) -> tuple[list[str], int]:
    """A dash and the name of each series below the title, and the height of both."""
    parts, x, y = [], LEFT, 36
    for name, stroke in strokes.items():
        wide = 34 + LETTER * len(name)
        if x > LEFT and x + wide > width:
            x, y = LEFT, y + 16
        parts += [f'<path d="M{x:.1f} {y - 4}h14" stroke-width="3" {stroke}/>', _text(x + 18, y, name)]
        x += wide
    return parts, y + 14 if strokes else 30


def _page(drawn: Sequence[list[str]], width: int, height: int, columns: int = 2) -> str:
    """Panels side by side, `columns` in a row."""
    parts = [f'<g transform="translate({i % columns * width} {i // columns * height})">\n' + "\n".join(panel) + "\n</g>"
             for i, panel in enumerate(drawn)]  # fmt: skip
    width, height = min(columns, len(drawn)) * width, math.ceil(len(drawn) / columns) * height
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
            f' font-family="sans-serif" font-size="11"><rect width="{width}" height="{height}" fill="white"/>')
    return "\n".join([head, *parts, "</svg>", ""])


def _stroke(i: int) -> str:
    dash = DASHES[i // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-dasharray="{dash}"'


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _range(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
