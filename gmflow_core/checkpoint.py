r"""Checkpoints: one ``.safetensors`` that says everything a loader needs.

The model's parameters lie under their own names, which are those of diffusers' DiT; the spectrum
network's under ``spectrum.``. The metadata's key ``gmflow`` holds JSON: ``format`` (a version),
``architecture``, ``model`` and ``spectrum`` (configs), ``latent_space``, ``class_names``, ``training``,
``time_shift`` where it is not 1, ``total_substeps`` where they are not 128.
Files of GMFlow's authors are read too (:mod:`.foreign`). Every fault raises CheckpointError, and
before any network is built.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .configs import make_config
from .files import CheckpointError, State, is_safetensors, one_line, read_safetensors, reading, shown, write_safetensors
from .folders import index_of, locate, read_weights
from .foreign import (
    RawCheckpoint,
    read_diffusers_file,
    read_folder,
    read_training,
    strip_prefix,
    without_wrapper_prefixes,
)
from .model import GMMLP, GMDiT, GMDiTConfig, GMMLPConfig, LatentSpace, SpectrumConfig, SpectrumMLP
from .pickles import is_pickle
from .schedule import MOST_SUBSTEPS, SHIFTS, TOTAL_SUBSTEPS

__all__ = [
    "CONFIGS", "Checkpoint", "CheckpointError", "RawCheckpoint", "build_network", "check_finite", "check_keys",
    "convert", "expected_shapes", "load_checkpoint", "read_raw", "read_state", "save_checkpoint", "some",
]

FORMAT = 1
SPECTRUM = "spectrum."
DESCRIPTION = "gmflow.description"   # the metadata as a tensor of bytes, in files that ComfyUI's save nodes write
SAVED = "model.diffusion_model."     # what these put before a network's names
CONFIGS = {"gmdit": GMDiTConfig, "gmmlp": GMMLPConfig}
NETWORKS = {GMDiTConfig: GMDiT, GMMLPConfig: GMMLP, SpectrumConfig: SpectrumMLP}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint with its networks built: eval mode, no gradients."""

    model: GMDiT | GMMLP
    spectrum: SpectrumMLP | None
    config: GMDiTConfig | GMMLPConfig
    class_names: tuple[str, ...] | None
    latent_space: LatentSpace
    training: dict = field(default_factory=dict)  # a summary, as its trainer wrote it
    time_shift: float = 1.0                       # of the grid that it is best sampled on
    total_substeps: int = TOTAL_SUBSTEPS          # of all steps together, that GM-ODE best takes
    format: str = "gmflow"                        # as RawCheckpoint.format
    path: Path | None = None


# ---- checks ------------------------------------------------------------------------------------

def check_keys(state: State, expected: dict[str, tuple[int, ...]], source) -> None:
    """CheckpointError that lists missing, unexpected and misshaped keys, at most 8 of each, if there are any."""
    faults = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "misshaped": [
            f"{shown(key)} {tuple(state[key].shape)} should be {tuple(shape)}"
            for key, shape in expected.items() if key in state and tuple(state[key].shape) != tuple(shape)
        ],
    }
    if any(faults.values()):
        lists = "; ".join(f"{kind}: {some(names)}" for kind, names in faults.items() if names)
        raise CheckpointError(f"{source}: the weights do not fit the model's config; {lists}")


def some(names: list[str], limit: int = 8) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name, 200) for name in names[:limit]) + more


def check_finite(state: State, source) -> None:
    """CheckpointError that names the first tensor with NaN or infinite values. Reads every tensor."""
    for name, value in state.items():
        low, high = (value.float() if value.itemsize == 1 else value).aminmax()  # one pass, no mask; NaN comes through
        if not math.isfinite(low) or not math.isfinite(high):
            raise CheckpointError(f"{source}: {name} holds NaN or infinite values ({value.dtype}); "
                                  "the file is damaged, the training diverged or the dtype is too narrow")


