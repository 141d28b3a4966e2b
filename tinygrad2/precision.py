"""Precision: the dtypes of a model's parameters and activations."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class Precision:
    """The dtypes of a model's parameters and activations. All layers of a model have the same precision.

    name         the name that users see.
    parameters   the dtype of the parameters, their gradients and the optimizer state.
    activations  the dtype in which layers read the parameters and compute.
    matrices     the dtype of parameters with two or more axes, if it differs from that of the others. Such parameters
                 are converted when they are read and have no gradients, so the model can generate but not train.
    tf32         whether float32 matrix products round their operands to a 10-bit mantissa.
    """

    name: str
    parameters: str
    activations: str
    matrices: str | None = None
    tf32: bool = False

    @staticmethod
    def of(value: PrecisionLike) -> Precision:
        """The precision with this name or dtype, or `value` itself if it is one. Raises ValueError if there is none."""
        if isinstance(value, Precision):
            return value
        name = value if isinstance(value, str) else numpy.dtype(value).name
        if name not in _BY_NAME:
            raise ValueError(f"dtype {name!r} is not supported; choose one of {', '.join(_BY_NAME)}")
        return _BY_NAME[name]

    @property
    def copies(self) -> str | None:
        """The dtype of the parameter copies that layers read, or None if layers read the parameters themselves."""
        return None if self.activations == self.parameters else self.activations

    @property
    def trains(self) -> bool:
        """Whether all parameters have gradients."""
        return self.matrices is None

    @property
    def parameter_bytes(self) -> int:
        """Bytes per parameter."""
        return numpy.dtype(self.parameters).itemsize

    @property
    def activation_bytes(self) -> int:
        """Bytes per activation."""
        return numpy.dtype(self.activations).itemsize

    def dtype_of(self, ndim: int) -> str:
        """The dtype of a parameter with this number of axes."""
        return self.matrices if self.matrices and ndim >= 2 else self.parameters


PrecisionLike = Precision | DTypeLike  # what Precision.of accepts, such as "bfloat16"

FLOAT32 = Precision("float32", "float32", "float32")
TF32 = Precision("tf32", "float32", "float32", tf32=True)
BFLOAT16 = Precision("bfloat16", "float32", "bfloat16")
FLOAT64 = Precision("float64", "float64", "float64")
BFLOAT16_WEIGHTS = Precision("bfloat16_weights", "float32", "float32", matrices="bfloat16")

_BY_NAME = {p.name: p for p in (FLOAT32, TF32, BFLOAT16, FLOAT64, BFLOAT16_WEIGHTS)}
TRAINING = tuple(p.name for p in _BY_NAME.values() if p.trains)  # the names of the precisions that support training


def sum_dtype(dtype: numpy.dtype) -> numpy.dtype:
    """The dtype of sums, parameter gradients and LayerNorm gains for activations of this dtype: float32 or wider."""
    return dtype if dtype.itemsize >= 4 else numpy.dtype(numpy.float32)
