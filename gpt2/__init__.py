"""GPT-2 on tinygrad2."""

from gpt2.config import GPT2Config
from gpt2.model import GPT2

__all__ = ["GPT2", "GPT2Config"]
