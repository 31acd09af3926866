"""Nodes that sample: schedule, guidance, solvers, and two that put all of it together."""

from __future__ import annotations

from functools import partial

from comfy_api.latest import io

from ..gmflow_core import SecondOrder, flow_sigmas
from ..gmflow_core.guidance import PUBLISHED_SCALE, TILTS
from ..gmflow_core.sampler import GUIDANCE_TILT, SECOND_ORDER_TILT, SOLVERS, SamplerOptions
from . import host, host_sampling
from .adapter_info import AdapterInfo
from .guidance import METHODS, Guidance
from .schema import GMTrace, advanced, schema, seed
from .trace_source import TraceSource

MODEL = "A model from GMFlow Loader, or one with an adapter from GMFlow Apply Adapter."
STEPS = ("Network evaluations (twice as many with guidance). 4 to 8 are good, 1 works, 32 is plenty. 0 takes what the "
         "model recommends: 8, an adapter what its file's name says, else 4.")
FINAL_STEP = ("Length of the last step over that of the others, in unshifted time. 0 is the model's own: 1, as "
              "published, and 0.5 for adapters.")
GUIDANCE = ("Probabilistic guidance scale, 0 to below 1; 0 is none. Not a CFG scale: 0.45 is the published default, "
            "0.4 suits the characters, 0.02 to 0.75 are good.")
ORTHOGONAL = ("How far guidance is kept from simply brightening or contrasting the image: "
              "1 removes that part, 0 leaves it.")
SUBSTEPS = ("GM-ODE's steps between two network evaluations: they cost almost nothing. 0 is the model's own: 128 / "
            "steps rounded up, as published, 16 / steps for the characters; with adapters 128 over all steps, by their "
            "lengths.")
SHIFT = ("Time shift, times the model's own. Above 1 spends more steps at high noise; "
         "1 is right for the published model.")
ORDER = "2 also uses the previous network evaluation: better with few steps. 1 is the plain solver."
DENOISE = "1 paints from pure noise; below 1 starts from a partly noised input image and keeps more of it."
TEMPERATURE = ("0 is the model's own: 1, as trained, and for adapters 0.1 (steps - 1), at most 1. Below 1 sharpens the "
               "mixture (less variety), above 1 flattens it. Adapters take none in the last step.")
NEGATIVE = ("What to be guided away from. Left open: the null label, as trained; models with an adapter have none, "
            "and are not guided then.")
TILT = ("Second order: published moves the pixels that are most undecided several times further than asked; limited "
        "moves none further, which paints better from a few steps on.")
GUIDANCE_TILT_TIP = ("How guidance tilts the mixture: limited moves no pixel further than asked. Published moves "
                     "undecided ones several times further, at the cost of variety; published scales are tuned to it.")
BOTH_TILTS_TIP = ("How second order and guidance tilt the mixture: limited moves no pixel further than asked; "
                  "published moves undecided ones several times further, at the cost of variety.")
TRACE = ("What the mixture believed at every step, for GMFlow Inspector. Recorded only if something asks for it: of "
         "the first four images, in main memory, up to 6 K (C + 1) H W bytes an image and step (the digits 0.2 MB a "
         "step, 64 x 64 x 4 with K 8 4 MB).")


def second_order_inputs() -> list:
    """Coefficients of the second-order correction; the defaults are the published ones."""
    return [
        advanced(io.Float.Input("c_a", default=0.005, min=0.0, max=1.0, step=0.001, round=False,
                                tooltip="Second order: "
                                        "distrust of the difference of means where the mixture is wide.")),
        advanced(io.Float.Input("c_b", default=1.0, min=0.0, max=10.0, step=0.1, round=False,
                                tooltip="Second order: the same distrust, growing with guidance.")),
        advanced(io.Int.Input("correction_steps", default=0, min=0, max=16,
                              tooltip="Second order: repetitions that bring the corrected mean to the extrapolated "
                                      "one. 2 helps without guidance.")),
    ]


def solver_named(title: str) -> str:
    """The name of a solver that the page shows by its title; ValueError for any other text, which 0.3.64 passes on."""
    names = {shown: name for name, shown in SOLVERS.items()}
    if title not in names:
        raise ValueError(f"solver must be one of {', '.join(names)}, got {title!r}")
    return names[title]


def order_input():
    return io.Int.Input("order", default=2, min=1, max=2, tooltip=ORDER)


def temperature_input():
    return advanced(io.Float.Input("temperature", default=0.0, min=0.0, max=4.0, step=0.05, round=False,
                                   tooltip=TEMPERATURE))


def tilt_input(default: str, tooltip: str):
    return advanced(io.Combo.Input("tilt", options=list(TILTS), default=default, optional=True, tooltip=tooltip))


def shift_input():
    return advanced(io.Float.Input("shift", default=1.0, min=0.01, max=100.0, step=0.05, round=False, tooltip=SHIFT))


def final_step_input():
    return advanced(io.Float.Input("final_step", default=0.0, min=0.0, max=10.0, step=0.05, round=False, optional=True,
                                   tooltip=FINAL_STEP))


