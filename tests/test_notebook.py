import ast
import base64
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

PATH = pathlib.Path(__file__).parent.parent / "notebooks" / "explore_params.ipynb"
MOST_BYTES = 1_000_000


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def pictures(notebook):
    """The PNGs that its cells show."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


FEWER_IMAGES = """
import functools
from alexnet_jax.data import shapes
shapes.load = functools.partial(shapes.load, train=100, validation=30, test=70)  # those of the run
"""


@pytest.mark.filterwarnings("default")  # of Jupyter's own
def test_it_runs_from_top_to_bottom(notebook, small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("ALEXNET_JAX_RUN", str(small_run))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "fewer_images.py").write_text(FEWER_IMAGES)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    stored = len(pictures(notebook))
    for cell in notebook.cells:
        cell.outputs = []
    executed = NotebookClient(
        notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    found = pictures(executed)
    assert len(found) >= stored - 1  # a network of one epoch may have no kernels that are selective for colour
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in found)
    text = printed(executed)
    assert "2,887,306" in text
    assert "orientation-selective" in text
    assert "units are 0 for all of 500 test images" in text
    errors = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs if o.get("name") == "stderr"]
    assert errors == []


def test_what_is_stored_is_whole_and_small(notebook):
    assert PATH.stat().st_size < MOST_BYTES
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # run once, in order
    assert len(pictures(notebook)) >= 20
    assert not any(o.output_type == "error" for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert not re.search(r"(^|[\s'\"])/\w", printed(notebook))  # no path of the machine that it was run on


def test_it_defines_nothing(notebook):
    """Functions that a notebook needs belong in the package, where they are tested."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = [re.sub(r"^(\s*)%.*", r"\1pass", line) for line in cell.source.split("\n")]
            kinds = {type(node) for node in ast.walk(ast.parse("\n".join(lines)))}
            assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef, ast.Lambda}
