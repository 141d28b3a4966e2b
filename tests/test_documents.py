"""README.md, docs/ and other Markdown files: code blocks run, links have targets, lists are complete."""

import ast
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import tinygrad2
from tests.documents import ELSEWHERE, PAGES, ROOT, TUTORIAL, blocks, copy_repository

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_BY_CI = {ROOT / "README.md", ROOT / "CONTRIBUTING.md"}  # in an empty virtual environment; see .ci/run
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
INSTALL = re.compile(r"pip install -e (?:\.|\"\.\[([\w,-]+)\]\")(?= |$)", re.MULTILINE)


def _case(block):
    packages = [name for name in block.needs if name not in ELSEWHERE]
    marks = [pytest.mark.extras(*packages)] if packages else []
    return pytest.param(block, id=block.name, marks=[*marks, *([pytest.mark.slow] if block.language == "sh" else [])])


@pytest.mark.parametrize(
    "block",
    [_case(b) for b in BLOCKS if b.language in ("sh", "python") and "quotes" not in b.options
     and not (b.language == "sh" and b.page in RUN_BY_CI) and not (b.language == "python" and b.page in TUTORIAL)],
)  # fmt: skip
def test_a_block_runs_in_its_own_copy_of_the_repository(block, tmp_path):
    missing = [ELSEWHERE[name] for name in block.needs if name in ELSEWHERE]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    copy_repository(tmp_path)
    code = block.before() + block.code
    if block.language == "python":
        command = [sys.executable, "-c", code]
    else:
        command = ["bash", "-euxo", "pipefail", "-c", INSTALL.sub("true", code)]  # CI has installed all packages
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_block_that_fails_is_reported(tmp_path):
    """Test the runner: a command that fails in the middle of a pipeline, and a block that continues another one."""
    page = ROOT / "docs" / "a-page-of-the-tests.md"
    text = "```sh\ntrue\n```\n\n```sh continues needs=gpu\nfalse | true\n```\n"
    page.write_text(text)
    try:
        first, second = blocks(page)
    finally:
        page.unlink()
    assert (first.code, first.line, second.before(), second.code) == ("true\n", 1, "true\n", "false | true\n")
    assert second.needs == ["gpu"]
    assert subprocess.run(["bash", "-euo", "pipefail", "-c", second.code], check=False).returncode == 1


def test_fence_options_are_known():
    for block in BLOCKS:
        words = set(block.options) - {"before"}
        assert block.language in ("sh", "python", "text", "toml"), block.name
        assert words <= {"continues", "needs", "quotes", "varies"}, f"{block.name}: {words}"


def test_extras_installed_by_blocks_exist():
    for block in BLOCKS:
        for line in re.findall(r".*pip install -e .*", block.code):
            assert INSTALL.search(line), f"{block.name}: {line}"
            assert set((INSTALL.search(line)[1] or "test").split(",")) <= set(EXTRAS), f"{block.name}: {line}"


def statements(code, nested=False):
    """The statements of a piece of code, each as a string, without comments and docstrings.

    nested  whether to include those in classes and functions.
    """
    tree = ast.parse(textwrap.dedent(code))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return [ast.dump(node) for node in (ast.walk(tree) if nested else tree.body) if isinstance(node, ast.stmt)]


def test_quoted_code_matches_the_source():
    quoted = [block for block in BLOCKS if "quotes" in block.options]
    assert quoted
    for block in quoted:
        source = (ROOT / block.options["quotes"]).read_text(encoding="utf-8")
        assert set(statements(block.code)) <= set(statements(source, nested=True)), block.name
        assert {*map(str.strip, block.code.splitlines())} <= {*map(str.strip, source.splitlines())}, block.name


def anchors(page):
    """The anchors that GitHub generates for a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_targets(page):
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    for link in (a or b for a, b in links):
        if re.match(r"(https?|mailto):", link):
            continue
        file, _, fragment = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        if fragment:
            assert fragment in anchors(target), f"{page.name}: {link}"


def test_every_page_of_docs_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert len(pages) > 5
    for name in [*pages, *(f"tutorial/{page.name}" for page in TUTORIAL)]:
        assert f"({name})" in index, name


def test_every_module_is_on_the_layout_page():
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    for folder in ("tinygrad2", "gpt2", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name == "__init__.py" or re.search(rf"\b{path.name}\b", text), path.relative_to(ROOT)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    assert len(text.splitlines()) <= 150
    assert all(file.stat().st_size < 200_000 for kind in ("png", "svg") for file in (ROOT / "docs").rglob(f"*.{kind}"))


def test_all_files_have_the_same_version():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[([^\]]+)\]", changes, re.MULTILINE)[1] == tinygrad2.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == tinygrad2.__version__
