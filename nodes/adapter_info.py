"""What the nodes know of a text-to-image model with a mixture adapter, without a host.

Shapes: B batch, C channels, H W space; D hidden size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from ..gmflow_core.adapter import PATCH, Adapter, Family, pack_channels, unpack_channels
from ..gmflow_core.schedule import TOTAL_SUBSTEPS

ATTACHMENT = "gmflow"   # a MODEL's attachment that holds its AdapterInfo


@dataclass(frozen=True)
class Seam:
    """The two last linear layers of a base, below its network: what the adapter replaces."""

    modulation: str   # silu(vec) -> modulation of the hidden state
    head: str         # modulated hidden state (B,L,D) -> the velocity's mean in tokens
    axes: int         # of the base's latent, behind batch and channels


FLUX_SEAM = Seam("final_layer.adaLN_modulation.1", "final_layer.linear", 2)
SEAMS = {"FLUX.1": FLUX_SEAM, "FLUX.2": FLUX_SEAM, "Qwen-Image": Seam("norm_out.linear", "proj_out", 3)}


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter says of the MODEL that it is applied to."""

    family: Family
    components: int
    width: int
    steps: int                 # as recommended for this file
    final_step: float = 0.5    # the last step's raw length over that of the others
    recipe: str = "piflow"     # of substeps and temperature
    total_substeps: int = TOTAL_SUBSTEPS  # of all steps together
    spectrum: None = None      # GM-SDE's noise is white

    @classmethod
    def of(cls, adapter: Adapter) -> AdapterInfo:
        return cls(adapter.family, adapter.heads.components, adapter.width, adapter.steps)

    def takes(self, steps: int) -> bool:
        """Whether it paints as well in that many steps as in its own."""
        return self.family.steps_vary or steps == self.steps

    @property
    def latent(self) -> tuple[int, int]:
        """The host's latents: their channels, and their axes behind batch and channels."""
        return self.family.channels * (PATCH**2 if self.family.packed else 1), SEAMS[self.family.name].axes

    def enter(self, x: Tensor) -> Tensor:
        """A latent of the host, (B,C,H,W), (B,C,1,H,W) or FLUX.2's (B,4C,H/2,W/2), as the mixture's (B,C,H,W)."""
        if x.ndim == 5:
            if x.shape[2] != 1:
                raise ValueError(f"latent: it has {x.shape[2]} frames or layers, and a mixture adapter paints one; "
                                 "make it with length 1 (EmptySD3LatentImage)")
            x = x.squeeze(2)
        return unpack_channels(x) if self.family.packed else x

    def leave(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`enter`."""
        if self.family.packed:
            return pack_channels(x)
        return x.unsqueeze(2) if self.latent[1] == 3 else x

    def time_shift(self, network) -> float:
        """The time shift of the host's network: the adapter's, or that of a ModelSampling patch."""
        half = float(network.model_sampling.percent_to_sigma(0.5))   # m / (m + 1)
        return half / (1 - half)


def check_adapter_vae(info: AdapterInfo, vae) -> None:
    """ValueError for a VAE that cannot decode what this model paints."""
    channels, axes = info.latent
    got, got_axes = getattr(vae, "latent_channels", channels), getattr(vae, "latent_dim", axes)
    if (got, got_axes) != (channels, axes) or getattr(vae, "output_channels", 3) != 3:
        raise ValueError(f"vae: this one decodes {got} channels on {got_axes} axes, "
                         f"and {info.family.name} paints {channels} on {axes}; "
                         f"connect {info.family.name}'s own VAE, or leave vae open for rough colours")


def rows_and_columns(family: Family, height: int, width: int) -> tuple[int, int]:
    """How many tokens a latent of this size has: one for each 2 x 2 pixels, or for each pixel of a packed latent."""
    return (height, width) if family.packed else (-(-height // PATCH), -(-width // PATCH))


# ---- names of LoRA modules: diffusers' to ComfyUI's ---------------------------------------------

# (diffusers' name, ComfyUI's, (first row, rows) of it in hidden sizes, or None for the whole layer)
_ATTENTION = [
    *((rf"transformer_blocks\.(\d+)\.attn\.to_{x}", r"double_blocks.\1.img_attn.qkv", (i, 1))
      for i, x in enumerate("qkv")),
    *((rf"transformer_blocks\.(\d+)\.attn\.add_{x}_proj", r"double_blocks.\1.txt_attn.qkv", (i, 1))
      for i, x in enumerate("qkv")),
    (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj", None),
    (r"transformer_blocks\.(\d+)\.attn\.to_add_out", r"double_blocks.\1.txt_attn.proj", None),
    (r"x_embedder", r"img_in", None),
    (r"context_embedder", r"txt_in", None),
]
_EMBEDDERS = [
    (rf"(?:time_text_embed|time_guidance_embed)\.{theirs}_embedder\.linear_{n}", rf"{ours}.{layer}", None)
    for theirs, ours in (("timestep", "time_in"), ("guidance", "guidance_in"), ("text", "vector_in"))
    for n, layer in ((1, "in_layer"), (2, "out_layer"))
]
_FLUX = [
    *_ATTENTION, *_EMBEDDERS,
    (r"transformer_blocks\.(\d+)\.ff\.net\.([02])(?:\.proj)?", r"double_blocks.\1.img_mlp.\2", None),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.([02])(?:\.proj)?", r"double_blocks.\1.txt_mlp.\2", None),
    (r"transformer_blocks\.(\d+)\.norm1\.linear", r"double_blocks.\1.img_mod.lin", None),
    (r"transformer_blocks\.(\d+)\.norm1_context\.linear", r"double_blocks.\1.txt_mod.lin", None),
    *((rf"single_transformer_blocks\.(\d+)\.attn\.to_{x}", r"single_blocks.\1.linear1", (i, 1))
      for i, x in enumerate("qkv")),
    (r"single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1", (3, 4)),
    (r"single_transformer_blocks\.(\d+)\.proj_out", r"single_blocks.\1.linear2", None),
    (r"single_transformer_blocks\.(\d+)\.norm\.linear", r"single_blocks.\1.modulation.lin", None),
]
_FLUX2 = [
    *_ATTENTION, *_EMBEDDERS,
    (r"transformer_blocks\.(\d+)\.ff\.linear_in", r"double_blocks.\1.img_mlp.0", None),
    (r"transformer_blocks\.(\d+)\.ff\.linear_out", r"double_blocks.\1.img_mlp.2", None),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0", None),
    (r"transformer_blocks\.(\d+)\.ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2", None),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1", None),
    (r"single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2", None),
    (r"((?:double_stream|single_stream)_modulation(?:_img|_txt)?)\.linear", r"\1.lin", None),
]
# Qwen-Image's names are diffusers' own.
_NAMES = {"FLUX.1": _FLUX, "FLUX.2": _FLUX2, "Qwen-Image": [(r"(.+)", r"\1", None)]}


def host_module(family: Family, module: str, width: int) -> tuple[str, tuple[int, int] | None] | None:
    """ComfyUI's name of a module of diffusers' name, and (first row, rows) of a part of it; None if it has none."""
    for theirs, ours, part in _NAMES[family.name]:
        found = re.fullmatch(theirs, module)
        if found:
            return found.expand(ours), None if part is None else (part[0] * width, part[1] * width)
    return None
