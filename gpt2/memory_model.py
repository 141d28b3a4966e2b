"""Estimates the memory that each rank allocates in a training step, by purpose.

Symbols: B sequences of T tokens, N = B T rows, C channels, H heads, V tokens in the vocabulary, L layers, P parameters.
Arrays are (N, C) unless noted otherwise. The array of queries, keys and values is three times as wide, and the arrays
inside an MLP are four times as wide. The numbers of arrays follow from the order of operations in model.py and from
what ops.py saves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gpt2.config import GPT2Config
from tinygrad2.backend import Backend, CudaBackend
from tinygrad2.precision import FLOAT32, Precision

GRANULE = 1 << 16  # bytes; tinygrad2/memory.py rounds the size of larger arrays up to a multiple of this
CHUNK = 64  # rows per partial sum of a parameter's gradient (kernels/cpu.py)
BUCKET = 1 << 22  # elements per all-reduce, and per computation of Muon's momentum (params.py)
RECEIVED = 16 << 20  # bytes that a rank receives at a time when sums are computed on the host (distributed.py)
WORKSPACE = 32 << 20  # bytes for cuBLASLt (kernels/gemm.py)
QUERY_ROWS = 128  # rows of scores at a time in attention
# Bytes of Python with NumPy and the compiled kernels (measured), a CUDA context with cuBLASLt, and NCCL (estimated).
LIBRARIES, CONTEXT, NCCL = 190_000_000, 600_000_000, 400_000_000
ALIGNED = 64  # on a GPU, the rows of the output layer's matrix are padded to a multiple of this


@dataclass(frozen=True)
class Step:
    """A training step on one rank.

    batch_size, block_size  B and T of a micro-step.
    optimizer               "adamw", "muon", or "sgd" (with momentum).
    ranks                   the number of ranks.
    zero                    whether the ranks share the optimizer state (ZeRO stage 1).
    cuda                    whether the step runs on a GPU.
    threads                 the number of CPU threads.
    """

    config: GPT2Config
    batch_size: int
    block_size: int
    precision: Precision = FLOAT32
    recompute: str = "none"
    head_rows: int | None = None
    optimizer: str = "adamw"
    ranks: int = 1
    zero: bool = False
    cuda: bool = False
    threads: int = 1

    @property
    def rows(self) -> int:
        """N, the number of rows in a micro-step."""
        return self.batch_size * self.block_size

    @property
    def hidden(self) -> int:
        """The number of elements in the matrices of all blocks."""
        return 12 * self.config.n_layer * self.config.n_embd**2

    @property
    def dropout(self) -> bool:
        return self.config.resid_pdrop > 0


def step_memory(step: Step) -> dict[str, int]:
    """Bytes per rank, by purpose. Their sum is the peak."""
    return {
        **state(step),
        "activations": activations(step),
        "logits": logits(step),
        "buffers": buffers(step),
        "libraries": CONTEXT + (step.ranks > 1) * NCCL if step.cuda else LIBRARIES,
    }


def state(step: Step) -> dict[str, int]:
    """Bytes of weights (with their copies in the dtype of the activations), gradients, and the optimizer's moments.

    AdamW has 2 moments per parameter, SGD has 1, and Muon has 1 for the matrices of hidden layers and 2 for other
    parameters. With ZeRO stage 1 (arXiv:1910.02054), each rank stores a part of the moments.
    """
    P, types = step.config.n_parameters, step.precision
    copies = types.activation_bytes if types.copies else 0
    moments = {"adamw": 2 * P, "sgd": P, "muon": 2 * P - step.hidden}[step.optimizer]
    return {
        "weights": P * (types.parameter_bytes + copies),
        "gradients": P * types.parameter_bytes,
        "moments": math.ceil(moments / (step.ranks if step.zero else 1)) * types.parameter_bytes,
    }


def activations(step: Step) -> int:
    """Bytes of the arrays of the forward and backward passes, without the logits.

    A block saves 16 arrays of width C: 5 for the residual stream (two sums, their normalizations, and the result of
    attention), 3 for q, k and v, and 4 + 4 for the MLP. On the CPU, a wide model recomputes the normalizations and the
    result of GELU, so it saves 10. With recompute="block" a block saves only its 2 inputs, and the other arrays exist
    for one block at a time.

    On the CPU, a pool reuses a memory block only for arrays of the same size (tinygrad2/memory.py), so the peak is the
    sum of the maximum for each width, even if these maxima occur at different times. On a GPU, CuPy's pool splits
    memory blocks, so the peak is the largest total, in the backward pass of the last block's MLP or of the output
    layer.
    """
    L, s = step.config.n_layer, step.precision.activation_bytes
    block, dropped = step.recompute == "block", int(step.dropout)
    array = step.rows * step.config.n_embd * s
    if step.cuda:
        in_mlp = (2 * L + 21 if block else 16 * L + 5) + dropped
        in_head = 2 * L + 2 if block else 16 * L + 3
        total = max(in_mlp * array - logits(step), in_head * array)
    else:
        again = recomputed(step.config, step.cuda)
        narrow, wide = 5 - again["layernorm"], 2 - again["gelu"]  # arrays that a block saves
        counts = {1: narrow * L + 3 + (narrow < 5), 3: L + 1, 4: wide * L + 3 - wide}
        if block:
            counts = {1: min(2 * L + 7 + dropped, 5 * L + 3), 3: 2, 4: 3}
        total = sum(count * pooled(width * array) for width, count in counts.items())
    return total + _statistics(step)


def recomputed(config: GPT2Config, cuda: bool) -> dict[str, int]:
    """The number of results, "layernorm" and "gelu", that the linear layers of a block recompute instead of saving."""
    least, C = (CudaBackend if cuda else Backend).recompute_outputs, config.n_embd
    gelu = least <= C and config.activation_function != "gelu"
    return {"layernorm": (least <= 3 * C) + (least <= 4 * C), "gelu": int(gelu)}


def _statistics(step: Step) -> int:
    """Bytes of the mean and 1 / standard deviation of each row, and of attention's log-sum-exp for each head."""
    layers = 1 if step.recompute == "block" else step.config.n_layer
    itemsize = max(4, step.precision.activation_bytes)
    return (layers * (4 + step.config.n_head) + 2) * step.rows * itemsize


