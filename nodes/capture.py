r"""The mixtures of a network evaluation: handed over, gathered, made posteriors. Without a host.

Shapes: B batch, K components, C channels, ``*S`` space.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..gmflow_core import GaussianMixture, Guided, Mixture, unguided, velocity_to_posterior
from ..gmflow_core.model import unpack_mixture
from .adapter_info import AdapterInfo
from .model_info import ModelInfo

CAPTURE = "gmflow_capture"   # in transformer_options


class Capture:
    """Network outputs of one model evaluation, by the id of their conditioning; ``guided`` if a guider made it.

    A host may evaluate chunks in several threads.
    """

    def __init__(self) -> None:
        self.packed: dict[object, Tensor] = {}
        self.guided: Guided | None = None
        self._lock = threading.Lock()

    def add(self, packed: Tensor, ids: Sequence) -> None:
        """Keep a batch (n B,...) of n chunks, one for each id."""
        with self._lock:
            self.packed.update(zip(ids, packed.chunk(len(ids))))


@torch.compiler.disable  # a compiled network would expect the capture of its first call
def hand_over(packed, transformer_options: dict) -> None:
    """A network's output to the capture, if somebody wants it."""
    capture = transformer_options.get(CAPTURE)
    if capture is not None:
        capture.add(packed, transformer_options["uuids"])


def with_capture(model_options: dict, capture: Capture) -> dict:
    """A copy of the options in which the network hands its mixtures to ``capture``."""
    return model_options | {"transformer_options": model_options.get("transformer_options", {}) | {CAPTURE: capture}}


def gather(capture: Capture, conds: list[dict], info: ModelInfo | AdapterInfo, x, sigma: float, role: str):
    """The x_0 posterior of one role's conditionings, several of them pooled by strength; ValueError if there is none."""
    found = [cond for cond in conds if cond["uuid"] in capture.packed]
    if not found:
        raise ValueError(
            f"{role}: the network was not asked for it at sigma {sigma:.3f}, and a GM sampler needs its mixture; a conditioning "
            "without a range for this step, or a patch that skips the network (EasyCache), cannot be combined with it"
        )
    if any("area" in cond or "mask" in cond for cond in found):
        raise ValueError(
            f"{role}: GM samplers take conditionings of the whole image; remove the area or mask, "
            "or use a core guider with a core sampler"
        )
    packed = [capture.packed[cond["uuid"]].to(x.device) for cond in found]
    velocities = [unpack_mixture(output, info.components) for output in packed]
    posteriors = [velocity_to_posterior(velocity, x, sigma) for velocity in velocities]
    return pool(posteriors, [cond.get("strength", 1.0) for cond in found])


def pool(mixtures: Sequence[Mixture], strengths: Sequence[float]) -> Mixture:
    r"""sum_i s_i q_i with s = strengths / sum: the components of all, with v = sum_i s_i v_i.

    One shared v keeps the mean and the isotropic variance of the sum exact at every pixel.
    """
    if len(mixtures) == 1:
        return mixtures[0]
    if not (min(strengths) >= 0 and sum(strengths) > 0):
        raise ValueError(f"conditionings to combine need strengths >= 0 that are not all 0, got {list(strengths)}")
    shares = mixtures[0].means.new_tensor(strengths) / sum(strengths)
    var = sum(share * (2 * m.log_std).exp() for share, m in zip(shares, mixtures))
    logits = torch.cat([m.log_weights + share.log() for share, m in zip(shares, mixtures)], dim=1)
    return GaussianMixture(torch.cat([m.means for m in mixtures], dim=1), logits, 0.5 * var.log())


def moved(posterior: Mixture, mean: Tensor) -> GaussianMixture:
    """The posterior shifted as a whole so that its mean is ``mean`` (B,C,*S): what vanilla CFG does to a mixture."""
    shift = (mean - posterior.mean()).unsqueeze(1)
    return GaussianMixture(posterior.means + shift, posterior.log_weights, posterior.log_std)


def guided_by_mean(posterior: Mixture, mean: Tensor) -> Guided:
    """A conditional posterior and the mean that somebody else's guidance made of it."""
    return unguided(moved(posterior, mean))
