"""One token in one launch on a GPU: when decode.cu can be used, and what it is given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.config import GPT2Config
from gpt2.language_model import Cache, LanguageModel
from tinygrad2.nn import Parameter

# As in decode.cu: threads of a block, and bytes that one reads at once.
THREADS, ACCESS = 512, 16
MOST_RANKS = 8  # blocks of a cluster that every GPU has which knows clusters
LEAST_AHEAD, MOST_AHEAD = 4, 16  # accesses of a thread that are on their way: 16 are 128 KB, a layer of 124M
MOST_TEXTS = 6  # at a time: the registers hold the sums of all of them
STATIC = 1024  # bytes of shared memory that CUDA keeps for itself
REAL = {"float32": "float", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Plan:
    """The sizes of a launch: see decode.cu, whose constants these are."""

    texts: int
    ranks: int  # blocks of a team
    teams: int
    clusters: bool  # whether a team is a thread block cluster
    heads: int  # of a team
    hidden: int  # columns of the MLP, of a team
    places: int  # for letters, of a block
    ahead: int
    shared: int  # bytes

    @staticmethod
    def of(
        config: GPT2Config, texts: int, itemsize: int, limits: dict[str, int], teams: int = sys.maxsize
    ) -> Plan | None:
        """For numbers of so many bytes, on a GPU with these limits (see Backend.limits); at most so many teams. None
        where there is no way."""
        C, H, D, vector = config.n_embd, config.n_head, config.head_size, ACCESS // itemsize
        ranks = MOST_RANKS
        while C % (ranks * vector) or ranks > limits["processors"]:
            ranks //= 2
            if not ranks:
                return None
        own, slices = C // ranks, 4 * C // vector
        hidden = -(-slices // min(teams, limits["processors"] // ranks)) * vector
        teams = -(-4 * C // hidden)  # each has some of the MLP's columns
        heads = -(-H // teams)
        if max(3 * heads * D, hidden, own) > THREADS * vector:
            return None
        clusters = limits["capability"] >= 9
        first = max(3 * heads * D, hidden)  # columns of a half's first matrix
        places = texts * (ranks * (2 + -(-first // ranks) + heads * (D + 2)) + max(first, C))
        work = max(THREADS * vector + 16, THREADS // 32 * (D + 2), texts * C)
        fixed = 4 * (work + texts * (first + heads * D + 2 * own)) + 8 * places * clusters
        ahead = min(MOST_AHEAD, (limits["shared_memory"] - STATIC - fixed) // (THREADS * ACCESS))
        if ahead < LEAST_AHEAD:
            return None
        return Plan(texts, ranks, teams, clusters, heads, hidden, places, ahead, ahead * THREADS * ACCESS + fixed)

    @property
    def blocks(self) -> int:
        return self.ranks * self.teams

    def constants(self, config: GPT2Config) -> dict[str, Any]:
        """What decode.cu is compiled with, but for REAL."""
        return {
            "B": self.texts, "C": config.n_embd, "H": config.n_head, "L": config.n_layer, "V": config.vocab_size,
            "RANKS": self.ranks, "TEAMS": self.teams, "IN_CLUSTERS": int(self.clusters), "HEADS": self.heads,
            "HIDDEN": self.hidden, "AHEAD": self.ahead,
            "GELU": "Exact" if config.activation_function == "gelu" else "Tanh",
        }  # fmt: skip


class Decoder:
    """The logits of the next token from one more token of each text and a key-value cache: GPT2.next_logits for T = 1,
    in one launch. The parameters are read where they are at the first call."""

    first_mark = 1  # of the letters of the first launch; memory that was never written holds 0

    @staticmethod
    def fitting(model: LanguageModel, cache: Cache) -> Decoder | None:
        """A decoder for this model and cache, or None where the kernel cannot serve them: another architecture than
        GPT-2's, a CPU, float64, more than MOST_TEXTS texts, heads or parameters that are not whole accesses, or too
        little shared memory."""
        limits, texts, itemsize = model.backend.limits(), cache.layers[0].shape[1], cache.layers[0].dtype.itemsize
        config = model.config
        if (
            not isinstance(config, GPT2Config)
            or not limits
            or model.activations not in REAL
            or texts > MOST_TEXTS
            or config.head_size * itemsize % ACCESS
        ):
            return None
        if any(p.compute.data.ptr % ACCESS for p in model.parameters() if p.ndim == 2):
            return None
        plan = Plan.of(config, texts, itemsize, limits)
        return None if plan is None else Decoder(model, config, cache, plan)

    def __init__(self, model: LanguageModel, config: GPT2Config, cache: Cache, plan: Plan):
        self._model, self._config, self._layers, self._plan = model, config, cache.layers, plan
        self._texts, self._capacity = cache.layers[0].shape[1], cache.layers[0].shape[3]
        self._tokens = np.dtype([("id", "i4", (self._texts,))])
        self._launches = 0
        self._kernel: Any = None

    def __call__(self, tokens: np.ndarray, position: int) -> Any:
        """Logits (B, V) in float32, on the device, for tokens (B,) at `position` of their texts, whose keys and values
        go to the cache. Raises ValueError for a token or a position out of range."""
        self._check(tokens, position, 1)
        logits = self._model.backend.np.empty((self._texts, self._model.config.vocab_size), dtype=np.float32)
        self._launch(tokens, position, logits=logits)
        return logits

    def likeliest(self, tokens: np.ndarray, position: int, count: int, choices: int) -> Iterator[np.ndarray]:
        """`count` times the likeliest of the first `choices` tokens for each text, (B,), beginning with what follows
        `tokens` at `position`; -1 where the logits are no finite numbers.

        Each token goes to the next launch on the device, and that one is launched before the token has come to the
        host: the GPU does not wait for it. Raises ValueError for a token or a position out of range."""
        if count < 1:
            return
        self._check(tokens, position, count)
        backend, previous = self._model.backend, None
        arrived: Callable[[], None] | None = None
        chosen = [backend.zeros((self._texts,), "int32") for _ in range(2)]
        landing = [backend.staging(array, None) for array in chosen]
        try:
            for i in range(count):
                self._launch(tokens, position + i, previous=previous, likeliest=chosen[i % 2], choices=choices)
                before, previous = arrived, chosen[i % 2]
                arrived = backend.download(previous, landing[i % 2])
                if before:
                    before()
                    yield landing[(i - 1) % 2].astype(np.int64)
            if arrived:
                arrived()
                yield landing[(count - 1) % 2].astype(np.int64)
        finally:  # who stops early must not free memory that the last copy is still to land in
            if arrived:
                arrived()

    def _check(self, tokens: np.ndarray, position: int, count: int) -> None:
        c = self._config
        if tokens.min() < 0 or tokens.max() >= c.vocab_size:
            raise ValueError(f"decode: tokens hold {tokens.min()} to {tokens.max()}; expected 0 to {c.vocab_size - 1}")
        if not 0 <= position <= min(self._capacity, c.n_positions) - count:
            raise ValueError(
                f"decode: position {position + count - 1}; the cache holds {self._capacity}, the context "
                f"{c.n_positions}"
            )

    def _launch(
        self,
        tokens: np.ndarray,
        position: int,
        *,
        logits: Any = None,
        likeliest: Any = None,
        previous: Any = None,
        choices: int = 0,
    ) -> None:
        """One token of each text; see decode.cu for the arguments."""
        if self._kernel is None:
            self._prepare()
        c, plan = self._config, self._plan
        marks = 2 * c.n_layer + 1  # of a launch: for each half of a layer, and for the end
        mark = np.uint32((self.first_mark + self._launches * marks) % 2**32)
        self._launches += 1
        numbers = np.int32(choices), np.int32(position), np.int32(self._capacity), np.float32(c.layer_norm_epsilon)
        given = np.array((tokens,), dtype=self._tokens)[()], *numbers, mark
        arguments = logits, likeliest, previous, *self._arrays, *given
        self._kernel((plan.blocks,), (THREADS,), arguments, shared_mem=plan.shared)

    def _prepare(self) -> None:
        """Compile the kernel for as many blocks as run at once, and make what it is given at every call."""
        model, c, backend, texts = self._model, self._config, self._model.backend, self._texts
        while True:
            plan = self._plan
            constants = {"REAL": REAL[model.activations], **plan.constants(c)}
            source = Path(__file__).with_suffix(".cu")
            self._kernel = backend.kernel(source, "decode", shared=plan.shared, **constants)
            # The processors of a GPU are wired in groups, whose sizes differ: not all of them may be in clusters.
            launch = self._kernel, plan.blocks, THREADS, plan.shared
            room = backend.clusters_at_once(*launch) if plan.clusters else plan.teams
            if room >= plan.teams:
                break
            sizes, limits = (c, texts, self._layers[0].dtype.itemsize), backend.limits()
            fewer = Plan.of(*sizes, limits, teams=room) if room else None
            self._plan = fewer or Plan.of(*sizes, {**limits, "capability": 0}) or plan  # without clusters
        named = dict(model.named_parameters())
        self._rows = [_layer(named, i, cache) for i, cache in enumerate(self._layers)]  # kept: they are pointed to
        table = np.array([[array.data.ptr for array in row] for row in self._rows], dtype=np.uint64)
        self._arrays = (
            backend.upload(table),
            *(named["wte.weight"].compute, named["wpe.weight"].compute),
            *(named["ln_f.weight"].data, named["ln_f.bias"].data),
            backend.zeros((4 * plan.teams * texts * c.n_embd + 2 * texts * plan.blocks,), "uint64"),
            backend.zeros((1 if plan.clusters else plan.blocks, plan.places), "uint64"),
        )


def _layer(named: dict[str, Parameter], layer: int, keys_and_values: Any) -> list[Any]:
    """The arrays of a struct Layer."""
    linears = [f"h.{layer}.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    norms = [f"h.{layer}.{norm}.{kind}" for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")]
    vectors = [named[name].data for name in (*(f"{linear}.bias" for linear in linears), *norms)]
    return [*(named[f"{linear}.weight"].compute for linear in linears), *vectors, keys_and_values]
