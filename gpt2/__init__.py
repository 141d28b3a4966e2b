"""GPT-2 on tinygrad2."""

from gpt2.config import GPT2Config
from gpt2.model import GPT2
from gpt2.tokenizer import Tokenizer

__all__ = ["GPT2", "GPT2Config", "Tokenizer"]
