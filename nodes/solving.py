"""GM-ODE and GM-SDE as ComfyUI calls a sampler. Nothing of ComfyUI is imported: its objects are used as they come.

Shapes: B batch, C channels, H W space.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..gmflow_core import Guided, Inpaint, SpectrumMLP
from ..gmflow_core.noise import ImageNoise
from ..gmflow_core.sampler import SamplerOptions, sample
from .adapter_info import ATTACHMENT, AdapterInfo
from .capture import Capture, gather, guided_by_mean, with_capture
from .model_info import ModelInfo


def clean_sigmas(sigmas) -> torch.Tensor:
    """Schedulers may repeat a sigma or pass 1 by a rounding error; everything else is the solver's to refuse."""
    sigmas = sigmas.detach().float().cpu()
    sigmas = torch.where((sigmas > 1) & (sigmas < 1 + 1e-4), 1.0, sigmas)
    return torch.unique_consecutive(sigmas)


def info_of(guider) -> ModelInfo | AdapterInfo | None:
    """What a guider's model is, if it predicts mixtures: an adapter is attached to the MODEL, a GM-DiT knows itself."""
    patcher = getattr(guider, "model_patcher", None)
    info = None if patcher is None else patcher.get_attachment(ATTACHMENT)
    return info or getattr(getattr(guider, "inner_model", None), "gmflow", None)


def make_inpaint(model, info: ModelInfo | AdapterInfo, extra_args: dict, sigmas):
    """``inpaint(x, sigma)`` for a noise mask, or None. The mask may depend on sigma (Differential Diffusion)."""
    mask = extra_args.get("denoise_mask")
    if mask is None:
        return None
    function, last = extra_args.get("model_options", {}).get("denoise_mask_function"), [1.0]

    def inpaint(x, sigma: float):
        if sigma > 0:
            last[0] = sigma  # at 0 every threshold would let go of what was kept until then
        at = mask if function is None else function(
            x.new_full((len(x),), last[0]), mask, extra_options={"model": model.inner_model, "sigmas": sigmas}
        )
        at, x_0, noise = (info.enter(t) for t in (at.expand_as(model.noise), model.latent_image, model.noise))
        return Inpaint(at, x_0, noise)(x, sigma)

    return inpaint


def check_sigmas(sigmas) -> int:
    """The number of steps; ValueError if there is none."""
    if len(sigmas) < 2:
        raise ValueError(
            f"sigmas: a sampler needs at least two values (one step), got {len(sigmas)}; is denoise 0, or the split at an end?"
        )
    return len(sigmas) - 1


@torch.no_grad()
def sample_gm(
    model, x, sigmas, extra_args=None, callback=None, disable=None, *, options: SamplerOptions, batch_index=None, recorder=None
) -> Tensor:
    """GM-ODE or GM-SDE as ComfyUI calls a sampler: the host's latent x at sigmas[0] to x at sigmas[-1].

    Everything here but the host's own calls lives in the space of the mixture, (B,C,H,W). ``model`` is the host's wrapper of a guider. ``batch_index`` (B,) names the images for the step noise;
    ``recorder`` sees every step, see :class:`gmflow_core.trace.Recorder`.
    """
    guider, extra_args = model.inner_model, extra_args or {}
    network, info = getattr(guider, "inner_model", None), info_of(guider)
    if not isinstance(info, (ModelInfo, AdapterInfo)):
        raise ValueError(
            f"sampler: GM samplers need a GMFlow model, and the guider samples a {type(network).__name__}; "
            "load one with GMFlow Loader, make one with GMFlow Apply Adapter, or choose a core sampler"
        )
    model_options, seed = extra_args.get("model_options", {}), extra_args.get("seed") or 0
    grid = clean_sigmas(sigmas)
    steps = check_sigmas(grid)
    bar = tqdm(total=steps, disable=disable)

    def denoiser(x, sigma: float) -> Guided:
        capture, sigmas = Capture(), x.new_full((len(x),), sigma)
        mean = info.enter(guider(info.leave(x), sigmas, model_options=with_capture(model_options, capture), seed=seed))
        if capture.guided is not None:
            return capture.guided
        conds = getattr(guider, "conds", {})
        positive = conds.get("positive") or [cond for group in conds.values() for cond in group]
        return guided_by_mean(gather(capture, positive, info, x, sigma, "positive"), mean)

    def report(step) -> None:
        if recorder is not None:
            recorder(step)
        bar.update()
        if callback is not None:  # preview, progress and cancel hang on it
            state = {"i": step.index, "x": info.leave(step.x), "denoised": info.leave(step.denoised)}
            callback(state | {"sigma": step.sigma, "sigma_hat": step.sigma})

    x = info.enter(x)
    # Another stream than the initial noise, which comes from the seed itself.
    noise = ImageNoise(seed + 1, range(len(x)) if batch_index is None else batch_index, tuple(x.shape[1:]), x.device)
    spectrum = spectrum_for(options, info, x)
    options = replace(options, shift=options.shift * info.time_shift(network), recipe=info.recipe)
    with bar:
        return info.leave(sample(
            denoiser, x, grid, options, spectrum=spectrum, noise_sampler=noise,
            inpaint=make_inpaint(model, info, extra_args, sigmas), callback=report,
        ))


def spectrum_for(options: SamplerOptions, info: ModelInfo | AdapterInfo, x) -> SpectrumMLP | None:
    """The spectrum network that a sampler uses, on x's device; ValueError for a latent larger than it knows."""
    if options.solver != "gm-sde" or not options.spectral or info.spectrum is None:
        return None
    check_spectrum(info.spectrum, x)
    return copy.deepcopy(info.spectrum).to(x.device)


def check_spectrum(spectrum: SpectrumMLP, x) -> None:
    """ValueError for a latent larger than the spectrum network knows."""
    known, size = spectrum.config.base_size[1:], x.shape[2:]
    if any(n > limit for n, limit in zip(size, known)):
        raise ValueError(
            f"latent: GM-SDE's spectral noise knows sizes up to {' x '.join(map(str, known))}, "
            f"got {' x '.join(map(str, size))}; turn spectral off (Sampler GM-SDE), or use GM-ODE"
        )
