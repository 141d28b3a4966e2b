"""gpt2/doctor.py on this machine and with injected faults: each fault is reported with a remedy, and does not stop the
other checks."""

import ast
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2 import doctor
from gpt2.doctor import OK, OPTIONAL, WRONG, Finding
from tinygrad2 import machine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def answers(monkeypatch):
    """answers(NAME=answer, ...) sets the results of subprocesses, by the name of the code that they run."""

    def inject(**said):
        codes = {getattr(doctor, name): answer for name, answer in said.items()}
        monkeypatch.setattr(doctor, "ask", lambda code, *arguments, **options: codes[code])

    return inject


def stand_in(folder, name, text):
    """Write a module that shadows the installed one."""
    (folder / f"{name}.py").write_text(text)


# Probes that raise or hang -------------------------------------------------------------------------------------------


def raises():
    raise RuntimeError("two\nlines")


def test_a_probe_that_raises_exits_or_hangs_is_a_finding():
    probes = {
        "raises": raises,
        "exits": lambda: sys.exit(3),
        "hangs": lambda: time.sleep(30),
        "works": lambda: Finding(OK, "fine"),
    }
    began = time.perf_counter()
    found = dict(doctor.examine(probes, seconds=0.5))
    assert time.perf_counter() - began < 5
    assert list(found) == list(probes)
    assert [finding.verdict for finding in found.values()] == [WRONG, WRONG, WRONG, OK]
    assert found["raises"].text == "the probe failed: RuntimeError: two"
    assert found["hangs"].text == "no answer within 0.5 s"
    assert not any(finding.needed for finding in found.values())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import time; time.sleep(60)", "no answer within 1 s"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("raise OSError('libfoo.so: no such file')", "OSError: libfoo.so: no such file"),
        ("import sys; sys.exit(4)", "exited with status 4"),
    ],
)
def test_an_error_in_a_subprocess_is_one_line(code, reason):
    assert doctor.ask(code, seconds=1) == {"error": reason}


# All probes together -------------------------------------------------------------------------------------------------


def test_this_machine_can_train(capsys, gpt2_files, monkeypatch):
    for name in doctor.OPENBLAS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[1]: line.split()[0] for line in lines if line.startswith((OK, OPTIONAL, WRONG))}
    assert list(verdicts) == list(doctor.PROBES)
    assert {verdicts[name] for name in ("python", "packages", "blas", "memory", "tokenizer", "folders", "disk")} == {OK}
    assert lines[-1].startswith("to train on this machine: ")
    assert "train.py" in lines[-1]
    remedies = sum(line.lstrip().startswith("-> ") and "threads are slower" not in line for line in lines)
    assert remedies == sum(verdict != OK for verdict in verdicts.values())


def test_only_needed_parts_affect_the_exit_status(capsys, monkeypatch):
    fine = dict.fromkeys(("python", "blas"), lambda: Finding(OK, ""))
    for finding, status, last in (
        (Finding(WRONG, "broken", "fix it"), 0, "to train on this machine: "),
        (Finding(OPTIONAL, "missing", "install it", needed=True), 0, "to train on this machine: "),
        (Finding(WRONG, "broken", "fix it", needed=True), 1, "fix these first: part"),
    ):
        monkeypatch.setattr(doctor, "PROBES", {**fine, "part": lambda finding=finding: finding})
        assert doctor.main([]) == status
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith(last)
        assert lines[3].strip() == f"-> {finding.remedy}"


