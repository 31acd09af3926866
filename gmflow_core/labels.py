"""Class labels as people write them."""

from __future__ import annotations

import re
from difflib import get_close_matches


class LabelError(ValueError):
    """A label that the model does not know: one line that says which, and what would be right."""


def parse_labels(text: str, num_classes: int, class_names: tuple[str, ...] | None = None) -> list[int]:
    """"0, 1, 2-9" or class names, separated by commas or line breaks, to class indices in that order.

    A number is an index, even where a class has a number for its name. LabelError for anything else.
    """
    names = {" ".join(name.lower().split()): i for i, name in reversed(list(enumerate(class_names or ())))}
    whole = " ".join(text.lower().split())
    if whole in names and not whole.isdigit():  # a name may hold commas
        return [names[whole]]
    parts = [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]
    if not parts:
        raise LabelError(f"no label given; {_known(num_classes, class_names)}")
    labels: list[int] = []
    for part in parts:
        span = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        if span:
            first, last = int(span[1]), int(span[2] or span[1])
            if last < first:
                raise LabelError(f"the range {part!r} runs backwards")
            if last >= num_classes:
                raise LabelError(f"{part!r} is past the last class; this model knows 0 to {num_classes - 1}")
            labels += range(first, last + 1)
        elif " ".join(part.lower().split()) in names:
            labels.append(names[" ".join(part.lower().split())])
        else:
            raise LabelError(f"{part!r} is no class of this model{_nearest(part, names)}; {_known(num_classes, class_names)}")
    return labels


def _nearest(part: str, names: dict[str, int]) -> str:
    near = get_close_matches(part.lower(), names, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(near)}?)" if near else ""


def _known(num_classes: int, class_names: tuple[str, ...] | None) -> str:
    named = " or a class name" if class_names else ", for the model names no classes"
    return f"a label is an index 0 to {num_classes - 1}, a range like 2-9{named}"
