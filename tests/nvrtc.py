"""Compile the CUDA kernels for current GPUs on a machine without a GPU: python -m tests.nvrtc prints a table.

NVRTC does not need a driver. It is called through CuPy's binding, with our options and those that CuPy's RawModule
adds. It reports each kernel's registers, shared memory, register spills, and stack frame (arrays in local memory).
Spills and stack frames are the most expensive problems that do not affect the results.

Requires CuPy, NVRTC and the CUDA headers: pip install -e ".[cuda-check]", or any machine that can run the kernels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpt2
from gpt2.config import GPT2Config
from gpt2.decode import MAX_TEXTS, LaunchPlan
from tinygrad2.backend import Limits
from tinygrad2.kernels import cuda
from tinygrad2.kernels.cuda import BLOCK_ROWS, AttentionSizes, Multiprocessor, cross_entropy_sizes

# A GPU of each compute capability: the resources of a multiprocessor, and the launch limits.
GPUS = {
    "75": (Multiprocessor(64 << 10, 1024), Limits(40, 63 << 10, 7)),  # T4
    "80": (Multiprocessor(164 << 10, 2048), Limits(108, 163 << 10, 8)),  # A100
    "86": (Multiprocessor(100 << 10, 1536), Limits(82, 99 << 10, 8)),  # RTX 3090
    "89": (Multiprocessor(100 << 10, 1536), Limits(128, 99 << 10, 8)),  # RTX 4090, L4, L40S
    "90": (Multiprocessor(228 << 10, 2048), Limits(132, 227 << 10, 9)),  # H100, H200
    "100": (Multiprocessor(228 << 10, 2048), Limits(148, 227 << 10, 10)),  # B200
    "120": (Multiprocessor(100 << 10, 1536), Limits(170, 99 << 10, 12)),  # RTX 5090
}
FLOAT32_ONLY = ("75",)  # no bfloat16
TYPES = ("bf16", "float")
ITEMSIZE = {"bf16": 2, "float": 4}
WIDTHS = (768, 1024, 1280, 1600)
HEAD_SIZES = (64, 80, 128)  # those of GPT-2, and others
Defines = dict[str, Any]


def _each(**choices: Sequence[Any]) -> list[Defines]:
    """Every combination of the values. The first one has the sizes of the 124M model."""
    rows: list[Defines] = [{}]
    for name, values in choices.items():
        rows = [{**row, name: value} for row in rows for value in values]
    return rows


def sizes(architecture: str) -> dict[str, list[Defines]]:
    """The constants that the launchers of each kernel family define on this GPU, for GPT-2's four sizes and both types.

    A quick test compiles only the first row. If the kernels in a file are launched with different constants, "kernels"
    lists those that use this row.
    """
    processor, limits = GPUS[architecture]
    rows: dict[str, list[Defines]] = {
        "layernorm": _each(REAL=TYPES, C=WIDTHS),
        "gelu": [{**row, "BIAS": row["REAL"]} for row in _each(REAL=TYPES, C=tuple(4 * width for width in WIDTHS))],
        "columns": _each(REAL=TYPES, C=WIDTHS),
        "attention_forward": [
            {"REAL": "bf16", **AttentionSizes.forward(D, processor).constants(D, dropout)}
            for D in HEAD_SIZES
            for dropout in (False, True)
        ],
        "attention_backward": [
            {"REAL": "bf16", **kernel.constants(D, dropout), "kernels": (name, *DELTA.get(name, ()))}
            for D in HEAD_SIZES
            for dropout in (False, True)
            for name, kernel in AttentionSizes.backward(D, processor).items()
        ],
        "attention_cached": _each(REAL=TYPES, D=HEAD_SIZES),
        "cross_entropy": [
            {"REAL": real, "VOCAB": V, "COLUMNS": columns, **cross_entropy_sizes(V, columns, ITEMSIZE[real], processor)}
            for real in TYPES
            for V, columns in ((50257, 50304), (1003, 1024))
        ],
        "embedding": [
            {**row, "WIDTH": 16 // ITEMSIZE[row["REAL"]], "BLOCK_ROWS": BLOCK_ROWS}
            for row in _each(REAL=TYPES, C=WIDTHS, POSITIONS=(1, 0))
        ],
        # 15 clusters of 8 run at once on 132 multiprocessors. Without clusters, GPT-2 XL in float32 spills up to 48
        # bytes for several sequences.
        "decode": [
            {"REAL": real, **plan.constants(config)}
            for real in TYPES
            for texts in (1, 4, MAX_TEXTS)
            for config in map(GPT2Config.preset, ("gpt2", "gpt2-xl"))
            if texts == 1 or real == "bf16" or config.n_layer == 12 or limits.capability >= 9
            if (plan := LaunchPlan.of(config, texts, ITEMSIZE[real], limits, limits.processors // 8 - 1))
        ],
        "dropout": _each(REAL=TYPES),
        "optimizer": [{}],
    }
    narrow = architecture in FLOAT32_ONLY
    return {family: [row for row in rows[family] if not (narrow and row.get("REAL") == "bf16")] for family in rows}


DELTA = {"attention_backward_kv": ("attention_delta",)}  # launched with the same constants


@dataclass(frozen=True)
class Usage:
    """The resources of a kernel, as reported by ptxas: registers per thread, the others in bytes."""

    name: str
    registers: int
    shared: int
    stack: int
    spilled: int


class CompileError(RuntimeError):
    """NVRTC rejected the source. The error contains NVRTC's log."""


