"""kernels/attention_forward.cu on the simulator, compared with reference.py in float64."""

import types

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins.faults import inject_in
from tests.tinygrad2.kernels.attention import A100, BOUND, H200, L4, activations, error, in_every_schedule, kernels
from tinygrad2 import Key, reference
from tinygrad2.kernels.cuda import AttentionSizes

pytestmark = pytest.mark.slow  # compiles about a dozen kernels; test_cuda.py runs each of them too
KEY = Key(2**40 + 11, step=3, first_sample=2**40 + 5, site=2)


@pytest.fixture(scope="module")
def compiled():
    return kernels()


@pytest.mark.parametrize("key", [None, KEY], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    ("B", "T", "H", "D"),
    [(1, 1, 1, 64), (2, 37, 2, 64), (1, 128, 1, 64), (2, 200, 1, 64), (1, 66, 3, 16), (2, 65, 2, 80), (1, 129, 1, 128)],
)
def test_forward_agrees_with_the_reference(B, T, H, D, key, compiled):
    qkv = activations(B, T, 3 * H * D)
    before = qkv.tobytes()
    out, lse = compiled.attention_forward(qkv, H, 0.3, key)
    expected, expected_lse = reference.attention_forward(qkv.astype("d"), H, 0.3, key)
    assert (out.dtype, lse.dtype) == (bfloat16, np.float32)
    assert (out.shape, lse.shape) == (expected.shape, expected_lse.shape)
    assert error(out, expected) < BOUND["bfloat16"]
    assert np.abs(lse - expected_lse).max() < 1e-5
    assert qkv.tobytes() == before


@pytest.mark.parametrize(
    ("processor", "D", "keys"),
    [(H200, 64, 64), (A100, 64, 64), (L4, 64, 32), (H200, 128, 64), (A100, 128, 32), (L4, 128, 16), (L4, 80, 32)],
)
def test_two_blocks_fit_on_a_multiprocessor(processor, D, keys):
    sizes = AttentionSizes.forward(D, processor)
    assert sizes.stream == keys
    assert 2 * (sizes.shared + 1024) <= processor.shared_memory


@pytest.mark.parametrize(("D", "T"), [(64, 137), (128, 75)])
def test_forward_with_smaller_tiles(D, T):
    qkv = activations(1, T, 3 * D)
    out, lse = kernels(processor=L4).attention_forward(qkv, 1, 0.3, KEY)
    expected, expected_lse = reference.attention_forward(qkv.astype("d"), 1, 0.3, KEY)
    assert error(out, expected) < BOUND["bfloat16"]
    assert np.abs(lse - expected_lse).max() < 1e-5


@pytest.mark.parametrize("key", [None, KEY], ids=["no dropout", "dropout"])
def test_forward_is_bit_identical_with_every_schedule(key, compiled, monkeypatch):
    qkv = activations(1, 150, 3 * 64)
    in_every_schedule(lambda: compiled.attention_forward(qkv, 1, 0.1, key), monkeypatch)


@pytest.mark.parametrize("together", [1, 2, 3, 5, 8])
def test_every_block_runs_for_any_group_size(together, monkeypatch):
    """There are five heads of two tiles. The blocks start in groups of `together` heads, which fit in the L2 cache."""
    inject_in(monkeypatch, "attention_forward", ("place", "16 << 20", f"{together * 4 * 16 * 140}"))
    qkv = activations(1, 140, 3 * 5 * 16)
    out, lse = kernels().attention_forward(qkv, 5, 0.0, None)
    expected, expected_lse = reference.attention_forward(qkv.astype("d"), 5, 0.0, None)
    assert error(out, expected) < BOUND["bfloat16"]
    assert np.abs(lse - expected_lse).max() < 1e-5


def test_forward_of_large_scores(compiled):
    """The running maximum grows from tile to tile, so that the weights of earlier tiles vanish."""
    qkv = activations(1, 130, 3 * 64)
    qkv[..., :128] *= np.linspace(0, 6, 130)[:, None].astype(bfloat16)
    out, lse = compiled.attention_forward(qkv, 1, 0.0, None)
    expected, expected_lse = reference.attention_forward(qkv.astype("d"), 1, 0.0, None)
    assert error(out, expected) < BOUND["bfloat16"]
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_dropout_with_rate_zero_and_for_part_of_a_batch(compiled):
    qkv = activations(2, 40, 3 * 64)
    plain, _ = compiled.attention_forward(qkv, 1, 0.0, None)
    kept, _ = compiled.attention_forward(qkv, 1, 0.0, KEY)
    np.testing.assert_array_equal(kept, plain)
    full, _ = compiled.attention_forward(qkv, 1, 0.4, Key(7))
    part, _ = compiled.attention_forward(qkv[1:], 1, 0.4, Key(7, first_sample=1))
    np.testing.assert_array_equal(part, full[1:])


