"""pi-Flow's tiny random models in graphs of a real ComfyUI: what the tests of text-to-image adapters share."""

from __future__ import annotations

import pytest
import torch
from hosting import ROOT, Host, Node
from safetensors.torch import load_file

DATA = ROOT / "tests" / "data" / "piflow"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = ["gmflux_tiny", "gmqwen_tiny", "gmflux2_tiny"]

families = pytest.mark.parametrize("name", NAMES)


def options(host: Host, node: str, widget: str) -> list:
    """What a menu offers."""
    spec = host.info[node]["input"]["required"][widget]
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"]


def require(host: Host, name: str) -> None:
    """Skip what this ComfyUI does not know."""
    if name not in options(host, "TinyBase", "name"):
        pytest.skip("this ComfyUI has no FLUX.2")


def recorded(name: str) -> dict:
    return load_file(DATA / name / "io.safetensors")


class Tiny:
    """A tiny model with its adapter in a graph, a stored text, and an empty latent of the recorded size."""

    def __init__(self, host: Host, name: str, *, base: Node | None = None, dtype: str = "float32",
                 strength: float = 1.0, batch: int = 1):
        require(host, name)
        self.host, self.name, self.graph, self.io = host, name, host.graph(), recorded(name)
        self.base = base or self.add("TinyBase", name=name, dtype=dtype)
        self.model = self.add("GMFlowApplyAdapter", model=self.base, adapter_name=f"{name}.safetensors",
                              strength=strength)
        self.text = self.add("TinyText", name=name, row=0)
        self.empty = self.latent(torch.zeros_like(self.io["sample_noise"]).repeat_interleave(batch, 0))

    def add(self, class_type: str, **inputs) -> Node:
        return self.graph.add(class_type, **inputs)

    def latent(self, samples: torch.Tensor, name: str = "empty") -> Node:
        if self.name == "gmqwen_tiny":
            samples = samples.unsqueeze(2)
        file = self.host.put_latent(f"{name}_{self.name}_{'x'.join(map(str, samples.shape))}.latent", samples)
        return self.add("LoadLatent", latent=file)

    def custom(self, sampler: Node, node: str = "GMFlowSamplerCustom", steps: int = 4, **inputs) -> Node:
        sigmas = inputs.pop("sigmas", None) or self.add("GMFlowScheduler", model=self.model, steps=steps)
        guider = inputs.pop("guider", None) or self.add("BasicGuider", model=self.model, conditioning=self.text)
        noise = inputs.pop("noise", None) or self.add("TinyNoise", name=self.name)
        return self.add(node, **dict(noise=noise, guider=guider, sampler=sampler, sigmas=sigmas,
                                     latent_image=self.empty) | inputs)

    def options(self, node: str, widget: str) -> list:
        return options(self.host, node, widget)

    def ode(self, **inputs) -> Node:
        return self.add("SamplerGMFlowODE", **dict(order=1) | inputs)

    def run(self, *links):
        """Run the graph; the tensors of these LATENT links, Qwen-Image's without their time axis."""
        found = self.host.latents(self.graph, *links)
        found = [found] if len(links) == 1 else found
        found = [t.squeeze(2) if t.ndim == 5 else t for t in found]
        return found[0] if len(links) == 1 else found


def sigmas_of(tiny: Tiny, sigmas: Node) -> torch.Tensor:
    """What a SIGMAS link holds, by the steps that a sampler saw."""
    path = tiny.host.base / "output" / f"sigmas{len(tiny.graph)}.safetensors"
    sampler = tiny.add("TinyRecord", sampler=tiny.ode(), path=str(path))
    tiny.run(tiny.custom(sampler, sigmas=sigmas))
    return load_file(path)["sigmas"]
