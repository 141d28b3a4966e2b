"""The training step on the CPU, compared with PyTorch's: python tests/benchmarks/train_step.py [--small] [--json FILE]

A step is forward, backward, clipping and AdamW, without dropout. The contenders in float32 are this project (with
NumPy's BLAS library, and with MKL if it is installed) and PyTorch (eager, with the fused AdamW, and compiled). If the
processor has bfloat16 instructions, this project and PyTorch's autocast (with the fused AdamW, eager and compiled) also
run in bfloat16. All are interleaved. Each needs about 4 GB of memory at the default size, the 124M model and one
sequence of 1,024 tokens; --only selects some of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import Contender, Tasks, Work, command, parser, positive, report, timed, versions

ADAMW = {"lr": 6e-4, "betas": (0.9, 0.95)}
DECAY, MAX_NORM = 0.1, 1.0


def random_tokens(vocab_size: int, batch: int, block: int) -> tuple[Any, Any]:
    """Tokens and targets (B, T)."""
    import numpy as np

    rows = np.random.default_rng(0).integers(vocab_size, size=(batch, block + 1))
    return rows[:, :-1].copy(), rows[:, 1:].copy()


def our_step(model: Any, batch: int, block: int) -> Callable[[], float]:
    """A function that does a step as in train.py and returns the loss before the update."""
    from tinygrad2 import optim

    optimizer = optim.AdamW(model, weight_decay=DECAY, **ADAMW)
    tokens, targets = random_tokens(model.config.vocab_size, batch, block)

    def step() -> float:
        loss = model.backward(tokens, targets)
        optimizer.step(max_norm=MAX_NORM)
        optimizer.zero_grad()
        return float(loss)

    return step


def ours(config: dict[str, Any], batch: int, block: int, count: int, blas: str | None, dtype: str = "float32") -> Tasks:
    """This project's step. `blas` names a BLAS library to use instead of the one chosen by measuring."""
    if blas is not None:
        os.environ["TINYGRAD2_BLAS"] = blas
    from gpt2 import GPT2, GPT2Config
    from tinygrad2 import threads

    threads.set_count(count)
    return ready(our_step(GPT2(GPT2Config(**config), dtype=dtype), batch, block))


def ready(step: Callable[[], float]) -> Tasks:
    """The step as a task, after two warm-up steps that allocate memory."""
    step(), step()
    return {"step": timed(step)}


def torch_model(config: Any) -> Any:
    """GPT-2 from PyTorch's modules, with parameters in our order (weights of linear layers are transposed)."""
    import torch
    from torch import nn
    from torch.nn import functional

    C, H, eps = config.n_embd, config.n_head, config.layer_norm_epsilon

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.c_attn, self.c_proj = nn.LayerNorm(C, eps), nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.ln_2, self.c_fc, self.c_out = nn.LayerNorm(C, eps), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

        def forward(self, x: Any) -> Any:
            B, T, _ = x.shape
            q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(C, dim=2))
            heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.c_proj(heads.transpose(1, 2).reshape(B, T, C))
            return x + self.c_out(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.n_positions, C)
            self.h = nn.ModuleList(Block() for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(C, eps)
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=config.initializer_range)

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
            for block in self.h:
                x = block(x)
            logits = functional.linear(self.ln_f(x), self.wte.weight)
            return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Model()


def torch_step(
    model: Any, vocab_size: int, batch: int, block: int, fused: bool, compiled: bool = False, bfloat16: bool = False
) -> Callable[[], float]:
    """The same step in PyTorch; `bfloat16` enables autocast."""
    import torch

    decayed, rest = ([p for p in model.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}], fused=fused, **ADAMW
    )
    run = torch.compile(model) if compiled else model
    tokens, targets = map(torch.from_numpy, random_tokens(vocab_size, batch, block))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = run(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def theirs(
    config: dict[str, Any], batch: int, block: int, count: int, fused: bool, compiled: bool, bfloat16: bool
) -> Tasks:
    """PyTorch's step."""
    import torch

    torch.set_num_threads(count)
    model = torch_model(SimpleNamespace(**config))
    return ready(torch_step(model, config["vocab_size"], batch, block, fused, compiled, bfloat16))


def main(arguments: Sequence[str] | None = None) -> int:
    from gpt2.config import PRESETS, GPT2Config
    from tinygrad2 import blas
    from tinygrad2.backend import get_backend

    options = parser("train_step.py", __doc__)
    options.add_argument("--preset", default="gpt2", choices=tuple(PRESETS), help="sizes of the model [%(default)s]")
    options.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences [%(default)s]")
    options.add_argument("--block", type=positive, metavar="T", help="tokens per sequence [the model's context]")
    options.add_argument("--small", action="store_true", help="use 6 layers, C=384, V=512, B=12, T=128")
    options.add_argument("--only", nargs="+", metavar="NAME", help='only these programs, such as "tinygrad2 bfloat16"')
    options.add_argument("--no-compile", action="store_true", help="skip the programs that use torch.compile")
    given = options.parse_args(arguments)
    config, batch = GPT2Config.preset(given.preset), given.batch
    if given.small:
        config, batch = GPT2Config(vocab_size=512, n_positions=128, n_embd=384, n_layer=6, n_head=6), 12
    block = config.n_positions if given.small or given.block is None else given.block
    if block > config.n_positions:
        options.error(f"--block {block} is longer than the model's context of {config.n_positions} tokens")
    config = replace(config, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
    tokens = batch * block
    sizes = (asdict(config), batch, block, given.threads)
    works = {"step": Work(tokens=tokens, flops=tokens * config.flops_per_token(block))}
    contenders = [Contender("tinygrad2", ours, (*sizes, None), works)]
    narrow = get_backend("cpu").slow_reason("bfloat16") is None
    if narrow:
        contenders.append(Contender("tinygrad2 bfloat16", ours, (*sizes, None, "bfloat16"), works))
    if versions("mkl"):  # also measure the library that was not chosen
        other = "numpy" if blas.chosen().name == "mkl" else "mkl"
        contenders.append(Contender(f"tinygrad2, BLAS: {other}", ours, (*sizes, other), works))
    if versions("torch"):
        kinds = {
            "eager": (False, False, False),
            "fused AdamW": (True, False, False),
            "compiled, fused": (True, True, False),
            "bfloat16, fused": (True, False, True),
            "bfloat16, compiled, fused": (True, True, True),
        }
        contenders += [
            Contender(f"PyTorch {kind}", theirs, (*sizes, *how), works, peer=True)
            for kind, how in kinds.items()
            if not (how[1] and given.no_compile) and (narrow or not how[2])
        ]
    if given.only:
        contenders = [contender for contender in contenders if contender.name in given.only]
    name = "train_step-small" if given.small else "train_step"
    return report(name, given, contenders, config=asdict(config), batch_size=batch, block_size=block)


if __name__ == "__main__":
    raise SystemExit(command(main))
