"""The page's script reads a file that anybody may have written: numbers alone go into styles, shapes fit lengths."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "web" / "js" / "inspector.js"
SIZES = {"weights": (2, 2, 2), "means": (2, 2, 2, 3), "entropy": (2, 2), "rgb": (2, 2, 3, 3)}


def written(sizes=SIZES, **about) -> bytes:
    """A safetensors file of 2 x 2 pixels, two components and three channels."""
    said = {"title": "step 0", "parts": "hypotheses", "components": 2, "std": 0.1, "bits": 1.0,
            "colours": [[255, 0, 0], [0, 0, 255]]} | about
    header, data = {"__metadata__": {"gmflow_pixels": json.dumps(said)}}, b""
    for name, shape in sizes.items():
        count = 1
        for n in SIZES[name]:
            count *= n
        size = count * (1 if name == "rgb" else 2)
        header[name] = {"dtype": "U8" if name == "rgb" else "F16", "shape": shape,
                        "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parsed(content: bytes) -> dict:
    """What the script's ``parse`` makes of a file: its answer, or its error."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    text = SCRIPT.read_text(encoding="utf-8")
    functions = text[text.index("// A safetensors file") : text.index("// One pixel")]
    program = functions + """
        const bytes = new Uint8Array(require("fs").readFileSync(0));
        let said;
        try { said = parse(bytes.buffer); } catch (error) { said = { error: String(error) }; }
        console.log(JSON.stringify(said));
    """
    done = subprocess.run([node, "-e", program], input=content, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_a_file_of_ours():
    found = parsed(written())
    assert found["colours"] == [[255, 0, 0], [0, 0, 255]] and found["title"] == "step 0" and found["std"] == 0.1
    assert (found["height"], found["width"], found["count"], found["channels"]) == (2, 2, 2, 3)


@pytest.mark.parametrize("colours, expected", [
    ([["0,0,0) url(https://example.org/", "1e9", -5], [None, "x", 3.6]], [[0, 255, 0], [0, 0, 4]]),
    ([{"0": 7}, [[1], {}, "9"]], [[7, 0, 0], [1, 0, 9]]),
])
def test_colours_are_numbers_whatever_the_file_says(colours, expected):
    assert parsed(written(colours=colours))["colours"] == expected


@pytest.mark.parametrize("name, shape", [
    ("means", (2, 2, 2, 4)), ("means", (200, 2, 2, 3)), ("means", (2, 2, 2)), ("means", (2, -2, -2, 3)),
])
def test_shapes_that_do_not_fit_are_refused(name, shape):
    assert "Error" in parsed(written(SIZES | {name: shape}))["error"]
