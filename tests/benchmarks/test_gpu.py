"""The arithmetic of the GPU benchmark, and all of its parts at a tiny size with the stand-in for CuPy."""

import json
import re
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from tests.benchmarks import gpu
from tests.stand_ins import strict_cupy
from tinygrad2 import reference
from tinygrad2.backend import Cuda, CudaBackend

TINY = gpu.Sizes(
    GPT2Config(vocab_size=31, n_positions=8, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0),
    block_size=8,
    precisions=("float32", "tf32"),
    batch_sizes=(4, 2),
    wide_batch_sizes=(3, 1),
    steps=2,
    rounds=2,
    launches=3,
    copy_bytes=1 << 12,
    matrix=16,
    repeats=2,
    new_tokens=5,
    tested=(GPT2Config(vocab_size=21, n_positions=6, n_embd=8, n_layer=1, n_head=1),),
    compiled=False,
)
PARTS = set(gpu.LIMITS)
CHECKS = {"status": 0, "last_line": "7 passed in 1.00s", "failed": []}
KINDS = ("forward", "dgrad", "wgrad")


class Gemm:
    """Matrix products with the signature of tinygrad2.kernels.gemm.Gemm."""

    def __init__(self, np):
        self.np = np

    def __call__(self, a, b, out=None, *, transpose_a=False, transpose_b=False, accumulate=False):
        product = self.np.matmul(a.T if transpose_a else a, b.T if transpose_b else b)
        assert product.shape == out.shape
        out[...] = out + product if accumulate else product
        return out


@pytest.fixture
def device(monkeypatch):
    """The stand-in for CuPy. It supports neither TF32 nor cublasLt."""
    monkeypatch.setattr(CudaBackend, "unsupported_reason", lambda *arguments: None)
    monkeypatch.setitem(sys.modules, "tinygrad2.kernels.gemm", types.SimpleNamespace(Gemm=Gemm))
    with strict_cupy.registered() as counters:
        yield counters


def each_part(part):
    """Run a part with its own Bench, as in its own process."""
    if part == "checks":
        return {"results": {"checks": CHECKS}, "errors": {}}
    return gpu.Bench(TINY, "cpu").run(part)


def test_limits_of_the_parts_fit_the_total_limits():
    assert list(gpu.LIMITS)[:7] == ["compile", "gemm", "attention", "checks", "step", "kernels", "decode"]
    assert sum(gpu.LIMITS.values()) <= gpu.SECONDS < 600
    assert max(gpu.LIMITS.values()) <= gpu.ONLY_SECONDS
    assert PARTS - {"checks"} <= set(dir(gpu.Bench))


def test_step_figures():
    config = GPT2Config()
    figures = gpu.step_figures(0.5, config, 16, 1024, 67.0)
    assert (figures["ms"], figures["tokens_per_s"]) == (500, 32768)
    assert figures["tflop_per_s"] == pytest.approx(32768 * config.flops_per_token(1024) / 1e12)
    assert figures["mfu"] == pytest.approx(figures["tflop_per_s"] / 67)
    assert gpu.step_figures(0.5, config, 16, 1024, None)["mfu"] is None


def test_floors_of_an_h200(device, monkeypatch):
    monkeypatch.setattr(Cuda, "gpu_name", lambda self: "NVIDIA H200")
    bench = gpu.Bench(replace(TINY, precisions=("bfloat16",)))
    assert bench.floor(4.3e12, 0) == pytest.approx(1, rel=0.01)
    assert bench.floor(4.3e12, 2 * 790e12) == pytest.approx(2, rel=0.01)
    assert bench.against_floor(4.0, 4.32e12, 8e12) == pytest.approx(
        {"ms": 4000, "predicted_ms": None, "tflop_per_s": 2, "gb_per_s": 1080, "floor_ms": 1000, "share": 0.25}
    )


def test_every_predicted_kernel_of_a_step_is_measured(device, monkeypatch):
    """For an H200, the time of a step of the 124M model is predicted, for kernels that the benchmark measures."""
    monkeypatch.setattr(Cuda, "gpu_name", lambda self: "NVIDIA H200")
    bench = gpu.Bench(replace(TINY, model=gpu.NO_DROPOUT, block_size=1024, precisions=("bfloat16",)))
    predicted = bench.predicted_step("bfloat16", 64)
    assert sum(predicted.values()) == pytest.approx(120, rel=0.03)
    assert predicted["linear_forward"] + predicted["linear_backward"] == pytest.approx(55, rel=0.1)
    assert predicted.keys() <= {*gpu.CHANGED, *reference_names(), "outside"}
    assert predicted["outside"] < 2
    assert bench.predicted_step("float64", 64) is None


