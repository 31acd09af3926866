"""Imports go one way: gmflow_core knows nothing of its users, train nothing of ComfyUI. Read from the
syntax tree of every file, so that an import inside a function counts too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "gmflow_core").rglob("*.py"))
TRAIN = sorted((ROOT / "train").rglob("*.py"))
NODES = sorted((ROOT / "nodes").rglob("*.py"))

CORE_ALLOWED = {"torch", "safetensors"}
# The command line draws pictures and progress bars.
CORE_TOOLS = {"__main__.py", "charts.py", "cli.py", "demo.py", "views.py", "pictures.py", "tiles.py"}
TOOLS_ALLOWED = CORE_ALLOWED | {"numpy", "PIL", "tqdm"}
HOSTS = {"comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "execution", "server"}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(level, dotted name) of every import, import_module("...") and __import__("...") with a literal."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                target = node.args[0].value
                found.append((len(target) - len(target.lstrip(".")), target.lstrip(".")))
    return found


def top_level(path: Path) -> set[str]:
    """The packages that a file imports absolutely, the standard library left out."""
    names = {name.split(".")[0] for level, name in imports(ast.parse(path.read_text())) if level == 0}
    return names - set(sys.stdlib_module_names)


def test_there_is_something_to_check():
    assert len(CORE) > 10


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_imports_torch_safetensors_and_itself(path):
    allowed = TOOLS_ALLOWED if path.name in CORE_TOOLS else CORE_ALLOWED
    assert top_level(path) <= allowed


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_reaches_itself_by_relative_imports_that_stay_inside(path):
    """Inside ComfyUI the package is not called gmflow_core."""
    depth = len(path.relative_to(ROOT / "gmflow_core").parts)  # dots that reach gmflow_core itself
    for level, name in imports(ast.parse(path.read_text())):
        assert level <= depth, f"line imports {'.' * level}{name}, outside gmflow_core"
        assert level or name.split(".")[0] != "gmflow_core"


@pytest.mark.parametrize("path", TRAIN, ids=relative)
def test_train_knows_no_host(path):
    assert not top_level(path) & HOSTS
    for level, name in imports(ast.parse(path.read_text())):
        assert not (level > 1 and name.split(".")[0] == "nodes")


def test_importing_the_package_loads_nothing_else():
    """In a fresh process, beyond what torch and safetensors load themselves."""
    code = (
        "import sys, torch, safetensors.torch; before = set(sys.modules); import gmflow_core; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= CORE_ALLOWED | {"gmflow_core"}


def test_the_walker_sees_what_it_must():
    """Imports in functions, under conditions, by name."""
    source = "\n".join([
        "def f():", " import comfy.utils", "if 1:", " from nodes import x",
        "importlib.import_module('folder_paths')", "from ..a import b",
    ])
    assert sorted(imports(ast.parse(source))) == [(0, "comfy.utils"), (0, "folder_paths"), (0, "nodes"), (2, "a")]


@pytest.mark.parametrize("path", NODES, ids=relative)
def test_only_host_touches_comfyui(path):
    """comfy_api is ComfyUI's public interface for nodes; everything else of it is host.py's."""
    allowed = {"torch", "numpy", "comfy_api", "tqdm"}
    if path.name in ("host.py", "host_adapter.py", "host_sampling.py"):
        allowed |= {"comfy", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server"}
    assert top_level(path) <= allowed


@pytest.mark.parametrize("path", NODES, ids=relative)
def test_nodes_reach_the_core_by_relative_imports(path):
    above = [name for level, name in imports(ast.parse(path.read_text())) if level > 1]
    assert all(name.split(".")[0] == "gmflow_core" for name in above)


def test_the_pack_is_imported_lazily():
    """The entry point alone, without ComfyUI and without torch."""
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}); "
        "pack = importlib.util.module_from_spec(spec); sys.modules['pack'] = pack; spec.loader.exec_module(pack); "
        "assert callable(pack.comfy_entrypoint) and 'torch' not in sys.modules and 'pack.nodes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
