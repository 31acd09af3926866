"""The pack's nodes. Imported by ComfyUI when it calls the entry point, not before."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from . import host
from .adapting import GMFlowApplyAdapter
from .conditioning import GMFlowClassConditioning, GMFlowImageNetClass
from .evidence import GMFlowApplyEvidence, GMFlowChoose, GMFlowHint, GMFlowSmallPicture
from .inspecting import GMFlowInspector
from .loading import GMFlowEmptyLatent, GMFlowLoader
from .sampling import (
    GMFlowGuider,
    GMFlowKSampler,
    GMFlowSamplerCustom,
    GMFlowScheduler,
    SamplerGMFlowODE,
    SamplerGMFlowSDE,
)

NODES: list[type[io.ComfyNode]] = [
    GMFlowLoader, GMFlowEmptyLatent, GMFlowClassConditioning, GMFlowImageNetClass, GMFlowScheduler, GMFlowGuider,
    SamplerGMFlowODE, SamplerGMFlowSDE, GMFlowKSampler, GMFlowSamplerCustom, GMFlowInspector, GMFlowApplyAdapter,
    GMFlowHint, GMFlowSmallPicture, GMFlowChoose, GMFlowApplyEvidence,
]


class GMFlowExtension(ComfyExtension):
    """Lists the bundled checkpoint among the diffusion models and offers the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load, which 0.3.64 never calls.
        host.register_models(Path(__file__).resolve().parents[1] / "models")
        return NODES
