"""``python -m workflows.run`` against a server that imitates ComfyUI's queue, history and pictures."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from workflows.run import FAILED, NO_SERVER, REFUSED, TIMEOUT, USAGE, main

pytestmark = pytest.mark.slow

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
QUICKSTART = str(WORKFLOWS / "api" / "quickstart.json")
SAMPLER = next(k for k, n in json.loads(Path(QUICKSTART).read_text(encoding="utf-8")).items()
               if n["class_type"] == "GMFlowKSampler")
DONE = {
    "status": {"status_str": "success", "completed": True, "messages": []},
    "outputs": {
        "9": {"images": [{"filename": "p.png", "subfolder": "", "type": "temp"}]},
        "10": {"images": [{"filename": "a.png", "subfolder": "gmflow", "type": "output"},
                          {"filename": "b.png", "subfolder": "../gmflow", "type": "output"}]},
        "11": {"text": ["no image"]},
    },
}
REFUSAL = {
    "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation", "details": ""},
    "node_errors": {SAMPLER: {"class_type": "GMFlowKSampler", "dependent_outputs": ["9"], "errors": [
        {"type": "value_smaller_than_min", "message": "Value 0 smaller than min of 1", "details": "steps",
         "extra_info": {"input_name": "steps"}},
    ]}},
}
CRASH = {"status": {"status_str": "error", "completed": False, "messages": [
    ["execution_start", {}],
    ["execution_error",
     {"node_id": SAMPLER, "exception_type": "somewhere.LabelError", "exception_message": "labels: 12 is\nno class"}],
]}, "outputs": {}}


@contextmanager
def comfy(entry=None, refusal=None, polls=2, status=200):
    """A server that is done with every prompt after ``polls`` looks at its history; it keeps the prompts."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        left = polls

        def answer(self, body, code=200):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"])
            self.answer(refusal or {"prompt_id": "p1", "number": 7}, 400 if refusal else status)

        def do_GET(self):
            url = urlsplit(self.path)
            if url.path == "/history/p1":
                Handler.left -= 1
                self.answer({"p1": entry} if entry and Handler.left < 0 else {})
            elif url.path == "/queue":
                waiting = [[6, "p0", {}, {}, []], [7, "p1", {}, {}, []]]
                self.answer({"queue_running": [] if Handler.left > 0 else waiting[1:],
                             "queue_pending": waiting if Handler.left > 0 else []})
            elif url.path == "/view":
                self.answer(parse_qs(url.query)["filename"][0].encode())
            else:
                self.answer({}, 404)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def error(capsys):
    """What was printed as the error: one line."""
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


