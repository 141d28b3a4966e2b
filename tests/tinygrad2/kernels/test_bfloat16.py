import numpy as np
import pytest
from ml_dtypes import bfloat16

pytest.importorskip("numba")
from tinygrad2.kernels.bfloat16 import as_float32, bits, cast


def test_rounding_to_bfloat16_matches_ml_dtypes():
    words = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    words[:8] = 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF, 0x00008000, 0x00018000
    x = words.view(np.float32)
    found = cast(x, np.dtype(bfloat16))
    with np.errstate(all="ignore"):
        expected = x.astype(bfloat16)
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), np.isnan(x))
    np.testing.assert_array_equal(found[~np.isnan(x)], expected[~np.isnan(x)])
    np.testing.assert_array_equal(as_float32(found), found.astype(np.float32))


def test_a_conversion_preserves_the_memory_layout():
    x = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    for given in (x, x.T, x[:, ::2], x[:3], x[0]):
        found = cast(given, np.dtype(bfloat16))
        np.testing.assert_array_equal(found, given.astype(bfloat16))
        assert found.flags.f_contiguous == (given.flags.f_contiguous or given.ndim == 1)
        assert bits(found).dtype == np.uint16
    assert cast(x, x.dtype) is x
    assert as_float32(x) is x
    assert bits(x) is x
