"""The benchmark's arithmetic, and the whole of it at a tiny size on the stand-in for CuPy."""

import json
import re
import subprocess

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from tests import strict_cupy
from tests.benchmarks import gpu

TINY = gpu.Sizes(
    GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0),
    block_size=8,
    batch_sizes=(4, 2),
    steps=2,
    rounds=2,
    launches=3,
    copy_bytes=1 << 12,
    matrix=16,
    repeats=2,
)


@pytest.fixture
def device():
    with strict_cupy.registered() as counters:
        yield counters


def test_the_peak_is_that_of_the_device():
    assert gpu.peak("NVIDIA H200", tf32=True) == 494.5
    assert gpu.peak("NVIDIA H100 80GB HBM3", tf32=False) == 67.0
    assert gpu.peak("NVIDIA H100 PCIe", tf32=True) == 378.0
    assert gpu.peak("NVIDIA A100-SXM4-80GB", tf32=False) == 19.5
    assert gpu.peak("NVIDIA L40S", tf32=False) == 91.6
    assert gpu.peak("NVIDIA L4", tf32=False) == 30.3
    assert gpu.peak("Tesla T4", tf32=False) is None


def test_step_figures():
    config = GPT2Config()
    figures = gpu.step_figures(0.5, config, 16, 1024, "NVIDIA H200", False)
    assert (figures["ms"], figures["tokens_per_s"]) == (500, 32768)
    assert figures["tflop_per_s"] == pytest.approx(32768 * config.flops_per_token(1024) / 1e12)
    assert figures["mfu"] == pytest.approx(figures["tflop_per_s"] / 67)
    assert gpu.step_figures(0.5, config, 16, 1024, "another", True)["mfu"] is None


def test_versions():
    assert (gpu.version(13020), gpu.version(12090)) == ("13.2", "12.9")


def test_the_whole_benchmark(device, tmp_path, capsys):
    out = tmp_path / "deep" / "gpu.json"
    checks = {"status": 0, "last_line": "7 passed in 1.00s", "failed": []}
    assert gpu.measure(TINY, out, checks, torch_device="cpu") == 0
    record = json.loads(out.read_text())
    assert record["errors"] == {}
    assert record["results"].keys() == {"launch", "copy", "product", "step", "operations"}
    assert {"device", "driver", "cuda", "cupy", "date", "checks", "sizes"} <= record.keys()
    step, operations = record["results"]["step"], record["results"]["operations"]
    assert step["batch_size"] == operations["batch_size"] == 4
    assert step["float32"]["tokens_per_s"] == pytest.approx(32 / step["float32"]["ms"] * 1e3)
    assert {"attention_backward", "lm_head_forward", "adamw_step"} <= operations.keys()
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1].startswith("slowest    ")
    assert re.search(r"\n  tf32 +[\d.]+ +[\d,]+ +[\d.]+ +\?\n", printed)
    assert "checks     7 passed" in printed


def test_a_part_that_fails_loses_nothing_else(device, tmp_path, capsys, monkeypatch):
    def broken(self):
        raise RuntimeError("no copies today")

    monkeypatch.setattr(gpu.Bench, "copy", broken)
    broken.__name__ = "copy"
    monkeypatch.setattr(gpu.TorchStep, "__init__", lambda *given: broken(None))
    assert gpu.measure(TINY, tmp_path / "gpu.json", None) == 1
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["errors"] == {"copy": "RuntimeError: no copies today"}
    assert record["results"].keys() == {"launch", "product", "step", "operations"}
    assert record["results"]["step"]["torch_error"] == "RuntimeError: no copies today"
    assert capsys.readouterr().out.endswith("FAILED     copy: RuntimeError: no copies today\n")


def test_the_largest_batch_that_fits_is_taken(device, monkeypatch):
    right = GPT2.loss

    def small_memory(self, tokens, targets):
        if len(tokens) > 2:
            raise MemoryError("Out of memory")
        return right(self, tokens, targets)

    monkeypatch.setattr(GPT2, "loss", small_memory)
    assert gpu.Bench(TINY, "cpu").step()["batch_size"] == 2


def test_the_kernels_are_as_they_were_afterwards(device):
    bench = gpu.Bench(TINY)
    before = dict(vars(bench.backend.kernels))
    bench.operations()
    assert dict(vars(bench.backend.kernels)) == before


def test_pytorch_computes_the_same_model():
    torch = pytest.importorskip("torch")
    tokens = np.random.default_rng(0).integers(31, size=(2, 9))
    theirs = gpu.TorchStep(TINY.model, tokens[:, :-1], tokens[:, 1:], "cpu")
    ours = GPT2(TINY.model)
    names = {"ln_1": "ln_1", "ln_2": "ln_2", "c_attn": "attn.c_attn", "c_proj": "attn.c_proj", "c_fc": "mlp.c_fc",
             "c_out": "mlp.c_proj"}  # fmt: skip
    values = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.model.named_parameters():
            kind, _, rest = name.partition(".")
            layer, _, rest = rest.partition(".")
            part, _, last = rest.partition(".")
            ours_name = f"h.{layer}.{names[part]}.{last}" if kind == "blocks" else name
            array = values.pop(ours_name).numpy()
            linear = "c_" in ours_name and last == "weight"  # PyTorch keeps (out, in)
            parameter.copy_(torch.from_numpy(array.T.copy() if linear else array))
    assert not values
    assert theirs.step().item() == pytest.approx(ours.loss(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-5)


@pytest.mark.parametrize("written", [b"1 passed\n", "1 passed\n", None])
def test_checks_that_take_too_long_are_given_up(monkeypatch, written):
    def late(*arguments, timeout, **keywords):
        raise subprocess.TimeoutExpired("pytest", timeout, output=written)

    monkeypatch.setattr(gpu.subprocess, "run", late)
    checks = gpu.run_checks()
    assert (checks["status"], checks["last_line"], checks["failed"]) == (124, "not finished after 270 s", [])


def test_checks_that_fail_are_named(monkeypatch, capsys):
    output = "....F\nE  assert 1 == 2\nFAILED tests/x.py::test_y - assert 1 == 2\n1 failed, 4 passed in 0.1s\n"
    done = subprocess.CompletedProcess("pytest", 1, output, "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **keywords: done)
    checks = gpu.run_checks()
    assert (checks["status"], checks["last_line"]) == (1, "1 failed, 4 passed in 0.1s")
    assert checks["failed"] == ["FAILED tests/x.py::test_y - assert 1 == 2"]
    assert "E  assert 1 == 2" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    def missing(device):
        raise ValueError("device 'cuda': CuPy is not installed")

    monkeypatch.setattr(gpu, "get_backend", missing)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "no GPU: device 'cuda': CuPy is not installed\n"
