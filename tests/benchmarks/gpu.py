"""Check and time the GPU code with one command: python tests/benchmarks/gpu.py [--quick] [--only PART ...]

Compiles the kernels, then runs these parts in this order: the matrix products of a training step; attention, compared
with PyTorch's; `pytest -m gpu`; the training step of the 124M model, compared with PyTorch's, if it is installed; each
kernel of a step; generation; launches; the step in other precisions; a large product; copies. Each time is printed with
the time that gpt2/cost_model.py predicts, and with the lower bound for its bytes and FLOPs on this GPU. Prints a table
at the end and writes a JSON file.

GPU time is expensive, and after a fault in a kernel its process can no longer use the GPU. So each part runs in its own
process with its own time limit, and its results are printed and written at once. A part that fails is recorded with its
error, or with its time limit. Everything ends within --seconds: 570 by default, 180 with --only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # if the repository is not installed

from gpt2 import GPT2, GPT2Config, cost_model  # noqa: E402
from gpt2.decode import set_decode  # noqa: E402
from gpt2.generate import KVCache, generate, next_logits  # noqa: E402
from tests.benchmarks.train_step import torch_model  # noqa: E402
from tinygrad2 import Key, gpus, no_grad, optim  # noqa: E402
from tinygrad2.backend import get_backend  # noqa: E402
from tinygrad2.precision import Precision  # noqa: E402

RESULTS = Path(__file__).parent / "results"

# The fractions of the two peaks that the best kernels reach; the floors use them: 790 TFLOP/s and 4.3 TB/s on an H200.
REACHED_FLOPS, REACHED_BYTES = 0.8, 0.9
EXCHANGE = 5e-6  # predicted seconds per layer for the exchange of results between the blocks of decode.cu

# Positions of the arguments that a kernel changes in place, so that they are both read and written.
CHANGED = {
    "linear_backward": (3, 4),
    "layernorm_backward": (5, 6),
    "add_layernorm_backward": (6, 7),
    "gelu_backward": (3,),
    "lm_head_backward": (4,),
    "adamw_step": (0, 2, 3),
}
KERNEL = r"_(forward|backward|step)$|^squared_norm$"

# Kernels of the cost model that these calls launch. Any other call launches the kernel with its own name.
LAUNCHES = {
    "linear_forward": tuple(f"{layer} forward" for layer in cost_model.LINEAR),
    "linear_backward": tuple(f"{layer} {kind}" for layer in cost_model.LINEAR for kind in ("dgrad", "wgrad", "dbias")),
    "lm_head_forward": ("head forward", "cross_entropy"),
    "lm_head_backward": ("head dgrad", "head wgrad"),
}

# The parts in their order, each with its time limit in seconds, including the start of the process. The sum is at most
# SECONDS.
LIMITS = {
    "compile": 80, "gemm": 35, "attention": 45, "checks": 150, "step": 125, "kernels": 35, "decode": 40, "launch": 10,
    "wide_step": 30, "product": 10, "copy": 10,
}  # fmt: skip
SECONDS, ONLY_SECONDS = 570, 180
DECODE = ("ordinary", "fused")  # the less tested kind comes last
GPU_LOST = 2  # pytest's exit status after a test lost the GPU (tests/gpt2/test_gpu.py)
COMPILING = 60  # seconds that PyTorch may need before its first step
Found = dict[str, dict[str, Any]]  # {"results": {part: figures}, "errors": {part: message}}


TESTED = replace(GPT2Config.preset("nano"), embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measured problems, and the numbers of repetitions."""

    model: GPT2Config
    block_size: int = 1024
    precisions: tuple[str, ...] = ("bfloat16", "float32", "tf32")  # the first one is measured in detail
    batch_sizes: tuple[int, ...] = (64, 32, 16, 8)  # in the first precision; all are measured
    wide_batch_sizes: tuple[int, ...] = (16, 8, 4, 2, 1)  # in the other precisions; the first that fits is measured
    steps: int = 5  # steps per measurement
    rounds: int = 4  # interleaved measurements of each kind
    launches: int = 2000
    copy_bytes: int = 256 << 20
    matrix: int = 8192
    repeats: int = 10
    new_tokens: int = 256
    tested: tuple[GPT2Config, ...] = (TESTED,)  # models in the tests; their kernels are compiled in advance
    compiled: bool = True  # whether PyTorch's model is compiled in bfloat16


