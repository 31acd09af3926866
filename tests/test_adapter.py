"""Text-to-image adapters without a host: files, heads, packing. Oracle: the authors' network on tiny random models."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from piflow import FAMILIES, adapter_file, changed, io
from recorded import DATA
from safetensors.torch import load_file, save_file

from gmflow_core import CheckpointError
from gmflow_core.adapter import load_adapter, mean_tokens, pack_channels, pack_tokens, parse_adapter, unpack_channels
from gmflow_core.model import unpack_mixture

tiny = pytest.mark.parametrize("name", FAMILIES)


# ---- reading ---------------------------------------------------------------------------------------


@tiny
def test_everything_is_told_by_the_file(name):
    adapter = load_adapter(adapter_file(name))
    assert adapter.family.name == FAMILIES[name]
    assert (adapter.heads.components, adapter.width, adapter.steps) == (8, 128, 4)
    assert adapter.family.channels == io(name)["means"].shape[2]
    assert adapter.family.guidance == {"FLUX.1": 3.5, "FLUX.2": 4.0}.get(FAMILIES[name])
    file = load_file(adapter_file(name))
    assert 2 * len(adapter.lora) == sum(".lora_" in key for key in file)
    for module, (a, b) in adapter.lora.items():
        assert torch.equal(a, file[f"{module}.lora_A.weight"]) and torch.equal(b, file[f"{module}.lora_B.weight"])
    assert torch.equal(adapter.modulation.weight, file["norm_out.linear.weight"])
    assert "K = 8" in str(adapter) and FAMILIES[name] in str(adapter)


def test_a_prefix_is_taken_off(tmp_path):
    state = {f"transformer.{key}": value for key, value in load_file(adapter_file("gmqwen_tiny")).items()}
    save_file(state, tmp_path / "a.safetensors")  # nor is there metadata
    assert load_adapter(tmp_path / "a.safetensors").lora.keys() == load_adapter(adapter_file("gmqwen_tiny")).lora.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_precisions(tmp_path, dtype):
    save_file({key: value.to(dtype) for key, value in load_file(adapter_file("gmflux_tiny")).items()},
              tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").heads.means.weight.dtype == dtype


def test_one_layer_for_the_deviation(tmp_path):
    one = dict(proj_out_logstds__1__weight=torch.full((1, 128), 0.5), proj_out_logstds__1__bias=torch.tensor([2.0]))
    adapter = load_adapter(changed(tmp_path / "a.safetensors", drop="proj_out_logstds", **one))
    assert adapter.heads.log_std(torch.ones(3, 128)).tolist() == [66.0] * 3


@pytest.mark.parametrize("name, steps", [
    ("gmflux_k8_piid_8step", 8), ("gmqwen_k8_datafree_piid_4step", 4), ("piflow 16-steps", 16), ("adapter", 4),
    ("stepped_3", 4),
])
def test_recommended_steps(tmp_path, name, steps):
    assert load_adapter(changed(tmp_path / f"{name}.safetensors")).steps == steps


@pytest.mark.parametrize("name, family, modules", [("gmflux1", "FLUX.1", 154), ("gmqwen", "Qwen-Image", 240)])
def test_published_keys_and_shapes(tmp_path, name, family, modules):
    """All keys of the published training configs: recognised, used up, none left over."""
    shapes = json.loads((DATA / "piflow" / f"keys_{name}.json").read_text())
    adapter = parse_adapter({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, tmp_path)
    assert ((adapter.family.name, len(adapter.lora), adapter.heads.components, adapter.width)
            == (family, modules, 8, 3072))
    assert adapter.heads.means.weight.shape == (512, 3072) and len(adapter.heads.log_stds) == 2


def test_the_file_may_go_after_reading(tmp_path):
    path = changed(tmp_path / "a.safetensors")
    adapter = load_adapter(path)
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    assert adapter.heads.means.weight.abs().sum() > 0 and all(a.abs().sum() > 0 for a, _ in adapter.lora.values())


# ---- refusals --------------------------------------------------------------------------------------


def lora(module, inputs=128, outputs=128):
    module = module.replace(".", "__")
    return {f"{module}__lora_A__weight": torch.ones(4, inputs), f"{module}__lora_B__weight": torch.ones(outputs, 4)}


HEADS = ("proj_out_means", "proj_out_logweights", "proj_out_logstds")
BAD = {
    "DX": (
        dict(drop=HEADS, metadata={}, proj_out__weight=torch.ones(640, 128)),
        "proj_out_means is missing: a DX adapter",
    ),
    "DX by metadata": (dict(metadata={"policy_config": '{"type": "DX", "mode": "grid"}'}), "a DX adapter"),
    "another policy": (dict(metadata={"policy_config": '{"type": "Free"}'}), "type 'Free', and only GMFlow"),
    "policy no JSON": (dict(metadata={"policy_config": "GMFlow"}), "policy_config names no type"),
    "policy a list": (dict(metadata={"policy_config": "[1]"}), "policy_config names no type"),
    "AsymFlow": (
        dict(drop=HEADS, proj_buffer=torch.ones(768, 128), proj_out__weight=torch.ones(768, 128)),
        "an AsymFlow adapter",
    ),
    "LoRA": (dict(drop=HEADS + ("norm_out",)), "an ordinary LoRA, for Load LoRA"),
    "kohya LoRA": (
        dict(drop="", metadata={}, only=True, lora_unet_double_blocks_0__lora_down__weight=torch.ones(4, 8)),
        "an ordinary LoRA",
    ),
    "ControlNet": (dict(drop=HEADS, controlnet_x_embedder__weight=torch.ones(2, 2)), "a ControlNet"),
    "whole": (dict(x_embedder__weight=torch.ones(2, 2)), "a whole model and no adapter"),
    "whole in ComfyUI's names": (
        dict(drop=HEADS, double_blocks__0__img_mlp__0__weight=torch.ones(2, 2)),
        "a whole model and no adapter",
    ),
    "GM-DiT": (
        dict(drop=HEADS, pos_embed__proj__weight=torch.ones(2), proj_out_2__weight=torch.ones(2)),
        "load it with GMFlow Loader",
    ),
    "own": (dict(metadata={"gmflow": "{}"}), "load it with GMFlow Loader"),
    "VAE": (dict(only=True, decoder__conv_in__weight=torch.ones(2)), "proj_out_means is missing: this is a VAE"),
    "unknown key": (dict(norm_out__extra=torch.ones(2)), "1 unknown keys, norm_out.extra"),
    "alpha": (dict(transformer_blocks__0__ff__net__2__alpha=torch.ones(1)), "a LoRA key of another layout"),
    "no pairs": (dict(drop=("transformer_blocks", "single_", "time_")), "it has no LoRA pairs"),
    "no known base": (
        dict(drop=("transformer_blocks", "single_", "time_"), **lora("layers.0.attention.to_q")),
        "(layers.0.attention.to_q) are those of no base",
    ),
    "two bases": (dict(**lora("transformer_blocks.0.img_mlp.net.2")), "those of FLUX.1 and Qwen-Image at once"),
    "no partner A": (
        dict(drop="single_transformer_blocks.0.proj_mlp.lora_A"),
        "single_transformer_blocks.0.proj_mlp.lora_A.weight is missing",
    ),
    "no partner B": (
        dict(drop="single_transformer_blocks.0.proj_mlp.lora_B"),
        "single_transformer_blocks.0.proj_mlp.lora_B.weight is missing",
    ),
    "ranks": (
        dict(single_transformer_blocks__0__proj_mlp__lora_B__weight=torch.ones(512, 3)),
        "lora_B (512, 3) are no pair",
    ),
    "axes": (
        dict(single_transformer_blocks__0__proj_mlp__lora_A__weight=torch.ones(4, 128, 1)),
        "lora_A (4, 128, 1) and",
    ),
    "no weights": (dict(drop="proj_out_logweights"), "proj_out_logweights.weight is missing"),
    "no bias": (dict(drop="proj_out_means.bias"), "proj_out_means.bias is missing; it should be (512,)"),
    "short bias": (dict(proj_out_means__bias=torch.ones(8)), "proj_out_means.bias has shape (8,); it should be (512,)"),
    "no modulation": (dict(drop="norm_out"), "norm_out.linear.weight is missing"),
    "modulation": (
        dict(norm_out__linear__weight=torch.ones(256, 64)),
        "norm_out.linear.weight is (256, 64), and beside the other layers it should be (256, 128)",
    ),
    "bias in FLUX.2": (
        dict(name="gmflux2_tiny", norm_out__linear__bias=torch.ones(256)),
        "norm_out.linear.bias has shape (256,); it should not be there",
    ),
    "constant deviation": (dict(drop="proj_out_logstds"), "a model of constant deviation"),
    "gap": (dict(drop="proj_out_logstds.1"), "proj_out_logstds.1.weight is missing"),
    "two deviations": (
        dict(proj_out_logstds__3__weight=torch.ones(2, 32), proj_out_logstds__3__bias=torch.ones(2)),
        "proj_out_logstds.3.weight is (2, 32), and beside the other layers it should be (1, 32)",
    ),
    "chain": (dict(proj_out_logstds__3__weight=torch.ones(1, 16)), "should be (1, 32)"),
    "weights of half a patch": (
        dict(proj_out_logweights__weight=torch.ones(30, 128), proj_out_logweights__bias=torch.ones(30)),
        "(30, 128), and beside the other layers it should be (28, 128)",
    ),
    "channels": (
        dict(proj_out_means__weight=torch.ones(500, 128), proj_out_means__bias=torch.ones(500)),
        "proj_out_means.weight is (500, 128), and beside the other layers it should be (512, 128)",
    ),
    "axes of a head": (
        dict(proj_out_means__weight=torch.ones(512)),
        "proj_out_means.weight has shape (512,), not 2 axes",
    ),
    "width": (dict(proj_out_means__weight=torch.ones(512, 64)), "should be (512, 128)"),
    "integers": (dict(proj_out_means__bias=torch.ones(512, dtype=torch.int64)), "proj_out_means.bias is torch.int64"),
    "empty": (
        dict(single_transformer_blocks__0__proj_mlp__lora_A__weight=torch.ones(0, 128)),
        "lora_A.weight is empty",
    ),
    "NaN": (dict(proj_out_logweights__bias=torch.full((32,), math.nan)), "proj_out_logweights.bias holds NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    kwargs, message = BAD[case]
    kwargs = dict(kwargs)
    if kwargs.pop("only", False):
        kwargs["drop"] = ("",)
    path = changed(tmp_path / "a.safetensors", **kwargs)
    with pytest.raises(CheckpointError) as error:
        load_adapter(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
    assert "GMFlow models are" not in str(error.value)


@pytest.mark.parametrize("content, message", [
    (b"", "empty"), (b"GGUF" + bytes(60), "a GGUF file; adapters are .safetensors"),
    (b"<html>" + bytes(60), "web page"), (b"\x80\x02cos\nsystem\n" + bytes(60), "a Python pickle"),
    ((40).to_bytes(8, "little") + b"{" + bytes(60), "truncated or damaged"),
    (None, "no such file"),
])
def test_files_that_are_no_safetensors(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(path)


# ---- heads -----------------------------------------------------------------------------------------


def hidden_state(adapter, r) -> torch.Tensor:
    """The modulated hidden state (B,L,D) that the authors' network had,
    from its 512 (or 1024) means a token of 128 numbers."""
    tokens = r["means"].unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))                      # (B,K,C,h,p,w,p)
    tokens = tokens.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2).double()         # (B,L,K C p p)
    means = adapter.heads.means.to(torch.float64)
    return torch.linalg.lstsq(means.weight, (tokens - means.bias).flatten(0, 1).T).solution.T.unflatten(
        0, tokens.shape[:2],
    )


def activation(name, r) -> torch.Tensor:
    """silu(vec) (B,D), computed here from the base's and the adapter's tensors: sinusoids, two layers each, a sum."""
    base, file = (load_file(adapter_file(name).parents[1] / part / adapter_file(name).name)
                  for part in ("base", "adapter"))

    def layer(module, x):
        y = F.linear(x, base[f"{module}.weight"], base.get(f"{module}.bias"))
        if f"{module}.lora_A.weight" in file:
            y = y + F.linear(F.linear(x, file[f"{module}.lora_A.weight"]), file[f"{module}.lora_B.weight"])
        return y

    def embed(module, x):
        return layer(f"{module}.linear_2", F.silu(layer(f"{module}.linear_1", x)))

    def sinusoid(x):
        angles = 1000 * x[:, None] * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    root = "time_guidance_embed" if name == "gmflux2_tiny" else "time_text_embed"
    vec = embed(f"{root}.timestep_embedder", sinusoid(r["sigma"]))
    if name != "gmqwen_tiny":
        guidance = 4.0 if name == "gmflux2_tiny" else 3.5
        vec = vec + embed(f"{root}.guidance_embedder", sinusoid(torch.full_like(r["sigma"], guidance)))
    return F.silu(vec + embed(f"{root}.text_embedder", r["pooled"]) if "pooled" in r else vec)


@tiny
def test_heads_against_the_authors_network(name):
    r, adapter = io(name), load_adapter(adapter_file(name))
    hidden = hidden_state(adapter, r).float()
    rows, columns = (n // 2 for n in r["means"].shape[-2:])
    means, log_weights = adapter.heads.tokens(hidden)
    log_std = adapter.heads.log_std(activation(name, r))
    packed = pack_tokens(means, log_weights, log_std, rows, columns)
    got = unpack_mixture(packed, adapter.heads.components)
    torch.testing.assert_close(got.means, r["means"], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.log_weights, r["logweights"], rtol=0, atol=1e-5)
    # The sinusoids' rounding; 1e-6 in the host's tests.
    torch.testing.assert_close(got.log_std, r["logstds"], rtol=0, atol=2e-6)
    torch.testing.assert_close(got.mean(), r["mean"], rtol=0, atol=1e-5)


@tiny
def test_the_mean_in_tokens_is_the_bases_output(name):
    """The mean, token by token and (channel, row, column) within one, as the base's own last layer gives it."""
    r, adapter = io(name), load_adapter(adapter_file(name))
    tokens = mean_tokens(*adapter.heads.tokens(hidden_state(adapter, r).float()))
    rows, columns = (n // 2 for n in r["mean"].shape[-2:])
    image = torch.zeros_like(r["mean"])
    for index in range(rows * columns):
        y, x = divmod(index, columns)
        image[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = tokens[:, index].reshape(len(tokens), -1, 2, 2)
    torch.testing.assert_close(image, r["mean"], rtol=0, atol=1e-5)


def test_tokens_of_the_authors_head():
    """Their own layout of a token's numbers, (B,L,K,C p p) and (B,L,K,p p)."""
    r, adapter = io("gmflux_tiny"), load_adapter(adapter_file("gmflux_tiny"))
    means, log_weights = adapter.heads.tokens(hidden_state(adapter, r).float())
    torch.testing.assert_close(means.flatten(3), r["tokens_means"], rtol=0, atol=1e-5)
    torch.testing.assert_close(log_weights.flatten(3), r["tokens_logweights"], rtol=0, atol=1e-5)


def test_channels_and_patches_of_flux2():
    r = io("gmflux2_tiny")
    assert torch.equal(unpack_channels(r["x"]), r["x_unpatchified"])
    assert torch.equal(pack_channels(r["x_unpatchified"]), r["x"])


def test_packing_is_where_every_number_belongs():
    k, c, rows, columns = 3, 5, 2, 4
    means = torch.arange(2 * rows * columns * k * c * 4.0).reshape(2, rows * columns, k, c, 4)
    log_weights = -torch.arange(2 * rows * columns * k * 4.0).reshape(2, rows * columns, k, 1, 4)
    packed = pack_tokens(means, log_weights, torch.tensor([7.0, 8.0]), rows, columns)
    assert packed.shape == (2, k * (c + 1) + 1, 4, 8)
    assert (packed[:, -1] == torch.tensor([7.0, 8.0]).reshape(2, 1, 1)).all()
    for b, y, x, j, i in [(0, 0, 0, 0, 0), (1, 3, 5, 2, 4), (1, 2, 7, 1, 3), (0, 1, 6, 2, 0)]:
        token, place = y // 2 * columns + x // 2, y % 2 * 2 + x % 2
        assert packed[b, j * c + i, y, x] == means[b, token, j, i, place]
        assert packed[b, k * c + j, y, x] == log_weights[b, token, j, 0, place]
