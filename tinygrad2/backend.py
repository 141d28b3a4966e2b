"""A backend: an array library, and the table of kernels that compute on its arrays.

Everything above this file asks the backend of the arrays at hand and never branches on a device or a dtype. The array
library is a parameter of the whole reference module, which is loaded once for each library, with that in place of `np`.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy

from tinygrad2 import reference

DTYPES = ("float32", "float64")
DEVICES = ("auto", "cpu", "cuda")


class Backend:
    """NumPy arrays in host memory; the base of every other backend.

    device   its name.
    np       the array library.
    kernels  x_forward / x_backward for every operation, by the names of reference.py.
    """

    def __init__(self, device: str, np: Any, kernels: Any):
        self.device = device
        self.np = np
        self.kernels = kernels

    def asarray(self, values: Any, dtype: Any = None) -> Any:
        """`values` (numbers, or an array on the host or the device) as an array of this backend."""
        return self.np.asarray(values, dtype=dtype)

    def upload(self, values: numpy.ndarray) -> Any:
        """A host array as an array of this backend, without waiting for the device; here, the array itself."""
        return values

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.np.zeros(shape, dtype=dtype)

    def to_host(self, array: Any) -> numpy.ndarray:
        """The array as a NumPy array, waiting for the device (the same memory, where it is on the host already)."""
        return numpy.asarray(array)

    def fetch(self, *scalars: Any) -> Fetch:
        """Begin to bring 0-d arrays to the host, without waiting for the device."""
        return Fetch([float(scalar) for scalar in scalars])

    def staging(self, array: Any, before: numpy.ndarray | None) -> numpy.ndarray:
        """Host memory for the values of a flat array: what it had before, where that fits; here, the array itself."""
        return array

    def download(self, array: Any, staging: numpy.ndarray) -> Callable[[], None]:
        """Begin to copy a flat array into its staging memory; what is returned waits until that is done."""
        return lambda: None

    def put_back(self, staging: numpy.ndarray, array: Any) -> None:
        """Copy the staging memory of a flat array into it, without waiting for the device."""

    def memory(self) -> tuple[int, int] | None:
        """(free, total) bytes of the device's own memory, or None where it uses the host's."""
        return None

    def name(self) -> str:
        """What computes, for people to read."""
        return self.device

    def moment(self) -> Any:
        """A point in the order of the computation, for `seconds`."""
        return time.perf_counter()

    def seconds(self, start: Any, stop: Any) -> float:
        """The time from one moment to another, waiting for the second."""
        return stop - start

    def __repr__(self) -> str:
        return f"Backend({self.device!r})"


class Fetch:
    """Numbers on their way from a device to the host."""

    def __init__(self, values: list[float]):
        self._values = values

    def ready(self) -> bool:
        """Whether `get` would return at once."""
        return True

    def get(self) -> list[float]:
        """The numbers, waiting for the device where they have not arrived."""
        return self._values


class CudaBackend(Backend):
    """CuPy arrays on one GPU, the current device of this process.

    The order of things. All work goes to CuPy's current stream, in the order in which it is launched, and a launch does
    not wait: the host runs ahead of the device. It comes together with it in four places only:
      - `upload` copies into pinned host memory and launches the copy to the device from there. A pinned buffer is used
        again when its copy is done; there are at most PINNED, so that the host can be a step or two ahead, not more.
      - `fetch` launches a copy of results into pinned memory; `Fetch.get` waits for that copy, a step later.
      - `download` launches one into memory that its owner keeps, and gives the waiting to whoever needs the copy.
      - `to_host` waits, for everything launched before.
    """

    PINNED = 16

    def __init__(self, cupy: Any):
        super().__init__("cuda", cupy, kernel_table(instantiate_reference(cupy), None))
        self._pinned: deque[tuple[Any, Any]] = deque()  # (buffer, event of its last copy), the oldest first
        self._landing: deque[tuple[Any, Any]] = deque()  # the same for fetches, which may be dropped before they arrive

    def upload(self, values: numpy.ndarray) -> Any:
        values = numpy.asarray(values, order="C")  # (ascontiguousarray would give a 0-d array an axis)
        raw = values.reshape(-1).view(numpy.uint8)
        buffer = self._take_pinned(raw.nbytes)
        buffer[: raw.nbytes] = raw
        array = self.np.empty(values.shape, dtype=values.dtype)
        stream = self.np.cuda.get_current_stream()
        array.set(buffer[: raw.nbytes].view(values.dtype).reshape(values.shape), stream=stream)
        self._pinned.append((buffer, stream.record()))
        return array

    def _take_pinned(self, nbytes: int) -> numpy.ndarray:
        """Pinned host memory of at least `nbytes` that no copy reads any more."""
        if self._pinned and (len(self._pinned) >= self.PINNED or self._pinned[0][1].done):
            buffer, event = self._pinned.popleft()
            event.synchronize()
            if buffer.nbytes >= nbytes:
                return buffer
        return numpy.frombuffer(self.np.cuda.alloc_pinned_memory(nbytes), dtype=numpy.uint8, count=nbytes)

    def to_host(self, array: Any) -> numpy.ndarray:
        return self.np.asnumpy(array)

    def fetch(self, *scalars: Any) -> Fetch:
        together = self.np.stack([self.np.asarray(scalar) for scalar in scalars])
        memory = self.np.cuda.alloc_pinned_memory(together.nbytes)
        landing = numpy.frombuffer(memory, dtype=together.dtype, count=len(scalars))
        stream = self.np.cuda.get_current_stream()
        together.get(stream=stream, out=landing, blocking=False)
        event = stream.record()
        while self._landing and self._landing[0][1].done:
            self._landing.popleft()
        self._landing.append((landing, event))
        return CudaFetch(event, landing, together)

    def staging(self, array: Any, before: numpy.ndarray | None) -> numpy.ndarray:
        if before is not None and (before.shape, before.dtype) == (array.shape, array.dtype):
            return before
        memory = self.np.cuda.alloc_pinned_memory(array.nbytes)
        return numpy.frombuffer(memory, dtype=array.dtype, count=array.size)

    def download(self, array: Any, staging: numpy.ndarray) -> Callable[[], None]:
        stream = self.np.cuda.get_current_stream()
        array.get(stream=stream, out=staging, blocking=False)
        return stream.record().synchronize

    def put_back(self, staging: numpy.ndarray, array: Any) -> None:
        array.set(staging, stream=self.np.cuda.get_current_stream())

    def memory(self) -> tuple[int, int]:
        return self.np.cuda.runtime.memGetInfo()

    def name(self) -> str:
        runtime = self.np.cuda.runtime
        return f"{self.device}: {runtime.getDeviceProperties(runtime.getDevice())['name'].decode()}"

    def moment(self) -> Any:
        return self.np.cuda.get_current_stream().record()

    def seconds(self, start: Any, stop: Any) -> float:
        stop.synchronize()
        return self.np.cuda.get_elapsed_time(start, stop) / 1000


class CudaFetch(Fetch):
    """Numbers in a copy that a CUDA event follows; the device's side is kept until it has been made."""

    def __init__(self, event: Any, landing: numpy.ndarray, source: Any):
        self._event, self._landing, self._source = event, landing, source

    def ready(self) -> bool:
        return self._event.done

    def get(self) -> list[float]:
        self._event.synchronize()
        return self._landing.tolist()


