"""A small model for the tests of the inspector, and a reader for the data in a page."""

import json
import re

from gpt2 import GPT2, GPT2Config

CONFIG = GPT2Config(n_layer=2, n_head=3, n_embd=24, n_positions=160, vocab_size=257)
TEXT = "to be, or not to be"


def made(config=CONFIG, scale=8.0, seed=1):
    """A model whose attention is far from uniform."""
    model = GPT2(config, seed=seed)
    for _, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * scale
    return model


def data_of(file):
    """The JSON data in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)[1])