def test_saves_the_outputs_not_the_previews(tmp_path, capsys):
    with comfy(DONE) as (url, seen):
        assert main([QUICKSTART, "--server", url, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gmflow" / "a.png").read_bytes() == b"a.png"
    assert {path.name for path in tmp_path.rglob("*.png")} == {"a.png", "b.png"}
    assert not list(tmp_path.parent.glob("gmflow")), "a subfolder leads nowhere outside"
    assert seen == [json.loads(Path(QUICKSTART).read_text(encoding="utf-8"))]
    text = capsys.readouterr().out
    assert "waiting, 2 in the queue" in text and "running" in text and "2 images" in text


def test_saves_previews_where_nothing_else_is(tmp_path):
    only_preview = {**DONE, "outputs": {"9": DONE["outputs"]["9"]}}
    with comfy(only_preview) as (url, _):
        assert main([QUICKSTART, "--server", url, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "p.png").is_file()


def test_saves_an_inspectors_panel_beside_the_image(tmp_path):
    path = WORKFLOWS / "api" / "inspect_components.json"
    ids = {node["class_type"]: number for number, node in json.loads(path.read_text(encoding="utf-8")).items()}
    entry = {**DONE, "outputs": {
        ids["SaveImage"]: {"images": [{"filename": "a.png", "subfolder": "gmflow", "type": "output"}]},
        ids["GMFlowInspector"]: {"images": [{"filename": "panel.png", "subfolder": "", "type": "temp"}]},
    }}
    with comfy(entry) as (url, _):
        assert main([str(path), "--server", url, "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.rglob("*.png")} == {"a.png", "panel.png"}


@pytest.mark.parametrize("target", [SAMPLER, "GMFlow KSampler"])
def test_set_by_id_or_title_with_json_or_text(tmp_path, target):
    with comfy(DONE) as (url, seen):
        main([QUICKSTART, "--server", url, "--out", str(tmp_path), "--set", f"{target}.steps=4", "--set",
              f"{target}.solver=GM-SDE"])
    assert seen[0][SAMPLER]["inputs"]["steps"] == 4 and seen[0][SAMPLER]["inputs"]["solver"] == "GM-SDE"


@pytest.mark.parametrize("setting, words", [
    ("nowhere.steps=4", "no node is called 'nowhere'"),
    (f"{SAMPLER}.stepz=4", "has no input 'stepz'; it has seed, steps"),
    (f"{SAMPLER}.steps", "write node.input=value"),
    ("steps=4", "write node.input=value"),
])
def test_wrong_set(capsys, setting, words):
    assert main([QUICKSTART, "--set", setting]) == USAGE
    assert words in error(capsys)


def test_a_title_that_several_nodes_have(capsys):
    assert main([str(WORKFLOWS / "api" / "guidance_sweep.json"), "--set", "GMFlow KSampler.seed=1"]) == USAGE
    assert "several nodes" in error(capsys)


def test_ui_format_is_named(capsys):
    assert main([str(WORKFLOWS / "quickstart.json")]) == USAGE
    text = error(capsys)
    assert "this is a UI workflow" in text and str(WORKFLOWS / "api" / "quickstart.json") in text


@pytest.mark.parametrize("content, words", [("{", "not JSON"), ("[]", "not an API workflow"),
                                            ("{}", "not an API workflow"), ('{"1": 2}', "not an API workflow")])
def test_other_files(tmp_path, capsys, content, words):
    path = tmp_path / "w.json"
    path.write_text(content)
    assert main([str(path)]) == USAGE
    assert words in error(capsys)
    assert main([str(tmp_path / "absent.json")]) == USAGE
    assert "No such file" in error(capsys)


def test_no_server(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert main([QUICKSTART, "--server", url]) == NO_SERVER
    assert f"no ComfyUI at {url}" in error(capsys)
    assert main([QUICKSTART, "--server", "nonsense"]) == NO_SERVER
    error(capsys)


def test_something_else_listens(capsys):
    with comfy(refusal=None, status=200) as (url, _):
        assert main([QUICKSTART, "--server", url + "/elsewhere", "--timeout", "0"]) == NO_SERVER
    assert "404" in error(capsys)


def test_refused(capsys):
    with comfy(refusal=REFUSAL) as (url, _):
        assert main([QUICKSTART, "--server", url]) == REFUSED
    assert f"refused: node {SAMPLER} (GMFlow KSampler): steps: Value 0 smaller than min of 1" in error(capsys)


@pytest.mark.parametrize("refusal", [{"error": "broken"},
                                     {"error": {"message": "no outputs", "details": ""}, "node_errors": {}}, {"x": 1}])
def test_refused_without_a_node(capsys, refusal):
    with comfy(refusal=refusal) as (url, _):
        assert main([QUICKSTART, "--server", url]) == REFUSED
    error(capsys)


def test_execution_error(capsys):
    with comfy(CRASH) as (url, _):
        assert main([QUICKSTART, "--server", url]) == FAILED
    assert f"node {SAMPLER} (GMFlow KSampler): LabelError: labels: 12 is no class" in error(capsys)


def test_interrupted(capsys):
    stopped = {"status": {"status_str": "error", "completed": False,
                          "messages": [["execution_interrupted", {"node_id": SAMPLER}]]}, "outputs": {}}
    with comfy(stopped) as (url, _):
        assert main([QUICKSTART, "--server", url]) == FAILED
    assert "interrupted" in error(capsys)


def test_timeout(capsys):
    with comfy(entry=None, polls=0) as (url, _):
        assert main([QUICKSTART, "--server", url, "--timeout", "0.3"]) == TIMEOUT
    assert "not done after 0.3 s" in error(capsys)


# ---- servers that are broken, hostile or gone --------------------------------------------------

@contextmanager
def answering(raw: bytes):
    """A server that says the same bytes to everyone."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(100_000)
                connection.sendall(raw)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


@pytest.mark.parametrize("raw", [
    b"garbage\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
    b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"prompt_id": 3}',
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n\xff\xfe\xfd",
])
def test_answers_that_are_no_comfyuis(tmp_path, capsys, raw):
    with answering(raw) as url:
        assert main([QUICKSTART, "--server", url, "--out", str(tmp_path / "out")]) == 3
    assert url in error(capsys) and not (tmp_path / "out").exists()


def images(*files):
    return {**DONE,
            "outputs": {"9": {"images": [dict(zip(("filename", "subfolder", "type"), file, strict=False))
                                         for file in files]}}}


@pytest.mark.parametrize("filename", ["..", ".", "", "a/..", 7, None, ["a"], "\x1b[2J.png", "C:evil.png", "a\0b"])
def test_names_that_are_no_file_names(tmp_path, capsys, filename):
    with comfy(images((filename, "", "output"))) as (url, _):
        assert main([QUICKSTART, "--server", url, "--out", str(tmp_path / "out")]) == 3
    assert "which is no file name" in error(capsys) and list(tmp_path.iterdir()) == []


def test_a_path_as_a_name_stays_inside(tmp_path):
    with comfy(images(("../../a.png", "../x", "output"), ("/etc/b.png", "", "output"))) as (url, _):
        assert main([QUICKSTART, "--server", url, "--out", str(tmp_path / "out")]) == 0
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")} == {"out/x/a.png", "out/b.png"}


@pytest.mark.parametrize("entry", [{"outputs": 3}, {"outputs": {"9": 3}}, {"outputs": {"9": {"images": 3}}},
                                   {"status": 3}, {"status": {"messages": [1]}}])
def test_histories_of_another_shape(tmp_path, capsys, entry):
    with comfy(entry) as (url, _):
        assert main([QUICKSTART, "--server", url, "--out", str(tmp_path)]) == 3
    assert "not that of a ComfyUI" in error(capsys)


def test_a_server_that_was_restarted(tmp_path, capsys, monkeypatch):
    """It knows nothing of the prompt: said at once, and not after ten minutes of silence."""
    from workflows import run as module

    monkeypatch.setattr(module, "POLL", 0.001)
    monkeypatch.setattr(module.Server, "json", lambda self, path, body=None: {})
    with comfy(DONE) as (url, _):
        assert main([QUICKSTART, "--server", url, "--out", str(tmp_path)]) == 3
    assert "neither queued nor done any more; was the server restarted?" in error(capsys)


def test_pictures_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "gmflow").write_text("a file where a folder belongs")
    with comfy(DONE) as (url, _):
        assert main([QUICKSTART, "--server", url, "--out", str(tmp_path)]) == 1
    assert "cannot be written" in error(capsys) and not list(tmp_path.glob(".*.part"))
