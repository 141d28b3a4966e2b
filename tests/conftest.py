"""Fixtures for every test."""

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