def sigmas_of(model, steps: int, shift: float, denoise: float, final_step: float):
    """The grid of noise levels of a model; 0 steps and a final step of 0 are its own."""
    info = host.require_gmflow(model)
    if isinstance(info, AdapterInfo) and steps and denoise == 1 and not info.takes(steps):
        host_sampling.tell(f"by its file's name this {info.family.name} adapter is made for {info.steps} steps, and "
                           f"with {steps} the contrast is another; steps 0 takes its own number")
    return flow_sigmas(steps or info.steps, shift * host.model_shift(model), denoise, final_step or info.final_step)


def substeps_input():
    return io.Int.Input("substeps", default=0, min=0, max=1024, tooltip=SUBSTEPS)


def guidance_input():
    return io.Float.Input("guidance", default=PUBLISHED_SCALE, min=0.0, max=0.99, step=0.01, round=False,
                          tooltip=GUIDANCE)


def orthogonal_input():
    return advanced(io.Float.Input("orthogonal", default=1.0, min=0.0, max=1.0, step=0.05, round=False,
                                   tooltip=ORTHOGONAL))


class GMFlowScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowScheduler", "GMFlow Scheduler",
            "The published grid: noise levels that fall evenly in raw time from 1 to 0, then shifted.",
            [
                io.Model.Input("model", tooltip=MODEL + " Its own time shift is part of the grid."),
                io.Int.Input("steps", default=8, min=0, max=10_000, tooltip=STEPS),
                shift_input(),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=DENOISE),
                final_step_input(),
            ],
            [io.Sigmas.Output(tooltip="steps + 1 noise levels.")],
            search_aliases=["gmflow", "sigmas", "scheduler", "flow schedule", "shift"],
        )

    @classmethod
    def execute(cls, model, steps, shift, denoise, final_step=0.0) -> io.NodeOutput:
        return io.NodeOutput(sigmas_of(model, steps, shift, denoise, final_step))


class GMFlowGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowGuider", "GMFlow Guider",
            "Probabilistic guidance: re-weights the mixture instead of extrapolating, so that colours do not "
            "oversaturate. Works with GM samplers and with every core sampler.",
            [
                io.Model.Input("model", tooltip=MODEL),
                io.Conditioning.Input("positive",
                                      tooltip="The classes to paint, or the text for a model with an adapter."),
                guidance_input(),
                orthogonal_input(),
                advanced(io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                                        tooltip="Guide from this share of the sampling on; 0 is its beginning.")),
                advanced(io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                                        tooltip="Guide up to this share of the sampling; 1 is its end.")),
                advanced(io.Combo.Input("method", options=list(METHODS), default=METHODS[0],
                                        tooltip="vanilla CFG shifts every component instead, "
                                                "for comparison; it uses cfg_scale.")),
                advanced(io.Float.Input("cfg_scale", default=4.0, min=1.0, max=100.0, step=0.1, round=False,
                                        tooltip="Only for vanilla CFG: its scale, 1 is none.")),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE),
                tilt_input(GUIDANCE_TILT, GUIDANCE_TILT_TIP),
            ],
            [io.Guider.Output(tooltip="For every node that takes a GUIDER.")],
            search_aliases=["gmflow", "probabilistic guidance", "guider", "cfg"],
        )

    @classmethod
    def execute(cls, model, positive, guidance, orthogonal, start_percent, end_percent, method, cfg_scale,
                negative=None, tilt=GUIDANCE_TILT) -> io.NodeOutput:
        host.require_gmflow(model)
        interval = (host.percent_to_sigma(model, start_percent, "start_percent"),
                    host.percent_to_sigma(model, end_percent, "end_percent"))
        settings = Guidance(guidance, orthogonal, method, cfg_scale, interval, tilt)
        return io.NodeOutput(host_sampling.make_guider(model, positive, negative, settings))


class SamplerGMFlowODE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "SamplerGMFlowODE", "Sampler GM-ODE",
            "GM-ODE: deterministic. "
            "Between two network evaluations it follows the mixture analytically in many substeps.",
            [
                order_input(), substeps_input(), *second_order_inputs(), temperature_input(), shift_input(),
                tilt_input(SECOND_ORDER_TILT, TILT),
            ],
            [io.Sampler.Output(tooltip="For every node that takes a SAMPLER; needs a GMFlow model.")],
            search_aliases=["gmflow", "gm-ode", "ode sampler", "gaussian mixture"],
        )

    @classmethod
    def execute(cls, order, substeps, c_a, c_b, correction_steps, temperature, shift,
                tilt=SECOND_ORDER_TILT) -> io.NodeOutput:
        second_order = SecondOrder(c_a, c_b, correction_steps, tilt)
        options = SamplerOptions(
            "gm-ode", order, substeps, second_order=second_order, temperature=temperature, shift=shift
        )
        return io.NodeOutput(host_sampling.make_sampler(options))


