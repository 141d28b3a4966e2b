"""The pictures of the tutorial, as SVG files next to this one. They need matplotlib (`pip install -e ".[examples]"`).

    python docs/tutorial/pictures.py              # all, in less than a minute
    python docs/tutorial/pictures.py gelu loss    # these

A picture follows the colour scheme, light or dark, of the browser that shows it.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]
import drawing  # noqa: E402
from drawing import BLUE, GREEN, GREY, INK, ORANGE, PAPER, RC, arrow, box, canvas, cell, figure_of, plt  # noqa: E402

from examples import gpt2_in_one_file as one_file  # noqa: E402


def finite_difference(name: str) -> None:
    figure, axes = figure_of(6.4, 3.2)
    steps = np.logspace(-12, 0, 97)
    errors = np.abs((np.sin(1 + steps) - np.sin(1 - steps)) / (2 * steps) - math.cos(1))
    axes.loglog(steps, errors + 1e-17, ".", color=BLUE, markersize=4)
    axes.loglog(steps, math.cos(1) * steps**2 / 6, color=ORANGE, linewidth=1)
    axes.loglog(steps, 1e-16 / steps, color=GREEN, linewidth=1)
    axes.text(3e-3, 1e-9, "h²/6 |f '''|", color=ORANGE)
    axes.text(2e-10, 1e-5, "rounding, about 10⁻¹⁶/h", color=GREEN)
    axes.set(xlabel="step h", ylabel="error of the difference", ylim=(1e-14, 1), title="Derivative of sin at 1")
    write(figure, name)


def tape(name: str) -> None:
    figure, axes = canvas(6.6, 2.9, 6.6, 2.9)
    places = {"x = 3": (0.9, 2.2), "y = 2": (0.9, 0.6), "p = x y = 6": (3.2, 1.1), "L = p + x = 9": (5.5, 2.0)}
    for text, (x, y) in places.items():
        box(axes, x, y, 1.35 if "L" in text or "p" in text else 0.9, 0.5, text)
    for start, end, gradient, right, up in (
        ((1.35, 2.2), (4.82, 2.1), "x gets dL · 1 = 1", 0.1, 0.2),
        ((1.35, 2.0), (2.52, 1.25), "x gets dp · y = 2", 0.85, 0.1),
        ((1.35, 0.6), (2.52, 0.95), "dy = dp · x = 3", 0.2, -0.34),
        ((3.88, 1.2), (4.9, 1.75), "dp = dL = 1", 0.4, -0.3),
    ):
        arrow(axes, start, end, INK)
        axes.text((start[0] + end[0]) / 2 + right, (start[1] + end[1]) / 2 + up, gradient, color=ORANGE, ha="center")
    axes.text(0.9, 2.62, "dx = 1 + 2 = 3", color=ORANGE, ha="center")
    axes.text(5.5, 2.42, "dL = 1", color=ORANGE, ha="center")
    axes.text(3.3, 0.1, "arrows: the forward pass; orange: gradients, computed from right to left", ha="center")
    write(figure, name)


def matmul(name: str) -> None:
    figure, axes = canvas(7.4, 3.0, 17.5, 7)
    N, I, O, n, i, o = 5, 3, 4, 1, 2, 1  # noqa: E741
    for left, rows, columns, title in ((1, N, I, "x"), (6.2, I, O, "w"), (12.2, N, O, "y")):
        for r in range(rows):
            for c in range(columns):
                color = {
                    "x": BLUE if (r, c) == (n, i) else GREEN if c == i else None,
                    "w": ORANGE if (r, c) == (i, o) else GREY if r == i else None,
                    "y": BLUE if r == n else ORANGE if c == o else None,
                }[title]
                cell(axes, left + c, 5 - r, color, 0.85 if title != "y" or (r, c) != (n, o) else 1)
        axes.text(left + columns / 2, 6.3, title, ha="center", fontsize=12)
    axes.text(5.1, 4, "·", ha="center", fontsize=16)
    axes.text(11.2, 4, "=", ha="center", fontsize=14)
    axes.text(1 + i + 0.5, 5 - n + 0.5, "x[n,i]", ha="center", va="center", fontsize=7, color=PAPER)
    axes.text(6.2 + o + 0.5, 5 - i + 0.5, "w[i,o]", ha="center", va="center", fontsize=7, color=PAPER)
    axes.text(12.2 + 4.2, 5 - n + 0.3, "row n", color=BLUE)
    axes.text(12.2 + o + 0.5, 0.3, "column o", ha="center", color=ORANGE)
    axes.text(0, -0.7, "x[n,i] is used in row n of y, with the factors in row i of w (grey)", color=BLUE)
    axes.text(0, -1.7, "w[i,o] is used in column o of y, with the factors in column i of x (green)", color=ORANGE)
    axes.set_ylim(-2, 7)
    write(figure, name)


def attention(name: str) -> None:
    model, prompt = one_file.load(ROOT / "checkpoint"), b"Return the list"
    T, n_head = len(prompt), model.config.n_head
    x = one_file.embedding(np.array([list(prompt)]), model.parameters["wte.weight"])
    x = model.block("h.0", x + one_file.embedding(np.arange(T), model.parameters["wpe.weight"]))
    qkv = model.linear("h.1.attn.c_attn", model.norm("h.1.ln_1", x)).data
    q, k, _ = qkv.reshape(T, 3, n_head, -1).transpose(1, 2, 0, 3)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    p = one_file.softmax(np.where(np.tri(T, dtype=bool), scores, -np.inf))
    entropy = -(p * np.log(np.maximum(p, 1e-9))).sum(axis=(1, 2))
    p = p[int(np.argsort(entropy)[len(entropy) // 2])]  # neither the sharpest head nor the flattest
    figure, axes = canvas(4.6, 4.4, T + 2, T + 2)
    for t in range(T):
        for s in range(T):
            cell(axes, s + 1, T - t, BLUE if s <= t else None, max(0.03, float(p[t, s])))
        axes.text(0.5, T - t + 0.5, chr(prompt[t]).replace(" ", "␣"), ha="center", va="center")
        axes.text(t + 1.5, T + 1.4, chr(prompt[t]).replace(" ", "␣"), ha="center", va="center")
    axes.text(T / 2 + 1, T + 2.2, "s: the position that is read", ha="center")
    axes.text(-0.4, T / 2 + 1, "t: the position that reads", va="center", rotation=90)
    axes.text(T / 2 + 1, 0.2, "strong color: a large weight; empty: masked, weight 0", ha="center")
    axes.set(xlim=(-0.8, T + 1.2), ylim=(-0.2, T + 2.8))
    write(figure, name)


def layernorm(name: str) -> None:
    rng = np.random.default_rng(4)
    x, dxhat = rng.normal(size=8), rng.normal(size=8) + 0.5
    xhat = (x - x.mean()) / x.std()
    dxhat += 0.8 * xhat
    parts = (dxhat, np.full(8, dxhat.mean()), xhat * (dxhat * xhat).mean())
    titles = "dxhat", "minus mean(dxhat)", "minus xhat mean(dxhat xhat)", "the rest: std dx"
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.2), sharey=True)
    for axis, bars, title, color in zip(
        axes, (*parts, parts[0] - parts[1] - parts[2]), titles, (BLUE, ORANGE, ORANGE, GREEN), strict=True
    ):
        axis.bar(range(8), bars, color=color)
        axis.axhline(0, color=INK, linewidth=0.6)
        axis.set(title=title, xticks=[], xlabel="channel")
    write(figure, name)


def gelu(name: str) -> None:
    x = np.linspace(-4, 4, 201)
    tensor = one_file.Tensor(x)
    y = one_file.gelu(tensor)
    one_file.Tensor(y.data.sum(), (y,), lambda dy: (dy * np.ones_like(x),)).backward()
    figure, axes = figure_of(5.6, 3)
    axes.plot(x, y.data, color=BLUE)
    axes.plot(x, tensor.grad, color=ORANGE)
    axes.text(2.2, 2.9, "GELU", color=BLUE, ha="right")
    axes.text(2.6, 0.6, "its derivative", color=ORANGE)
    for level in (0, 1):
        axes.axhline(level, color=GREY, linewidth=0.5)
    axes.axvline(0, color=GREY, linewidth=0.5)
    axes.set(xlabel="x")
    write(figure, name)


def block(name: str) -> None:
    figure, axes = canvas(8, 2.3, 16, 4.6)
    arrow(axes, (0.2, 1), (15.8, 1), INK)
    axes.text(0.2, 0.4, "x (B, T, C)")
    for start, names in ((0.6, ("LayerNorm", "linear\nC → 3C", "attention", "linear\nC → C")),
                         (8.3, ("LayerNorm", "linear\nC → 4C", "GELU", "linear\n4C → C"))):  # fmt: skip
        arrow(axes, (start + 0.2, 1), (start + 0.2, 2.7), INK, head=False)
        for i, text in enumerate(names):
            box(axes, start + 1.15 + 1.75 * i, 3.1, 1.5, 1.1, text)
            if i:
                arrow(axes, (start + 0.15 + 1.75 * i, 3.1), (start + 0.4 + 1.75 * i, 3.1), INK)
        arrow(axes, (start + 0.2, 2.7), (start + 0.4, 3), INK)
        end = start + 1.15 + 1.75 * 3
        arrow(axes, (end, 2.5), (end, 1.3), INK)
        axes.add_patch(plt.Circle((end, 1), 0.27, facecolor=PAPER, edgecolor=ORANGE, zorder=5))
        axes.text(end, 1, "+", ha="center", va="center", color=ORANGE, zorder=6)
    axes.text(4, 4.2, "reads from earlier positions", ha="center")
    axes.text(11.7, 4.2, "computes at one position (MLP)", ha="center")
    axes.text(8, -0.1, "backward: + passes dy to both of its inputs, unchanged", ha="center", color=ORANGE)
    axes.set_ylim(-0.4, 4.6)
    write(figure, name)


def loss(name: str) -> None:
    p, onehot = one_file.softmax(np.array([1.0, 0.2, 1.6, -0.5, 0.4])), np.eye(5)[1]
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.2), sharey=True)
    titles = "p", "one-hot target", "p minus one-hot: N dx"
    for axis, bars, title, color in zip(axes, (p, onehot, p - onehot), titles, (BLUE, GREEN, ORANGE), strict=True):
        axis.bar(range(5), bars, color=color)
        axis.axhline(0, color=INK, linewidth=0.6)
        axis.set(title=title, xlabel="token", xticks=range(5))
    write(figure, name)


def adamw(name: str) -> None:
    def gradient(p: np.ndarray) -> np.ndarray:
        return np.array([1.0, 25.0]) * p

    descent, start = [np.array([-4.0, 1.2])], one_file.Tensor(np.array([-4.0, 1.2]))
    for _ in range(40):
        descent.append(descent[-1] - 0.075 * gradient(descent[-1]))
    optimizer, adam = one_file.AdamW({"p": start}), [start.data.copy()]
    for _ in range(40):
        start.grad = gradient(start.data)
        optimizer.step(lr=0.2, max_norm=math.inf)
        adam.append(start.data.copy())
    figure, axes = figure_of(6.8, 3)
    a, b = np.meshgrid(np.linspace(-4.6, 1.2, 80), np.linspace(-1.5, 1.5, 80))
    axes.contour(a, b, a**2 / 2 + 25 * b**2 / 2, levels=[0.3, 1.5, 4, 8, 14, 22], colors=GREY, linewidths=0.5)
    for path, color, text in ((descent, ORANGE, "gradient descent"), (adam, BLUE, "Adam")):
        axes.plot(*np.array(path).T, ".-", color=color, linewidth=1, markersize=4, label=text)
    axes.legend(frameon=False, loc="upper right")
    axes.set(xlabel="the flat direction", ylabel="the steep direction", title="40 steps of each")
    write(figure, name)


def learning_rate(name: str) -> None:
    figure, axes = figure_of(6.4, 2.4)
    axes.plot([one_file.learning_rate(step, 100, 1.0, 10) for step in range(101)], color=BLUE)
    axes.axvline(10, color=GREY, linestyle="--", linewidth=1)
    axes.text(11, 0.3, "end of the warm-up", color=GREY)
    axes.axhline(0.1, color=GREY, linestyle="--", linewidth=1)
    axes.text(30, 0.02, "peak / 10", color=GREY)
    axes.set(xlabel="step", ylabel="lr / peak", ylim=(0, 1.1), title="100 steps, 10 of them warm-up")
    write(figure, name)


def windows(name: str) -> None:
    text, T = "12 times 13", 6
    figure, axes = canvas(7.4, 2.6, 18, 6.4)
    for i, character in enumerate(text):
        cell(axes, i + 1, 5, BLUE if 2 <= i < 2 + T else ORANGE if i == 2 + T else None, 0.35)
        axes.text(i + 1.5, 5.5, character.replace(" ", "␣"), ha="center", va="center")
    axes.text(12.6, 5.5, "a window of T + 1 = 7 tokens", va="center")
    for row, (first, title, color) in enumerate(((2, "inputs", BLUE), (3, "targets", ORANGE))):
        for t in range(T):
            cell(axes, t + 3, 2.6 - 1.7 * row, color, 0.35)
            axes.text(t + 3.5, 3.1 - 1.7 * row, text[first + t].replace(" ", "␣"), ha="center", va="center")
            if row == 0:
                arrow(axes, (t + 3.5, 2.6), (t + 3.5, 1.95), INK)
        axes.text(9.4, 3.1 - 1.7 * row, title, color=color, va="center")
    axes.text(12.6, 2.25, "position t predicts the token below it", va="center")
    axes.text(12.6, 1.35, "from tokens 0 to t of the inputs", va="center")
    axes.set(xlim=(0.5, 20.5), ylim=(0.4, 6.4))
    write(figure, name)


def training(name: str) -> None:
    """The run of page 9, by the functions of examples/gpt2_in_one_file.py."""
    text = "".join(f"{i} times {i + 1} is {i * (i + 1)}.\n" for i in range(500))
    rng = np.random.default_rng(0)
    model = one_file.GPT2.random(one_file.Config(n_positions=32, n_embd=32, n_layer=2, n_head=4), rng)
    losses: list[float] = []
    step = one_file.train_step
    one_file.train_step = lambda *given: losses.append(step(*given)) or losses[-1]  # type: ignore[func-returns-value]
    try:
        with redirect_stdout(io.StringIO()) as printed:
            one_file.train(model, np.frombuffer(text.encode(), np.uint8), 100, 8, 5e-3, rng)
    finally:
        one_file.train_step = step
    reports = [line.split() for line in printed.getvalue().splitlines()]
    figure, axes = figure_of(6.4, 3)
    axes.axhline(math.log(257), color=GREY, linestyle="--", linewidth=1)
    axes.text(100, math.log(257) - 0.35, "log 257", ha="right", color=GREY)
    axes.plot(range(1, 101), losses, color=BLUE, linewidth=1, label="each batch")
    axes.plot([int(r[1]) for r in reports], [float(r[6]) for r in reports], "o", color=ORANGE, label="unseen text")
    axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="loss, nats per token", ylim=(0, 6))
    write(figure, name)


def cache(name: str) -> None:
    figure, axes = canvas(6.6, 2.9, 16, 7)
    for left, title in ((0.8, "without a cache"), (9, "with a cache")):
        for step in range(6):
            for position in range(step + 1):
                new = title == "without a cache" or position == step
                cell(axes, left + position, 5 - step, ORANGE if new else BLUE, 0.9 if new else 0.35)
        axes.text(left + 3, 6.3, title, ha="center")
        axes.text(left + 3, -0.7, "position", ha="center")
        axes.text(left - 0.5, 3, "step", rotation=90, va="center")
    axes.text(13.2, 4.6, "computed", color=ORANGE)
    axes.text(13.2, 3.7, "keys, values read", color=BLUE)
    axes.set(xlim=(0, 17.8), ylim=(-1, 7))
    write(figure, name)


def temperature(name: str) -> None:
    logits = np.array([2.0, 1.5, 0.5, 0.0, -0.5, -1.0])
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.2), sharey=True)
    for axis, t in zip(axes, (2.0, 1.0, 0.5), strict=False):
        axis.bar(range(6), one_file.softmax(logits / t), color=BLUE)
        axis.set(title=f"temperature {t:g}")
    axes[3].bar(range(6), one_file.softmax(np.where(logits < 1, -np.inf, logits)), color=ORANGE)
    axes[3].set(title="temperature 1, top_k 2")
    for axis in axes:
        axis.set(xlabel="token", xticks=range(6))
    axes[0].set(ylabel="probability")
    write(figure, name)


def tiles(name: str) -> None:
    figure, axes = canvas(7, 3.3, 19, 9)
    for t in range(8):
        for s in range(t + 1):
            now = t // 2 == 2 and s // 2 == 1
            cell(axes, s + 1, 7 - t, ORANGE if now else BLUE, 0.9 if now else 0.25)
        cell(axes, 10, 7 - t, GREEN, 0.9)
        cell(axes, 11.5, 7 - t, GREEN, 0.9)
    for row in range(4):
        for column in range(row + 1):
            axes.add_patch(plt.Rectangle((1 + 2 * column, 6 - 2 * row), 2, 2, fill=False, edgecolor=INK, linewidth=0.8))
    axes.text(5, 8.4, "P[t,s]", ha="center")
    axes.text(0.4, 4, "t", va="center")
    axes.text(5, -0.8, "s", ha="center")
    axes.text(10.5, 8.4, "lse", ha="center", color=GREEN)
    axes.text(12, 8.4, "dout·out", ha="center", color=GREEN)
    axes.text(13.4, 6.1, "kept: one number per row each", color=GREEN)
    axes.text(13.4, 4.6, "in memory: one block of P,", color=ORANGE)
    axes.text(13.4, 3.8, "computed again from q, k and lse", color=ORANGE)
    axes.text(13.4, 2.3, "the other blocks are never stored", color=BLUE)
    axes.text(13.4, 0.8, "empty: masked")
    axes.set(xlim=(0, 22.5), ylim=(-1, 9))
    write(figure, name)


PICTURES: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (
        finite_difference, tape, matmul, attention, layernorm, gelu, block, loss, adamw, learning_rate, windows,
        training, temperature, cache, tiles,
    )
}  # fmt: skip


def write(figure: Any, name: str) -> None:
    drawing.write(figure, OUT / f"{name}.svg")


OUT = Path(__file__).parent

if __name__ == "__main__":
    with plt.rc_context(RC):
        for chosen in sys.argv[1:] or PICTURES:
            PICTURES[chosen](chosen)
            print(OUT / f"{chosen}.svg")
