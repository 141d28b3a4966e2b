"""Small models on the CPU, compared with PyTorch's eager mode: python tests/benchmarks/small.py [--json FILE]

The steps are so small that call overhead, not arithmetic, dominates the time. A step is the forward pass, the loss, the
backward pass and the optimizer, in float32. The programs run interleaved:
  - an MLP 2-64-64-3 with ReLU and cross-entropy on 128 points, with SGD and with AdamW;
  - a GRU written only with operators (arXiv:1406.1078), 8 time steps of 32 sequences, width 32, with SGD.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import Contender, Tasks, Work, command, parser, report, timed, versions

SIZES, BATCH = (2, 64, 64, 3), 128  # the MLP
STEPS, SEQUENCES, WIDTH = 8, 32, 32  # the GRU
LEAST = 0.2  # a step is repeated for at least this many seconds per turn
TASKS = ("MLP, SGD", "MLP, AdamW", "GRU, SGD")


def points() -> tuple[Any, Any]:
    """The MLP's input (BATCH, 2) and classes (BATCH,)."""
    import numpy as np

    generator = np.random.default_rng(0)
    return generator.standard_normal((BATCH, SIZES[0]), dtype=np.float32), generator.integers(SIZES[-1], size=BATCH)


def sequences() -> Any:
    """The GRU's input (STEPS, SEQUENCES, WIDTH)."""
    import numpy as np

    return np.random.default_rng(1).standard_normal((STEPS, SEQUENCES, WIDTH), dtype=np.float32)


def gru_weights() -> list[Any]:
    """For each gate: the input matrix, the state matrix, and the bias."""
    import numpy as np

    generator = np.random.default_rng(2)
    shapes = [(WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,)] * 3
    return [WIDTH**-0.5 * generator.standard_normal(shape, dtype=np.float32) for shape in shapes]


def gru_loss(library: Any, parameters: Sequence[Any], x: Any) -> Any:
    """The mean square of the last state. `library` provides sigmoid and tanh; `parameters` come from gru_weights."""
    update, reset, new = (parameters[i : i + 3] for i in (0, 3, 6))

    def gate(part: Sequence[Any], inputs: Any, state: Any) -> Any:
        return inputs @ part[0] + state @ part[1] + part[2]

    h = x[0] * 0.0
    for t in range(STEPS):
        z, r = library.sigmoid(gate(update, x[t], h)), library.sigmoid(gate(reset, x[t], h))
        h = (1.0 - z) * library.tanh(gate(new, x[t], r * h)) + z * h
    return (h * h).mean()


def step_of(loss: Callable[[], Any], optimizer: Any) -> Callable[[], float]:
    """A function that does one training step and returns the loss before the update."""

    def step() -> float:
        optimizer.zero_grad()
        total = loss()
        total.backward()
        optimizer.step()
        return float(total.item())

    return step


def our_steps() -> dict[str, Callable[[], float]]:
    from tinygrad2 import Tensor, functional, nn, ops, optim
    from tinygrad2.params import Parameter

    def mlp() -> Any:
        layers = [nn.Linear(n, m) for n, m in itertools.pairwise(SIZES)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    x, targets = Tensor(points()[0]), points()[1]
    first, second, series = mlp(), mlp(), Tensor(sequences())
    weights = [Parameter(values) for values in gru_weights()]
    return dict(
        zip(
            TASKS,
            (
                step_of(lambda: ops.cross_entropy(first(x), targets), optim.SGD(first, lr=0.01)),
                step_of(lambda: ops.cross_entropy(second(x), targets), optim.AdamW(second, lr=0.001)),
                step_of(lambda: gru_loss(functional, weights, series), optim.SGD(weights, lr=0.01)),
            ),
            strict=True,
        )
    )


def torch_steps() -> dict[str, Callable[[], float]]:
    import torch
    from torch import nn

    def mlp() -> Any:
        layers = [nn.Linear(n, m) for n, m in itertools.pairwise(SIZES)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    x, targets = (torch.tensor(values) for values in points())
    first, second, series = mlp(), mlp(), torch.tensor(sequences())
    weights = [nn.Parameter(torch.tensor(values)) for values in gru_weights()]
    library, loss = SimpleNamespace(sigmoid=torch.sigmoid, tanh=torch.tanh), nn.functional.cross_entropy
    momentum = {"lr": 0.01, "momentum": 0.9}
    return dict(
        zip(
            TASKS,
            (
                step_of(lambda: loss(first(x), targets), torch.optim.SGD(first.parameters(), **momentum)),
                step_of(lambda: loss(second(x), targets), torch.optim.AdamW(second.parameters(), lr=0.001)),
                step_of(lambda: gru_loss(library, weights, series), torch.optim.SGD(weights, **momentum)),
            ),
            strict=True,
        )
    )


def ready(steps: dict[str, Callable[[], float]]) -> Tasks:
    """The steps as tasks, after a warm-up that compiles and allocates memory."""
    for step in steps.values():
        for _ in range(20):
            step()
    return {name: timed(step) for name, step in steps.items()}


def ours(count: int) -> Tasks:
    from tinygrad2 import threads

    threads.set_count(count)
    return ready(our_steps())


def torchs(count: int) -> Tasks:
    import torch

    torch.set_num_threads(count)
    return ready(torch_steps())


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser("small.py", __doc__).parse_args(arguments)
    works = dict.fromkeys(TASKS, Work())
    contenders = [Contender("tinygrad2", ours, (options.threads,), works)]
    if versions("torch"):
        contenders.append(Contender("PyTorch, eager", torchs, (options.threads,), works, peer=True))
    return report("small", options, contenders, LEAST)


if __name__ == "__main__":
    raise SystemExit(command(main))
