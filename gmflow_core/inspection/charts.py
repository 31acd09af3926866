"""Charts drawn with Pillow: lines with a band, shares, one pixel's mixture. Drawn at twice the size and reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..mixture import Mixture
from ..pictures import FAINT, PAPER, TEXT, font, text_width

# Okabe and Ito's palette and four more: told apart by the colour-blind as far as twelve colours can be.
PALETTE = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233),
    (240, 228, 66), (117, 112, 179), (166, 118, 29), (102, 166, 30), (231, 41, 138), (100, 100, 100),
)
GRID = (226, 226, 222)
MARK = (20, 20, 24, 110)
REST = (214, 214, 210)


def component_colour(k: int) -> tuple[int, int, int]:
    """Twelve colours; past them the same ones paler, then darker, then paler again."""
    turn, base = k // len(PALETTE), PALETTE[k % len(PALETTE)]
    target, amount = (255 if turn % 2 else 0), (0, 0.4, 0.65, 0.8)[min((turn + 1) // 2, 3)]
    red, green, blue = (round(c + amount * (target - c)) for c in base)
    return red, green, blue


def component_colours(count: int) -> list[tuple[int, int, int]]:
    return [component_colour(k) for k in range(count)]


@dataclass(frozen=True)
class Series:
    """A line: values over sigma, with an optional band around it."""

    name: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Axes:
    """A plotting area: data coordinates to pixels of a canvas twice the wanted size."""

    def __init__(self, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float], margin=(54, 16, 36, 48)):
        from PIL import Image, ImageDraw

        left, right, top, bottom = margin
        self.size, self.x, self.y = size, x, y if y[1] > y[0] else (y[0], y[0] + 1)
        self.box = (2 * left, 2 * top, 2 * (size[0] - right), 2 * (size[1] - bottom))
        self.image = Image.new("RGB", (2 * size[0], 2 * size[1]), PAPER)
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def at(self, x: float, y: float) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        u = (x - self.x[0]) / (self.x[1] - self.x[0])
        v = (y - self.y[0]) / (self.y[1] - self.y[0])
        return x0 + u * (x1 - x0), y1 - v * (y1 - y0)

    def frame(self, title: str, x_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        """Grid, tick labels and titles."""
        x0, y0, x1, y1 = self.box
        for value in y_ticks:
            _, py = self.at(self.x[0], value)
            self.pen.line((x0, py, x1, py), GRID, 2)
            self.pen.text((x0 - 12, py), _tick(value), FAINT, font(28), anchor="rm")
        for value in x_ticks:
            px, _ = self.at(value, self.y[0])
            self.pen.line((px, y1, px, y1 + 8), FAINT, 2)
            self.pen.text((px, y1 + 12), _tick(value), FAINT, font(28), anchor="ma")
        self.pen.line((x0, y1, x1, y1), FAINT, 2)
        self.pen.text((x0, y0 - 18), title, TEXT, font(30), anchor="ls")
        self.pen.text((x1, y1 + 48), x_label, FAINT, font(28), anchor="ra")

    def names(self, names: Sequence[str], colours: Sequence) -> None:
        """What the lines are, each behind a dash of its colour, in the chart from the top right, in rows if need be."""
        x, y = self.box[2], self.box[1] + 22
        for name, colour in reversed(list(zip(names, colours, strict=True))):
            width = text_width(name, 28) + 34
            if x - width < self.box[0]:
                x, y = self.box[2], y + 34
            self.pen.text((x, y), name, TEXT, font(28), anchor="rm")
            self.pen.line((x - width, y, x - width + 24, y), colour, 8)
            x -= width + 26

    def mark(self, x: float) -> None:
        """A vertical line: you are here."""
        px, _ = self.at(x, self.y[0])
        self.pen.line((px, self.box[1], px, self.box[3]), MARK, 3)

    def picture(self):
        from PIL import Image

        return self.image.resize(self.size, Image.Resampling.LANCZOS)


def nice_ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    raw = max((high - low) / count, 1.0 if whole else 0.0)
    unit = 10 ** math.floor(math.log10(raw))
    factors, least = ((1, 2, 5, 10), 0.9 * raw) if whole else ((1, 2, 2.5, 5, 10), 0.999 * raw)
    step = next(m * unit for m in factors if m * unit >= least)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    """A tick's number, short enough for the margin."""
    text = f"{value:g}"
    if len(text) <= 6:
        return text
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


SIGMAS = (1, 0.75, 0.5, 0.25, 0)


