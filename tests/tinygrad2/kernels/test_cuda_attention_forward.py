"""kernels/attention_forward.cu and attention_cached.cu, run on a CPU, against reference.py in float64."""

import math
import re
import types
from contextlib import nullcontext

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim
from tinygrad2 import Key, reference
from tinygrad2.kernels import cuda

pytestmark = pytest.mark.slow  # some dozen kernels are compiled; test_cuda.py runs each of them too
KEY = Key(2**40 + 11, step=3, first_sample=2**40 + 5, site=2)
BOUND = {"bfloat16": 4e-3, "float32": 1e-6}
rng = np.random.default_rng(0)


def poisoned(shape, dtype):
    return np.full(shape, np.nan, dtype=dtype)


def no_reference(*arguments):
    raise AssertionError("this has a kernel")


def kernels(reference=None):
    """The launchers on NumPy arrays and simulated kernels; new arrays hold NaN."""
    library = types.SimpleNamespace(RawModule=cudasim.RawModule, empty=poisoned, ascontiguousarray=np.ascontiguousarray)
    return cuda.CudaKernels(library, reference or types.SimpleNamespace(attention_forward=no_reference))


@pytest.fixture(scope="module")
def compiled():
    return kernels()


def activations(*shape, dtype=bfloat16, scale=1.5):
    """Random numbers, with NaN behind them in memory: to read on shows."""
    count = math.prod(shape)
    memory = poisoned(count + 256, dtype)
    memory[:count] = scale * rng.standard_normal(count)
    return memory[:count].reshape(shape)


def error(result, expected):
    assert np.isfinite(result.astype("d")).all()
    return np.linalg.norm(result.astype("d") - expected) / np.linalg.norm(expected)


def in_every_schedule(call, monkeypatch):
    """The results of a call, which must be the same bits in whatever order the threads run."""
    results = []
    for schedule in range(4):
        monkeypatch.setattr(cudasim, "schedule", schedule)
        results.append(call())
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert one.tobytes() == two.tobytes(), "depends on the schedule"
    return results[0]


@pytest.mark.parametrize("key", [None, KEY], ids=["", "dropout"])
@pytest.mark.parametrize(
    ("B", "T", "H", "D"),
    [(1, 1, 1, 64), (2, 37, 2, 64), (1, 128, 1, 64), (2, 200, 1, 64), (1, 66, 3, 16), (2, 65, 2, 80), (1, 129, 1, 128)],
)
def test_forward(B, T, H, D, key, compiled):
    qkv = activations(B, T, 3 * H * D)
    before = qkv.tobytes()
    out, lse = compiled.attention_forward(qkv, H, 0.3, key)
    expected, expected_lse = reference.attention_forward(qkv.astype("d"), H, 0.3, key)
    assert (out.dtype, lse.dtype) == (bfloat16, np.float32)
    assert (out.shape, lse.shape) == (expected.shape, expected_lse.shape)
    assert error(out, expected) < BOUND["bfloat16"]
    assert np.abs(lse - expected_lse).max() < 1e-5
    assert qkv.tobytes() == before


@pytest.mark.parametrize("key", [None, KEY], ids=["", "dropout"])
def test_forward_has_the_same_bits_in_every_schedule(key, compiled, monkeypatch):
    qkv = activations(1, 150, 3 * 64)
    in_every_schedule(lambda: compiled.attention_forward(qkv, 1, 0.1, key), monkeypatch)


@pytest.mark.parametrize("together", [1, 2, 3, 5, 8])
def test_the_order_of_the_blocks_leaves_none_out(together, monkeypatch):
    """Five heads of two tiles, whose blocks start in groups of as many heads as are said to fit the L2 cache."""
    small = cuda.source("attention_forward").replace("16 << 20", f"{together * 4 * 16 * 140}")
    monkeypatch.setattr(cuda, "source", lambda family: small)
    qkv = activations(1, 140, 3 * 5 * 16)
    out, lse = kernels().attention_forward(qkv, 5, 0.0, None)
    expected, expected_lse = reference.attention_forward(qkv.astype("d"), 5, 0.0, None)
    assert error(out, expected) < BOUND["bfloat16"]
    assert np.abs(lse - expected_lse).max() < 1e-5


