"""The coverage report. (The measurement itself takes hours and is not part of CI.)"""

import ast
import re
from pathlib import Path

import pytest

from tests import coverage_report

ROOT = Path(__file__).parents[1]


def file_report(statements, functions):
    missing = sorted(line for lines in functions.values() for line in lines)
    covered = statements - len(missing)
    summary = {
        "num_statements": statements,
        "covered_lines": covered,
        "percent_covered": 100 * covered / statements,
    }
    return {
        "summary": summary,
        "missing_lines": missing,
        "functions": {name: {"missing_lines": lines} for name, lines in functions.items()},
    }


@pytest.fixture
def report():
    return {
        "files": {
            "tinygrad2/a.py": file_report(100, {"f": [50, 51], "C.g": [7, 9, 10, 11, 12], "": [1]}),
            "gpt2/b.py": file_report(10, {"h": [3, 4, 5, 6, 7], "": []}),
        }
    }


@pytest.fixture
def page(tmp_path, monkeypatch):
    page = tmp_path / "coverage.md"
    page.write_text(f"before\n{coverage_report.MARKS[0]}\nold\n{coverage_report.MARKS[1]}\nafter\n")
    monkeypatch.setattr(coverage_report, "PAGE", page)
    monkeypatch.setattr(coverage_report, "DATA", tmp_path)
    (tmp_path / "measured").write_text("`pytest -m mpi`\n`pytest -m 'not slow'`\n`pytest -m mpi`\n")
    monkeypatch.setattr(coverage_report, "RESULT", tmp_path / "coverage.json")
    return page


def test_missing_lines_are_grouped_by_function(report):
    assert coverage_report.missing(report) == {
        "gpt2/b.py: h": [3, 4, 5, 6, 7],
        "tinygrad2/a.py: f": [50, 51],
        "tinygrad2/a.py: C.g": [7, 9, 10, 11, 12],
        "tinygrad2/a.py": [1],
    }


def test_the_page_lists_packages_files_and_reasons(report, page, monkeypatch, capsys):
    reasons = (r"tinygrad2/a\.py: C", "a reason"), (r"tinygrad2/a\.py: covered$", "another")
    monkeypatch.setattr(coverage_report, "REASONS", reasons)
    assert not coverage_report.write(report)  # gpt2/ is below 90 %, and h has no reason
    text = page.read_text()
    assert ", with `pytest -m mpi`, `pytest -m 'not slow'`.\n" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| `tinygrad2/` | 100 | 92.0 % |" in text
    assert "| `gpt2/` | 10 | 50.0 % |\n| `gpt2/b.py` | 10 | 50.0 % |" in text  # the file is below 90 % too
    assert "| `tinygrad2/a.py: C.g` | 5 | a reason |" in text
    assert "| 2 functions | 3 | fewer than 5 lines each" in text
    said = capsys.readouterr().out
    assert "no reason given: gpt2/b.py: h\n" in said
    assert r"reason not needed: tinygrad2/a\.py: covered$" in said.splitlines()


def functions_of(node, prefix=""):
    """The names of the functions in a syntax tree, as coverage writes them."""
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.ClassDef)
        if isinstance(child, ast.FunctionDef):
            yield f"{prefix}{child.name}"
        yield from functions_of(child, f"{prefix}{child.name}." if named else prefix)


def test_every_reason_is_for_an_existing_function():
    files = [file for package in coverage_report.PACKAGES for file in (ROOT / package).rglob("*.py")]
    places = {
        f"{file.relative_to(ROOT).as_posix()}: {name}"
        for file in files
        for name in functions_of(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert "tinygrad2/backend.py: Cuda.limits" in places
    for pattern, reason in coverage_report.REASONS:
        assert pattern.endswith("$"), f"{pattern}: matches names that begin with it, too"
        found = sorted(place for place in places if re.match(pattern, place))
        assert len(found) == pattern.count("|") + 1, f"{pattern}: found {found}"
        assert all(coverage_report.reason_of(place, [*range(coverage_report.FEW)]) == reason for place in found)


def test_a_report_passes_if_coverage_is_high_and_gaps_are_explained(report, page, monkeypatch):
    monkeypatch.setattr(coverage_report, "REASONS", ((r".*", "a reason"),))
    assert not coverage_report.write(report)
    report["files"]["gpt2/b.py"] = file_report(50, {"h": [3, 4, 5, 6, 7]})
    assert coverage_report.write(report)


def test_the_parts_match_ci():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '"not quick and not slow and not gpu and not mpi"' in ci  # the quick tests are run by README's command
    assert coverage_report.PARTS["fast"] == "not slow and not gpu and not mpi"
    assert f"-m {coverage_report.PARTS['mpi']} " in ci
    assert f'-m "{coverage_report.PARTS["slow"]}"' in ci
