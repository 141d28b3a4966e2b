"""Check this machine for everything that the project uses, and suggest fixes: `python -m gpt2.doctor`.

Each probe runs in a thread with a time limit. Code of other libraries, which may crash or hang, runs in a separate
process, so that the command always finishes. This module needs only the standard library, and its syntax is valid in
old versions of Python.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from gpt2 import console
from tinygrad2 import machine
from tinygrad2.files import write_error

ROOT = Path(__file__).parents[1]
OLDEST_PYTHON = (3, 11)
LIMIT = 90.0  # seconds for a probe
MEMORY_NEEDED, DISK_NEEDED = 0.5e9, 0.2e9  # bytes, to train nano and to save its checkpoints
SLOW_BLAS = 5e9  # float32 operations per second; any core of the last ten years is several times faster
OPENBLAS_SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # override what OpenBLAS detects about the processor
OK, OPTIONAL, WRONG = "ok", "optional", "wrong"  # optional: not installed, but not required; wrong: fails or is slow
PYTHON = "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)  # in a command
PIP = f"{PYTHON} -m pip install"

REPOSITORY = (ROOT / "pyproject.toml").is_file()  # False in an installed package
SOURCE = f"-e {shlex.quote(str(ROOT))}" if REPOSITORY else "tinygrad2"

# Code for `ask` to run in a separate process.
BLAS = "from tinygrad2 import diagnose; result = diagnose.blas()"
KERNELS = "from tinygrad2 import diagnose; result = diagnose.compiled_kernels()"
DRIVER = "from tinygrad2 import machine; result = machine.nvidia_driver()"
CUPY = "from tinygrad2 import diagnose; result = diagnose.gpu()"
TOKENIZER = "from gpt2.tokenizer import Tokenizer; result = {'tokens': Tokenizer.load('gpt2').vocab_size}"
LIBRARY = "from mpi4py import MPI; result = {'library': MPI.Get_library_version().splitlines()[0].strip('\\0 ')}"
RANKS = "from mpi4py import MPI; print(MPI.COMM_WORLD.Get_size(), flush=True)"


class Finding(NamedTuple):
    """The result of a probe."""

    verdict: str
    text: str
    remedy: str = ""  # what to do
    needed: bool = False  # train.py cannot run without it
    facts: dict[str, Any] = {}  # noqa: RUF012 - threads, gpus and mpirun, for training_command


def with_extra(extra: str) -> str:
    """The argument of `pip install` for an extra."""
    return f'-e "{ROOT}[{extra}]"' if REPOSITORY else f'"tinygrad2[{extra}]"'


def first(*cases: tuple[Any, ...]) -> Finding:
    """The finding of the first case whose condition is true. A case is a condition and the fields of a Finding."""
    return next(Finding(*fields) for applies, *fields in cases if applies)


def ask(code: str, seconds: float = 60, **environment: str) -> dict[str, Any]:
    """Run Python code in a separate process. Returns the dictionary that it assigns to `result`, or {"error": one line}
    if it fails."""
    code += "\nimport json; print(json.dumps(result, default=str))"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    output, error = machine.call([sys.executable, "-c", code], seconds, PYTHONPATH=path, **environment)
    return {"error": error} if error else json.loads(output.splitlines()[-1])


def probe_python() -> Finding:
    text = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    newer = f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, and create a virtual environment with it"
    return first((tuple(sys.version_info[:2]) < OLDEST_PYTHON, WRONG, text, newer, True), (True, OK, text))


def probe_packages() -> Finding:
    """Check that the packages in pyproject.toml (except Numba) are importable and have supported versions."""

    def numbers(version: str) -> list[int]:  # "14.2.0rc1" is [14, 2, 0]
        return [int(part) for part in re.findall(r"\d+", version)[:3]]

    installed, bad = {}, []
    for name, oldest, too_new in machine.requirements(ROOT):
        if name != "numba":
            try:
                version = installed[name] = metadata.version(name)
                if not numbers(oldest) <= numbers(version) < numbers(too_new):
                    bad.append(f"{name} is {version}; expected {oldest} or newer, below {too_new}")
            except metadata.PackageNotFoundError:
                bad.append(f"{name} is not installed")
    result = {name: ask(f"import {name}; result = {{}}") for name in installed}
    bad += [f"{name}: {answer['error']}" for name, answer in result.items() if answer]
    listed = ", ".join(f"{name} {version}" for name, version in installed.items())
    install = f"{PIP} --upgrade {SOURCE}"
    return first((bad, WRONG, "; ".join(bad), install, True), (True, OK, listed))


def probe_blas() -> Finding:
    """The name, number of threads and speed of the BLAS library, MKL or NumPy's."""
    result = {"speed": 0, "on_one_thread": 0, "libraries": [], "mkl": None, "chosen": "", **ask(BLAS)}
    slow, speed = result["speed"] < SLOW_BLAS, f"{result['speed'] / 1e9:,.0f} GFLOP/s in float32"
    library = result["libraries"][0] if result["libraries"] else {}
    threads = library.get("num_threads")
    in_use = f"; in use: {result['chosen']}" if result["chosen"] else ""
    slower = result["on_one_thread"] > 1.1 * result["speed"]
    one = f", {result['on_one_thread'] / 1e9:,.0f} on one thread" if slower else ""
    text = f"{library.get('internal_api')} {library.get('version') or ''}, {threads} threads, {speed}{one}{in_use}"
    below = _speed_without_settings(result["speed"])
    names = [name for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ]
    limit = f"{names[0]}={os.environ[names[0]]}" if names and threads == 1 and len(machine.cores()) > 1 else ""
    no_blas, reinstall = "NumPy has no optimized BLAS library", "--force-reinstall --only-binary :all: numpy"
    return first(  # (MKL computes on the calling thread)
        ("error" in result, WRONG, result.get("error"), 'see the line "packages"', True),
        (
            result["mkl"],
            OK,
            f"MKL {result['mkl']}, {speed} on each thread{in_use}; NumPy's own library is not used",
        ),
        (not library and slow, WRONG, f"{no_blas}: {speed}", f"{PIP} {reinstall}"),
        (not library, OK, f"a BLAS library that threadpoolctl does not recognize (such as Accelerate): {speed}"),
        (limit, WRONG, f"{text}: {limit} limits it", f"unset {' '.join(names)}"),
        (below, WRONG, f"{text}: {below}", f"unset {' '.join(OPENBLAS_SETTINGS)}"),
        (
            slow,
            WRONG,
            f"{text}: slow",
            "close other programs that use the CPU; if that does not help, reinstall NumPy from a wheel",
        ),
        (
            slower,
            OK,
            text,
            f"{threads} threads are slower than one: other programs use the cores, or the cores share a physical core; "
            "try --threads 1",
        ),
        (True, OK, text),
    )


