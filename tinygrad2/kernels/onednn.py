"""Products of bfloat16 matrices with oneDNN, which uses the processor's bfloat16 instructions (AVX-512 BF16, AMX).

A matrix product is a oneDNN primitive, compiled for the sizes and memory layouts of the matrices and shared by all
threads. Each thread has its own stream, memory objects (which contain the addresses) and scratchpad. The threads come
from kernels/pool.py, so OpenMP is limited to one thread in each of them. With more, products would be slower, and
their results would depend on the number of threads. Source: oneDNN's C API, version 3,
https://uxlfoundation.github.io/oneDNN

The wheel `onednn-cpu-gomp` contains this library (54 MB) and has no dependencies; Intel's own, `onednn`, installs 2 GB.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llvmlite import ir
from ml_dtypes import bfloat16
from numba import types
from numba.core.base import BaseContext
from numba.core.typing import Context, Signature
from numba.extending import intrinsic

from tinygrad2 import forks, machine
from tinygrad2.kernels import pool

PACKAGE = "onednn-cpu-gomp"
INSTRUCTIONS = ("avx512_bf16", "amx_bf16")  # as /proc/cpuinfo names them
# Maximum number of cached primitives. A training run needs about 40; each new text length adds more.
KEPT = 256

# Constants of dnnl_types.h and dnnl_common_types.h.
_CPU, _IN_ORDER, _USER_SCRATCHPAD = 1, 1, 1
_TYPES = {np.dtype(bfloat16): 2, np.dtype(np.float32): 3}
_SOURCE, _WEIGHTS, _DESTINATION, _BIAS, _SCRATCHPAD = 1, 33, 17, 41, 80
_QUERY_SCRATCHPAD = 136

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_RESULT, _LONGS = ctypes.POINTER(_POINTER), ctypes.POINTER(_LONG)
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "engine_create": (_RESULT, _INT, ctypes.c_size_t),
    "stream_create": (_RESULT, _POINTER, ctypes.c_uint),
    "memory_desc_create_with_strides": (_RESULT, _INT, _LONGS, _INT, _LONGS),
    "primitive_attr_create": (_RESULT,),
    "primitive_attr_set_scratchpad_mode": (_POINTER, _INT),
    "primitive_attr_set_post_ops": (_POINTER, _POINTER),
    "post_ops_create": (_RESULT,),
    "post_ops_append_sum": (_POINTER, ctypes.c_float, ctypes.c_int32, _INT),
    "matmul_primitive_desc_create": (_RESULT, *[_POINTER] * 6),
    "primitive_create": (_RESULT, _POINTER),
    "memory_create": (_RESULT, _POINTER, _POINTER, _POINTER),
    "memory_set_data_handle": (_POINTER, _POINTER),
    "primitive_execute": (_POINTER, _POINTER, _INT, _POINTER),
}


class _Argument(ctypes.Structure):
    """dnnl_exec_arg_t."""

    _fields_ = (("number", _INT), ("memory", _POINTER))


class OneDnn:
    """The loaded library. Its methods are the functions of its C API, without the prefix dnnl_."""

    def __init__(self, path: str):
        self.library = ctypes.CDLL(path)
        openmp = ctypes.CDLL("libgomp.so.1")  # already loaded by oneDNN
        self.set_openmp_threads = openmp.omp_set_num_threads
        for name, arguments in _SIGNATURES.items():
            function = self.library[f"dnnl_{name}"]
            function.argtypes, function.restype, function.errcheck = arguments, _INT, _checked
            setattr(self, name, function)
        self.query_md = self.library["dnnl_primitive_desc_query_md"]
        self.query_md.argtypes, self.query_md.restype = (_POINTER, _INT, _INT), _POINTER
        self.md_size = self.library["dnnl_memory_desc_get_size"]
        self.md_size.argtypes, self.md_size.restype = (_POINTER,), ctypes.c_size_t
        self.engine = self.new("engine_create", _CPU, 0)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def new(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        """Call a function that creates an object. The object is destroyed when the returned pointer is released."""
        result = _POINTER()
        getattr(self, function)(ctypes.byref(result), *arguments)
        kind = function.partition("_create")[0].removeprefix("matmul_")
        finalizer = weakref.finalize(result, self.library[f"dnnl_{kind}_destroy"], _POINTER(result.value))
        finalizer.atexit = False
        return result


def _checked(status: Any, function: Any, arguments: tuple[Any, ...]) -> Any:
    if status:
        raise RuntimeError(f"oneDNN: {function.__name__} failed with status {status}")
    return status


@functools.cache
def library() -> OneDnn | None:
    """oneDNN, or None if it is not installed or the processor has no instructions for bfloat16."""
    return None if unavailable_reason() else OneDnn(str(_file()))


@functools.cache
def unavailable_reason() -> str | None:
    """Why oneDNN does not compute products of bfloat16 matrices; None if it does."""
    if not machine.cpu_features().intersection(INSTRUCTIONS):
        return f"this processor has no instructions for bfloat16 ({' or '.join(INSTRUCTIONS)})"
    if _file() is None:
        return f"the package {PACKAGE} is not installed; {machine.install_command('bfloat16')}"
    return None


def _file() -> Path | None:
    """The path of the library, or None if it is not installed."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.name == "libdnnl.so.3")
    return next((path for path in found if path.exists()), None)


