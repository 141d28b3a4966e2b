"""Is the whole model right? `python -m gpt2.verify --gradients` checks every parameter's gradient of a small GPT-2."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy

from gpt2.config import GPT2Config
from gpt2.model import GPT2
from tinygrad2 import Key, Tensor, record
from tinygrad2.backend import DEVICES, get_backend
from tinygrad2.gradcheck import check

BOUND = 1e-6
SCALE = 0.2  # of check's step: this model bends more sharply than the step that check takes for values around 1 allows
FORMS = {"gelu_new": "tanh form", "gelu": "exact form"}
BATCH, LENGTH = 3, 9  # shorter than the context: the last positions take no part and get no gradient


def small_model(activation: str, seed: int = 0, device: str = "cpu") -> GPT2:
    """A float64 GPT-2 with dropout whose every part matters: random gains and biases, matrices that keep activations
    at their size, and queries and keys so large that the scores have a standard deviation of about 5 and attention is
    far from uniform (with weights as at the start of training, hardly any gradient would reach it).
    """
    config = GPT2Config(
        vocab_size=31,
        n_positions=12,
        n_embd=12,
        n_layer=2,
        n_head=3,
        activation_function=activation,
        embd_pdrop=0.1,
        attn_pdrop=0.2,
        resid_pdrop=0.1,
    )
    model = GPT2(config, device=device, dtype="float64")
    random = numpy.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = random.standard_normal(parameter.shape)
        if parameter.ndim == 1:
            parameter.data = 0.2 * values + (1 if ".weight" in name else 0)
        elif name in ("wte.weight", "wpe.weight"):
            parameter.data = values * 2 / math.sqrt(config.n_embd)
        else:
            parameter.data = values * (2.2 if "c_attn" in name else 1) / math.sqrt(parameter.shape[0])
    return model


def gradient_errors(model: GPT2, seed: int = 0) -> dict[str, float]:
    """The relative error of each parameter's gradient of model.loss, with dropout, against finite differences.

    The queries', keys' and values' bias is one parameter: the gradient of its middle third is zero (what is added to
    every key shifts a row of scores as a whole), so that no relative error of that third alone would mean anything.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    text = numpy.random.default_rng(seed).integers(model.config.vocab_size, size=(BATCH, LENGTH + 1))
    key = Key(seed, step=1, first_sample=BATCH)

    def loss(*values: Tensor) -> Any:
        """model.loss at parameters SCALE * values; the gradients are those that its own backward pass leaves there."""
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = SCALE * value.data
        model.zero_grad()
        result = model.loss(text[:, :-1], text[:, 1:], key)
        if result.requires_grad:
            result.backward()
        return record(result.data, values, _scaled, saved=tuple(parameter.grad for parameter in parameters))

    errors = check(loss, [p.numpy() / SCALE for p in parameters], seed=seed, device=model.backend.device)
    return dict(zip(names, errors, strict=True))


def _scaled(saved, dy, into):
    return tuple(None if gradient is None else dy * SCALE * gradient for gradient in saved)


def verify_gradients(seed: int = 0, device: str = "cpu") -> bool:
    """Check both forms of GELU and print a row for each parameter; whether all are within BOUND."""
    failed = 0
    print("gradients of a small GPT-2 with dropout, float64, against finite differences")
    for activation, form in FORMS.items():
        model = small_model(activation, seed, device)
        shapes = {name: str(parameter.shape) for name, parameter in model.named_parameters()}
        print(f"\n{f'{activation} ({form})':24}{'shape':>12}{'error':>11}{'bound':>9}")
        for name, error in gradient_errors(model, seed).items():
            verdict = "ok" if error <= BOUND else "FAILED"
            failed += verdict == "FAILED"
            print(f"{name:24}{shapes[name]:>12}{error:11.1e}{BOUND:9.0e}  {verdict}")
    print(f"\n{failed} gradients are wrong" if failed else "\nevery gradient is right")
    return not failed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. The exit status: 0 where everything asked for holds, 1 where not, 2 where nothing can be."""
    parser = argparse.ArgumentParser(prog="python -m gpt2.verify", description="Check that the model is right.")
    parser.add_argument("--gradients", action="store_true", help="every gradient of a small GPT-2, in float64")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights, the tokens and the directions (default: 0)"
    )
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to compute (default: cpu)")
    options = parser.parse_args(arguments)
    if not options.gradients:
        parser.print_help(sys.stderr)
        return 2
    try:
        get_backend(options.device)
    except ValueError as error:
        print(f"gpt2.verify: {error}", file=sys.stderr)
        return 2
    return 0 if verify_gradients(options.seed, options.device) else 1


if __name__ == "__main__":
    raise SystemExit(main())
