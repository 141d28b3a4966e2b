"""Stochastic gradient descent, with or without momentum."""

from __future__ import annotations

from collections.abc import Iterable

from tinygrad2.array import Array
from tinygrad2.distributed import Comm
from tinygrad2.optim.optimizer import Optimizer, Part
from tinygrad2.params import HasParameters, Parameter


class SGD(Optimizer):
    """Stochastic gradient descent. For the math, see `sgd_step` in reference.py.

    momentum  decay rate of the momentum; if 0, there is no state.
    nesterov  use Nesterov momentum.
    Weight decay is added to the gradient, as in PyTorch.
    """

    def __init__(
        self,
        model: HasParameters | Iterable[Parameter],
        lr: float = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        shared_by: Comm | None = None,
    ):
        self._require("momentum", momentum, 0 <= momentum < 1)
        if nesterov and not momentum:
            raise ValueError("SGD: nesterov needs a momentum above 0")
        self.momentum, self.nesterov = momentum, nesterov
        super().__init__(model, lr, weight_decay, shared_by)

    def state_names(self, parameter: str) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    def update(self, part: Part, scale: Array, lr: Array, step: Array) -> None:
        buffer = part.state[0] if self.momentum else None
        decay = self.decay_of(part)
        self.kernels.sgd_step(part.values, part.grads, buffer, scale, lr, self.momentum, self.nesterov, decay)
