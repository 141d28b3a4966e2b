"""The reading list in README.md: its files exist, its line counts are correct, and its total is limited.

`python tests/test_reading_path.py` updates the line counts in README.md.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LIMIT = 3000  # maximum number of lines in all files on the list
ROW = re.compile(r"^ *[\d,]+ ((?:tinygrad2|gpt2)/\S+|train\.py)( .*)?$", re.MULTILINE)  # lines, file, description
TOTAL = re.compile(r"^ *[\d,]+ lines$", re.MULTILINE)


def listing():
    """The block under README's heading "Read it in an afternoon"."""
    section = README.read_text(encoding="utf-8").split("## Read it in an afternoon")[1]
    return re.search(r"```text\n(.*?)```", section, re.DOTALL)[1]


def count(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def counted(text):
    """The listing with the current counts."""
    total = sum(count(row[1]) for row in ROW.finditer(text))
    text = ROW.sub(lambda row: f"{count(row[1]):6,} {row[1]}{row[2] or ''}", text)
    return TOTAL.sub(f"{total:6,} lines", text)


def test_the_reading_list_is_short():
    files = [row[1] for row in ROW.finditer(listing())]
    assert len(files) == len(listing().splitlines()) - 1  # the last line is the total
    assert "tinygrad2/reference.py" in files
    assert "train.py" in files
    assert sum(map(count, files)) <= LIMIT


def test_the_line_counts_are_correct():
    assert listing() == counted(listing()), "README.md: run python tests/test_reading_path.py"


def test_reference_is_short():
    assert count("tinygrad2/reference.py") < 850


if __name__ == "__main__":
    README.write_text(README.read_text(encoding="utf-8").replace(listing(), counted(listing())), encoding="utf-8")
