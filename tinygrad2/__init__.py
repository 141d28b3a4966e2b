"""tinygrad2: a small autograd engine whose every backward pass is written by hand and checked."""

from tinygrad2 import nn, ops, optim
from tinygrad2.autograd import no_grad
from tinygrad2.random import Key
from tinygrad2.tensor import Tensor, recompute, record

__all__ = ["Key", "Tensor", "nn", "no_grad", "ops", "optim", "recompute", "record"]
