"""Training: what a step optimises, exact resume, files that are whole or absent, clear refusals."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gmflow_core import GMDiTConfig, GMMLPConfig, SpectrumConfig, load_checkpoint, mean_loss
from gmflow_core.objective import transition_pair
from train.config import PRESETS, TrainConfig, override
from train.data.checkerboard import Checkerboard
from train.data.digits import INKS, Digits
from train.report import REPORT
from train.step import (
    averaged,
    build,
    learning_rate,
    losses,
    parameter_groups,
    predict,
    step_generator,
    step_inputs,
    tally,
    update_ema,
)
from train.trainer import CHECKPOINT, LOG, STATE, Trainer

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = replace(
    PRESETS["digits"],
    model=GMDiTConfig(num_classes=10, num_gaussians=3, in_channels=3, sample_size=16, patch_size=4,
                      num_layers=1, num_heads=2, head_dim=8, logstd_width=8),
    spectrum=SpectrumConfig((3, 16, 16), (8, 4)), steps=6, batch_size=4, warmup=2, precision="float32",
    log_every=1, sample_every=6, save_every=3, tensorboard=False,
)


def run(trainer: Trainer, until: int) -> list[dict]:
    lines = []
    while trainer.step < until:
        lines.append(trainer.train_step())
        trainer.log(lines[-1])
    return lines


def equal_states(a: Trainer, b: Trainer) -> bool:
    pairs = [(a.nets, b.nets), (a.ema, b.ema)]
    tensors = [(p, q) for x, y in pairs for p, q in zip(x.state_dict().values(), y.state_dict().values(), strict=True)]
    moments = [[v for s in t.optimizer.state_dict()["state"].values() for v in s.values()] for t in (a, b)]
    return all(torch.equal(p, q) for p, q in [*tensors, *zip(*moments, strict=True)])


def test_resume_is_identical_to_an_uninterrupted_run(tmp_path):
    whole = Trainer(TINY, tmp_path / "whole", CPU)
    expected = run(whole, 6)
    first = Trainer(TINY, tmp_path / "cut", CPU)
    run(first, 3)
    first.save()
    run(first, 5)  # work that is lost: the state on disk is that of step 3
    second = Trainer(TINY, tmp_path / "cut", CPU)
    assert second.step == 3
    got = run(second, 6)
    assert equal_states(whole, second)
    for a, b in zip(expected[3:], got, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / LOG).read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]  # the lost lines are gone, not doubled


def test_another_configuration_is_refused(tmp_path):
    trainer = Trainer(TINY, tmp_path, CPU)
    trainer.save()
    with pytest.raises(ValueError, match=r"another configuration \(label_dropout: 0.1 there, 0.5 asked for\)"):
        Trainer(replace(TINY, label_dropout=0.5), tmp_path, CPU)


def test_a_failed_save_leaves_the_previous_files(tmp_path, monkeypatch):
    trainer = Trainer(TINY, tmp_path, CPU)
    run(trainer, 1)
    trainer.save()
    before = {name: (tmp_path / name).read_bytes() for name in (STATE, CHECKPOINT)}
    run(trainer, 2)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no power")))
    with pytest.raises(OSError, match=r"state.pt could not be written \(no power\); the previous file, "
                                      r"if there was one, is kept"):
        trainer.save()
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in (STATE, CHECKPOINT)} == before
    assert Trainer(TINY, tmp_path, CPU).step == 1


def test_checkpoint_loads_and_holds_the_moving_average(tmp_path):
    trainer = Trainer(TINY, tmp_path, CPU)
    run(trainer, 4)
    trainer.save()
    checkpoint = load_checkpoint(tmp_path / CHECKPOINT)
    assert checkpoint.config == TINY.model and checkpoint.spectrum is not None
    assert checkpoint.class_names == tuple("0123456789")
    assert checkpoint.training["step"] == 4 and checkpoint.training["images"] == 16
    for name, value in trainer.ema["model"].state_dict().items():
        assert torch.equal(checkpoint.model.state_dict()[name], value)
        if value.numel() > 1000:
            assert not torch.equal(trainer.nets["model"].state_dict()[name], value)


def test_the_mean_term_is_added_once_with_its_weight():
    """loss(w) = loss(0) + w mean, on the same draws; the transition weight does not scale it,
    the log shows all three."""
    with pytest.raises(ValueError, match="mean_weight must be 0"):
        override(PRESETS["digits-vanilla"], ["mean_weight=1"])
    nets, inputs = build(TINY, CPU), step_inputs(TINY, Digits.load(), 0)
    without = losses(nets, TINY, inputs)
    terms = losses(nets, replace(TINY, mean_weight=3.0), inputs)
    _, _, x_high = transition_pair(inputs.x_0, inputs.sigma, TINY.transition_ratio, *inputs.noises)
    velocity = predict(nets["model"], x_high, inputs.sigma, inputs.labels, "float32")
    expected = 3 * mean_loss(velocity, inputs.x_0, x_high, inputs.sigma)
    assert "mean" not in without and (expected > 0).all()
    torch.testing.assert_close(terms["mean"], expected.detach())
    torch.testing.assert_close(terms["loss"], without["loss"] + expected)
    assert torch.equal(terms["transition"], without["transition"])
    assert torch.equal(terms["spectral"], without["spectral"])


def test_a_run_without_the_mean_term_is_the_one_it_always_was(tmp_path):
    """Configurations and files of runs that did not know the setting: the same bytes, and they go on."""
    assert "mean_weight" not in TINY.to_dict() and replace(TINY, mean_weight=2.0).to_dict()["mean_weight"] == 2.0
    trainer = Trainer(TINY, tmp_path, CPU)
    trainer.save()
    assert "mean_weight" not in load_checkpoint(tmp_path / CHECKPOINT).training["config"]
    assert Trainer(TINY, tmp_path, CPU).step == 0
    with pytest.raises(ValueError, match=r"another configuration \(mean_weight: 0.0 there, 2.0 asked for\)"):
        Trainer(replace(TINY, mean_weight=2.0), tmp_path, CPU)


def test_cooldown_is_constant_and_then_one_minus_the_root():
    config = override(PRESETS["digits"], ["lr_decay=cooldown", "cooldown=4", "steps=10", "lr=0.5", "warmup=2"])
    assert [learning_rate(config, step) for step in range(2, 7)] == [0.5] * 5 and learning_rate(config, 0) == 0.25
    rest = [0.5 * (1 - math.sqrt(share)) for share in (0.25, 0.5, 0.75)]
    assert [learning_rate(config, step) for step in (7, 8, 9)] == pytest.approx(rest)
    for bad in (["cooldown=4"], ["lr_decay=cooldown"], ["lr_decay=cooldown", "cooldown=11", "steps=10"]):
        with pytest.raises(ValueError, match="cooldown, the last steps"):
            override(PRESETS["digits"], bad)


def test_a_run_with_a_cooldown_may_end_earlier_or_later(tmp_path):
    """Until the cooldown begins the steps are the same, whenever it ends."""
    cooled = replace(TINY, lr_decay="cooldown", cooldown=2, steps=6)
    trainer = Trainer(cooled, tmp_path, CPU)
    run(trainer, 4)
    trainer.save()
    again = Trainer(replace(cooled, steps=8, cooldown=3), tmp_path, CPU)
    assert again.step == 4 and equal_states(trainer, again)
    with pytest.raises(ValueError, match="steps: 6 there, 9 asked for"):  # a cosine's whole course hangs on its length
        Trainer(TINY, tmp_path / "cosine", CPU).save()
        Trainer(replace(TINY, steps=9), tmp_path / "cosine", CPU)


def test_every_parameter_learns():
    nets = build(TINY, CPU)
    torch.manual_seed(0)
    for p in nets.parameters():  # adaLN-Zero starts at zero and hides what lies behind it
        p.data += 0.02 * torch.randn_like(p)
    terms = losses(nets, TINY, step_inputs(TINY, Digits.load(), 0))
    terms["loss"].mean().backward()
    silent = [name for name, p in nets.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_training_learns_the_checkerboard():
    """200 small steps bring the NLL well below that of the initial mixture, towards the entropy of the data."""
    config = replace(PRESETS["checkerboard"], model=GMMLPConfig(num_gaussians=16, width=64, num_layers=2),
                     batch_size=512, lr=2e-3, ema_decay=0.9)
    trainer = Trainer(config, None, CPU)
    first = [trainer.train_step()["loss"] for _ in range(5)]
    for _ in range(200):
        last = trainer.train_step()["loss_smooth"]
    assert last < sum(first) / 5 - 0.8


def test_vanilla_loss_is_half_the_squared_error():
    config = replace(TINY, loss="l2", spectrum=None, model=replace(TINY.model, num_gaussians=1, constant_logstd=0.0),
                     label_dropout=0.0)
    nets = build(config, CPU)
    terms = losses(nets, config, step_inputs(config, Digits.load(), 7))
    g = step_generator(0, 7)
    batch = Digits.load().batch(4, g)
    sigma = torch.sigmoid(config.time_mean + config.time_std * torch.randn(4, generator=g))
    torch.rand(4, generator=g)  # label dropout
    noise = torch.randn(4, 3, 16, 16, generator=g)
    s = sigma[:, None, None, None]
    u = nets["model"]((1 - s) * batch[0] + s * noise, sigma, batch[1])[:, :3]
    expected = 0.5 * (u - (noise - batch[0])).square().sum(1).mean((1, 2))
    torch.testing.assert_close(terms["loss"], expected)


def test_label_dropout_uses_the_null_label():
    config = replace(TINY, label_dropout=0.2, batch_size=500)
    labels = step_inputs(config, Digits.load(), 0).labels
    true = Digits.load().batch(500, step_generator(0, 0))[1]
    dropped = labels == 10
    assert 60 < dropped.sum() < 140 and torch.equal(labels[~dropped], true[~dropped])


def test_a_part_of_a_step_is_a_part_of_its_batch():
    whole = step_inputs(TINY, Digits.load(), 3)
    part = step_inputs(TINY, Digits.load(), 3, slice(1, 3))
    for a, b in zip((whole.x_0, whole.labels, whole.sigma, *whole.noises),
                    (part.x_0, part.labels, part.sigma, *part.noises), strict=True):
        assert torch.equal(a[1:3], b)


def test_tallies_of_parts_add_up():
    nets, inputs = build(TINY, CPU), step_inputs(TINY, Digits.load(), 0)
    whole = tally(losses(nets, TINY, inputs))
    parts = [tally(losses(nets, TINY, part)) for part in inputs.split(2)]
    numbers = averaged(whole)
    assert averaged({k: parts[0][k] + parts[1][k] for k in whole}) == pytest.approx(numbers, rel=1e-5)
    terms = losses(nets, TINY, inputs)
    assert numbers["loss"] == pytest.approx(terms["loss"].mean().item())
    assert 0 < numbers["entropy"] < math.log(3) and 1 < numbers["components"] <= 3
    quarter = (terms["sigma"] * 4).long()
    for q in range(4):
        if (quarter == q).any():
            assert numbers[f"loss_q{q}"] == pytest.approx(terms["loss"][quarter == q].mean().item())
        else:
            assert f"loss_q{q}" not in numbers


def test_schedule_and_groups():
    config = replace(TINY, warmup=10, steps=100, lr=1.0)
    assert learning_rate(config, 0) == pytest.approx(0.1, rel=1e-3)
    assert learning_rate(config, 50) == pytest.approx(0.5)
    assert learning_rate(config, 99) < 0.001
    assert learning_rate(replace(config, lr_decay="constant"), 99) == 1.0
    decayed, bare = parameter_groups(build(TINY, CPU), 0.1)
    assert decayed["weight_decay"] == 0.1 and bare["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"]) and all(p.ndim == 1 for p in bare["params"])


def test_digits_are_inked():
    data = Digits.load()
    assert data.grey.shape == (1797, 1, 16, 16) and 0 <= data.grey.min() and data.grey.max() <= 1
    images, labels = data.batch(64, step_generator(0, 0))
    again, _ = data.batch(64, step_generator(0, 0))
    assert images.shape == (64, 3, 16, 16) and torch.equal(images, again) and labels.max() < 10
    rgb = (images + 1) / 2
    for image in rgb:  # every pixel is a grey level times one of the six inks
        level = image.amax()
        ink = (image.flatten(1)[:, image.amax(0).argmax()] / level > 0.5).float()
        assert tuple(ink.int().tolist()) in INKS.values()
        torch.testing.assert_close(image, image.amax(0) * ink[:, None, None])


def test_checkerboard_support():
    points, labels = Checkerboard.load().batch(20_000, step_generator(0, 0))
    assert labels is None and points.abs().max() <= 4
    cells = ((points + 4) / 2).long()
    assert (cells.sum(1) % 2 == 0).all()
    counts = torch.bincount(cells[:, 0] * 4 + cells[:, 1], minlength=16)
    assert (counts > 0).sum() == 8 and counts[counts > 0].min() > 2200


@pytest.mark.parametrize("setting, message", [
    ("steps", "takes key=value"),
    ("speed=3", "no field 'speed'; there are data"),
    ("model.width=3", "no field 'width'"),
    ("steps=many", "steps takes a int, got 'many'"),
    ("steps=0", "steps must be >= 1"),
    ("model.num_layers=0", "num_layers must be a whole number >= 1"),
    ("transition_ratio=0", r"must be in \(0, 1\]"),
    ("loss=l1", "loss must be one of transition, l2"),
    ("mean_weight=-1", "mean_weight must be >= 0, got -1"),
    ("loss=l2", "needs model.num_gaussians=1"),
    ("lr.x=1", "lr has no fields"),
])
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        override(PRESETS["digits"], [setting])


def test_override_reaches_into_the_model():
    config = override(PRESETS["digits"], ["model.num_layers=2", "lr=1", "betas=[0.8, 0.9]"])
    assert config.model.num_layers == 2 and config.lr == 1.0 and config.betas == (0.8, 0.9)
    assert isinstance(config, TrainConfig)


def command(*args: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "train", *args], cwd=cwd, capture_output=True, text=True)


def test_command_trains_saves_and_goes_on(tmp_path):
    small = ["--preset", "digits", "--out", str(tmp_path / "run"), "--threads", "1", "--set", "batch_size=2",
             "--set", "model.num_layers=1", "--set", "steps=2", "--set", "log_every=1", "--set", "warmup=0"]
    done = command(*small, "--export", str(tmp_path / "out.safetensors"), cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} - {"tensorboard"} == {STATE, CHECKPOINT, LOG, REPORT,
                                                                                "samples-000002.png"}
    exported = load_checkpoint(tmp_path / "out.safetensors", dtype=None)
    assert next(exported.model.parameters()).dtype == torch.float16
    again = command(*small, cwd=os.getcwd())
    assert again.returncode == 0 and str(tmp_path / "run" / CHECKPOINT) in again.stdout


def test_dry_run_writes_nothing(tmp_path):
    done = command("--preset", "checkerboard", "--dry-run", "--out", str(tmp_path / "run"), cwd=os.getcwd())
    assert done.returncode == 0 and '"data": "checkerboard"' in done.stdout and "parameters on cpu" in done.stdout
    assert not (tmp_path / "run").exists()


def test_command_refuses_in_one_line(tmp_path):
    done = command("--preset", "digits", "--set", "lr=-1", "--out", str(tmp_path / "run"), cwd=os.getcwd())
    assert done.returncode == 2 and done.stderr == "error: lr must be > 0, got -1.0\n"
    assert not (tmp_path / "run").exists()


def test_without_a_folder_there_is_a_state_all_the_same():
    trainer = Trainer(TINY, None, CPU)
    trainer.train_step()
    state = trainer.state()
    assert state["step"] == 1 and state["history"] == []
    assert all(torch.equal(value, trainer.nets.state_dict()[name]) for name, value in state["nets"].items())


def test_the_average_forgets_the_start():
    """d = min(decay, (1 + n)/(10 + n)): 1/10 in the first step, the decay itself after many."""
    def pair():
        nets = torch.nn.Linear(1, 1, bias=False)
        ema = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
        nets.weight.data.fill_(1.0)
        ema.weight.data.fill_(0.0)
        return ema, nets

    for decay, step, expected in ((0.999, 0, 1 - 0.1), (0.999, 90, 1 - 0.91), (0.5, 10**6, 0.5), (0.05, 0, 0.95)):
        ema, nets = pair()
        update_ema(ema, nets, decay, step)
        assert ema.weight.item() == pytest.approx(expected, rel=1e-6)
