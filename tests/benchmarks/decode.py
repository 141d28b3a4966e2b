"""Text generation on the CPU, compared with other programs: python tests/benchmarks/decode.py [--json FILE]

Measures the tokens per second of the 124M model with a key-value cache: for batches of one and of several texts after
a context of 16 tokens, and for one text after a context of 900 tokens. Also measures the processing of a prompt of 512
tokens. The programs run interleaved: this project with weights in float32 and bfloat16, and, if installed, transformers
in float32 and bfloat16 and CTranslate2 in float32 and int8. All use the same random weights.

Each token reads all weights except the position embedding, and the keys and values of the context. The rate of these
bytes is compared with the rate of reading memory.

With --checkpoint and --data, it first prints the effect of bfloat16 weights on the validation loss.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import (
    Contender,
    Tasks,
    Work,
    command,
    in_subprocess,
    parser,
    positive,
    report,
    timed,
    versions,
)

CONTEXT, NEW = 16, 32  # number of tokens before the measurement starts, and of measured tokens

Case = tuple[int, int]  # number of texts in the batch, and of tokens before the measurement starts
Cases = dict[str, Case]  # task name -> case


def random_prompt(vocab_size: int, length: int) -> list[int]:
    import numpy as np

    return np.random.default_rng(0).integers(vocab_size - 1, size=length).tolist()  # without end-of-text


def cases_of(given: argparse.Namespace) -> Cases:
    """The tasks that generate text."""
    found = {f"batch {batch}": (batch, CONTEXT) for batch in given.batch}
    return found | {f"batch 1, context of {given.context}": (1, given.context)}


def save_model(folder: str, preset: str) -> None:
    """Save a model with random weights in the Hugging Face layout."""
    from gpt2 import GPT2, GPT2Config

    GPT2(GPT2Config.preset(preset)).save_pretrained(folder)


def ours(folder: str, cases: Cases, prefill: int, count: int, dtype: str) -> Tasks:
    from gpt2 import GPT2
    from gpt2.generate import KVCache, generate, next_logits
    from tinygrad2 import no_grad, threads

    threads.set_count(count)
    model = GPT2.from_pretrained(folder, dtype=dtype)
    vocab_size = model.config.vocab_size
    long = random_prompt(vocab_size, prefill)

    def decode(batch: int, context: int) -> float:
        tokens = generate(model, random_prompt(vocab_size, context), 1 + NEW, samples=batch, temperature=0)
        next(tokens)  # processes the prompt
        return timed(lambda: list(tokens))()

    def read() -> None:
        import numpy as np

        with no_grad():
            next_logits(model, np.array([long]), KVCache(model, 1, prefill))

    return ready(decode, read, cases, prefill)


def ready(decode: Callable[[int, int], float], read: Callable, cases: Cases, prefill: int) -> Tasks:
    """The tasks by name, after one warm-up run of each."""
    tasks: Tasks = {name: partial(decode, *case) for name, case in cases.items()}
    tasks[f"prompt of {prefill}"] = timed(read)
    for task in tasks.values():
        task()
    return tasks


def with_transformers(folder: str, cases: Cases, prefill: int, count: int, dtype: str) -> Tasks:
    """transformers' model in a loop, without the overhead of its generate()."""
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(count)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    long = torch.tensor([random_prompt(model.config.vocab_size, prefill)])

    @torch.inference_mode()
    def decode(batch: int, context: int) -> float:
        prompt = torch.tensor([random_prompt(model.config.vocab_size, context)])
        out = model(prompt.repeat(batch, 1), use_cache=True, logits_to_keep=1)
        started = time.perf_counter()
        for _ in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - started

    @torch.inference_mode()
    def read() -> None:
        model(long, use_cache=True, logits_to_keep=1)

    return ready(decode, read, cases, prefill)


def convert(folder: str, target: str) -> None:
    """Convert the model in `folder` to CTranslate2. The model has no tokenizer, so token 5 becomes the word "5"."""
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


