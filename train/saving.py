"""Saving while training goes on: the training thread copies tensors to the host, another thread writes the copies."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .team import whole


class HostCopies:
    """Copies of a state's tensors on the host, in buffers that are made once and filled again by every save.

    They stay for the whole run: 16 bytes a parameter of a run with AdamW. For CUDA they are page-locked.
    """

    def __init__(self, device: torch.device):
        self.device, self.buffers = device, {}

    def take(self, state, keep: bool = True):
        """The same nested state with copies for tensors, whole ones for shared-out ones:
        for that, all of a team must ask.

        Without ``keep`` nothing is copied: a member of the team that only lends its parts.
        """
        copied = self._copy(state, (), keep)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copied

    def _copy(self, value, place: tuple, keep: bool):
        if isinstance(value, dict):
            return {key: self._copy(item, (*place, key), keep) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item, (*place, i), keep) for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        value = whole(value)
        if not keep:
            return None
        if type(value) is not Tensor:  # those of quantised optimizers
            return value.detach().to("cpu", copy=True)
        pinned = self.device.type == "cuda"
        if place not in self.buffers:
            self.buffers[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
        return self.buffers[place].copy_(value, non_blocking=pinned)


class Background:
    """A thread for one job at a time; what a job raises is raised again by ``wait`` or ``check``."""

    def __init__(self):
        self.pool, self.job = ThreadPoolExecutor(1), None

    def start(self, job: Callable[[], None]) -> None:
        self.wait()
        self.job: Future | None = self.pool.submit(job)

    def wait(self) -> None:
        """Until the job is done."""
        job, self.job = self.job, None
        if job is not None:
            job.result()

    def check(self) -> None:
        """Raise what the job raised, if it is done."""
        if self.job is not None and self.job.done():
            self.wait()
