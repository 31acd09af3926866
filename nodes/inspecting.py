"""The node that looks inside a mixture."""

from __future__ import annotations

import json

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..gmflow_core.inspection.pixels import MOST_BYTES, save_pixels
from ..gmflow_core.inspection.scene import ARRANGEMENTS, Scene, look
from ..gmflow_core.inspection.statistics import statistics
from ..gmflow_core.inspection.trace import save_trace
from ..gmflow_core.inspection.views import VIEWS, paint
from . import host
from .schema import GMTrace, advanced, schema
from .trace_source import TraceSource


class GMFlowInspector(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowInspector", "GMFlow Inspector",
            "See what the mixture believes at a step: its components, where it is undecided, "
            "and how far apart the choices are.",
            [
                GMTrace.Input("trace", tooltip="From GMFlow KSampler or GMFlow Sampler Custom."),
                io.Int.Input("step", default=0, min=-10_000, max=10_000,
                             tooltip="Which network step, from 0; -1 is the last."),
                io.Int.Input("image", default=0, min=0, max=4095,
                             tooltip="Which image of the batch, from 0. A trace keeps the first four."),
                io.Combo.Input("view", options=list(VIEWS), default="components",
                               tooltip="components: each one's mean. weights: where each one is believed. entropy: "
                                       "where the model is undecided. spread: standard deviation within and between "
                                       "components. winners: the heaviest component. guidance: what it changed. "
                                       "timeline: all steps, and what becomes of each hypothesis. pixel: one pixel's "
                                       "mixture. sheet: an overview."),
                advanced(io.Combo.Input("order", options=list(ARRANGEMENTS), default=ARRANGEMENTS[0],
                                        tooltip="Components of neighbouring pixels need not correspond. aligned: in "
                                                "hypotheses, the same over the image and at every step; ranked: by "
                                                "weight at each pixel; raw: as the network numbers them.")),
                advanced(io.Int.Input("max_components", default=8, min=1, max=64,
                                      tooltip="At most as many; with order aligned, "
                                              "the components of a pixel that belong to one hypothesis are merged.")),
                advanced(io.Int.Input("pixel_x", default=-1, min=-1, max=16383,
                                      tooltip="For view pixel: its column in the latent, from 0; -1 is the middle. "
                                              "A click into the small picture sets it.")),
                advanced(io.Int.Input("pixel_y", default=-1, min=-1, max=16383,
                                      tooltip="For view pixel: its row in the latent, from 0; -1 is the middle. "
                                              "A click into the small picture sets it.")),
                advanced(io.Boolean.Input("save_tensors", default=False,
                                          tooltip="Also write every mixture of the trace to the output folder as "
                                                  "gmflow_trace_*.safetensors (half precision, 2 K (C + 1) H W bytes "
                                                  "an image, three times a step).")),
                io.Vae.Input("vae", optional=True, tooltip="Decodes latents. RGB models need none; without one, "
                                                           "latents are shown in rough colours."),
            ],
            [
                io.Image.Output(display_name="panel", tooltip="The picture of the view."),
                io.String.Output(display_name="statistics",
                                 tooltip="JSON: for each step sigma, entropy, effective components, standard "
                                         "deviations, weights, hypotheses, shifts and KL; with view pixel, "
                                         "that pixel's whole mixture too."),
            ],
            is_output_node=True,
            search_aliases=["gmflow", "inspect", "mixture components", "entropy", "visualize"],
        )

    @classmethod
    def execute(cls, trace, step, image, view, order, max_components, pixel_x=-1, pixel_y=-1, save_tensors=False,
                vae=None) -> io.NodeOutput:
        if not isinstance(trace, TraceSource):
            raise ValueError(f"trace: got a {type(trace).__name__}; "
                             "connect the trace of GMFlow KSampler or GMFlow Sampler Custom")
        recorded, decode = trace.trace(), host.decoder(trace.model, vae)
        height, width = recorded.steps[0].x.shape[-2:]
        pixel = (width // 2 if pixel_x < 0 else pixel_x, height // 2 if pixel_y < 0 else pixel_y)
        scene = look(recorded, step, image, order, max_components, decode, pixel)
        panel = torch.from_numpy(np.asarray(paint(scene, view), dtype=np.float32) / 255)[None]
        if save_tensors:
            save_trace(recorded, host.output_file("gmflow_trace", ".safetensors"))
        shown = (ui.PreviewImage(panel, cls=cls).as_dict()
                 | {"gmflow_pixels": [pixels(scene, host.decoder(trace.model))]})
        numbers = statistics(recorded, image, max_components, pixel if view == "pixel" else None)
        return io.NodeOutput(panel, json.dumps(numbers), ui=shown)


def pixels(scene: Scene, colours) -> str:
    """The file among the previews where the page finds every pixel's components (web/js/inspector.js),
    or why there is none.

    A text: the page and programs take objects for files that they may list and show.
    """
    path = host.temp_file("gmflow_pixels", ".safetensors")
    if save_pixels(scene, path, colours):
        return path.name
    return (f"No components under the pointer: they would take more than {MOST_BYTES // 2**20} MB. "
            "Try fewer max_components.")
