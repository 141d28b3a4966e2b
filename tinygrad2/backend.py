"""A backend: an array library, and the table of kernels that operate on its arrays.

Higher layers use the backend of the arrays that they are given, and never branch on a device or a dtype. The array
library is a parameter of the reference module: the module is loaded once per library, with that library as its `np`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy
from numpy.typing import ArrayLike, DTypeLike

from tinygrad2 import forks, gpus, machine, memory
from tinygrad2.array import Array
from tinygrad2.files import write_error
from tinygrad2.kernels.cuda import CudaKernels, Kernel, cpp_type, ordering_event, tensor_cores_support
from tinygrad2.precision import Precision, PrecisionLike

if TYPE_CHECKING:
    from tinygrad2.kernels.program import Program

DEVICES = ("auto", "cpu", "cuda")

Library = Any  # the module numpy or cupy, or a stand-in
Scalar = Array | float
Timestamp = Any  # seconds, or an event in a CUDA stream


class Event(Protocol):
    """An event in a CUDA stream."""

    @property
    def done(self) -> bool: ...
    def synchronize(self) -> None: ...


class Backend:
    """NumPy arrays in host memory. This is also the base class of the other backends.

    device   the name of the device.
    np       the array library.
    kernels  the functions x_forward and x_backward of every operation x, named as in reference.py.
    cuda     features of NVIDIA GPUs; None on other devices.
    recompute_outputs  minimum number of outputs for which `linear` saves the recipe of its input (see recipes.py)
                       instead of the input. Recomputing it is then cheap, compared with the layer's three products.
    logits_bytes       maximum size of the logits in ops.lm_head_gradients.
    """

    recompute_outputs: float = 768
    logits_bytes: float = 1 << 26

    def __init__(self, device: str, np: Library, kernels: SimpleNamespace, cuda: Cuda | None = None):
        self.device = device
        self.np = np
        self.kernels = kernels
        self.cuda = cuda

    def kernels_for(self, tf32: bool) -> SimpleNamespace:
        """The table of kernels or, if `tf32`, a table in which float32 matrix products round their operands to TF32.
        Raises ValueError if the device does not support TF32."""
        if tf32:
            raise ValueError(f"tf32 needs a GPU; the arrays are on {self.device}")
        return self.kernels

    def asarray(self, values: ArrayLike | Array, dtype: DTypeLike | None = None) -> Array:
        """Convert `values` (numbers, or an array on the host or the device) to an array of this backend."""
        return self.np.asarray(values, dtype=dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return self.np.zeros(shape, dtype=dtype)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An uninitialized array for temporary values, with memory from a pool."""
        return memory.empty(shape, dtype)

    def upload(self, values: numpy.ndarray) -> Array:
        """Copy a host array to the device without waiting for the device. On the CPU, returns the array itself."""
        return values

    def to_host(self, array: Array) -> numpy.ndarray:
        """Convert to a NumPy array, after waiting for the device. An array on the host is not copied."""
        return numpy.asarray(array)

    def fetch(self, *scalars: Scalar) -> PendingScalars:
        """Start copying 0-d arrays to the host, without waiting for the device."""
        return PendingScalars([float(scalar) for scalar in scalars])

    def staging(self, array: Any, previous: numpy.ndarray | None) -> numpy.ndarray:
        """Host memory for copying a flat array: `previous` if it fits, or new memory. On the CPU, the array itself."""
        return array

    def download(self, array: Any, staging: numpy.ndarray) -> Callable[[], None]:
        """Start copying a flat array to its staging memory. Returns a function that waits until the copy is done."""
        return lambda: None

    def copy_back(self, staging: numpy.ndarray, array: Any) -> None:
        """Copy a flat array back from its staging memory, without waiting for the device."""

    def memory(self) -> tuple[int, int] | None:
        """Return (free, total) bytes of device memory, or None if the device uses the host's memory."""
        return None

    def name(self) -> str:
        """The name of the device, for messages."""
        return self.device

    def unsupported_reason(self, precision: PrecisionLike, head_size: int | None = None) -> str | None:
        """Why this device does not support a precision, with attention heads of this size; None if it does."""
        wanted = Precision.of(precision)
        if wanted.copies and _cpu_overrides() is None:
            return f"{wanted.name} needs the compiled kernels, which need Numba (see python -m gpt2.doctor)"
        return f"{wanted.name} needs a GPU" if wanted.tf32 else None

    def slow_reason(self, precision: PrecisionLike) -> str | None:
        """Why this device emulates a precision with slower arithmetic; None if it has instructions for it."""
        overrides = _cpu_overrides()
        return overrides.onednn.unavailable_reason() if overrides and Precision.of(precision).copies else None

    def clear(self, array: Array) -> None:
        """Fill a flat array with zeros."""
        if (overrides := _cpu_overrides()) is None:
            array[...] = 0
        else:
            overrides.pool.clear(array)

    def convert(self, values: Array, out: Array) -> None:
        """out = values, rounded to the dtype of out. Both are contiguous, and float32 or bfloat16."""
        if (overrides := _cpu_overrides()) is None:
            out[...] = values.astype(out.dtype)
        else:
            overrides.convert(values, out)

    def cast(self, values: Array, dtype: DTypeLike) -> Array:
        """A contiguous array of float32 or bfloat16 in this dtype: the array itself if it already has it."""
        if values.dtype == numpy.dtype(dtype):
            return values
        out = self.empty(values.shape, dtype)
        self.convert(values, out)
        return out

    def program(self, rows: int, head_size: int) -> Program | None:
        """An empty program (see kernels/program.py) for activations with this number of rows and attention heads of
        this size; None if they are not supported."""
        if self.cuda is not None or _cpu_overrides() is None:
            return None
        from tinygrad2.kernels.program import Program

        return Program() if Program.supports(rows, head_size) else None

    def timestamp(self) -> Timestamp:
        """A timestamp in the device's stream, to pass to `seconds`."""
        return time.perf_counter()

    def seconds(self, start: Timestamp, stop: Timestamp) -> float:
        """The time between two timestamps, after waiting for the second one."""
        return stop - start

    def __repr__(self) -> str:
        return f"Backend({self.device!r})"


