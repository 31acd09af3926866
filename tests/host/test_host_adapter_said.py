"""Text-to-image adapters in a real ComfyUI: what is said, of bad files above all, in one line; the server lives."""

from __future__ import annotations

import pytest
import torch
from adapters import DATA, WEIGHTS, families, sigmas_of
from safetensors.torch import load_file, save_file


@families
def test_nodes_for_classes_name_what_to_use(model, name):
    for build, instead in (
        (lambda tiny: tiny.add("GMFlowEmptyLatent", model=tiny.model), "EmptySD3LatentImage"),
        (lambda tiny: tiny.add("GMFlowKSampler", model=tiny.model, latent_image=tiny.empty,
                               positive=tiny.add("GMFlowClassConditioning", model=tiny.model, labels="1")),
         "CLIP Text Encode"),
    ):
        tiny = model(name)
        node = build(tiny)
        tiny.host.save(tiny.graph, node)
        error = tiny.host.refused(tiny.graph).rstrip("\n")
        assert instead in error and "\n" not in error


@families
@pytest.mark.parametrize("guider", ["core", "gmflow"])
def test_classes_are_no_texts(model, name, guider):
    """GMFlow ImageNet Class takes no MODEL that it could refuse."""
    tiny = model(name)
    classes = tiny.add("GMFlowImageNetClass", class_name=tiny.options("GMFlowImageNetClass", "class_name")[3])
    guided = (tiny.add("BasicGuider", model=tiny.model, conditioning=classes) if guider == "core" else
              tiny.add("GMFlowGuider", model=tiny.model, positive=tiny.text, negative=classes))
    tiny.host.save(tiny.graph, tiny.custom(tiny.ode(), guider=guided))
    error = tiny.host.refused(tiny.graph).rstrip("\n")
    role = "positive" if guider == "core" else "negative"
    assert error.startswith(f"ValueError: {role}: it holds classes") and "use CLIP Text Encode" in error


@families
def test_a_second_adapter_is_refused(model, name):
    tiny = model(name)
    again = tiny.add("GMFlowApplyAdapter", model=tiny.model, adapter_name=f"{name}.safetensors")
    tiny.host.save(tiny.graph,
                   tiny.custom(tiny.ode(), guider=tiny.add("BasicGuider", model=again, conditioning=tiny.text)))
    assert "an adapter is applied to it already" in tiny.host.refused(tiny.graph)


@pytest.mark.parametrize("name, other", [("gmflux_tiny", "gmqwen_tiny"), ("gmqwen_tiny", "gmflux_tiny"),
                                         ("gmflux_tiny", "gmflux2_tiny"), ("gmflux2_tiny", "gmflux_tiny")])
def test_adapters_of_another_family_are_refused(model, name, other):
    tiny = model(name)
    tiny.graph[tiny.model[0]]["inputs"]["adapter_name"] = f"{other}.safetensors"
    tiny.host.save(tiny.graph, tiny.custom(tiny.ode()))
    error = tiny.host.refused(tiny.graph).rstrip("\n")
    family = {"gmflux_tiny": "FLUX.1", "gmqwen_tiny": "Qwen-Image", "gmflux2_tiny": "FLUX.2"}[other]
    assert error.startswith("ValueError: model: this") and family in error and "\n" not in error


def test_a_class_model_takes_no_adapter(tiny):
    graph = tiny.graph()
    model = graph.add("GMFlowApplyAdapter", model=graph.add("GMFlowLoader"), adapter_name="gmflux_tiny.safetensors")
    tiny.save(graph, graph.add("GMFlowEmptyLatent", model=model))
    assert "this GMFlowModel model has no layers" in tiny.refused(graph)


@families
def test_guidance_embedding(model, name):
    """The adapter's own where the conditioning names none; another one is a line in the log."""
    if name == "gmqwen_tiny":
        pytest.skip("Qwen-Image has none")
    right = {"gmflux_tiny": 3.5, "gmflux2_tiny": 4.0}[name]
    results = []
    for guidance in (None, right, 2.0):
        tiny = model(name)
        text = tiny.text if guidance is None else tiny.add("FluxGuidance", conditioning=tiny.text, guidance=guidance)
        before = tiny.host.log().count("know only")
        results.append(
            tiny.run(tiny.custom(tiny.ode(), guider=tiny.add("BasicGuider", model=tiny.model, conditioning=text)))
        )
        assert tiny.host.log().count("know only") - before == (guidance == 2.0)
    assert torch.equal(results[0], results[1]) and (results[0] - results[2]).abs().mean() > 1e-3


