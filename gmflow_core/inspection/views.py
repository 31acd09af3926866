"""Panels of what a mixture believes along a trace.

A panel needs ``decode``: x_0 (N,C,H,W) to RGB (N,3,H',W') in [-1, 1], a VAE or the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..pictures import heat, sheet, to_uint8
from .beliefs import (
    dominance,
    dominant_component,
    effective_components,
    mean_shift,
    mean_weights,
    nearest,
    spread,
    weight_entropy,
)
from .charts import Series, component_colours, line_chart, marginal_chart, scatter_chart, share_chart, weight_bars
from .scene import Decode, Scene, look
from .statistics import at_pixel, step_statistics
from .tiles import caption_width, captioned, legend, marked, see_through, stacked, tile
from .trace import Trace, TraceStep

NAMES = {"aligned": "hypotheses", "ranked": "components by rank", "raw": "components"}
ONE = {"aligned": "hypothesis", "ranked": "component by rank", "raw": "component"}
FRAMES = 8  # steps in a strip of pictures, at most


def draw(
    trace: Trace, view: str, step: int, image: int, arrangement: str, count: int, decode: Decode,
    pixel: tuple[int, int] | None = None, steady: bool = False,
):
    """One panel as a Pillow image; ValueError for a view, order, step, image or pixel that does not exist.

    ``pixel`` is (x, y) in the latent, for the view of that name; its middle if None. ``steady``: colour scales are
    those of all steps, for an animation.
    """
    return paint(look(trace, step, image, arrangement, count, decode, pixel, steady), view)


def paint(scene: Scene, view: str):
    """A view of a scene as a Pillow image; ValueError for a view that does not exist, or a pixel that it needs."""
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
    return VIEWS[view](scene)


# ---- pieces ------------------------------------------------------------------------------------

def _captioned(scene: Scene, tiles: Sequence, columns: int):
    """A tile for each of these components (the first ones) with its share of the weight."""
    shares = mean_weights(scene.mixture)[0].tolist()
    captions = [f"{k + 1}: {100 * share:.1f} %" for k, share in enumerate(shares[: len(tiles)])]
    return captioned(tiles, captions, component_colours(len(tiles)), columns)


FADING = "with their share of the weight; transparent where it is small (each on its own scale)"


def _means(scene: Scene, most: int = 1000) -> list:
    """A tile of each component's mean, transparent where it has little weight:
    a mean that nobody believes says nothing."""
    pictures, weights = scene.decode(scene.mixture.means[0, :most]), scene.mixture.weights[0, :most, 0]
    # What is believed nowhere is transparent all over.
    opacity = (weights / weights.amax((1, 2), keepdim=True).clamp(min=0.05)).sqrt()
    return [see_through(scene.tile(picture[None]), alpha) for picture, alpha in zip(pictures, opacity, strict=True)]


def _columns(count: int) -> int:
    return 4 if count <= 12 else 8


def _winner_map(scene: Scene):
    """The heaviest component of each pixel in its colour, and a legend with shares of the pixels.

    Of all components, however many are shown; by rank it would be the first everywhere: then as the network numbers
    them.
    """
    mixture = scene.mixture if scene.arrangement == "aligned" else scene.step.corrected
    colours = component_colours(mixture.components)
    picture = (torch.tensor(colours) / 127.5 - 1)[dominant_component(mixture)[0]].movedim(-1, 0)[None]
    shares = dominance(mixture)[0].tolist()
    shown = sorted((k for k, share in enumerate(shares) if share > 0), key=lambda k: -shares[k])
    names = [f"{k + 1}: {100 * shares[k]:.1f} % of pixels" for k in shown]
    return scene.tile(picture), legend([colours[k] for k in shown], names, max(8, scene.size[1] // 24))


def _winner_title(scene: Scene) -> str:
    return {"aligned": "heaviest hypothesis", "ranked": "heaviest component, as numbered by the network",
            "raw": "heaviest component"}[scene.arrangement]


def _top_bits(scene: Scene) -> float:
    return math.log2(scene.step.corrected.components) or 1.0


# ---- views -------------------------------------------------------------------------------------

def _bits(step: TraceStep) -> Tensor:
    return weight_entropy(step.corrected)


def _between(step: TraceStep) -> Tensor:
    return spread(step.corrected).between


def _shift(step: TraceStep) -> Tensor:
    return mean_shift(step.guided, step.conditional)


def _components(scene: Scene):
    tiles = _captioned(scene, _means(scene), _columns(scene.mixture.components))
    titles = ["mean", f"{NAMES[scene.arrangement]} {FADING}"]
    return sheet([[scene.tile(scene.mean), tiles]], [], titles, scene.title, scene.note)


def _weights(scene: Scene):
    top, beyond = scene.scale(lambda step: scene.arranged(step).weights)
    maps = [scene.tile(image[None]) for image in heat(scene.mixture.weights[0, :, 0], 0, top)]
    row = [scene.tile(scene.mean), _captioned(scene, maps, _columns(scene.mixture.components)),
           scene.bar(top, "", beyond)]
    return sheet([row], [], ["mean", f"weight of each {ONE[scene.arrangement]}, and its average", ""],
                 scene.title, scene.note)


def _winners(scene: Scene):
    cells = [scene.tile(scene.mean), *_winner_map(scene)]
    note = scene.note if scene.arrangement == "aligned" else ""
    return sheet([cells], [], ["mean", _winner_title(scene), ""], scene.title, note)


def _entropy(scene: Scene):
    whole, row = scene.step.corrected, [scene.tile(scene.mean), *scene.maps("bits", _bits, top=_top_bits(scene))]
    note = (f"{weight_entropy(whole).mean():.2f} bits on average: "
            f"{effective_components(whole).mean():.2f} effective components of {whole.components}")
    return sheet([row], [], ["mean", "entropy of the weights", ""], scene.title, note)


def _spread(scene: Scene):
    parts = spread(scene.step.corrected)
    note = (f"within {float(parts.within.mean()):.3g}, "
            f"between {float(parts.between.mean()):.3g} on average, in units of x_0")
    row = [scene.tile(scene.mean), *scene.maps("x_0", lambda step: spread(step.corrected).within, _between)]
    return sheet([row], [], ["mean", "std within components", "std between components", ""], scene.title, note)


def _guidance(scene: Scene):
    step = scene.step
    before, after = (scene.decode(m.mean()) for m in (step.conditional, step.guided))
    if step.divergence is None:
        note = ("No probabilistic guidance at this step.\nVanilla CFG moves the conditional mixture itself, "
                "before it is recorded.")
        return sheet([[scene.tile(before)]], [], ["conditional mean"], scene.title, note)
    gain = 1 / max(float((after - before).abs().max()), 1e-6)
    cells = [
        scene.tile(before), scene.tile(after), scene.tile((after - before) * gain),
        *scene.maps("x_0", _shift), *scene.maps("nats", lambda step: step.divergence),
    ]
    titles = ["conditional mean", "guided mean", f"difference x {gain:.3g}", "rms shift of the mean", "",
              "KL(guided || conditional)", ""]
    note = (f"rms shift {float(_shift(step).mean()):.3g} in units of x_0, "
            f"KL {float(step.divergence.mean()):.3g} nats a pixel on average")
    return sheet([cells], [], titles, scene.title, note)


def _charts(scene: Scene, width: int, wide: int | None = None) -> dict:
    """Charts over the steps, with a line at the scene's own. ``wide``: the width of the first."""
    numbers, size = [step_statistics(step) for step in scene.steps], (width, round(0.58 * width))
    sigmas, components = [s["sigma"] for s in numbers], scene.step.corrected.components
    now = scene.step.sigma if len(sigmas) > 1 else None

    def of(name: str, label: str, band: bool = True) -> Series:
        values = [s[name] or {"mean": 0.0, "p5": 0.0, "p95": 0.0} for s in numbers]
        low, high = ([v[p] for v in values] for p in ("p5", "p95"))
        return Series(label, [v["mean"] for v in values], *((low, high) if band else ()))

    def lines(title: str, *series: Series, **options):
        return line_chart(title, sigmas, series, size, now=now, **options)

    within = Series("within", [s["std_within"] for s in numbers])
    shares = [mean_weights(scene.arranged(step))[0].tolist() for step in scene.steps]
    return {
        "weights": share_chart(f"weights of the {NAMES[scene.arrangement]}, %", sigmas, shares,
                               (wide or width, size[1]), now),
        "entropy": lines("entropy, bits", of("entropy_bits", "entropy"), top=1.05 * _top_bits(scene)),
        "effective": lines("effective components", of("effective_components", "components"), top=1.05 * components,
                           whole=True),
        "std": lines("std, units of x_0", within, of("std_between", "between")),
        "shift": lines("rms shift of the mean, x_0", of("guidance_shift", "guidance", False),
                       of("correction_shift", "2nd order", False)),
    }