class PendingScalars:
    """Scalars that are being copied from the device to the host."""

    def __init__(self, values: list[float]):
        self._values = values

    def ready(self) -> bool:
        """Whether `get` would return immediately."""
        return True

    def get(self) -> list[float]:
        """The values, after waiting for the copy."""
        return self._values


class Limits(NamedTuple):
    """The limits of a GPU.

    processors     number of multiprocessors; at least this number of blocks can run concurrently.
    shared_memory  maximum number of bytes of shared memory per block.
    capability     the major compute capability; thread block clusters need 9 or more.
    """

    processors: int
    shared_memory: int
    capability: int


class Cuda:
    """Features of NVIDIA GPUs: kernels in CUDA C++, limits, NCCL, peak rates.

    np         CuPy, or a stand-in.
    launchers  the launchers in kernels/cuda.py; None if reference.py computes everything.
    """

    def __init__(self, np: Library, launchers: CudaKernels | None):
        self._np = np
        self.launchers = launchers

    def kernel(self, file: Path, name: str, *, shared: int = 0, cooperative: bool = False, **defines: Any) -> Kernel:
        """The kernel `name` in a CUDA C++ file, compiled with these constants on first use.

        shared       bytes of dynamic shared memory per launch.
        cooperative  whether its blocks wait for each other; required by launch_alone.
        """
        return self._needed().function(file, name, shared=shared, cooperative=cooperative, **defines)

    def launch_alone(self, kernel: Kernel, blocks: int, threads: int, arguments: Any, shared: int) -> None:
        """Launch a cooperative kernel after all earlier ones have finished. Raises ValueError if its blocks cannot all
        run at the same time."""
        self._needed().launch_alone(kernel, blocks, threads, arguments, shared)

    def blocks_at_once(self, kernel: Kernel, threads: int, shared: int) -> int:
        """The number of blocks of a kernel that can run concurrently."""
        return self._needed().blocks_at_once(kernel, threads, shared)

    def limits(self) -> Limits | None:
        """The limits of this GPU; None if TINYGRAD2_KERNELS=reference disables kernels."""
        if self.launchers is None:
            return None
        runtime = self._np.cuda.runtime
        device = runtime.getDevice()
        return Limits(*(runtime.deviceGetAttribute(attribute, device) for attribute in (16, 97, 75)))  # cudaDeviceAttr

    def clusters_at_once(self, kernel: Kernel, blocks: int, threads: int, shared: int) -> int:
        """The number of thread block clusters of a kernel that can run concurrently, in a grid of `blocks` blocks with
        `threads` threads and `shared` bytes of shared memory each."""
        return self._needed().clusters_at_once(kernel, blocks, threads, shared)

    @staticmethod
    def type_name(dtype: str) -> str | None:
        """The CUDA C++ name of a dtype, or None if the kernels do not support it."""
        return cpp_type(dtype)

    def unsupported_reason(self, precision: PrecisionLike, head_size: int | None) -> str | None:
        """See Backend.unsupported_reason."""
        wanted = Precision.of(precision)
        if not wanted.trains:
            return f"{wanted.name} (only weights in {wanted.matrices}) is supported only on the CPU"
        if not (wanted.copies or wanted.tf32):
            return None
        capability = int(self._np.cuda.Device().compute_capability)
        if capability < 80:
            return f"{wanted.name} needs a GPU with compute capability 8.0 or higher; this one has {capability / 10}"
        if wanted.copies and self.launchers is None:
            return f"{wanted.name} needs the CUDA kernels, which TINYGRAD2_KERNELS=reference disables"
        if wanted.copies and head_size is not None and not tensor_cores_support(head_size):
            return f"{wanted.name} needs a head size that is a multiple of 16, at most 128; got {head_size}"
        return None

    def peak(self, precision: PrecisionLike) -> float | None:
        """The peak rate for a precision in TFLOP/s, or None if unknown."""
        return gpus.peak_tflops(self.gpu_name(), Precision.of(precision).name)

    def event(self, stream: Any = None) -> Event:
        """An event recorded in a stream (by default the current one), to wait for. It does not measure time."""
        return ordering_event(self._np.cuda, stream)

    def gpu_name(self) -> str:
        """The name of the GPU, from the driver."""
        runtime = self._np.cuda.runtime
        return runtime.getDeviceProperties(runtime.getDevice())["name"].decode()

    def address(self) -> str:
        """The PCI address of the GPU, which is unique on its machine."""
        runtime = self._np.cuda.runtime
        return runtime.deviceGetPCIBusId(runtime.getDevice())

    def nccl(self) -> Any:
        """CuPy's NCCL bindings, or None if NCCL is not installed."""
        try:
            with warnings.catch_warnings(action="ignore"):  # warnings about a missing library
                nccl = importlib.import_module(f"{self._np.__name__}.cuda.nccl")
        except ImportError:
            return None
        return nccl if nccl.available else None

    def _needed(self) -> CudaKernels:
        if self.launchers is None:
            raise RuntimeError("TINYGRAD2_KERNELS=reference disables the CUDA kernels")
        return self.launchers


