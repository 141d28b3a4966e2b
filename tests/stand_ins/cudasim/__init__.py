"""cupy.RawModule on a CPU: the same CUDA C++ compiled by g++ with cudasim.h, run on NumPy arrays.

The comment at the top of cudasim.h describes what it detects and what it cannot detect.
"""

import ctypes
import hashlib
import math
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir()) / "tinygrad2-cudasim"
KERNEL = re.compile(r'extern "C" __global__ void(?:\s+__launch_bounds__\([^()]*\)(?: [A-Z_]+)?)?\s+(\w+)\(')
BOUNDS = re.compile(r"__launch_bounds__\(([^()]*)\)(?: [A-Z_]+)?\s+(\w+)\(")
SHARED = re.compile(r"__shared__\s+([^;()]+);")

# -fno-gnu-unique: otherwise, libraries compiled from one source with different constants would share the static
# variables of its functions.
FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-ffp-contract=off"),
    *("-fno-gnu-unique", "-fsanitize=alignment"),
)
shared_memory = 227 << 10  # maximum number of bytes per block, as on an H100
schedule = 0  # order of a block's threads: 0 first warp ahead, 1 last warp ahead, 2 and more random


def need_compiler():
    """Skip the test if kernels cannot be compiled for this machine."""
    if shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("running CUDA C++ on the CPU needs g++ and an x86-64 processor")


def array_of(x):
    """The NumPy array of an argument (for a device array of the stand-in, its attribute `_a`)."""
    return getattr(x, "_a", x)


def _poisoned(declaration):
    """A declaration of static shared memory, followed by code that fills it with NaN in each block."""
    names = re.findall(r"(\w+)\s*(?:\[[^\]]*\]\s*)*(?:,|$)", declaration[1])
    return " ".join([declaration[0], *(f"CUDASIM_POISON({name});" for name in names)])


def compiled(text, options):
    """Compile cudasim.h followed by some C++ code to a library, which is cached on disk."""
    text = f'#include "{HERE}/cudasim.h"\n#line 1\n{text}'
    known = (HERE / "cudasim.h").read_bytes() + text.encode() + repr((FLAGS, options)).encode()
    key = hashlib.sha256(known).hexdigest()[:16]
    library = CACHE / f"{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            made = Path(folder) / "made.so"
            command = ["g++", *FLAGS, "-x", "c++", "-", "-o", str(made), *options]
            subprocess.run(command, input=text.encode(), check=True)
            made.replace(library)
    return ctypes.CDLL(str(library))


class RawModule:
    """Like cupy.RawModule: get_function(name)(grid, block, args, shared_mem=n)."""

    def __init__(self, code, options=(), enable_cooperative_groups=False):
        need_compiler()
        bounds = {name: bounds for bounds, name in BOUNDS.findall(code)}
        exports = "".join(f"CUDASIM_EXPORT({name}, {bounds.get(name, 1024)})\n" for name in KERNEL.findall(code))
        defines = [option for option in options if option.startswith("-D")]
        self.library = compiled(f"{SHARED.sub(_poisoned, code)}\n{exports}", defines)

    def get_function(self, name):
        return Function(self.library, name)


class Function:
    """A kernel. Its arguments are checked for mistakes that CuPy does not detect."""

    def __init__(self, library, name, static=0):
        """static: bytes of the kernel's static shared memory, which precedes its dynamic shared memory."""
        self._most = 48 << 10
        self.name, self._static = name, static
        of = {what: getattr(library, f"cudasim_{what}_{name}") for what in ("launch", "params", "bound")}
        self.launch, parameters, self.bound = of["launch"], of["params"], of["bound"]()
        self.launch.restype = parameters.restype = ctypes.c_char_p
        self.kinds = parameters().decode().split()

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._most

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size):
        if size > shared_memory:
            raise ValueError(f"{self.name}: {size} bytes of shared memory; the limit per block is {shared_memory}")
        self._most = size

    def __call__(self, grid, block, args, *, shared_mem=0):
        if len(args) != len(self.kinds):
            raise TypeError(f"{self.name} takes {len(self.kinds)} arguments, {len(args)} given")
        if min(grid) < 1 or min(block) < 1 or math.prod(block) > self.bound or max((*grid, 1, 1)[1:]) > 65535:
            raise ValueError(f"{self.name}: no GPU supports grid {grid} with blocks of {block} (bound: {self.bound})")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise ValueError(f"{self.name}: {shared_mem} bytes of shared memory; set max_dynamic_shared_size_bytes")
        cells = [self.cell(i, value, kind) for i, (value, kind) in enumerate(zip(args, self.kinds, strict=True))]
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        sizes = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
        arrays = [x for x in map(array_of, args) if isinstance(x, np.ndarray)]
        if any(x.dtype == np.uint64 for x in arrays):
            arrays = []  # a table of addresses, which may point into any array
        spans = (ctypes.c_size_t * (2 * len(arrays)))(*(n for x in arrays for n in (x.ctypes.data, x.nbytes)))
        error = self.launch(sizes, ctypes.c_size_t(shared_mem + self._static), pointers, schedule, spans, len(arrays))
        if error:
            raise RuntimeError(f"{self.name}: {error.decode()}")

    def cell(self, i, value, kind):
        value = array_of(value)
        if kind == "p":  # CuPy passes only the pointer, so strides would be ignored
            if value is None:
                return ctypes.c_void_p(None)
            if isinstance(value, np.ndarray) and value.flags.c_contiguous:
                return ctypes.c_void_p(value.ctypes.data)
        elif isinstance(value, np.generic) and value.dtype.kind in "V" + kind[0] and str(value.itemsize) == kind[1:]:
            return ctypes.create_string_buffer(value.tobytes())  # CuPy would pass a Python number as 8 bytes
        raise TypeError(f"{self.name}: argument {i} must be {kind}, got {type(value)} {getattr(value, 'dtype', '')}")
