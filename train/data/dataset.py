"""Training data. A dataset draws a batch from a generator, so that step n of a run is always the same batch."""

from __future__ import annotations

from torch import Generator, Tensor

from gmflow_core.model import LatentSpace


class Dataset:
    """What a trainer needs to know: ``latent_space``, ``class_names`` (None: no labels), the ``shape`` of a sample.

    A batch comes in two halves, so that a process can fetch its part of it alone: ``choose`` is cheap,
    ``fetch`` may have to read files.
    """

    latent_space: LatentSpace
    class_names: tuple[str, ...] | None
    shape: tuple[int, ...]
    sources: dict | None = None  # where the samples come from and under which licences, for the checkpoint

    def __len__(self) -> int:
        """The number of different samples; 0 where they are made up."""
        return 0

    def choose(self, size: int, generator: Generator) -> Tensor:
        """The choice of a batch: (size, ...), a row a sample."""
        raise NotImplementedError

    def fetch(self, choice: Tensor) -> tuple[Tensor, Tensor | None]:
        """Samples (B, *shape) float32 and labels (B,) of some rows of a choice."""
        raise NotImplementedError

    def batch(self, size: int, generator: Generator) -> tuple[Tensor, Tensor | None]:
        return self.fetch(self.choose(size, generator))