def instantiate_reference(library: Any) -> ModuleType:
    """The module reference.py once more, with `library` as its array library."""
    spec = importlib.util.find_spec("tinygrad2.reference")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.np = library  # type: ignore[attr-defined]
    return module


def kernel_table(base: ModuleType, overrides: ModuleType | None) -> SimpleNamespace:
    """Every function of the reference module `base`, or the override of its name where there is one."""
    functions = {name: f for name, f in vars(base).items() if callable(f) and not name.startswith("_")}
    return SimpleNamespace(**{name: getattr(overrides, name, f) for name, f in functions.items()})


def _cpu_overrides() -> ModuleType | None:
    """The compiled kernels, unless TINYGRAD2_KERNELS=reference, or where Numba cannot be imported."""
    if os.environ.get("TINYGRAD2_KERNELS") == "reference":
        return None
    try:
        from tinygrad2.kernels import cpu
    except ImportError:
        return None
    return cpu


_backends: dict[str, Backend] = {"cpu": Backend("cpu", numpy, kernel_table(reference, _cpu_overrides()))}
_by_type: dict[type, Backend] = {numpy.ndarray: _backends["cpu"]}
_gpu = 0  # the number of the GPU that a CUDA backend computes on, modulo how many there are


def choose_gpu(number: int) -> None:
    """Have this process, one of several on its machine, compute on a GPU of its own, where there are as many."""
    global _gpu
    _gpu = number


def register(backend: Backend) -> Backend:
    """Make a backend known under its device's name and to backend_of."""
    _backends[backend.device] = backend
    _by_type[backend.np.ndarray] = backend
    return backend


def get_backend(device: str = "cpu") -> Backend:
    """The backend of "cpu" or "cuda", built once; "auto" is "cuda" where it works and "cpu" elsewhere.

    Raises ValueError where the device is not available, saying what is missing.
    """
    if device == "auto":
        try:
            return get_backend("cuda")
        except ValueError:
            return get_backend("cpu")
    if device not in DEVICES:
        raise ValueError(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}")
    return _backends.get(device) or register(CudaBackend(_import_cupy()))


def _import_cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        missing = "CuPy is not installed" if error.name == "cupy" else f"CuPy cannot be imported ({error})"
        raise ValueError(
            f"device 'cuda': {missing}; pip install -e \".[cuda13]\" (or cuda12, for a driver of CUDA 12: nvidia-smi "
            f"names the version)"
        ) from None
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ValueError(
            f"device 'cuda': no NVIDIA driver that works was found ({error}); does nvidia-smi run, and is its CUDA "
            f"version at least that of the installed CuPy?"
        ) from None
    if devices == 0:
        raise ValueError("device 'cuda': the driver shows no GPU; CUDA_VISIBLE_DEVICES may hide it")
    cupy.cuda.Device(_gpu % devices).use()
    return cupy


def backend_of(array: Any) -> Backend:
    """The backend whose arrays are of this array's type. Raises TypeError where there is none."""
    backend = _by_type.get(type(array))
    if backend is None:
        if isinstance(array, numpy.ndarray | numpy.generic):  # memory-mapped files, and NumPy's own scalars
            return _backends["cpu"]
        raise TypeError(f"expected an array, got {type(array).__name__}; wrap values as Tensor(...) or an array first")
    return backend


def check_dtype(dtype: Any) -> numpy.dtype:
    """`dtype` as a NumPy dtype. Raises ValueError where parameters cannot have it."""
    name = dtype if isinstance(dtype, str) else numpy.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; choose one of {', '.join(DTYPES)}")
    return numpy.dtype(name)