@families
def test_other_numbers_of_steps(model, name):
    """FLUX.1's adapters know one number of steps; the sampler's default, 8, is another than 4."""
    tiny = model(name)
    lines = []
    for inputs in ({}, {"steps": 4}, {"steps": 0}, {"steps": 2, "denoise": 0.5}):
        tiny = model(name)
        before = tiny.host.log().count("is made for 4 steps")
        tiny.run(tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=tiny.empty, **inputs))
        lines.append(tiny.host.log().count("is made for 4 steps") - before)
    assert lines == ([1, 0, 0, 0] if name == "gmflux_tiny" else [0] * 4)


@families
def test_a_later_shift_wins_and_is_named(model, name):
    tiny = model(name)
    earlier = tiny.add("ModelSamplingSD3", model=tiny.base, shift=5.0)
    tiny.graph[tiny.model[0]]["inputs"]["model"] = earlier
    before = tiny.host.log().count("instead of the adapter's 3.2")
    assert (sigmas_of(tiny, tiny.add("GMFlowScheduler", model=tiny.model, steps=2, final_step=1.0))[1].item()
            == pytest.approx(1.6 / 2.1))
    assert tiny.host.log().count("instead of the adapter's 3.2") == before
    tiny = model(name)
    tiny.model = tiny.add("ModelSamplingSD3", model=tiny.model, shift=5.0)
    assert (sigmas_of(tiny, tiny.add("GMFlowScheduler", model=tiny.model, steps=2, final_step=1.0))[1].item()
            == pytest.approx(2.5 / 3))
    assert tiny.host.log().count("instead of the adapter's 3.2") == before + 1


STATE = load_file(DATA / "gmflux_tiny" / "adapter" / WEIGHTS)
BLOCK = "single_transformer_blocks.%d.proj_mlp"
LORA = {key: value for key, value in STATE.items() if "lora" in key}
NO_HEADS = {key: value for key, value in STATE.items() if "proj_out_" not in key}
WIDER = {key: torch.cat([value, value], dim=-1) for key, value in STATE.items()
         if key in ("proj_out_means.weight", "proj_out_logweights.weight", "proj_out_logstds.1.weight")}
WIDER["norm_out.linear.weight"] = torch.ones(512, 256)
WIDER["norm_out.linear.bias"] = torch.ones(512)
BAD = {
    "dx": (NO_HEADS | {"proj_out.weight": torch.ones(640, 128)}, "a DX adapter"),
    "asymflow": (NO_HEADS | {"proj_buffer": torch.ones(768, 128)}, "an AsymFlow adapter"),
    "lora": (LORA, "an ordinary LoRA"),
    "controlnet": (NO_HEADS | {"controlnet_x_embedder.weight": torch.ones(2, 2)}, "a ControlNet"),
    "whole": (STATE | {"x_embedder.weight": torch.ones(2, 2)}, "a whole model and no adapter"),
    "width": (STATE | WIDER, "the adapter is for FLUX.1 of hidden size 256"),
    "lacking": (STATE | {f"{BLOCK % 7}.lora_{x}.weight": STATE[f"{BLOCK % 0}.lora_{x}.weight"] for x in "AB"},
                "lacks modules that the adapter's LoRA changes: single_transformer_blocks.7.proj_mlp;"),
    "misfit": (STATE | {f"{BLOCK % 0}.lora_B.weight": torch.ones(500, 4)}, "has them in another shape"),
    "unknown": (STATE | {f"transformer_blocks.0.nonsense.lora_{x}.weight": torch.ones(2, 2) for x in "AB"},
                "transformer_blocks.0.nonsense;"),
    "partner": ({key: value for key, value in STATE.items() if key != f"{BLOCK % 0}.lora_B.weight"},
                "single_transformer_blocks.0.proj_mlp.lora_B.weight is missing beside its partner"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_files(model, bad):
    """The file's own faults are in tests/test_adapter.py; here what the page shows, and the next prompt runs."""
    tiny, (content, message) = model("gmflux_tiny"), BAD[bad]
    loras = tiny.host.base / "models" / "loras"
    save_file({key: value.clone() for key, value in content.items()}, loras / f"bad_{bad}.safetensors")
    tiny.graph[tiny.model[0]]["inputs"]["adapter_name"] = f"bad_{bad}.safetensors"
    tiny.host.save(tiny.graph, tiny.custom(tiny.ode()))
    error = tiny.host.refused(tiny.graph).rstrip("\n")
    assert message in error and error.startswith("ValueError: ") and "\n" not in error
    tiny = model("gmflux_tiny")
    assert tiny.run(tiny.custom(tiny.ode(), steps=1)).isfinite().all()