NO_DROPOUT = replace(GPT2Config.preset("gpt2"), embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
FULL = Sizes(NO_DROPOUT)
QUICK = Sizes(
    NO_DROPOUT, batch_sizes=(16,), wide_batch_sizes=(4, 2, 1), steps=3, rounds=2, launches=500, matrix=4096, repeats=5,
    new_tokens=64,
)  # fmt: skip


class Bench:
    """The measurements on one device; each method named in LIMITS returns its figures, independently of the others.

    seconds  after this time, nothing that takes long is started.
    keep     called with all figures so far whenever there are new ones.
    """

    def __init__(
        self,
        sizes: Sizes,
        torch_device: str = "cuda",
        seconds: float = SECONDS,
        keep: Callable[[Found], None] = lambda found: None,
    ):
        self.sizes = sizes
        self.torch_device = torch_device
        self.end, self.keep = time.monotonic() + seconds, keep
        self.backend = get_backend("cuda")
        self.np = self.backend.np
        self.bandwidth = gpus.bandwidth(self.backend.name())
        self.card = self.card_in(sizes.precisions[0])
        self.dtype = numpy.dtype(Precision.of(sizes.precisions[0]).activations)
        self.results: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        sequences = max(*sizes.batch_sizes, *sizes.wide_batch_sizes)
        rows = numpy.random.default_rng(0).integers(sizes.model.vocab_size, size=(sequences, sizes.block_size + 1))
        self.tokens, self.targets = rows[:, :-1], rows[:, 1:]

    def run(self, part: str) -> Found:
        """The figures and the errors of one part."""
        try:
            self.results[part] = getattr(self, part)()
            self.release()
        except Exception as error:  # (includes MemoryError and CuPy's errors)
            self.errors[part] = print_error(error)
        return self.found()

    def found(self) -> Found:
        return {"results": self.results, "errors": self.errors}

    def release(self) -> None:
        """Return free memory to the driver, so that PyTorch or the next part can use it."""
        self.np.get_default_memory_pool().free_all_blocks()

    def timed(self, function: Callable[[], Any], repeats: int, warmup: int = 2) -> tuple[float, float]:
        """Seconds per call, measured in two ways: the wall-clock time from the first launch to the last result, and the
        time between two CUDA events."""
        for _ in range(warmup):
            function()
        begin, end = self.np.cuda.Event(), self.np.cuda.Event()
        self.np.cuda.get_current_stream().synchronize()
        started = time.perf_counter()
        begin.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        seconds = time.perf_counter() - started
        return seconds / repeats, self.np.cuda.get_elapsed_time(begin, end) / 1e3 / repeats

    def floor(self, nbytes: float, flops: float) -> float | None:
        """The lower bound in seconds for moving `nbytes` of device memory and computing `flops`, or None if the GPU's
        peaks are unknown."""
        peak = self.backend.cuda.peak(self.sizes.precisions[0])
        if peak is None or self.bandwidth is None:
            return None
        return max(flops / (REACHED_FLOPS * peak * 1e12), nbytes / (REACHED_BYTES * self.bandwidth * 1e9))

    def card_in(self, precision: str) -> cost_model.Device | None:
        """The cost model's rates for this GPU in a precision, or None if they are unknown."""
        name = gpus.find_gpu(self.backend.name(), cost_model.CARDS)
        return None if name is None or self.backend.cuda.peak(precision) is None else cost_model.gpu(name, precision)

    def predicted_step(self, precision: str, batch_size: int) -> dict[str, float] | None:
        """See the function predicted_step; None if the cost model does not know the GPU."""
        card = self.card_in(precision)
        return None if card is None else predicted_step(card, self.sizes, precision, batch_size)

    def predicted(self, cost: cost_model.Cost) -> float | None:
        """The predicted milliseconds of a kernel, or None if the cost model does not know the GPU."""
        return None if self.card is None else self.card.milliseconds(cost)

    def against_floor(
        self, seconds: float, nbytes: float, flops: float, predicted_ms: float | None = None
    ) -> dict[str, float | None]:
        """Measured and predicted milliseconds, TFLOP/s, GB/s, the floor, and the floor as a fraction of the time."""
        floor = self.floor(nbytes, flops)
        return {
            "ms": seconds * 1e3,
            "predicted_ms": predicted_ms,
            "tflop_per_s": flops / seconds / 1e12,
            "gb_per_s": nbytes / seconds / 1e9,
            "floor_ms": None if floor is None else floor * 1e3,
            "share": None if floor is None else floor / seconds,
        }

    def array(self, *shape: int) -> Any:
        """Random numbers on the device: one block, repeated. (Zeros would use less power and therefore be faster.)"""
        count = int(numpy.prod(shape))
        block = numpy.random.default_rng(0).standard_normal(min(count, 1 << 20), dtype=numpy.float32)
        values, array = self.backend.asarray(block.astype(self.dtype)), self.np.empty((count,), dtype=self.dtype)
        whole = count // len(block) * len(block)
        array[:whole].reshape(-1, len(block))[...] = values
        array[whole:] = values[: count - whole]
        return array.reshape(shape)

    # Parts ----------------------------------------------------------------------------------------------------------

    def compile(self) -> dict[str, float]:
        """Seconds to compile the kernels of training and generation in each precision. CuPy caches them on disk for the
        other processes. The kernels for the models in the tests are compiled here too."""
        figures = self.results["compile"] = {}
        for precision in self.sizes.precisions:
            started, models = time.perf_counter(), []
            for config in (self.sizes.model, *self.sizes.tested):
                length = min(self.sizes.block_size, config.n_positions)
                tokens, targets = (ids[:1, :length] % config.vocab_size for ids in (self.tokens, self.targets))
                models.append(
                    (model := GPT2(config, device="cuda", dtype=precision), tokens[0, : length // 2].tolist())
                )
                optimizer = optim.AdamW(model)
                model.loss(tokens, targets, Key(0)).backward()
                optimizer.step(max_norm=1.0)
                optimizer.zero_grad()
            for decode in DECODE:
                for model, prompt in models:
                    set_decode(model, decode)
                    list(generate(model, prompt, 3, temperature=0))
            self.np.cuda.get_current_stream().synchronize()
            figures[precision] = time.perf_counter() - started
        return figures

    def launch(self) -> dict[str, float]:
        """Microseconds per call of a small operation."""
        x = self.backend.zeros((64, 64), numpy.float32)
        n = self.sizes.launches
        return {
            "add_us": self.timed(lambda: x + x, n)[0] * 1e6,
            "matmul_us": self.timed(lambda: self.np.matmul(x, x), n)[0] * 1e6,
        }

    def copy(self) -> dict[str, float]:
        """GB/s between pinned memory and the device, and within the device (read and written bytes both count)."""
        nbytes, n = self.sizes.copy_bytes, self.sizes.repeats
        memory = self.np.cuda.alloc_pinned_memory(nbytes)
        host = numpy.frombuffer(memory, dtype=numpy.float32, count=nbytes // 4)
        host[:] = 1
        array, other = self.backend.zeros(host.shape, host.dtype), self.backend.zeros(host.shape, host.dtype)
        stream = self.np.cuda.get_current_stream()

        def within() -> None:
            other[...] = array

        seconds = {
            "to_device": self.timed(lambda: array.set(host, stream=stream), n)[1],
            "to_host": self.timed(lambda: array.get(stream=stream, out=host, blocking=False), n)[1],
            "within": self.timed(within, n)[1] / 2,
        }
        return {f"{name}_gb_per_s": nbytes / value / 1e9 for name, value in seconds.items()}

    def product(self) -> dict[str, float]:
        """TFLOP/s of a large square matrix product with CuPy."""
        n = self.sizes.matrix
        values = numpy.random.default_rng(0).standard_normal((n, n), dtype=numpy.float32)
        figures = self.results["product"] = {}
        for precision in map(Precision.of, self.sizes.precisions):
            a, b = (self.backend.asarray(values.astype(precision.activations)) for _ in range(2))
            product = self.backend.kernels_for(precision.tf32).matmul_forward
            seconds = self.timed(lambda a=a, b=b, product=product: product(a, b), self.sizes.repeats)[1]
            figures[f"{precision.name}_tflop_per_s"] = 2 * n**3 / seconds / 1e12
        return figures

    def gemm(self) -> dict[str, Any]:
        """The matrix products of a training step, in the four linear layers of a block and in the output layer."""
        from tinygrad2.kernels.gemm import Gemm

        gemm, C = Gemm(self.np), self.sizes.model.n_embd
        rows, padded = self.sizes.batch_sizes[0] * self.sizes.block_size, padded_vocabulary(self.sizes.model)
        figures = self.results["gemm"] = {}
        for name, k, n in (
            ("qkv", C, 3 * C),
            ("proj", C, C),
            ("up", C, 4 * C),
            ("down", 4 * C, C),
            ("head", C, padded),
        ):
            head = name == "head"  # its weight is the token embedding, (V, C)
            x, dy, weight = self.array(rows, k), self.array(rows, n), self.array(*((n, k) if head else (k, n)))
            y, dx = self.np.empty((rows, n), dtype=self.dtype), self.np.empty((rows, k), dtype=self.dtype)
            gradient, pair = self.backend.zeros(weight.shape, numpy.float32), (dy, x) if head else (x, dy)
            kinds = {
                "forward": ((x, weight, y), {"transpose_b": head}),
                "dgrad": ((dy, weight, dx), {"transpose_b": not head}),
                "wgrad": ((*pair, gradient), {"transpose_a": True, "accumulate": True}),
            }
            for kind, (arrays, options) in kinds.items():
                seconds = self.timed(lambda a=arrays, o=options: gemm(*a, **o), self.sizes.repeats)[1]
                nbytes = sum(array.nbytes for array in arrays) + (gradient.nbytes if kind == "wgrad" else 0)
                family = {"proj": "small product", "head": "head product"}.get(name, "product")
                predicted = self.predicted(cost_model.Cost(family, flops := 2 * rows * k * n, nbytes))
                figures[f"{name} {kind}"] = self.against_floor(seconds, nbytes, flops, predicted)
            if not head and (launchers := self.backend.cuda.launchers):
                into = self.backend.zeros((n,), numpy.float32)
                seconds = self.timed(lambda dy=dy, into=into: launchers.column_sums(dy, into), self.sizes.repeats)[1]
                predicted = self.predicted(cost_model.column_sums(rows, n, dy.itemsize))
                figures[f"{name} dbias"] = self.against_floor(seconds, dy.nbytes, 0, predicted)
        return figures

    def attention(self) -> dict[str, Any]:
        """The attention of one layer, without dropout, compared with PyTorch's scaled_dot_product_attention."""
        config, B, T = self.sizes.model, self.sizes.batch_sizes[0], self.sizes.block_size
        C, H = config.n_embd, config.n_head
        kernels, qkv, dout = self.backend.kernels, self.array(B, T, 3 * C), self.array(B, T, C)
        out, lse = kernels.attention_forward(qkv, H, 0.0, None)
        calls = {
            "forward": lambda: kernels.attention_forward(qkv, H, 0.0, None),
            "backward": lambda: kernels.attention_backward(dout, qkv, out, lse, H, 0.0, None),
        }
        flops = {"forward": 2 * B * T * T * C, "backward": 5 * B * T * T * C}  # half of two and five products
        nbytes = {"forward": 4 * out.nbytes, "backward": 8 * out.nbytes}
        predicted = {
            "forward": self.predicted(cost_model.attention_forward(B, T, C, H, qkv.itemsize)),
            "backward": self.predicted(cost_model.attention_backward(B, T, C, H, qkv.itemsize, products=7)),
        }
        figures = self.results["attention"] = {}
        theirs = None
        try:
            theirs = TorchAttention((B, H, T, C // H), self.torch_device, self.sizes.precisions[0])
        except Exception as error:
            figures["torch_error"] = one_line(error)
        for kind, call in calls.items():
            seconds: dict[str, list[float]] = {kind: [], f"torch_{kind}": []}
            for _ in range(self.sizes.rounds):
                seconds[kind].append(self.timed(call, self.sizes.repeats)[1])
                if theirs is not None:
                    try:
                        seconds[f"torch_{kind}"].append(theirs.timed(kind, self.sizes.repeats))
                    except Exception as error:
                        figures["torch_error"], theirs = one_line(error), None
            for name, values in seconds.items():
                if values:
                    figures[name] = self.against_floor(
                        statistics.median(values), nbytes[kind], flops[kind], predicted.get(name)
                    )
        return figures

    def step(self) -> list[dict[str, Any]]:
        """The training step in the first precision at every batch size, ours and PyTorch's interleaved."""
        rows = self.results["step"] = []
        for batch_size in self.sizes.batch_sizes:
            self.add_row(rows, self.sizes.precisions[0], batch_size)
        return rows

    def wide_step(self) -> list[dict[str, Any]]:
        """The training step in the other precisions, each at the first batch size that fits."""
        rows = self.results["wide_step"] = []
        for precision in self.sizes.precisions[1:]:
            for batch_size in self.sizes.wide_batch_sizes:
                self.add_row(rows, precision, batch_size)
                if rows[-1].get("error") != "out of memory":
                    break
        return rows

    def add_row(self, rows: list[dict[str, Any]], precision: str, batch_size: int) -> None:
        row: dict[str, Any] = {"precision": precision, "batch_size": batch_size}
        rows.append(row)
        try:
            self.compare(row)
        except MemoryError:
            row["error"] = "out of memory"
        except Exception as error:
            row["error"] = self.errors[f"step {precision} {batch_size}"] = print_error(error)
        self.keep(self.found())
        self.release()

    def compare(self, row: dict[str, Any]) -> None:
        """Measure our step and PyTorch's with the row's precision and batch size, and add the figures to the row."""
        sizes, precision, batch_size = self.sizes, row["precision"], row["batch_size"]
        ours = self.our_step(precision, batch_size)
        theirs = None
        try:
            compiling = COMPILING if sizes.compiled and precision == "bfloat16" else 0
            if time.monotonic() > self.end - compiling:
                raise TimeoutError("no time left")
            tokens, targets = self.tokens[:batch_size], self.targets[:batch_size]
            theirs = TorchStep(sizes.model, tokens, targets, self.torch_device, precision, sizes.compiled)
        except Exception as error:
            row["torch_error"] = one_line(error)
        seconds: dict[str, list[float]] = {"ours": [], "torch": []}
        for _ in range(sizes.rounds):
            seconds["ours"].append(self.timed(ours, sizes.steps)[0])
            self.add_figures(row, seconds)
            self.release()
            if theirs is not None:
                try:
                    seconds["torch"].append(theirs.timed(sizes.steps))
                except Exception as error:
                    row["torch_error"], theirs = one_line(error), None
        self.add_figures(row, seconds)

    def add_figures(self, row: dict[str, Any], seconds: dict[str, list[float]]) -> None:
        """Add the figures of a step from the times measured so far."""
        peak = self.backend.cuda.peak(row["precision"])
        for kind, values in seconds.items():
            if values:
                median = statistics.median(values)
                row[kind] = step_figures(median, self.sizes.model, row["batch_size"], self.sizes.block_size, peak)
        predicted = self.predicted_step(row["precision"], row["batch_size"])
        row["predicted_ms"] = None if predicted is None else sum(predicted.values())
        self.keep(self.found())

    def kernels(self) -> dict[str, Any]:
        """The kernels of a training step: the number of calls, the time on the device, and the lower bound of each."""
        for batch_size in self.sizes.batch_sizes:
            try:
                return {"batch_size": batch_size, **self.watched_steps(batch_size)}
            except MemoryError:
                if batch_size == self.sizes.batch_sizes[-1]:
                    raise
            self.release()
        raise AssertionError("no batch sizes")

    def watched_steps(self, batch_size: int) -> dict[str, Any]:
        step = self.our_step(self.sizes.precisions[0], batch_size)
        step(), step()
        with self.watched() as spans:
            begin, end = self.np.cuda.Event(), self.np.cuda.Event()
            begin.record()
            for _ in range(self.sizes.steps):
                step()
            end.record()
            end.synchronize()
        steps = self.sizes.steps
        total = self.np.cuda.get_elapsed_time(begin, end) / steps
        sums: dict[str, list[float]] = {}
        for name, start, stop, nbytes, flops in spans:
            milliseconds, floor = self.np.cuda.get_elapsed_time(start, stop), self.floor(nbytes, flops) or 0.0
            values = (1 / steps, milliseconds / steps, nbytes / steps, flops / steps, 1e3 * floor / steps)
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 5), values, strict=True)]
        predicted = self.predicted_step(self.sizes.precisions[0], batch_size) or {}
        rows = {}
        for name, (calls, ms, nbytes, flops, floor_ms) in sorted(sums.items(), key=lambda item: -item[1][1]):
            figures = self.against_floor(ms / 1e3, nbytes, flops, predicted.get(name))
            if figures["floor_ms"] is not None:  # sum of the bounds of the calls, not the bound of the summed work
                figures |= {"floor_ms": floor_ms, "share": floor_ms / ms}
            rows[name] = {"calls": round(calls), **figures}
        outside = total - sum(row["ms"] for row in rows.values())
        return {
            "ms": total, "outside_ms": outside, "predicted_outside_ms": predicted.get("outside"), "kernels": rows,
        }  # fmt: skip

    def decode(self) -> dict[str, Any]:
        """Tokens per second for one text, and the upper bound: the rate at which the weights can be read."""
        config = self.sizes.model
        figures = self.results["decode"] = {}
        for decode in DECODE:
            for precision in self.sizes.precisions:
                if precision == "tf32":
                    continue
                model = GPT2(config, device="cuda", dtype=precision)
                set_decode(model, decode)
                nbytes = (config.n_parameters - config.n_positions * config.n_embd) * model.precision.activation_bytes
                limit = None if self.bandwidth is None else REACHED_BYTES * self.bandwidth * 1e9 / nbytes
                seconds = statistics.median([self.decoding(model) for _ in range(1 + self.sizes.rounds)][1:])
                rate = self.sizes.new_tokens / seconds
                figures[f"{precision} {decode}"] = {
                    "tokens_per_s": rate,
                    "limit": limit,
                    "share": None if limit is None else rate / limit,
                    "token": self.token(model, nbytes, precision),
                }
                self.keep(self.found())
        return figures

    # Helpers --------------------------------------------------------------------------------------------------------

    def token(self, model: GPT2, nbytes: int, precision: str) -> dict[str, Any]:
        """The time of one token: on the device if it is decoded in one launch, else including the host."""
        tokens = self.tokens[:1, : self.sizes.block_size // 4]
        cache, last = KVCache(model, 1, self.sizes.block_size), tokens[:, -1:]
        card, L = self.card_in(precision), model.config.n_layer
        calls, predicted = 8 * L + 4, None  # kernels per token in ordinary decoding
        with no_grad():
            next_logits(model, tokens, cache)
            length, repeats = cache.length, 5 * self.sizes.repeats

            def one_token() -> None:
                cache.length = length
                next_logits(model, last, cache)

            host, device = self.timed(one_token, repeats)
        if card is not None:
            reading = nbytes / card.rates["product"].nbytes
            fused, ordinary = reading + L * EXCHANGE, max(reading + calls * card.call, calls * card.host)
            predicted = 1e3 * (ordinary if cache.decoder is None else fused)
        seconds = host if cache.decoder is None else device
        return self.against_floor(seconds, nbytes, nbytes, predicted)  # 2 FLOPs per weight of 2 bytes

    def decoding(self, model: GPT2) -> float:
        """Seconds to generate the tokens after the first one."""
        prompt = self.tokens[0, : self.sizes.block_size // 4].tolist()
        tokens = generate(model, prompt, 1 + self.sizes.new_tokens, temperature=0)
        next(tokens)  # processes the prompt
        started = time.perf_counter()
        for _ in tokens:
            pass
        return time.perf_counter() - started

    def our_step(self, precision: str, batch_size: int) -> Callable[[], Any]:
        """A training step as in train.py, without fetching the loss."""
        model = GPT2(self.sizes.model, device="cuda", dtype=precision)
        optimizer = optim.AdamW(model, lr=1e-4, weight_decay=0.1)
        tokens, targets = self.tokens[:batch_size], self.targets[:batch_size]

        def step() -> None:
            model.loss(tokens, targets).backward()
            optimizer.step(max_norm=1.0)
            optimizer.zero_grad()

        return step

    @contextmanager
    def watched(self) -> Iterator[list[tuple[str, Any, Any, int, int]]]:
        """In this context, every kernel call that is not made by another kernel appends (name, start, stop, bytes,
        FLOPs); start and stop are CUDA events."""
        kernels, spans, inside = self.backend.kernels, [], []
        originals = {name: getattr(kernels, name) for name in dir(kernels) if re.search(KERNEL, name)}

        def watch(name: str, kernel: Callable) -> Callable:
            def call(*arguments: Any) -> Any:
                if inside:
                    return kernel(*arguments)
                inside.append(name)
                start, stop = self.np.cuda.Event(), self.np.cuda.Event()
                start.record()
                try:
                    result = kernel(*arguments)
                    stop.record()
                    spans.append((name, start, stop, *cost(name, arguments, result)))
                    return result
                finally:
                    inside.clear()

            return call

        for name, kernel in originals.items():
            setattr(kernels, name, watch(name, kernel))
        try:
            yield spans
        finally:
            for name, kernel in originals.items():
                setattr(kernels, name, kernel)


def predicted_step(card: cost_model.Device, sizes: Sizes, precision: str, batch_size: int) -> dict[str, float]:
    """The predicted milliseconds of each kernel in a step, and of everything "outside" the kernels."""
    step = cost_model.micro_step(sizes.model, batch_size, sizes.block_size, precision)
    sums: dict[str, float] = {}
    for kernel in (*step, *cost_model.update(sizes.model, precision)):
        name = next((call for call, launched in LAUNCHES.items() if kernel.name in launched), kernel.name)
        name = name if re.search(KERNEL, name) else "outside"
        sums[name] = sums.get(name, 0.0) + kernel.calls * card.milliseconds(kernel.cost)
    return sums


def savings(card: cost_model.Device, sizes: Sizes, precision: str, batch_size: int) -> dict[str, float]:
    """The predicted milliseconds per step that some improvements of the kernels would save."""
    B, T, C, H = batch_size, sizes.block_size, sizes.model.n_embd, sizes.model.n_head
    L, V, N, s = sizes.model.n_layer, sizes.model.vocab_size, B * T, Precision.of(precision).activation_bytes
    step = cost_model.micro_step(sizes.model, B, T, precision)
    products = sum(k.calls * card.milliseconds(k.cost) for k in step if k.cost.family in cost_model.PRODUCTS)
    ms = card.milliseconds
    backward = [L * ms(cost_model.attention_backward(B, T, C, H, s, products)) for products in (7, 5)]
    return {
        "algorithms of cublasLt chosen by timing: 5 to 10 % of the products, here 7.5 %": 0.075 * products,
        "attention's backward pass in one kernel: 5 products instead of 7": backward[0] - backward[1],
        "GELU's gradient in the epilogue of the product before: 1 array moved instead of 3":
            L * ms(cost_model.gelu_backward(N, 4 * C, s)) * 2 / 3,
        "GELU in the epilogue of the product before: 1 array moved instead of 2":
            L * ms(cost_model.gelu_forward(N, 4 * C, s)) / 2,
        "bias gradient of queries, keys and values summed by attention's backward pass":
            L * ms(cost_model.column_sums(N, 3 * C, s)),
        "bias gradients of the two projections summed by LayerNorm's backward pass":
            2 * L * ms(cost_model.column_sums(N, C, s)),
        "token embedding stored with 50,304 rows: no copies of it": 2 * ms(cost_model.Cost("copies", 0, 2 * V * C * s)),
    }  # fmt: skip


def prediction(name: str, sizes: Sizes) -> list[str]:
    """The predicted time of the benchmark's first step on a GPU, for each kernel, and the predicted savings of some
    improvements. Raises ValueError for a GPU that the cost model does not know."""
    found = gpus.find_gpu(name, cost_model.CARDS)
    if found is None:
        raise ValueError(f"{name!r} is not known; choose one of {', '.join(cost_model.CARDS)}")
    precision = next(p for p in sizes.precisions if p in gpus.PEAK_TFLOPS[found])
    work = cost_model.gpu(found, precision), sizes, precision, sizes.batch_sizes[0]
    step = predicted_step(*work)
    total, tokens = sum(step.values()), sizes.batch_sizes[0] * sizes.block_size
    lines = [f"{found}, {precision}, {tokens:,} tokens: {total:.1f} ms, {tokens / total * 1e3:,.0f} tokens/s"]
    lines += [f"  {ms:7.2f}  {name}" for name, ms in sorted(step.items(), key=lambda item: -item[1])]
    lines += ["possible savings in ms:", *(f"  {ms:7.2f}  {what}" for what, ms in savings(*work).items())]
    return lines


def cost(name: str, arguments: tuple, result: Any) -> tuple[int, int]:
    """The minimum number of bytes that a kernel call moves, and the FLOPs of its matrix products.

    Each input array is read once and each output array is written once, as if intermediate results stayed on the chip.
    Attention is causal, so only half of each of its products counts.
    """
    changed = [arguments[i] for i in CHANGED.get(name, ())]
    nbytes, flops = bytes_of(arguments) + bytes_of(result) + bytes_of(changed), 0
    if name == "linear_forward":
        x, weight, _ = arguments
        flops = 2 * x.size * weight.shape[1]
    elif name == "linear_backward":
        _, x, weight, *_ = arguments
        flops = 4 * x.size * weight.shape[1]
    elif name == "lm_head_forward":
        x, weight, _ = arguments
        flops = 2 * x.size * weight.shape[0]
    elif name == "lm_head_backward":
        _, _, x, weight, _ = arguments
        flops = 4 * x.size * weight.shape[0]
    elif name == "attention_forward":
        B, T, width = arguments[0].shape
        flops = 2 * B * T * T * (width // 3)
    elif name == "attention_backward":
        B, T, C = arguments[0].shape
        flops = 5 * B * T * T * C
    elif name == "embedding_forward":  # reads only the rows of the tokens
        tokens, wte, *_ = arguments
        nbytes = tokens.nbytes + result.nbytes + min(wte.nbytes, tokens.size * wte.shape[1] * wte.itemsize)
    elif name == "embedding_backward":
        dy, _, _, dwte, _ = arguments
        nbytes = dy.nbytes + 2 * min(dwte.nbytes, dy.size * dwte.itemsize)
    return nbytes, flops


def bytes_of(x: Any) -> int:
    """The bytes of an array, or of all arrays in a tuple or list; 0 for numbers and None."""
    if isinstance(x, tuple | list):
        return sum(map(bytes_of, x))
    return x.nbytes if hasattr(x, "nbytes") and hasattr(x, "strides") else 0


class TorchStep:
    """The same model and step in PyTorch, with scaled_dot_product_attention and fused AdamW. In bfloat16 the model is
    compiled and uses autocast and a padded vocabulary, as in nanoGPT."""

    def __init__(
        self,
        config: GPT2Config,
        tokens: numpy.ndarray,
        targets: numpy.ndarray,
        device: str,
        precision: str,
        compiled: bool,
    ):
        self.torch, self.device = import_torch(device), device
        torch, narrow = self.torch, precision == "bfloat16"
        if narrow:
            config = replace(config, vocab_size=padded_vocabulary(config))
        self.matmul = "highest" if precision == "float32" else "high"
        self.autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=narrow)
        self.model = torch_model(config).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        self.call = self.model
        if narrow and compiled:
            torch._dynamo.reset()  # otherwise the second batch size would be compiled with dynamic shapes
            self.call = torch.compile(self.model, dynamic=False)
        self.tokens, self.targets = (torch.from_numpy(ids.copy()).to(device) for ids in (tokens, targets))

    def step(self) -> Any:
        with self.autocast:
            loss = self.call(self.tokens, self.targets)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def timed(self, steps: int) -> float:
        """Seconds per step, wall-clock time."""
        self.torch.set_float32_matmul_precision(self.matmul)
        return torch_timed(self.torch, self.device, self.step, steps)


class TorchAttention:
    """PyTorch's attention, forward and backward, on arrays (B, H, T, D)."""

    def __init__(self, shape: tuple[int, ...], device: str, precision: str):
        self.torch, self.device = import_torch(device), device
        dtype = self.torch.bfloat16 if precision == "bfloat16" else self.torch.float32
        self.qkv = [self.torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
        self.dout = self.torch.randn(shape, dtype=dtype, device=device)
        self.out = self.forward()

    def forward(self) -> Any:
        return self.torch.nn.functional.scaled_dot_product_attention(*self.qkv, is_causal=True)

    def backward(self) -> Any:
        return self.torch.autograd.grad(self.out, self.qkv, self.dout, retain_graph=True)

    def timed(self, name: str, repeats: int) -> float:
        return torch_timed(self.torch, self.device, getattr(self, name), repeats)


def import_torch(device: str) -> Any:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU")
    return torch


def torch_timed(torch: Any, device: str, function: Callable[[], Any], repeats: int) -> float:
    """Seconds per call, after two warm-up calls. On a GPU, free memory is then returned to the driver."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(2):
        function()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    wait()
    seconds = (time.perf_counter() - started) / repeats
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds


def torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def padded_vocabulary(config: GPT2Config) -> int:
    """The vocabulary size padded to a multiple of 64, which is faster; 50,304 for GPT-2."""
    return -(-config.vocab_size // 64) * 64


def version(number: int) -> str:
    """Convert CUDA's version number: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def print_error(error: BaseException) -> str:
    """Print the error with its traceback, and return it in one line."""
    traceback.print_exception(error)
    return one_line(error)


def step_figures(
    seconds: float, config: GPT2Config, batch_size: int, block_size: int, peak: float | None
) -> dict[str, float | None]:
    """Milliseconds, tokens/s, TFLOP/s and MFU (the model's FLOPs over the device's peak) of a step."""
    tokens_per_s = batch_size * block_size / seconds
    tflop_per_s = tokens_per_s * config.flops_per_token(block_size) / 1e12
    mfu = None if peak is None else tflop_per_s / peak
    return {"ms": seconds * 1e3, "tokens_per_s": tokens_per_s, "tflop_per_s": tflop_per_s, "mfu": mfu}


def run_checks(seconds: float) -> dict[str, Any]:
    """Run pytest -m gpu in a separate process. Returns its exit status, its last line, and the names of failed tests.

    If a test loses the GPU, the remaining tests run in another process.
    """
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rpfEs", "--tb=short", "--continue-on-collection-errors"]
    command += ["-o", "faulthandler_timeout=60", "tests"]  # print the stack of a test that hangs
    started, statuses, seen, failed = time.monotonic(), [GPU_LOST], [], []
    while statuses[-1] == GPU_LOST:
        left = max(1, seconds - (time.monotonic() - started))
        again = [f"--deselect={name}" for name in seen]
        try:
            done = subprocess.run(
                [*command, *again], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=left
            )
            output, status = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            output, status = f"{_text(error.stdout)}\nnot finished after {seconds:.0f} s", 124
        lines = output.strip().splitlines() or ["no output"]
        failed += [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        ran = [line.split(" - ")[0].split(" ", 1)[1] for line in lines if re.match(r"(PASSED|FAILED|ERROR) ", line)]
        if status:
            print("\n".join([line for line in lines if not line.startswith("PASSED ")][-200:]), flush=True)
        seen += ran
        statuses.append(status if ran else max(status, 1))
        if not ran:
            break
    return {
        "status": max(statuses[1:]),
        "last_line": lines[-1],
        "failed": failed,
        "processes": len(statuses) - 1,
        "seconds": time.monotonic() - started,
    }


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def table(record: dict[str, Any]) -> list[str]:
    """The lines of the table that shows a record."""
    lines = [
        f"{record['device']}, driver for CUDA {record['driver']}, CUDA {record['cuda']}, CuPy {record['cupy']}, "
        f"PyTorch {record['torch']}, {record['date']}"
    ]
    for part, found in record["results"].items():
        lines += part_table(part, found, record["sizes"]["block_size"])
    return lines + [f"FAILED     {name}: {error}" for name, error in record["errors"].items()]


def part_table(part: str, found: Any, block_size: int) -> list[str]:
    """The lines of the table for one part."""
    lines = []
    if part == "compile":
        lines.append(f"compile    {', '.join(f'{name} {seconds:.1f} s' for name, seconds in found.items())}")
    if part == "checks":
        lines += [f"checks     {found['last_line']}", *(f"           {line}" for line in found["failed"])]
    if part == "launch":
        lines.append(f"launch     add {found['add_us']:.1f} us, matmul {found['matmul_us']:.1f} us")
    if part == "copy":
        lines.append(
            f"copy       to device {found['to_device_gb_per_s']:.1f}, to host {found['to_host_gb_per_s']:.1f}, "
            f"within {found['within_gb_per_s']:.0f} GB/s"
        )
    if part == "product":
        rates = {name.removesuffix("_tflop_per_s"): value for name, value in found.items()}
        lines.append(f"product    {', '.join(f'{name} {value:.1f}' for name, value in rates.items())} TFLOP/s")
    if part == "gemm":
        lines += against_floors("matrix products", found)
    if part == "attention":
        lines += against_floors("attention", {name: row for name, row in found.items() if name != "torch_error"})
        if "torch_error" in found:
            lines.append(f"  PyTorch: {found['torch_error']}")
    if part in ("step", "wide_step"):
        lines.append(f"{f'step, {block_size} tokens each':28}      ms   tokens/s  TFLOP/s    MFU")
        for row in found:
            name = f"{row['precision']} x {row['batch_size']}"
            if row.get("predicted_ms"):
                lines.append(f"  {name:18}{'model':8}{row['predicted_ms']:8.1f}  predicted")
            lines += [
                f"  {name:18}{kind:8}{figures['ms']:8.1f}{figures['tokens_per_s']:11,.0f}"
                f"{figures['tflop_per_s']:9.1f} {percent(figures['mfu'])}"
                for kind in ("ours", "torch")
                if (figures := row.get(kind))
            ]
            failed = (("ours", row.get("error")), ("PyTorch", row.get("torch_error")))
            lines += [f"  {name:18}{who}: {error}" for who, error in failed if error]
    if part == "kernels":
        lines += against_floors(f"kernels, {found['batch_size']} sequences", found["kernels"])
        lines.append(
            f"  outside the kernels {found['outside_ms']:.3f} of {found['ms']:.3f} ms, predicted "
            f"{milliseconds(found['predicted_outside_ms'])}"
        )
    if part == "decode":
        for name, row in found.items():
            limit = "?" if row["limit"] is None else f"{row['limit']:,.0f}"
            lines.append(f"generate   {name} {row['tokens_per_s']:,.0f} of {limit} tokens/s {percent(row['share'])}")
        lines += against_floors("one token", {name: row["token"] for name, row in found.items()})
    return lines


def against_floors(title: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """A table of the figures from Bench.against_floor, with the number of calls if there is one."""
    lines = [f"{title:34}      ms predicted    floor  share  TFLOP/s    GB/s"]
    for name, row in rows.items():
        calls = f"x{row['calls']}" if "calls" in row else ""
        predicted, floor = milliseconds(row["predicted_ms"]), milliseconds(row["floor_ms"])
        lines.append(
            f"  {name:26}{calls:6}{row['ms']:8.3f}{predicted:>10}{floor:>9} {percent(row['share'])}"
            f"{row['tflop_per_s']:9.1f}{row['gb_per_s']:8.0f}"
        )
    return lines


def milliseconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def percent(share: float | None) -> str:
    return "     ?" if share is None else f"{share:6.1%}"


def device() -> dict[str, Any]:
    """The machine and the versions of the software."""
    backend = get_backend("cuda")
    runtime = backend.np.cuda.runtime
    return {
        "device": backend.name().removeprefix("cuda: "),
        "memory_bytes": backend.memory()[1],
        "driver": version(runtime.driverGetVersion()),
        "cuda": version(runtime.runtimeGetVersion()),
        "cupy": backend.np.__version__,
        "numpy": numpy.__version__,
        "torch": torch_version(),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, fewer repetitions: two or three minutes")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/gpu-DEVICE-DATE.json)")
    parser.add_argument("--only", nargs="+", choices=tuple(LIMITS), metavar="PART", help="run only these parts")
    parser.add_argument(
        "--seconds", type=float, help=f"total time limit (default: {SECONDS}, {ONLY_SECONDS} with --only)"
    )
    parser.add_argument(
        "--predict", metavar="GPU", help="only print the predictions for a GPU such as H200; needs no GPU"
    )
    # For the process of one part, which also needs --out.
    parser.add_argument("--part", choices=tuple(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    if options.predict:
        print(*prediction(options.predict, sizes), sep="\n")
        return 0
    seconds_for_all = options.seconds or (ONLY_SECONDS if options.only else SECONDS)
    if options.part:
        sizes = replace(sizes, precisions=(options.precision,)) if options.precision else sizes
        keep = partial(write, options.out)
        keep(Bench(sizes, seconds=seconds_for_all, keep=keep).run(options.part))
        return 0
    end = time.monotonic() + seconds_for_all
    try:
        get_backend("cuda")
    except ValueError as error:
        print(f"no GPU: {error}", file=sys.stderr)
        return 1

    def run(part: str) -> Found:
        seconds = min(LIMITS[part], end - time.monotonic())
        if part == "checks":
            return checks(seconds)
        if part == "compile":
            return compile_together(sizes.precisions, seconds, options.quick)
        return in_a_process(part, seconds, options.quick)

    return measure(sizes, options.out, run, [part for part in LIMITS if part in (options.only or LIMITS)])


def checks(seconds: float) -> Found:
    """The results of pytest -m gpu."""
    if seconds < 10:
        return {"results": {}, "errors": {"checks": "no time left"}}
    found = run_checks(seconds)
    return {"results": {"checks": found}, "errors": {"checks": found["last_line"]} if found["status"] else {}}


def compile_together(precisions: Sequence[str], seconds: float, quick: bool) -> Found:
    """Run the part "compile" of each precision in its own process, in parallel: the compiler uses only one core."""
    with ThreadPoolExecutor(len(precisions)) as pool:
        parts = [pool.submit(in_a_process, "compile", seconds, quick, precision) for precision in precisions]
    together: Found = {"results": {"compile": {}}, "errors": {}}
    for precision, part in zip(precisions, parts, strict=True):
        found = part.result()
        together["results"]["compile"] |= found["results"].get("compile", {})
        together["errors"] |= {f"{name} {precision}": error for name, error in found["errors"].items()}
    return together


def in_a_process(part: str, seconds: float, quick: bool, precision: str | None = None) -> Found:
    """Run a part in its own process with a time limit in seconds. Partial results are kept."""
    found: Found = {"results": {}, "errors": {}}
    if seconds < 10:
        return {"results": {}, "errors": {part: "no time left"}}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--part", part, "--out", str(out), "--seconds", str(seconds)]
        command += ["--precision", precision] * (precision is not None) + ["--quick"] * quick
        try:
            status = subprocess.run(command, timeout=seconds).returncode
            error = f"its process ended with status {status}" if status else None
        except subprocess.TimeoutExpired:
            error = f"not finished after {seconds:.0f} s"
        if out.exists():
            found = json.loads(out.read_text(encoding="utf-8"))
        elif error is None:
            error = "its process wrote no figures"
    if error:
        found["errors"][part] = error
    return found


def measure(sizes: Sizes, out: Path | None, run: Callable[[str], Found], parts: Sequence[str] = tuple(LIMITS)) -> int:
    """Run the parts, write the JSON file after each, and print the table. Returns 0 if nothing failed, else 1."""
    record = {**device(), "results": {}, "errors": {}, "sizes": asdict(sizes)}
    if out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
        out = RESULTS / f"gpu-{slug}-{record['date']}.json"
    write(out, record)
    for part in parts:
        print(f"{part} ...", flush=True)
        started = time.perf_counter()
        found = run(part)
        record["results"] |= found["results"]
        record["errors"] |= found["errors"]
        write(out, record)
        lines = [
            line for name, figures in found["results"].items() for line in part_table(name, figures, sizes.block_size)
        ]
        errors = "; ".join(f"{name}: {error}" for name, error in found["errors"].items())
        print(*lines, f"{part}: {errors or 'done'} ({time.perf_counter() - started:.1f} s)", sep="\n", flush=True)
    print(f"written to {out}\n", *table(record), sep="\n", flush=True)
    return 1 if record["errors"] else 0


def write(out: Path, record: Any) -> None:
    """Replace the file atomically, so that a killed process leaves the old file intact."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(out.name + ".new")
    new.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    new.replace(out)


if __name__ == "__main__":
    raise SystemExit(main())
