"""Compare the model with PyTorch's: activations, loss and gradients of one training step, and greedily generated text.

The results are named arrays, in the order of computation:

    tokens             (B, T + 1) ids: the first T are the inputs, the last T the targets
    activation.NAME    the residual stream (B, T, C): after the embedding (`embedding`), after attention and after the
                       MLP of each layer (`h.0.attn`, `h.0.mlp`), and after the last LayerNorm (`ln_f`)
    logits             (B, T, V)
    loss               the mean cross-entropy
    gradient.NAME      the gradient of each parameter, in the order in which the backward pass completes them
    text               the ids of the greedy continuation of half a row of tokens
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2.config import GPT2Config
from gpt2.console import first_line
from gpt2.model import GPT2
from tinygrad2 import no_grad, ops
from tinygrad2.machine import install_command

if TYPE_CHECKING:
    import torch
    import transformers

BATCH, LENGTH, NEW = 2, 64, 24  # sequences, tokens per sequence, new tokens; fewer if the context is shorter

# The largest error that rounding can explain, by dtype. For activations, logits and the loss, the error is relative to
# the largest value. For gradients it is |a - b| / |b| with norms over the entire tensor, since an elementwise error
# would be meaningless where the true gradient is zero. (Adding a constant to every key shifts all scores of a row
# equally, so the gradient of the key bias is rounding noise.)
BOUNDS = {
    "float32": {"activation": 2e-5, "logits": 2e-5, "loss": 1e-5, "gradient": 1e-4},
    "float64": {"activation": 1e-12, "logits": 1e-12, "loss": 1e-12, "gradient": 1e-11},
}


@dataclass(frozen=True)
class Row:
    """The error of one result.

    largest   the largest absolute error.
    relative  the relative error, which must not exceed `bound` (see BOUNDS).
    """

    name: str
    largest: float
    relative: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.relative <= self.bound  # NaN compares false, so it is never ok


def random_model(config: GPT2Config, seed: int, device: str = "cpu", dtype: str = "float32") -> GPT2:
    """A model in which every parameter affects the results. It has random gains and biases, matrices that preserve the
    size of the activations, and queries and keys that are large enough to make attention far from uniform.

    The weights are scaled uniform random numbers, because normal random numbers require a logarithm, whose last bit may
    differ between machines.
    """
    model = GPT2(config, seed=None, device=device, dtype=dtype)
    random = np.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = (2 * random.random(parameter.shape) - 1) * math.sqrt(3)  # with variance 1
        if parameter.ndim == 1:
            scale, shift = 0.2, 1.0 if ".weight" in name else 0.0
        elif name in ("wte.weight", "wpe.weight"):
            scale, shift = 2 / math.sqrt(config.n_embd), 0.0
        else:
            scale, shift = (2.2 if "c_attn" in name else 1.0) / math.sqrt(parameter.shape[0]), 0.0
        parameter.data = model.backend.asarray(scale * values + shift, dtype=model.precision.parameters)
    return model


def random_tokens(config: GPT2Config, seed: int) -> np.ndarray:
    """Ids (B, T + 1)."""
    shape = (BATCH, min(LENGTH, config.n_positions) + 1)
    return np.random.default_rng(seed).integers(config.vocab_size, size=shape)


def _prompt(tokens: np.ndarray, n_positions: int) -> tuple[np.ndarray, int]:
    """The ids of the prompt, and the number of tokens to generate. The last generated token is never an input."""
    prompt = tokens[0, : max(1, (tokens.shape[1] - 1) // 2)]
    return prompt, min(NEW, n_positions - len(prompt) + 1)


def fingerprint(model: GPT2) -> str:
    """The SHA-256 hash of the parameters' bytes, in hexadecimal."""
    sha = hashlib.sha256()
    for parameter in model.parameters():
        sha.update(np.ascontiguousarray(parameter.numpy()).data)
    return sha.hexdigest()


