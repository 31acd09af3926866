"""Panels of what a mixture believes along a trace.

A panel needs ``decode``: x_0 (N,C,H,W) to RGB (N,3,H',W') in [-1, 1], a VAE or the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .charts import Series, component_colour, legend, line_chart, marginal_chart, scatter_chart
from .inspect import dominance, dominant_component, effective_components, hypotheses, mean_weights, rank, spread, weight_entropy
from .mixture import GaussianMixture
from .pictures import FAINT, PAPER, colour_bar, font, heat, image_grid, sheet, to_uint8
from .trace import Trace, TraceStep, pick, step_statistics

ORDERS = ("aligned", "ranked", "raw")
PANEL = 192  # pixels of one picture's longer side, at least

Decode = Callable[[Tensor], Tensor]


def ordered(mixture: GaussianMixture, order: str, count: int) -> GaussianMixture:
    """At most ``count`` components, comparable over the image (aligned), by weight per pixel (ranked) or as they are."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    count = min(count, mixture.components)
    if order == "aligned":
        return hypotheses(mixture, count)
    mixture = rank(mixture) if order == "ranked" else mixture
    return GaussianMixture(mixture.means[:, :count], mixture.log_weights[:, :count], mixture.log_std)


@dataclass(frozen=True, eq=False)
class Scene:
    """Everything that a view may draw: one step of one image, and the trace around it."""

    trace: Trace
    image: int
    step: TraceStep
    title: str
    mixture: GaussianMixture      # the corrected mixture, ordered and cut to size
    decode: Decode
    pixel: tuple[int, int]        # (x, y) in the latent

    def mean(self) -> Tensor:
        return self.decode(self.step.corrected.mean())


