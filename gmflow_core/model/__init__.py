"""The networks, and nothing but networks."""

from .gmdit import GMDiT, GMDiTConfig, pack_mixture, unpack_mixture
from .gmmlp import GMMLP, GMMLPConfig
from .spectrum import SpectrumConfig, SpectrumMLP

__all__ = [
    "GMDiT", "GMDiTConfig", "GMMLP", "GMMLPConfig", "SpectrumConfig", "SpectrumMLP", "pack_mixture", "unpack_mixture",
]
