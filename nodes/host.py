"""The border to ComfyUI: only this module, host_sampling and host_adapter touch its internals. Here: the MODEL.

It is an ordinary ComfyUI model whose network predicts a mixture and returns its mean; a
:class:`Capture` in ``transformer_options`` receives the mixture itself, packed in one tensor. GM
samplers and the GM guider read it there; everything else in ComfyUI sees a flow model.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.attention import optimized_attention

import nodes as core

from ..gmflow_core import GMDiT, GMDiTConfig
from ..gmflow_core.checkpoint import RawCheckpoint, build_network, description_tensors, read_state
from ..gmflow_core.files import CheckpointError, shown
from ..gmflow_core.model import LatentSpace
from .adapter_info import ATTACHMENT, AdapterInfo, check_adapter_vae
from .capture import hand_over
from .model_info import CLASSES, LABELS, ModelInfo, check_latent, check_vae, read_labels

FOLDER = "diffusion_models"
WEIGHT_DTYPES = {
    "default": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}


def known(factory, *args, **fields):
    """Call ``factory`` with those ``fields`` that this version of ComfyUI knows."""
    names = inspect.signature(factory).parameters
    return factory(*args, **{name: value for name, value in fields.items() if name in names})


# ---- model -------------------------------------------------------------------------------------

class HostGMDiT(GMDiT):
    """GM-DiT of the host's layers. ``forward`` returns the mean velocity (B,C,H,W) in float32."""

    def __init__(self, config: GMDiTConfig, in_channels: int, dtype=None, device=None, *, operations):
        super().__init__(config, operations=operations, attention=optimized_attention, dtype=dtype, device=device)
        self.dtype, self.in_channels = dtype, in_channels

    def forward(self, x, timesteps, context=None, control=None, transformer_options={},  # noqa: B006
                labels=None, **kwargs):
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
        )
        if wrappers:
            x = x.clone()  # it may be the very x that the host goes on with, and EasyCache writes to it
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(self._mean_velocity, self, wrappers).execute(
            x, timesteps, context, control, transformer_options, labels=labels, **kwargs
        )

    def _mean_velocity(self, x, sigma, context, control, transformer_options, labels, **kwargs):
        if control is not None:
            raise ValueError("a ControlNet is applied to the conditioning; there are none for GMFlow models: remove it")
        packed = super().forward(x, sigma, labels, transformer_options=transformer_options)
        hand_over(packed, transformer_options)  # pyright: ignore[reportCallIssue]
        return self.mixture(packed).mean()


class GMFlowModel(comfy.model_base.BaseModel):
    """ComfyUI's model around :class:`HostGMDiT`; ``gmflow`` is its :class:`ModelInfo`."""

    def __init__(self, model_config, info: ModelInfo, device=None):
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=HostGMDiT)
        self.gmflow = info

    def state_dict_for_saving(self, *args, **kwargs):  # signatures differ between versions of ComfyUI
        info, spectrum = self.gmflow, self.gmflow.spectrum
        described = description_tensors(RawCheckpoint(
            Path(), "gmflow", {}, info.config, spectrum and spectrum.state_dict(), spectrum and spectrum.config,
            info.latent_space, info.class_names, time_shift=info.shift, total_substeps=info.total_substeps,
        ))
        return super().state_dict_for_saving(*args, **kwargs) | described

    def process_timestep(self, timestep, **kwargs):
        return timestep / getattr(self.model_sampling, "multiplier", 1.0)  # the network's clock is sigma

    def time_shift(self) -> float:
        """The shift it samples with: its own, or a ModelSampling patch's."""
        return shift_of(self.model_sampling)

    def extra_conds(self, **kwargs):
        role, noise = kwargs.get("prompt_type", "conditioning"), kwargs["noise"]
        check_latent(self.gmflow, noise, kwargs.get("latent_image"))
        labels = read_labels(
            kwargs.get("cross_attn"), kwargs.get(LABELS), kwargs.get(CLASSES), self.gmflow.config, role
        )
        if len(labels) not in (1, len(noise)):
            raise ValueError(
                f"{role}: {len(labels)} labels for a batch of {len(noise)} images; give one label, or one for each "
                "image (batch_size of the empty latent)"
            )
        return {"labels": comfy.conds.CONDRegular(labels.to(kwargs["device"]))}


