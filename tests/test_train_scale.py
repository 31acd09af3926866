"""Training at scale: several processes, accumulation, saving memory, 8-bit optimizers, throughput."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CPU, TINY
from torch.utils.flop_counter import FlopCounterMode

from gmflow_core import GMMLPConfig, flow_sigmas, load_checkpoint
from gmflow_core.sampler import SECOND_ORDER_TILT, SamplerOptions
from train.config import PRESETS
from train.data.digits import Digits
from train.preview import save_samples
from train.report import REPORT
from train.step import (
    Objective,
    build,
    learning_rate,
    make_optimizer,
    prepare,
    recompute_activations,
    set_learning_rate,
    step_inputs,
)
from train.team import Team, leave, share_of, whole
from train.throughput import Speed, forward_flops, peak_flops
from train.trainer import CHECKPOINT, LOG, STATE, Trainer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def gradients(config, nets=None) -> dict[str, torch.Tensor]:
    """Of a step of a network in which every parameter has a gradient."""
    nets = nets or build(config, CPU)
    torch.manual_seed(0)
    for p in nets.parameters():
        p.data += 0.02 * torch.randn_like(p)
    for piece in step_inputs(config, Digits.load(), 0).split(config.accumulate):
        (Objective(nets, config)(piece)["loss"].mean() / config.accumulate).backward()
    return {name: p.grad for name, p in nets.named_parameters()}


def assert_same(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        scale = a[name].abs().max().item()
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance * max(scale, 1e-3),
                                   msg=f"{name}: {{}}".format)


# ---- several processes -------------------------------------------------------------------------

def start_team(folder: Path, settings: dict, processes: int = 2) -> subprocess.Popen:
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "train", "--preset", "digits", "--device", "cpu", "--out", str(folder),
         *arguments],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


SMALL = {
    "batch_size": 8, "model.num_layers": 1, "model.num_heads": 1, "model.head_dim": 16, "model.logstd_width": 8,
    "model.patch_size": 4, "warmup": 0, "lr_decay": "constant", "precision": "float32", "log_every": 1, "steps": 1,
}


def config_of(settings: dict):
    from train.config import override

    return override(PRESETS["digits"], [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def test_two_processes_take_the_step_of_one_and_one_goes_on_where_two_stopped(tmp_path):
    """Adam's first moment after one step is (1 - beta) times the gradient, clipped."""
    team = start_team(tmp_path / "two", SMALL | {"accumulate": 2})
    output, errors = team.communicate(timeout=300)
    assert team.returncode == 0, errors
    assert output.count("checkpoint: ") == 1  # the first alone speaks
    single = Trainer(config_of(SMALL), None, CPU)
    numbers = single.train_step()
    state = torch.load(tmp_path / "two" / STATE, weights_only=True)
    moments = [{i: s["exp_avg"] for i, s in o["state"].items()}
               for o in (single.optimizer.state_dict(), state["optimizer"])]
    assert_same(*moments)
    # Adam makes much of a small difference where a gradient is nearly zero.
    for name, value in single.nets.state_dict().items():
        assert (state["nets"][name] - value).abs().mean() < 0.01 * SMALL.get("lr", 1e-3)
    (line,) = [json.loads(line) for line in (tmp_path / "two" / LOG).read_text().splitlines()]
    assert line["images_per_second"] > 0
    for name in ("loss", "spectral", "entropy", "components", "grad_norm"):
        assert line[name] == pytest.approx(numbers[name], rel=1e-4, abs=1e-6)
    assert {p.name for p in (tmp_path / "two").iterdir()} - {"tensorboard"} == {STATE, CHECKPOINT, LOG, REPORT,
                                                                                "samples-000001.png"}
    alone = Trainer(config_of(SMALL | {"steps": 2}), tmp_path / "two", CPU)
    assert alone.step == 1 and alone.train_step()["step"] == 2


