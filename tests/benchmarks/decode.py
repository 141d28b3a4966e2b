"""Text generation on the CPU, compared with other programs: python tests/benchmarks/decode.py [--json FILE]

Measures, interleaved, tokens per second of the 124M model with a key-value cache, after a context of 16 tokens, for
one text and for several in a batch, and the processing of a prompt of 512 tokens: this project with weights in float32
and bfloat16, and transformers and CTranslate2 in float32, if installed. All use the same random weights.

With --checkpoint and --data it first prints the effect of bfloat16 weights on the validation loss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import (
    Contender,
    Tasks,
    Work,
    apart,
    command,
    parser,
    positive,
    report,
    timed,
    versions,
)

CONTEXT, NEW = 16, 32  # tokens before the measurement starts, and measured tokens


def random_prompt(vocab_size: int, length: int) -> list[int]:
    import numpy as np

    return np.random.default_rng(0).integers(vocab_size - 1, size=length).tolist()  # without end-of-text


def save_model(folder: str, preset: str) -> None:
    """A model with random weights, in the Hugging Face layout."""
    from gpt2 import GPT2, GPT2Config

    GPT2(GPT2Config.preset(preset)).save_pretrained(folder)


def ours(folder: str, batches: Sequence[int], prefill: int, count: int, dtype: str) -> Tasks:
    from gpt2 import GPT2
    from gpt2.generate import KVCache, generate, next_logits
    from tinygrad2 import no_grad, threads

    threads.set_count(count)
    model = GPT2.from_pretrained(folder, dtype=dtype)
    vocab_size = model.config.vocab_size
    prompt, long = random_prompt(vocab_size, CONTEXT), random_prompt(vocab_size, prefill)

    def decode(batch: int) -> float:
        tokens = generate(model, prompt, 1 + NEW, samples=batch, temperature=0)
        next(tokens)  # reads the prompt
        return timed(lambda: list(tokens))()

    def read() -> None:
        import numpy as np

        with no_grad():
            next_logits(model, np.array([long]), KVCache(model, 1, prefill))

    return ready(decode, read, batches, prefill)


def ready(decode: Callable[[int], float], read: Callable, batches: Sequence[int], prefill: int) -> Tasks:
    """The tasks by name; each runs once."""
    tasks: Tasks = {f"batch {batch}": lambda batch=batch: decode(batch) for batch in batches}
    tasks[f"prompt of {prefill}"] = timed(read)
    for task in tasks.values():
        task()
    return tasks


def with_transformers(folder: str, batches: Sequence[int], prefill: int, count: int) -> Tasks:
    """transformers' model in a loop, without the overhead of generate."""
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(count)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt, long = (torch.tensor([random_prompt(model.config.vocab_size, n)]) for n in (CONTEXT, prefill))

    @torch.inference_mode()
    def decode(batch: int) -> float:
        out = model(prompt.repeat(batch, 1), use_cache=True)
        started = time.perf_counter()
        for _ in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - started

    @torch.inference_mode()
    def read() -> None:
        model(long, use_cache=True, logits_to_keep=1)

    return ready(decode, read, batches, prefill)


def convert(folder: str, target: str) -> None:
    """Convert the model in `folder` to CTranslate2. It has no tokenizer, so token 5 is the word "5"."""
    from ctranslate2.converters import TransformersConverter
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    class Words:
        def __init__(self, size: int):
            self.size = size
            self.bos_token = self.eos_token = self.unk_token = str(size - 1)

        def get_vocab(self) -> dict[str, int]:
            return {str(token): token for token in range(self.size)}

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> Words:
            return Words(json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["vocab_size"])

    Converter(folder).convert(target)


