"""The report page in a real browser: Chromium, from Playwright or from the system; without one these tests skip."""

import base64
import dataclasses
import io
import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Error, sync_playwright

import alexnet_jax
from alexnet_jax.config.settings import EvalConfig
from alexnet_jax.distributed import devices
from alexnet_jax.inspection import evaluate, report, scores, task
from alexnet_jax.runs.log import read_jsonl

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
        patch.setattr(task, "load", lambda config: tiny)
        config = EvalConfig(small_run)
        found = task.evaluate_task(task.open_task(small_run, config), config, devices.select_devices(None))
    names = ("</script><script>alert(1)</script>", *tiny.class_names[1:])
    dataset = dataclasses.replace(found.task.run.dataset, class_names=names)
    results = scores.score(found.logits, found.labels, names) | {
        key: found.results[key] for key in ("split", "views", "step", "checkpoint", "dataset", "versions")
    }
    return with_run(found, dataclasses.replace(found.task.run, dataset=dataset), results=results)


def with_run(evaluation, run, **changes):
    """The same evaluation of another run."""
    return dataclasses.replace(evaluation, task=dataclasses.replace(evaluation.task, run=run), **changes)


@pytest.fixture(scope="module")
def page_file(tiny_evaluation, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.page(tiny_evaluation, read_jsonl(tiny_evaluation.task.run.folder.metrics)))
    return path


@pytest.fixture(scope="module")
def pages(browser):
    """The pages that are open, with what each printed on the console and requested."""
    opened = {}
    yield opened
    for page, _, _ in opened.values():
        page.context.close()


@pytest.fixture
def open_page(browser, pages, page_file):
    """Opens a page, or turns to it; asserts that none prints on the console or requests anything from a network."""

    def open_it(width="wide", scheme="light", path=page_file):
        if (width, scheme, path) not in pages:
            context = browser.new_context(
                viewport={"width": WIDTHS[width], "height": 844}, color_scheme=scheme, offline=True
            )
            page, said, asked = context.new_page(), [], []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            pages[width, scheme, path] = page, said, asked
            page.goto(path.as_uri())
            page.wait_for_selector("#calibration .main-svg")
        return pages[width, scheme, path][0]

    yield open_it
    for _, said, asked in pages.values():
        assert said == []
        assert [url for url in asked if not url.startswith(("data:", "blob:"))] == asked[:1]  # the page itself
        assert asked[0].startswith("file:")


@pytest.mark.parametrize(("width", "schemes"), [("wide", ("light", "dark")), ("phone", ("dark", "light"))])
def test_the_page_opens_and_fits(open_page, width, schemes):
    """Also while the reader changes to the other colours."""
    page = open_page(width, schemes[0])
    for scheme in (*schemes, schemes[0]):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"document.documentElement.scrollWidth === {WIDTHS[width]}", timeout=5000)
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
    page = open_page("phone", "dark")
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
    plot = page.locator("#curves .nsewdrag").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
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
    assert page.locator(".scores tbody tr").count() == sum(row["count"] > 0 for row in results["per_class"])
    assert "</script><script>" in page.inner_text(".matrix tbody tr:first-child th")  # as text


def with_classes(evaluated, names, logits):
    """The same evaluation of a network that knows 40 classes."""
    run = evaluated.task.run
    logits_layer = {name: np.concatenate([x] * 4, axis=-1) for name, x in run.params["logits"].items()}
    dataset = dataclasses.replace(run.dataset, class_names=names)
    run = dataclasses.replace(run, dataset=dataset, params=run.params | {"logits": logits_layer})
    results = evaluated.results | scores.score(logits, evaluated.labels, names)
    return with_run(evaluated, run, logits=logits, results=results)


def test_very_many_classes_are_listed(tiny_evaluation, open_page, tmp_path):
    names = tuple(f"{'very long name ' * 4}{'x' * 40} {i}" for i in range(40))
    logits = np.random.default_rng(0).normal(0, 3, (70, 40)).astype(np.float32)
    path = tmp_path / "report.html"
    path.write_text(report.page(with_classes(tiny_evaluation, names, logits), []))
    page = open_page("phone", path=path)
    page.wait_for_function("document.documentElement.scrollWidth === innerWidth", timeout=5000)  # once plotly is done
    buttons = page.locator(".listed button")
    listed = [button.get_attribute("data-cell").split(",") for button in buttons.all()]
    assert listed
    assert all(true != taken_for for true, taken_for in listed)
    buttons.first.click()
    count = int(buttons.first.inner_text().rsplit(": ", 1)[1])
    assert page.locator("#cell figure").count() == count
    assert "40 classes" in page.inner_text("main")


def test_a_network_without_mistakes_has_a_page(tiny_evaluation, open_page, tmp_path):
    names = tuple(f"class {i}" for i in range(40))
    logits = 9 * np.eye(40, dtype=np.float32)[tiny_evaluation.labels]
    path = tmp_path / "report.html"
    path.write_text(report.page(with_classes(tiny_evaluation, names, logits), []))
    page = open_page(path=path)
    assert "There are none." in page.inner_text("main")
    assert page.locator("figure").count() == 0


def test_large_pages_are_kept_small(tiny_evaluation, monkeypatch):
    monkeypatch.setattr(report, "MOST_TILES", 50)
    monkeypatch.setattr(report, "MOST_MAP_PIXELS", 150_000)
    confusions = report.confusions(tiny_evaluation, np.full((70, 10), 0.1))
    assert confusions["in_cell"] == max(1, 50 // len(confusions["pairs"]))
    assert len(confusions["tiles"]) <= max(50, len(confusions["pairs"])) + report.MISTAKES
    layers, inside = report.feature_maps(tiny_evaluation)
    assert len(inside) < report.MOST_WITH_MAPS
    assert len(inside[0]["maps"]) == len(layers)


def test_a_map_in_which_hardly_a_unit_answers():
    maps = np.zeros((16, 16, 8))
    maps[3, 4, 5] = 2.0
    assert report.map_image(maps)["range"] == "0 to 2"
    assert report.map_image(maps)["image"] != report.map_image(np.zeros((16, 16, 8)))["image"]


def test_a_run_without_validation_has_a_page(small_run, tiny, tmp_path, monkeypatch):
    """The curves of a run that is all training, one of whose losses is not a number, and a line lacks its epoch."""
    run = shutil.copytree(small_run, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["split"] == "train"]
    kept[0]["loss"] = float("nan")
    del kept[1]["epoch"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    monkeypatch.setattr(task, "load", lambda config: tiny)
    evaluate.evaluate(EvalConfig(run, report=True))
    page = (run / "eval" / "report.html").read_text()
    assert alexnet_jax.__version__ in page
    assert '"name": "validation"' not in page
    assert '"name": "training, dropout on"' in page


def test_the_page_is_smaller_than_plotly(page_file):
    """Plotly's script alone has 4.8 MB."""
    assert page_file.stat().st_size < 4_000_000


def test_images_of_noise_fit():
    """As many as in the sheet of 198 images of 32x32: their JPEG has more bytes than pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (15 * 32, 14 * 32, 3), np.uint8)
    uri = report.data_uri(PIL.Image.fromarray(noise), "JPEG", quality=90, subsampling=0)
    data = base64.b64decode(uri.split(",")[1])
    assert len(data) > noise.shape[0] * noise.shape[1]
    assert PIL.Image.open(io.BytesIO(data)).size == (14 * 32, 15 * 32)
