"""Check backward passes against finite differences, in float64.

`check(fn, inputs)` tests any function. `python -m tinygrad2.gradcheck` tests every operation of the engine
and a small transformer, prints a table, and exits with 1 if the error of a row is above its bound. To check another
operation, add a row to CASES.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import ArrayLike

from tinygrad2 import ops
from tinygrad2.autograd import no_grad
from tinygrad2.backend import DEVICES, get_backend
from tinygrad2.random import Key
from tinygrad2.tensor import Tensor, recompute, record

STEP = 5e-4  # of the differences; their truncation error ~ STEP^4 and rounding error ~ 1e-16 / STEP are about 1e-13
FLOOR = (
    1e-4  # errors are relative to the slope, but at least to this fraction of the outputs, which bounds their rounding
)


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
    """The relative error of the gradient of each input of `fn`; that of a correct gradient is about 1e-10.

    fn          takes one Tensor per input and returns a Tensor of any shape or a tuple of them. It must be smooth
                within 2e-3 of the inputs and give the same result each time (dropout: with a fixed key).
    inputs      a list or tuple of arrays, Tensors or nested lists, of values around 1; copied to float64.
    tolerance   with raises=True, the largest error that is accepted.
    directions  how many random directions are tried for each input.
    names       of the inputs, for error messages.
    device      where fn computes; the comparison is done on the host.

    With a random cotangent w, L = <w, fn(x)>. For each input and each random direction v, <v, dL/dx> by backward is
    compared with the slope of L along v: [8 (L(x+hv) - L(x-hv)) - (L(x+2hv) - L(x-2hv))] / 12h. Its truncation error is
    of the order h^4; that of the two-point difference is h^2, never reliably below 1e-9. No component of v or w is
    near zero, so that every coordinate counts. An input's error is |backward - slope| / |slope|, norms over its
    directions. The denominator is at least FLOOR max(1, |w y|): a gradient that is truly zero is then no failure, and
    one wrong by 0.1 % is found unless it is below 1e-8 of the outputs. A missing gradient counts as zero; NaN or
    infinity anywhere makes the error infinite.

    Raises AssertionError with raises=True if an error exceeds the tolerance; TypeError for inputs that are not a list
    or tuple, and for an `fn` that does not return Tensors.
    """
    if not isinstance(inputs, list | tuple):
        raise TypeError(
            f"gradcheck: inputs are of type {type(inputs).__name__}; expected a list with one array for each"
        )
    backend = get_backend(device)
    arrays = [numpy.array(x.numpy() if isinstance(x, Tensor) else x, dtype=numpy.float64) for x in inputs]
    for array in arrays:
        array.flags.writeable = False  # an fn that modifies its inputs would change every later evaluation
    random = numpy.random.default_rng(seed)

    leaves = [Tensor(backend.asarray(array), requires_grad=True) for array in arrays]
    results = _results(fn(*leaves))
    cotangents = tuple(_away_from_zero(random, y.shape) for y in results)
    weighted = [w * y.numpy() for w, y in zip(cotangents, results, strict=True)]
    sent = tuple(backend.asarray(w) for w in cotangents)
    loss = record(numpy.asarray(sum(numpy.sum(wy) for wy in weighted)), results, lambda saved, dy, into: saved, sent)
    if loss.requires_grad:
        loss.backward()
    floor = FLOOR * max(1.0, math.hypot(*(float(numpy.linalg.norm(wy)) for wy in weighted)))

    def loss_change(i: int, change: numpy.ndarray) -> float:
        """L(x_i + change) - L(x_i - change), subtracted before summing, which reduces the rounding error."""
        with no_grad(), numpy.errstate(invalid="ignore"):  # a value that is not finite makes the error infinite
            up, down = (
                _results(
                    fn(*(Tensor(backend.asarray(x + sign * change if j == i else x)) for j, x in enumerate(arrays)))
                )
                for sign in (1, -1)
            )
            return sum(numpy.sum(w * (a.numpy() - b.numpy())) for w, a, b in zip(cotangents, up, down, strict=True))

    errors = []
    for i, (leaf, array) in enumerate(zip(leaves, arrays, strict=True)):
        tangents = [_away_from_zero(random, array.shape) for _ in range(directions)]
        gradient = numpy.zeros(array.shape) if leaf.grad is None else backend.to_host(leaf.grad)
        analytic = numpy.array([numpy.sum(v * gradient) for v in tangents])
        numeric = numpy.array(
            [(8 * loss_change(i, STEP * v) - loss_change(i, 2 * STEP * v)) / (12 * STEP) for v in tangents]
        )
        difference = analytic - numeric
        slope = max(float(numpy.linalg.norm(numeric)), floor * math.sqrt(directions))
        error = float(numpy.linalg.norm(difference)) / slope
        errors.append(error if math.isfinite(error) else math.inf)
        if raises and errors[-1] > tolerance:
            worst = int(numpy.argmax(numpy.abs(difference)))  # argmax returns the index of a NaN, if any
            raise AssertionError(
                f"gradcheck: input {i if names is None else names[i]} of shape {array.shape}: relative error "
                f"{errors[-1]:.1e}, expected at most {tolerance:.0e}; along one direction backward gives "
                f"{analytic[worst]:.12g}{' (the gradient is missing)' if leaf.grad is None else ''}, "
                f"finite differences {numeric[worst]:.12g}"
            )
    return errors


def _results(y: Any) -> tuple[Tensor, ...]:
    results = y if isinstance(y, tuple) else (y,)
    for result in results:
        if not isinstance(result, Tensor):
            raise TypeError(f"gradcheck: fn returned {type(result).__name__}; expected a Tensor or a tuple of Tensors")
    return results


def _away_from_zero(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Random signs times uniform(0.5, 1.5)."""
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
    """Values at least 0.1 apart in random order, for functions that depend on which element is the largest."""
    return 0.1 * random.permutation(math.prod(shape)).reshape(shape)