def draw(
    trace: Trace, view: str, step: int, image: int, order: str, count: int, decode: Decode,
    pixel: tuple[int, int] | None = None,
):
    """One panel as a Pillow image; ValueError for a view, step, image or pixel that does not exist.

    ``pixel`` is (x, y) in the latent, for the view of that name; its middle if None.
    """
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
    chosen = pick(trace, step, image)
    height, width = chosen.x.shape[-2:]
    pixel = (width // 2, height // 2) if pixel is None else pixel
    if not (0 <= pixel[0] < width and 0 <= pixel[1] < height):
        raise ValueError(f"pixel: got x {pixel[0]}, y {pixel[1]}; this latent is {width} wide and {height} high, counted from 0")
    number = step % len(trace.steps)
    title = f"Step {number + 1} of {len(trace.steps)}, sigma {chosen.sigma:.3f}"
    return VIEWS[view](Scene(trace, image, chosen, title, ordered(chosen.corrected, order, count), decode, pixel))


# ---- tiles -------------------------------------------------------------------------------------

def _scale(picture: Tensor) -> int:
    return max(1, math.ceil(PANEL / max(picture.shape[-2:])))


def _tile(images: Tensor):
    return image_grid(images, 1, _scale(images))


def _labelled(images: Tensor, captions: list[str], columns: int = 4):
    """Tiles in rows, each with a caption beneath."""
    from PIL import Image, ImageDraw

    tiles = [_tile(picture[None]) for picture in images]
    width, height, foot = tiles[0].width, tiles[0].height, 24
    columns = min(columns, len(tiles))
    canvas = Image.new("RGB", (columns * (width + 8) - 8, -(-len(tiles) // columns) * (height + foot)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, (tile, caption) in enumerate(zip(tiles, captions)):
        x, y = i % columns * (width + 8), i // columns * (height + foot)
        canvas.paste(tile, (x, y))
        pen.text((x + width / 2, y + height + 4), caption, FAINT, font(14), anchor="ma")
    return canvas


def _captions(mixture: GaussianMixture) -> list[str]:
    return [f"{k + 1}: {100 * share:.1f} %" for k, share in enumerate(mean_weights(mixture)[0].tolist())]


def _faded(scene: Scene, count: int) -> Tensor:
    """Each component's mean, towards grey where it has little weight: a mean that nobody believes says nothing."""
    pictures, weights = scene.decode(scene.mixture.means[0, :count]), scene.mixture.weights[0, :count]
    opacity = (weights / weights.amax((2, 3), keepdim=True).clamp(min=1e-6)).sqrt()
    return pictures * torch.nn.functional.interpolate(opacity, size=pictures.shape[-2:], mode="nearest")


def _columns(count: int) -> int:
    return 4 if count <= 12 else 8


# ---- views -------------------------------------------------------------------------------------

def _components(scene: Scene):
    tiles = _labelled(_faded(scene, scene.mixture.components), _captions(scene.mixture), _columns(scene.mixture.components))
    titles = ["mean", "components with their share of the weight, grey where they have none"]
    return sheet([[_tile(scene.mean()), tiles]], [], titles, scene.title)


def _weights(scene: Scene):
    maps = heat(scene.mixture.weights[0, :, 0], 0, 1)
    tiles = _labelled(maps, _captions(scene.mixture), _columns(scene.mixture.components))
    row = [_tile(scene.mean()), tiles, colour_bar(0, 1, "weight", PANEL)]
    return sheet([row], [], ["mean", "weight of each component", ""], scene.title)


def _winner_map(scene: Scene):
    """The heaviest component of each pixel in its colour, and a legend with shares of the pixels."""
    colours = torch.tensor([component_colour(k) for k in range(scene.mixture.components)]) / 127.5 - 1
    picture = colours[dominant_component(scene.mixture)[0]].movedim(-1, 0)[None]
    shares = dominance(scene.mixture)[0].tolist()
    shown = [k for k, share in enumerate(shares) if share > 0]
    names = [f"{k + 1}: {100 * shares[k]:.1f} % of pixels" for k in shown]
    return _tile(picture), legend([component_colour(k) for k in shown], names)


def _winners(scene: Scene):
    return sheet([[_tile(scene.mean()), *_winner_map(scene)]], [], ["mean", "heaviest component", ""], scene.title)


def _entropy(scene: Scene):
    whole = scene.step.corrected
    bits, top = weight_entropy(whole), math.log2(whole.components) or 1.0
    row = [_tile(scene.mean()), _tile(heat(bits, 0, top)), colour_bar(0, top, "bits", PANEL)]
    note = f"{bits.mean():.2f} bits on average: {effective_components(whole).mean():.2f} effective components of {whole.components}"
    return sheet([row], [], ["mean", "entropy of the weights", ""], scene.title, note)


def _spread(scene: Scene):
    parts = spread(scene.step.corrected)
    top = float(parts.total.max()) or 1.0
    maps = [_tile(heat(part, 0, top)) for part in (parts.within, parts.between)]
    note = f"within {float(parts.within.mean()):.4f}, between {float(parts.between.mean()):.4f} on average, in units of x_0"
    row = [_tile(scene.mean()), *maps, colour_bar(0, top, "std", PANEL)]
    return sheet([row], [], ["mean", "std within components", "std between components", ""], scene.title, note)


def _guidance(scene: Scene):
    step = scene.step
    before, after = step.conditional.mean(), step.guided.mean()
    shift = (after - before).square().mean(1).sqrt()
    if step.divergence is None:
        note = "No probabilistic guidance at this step. Vanilla CFG moves the conditional mixture itself, before it is recorded."
        return sheet([[_tile(scene.decode(before))]], [], ["conditional mean"], scene.title, note)
    difference = scene.decode(after) - scene.decode(before)
    gain = 1 / max(float(difference.abs().max()), 1e-6)
    tops = [float(shift.max()) or 1.0, float(step.divergence.max()) or 1.0]
    cells = [
        _tile(scene.decode(before)), _tile(scene.decode(after)), _tile(difference * gain),
        _tile(heat(shift, 0, tops[0])), colour_bar(0, tops[0], "rms", PANEL),
        _tile(heat(step.divergence, 0, tops[1])), colour_bar(0, tops[1], "nats", PANEL),
    ]
    titles = ["conditional mean", "guided mean", f"difference x {gain:.3g}", "shift of the mean", "", "KL(guided || conditional)", ""]
    note = f"rms shift {float(shift.mean()):.4f} in units of x_0, KL {float(step.divergence.mean()):.3f} nats a pixel on average"
    return sheet([cells], [], titles, scene.title, note)


def _charts(scene: Scene) -> list:
    steps = [step_statistics(scene.trace, index, scene.image) for index in range(len(scene.trace.steps))]
    sigmas = [s["sigma"] for s in steps]

    def of(name: str, label: str, band: bool = True) -> Series:
        values = [s[name] or {"mean": 0.0, "p5": 0.0, "p95": 0.0} for s in steps]
        low, high = ([v[p] for v in values] for p in ("p5", "p95"))
        return Series(label, [v["mean"] for v in values], *((low, high) if band else ()))

    within = Series("within", [s["std_within"] for s in steps])
    components = scene.step.corrected.components
    return [
        line_chart("entropy, bits", sigmas, [of("entropy_bits", "entropy")], top=1.05 * (math.log2(components) or 1)),
        line_chart("effective components", sigmas, [of("effective_components", "components")], top=1.05 * components),
        line_chart("standard deviation", sigmas, [within, of("std_between", "between")]),
        line_chart("rms shift of the mean", sigmas, [of("guidance_shift", "guidance", False), of("correction_shift", "second order", False)]),
    ]


def _timeline(scene: Scene):
    charts, count = _charts(scene), len(scene.trace.steps)
    title = f"{count} step{'s' * (count > 1)}, from noise to image"
    return sheet([charts[:2], charts[2:]], [], [], title, "Lines: average over pixels. Bands: 5 % to 95 % of the pixels.")


def _pixel(scene: Scene):
    x, y = scene.pixel
    whole = scene.step.corrected.map(lambda t: t if t.shape[-1] == 1 and t.shape[-2] == 1 else t[..., y : y + 1, x : x + 1])
    channels = whole.channels
    if channels == 3:
        colours = [tuple(int(v) for v in rgb) for rgb in to_uint8(whole.means[0])[:, 0, 0]]
    else:
        colours = [component_colour(k) for k in range(whole.components)]
    names = ["R", "G", "B"] if channels == 3 else [f"ch {c + 1}" for c in range(channels)]
    marked = _mark(_tile(scene.mean()), scene.pixel, scene.step.x.shape[-2:])
    note = f"entropy {float(weight_entropy(whole)):.2f} bits, std within components {float(whole.log_std.exp()):.4f}"
    cells = [marked, scatter_chart(whole, colours), marginal_chart(whole, names)]
    return sheet([cells], [], ["mean", "", ""], f"{scene.title}, pixel x {x}, y {y}", note)


def _mark(tile, pixel: tuple[int, int], size):
    """A box around one latent pixel of a picture."""
    from PIL import ImageDraw

    x, y = pixel
    unit = (tile.width - 4) / size[1], (tile.height - 4) / size[0]
    box = (2 + x * unit[0] - 2, 2 + y * unit[1] - 2, 2 + (x + 1) * unit[0] + 1, 2 + (y + 1) * unit[1] + 1)
    pen = ImageDraw.Draw(tile)
    pen.rectangle(box, outline=(255, 255, 255), width=3)
    pen.rectangle(box, outline=(0, 0, 0), width=1)
    return tile


def _sheet(scene: Scene):
    whole, noisy = scene.step.corrected, _tile(scene.decode(scene.step.x))
    bits, top = weight_entropy(whole), math.log2(whole.components) or 1.0
    between = spread(whole).between
    reach = float(between.max()) or 1.0
    maps = sheet([[
        noisy, _tile(scene.mean()), _tile(heat(bits, 0, top)), colour_bar(0, top, "bits", PANEL),
        _tile(heat(between, 0, reach)), colour_bar(0, reach, "std", PANEL), *_winner_map(scene),
    ]], [], ["x_t", "mean", "entropy", "", "std between components", "", "heaviest component", ""], scene.title)
    count = min(scene.mixture.components, 8)
    tiles = _labelled(_faded(scene, count), _captions(scene.mixture)[:count], 8)
    row = sheet([[tiles]], [], ["with their share of the weight, grey where they have none"], "Components")
    charts = sheet([_charts(scene)], [], [], "Over the steps", "Lines: average over pixels. Bands: 5 % to 95 % of the pixels.")
    return _stack([maps, row, charts])


def _stack(pictures: list):
    from PIL import Image

    canvas = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height
    return canvas


VIEWS: dict[str, Callable[[Scene], object]] = {
    "components": _components, "weights": _weights, "entropy": _entropy, "spread": _spread, "winners": _winners,
    "guidance": _guidance, "timeline": _timeline, "pixel": _pixel, "sheet": _sheet,
}
