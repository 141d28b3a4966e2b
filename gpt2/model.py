"""GPT-2 as published: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpt2.config import RECOMPUTE, GPT2Config, is_matrix
from gpt2.formats import huggingface, model_file
from gpt2.generate import complete
from gpt2.language_model import Cache
from tinygrad2 import Key, Tensor, nn, ops, recompute
from tinygrad2.backend import Backend, get_backend
from tinygrad2.precision import PRECISIONS
from tinygrad2.random import INIT_STEP

SITES_PER_BLOCK = 3  # where a block drops out: attention weights, attention's result, the MLP's result


class _Init:
    """Builds the layers' initial values: normal(0, std) drawn from the seed, or zeros where weights will be loaded."""

    def __init__(self, seed: int | None):
        self.seed = seed
        self.sites = itertools.count()

    def normal(self, std: float) -> nn.Initializer:
        return (
            nn.zeros_init
            if self.seed is None
            else nn.normal_init(std, Key(self.seed, INIT_STEP, site=next(self.sites)))
        )


class Attention(nn.Module):
    """Causal multi-head self-attention: one linear layer makes queries, keys and values, another mixes the heads."""

    def __init__(self, config: GPT2Config, init: _Init, **place: Any):
        self.config = config
        C = config.n_embd
        self.c_attn = nn.Linear(C, 3 * C, init=init.normal(config.initializer_range), **place)
        self.c_proj = nn.Linear(C, C, init=init.normal(_residual_std(config)), **place)

    def __call__(self, x: Tensor, key: Key | None, site: int, past: tuple[Any, int] | None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3 C)
        if past is None:
            out = ops.attention(qkv, self.config.n_head, self.config.attn_pdrop, key and key.at(site))  # (B, T, C)
        else:
            out = ops.attention_cached(qkv, *past, self.config.n_head)
        return ops.dropout(self.c_proj(out), self.config.resid_pdrop, key and key.at(site + 1))


class MLP(nn.Module):
    """Two linear layers with GELU between them. The first one's bias is added by GELU's kernel."""

    def __init__(self, config: GPT2Config, init: _Init, **place: Any):
        self.config = config
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C, init=init.normal(config.initializer_range), **place)
        self.c_proj = nn.Linear(4 * C, C, init=init.normal(_residual_std(config)), **place)

    def __call__(self, x: Tensor, key: Key | None, site: int) -> Tensor:
        hidden = ops.linear(x, self.c_fc.weight)  # (B, T, 4 C)
        hidden = ops.gelu(hidden, self.c_fc.bias, exact=self.config.activation_function == "gelu")
        return ops.dropout(self.c_proj(hidden), self.config.resid_pdrop, key and key.at(site))


