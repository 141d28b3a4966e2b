"""Helpers for the scripts that draw the figures of these pages: SVG files that follow the reader's color scheme.

The scripts need matplotlib (`pip install -e ".[examples]"`).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

INK, PAPER, BLUE, ORANGE, GREEN, GREY = "#1f2328", "#ffffff", "#2f81f7", "#e8792b", "#2da44e", "#8b949e"
STYLE = (
    "<style>:root{--ink:#1f2328;--paper:#ffffff}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0d1117}}</style>"
)
RC = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), PAPER),
    "svg.fonttype": "none", "svg.hashsalt": "tutorial", "font.family": "sans-serif", "font.size": 9,
    "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
Axes = Any  # matplotlib.axes.Axes


def figure_of(width: float, height: float) -> tuple[Any, Axes]:
    return plt.subplots(figsize=(width, height))


def canvas(width: float, height: float, right: float, top: float) -> tuple[Any, Axes]:
    """A figure with hidden axes, for boxes and arrows; x runs from 0 to `right`, and y from 0 to `top`."""
    figure, axes = figure_of(width, height)
    axes.set(xlim=(0, right), ylim=(0, top))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    corner = x - width / 2, y - height / 2
    axes.add_patch(plt.Rectangle(corner, width, height, facecolor=PAPER, edgecolor=BLUE, linewidth=1.2))
    axes.text(x, y, text, ha="center", va="center")


def cell(axes: Axes, x: float, y: float, color: str | None, strength: float) -> None:
    if color:
        axes.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=color, alpha=strength, linewidth=0))
    axes.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, edgecolor=GREY, linewidth=0.5))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, head: bool = True) -> None:
    style = {"arrowstyle": "->" if head else "-", "color": color, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def write(figure: Any, path: Path) -> None:
    """Write an SVG file. INK and PAPER become CSS variables, which STYLE sets for light and dark mode."""
    buffer = io.StringIO()
    figure.tight_layout(pad=0.6)
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = buffer.getvalue().replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")
    text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    start = text.index(">", text.index("<svg")) + 1
    path.write_text(text[:start] + STYLE + text[start:], encoding="utf-8")
