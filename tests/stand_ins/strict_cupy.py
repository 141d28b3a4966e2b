"""NumPy with CuPy's rules: a stand-in that runs and checks the whole engine on a machine without a GPU.

It computes with NumPy, and rejects or counts operations that CuPy rejects or that would be slow or wrong on a device:
  - mixing NumPy arrays with device arrays, passing a list where an array is expected, and converting to NumPy other
    than by get or asnumpy raise TypeError; results are arrays even if 0-d, and dtypes follow NEP 50, as in CuPy 14;
  - assignment at repeated indices raises, since its result is undefined on a device; out-of-range indices raise (CuPy
    silently wraps them around), and so does writing to a broadcast view (CuPy would write to its source);
  - `device.syncs` counts implicit synchronizations: float(), bool(), item(), get(), printing, and results whose shape
    depends on values. `device.waits` counts explicit waits for events;
  - `device.float64` counts new float64 arrays, and float64 results unless all inputs are float64;
  - `device.launches` counts the calls that launch work on the device;
  - bfloat16 arrays use ml_dtypes, which differs from CuPy 14: sums and matrix products are computed in float32 and
    rounded once; products with more than two axes raise, because they fail in CuPy, and so does arithmetic with a
    Python number, for which the two give different dtypes;
  - the operands of float32 matrix products are rounded to TF32 if that is CuPy's compute type; `device.products` counts
    the products by compute type;
  - kernels of a RawModule are compiled for the CPU and run immediately, in the simulator in tests/stand_ins/cudasim.

Copies between pinned memory and the device are delayed until the host waits, as may happen on a device. If pinned
memory was changed or freed before its copy to the device, RaceError is raised when the copy runs. The destination of a
copy to the host contains NaN until the copy has run. Everything else runs in launch order, as in a single stream,
except for work that a library launches on its own stream (`device.launch_beside`; see nccl.py).

With `registered(real=cupy)`, every name and keyword is also checked against the installed CuPy. This requires neither a
GPU nor a driver.
"""

from __future__ import annotations

import ctypes
import inspect
import re
import threading
import time
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim
from tinygrad2 import backend
from tinygrad2.kernels import cuda

FROM_HOST = {"asarray", "array", "ascontiguousarray"}
VIEWS = FROM_HOST | {"reshape", "transpose", "view", "swapaxes", "squeeze", "ravel", "expand_dims", "moveaxis"}
VIEWS |= {"broadcast_to", "split", "array_split", "diagonal", "astype"}  # no launch if the result shares memory
SHAPE_FROM_VALUES = {"nonzero", "flatnonzero", "argwhere", "unique", "bincount", "extract", "compress"}
SUMS = {"sum", "mean", "prod", "cumsum", "var", "std"}
PRODUCTS = {"matmul", "dot", "einsum", "tensordot", "inner", "vdot"}
JOINING = {"concatenate", "stack", "vstack", "hstack"}
WITHOUT_INPUT = {"zeros", "ones", "empty", "full", "arange", "linspace", "eye", "tri", "identity"}
HOST_METHODS = {"item", "tolist", "tobytes"}
UFUNC_KEYWORDS = {"out", "dtype", "casting", "where"}
PROCESSORS = 132
POISON = 0xFF  # the value of all bytes in uninitialized memory: NaN, or -1


class RaceError(AssertionError):
    """The host changed or freed memory before a pending copy had read or written it."""


