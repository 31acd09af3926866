"""The two small networks: SpectrumMLP, and GMMLP for 2D data."""

import math

import pytest
import torch
import torch.nn.functional as F
from recorded import assert_close, load, small_spectrum
from torch import nn

from gmflow_core import GMMLP, Gaussian, GMMLPConfig, SpectrumConfig, SpectrumMLP
from gmflow_core.model.gmmlp import position_features
from gmflow_core.model.layers import timestep_features
from gmflow_core.model.spectrum import crop_spectrum, normalize_power

# ---- SpectrumMLP -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["full", "crop66", "crop57", "iso"])
def test_recorded_spectra(case):
    r = load("model")
    got = small_spectrum()(Gaussian(r[f"spectrum.{case}.in.mean"], r[f"spectrum.{case}.in.var"]))
    assert_close(got, r[f"spectrum.{case}.log_var"], 2e-5)
    torch.testing.assert_close(got.exp().mean((2, 3)), torch.ones(got.shape[:2]))


def test_crop_keeps_low_frequencies_of_both_signs():
    """Frequencies of a smaller FFT, fftfreq(n) n, are the same numbers in the larger one's order."""
    frequency = torch.fft.fftfreq(8) * 8  # exact
    for n in (8, 7, 5, 4, 1):
        got = crop_spectrum(frequency.expand(1, 8, 8), (8, n))[0, 0]
        expected = (torch.fft.fftfreq(n) * n).round()
        assert torch.equal(got.abs(), expected.abs())
        got = crop_spectrum(frequency[:, None].expand(1, 8, 8), (n, 8))[0, :, 0]
        assert torch.equal(got.abs(), expected.abs())


def test_one_axis_alone_may_be_smaller():
    """Theirs asserts that both are; sampling wide images needs one."""
    got = small_spectrum()(Gaussian(torch.randn(2, 4, 6, 8), torch.ones(2, 1, 6, 8)))
    torch.testing.assert_close(got.exp().mean((2, 3)), torch.ones(2, 4))


def test_too_large_a_spectrum_is_refused():
    with pytest.raises(ValueError, match="sizes up to 8.*got 10.*spectrum=None"):
        small_spectrum()(Gaussian(torch.zeros(1, 4, 8, 10), torch.ones(1, 1, 8, 10)))


def test_fresh_spectrum_is_white(rng):
    spectrum = SpectrumMLP(SpectrumConfig((2, 4, 4), (8, 4)))
    spectrum.init_weights()
    got = spectrum(Gaussian(torch.randn(3, 2, 4, 4, generator=rng), torch.ones(3, 1, 4, 4)))
    torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-6)
    torch.testing.assert_close(normalize_power(got + 3), got, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [dict(base_size=(4, 8)), dict(base_size=(4, 0, 8)), dict(layers=(8.5,))])
def test_bad_spectrum_configs_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SpectrumConfig(**bad)


# ---- GMMLP -----------------------------------------------------------------------------------------


def test_position_features_by_hand():
    """64 sines then 64 cosines for each coordinate, periods from 0.005 to 50 evenly in their logarithm.
    2e-4: float32 rounds an angle of 1000 by 6e-5."""
    x = torch.tensor([[0.7, -0.3]])
    got = position_features(x)[0]
    expected = []
    for value in x[0].tolist():
        angles = [2 * math.pi * value / (5e-3 * 10 ** (4 * i / 63)) for i in range(64)]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-4)


@pytest.mark.parametrize("extra", [(), (1, 1)], ids=str)
def test_gmmlp_by_hand(rng, extra):
    model = GMMLP(GMMLPConfig(num_gaussians=3, width=16, num_layers=2))
    model.init_weights()
    nn.init.normal_(model.out_logstds.weight, generator=rng)
    nn.init.normal_(model.out_logweights.weight, generator=rng)
    x, sigma = torch.randn(5, 2, generator=rng), torch.rand(5, generator=rng)
    h = torch.cat([timestep_features(sigma, 256, frequency_shift=1.0), position_features(x)], dim=1)
    for layer in (model.net[0], model.net[2]):
        h = F.silu(layer(h))
    got = model.mixture(model(x.reshape(5, 2, *extra), sigma))
    assert got.means.shape == (5, 3, 2, *extra)
    torch.testing.assert_close(got.means.flatten(1), model.out_means(h))
    torch.testing.assert_close(got.log_weights.flatten(1), model.out_logweights(h).log_softmax(1))
    torch.testing.assert_close(got.log_std.flatten(1), model.out_logstds(h))


def test_fresh_gmmlp_has_equal_weights_unit_variance_and_distinct_means(rng):
    model = GMMLP(GMMLPConfig(num_gaussians=4, width=32))
    model.init_weights()
    m = model.mixture(model(torch.randn(6, 2, generator=rng), torch.rand(6, generator=rng)))
    torch.testing.assert_close(m.weights, torch.full_like(m.weights, 0.25))
    assert torch.equal(m.log_std, torch.zeros_like(m.log_std))
    assert (m.means[:, 0] - m.means[:, 1]).abs().mean() > 0.1


def test_gmmlp_with_a_constant_log_std_and_bad_configs():
    model = GMMLP(GMMLPConfig(num_gaussians=1, width=8, constant_logstd=0.5))
    model.init_weights()
    assert model.mixture(model(torch.zeros(2, 2), torch.ones(2))).log_std.flatten().tolist() == [0.5, 0.5]
    for bad in (dict(num_gaussians=0), dict(width=2.5)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GMMLPConfig(**bad)