def reference_names():
    return {name for name in vars(reference) if re.search(gpu.KERNEL, name)}


def test_bytes_and_flops_of_a_kernel_call():
    B, T, C, V = 2, 3, 4, 11
    x, dy, weight, dbias = np.zeros((B, T, C)), np.zeros((B, T, 8)), np.zeros((C, 8)), np.zeros(8)
    moved = x.nbytes + dy.nbytes + weight.nbytes
    assert gpu.cost("linear_forward", (x, weight, None), dy) == (moved, 2 * B * T * C * 8)
    gradients = weight.nbytes + dbias.nbytes
    into = (dy, x, weight, np.zeros((C, 8)), dbias)
    assert gpu.cost("linear_backward", into, x) == (moved + x.nbytes + 2 * gradients, 4 * B * T * C * 8)
    assert gpu.cost("linear_backward", (dy, x, weight, None, None), x) == (moved + x.nbytes, 4 * B * T * C * 8)
    qkv, lse = np.zeros((B, T, 3 * C)), np.zeros((B, 2, T))
    assert gpu.cost("attention_forward", (qkv, 2, 0.0, None), (x, lse)) == (
        4 * x.nbytes + lse.nbytes,
        2 * B * T * T * C,
    )
    given = (x, qkv, x, lse, 2, 0.0, None)
    assert gpu.cost("attention_backward", given, qkv) == (8 * x.nbytes + lse.nbytes, 5 * B * T * T * C)
    wte, targets, dlogits = np.zeros((V, C)), np.zeros((B, T), np.int64), np.zeros((B * T, V))
    flops = 2 * B * T * C * V
    assert gpu.cost("lm_head_forward", (x, wte, targets), (np.float64(0), dlogits))[1] == flops
    assert gpu.cost("lm_head_backward", (np.float64(1), dlogits, x, wte, wte), x)[1] == 2 * flops
    few = np.zeros((1, 2), np.int64)  # two rows of the embedding are read, not all eleven
    assert gpu.cost("embedding_forward", (few, wte, None, 0), np.zeros((1, 2, C)))[0] == 16 + 2 * 64
    flat = np.zeros(5)  # AdamW reads four arrays and writes three of them
    assert gpu.cost("adamw_step", (flat, flat, flat, flat, 0.1), None) == (7 * flat.nbytes, 0)


