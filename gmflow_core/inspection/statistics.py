"""Numbers of a trace: plain, small and without pictures (docs/statistics.md says what each is)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mixture import GaussianMixture, Mixture
from .beliefs import align, dominance, follow, hypotheses, mean_shift, mean_weights, regions, spread, weight_entropy
from .trace import Trace, TraceStep, pick


def statistics(trace: Trace, image: int = 0, count: int = 8, pixel: tuple[int, int] | None = None) -> dict:
    """Numbers of every step of one image, plain and small (docs/statistics.md says what each is).

    Entropy in bits, standard deviations and shifts (root mean square over channels) in units of x_0, KL in nats.
    Components are aligned over the image at the first step and followed from there; ``count`` is the number of
    hypotheses, at most: the pictures' ``max_components``. With ``pixel`` (x, y) each step also has that pixel's
    mixture.
    """
    check_count(count)
    centres, aligned, steps = first_regions(trace, image, count), None, []
    for index in range(len(trace.steps)):
        chosen = pick(trace, index, image)
        aligned = align(chosen.corrected) if aligned is None else follow(chosen.corrected, aligned)
        merged = hypotheses(chosen.corrected, centres.shape[1], centres)
        steps.append({"step": index} | step_statistics(chosen) | _shares(aligned) | {"hypotheses": _shares(merged)})
        if pixel is not None:
            steps[-1]["pixel"] = _pixel(chosen.corrected, pixel)
    centres = [[_number(v) for v in centre] for centre in centres[0].tolist()]
    return {"format": 1, "image": image, "hypotheses": centres, "steps": steps}


def check_count(count: int) -> None:
    """ValueError for a number of hypotheses or components that shows nothing."""
    if count < 1:
        raise ValueError(f"max_components: got {count}; at least one is shown")


def first_regions(trace: Trace, image: int, count: int) -> Tensor:
    """The hypotheses of a trajectory: the regions (1,count,C) of its first step, at most one for each component."""
    first = pick(trace, 0, image).corrected
    return regions(first, min(count, first.components))


def chosen_hypothesis(trace: Trace, step: int, image: int, number: int, count: int) -> tuple[Tensor, Tensor]:
    """The mean colour (C,) of a hypothesis at a step, over the image, and its weights (1,H,W) over the largest of them.
    Numbers begin with 1, as in the pictures that show at most ``count``; ValueError for one that is not there."""
    centres = first_regions(trace, image, count)                                # (1,N,C)
    if not 1 <= number <= centres.shape[1]:
        raise ValueError(f"hypothesis: got {number}; this trace has hypotheses 1 to {centres.shape[1]} "
                         f"(max_components {count})")
    merged = hypotheses(pick(trace, step, image).corrected, centres.shape[1], centres)
    weights = merged.weights[0, number - 1]                                     # (1,H,W)
    if float(weights.sum()) < 1e-3:
        raise ValueError(f"hypothesis: {number} has no weight left at step {step}; choose an earlier step, or "
                         f"another one")
    return (weights * merged.means[0, number - 1]).sum((-2, -1)) / weights.sum(), weights / weights.max()


def at_pixel(mixture: Mixture, pixel: tuple[int, int]) -> GaussianMixture:
    """The mixture (B,K,C,1,1) of one pixel (x, y); ValueError if there is none."""
    x, y = pixel
    check_pixel(pixel, *mixture.means.shape[-2:])
    log_std = mixture.log_std.expand(*mixture.log_std.shape[:3], *mixture.means.shape[3:])
    return GaussianMixture(*(t[..., y : y + 1, x : x + 1] for t in (mixture.means, mixture.log_weights, log_std)))


def check_pixel(pixel: tuple[int, int], height: int, width: int) -> None:
    """ValueError for a pixel (x, y) outside a latent of that size."""
    for axis, value, size in zip("xy", pixel, (width, height), strict=True):
        if not 0 <= value < size:
            raise ValueError(f"pixel_{axis}: got {value}; "
                             f"this latent is {width} x {height} (width x height), so 0 to {size - 1}")


def _pixel(mixture: Mixture, pixel: tuple[int, int]) -> dict:
    """One pixel's whole mixture, components as the network numbers them."""
    one = at_pixel(mixture, pixel)
    return {
        "x": pixel[0], "y": pixel[1], "weights": [_number(w) for w in one.weights.flatten().tolist()],
        "means": [[_number(v) for v in mean] for mean in one.means[0, :, :, 0, 0].tolist()],
        "std": _number(float(one.log_std.exp().flatten()[0])),
    }


def _shares(mixture: Mixture) -> dict:
    return {
        "weights": [_number(v) for v in mean_weights(mixture)[0].tolist()],
        "dominance": [_number(v) for v in dominance(mixture)[0].tolist()],
    }


def step_statistics(chosen: TraceStep) -> dict:
    """The numbers of one picked step that need no alignment of its components."""
    mixture = chosen.corrected
    bits, parts = weight_entropy(mixture), spread(mixture)
    return {
        "sigma": _number(chosen.sigma), "sigma_next": _number(chosen.sigma_next),
        "entropy_bits": _summary(bits), "effective_components": _summary(torch.exp2(bits)),
        "log_std": _number(float(mixture.log_std.mean())),
        "std_within": _number(float(mixture.var.mean().sqrt())), "std_between": _summary(parts.between),
        "guidance_shift": _summary(mean_shift(chosen.guided, chosen.conditional)),
        "correction_shift": _summary(mean_shift(mixture, chosen.guided)),
        "guidance_kl": None if chosen.divergence is None else _summary(chosen.divergence),
    }


def _summary(values: Tensor) -> dict:
    low, middle, high = torch.quantile(values.flatten(), values.new_tensor([0.05, 0.5, 0.95])).tolist()
    return {"mean": _number(float(values.mean())), "p5": _number(low), "median": _number(middle), "p95": _number(high)}


def _number(value: float) -> float:
    """Six decimals, of small values six digits."""
    return round(value, 6) if abs(value) >= 1 else float(f"{value:.6g}")
