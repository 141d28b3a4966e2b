"""Peak rates of GPUs, from NVIDIA's data sheets, by the name that the driver reports."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Peak TFLOP/s of dense products (half of the figures with sparsity), summed in float32.
PEAK_TFLOPS = {
    "B200": {"float32": 75.0, "tf32": 1125.0, "bfloat16": 2250.0},
    "H200": {"float32": 67.0, "tf32": 494.5, "bfloat16": 989.0},
    "H100 PCIe": {"float32": 51.0, "tf32": 378.0, "bfloat16": 756.0},
    "H100": {"float32": 67.0, "tf32": 494.5, "bfloat16": 989.0},
    "A100": {"float32": 19.5, "tf32": 156.0, "bfloat16": 312.0},
    "L40S": {"float32": 91.6, "tf32": 183.0, "bfloat16": 362.0},
    "L4": {"float32": 30.3, "tf32": 60.0, "bfloat16": 121.0},
    "RTX 4090": {"float32": 82.6, "tf32": 82.6, "bfloat16": 165.0},
}
SLOWER_VARIANT = (
    r"\b(MIG|NVL|Laptop|D)\b"  # in the name of a GPU that is slower than the model with the rest of the name
)


def find_gpu(name: str, table: Iterable[str]) -> str | None:
    """The entry of `table` (each a regular expression) that a GPU of this name matches, or None."""
    spaced = name.replace("-", " ")
    if re.search(SLOWER_VARIANT, spaced):
        return None
    return next((gpu for gpu in table if re.search(rf"\b{gpu}\b", spaced)), None)


def peak_tflops(name: str, precision: str) -> float | None:
    """The peak of a GPU of this name in a precision (see precision.py), or None if unknown."""
    gpu = find_gpu(name, PEAK_TFLOPS)
    return None if gpu is None else PEAK_TFLOPS[gpu].get(precision)
