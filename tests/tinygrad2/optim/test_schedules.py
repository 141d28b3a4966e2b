"""tinygrad2/optim/schedules.py."""

import math

import pytest

from tinygrad2 import optim


def test_constant_after_warmup():
    assert [optim.constant(step, lr=2.0, warmup=4) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert optim.constant(0, lr=2.0) == 2.0


@pytest.mark.parametrize("schedule", [optim.linear, optim.cosine])
def test_schedules_at_their_boundaries(schedule):
    def lr(step, **options):
        return schedule(step, **{"lr": 2.0, "min_lr": 0.5, "warmup": 4, "decay_steps": 12, **options})

    assert [lr(step) for step in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert lr(8) == pytest.approx(1.25)
    assert lr(12) == lr(13) == lr(10**9) == 0.5
    rates = [lr(step) for step in range(4, 13)]
    assert rates == sorted(rates, reverse=True)
    assert lr(0, warmup=0) == 2.0
    assert lr(0, warmup=0, decay_steps=0) == 0.5  # no decay phase
    assert lr(4, decay_steps=4) == 0.5
    assert lr(3, decay_steps=2) == 2.0  # the warmup is completed first


def test_linear_and_cosine_follow_their_formulas():
    options = {"lr": 1.0, "min_lr": 0.0, "warmup": 0, "decay_steps": 100}
    for step in range(101):
        assert optim.linear(step, **options) == pytest.approx(1 - step / 100)
        assert optim.cosine(step, **options) == pytest.approx(math.cos(math.pi * step / 200) ** 2)


def test_wsd_is_constant_between_warmup_and_decay():
    options = {"lr": 2.0, "min_lr": 0.5, "warmup": 4, "stable_steps": 8, "decay_steps": 12}
    rates = [optim.wsd(step, **options) for step in range(15)]
    assert rates == [0.5, 1.0, 1.5, *[2.0] * 6, 1.625, 1.25, 0.875, 0.5, 0.5, 0.5]
    assert optim.wsd(10**9, **options) == 0.5


def test_before_its_decay_wsd_does_not_depend_on_the_number_of_steps():
    short, long = (
        [optim.wsd(step, lr=1.0, min_lr=0.0, warmup=10, stable_steps=n, decay_steps=n + 20) for step in range(80)]
        for n in (80, 1000)
    )
    assert short == long


def test_wsd_at_its_boundaries():
    def lr(step, **options):
        return optim.wsd(
            step, **{"lr": 2.0, "min_lr": 0.5, "warmup": 4, "stable_steps": 8, "decay_steps": 12, **options}
        )

    assert lr(0, warmup=0) == 2.0
    assert lr(8, decay_steps=8) == 0.5  # no decay phase
    assert [lr(step, stable_steps=0) for step in (3, 4, 8, 12)] == [2.0, 2.0, 1.25, 0.5]  # equals linear
    options = {"lr": 2.0, "min_lr": 0.5, "warmup": 4, "decay_steps": 12}
    assert [lr(step, stable_steps=4) for step in range(14)] == [optim.linear(step, **options) for step in range(14)]