def test_a_prediction_needs_no_gpu(capsys):
    assert gpu.main(["--predict", "NVIDIA H200"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"H200, bfloat16, 65,536 tokens: 1[12]\d\.\d ms, 5\d\d,\d{3} tokens/s\n", printed)
    assert re.search(r"  4\.\d\d  attention's backward pass in one kernel", printed)
    assert gpu.main(["--predict", "T4"]) == 0
    assert capsys.readouterr().out.startswith("T4, float32, ")
    with pytest.raises(ValueError, match="'Voodoo' is not known; choose one of B200, H200"):
        gpu.main(["--predict", "Voodoo"])


def test_versions():
    assert (gpu.version(13020), gpu.version(12090)) == ("13.2", "12.9")


def test_all_parts_run_and_are_recorded(device, tmp_path, capsys):
    out = tmp_path / "deep" / "gpu.json"
    assert gpu.measure(TINY, out, each_part) == 0
    record = json.loads(out.read_text())
    assert record["errors"] == {}
    results = record["results"]
    assert results.keys() == PARTS
    assert {"device", "driver", "cuda", "cupy", "torch", "date", "sizes"} <= record.keys()
    assert results["compile"].keys() == {"float32", "tf32"}
    rows = results["step"] + results["wide_step"]
    assert [(row["precision"], row["batch_size"]) for row in rows] == [("float32", 4), ("float32", 2), ("tf32", 3)]
    assert rows[0]["ours"]["tokens_per_s"] == pytest.approx(32 / rows[0]["ours"]["ms"] * 1e3)
    kernels = results["kernels"]["kernels"]
    assert {"attention_backward", "lm_head_forward", "adamw_step", "squared_norm"} <= kernels.keys()
    assert kernels["linear_backward"]["calls"] == 4 * 2
    assert kernels["adamw_step"]["calls"] == 2
    assert sum(row["ms"] for row in kernels.values()) + results["kernels"]["outside_ms"] == pytest.approx(
        results["kernels"]["ms"]
    )
    names = [f"{layer} {kind}" for layer in ("qkv", "proj", "up", "down", "head") for kind in KINDS]
    assert list(results["gemm"]) == names
    assert {"forward", "backward"} <= results["attention"].keys()
    assert results["decode"].keys() == {"float32 ordinary", "float32 fused"}
    printed = capsys.readouterr().out
    assert re.search(r"\n  tf32 x 3 +ours +[\d.]+ +[\d,]+ +[\d.]+ +\?\n", printed)
    assert re.search(r"\n  adamw_step +x2 +[\d.]+ +\? +\? +\? +0\.0 +[\d]+\n", printed)
    assert re.search(r"generate   float32 ordinary [\d,]+ of \? tokens/s +\?\n", printed)
    assert "checks     7 passed" in printed


def test_shares_of_the_peak_are_printed_if_the_gpu_is_known(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Cuda, "gpu_name", lambda self: "NVIDIA H200")
    monkeypatch.setattr(gpu, "import_torch", broken)
    assert gpu.measure(TINY, tmp_path / "gpu.json", each_part) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert 0 < results["step"][0]["ours"]["mfu"] < 1
    assert results["step"][0]["predicted_ms"] > 0
    assert results["wide_step"][0]["predicted_ms"] > 0
    decode = results["decode"]
    assert all(0 < row["share"] < 1 for row in decode.values())
    attention = {name: row for name, row in results["attention"].items() if name != "torch_error"}
    tokens = {name: row["token"] for name, row in decode.items()}
    for rows in (results["kernels"]["kernels"], results["gemm"], attention, tokens):
        assert all(0 < row["share"] < 1 for row in rows.values())
        assert all(row["predicted_ms"] > 0 for row in rows.values())
    assert results["attention"]["torch_error"] == "RuntimeError: not today"
    assert "  PyTorch: RuntimeError: not today\n" in capsys.readouterr().out


def broken(*given):
    raise RuntimeError("not today")


def test_a_part_that_fails_does_not_affect_other_parts(device, tmp_path, capsys, monkeypatch):
    def copy(self):
        raise RuntimeError("no copies today")

    monkeypatch.setattr(gpu.Bench, "copy", copy)
    monkeypatch.setattr(gpu, "import_torch", broken)
    assert gpu.measure(TINY, tmp_path / "gpu.json", each_part) == 1
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["errors"] == {"copy": "RuntimeError: no copies today"}
    assert record["results"].keys() == PARTS - {"copy"}
    assert record["results"]["step"][0]["torch_error"] == "RuntimeError: not today"
    assert capsys.readouterr().out.endswith("FAILED     copy: RuntimeError: no copies today\n")


def test_a_precision_that_fails_does_not_affect_other_precisions(device, monkeypatch):
    original = gpu.Bench.our_step

    def our_step(self, precision, batch_size):
        if precision == "float32":
            raise ValueError("it needs a GPU\nand more")
        return original(self, precision, batch_size)

    monkeypatch.setattr(gpu.Bench, "our_step", our_step)
    bench = gpu.Bench(TINY, "cpu")
    rows = bench.step() + bench.wide_step()
    assert [row.get("error") for row in rows] == ["ValueError: it needs a GPU"] * 2 + [None]
    assert bench.errors == dict.fromkeys(["step float32 4", "step float32 2"], "ValueError: it needs a GPU")


def test_a_batch_that_does_not_fit_is_skipped(device, monkeypatch):
    original = GPT2.loss

    def small_memory(self, tokens, targets):
        if len(tokens) > 2:
            raise MemoryError("Out of memory")
        return original(self, tokens, targets)

    monkeypatch.setattr(GPT2, "loss", small_memory)
    bench = gpu.Bench(TINY, "cpu")
    rows = bench.step() + bench.wide_step()
    assert [(row["precision"], row["batch_size"]) for row in rows if "ours" in row] == [("float32", 2), ("tf32", 1)]
    assert [row["error"] for row in rows if "ours" not in row] == ["out of memory"] * 2
    assert bench.errors == {}
    assert bench.kernels()["batch_size"] == 2


def test_watched_kernels_are_restored(device):
    bench = gpu.Bench(TINY)
    before = dict(vars(bench.backend.kernels))
    bench.kernels()
    assert dict(vars(bench.backend.kernels)) == before


@pytest.mark.parametrize("count", [1, 7, (1 << 20) + 5])
def test_random_arrays_repeat_a_block(device, count):
    values = gpu.Bench(TINY).array(count).get()
    block = np.random.default_rng(0).standard_normal(min(count, 1 << 20), dtype=np.float32)
    np.testing.assert_array_equal(values, np.resize(block, count))


@pytest.mark.extras("torch")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pytorch_computes_the_same_model(precision):
    import torch

    tokens = np.random.default_rng(0).integers(31, size=(2, 9))
    theirs = gpu.TorchStep(TINY.model, tokens[:, :-1], tokens[:, 1:], "cpu", precision, compiled=False)
    ours = GPT2(TINY.model)
    with torch.no_grad():
        for (name, p), parameter in zip(ours.named_parameters(), theirs.model.parameters(), strict=True):
            values = torch.from_numpy(p.numpy().T.copy() if ".c_" in name and p.ndim > 1 else p.numpy())
            parameter[: len(values)] = values
            parameter[len(values) :] = 0  # the padding of the vocabulary
    padding = 0 if precision == "float32" else (64 - 31)
    logits = ours(tokens[:, :-1]).numpy().astype(np.float64)
    total = np.exp(logits).sum(-1) + padding  # the logits of the padding are 0
    picked = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    assert theirs.step().item() == pytest.approx(np.mean(np.log(total) - picked), rel=1e-5 if not padding else 1e-2)


def test_results_of_a_step_are_saved_at_once(device, monkeypatch):
    class Killed:
        def __init__(self, *given):
            """Replaces TorchStep, because PyTorch may not be installed."""

        def timed(self, steps):
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "TorchStep", Killed)
    kept = []
    bench = gpu.Bench(TINY, "cpu", keep=lambda found: kept.append(json.loads(json.dumps(found))))
    with pytest.raises(KeyboardInterrupt):
        bench.run("step")
    (row,) = kept[-1]["results"]["step"]
    assert row["ours"]["ms"] > 0


