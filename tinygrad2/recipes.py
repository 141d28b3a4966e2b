"""Recipes: how to compute an array again in the backward pass, instead of saving it.

The results of GELU and LayerNorm are functions of arrays that their own backward passes save. The linear layer that
reads such a result would save it too. With a recipe it computes the result again: a step of GPT-2 saves 10 instead of
16 arrays per layer, and has the same bits. Source: arXiv:2205.05198 (selective recomputation).
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
    """How to compute an array again: the (first) result of kernel(*arguments). An operation can save a recipe instead
    of the array, if its arguments are saved anyway; bits are the same."""

    kernel: Callable[..., Any]
    arguments: tuple[Any, ...]

    def compute(self) -> Array:
        result = self.kernel(*self.arguments)
        return result[0] if isinstance(result, tuple) else result


def attach_recipe(x: Tensor, kernel: Callable[..., Any], *arguments: Any) -> Tensor:
    """Note how x was computed, if that takes little time from what its backward function saves; returns x. Not where
    recipes are not used, on GPUs: not all of their arrays support weak references."""
    if x._edge is not None and backend_of(x.data).recompute_outputs < math.inf:
        x._recipe = Recipe(kernel, arguments), weakref.ref(x.data)
    return x


def recipe_or_data(x: Tensor) -> Recipe | Array:
    """What an operation saves to have x's data in its backward pass: its recipe, or the data if there is none (or if
    another array was assigned to x.data)."""
    return x._recipe[0] if x._recipe is not None and x._recipe[1]() is x.data else x.data
