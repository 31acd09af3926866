"""Checkpoints: our format, the authors' formats, and a clear error for everything else."""

import json
import os
import pickle
import re
import shutil
import stat
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gmflow_core import GMMLP, GMDiT, GMDiTConfig, GMMLPConfig, SpectrumConfig, SpectrumMLP, files as files_module
from gmflow_core.checkpoint import (
    CheckpointError,
    check_keys,
    convert,
    expected_shapes,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from gmflow_core.describe import format_info, identify
from gmflow_core.model import LatentSpace

DATA = Path(__file__).parent / "data"
SMALL = DATA / "ckpt_small"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BF16 = "diffusion_pytorch_model.bf16.safetensors"
TRAINING = DATA / "train_ckpt_small_inference_ema.pth"
TINY = GMDiTConfig(num_classes=3, num_gaussians=2, in_channels=3, sample_size=4, patch_size=2, num_layers=2,
                   num_heads=2, head_dim=4, logstd_width=8)
NAMES = ("cat", "dog", "Ærøskøbing")


@pytest.fixture
def tiny() -> GMDiT:
    model = GMDiT(TINY)
    model.init_weights()
    return model


@pytest.fixture
def saved(tmp_path, tiny) -> Path:
    """A file of ours with everything in it."""
    spectrum = SpectrumMLP(SpectrumConfig((3, 4, 4), (5, 2)))
    spectrum.init_weights()
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, tiny, spectrum, latent_space=LatentSpace("sd-vae", 0.5, 0.25), class_names=NAMES,
                    training={"step": 7, "loss": [1.5, 0.5]}, time_shift=2.5, total_substeps=24)
    return path


@pytest.fixture
def small(tmp_path) -> Path:
    """A copy of the published layout to break."""
    return Path(shutil.copytree(SMALL, tmp_path / "small"))


def metadata(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["gmflow"])


def rewrite(path: Path, header=None, state=None) -> Path:
    """Write the file again with other metadata (a dict, or a raw text) or other tensors."""
    header = metadata(path) if header is None else header
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(load_file(path) if state is None else state, path, {"gmflow": text})
    return path


def refused(path, *words: str, call=load_checkpoint, **kwargs) -> str:
    """The error of ``call(path)``: one line that names the file and holds the words."""
    with pytest.raises(CheckpointError) as caught:
        call(path, **kwargs)
    text = str(caught.value)
    assert Path(path).name in text and "\n" not in text
    for word in words:
        assert re.search(word, text), (word, text)
    return text


def assert_published_outputs(model: GMDiT) -> None:
    data = load_file(DATA / "model.safetensors")
    for name in ("tmix", "t731"):
        packed = model(data["x_t"], data[f"{name}.timestep"] / 1000, data["labels"])
        mixture = model.mixture(packed)
        for ours, theirs in (("means", "means"), ("log_weights", "logweights"), ("log_std", "logstds")):
            torch.testing.assert_close(getattr(mixture, ours), data[f"{name}.f32.{theirs}"], atol=2e-5, rtol=0)


def assert_same_state(module, state: dict) -> None:
    assert module.state_dict().keys() == state.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


# ---- our own format ----------------------------------------------------------------------------

