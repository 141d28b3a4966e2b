"""bfloat16 products with oneDNN, and the reasons why it may be unavailable."""

import itertools
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

cpu = pytest.importorskip("tinygrad2.kernels.cpu")
from tinygrad2 import random  # noqa: E402
from tinygrad2.kernels import onednn  # noqa: E402

NO_INSTRUCTIONS = "this processor has no instructions for bfloat16 (avx512_bf16 or amx_bf16)"
R = np.random.default_rng(0)


@pytest.fixture
def library():
    if onednn.library() is None:
        pytest.skip(onednn.unavailable_reason())


def error(result, exact):
    return np.linalg.norm(result.astype(np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(96, 64, 80), (37, 51, 29), (1, 9, 4), (40, 1, 3)], ids=str)
def test_products_in_every_layout(library, shape):
    m, k, n = shape
    for left, right, dtype, add, biased in itertools.product("CF", "CF", (bfloat16, np.float32), (0, 1), (0, 1)):
        a, b = (R.normal(size=s).astype(bfloat16) for s in ((m, k), (k, n)))
        a, b, bias = np.array(a, order=left), np.array(b, order=right), R.normal(size=n).astype(bfloat16)
        memory = R.normal(size=(m + 2, n + 3)).astype(dtype)
        out, before = memory[1:-1, 2 : 2 + n], memory.copy()
        exact = a.astype("d") @ b.astype("d") + add * out.astype("d") + biased * bias.astype("d")
        onednn.product(a, b, out, bool(add), bias if biased else None)
        assert error(out, exact) < (6e-3 if dtype == bfloat16 else 1e-6)  # at most two roundings of 2^-8
        memory[1:-1, 2 : 2 + n] = before[1:-1, 2 : 2 + n]
        np.testing.assert_array_equal(memory, before)  # nothing outside `out` is written


def test_products_with_many_rows_round_activations_to_bfloat16(library):
    """If only the weights are bfloat16, products with many rows round the float32 activations."""
    x, w = R.normal(size=(2, 50, 96)).astype(np.float32), R.normal(size=(96, 70)).astype(bfloat16)
    bias = R.normal(size=70).astype(np.float32)
    y = cpu.linear_forward(x, w, bias)
    assert y.dtype == np.float32
    assert error(y, x.astype(bfloat16).astype("d") @ w.astype("d") + bias) < 1e-6
    assert 1e-4 < error(y, x.astype("d") @ w.astype("d") + bias) < 4e-3
    few = cpu.linear_forward(x[:, :10], w, bias)  # 20 rows use gemv, which does not round x
    assert error(few, x[:, :10].astype("d") @ w.astype("d") + bias) < 1e-6


def test_primitives_are_created_by_one_thread_at_a_time(library, monkeypatch):
    """Two threads that created their first primitives at once corrupted the heap in about one process of ten."""
    create, inside, most = onednn._primitive, [], []

    def slow(key):
        inside.append(key)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return create(key)

    monkeypatch.setattr(onednn, "_primitive", slow)

    def work(i):
        a, b = np.ones((3 + i, 5), bfloat16), np.ones((5, 7), bfloat16)
        onednn.product(a, b, np.empty((3 + i, 7), np.float32))
        onednn.Plans([onednn.Product((3 + i, 11, 5), ((5, 1), (11, 1), (11, 1)))])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) >= 8
    assert max(most) == 1


def test_nan_and_infinity_propagate(library):
    a, b, out = np.ones((8, 8), bfloat16), np.ones((8, 8), bfloat16), np.empty((8, 8), np.float32)
    a[1, 2], b[3, 4] = np.nan, np.inf
    onednn.product(a, b, out)
    assert np.isnan(out[1]).all()
    assert np.isinf(np.delete(out, 1, axis=0)[:, 4]).all()
    assert (np.delete(np.delete(out, 1, axis=0), 4, axis=1) == 8).all()


def test_only_recently_used_primitives_are_cached(library):
    """Each prompt length has its own primitives."""
    b, kept = np.eye(8, dtype=bfloat16), []
    for rows in range(1, onednn.KEPT + 20):
        a, out = R.normal(size=(rows, 8)).astype(bfloat16), np.empty((rows, 8), np.float32)
        onednn.product(a, b, out)
        np.testing.assert_array_equal(out, a.astype(np.float32))
        primitive, memories, *_ = next(reversed(onednn._thread.plans.values()))
        kept.append([weakref.ref(primitive), *map(weakref.ref, filter(None, memories))])
    alive = [any(object() is not None for object in objects) for objects in kept]
    assert alive == [False] * 19 + [True] * onednn.KEPT
    assert onednn._primitive.cache_info().currsize <= onednn.KEPT


def test_an_invalid_call_raises(library):
    with pytest.raises(RuntimeError, match=r"^oneDNN: dnnl_\w+ failed with status \d+$"):
        onednn.library().new("memory_desc_create_with_strides", -1, None, 3, None)


