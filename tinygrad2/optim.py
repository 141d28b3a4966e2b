"""AdamW on flat buffers, clipping by the global norm, and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import numpy

from tinygrad2.nn import Module
from tinygrad2.params import ParameterArena


class AdamW:
    """Adam with decoupled weight decay (arXiv:1711.05101, algorithm 2), on every parameter of `model`.

    Weight decay acts on matrices only (parameters of two or more axes), not on biases and gains. The moments are flat
    arrays in the order of the model's arena. `lr` may be changed from step to step.
    """

    def __init__(
        self,
        model: Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        for name, value, ok in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not ok:
                raise ValueError(f"AdamW: {name} is {value}, out of range")
        self.model = model
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0  # how many have been made
        self._arena = model.arena()
        self.moments = self._zeros()

    @property
    def arena(self) -> ParameterArena:
        """The model's flat buffers; where the model has moved to another device, the moments follow it."""
        arena = self.model.arena()
        if arena is not self._arena:
            state, self._arena = self.state(), arena
            self.moments = self._zeros()
            self.load_state(state, self.steps)
        return arena

    def _zeros(self) -> list[tuple[Any, Any]]:
        backend, dtype = self._arena.backend, self._arena.dtype
        shapes = [region.values.shape for region in self._arena.regions]
        return [(backend.zeros(shape, dtype), backend.zeros(shape, dtype)) for shape in shapes]

    def zero_grad(self) -> None:
        """Clear every gradient."""
        self.arena.zero_grad()

    def grad_norm(self) -> Any:
        """The Euclidean norm of all gradients together, as a 0-d array."""
        np, kernels = self.arena.backend.np, self.arena.backend.kernels
        squares = [kernels.squared_norm(region.grads) for region in self.arena.regions]
        return np.sqrt(squares[0] + squares[1])

    def step(self, max_norm: float | None = None) -> Any:
        """Update every parameter once; returns the norm of the gradients before clipping, a 0-d array.

        max_norm  scale the gradients down to this global norm where theirs is larger (arXiv:1211.5063), folded into the
                  update. The gradients themselves stay as they are.
        Where the norm is not finite, no parameter and no moment is changed: a NaN never reaches them. That is decided
        on the device, without the host waiting for the norm; `steps` counts the step all the same.
        """
        arena = self.arena
        np, kernels = arena.backend.np, arena.backend.kernels
        norm = self.grad_norm()
        go = np.isfinite(norm).astype(arena.dtype)
        scale = 1.0 if max_norm is None else np.minimum(max_norm / (norm + 1e-6), 1.0)
        self.steps += 1
        for region, (m, v) in zip(arena.regions, self.moments, strict=True):
            decay = self.weight_decay if region.name == "decay" else 0.0
            kernels.adamw_step(
                region.values, region.grads, m, v, go, scale, self.lr, *self.betas, self.eps, decay, self.steps
            )
        return norm

    def state(self) -> dict[str, numpy.ndarray]:
        """The moments by parameter name (`exp_avg.NAME`, `exp_avg_sq.NAME`), on the host; `steps` is kept beside it."""
        arrays = {}
        for region, moments in zip(self._arena.regions, self.moments, strict=True):
            for kind, flat in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                host = self._arena.backend.to_host(flat)
                for name, (start, stop) in region.where.items():
                    arrays[f"{kind}.{name}"] = host[start:stop].reshape(self._arena.parameters[name].shape)
        return arrays

    def load_state(self, arrays: dict[str, numpy.ndarray], steps: int) -> None:
        """Take over what `state()` gave. Raises ValueError naming a missing, surplus or wrongly shaped array."""
        expected = self.state()
        for name in sorted(expected.keys() ^ arrays.keys()):
            raise ValueError(f"optimizer state: {name} is {'missing' if name in expected else 'not one of the model'}")
        for region, moments in zip(self.arena.regions, self.moments, strict=True):
            for kind, flat in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                for name, (start, stop) in region.where.items():
                    values = arrays[f"{kind}.{name}"]
                    shape = self.arena.parameters[name].shape
                    if values.shape != shape:
                        raise ValueError(f"optimizer state: {kind}.{name} has shape {values.shape}; expected {shape}")
                    flat[start:stop] = self.arena.backend.asarray(values.reshape(-1), dtype=self.arena.dtype)
        self.steps = steps


def constant(step: int, *, lr: float, warmup: int = 0) -> float:
    """lr, after a linear warm-up: lr (step + 1) / warmup while step < warmup. Steps count from 0."""
    return lr * (step + 1) / warmup if step < warmup else lr


def linear(step: int, *, lr: float, min_lr: float, warmup: int, decay_steps: int) -> float:
    """Linear warm-up, then a straight line from lr at `warmup` to min_lr at `decay_steps`, and min_lr from there."""
    if step < warmup:
        return constant(step, lr=lr, warmup=warmup)
    return min_lr + (lr - min_lr) * (1 - _progress(step, warmup, decay_steps))


def cosine(step: int, *, lr: float, min_lr: float, warmup: int, decay_steps: int) -> float:
    """Linear warm-up, then half a cosine from lr at `warmup` to min_lr at `decay_steps`, and min_lr from there.

    lr(step) = min_lr + (lr - min_lr) (1 + cos(pi p)) / 2, p the progress from 0 to 1.
    Source: arXiv:1608.03983, eq. 5.
    """
    if step < warmup:
        return constant(step, lr=lr, warmup=warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, decay_steps)))


def _progress(step: int, warmup: int, decay_steps: int) -> float:
    return min(1.0, (step - warmup) / (decay_steps - warmup)) if decay_steps > warmup else 1.0