def test_nan_affects_only_queries_that_attend_to_it(compiled):
    qkv = activations(1, 70, 3 * 64)
    qkv[0, 66, 64] = np.nan  # a key, which affects its own query and all later ones
    out, lse = compiled.attention_forward(qkv, 1, 0.0, None)
    assert np.isnan(out[0].astype("f")).any(axis=-1).tolist() == [False] * 66 + [True] * 4
    assert np.isnan(lse[0, 0]).tolist() == [False] * 66 + [True] * 4


@pytest.mark.parametrize(("dtype", "D"), [(np.float64, 16), (np.float32, 16), (bfloat16, 20), (bfloat16, 144)])
def test_unsupported_arguments_use_the_reference(dtype, D):
    fallback = types.SimpleNamespace(attention_forward=lambda *arguments: arguments)
    arguments = activations(1, 3, 3 * D, dtype=dtype), 1, 0.1, KEY
    assert kernels(fallback).attention_forward(*arguments) == arguments


FAULTS = [
    ("attention_forward", "cp_async_wait<0>", "cp_async_wait<1>"),  # reads before the copy is complete
    ("attention_forward", "cp_async_wait<0>(); __syncthreads();", "cp_async_wait<0>();"),
    ("attention_forward", "cp_async_wait<0>(); __syncthreads();", "__syncthreads(); cp_async_wait<0>();"),
    ("store_rows", "__syncwarp();", ""),
    ("hide_later_keys", "> first_query +", ">= first_query +"),
    ("hide_later_keys", "> first_query +", "> 1 + first_query +"),
    ("attention_forward", "(j + 1) * KEYS > warp_top + 1", "(j + 1) * KEYS > warp_top + 65"),
    ("attention_forward", "j * KEYS < warp_top + 16 * M)", "j * KEYS < warp_top)"),
    ("attention_forward", "total[m][half] *= shrink;", ""),
    ("attention_forward", "o[m][n][2 * half + 1] *= shrink;", ""),
    ("attention_forward", "found = row_max(found);", ""),
    ("row_sum", "x, 2)", "x, 1)"),
    ("attention_forward", "largest[m][half] * scale * 0.69314718056f", "largest[m][half] * scale"),
    ("attention_forward", "if (row < T && lane", "if (row < T - 1 && lane"),
    ("store_rows", "if (first + r < T)", "if (first + r < T - 1)"),
    ("load_tile", "first + row < T ?", "first + row <= T ?"),
    ("load_tile", "? 16 : 0", "? 16 : 8"),
    ("right_factor_of_transposed", "lane / 8 % 2 * 8", "0"),
    ("right_factor", "lane / 16 * 8", "0"),
    ("load_tile", "matrix += (size_t)first * stride", "matrix += first"),
    ("attention_forward", "s[m][2 * k + i / 2][i % 2 * 2],", "s[m][2 * k + i % 2][i / 2 * 2],"),
]
DROPOUT_FAULTS = [
    ("attention_forward", "factor *= keep_scale;", ""),
    ("attention_forward", "(first_sample + b) * H", "(unsigned)(first_sample + b) * H"),
    ("attention_forward", "* T + j * KEYS + 8 * n, T", "* T + j * KEYS + 8 * m, T"),
    ("dropout_keeps_fragment", "lane % 4 / 2 * 4) / 4", "lane % 4 * 4) / 4"),
    ("dropout_keeps_fragment", "(mine & 3) | (other & 3) << 2", "(other & 3) | (mine & 3) << 2"),
    ("dropout_keeps_fragment", "(mine & 12) | other >> 2", "mine"),
    ("dropout_keeps_fragment", "i / 2 * 8; kept", "i % 2 * 8; kept"),
    ("dropout_keeps_fragment", "words.y >= threshold", "words.y > 2 * threshold"),
]


def check_forward(table, key, monkeypatch):
    for T in (131, 132):  # odd, and a multiple of four
        qkv = activations(2, T, 3 * 64)
        out, lse = in_every_schedule(lambda qkv=qkv: table.attention_forward(qkv, 1, 0.3, key), monkeypatch)
        expected, expected_lse = reference.attention_forward(qkv.astype("d"), 1, 0.3, key)
        assert error(out, expected) < BOUND["bfloat16"]
        assert np.abs(lse - expected_lse).max() < 1e-5


@pytest.mark.parametrize("key", [None, KEY], ids=["no dropout", "dropout"])
def test_the_check_passes_without_a_fault(key, monkeypatch):
    check_forward(kernels(), key, monkeypatch)


@pytest.mark.parametrize(
    ("key", "fault"), [(None, fault) for fault in FAULTS] + [(KEY, fault) for fault in DROPOUT_FAULTS]
)
def test_injected_faults_are_caught(key, fault, monkeypatch):
    inject_in(monkeypatch, "attention_forward", fault)
    with pytest.raises((AssertionError, RuntimeError)):
        check_forward(kernels(), key, monkeypatch)
