"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable

from tinygrad2.array import Array
from tinygrad2.distributed import Comm
from tinygrad2.optim.optimizer import Optimizer, Part
from tinygrad2.params import HasParameters, Parameter


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2). For the math, see `adamw_step` in reference.py.

    betas, eps  decay rates of the running means of the gradient and its square; a constant added to the latter's root.
    """

    def __init__(
        self,
        model: HasParameters | Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        shared_by: Comm | None = None,
    ):
        self._require("betas", betas, all(0 <= beta < 1 for beta in betas))
        self._require("eps", eps, eps > 0)
        self.betas, self.eps = betas, eps
        super().__init__(model, lr, weight_decay, shared_by)

    def state_names(self, parameter: str) -> tuple[str, ...]:
        return "exp_avg", "exp_avg_sq"

    def update(self, part: Part, scale: Array, lr: Array, step: Array) -> None:
        m, v = part.state
        numbers = (*self.betas, self.eps, self.decay_of(part))
        self.kernels.adamw_step(part.values, part.grads, m, v, scale, lr, *numbers, step)
