r"""GM-DiT: a diffusion transformer whose last layer speaks of mixtures (GMFlow, network)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixture import GaussianMixture
from .layers import DiTBlock, PatchEmbedding, TimestepLabelEmbedding, modulate, sdpa, sincos_positions

MAX_TOKENS = 65_536  # 256 x 256 patches: a config that asks for more is a mistake, and would hold up a machine
LOG_STD_LIMIT = 20   # exp(2 x 20) is still a float32


def check_constant(log_std) -> None:
    """ValueError unless a fixed log_std is absent or a number of that range."""
    number = isinstance(log_std, (int, float)) and not isinstance(log_std, bool)
    if log_std is not None and not (number and abs(log_std) <= LOG_STD_LIMIT):  # "not <=" catches NaN
        raise ValueError(
            f"constant_logstd must be null or a number in [-{LOG_STD_LIMIT}, {LOG_STD_LIMIT}], got {log_std!r:.100}"
        )


@dataclass(frozen=True)
class GMDiTConfig:
    """Everything that fixes the shapes of a GM-DiT. The defaults are the published ImageNet model."""

    num_classes: int = 1000
    num_gaussians: int = 8              # K
    in_channels: int = 4                # C
    sample_size: int = 32               # H = W of the training latents
    patch_size: int = 2
    num_layers: int = 28
    num_heads: int = 16
    head_dim: int = 72
    logstd_width: int = 1024
    constant_logstd: float | None = None  # a fixed log_std in place of the learned one

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "constant_logstd":
                check_constant(value)
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name} must be a whole number >= 1, got {value!r}")
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size {self.sample_size} is not a multiple of patch_size {self.patch_size}")
        tokens = (self.sample_size // self.patch_size) ** 2
        if tokens > MAX_TOKENS:
            raise ValueError(f"sample_size {self.sample_size} in patches of {self.patch_size} makes {tokens} tokens, "
                             f"at most {MAX_TOKENS}")
        if self.width % 4:
            raise ValueError(f"num_heads * head_dim must be a multiple of 4, got {self.width}")

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def null_label(self) -> int:
        return self.num_classes

    def to_dict(self) -> dict:
        return asdict(self)


def packed_channels(num_gaussians: int, channels: int) -> int:
    """Channels of a packed mixture: K C means, K logits, one log_std."""
    return num_gaussians * (channels + 1) + 1


def pack_mixture(means_and_logits: Tensor, log_std: Tensor) -> Tensor:
    """(B, K(C+1), *S) and log_std (B,1) to one tensor (B, K(C+1)+1, *S), as hosts that pass tensors need."""
    log_std = log_std.reshape(-1, *(1,) * (means_and_logits.ndim - 1))
    return torch.cat([means_and_logits, log_std.expand_as(means_and_logits[:, :1])], dim=1)


def unpack_mixture(packed: Tensor, num_gaussians: int) -> GaussianMixture:
    """The mixture in a packed tensor (B, K(C+1)+1, *S), in float32: bf16 weights would not sum to one."""
    packed = packed.float()
    b, total, *space = packed.shape
    channels = (total - 1) // num_gaussians - 1
    if packed_channels(num_gaussians, channels) != total:
        raise ValueError(f"{total} channels do not hold a mixture of {num_gaussians} components")
    means, logits, log_std = packed.split([num_gaussians * channels, num_gaussians, 1], dim=1)
    for axis in range(2, packed.ndim):
        log_std = log_std.narrow(axis, 0, 1)  # one value per sample, broadcast by pack_mixture
    return GaussianMixture.from_logits(
        means.reshape(b, num_gaussians, channels, *space), logits.unsqueeze(2), log_std.unsqueeze(1)
    )


class GMOutput(nn.Module):
    """log_std of the velocity from the *detached* conditioning embedding: a function of (t, label) alone."""

    def __init__(self, config: GMDiTConfig, operations, dtype=None, device=None):
        super().__init__()
        self.constant = config.constant_logstd
        if self.constant is None:
            self.logstd_layers = nn.ModuleList([
                nn.SiLU(),
                operations.Linear(config.width, config.logstd_width, dtype=dtype, device=device),
                nn.SiLU(),
                operations.Linear(config.logstd_width, 1, dtype=dtype, device=device),
            ])

    def forward(self, embedding: Tensor) -> Tensor:
        if self.constant is not None:
            return torch.full_like(embedding[:, :1], self.constant)
        x = embedding.detach()
        for layer in self.logstd_layers:
            x = layer(x)
        return x                                                                # (B,1)


class GMDiT(nn.Module):
    """x_t (B,C,H,W), sigma (B,), labels (B,) int64 -> packed velocity mixture (B, K(C+1)+1, H, W).

    Further keyword arguments of ``forward`` go to the attention function.
    """

    def __init__(self, config: GMDiTConfig, *, operations=nn, attention=sdpa, dtype=None, device=None):
        super().__init__()
        self.config = config
        width, k, c, p = config.width, config.num_gaussians, config.in_channels, config.patch_size
        build = (operations, dtype, device)
        self.pos_embed = PatchEmbedding(c, width, p, *build)
        self.emb = TimestepLabelEmbedding(config.num_classes, width, *build)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(width, config.num_heads, attention, *build) for _ in range(config.num_layers)
        )
        self.proj_out_1 = operations.Linear(width, 2 * width, dtype=dtype, device=device)
        self.proj_out_2 = operations.Linear(width, p * p * k * (c + 1), dtype=dtype, device=device)
        self.gm_out = GMOutput(config, *build)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor, **options) -> Tensor:
        config = self.config
        p = config.patch_size
        height, breadth = x.shape[-2] // p, x.shape[-1] // p
        if (height * p, breadth * p) != tuple(x.shape[-2:]) or x.shape[1] != config.in_channels:
            raise ValueError(
                f"x must be (B, {config.in_channels}, H, W) with H and W multiples of {p}, got {tuple(x.shape)}"
            )
        embedding = self.emb(sigma, labels, x.dtype)                            # (B,D)
        tokens = self.pos_embed(x, self.positions(height, breadth, x.device))   # (B,N,D)
        for block in self.transformer_blocks:
            tokens = block(tokens, embedding, **options)
        shift, scale = self.proj_out_1(F.silu(embedding)).chunk(2, dim=-1)
        tokens = self.proj_out_2(modulate(tokens, shift, scale, eps=1e-6))      # (B,N,p p K(C+1))
        grid = tokens.unflatten(1, (height, breadth)).unflatten(-1, (p, p, -1))
        image = grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)         # (B,K(C+1),H,W)
        return pack_mixture(image, self.gm_out(embedding).to(image.dtype))

    def positions(self, height: int, breadth: int, device) -> Tensor:
        config = self.config
        return sincos_positions(config.width, height, breadth, config.sample_size // config.patch_size, device)

    def mixture(self, packed: Tensor) -> GaussianMixture:
        """The velocity mixture in this network's output."""
        return unpack_mixture(packed, self.config.num_gaussians)

    @torch.no_grad()
    def init_weights(self) -> None:
        """DiT's initialisation: Xavier, zero modulation (so that blocks start as the identity), zero log_std.

        The output layer is *not* zero: K equal components would get equal gradients for ever.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.pos_embed.proj.bias)
        zero = [self.proj_out_1] + [block.norm1.linear for block in self.modules() if isinstance(block, DiTBlock)]
        if self.config.constant_logstd is None:
            zero.append(self.gm_out.logstd_layers[-1])
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