class CudaBackend(Backend):
    """CuPy arrays on a single GPU, the current device of this process.

    All threads of a process use the same GPU. (In CUDA, each thread has its own current device, initially GPU 0.)

    All work is submitted to CuPy's current stream, in launch order. Launches are asynchronous, so the host runs ahead
    of the device. They synchronize in only four places:
      - `upload` copies to pinned host memory and launches the copy to the device from there. A pinned buffer is reused
        when its copy is done. There are at most PINNED buffers, so the host is at most a step or two ahead.
      - `fetch` launches a copy of results to pinned memory; `PendingScalars.get` waits for that copy, a step later.
      - `download` launches a copy to memory that its owner keeps; the owner waits when it needs the values.
      - `to_host` waits for everything launched before.

    plain  use only reference.py; otherwise, use the kernels in kernels/cuda.py for the operations that they support.
    """

    PINNED = 16
    recompute_outputs = numpy.inf  # never recompute: the kernels are memory-bound, while matrix products are fast
    logits_bytes = numpy.inf  # (the option --head-rows limits them)

    cuda: Cuda

    def __init__(self, cupy: Library, plain: bool = False):
        base = instantiate_reference(cupy)
        overrides = None if plain else CudaKernels(cupy, base)
        super().__init__("cuda", cupy, kernel_table(base, overrides), Cuda(cupy, overrides))
        self._gpu: int = cupy.cuda.runtime.getDevice()
        linalg = cupy._core._routines_linalg
        linalg.set_compute_type("f", linalg.COMPUTE_TYPE_DEFAULT)  # ignore CUPY_TF32
        in_tf32 = reference_in_tf32(cupy, base)
        self._tf32_kernels = kernel_table(in_tf32, None if overrides is None else overrides.in_tf32(in_tf32))
        self._pinned: deque[tuple[numpy.ndarray, Event]] = deque()  # (buffer, event after its last copy), oldest first
        self._fetched: deque[tuple[numpy.ndarray, Event]] = deque()  # the same for fetches (may be dropped)

    def kernels_for(self, tf32: bool) -> SimpleNamespace:
        return self._tf32_kernels if tf32 else self.kernels

    def check_gpu(self, gpu: int | None = None) -> None:
        """Raise ValueError if `gpu`, by default the current device of this thread, is not the GPU of this process."""
        gpu = self.np.cuda.runtime.getDevice() if gpu is None else gpu
        if gpu != self._gpu:
            raise ValueError(
                f"device 'cuda': this process computes on GPU {self._gpu}, got GPU {gpu}; a process uses one GPU: "
                f"choose it with CUDA_VISIBLE_DEVICES, and use several with mpirun"
            )

    def asarray(self, values: ArrayLike | Array, dtype: DTypeLike | None = None) -> Array:
        if isinstance(values, self.np.ndarray):
            self.check_gpu(values.device.id)
        return super().asarray(values, dtype)

    def upload(self, values: numpy.ndarray) -> Array:
        values = numpy.asarray(values, order="C")  # ascontiguousarray would add an axis to a 0-d array
        raw = values.reshape(-1).view(numpy.uint8)
        buffer = self._take_pinned(raw.nbytes)
        buffer[: raw.nbytes] = raw
        array = self.np.empty(values.shape, dtype=values.dtype)
        stream = self.np.cuda.get_current_stream()
        array.set(buffer[: raw.nbytes].view(values.dtype).reshape(values.shape), stream=stream)
        self._pinned.append((buffer, self.cuda.event()))
        return array

    def _take_pinned(self, nbytes: int) -> numpy.ndarray:
        """Pinned host memory of at least `nbytes` that no pending copy uses."""
        if self._pinned and (len(self._pinned) >= self.PINNED or self._pinned[0][1].done):
            buffer, event = self._pinned.popleft()
            event.synchronize()
            if buffer.nbytes >= nbytes:
                return buffer
        return numpy.frombuffer(self.np.cuda.alloc_pinned_memory(nbytes), dtype=numpy.uint8, count=nbytes)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return self.np.empty(shape, dtype=dtype)

    def to_host(self, array: Array) -> numpy.ndarray:
        return self.np.asnumpy(array)

    def fetch(self, *scalars: Scalar) -> PendingScalars:
        stacked = self.np.stack([self.np.asarray(scalar) for scalar in scalars])
        memory = self.np.cuda.alloc_pinned_memory(stacked.nbytes)
        host = numpy.frombuffer(memory, dtype=stacked.dtype, count=len(scalars))
        stream = self.np.cuda.get_current_stream()
        stacked.get(stream=stream, out=host, blocking=False)
        event = self.cuda.event()
        while self._fetched and self._fetched[0][1].done:
            self._fetched.popleft()
        self._fetched.append((host, event))
        return CudaPendingScalars(event, host, stacked)

    def staging(self, array: Array, previous: numpy.ndarray | None) -> numpy.ndarray:
        if previous is not None and (previous.shape, previous.dtype) == (array.shape, array.dtype):
            return previous
        memory = self.np.cuda.alloc_pinned_memory(array.nbytes)
        return numpy.frombuffer(memory, dtype=array.dtype, count=array.size)

    def download(self, array: Any, staging: numpy.ndarray) -> Callable[[], None]:
        stream = self.np.cuda.get_current_stream()
        array.get(stream=stream, out=staging, blocking=False)
        event = self.cuda.event()

        def wait() -> None:
            self.np.cuda.Device(self._gpu).use()  # otherwise a new thread would create a context on GPU 0
            event.synchronize()

        return wait

    def copy_back(self, staging: numpy.ndarray, array: Any) -> None:
        array.set(staging, stream=self.np.cuda.get_current_stream())

    def memory(self) -> tuple[int, int]:
        return self.np.cuda.runtime.memGetInfo()

    def name(self) -> str:
        return f"{self.device}: {self.cuda.gpu_name()}"

    def unsupported_reason(self, precision: PrecisionLike, head_size: int | None = None) -> str | None:
        return self.cuda.unsupported_reason(precision, head_size)

    def slow_reason(self, precision: PrecisionLike) -> str | None:
        return None

    def clear(self, array: Array) -> None:
        array[...] = 0

    def convert(self, values: Array, out: Array) -> None:
        out[...] = values.astype(out.dtype)

    def timestamp(self) -> Timestamp:
        return self.np.cuda.get_current_stream().record()

    def seconds(self, start: Timestamp, stop: Timestamp) -> float:
        stop.synchronize()
        return self.np.cuda.get_elapsed_time(start, stop) / 1000


