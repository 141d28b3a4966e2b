"""One token in one launch on a GPU: when decode.cu can be used, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gpt2.config import GPT2Config
    from gpt2.generate import KVCache
    from gpt2.model import GPT2

# As in decode.cu: threads of a block, those that read a row of a tile, bytes that one reads at once, phases of a layer,
# and the fewest threads that share a key.
THREADS, LANES, ACCESS, PHASES, GROUP = 512, 8, 16, 5, 8
LEAST_AHEAD, MOST_AHEAD = 2, 12  # accesses of a thread that are on their way: 12 are 96 KB, more than a matrix's share
MOST_TEXTS = 6  # at a time: the registers hold the sums of all of them
MOST_SPLITS = 16  # of the keys of a head
STATIC = 1024  # bytes of shared memory that the kernel has of its own, at most
REAL = {"float32": "float", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Plan:
    """The sizes of a launch for `texts` texts: see decode.cu, whose constants these are."""

    blocks: int
    splits: int  # of the keys of a head
    parts: int  # numbers that one product leaves
    ahead: int
    shared: int  # bytes

    @staticmethod
    def of(config: GPT2Config, texts: int, itemsize: int, limits: dict[str, int]) -> Plan:
        """For numbers of so many bytes, on a GPU with these limits (see Backend.limits)."""
        C, D, blocks, vector = config.n_embd, config.head_size, limits["processors"], ACCESS // itemsize
        tile = LANES * vector
        matrices = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
        inputs = [K for K, _ in matrices]
        shares = [-(-(-(-N // tile) * K) // blocks) for K, N in matrices]
        slots = max((share + K - 2) // K + 1 for share, K in zip(shares, inputs, strict=True))
        width = max(C, min(shares[3], 4 * C))
        sums, scores = THREADS // 32 * texts * tile, 3 * D + THREADS // GROUP * (D + 2)
        fixed = 4 * (texts * width + max(sums, scores))
        ahead = min(MOST_AHEAD, (limits["shared_memory"] - STATIC - fixed) // (THREADS * ACCESS))
        splits = max(1, min(MOST_SPLITS, blocks // (texts * config.n_head)))
        return Plan(blocks, splits, blocks * slots * texts * tile, ahead, ahead * THREADS * ACCESS + fixed)


class Decoder:
    """The logits of the next token from one more token of each text and a key-value cache: GPT2.next_logits for T = 1,
    in one launch. The parameters are read where they are at the first call."""

    @staticmethod
    def fitting(model: GPT2, cache: KVCache) -> Decoder | None:
        """A decoder for this model and cache, or None where the kernel cannot serve them: on a CPU, in float64, for
        more than MOST_TEXTS texts, for heads or parameters that are no whole accesses, or too little shared memory."""
        limits, texts, itemsize = model.backend.limits(), cache.layers[0].shape[1], cache.layers[0].dtype.itemsize
        if (
            not limits
            or model.activations not in REAL
            or texts > MOST_TEXTS
            or model.config.head_size * itemsize % ACCESS
        ):
            return None
        if any(p.compute.data.ptr % ACCESS for p in model.parameters() if p.ndim == 2):
            return None
        plan = Plan.of(model.config, texts, itemsize, limits)
        return None if plan.ahead < LEAST_AHEAD else Decoder(model, cache, plan, bool(limits["cooperative"]))

    def __init__(self, model: GPT2, cache: KVCache, plan: Plan, at_once: bool):
        """at_once: all phases in one launch, whose blocks wait for each other; else a launch each."""
        self._model, self._layers, self._plan, self._at_once = model, cache.layers, plan, at_once
        self._texts, self._capacity = cache.layers[0].shape[1], cache.layers[0].shape[3]
        self._tokens = np.dtype([("id", "i4", (self._texts,))])
        self._launches = 0
        self._kernel: Any = None

    def __call__(self, tokens: np.ndarray, position: int) -> Any:
        """Logits (B, V) in float32, on the device, for tokens (B,) at `position` of their texts, whose keys and values
        go to the cache. Raises ValueError for a token or a position out of range."""
        c, plan = self._model.config, self._plan
        if tokens.min() < 0 or tokens.max() >= c.vocab_size:
            raise ValueError(f"decode: tokens hold {tokens.min()} to {tokens.max()}; expected 0 to {c.vocab_size - 1}")
        if not 0 <= position < min(self._capacity, c.n_positions):
            raise ValueError(
                f"decode: position {position}; the cache holds {self._capacity}, the context {c.n_positions}"
            )
        if self._kernel is None:
            self._prepare()
        logits = self._model.backend.np.empty((self._texts, c.vocab_size), dtype=np.float32)
        counted = self._launches * PHASES * c.n_layer * plan.blocks % 2**32  # by the barrier, so far
        self._launches += 1
        numbers = np.int32(position), np.int32(self._capacity), np.float32(c.layer_norm_epsilon)
        given = logits, *self._arrays, np.uint32(counted), np.array((tokens,), dtype=self._tokens)[()], *numbers
        end = PHASES * c.n_layer + 1
        for start, stop in [(0, end)] if self._at_once else [(phase, phase + 1) for phase in range(end)]:
            arguments = (*given, np.int32(start), np.int32(stop))
            self._kernel((plan.blocks,), (THREADS,), arguments, shared_mem=plan.shared)
        return logits

    def _prepare(self) -> None:
        """Compile the kernel, and make what it is given at every call."""
        model, c, plan, backend = self._model, self._model.config, self._plan, self._model.backend
        self._rows = [_layer(*layer) for layer in zip(model.h, self._layers, strict=True)]  # kept: they are pointed to
        table = np.array([[array.data.ptr for array in row] for row in self._rows], dtype=np.uint64)
        self._arrays = (
            backend.upload(table),
            *(model.wte.weight.compute, model.wpe.weight.compute, model.ln_f.weight.data, model.ln_f.bias.data),
            backend.zeros((2, self._texts, c.n_embd), "float32"),
            backend.zeros((2, plan.parts), "float32"),
            backend.zeros((self._texts * c.n_head * plan.splits, c.head_size + 2), "float32"),
            backend.zeros((1,), "uint32"),
        )
        self._kernel = backend.kernel(
            Path(__file__).with_suffix(".cu"), "decode", shared=plan.shared, cooperative=self._at_once,
            REAL=REAL[model.activations], B=self._texts, C=c.n_embd, H=c.n_head, L=c.n_layer, V=c.vocab_size,
            BLOCKS=plan.blocks, SPLITS=plan.splits, AHEAD=plan.ahead,
            GELU="Exact" if c.activation_function == "gelu" else "Tanh",
        )  # fmt: skip


def _layer(block: Any, keys_and_values: Any) -> list[Any]:
    """The arrays of a struct Layer."""
    linears = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
    norms = block.ln_1.weight, block.ln_1.bias, block.ln_2.weight, block.ln_2.bias
    vectors = (*(linear.bias for linear in linears), *norms)
    return [*(linear.weight.compute for linear in linears), *(p.data for p in vectors), keys_and_values]
