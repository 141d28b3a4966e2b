"""A backend: an array library, and the table of kernels that compute on its arrays.

Everything above this file asks the backend of the arrays at hand and never branches on a device or a dtype. The array
library is a parameter of the whole reference module, which is loaded once for each library, with that in place of `np`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy

from tinygrad2 import reference
from tinygrad2.kernels.cuda import CudaKernels

DTYPES = ("float32", "float64")  # that parameters can have
# What a model can be told to compute in, and the type of its parameters then. tf32: float32 everywhere, but matrix
# products round what they read to 10 bits of fraction. bfloat16: activations, and the copies of weights that are read.
PRECISIONS = {"float32": "float32", "tf32": "float32", "bfloat16": "float32", "float64": "float64"}
DEVICES = ("auto", "cpu", "cuda")

# Peaks in TFLOP/s of GPUs, from NVIDIA's data sheets: dense (half of what they give with sparsity), summed in float32.
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
LESSER = r"\b(MIG|NVL|Laptop|D)\b"  # in the name of a GPU that is slower than the one it is named after


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

    def nccl(self) -> Any:
        """The binding of NCCL, which adds up arrays of several GPUs, or None where there is none."""
        return None

    def address(self) -> str:
        """Which device of this machine computes."""
        return self.device

    def lacks(self, precision: str) -> str | None:
        """Why this device does not train in one of PRECISIONS, or None where it does."""
        return None if PRECISIONS[precision] == precision else f"{precision} needs a GPU"

    def limits(self) -> dict[str, int]:
        """What bounds a kernel of CUDA C++ here; empty where there are no such kernels.

        processors     blocks of any size that certainly run at the same time.
        shared_memory  bytes that a block may have.
        capability     the major number of the compute capability; from 9 on there are thread block clusters.
        """
        return {}

    def kernel(self, file: Path, name: str, *, shared: int = 0, **defines: Any) -> Any:
        """A kernel in a file of CUDA C++ with these constants (see CudaKernels.function)."""
        raise RuntimeError(f"{file}: no CUDA kernels run on {self.name()}")

    def clusters_at_once(self, kernel: Any, blocks: int, threads: int, shared: int) -> int:
        """How many of a kernel's thread block clusters run at the same time, in a grid of so many blocks of so many
        threads and bytes of shared memory."""
        raise RuntimeError(f"no CUDA kernels run on {self.name()}")

    def use_tf32(self, on: bool) -> None:
        """Whether matrix products of float32 numbers may take TF32 from now on; a setting of the device."""

    def peak(self, precision: str) -> float | None:
        """The most TFLOP/s that the device does in one of PRECISIONS, or None where that is not known."""
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

    plain  reference.py computes everything; else the kernels in kernels/cuda.py do what they can.
    """

    PINNED = 16

    def __init__(self, cupy: Any, plain: bool = False):
        base = instantiate_reference(cupy)
        self._overrides = None if plain else CudaKernels(cupy, base)
        super().__init__("cuda", cupy, kernel_table(base, self._overrides))
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

    def nccl(self) -> Any:
        try:
            with warnings.catch_warnings(action="ignore"):  # about a library that is not there
                nccl = importlib.import_module(f"{self.np.__name__}.cuda.nccl")
        except ImportError:
            return None
        return nccl if nccl.available else None

    def address(self) -> str:
        runtime = self.np.cuda.runtime
        return runtime.deviceGetPCIBusId(runtime.getDevice())

    def lacks(self, precision: str) -> str | None:
        if PRECISIONS[precision] == precision:
            return None
        capability = int(self.np.cuda.Device().compute_capability)
        if capability < 80:
            return f"{precision} needs a GPU of compute capability 8.0 or more, this one has {capability / 10}"
        if precision == "bfloat16" and not self._overrides:
            return "bfloat16 needs the CUDA kernels, which TINYGRAD2_KERNELS=reference leaves out"
        return None

    def limits(self) -> dict[str, int]:
        if not self._overrides:
            return {}
        runtime = self.np.cuda.runtime
        device = runtime.getDevice()
        numbers = {"processors": 16, "shared_memory": 97, "capability": 75}  # of cudaDeviceAttr
        return {name: runtime.deviceGetAttribute(number, device) for name, number in numbers.items()}

    def kernel(self, file: Path, name: str, *, shared: int = 0, **defines: Any) -> Any:
        if not self._overrides:
            return super().kernel(file, name, shared=shared, **defines)
        return self._overrides.function(file, name, shared=shared, **defines)

    def clusters_at_once(self, kernel: Any, blocks: int, threads: int, shared: int) -> int:
        if not self._overrides:
            return super().clusters_at_once(kernel, blocks, threads, shared)
        return self._overrides.clusters_at_once(kernel, blocks, threads, shared)

    def use_tf32(self, on: bool) -> None:
        linalg = self.np._core._routines_linalg  # (CUPY_TF32 is read once, when CuPy is imported)
        linalg.set_compute_type("f", linalg.COMPUTE_TYPE_TF32 if on else linalg.COMPUTE_TYPE_DEFAULT)
        if self._overrides:
            self._overrides.use_tf32(on)

    def peak(self, precision: str) -> float | None:
        gpu = listed(self.name(), PEAK_TFLOPS)
        return None if gpu is None else PEAK_TFLOPS[gpu].get(precision)

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


def listed(name: str, table: Iterable[str]) -> str | None:
    """Which entry of the table a GPU of this name is, or None."""
    spelled = name.replace("-", " ")
    if re.search(LESSER, spelled):
        return None
    return next((gpu for gpu in table if re.search(rf"\b{gpu}\b", spelled)), None)


def instantiate_reference(library: Any) -> ModuleType:
    """The module reference.py once more, with `library` as its array library."""
    spec = importlib.util.find_spec("tinygrad2.reference")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.np = library  # type: ignore[attr-defined]
    return module


def kernel_table(base: ModuleType, overrides: Any) -> SimpleNamespace:
    """Every function of the reference module `base`, or the override of its name where there is one."""
    functions = {name: f for name, f in vars(base).items() if callable(f) and not name.startswith("_")}
    return SimpleNamespace(**{name: getattr(overrides, name, f) for name, f in functions.items()})


def _textbook() -> bool:
    """Whether reference.py is to compute everything."""
    return os.environ.get("TINYGRAD2_KERNELS") == "reference"


def _cpu_overrides() -> ModuleType | None:
    """The compiled kernels, unless TINYGRAD2_KERNELS=reference, or where Numba cannot be imported."""
    if _textbook():
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


def hide_notices() -> None:
    """Leave it to another process, the first of several, to say that kernels are being compiled."""
    if cpu := _cpu_overrides():
        cpu.notice.said = True


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
    return _backends.get(device) or register(CudaBackend(_import_cupy(), plain=_textbook()))


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