_lock = threading.Lock()  # held while a primitive is created: two threads that do so at once corrupt the heap
forks.locks.append(_lock)
_Key = tuple[tuple[int, int, int], tuple[tuple[int, int], ...], np.dtype, bool, np.dtype | None]


@functools.lru_cache(KEPT)
def _primitive(key: _Key) -> tuple[ctypes.c_void_p, list[ctypes.c_void_p | None], int, ctypes.c_void_p]:
    """Return the primitive of a product; the memory descriptors of source, weights, destination, bias and scratchpad;
    the size of the scratchpad in bytes; and the object that owns the scratchpad's descriptor."""
    dnn = library()
    assert dnn is not None
    (m, n, k), strides, dtype, add, bias_dtype = key
    own = _TYPES[np.dtype(bfloat16)]

    def describe(kind: int, shape: tuple[int, int], steps: tuple[int, int]) -> ctypes.c_void_p:
        return dnn.new("memory_desc_create_with_strides", 2, (_LONG * 2)(*shape), kind, (_LONG * 2)(*steps))

    source, weights = describe(own, (m, k), strides[0]), describe(own, (k, n), strides[1])
    destination = describe(_TYPES[dtype], (m, n), strides[2])
    bias = None if bias_dtype is None else describe(_TYPES[bias_dtype], (1, n), (n, 1))
    attributes = dnn.new("primitive_attr_create")
    dnn.primitive_attr_set_scratchpad_mode(attributes, _USER_SCRATCHPAD)  # required to share a primitive among threads
    if add:
        after = dnn.new("post_ops_create")
        dnn.post_ops_append_sum(after, 1.0, 0, 0)
        dnn.primitive_attr_set_post_ops(attributes, after)
    made = dnn.new("matmul_primitive_desc_create", dnn.engine, source, weights, bias, destination, attributes)
    scratch = _POINTER(dnn.query_md(made, _QUERY_SCRATCHPAD, 0))
    return dnn.new("primitive_create", made), [source, weights, destination, bias, scratch], dnn.md_size(scratch), made


class _Thread(threading.local):
    """The state of one thread: its stream, its scratchpad and its cached products."""

    def __init__(self) -> None:
        dnn = library()
        assert dnn is not None
        self.dnn = dnn
        self.dnn.set_openmp_threads(1)
        self.stream = self.dnn.new("stream_create", self.dnn.engine, _IN_ORDER)
        self.scratch = np.empty(1 << 16, np.uint8)
        self.plans: dict[_Key, tuple[Any, ...]] = {}

    def plan(self, key: _Key) -> tuple[Any, ...]:
        """Return the primitive, the memory objects of source, weights, destination, bias and scratchpad, the number of
        arguments, and the arguments."""
        if (plan := self.plans.get(key)) is not None:
            return plan
        with _lock:
            primitive, descriptions, size, _ = _primitive(key)
        if size > self.scratch.nbytes:
            self.scratch = np.empty(size, np.uint8)
            self.plans.clear()  # they contain the address of the old scratchpad
        elif len(self.plans) == KEPT:
            del self.plans[next(iter(self.plans))]  # the oldest
        memories = [d and self.dnn.new("memory_create", d, self.dnn.engine, None) for d in descriptions]
        self.dnn.memory_set_data_handle(memories[4], self.scratch.ctypes.data)
        numbers = (_SOURCE, _WEIGHTS, _DESTINATION, _BIAS, _SCRATCHPAD)
        present = [_Argument(number, memory) for number, memory in zip(numbers, memories, strict=True) if memory]
        self.plans[key] = primitive, memories, len(present), (_Argument * len(present))(*present)
        return self.plans[key]


