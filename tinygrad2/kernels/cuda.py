"""Launchers of the kernels for NVIDIA GPUs. There is one CUDA C++ file per group of operations, next to this file.

Names and signatures are as in reference.py. Activations and weights are float32 or bfloat16; statistics, sums and
parameter gradients are float32. The decorator `only_if` states which arguments a kernel supports. Other arguments, such
as float64 arrays, are passed to the function of the same name in reference.py, on CuPy. No kernel uses atomic addition,
so two runs are bitwise identical.

CuPy compiles the sources on first use (with NVRTC, cached on disk) for specific shapes: sizes such as C or the head
size are compile-time constants (-DC=768).
"""

from __future__ import annotations

import copy
import ctypes
import functools
import math
import re
import sys
import threading
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from ml_dtypes import bfloat16
from numpy.typing import DTypeLike

from tinygrad2.array import Array
from tinygrad2.kernels.gemm import Gemm
from tinygrad2.kernels.token_runs import sort_tokens
from tinygrad2.random import Key

# The dtypes that the kernels support, and their CUDA C++ names. (The keys are not names, since dtype.name is slow.)
CPP_TYPES = {numpy.dtype(numpy.float32): "float", numpy.dtype(bfloat16): "bf16"}
KEY_STRUCT = numpy.dtype([(word, "u4") for word in ("seed_low", "seed_high", "site", "step")])  # PhiloxKey
FOLDER = Path(__file__).parent
Kernel = Callable[..., None]  # called with a grid, a block, arguments, and shared_mem=bytes
Defines = dict[str, Any]  # compile-time constants of a kernel
Arrays = tuple[Array, ...]
DropoutArguments = tuple[Any, numpy.uint64, numpy.uint32, numpy.float32]
BLOCK_ROWS = 64  # number of sorted rows of dy that one block of embedding_backward sums
VOCABULARY_MULTIPLE = 64  # the embeddings are padded with zero rows so that the logits have a multiple of 64 columns
BLOCK_OVERHEAD = 2 << 10  # bytes of non-dynamic shared memory per block: 1 KB for CUDA, and static arrays


def source(family: str | Path) -> str:
    """The CUDA C++ source of a family of kernels (its file in this folder), or of another file. Headers from this
    folder are inlined, since CuPy's cache does not notice changes in included files."""
    file = family if isinstance(family, Path) else FOLDER / f"{family}.cu"

    def paste(match: re.Match) -> str:
        return (FOLDER / match[1]).read_text(encoding="utf-8")

    return re.sub(r'^#include "(\w+\.cuh)"$', paste, file.read_text(encoding="utf-8"), flags=re.M)


class Multiprocessor(NamedTuple):
    """The resources shared by the blocks on a multiprocessor: bytes of shared memory (one block can use all but 1 KB)
    and threads. Kernels are sized so that two blocks fit, since one can compute while the threads of the other wait."""

    shared_memory: int
    threads: int

    def runs_two(self, shared: int) -> bool:
        """Whether two blocks fit, each with this number of bytes of dynamic shared memory."""
        return 2 * (shared + BLOCK_OVERHEAD) <= self.shared_memory

    def largest_tile(self, rows: Iterable[int], shared: Callable[[int], int]) -> int:
        """The first of the candidate tile heights `rows`, in descending order, with which two blocks fit; if none does,
        the first candidate. `shared` maps a number of rows to bytes of dynamic shared memory."""
        rows = list(rows)
        return next((n for n in rows if self.runs_two(shared(n))), rows[0])


