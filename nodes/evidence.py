"""Nodes that say what is known of an image."""

from __future__ import annotations

import math

from comfy_api.latest import io

from ..gmflow_core.hints import KINDS
from ..gmflow_core.inspection.statistics import chosen_hypothesis
from . import host, host_sampling
from .evidence_source import Chosen, EvidenceSource, Hint, SmallPicture, from_images, mask_for
from .schema import GMEvidence, GMTrace, advanced, schema
from .trace_source import TraceSource

STD = "How far it may be off, in units of the model's [-1, 1]: smaller is stricter."
PREVIOUS = "More of what is known: both hold."
WHERE = ("its pixels", "everywhere")
OUTPUT = "For GMFlow Apply Evidence, or for previous of another one."


def joined(previous, part) -> EvidenceSource:
    """The evidence of a link, if there is one, and one part more."""
    if previous is None:
        return EvidenceSource((part,))
    return EvidenceSource((*require_evidence(previous, "previous").parts, part))


def require_evidence(evidence, name: str) -> EvidenceSource:
    if not isinstance(evidence, EvidenceSource):
        raise ValueError(f"{name}: got a {type(evidence).__name__}; connect GMFlow Hint, GMFlow Small Picture or "
                         f"GMFlow Choose")
    return evidence


def check_std(std: float, name: str = "std") -> None:
    if not 0 < std < math.inf:
        raise ValueError(f"{name} must be a number > 0, got {std}")


class GMFlowHint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowHint", "GMFlow Hint",
            "Paint what you know of the image: a few pixels, a part of it, a sketch, or its brightness; the model "
            "does the rest.",
            [
                io.Image.Input("image", tooltip="The picture that says it, of the image's shape; it is resized to "
                                                "the image's size."),
                io.Combo.Input("kind", options=list(KINDS), default=KINDS[0],
                               tooltip="colour: the pixels as they are. hue: their colour in any brightness. "
                                       "brightness: the mean of red, green "
                                       "and blue alone, to colour a grey picture."),
                io.Float.Input("std", default=0.05, min=0.005, max=4.0, step=0.005, round=0.001,
                               tooltip=STD + " 0.05 keeps painted pixels, 0.3 to 1 is for sketches."),
                io.Mask.Input("mask", optional=True,
                              tooltip="Where the picture is known; grey values weaken it. Without one, everywhere."),
                io.Vae.Input("vae", optional=True, tooltip="Of a model that paints latents (experimental, kind "
                                                           "colour only). RGB models need none."),
                GMEvidence.Input("previous", optional=True, tooltip=PREVIOUS),
            ],
            [GMEvidence.Output(display_name="evidence", tooltip=OUTPUT)],
            search_aliases=["gmflow", "hint", "sketch", "colorize", "inpaint", "evidence", "posterior sampling"],
        )

    @classmethod
    def execute(cls, image, kind, std, mask=None, vae=None, previous=None) -> io.NodeOutput:
        check_std(std)
        picture = from_images(image)
        latents = None
        if vae is not None:
            if kind != "colour":
                raise ValueError(f"kind: {kind} is for models of RGB pixels; with a vae only colour works, for "
                                 f"latents are no colours")
            latents = host_sampling.encode(vae, image)
        part = Hint(picture, mask_for(picture, mask), kind, std, latents)
        return io.NodeOutput(joined(previous, part))


class GMFlowSmallPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowSmallPicture", "GMFlow Small Picture",
            "A small picture of the image: the model paints what it would be when made larger.",
            [
                io.Image.Input("image", tooltip="The image's height and width must be one whole multiple of the "
                                                "picture's."),
                io.Float.Input("std", default=0.02, min=0.005, max=4.0, step=0.005, round=0.001, tooltip=STD),
                GMEvidence.Input("previous", optional=True, tooltip=PREVIOUS),
            ],
            [GMEvidence.Output(display_name="evidence", tooltip=OUTPUT)],
            search_aliases=["gmflow", "upscale", "super resolution", "enlarge", "evidence"],
        )

    @classmethod
    def execute(cls, image, std, previous=None) -> io.NodeOutput:
        check_std(std)
        return io.NodeOutput(joined(previous, SmallPicture(from_images(image), std)))


