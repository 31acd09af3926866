"""What needs a Python inside ComfyUI: the import's cost, models of another kind, command-line options."""

import json
from pathlib import Path

import pytest
import torch
from hosting import ROOT

INSIDE = Path(__file__).parent / "inside.py"


def inside(host, task: str, *options: str) -> dict:
    return json.loads(host.python_inside(INSIDE, str(ROOT), task, *options).splitlines()[-1])


@pytest.fixture(scope="module")
def foreign(host):
    return inside(host, "foreign")


def test_import_costs_nothing(foreign):
    """No tensor is touched, no module beyond ComfyUI's own is loaded, and the path stays as it is."""
    assert foreign["seconds"] < 0.3 and foreign["operations"] == [] and foreign["modules"] == []
    assert foreign["core_nodes"] and not foreign["on_path"]


def test_other_models_are_refused_by_name(foreign):
    said = dict(foreign["said"])
    assert said.pop("a core sampler") == "no error"  # the model itself is fine
    assert "got a list; connect the trace" in said.pop("GMFlowInspector")
    for name in ("SamplerGMFlowODE", "SamplerGMFlowSDE"):
        text = said.pop(name)
        assert "GM samplers need a GMFlow model" in text and "SD3" in text and "choose a core sampler" in text
    assert sorted(said) == ["GMFlowClassConditioning", "GMFlowEmptyLatent", "GMFlowGuider", "GMFlowKSampler",
                            "GMFlowScheduler"]
    for text in said.values():
        assert text == ("ValueError: model: this is a SD3 model, not a GMFlow one; load one with GMFlow Loader, "
                        "or give FLUX.1, FLUX.2 or Qwen-Image an adapter with GMFlow Apply Adapter")


@pytest.mark.parametrize("option, dtype", [("--force-fp16", "torch.float16"), ("--bf16-unet", "torch.bfloat16")])
def test_half_precision_servers(host, recognised, option, dtype):
    found = inside(host, "sample", option)["sample"]
    assert found["weights"] == dtype and found["latent"] == "torch.float32"
    assert recognised(torch.tensor(found["pixels"]).reshape(10, 3, 16, 16)) >= 9


def test_a_trajectory_is_that_of_the_core(host):
    """GM-ODE over 8 steps, the same network on both sides: every pixel within 1e-4."""
    differences = inside(host, "parity")["parity"]
    print(differences)
    assert len(differences) == 4 and max(differences.values()) < 1e-4


def test_a_compiled_model(host):
    """torch.compile of the core's node: GM sampler, core sampler and GM sampler again on one compiled network."""
    assert all(difference < 1e-3 for difference in inside(host, "compile")["differences"])


def test_the_inspectors_vae(host):
    """One of the model's space decodes; any other is refused, and the message says which would do."""
    found = inside(host, "vaes")["found"]
    for case in ("rgb none", "rgb pixels", "latents none", "latents taesd"):
        values, finite = found.pop(case).split(" values, ")
        assert int(values) > 16 and finite == "finite True", case
    rgb, latents = ("paints RGB pixels; leave vae open, or connect pixel_space of Load VAE",
                    "connect a Stable Diffusion 1 VAE")
    assert found == {
        "rgb taesd": f"ValueError: vae: this one decodes 4 channels, and this model {rgb}",
        "rgb sixteen": f"ValueError: vae: this one decodes 16 channels, and this model {rgb}",
        "rgb video": f"ValueError: vae: this one is for video or sound, and this model {rgb}",
    } | {
        f"latents {kind}": f"ValueError: vae: this one {what}, "
                           f"and this model paints 4-channel latents of Stable Diffusion's VAE; {latents}"
        for kind, what in (("pixels", "decodes 3 channels"), ("sixteen", "decodes 16 channels"),
                           ("video", "is for video or sound"))
    }