def _speed_without_settings(speed: float) -> str:
    """The speed of NumPy's BLAS library without OPENBLAS_SETTINGS, if these slow it down; otherwise ""."""
    found = [f"{name}={os.environ[name]}" for name in OPENBLAS_SETTINGS if os.environ.get(name)]
    free = ask(BLAS, OPENBLAS_CORETYPE="", OPENBLAS_L2_SIZE="", TINYGRAD2_BLAS="numpy").get("speed", 0) if found else 0
    slower = free > 1.1 * speed
    return f"{' and '.join(found)} slows it down; unset, it reaches {free / 1e9:,.0f} GFLOP/s" if slower else ""


def probe_numba() -> Finding:
    """Check whether the compiled kernels are in use, and where Numba caches them."""
    if os.environ.get("TINYGRAD2_KERNELS") == "reference":
        return Finding(OPTIONAL, "TINYGRAD2_KERNELS=reference selects plain NumPy", "unset TINYGRAD2_KERNELS")
    result, install = ask(KERNELS), f'{PIP} --upgrade "numba>=0.60,<1"'
    if "error" in result:
        return Finding(OPTIONAL, f"{result['error']}; plain NumPy is used, which is several times slower", install)
    numba, cache, kept = f"Numba {result['version']}", result["folder"], result["kept"]
    state = f"{kept} cached in" if kept else "to be compiled at first use and cached in"
    no_cache, move = "has no writable folder for its cache", "set NUMBA_CACHE_DIR to a writable folder"
    return first(
        (not result["compiled"], WRONG, f"{numba} is installed, but no kernel uses it", install),
        (not cache, WRONG, f"{numba} {no_cache}; the kernels are compiled at every start", move),
        (True, OK, f"{numba}, {result['compiled']} compiled functions, {state} {cache}"),
    )


