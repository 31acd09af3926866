"""GM-DiT: recorded outputs, packing, hosts' layers, bad input."""

import math

import pytest
import torch
from recorded import assert_close, assert_same_mixture, load, mixture, small_config, small_network
from torch import nn

from gmflow_core import GMMLP, GMDiT, GMDiTConfig, GMMLPConfig, SpectrumConfig, SpectrumMLP
from gmflow_core.model import pack_mixture, unpack_mixture
from gmflow_core.model.layers import sdpa, sincos_positions, timestep_features

TIMES = ["t1000", "t731", "t250", "t1", "t0", "tmix"]
TINY = GMDiTConfig(
    num_classes=5, num_gaussians=3, in_channels=2, sample_size=4, num_layers=2, num_heads=2, head_dim=8, logstd_width=8
)


@pytest.fixture(scope="module")
def network():
    return small_network()


@pytest.fixture
def tiny():
    model = GMDiT(TINY)
    model.init_weights()
    return model


# ---- GM-DiT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", TIMES)
def test_recorded_outputs(network, time):
    r = load("model")
    got = network.mixture(network(r["x_t"], r[time + ".timestep"] / 1000, r["labels"]))
    assert_same_mixture(got, mixture(r, time + ".f32."), 2e-5)


def test_recorded_output_of_another_size(network):
    """12 x 12 on a network of 8 x 8: positions are stretched onto the trained grid."""
    r = load("model")
    got = network.mixture(network(r["resized.x_t"], r["resized.timestep"] / 1000, r["resized.labels"]))
    assert_same_mixture(got, mixture(r, "resized.f32."), 2e-5)


def test_recorded_output_in_float64():
    """1e-6: the sinusoids of time are float32 in both, of timesteps that differ by float32's rounding
    of 1000 (t/1000)."""
    r = load("model")
    network = small_network().double()
    packed = network(r["x_t"].double(), r["tmix.timestep"].double() / 1000, r["labels"])
    assert packed.dtype == torch.float64
    means, logits, log_std = packed.split([16, 4, 1], dim=1)
    assert_close(means.reshape(4, 4, 4, 8, 8), r["tmix.f64.means"], 1e-6)
    assert_close(logits.log_softmax(1).unsqueeze(2), r["tmix.f64.logweights"], 1e-6)
    assert_close(log_std[:, None, :, :1, :1], r["tmix.f64.logstds"], 1e-6)


def test_recorded_output_in_bf16():
    """bf16 has 8 bits: 3e-2 of the largest value."""
    r = load("model")
    network = small_network().bfloat16()
    packed = network(r["x_t"].bfloat16(), r["tmix.timestep"] / 1000, r["labels"])
    assert packed.dtype == torch.bfloat16
    got = network.mixture(packed)
    assert got.means.dtype == torch.float32
    assert_close(got.means, r["tmix.bf16.means"].float(), 3e-2)
    assert_close(got.log_weights, r["tmix.bf16.logweights"].float(), 3e-2)
    assert_close(got.log_std, r["tmix.bf16.logstds"].float(), 3e-2)


def test_recorded_activations(network):
    r = load("model")
    seen = {}
    modules = {
        "emb": network.emb, "block0.attn1": network.transformer_blocks[0].attn1,
        "block0": network.transformer_blocks[0], "block1": network.transformer_blocks[1],
    }
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, module in modules.items()
    ]
    network(r["x_t"], r["tmix.timestep"] / 1000, r["labels"])
    for hook in hooks:
        hook.remove()
    for name in modules:
        assert_close(seen[name], r[f"tmix.act.{name}"], 2e-5)


def test_recorded_time_features_and_positions():
    r = load("model")
    got = timestep_features(r["tmix.timestep"] / 1000)
    assert_close(got, r["tmix.act.emb.time_proj"], 1e-4)  # cos(1000 sigma) of a sigma rounded to float32
    assert_close(sincos_positions(32, 4, 4, 4), r["pos_embed_buffer"], 1e-6)


def test_positions_of_another_grid_are_stretched(rng):
    """Half as many tokens take every second position; the first half of the channels is the column."""
    full, half = sincos_positions(16, 4, 4, 4).reshape(4, 4, 16), sincos_positions(16, 2, 4, 4).reshape(2, 4, 16)
    torch.testing.assert_close(half, full[::2])
    assert torch.equal(full[0, :, :8], full[3, :, :8]) and torch.equal(full[:, 0, 8:], full[:, 3, 8:])


def test_timestep_features_by_hand():
    """Cosines first; frequencies 10000^(-i / (half - shift))."""
    for shift in (0.0, 1.0):
        got = timestep_features(torch.tensor([0.25]), 8, frequency_shift=shift)[0]
        angles = [250 * 10000 ** (-i / (4 - shift)) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-5)


def test_log_std_head_depends_on_time_and_label_alone_and_trains_no_embedding(tiny, rng):
    nn.init.normal_(tiny.gm_out.logstd_layers[-1].weight, generator=rng)
    sigma, labels = torch.tensor([0.3, 0.8]), torch.tensor([1, 5])
    a, b = (tiny.mixture(tiny(torch.randn(2, 2, 4, 4, generator=rng), sigma, labels)) for _ in range(2))
    assert torch.equal(a.log_std, b.log_std) and a.log_std[0] != a.log_std[1]
    a.log_std.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in tiny.emb.parameters())
    assert tiny.gm_out.logstd_layers[1].weight.grad.abs().sum() > 0