def line_chart(
    title: str, sigmas: Sequence[float], series: Sequence[Series], size=(440, 250), top: float | None = None,
    now: float | None = None, whole: bool = False,
):
    """Values against sigma, from noise (left) to image (right); a named line each, in the palette's colours."""
    highest = max(max(s.high or s.values) for s in series)
    head = 1.05 if len(series) == 1 else 1.2  # room for their names
    top = head * highest or 1.0 if top is None else top
    axes = Axes(size, (1.0, 0.0), (0.0, top))
    axes.frame(title, "sigma", SIGMAS, nice_ticks(0, top, whole=whole))
    colours = component_colours(len(series))
    for line, colour in zip(series, colours, strict=True):
        if line.low is not None and line.high is not None:
            _band(axes, sigmas, line.low, line.high, (*colour, 48))
    for line, colour in zip(series, colours, strict=True):
        points = [axes.at(s, v) for s, v in zip(sigmas, line.values, strict=True)]
        axes.pen.line(points, colour, 5, joint="curve")
        radius = 6 if len(points) <= 20 else 0
        for px, py in points if len(points) > 1 else [(_inside(axes, points[0][0]), points[0][1])]:
            axes.pen.ellipse((px - radius, py - radius, px + radius, py + radius), colour)
    if now is not None:
        axes.mark(now)
    if len(series) > 1:
        axes.names([line.name for line in series], colours)
    return axes.picture()


def share_chart(title: str, sigmas: Sequence[float], shares: Sequence[Sequence[float]], size=(440, 250),
                now: float | None = None):
    """Shares of every step (steps, parts) on top of each other against sigma, in per cent, each with its number.

    Parts past the twelfth are one grey area, with what no part holds.
    """
    axes, last, most = Axes(size, (1.0, 0.0), (0.0, 100.0)), len(sigmas) - 1, len(PALETTE)
    axes.frame(title, "sigma", SIGMAS, (0, 25, 50, 75, 100))
    edges = [[100 * sum(row[:k]) for row in shares] for k in range(len(shares[0]) + 1)]
    if len(edges) > most + 2 or min(edges[-1]) < 99.5:
        edges, most = [*edges[: most + 1], [100.0] * len(sigmas)], min(most, len(edges) - 1)
    for k, (low, high) in enumerate(pairwise(edges)):
        colour = component_colour(k) if k < most else REST
        _band(axes, sigmas, low, high, colour)
        i = max(range(len(sigmas)), key=lambda i: high[i] - low[i])             # where there is most room
        (px, bottom), (_, top) = axes.at(sigmas[i], low[i]), axes.at(sigmas[i], high[i])
        if bottom - top > 26:
            text = f"{k + 1}" if k < most else "others"
            ink = (255, 255, 255) if sum(colour) < 330 else TEXT
            half, ends = 12 + text_width(text, 26) / 2, [axes.at(s, 0)[0] for s in (sigmas[0], sigmas[-1])]
            px = min(max(px, ends[0] + half), ends[1] - half) if last else _inside(axes, px)  # within its area
            axes.pen.text((px, (bottom + top) / 2), text, ink, font(26), anchor="mm")
    if now is not None:
        axes.mark(now)
    return axes.picture()


def _inside(axes: Axes, px: float) -> float:
    """Not too near the chart's sides: where a bar or a point has room."""
    return min(max(px, axes.box[0] + 24), axes.box[2] - 24)


def _band(axes: Axes, sigmas: Sequence[float], low: Sequence[float], high: Sequence[float], colour) -> None:
    """The area between two lines; of a single step, a bar."""
    if len(sigmas) > 1:
        edges = [[axes.at(s, v) for s, v in zip(sigmas, line, strict=True)] for line in (high, low)]
        axes.pen.polygon(edges[0] + edges[1][::-1], colour)
    else:
        (px, bottom), (_, top) = axes.at(sigmas[0], low[0]), axes.at(sigmas[0], high[0])
        middle = _inside(axes, px)
        axes.pen.rectangle((middle - 24, min(top, bottom), middle + 24, bottom), colour)


def scatter_chart(mixture: Mixture, colours: Sequence[tuple[int, int, int]], size=(326, 340)):
    """One pixel's components (1,K,C,1,1) in the two principal axes of their means: discs with areas as weights, the
    heavy ones with their numbers, circles of one standard deviation, a cross at the mean. Both axes have one scale."""
    means, weights = mixture.means[0, :, :, 0, 0].double(), mixture.weights[0, :, 0, 0, 0].double()
    std = float(mixture.log_std.exp())
    centre = (weights[:, None] * means).sum(0)
    offsets = means - centre
    _, axes_of = torch.linalg.eigh((weights[:, None] * offsets).T @ offsets)
    flat = offsets @ axes_of[:, -min(2, means.shape[1]):].flip(1)               # (K,2)
    flat = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
    reach = 1.12 * max(float(flat.abs().max()) + std, 1e-3)
    axes = Axes(size, (-reach, reach), (-reach, reach))
    ticks = nice_ticks(-reach, reach)
    axes.frame("components in two principal axes", "1st and 2nd axis, units of x_0", ticks, ticks)
    ring, faint = std * (axes.box[2] - axes.box[0]) / (2 * reach), (*FAINT, 190 if len(weights) <= 16 else 60)
    heaviest = weights.argsort(descending=True).tolist()
    places = {k: (*axes.at(*flat[k].tolist()), 46 * math.sqrt(float(weights[k]))) for k in heaviest}
    for k, (px, py, disc) in places.items():
        axes.pen.ellipse((px - disc, py - disc, px + disc, py + disc), (*colours[k], 235),
                         outline=(60, 60, 60, 200), width=2)
    for px, py, _ in places.values():
        axes.pen.ellipse((px - ring, py - ring, px + ring, py + ring), outline=faint, width=2)
    px, py = axes.at(0, 0)
    for dx, dy in ((12, 0), (0, 12)):
        axes.pen.line((px - dx, py - dy, px + dx, py + dy), PAPER, 8)
    for dx, dy in ((12, 0), (0, 12)):
        axes.pen.line((px - dx, py - dy, px + dx, py + dy), TEXT, 4)
    for k in heaviest[:6]:
        px, py, disc = places[k]
        if weights[k] > 0.02:
            axes.pen.text((px + 0.75 * disc + 4, py - 0.75 * disc - 2), str(k + 1), TEXT, font(26), anchor="lb",
                          stroke_width=3, stroke_fill=PAPER)
    return axes.picture()


