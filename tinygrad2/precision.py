"""Precision: the types that a model computes in."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy
from numpy.typing import DTypeLike

PARAMETER_DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Precision:
    """The types of what a model holds and computes.

    name         as users give it.
    parameters   dtype of the parameters, their gradients and the optimizer's state.
    activations  dtype of what the layers compute, and of the copies of the weights that they read.
    tf32         matrix products of float32 round their operands to 10 bits of mantissa.
    """

    name: str
    parameters: str
    activations: str
    tf32: bool = False

    @property
    def copies(self) -> bool:
        """Whether layers read copies of the parameters in another type."""
        return self.activations != self.parameters

    @property
    def parameter_bytes(self) -> int:
        return numpy.dtype(self.parameters).itemsize

    @property
    def activation_bytes(self) -> int:
        return numpy.dtype(self.activations).itemsize

    @property
    def needs_gpu(self) -> bool:
        """Whether only GPUs train in it."""
        return self.copies or self.tf32


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("float32", "float32", "float32"),
        Precision("tf32", "float32", "float32", tf32=True),
        Precision("bfloat16", "float32", "bfloat16"),
        Precision("float64", "float64", "float64"),
    )
}


def check_parameter_dtype(dtype: DTypeLike) -> numpy.dtype:
    """`dtype` as a NumPy dtype. Raises ValueError where parameters cannot have it."""
    name = dtype if isinstance(dtype, str) else numpy.dtype(dtype).name
    if name not in PARAMETER_DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; choose one of {', '.join(PARAMETER_DTYPES)}")
    return numpy.dtype(name)
