"""Shared pieces of the command line: arguments with clear errors, images of a checkpoint."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .denoiser import GMDenoiser
from .echo import Conditioned
from .evidence import Evidence
from .files import one_line
from .guidance import PUBLISHED_SCALE
from .hints import hint, small_picture
from .noise import ImageNoise
from .pictures import read_picture
from .sampler import SamplerOptions, sample
from .schedule import flow_sigmas


class UsageError(Exception):
    """A bad argument: printed as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str):
        raise UsageError(f"{message} (see {self.prog} --help)")


# What files, devices and settings cause: told in one line. All else is a mistake of the program.
USER_ERRORS = (UsageError, ValueError, OSError, RuntimeError, MemoryError, FloatingPointError, ImportError)


def run_command(action: Callable[[], int | None], stopped: str = "stopped") -> int:
    """The exit code of a command: what its user can cause is one line on stderr and 2, Ctrl-C is 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know nothing but ASCII
    try:
        return action() or 0
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        print(f'error: {error.name} is not installed: python -m pip install -e ".[standalone]"', file=sys.stderr)
    except USER_ERRORS as error:
        print(f"error: {one_line(error, 2000)}", file=sys.stderr)
    return 2


def open_device(name: str | None) -> torch.device:
    """The device of ``--device``, by default CUDA where there is one. UsageError unless tensors can be put there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def number(kind, low, high=None, *, high_open: bool = False):
    """An argparse type: an int or float within [low, high] (or [low, high))."""
    def parse(text: str):
        try:
            value = kind(text)
            good = low <= value and (high is None or (value < high if high_open else value <= high))
        except ValueError:
            good = False
        if not good:
            closing = ")" if high_open else "]"
            bounds = f">= {low}" if high is None else f"in [{low}, {high}{closing}"
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bounds}")
        return value
    return parse


@torch.no_grad()
def sample_images(
    checkpoint: Checkpoint,
    labels: list[int] | None,
    options: SamplerOptions = SamplerOptions(),  # noqa: B008  it is frozen
    *,
    count: int | None = None,
    steps: int = 8,
    guidance: float = PUBLISHED_SCALE,
    orthogonal: float = 1.0,
    guidance_tilt: str = "published",
    evidence: Evidence | Conditioned | None = None,
    seed: int = 0,
    batch_size: int = 64,
    callback=None,
) -> Tensor:
    """Images (or points) (N,C,*S), one per label. ``callback(StepInfo)`` runs at every network step."""
    total = len(labels) if labels is not None else count or 0
    device = next(checkpoint.model.parameters()).device
    sigmas, parts = flow_sigmas(steps, options.shift), []
    for start in range(0, total, batch_size):
        indices = range(start, min(start + batch_size, total))
        noise = ImageNoise(seed, indices, sample_shape(checkpoint), device)
        chosen = None if labels is None else torch.tensor([labels[i] for i in indices], device=device)
        scale = guidance if labels is not None else 0.0
        denoiser = GMDenoiser(checkpoint.model, chosen, scale, orthogonal, tilt=guidance_tilt, evidence=evidence)
        x = sample(
            denoiser, noise(), sigmas, options, spectrum=checkpoint.spectrum, noise_sampler=noise, callback=callback
        )
        parts.append(x.cpu())
    return torch.cat(parts)


def sample_shape(checkpoint: Checkpoint) -> tuple[int, ...]:
    """(C,H,W) of an image model, (2,) of a 2D one."""
    config = checkpoint.config
    size = config.sample_size
    return (config.in_channels,) if size is None else (config.in_channels, size, size)


# ---- pictures as evidence ----------------------------------------------------------------------

EVIDENCE_STDS = {"hint": 0.05, "grey": 0.05, "small": 0.02}  # option -> how far it may be off


def read_evidence(args, checkpoint: Checkpoint) -> Conditioned | None:
    """What --hint, --grey and --small say; None if nothing was given.
    UsageError for pictures that do not suit the model."""
    files = {name: getattr(args, name) for name in EVIDENCE_STDS}
    for name, path in files.items():
        if path is None and getattr(args, f"{name}_std") is not None:
            raise UsageError(f"--{name}-std is of the picture that --{name} names, and there is none")
    if not any(files.values()):
        if args.no_propagate:
            raise UsageError("--no-propagate is about --hint, --grey and --small, and none is given")
        return None
    config, found = checkpoint.config, None
    if config.sample_size is None or config.in_channels != 3 or checkpoint.latent_space.kind != "rgb":
        raise UsageError("--hint, --grey and --small are about RGB pictures, and this model makes none")
    size = (config.sample_size, config.sample_size)
    for name, path in files.items():
        if path is None:
            continue
        try:
            picture, alpha = read_picture(path)
        except OSError as error:
            raise UsageError(f"--{name} {path}: cannot be read as a picture ({error})") from None
        if name != "small" and tuple(picture.shape[-2:]) != size:
            width, height = picture.shape[-1], picture.shape[-2]
            raise UsageError(f"--{name} {path}: {width} x {height} pixels; this model makes {size[1]} x {size[0]}")
        std = getattr(args, f"{name}_std") or EVIDENCE_STDS[name]
        try:
            if name == "small":
                part = small_picture(picture, size, std)
            else:
                part = hint(picture, alpha, "colour" if name == "hint" else "brightness", std)
        except ValueError as error:
            raise UsageError(f"--{name} {path}: {error}") from None
        found = part if found is None else found + part
    return None if found is None else Conditioned(found, propagate=not args.no_propagate)
