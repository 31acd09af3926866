"""What may go wrong in a long run: signals, kills, full disks, losses that are not finite, damaged files."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CPU, TINY, equal_states

import train.trainer as module
from gmflow_core import load_checkpoint
from train.__main__ import main, train
from train.stop import StopRequest
from train.trainer import CHECKPOINT, LOG, STATE, Trainer

ROOT = Path(__file__).parent.parent


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


# ---- signals -----------------------------------------------------------------------------------

@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138),
])
def test_a_signal_saves_and_the_run_goes_on_identically(tmp_path, monkeypatch, capsys, hangups, number, code):
    before = signal.getsignal(number)
    whole = Trainer(TINY, tmp_path / "whole", CPU)
    train(whole)
    trainer = Trainer(TINY, tmp_path / "cut", CPU)
    step = trainer.train_step

    def interrupted():
        if trainer.step == 3:
            os.kill(os.getpid(), number)
        return step()

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(trainer)
    assert stopped.value.code == code and trainer.step == 4  # the step that ran was finished
    assert "stopped at step 4, saved; run the same command to go on" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    again = Trainer(TINY, tmp_path / "cut", CPU)
    train(again)
    assert equal_states(whole, again)
    assert [line["step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]


def test_a_second_interrupt_stops_at_once():
    with StopRequest() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    with StopRequest() as stop:  # a second request to terminate is not more urgent
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    with StopRequest(patient=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


KILLED = """
import os, signal, sys, torch
import train.trainer as module
from pathlib import Path
sys.path.insert(0, "tests")
from test_train import CPU, TINY
trainer = module.Trainer(TINY, Path(sys.argv[1]), CPU)
trainer.train_step(); trainer.save()
trainer.train_step()
def half(state, path):
    with open(path, "wb") as file:
        file.write(b"PK" * 1000); file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
module._save = half
trainer.save(wait)
"""


@pytest.mark.parametrize("wait", ["", "wait=False"])
def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_one(tmp_path, wait):
    done = subprocess.run([sys.executable, "-c", KILLED.replace("(wait)", f"({wait})"), str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (remains,) = tmp_path.glob(f".{STATE}.*.tmp")
    assert (remains / "part").stat().st_size == 2000
    trainer = Trainer(TINY, tmp_path, CPU)
    assert trainer.step == 1 and load_checkpoint(tmp_path / CHECKPOINT).training["step"] == 1
    trainer.save()
    assert {p.name for p in tmp_path.iterdir()} == {STATE, CHECKPOINT}


# ---- disks -------------------------------------------------------------------------------------

def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["torch.save", "save_checkpoint"])
def test_a_full_disk_keeps_the_previous_files_and_says_so(tmp_path, monkeypatch, capsys, where):
    trainer = Trainer(TINY, tmp_path, CPU)
    step = trainer.train_step

    def fills_up():
        while trainer.writer.job is not None and not trainer.writer.job.done():
            time.sleep(0.01)
        if trainer.step == 3:
            monkeypatch.setattr(*((torch, "save") if where == "torch.save" else (module, where)), full)
        if trainer.step == 5:
            monkeypatch.setattr(torch, "save", save), monkeypatch.setattr(module, "save_checkpoint", save_checkpoint)
        return step()

    save, save_checkpoint = torch.save, module.save_checkpoint
    monkeypatch.setattr(trainer, "train_step", fills_up)
    trainer.config = replace(TINY, save_every=2)
    train(trainer)
    said = capsys.readouterr().err
    assert "a save failed: " in said and "No space left on device" in said
    assert "the previous file, if there was one, is kept" in said
    assert said.count("a save failed") == 1 and "training goes on" in said
    assert Trainer(TINY, tmp_path, CPU).step == 6 and not list(tmp_path.glob(".*.tmp"))


def test_a_last_save_that_fails_is_an_error(tmp_path, monkeypatch, capsys):
    small = ["train", "--preset", "digits", "--out", str(tmp_path / "run"), "--threads", "1"]
    for setting in ("batch_size=2", "model.num_layers=1", "steps=2", "save_every=1", "warmup=0", "precision=float32"):
        small += ["--set", setting]
    monkeypatch.setattr(sys, "argv", small)
    save, calls = torch.save, []
    monkeypatch.setattr(torch, "save", lambda *a: calls.append(1) or (save(*a) if len(calls) == 1 else full()))
    assert main() == 2
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'run' / STATE} could not be written ([Errno 28] No space left on device)" in said
    assert torch.load(tmp_path / "run" / STATE, weights_only=True)["step"] == 1


def test_what_torch_makes_of_a_real_full_disk(monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left"):
        module._save({"a": torch.zeros(100_000)}, "/dev/full")


def test_a_damaged_state_is_named(tmp_path):
    trainer = Trainer(TINY, tmp_path, CPU)
    trainer.save()
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{STATE}: damaged .*; --fresh begins again"):
        Trainer(TINY, tmp_path, CPU)


# ---- losses that are not finite ----------------------------------------------------------------

def spoil(trainer: Trainer, steps, value=float("nan")) -> None:
    """Put a NaN into one image of some steps' inputs."""
    inputs = trainer.inputs.function

    def spoilt(step):
        made = inputs(step)
        if step in steps:
            made.x_0[1, 0, 0, 0] = value
        return made

    trainer.inputs.function = spoilt


