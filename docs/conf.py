"""How Sphinx builds these pages: `sphinx-build -W -b html docs build/docs`."""

import dataclasses
import inspect
import re
from typing import Any

import flax.linen as nn
from sphinx.application import Sphinx

import alexnet_jax

project = "alexnet_jax"
version = release = alexnet_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "alexnet_jax"
html_copy_source = html_show_copyright = False
highlight_language = "none"  # blocks without a language are commands and output
smartquotes = False  # `--flag` is no dash

# Pages are Markdown as a code host shows it: $ and $$ are mathematics, every heading has an anchor of that name.
# A link to a file outside this folder becomes a copy of that file in the build (for Markdown see `_link_copies`).
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

# Docstrings are in Google's style, with single backticks for code.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else the attributes of a NamedTuple would be described twice
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def _link_copies(app: Sphinx, page: str, source: list[str]) -> None:
    """Marks links to Markdown outside this folder as links to files: MyST takes them for pages, and finds none."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)(#[^)]*)?\)", r"](path:\1)", source[0])


def _keep_formulas(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """Marks formulas and tables in a docstring, which are set in by four columns, as literal blocks.

    Without the mark they would be quoted text, where `|`, `*` and `_` have a meaning.
    """
    marked: list[str] = []
    inside = False
    for line in lines:
        if line and not line.startswith("    "):
            inside = False
        elif line.startswith("    ") and not inside and len(marked) > 1 and not marked[-1]:
            inside = True
            marked += ["::", ""]
        marked.append(line)
    # A bar outside of them begins a substitution.
    lines[:] = [line if line.startswith("    ") else re.sub(r"(?<![`|])\|(?=\S)", r"\\|", line) for line in marked]


def _leave_out(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of a NamedTuple: its docstring lists them under `Attributes`."""
    return True if inspect.isdatadescriptor(obj) and type(obj).__name__ == "_tuplegetter" else None


def _short_signature(
    app: Sphinx, what: str, name: str, obj: object, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Names and defaults alone for a network: Flax's own fields and the types of functions would fill half a page."""
    if not (inspect.isclass(obj) and issubclass(obj, nn.Module)):
        return signature, returns
    arguments = []
    for field in dataclasses.fields(obj):
        if field.name not in ("parent", "name"):
            default = getattr(field.default, "__name__", repr(field.default))
            arguments.append(field.name if field.default is dataclasses.MISSING else f"{field.name}={default}")
    return f"({', '.join(arguments)})", returns


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _link_copies)
    app.connect("autodoc-process-docstring", _keep_formulas, priority=400)  # before napoleon, which has 500
    app.connect("autodoc-skip-member", _leave_out)
    app.connect("autodoc-process-signature", _short_signature)
