"""OUT/results.json: the rows of an evaluation and what they compare with, read, added to and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from gmflow_core.files import write_text

from ..runlog import short
from .settings import Setting
from .subject import Subject, old_digest

RESULTS = "results.json"
OLDER = {"noise": "by batch"}  # what files say that say nothing of it
OLD_ROWS = {"shift": 1.0}      # and rows


class Results:
    """OUT/results.json: read, added to, written after every row."""

    def __init__(self, path: Path, facts: dict):
        self.path, self.content = path, {**facts, "checkpoints": {}, "rows": []}
        if path.exists():
            try:
                self.content = json.loads(path.read_text(encoding="utf-8"))
                older = OLDER | {"reference_content": facts["reference_content"]}
                self.content |= {k: older[k] for k in older if k not in self.content}
                changed = [f"{k}: {self.content[k]} there, {facts[k]} asked for" for k in facts
                           if self.content[k] != facts[k]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}: not results of this program ({error}); choose another --out") from None
            if changed:
                raise ValueError(f"{path} compares with something else ({'; '.join(changed)}); choose another --out")

    def row(self, subject: Subject, setting: Setting) -> dict | None:
        """The row of a setting, if it is there."""
        wanted = {"digest": subject.digest, **setting.wanted()}
        return next((row for row in self.content["rows"] if wanted.items() <= (OLD_ROWS | row).items()), None)

    def about(self, subject: Subject, nll: Callable[[], dict | None]) -> None:
        """Remember a checkpoint. ValueError if another one has its name."""
        known = self.content["checkpoints"]
        before = known.get(subject.name, {}).get("digest")
        if before not in (None, subject.digest) and before == old_digest(subject.checkpoint.path):
            for row in (known[subject.name], *self.content["rows"]):
                if row["digest"] == before:
                    row["digest"] = subject.digest
        if subject.name not in known:
            config, training = subject.checkpoint.config, subject.checkpoint.training
            known[subject.name] = {
                "digest": subject.digest, "components": config.num_gaussians, "vanilla": subject.vanilla,
                "steps": training.get("step"), "nll": nll(),
            }
        elif known[subject.name]["digest"] != subject.digest:
            raise ValueError(f"{self.path} holds another checkpoint of the name {subject.name}; "
                             "choose another --out, or rename the file")

    def add(self, row: dict) -> None:
        self.content["rows"].append({name: short(value) for name, value in row.items()})
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")
