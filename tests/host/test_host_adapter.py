"""Text-to-image adapters in a real ComfyUI, against pi-Flow's own network and pipelines on tiny random models.

The bases are ComfyUI's own classes (tiny_pack/tiny.py), the adapters the published layout. FLUX.2 needs ComfyUI 0.33.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CHECKOUTS
from hosting import MISSING, ROOT, Host, Node, version
from safetensors.torch import load_file

HERE = Path(__file__).parent
DATA = ROOT / "tests" / "data" / "piflow"
WEIGHTS = "diffusion_pytorch_model.safetensors"
NAMES = ["gmflux_tiny", "gmqwen_tiny", "gmflux2_tiny"]


@pytest.fixture(scope="session", params=CHECKOUTS or [None], ids=lambda path: version(path) if path else "no ComfyUI")
def tiny(request, tmp_path_factory):
    """A server with the tiny models' loaders beside the pack, and the adapters among the LoRAs.

    MKL's elementary functions differ by machine in the last bit, which sinusoids of a few thousand make 1e-5 of:
    the compatible ones are those that the recorded outputs were made with.
    """
    if request.param is None:
        pytest.skip(MISSING)
    base = tmp_path_factory.mktemp("comfyui_tiny")
    host = Host(request.param, base, packs=(HERE / "tiny_pack",), MKL_CBWR="COMPATIBLE")
    for name in NAMES:
        (base / "models" / "loras" / f"{name}.safetensors").symlink_to(DATA / name / "adapter" / WEIGHTS)
    host.start()
    yield host
    host.stop()


def recorded(name: str) -> dict:
    return load_file(DATA / name / "io.safetensors")


class Tiny:
    """A tiny model with its adapter in a graph, a stored text, and an empty latent of the recorded size."""

    def __init__(self, host: Host, name: str, *, base: Node | None = None, dtype: str = "float32",
                 strength: float = 1.0, batch: int = 1):
        if name == "gmflux2_tiny" and "TinyBase" in host.info and name not in host.info["TinyBase"]["input"][
            "required"
        ]["name"][0]:
            pytest.skip("this ComfyUI has no FLUX.2")
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

    def ode(self, **inputs) -> Node:
        return self.add("SamplerGMFlowODE", **dict(order=1, temperature=0.0) | inputs)

    def run(self, *links):
        """Run the graph; the tensors of these LATENT links, Qwen-Image's without their time axis."""
        found = self.host.latents(self.graph, *links)
        found = [found] if len(links) == 1 else found
        found = [t.squeeze(2) if t.ndim == 5 else t for t in found]
        return found[0] if len(links) == 1 else found


@pytest.fixture
def model(tiny):
    return lambda name, **kwargs: Tiny(tiny, name, **kwargs)


families = pytest.mark.parametrize("name", NAMES)


# ---- the authors' numbers ---------------------------------------------------------------------------


@families
@pytest.mark.parametrize("case", ["sample4_auto", "sample4_t1", "sample8_auto"])
@pytest.mark.parametrize("guider", ["core", "gmflow"])
def test_samples_of_the_authors_pipelines(model, tmp_path, name, case, guider):
    """Through a prompt: x at every network step, and the final."""
    tiny = model(name)
    if case not in tiny.io:
        pytest.skip("not recorded for FLUX.2")
    sampler = tiny.ode(temperature=1.0 if case.endswith("t1") else 0.0)
    path = tmp_path / "steps.safetensors"
    sampler = tiny.add("TinyRecord", sampler=sampler, path=str(path))
    own = guider == "gmflow" and tiny.add("GMFlowGuider", model=tiny.model, positive=tiny.text)
    tiny.run(tiny.custom(sampler, steps=int(case[6]), guider=own, node="SamplerCustomAdvanced"))
    found, expected = load_file(path), tiny.io
    torch.testing.assert_close(found["sigmas"][:-1], expected[f"{case}_sigma"], rtol=0, atol=1e-6)
    assert (found["x_src"].reshape(expected[f"{case}_x_src"].shape) - expected[f"{case}_x_src"]).abs().max() <= 2e-5
    assert (found["final"].reshape(expected[case].shape) - expected[case]).abs().max() <= 1e-3
