"""A multilayer perceptron learns to separate the arms of a spiral, and its decision regions are plotted.

    python examples/spiral_mlp.py

Three classes of 200 points each lie on the arms of a spiral, so straight lines cannot separate them. Two hidden layers
of 64 units with ReLU learn the regions in 400 steps, which take a few seconds. This prints something like

    accuracy 0.998 on 600 training points, 0.980 on 600 new points

and saves a plot of the points and the predicted class of every point in the plane as spiral_mlp.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tinygrad2 import Tensor, nn, no_grad, ops, optim

COLORS = ("#1b9e77", "#d95f02", "#7570b3")
CLASSES = len(COLORS)


def spiral(points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Generate `points` points per class, (N, 2), and their classes, (N,). Each arm turns by 6 radians, with noise."""
    radius = np.linspace(0.05, 1, points)
    places, classes = [], []
    for arm in range(CLASSES):
        angle = 2 * np.pi * arm / CLASSES + 6 * radius + rng.normal(0, 0.4, points)
        places.append(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))
        classes.append(np.full(points, arm))
    return np.concatenate(places).astype(np.float32), np.concatenate(classes)


def predict(model: nn.Sequential, x: np.ndarray) -> np.ndarray:
    """The most probable class of each point, (N,)."""
    with no_grad():
        return model(Tensor(x)).numpy().argmax(axis=1)


def accuracy(model: nn.Sequential, x: np.ndarray, y: np.ndarray) -> float:
    return float((predict(model, x) == y).mean())


def train(model: nn.Sequential, x: np.ndarray, y: np.ndarray, steps: int) -> None:
    """Train the model. Every step uses all points, since there are only a few."""
    optimizer = optim.AdamW(model, lr=0.01, weight_decay=0.01)
    for step in range(1, steps + 1):
        loss = ops.cross_entropy(model(Tensor(x)), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 50 == 0 or step == steps:
            print(f"step {step:4}  loss {loss.item():.4f}  accuracy {accuracy(model, x, y):.3f}", flush=True)


def draw(model: nn.Sequential, x: np.ndarray, y: np.ndarray, file: Path) -> None:
    """Save a plot of the points over the decision regions, colored by predicted class."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print('no plot: matplotlib is not installed; pip install -e ".[examples]"')
        return
    pyplot.switch_backend("Agg")  # renders to files and needs no display
    axis = np.linspace(-1.2, 1.2, 300, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)  # (300, 300, 2)
    regions = predict(model, grid.reshape(-1, 2)).reshape(300, 300)
    figure, axes = pyplot.subplots(figsize=(6, 6))
    axes.contourf(axis, axis, regions, levels=np.arange(CLASSES + 1) - 0.5, colors=COLORS, alpha=0.3)
    axes.scatter(x[:, 0], x[:, 1], c=np.take(COLORS, y), s=12)
    axes.set(title=f"Decision regions, accuracy {accuracy(model, x, y):.3f}", aspect="equal")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser("python examples/spiral_mlp.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="training steps [default: %(default)s]")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("spiral_mlp.png"),
        metavar="FILE",
        help="picture to write [default: %(default)s]",
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; expected 1 or more")
    rng = np.random.default_rng(0)
    x, y = spiral(200, rng)
    new_x, new_y = spiral(200, rng)
    model = nn.Sequential(
        nn.Linear(2, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),  # without ReLU, since logits may have any sign
    )
    train(model, x, y, options.steps)
    print(
        f"accuracy {accuracy(model, x, y):.3f} on {len(y)} training points, "
        f"{accuracy(model, new_x, new_y):.3f} on {len(new_y)} new points"
    )
    draw(model, x, y, options.picture)


if __name__ == "__main__":
    main()