class GMFlowChoose(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowChoose", "GMFlow Choose",
            "Ask for one of the hypotheses that GMFlow Inspector shows: the same image with that choice.",
            [
                GMTrace.Input("trace", tooltip="Of a run that was undecided, from GMFlow KSampler or GMFlow Sampler "
                                               "Custom."),
                io.Int.Input("step", default=0, min=-10_000, max=10_000,
                             tooltip="Of which network step, from 0; -1 is the last."),
                io.Int.Input("image", default=0, min=0, max=4095, tooltip="Of which image of the batch, from 0."),
                io.Int.Input("hypothesis", default=1, min=1, max=64,
                             tooltip="Its number in the inspector's pictures (order aligned), from 1."),
                io.Float.Input("strength", default=1.0, min=0.05, max=100.0, step=0.05, round=0.01,
                               tooltip="1 asks, 5 insists: the colour may be off by 1 / strength, in units of the "
                                       "model's [-1, 1]."),
                advanced(io.Int.Input("max_components", default=8, min=1, max=64,
                                      tooltip="As in the inspector, whose numbers depend on it.")),
                io.Combo.Input("where", options=list(WHERE), default=WHERE[0],
                               tooltip="its pixels: as much as the hypothesis has weight at each; "
                                       "everywhere: at all pixels alike."),
                GMEvidence.Input("previous", optional=True, tooltip=PREVIOUS),
            ],
            [GMEvidence.Output(display_name="evidence", tooltip=OUTPUT)],
            search_aliases=["gmflow", "hypothesis", "choose", "ink", "steer", "evidence"],
        )

    @classmethod
    def execute(cls, trace, step, image, hypothesis, strength, max_components=8, where=WHERE[0],
                previous=None) -> io.NodeOutput:
        if not isinstance(trace, TraceSource):
            raise ValueError(f"trace: got a {type(trace).__name__}; connect the trace of GMFlow KSampler or GMFlow "
                             f"Sampler Custom")
        check_std(strength, "strength")
        colour, share = chosen_hypothesis(trace.trace(), step, image, hypothesis, max_components)
        mask = share.unsqueeze(0) if where == "its pixels" else None
        part = Chosen(colour, 1 / strength, f"hypothesis {hypothesis}", mask)
        part.check(host.require_gmflow(trace.model))
        return io.NodeOutput(joined(previous, part))


class GMFlowApplyEvidence(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowApplyEvidence", "GMFlow Apply Evidence",
            "A model that paints what agrees with the evidence.",
            [
                io.Model.Input("model", tooltip="A GMFlow model. Evidence that it already has stays."),
                GMEvidence.Input("evidence", tooltip="From GMFlow Hint, GMFlow Small Picture or GMFlow Choose."),
                io.Boolean.Input("propagate", default=True,
                                 tooltip="Let it change the other pixels too: one more network call a step (with "
                                         "guidance two). Off is enough for grey and "
                                         "small pictures. In core samplers with core guiders nothing propagates."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, round=0.001,
                               tooltip="Where propagation ends, of the whole way; 0.2 for rough sketches, which then "
                                       "only set the direction."),
                advanced(io.Float.Input("limit", default=3.0, min=0.1, max=100.0, step=0.1, round=0.01,
                                        tooltip="How far the network's input may be shifted, in standard deviations "
                                                "of its noise.")),
            ],
            [io.Model.Output(tooltip="For every sampler. GMFlow's own samplers and guider use all of it; core "
                                     "guiders are weaker, core samplers weakest.")],
            search_aliases=["gmflow", "evidence", "hint", "condition", "posterior sampling"],
        )

    @classmethod
    def execute(cls, model, evidence, propagate, end_percent, limit=3.0) -> io.NodeOutput:
        source = require_evidence(evidence, "evidence")
        return io.NodeOutput(host_sampling.with_evidence(model, source, propagate, end_percent, limit))
