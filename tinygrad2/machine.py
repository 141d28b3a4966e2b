"""The machine: cores and memory, limits from control groups (containers, batch systems), the GPU driver.

This file needs only the standard library, and its syntax is valid in old Python versions, since gpt2/doctor.py uses it
when everything else is missing.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores(process: int = 0) -> set[int]:
    """The indices of the cores that a process may use; 0 means this process."""
    return os.sched_getaffinity(process) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def usable_threads() -> int:
    """The number of threads to use: one per core, or fewer if control groups limit the CPU time.

    A quota of 1.5 cores is rounded up to 2. Two threads use all of it, each throttled for a quarter of every period;
    one thread would leave a third of it unused.
    """
    return max(1, math.ceil(min(len(cores()), cpu_quota() or math.inf)))


def cpu_quota(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """The CPU limit of the control groups, in cores, or None if there is no limit."""
    allowed = []
    for file in _cgroup_files("cpu", "cpu.max", "cpu.cfs_quota_us", root, own):
        try:
            quota, *period = file.read_text(encoding="ascii").split()
            if quota not in ("max", "-1"):
                each = period[0] if period else file.with_name("cpu.cfs_period_us").read_text(encoding="ascii")
                allowed.append(int(quota) / int(each))
        except (OSError, ValueError):
            continue  # not readable; treated as no limit
    return min(allowed, default=None)


def memory_limit(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int | None:
    """The memory limit of the control groups, in bytes, or None if there is no limit."""
    allowed = []
    for file in _cgroup_files("memory", "memory.max", "memory.limit_in_bytes", root, own):
        try:
            allowed.append(int(file.read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue  # "max", or not readable
    return min((limit for limit in allowed if limit < 1 << 60), default=None)


def _cgroup_files(controller: str, name: str, name_v1: str, root: Path, own: Path) -> Iterator[Path]:
    """The files with the limits of this process's control group and its ancestors (version 2 or 1)."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        folder = top / path.lstrip("/")
        for ancestor in (folder, *folder.parents):
            file = ancestor / (name_v1 if controllers else name)
            if file.is_file():
                yield file
            if ancestor == top:
                break


def memory() -> tuple[float, float] | None:
    """Return (free, total) bytes of main memory, capped at the limit of the control groups, or None if unknown."""
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


def _cpu_info(*names: str) -> list[str]:
    """The fields with these names for the first processor in /proc/cpuinfo; empty if there is no such file."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = (re.search(rf"^{name}\s*: *(.+)$", text, re.MULTILINE) for name in names)
    return [match[1].strip() for match in found if match]


def load_average() -> float:
    """The mean number of running or waiting threads on this machine over the last minute; 0 if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows, or not readable
        return 0.0


def processor() -> str:
    """The name of the processor."""
    return next(iter(_cpu_info("model name")), "") or platform.processor() or platform.machine()


def processor_model() -> str:
    """An identifier of processors with equal performance: their name, family, model and instruction sets."""
    numbers = _cpu_info("cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU revision")
    return " ".join([processor(), *numbers, f"{zlib.crc32(' '.join(sorted(cpu_features())).encode()):08x}"])


def cpu_features() -> set[str]:
    """The instruction sets of the processor, with Linux's names, such as avx512_bf16; empty if unknown."""
    return {word for line in _cpu_info("(?:flags|Features)") for word in line.split()}


def describe() -> dict[str, str]:
    """A description of the machine, for a run's report."""
    available = memory()
    return {
        "processor": processor(),
        "cores": str(len(cores())),
        "memory": f"{available[1] / 1e9:,.1f} GB" if available else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
    }


def nvidia_driver() -> dict[str, int]:
    """The CUDA version that the NVIDIA driver supports (13000 is 13.0), its status (0 if it works), and the number of
    GPUs.

    Raises OSError if there is no driver. The driver may crash or hang, so call this in a separate process.
    """
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    version, gpus = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    status = driver.cuInit(0)
    driver.cuDeviceGetCount(ctypes.byref(gpus))
    return {"version": version.value, "status": status, "gpus": gpus.value}


def mpirun_command(launcher: str, ranks: int) -> list[str]:
    """The beginning of a command line that runs this number of ranks on this machine."""
    version, _ = call([launcher, "--version"], 20)
    flags = []
    if "Open MPI" in version or "OpenRTE" in version:
        flags += ["--oversubscribe"] * (ranks > len(cores()))
        flags += ["--allow-run-as-root"] * (hasattr(os, "geteuid") and os.geteuid() == 0)
    return [launcher, "-n", str(ranks), *flags]


def call(command: Sequence[str], seconds: float, **environment: str) -> tuple[str, str]:
    """Run another program. Returns (its output, "") if it succeeds, or ("", the reason in one line) if it fails.

    After `seconds`, the program is killed together with its child processes.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
            start_new_session=True,
        )
        output, errors = process.communicate(timeout=seconds)
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
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
        return "", f"killed by signal {-process.returncode}"
    lines = (errors.strip() or output.strip()).splitlines()
    return "", lines[-1].strip() if lines else f"exited with status {process.returncode}"


def requirements(root: Path) -> list[tuple[str, ...]]:
    """Return (name, lowest supported version, first unsupported version) of each requirement of the project `root`."""
    import tomllib

    file = root / "pyproject.toml"
    if file.is_file():
        lines = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = [line for line in metadata.requires("tinygrad2") or [] if "extra ==" not in line]
    found = (re.match(r"([\w.-]+)(?=.*>=([\d.]+))(?=.*<([\d.]+))", line) for line in lines)
    return [match.groups() for match in found if match]


def install_command(extra: str) -> str:
    """The command to install an extra of the repository, or of the installed package if there is no repository."""
    repository = (Path(__file__).parents[1] / "pyproject.toml").is_file()
    return f'pip install -e ".[{extra}]"' if repository else f'pip install "tinygrad2[{extra}]"'


def user() -> str:
    """The user ID, for the name of a per-user folder; "" on systems without user IDs (Windows)."""
    return str(os.getuid()) if hasattr(os, "getuid") else ""


def home() -> Path:
    """The user's home directory, or the temporary directory if the user is unknown, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def cache_folders() -> dict[str, Path]:
    """The folders that libraries write to, by the environment variables that override them."""
    temporary = Path(tempfile.gettempdir())
    tiktoken = os.environ.get("DATA_GYM_CACHE_DIR") or temporary / "data-gym-cache"
    libraries = (("TIKTOKEN_CACHE_DIR", tiktoken), ("CUPY_CACHE_DIR", home() / ".cupy" / "kernel_cache"))
    caches = home() / ".cache"
    own, hub = ("TINYGRAD2_CACHE_DIR", caches / "tinygrad2"), ("HF_HOME", caches / "huggingface")
    folders = ("TMPDIR", temporary), own, *libraries, hub
    return {name: Path(os.path.expanduser(os.environ.get(name) or default)) for name, default in folders}
