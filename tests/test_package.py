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
    "torch", "safetensors", "numpy", "PIL", "tqdm", "comfy", "comfy_api", "comfy_execution", "folder_paths",
    "latent_preview", "nodes", "server",
}

LARGEST = 20e6  # bytes of the archive: 12 of them two models


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
                   "models/gmdit_characters.safetensors",
                   "nodes/host.py", "nodes/imagenet_classes.txt", "gmflow_core/model/gmdit.py",
                   "web/docs/GMFlowKSampler/en.md", "locales/zh/nodeDefs.json", "workflows/quickstart.json",
                   "workflows/quickstart.jpg", "workflows/api/quickstart.json"):
        assert needed in names
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert folders == {"gmflow_core", "nodes", "models", "web", "locales", "workflows", "docs"}
    assert not [name for name in names if name.startswith("workflows/") and name.endswith(".py")]


def test_the_pictures_of_the_readme_are_there_and_no_others_of_docs():
    """The registry shows README from the package."""
    linked = set(re.findall(r"\((docs/[^)\s]+\.(?:png|gif|jpg|svg|webp))\)", (ROOT / "README.md").read_text()))
    assert linked == {name for name in shipped() if name.startswith("docs/")} and linked


def test_the_archive_is_small(tmp_path):
    """What everybody downloads, compressed as the registry's package is."""
    with zipfile.ZipFile(tmp_path / "node.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in shipped():
            archive.write(ROOT / name, name)
    assert (tmp_path / "node.zip").stat().st_size < LARGEST


def test_what_comes_from_elsewhere_is_named():
    notice = (ROOT / "NOTICE").read_text()
    assert "nodes/imagenet_classes.txt" in notice and "BSD 3-Clause" in notice and "NOTICE" in shipped()
    names = (ROOT / "nodes" / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    assert len(names) == 1000 and (names[0], names[134], names[639]) == ("tench", "crane bird", "maillot tank suit")


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


# ---- installed as a package -------------------------------------------------------------------

HELP = """
import runpy, sys
import gmflow_core, train
print(gmflow_core.__file__, train.__file__)
for name in sys.argv[1:]:
    sys.argv[:] = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(name, "ended with", end.code)
"""


def commands() -> list[str]:
    """Every module that ``python -m`` runs, of what an installation brings."""
    found = []
    for folder in ("gmflow_core", "train"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
                found.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    return found


def test_an_installation_runs_every_command(tmp_path):
    """Not an editable one: a package that pyproject does not list is missing only there."""
    source, target = tmp_path / "source", tmp_path / "installed"
    for name in subprocess.run(["git", "ls-files", "gmflow_core", "train", "pyproject.toml", "README.md", "LICENSE"],
                               cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    install = ["pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run([sys.executable, "-m", *install, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = commands()
    assert {"gmflow_core", "train", "train.encode", "train.evaluate", "train.report", "train.reproduce"} <= set(names)
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", HELP, *names], cwd=tmp_path, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].count(str(target)) == 2
    for name in names:
        assert f"{name} ended with 0" in done.stdout.splitlines(), done.stdout + done.stderr
