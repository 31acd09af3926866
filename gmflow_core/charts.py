"""Charts drawn with Pillow: lines with a band, one pixel's mixture, legends. Drawn at twice the size and reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mixture import GaussianMixture
from .pictures import FAINT, PAPER, TEXT, font, text_width

# Okabe and Ito's palette and four more: told apart by the colour-blind as far as twelve colours can be.
PALETTE = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233),
    (240, 228, 66), (117, 112, 179), (166, 118, 29), (102, 166, 30), (231, 41, 138), (100, 100, 100),
)
GRID = (226, 226, 222)


def component_colour(k: int) -> tuple[int, int, int]:
    return PALETTE[k % len(PALETTE)]


@dataclass(frozen=True)
class Series:
    """A line: values over sigma, with an optional band around it."""

    name: str
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


class Axes:
    """A plotting area: data coordinates to pixels of a canvas twice the wanted size."""

    def __init__(self, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float], margin=(52, 14, 30, 40)):
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
            self.pen.text((x0 - 10, py), f"{value:g}", FAINT, font(24), anchor="rm")
        for value in x_ticks:
            px, _ = self.at(value, self.y[0])
            self.pen.line((px, y1, px, y1 + 8), FAINT, 2)
            self.pen.text((px, y1 + 12), f"{value:g}", FAINT, font(24), anchor="ma")
        self.pen.line((x0, y1, x1, y1), FAINT, 2)
        self.pen.text((x0, y0 - 14), title, TEXT, font(28), anchor="ls")
        self.pen.text((x1, y1 + 42), x_label, FAINT, font(24), anchor="ra")

    def picture(self):
        from PIL import Image

        return self.image.resize(self.size, Image.Resampling.LANCZOS)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers within [low, high], about ``count`` of them."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, sigmas: Sequence[float], series: Sequence[Series], size=(440, 230), top: float | None = None):
    """Values against sigma, from noise (left) to image (right); a named line each, in the palette's colours."""
    highest = max(max(s.high or s.values) for s in series)
    top = max(highest * 1.05, 1e-6) if top is None else top
    axes = Axes(size, (1.0, 0.0), (0.0, top))
    axes.frame(title, "sigma", (1, 0.75, 0.5, 0.25, 0), nice_ticks(0, top))
    for k, line in enumerate(series):
        colour = component_colour(k)
        if line.low is not None:
            edge = [axes.at(s, v) for s, v in zip(sigmas, line.high)] + [axes.at(s, v) for s, v in zip(sigmas, line.low)][::-1]
            if len(sigmas) > 1:
                axes.pen.polygon(edge, (*colour, 48))
        points = [axes.at(s, v) for s, v in zip(sigmas, line.values)]
        axes.pen.line(points, colour, 5, joint="curve")
        for px, py in points:
            axes.pen.ellipse((px - 6, py - 6, px + 6, py + 6), colour)
    if len(series) > 1:
        x = axes.box[2]
        for k, line in reversed(list(enumerate(series))):
            x -= text_width(line.name, 24)
            axes.pen.text((x, axes.box[1] - 14), line.name, component_colour(k), font(24), anchor="ls")
            x -= 24
    return axes.picture()


def legend(colours: Sequence[tuple[int, int, int]], names: Sequence[str]):
    """Swatches with names, one below the other."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (34 + max(text_width(name, 14) for name in names), 24 * len(names)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, (colour, name) in enumerate(zip(colours, names)):
        pen.rectangle((0, 24 * i + 4, 16, 24 * i + 20), colour)
        pen.text((26, 24 * i + 12), name, TEXT, font(14), anchor="lm")
    return canvas


def scatter_chart(mixture: GaussianMixture, colours: Sequence[tuple[int, int, int]], size: int = 340):
    """One pixel's components (1,K,C,1,1) in the two principal axes of their means: discs with areas as weights,
    circles of one standard deviation, a cross at the mean."""
    means, weights = mixture.means[0, :, :, 0, 0].double(), mixture.weights[0, :, 0, 0, 0].double()
    std = float(mixture.log_std.exp())
    centre = (weights[:, None] * means).sum(0)
    offsets = means - centre
    _, axes_of = torch.linalg.eigh((weights[:, None] * offsets).T @ offsets)
    flat = offsets @ axes_of[:, -min(2, means.shape[1]):].flip(1)               # (K,2)
    flat = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
    reach = 1.12 * max(float(flat.abs().max()) + std, 1e-3)
    axes = Axes((size, size), (-reach, reach), (-reach, reach))
    ticks = nice_ticks(-reach, reach)
    axes.frame("components in their two principal axes", "1st axis", ticks, ticks)
    scale = (axes.box[2] - axes.box[0]) / (2 * reach)
    for k in weights.argsort(descending=True).tolist():
        (px, py), disc, ring = axes.at(*flat[k].tolist()), 46 * math.sqrt(float(weights[k])), std * scale
        axes.pen.ellipse((px - ring, py - ring, px + ring, py + ring), outline=(*FAINT, 150), width=2)
        axes.pen.ellipse((px - disc, py - disc, px + disc, py + disc), (*colours[k], 235), outline=(60, 60, 60, 200), width=2)
    px, py = axes.at(0, 0)
    for dx, dy in ((12, 0), (0, 12)):
        axes.pen.line((px - dx, py - dy, px + dx, py + dy), TEXT, 4)
    return axes.picture()


def marginal_chart(mixture: GaussianMixture, names: Sequence[str], size=(340, 340)):
    """The 1D marginal densities of one pixel's mixture (1,K,C,1,1), a line for each channel."""
    means, weights = mixture.means[0, :, :, 0, 0].double(), mixture.weights[0, :, 0, 0, 0].double()
    std = max(float(mixture.log_std.exp()), 1e-4)
    low, high = float(means.min()) - 3.5 * std, float(means.max()) + 3.5 * std
    grid = torch.linspace(low, high, 400, dtype=torch.float64)
    density = marginal_density(means, weights, std, grid)                       # (C,400)
    axes = Axes(size, (low, high), (0.0, 1.08 * float(density.max())))
    axes.frame("marginal densities", "x_0", nice_ticks(low, high), nice_ticks(0, 1.08 * float(density.max())))
    colours = channel_colours(names)
    for channel, colour in zip(density, colours):
        axes.pen.line([axes.at(x, y) for x, y in zip(grid.tolist(), channel.tolist())], colour, 5, joint="curve")
    x = axes.box[2]
    for name, colour in reversed(list(zip(names, colours))):
        x -= text_width(name, 24)
        axes.pen.text((x, axes.box[1] - 14), name, colour, font(24), anchor="ls")
        x -= 20
    return axes.picture()


def marginal_density(means: Tensor, weights: Tensor, std: float, grid: Tensor) -> Tensor:
    r"""p(x_c) = sum_k w_k N(x_c; mean_kc, std^2) on a grid: (K,C), (K,) and (N,) to (C,N)."""
    z = (grid - means.unsqueeze(-1)) / std                                      # (K,C,N)
    return (weights[:, None, None] * torch.exp(-0.5 * z.square())).sum(0) / (std * math.sqrt(2 * math.pi))


def channel_colours(names: Sequence[str]) -> list[tuple[int, int, int]]:
    if list(names) == ["R", "G", "B"]:
        return [(214, 60, 50), (40, 150, 70), (50, 90, 210)]
    return [component_colour(k) for k in range(len(names))]