def test_a_run_goes_on_shared_out_and_whole_again(tmp_path):
    """Two steps of one process, two of two that share out the weights, one more of one: as five of one.

    Sums in another order differ in their last digits, and Adam makes much of a small difference where a gradient is
    nearly zero.
    """
    settings = SMALL | {"accumulate": 2, "sample_every": 4, "save_every": 3}
    whole, mixed = Trainer(config_of(settings), None, CPU), Trainer(config_of(settings), tmp_path, CPU)
    expected = [whole.train_step() for _ in range(5)]
    for _ in range(2):
        mixed.log(mixed.train_step())
    mixed.save()
    team = start_team(tmp_path, settings | {"steps": 4, "parallel": "fsdp", "checkpoint_activations": True})
    output, errors = team.communicate(timeout=300)
    assert team.returncode == 0, errors
    assert "Warning" not in errors and (tmp_path / "samples-000004.png").exists()
    assert load_checkpoint(tmp_path / CHECKPOINT).training["processes"] == 2
    again = Trainer(config_of(settings | {"steps": 5}), tmp_path, CPU)
    assert again.step == 4
    again.log(again.train_step())
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line, numbers in zip(lines, expected, strict=True):
        for name in ("loss", "spectral", "entropy", "components", "grad_norm"):
            assert line[name] == pytest.approx(numbers[name], rel=1e-4, abs=1e-6)
    for ours, theirs in ((again.nets, whole.nets), (again.ema, whole.ema)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert (a - b).abs().mean() < 1e-6, name
    moments = [{i: s["exp_avg"] for i, s in t.optimizer.state_dict()["state"].items()} for t in (again, whole)]
    assert_same(*moments, tolerance=1e-4)


def test_parts_of_weights(monkeypatch):
    """Of a team of one the part is all, but it is held as a part of two would be."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        nets, team = build(TINY, CPU), Team(CPU)
        before = {name: value.clone() for name, value in nets.state_dict().items()}
        team.share_out(nets)
        for name, value in nets.state_dict().items():
            assert value.placements[0].is_shard(0) and torch.equal(whole(value), before[name])
            again = share_of(before[name], value)
            assert again.placements == value.placements and torch.equal(again.to_local(), value.to_local())
        shared = [type(part).__name__ for part in nets.modules() if hasattr(part, "set_requires_gradient_sync")]
        assert shared == ["FSDPGMDiT", "FSDPDiTBlock", "FSDPSpectrumMLP"]
        calls = []
        monkeypatch.setattr(type(nets["spectrum"]), "set_requires_gradient_sync",
                            lambda self, yes, recurse: calls.append((yes, recurse)))
        for alone in (True, False):
            with team.alone(Objective(nets, TINY), alone):
                pass
        assert calls == [(False, False), (True, False)]
    finally:
        leave()
    plain = torch.ones(2)
    assert whole(plain) is plain and share_of(plain, plain) is plain


@pytest.mark.parametrize("setting", [{"optimizer": "adamw8bit"}, {"ema_device": "cpu"}])
def test_what_cannot_be_shared_out_is_refused(setting):
    with pytest.raises(ValueError, match="parallel fsdp shares out what optimizer=adamw and ema_device=same "
                                         "keep; got .*parallel=ddp"):
        replace(TINY, parallel="fsdp", **setting)


def test_weights_are_not_shared_out_by_a_pytorch_that_adds_gradients_up(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.8.1+cu128")
    with pytest.raises(ValueError, match=r"parallel=fsdp needs PyTorch 2.9 or later, this is 2.8.1\+cu128: update it, "
                                         r"or --set parallel=ddp"):
        Team(CPU).share_out(build(TINY, CPU))


def test_a_team_saves_and_stops_together(tmp_path):
    team = start_team(tmp_path / "run", SMALL | {"steps": 100_000, "save_every": 100_000, "sample_every": 100_000})
    log = tmp_path / "run" / LOG
    until = time.monotonic() + 240
    while time.monotonic() < until and team.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.2)
    team.send_signal(signal.SIGTERM)
    _, errors = team.communicate(timeout=120)
    assert "saved; run the same command to go on" in errors, errors
    assert torch.load(tmp_path / "run" / STATE, weights_only=True)["step"] >= 3


LAST_THREADS = """
import sys
from pathlib import Path
from train.__main__ import main

code = main()
print("threads", *(task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")))
sys.exit(code)
"""


def run_machines(folders: tuple[Path, Path]) -> list[tuple[int, str, str]]:
    """(exit code, names of the threads that are left at the end, errors) of each of two machines that train."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [part for key, value in (SMALL | {"steps": 3}).items()
                for part in ("--set", f"{key}={json.dumps(value)}")]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0",
             "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", LAST_THREADS, "--preset", "digits", "--device", "cpu", "--out", str(folder),
             *settings],
            cwd=ROOT, env=os.environ | names | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        ) for rank, folder in enumerate(folders)
    ]
    said = [machine.communicate(timeout=120) for machine in machines]
    return [(machine.returncode, output.partition("threads")[2], errors)
            for machine, (output, errors) in zip(machines, said, strict=True)]


