"""Queue an API workflow on a running ComfyUI and save its images.

    python -m workflows.run workflows/api/quickstart.json
    python -m workflows.run workflows/api/quickstart.json --set 5.seed=7 --set "GMFlow KSampler.guidance=0.6" --out out

Exit codes: 0 done, 1 an error while it ran, 2 wrong use (file, --set), 3 no server, 4 refused by the server, 5 timeout.
Standard library only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path

FAILED, USAGE, NO_SERVER, REFUSED, TIMEOUT = 1, 2, 3, 4, 5
POLL = 0.25  # seconds
FORGOTTEN = 20  # polls after which a prompt that is nowhere is lost


class RunError(Exception):
    """What went wrong, in one line, and the exit code that says so."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def one_line(text) -> str:
    """Text of a server without line breaks and without what a terminal would obey, at most 500 characters."""
    line = " ".join(str(text)[:2000].split())[:500]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


@contextmanager
def understood(url: str):
    """An answer that has another shape than a ComfyUI's is one line."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise RunError(NO_SERVER, f"{url}: the answer is not that of a ComfyUI") from None


# ---- the file ----------------------------------------------------------------------------------

def load(path: Path) -> dict:
    """An API workflow: node id to {class_type, inputs}."""
    if path.exists() and not path.is_file():
        raise RunError(USAGE, f"{path}: is no file")
    try:
        workflow = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RunError(USAGE, f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RunError(USAGE, f"{path}: not JSON: {one_line(error)}") from None
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        twin = path.parent / "api" / path.name
        hint = twin if twin.is_file() else "the one in workflows/api/, or export it from the page in API format"
        raise RunError(USAGE, f"{path}: this is a UI workflow, which only the page can open; use {hint}")
    nodes = workflow.values() if isinstance(workflow, dict) else []
    if not nodes or not all(isinstance(n, dict) and "class_type" in n and isinstance(n.get("inputs"), dict)
                            for n in nodes):
        raise RunError(USAGE, f"{path}: not an API workflow (node ids with class_type and inputs)")
    return workflow


def title(workflow: dict, node_id) -> str:
    node = workflow.get(str(node_id), {})
    return f"node {node_id} ({node.get('_meta', {}).get('title') or node.get('class_type', 'unknown')})"


def override(workflow: dict, setting: str) -> None:
    """Apply one ``node.input=value``; the node by id or title, the value as JSON or else as text."""
    target, equals, text = setting.partition("=")
    name, dot, key = target.rpartition(".")
    if not equals or not dot:
        raise RunError(USAGE, f"--set {setting}: write node.input=value")
    found = [i for i, node in workflow.items() if i == name or node.get("_meta", {}).get("title") == name]
    if len(found) != 1:
        nodes = ", ".join(title(workflow, i) for i in found or workflow)
        raise RunError(USAGE,
                       f"--set {setting}: {'several nodes are' if found else 'no node is'} called {name!r}: {nodes}")
    inputs = workflow[found[0]]["inputs"]
    if key not in inputs:
        raise RunError(USAGE, f"--set {setting}: {title(workflow, found[0])} has no input {key!r}; "
                              f"it has {', '.join(inputs)}")
    try:
        inputs[key] = json.loads(text)
    except ValueError:
        inputs[key] = text


# ---- the server --------------------------------------------------------------------------------

class Server:
    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def request(self, path: str, body=None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise RunError(NO_SERVER,
                           f"no ComfyUI at {self.url}: {one_line(getattr(error, 'reason', error))}") from None

    def json(self, path: str, body=None):
        try:
            return json.loads(self.request(path, body))
        except urllib.error.HTTPError as error:
            raise RunError(NO_SERVER, f"{self.url}{path}: the server answered {error.code} {error.reason}") from None
        except ValueError:
            raise RunError(NO_SERVER, f"{self.url}{path}: the answer is not JSON; is this a ComfyUI?") from None

    def queue(self, workflow: dict) -> str:
        """Queue it; the prompt's id."""
        try:
            with understood(self.url):
                prompt_id = json.loads(self.request("/prompt", {"prompt": workflow}))["prompt_id"]
                return urllib.parse.quote(prompt_id, safe="")
        except urllib.error.HTTPError as error:
            raise RunError(REFUSED, f"refused: {self.refusal(workflow, error)}") from None

    @staticmethod
    def refusal(workflow: dict, error: urllib.error.HTTPError) -> str:
        """Which input of which node the server does not accept."""
        try:
            answer = json.loads(error.read())
            reasons = [
                f"{title(workflow, node)}: {fault.get('extra_info', {}).get('input_name', 'node')}: "
                + one_line(f"{fault.get('message')} ({fault.get('details')})")
                for node, faults in (answer.get("node_errors") or {}).items() for fault in faults.get("errors", [])
            ]
            general = answer.get("error", {})
            general = (general if isinstance(general, str)
                       else f"{general.get('message', '')} {general.get('details', '')}")
            return "; ".join(reasons) or one_line(general) or f"{error.code} {error.reason}"
        except (ValueError, AttributeError):
            return f"{error.code} {error.reason}"

    def wait(self, workflow: dict, prompt_id: str, timeout: float, say) -> dict:
        """The history entry once it is done."""
        begin, last, missing = time.monotonic(), None, 0
        while True:
            history, queue = self.json(f"/history/{prompt_id}"), self.json("/queue")
            with understood(self.url):
                if (entry := history.get(prompt_id)) is not None:
                    return entry
                running = any(item[1] == prompt_id for item in queue.get("queue_running", []))
                before = sorted(item[0] for item in queue.get("queue_pending", []))
                mine = [item[0] for item in queue.get("queue_pending", []) if item[1] == prompt_id]
                state = "running" if running else f"waiting, {before.index(mine[0]) + 1} in the queue" if mine else last
            missing = 0 if running or mine else missing + 1
            if missing > FORGOTTEN:
                raise RunError(NO_SERVER, f"{self.url}: the prompt is neither queued nor done any more; was the server "
                                          "restarted? Run the command again")
            if time.monotonic() - begin > timeout:
                raise RunError(TIMEOUT, f"not done after {timeout:g} s; it goes on in the server (prompt {prompt_id})")
            if state != last:
                say(state)
                last = state
            time.sleep(POLL)


