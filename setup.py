"""Adds train.py, sample.py and data/prepare.py to the wheel, as gpt2.train, gpt2.sample and gpt2.prepare.

In the repository they are scripts. The other settings of the package are in pyproject.toml.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MODULES = {
    "train.py": "train",
    "sample.py": "sample",
    "data/prepare.py": "prepare",
    "data/sources.py": "sources",
    "data/parquet_pages.py": "parquet_pages",
}


class BuildWithCommands(build_py):
    """Copies MODULES into the package gpt2, and adapts their imports from data/."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file, module in MODULES.items():
            text = (ROOT / file).read_text(encoding="utf-8").replace("from data.", "from gpt2.")
            (Path(self.build_lib) / "gpt2" / f"{module}.py").write_text(text, encoding="utf-8")


setup(cmdclass={"build_py": BuildWithCommands})
