"""The wheel and the sdist, built from a copy of the repository and used outside it, in a separate environment."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gpt2
import tinygrad2

ROOT = Path(__file__).parents[1]
MESSAGES_OF_FILES = re.compile(r"[\w./-]*\b(?:train|sample|prepare)\.py")
pytestmark = pytest.mark.slow


def call(*command, cwd, env=None, status=0):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def environment(python):
    """The environment without this process's packages and the repository, and with `python` first on PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    skip = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "out*", "*.egg-info", "build", "dist", ".venv")
    shutil.copytree(ROOT, source, ignore=skip)
    call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    env = environment(python)
    call(python, "-m", "pip", "install", "-q", "setuptools>=77", cwd=folder, env=env)
    code = "import setuptools.build_meta as b; print(b.build_sdist('../dist'))"
    call(python, "-c", code, cwd=source, env=env)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "-w", folder / "dist"]
    call(python, "-m", "pip", "wheel", "-q", *options, sdist, cwd=folder, env=env)
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an environment with only the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    call(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", built[1], cwd=folder, env=environment(python))
    return python


def test_the_sdist_contains_all_tracked_files(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    tracked = {name for name in listed if not name.startswith((".github", ".ci", ".git", ".pre-commit"))}
    assert tracked - names == set()
    assert {"train.py", "sample.py", "data/prepare.py", "checkpoint/config.json"} <= names


def test_the_wheel_contains_both_packages_and_the_scripts(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        train = archive.read("gpt2/train.py").decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tinygrad2", "gpt2"}
    expected = {f"gpt2/{name}.py" for name in ("train", "sample", "prepare", "sources", "training/trainer")}
    assert {*expected, "gpt2/decode.cu", "gpt2/py.typed", "tinygrad2/py.typed"} <= set(names)
    kernels = {f"tinygrad2/kernels/{file.name}" for file in (ROOT / "tinygrad2" / "kernels").glob("*.cu*")}
    modules = {
        str(file.relative_to(ROOT)) for package in ("gpt2", "tinygrad2") for file in (ROOT / package).rglob("*.py")
    }
    assert (kernels | modules) - set(names) == set()
    assert "from data" not in train


def test_the_wheel_can_prepare_data_train_and_sample(installed, tmp_path):
    env = environment(installed)
    (tmp_path / "my.txt").write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}\n" for i in range(2000)))
    module = [installed, "-m"]
    output = call(*module, "gpt2.prepare", "my.txt", "--tokenizer", "bytes", cwd=tmp_path, env=env)
    assert "next: python -m gpt2.train --data my" in output
    quick = ["--data", "my", "--max-iters", "3", "--eval-iters", "1", "--threads", "1"]
    output += call(*module, "gpt2.train", *quick, cwd=tmp_path, env=env)
    assert "next: python -m gpt2.sample --checkpoint out" in output
    output += call(*module, "gpt2.train", cwd=tmp_path, env=env)
    output += call(*module, "gpt2.train", "--lr", "1", cwd=tmp_path, env=env, status=2)
    assert "gpt2.train: error: unknown option --lr" in output
    output += call(*module, "gpt2.sample", "-p", "7 times", "-m", "5", cwd=tmp_path, env=env)
    assert "model: out/ckpt-000003" in output
    output += call(*module, "gpt2.evaluate", "out", "--data", "my", cwd=tmp_path, env=env)
    output += call(*module, "gpt2.train", "--data", "none", "--fresh", cwd=tmp_path, env=env, status=1)
    output += call(*module, "gpt2.doctor", cwd=tmp_path, env=env)
    assert "to train on this machine: python -m gpt2.train" in output
    assert MESSAGES_OF_FILES.findall(output) == []
    assert str(ROOT) not in output
    for file in re.findall(r"(/[\w./-]+\.(?:py|toml))\b", output):
        assert Path(file).exists(), file


def test_the_installed_version_is_correct(installed, tmp_path):
    assert gpt2.__version__ == tinygrad2.__version__
    printed = "gpt2.__version__, tinygrad2.__version__, m.version('tinygrad2')"
    code = f"import gpt2, tinygrad2, importlib.metadata as m; print({printed})"
    output = call(installed, "-c", code, cwd=tmp_path, env=environment(installed))
    assert output.split() == 3 * [tinygrad2.__version__]
