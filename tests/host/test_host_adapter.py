"""Text-to-image adapters in a real ComfyUI, against pi-Flow's own network and pipelines on tiny random models.

The bases are ComfyUI's own classes (tiny_pack/tiny.py), the adapters the published layout. FLUX.2 needs ComfyUI 0.33.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUTS
from hosting import MISSING, ROOT, Host, Node, version
from safetensors.torch import load_file, save_file

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
        return self.add("SamplerGMFlowODE", **dict(order=1) | inputs)

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


# ---- the pack's nodes ----------------------------------------------------------------------------------


@families
def test_the_ksampler_is_the_advanced_graph(model, name):
    """Steps 0 are the adapter's 4, temperature and last step its own; no negative: no guidance, said once."""
    tiny = model(name)
    simple = tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=tiny.empty, seed=3,
                      steps=0, order=1)
    noise = tiny.add("RandomNoise", noise_seed=3)
    guider = tiny.add("GMFlowGuider", model=tiny.model, positive=tiny.text, guidance=0.0)
    custom = tiny.custom(tiny.ode(), noise=noise, guider=guider, node="SamplerCustomAdvanced", steps=0)
    before = tiny.host.log().count("sampling without guidance")
    got, expected = tiny.run(simple, custom)
    assert torch.equal(got, expected) and got.isfinite().all()
    assert tiny.host.log().count("sampling without guidance") == before + 1


@families
@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE"])
def test_guidance_by_a_negative_prompt(model, name, solver):
    tiny = model(name)
    other = tiny.add("TinyText", name=name, row=1)
    common = dict(model=tiny.model, positive=tiny.text, latent_image=tiny.empty, steps=4, solver=solver, guidance=0.3)
    guided, more, none, open_ = tiny.run(
        tiny.add("GMFlowKSampler", **common, negative=other),
        tiny.add("GMFlowKSampler", **common | {"guidance": 0.6}, negative=other),
        tiny.add("GMFlowKSampler", **common | {"guidance": 0.0}, negative=other), tiny.add("GMFlowKSampler", **common),
    )
    assert torch.equal(none, open_) and guided.isfinite().all()
    assert 0.01 < (guided - none).abs().mean() < (more - none).abs().mean()


@families
def test_scheduler(model, name):
    """The grid of the recorded pipelines; final step 1 and other steps where asked for; denoise keeps the tail."""
    tiny = model(name)
    add = lambda **inputs: tiny.add("GMFlowScheduler", model=tiny.model, **inputs)  # noqa: E731
    ends = [sigmas_of(tiny, add(**inputs))
            for inputs in (dict(steps=0), dict(steps=2, final_step=1.0), dict(steps=2, denoise=0.5))]
    raw = lambda *ts: torch.tensor([3.2 * t / (1 + 2.2 * t) for t in ts])  # noqa: E731
    for got, expected in zip(ends, (raw(1, 5 / 7, 3 / 7, 1 / 7, 0), raw(1, 0.5, 0), raw(3 / 7, 1 / 7, 0)),
                             strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def sigmas_of(tiny: Tiny, sigmas: Node) -> torch.Tensor:
    """What a SIGMAS link holds, by the steps that a sampler saw."""
    path = tiny.host.base / "output" / f"sigmas{len(tiny.graph)}.safetensors"
    sampler = tiny.add("TinyRecord", sampler=tiny.ode(), path=str(path))
    tiny.run(tiny.custom(sampler, sigmas=sigmas))
    return load_file(path)["sigmas"]


@families
def test_an_image_is_the_same_in_any_batch(model, name):
    one, three = model(name), model(name, batch=3)

    def add(tiny, latent):
        return tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=latent, steps=4,
                        solver="GM-SDE")

    alone = one.run(add(one, one.empty))
    batch, last = three.run(
        add(three, three.empty), add(three, three.add("LatentFromBatch", samples=three.empty, batch_index=2, length=1)),
    )
    torch.testing.assert_close(batch[:1], alone, rtol=0, atol=2e-2)
    torch.testing.assert_close(batch[2:], last, rtol=0, atol=2e-2)
    assert (batch[0] - batch[1]).abs().mean() > 0.1


