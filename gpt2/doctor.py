"""What is wrong with this machine? `python -m gpt2.doctor` looks at all that the project uses, and says what to do.

A probe is a function that returns a Finding. Whatever it meets, it neither ends the program nor keeps it waiting: each
runs in a thread of its own with a time limit, and what may crash or hang in foreign code (importing NumPy, CuPy or MPI)
runs in a process of its own. This file needs the standard library only, and old Pythons can read it: it has to speak
where everything else is missing.
"""

from __future__ import annotations

if __name__ == "__main__":
    from gpt2 import console

    console.begin()

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OLDEST_PYTHON = (3, 11)
LIMIT = 90.0  # seconds for a probe
MEMORY_NEEDED, DISK_NEEDED = 0.5e9, 0.2e9  # bytes; training nano takes 0.35 GB, its checkpoints take 0.03 GB
SLOW_BLAS = 5e9  # float32 operations a second; any core of the last ten years makes several times as many

OK, MISSING, WRONG = "ok", "missing", "wrong"


@dataclass
class Finding:
    """What a probe found.

    verdict  ok; missing: something optional is not there; wrong: something will not work, or not well.
    text     what is there.
    remedy   what to do, where the verdict is not ok.
    needed   whether train.py cannot run without it.
    facts    what the command at the end depends on: threads, gpus, mpirun.
    """

    verdict: str
    text: str
    remedy: str = ""
    needed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Asking another process
# ---------------------------------------------------------------------------------------------------------------------