def with_ctranslate2(folder: str, batches: Sequence[int], prefill: int, count: int) -> Tasks:
    """CTranslate2's generator. It processes the prompt each time, so the time for one new token is subtracted."""
    import ctranslate2

    target = os.path.join(folder, "ctranslate2")
    apart(convert, folder, target)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        vocab_size = json.load(file)["vocab_size"]
    generator = ctranslate2.Generator(target, device="cpu", intra_threads=count, compute_type="float32")
    prompt, long = ([str(token) for token in random_prompt(vocab_size, n)] for n in (CONTEXT, prefill))

    def seconds(tokens: list[str], batch: int, new: int) -> float:
        started = time.perf_counter()
        generator.generate_batch(
            [tokens] * batch, min_length=new, max_length=new, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - started

    def decode(batch: int) -> float:
        return seconds(prompt, batch, 1 + NEW) - seconds(prompt, batch, 1)

    return ready(decode, lambda: seconds(long, 1, 1), batches, prefill)


def bfloat16_loss(checkpoint: str, data: str, batches: int) -> dict[str, float]:
    """The validation loss in nats per token, with weights in float32 and in bfloat16, over this many windows."""
    from gpt2 import GPT2
    from gpt2.formats.model_file import find_model
    from gpt2.training.dataset import TokenDataset, find_dataset
    from gpt2.training.evaluation import mean_loss

    tokens = TokenDataset.open(find_dataset(data), "val")
    model = GPT2.from_pretrained(find_model(Path(checkpoint), print))
    sizes = (1, model.config.n_positions, batches)
    wide = mean_loss(model, tokens, *sizes)
    rounded = mean_loss(model.to(precision="bfloat16_weights"), tokens, *sizes)
    return {"float32": wide, "bfloat16": rounded, "difference": rounded - wide}


def main(arguments: Sequence[str] | None = None) -> int:
    from gpt2.config import PRESETS, GPT2Config

    options = parser("decode.py", __doc__)
    add = options.add_argument
    add("--preset", default="gpt2", choices=tuple(PRESETS), help="sizes of the model [%(default)s]")
    add("--batch", type=positive, nargs="+", default=[1, 5], metavar="B", help="batch sizes [1 5]")
    add("--prompt", type=positive, default=512, metavar="T", help="tokens in the prompt [%(default)s]")
    add("--checkpoint", metavar="DIR", help="a trained model, to measure the effect of bfloat16 on its loss")
    add("--data", metavar="NAME", help="the data set for this: a name in data/, or a folder")
    add("--windows", type=positive, default=20, metavar="N", help="use its first N windows [%(default)s]")
    given = options.parse_args(arguments)
    config = GPT2Config.preset(given.preset)
    if max(given.prompt, CONTEXT + 1 + NEW) > config.n_positions:
        options.error(f"--prompt {given.prompt}: the model's context is {config.n_positions} tokens")
    if (given.checkpoint is None) != (given.data is None):
        options.error("--checkpoint and --data must be used together")
    loss = None
    if given.checkpoint is not None:
        loss = apart(bfloat16_loss, given.checkpoint, given.data, given.windows)
        print(
            f"validation loss: float32 {loss['float32']:.5f}, bfloat16 {loss['bfloat16']:.5f}, "
            f"difference {loss['difference']:+.5f} nats per token",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        apart(save_model, folder, given.preset)
        return report("decode", given, competitors(folder, given, config), preset=given.preset, loss=loss)


def competitors(folder: str, given: argparse.Namespace, config: Any) -> list[Contender]:
    """The installed programs, and the bytes that each reads per token: all weights except the position embedding."""
    read = (config.n_parameters - config.n_positions * config.n_embd) * NEW

    def works(itemsize: int) -> dict[str, Work]:
        found = {f"batch {batch}": Work(tokens=batch * NEW, read=itemsize * read) for batch in given.batch}
        flops = given.prompt * config.flops_per_token(given.prompt) / 3
        flops -= 2 * (given.prompt - 1) * config.vocab_size * config.n_embd  # only the logits of the last position
        return found | {f"prompt of {given.prompt}": Work(tokens=given.prompt, flops=flops)}

    arguments = (folder, given.batch, given.prompt, given.threads)
    found = [
        Contender("tinygrad2 float32", ours, (*arguments, "float32"), works(4)),
        Contender("tinygrad2 bfloat16", ours, (*arguments, "bfloat16"), works(2)),
    ]
    peers = {"transformers": (with_transformers, "torch"), "CTranslate2": (with_ctranslate2, "torch", "transformers")}
    for name, (make, *needed) in peers.items():
        if len(versions(name.lower(), *needed)) == 1 + len(needed):
            found.append(Contender(name, make, arguments, works(4), peer=True))
    return found


if __name__ == "__main__":
    raise SystemExit(command(main))
