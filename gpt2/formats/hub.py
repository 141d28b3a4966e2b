"""Downloads OpenAI's weights from the Hugging Face Hub to its cache (in HF_HOME)."""

from __future__ import annotations

import re
from pathlib import Path

from tinygrad2.machine import install_command

REVISIONS = {  # the commit to use of openai-community/NAME
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]


def advice(path: Path) -> str:
    """Advice for the end of an error message: how to download `path`, if it is the name or URL of a model on the Hub;
    otherwise ""."""
    named = re.fullmatch(r"(?:https?:/{1,2}huggingface\.co/)?([\w.-]+/)?([\w.-]+)", str(path))
    is_address = str(path).startswith("http")
    if named is None or not (is_address or named[1]) or path.is_absolute() or path.parent.is_dir():
        return ""
    owner, name = named.groups()
    if name in REVISIONS and owner in (None, "openai-community/", "openai/"):
        return f"; use {name}"
    return f"; to use a model on the Hugging Face Hub, download it: hf download {owner or ''}{name} --local-dir {name}"


def download(name: str) -> Path:
    """The folder of the published model `name`, a key of REVISIONS. Downloads it, with a progress bar, if needed.

    Raises FileNotFoundError if it is not in the cache and cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{name}: to download it, install huggingface_hub: {install_command('hub')}") from None
    try:
        return Path(snapshot_download(f"openai-community/{name}", revision=REVISIONS[name], allow_patterns=FILES))
    except Exception as error:  # the types depend on the versions of huggingface_hub and its dependencies
        raise FileNotFoundError(
            f"{name}: it could not be downloaded from the Hugging Face Hub ({type(error).__name__}); connect to the "
            f"network once, or pass a folder with {', '.join(FILES)}"
        ) from None
