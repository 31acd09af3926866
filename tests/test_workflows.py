"""The example workflows: both formats say the same, fit the nodes' definitions and are laid out to be read."""

import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from workflows.build import LISTED, WORKFLOWS, make, written
from workflows.graph import fields, inputs_of, is_widget, options

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "workflows"
SNAPSHOT = ROOT / "tests" / "data" / "object_info.json"
INFO = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
NAMES = [describe.__name__ for describe in WORKFLOWS]
each = pytest.mark.parametrize("name", NAMES)
TITLE = 30  # pixels above a node's position


def ui(name):
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def api(name):
    return json.loads((HERE / "api" / f"{name}.json").read_text(encoding="utf-8"))


def nodes(workflow):
    return [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]


def notes(workflow):
    return [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]


def box(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def inside(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


def group_box(group):
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


# ---- files -------------------------------------------------------------------------------------

def test_the_files_are_what_the_builder_makes():
    for path, text in written(make(INFO)).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m workflows.build"


def test_there_are_no_other_files():
    assert {path.stem for path in HERE.glob("*.json")} == set(NAMES)
    assert {path.stem for path in (HERE / "api").glob("*.json")} == set(NAMES)


@each
def test_a_small_picture_lies_beside_it(name):
    path = HERE / f"{name}.jpg"
    assert path.read_bytes()[:2] == b"\xff\xd8" and path.stat().st_size < 150_000


@each
def test_the_readme_names_it(name):
    assert f"]({name}.json)" in (HERE / "README.md").read_text(encoding="utf-8")


# ---- the twins ---------------------------------------------------------------------------------

@each
def test_both_formats_have_the_same_nodes_links_and_values(name):
    page, prompt = ui(name), api(name)
    assert {str(n["id"]) for n in nodes(page)} == prompt.keys()
    links = {link[0]: link for link in page["links"]}
    for node in nodes(page):
        twin, info = prompt[str(node["id"])], INFO[node["type"]]
        assert twin["class_type"] == node["type"]
        assert twin["_meta"]["title"] == node.get("title", info["display_name"])
        values, inputs = iter(node["widgets_values"]), {}
        for widget in (entry["name"] for entry in node["inputs"] if "widget" in entry):
            inputs[widget] = next(values)
            if fields(inputs_of(info)[widget][0]).get("control_after_generate"):
                assert next(values) == "fixed"
        assert next(values, None) is None
        for slot, entry in enumerate(node["inputs"]):
            if entry.get("link") is not None:
                _, source, source_slot, target, target_slot, kind = links[entry["link"]]
                assert (target, target_slot) == (node["id"], slot) and entry["type"] in (kind, "*")
                inputs[entry["name"]] = [str(source), source_slot]
        assert inputs == twin["inputs"]


@each
def test_links_are_named_at_both_ends(name):
    page = ui(name)
    by_id = {node["id"]: node for node in page["nodes"]}
    assert len(by_id) == len(page["nodes"]) and page["last_node_id"] == max(by_id)
    assert page["last_link_id"] == len(page["links"])
    for number, source, source_slot, target, target_slot, kind in page["links"]:
        assert number in by_id[source]["outputs"][source_slot]["links"]
        assert by_id[target]["inputs"][target_slot]["link"] == number
        assert by_id[source]["outputs"][source_slot]["type"] == kind


# ---- the definitions ---------------------------------------------------------------------------

@each
def test_it_fits_the_definitions(name):
    prompt = api(name)
    for number, node in prompt.items():
        where, info = f"{name} {number} {node['class_type']}", INFO[node["class_type"]]
        specs = inputs_of(info)
        assert node["inputs"].keys() <= specs.keys(), where
        assert set(info["input"].get("required", {})) <= node["inputs"].keys(), where
        for key, value in node["inputs"].items():
            spec, hints = specs[key][0], fields(specs[key][0])
            if not is_widget(spec):
                source, slot = value
                kind = INFO[prompt[source]["class_type"]]["output"][slot]
                assert spec[0] in (kind, "*"), f"{where}.{key}: {kind} for {spec[0]}"
            elif options(spec) is not None:
                assert value in options(spec), f"{where}.{key}: {value}"
            else:
                kinds = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
                assert isinstance(value, kinds[spec[0]]), f"{where}.{key}: {value!r}"
                assert hints.get("min", value) <= value <= hints.get("max", value), f"{where}.{key}: {value}"


@each
def test_it_has_an_output(name):
    assert any(INFO[node["class_type"]]["output_node"] for node in api(name).values())


def test_the_snapshot_is_small_and_holds_what_is_used():
    assert INFO.keys() == {node["class_type"] for name in NAMES for node in api(name).values()}
    assert SNAPSHOT.stat().st_size < 40_000
    for node, key in LISTED:
        assert len(options(inputs_of(INFO[node])[key][0])) < 8


def test_named_files_and_classes_exist_or_are_offered():
    classes = (ROOT / "nodes" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    for name in NAMES:
        for node in nodes(ui(name)):
            first = (node["widgets_values"] or [None])[0]
            if node["type"] == "GMFlowLoader" and not (ROOT / "models" / first).is_file() or (
                node["type"] == "VAELoader" and first != "pixel_space"
            ):
                (model,) = node["properties"]["models"]
                assert model["name"] == first and model["url"].startswith("https://huggingface.co/")
                assert model["directory"] == {"GMFlowLoader": "diffusion_models", "VAELoader": "vae"}[node["type"]]
                assert any(model["url"] in note["widgets_values"][0] for note in notes(ui(name)))
            if node["type"] == "GMFlowImageNetClass":
                index, _, label = first.partition(" ")
                assert classes[int(index)] == label


@pytest.mark.skipif(shutil.which("comfy") is None, reason="needs comfy-cli")
@each
def test_comfy_cli_accepts_it(name):
    command = ["comfy", "--skip-prompt", "workflow", "validate", "--workflow", str(HERE / "api" / f"{name}.json"),
               "--input", str(SNAPSHOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- layout ------------------------------------------------------------------------------------

@each
def test_nothing_overlaps(name):
    page = ui(name)
    boxes = [(node.get("title", node["type"]), box(node)) for node in page["nodes"]]
    boxes_and_groups = [
        boxes,
        [(group["title"], group_box(group)) for group in page["groups"]]
        + [("note", box(note)) for note in notes(page)],
    ]
    for things in boxes_and_groups:
        for i, (title, a) in enumerate(things):
            for other, b in things[:i]:
                assert not overlap(a, b), f"{title} overlaps {other}"


@each
def test_every_node_stands_in_one_group_and_on_the_canvas(name):
    page = ui(name)
    for node in nodes(page):
        assert sum(inside(box(node), group_box(group)) for group in page["groups"]) == 1, node["type"]
    for thing in [box(node) for node in page["nodes"]] + [group_box(group) for group in page["groups"]]:
        assert inside(thing, (0, 0, 4000, 4000))


@each
def test_samplers_have_air_below_for_their_preview(name):
    page = ui(name)
    for sampler in nodes(page):
        if "KSampler" in sampler["type"] or sampler["type"] == "SamplerCustomAdvanced":
            x, _, right, bottom = box(sampler)
            grown = (x, bottom, right, bottom + 260)
            assert not any(overlap(grown, box(node)) for node in page["nodes"]), sampler["type"]
            assert any(inside(grown, group_box(group)) for group in page["groups"])


def ways(page) -> dict[int, list]:
    """The corners of every link by its number: socket, reroutes, socket."""
    by_id = {node["id"]: node for node in page["nodes"]}
    reroutes = {reroute["id"]: reroute for reroute in page["extra"].get("reroutes", ())}
    last = {entry["id"]: entry["parentId"] for entry in page["extra"].get("linkExtensions", ())}

    def socket(number, slot, right):
        node = by_id[number]
        return node["pos"][0] + right * node["size"][0], node["pos"][1] + 14 + 20 * slot

    found = {}
    for number, source, slot, target, into, _ in page["links"]:
        corners, stop = [socket(target, into, 0)], last.get(number)
        while stop is not None:
            assert number in reroutes[stop]["linkIds"]
            corners.append(tuple(reroutes[stop]["pos"]))
            stop = reroutes[stop].get("parentId")
        found[number] = [socket(source, slot, 1), *reversed(corners)]
    return found


def crossings(page) -> int:
    """Pairs of straight pieces of links from different outputs that cross."""
    origins = {number: (source, slot) for number, source, slot, *_ in page["links"]}
    lines = sorted({(*piece, origins[number]) for number, way in ways(page).items() for piece in pairwise(way)})

    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return sum(
        side(p, q, r) * side(p, q, s) < 0 and side(r, s, p) * side(r, s, q) < 0
        for i, (p, q, a) in enumerate(lines) for r, s, b in lines[:i] if a != b
    )


def behind(page) -> list:
    """Links, with the nodes that they run behind; not their own, which a link down a column has to pass."""
    found, ends = [], {number: (source, target) for number, source, _, target, *_ in page["links"]}
    for number, way in ways(page).items():
        for (x, y), (right, bottom) in pairwise(way):
            points = [(x + (right - x) * i / 200, y + (bottom - y) * i / 200) for i in range(201)]
            found += [(ends[number], node["id"]) for node in page["nodes"] if node["id"] not in ends[number]
                      and any(inside((*p, *p), box(node)) for p in points)]
    return found


# Without reroutes and with one VAE loader for all rows 117 and 17, and 27 and 17 links run behind nodes.
@pytest.mark.parametrize("name, most", [("guidance_sweep", 32), ("inpaint_and_img2img", 3)])
def test_few_links_cross_and_none_runs_behind_a_node(name, most):
    page = ui(name)
    print(name, crossings(page))
    assert crossings(page) <= most and behind(page) == []


@each
def test_nodes_are_large_enough_for_their_widgets(name):
    for node in nodes(ui(name)):
        sockets = max(sum("widget" not in entry for entry in node["inputs"]), len(node["outputs"]))
        tall = sum(90 if fields(inputs_of(INFO[node["type"]])[entry["name"]][0]).get("multiline") else 24
                   for entry in node["inputs"] if "widget" in entry)
        seeds = sum(value == "fixed" for value in node["widgets_values"])
        assert node["size"][0] >= 200 and node["size"][1] >= 20 * sockets + tall + 24 * seeds, node["type"]


@each
def test_links_run_from_left_to_right(name):
    """A link may go down its own column, never back to an earlier one."""
    page = ui(name)
    by_id = {node["id"]: node for node in page["nodes"]}
    for _, source, _, target, *_ in page["links"]:
        assert by_id[source]["pos"][0] <= by_id[target]["pos"][0]


@each
def test_a_note_says_what_it_is(name):
    page = ui(name)
    assert notes(page)
    for note in notes(page):
        (text,) = note["widgets_values"]
        assert text.startswith("# ") and "### Try" in text and len(text) > 300
    assert all(group["title"] for group in page["groups"])
