"""kernels/attention_cached.cu on the simulator, compared with reference.py in float64."""

import types

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins.faults import inject_in
from tests.tinygrad2.kernels.attention import BOUND, activations, error, in_every_schedule, kernels, poisoned
from tinygrad2 import Key, reference

pytestmark = pytest.mark.slow  # compiles about a dozen kernels; test_cuda.py runs each of them too
KEY = Key(2**40 + 11, step=3, first_sample=2**40 + 5, site=2)


@pytest.fixture(scope="module")
def compiled():
    return kernels()


@pytest.mark.parametrize(("T", "length", "capacity"), [(1, 0, 4), (1, 300, 301), (1, 37, 64), (3, 0, 5), (5, 30, 40)])
@pytest.mark.parametrize(
    ("dtype", "D"), [(bfloat16, 64), (np.float32, 64), (bfloat16, 20), (np.float32, 7), (bfloat16, 80)]
)
def test_cached_attention_agrees_with_the_reference(T, length, capacity, dtype, D, compiled):
    B, H = 2, 2
    qkv, cache = activations(B, T, 3 * H * D, dtype=dtype), poisoned((2, B, H, capacity, D), dtype)
    cache[:, :, :, :length] = activations(2, B, H, length, D, dtype=dtype)
    before, expected_cache = qkv.tobytes(), cache.astype("d")
    out = compiled.attention_cached(qkv, cache, length, H)
    expected = reference.attention_cached(qkv.astype("d"), expected_cache, length, H)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert error(out, expected) < BOUND[np.dtype(dtype).name]
    np.testing.assert_array_equal(cache.astype("d"), expected_cache)  # new rows are written, and NaN is left after them
    assert qkv.tobytes() == before


def test_cached_attention_is_bit_identical_with_every_schedule(compiled, monkeypatch):
    qkv, cache = activations(1, 2, 3 * 64), activations(2, 1, 1, 150, 64)
    in_every_schedule(lambda: (compiled.attention_cached(qkv, cache, 140, 1), cache), monkeypatch)


def test_unsupported_dtypes_and_layouts_use_the_reference():
    fallback = kernels(types.SimpleNamespace(attention_cached=lambda qkv, cache, *rest: "reference"))
    cache = activations(2, 1, 1, 8, 16)
    for qkv, other in [
        (activations(1, 1, 48, dtype=np.float32), cache),
        (activations(1, 1, 48), cache[:, :, :, ::2]),
        (activations(1, 1, 48, dtype=np.float64), cache.astype("d")),
    ]:
        assert fallback.attention_cached(qkv, other, 0, 1) == "reference"


FAULTS = [
    ("attention_cached", "__syncthreads();", ""),
    ("attention_cached", "seen = length + t + 1", "seen = length + t"),
    ("attention_cached", "3 * width * (i - length)", "width * (i - length)"),
    ("attention_cached", "total *= shrink;", ""),
    ("attention_cached", "o = GROUP / 2; o;", "o = GROUP / 4; o;"),
    ("attention_cached", "int o = GROUP; o < 32", "int o = GROUP; o < 16"),
    ("attention_cached", "total *= factor;", ""),
    ("attention_cached", "float x = sum.v[i][e] * factor", "float x = sum.v[i][e]"),
    ("attention_cached", "total += warp_total[w] * weight", "total += warp_total[w]"),
    ("attention_cached", "found == NEG_INF ? 0.f : found", "found"),
    ("attention_cached", "(seen - 1) * D + d] = new_v", "seen * D + d] = new_v"),
    ("attention_cached", "start += WARPS", "start += 2 * WARPS"),
    ("attention_cached", "old_v = old_k + in_cache", "old_v = old_k"),
]


def check_cached(table, monkeypatch):
    for length in (1, 270):  # fewer keys than a warp reads at a time; more than the block does
        qkv, cache = activations(1, 2, 3 * 64), activations(2, 1, 1, 300, 64)
        expected_cache = cache.astype("d")
        expected = reference.attention_cached(qkv.astype("d"), expected_cache, length, 1)
        (out,) = in_every_schedule(lambda: (table.attention_cached(qkv, cache, length, 1),), monkeypatch)  # noqa: B023
        assert error(out, expected) < BOUND["bfloat16"]
        assert (cache == expected_cache).all()


def test_the_check_passes_without_a_fault(monkeypatch):
    check_cached(kernels(), monkeypatch)


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(fault, monkeypatch):
    inject_in(monkeypatch, "attention_cached", fault)
    with pytest.raises((AssertionError, RuntimeError)):
        check_cached(kernels(), monkeypatch)