class GMFlowConfig(comfy.supported_models_base.BASE):
    """ComfyUI's description of a GM-DiT."""

    unet_extra_config = {}
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, info: ModelInfo):
        super().__init__({"config": info.config, "in_channels": info.config.in_channels})
        self.info, self.latent_format = info, latent_format(info)
        self.sampling_settings = {"shift": info.shift}
        self.memory_usage_factor = max(0.3, info.config.width / 1152)

    def get_model(self, state_dict, prefix="", device=None):
        return GMFlowModel(self, self.info, device=device)


class PixelLatent(comfy.latent_formats.LatentFormat):
    """RGB in [-1, 1] as a latent of its own size, for ``pixel_space`` of the core's VAE loader."""

    spacial_downscale_ratio = 1

    def __init__(self, channels: int):
        self.latent_channels = channels
        rgb = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
        self.latent_rgb_factors = rgb if channels == 3 else [[1.0, 1.0, 1.0]] * channels


class ScaledLatent(comfy.latent_formats.SD15):
    """Stable Diffusion's latents with a checkpoint's own scale and shift: network = (latent - shift) scale."""

    def __init__(self, space: LatentSpace, channels: int):
        super().__init__(space.scale)
        self.shift, self.latent_channels = space.shift, channels
        if channels != 4:
            self.latent_rgb_factors = self.taesd_decoder_name = None

    def process_in(self, latent):
        return (latent - self.shift) * self.scale_factor

    def process_out(self, latent):
        return latent / self.scale_factor + self.shift


def latent_format(info: ModelInfo):
    channels = info.config.in_channels
    return PixelLatent(channels) if info.latent_space.kind == "rgb" else ScaledLatent(info.latent_space, channels)


def register_models(folder: Path) -> None:
    """List the checkpoints of ``folder`` among the diffusion models."""
    folder_paths.add_model_folder_path(FOLDER, str(folder))


def category() -> str:
    """The pack's place in the menu, beside the core's samplers."""
    return f"{core.KSampler.CATEGORY}/GMFlow"  # pyright: ignore[reportAttributeAccessIssue]


def intermediate_device():
    return comfy.model_management.intermediate_device()


def decoder(model, vae=None):
    """x_0 (N,C,H,W) in the mixture's space to RGB in [-1, 1]: by a VAE, as pixels, or in the previews' rough colours.

    ValueError for a VAE of another space.
    """
    space, info = model.model.latent_format, require_gmflow(model)
    if vae is not None:
        if isinstance(info, AdapterInfo):
            check_adapter_vae(info, vae)
        else:
            check_vae(info, vae)

    def decode(x):
        if vae is not None:
            pictures = vae.decode(space.process_out(info.leave(x)))
            return pictures.reshape(-1, *pictures.shape[-3:]).movedim(-1, 1) * 2 - 1
        if isinstance(space, PixelLatent) or space.latent_rgb_factors is None:
            return x
        rough = torch.einsum("nchw,cr->nrhw", x, x.new_tensor(space.latent_rgb_factors))
        bias = getattr(space, "latent_rgb_factors_bias", None)
        return rough if bias is None else rough + x.new_tensor(bias).reshape(3, 1, 1)

    return decode


def default_model() -> str | None:
    """The bundled checkpoint if it is listed."""
    return next((name for name in model_files() if name == "gmdit_characters.safetensors"), None)


def model_files() -> list[str]:
    return folder_paths.get_filename_list(FOLDER)