def test_a_constant_log_std():
    model = GMDiT(GMDiTConfig(**TINY.to_dict() | dict(constant_logstd=-1.5)))
    model.init_weights()
    assert not hasattr(model.gm_out, "logstd_layers")
    got = model.mixture(model(torch.zeros(1, 2, 4, 4), torch.tensor([0.5]), torch.tensor([0])))
    assert got.log_std.item() == -1.5


def test_fresh_weights(tiny, rng):
    """Blocks are the identity and log_std is 0, but components differ: K equal ones would stay equal."""
    tokens, embedding = torch.randn(2, 4, 16, generator=rng), torch.randn(2, 16, generator=rng)
    for block in tiny.transformer_blocks:
        assert torch.equal(block(tokens, embedding), tokens)
    m = tiny.mixture(tiny(torch.randn(2, 2, 4, 4, generator=rng), torch.tensor([0.3, 0.8]), torch.tensor([1, 5])))
    assert torch.equal(m.log_std, torch.zeros_like(m.log_std))
    for i in range(3):
        for j in range(i):
            assert (m.means[:, i] - m.means[:, j]).abs().mean() > 0.1
    m.log_prob(torch.zeros(2, 2, 4, 4)).sum().backward()
    rows = tiny.proj_out_2.weight.grad.reshape(4, 9, 16)[:, :6].reshape(4, 3, 2, 16)
    assert (rows[:, 0] - rows[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (1, 2, 5, 4), (1, 2, 4, 3)], ids=str)
def test_bad_inputs_are_refused(tiny, shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 2, H, W\).*multiples of 2"):
        tiny(torch.zeros(shape), torch.tensor([0.5]), torch.tensor([0]))


@pytest.mark.parametrize("bad", [
    dict(num_gaussians=0), dict(num_layers=1.5), dict(num_heads=True), dict(sample_size=5),
    dict(num_heads=1, head_dim=6), dict(constant_logstd="x"),
])
def test_bad_configs_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        GMDiTConfig(**TINY.to_dict() | bad)


# ---- two hosts -------------------------------------------------------------------------------------


class Host:
    """A host's operations: layers of its own that note what they were built with."""

    def __init__(self):
        self.built = built = []

        def layer(base):
            class Layer(base):
                def __init__(self, *args, dtype=None, device=None, **kwargs):
                    built.append((base.__name__, dtype, device))
                    super().__init__(*args, dtype=dtype, device=device, **kwargs)
            return Layer

        self.Linear, self.Conv2d, self.Embedding = layer(nn.Linear), layer(nn.Conv2d), layer(nn.Embedding)


def layers(model):
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding))]


@pytest.mark.parametrize("build", [
    lambda **kw: GMDiT(TINY, **kw), lambda **kw: GMMLP(GMMLPConfig(num_gaussians=2, width=8), **kw),
    lambda **kw: SpectrumMLP(SpectrumConfig((2, 4, 4), (8,)), **kw),
], ids=["GMDiT", "GMMLP", "SpectrumMLP"])
def test_every_layer_comes_from_the_hosts_operations(build):
    host = Host()
    model = build(operations=host, dtype=torch.bfloat16, device="meta")
    assert len(host.built) == len(layers(model)) >= 2
    assert {(dtype, device) for _, dtype, device in host.built} == {(torch.bfloat16, "meta")}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert list(model.state_dict()) == list(build().state_dict())


def test_the_hosts_attention_is_used():
    r, calls = load("model"), []

    def attention(q, k, v, heads):
        calls.append((q.shape, heads))
        return sdpa(q, k, v, heads)

    network = small_network(attention=attention)
    got = network.mixture(network(r["x_t"], r["tmix.timestep"] / 1000, r["labels"]))
    assert calls == [((4, 16, 32), 2)] * 2
    assert_same_mixture(got, mixture(r, "tmix.f32."), 2e-5)


def test_sdpa_by_hand(rng):
    q, k, v = torch.randn(3, 2, 5, 6, generator=rng)
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(3)).softmax(-1)
        torch.testing.assert_close(sdpa(q, k, v, 2)[..., part], weights @ v[..., part])


def test_parameters_are_those_of_the_published_files():
    published = load("ckpt_small/transformer/diffusion_pytorch_model")
    ours = GMDiT(small_config()).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in published.items()}


# ---- packing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [(), (5,), (4, 6)], ids=str)
def test_pack_and_unpack(rng, space):
    means = torch.randn(2, 3, 4, *space, generator=rng)
    logits = torch.randn(2, 3, *space, generator=rng)
    log_std = torch.randn(2, 1, generator=rng)
    packed = pack_mixture(torch.cat([means.flatten(1, 2), logits], dim=1), log_std)
    assert packed.shape == (2, 3 * 5 + 1, *space)
    got = unpack_mixture(packed, 3)
    assert torch.equal(got.means, means) and torch.equal(got.log_std.flatten(), log_std.flatten())
    torch.testing.assert_close(got.log_weights.squeeze(2), logits.log_softmax(1))
    assert unpack_mixture(packed.bfloat16(), 3).means.dtype == torch.float32


def test_unpack_refuses_another_count_of_channels():
    with pytest.raises(ValueError, match="17 channels do not hold a mixture of 3"):
        unpack_mixture(torch.zeros(1, 17, 2, 2), 3)
