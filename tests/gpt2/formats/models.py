"""Models with random values, and model files as other programs write them."""

import numpy as np

from gpt2 import GPT2, GPT2Config, convert
from gpt2.config import is_matrix
from gpt2.formats import torch_file
from gpt2.formats.stored import Stored

SIZES = {"vocab_size": 257, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def random_model(**changes):
    """A model in which biases and gains are random too, so that tests detect exchanged tensors."""
    model = GPT2(GPT2Config(**{**SIZES, **NO_DROPOUT, **changes}))
    random = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data = random.standard_normal(parameter.shape).astype("float32")
    return model


def values(model):
    """The arrays of the parameters, by name."""
    return {name: parameter.data for name, parameter in model.named_parameters()}


def linear(model, prefix="transformer."):
    """The state dict in the layout of nanoGPT and build-nanogpt: weights are (out, in), and it contains the tied output
    layer."""
    arrays = {prefix + name: a.T.copy() if is_matrix(name) else a for name, a in values(model).items()}
    return arrays | {f"{prefix.removesuffix('transformer.')}lm_head.weight": arrays[f"{prefix}wte.weight"]}


def stored(arrays):
    """The arrays as Stored objects, as read from a model file."""
    return {name: Stored(a.shape, a.dtype.name, lambda a=a: a) for name, a in arrays.items()}


def assert_equal(model, other):
    assert other.config == model.config
    for (name, p), (other_name, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name
        np.testing.assert_array_equal(p.data, q.data, err_msg=name)


def write_every_format():
    """Write the same model in every format to the current directory: model/, model.pt and model.llmc."""
    random_model().save_pretrained("model")
    for form in ("pt", "llmc"):
        convert.convert("model", f"model.{form}", form)


NANOGPT = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True, "vocab_size": 257, "dropout": 0.2}


def nanogpt(path, arrays, **changes):
    """Write a nanoGPT checkpoint, with `changes` in its configuration."""
    checkpoint = {"model": stored(arrays), "optimizer": {"state": {}}, "model_args": {**NANOGPT, **changes}}
    torch_file.write_pickle(path, {**checkpoint, "iter_num": 5, "config": {"dataset": "x", "n_layer": 2, "n_head": 2}})
    return path
