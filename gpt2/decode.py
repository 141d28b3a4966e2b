"""Decoding on a GPU with one kernel launch per token: when decode.cu can be used, and how it is launched."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gpt2.config import GPT2Config
from gpt2.language_model import Cache, LanguageModel
from tinygrad2.array import Array
from tinygrad2.backend import Backend, Cuda, Limits
from tinygrad2.nn import Parameter

# As in decode.cu: threads per block, and bytes per memory access.
THREADS, ACCESS = 512, 16
MAX_RANKS = 8  # the largest number of blocks per cluster that every GPU with clusters supports
MIN_PREFETCH, MAX_PREFETCH = 4, 16  # memory accesses in flight per thread; 16 are 128 KB per block
MAX_TEXTS = 6  # per launch, since the sums for all texts are kept in registers
RESERVED = 1024  # bytes of shared memory that CUDA reserves in each block
WITHOUT = "generate with --decode ordinary (in Python: model.fused_decode = False)"


def add_option(group: argparse._ArgumentGroup) -> None:
    """Add --decode to a group of a command's options; set_decode applies it."""
    group.add_argument(
        "--decode",
        default="ordinary",
        choices=("ordinary", "fused"),
        help="how to compute the next token: one operation at a time, or on a GPU with one kernel launch per token "
        "(not yet measured on a GPU)",
    )


class Fusable(Protocol):
    """A model that may support fused decoding."""

    fused_decode: bool

    @property
    def backend(self) -> Backend: ...


def set_decode(model: Fusable, decode: str) -> None:
    """Apply the value of --decode, "ordinary" or "fused", to the model. Raises ValueError for "fused" without a GPU."""
    if decode == "fused" and model.backend.cuda is None:
        raise ValueError(f"--decode fused needs a GPU, but the model is on the {model.backend.device}; use ordinary")
    model.fused_decode = decode == "fused"


