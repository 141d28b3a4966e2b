"""gpt2/memory_model.py: the planned memory of a step equals the memory that it allocates."""

import dataclasses
import itertools
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, memory_model
from gpt2.memory_model import Step, largest_batch, needed, pooled, step_memory
from gpt2.training.options import resolve_options
from gpt2.training.setup import build_optimizer
from tests.stand_ins import strict_cupy
from tinygrad2 import Key, memory
from tinygrad2.backend import get_backend
from tinygrad2.distributed import SoloComm
from tinygrad2.kernels import gemm
from tinygrad2.precision import Precision

WITHIN = 0.05
GPT2_124M = GPT2Config.preset("gpt2")


def config(rate, **sizes):
    return GPT2Config(**sizes, embd_pdrop=rate, attn_pdrop=rate, resid_pdrop=rate)


DEEP = {"vocab_size": 3000, "n_positions": 128, "n_embd": 128, "n_layer": 6, "n_head": 4}
WIDE = {"vocab_size": 1000, "n_positions": 64, "n_embd": 768, "n_layer": 2, "n_head": 12}  # recomputes all that it can
FLAT = {"vocab_size": 8000, "n_positions": 512, "n_embd": 192, "n_layer": 1, "n_head": 4}


def train_steps(step, device="cpu", count=2):
    """Train for `count` steps; tracemalloc's peak is then that of the last step."""
    model = GPT2(step.config, 0, device, step.precision, step.recompute, step.head_rows)
    optimizer = build_optimizer(model, resolve_options({"optimizer": step.optimizer}, step.config), SoloComm())
    tokens, targets = np.random.default_rng(0).integers(
        step.config.vocab_size, size=(2, step.batch_size, step.block_size)
    )
    for i in range(count):
        tracemalloc.reset_peak()
        loss = model.backward(tokens, targets, Key(0, i))
        model.backend.fetch(loss, optimizer.step(max_norm=1.0)).get()
        optimizer.zero_grad()


def allocated(step, device="cpu"):
    """The peak number of bytes that a step allocates, in addition to memory that existed before."""
    train_steps(step, device, 1)  # compiles the kernels
    memory.memory_pool.trim()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    train_steps(step, device)
    found = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return found


@pytest.mark.parametrize(
    ("sizes", "recompute", "head_rows", "rate", "optimizer", "dtype"),
    [
        *(
            (DEEP, *choice, "adamw", "float32")
            for choice in itertools.product(("none", "block"), (None, 300), (0, 0.1))
        ),
        *((DEEP, recompute, None, 0, "muon", "float32") for recompute in ("none", "block")),
        *((DEEP, recompute, 300, 0, "sgd", "float64") for recompute in ("none", "block")),
        *((DEEP, recompute, rows, 0, "adamw", "bfloat16") for recompute in ("none", "block") for rows in (None, 300)),
        *((FLAT, recompute, None, 0, "adamw", "float32") for recompute in ("none", "block")),
        *(
            (WIDE, recompute, 100, 0, "sgd", dtype)
            for recompute in ("none", "block")
            for dtype in ("float32", "bfloat16")
        ),
    ],
)
def test_a_step_on_the_cpu_allocates_the_planned_memory(
    sizes, recompute, head_rows, rate, optimizer, dtype, set_threads
):
    if reason := get_backend("cpu").slow_reason(dtype):
        pytest.skip(reason)
    set_threads(2)
    rows = {"batch_size": 8 if sizes is DEEP else 2, "block_size": sizes["n_positions"]}
    kind = {"precision": Precision.of(dtype), "recompute": recompute, "head_rows": head_rows, "optimizer": optimizer}
    step = Step(config(rate, **sizes), **rows, **kind, threads=2)
    planned = needed(step) - step_memory(step)["libraries"]
    assert planned == pytest.approx(allocated(step), rel=WITHIN)