@families
def test_noise_mask_and_image_to_image(model, name):
    """Where the mask is 0 the image stays; without a mask, less denoise keeps more of it."""
    tiny = model(name)
    generator = torch.Generator().manual_seed(0)
    image = tiny.latent(torch.randn(tiny.io["sample_noise"].shape, generator=generator), "image")
    solid = tiny.add("SolidMask", value=1.0, width=32, height=64)
    mask = tiny.add("MaskComposite", destination=tiny.add("SolidMask", value=0.0, width=64, height=64), source=solid,
                    x=0, y=0, operation="add")
    masked = tiny.add("SetLatentNoiseMask", samples=image, mask=mask)
    common = dict(model=tiny.model, positive=tiny.text, steps=4)
    kept, weak, strong, original = tiny.run(
        tiny.add("GMFlowKSampler", **common, latent_image=masked),
        tiny.add("GMFlowKSampler", **common, latent_image=image, denoise=0.3),
        tiny.add("GMFlowKSampler", **common, latent_image=image), image,
    )
    half = kept.shape[-1] // 2
    assert (kept - original)[..., half + 1 :].abs().max() < 1e-4
    assert (kept - original)[..., : half - 1].abs().mean() > 0.05
    assert (weak - original).abs().mean() < (strong - original).abs().mean()


@families
@pytest.mark.parametrize("size", [(9, 5), (2, 3)])
def test_odd_sizes(model, name, size):
    tiny = model(name)
    channels = tiny.io["sample_noise"].shape[1]
    latent = tiny.latent(torch.zeros(1, channels, *size))
    got = tiny.run(tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=latent, steps=2))
    assert got.shape == (1, channels, *size) and got.isfinite().all()


@families
def test_inspector(model, name):
    """A trace in the mixture's space, in rough colours; every view."""
    tiny = model(name)
    sampler = tiny.add("GMFlowKSampler", model=tiny.model, positive=tiny.text, latent_image=tiny.empty, steps=4)
    views = [tiny.add("GMFlowInspector", trace=sampler.out(1), view=view, step=1)
             for view in ("components", "sheet", "timeline", "pixel")]
    text = tiny.add("PreviewAny", source=views[0].out(1))
    result = tiny.host.done(tiny.graph)
    assert all(result.images(view)[0].startswith(b"\x89PNG") for view in views)
    numbers = json.loads(result.outputs[text[0]]["text"][0])
    assert len(numbers["steps"]) == 4
    assert numbers["steps"][0]["sigma"] == 1 and len(numbers["steps"][0]["weights"]) == 8


@families
def test_core_samplers_see_an_ordinary_flow_model(model, name):
    """euler on the GM grid is Euler on the recorded mean: here on the mean that the pack itself returns."""
    tiny = model(name)
    sigmas = tiny.add("GMFlowScheduler", model=tiny.model, steps=4)
    euler = tiny.custom(tiny.add("KSamplerSelect", sampler_name="euler"), sigmas=sigmas)
    ours = tiny.custom(tiny.ode(substeps=1, temperature=1.0), sigmas=sigmas)
    got, expected = tiny.run(euler, ours)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def skipped(text: str) -> bool:
    return any(word in text for word in ("CUDA", "xpu"))


@families
def test_every_core_sampler_and_scheduler(model, name):
    """Each sampler runs with the adapter if it runs without."""
    tiny = model(name)
    samplers = tiny.host.info["KSampler"]["input"]["required"]["sampler_name"]
    samplers = samplers[0] if isinstance(samplers[0], list) else samplers[1]["options"]
    schedulers = tiny.host.info["KSampler"]["input"]["required"]["scheduler"]
    schedulers = schedulers[0] if isinstance(schedulers[0], list) else schedulers[1]["options"]
    pairs = [(sampler, "simple") for sampler in samplers] + [("euler", scheduler) for scheduler in schedulers]
    failed = []
    for sampler, scheduler in pairs:
        graph = model(name)
        with_adapter, plain = (
            graph.add("KSampler", model=m, positive=graph.text, negative=graph.text, latent_image=graph.empty,
                      cfg=1.0, steps=3, sampler_name=sampler, scheduler=scheduler, seed=0)
                      for m in (graph.model, graph.base)
        )
        result = tiny.host.run({**graph.graph,
                                "save": {"class_type": "SaveLatent",
                                         "inputs": {"samples": with_adapter, "filename_prefix": "core"}}})
        if not result.ok:
            without = tiny.host.run({**graph.graph,
                                     "save": {"class_type": "SaveLatent",
                                              "inputs": {"samples": plain, "filename_prefix": "core"}}})
            failed += [(sampler, scheduler, result.error)] if without.ok else []
    assert not failed and len(pairs) > 45


@families
@pytest.mark.parametrize("solver", ["SamplerGMFlowODE", "SamplerGMFlowSDE"])
def test_core_cfg_with_a_negative(model, name, solver):
    """CFGGuider's guidance moves the mixture; at scale 1 it is none."""
    tiny = model(name)
    other, sampler = tiny.add("TinyText", name=name, row=1), tiny.add(solver)
    guiders = [tiny.add("CFGGuider", model=tiny.model, positive=tiny.text, negative=other, cfg=cfg)
               for cfg in (1.0, 3.0)]
    none, three, basic = tiny.run(*(tiny.custom(sampler, guider=guider) for guider in guiders), tiny.custom(sampler))
    torch.testing.assert_close(none, basic, rtol=0, atol=2e-2)
    assert (three - none).abs().mean() > 0.01