class CudaPendingScalars(PendingScalars):
    """Scalars whose copy is followed by a CUDA event. The device array is kept alive until the copy is done."""

    def __init__(self, event: Event, host: numpy.ndarray, source: Array):
        self._event, self._host, self._source = event, host, source

    def ready(self) -> bool:
        return self._event.done

    def get(self) -> list[float]:
        self._event.synchronize()
        return self._host.tolist()


def instantiate_reference(library: Library) -> ModuleType:
    """A new instance of the module reference.py, with `library` as its array library."""
    spec = importlib.util.find_spec("tinygrad2.reference")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.np = library  # type: ignore[attr-defined]
    return module


def reference_in_tf32(cupy: Library, base: ModuleType) -> SimpleNamespace:
    """The functions of the reference module `base`, with float32 matrix products in TF32.

    CuPy's setting is global to the process, so it is changed while a function runs and restored afterwards.
    """
    linalg = cupy._core._routines_linalg

    def in_tf32(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            before = linalg.get_compute_type("f")
            linalg.set_compute_type("f", linalg.COMPUTE_TYPE_TF32)
            try:
                return function(*arguments)
            finally:
                linalg.set_compute_type("f", before)

        return call

    return SimpleNamespace(**{name: in_tf32(f) for name, f in kernel_functions(base).items()})


def kernel_functions(base: ModuleType | SimpleNamespace) -> dict[str, Callable[..., Any]]:
    """The public functions of the reference module, by name."""
    return {name: f for name, f in vars(base).items() if callable(f) and not name.startswith("_")}


def kernel_table(base: ModuleType | SimpleNamespace, overrides: object | None) -> SimpleNamespace:
    """Every function of the reference module `base`, or the override of the same name if there is one."""
    return SimpleNamespace(**{name: getattr(overrides, name, f) for name, f in kernel_functions(base).items()})


def _reference_only() -> bool:
    """Whether to use only reference.py."""
    return os.environ.get("TINYGRAD2_KERNELS") == "reference"


def _cpu_overrides() -> ModuleType | None:
    """The compiled kernels; None if TINYGRAD2_KERNELS=reference is set or Numba cannot be imported."""
    if _reference_only():
        return None
    try:
        from tinygrad2.kernels import cpu
    except ImportError:
        return None
    return cpu


_backends: dict[str, Backend] = {
    "cpu": Backend("cpu", numpy, kernel_table(instantiate_reference(forks.guarded_numpy), _cpu_overrides()))
}
_by_type: dict[type, Backend] = {numpy.ndarray: _backends["cpu"]}
_gpu = 0  # the number of this process's GPU; see choose_gpu


def choose_gpu(number: int) -> None:
    """Select the GPU of this process: `number` modulo the number of GPUs of the machine.

    Raises ValueError if the process has already used a GPU."""
    global _gpu
    if "cuda" in _backends:
        raise ValueError("the GPU of this process must be chosen before it is used: call world() first")
    _gpu = number


def silence_compile_notice() -> None:
    """Suppress the notice that kernels are being compiled, so that only the first of several processes prints it."""
    if cpu := _cpu_overrides():
        cpu.notice.said = True


def register(backend: Backend) -> Backend:
    """Register a backend by its device name, for get_backend, and by its array type, for backend_of."""
    _backends[backend.device] = backend
    _by_type[backend.np.ndarray] = backend
    return backend


def get_backend(device: str = "cpu") -> Backend:
    """The backend for "cpu" or "cuda", created once. "auto" means "cuda" if it is available, else "cpu".

    Raises ValueError if the device is not available; the message names what is missing.
    """
    if device == "auto":
        try:
            return get_backend("cuda")
        except ValueError:
            if "cuda" in _backends:  # it is available, but this thread uses another GPU
                raise
            return get_backend("cpu")
    if device not in DEVICES:
        number = device.removeprefix("cuda:")
        hint = f"; a process uses one GPU: CUDA_VISIBLE_DEVICES={number} selects this one" if number.isdigit() else ""
        raise ValueError(f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}{hint}")
    if device == "cpu":
        return _backends[device]
    backend = _backends.get(device) or register(CudaBackend(_import_cupy(), plain=_reference_only()))
    assert isinstance(backend, CudaBackend)
    backend.check_gpu()
    return backend


def _import_cupy() -> Library:
    if write_error(machine.cache_folders()["CUPY_CACHE_DIR"]):  # CuPy cannot be imported without this folder
        os.environ["CUPY_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"cupy-{machine.user()}")
    try:
        import cupy
    except (ImportError, OSError) as error:
        no_cupy = isinstance(error, ImportError) and error.name == "cupy"
        missing = "CuPy is not installed" if no_cupy else f"CuPy cannot be imported ({error})"
        raise ValueError(
            f"device 'cuda': {missing}; {machine.install_command('cuda13')} (or cuda12, for a CUDA 12 driver; "
            f"nvidia-smi prints the version)"
        ) from None
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise ValueError(
            f"device 'cuda': no working NVIDIA driver was found ({error}); check that nvidia-smi runs, and that its "
            f"CUDA version is at least that of the installed CuPy"
        ) from None
    if devices == 0:
        raise ValueError("device 'cuda': the driver reports no GPU; CUDA_VISIBLE_DEVICES may hide it")
    cupy.cuda.Device(_gpu % devices).use()
    return cupy


def backend_of(array: object) -> Backend:
    """The backend for arrays of this type. Raises TypeError if there is none."""
    backend = _by_type.get(type(array))
    if backend is None:
        if isinstance(array, numpy.ndarray | numpy.generic):  # includes memory-mapped files and NumPy scalars
            return _backends["cpu"]
        raise TypeError(f"expected an array, got {type(array).__name__}; wrap values as Tensor(...) or an array first")
    return backend
