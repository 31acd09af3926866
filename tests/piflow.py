"""pi-Flow's tiny random models in tests/data/piflow: a base, an adapter in the published layout,
and the authors' outputs."""

from __future__ import annotations

from recorded import DATA, load
from safetensors.torch import load_file, save_file

FAMILIES = {"gmflux_tiny": "FLUX.1", "gmqwen_tiny": "Qwen-Image", "gmflux2_tiny": "FLUX.2"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def adapter_file(name: str):
    return DATA / "piflow" / name / "adapter" / WEIGHTS


def io(name: str) -> dict:
    return load(f"piflow/{name}/io")


def changed(path, name: str = "gmflux_tiny", drop: str | tuple = (), metadata: dict | None = None, **tensors):
    """An adapter's file with some keys gone (those that begin so) and others added or replaced;
    ``__`` stands for a dot."""
    state = {key: value for key, value in load_file(adapter_file(name)).items() if not drop or not key.startswith(drop)}
    state |= {key.replace("__", "."): value.contiguous() for key, value in tensors.items()}
    save_file(state, path, {"policy_config": '{"type": "GMFlow"}'} if metadata is None else metadata)
    return path
