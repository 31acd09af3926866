"""One step of training, in functions of (weights, step number): networks, draws, losses, rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gmflow_core import (
    GMMLP,
    GaussianMixture,
    GMDiT,
    GMDiTConfig,
    SpectrumMLP,
    mean_loss,
    mixture_nll,
    spectral_loss,
    transition_loss,
)
from gmflow_core.model.layers import explicit_attention, sdpa
from gmflow_core.objective import transition_pair
from gmflow_core.path import add_noise
from gmflow_core.schedule import training_sigmas

from .config import TrainConfig
from .data.dataset import Dataset


def prepare(device: torch.device, tf32: bool) -> None:
    """Settings of the process."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32


def build(config: TrainConfig, device: torch.device) -> nn.ModuleDict:
    """The networks of a run for a device, still on the CPU, initialised from its seed."""
    torch.manual_seed(config.seed)
    nets = networks(config, device)
    for net in nets.values():
        net.init_weights()
    return nets


def networks(config: TrainConfig, device: torch.device) -> nn.ModuleDict:
    """{"model", optionally "spectrum"}, for a device."""
    if isinstance(config.model, GMDiTConfig):
        # On CPU the fused kernel's bf16 backward pass is five times slower than plain matrix products.
        model = GMDiT(config.model, attention=explicit_attention if device.type == "cpu" else sdpa)
    else:
        model = GMMLP(config.model)
    nets = nn.ModuleDict({"model": model})
    if config.spectrum is not None:
        nets["spectrum"] = SpectrumMLP(config.spectrum)
    return nets


def networks_of(config: TrainConfig, device: torch.device, state: dict[str, Tensor]) -> nn.ModuleDict:
    """Networks whose weights are the tensors of a state, not copied."""
    with torch.device("meta"):
        nets = networks(config, device)
    nets.load_state_dict(state, assign=True)
    return nets


def recompute_activations(model: GMDiT) -> None:
    """Let every block keep only its input and compute the rest again in the backward pass."""
    for block in model.transformer_blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# ---- what a step draws -------------------------------------------------------------------------

@dataclass(frozen=True)
class Inputs:
    """Everything random of a step, for a part of its batch."""

    x_0: Tensor                  # (B,C,*S)
    labels: Tensor | None        # (B,), dropped ones already null
    sigma: Tensor                # (B,)
    noises: tuple[Tensor, ...]   # (B,C,*S) each: one for l2; for a transition those of x_low and of x_high

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        labels = None if self.labels is None else function(self.labels)
        return Inputs(function(self.x_0), labels, function(self.sigma), tuple(map(function, self.noises)))

    def split(self, parts: int) -> list[Inputs]:
        size = len(self.sigma) // parts
        slices = (slice(i * size, (i + 1) * size) for i in range(parts))
        return [self.map(itemgetter(piece)) for piece in slices]


def step_generator(seed: int, step: int) -> torch.Generator:
    """All randomness of a step, so that a resumed run draws what an uninterrupted one would."""
    return torch.Generator().manual_seed((seed << 32) + step)


def step_inputs(config: TrainConfig, data: Dataset, step: int, part: slice = slice(None)) -> Inputs:
    """The inputs of a step. All of its batch is drawn, whatever part is asked for:
    the draws are the same in any team."""
    n, generator = config.batch_size, step_generator(config.seed, step)
    choice = data.choose(n, generator)
    normal = config.time_distribution == "logit-normal"
    draws = torch.randn(n, generator=generator) if normal else torch.rand(n, generator=generator)
    sigma = training_sigmas(draws, config.time_distribution, config.time_shift, config.time_mean, config.time_std)
    dropped = torch.rand(n, generator=generator) < config.label_dropout if data.class_names is not None else None
    count = 1 if config.loss == "l2" else 2
    noises = tuple(torch.randn((n, *data.shape), generator=generator)[part] for _ in range(count))
    x_0, labels = data.fetch(choice[part])
    if labels is not None:
        labels = torch.where(dropped[part], config.model.null_label, labels)
    return Inputs(x_0, labels, sigma[part], noises)


# ---- losses ------------------------------------------------------------------------------------

