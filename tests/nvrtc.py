"""Compile the CUDA kernels for current GPUs on a machine without a GPU: python -m tests.nvrtc prints a table.

NVRTC needs no driver. It is called through CuPy's binding, with the options that CuPy's RawModule adds to ours, and
reports the resources of each kernel: registers, shared memory, and whether registers were spilled or an array was
placed in memory (a stack frame), the most expensive faults that still give correct results.

Needs CuPy, NVRTC and CUDA's headers: pip install -e ".[cuda-check]", or any machine on which the kernels run.
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

ARCHITECTURES = ("80", "90", "100")  # A100, H100 and H200, B200
TYPES = ("bf16", "float")
H200 = Limits(processors=132, shared_memory=227 << 10, capability=9)


def _each(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of values; the first has the sizes of the 124M model."""
    rows: list[dict[str, Any]] = [{}]
    for name, values in choices.items():
        rows = [{**row, name: value} for row in rows for value in values]
    return rows


# The constants that the launchers of each family define, for GPT-2's four sizes and both types. A quick test compiles
# the first row. "kernels" lists the kernels that use these constants, if others in the file have different ones.
WIDTHS = (768, 1024, 1280, 1600)
SIZES: dict[str, list[dict[str, Any]]] = {
    "layernorm": _each(REAL=TYPES, C=WIDTHS),
    "gelu": [{**row, "BIAS": row["REAL"]} for row in _each(REAL=TYPES, C=tuple(4 * width for width in WIDTHS))],
    "columns": _each(REAL=TYPES, C=WIDTHS),
    "attention_forward": _each(D=(64, 80, 128), DROPOUT=(0, 1)),
    "attention_backward": [
        {**sizes, **row, "kernels": kernels}
        for sizes, kernels in (
            ({"D": 64, "STREAM": 64, "OWNED": 64, "CHUNK": 32}, ("attention_backward_kv", "attention_delta")),
            ({"D": 64, "STREAM": 64, "OWNED": 128, "CHUNK": 16}, ("attention_backward_q",)),
            ({"D": 80, "STREAM": 64, "OWNED": 64, "CHUNK": 16}, ("attention_backward_kv", "attention_backward_q")),
            ({"D": 128, "STREAM": 32, "OWNED": 64, "CHUNK": 16}, ("attention_backward_kv", "attention_backward_q")),
        )
        for row in _each(DROPOUT=(0, 1))
    ],
    "attention_cached": _each(REAL=TYPES, D=(64, 80, 128)),
    "cross_entropy": [
        {"REAL": real, "VOCAB": 50257, "COLUMNS": 50304, "THREADS": 1024, "RESIDENT": resident}
        for real, resident in (("bf16", 1), ("bf16", 0), ("float", 0))
    ],
    "embedding": [
        {**row, "WIDTH": 8 if row["REAL"] == "bf16" else 4, "BLOCK_ROWS": 64}
        for row in _each(REAL=TYPES, C=WIDTHS, POSITIONS=(1, 0))
    ],
    "decode": [  # of 132 processors, 15 clusters of 8 run at once
        {"REAL": REAL, **plan.constants(config)}
        for REAL, itemsize in zip(TYPES, (2, 4), strict=True)
        for texts in (1, 4, MAX_TEXTS)
        for config in map(GPT2Config.preset, ("gpt2", "gpt2-xl"))
        if (plan := LaunchPlan.of(config, texts, itemsize, H200, max_clusters=15))
    ],
    "dropout": _each(REAL=TYPES),
    "optimizer": [{}],
}


@dataclass(frozen=True)
class Usage:
    """The resources of a kernel, as reported by ptxas: registers per thread, all others in bytes."""

    name: str
    registers: int
    shared: int
    stack: int
    spilled: int


class CompileError(RuntimeError):
    """NVRTC rejected a source; contains its messages."""


def families() -> dict[str, Path]:
    """The families of kernels, and their sources."""
    files = *cuda.FOLDER.glob("*.cu"), Path(gpt2.__file__).with_name("decode.cu")
    return {file.stem: file for file in sorted(files)}


def compiled(code: str, architecture: str, defines: dict[str, Any]) -> list[Usage]:
    """Compile a source as CuPy would on a GPU with this architecture. Raises CompileError."""
    only = defines.get("kernels")
    with _program(code, f"sm_{architecture}", defines) as (_, log):
        return [use for use in _usages(log) if only is None or use.name in only]


def narrow_loads(code: str, defines: dict[str, Any]) -> dict[str, int]:
    """The number of loads of single 16-bit values in each kernel's PTX.

    They appear if the compiler splits an access of 16 bytes into its elements.
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
    if int(target.split("_")[1]) < 90 and "HARDWARE_CLUSTERS" in defines:
        defines["HARDWARE_CLUSTERS"] = 0
    own = ("-std=c++17", *(f"-D{name}={value}" for name, value in defines.items()))
    # RawModule adds the options of assemble_cupy_compiler_options, and these (cupy/cuda/compiler.py).
    added = ("-ftz=true", f"-arch={target}", "--device-as-default-execution-space")
    program = nvrtc.createProgram(code, "kernels.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*core.assemble_cupy_compiler_options(own), *added, "--ptxas-options=-v"))
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
            raise CompileError(f"unknown output of ptxas: {part}")
        stack, *spills = (sum(map(int, column)) for column in zip(*frames, strict=True))
        yield Usage(name[1], int(used[1]), int(shared[1]) if shared else 0, stack, sum(spills))


def main() -> bool:
    """Print a table of all kernels. Returns whether none of them spills."""
    work = [
        (family, architecture, defines)
        for family in (sys.argv[1:] or families())
        for defines in SIZES[family]
        for architecture in ARCHITECTURES
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