def engine_activations(model: GPT2, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The activations of this engine's model. The blocks are called in order, as in `features`."""
    with no_grad():
        x = ops.embedding(tokens, model.wte.weight, model.wpe.weight)
        found, delta = {"embedding": x.numpy()}, None
        for layer, block in enumerate(model.h):
            x, delta = block(x, delta, None, 0, None)
            found[f"h.{layer}.attn"] = x.numpy()
            found[f"h.{layer}.mlp"] = (x + delta).numpy()
        return {**found, "ln_f": model.features(tokens).numpy()}


def compare(model: GPT2, expected: Callable[[str], np.ndarray]) -> tuple[list[Row], bool]:
    """Compare the model's results with the expected results, in the order of computation. Returns a row for each result
    except the text, and whether the text is the same.

    expected  a function that returns the result of `torch_results` with a given name, for the same weights.
    Raises ValueError if a shape differs from the model's.
    """
    bounds = BOUNDS[model.precision.parameters]
    rows = []

    def add(name: str, ours: np.ndarray) -> None:
        theirs = expected(name)
        if theirs.shape != ours.shape:
            raise ValueError(f"the reference's {name} has shape {theirs.shape}; this model's has {ours.shape}")
        kind = name.split(".")[0]
        norm = np.linalg.norm if kind == "gradient" else _largest
        theirs = theirs.astype(np.float64).reshape(-1)
        error = ours.reshape(-1) - theirs
        rows.append(Row(name, _largest(error), float(norm(error) / (norm(theirs) or 1)), bounds[kind]))

    tokens = expected("tokens")
    read, predicted = tokens[:, :-1], tokens[:, 1:]
    for name, values in engine_activations(model, read).items():
        add(f"activation.{name}", values)
    with no_grad():
        add("logits", model(read).numpy())
    model.zero_grad()
    loss = model.loss(read, predicted)
    loss.backward()
    add("loss", loss.numpy())
    for name, parameter in reversed(list(model.named_parameters())):
        add(f"gradient.{name}", model.backend.to_host(parameter.grad))
    prompt, new = _prompt(tokens, model.config.n_positions)
    return rows, model.generate(prompt.tolist(), new, temperature=0) == [expected("text").tolist()]


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def torch_model(source: str | Path) -> transformers.GPT2LMHeadModel:
    """Load the transformers model in a folder or with a name. Raises ValueError if it cannot be loaded."""
    try:
        import torch  # noqa: F401  (transformers can be imported without it)
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{error.name} is not installed; use {install_command('parity')}, or --against FILE with a file that "
            f"--record FILE wrote on a machine where it is installed"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.GPT2LMHeadModel.from_pretrained(str(source), attn_implementation="eager").eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"transformers cannot load {source}: {first_line(error)}") from None


def torch_versions() -> str:
    """The names and versions of the reference libraries."""
    import torch
    import transformers

    return f"transformers {transformers.__version__} on torch {torch.__version__}"


def torch_results(model: transformers.GPT2LMHeadModel, tokens: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """The reference results: those of a transformers model in `dtype`, on the CPU."""
    import torch

    model = model.to(getattr(torch, dtype))
    found: dict[str, np.ndarray] = {"tokens": tokens}

    def keep(name: str, tensor: torch.Tensor) -> None:
        found[f"activation.{name}"] = tensor.detach().numpy().copy()

    def keep_input(layernorm: torch.nn.Module, name: str) -> torch.utils.hooks.RemovableHandle:
        return layernorm.register_forward_pre_hook(lambda _, inputs: keep(name, inputs[0]))

    body = model.transformer  # the residual stream is the input of its LayerNorms
    before = ["embedding", *(f"h.{layer}.mlp" for layer in range(len(body.h)))]
    hooks = [keep_input(block.ln_1, name) for block, name in zip(body.h, before[:-1], strict=True)]
    hooks += [keep_input(block.ln_2, f"h.{layer}.attn") for layer, block in enumerate(body.h)]
    hooks += [keep_input(body.ln_f, before[-1])]
    hooks += [body.ln_f.register_forward_hook(lambda _, inputs, output: keep("ln_f", output))]
    ids = torch.from_numpy(tokens)
    logits = model(ids[:, :-1], use_cache=False).logits
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    found["logits"], found["loss"] = logits.detach().numpy(), loss.detach().numpy()
    for name, parameter in model.named_parameters():
        found[f"gradient.{name.removeprefix('transformer.')}"] = parameter.grad.numpy()

    prompt, new = _prompt(tokens, model.config.n_positions)
    unread, past, text = torch.from_numpy(prompt)[None], None, []
    with torch.no_grad():
        for _ in range(new):
            output = model(unread, past_key_values=past, use_cache=True)
            past, unread = output.past_key_values, output.logits[:, -1:].argmax(-1)
            text.append(unread.item())
    return {**found, "text": np.array(text)}
