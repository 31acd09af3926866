"""Encoding a folder of images to latents, and training on them."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from packages import importable
from PIL import Image
from safetensors import safe_open

import train.encode as module
from gmflow_core import load_checkpoint
from train.config import PRESETS, override
from train.data.images import find_images, to_unit
from train.data.latents import INDEX, Latents
from train.data.open import open_data
from train.encode import Encoder, decode, diffusers_encoder, encode_folder
from train.step import step_generator
from train.trainer import CHECKPOINT, Trainer

CPU = torch.device("cpu")


def averages(images):
    """A VAE of the same interface: means over 8x8 pixels and their grey, and a small deviation."""
    mean = torch.nn.functional.avg_pool2d(images, 8)
    mean = torch.cat([mean, mean.mean(1, keepdim=True)], dim=1)
    return mean, torch.full_like(mean, 0.01)


FAKE = Encoder(averages, "averages", scale=0.5, shift=0.25)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for i in range(11):
        path = root / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.linear_gradient("L").rotate(90).resize((40 + i, 36))
        image.point([v * (i + 1) // 12 for v in range(256)]).convert("RGB").save(path)
    return root


def encode(folder, out, encoder=FAKE, **settings):
    return encode_folder(find_images(folder), out, encoder,
                         **{"size": 32, "shard_size": 4, "batch": 3, "dtype": "float32"} | settings)


def content(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


def test_latents_are_those_of_the_images(folder, tmp_path):
    index = encode(folder, tmp_path / "out", flips=True)
    assert index == json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["classes"] == ["a", "b", "c"] and index["shape"] == [4, 4, 4] and index["images"] == 11
    assert [s["count"] for s in index["shards"]] == [4, 4, 3] and index["broken"] == []
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        INDEX, "plan.json", "shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"}
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1  # no shard is for its owner alone
    data, images = Latents.load(tmp_path / "out"), find_images(folder)
    assert len(data) == 11 and data.latent_space.scale == 0.5 and data.latent_space.shift == 0.25
    for mirrored in (0, 1):
        latents, labels = data.fetch(torch.tensor([[i, mirrored] for i in range(11)]))
        pixels = to_unit(torch.stack([decode(path, 32) for path in images.paths]))
        expected = (averages(pixels.flip(-1) if mirrored else pixels)[0] - 0.25) * 0.5
        assert torch.equal(labels, images.labels)
        assert 0.003 < (latents - expected).std() < 0.007  # what is left is the posterior's deviation


def test_a_batch_is_a_function_of_the_generator_and_mirrors(folder, tmp_path):
    encode(folder, tmp_path / "out", flips=True, dtype="float16")
    data = Latents.load(tmp_path / "out")
    latents, labels = data.batch(64, step_generator(0, 1))
    again, same = Latents.load(tmp_path / "out").batch(64, step_generator(0, 1))
    assert torch.equal(latents, again) and torch.equal(labels, same) and latents.dtype == torch.float32
    choice = data.choose(64, step_generator(0, 1))
    assert torch.equal(data.fetch(choice[8:16])[0], latents[8:16]) and set(choice[:, 1].tolist()) == {0, 1}
    assert not Latents.load(tmp_path / "out", flip=False).choose(64, step_generator(0, 1))[:, 1].any()


def test_an_interrupted_encoding_goes_on(folder, tmp_path):
    encode(folder, tmp_path / "whole")
    calls = []

    def stops(images):
        if len(calls) == 4:  # in the third shard
            raise KeyboardInterrupt
        calls.append(len(images))
        return averages(images)

    with pytest.raises(KeyboardInterrupt):
        encode(folder, tmp_path / "cut", Encoder(stops, "averages", 0.5, 0.25))
    assert sorted(content(tmp_path / "cut")) == ["plan.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    with pytest.raises(ValueError, match="no index.json in it; its encoding is not finished"):
        Latents.load(tmp_path / "cut")
    calls.clear()
    counting = Encoder(lambda images: calls.append(len(images)) or averages(images), "averages", 0.5, 0.25)
    encode(folder, tmp_path / "cut", counting)
    assert calls == [3] and content(tmp_path / "cut") == content(tmp_path / "whole")


def test_processes_share_the_shards(folder, tmp_path):
    """The second and third finish first; the first waits for the shard that is late."""
    encode(folder, tmp_path / "whole")
    out = tmp_path / "shared"
    assert encode(folder, out, rank=2, world=3) is None and encode(folder, out, rank=1, world=3) is None
    assert sorted(content(out)) == ["shard-00001.safetensors", "shard-00002.safetensors"]
    late = (out / "shard-00002.safetensors").rename(tmp_path / "late")
    timer = threading.Timer(1.5, lambda: late.rename(out / "shard-00002.safetensors"))
    timer.start()
    index = encode(folder, out, rank=0, world=3)
    assert index["images"] == 11 and content(out) == content(tmp_path / "whole")
    with pytest.raises(ValueError, match="was begun with size 32"):
        encode(folder, out, size=16, rank=1, world=3)


def test_a_damaged_shard_is_made_again(folder, tmp_path):
    encode(folder, tmp_path / "out")
    before = content(tmp_path / "out")
    shard = tmp_path / "out" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="shard-00001.safetensors: missing or damaged .* run train.encode again"):
        Latents.load(tmp_path / "out")
    encode(folder, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_another_plan_is_refused(folder, tmp_path):
    encode(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="was begun with size 32, not 16; choose another --out"):
        encode(folder, tmp_path / "out", size=16)
    (folder / "a" / "00.png").rename(folder / "a" / "zz.png")
    with pytest.raises(ValueError, match="was begun with other images"):
        encode(folder, tmp_path / "out")


def test_broken_images_are_left_out(folder, tmp_path, capsys):
    for name in ("a/00.png", "a/03.png", "a/06.png", "a/09.png", "b/04.png"):  # all of the first shard
        (folder / name).write_bytes(b"no picture")
    index = encode(folder, tmp_path / "out")
    assert index["broken"] == ["a/00.png", "a/03.png", "a/06.png", "a/09.png", "b/04.png"] and index["images"] == 6
    assert [s["file"] for s in index["shards"]] == ["shard-00001.safetensors", "shard-00002.safetensors"]
    assert capsys.readouterr().err.count("cannot be read, left out") == 5
    data = Latents.load(tmp_path / "out")
    assert data.fetch(torch.tensor([[i, 0] for i in range(6)]))[1].tolist() == [1, 1, 1, 2, 2, 2]
    for path in find_images(folder).paths:
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of its 11 images can be read"):
        encode(folder, tmp_path / "none")


def test_a_full_disk_leaves_no_half_shard(folder, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        encode(folder, tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == ["plan.json"]


def test_values_too_large_for_the_dtype_are_an_error(folder, tmp_path):
    large = Encoder(lambda images: tuple(1e6 * part for part in averages(images)), "large", 1.0, 0.0)
    with pytest.raises(ValueError, match="not finite in torch.float16: use --dtype float32"):
        encode(folder, tmp_path / "out", large, dtype="float16")


@pytest.mark.parametrize("change, message", [
    ({"scale": None}, "scale missing or of another kind"),
    ({"format": 9}, "format or shards missing"),
    ({"shape": [4, 4, 5]}, r"holds .*'latents': \(4, 4, 4, 4\).*, the index says"),
    ({"flips": True}, "the index says .*flipped"),
])
def test_an_index_that_does_not_fit_is_named(folder, tmp_path, change, message):
    index = encode(folder, tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text(json.dumps(index | change))
    with pytest.raises(ValueError, match=message):
        Latents.load(tmp_path / "out")


def test_folders_without_latents_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="no folder of latents was given"):
        Latents.load(None)
    with pytest.raises(ValueError, match="no index.json in it; expected a folder that python -m train.encode wrote"):
        Latents.load(folder)
    encode(folder, tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text("{")
    with pytest.raises(ValueError, match="damaged, not JSON"):
        Latents.load(tmp_path / "out")


def test_training_on_latents(folder, tmp_path):
    encode(folder, tmp_path / "out", flips=True)
    settings = ["data=latents", f"data_path={tmp_path / 'out'}", "model.in_channels=4", "model.sample_size=4",
                "model.patch_size=2", "model.num_layers=1", "model.num_heads=1", "model.head_dim=16",
                "model.logstd_width=8", "spectrum.base_size=[4, 4, 4]", "steps=2", "batch_size=4", "precision=float32"]
    config = override(PRESETS["images64"], settings)
    trainer = Trainer(config, tmp_path / "run", CPU)
    trainer.train_step()
    trainer.save()
    checkpoint = load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert checkpoint.latent_space == trainer.data.latent_space and checkpoint.latent_space.kind == "sd-vae"
    assert checkpoint.class_names == ("a", "b", "c") and checkpoint.config.num_classes == 3
    with pytest.raises(ValueError, match=r"samples of shape \(4, 4, 4\), the model takes \(4, 8, 8\)"):
        open_data(override(config, ["model.sample_size=8", "spectrum.base_size=[4, 8, 8]"]))


# ---- the command -------------------------------------------------------------------------------

def run_main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["train.encode", *map(str, arguments)])
    return module.main()


def test_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "diffusers_encoder", lambda source, device: FAKE)
    out = tmp_path / "out"
    assert run_main(monkeypatch, folder, "--vae", "x", "--out", out, "--size", 32, "--flips", "--workers", 1,
                    "--shard-size", 4) == 0
    assert "11 images, 3 classes, latents [4, 4, 4], 0 left out" in capsys.readouterr().out
    assert Latents.load(out).flip
    assert run_main(monkeypatch, tmp_path / "absent", "--vae", "x", "--out", out) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "absent").exists()
    assert run_main(monkeypatch, folder, "--vae", "x", "--out", out, "--batch", 0) == 2
    assert "--batch: '0' is not a whole number >= 1" in capsys.readouterr().err

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "encode_folder", stopped)
    assert run_main(monkeypatch, folder, "--vae", "x", "--out", out) == 130
    assert "run the same command to go on" in capsys.readouterr().err


def test_without_diffusers_it_says_what_to_install(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert run_main(monkeypatch, folder, "--vae", "x", "--out", tmp_path / "out") == 2
    assert "python -m pip install diffusers" in capsys.readouterr().err


def test_with_a_vae_of_diffusers(folder, tmp_path):
    kl = importable("diffusers", "AutoencoderKL")
    torch.manual_seed(0)
    vae = kl(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
             up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.7)
    vae.save_pretrained(tmp_path / "tiny-vae")
    encoder = diffusers_encoder(str(tmp_path / "tiny-vae"), CPU)
    assert encoder.name == "tiny-vae" and encoder.scale == 0.7 and encoder.shift == 0.0
    index = encode(folder, tmp_path / "out", encoder)
    assert index["shape"] == [4, 16, 16]
    image = to_unit(decode(find_images(folder).paths[0], 32))[None]
    posterior = vae.eval().encode(image).latent_dist
    noise = torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(0))
    with safe_open(tmp_path / "out" / "shard-00000.safetensors", "pt") as shard:
        torch.testing.assert_close(shard.get_tensor("latents")[0], (0.7 * (posterior.mean + posterior.std * noise))[0])
    with pytest.raises(ValueError, match="no AutoencoderKL could be loaded from it"):
        diffusers_encoder(str(folder), CPU)


# ---- another VAE, other pictures, other processes ----------------------------------------------

def copy_of(folder, tmp_path):
    import shutil

    return find_images(shutil.copytree(folder, tmp_path / "copy"))


def test_a_vae_of_the_same_name_is_told_apart(folder, tmp_path):
    from dataclasses import replace

    images, out = find_images(folder), tmp_path / "out"
    module.encode_folder(images, out, replace(FAKE, weights="a"), size=32, shard_size=4)
    with pytest.raises(ValueError, match="was begun with other weights of the VAE; choose another --out"):
        module.encode_folder(images, out, replace(FAKE, weights="b"), size=32, shard_size=4)


def test_a_replaced_picture_of_the_same_name_is_told_apart(folder, tmp_path):
    from PIL import Image

    images, out = copy_of(folder, tmp_path), tmp_path / "out"
    module.encode_folder(images, out, FAKE, size=32, shard_size=4)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(images.paths[2])
    with pytest.raises(ValueError, match="was begun with other images"):
        module.encode_folder(find_images(images.folder), out, FAKE, size=32, shard_size=4)


def test_a_folder_begun_without_fingerprints_goes_on(folder, tmp_path, capsys):
    images, out = find_images(folder), tmp_path / "out"
    module.encode_folder(images, out, FAKE, size=32, shard_size=4)
    plan = json.loads((out / module.PLAN).read_text())
    (out / module.PLAN).write_text(json.dumps({k: v for k, v in plan.items() if k not in ("contents", "vae_weights")}))
    module.encode_folder(images, out, FAKE, size=32, shard_size=4)
    assert "a version without fingerprints" in capsys.readouterr().err
    (out / module.PLAN).write_text("{half")
    with pytest.raises(ValueError, match="damaged, not JSON"):
        module.encode_folder(images, out, FAKE, size=32, shard_size=4)


def test_fingerprints_of_weights():
    state = {"b": torch.zeros(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    same = module.fingerprint_of(dict(reversed(state.items())))
    assert module.fingerprint_of(state) == same
    for other in (state | {"b": torch.zeros(3, 2)}, state | {"a": state["a"].float()},
                  state | {"b": state["b"] + 1e-7}):
        assert module.fingerprint_of(other) != same


def test_a_world_size_alone_encodes_all(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "diffusers_encoder", lambda source, device: FAKE)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_main(monkeypatch, folder, "--vae", "x", "--out", tmp_path / "out", "--size", 32, "--shard-size", 4) == 0
    assert "11 images" in capsys.readouterr().out and ".lock" not in os.listdir(tmp_path / "out")


def test_a_class_without_a_readable_picture_is_said(folder, tmp_path, capsys):
    images = copy_of(folder, tmp_path)
    for path, label in zip(images.paths, images.labels.tolist(), strict=True):
        if label == 1:
            path.write_bytes(b"no picture")
    module.encode_folder(images, tmp_path / "out", FAKE, size=32, shard_size=4)
    assert f"of the class {images.classes[1]} can be read: it has no latents" in capsys.readouterr().err
