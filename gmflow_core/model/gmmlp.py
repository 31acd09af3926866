r"""GMMLP: the mixture network for 2D data, an MLP on sin-cos features of position and time (GMFlow, 2D experiments)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from ..mixture import GaussianMixture
from .gmdit import check_constant, pack_mixture, unpack_mixture
from .layers import timestep_features

FEATURES = 256
PERIODS = (5e-3, 50.0)  # of the position features, in data units


@dataclass(frozen=True)
class GMMLPConfig:
    num_gaussians: int = 64               # K
    width: int = 512
    num_layers: int = 5
    constant_logstd: float | None = None  # a fixed log_std in place of the learned one

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "constant_logstd":
                check_constant(value)
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name} must be a whole number >= 1, got {value!r}")

    @property
    def in_channels(self) -> int:
        return 2

    @property
    def num_classes(self) -> None:
        """There are none."""
        return None

    @property
    def sample_size(self) -> None:
        """Points have no size."""
        return None

    def to_dict(self) -> dict:
        return asdict(self)


def position_features(x: Tensor) -> Tensor:
    r"""[sin(2 pi x / p_i), cos(2 pi x / p_i)] for each coordinate, periods p_i log-spaced over PERIODS. (B,256)"""
    low, high = (math.log(p) for p in PERIODS)
    periods = torch.linspace(low, high, FEATURES // 4, dtype=torch.float64).exp().to(x)
    angles = x.unsqueeze(-1) * (2 * math.pi / periods)                          # (B,2,64)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class GMMLP(nn.Module):
    """x_t (B,2,*1), sigma (B,) -> packed velocity mixture (B, 3K+1, *1); ``labels`` is ignored."""

    def __init__(self, config: GMMLPConfig, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        k, width = config.num_gaussians, config.width
        layers: list[nn.Module] = []
        for i in range(config.num_layers):
            n_in = 2 * FEATURES if i == 0 else width
            layers += [operations.Linear(n_in, width, dtype=dtype, device=device), nn.SiLU()]
        self.net = nn.Sequential(*layers)
        self.out_means = operations.Linear(width, 2 * k, dtype=dtype, device=device)
        self.out_logweights = operations.Linear(width, k, dtype=dtype, device=device)
        if config.constant_logstd is None:
            self.out_logstds = operations.Linear(width, 1, dtype=dtype, device=device)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        time = timestep_features(sigma, FEATURES, frequency_shift=1.0)
        features = self.net(torch.cat([time.to(x), position_features(x.flatten(1))], dim=-1))
        if self.config.constant_logstd is None:
            log_std = self.out_logstds(features)
        else:
            log_std = torch.full_like(features[:, :1], self.config.constant_logstd)
        packed = pack_mixture(torch.cat([self.out_means(features), self.out_logweights(features)], dim=1), log_std)
        return packed.reshape(packed.shape + x.shape[2:])

    def mixture(self, packed: Tensor) -> GaussianMixture:
        """The velocity mixture in this network's output."""
        return unpack_mixture(packed, self.config.num_gaussians)

    @torch.no_grad()
    def init_weights(self) -> None:
        """He-normal; zero weights for the logits and log_std: equal weights, unit variance at first."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out_logweights.weight)
        if self.config.constant_logstd is None:
            nn.init.zeros_(self.out_logstds.weight)
