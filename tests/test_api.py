"""The API reference: its examples and those in docstrings run, and Sphinx builds it with every public name."""

import doctest
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import gpt2
import tinygrad2
from tests.documents import PAGES, blocks
from tinygrad2 import functional, nn, optim

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = [
    file.relative_to(ROOT)
    for pattern in ("tinygrad2/**/*.py", "gpt2/**/*.py", "data/*.py", "examples/*.py", "docs/api/*.rst")
    for file in sorted(ROOT.glob(pattern))
    if "\n>>> " in file.read_text(encoding="utf-8") or " >>> " in file.read_text(encoding="utf-8")
]
LAYERS = [name for name, value in vars(nn).items() if isinstance(value, type) and value.__module__ == nn.__name__]
PUBLIC = {
    *(f"tinygrad2.{name}" for name in tinygrad2.__all__),
    *(f"tinygrad2.functional.{name}" for name in functional.__all__),
    *(f"tinygrad2.nn.{name}" for name in LAYERS if not name.startswith("_")),
    *(f"tinygrad2.optim.{name}" for name in optim.__all__),
    *(f"gpt2.{name}" for name in gpt2.__all__ if name != "__version__"),
}
IMPORT = re.compile(r"^from ((?:tinygrad2|gpt2)[\w.]*) import ([\w, ]+)$", re.MULTILINE)
IMPORTED = {
    f"{module}.{name.split(' as ')[0]}"
    for page in PAGES
    if page.name != "CONTRIBUTING.md"  # how to change the package itself
    for block in blocks(page)
    if block.language == "python" and "quotes" not in block.options
    for module, names in IMPORT.findall(block.code)
    for name in names.split(", ")
}


@pytest.mark.parametrize("file", EXAMPLES, ids=str)
def test_examples_print_the_output_shown(file):
    if file.suffix == ".rst":
        failed, tried = doctest.testfile(str(ROOT / file), module_relative=False)
    else:
        failed, tried = doctest.testmod(importlib.import_module(".".join(file.with_suffix("").parts)))
    assert tried > 0
    assert failed == 0


def test_functional_gradcheck_and_gpt2_have_examples():
    assert {Path("tinygrad2/functional.py"), Path("tinygrad2/gradcheck.py"), Path("docs/api/gpt2.rst")} <= {*EXAMPLES}


def public_members():
    """Every public name with its object, and the methods and properties of the classes among them."""
    for name in sorted(PUBLIC):
        module, _, attribute = name.rpartition(".")
        value = getattr(importlib.import_module(module), attribute)
        yield name, value
        for member in dir(value) if isinstance(value, type) else ():
            found = inspect.getattr_static(value, member)
            if not member.startswith("_") and isinstance(found, FunctionType | property | staticmethod | classmethod):
                yield f"{name}.{member}", getattr(value, member)


def test_every_public_name_has_a_docstring():
    members = dict(public_members())
    assert {"tinygrad2.Tensor.shape", "tinygrad2.functional.add", "gpt2.GPT2.backward"} <= set(members)
    assert [name for name, value in members.items() if not inspect.getdoc(value)] == []


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("conf_of_docs", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.extras("sphinx")
def test_a_docstring_is_converted_to_restructured_text(conf):
    text = """y = x W^T, a product with *args and `code`.

    dV = (P M)^T dO,    dP = ...
      and so on

x (..., C), weight_ (V, C) -> |y|.
tf32      multiply in TF32,
          here and there.
*a, b     two names.
Raises ValueError.

>>> a = b_
3"""
    assert conf.restructured(text.splitlines())[1:] == [
        r"y = x W^T, a product with \*args and \ ``code``\ .",
        "",
        *("", "::", "", "    dV = (P M)^T dO,    dP = ...", "      and so on", "", ""),
        r"x (..., C), weight\_ (V, C) -> \|y\|.",
        *("", "``tf32``", "   multiply in TF32,", "   here and there."),
        *("", "``*a, b``", "   two names."),
        *("", "Raises ValueError.", ""),
        *(">>> a = b_", "3"),
    ]


@pytest.mark.extras("sphinx")
def test_links_to_files_outside_docs_are_replaced_by_names(conf):
    text = "[the model](../gpt2/model.py), [`train.py`](../train.py#L3), [a page](gpu.md), [up](../docs/gpu.md)"
    expected = "the model (`gpt2/model.py`), `train.py`, [a page](gpu.md), [up](../docs/gpu.md)"
    assert conf.drop_links(DOCS, text) == expected


@pytest.mark.slow
@pytest.mark.extras("sphinx", "furo", "myst_parser")
def test_sphinx_builds_every_page_and_documents_every_public_name(tmp_path):
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", tmp_path / "html"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = InventoryFile.loads((tmp_path / "html" / "objects.inv").read_bytes(), uri="").data
    documented = {name for kind, objects in names.items() if kind.startswith("py:") for name in objects}
    pages = {f"{page.relative_to(DOCS).with_suffix('')}" for page in DOCS.rglob("*.md")} - {"README"}
    assert pages <= set(names["std:doc"])
    assert documented >= PUBLIC, sorted(PUBLIC - documented)
    assert {"tinygrad2.gradcheck.check", "gpt2.generate.complete"} <= IMPORTED
    assert documented >= IMPORTED, sorted(IMPORTED - documented)
