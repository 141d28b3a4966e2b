"""llm.c model files: a header of 256 int32 values, then the parameters, in float32 (version 3) or bfloat16 (version 5).

The header contains the magic number, version, context, vocabulary size, layers, heads, width, and padded vocabulary
size. The token embedding is first, padded with rows of zeros to a multiple of 128, followed by the position embedding.
Then each parameter of the blocks is stored for all layers, with matrices as (out, in), and finally the last LayerNorm.
The format does not store dropout rates or the form of GELU, which is always the tanh form.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from gpt2.config import GPT2Config, is_matrix
from gpt2.formats.stored import Stored, read_at

MODEL_MAGIC, HEADER_INTS = 20240326, 256
DTYPE_OF_VERSION = {3: "float32", 5: "bfloat16"}
VOCAB_MULTIPLE = 128
LAYER_NORM_EPSILON = 1e-5


def read(file: Path) -> tuple[GPT2Config, dict[str, Stored]]:
    """The config, and the arrays with the names and layout of gpt2.model.GPT2. Raises ValueError if the size of the
    file does not match its header."""
    magic, version, T, V, L, H, C, padded = read_at(file, "<i4", 0, (HEADER_INTS,))[:8].tolist()
    if magic != MODEL_MAGIC or version not in DTYPE_OF_VERSION:
        raise ValueError(
            f"magic {magic}, version {version}; expected {MODEL_MAGIC} and version 3 (float32) or 5 (bfloat16)"
        )
    config = GPT2Config(
        vocab_size=V,
        n_positions=T,
        n_embd=C,
        n_layer=L,
        n_head=H,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        layer_norm_epsilon=LAYER_NORM_EPSILON,
    )
    if padded < V:
        raise ValueError(f"the padded vocabulary has {padded} tokens; expected at least the {V} of the vocabulary")
    dtype = DTYPE_OF_VERSION[version]
    size = np.dtype(dtype).itemsize
    expected = HEADER_INTS * 4 + size * (config.n_parameters + (padded - V) * C)
    if file.stat().st_size != expected:
        raise ValueError(
            f"it has {file.stat().st_size:,} bytes; expected {expected:,} according to its header: it is truncated, or "
            f"not an llm.c model"
        )

    arrays: dict[str, Stored] = {}
    offset = HEADER_INTS * 4
    for name, shape in _layout(config):
        stored = _at(file, dtype, offset, shape)
        arrays[name] = stored.transposed() if is_matrix(name) else stored
        offset += size * (padded * C if name == "wte.weight" else math.prod(shape))
    return config, arrays


def write(file: Path, config: GPT2Config, arrays: dict[str, Stored]) -> None:
    """Write a model whose arrays are all float32 or all bfloat16. Raises ValueError if llm.c does not support it."""
    dtype = arrays["wte.weight"].dtype
    version = {name: version for version, name in DTYPE_OF_VERSION.items()}.get(dtype)
    if version is None:
        raise ValueError(f"llm.c does not support {dtype}; choose {' or '.join(DTYPE_OF_VERSION.values())}")
    if config.activation_function == "gelu" or config.layer_norm_epsilon != LAYER_NORM_EPSILON:
        raise ValueError(
            f"llm.c supports only GELU's tanh form and layer_norm_epsilon 1e-05; this model has activation_function "
            f"{config.activation_function} and layer_norm_epsilon {config.layer_norm_epsilon}"
        )
    V, C = config.vocab_size, config.n_embd
    padded = -(-V // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    header = np.zeros(HEADER_INTS, "<i4")
    header[:8] = MODEL_MAGIC, version, config.n_positions, V, config.n_layer, config.n_head, C, padded
    with file.open("wb") as out:
        out.write(header.data)
        for name, _ in _layout(config):
            values = arrays[name].read()
            out.write(np.ascontiguousarray(values.T if is_matrix(name) else values).reshape(-1).view(np.uint8).data)
            if name == "wte.weight":
                out.write(np.zeros((padded - V) * C, values.dtype).view(np.uint8).data)


def _layout(config: GPT2Config) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of the parameters, in the order in which the file stores them."""
    shapes = dict(config.shapes())
    parts = [name.removeprefix("h.0.") for name in shapes if name.startswith("h.0.")]
    blocks = [f"h.{layer}.{part}" for part in parts for layer in range(config.n_layer)]
    names = ["wte.weight", "wpe.weight", *blocks, "ln_f.weight", "ln_f.bias"]
    return [(name, shapes[name][::-1] if is_matrix(name) else shapes[name]) for name in names]


def _at(file: Path, dtype: str, offset: int, shape: tuple[int, ...]) -> Stored:
    return Stored(shape, dtype, lambda: read_at(file, dtype, offset, shape))