def with_ctranslate2(folder: str, cases: Cases, prefill: int, count: int, dtype: str) -> Tasks:
    """CTranslate2's generator. Each call processes the prompt; its time, with one new token, is subtracted."""
    import ctranslate2

    target = os.path.join(folder, "ctranslate2")
    if not os.path.exists(target):
        in_subprocess(convert, folder, target)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        vocab_size = json.load(file)["vocab_size"]
    generator = ctranslate2.Generator(target, device="cpu", intra_threads=count, compute_type=dtype)

    def words(n: int) -> list[str]:
        return [str(token) for token in random_prompt(vocab_size, n)]

    def seconds(tokens: list[str], batch: int, new: int) -> float:
        started = time.perf_counter()
        generator.generate_batch(
            [tokens] * batch, min_length=new, max_length=new, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - started

    def decode(batch: int, context: int) -> float:
        return seconds(words(context), batch, 1 + NEW) - seconds(words(context), batch, 1)

    return ready(decode, lambda: seconds(words(prefill), 1, 1), cases, prefill)


def bfloat16_loss(checkpoint: str, data: str, batches: int) -> dict[str, float]:
    """The validation loss in nats per token over `batches` windows, with weights in float32 and in bfloat16."""
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
    add("--context", type=positive, default=900, metavar="T", help="tokens of the longer context [%(default)s]")
    add("--prompt", type=positive, default=512, metavar="T", help="tokens in the prompt [%(default)s]")
    add("--checkpoint", metavar="DIR", help="a trained model, to measure the effect of bfloat16 on its loss")
    add("--data", metavar="NAME", help="the data set for --checkpoint: a name in data/, or a folder")
    add("--windows", type=positive, default=20, metavar="N", help="use the first N windows of --data [%(default)s]")
    given = options.parse_args(arguments)
    config = GPT2Config.preset(given.preset)
    for option, needed in (("prompt", max(given.prompt, CONTEXT + 1 + NEW)), ("context", given.context + 1 + NEW)):
        if needed > config.n_positions:
            options.error(
                f"--{option} {getattr(given, option)} needs {needed} positions; the model has {config.n_positions}"
            )
    if (given.checkpoint is None) != (given.data is None):
        options.error("--checkpoint and --data must be used together")
    loss = None
    if given.checkpoint is not None:
        loss = in_subprocess(bfloat16_loss, given.checkpoint, given.data, given.windows)
        print(
            f"validation loss: float32 {loss['float32']:.5f}, bfloat16 {loss['bfloat16']:.5f}, "
            f"difference {loss['difference']:+.5f} nats per token",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        in_subprocess(save_model, folder, given.preset)
        return report("decode", given, competitors(folder, given, config), preset=given.preset, loss=loss)


def competitors(folder: str, given: argparse.Namespace, config: Any) -> list[Contender]:
    """The installed programs, and the bytes that each reads per token."""
    cases = cases_of(given)
    weights = config.n_parameters - config.n_positions * config.n_embd

    def works(weight_bytes: int, cache_bytes: int = 4) -> dict[str, Work]:
        found = {}
        for name, (batch, context) in cases.items():
            cached = 2 * config.n_layer * config.n_embd * (context + NEW // 2)  # keys and values per text (mean)
            read = NEW * (weight_bytes * weights + cache_bytes * batch * cached)
            found[name] = Work(tokens=batch * NEW, read=read)
        flops = given.prompt * config.flops_per_token(given.prompt) / 3
        flops -= 2 * (given.prompt - 1) * config.vocab_size * config.n_embd  # only the last position needs logits
        return found | {f"prompt of {given.prompt}": Work(tokens=given.prompt, flops=flops)}

    arguments = (folder, cases, given.prompt, given.threads)
    found = [
        Contender("tinygrad2 float32", ours, (*arguments, "float32"), works(4)),
        Contender("tinygrad2 bfloat16", ours, (*arguments, "bfloat16"), works(2)),
    ]
    peers = (  # name, additional packages that it needs, function, and work for each dtype
        ("CTranslate2", ("torch", "transformers"), with_ctranslate2, {"float32": works(4), "int8": works(1)}),
        ("transformers", ("torch",), with_transformers, {"float32": works(4), "bfloat16": works(2, 2)}),
    )
    for name, needed, make, work in peers:
        if len(versions(name.lower(), *needed)) == 1 + len(needed):
            found += [Contender(f"{name} {t}", make, (*arguments, t), work[t], peer=True) for t in work]
    return found


if __name__ == "__main__":
    raise SystemExit(command(main))
