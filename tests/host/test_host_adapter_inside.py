"""Text-to-image adapters beside the page: ComfyUI's own objects, in its own Python (inside_adapter.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from adapters import NAMES, families, require
from hosting import ROOT

HERE = Path(__file__).parent

GGUF = ROOT.parent / "ComfyUI-GGUF"   # beside the repository


@pytest.fixture(scope="session")
def answers(tiny):
    """All that inside_adapter.py says of a model: one process for each, for its start costs more than its tasks."""
    known = {}

    def answer(name: str) -> dict:
        require(tiny, name)
        if name not in known:
            tiny.env["GGUF_PACK"] = str(GGUF) if GGUF.is_dir() else ""
            known[name] = json.loads(
                tiny.python_inside(HERE / "inside_adapter.py", str(ROOT), name).splitlines()[-1])
        return known[name]

    return answer


@pytest.fixture
def inside(answers):
    """A task of inside_adapter.py, in this ComfyUI's Python."""

    def run(task: str, name: str) -> dict:
        found = answers(name)[task]
        assert "error" not in found, found["error"]
        return found

    return run


@families
def test_mixtures_of_the_authors_network(inside, name):
    for found in inside("mixtures", name).values():
        assert found["means"] <= 1e-5 and found["log_weights"] <= 1e-5 and found["log_std"] <= 1e-6


@families
def test_the_plain_model_stays_as_it_was(inside, name):
    found = inside("alternating", name)
    assert all(found["same"]) and len(found["same"]) == 14 and found["captured"]


@families
def test_loras(inside, name):
    """On a layer that the adapter changes too: in any order; on the replaced layers:
    ignored and named, right on the plain model."""
    found = inside("loras", name)
    assert found["after"] <= 1e-5 and found["before"] <= 1e-5 and found["none"] > 1e-2
    same, lines, plain, restored = zip(found["ignored"][:4], found["ignored"][4:], strict=True)
    assert all(same) and lines == (1, 1) and max(plain) <= 1e-5 and all(restored)


@families
def test_a_lora_as_a_hook(inside, name):
    found = inside("hooks", name)
    assert found["difference"] == 0 and found["without"] > 1e-2


@families
def test_narrow_bases(inside, name):
    """bfloat16 and fp8 bases: not much further from float32 with the adapter than without."""
    found = inside("dtypes", name)
    for dtype, limit in (("torch.bfloat16", 0.01), ("torch.float8_e4m3fn", 0.15)):
        assert found[f"adapter {dtype}"] <= max(2 * found[f"plain {dtype}"], 1e-3) and found[f"adapter {dtype}"] < limit


@pytest.mark.skipif(not GGUF.is_dir(), reason="ComfyUI-GGUF does not lie beside the repository")
def test_gguf(inside):
    """A Q8_0 base through ComfyUI-GGUF: no further from float32 than the plain base twice."""
    found = dict(inside("gguf", "gmflux_tiny"))
    assert found.pop("class") == "GGUFModelPatcher" and found["plain"] < 0.02
    assert all(error <= 2.5 * found["plain"] for error in found.values())


@families
def test_compiled(inside, name):
    assert all(inside("compiled", name)["same"])


@families
def test_a_negative_leaves_the_positive_s_mixture(inside, name):
    found = inside("guidance", name)
    assert found["mixture"] <= 1e-5 and found["moved"] > 1e-2


@families
def test_odd_sizes_batches_and_reference_latents(inside, name):
    found = inside("shapes", name)
    assert len(found) >= 3 and max(found.values()) <= 1e-6


@families
def test_low_memory(inside, name):
    found = inside("low_memory", name)
    assert found["lowered"] and found["difference"] <= 1e-5


@pytest.mark.parametrize("name", NAMES[:2])
def test_models_without_the_layers_are_named(inside, name):
    found = inside("unreachable", name)
    assert "a Nunchaku model has no layers" in found["NunchakuFluxTransformer"]
    assert "a TensorRT engine has" in found["TrTUnet"]
    assert "model has no layers" in found["Other"] and "paints latents of" in found["axes"]
    assert all(text.startswith("ValueError: model: ") for text in found.values())


@families
def test_reference_latents(inside, name):
    """Kontext, Edit: their tokens are part of the hidden state, as in the plain model, and not of the mixture."""
    for found in inside("references", name).values():
        assert found["means"] <= 1e-5 and found["log_weights"] <= 1e-5 and found["tokens"] >= 12


@families
def test_a_saved_model_is_restored_by_its_adapter(inside, name):
    found = inside("saved", name)
    assert found["lines"] == [0, 1] and found["keys"] and found["difference"] <= 1e-5 and found["unasked"] > 0.1


@families
def test_nothing_is_registered(inside, name):
    assert inside("registered", name) == {"own": 0, "layer": True, "table": True}


@families
def test_a_vae_of_its_own(inside, name):
    """The inspector's pictures are those of VAE Decode; a VAE of another space is named."""
    found = inside("decoding", name)
    assert found["difference"] <= 1e-6 and found["spread"] > 0.1
    assert all(text.startswith("ValueError: vae: this one decodes") for text in found["others"].values())