class AttentionSizes(NamedTuple):
    """The sizes of an attention kernel, which are compile-time constants.

    owned   queries (or keys) that a block owns.
    stream  rows per streamed tile.
    chunk   rows of a tile that a warp processes at a time.
    shared  bytes of dynamic shared memory.
    """

    owned: int
    stream: int
    chunk: int
    shared: int

    def constants(self, D: int, dropout: bool) -> Defines:
        """The constants that the source is compiled with."""
        return {"D": D, "OWNED": self.owned, "STREAM": self.stream, "CHUNK": self.chunk, "DROPOUT": int(dropout)}

    @staticmethod
    def forward(D: int, processor: Multiprocessor) -> AttentionSizes:
        owned = 128 if D <= 64 else 64

        def shared(stream: int) -> int:  # the queries, and two tiles of keys and of values
            return (owned + 4 * stream) * (D + 8) * 2

        stream = processor.largest_tile((64, 32, 16), shared)
        return AttentionSizes(owned, stream, stream, shared(stream))

    @staticmethod
    def backward(D: int, processor: Multiprocessor) -> dict[str, AttentionSizes]:
        """The sizes for each of the two kernels of the backward pass."""
        chunk = 32 if D <= 64 else 16  # limited by registers
        # Two 16-row tiles per warp halve the reads from shared memory. For D > 64 they would not fit in the registers.
        sizes = {"attention_backward_kv": (64, chunk), "attention_backward_q": (128, 16) if D == 64 else (64, chunk)}

        def of(owned: int, chunk: int) -> AttentionSizes:
            def shared(stream: int) -> int:
                # Two owned tiles, and two stages of two streamed tiles with two statistics per row.
                return (2 * owned + 4 * stream) * (D + 8) * 2 + 4 * stream * 4

            streams = (64, 32, 16) if D < 128 else (32, 16)  # limited by registers
            stream = processor.largest_tile((rows for rows in streams if rows >= chunk), shared)
            return AttentionSizes(owned, stream, chunk, shared(stream))

        return {name: of(*size) for name, size in sizes.items()}


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig from cuda.h: the grid, the block, bytes of shared memory, a stream, and attributes."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint)),
    )


def driver() -> ctypes.CDLL:
    """The NVIDIA driver library."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def ordering_event(cuda: Any, stream: Any = None) -> Any:
    """A CUDA event recorded in a stream, by default the current one. Timing is disabled, since it has a cost.

    cuda  the module cupy.cuda, or a stand-in.
    """
    event = cuda.Event(disable_timing=True)
    event.record(stream)
    return event


def only_if(supported: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that calls the launcher if `supported` returns true for the same arguments, and otherwise the
    reference function of the same name."""

    def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
        name = launcher.__name__

        @functools.wraps(launcher)
        def call(self: CudaKernels, *arguments: Any) -> Any:
            if supported(*arguments):
                return launcher(self, *arguments)
            return getattr(self._reference, name)(*arguments)

        return call

    return decorate


def cpp_type(dtype: DTypeLike) -> str | None:
    """The CUDA C++ name of a dtype, or None if the kernels do not support it."""
    return CPP_TYPES.get(numpy.dtype(dtype))


def tensor_cores_support(head_size: int) -> bool:
    """Whether attention with this head size can use tensor cores."""
    return head_size % 16 == 0 and head_size <= 128


def _supported_dtypes(*arrays: Array) -> bool:
    """Whether the kernels support the dtypes of all these arrays."""
    return all(x.dtype in CPP_TYPES for x in arrays)


def _same_supported_dtype(*arrays: Array) -> bool:
    """Whether these arrays have the same dtype, and the kernels support it."""
    return arrays[0].dtype in CPP_TYPES and all(x.dtype == arrays[0].dtype for x in arrays)


