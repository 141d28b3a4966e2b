"""Sphinx configuration: the pages in this folder, and a reference of the public names from their docstrings.

pip install -e ".[docs]" && sphinx-build -W docs build/docs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from sphinx.util import inspect  # noqa: E402

import tinygrad2  # noqa: E402

project = "tinygrad2"
author = "the authors of tinygrad2"
version = release = tinygrad2.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_parser"]
source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
exclude_patterns = ["README.md"]  # replaced by index.rst
html_theme = "furo"
html_title = f"tinygrad2 {release}"
html_copy_source = False
myst_heading_anchors = 4  # generate the same anchors as GitHub
myst_enable_extensions = ["html_image"]
suppress_warnings = ["myst.header"]
smartquotes = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # the types in signatures: most are NumPy's, or internal
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "DTypeLike", "PrecisionLike", "Operand", "Axis", "Shape")}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

ARGUMENT = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*) {2,}(\S.*)")  # a docstring line of the form "name  description"
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")  # a link to a file outside its folder


def escaped(text: str) -> str:
    """Escape plain text for reStructuredText; text between backticks becomes code."""
    parts = re.split(r"`+([^`]+)`+", text)
    parts[::2] = [re.sub(r"([\\*_|`])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [rf"\ ``{part}``\ " for part in parts[1::2]]
    return "".join(parts)


def restructured(lines: list[str]) -> list[str]:
    """Convert a plain-text docstring to reStructuredText.

    Lines of the form "name  description", with indented continuation lines, become a definition list. Other indented
    lines, which are formulas and tables, become literal blocks. Examples are unchanged.
    """
    found: list[str] = []
    kind = ""  # the kind of the previous line
    for line in lines:
        argument = ARGUMENT.match(line)
        if not line:
            now, new = "", [""]
        elif line.startswith(">>>") or kind == "example":
            now, new = "example", [line]
        elif argument:
            now, new = "argument", ["", f"``{argument[1]}``", f"   {escaped(argument[2])}"]
        elif line.startswith(" ") and kind == "argument":
            now, new = "argument", [f"   {escaped(line.strip())}"]
        elif line.startswith(" "):
            now, new = "literal", [line] if kind == "literal" else ["", "::", "", line]
        else:
            now, new = "text", [escaped(line)] if kind == "text" else ["", escaped(line)]
        found += new
        kind = now
    return found


def process_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = restructured(lines) if lines != ["Call self as a function."] else []  # Python's default for __call__


def process_signature(
    app: Any, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Make signatures readable.

    The arguments of a class are those of __init__ instead of its metaclass. A method that is also a function takes x
    instead of self. The type variable T of the methods is shown as Tensor.
    """
    if what == "class" and signature and signature.startswith("(*args"):
        arguments = inspect.signature(value.__init__, bound_method=True, type_aliases=autodoc_type_aliases)
        arguments = arguments.replace(return_annotation=arguments.empty)
        signature = inspect.stringify_signature(arguments, unqualified_typehints=True, short_literals=True)
    if what == "function" and signature:
        signature = re.sub(r"^\(self\b", "(x", signature)
    signature = signature and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature)
    return signature, "Tensor" if returned == "T" else returned


def drop_links(folder: Path, text: str) -> str:
    """Replace a page's links to files outside this folder with the names of these files."""

    def name(link: re.Match[str]) -> str:
        file = (folder / link[2]).resolve()
        if file.is_relative_to(DOCS):
            return link[0]
        path = file.relative_to(DOCS.parent).as_posix()
        return link[1] if path in link[1] else f"{link[1]} (`{path}`)"

    return OUTSIDE.sub(name, text)


def read_source(app: Any, page: str, content: list[str]) -> None:
    content[0] = drop_links((DOCS / page).parent, content[0])


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("source-read", read_source)
