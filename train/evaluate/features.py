"""Feature networks for FID, precision and recall: Inception of torch-fidelity, and small classifiers of small pictures.

A feature network is a function of pixels (N,3,H,W) uint8 that returns features (N,D) on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gmflow_core.files import write_safetensors

from ..data.digits import INKS, Digits
from ..data.images import to_unit
from .image_metrics import mottling, quantise

if TYPE_CHECKING:
    from .reference import Images

Features = Callable[[Tensor], Tensor]
T = TypeVar("T")

STEPS, BATCH = 600, 128  # the classifiers' recipe
FIELDS = 27              # a picture's mean colours in 3 x 3 fields


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
                         f"python -m pip install torch-fidelity ({error}); it brings torchvision, "
                         "which has to suit the installed torch") from None
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


class PictureNet(nn.Module):
    """Reads S x S pictures; its 64 features are what all its outputs are read from."""

    def __init__(self, size: int, outputs: int):
        super().__init__()
        self.size = size
        conv = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1), nn.SiLU())  # noqa: E731
        self.trunk = nn.Sequential(conv(3, 16, 1), conv(16, 32, 2), conv(32, 64, 2), conv(64, 64, 1))
        self.features = nn.Linear(64 * (-(-size // 4)) ** 2, 64)
        self.heads = nn.Linear(64, outputs)

    def embed(self, pixels: Tensor) -> Tensor:
        """Pixels (N,3,S,S) uint8 to features (N,64), normalised: without that the colour outshouts the shape."""
        features = self.features(F.silu(self.trunk(pixels.float() / 127.5 - 1).flatten(1)))
        return F.layer_norm(features, features.shape[1:])

    def forward(self, pixels: Tensor) -> Tensor:
        """The outputs (N,outputs)."""
        return self.heads(F.silu(self.embed(pixels)))


def fit(net: PictureNet, loss: Callable[[], Tensor], steps: int) -> None:
    """AdamW at 2e-3 with a cosine to zero on the losses of fresh batches."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch (N,C,H,W) rolled by up to one pixel each way."""
    return images.roll(torch.randint(-1, 2, (2,), generator=generator).tolist(), (2, 3))


def of_pixels(net: PictureNet) -> Features:
    return lambda pixels: torch.cat([net.embed(part) for part in pixels.split(1024)])


# ---- the digits --------------------------------------------------------------------------------

class DigitsNet(PictureNet):
    """Reads class and ink of a 16x16 picture."""

    def __init__(self):
        super().__init__(16, 10 + len(INKS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of class (N,10) and ink (N,6)."""
        return super().forward(pixels).split([10, len(INKS)], dim=1)


def train_digits_net(data: Digits, seed: int = 0) -> DigitsNet:
    """The recipe: 600 steps of 128 digits in random inks, shifted by up to one pixel; see :func:`fit`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, generator = DigitsNet(), torch.Generator().manual_seed(seed)

        def loss() -> Tensor:
            choice = data.choose(BATCH, generator)
            images, labels = data.fetch(choice)
            classes, inks = net(quantise(shifted(images, generator)))
            return F.cross_entropy(classes, labels) + F.cross_entropy(inks, choice[:, 1])

        fit(net, loss, STEPS)
    return net


def digits_features(data: Digits) -> Features:
    """The 64 features of a :class:`DigitsNet`, trained on the spot by its recipe."""
    return of_pixels(train_digits_net(data))


# ---- small pictures of any classes -------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Classifier:
    """A network that reads the class of small pictures, and how well it reads those that it never saw."""

    net: PictureNet
    classes: int
    held_out: float  # the share of held-out real pictures that it reads right

    def read(self, pixels: Tensor) -> Tensor:
        """Classes (N,) of pixels (N,3,S,S) uint8."""
        return torch.cat([self.net(part)[:, : self.classes].argmax(1) for part in pixels.split(1024)])

    def judge(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """``accuracy``: the share of images (N,3,S,S) in [-1,1] that are read as the class asked for, labels (N,);
        and their mean :func:`mottling`."""
        pixels = quantise(images)
        right = self.read(pixels) == labels
        return {"accuracy": right.double().mean().item(), "mottling": mottling(pixels).mean().item()}


def train_classifier(images: Images, seed: int = 0) -> Classifier:
    """The recipe: nine tenths of the pictures, 600 steps of 128 of them, shifted by up to one pixel; see :func:`fit`.

    The outputs are the class (cross entropy) and the picture's mean in 3 x 3 fields (squared error), for the features
    should know of colours too, which the class does not ask for. They see no noise below a tenth of the range: that is
    what :func:`mottling` is for. ValueError without classes.
    """
    if images.labels is None or len(images) < 20:
        raise ValueError(f"--features classifier learns to tell classes apart: {images.name} must be a folder "
                         "with a subfolder for each class, of 20 images at least")
    classes = len(images.class_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        held, known = torch.randperm(len(images), generator=generator).tensor_split([len(images) // 10])
        net = PictureNet(images.pixels(known[:1]).shape[-1], classes + FIELDS)

        def loss() -> Tensor:
            index = known[torch.randint(len(known), (BATCH,), generator=generator)]
            pixels = shifted(images.pixels(index), generator)
            logits, fields = net(pixels).split([classes, FIELDS], dim=1)
            wanted = F.adaptive_avg_pool2d(to_unit(pixels), 3).flatten(1)
            return F.cross_entropy(logits, images.labels[index]) + F.mse_loss(fields, wanted)

        fit(net, loss, STEPS)
    read = torch.cat([Classifier(net, classes, 0.0).read(images.pixels(part)) for part in held.split(512)])
    return Classifier(net, classes, (read == images.labels[held]).double().mean().item())


def save_classifier(path: Path, classifier: Classifier, kind: str) -> None:
    """``kind`` says what it learnt from."""
    facts = {"kind": kind, "classes": str(classifier.classes), "size": str(classifier.net.size),
             "held_out": repr(classifier.held_out)}
    write_safetensors(path, dict(classifier.net.state_dict()), facts)


def load_classifier(path: Path, kind: str) -> Classifier | None:
    """A saved classifier; None if it is not there, damaged, or of other images."""
    return load_kept(path, kind, classifier_of)


def classifier_of(facts: dict[str, str], tensors: dict[str, Tensor]) -> Classifier:
    classes = int(facts["classes"])
    net = PictureNet(int(facts["size"]), classes + FIELDS)
    net.load_state_dict(tensors)
    return Classifier(net.eval().requires_grad_(False), classes, float(facts["held_out"]))


def load_kept(path: Path, kind: str, make: Callable[[dict[str, str], dict[str, Tensor]], T]) -> T | None:
    """What ``make`` reads from a file's facts and tensors; None if it is not there, damaged, or of another kind."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        return make(facts, load_file(path)) if facts.get("kind") == kind else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError):  # the last of load_state_dict
        return None
