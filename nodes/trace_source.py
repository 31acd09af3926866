"""GM_TRACE: a trajectory's mixtures, recorded only when somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..gmflow_core.inspection.trace import Recorder, Trace, tensors_of


def is_connected(prompt: dict | None, unique_id, slot: int) -> bool:
    """Whether any node of an API prompt takes output ``slot`` of node ``unique_id``."""
    link = [str(unique_id), slot]
    return any(
        isinstance(value, list) and len(value) == 2 and [str(value[0]), value[1]] == link
        for node in (prompt or {}).values() for value in node.get("inputs", {}).values()
    )


class TraceSource:
    """What a GM_TRACE link carries: the trace, or the way to get it by sampling once more.

    ``run(recorder)`` samples; the same every time, for it is seeded. Sampling without an inspector
    records nothing; one that is connected later, when the sampler's output comes from ComfyUI's
    cache, samples again.
    """

    def __init__(self, run: Callable, model):
        self.run, self.model, self._trace = run, model, None

    def sample(self, hidden, slot: int):
        """Run, and record if the trace output of the executing node is connected."""
        recorder = Recorder() if is_connected(hidden.prompt, hidden.unique_id, slot) else None
        result = self.run(recorder)
        if recorder is not None:
            self._trace = recorder.trace()
        return result

    def _comfy_cache_tensors(self) -> list[Tensor]:
        """What newer versions of ComfyUI count a kept output by: they see tensors in lists and tuples only."""
        return [] if self._trace is None else tensors_of(self._trace)

    def trace(self) -> Trace:
        """The recorded trace; ValueError if the sampler leaves none."""
        if self._trace is None:
            recorder = Recorder()
            self.run(recorder)
            self._trace = recorder.trace()
        if not self._trace.steps:
            raise ValueError("trace: it is empty; "
                             "only GM samplers leave one (Sampler GM-ODE, Sampler GM-SDE, GMFlow KSampler)")
        return self._trace
