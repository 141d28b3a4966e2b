"""Inject faults into source code. A fault names a function and replaces a short piece of its code.

A test that injects a fault shows that the checks detect it. The layout of the source does not matter. If the piece of
code no longer exists, the error says what to do.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinygrad2.kernels import cuda

Fault = tuple[str, str, str]  # the arguments of `inject` after the source


def inject(source: str, function: str, old: str, new: str) -> str:
    """`source` with `old` replaced by `new` everywhere in `function`.

    `function` is the name of a function, struct, class or constant, or several names separated by commas. Whitespace in
    `old` matches any whitespace. Raises AssertionError if there is nothing to replace.
    """
    names = function.split(", ")
    if len(names) > 1:
        for name in names:
            source = inject(source, name, old, new)
        return source
    bodies = list(_bodies(source, function))
    assert bodies, f"no function {function!r} in the source; update the function of the fault {old!r}"
    pattern = r"\s+".join(map(re.escape, old.split()))
    count = 0
    for start, stop in reversed(bodies):
        body, found = re.subn(pattern, lambda _: new, source[start:stop])
        source = source[:start] + body + source[stop:]
        count += found
    assert count, f"{function!r} no longer contains {old!r}; update the fault, or remove it"
    return source


def inject_in(monkeypatch: pytest.MonkeyPatch, family: str | Path, *faults: Fault) -> None:
    """Inject faults into the CUDA C++ of a kernel family until the test ends."""
    source = cuda.source(family)
    for fault in faults:
        source = inject(source, *fault)
    replace_source(monkeypatch, family, source)


def replace_source(monkeypatch: pytest.MonkeyPatch, family: str | Path, source: str) -> None:
    """Replace the CUDA C++ of a kernel family until the test ends."""
    original = cuda.source
    monkeypatch.setattr(cuda, "source", lambda name: source if name == family else original(name))


def without(source: str, function: str, old: str, number: int) -> str:
    """`source` without occurrence `number` of `old` in a function. Raises AssertionError if there is none."""
    starts = [
        start + match.start()
        for start, stop in _bodies(source, function)
        for match in re.finditer(re.escape(old), source[start:stop])
    ]
    assert number < len(starts), f"{function!r} contains {old!r} {len(starts)} times, not {number + 1}"
    return source[: starts[number]] + source[starts[number] + len(old) :]


def _bodies(source: str, name: str) -> Iterator[tuple[int, int]]:
    """The start and end of each definition of a function, struct or class."""
    if re.search(r"^(?:class|def) \w+.*:$", source, re.M):
        yield from _python_bodies(source, name)
        return
    for match in re.finditer(rf"\b{name} = [^;]*;", source):  # a constant
        yield match.span()
    for match in re.finditer(rf"(?:\bstruct {name}\b|\b{name}\s*(?=\())", source):
        brace = _opening_brace(source, match.end())
        if brace is not None:
            yield match.start(), _closing(source, brace) + 1


def _python_bodies(source: str, name: str) -> Iterator[tuple[int, int]]:
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            assert node.end_lineno is not None
            yield lines[node.lineno - 1], lines[node.end_lineno]


def _opening_brace(source: str, at: int) -> int | None:
    """The opening brace of a definition whose name ends at `at`; None for a call or a declaration."""
    if source[at : at + 1] == "(":
        at = _closing(source, at) + 1
        if not re.match(r"\s*(?:const\s*)?[{:]", source[at:]):
            return None
    while source[at] not in "{;":
        at = _closing(source, at) + 1 if source[at] == "(" else at + 1
    return at if source[at] == "{" else None


def _closing(source: str, at: int) -> int:
    """The position of the bracket that closes the one at `at`."""
    opening, depth = source[at], 0
    closing = {"(": ")", "{": "}"}[opening]
    while True:
        depth += (source[at] == opening) - (source[at] == closing)
        if not depth:
            return at
        at += 1
