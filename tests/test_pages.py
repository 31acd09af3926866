"""README and docs/: links and anchors lead somewhere, pictures are shown, commands parse, and the Python in them runs.

Markdown as GitHub renders it. A page is a path from the root of the project.
"""

import argparse
import re
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from kinds import judge

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "workflows" / "README.md"]
IN_WORDS = re.compile(r"(?<!\!)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")   # [words](target), pictures apart
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
OURS = re.compile(r"(?:python|^torchrun .*) -m (gmflow_core|train[.\w]*|workflows\.run)([^|&]*)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def prose(text: str) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^    .*$", "", text, flags=re.M)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#{1,6} (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if not again else f"{slug}-{again}" for slug, n in found.items() for again in range(n + 1)}


def code(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


# ---- links -------------------------------------------------------------------------------------

@each_page
def test_every_link_leads_somewhere(page):
    text = prose(page.read_text(encoding="utf-8"))
    for target in IN_WORDS.findall(text) + [target for _, target in PICTURE.findall(text)]:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), f"{target}: no such heading"


def test_the_check_sees_what_it_must():
    text = "# A `b` c?\n\n## A b c\n## Twice\n## Twice\n\n[x](y.md#z) ![p](q.png) `[no](no.md)`\n\n    [no](no.md)\n"
    assert anchors(text) == {"a-b-c", "a-b-c-1", "twice", "twice-1"}
    assert IN_WORDS.findall(prose(text)) == ["y.md#z"] and PICTURE.findall(prose(text)) == [("p", "q.png")]


def test_every_page_and_every_picture_is_linked():
    """From README every page of docs/ can be reached; no picture lies there that no page shows."""
    reached, new = set(), {PAGES[0]}
    while new:
        page = new.pop()
        reached.add(page)
        for target in IN_WORDS.findall(prose(page.read_text(encoding="utf-8"))):
            there = (page.parent / target.partition("#")[0]).resolve()
            if there.suffix == ".md" and there.is_relative_to(ROOT) and there not in reached:
                new.add(there)
    assert reached >= set(PAGES)
    shown = {
        (p.parent / target).resolve() for p in PAGES for _, target in PICTURE.findall(p.read_text(encoding="utf-8"))
    }
    pictures = {p for p in (ROOT / "docs").iterdir() if p.suffix in (".png", ".gif", ".jpg")}
    assert pictures - shown == {ROOT / "docs" / "icon.png"}  # the registry's


@each_page
def test_pictures_have_words(page):
    assert all(words.strip() for words, _ in PICTURE.findall(page.read_text(encoding="utf-8")))


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150


def test_the_architecture_names_every_module():
    """By its file, or by its name in the table of its folder."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = ("gmflow_core", "nodes", "train", "workflows")
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.stem != "__init__"]
    assert not [str(p) for p in modules if f"`{p.stem}`" not in text and f"`{p.name}`" not in text]
    assert set(re.findall(r"`(\w+\.py)`", text)) <= {path.name for path in modules} | {"__init__.py"}


# ---- commands ----------------------------------------------------------------------------------

def commands() -> list:
    """Every ``python -m`` of ours in an indented block; a shell's variables are put in."""
    found = []
    for page in PAGES:
        text, variables = page.read_text(encoding="utf-8"), {}
        for line in re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M):
            named = re.fullmatch(r'(\w+)="?([^"]*)"?', line)
            if named:
                variables[named[1]] = named[2]
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            line = line.replace("-m train ...", "-m train --preset digits")
            for module, words in OURS.findall(line):
                found.append(pytest.param(module, shlex.split(words, comments=True), id=f"{page.name}: {line}"[:90]))
    return found