def losses(nets: nn.ModuleDict, config: TrainConfig, inputs: Inputs) -> dict[str, Tensor]:
    """``loss`` (B,), to be averaged; its terms, ``sigma`` and what the log wants to know of the mixtures,
    a row a sample."""
    x_0, labels, sigma = inputs.x_0, inputs.labels, inputs.sigma
    if config.loss == "l2":
        (noise,) = inputs.noises
        velocity = predict(nets["model"], add_noise(x_0, noise, sigma), sigma, labels, config.precision)
        return {"sigma": sigma, "loss": mixture_nll(velocity, noise - x_0)}
    sigma_low, x_low, x_high = transition_pair(x_0, sigma, config.transition_ratio, *inputs.noises)
    velocity = predict(nets["model"], x_high, sigma, labels, config.precision)
    transition = config.transition_weight * transition_loss(velocity, x_high, sigma, x_low, sigma_low)
    others = {}
    if "spectrum" in nets:
        others["spectral"] = config.spectral_weight * spectral_loss(velocity, x_0, x_high, sigma, nets["spectrum"])
    if config.mean_weight:
        others["mean"] = config.mean_weight * mean_loss(velocity, x_0, x_high, sigma)
    terms = {"sigma": sigma, "loss": sum(others.values(), transition)}
    if others:
        terms |= {name: term.detach() for name, term in {"transition": transition, **others}.items()}
    return terms | usage(velocity)


class Objective(nn.Module):
    """:func:`losses` as a module, which is what a team can wrap."""

    def __init__(self, nets: nn.ModuleDict, config: TrainConfig):
        super().__init__()
        self.nets, self.config = nets, config

    def forward(self, inputs: Inputs) -> dict[str, Tensor]:
        return losses(self.nets, self.config, inputs)


def predict(model: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None, precision: str) -> GaussianMixture:
    """The velocity mixture, the network under autocast and the mixture in float32."""
    # A weight is used once: a cache of bf16 copies would only keep all of them until the end.
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        packed = model(x, sigma, labels)
    return model.mixture(packed)


def usage(velocity: GaussianMixture) -> dict[str, Tensor]:
    """``entropy`` (B,) of the weights in nats, averaged over pixels, and ``weights`` (B,K), so averaged."""
    log_weights = velocity.log_weights.detach().flatten(2)                     # (B,K,N)
    if log_weights.shape[1] == 1:
        return {}
    weights = log_weights.exp()
    return {"entropy": -(weights * log_weights).sum(1).mean(1), "weights": weights.mean(2)}


# ---- numbers -----------------------------------------------------------------------------------

def tally(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the samples with their number in the last place: they add up over parts of a batch.

    ``loss_q0`` to ``loss_q3`` are the loss in each quarter of sigma.
    """
    def total(value: Tensor, chosen: Tensor) -> Tensor:
        value = value.detach().float().flatten(1) if value.ndim > 1 else value.detach().float()[:, None]
        return torch.cat([torch.where(chosen[:, None], value, 0).sum(0), chosen.sum()[None].to(value)])

    quarter = (terms["sigma"] * 4).long().clamp(max=3)
    sums = {name: total(value, quarter >= 0) for name, value in terms.items() if name != "sigma"}
    return sums | {f"loss_q{q}": total(terms["loss"], quarter == q) for q in range(4)}


def averaged(sums: dict[str, Tensor]) -> dict[str, float]:
    """Means of a tally. ``components`` is how many components the batch uses: exp of the mean weights' entropy."""
    lists = {name: value.tolist() for name, value in sums.items()}
    means = {name: [x / count for x in values] for name, (*values, count) in lists.items() if count}
    shares = means.pop("weights", None)
    numbers = {name: value for name, (value,) in means.items()}
    if shares:
        numbers["components"] = math.exp(-sum(w * math.log(w) for w in shares if w > 0))
    return numbers


# ---- optimizer ---------------------------------------------------------------------------------

def parameter_groups(nets: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices, none on biases."""
    matrices = [p for p in nets.parameters() if p.ndim > 1]
    vectors = [p for p in nets.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(config: TrainConfig, nets: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a run; ValueError if its package is not installed."""
    groups, options = parameter_groups(nets, config.weight_decay), {"lr": config.lr, "betas": config.betas}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    for package in ("bitsandbytes", "torchao") if device.type == "cuda" else ("torchao",):
        try:
            return import_module(f"{package}.optim").AdamW8bit(groups, **options)
        except ImportError:
            pass
    raise ValueError(f"optimizer adamw8bit on {device.type} needs a package: python -m pip install "
                     f"{'bitsandbytes' if device.type == 'cuda' else 'torchao'}; or --set optimizer=adamw")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's are tensors and must stay the same ones
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up; then constant, or a cosine to zero at the last step, or constant until the last ``cooldown``
    steps and there lr (1 - sqrt(the share of them that is done)) (Haegele et al. 2024)."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.lr_decay == "constant":
        return config.lr * warm
    if config.lr_decay == "cooldown":
        return config.lr * warm * (1 - math.sqrt(max(0, step - config.steps + config.cooldown) / config.cooldown))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def update_ema(ema: nn.Module, nets: nn.Module, decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) weights, with d = min(decay, (1 + n)/(10 + n)) so that it forgets the start."""
    decay = min(decay, (1 + step) / (10 + step))
    averages = list(ema.parameters())
    torch._foreach_lerp_(averages, [p.detach().to(averages[0].device) for p in nets.parameters()], 1 - decay)
