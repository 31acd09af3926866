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
    assert sorted(said) == ["GMFlowClassConditioning", "GMFlowEmptyLatent", "GMFlowGuider", "GMFlowKSampler", "GMFlowScheduler"]
    for text in said.values():
        assert text == "ValueError: model: this is a SD3 model, not a GMFlow one; load one with GMFlow Loader"


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
