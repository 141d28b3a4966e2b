"""GPT-2 on tinygrad2. Names are imported on first use, so `python -m gpt2.doctor` runs even without NumPy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gpt2 import interrupts

if TYPE_CHECKING:
    from gpt2.config import GPT2Config
    from gpt2.model import GPT2
    from gpt2.tokenizer import Tokenizer

    __version__: str

__all__ = ["GPT2", "GPT2Config", "Tokenizer", "__version__"]

if interrupts.starting_a_command():
    interrupts.exit_silently_on_ctrl_c()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("tinygrad2").__version__
    modules = {"GPT2": "model", "GPT2Config": "config", "Tokenizer": "tokenizer"}
    if name not in modules:
        raise AttributeError(f"module 'gpt2' has no attribute {name!r}")
    return getattr(import_module(f"gpt2.{modules[name]}"), name)
