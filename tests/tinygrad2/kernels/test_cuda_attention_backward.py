"""kernels/attention_backward.cu on the simulator, compared with reference.py in float64 on the same bfloat16 inputs."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim
from tests.stand_ins.faults import inject_in
from tests.tinygrad2.kernels.attention import A100, H200, L4, kernels
from tinygrad2 import reference
from tinygrad2.kernels import cuda
from tinygrad2.random import Key

pytestmark = pytest.mark.slow  # compiles about a dozen kernels; test_cuda.py runs each of them too

KEY = Key(seed=2**40 + 5, step=3, first_sample=2, site=1)


def problem(B, T, H, D, key, rate=0.25, seed=0):
    """The arguments in bfloat16, and the results of the reference in float64."""
    rng = np.random.default_rng(seed)
    qkv = (1.5 * rng.standard_normal((B, T, 3 * H * D))).astype(bfloat16)
    dout = rng.standard_normal((B, T, H * D)).astype(bfloat16)
    wide = qkv.astype(np.float64)
    out, lse = reference.attention_forward(wide, H, rate, key)
    saved = out.astype(bfloat16), lse.astype(np.float32)
    want = reference.attention_backward(
        dout.astype(np.float64), wide, *(x.astype(np.float64) for x in saved), H, rate, key
    )
    return (dout, qkv, *saved, H, rate, key), want


def error(got, want):
    """The largest relative error of dQ, dK and dV, by their norms."""
    parts = zip(np.split(got.astype(np.float64), 3, axis=-1), np.split(want, 3, axis=-1), strict=True)
    # If a gradient is zero except for rounding (one key has all the weight), the other gradients determine the scale.
    return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 0.1 * np.linalg.norm(want)) for a, b in parts)


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "dropout"),
    [
        (2, 1, 1, 16, False),
        (2, 1, 1, 16, True),
        (2, 64, 3, 16, True),
        (1, 130, 1, 16, False),
        (1, 37, 1, 16, True),  # rows that are not aligned to groups of four elements
        pytest.param(1, 130, 2, 64, False, marks=pytest.mark.slow),  # slow to compile
        pytest.param(1, 37, 3, 64, True, marks=pytest.mark.slow),
        pytest.param(1, 140, 2, 64, True, marks=pytest.mark.slow),
        pytest.param(1, 200, 1, 80, True, marks=pytest.mark.slow),
        pytest.param(1, 72, 1, 128, False, marks=pytest.mark.slow),
    ],
)
def test_backward_agrees_with_the_reference(B, T, H, D, dropout):
    arguments, want = problem(B, T, H, D, KEY if dropout else None)
    before = [x.copy() for x in arguments[:4]]
    got = kernels().attention_backward(*arguments)
    assert got.dtype == bfloat16
    assert got.shape == want.shape
    assert error(got, want) < 1e-2
    assert all(np.array_equal(x, y) for x, y in zip(before, arguments[:4], strict=True))


@pytest.mark.parametrize(
    ("processor", "D", "streams"),
    [(H200, 64, (64, 64)), (A100, 64, (64, 64)), (L4, 64, (32, 16)), (L4, 80, (32, 32)), (H200, 128, (32, 32))],
)
def test_two_blocks_fit_on_a_multiprocessor(processor, D, streams):
    sizes = cuda.AttentionSizes.backward(D, processor).values()
    assert tuple(size.stream for size in sizes) == streams
    assert all(2 * (size.shared + 1024) <= processor.shared_memory for size in sizes)


def test_one_block_uses_larger_tiles_if_two_do_not_fit():
    for size in cuda.AttentionSizes.backward(128, L4).values():
        assert size.stream == 32
        assert size.shared + 1024 <= L4.shared_memory < 2 * (size.shared + 1024)


@pytest.mark.parametrize("D", [64, 80])
def test_backward_with_smaller_tiles(D):
    arguments, want = problem(1, 140, 1, D, KEY)
    assert error(kernels(processor=L4).attention_backward(*arguments), want) < 1e-2


def test_gradients_are_bit_identical_with_every_schedule(monkeypatch):
    arguments, _ = problem(1, 140, 2, 16, KEY)
    results = []
    for schedule in range(4):
        monkeypatch.setattr(cudasim, "schedule", schedule)
        results.append(kernels().attention_backward(*arguments).view(np.uint16))
    assert all(np.array_equal(results[0], result) for result in results[1:])


def test_other_dtypes_and_head_sizes_use_the_reference():
    arguments, want = problem(1, 5, 2, 8, None)
    wide = [x.astype(np.float32) for x in arguments[:4]]
    assert (
        error(kernels(reference).attention_backward(*wide, *arguments[4:]), want) < 1e-2
    )  # `out` was rounded to bfloat16
    calls = SimpleNamespace(attention_backward=lambda *a: "reference")
    assert cuda.CudaKernels(np, calls).attention_backward(*arguments) == "reference"


BOTH = "attention_backward_kv, attention_backward_q"
FAULTS = [
    ("hide_later_keys", "> first_query +", ">= first_query +"),
    ("attention_backward_kv", "first_query < warp_key + 16 * M - 1", "first_query < warp_key"),
    ("attention_backward_q", "first_key + CHUNK - 1 > warp_query", "first_key > warp_query"),
    (BOTH, "cp_async_wait<0>", "cp_async_wait<1>"),
    (BOTH, "cp_async_wait<0>(); __syncthreads();", "__syncthreads(); cp_async_wait<0>();"),
    ("attention_backward_kv", "dp * keep_scale : 0.f", "dp : 0.f"),
    (BOTH, "first_sample * H + head", "head"),
    ("attention_backward_kv", "kept[m][n] >> e & 1 ? p[m]", "true ? p[m]"),
    ("dropout_keeps_transposed", "group, lane / 16 * 16 + i * 4", "group, i * 4"),
    ("store_rows", "__syncwarp();", ""),
    ("attention_backward_kv", "first_query + CHUNK <= warp_key", "first_query <= warp_key"),
    (
        "attention_backward_kv",
        "(stage ^ 1) * 2 * STREAM + threadIdx.x] = next",
        "stage * 2 * STREAM + threadIdx.x] = next",
    ),
    ("attention_backward_q", "(dp - d[m][e / 2])", "(dp - d[m][e % 2])"),
    ("attention_backward_kv", "DROPOUT ? keep_scale : 1.f", "1.f"),
    ("attention_backward_kv", "__syncthreads();", ""),
    ("attention_backward_q", "__syncthreads();", ""),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(monkeypatch, fault):
    inject_in(monkeypatch, "attention_backward", fault)
    arguments, want = problem(1, 140, 1, 16, KEY)  # three tiles, so that both stages are reused
    results = []
    for schedule in range(3):
        monkeypatch.setattr(cudasim, "schedule", schedule)
        try:
            results.append(kernels().attention_backward(*arguments))
        except RuntimeError:
            return
    wrong = any(not error(got, want) < 1e-2 for got in results)  # also true for NaN
    assert wrong or any(not np.array_equal(results[0].view("u2"), got.view("u2")) for got in results[1:])