class Block(nn.Module):
    """One layer. The residual stream comes as x and the part `delta` not yet added to it, and leaves likewise:
    each addition is fused with the LayerNorm that reads the sum."""

    def __init__(self, config: GPT2Config, init: _Init, **place: Any):
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, **place)
        self.attn = Attention(config, init, **place)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, **place)
        self.mlp = MLP(config, init, **place)

    def __call__(
        self, x: Tensor, delta: Tensor | None, key: Key | None, site: int, past: tuple[Any, int] | None
    ) -> tuple[Tensor, Tensor]:
        x, h = (x, self.ln_1(x)) if delta is None else self.ln_1.add_and_normalize(x, delta)
        x, h = self.ln_2.add_and_normalize(x, self.attn(h, key, site, past))
        return x, self.mlp(h, key, site + 2)

    def again(self, key: Key | None, site: int, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same, without a cache, as a function of tensors: what is to be computed again stands last."""
        return self(x, delta, key, site, None)


class GPT2(nn.Module):
    """GPT-2: token and position embeddings, pre-LayerNorm blocks, a final LayerNorm, and the output layer tied to the
    token embedding.

    config  sizes and dropout rates.
    seed    of the initial weights: normal(0, 0.02), the two projections of each block onto the residual stream scaled
            by 1 / sqrt(2 n_layer); None leaves them zero, for loading.
    device  where the parameters live: "cpu", "cuda", or "auto" for a GPU where there is one.
    dtype   what is computed in: "float32" to train, "float64" to check, and on a GPU also "tf32" (float32, products
            faster and less exact) and "bfloat16" (activations, and copies of the weights; the parameters themselves,
            their gradients and all sums stay float32).

    Two ways to train in less memory, for more time: recompute="block" keeps only what goes into each block and computes
    the block again in the backward pass; head_rows takes so many rows of the output layer's logits at a time.
    """

    def __init__(
        self,
        config: GPT2Config,
        seed: int | None = 0,
        device: str = "cpu",
        dtype: str = "float32",
        recompute: str = "none",
        head_rows: int | None = None,
    ):
        if recompute not in RECOMPUTE:
            raise ValueError(f"GPT2: recompute is {recompute!r}; choose one of {', '.join(RECOMPUTE)}")
        self.recompute, self.head_rows = recompute, head_rows
        self.config = config
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(PRECISIONS)}")
        backend, precision = get_backend(device), PRECISIONS[dtype]
        if reason := backend.unsupported_reason(dtype, config.head_size):
            raise ValueError(f"GPT2: {reason}")
        self.precision, self.dtype = dtype, precision.parameters
        place: dict[str, Any] = {"device": device, "dtype": self.dtype}
        init, std = _Init(seed), config.initializer_range
        # Registered in the reverse of the order in which the backward pass finishes (see ParameterArena): wte serves at
        # both ends, so its gradient is the last to be final.
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, init=init.normal(std), **place)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd, init=init.normal(std), **place)
        self.h = [Block(config, init, **place) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, **place)
        if backend.cuda:
            backend.cuda.use_tf32(precision.tf32)
        if precision.copies:
            for parameter in self.parameters():
                parameter.hold_copy()

    @property
    def activations(self) -> str:
        """The type of what the layers compute: bfloat16 where the parameters hold such copies, else their own."""
        return "bfloat16" if self.wte.weight.has_copy else self.dtype

    @property
    def backend(self) -> Backend:
        """Where the model computes: the backend of its parameters."""
        return self.wte.weight.backend

    def features(self, tokens: Any, key: Key | None = None, cache: Cache | None = None) -> Tensor:
        """The last layer's normalised activations: tokens (B, T) -> (B, T, C).

        key    names the dropout masks; None is no dropout.
        cache  what came before these tokens; they are added to it.
        """
        shape = tokens.shape if hasattr(tokens, "shape") else self.backend.asarray(tokens).shape
        if len(shape) != 2:
            raise ValueError(f"GPT2: tokens have shape {tuple(shape)}; expected (B, T)")
        before = 0 if cache is None else cache.length
        if before + shape[1] > self.config.n_positions:
            raise ValueError(
                f"GPT2: {before + shape[1]} tokens given; the model's context is {self.config.n_positions}"
            )
        x = ops.embedding(tokens, self.wte.weight, self.wpe.weight, before)
        x = ops.dropout(x, self.config.embd_pdrop, key and key.at(0))
        delta = None
        for layer, block in enumerate(self.h):
            site = 1 + SITES_PER_BLOCK * layer
            if cache is not None:
                x, delta = block(x, delta, key, site, (cache.layers[layer], before))
            elif self.recompute == "block":
                x, delta = recompute(partial(block.again, key, site), *([x] if delta is None else [x, delta]))
            else:
                x, delta = block(x, delta, key, site, None)
        if cache is not None:
            cache.length += shape[1]
        assert delta is not None
        return self.ln_f.add_and_normalize(x, delta)[1]

    def head(self, features: Tensor) -> Tensor:
        """The output layer, tied to the token embedding: features (..., C) -> logits (..., V)."""
        return ops.linear(features, self.wte.weight.transpose())

    def __call__(self, tokens: Any) -> Tensor:
        """Logits: tokens (B, T) of integers -> (B, T, V)."""
        return self.head(self.features(tokens))

    def loss(self, tokens: Any, targets: Any, key: Key | None = None) -> Tensor:
        """The mean cross-entropy in nats of predicting targets (B, T) from tokens (B, T), a scalar.

        key  names the dropout masks of this batch; without one there is no dropout, so evaluating needs no mode.
        """
        return ops.lm_head(self.features(tokens, key), self.wte.weight, targets, self.head_rows)

    def cache_shapes(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        """The shape of each layer's keys and values, (2, B, H, capacity, D)."""
        c = self.config
        return [(2, batch, c.n_head, capacity, c.head_size)] * c.n_layer

    def hidden_matrices(self) -> dict[str, int]:
        """The names of the matrices of the blocks; queries, keys and values are three matrices in one."""
        return {name: 3 if "c_attn" in name else 1 for name, _ in self.named_parameters() if is_matrix(name)}

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop: int | None = None, **sampling: Any
    ) -> list[list[int]]:
        """Continue `tokens` (ids): for each sample the new ids. See gpt2.generate.complete."""
        return complete(self, tokens, max_tokens, stop, **sampling)

    @staticmethod
    def from_pretrained(path: str | Path, device: str = "cpu", dtype: str = "float32") -> GPT2:
        """The model in a folder of the Hugging Face layout (config.json and model.safetensors), or in any other file or
        folder that gpt2.formats reads. In bfloat16 on the CPU it serves to generate: see `narrow`.

        Raises ValueError for what does not fit (a tensor that is missing, surplus or of another shape is named), and
        FileNotFoundError where a file is not there.
        """
        narrow = dtype in PRECISIONS and PRECISIONS[dtype].copies and get_backend(device).narrow_weights
        config = model_file.load_config(path)
        model = GPT2(config, seed=None, device=device, dtype="float32" if narrow else dtype)
        model_file.load_into(model, path)
        return model.narrow() if narrow else model

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors into the folder `path`, in the Hugging Face layout."""
        huggingface.write(path, self.config, {name: p.numpy() for name, p in self.named_parameters()}, {})


def _residual_std(config: GPT2Config) -> float:
    return config.initializer_range / math.sqrt(2 * config.n_layer)
