"""The node that looks inside a mixture."""

from __future__ import annotations

import json

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..gmflow_core.panels import ORDERS, VIEWS, draw, statistics
from . import host
from .schema import GMTrace, advanced, schema
from .tracing import TraceSource


class GMFlowInspector(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowInspector", "GMFlow Inspector",
            "See what the mixture believes at a step: its components, where it is undecided, and how far apart the choices are.",
            [
                GMTrace.Input("trace", tooltip="From GMFlow KSampler or GMFlow Sampler Custom."),
                io.Int.Input("step", default=0, min=-10_000, max=10_000, tooltip="Which network step, from 0; -1 is the last."),
                io.Int.Input("image", default=0, min=0, max=4095, tooltip="Which image of the batch, from 0. A trace keeps the first four."),
                io.Combo.Input("view", options=list(VIEWS), default=VIEWS[0],
                               tooltip="components: each one's mean. weights: where each one is believed. entropy: where the model is "
                                       "undecided. spread: standard deviation within and between components."),
                advanced(io.Combo.Input("order", options=list(ORDERS), default=ORDERS[0],
                                        tooltip="Components of neighbouring pixels need not correspond. aligned: matched over the image; "
                                                "ranked: by weight at each pixel; raw: as the network numbers them.")),
                advanced(io.Int.Input("max_components", default=8, min=1, max=64,
                                      tooltip="At most as many; with order aligned, components that agree are merged.")),
                io.Vae.Input("vae", optional=True, tooltip="Decodes latents. RGB models need none; without one, latents are shown in rough colours."),
            ],
            [
                io.Image.Output(display_name="panel"),
                io.String.Output(display_name="statistics", tooltip="JSON: per step sigma, entropy, effective components, weights, guidance shift."),
            ],
            is_output_node=True,
            search_aliases=["gmflow", "inspect", "mixture components", "entropy", "visualize"],
        )

    @classmethod
    def execute(cls, trace, step, image, view, order, max_components, vae=None) -> io.NodeOutput:
        if not isinstance(trace, TraceSource):
            raise ValueError(f"trace: got a {type(trace).__name__}; connect the trace of GMFlow KSampler or GMFlow Sampler Custom")
        recorded = trace.trace()
        picture = draw(recorded, view, step, image, order, max_components, host.decoder(trace.model, vae))
        panel = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
        return io.NodeOutput(panel, json.dumps(statistics(recorded, image)), ui=ui.PreviewImage(panel, cls=cls))
