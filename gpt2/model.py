"""GPT-2 as published: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypedDict, Unpack

from numpy.typing import ArrayLike

from gpt2.config import RECOMPUTE, GPT2Config, is_matrix
from gpt2.formats import huggingface, model_file
from gpt2.generate import Ends, Sampling, complete
from gpt2.language_model import Cache, LanguageModel
from gpt2.trace import trace as trace_model
from tinygrad2 import Key, Tensor, nn, ops, recompute
from tinygrad2.array import Array
from tinygrad2.backend import Backend, get_backend
from tinygrad2.precision import BFLOAT16, BFLOAT16_WEIGHTS, Precision, PrecisionLike
from tinygrad2.random import INIT_STEP

SITES_PER_BLOCK = 3  # dropout sites: the attention weights, the output of attention, the output of the MLP


class _Placement(TypedDict):
    """The device and the precision of a layer."""

    device: str
    precision: Precision


class _Init:
    """Creates initializers: normal(0, std), or zeros if the seed is None, for weights that will be loaded."""

    def __init__(self, seed: int | None):
        self.seed = seed
        self.sites = itertools.count()

    def weight(self, std: float) -> nn.Initializer:
        return (
            nn.zeros_init
            if self.seed is None
            else nn.normal_init(std, Key(self.seed, INIT_STEP, site=next(self.sites)))
        )


class Attention(nn.Module):
    """Causal multi-head self-attention: one linear layer computes queries, keys and values, another mixes the heads.

    past  this layer's key-value cache, (2, B, H, capacity, D), and the number of positions in use.
    """

    def __init__(self, config: GPT2Config, init: _Init, **placement: Unpack[_Placement]):
        self.config, self.precision = config, placement["precision"]
        C = config.n_embd
        self.c_attn = nn.Linear(C, 3 * C, init=init.weight(config.initializer_range), **placement)
        self.c_proj = nn.Linear(C, C, init=init.weight(_residual_std(config)), **placement)

    def __call__(self, x: Tensor, key: Key | None, site: int, past: tuple[Array, int] | None) -> Tensor:
        config, tf32 = self.config, self.precision.tf32
        qkv = self.c_attn(x)  # (B, T, 3 C)
        if past is None:
            out = ops.attention(qkv, config.n_head, config.attn_pdrop, key and key.at(site), tf32)  # (B, T, C)
        else:
            out = ops.attention_cached(qkv, *past, config.n_head, tf32, self.precision.matrices)
        return ops.dropout(self.c_proj(out), self.config.resid_pdrop, key and key.at(site + 1))


class MLP(nn.Module):
    """Two linear layers with GELU between them. The GELU kernel adds the bias of the first."""

    def __init__(self, config: GPT2Config, init: _Init, **placement: Unpack[_Placement]):
        self.config, self.precision = config, placement["precision"]
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C, init=init.weight(config.initializer_range), **placement)
        self.c_proj = nn.Linear(4 * C, C, init=init.weight(_residual_std(config)), **placement)

    def __call__(self, x: Tensor, key: Key | None, site: int) -> Tensor:
        hidden = ops.linear(x, self.c_fc.weight, tf32=self.precision.tf32)  # (B, T, 4 C)
        hidden = ops.gelu(hidden, self.c_fc.bias, exact=self.config.activation_function == "gelu")
        return ops.dropout(self.c_proj(hidden), self.config.resid_pdrop, key and key.at(site))


class Block(nn.Module):
    """One transformer block. Input and output are a pair (x, delta), and the residual stream is x + delta: the addition
    is fused with the LayerNorm that follows it."""

    def __init__(self, config: GPT2Config, init: _Init, **placement: Unpack[_Placement]):
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, **placement)
        self.attn = Attention(config, init, **placement)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, **placement)
        self.mlp = MLP(config, init, **placement)

    def __call__(
        self, x: Tensor, delta: Tensor | None, key: Key | None, site: int, past: tuple[Array, int] | None
    ) -> tuple[Tensor, Tensor]:
        x, h = (x, self.ln_1(x)) if delta is None else self.ln_1.add_and_normalize(x, delta)
        x, h = self.ln_2.add_and_normalize(x, self.attn(h, key, site, past))
        return x, self.mlp(h, key, site + 2)

    def recomputable(self, key: Key | None, site: int, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """__call__ without a cache. The tensors are the last arguments, as `recompute` requires."""
        return self(x, delta, key, site, None)


class GPT2(nn.Module):
    """GPT-2: token and position embeddings, pre-LayerNorm blocks, a final LayerNorm, and the output layer tied to the
    token embedding.

    config  the sizes and dropout rates.
    seed    the seed of the initial weights: normal(0, 0.02), with the two projections of each block onto the residual
            stream scaled by 1 / sqrt(2 n_layer). None initializes them to zero, for weights that are loaded later.
    device  the device of the parameters: "cpu", "cuda", or "auto" (a GPU if there is one).
    dtype   the precision, or its name: "float32" for training, "float64" for checks, "bfloat16" (activations, and
            copies of the weights; the parameters themselves, their gradients and all sums stay float32), on a GPU also
            "tf32" (float32, with faster and less precise matrix products), and on a CPU also "bfloat16_weights"
            (matrices in bfloat16, for faster generation: half as many bytes are read for each token).

    Two options reduce the memory of training, at the cost of time: recompute="block" saves only the inputs of each
    block and recomputes the block in the backward pass; head_rows limits how many rows of logits exist at a time.
    """

    fused_decode = False  # on a GPU, generate each token with one kernel launch; see gpt2/decode.py

    def __init__(
        self,
        config: GPT2Config,
        seed: int | None = 0,
        device: str = "cpu",
        dtype: PrecisionLike = "float32",
        recompute: str = "none",
        head_rows: int | None = None,
    ):
        if recompute not in RECOMPUTE:
            raise ValueError(f"GPT2: recompute is {recompute!r}; choose one of {', '.join(RECOMPUTE)}")
        self.recompute, self.head_rows = recompute, head_rows
        self.config, self.precision = config, Precision.of(dtype)
        if reason := self.unsupported_reason(get_backend(device), self.precision):
            raise ValueError(f"GPT2: {reason}")
        placement: _Placement = {"device": device, "precision": self.precision}
        init, std = _Init(seed), config.initializer_range
        # The layers are created in the reverse of the order in which the backward pass completes their gradients (see
        # ParameterArena). The first and the last layer both use wte, so its gradient is complete last.
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, init=init.weight(std), **placement)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, init=init.weight(std), **placement)
        self.h = [Block(config, init, **placement) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, **placement)

    def unsupported_reason(self, backend: Backend, precision: Precision) -> str | None:
        return backend.unsupported_reason(precision, self.config.head_size)

    @property
    def backend(self) -> Backend:
        """The backend of the parameters, on which the model runs."""
        return self.wte.weight.backend

    def features(self, tokens: ArrayLike, key: Key | None = None, cache: Cache | None = None) -> Tensor:
        """The activations after the final LayerNorm: tokens (B, T) -> (B, T, C).

        key    the key of the dropout masks; None for no dropout.
        cache  keys and values of the preceding tokens; those of `tokens` are appended.
        """
        shape = tokens.shape if hasattr(tokens, "shape") else self.backend.asarray(tokens).shape
        if len(shape) != 2:
            raise ValueError(f"GPT2: tokens have shape {tuple(shape)}; expected (B, T)")
        if 0 in shape:
            raise ValueError(f"GPT2: tokens have shape {tuple(shape)}, which is empty")
        before = 0 if cache is None else cache.length
        if before + shape[1] > self.config.n_positions:
            raise ValueError(
                f"GPT2: {before + shape[1]} tokens given; the model's context is {self.config.n_positions}"
            )
        x = ops.embedding(tokens, self.wte.weight, self.wpe.weight, before, self.precision.activations)
        x = ops.dropout(x, self.config.embd_pdrop, key and key.at(0))
        delta = None
        for layer, block in enumerate(self.h):
            site = 1 + SITES_PER_BLOCK * layer
            if cache is not None:
                x, delta = block(x, delta, key, site, (cache.layers[layer], before))
            elif self.recompute == "block":
                x, delta = recompute(partial(block.recomputable, key, site), *([x] if delta is None else [x, delta]))
            else:
                x, delta = block(x, delta, key, site, None)
        if cache is not None:
            cache.length += shape[1]
        assert delta is not None
        return self.ln_f.add_and_normalize(x, delta)[1]

    def head(self, features: Tensor) -> Tensor:
        """The output layer, tied to the token embedding: features (..., C) -> logits (..., V)."""
        return ops.logits(features, self.wte.weight, self.precision.tf32)

    def __call__(self, tokens: ArrayLike) -> Tensor:
        """Logits: tokens (B, T) of integers -> (B, T, V)."""
        return self.head(self.features(tokens))

    def loss(self, tokens: ArrayLike, targets: ArrayLike, key: Key | None = None) -> Tensor:
        """The mean cross-entropy in nats of predicting targets (B, T) from tokens (B, T), a scalar.

        key  the key of this batch's dropout masks; None for no dropout, as in evaluation.
        """
        x, tf32 = self.features(tokens, key), self.precision.tf32
        return ops.lm_head(x, self.wte.weight, targets, self.head_rows, tf32)

    def backward(self, tokens: ArrayLike, targets: ArrayLike, key: Key | None = None, dloss: float = 1.0) -> Array:
        """loss(tokens, targets, key).backward(dloss), with less memory for the logits. Returns the loss.

        If `loss` is overridden, in a subclass or on the instance, this is LanguageModel.backward.
        """
        if type(self).loss is not GPT2.loss or "loss" in vars(self):
            return LanguageModel.backward(self, tokens, targets, key, dloss)
        tf32 = self.precision.tf32
        return ops.lm_head_gradients(self.features(tokens, key), self.wte.weight, targets, dloss, self.head_rows, tf32)

    def cache_shapes(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        """The shape of each layer's keys and values, (2, B, H, capacity, D)."""
        c = self.config
        return [(2, batch, c.n_head, capacity, c.head_size)] * c.n_layer

    def hidden_matrices(self) -> dict[str, int]:
        """The names of the blocks' weights, and the number of matrices in each: 3 in c_attn (q, k, v), otherwise 1."""
        return {name: 3 if "c_attn" in name else 1 for name, _ in self.named_parameters() if is_matrix(name)}

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: Ends = None, **sampling: Unpack[Sampling]
    ) -> list[list[int]]:
        """Continue `tokens`, a list of ids. Returns the new ids of each sample. See gpt2.generate.complete."""
        return complete(self, tokens, max_tokens, stop, **sampling)

    trace = trace_model  # model.trace(tokens): every layer's activations and attention weights; see gpt2.trace.trace

    @staticmethod
    def from_pretrained(path: str | Path, device: str = "cpu", dtype: PrecisionLike = "float32") -> GPT2:
        """Load a model from a Hugging Face folder (config.json and model.safetensors), or from any other file or folder
        that gpt2.formats reads. With bfloat16 on a CPU, the model cannot be trained; see `generation_precision`.

        Raises ValueError if a tensor is missing, unexpected, or has the wrong shape, and FileNotFoundError if a file is
        missing. The message names the tensor or the file.
        """
        precision = generation_precision(dtype, get_backend(device))
        model = GPT2(model_file.load_config(path), seed=None, device=device, dtype=precision)
        model_file.load_into(model, path)
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`, in the Hugging Face layout."""
        huggingface.write(path, self.config, {name: p.numpy() for name, p in self.named_parameters()})


def generation_precision(dtype: PrecisionLike, backend: Backend) -> Precision:
    """The precision for generation and evaluation. On a CPU, "bfloat16" means weights in bfloat16 and activations in
    float32, because reading the weights takes most of the time."""
    precision = Precision.of(dtype)
    weights_only = precision == BFLOAT16 and not backend.unsupported_reason(BFLOAT16_WEIGHTS)
    return BFLOAT16_WEIGHTS if weights_only else precision


def _residual_std(config: GPT2Config) -> float:
    return config.initializer_range / math.sqrt(2 * config.n_layer)
