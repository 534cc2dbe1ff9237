"""Figures as PNG files."""

import io
import os
import pathlib
import warnings

from matplotlib.figure import Figure

from alexnet_jax.files import write_atomically
from alexnet_jax.plots.style import DPI, MAX_PIXELS
from alexnet_jax.plots.text import use_fonts_with_all_glyphs


def to_png(figure: Figure) -> bytes:
    """The contents of a PNG file."""
    png = io.BytesIO()
    use_fonts_with_all_glyphs(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")  # drawn as boxes where no font has them
        warnings.filterwarnings("ignore", r"Matplotlib currently does not support")  # how some scripts join letters
        figure.savefig(png, format="png", dpi=min(DPI, MAX_PIXELS / figure.get_figwidth()))
    return png.getvalue()


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG file atomically; creates its folder.

    Raises:
      AlexNetError: the file can't be written.
    """
    write_atomically(pathlib.Path(path), to_png(figure))
