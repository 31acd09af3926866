"""Nodes that bring a model and a canvas of its size."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_api.latest import io

from ..gmflow_core import CheckpointError
from . import host
from .schema import advanced, schema


class GMFlowLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowLoader", "GMFlow Loader",
            "Load a GMFlow checkpoint: a bundled model, one of your own training, or the published ImageNet "
            "model. Size, components, classes and latent space come from the file.",
            [
                io.Combo.Input("model_name", options=host.model_files(), default=host.default_model(),
                               tooltip="A GMFlow file from models/diffusion_models, or a bundled one: "
                                       "gmdit_characters, gmdit_digits."),
                advanced(io.Combo.Input("weight_dtype", options=list(host.WEIGHT_DTYPES), default="default",
                                        tooltip="How weights are stored in memory. default lets ComfyUI choose; "
                                                "mixtures are always float32.")),
            ],
            [io.Model.Output(tooltip="A model for GMFlow nodes and for every core sampler.")],
            search_aliases=["gmflow", "gaussian mixture", "load gmflow", "gm-dit", "unet loader"],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, weight_dtype):
        """A training run may replace the file under the same name."""
        stat = Path(host.model_path(model_name)).stat()
        return f"{model_name} {weight_dtype} {stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    def execute(cls, model_name, weight_dtype="default") -> io.NodeOutput:
        try:
            return io.NodeOutput(host.load_model(host.model_path(model_name), weight_dtype))
        except CheckpointError as error:
            raise ValueError(f"model_name: {error}") from None  # the page shows the type, and ours has a long name


class GMFlowEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowEmptyLatent", "GMFlow Empty Latent",
            "An empty latent of the size and channels that the model was trained on.",
            [
                io.Model.Input("model", tooltip="A GMFlow model: its file says the size."),
                io.Int.Input("batch_size", default=1, min=1, max=4096,
                             tooltip="Images in the batch. With one label each, as many as there are labels."),
            ],
            [io.Latent.Output(tooltip="All zeros, (batch, channels, height, width).")],
            search_aliases=["gmflow", "empty latent", "latent size", "batch"],
        )

    @classmethod
    def execute(cls, model, batch_size) -> io.NodeOutput:
        config = host.require_classes(model, "EmptySD3LatentImage (FLUX.2: EmptyFlux2LatentImage)").config
        size = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        return io.NodeOutput({"samples": torch.zeros(size, device=host.intermediate_device())})
