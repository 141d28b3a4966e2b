"""Check backward passes against finite differences, in float64.

`check(fn, inputs)` checks any function. `python -m tinygrad2.gradcheck` checks every operation of the engine and a
small transformer, prints a table, and exits with status 1 if an error exceeds its bound. To check another operation,
add a row to CASES.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy
from numpy.typing import ArrayLike

from tinygrad2 import functional as f
from tinygrad2 import ops
from tinygrad2.autograd import no_grad
from tinygrad2.backend import DEVICES, get_backend
from tinygrad2.files import discard_stdout
from tinygrad2.gradient_checkpointing import recompute
from tinygrad2.random import Key
from tinygrad2.tensor import Tensor, record

STEP = 5e-4  # step size; the truncation error ~ STEP^4 and the rounding error ~ 1e-16 / STEP are both about 1e-13
FLOOR = 1e-4  # errors are relative to the slope, or to this fraction of the outputs if it is larger; see check()


def check(
    fn: Callable[..., Any],
    inputs: Sequence[Tensor | ArrayLike],
    *,
    tolerance: float = 1e-7,
    raises: bool = False,
    directions: int = 4,
    seed: int = 0,
    names: Sequence[str] | None = None,
    device: str = "cpu",
) -> list[float]:
    """Return the relative error of the gradient of each input of `fn`; about 1e-10 for a correct gradient.

    >>> (error,) = check(lambda x: x.tanh(), [[-1.0, 0.5, 2.0]])
    >>> error < 1e-9
    True

    fn          takes one Tensor per input and returns a Tensor of any shape, or a tuple of Tensors. It must be smooth
                within 2e-3 of the inputs and deterministic (dropout needs a fixed key).
    inputs      a list or tuple of arrays, Tensors or nested lists, with values of order 1; they are copied to float64.
    tolerance   the maximum error if raises=True.
    raises      raise AssertionError if an error exceeds the tolerance.
    directions  the number of random directions per input.
    seed        random seed of the cotangent and the directions.
    names       the names of the inputs, for error messages.
    device      the device on which fn computes; the comparison is done on the host.

    With a random cotangent w, L = <w, fn(x)>. For each input and each random direction v, <v, dL/dx> from backward is
    compared with the slope of L along v: [8 (L(x+hv) - L(x-hv)) - (L(x+2hv) - L(x-2hv))] / 12h. Its truncation error is
    of order h^4; the two-point difference, of order h^2, does not reliably reach 1e-9. No component of v or w is
    near zero, so every coordinate matters. The error of an input is |backward - slope| / |slope|, with norms over the
    directions. The denominator is at least FLOOR max(1, |w y|). So a gradient of zero does not fail, while a gradient
    that is wrong by 0.1% is detected unless it is below 1e-8 of the outputs. A missing gradient counts as zero. NaN or
    infinity anywhere makes the error infinite.

    Raises AssertionError as described above, and TypeError if inputs is not a list or tuple or `fn` does not return
    Tensors.
    """
    if not isinstance(inputs, list | tuple):
        raise TypeError(f"gradcheck: inputs has type {type(inputs).__name__}; expected a list with one array per input")
    arrays = [numpy.array(x.numpy() if isinstance(x, Tensor) else x, dtype=numpy.float64) for x in inputs]
    for array in arrays:
        array.flags.writeable = False  # an fn that modifies its inputs would change every later evaluation
    return _Check(fn, arrays, numpy.random.default_rng(seed), device).errors(
        directions, tolerance if raises else None, names
    )


class _Check:
    """The function L = <w, fn(x)> of check(): its gradient from backward, and its slopes from finite differences."""

    def __init__(
        self, fn: Callable[..., Any], arrays: list[numpy.ndarray], random: numpy.random.Generator, device: str
    ):
        self.fn, self.arrays, self.random, self.backend = fn, arrays, random, get_backend(device)
        leaves = [Tensor(self.backend.asarray(array), requires_grad=True) for array in arrays]
        results = _results(fn(*leaves))
        self.cotangents = tuple(_away_from_zero(random, y.shape) for y in results)
        weighted = [w * y.numpy() for w, y in zip(self.cotangents, results, strict=True)]
        sent = tuple(self.backend.asarray(w) for w in self.cotangents)
        total = numpy.asarray(sum(numpy.sum(wy) for wy in weighted))
        loss = record(total, results, lambda saved, dy, into: saved, sent)
        if loss.requires_grad:
            loss.backward()
        self.gradients = [leaf.grad for leaf in leaves]
        self.floor = FLOOR * max(1.0, math.hypot(*(float(numpy.linalg.norm(wy)) for wy in weighted)))

    def errors(self, directions: int, tolerance: float | None, names: Sequence[str] | None) -> list[float]:
        """The error of each input. Raises AssertionError if one exceeds the tolerance."""
        errors = []
        for i, array in enumerate(self.arrays):
            analytic, numeric = self.slopes(i, directions)
            difference = analytic - numeric
            slope = max(float(numpy.linalg.norm(numeric)), self.floor * math.sqrt(directions))
            error = float(numpy.linalg.norm(difference)) / slope
            errors.append(error if math.isfinite(error) else math.inf)
            if tolerance is not None and errors[-1] > tolerance:
                worst = int(numpy.argmax(numpy.abs(difference)))  # argmax returns the index of a NaN, if any
                raise AssertionError(
                    f"gradcheck: input {i if names is None else names[i]} of shape {array.shape}: relative error "
                    f"{errors[-1]:.1e}, expected at most {tolerance:.0e}; along one direction backward gives "
                    f"{analytic[worst]:.12g}{' (the gradient is missing)' if self.gradients[i] is None else ''}, "
                    f"finite differences {numeric[worst]:.12g}"
                )
        return errors

    def slopes(self, i: int, directions: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The slopes of L along random directions of input i, from the gradient and from finite differences."""
        array, found = self.arrays[i], self.gradients[i]
        tangents = [_away_from_zero(self.random, array.shape) for _ in range(directions)]
        gradient = numpy.zeros(array.shape) if found is None else self.backend.to_host(found)
        analytic = numpy.array([numpy.sum(v * gradient) for v in tangents])
        numeric = [
            (8 * self.loss_change(i, STEP * v) - self.loss_change(i, 2 * STEP * v)) / (12 * STEP) for v in tangents
        ]
        return analytic, numpy.array(numeric)

    def loss_change(self, i: int, change: numpy.ndarray) -> float:
        """L(x_i + change) - L(x_i - change). Results are subtracted before summing, to reduce the rounding error."""
        with no_grad(), numpy.errstate(invalid="ignore"):  # a non-finite value makes the error infinite
            up, down = self.results(i, change), self.results(i, -change)
            return sum(
                numpy.sum(w * (a.numpy() - b.numpy())) for w, a, b in zip(self.cotangents, up, down, strict=True)
            )

    def results(self, i: int, change: numpy.ndarray) -> tuple[Tensor, ...]:
        """The results of fn with `change` added to input i."""
        inputs = [x + change if j == i else x for j, x in enumerate(self.arrays)]
        return _results(self.fn(*(Tensor(self.backend.asarray(x)) for x in inputs)))


