"""tinygrad2: a small autograd engine in which every backward pass is written by hand and checked.

    from tinygrad2 import Tensor, nn, ops, optim
    import tinygrad2 as tg                       # tg.relu(x), tg.where(x > 0, x, 0), tg.zeros(2, 3): see functional.py

The names below and all functions in functional.py are imported on first use. So `tinygrad2.machine` and
`tinygrad2.files`, which need only the standard library, can be imported without NumPy.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tinygrad2 import missing_names

if TYPE_CHECKING:
    from tinygrad2 import functional, nn, ops, optim
    from tinygrad2.autograd import no_grad
    from tinygrad2.functional import *  # noqa: F403
    from tinygrad2.gradient_checkpointing import recompute
    from tinygrad2.random import Key
    from tinygrad2.tensor import Tensor, record
    from tinygrad2.tracer import tracing

__version__ = "1.0.0rc1"

__all__ = ["Key", "Tensor", "functional", "nn", "no_grad", "ops", "optim", "recompute", "record", "tracing"]

_MODULE_OF = {
    "Key": "random",
    "Tensor": "tensor",
    "no_grad": "autograd",
    "recompute": "gradient_checkpointing",
    "record": "tensor",
    "tracing": "tracer",
}


def _functions() -> Any:
    return import_module("tinygrad2.functional")


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"tinygrad2.{_MODULE_OF[name]}"), name)
    elif name in __all__:
        value = import_module(f"tinygrad2.{name}")
    elif name.startswith("_") or find_spec(f"tinygrad2.{name}"):
        raise missing_names.missing("tinygrad2", name, missing_names.FUNCTIONS)
    elif name in _functions().__all__:
        value = getattr(_functions(), name)
    else:
        value = _functions().__getattr__(name)  # raises an error that says what to use instead
    globals()[name] = value
    return value
