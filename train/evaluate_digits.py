"""How good is a digits checkpoint? ``python -m train.evaluate_digits CHECKPOINT [--per-class 100]``

Every figure is taken against the 1,797 real digits: an SVM's recognition of the asked-for class, the
hue of the inked pixels, shares of classes and inks, and k-nearest-neighbour precision and recall.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow_core import Checkpoint, GMDenoiser, SecondOrder, flow_sigmas, load_checkpoint, sample_gm_ode, sample_gm_sde
from gmflow_core.schedule import default_substeps

from .data import INKS, Digits

INKED = 0.5        # a pixel is inked from this value (its largest channel in [0, 1]) on
HUE_TOLERANCE = 15  # degrees


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    solver: str          # gm-ode, gm-sde, euler
    steps: int
    guidance: float
    method: str = "probabilistic"
    correction_steps: int = 0


def grey8(images: Tensor) -> Tensor:
    """RGB (N,3,16,16) in [-1,1] to the SVM's features: the ink's strength on 8x8, 0 to 16. (N,64)"""
    value = (images.clamp(-1, 1).amax(1, keepdim=True) + 1) / 2
    return 16 * F.avg_pool2d(value, 2).flatten(1)


def train_svm(data: Digits):
    """scikit-learn's classic digits classifier, on real digits in white."""
    from sklearn.svm import SVC

    white = (2 * data.grey - 1).expand(-1, 3, -1, -1)
    return SVC(gamma=0.001, C=10).fit(grey8(white).numpy(), data.labels.numpy())


def hues(images: Tensor) -> tuple[Tensor, Tensor]:
    """Hue in degrees (NaN where grey) and the inked mask of RGB images in [-1,1], each (N,H,W)."""
    rgb = (images.clamp(-1, 1) + 1) / 2
    high, low = rgb.amax(1), rgb.amin(1)
    chroma = high - low
    r, g, b = rgb.unbind(1)
    sector = torch.where(high == r, (g - b) / chroma % 6, torch.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4))
    return torch.where(chroma > 0.1, 60 * sector, torch.nan), high >= INKED


def hue_figures(images: Tensor) -> dict[str, float]:
    """Of inked pixels: the share within 15 degrees of any ink, and of their own image's ink; and the inks' shares."""
    hue, inked = hues(images)
    centres = torch.arange(len(INKS)) * 60.0
    distance = (hue.unsqueeze(-1) - centres).abs()
    near = torch.minimum(distance, 360 - distance) <= HUE_TOLERANCE           # (N,H,W,6)
    near = near & inked.unsqueeze(-1)
    votes = near.sum((1, 2))                                                  # (N,6)
    total = inked.sum()
    shares = torch.bincount(votes.argmax(1), minlength=len(INKS)) / len(images)
    return {
        "on_palette": (votes.sum() / total).item(),
        "one_ink": (votes.amax(1).sum() / total).item(),
        "ink_min": shares.min().item(), "ink_max": shares.max().item(),
    }


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> dict[str, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) on 8x8 RGB pixels."""
    real, fake = (F.avg_pool2d(x.clamp(-1, 1), 2).flatten(1) for x in (real, fake))

    def covered(points: Tensor, manifold: Tensor) -> float:
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
        return (torch.cdist(points, manifold) <= radius).any(1).float().mean().item()

    return {"precision": covered(fake, real), "recall": covered(real, fake)}


@torch.no_grad()
def draw(checkpoint: Checkpoint, setting: Setting, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (N,3,16,16) and their labels (N,), ``per_class`` of each class."""
    labels = torch.arange(10).repeat_interleave(per_class)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for part in labels.split(250):
        denoiser = GMDenoiser(checkpoint.model, part, setting.guidance, method=setting.method)
        x = torch.randn((len(part), *Digits.shape), generator=generator)
        sigmas, second_order = flow_sigmas(setting.steps), SecondOrder(correction_steps=setting.correction_steps)
        if setting.solver == "euler":
            x = sample_gm_ode(denoiser, x, sigmas, order=1, substeps=1)
        elif setting.solver == "gm-ode":
            substeps = default_substeps(setting.steps)
            x = sample_gm_ode(denoiser, x, sigmas, substeps=substeps, second_order=second_order)
        else:
            noise = lambda s, t: torch.randn(x.shape, generator=generator)  # noqa: E731
            x = sample_gm_sde(denoiser, x, sigmas, spectrum=checkpoint.spectrum, noise_sampler=noise, second_order=second_order)
        images.append(x)
    return torch.cat(images), labels


def measure(checkpoint: Checkpoint, setting: Setting, data: Digits, svm, real: Tensor, per_class: int) -> dict:
    """All figures of one setting."""
    images, labels = draw(checkpoint, setting, per_class)
    guess = torch.from_numpy(svm.predict(grey8(images).numpy()))
    shares = torch.bincount(guess, minlength=10) / len(guess)
    return {
        "solver": setting.solver, "steps": setting.steps, "guidance": setting.guidance, "method": setting.method,
        "correction_steps": setting.correction_steps,
        "accuracy": (guess == labels).float().mean().item(),
        **hue_figures(images), "class_min": shares.min().item(), "class_max": shares.max().item(),
        **precision_recall(real, images),
    }


def settings_of(checkpoint: Checkpoint) -> list[Setting]:
    """The README's table: the mixture solvers, or Euler with vanilla CFG for a vanilla model."""
    if checkpoint.config.num_gaussians == 1:
        return [Setting("euler", n, w, "cfg") for w in (1.0, 2.0) for n in (1, 2, 4, 8, 32)]
    plain = [Setting(solver, n, w) for solver in ("gm-ode", "gm-sde") for w in (0.0, 0.3) for n in (1, 2, 4, 8)]
    return plain + [Setting("gm-ode", n, w, correction_steps=2) for w in (0.0, 0.3) for n in (2, 4, 8)]


COLUMNS = {
    "solver": "solver", "guidance": "guidance", "steps": "steps", "correction_steps": "corrections", "accuracy": "recognised", "on_palette": "on palette",
    "one_ink": "one ink", "precision": "precision", "recall": "recall", "ink_min": "rarest ink", "class_min": "rarest class",
}


def table(rows: list[dict]) -> str:
    """Markdown."""
    def cell(name: str, value) -> str:
        if name in ("solver", "steps", "guidance", "correction_steps"):
            return str(value)
        return f"{value:.2f}" if name in ("precision", "recall") else f"{100 * value:.1f} %"

    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(cell(n, row[n]) for n in COLUMNS) + " |" for row in rows])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m train.evaluate_digits", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--per-class", type=int, default=100, help="samples a class (default 100)")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    try:
        checkpoint = load_checkpoint(args.checkpoint)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = Digits.load()
    svm = train_svm(data)
    inks = torch.randint(len(INKS), (len(data.labels),), generator=torch.Generator().manual_seed(1))
    real = data.ink(data.grey, inks)
    rows = []
    for setting in settings_of(checkpoint):
        rows.append(measure(checkpoint, setting, data, svm, real, args.per_class))
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    print("\n" + table(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(rows, f, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
