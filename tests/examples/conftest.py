"""Fixtures for the tests of examples/."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """Runs a script of examples/ in an empty folder; it can import `matplotlib` only if `pictures` is True."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError('hidden by a test')\n")

    def start(name, *options, pictures=False):
        path = [str(ROOT)] if pictures else [str(tmp_path / "hidden"), str(ROOT)]
        return subprocess.run(
            [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, options)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return start


@pytest.fixture
def losses():
    """A function that extracts the losses that a script printed, in order."""
    return lambda printed: [float(loss) for loss in re.findall(r"loss (\d+\.\d{4})", printed)]