class Device:
    """Counters, and the queue of copies that have been launched but not executed."""

    def __init__(self) -> None:
        self.real: Any = None
        self.streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
        self.reset()

    def reset(self) -> None:
        """Reset the counters, and discard pending work."""
        self.launches = self.syncs = self.waits = self.float64 = self.pinned = 0
        self.products: Counter[str] = Counter()  # float32 matrix products, by "float32" and "tf32"
        self.submitted = self.finished = 0
        self.clusters = 16  # number of clusters that run concurrently
        self.blocks = 1  # number of blocks of a cooperative kernel that fit on a multiprocessor
        self._queue: deque[Callable[[], None]] = deque()
        self._one_at_a_time = threading.RLock()  # a thread may wait for another thread's event
        self.beside: list[tuple[Stream, int, Callable[[], None]]] = []  # (stream, last submission before it, action)
        self._owners: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()

    def submit(self, action: Callable[[], None]) -> int:
        """Append a copy or an event to the queue. Returns its number."""
        self._queue.append(action)
        self.submitted += 1
        return self.submitted

    def finish(self, number: int | None = None) -> None:
        """Execute the queue up to `number`, or all of it."""
        with self._one_at_a_time:
            while self._queue and (number is None or self.finished < number):
                self.finished += 1
                self._queue.popleft()()

    def launch_beside(self, stream: Stream, finish: Callable[[], None]) -> None:
        """Launch work on `stream`. It is completed by `finish` when another stream waits for a later event."""
        self.beside.append((stream, self.submitted, finish))

    def own(self, values: np.ndarray) -> int:
        """The address of an array. It is registered, so that `owner` can find the array while it exists."""
        root = values
        while isinstance(root.base, np.ndarray):
            root = root.base
        self._owners[_start(root)] = root
        return _start(values)

    def owner(self, pointer: int, nbytes: int) -> weakref.ref[np.ndarray] | None:
        """The array that contains these bytes."""
        for start, root in list(self._owners.items()):
            if start <= pointer and pointer + nbytes <= start + root.nbytes:
                return weakref.ref(root)
        return None

    def sync(self) -> None:
        """An implicit synchronization with the device."""
        self.syncs += 1
        self.finish()


def _start(values: np.ndarray) -> int:
    return values.__array_interface__["data"][0]


device = Device()


class PinnedMemory(bytearray):
    """Host memory from and to which a device can copy. `last_read` is the number of the last copy from it."""

    last_read = 0


def _pinned(array: np.ndarray) -> PinnedMemory:
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, PinnedMemory):
        raise AssertionError("an asynchronous copy of memory that is not pinned would wait for the device")
    return owner


# Checks against the installed CuPy ------------------------------------------------------------------------------------


def _check_name(owner: str, name: str) -> Any:
    """CuPy's object `name`, or None if names are not checked. Raises AttributeError if CuPy does not have it."""
    if device.real is None:
        return None
    target = getattr(device.real.ndarray if owner == "cupy.ndarray" else device.real, name, None)
    if target is None:
        raise AttributeError(f"{owner} has no attribute {name!r}")
    return target


