"""A short run of the fuzzer, and tests that it detects faulty readers."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import fuzz

ROOT = Path(__file__).parents[2]

if not sys.platform.startswith("linux"):
    pytest.skip("requires Linux's memory limits", allow_module_level=True)


@pytest.mark.slow
def test_damaged_files_are_rejected_or_read_correctly():
    outcomes, wrong = fuzz.fuzz(seed=1, first=0, count=20 * len(fuzz.TARGETS))
    assert wrong == []
    for name in fuzz.READABLE:
        assert outcomes[name].total() == 20, name
        assert outcomes[name]["rejected"] > 5 or name == "journal", name  # a damaged journal starts over


def test_cases_are_reproducible(tmp_path):
    fuzz.make_originals(tmp_path / "originals")
    targets = list(fuzz.TARGETS)
    for number in range(40):
        if targets[number % len(targets)] not in fuzz.READABLE:
            continue
        contents = []
        for again in "ab":
            fuzz.make_case(tmp_path / "originals", tmp_path / f"{again}{number}", 3, number)
            files = sorted(path for path in (tmp_path / f"{again}{number}").rglob("*") if path.is_file())
            contents.append([(path.name, path.read_bytes()) for path in files if path.suffix != ".pt"])
        assert contents[0] == contents[1]


CASES = {  # what a reader does, in words: the statement, the expected outcome, and part of the message
    "an exception of another type": ("raise KeyError('x')", "wrong", "KeyError"),
    "an error with two lines": ("raise ValueError(f'{folder}: a\\nb')", "wrong", "a\nb"),
    "an error that names no file": ("raise ValueError('it is damaged')", "wrong", "it is damaged"),
    "an invalid result": ("assert False", "wrong", "AssertionError"),
    "memory": ("bytearray(2**31)", "wrong", "MemoryError"),
    "a command": ("os.system('true')", "wrong", "os.system"),
    "an evaluation": ("eval('1+1')", "wrong", "compile"),
    "writing a file": ("open(folder / 'new', 'w').close()", "wrong", "open"),
    "a connection": ("socket.socket().connect_ex(('127.0.0.1', 9))", "wrong", "socket.connect"),
    "an error": ("raise ValueError(f'{folder}: one line')", "rejected", "/case: one line"),
    "nothing": ("pass", "read", ""),
    "a hang": ("while True: pass", "started", ""),
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """Runs run_cases with the readers of CASES; the one that hangs is the last."""
    folder = tmp_path_factory.mktemp("originals")
    program = (
        "import os, socket, sys\nfrom pathlib import Path\nfrom tests.benchmarks import fuzz\n"
        "fuzz.SECONDS = 0.5\nfuzz.TARGETS = {}\n"
    )
    for name, (body, _, _) in CASES.items():
        (folder / name).mkdir()
        (folder / name / "file.txt").write_text("text")
        program += f"def read(folder):\n    if folder.name == 'case':\n        {body}\n"
        program += f"fuzz.TARGETS[{name!r}] = fuzz.Target(('file.txt',), read)\n"
    program += "fuzz.READABLE = list(fuzz.TARGETS)\n"
    program += f"fuzz.run_cases(Path(sys.argv[1]), 0, 0, {len(CASES)}, fuzz.READABLE)\n"
    return subprocess.run([sys.executable, "-c", program, folder], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("case", CASES)
def test_violations_are_detected(case, worker):
    last = {name: rest for _, name, *rest in map(json.loads, worker.stdout.splitlines())}
    outcome, said = last[case]
    assert (outcome, CASES[case][2] in said) == (CASES[case][1], True), (said, worker.stderr)


def test_a_reader_that_hangs_is_killed(worker):
    assert worker.returncode == -signal.SIGPROF
