"""README, docs and the like: examples run, pages build without a warning, links lead somewhere, figures agree."""

import html.parser
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from PIL import Image
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import alexnet_jax
from tests.foreign_weights import torchvision_state, write_pth

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
IDEAS = [DOCS / f"{name}.md" for name in ("lrn", "pca_noise", "pooling", "data_parallelism")]
FOLDERS = [ROOT / f"{folder}/README.md" for folder in ("benchmarks", "results", "deploy")]
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *FOLDERS]
SHORT = [DOCS / f"{name}.md" for name in ("index", "running", "imagenet")]  # their examples need images or weights
MARKDOWN = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)  # anchors as GitHub makes them


def name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text("utf-8")], ids=name)
def test_examples_run_and_give_what_the_page_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = list(Sybil([PythonCodeBlockParser()], path=str(DOCS)).parse(page).examples())
    assert examples
    for example in examples:  # they share their names, from the top of the page to its end
        example.evaluate()


@pytest.mark.parametrize("page", SHORT, ids=name)
def test_short_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = [t.content for t in MARKDOWN.parse(page.read_text("utf-8")) if t.type == "fence" and t.info == "py"]
    assert blocks
    for block in blocks:
        side = 32
        if "alexnet.pth" in block:
            side = 224
            write_pth(tmp_path / "alexnet.pth", torchvision_state())
        exec(compile(block, page.name, "exec"), {"images": np.zeros((2, side, side, 3), np.uint8)})


def test_every_example_is_run_or_is_quoted_code():
    for page in [*PAGES, *LINKED]:
        kinds = {token.info for token in MARKDOWN.parse(page.read_text("utf-8")) if token.type == "fence"}
        assert kinds <= {"", "text", "bibtex", "python", "py", "diff", "{toctree}", "{eval-rst}"}, page
        assert "diff" not in kinds or page.name == "how-to-change.md", page  # whose test applies and runs them
        assert "py" not in kinds or page in [*IDEAS, *SHORT], page
        assert "python" not in kinds or page in PAGES, page


def test_first_screen_of_the_readme():
    """The information that a newcomer needs comes first, and the page stays short."""
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= 125
    first = "\n".join(lines[:45])
    for part in ("cifar.html", "papers.nips.cc", "](docs/kernels.png)", "<!-- run -->", "| preset | test accuracy |"):
        assert part in first, part
    for page in ("how-to-change.md#a-new-network", "how-to-change.md#a-new-recipe", "your-own-images.md"):
        assert f"](docs/{page})" in first


def test_the_readme_installs_runs_and_tests():
    commands = re.findall(r"<!-- (\w+) -->\n```\n(.+)\n```\n", (ROOT / "README.md").read_text("utf-8"))
    checks = "ruff format --check . && ruff check . && lint-imports && mypy && pytest -n 2"
    assert dict(commands) == {
        "run": "pip install -e . && python train.py quickstart && python eval.py runs/quickstart",
        "test": f'pip install --no-compile -e ".[test]" && {checks}',
    }


def test_accuracies_are_those_of_results():
    """The README's table has figures of docs/results.md, and those of single runs are in `results/`."""
    tables = (DOCS / "results.md").read_text("utf-8")
    rows = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| `cifar10")]
    assert len(rows) == 4
    for row in rows:
        assert f" | {re.search(r'[0-9.]+%( ± [0-9.]+)?', row)[0]} | " in tables, row
    measured = {json.loads(path.read_text())["accuracy"] for path in (ROOT / "results").glob("cifar10-*/test.json")}
    presets = tables[tables.index("## The presets") : tables.index("## The studies")]
    table = "\n".join(line for line in presets.splitlines() if line.startswith("|"))
    for accuracy in measured:
        assert f"{accuracy:.2%}" in table


def test_version_and_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # required by the format
    assert citation["cff-version"] == "1.2.0"
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    newest, date = re.search(r"^## \[(.+)\] - (\d{4}-\d{2}-\d{2})$", changelog, re.MULTILINE).groups()
    assert newest == alexnet_jax.__version__ == citation["version"]
    assert date == str(citation["date-released"])
    (paper, _) = citation["references"]
    assert paper["title"] in (ROOT / "README.md").read_text("utf-8").replace("{", "").replace("}", "")


def test_every_idea_has_what_a_page_needs():
    for page in IDEAS:
        kinds = {token.info for token in MARKDOWN.parse(page.read_text("utf-8")) if token.type == "fence"}
        text = page.read_text("utf-8")
        assert {"python", "py"} <= kinds, page
        assert "\n$$\n" in text, page
        assert f"](images/{page.stem}.png)" in text, page
        assert "../results/" in text, page
        assert f"\n{page.stem}\n" in (DOCS / "index.md").read_text("utf-8"), page


@pytest.mark.parametrize("page", IDEAS, ids=name)
def test_quoted_code_is_the_code(page):
    """A block of `py` on a page about an idea is a piece of a file that the page links to."""
    sources = [(page.parent / link).resolve() for link, _ in links(page) if re.fullmatch(r"\.\./[\w/]+\.py", link)]
    code = ["".join(source.read_text("utf-8").split()) for source in sources]
    quotes = [t.content for t in MARKDOWN.parse(page.read_text("utf-8")) if t.type == "fence" and t.info == "py"]
    assert quotes
    for quote in quotes:  # the formatter may break their lines elsewhere
        assert any("".join(quote.split()) in text for text in code), f"in none of the linked files:\n{quote}"


@pytest.mark.parametrize("page", IDEAS, ids=name)
def test_measured_rows_are_those_of_results(page):
    """Another test compares docs/results.md with the raw results; the rows here are copies from its tables."""
    known = (DOCS / "results.md").read_text("utf-8").splitlines()
    rows = [line for line in page.read_text("utf-8").splitlines() if re.match(r"\|.*\d% ± ", line)]
    assert bool(rows) == (page.stem != "data_parallelism")
    assert [row for row in rows if row not in known] == []


def test_every_situation_has_a_test():
    rows = [
        line for line in (DOCS / "guarantees.md").read_text("utf-8").splitlines() if re.match(r"\| (?!situation)", line)
    ]
    assert len(rows) > 80
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(?:\w+::)?(\w+)`", row.rsplit(" | ", 1)[-1])
        assert tests, row
        for file, function in tests:
            assert f"def {function}(" in (ROOT / "tests" / file).read_text("utf-8"), row