def test_machines_that_do_not_share_the_folder_say_so_instead_of_waiting_forever(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    saved = Trainer(config_of(SMALL), here, CPU)
    saved.train_step()
    saved.save()
    for code, threads, errors in run_machines((here, there)):
        assert code == 2, errors
        assert "processes 0 and 1 do not agree (step 1 and 0): all machines need the same --out" in errors
        assert "gloo" not in threads


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="names of threads are read from /proc, of Linux")
def test_a_team_leaves_no_thread_that_could_outlive_the_interpreter(tmp_path):
    """Such a thread aborts the process now and then, whatever was its exit code."""
    for code, threads, errors in run_machines((tmp_path, tmp_path)):
        assert code == 0, errors
        assert "gloo" not in threads


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="batch_size 4 does not split into 6 equal pieces: 2 processes, accumulate=3"):
        Trainer(replace(TINY, accumulate=3), None, CPU, Team(CPU, 0, 2))


def test_a_team_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = Team.join("cpu")
    assert team.first and team.part(8) == slice(0, 8) and team.any(15) is True and team.any(None) is False
    assert Team(CPU, 2, 4).part(8) == slice(4, 6) and not Team(CPU, 2, 4).first


@pytest.mark.parametrize("device, message",
                         [("cuda", "has no GPU of its own"), ("mps", "work on cuda or cpu, not on mps")])
def test_teams_without_a_device_are_refused(monkeypatch, device, message):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "64")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Team.join(device)


# ---- memory ------------------------------------------------------------------------------------

def test_accumulated_gradients_are_those_of_the_batch():
    assert_same(gradients(TINY), gradients(replace(TINY, accumulate=2)))
    numbers = [Trainer(replace(TINY, accumulate=pieces), None, CPU).train_step() for pieces in (1, 4)]
    for name in ("loss", "transition", "grad_norm", "entropy", "components"):
        assert numbers[1][name] == pytest.approx(numbers[0][name], rel=1e-4)


def test_recomputed_activations_change_nothing_but_memory():
    nets = build(TINY, CPU)
    kept = gradients(TINY, build(TINY, CPU))
    recompute_activations(nets["model"])
    calls = []
    nets["model"].transformer_blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))
    assert_same(kept, gradients(TINY, nets), tolerance=0)
    assert len(calls) == 2  # once forward, once more backward
    Trainer(replace(TINY, checkpoint_activations=True), None, CPU).train_step()


def test_moving_average_on_the_cpu(tmp_path):
    trainer = Trainer(replace(TINY, ema_device="cpu"), None, CPU)
    trainer.train_step()
    save_samples(trainer.ema, trainer.data, tmp_path / "a.png", per_class=1, device=CPU)
    assert next(trainer.ema.parameters()).device == CPU and (tmp_path / "a.png").exists()


def test_samples_are_drawn_as_asked(tmp_path, monkeypatch):
    """On the grid of the options' time shift, and with the tilt of nodes and command line where none are given."""
    asked = []
    monkeypatch.setattr("train.preview.sample", lambda denoiser, x, *rest: asked.append(rest) or x)
    trainer, options = Trainer(TINY, None, CPU), SamplerOptions(shift=3.0, total_substeps=16)
    save_samples(trainer.ema, trainer.data, tmp_path / "a.png", per_class=1, options=options)
    save_samples(trainer.ema, trainer.data, tmp_path / "a.png", per_class=1)
    (sigmas, used), (even, usual) = asked
    assert torch.equal(sigmas, flow_sigmas(8, 3.0)) and used is options
    assert torch.equal(even, flow_sigmas(8)) and usual.second_order.tilt == SECOND_ORDER_TILT


