"""README's list of what one reads in an afternoon: every file exists, and together they stay short."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 3000  # lines of all files on the list


def reading_path():
    """The files of the first block under README's heading "Where things are"."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where things are")[1]
    block = re.search(r"```text\n(.*?)```", section, re.DOTALL)[1]
    return [line.split()[0] for line in block.splitlines()]


def test_it_is_short():
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in reading_path()}
    print("\n".join(f"{count:6} {name}" for name, count in lines.items()), f"\n{sum(lines.values()):6} in all")
    assert "tinygrad2/reference.py" in lines
    assert "train.py" in lines
    assert sum(lines.values()) <= LIMIT


def test_the_math_is_short():
    assert len((ROOT / "tinygrad2" / "reference.py").read_text(encoding="utf-8").splitlines()) < 850
