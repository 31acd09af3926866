r"""Gaussian-mixture adapters of text-to-image transformers (pi-Flow, arXiv 2510.14974): their files and their heads.

An adapter is one ``.safetensors`` in diffusers' module names: LoRA pairs, a replacement of the last modulation
(``norm_out.linear``) and three heads that read a mixture over the flow velocity where the base reads its mean.
What it is lies in its keys and shapes; every fault raises CheckpointError in one line. Nothing is built here:
:class:`MixtureHeads` are functions of the base's last hidden state and of its conditioning vector.

Shapes: B batch, K components, C channels, L = h w tokens of p x p pixels, D hidden size, r rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .checkpoint import check_finite
from .files import CheckpointError, State, is_safetensors, looks_like, one_line, read_head, read_safetensors
from .foreign import is_dit, recognise
from .model import pack_mixture

PATCH = 2     # a token is 2 x 2 pixels of the space that the mixture lives in, in all families
SHIFT = 3.2   # the time shift that all published adapters were trained and sample with
LORA = r"(.+)\.lora_([AB])\.weight"


@dataclass(frozen=True)
class Family:
    """A base that adapters exist for. ``modules`` matches the LoRA modules that only this family has."""

    name: str
    channels: int            # C
    modules: str             # a pattern of names that only this family's adapters have
    guidance: float | None   # the only value of the guidance embedding that its adapters know, None: it has none
    packed: bool = False     # its latents hold p x p pixels in their channels: (C p p, H, W) for (C, p H, p W)
    steps_vary: bool = True  # an adapter is as good at other numbers of steps than its own
    scale_first: bool = False  # its own last modulation is (scale, shift), as in the files, and not (shift, scale)


FAMILIES = (
    Family("FLUX.1", 16, (
        r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)|transformer_blocks\.\d+\.ff(_context)?\.net\."
        r"|time_text_embed\.(guidance|text)_embedder\."), 3.5, steps_vary=False),
    Family("Qwen-Image", 16, r"transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\.", None, scale_first=True),
    Family("FLUX.2", 32, (
        r"transformer_blocks\.\d+\.ff(_context)?\.linear_|single_transformer_blocks\.\d+\.attn\.to_(qkv_mlp_proj|out)$"
        r"|time_guidance_embed\.|(double|single)_stream_modulation"), 4.0, packed=True),
)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer's tensors: y = W x + b."""

    weight: Tensor        # (out, in)
    bias: Tensor | None   # (out,)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def to(self, *args, **kwargs) -> Linear:
        return Linear(self.weight.to(*args, **kwargs), None if self.bias is None else self.bias.to(*args, **kwargs))


@dataclass(frozen=True, eq=False)
class MixtureHeads:
    """The three heads. ``log_stds``: one layer, or two with a SiLU between them."""

    means: Linear                  # D -> K C p p, the component slowest, then channel, row and column of the patch
    log_weights: Linear            # D -> K p p
    log_stds: tuple[Linear, ...]   # D -> 1

    @property
    def components(self) -> int:
        return self.log_weights.weight.shape[0] // PATCH**2

    def to(self, *args, **kwargs) -> MixtureHeads:
        log_stds = tuple(layer.to(*args, **kwargs) for layer in self.log_stds)
        return MixtureHeads(self.means.to(*args, **kwargs), self.log_weights.to(*args, **kwargs), log_stds)

    def tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity means (B,L,K,C,p p) and normalised log weights (B,L,K,1,p p) of the modulated hidden state
        (B,L,D)."""
        shape = hidden.shape[:-1] + (self.components, -1, PATCH**2)
        return self.means(hidden).reshape(shape), self.log_weights(hidden).reshape(shape).log_softmax(dim=-3)

    def log_std(self, activation: Tensor) -> Tensor:
        """log_std (B,) of the velocity from silu(vec) (B,D): vec is the vector that drives the last modulation."""
        first, *rest = self.log_stds
        x = first(activation)
        for layer in rest:
            x = layer(F.silu(x))
        return x.flatten()


def mean_tokens(means: Tensor, log_weights: Tensor) -> Tensor:
    r"""m = sum_k w_k mean_k as the base's output tokens (B,L,C p p), from :meth:`MixtureHeads.tokens`."""
    return (log_weights.exp() * means).sum(-3).flatten(-2)


def pack_tokens(means: Tensor, log_weights: Tensor, log_std: Tensor, rows: int, columns: int) -> Tensor:
    """:meth:`MixtureHeads.tokens` of ``rows`` x ``columns`` tokens as the packed mixture (B, K(C+1)+1, p h, p w).

    log_std is (B,); :func:`gmflow_core.model.unpack_mixture` reads the result.
    """
    tokens = torch.cat([means.flatten(2), log_weights.flatten(2)], dim=2)                 # (B,L,K (C+1) p p)
    maps = tokens.transpose(1, 2).unflatten(2, (rows, columns))
    return pack_mixture(F.pixel_shuffle(maps, PATCH), log_std)


