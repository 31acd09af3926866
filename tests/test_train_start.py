"""Presets, and starting from trained weights."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_train import CPU, TINY

from gmflow_core import GMDiT, GMDiTConfig, load_checkpoint
from gmflow_core.__main__ import MODELS
from train.__main__ import main
from train.config import PRESETS, override
from train.initialise import initialise
from train.step import build
from train.trainer import CHECKPOINT, Trainer

DIGITS = MODELS / "gmdit_digits.safetensors"


def with_k(k: int, **changes):
    return replace(TINY, model=replace(TINY.model, num_gaussians=k, **changes))


def shaken(config):
    """Networks in which everything speaks."""
    nets = build(config, CPU)
    torch.manual_seed(1)
    for p in nets.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return nets


def velocity(nets, labels=(0, 3, 10)):
    model = nets["model"]
    x = torch.randn(len(labels), model.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model.mixture(model(x, torch.tensor([0.2, 0.5, 0.9]), torch.tensor(labels)))


def saved(tmp_path, config):
    trainer = Trainer(config, tmp_path / "source", CPU)
    trainer.ema.load_state_dict(shaken(config).state_dict())
    trainer.save()
    return tmp_path / "source" / CHECKPOINT


# ---- presets -----------------------------------------------------------------------------------

def test_presets_are_there_and_their_names_say_what_they_are():
    assert {"digits", "digits-vanilla", "characters", "characters-vanilla", "checkerboard-k1", "checkerboard-k8",
            "checkerboard-k64", "checkerboard-vanilla", "images64", "imagenet256-dit-xl2-k8", "dit-s2",
            "dit-b2"} <= set(PRESETS)
    assert PRESETS["checkerboard"] == PRESETS["checkerboard-k64"]
    assert [PRESETS[f"checkerboard-k{k}"].model.num_gaussians for k in (1, 8, 64)] == [1, 8, 64]
    for name in PRESETS:
        assert (PRESETS[name].loss == "l2") == name.endswith("vanilla")
    ours, plain = PRESETS["characters"], PRESETS["characters-vanilla"]
    assert (plain.steps, plain.cooldown, plain.lr, plain.model.num_layers) == \
        (ours.steps, ours.cooldown, ours.lr, ours.model.num_layers)


@pytest.mark.parametrize("name, millions", [("imagenet256-dit-xl2-k8", 675), ("dit-b2", 130), ("dit-s2", 33)])
def test_sizes_are_dits(name, millions):
    """Peebles & Xie 2023, table 1."""
    model = GMDiT(PRESETS[name].model, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.035)
    assert PRESETS[name].model.num_gaussians == 8


def test_the_imagenet_preset_is_the_published_recipe():
    c = PRESETS["imagenet256-dit-xl2-k8"]
    assert (c.model, c.batch_size, c.steps) == (GMDiTConfig(), 4096, 200_000)
    assert (c.lr, c.betas, c.weight_decay) == (2e-4, (0.9, 0.95), 0.05)
    assert (c.transition_ratio, c.transition_weight, c.spectral_weight, c.label_dropout) == (0.5, 2.0, 1.0, 0.1)
    assert (c.optimizer, c.warmup, c.clip_norm, c.clip_from, c.precision) == ("adamw8bit", 1000, 10.0, 1000, "bf16")
    assert (c.time_distribution, c.time_mean, c.time_std, c.time_shift) == ("logit-normal", 0.0, 1.0, 1.0)


@pytest.mark.parametrize("name", ["checkerboard-k1", "checkerboard-k8", "checkerboard-vanilla", "digits-vanilla"])
def test_small_presets_take_a_step(name):
    numbers = Trainer(replace(PRESETS[name], batch_size=8), None, CPU).train_step()
    assert "skipped" not in numbers


# ---- starting from a GMFlow checkpoint ---------------------------------------------------------

def test_the_same_k_is_a_copy(tmp_path):
    path = saved(tmp_path, TINY)
    nets = build(TINY, CPU)
    initialise(nets, TINY, path)
    source = shaken(TINY)
    for name, value in source.state_dict().items():
        assert torch.equal(nets.state_dict()[name], value), name


@pytest.mark.parametrize("k", [6, 7])
def test_more_components_are_copies_that_share_the_weight(tmp_path, monkeypatch, k):
    path, config = saved(tmp_path, TINY), with_k(k)
    monkeypatch.setattr("train.initialise.NOISE", 0.0)
    nets = build(config, CPU)
    initialise(nets, config, path)
    before, after = velocity(shaken(TINY)), velocity(nets)
    assert after.means.shape[1] == k
    torch.testing.assert_close(after.means, before.means[:, torch.arange(k) % 3])
    x = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(after.log_prob(x), before.log_prob(x), rtol=1e-4, atol=1e-4)  # the same mixture


def test_copies_differ_a_little(tmp_path):
    config = with_k(6)
    nets = build(config, CPU)
    initialise(nets, config, saved(tmp_path, TINY))
    before, after = velocity(shaken(TINY)).means, velocity(nets).means
    torch.testing.assert_close(after[:, :3], before)
    error = (after[:, 3:] - before).std() / before.std()
    assert 0.01 < error < 0.15


def test_fewer_components_are_the_first(tmp_path):
    config = with_k(2)
    nets = build(config, CPU)
    initialise(nets, config, saved(tmp_path, TINY))
    torch.testing.assert_close(velocity(nets).means, velocity(shaken(TINY)).means[:, :2])


def test_from_one_component_the_weights_are_equal(tmp_path):
    vanilla = replace(with_k(1, constant_logstd=-0.5), loss="l2", spectrum=None)
    nets = build(TINY, CPU)
    initialise(nets, TINY, saved(tmp_path, vanilla))
    after, before = velocity(nets), velocity(shaken(vanilla))
    torch.testing.assert_close(after.means[:, :1], before.means)
    torch.testing.assert_close(after.log_weights.exp(), torch.full_like(after.log_weights, 1 / 3))
    torch.testing.assert_close(after.log_std, torch.full_like(after.log_std, -0.5))


def test_other_classes_start_as_the_null_label(tmp_path, capsys):
    config = with_k(3, num_classes=4)
    nets = build(config, CPU)
    initialise(nets, config, saved(tmp_path, TINY))
    torch.testing.assert_close(velocity(nets, (0, 2, 4)).means, velocity(shaken(TINY), (10, 10, 10)).means)
    assert "10 classes there, 4 here: each starts as the null label" in capsys.readouterr().err


def test_a_run_starts_from_a_file_and_then_goes_on_without_it(tmp_path):
    path = saved(tmp_path, TINY)
    config = replace(TINY, init_from=str(path))
    trainer = Trainer(config, tmp_path / "run", CPU)
    assert torch.equal(trainer.ema["model"].proj_out_2.weight, shaken(TINY)["model"].proj_out_2.weight)
    trainer.train_step()
    trainer.save()
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT).training["init_from"] == CHECKPOINT  # the name, not the place
    path.unlink()
    assert Trainer(config, tmp_path / "run", CPU).step == 1
    assert Trainer(TINY, tmp_path / "run", CPU).step == 1


def test_command_starts_from_the_bundled_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv",
                        ["train", "--preset", "digits", "--init-from", str(DIGITS), "--set", "model.num_gaussians=9",
                                      "--set", "batch_size=8", "--dry-run"])
    assert main() == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(said)["loss"] < 0  # a fresh network is above 1
    monkeypatch.setattr(sys, "argv", ["train", "--preset", "digits", "--init-from", str(tmp_path / "no.safetensors"),
                                      "--out", str(tmp_path / "a")])
    assert main() == 2 and "no.safetensors: there is no such file" in capsys.readouterr().err


# ---- starting from a DiT -----------------------------------------------------------------------

def diffusers_state(config, sigma_channels: bool) -> dict[str, torch.Tensor]:
    """A DiT of one component as diffusers names it: an embedding in every block, perhaps variances behind the means."""
    ours = shaken(replace(config,
                          model=replace(config.model, num_gaussians=1, constant_logstd=0.0)))["model"].state_dict()
    state = {"pos_embed.pos_embed": torch.zeros(1, 16, 16)}
    p, c = config.model.patch_size**2, config.model.in_channels
    for name, value in ours.items():
        if name.startswith("emb."):
            for block in range(config.model.num_layers):
                state[f"transformer_blocks.{block}.norm1.{name}"] = value.clone()
        elif name.startswith("proj_out_2."):
            mean = value.unflatten(0, (p, c + 1))[:, :c]  # without the logit
            rows = torch.cat([mean, torch.ones_like(mean)], 1) if sigma_channels else mean
            state[name] = rows.flatten(0, 1).contiguous()
        else:
            state[name] = value
    return state


@pytest.mark.parametrize("sigma_channels", [True, False])
@pytest.mark.parametrize("where", ["file", "folder", "pipeline", "bin"])
def test_a_vanilla_dit_gives_every_component_its_mean(tmp_path, sigma_channels, where):
    config = replace(TINY, model=replace(TINY.model, num_layers=2))
    folder = tmp_path / "transformer" if where == "pipeline" else tmp_path
    folder.mkdir(exist_ok=True)
    path = folder / ("diffusion_pytorch_model.bin" if where == "bin" else "diffusion_pytorch_model.safetensors")
    (torch.save if where == "bin" else save_file)(diffusers_state(config, sigma_channels), path)
    nets = build(config, CPU)
    initialise(nets, config, path if where == "file" else tmp_path)
    expected = velocity(
        shaken(replace(config, model=replace(config.model, num_gaussians=1, constant_logstd=0.0)))
    ).means
    after = velocity(nets)
    torch.testing.assert_close(after.means[:, :1], expected)
    assert 0 < (after.means[:, 1:] - expected).std() < 0.2 * expected.std()
    torch.testing.assert_close(after.log_weights.exp(), torch.full_like(after.log_weights, 1 / 3))
    torch.testing.assert_close(after.log_std, torch.zeros_like(after.log_std))


def test_a_dit_of_diffusers_itself(tmp_path):
    """Its noise prediction is the mean of the first component, at the same timestep.

    diffusers spaces the frequencies of the timestep over 127 intervals, the original DiT and GM-DiT over 128.
    """
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6,
                                          num_layers=2, sample_size=16, patch_size=4, num_embeds_ada_norm=10)
    embedding = dit.transformer_blocks[0].norm1.emb.state_dict()
    dit.transformer_blocks[1].norm1.emb.load_state_dict(embedding)
    dit.eval().save_pretrained(tmp_path / "dit")
    for block in dit.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    config = replace(TINY, model=replace(TINY.model, num_layers=2))
    nets = build(config, CPU)
    initialise(nets, config, tmp_path / "dit")
    x, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 10])
    with torch.no_grad():
        expected = dit(x, timestep=torch.tensor([250, 250]), class_labels=labels).sample[:, :3]
        model = nets["model"]
        got = model.mixture(model(x, torch.full((2,), 0.25), labels)).means[:, 0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings, message", [
    (["model.num_heads=4", "model.head_dim=4"], "has 2 attention heads, the model 4"),
    (["model.patch_size=2"], r"\(width, channels, patch, patch\) is \(16, 3, 4, 4\), the model's \(16, 3, 2, 2\)"),
    (["model.num_layers=2"], "missing: transformer_blocks.1"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, settings, message):
    path = saved(tmp_path, TINY)
    with pytest.raises(ValueError, match=message):
        Trainer(override(replace(TINY, init_from=str(path)), settings), None, CPU)


def test_other_files_are_refused(tmp_path):
    state = diffusers_state(replace(TINY, model=replace(TINY.model, num_layers=2)), False)
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="differs from that of the first block"):
        Trainer(replace(TINY, init_from=str(tmp_path / "a.safetensors")), None, CPU)
    del state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"], state["proj_out_2.bias"]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a DiT's weights, proj_out_2.bias missing"):
        Trainer(replace(TINY, init_from=str(tmp_path / "a.safetensors")), None, CPU)
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="not a GMFlow file"):
        Trainer(replace(TINY, init_from=str(tmp_path / "b.safetensors")), None, CPU)
    with pytest.raises(ValueError, match="is for GM-DiTs"):
        Trainer(replace(PRESETS["checkerboard"], init_from=str(DIGITS)), None, CPU)
    points = Trainer(replace(PRESETS["checkerboard-k1"], batch_size=4), tmp_path / "points", CPU)
    points.save()
    with pytest.raises(ValueError, match="a model for 2D points, not a GM-DiT"):
        Trainer(replace(TINY, init_from=str(tmp_path / "points" / CHECKPOINT)), None, CPU)


def dit_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' names of a DiT as facebookresearch/DiT has them: one embedding, q, k and v stacked."""
    found = {"pos_embed": torch.zeros(1, 16, 16)}
    for name, value in state.items():
        block = name.split(".")[1] if name.startswith("transformer_blocks.") else None
        rest = name.split(".", 2)[2] if block else name
        if rest.startswith("norm1.emb."):
            if block == "0":
                inner = rest.removeprefix("norm1.emb.")
                old = {"timestep_embedder.linear_1": "t_embedder.mlp.0",
                       "timestep_embedder.linear_2": "t_embedder.mlp.2",
                       "class_embedder": "y_embedder"}
                found[next(inner.replace(a, b) for a, b in old.items() if inner.startswith(a))] = value
        elif rest.startswith("attn1.to_q"):
            kind = rest.rsplit(".", 1)[1]
            parts = [state[f"transformer_blocks.{block}.attn1.to_{part}.{kind}"] for part in "qkv"]
            found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
        elif block and not rest.startswith(("attn1.to_k", "attn1.to_v")):
            old = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1",
                   "ff.net.2": "mlp.fc2"}
            found[f"blocks.{block}." + next(rest.replace(a, b) for a, b in old.items() if rest.startswith(a))] = value
        elif not block and name != "pos_embed.pos_embed":
            old = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
                   "proj_out_2": "final_layer.linear"}
            found[next(name.replace(a, b) for a, b in old.items() if name.startswith(a))] = value
    return found


