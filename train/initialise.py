"""Starting from trained weights: a GMFlow checkpoint with any number of components, or a DiT that predicts a mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gmflow_core import GMDiTConfig, SpectrumConfig
from gmflow_core.checkpoint import check_keys, read_state
from gmflow_core.files import State, is_safetensors, read_json
from gmflow_core.folders import index_of, locate, read_weights, weights_file
from gmflow_core.foreign import is_dit_training, without_wrapper_prefixes
from gmflow_core.pickles import is_pickle, read_pickle

from .config import TrainConfig
from .console import say

NOISE = 0.05  # of a copied component, in standard deviations of the weights that are copied
PATCHES = "pos_embed.proj.weight"
HEAD = "proj_out_2."
EMBEDDING = "emb.class_embedder.embedding_table.weight"
DEVIATION = "gm_out.logstd_layers."
OWN = "x_embedder.proj.weight"  # of a DiT under its own names
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
    """A DiT that predicts a mean under a GM-DiT's names, in diffusers' layout or in that of DiT's and SiT's own
    training files; None if this is something else."""
    path = locate(path)
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    file = folder
    if folder.is_dir():
        if not any(folder.glob("diffusion_pytorch_model*")):
            return None
        file = weights_file(folder, pickles=True)
    if is_pickle(file):
        content = read_pickle(file)
        state = content["ema"] if is_dit_training(content) else content
    elif index_of(file) is not None or is_safetensors(file):
        state = read_weights(file)
    else:
        return None
    state = without_wrapper_prefixes({name: value for name, value in state.items() if isinstance(value, Tensor)}, file)
    if OWN in state:
        say(f"{file}: a DiT under its own names; a SiT's clock runs the other way: it starts with its features alone")
        return Source(gm_names_of_dit(state), components=1)
    if VANILLA not in state:
        return None
    config = file.parent / "config.json"
    heads = read_json(config).get("num_attention_heads") if config.is_file() else None
    return Source(gm_names(state, file), components=1, heads=heads)


# DiT's own names -> ours; "blocks.N." is "transformer_blocks.N.".
_DIT_NAMES = {
    "x_embedder.proj": "pos_embed.proj", "t_embedder.mlp.0": "emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "emb.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2",
    "adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
}


def gm_names_of_dit(state: State) -> State:
    """The weights of DiT's own code (and SiT's, the same network) under ours: there q, k and v lie in one matrix."""
    ours = {}
    for name, value in state.items():
        if name == "pos_embed":  # computed, never loaded
            continue
        stem, _, kind = name.rpartition(".")
        head, _, rest = stem.partition(".")
        block = ""
        if head == "blocks":
            number, _, stem = rest.partition(".")
            block = f"transformer_blocks.{number}."
        if stem == "attn.qkv":
            ours |= {f"{block}attn1.to_{part}.{kind}": piece for part, piece in zip("qkv", value.chunk(3), strict=True)}
        else:
            ours[f"{block}{_DIT_NAMES.get(stem, stem)}.{kind}"] = value
    return ours


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