def unpack_channels(x: Tensor) -> Tensor:
    """(B, C p p, H, W), FLUX.2's latent, to (B, C, p H, p W), the space of its mixture:
    channel (c p + row) p + column."""
    return F.pixel_shuffle(x, PATCH)


def pack_channels(x: Tensor) -> Tensor:
    """The inverse of :func:`unpack_channels`."""
    return F.pixel_unshuffle(x, PATCH)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter's content, checked: tensors in the file's dtype, in memory."""

    path: Path
    family: Family
    heads: MixtureHeads
    modulation: Linear                        # D -> 2 D, silu(vec) -> (scale, shift): replaces the base's last one
    lora: dict[str, tuple[Tensor, Tensor]]    # diffusers' module name -> A (r, in), B (out, r); the update is B A

    @property
    def width(self) -> int:
        """D."""
        return self.modulation.weight.shape[1]

    @property
    def steps(self) -> int:
        """The number of steps that the file's name recommends (``..._8step``), else 4."""
        found = re.search(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])", self.path.stem.lower())
        return max(1, int(found[1])) if found else 4

    def __str__(self) -> str:
        ranks = sorted({a.shape[0] for a, _ in self.lora.values()})
        return (f"{self.family.name} adapter, K = {self.heads.components}, C = {self.family.channels}, hidden size "
                f"{self.width}, {len(self.lora)} LoRA modules of rank {', '.join(map(str, ranks))}")


# ---- reading -----------------------------------------------------------------------------------

def load_adapter(path) -> Adapter:
    """Read an adapter; CheckpointError for every other file, in one line that says what it is."""
    path = Path(path)
    if not is_safetensors(path):
        raise CheckpointError(f"{path}: not an adapter: it looks like {looks_like(read_head(path))}; "
                              "adapters are .safetensors files")
    state, metadata = read_safetensors(path)
    state = {key.removeprefix("transformer."): value for key, value in state.items()}
    _check_kind(state, metadata, path)
    for key, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: {key} is {value.dtype}; only floating-point weights are supported")
        if not value.numel():
            raise CheckpointError(f"{path}: {key} is empty, {tuple(value.shape)}; the file is damaged")
    check_finite(state, path)
    # Copies: a tensor that stays mapped to the file dies with it when the file is replaced.
    return parse_adapter({key: value.clone() for key, value in state.items()}, path)


def parse_adapter(state: State, path: Path) -> Adapter:
    """The adapter in tensors without a prefix; CheckpointError if one is missing, left over or does not fit."""
    lora, layers = _split(state, path)
    family = _family(lora, path)
    heads, modulation = _heads(layers, family, path)
    return Adapter(path, family, heads, modulation, lora)


_WHOLE = ("double_blocks.", "img_in.", "x_embedder.", "transformer_blocks.0.attn.to_q.weight", "model.diffusion_model.")
_CONTROL = ("controlnet_", "control_model.", "controlnet.", "control_blocks.")
_PATCH = r"lora_(A|B|up|down)\b|\.(lokr|hada|oft|lora)_|\.diff(_b)?$|\.set_weight$"


def _check_kind(state: State, metadata: dict[str, str], path: Path) -> None:
    """CheckpointError that names what the file is, if it is no adapter with mixture heads."""
    what = _foreign(state, metadata, path)
    if what is not None:
        raise CheckpointError(f"{path}: {what}; GMFlow Apply Adapter takes the gmflux, "
                              "gmqwen and gmflux2 files of pi-Flow")


def _foreign(state: State, metadata: dict[str, str], path: Path) -> str | None:
    if "gmflow" in metadata or is_dit(state):
        return "a whole GMFlow model and no adapter: load it with GMFlow Loader"
    if "proj_buffer" in state or "scale_buffer" in state:
        return "an AsymFlow adapter, which paints pixels and predicts no mixture"
    kind = _policy(metadata, path)
    if kind == "DX" or (kind is None and "proj_out_means.weight" not in state and "proj_out.weight" in state
                        and any(re.fullmatch(LORA, key) for key in state)):
        return "proj_out_means is missing: a DX adapter, which predicts no mixture"
    if kind not in (None, "GMFlow"):
        return f"its policy_config names the type {kind!r}, and only GMFlow is a mixture"
    if any(key.startswith(_CONTROL) for key in state):
        return "a ControlNet"
    if any(key.startswith(_WHOLE) and not re.search(_PATCH, key) for key in state):
        return "a whole model and no adapter: it belongs into the diffusion_models folder"
    if "proj_out_means.weight" in state:
        return None
    if any(re.search(_PATCH, key) for key in state):
        return "proj_out_means is missing: an ordinary LoRA, for Load LoRA"
    return "proj_out_means is missing: " + recognise(state)


