"""Several processes that do one work, as torchrun starts them; without torchrun a team of one."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from textwrap import shorten
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gmflow_core.cli import USER_ERRORS, open_device
from gmflow_core.files import one_line

from .console import say

T = TypeVar("T")


def launched() -> tuple[int, int, int]:
    """(rank, rank on this machine, size) as torchrun's environment says; (0, 0, 1) without it.

    A ``WORLD_SIZE`` alone, which some shell or scheduler left, makes no team: nobody else would come.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    try:
        if "RANK" in os.environ:
            return int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0)), int(size)
    except ValueError:
        raise ValueError(f"WORLD_SIZE={size}, RANK={os.environ['RANK']} in the environment are no numbers; "
                         "torchrun sets them, else unset them") from None
    if size != "1":
        say(f"WORLD_SIZE={size} is set without RANK: not torchrun's, ignored")
    return 0, 0, 1


@dataclass(frozen=True)
class Team:
    """This process's place. Each member works on its part of every batch; the first alone writes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str | None, patience: timedelta | None = None) -> Team:
        """The team that torchrun's environment names, on the device asked for: by default CUDA where there is one.

        ``patience``: how long members wait for one another before they give up (default: PyTorch's).
        """
        _, local, size = launched()
        if size == 1:
            return cls(open_device(device))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise ValueError(f"process {local} of this machine has no GPU of its own, "
                                 f"there are {torch.cuda.device_count()}: "
                                 "start no more processes (--nproc_per_node) than GPUs, or give --device cpu")
            torch.cuda.set_device(local)
            device = f"cuda:{local}"
        elif device != "cpu":
            raise ValueError(f"several processes work on cuda or cpu, not on {device}")
        # Its default arguments hold the group that is there when it is imported, and that group's threads, for ever.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=patience)
        return cls(torch.device(device), dist.get_rank(), size)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """This member's samples of a batch."""
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, module: nn.Module) -> nn.Module:
        """A module whose backward pass averages gradients over the team (DDP): every member has all parameters."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def share_out(self, nets: nn.ModuleDict) -> None:
        """Networks of which every member keeps a part of each parameter, in float32 (FSDP2).

        A block is gathered when it is needed and given up again, and the backward pass averages gradients. Autocast
        casts what was gathered, so that all else is computed as without: FSDP's own mixed precision would round sigma.
        ValueError before PyTorch 2.9, which adds gradients up where the backend is gloo.
        """
        if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
            raise ValueError(f"parallel=fsdp needs PyTorch 2.9 or later, this is {torch.__version__}: "
                             "update it, or --set parallel=ddp")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # A spectrum is a view, which nobody writes into.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.size,))
        for net in nets.values():
            for part in (*getattr(net, "transformer_blocks", ()), net):
                fully_shard(part, mesh=mesh)

    @contextmanager
    def alone(self, module: nn.Module, yes: bool) -> Iterator[None]:
        """A context in which, if ``yes``, the backward pass keeps its gradients to itself."""
        for part in module.modules():
            if hasattr(part, "set_requires_gradient_sync"):  # of FSDP2
                part.set_requires_gradient_sync(not yes, recurse=False)
        with module.no_sync() if yes and isinstance(module, DistributedDataParallel) else nullcontext():
            yield

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor summed over the team."""
        if self.size == 1:
            return values
        flat = torch.cat([value.flatten() for value in values.values()])
        dist.all_reduce(flat)
        parts = flat.split([value.numel() for value in values.values()])
        return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}

    def any(self, flag) -> bool:
        """True for every member if it is for one."""
        if self.size == 1:
            return bool(flag)
        flags = torch.tensor([float(bool(flag))], device=self.device)
        return bool(self.sum({"flag": flags})["flag"] > 0)

    def agree(self, facts: dict, hint: str) -> None:
        """ValueError that says in what the members' facts differ, if they do:
        they would wait for each other forever."""
        if self.size == 1:
            return
        theirs: list[dict] = [{}] * self.size
        dist.all_gather_object(theirs, facts)
        for rank, other in enumerate(theirs):
            if other != theirs[0]:
                differ = [name for name in facts if other[name] != theirs[0][name]]
                found = "; ".join(f"{name} {shorten(str(theirs[0][name]), 60)} and {shorten(str(other[name]), 60)}"
                                  for name in differ)
                raise ValueError(f"processes 0 and {rank} do not agree ({found}): {hint}")

    def wait(self) -> None:
        """Until all members are here."""
        if self.size > 1:
            dist.barrier()

    # ---- one work, done together ---------------------------------------------------------------

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The first alone speaks. Others end in silence where it has to tell why: stopped, or their team is gone."""
        if self.first:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            try:
                yield
            except KeyboardInterrupt:
                raise SystemExit(130) from None
            except USER_ERRORS:
                raise SystemExit(2) from None

    def together(self, work: Callable[..., T], *given) -> T:
        """What ``work(*given)`` returns, to each member its own. If it fails in one, the first says so in one line
        (of a mistake of the program the traceback), and all end."""
        if self.size == 1:
            return work(*given)
        result, error = None, ""
        try:
            result = work(*given)
        except USER_ERRORS as fault:
            error = f"error: {one_line(fault, 2000)}"
        except Exception:
            error = traceback.format_exc()
        errors = [""] * self.size
        dist.all_gather_object(errors, error)
        if not any(errors):
            return result  # type: ignore[return-value]
        if self.first:
            rank = next(rank for rank, error in enumerate(errors) if error)
            say(errors[rank] + (f" (process {rank} of {self.size})" if rank else ""))
        dist.barrier()  # torchrun ends the others when one has ended
        raise SystemExit(2)

    def at_first(self, work: Callable[..., T], *given) -> T | None:
        """What ``work(*given)`` returns in the first, which alone does it; None elsewhere."""
        return self.together(lambda: work(*given) if self.first else None)

    def share(self, work: Callable[..., T], *given) -> T:
        """What ``work(*given)`` returns in the first, which alone does it, to all."""
        box = [self.at_first(work, *given)]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]  # type: ignore[return-value]

    def in_turn(self, parts: Sequence, work: Callable[[int], T], **bar) -> Iterator[T]:
        """``work(i)`` of every part, in their order, at the first; nothing elsewhere. Members take parts in turn, all
        have to ask. ``bar``: of the progress bar, which counts parts."""
        with tqdm(total=len(parts), leave=False, disable=not self.first, **bar) as shown:
            for start in range(0, len(parts), self.size):
                mine = start + self.rank
                found = [self.together(lambda i: work(i) if i < len(parts) else None, mine)]
                if self.size > 1:
                    theirs: list | None = [None] * self.size if self.first else None
                    dist.gather_object(found[0], theirs)
                    found = theirs or []
                count = len(parts[start : start + self.size])
                yield from found[:count]  # type: ignore[misc]
                shown.update(count)


def whole(value: Tensor) -> Tensor:
    """A tensor, gathered if it is shared out: then all of the team must ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def share_of(value: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`whole`: a whole tensor shared out as ``like`` is, if it is."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def leave() -> None:
    """The end of a team, if there is one."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # what still holds the group
        dist.destroy_process_group()


def leaving(command: Callable[[], int]) -> int:
    """The exit code of a command that may have joined a team, which it has left then.

    It leaves when nothing uses the group any more, not even a traceback: a group that is held keeps its threads, and
    one that is busy as the interpreter ends aborts the process.
    """
    try:
        code, ended = command(), False
    except SystemExit as end:
        code, ended = end.code, True
    finally:
        leave()
    if ended:
        sys.exit(code)
    return code  # type: ignore[return-value]
