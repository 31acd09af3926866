"""The pack is there: its ids and inputs, its import, and pictures."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import judge
from PIL import Image

from gmflow_core import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = ROOT / "tests" / "data" / "schema_snapshot.json"
BUNDLED = ROOT / "models" / "gmdit_digits.safetensors"  # what most tests paint with
CHARACTERS = ROOT / "models" / "gmdit_characters.safetensors"
API = sorted((ROOT / "workflows" / "api").glob("*.json"))
FILES = ("model_name", "vae_name", "unet_name", "clip_name", "adapter_name")
API_0_1_0 = sorted((ROOT / "tests" / "data" / "workflows_0_1_0" / "api").glob("*.json"))


def downloads(path: Path) -> bool:
    """Whether a prompt names models that are not bundled."""
    named = set(re.findall(r'"([^"]+\.safetensors)"', path.read_text(encoding="utf-8")))
    return bool(named - {BUNDLED.name, CHARACTERS.name})


def pack(host) -> dict[str, dict]:
    return {name: info for name, info in host.info.items() if info.get("python_module") == "custom_nodes.gmflow-nodes"}


def describe(info: dict) -> dict:
    """What saved workflows depend on: names, order, types, ranges and defaults of inputs, and outputs."""
    inputs = {}
    for group, names in info["input_order"].items():
        if group == "hidden":
            continue
        for name in names:
            kind, options = info["input"][group][name]
            entry = {"type": kind, "group": group}
            entry |= {key: options[key] for key in ("default", "min", "max", "options", "advanced") if key in options}
            if len(entry.get("options", [])) > 100:
                entry["options"] = f"{len(entry['options'])} from {entry['options'][0]!r} to {entry['options'][-1]!r}"
            if name == "model_name":
                entry["options"] = "files"
            inputs[name] = entry
    return {"inputs": inputs, "outputs": [*map(list, zip(info["output"], info["output_name"], strict=True))],
            "output_node": info["output_node"]}


def test_schema_is_the_committed_one(host, tmp_path):
    """Saved workflows hold widget values by position: widgets are only ever appended, ids stay."""
    found = {name: describe(info) for name, info in sorted(pack(host).items())}
    (tmp_path / "schema.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    kept = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert found == kept, f"if this is meant, copy {tmp_path}/schema.json to {SNAPSHOT}"
    groups = pack(host)["GMFlowKSampler"]["input"]
    assert [*found["GMFlowKSampler"]["inputs"]] == [*groups["required"], *groups["optional"]]


def test_every_node_explains_itself(host):
    for name, info in pack(host).items():
        assert info["description"] and info["display_name"] != name and info["category"].endswith("GMFlow"), name
        for group in ("required", "optional"):
            for widget, spec in info["input"].get(group, {}).items():
                assert spec[1].get("tooltip") or name == "GMFlowSamplerCustom", f"{name}.{widget}"


def test_help_pages_and_translations_are_of_these_schemas(host):
    """Of what both versions of ComfyUI tell; tests/test_docs.py says how to record them again."""
    known = json.loads((ROOT / "tests" / "data" / "node_schemas.json").read_text(encoding="utf-8"))
    for name, info in pack(host).items():
        assert (info["display_name"], info["description"]) == (known[name]["display_name"], known[name]["description"])
        for widget, spec in known[name]["inputs"].items():
            group = "optional" if spec["optional"] else "required"
            assert info["input"][group][widget][1].get("tooltip") == spec["tooltip"], f"{name}.{widget}"
        assert info["output_tooltips"] == [output["tooltip"] for output in known[name]["outputs"]], name


def test_the_pack_loads_fast_and_quietly(host):
    log = host.log()
    (seconds, failed) = re.search(r"([\d.]+) seconds( \(IMPORT FAILED\))?: \S*gmflow-nodes", log).groups()
    assert float(seconds) < 0.5 and not failed
    assert not re.search(r"(?i)warning.*gmflow|Traceback", log[: log.index("Import times")])


def test_the_core_keeps_its_own_modules(host):
    """``nodes`` is ComfyUI's module too: the pack must not shadow it, nor add samplers to the global lists."""
    assert host.info["KSampler"]["python_module"] == "nodes"
    samplers = host.info["KSampler"]["input"]["required"]["sampler_name"]
    assert "gm" not in json.dumps(samplers).lower()


