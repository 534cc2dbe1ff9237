"""docs/architecture.md: its figure shows the imports, and every name on it exists."""

import ast
import json
import pathlib
import re
import runpy

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
ROOMS = runpy.run_path(str(ROOT / "docs" / "rooms.py"))


@pytest.fixture(scope="module")
def rooms():
    return ROOMS["rooms"]()


def test_the_figure_shows_the_rooms_and_imports_of_the_code(rooms):
    with Image.open(ROOMS["IMAGE"]) as image:
        drawn = [ROOMS["Room"](**room) for room in json.loads(image.info[ROOMS["KEY"]])]
    assert shown(drawn) == shown(rooms), "outdated: run python docs/rooms.py"
    for room, now in zip(drawn, rooms, strict=True):
        assert abs(room.lines - now.lines) <= max(200, 0.2 * now.lines), f"{now}: python docs/rooms.py"


def shown(rooms):
    """Without lines, and without the number of imports, which is no more than the size of a dot."""
    return [room._replace(lines=0, imports=sorted(room.imports)) for room in rooms]


def test_imports_lead_to_lower_layers(rooms):
    layer = {room.name: room.layer for room in rooms}
    assert all(layer[other] > room.layer for room in rooms for other in room.imports)
    assert sum(len(room.imports) for room in rooms) > 40  # the imports are found


def test_every_module_belongs_to_a_room(rooms):
    entries = {
        path.stem
        for path in (ROOT / "alexnet_jax").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert entries - {"__init__", "__pycache__"} == {room.name for room in rooms}


def test_the_table_has_every_room_with_its_docstring(rooms):
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| \[", PAGE, re.MULTILINE)
    assert rows == [(room.name, room.summary) for room in rooms]


def test_every_name_is_defined_in_the_file_it_links_to():
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./(alexnet_jax/[\w/]+\.py)\)", PAGE)
    assert len(links) > 20
    assert [(name, file) for name, file in links if name not in names(ROOT / file)] == []


def names(file):
    """Functions and classes of a module, and the methods and attributes of the classes as `Class.name`."""
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef):
                found.add(f"{node.name}.{part.name}")
            elif isinstance(part, ast.Assign):
                found |= {f"{node.name}.{target.id}" for target in part.targets}
    return found


def test_every_contract_names_tests_that_exist():
    rows = [line for line in PAGE[PAGE.index("## Contracts") :].splitlines() if line.startswith("| ")][2:]
    assert rows
    for row in rows:
        tests = re.findall(r"`(test_\w+\.py)::(\w+)`", row)
        assert tests, row
        for file, function in tests:
            assert function in names(ROOT / "tests" / file), row
