"""tinygrad2: a small autograd engine whose every backward pass is written by hand and checked.

The names below are imported when they are first used, so that `tinygrad2.machine` and `tinygrad2.files`, which need the
standard library only, can be imported where NumPy is missing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygrad2 import nn, ops, optim
    from tinygrad2.autograd import no_grad
    from tinygrad2.random import Key
    from tinygrad2.tensor import Tensor, recompute, record
    from tinygrad2.trace import tracing

__version__ = "0.9.0"

__all__ = ["Key", "Tensor", "nn", "no_grad", "ops", "optim", "recompute", "record", "tracing"]

_MODULE_OF = {
    "Key": "random",
    "Tensor": "tensor",
    "no_grad": "autograd",
    "recompute": "tensor",
    "record": "tensor",
    "tracing": "trace",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"tinygrad2.{_MODULE_OF[name]}"), name)
    elif name in __all__:
        value = import_module(f"tinygrad2.{name}")
    else:
        raise AttributeError(f"module 'tinygrad2' has no attribute {name!r}")
    globals()[name] = value
    return value
