"""The border to ComfyUI, second part: guiders and samplers.

GM samplers and the GM guider read a model's mixtures from a :class:`~.capture.Capture`; everything else in
ComfyUI sees a flow model, its guidance and its samplers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..gmflow_core import Conditioned, Guided
from ..gmflow_core.echo import posteriors_given
from ..gmflow_core.sampler import SamplerOptions
from .capture import CAPTURE, Capture, capturing, followed, gather, guided_by_mean, placed, shifted
from .evidence_source import EVIDENCE, EvidenceSource, Placed, evidence_in
from .guidance import Guidance, nearest_cfg
from .host import GMFlowModel, known, require_gmflow
from .model_info import ModelInfo, check_size, null_conditioning
from .patches import replacing_cfg
from .solving import RUN, HostDenoiser, Run, check_finite, check_sigmas, conditioned, model_info, solve

INSTEAD = 'use GMFlow Guider\'s method "vanilla CFG" or the core\'s CFGGuider with it'
PREDICT_NOISE = comfy.patcher_extension.WrappersMP.PREDICT_NOISE


def tell(text: str) -> None:
    """One warning line: in the log, and under the executing node."""
    logging.warning("GMFlow: %s", text)
    context, page = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and page is not None:
        page.send_progress_text(text, context.node_id)


# ---- guidance ----------------------------------------------------------------------------------

class GMFlowGuider(comfy.samplers.CFGGuider):
    """Probabilistic guidance: GM samplers get the guided mixture, others its mean. Vanilla CFG is the core's own."""

    guidance, told = Guidance(), False

    @property
    def uses_evidence(self) -> bool:
        """Itself, on each role's posterior before it guides. Vanilla CFG is the core's: there it comes after."""
        return not self.guidance.vanilla

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        options, info = {} if model_options is None else model_options, model_info(self)
        capture = Capture(info.enter(x), timestep)
        acts = self.guidance.acts_at(float(timestep.flatten()[0]))
        if self.guidance.vanilla:
            return comfy.samplers.sampling_function(
                self.inner_model, x, timestep, self.conds.get("negative"), self.conds["positive"],
                self.cfg if acts else 1.0, model_options=options, seed=seed,
            )
        if self.cfg != 1.0 and not self.told:  # somebody set it (CFGOverride)
            self.told = True
            tell(f"a patch sets the CFG scale to {self.cfg:g}, which does nothing with probabilistic guidance; "
                 f"{INSTEAD}")
        outer = options.get("transformer_options", {}).get(CAPTURE)  # a GM sampler's
        with capturing(options, capture):
            guided = self.guided(["positive", "negative"] if acts else ["positive"], x, timestep, options, capture)
        if outer is not None:
            outer.guided = guided
        return info.leave(guided.posterior.mean())

    def guided(self, roles: list[str], x, timestep, options: dict, capture: Capture) -> Guided:
        """The mixtures of these roles, guided, and what other nodes' post-CFG functions (PAG, ...) make of the mean."""
        conds, info = [self.conds[role] for role in roles], model_info(self)
        evidence = evidence_in(options)
        if evidence is None:
            posteriors, means = self.posteriors(roles, x, timestep, options, capture)
        else:
            given = evidence.given(capture.x, self.inner_model, info)
            posteriors, means = self.given(given, roles, timestep, options, capture)
        cond = posteriors[0]
        guided = self.guidance(*posteriors) if len(posteriors) == 2 else guided_by_mean(cond, cond.mean())
        if not options.get("sampler_post_cfg_function"):
            return guided
        mean = info.leave(guided.posterior.mean())
        with placed(options, "sampler_cfg_function", lambda args: x - mean):  # in place: they keep state in the options
            patched = comfy.samplers.cfg_function(
                self.inner_model, means[0], means[-1], nearest_cfg(mean, means[0], means[-1]), x, timestep,
                model_options=options, cond=conds[0], uncond=conds[-1],
            )
        return shifted(guided, info.enter(patched))

    def posteriors(self, roles: list[str], x, timestep, options: dict, capture: Capture) -> tuple[list, list]:
        """The mixtures of these roles, and the host's means of them."""
        conds, info = [self.conds[role] for role in roles], model_info(self)
        means = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        return [
            followed(gather(capture, cond, info, role, options, "the GMFlow Guider"), info.enter(mean))
            for cond, role, mean in zip(conds, roles, means, strict=True)
        ], list(means)

    def given(
        self, given: Conditioned, roles: list[str], timestep, options: dict, capture: Capture
    ) -> tuple[list, list]:
        """Likewise, given evidence: asked at one x for all roles, and again at each its own."""
        info, last = model_info(self), []

        def ask(xs, sigma):
            found, last[:] = [], []
            for at, group in [(xs[0], roles)] if len(xs) == 1 else zip(xs, [[role] for role in roles], strict=True):
                seen = torch.as_tensor(sigma, dtype=timestep.dtype, device=timestep.device).expand(len(at))
                inner = Capture(at, seen)
                with capturing(options, inner):
                    posteriors, means = self.posteriors(group, info.leave(at), seen, options, inner)
                found += posteriors
                last.extend(means)
            return found

        return posteriors_given(given, ask, capture.x, float(timestep.flatten()[0])), last


