"""Line charts as SVG text. Colours are classes and ``currentColor``, so that a page's light or dark style decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from gmflow_core.inspection.charts import nice_ticks

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 230, 52, 12, 34, 26
POINTS = 500  # of a line; a longer one is averaged

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """Measured points, drawn pale, and their running mean above."""

    name: str
    points: Points
    smooth: bool = True


def chart(title: str, lines: Sequence[Line], *, width: int = 540,
          bounds: tuple[float | None, float | None] = (None, None),
          rule: tuple[float, str] | None = None, marks: Sequence[float] = ()) -> str:
    """Lines over steps with their names on the right above them; ``rule`` is a dashed level,
    ``marks`` are steps marked below.

    Nothing, if no line has a point.
    """
    lines = [Line(line.name, thinned(line.points), line.smooth) for line in lines if line.points]
    if not lines:
        return ""
    low, high = value_range([p for line in lines for p in line.points], bounds)
    last = max(line.points[-1][0] for line in lines)
    right, bottom = width - RIGHT, HEIGHT - BOTTOM

    def at(step: float, value: float) -> tuple[float, float]:
        value = min(max(value, low - (high - low)), high + (high - low))  # what is far outside is cut off anyway
        return (LEFT + step / (last or 1) * (right - LEFT), bottom - (value - low) / (high - low) * (bottom - TOP))

    parts = [f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">',
             text(LEFT - 44, 18, title, "title")]
    for value in nice_ticks(low, high):
        y = at(0, value)[1]
        parts += [f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
                  text(LEFT - 7, y + 4, number(value), "tick end")]
    for step in nice_ticks(0, last, 5):
        parts.append(text(at(step, low)[0], bottom + 18, number(step), "tick middle"))
    if rule and low <= rule[0] <= high:
        y = at(0, rule[0])[1]
        parts += [f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>',
                  text(right - 4, y - 5, rule[1], "tick end")]
    # A nested svg cuts off what lies outside of it.
    parts.append(f'<svg x="{LEFT}" y="{TOP - 2}" width="{right - LEFT}" height="{bottom - TOP + 4}" '
                 f'viewBox="{LEFT} {TOP - 2} {right - LEFT} {bottom - TOP + 4}">')
    for k, line in enumerate(lines):
        parts.append(path([at(*p) for p in line.points], f"c{k} {'raw' if line.smooth else 'line'}"))
        if line.smooth:
            parts.append(path([at(*p) for p in running_mean(line.points)], f"c{k} line"))
    parts.append("</svg>")
    parts += [f'<path class="mark" d="M{at(step, low)[0]:.1f} {bottom}v-7"/>' for step in marks]
    if len(lines) > 1:
        names = "".join(f'<tspan class="c{k}" dx="{10 if k else 0}">{escape(line.name)}</tspan>'
                        for k, line in enumerate(lines))
        parts.append(f'<text class="name end" x="{right}" y="18">{names}</text>')
    return "".join([*parts, "</svg>"])


def text(x: float, y: float, content: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def path(points: Points, style: str) -> str:
    if len(points) == 1:
        return f'<circle class="{style} dot" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.5"/>'
    return f'<path class="{style}" d="M{" ".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def number(value: float) -> str:
    """Short enough for an axis: 12k, 0.05, 2e-05."""
    if abs(value) >= 1e6 or (value and abs(value) < 1e-3):
        return f"{value:.3g}"
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"


def thinned(points: Points, most: int = POINTS) -> Points:
    """At most so many points: means of neighbours."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else []
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups] or points


def running_mean(points: Points, share: int = 20) -> Points:
    """Each value's mean with its neighbours, one part in ``share`` of all; at the ends with those that there are."""
    n, sums = len(points), [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    means = []
    for i, (step, _) in enumerate(points):
        start, end = max(0, i - n // share // 2), min(n, i + n // share // 2 + 1)
        means.append((step, (sums[end] - sums[start]) / (end - start)))
    return means


def value_range(points: Points, bounds: tuple[float | None, float | None]) -> tuple[float, float]:
    """Of all but the most extreme hundredth on either side, with a little air; ``bounds`` fix an end."""
    values = sorted(value for _, value in points)
    cut = len(values) // 100
    low, high = values[cut], values[-1 - cut]
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = (low - air if bounds[0] is None else bounds[0]), (high + air if bounds[1] is None else bounds[1])
    return (low, high) if high > low else (low, low + 1)
