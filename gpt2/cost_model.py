"""Predicts the cost of a training step: the FLOPs and bytes of every kernel, and its time on a device.

The time of a kernel is the maximum of the times for its arithmetic and for its memory traffic (the roofline model:
Williams, Waterman and Patterson, 2009), each at the rate that the kernel's family sustains on the device, plus the
overhead of a call:

    seconds = max(FLOPs / FLOP rate, bytes / byte rate) + call

Symbols: B sequences of T tokens, N = B T rows, C channels, H heads, V tokens in the vocabulary, L layers,
P parameters; s bytes per activation. Parameters, gradients and moments take 4 bytes. A product of (m, k) and (k, n)
takes 2 m k n FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from gpt2.config import GPT2Config
from gpt2.memory_model import head_chunks, recomputed
from tinygrad2.gpus import BANDWIDTH, PEAK_TFLOPS
from tinygrad2.precision import Precision, PrecisionLike

WIDE = 4  # bytes per parameter, gradient, moment or statistic


class Cost(NamedTuple):
    """The cost of one call of a kernel.

    family  the family of kernels whose rates apply.
    flops   FLOPs of matrix products; 0 for kernels limited by memory.
    nbytes  bytes read from and written to the device's memory.
    """

    family: str
    flops: float
    nbytes: float


class Kernel(NamedTuple):
    """A kernel of a step.

    calls     the number of calls per step.
    cost      the cost of one call.
    backward  whether it is part of the backward pass.
    """

    name: str
    calls: int
    cost: Cost
    backward: bool = False


class Rate(NamedTuple):
    """FLOP/s and bytes/s that a family of kernels sustains."""

    flops: float
    nbytes: float


@dataclass(frozen=True)
class Device:
    """A CPU or GPU.

    memory  bytes of memory, or None if unknown.
    rates   the rates of every family.
    call    seconds of overhead per call on the device.
    host    seconds of Python per call.
    link    bytes/s that a rank can send to one neighbour in a ring while it receives from the other.
    asynchronous  whether kernels run while Python launches the next ones.
    """

    name: str
    memory: float | None
    rates: Mapping[str, Rate]
    call: float
    host: float
    link: float
    asynchronous: bool = True

    def seconds(self, cost: Cost) -> float:
        """The time of one call."""
        rate = self.rates[cost.family]
        return max(cost.flops / rate.flops, cost.nbytes / rate.nbytes) + self.call

    def milliseconds(self, cost: Cost) -> float:
        return 1e3 * self.seconds(cost)


# Families ------------------------------------------------------------------------------------------------------------

PRODUCTS = ("product", "small product", "head product")  # small: with C x C; head: with the token embedding
ATTENTION = ("attention_forward", "attention_backward")
MEMORY = (
    "column_sums", "layernorm_forward", "layernorm_backward", "gelu_forward", "gelu_backward", "cross_entropy",
    "embedding", "dropout", "sum", "squared_norm", "update", "zero_grad", "copies", "reference_attention",
)  # fmt: skip
FAMILIES = (*PRODUCTS, *ATTENTION, *MEMORY)


def product(m: int, k: int, n: int, s: int, family: str = "product", *, accumulate: bool = False) -> Cost:
    """The product of (m, k) and (k, n). With `accumulate`, the result is added to a 4-byte gradient, which is read and
    written."""
    written = 2 * WIDE * m * n if accumulate else s * m * n
    return Cost(family, 2 * m * k * n, s * (m * k + k * n) + written)


def attention_forward(B: int, T: int, C: int, H: int, s: int) -> Cost:
    """Q K^T and P V on and below the diagonal: 2 products of B H T^2/2 D. Reads qkv, writes the result and lse."""
    return Cost("attention_forward", 2 * B * T * T * C, 4 * B * T * C * s + WIDE * B * H * T)


def attention_backward(B: int, T: int, C: int, H: int, s: int, products: int = 5) -> Cost:
    """S, dP, dV, dK and dQ: 5 products of B H T^2/2 D; 7 if one kernel computes dQ and another dK and dV.

    Reads qkv, dout, out, lse and writes dqkv; with 7 products, qkv and dout are read twice, and delta is stored.
    """
    arrays = 8 if products == 5 else 8 + 4
    return Cost("attention_backward", products * B * T * T * C, arrays * B * T * C * s + 3 * WIDE * B * H * T)


def reference_attention(B: int, T: int, C: int, H: int, s: int, products: int, passes: int) -> Cost:
    """Attention by reference.py on an array library; T x T arrays are read or written `passes` times."""
    return Cost("reference_attention", products * B * T * T * C, passes * s * B * H * T * T / 2)


def column_sums(N: int, n: int, s: int) -> Cost:
    """The gradient of a bias: reads (N, n)."""
    return Cost("column_sums", 0, s * N * n)


def layernorm_forward(N: int, C: int, s: int, arrays: int = 4) -> Cost:
    """Reads x and delta, writes their sum and y (4 arrays); without the addition, reads x and writes y (2 arrays). Also
    writes two statistics per row."""
    return Cost("layernorm_forward", 0, arrays * N * C * s + 2 * WIDE * N)


def layernorm_backward(N: int, C: int, s: int, arrays: int = 4) -> Cost:
    """Reads ds, dy and the sum, writes dx (4 arrays); without the addition, there is no ds (3 arrays)."""
    return Cost("layernorm_backward", 0, arrays * N * C * s + 2 * WIDE * N)


def gelu_forward(N: int, n: int, s: int) -> Cost:
    """Reads x, writes y: (N, n) each."""
    return Cost("gelu_forward", 0, 2 * N * n * s)


def gelu_backward(N: int, n: int, s: int) -> Cost:
    """Reads dy and x, writes dx."""
    return Cost("gelu_backward", 0, 3 * N * n * s)


def cross_entropy(N: int, V: int, s: int) -> Cost:
    """Reads the logits and overwrites them with their gradient."""
    return Cost("cross_entropy", 0, 2 * N * V * s)


def embedding_forward(N: int, C: int, s: int) -> Cost:
    """Reads a row of the table for each token, writes y."""
    return Cost("embedding", 0, 2 * N * C * s)


def embedding_backward(N: int, T: int, C: int, V: int, s: int) -> Cost:
    """Reads dy for the tokens and for the positions, and adds to the rows of both gradients that occur."""
    return Cost("embedding", 0, 2 * N * C * s + 2 * WIDE * C * (min(N, V) + T))


def elementwise(family: str, elements: float, nbytes: float) -> Cost:
    """A kernel that reads and writes `nbytes` for every element."""
    return Cost(family, 0, elements * nbytes)


# A step --------------------------------------------------------------------------------------------------------------

LINEAR = {"qkv": (1, 3), "proj": (1, 1), "up": (1, 4), "down": (4, 1)}  # linear layers of a block: (in, out) / C
FUSED_HEAD_SIZES = range(16, 129, 16)  # head sizes of the bfloat16 attention kernels; see kernels/cuda.py


def micro_step(
    config: GPT2Config,
    batch_size: int,
    block_size: int,
    precision: PrecisionLike = "float32",
    recompute: str = "none",
    head_rows: int | None = None,
    cuda: bool = True,
) -> list[Kernel]:
    """The kernels of the forward and backward passes of a batch, in the order of the forward pass.

    cuda  whether the step runs on a GPU, where the backward pass of bfloat16 attention takes 7 products, and
          reference.py computes attention for other dtypes.
    """
    B, T, C, L, V = batch_size, block_size, config.n_embd, config.n_layer, config.vocab_size
    N, s = B * T, Precision.of(precision).activation_bytes
    again = 2 * L if recompute == "block" else L  # forward passes of blocks
    kernels = [Kernel("embedding_forward", 1, embedding_forward(N, C, s))]
    for name, (k, n) in LINEAR.items():
        k, n, family = k * C, n * C, "small product" if name == "proj" else "product"
        kernels += [
            Kernel(f"{name} forward", again, product(N, k, n, s, family)),
            Kernel(f"{name} dgrad", L, product(N, n, k, s, family), True),
            Kernel(f"{name} wgrad", L, product(k, N, n, s, family, accumulate=True), True),
        ]
        if name != "up":  # its bias gradient is computed by gelu_backward
            kernels.append(Kernel(f"{name} dbias", L, column_sums(N, n, s), True))
    kernels += _attention(config, B, T, s, again, cuda)
    extra = again - L  # recomputed LayerNorms; that of the first block has no addition
    single = recomputed(config, cuda)  # results that the backward pass recomputes individually
    kernels += [
        Kernel("layernorm_forward", 1 + (extra > 0) + L * single["layernorm"], layernorm_forward(N, C, s, arrays=2)),
        Kernel("add_layernorm_forward", 2 * again - (extra > 0), layernorm_forward(N, C, s)),
        Kernel("add_layernorm_backward", 2 * L - 1, layernorm_backward(N, C, s), True),
        Kernel("layernorm_backward", 2, layernorm_backward(N, C, s, arrays=3), True),
        Kernel("gelu_forward", again + L * single["gelu"], gelu_forward(N, 4 * C, s)),
        Kernel("gelu_backward", L, gelu_backward(N, 4 * C, s), True),
        Kernel("sum of two gradients", 1, elementwise("sum", N * C, 3 * s), True),
        Kernel("embedding_backward", 1, embedding_backward(N, T, C, V, s), True),
    ]
    kernels += _dropout(config, N, s, again)
    return kernels + _head(N, C, V, s, head_chunks(config, N, s, head_rows, cuda))


def _attention(config: GPT2Config, B: int, T: int, s: int, again: int, cuda: bool) -> list[Kernel]:
    C, H, L = config.n_embd, config.n_head, config.n_layer
    fused = not cuda or (s == 2 and config.head_size in FUSED_HEAD_SIZES)
    if fused:
        forward, backward = attention_forward(B, T, C, H, s), attention_backward(B, T, C, H, s, 7 if cuda else 5)
    else:  # reference.py reads or writes the scores 12 times in the forward pass and 22 times in the backward pass
        forward, backward = (reference_attention(B, T, C, H, s, *counts) for counts in ((2, 12), (5, 22)))
    return [Kernel("attention_forward", again, forward), Kernel("attention_backward", L, backward, True)]


def _dropout(config: GPT2Config, N: int, s: int, again: int) -> list[Kernel]:
    """Dropout of the embeddings and of the two branches of each block. (The attention kernel includes its dropout.)"""
    forward = (config.embd_pdrop > 0) + 2 * again * (config.resid_pdrop > 0)
    backward = (config.embd_pdrop > 0) + 2 * config.n_layer * (config.resid_pdrop > 0)
    cost = elementwise("dropout", N * config.n_embd, 2 * s)
    named = (Kernel("dropout_forward", forward, cost), Kernel("dropout_backward", backward, cost, True))
    return [kernel for kernel in named if kernel.calls]


def _head(N: int, C: int, V: int, s: int, chunks: int) -> list[Kernel]:
    """The output layer and the loss, in chunks of rows. Every chunk reads the token embedding and its gradient."""
    rows = N / chunks
    forward, dgrad, wgrad = (
        product(N, C, V, s, "head product"),
        product(N, V, C, s, "head product"),
        product(V, N, C, s, "head product", accumulate=True),
    )

    def part(cost: Cost, read_again: float) -> Cost:  # `read_again`: bytes of a matrix that every chunk reads
        return Cost(cost.family, cost.flops / chunks, (cost.nbytes - read_again) / chunks + read_again)

    table = s * C * V
    return [
        Kernel("head forward", chunks, part(forward, table)),
        Kernel("cross_entropy", chunks, cross_entropy(1, V, s)._replace(nbytes=2 * rows * V * s)),
        Kernel("head dgrad", chunks, part(dgrad, table), True),
        Kernel("head wgrad", chunks, part(wgrad, 2 * WIDE * C * V), True),
    ]


def update(
    config: GPT2Config, precision: PrecisionLike = "float32", optimizer: str = "adamw", shards: int = 1
) -> list[Kernel]:
    """The kernels of the optimizer's step: gradient norm, update, clearing the gradients, refreshing weight copies.

    shards  number of ranks that share the optimizer state (ZeRO stage 1); each updates a part.

    AdamW reads the value, the gradient and two moments, and writes all but the gradient: 28 bytes per parameter. SGD
    has one moment: 20 bytes. For hidden-layer matrices, Muon has SGD's traffic plus the orthogonalization.
    """
    P, types = config.n_parameters, Precision.of(precision)
    hidden = 12 * config.n_layer * config.n_embd**2 if optimizer == "muon" else 0
    kernels = [
        Kernel("squared_norm", 1, elementwise("squared_norm", P / shards, WIDE)),
        Kernel("zero_grad", 1, elementwise("zero_grad", P, WIDE)),
    ]
    if optimizer == "sgd":
        kernels.append(Kernel("sgd_step", 1, elementwise("update", P / shards, 5 * WIDE)))
    else:
        kernels.append(Kernel("adamw_step", 1, elementwise("update", (P - hidden) / shards, 7 * WIDE)))
    if hidden:
        kernels.append(Kernel("muon_step", 1, elementwise("update", hidden, 8 * WIDE)))
        kernels.append(Kernel("orthogonalize", 1, orthogonalize(config, shards)))
    if types.copies:  # converted to a temporary array, which is then copied
        kernels.append(Kernel("refresh_copies", 1, elementwise("copies", P, WIDE + 3 * types.activation_bytes)))
    return kernels


def orthogonalize(config: GPT2Config, ranks: int) -> Cost:
    """Muon's Newton-Schulz iteration (Jordan et al. 2024): 5 times X X^T, its square, and a product with X.

    An iteration for a matrix (m, n) with m <= n takes 2 m^2 n + 2 m^3 + 2 m^2 n FLOPs. A block has the matrices q, k, v
    and proj (C, C), and up and down (C, 4 C).
    """
    C = config.n_embd
    square, wide = (5 * (4 * C * C * n + 2 * C**3) for n in (C, 4 * C))
    return Cost("product", config.n_layer * (4 * square + 2 * wide) / ranks, 0)


# GPUs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A GPU model. Its peak FLOP/s and memory bandwidth are in tinygrad2/gpus.py under the same name.

    memory     bytes, from the data sheet.
    link       bytes/s to another GPU in each direction, from the data sheet: NVLink, PCIe, or half of PCIe if data
               passes through the host.
    products   the fraction of the bfloat16 peak that the first algorithm suggested by cuBLASLt is expected to sustain.
    attention  the same for the attention kernels, forward and backward. Hopper and later GPUs reach their peak only
               with instructions that these kernels do not use (wgmma, tcgen05).

    The fractions are estimates, based on instruction counts and on published benchmarks of other programs.
    """

    memory: float
    link: float
    products: float
    attention: tuple[float, float]


