"""Images that training never sees, and how well the moving average does on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn

from gmflow_core.path import add_noise

from .config import TrainConfig
from .data.dataset import Dataset
from .step import averaged, losses, predict, step_inputs, tally

DRAWS, PIECE = 256, 32  # held-out samples that are looked at, and so many at a time


@dataclass(frozen=True, eq=False)
class Part(Dataset):
    """Some samples of a data set."""

    whole: Dataset
    indices: Tensor  # (n,) of its samples

    @property
    def latent_space(self):
        return self.whole.latent_space

    @property
    def class_names(self):
        return self.whole.class_names

    @property
    def shape(self):
        return self.whole.shape

    @property
    def sources(self):
        return self.whole.sources

    def __len__(self) -> int:
        return len(self.indices)

    def choose(self, size: int, generator: Generator) -> Tensor:
        choice = self.whole.choose(size, generator)
        choice[:, 0] = self.indices[torch.randint(len(self), (size,), generator=generator)]
        return choice

    def fetch(self, choice: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.whole.fetch(choice)


def split(data: Dataset, config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """What to train on, and the share ``config.holdout`` of the data, chosen by the seed, that is held out, or None."""
    if not config.holdout:
        return data, None
    if not len(data):
        raise ValueError(f"data {config.data} is made up as it is drawn: every sample is new, nothing can be held out")
    count = round(config.holdout * len(data))
    if not 0 < count < len(data):
        raise ValueError(f"holdout {config.holdout:g} of {len(data)} samples is {count}: each side needs one at least")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
    return Part(data, order[count:].sort().values), Part(data, order[:count].sort().values)


@torch.no_grad()
def held_out_figures(nets: nn.ModuleDict, config: TrainConfig, held: Dataset, device: torch.device) -> dict[str, float]:
    r"""``holdout_loss``, the training loss of held-out samples; but for l2 also ``holdout_nll``, their -log q(u | x_t)
    in nats a pixel over evenly spaced sigma. Samples, noises and sigmas are the same at every call.
    """
    config = replace(config, batch_size=DRAWS, label_dropout=0.0)
    inputs = step_inputs(config, held, 0).map(lambda value: value.to(device))
    sums, nll, steps = {}, 0.0, DRAWS // PIECE
    for i, piece in enumerate(inputs.split(steps)):
        terms = losses(nets, config, piece)
        sums = {name: sums.get(name, 0) + value for name, value in tally(terms).items()}
        sigma = (torch.arange(i, DRAWS, steps, device=device) + 0.5) / DRAWS  # every piece sees all of the clock
        x_t = add_noise(piece.x_0, piece.noises[0], sigma)
        velocity = predict(nets["model"], x_t, sigma, piece.labels, config.precision)
        nll -= velocity.log_prob(piece.noises[0] - piece.x_0).mean().item() / steps
    found = {"holdout_loss": averaged(sums)["loss"]}
    return found if config.loss == "l2" else found | {"holdout_nll": nll}