def probe_cores() -> Finding:
    cores, quota, threads = len(machine.cores()), machine.cpu_quota(), machine.usable_threads()
    text = f"{cores} of {os.cpu_count() or cores}, {machine.processor()}"
    limit = f"; the control group's CPU quota is {quota or cores:g} cores, so {cores} threads would be throttled"
    limited = (threads < cores, WRONG, text + limit, f"--threads {threads}", False, {"threads": threads})
    return first(limited, (True, OK, text))


def probe_memory() -> Finding:
    memory = machine.memory()
    if memory is None:
        return Finding(OK, "this system does not report its memory")
    from gpt2.config import PRESETS
    from gpt2.memory_model import Step, step_memory

    text, end = f"{memory[0] / 1e9:,.1f} of {memory[1] / 1e9:,.1f} GB free", f"{MEMORY_NEEDED / 1e9:g} GB"
    need = {name: sum(step_memory(Step(c, 1, c.n_positions)).values()) for name, c in PRESETS.items()}
    fits = ", ".join(name for name, size in need.items() if size < memory[0]) or "nothing"
    return first(
        (memory[0] < MEMORY_NEEDED, WRONG, text, f"close other programs: training nano takes {end}", True),
        (True, OK, f"{text}: enough to train {fits} (one sequence at a time)"),
    )


def probe_disk() -> Finding:
    free, remedy = (
        shutil.disk_usage(Path.cwd()).free,
        "free some space or use another disk; a full disk stops a run",
    )
    text = f"{free / 1e9:,.1f} GB free here; a run of gpt2 keeps three checkpoints of 1.5 GB"
    return first((free < DISK_NEEDED, WRONG, text, remedy, True), (True, OK, text))


def probe_folders() -> Finding:
    """Check that the folders for runs, downloads and compiled kernels are writable."""
    here, listed = write_error(Path.cwd()), ", ".join(map(str, machine.cache_folders().values()))
    bad = {name: why for name, folder in machine.cache_folders().items() if (why := write_error(folder))}
    return first(
        (here, WRONG, here, "change to a writable folder: data/ and out/ are created there", True),
        (bad, WRONG, "; ".join(bad.values()), f"set {' and '.join(bad)} to writable folders"),
        (True, OK, f"{Path.cwd()} and the caches {listed} are writable"),
    )


def probe_tokenizer() -> Finding:
    """Check GPT-2's vocabulary, which tiktoken downloads once. The default tokenizer, bytes, does not need it."""
    result = ask(TOKENIZER, seconds=40)
    folder, reason = machine.cache_folders()["TIKTOKEN_CACHE_DIR"], result.get("error", "").split(";")[0]
    connect = f"needed only for --tokenizer gpt2: connect to the network once, or copy tiktoken's two files to {folder}"
    return first(
        (reason, OPTIONAL, re.sub(r"^\w*Error: ", "", reason), connect),
        (True, OK, f"GPT-2's vocabulary, {result.get('tokens', 0):,} tokens, in {folder}"),
    )


