"""Recipes, which recompute an array in the backward pass, so that it does not need to be saved.

The results of GELU and LayerNorm can be computed from arrays that their own backward passes save. A linear layer that
reads such a result would save it as well. With a recipe, the layer recomputes it instead: a step of GPT-2 saves 10
arrays per layer instead of 16, and its results are bitwise the same. Source: arXiv:2205.05198 (selective
recomputation).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from tinygrad2.array import Array
from tinygrad2.backend import backend_of
from tinygrad2.tensor import Tensor


class Recipe(NamedTuple):
    """Recomputes an array as the (first) result of kernel(*arguments), with the same bits. An operation can save a
    recipe instead of the array if the arguments are saved anyway."""

    kernel: Callable[..., Any]
    arguments: tuple[Any, ...]

    def compute(self) -> Array:
        result = self.kernel(*self.arguments)
        return result[0] if isinstance(result, tuple) else result


def attach_recipe(x: Tensor, kernel: Callable[..., Any], *arguments: Any) -> Tensor:
    """Attach a recipe to x, if x can be computed cheaply from arrays that its backward function saves. Returns x. Does
    nothing on GPUs, where recipes are not used, and not all arrays support weak references."""
    if x._edge is not None and backend_of(x.data).recompute_outputs < math.inf:
        x._recipe = Recipe(kernel, arguments), weakref.ref(x.data)
    return x


def recipe_or_data(x: Tensor) -> Recipe | Array:
    """What an operation should save if its backward pass needs x's data: the recipe of x, or the data if there is no
    recipe or another array was assigned to x.data."""
    return x._recipe[0] if x._recipe is not None and x._recipe[1]() is x.data else x.data