def test_round_trip(saved, tiny):
    loaded = load_checkpoint(str(saved))
    assert_same_state(loaded.model, tiny.state_dict())
    assert (loaded.config, loaded.spectrum.config) == (TINY, SpectrumConfig((3, 4, 4), (5, 2)))
    assert (loaded.class_names, loaded.latent_space) == (NAMES, LatentSpace("sd-vae", 0.5, 0.25))
    assert (loaded.training, loaded.format, loaded.path) == ({"step": 7, "loss": [1.5, 0.5]}, "gmflow", saved)
    assert loaded.time_shift == metadata(saved)["time_shift"] == 2.5
    assert loaded.total_substeps == metadata(saved)["total_substeps"] == 24
    for module in (loaded.model, loaded.spectrum):
        assert not any(part.training for part in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(
        loaded.model(x, torch.tensor([0.3, 1.0]), torch.tensor([0, 3])),
        tiny(x, torch.tensor([0.3, 1.0]), torch.tensor([0, 3])),
    )


def test_a_file_that_is_sampled_as_published_is_what_it_was(tmp_path, tiny):
    """A time shift of 1 and 128 substeps are not written, and are what a file that does not say has."""
    save_checkpoint(tmp_path / "a.safetensors", tiny)
    assert not {"time_shift", "total_substeps"} & metadata(tmp_path / "a.safetensors").keys()
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert (loaded.time_shift, loaded.total_substeps) == (1, 128)


def test_names_are_those_of_diffusers(saved):
    with safe_open(saved, "pt") as file:
        keys = set(file.keys())
    assert {"transformer_blocks.0.attn1.to_q.weight", "proj_out_2.bias", "spectrum.mlp.0.weight"} <= keys


def test_round_trip_2d(tmp_path):
    model = GMMLP(GMMLPConfig(num_gaussians=4, width=8, num_layers=2))
    model.init_weights()
    save_checkpoint(tmp_path / "a.safetensors", model)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert_same_state(loaded.model, model.state_dict())
    assert (loaded.latent_space.kind, loaded.spectrum, loaded.class_names) == ("2d", None, None)
    assert loaded.training == {}


def test_dtypes(tmp_path, saved, tiny):
    half = tmp_path / "half.safetensors"
    save_checkpoint(half, tiny, dtype=torch.float16)
    assert identify(half)["dtype"] == "float16"
    assert half.stat().st_size < 0.6 * saved.stat().st_size
    assert all(p.dtype == torch.float32 for p in load_checkpoint(half).model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in load_checkpoint(half, dtype=torch.bfloat16).model.parameters())
    assert all(p.dtype == torch.float16 for p in load_checkpoint(half, dtype=None).model.parameters())


def test_loaded_weights_are_no_part_of_the_file(saved, tiny):
    loaded = load_checkpoint(saved)
    saved.write_bytes(b"")  # in place: a mapped tensor would now crash the process
    assert_same_state(loaded.model, tiny.state_dict())


def test_constant_log_std(tmp_path):
    model = GMDiT(replace(TINY, constant_logstd=-1.5))
    model.init_weights()
    save_checkpoint(tmp_path / "a.safetensors", model)
    assert load_checkpoint(tmp_path / "a.safetensors").config.constant_logstd == -1.5
    assert "constant log_std -1.5" in format_info(identify(tmp_path / "a.safetensors"))


def test_new_folder_and_ordinary_permissions(tmp_path, tiny):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    save_checkpoint(path, tiny)
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file(saved, tiny, monkeypatch, step):
    def fail(*args, **kwargs):
        if step == "save_file":
            Path(args[1]).write_bytes(b"half a file")
        raise OSError("disk full")

    before, files = saved.read_bytes(), sorted(os.listdir(saved.parent))
    module, _, name = step.rpartition(".")
    monkeypatch.setattr(os if module else files_module, name, fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, tiny)
    monkeypatch.undo()
    assert saved.read_bytes() == before and sorted(os.listdir(saved.parent)) == files
    save_checkpoint(saved, tiny)
    assert saved.read_bytes() != before and sorted(os.listdir(saved.parent)) == files


def test_save_refuses(tmp_path, tiny):
    path = tmp_path / "a.safetensors"
    refused(path, "GMDiT or GMMLP", "Linear", call=lambda p: save_checkpoint(p, torch.nn.Linear(2, 2)))
    refused(tmp_path / "a.pth", r"end in \.safetensors", call=lambda p: save_checkpoint(p, tiny))
    refused(path, "2 class names .* 3 classes", call=lambda p: save_checkpoint(p, tiny, class_names=("a", "b")))
    refused(path, "one text", call=lambda p: save_checkpoint(p, tiny, class_names=(1, 2, 3)))
    refused(path, "not plain JSON", call=lambda p: save_checkpoint(p, tiny, training={"a": torch.zeros(1)}))
    refused(path, "not plain JSON", call=lambda p: save_checkpoint(p, tiny, training={"a": float("nan")}))
    refused(path, "time_shift must be a number from 0.001 to 1000, got 0", call=lambda p: save_checkpoint(
        p, tiny, time_shift=0))
    refused(path, "total_substeps must be a whole number from 1 to 1024, got 0", call=lambda p: save_checkpoint(
        p, tiny, total_substeps=0))
    other = SpectrumMLP(SpectrumConfig((4, 4, 4)))
    refused(path, "4 channels.* 3", call=lambda p: save_checkpoint(p, tiny, other))
    with torch.no_grad():
        tiny.proj_out_1.bias[3] = 1e6
    refused(path, "proj_out_1.bias holds NaN or inf", call=lambda p: save_checkpoint(p, tiny, dtype=torch.float16))
    with torch.no_grad():
        tiny.proj_out_1.bias[3] = float("nan")
    refused(path, "proj_out_1.bias holds NaN or inf", call=lambda p: save_checkpoint(p, tiny))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments, words", [
    (("latent",), "rgb, sd-vae, 2d"), (("sd-vae", 0), "not be 0"), (("rgb", 1.0, float("inf")), "finite"),
    (("rgb", "1"), "finite number"),
])
def test_latent_space_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        LatentSpace(*arguments)