_thread: _Thread | None = None  # created with the first product


def _this_thread() -> _Thread:
    global _thread
    if _thread is None:
        with _lock:
            _thread = _thread or _Thread()
    return _thread


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray, add: bool = False, bias: np.ndarray | None = None) -> None:
    """out = a b, or out += a b, with `bias` added to every row, on the calling thread. Sums are float32.

    a (m, k) and b (k, n) are bfloat16; out (m, n) and bias (n,) are bfloat16 or float32. In each matrix, either the
    rows or the columns must be contiguous. The result is bitwise the same however the rows are divided among calls.
    """
    here = _this_thread()
    (m, n), k = out.shape, a.shape[1]
    strides = tuple((x.strides[0] // x.itemsize, x.strides[1] // x.itemsize) for x in (a, b, out))
    primitive, memories, count, arguments = here.plan(
        ((m, n, k), strides, out.dtype, add, None if bias is None else bias.dtype)
    )
    for memory, array in zip(memories, (a, b, out, bias), strict=False):  # the last is the scratchpad
        if array is not None:
            here.dnn.memory_set_data_handle(memory, array.ctypes.data)
    here.dnn.primitive_execute(primitive, here.stream, count, arguments)


class Product(NamedTuple):
    """A product for compiled code: a (m, k) b (k, n), or its sum with what out contains.

    strides  of a, b and out, in elements.
    """

    shape: tuple[int, int, int]  # m, n, k
    strides: tuple[tuple[int, int], ...]
    add: bool = False


class Plans:
    """The plans of some products with float32 results on the calling thread, for `execute`.

    addresses  one for each product. They are valid while this object exists, until the thread's next product.
    """

    def __init__(self, products: list[Product]):
        here = _this_thread()
        keys: list[_Key] = [(shape, strides, np.dtype(np.float32), add, None) for shape, strides, add in products]
        with _lock:
            largest = max(keys, key=lambda key: _primitive(key)[2])
        here.plan(largest)  # so that the others have the same scratchpad
        self._plans = [here.plan(key) for key in keys]
        functions = [ctypes.cast(here.dnn.library[f"dnnl_{name}"], _POINTER).value for name in _COMPILED]
        self._words = np.array(
            [
                [*functions, primitive.value, here.stream.value, count, ctypes.addressof(arguments)]
                + [memory.value for memory in memories[:3]]
                for primitive, memories, count, arguments in self._plans
            ],
            np.int64,
        )
        self.addresses = self._words.ctypes.data + np.arange(len(keys)) * self._words.strides[0]


_COMPILED = ("memory_set_data_handle", "primitive_execute")  # the functions that compiled code calls


@intrinsic
def execute(typing_context: Context, plan: types.Type, a: types.Type, b: types.Type, out: types.Type) -> pool.Intrinsic:
    """Compute a product in compiled code, by the addresses of its plan and of the matrices. Returns 0, or an error."""
    word, number = ir.IntType(64), ir.IntType(32)

    def generate(
        context: BaseContext, builder: ir.IRBuilder, signature: Signature, arguments: list[ir.Value]
    ) -> ir.Value:
        plan, *matrices = arguments
        words = builder.inttoptr(plan, word.as_pointer())
        set_handle, run, primitive, stream, count, places, *memories = (
            builder.load(builder.gep(words, [word(i)])) for i in range(9)
        )
        kind = ir.FunctionType(number, [word, word])
        status = number(0)
        for memory, matrix in zip(memories, matrices, strict=True):
            found = builder.call(builder.inttoptr(set_handle, kind.as_pointer()), [memory, matrix])
            status = builder.or_(status, found)
        kind = ir.FunctionType(number, [word, word, number, word])
        found = builder.call(
            builder.inttoptr(run, kind.as_pointer()), [primitive, stream, builder.trunc(count, number), places]
        )
        return builder.or_(status, found)

    return types.int32(*[types.int64] * 4), generate


def check(status: np.int32) -> None:
    """Raise RuntimeError if `execute` has returned an error."""
    if status:
        raise RuntimeError(f"oneDNN: a product in compiled code failed with status {status}")
