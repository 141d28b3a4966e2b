"""Trains a Llama-style model and GPT-2 with the same Trainer on the same batches.

    python examples/llama.py

The Llama-style model differs from GPT-2 in four ways (Touvron et al., arXiv:2307.09288):

    RMSNorm                  replaces LayerNorm: no mean is subtracted, and there is no bias (arXiv:1910.07467)
    rotary embedding         queries and keys are rotated by angles proportional to their positions, so their dot
                             products depend on relative positions; there is no position embedding (arXiv:2104.09864)
    SwiGLU                   silu(x W) * (x V), followed by a third matrix, replaces GELU between two matrices
                             (arXiv:2002.05202)
    grouped-query attention  several query heads share one key-value head, which makes the key-value cache smaller
                             (arXiv:2305.13245)

The class Llama implements the interface in gpt2/language_model.py, so GPT-2's code for training, evaluation and
sampling works unchanged. Both models have 0.83 million parameters (Llama has 0.2% fewer), and are trained on the same
400 batches of the documentation included with Python, with the same learning rates. After a minute or two it prints:

    validation loss after 400 steps: Llama 1.87, GPT-2 2.47 nats per byte

and saves a plot of both losses as llama.png. `python train.py` trains the same GPT-2 with Muon to a loss of 1.52.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2 import GPT2, GPT2Config
from gpt2.generate import sample_text
from gpt2.language_model import Cache, LanguageModel
from gpt2.training.dataset import TokenDataset
from gpt2.training.options import resolve_options
from gpt2.training.run import Progress, RunFolder
from gpt2.training.setup import build_optimizer
from gpt2.training.trainer import Trainer
from tinygrad2 import Key, Tensor, functional, nn, ops
from tinygrad2.array import Array
from tinygrad2.backend import Backend
from tinygrad2.precision import FLOAT32

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model; the defaults have as many parameters as GPT-2 nano."""

    vocab_size: int = 257
    n_positions: int = 64
    n_embd: int = 128
    n_layer: int = 4
    n_head: int = 4  # query heads
    n_kv_head: int = 2  # key-value heads
    n_hidden: int = 392  # hidden size of SwiGLU

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def n_weights(self) -> int:
        """The number of elements in all matrices: the embedding and the layers."""
        C, F = self.n_embd, self.n_hidden
        layer = 2 * C * C + 2 * C * self.n_kv_head * self.head_size + 3 * C * F
        return self.vocab_size * C + self.n_layer * layer

    def summary(self) -> str:
        heads = f"{self.n_head} query heads, {self.n_kv_head} key-value heads"
        return f"{self.n_layer} layers, embedding size {self.n_embd}, {heads}"

    def flops_per_token(self, block_size: int) -> int:
        """6 per weight, plus attention; see GPT2Config.flops_per_token."""
        return 6 * self.n_weights + 6 * self.n_layer * self.n_embd * block_size