# ---- damaged files of ours ---------------------------------------------------------------------

def change(*path, to):
    def apply(header: dict) -> None:
        for key in path[:-1]:
            header = header[key]
        header.pop(path[-1]) if to is None else header.update({path[-1]: to})
    return apply


@pytest.mark.parametrize("edit, words", [
    (change("format", to=2), "unknown format version 2.* reads 1"),
    (change("format", to=None), "unknown format version None"),
    (change("architecture", to="unet"), "unknown architecture 'unet'.* gmdit, gmmlp"),
    (change("architecture", to=["gmdit"]), "unknown architecture"),
    (change("model", to=7), "must be a JSON object"),
    (change("model", "depth", to=3), r"unknown values \['depth'\].* num_layers"),
    (change("model", "head_dim", to=None), r"lacks \['head_dim'\]"),
    (change("model", "num_heads", to="2"), "num_heads must be a whole number"),
    (change("model", "patch_size", to=3), "sample_size 4 is not a multiple"),
    (change("model", "num_layers", to=10**9), "1000000000 layers"),
    (change("model", "logstd_width", to=10**40), "no network can be built"),
    (change("model", "num_gaussians", to=4), r"misshaped: proj_out_2.weight \(32, 8\) should be \(64, 8\)"),
    (change("model", "num_layers", to=1), "unexpected: transformer_blocks.1.attn1.to_k.bias, .* and 6 more"),
    (change("model", "num_layers", to=3), "missing: transformer_blocks.2.norm1"),
    (change("spectrum", "layers", to=[5, 0]), "whole numbers"),
    (change("spectrum", "base_size", to=[3, 2, 8]), None),
    (change("spectrum", "base_size", to=[3, 4]), "must be .C, H, W"),
    (change("spectrum", "base_size", to=[4, 4, 3]), "spectrum network has 4 channels, the model 3"),
    (change("spectrum", to=None), "but not both"),
    (change("latent_space", "kind", to="xyz"), "rgb, sd-vae, 2d"),
    (change("latent_space", to=None), "must be a JSON object, got None"),
    (change("class_names", to=["a"]), "1 class names for a model of 3"),
    (change("class_names", to="abc"), "must be a list"),
    (change("training", to=[1]), "training an object"),
    *((change("time_shift", to=value), "time_shift must be a number")
      for value in (0, -3.0, 1e4, float("nan"), float("inf"), "3", True, [3])),
    *((change("total_substeps", to=value), "total_substeps must be a whole number")
      for value in (0, -3, 1025, 16.0, "16", True)),
])
def test_bad_metadata(saved, edit, words):
    header = metadata(saved)
    edit(header)
    rewrite(saved, header)
    if words is None:  # another size of as many frequencies is a legal file
        load_checkpoint(saved)
    else:
        refused(saved, words)


@pytest.mark.parametrize("text, words", [
    ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "format version None"),
])
def test_metadata_is_no_json_object(saved, text, words):
    refused(rewrite(saved, text), words)


def test_bad_keys_are_named_at_once(saved):
    state = load_file(saved)
    state["extra"] = torch.zeros(1)
    state["proj_out_1.bias"] = torch.zeros(5)
    del state["proj_out_2.bias"]
    rewrite(saved, state=state)
    text = refused(saved, "missing: proj_out_2.bias", "unexpected: extra", r"proj_out_1.bias \(5,\) should be \(16,\)")
    assert refused(saved, call=read_state) == text