CARDS = {
    "B200": Card(180e9, 900e9, 0.62, (0.12, 0.13)),
    "H200 NVL": Card(141e9, 450e9, 0.63, (0.23, 0.265)),
    "H200": Card(141e9, 450e9, 0.63, (0.23, 0.265)),
    "H100 NVL": Card(94e9, 63e9, 0.63, (0.23, 0.265)),
    "H100 PCIe": Card(80e9, 63e9, 0.55, (0.23, 0.265)),
    "H100": Card(80e9, 450e9, 0.63, (0.23, 0.265)),
    "A100": Card(80e9, 300e9, 0.77, (0.43, 0.39)),
    "A40": Card(48e9, 31.5e9, 0.75, (0.43, 0.39)),
    "A30": Card(24e9, 31.5e9, 0.75, (0.43, 0.39)),
    "A10": Card(24e9, 15.8e9, 0.75, (0.45, 0.40)),
    "L40S": Card(48e9, 31.5e9, 0.70, (0.45, 0.40)),
    "L40": Card(48e9, 31.5e9, 0.85, (0.50, 0.42)),
    "L4": Card(24e9, 31.5e9, 0.60, (0.45, 0.40)),
    "T4": Card(16e9, 7.9e9, 0.75, (0.45, 0.40)),
    "RTX 6000 Ada": Card(48e9, 31.5e9, 0.70, (0.45, 0.40)),
    "RTX A6000": Card(48e9, 31.5e9, 0.75, (0.43, 0.39)),
    "RTX 5090": Card(32e9, 31.5e9, 0.88, (0.50, 0.415)),
    "RTX 4090": Card(24e9, 15.8e9, 0.91, (0.515, 0.435)),
    "RTX 3090": Card(24e9, 15.8e9, 0.85, (0.50, 0.42)),
}
SMALL_PRODUCT = 0.84  # relative to other products, since there are too few tiles to fill the GPU evenly
NARROW = 0.75  # fraction of the peak in float32 and TF32, which is easier to sustain
COPY = 0.92  # fraction of the data sheet's bandwidth that a copy reaches
REACHED = {  # fraction of the copy bandwidth that memory-limited kernels are expected to reach
    "column_sums": 0.8, "layernorm_forward": 0.85, "layernorm_backward": 0.78, "gelu_forward": 0.87,
    "gelu_backward": 0.85, "cross_entropy": 0.8, "embedding": 0.7, "dropout": 0.85, "sum": 0.85, "squared_norm": 0.85,
    "update": 0.85, "zero_grad": 0.85, "copies": 0.8, "reference_attention": 0.7,
}  # fmt: skip
LAUNCH, PYTHON = 2e-6, 27e-6  # seconds per call, on the device and on the host
RING = 0.8  # fraction of a link's rate that NCCL's ring reaches


