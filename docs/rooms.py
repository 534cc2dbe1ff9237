"""The figure in architecture.md: `python docs/rooms.py` draws the package's rooms and their imports.

It reads the rooms and their order from the import contract in pyproject.toml, and the imports from the code.
"""

import ast
import collections
import io
import json
import pathlib
import tomllib
from typing import NamedTuple

import grimp
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from PIL import Image, PngImagePlugin

from alexnet_jax import plots
from alexnet_jax.files import write_atomically

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "alexnet_jax"
IMAGE = ROOT / "docs" / "images" / "architecture.png"
KEY = "rooms"  # of the figure's metadata


class Room(NamedTuple):
    """A package or module of the contract.

    Attributes:
      name: without `alexnet_jax.`.
      layer: its place in the order of imports, from 0 (imported by nothing).
      summary: the first line of its docstring.
      files: number of modules.
      lines: of all modules together, rounded to hundreds; below 100, to tens.
      imports: how many imports of a module there are from each other room.
    """

    name: str
    layer: int
    summary: str
    files: int
    lines: int
    imports: dict[str, int]


def rooms() -> list[Room]:
    """All rooms, in the order of the contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = (c for c in settings["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    imports: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            imports[_room(importer)][_room(imported)] += 1
    names = [(name.strip(), layer) for layer, line in enumerate(contract["layers"]) for name in line.split("|")]
    return [_describe(name, layer, imports[name], [n for n, _ in names]) for name, layer in names]


def _room(module: str) -> str:
    """The room of a module; "" for the package itself, whose lazy imports are its public names."""
    return module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def _describe(name: str, layer: int, imports: collections.Counter[str], names: list[str]) -> Room:
    folder = ROOT / PACKAGE / name
    files = sorted(folder.glob("*.py")) or [folder.with_suffix(".py")]
    main = folder / "__init__.py" if folder.is_dir() else files[0]
    summary = (ast.get_docstring(ast.parse(main.read_text("utf-8"))) or "").split("\n")[0]
    lines = sum(len(file.read_text("utf-8").splitlines()) for file in files)
    others = {other: imports[other] for other in names if other != name and imports[other]}
    return Room(name, layer, summary, len(files), round(lines, -2 if lines >= 100 else -1), others)


def draw(rooms: list[Room]) -> Figure:
    """The rooms as boxes in layers, and beside them which of the others each imports."""
    row, gap, head, cell, box = 0.37, 0.09, 0.78, 0.175, 4.0  # inches
    left = plots.WIDTH - 0.05 - len(rooms) * cell - gap / 2 * rooms[-1].layer
    tops = [head + i * row + gap * room.layer for i, room in enumerate(rooms)]
    columns = [left + i * cell + gap / 2 * room.layer for i, room in enumerate(rooms)]
    height = tops[-1] + row + 0.05
    figure = Figure(figsize=(plots.WIDTH, height))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, plots.WIDTH), ylim=(height, 0))
    ax.axis("off")
    ax.text(0.12, head - 0.08, "each part ...", fontsize=plots.LABEL, color=plots.INK)
    ax.text(left - 0.12, head - 0.08, "... imports from", fontsize=plots.LABEL, color=plots.INK, ha="right")
    most = max(number for room in rooms for number in room.imports.values())

    def dot(x: float, y: float, number: int) -> None:
        ax.add_patch(Circle((x, y), 0.085 * (number / most) ** 0.5, color=plots.VALIDATION, linewidth=0))

    for i, (room, top) in enumerate(zip(rooms, tops, strict=True)):
        corner, style = (0.05, top + 0.02), "round,pad=0,rounding_size=0.05"
        outline = FancyBboxPatch(corner, box, row - 0.04, boxstyle=style, facecolor="#EAF2F8", edgecolor=plots.TRAIN)
        ax.add_patch(outline)
        ax.text(0.12, top + 0.155, room.name, fontsize=plots.LABEL, weight="bold")
        files = "1 file" if room.files == 1 else f"{room.files} files"
        size = f"{files}, about {room.lines:,} lines"
        ax.text(box - 0.03, top + 0.155, size, fontsize=7, color=plots.INK, ha="right")
        ax.text(0.12, top + 0.295, room.summary.rstrip("."), fontsize=7, color=plots.INK)
        ax.text(columns[i] + cell / 2, head - 0.06, room.name, fontsize=plots.SMALL, rotation=90, ha="center")
        ax.add_patch(Rectangle((columns[i], top), cell, row, facecolor=plots.TRAIN, alpha=0.25, linewidth=0))
        for other, x in zip(rooms, columns, strict=True):
            if other.layer > room.layer:  # imports from other layers than these would be a broken contract
                ax.add_patch(Rectangle((x, top), cell, row, facecolor="none", edgecolor="0.85", linewidth=0.5))
            if number := room.imports.get(other.name):
                dot(x + cell / 2, top + row / 2, number)
    text = "None here:\na part imports only\nfrom layers below its own."
    ax.text(left + 0.1, tops[-5] + 0.2, text, fontsize=plots.SMALL, color=plots.INK, va="center", linespacing=1.4)
    for i, number in enumerate((1, 4, most)):
        dot(left + 0.2, tops[-3] + 0.1 + 0.22 * i, number)
        imports = "1 import" if number == 1 else f"{number} imports"
        ax.text(left + 0.4, tops[-3] + 0.1 + 0.22 * i, imports, fontsize=plots.SMALL, color=plots.INK, va="center")
    return figure


def save(rooms: list[Room], path: pathlib.Path) -> None:
    """Writes the figure as a PNG of 32 colours, whose metadata holds the rooms as JSON."""
    png, small, info = io.BytesIO(), io.BytesIO(), PngImagePlugin.PngInfo()
    draw(rooms).savefig(png, dpi=plots.DPI)
    info.add_text(KEY, json.dumps([room._asdict() for room in rooms]), zip=True)
    colours = Image.open(png).convert("RGB").quantize(32, dither=Image.Dither.NONE)
    colours.save(small, format="PNG", optimize=True, pnginfo=info)
    write_atomically(path, small.getvalue())


if __name__ == "__main__":
    save(rooms(), IMAGE)