def test_check_keys_lists_eight():
    with pytest.raises(CheckpointError, match="a7 and 12 more$"):
        check_keys({}, {f"a{i}": (1,) for i in range(20)}, "file")
    check_keys({"a": torch.zeros(2, 3)}, {"a": (2, 3)}, "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["emb.class_embedder.embedding_table.weight", "spectrum.mlp.2.bias"])
def test_bad_values_are_named(saved, name, value):
    state = load_file(saved)
    state[name].view(-1)[1] = value
    rewrite(saved, state=state)
    bare = name.removeprefix("spectrum.")
    refused(saved, f"{bare} holds NaN or inf")
    refused(saved, f"{bare} holds NaN or inf", call=read_state)


def test_too_narrow_a_dtype(saved):
    state = load_file(saved)
    state["proj_out_1.bias"][0] = 1e6
    rewrite(saved, state=state)
    load_checkpoint(saved)
    refused(saved, "proj_out_1.bias .*too narrow", dtype=torch.float16)


def test_integer_weights(saved):
    state = load_file(saved)
    state["proj_out_1.bias"] = state["proj_out_1.bias"].to(torch.int8)
    refused(rewrite(saved, state=state), "proj_out_1.bias is torch.int8")


# ---- the authors' formats ----------------------------------------------------------------------

def test_released_model_has_our_keys():
    released = json.loads((DATA / "released_keys.json").read_text())
    keys = dict(released["other"])
    for block in range(released["blocks"]):
        keys |= {f"transformer_blocks.{block}.{name}": shape for name, shape in released["block"].items()}
    ours = expected_shapes(GMDiTConfig())
    assert len(keys) == 407 and ours == {name: tuple(shape) for name, shape in keys.items()}
    assert sum(p.numel() for p in GMDiT(GMDiTConfig(), device="meta").parameters()) == 676_164_001
    assert released["parameters"] == 676_164_001
    spectrum = expected_shapes(SpectrumConfig())
    assert spectrum == {name: tuple(shape) for name, shape in released["spectrum"].items()}


@pytest.mark.parametrize("part, kind", [
    (".", "diffusers folder"), ("transformer", "diffusers folder"), (f"transformer/{WEIGHTS}", "diffusers file"),
])
def test_diffusers(part, kind):
    loaded = load_checkpoint(SMALL / part)
    assert loaded.format == kind
    assert loaded.config == GMDiTConfig(10, 4, 4, 8, 2, 2, 2, 16, 32)
    assert (loaded.latent_space, loaded.class_names, loaded.training) == (LatentSpace("sd-vae", 0.18215), None, {})
    assert_published_outputs(loaded.model)
    assert_same_state(loaded.spectrum, load_file(SMALL / "spectrum_net" / WEIGHTS))


def test_diffusers_folder_given_relative(monkeypatch):
    monkeypatch.chdir(SMALL / "transformer")
    assert load_checkpoint(".").spectrum is not None


def test_diffusers_bf16_variant(small):
    for part in ("transformer", "spectrum_net"):
        (small / part / WEIGHTS).unlink()
    loaded = load_checkpoint(small, dtype=None)
    assert_same_state(loaded.model, load_file(small / "transformer" / BF16))
    assert next(loaded.spectrum.parameters()).dtype == torch.bfloat16
    full = load_file(SMALL / "transformer" / WEIGHTS)
    for name, value in load_checkpoint(small).model.state_dict().items():
        torch.testing.assert_close(value, full[name], atol=1e-4, rtol=2**-8)


def test_bare_bf16_file_takes_the_bf16_spectrum():
    raw = read_state(SMALL / "transformer" / BF16)
    assert raw.spectrum_state["mlp.0.bias"].dtype == raw.state["proj_out_1.bias"].dtype == torch.bfloat16


def test_diffusers_vae(small):
    config = json.loads((small / "vae" / "config.json").read_text())
    (small / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5, "shift_factor": 0.25}))
    assert load_checkpoint(small).latent_space == LatentSpace("sd-vae", 0.5, 0.25)
    (small / "vae" / "config.json").write_text(json.dumps({"scaling_factor": "big"}))
    refused(small / "vae" / "config.json", "finite number", call=lambda _: load_checkpoint(small))
    shutil.rmtree(small / "vae")
    shutil.rmtree(small / "spectrum_net")
    loaded = load_checkpoint(small)
    assert (loaded.latent_space, loaded.spectrum) == (LatentSpace("sd-vae", 0.18215, 0.0), None)


def test_bare_file_alone(tmp_path):
    path = Path(shutil.copy(SMALL / "transformer" / WEIGHTS, tmp_path))
    loaded = load_checkpoint(path, heads=2)
    assert loaded.config == GMDiTConfig(10, 4, 4, 32, 2, 2, 2, 16, 32) and loaded.spectrum is None
    assert loaded.latent_space == LatentSpace("sd-vae", 0.18215)
    refused(path, "heads cannot be told", "config.json", "heads=")
    refused(path, "3 heads do not divide the width 32", heads=3)
    (tmp_path / "config.json").write_text('{"model_type": "of something else"}')
    refused(path, "heads cannot be told")
    shutil.copy(SMALL / "transformer" / "config.json", tmp_path)
    assert load_checkpoint(path).config.sample_size == 8
    refused(path, "config.json says 2 heads, not 4", heads=4)


