"""A gated recurrent unit learns words from Python's documentation, letter by letter, and invents new words.

    python examples/name_gru.py

It is trained on the words of 4 to 12 letters in pydoc's topics, which are included with Python: about 2,500 words. At
each letter, the network predicts the next letter from its state, a vector that it updates with every letter:

    z = sigmoid(x W_z + h U_z + b_z)             the fraction of the old state that is kept
    r = sigmoid(x W_r + h U_r + b_r)             the fraction of the old state that enters the new content
    n = tanh(x W_n + r * (h U_n) + b_n)          the new content
    h = z * h + (1 - z) * n                      (Cho et al., arXiv:1406.1078, in PyTorch's form)

Uniform probabilities have a loss of log 27 = 3.30 nats. After about half a minute, this prints something like

    loss 1.33 on the training words, 1.91 on unseen words

and saves plots of the losses and of the letter embeddings, in which vowels are close together, as name_gru.png.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from tinygrad2 import Tensor, functional, nn, no_grad, optim

LETTERS = ".abcdefghijklmnopqrstuvwxyz"  # a dot marks the beginning and the end of a word
V = len(LETTERS)
LONGEST = 12
PADDING = -1  # the target after the end of a word, which the loss ignores


class GRU(nn.Module):
    """Letter ids (B, T) -> logits (B, T, V) of the next letter at each position."""

    def __init__(self, width: int = 128):
        self.embedding = nn.Embedding(V, 32)
        self.of_input = nn.Linear(32, 3 * width)  # W_z, W_r, W_n, concatenated, and the biases
        self.of_state = nn.Linear(width, 3 * width, bias=False)  # U_z, U_r, U_n, concatenated
        self.output = nn.Linear(width, V)
        self.width = width

    def update(self, x: Tensor, h: Tensor) -> Tensor:
        """The state after the next letter. x (B, 3 C) is the letter's contribution to the sums, and h (B, C) is the
        previous state."""
        C, u = self.width, self.of_state(h)
        z = (x[:, :C] + u[:, :C]).sigmoid()
        r = (x[:, C : 2 * C] + u[:, C : 2 * C]).sigmoid()
        n = (x[:, 2 * C :] + r * u[:, 2 * C :]).tanh()
        return z * h + (1 - z) * n

    def __call__(self, ids: np.ndarray) -> Tensor:
        x = self.of_input(self.embedding(ids))  # (B, T, 3 C), for all letters together
        h = Tensor(np.zeros((len(ids), self.width), dtype=np.float32))
        states = []
        for t in range(ids.shape[1]):
            h = self.update(x[:, t], h)
            states.append(h)
        return self.output(functional.stack(states, axis=1))

    def loss(self, words: np.ndarray) -> Tensor:
        """The mean cross-entropy of predicting each next letter in words (B, T + 1), as returned by `encode`."""
        ids, targets = words[:, :-1], words[:, 1:]
        return functional.cross_entropy(self(np.maximum(ids, 0)), targets, ignore_index=PADDING)


def find_words() -> list[str]:
    """The distinct lower-case words in pydoc's topics, in alphabetical order."""
    found = re.findall(rf"\b[a-z]{{4,{LONGEST}}}\b", " ".join(topics.values()))
    return sorted(set(found))


def encode(words: list[str]) -> np.ndarray:
    """ ".word." as ids, padded at the end: (number of words, LONGEST + 2)."""
    ids = np.full((len(words), LONGEST + 2), PADDING)
    for row, word in zip(ids, words, strict=True):
        row[: len(word) + 2] = [LETTERS.index(letter) for letter in f".{word}."]
    return ids


def train(model: GRU, words: np.ndarray, unseen: np.ndarray, steps: int) -> list[tuple[int, float, float]]:
    """Train the model. Returns (step, loss on the batches since the last report, loss on unseen words) by report."""
    optimizer, rng, reports, losses = optim.AdamW(model, weight_decay=0.1), np.random.default_rng(0), [], []
    for step in range(1, steps + 1):
        optimizer.lr = optim.cosine(step - 1, lr=5e-3, min_lr=5e-4, warmup=50, decay_steps=steps)
        loss = model.loss(words[rng.integers(len(words), size=128)])
        loss.backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % 50 == 0 or step == steps:
            with no_grad():
                reports.append((step, float(np.mean(losses)), model.loss(unseen).item()))
            print("step {:4}  loss {:.4f}  on unseen words {:.4f}".format(*reports[-1]), flush=True)
            losses = []
    return reports


def invent(model: GRU, count: int, rng: np.random.Generator) -> list[str]:
    """`count` words, sampled letter by letter from the model's probabilities."""
    ids, ended = np.zeros((count, 1), dtype=int), np.zeros(count, dtype=bool)
    while not ended.all() and ids.shape[1] <= LONGEST:
        with no_grad():
            logits = model(ids).numpy()[:, -1].astype(np.float64)  # (count, V); all letters are processed again
        noise = rng.gumbel(size=logits.shape)  # the argmax of logits + Gumbel noise is a sample from the softmax
        chosen = (logits + noise).argmax(axis=1)
        ended |= chosen == 0
        ids = np.concatenate([ids, np.where(ended, 0, chosen)[:, None]], axis=1)
    return ["".join(LETTERS[i] for i in row if i) for row in ids]


def draw(model: GRU, reports: list[tuple[int, float, float]], file: Path) -> None:
    """Save plots of the losses and of the first two principal components of the letter embeddings."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print('no plot: matplotlib is not installed; pip install -e ".[examples]"')
        return
    pyplot.switch_backend("Agg")  # renders to files and needs no display
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5))
    steps, seen, unseen = zip(*reports, strict=True)
    left.plot(steps, seen, label="words")
    left.plot(steps, unseen, label="unseen words")
    left.set(xlabel="step", ylabel="loss (nats per letter)", title="Training")
    left.legend()
    table = model.embedding.weight.numpy()[1:]
    u, s, _ = np.linalg.svd(table - table.mean(axis=0), full_matrices=False)
    for letter, (x, y) in zip(LETTERS[1:], u[:, :2] * s[:2], strict=True):
        right.text(x, y, letter, color="tab:red" if letter in "aeiou" else "black", fontsize=14, ha="center")
    low, high = (u[:, :2] * s[:2]).min(axis=0) - 0.2, (u[:, :2] * s[:2]).max(axis=0) + 0.2
    right.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title="Letter embeddings, two components")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser("python examples/name_gru.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="training steps [default: %(default)s]")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("name_gru.png"),
        metavar="FILE",
        help="picture to write [default: %(default)s]",
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; expected 1 or more")
    words = find_words()
    order = np.random.default_rng(0).permutation(len(words))
    encoded = encode([words[i] for i in order])
    seen, unseen = encoded[:-300], encoded[-300:]
    print(f"{len(seen):,} training words, {len(unseen)} test words; loss of uniform probabilities: {np.log(V):.2f}")
    model = GRU()
    reports = train(model, seen, unseen, options.steps)
    new = [word for word in invent(model, 40, np.random.default_rng(1)) if word not in words]
    print(f"{len(new)} of 40 words are new: {', '.join(new)}")
    print(f"loss {reports[-1][1]:.2f} on the training words, {reports[-1][2]:.2f} on unseen words")
    draw(model, reports, options.picture)


if __name__ == "__main__":
    main()
