"""Devices that lack some of PyTorch's kernels: what they cannot do runs on the CPU, and nothing else changes."""

import pytest
import torch

from gmflow_core import GaussianMixture
from gmflow_core.portable import LACKING, portable
from gmflow_core.spectral import gaussian_to_mixture, hartley, mixture_to_gaussian


@pytest.fixture(autouse=True)
def nothing_tried():
    """The CPU of these tests plays the device that lacks something."""
    LACKING.clear()
    yield
    LACKING.clear()


def mixture(rng):
    means, logits = torch.randn(2, 5, 3, 4, 4, generator=rng), torch.randn(2, 5, 1, 4, 4, generator=rng)
    return GaussianMixture.from_logits(means, logits, torch.full((2, 1, 1, 1, 1), -1.0))


@pytest.mark.parametrize("place, name", [
    (torch.special, "erfc"), (torch.special, "ndtri"), (torch.special, "log_ndtr"), (torch.fft, "fftn"),
    (torch, "multinomial"),
])
def test_a_missing_kernel_is_computed_on_the_cpu(rng, monkeypatch, place, name):
    """An operation that fails where it is first asked, as on a device without it, and works after the move."""
    q = mixture(rng)
    z = torch.randn(2, 3, 4, 4, generator=rng)
    z[0, 0, 0] = 14.0  # so far out that the logarithmic tail is needed
    original, refused = getattr(place, name), []

    def results():
        x = gaussian_to_mixture(q, z)
        return x, mixture_to_gaussian(q, x + 30), hartley(z), q.sample(torch.Generator().manual_seed(1))

    expected = results()

    def fails_once(*args, **kwargs):
        if not refused:
            refused.append(name)
            raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for this device")
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, fails_once)
    for got, want in zip(results(), expected, strict=True):
        assert torch.equal(got, want)
    assert refused == [name]


def test_a_device_is_asked_once_and_other_errors_pass():
    calls = []

    @portable
    def act(x, how):
        calls.append(how)
        if how == "missing" and len(calls) == 1:
            raise NotImplementedError
        if how == "wrong":
            raise RuntimeError("wrong")
        return x + 1

    assert act(torch.ones(2), "missing").tolist() == [2, 2] and calls == ["missing"] * 2
    assert act(torch.ones(2), "missing").tolist() == [2, 2] and calls == ["missing"] * 3
    with pytest.raises(RuntimeError, match="wrong"):
        act(torch.ones(2), "wrong")