def model_path(name: str) -> str:
    """ValueError for a file that is not there (any more)."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        folders = folder_paths.get_folder_paths(FOLDER)
        folder = next((folder for folder in folders if Path(folder).name == FOLDER), folders[0])  # not the old "unet"
        raise ValueError(f"model_name: there is no '{shown(name)}' in {folder}; put a GMFlow checkpoint there and "
                         "refresh the page, or choose another one of the list")
    return path


def load_model(path: str, weight_dtype: str = "default", disable_dynamic: bool = False):
    """Read any GMFlow checkpoint into a ModelPatcher. CheckpointError for other files, before anything is built."""
    if weight_dtype not in WEIGHT_DTYPES:  # 0.3.64 passes any text
        raise ValueError(f"weight_dtype must be one of {', '.join(WEIGHT_DTYPES)}, got {weight_dtype!r}")
    raw = read_state(path)
    if not isinstance(raw.config, GMDiTConfig):
        raise CheckpointError(f"{path}: this GMFlow model paints points in the plane, not images; "
                              "see python -m gmflow_core sample")
    spectrum = None
    if raw.spectrum_config is not None and raw.spectrum_state is not None:
        spectrum = build_network(raw.spectrum_config, raw.spectrum_state, "cpu", torch.float32, path)
    config = GMFlowConfig(ModelInfo(raw.config, raw.class_names, raw.latent_space, spectrum, shift=raw.time_shift,
                                    total_substeps=raw.total_substeps))
    mm, supported = comfy.model_management, GMFlowConfig.supported_inference_dtypes
    device, offload = mm.get_torch_device(), mm.unet_offload_device()
    dtype = WEIGHT_DTYPES[weight_dtype] or mm.unet_dtype(
        model_params=comfy.utils.calculate_parameters(raw.state), supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(raw.state),
    )
    config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, device, supported))
    model = config.get_model(raw.state).to(offload)
    patcher_class = comfy.model_patcher.ModelPatcher
    if not disable_dynamic:
        patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", patcher_class)
    patcher = patcher_class(model, load_device=device, offload_device=offload)
    # Copies: a tensor that stays mapped to the file dies with it when a training run replaces the file.
    state = {name: value.clone() for name, value in raw.state.items()}
    dynamic = getattr(patcher, "is_dynamic", lambda: False)()
    known(model.load_model_weights, state, "", assign=dynamic)
    patcher.cached_patcher_init = (load_model, (path, weight_dtype))
    return patcher


def output_file(prefix: str, suffix: str) -> Path:
    """A new file's name in the output folder, numbered as the core's save nodes number theirs."""
    return _numbered(prefix, suffix, folder_paths.get_output_directory())


def temp_file(prefix: str, suffix: str) -> Path:
    """A new file's name in the folder of previews: ``/view`` of type ``temp`` serves it."""
    return _numbered(prefix, suffix, folder_paths.get_temp_directory())


def _numbered(prefix: str, suffix: str, folder: str) -> Path:
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder)
    while (path := Path(folder) / f"{name}_{counter:05}_{suffix}").exists():
        counter += 1
    return path


def require_gmflow(model, name: str = "model") -> ModelInfo | AdapterInfo:
    """What a MODEL that predicts mixtures is; ValueError if it is of another kind."""
    attached = getattr(model, "get_attachment", lambda key: None)(ATTACHMENT)
    if attached is not None:
        return attached
    inner = getattr(model, "model", None)
    if not isinstance(inner, GMFlowModel):
        raise ValueError(f"{name}: this is a {type(inner).__name__} model, not a GMFlow one; load one with GMFlow "
                         "Loader, or give FLUX.1, FLUX.2 or Qwen-Image an adapter with GMFlow Apply Adapter")
    return inner.gmflow


def require_classes(model, instead: str) -> ModelInfo:
    """The ModelInfo of a MODEL that paints classes; ValueError for others, which names the node to use ``instead``."""
    info = require_gmflow(model)
    if isinstance(info, AdapterInfo):
        raise ValueError(f"model: this is {info.family.name} with an adapter, which paints texts; "
                         f"use {instead} instead")
    return info


# ---- the model's clock -------------------------------------------------------------------------

def percent_to_sigma(model, percent: float, name: str) -> float:
    """The sigma at a share of the sampling; ValueError for what is none."""
    if not 0 <= percent <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {percent}")
    return float(model.get_model_object("model_sampling").percent_to_sigma(percent))


def model_shift(model) -> float:
    """The time shift that the model samples with: its own, or that of a ModelSampling patch."""
    return shift_of(model.get_model_object("model_sampling"))


def shift_of(sampling) -> float:
    """The m of a flow's model sampling; ValueError for a patch that makes the model something else."""
    half = float(sampling.percent_to_sigma(0.5))  # m / (m + 1), whatever the patch calls its parameter
    if not isinstance(sampling, comfy.model_sampling.CONST) or not 0 < half < 1:
        raise ValueError("model: a ModelSampling node makes it another kind of model, "
                         "and GMFlow models are flows; remove that node")
    return half / (1 - half)
