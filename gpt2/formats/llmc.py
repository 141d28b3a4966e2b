"""Model files of llm.c: a header of 256 int32, then every parameter, float32 (version 3) or bfloat16 (version 5).

Header: magic, version, context, vocabulary, layers, heads, width, padded vocabulary. The token embedding comes first,
padded with rows of zeros to a multiple of 128; the blocks' parameters follow one kind after another, each for all
layers, matrices as (out, in). The format knows neither another GELU than the tanh form nor dropout.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from gpt2.config import GPT2Config, is_matrix
from gpt2.formats.stored import Stored, read_at

MAGIC, HEADER = 20240326, 256
VERSIONS = {3: "float32", 5: "bfloat16"}
PAD = 128
EPSILON = 1e-5


def read(file: Path) -> tuple[GPT2Config, dict[str, Stored]]:
    """The config and the arrays, by this model's names and in its layout. Raises ValueError where the file is not
    exactly as long as its header says."""
    magic, version, T, V, L, H, C, padded = read_at(file, "<i4", 0, (HEADER,))[:8].tolist()
    if magic != MAGIC or version not in VERSIONS:
        raise ValueError(f"magic {magic}, version {version}; expected {MAGIC} and version 3 (float32) or 5 (bfloat16)")
    rates: dict[str, Any] = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    config = GPT2Config(vocab_size=V, n_positions=T, n_embd=C, n_layer=L, n_head=H, layer_norm_epsilon=EPSILON, **rates)
    if padded < V:
        raise ValueError(f"the padded vocabulary has {padded} tokens, fewer than the {V} of the vocabulary")
    dtype = VERSIONS[version]
    size = np.dtype(dtype).itemsize
    expected = HEADER * 4 + size * (config.n_parameters + (padded - V) * C)
    if file.stat().st_size != expected:
        raise ValueError(
            f"it has {file.stat().st_size:,} bytes; its header makes {expected:,}: it is truncated or foreign"
        )

    arrays: dict[str, Stored] = {}
    offset = HEADER * 4
    for name, shape in _layout(config):
        stored = _at(file, dtype, offset, shape)
        arrays[name] = stored.transposed() if is_matrix(name) else stored
        offset += size * (padded * C if name == "wte.weight" else math.prod(shape))
    return config, arrays


def write(file: Path, config: GPT2Config, arrays: dict[str, Stored]) -> None:
    """Write arrays that are all float32 or all bfloat16. Raises ValueError for a model that llm.c does not compute."""
    version = {dtype: version for version, dtype in VERSIONS.items()}.get(arrays["wte.weight"].dtype)
    if version is None:
        raise ValueError(f"llm.c has no files of {arrays['wte.weight'].dtype}; choose {' or '.join(VERSIONS.values())}")
    if config.activation_function == "gelu" or config.layer_norm_epsilon != EPSILON:
        raise ValueError(
            f"llm.c computes GELU's tanh form and LayerNorm with 1e-05; this model has activation_function "
            f"{config.activation_function} and layer_norm_epsilon {config.layer_norm_epsilon}"
        )
    V, C = config.vocab_size, config.n_embd
    padded = -(-V // PAD) * PAD
    header = np.zeros(HEADER, "<i4")
    header[:8] = MAGIC, version, config.n_positions, V, config.n_layer, config.n_head, C, padded
    with file.open("wb") as out:
        out.write(header.data)
        for name, _ in _layout(config):
            values = arrays[name].read()
            out.write(np.ascontiguousarray(values.T if is_matrix(name) else values).reshape(-1).view(np.uint8).data)
            if name == "wte.weight":
                out.write(np.zeros((padded - V) * C, values.dtype).view(np.uint8).data)


def _layout(config: GPT2Config) -> list[tuple[str, tuple[int, ...]]]:
    """The parameters in the file's order, with their shapes there."""
    shapes = dict(config.shapes())
    kinds = [name.removeprefix("h.0.") for name in shapes if name.startswith("h.0.")]
    blocks = [f"h.{layer}.{kind}" for kind in kinds for layer in range(config.n_layer)]
    names = ["wte.weight", "wpe.weight", *blocks, "ln_f.weight", "ln_f.bias"]
    return [(name, shapes[name][::-1] if is_matrix(name) else shapes[name]) for name in names]


def _at(file: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> Stored:
    return Stored(shape, dtype, lambda: read_at(file, dtype, offset, shape))