def _check_keywords(where: str, target: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise TypeError if CuPy's function does not accept these arguments."""
    if target is None or not callable(target):
        return
    try:
        inspect.signature(target).bind(*args, **kwargs)
        return
    except ValueError:  # a compiled function has its signature in the first line of its docstring
        match = re.match(r"[\w.]*\((.*)\)", (target.__doc__ or "").split("\n")[0])
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None
    if match is None or "**" in match[1]:
        return
    names = {re.split(r"[ =]", parameter.strip().split("=")[0])[-1] for parameter in match[1].split(",")}
    if set(kwargs) - names:
        raise TypeError(f"{where} does not accept {', '.join(sorted(set(kwargs) - names))}")


# Arrays ---------------------------------------------------------------------------------------------------------------


def _unwrap(x: Any) -> Any:
    """The NumPy values of an argument. Raises TypeError for a NumPy array, since it is not on the device."""
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: move it to the device with asarray first")
    if isinstance(x, tuple | list):
        return type(x)(map(_unwrap, x))
    return x


def _wrap(result: Any, inputs: Any) -> Any:
    """Convert the result of a NumPy function on `inputs` to what CuPy returns: arrays, even if they are 0-d."""
    if isinstance(result, tuple | list):
        return type(result)(_wrap(part, inputs) for part in result)
    if isinstance(result, np.ndarray | np.generic | bool):
        _count_float64(result, inputs)
        return ndarray(np.asarray(result))
    return result


def _count_float64(result: Any, inputs: Any) -> None:
    dtypes = {x.dtype for x in _arrays(inputs) if x.dtype.kind == "f"}
    wide = np.dtype(np.float64)
    device.float64 += (wide in dtypes or getattr(result, "dtype", None) == wide) and dtypes != {wide}


def _arrays(x: Any) -> Iterator[np.ndarray]:
    if isinstance(x, np.ndarray):
        yield x
    elif isinstance(x, tuple | list):
        for part in x:
            yield from _arrays(part)


def _call(name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a NumPy function on the values of device arrays."""
    args, kwargs = _unwrap(args), {key: _unwrap(value) for key, value in kwargs.items()}
    inputs = [*args, *(value for key, value in kwargs.items() if key != "out")]
    with np.errstate(all="ignore"):  # a device does not emit warnings
        if any(x.dtype == bfloat16 for x in _arrays(inputs)) and (name in PRODUCTS or name in SUMS):
            result = _in_bfloat16(name, function, args, kwargs)
        elif name in PRODUCTS and all(x.dtype == np.float32 for x in _arrays(inputs)):
            tf32 = Linalg.compute_type == Linalg.COMPUTE_TYPE_TF32
            device.products["tf32" if tf32 else "float32"] += 1
            operands = [_to_tf32(x) if tf32 and isinstance(x, np.ndarray) else x for x in args]
            result = function(*operands, **kwargs)
        else:
            result = function(*args, **kwargs)
    shared = name in VIEWS and all(any(np.may_share_memory(r, x) for x in _arrays(inputs)) for r in _arrays([result]))
    device.launches += not shared
    if name in SHAPE_FROM_VALUES or (name == "where" and len(args) == 1):
        device.sync()
    if name in ("empty", "empty_like") and result.dtype.kind != "b":
        result.reshape(-1).view(np.uint8)[:] = POISON
    return _wrap(result, inputs)


def _in_bfloat16(name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A sum or matrix product of bfloat16 arrays, which CuPy computes in float32."""
    out, dtype = kwargs.pop("out", None), kwargs.pop("dtype", None)
    if name in PRODUCTS and (name not in ("matmul", "dot") or any(x.ndim > 2 for x in _arrays(args))):
        raise TypeError(f"cupy.{name}: bfloat16 products support at most two axes")
    if name in PRODUCTS and any(x.dtype != bfloat16 for x in (*_arrays(args), *_arrays([out]))):
        raise TypeError(f"cupy.{name}: bfloat16 products require bfloat16 operands and a bfloat16 output")
    wide = [x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == bfloat16 else x for x in args]
    result = np.asarray(function(*wide, **kwargs)).astype(dtype or bfloat16)
    if out is None:
        return result
    out[...] = result
    return out


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """Round to a 10-bit mantissa, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(0xFFF) + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)).view(np.float32).reshape(x.shape)


class Linalg:
    """CuPy's module for matrix products. The compute type is a setting of the process."""

    COMPUTE_TYPE_DEFAULT, COMPUTE_TYPE_TF32 = 1, 7
    compute_type = COMPUTE_TYPE_DEFAULT

    @staticmethod
    def get_compute_type(dtype: str) -> int:
        """The compute type of products of this dtype."""
        assert dtype == "f"
        return Linalg.compute_type

    @staticmethod
    def set_compute_type(dtype: str, compute_type: int) -> None:
        """Set the compute type of products of this dtype."""
        assert dtype == "f"
        Linalg.compute_type = compute_type


def _ufunc(name: str, *args: Any, out: Any = None, **kwargs: Any) -> Any:
    """A universal function, which accepts only device arrays and numbers."""
    for x in args:
        if not isinstance(x, ndarray | int | float | np.generic):
            raise TypeError(f"Unsupported type {type(x)}")
    if any(isinstance(x, ndarray) and x.dtype == bfloat16 for x in args) and any(type(x) in (int, float) for x in args):
        raise TypeError(f"cupy.{name}: bfloat16 and a Python number; select the dtype with a NumPy scalar or astype")
    if set(kwargs) - UFUNC_KEYWORDS:
        raise TypeError(f"cupy.{name} does not accept {', '.join(sorted(set(kwargs) - UFUNC_KEYWORDS))}")
    if out is None:
        return _call(name, getattr(np, name), args, kwargs)
    _call(name, getattr(np, name), args, {**kwargs, "out": out})
    return out


def _index(index: Any) -> Any:
    """Convert an index for NumPy. Lists and NumPy arrays are allowed, as in CuPy, which copies them to the device."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    if isinstance(index, list | np.ndarray):
        device.launches += 1
        return np.asarray(index)
    return _unwrap(index)


def _with_ellipsis(index: Any) -> tuple:
    """Add an ellipsis to the index, so that NumPy returns a view instead of a scalar."""
    index = index if isinstance(index, tuple) else (index,)
    return index if any(i is Ellipsis for i in index) else (*index, Ellipsis)


class ndarray:  # noqa: N801 (the usual name in array libraries)
    """An array on the device."""

    __slots__ = ("_a", "device")

    def __init__(self, values: np.ndarray):
        self._a = values
        self.device = GPU()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        return _ufunc(ufunc.__name__, *args, **kwargs)  # called if the left operand is a NumPy scalar

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    nbytes = property(lambda self: self._a.nbytes)
    itemsize = property(lambda self: self._a.itemsize)
    strides = property(lambda self: self._a.strides)
    T = property(lambda self: ndarray(self._a.T))
    flags = property(lambda self: self._a.flags)
    data = property(lambda self: MemoryPointer(self._a))
    base = property(lambda self: None if self._a.base is None else ndarray(self._a.base))

    def __getattr__(self, name: str) -> Any:
        target = _check_name("cupy.ndarray", name)
        method = getattr(self._a, name)
        if not callable(method):
            raise AttributeError(f"the stand-in has no attribute {name!r}")

        def call(*args: Any, **kwargs: Any) -> Any:
            _check_keywords(f"cupy.ndarray.{name}", target, (self, *args), kwargs)
            if name in HOST_METHODS:
                device.sync()
                return method(*args, **kwargs)
            if self.dtype == bfloat16 and name in SUMS | PRODUCTS:
                return _call(name, getattr(np, name), (self, *args), kwargs)
            return _call(name, lambda _, *a, **k: method(*a, **k), (self, *args), kwargs)

        return call

    # To and from the host

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        values = self._a.copy()
        if blocking:
            device.sync()
            if out is None:
                return values
            out[...] = values
            return out
        if out is None or out.shape != values.shape or out.dtype != values.dtype or not out.flags.c_contiguous:
            raise ValueError("an asynchronous copy needs output memory with the array's shape and dtype")
        memory = weakref.ref(_pinned(out))
        device.finish(_pinned(out).last_read)  # the device executes copies in launch order
        out.reshape(-1).view(np.uint8)[:] = POISON
        where = out.__array_interface__["data"][0] - _address(memory())

        def copy() -> None:
            destination = memory()
            if destination is None:
                raise RaceError("output memory was freed before a result was copied to it")
            destination[where : where + values.nbytes] = values.tobytes()

        device.submit(copy)
        return out

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype or arr.shape != self.shape:
            raise TypeError(f"set: expected a NumPy array of {self.dtype} with shape {self.shape}")
        if not self._a.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        self._a[...] = arr
        if stream is None:
            device.sync()
            return
        device.launches += 1
        memory, copied = weakref.ref(_pinned(arr)), arr.tobytes()
        where = arr.__array_interface__["data"][0] - _address(memory())

        def copy() -> None:
            source = memory()
            if source is None or source[where : where + len(copied)] != copied:
                raise RaceError("pinned memory was changed or freed before it was copied to the device")

        _pinned(arr).last_read = device.submit(copy)

    def _number(self, kind: Callable) -> Any:
        device.sync()
        return kind(self._a)

    def __float__(self) -> float:
        return self._number(float)

    def __int__(self) -> int:
        return self._number(int)

    def __bool__(self) -> bool:
        return self._number(bool)

    def __index__(self) -> int:
        return self._number(lambda values: values.__index__())

    def __repr__(self) -> str:
        return self._number(repr)

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    # Indexing

    def __getitem__(self, index: Any) -> ndarray:
        index = _with_ellipsis(_index(index))
        result = self._a[index]
        if any(x.dtype == bool for x in _arrays(index)):
            device.sync()
        device.launches += any(True for _ in _arrays(index))
        return ndarray(result)

    def __setitem__(self, index: Any, values: Any) -> None:
        if not isinstance(values, ndarray | int | float | np.generic):
            raise TypeError(f"Unsupported type {type(values)}")
        index = _with_ellipsis(_index(index))
        if any(x.dtype.kind in "iu" for x in _arrays(index)):
            positions = np.arange(self._a.size).reshape(self._a.shape)[index]
            if np.unique(positions).size != positions.size:
                raise ValueError("assignment at repeated indices is undefined on a device; use add.at")
        device.launches += 1
        self._a[index] = _unwrap(values)


class MemoryPointer:
    """The location of an array; `ptr` is the pointer for C libraries."""

    def __init__(self, values: np.ndarray):
        self.ptr = device.own(values)


def _address(memory: PinnedMemory) -> int:
    return np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0]


def _operator(name: str, reflected: bool = False, in_place: bool = False) -> Callable:
    def apply(self: ndarray, *other: Any) -> Any:
        if other and not isinstance(other[0], ndarray | int | float | np.generic | np.ndarray):
            return NotImplemented
        operands = (*other, self) if reflected else (self, *other)
        return _ufunc(name, *operands, out=self) if in_place else _ufunc(name, *operands)

    return apply


_OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or",
    "xor": "bitwise_xor", "lshift": "left_shift", "rshift": "right_shift",
}  # fmt: skip
for _name, _function in _OPERATORS.items():
    setattr(ndarray, f"__{_name}__", _operator(_function))
    setattr(ndarray, f"__r{_name}__", _operator(_function, reflected=True))
    setattr(ndarray, f"__i{_name}__", _operator(_function, in_place=True))
for _name, _function in {
    "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal",
    "neg": "negative", "abs": "absolute", "invert": "invert",
}.items():  # fmt: skip
    setattr(ndarray, f"__{_name}__", _operator(_function))


# Streams, events, memory ----------------------------------------------------------------------------------------------


class Event:
    """An event in a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self._number, self._time = 0, 0.0
        self._stream, self._launches = _current.stream, 0
        self.timed, self._gpu = not disable_timing, GPU.get_current()

    def record(self, stream: Any = None) -> None:
        self._stream, self._launches = stream or _current.stream, device.launches
        self._number, self._time = device.submit(lambda: None), time.perf_counter()

    @property
    def done(self) -> bool:
        return device.finished >= self._number

    def synchronize(self) -> None:
        if GPU.get_current() != self._gpu:
            raise AssertionError(f"this wait would create a context on the current GPU, {GPU.get_current()}")
        device.waits += 1
        device.finish(self._number)


class Stream:
    """A stream. All streams share one queue of copies, in launch order.

    others_seen  number of launches when another stream recorded the event for which this stream last waited.
    """

    _created = 0

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None):
        Stream._created += not null
        self.ptr = 0 if null else Stream._created
        self.others_seen = -1
        device.streams[self.ptr] = self
        self._outer: list[Stream] = []

    def __enter__(self) -> Stream:
        self._outer.append(_current.stream)
        return self.use()

    def __exit__(self, *error: Any) -> None:
        self._outer.pop().use()

    def use(self) -> Stream:
        _current.stream = self
        return self

    def wait_event(self, event: Event) -> None:
        """Wait for an event. All streams run in launch order, so only work of launch_beside is left to complete."""
        if not event._number:
            raise CUDARuntimeError("waiting for an event that was not recorded has no effect")
        if event._stream is self:
            return
        self.others_seen = event._launches
        ready = [work for work in device.beside if work[0] is event._stream and work[1] < event._number]
        device.beside = [work for work in device.beside if work not in ready]
        for _, _, finish in ready:
            finish()

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        device.waits += 1
        device.finish()


class GPU:
    """A device with the properties of an H200. Each thread has a current device, initially 0."""

    compute_capability = "90"
    current = threading.local()

    def __init__(self, number: int | None = None):
        self.id = GPU.get_current() if number is None else number

    @staticmethod
    def get_current() -> int:
        return getattr(GPU.current, "number", 0)

    def use(self) -> GPU:
        GPU.current.number = self.id
        return self

    def synchronize(self) -> None:
        _current.stream.synchronize()


class RawModule:
    """Like cupy.RawModule, but the kernels are compiled for the CPU and run in the simulator."""

    def __init__(self, code: str | None = None, *, options: tuple[str, ...] = (), **kwargs: Any):
        _check_keywords("cupy.RawModule", _check_name("cupy", "RawModule"), (), {"options": options, **kwargs})
        if not isinstance(code, str) or not isinstance(options, tuple):
            raise TypeError("cupy.RawModule expects the source as a string and the options as a tuple")
        self._module, self._cooperative = cudasim.RawModule(code, options), kwargs.get("enable_cooperative_groups")
        self._cluster = next((int(o.split("=")[1]) for o in options if o.startswith("-DRANKS=")), 1)

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self._module.get_function(name), self._cluster, bool(self._cooperative))


