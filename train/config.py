"""One dataclass says everything about a run; PRESETS are instances of it."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace

from gmflow_core import GMDiTConfig, GMMLPConfig, SpectrumConfig
from gmflow_core.schedule import MOST_SUBSTEPS, SHIFTS, TOTAL_SUBSTEPS

DATASETS = ("digits", "checkerboard", "imagefolder", "latents")

# A run may go on with other values of these: they say where and how fast, not what is learnt.
FREE = ("init_from", "data_path", "workers", "accumulate", "parallel", "ema_device", "checkpoint_activations",
        "compile", "tf32", "max_bad_steps", "log_every", "sample_every", "save_every", "tensorboard", "keep",
        "ema_decays", "sampling_shift", "total_substeps")
# These too, but it is said: the run is no longer the one that its first settings would have made.
CHANGEABLE = ("lr", "batch_size", "warmup", "clip_norm", "clip_from")
PATHS = ("init_from", "data_path")  # settings that are text even if they look like a number
# Settings that the first runs did not have. Their defaults are what those did, and so is a setting that a file lacks.
LATER = ("mean_weight", "cooldown", "ema_decays", "holdout", "keep", "sampling_shift", "total_substeps")

# What numbers may be: (least, most); "(0, ..." means without the end itself.
_COUNTS = ("steps", "batch_size", "accumulate", "workers", "max_bad_steps", "log_every", "sample_every", "save_every")
_RANGES = {
    **dict.fromkeys(_COUNTS, ">= 1"), "warmup": ">= 0", "clip_from": ">= 0", "cooldown": ">= 0", "keep": ">= 0",
    "weight_decay": ">= 0", "spectral_weight": ">= 0", "mean_weight": ">= 0", "clip_norm": ">= 0",
    "transition_weight": "> 0", "lr": "> 0", "time_std": "> 0", "time_shift": "> 0",
    "sampling_shift": "in [{:g}, {:g}]".format(*SHIFTS), "total_substeps": f"in [1, {MOST_SUBSTEPS}]",
    "transition_ratio": "in (0, 1]", "label_dropout": "in [0, 1]", "ema_decay": "in [0, 1)", "holdout": "in [0, 1)",
    "time_mean": "in [-20, 20]", "seed": "in [0, 2147483647]",
}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Lengths are in optimizer steps; a step is ``batch_size`` images.

    The defaults of the objective and optimizer are the published image recipe.
    """

    data: str                                # one of DATASETS
    model: GMDiTConfig | GMMLPConfig         # the network
    spectrum: SpectrumConfig | None = None   # trained beside the model when given
    init_from: str | None = None             # a GMFlow checkpoint or a diffusers DiT to start from (train.initialise)
    # data from files
    data_path: str | None = None             # the folder
    holdout: float = 0.0                     # share of it that is never trained on; its loss and NLL are logged
    classes: str = "model"                   # or "data": model.num_classes becomes what the data has
    flip: bool = True                        # mirror images at random, latents where encoded with --flips; never digits
    workers: int = 2                         # threads that decode images
    # objective
    loss: str = "transition"                 # or "l2": vanilla flow matching, needs K = 1 and a constant log_std
    transition_ratio: float = 0.5            # how far a transition goes: 1, plain likelihood, is from x_0 itself
    transition_weight: float = 2.0           # of the transition loss
    spectral_weight: float = 1.0             # of the spectral loss, where there is a spectrum
    mean_weight: float = 0.0                 # squared error of the mixture's mean; 0, the published loss, has none
    label_dropout: float = 0.1               # share of labels replaced by the null label, which guidance needs
    time_distribution: str = "logit-normal"  # or "uniform"
    time_mean: float = 0.0                   # of the logit-normal
    time_std: float = 1.0                    # likewise
    time_shift: float = 1.0                  # above 1: more of the training at high noise
    # optimizer
    steps: int = 200_000                     # of the optimizer
    batch_size: int = 4096                   # of all processes together
    accumulate: int = 1                      # a process takes its part of a batch in so many pieces, to save memory
    parallel: str = "ddp"                    # or "fsdp": processes share out weights, their average and AdamW's state
    optimizer: str = "adamw"                 # or "adamw8bit", of bitsandbytes or torchao
    lr: float = 2e-4                         # the learning rate, after warm-up
    lr_decay: str = "constant"               # or "cosine": to zero at the last step; or "cooldown": to zero at the end
    cooldown: int = 0                        # in so many last steps, constant before
    betas: tuple[float, float] = (0.9, 0.95) # of AdamW
    weight_decay: float = 0.05               # of matrices; never of biases
    warmup: int = 1000                       # steps in which the learning rate rises from zero
    clip_norm: float = 10.0                  # of each network's gradient; 0 leaves gradients as they are
    clip_from: int = 1000                    # the first steps have large, harmless gradients
    ema_decay: float = 0.9999                # of the moving average, which is what a checkpoint holds
    ema_decays: tuple[float, ...] = ()       # of more averages, each saved as checkpoint-ema-DECAY.safetensors
    precision: str = "bf16"                  # autocast of the network; or "float32". Mixtures are always float32
    max_bad_steps: int = 10                  # give up after so many steps in a row whose loss or gradient is not finite
    ema_device: str = "same"                 # or "cpu", to save memory on the GPU
    checkpoint_activations: bool = False     # compute them again in the backward pass: a third slower, much less memory
    compile: bool = False                    # torch.compile of the network
    tf32: bool = True                        # matrix products of float32 in TF32 on CUDA
    seed: int = 0                            # of the weights and of every step's draws
    sampling_shift: float = 1.0              # time shift that samples are best drawn with; the checkpoint says it
    total_substeps: int = TOTAL_SUBSTEPS     # of all steps together, that GM-ODE takes; likewise
    # reports
    log_every: int = 50                      # steps between two lines of the log
    sample_every: int = 1000                 # steps between two sample pictures, and two looks at what is held out
    save_every: int = 500                    # steps between two saves
    keep: int = 0                            # numbered snapshots, checkpoint-STEP.safetensors: the last so many stay
    tensorboard: bool = True                 # scalars and samples for TensorBoard, if it is installed

    def __post_init__(self) -> None:
        for name in ("betas", "ema_decays"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _one_of(self, "data", DATASETS)
        _one_of(self, "classes", ("model", "data"))
        _one_of(self, "loss", ("transition", "l2"))
        _one_of(self, "time_distribution", ("logit-normal", "uniform"))
        _one_of(self, "lr_decay", ("constant", "cosine", "cooldown"))
        _one_of(self, "precision", ("bf16", "float32"))
        _one_of(self, "optimizer", ("adamw", "adamw8bit"))
        _one_of(self, "ema_device", ("same", "cpu"))
        _one_of(self, "parallel", ("ddp", "fsdp"))
        for name, wanted in _RANGES.items():
            _in_range(name, getattr(self, name), wanted)
        for name in ("betas", "ema_decays"):
            for value in getattr(self, name):
                _in_range(name, value, "in [0, 1)")
        if len({*self.ema_decays, self.ema_decay}) <= len(self.ema_decays):
            raise ValueError(f"ema_decays are for more averages than that of ema_decay={self.ema_decay:g}, each once, "
                             f"got {list(self.ema_decays)}")
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {list(self.betas)}")
        if self.data_path is not None and self.data in ("digits", "checkerboard"):
            raise ValueError(f"data {self.data} needs no folder and would ignore {self.data_path}: for your own "
                             "pictures take --preset images64, for latents a dit preset")
        if (self.lr_decay == "cooldown") != (self.cooldown > 0) or not 0 <= self.cooldown <= self.steps:
            raise ValueError(f"cooldown, the last steps of lr_decay=cooldown, must be from 1 to steps={self.steps} "
                             f"with it and 0 without, got {self.cooldown}")
        if self.loss == "l2" and (self.model.num_gaussians != 1 or self.model.constant_logstd is None):
            raise ValueError("loss l2 needs model.num_gaussians=1 and a model.constant_logstd")
        if self.loss == "l2" and self.mean_weight:
            raise ValueError("loss l2 is the squared error of the mean alone: mean_weight must be 0")
        if self.parallel == "fsdp" and (self.optimizer, self.ema_device) != ("adamw", "same"):
            raise ValueError("parallel fsdp shares out what optimizer=adamw and ema_device=same keep; got optimizer "
                             f"{self.optimizer!r}, ema_device {self.ema_device!r}: set these two, or parallel=ddp")
        if self.spectrum is not None:
            _check_spectrum(self.spectrum, self.model)

    def to_dict(self, whole: bool = False) -> dict:
        """Plain JSON types, as stored in checkpoints and compared on resume. Unless it is to be ``whole``, settings
        that the first runs did not have are left out where they change nothing."""
        plain = json.loads(json.dumps(asdict(self)))
        defaults = _defaults(TrainConfig)
        return {k: v for k, v in plain.items() if whole or k not in LATER or v != defaults[k]}


def _defaults(config) -> dict:
    """The defaults of a config's fields, in plain JSON types."""
    found = {field.name: field.default for field in fields(config) if field.default is not MISSING}
    return json.loads(json.dumps(found))


def _completed(config: dict) -> dict:
    """A configuration from a file, with the default of every setting that the file does not know."""
    known = _defaults(TrainConfig) | config
    kinds = {"model": GMDiTConfig if "sample_size" in known["model"] else GMMLPConfig, "spectrum": SpectrumConfig}
    return known | {name: _defaults(kind) | known[name] for name, kind in kinds.items() if known[name] is not None}


def changes(before: dict, after: dict) -> tuple[list[str], list[str]]:
    """In words, where two configurations (dicts) differ: in what must stay throughout a run, and in what may change."""
    lengths = {"constant": ("steps",), "cooldown": ("steps", "cooldown")}  # what comes before the end is the same
    free = FREE + (lengths.get(after["lr_decay"], ()) if before["lr_decay"] == after["lr_decay"] else ())
    before, after = _completed(before), _completed(after)
    differ = [k for k in after if before.get(k) != after[k] and k not in free]
    words = {k: f"{k}: {before.get(k)} there, {after[k]} asked for" for k in differ}
    return [words[k] for k in differ if k not in CHANGEABLE], [words[k] for k in differ if k in CHANGEABLE]


def _check_spectrum(spectrum: SpectrumConfig, model: GMDiTConfig | GMMLPConfig) -> None:
    if not isinstance(model, GMDiTConfig):
        raise ValueError("a spectrum is for images: --set spectrum=null")
    sample = (model.in_channels, model.sample_size, model.sample_size)
    if spectrum.base_size != sample:
        raise ValueError(f"spectrum.base_size {list(spectrum.base_size)} must be the model's sample {list(sample)}")


def _in_range(name: str, value: float, wanted: str) -> None:
    """ValueError unless a number is what a text says: ">= 1", "> 0", "in (0, 1]". NaN never is."""
    if wanted[0] == ">":
        relation, bound = wanted.split()
        good = (value >= float(bound) if relation == ">=" else value > float(bound)) and value < math.inf
    else:
        low, high = map(float, wanted[4:-1].split(", "))
        good = low <= value <= high and (value != low or wanted[3] == "[") and (value != high or wanted[-1] == "]")
    if not good:
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _one_of(config: TrainConfig, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(config, name)!r}")


_DIGITS_NET = GMDiTConfig(
    num_classes=10, num_gaussians=8, in_channels=3, sample_size=16, patch_size=2,
    num_layers=6, num_heads=2, head_dim=64, logstd_width=64,
)

_DIGITS = TrainConfig(
    data="digits",
    model=_DIGITS_NET,
    spectrum=SpectrumConfig(base_size=(3, 16, 16), layers=(64, 8)),
    # With the images' ratio of 0.5 the loss hardly sees the mixture's own variance here, and it collapses.
    transition_ratio=0.9,
    # Class and ink are decided at high noise: see more of it than the default does.
    time_mean=0.5, time_std=1.3,
    steps=12_000, batch_size=64, lr=1e-3, lr_decay="cosine", warmup=200, clip_norm=1.0, clip_from=0,
    weight_decay=0.01, ema_decay=0.999,
)

# The published recipe for ImageNet 256x256; 512 images a GPU on eight of them.
# Its data are latents of Stable Diffusion's VAE.
_IMAGENET = TrainConfig(
    data="latents", model=GMDiTConfig(), spectrum=SpectrumConfig(), optimizer="adamw8bit", checkpoint_activations=True,
)

# DiT's smaller sizes (Peebles & Xie 2023) on latents of any classes, for one GPU.
_DIT_S = GMDiTConfig(num_layers=12, num_heads=6, head_dim=64, logstd_width=384)
_DIT_B = GMDiTConfig(num_layers=12, num_heads=12, head_dim=64, logstd_width=768)
_ONE_GPU = replace(_IMAGENET, classes="data", optimizer="adamw", checkpoint_activations=False, steps=400_000,
                   batch_size=256, lr=1e-4)

_IMAGES = TrainConfig(  # DiT-S on small pictures of your own
    data="imagefolder", classes="data",
    model=replace(_DIT_S, in_channels=3, sample_size=64, patch_size=4),
    spectrum=SpectrumConfig(base_size=(3, 64, 64), layers=(64, 8)),
    steps=100_000, batch_size=128, lr=2e-4,
)

_CHARACTERS = TrainConfig(  # small pictures of sixteen kinds, drawn by train.characters
    data="imagefolder", flip=False, workers=1,
    model=replace(_DIGITS_NET, num_classes=16, sample_size=24, patch_size=3, num_heads=3),
    spectrum=SpectrumConfig(base_size=(3, 24, 24), layers=(64, 8)),
    transition_ratio=0.9, mean_weight=2.0, time_mean=0.5, time_std=1.3,
    steps=9_600, batch_size=64, lr=1e-3, lr_decay="cooldown", cooldown=1_600, warmup=200, clip_norm=1.0, clip_from=0,
    weight_decay=0.01, ema_decay=0.999, precision="float32",
    sampling_shift=3.0, total_substeps=16,  # how samples are best drawn, and without mottling: docs/characters.md
)

_CHECKERBOARD = TrainConfig(
    data="checkerboard",
    model=GMMLPConfig(num_gaussians=64),
    transition_ratio=0.9, transition_weight=1.0, label_dropout=0.0, time_distribution="uniform",
    steps=20_000, batch_size=4096, lr=2e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup=0,
    precision="float32", ema_decay=0.999, sample_every=5000,
)



def _vanilla(config: TrainConfig) -> TrainConfig:
    """The same as plain flow matching: one component of constant variance, squared error."""
    return replace(config, loss="l2", mean_weight=0.0, spectrum=None,
                   model=replace(config.model, num_gaussians=1, constant_logstd=0.0))


PRESETS: dict[str, TrainConfig] = {
    "digits": _DIGITS,
    "digits-vanilla": _vanilla(_DIGITS),
    "characters": _CHARACTERS,
    "characters-vanilla": _vanilla(_CHARACTERS),
    "checkerboard": _CHECKERBOARD,
    **{f"checkerboard-k{k}": replace(_CHECKERBOARD, model=GMMLPConfig(num_gaussians=k)) for k in (1, 8, 64)},
    "checkerboard-vanilla": _vanilla(_CHECKERBOARD),
    "images64": _IMAGES,
    "dit-s2": replace(_ONE_GPU, model=_DIT_S),
    "dit-b2": replace(_ONE_GPU, model=_DIT_B),
    "imagenet256-dit-xl2-k8": _IMAGENET,
}


def override(config: TrainConfig, settings: list[str]) -> TrainConfig:
    """Apply ``key=value`` settings; ``model.key=value`` reaches into the model. Values are JSON or plain text.

    They are checked together at the end: a model and its spectrum may change size at once.
    ``model.num_classes=N`` fixes the number of classes where a preset leaves it to the data.
    """
    parts = {f.name: getattr(config, f.name) for f in fields(config)}
    values = {name: vars(part).copy() if is_dataclass(part) else part for name, part in parts.items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {setting!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        _set(values, key, text if key in PATHS and value is not None else value, setting)
        if key == "model.num_classes":
            values["classes"] = "model"
    return TrainConfig(**{k: type(parts[k])(**v) if isinstance(v, dict) else v for k, v in values.items()})


def _set(values: dict, key: str, value, setting: str) -> None:
    head, _, rest = key.partition(".")
    if head not in values:
        raise ValueError(f"--set {setting}: no field {head!r}; there are {', '.join(values)}")
    current = values[head]
    if rest:
        if not isinstance(current, dict):
            raise ValueError(f"--set {setting}: {head} has no fields of its own")
        return _set(current, rest, value, setting)
    if isinstance(current, dict) and not (head == "spectrum" and value is None):
        raise ValueError(f"--set {setting}: set a field of {head}: {', '.join(f'{head}.{name}' for name in current)}")
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif isinstance(current, tuple) and isinstance(value, list):
        value = tuple(value)
    elif value is None and head in PATHS:
        pass
    elif not isinstance(current, dict) and current is not None and type(value) is not type(current):
        raise ValueError(f"--set {setting}: {head} takes a {type(current).__name__}, got {value!r}")
    values[head] = value
