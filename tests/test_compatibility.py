"""What 0.1.0 saved goes on working: its workflows hold widget values by position, its prompts by name.

tests/data/workflows_0_1_0 holds that version's workflows, API prompts and schemas; tests/host runs the prompts.
"""

import json
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"
OLD = json.loads((DATA / "workflows_0_1_0" / "schema.json").read_text(encoding="utf-8"))
NEW = json.loads((DATA / "schema_snapshot.json").read_text(encoding="utf-8"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

each_node = pytest.mark.parametrize("node", OLD)


def widgets(schema: dict) -> list[str]:
    return [name for name, entry in schema["inputs"].items()
            if entry["type"] in WIDGETS or isinstance(entry["type"], list)]


@each_node
def test_widgets_are_only_appended(node):
    """A value at the n-th place must still be the n-th widget's."""
    assert widgets(NEW[node])[: len(widgets(OLD[node]))] == widgets(OLD[node])


@each_node
def test_an_old_prompt_names_every_required_input(node):
    """A new input is optional, or old prompts are refused."""
    required = [name for name, entry in NEW[node]["inputs"].items() if entry["group"] == "required"]
    assert set(required) <= set(OLD[node]["inputs"])


@each_node
def test_what_was_allowed_is_allowed(node):
    for name, old in OLD[node]["inputs"].items():
        new = NEW[node]["inputs"][name]
        assert new["type"] == old["type"], name
        assert new.get("min", 0) <= old.get("min", 0) and new.get("max", 0) >= old.get("max", 0), name
        if isinstance(old.get("options"), list):
            assert set(old["options"]) <= set(new["options"]), name


@each_node
def test_outputs_keep_their_places(node):
    assert NEW[node]["outputs"][: len(OLD[node]["outputs"])] == OLD[node]["outputs"]


def test_the_test_sees_widgets():
    assert widgets(OLD["GMFlowKSampler"])[:3] == ["seed", "steps", "solver"]