def test_forward_of_large_scores(compiled):
    """The running maximum grows from tile to tile, and the weights of what came before vanish."""
    qkv = activations(1, 130, 3 * 64)
    qkv[..., :128] *= np.linspace(0, 6, 130)[:, None].astype(bfloat16)
    out, lse = compiled.attention_forward(qkv, 1, 0.0, None)
    expected, expected_lse = reference.attention_forward(qkv.astype("d"), 1, 0.0, None)
    assert error(out, expected) < BOUND["bfloat16"]
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_dropout_at_rate_zero_and_of_part_of_a_batch(compiled):
    qkv = activations(2, 40, 3 * 64)
    plain, _ = compiled.attention_forward(qkv, 1, 0.0, None)
    kept, _ = compiled.attention_forward(qkv, 1, 0.0, KEY)
    np.testing.assert_array_equal(kept, plain)
    whole, _ = compiled.attention_forward(qkv, 1, 0.4, Key(7))
    part, _ = compiled.attention_forward(qkv[1:], 1, 0.4, Key(7, first_sample=1))
    np.testing.assert_array_equal(part, whole[1:])


def test_nan_stays_where_the_mask_lets_it(compiled):
    qkv = activations(1, 70, 3 * 64)
    qkv[0, 66, 64] = np.nan  # a key: it reaches its own query and the later ones
    out, lse = compiled.attention_forward(qkv, 1, 0.0, None)
    assert np.isnan(out[0].astype("f")).any(axis=-1).tolist() == [False] * 66 + [True] * 4
    assert np.isnan(lse[0, 0]).tolist() == [False] * 66 + [True] * 4


@pytest.mark.parametrize(("dtype", "D"), [(np.float64, 16), (np.float32, 16), (bfloat16, 20), (bfloat16, 144)])
def test_what_has_no_kernel_goes_to_the_reference(dtype, D):
    asked = types.SimpleNamespace(attention_forward=lambda *arguments: arguments)
    arguments = activations(1, 3, 3 * D, dtype=dtype), 1, 0.1, KEY
    assert kernels(asked).attention_forward(*arguments) == arguments


@pytest.mark.parametrize(("T", "length", "capacity"), [(1, 0, 4), (1, 300, 301), (1, 37, 64), (3, 0, 5), (5, 30, 40)])
@pytest.mark.parametrize(
    ("dtype", "D"), [(bfloat16, 64), (np.float32, 64), (bfloat16, 20), (np.float32, 7), (bfloat16, 80)]
)
def test_cached(T, length, capacity, dtype, D, compiled):
    B, H = 2, 2
    qkv, cache = activations(B, T, 3 * H * D, dtype=dtype), poisoned((2, B, H, capacity, D), dtype)
    cache[:, :, :, :length] = activations(2, B, H, length, D, dtype=dtype)
    before, expected_cache = qkv.tobytes(), cache.astype("d")
    out = compiled.attention_cached(qkv, cache, length, H)
    expected = reference.attention_cached(qkv.astype("d"), expected_cache, length, H)
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert error(out, expected) < BOUND[np.dtype(dtype).name]
    np.testing.assert_array_equal(cache.astype("d"), expected_cache)  # the new rows, and NaN beyond them
    assert qkv.tobytes() == before


def test_cached_has_the_same_bits_in_every_schedule(compiled, monkeypatch):
    qkv, cache = activations(1, 2, 3 * 64), activations(2, 1, 1, 150, 64)
    in_every_schedule(lambda: (compiled.attention_cached(qkv, cache, 140, 1), cache), monkeypatch)


def test_a_cache_of_another_kind_goes_to_the_reference():
    asked = kernels(types.SimpleNamespace(attention_cached=lambda qkv, cache, *rest: "reference"))
    cache = activations(2, 1, 1, 8, 16)
    for qkv, other in [
        (activations(1, 1, 48, dtype=np.float32), cache),
        (activations(1, 1, 48), cache[:, :, :, ::2]),
        (activations(1, 1, 48, dtype=np.float64), cache.astype("d")),
    ]:
        assert asked.attention_cached(qkv, other, 0, 1) == "reference"


# Faults: each must show, or the tests above would not see it either ---------------------------------------------------

