"""A short run of the fuzzer, and whether it would notice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import fuzz

ROOT = Path(__file__).parents[2]

if not sys.platform.startswith("linux"):
    pytest.skip("limits memory as Linux does", allow_module_level=True)


def test_damaged_files_are_refused_or_read_right():
    outcomes, wrong = fuzz.fuzz(seed=1, first=0, count=360)
    assert wrong == []
    for name, counts in outcomes.items():
        assert counts.total() == 30, name
        assert counts["refused"] > 5, name


def test_a_case_is_the_same_each_time(tmp_path):
    fuzz.make_originals(tmp_path / "originals")
    for number in range(40):
        contents = []
        for again in "ab":
            fuzz.make_case(tmp_path / "originals", tmp_path / f"{again}{number}", 3, number)
            files = sorted(path for path in (tmp_path / f"{again}{number}").rglob("*") if path.is_file())
            contents.append([(path.name, path.read_bytes()) for path in files if path.suffix != ".pt"])
        assert contents[0] == contents[1]


FAULTS = {
    "an exception of another kind": ("raise KeyError('x')", "KeyError"),
    "an error of two lines": ("raise ValueError(f'{folder}: a\\nb')", "a\nb"),
    "an error that names no file": ("raise ValueError('it is damaged')", "it is damaged"),
    "a result that is not whole": ("assert False", "AssertionError"),
    "memory": ("bytearray(2**30)", "MemoryError"),
    "a command": ("import os; os.system('true')", "os.system"),
    "an evaluation": ("eval('1+1')", "compile"),
    "a file that is written": ("open(folder / 'new', 'w').close()", "open"),
    "a connection": ("import socket; socket.socket().connect_ex(('127.0.0.1', 9))", "socket.connect"),
}


def worker(tmp_path, body, seconds=10):
    """run_cases with a reader whose second call, the first case, does `body`."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "file.txt").write_text("text")
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.benchmarks import fuzz\n"
        f"fuzz.SECONDS = {seconds}\n"
        "def read(folder):\n"
        f"    if folder.name == 'case':\n        {body}\n"
        "fuzz.TARGETS = {'t': fuzz.Target(('file.txt',), read)}\n"
        "fuzz.run_cases(Path(sys.argv[1]), 0, 0, 1)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_noticed(case, tmp_path):
    body, message = FAULTS[case]
    done = worker(tmp_path, body)
    assert done.returncode == 0, done.stderr
    _, _, outcome, said = json.loads(done.stdout.splitlines()[-1])
    assert outcome == "wrong"
    assert message in said


def test_a_reader_that_hangs_is_ended(tmp_path):
    done = worker(tmp_path, "while True: pass", seconds=0.3)
    assert done.returncode == -14
    assert json.loads(done.stdout.splitlines()[-1])[2] == "started"


def test_what_is_right_is_not_wrong(tmp_path):
    done = worker(tmp_path, "raise ValueError(f'{folder}: one line')")
    assert json.loads(done.stdout.splitlines()[-1])[2:] == ["refused", "/case: one line"]
