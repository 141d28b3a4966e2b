"""Decoding on a CPU with one compiled call per token, which runs all of GPT-2's operations on one key-value cache."""

from __future__ import annotations

from operator import is_

import numpy as np

from gpt2.config import GPT2Config
from gpt2.language_model import Cache, LanguageModel
from tinygrad2 import ops
from tinygrad2.array import Array
from tinygrad2.nn import Parameter


class CpuDecoder:
    """Computes the logits of the next token from the latest token of each text and a key-value cache.

    It is equivalent to generate.next_logits for T = 1. It calls the same kernels, so the results are bitwise equal, but
    no Python code runs between the kernels."""

    @staticmethod
    def fitting(model: LanguageModel, cache: Cache) -> CpuDecoder | None:
        """Return a decoder for this model and cache, or None if they are not supported. The following are
        not supported: an architecture other than GPT-2, GELU with the error function, activations other than float32,
        a GPU, an unusual head size, a large batch, and TINYGRAD2_KERNELS=reference."""
        config = model.config
        if not isinstance(config, GPT2Config) or config.activation_function == "gelu":
            return None
        if model.precision.activations != "float32" or model.precision.tf32:
            return None
        if model.backend.program(cache.layers[0].shape[1], config.head_size) is None:
            return None
        return CpuDecoder(model, config, cache)

    def __init__(self, model: LanguageModel, config: GPT2Config, cache: Cache):
        self._model, self._config, self._layers = model, config, cache.layers
        self._parameters: dict[str, Parameter] = dict(model.named_parameters())
        self._read: list[Array] = []  # the parameter arrays that the program reads

    def __call__(self, tokens: np.ndarray, position: int) -> Array:
        """Return the logits (B, V), in float32, that follow tokens (B,) at `position`, and append the keys and values
        of these tokens to the cache. Raises ValueError if a token or the position is out of range."""
        capacity = min(self._layers[0].shape[3], self._config.n_positions)
        if not 0 <= position < capacity:
            raise ValueError(f"decode: position {position} is out of range; expected 0 to {capacity - 1}")
        arrays = [parameter.data for parameter in self._parameters.values()]
        if len(arrays) != len(self._read) or not all(map(is_, arrays, self._read)):
            self._make_program()
            self._read = arrays
        wte, wpe = self._parameters["wte.weight"], self._parameters["wpe.weight"]
        embedded = ops.embedding(tokens[:, None], wte, wpe, position, self._model.precision.activations)
        self._x[...] = embedded.data[:, 0]
        self._program.run(position)
        return self._logits.copy()

    def _make_program(self) -> None:
        """Compile the operations of model.features and model.head that follow the embedding."""
        config, texts = self._config, self._layers[0].shape[1]
        backend, C, eps = self._model.backend, config.n_embd, config.layer_norm_epsilon
        arrays = {name: backend.to_host(parameter.data) for name, parameter in self._parameters.items()}
        program = backend.program(texts, config.head_size)
        assert program is not None
        x, h, delta, mixed = (np.zeros((texts, C), np.float32) for _ in range(4))
        qkv, hidden = (np.zeros((texts, n * C), np.float32) for n in (3, 4))
        logits = np.zeros((texts, config.vocab_size), np.float32)
        for i, cache in enumerate(map(backend.to_host, self._layers)):
            block = {name.removeprefix(f"h.{i}."): a for name, a in arrays.items() if name.startswith(f"h.{i}.")}
            program.layernorm(x, delta if i else None, block["ln_1.weight"], block["ln_1.bias"], eps, h)
            program.linear(h, block["attn.c_attn.weight"], block["attn.c_attn.bias"], qkv)
            program.attention_cached(qkv, cache, config.n_head, mixed)
            program.linear(mixed, block["attn.c_proj.weight"], block["attn.c_proj.bias"], delta)
            program.layernorm(x, delta, block["ln_2.weight"], block["ln_2.bias"], eps, h)
            program.linear(h, block["mlp.c_fc.weight"], None, hidden)
            program.gelu(hidden, block["mlp.c_fc.bias"], hidden)
            program.linear(hidden, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"], delta)
        program.layernorm(x, delta, arrays["ln_f.weight"], arrays["ln_f.bias"], eps, h)
        program.linear(h, arrays["wte.weight"].T, None, logits)
        self._program, self._x, self._logits = program, x, logits