def logits(step: Step) -> int:
    """Bytes of a chunk of logits, which its gradient overwrites, and of the gradient of the chunk's features."""
    config, s = step.config, step.precision.activation_bytes
    columns = math.ceil(config.vocab_size / ALIGNED) * ALIGNED if step.cuda else config.vocab_size
    rows = math.ceil(step.rows / _chunks(step))
    return pooled(rows * columns * s) + (pooled(rows * config.n_embd * s) if rows < step.rows else 0)


def _chunks(step: Step) -> int:
    return head_chunks(step.config, step.rows, step.precision.activation_bytes, step.head_rows, step.cuda)


def head_chunks(config: GPT2Config, rows: int, itemsize: int, head_rows: int | None, cuda: bool) -> int:
    """The number of chunks in which the logits of a micro-step are computed; see ops.lm_head_gradients."""
    limit = (CudaBackend if cuda else Backend).logits_bytes
    most = head_rows or max(1, int(min(rows, limit / (config.vocab_size * itemsize))))
    return math.ceil(rows / most)


def buffers(step: Step) -> int:
    """Bytes of temporary arrays in kernels, in the optimizer, and for communication through host memory."""
    total = _cuda_buffers(step) if step.cuda else _cpu_buffers(step)
    if step.ranks > 1 and not step.cuda:
        total += RECEIVED
    # Muon: all orthogonalized matrices, a bucket's momentum twice, and 4 copies of a matrix per thread.
    if step.optimizer == "muon":
        C = step.config.n_embd
        bucket = min(step.config.n_parameters, max(BUCKET, 4 * C * C))
        threads = 1 if step.cuda else step.threads
        elements = step.hidden + bucket + min(step.hidden, bucket) + threads * 4 * 4 * C * C
        total += elements * step.precision.parameter_bytes
    return total


def _cpu_buffers(step: Step) -> int:
    """Two blocks of scores per thread, and partial gradient sums: two vectors of width C, one of 3 C and one of 4 C.

    In bfloat16, also two float32 arrays with the features of a chunk of logits. (This assumes oneDNN; without it, the
    float32 copies of a product's matrices are not counted.)
    """
    T, C, s = step.block_size, step.config.n_embd, max(4, step.precision.activation_bytes)
    scores = 2 * step.threads * min(T, QUERY_ROWS if T >= 512 else QUERY_ROWS // 2) * T * s
    wide = 2 * math.ceil(step.rows / _chunks(step)) * C * s if step.precision.copies else 0
    return scores + wide + math.ceil(step.rows / CHUNK) * 9 * C * s


def _cuda_buffers(step: Step) -> int:
    """cuBLASLt's workspace, and the padded copy of the output layer's matrix. If reference.py computes attention
    (dtypes other than bfloat16), also 4 blocks of scores of all heads."""
    config, types = step.config, step.precision
    padded = math.ceil(config.vocab_size / ALIGNED) * ALIGNED * config.n_embd * types.activation_bytes
    if types.copies:
        return WORKSPACE + padded
    T = step.block_size
    return WORKSPACE + padded + 4 * step.batch_size * config.n_head * min(T, QUERY_ROWS) * T * types.activation_bytes


def pooled(nbytes: int) -> int:
    """The size of the memory block that the pool allocates for an array."""
    return nbytes if nbytes < GRANULE else math.ceil(nbytes / GRANULE) * GRANULE


def needed(step: Step) -> int:
    """The number of bytes that a step needs on one rank."""
    return sum(step_memory(step).values())


def describe_need(step: Step) -> str:
    """Describe the memory of a step in one line."""
    parts = " + ".join(f"{value / 1e9:.2f} {name}" for name, value in step_memory(step).items())
    return f"{step.batch_size} sequences of {step.block_size} tokens need {parts} = {needed(step) / 1e9:.2f} GB"


def largest_batch(step: Step, available: float) -> int:
    """The largest batch_size for which `available` bytes are sufficient, found by bisection; 0 if there is none."""

    def fits(batch_size: int) -> bool:
        return needed(replace(step, batch_size=batch_size)) <= available

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
