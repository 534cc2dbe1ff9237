"""The report page in a real browser: Chromium, from Playwright or from the system; without one these tests skip."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import Error, sync_playwright

import alexnet_jax
from alexnet_jax import evaluation, report
from alexnet_jax.config import EvalConfig

WIDTHS = {"wide": 1280, "phone": 390}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        try:
            running = playwright.chromium.launch(executable_path=path)
        except Error as error:
            pytest.skip(f"no Chromium: playwright install chromium ({str(error).splitlines()[0]})")
        yield running
        running.close()


@pytest.fixture(scope="module")
def tiny_evaluation(small_run, tiny):
    """A real evaluation, with a hostile class name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load", lambda config: tiny)
        found = evaluation._evaluated(small_run, EvalConfig(small_run))
    names = ("</script><script>alert(1)</script>", *tiny.class_names[1:])
    dataset = dataclasses.replace(found.run.dataset, class_names=names)
    results = evaluation.score(found.logits, found.labels, names) | {
        key: found.results[key] for key in ("split", "views", "step", "checkpoint", "dataset", "versions")
    }
    return dataclasses.replace(found, run=dataclasses.replace(found.run, dataset=dataset), results=results)


@pytest.fixture(scope="module")
def page_file(tiny_evaluation, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.page(tiny_evaluation))
    return path


@pytest.fixture
def open_page(browser, page_file):
    """Opens a page and holds that it says nothing on the console and asks for nothing from a network."""
    opened = []

    def open_it(width="wide", scheme="light", path=page_file):
        context = browser.new_context(
            viewport={"width": WIDTHS[width], "height": 844}, color_scheme=scheme, offline=True
        )
        page, said, asked = context.new_page(), [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#calibration .main-svg")
        opened.append((context, said, asked))
        return page

    yield open_it
    for context, said, asked in opened:
        assert said == []
        assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [page_file.as_uri()]
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_opens_and_fits(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS[width]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(level) for level in re.findall(r"\d+", ground)[:3]])
    assert brightness > 200 if scheme == "light" else brightness < 60
    ink = page.locator("#curves .xtitle").evaluate("element => getComputedStyle(element).fill")
    assert (np.mean([int(level) for level in re.findall(r"\d+", ink)[:3]]) < 100) == (scheme == "light")


def test_a_click_on_a_cell_shows_its_images(open_page, tiny_evaluation, tiny):
    page = open_page()
    predicted = tiny_evaluation.logits.argmax(axis=1)
    matrix = np.array(tiny_evaluation.results["confusion"])
    wrong = matrix - np.diag(matrix.diagonal())
    true, taken_for = np.unravel_index(wrong.argmax(), wrong.shape)
    page.click(f"[data-cell='{true},{taken_for}']")
    tiles = page.locator("#cell figure")
    members = np.flatnonzero((tiny_evaluation.labels == true) & (predicted == taken_for))
    assert tiles.count() == min(len(members), report.MOST_IN_CELL) > 0
    shown = [int(re.search(r"image (\d+)", text)[1]) for text in tiles.all_inner_texts()]
    assert set(shown) <= set(members)
    assert f"{len(members)} images" in page.inner_text("#cell-title")
    # What is seen is the image: its mean colour, but for JPEG.
    place = page.evaluate("([index]) => confusions.tiles.findIndex(tile => tile[0] === index)", [shown[0]])
    colour = page.evaluate(
        """async place => {
          const sheet = new Image(); sheet.src = confusions.sheet; await sheet.decode();
          const canvas = document.createElement("canvas"); canvas.width = canvas.height = confusions.side;
          const context = canvas.getContext("2d"), side = confusions.side;
          const row = Math.floor(place / confusions.columns), column = place % confusions.columns;
          context.drawImage(sheet, -side * column, -side * row);
          return Array.from(context.getImageData(0, 0, side, side).data);
        }""",
        place,
    )
    seen = np.array(colour).reshape(32, 32, 4)[..., :3]
    assert np.abs(seen - tiny["test"].images[shown[0]].astype(int)).mean() < 6
    empty = np.argwhere(matrix == 0)[0]
    assert page.locator(f"[data-cell='{empty[0]},{empty[1]}']").is_disabled()


def test_a_click_chooses_image_and_layer(open_page):
    page = open_page("phone")
    seen = {page.get_attribute("#maps", "src")}
    page.click("[data-layer='3']")
    assert "conv1 pool" in page.inner_text("#maps-title")
    seen.add(page.get_attribute("#maps", "src"))
    page.click("[data-image='1']")
    seen.add(page.get_attribute("#maps", "src"))
    assert len(seen) == 3
    assert page.evaluate("document.getElementById('maps').naturalWidth") > 100


def test_curves_zoom(open_page):
    page = open_page()
    before = page.evaluate("document.getElementById('curves').layout.xaxis.range")
    box = page.locator("#curves .nsewdrag").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 42, steps=5)
    page.mouse.up()
    after = page.evaluate("document.getElementById('curves').layout.xaxis.range")
    assert 0.2 < (after[1] - after[0]) / (before[1] - before[0]) < 0.4


def test_figures_are_the_evaluations(open_page, tiny_evaluation):
    page = open_page()
    results = tiny_evaluation.results
    assert page.inner_text("#accuracy") == f"{results['accuracy']:.2%}"
    cells = page.locator(".matrix button").all_inner_texts()
    assert [int(cell) for cell in cells] == np.array(results["confusion"]).ravel().tolist()
    assert page.locator("#mistakes figure").count() == min(report.MISTAKES, results["count"] - results["correct"])
    assert page.locator(".bars .name").count() == sum(row["count"] > 0 for row in results["per_class"])
    assert "</script><script>" in page.inner_text(".matrix tbody tr:first-child th")  # as text


def test_very_many_classes_are_listed(tiny_evaluation, tiny, browser, open_page, tmp_path):
    names = tuple(f"class {i}" for i in range(40))
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (70, 40)).astype(np.float32)
    results = tiny_evaluation.results | evaluation.score(logits, tiny_evaluation.labels, names)
    run = tiny_evaluation.run
    logits_layer = {name: np.concatenate([x] * 4, axis=-1) for name, x in run.params["logits"].items()}
    dataset = dataclasses.replace(run.dataset, class_names=names)
    run = dataclasses.replace(run, dataset=dataset, params=run.params | {"logits": logits_layer})
    wide = dataclasses.replace(tiny_evaluation, run=run, logits=logits, results=results)
    path = tmp_path / "report.html"
    path.write_text(report.page(wide))
    page = browser.new_page(offline=True)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    first = page.locator(".listed button").first
    first.click()
    count = int(first.inner_text().rsplit(": ", 1)[1])
    assert page.locator("#cell figure").count() == count
    assert said == []
    page.close()


def test_a_run_without_validation_has_a_page(small_run, tiny, tmp_path, monkeypatch):
    """The curves of a run that is all training, and one with a loss that is not a number."""
    run = shutil.copytree(small_run, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["split"] == "train"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    monkeypatch.setattr(evaluation, "load", lambda config: tiny)
    evaluation.evaluate(EvalConfig(run, report=True))
    page = (run / "eval" / "report.html").read_text()
    assert alexnet_jax.__version__ in page
    assert '"name": "validation"' not in page
    assert '"name": "training, dropout on"' in page