BANDS = "Lines: average over pixels. Bands: 5 % to 95 % of the pixels."


def _timeline(scene: Scene):
    count, top = len(scene.steps), _top_bits(scene)
    shown = sorted({round(i * (count - 1) / (FRAMES - 1)) for i in range(FRAMES)})
    steps = [scene.steps[i] for i in shown]
    captions = [f"{i}: sigma {step.sigma:.3f}" for i, step in zip(shown, steps, strict=True)]
    averages = [f"{float(_bits(step).mean()):.2f} bits" for step in steps]
    least = max(map(caption_width, (captions, averages)))
    means = captioned([scene.tile(scene.decode(step.corrected.mean())) for step in steps], captions, None,
                      FRAMES, least)
    maps = captioned([scene.tile(heat(_bits(step), 0, top)) for step in steps], averages, None, FRAMES, least)
    title = f"{count} step{'s' * (count > 1)}, from noise to image"
    strip = sheet([[means], [maps, scene.bar(top, "bits")]], ["mean", "entropy"], [], title)
    width = max(400, (strip.width - 4 * 14) // 3)
    charts = _charts(scene, width, 2 * width + 14)
    rows = [[charts["weights"], charts["effective"]], [charts["entropy"], charts["std"], charts["shift"]]]
    note = "\n".join(line for line in (scene.note, BANDS) if line)
    return stacked([strip, sheet(rows[:1], [], [], ""), sheet(rows[1:], [], [], "", note)])


def _pixel(scene: Scene):
    (x, y), whole = scene.pixel, at_pixel(scene.step.corrected, scene.pixel)
    channels, weights = whole.channels, whole.weights.flatten().tolist()
    colours = component_colours(whole.components)
    if channels == 3:
        colours = [(red, green, blue) for red, green, blue in to_uint8(whole.means[0])[:, 0, 0].tolist()]
    names = ["R", "G", "B"] if channels == 3 else [f"ch {c + 1}" for c in range(channels)]
    larger = 1 if max(scene.size) >= 250 else 300 / max(scene.size)
    picture = tile(scene.mean, (round(scene.size[0] * larger), round(scene.size[1] * larger)))
    picture = marked(picture, scene.pixel, scene.latent)
    note = (f"entropy {float(weight_entropy(whole)):.2f} bits, std within components {float(whole.log_std.exp()):.3g} "
            "in units of x_0; components as the network numbers them.\n")
    note += ("Discs: components, their areas as their weights. Rings: one standard deviation within them. "
             "Cross: the pixel's mean.")
    groups = None
    if scene.centres is not None and whole.components > 1:
        groups = nearest(whole.means[0, :, :, 0, 0], scene.centres[0]).tolist()
    cells = [picture, weight_bars(weights, colours, groups), scatter_chart(whole, colours),
             marginal_chart(whole, names)]
    return sheet([cells], [], ["mean", "", "", ""], f"{scene.title}, pixel x {x}, y {y}", note)


def _sheet(scene: Scene):
    maps = [
        scene.tile(scene.decode(scene.step.x)), scene.tile(scene.mean),
        *scene.maps("bits", _bits, top=_top_bits(scene)),
        *scene.maps("x_0", _between), *_winner_map(scene),
    ]
    titles = ["x_t", "mean", "entropy", "", "std between components", "", _winner_title(scene), ""]
    count, name = scene.mixture.components, NAMES[scene.arrangement].capitalize()
    name = name if count <= 16 else f"{name}: the first 16 of {count}"
    tiles = _captioned(scene, _means(scene, 16), 8 if scene.size[0] <= scene.size[1] * 1.5 else 4)
    parts = [
        sheet([maps], [], titles, scene.title),
        sheet([[tiles]], [], [FADING], name, scene.note),
    ]
    charts = _charts(scene, max(390, (max(part.width for part in parts) - 5 * 14) // 4))
    row = [charts[name] for name in ("weights", "entropy", "std", "shift")]
    return stacked([*parts, sheet([row], [], [], "Over the steps", BANDS)])


VIEWS: dict[str, Callable[[Scene], object]] = {
    "components": _components, "weights": _weights, "entropy": _entropy, "spread": _spread, "winners": _winners,
    "guidance": _guidance, "timeline": _timeline, "pixel": _pixel, "sheet": _sheet,
}
