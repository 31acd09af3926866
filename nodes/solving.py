"""GM-ODE and GM-SDE as ComfyUI calls a sampler. Nothing of ComfyUI is imported: its objects are used as they come.

Shapes: B batch, C channels, H W space.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..gmflow_core import Conditioned, Guided, Mixture, SpectrumMLP, unguided
from ..gmflow_core.echo import Sigma, posteriors_given
from ..gmflow_core.guidance import Blend
from ..gmflow_core.noise import ImageNoise
from ..gmflow_core.sampler import SamplerOptions, sample
from .adapter_info import ATTACHMENT, AdapterInfo
from .capture import Capture, capturing, gather, guided_by_mean
from .evidence_source import evidence_in
from .model_info import ModelInfo
from .patches import evaluating

RUN = "gmflow_run"   # in transformer_options: there it reaches the sampler through any wrapper


@dataclass(frozen=True, eq=False)
class Run:
    """What a node adds to one sampling: names of the images (B,) for the step noise, and who sees every step."""

    batch_index: Sequence[int] | None = None
    recorder: Callable | None = None


# ---- sigmas ------------------------------------------------------------------------------------

def clean_sigmas(sigmas) -> torch.Tensor:
    """Schedulers may repeat a sigma or pass 1 by a rounding error. ValueError for those that do not fall in [0, 1]."""
    sigmas = sigmas.detach().float().cpu()
    sigmas = torch.where((sigmas > 1) & (sigmas < 1 + 1e-4), 1.0, sigmas)
    sigmas = torch.unique_consecutive(sigmas)
    check_sigmas(sigmas)
    if not ((sigmas.diff() < 0).all() and sigmas[0] <= 1 and sigmas[-1] >= 0):
        values = [round(value, 4) for value in sigmas.tolist()]
        shown = f"{values[:6]}"[:-1] + (", ...]" if len(values) > 6 else "]")
        raise ValueError(
            f"sigmas must fall strictly within [0, 1], got {shown}; schedules of other kinds of models (AYS, GITS, "
            "Karras down from 14.6) do not fit: use GMFlow Scheduler, or BasicScheduler with this model"
        )
    return sigmas


def check_sigmas(sigmas) -> int:
    """The number of steps; ValueError if there is none."""
    if len(sigmas) < 2:
        raise ValueError(
            f"sigmas: a sampler needs at least two values (one step), got {len(sigmas)}; is denoise 0, or the split "
            "at an end?"
        )
    return len(sigmas) - 1


# ---- the host's model --------------------------------------------------------------------------

class HostDenoiser:
    """The host's ``model``, with all that is wrapped around it, as a denoiser.

    ``model`` is called as every sampler calls it: ``model(x, sigma, **extra_args)``. Its guider is watched
    (:meth:`watch`): the mixtures of its last call count, at the x and sigma that it was given. What the wrappers
    around it make of its answer, a noise mask above all, becomes the step's :class:`Blend`. All but the host's own
    calls is in the space of the mixture, (B,C,H,W).
    """

    def __init__(self, model, extra_args: dict, info: ModelInfo | AdapterInfo, sigmas):
        self.model, self.extra_args, self.info, self.sigmas = model, extra_args, info, sigmas
        self.guider, self.model_options = model.inner_model, extra_args.get("model_options", {})
        self.capture: Capture | None = None

    def watch(self, executor, x, timestep, model_options=None, seed=None, **kwargs):
        """Around one call of the guider."""
        options = self.model_options if model_options is None else model_options
        capture, evidence = Capture(self.info.enter(x), timestep), evidence_in(options)
        if evidence is not None and not getattr(self.guider, "uses_evidence", False):  # it comes after their guidance
            given = evidence.given(capture.x, self.guider.inner_model, self.info)
            posterior = conditioned(executor, capture.x, timestep, options, seed, self.guider, self.info, given)
            capture.guided, capture.mean, self.capture = unguided(posterior), posterior.mean(), capture
            return self.info.leave(posterior.mean())
        with capturing(options, capture):
            answer = executor(x, timestep, options, seed, **kwargs)
        mean = answer[0] if isinstance(answer, (tuple, list)) else answer
        capture.mean = self.info.enter(mean).clone()  # others may write to theirs
        self.capture = capture
        return answer

    def __call__(self, x: Tensor, sigma: float) -> Guided:
        self.capture, latent = None, self.info.leave(x)
        out = self.model(latent, x.new_full((len(x),), sigma), **self.extra_args)
        if latent is not x:
            x.copy_(self.info.enter(latent))  # a wrapper may have written to it (LanPaint)
        capture = self.capture
        if capture is None or capture.mean is None:
            raise ValueError(
                f"guider: it was not asked at sigma {sigma:.3f}, and a GM sampler needs its mixture; a patch that "
                f"skips it ({evaluating(self.model_options) or 'LazyCache'}) cannot be combined with GM samplers"
            )
        guided = capture.guided or guided_by_mean(self.positive(capture), capture.mean)
        blend = self.blend(x, out, capture, capture.mean)
        return guided if blend is None else replace(guided, blend=blend)

    def positive(self, capture: Capture):
        return positive(capture, self.guider, self.info, self.model_options, "a GM sampler")

    def blend(self, x: Tensor, out: Tensor, capture: Capture, mean: Tensor) -> Blend | None:
        """What turns the guider's mean into ``out``; with a mask m its weight is m, so that known pixels stay known."""
        mask, out = self.mask(out, float(capture.sigma)), self.info.enter(out)  # the solver's: one for all images
        if mask is not None:
            mask = self.info.enter(mask)
            return Blend(mask, out - mask * mean, capture.x)
        untouched = torch.equal(out, mean) and torch.equal(x, capture.x)
        return None if untouched else Blend(1.0, out - mean, capture.x)

    def mask(self, like: Tensor, sigma: Sigma) -> Tensor | None:
        """The noise mask, of the latent's shape; it may depend on sigma (Differential Diffusion)."""
        mask, function = self.extra_args.get("denoise_mask"), self.model_options.get("denoise_mask_function")
        if mask is None:
            return None
        if function is not None:
            options = {"model": self.guider, "sigmas": self.sigmas}
            levels = torch.as_tensor(sigma, dtype=like.dtype, device=like.device).expand(len(like))
            mask = function(levels, mask, extra_options=options)
        return mask.expand_as(like)