def initial(random: numpy.random.Generator, shape: tuple[int, ...]) -> numpy.ndarray:
    """Normal values for parameters: matrices divided by sqrt(rows), vectors (gains, biases) about 1."""
    values = random.standard_normal(shape)
    return values / math.sqrt(shape[0]) if len(shape) > 1 else 1 + 0.3 * values


@dataclass(frozen=True)
class GradientCase:
    """One row of the table: `fn` is checked at random inputs of these shapes; its error must be at most `bound`."""

    name: str
    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    draw: Draw = standard_normal
    bound: float = 1e-7

    def error(self, seed: int = 0, device: str = "cpu") -> float:
        """The largest error of all inputs."""
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
    """A pre-LayerNorm transformer block with dropout on the attention weights and on the MLP's result."""
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


CASES = (
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


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinygrad2.gradcheck",
        usage="python -m tinygrad2.gradcheck [OPTIONS]",
        description="Check the backward pass of every operation against finite differences, in float64.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the inputs and the directions [default: %(default)s]"
    )
    group.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute [default: %(default)s]")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every row of CASES and print the table. Returns 0 if all are within their bounds, 1 if not, 2 if the device
    is not available."""
    parser = command_line()
    options = parser.parse_args(arguments)
    try:
        get_backend(options.device)
    except ValueError as missing:
        print(f"{parser.prog}: error: {missing}", file=sys.stderr)
        return 2
    start, failed = time.perf_counter(), 0
    print(f"{'operation':29}{'shapes':42}{'error':>9}{'bound':>9}")
    for case in CASES:
        error = case.error(options.seed, options.device)
        failed += not error <= case.bound
        shown = [str(shape).replace(" ", "") for shape in case.shapes]
        shapes = " ".join(shown if len(shown) <= 4 else [shown[0], f"and {len(shown) - 1} parameters"])
        print(f"{case.name:29}{shapes:42}{error:9.1e}{case.bound:9.0e}  {'ok' if error <= case.bound else 'FAILED'}")
    seconds = time.perf_counter() - start
    print(f"{len(CASES) - failed} of {len(CASES)} gradients are right ({seconds:.1f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
