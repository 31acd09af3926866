"""Starting from trained weights: a GMFlow checkpoint with any number of components, or a DiT that predicts a mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gmflow_core import GMDiTConfig, SpectrumConfig
from gmflow_core.checkpoint import check_keys, read_state
from gmflow_core.files import State, is_safetensors, read_json, read_safetensors
from gmflow_core.pickles import read_pickle

from .config import TrainConfig
from .console import say

NOISE = 0.05  # of a copied component, in standard deviations of the weights that are copied
PATCHES = "pos_embed.proj.weight"
HEAD = "proj_out_2."
EMBEDDING = "emb.class_embedder.embedding_table.weight"
DEVIATION = "gm_out.logstd_layers."
VANILLA = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"


@dataclass(frozen=True)
class Source:
    """Weights under a GM-DiT's names; the head has ``components`` means of C channels, then perhaps logits,
    then perhaps more."""

    state: State
    components: int
    heads: int | None = None
    log_std: float | None = None   # where it is constant
    spectrum_state: State | None = None
    spectrum_config: SpectrumConfig | None = None


def initialise(nets: nn.ModuleDict, config: TrainConfig, path: str | Path) -> None:
    """Fill freshly built networks from a file or folder. ValueError that names what does not fit.

    A model with more components than the source has copies of them, with a little noise (equal ones would stay
    equal for ever) and the weight shared among the copies; one with fewer takes the first. With another number of
    classes every class starts as the null label. What the source lacks keeps its fresh start.
    """
    if not isinstance(config.model, GMDiTConfig):
        raise ValueError("--init-from is for GM-DiTs, this preset's model is one for 2D points")
    source, own = read_source(Path(path)), nets["model"].state_dict()
    if source.heads not in (None, config.model.num_heads):
        raise ValueError(f"{path}: has {source.heads} attention heads, the model {config.model.num_heads}: "
                         "--set model.num_heads and model.head_dim")
    state = dict(source.state)
    check_ends(state, config.model, path)
    generator = torch.Generator().manual_seed(config.seed)
    for name in ("weight", "bias"):
        state[HEAD + name] = mixture_head(state[HEAD + name].float(), config.model, source.components, generator,
                                          name == "bias")
    table = state[EMBEDDING]
    if len(table) != config.model.num_classes + 1:
        say(f"{path}: {len(table) - 1} classes there, {config.model.num_classes} here: each starts as the null label")
        state[EMBEDDING] = table[-1:].expand(config.model.num_classes + 1, -1)
    deviation = {name: value for name, value in own.items() if name.startswith(DEVIATION)}
    if any(name not in state or state[name].shape != value.shape for name, value in deviation.items()):
        if deviation and source.log_std is not None:
            deviation[DEVIATION + "3.bias"] = torch.full_like(deviation[DEVIATION + "3.bias"], source.log_std)
        state = {name: value for name, value in state.items() if not name.startswith(DEVIATION)} | deviation
    if not deviation:
        state = {name: value for name, value in state.items() if not name.startswith(DEVIATION)}
    check_keys(state, {name: tuple(value.shape) for name, value in own.items()}, path)
    nets["model"].load_state_dict(state)
    if "spectrum" in nets and source.spectrum_config == config.spectrum:
        nets["spectrum"].load_state_dict(source.spectrum_state)


def check_ends(state: State, model: GMDiTConfig, path) -> None:
    """ValueError unless patches, channels and width are the model's; the rest is checked by name."""
    missing = [name for name in (PATCHES, HEAD + "weight", HEAD + "bias", EMBEDDING) if name not in state]
    if missing:
        raise ValueError(f"{path}: not a DiT's weights, {', '.join(missing)} missing")
    wanted = (model.width, model.in_channels, model.patch_size, model.patch_size)
    found = tuple(state[PATCHES].shape)
    if found != wanted:
        raise ValueError(f"{path}: (width, channels, patch, patch) is {found}, the model's {wanted}")


def mixture_head(rows: Tensor, model: GMDiTConfig, components: int, generator: torch.Generator, bias: bool) -> Tensor:
    """Weight or bias of the last layer, (p p channels, ...), for another number of components."""
    k, c = model.num_gaussians, model.in_channels
    rows = rows.unflatten(0, (model.patch_size**2, -1))                       # (p p, channels, ...)
    means = rows[:, : components * c].unflatten(1, (components, c))
    logits = rows[:, components * c : components * (c + 1)] if components > 1 else torch.zeros_like(means[:, :, 0])
    chosen = torch.arange(k) % components
    means, logits = means[:, chosen], logits[:, chosen].clone()
    others = (chosen != torch.arange(k)).reshape(1, k, *[1] * (means.ndim - 2))
    noise = torch.randn(means.shape, generator=generator) * others
    means = means + NOISE * rows.std() * noise
    if bias:
        copies = torch.bincount(chosen, minlength=components)
        logits -= copies[chosen].log()
    return torch.cat([means.flatten(1, 2), logits], dim=1).flatten(0, 1)


# ---- reading -----------------------------------------------------------------------------------

def read_source(path: Path) -> Source:
    """A vanilla DiT in diffusers' layout (folder or file), else any GMFlow checkpoint that the loader reads."""
    vanilla = read_vanilla(path)
    if vanilla is not None:
        return vanilla
    raw = read_state(path)
    if not isinstance(raw.config, GMDiTConfig):
        raise ValueError(f"{path}: a model for 2D points, not a GM-DiT")
    return Source(dict(raw.state), raw.config.num_gaussians, raw.config.num_heads, raw.config.constant_logstd,
                  raw.spectrum_state, raw.spectrum_config)


def read_vanilla(path: Path) -> Source | None:
    """diffusers' DiTTransformer2DModel under a GM-DiT's names; None if this is something else."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    file = folder
    if folder.is_dir():
        found = [*sorted(folder.glob("diffusion_pytorch_model*.safetensors")),
                 *sorted(folder.glob("diffusion_pytorch_model*.bin"))]
        if not found:
            return None
        file = found[0]
    state = read_safetensors(file)[0] if is_safetensors(file) else read_pickle(file)
    if VANILLA not in state:
        return None
    config = file.parent / "config.json"
    heads = read_json(config).get("num_attention_heads") if config.is_file() else None
    return Source(gm_names(state, file), components=1, heads=heads)


def gm_names(state: State, path: Path) -> State:
    """diffusers gives every block an embedding of its own; a DiT of the original kind has copies of one."""
    ours, embeddings = {}, {}
    for name, value in state.items():
        block, mark, inner = name.partition(".norm1.emb.")
        if mark:
            first = embeddings.setdefault(inner, value)
            if not torch.equal(first, value):
                raise ValueError(f"{path}: {name} differs from that of the first block; "
                                 "a GM-DiT has one embedding for all blocks")
        elif name != "pos_embed.pos_embed":
            ours[name] = value
    return ours | {f"emb.{name}": value for name, value in embeddings.items()}
