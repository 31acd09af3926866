"""A real ComfyUI in its own process, and API prompts to run in it. Standard library and safetensors only.

Nothing here imports ComfyUI: its interpreter may be another one, and the repository's root must never be
on the ``sys.path`` of a process that imports it (``nodes`` is a module of ComfyUI's too).
"""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from itertools import count
from pathlib import Path

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
MISSING = "ComfyUI not found: host tests skipped; set COMFYUI_PATH"
START_LIMIT = 240  # seconds


# ---- checkouts ---------------------------------------------------------------------------------

def checkouts() -> list[Path]:
    """Folders of COMFYUI_PATH (one or several, as in PATH), else comfy-cli's default workspace."""
    named = os.environ.get("COMFYUI_PATH")
    if named is None:
        default = Path.home() / "comfy" / "ComfyUI"
        return [default] if (default / "main.py").is_file() else []
    found = [Path(part).expanduser().resolve() for part in named.split(os.pathsep) if part]
    for folder in found:
        if not (folder / "main.py").is_file():
            raise SystemExit(f"COMFYUI_PATH: {folder} holds no main.py")
    return found


def version(checkout: Path) -> str:
    text = (checkout / "comfyui_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text)[1]


def interpreter(checkout: Path) -> str:
    """The Python that this checkout's dependencies are installed in."""
    candidates = [checkout / venv / "bin" / "python" for venv in (".venv", "venv")]
    return str(next((python for python in candidates if python.is_file()), sys.executable))


def clean_env() -> dict[str, str]:
    """One thread, no GPU, and nothing of the test process on the path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


# ---- prompts -----------------------------------------------------------------------------------

class Node(list):
    """A node of a :class:`Graph`; itself the link to the node's first output."""

    def out(self, slot: int) -> list:
        return [self[0], slot]


class Graph(dict):
    """An API prompt. ``add`` fills widgets that are not given with the node's defaults."""

    def __init__(self, info: dict):
        super().__init__()
        self.info = info

    def add(self, class_type: str, **inputs) -> Node:
        key = str(len(self) + 1)
        self[key] = {"class_type": class_type, "inputs": self.filled(class_type, **inputs)}
        return Node([key, 0])

    def filled(self, class_type: str, **inputs) -> dict:
        """These inputs, and the defaults of widgets that are not among them."""
        for name, spec in self.info[class_type]["input"].get("required", {}).items():
            if name in inputs:
                continue
            options = spec[1] if len(spec) > 1 else {}
            if "default" in options:
                inputs[name] = options["default"]
            elif isinstance(spec[0], list):
                inputs[name] = spec[0][0]
            elif spec[0] == "COMBO":
                inputs[name] = options["options"][0]
        return inputs


class Result:
    """A finished prompt: its history entry, or why the server refused it."""

    def __init__(self, host: Host, answer: dict):
        self.host, self.answer = host, answer
        self.outputs = answer.get("outputs", {})

    @property
    def ok(self) -> bool:
        return self.answer.get("status", {}).get("status_str") == "success"

    @property
    def messages(self) -> dict[str, dict]:
        return dict(self.answer.get("status", {}).get("messages", []))

    @property
    def interrupted(self) -> bool:
        return "execution_interrupted" in self.messages

    @property
    def failed_node(self) -> str | None:
        return self.messages.get("execution_error", {}).get("node_type")

    @property
    def error(self) -> str:
        """What the user reads: a node's exception, or the validation's complaint. Empty if all went well."""
        failed = self.messages.get("execution_error")
        if failed:
            return f"{failed['exception_type']}: {failed['exception_message']}"
        if "node_errors" in self.answer or "error" in self.answer:
            nodes = [
                f"{e['message']}: {e['details']}"
                for node in self.answer.get("node_errors", {}).values() for e in node["errors"]
            ]
            return "\n".join([self.answer["error"]["message"], *nodes])
        return ""

    def latent(self, node: Node):
        """The tensor that a SaveLatent node wrote."""
        (where,) = self.outputs[node[0]]["latents"]
        return load_file(self.host.base / "output" / where["subfolder"] / where["filename"])["latent_tensor"]

    def images(self, node: Node) -> list[bytes]:
        """PNG files of a SaveImage or preview node."""
        return [self.host.get(f"/view?{urllib.parse.urlencode(where)}") for where in self.outputs[node[0]]["images"]]


class Host:
    """A running server with the pack in it. Start it with :meth:`start`, stop it with :meth:`stop`."""

    def __init__(self, checkout: Path, base: Path, options: tuple[str, ...] = (), packs: tuple[Path, ...] = (),
                 **env: str):
        """``packs``: folders of further custom nodes; ``env``: of the server's process."""
        self.checkout, self.base, self.options, self.env = checkout, base, options, env
        self.version, self.python = version(checkout), interpreter(checkout)
        self.log_path = base / "server.log"
        self.models = base / "models" / "diffusion_models"
        self.counter = count()
        for name in ("custom_nodes", "input", "output", "temp", "user", "models/diffusion_models", "models/loras"):
            (base / name).mkdir(parents=True)
        wrappers = Path(__file__).parent / "wrappers"
        packs = [("gmflow-nodes", ROOT), ("test-wrappers", wrappers), *((pack.name, pack) for pack in packs)]
        for name, folder in packs:
            (base / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            self.python, "main.py", "--cpu", "--base-directory", str(self.base), "--port", str(self.port),
            "--disable-auto-launch", "--disable-api-nodes", "--preview-method", "latent2rgb",
            "--database-url", "sqlite:///:memory:", *self.options,  # else it is the checkout's own
        ]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.checkout, env=clean_env() | self.env, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True
            )
        deadline = time.monotonic() + START_LIMIT
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"ComfyUI {self.version} did not start: {' '.join(command)}\n{self.log()[-6000:]}")
            try:
                self.info = json.loads(self.get("/object_info"))
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.25)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    # HTTP

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, data: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else {}

    def queue(self, prompt: dict, client_id: str | None = None) -> dict:
        """The server's answer: a prompt_id, or the validation's errors."""
        return self.post("/prompt", {"prompt": prompt} | ({"client_id": client_id} if client_id else {}))

    def wait(self, prompt_id: str, limit: float = 240) -> Result:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server is gone\n{self.log()[-6000:]}"
            history = json.loads(self.get(f"/history/{prompt_id}"))
            if prompt_id in history:
                return Result(self, history[prompt_id])
            time.sleep(0.03)
        raise TimeoutError(f"prompt {prompt_id} took more than {limit} s")

    def run(self, prompt: dict) -> Result:
        """Queue and wait; a refused prompt is a Result too."""
        answer = self.queue(prompt)
        accepted = "prompt_id" in answer and not answer.get("node_errors")
        return self.wait(answer["prompt_id"]) if accepted else Result(self, answer)

    def done(self, prompt: dict) -> Result:
        """Run a prompt that must succeed."""
        result = self.run(prompt)
        assert result.ok, f"{result.failed_node}: {result.error}\n" + "".join(
            result.messages.get("execution_error", {}).get("traceback", [])[-4:]
        )
        return result

    def refused(self, prompt: dict) -> str:
        """Run a prompt that must fail with a message for people; the message."""
        result = self.run(prompt)
        assert not result.ok and result.error, "this should have failed"
        return result.error

    # graphs

    def graph(self) -> Graph:
        return Graph(self.info)

    def save(self, graph: Graph, latent) -> Node:
        """A SaveLatent that no cache answers."""
        return graph.add("SaveLatent", samples=latent, filename_prefix=f"latents/t{next(self.counter)}")

    def latents(self, graph: Graph, *links):
        """Run the graph and return the tensors of these LATENT links (one alone: the tensor)."""
        saved = [self.save(graph, link) for link in links]
        result = self.done(graph)
        tensors = [result.latent(node) for node in saved]
        return tensors[0] if len(tensors) == 1 else tensors

    def put_latent(self, name: str, tensor) -> str:
        """A file for LoadLatent, which takes it as it is."""
        import torch

        save_file({"latent_tensor": tensor.contiguous(), "latent_format_version_0": torch.tensor([])},
                  self.base / "input" / name)
        return name

    def memory(self) -> int:
        """Resident bytes of the server."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def python_inside(self, script: Path, *arguments: str) -> str:
        """Run a script with the checkout as its folder and first import path; its standard output."""
        env = clean_env() | self.env | {"PYTHONPATH": str(self.checkout)}
        done = subprocess.run(
            [self.python, str(script), *arguments], cwd=self.checkout, env=env, capture_output=True,
            text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


# ---- progress ----------------------------------------------------------------------------------

class Listener:
    """A WebSocket client of the server, as the page has one: JSON messages and previews."""

    def __init__(self, host: Host):
        self.client_id = uuid.uuid4().hex
        self.stream = socket.create_connection(("127.0.0.1", host.port), timeout=120)
        key = base64.b64encode(os.urandom(16)).decode()
        self.stream.sendall((
            f"GET /ws?clientId={self.client_id} HTTP/1.1\r\nHost: 127.0.0.1:{host.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode())
        self.file = self.stream.makefile("rb")
        assert b"101" in self.file.readline()
        while self.file.readline().strip():
            pass

    def close(self) -> None:
        self.file.close()
        self.stream.close()

    def frame(self) -> tuple[int, bytes]:
        """(opcode, payload) of one whole message; control frames are skipped."""
        kind, payload = 0, b""
        while True:
            head, size = self.file.read(2)
            size &= 127
            if size > 125:
                kind, length = (">H", 2) if size == 126 else (">Q", 8)
                (size,) = struct.unpack(kind, self.file.read(length))
            part = self.file.read(size)
            if head & 15 >= 8:
                continue
            kind, payload = head & 15 or kind, payload + part
            if head & 128:
                return kind, payload

    def until_done(self, prompt_id: str) -> tuple[list[dict], list[bytes]]:
        """The JSON messages and the binary ones, up to the prompt's end."""
        messages, binary = [], []
        while True:
            kind, payload = self.frame()
            if kind == 2:
                binary.append(payload)
                continue
            message = json.loads(payload)
            messages.append(message)
            ends = ("execution_success", "execution_error", "execution_interrupted")
            if message["type"] in ends and message["data"].get("prompt_id") == prompt_id:
                return messages, binary