PROCESS = """
import json, sys
from gpt2.memory_model import Step
from gpt2 import GPT2Config
from tests.benchmarks.alternate import peak_memory
from tests.gpt2.test_memory_model import train_steps
from tinygrad2 import threads
threads.set_count(2)
given = json.loads(sys.argv[1])
train_steps(Step(GPT2Config(**given.pop("config")), **given))
print(peak_memory())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_process_uses_the_planned_memory(recompute):
    """The memory of the process, as reported by the operating system, includes Python and the libraries."""
    sizes = {"vocab_size": 20_000, "n_positions": 128, "n_embd": 384, "n_layer": 6, "n_head": 6}
    given = {"config": sizes, "batch_size": 16, "block_size": 128, "recompute": recompute}
    command = [sys.executable, "-c", PROCESS, json.dumps(given)]
    for _ in range(2):  # the first run may compile kernels, which takes memory
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    step = Step(GPT2Config(**sizes), 16, 128, recompute=recompute, threads=2)
    assert needed(step) == pytest.approx(int(output), rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "head_rows", "rate"), [("none", None, 0), ("none", 300, 0.1), ("block", 300, 0.1)]
)
def test_a_step_on_a_gpu_allocates_the_planned_memory(recompute, head_rows, rate, cublaslt, monkeypatch):
    """Uses bfloat16 and the CUDA launchers on the stand-in for CuPy. The stand-in has no memory pool, so live arrays
    are counted."""
    monkeypatch.setattr(gemm, "WORKSPACE", 1 << 20)
    monkeypatch.setattr(memory_model, "WORKSPACE", 0)  # allocated before the measurement
    sizes = config(rate, vocab_size=1000, n_positions=64, n_embd=128, n_layer=3, n_head=2)
    step = Step(sizes, 16, 64, Precision.of("bfloat16"), recompute, head_rows, cuda=True)
    with strict_cupy.registered(plain=False):
        found = allocated(step, "cuda")
    assert needed(step) - step_memory(step)["libraries"] == pytest.approx(found, rel=WITHIN)


def test_state_of_the_124m_model():
    P, bfloat16 = GPT2_124M.n_parameters, Precision.of("bfloat16")
    state = {"weights": 4 * P, "gradients": 4 * P, "moments": 8 * P}
    assert memory_model.state(Step(GPT2_124M, 1, 1024)) == state
    assert memory_model.state(Step(GPT2_124M, 1, 1024, bfloat16))["weights"] == 6 * P
    assert memory_model.state(Step(GPT2_124M, 1, 1024, ranks=8, zero=True))["moments"] == -(-2 * P // 8) * 4
    assert memory_model.state(Step(GPT2_124M, 1, 1024, ranks=8))["moments"] == 8 * P
    assert memory_model.state(Step(GPT2_124M, 1, 1024, optimizer="sgd"))["moments"] == 4 * P
    hidden = sum(np.prod(shape) for name, shape in GPT2_124M.shapes() if ".c_" in name and len(shape) == 2)
    assert memory_model.state(Step(GPT2_124M, 1, 1024, optimizer="muon"))["moments"] == 4 * (2 * P - hidden)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_largest_batch_fits_and_the_next_one_does_not(recompute, cuda):
    step = Step(GPT2_124M, 1, 1024, recompute=recompute, cuda=cuda)
    batch_size = largest_batch(step, 24e9)
    assert batch_size > 1
    sizes = [needed(dataclasses.replace(step, batch_size=n)) for n in (batch_size, batch_size + 1)]
    assert sizes[0] <= 24e9 < sizes[1]
    assert largest_batch(step, 1e9) == 0


def test_constants_equal_those_of_the_engine():
    from tinygrad2 import distributed, params, reference
    from tinygrad2.kernels import cpu, cuda

    assert memory_model.GRANULE == memory.GRANULE == memory.SMALL
    assert memory_model.CHUNK == cpu.ROW_CHUNK
    assert memory_model.BUCKET == params.BUCKET_SIZE
    assert memory_model.RECEIVED == distributed.RECEIVE_BUFFER
    assert memory_model.WORKSPACE == gemm.WORKSPACE
    assert memory_model.QUERY_ROWS == reference.QUERY_ROWS
    assert memory_model.ALIGNED == cuda.VOCABULARY_MULTIPLE


def test_number_of_recomputed_results_per_block():
    def of(cuda=False, **sizes):
        found = memory_model.recomputed(GPT2Config(**{**vars(GPT2_124M), **sizes}), cuda)
        return found["layernorm"], found["gelu"]

    assert of() == (2, 1)
    assert of(cuda=True) == (0, 0)
    assert of(activation_function="gelu") == (2, 0)
    assert [of(n_embd=C, n_head=1) for C in (767, 256, 255, 192, 191)] == [(2, 0), (2, 0), (1, 0), (1, 0), (0, 0)]


@pytest.mark.parametrize(
    ("rows", "itemsize", "head_rows", "cuda", "chunks"),
    [(1024, 4, None, False, 4), (333, 4, None, False, 1), (334, 4, None, False, 2), (1024, 2, None, False, 2),
     (1024, 4, 300, False, 4), (1024, 4, 2000, False, 1), (1024, 4, None, True, 1), (1024, 4, 512, True, 2)],
)  # fmt: skip
def test_number_of_chunks_of_logits(rows, itemsize, head_rows, cuda, chunks):
    config = GPT2Config(vocab_size=50304)
    assert memory_model.head_chunks(config, rows, itemsize, head_rows, cuda) == chunks


def test_sizes_of_memory_pool_blocks():
    assert [pooled(n) for n in (1, 65535, 65536, 65537)] == [1, 65535, 65536, 131072]
