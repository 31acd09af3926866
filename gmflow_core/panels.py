"""Panels of what a mixture believes at one step of a trace, and their numbers as JSON.

A panel needs ``decode``: x_0 (N,C,H,W) to RGB (N,3,H',W') in [-1, 1], a VAE or the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .inspect import (
    align, dominance, effective_components, hypotheses, mean_weights, rank, spread, weight_entropy,
)
from .mixture import GaussianMixture
from .pictures import FAINT, PAPER, colour_bar, font, heat, image_grid, sheet
from .trace import Trace, TraceStep

VIEWS = ("components", "weights", "entropy", "spread")
ORDERS = ("aligned", "ranked", "raw")
PANEL = 192  # pixels of one picture's longer side, at least

Decode = Callable[[Tensor], Tensor]


def pick(trace: Trace, step: int, image: int) -> TraceStep:
    """One step of one image (a batch of one, float32); ValueError if there is none of that number."""
    steps, images = len(trace.steps), len(trace.steps[0].x)
    if not -steps <= step < steps:
        raise ValueError(f"step: got {step}; this trace has steps 0 to {steps - 1} (-1 is the last)")
    if not 0 <= image < images:
        raise ValueError(f"image: got {image}; this trace holds images 0 to {images - 1}")
    chosen = trace.steps[step]
    one = lambda t: t[image : image + 1].float()  # noqa: E731
    return TraceStep(
        chosen.sigma, chosen.sigma_next, one(chosen.x),
        *(_normalised(m.map(one)) for m in (chosen.conditional, chosen.guided, chosen.corrected)),
    )


def _normalised(mixture: GaussianMixture) -> GaussianMixture:
    """Weights that sum to one again after half precision."""
    return GaussianMixture.from_logits(mixture.means, mixture.log_weights, mixture.log_std)


def ordered(mixture: GaussianMixture, order: str, count: int) -> GaussianMixture:
    """At most ``count`` components, comparable over the image (aligned), by weight per pixel (ranked) or as they are."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    count = min(count, mixture.components)
    if order == "aligned":
        return hypotheses(mixture, count) if count < mixture.components else align(mixture)
    mixture = rank(mixture) if order == "ranked" else mixture
    return GaussianMixture(mixture.means[:, :count], mixture.log_weights[:, :count], mixture.log_std)


def draw(trace: Trace, view: str, step: int, image: int, order: str, count: int, decode: Decode):
    """One panel as a Pillow image; ValueError for a view, step or image that does not exist."""
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
    chosen = pick(trace, step, image)
    number = step % len(trace.steps)
    title = f"Step {number + 1} of {len(trace.steps)}, sigma {chosen.sigma:.3f}"
    return {"components": _components, "weights": _weights, "entropy": _entropy, "spread": _spread}[view](
        chosen, title, ordered(chosen.corrected, order, count), decode
    )


def _scale(picture: Tensor) -> int:
    return max(1, math.ceil(PANEL / max(picture.shape[-2:])))


def _grid(images: Tensor, columns: int):
    return image_grid(images, columns, _scale(images))


def _labelled(images: Tensor, captions: list[str], columns: int = 4):
    """Tiles in rows, each with a caption beneath."""
    from PIL import Image, ImageDraw

    tiles = [image_grid(picture[None], 1, _scale(picture)) for picture in images]
    width, height, foot = tiles[0].width, tiles[0].height, 24
    columns = min(columns, len(tiles))
    canvas = Image.new("RGB", (columns * (width + 8) - 8, -(-len(tiles) // columns) * (height + foot)), PAPER)
    pen = ImageDraw.Draw(canvas)
    for i, (tile, caption) in enumerate(zip(tiles, captions)):
        x, y = i % columns * (width + 8), i // columns * (height + foot)
        canvas.paste(tile, (x, y))
        pen.text((x + width / 2, y + height + 4), caption, FAINT, font(14), anchor="ma")
    return canvas


def _components(chosen: TraceStep, title: str, mixture: GaussianMixture, decode: Decode):
    shares = mean_weights(mixture)[0]
    captions = [f"{k + 1}: {100 * share:.1f} %" for k, share in enumerate(shares.tolist())]
    row = [_labelled(decode(chosen.corrected.mean()), ["mean"]), _labelled(decode(mixture.means[0]), captions)]
    return sheet([row], [], ["what the step uses", "components, with their share of the weight"], title)


def _weights(chosen: TraceStep, title: str, mixture: GaussianMixture, decode: Decode):
    shares = mean_weights(mixture)[0]
    captions = [f"{k + 1}: {100 * share:.1f} %" for k, share in enumerate(shares.tolist())]
    maps = heat(mixture.weights[0, :, 0], 0, 1)
    row = [_labelled(decode(chosen.corrected.mean()), ["mean"]), _labelled(maps, captions), colour_bar(0, 1, "weight", PANEL)]
    return sheet([row], [], ["what the step uses", "weight of each component", ""], title)


def _entropy(chosen: TraceStep, title: str, mixture: GaussianMixture, decode: Decode):
    bits, whole = weight_entropy(chosen.corrected), chosen.corrected
    top = math.log2(whole.components) or 1.0
    row = [_grid(decode(whole.mean()), 1), _grid(heat(bits, 0, top), 1), colour_bar(0, top, "bits", PANEL)]
    note = f"{bits.mean():.2f} bits on average: {effective_components(whole).mean():.2f} effective components of {whole.components}"
    return sheet([row], [], ["what the step uses", "entropy of the weights", ""], title, note)


def _spread(chosen: TraceStep, title: str, mixture: GaussianMixture, decode: Decode):
    parts = spread(chosen.corrected)
    top = float(parts.total.max()) or 1.0
    row = [_grid(decode(chosen.corrected.mean()), 1)]
    row += [_grid(heat(part, 0, top), 1) for part in (parts.within, parts.between)]
    row.append(colour_bar(0, top, "std", PANEL))
    return sheet([row], [], ["what the step uses", "std within components", "std between components", ""], title)


def statistics(trace: Trace, image: int = 0) -> dict:
    """Numbers of every step, small and plain: entropy in bits, standard deviations in units of x_0."""
    return {"format": 1, "image": image, "steps": [_step_statistics(trace, i, image) for i in range(len(trace.steps))]}


def _step_statistics(trace: Trace, index: int, image: int) -> dict:
    chosen = pick(trace, index, image)
    mixture = chosen.corrected
    bits, parts = weight_entropy(mixture), spread(mixture)
    aligned = align(mixture)
    shift = (chosen.guided.mean() - chosen.conditional.mean()).norm(dim=1)
    return {
        "step": index, "sigma": _number(chosen.sigma), "sigma_next": _number(chosen.sigma_next),
        "entropy_bits": _summary(bits), "effective_components": _summary(effective_components(mixture)),
        "log_std": _number(float(mixture.log_std.flatten()[0])),
        "std_between": _summary(parts.between), "guidance_shift": _summary(shift),
        "weights": [_number(v) for v in mean_weights(aligned)[0].tolist()],
        "dominance": [_number(v) for v in dominance(aligned)[0].tolist()],
    }


def _summary(values: Tensor) -> dict:
    low, middle, high = torch.quantile(values.flatten(), values.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {"mean": _number(float(values.mean())), "p5": _number(low), "median": _number(middle), "p95": _number(high)}


def _number(value: float) -> float:
    return round(value, 6)
