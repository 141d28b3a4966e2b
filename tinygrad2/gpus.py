"""Peak rates of GPUs from NVIDIA's data sheets, by the name that the driver reports."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Peak TFLOP/s of dense matrix products (half of the figures with sparsity), with float32 accumulation. GPUs before
# Ampere support neither TF32 nor bfloat16.
PEAK_TFLOPS = {
    "B200": {"float32": 75.0, "tf32": 1125.0, "bfloat16": 2250.0},
    "H200 NVL": {"float32": 60.0, "tf32": 417.5, "bfloat16": 835.5},
    "H200": {"float32": 67.0, "tf32": 494.5, "bfloat16": 989.0},
    "H100 NVL": {"float32": 60.0, "tf32": 417.5, "bfloat16": 835.5},
    "H100 PCIe": {"float32": 51.0, "tf32": 378.0, "bfloat16": 756.0},
    "H100": {"float32": 67.0, "tf32": 494.5, "bfloat16": 989.0},
    "A100": {"float32": 19.5, "tf32": 156.0, "bfloat16": 312.0},
    "A40": {"float32": 37.4, "tf32": 74.8, "bfloat16": 149.7},
    "A30": {"float32": 10.3, "tf32": 82.0, "bfloat16": 165.0},
    "A10": {"float32": 31.2, "tf32": 62.5, "bfloat16": 125.0},
    "L40S": {"float32": 91.6, "tf32": 183.0, "bfloat16": 362.0},
    "L40": {"float32": 90.5, "tf32": 90.5, "bfloat16": 181.0},
    "L4": {"float32": 30.3, "tf32": 60.0, "bfloat16": 121.0},
    "T4": {"float32": 8.1},
    "RTX 6000 Ada": {"float32": 91.1, "tf32": 182.1, "bfloat16": 364.2},
    "RTX A6000": {"float32": 38.7, "tf32": 77.4, "bfloat16": 154.8},
    "RTX 5090": {"float32": 104.8, "tf32": 104.8, "bfloat16": 209.5},
    "RTX 4090": {"float32": 82.6, "tf32": 82.6, "bfloat16": 165.2},
    "RTX 3090": {"float32": 35.6, "tf32": 35.6, "bfloat16": 71.0},
}
# Memory bandwidth in GB/s. If there are several variants of a GPU, the first entry that matches is used.
BANDWIDTH = {
    "B200": 8000.0,
    "H200 NVL": 4800.0,
    "H200": 4800.0,
    "H100 NVL": 3900.0,
    "H100 PCIe": 2000.0,
    "H100": 3350.0,
    "A100 .*40GB": 1555.0,
    "A100 80GB PCIe": 1935.0,
    "A100": 2039.0,
    "A40": 696.0,
    "A30": 933.0,
    "A10": 600.0,
    "L40S": 864.0,
    "L40": 864.0,
    "L4": 300.0,
    "T4": 320.0,
    "RTX 6000 Ada": 960.0,
    "RTX A6000": 768.0,
    "RTX 5090": 1792.0,
    "RTX 4090": 1008.0,
    "RTX 3090": 936.0,
}
# Words that mark a variant of a GPU with a different speed.
VARIANT = r"\b(MIG|NVL|Laptop|Max|D|Ti|SUPER)\b"


def find_gpu(name: str, table: Iterable[str]) -> str | None:
    """The first entry of `table` (regular expressions) that matches a GPU of this name, or None."""
    spaced = name.replace("-", " ")
    variant = set(re.findall(VARIANT, spaced))
    return next((gpu for gpu in table if re.search(rf"\b{gpu}\b", spaced) and variant <= set(gpu.split())), None)


def peak_tflops(name: str, precision: str) -> float | None:
    """The peak TFLOP/s of a GPU of this name in a precision (see precision.py), or None if unknown."""
    gpu = find_gpu(name, PEAK_TFLOPS)
    return None if gpu is None else PEAK_TFLOPS[gpu].get(precision)


def bandwidth(name: str) -> float | None:
    """The memory bandwidth in GB/s of a GPU of this name, or None if unknown."""
    gpu = find_gpu(name, BANDWIDTH)
    return None if gpu is None else BANDWIDTH[gpu]
