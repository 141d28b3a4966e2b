"""Products of matrices on NVIDIA GPUs, by cuBLASLt, through its C interface.

CuPy wraps cuBLAS, whose products it refuses to capture into a graph, and not cuBLASLt, which besides adds biases,
applies GELU, and adds bfloat16 products into a float32 gradient while the sums are still in registers.

cuBLASLt stores matrices by columns. A matrix by rows is its own transpose by columns, so y = a b, by rows, is asked for
as y^T = b^T a^T: a and b change places, and nothing is moved. What cuBLASLt calls A is our b, and its rows our columns.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any, NamedTuple

import numpy
from ml_dtypes import bfloat16

LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so")
WORKSPACE = 32 << 20  # bytes; what NVIDIA recommends for Hopper and later

# The constants of cublasLt.h and library_types.h, the same in CUDA 11.8 to 13.
FLOAT32 = numpy.dtype(numpy.float32)
TYPES = {FLOAT32: 0, numpy.dtype(bfloat16): 14}  # CUDA_R_32F, CUDA_R_16BF
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
POINTER_MODE, TRANSA, TRANSB, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_LD = 2, 3, 4, 7, 8, 11, 12
BIAS_TYPE = 26
PREF_WORKSPACE, PREF_REDUCTION_SCHEME, PREF_ALIGNMENT_A = 1, 3, 5  # B, C and D follow A
REDUCTION_COMPUTE_TYPE = 2  # where the inner dimension is split, the parts are added in float32, in a fixed order
EPILOGUES = {"": 1, "bias": 4, "gelu": 164, "dgelu": 192, "column_sums": 256}
STATUS = {
    1: "not initialised", 3: "no memory", 7: "invalid value", 8: "this GPU lacks a feature", 11: "no access to memory",
    13: "the kernel failed", 14: "internal error", 15: "not supported", 16: "licence error",
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
    """cublasLtMatmulHeuristicResult_t: an algorithm, and what it needs."""

    _fields_ = [
        ("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("status", c_int), ("waves", c_float),
        ("reserved", c_int * 4),
    ]  # fmt: skip


class Plan(NamedTuple):
    """What cuBLASLt is told about a product: all but the addresses."""

    operation: c_void_p
    a: c_void_p
    b: c_void_p
    out: c_void_p
    algorithm: Any


class Matrix(NamedTuple):
    """Where a matrix lies, by rows: its address, the type of its elements, and how many lie between two rows."""

    address: int
    type: int
    stride: int


class Gemm:
    """Products of matrices on one device. Plans are kept: asking again for the same shapes costs a look-up.

    One thread at a time; the work goes to the current stream, and each stream has a workspace of its own, without which
    two runs need not give the same bits.

    np       CuPy, or a stand-in.
    library  the path of cuBLASLt; None looks for it when first used.
    tf32     float32 operands are rounded to 10 bits of mantissa, for tensor cores to multiply.
    """

    def __init__(self, np: Any, library: str | None = None):
        self.tf32 = False
        self._np = np
        self._path = library
        self._library: Any = None
        self._handle = c_void_p()
        self._plans: dict[tuple, Plan] = {}
        self._workspaces: dict[int, Any] = {}
        self._device_scalars: Any = None
        self._zero, self._one = c_float(0), c_float(1)

    def __call__(
        self,
        a: Any,
        b: Any,
        out: Any = None,
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        bias: Any = None,
        aux: Any = None,
        epilogue: str = "",
        accumulate: bool = False,
        scale: Any = None,
    ) -> Any:
        """out = scale a b, with a and b transposed where asked for; summed in float32. Returns out.

        a, b        2-D, both float32 or both bfloat16. Rows may lie apart (a part of wider rows), and a transposed view
                    is read in place; anything else is copied first.
        out         2-D, by rows, float32 or the operands' type; None makes one of the operands' type.
        accumulate  out += scale a b.
        scale       one float32 on the device; the host does not wait for it.
        epilogue    ""             nothing besides, or with a bias, out = scale a b + bias, one number for each column;
                    "gelu"         aux = a b + bias; out = GELU(aux), the tanh form;
                    "dgelu"        out = (a b) GELU'(aux);
                    "column_sums"  bias = the sum of b over its rows (of b as it is multiplied), besides out = a b:
                                   the gradient of a bias, where b is dy. It is written, not added to.
        bias, aux   of out's type; aux as large as out, the distance between its rows divisible by 8.

        Raises ValueError for what does not fit, and where cuBLASLt is not installed; RuntimeError where it fails.
        """
        a, transpose_a = self._by_rows(a, transpose_a)
        b, transpose_b = self._by_rows(b, transpose_b)
        m, k = a.shape[::-1] if transpose_a else a.shape
        inner, n = b.shape[::-1] if transpose_b else b.shape
        if out is None:
            out = self._np.empty((m, n), dtype=a.dtype)
        if k != inner or out.shape != (m, n):
            raise ValueError(f"a product of ({m}, {k}) and ({inner}, {n}) into {out.shape}")
        if not (m and n and k):
            raise ValueError(f"a product of ({m}, {k}) and ({k}, {n}) is empty")
        types = tuple(x.dtype for x in (a, b, out))
        if types[0] != types[1] or types[0] not in TYPES or types[2] not in (FLOAT32, types[0]):
            raise ValueError(f"no product of {types[0]} and {types[1]} into {types[2]}")
        if epilogue == "" and bias is not None:
            epilogue = "bias"
        self._check_epilogue(epilogue, bias, aux, out)
        if scale is not None and (scale.dtype != FLOAT32 or scale.size != 1):
            raise ValueError(f"scale must be one float32, got {scale.shape} of {scale.dtype}")

        places = [self._matrix(x) for x in (b, a, out)]
        bias_address = 0 if bias is None else bias.data.ptr
        aux_place = None if aux is None else self._matrix(aux)
        # Which algorithms may be taken depends on how addresses are aligned: they are part of the plan's name.
        alignments = [_alignment(place.address) for place in places]
        key = (
            m, n, k, transpose_a, transpose_b, self.tf32, epilogue, scale is None,
            *(place[1:] for place in places), *alignments, _alignment(bias_address),
            aux_place and (aux_place.stride, _alignment(aux_place.address)),
        )  # fmt: skip
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(
                (m, n, k), (transpose_b, transpose_a), places, alignments, epilogue, bias_address, aux_place,
                scale is not None,
            )  # fmt: skip
            self._plans[key] = plan
        if bias_address:
            self._set(plan.operation, BIAS_POINTER, c_void_p(bias_address))
        if aux_place:
            self._set(plan.operation, AUX_POINTER, c_void_p(aux_place.address))

        if scale is None:
            alpha, beta = ctypes.addressof(self._one), ctypes.addressof(self._one if accumulate else self._zero)
        else:  # both factors are then read on the device
            if self._device_scalars is None:
                self._device_scalars = self._np.arange(2, dtype=numpy.float32)
            alpha, beta = scale.data.ptr, self._device_scalars.data.ptr + 4 * accumulate
        stream = self._np.cuda.get_current_stream().ptr
        if stream not in self._workspaces:
            self._workspaces[stream] = self._np.empty((WORKSPACE,), dtype=numpy.uint8)
        address_b, address_a, address_out = (place.address for place in places)
        self._call(
            "Matmul", self._handle, plan.operation, alpha, address_b, plan.b, address_a, plan.a, beta,
            address_out, plan.out, address_out, plan.out, plan.algorithm,
            self._workspaces[stream].data.ptr, WORKSPACE, stream,
        )  # fmt: skip
        return out

    # Operands

    def _by_rows(self, x: Any, transposed: bool) -> tuple[Any, bool]:
        """The same matrix as one by rows, and whether it is transposed then."""
        if x.ndim != 2:
            raise ValueError(f"a matrix has 2 axes, got shape {x.shape}")
        if _row_stride(x):
            return x, transposed
        if _row_stride(x.T):
            return x.T, not transposed
        return self._np.ascontiguousarray(x), transposed

    def _matrix(self, x: Any) -> Matrix:
        return Matrix(x.data.ptr, TYPES[x.dtype], _row_stride(x))

    def _check_epilogue(self, epilogue: str, bias: Any, aux: Any, out: Any) -> None:
        if epilogue not in EPILOGUES:
            raise ValueError(f"epilogue {epilogue!r}; expected one of {', '.join(map(repr, EPILOGUES))}")
        for name, x, wanted in (
            ("bias", bias, epilogue in ("bias", "gelu", "column_sums")),
            ("aux", aux, epilogue in ("gelu", "dgelu")),
        ):
            if wanted != (x is not None):
                raise ValueError(f"epilogue {epilogue!r} {'needs' if wanted else 'takes no'} {name}")
            if wanted and (x.dtype != out.dtype or x.shape != out.shape[-x.ndim :] or x.ndim != 1 + (name == "aux")):
                raise ValueError(f"{name}: {x.shape} of {x.dtype}, out: {out.shape} of {out.dtype}")
        if not _row_stride(out):
            raise ValueError("out must lie by rows")
        if bias is not None and bias.strides[0] != bias.itemsize and bias.size > 1:
            raise ValueError("bias must be contiguous")
        if aux is not None and (not _row_stride(aux) or _row_stride(aux) % 8):
            raise ValueError("aux must lie by rows, with a distance between them that is divisible by 8")

    # cuBLASLt

    def _plan(
        self,
        shape: tuple[int, int, int],
        transposes: tuple[bool, bool],
        places: list[Matrix],
        alignments: list[int],
        epilogue: str,
        bias: int,
        aux: Matrix | None,
        device_scalars: bool,
    ) -> Plan:
        """The product as cuBLASLt sees it, and the algorithm that it takes for it: by a model, not by timing."""
        if not self._handle:
            self._library = _load(self._path)
            self._call("Create", byref(self._handle))
        m, n, k = shape
        (transpose_b, transpose_a), (b, a, out) = transposes, places
        compute = COMPUTE_32F_FAST_TF32 if self.tf32 and a.type == TYPES[FLOAT32] else COMPUTE_32F
        operation = self._new("MatmulDescCreate", compute, TYPES[FLOAT32])
        self._set(operation, TRANSA, c_int(transpose_b))
        self._set(operation, TRANSB, c_int(transpose_a))
        self._set(operation, POINTER_MODE, c_int(device_scalars))
        self._set(operation, EPILOGUE, c_int(EPILOGUES[epilogue]))
        if bias:
            self._set(operation, BIAS_POINTER, c_void_p(bias))
            self._set(operation, BIAS_TYPE, c_int(out.type))
        if aux:
            self._set(operation, AUX_POINTER, c_void_p(aux.address))
            self._set(operation, AUX_LD, c_int64(aux.stride))
        layouts = [
            self._new("MatrixLayoutCreate", place.type, columns, rows, place.stride)
            for place, rows, columns in (
                (b, *((n, k) if transpose_b else (k, n))), (a, *((k, m) if transpose_a else (m, k))), (out, m, n)
            )
        ]  # fmt: skip

        preference = self._new("MatmulPreferenceCreate")
        try:
            wishes = [(PREF_WORKSPACE, c_uint64(WORKSPACE)), (PREF_REDUCTION_SCHEME, c_int(REDUCTION_COMPUTE_TYPE))]
            wishes += [(PREF_ALIGNMENT_A + i, c_int(n)) for i, n in enumerate((*alignments, alignments[-1]))]
            for attribute, value in wishes:
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
            raise RuntimeError(f"cuBLASLt has no algorithm for ({m}, {k}) by ({k}, {n}) with epilogue {epilogue!r}")
        return Plan(operation, a_layout, b_layout, out_layout, found.algorithm)

    def _set(self, operation: c_void_p, attribute: int, value: Any) -> None:
        self._call("MatmulDescSetAttribute", operation, attribute, byref(value), ctypes.sizeof(value))

    def _new(self, name: str, *args: int) -> c_void_p:
        made = c_void_p()
        self._call(name, byref(made), *args)
        return made

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, "cublasLt" + name)(*args)
        if status:
            raise RuntimeError(f"cublasLt{name} failed: {STATUS.get(status, 'unknown')} (status {status})")


def _row_stride(x: Any) -> int:
    """How many elements lie between two rows of a matrix that lies by rows; 0 if it does not."""
    rows, columns = x.shape
    if columns > 1 and x.strides[1] != x.itemsize:
        return 0
    if rows <= 1:
        return max(columns, 1)
    stride, rest = divmod(x.strides[0], x.itemsize)
    return stride if stride >= max(columns, 1) and not rest else 0


def _alignment(address: int) -> int:
    """The power of two, up to 256, that an address is divisible by; 256 for none."""
    return address & -address & 255 or 256


def _load(path: str | None) -> Any:
    """cuBLASLt: of the wheels that CuPy asks for, or of the system."""
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
    raise ValueError(f"cuBLASLt was not found ({path or LIBRARIES[0]}); pip install 'cupy-cuda13x[ctk]' brings it")


def _in_wheels() -> str | None:
    try:
        from cuda import pathfinder
    except ImportError:
        return None
    try:
        return pathfinder.load_nvidia_dynamic_lib("cublasLt").abs_path
    except RuntimeError:  # DynamicLibNotFoundError is one
        return None