WORKFLOWS = {"text_to_image_flux1": "gmflux_tiny", "text_to_image_qwen": "gmqwen_tiny",
             "text_to_image_flux2": "gmflux2_tiny",
             "what_flux_is_undecided_about": "gmflux_tiny"}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_the_workflows_run(model, workflow):
    """The committed API file with a tiny base, a stored text and colours in the place of its loaders,
    on a small latent."""
    tiny = model(WORKFLOWS[workflow])
    prompt = json.loads((ROOT / "workflows" / "api" / f"{workflow}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "UNETLoader":
            node |= {"class_type": "TinyBase", "inputs": {"name": tiny.name, "dtype": "float32"}}
        elif kind == "CLIPTextEncode":
            node |= {"class_type": "TinyText", "inputs": {"name": tiny.name, "row": 0}}
        elif kind == "VAELoader":
            node |= {"class_type": "TinyVAE", "inputs": {}}
        elif kind == "GMFlowApplyAdapter":
            inputs["adapter_name"] = f"{tiny.name}.safetensors"
        elif "width" in inputs:
            inputs |= {"width": 128, "height": 192}
    prompt = {key: node for key, node in prompt.items() if "CLIPLoader" not in node["class_type"]}
    result = tiny.host.done(prompt)
    saved = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert saved and all(result.outputs[key]["images"] for key in saved)


# ---- what is said ------------------------------------------------------------------------------------------


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


def test_bad_files_are_one_line_and_the_server_lives(model, tmp_path):
    """The file's own faults are in tests/test_adapter.py; here what the page shows of some."""
    state = load_file(DATA / "gmflux_tiny" / "adapter" / WEIGHTS)
    block = "single_transformer_blocks.%d.proj_mlp"
    cases = {
        "dx": ({k: v for k, v in state.items() if "proj_out_" not in k} | {"proj_out.weight": torch.ones(640, 128)},
               "a DX adapter"),
        "lora": ({k: v for k, v in state.items() if "lora" in k}, "an ordinary LoRA"),
        "lacking": (state | {f"{block % 7}.lora_{x}.weight": state[f"{block % 0}.lora_{x}.weight"] for x in "AB"},
                    "lacks modules that the adapter's LoRA changes: single_transformer_blocks.7.proj_mlp;"),
        "misfit": (state | {"single_transformer_blocks.0.proj_mlp.lora_B.weight": torch.ones(500, 4)},
                   "has them in another shape"),
        "unknown": (state | {f"transformer_blocks.0.nonsense.lora_{x}.weight": torch.ones(2, 2) for x in "AB"},
                    "transformer_blocks.0.nonsense;"),
    }
    for name, (content, message) in cases.items():
        tiny = model("gmflux_tiny")
        loras = tiny.host.base / "models" / "loras"
        save_file({key: value.clone() for key, value in content.items()}, loras / f"bad_{name}.safetensors")
        tiny.graph[tiny.model[0]]["inputs"]["adapter_name"] = f"bad_{name}.safetensors"
        tiny.host.save(tiny.graph, tiny.custom(tiny.ode()))
        error = tiny.host.refused(tiny.graph).rstrip("\n")
        assert message in error and error.startswith("ValueError: ") and "\n" not in error
    assert tiny.host.get("/system_stats")


# ---- beside the page: ComfyUI's own objects ---------------------------------------------------------------


@pytest.fixture
def inside(tiny):
    """A task of inside_adapter.py, in this ComfyUI's Python."""

    def run(task: str, name: str) -> dict:
        if name == "gmflux2_tiny" and name not in tiny.info["TinyBase"]["input"]["required"]["name"][0]:
            pytest.skip("this ComfyUI has no FLUX.2")
        return json.loads(tiny.python_inside(HERE / "inside_adapter.py", str(ROOT), task, name).splitlines()[-1])

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


def test_gguf(tiny, inside):
    """A Q8_0 base through ComfyUI-GGUF, which lies beside the repository: no further from float32 than
    the plain base twice."""
    pack = ROOT.parent / "ComfyUI-GGUF"
    if not pack.is_dir() or "gmflux2_tiny" not in tiny.info["TinyBase"]["input"]["required"]["name"][0]:
        pytest.skip("ComfyUI-GGUF does not lie beside the repository, "
                    "or this ComfyUI does not know FLUX.1 in a tiny size")
    tiny.env["GGUF_PACK"] = str(pack)
    found = inside("gguf", "gmflux_tiny")
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
