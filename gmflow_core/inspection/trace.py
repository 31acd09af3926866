"""A trajectory kept for looking at: the mixtures of every network step, small and on the CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_safetensors
from ..guidance import Guided
from ..mixture import GaussianFactor, GaussianMixture, Mixture, TiltedMixture
from ..solver import StepInfo
from .beliefs import tilt_divergence

MIXTURES = ("conditional", "guided", "corrected")


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One network step, of the first images of a batch. Mixtures are x_0 posteriors."""

    sigma: float
    sigma_next: float
    x: Tensor                       # (B,C,*S) the step's x_t
    conditional: Mixture            # before guidance
    guided: Mixture                 # after it; the conditional itself without guidance
    corrected: Mixture              # after the second-order correction: what the step used
    divergence: Tensor | None = None  # (B,*S) KL(guided || conditional) in nats; None without probabilistic guidance


@dataclass(frozen=True, eq=False)
class Trace:
    """The steps of one sampling run, in order."""

    steps: tuple[TraceStep, ...]


class Recorder:
    """A sampler's callback that keeps a :class:`Trace`: the first ``images`` images of at most ``steps`` steps.

    Mixtures are stored in half precision, 2 B K (C + 1) H W bytes each, up to three a step: on the sampler's device
    while it works, so that no step waits for a copy, and on the CPU from :meth:`trace` on. Of evidence's variances, one
    for each pixel or even channel, what is kept is the mean over channels.
    """

    def __init__(self, images: int = 4, steps: int = 1000):
        self.images, self.limit = images, steps
        self.kept: list[TraceStep] = []

    def __call__(self, info: StepInfo) -> None:
        if len(self.kept) < self.limit:
            self.kept.append(TraceStep(
                info.sigma, info.sigma_next, _half(self._first(info.x)), *self._mixtures(info.guided, info.posterior),
                self._divergence(info.guided),
            ))

    def trace(self) -> Trace:
        """What was recorded, on the CPU."""
        return Trace(tuple(map(_on_cpu, self.kept)))

    def _divergence(self, guided: Guided) -> Tensor | None:
        if guided.bias is None:
            return None
        factor = self._first_factor(guided.target.factor() - guided.anchor.factor())
        return _half(tilt_divergence(self._first_images(guided.base).isotropic(), factor))

    def _mixtures(self, guided: Guided, posterior: Mixture) -> tuple[Mixture, Mixture, Mixture]:
        parts = {id(part): part for part in (guided.base, guided.posterior, posterior)}  # often one: kept once
        stored = {name: self._first_images(part).isotropic().map(_half) for name, part in parts.items()}
        return stored[id(guided.base)], stored[id(guided.posterior)], stored[id(posterior)]

    def _first_images(self, mixture: Mixture) -> Mixture:
        """Of the first images alone: a tilt is only worked out for what is kept."""
        if isinstance(mixture, TiltedMixture):
            return mixture.base.map(self._first).tilt(self._first_factor(mixture.factor))
        return mixture.map(self._first)

    def _first_factor(self, factor: GaussianFactor) -> GaussianFactor:
        return GaussianFactor(self._first(factor.precision), self._first(factor.shift))  # a TiltedMixture has no axes

    def _first(self, x: Tensor) -> Tensor:
        return x[: self.images].detach()


def _on_cpu(step: TraceStep) -> TraceStep:
    parts = {id(part): part for part in (getattr(step, name) for name in MIXTURES)}  # one that is kept once stays one
    moved = {name: part.map(Tensor.cpu) for name, part in parts.items()}
    divergence = None if step.divergence is None else step.divergence.cpu()
    return replace(step, x=step.x.cpu(), divergence=divergence,
                   **{name: moved[id(getattr(step, name))] for name in MIXTURES})


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16, copy=True)


def tensors_of(trace: Trace) -> list[Tensor]:
    """Every tensor that a trace keeps, each once."""
    found: dict[int, Tensor] = {}
    for step in trace.steps:
        mixtures = [getattr(step, name) for name in MIXTURES]
        kept = [tensor for m in mixtures for tensor in (m.means, m.log_weights, m.log_std)]
        for tensor in [step.x, *kept, *([] if step.divergence is None else [step.divergence])]:
            found[id(tensor)] = tensor
    return list(found.values())


def pick(trace: Trace, step: int, image: int) -> TraceStep:
    """One step of one image (a batch of one, float32); ValueError if there is none of that number."""
    if not trace.steps:
        raise ValueError("trace: it holds no steps")
    steps = len(trace.steps)
    check_place(step, image, steps, len(trace.steps[0].x))
    chosen = trace.steps[step]
    one = lambda t: t[image : image + 1].float()  # noqa: E731
    mixtures = {name: _sound(getattr(chosen, name).map(one), f"step {step % steps}, image {image}, {name}")
                for name in MIXTURES}
    return replace(chosen, x=one(chosen.x), divergence=None if chosen.divergence is None else one(chosen.divergence),
                   **mixtures)


def check_place(step: int, image: int, steps: int, images: int) -> None:
    """ValueError for a step or an image that a trace of so many does not hold."""
    if not -steps <= step < steps:
        raise ValueError(f"step: got {step}; this trace has steps 0 to {steps - 1} (-1 is the last)")
    if not 0 <= image < images:
        raise ValueError(f"image: got {image}; this trace holds images 0 to {images - 1}, the first of the batch")


def _sound(mixture: Mixture, where: str) -> GaussianMixture:
    """Weights that sum to one again after half precision; ValueError for a mixture that is not finite."""
    if not (mixture.means.isfinite().all() and mixture.log_std.isfinite().all()
            and (mixture.log_weights < torch.inf).all()):
        raise ValueError(f"trace: {where}: the mixture holds NaN or infinite values (half precision ends at 65504); "
                         "the model or its input is broken there, or was sampled in too low a precision")
    return GaussianMixture.from_logits(mixture.means, mixture.log_weights, mixture.log_std)


def save_trace(trace: Trace, path) -> None:
    """Every tensor of a trace as ``.safetensors`` (half precision): ``step_000.x``, ``step_000.guided.means``, ...

    The metadata's key ``gmflow_trace`` holds JSON: ``format`` and the ``sigmas`` of the steps.
    """
    tensors = {}
    for i, step in enumerate(trace.steps):
        tensors[f"step_{i:03d}.x"] = step.x
        for name in MIXTURES:
            mixture = getattr(step, name)
            for part in ("means", "log_weights", "log_std"):
                tensors[f"step_{i:03d}.{name}.{part}"] = getattr(mixture, part)
        if step.divergence is not None:
            tensors[f"step_{i:03d}.guidance_kl"] = step.divergence
    header = {"format": 1, "sigmas": [step.sigma for step in trace.steps]}
    # Cloned: one mixture may be guided and corrected at once, and a file shares no memory.
    tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    write_safetensors(Path(path), tensors, {"gmflow_trace": json.dumps(header)})