@pytest.mark.parametrize("width, heads", [(1152, (16, 72)), (144, (2, 72)), (384, (6, 64)), (768, (12, 64))])
def test_heads_by_habit(tmp_path, width, heads):
    config = replace(TINY, num_heads=1, head_dim=width, num_layers=1)
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in expected_shapes(config).items()}
    save_file(state, tmp_path / WEIGHTS)
    raw = read_state(tmp_path / WEIGHTS)
    assert (raw.config.num_heads, raw.config.head_dim) == heads
    assert raw.latent_space.kind == "rgb"  # three channels


def test_training_file():
    loaded = load_checkpoint(TRAINING, heads=2)
    assert loaded.format == "training .pth"
    assert loaded.config == GMDiTConfig(10, 4, 4, 8, 2, 2, 2, 16, 32)
    assert loaded.spectrum.config == SpectrumConfig((4, 8, 8), (8, 4))
    assert loaded.training == {"iter": 1, "epoch": 1, "weights": "moving average"}
    published = load_file(SMALL / "transformer" / WEIGHTS)
    for name, value in loaded.model.state_dict().items():  # the recorded average is 0.9 times that, in float16
        torch.testing.assert_close(value, 0.9 * published[name], atol=1e-6, rtol=2e-3)
    refused(TRAINING, "heads cannot be told")
    refused(TRAINING, "do not divide", heads=5)


@pytest.fixture
def training(tmp_path) -> tuple[Path, dict]:
    """A training file as the authors write one: last and averaged weights, statistics, an optimizer."""
    average = torch.load(TRAINING, weights_only=True)["state_dict"]
    last = {
        key.replace("diffusion_ema.", "diffusion."): value.float() / (1 if "pos_embed.pos_embed" in key else 0.9)
        for key, value in average.items()
    }
    path = tmp_path / "iter_1.pth"
    return path, {"meta": {"iter": 1, "time": "now"}, "state_dict": last | average, "optimizer": {"state": {}}}


def test_the_average_is_preferred(training):
    path, content = training
    torch.save(content, path)
    key = "proj_out_1.weight"
    assert torch.equal(load_checkpoint(path, heads=2).model.state_dict()[key],
                       content["state_dict"]["diffusion_ema.denoising." + key].float())
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if k.startswith("diffusion.")}
    torch.save(content, path)
    loaded = load_checkpoint(path, heads=2)
    assert torch.equal(loaded.model.state_dict()[key], content["state_dict"]["diffusion.denoising." + key])
    assert loaded.training["weights"] == "last"
    assert_published_within(loaded.model)


def assert_published_within(model: GMDiT) -> None:
    published = load_file(SMALL / "transformer" / WEIGHTS)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, published[name], atol=1e-6, rtol=2e-3)


def test_training_file_variants(training):
    path, content = training
    state = content["state_dict"]
    torch.save(state, path, _use_new_zipfile_serialization=False)  # no envelope, and the format before 2020
    assert read_state(path, heads=2).config.sample_size == 8
    shutil.copy(SMALL / "transformer" / "config.json", path.parent)
    assert read_state(path).config.num_heads == 2
    for key in [key for key in state if "pos_embed.pos_embed" in key or "spectrum_net" in key]:
        del state[key]
    torch.save(content, path)
    raw = read_state(path, heads=2)
    assert raw.config.sample_size == 8 and raw.spectrum_state is None and raw.assumed is None
    (path.parent / "config.json").unlink()
    raw = read_state(path, heads=2)
    assert raw.config.sample_size == 32 and raw.assumed.startswith("an image size of 32 assumed")


def test_training_file_of_the_2d_model(tmp_path):
    model = GMMLP(GMMLPConfig(num_gaussians=4, width=8, num_layers=3))
    model.init_weights()
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"diffusion.denoising." + k: v for k, v in model.state_dict().items()}}, path)
    loaded = load_checkpoint(path)
    assert_same_state(loaded.model, model.state_dict())
    assert loaded.config == model.config and loaded.latent_space.kind == "2d"
    refused(path, "heads=2 was given", heads=2)