def probe_gpu() -> Finding:
    """Check NVIDIA's driver and CuPy, that they match, and that a matrix product is correct."""
    driver = {"version": 0, "status": 0, "gpus": 0, "error": "", **ask(DRIVER)}
    version, gpus, status, failed = (driver[key] for key in ("version", "gpus", "status", "error"))
    wheels = sorted(name for d in metadata.distributions() if (name := d.metadata["Name"] or "").startswith("cupy"))
    built_for = max((int(number) for name in wheels for number in re.findall(r"cuda(\d+)x", name)), default=0)
    fits = not failed and not status and gpus and version >= 12000 and len(wheels) == 1 and built_for <= version // 1000
    result = {"free": 0, "total": 0, "error": "a matrix product is wrong", **(ask(CUPY) if fits else {})}
    cuda = f"CUDA {version // 1000}.{version % 1000 // 10}"
    seen = f"{gpus} GPU{'s' * (gpus > 1)}, driver for {cuda}"
    cupy = f"CuPy ({', '.join(wheels)}) is installed" if wheels else "CuPy is not installed"
    gpu = f"{result.get('name')}, {result['free'] / 1e9:,.1f} of {result['total'] / 1e9:,.1f} GB free"
    get_driver = "needed only for a GPU: install NVIDIA's driver, then " + machine.install_command("cuda13")
    hides = "CUDA_VISIBLE_DEVICES hides it" if "CUDA_VISIBLE_DEVICES" in os.environ else "run nvidia-smi for details"
    install = f"{PIP} {with_extra('cuda13' if version >= 13000 else 'cuda12')}"
    swap = f"{PYTHON} -m pip uninstall -y {' '.join(wheels)}, then {install}"
    no_gpu = f"the driver ({cuda}) reports no GPU (status {status})"
    return first(
        ("OSError" in failed, OPTIONAL, f"no NVIDIA driver; {cupy}", get_driver),
        (failed, WRONG, f"the NVIDIA driver fails: {failed}", "run nvidia-smi; if it also fails, restart the machine"),
        (status or not gpus, OPTIONAL, f"{no_gpu}; {cupy}", f"needed only for a GPU: {hides}"),
        (version < 12000, WRONG, f"{seen}: too old for CuPy 14", "install a driver for CUDA 12 or 13"),
        (not wheels, OPTIONAL, f"{seen}; {cupy}", install),
        (len(wheels) > 1, WRONG, f"{seen}; {cupy}, which conflict with each other", swap),
        (not fits, WRONG, f"{seen}; {cupy}, built for CUDA {built_for}", f"{swap}; or install a newer driver"),
        (result.get("right"), OK, f"{seen}; CuPy {result.get('version')}, {gpu}", "", False, {"gpus": gpus}),
        (True, WRONG, f"{seen}; {cupy} and fails: {result['error']}", swap),
    )


def probe_mpi() -> Finding:
    """Check mpi4py, its MPI library, and that two ranks started by an mpirun of that library see each other."""
    install = f"needed only for several processes: {PIP} {with_extra('mpi')}"
    try:
        version = f"mpi4py {metadata.version('mpi4py')}"
    except metadata.PackageNotFoundError:
        return Finding(OPTIONAL, "mpi4py is not installed", install)
    result = ask(LIBRARY, seconds=30, MPI4PY_RC_INITIALIZE="0")
    if "error" in result:
        return Finding(WRONG, f"{version} cannot load an MPI library: {result['error']}", install)
    library, tried = result["library"].split(",")[0], []
    beside, on_path = Path(sys.executable).with_name("mpirun"), shutil.which("mpirun")
    for launcher in dict.fromkeys(filter(None, (str(beside) if beside.is_file() else None, on_path))):
        output, error = machine.call([*machine.mpirun_command(launcher, 2), sys.executable, "-c", RANKS], 30)
        if output.split() == ["2", "2"]:
            name = "mpirun" if on_path and Path(on_path).samefile(launcher) else launcher
            other = f" (not the mpirun on the PATH, {on_path})" if on_path and name != "mpirun" else ""
            found = f"{version}, {library}, {launcher}: two ranks see each other{other}"
            return Finding(OK, found, facts={"mpirun": name})
        tried.append(f"{launcher}: {error or 'the ranks do not see each other; it belongs to another MPI library'}")
    text, mpirun = f"{version}, {library}", f"the mpirun of {library}"
    missing = (not tried, WRONG, f"{text}, but no mpirun", f"add {mpirun} to the PATH")
    return first(missing, (True, WRONG, "; ".join((text, *tried)), f"use {mpirun}"))


