"""Text in figures: names of any length and script, drawn unchanged."""

import contextlib
import functools
import itertools
import unicodedata
import warnings

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text


def shortened(text: str, length: int = 40) -> str:
    """The text, or if it is too long, its two ends with an ellipsis between them: names often differ at either end.

    Wide letters (CJK) count twice.
    """
    if text_width(text) <= length:
        return text
    room = (length - 1) // 2
    head = sum(used <= length - 1 - room for used in itertools.accumulate(map(text_width, text)))
    tail = sum(used <= room for used in itertools.accumulate(map(text_width, reversed(text))))
    return f"{text[:head]}…{text[len(text) - tail :]}"


def text_width(text: str) -> int:
    """Width of a text in letters of the Latin script."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def escaped(text: str) -> str:
    """The text, escaped so that matplotlib draws it unchanged.

    Matplotlib treats text between two $ as a formula and omits names that begin with _ from a legend. Characters that
    can't be printed, such as half of a surrogate pair in a file's name, become escapes.
    """
    text = "".join(
        c if c.isprintable() or c == "\n" or unicodedata.category(c) == "Zs" else repr(c)[1:-1] for c in text
    )
    return ("\N{THIN SPACE}" if text.startswith("_") else "") + text.replace("$", r"\$")


def use_fonts_with_all_glyphs(figure: Figure) -> None:
    """Adds to every text the installed fonts with the letters that the default font lacks."""
    for ax in figure.axes:
        ax.get_xticklabels(), ax.get_yticklabels()  # created on request only
    texts = [artist for artist in figure.findobj(Text) if isinstance(artist, Text)]
    letters = frozenset(c for text in texts for c in text.get_text() if not c.isascii() and c.isprintable())
    if families := fonts_with(letters):
        for text in texts:
            text.set_fontfamily([*text.get_fontfamily(), *families])


@functools.lru_cache(maxsize=16)
def fonts_with(letters: frozenset[str]) -> tuple[str, ...]:
    """Families of installed fonts that together have, as far as possible, the letters that the default font lacks."""
    manager = font_manager.fontManager

    def covered(path: str, letters: frozenset[str]) -> frozenset[str]:
        try:
            font = FT2Font(path)
        except Exception:  # a damaged font
            return frozenset()
        return frozenset(letter for letter in letters if font.get_char_index(ord(letter)))

    letters -= covered(font_manager.findfont(font_manager.FontProperties()), letters)
    if not letters:
        return ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = {entry.fname for entry in manager.ttflist}
        for path in set(font_manager.findSystemFonts()) - known:  # installed after matplotlib made its list
            with contextlib.suppress(Exception):  # a format that matplotlib can't read
                manager.addfont(path)
    regular = [e for e in manager.ttflist if (str(e.weight), e.style) in (("400", "normal"), ("normal", "normal"))]
    regular = [e for e in regular if "lastresort" not in e.name.lower().replace(" ", "")]  # macOS: draws boxes
    regular.sort(key=lambda e: ("Sans" not in e.name, "Mono" in e.name, e.name))
    has = {entry.name: covered(entry.fname, letters) for entry in reversed(regular)}
    families: list[str] = []
    while has and (best := max(reversed(has), key=lambda name: len(has[name] & letters))) and has[best] & letters:
        families.append(best)
        letters -= has[best]
    return tuple(families)
