"""Matrix products on NVIDIA GPUs, using cuBLASLt through its C interface.

CuPy wraps only cuBLAS, whose products it cannot capture into a graph. cuBLASLt can also add biases, and accumulate
bfloat16 products into a float32 gradient while the sums are still in registers.

cuBLASLt uses column-major order. A row-major matrix is its own transpose in column-major order, so the row-major
y = a b is computed as y^T = b^T a^T: a and b are swapped, and nothing is copied. cuBLASLt's A is our b, and its rows
are our columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any, NamedTuple

import numpy
from ml_dtypes import bfloat16

from tinygrad2.array import Array

LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so")
WORKSPACE = 32 << 20  # bytes, as NVIDIA recommends for Hopper and later

# The constants of cublasLt.h and library_types.h, the same in CUDA 11.8 to 13.
FLOAT32 = numpy.dtype(numpy.float32)
DATA_TYPES = {FLOAT32: 0, numpy.dtype(bfloat16): 14}  # CUDA_R_32F, CUDA_R_16BF
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
POINTER_MODE, TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, BIAS_TYPE = 2, 3, 4, 7, 8, 26
PREF_WORKSPACE, PREF_REDUCTION_SCHEME, PREF_ALIGNMENT_A = 1, 3, 5  # B, C and D follow A
REDUCTION_COMPUTE_TYPE = 2  # split-k adds the parts in float32, in a fixed order
EPILOGUE_NONE, EPILOGUE_BIAS = 1, 4
STATUS = {
    1: "not initialized", 3: "no memory", 7: "invalid value", 8: "this GPU lacks a feature", 11: "no access to memory",
    13: "the kernel failed", 14: "internal error", 15: "not supported", 16: "license error",
}  # fmt: skip

SIGNATURES: dict[str, list[Any]] = {
    "Create": [c_void_p],
    "MatmulDescCreate": [c_void_p, c_int, c_int],
    "MatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "MatrixLayoutCreate": [c_void_p, c_int, c_uint64, c_uint64, c_int64],
    "MatmulPreferenceCreate": [c_void_p],
    "MatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
    "MatmulPreferenceDestroy": [c_void_p],
    "MatmulAlgoGetHeuristic": [*[c_void_p] * 7, c_int, c_void_p, POINTER(c_int)],
    "Matmul": [*[c_void_p] * 14, c_size_t, c_void_p],
}


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm and its workspace size."""

    _fields_ = [
        ("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("status", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    ]  # fmt: skip


class MatmulPlan(NamedTuple):
    """cuBLASLt's arguments for a product, except the addresses."""

    operation: c_void_p
    a: c_void_p
    b: c_void_p
    out: c_void_p
    algorithm: ctypes.Array[c_uint64]


class Matrix(NamedTuple):
    """A row-major matrix in memory: its address, element type, and row stride in elements."""

    address: int
    type: int
    stride: int


class Gemm:
    """Matrix products on one device. Plans are cached by shape.

    Not thread-safe. Work is submitted to the current stream. Each stream has its own workspace; with a shared one, two
    runs could give different bits.

    np       CuPy, or a stand-in.
    library  the path of cuBLASLt; None searches for it when first used.
    """

    def __init__(self, np: Any, library: str | None = None):
        self._np = np
        self._path = library
        self._library: ctypes.CDLL | None = None
        self._handle = c_void_p()
        self._plans: dict[tuple[Hashable, ...], MatmulPlan] = {}
        self._workspaces: dict[int, Array] = {}
        self._device_scalars: Array | None = None
        self._zero, self._one = c_float(0), c_float(1)

    def __call__(
        self,
        a: Array,
        b: Array,
        out: Array | None = None,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        bias: Array | None = None,
        accumulate: bool = False,
        scale: Array | None = None,
        tf32: bool = False,
    ) -> Array:
        """Compute out = scale a b + bias, accumulating in float32. Returns out.

        a, b         2-D, both float32 or both bfloat16. Rows may be strided (columns of a wider matrix), and a
                     transposed view is read in place; any other layout is copied first.
        out          2-D, row-major, float32 or the operands' dtype; None allocates an array of the operands' dtype.
        transpose_a  use a^T in place of a, and likewise for b.
        bias         one value per column, of out's dtype.
        accumulate   compute out += scale a b + bias instead.
        scale        one float32 on the device; the host does not wait for it.
        tf32         round float32 operands to a 10-bit mantissa and multiply on tensor cores.

        Raises ValueError for invalid arguments or if cuBLASLt is missing, and RuntimeError if cuBLASLt fails.
        """
        a, transpose_a = self._row_major(a, transpose_a)
        b, transpose_b = self._row_major(b, transpose_b)
        m, k = a.shape[::-1] if transpose_a else a.shape
        inner, n = b.shape[::-1] if transpose_b else b.shape
        if out is None:
            out = self._np.empty((m, n), dtype=a.dtype)
        if k != inner or out.shape != (m, n):
            raise ValueError(f"cannot multiply ({m}, {k}) by ({inner}, {n}) into out of shape {out.shape}")
        if not (m and n and k):
            raise ValueError(f"the product of ({m}, {k}) and ({k}, {n}) is empty; expected sizes of at least 1")
        types = tuple(x.dtype for x in (a, b, out))
        if types[0] != types[1] or types[0] not in DATA_TYPES or types[2] not in (FLOAT32, types[0]):
            raise ValueError(f"cannot multiply {types[0]} by {types[1]} into {types[2]}")
        _check_bias(bias, out)
        if scale is not None and (scale.dtype != FLOAT32 or scale.size != 1):
            raise ValueError(f"scale must be one float32, got {scale.dtype} of shape {scale.shape}")

        matrices = [self._matrix(x) for x in (b, a, out)]
        bias_address = 0 if bias is None else bias.data.ptr
        # cuBLASLt's choice of algorithm depends on the alignment of the addresses, so alignments are part of the key.
        alignments = [_alignment(matrix.address) for matrix in matrices]
        key = (
            m, n, k, transpose_a, transpose_b, tf32, scale is None,
            *(matrix[1:] for matrix in matrices), *alignments, bias is None, _alignment(bias_address),
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            transposes = transpose_b, transpose_a
            plan = self._plan((m, n, k), transposes, matrices, alignments, bias_address, scale is not None, tf32)
            self._plans[key] = plan
        if bias_address:
            self._set(plan.operation, BIAS_POINTER, c_void_p(bias_address))

        if scale is None:
            alpha, beta = ctypes.addressof(self._one), ctypes.addressof(self._one if accumulate else self._zero)
        else:  # alpha and beta must both be on the device
            if self._device_scalars is None:
                self._device_scalars = self._np.arange(2, dtype=numpy.float32)
            alpha, beta = scale.data.ptr, self._device_scalars.data.ptr + 4 * accumulate
        stream = self._np.cuda.get_current_stream().ptr
        if stream not in self._workspaces:
            self._workspaces[stream] = self._np.empty((WORKSPACE,), dtype=numpy.uint8)
        address_b, address_a, address_out = (matrix.address for matrix in matrices)
        self._call(
            "Matmul", self._handle, plan.operation, alpha, address_b, plan.b, address_a, plan.a, beta,
            address_out, plan.out, address_out, plan.out, plan.algorithm,
            self._workspaces[stream].data.ptr, WORKSPACE, stream,
        )  # fmt: skip
        return out

    # Operands

    def _row_major(self, x: Array, transposed: bool) -> tuple[Array, bool]:
        """Return the same matrix in row-major order, and whether the product must then transpose it."""
        if x.ndim != 2:
            raise ValueError(f"expected a matrix with 2 axes, got shape {x.shape}")
        if _row_stride(x):
            return x, transposed
        if _row_stride(x.T):
            return x.T, not transposed
        return self._np.ascontiguousarray(x), transposed

    @staticmethod
    def _matrix(x: Array) -> Matrix:
        return Matrix(x.data.ptr, DATA_TYPES[x.dtype], _row_stride(x))

    # cuBLASLt

    def _plan(
        self,
        shape: tuple[int, int, int],
        transposes: tuple[bool, bool],
        matrices: list[Matrix],
        alignments: list[int],
        bias: int,
        device_scalars: bool,
        tf32: bool,
    ) -> MatmulPlan:
        """Return the plan of a product, with the algorithm that cuBLASLt's heuristic selects (nothing is timed)."""
        if not self._handle:
            self._library = _load(self._path)
            self._call("Create", byref(self._handle))
        m, n, k = shape
        (transpose_b, transpose_a), (b, a, out) = transposes, matrices
        compute = COMPUTE_32F_FAST_TF32 if tf32 and a.type == DATA_TYPES[FLOAT32] else COMPUTE_32F
        operation = self._new("MatmulDescCreate", compute, DATA_TYPES[FLOAT32])
        self._set(operation, TRANSA, c_int(transpose_b))
        self._set(operation, TRANSB, c_int(transpose_a))
        self._set(operation, POINTER_MODE, c_int(device_scalars))
        self._set(operation, EPILOGUE, c_int(EPILOGUE_BIAS if bias else EPILOGUE_NONE))
        if bias:
            self._set(operation, BIAS_POINTER, c_void_p(bias))
            self._set(operation, BIAS_TYPE, c_int(out.type))
        layouts = [
            self._new("MatrixLayoutCreate", matrix.type, columns, rows, matrix.stride)
            for matrix, rows, columns in (
                (b, *((n, k) if transpose_b else (k, n))), (a, *((k, m) if transpose_a else (m, k))), (out, m, n)
            )
        ]  # fmt: skip

        preference = self._new("MatmulPreferenceCreate")
        try:
            limits = [(PREF_WORKSPACE, c_uint64(WORKSPACE)), (PREF_REDUCTION_SCHEME, c_int(REDUCTION_COMPUTE_TYPE))]
            limits += [(PREF_ALIGNMENT_A + i, c_int(n)) for i, n in enumerate((*alignments, alignments[-1]))]
            for attribute, value in limits:
                self._call("MatmulPreferenceSetAttribute", preference, attribute, byref(value), ctypes.sizeof(value))
            found, count = Heuristic(), c_int()
            b_layout, a_layout, out_layout = layouts
            self._call(
                "MatmulAlgoGetHeuristic", self._handle, operation, b_layout, a_layout, out_layout, out_layout,
                preference, 1, byref(found), byref(count),
            )  # fmt: skip
        finally:
            self._call("MatmulPreferenceDestroy", preference)
        if not count.value or found.status:
            raise RuntimeError(f"cuBLASLt has no algorithm for ({m}, {k}) by ({k}, {n})")
        return MatmulPlan(operation, a_layout, b_layout, out_layout, found.algorithm)

    def _set(self, operation: c_void_p, attribute: int, value: ctypes._SimpleCData[Any] | c_void_p) -> None:
        self._call("MatmulDescSetAttribute", operation, attribute, byref(value), ctypes.sizeof(value))

    def _new(self, name: str, *args: int) -> c_void_p:
        created = c_void_p()
        self._call(name, byref(created), *args)
        return created

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, "cublasLt" + name)(*args)
        if status:
            raise RuntimeError(f"cublasLt{name} failed: {STATUS.get(status, 'unknown')} (status {status})")


def _check_bias(bias: Array | None, out: Array) -> None:
    if not _row_stride(out):
        raise ValueError("out must be row-major")
    if bias is None:
        return
    if bias.dtype != out.dtype or bias.shape != out.shape[1:]:
        raise ValueError(f"bias is {bias.dtype} of shape {bias.shape}; expected {out.dtype} of shape {out.shape[1:]}")
    if bias.strides[0] != bias.itemsize and bias.size > 1:
        raise ValueError("bias must be contiguous")


def _row_stride(x: Array) -> int:
    """The row stride of a matrix in elements; 0 if it is not row-major."""
    rows, columns = x.shape
    if columns > 1 and x.strides[1] != x.itemsize:
        return 0
    if rows <= 1:
        return max(columns, 1)
    stride, rest = divmod(x.strides[0], x.itemsize)
    return stride if stride >= max(columns, 1) and not rest else 0


def _alignment(address: int) -> int:
    """The largest power of two, up to 256, that divides an address; 256 for a null address."""
    return address & -address & 255 or 256


def _load(path: str | None) -> ctypes.CDLL:
    """Load cuBLASLt, from the wheels that CuPy depends on or from the system."""
    for candidate in (path,) if path else (_in_wheels(), *LIBRARIES):
        if candidate is None:
            continue
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        for name, types in SIGNATURES.items():
            getattr(library, "cublasLt" + name).argtypes = types
        return library
    raise ValueError(f"cuBLASLt was not found ({path or LIBRARIES[0]}); install it: pip install 'cupy-cuda13x[ctk]'")


def _in_wheels() -> str | None:
    try:
        from cuda import pathfinder
    except ImportError:
        return None
    try:
        return pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path
    except RuntimeError:  # DynamicLibNotFoundError is a subclass
        return None
