"""``python -m gmflow_core demo``: pictures of what the method does, from the bundled model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from .checkpoint import Checkpoint, load_checkpoint
from .cli import sample_images
from .files import write_picture
from .inspection.beliefs import effective_components, hypotheses, mean_weights, weight_entropy
from .mixture import GaussianMixture
from .pictures import FAINT, PAPER, colour_bar, font, heat, image_grid, sheet
from .sampler import GUIDANCE_TILT, SOLVERS, USUAL, SamplerOptions
from .solver import StepInfo

STEPS = (1, 2, 4, 8)
GUIDANCE = (0.0, 0.4, 0.7)
SUBJECT = "critter"  # the class whose beliefs are drawn
COLUMNS = 8
ZOOM = 3


def demo(checkpoint_path: Path, out: Path, seed: int = 0) -> list[Path]:
    """Sample, draw, say where; returns the pictures' paths."""
    if not checkpoint_path.exists():
        raise FileNotFoundError(f"the bundled checkpoint {checkpoint_path} is missing; train one: "
                                "python -m train --preset characters")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(checkpoint_path)
    pictures = {"solvers": draw_solvers, "guidance": draw_guidance, "beliefs": draw_beliefs}
    paths, begin = [], time.perf_counter()
    for name, draw in pictures.items():
        start = time.perf_counter()
        picture = draw(checkpoint, seed)
        paths.append(out / f"{name}.png")
        write_picture(paths[-1], picture)
        print(f"{paths[-1]}  {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(paths)} pictures in {time.perf_counter() - begin:.1f} s")
    return paths


def kinds(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of the bundled model's classes."""
    return checkpoint.class_names or ()


def paint(checkpoint: Checkpoint, labels: list[int], seed: int, solver: str = "gm-ode", steps: int = 8,
          guidance: float = 0.4, callback: Callable[[StepInfo], None] | None = None) -> Tensor:
    """Images of the labels, as the command line's defaults paint them."""
    options = replace(USUAL, solver=solver, shift=checkpoint.time_shift, total_substeps=checkpoint.total_substeps)
    return sample_images(checkpoint, labels, options, steps=steps, guidance=guidance, guidance_tilt=GUIDANCE_TILT,
                         seed=seed, callback=callback)


def draw_solvers(checkpoint: Checkpoint, seed: int):
    """GM-ODE 2 and GM-SDE 2 at 1, 2, 4 and 8 network steps: one picture of every class, twice."""
    labels = list(range(len(kinds(checkpoint))))
    cells = []
    for steps in STEPS:
        row = [paint(checkpoint, labels, seed, solver, steps) for solver in SOLVERS]
        cells.append([image_grid(images, COLUMNS, scale=2) for images in row])
    titles = [f"{n} step{'s' * (n > 1)}" for n in STEPS]
    return sheet(cells, titles, [SamplerOptions(solver).title for solver in SOLVERS],
                 "Characters in a few network steps", "probabilistic guidance 0.4, same noise in every row")


def draw_guidance(checkpoint: Checkpoint, seed: int):
    """Probabilistic guidance at three scales, from the same noise."""
    labels = [kind for kind in range(len(kinds(checkpoint))) for _ in range(3)]
    rows = [paint(checkpoint, labels, seed, guidance=w) for w in GUIDANCE]
    cells = [[image_grid(_by_column(images, 3), len(labels) // 3, scale=2)] for images in rows]
    titles = [f"guidance {w:g}" for w in GUIDANCE]
    return sheet(cells, titles, [], "Probabilistic guidance",
                 "GM-ODE 2, 8 steps, three samples of each class, same noise in every block")


def _by_column(images: Tensor, rows: int) -> Tensor:
    """Reorder (columns * rows, ...) so that a row-major grid has each run of ``rows`` in a column."""
    return images.unflatten(0, (-1, rows)).transpose(0, 1).flatten(0, 1)


def draw_beliefs(checkpoint: Checkpoint, seed: int):
    """The mixture of the first steps of one image: x_t, its mean, its hypotheses, its entropy."""
    steps: list[StepInfo] = []
    subject = kinds(checkpoint).index(SUBJECT)
    paint(checkpoint, [subject], seed, callback=steps.append)
    bits = math.log2(checkpoint.config.num_gaussians)
    cells, titles = [], []
    for step in steps[:6]:
        mixture = step.guided.base
        entropy = weight_entropy(mixture)
        cells.append([
            image_grid(step.x, 1, ZOOM), image_grid(mixture.mean(), 1, ZOOM),
            draw_hypotheses(hypotheses(mixture, mixture.components)), image_grid(heat(entropy, 0, bits), 1, ZOOM),
        ])
        titles.append(f"sigma {step.sigma:.3f}\n{effective_components(mixture).mean():.1f} components")
    cells[0].append(colour_bar(0, bits, "bits", cells[0][-1].height))
    return sheet(
        cells, titles, ["x_t", "mean", "hypotheses, with their share of the weight", "entropy"],
        f"What the mixture believes while drawing a {SUBJECT}",
        "All pixels' components in clusters of like colour: each tile is one cluster, bright where it has weight.\n"
        "At high noise they are the grounds and the bodies that the model has not chosen between yet.",
    )


def draw_hypotheses(mixture: GaussianMixture):
    """Each component's mean on grey, as opaque as its weight at the pixel, its average weight beneath."""
    from PIL import Image, ImageDraw

    opacity = mixture.weights / mixture.weights.amax((3, 4), keepdim=True).clamp(min=1e-6)
    tiles = image_grid((opacity.sqrt() * mixture.means)[0], mixture.components, ZOOM)
    canvas = Image.new("RGB", (tiles.width, tiles.height + 18), PAPER)
    canvas.paste(tiles, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for k, share in enumerate(mean_weights(mixture)[0].tolist()):
        x = (k + 0.5) * tiles.width / mixture.components
        draw.text((x, tiles.height + 2), f"{100 * share:.1f} %", FAINT, font(13), anchor="ma")
    return canvas