def _policy(metadata: dict[str, str], path: Path):
    """The type in the metadata's policy_config; None if there is none."""
    if "policy_config" not in metadata:
        return None
    try:
        return json.loads(metadata["policy_config"])["type"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: "
                              f"its metadata policy_config names no type ({type(error).__name__}: {one_line(error)}); "
                              'an adapter has {"type": "GMFlow"}') from error


def _split(state: State, path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], State]:
    """The LoRA pairs by module, and all other tensors; CheckpointError for a pair that is none."""
    halves: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in state.items():
        found = re.fullmatch(LORA, key)
        if found:
            halves.setdefault(found[1], {})[found[2]] = value
        elif re.search(_PATCH, key) or key.endswith(".alpha"):
            raise CheckpointError(f"{path}: {key} is a LoRA key of another layout; "
                                  "an adapter has MODULE.lora_A.weight and MODULE.lora_B.weight alone")
        else:
            rest[key] = value
    pairs = {}
    for module, pair in halves.items():
        if len(pair) < 2:
            raise CheckpointError(f"{path}: "
                                  f"{module}.lora_{'B' if 'A' in pair else 'A'}.weight is missing beside its partner")
        a, b = pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(f"{path}: {module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} "
                                  "are no pair (rank, in), (out, rank)")
        pairs[module] = a, b
    return pairs, rest


def _family(modules: Iterable[str], path: Path) -> Family:
    """The base whose modules these are; CheckpointError for none, or for several."""
    modules = list(modules)
    found = [family for family in FAMILIES if any(re.match(family.modules, module) for module in modules)]
    if len(found) != 1:
        names = " and ".join(family.name for family in found)
        what = f"its LoRA modules are those of {names} at once" if found else (
            f"its LoRA modules ({', '.join(modules[:3])}) are those of no base that is known" if modules
            else "it has no LoRA pairs")
        raise CheckpointError(f"{path}: {what}; adapters exist for {', '.join(family.name for family in FAMILIES)}")
    return found[0]


def _heads(layers: State, family: Family, path: Path) -> tuple[MixtureHeads, Linear]:
    """Heads and modulation from everything but the LoRA, which must be used up."""
    layers = dict(layers)
    weights, means = _linear(layers, "proj_out_logweights", path), _linear(layers, "proj_out_means", path)
    modulation = _linear(layers, "norm_out.linear", path, bias=not family.packed)
    stds, last = [], len([key for key in layers if key.startswith("proj_out_logstds.") and key.endswith(".weight")])
    if not last:
        raise CheckpointError(f"{path}: proj_out_logstds is missing: a model of constant deviation, "
                              "whose value the file does not tell")
    for index in range(last):
        stds.append(_linear(layers, f"proj_out_logstds.{2 * index + 1}", path))
    if layers:
        raise CheckpointError(f"{path}: {len(layers)} unknown keys, {', '.join(list(layers)[:4])}; an adapter holds "
                              "LoRA pairs, proj_out_means, proj_out_logweights, proj_out_logstds and norm_out.linear")
    rows, width = weights.weight.shape
    _check_rows(path, "proj_out_logweights", weights, (max(1, rows // PATCH**2) * PATCH**2, width))
    _check_rows(path, "proj_out_means", means, (rows * family.channels, width))
    _check_rows(path, "norm_out.linear", modulation, (2 * width, width))
    widths = [width, *(layer.weight.shape[0] for layer in stds[:-1])]
    for index, (layer, inputs) in enumerate(zip(stds, widths, strict=True)):
        outputs = 1 if index == last - 1 else layer.weight.shape[0]
        _check_rows(path, f"proj_out_logstds.{2 * index + 1}", layer, (outputs, inputs))
    return MixtureHeads(means, weights, tuple(stds)), modulation


def _linear(layers: State, name: str, path: Path, bias: bool = True) -> Linear:
    """Take a layer out of ``layers``; its bias must be there or not, as said."""
    weight, offset = layers.pop(f"{name}.weight", None), layers.pop(f"{name}.bias", None)
    if weight is None or weight.ndim != 2:
        got = "is missing" if weight is None else f"has shape {tuple(weight.shape)}, not 2 axes"
        raise CheckpointError(f"{path}: {name}.weight {got}")
    if (offset is not None) != bias or (offset is not None and tuple(offset.shape) != tuple(weight.shape[:1])):
        got = "is missing" if offset is None else f"has shape {tuple(offset.shape)}"
        right = f"be {tuple(weight.shape[:1])}" if bias else "not be there in this family"
        raise CheckpointError(f"{path}: {name}.bias {got}; it should {right}")
    return Linear(weight, offset)


def _check_rows(path: Path, name: str, layer: Linear, shape: tuple[int, int]) -> None:
    if tuple(layer.weight.shape) != shape:
        raise CheckpointError(f"{path}: {name}.weight is {tuple(layer.weight.shape)}, "
                              f"and beside the other layers it should be {shape}")
