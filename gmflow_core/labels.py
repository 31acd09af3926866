"""Class labels as people write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

from .files import shown

MOST_LABELS = 1_000_000
# A name in quotes, or what lies between commas and line breaks.
_PART = r'[^\S\n]*"[^"\n]*"[^\S\n]*(?=[,\n]|$)|[^,\n]+'
_INDEX = r"#?\s*([0-9]{1,9})(?:\s*-\s*#?([0-9]{1,9}))?"


class LabelError(ValueError):
    """A label that the model does not know: one line that says which, and what would be right."""


def parse_labels(
    text: str, num_classes: int, class_names: Sequence[str] | None = None, most: int = MOST_LABELS
) -> list[int]:
    """"0, 1, 2-9" or class names, separated by commas or line breaks, to class indices in that order.

    ``7`` and ``2-9`` are indices, unless a class is called so: then a text that means two classes is refused.
    ``#7`` is always the index, ``"7"`` in quotes always the name. LabelError for anything else,
    and for more than ``most`` labels.
    """
    names = {_plain(name): i for i, name in reversed(list(enumerate(class_names or ())))}
    if _plain(text) in names and not re.fullmatch(_INDEX, text.strip()):  # a name may hold commas
        return [names[_plain(text)]]
    labels: list[int] = []
    for part in filter(None, map(str.strip, re.findall(_PART, text))):
        quoted = len(part) > 1 and part[0] == part[-1] == '"'
        labels += [_named(part[1:-1], names, num_classes)] if quoted else _read(part, names, num_classes)
        if len(labels) > most:
            raise LabelError(f"more than {most} labels; give one for each image of a batch, or one for all")
    if not labels:
        raise LabelError(f"no label given; {_known(num_classes, bool(names))}")
    return labels


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def _read(part: str, names: dict[str, int], num_classes: int) -> list[int]:
    """The classes that a part without quotes means."""
    span, named = re.fullmatch(_INDEX, part), names.get(_plain(part))
    if span is None:
        return [_named(part, names, num_classes)]
    first, last = int(span[1]), int(span[2] or span[1])
    inside = first <= last < num_classes
    if named is not None and not (inside and range(first, last + 1) == range(named, named + 1)):
        if inside:
            indices = f"#{first}" if first == last else f"#{first}-#{last}"
            meant = f"index {first}" if first == last else f"indices {first} to {last}"
            raise LabelError(f"{part!r} is the name of class {named} and {meant}: write \"{part}\" for the name, "
                             f"{indices} for the other")
        return [named]
    if last < first:
        raise LabelError(f"the range {part!r} runs backwards")
    if not inside:
        raise LabelError(f"{part!r} is past the last class; this model knows 0 to {num_classes - 1}")
    return list(range(first, last + 1))


def _named(name: str, names: dict[str, int], num_classes: int) -> int:
    if _plain(name) not in names:
        raise LabelError(f"'{shown(name)}' is no class of this model{_nearest(name, names)}; "
                         f"{_known(num_classes, bool(names))}")
    return names[_plain(name)]


def _nearest(part: str, names: dict[str, int]) -> str:
    short = [name for name in names if len(name) <= 200]  # a file may hold names of megabytes
    near = get_close_matches(part[:200].lower(), short, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(shown(name, 60) for name in near)}?)" if near else ""


def _known(num_classes: int, named: bool) -> str:
    names = " or a class name" if named else ", for the model names no classes"
    return f"a label is an index 0 to {num_classes - 1}, a range like 2-9{names}"