def gpu(name: str, precision: PrecisionLike) -> Device:
    """The GPU `name` of CARDS. Raises ValueError if its peak in this precision is unknown."""
    card, types = CARDS[name], Precision.of(precision)
    peak = PEAK_TFLOPS[name].get(types.name)
    if peak is None:
        raise ValueError(f"the peak of {name} in {types.name} is unknown; choose one of {', '.join(PEAK_TFLOPS[name])}")
    memory = 1e9 * BANDWIDTH[name] * COPY
    products = 1e12 * peak * (card.products if types.copies else max(card.products, NARROW))
    rates = {family: Rate(math.inf, memory * part) for family, part in REACHED.items()}
    rates |= {family: Rate(products, memory) for family in PRODUCTS}
    rates |= {f: Rate(1e12 * peak * part, memory) for f, part in zip(ATTENTION, card.attention, strict=True)}
    rates["small product"] = Rate(SMALL_PRODUCT * products, memory)
    rates["reference_attention"] = Rate(SMALL_PRODUCT * products, memory * REACHED["reference_attention"])
    return Device(name, card.memory, rates, LAUNCH, PYTHON, card.link)


# Several ranks -------------------------------------------------------------------------------------------------------

NODE = 8  # GPUs per machine
NETWORK = 50e9  # bytes/s between machines: one 400 Gbit/s network adapter per GPU