FORWARD_FAULTS = [
    (r"cp_async_wait<0>", "cp_async_wait<1>"),  # reads what has not arrived
    (r"cp_async_wait<0>\(\);\n    __syncthreads\(\);", "cp_async_wait<0>();"),
    (r"cp_async_wait<0>\(\);\n    __syncthreads\(\);", "__syncthreads(); cp_async_wait<0>();"),  # of the others' copies
    (r"__syncwarp\(\);", ""),
    (r"> first_query \+", ">= first_query +"),
    (r"> first_query \+", "> 1 + first_query +"),
    (r"\(j \+ 1\) \* KEYS > warp_top \+ 1", "(j + 1) * KEYS > warp_top + 65"),
    (r"j \* KEYS < warp_top \+ 16 \* M\)", "j * KEYS < warp_top)"),
    (r"total\[m\]\[half\] \*= shrink;", ""),
    (r"o\[m\]\[n\]\[2 \* half \+ 1\] \*= shrink;", ""),
    (r"found = row_max\(found\);", ""),
    (r"xffffffffu, x, 2\);\n}\n\nextern", "xffffffffu, x, 1);\n}\n\nextern"),
    (r"largest\[m\]\[half\] \* scale \* 0\.69314718056f", "largest[m][half] * scale"),
    (r"if \(row < T && lane", "if (row < T - 1 && lane"),
    (r"if \(first \+ r < T\)", "if (first + r < T - 1)"),
    (r"first \+ row < T \?", "first + row <= T ?"),
    (r"\? 16 : 0", "? 16 : 8"),
    (r"lane / 8 % 2 \* 8", "0"),
    (r"lane / 16 \* 8\);\n\}\n\n// The results", "0);\n}\n\n// The results"),
    (r"matrix \+= \(size_t\)first \* stride", "matrix += first"),
    (r"s\[m\]\[2 \* k \+ i / 2\]\[i % 2 \* 2\],", "s[m][2 * k + i % 2][i / 2 * 2],"),
]  # fmt: skip
DROPOUT_FAULTS = [
    (r"factor \*= keep_scale;", ""),
    (r"\(first_sample \+ b\) \* H", "(unsigned)(first_sample + b) * H"),
    (r"\* T \+ j \* KEYS \+ 8 \* n, T", "* T + j * KEYS + 8 * m, T"),
    (r"lane % 4 / 2 \* 4\) / 4", "lane % 4 * 4) / 4"),
    (r"\(mine & 3\) \| \(other & 3\) << 2", "(other & 3) | (mine & 3) << 2"),
    (r"\(mine & 12\) \| other >> 2", "mine"),
    (r"i / 2 \* 8;\n      kept", "i % 2 * 8;\n      kept"),
    (r"words\.y >= threshold", "words.y > 2 * threshold"),
]  # fmt: skip
CACHED_FAULTS = [
    (r"__syncthreads\(\);", ""),
    (r"seen = length \+ t \+ 1", "seen = length + t"),
    (r"3 \* width \* \(i - length\)", "width * (i - length)"),
    (r"total \*= shrink;", ""),
    (r"o = GROUP / 2; o;", "o = GROUP / 4; o;"),
    (r"int o = GROUP; o < 32", "int o = GROUP; o < 16"),
    (r"total \*= factor;", ""),
    (r"float x = sum\.v\[i\]\[e\] \* factor", "float x = sum.v[i][e]"),
    (r"total \+= warp_total\[w\] \* weight", "total += warp_total[w]"),
    (r"(found|base) == NEG_INF \? 0\.f : found", "found"),
    (r"\(seen - 1\) \* D \+ d\] = new_v", "seen * D + d] = new_v"),
    (r"start \+= WARPS", "start += 2 * WARPS"),
    (r"old_v = old_k \+ in_cache", "old_v = old_k"),
]  # fmt: skip


def check_forward(table, key, monkeypatch):
    for T in (131, 132):  # odd, and the groups of four aligned
        qkv = activations(2, T, 3 * 64)
        out, lse = in_every_schedule(lambda qkv=qkv: table.attention_forward(qkv, 1, 0.3, key), monkeypatch)
        expected, expected_lse = reference.attention_forward(qkv.astype("d"), 1, 0.3, key)
        assert error(out, expected) < BOUND["bfloat16"]
        assert np.abs(lse - expected_lse).max() < 1e-5


def check_cached(table, key, monkeypatch):
    for length in (1, 270):  # fewer keys than a warp takes at a time; more than the block does
        qkv, cache = activations(1, 2, 3 * 64), activations(2, 1, 1, 300, 64)
        expected_cache = cache.astype("d")
        expected = reference.attention_cached(qkv.astype("d"), expected_cache, length, 1)
        (out,) = in_every_schedule(lambda: (table.attention_cached(qkv, cache, length, 1),), monkeypatch)  # noqa: B023
        assert error(out, expected) < BOUND["bfloat16"]
        assert (cache == expected_cache).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "key", "fault"),
    [(check_forward, None, fault) for fault in [None, *FORWARD_FAULTS]]
    + [(check_forward, KEY, fault) for fault in [None, *DROPOUT_FAULTS]]
    + [(check_cached, None, fault) for fault in [None, *CACHED_FAULTS]],
)
def test_a_fault_shows(check, key, fault, monkeypatch):
    if fault:
        whole = cuda.source

        def spoiled(family):
            text, count = re.subn(*fault, whole(family))
            assert count, "the fault has no place"
            return text

        monkeypatch.setattr(cuda, "source", spoiled)
    with pytest.raises((AssertionError, RuntimeError)) if fault else nullcontext():
        check(kernels(), key, monkeypatch)