def expected_shapes(config) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of the network of a config; nothing is allocated, and of equal blocks one is built."""
    blocks = config.num_layers if isinstance(config, GMDiTConfig) else 1
    network = NETWORKS[type(config)](replace(config, num_layers=1) if blocks > 1 else config, device="meta")
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    first = "transformer_blocks.0."
    block = {name.removeprefix(first): shape for name, shape in shapes.items() if name.startswith(first)}
    return shapes | {f"transformer_blocks.{i}.{name}": block[name] for i in range(1, blocks) for name in block}


def _check_part(state: State, config, source) -> None:
    """Keys, shapes and dtypes of one network."""
    # A config is only text: 10^9 layers in it must not keep the machine busy. A layer has a weight and a bias at least.
    layers = len(config.layers) + 1 if isinstance(config, SpectrumConfig) else config.num_layers
    if 2 * layers > len(state):
        raise CheckpointError(f"{source}: the config has {layers} layers, the file {len(state)} tensors")
    try:
        expected = expected_shapes(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{source}: no network can be built from {config}: {one_line(error)}") from error
    check_keys(state, expected, source)
    for name, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{source}: {name} is {value.dtype}; only floating-point weights are supported")


def _check(raw: RawCheckpoint) -> None:
    """Everything but the values of the weights."""
    _check_part(raw.state, raw.config, raw.path)
    if (raw.spectrum_state is None) != (raw.spectrum_config is None):
        raise CheckpointError(f"{raw.path}: has a spectrum network's weights or its config, but not both")
    if raw.spectrum_config is not None and raw.spectrum_state is not None:
        _check_part(raw.spectrum_state, raw.spectrum_config, f"{raw.path} (spectrum network)")
        channels = raw.spectrum_config.base_size[0]
        if channels != raw.config.in_channels:
            raise CheckpointError(f"{raw.path}: the spectrum network has {channels} channels, "
                                  f"the model {raw.config.in_channels}")
    names, classes = raw.class_names, raw.config.num_classes or 0
    if names is not None and (len(names) != classes or not all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{raw.path}: {len(names)} class names for a model of {classes} classes; "
                              "there must be one text for each class, or none at all")
    shift = raw.time_shift
    if not isinstance(shift, (int, float)) or isinstance(shift, bool) or not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise CheckpointError(f"{raw.path}: its time_shift must be a number from {SHIFTS[0]:g} to {SHIFTS[1]:g}, "
                              f"got {shown(repr(shift))}")
    if type(raw.total_substeps) is not int or not 1 <= raw.total_substeps <= MOST_SUBSTEPS:
        raise CheckpointError(f"{raw.path}: its total_substeps must be a whole number from 1 to {MOST_SUBSTEPS}, "
                              f"got {shown(repr(raw.total_substeps))}")


# ---- writing -----------------------------------------------------------------------------------

def save_checkpoint(
    path, model: GMDiT | GMMLP, spectrum: SpectrumMLP | None = None, *, latent_space: LatentSpace | None = None,
    class_names=None, training: dict | None = None, time_shift: float = 1.0, total_substeps: int = TOTAL_SUBSTEPS,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one ``.safetensors``, whole or not at all; missing folders are made.

    ``latent_space`` defaults to points for a GMMLP and to rgb for a GMDiT; ``class_names`` is one text
    per class; ``training`` a dict that JSON can hold; ``time_shift`` and ``total_substeps`` those that it is best
    sampled with; ``dtype`` casts the weights. CheckpointError if the model is another class, a weight is not
    finite (after the cast), the names do not fit or a number is out of range.
    """
    if not isinstance(model, (GMDiT, GMMLP)):
        raise CheckpointError(f"{path}: only a GMDiT or GMMLP can be saved, got {type(model).__name__} (unwrap it)")
    if latent_space is None:
        latent_space = LatentSpace("2d" if isinstance(model, GMMLP) else "rgb")
    write(path, RawCheckpoint(
        Path(path), "gmflow", dict(model.state_dict()), model.config,
        None if spectrum is None else dict(spectrum.state_dict()), None if spectrum is None else spectrum.config,
        latent_space, None if class_names is None else tuple(class_names), training or {}, time_shift, total_substeps,
    ), dtype)