# The most important probes come first; the last three are optional.
ORDER = (probe_python, probe_packages, probe_numba, probe_blas, probe_cores, probe_memory, probe_folders, probe_disk)
PROBES = {probe.__name__[6:]: probe for probe in (*ORDER, probe_tokenizer, probe_gpu, probe_mpi)}


def examine(probes: dict[str, Callable[[], Finding]], seconds: float = LIMIT) -> Iterator[tuple[str, Finding]]:
    """Yield the finding of each probe, in order. The probes run concurrently. A probe that raises or hangs also yields
    a finding."""
    late = Finding(WRONG, f"no answer within {seconds:g} s", "a disk or a driver may be hanging")
    found = {}

    def run(name: str) -> None:
        try:
            found[name] = probes[name]()
        except BaseException as error:
            text = f"the probe failed: {type(error).__name__}: {console.first_line(error)}"
            found[name] = Finding(WRONG, text, "this may be harmless: try the command below")

    threads = {name: threading.Thread(target=run, args=(name,), daemon=True) for name in probes}
    end = time.monotonic() + seconds
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, end - time.monotonic()))
        yield name, found.get(name, late)


def training_command(findings: dict[str, Finding]) -> str:
    """The command to train on this machine; it uses all GPUs if there are several and MPI works."""
    facts = {key: value for finding in findings.values() for key, value in finding.facts.items()}
    installed = not (ROOT / "train.py").is_file()
    here = Path("train.py").is_file() and not installed
    script = "-m gpt2.train" if installed else "train.py" if here else shlex.quote(str(ROOT / "train.py"))
    line = f"{PYTHON} {script}" + (f" --threads {facts['threads']}" if "threads" in facts else "")
    ranks = facts.get("gpus", 1) if "mpirun" in facts else 1
    return f"{shlex.join(machine.mpirun_command(facts['mpirun'], ranks))} {line}" if ranks > 1 else line


def say_finding(name: str, finding: Finding) -> None:
    remedy = f"\n{'':20} -> {finding.remedy}" if finding.remedy else ""
    console.say(f"{finding.verdict:<9} {name:<10} {finding.text}{remedy}")


def command_line() -> console.Parser:
    return console.Parser(
        "python -m gpt2.doctor", "Check this machine for everything that the project uses, and suggest fixes."
    )


@console.command("gpt2.doctor")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 1 if something that training requires does not work, otherwise 0."""
    command_line().parse_args(arguments)
    findings: dict[str, Finding] = {}
    remaining = list(PROBES)
    # If Python is too old, nothing else is checked. Nothing else runs while the speed of BLAS is measured.
    for names in (["python"], ["blas"], [name for name in PROBES if name not in ("python", "blas")]):
        for name, finding in examine({name: PROBES[name] for name in names}):
            findings[name] = finding
            while remaining and remaining[0] in findings:
                say_finding(name := remaining.pop(0), findings[name])
        if findings["python"].verdict == WRONG:
            break
    wrong = [name for name, finding in findings.items() if finding.needed and finding.verdict == WRONG]
    command = training_command(findings)
    console.say(f"\nfix these first: {', '.join(wrong)}" if wrong else f"\nto train on this machine: {command}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(console.run(main))
