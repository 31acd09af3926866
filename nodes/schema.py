"""Shared pieces of the nodes' schemas."""

from __future__ import annotations

from comfy_api.latest import io

from .host import category, known

GMTrace = io.Custom("GM_TRACE")
GMEvidence = io.Custom("GM_EVIDENCE")


def schema(node_id: str, display_name: str, description: str, inputs: list, outputs: list, **fields) -> io.Schema:
    """A node's Schema in the pack's category, without the fields that this version of ComfyUI does not know."""
    return known(
        io.Schema, node_id=node_id, display_name=display_name, category=category(), description=description,
        inputs=inputs, outputs=outputs, **fields,
    )


def advanced(widget):
    """Mark an input as advanced: hosts that know the mark fold such inputs away."""
    widget.extra_dict = {**widget.extra_dict, "advanced": True}
    return widget


def seed(tooltip: str):
    return io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True, tooltip=tooltip)