class SamplerGMFlowSDE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "SamplerGMFlowSDE", "Sampler GM-SDE",
            "GM-SDE: stochastic. Every step draws an image from the mixture and noises it again. Step noise follows "
            "the seed and the image: its batch_index in GMFlow nodes, its place in the batch elsewhere.",
            [
                order_input(),
                io.Boolean.Input("spectral", default=True,
                                 tooltip="Spectral sampling: neighbouring pixels are drawn together, "
                                         "so that few steps stay smooth. "
                                         "Needs a spectrum network in the checkpoint, and is off without."),
                *second_order_inputs(), temperature_input(), tilt_input(SECOND_ORDER_TILT, TILT),
            ],
            [io.Sampler.Output(tooltip="For every node that takes a SAMPLER; needs a GMFlow model.")],
            search_aliases=["gmflow", "gm-sde", "sde sampler", "gaussian mixture", "spectral"],
        )

    @classmethod
    def execute(cls, order, spectral, c_a, c_b, correction_steps, temperature, tilt=SECOND_ORDER_TILT) -> io.NodeOutput:
        second_order = SecondOrder(c_a, c_b, correction_steps, tilt)
        options = SamplerOptions("gm-sde", order, spectral=spectral, second_order=second_order, temperature=temperature)
        return io.NodeOutput(host_sampling.make_sampler(options))


class GMFlowKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowKSampler", "GMFlow KSampler",
            "Schedule, probabilistic guidance and a GM solver in one node.",
            [
                io.Model.Input("model", tooltip=MODEL),
                io.Conditioning.Input("positive",
                                      tooltip="The classes to paint, or the text for a model with an adapter."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or an image to change with denoise below 1. "
                                                        "A noise mask is kept exactly."),
                seed("Decides the initial noise, the same as the core KSampler's, and GM-SDE's step noise."),
                io.Int.Input("steps", default=8, min=0, max=10_000, tooltip=STEPS),
                io.Combo.Input("solver", options=list(SOLVERS.values()), default=SOLVERS["gm-ode"],
                               tooltip="GM-ODE is deterministic, GM-SDE stochastic with spectral noise."),
                guidance_input(),
                substeps_input(),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=DENOISE),
                advanced(order_input()),
                orthogonal_input(),
                shift_input(),
                io.Conditioning.Input("negative", optional=True, tooltip=NEGATIVE),
                final_step_input(),
                tilt_input(SECOND_ORDER_TILT, BOTH_TILTS_TIP),
            ],
            [io.Latent.Output(display_name="latent", tooltip="The images, to decode."),
             GMTrace.Output(display_name="trace", tooltip=TRACE)],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            search_aliases=["gmflow", "ksampler", "sampler", "gm-ode", "gm-sde"],
        )

    @classmethod
    def execute(cls, model, positive, latent_image, seed, steps, solver, guidance, substeps, denoise, order,
                orthogonal, shift, negative=None, final_step=0.0, tilt=SECOND_ORDER_TILT) -> io.NodeOutput:
        sigmas = sigmas_of(model, steps, shift, denoise, final_step)
        guider = host_sampling.make_guider(model, positive, negative, Guidance(guidance, orthogonal, tilt=tilt))
        sampler = host_sampling.make_sampler(SamplerOptions(
            solver_named(solver), order, substeps, second_order=SecondOrder(tilt=tilt), temperature=0.0, shift=shift
        ))
        noise = host_sampling.SeedNoise(seed)
        sample = partial(host_sampling.run, noise, guider, sampler, sigmas, latent_image)
        source = TraceSource(sample, model)
        latent, _ = source.sample(cls.hidden, slot=1)
        return io.NodeOutput(latent, source)


class GMFlowSamplerCustom(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowSamplerCustom", "GMFlow Sampler Custom",
            "The core's SamplerCustomAdvanced with a trace for GMFlow Inspector, "
            "and step noise that follows batch_index.",
            [
                io.Noise.Input("noise",
                               tooltip="RandomNoise, or DisableNoise for a second stage. Its seed also drives GM-SDE."),
                io.Guider.Input("guider",
                                tooltip="GMFlow Guider, or a core guider (its guidance then shifts the mixture)."),
                io.Sampler.Input("sampler", tooltip="A GM sampler; core samplers work and leave no trace."),
                io.Sigmas.Input("sigmas", tooltip="From GMFlow Scheduler or a core scheduler."),
                io.Latent.Input("latent_image",
                                tooltip="An empty latent, or an image to change. A noise mask is kept exactly."),
            ],
            [
                io.Latent.Output(display_name="output", tooltip="The sample at the last sigma."),
                io.Latent.Output(display_name="denoised_output", tooltip="The model's last guess of the clean image."),
                GMTrace.Output(display_name="trace", tooltip=TRACE),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            search_aliases=["gmflow", "sampler custom advanced", "custom sampling"],
        )

    @classmethod
    def execute(cls, noise, guider, sampler, sigmas, latent_image) -> io.NodeOutput:
        sample = partial(host_sampling.run, noise, guider, sampler, sigmas, latent_image)
        source = TraceSource(sample, guider.model_patcher)
        return io.NodeOutput(*source.sample(cls.hidden, slot=2), source)