def test_pytorch_is_skipped_if_no_time_is_left(device):
    bench = gpu.Bench(TINY, "cpu", seconds=0)
    assert {row["torch_error"] for row in bench.step()} == {"TimeoutError: no time left"}


def test_attention_is_reported_if_pytorch_fails(device, monkeypatch):
    monkeypatch.setattr(gpu.TorchAttention, "timed", broken)
    found = gpu.Bench(TINY, "cpu").run("attention")
    assert found["errors"] == {}
    assert found["results"]["attention"].keys() == {"torch_error", "forward", "backward"}


def test_results_of_a_kernel_are_kept_if_the_next_kernel_fails(device, monkeypatch):
    monkeypatch.setattr(gpu, "import_torch", broken)
    bench = gpu.Bench(TINY)
    original, times = bench.timed, []

    def timed(function, repeats):
        times.append(repeats)
        return broken() if len(times) > TINY.rounds else original(function, repeats)

    monkeypatch.setattr(bench, "timed", timed)
    found = bench.run("attention")
    assert found["errors"] == {"attention": "RuntimeError: not today"}
    assert found["results"]["attention"].keys() == {"torch_error", "forward"}


def test_figures_are_kept_if_memory_cannot_be_freed(device, monkeypatch):
    monkeypatch.setattr(gpu.Bench, "release", broken)
    found = gpu.Bench(TINY).run("launch")
    assert found["errors"] == {"launch": "RuntimeError: not today"}
    assert found["results"]["launch"]["add_us"] > 0