def call(command: Sequence[str], seconds: float = 60, **environment: str) -> tuple[str, str]:
    """(the output, "") of a command that succeeds, else ("", one line that says why). Its children end with it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    try:
        output, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=5)
        return "", f"no answer within {seconds:g} s"
    if process.returncode == 0:
        return output, ""
    if process.returncode < 0:
        return "", f"it was ended by signal {-process.returncode}"
    lines = (complaint.strip() or output.strip()).splitlines()
    return "", lines[-1].strip() if lines else f"it ended with status {process.returncode}"


def ask(code: str, *arguments: str, seconds: float = 60, **environment: str) -> dict[str, Any]:
    """The JSON object that Python code prints, run in a process of its own; {"error": one line} where it fails."""
    output, complaint = call([sys.executable, "-c", code, *arguments], seconds, **environment)
    return {"error": complaint} if complaint else json.loads(output.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Python, packages, BLAS, compiled kernels
# ---------------------------------------------------------------------------------------------------------------------


def probe_python() -> Finding:
    text = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    if tuple(sys.version_info[:2]) < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        return Finding(WRONG, text, f"install Python {oldest} or newer and make a virtual environment with it", True)
    return Finding(OK, text)


def requirements() -> list[tuple[str, str, str]]:
    """(name, oldest version, first version too new) of every package that the project needs."""
    import tomllib

    file = ROOT / "pyproject.toml"
    if file.is_file():
        lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = [line for line in metadata.requires("tinygrad2") or [] if "extra ==" not in line]
    found = (re.match(r"([\w.-]+)(?=.*>=([\d.]+))(?=.*<([\d.]+))", line) for line in lines)
    return [(match[1], match[2], match[3]) for match in found if match]


def numbers(version: str) -> tuple[int, ...]:
    """The first numbers of a version: "14.2.0rc1" is (14, 2, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


IMPORT = """
import importlib, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(failed))
"""


def probe_packages() -> Finding:
    """What pyproject.toml demands, but Numba, which has a probe of its own: there in the right version, importable."""
    there, bad = [], []
    for name, oldest, too_new in requirements():
        if name == "numba":
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            bad.append(f"{name} is not installed")
            continue
        there.append(f"{name} {version}")
        if not numbers(oldest) <= numbers(version) < numbers(too_new):
            bad.append(f"{name} is {version}; expected {oldest} or newer, below {too_new}")
    failed = ask(IMPORT, *(line.split()[0] for line in there))
    bad += [f"{name}: {reason}" for name, reason in failed.items()]
    if bad:
        remedy = f"{python()} -m pip install --upgrade -e {shlex.quote(str(ROOT))}"
        return Finding(WRONG, "; ".join(bad), remedy, needed=True)
    return Finding(OK, ", ".join(there))


BLAS = """
import json, time
from importlib import metadata
import numpy, threadpoolctl
found = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
mkl = None
try:
    from tinygrad2 import backend, blas
    if blas.USES_MKL and backend.get_backend("cpu").kernels.linear_forward.__module__ == "tinygrad2.kernels.cpu":
        mkl = metadata.version("mkl")
except Exception:  # the rows packages and numba say more
    pass
multiply = blas.gemm if mkl else numpy.matmul
x = numpy.ones((1024, 1024), dtype="float32")
y = numpy.empty_like(x)
def measure():
    began = time.perf_counter()
    multiply(x, x, y)
    return 2 * 1024**3 / (time.perf_counter() - began)
speed = max(measure() for _ in range(4))
print(json.dumps({"speed": speed, "found": found, "mkl": mkl}, default=str))
"""


def probe_blas() -> Finding:
    """The library that multiplies matrices, MKL or NumPy's: which, with how many threads, how fast."""
    said = ask(BLAS)
    if "error" in said:
        return Finding(WRONG, said["error"], "see the row packages", needed=True)
    speed = f"{said['speed'] / 1e9:,.0f} GFLOP/s in float32"
    if said["mkl"]:  # it computes each part of a product on the thread that asks for it
        return Finding(OK, f"MKL {said['mkl']}, {speed} on each thread; NumPy's own library is not used")
    if not said["found"] and said["speed"] < SLOW_BLAS:
        remedy = f"{python()} -m pip install --force-reinstall --only-binary :all: numpy"
        return Finding(WRONG, f"NumPy multiplies without an optimised library: {speed}", remedy)
    if not said["found"]:
        return Finding(OK, f"a library that threadpoolctl does not know (Accelerate, on a Mac): {speed}")
    library = said["found"][0]
    threads = library.get("num_threads")
    text = f"{library.get('internal_api')} {library.get('version') or ''}, {threads} threads, {speed}"
    names = [name for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ]
    if threads == 1 and names and usable_cores()[0] > 1:
        return Finding(WRONG, f"{text}: {names[0]}={os.environ[names[0]]} holds it back", f"unset {' '.join(names)}")
    if said["speed"] < SLOW_BLAS:
        return Finding(WRONG, f"{text}: slow", "are other programs at work? Else reinstall NumPy from its wheel")
    return Finding(OK, text)


NUMBA = """
import importlib.util, json, os
import numba
from tinygrad2.backend import get_backend
(folder,) = importlib.util.find_spec("tinygrad2.kernels").submodule_search_locations
names = {}
exec(compile("def probe(): pass", os.path.join(folder, "cpu.py"), "exec"), names)
try:
    cache = numba.njit(cache=True)(names["probe"]).stats.cache_path
except RuntimeError:
    cache = None
kept = sum(name.endswith(".nbc") for name in os.listdir(cache)) if cache else 0
table = vars(get_backend("cpu").kernels).values()
compiled = sum(f.__module__ == "tinygrad2.kernels.cpu" for f in table)
print(json.dumps({"version": numba.__version__, "cache": cache, "kept": kept, "compiled": compiled}))
"""


def probe_numba() -> Finding:
    """Whether the CPU computes with the compiled kernels, and where Numba keeps them."""
    if os.environ.get("TINYGRAD2_KERNELS") == "reference":
        return Finding(MISSING, "TINYGRAD2_KERNELS=reference asks for the plain NumPy path", "unset TINYGRAD2_KERNELS")
    said = ask(NUMBA)
    install = f'{python()} -m pip install --upgrade "numba>=0.60,<1"'
    if "error" in said:
        return Finding(MISSING, f"{said['error']}; plain NumPy computes, several times slower", install)
    if not said["compiled"]:
        return Finding(WRONG, f"Numba {said['version']} is there, but none of the kernels is in use", install)
    if said["cache"] is None:
        text = f"Numba {said['version']} finds no folder for compiled kernels: every start compiles for some 10 s"
        return Finding(WRONG, text, "set NUMBA_CACHE_DIR to a folder that can be written")
    state = f"{said['kept']} kept in" if said["kept"] else "they will be compiled at the first use, in some 10 s, into"
    return Finding(OK, f"Numba {said['version']}, {said['compiled']} compiled functions, {state} {said['cache']}")


# ---------------------------------------------------------------------------------------------------------------------
# Cores and memory, and what the control group leaves of them
# ---------------------------------------------------------------------------------------------------------------------


def cgroup_files(controller: str, name: str, name_v1: str, root: Path, process: Path) -> Iterator[Path]:
    """The files that limit this process, in its own control group and in those above it, of version 2 or 1."""
    if not process.is_file():
        return
    for line in process.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            file = place / (name_v1 if controllers else name)
            if file.is_file():
                yield file
            if place == base:
                break


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores' worth of time that the control groups allow, or None where they set no limit."""
    allowed = []
    for file in cgroup_files("cpu", "cpu.max", "cpu.cfs_quota_us", root, process):
        quota, *period = file.read_text(encoding="utf-8").split()
        if quota not in ("max", "-1"):
            each = period[0] if period else file.with_name("cpu.cfs_period_us").read_text(encoding="utf-8")
            allowed.append(int(quota) / int(each))
    return min(allowed, default=None)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int | None:
    """The bytes that the control groups allow, or None where they set no limit."""
    files = cgroup_files("memory", "memory.max", "memory.limit_in_bytes", root, process)
    said = [file.read_text(encoding="utf-8").strip() for file in files]
    return min((int(limit) for limit in said if limit != "max" and int(limit) < 1 << 60), default=None)


def usable_cores() -> tuple[int, float | None]:
    """(the cores that this process may use, the control group's limit)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, cpu_quota()


def processor() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def memory() -> tuple[float, float] | None:
    """(free, total) bytes of main memory, or None where the system does not say."""
    file = Path("/proc/meminfo")
    if file.is_file():
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(encoding="utf-8"), re.MULTILINE))
        free, total = 1024.0 * int(found["MemAvailable"]), 1024.0 * int(found["MemTotal"])
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        free = total = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    else:
        return None
    limit = memory_limit()
    return (free, total) if limit is None else (min(free, limit), min(total, limit))


def probe_cores() -> Finding:
    """How many threads can compute at the same time."""
    cores, quota = usable_cores()
    there = os.cpu_count() or cores
    text = f"{cores} of {there}, {processor()}"
    if quota is not None and quota < cores:
        fitting = max(1, int(quota))
        text = f"{text}; the control group allows the time of {quota:g}, so that {cores} threads would be held up"
        return Finding(WRONG, text, f"--threads {fitting}", facts={"threads": fitting})
    return Finding(OK, text)


def probe_memory() -> Finding:
    """How much is free, and which models fit."""
    there = memory()
    if there is None:
        return Finding(OK, "this system does not say how much there is")
    free, total = there
    text = f"{free / 1e9:,.1f} of {total / 1e9:,.1f} GB free"
    if free < MEMORY_NEEDED:
        return Finding(WRONG, text, f"end other programs: training nano takes {MEMORY_NEEDED / 1e9:g} GB", needed=True)
    from gpt2.config import PRESETS

    need = {name: sum(c.memory(1, c.n_positions).values()) * 1.2 for name, c in PRESETS.items()}
    fits = [name for name, size in need.items() if size < free]
    return Finding(OK, f"{text}: enough to train {', '.join(fits) or 'nothing'} (one sequence at a time)")


# ---------------------------------------------------------------------------------------------------------------------
# GPU and MPI
# ---------------------------------------------------------------------------------------------------------------------

DRIVER = """
import ctypes, json, sys
driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
version, count = ctypes.c_int(), ctypes.c_int()
driver.cuDriverGetVersion(ctypes.byref(version))
status = driver.cuInit(0)
driver.cuDeviceGetCount(ctypes.byref(count))
print(json.dumps({"version": version.value, "status": status, "gpus": count.value}))
"""

CUPY = """
import json
import cupy
x = cupy.ones((64, 64), dtype="float32")
right = float((x @ x + 1).sum()) == 64 * 64 * 65
free, total = cupy.cuda.runtime.memGetInfo()
name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
print(json.dumps({"version": cupy.__version__, "right": right, "name": name, "free": free, "total": total}))
"""


def probe_gpu() -> Finding:
    """NVIDIA's driver, CuPy, whether they fit each other, and whether a product comes out right."""
    driver = ask(DRIVER)
    wheels = sorted(name for d in metadata.distributions() if (name := d.metadata["Name"] or "").startswith("cupy"))
    there = f"CuPy ({', '.join(wheels)}) is installed" if wheels else "CuPy is not installed"
    if "OSError" in driver.get("error", ""):
        remedy = 'only for a GPU: install NVIDIA\'s driver, then pip install -e ".[cuda13]"'
        return Finding(MISSING, f"no NVIDIA driver; {there}", remedy)
    if "error" in driver:
        return Finding(WRONG, f"the driver fails: {driver['error']}", "does nvidia-smi run? Else restart the machine")
    cuda = f"{driver['version'] // 1000}.{driver['version'] % 1000 // 10}"
    if driver["status"] != 0 or driver["gpus"] == 0:
        hidden = "CUDA_VISIBLE_DEVICES hides it" if "CUDA_VISIBLE_DEVICES" in os.environ else "nvidia-smi says more"
        text = f"the driver (CUDA {cuda}) shows no GPU (status {driver['status']}); {there}"
        return Finding(MISSING, text, f"only for a GPU: {hidden}")
    seen = f"{driver['gpus']} GPU{'s' * (driver['gpus'] > 1)}, driver of CUDA {cuda}"
    if driver["version"] < 12000:
        return Finding(WRONG, f"{seen}: older than CuPy 14 can use", "install a driver of CUDA 12 or 13")
    extra = "cuda13" if driver["version"] >= 13000 else "cuda12"
    install = f'{python()} -m pip install -e "{ROOT}[{extra}]"'
    swap = f"{python()} -m pip uninstall -y {' '.join(wheels)}, then {install}"
    if not wheels:
        return Finding(MISSING, f"{seen}; {there}", install)
    if len(wheels) > 1:
        return Finding(WRONG, f"{seen}; {there}, which disturb one another", swap)
    made_for = re.search(r"cuda(\d+)x", wheels[0])
    if made_for and int(made_for[1]) > driver["version"] // 1000:
        return Finding(WRONG, f"{seen}; {there}, made for CUDA {made_for[1]}", f"{swap}; or install a newer driver")
    said = ask(CUPY)
    if "error" in said or not said["right"]:
        return Finding(WRONG, f"{seen}; {there} and fails: {said.get('error', 'a product is wrong')}", swap)
    free = f"{said['free'] / 1e9:,.1f} of {said['total'] / 1e9:,.1f} GB free"
    return Finding(OK, f"{seen}; CuPy {said['version']}, {said['name']}, {free}", facts={"gpus": driver["gpus"]})


LIBRARY = """
import json
from mpi4py import MPI
print(json.dumps({"library": MPI.Get_library_version().splitlines()[0].strip("\\0 ")}))
"""
RANKS = "from mpi4py import MPI; print(MPI.COMM_WORLD.Get_size(), flush=True)"


def mpirun_line(launcher: str, ranks: int) -> list[str]:
    """The beginning of the command that starts so many ranks on this machine."""
    version, _ = call([launcher, "--version"], 20)
    flags = []
    if "Open MPI" in version or "OpenRTE" in version:
        flags = ["--oversubscribe"] * (ranks > usable_cores()[0])
        flags += ["--allow-run-as-root"] * (hasattr(os, "geteuid") and os.geteuid() == 0)
    return [launcher, "-n", str(ranks), *flags]


def probe_mpi() -> Finding:
    """mpi4py, the MPI library that it finds, and the mpirun that belongs to that library: two ranks see each other."""
    install = f'only for several processes: {python()} -m pip install -e "{ROOT}[mpi]"'
    try:
        version = metadata.version("mpi4py")
    except metadata.PackageNotFoundError:
        return Finding(MISSING, "mpi4py is not installed", install)
    said = ask(LIBRARY, seconds=30, MPI4PY_RC_INITIALIZE="0")
    if "error" in said:
        return Finding(WRONG, f"mpi4py {version} finds no MPI library that works: {said['error']}", install)
    text = f"mpi4py {version}, {said['library'].split(',')[0]}"
    beside = Path(sys.executable).with_name("mpirun")
    on_path = shutil.which("mpirun")
    tried = []
    for launcher in dict.fromkeys(filter(None, (str(beside) if beside.is_file() else None, on_path))):
        output, complaint = call([*mpirun_line(launcher, 2), sys.executable, "-c", RANKS], 30)
        if output.split() == ["2", "2"]:
            name = "mpirun" if on_path and Path(on_path).samefile(launcher) else launcher
            other = f" (the mpirun on the PATH, {on_path}, is another)" if on_path and name != "mpirun" else ""
            return Finding(OK, f"{text}, {launcher}: two ranks see each other{other}", facts={"mpirun": name})
        tried.append(f"{launcher}: {complaint or 'the ranks do not see each other, it belongs to another MPI'}")
    if not tried:
        return Finding(
            WRONG, f"{text}, but no mpirun", f"put the mpirun of {said['library'].split(',')[0]} on the PATH"
        )
    return Finding(WRONG, f"{text}; {'; '.join(tried)}", f"use the mpirun of {said['library'].split(',')[0]}")


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary, folders, disk
# ---------------------------------------------------------------------------------------------------------------------

VOCABULARY = """
import json
from gpt2.tokenizer import Tokenizer
try:
    print(json.dumps({"tokens": Tokenizer.load("gpt2").vocab_size}))
except OSError as error:
    print(json.dumps({"error": str(error)}))
"""


def tiktoken_cache() -> Path:
    """Where tiktoken keeps the vocabularies that it downloads."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if os.environ.get(name):
            return Path(os.environ[name])
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def probe_tokenizer() -> Finding:
    """GPT-2's vocabulary, which tiktoken downloads once (1.5 MB); bytes, the default, need none."""
    said = ask(VOCABULARY, seconds=40)
    if "error" in said:
        remedy = f"only for --tokenizer gpt2: connect once, or put tiktoken's two files into {tiktoken_cache()}"
        return Finding(MISSING, said["error"].split(";")[0], remedy)
    return Finding(OK, f"GPT-2's vocabulary, {said['tokens']:,} tokens, in {tiktoken_cache()}")


def refusal(folder: Path) -> str:
    """Why no file can be made in a folder (or in the nearest one above it that is there), or ""."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
        return ""
    except OSError as error:
        return f"{folder}: {error.strerror}"


def probe_folders() -> Finding:
    """Whether the folders can be written that a run, a download or a compiler writes to."""
    here = refusal(Path.cwd())
    if here:
        return Finding(WRONG, here, "go to a folder of yours; data/ and out/ are made there", needed=True)
    cupy = Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    caches = {"TMPDIR": Path(tempfile.gettempdir()), "TIKTOKEN_CACHE_DIR": tiktoken_cache(), "CUPY_CACHE_DIR": cupy}
    bad = {name: why for name, folder in {**caches, "HF_HOME": hub}.items() if (why := refusal(folder))}
    if bad:
        return Finding(WRONG, "; ".join(bad.values()), f"set {' and '.join(bad)} to folders that can be written")
    return Finding(OK, f"{Path.cwd()} and the caches {', '.join(map(str, (*caches.values(), hub)))} can be written")


def probe_disk() -> Finding:
    """Room for checkpoints: weights and two moments, 12 bytes a parameter; a run keeps three."""
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / 1e9:,.1f} GB free here; a run of gpt2 keeps three checkpoints of 1.5 GB"
    if free < DISK_NEEDED:
        return Finding(WRONG, text, "make room, or go to another disk: a full one ends a run", needed=True)
    return Finding(OK, text)


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------

PROBES: dict[str, Callable[[], Finding]] = {
    "python": probe_python,
    "blas": probe_blas,
    "packages": probe_packages,
    "numba": probe_numba,
    "cores": probe_cores,
    "memory": probe_memory,
    "gpu": probe_gpu,
    "mpi": probe_mpi,
    "tokenizer": probe_tokenizer,
    "folders": probe_folders,
    "disk": probe_disk,
}


def examine(probes: dict[str, Callable[[], Finding]], seconds: float = LIMIT) -> Iterator[tuple[str, Finding]]:
    """What each probe finds, in their order. They run at the same time; one that raises or hangs is a finding too."""
    found: dict[str, Finding] = {}

    def run(name: str) -> None:
        try:
            found[name] = probes[name]()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            found[name] = Finding(WRONG, f"looking failed: {reason}", "it may work nevertheless: try the command below")

    workers = {name: threading.Thread(target=run, args=(name,), daemon=True) for name in probes}
    end = time.monotonic() + seconds
    for worker in workers.values():
        worker.start()
    for name, worker in workers.items():
        worker.join(max(0.0, end - time.monotonic()))
        yield (
            name,
            found.get(name) or Finding(WRONG, f"no answer within {seconds:g} s", "does a disk or a driver hang?"),
        )


def python() -> str:
    """How this Python is called in a command."""
    there = shutil.which("python")
    return (
        "python" if there and Path(there).absolute() == Path(sys.executable).absolute() else shlex.quote(sys.executable)
    )


def command(findings: dict[str, Finding]) -> str:
    """The command that trains on this machine: over all its GPUs where there are several and MPI works."""
    facts: dict[str, Any] = {}
    for finding in findings.values():
        facts.update(finding.facts)
    script = "train.py" if Path("train.py").is_file() else shlex.quote(str(ROOT / "train.py"))
    line = f"{python()} {script}" + (f" --threads {facts['threads']}" if "threads" in facts else "")
    if facts.get("gpus", 1) > 1 and "mpirun" in facts:
        return f"{shlex.join(mpirun_line(facts['mpirun'], facts['gpus']))} {line}"
    return line


def machine() -> dict[str, str]:
    """What a run says of the machine that it is made on."""
    there = memory()
    return {
        "processor": processor(),
        "cores": str(usable_cores()[0]),
        "memory": f"{there[1] / 1e9:,.1f} GB" if there else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. The exit status: 1 where something that training needs is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="python -m gpt2.doctor", description="Look at this machine; say what to do.")
    parser.parse_args(arguments)
    findings: dict[str, Finding] = {}
    # An old Python is all there is to say; and nothing else computes while the speed of BLAS is measured.
    for names in (["python"], ["blas"], [name for name in PROBES if name not in ("python", "blas")]):
        for name, finding in examine({name: PROBES[name] for name in names}):
            findings[name] = finding
            print(f"{finding.verdict:<8} {name:<10} {finding.text}", flush=True)
            if finding.remedy:
                print(f"{'':19} -> {finding.remedy}", flush=True)
        if findings["python"].verdict == WRONG:
            break
    wrong = [name for name, finding in findings.items() if finding.needed and finding.verdict == WRONG]
    print(f"\nput right first: {', '.join(wrong)}" if wrong else f"\nrun here: {command(findings)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(console.run(main))