def test_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    arguments = [*command, "-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    for page in PAGES:
        built = (tmp_path / "html" / page.name).with_suffix(".html").read_text("utf-8")
        assert "problematic" not in built, page
    copies = {file.name for file in (tmp_path / "html" / "_downloads").rglob("*.*")}
    assert {"layers.py", "ablation-tips-cpu.jsonl", "README.md"} <= copies
    api = (tmp_path / "html" / "api.html").read_text("utf-8")
    for public in ("open_run", "Run.predict", "max_pool", "pca_noise", "AlexNet"):
        assert f'id="alexnet_jax.{public}"' in api


@pytest.mark.parametrize("page", [*PAGES, *LINKED], ids=name)
def test_links_lead_somewhere(page):
    assert [problem for link, image in links(page) if (problem := problem_with(page, link, image))] == []


def test_dead_links_are_found(tmp_path):
    """The check itself can fail."""
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`, once\n\n[a](#a-title-once) [b](#gone) [c](gone.md) ![d](page.md) [e](mailto:x) [f](https://)\n"
        '[g](https://example.org/) <img src="gone.png"> [h](page.md#a-title-once) [i](page.md#gone)\n\n'
        '```\n[j](in-code.md)\n```\n\n<p>\n<a href="gone">k</a>\n</p>\n',
        "utf-8",
    )
    bad = {link for link, image in links(page) if problem_with(page, link, image)}
    assert bad == {"#gone", "gone.md", "page.md", "mailto:x", "https://", "gone.png", "page.md#gone", "gone"}


class _Attributes(html.parser.HTMLParser):
    """Collects links and images of a piece of HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(value or "", key == "src") for key, value in attrs if key in ("href", "src")]


def links(page: pathlib.Path) -> list[tuple[str, bool]]:
    """Targets of all links of a page, and whether each is an image."""
    found = []
    for block in MARKDOWN.parse(page.read_text("utf-8")):
        for token in [block, *(block.children or [])]:
            if token.type == "link_open":
                found.append((str(token.attrs["href"]), False))
            elif token.type == "image":
                found.append((str(token.attrs["src"]), True))
            elif token.type in ("html_block", "html_inline"):
                parser = _Attributes()
                parser.feed(token.content)
                found += parser.found
    return found


def anchors(page: pathlib.Path) -> set[str]:
    return {str(t.attrs["id"]) for t in MARKDOWN.parse(page.read_text("utf-8")) if t.type == "heading_open"}


def problem_with(page: pathlib.Path, link: str, image: bool) -> str | None:
    """Why a link leads nowhere. Links to other hosts are not followed."""
    url = urllib.parse.urlsplit(link)
    if url.scheme or url.netloc:
        return None if url.scheme in ("http", "https") and url.netloc else f"{link}: not a web address"
    target = page.parent / urllib.parse.unquote(url.path) if url.path else page
    if not target.exists():
        return f"{link}: there is no such file"
    if image:
        return None if target.suffix in (".png", ".jpg", ".svg") else f"{link}: no image"
    if url.fragment and (target.suffix != ".md" or url.fragment not in anchors(target)):
        return f"{link}: there is no such heading"
    return None


def test_pictures_are_those_that_the_script_draws(tmp_path):
    spec = importlib.util.spec_from_file_location("docs_pictures", DOCS / "pictures.py")
    assert spec
    assert spec.loader
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.main(tmp_path)
    drawn = {path.name: path for path in tmp_path.iterdir()}
    committed = {path.name: path for path in (DOCS / "images").iterdir()}
    del committed["architecture.png"]  # of docs/rooms.py; test_architecture.py
    assert drawn.keys() == committed.keys() == pictures.PICTURES.keys()
    for file, path in committed.items():
        assert path.stat().st_size < 60_000, file
        old, new = Image.open(path), Image.open(drawn[file])
        assert old.size == new.size, file
        if old.info["Software"] == new.info["Software"]:  # matplotlib's version, on which letters and lines depend
            difference = np.asarray(old.convert("RGB"), float) - np.asarray(new.convert("RGB"), float)
            changed = (abs(difference).max(axis=-1) > 30).mean()  # a moved curve is a few in a thousand
            assert changed < 5e-4, f"{file} is not what docs/pictures.py draws: run it"
