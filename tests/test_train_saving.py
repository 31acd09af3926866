"""Saving while training goes on."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import CPU, TINY, equal_states, run

import train.trainer as module
from gmflow_core import load_checkpoint
from train.__main__ import train
from train.saving import Background, HostCopies
from train.trainer import CHECKPOINT, LOG, STATE, Trainer

ROOT = Path(__file__).parent.parent


class Gate:
    """Holds every write of ``state.pt`` until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.waiting, save = threading.Event(), threading.Event(), module._save

        def held(state, path):
            self.waiting.set()
            assert self.opened.wait(30)
            save(state, path)

        monkeypatch.setattr(module, "_save", held)


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """What is on disk in the end is the state of the step that was saved, in both files."""
    gate = Gate(monkeypatch)
    trainer = Trainer(TINY, tmp_path / "run", CPU)
    run(trainer, 2)
    trainer.save(wait=False)
    assert gate.waiting.wait(30)
    run(trainer, 5)
    trainer.run_log.history.append([5, 0.0])
    assert not (tmp_path / "run" / STATE).exists()
    gate.opened.set()
    trainer.writer.wait()
    same = Trainer(TINY, tmp_path / "same", CPU)
    run(same, 2)
    saved, checkpoint = Trainer(TINY, tmp_path / "run", CPU), load_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert saved.step == checkpoint.training["step"] == 2 and equal_states(saved, same)
    assert saved.run_log.history == same.run_log.history == checkpoint.training["log"]
    for name, value in same.ema["model"].state_dict().items():
        assert torch.equal(checkpoint.model.state_dict()[name], value)


def test_the_checkpoint_says_how_it_is_best_sampled(tmp_path):
    """A run goes on with other numbers: they are of no concern to what is learnt."""
    for shift in (3.0, 2.0):
        trainer = Trainer(replace(TINY, sampling_shift=shift, total_substeps=int(8 * shift)), tmp_path, CPU)
        run(trainer, trainer.step + 1)
        trainer.save()
        checkpoint = load_checkpoint(tmp_path / CHECKPOINT)
        assert (checkpoint.time_shift, checkpoint.total_substeps) == (shift, 8 * shift)


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    trainer = Trainer(TINY, tmp_path, CPU)
    run(trainer, 1)
    trainer.save(wait=False)
    run(trainer, 2)
    threading.Timer(0.5, gate.opened.set).start()
    trainer.save()
    assert trainer.save_seconds > 0.1  # for so long training stood still
    assert Trainer(TINY, tmp_path, CPU).step == 2


def test_a_failure_is_told_at_the_next_step(tmp_path, monkeypatch, capsys):
    trainer = Trainer(TINY, tmp_path, CPU)
    step, failed = trainer.train_step, threading.Event()

    def full(*_):
        failed.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def stepping():
        if trainer.step == 3:
            assert failed.wait(30)
            while not trainer.writer.job.done():
                pass
            monkeypatch.setattr(module, "_save", save)
        return step()

    save = module._save
    monkeypatch.setattr(module, "_save", full)
    monkeypatch.setattr(trainer, "train_step", stepping)
    said = []
    monkeypatch.setattr("train.console.say", lambda text: said.append((trainer.step, text)))
    train(trainer)
    ((when, text),) = said
    assert when == 4
    assert text.startswith(f"a save failed: {tmp_path / STATE} could not be written ([Errno 28] No space left")
    assert text.endswith("; training goes on") and Trainer(TINY, tmp_path, CPU).step == 6


def test_the_log_says_how_long_training_stood_still(tmp_path):
    train(Trainer(TINY, tmp_path, CPU))
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "save_seconds" in line] == [4]  # saved after 3; the last save has no line
    assert 0 < lines[3]["save_seconds"] < 5


STOPPED = """
import os, signal, sys, time
import train.trainer as module
from pathlib import Path
sys.path.insert(0, "tests")
from dataclasses import replace
from test_train import CPU, TINY
from train.__main__ import train
save = module._save
def slow(state, path):
    if state["step"] == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    save(state, path)
module._save = slow
train(module.Trainer(replace(TINY, save_every=2, steps=1_000_000), Path(sys.argv[1]), CPU))
"""


def test_a_signal_during_a_save_leaves_the_last_step_on_disk(tmp_path):
    done = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    said = int(done.stderr.split("stopped at step ")[1].split(",")[0])
    assert Trainer(replace(TINY, save_every=2, steps=1_000_000), tmp_path, CPU).step == said
    assert load_checkpoint(tmp_path / CHECKPOINT).training["step"] == said and not list(tmp_path.glob(".*.tmp"))


def test_buffers_are_made_once_and_hold_copies():
    copies, weight = HostCopies(CPU), torch.ones(3)
    first = copies.take({"a": [weight, {"b": (weight * 2, "text")}], "n": 1})
    assert first["a"][1]["b"][1] == "text" and first["n"] == 1 and len(copies.buffers) == 2
    weight += 1
    assert first["a"][0].tolist() == [1, 1, 1]
    second = copies.take({"a": [weight, {"b": (weight * 2, "text")}], "n": 1})
    assert second["a"][0] is first["a"][0] and second["a"][0].tolist() == [2, 2, 2]
    assert copies.take({"a": weight}, keep=False) == {"a": None}


def test_a_trainer_needs_sixteen_bytes_a_parameter(tmp_path):
    trainer = Trainer(TINY, tmp_path, CPU)
    trainer.train_step()
    trainer.reserve()
    made = dict(trainer.copies.buffers)
    parameters = sum(p.numel() for p in trainer.nets.parameters())
    assert sum(b.nbytes for b in made.values()) == pytest.approx(16 * parameters, rel=0.01)
    trainer.train_step(), trainer.save()
    assert trainer.copies.buffers.keys() == made.keys() and all(trainer.copies.buffers[k] is v for k, v in made.items())


def test_what_a_job_raises_is_raised_once():
    background = Background()
    background.check(), background.wait()
    background.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.wait()
    background.wait(), background.check()
