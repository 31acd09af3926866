"""Bad inputs: each is told apart in words that say what would be right, and the server goes on."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_host_basics import BUNDLED, ROOT

from gmflow_core import GMMLP, GMMLPConfig, save_checkpoint


@pytest.fixture(autouse=True)
def still_alive(host, digits):
    yield
    assert host.process.poll() is None
    g = digits(batch=1, labels="1")
    assert g.latents(g.gm(steps=1, seed=next(host.counter))).isfinite().all()


def refused(g, *links) -> str:
    for link in links:
        g.host.save(g.graph, link)
    message = g.host.refused(g.graph)
    assert "Traceback" not in message and len(message) < 1000
    return message


# ---- files -------------------------------------------------------------------------------------

class Command:
    def __reduce__(self):
        return os.system, ("touch /tmp/gmflow-nodes-ran-a-pickle",)


def sd_like():
    return {f"model.diffusion_model.{k}.0.0.weight": torch.zeros(4, 4) for k in ("input_blocks", "output_blocks")}


def lora():
    key = "diffusion_model.transformer_blocks.0.attn1.to_q"
    return {f"{key}.lora_up.weight": torch.zeros(4, 2), f"{key}.lora_down.weight": torch.zeros(2, 4)}


def trojan() -> bytes:
    return pickle.dumps({"state_dict": Command()})


def renamed():
    state = load_file(BUNDLED)
    return {k.replace("attn1", "attention"): v for k, v in state.items()}


# name -> (what makes it: bytes, a state dict, or a function of the path; words of the message)
FILES = {
    "empty.safetensors": (b"", ["empty"]),
    "truncated.safetensors": (lambda: BUNDLED.read_bytes()[:1_000_000], ["truncated or damaged"]),
    "header.safetensors": (lambda: BUNDLED.read_bytes()[:100], ["truncated or damaged"]),
    "page.safetensors": (b"<!DOCTYPE html><html><body>Please log in</body></html>", ["HTML", "login"]),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", ["git lfs pull"]),
    "noise.safetensors": (b"\x07" * 5000, ["not a checkpoint"]),
    "sd.safetensors": (sd_like, ["whole Stable Diffusion", "not a GMFlow file"]),
    "lora.safetensors": (lora, ["this is a LoRA"]),
    "renamed.safetensors": (renamed, ["transformer_blocks.0.att"]),
    "trojan.pth": (trojan, ["refused", "nothing was run"]),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoint(host, digits, name):
    content, words = FILES[name]
    content = content() if callable(content) else content
    path = host.models / name
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    g = digits(batch=1, model_name=name)
    message = refused(g, g.empty)
    print(message)
    assert message.startswith("ValueError: model_name: ") and name in message and all(word in message for word in words)
    assert not os.path.exists("/tmp/gmflow-nodes-ran-a-pickle")


def test_a_checkpoint_of_the_plane(host, digits):
    save_checkpoint(host.models / "plane.safetensors", GMMLP(GMMLPConfig(num_gaussians=4, width=8, num_layers=2)))
    g = digits(batch=1, model_name="plane.safetensors")
    assert "points in the plane, not images" in refused(g, g.empty)


def test_a_missing_file(host, digits):
    g = digits(batch=1, model_name="gone.safetensors")
    message = refused(g, g.empty)
    assert "gone.safetensors" in message
    assert "not in list" in message or "model_name: there is no 'gone.safetensors' in " in message
    shutil.copy(BUNDLED, host.models / "gone.safetensors")
    g.latents(g.empty)
    (host.models / "gone.safetensors").unlink()
    assert "gone.safetensors" in refused(g, g.gm(steps=1))


def test_names_with_spaces_and_folders(host, digits, recognised):
    (host.models / "my models").mkdir()
    shutil.copy(BUNDLED, host.models / "my models" / "dígits 数字.safetensors")
    g = digits(model_name="my models/dígits 数字.safetensors")
    assert recognised(g.latents(g.gm(steps=4, guidance=0.3))) >= 9


def test_a_file_replaced_under_its_name(host, digits):
    """As a training run does: the next prompt paints with the new weights, and the old ones stay whole until then."""
    path = host.models / "training.safetensors"
    shutil.copy(BUNDLED, path)

    def paint(seed):
        g = digits(batch=1, labels="2", model_name="training.safetensors")
        return g.latents(g.gm(steps=2, seed=seed))

    first = paint(0)
    state, metadata = load_file(BUNDLED), metadata_of(BUNDLED)
    state["proj_out_2.bias"] = state["proj_out_2.bias"] + 0.05
    save_file(state, host.models / "next.tmp", metadata)
    os.replace(host.models / "next.tmp", path)
    second = paint(0)
    assert not torch.equal(first, second)
    os.utime(path, (0, 0))
    assert torch.equal(second, paint(0))


def metadata_of(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", ["transformer/diffusion_pytorch_model.safetensors",
                                  "transformer/diffusion_pytorch_model.bf16.safetensors"])
def test_the_published_layout(host, digits, name):
    """A small network in the layout of the authors' files, with latents of Stable Diffusion's VAE."""
    folder = host.models / "published"
    if not folder.exists():
        shutil.copytree(ROOT / "tests" / "data" / "ckpt_small", folder)
    g = digits(batch=2, labels="1", model_name=f"published/{name}")
    gm, sde, core, empty = g.latents(g.gm(steps=2), g.gm(steps=2, solver="GM-SDE"), g.core(steps=2), g.empty)
    assert gm.shape == empty.shape and gm.shape[1] == 4
    assert all(x.isfinite().all() for x in (gm, sde, core))
    panel = g.add("GMFlowInspector", trace=g.gm(steps=2).out(1))  # no VAE: rough colours
    assert len(host.done(g.graph).images(panel)) == 1


# ---- labels ------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels, words", [
    ("12", ["'12'", "knows 0 to 9"]), ("5-12", ["knows 0 to 9"]), ("-1", ["'-1' is no class"]),
    ("", ["no label given"]), ("9-2", ["runs backwards"]), ("cat", ["'cat' is no class of this model", "0 to 9"]),
    ("3;4", ["'3;4' is no class"]), ("99999999999999999999", ["is no class", "0 to 9"]), (" , \n ", ["no label given"]),
    ("1.5", ["'1.5' is no class"]),
])
def test_labels(digits, labels, words):
    g = digits(batch=1, labels=labels)
    message = refused(g, g.gm(steps=1))
    assert message.startswith("ValueError: labels: ") and all(word in message for word in words), message


def test_near_names(host, digits):
    """A model with names tells which are near."""
    state, metadata = load_file(BUNDLED), metadata_of(BUNDLED)
    named = json.loads(metadata["gmflow"])
    named["class_names"] = ["tabby cat", "tiger cat", "golden retriever", "owl", "crane, bird", "3", "six", "seven",
                            "eight", "nine"]
    save_file(state, host.models / "named.safetensors", {"gmflow": json.dumps(named)})
    g = digits(batch=1, labels="taby cat", model_name="named.safetensors")
    message = refused(g, g.gm(steps=1))
    assert "'taby cat' is no class" in message and "did you mean tabby cat" in message
    g = digits(batch=1, labels="crane, bird", model_name="named.safetensors")
    h = digits(batch=1, labels="4", model_name="named.safetensors")
    assert torch.equal(g.latents(g.gm(steps=1)), h.latents(h.gm(steps=1)))


@pytest.mark.parametrize("sampler", ["gm", "core", "custom"])
def test_the_number_of_labels(digits, sampler):
    g = digits(batch=4, labels="1,2,3")
    link = {"gm": lambda: g.gm(steps=1), "core": lambda: g.core(steps=1),
            "custom": lambda: g.custom(g.add("SamplerGMFlowSDE"), steps=1)}[sampler]()
    message = refused(g, link)
    assert "3 labels for a batch of 4 images" in message and "one for each image" in message


# ---- latents -----------------------------------------------------------------------------------

def loaded(g, name, tensor):
    file = g.host.put_latent(name, tensor)
    return g.add("LoadLatent", latent=file)


@pytest.mark.parametrize("name, shape, words", [
    ("channels", (1, 4, 16, 16), ["4 channels", "3 channels (RGB pixels)"]),
    ("odd", (1, 3, 15, 16), ["15 x 16", "multiples of 2"]),
    ("video", (1, 3, 2, 16, 16), ["2 x 16 x 16"]),
    ("huge", (1, 3, 16, 512), ["16 x 512 is 32 times the 16 x 16", "GMFlow Empty Latent"]),
])
@pytest.mark.parametrize("sampler", ["gm", "core"])
def test_latents_of_other_models(digits, name, shape, words, sampler):
    g = digits(batch=1, labels="1")
    latent = loaded(g, f"{name}.latent", torch.ones(shape))
    sample = g.gm if sampler == "gm" else g.core
    message = refused(g, sample(latent_image=latent, steps=1))
    assert all(word in message for word in words) and "GMFlow Empty Latent" in message, message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(digits, value):
    g = digits(batch=1, labels="1")
    broken = torch.zeros(1, 3, 16, 16)
    broken[0, 1, 2, 3] = value
    latent = loaded(g, f"{value}.latent", broken)
    assert "NaN or infinite" in refused(g, g.gm(latent_image=latent, steps=1, denoise=0.5))


# ---- widgets -----------------------------------------------------------------------------------

@pytest.mark.parametrize("inputs, words", [
    ({"guidance": 1.0}, "bigger than max"), ({"guidance": -0.1}, "smaller than min"),
    ({"steps": -1}, "smaller than min"), ({"denoise": 0.0}, "smaller than min"), ({"denoise": 1.5}, "bigger than max"),
    ({"order": 3}, "bigger than max"), ({"solver": "Euler"}, "Euler"), ({"steps": "many"}, "convert"),
    ({"orthogonal": 2.0}, "bigger than max"),
])
def test_widgets_are_validated(digits, inputs, words):
    g = digits(batch=1, labels="1")
    assert words in refused(g, g.gm(**inputs))


def test_a_guidance_that_is_no_number(digits):
    g = digits(batch=1, labels="1")
    assert "guidance" in refused(g, g.gm(guidance=float("nan"), steps=1))


def test_menus_are_checked(digits):
    """0.3.64 does not check them for nodes of the new kind; then the nodes do."""
    for inputs in ({"view": "nothing"}, {"order": "nothing"}):
        g = digits(batch=1, labels="1")
        g.add("GMFlowInspector", trace=g.gm(steps=1).out(1), **inputs)
        assert "nothing" in refused(g)
    g = digits(batch=1, labels="1", weight_dtype="nothing")
    assert "nothing" in refused(g, g.empty)
    for name in ("nothing", "207", "3 golden retriever", "1000 nothing"):
        g = digits(batch=1, labels="1")
        assert f"'{name}'" in refused(g, g.gm(positive=g.add("GMFlowImageNetClass", class_name=name), steps=1))
    g = digits(batch=1, labels="1")
    guider = g.add("GMFlowGuider", model=g.model, positive=g.positive, method="nothing")
    assert "nothing" in refused(g, g.custom(g.add("SamplerGMFlowODE"), guider))


# ---- sigmas ------------------------------------------------------------------------------------

@pytest.mark.parametrize("node", ["GMFlowSamplerCustom", "SamplerCustomAdvanced"])
def test_empty_sigmas(digits, node):
    g = digits(batch=1, labels="1")
    end = g.add("SplitSigmas", sigmas=g.add("GMFlowScheduler", model=g.model, steps=3), step=3)
    message = refused(g, g.custom(g.add("SamplerGMFlowODE"), sigmas=end.out(1), node=node))
    assert "at least two values (one step)" in message


def test_sigmas_that_rise(digits):
    g = digits(batch=1, labels="1")
    rising = g.add("FlipSigmas", sigmas=g.add("GMFlowScheduler", model=g.model, steps=3))
    assert "sigmas must fall strictly within [0, 1]" in refused(g, g.custom(g.add("SamplerGMFlowODE"), sigmas=rising))


def test_sigmas_of_other_models(digits):
    g = digits(batch=1, labels="1")
    big = g.add("KarrasScheduler", steps=4, sigma_max=14.6, sigma_min=0.03)
    assert "sigmas must fall strictly within [0, 1]" in refused(g, g.custom(g.add("SamplerGMFlowODE"), sigmas=big))


# ---- the inspector -----------------------------------------------------------------------------

def test_no_trace_of_a_core_sampler(digits):
    g = digits(batch=1, labels="1")
    link = g.custom(g.add("KSamplerSelect", sampler_name="euler"), steps=2)
    g.add("GMFlowInspector", trace=link.out(2))
    assert "only GM samplers leave one" in refused(g)


@pytest.mark.parametrize("inputs, words", [({"step": 2}, ["step: got 2", "0 to 1"]), ({"step": -3}, ["step"]),
                                           ({"image": 1}, ["image: got 1", "images 0 to 0"])])
def test_steps_and_images_out_of_range(digits, inputs, words):
    g = digits(batch=1, labels="1")
    g.add("GMFlowInspector", trace=g.gm(steps=2).out(1), **inputs)
    message = refused(g)
    assert message.startswith("ValueError: ") and all(word in message for word in words)


@pytest.mark.parametrize("inputs, words", [
    ({"pixel_x": 16}, "pixel_x: got 16; this latent is 16 x 16 (width x height), so 0 to 15"),
    ({"pixel_y": 99}, "pixel_y: got 99"),
])
def test_a_pixel_out_of_the_picture(host, digits, inputs, words):
    g = digits(batch=1, labels="1")
    trace = g.gm(steps=1).out(1)
    g.add("GMFlowInspector", trace=trace, **inputs)
    assert host.run(g.graph).ok  # a view that needs no pixel
    g.add("GMFlowInspector", trace=trace, view="pixel", **inputs)
    assert words in refused(g)
