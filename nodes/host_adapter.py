"""The border to ComfyUI for text-to-image adapters: a stock MODEL becomes one that predicts mixtures.

Nothing of the base is touched. On a clone of the MODEL two leaf layers are object patches, the adapter's LoRA goes
in as weight patches, and a wrapper of the model's calls hands the mixture to whoever captures it. Without a capture
the network gives the mixture's mean: an ordinary flow model.
"""

from __future__ import annotations

import logging
import math
from contextvars import ContextVar

import comfy.model_base
import comfy.model_sampling
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ..gmflow_core.adapter import PATCH, SHIFT, Adapter, Linear, MixtureHeads, load_adapter, mean_tokens, pack_tokens
from ..gmflow_core.files import CheckpointError
from .adapter_info import ATTACHMENT, SEAMS, AdapterInfo, Seam, host_module, rows_and_columns
from .capture import CAPTURE, hand_over
from .host import shift_of
from .host_sampling import tell
from .model_info import LABELS

FOLDER = "loras"
NETWORK = "diffusion_model."
UNREACHABLE = {"nunchaku": "a Nunchaku model has", "trt": "a TensorRT engine has", "tensorrt": "a TensorRT engine has"}
log = logging.getLogger(__name__)


# ---- the two layers ----------------------------------------------------------------------------

class Sink:
    """What the two layers saw in one call of the network."""

    tokens: tuple[Tensor, Tensor] | None = None   # means and log weights of the tokens
    log_std: Tensor | None = None                 # (B,)


SINK: ContextVar[Sink | None] = ContextVar("gmflow_sink", default=None)


class Tensors:
    """The adapter's own tensors, in float32 on the devices that asked for them."""

    def __init__(self, heads: MixtureHeads, modulation: Linear):
        self._stored, self._copies = (heads, modulation), {}

    def on(self, device: torch.device) -> tuple[MixtureHeads, Linear]:
        if device not in self._copies:
            heads, modulation = self._stored
            self._copies[device] = heads.to(device, torch.float32), modulation.to(device, torch.float32)
        return self._copies[device]

    def release(self, *_args) -> None:
        """Give the copies back; the next use makes new ones."""
        self._copies = {}


class Replacement(torch.nn.Module):
    """A stand-in for a layer of the base, without a tensor of its own.

    ComfyUI loads, moves, offloads, backs up and restores tensors by their names. To all that this is the base's layer:
    its keys, its ``weight`` and ``bias``; the adapter's tensors are invisible and cannot land in the base.
    """

    base: torch.nn.Module
    tensors: Tensors

    def __init__(self, base: torch.nn.Module, tensors: Tensors):
        super().__init__()
        self.__dict__.update(base=base, tensors=tensors)

    def __getattr__(self, name: str):
        if name.removeprefix("set_").removeprefix("convert_") in ("weight", "bias"):
            return getattr(self.base, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name in ("weight", "bias"):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args, **kwargs):
        return self.base.state_dict(*args, **kwargs)


class AdapterModulation(Replacement):
    """The adapter's last modulation. It sees silu(vec), which the heads' deviation is a function of too."""

    @torch.compiler.disable  # what a compiled network hands out must be this call's
    def forward(self, activation: Tensor) -> Tensor:
        heads, modulation = self.tensors.on(activation.device)
        sink, values = SINK.get(), activation.float()
        if sink is not None:
            # With reference latents at time zero there are two vectors, the first one of the real time.
            sink.log_std = heads.log_std(values.reshape(len(values), -1, values.shape[-1])[:, 0])
        return modulation(values).to(activation.dtype)


class AdapterHead(Replacement):
    """The mixture's mean (B,L,C p p) of the modulated hidden state (B,L,D), in float32."""

    def state_dict(self, *args, prefix: str = "", **kwargs):
        if not prefix.startswith(NETWORK):  # ComfyUI saves the network alone, and asks the model for all else
            tell("what is saved is the base with the adapter's LoRA in it, and not the adapter's heads; load it as any "
                 "model and give it the same adapter with strength 0")
        return super().state_dict(*args, prefix=prefix, **kwargs)

    @torch.compiler.disable
    def forward(self, hidden: Tensor) -> Tensor:
        heads, _ = self.tensors.on(hidden.device)
        tokens, sink = heads.tokens(hidden.float()), SINK.get()
        if sink is not None:
            sink.tokens = tokens
        return mean_tokens(*tokens)


def modulation_for(adapter: Adapter) -> Linear:
    """The adapter's modulation in the base's order: Qwen-Image's is that of the file, FLUX's the other way round."""
    if adapter.family.scale_first:
        return adapter.modulation
    weight, bias = adapter.modulation.weight, adapter.modulation.bias
    return Linear(torch.cat(weight.chunk(2)[::-1]), None if bias is None else torch.cat(bias.chunk(2)[::-1]))


class AdapterSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """The adapter's clock: sigma itself, and its own shift.

    Its table is no buffer: ComfyUI with dynamic VRAM puts buffers back by name after it has exchanged the patches, and
    would write the base's table into this one. Such a write goes on to the base.
    """

    def __init__(self, base: torch.nn.Module):
        torch.nn.Module.__init__(self)
        self.set_parameters(shift=SHIFT, multiplier=1.0)
        self.__dict__["base"] = base
        self.noise_scale = 1.0

    def register_buffer(self, name: str, tensor, persistent: bool = True) -> None:
        if "base" in self.__dict__:
            self.base.register_buffer(name, tensor, persistent=persistent)
        else:
            self.__dict__[name] = tensor


# ---- the calls of the model ---------------------------------------------------------------------

def capture_mixture(info: AdapterInfo):
    """An APPLY_MODEL wrapper that hands the mixture over, packed, to the capture of the call's transformer_options."""

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={},  # noqa: B006
                **kwargs):
        if transformer_options.get(CAPTURE) is None:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        sink = Sink()
        token = SINK.set(sink)
        try:
            denoised = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        finally:
            SINK.reset(token)
        if sink.tokens is not None and sink.log_std is not None:  # else a patch skipped the network: gather() names it
            height, width = x.shape[-2:]
            rows, columns = rows_and_columns(info.family, height, width)
            means, log_weights = (t[:, : rows * columns] for t in sink.tokens)
            packed = pack_tokens(means, log_weights, sink.log_std, rows, columns)
            packed = packed if info.family.packed else packed[..., :height, :width]
            hand_over(packed, transformer_options)  # pyright: ignore[reportCallIssue]
        return denoised

    return wrapper


def check_conditionings(info: AdapterInfo):
    """An OUTER_SAMPLE wrapper: ValueError for classes, the right guidance embedding for texts."""

    def wrapper(executor, *args, **kwargs):
        groups = executor.class_obj.conds
        for role, group in groups.items():
            if any(LABELS in cond for cond in group):
                raise ValueError(f"{role}: it holds classes, and {info.family.name} with an adapter paints texts; "
                                 "use CLIP Text Encode")
        if info.family.guidance is not None:
            supply_guidance(info, [cond for group in groups.values() for cond in group])
        return executor(*args, **kwargs)

    return wrapper


def supply_guidance(info: AdapterInfo, conds: list[dict]) -> None:
    """The adapter's guidance embedding for conditionings that name none; a line for others."""
    for cond in conds:
        cond.setdefault("guidance", info.family.guidance)
    others = {cond["guidance"] for cond in conds} - {info.family.guidance}
    if others:
        tell(f"a conditioning asks for guidance {', '.join(map(str, others))}, and {info.family.name} adapters know "
             f"only {info.family.guidance}: the picture will be noise; remove that FluxGuidance, or set it to "
             f"{info.family.guidance}")


def tell_changes(keys: tuple[str, ...]):
    """An ON_PRE_RUN callback that names what other nodes changed and the adapter overrules, or is overruled by."""

    def callback(patcher) -> None:
        hooked = [key for patches in patcher.hook_patches.values() for key in patches]
        ignored = [key for key in keys if key in patcher.patches or key in hooked]
        if ignored:
            tell(f"a LoRA's part for {', '.join(ignored)} is ignored: the adapter replaces these layers")
        sampling = patcher.get_model_object("model_sampling")
        if not isinstance(sampling, AdapterSampling):
            tell(f"a {type(sampling).__name__} node after GMFlow Apply Adapter samples with shift "
                 f"{shift_of(sampling):.4g} instead of the adapter's {SHIFT}")

    return callback


# ---- applying ----------------------------------------------------------------------------------

def adapter_files() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def adapter_path(name: str) -> str:
    """ValueError for a file that is not there (any more)."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ValueError(f"adapter_name: there is no {name!r} in {folder_paths.get_folder_paths(FOLDER)[0]}; put an "
                         "adapter there and refresh the page, or choose another one of the list")
    return path


def weight_shapes(model) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's weights. As the layers tell them: a state dict has GGUF's packed blocks."""
    found = {}
    for key in model.model_state_dict(NETWORK):
        try:
            found[key] = tuple(comfy.utils.get_attr(model.model, key).shape)
        except AttributeError:  # a loader's own entry that no layer has, as GGUF's for temporary memory
            continue
    return found


