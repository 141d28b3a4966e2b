"""Fixtures for every test."""

import os
from pathlib import Path

import numpy
import pytest

from tinygrad2 import autograd


def _read_only(value):
    if hasattr(value, "_replace"):  # a named tuple
        return type(value)(*map(_read_only, value))
    if isinstance(value, tuple | list):
        return type(value)(map(_read_only, value))
    if not isinstance(value, numpy.ndarray):
        return value
    view = value.view()
    view.flags.writeable = False
    return view


@pytest.fixture(autouse=True)
def saved_is_read_only(monkeypatch):
    """A backward function gets what was saved, and the gradient that comes in, as read-only views: writing raises."""
    node = autograd.Node

    def guarded(parents, backward, saved, zeros):
        return node(parents, lambda s, dy, into: backward(s, _read_only(dy), into), _read_only(saved), zeros)

    monkeypatch.setattr(autograd, "Node", guarded)


@pytest.fixture(scope="session")
def gpt2_files():
    """The folder where tiktoken keeps GPT-2's two files: tests do not download."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not folder:
        pytest.skip("needs GPT-2's vocabulary: TIKTOKEN_CACHE_DIR names no folder that has it")
    return Path(folder)
