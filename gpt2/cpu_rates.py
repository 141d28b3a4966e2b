"""Measures the rates of this machine's CPU for cost_model.py, by training a small model for a second or two.

The small model has the width, heads and sequence length of the planned model, so each kernel works on arrays of similar
shape. It has one layer, fewer rows and a smaller vocabulary. The profiler measures the kernels; the remaining time,
divided by the number of calls, is Python's time per call.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace

import numpy

from gpt2 import cost_model
from gpt2.config import GPT2Config
from gpt2.cost_model import Device, Rate
from gpt2.memory_model import Step
from gpt2.model import GPT2
from tinygrad2 import Key, machine, optim
from tinygrad2.precision import Precision
from tinygrad2.profiler import Profiler

SECONDS = 1.0  # minimum duration of the measurement
FEWEST_STEPS = 2
ROWS = 1024  # maximum, unless a single sequence is longer
VOCABULARY = 8192  # maximum
ETHERNET = 1.25e9  # default bytes/s between machines: 10 Gbit/s

# The family of each kernel; products and the head are handled separately below.
FAMILY_OF = {
    "attention_forward": "attention_forward",
    "attention_backward": "attention_backward",
    "layernorm_forward": "layernorm_forward",
    "add_layernorm_forward": "layernorm_forward",
    "layernorm_backward": "layernorm_backward",
    "add_layernorm_backward": "layernorm_backward",
    "gelu_forward": "gelu_forward",
    "gelu_backward": "gelu_backward",
    "embedding_forward": "embedding",
    "embedding_backward": "embedding",
    "dropout_forward": "dropout",
    "dropout_backward": "dropout",
    "squared_norm": "squared_norm",
    "adamw_step": "update",
}


def measure(step: Step) -> Device:
    """This CPU, with the rates that kernels reach on arrays with the shapes of this step."""
    config = replace(step.config, n_layer=1, vocab_size=min(step.config.vocab_size, VOCABULARY))
    T = step.block_size
    B = max(1, min(step.batch_size, ROWS // T))
    spent, zero_grad = _profiled(config, B, T, step.precision)
    outside, names = spent.pop(""), cost_model.micro_step(config, B, T, step.precision, cuda=False)
    names += cost_model.update(config, step.precision)
    work = {kernel.name: (kernel.calls * kernel.cost.flops, kernel.calls * kernel.cost.nbytes) for kernel in names}
    rates = _rates(work, spent)
    P = config.n_parameters
    rates["zero_grad"] = rates["copies"] = Rate(math.inf, 4 * P / zero_grad)
    added = work["sum of two gradients"][1] / rates["sum"].nbytes
    copied = work.get("refresh_copies", (0, 0))[1] / rates["copies"].nbytes
    calls = sum(kernel.calls for kernel in names)
    host = max(0.0, outside - sum(spent.values()) - zero_grad - added - copied) / calls
    memory = machine.memory()
    name = f"this CPU ({machine.processor()})"
    return Device(name, memory[0] if memory else None, rates, 0.0, host, ETHERNET, asynchronous=False)


def _profiled(config: GPT2Config, B: int, T: int, precision: Precision) -> tuple[dict[str, float], float]:
    """Seconds per step for each kernel ("" is the total), and seconds for clearing the gradients. Both are medians over
    several steps."""
    model = GPT2(config, dtype=precision)
    optimizer = optim.AdamW(model)
    tokens, targets = numpy.random.default_rng(0).integers(config.vocab_size, size=(2, B, T))
    steps: list[dict[str, float]] = []
    clearing: list[float] = []
    started = time.perf_counter()
    while len(steps) < 1 + FEWEST_STEPS or time.perf_counter() - started < SECONDS:
        profiler = Profiler(model.backend)
        with profiler:
            model.backward(tokens, targets, Key(0, len(steps)))
            optimizer.step(max_norm=1.0)
            begun = time.perf_counter()
            optimizer.zero_grad()
            clearing.append(time.perf_counter() - begun)
        steps.append({name: seconds for name, (_, seconds) in profiler.totals().items()})
        if len(steps) == 1:
            started = time.perf_counter()  # the first step also compiles and allocates
    del steps[0], clearing[0]
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}, statistics.median(clearing)


def _rates(work: dict[str, tuple[float, float]], spent: dict[str, float]) -> dict[str, Rate]:
    """The rates of all families, from the FLOPs and bytes (`work`) and the seconds (`spent`) of each kernel."""
    linear = spent["linear_forward"] + spent["linear_backward"]
    products = _flops(work, *(f"{name} {way}" for name in cost_model.LINEAR for way in ("forward", "dgrad", "wgrad")))
    head = _flops(work, "head dgrad", "head wgrad") / spent["lm_head_backward"]
    # The output layer's forward pass consists of a product and the cross-entropy.
    softmax = max(spent["lm_head_forward"] - work["head forward"][0] / head, 0.1 * spent["lm_head_forward"])
    rates = dict.fromkeys(("product", "small product"), Rate(products / linear, math.inf))
    rates |= {"head product": Rate(head, math.inf), "cross_entropy": Rate(math.inf, work["cross_entropy"][1] / softmax)}
    rates["column_sums"] = Rate(math.inf, math.inf)  # included in the products
    for family in dict.fromkeys(FAMILY_OF.values()):
        kernels = [name for name in FAMILY_OF if FAMILY_OF[name] == family and name in spent]
        if kernels:
            seconds = sum(spent[name] for name in kernels)
            flops, nbytes = (sum(work[name][i] for name in kernels) for i in (0, 1))
            rates[family] = Rate(flops / seconds, math.inf) if flops else Rate(math.inf, nbytes / seconds)
    rates.setdefault("dropout", rates["gelu_forward"])  # not measured: the model has no dropout
    rates["sum"] = rates["layernorm_forward"]
    rates["reference_attention"] = rates["layernorm_forward"]
    return rates


def _flops(work: dict[str, tuple[float, float]], *names: str) -> float:
    return sum(work[name][0] for name in names)