@pytest.mark.parametrize(("module", "words"), commands())
def test_commands_parse(module, words, monkeypatch):
    """By the command's own parser, which is stopped where it has understood everything."""
    class Understood(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    name = f"{module}.__main__" if find_spec(module).submodule_search_locations else module
    with pytest.raises(Understood):
        import_module(name).main()


@each_page
def test_files_that_commands_name_are_there(page):
    for name in re.findall(r"\b((?:models|workflows)/[\w./-]+\.\w+)", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file() or "/NAME." in name, name


# ---- Python ------------------------------------------------------------------------------------

def run(block: str, monkeypatch) -> dict:
    torch.manual_seed(0)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(block, "page", "exec"), names)
    return names


def test_python_of_the_readme_paints_the_characters(tmp_path, monkeypatch):
    """A judge that never saw the model tells their kinds."""
    (block,) = code(PAGES[0], "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    names = run(block.replace('"characters.png"', f'"{tmp_path / "characters.png"}"'), monkeypatch)
    assert (judge()(names["images"]) == torch.arange(16)).sum() >= 14
    assert names["posterior"].weights.shape[1] == 8
    torch.testing.assert_close(names["posterior"].weights.sum(1), torch.ones(16, 1, 24, 24))
    assert (tmp_path / "characters.png").stat().st_size > 1000


def test_python_of_the_api_page(monkeypatch, capsys):
    """The shapes that the page prints; the prior's own weights, to four standard errors."""
    page = ROOT / "docs" / "python-api.md"
    first, second = code(page, "python")
    run(first, monkeypatch)
    assert f"prints `{capsys.readouterr().out.strip()}`" in page.read_text(encoding="utf-8")
    names = run(second, monkeypatch)
    samples = names["samples"]
    assert abs((samples > 0).double().mean() - 0.7) < 4 * (0.7 * 0.3 / len(samples)) ** 0.5
    assert abs(samples.abs().mean() - 1) < 0.01 and abs(samples[samples > 0].std() - 0.1) < 0.01


# ---- numbers -----------------------------------------------------------------------------------

def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the rows of a page's tables whose first cell starts so."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row for row in table if row[0].startswith(first)]


@pytest.mark.parametrize(("page", "names"), [
    ("docs/characters.md", ("K = 8, GM-ODE 2", "K = 8, GM-SDE 2", "K = 1, GM-ODE 2")),
    ("docs/digits.md", ("K = 8 with the mean term, GM-ODE 2, limited", "K = 8 with the mean term, GM-SDE 2, limited",
                        "K = 8, GM-SDE 2, limited", "K = 1, GM-SDE 2")),
])
def test_tables_of_the_readme_are_those_of_the_pages(page, names):
    """FID at 1, 2, 4, 8 and 32 steps, from the page's first table of all six; vanilla's is its best solver's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = next(part for part in text.split("\n\n") if part.startswith(f"| [{Path(page).stem}]"))
    short = {cells[0]: cells[1:] for cells in
             ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:])}
    full: dict[str, list[str]] = {}
    for name, *cells in (row for row in rows(page, "") if len(row) == 7):
        full.setdefault(name, [cell.split(",")[0] for cell in cells])
    shown = (0, 1, 2, 3, 5)
    assert set(short) == {*names, "vanilla flow matching, its best solver"}
    assert all(short[name] == [full[name][i] for i in shown] for name in names)
    plain = [row for name, row in full.items() if name.startswith("vanilla, ") and "CFG" not in name]
    best = [min(float(row[i]) for row in plain) for i in shown]
    assert [float(cell) for cell in short["vanilla flow matching, its best solver"]] == best


def test_numbers_of_the_readme_are_those_of_the_characters():
    free = {row[1]: row for row in rows("docs/characters.md", "none") if len(row) == 7}
    fid = {steps: row[2] for steps, row in free.items()}
    assert fid["8"] == fid["32"]
    read = min(float(row[6].rstrip(" %")) for steps, row in free.items() if steps != "1")
    sentence = (f"FID {fid['2']} in two steps, {fid['4']} in four, {fid['8']} in eight and in 32, "
                f"and at least {read} % are of the kind that was asked for")
    assert sentence in (ROOT / "README.md").read_text(encoding="utf-8")
    steps, own = None, {}
    for row in rows("docs/characters.md", ""):
        if len(row) == 6 and "substeps" not in row[1]:
            steps = row[0] or steps
            own |= {steps: row[2:]} if row[1].endswith("its own") else {}
    assert own == {steps: row[2:6] for steps, row in free.items()}


def test_the_short_table_of_the_digits_is_the_long_one():
    """Every cell of docs/digits.md's first table, from the row of the second with that solver, guidance and steps."""
    def key(row):
        solver, *rest = re.sub(r", guidance .*|, CFG .*", "", row[0].partition(", ")[2]).split(", ")
        return ", ".join([solver, *rest])

    checkpoints = {"K = 8": "gmdit_digits", "K = 8 with the mean term": "digits-mean",
                   "K = 1": "digits-k1", "vanilla": "digits-vanilla"}
    full = {tuple(r[:4]): r for name in checkpoints.values() for r in rows("docs/digits.md", name) if len(r) == 13}
    for name, checkpoint in checkpoints.items():
        for row in rows("docs/digits.md", name + ", "):
            solver = {"DDPM": "SDE-DPM++ 1 (DDPM)", "Euler": "Euler (DDIM)"}.get(key(row), key(row))
            guidance = re.search(r"(guidance|CFG) ([\d.]+)$", row[0])
            guidance = "none" if not guidance else guidance[0].replace("guidance", "probabilistic")
            for steps, cell in zip("1 2 4 8 16 32".split(), row[1:], strict=True):
                if cell != "-":
                    long = full[checkpoint, solver, guidance, steps]
                    assert cell == f"{long[4]}, {float(long[9].rstrip('%')):.0f} %", (row[0], steps)