def test_training_file_faults(training):
    path, content = training
    state = content["state_dict"]
    prefix = "diffusion_ema.denoising."

    def write(*words, **changes):
        changed = {prefix + name.replace("__", "."): value for name, value in changes.items()}
        torch.save(content | {"state_dict": state | changed}, path)
        refused(path, *words, heads=2)

    positions = state[prefix + "pos_embed.pos_embed"]
    write("differs from DiT's sin-cos positions", pos_embed__pos_embed=positions.flip(-1))
    write("differs from DiT's sin-cos positions by nan", pos_embed__pos_embed=positions * float("nan"))
    write(r"expected \(1, side", pos_embed__pos_embed=positions[:, :15])
    write(r"expected \(1, side", pos_embed__pos_embed=positions.long())
    write("unexpected: extra", extra=torch.zeros(1))
    write("extra is no plain tensor", extra=3)
    write("tensors that are not plain .*sparse", extra=torch.zeros(2, 2).to_sparse())
    write("proj_out_1.bias holds NaN", proj_out_1__bias=torch.full((64,), float("nan")))
    state["diffusion_ema.spectrum_net.mlp.4.weight"] = torch.zeros(255, 4)
    write("255 outputs are not 4 square channels")
    torch.save({"state_dict": {"model.a": torch.zeros(1)}}, path)
    refused(path, r"no keys diffusion_ema.denoising.\*.* first keys are model.a")
    torch.save({"state_dict": {prefix + "a": torch.zeros(1)}}, path)
    refused(path, "not a GMFlow file: first keys are a")
    torch.save({"state_dict": [1]}, path)
    refused(path, "no dict of names")
    torch.save([1], path)
    refused(path, "holds a list")


# ---- files that are something else -------------------------------------------------------------

