"""TensorBoard, where it is installed."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from test_train import CPU, TINY

from train.__main__ import train
from train.runlog import BOARD
from train.trainer import Trainer


class Writer:
    """In TensorBoard's place."""

    made = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.images, self.closed = folder, purge_step, [], [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, image, step, dataformats):
        self.images.append((name, image.shape, step, dataformats))

    def close(self):
        self.closed = True


@pytest.fixture
def writer(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    return Writer


def test_scalars_and_samples(tmp_path, writer):
    train(Trainer(replace(TINY, steps=3, save_every=2, tensorboard=True), tmp_path, CPU))
    (board,) = writer.made
    assert board.folder == str(tmp_path / BOARD) and board.purge_step == 1 and board.closed
    assert ({"loss", "loss_smooth", "spectral", "entropy", "components", "grad_norm", "lr", "images_per_second"}
            <= {s[0] for s in board.scalars})
    assert {s[2] for s in board.scalars} == {1, 2, 3} and all(np.isfinite(s[1]) for s in board.scalars)
    ((name, shape, step, order),) = board.images
    assert (name, shape[2], step, order) == ("samples", 3, 3, "HWC")


def test_a_resumed_run_hides_what_is_lost(tmp_path, writer):
    config = replace(TINY, tensorboard=True)
    first = Trainer(config, tmp_path, CPU)
    for _ in range(5):
        first.log(first.train_step())
        if first.step == 3:
            first.save()
    train(Trainer(config, tmp_path, CPU))
    assert [board.purge_step for board in writer.made] == [1, 4]


def test_it_can_be_switched_off_and_be_absent(tmp_path, writer, monkeypatch):
    trainer = Trainer(replace(TINY, tensorboard=False), tmp_path / "off", CPU)
    trainer.log(trainer.train_step())
    assert writer.made == []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(Trainer(replace(TINY, tensorboard=True), tmp_path / "absent", CPU))
    assert not (tmp_path / "absent" / BOARD).exists()


def test_with_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Trainer(replace(TINY, tensorboard=True), tmp_path, CPU))
    events = EventAccumulator(str(tmp_path / BOARD))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert events.Images("samples")[0].height > 100