@pytest.mark.parametrize(
    ("T", "C", "K"),
    [(1024, 768, 2304), (512, 128, 384), (512, 512, 128), (300, 100, 257), (49, 33, 20), (1536, 64, 900)],
)
def test_bfloat16_products_do_not_depend_on_the_number_of_threads(library, set_threads, monkeypatch, T, C, K):
    monkeypatch.setattr(cpu, "GEMM_FLOPS", 1)  # as many parts as possible
    x, w, dy = (R.normal(size=shape).astype(bfloat16) for shape in ((T, C), (C, K), (T, K)))
    outcomes = []
    for count in (1, 2, 3, 5, 7):
        set_threads(count)
        dw, db = (np.random.default_rng(1).normal(size=shape).astype(np.float32) for shape in (w.shape, (K,)))
        y, dx = cpu.linear_forward(x, w, w[0]), cpu.linear_backward(dy, x, w, dw, db)
        outcomes.append((y, dx, dw, db))
    exact = x.astype("d") @ w.astype("d") + w[0].astype("d")
    assert error(y, exact) < 3e-3
    for outcome in outcomes[1:]:
        for result, right in zip(outcome, outcomes[0], strict=True):
            np.testing.assert_array_equal(result, right)


@pytest.mark.parametrize(("T", "D", "rate"), [(5, 16, 0.0), (128, 64, 0.0), (300, 64, 0.2), (257, 24, 0.1)])
def test_attention_is_that_of_float32_rounded(library, T, D, rate):
    B, H = 2, 3
    key = random.Key(seed=1, step=2, site=3) if rate else None
    qkv, dout = (R.normal(size=(B, T, n * H * D)).astype(bfloat16) for n in (3, 1))
    out, lse = cpu.attention_forward(qkv, H, rate, key)
    dqkv = cpu.attention_backward(dout, qkv, out, lse, H, rate, key)
    wider = qkv.astype(np.float32)
    exact, exact_lse = cpu.attention_forward(wider, H, rate, key)
    gradient = cpu.attention_backward(dout.astype(np.float32), wider, exact, exact_lse, H, rate, key)
    assert (out.dtype, lse.dtype, dqkv.dtype) == (bfloat16, np.float32, bfloat16)
    assert error(lse, exact_lse) < 1e-6
    assert error(out, exact) < 6e-3  # at most 2^-8 twice
    for part, right in zip(np.split(dqkv, 3, axis=2), np.split(gradient, 3, axis=2), strict=True):
        assert error(part, right) < 1e-2


@pytest.mark.parametrize("T", [100, 256])
def test_the_number_of_threads_changes_no_bit_of_attention(library, set_threads, monkeypatch, T):
    monkeypatch.setattr(cpu, "ATTENTION_FLOPS", 1)  # as many parts as possible
    qkv, dout = (R.normal(size=(2, T, n * 4 * 32)).astype(bfloat16) for n in (3, 1))
    outcomes = []
    for count in (1, 2, 3, 5):
        set_threads(count)
        out, lse = cpu.attention_forward(qkv, 4, 0.0, None)
        outcomes.append((out, lse, cpu.attention_backward(dout, qkv, out, lse, 4, 0.0, None)))
    for outcome in outcomes[1:]:
        for result, right in zip(outcome, outcomes[0], strict=True):
            np.testing.assert_array_equal(result, right)


def test_attention_to_a_cache_of_any_length(library):
    qkv, cache = R.normal(size=(1, 150, 3 * 2 * 64)).astype(bfloat16), np.zeros((2, 1, 2, 200, 64), bfloat16)
    first = cpu.attention_cached(qkv[:, :77], cache, 0, 2)
    rest = cpu.attention_cached(qkv[:, 77:], cache, 77, 2)
    whole = cpu.attention_forward(qkv, 2, 0.0, None)[0]
    assert error(np.concatenate([first, rest], axis=1), whole.astype("d")) < 4e-3


def test_an_error_in_compiled_code_raises(library):
    with pytest.raises(RuntimeError, match=r"^oneDNN: a product in compiled code failed with status 2$"):
        onednn.check(np.int32(2))


def test_the_reason_names_the_instructions_or_the_package(monkeypatch):
    reason = onednn.unavailable_reason.__wrapped__
    monkeypatch.setattr(onednn.machine, "cpu_features", lambda: {"avx2", "avx512f"})
    assert reason() == NO_INSTRUCTIONS
    for features in ({"avx512_bf16"}, {"amx_bf16", "avx2"}):
        monkeypatch.setattr(onednn.machine, "cpu_features", lambda features=features: features)
        monkeypatch.setattr(onednn, "_file", lambda: None)
        assert reason().startswith("the package onednn-cpu-gomp is not installed; pip install")
        monkeypatch.setattr(onednn, "_file", lambda: Path("libdnnl.so.3"))
        assert reason() is None


def test_a_package_without_its_library_counts_as_not_installed(monkeypatch):
    monkeypatch.setattr(onednn.metadata, "files", lambda name: None)
    assert onednn._file() is None

    def missing(name):
        raise onednn.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(onednn.metadata, "files", missing)
    assert onednn._file() is None
