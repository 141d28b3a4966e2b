"""An encoder-decoder with cross-attention learns to reverse and sort digits, and its attention is plotted.

    python examples/seq2seq_attention.py

The input is a command and eight digits; the output is the same digits, reversed or sorted:

    R 3 1 4 1 5 9 2 6  ->  6 2 9 5 1 4 1 3            S 3 1 4 1 5 9 2 6  ->  1 1 2 3 4 5 6 9

This is the Transformer of Vaswani et al. (arXiv:1706.03762), with one layer each in the encoder and the decoder. The
encoder reads the input; each position attends to all positions. The decoder writes the output, one digit at a time. In
its cross-attention, the queries come from the output positions, and the keys and values from the input positions, so
the weights show from which inputs each output was computed. There are 10^8 inputs per command, and every batch is new,
so the network cannot memorize the answers and has to learn the tasks. After about half a minute, this prints something
like

    correct: 100.0% of 500 new inputs reversed, 99.8% sorted

and saves a plot as seq2seq_attention.png. When reversing, each output attends to one position, along a
diagonal; when sorting, it attends to digits of similar value, and to the command.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from tinygrad2 import Tensor, nn, no_grad, ops, optim

DIGITS = 8  # digits per input
REVERSE, SORT, START = 10, 11, 12  # the ids after the digits 0 ... 9
V = 13
C, H = 64, 4  # channels, and attention heads


class Attention(nn.Module):
    """Multi-head attention from each position of x to the positions of `source`: x (B, T, C), source (B, S, C) ->
    (B, T, C)."""

    def __init__(self) -> None:
        self.query, self.key, self.value, self.output = (nn.Linear(C, C) for _ in range(4))
        self.weights = np.empty(0)  # the weights of the last call, (B, H, T, S), for the plot

    def __call__(self, x: Tensor, source: Tensor, causal: bool = False) -> Tensor:
        q, k, v = split_heads(self.query(x)), split_heads(self.key(source)), split_heads(self.value(source))
        scores = q @ k.transpose(0, 1, 3, 2) * (1 / math.sqrt(C / H))  # (B, H, T, S)
        if causal:  # position t must not see the later positions, which it has to predict
            scores = scores.masked_fill(np.triu(np.ones(scores.shape[-2:], dtype=bool), 1), -np.inf)
        weights = ops.softmax(scores)
        self.weights = weights.numpy()
        return self.output((weights @ v).transpose(0, 2, 1, 3).reshape(x.shape))


def split_heads(x: Tensor) -> Tensor:
    """(B, T, C) -> (B, H, T, C / H)."""
    return x.reshape(*x.shape[:2], H, C // H).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    def __init__(self) -> None:
        self.first, self.second = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Transformer(nn.Module):
    """Inputs (B, S) and the outputs so far (B, T) -> logits (B, T, V) for the next output at each position."""

    def __init__(self) -> None:
        self.digits, self.places = nn.Embedding(V, C), nn.Embedding(DIGITS + 1, C)
        self.encoder_attention, self.encoder_mlp = Attention(), MLP()
        self.decoder_attention, self.cross_attention, self.decoder_mlp = Attention(), Attention(), MLP()
        self.encoder_norms, self.decoder_norms = ([nn.LayerNorm(C) for _ in range(n)] for n in (3, 4))
        self.output = nn.Linear(C, V)

    def embed(self, ids: np.ndarray) -> Tensor:
        return ops.embedding(ids, self.digits.weight, self.places.weight)

    def __call__(self, inputs: np.ndarray, outputs: np.ndarray) -> Tensor:
        before_attention, before_mlp, last = self.encoder_norms
        x = self.embed(inputs)
        h = before_attention(x)
        x = x + self.encoder_attention(h, h)
        x = last(x + self.encoder_mlp(before_mlp(x)))  # (B, S, C), the input of the decoder
        before_attention, before_cross, before_mlp, last = self.decoder_norms
        y = self.embed(outputs)
        h = before_attention(y)
        y = y + self.decoder_attention(h, h, causal=True)
        y = y + self.cross_attention(before_cross(y), x)
        y = y + self.decoder_mlp(before_mlp(y))
        return self.output(last(y))


def make_batch(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (count, 1 + DIGITS), of which the first half have the command to reverse, and the correct outputs
    (count, DIGITS)."""
    digits = rng.integers(10, size=(count, DIGITS))
    command = np.where(np.arange(count) < count // 2, REVERSE, SORT)[:, None]
    outputs = np.where(command == REVERSE, digits[:, ::-1], np.sort(digits, axis=1))
    return np.concatenate([command, digits], axis=1), outputs


def shifted(outputs: np.ndarray) -> np.ndarray:
    """The input of the decoder for predicting each output: START, followed by all outputs except the last."""
    return np.concatenate([np.full((len(outputs), 1), START), outputs[:, :-1]], axis=1)


def solve(model: Transformer, inputs: np.ndarray) -> np.ndarray:
    """Decode greedily: each output is the most probable digit, and becomes an input for predicting the next output."""
    outputs = np.full((len(inputs), 1), START)
    while outputs.shape[1] <= DIGITS:
        with no_grad():
            logits = model(inputs, outputs).numpy()[:, -1]
        outputs = np.concatenate([outputs, logits[:, :10].argmax(axis=1)[:, None]], axis=1)
    return outputs[:, 1:]


def correct(model: Transformer, count: int = 500) -> tuple[float, float]:
    """The fractions of new inputs, `count` per command, that are reversed and sorted without errors."""
    inputs, expected = make_batch(2 * count, np.random.default_rng(1))
    right = (solve(model, inputs) == expected).all(axis=1)
    return float(right[:count].mean()), float(right[count:].mean())


def train(model: Transformer, steps: int) -> None:
    optimizer, rng = optim.AdamW(model, betas=(0.9, 0.98), weight_decay=0.01), np.random.default_rng(0)
    for step in range(1, steps + 1):
        optimizer.lr = optim.cosine(step - 1, lr=3e-3, min_lr=1e-4, warmup=100, decay_steps=steps)
        inputs, outputs = make_batch(64, rng)
        loss = ops.cross_entropy(model(inputs, shifted(outputs)), outputs)
        loss.backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        if step == 1 or step % 100 == 0 or step == steps:
            reversed_, sorted_ = correct(model, 100)
            print(f"step {step:5}  loss {loss.item():.4f}  reversed {reversed_:.2f}  sorted {sorted_:.2f}", flush=True)


def draw(model: Transformer, file: Path) -> None:
    """Save a plot of the cross-attention weights, averaged over the heads, for the same digits with both commands."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print('no plot: matplotlib is not installed; pip install -e ".[examples]"')
        return
    pyplot.switch_backend("Agg")  # renders to files and needs no display
    digits = [3, 1, 4, 1, 5, 9, 2, 6]
    inputs = np.array([[REVERSE, *digits], [SORT, *digits]])
    outputs = solve(model, inputs)
    with no_grad():
        model(inputs, shifted(outputs))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5))
    for axes, name, weights, row in zip(panels, "RS", model.cross_attention.weights.mean(axis=1), outputs, strict=True):
        axes.imshow(weights, cmap="Blues", vmin=0)
        axes.set_xticks(range(DIGITS + 1), [name, *map(str, digits)])
        axes.set_yticks(range(DIGITS), map(str, row))
        axes.set(xlabel="input", ylabel="output", title="reverse" if name == "R" else "sort")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python examples/seq2seq_attention.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="training steps [default: %(default)s]")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("seq2seq_attention.png"),
        metavar="FILE",
        help="picture to write [default: %(default)s]",
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; expected 1 or more")
    model = Transformer()
    print(f"{model.n_parameters():,} parameters; uniform probabilities have a loss of {math.log(10):.2f}")
    train(model, options.steps)
    reversed_, sorted_ = correct(model)
    print(f"correct: {reversed_:.1%} of 500 new inputs reversed, {sorted_:.1%} sorted")
    draw(model, options.picture)


if __name__ == "__main__":
    main()
