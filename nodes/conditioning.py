"""Nodes that say which classes to paint."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from ..gmflow_core.labels import LabelError, parse_labels
from . import host
from .model_info import make_conditioning, null_conditioning
from .schema import schema

MOST_LABELS = 4096  # as many as GMFlow Empty Latent makes images
IMAGENET = tuple((Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines())


class GMFlowClassConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            "GMFlowClassConditioning", "GMFlow Class Conditioning",
            "Classes as conditioning: one label for all images of a batch, or one for each.",
            [
                io.Model.Input("model", tooltip="A GMFlow model: its file says how many classes there are "
                                                "and what they are called."),
                io.String.Input("labels", default="0", multiline=True, placeholder="7   or   0-9   or   tabby cat, owl",
                                tooltip="Class indices, ranges and names, separated by commas or lines: 7, "
                                        "or 0-9, or 207, tabby cat. "
                                        "One label for all images, or one for each image of the batch. "
                                        "#1 is always the index, and \"1\" in quotes always the name."),
            ],
            [
                io.Conditioning.Output(display_name="positive", tooltip="The labels."),
                io.Conditioning.Output(display_name="negative", tooltip="The null label: the model without a class."),
            ],
            search_aliases=["gmflow", "class label", "class conditioning", "prompt"],
        )

    @classmethod
    def execute(cls, model, labels) -> io.NodeOutput:
        info = host.require_classes(model, "CLIP Text Encode")
        names = info.class_names
        if names is None and info.config.num_classes == len(IMAGENET):
            names = IMAGENET
        try:
            indices = parse_labels(labels, info.config.num_classes, names, MOST_LABELS)
        except LabelError as error:
            raise ValueError(f"labels: {error}") from None
        return io.NodeOutput(make_conditioning(indices, info.config.num_classes), null_conditioning(info.config))


class GMFlowImageNetClass(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        options = [f"{index} {name}" for index, name in enumerate(IMAGENET)]
        return schema(
            "GMFlowImageNetClass", "GMFlow ImageNet Class",
            "One of ImageNet's 1000 classes, to search by name. For models of that many classes.",
            [io.Combo.Input("class_name", options=options, default=options[207],
                            tooltip="Click and type to search, e.g. retriever. The number is the class index.")],
            [
                io.Conditioning.Output(display_name="positive", tooltip="The class."),
                io.Conditioning.Output(display_name="negative", tooltip="The null label (index 1000)."),
            ],
            search_aliases=["gmflow", "imagenet", "class label"],
        )

    @classmethod
    def execute(cls, class_name) -> io.NodeOutput:
        index, _, name = class_name.partition(" ")
        if not index.isdecimal() or name not in IMAGENET[int(index) : int(index) + 1]:  # 0.3.64 passes any text
            raise ValueError(f"class_name: {class_name!r} is none of the list, "
                             f"which runs from '0 {IMAGENET[0]}' to '999 {IMAGENET[-1]}'")
        index = int(index)
        return io.NodeOutput(*(make_conditioning([label], len(IMAGENET)) for label in (index, len(IMAGENET))))
