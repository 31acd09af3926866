"""Help pages (web/docs) and translations (locales) say what the nodes' schemas say.

The schemas are recorded in tests/data/node_schemas.json. After a change of the nodes, record them again from a running
ComfyUI with the pack: python tests/test_docs.py http://127.0.0.1:8188
"""

import json
import re
import sys
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS, LOCALES = ROOT / "web" / "docs", ROOT / "locales"
SCHEMAS = ROOT / "tests" / "data" / "node_schemas.json"
NODES = json.loads(SCHEMAS.read_text(encoding="utf-8"))
LANGUAGES = ("en", "zh")
PAGES = [(node, language) for node in NODES for language in LANGUAGES]
WORDS = {"en": (" (", " to ", ")", ", optional", ", advanced"), "zh": ("（", " 到 ", "）", "，可选", "，高级")}


def page(node: str, language: str) -> str:
    return (DOCS / node / f"{language}.md").read_text(encoding="utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """The body rows of each table, as cells; the lines within a cell are still joined by <br>."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif rows:
            found.append(rows[2:])
            rows = []
    return found


def number(value) -> str:
    return "2^64 - 1" if value == 2**64 - 1 else f"{value:g}" if isinstance(value, float) else str(value)


def expected_default(spec: dict, language: str) -> str:
    """What a page says of an input beneath its name: "8 (1 to 10000)", "GM-ODE", "MODEL", "CONDITIONING, optional"."""
    left, to, right, optional, advanced = WORDS[language]
    if "default" not in spec:
        text = spec["type"] + (optional if spec["optional"] else "")
    elif isinstance(spec["default"], bool):
        text = str(spec["default"]).lower()
    elif "min" in spec:
        text = number(spec["default"]) + left + number(spec["min"]) + to + number(spec["max"]) + right
    else:
        text = spec["default"]
    return text + (advanced if spec["advanced"] else "")


def translations(language: str, name: str = "nodeDefs") -> dict:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def strings(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    else:
        yield value


# ---- help pages --------------------------------------------------------------------------------

def test_pages_are_those_of_the_nodes():
    assert sorted(p.name for p in DOCS.iterdir()) == sorted(NODES)
    for node in NODES:
        pictures = {p.name for p in (DOCS / node).iterdir()} - {f"{language}.md" for language in LANGUAGES}
        assert pictures in ({"picture.png"}, {"picture.jpg"}), node


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_page_lists_every_input_and_output(node, language):
    inputs, outputs = tables(page(node, language))
    names = [row[0].split("<br>")[0].strip("`") for row in inputs]
    assert names == list(NODES[node]["inputs"])
    named = [row[0].split("<br>")[0].strip("`") for row in outputs]
    assert named == [output["name"] for output in NODES[node]["outputs"]]
    for row in inputs + outputs:
        assert len(row) == 2 and re.fullmatch(r"`\w+`.*", row[0]) and row[1]


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_page_gives_defaults_and_ranges(node, language):
    inputs, outputs = tables(page(node, language))
    for (name, spec), row in zip(NODES[node]["inputs"].items(), inputs, strict=True):
        lines = row[0].replace("<wbr>", "").split("<br>")
        assert lines[-1] == expected_default(spec, language), name
        for option in spec["options"] if isinstance(spec.get("options"), list) and name != "model_name" else ():
            assert f"`{option}`" in row[1], (name, option)
    for output, row in zip(NODES[node]["outputs"], outputs, strict=True):
        assert output["type"] in (row[0].split("<br>")[-1], output["name"])


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_page_shows_its_picture(node, language):
    """The page resolves a relative picture from docs/, not from docs/NODE/."""
    (target,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page(node, language))
    assert Path(target).parts[0] == node
    content = (DOCS / target).read_bytes()
    assert len(content) < 60_000
    assert content.startswith((b"\x89PNG", b"\xff\xd8\xff"))


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_page_has_the_same_parts_in_both_languages(node, language):
    text, english = page(node, language), page(node, "en")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0] == "# " + translations(language)[node]["display_name"]
    assert [len(h.split()[0]) for h in headings] == [1, 2, 2, 2, 2]
    assert text.count("\n- ") == english.count("\n- ")
    assert "{" not in text and text.endswith("\n") and "\r" not in text


# ---- translations ------------------------------------------------------------------------------

@pytest.mark.parametrize("language", LANGUAGES)
def test_locale_names_every_node_input_and_output(language):
    defs = translations(language)
    assert sorted(defs) == sorted(NODES)
    for node, schema in NODES.items():
        widgets = [*schema["inputs"], *(["control_after_generate"] if "seed" in schema["inputs"] else [])]
        assert sorted(defs[node]["inputs"]) == sorted(widgets), node
        assert list(defs[node]["outputs"]) == [str(i) for i in range(len(schema["outputs"]))], node
        for entry in (*defs[node]["inputs"].values(), *defs[node]["outputs"].values()):
            assert set(entry) <= {"name", "tooltip"} and all(entry.values()) and entry["name"]


def test_english_is_the_schemas():
    for node, entry in translations("en").items():
        schema = NODES[node]
        assert (entry["display_name"], entry["description"]) == (schema["display_name"], schema["description"])
        for name, spec in schema["inputs"].items():
            assert entry["inputs"][name]["name"] == name
            assert entry["inputs"][name].get("tooltip") == spec["tooltip"], (node, name)
        for output, spec in zip(entry["outputs"].values(), schema["outputs"], strict=True):
            assert (output["name"], output.get("tooltip")) == (spec["name"], spec["tooltip"]), node


def test_chinese_translates_everything():
    chinese = re.compile("[\u4e00-\u9fff]")
    for node, entry in translations("zh").items():
        assert chinese.search(entry["display_name"]) and chinese.search(entry["description"]), node
        for name, spec in entry["inputs"].items():
            assert name == "control_after_generate" or chinese.search(spec["tooltip"]), (node, name)
        assert all(chinese.search(output["tooltip"]) for output in entry["outputs"].values()), node


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("file", ["nodeDefs", "main"])
def test_locale_has_no_message_syntax(language, file):
    """vue-i18n reads { } @ | as syntax, and a dot in a key as a path."""
    table = translations(language, file)
    assert not [text for text in strings(table) if re.search(r"[{}@|]", text)]
    assert "." not in "".join(k for node in table.values() if isinstance(node, dict) for k in node)


def test_locales_are_a_pair():
    assert sorted(p.name for p in LOCALES.iterdir()) == sorted(LANGUAGES)
    for file in ("nodeDefs", "main"):
        assert list(translations("en", file)) == list(translations("zh", file))


# ---- recording ---------------------------------------------------------------------------------

def recorded(info: dict) -> dict:
    """A node of /object_info as node_schemas.json keeps it. Of a very long menu only the length is kept."""
    inputs = {}
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, options = info["input"][group][name]
            spec = {"type": kind, "optional": group == "optional", "advanced": bool(options.get("advanced")),
                    "tooltip": options.get("tooltip")}
            spec |= {key: options[key] for key in ("default", "min", "max", "options") if key in options}
            if len(spec.get("options", ())) > 100:
                spec["options"] = len(spec["options"])
            inputs[name] = spec
    outputs = [dict(zip(("name", "type", "tooltip"), o, strict=True))
               for o in zip(info["output_name"], info["output"], info["output_tooltips"], strict=True)]
    return {"display_name": info["display_name"], "description": info["description"], "inputs": inputs,
            "outputs": outputs}


if __name__ == "__main__":
    with urllib.request.urlopen(f"{sys.argv[1].rstrip('/')}/object_info") as answer:
        table = {node: recorded(info) for node, info in json.load(answer).items() if node in NODES or "GMFlow" in node}
    SCHEMAS.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
