"""Shared fixtures. Every random number of the suite comes from a seeded generator."""

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20250504)


@pytest.fixture
def hangups():
    """SIGHUP as it usually is: under nohup it is ignored, by this process and the children that it starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