@pytest.mark.parametrize("kind", ["training", "bare", "wrapped"])
def test_a_dit_under_its_own_names(tmp_path, kind, capsys):
    """A training file {model, ema, opt} gives its average; the start is the one from the same weights in diffusers'
    layout."""
    config = replace(TINY, model=replace(TINY.model, num_layers=2))
    state = diffusers_state(config, sigma_channels=True)
    save_file(state, tmp_path / "a.safetensors")
    theirs = dit_names(state)
    content = {"training": {"model": {k: v + 1 for k, v in theirs.items()}, "ema": theirs, "opt": {"state": {}},
                            "args": None},
               "bare": theirs, "wrapped": {f"module.{k}": v for k, v in theirs.items()}}[kind]
    torch.save(content, tmp_path / "b.pt")
    nets = [build(config, CPU), build(config, CPU)]
    for net, name in zip(nets, ("a.safetensors", "b.pt"), strict=True):
        initialise(net, config, tmp_path / name)
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert "a DiT under its own names" in capsys.readouterr().err


def test_the_plain_file_is_preferred_to_its_variants(tmp_path):
    """diffusion_pytorch_model.fp16. and .non_ema. come first in the order of names."""
    config = replace(TINY, model=replace(TINY.model, num_layers=2))
    state = diffusers_state(config, False)
    for name in ("fp16.", "non_ema.", ""):
        other = {k: v + (name != "") for k, v in state.items()} if name else state
        save_file(other, tmp_path / f"diffusion_pytorch_model.{name}safetensors")
    nets, expected = build(config, CPU), build(config, CPU)
    initialise(nets, config, tmp_path)
    initialise(expected, config, tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(a, b)
               for a, b in zip(nets.state_dict().values(), expected.state_dict().values(), strict=True))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    initialise(nets, config, tmp_path)
    initialise(expected, config, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert all(torch.equal(a, b)
               for a, b in zip(nets.state_dict().values(), expected.state_dict().values(), strict=True))


def test_a_run_folder_is_its_checkpoint(tmp_path):
    trainer = Trainer(TINY, tmp_path / "first", CPU)
    trainer.save()
    nets = build(TINY, CPU)
    initialise(nets, TINY, tmp_path / "first")
    ours = trainer.ema["model"].state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in nets["model"].state_dict().items())
