"""Learning-rate schedules: pure functions of the step, which counts from 0."""

from __future__ import annotations

import math


def constant(step: int, *, lr: float, warmup: int = 0) -> float:
    """lr, after a linear warm-up: lr (step + 1) / warmup while step < warmup."""
    return lr * (step + 1) / warmup if step < warmup else lr


def linear(step: int, *, lr: float, min_lr: float, warmup: int, decay_steps: int) -> float:
    """Linear warm-up, then linear decay from lr at `warmup` to min_lr at `decay_steps`, then min_lr.

    lr(step) = min_lr + (lr - min_lr) (1 - p), where p is the progress from 0 to 1.
    Source: arXiv:2310.07831; with min_lr 0: arXiv:2502.15938.
    """
    if step < warmup:
        return constant(step, lr=lr, warmup=warmup)
    return min_lr + (lr - min_lr) * (1 - _progress(step, warmup, decay_steps))


def cosine(step: int, *, lr: float, min_lr: float, warmup: int, decay_steps: int) -> float:
    """Linear warm-up, then cosine decay from lr at `warmup` to min_lr at `decay_steps`, then min_lr.

    lr(step) = min_lr + (lr - min_lr) (1 + cos(pi p)) / 2, where p is the progress from 0 to 1.
    Source: arXiv:1608.03983, eq. 5.
    """
    if step < warmup:
        return constant(step, lr=lr, warmup=warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * _progress(step, warmup, decay_steps)))


def wsd(step: int, *, lr: float, min_lr: float, warmup: int, stable_steps: int, decay_steps: int) -> float:
    """Warm-up, stable, decay: linear warm-up, lr until `stable_steps`, then linear decay to min_lr at `decay_steps`.

    lr(step) = min_lr + (lr - min_lr) (1 - p), where p is the progress of the decay, from 0 to 1.
    All steps are counted from the start of training. Up to `stable_steps`, the rate does not depend on the length of
    training, so a run can be extended from any step before the decay, or the decay can start there.
    Source: arXiv:2404.06395, section 4.2.
    """
    if step < max(warmup, stable_steps):
        return constant(step, lr=lr, warmup=warmup)
    return min_lr + (lr - min_lr) * (1 - _progress(step, max(warmup, stable_steps), decay_steps))


def _progress(step: int, first: int, last: int) -> float:
    """The progress between two steps, from 0 to 1."""
    return min(1.0, (step - first) / (last - first)) if last > first else 1.0