@contextmanager
def explained(decoder: object) -> Iterator[None]:
    """A context in which a failure of the GPU raises OSError if `decoder` is a Decoder, which may have caused it. The
    message explains how to generate without fused decoding."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(decoder, Decoder):
            raise
        raise OSError(f"decode: the GPU failed with --decode fused ({error}); in a new process, {WITHOUT}") from error


@dataclass(frozen=True)
class LaunchPlan:
    """The sizes of a launch, which are compile-time constants of decode.cu; see the glossary there.

    texts              texts per launch.
    ranks              blocks per cluster.
    clusters           clusters per launch.
    heads, hidden      attention heads, and columns of the MLP, per cluster.
    prefetch           memory accesses in flight per thread.
    hardware_clusters  whether a cluster is a thread block cluster.
    mailbox            entries in a block's mailbox.
    shared             bytes of shared memory per block.
    """

    texts: int
    ranks: int
    clusters: int
    hardware_clusters: bool
    heads: int
    hidden: int
    mailbox: int
    prefetch: int
    shared: int

    @staticmethod
    def of(
        config: GPT2Config, texts: int, itemsize: int, limits: Limits, max_clusters: int = sys.maxsize
    ) -> LaunchPlan | None:
        """The plan for weights of `itemsize` bytes on a GPU with these limits, or None if the model does not fit."""
        C, H, D, vector = config.n_embd, config.n_head, config.head_size, ACCESS // itemsize
        ranks = MAX_RANKS
        while C % (ranks * vector) or ranks > limits.processors:
            ranks //= 2
            if not ranks:
                return None
        own, slices = C // ranks, 4 * C // vector
        hidden = -(-slices // min(max_clusters, limits.processors // ranks)) * vector
        clusters = -(-4 * C // hidden)  # each computes some of the MLP's columns
        heads = -(-H // clusters)
        if max(3 * heads * D, hidden, own) > THREADS * vector:
            return None
        hardware_clusters = limits.capability >= 9
        first = max(3 * heads * D, hidden)  # columns of the first matrix of a half layer
        mailbox = texts * (ranks * (2 + -(-first // ranks) + heads * (D + 2)) + max(first, C))
        work = max(THREADS * vector + 16, THREADS // 32 * (D + 2), texts * C)
        fixed = 4 * (work + texts * (first + heads * D + 2 * own)) + 8 * mailbox * hardware_clusters
        prefetch = min(MAX_PREFETCH, (limits.shared_memory - RESERVED - fixed) // (THREADS * ACCESS))
        if prefetch < MIN_PREFETCH:
            return None
        shared = prefetch * THREADS * ACCESS + fixed
        return LaunchPlan(texts, ranks, clusters, hardware_clusters, heads, hidden, mailbox, prefetch, shared)

    @property
    def blocks(self) -> int:
        return self.ranks * self.clusters

    def constants(self, config: GPT2Config) -> dict[str, int | str]:
        """The constants that decode.cu is compiled with, except REAL."""
        return {
            "B": self.texts, "C": config.n_embd, "H": config.n_head, "L": config.n_layer, "V": config.vocab_size,
            "RANKS": self.ranks, "CLUSTERS": self.clusters, "HARDWARE_CLUSTERS": int(self.hardware_clusters),
            "HEADS": self.heads, "HIDDEN": self.hidden, "PREFETCH": self.prefetch,
            "GELU": "Exact" if config.activation_function == "gelu" else "Tanh",
        }  # fmt: skip


class Decoder:
    """Computes the logits of the next token from the latest token of each text and a key-value cache, in one launch.

    It is equivalent to generate.next_logits for T = 1. The addresses of the parameters must not change after the first
    call."""

    first_tag = 1  # the first tag of the first launch; 0 is the value of memory that has not been written

    @staticmethod
    def fitting(model: LanguageModel, cache: Cache) -> Decoder | None:
        """Return a decoder for this model and cache, or None if the model's `fused_decode` is not set or the kernel
        does not support them. The following are not supported: an architecture other than GPT-2, a CPU, float64, more
        than MAX_TEXTS texts, heads or parameters that are not aligned to ACCESS bytes, and a GPU with too little shared
        memory."""
        cuda, config = model.backend.cuda, model.config
        if not getattr(model, "fused_decode", False) or cuda is None or not isinstance(config, GPT2Config):
            return None
        limits, type_name = cuda.limits(), cuda.type_name(model.precision.activations)
        texts, itemsize = cache.layers[0].shape[1], cache.layers[0].dtype.itemsize
        if limits is None or type_name is None or texts > MAX_TEXTS or config.head_size * itemsize % ACCESS:
            return None
        if any(_matrix(model, p).data.ptr % ACCESS for p in model.parameters() if p.ndim == 2):
            return None
        plan = LaunchPlan.of(config, texts, itemsize, limits)
        return None if plan is None else Decoder(model, config, cuda, cache, plan)

    def __init__(self, model: LanguageModel, config: GPT2Config, cuda: Cuda, cache: Cache, plan: LaunchPlan):
        self._model, self._config, self._cuda = model, config, cuda
        self._layers, self._plan = cache.layers, plan
        self._texts, self._capacity = cache.layers[0].shape[1], cache.layers[0].shape[3]
        self._tokens = np.dtype([("id", "i4", (self._texts,))])
        self._launches = 0
        self._kernel: Callable[..., None] | None = None

    def __call__(self, tokens: np.ndarray, position: int) -> Array:
        """Return the logits (B, V), in float32 on the device, that follow tokens (B,) at `position`, and append the
        keys and values of these tokens to the cache. Raises ValueError if a token or the position is out of range."""
        self._check(tokens, position, 1)
        logits = self._model.backend.np.empty((self._texts, self._model.config.vocab_size), dtype=np.float32)
        self._launch(tokens, position, logits=logits)
        return logits

    def greedy(self, tokens: np.ndarray, position: int, count: int, choices: int) -> Iterator[np.ndarray]:
        """Greedy decoding: yield the `count` tokens of each text that follow `tokens` at `position`, as arrays (B,).

        A token is the one with the largest logit among the first `choices` ids, or -1 if the logits are not finite.
        The next launch reads the token on the device. It is queued before the host has received the token, so the GPU
        does not wait. Raises ValueError if a token or a position is out of range."""
        if count < 1:
            return
        self._check(tokens, position, count)
        backend, previous = self._model.backend, None
        wait: Callable[[], None] | None = None
        chosen = [backend.zeros((self._texts,), "int32") for _ in range(2)]
        host = [backend.staging(array, None) for array in chosen]
        try:
            for i in range(count):
                self._launch(tokens, position + i, previous=previous, chosen=chosen[i % 2], choices=choices)
                wait_before, previous = wait, chosen[i % 2]
                wait = backend.download(previous, host[i % 2])
                if wait_before:
                    wait_before()
                    yield host[(i - 1) % 2].astype(np.int64)
            if wait:
                wait()
                yield host[(count - 1) % 2].astype(np.int64)
        finally:  # if the caller stops early, the buffer of the last copy must not be freed before the copy ends
            if wait:
                wait()

    def _check(self, tokens: np.ndarray, position: int, count: int) -> None:
        c = self._config
        if tokens.min() < 0 or tokens.max() >= c.vocab_size:
            raise ValueError(
                f"decode: token ids are {tokens.min()} to {tokens.max()}; expected 0 to {c.vocab_size - 1}"
            )
        if not 0 <= position <= min(self._capacity, c.n_positions) - count:
            raise ValueError(
                f"decode: position {position + count - 1} is out of range; the cache has {self._capacity} positions, "
                f"the context {c.n_positions}"
            )

    def _launch(
        self,
        tokens: np.ndarray,
        position: int,
        *,
        logits: Array | None = None,
        chosen: Array | None = None,
        previous: Array | None = None,
        choices: int = 0,
    ) -> None:
        """Launch the kernel for one token of each text; see decode.cu for the arguments."""
        kernel = self._kernel or self._compile()
        c, plan = self._config, self._plan
        tags = 2 * c.n_layer + 1  # per launch: one for each half layer, and one for the end
        tag = np.uint32((self.first_tag + self._launches * tags) % 2**32)
        self._launches += 1
        numbers = np.int32(choices), np.int32(position), np.int32(self._capacity), np.float32(c.layer_norm_epsilon)
        ids = np.array((tokens,), dtype=self._tokens)[()]
        arguments = logits, chosen, previous, *self._arrays, ids, *numbers, tag
        self._cuda.launch_alone(kernel, plan.blocks, THREADS, arguments, plan.shared)

    def _compile(self) -> Callable[..., None]:
        """Compile the kernel for as many blocks as can run concurrently, and create the arguments that all launches
        share."""
        model, config, backend, cuda = self._model, self._config, self._model.backend, self._cuda
        limits, itemsize = cuda.limits(), self._layers[0].dtype.itemsize
        assert limits is not None
        at_once, file = sys.maxsize, Path(__file__).with_suffix(".cu")
        while True:
            plan = LaunchPlan.of(config, self._texts, itemsize, limits, at_once) if at_once else None
            if plan is None:
                if not limits.capability:
                    raise ValueError(f"decode: the blocks of the kernel do not fit on this GPU; {WITHOUT}")
                at_once, limits = sys.maxsize, limits._replace(capability=0)  # without thread block clusters
                continue
            constants = {"REAL": cuda.type_name(model.precision.activations), **plan.constants(config)}
            kernel = cuda.kernel(file, "decode", shared=plan.shared, cooperative=True, **constants)
            at_once = cuda.blocks_at_once(kernel, THREADS, plan.shared) // plan.ranks
            if plan.hardware_clusters:
                # A cluster must fit in one GPC, so some multiprocessors of a GPC may remain unused.
                at_once = min(at_once, cuda.clusters_at_once(kernel, plan.blocks, THREADS, plan.shared))
            if at_once >= plan.clusters:
                break
        self._plan = plan
        named = dict(model.named_parameters())
        self._rows = [self._layer(named, i) for i in range(config.n_layer)]  # keeps the arrays of the table alive
        table = np.array([[array.data.ptr for array in row] for row in self._rows], dtype=np.uint64)
        results = 4 * plan.clusters * self._texts * config.n_embd + 2 * self._texts * plan.blocks
        self._arrays = (
            backend.upload(table),
            *(_matrix(model, named["wte.weight"]), _matrix(model, named["wpe.weight"])),
            *(named["ln_f.weight"].data, named["ln_f.bias"].data),
            backend.zeros((results,), "uint64"),
            backend.zeros((1 if plan.hardware_clusters else plan.blocks, plan.mailbox), "uint64"),
        )
        self._kernel = kernel
        return kernel

    def _layer(self, named: dict[str, Parameter], layer: int) -> list[Array]:
        """The arrays that struct Layer in decode.cu points to."""
        linears = [f"h.{layer}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
        norms = [f"h.{layer}.{norm}.{kind}" for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")]
        matrices = [_matrix(self._model, named[f"{linear}.weight"]) for linear in linears]
        vectors = [named[name].data for name in (*(f"{linear}.bias" for linear in linears), *norms)]
        return [*matrices, *vectors, self._layers[layer]]


def _matrix(model: LanguageModel, parameter: Parameter) -> Array:
    """The matrix in the dtype that the kernel reads. The kernel reads vectors in the dtype of the parameters."""
    return parameter.read_as(model.precision.activations, "decode: a matrix")
