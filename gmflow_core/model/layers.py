r"""Building blocks of the networks, written once for two hosts.

Every layer comes from an ``operations`` namespace (torch.nn, or a host's own classes of the same
signatures) with ``dtype`` and ``device``; attention is a function (q, k, v, heads) of (B,N,D)
tensors. Parameter names are those of diffusers' DiT. No constructor initialises or reads a weight:
a host may fill them later. Shapes: B batch, N tokens, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The networks were trained on a clock of 1000 timesteps; this is the only place that knows it.
TIMESTEPS = 1000


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head, (B,N,D) -> (B,N,D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The same as :func:`sdpa` from two matrix products and a softmax."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5) @ k.mT
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def timestep_features(sigma: Tensor, width: int = 256, frequency_shift: float = 0.0) -> Tensor:
    r"""Sinusoids of t = 1000 sigma, cosines first: [cos(t f_i), sin(t f_i)], f_i = 10000^(-i / (width/2 - shift)).

    ``frequency_shift`` is 0 for the DiT and 1 for the 2D MLP. float32 whatever sigma is. (B,width)
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=sigma.device) / (half - frequency_shift)
    angles = TIMESTEPS * sigma.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(width: int, height: int, breadth: int, base: int, device=None) -> Tensor:
    r"""Fixed 2D sin-cos positions of a (height, breadth) token grid: (1,N,width) float32.

    The first half of the channels encodes the column, the second the row, each as
    [sin(p w_i), cos(p w_i)], w_i = 10000^(-i/(width/4)). A grid other than ``base`` x ``base`` is
    stretched onto it.
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def axis(n: int) -> Tensor:
        position = torch.arange(n, dtype=torch.float64) * (base / n)
        angles = position[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=-1)                  # (n, width/2)

    rows = axis(height)[:, None].expand(height, breadth, -1)
    columns = axis(breadth)[None].expand(height, breadth, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)[None].float().to(device)


class TimestepEmbedding(nn.Module):
    def __init__(self, features: int, width: int, operations, dtype=None, device=None):
        super().__init__()
        self.linear_1 = operations.Linear(features, width, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(width, width, dtype=dtype, device=device)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class LabelEmbedding(nn.Module):
    """A table of num_classes + 1 rows; the last is the null label."""

    def __init__(self, num_classes: int, width: int, operations, dtype=None, device=None):
        super().__init__()
        self.embedding_table = operations.Embedding(num_classes + 1, width, dtype=dtype, device=device)

    def forward(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        return self.embedding_table(labels).to(dtype)


class TimestepLabelEmbedding(nn.Module):
    """The conditioning embedding: MLP(sinusoid(t)) + table[label]. (B,D)"""

    def __init__(self, num_classes: int, width: int, operations, dtype=None, device=None):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, width, operations, dtype, device)
        self.class_embedder = LabelEmbedding(num_classes, width, operations, dtype, device)

    def forward(self, sigma: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        time = self.timestep_embedder(timestep_features(sigma).to(dtype))
        return time + self.class_embedder(labels, dtype)


class PatchEmbedding(nn.Module):
    """Non-overlapping p x p patches to tokens, plus positions."""

    def __init__(self, channels: int, width: int, patch: int, operations, dtype=None, device=None):
        super().__init__()
        self.proj = operations.Conv2d(channels, width, kernel_size=patch, stride=patch, dtype=dtype, device=device)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        return tokens + positions.to(tokens)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, with (B,D) shift and scale (DiT, adaLN)."""
    x = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class Modulation(nn.Module):
    """Linear(SiLU(embedding)) split into ``parts`` vectors of the width."""

    def __init__(self, width: int, parts: int, operations, dtype=None, device=None):
        super().__init__()
        self.parts = parts
        self.linear = operations.Linear(width, parts * width, dtype=dtype, device=device)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(embedding)).chunk(self.parts, dim=-1)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, attention, operations, dtype=None, device=None):
        super().__init__()
        self.heads, self.attention = heads, attention
        self.to_q, self.to_k, self.to_v = (
            operations.Linear(width, width, dtype=dtype, device=device) for _ in range(3)
        )
        self.to_out = nn.ModuleList([operations.Linear(width, width, dtype=dtype, device=device)])

    def forward(self, x: Tensor, **options) -> Tensor:
        """(B,N,D); ``options`` are for the attention function."""
        return self.to_out[0](self.attention(self.to_q(x), self.to_k(x), self.to_v(x), self.heads, **options))


class _GELU(nn.Module):
    def __init__(self, width: int, inner: int, operations, dtype=None, device=None):
        super().__init__()
        self.proj = operations.Linear(width, inner, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh-GELU, Linear; ``net.1`` stands for diffusers' dropout so that the names agree."""

    def __init__(self, width: int, operations, dtype=None, device=None):
        super().__init__()
        self.net = nn.ModuleList([
            _GELU(width, 4 * width, operations, dtype, device),
            nn.Identity(),
            operations.Linear(4 * width, width, dtype=dtype, device=device),
        ])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class DiTBlock(nn.Module):
    r"""x + gate MSA(modulate(x)), then x + gate MLP(modulate(x)): an adaLN-Zero block (Peebles & Xie 2023)."""

    def __init__(self, width: int, heads: int, attention, operations, dtype=None, device=None):
        super().__init__()
        self.norm1 = Modulation(width, 6, operations, dtype, device)
        self.attn1 = Attention(width, heads, attention, operations, dtype, device)
        self.ff = FeedForward(width, operations, dtype, device)

    def forward(self, x: Tensor, embedding: Tensor, **options) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.norm1(embedding)
        x = x + gate_a.unsqueeze(1) * self.attn1(modulate(x, shift_a, scale_a, eps=1e-6), **options)
        # 1e-5 here and 1e-6 above is what the published weights were trained with.
        return x + gate_f.unsqueeze(1) * self.ff(modulate(x, shift_f, scale_f, eps=1e-5))