class Evil:
    """Creates a file when unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.filterwarnings("ignore")  # torch's, about protocols and TorchScript
def test_code_in_a_pickle_is_not_run(tmp_path):
    target, path = tmp_path / "created", tmp_path / "evil.pth"
    for content in ({"state_dict": Evil(target)}, Evil(target)):
        torch.save(content, path)
        refused(path, "Python code", "mkdir", "refused, and nothing was run")
        torch.save(content, path, _use_new_zipfile_serialization=False)
        refused(path, "refused, and nothing was run")
        for protocol in (0, 2, 5):
            path.write_bytes(pickle.dumps(content, protocol=protocol))
            if protocol:
                text = refused(path, "refused, and nothing was run", call=identify)
                assert "weights_only" not in text
            else:
                refused(path, "looks like", call=identify)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refused(path, "TorchScript", "nothing was run")
    assert not target.exists()
    path.write_bytes(pickle.dumps(Evil(target)))
    pickle.loads(path.read_bytes())
    assert target.exists()  # so the test would have seen it


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"),
    (b"\x08\0\0", "truncated .3 bytes"),
    (b"PK\x03\x04" + bytes(60), "zip archive.*\\.pth"),
    (b"\x80\x04\x95" + bytes(60), "Python pickle"),
    (b"\n<!DOCTYPE html><html>", "HTML.*web page"),
    (b'{"error": "not found"}', "JSON text"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    (b"GGUF\x03\0\0\0" + bytes(60), "GGUF"),
    (bytes(100), "zeros .an unfinished download"),
    (b"\xff\xd8\xff\xe0" + bytes(60), "something unknown .it begins with ff d8 ff"),
    ((99).to_bytes(8, "little") + b"{" * 99, "truncated or damaged safetensors"),
    ((10**6).to_bytes(8, "little") + b'{"a"', "truncated or damaged safetensors"),
])
def test_no_safetensors(tmp_path, content, words):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refused(path, words)
    refused(path, words, call=identify)


def test_truncated_file(saved):
    content = saved.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 500, 9):
        saved.write_bytes(content[:length])
        refused(saved, "truncated or damaged safetensors", "again")


@pytest.mark.filterwarnings("ignore")
def test_broken_pytorch_files(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(TRAINING.read_bytes()[:50_000])
    refused(path, "truncated or damaged PyTorch file")
    path.write_bytes(pickle.dumps({"a": 1})[:10])
    refused(path, "not torch.save's")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "hello")
    refused(path, "truncated or damaged PyTorch file")
    path.write_bytes(b"<html>a login page</html>")
    refused(path, "HTML")
    shutil.copy(SMALL / "transformer" / WEIGHTS, path)  # content decides, not the name
    load_checkpoint(path, heads=2)


def test_no_file(tmp_path):
    refused(tmp_path / "none.safetensors", "no such file or folder")
    refused(tmp_path / "none.pth", "no such file or folder")
    refused(tmp_path, "without transformer/config.json", "give the file")


@pytest.mark.parametrize("keys, words", [
    (["lora_unet_blocks.lora_up.weight"], "a LoRA"),
    (["transformer.x.lora_A.weight"], "a LoRA"),
    (["conditioner.embedders.0.transformer.text_model.x"], "Stable Diffusion"),
    (["first_stage_model.decoder.conv_in.weight", "model.diffusion_model.out.0.bias"], "whole Stable Diffusion"),
    (["double_blocks.0.img_attn.proj.weight"], "Flux"),
    (["joint_blocks.0.x"], "Stable Diffusion 3"),
    (["adaln_single.linear.bias", "pos_embed.proj.weight"], "PixArt"),
    (["input_blocks.0.0.weight"], "UNet"),
    (["decoder.conv_in.weight"], "a VAE"),
    (["text_model.embeddings.x"], "CLIP text encoder"),
    (["encoder.block.0.layer.0"], "T5"),
    (["x_embedder.proj.weight", "final_layer.adaLN_modulation.1.bias"], "a plain DiT.* no mixture"),
    (["a", "b", "c", "d", "e", "f"], "not a GMFlow file: first keys are a, b, c, d, e$"),
    ([], "first keys are there are none"),
])
def test_other_models_are_recognised(tmp_path, keys, words):
    save_file({key: torch.zeros(2) for key in keys}, tmp_path / "a.safetensors", {"format": "pt"})
    refused(tmp_path / "a.safetensors", "not a GMFlow file", words)


def test_a_dit_without_mixtures(tmp_path):
    state = load_file(SMALL / "transformer" / WEIGHTS)
    path = tmp_path / "a.safetensors"
    learned_sigma = {k: v for k, v in state.items() if not k.startswith("gm_out")}
    save_file(learned_sigma | {"proj_out_2.weight": torch.zeros(32, 32), "proj_out_2.bias": torch.zeros(32)}, path)
    refused(path, "a DiT, but not a GMFlow one", r"here 32", "gm_out", heads=2)
    save_file(learned_sigma, path)
    refused(path, "a DiT, but not a GMFlow one", "constant", heads=2)
    state.pop("emb.class_embedder.embedding_table.weight")
    save_file(state, path)
    refused(path, "emb.class_embedder.embedding_table.weight is missing", heads=2)
    state["proj_out_2.weight"] = torch.zeros(80)
    save_file(state, path)
    refused(path, "proj_out_2.weight has shape .80,., not 2 axes", heads=2)


@pytest.mark.parametrize("changes, words", [
    ({"num_gaussians": None}, "not the config of a GM-DiT .*lacks num_gaussians"),
    ({"num_layers": "2"}, "num_layers must be a whole number"),
    ({"activation_fn": "geglu"}, "activation_fn 'geglu' is not supported"),
    ({"norm_eps": 1e-3}, "norm_eps"),
    ({"out_channels": 8}, "out_channels 8 is not supported"),
    ({"gm_num_logstd_layers": 3}, "gm_num_logstd_layers"),
    ({"num_layers": 1}, "unexpected: transformer_blocks.1"),
    ({"num_gaussians": 8}, "misshaped: proj_out_2.weight"),
])
def test_bad_config_json(small, changes, words):
    path = small / "transformer" / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None or name[0] == "o"}))
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(small)


def test_incomplete_folders(small):
    config = (small / "transformer" / "config.json").read_text()
    path = small / "transformer" / "config.json"
    for text, words in (("[]", "must hold a JSON object"), ("{", "not JSON")):
        path.write_text(text)
        refused(path, words, call=lambda _: load_checkpoint(small))
    path.unlink()
    refused(small, "without transformer/config.json")
    path.write_text(config)
    (small / "spectrum_net" / "config.json").unlink()
    refused(small, "spectrum_net/config.json: there is no such file")
    shutil.copy(SMALL / "spectrum_net" / "config.json", small / "spectrum_net")
    for name in (WEIGHTS, BF16):
        (small / "spectrum_net" / name).unlink()
    refused(small, f"spectrum_net: no {WEIGHTS}")
    shutil.rmtree(small / "spectrum_net")
    load_checkpoint(small)
    for name in (WEIGHTS, BF16):
        (small / "transformer" / name).unlink()
    refused(small, f"transformer: no {WEIGHTS}")
    refused(small / "vae", "not the config of a GM-DiT .AutoencoderKL")


def test_heads_must_agree_with_our_file(saved):
    assert load_checkpoint(saved, heads=2).config == TINY
    refused(saved, "heads=4 was given", heads=4)


# ---- convert, describe -------------------------------------------------------------------------

@pytest.mark.parametrize("source", [SMALL, SMALL / "transformer" / BF16, TRAINING])
def test_convert_keeps_everything(tmp_path, source):
    heads = 2 if source == TRAINING else None
    convert(source, tmp_path / "a.safetensors", heads=heads)
    before, after = read_state(source, heads=heads), read_state(tmp_path / "a.safetensors")
    assert after.format == "gmflow"
    for name in ("config", "spectrum_config", "latent_space", "class_names", "training", "time_shift",
                 "total_substeps"):
        assert getattr(before, name) == getattr(after, name)
    for a, b in ((before.state, after.state), (before.spectrum_state, after.spectrum_state)):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def test_converted_model_computes_the_published_outputs(tmp_path):
    convert(SMALL, tmp_path / "a.safetensors")
    assert_published_outputs(load_checkpoint(tmp_path / "a.safetensors").model)


def test_convert_onto_itself(saved):
    before = load_file(saved)
    convert(saved, saved, dtype=torch.float16)
    assert (read_state(saved).time_shift, read_state(saved).total_substeps) == (2.5, 24)
    after = load_file(saved)
    assert all(torch.equal(after[name], value.half()) for name, value in before.items())


def test_identify(saved):
    info = identify(saved)
    assert json.loads(json.dumps(info)) | {"config": 0, "spectrum": 0} == {
        "path": str(saved), "format": "gmflow", "architecture": "gmdit", "config": 0, "spectrum": 0,
        "num_gaussians": 2, "num_classes": 3, "parameters": sum(p.numel() for p in GMDiT(TINY).parameters()),
        "spectrum_parameters": 171, "dtype": "float32", "class_names": list(NAMES),
        "latent_space": {"kind": "sd-vae", "scale": 0.5, "shift": 0.25}, "training": {"step": 7, "loss": [1.5, 0.5]},
        "time_shift": 2.5, "total_substeps": 24, "assumed": None,
    }
    assert GMDiTConfig(**info["config"]) == TINY and SpectrumConfig(**info["spectrum"]).base_size == (3, 4, 4)


def test_format_info(saved, tmp_path):
    text = format_info(identify(saved))
    for words in (
        "GM-DiT, 2 layers, 2 heads x 4, patch 2", "3 x 4 x 4", "3: cat, dog, Ærøskøbing", "K = 2", "float32",
        "171 parameters", "sd-vae, scale 0.5, shift 0.25", "step 7, loss (2 values)", str(saved),
        "time shift 2.5, 24 substeps over all steps",
    ):
        assert words in text
    save_checkpoint(tmp_path / "b.safetensors", GMMLP(GMMLPConfig(4, 8, 2)))
    text = format_info(identify(tmp_path / "b.safetensors"))
    assert "GMMLP for 2D data, 2 layers of 8" in text and "nothing recorded" in text and "classes" not in text


def test_identify_does_not_read_the_weights(saved):
    state = load_file(saved)
    state["proj_out_1.bias"][0] = float("nan")
    assert identify(rewrite(saved, state=state))["num_classes"] == 3


# ---- wrapped names -----------------------------------------------------------------------------

def wrapped(state: dict, kind: str) -> dict:
    """The names that savers and wrappers of that kind give."""
    inside = kind in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
    return {kind + (re.sub(r"(transformer_blocks\.\d+\.)", r"\1" + kind, key) if inside else key): value
            for key, value in state.items()}


@pytest.mark.parametrize("kind", [
    "model.diffusion_model.", "diffusion_model.", "module.", "_orig_mod.", "transformer.", "_fsdp_wrapped_module.",
    "module._orig_mod.", "_checkpoint_wrapped_module.",
])
def test_wrapped_names_are_the_same_model(tmp_path, saved, tiny, kind):
    path = tmp_path / "a.safetensors"
    save_file(wrapped(load_file(SMALL / "transformer" / WEIGHTS), kind), path)
    shutil.copy(SMALL / "transformer" / "config.json", tmp_path)
    assert_published_outputs(load_checkpoint(path).model)
    save_file(wrapped(load_file(saved), kind), path, {"gmflow": json.dumps(metadata(saved))})
    loaded = load_checkpoint(path)
    assert_same_state(loaded.model, tiny.state_dict())
    assert loaded.spectrum is not None and loaded.class_names == NAMES
    content = torch.load(TRAINING, weights_only=True)
    torch.save(content | {"state_dict": wrapped(content["state_dict"], kind)}, tmp_path / "b.pth")
    assert load_checkpoint(tmp_path / "b.pth", heads=2).spectrum is not None


def test_one_parameter_under_two_names(tmp_path, saved):
    state = load_file(saved)
    rewrite(saved, state=state | {"module.proj_out_1.bias": state["proj_out_1.bias"].clone()})
    refused(saved, "module.proj_out_1.bias and proj_out_1.bias|proj_out_1.bias and module.proj_out_1.bias",
            "one parameter")
