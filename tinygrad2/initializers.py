"""Initial values of parameters, and the random streams of layers without a key."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy

from tinygrad2 import random

Initializer = Callable[[tuple[int, ...]], numpy.ndarray]


@dataclass(frozen=True)
class _NormalInit:
    std: float
    key: random.Key
    movable: bool  # whether it may be moved to another site

    def __call__(self, shape: tuple[int, ...]) -> numpy.ndarray:
        return random.normal(self.key, shape, self.std)


class _Construction(threading.local):
    """The sites of the layers of the module that is being constructed in this thread, or None."""

    sites: Iterator[int] | None = None


_construction = _Construction()


def normal_init(std: float, key: random.Key | None = None) -> Initializer:
    """Initial values from normal(0, std). Without a key, they are drawn with seed 0 at a site that is unique in the
    model, so they depend only on the structure of the model, not on earlier constructions."""
    if key is not None:
        return _NormalInit(std, key, False)
    site = random.LAYER_SITES if _construction.sites is None else next(_construction.sites)
    return _NormalInit(std, random.Key(0, site=site), True)


def zeros_init(shape: tuple[int, ...]) -> numpy.ndarray:
    """Initial values of 0, for biases and for weights that will be loaded."""
    return numpy.zeros(shape, dtype=numpy.float32)


class ModuleType(type):
    """The metaclass of modules. It numbers the layers of a module in order of construction, and then the layers that
    were passed to the module."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if _construction.sites is not None:  # this module is part of another one
            return super().__call__(*args, **kwargs)
        _construction.sites = sites = itertools.count(random.LAYER_SITES)
        try:
            module = super().__call__(*args, **kwargs)
            _separate_sites(module, sites)
            return module
        finally:
            _construction.sites = None


def _separate_sites(module: Any, sites: Iterator[int]) -> None:
    """Redraw, at an unused site, the initial values of layers that share a site with an earlier layer because they were
    constructed separately. Values that were changed after construction are kept."""
    modules: dict[int, Any] = {id(m): m for m in module.modules()}  # without duplicates
    layers = [m for m in modules.values() if getattr(vars(m).get("init"), "movable", False)]
    occupied = {layer.init.key.site for layer in layers}
    seen: set[int] = set()
    for layer in layers:
        init, weight = layer.init, layer.weight
        if init.key.site in seen:
            layer.init = replace(init, key=init.key.at(next(site for site in sites if site not in occupied)))
            initial = init(weight.shape).astype(weight.dtype)
            if numpy.array_equal(weight.backend.to_host(weight.data), initial):
                weight.data = layer.init(weight.shape)
        seen.add(layer.init.key.site)