def convert(source, destination, *, heads: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Rewrite any readable checkpoint in our format. The weights keep their dtype unless one is given."""
    write(destination, read_state(source, heads=heads), dtype)


def write(path, raw: RawCheckpoint, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint's parts in our format, atomically."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a checkpoint's name must end in .safetensors")
    _check(raw)
    state = raw.state | {SPECTRUM + name: value for name, value in (raw.spectrum_state or {}).items()}
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    check_finite(state, path)
    try:
        text = describe(raw)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the training summary is not plain JSON: {one_line(error)}") from error
    write_safetensors(path, state, {"format": "pt", "gmflow": text})


def describe(raw: RawCheckpoint) -> str:
    """All but the tensors of a checkpoint as JSON: the metadata ``gmflow``."""
    usual = {"time_shift": 1, "total_substeps": TOTAL_SUBSTEPS}  # not written, so that other files stay as they were
    own = {name: getattr(raw, name) for name, value in usual.items() if getattr(raw, name) != value}
    return json.dumps({
        "format": FORMAT,
        "architecture": next(name for name, config in CONFIGS.items() if isinstance(raw.config, config)),
        "model": raw.config.to_dict(),
        "spectrum": raw.spectrum_config and raw.spectrum_config.to_dict(),
        "latent_space": asdict(raw.latent_space), "class_names": raw.class_names, "training": raw.training,
        **own,
    }, allow_nan=False)


def description_tensors(raw: RawCheckpoint) -> State:
    """What :func:`describe` says and the spectrum network as tensors, for writers that keep nothing but tensors."""
    text = torch.frombuffer(bytearray(describe(raw).encode()), dtype=torch.uint8)
    return {DESCRIPTION: text} | {SPECTRUM + name: value for name, value in (raw.spectrum_state or {}).items()}


# ---- reading -----------------------------------------------------------------------------------

def load_checkpoint(
    path, device: str | torch.device = "cpu", dtype: torch.dtype | None = torch.float32, *, heads: int | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known format (see :func:`read_state`) and build its networks.

    Networks come in eval mode, without gradients, on ``device``, in ``dtype`` (None: as stored).
    """
    raw = read_raw(path, heads)
    with reading(raw.path):
        spectrum = None
        if raw.spectrum_config is not None and raw.spectrum_state is not None:
            spectrum = build_network(raw.spectrum_config, raw.spectrum_state, device, dtype, raw.path)
        model = build_network(raw.config, raw.state, device, dtype, raw.path)
    return Checkpoint(
        model, spectrum, raw.config, raw.class_names, raw.latent_space, raw.training, raw.time_shift,
        raw.total_substeps, raw.format, raw.path,
    )


def build_network(config, state: State, device, dtype, source) -> Any:
    """The network of a config with these weights: eval mode, no gradients."""
    # Always a copy: a tensor that stays mapped to the file dies with it when someone overwrites the file.
    state = {name: value.to(device, dtype, copy=True) for name, value in state.items()}
    check_finite(state, source)
    module = NETWORKS[type(config)](config, device="meta")
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def read_state(path, *, heads: int | None = None) -> RawCheckpoint:
    """A checkpoint's tensors and configs, checked but with no network built, for hosts that build their own.

    Reads our own file; a run's folder; a diffusers folder of GMFlow's authors, its ``transformer/`` or the hub's
    cache of it; a bare ``diffusion_pytorch_model*.safetensors``, also in parts; their training ``.pth``. ``heads``
    is the number of attention heads where the file cannot tell (no config.json). CheckpointError for everything else.
    """
    raw = read_raw(path, heads)
    with reading(raw.path):
        check_finite(raw.state | (raw.spectrum_state or {}), raw.path)
    return raw


def read_raw(path, heads: int | None = None) -> RawCheckpoint:
    """:func:`read_state` without the look at the values, which has to read the whole file."""
    path = Path(path)
    with reading(path):
        path = locate(path)
        if path.is_dir():
            raw = read_folder(path, heads)
        elif index_of(path) is not None:
            raw = read_diffusers_file(path, read_weights(path), heads)
        elif not is_safetensors(path) and is_pickle(path):
            raw = read_training(path, heads)
        else:
            state, metadata = read_safetensors(path)
            if DESCRIPTION in state:
                raw = _read_described(path, state)
            elif "gmflow" in metadata:
                raw = _read_own(path, state, metadata["gmflow"])
            else:
                raw = read_diffusers_file(path, state, heads)
        _check(raw)
    if heads is not None and heads != getattr(raw.config, "num_heads", None):
        raise CheckpointError(f"{path}: heads={heads} was given, but the file's own config is {raw.config}")
    if raw.assumed:
        logging.getLogger(__name__).warning("%s: %s", raw.path, raw.assumed)
    return raw


def _read_described(path: Path, state: State) -> RawCheckpoint:
    """What a save node of ComfyUI makes of a GMFlow model: :func:`description_tensors` beside a wrapped network."""
    try:
        text = bytes(state[DESCRIPTION].to(torch.uint8).tolist()).decode()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: its tensor {DESCRIPTION} is no text ({one_line(error)})") from error
    return _read_own(path, {key: value for key, value in state.items() if key.startswith((SAVED, SPECTRUM))}, text)


def _read_own(path: Path, state: State, description: str) -> RawCheckpoint:
    try:
        header = json.loads(description)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata gmflow is not JSON ({one_line(error)})") from error
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{path}: unknown format version {shown(repr(version))} in its metadata; this program "
                              f"reads {FORMAT} (a newer version of it may be needed)")
    architecture = header.get("architecture")
    if not isinstance(architecture, str) or architecture not in CONFIGS:
        raise CheckpointError(f"{path}: unknown architecture {shown(repr(architecture))}; "
                              f"known are {', '.join(CONFIGS)}")
    spectrum, names, training = header.get("spectrum"), header.get("class_names"), header.get("training") or {}
    if not isinstance(names, (list, type(None))) or not isinstance(training, dict):
        raise CheckpointError(f"{path}: in its metadata class_names must be a list or null and training an object")
    state = without_wrapper_prefixes(state, path)
    return RawCheckpoint(
        path, "gmflow", {key: value for key, value in state.items() if not key.startswith(SPECTRUM)},
        make_config(CONFIGS[architecture], header.get("model"), path),
        strip_prefix(state, SPECTRUM) or None,
        None if spectrum is None else make_config(SpectrumConfig, spectrum, path),
        make_config(LatentSpace, header.get("latent_space"), path),
        None if names is None else tuple(names), training, header.get("time_shift", 1.0),
        header.get("total_substeps", TOTAL_SUBSTEPS),
    )
