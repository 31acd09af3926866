"""Class labels as people write them."""

from __future__ import annotations

import re
from difflib import get_close_matches

MOST_LABELS = 1_000_000
LONGEST_NAME = 200  # characters, of those that a message proposes


class LabelError(ValueError):
    """A label that the model does not know: one line that says which, and what would be right."""


def shorten(text: str, most: int = 60) -> str:
    """A text quoted and escaped, at most about ``most`` characters of it: people's texts and files' names may be anything."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}... ({len(text)} characters)"


def parse_labels(
    text: str, num_classes: int, class_names: tuple[str, ...] | None = None, most: int = MOST_LABELS
) -> list[int]:
    """"0, 1, 2-9" or class names, separated by commas or line breaks, to class indices in that order.

    A number is an index, even where a class has a number for its name. LabelError for anything else, and for
    more than ``most`` labels.
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
            first, last = (int(digits) if len(digits) < 10 else num_classes for digits in (span[1], span[2] or span[1]))
            if last < first:
                raise LabelError(f"the range {shorten(part)} runs backwards")
            if last >= num_classes:
                raise LabelError(f"{shorten(part)} is past the last class; this model knows 0 to {num_classes - 1}")
            labels += range(first, last + 1)
        elif " ".join(part.lower().split()) in names:
            labels.append(names[" ".join(part.lower().split())])
        else:
            raise LabelError(f"{shorten(part)} is no class of this model{_nearest(part, names)}; {_known(num_classes, class_names)}")
        if len(labels) > most:
            raise LabelError(f"more than {most} labels; give one for each image of a batch, or one for all")
    return labels


def _nearest(part: str, names: dict[str, int]) -> str:
    known = [name for name in names if len(name) <= LONGEST_NAME]
    near = get_close_matches(part.lower(), known, n=3, cutoff=0.5) if len(part) <= LONGEST_NAME else []
    return f" (did you mean {', '.join(name if name.isprintable() else shorten(name) for name in near)}?)" if near else ""


def _known(num_classes: int, class_names: tuple[str, ...] | None) -> str:
    named = " or a class name" if class_names else ", for the model names no classes"
    return f"a label is an index 0 to {num_classes - 1}, a range like 2-9{named}"