def _on_tensor_cores(qkv: Array, n_head: int) -> bool:
    return qkv.dtype == bfloat16 and tensor_cores_support(qkv.shape[-1] // (3 * n_head))


class CudaKernels:
    """The kernels for one array library (CuPy, or a stand-in in the tests).

    np         the array library.
    reference  the functions of reference.py with that library, for arguments that no kernel supports.
    """

    def __init__(self, np: Any, reference: Any):
        self._np = np
        self._reference = reference
        self._functions: dict[tuple[Hashable, ...], Kernel] = {}
        self._alone = threading.Lock()  # used by launch_alone
        self._last_stream: Any = None
        self.gemm: Callable[..., Array] = Gemm(np)

    def in_tf32(self, reference: Any) -> CudaKernels:
        """The same launchers with float32 matrix products in TF32.

        reference  the functions of reference.py with TF32 products.
        """
        other = copy.copy(self)
        other._reference, other.gemm = reference, functools.partial(self.gemm, tf32=True)
        return other

    def function(
        self, family: str | Path, name: str, *, shared: int = 0, cooperative: bool = False, **defines: Any
    ) -> Kernel:
        """A kernel, compiled with these constants on first use.

        shared       bytes of dynamic shared memory per launch, if the constants determine them.
        cooperative  enable cooperative launches, in which all blocks run at the same time.
        """
        key = (family, name, *defines.items())
        if key not in self._functions:
            options = ("-std=c++17", *(f"-D{constant}={value}" for constant, value in defines.items()))
            module = self._np.RawModule(code=source(family), options=options, enable_cooperative_groups=cooperative)
            function = module.get_function(name)
            if shared > 40 << 10:  # more than 48 KB, including static shared memory, must be requested
                function.max_dynamic_shared_size_bytes = shared
                function.preferred_shared_memory_carveout = 100  # percent; the rest is L1 cache
            self._functions[key] = function
        return self._functions[key]

    def launch_alone(self, function: Kernel, blocks: int, threads: int, arguments: Any, shared: int) -> None:
        """Launch a cooperative kernel after the previous one has finished, even if they are in different streams.
        Raises ValueError if the blocks cannot all run at the same time; CuPy would only warn, and launch fewer."""
        most = self.blocks_at_once(function, threads, shared)
        if blocks > most:
            raise ValueError(f"cannot launch {blocks} cooperative blocks; this GPU can run {most} at the same time")
        with self._alone:
            stream = self._np.cuda.get_current_stream()
            if self._last_stream not in (None, stream):
                stream.wait_event(ordering_event(self._np.cuda, self._last_stream))
            self._last_stream = stream
            function((blocks,), (threads,), arguments, shared_mem=shared)

    def blocks_at_once(self, function: Any, threads: int, shared: int) -> int:
        """The number of blocks of a kernel that can run concurrently."""
        each = self._np.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(function.kernel.ptr, threads, shared)
        return each * self.properties["multiProcessorCount"]

    def clusters_at_once(self, function: Any, blocks: int, threads: int, shared: int) -> int:
        """The number of thread block clusters of a kernel that can run concurrently. `blocks`, the size of the grid,
        must be a multiple of the cluster size. CuPy has no binding for this driver function."""
        count, config = ctypes.c_int(), LaunchConfig(blocks, 1, 1, threads, 1, 1, shared)
        status = driver().cuOccupancyMaxActiveClusters(
            ctypes.byref(count), ctypes.c_void_p(function.kernel.ptr), ctypes.byref(config)
        )
        if status:
            raise RuntimeError(f"cuOccupancyMaxActiveClusters: driver error {status}")
        return count.value

    @functools.cached_property
    def properties(self) -> dict[str, Any]:
        """cudaDeviceProp of the GPU."""
        runtime = self._np.cuda.runtime
        return runtime.getDeviceProperties(runtime.getDevice())

    @functools.cached_property
    def processor(self) -> Multiprocessor:
        """The limits of a multiprocessor of the GPU."""
        return Multiprocessor(
            self.properties["sharedMemPerMultiprocessor"], self.properties["maxThreadsPerMultiProcessor"]
        )

    def _packed(self, x: Array) -> Array:
        """x, or a copy of it if x is not contiguous and aligned to 16 bytes, which the kernels require."""
        x = self._np.ascontiguousarray(x)
        return x.copy() if x.data.ptr % 16 else x

    # Matrix products --------------------------------------------------------------------------------------------------

    @only_if(lambda x, weight, bias: _supported_dtypes(x, weight) and x.size)
    def linear_forward(self, x: Array, weight: Array, bias: Array | None) -> Array:
        weight = weight.astype(x.dtype, copy=False)
        bias = None if bias is None else bias.astype(x.dtype, copy=False)
        return self.gemm(x.reshape(-1, x.shape[-1]), weight, bias=bias).reshape(*x.shape[:-1], weight.shape[1])

    @only_if(lambda dy, x, weight, dweight, dbias: _supported_dtypes(dy, x, weight) and dy.size)
    def linear_backward(self, dy: Array, x: Array, weight: Array, dweight: Array | None, dbias: Array | None) -> Array:
        dy2 = dy.reshape(-1, dy.shape[-1])
        if dweight is not None:
            x2 = x.reshape(-1, x.shape[-1]).astype(dy.dtype, copy=False)
            self.gemm(x2, dy2, dweight, transpose_a=True, accumulate=True)
        if dbias is not None:
            self.column_sums(dy2, dbias)
        return self.gemm(dy2, weight.astype(dy.dtype, copy=False), transpose_b=True).reshape(x.shape)

    # Sums of columns --------------------------------------------------------------------------------------------------

    def column_sums(self, rows: Array, into: Array) -> None:
        """into += the column sums of a matrix (N, C), added in a fixed order. `into` is (C,), float32."""
        np = self._np
        rows = self._packed(rows)
        grid, count = _column_grid(rows)
        partials = np.empty((1, grid[1], rows.shape[-1]), dtype=np.float32)
        function = self.function("columns", "column_sums", REAL=CPP_TYPES[rows.dtype], C=rows.shape[-1])
        function(grid, (THREADS,), (partials, rows, count))
        self.add_partials(partials, into)

    def add_partials(self, partials: Array, *targets: Array | None) -> None:
        """Add partials (targets, parts, C), summed over the parts, to the targets, each (C,)."""
        wanted = [i for i, target in enumerate(targets) if target is not None]
        if not wanted:
            return
        parts, C = partials.shape[1:]
        function = self.function("columns", "add_partials", REAL="float", C=C)
        first, last = wanted[0], wanted[-1]
        arguments = (targets[first], targets[last], partials[first : last + 1], numpy.int32(parts))
        function((-(-C // 32), len(wanted)), (1024,), arguments)

    # Embedding --------------------------------------------------------------------------------------------------------

    def _access(self, C: int, *arrays: Array) -> int:
        """The number of elements of the first array per access: 16 bytes if all rows are aligned, otherwise 1 element.
        (A parameter may start at any address in the arena.)
        """
        count = 16 // arrays[0].dtype.itemsize
        return 1 if C % count or any(array.data.ptr % 16 for array in arrays) else count

    @only_if(lambda tokens, wte, wpe, first_position: _supported_dtypes(wte))
    def embedding_forward(self, tokens: Array, wte: Array, wpe: Array | None, first_position: int) -> Array:
        np, C, T = self._np, wte.shape[1], tokens.shape[-1] if tokens.ndim else 1
        y = np.empty((*tokens.shape, C), dtype=wte.dtype)
        tokens, wte = np.ascontiguousarray(tokens), np.ascontiguousarray(wte)
        positions = wte if wpe is None else np.ascontiguousarray(wpe.astype(wte.dtype, copy=False))
        width = self._access(C, wte, positions)
        defines: Defines = {"REAL": CPP_TYPES[wte.dtype], "C": C, "WIDTH": width, "BLOCK_ROWS": BLOCK_ROWS}
        kernel = self.function("embedding", "embedding_forward", **defines, POSITIONS=int(wpe is not None))
        numbers = numpy.int32(tokens.size), numpy.int32(T), numpy.int32(first_position)
        kernel((-(-tokens.size * (C // width) // 256),), (256,), (y, wte, positions, tokens, *numbers))
        return y

    @only_if(lambda dy, tokens, first_position, dwte, dwpe: _supported_dtypes(dy))
    def embedding_backward(
        self, dy: Array, tokens: numpy.ndarray, first_position: int, dwte: Array | None, dwpe: Array | None
    ) -> None:
        C, rows = dy.shape[-1], dy.size // dy.shape[-1]
        dy = self._np.ascontiguousarray(dy)
        width = self._access(C, dy, *(array for array in (dwte, dwpe) if array is not None))
        defines: Defines = {"REAL": CPP_TYPES[dy.dtype], "C": C, "WIDTH": width, "POSITIONS": 0}
        threads = min(256, -(-C // width // 32) * 32)
        columns = -(-C // width // threads)

        def launch(name: str, blocks: int, *arguments: Any) -> None:
            kernel = self.function("embedding", name, **defines, BLOCK_ROWS=BLOCK_ROWS)
            kernel((blocks, columns), (threads,), arguments)

        if dwte is not None:
            chunks = -(-rows // BLOCK_ROWS)
            partial = self._np.empty((chunks, 2, C), dtype=numpy.float32)
            order, ordered = self._np.asarray(numpy.stack(sort_tokens(tokens)))  # does not wait for the device
            where = ordered, numpy.int32(rows)
            launch("embedding_backward", chunks, dwte, partial, dy, order, *where)
            if chunks > 1:
                launch("embedding_backward_long", chunks - 1, dwte, partial, *where)
        if dwpe is not None:
            T = dy.shape[-2]
            numbers = numpy.int32(rows // T), numpy.int32(T), numpy.int32(first_position)
            launch("embedding_backward_positions", T, dwpe, dy, *numbers)
        return

    # Dropout ----------------------------------------------------------------------------------------------------------

    @only_if(lambda x, rate, key: _supported_dtypes(x))
    def dropout_forward(self, x: Array, rate: float, key: Key) -> Array:
        x = self._np.ascontiguousarray(x)
        y = self._np.empty(x.shape, dtype=x.dtype)
        first = numpy.uint64(key.first_sample * (x.size // x.shape[0]))
        numbers = (
            numpy.int64(x.size),
            _philox_key(key),
            numpy.uint64(round(rate * 2**32)),
            numpy.float32(1 / (1 - rate)),
        )
        kernel = self.function("dropout", "dropout", REAL=CPP_TYPES[x.dtype])
        kernel((-(-x.size // 2048),), (256,), (x, y, first, *numbers))
        return y

    def dropout_backward(self, dy: Array, rate: float, key: Key) -> Array:
        return self.dropout_forward(dy, rate, key)

    # LayerNorm --------------------------------------------------------------------------------------------------------

    @only_if(lambda x, weight, bias, eps: _supported_dtypes(x))
    def layernorm_forward(self, x: Array, weight: Array, bias: Array, eps: float) -> Arrays:
        return self._layernorm_forward("layernorm_forward", (x,), weight, bias, eps)

    @only_if(lambda x, delta, weight, bias, eps: _same_supported_dtype(x, delta))
    def add_layernorm_forward(self, x: Array, delta: Array, weight: Array, bias: Array, eps: float) -> Arrays:
        return self._layernorm_forward("add_layernorm_forward", (x, delta), weight, bias, eps)

    @only_if(lambda dy, x, *_: _same_supported_dtype(dy, x))
    def layernorm_backward(
        self, dy: Array, x: Array, weight: Array, mean: Array, rstd: Array, dweight: Array | None, dbias: Array | None
    ) -> Array:
        return self._layernorm_backward("layernorm_backward", (dy, x), weight, mean, rstd, dweight, dbias)

    @only_if(lambda ds, dy, s, *_: _same_supported_dtype(ds, dy, s))
    def add_layernorm_backward(
        self,
        ds: Array,
        dy: Array,
        s: Array,
        weight: Array,
        mean: Array,
        rstd: Array,
        dweight: Array | None,
        dbias: Array | None,
    ) -> Array:
        return self._layernorm_backward("add_layernorm_backward", (ds, dy, s), weight, mean, rstd, dweight, dbias)

    def _layernorm_forward(self, name: str, inputs: Arrays, weight: Array, bias: Array, eps: float) -> Arrays:
        np, x = self._np, inputs[0]
        C = x.shape[-1]
        rows = x.size // C
        results = [np.empty(x.shape, dtype=x.dtype) for _ in inputs]  # y, or s and y
        mean, rstd = (np.empty((*x.shape[:-1], 1), dtype=np.float32) for _ in range(2))
        arrays = [*map(self._packed, inputs), self._float32(weight), self._float32(bias)]
        function = self.function("layernorm", name, shared=8 * C, REAL=CPP_TYPES[x.dtype], C=C)
        blocks = _blocks(rows, _rows_of_a_block(C), 4 if x.dtype.itemsize == 2 else 3)
        arguments = (*results, mean, rstd, *arrays, numpy.int32(rows), numpy.float32(eps))
        function((blocks,), (THREADS,), arguments, shared_mem=8 * C)
        return *results, mean, rstd

    def _layernorm_backward(
        self,
        name: str,
        inputs: Arrays,
        weight: Array,
        mean: Array,
        rstd: Array,
        dweight: Array | None,
        dbias: Array | None,
    ) -> Array:
        np, x = self._np, inputs[-1]
        C = x.shape[-1]
        rows = x.size // C
        blocks = _blocks(rows, _rows_of_a_block(C), 2)
        dx, partials = np.empty(x.shape, dtype=x.dtype), np.empty((2, blocks, C), dtype=np.float32)
        arrays = [*map(self._packed, inputs), *map(self._float32, (weight, mean, rstd))]
        lanes, pack = THREADS // _rows_of_a_block(C), 16 // x.dtype.itemsize
        shared = 4 * C  # for the weight
        if len(inputs) > 2 and C % pack == 0:
            shared += -(-C // (lanes * pack)) * THREADS * 16  # for ds, in accesses of 16 bytes
        function = self.function("layernorm", name, shared=shared, REAL=CPP_TYPES[x.dtype], C=C)
        function((blocks,), (THREADS,), (dx, partials, *arrays, numpy.int32(rows)), shared_mem=shared)
        self.add_partials(partials, dweight, dbias)
        return dx

    def _float32(self, x: Array) -> Array:
        return self._np.ascontiguousarray(x.astype(numpy.float32, copy=False))

    # Attention --------------------------------------------------------------------------------------------------------

    @only_if(lambda qkv, n_head, rate, key: _on_tensor_cores(qkv, n_head))
    def attention_forward(self, qkv: Array, n_head: int, rate: float, key: Key | None) -> tuple[Array, Array]:
        """Attention on tensor cores, in bfloat16; lse is float32."""
        B, T, width = qkv.shape
        D = width // (3 * n_head)
        out = self._np.empty((B, T, width // 3), dtype=qkv.dtype)
        lse = self._np.empty((B, n_head, T), dtype=numpy.float32)
        sizes = AttentionSizes.forward(D, self.processor)
        constants = sizes.constants(D, key is not None)
        kernel = self.function("attention_forward", "attention_forward", shared=sizes.shared, **constants)
        arrays = out, lse, self._np.ascontiguousarray(qkv)
        scale = numpy.float32(math.log2(math.e) / math.sqrt(D))
        dropout = self._attention_dropout(rate, key)
        kernel(
            (B * n_head * -(-T // sizes.owned),),
            (128,),
            (*arrays, numpy.int32(T), numpy.int32(n_head), scale, *dropout),
            shared_mem=sizes.shared,
        )
        return out, lse

    @only_if(lambda qkv, cache, length, n_head: _same_supported_dtype(qkv, cache) and cache.flags.c_contiguous)
    def attention_cached(self, qkv: Array, cache: Array, length: int, n_head: int) -> Array:
        """Attention of one new token, limited by the time to read the cache. bfloat16 prompts use attention_forward."""
        B, T, width = qkv.shape
        D = width // (3 * n_head)
        qkv, capacity = self._np.ascontiguousarray(qkv), cache.shape[3]
        defines: Defines = {"D": D, "REAL": CPP_TYPES[qkv.dtype]}
        sizes = [numpy.int32(n) for n in (T, n_head, length, capacity)]
        if length == 0 and T > 1 and _on_tensor_cores(qkv, n_head):
            fill = self.function("attention_cached", "fill_cache", **defines)
            fill((B * T,), (256,), (cache, qkv, numpy.int32(B), *sizes))
            return self.attention_forward(qkv, n_head, 0.0, None)[0]
        out = self._np.empty((B, T, width // 3), dtype=qkv.dtype)
        kernel = self.function("attention_cached", "attention_cached", **defines)
        scale = numpy.float32(math.log2(math.e) / math.sqrt(D))
        kernel((B * n_head, T), (256,), (out, cache, qkv, *sizes, scale))
        return out

    @staticmethod
    def _attention_dropout(rate: float, key: Key | None) -> DropoutArguments:
        """The dropout arguments of a kernel: the key, the first sample, the threshold and the scale."""
        if key is None:
            return numpy.zeros((), dtype=KEY_STRUCT)[()], numpy.uint64(0), numpy.uint32(0), numpy.float32(1)
        threshold, scale = numpy.uint32(min(round(rate * 2**32), 2**32 - 1)), numpy.float32(1 / (1 - rate))
        return _philox_key(key), numpy.uint64(key.first_sample), threshold, scale

    @only_if(lambda dout, qkv, out, lse, n_head, rate, key: _on_tensor_cores(qkv, n_head))
    def attention_backward(
        self, dout: Array, qkv: Array, out: Array, lse: Array, n_head: int, rate: float, key: Key | None
    ) -> Array:
        """Compute dqkv on tensor cores, in bfloat16: one kernel for queries, and one for keys and values; no atomics.

        The error is below that of bfloat16 for scores up to 2^15 (see attention_backward.cu).
        """
        B, T, width = qkv.shape
        D = width // (3 * n_head)
        dout, qkv, out, lse = (self._np.ascontiguousarray(x) for x in (dout, qkv, out, lse))
        delta = self._np.empty((B, n_head, T), dtype=numpy.float32)
        dqkv = self._np.empty(qkv.shape, dtype=qkv.dtype)
        dims, rows = (numpy.int32(T), numpy.int32(n_head)), B * T * n_head
        scale, dropout = numpy.float32(1 / math.sqrt(D)), self._attention_dropout(rate, key)
        sizes_of = AttentionSizes.backward(D, self.processor)
        constants = sizes_of["attention_backward_kv"].constants(D, key is not None)  # one compilation for both
        row_sums = self.function("attention_backward", "attention_delta", **constants)
        row_sums((-(-rows // 32),), (256,), (delta, dout, out, *dims, numpy.int32(rows)))
        for name, sizes in sizes_of.items():
            constants = sizes.constants(D, key is not None)
            kernel = self.function("attention_backward", name, shared=sizes.shared, **constants)
            kernel(
                (B * n_head * -(-T // sizes.owned),),
                (128,),
                (dqkv, dout, qkv, lse, delta, *dims, scale, *dropout),
                shared_mem=sizes.shared,
            )
        return dqkv

    # GELU -------------------------------------------------------------------------------------------------------------

    @only_if(lambda x, bias: _supported_dtypes(x))
    def gelu_forward(self, x: Array, bias: Array | None) -> Array:
        return self._gelu_forward("gelu_forward", x, bias)

    @only_if(lambda dy, x, bias, dbias: _same_supported_dtype(dy, x))
    def gelu_backward(self, dy: Array, x: Array, bias: Array | None, dbias: Array | None) -> Array:
        return self._gelu_backward("gelu_backward", dy, x, bias, dbias)

    @only_if(lambda x, bias: _supported_dtypes(x))
    def gelu_exact_forward(self, x: Array, bias: Array | None) -> Array:
        return self._gelu_forward("gelu_exact_forward", x, bias)

    @only_if(lambda dy, x, bias, dbias: _same_supported_dtype(dy, x))
    def gelu_exact_backward(self, dy: Array, x: Array, bias: Array | None, dbias: Array | None) -> Array:
        return self._gelu_backward("gelu_exact_backward", dy, x, bias, dbias)

    def _gelu_forward(self, name: str, x: Array, bias: Array | None) -> Array:
        np = self._np
        y, x = np.empty(x.shape, dtype=x.dtype), self._packed(x)
        grid, rows = _column_grid(x)
        self._gelu(name, x, bias)(grid, (THREADS,), (y, x, self._gelu_bias(x, bias), rows))
        return y

    def _gelu_backward(self, name: str, dy: Array, x: Array, bias: Array | None, dbias: Array | None) -> Array:
        np = self._np
        dx, dy, x = np.empty(x.shape, dtype=x.dtype), self._packed(dy), self._packed(x)
        grid, rows = _column_grid(x)
        partials = np.empty((1, grid[1], x.shape[-1]), dtype=np.float32)
        arguments = (dx, partials, dy, x, self._gelu_bias(x, bias), rows)
        self._gelu(name, x, bias)(grid, (THREADS,), arguments)
        self.add_partials(partials, dbias)
        return dx

    def _gelu(self, name: str, x: Array, bias: Array | None) -> Kernel:
        types: Defines = {} if bias is None else {"BIAS": CPP_TYPES[bias.dtype]}
        return self.function("gelu", name, REAL=CPP_TYPES[x.dtype], C=x.shape[-1], **types)

    def _gelu_bias(self, x: Array, bias: Array | None) -> Array:
        return x if bias is None else self._np.ascontiguousarray(bias)  # without a bias, the pointer is not read

    # Cross-entropy, and the language-model head -----------------------------------------------------------------------

    def cross_entropy_forward(self, logits: Array, targets: Array) -> tuple[Array, Array]:
        return self._reference.cross_entropy_forward(self._widened(logits), targets)

    def cross_entropy_backward(self, dloss: Array, logits: Array, targets: Array, log_total: Array) -> Array:
        dlogits = self._reference.cross_entropy_backward(dloss, self._widened(logits), targets, log_total)
        return dlogits.astype(logits.dtype, copy=False)

    def _widened(self, x: Array) -> Array:
        return x.astype(numpy.float32) if x.dtype == bfloat16 else x

    def _aligned_vocabulary(self, weight: Array, dtype: DTypeLike) -> Array:
        """Pad the embeddings (V, C) with zero rows to a multiple of VOCABULARY_MULTIPLE rows.

        GPT-2's V is 50257. In a matrix with 50257 columns, most rows would not be aligned to 16 bytes, and cuBLAS
        would use its slowest kernels. The copy takes 0.04 ms; the products take 25 ms.
        """
        V, C = weight.shape
        width = -(-V // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        if width == V:
            return self._np.ascontiguousarray(weight.astype(dtype, copy=False))
        aligned = self._np.empty((width, C), dtype=dtype)
        aligned[:V] = weight
        aligned[V:] = 0
        return aligned

    @only_if(lambda x, weight, targets: _supported_dtypes(x))
    def lm_head_forward(self, x: Array, weight: Array, targets: Array) -> tuple[Array, Array]:
        np, (V, C) = self._np, weight.shape
        rows = np.ascontiguousarray(x.reshape(-1, C))
        aligned = self._aligned_vocabulary(weight, x.dtype)
        logits = np.empty((len(rows), len(aligned)), dtype=x.dtype)
        self.gemm(rows, aligned, logits, transpose_b=True)

        sizes = cross_entropy_sizes(V, len(aligned), x.dtype.itemsize, self.processor)
        defines: Defines = {"REAL": CPP_TYPES[x.dtype], "VOCAB": V, "COLUMNS": len(aligned), **sizes}
        threads, shared = sizes["THREADS"], len(aligned) * x.dtype.itemsize * sizes["RESIDENT"]
        kernel = self.function("cross_entropy", "cross_entropy", shared=shared, **defines)
        loss, losses = (np.empty(shape, dtype=numpy.float32) for shape in ((), rows.shape[:1]))
        arguments = logits, losses, np.ascontiguousarray(targets), numpy.float32(1 / len(rows))
        kernel((len(rows),), (threads,), arguments, shared_mem=shared)
        mean = self.function("cross_entropy", "mean_loss", **defines)
        mean((1,), (1024,), (loss, losses, numpy.int32(len(rows))))
        return loss, logits[:, :V]

    @only_if(lambda dloss, dlogits, x, weight, dweight: _supported_dtypes(x))
    def lm_head_backward(self, dloss: Array, dlogits: Array, x: Array, weight: Array, dweight: Array | None) -> Array:
        np, V = self._np, len(weight)
        rows, aligned = np.ascontiguousarray(x.reshape(-1, x.shape[-1])), self._aligned_vocabulary(weight, x.dtype)
        if dweight is not None:
            # 5 TFLOP per step. cuBLAS uses Hopper's tensor cores only if the number of columns is a multiple of 8.
            whole = V - V % 8
            for part in (slice(whole), slice(whole, V)):
                if len(dweight[part]):
                    self.gemm(dlogits[:, part], rows, dweight[part], transpose_a=True, accumulate=True, scale=dloss)
        base = dlogits.base
        if (
            base is not None
            and (base.shape, base.strides) == ((len(rows), len(aligned)), dlogits.strides)
            and base.data.ptr == dlogits.data.ptr
        ):
            dlogits = base  # the padded buffer of lm_head_forward; its padding is multiplied by zero rows
        else:
            aligned = aligned[:V]
        return self.gemm(dlogits, aligned, np.empty(rows.shape, dtype=x.dtype), scale=dloss).reshape(x.shape)

    # Optimizer --------------------------------------------------------------------------------------------------------

    @only_if(lambda x: x.dtype == numpy.float32)
    def squared_norm(self, x: Array) -> Array:
        x = self._np.ascontiguousarray(x)
        blocks = max(1, min(-(-x.size // 4096), 1024))
        partial, total = (self._np.empty(shape, dtype=numpy.float32) for shape in ((3, blocks), (3,)))
        self.function("optimizer", "square_partials")((blocks,), (256,), (x, partial, numpy.int64(x.size)))
        self.function("optimizer", "sum_partials")((3,), (256,), (partial, total, numpy.int32(blocks)))
        return total

    @only_if(lambda value, *_: value.dtype == numpy.float32)
    def adamw_step(
        self, value: Array, grad: Array, m: Array, v: Array, scale: Array, lr: Array,
        beta1: float, beta2: float, eps: float, weight_decay: float, step: Array,
    ) -> None:  # fmt: skip
        if value.size:
            arrays = (value, grad, m, v, scale, lr, step)
            logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
            numbers = map(numpy.float32, (1 - beta1, 1 - beta2, *logs, eps, weight_decay))
            kernel = self.function("optimizer", "adamw")
            kernel((-(-value.size // 1024),), (256,), (*arrays, *numbers, numpy.int64(value.size)))


THREADS = 256  # default number of threads per block
PROCESSORS = 132  # as on an H200. It is a constant, so that sums have the same order and the same bits on every GPU.


def cross_entropy_sizes(V: int, columns: int, itemsize: int, processor: Multiprocessor) -> dict[str, int]:
    """THREADS and RESIDENT of cross_entropy.cu, for rows of V logits padded to `columns`."""
    warps = -(-V * itemsize // (16 * 32))  # with one access per thread
    threads = min(1024, processor.threads // 2 // 32 * 32, 32 * warps)
    return {"THREADS": threads, "RESIDENT": int(processor.runs_two(columns * itemsize))}


def _rows_of_a_block(C: int) -> int:
    """ROWS in layernorm.cu."""
    return 8 if C <= 768 else 4 if C <= 1536 else 2 if C <= 3072 else 1


def _blocks(rows: int, rows_of_a_block: int, blocks_of_a_processor: int) -> int:
    return max(1, min(-(-rows // rows_of_a_block), blocks_of_a_processor * PROCESSORS))


def _column_grid(x: Array) -> tuple[tuple[int, int], numpy.int32]:
    """The grid of a kernel that reads x by columns (see columns.cuh), and the number of rows."""
    C = x.shape[-1]
    pack = 16 // x.dtype.itemsize
    across, rows = -(-C // (32 * (1 if C % pack else pack))), x.size // C
    return (across, max(1, min(-(-rows // 8), 4 * PROCESSORS // across))), numpy.int32(rows)


def _philox_key(key: Key) -> Any:
    """A random.Key as a kernel argument. first_sample is passed separately, since its unit depends on the kernel."""
    return numpy.array((key.seed & 0xFFFFFFFF, key.seed >> 32, key.site, key.step), dtype=KEY_STRUCT)[()]