PROCESS = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text(json.dumps({"results": {"step": [1]}, "errors": {}}))
"""


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        ("", None),
        ("sys.exit(3)", "its process ended with status 3"),
        ("import os; os.kill(os.getpid(), 11)", "its process ended with status -11"),
        pytest.param("time.sleep(100)", "not finished after 11 s", marks=pytest.mark.slow),
        ("out.unlink()", "its process wrote no figures"),
    ],
)
def test_a_part_in_a_process(monkeypatch, tmp_path, ending, error):
    script, run = tmp_path / "part.py", subprocess.run
    script.write_text(PROCESS + ending)
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, timeout: run(command, timeout=timeout / 5))
    found = gpu.in_a_process("step", 11.0, quick=True)
    assert found["errors"] == ({} if error is None else {"step": error})
    assert found["results"] == ({} if "unlink" in ending else {"step": [1]})


def test_a_part_is_not_started_if_no_time_is_left(tmp_path):
    found = gpu.in_a_process("step", 9.0, quick=False)
    assert found == {"results": {}, "errors": {"step": "no time left"}}


def test_process_of_a_part_writes_its_figures(device, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "QUICK", TINY)
    out = tmp_path / "found.json"
    assert gpu.main(["--quick", "--part", "launch", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["results"]["launch"].keys() == {"add_us", "matmul_us"}
    assert list(tmp_path.iterdir()) == [out]


def test_only_selected_parts_run(device, tmp_path, monkeypatch):
    asked = []

    def process(part, seconds, quick, precision=None):
        asked.append((part, round(seconds), quick, precision))
        return {"results": {}, "errors": {}}

    monkeypatch.setattr(gpu, "in_a_process", process)
    monkeypatch.setattr(gpu, "run_checks", broken)
    assert gpu.main(["--only", "step", "gemm", "--out", str(tmp_path / "gpu.json")]) == 0
    assert asked == [(part, gpu.LIMITS[part], False, None) for part in ("gemm", "step")]
    asked.clear()
    assert gpu.main(["--only", "compile", "step", "--seconds", "30", "--out", str(tmp_path / "gpu.json")]) == 0
    assert sorted(asked[:-1]) == [("compile", 30, False, name) for name in ("bfloat16", "float32", "tf32")]
    assert asked[-1] == ("step", 30, False, None)


def test_a_failed_compilation_does_not_affect_other_precisions(device, monkeypatch):
    def process(part, seconds, quick, precision):
        if precision == "tf32":
            return {"results": {}, "errors": {part: "not finished after 90 s"}}
        return {"results": {part: {precision: 1.5}}, "errors": {}}

    monkeypatch.setattr(gpu, "in_a_process", process)
    found = gpu.compile_together(("bfloat16", "float32", "tf32"), 90, quick=False)
    assert found["results"] == {"compile": {"bfloat16": 1.5, "float32": 1.5}}
    assert found["errors"] == {"compile tf32": "not finished after 90 s"}


def test_failed_checks_are_recorded_as_an_error(monkeypatch):
    monkeypatch.setattr(gpu, "run_checks", lambda seconds: {**CHECKS, "status": 1, "last_line": "1 failed"})
    assert gpu.checks(100)["errors"] == {"checks": "1 failed"}
    assert gpu.checks(5) == {"results": {}, "errors": {"checks": "no time left"}}


@pytest.mark.parametrize("written", [b"1 passed\n", "1 passed\n", None])
def test_checks_that_take_too_long_are_stopped(monkeypatch, written):
    def late(*arguments, timeout, **keywords):
        raise subprocess.TimeoutExpired("pytest", timeout, output=written)

    monkeypatch.setattr(gpu.subprocess, "run", late)
    checks = gpu.run_checks(240)
    assert (checks["status"], checks["last_line"], checks["failed"]) == (124, "not finished after 240 s", [])


def test_failed_checks_are_listed_by_name(monkeypatch, capsys):
    output = (
        "....F\nE  assert 1 == 2\nPASSED tests/x.py::test_x\nFAILED tests/x.py::test_y - assert 1 == 2\n"
        "1 failed, 4 passed in 0.1s\n"
    )
    done = subprocess.CompletedProcess("pytest", 1, output)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *arguments, **keywords: done)
    checks = gpu.run_checks(240)
    assert (checks["status"], checks["last_line"]) == (1, "1 failed, 4 passed in 0.1s")
    assert checks["failed"] == ["FAILED tests/x.py::test_y - assert 1 == 2"]
    printed = capsys.readouterr().out
    assert "E  assert 1 == 2" in printed
    assert "PASSED" not in printed


LOSING = """
import pytest
from tests.gpt2 import test_gpu
from tests.gpt2.test_gpu import cuda

class Lost:
    class np:
        class cuda:
            def get_current_stream():
                return Lost
    failing = []
    def synchronize():
        if Lost.failing:
            raise RuntimeError("cudaErrorIllegalAddress")

test_gpu.get_backend = lambda name: Lost
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_it(cuda, number):
    if number in (2, 4):
        Lost.failing.append(number)
    assert number != 4
"""


@pytest.mark.slow
def test_a_test_that_loses_the_gpu_is_reported_and_the_others_run(monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_losing.py").write_text(LOSING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\naddopts = -q -p no:cacheprovider\n")
    monkeypatch.setenv("PYTHONPATH", str(gpu.ROOT))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    checks = gpu.run_checks(240)
    assert (checks["status"], checks["processes"]) == (gpu.GPU_LOST, 3)
    assert [line.split("]")[0] for line in checks["failed"]] == [
        "ERROR tests/test_losing.py::test_it[2",
        "FAILED tests/test_losing.py::test_it[4",
        "ERROR tests/test_losing.py::test_it[4",
    ]
    assert checks["last_line"].startswith("1 passed")


def test_a_missing_gpu_is_reported(monkeypatch, capsys):
    def missing(device):
        raise ValueError("device 'cuda': CuPy is not installed")

    monkeypatch.setattr(gpu, "get_backend", missing)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "no GPU: device 'cuda': CuPy is not installed\n"