def test_a_bad_step_is_skipped_and_kept(tmp_path, capsys):
    trainer = Trainer(TINY, tmp_path, CPU)
    spoil(trainer, {2, 4})
    trainer.train_step(), trainer.train_step()
    before = {name: value.clone() for name, value in trainer.nets.state_dict().items()}
    numbers = trainer.train_step()
    assert numbers["step"] == 3 and numbers["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.nets.state_dict().items())
    trainer.log(numbers)
    line = lines(tmp_path)[-1]
    assert (line["step"], line["loss"], line["skipped"]) == (3, None, 1)
    for _ in range(3):
        trainer.train_step()
    assert trainer.skipped == 2 and trainer.skipped_in_a_row == 0 and trainer.step == 6
    assert all(value.isfinite().all() for value in trainer.nets.state_dict().values())
    said = capsys.readouterr().err
    assert "step 2 is skipped, not finite: loss nan" in said and "step 4 is skipped" in said
    assert [p.name for p in tmp_path.glob("nan_step_*")] == ["nan_step_2.pt"]  # the first, once
    kept = torch.load(tmp_path / "nan_step_2.pt", weights_only=True)
    assert kept["step"] == 2 and kept["x_0"].shape == (4, 3, 16, 16) and kept["x_0"].isnan().sum() == 1
    assert kept["labels"].shape == (4,) and len(kept["noises"]) == 2
    assert kept["loss"].isfinite().tolist() == [True, False, True, True]
    trainer.save()
    assert load_checkpoint(tmp_path / CHECKPOINT).training["skipped"] == 2
    assert Trainer(TINY, tmp_path, CPU).skipped == 2


def test_many_bad_steps_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    trainer = Trainer(replace(TINY, max_bad_steps=3, save_every=1, steps=9), tmp_path, CPU)
    spoil(trainer, {1, 3, 4, 5})
    with pytest.raises(FloatingPointError, match=r"not finite in 3 steps in a row, 3 to 5 \(loss nan.*Try a lower lr"):
        train(trainer)
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 5  # that of a finite network
    assert load_checkpoint(tmp_path / CHECKPOINT).training["step"] == 5


def test_a_gradient_that_is_not_finite_is_a_bad_step():
    trainer = Trainer(TINY, None, CPU)
    trainer.nets["model"].proj_out_2.weight.register_hook(lambda gradient: gradient * float("inf"))
    assert trainer.train_step()["skipped"] == 1


def test_weights_that_are_not_finite_end_the_run():
    trainer = Trainer(replace(TINY, max_bad_steps=2), None, CPU)
    trainer.nets["model"].proj_out_2.weight.data.fill_(float("nan"))
    trainer.train_step()
    with pytest.raises(FloatingPointError, match="in 2 steps in a row, 0 to 1"):
        trainer.train_step()


def test_an_error_of_the_data_reaches_the_caller():
    trainer = Trainer(TINY, None, CPU)
    trainer.inputs.function = lambda step: (_ for _ in ()).throw(ValueError("no such image"))
    with pytest.raises(ValueError, match="no such image"):
        trainer.train_step()