def families() -> dict[str, Path]:
    """The source file of each kernel family."""
    files = *cuda.FOLDER.glob("*.cu"), Path(gpt2.__file__).with_name("decode.cu")
    return {file.stem: file for file in sorted(files)}


def compiled(code: str, architecture: str, defines: dict[str, Any]) -> list[Usage]:
    """Compile a source as CuPy would on a GPU with this architecture. Raises CompileError."""
    only = defines.get("kernels")
    with _program(code, f"sm_{architecture}", defines) as (_, log):
        return [use for use in _usages(log) if only is None or use.name in only]


def narrow_loads(code: str, defines: dict[str, Any]) -> dict[str, int]:
    """The number of 16-bit loads in each kernel's PTX.

    They appear if the compiler splits a 16-byte access into its elements.
    """
    kernels = ptx(code, "compute_90", defines).split(".visible .entry ")[1:]
    return {kernel.split("(")[0]: len(re.findall(r"\bld\.global(?:\.nc)?\.[bus]16\b", kernel)) for kernel in kernels}


def ptx(code: str, target: str, defines: dict[str, Any]) -> str:
    """The PTX for a virtual architecture such as compute_90. Raises CompileError."""
    from cupy_backends.cuda.libs import nvrtc

    with _program(code, target, defines) as (program, _):
        text = nvrtc.getPTX(program)
    return text.decode() if isinstance(text, bytes) else text


@contextmanager
def _program(code: str, target: str, defines: dict[str, Any]) -> Iterator[tuple[Any, str]]:
    """Compile a source for a real or virtual architecture with CuPy's options. Yields the program and the log."""
    from cupy._core import core
    from cupy_backends.cuda.libs import nvrtc

    defines = {name: value for name, value in defines.items() if name != "kernels"}
    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in defines.items()))
    # RawModule adds the options of assemble_cupy_compiler_options, and these (cupy/cuda/compiler.py).
    added = ("-ftz=true", f"-arch={target}", "--device-as-default-execution-space")
    program = nvrtc.createProgram(code, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*core.assemble_cupy_compiler_options(options), *added, "--ptxas-options=-v"))
        yield program, nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise CompileError(f"{target} {defines}: {error}\n{nvrtc.getProgramLog(program)}") from None
    finally:
        nvrtc.destroyProgram(program)


def _usages(log: str) -> Iterator[Usage]:
    """The kernels in a log of ptxas -v."""
    for part in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        # Functions that were not inlined have their own stack frames.
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if name is None or used is None or not frames:
            raise CompileError(f"unexpected output of ptxas: {part}")
        stack, *spills = (sum(map(int, column)) for column in zip(*frames, strict=True))
        yield Usage(name[1], int(used[1]), int(shared[1]) if shared else 0, stack, sum(spills))


def main() -> bool:
    """Print a table of all kernels. Returns whether all of them avoid spills."""
    work = [
        (family, architecture, defines)
        for family in (sys.argv[1:] or families())
        for architecture in GPUS
        for defines in sizes(architecture)[family]
    ]
    good = True
    compiled("", "90", {})  # NVRTC 13.0 loads its own library on the first compilation, which is not thread-safe
    with ThreadPoolExecutor() as pool:
        results = [pool.submit(compiled, cuda.source(families()[family]), *rest) for family, *rest in work]
        for (family, architecture, defines), result in zip(work, results, strict=True):
            constants = " ".join(f"{name}={value}" for name, value in defines.items() if name != "kernels")
            try:
                usages = result.result()
            except CompileError as error:
                print(f"{family} {error}")
                good = False
                continue
            for use in usages:
                print(
                    f"{family:20} {use.name:32} sm_{architecture:4} {constants:22} {use.registers:4} registers "
                    f"{use.shared:6} B shared  {use.stack:5} B stack {use.spilled:5} B spilled"
                )
                good = good and not (use.stack or use.spilled)
    return good


if __name__ == "__main__":
    sys.exit(not main())
