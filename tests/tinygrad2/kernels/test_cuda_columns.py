"""kernels/columns.cu on the simulator: column sums, compared with NumPy in float64."""

import numpy as np
import pytest

from tests.stand_ins.faults import inject_in
from tests.tinygrad2.kernels.against_reference import (
    BF16,
    F32,
    bits_in,
    fault_is_caught,
    kernels,
    normal,
    unaligned,
    wide,
)
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # compiles about a dozen kernels; test_cuda.py runs each of them too


@pytest.mark.parametrize(("rows", "C", "dtype"), [(700, 64, BF16), (33, 264, BF16), (50, 21, BF16), (9, 36, F32)])
def test_column_sums_agree_with_numpy(rows, C, dtype, monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 2)
    x, into = normal(rows, C, dtype=dtype), normal(C, seed=1)
    expected = into + wide(x).sum(axis=0)
    kernels().column_sums(x, into)
    np.testing.assert_allclose(into, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_any_number_of_partial_sums_is_added():
    for parts in (1, 31, 300):
        partials, targets = normal(2, parts, 40), [normal(40, seed=1), normal(40, seed=2)]
        expected = [target + part.sum(axis=0, dtype="d") for target, part in zip(targets, partials, strict=True)]
        kernels().add_partials(partials, *targets)
        np.testing.assert_allclose(targets, expected, rtol=0, atol=1e-5)


def test_unaligned_matrices_give_the_same_sums():
    into = [np.zeros(64, F32) for _ in range(2)]
    for target, x in zip(into, (normal(9, 64), unaligned(normal(9, 64))), strict=True):
        kernels().column_sums(x, target)
    assert np.array_equal(*into)


def run():
    into = normal(264, seed=1)
    x = normal(101, 264, dtype=BF16)
    expected = into + wide(x).sum(axis=0)
    kernels().column_sums(x, into)
    np.testing.assert_allclose(into, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    return [into]


def test_sums_are_bit_identical_with_every_schedule(monkeypatch):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    first = bits_in(0, run)
    assert all(bits_in(schedule, run) == first for schedule in (1, 2, 3))


FAULTS = {
    "a row is skipped": ("columns", "column_sums", "row += AHEAD * step", "row += (AHEAD + 1) * step"),
    "a missing barrier": ("columns", "store_partial", "__syncthreads(); int c = blockIdx.x", "int c = blockIdx.x"),
    "a warp is skipped": ("columns", "store_partial", "warp < WARPS; warp++", "warp < WARPS - 1; warp++"),
    "partial sums are read too early": (
        "columns", "add_partials", "sums[warp][lane] = sum; __syncthreads();", "sums[warp][lane] = sum;"
    ),
    "the target is overwritten": ("columns", "add_partials", "into[c] += sum", "into[c] = sum"),
    "the last columns are skipped": ("columns", "column_sums", "c < C) {", "c < C - 8) {"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(monkeypatch, fault):
    monkeypatch.setattr(cuda, "PROCESSORS", 1)
    family, *edit = FAULTS[fault]
    assert fault_is_caught(lambda: inject_in(monkeypatch, family, tuple(edit)), run)
