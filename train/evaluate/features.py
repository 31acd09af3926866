"""Feature networks for FID, precision and recall: Inception of torch-fidelity, and a small classifier of the digits.

A feature network is a function of pixels (N,3,H,W) uint8 that returns features (N,D) on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.digits import INKS, Digits

Features = Callable[[Tensor], Tensor]

STEPS, BATCH = 600, 128  # the digits classifier's recipe


def inception(weights: str | Path | None, device: torch.device) -> Features:
    """The 2048 features of FID's own Inception v3, as torch-fidelity has it.

    ``weights``: its file; None lets torch-fidelity download it. ValueError without the package or the file.
    """
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"--inception {weights}: no such file; "
                         "expected torch-fidelity's weights-inception-2015-12-05-6726825d.pth")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise ValueError("FID of images needs torch-fidelity: "
                         f"python -m pip install torch-fidelity ({error})") from None
    try:
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights and str(weights)).to(device)
    except Exception as error:  # whatever a download or a foreign file raises
        hint = "name a local file with --inception" if weights is None else "expected torch-fidelity's own file"
        raise ValueError(f"Inception's weights cannot be read: {' '.join(str(error).split())[:200]}; {hint}") from None

    @torch.no_grad()
    def features(pixels: Tensor) -> Tensor:
        if pixels.shape[1] != 3:
            pixels = pixels.expand(-1, 3, -1, -1)
        return net(pixels.to(device))[0].float().cpu()

    return features


class DigitsNet(nn.Module):
    """Reads class and ink of a 16x16 picture; its 64 features are what both are read from."""

    def __init__(self):
        super().__init__()
        conv = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1), nn.SiLU())  # noqa: E731
        self.trunk = nn.Sequential(conv(3, 16, 1), conv(16, 32, 2), conv(32, 64, 2), conv(64, 64, 1))
        self.features = nn.Linear(64 * 16, 64)
        self.heads = nn.Linear(64, 10 + len(INKS))

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels (N,3,16,16) uint8 to features (N,64), normalised: without that the ink outshouts the shape."""
        features = self.features(F.silu(self.trunk(pixels.float() / 127.5 - 1).flatten(1)))
        return F.layer_norm(features, features.shape[1:])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of class (N,10) and ink (N,6)."""
        return self.heads(F.silu(self.embed(pixels))).split([10, len(INKS)], dim=1)


def train_digits_net(data: Digits, seed: int = 0) -> DigitsNet:
    """The recipe: 600 steps of 128 digits in random inks, shifted by up to one pixel,
    AdamW 2e-3 with a cosine to zero."""
    from .image_metrics import quantise

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, generator = DigitsNet(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            choice = data.draw(BATCH, generator)
            images, labels = data.fetch(choice)
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            classes, inks = net(quantise(images.roll(shift, (2, 3))))
            loss = F.cross_entropy(classes, labels) + F.cross_entropy(inks, choice[:, 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def digits_features(data: Digits) -> Features:
    """The 64 features of a :class:`DigitsNet`, trained on the spot by its recipe."""
    net = train_digits_net(data)
    return lambda pixels: torch.cat([net.embed(part) for part in pixels.split(1024)])
