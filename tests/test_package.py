"""What the registry's package would hold, read as ``comfy node pack`` reads it: git's files less .comfyignore."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pathspec
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# The registry's scanner flags a version for these, wherever they stand.
FLAGGED = (
    "os.environ", "os.system", "subprocess", "requests.", "urllib", "socket", ".connect(", "exec(", "compile(",
    "__import__", "importlib", "pickle.load", "base64", "ctypes",
)
# What ComfyUI itself installs, and ComfyUI.
BROUGHT = {
    "torch", "safetensors", "numpy", "PIL", "tqdm", "comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "nodes",
}


def shipped() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    return [name for name in listed.splitlines() if not ignored.match_file(name)]


def test_everything_that_a_user_needs_is_there_and_nothing_else():
    names = shipped()
    for needed in ("__init__.py", "pyproject.toml", "LICENSE", "README.md", "models/gmdit_digits.safetensors",
                   "nodes/host.py", "nodes/imagenet_classes.txt", "gmflow_core/model/gmdit.py",
                   "web/docs/GMFlowKSampler/en.md", "locales/zh/nodeDefs.json", "workflows/quickstart.json",
                   "workflows/quickstart.jpg", "workflows/api/quickstart.json"):
        assert needed in names
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"gmflow_core", "nodes", "models", "web", "locales", "workflows"}
    assert not [name for name in names if name.startswith("workflows/") and name.endswith(".py")]
    assert sum((ROOT / name).stat().st_size for name in names) < 16e6


@pytest.mark.skipif(shutil.which("comfy") is None, reason="needs comfy-cli")
def test_comfy_cli_packs_the_same(tmp_path):
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    environment = os.environ | {"DO_NOT_TRACK": "1", "HOME": str(tmp_path)}
    for verb in ("validate", "pack"):
        command = ["comfy", "--skip-prompt", "node", verb]
        done = subprocess.run(command, cwd=tmp_path / "clone", env=environment, capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    packed = set(zipfile.ZipFile(tmp_path / "clone" / "node.zip").namelist())
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    tracked = subprocess.run(["git", "ls-tree", "-r", "--name-only", "HEAD"], cwd=ROOT, capture_output=True,
                             text=True, check=True)
    assert packed == {name for name in tracked.stdout.splitlines() if not ignored.match_file(name)}


def test_no_example_workflows_folder_hides_ours():
    """ComfyUI serves the first of several folder names that exists."""
    assert not [n for n in ("example_workflows", "example", "examples", "workflow") if (ROOT / n).exists()]


def test_nothing_that_a_scanner_flags():
    found = []
    for name in shipped():
        if name.endswith(".py"):
            text = (ROOT / name).read_text()
            found += [(name, word) for word in FLAGGED if word in text]
            found += [(name, call) for call in re.findall(r"(?<![\w.])eval\(", text)]
    assert not found


def test_nothing_is_downloaded():
    """No address in the code: what a page offers to download stands in a workflow, for a person to click."""
    addresses = [
        address for name in shipped() if name.endswith(".py")
        for address in re.findall(r"https?://[^\s\"')]+", (ROOT / name).read_text())
    ]
    assert set(addresses) <= {"https://git-lfs"}  # how a Git LFS pointer begins


def test_only_packages_that_comfyui_brings():
    assert PROJECT["project"]["dependencies"] == []
    for name in shipped():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / name).read_text())):
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
                tops = {item.split(".")[0] for item in found} - set(sys.stdlib_module_names) - {"__future__"}
                assert tops <= BROUGHT, name


def test_metadata():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower() and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.3.64"
    assert (ROOT / comfy["Icon"]).is_file()
    assert any(c.startswith("License ::") for c in project["classifiers"])