def check_base(model, adapter: Adapter, weights: dict[str, tuple[int, ...]]) -> Seam:
    """Where the adapter sits in this model, of these weights; ValueError if that is no base of its family."""
    family, seam, kind = adapter.family, SEAMS[adapter.family.name], type(model.model).__name__
    head, modulation = (weights.get(f"{NETWORK}{name}.weight") for name in (seam.head, seam.modulation))
    if head is None or modulation is None:
        network = type(model.model.diffusion_model)
        name = f"{network.__module__}.{network.__name__}".lower()
        what = next((title for word, title in UNREACHABLE.items() if word in name), f"this {kind} model has")
        raise ValueError(f"model: {what} no layers {seam.modulation} and {seam.head}, which a {family.name} adapter "
                         f"replaces; load {family.name} with Load Diffusion Model, Load Checkpoint or a GGUF loader")
    outputs, width = family.channels * PATCH**2, adapter.width
    if head != (outputs, width) or modulation != (2 * width, width):
        raise ValueError(f"model: this {kind} model's last layers are {modulation} and {head}; the adapter is for "
                         f"{family.name} of hidden size {width}, where they are {(2 * width, width)} and "
                         f"{(outputs, width)}")
    axes = model.model.latent_format.latent_dimensions
    if axes != seam.axes:
        raise ValueError(f"model: a {kind} model paints latents of {axes} axes, "
                         f"and the adapter is for {family.name}, of {seam.axes}")
    return seam


def lora_patches(adapter: Adapter, weights: dict[str, tuple[int, ...]]) -> dict:
    """The adapter's LoRA as ComfyUI's weight patches; ValueError if the base lacks a module or has it in another
    shape."""
    patches, lacking, misfits = {}, [], []
    for module, (a, b) in adapter.lora.items():
        name, part = host_module(adapter.family, module, adapter.width) or (module, None)
        key = f"{NETWORK}{name}.weight"
        if key not in weights:
            lacking.append(module)
            continue
        rows, *columns = weights[key]
        if (b.shape[0], a.shape[1]) != (part[1] if part else rows, *columns) or (part and sum(part) > rows):
            misfits.append(f"{module} {(b.shape[0], a.shape[1])} in {name} {weights[key]}")
        patch = comfy.weight_adapter.LoRAAdapter(set(), (b, a, None, None, None, None))
        patches[(key, (0, *part)) if part else key] = patch
    for what, names in (("lacks modules that the adapter's LoRA changes", lacking),
                        ("has them in another shape", misfits)):
        if names:
            raise ValueError(f"model: it {what}: "
                             f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}; "
                             f"the adapter is for the {adapter.family.name} that it was trained on")
    return patches


def apply_adapter(model, path: str, strength: float):
    """A clone of ``model`` that predicts the mixture of the adapter in ``path``. ValueError for what does not fit.

    ``strength`` scales the adapter's LoRA, not its heads. The MODEL itself stays as it is.
    """
    if not math.isfinite(strength):
        raise ValueError(f"strength must be a finite number, got {strength}")
    if model.get_attachment(ATTACHMENT) is not None:
        raise ValueError("model: an adapter is applied to it already, and two would add up to neither; remove one")
    try:
        adapter = load_adapter(path)
    except CheckpointError as error:
        raise ValueError(f"adapter_name: {error}") from None  # the page shows the type, and ours has a long name
    weights = weight_shapes(model)
    seam = check_base(model, adapter, weights)
    patches = lora_patches(adapter, weights)
    info, patched = AdapterInfo.of(adapter), model.clone()
    missing = patches.keys() - set(patched.add_patches(patches, strength))
    if missing:
        raise ValueError(f"model: {len(missing)} of the adapter's LoRA modules could not be patched, "
                         f"as {sorted(map(str, missing))[0]}")
    tensors = Tensors(adapter.heads, modulation_for(adapter))
    for name, kind in ((seam.modulation, AdapterModulation), (seam.head, AdapterHead)):
        patched.add_object_patch(NETWORK + name, kind(model.get_model_object(NETWORK + name), tensors))
    own_sampling = model.object_patches_backup.get("model_sampling", model.model.model_sampling)
    patched.add_object_patch("model_sampling", AdapterSampling(own_sampling))
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, ATTACHMENT, capture_mixture(info))
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, ATTACHMENT, check_conditionings(info))
    replaced = tuple(f"{NETWORK}{name}.{part}" for name in (seam.modulation, seam.head) for part in ("weight", "bias"))
    patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, ATTACHMENT, tell_changes(replaced))
    patched.add_callback_with_key(CallbacksMP.ON_CLEANUP, ATTACHMENT, tensors.release)
    patched.set_attachments(ATTACHMENT, info)
    log.info(f"GMFlow Apply Adapter: {adapter}")
    return patched