def test_compile_and_tf32_are_switched_on(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    Trainer(TINY, None, CPU)
    assert compiled == []
    names = set(Trainer(replace(TINY, compile=True), None, CPU).nets.state_dict())
    assert compiled == ["GMDiT"] and names == set(build(TINY, CPU).state_dict())
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for on in (True, False):
            prepare(torch.device("cuda"), on)
            assert torch.backends.cuda.matmul.allow_tf32 is on and torch.backends.cudnn.allow_tf32 is on
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---- optimizers --------------------------------------------------------------------------------

def test_without_its_package_the_8_bit_optimizer_says_what_to_install(monkeypatch):
    config = replace(TINY, optimizer="adamw8bit")
    for package in ("bitsandbytes", "torchao", "bitsandbytes.optim", "torchao.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="optimizer adamw8bit on cpu needs a package: python -m pip install torchao; "
                                         "or --set optimizer=adamw"):
        Trainer(config, None, CPU)
    with pytest.raises(ValueError, match="python -m pip install bitsandbytes"):
        make_optimizer(config, build(TINY, CPU), torch.device("cuda"))


@pytest.mark.parametrize("device, package", [("cuda", "bitsandbytes"), ("cpu", "torchao")])
def test_the_8_bit_optimizer_of_a_package(monkeypatch, device, package):
    fake = types.ModuleType(f"{package}.optim")
    fake.AdamW8bit = lambda groups, lr, betas: torch.optim.AdamW(groups, lr=torch.tensor(lr), betas=betas)
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, f"{package}.optim", fake)
    optimizer = make_optimizer(replace(TINY, optimizer="adamw8bit"), build(TINY, CPU), torch.device(device))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [TINY.weight_decay, 0.0]
    lr = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is lr and lr == 0.25


def test_the_8_bit_optimizer_itself(tmp_path):
    pytest.importorskip("torchao")
    config = replace(TINY, optimizer="adamw8bit")
    trainer = Trainer(config, tmp_path, CPU)
    before = trainer.nets["model"].proj_out_2.weight.detach().clone()
    trainer.train_step()
    assert not torch.equal(before, trainer.nets["model"].proj_out_2.weight)
    assert float(trainer.optimizer.param_groups[0]["lr"]) == pytest.approx(learning_rate(config, 0))
    trainer.save()
    again = Trainer(config, tmp_path, CPU)
    assert again.train_step()["loss"] == trainer.train_step()["loss"]


# ---- throughput --------------------------------------------------------------------------------

@pytest.mark.parametrize("config",
                         [TINY.model, replace(TINY.model, constant_logstd=0.0, num_gaussians=1), GMMLPConfig(8, 32, 3)])
def test_flops_are_those_that_torch_counts(config):
    nets = build(replace(PRESETS["checkerboard"], model=config), CPU)
    shape = (3, 2) if isinstance(config, GMMLPConfig) else (3, config.in_channels, config.sample_size,
                                                            config.sample_size)
    with FlopCounterMode(display=False) as counter:
        nets["model"](torch.zeros(shape), torch.full((3,), 0.5), torch.zeros(3, dtype=torch.long))
    assert 3 * forward_flops(config) == counter.get_total_flops()


def test_speed_is_that_since_the_last_report(monkeypatch):
    speed = Speed(TINY, Team(CPU), 10, 5.0)
    assert speed.report(20, 7.0) == {"images_per_second": 10 * 4 / 2.0}
    assert speed.report(21, 7.5) == {"images_per_second": 8.0} and speed.report(21, 7.5) == {}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    cuda = Speed(replace(TINY, precision="bf16"), Team(torch.device("cuda"), 0, 2), 0, 0.0).report(10, 4.0)
    assert cuda == {"images_per_second": 10.0, "memory_gb": 3.0,
                    "mfu": pytest.approx(30 * forward_flops(TINY.model) / (2 * 989e12))}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert "mfu" not in Speed(replace(TINY, precision="bf16"), Team(torch.device("cuda")), 0, 0.0).report(10, 4.0)


def test_peaks_by_name():
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA A10G") == 70e12 and peak_flops("Quadro") is None
    assert peak_flops("NVIDIA RTX A4000") is None
    assert peak_flops("NVIDIA GH200 480GB") == peak_flops("NVIDIA H200") == 989e12


def test_the_published_model_is_as_large_as_published():
    """118.6 billion multiplications for DiT-XL/2 at 256x256 (Peebles & Xie 2023); the mixture's head adds little."""
    assert forward_flops(PRESETS["digits"].model.__class__()) / 2 == pytest.approx(118.6e9, rel=0.01)
    assert math.isclose(learning_rate(replace(TINY, warmup=10, lr_decay="constant"), 100), TINY.lr)