class RawKernel:
    """A kernel, which runs immediately when launched. The simulator checks its arguments."""

    def __init__(self, function: cudasim.Function, cluster: int, cooperative: bool):
        object.__setattr__(self, "_function", function)
        object.__setattr__(self, "cluster", cluster)  # number of blocks per cluster
        object.__setattr__(self, "cooperative", cooperative)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("max_dynamic_shared_size_bytes", "preferred_shared_memory_carveout"):
            raise AttributeError(f"cupy.RawKernel has no attribute {name!r} to set")
        setattr(self._function, name, value)

    @property
    def kernel(self) -> Any:
        return types.SimpleNamespace(ptr=id(self))

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._function.max_dynamic_shared_size_bytes

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Any, *, shared_mem: int = 0) -> None:
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError("cupy.RawKernel expects the grid and the block as tuples")
        if self.cooperative and grid[0] > (most := device.blocks * PROCESSORS):
            raise AssertionError(f"CuPy would launch {most} of {grid[0]} blocks, with a warning")
        device.launches += 1
        self._function(grid, block, [_unwrap(x) for x in args], shared_mem=shared_mem)


class Driver:
    """The functions of the CUDA driver that CuPy does not wrap."""

    def cuOccupancyMaxActiveClusters(self, count: Any, function: Any, config: Any) -> int:
        size = config._obj
        if not function.value or not 0 < size.block_x <= 1024 or not size.shared <= cudasim.shared_memory:
            return 1  # CUDA_ERROR_INVALID_VALUE
        if not size.grid_x or size.grid_x % ctypes.cast(function, ctypes.py_object).value.cluster:
            return 912  # CUDA_ERROR_INVALID_CLUSTER_SIZE
        count._obj.value = device.clusters
        return 0


