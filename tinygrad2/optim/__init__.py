"""Optimizers and learning-rate schedules: `optim.AdamW(model)`, `optim.cosine(step, ...)`."""

from typing import TYPE_CHECKING

from tinygrad2 import missing_names
from tinygrad2.optim.adamw import AdamW
from tinygrad2.optim.muon import Muon
from tinygrad2.optim.optimizer import Optimizer
from tinygrad2.optim.schedules import constant, cosine, linear, wsd
from tinygrad2.optim.sgd import SGD

__all__ = ["SGD", "AdamW", "Muon", "Optimizer", "constant", "cosine", "linear", "wsd"]

if not TYPE_CHECKING:  # so that type checkers report misspelled names
    __getattr__ = missing_names.of_module("tinygrad2.optim", missing_names.OPTIMIZERS)