@pytest.mark.parametrize("solver", ["GM-ODE", "GM-SDE"])
def test_pictures_show_the_digits(host, digits, recognised, solver):
    g = digits()
    image = g.add("VAEDecode", samples=g.gm(solver=solver, guidance=0.3),
                  vae=g.add("VAELoader", vae_name="pixel_space"))
    saved = g.add("SaveImage", images=image, filename_prefix="digits")
    pictures = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in host.done(g.graph).images(saved)]
    pixels = torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 127.5 - 1
    assert pixels.shape == (10, 3, 16, 16) and recognised(pixels) >= 9


def test_defaults_give_a_picture(digits, recognised):
    """Nodes dropped and connected, nothing set: class 0, one image."""
    g = digits()
    conditioning, latent = g.add("GMFlowClassConditioning", model=g.model), g.add("GMFlowEmptyLatent", model=g.model)
    assert recognised(g.latents(g.gm(positive=conditioning, latent_image=latent)), [0]) == 1


def test_imagenet_class_menu(digits):
    """A thousand names to search; made for another model than the digits, which says so."""
    g = digits(batch=1)
    menu = g.host.info["GMFlowImageNetClass"]["input"]["required"]["class_name"][1]
    assert len(menu["options"]) == 1000 and menu["default"].startswith("207 ")
    g.host.save(g.graph, g.gm(positive=g.add("GMFlowImageNetClass", class_name=menu["options"][3]), steps=1))
    assert "made for a model of 1000 classes; this one has 10" in g.host.refused(g.graph)


# ---- committed workflows -----------------------------------------------------------------------

@pytest.mark.parametrize(
    "path", [p for p in API + API_0_1_0 if not downloads(p)],
    ids=lambda p: f"{'0.1.0 ' * (p in API_0_1_0)}{p.stem}",
)
def test_workflow_runs(host, recognised, path):
    prompt = json.loads(path.read_text(encoding="utf-8"))
    result = host.done(prompt)
    pictures = [image for out in result.outputs.values() for image in out.get("images", [])]
    assert pictures
    for where in pictures:
        png = host.get(f"/view?filename={where['filename']}&subfolder={where['subfolder']}&type={where['type']}")
        darkest, lightest = Image.open(io.BytesIO(png)).convert("L").getextrema()
        assert darkest < lightest
    if path.stem == "quickstart":
        # What it paints is read from the sampler's latent, however the workflow shows it.
        sampler = next(key for key, node in prompt.items() if node["class_type"] == "GMFlowKSampler")
        prompt["check"] = {"class_type": "SaveLatent",
                           "inputs": {"samples": [sampler, 0], "filename_prefix": "latents/check"}}
        latent = host.done(prompt).latent(["check"])
        labels = next(node["inputs"]["labels"] for node in prompt.values()
                      if node["class_type"] == "GMFlowClassConditioning")
        from gmflow_core.labels import parse_labels

        if path in API_0_1_0:
            wanted = parse_labels(labels, 10, load_checkpoint(BUNDLED).class_names)
            assert recognised(latent, wanted) >= 0.9 * len(latent)
        else:
            wanted = torch.tensor(parse_labels(labels, 16, load_checkpoint(CHARACTERS).class_names))
            assert (judge()(latent) == wanted).sum() >= 0.9 * len(latent)


@pytest.mark.parametrize("path", [p for p in API if downloads(p)], ids=lambda p: p.stem)
def test_workflow_of_a_missing_checkpoint_lacks_only_files(host, path):
    prompt = json.loads(path.read_text(encoding="utf-8"))
    lacking = sorted({node["class_type"] for node in prompt.values()} - set(host.info))
    if lacking:
        pytest.skip(f"this ComfyUI lacks {', '.join(lacking)}")
    answer = host.run(prompt).answer
    errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert errors and all(error["type"] == "value_not_in_list" for error in errors), errors
    assert all(error["extra_info"]["input_name"].rstrip("12") in FILES for error in errors), errors