class Communication(NamedTuple):
    """Seconds of communication per step, and the part that overlaps with computation."""

    seconds: float
    overlapped: float


def communication(config: GPT2Config, device: Device, ranks: int, zero: bool, backward: float) -> Communication:
    """The communication that sums the gradients over the ranks and, with ZeRO, gathers the new parameters.

    In a ring all-reduce, each of n ranks sends and receives 2 (n - 1) / n of the gradients' bytes (Patarasuk and Yuan,
    2009). With ZeRO stage 1, a reduce-scatter transfers half of that, and an all-gather of the parameters after the
    update transfers the other half. A bucket is summed while the backward pass computes the next ones. The gradient of
    the token embedding is complete last, so its all-reduce does not overlap.

    backward  seconds of the last micro-step's backward pass, an upper bound on the overlap.
    """
    if ranks == 1:
        return Communication(0.0, 0.0)
    link = device.link if ranks <= NODE else min(device.link, NODE * NETWORK)
    once = (ranks - 1) / ranks * WIDE / (RING * link)  # seconds per parameter, for a reduce-scatter or an all-gather
    ways = 1 if zero else 2
    blocks = (config.n_parameters - config.vocab_size * config.n_embd) * once * ways
    return Communication(2 * once * config.n_parameters, min(blocks, backward))


def with_link(device: Device, link: float | None) -> Device:
    """The device with another link rate, in bytes/s, or unchanged for None."""
    return device if link is None else replace(device, link=link)
