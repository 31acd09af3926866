r"""The mixtures of one call of a guider: handed over, gathered, made posteriors. Without a host.

Shapes: B batch, K components, C channels, ``*S`` space.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..gmflow_core import Gaussian, GaussianMixture, Guided, Mixture, unguided, velocity_to_posterior
from ..gmflow_core.echo import Sigma
from ..gmflow_core.model import unpack_mixture
from .adapter_info import AdapterInfo
from .model_info import ModelInfo
from .patches import evaluating

CAPTURE = "gmflow_capture"   # in transformer_options
ROUNDING = 1e-4              # of a mean that the host computes beside ours


class Capture:
    """One call of a guider: x (B,C,*S), in the mixture's space, and sigma as it got them; mixtures by conditioning.

    Of several evaluations for one id the first counts: patches that evaluate again, perturbed or on parts, come after
    the guider's own. Evaluations of another size than x are only noted. A host may evaluate in several threads.
    """

    def __init__(self, x: Tensor, timestep: Tensor) -> None:
        self.x, self.sigma = x.float().clone(), level(timestep)  # a patch may write to x later
        self.packed: dict[object, Tensor] = {}      # id -> means, logits and log_std in one tensor
        self.parts: tuple[int, ...] | None = None   # shape of an evaluation of another size
        self.guided: Guided | None = None           # if a guider made it
        self.mean: Tensor | None = None             # what the guider answered
        self._lock = threading.Lock()

    def add(self, packed: Tensor, ids: Sequence) -> None:
        """Keep a batch (n B,...) of n chunks, one for each id."""
        with self._lock:
            if packed.shape[0] != len(ids) * len(self.x) or packed.shape[2:] != self.x.shape[2:]:
                self.parts = (packed.shape[0] // len(ids), *packed.shape[2:])
                return
            for name, chunk in zip(ids, packed.chunk(len(ids)), strict=True):
                self.packed.setdefault(name, chunk)


def level(timestep: Tensor) -> Sigma:
    """The sigma of all images, or (B,) where evidence made them differ."""
    values = timestep.flatten()
    return float(values[0]) if bool((values == values[0]).all()) else values


@torch.compiler.disable  # a compiled network would expect the capture of its first call
def hand_over(packed, transformer_options: dict) -> None:
    """A network's output to the capture, if somebody wants it."""
    capture = transformer_options.get(CAPTURE)
    if capture is not None:
        capture.add(packed, transformer_options["uuids"])


@contextmanager
def placed(options: dict, name: str, value) -> Iterator[None]:
    """``options[name] = value`` for a while. In place: patches keep their own state in the very same dict."""
    before = options.get(name, placed)
    options[name] = value
    try:
        yield
    finally:
        if before is placed:
            options.pop(name, None)
        else:
            options[name] = before


def capturing(model_options: dict, capture: Capture):
    """A context in which the network hands its mixtures to ``capture``."""
    return placed(model_options.setdefault("transformer_options", {}), CAPTURE, capture)


def gather(
    capture: Capture, conds: list[dict], info: ModelInfo | AdapterInfo, role: str, model_options: dict, who: str
) -> Mixture:
    """The x_0 posterior of one role's conditionings, several of them pooled by strength; ValueError if there is none.

    ``who`` needs it, as the message says.
    """
    found = [cond for cond in conds if cond["uuid"] in capture.packed]
    parts = found or (conds if capture.parts is not None else [])
    if any("area" in cond or "mask" in cond for cond in parts):
        raise ValueError(
            f"{role}: {who} takes conditionings of the whole image; remove the area or mask, "
            "or use a core guider with a core sampler"
        )
    if not found:
        raise ValueError(f"{role}: {who} needs the mixture of the whole image, but {_absent(capture, model_options)}")
    packed = [capture.packed[cond["uuid"]].to(capture.x.device) for cond in found]
    velocities = [unpack_mixture(output, info.components) for output in packed]
    posteriors = [velocity_to_posterior(velocity, capture.x, capture.sigma) for velocity in velocities]
    return pool(posteriors, [cond.get("strength", 1.0) for cond in found])


def _absent(capture: Capture, model_options: dict) -> str:
    """Why there is no mixture of a conditioning, and what to do."""
    patches = evaluating(model_options)
    if capture.parts is not None:
        got, whole = (f"{shape[0]} x {' x '.join(map(str, shape[1:]))}" for shape in
                      (capture.parts, (len(capture.x), *capture.x.shape[2:])))
        return (f"the network saw parts (batch {got} of {whole}) because of {patches or 'a patch'}; remove that node, "
                "or use a core sampler with a core guider")
    return (f"the network was not asked for it at sigma {capture.sigma:.3f}; a conditioning without a range for this "
            f"step, or a patch that skips the network ({patches or 'EasyCache'}), does not go with it")


def pool(mixtures: Sequence[Mixture], strengths: Sequence[float]) -> Mixture:
    r"""sum_i s_i q_i with s = strengths / sum: the components of all, with v = sum_i s_i v_i.

    One shared v keeps the mean and the isotropic variance of the sum exact at every pixel.
    """
    if len(mixtures) == 1:
        return mixtures[0]
    if not (min(strengths) >= 0 and sum(strengths) > 0):
        raise ValueError(f"conditionings to combine need strengths >= 0 that are not all 0, got {list(strengths)}")
    shares = mixtures[0].means.new_tensor(strengths) / sum(strengths)
    var = torch.stack([share * (2 * m.log_std).exp() for share, m in zip(shares, mixtures, strict=True)]).sum(0)
    logits = torch.cat([m.log_weights + share.log() for share, m in zip(shares, mixtures, strict=True)], dim=1)
    return GaussianMixture(torch.cat([m.means for m in mixtures], dim=1), logits, 0.5 * var.log())


def moved(posterior: Mixture, mean: Tensor) -> Mixture:
    """The posterior shifted as a whole so that its mean is ``mean`` (B,C,*S): what vanilla CFG does to a mixture."""
    return posterior.shifted(mean - posterior.mean())


def followed(posterior: Mixture, mean: Tensor) -> Mixture:
    """The posterior, moved to the host's ``mean`` if a patch changed the network's answer past the hand-over."""
    return posterior if torch.allclose(posterior.mean(), mean, ROUNDING, ROUNDING) else moved(posterior, mean)


def guided_by_mean(posterior: Mixture, mean: Tensor) -> Guided:
    """A conditional posterior and the mean that somebody else's guidance made of it."""
    return unguided(moved(posterior, mean))


def shifted(guided: Guided, mean: Tensor) -> Guided:
    """All of a guided posterior moved so that its mean is ``mean`` (B,C,*S): base, anchor and target too."""
    shift = mean - guided.posterior.mean()

    def move(gaussian: Gaussian) -> Gaussian:
        return Gaussian(gaussian.mean + shift, gaussian.var)

    return replace(
        guided, posterior=moved(guided.posterior, mean), base=moved(guided.base, guided.base.mean() + shift),
        anchor=move(guided.anchor), target=move(guided.target),
    )
