"""kernels/cached_attention.py: attention of a new token to a key-value cache, compared with float64."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tinygrad2 import reference

cpu = pytest.importorskip("tinygrad2.kernels.cpu")
from numba import cfunc  # noqa: E402

from tinygrad2.kernels import cached_attention, gemv, pool  # noqa: E402

EDGE = cpu.CACHE_BLOCK
DTYPES = pytest.mark.parametrize("dtype", [np.float32, bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture
def eight_lanes(monkeypatch):
    """Use the vector width of processors without AVX-512. The compiled code is not cached on disk."""
    for module in (gemv, cached_attention):
        monkeypatch.setattr(module, "LANES", 8)
    monkeypatch.setattr(pool, "cfunc", lambda signature, cache: cfunc(signature))
    cpu.cached_attention_tasks.cache_clear()
    yield
    cpu.cached_attention_tasks.cache_clear()


def inputs(dtype, B=1, H=3, D=64, capacity=EDGE + 70, seed=0):
    R = np.random.default_rng(seed)
    return R.normal(size=(B, 1, 3 * H * D)).astype(dtype), R.normal(size=(2, B, H, capacity, D)).astype(dtype)


def check(qkv, cache, position, bound=None):
    """Return the result after comparing it with the reference. Unused positions of the cache contain NaN."""
    H, cache = cache.shape[2], cache.copy()
    cache[:, :, :, position:] = np.nan
    wide = cache.astype(np.float64)
    expected = reference.attention_cached(qkv.astype(np.float64), wide, position, H)
    found = cpu.attention_cached(qkv, cache, position, H)
    assert found.dtype == qkv.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(cache.astype(np.float64), wide)
    error = np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error <= (bound or (1e-6 if qkv.dtype == np.float32 else 4e-3))
    return found


@DTYPES
@pytest.mark.parametrize("position", [0, 1, 2, 3, 4, 63, EDGE - 1, EDGE, EDGE + 1, EDGE + 69])
def test_the_kernel_equals_the_reference_at_the_edges_of_groups_and_blocks(dtype, position):
    for B, H, D in ((1, 3, 64), (2, 1, 32), (3, 2, 128), (2, 2, 20)):  # the last size is not specialized
        check(*inputs(dtype, B, H, D), position)


@DTYPES
def test_vectors_of_eight_lanes_equal_the_reference(dtype, eight_lanes):
    for position in (0, 6, EDGE + 5):
        check(*inputs(dtype, D=64), position)
        check(*inputs(dtype, D=24), position)


@DTYPES
def test_results_are_bit_identical_for_any_number_of_threads(dtype, set_threads):
    qkv, cache = inputs(dtype, B=2, capacity=3 * EDGE)
    results = []
    for count in (1, 2, 3, 5):
        set_threads(count)
        results.append(check(qkv, cache, 3 * EDGE - 7).view(np.uint8))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@DTYPES
def test_results_do_not_depend_on_other_sequences_in_the_batch(dtype):
    qkv, cache = inputs(dtype, B=3)
    together = check(qkv, cache, EDGE + 3)
    for b in range(3):
        alone = check(qkv[b : b + 1], cache[:, b : b + 1], EDGE + 3)
        np.testing.assert_array_equal(alone[0].view(np.uint8), together[b].view(np.uint8))


def test_large_scores_and_a_block_with_zero_weight():
    """The scores of the two blocks differ so much that all keys of one block have weight 0."""
    qkv, cache = inputs(np.float32, H=1, seed=3)
    qkv[:] = np.abs(qkv) * 30
    for sign in (1, -1):
        shifted = cache.copy()
        shifted[0, 0, 0, :EDGE] = sign * np.abs(shifted[0, 0, 0, :EDGE])
        shifted[0, 0, 0, EDGE:] = -sign * np.abs(shifted[0, 0, 0, EDGE:])
        check(qkv, shifted, EDGE + 40, bound=1e-5)


def test_keys_of_minus_infinity_have_zero_weight():
    qkv, cache = inputs(np.float32, H=1)
    qkv[:] = np.abs(qkv)
    cache[0, 0, 0, :EDGE] = -np.inf
    check(qkv, cache, EDGE + 40)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [0, 1], ids=["keys", "values"])
def test_values_that_are_not_finite_propagate(kind, bad):
    qkv, cache = inputs(np.float32, H=2)
    cache[kind, 0, 0, 5, 7] = bad
    qkv[:] = np.abs(qkv)
    with np.errstate(invalid="ignore"):
        expected = reference.attention_cached(qkv.astype("d"), cache.astype("d"), EDGE + 9, 2)
    found = cpu.attention_cached(qkv, cache, EDGE + 9, 2)
    assert not np.isfinite(expected).all()
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
