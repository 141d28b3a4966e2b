"""The GPU path, checked and timed by one command: python tests/benchmarks/gpu.py [--quick] [--out FILE.json]

Runs `pytest -m gpu`, then times launches, copies, matrix products, and the training step of the 124M model in float32
and TF32 beside the same step in PyTorch, where that is installed. Prints a table last and writes JSON. A part that
fails is recorded with its error, and the others go on. Under 8 minutes on an H200.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for a repository that is not installed

from gpt2 import GPT2, GPT2Config  # noqa: E402
from tinygrad2 import optim  # noqa: E402
from tinygrad2.backend import get_backend  # noqa: E402

RESULTS = Path(__file__).parent / "results"

# Dense peaks in TFLOP/s, (float32, TF32), from NVIDIA's data sheets; TF32 is half of what they give with sparsity.
PEAKS = {
    "B200": (75.0, 1125.0),
    "H200": (67.0, 494.5),
    "H100 PCIe": (51.0, 378.0),
    "H100": (67.0, 494.5),
    "A100": (19.5, 156.0),
    "L40S": (91.6, 183.0),
    "L4": (30.3, 60.0),
    "RTX 4090": (82.6, 82.6),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    model: GPT2Config
    block_size: int = 1024
    batch_sizes: tuple[int, ...] = (16, 8, 4, 2, 1)  # the first that fits is taken
    steps: int = 5  # in one measurement of a step
    rounds: int = 4  # measurements of each kind, in alternation
    launches: int = 2000
    copy_bytes: int = 256 << 20
    matrix: int = 8192
    repeats: int = 10


NO_DROPOUT = replace(GPT2Config.preset("gpt2"), embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
FULL = Sizes(NO_DROPOUT)
QUICK = Sizes(NO_DROPOUT, batch_sizes=(4, 2, 1), steps=3, rounds=2, launches=500, matrix=4096, repeats=5)


class Bench:
    """The measurements on one device; each method is a part, gives a dict of figures, and stands for itself."""

    def __init__(self, sizes: Sizes, torch_device: str = "cuda"):
        self.sizes = sizes
        self.torch_device = torch_device
        self.backend = get_backend("cuda")
        self.np = self.backend.np
        self.results: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        rows = numpy.random.default_rng(0).integers(
            sizes.model.vocab_size, size=(max(sizes.batch_sizes), sizes.block_size + 1)
        )
        self.tokens, self.targets = rows[:, :-1], rows[:, 1:]

    def run(self) -> None:
        for part in (self.launch, self.copy, self.product, self.step, self.operations):
            name, started = part.__name__, time.perf_counter()
            try:
                self.results[name] = part()
            except Exception as error:  # (MemoryError and CuPy's are among these)
                self.errors[name] = f"{type(error).__name__}: {error}"
            self.release()
            print(f"{name}: {self.errors.get(name, 'done')} ({time.perf_counter() - started:.1f} s)", flush=True)

    def release(self) -> None:
        """Give freed memory back to the driver, for PyTorch or for what comes next."""
        self.np.get_default_memory_pool().free_all_blocks()

    def device(self) -> dict[str, Any]:
        runtime = self.np.cuda.runtime
        name = runtime.getDeviceProperties(0)["name"]
        return {
            "device": name.decode() if isinstance(name, bytes) else name,
            "memory_bytes": self.backend.memory()[1],
            "driver": version(runtime.driverGetVersion()),
            "cuda": version(runtime.runtimeGetVersion()),
            "cupy": self.np.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
        }

    def timed(self, function: Callable[[], Any], repeats: int, warmup: int = 2) -> tuple[float, float]:
        """Seconds a call: by the clock, from the first launch to the last result, and between two CUDA events."""
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

    # Parts ----------------------------------------------------------------------------------------------------------

    def launch(self) -> dict[str, float]:
        """Microseconds that one small operation costs."""
        x = self.backend.zeros((64, 64), numpy.float32)
        n = self.sizes.launches
        return {
            "add_us": self.timed(lambda: x + x, n)[0] * 1e6,
            "matmul_us": self.timed(lambda: self.np.matmul(x, x), n)[0] * 1e6,
        }

    def copy(self) -> dict[str, float]:
        """GB/s between pinned memory and the device, and within the device (read and written bytes)."""
        nbytes, n = self.sizes.copy_bytes, self.sizes.repeats
        memory = self.np.cuda.alloc_pinned_memory(nbytes)
        host = numpy.frombuffer(memory, dtype=numpy.float32, count=nbytes // 4)
        host[:] = 1
        there, other = self.backend.zeros(host.shape, host.dtype), self.backend.zeros(host.shape, host.dtype)
        stream = self.np.cuda.get_current_stream()

        def within() -> None:
            other[...] = there

        seconds = {
            "to_device": self.timed(lambda: there.set(host, stream=stream), n)[1],
            "to_host": self.timed(lambda: there.get(stream=stream, out=host, blocking=False), n)[1],
            "within": self.timed(within, n)[1] / 2,
        }
        return {f"{name}_gb_per_s": nbytes / value / 1e9 for name, value in seconds.items()}

    def product(self) -> dict[str, float]:
        """TFLOP/s of a large square matrix product."""
        n = self.sizes.matrix
        values = numpy.random.default_rng(0).standard_normal((n, n), dtype=numpy.float32)
        a, b = self.backend.asarray(values), self.backend.asarray(values)
        figures = {}
        for name, on in (("float32", False), ("tf32", True)):
            with self.tf32(on):
                figures[f"{name}_tflop_per_s"] = 2 * n**3 / self.timed(lambda: self.np.matmul(a, b), 10)[1] / 1e12
        return figures

    def step(self) -> dict[str, Any]:
        """The training step, ours and PyTorch's in alternation, at the largest batch that fits both of ours."""
        for batch_size in self.sizes.batch_sizes:
            try:
                ours = self.our_step(batch_size)
                ours()
                self.np.cuda.get_current_stream().synchronize()
                break
            except MemoryError:
                if batch_size == self.sizes.batch_sizes[-1]:
                    raise
            self.release()
        figures: dict[str, Any] = {"batch_size": batch_size, "block_size": self.sizes.block_size}
        theirs = None
        try:
            theirs = TorchStep(self.sizes.model, self.tokens[:batch_size], self.targets[:batch_size], self.torch_device)
        except Exception as error:
            figures["torch_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        seconds: dict[str, list[float]] = {}
        for _ in range(self.sizes.rounds):
            for kind, on in (("float32", False), ("tf32", True)):
                with self.tf32(on):
                    seconds.setdefault(kind, []).append(self.timed(ours, self.sizes.steps, warmup=1)[0])
                if theirs is not None:
                    try:
                        seconds.setdefault(f"torch_{kind}", []).append(theirs.timed(self.sizes.steps, on))
                    except Exception as error:
                        figures["torch_error"], theirs = f"{type(error).__name__}: {error}".splitlines()[0], None
        name = self.device()["device"]
        for kind, values in seconds.items():
            if values:
                figures[kind] = step_figures(
                    statistics.median(values), self.sizes.model, batch_size, self.sizes.block_size, name,
                    kind.endswith("tf32"),
                )  # fmt: skip
        return figures

    def operations(self) -> dict[str, Any]:
        """Milliseconds on the device of each kernel, over one training step in float32."""
        batch_size = self.results.get("step", {}).get("batch_size", self.sizes.batch_sizes[-1])
        step = self.our_step(batch_size)
        step()
        with self.watched() as spans:
            begin, end = self.np.cuda.Event(), self.np.cuda.Event()
            begin.record()
            step()
            end.record()
            end.synchronize()
        total = self.np.cuda.get_elapsed_time(begin, end)
        milliseconds: Counter[str] = Counter()
        for name, start, stop in spans:
            milliseconds[name] += self.np.cuda.get_elapsed_time(start, stop)
        rows = dict(milliseconds.most_common())
        return {"batch_size": batch_size, **rows, "outside kernels": total - sum(rows.values())}

    # What they are made of ------------------------------------------------------------------------------------------

    def our_step(self, batch_size: int) -> Callable[[], Any]:
        """A training step as train.py makes it, without fetching the loss."""
        model = GPT2(self.sizes.model, device="cuda")
        optimizer = optim.AdamW(model, lr=1e-4, weight_decay=0.1)
        tokens, targets = self.tokens[:batch_size], self.targets[:batch_size]

        def step() -> None:
            model.loss(tokens, targets).backward()
            optimizer.step(max_norm=1.0)
            optimizer.zero_grad()

        return step

    @contextmanager
    def tf32(self, on: bool) -> Iterator[None]:
        """Matrix products of float32 numbers in TF32 (CuPy's own switch is read once, when it is imported)."""
        linalg = self.np._core._routines_linalg
        linalg.set_compute_type("f", linalg.COMPUTE_TYPE_TF32 if on else linalg.COMPUTE_TYPE_DEFAULT)
        try:
            yield
        finally:
            linalg.set_compute_type("f", linalg.COMPUTE_TYPE_DEFAULT)

    @contextmanager
    def watched(self) -> Iterator[list[tuple[str, Any, Any]]]:
        """Inside, every kernel that is called from outside the kernels leaves (name, start, stop), CUDA events."""
        kernels, spans, inside = self.backend.kernels, [], []
        originals = {
            name: getattr(kernels, name) for name in dir(kernels) if re.search(r"_(forward|backward|step)$", name)
        }

        def watch(name: str, kernel: Callable) -> Callable:
            def call(*arguments: Any) -> Any:
                if inside:
                    return kernel(*arguments)
                inside.append(name)
                start, stop = self.np.cuda.Event(), self.np.cuda.Event()
                start.record()
                try:
                    return kernel(*arguments)
                finally:
                    stop.record()
                    spans.append((name, start, stop))
                    inside.clear()

            return call

        for name, kernel in originals.items():
            setattr(kernels, name, watch(name, kernel))
        try:
            yield spans
        finally:
            for name, kernel in originals.items():
                setattr(kernels, name, kernel)


class TorchStep:
    """The same model and step in PyTorch: eager, with scaled_dot_product_attention and the fused AdamW."""

    def __init__(self, config: GPT2Config, tokens: numpy.ndarray, targets: numpy.ndarray, device: str):
        import torch
        from torch import nn

        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU")
        functional, C = nn.functional, config.n_embd

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
                self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
                self.c_fc, self.c_out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

            def forward(self, x: Any) -> Any:
                B, T, _ = x.shape
                heads = (
                    self.c_attn(self.ln_1(x)).view(B, T, 3, config.n_head, C // config.n_head).permute(2, 0, 3, 1, 4)
                )
                mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
                x = x + self.c_proj(mixed.transpose(1, 2).reshape(B, T, C))
                return x + self.c_out(functional.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.n_positions, C)
                self.blocks = nn.Sequential(*(Block() for _ in range(config.n_layer)))
                self.ln_f = nn.LayerNorm(C)
                nn.init.normal_(self.wte.weight, std=0.02)

            def forward(self, tokens: Any, targets: Any) -> Any:
                x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
                logits = self.ln_f(self.blocks(x)) @ self.wte.weight.T
                return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        self.torch, self.device = torch, device
        self.model = Model().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        self.tokens, self.targets = (torch.from_numpy(ids.copy()).to(device) for ids in (tokens, targets))

    def step(self) -> Any:
        loss = self.model(self.tokens, self.targets)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def timed(self, steps: int, tf32: bool) -> float:
        """Seconds a step, by the clock."""
        self.torch.set_float32_matmul_precision("high" if tf32 else "highest")
        self.step()
        self.wait()
        started = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        seconds = (time.perf_counter() - started) / steps
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
        return seconds


def version(number: int) -> str:
    """13020, as CUDA gives it, is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def peak(device: str, tf32: bool) -> float | None:
    """The device's dense peak in TFLOP/s, or None where the table does not have it."""
    spelled = device.replace("-", " ")
    return next((peaks[tf32] for name, peaks in PEAKS.items() if re.search(rf"\b{name}\b", spelled)), None)


def step_figures(
    seconds: float, config: GPT2Config, batch_size: int, block_size: int, device: str, tf32: bool
) -> dict[str, float | None]:
    """Milliseconds, tokens/s, TFLOP/s and MFU (the model's FLOPs over the device's peak) of a step."""
    tokens_per_s = batch_size * block_size / seconds
    tflop_per_s = tokens_per_s * config.flops_per_token(block_size) / 1e12
    limit = peak(device, tf32)
    mfu = None if limit is None else tflop_per_s / limit
    return {"ms": seconds * 1e3, "tokens_per_s": tokens_per_s, "tflop_per_s": tflop_per_s, "mfu": mfu}


def run_checks() -> dict[str, Any]:
    """pytest -m gpu in a process of its own: its exit status, its last line, and the names of what failed."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rfE", "--tb=short", "tests"]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=270)
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, status = f"{_text(error.stdout)}\nnot finished after {error.timeout:.0f} s", 124
    lines = output.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if status:
        print("\n".join(lines[-150:]))
    return {"status": status, "last_line": lines[-1], "failed": failed, "seconds": time.perf_counter() - started}


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def table(record: dict[str, Any]) -> list[str]:
    """The record in a few lines."""
    results, lines = record["results"], []
    lines.append(
        f"{record['device']}, driver for CUDA {record['driver']}, CUDA {record['cuda']}, CuPy {record['cupy']}, "
        f"{record['date']}"
    )
    if record["checks"]:
        lines.append(f"checks     {record['checks']['last_line']}")
        lines += [f"           {line}" for line in record["checks"]["failed"]]
    if "launch" in results:
        launch = results["launch"]
        lines.append(f"launch     add {launch['add_us']:.1f} us, matmul {launch['matmul_us']:.1f} us")
    if "copy" in results:
        rates = results["copy"]
        lines.append(
            f"copy       to device {rates['to_device_gb_per_s']:.1f}, to host {rates['to_host_gb_per_s']:.1f}, "
            f"within {rates['within_gb_per_s']:.0f} GB/s"
        )
    if "product" in results:
        rates = results["product"]
        lines.append(
            f"product    float32 {rates['float32_tflop_per_s']:.1f}, TF32 {rates['tf32_tflop_per_s']:.1f} TFLOP/s"
        )
    if "step" in results:
        step = results["step"]
        lines.append(f"step, {step['batch_size']} x {step['block_size']} tokens    ms  tokens/s  TFLOP/s   MFU")
        for kind in ("float32", "torch_float32", "tf32", "torch_tf32"):
            if kind in step:
                figures = step[kind]
                mfu = "    ?" if figures["mfu"] is None else f"{figures['mfu']:5.1%}"
                lines.append(
                    f"  {kind:18}{figures['ms']:10.1f}{figures['tokens_per_s']:10,.0f}"
                    f"{figures['tflop_per_s']:9.1f} {mfu}"
                )
        if "torch_error" in step:
            lines.append(f"  PyTorch: {step['torch_error']}")
    if "operations" in results:
        slowest = [(name, ms) for name, ms in results["operations"].items() if name != "batch_size"][:6]
        lines.append("slowest    " + ", ".join(f"{name} {ms:.1f}" for name, ms in slowest) + " ms")
    return lines + [f"FAILED     {name}: {error}" for name, error in record["errors"].items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute or two: smaller sizes, fewer repetitions")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/gpu-DEVICE-DATE.json beside this)")
    options = parser.parse_args(arguments)
    try:
        get_backend("cuda")
    except ValueError as error:
        print(f"no GPU: {error}", file=sys.stderr)
        return 1
    print("running pytest -m gpu ...", flush=True)
    return measure(QUICK if options.quick else FULL, options.out, run_checks())


def measure(sizes: Sizes, out: Path | None, checks: dict[str, Any] | None, torch_device: str = "cuda") -> int:
    """Run every part, write the JSON and print the table; 0 where nothing failed, else 1."""
    bench = Bench(sizes, torch_device)
    bench.run()
    record = {**bench.device(), "checks": checks, "results": bench.results, "errors": bench.errors}
    record["sizes"] = asdict(sizes)
    if out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
        out = RESULTS / f"gpu-{slug}-{record['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"written to {out}\n", *table(record), sep="\n", flush=True)
    return 1 if bench.errors or (checks and checks["status"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
