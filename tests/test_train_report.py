"""The page about a run: what it shows is what the log says."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image
from test_train import CPU, TINY

import train.__main__ as command
from train.report import REPORT, checkpoint_info, duration, large, page, read_log, speed, tiles, write_report
from train.runlog import LOG
from train.svg import Line, chart, number, running_mean, thinned, value_range
from train.trainer import Trainer


class Reader(HTMLParser):
    """Attributes of all tags and all text; complains of what is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def titles(self) -> list[str]:
        return [a["aria-label"] for tag, a in self.tags if tag == "svg" and "aria-label" in a]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "a <b> & c"
    command.train(Trainer(replace(TINY, sample_every=2, save_every=2), folder, CPU))
    return folder


def log_of(folder, lines: list[dict]):
    folder.mkdir(exist_ok=True)
    (folder / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_finished_run_has_a_page_that_needs_nothing_else(folder):
    text = (folder / REPORT).read_text(encoding="utf-8")
    read = Reader(text)
    assert "a <b> & c" in read.words and "digits, step 6 of 6, finished" in read.words
    assert not {"script", "link", "iframe"} & {tag for tag, _ in read.tags}
    assert not re.search(r"https?:|url\(|@import", text)
    assert read.titles() == [
        "Loss", "Loss by noise level", "Transition loss", "Spectral loss", "Components in use",
        "Entropy of a pixel's weights, in nats",
        "Gradient norm, before clipping", "Learning rate", "Images a second",
    ]
    pictures = [a for tag, a in read.tags if tag == "img"]
    assert [a["alt"] for a in pictures] == ["samples of step 2", "samples of step 4", "samples of step 6"]
    for step, attributes in zip((2, 4, 6), pictures, strict=True):
        inside = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
        assert inside == (folder / f"samples-{step:06d}.png").read_bytes()
        assert Image.open(io.BytesIO(inside)).width > 100
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert ("lr", "0.001") in rows and ("parallel", "ddp") in rows and ("mixture", "K = 3") in rows
    assert ("betas", "0.9, 0.95") in rows
    assert ("data", "digits") in rows and ("transition ratio", "0.9") in rows


def test_the_figures_at_the_top_are_those_of_the_log(folder):
    lines, info = read_log(folder), checkpoint_info(folder)
    shown = dict(re.findall(r"<b>(.*?)</b><span>(.*?)</span>", "".join(tiles(lines, info, info["training"]["config"]))))
    shown = {label: value for value, label in shown.items()}
    assert float(shown["loss, smoothed"]) == pytest.approx(lines[-1]["loss_smooth"], rel=1e-3)
    trained = info["parameters"] + info["spectrum_parameters"]
    assert trained < 1e6 and shown["parameters"] == f"{trained:,}" and shown["images seen"] == "24"
    assert shown["skipped steps"] == "0"
    longest = max(line.get("save_seconds", 0) for line in lines)
    assert float(shown["longest halt for a save"].split()[0]) == pytest.approx(longest, rel=0.06)


def test_a_run_in_progress_without_a_save(tmp_path):
    """Lines of an older version and one that is being written; a loss that was not finite."""
    lines = [{"step": s, "loss": 1.0 / s, "loss_smooth": 1.0 / s, "grad_norm": 1.0, "seconds": 0.5 * s}
             for s in range(1, 40)]
    lines[9] = {"step": 10, "loss": None, "grad_norm": None, "skipped": 1}
    log_of(tmp_path, lines)
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 40, "lo')
    done = subprocess.run([sys.executable, "-m", "train.report", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / REPORT)
    read = Reader((tmp_path / REPORT).read_text(encoding="utf-8"))
    assert read.titles() == ["Loss, 1 skipped steps marked", "Gradient norm, before clipping"]
    assert "a run without a save, step 39" in read.words
    assert any("Nothing has been saved yet" in word for word in read.words)
    assert len([1 for tag, a in read.tags if a.get("class") == "mark"]) == 1
    assert not re.search(r"\b(nan|None|inf)\b", (tmp_path / REPORT).read_text(encoding="utf-8"))


def test_a_run_of_skipped_steps_alone(tmp_path):
    log_of(tmp_path, [{"step": 1, "loss": None, "grad_norm": None, "skipped": 1}])
    assert Reader(page(tmp_path, read_log(tmp_path))).titles() == []


def test_what_is_no_run_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    from train.report import main

    assert main() == 2 and f"error: {tmp_path}: no {LOG} in it; give the folder of a run" in capsys.readouterr().err
    (tmp_path / LOG).write_text("{half}\n")
    assert main() == 2 and f"{tmp_path / LOG}: 1 damaged lines are left out" in capsys.readouterr().err
    (tmp_path / LOG).write_text("")
    assert main() == 2 and "has no line yet" in capsys.readouterr().out
    assert not (tmp_path / REPORT).exists()


def test_a_run_that_stops_before_its_first_line_has_no_page(tmp_path):
    trainer = Trainer(replace(TINY, log_every=100), tmp_path, CPU)
    trainer.save()
    assert write_report(tmp_path) is None


def test_a_page_that_cannot_be_written_does_not_fail_the_run(tmp_path, monkeypatch, capsys):
    def full(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(command, "write_report", full)
    command.train(Trainer(TINY, tmp_path, CPU))
    assert "the report failed: No space left on device" in capsys.readouterr().err
    assert Trainer(TINY, tmp_path, CPU).step == 6


def test_speed_from_the_clock_of_older_logs():
    lines = [{"step": 10, "seconds": 5.0}, {"step": 20, "seconds": 7.0}, {"step": 30, "seconds": 12.0}]
    assert speed(lines, 4) == [(20, 20.0), (30, 8.0)] and speed(lines, None) == []
    assert speed([line | {"images_per_second": 3.0} for line in lines], 4)[0] == (10, 3.0)


# ---- charts ------------------------------------------------------------------------------------

def coordinates(svg: str, style: str) -> list[tuple[float, float]]:
    tree = ElementTree.fromstring(svg)
    (found,) = [node.get("d") for node in tree.iter("path") if node.get("class") == style]
    numbers = list(map(float, found[1:].split()))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_points_lie_where_their_values_are():
    svg = chart("t", [Line("a", [(0, 1.0), (50, 3.0), (100, 2.0)], smooth=False)], bounds=(0, 4))
    points = coordinates(svg, "c0 line")
    (x0, y0), (x1, y1), (x2, y2) = points
    ticks = {node.text: float(node.get("y")) - 4 for node in ElementTree.fromstring(svg).iter("text")
             if node.get("class") == "tick end"}
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert (y0, y1, y2) == pytest.approx((ticks["1"], ticks["3"], ticks["2"]), abs=0.1)
    assert ticks["3"] < ticks["2"] < ticks["1"]  # on a screen more is further up


def test_a_chart_of_several_lines_names_them_and_draws_both_pale_and_strong():
    svg = chart("a & b", [Line("x < y", [(s, math.sin(s)) for s in range(100)]), Line("none", []),
                          Line("z", [(3, 1.0)])], rule=(0.5, "half"))
    tree = ElementTree.fromstring(svg)
    assert [node.text for node in tree.iter("tspan")] == ["x < y", "z"]
    assert "half" in [node.text for node in tree.iter("text")]
    assert len(coordinates(svg, "c0 raw")) == len(coordinates(svg, "c0 line")) == 100
    assert len([1 for _ in tree.iter("circle")]) == 2  # a lone point
    assert chart("t", [Line("none", [])]) == ""
    assert ElementTree.fromstring(chart("flat", [Line("a", [(1, 2.0), (2, 2.0)])])) is not None


def test_means_and_ranges():
    flat = [(s, 5.0) for s in range(100)]
    assert running_mean(flat) == flat
    line = [(s, float(s)) for s in range(100)]
    smooth = running_mean(line)
    # Two neighbours on either side.
    assert smooth[50] == (50, 50.0) and smooth[0] == (0, 1.0) and smooth[99] == (99, 98.0)
    assert thinned(line, 500) is line and thinned(line, 50) == [(2 * i + 0.5, 2 * i + 0.5) for i in range(50)]
    low, high = value_range([*line, (100, 1e9)], (None, None))
    assert 0 > low > -10 and 99 < high < 120  # an outlier does not flatten the rest
    assert value_range(line, (0, 7)) == (0, 7) and value_range([(0, 0.0)], (0, None)) == (0, 1)
    assert [number(v) for v in (12000, 0.05, 2e-5, 0, 2500, -3e6)] == ["12k", "0.05", "2e-05", "0", "2.5k", "-3e+06"]
    assert [duration(s) for s in (59, 4382, 6761)] == ["59 s", "73 min", "1.9 h"]
    assert [large(n) for n in (24, 999_999, 675_129_632)] == ["24", "999,999", "675.1 M"]
