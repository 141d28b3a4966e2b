"""Fixtures and hooks for all tests."""

import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy
import pytest

from tests.stand_ins import cudasim
from tinygrad2 import autograd, backend, threads
from tinygrad2.kernels import gemm

# `pytest -m quick` takes less than a minute and covers the mathematics, the tape, operations, layers, optimizers, the
# model, sampling, and the rules of the repository. Paths are relative to this folder; a folder includes all its files.
QUICK = (
    "tinygrad2/test_reference.py", "tinygrad2/test_gradcheck.py", "tinygrad2/test_autograd.py",
    "tinygrad2/test_tensor.py", "tinygrad2/test_ops.py", "tinygrad2/test_nn.py", "tinygrad2/test_params.py",
    "tinygrad2/test_random.py", "tinygrad2/test_programs.py", "tinygrad2/optim", "gpt2/test_config.py",
    "gpt2/test_model.py", "gpt2/training/test_options.py", "test_sample.py", "test_layering.py", "test_reading_path.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--ptx", action="store_true", help="run CUDA kernels from the PTX of NVRTC (tests/stand_ins/ptxsim.py)"
    )
    parser.addoption(
        "--require-extras", action="store_true", help="fail, instead of skipping, if a package is not installed"
    )


# The fastest BLAS library depends on the machine, and each library rounds differently: tests use NumPy's.
os.environ.setdefault("TINYGRAD2_BLAS", "numpy")
os.environ.setdefault("TINYGRAD2_CACHE_DIR", str(Path(tempfile.gettempdir()) / "tinygrad2-tests"))


def pytest_configure(config):
    backend.silence_compile_notice()  # tests expect only a command's own messages on stderr
    if config.getoption("--ptx"):
        from tests.stand_ins import ptxsim

        cudasim.RawModule = ptxsim.RawModule


@pytest.hookimpl(tryfirst=True)  # before pytest selects tests by their marks
def pytest_collection_modifyitems(items):
    folder = Path(__file__).parent
    for item in items:
        quick = any(item.path.is_relative_to(folder / name) for name in QUICK)
        if quick and not any(item.get_closest_marker(mark) for mark in ("slow", "mpi", "gpu")):
            item.add_marker("quick")


def pytest_runtest_setup(item):
    """Skip a test that is marked `extras("package", ...)` if one of these packages is not installed."""
    for package in (name for mark in item.iter_markers("extras") for name in mark.args):
        if importlib.util.find_spec(package) is None:
            (pytest.fail if item.config.getoption("--require-extras") else pytest.skip)(f"needs the package {package}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """With --require-extras, a module that skips itself on import fails too."""
    report = yield
    if report.skipped and collector.config.getoption("--require-extras"):
        report.outcome, report.longrepr = "failed", report.longrepr[2]
    return report


def _read_only(value):
    if hasattr(value, "_replace"):  # a named tuple
        return type(value)(*map(_read_only, value))
    if isinstance(value, tuple | list):
        return type(value)(map(_read_only, value))
    if not isinstance(value, numpy.ndarray):
        return value
    view = value.view()
    view.flags.writeable = False
    return view


@pytest.fixture(autouse=True)
def saved_is_read_only(monkeypatch):
    """Pass saved data and incoming gradients to backward functions as read-only views, so that writing raises."""
    node = autograd.Node

    def guarded(parents, backward, saved, forms, name, kernel=False):
        def guarded_backward(s, dy, into):
            return backward(s, _read_only(dy), into)

        def guarded_kernel(dy, *s):
            return backward(_read_only(dy), *s)

        return node(parents, guarded_kernel if kernel else guarded_backward, _read_only(saved), forms, name, kernel)

    monkeypatch.setattr(autograd, "Node", guarded)


@pytest.fixture
def set_threads():
    """A function that sets the number of threads. The previous number is restored after the test."""
    before = threads.count()
    yield threads.set_count
    threads.set_count(before)


@pytest.fixture(scope="session")
def gpt2_files():
    """The folder with tiktoken's two files for GPT-2; tests do not download them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder:
        pytest.skip("needs GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder that contains it")
    return Path(folder)


@pytest.fixture(scope="session")
def prepared_text(tmp_path_factory):
    """A data set prepared from the text in tests/training_runs.py."""
    from data.prepare import prepare
    from tests.training_runs import TEXT

    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text(TEXT)
    prepare([str(folder / "text.txt")], "bytes", folder / "text")
    return folder / "text"


@pytest.fixture
def workspace(prepared_text, tmp_path, monkeypatch):
    """A new current directory that contains data/text. Signal handlers are restored after the test."""
    shutil.copytree(prepared_text, tmp_path / "data" / "text")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def fake_cublaslt():
    """The path of the stand-in for cuBLASLt, which is recompiled when its source has changed."""
    source = Path(__file__).parent / "stand_ins" / "cublaslt.cpp"
    folder = Path(tempfile.gettempdir()) / "tinygrad2-cudasim"
    path = folder / f"cublaslt-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            cudasim.need_compiler()
            command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", str(source), "-o", f"{temporary}/library.so"]
            subprocess.run(command, check=True)
            Path(temporary, "library.so").replace(path)
    return str(path)


@pytest.fixture
def cublaslt(fake_cublaslt, monkeypatch):
    """Use the stand-in for cuBLASLt for matrix products on the stand-in for CuPy."""
    monkeypatch.setattr(gemm, "_in_wheels", lambda: fake_cublaslt)