def marginal_chart(mixture: Mixture, names: Sequence[str], size=(420, 340)):
    """The 1D marginal densities of one pixel's mixture (1,K,C,1,1), a line for each channel."""
    means, weights = mixture.means[0, :, :, 0, 0].double(), mixture.weights[0, :, 0, 0, 0].double()
    std = max(float(mixture.log_std.exp()), 1e-4)
    low, high = float(means.min()) - 3.5 * std, float(means.max()) + 3.5 * std
    grid = marginal_grid(means, std, low, high)
    density = marginal_density(means, weights, std, grid)                       # (C,N)
    top = 1.2 * float(density.max())                                            # with room for the names
    axes = Axes(size, (low, high), (0.0, top))
    axes.frame("marginal densities", "x_0", nice_ticks(low, high), nice_ticks(0, top))
    colours = channel_colours(names)
    # The first are wide: they show beside those that hide them.
    for i, (channel, colour) in enumerate(zip(density, colours, strict=True)):
        curve = [axes.at(x, y) for x, y in zip(grid.tolist(), channel.tolist(), strict=True)]
        axes.pen.line(curve, colour, max(4, 10 - 3 * i), joint="curve")
    axes.names(names, colours)
    return axes.picture()


def weight_bars(weights: Sequence[float], colours: Sequence[tuple[int, int, int]], groups: Sequence[int] | None = None,
                size=(250, 340), rows: int = 10):
    """The heaviest of one pixel's components as bars with their share and number; the rest as a sum.

    ``groups``: the hypothesis of each, whose number and colour come last.
    """
    from PIL import Image, ImageDraw

    order = sorted(range(len(weights)), key=lambda k: -weights[k])
    canvas = Image.new("RGB", size, PAPER)
    pen, full = ImageDraw.Draw(canvas), (size[0] - (110 if groups is None else 160)) / max(weights)
    pen.text((0, 27), "weights", TEXT, font(15), anchor="ls")
    if groups is not None:
        pen.text((size[0] - 4, 27), "hypothesis", FAINT, font(14), anchor="rs")
    for i, k in enumerate(order[:rows]):
        y = 50 + 26 * i
        pen.text((24, y), str(k + 1), FAINT, font(14), anchor="rm")
        pen.rectangle((34, y - 8, 34 + max(1, round(full * weights[k])), y + 8), colours[k])
        pen.text((40 + full * weights[k], y), f"{100 * weights[k]:.1f} %", TEXT, font(14), anchor="lm")
        if groups is not None:
            pen.rectangle((size[0] - 50, y - 6, size[0] - 39, y + 5), component_colour(groups[k]))
            pen.text((size[0] - 32, y), str(groups[k] + 1), FAINT, font(14), anchor="lm")
    if order[rows:]:
        rest = sum(weights[k] for k in order[rows:])
        pen.text((34, 50 + 26 * rows), f"{len(order) - rows} more: {100 * rest:.1f} %", FAINT, font(14), anchor="lm")
    return canvas


def marginal_grid(means: Tensor, std: float, low: float, high: float) -> Tensor:
    """Points (N,) of a curve over [low, high], close together around every mean (K,C), however narrow the
    components are."""
    around = means.flatten()[:, None] + std * torch.linspace(-4, 4, 33, dtype=torch.float64)
    return torch.cat([torch.linspace(low, high, 400, dtype=torch.float64), around.flatten()]).clamp(low, high).unique()


def marginal_density(means: Tensor, weights: Tensor, std: float, grid: Tensor) -> Tensor:
    r"""p(x_c) = sum_k w_k N(x_c; mean_kc, std^2) on a grid: (K,C), (K,) and (N,) to (C,N)."""
    z = (grid - means.unsqueeze(-1)) / std                                      # (K,C,N)
    return (weights[:, None, None] * torch.exp(-0.5 * z.square())).sum(0) / (std * math.sqrt(2 * math.pi))


def channel_colours(names: Sequence[str]) -> list[tuple[int, int, int]]:
    if list(names) == ["R", "G", "B"]:
        return [(214, 60, 50), (40, 150, 70), (50, 90, 210)]
    return component_colours(len(names) + 7)[7:]  # others than those of a few components