class CUDARuntimeError(RuntimeError):
    """The error that the CUDA runtime raises."""


def alloc_pinned_memory(size: int) -> PinnedMemory:
    device.pinned += 1
    return PinnedMemory(bytes([POISON]) * size)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two completed events."""
    if not (start_event.timed and end_event.timed):
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle: timing is disabled for an event")
    if not (start_event.done and end_event.done):
        raise CUDARuntimeError("cudaErrorNotReady: device not ready")
    return (end_event._time - start_event._time) * 1e3


class _MemoryPool:
    def free_all_blocks(self) -> None:
        """Do nothing, since the stand-in has no memory pool."""


class Library:
    """The module `cupy`."""

    ndarray = ndarray
    RawModule = RawModule
    __name__ = "tests.stand_ins.strict_cupy"
    __version__ = "stand-in"
    cuda = types.SimpleNamespace(
        Device=GPU,
        Event=Event,
        Stream=Stream,
        alloc_pinned_memory=alloc_pinned_memory,
        get_current_stream=lambda device_id=-1: _current.stream,
        driver=types.SimpleNamespace(
            occupancyMaxActiveBlocksPerMultiprocessor=lambda func, blockSize, dynamicSMemSize: device.blocks
        ),
        get_elapsed_time=get_elapsed_time,
        runtime=types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: 1,
            getDevice=GPU.get_current,
            # A small number of multiprocessors keeps the simulator fast.
            deviceGetAttribute=lambda attribute, device_id: {16: 16, 75: 9, 97: 227 << 10}[attribute],
            deviceGetPCIBusId=lambda device_id: "0000:00:00.0",
            memGetInfo=lambda: (3 << 30, 4 << 30),
            getDeviceProperties=lambda device_id: {
                "name": b"stand-in",
                "major": 9,
                "minor": 0,
                "multiProcessorCount": PROCESSORS,
                "sharedMemPerMultiprocessor": 228 << 10,
                "maxThreadsPerMultiProcessor": 2048,
                "sharedMemPerBlockOptin": 227 << 10,
            },
            driverGetVersion=lambda: 0,
            runtimeGetVersion=lambda: 0,
        ),
    )
    _core = types.SimpleNamespace(_routines_linalg=Linalg)

    def get_default_memory_pool(self) -> _MemoryPool:
        return _MemoryPool()

    def asnumpy(self, a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True) -> Any:
        return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)

    def __getattr__(self, name: str) -> Any:
        target = _check_name("cupy", name)
        function = getattr(np, name)
        if isinstance(function, np.ufunc):
            return _Ufunc(name, target)
        if not callable(function) or inspect.isclass(function):
            return function  # constants and dtypes

        def call(*args: Any, **kwargs: Any) -> Any:
            _check_keywords(f"cupy.{name}", target, args, kwargs)
            return _function(name, function, args, kwargs)

        return call


class _Ufunc:
    def __init__(self, name: str, target: Any):
        self._name, self._target = name, target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ufunc(self._name, *args, **kwargs)

    def at(self, a: ndarray, indices: Any, b: Any) -> None:
        if self._target is not None and not hasattr(self._target, "at"):
            raise AttributeError(f"cupy.{self._name} has no attribute 'at'")
        device.launches += 1
        getattr(np, self._name).at(a._a, _index(indices), _unwrap(b))


def _function(name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a function of the library that is not a universal function."""
    first = args[0]
    if name in FROM_HOST and not isinstance(first, ndarray):
        device.launches += 1
        return _wrap(np.array(first, *args[1:], **kwargs), ())
    if name in JOINING:
        wrong = [x for x in first if not isinstance(x, ndarray)]
    else:
        wrong = [] if name in WITHOUT_INPUT or isinstance(first, ndarray) else [first]
    if wrong:
        raise TypeError(f"cupy.{name}: expected device arrays, got {type(wrong[0])}")
    if name == "split":  # the split positions are on the host
        return _call(name, lambda a: function(a, *args[1:], **kwargs), (first,), {})
    result = _call(name, function, args, kwargs)
    return first if name in FROM_HOST and result._a is first._a else result


_current = types.SimpleNamespace(stream=Stream(null=True))
library = Library()


@contextmanager
def registered(real: Any = None, plain: bool = True) -> Iterator[Device]:
    """Inside this context, the stand-in is the device "cuda". Yields its counters.

    real   the module cupy, against which names and arguments are checked.
    plain  use only reference.py, with the same bits as on the CPU; otherwise, run the CUDA kernels in the simulator.
    """
    named, by_type, driver = dict(backend._backends), dict(backend._by_type), cuda.driver
    device.reset()
    cuda.driver = Driver  # type: ignore[assignment]
    device.real = real
    backend.register(backend.CudaBackend(library, plain))
    try:
        yield device
    finally:
        device.real = None
        device._queue.clear()  # discard copies that were never waited for
        cuda.driver = driver
        for registry, before in ((backend._backends, named), (backend._by_type, by_type)):
            registry.clear()
            registry.update(before)
