"""GMDenoiser: labels, when guidance acts, and what it makes of the network's output."""

import pytest
import torch
from recorded import assert_same_mixture, small_network
from torch import nn

from gmflow_core import GMMLP, GMDenoiser, GMMLPConfig, guide_cfg, guide_probabilistic, velocity_to_posterior

NULL = 10


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture
def x(rng):
    return torch.randn(2, 4, 8, 8, generator=rng)


def posterior(network, x, sigma, labels):
    """q(x_0 | x_t) of the network, asked directly."""
    sigmas = torch.full((x.shape[0],), sigma)
    return velocity_to_posterior(network.mixture(network(x, sigmas, torch.tensor(labels))), x, sigma)


class Counting(nn.Module):
    """The network, noting what it was asked."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config, self.mixture, self.asked = network, network.config, network.mixture, []

    def forward(self, x, sigma, labels):
        self.asked.append((x.shape[0], sigma.tolist(), labels.tolist()))
        return self.network(x, sigma, labels)


def test_without_guidance_the_network_is_asked_once(network, x):
    model = Counting(network)
    got = GMDenoiser(model, torch.tensor([3, 7]))(x, 0.5)
    assert model.asked == [(2, [0.5, 0.5], [3, 7])]
    assert got.posterior is got.base and got.bias is None
    assert_same_mixture(got.posterior, posterior(network, x, 0.5, [3, 7]), 1e-6)


def test_no_labels_are_the_null_label_and_need_no_guidance(network, x):
    model = Counting(network)
    got = GMDenoiser(model, None, guidance=0.4)(x, 0.5)
    assert model.asked == [(2, [0.5, 0.5], [NULL, NULL])]
    assert_same_mixture(got.posterior, posterior(network, x, 0.5, [NULL, NULL]), 1e-6)


@pytest.mark.parametrize("method, scale", [("probabilistic", 0.45), ("cfg", 3.0)])
def test_guidance_asks_for_both_and_does_not_mix_them_up(network, x, method, scale):
    got = GMDenoiser(network, torch.tensor([3, 7]), scale, 0.5, method=method)(x, 0.8).posterior
    cond, uncond = posterior(network, x, 0.8, [3, 7]), posterior(network, x, 0.8, [NULL, NULL])
    if method == "probabilistic":
        guided = guide_probabilistic(cond, uncond, scale, 0.5)
    else:
        guided = guide_cfg(cond, uncond, scale)
    assert_same_mixture(got, guided.posterior, 1e-5)


@pytest.mark.parametrize("method, scale", [("probabilistic", 0.0), ("cfg", 0.0), ("cfg", 1.0)])
def test_scales_that_mean_none(network, x, method, scale):
    model = Counting(network)
    GMDenoiser(model, torch.tensor([3, 7]), scale, method=method)(x, 0.5)
    assert model.asked[0][0] == 2


@pytest.mark.parametrize("sigma, calls", [(0.95, 2), (0.9, 4), (0.6, 4), (0.3, 4), (0.29, 2)])
def test_interval(network, x, sigma, calls):
    """Ends included; outside it the network is asked for the conditional alone."""
    model = Counting(network)
    GMDenoiser(model, torch.tensor([3, 7]), 0.3, interval=(0.9, 0.3))(x, sigma)
    assert [asked[0] for asked in model.asked] == [calls]


def test_a_bf16_network_answers_in_float32(x):
    """Mixtures are float32 whatever the network is: bf16 weights sum to one within 3e-3 only."""
    network = small_network().bfloat16()
    got = GMDenoiser(network, torch.tensor([3, 7]), 0.45)(x, 0.7).posterior
    assert got.means.dtype == got.log_weights.dtype == got.log_std.dtype == torch.float32
    torch.testing.assert_close(got.weights.sum(1), torch.ones(2, 1, 8, 8))


def test_the_2d_network_takes_no_labels(rng):
    network = GMMLP(GMMLPConfig(num_gaussians=3, width=16))
    network.init_weights()
    x = torch.randn(5, 2, generator=rng)
    got = GMDenoiser(network, guidance=0.3)(x, 0.5).posterior
    assert got.means.shape == (5, 3, 2)
    with pytest.raises(ValueError, match="no classes"):
        GMDenoiser(network, torch.tensor([1]))


@pytest.mark.parametrize("labels, word", [([3, 11], "11"), ([-1, 2], "-1"), ([[3], [7]], r"\(2, 1\)")])
def test_bad_labels_are_refused(network, labels, word):
    with pytest.raises(ValueError, match=f"labels must be.*0 to 9.*{word}"):
        GMDenoiser(network, torch.tensor(labels))


def test_one_label_per_image(network, x):
    with pytest.raises(ValueError, match="3 labels for a batch of 2"):
        GMDenoiser(network, torch.tensor([1, 2, 3]))(x, 0.5)


@pytest.mark.parametrize("kwargs, word", [
    (dict(guidance=1.0), "not a CFG scale"), (dict(guidance=-0.1), "guidance"), (dict(orthogonal=2.0), "orthogonal"),
    (dict(method="vanilla"), "method"), (dict(method="cfg", guidance=0.5), "CFG scale"),
    (dict(interval=(0.3, 0.9)), "interval"), (dict(interval=(1.5, 0.0)), "interval"),
    (dict(interval=(1.0, -0.1)), "interval"),
])
def test_bad_settings_are_refused(network, kwargs, word):
    with pytest.raises(ValueError, match=word):
        GMDenoiser(network, torch.tensor([3]), **kwargs)
