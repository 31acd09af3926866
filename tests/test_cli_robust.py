"""``python -m gmflow_core`` where the disk is full, the terminal knows only ASCII, or Ctrl-C comes:
one line, no half file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child import ROOT, output_of
from safetensors.torch import load_file
from test_cli import checkpoint, points, run

from gmflow_core import cli
from gmflow_core.__main__ import main
from gmflow_core.checkpoint import convert
from gmflow_core.files import remove_remains, write_atomically, write_text

__all__ = ["checkpoint", "points"]  # fixtures

# A limit on the size of files is what a full disk is: writing stops in the middle.
FULL = """
import contextlib, io, os, resource
from gmflow_core.__main__ import main
checkpoint, out = sys.argv[1:]
commands = {
    "sample": ["sample", checkpoint, "--labels", "0-3", "--steps", "1", "--latents", "--out", out],
    "json": ["inspect", checkpoint, "--labels", "0", "--steps", "1", "--out", out + "/x.json"],
    "trace": ["inspect", checkpoint, "--labels", "0", "--steps", "1", "--out", out + "/x.safetensors"],
    "png": ["inspect", checkpoint, "--labels", "0", "--steps", "1", "--out", out + "/x.png"],
    "gif": ["inspect", checkpoint, "--labels", "0", "--steps", "2", "--out", out + "/x.gif"],
    "convert": ["convert", checkpoint, out + "/y.safetensors"],
}
for name, arguments in commands.items():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(name, code, sorted(os.listdir(out)), error.getvalue().strip().splitlines()[-1], sep="|")
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(checkpoint, tmp_path):
    lines = output_of(FULL, checkpoint, tmp_path).splitlines()
    assert len(lines) == 6
    for line in lines:
        name, code, left, error = line.split("|")
        assert code == "2" and left == "[]", line
        assert error.startswith("error: ") and "could not be written" in error and "File too large" in error, line


def test_ctrl_c(checkpoint, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gmflow_core.__main__.sample_images", interrupt)
    code, _, err = run(capsys, "sample", checkpoint, "--labels", "0", "--out", tmp_path)
    assert code == 130 and err.endswith("stopped\n")
    monkeypatch.setattr("gmflow_core.files.save_file", interrupt)
    code, _, err = run(capsys, "convert", checkpoint, tmp_path / "a.safetensors")
    assert code == 130 and err.endswith("stopped\n") and os.listdir(tmp_path) == []


def test_an_ascii_terminal(tmp_path, checkpoint):
    from gmflow_core import load_checkpoint, save_checkpoint

    path = tmp_path / "a.safetensors"
    save_checkpoint(path, load_checkpoint(checkpoint).model, class_names=["Ærø", "ø", "å", "日本"])
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "gmflow_core", "info", path], capture_output=True, text=True,
                          env=environment, cwd=ROOT)
    assert done.returncode == 0 and r"\xc6r\xf8" in done.stdout and not done.stderr


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory.\nTried"), MemoryError(), OSError(28, "No space"),
                                   ValueError("\x1b[2J")])
def test_what_a_command_raises_is_one_line(capsys, error):
    def action():
        raise error

    assert cli.run_command(action) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and text[:-1].isprintable()


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_devices_that_are_not_there(checkpoint, capsys, tmp_path, device):
    code, _, err = run(capsys, "sample", checkpoint, "--labels", "0", "--device", device, "--out", tmp_path)
    assert code == 2 and err.startswith(f"error: --device {device}: ") and err.count("\n") == 1


def test_equal_content_is_equal_bytes(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "0.safetensors")
    first = (tmp_path / "0.safetensors").read_bytes()
    for i in range(1, 8):  # safetensors' own order is another one in half of the files
        convert(checkpoint, tmp_path / f"{i}.safetensors")
        assert (tmp_path / f"{i}.safetensors").read_bytes() == first
    state = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in load_file(checkpoint).items())


def test_remains_of_killed_writers(tmp_path):
    path = tmp_path / "a[1].txt"
    for name in (".a[1].txt.0123abcd.tmp", ".b.txt.01234567.tmp", ".a[1].txt.other.tmp", "mine.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".a[1].txt.ffffffff.tmp").mkdir()
    (tmp_path / ".a[1].txt.ffffffff.tmp" / ".tmpAbCdEf").touch()  # of safetensors' own
    remove_remains(path)
    assert sorted(os.listdir(tmp_path)) == [".a[1].txt.other.tmp", ".b.txt.01234567.tmp", "mine.tmp"]
    remove_remains(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".a[1].txt.other.tmp", "mine.tmp"]


KILLED = """
import os, threading, time
from pathlib import Path
from gmflow_core.files import remove_remains, write_text
folder = Path(sys.argv[1])
remove_remains(folder)
print("ready", flush=True)
while True:
    write_text(folder / "a.txt", "x" * 10**7)
"""


def test_twenty_kills_leave_nothing_behind(tmp_path):
    """A writer is killed in the middle, twenty times: the file is whole, and the next writer clears what is left."""
    from child import PRELUDE

    cut = 0
    for i in range(20):
        process = subprocess.Popen([sys.executable, "-c", LIGHT + PRELUDE + KILLED, str(tmp_path)],
                                   stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05 + 0.01 * i)
        process.kill()
        process.wait()
        cut += any(name.endswith(".tmp") for name in os.listdir(tmp_path))
        path = tmp_path / "a.txt"
        assert not path.exists() or path.stat().st_size == 10**7
    assert cut  # so the kills came while it wrote
    remove_remains(tmp_path)
    assert os.listdir(tmp_path) in (["a.txt"], [])


# files.py without torch, which would take most of the time of a child.
LIGHT = f"""
import sys, types
for name in ("torch", "safetensors", "safetensors.torch"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch"].Tensor = sys.modules["safetensors"].safe_open = sys.modules["safetensors.torch"].save_file = object
sys.modules["safetensors.torch"].load = object
sys.modules["safetensors"].SafetensorError = ValueError
package = sys.modules["gmflow_core"] = types.ModuleType("gmflow_core")
package.__path__ = [{str(Path(ROOT) / "gmflow_core")!r}]
"""


def test_atomic_text_holds_odd_names(tmp_path):
    write_text(tmp_path / "a.txt", "folder \udcff")
    assert (tmp_path / "a.txt").read_text() == r"folder \udcff"
    with pytest.raises(OSError, match="a.txt could not be written .*kept"):
        write_atomically(tmp_path / "a.txt", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert (tmp_path / "a.txt").read_text() == r"folder \udcff" and os.listdir(tmp_path) == ["a.txt"]


def test_main_returns_and_never_raises(capsys):
    assert main(["info", "/dev/zero"]) == 2
    assert "a device or pipe" in capsys.readouterr().err