def failure(workflow: dict, entry: dict) -> str | None:
    """Node and message of an execution that failed or was stopped."""
    status = entry.get("status", {})
    for kind, detail in status.get("messages", []):
        if kind == "execution_error":
            kind = str(detail.get("exception_type")).rpartition(".")[2]
            return f"{title(workflow, detail.get('node_id'))}: {kind}: {one_line(detail.get('exception_message'))}"
        if kind == "execution_interrupted":
            return f"{title(workflow, detail.get('node_id'))}: interrupted"
    return "failed" if status.get("status_str") == "error" else None


def save_images(server: Server, workflow: dict, entry: dict, folder: Path) -> list[Path]:
    """Every image of the outputs; those of Preview Image only where there are no others."""
    found = [(node, image) for node, output in entry.get("outputs", {}).items() for image in output.get("images", [])]
    kept = [image for node, image in found if workflow.get(node, {}).get("class_type") != "PreviewImage"]
    images = kept or [image for _, image in found]
    paths = []
    for image in images:
        keys = ("filename", "subfolder", "type")
        path = folder / safe_path(server, *(image.get(key, "") for key in keys[:2]))
        try:
            query = urllib.parse.urlencode({key: image.get(key, "") for key in keys})
            data = server.request("/view?" + query)
        except urllib.error.HTTPError as error:
            raise RunError(FAILED, f"{path.name}: the server answered {error.code} {one_line(error.reason)}") from None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            part.write_bytes(data)
            os.replace(part, path)
        except OSError as error:
            raise RunError(FAILED, f"{one_line(path)}: cannot be written: {error.strerror or error}") from None
        paths.append(path)
    return paths


def safe_path(server: Server, filename, subfolder) -> Path:
    """Where an image of a server goes below our folder, whatever the server calls it. RunError for no name at all."""
    inside = [part for part in str(subfolder).replace("\\", "/").split("/") if part not in ("", ".", "..")]
    name = str(filename).replace("\\", "/").split("/")[-1]
    whole = "".join([*inside, name])
    if not isinstance(filename, str) or name in ("", ".", "..") or not whole.isprintable() or ":" in whole:
        raise RunError(NO_SERVER, f"{server.url}: names an image {one_line(repr(filename))}, which is no file name")
    return Path(*inside, name)


# ---- command line ------------------------------------------------------------------------------

def run(arguments) -> int:
    workflow = load(arguments.file)
    for setting in arguments.set:
        override(workflow, setting)
    server = Server(arguments.server)
    begin = time.monotonic()
    prompt_id = server.queue(workflow)
    print(f"queued as {prompt_id}", flush=True)
    entry = server.wait(workflow, prompt_id, arguments.timeout, lambda state: print(state, flush=True))
    with understood(server.url):
        if problem := failure(workflow, entry):
            raise RunError(FAILED, problem)
        paths = save_images(server, workflow, entry, arguments.out)
    for path in paths:
        print(path)
    print(f"done in {time.monotonic() - begin:.1f} s, {len(paths)} images")
    return 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.run", description="Queue an API workflow on a running ComfyUI and save its images."
    )
    parser.add_argument("file", type=Path, help="a file of workflows/api/")
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL", help="default: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE",
                        help="change an input; node by id or title")
    parser.add_argument("--out", type=Path, default=Path("output"), metavar="DIR",
                        help="where images go (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S",
                        help="seconds to wait (default: %(default)g)")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("error: stopped; the server goes on", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
