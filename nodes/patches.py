"""Other people's patches of a MODEL, by name. Nothing of ComfyUI is imported: its options are read as they come."""

from __future__ import annotations

CFG_PATCHES = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_calc_cond_batch_function")
SKIPPING = ("easycache",)  # in transformer_options: a step cache's own object


def named(thing) -> str:
    """A function or object in words: its name, and the custom node pack or module that it comes from."""
    described = thing if hasattr(thing, "__qualname__") else type(thing)
    name = described.__qualname__.split(".")[0]
    module = getattr(described, "__module__", "") or ""
    if "custom_nodes" in module:
        module = module.replace("\\", "/").rpartition("custom_nodes/")[2].partition(".")[0]
    return f"{name} of {module}" if module else name


def replacing_cfg(model_options: dict) -> list[str]:
    """The patches that replace classifier-free guidance or what goes into it."""
    found: list[str] = []
    for key in CFG_PATCHES:
        patches = model_options.get(key) or []
        found += [named(patch) for patch in (patches if isinstance(patches, list) else [patches])]
    return found


def evaluating(model_options: dict) -> str:
    """The patches that decide how often, on what and whether the network is evaluated; empty if there are none."""
    transformer_options = model_options.get("transformer_options", {})
    keys = ("context_handler", "model_function_wrapper", "sampler_calc_cond_batch_function")
    things = [model_options.get(key) for key in keys]
    things += [transformer_options.get(key) for key in SKIPPING]
    return ", ".join(getattr(thing, "name", None) or named(thing) for thing in things if thing is not None)
