"""The node that makes a text-to-image model predict mixtures."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from . import host_adapter
from .schema import schema


class GMFlowApplyAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowApplyAdapter", "GMFlow Apply Adapter",
            "Make FLUX.1, FLUX.2 or Qwen-Image predict Gaussian mixtures, by a pi-Flow adapter: 4 or 8 steps, every GM "
            "sampler and the inspector. For a model from any loader, before or after LoRAs.",
            [
                io.Model.Input("model", tooltip="FLUX.1, FLUX.2 dev or Qwen-Image, as files, fp8 or GGUF, "
                                                "with or without LoRAs."),
                io.Combo.Input("adapter_name", options=host_adapter.adapter_files(),
                               tooltip="A pi-Flow adapter (gmflux, gmqwen, gmflux2) in models/loras."),
                io.Float.Input("strength", default=1.0, min=-10.0, max=10.0, step=0.01, round=False,
                               tooltip="Of the adapter's LoRA; the heads are not scaled. 1 is as trained, "
                                       "other values are experiments."),
            ],
            [io.Model.Output(tooltip="A model for GMFlow nodes and for every core sampler.")],
            search_aliases=["gmflow", "pi-flow", "piflow", "adapter", "flux few steps", "qwen few steps"],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name, strength, model=None):
        """The file may be replaced under the same name."""
        stat = Path(host_adapter.adapter_path(adapter_name)).stat()
        return f"{adapter_name} {strength} {stat.st_mtime_ns} {stat.st_size}"

    @classmethod
    def execute(cls, model, adapter_name, strength=1.0) -> io.NodeOutput:
        return io.NodeOutput(host_adapter.apply_adapter(model, host_adapter.adapter_path(adapter_name), strength))