def positive(capture: Capture, guider, info: ModelInfo | AdapterInfo, options: dict, who: str) -> Mixture:
    """The posterior of a guider's positive conditionings, or of all where none is called so."""
    conds = getattr(guider, "conds", {})
    chosen = conds.get("positive") or [cond for group in conds.values() for cond in group]
    return gather(capture, chosen, info, "positive", options, who)


def conditioned(executor, x: Tensor, timestep, options: dict, seed, guider, info: ModelInfo | AdapterInfo,
                given: Conditioned) -> Mixture:
    """What evidence makes of the mixture that somebody else's guider has moved; it is asked as often as needed."""
    def ask(xs: list[Tensor], sigma) -> list[Mixture]:
        seen = torch.as_tensor(sigma, dtype=timestep.dtype, device=timestep.device).expand(len(x))
        capture = Capture(xs[0], seen)
        with capturing(options, capture):
            answer = executor(info.leave(xs[0]), seen, options, seed)
        mean = info.enter(answer[0] if isinstance(answer, (tuple, list)) else answer)
        return [guided_by_mean(positive(capture, guider, info, options, "evidence"), mean).posterior]

    return posteriors_given(given, ask, x, float(timestep.flatten()[0]))[0]


def model_info(guider) -> ModelInfo | AdapterInfo:
    """What a guider's model says of itself: an adapter is attached to the MODEL, a GM-DiT knows itself.

    ValueError if it is of another kind.
    """
    patcher, network = getattr(guider, "model_patcher", None), getattr(guider, "inner_model", None)
    attached = None if patcher is None else patcher.get_attachment(ATTACHMENT)
    info = attached or getattr(network, "gmflow", None)
    if not isinstance(info, (ModelInfo, AdapterInfo)):
        raise ValueError(
            f"sampler: GM samplers need a GMFlow model, and the guider samples a {type(network).__name__}; "
            "load one with GMFlow Loader, make one with GMFlow Apply Adapter, or choose a core sampler"
        )
    return info


def check_finite(x: Tensor) -> Tensor:
    """x, or ValueError if it is no image."""
    if not torch.isfinite(x).all():
        raise ValueError(
            "sampler: the result holds NaN or infinite values; the weights are broken or too large for their dtype "
            "(try weight_dtype float32 in GMFlow Loader), or a patch's strength is too high"
        )
    return x


# ---- solving -----------------------------------------------------------------------------------

def solve(denoiser: HostDenoiser, x: Tensor, options: SamplerOptions, callback, disable, interrupt) -> Tensor:
    """The host's latent at the first of the denoiser's sigmas to that at their last; ``callback`` is the host's too."""
    grid, info, network = clean_sigmas(denoiser.sigmas), denoiser.info, denoiser.guider.inner_model
    run = denoiser.model_options.get("transformer_options", {}).get(RUN, Run())
    x = info.enter(x)
    names = range(len(x)) if run.batch_index is None else run.batch_index
    noise = ImageNoise(denoiser.extra_args.get("seed") or 0, names, tuple(x.shape[1:]), x.device)
    spectrum = spectrum_for(options, info, x)
    options = replace(options, shift=options.shift * info.time_shift(network), recipe=info.recipe,
                      total_substeps=info.total_substeps)
    with tqdm(total=len(grid) - 1, disable=disable) as bar:
        x = sample(
            denoiser, x, grid, options, spectrum=spectrum, noise_sampler=noise,
            callback=reporter(bar, run.recorder, callback, info.leave), interrupt=interrupt,
        )
    return info.leave(check_finite(x))


def reporter(bar, recorder, callback, leave):
    """A solver's callback that tells recorder, progress bar and host: preview, progress and cancel hang on it."""
    def report(step) -> None:
        if recorder is not None:
            recorder(step)
        bar.update()
        if callback is not None:
            state = {"i": step.index, "x": leave(step.x), "denoised": leave(step.denoised)}
            callback(state | {"sigma": step.sigma, "sigma_hat": step.sigma})

    return report


# ---- the spectrum ------------------------------------------------------------------------------

def spectrum_for(options: SamplerOptions, info: ModelInfo | AdapterInfo, x) -> SpectrumMLP | None:
    """The spectrum network that a sampler uses, on x's device; ValueError for a latent larger than it knows."""
    if options.solver != "gm-sde" or not options.spectral or info.spectrum is None:
        return None
    check_spectrum(info.spectrum, x)
    return copy.deepcopy(info.spectrum).to(x.device)


def check_spectrum(spectrum: SpectrumMLP, x) -> None:
    """ValueError for a latent larger than the spectrum network knows."""
    known, size = spectrum.config.base_size[1:], x.shape[2:]
    if any(n > limit for n, limit in zip(size, known, strict=True)):
        raise ValueError(
            f"latent: GM-SDE's spectral noise knows sizes up to {' x '.join(map(str, known))}, "
            f"got {' x '.join(map(str, size))}; turn spectral off (Sampler GM-SDE), or use GM-ODE"
        )
