"""The one place that knows of devices without some of PyTorch's kernels (MPS, DirectML): the CPU does it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from torch import Tensor

LACKING: set[tuple[str, str]] = set()  # (function, type of device) that were tried


def portable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` of tensors on one device, run on the CPU where that device lacks one of its kernels.

    A device is asked once; its results come back to it. NotImplementedError is PyTorch's word for a missing kernel.
    """
    @wraps(function)
    def run(*args, **kwargs) -> Tensor:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if (function.__name__, device.type) not in LACKING:
            try:
                return function(*args, **kwargs)
            except NotImplementedError:
                LACKING.add((function.__name__, device.type))
        return function(*(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args), **kwargs).to(device)

    return run
