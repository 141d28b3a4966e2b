"""Draws the pictures of these pages, as SVG files in this folder, from the results in tests/benchmarks/results/.

    python docs/pictures.py                  # all pictures
    python docs/pictures.py speed op         # only these

Needs matplotlib (`pip install -e ".[examples]"`). The pictures follow the reader's light or dark colour scheme.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]
import drawing  # noqa: E402
from drawing import BLUE, GREEN, INK, ORANGE, RC, arrow, box, canvas, plt  # noqa: E402

from tests.benchmarks import kept  # noqa: E402

OUT = DOCS


def curves(preset: str) -> None:
    """The results of tests/benchmarks/curves.py: the curves, and below them their differences, averaged over steps."""
    (*_, record) = kept.records("curves-" + preset)
    window = max(1, record["steps"] // 100)

    def averaged(losses: Any) -> np.ndarray:
        losses = np.asarray(losses)
        return losses[: len(losses) // window * window].reshape(-1, window).mean(axis=1)

    losses = {name: np.array(curve["training"]) for name, curve in record["curves"].items()}
    steps = averaged(np.arange(1, record["steps"] + 1))
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True, height_ratios=(2, 1))
    above.plot(steps, averaged(losses["PyTorch"]), color=ORANGE, linewidth=4, alpha=0.55, label="PyTorch")
    above.plot(steps, averaged(losses["tinygrad2"]), color=BLUE, linewidth=1.1, label="tinygrad2")
    above.set(ylabel="training loss, nats per token", title=title_of(record, window))
    above.legend(frameon=False)
    for name, color, label in (
        ("PyTorch, SDPA", ORANGE, "PyTorch with another order of sums, and PyTorch"),
        ("tinygrad2", BLUE, "tinygrad2 and PyTorch"),
    ):
        if name not in losses:
            continue
        difference = averaged(np.abs(losses[name] - losses["PyTorch"]))
        below.semilogy(steps, np.maximum(difference, 1e-8), color=color, linewidth=1.1, label=label)
    below.set(xlabel="step", ylabel="|difference|")
    below.legend(frameon=False, loc="lower right")
    drawing.write(figure, OUT / f"curves-{preset}.svg")


def title_of(record: dict[str, Any], window: int) -> str:
    averaged = f", mean of {window} steps" if window > 1 else ""
    return f"{record['preset']}, {record['steps']:,} steps from the same weights on the same batches{averaged}"


def speed(name: str) -> None:
    """The results that tests/benchmarks/kept.py prints."""
    rows = [row for row in kept.rows() if "MKL" not in row.name and "BLAS" not in row.name]
    figure, axes = plt.subplots(figsize=(7.4, 0.6 + 0.28 * len(rows)))
    labels = []
    for place, row in enumerate(reversed(rows)):
        low, middle, high = row.ratio["min"], row.ratio["median"], row.ratio["max"]
        axes.barh(place, middle, color=BLUE, height=0.6)
        axes.plot((low, high), (place, place), color=INK, linewidth=1)
        axes.text(high + 0.03, place, f"{middle:.2f} times {row.peer}", va="center")
        kind = row.name.removeprefix("tinygrad2").strip()
        labels.append(f"{short(row.processor)}: {row.work}{f', {kind}' if kind else ''}")
    axes.axvline(1, color=ORANGE, linewidth=1)
    axes.set(yticks=range(len(rows)), yticklabels=labels, xlabel="tokens/s, relative to the fastest other program")
    axes.set_xlim(0, max(row.ratio["max"] for row in rows) + 1.4)
    drawing.write(figure, OUT / f"{name}.svg")


def short(processor: str) -> str:
    return " ".join(processor.replace("(R)", "").split()[:2])


def rooms(name: str) -> None:
    """The parts of the packages, from the bottom up."""
    figure, axes = canvas(8, 5.2, 16, 10.4)
    rows = (
        (
            ("reference.py\nthe mathematics", 5),
            ("kernels/cpu.py\nNumba, BLAS", 5),
            ("kernels/cuda.py, *.cu\nCUDA C++", 5),
        ),
        (("backend.py: the array library, and a table of kernels", 15.4),),
        (("autograd.py, tensor.py\nthe tape", 5), ("ops.py\nchecked operations", 5), ("params.py\nthe arena", 5)),
        (("nn.py\nlayers", 5), ("optim/\nupdate rules", 5), ("distributed.py, checkpoint.py\nranks, files", 5)),
        (("gpt2/model.py\nthe network", 5), ("gpt2/generate.py\nsampling", 5), ("gpt2/formats/\nmodel files", 5)),
        (("gpt2/training/: data, options, the step, a run's folder", 15.4),),
        (("train.py", 5), ("sample.py", 5), ("python -m gpt2.NAME\ncommands", 5)),
    )
    for level, row in enumerate(rows):
        for place, (text, width) in enumerate(row):
            box(axes, 8.2 if len(row) == 1 else 3 + 5.2 * place, 0.8 + 1.4 * level, width, 1, text)
    for low, high, text, color in ((0.2, 5.6, "tinygrad2/", GREEN), (5.8, 9.8, "gpt2/", ORANGE)):
        axes.plot((0.15, 0.15), (low, high), color=color, linewidth=2)
        axes.text(-0.1, (low + high) / 2, text, rotation=90, ha="right", va="center", color=color)
    axes.text(8.2, 10.1, "a file imports only from its own row, or from rows below it", ha="center")
    axes.set(xlim=(-0.8, 16.1), ylim=(0, 10.4))
    drawing.write(figure, OUT / f"{name}.svg")


def op(name: str) -> None:
    """An operation: the forward pass records a node, and the backward pass uses it."""
    figure, axes = canvas(8, 3.7, 16, 7.4)
    for x, y, width, text in (
        (2.2, 5.6, 3.6, "ops.layernorm\n(x, weight, bias)"),
        (8, 5.6, 4.4, "kernels.\nlayernorm_forward"),
        (13.8, 5.6, 3.4, "Tensor y"),
        (13.8, 3.4, 3.4, "Node\nparents, saved"),
        (8, 1.2, 4.4, "kernels.\nlayernorm_backward"),
        (2.2, 1.2, 3.6, "dweight, dbias +=\nin the arena"),
    ):
        box(axes, x, y, width, 1.3, text)
    arrow(axes, (4, 5.6), (5.8, 5.6), INK)
    axes.text(4.9, 6.5, "arrays", ha="center")
    arrow(axes, (10.2, 5.6), (12.1, 5.6), INK)
    axes.text(11.15, 6.5, "record(...)", ha="center")
    arrow(axes, (13.8, 4.95), (13.8, 4.05), INK)
    axes.text(13.5, 4.5, "the tape: x, weight, mean, rstd are saved", ha="right", va="center")
    arrow(axes, (13.8, 2.75), (10.3, 1.5), ORANGE)
    axes.text(12.9, 1.6, "saved, dy, into(i)", ha="left", color=ORANGE)
    arrow(axes, (5.8, 1.2), (4, 1.2), ORANGE)
    arrow(axes, (8, 1.85), (8, 2.9), ORANGE)
    axes.text(8, 3.15, "dx, to the node of x", ha="center", color=ORANGE)
    axes.text(8, 0.1, "orange: the backward pass", ha="center", color=ORANGE)
    axes.set_ylim(-0.2, 7)
    drawing.write(figure, OUT / f"{name}.svg")


def ranks(name: str) -> None:
    """A timeline of the all-reduce of each layer's gradients."""
    figure, axes = canvas(8, 2.9, 16, 5.8)
    axes.text(0, 4.6, "each rank", va="center")
    axes.text(0, 2.9, "the network", va="center")
    spans = [
        (2.6, 3.4, "forward"),
        *((6.0 + 1.5 * i, 1.5, text) for i, text in enumerate(("h.11", "h.10", "...", "h.0"))),
    ]
    for start, width, text in spans:
        box(axes, start + width / 2, 4.6, width, 0.9, text)
    axes.text(9, 5.4, "backward", ha="center")
    for i, text in enumerate(("h.11", "h.10", "...")):
        box(axes, 7.6 + 1.5 * i + 0.6, 2.9, 1.2, 0.9, text)
        arrow(axes, (7.5 + 1.5 * i, 4.15), (7.7 + 1.5 * i, 3.4), ORANGE)
    box(axes, 12.75, 2.9, 1.2, 0.9, "h.0, wte")
    arrow(axes, (12, 4.15), (12.2, 3.4), ORANGE)
    box(axes, 14.6, 4.6, 2.2, 0.9, "clip, AdamW")
    arrow(axes, (13.35, 3.1), (13.7, 4.15), INK)
    axes.text(
        8, 1.6, "orange: the all-reduce of a layer's gradients starts when its last gradient is complete,", ha="center"
    )
    axes.text(
        8, 1.0, "and overlaps with the backward pass of earlier layers. The update waits for the last one:", ha="center"
    )
    axes.text(8, 0.4, "the tied embedding's gradient is complete only at the end.", ha="center")
    drawing.write(figure, OUT / f"{name}.svg")


PICTURES: dict[str, Callable[[], None]] = {
    **{f"curves-{preset}": partial(curves, preset) for preset in ("nano", "gpt2") if kept.records(f"curves-{preset}")},
    **{function.__name__: partial(function, function.__name__) for function in (speed, rooms, op, ranks)},
}

if __name__ == "__main__":
    with plt.rc_context(RC):
        for chosen in sys.argv[1:] or PICTURES:
            PICTURES[chosen]()
            print(OUT / f"{chosen}.svg")