def test_if_python_is_too_old_nothing_else_is_checked(capsys, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wrong     python")
    assert "install Python 3.11 or newer" in lines[1]
    assert lines[2:] == ["", "fix these first: python"]


@pytest.mark.parametrize(
    "file",
    [
        "gpt2/__init__.py",
        "gpt2/doctor.py",
        "gpt2/console.py",
        "gpt2/interrupts.py",
        "tinygrad2/__init__.py",
        "tinygrad2/files.py",
        "tinygrad2/machine.py",
    ],
)
def test_the_syntax_is_valid_in_python_3_8(file):
    ast.parse((ROOT / file).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_the_doctor_runs_without_any_package():
    command = [sys.executable, "-S", "-m", "gpt2.doctor"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr == ""
    assert "numpy is not installed" in ended.stdout
    assert "-m pip install --upgrade -e " in ended.stdout


def test_a_closed_pipe_is_not_an_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2.doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


def test_the_training_command_suits_the_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    elsewhere = f"{doctor.PYTHON} {ROOT}/train.py"
    assert doctor.training_command({}) == elsewhere
    (tmp_path / "train.py").touch()
    here = f"{doctor.PYTHON} train.py"
    assert doctor.training_command({"cores": Finding(WRONG, "", facts={"threads": 3})}) == f"{here} --threads 3"
    gpus, mpi = Finding(OK, "", facts={"gpus": 4}), Finding(OK, "", facts={"mpirun": "/opt/bin/mpirun"})
    monkeypatch.setattr(machine, "call", lambda *arguments: ("mpirun (Open MPI) 5.0.8", ""))
    monkeypatch.setattr(machine, "cores", lambda: set(range(8)))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert doctor.training_command({"gpu": gpus, "mpi": mpi}) == f"/opt/bin/mpirun -n 4 --allow-run-as-root {here}"
    assert doctor.training_command({"gpu": gpus}) == here
    assert doctor.training_command({"mpi": mpi}) == here


# Packages, BLAS, Numba -----------------------------------------------------------------------------------------------


def test_the_requirements_are_those_of_the_project():
    found = {name: (oldest, too_new) for name, oldest, too_new in machine.requirements(doctor.ROOT)}
    assert found["numpy"] == ("2.1", "3")
    assert {"numba", "threadpoolctl", "ml_dtypes", "safetensors", "tiktoken", "tqdm"} < found.keys()


def test_missing_old_and_broken_packages_are_listed(monkeypatch, tmp_path):
    stand_in(tmp_path, "safetensors", "raise ImportError('libstdc++.so.6: version not found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    version = metadata.version

    def injected(name):
        if name == "tqdm":
            raise metadata.PackageNotFoundError(name)
        return {"numpy": "1.26.4"}.get(name) or version(name)

    monkeypatch.setattr(metadata, "version", injected)
    finding = doctor.probe_packages()
    assert (finding.verdict, finding.needed) == (WRONG, True)
    assert finding.text.split("; ") == [
        "numpy is 1.26.4",
        "expected 2.1 or newer, below 3",
        "tqdm is not installed",
        "safetensors: ImportError: libstdc++.so.6: version not found",
    ]
    assert "pip install --upgrade" in finding.remedy


def test_a_blas_limited_to_one_thread_is_detected(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setenv("TINYGRAD2_BLAS", "numpy")  # disables MKL if it is installed
    monkeypatch.setattr(machine, "cores", lambda: set(range(4)))
    finding = doctor.probe_blas()
    assert finding.verdict == WRONG
    assert "1 threads" in finding.text
    assert finding.text.endswith("OPENBLAS_NUM_THREADS=1 limits it")
    assert finding.remedy == "unset OPENBLAS_NUM_THREADS"


def test_the_report_explains_threads_that_are_slower_than_one(answers):
    openblas = {"internal_api": "openblas", "version": "1", "num_threads": 2}
    found = {"mkl": None, "speed": 5e10, "on_one_thread": 9e10, "libraries": [openblas]}
    answers(BLAS=found)
    finding = doctor.probe_blas()
    assert (finding.verdict, finding.text) == (OK, "openblas 1, 2 threads, 50 GFLOP/s in float32, 90 on one thread")
    assert finding.remedy.startswith("2 threads are slower than one: other programs use the cores")
    answers(BLAS={**found, "on_one_thread": 5.4e10})
    assert doctor.probe_blas().remedy == ""


@pytest.mark.parametrize(
    ("said", "verdict", "text"),
    [
        ({"speed": 1e9, "libraries": []}, WRONG, "NumPy has no optimized BLAS library: 1 GFLOP/s"),
        ({"speed": 9e11, "libraries": []}, OK, "a BLAS library that threadpoolctl does not recognize"),
        (
            {"speed": 9e11, "libraries": [], "mkl": "2026.2.0"},
            OK,
            "MKL 2026.2.0, 900 GFLOP/s in float32 on each thread",
        ),
        ({"speed": 1e9, "libraries": [{"internal_api": "openblas", "num_threads": 2}]}, WRONG, "slow"),
        ({"error": "killed by signal 4"}, WRONG, "killed by signal 4"),
    ],
)
def test_a_slow_or_broken_blas_is_detected(answers, said, verdict, text):
    answers(BLAS={"mkl": None, **said})
    finding = doctor.probe_blas()
    assert finding.verdict == verdict
    assert text in finding.text
    assert bool(finding.remedy) == (verdict != OK)


def test_mkl_is_reported_if_it_is_used(monkeypatch):
    from tinygrad2 import blas

    pytest.importorskip("numba")
    monkeypatch.delenv("TINYGRAD2_BLAS")
    assert doctor.probe_blas().text.startswith("MKL ") == (blas._fastest().name == "mkl")
    for name, value in (("TINYGRAD2_BLAS", "numpy"), ("TINYGRAD2_KERNELS", "reference")):
        with monkeypatch.context() as injected:
            injected.setenv(name, value)
            finding = doctor.probe_blas()
        assert finding.verdict == OK
        assert not finding.text.startswith("MKL ")


def test_a_setting_that_slows_openblas_down_is_detected(monkeypatch):
    """OPENBLAS_CORETYPE selects code for a processor without newer instructions."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "")
    found = {"speed": 2e11, "libraries": [{"internal_api": "openblas", "version": "1", "num_threads": 2}]}

    def answer(code, **environment):
        free = environment.get("OPENBLAS_CORETYPE") == ""
        return {**found, "speed": 4e11} if free else found

    monkeypatch.setattr(doctor, "ask", answer)
    finding = doctor.probe_blas()
    assert finding.verdict == WRONG
    assert finding.text.endswith("OPENBLAS_CORETYPE=Haswell slows it down; unset, it reaches 400 GFLOP/s")
    assert finding.remedy == "unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE"
    found["speed"] = 3.9e11
    assert doctor.probe_blas().verdict == OK


def test_a_missing_or_disabled_numba_is_detected(monkeypatch, tmp_path, answers):
    stand_in(tmp_path, "numba", "raise ImportError('Numba needs NumPy 2.2 or less')")
    with monkeypatch.context() as injected:
        injected.setenv("PYTHONPATH", str(tmp_path))
        finding = doctor.probe_numba()
    assert finding.verdict == OPTIONAL
    assert finding.text.startswith("ImportError: Numba needs NumPy 2.2 or less; plain NumPy is used")
    with monkeypatch.context() as injected:
        injected.setenv("TINYGRAD2_KERNELS", "reference")
        assert doctor.probe_numba().remedy == "unset TINYGRAD2_KERNELS"


def test_the_cache_folder_of_compiled_kernels_is_checked(monkeypatch, tmp_path, answers):
    pytest.importorskip("numba")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    finding = doctor.probe_numba()
    assert finding.verdict == OK
    assert f"to be compiled at first use and cached in {tmp_path}" in finding.text
    answers(KERNELS={"version": "0.68.1", "folder": None, "kept": 0, "compiled": 17})
    finding = doctor.probe_numba()
    assert (finding.verdict, finding.remedy) == (WRONG, "set NUMBA_CACHE_DIR to a writable folder")
    answers(KERNELS={"version": "0.68.1", "folder": "/x", "kept": 0, "compiled": 0})
    assert "no kernel uses it" in doctor.probe_numba().text


# Cores and memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quota", "threads"), [(1.5, 2), (0.2, 1), (3.1, None), (4.0, None), (None, None)])
def test_more_threads_than_the_control_group_allows_are_detected(monkeypatch, quota, threads):
    monkeypatch.setattr(machine, "cores", lambda: set(range(4)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    finding = doctor.probe_cores()
    assert finding.facts.get("threads") == threads
    assert (finding.verdict, finding.remedy) == ((OK, "") if threads is None else (WRONG, f"--threads {threads}"))


def test_the_report_lists_models_that_fit_into_memory(monkeypatch):
    free, total = machine.memory()
    assert 0 < free <= total
    for gigabytes, verdict, text in (
        (0.1, WRONG, "0.1 of 4.0 GB free"),
        (1, OK, "1.0 of 4.0 GB free: enough to train nano, micro (one"),
        (4, OK, "enough to train nano, micro, gpt2 (one"),
        (50, OK, "enough to train nano, micro, gpt2, gpt2-medium, gpt2-large, gpt2-xl (one"),
    ):
        monkeypatch.setattr(machine, "memory", lambda gigabytes=gigabytes: (gigabytes * 1e9, 4e9))
        finding = doctor.probe_memory()
        assert (finding.verdict, finding.needed) == (verdict, verdict == WRONG)
        assert text in finding.text


# GPU and MPI ---------------------------------------------------------------------------------------------------------

WORKS = {"version": "14.2.0", "right": True, "name": "H200", "free": 1.4e11, "total": 1.5e11}
DRIVER_13 = {"version": 13000, "status": 0, "gpus": 2}


@pytest.mark.parametrize(
    ("driver", "wheels", "cupy", "verdict", "text", "remedy"),
    [
        (
            {"error": "OSError: libcuda.so.1"},
            [],
            None,
            OPTIONAL,
            "no NVIDIA driver; CuPy is not",
            "needed only for a GPU",
        ),
        (
            {"error": "OSError: x"},
            ["cupy-cuda13x"],
            None,
            OPTIONAL,
            "CuPy (cupy-cuda13x) is installed",
            "needed only for a GPU",
        ),
        ({"error": "no answer within 60 s"}, [], None, WRONG, "the NVIDIA driver fails: no answer", "nvidia-smi"),
        ({**DRIVER_13, "status": 999}, [], None, OPTIONAL, "(CUDA 13.0) reports no GPU (status 999)", "nvidia-smi"),
        ({**DRIVER_13, "gpus": 0}, [], None, OPTIONAL, "reports no GPU (status 0)", "nvidia-smi"),
        ({**DRIVER_13, "version": 11080}, [], None, WRONG, "driver for CUDA 11.8: too old", "CUDA 12 or 13"),
        (DRIVER_13, [], None, OPTIONAL, "2 GPUs, driver for CUDA 13.0; CuPy is not installed", "[cuda13]"),
        ({**DRIVER_13, "version": 12040}, [], None, OPTIONAL, "driver for CUDA 12.4; CuPy is not", "[cuda12]"),
        ({**DRIVER_13, "version": 12040}, ["cupy-cuda13x"], None, WRONG, "built for CUDA 13", "[cuda12]"),
        (DRIVER_13, ["cupy", "cupy-cuda13x"], None, WRONG, "conflict", "uninstall -y cupy cupy-cuda13x, then"),
        (
            DRIVER_13,
            ["cupy-cuda13x"],
            {"error": "ImportError: libcublas"},
            WRONG,
            "fails: ImportError: lib",
            "[cuda13]",
        ),
        (DRIVER_13, ["cupy-cuda13x"], {**WORKS, "right": False}, WRONG, "a matrix product is wrong", "[cuda13]"),
        (DRIVER_13, ["cupy-cuda13x"], WORKS, OK, "CuPy 14.2.0, H200, 140.0 of 150.0 GB free", ""),
        (DRIVER_13, ["cupy-cuda12x"], WORKS, OK, "2 GPUs, driver for CUDA 13.0", ""),
    ],
)
def test_findings_for_gpu_driver_and_cupy(answers, monkeypatch, driver, wheels, cupy, verdict, text, remedy):
    answers(DRIVER=driver, CUPY=cupy)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    installed = [SimpleNamespace(metadata={"Name": name}) for name in ("numpy", *wheels)]
    monkeypatch.setattr(metadata, "distributions", lambda: installed)
    finding = doctor.probe_gpu()
    assert finding.verdict == verdict
    assert text in finding.text
    assert remedy in finding.remedy
    assert finding.facts == ({"gpus": 2} if verdict == OK else {})


def test_a_hidden_gpu_is_reported_as_hidden(answers, monkeypatch):
    answers(DRIVER={**DRIVER_13, "status": 100, "gpus": 0})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor.probe_gpu().remedy == "needed only for a GPU: CUDA_VISIBLE_DEVICES hides it"


LAUNCHER = """#!/bin/sh
if [ "$1" = --version ]; then echo "mpirun (Open MPI) 9.9"; exit; fi
{action}
"""


@pytest.fixture
def launcher(tmp_path, monkeypatch, answers):
    """launcher(action) makes a script the only mpirun on this machine and probes MPI; mpi4py's library works."""
    monkeypatch.setattr(metadata, "version", lambda name: "4.1.2")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    answers(LIBRARY={"library": "Open MPI v5.0.11, package: x"})

    def inject(action):
        (tmp_path / "mpirun").write_text(LAUNCHER.format(action=action))
        (tmp_path / "mpirun").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return doctor.probe_mpi()

    return inject


def test_a_working_mpirun(launcher):
    finding = launcher("echo 2; echo 2")
    assert (finding.verdict, finding.facts) == (OK, {"mpirun": "mpirun"})
    assert "mpi4py 4.1.2, Open MPI v5.0.11" in finding.text


@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("echo 1; echo 1", "the ranks do not see each other"),
        ("echo 'not enough slots' >&2; exit 1", "not enough slots"),
    ],
)
def test_an_mpirun_of_another_library_is_detected(launcher, action, text):
    finding = launcher(action)
    assert (finding.verdict, finding.needed) == (WRONG, False)
    assert text in finding.text
    assert finding.remedy == "use the mpirun of Open MPI v5.0.11"


def test_the_mpirun_next_to_python_takes_precedence_over_the_path(launcher, tmp_path):
    (tmp_path / "venv").mkdir()
    beside = tmp_path / "venv" / "mpirun"
    beside.write_text(LAUNCHER.format(action="echo 2; echo 2"))
    beside.chmod(0o755)
    finding = launcher("echo 1; echo 1")
    assert (finding.verdict, finding.facts) == (OK, {"mpirun": str(beside)})
    assert f"not the mpirun on the PATH, {tmp_path / 'mpirun'}" in finding.text


def test_mpi_without_library_or_launcher(answers, monkeypatch, tmp_path):
    monkeypatch.setattr(metadata, "version", lambda name: "4.1.2")
    answers(LIBRARY={"error": "RuntimeError: cannot load MPI library"})
    finding = doctor.probe_mpi()
    assert finding.verdict == WRONG
    assert "cannot load an MPI library: RuntimeError: cannot load" in finding.text
    answers(LIBRARY={"library": "MPICH Version: 5.0.2"})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = doctor.probe_mpi()
    assert (finding.verdict, finding.remedy) == (WRONG, "add the mpirun of MPICH Version: 5.0.2 to the PATH")


# Vocabulary, folders, disk -------------------------------------------------------------------------------------------


def test_a_vocabulary_that_cannot_be_downloaded_is_reported_as_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    finding = doctor.probe_tokenizer()
    assert (finding.verdict, finding.needed) == (OPTIONAL, False)
    assert "could not be downloaded" in finding.text
    assert str(tmp_path) in finding.remedy


@pytest.mark.parametrize("name", ["TINYGRAD2_CACHE_DIR", "TIKTOKEN_CACHE_DIR", "CUPY_CACHE_DIR", "HF_HOME"])
def test_a_cache_that_is_not_writable_is_reported(monkeypatch, tmp_path, name):
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / "file" / "cache"))
    finding = doctor.probe_folders()
    assert (finding.verdict, finding.needed) == (WRONG, False)
    assert str(tmp_path / "file" / "cache") in finding.text
    assert finding.remedy == f"set {name} to writable folders"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="requires /proc")
def test_the_current_folder_must_be_writable(monkeypatch):
    monkeypatch.chdir("/proc")
    finding = doctor.probe_folders()
    assert (finding.verdict, finding.needed) == (WRONG, True)
    assert finding.text.startswith("/proc: ")


def test_a_full_disk_is_detected(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e8))
    finding = doctor.probe_disk()
    assert (finding.verdict, finding.needed) == (WRONG, True)
    assert finding.text.startswith("0.1 GB free")
