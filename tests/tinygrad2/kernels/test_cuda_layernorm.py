"""kernels/layernorm.cu on the simulator, compared with reference.py in float64 on the same inputs."""

import numpy as np
import pytest

from tests.stand_ins.faults import inject_in
from tests.tinygrad2.kernels.against_reference import (
    BF16,
    F32,
    bits_in,
    check,
    check_fallback,
    check_unaligned,
    fault_is_caught,
    kernels,
    normal,
    wide,
)
from tinygrad2 import reference
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # compiles about a dozen kernels; test_cuda.py runs each of them too


def layernorm_cases(rows, C, dtype):
    """A list of (name, arguments, number of final arguments to which the kernel adds)."""
    x, delta, dy, ds = (normal(rows, C, dtype=dtype, seed=i) for i in range(4))
    x, delta = (np.round(8 * wide(a)).astype(dtype) / dtype.type(8) for a in (x, delta))  # their sum is exact
    weight, bias, dweight, dbias = (normal(C, seed=i) for i in range(4))
    x = x + dtype.type(2)  # a mean that is not close to 0
    _, mean, rstd = (a.astype(F32) for a in reference.layernorm_forward(wide(x), weight, bias, 1e-5))
    return [
        ("layernorm_forward", (x, weight, bias, 1e-5), 0),
        ("add_layernorm_forward", (x, delta, weight, bias, 1e-5), 0),
        ("layernorm_backward", (dy, x, weight, mean, rstd, dweight, dbias), 2),
        ("add_layernorm_backward", (ds, dy, x, weight, mean, rstd, dweight, dbias), 2),
    ]


@pytest.mark.parametrize(
    ("rows", "C", "dtype"),
    [(19, 64, BF16), (5, 800, BF16), (3, 1600, BF16), (9, 21, BF16), (10, 36, F32)],
)
def test_layernorm_agrees_with_the_reference(rows, C, dtype):
    for name, args, added in layernorm_cases(rows, C, dtype):
        check(kernels(), name, args, added)


def test_add_layernorm_normalizes_the_rounded_sum():
    _, (x, _, *rest), _ = layernorm_cases(19, 64, BF16)[1]
    delta = normal(19, 64, dtype=BF16)
    s, *normalized = kernels().add_layernorm_forward(x, delta, *rest)
    assert s.tobytes() == (x + delta).tobytes()
    plain = kernels().layernorm_forward(s, *rest)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(normalized, plain, strict=True))


def test_many_rows_and_three_axes(monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)  # 4 and 2 blocks for 150 rows
    for name, args, added in layernorm_cases(150, 64, BF16) + layernorm_cases(31, 1600, BF16):
        shaped = [a.reshape(1, *a.shape) if isinstance(a, np.ndarray) and a.ndim == 2 else a for a in args]
        check(kernels(), name, shaped, added)


def test_gradients_that_are_not_needed_are_skipped():
    (_, args, _) = layernorm_cases(9, 64, BF16)[2]
    dx = kernels().layernorm_backward(*args)
    for dweight, dbias in [(None, None), (args[5].copy(), None), (None, args[6].copy())]:
        assert check(kernels(), "layernorm_backward", (*args[:5], dweight, dbias), 2)[0].tobytes() == dx.tobytes()


def test_float64_uses_the_reference():
    check_fallback(layernorm_cases(3, 8, F32))


def test_unaligned_matrices_give_the_same_results():
    check_unaligned(layernorm_cases(21, 800, BF16))


def run():
    return [r for case in layernorm_cases(21, 800, BF16) for r in check(kernels(), *case)]


def test_results_are_bit_identical_with_every_schedule(monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    first = bits_in(0, run)
    assert all(bits_in(schedule, run) == first for schedule in (1, 2, 3))


FAULTS = {
    "the weights are read before they are written": (
        "layernorm", "backward", "gains[c] = weight[c]; __syncthreads();", "gains[c] = weight[c];"
    ),
    "a row's sums are read before they are written": (
        "layernorm", "row_sums", "slots[warp][n] = v[n]; __syncthreads();", "slots[warp][n] = v[n];"
    ),
    "only one set of slots": ("layernorm", "backward", "row_sums(sums, slots[stage])", "row_sums(sums, slots[0])"),
    "only the first warp of a row": ("layernorm", "row_sums", "w < ROW_WARPS", "w < 1"),
    "a missing barrier": ("layernorm", "store_partial", "group++) { __syncthreads();", "group++) {"),
    "a row of sums is stored too early": (
        "layernorm", "store_partial", "__syncthreads(); for (int c = threadIdx.x;", "for (int c = threadIdx.x;"
    ),
    "rows are skipped": ("layernorm", "forward", "first += gridDim.x * ROWS)", "first += rows)"),
    "the last row is skipped": ("layernorm", "forward, backward", "row < rows ? C", "row < rows - 1 ? C"),
    "the mean of g is not subtracted": ("layernorm", "backward", "- g_mean", ""),
    "ds is not added": ("layernorm", "backward", "ADD ? skip[k]", "false ? skip[k]"),
    "ds is read before it has arrived": ("layernorm", "backward", "if (ADD) cp_async_wait<0>();", ""),
    "the ds of another warp": (
        "layernorm", "backward", "skips[i * WARPS * 32 + threadIdx.x]", "skips[i * WARPS * 32 + lane]"
    ),
    "the second sum is added to the first target": ("columns", "add_partials", "blockIdx.y ? second : first", "first"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(monkeypatch, fault):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    family, *edit = FAULTS[fault]
    assert fault_is_caught(lambda: inject_in(monkeypatch, family, tuple(edit)), run)