def _results(y: Any) -> tuple[Tensor, ...]:
    results = y if isinstance(y, tuple) else (y,)
    for result in results:
        if not isinstance(result, Tensor):
            raise TypeError(f"gradcheck: fn returned {type(result).__name__}; expected a Tensor or a tuple of Tensors")
    return results


def _away_from_zero(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Values from uniform(0.5, 1.5) with random signs."""
    return random.choice((-1.0, 1.0), shape) * random.uniform(0.5, 1.5, shape)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

Draw = Callable[[numpy.random.Generator, tuple[int, ...]], numpy.ndarray]


def standard_normal(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Normal(0, 1) values."""
    return random.standard_normal(shape)


def positive(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Values in (0.5, 2), for functions that are undefined or not smooth at zero."""
    return random.uniform(0.5, 2.0, shape)


def distinct(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Values at least 0.1 apart, in random order, for functions that depend on the order of the elements."""
    return 0.1 * random.permutation(math.prod(shape)).reshape(shape)


def nonzero(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Values of both signs, at least 0.5 from zero, for functions that are not smooth at zero."""
    return _away_from_zero(random, shape)


def fraction(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Values in (-0.8, 0.8), for functions that are defined on (-1, 1)."""
    return random.uniform(-0.8, 0.8, shape)


def spread(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Values at least 0.31 apart, not near integers, half of them negative, for functions with kinks at integers."""
    return distinct(random, shape) * 3.7 - 0.05 - 0.37 * (math.prod(shape) // 2)


def initial(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Normal values for parameters: matrices divided by sqrt(rows), vectors (gains and biases) around 1."""
    values = random.standard_normal(shape)
    return values / math.sqrt(shape[0]) if len(shape) > 1 else 1 + 0.3 * values


@dataclass(frozen=True)
class GradientCase:
    """One row of the table. `fn` is checked at random inputs of these shapes; its error must be at most `bound`."""

    name: str
    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    draw: Draw = standard_normal
    bound: float = 1e-7

    def error(self, seed: int = 0, device: str = "cpu") -> float:
        """The largest error over all inputs."""
        random = numpy.random.default_rng([seed, *self.name.encode()])  # independent of the other rows
        return max(check(self.fn, [self.draw(random, shape) for shape in self.shapes], seed=seed, device=device))


BLOCK_WIDTH, BLOCK_HEADS, BLOCK_VOCABULARY = 6, 2, 11
BLOCK_SHAPES: tuple[tuple[int, ...], ...] = (
    tuple(
        shape
        for n_in, n_out in ((1, 3), (1, 1), (1, 4), (4, 1))  # queries, keys and values; projection; MLP in and out
        for shape in ((n_in * BLOCK_WIDTH, n_out * BLOCK_WIDTH), (n_out * BLOCK_WIDTH,))
    )
    + ((BLOCK_WIDTH,),) * 4
)  # gain and bias of two LayerNorms
KEY = Key(seed=1, step=2, first_sample=3)
TOKENS = numpy.array([[3, 1, 3, 0, 10], [3, 3, 2, 9, 1]])  # with repetitions
TARGETS = numpy.array([[1, 3, 0, 10, 10], [3, 2, 9, 1, 0]])


def block(x: Tensor, *parameters: Tensor, site: int = 0) -> Tensor:
    """A pre-LayerNorm transformer block with dropout on the attention weights and the MLP output."""
    w_qkv, b_qkv, w_mix, b_mix, w_in, b_in, w_out, b_out, gain_1, bias_1, gain_2, bias_2 = parameters
    qkv = ops.linear(ops.layernorm(x, gain_1, bias_1), w_qkv, b_qkv)
    mixed = ops.linear(ops.attention(qkv, BLOCK_HEADS, 0.2, KEY.at(site)), w_mix, b_mix)
    x, h = ops.add_layernorm(x, mixed, gain_2, bias_2)
    h = ops.linear(ops.gelu(ops.linear(h, w_in), b_in), w_out, b_out)
    return x + ops.dropout(h, 0.2, KEY.at(site + 1))


def stack(wte: Tensor, wpe: Tensor, gain: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
    """Embeddings, two blocks, a final LayerNorm, and the loss of an output layer tied to the token embedding."""
    x = ops.embedding(TOKENS, wte, wpe)
    for layer in range(2):
        x = block(x, *parameters[layer * len(BLOCK_SHAPES) :][: len(BLOCK_SHAPES)], site=2 * layer)
    return ops.lm_head(ops.layernorm(x, gain, bias), wte, TARGETS)


CASES: tuple[GradientCase, ...] = (
    GradientCase("add", lambda a, b: a + b, ((3, 4), (3, 4))),
    GradientCase("add, broadcast", lambda a, b: a + b, ((2, 3, 4), (3, 1))),
    GradientCase("add, a number", lambda a: 2 + a + 1.5, ((3, 4),)),
    GradientCase("subtract, broadcast", lambda a, b: a - b, ((1, 4), (3, 1))),
    GradientCase("subtract, from a number", lambda a: 2 - a, ((3, 4),)),
    GradientCase("negate", lambda a: -a, ((3, 4),)),
    GradientCase("shift, by numbers", lambda a: a + 1.5 - 2, ((3, 4),)),
    GradientCase("scale, by a number", lambda a: a * 1.5, ((3, 4),)),
    GradientCase("astype", lambda a: a.astype(a.dtype), ((3, 4),)),
    GradientCase("multiply", lambda a, b: a * b, ((3, 4), (3, 4))),
    GradientCase("multiply, broadcast", lambda a, b: a * b, ((4,), (2, 3, 1))),
    GradientCase("multiply, by itself", lambda a: a * a, ((3, 4),)),
    GradientCase("divide, broadcast", lambda a, b: a / b, ((3, 1), (2, 1, 4)), positive),
    GradientCase("divide, a number", lambda a: 2 / a, ((3, 4),), positive),
    GradientCase("power 3", lambda x: x**3, ((3, 4),)),
    GradientCase("power -0.5", lambda x: x**-0.5, ((3, 4),), positive),
    GradientCase("exp", lambda x: x.exp(), ((3, 4),)),
    GradientCase("log", lambda x: x.log(), ((3, 4),), positive),
    GradientCase("tanh", lambda x: x.tanh(), ((3, 4),)),
    GradientCase("sum", lambda x: x.sum(), ((3, 4),)),
    GradientCase("sum, axes", lambda x: x.sum((0, -1)), ((2, 3, 4),)),
    GradientCase("sum, keepdims", lambda x: x.sum(1, keepdims=True), ((2, 3, 4),)),
    GradientCase("mean, axes", lambda x: x.mean((0, 2)), ((2, 3, 4),)),
    GradientCase("max", lambda x: x.max(), ((3, 4),), distinct),
    GradientCase("max, axes", lambda x: x.max((0, -1)), ((2, 3, 4),), distinct),
    GradientCase("max, keepdims", lambda x: x.max(1, keepdims=True), ((2, 3, 4),), distinct),
    GradientCase("reshape", lambda x: x.reshape(4, -1), ((2, 3, 4),)),
    GradientCase("transpose", lambda x: x.transpose(), ((2, 3, 4),)),
    GradientCase("transpose, axes", lambda x: x.transpose(1, -1, 0), ((2, 3, 4),)),
    GradientCase("getitem, slices", lambda x: x[1:, ..., ::-2], ((3, 2, 5),)),
    GradientCase("getitem, repeated integers", lambda x: x[[0, 2, 0, 0]], ((3, 4),)),
    GradientCase("getitem, pairs", lambda x: x[[0, 2, 0], [1, 3, 1]], ((3, 4),)),
    GradientCase("matmul", lambda a, b: a @ b, ((3, 4), (4, 5))),
    GradientCase("matmul, batched", lambda a, b: a @ b, ((2, 3, 4), (2, 4, 5))),
    GradientCase("matmul, broadcast", lambda a, b: a @ b, ((2, 1, 3, 4), (5, 4, 2))),
    GradientCase("matmul, vectors", lambda a, b: a @ b, ((4,), (4,))),
    GradientCase("matmul, of a vector", lambda a, b: a @ b, ((4,), (2, 4, 3))),
    GradientCase("matmul, by a vector", lambda a, b: a @ b, ((2, 3, 4), (4,))),
    GradientCase("linear", ops.linear, ((2, 3, 4), (4, 5), (5,))),
    GradientCase("linear, no bias", ops.linear, ((3, 4), (4, 5))),
    GradientCase("logits", ops.logits, ((2, 3, 4), (5, 4))),
    GradientCase("embedding", lambda wte: ops.embedding(TOKENS, wte), ((11, 4),)),
    GradientCase("embedding, positions", lambda wte, wpe: ops.embedding(TOKENS, wte, wpe, 2), ((11, 4), (8, 4))),
    GradientCase("dropout", lambda x: ops.dropout(x, 0.3, KEY), ((2, 5, 7),)),
    GradientCase("layernorm", ops.layernorm, ((2, 3, 7), (7,), (7,))),
    GradientCase("add_layernorm", ops.add_layernorm, ((2, 3, 7), (2, 3, 7), (7,), (7,))),
    GradientCase("add_layernorm, only s", lambda *x: ops.add_layernorm(*x)[0], ((2, 3, 7), (2, 3, 7), (7,), (7,))),
    GradientCase("add_layernorm, only y", lambda *x: ops.add_layernorm(*x)[1], ((2, 3, 7), (2, 3, 7), (7,), (7,))),
    GradientCase("attention, one token", lambda qkv: ops.attention(qkv, 2), ((2, 1, 18),)),
    GradientCase("attention", lambda qkv: ops.attention(qkv, 2), ((2, 7, 18),)),
    GradientCase("attention, dropout", lambda qkv: ops.attention(qkv, 2, 0.3, KEY), ((2, 7, 18),)),
    GradientCase("attention, two query blocks", lambda qkv: ops.attention(qkv, 2), ((1, 131, 12),)),
    GradientCase("attention, both", lambda qkv: ops.attention(qkv, 2, 0.3, KEY), ((1, 131, 12),)),
    GradientCase("gelu", ops.gelu, ((2, 3, 7), (7,))),
    GradientCase("gelu, no bias", ops.gelu, ((2, 3, 7),)),
    GradientCase("gelu_exact", lambda x, bias: ops.gelu(x, bias, exact=True), ((2, 3, 7), (7,))),
    GradientCase("gelu_exact, no bias", lambda x: ops.gelu(x, exact=True), ((2, 3, 7),)),
    GradientCase("softmax", ops.softmax, ((2, 3, 7),)),
    GradientCase("cross_entropy", lambda logits: ops.cross_entropy(logits, TARGETS), ((2, 5, 11),)),
    GradientCase(
        "cross_entropy, transposed", lambda x: ops.cross_entropy(x.transpose(1, 0, 2), TARGETS), ((5, 2, 11),)
    ),
    GradientCase("lm_head", lambda x, weight: ops.lm_head(x, weight, TARGETS), ((2, 5, 4), (11, 4))),
    GradientCase("lm_head_in_chunks", lambda x, weight: ops.lm_head(x, weight, TARGETS, 4), ((2, 5, 4), (11, 4))),
    GradientCase("recompute", lambda x: recompute(lambda x: x.tanh() * x, x), ((3, 4),)),
    GradientCase("transformer block", block, ((2, 5, BLOCK_WIDTH), *BLOCK_SHAPES), initial, 1e-6),
    GradientCase(
        "transformer, two blocks",
        stack,
        (
            (BLOCK_VOCABULARY, BLOCK_WIDTH),
            (5, BLOCK_WIDTH),
            (BLOCK_WIDTH,),
            (BLOCK_WIDTH,),
            *BLOCK_SHAPES,
            *BLOCK_SHAPES,
        ),
        initial,
        1e-6,
    ),
)

SELECTED = numpy.array([[True, False, True, True], [False, False, True, False], [True, True, False, False]])
PLACES = numpy.array([[2, 0, 0], [1, 1, 3]])
WEIGHTS = numpy.linspace(0.5, 2.0, 11)  # class weights
VISIBLE = numpy.array([[True, False, True, False, True], [True, True, True, True, True], [False] * 5])
QUERIES, GROUPS, PAIRS = (2, 4, 3, 6), (2, 2, 5, 6), (2, 2, 5, 4)  # query, key and value of attention

# Operations in methods.py and functional.py: the names of their rows begin with the operation's name.
COMPOSITIONS = (
    *(
        GradientCase(name, getattr(f, name), shape, draw)
        for shape, draw, names in (
            (
                ((3, 4),),
                standard_normal,
                "sin cos sinh cosh arctan arcsinh exp2 expm1 erf square sigmoid logsigmoid",
            ),
            (
                ((3, 4),),
                standard_normal,
                "silu quick_gelu softplus mish logsumexp log_softmax var std norm prod cumsum",
            ),
            (((3, 4),), standard_normal, "cumprod rmsnorm nan_to_num"),
            (((3, 4),), positive, "sqrt rsqrt reciprocal log1p log2 log10"),
            (((3, 4),), fraction, "tan arcsin arccos arctanh"),
            (((3, 4),), spread, "abs sign floor ceil round trunc relu relu6 leaky_relu elu selu celu softsign"),
            (((3, 4),), spread, "hardtanh hardsigmoid hardswish min sort"),
            (((2, 3, 4),), standard_normal, "squeeze flatten ravel flip tril triu diagonal trace negative"),
        )
        for name in names.split()
    ),
    GradientCase("arccosh, from 1", lambda x: f.arccosh(x + 1.0), ((3, 4),), positive),
    GradientCase("elu, alpha", lambda x: f.elu(x, alpha=0.5), ((3, 4),), spread),
    GradientCase("celu, alpha", lambda x: f.celu(x, alpha=0.5), ((3, 4),), spread),
    GradientCase("clip", lambda x: f.clip(x, -1.0, 1.0), ((3, 4),), spread),
    GradientCase("clip, one bound", lambda x: f.clip(x, max=0.0), ((3, 4),), spread),
    GradientCase("maximum", f.maximum, ((3, 4), (3, 4)), distinct),
    GradientCase("maximum, broadcast", f.maximum, ((2, 3, 1), (3, 4)), distinct),
    GradientCase("minimum, broadcast", f.minimum, ((2, 3, 1), (3, 4)), distinct),
    GradientCase("maximum, a number", lambda x: f.maximum(0.0, x), ((3, 4),), spread),
    GradientCase("power", lambda a, b: a**b, ((3, 4), (3, 4)), positive),
    GradientCase("power, broadcast", f.power, ((2, 1, 4), (3, 1)), positive),
    GradientCase("power, of a number", lambda x: 2.5**x, ((3, 4),)),
    GradientCase("remainder", lambda a, b: f.remainder(a, b + 9.13), ((3, 4), (4,)), spread),
    GradientCase("logaddexp, broadcast", f.logaddexp, ((3, 1), (4,))),
    GradientCase("arctan2", f.arctan2, ((3, 4), (3, 1)), nonzero),
    GradientCase("hypot", f.hypot, ((3, 4), (3, 1)), nonzero),
    GradientCase("lerp", f.lerp, ((3, 4), (3, 1), (4,))),
    GradientCase("where", lambda a, b: f.where(SELECTED, a, b), ((3, 4), (3, 4))),
    GradientCase("where, broadcast", lambda a, b: f.where(SELECTED, a, b), ((2, 1, 4), (3, 1))),
    GradientCase("masked_fill", lambda x: f.masked_fill(x, SELECTED, 2.0), ((3, 4),)),
    GradientCase("min, axes", lambda x: f.min(x, (0, -1)), ((2, 3, 4),), distinct),
    GradientCase("prod, axes", lambda x: f.prod(x, (0, 2), keepdims=True), ((2, 3, 4),)),
    GradientCase("prod, zeros", lambda x: f.prod(x * numpy.array([[0.0], [1.0], [1.0]]), 1), ((3, 4),)),
    GradientCase("var, axes", lambda x: f.var(x, (0, 2), ddof=1), ((2, 3, 4),)),
    GradientCase("std, axis", lambda x: f.std(x, -1, keepdims=True, correction=1), ((2, 3, 4),)),
    GradientCase("norm, axis", lambda x: f.norm(x, axis=1), ((2, 3, 4),)),
    GradientCase("norm, of order 3", lambda x: f.norm(x, 3, axis=1), ((2, 3, 4),)),
    GradientCase("logsumexp, axes", lambda x: f.logsumexp(x, (0, 2), keepdims=True), ((2, 3, 4),)),
    GradientCase("softmax, axis", lambda x: f.softmax(x, 1), ((2, 3, 4),)),
    GradientCase("log_softmax, axis", lambda x: f.log_softmax(x, 0), ((2, 3, 4),)),
    GradientCase("cumsum, axis", lambda x: f.cumsum(x, 1), ((2, 3, 4),)),
    GradientCase("cumprod, axis", lambda x: f.cumprod(x, 0), ((3, 2, 4),)),
    GradientCase("sort, descending", lambda x: f.sort(x, 0, descending=True).values, ((3, 4),), distinct),
    GradientCase("topk", lambda x: f.topk(x, 2, 1).values, ((3, 4),), distinct),
    GradientCase("squeeze, axis", lambda x: f.squeeze(x, 1), ((3, 1, 4, 1),)),
    GradientCase("unsqueeze", lambda x: f.unsqueeze(x, -2), ((3, 4),)),
    GradientCase("expand_dims", lambda x: f.expand_dims(x, 0), ((3, 4),)),
    GradientCase("flatten, axes", lambda x: f.flatten(x, 1, 2), ((2, 3, 4, 2),)),
    GradientCase("unflatten", lambda x: f.unflatten(x, 1, (2, 3)), ((2, 6),)),
    GradientCase("permute", lambda x: x.permute(2, 0, 1), ((2, 3, 4),)),
    GradientCase("swapaxes", lambda x: f.swapaxes(x, 0, -1), ((2, 3, 4),)),
    GradientCase("moveaxis", lambda x: f.moveaxis(x, 0, 2), ((2, 3, 4),)),
    GradientCase("flip, axes", lambda x: f.flip(x, (0, -1)), ((2, 3, 4),)),
    GradientCase("roll", lambda x: f.roll(x, 5), ((3, 4),)),
    GradientCase("roll, axes", lambda x: f.roll(x, (1, -2), (0, 2)), ((2, 3, 4),)),
    GradientCase("broadcast_to", lambda x: f.broadcast_to(x, 2, 3, 4), ((3, 1),)),
    GradientCase("expand", lambda x: x.expand(2, -1, 4), ((3, 1),)),
    GradientCase("repeat", lambda x: f.repeat(x, 3, 1), ((3, 4),)),
    GradientCase("repeat, counts", lambda x: f.repeat(x, (2, 0, 1), 0), ((3, 4),)),
    GradientCase("tile", lambda x: f.tile(x, 2, 1, 3), ((3, 4),)),
    GradientCase("split", lambda x: f.split(x, 2, 1), ((2, 5),)),
    GradientCase("split, sizes", lambda x: f.split(x, (1, 4), -1), ((2, 5),)),
    GradientCase("chunk", lambda x: f.chunk(x, 3, 1), ((2, 5),)),
    GradientCase("pad", lambda x: f.pad(x, ((1, 0), (2, 3)), constant_values=0.5), ((3, 4),)),
    GradientCase("pad, reflect", lambda x: f.pad(x, 2, mode="reflect"), ((3, 4),)),
    GradientCase("pad, edge", lambda x: f.pad(x, (1, 2), mode="edge"), ((3, 4),)),
    GradientCase("gather", lambda x: f.gather(x, 1, PLACES), ((3, 4),)),
    GradientCase("take", lambda x: f.take(x, PLACES, -1), ((3, 4),)),
    GradientCase("diagonal, offset", lambda x: f.diagonal(x, 1, -2, 0), ((4, 3, 2),)),
    GradientCase("diag", lambda x: f.diag(x, -1), ((3,),)),
    GradientCase("tril, diagonal", lambda x: f.tril(x, -1), ((3, 4),)),
    GradientCase("triu, diagonal", lambda x: f.triu(x, 1), ((3, 4),)),
    GradientCase("dot", f.dot, ((2, 3, 4), (4, 5))),
    GradientCase("inner", f.inner, ((2, 4), (3, 4))),
    GradientCase("outer", f.outer, ((3,), (2, 2))),
    GradientCase("tensordot", f.tensordot, ((2, 3, 4), (3, 4, 5))),
    GradientCase("tensordot, axes", lambda a, b: f.tensordot(a, b, ((0, 2), (1, 0))), ((2, 3, 4), (4, 2, 5))),
    GradientCase("matmul, function", f.matmul, ((2, 3, 4), (4, 2))),
    GradientCase("einsum, matrices", lambda a, b: f.einsum("ij,jk->ik", a, b), ((3, 4), (4, 2))),
    GradientCase("einsum, batch", lambda a, b: f.einsum("bhid,bhjd->bhij", a, b), ((2, 2, 3, 4), (2, 2, 5, 4))),
    GradientCase("einsum, three", lambda a, b, c: f.einsum("ai,bij,cj->abc", a, b, c), ((2, 3), (4, 3, 5), (2, 5))),
    GradientCase("einsum, diagonal", lambda a: f.einsum("iij->ji", a), ((3, 3, 4),)),
    GradientCase("einsum, trace", lambda a, b: f.einsum("ii,jk", a, b), ((3, 3), (2, 2))),
    GradientCase("einsum, dots", lambda a, b: f.einsum("...ij,j...->...i", a, b), ((2, 1, 3, 4), (4, 5))),
    GradientCase("concatenate", lambda a, b: f.concatenate([a, b, a], 1), ((3, 4), (3, 2))),
    GradientCase("concatenate, flattened", lambda a, b: f.concatenate([a, b], None), ((3, 4), (2,))),
    GradientCase("stack, axis", lambda a, b: f.stack([a, b], -1), ((3, 4), (3, 4))),
    GradientCase("dstack", lambda a, b: f.dstack([a, b]), ((4,), (1, 4, 2))),
    GradientCase("vdot", f.vdot, ((3, 4), (12,))),
    GradientCase("kron", f.kron, ((2, 3), (3, 1, 2))),
    GradientCase("degrees", f.degrees, ((3, 4),)),
    GradientCase("radians", f.radians, ((3, 4),)),
    GradientCase("diff", lambda x: f.diff(x, 2, 1), ((3, 5, 2),)),
    GradientCase("array_split", lambda x: f.array_split(x, 3, 1), ((2, 5),)),
    GradientCase("vstack", lambda a, b: f.vstack([a, b]), ((4,), (2, 4))),
    GradientCase("hstack, two", lambda a, b: f.hstack([a, b]), ((4, 1), (4, 2))),
    GradientCase("meshgrid", f.meshgrid, ((3,), (4,))),
    GradientCase("add, function", f.add, ((3, 4), (4,))),
    GradientCase("subtract, function", f.subtract, ((3, 4), (4,))),
    GradientCase("multiply, function", f.multiply, ((3, 4), (4,))),
    GradientCase("divide, function", f.divide, ((3, 4), (4,)), positive),
    GradientCase("rmsnorm, weight", f.rmsnorm, ((2, 3, 4), (4,))),
    GradientCase("layernorm, no weight", f.layernorm, ((2, 3, 7),)),
    GradientCase("layernorm, no bias", f.layernorm, ((2, 3, 7), (7,))),
    GradientCase("rotary_embedding", lambda x: f.rotary_embedding(x, 3), ((2, 5, 6),)),
    GradientCase("rotary_embedding, interleaved", lambda x: f.rotary_embedding(x, interleaved=True), ((2, 5, 6),)),
    GradientCase("scaled_dot_product_attention", f.scaled_dot_product_attention, (QUERIES, GROUPS, PAIRS)),
    GradientCase(
        "scaled_dot_product_attention, mask",
        lambda q, k, v: f.scaled_dot_product_attention(q, k, v, VISIBLE),
        (QUERIES, GROUPS, PAIRS),
    ),
    GradientCase(
        "scaled_dot_product_attention, bias",
        lambda q, k, v, bias: f.scaled_dot_product_attention(q, k, v, bias),
        (QUERIES, GROUPS, PAIRS, (4, 3, 5)),
    ),
    GradientCase(
        "scaled_dot_product_attention, causal, dropout",
        lambda q, k, v: f.scaled_dot_product_attention(q, k, v, None, 0.3, True, 0.5, KEY),
        ((3, 6), (5, 6), (5, 4)),
    ),
    GradientCase("mse_loss", f.mse_loss, ((3, 4), (3, 4))),
    GradientCase("l1_loss", lambda a, b: f.l1_loss(a, b + 9.0, "sum"), ((3, 4), (3, 4)), distinct),
    GradientCase("nll_loss", lambda x: f.nll_loss(x, TARGETS), ((2, 5, 11),)),
    GradientCase(
        "binary_cross_entropy", lambda p, t: f.binary_cross_entropy(p / 4.0, t / 4.0), ((3, 4), (3, 4)), positive
    ),
    GradientCase(
        "binary_cross_entropy_with_logits",
        lambda x, t: f.binary_cross_entropy_with_logits(x, t, "none"),
        ((3, 4), (3, 4)),
    ),
    GradientCase(
        "cross_entropy, options",
        lambda x: f.cross_entropy(x, TARGETS, WEIGHTS, ignore_index=3, label_smoothing=0.1),
        ((2, 5, 11),),
    ),
    GradientCase(
        "cross_entropy, none",
        lambda x: f.cross_entropy(x, TARGETS, reduction="none", label_smoothing=0.1),
        ((2, 5, 11),),
    ),
    GradientCase("cross_entropy, shares", lambda x, t: f.cross_entropy(x, f.softmax(t)), ((3, 4), (3, 4))),
)
CASES += COMPOSITIONS


class Parser(argparse.ArgumentParser):
    """Reports an invalid option in a single line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (python -m {self.prog} --help lists the options)\n")


def command_line() -> Parser:
    parser = Parser(
        prog="tinygrad2.gradcheck",
        usage="python -m tinygrad2.gradcheck [OPTIONS]",
        description="Check the backward pass of every operation against finite differences, in float64.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of inputs and directions [default: %(default)s]"
    )
    group.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute [default: %(default)s]")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every row of CASES and print the table. Returns 0 if all errors are within their bounds, 1 if not, and 2 if
    the device is not available."""
    parser = command_line()
    options = parser.parse_args(arguments)
    try:
        get_backend(options.device)
    except ValueError as missing:
        print(f"{parser.prog}: error: {missing}", file=sys.stderr)
        return 2
    start, failed = time.perf_counter(), 0
    names, shapes = max(len(case.name) for case in CASES), max(len(_shapes(case)) for case in CASES)
    print(f"{'operation':{names}}  {'shapes':{shapes}}{'error':>9}{'bound':>9}")
    for case in CASES:
        error = case.error(options.seed, options.device)
        failed += not error <= case.bound
        verdict = "ok" if error <= case.bound else "FAILED"
        print(f"{case.name:{names}}  {_shapes(case):{shapes}}{error:9.1e}{case.bound:9.0e}  {verdict}")
    seconds = time.perf_counter() - start
    print(f"{len(CASES) - failed} of {len(CASES)} gradients are correct ({seconds:.1f} s)")
    return 1 if failed else 0


def _shapes(case: GradientCase) -> str:
    """The shapes of a case's inputs, shortened if there are many."""
    shown = [str(shape).replace(" ", "") for shape in case.shapes]
    return " ".join(shown if len(shown) <= 4 else [shown[0], f"and {len(shown) - 1} parameters"])


def run() -> int:
    """Run the command and return its exit status. Ctrl-C prints one line, and a closed pipe nothing, instead of a
    traceback."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        discard_stdout()  # Python flushes stdout again when it exits
        return 0
    except KeyboardInterrupt:
        print("tinygrad2.gradcheck: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(run())