def make_guider(model, positive, negative, guidance: Guidance) -> GMFlowGuider:
    """A GUIDER of a GMFlow model. ``negative`` None is the null label, or no guidance for texts, which have none."""
    info, guider = require_gmflow(model), GMFlowGuider(model)
    if negative is not None:
        guider.set_conds(positive, negative)
    elif isinstance(info, ModelInfo):
        guider.set_conds(positive, null_conditioning(info.config))
    else:
        if guidance.acts_at(guidance.interval[0]):
            tell(f"no negative is connected, and {info.family.name} has no null label: sampling without guidance")
        guider.inner_set_conds({"positive": positive})
        guidance = replace(guidance, scale=0.0, cfg_scale=1.0)
    guider.set_cfg(guidance.cfg_scale if guidance.vanilla else 1.0)
    guider.guidance = guidance
    replacing = replacing_cfg(model.model_options)
    if replacing and not guidance.vanilla:
        tell(f"{', '.join(replacing)} replaces classifier-free guidance and does nothing with probabilistic guidance; "
             f"{INSTEAD}")
    return guider


# ---- evidence ----------------------------------------------------------------------------------

def encode(vae, image):
    """A picture (N,H,W,3) as the host's latents. ValueError if they are none."""
    latents = vae.encode(image[..., :3])
    if not latents.isfinite().all():
        raise ValueError("vae: it makes NaN or infinite values of this picture (a VAE in half precision?)")
    return latents


def with_evidence(model, source: EvidenceSource, propagate: bool, end_percent: float, limit: float):
    """A copy of a MODEL that samples given evidence, added to what it has. ValueError if it does not suit the model."""
    source.check(require_gmflow(model))
    copy, before = model.clone(), evidence_in(model.model_options)
    if before is not None:
        source = EvidenceSource(before.source.parts + source.parts)
    else:
        copy.add_wrapper_with_key(PREDICT_NOISE, EVIDENCE, tilted_mean)
    copy.model_options[EVIDENCE] = Placed(source, propagate, end_percent, limit)
    return copy


def tilted_mean(executor, x, timestep, model_options=None, seed=None, **kwargs):
    """What a core sampler gets of a core guider on a MODEL with evidence: the tilted mixture's mean.
    Nothing propagates."""
    options, guider = {} if model_options is None else model_options, executor.class_obj
    evidence, watchers = evidence_in(options), guider.model_options.get("transformer_options", {}).get("wrappers", {})
    if evidence is None or getattr(guider, "uses_evidence", False) or CAPTURE in watchers.get(PREDICT_NOISE, {}):
        return executor(x, timestep, options, seed, **kwargs)
    info = model_info(guider)
    at = info.enter(x)
    given = replace(evidence.given(at, guider.inner_model, info), propagate=False)
    return info.leave(conditioned(executor, at, timestep, options, seed, guider, info, given).mean())


# ---- sampling ----------------------------------------------------------------------------------

@contextmanager
def watching(denoiser: HostDenoiser) -> Iterator[None]:
    """The denoiser watches its guider, closest to the network of all that is wrapped around a guider's call."""
    options = denoiser.guider.model_options
    comfy.patcher_extension.add_wrapper_with_key(PREDICT_NOISE, CAPTURE, denoiser.watch, options, is_model_options=True)
    try:
        yield
    finally:
        options["transformer_options"]["wrappers"][PREDICT_NOISE].pop(CAPTURE)


@torch.no_grad()
def sample_gm(model, x, sigmas, extra_args=None, callback=None, disable=None, *, options: SamplerOptions):
    """GM-ODE or GM-SDE as ComfyUI calls a sampler, from its latent at sigmas[0]; ``model`` wraps a guider."""
    denoiser = HostDenoiser(model, extra_args or {}, model_info(model.inner_model), sigmas)
    interrupt = comfy.model_management.throw_exception_if_processing_interrupted
    with watching(denoiser):
        return solve(denoiser, x, options, callback, disable, interrupt)


def make_sampler(options: SamplerOptions):
    """A SAMPLER for every node that takes one."""
    return comfy.samplers.KSAMPLER(sample_gm, {"options": options})


class SeedNoise:
    """NOISE of a seed, the same as the core's nodes draw."""

    def __init__(self, seed: int):
        self.seed = seed

    def generate_noise(self, latent: dict):
        return comfy.sample.prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))


def canvas(patcher, latent: dict) -> dict:
    """The latent with the model's channels and size, as the core's nodes make it; ValueError if it is too large."""
    ratios = {name: latent.get(name) for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    samples, ratio = latent["samples"], ratios["downscale_ratio_spacial"]
    if isinstance(patcher.model, GMFlowModel) and not getattr(samples, "is_nested", False):
        scale = 1.0 if ratio is None else min(1.0, ratio / patcher.model.latent_format.spacial_downscale_ratio)
        check_size(patcher.model.gmflow, [int(n * scale) for n in samples.shape[2:]])
    samples = known(comfy.sample.fix_empty_latent_channels, patcher, samples, **ratios)
    return {name: value for name, value in latent.items() if name not in ratios} | {"samples": samples}


def run(noise, guider, sampler, sigmas, latent: dict, recorder=None) -> tuple[dict, dict]:
    """Sample as the core's advanced custom sampler does: (latent, denoised latent)."""
    check_sigmas(sigmas)
    patcher, last = guider.model_patcher, {}
    latent = canvas(patcher, latent)
    options = guider.model_options.setdefault("transformer_options", {})
    with placed(options, RUN, Run(latent.get("batch_index"), recorder)):
        result = guider.sample(
            noise.generate_noise(latent), latent["samples"], sampler, sigmas, denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(patcher, len(sigmas) - 1, last),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=noise.seed,
        ).to(comfy.model_management.intermediate_device())
    denoised = patcher.model.process_latent_out(last["x0"].cpu()) if "x0" in last else result
    return latent | {"samples": check_finite(result)}, latent | {"samples": denoised}
