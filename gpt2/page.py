"""Builds a page as a single HTML file with its style, script and data. It needs no server, network or library.

A Content-Security-Policy allows only the page's own style and script, by their hashes, so text in the page cannot be
executed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from functools import cache
from html import escape
from pathlib import Path

from tinygrad2.checkpoint import JsonObject
from tinygrad2.files import atomic_write

FOLDER = Path(__file__).parent / "pages"


@cache
def resource(name: str) -> str:
    """The text of a file in gpt2/pages/."""
    return (FOLDER / name).read_text(encoding="utf-8")


def page(
    title: str,
    body: str,
    style: str,
    script: str,
    data: JsonObject | None = None,
    *,
    refresh: int | None = None,
    live: bool = False,
) -> str:
    """A complete HTML document.

    title    plain text.
    body     HTML; the caller escapes all external text.
    style    CSS, appended to pages/page.css (colours, fonts and tables).
    data     data for the script, stored as JSON in the element #data.
    refresh  the number of seconds after which the browser reloads the page; None for never.
    live     whether gpt2.serve serves the page, so that its script may send requests to the server.
    """
    style = resource("page.css") + style
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    policy = "default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'".format(*hashes)
    policy += "; connect-src 'self'; form-action 'none'; base-uri 'none'" if live else ""
    reload = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh}">'
    written = f"Written by tinygrad2 on {time.strftime('%Y-%m-%d at %H:%M:%S')}. It loads nothing from the network."
    footer = "Served by tinygrad2 on this machine. The page sends no requests to other machines." if live else written
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{reload}<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{body}"
        f"<footer>{footer}</footer></main>{'' if data is None else data_block(data)}<script>{script}</script></body>"
        "</html>\n"
    )


def data_block(data: JsonObject) -> str:
    """The element #data, which contains `data` as JSON. It is not executed, and "<" is escaped so that the data cannot
    close the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>'


def write(text: str, file: Path) -> None:
    """Write a page atomically: a reader sees either the old or the new content."""
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def printable(text: str) -> str:
    """The text, in which control characters, which could affect the page, are replaced by U+FFFD."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