class Block(nn.Module):
    """One layer: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: LlamaConfig, seed: int):
        C, KD, F = config.n_embd, config.n_kv_head * config.head_size, config.n_hidden
        keys = (Key(seed, site=site) for site in range(7))

        def linear(n_in: int, n_out: int, std: float = 0.02) -> nn.Linear:
            return nn.Linear(n_in, n_out, bias=False, init=nn.normal_init(std, next(keys)))

        residual = 0.02 / math.sqrt(2 * config.n_layer)
        self.config = config
        self.norm_1, self.norm_2 = nn.RMSNorm(C), nn.RMSNorm(C)
        self.query, self.key, self.value = linear(C, C), linear(C, KD), linear(C, KD)
        self.output = linear(C, C, residual)
        self.gate, self.up, self.down = linear(C, F), linear(C, F), linear(F, C, residual)

    def __call__(self, x: Tensor, past: tuple[Any, int] | None) -> Tensor:
        x = x + self.attention(self.norm_1(x), past)
        h = self.norm_2(x)
        return x + self.down(self.gate(h).silu() * self.up(h))

    def attention(self, x: Tensor, past: tuple[Any, int] | None) -> Tensor:
        """Causal attention.

        past  the layer's key-value cache, (2, B, K, capacity, D), and the number of positions in use.
        """
        B, T, C = x.shape
        D, before = self.config.head_size, past[1] if past else 0
        q, k, v = (
            layer(x).reshape(B, T, -1, D).transpose(0, 2, 1, 3) for layer in (self.query, self.key, self.value)
        )  # (B, H, T, D); keys and values have K heads instead of H
        q, k = functional.rotary_embedding(q, before), functional.rotary_embedding(k, before)
        if past:  # generation: append the new keys and values to the cache
            cache = past[0][:, :, :, : before + T]
            cache[0, :, :, before:], cache[1, :, :, before:] = k.data, v.data
            k, v = Tensor(cache[0]), Tensor(cache[1])
        visible = np.tri(T, before + T, before, dtype=bool)  # position t attends to 0 ... before + t
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.output(y.transpose(0, 2, 1, 3).reshape(B, T, C))


class Llama(nn.Module):
    """A LanguageModel; the methods are documented in gpt2/language_model.py."""

    precision = FLOAT32

    def __init__(self, config: LlamaConfig, seed: int = 0):
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd, nn.normal_init(0.02, Key(seed, site=7)))
        self.blocks = [Block(config, seed + 1 + layer) for layer in range(config.n_layer)]
        self.norm = nn.RMSNorm(config.n_embd)

    @property
    def backend(self) -> Backend:
        return self.embedding.weight.backend

    def features(self, tokens: Any, key: Key | None = None, cache: Cache | None = None) -> Tensor:
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else (cache.layers[layer], cache.length))
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def head(self, features: Tensor) -> Tensor:
        return ops.logits(features, self.embedding.weight)  # tied to the embedding, as in GPT-2

    def loss(self, tokens: Any, targets: Any, key: Key | None = None) -> Tensor:
        return ops.lm_head(self.features(tokens), self.embedding.weight, targets)

    def backward(self, tokens: Any, targets: Any, key: Key | None = None, dloss: float = 1.0) -> Array:
        return ops.lm_head_gradients(self.features(tokens), self.embedding.weight, targets, dloss)

    def cache_shapes(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        c = self.config
        return [(2, batch, c.n_kv_head, capacity, c.head_size)] * c.n_layer

    def hidden_matrices(self) -> dict[str, int]:
        return {name: 1 for name, p in self.named_parameters() if p.ndim == 2 and name != "embedding.weight"}

    def save_pretrained(self, path: str | Path) -> None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder / "llama.safetensors")


def train(model: LanguageModel, data: Path, steps: int, scratch: Path) -> list[tuple[int, float, float]]:
    """Train with the project's Trainer. Returns (step, mean training loss since the last report, validation loss) for
    each report."""
    splits = TokenDataset.open(data, "train"), TokenDataset.open(data, "val")
    # The options of train.py for GPT-2 nano with --optimizer adamw (batches of 8 sequences, a cosine schedule), except
    # the numbers of steps and of evaluation batches.
    changes = {"optimizer": "adamw", "max_iters": steps, "warmup_iters": min(100, steps // 4), "eval_iters": 25}
    options = resolve_options(changes, GPT2Config.preset("nano"))
    folder = RunFolder(scratch)
    trainer = Trainer(
        model,
        build_optimizer(model, options, folder.comm),
        options,
        (*splits, splits[0].tokenizer()),
        folder,
        Progress(),
    )
    reports, losses = [], []
    for step in range(1, steps + 1):
        trainer.step()
        losses += [row["loss"] for row in trainer.finished_steps(wait=True)]
        if step % max(1, steps // 5) == 0 or step == steps:
            reports.append((step, float(np.mean(losses)), trainer.evaluate([])["val_loss"]))
            print("  step {:4}  loss {:.4f}  validation {:.4f}".format(*reports[-1]), flush=True)
            losses = []
    print(f"  a sample: {sample_text(model, trainer.tokenizer, seed=1)[:100]!r}")
    return reports


def draw(reports: dict[str, list[tuple[int, float, float]]], file: Path) -> None:
    """Save a plot of the validation losses of both models."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print('no plot: matplotlib is not installed; pip install -e ".[examples]"')
        return
    pyplot.switch_backend("Agg")  # renders to files and needs no display
    figure, axes = pyplot.subplots(figsize=(7, 5))
    for name, rows in reports.items():
        steps, _, losses = zip(*rows, strict=True)
        axes.plot(steps, losses, label=name, marker="o")
    axes.set(xlabel="step", ylabel="validation loss (nats per byte)", title="0.83 million parameters, same batches")
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    print(f"picture: {file}")


def main() -> None:
    parser = argparse.ArgumentParser("python examples/llama.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="steps per model [default: %(default)s]")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="a data set from data/prepare.py [default: pydoc]")
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path("llama.png"),
        metavar="FILE",
        help="picture to write [default: %(default)s]",
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; expected 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data or Path(scratch) / "pydoc"
        if options.data is None:
            prepare = [sys.executable, ROOT / "data/prepare.py", "pydoc", "--tokenizer", "bytes", "--out", data]
            print("preparing the documentation included with Python", flush=True)
            subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
        models: dict[str, LanguageModel] = {"Llama": Llama(LlamaConfig()), "GPT-2": GPT2(GPT2Config.preset("nano"))}
        reports = {}
        for name, model in models.items():
            print(f"{name}: {model.n_parameters():,} parameters, {model.config.summary()}")
            reports[name] = train(model, data, options.steps, Path(scratch) / "run")
    last = ", ".join(f"{name} {rows[-1][2]:.2f}" for name, rows in reports.items())
    print(f"validation loss after {options.steps} steps: {last} nats per byte")
    draw(reports, options.picture)


if __name__ == "__main__":
    main()
