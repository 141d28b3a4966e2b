"""reference.py, compared with plain formulas and PyTorch's conventions. test_gradcheck.py tests the gradients."""

import math

import numpy as np
import pytest

from tinygrad2 import reference as k
from tinygrad2.random import Key

R = np.random.default_rng(0)
KEY = Key(seed=11, step=3, first_sample=2, site=5)


def vectorized(function):
    return np.vectorize(function, otypes=[np.float64])


def naive_softmax(x):
    e = np.exp(x)
    return e / e.sum(axis=-1, keepdims=True)


def naive_attention(qkv, n_head, mask=1.0):
    """Attention by its definition, with the full T x T matrix. The weights are multiplied by `mask` (dropout)."""
    B, T, width = qkv.shape
    D = width // 3 // n_head
    q, k_, v = (part.reshape(B, T, n_head, D) for part in np.split(qkv, 3, axis=-1))
    scores = np.einsum("bihd,bjhd->bhij", q, k_) / math.sqrt(D)
    scores[..., np.triu(np.ones((T, T), dtype=bool), 1)] = -np.inf
    out = np.einsum("bhij,bjhd->bihd", naive_softmax(scores) * mask, v).reshape(B, T, n_head * D)
    return out, np.log(np.exp(scores).sum(axis=-1))


# Elementwise and shape operations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 3, 4), ()),
        ((3, 4), (0,)),
        ((1, 4), (0, 1)),
        ((2, 1, 1), (1, 2)),
        ((4,), (0, 1)),
        ((1,), (0, 1, 2)),
        ((), ()),
    ],
)
def test_unbroadcast_is_the_adjoint_of_broadcasting(shape, axes):
    x, dy = R.normal(size=shape), R.normal(size=(2, 3, 4))
    got = k.unbroadcast(dy, shape)
    assert got.shape == shape
    assert np.sum(got * x) == pytest.approx(np.sum(dy * np.broadcast_to(x, dy.shape)))


def test_the_gradient_of_the_maximum_is_shared_equally():
    x = np.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    dx = k.max_backward(np.array([6.0, 5.0]), x, k.max_forward(x, (1,), False), (1,))
    np.testing.assert_array_equal(dx, [[0, 3, 3], [5, 0, 0]])


@pytest.mark.parametrize("index", [np.array([0, 2, 0, 0]), (np.array([1, 1]), slice(None)), (slice(None), [1, 1, 0])])
def test_gradients_of_repeated_elements_are_summed(index):
    dx, x = np.ones((3, 2)), R.normal(size=(3, 2))
    dy = R.normal(size=x[index].shape)
    k.getitem_backward(dy, index, dx)
    expected, numbers = np.ones(6), np.arange(6).reshape(3, 2)[index]
    for number, value in zip(numbers.ravel(), dy.ravel(), strict=True):
        expected[number] += value
    np.testing.assert_allclose(dx.ravel(), expected, rtol=1e-15)


# Matrix products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_linear_equals_its_formula(shape):
    x, weight, bias = R.normal(size=shape), R.normal(size=(5, 7)), R.normal(size=7)
    expected = np.einsum("...i,ij->...j", x, weight)
    np.testing.assert_allclose(k.linear_forward(x, weight, bias), expected + bias, rtol=1e-13)
    np.testing.assert_allclose(k.linear_forward(x, weight, None), expected, rtol=1e-13)


def test_parameter_gradients_are_accumulated_and_none_is_skipped():
    x, weight, dy = R.normal(size=(2, 3, 5)), R.normal(size=(5, 7)), R.normal(size=(2, 3, 7))
    dweight, dbias = np.ones((5, 7)), np.ones(7)
    dx = k.linear_backward(dy, x, weight, dweight, dbias)
    np.testing.assert_allclose(dweight - 1, np.einsum("bti,btj->ij", x, dy), rtol=1e-12)
    np.testing.assert_allclose(dbias - 1, dy.sum((0, 1)), rtol=1e-12)
    np.testing.assert_array_equal(dx, k.linear_backward(dy, x, weight, None, None))


# Embedding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (1, 1), (3, 5)])
@pytest.mark.parametrize("first", [0, 2])
def test_embedding_equals_its_formula(shape, first):
    wte, wpe, tokens = R.normal(size=(4, 3)), R.normal(size=(7, 3)), R.integers(0, 4, shape)
    y = k.embedding_forward(tokens, wte, wpe, first)
    dwte, dwpe = np.ones_like(wte), np.ones_like(wpe)
    k.embedding_backward(y, tokens, first, dwte, dwpe)
    k.embedding_backward(y, tokens, first, None, None)
    expected_wte, expected_wpe = np.ones_like(wte), np.ones_like(wpe)
    for index in np.ndindex(shape):
        token, position = tokens[index], first + index[-1]
        np.testing.assert_array_equal(y[index], wte[token] + wpe[position])
        expected_wte[token] += y[index]
        expected_wpe[position] += y[index]
    np.testing.assert_allclose(dwte, expected_wte, rtol=1e-13)
    np.testing.assert_allclose(dwpe, expected_wpe, rtol=1e-13)


# Dropout ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 5, 1001, 2**32 - 3, 2**34 - 3, 2**40 + 7])
def test_dropout_starting_at_any_element_is_a_slice_of_a_longer_draw(first):
    start = first - min(first, 9)
    long = k.dropout_scale(KEY, start, 60, 0.4, np.float64)
    for count in (1, 2, 3, 4, 5, 31):
        np.testing.assert_array_equal(
            k.dropout_scale(KEY, first, count, 0.4, np.float64), long[first - start :][:count]
        )


def test_dropout_starting_at_an_array_of_elements():
    first = np.array([[0, 1, 2], [3, 50, 93]], dtype=np.uint64)
    rows = k.dropout_scale(KEY, first, 7, 0.4, np.float32)
    assert rows.shape == (2, 3, 7)
    assert rows.dtype == np.float32
    long = k.dropout_scale(KEY, 0, 100, 0.4, np.float32)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(rows[index], long[int(first[index]) :][:7])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_preserves_the_mean(rate):
    scale = k.dropout_scale(KEY, 0, 100_000, rate, np.float64)
    np.testing.assert_allclose(np.unique(scale), [0, 1 / (1 - rate)], rtol=1e-15)
    assert scale.mean() == pytest.approx(1, abs=5 * math.sqrt(rate / (1 - rate) / 100_000))
    assert scale.var() == pytest.approx(rate / (1 - rate), rel=0.05)
    assert abs(np.corrcoef(scale[1:], scale[:-1])[0, 1]) < 5 / math.sqrt(100_000)


def test_dropout_differs_by_seed_step_and_site():
    keys = (Key(0), Key(1), Key(0, step=1), Key(0, site=1))
    assert len({k.dropout_scale(key, 0, 64, 0.5, np.float32).tobytes() for key in keys}) == 4


@pytest.mark.parametrize("split", [1, 2, 5])
def test_splitting_a_batch_gives_the_same_dropout(split):
    x = R.normal(size=(7, 5, 12))
    dy = R.normal(size=(7, 5, 4))
    parts = [(x[i : i + split], dy[i : i + split], Key(1, 2, first_sample=i)) for i in range(0, 7, split)]
    full = k.dropout_forward(x, 0.3, Key(1, 2))
    np.testing.assert_array_equal(full, np.concatenate([k.dropout_forward(p, 0.3, key) for p, _, key in parts]))
    full, lse = k.attention_forward(x, 2, 0.3, Key(1, 2))
    outs = [k.attention_forward(p, 2, 0.3, key) for p, _, key in parts]
    np.testing.assert_allclose(full, np.concatenate([out for out, _ in outs]), rtol=1e-12)
    gradients = [k.attention_backward(d, p, *o, 2, 0.3, key) for (p, d, key), o in zip(parts, outs, strict=True)]
    np.testing.assert_allclose(
        k.attention_backward(dy, x, full, lse, 2, 0.3, Key(1, 2)), np.concatenate(gradients), rtol=1e-9, atol=1e-14
    )


# LayerNorm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1), (2, 3, 17)])
def test_layernorm_equals_its_formula(shape):
    x, weight, bias = 3 + 2 * R.normal(size=shape), R.normal(size=shape[-1]), R.normal(size=shape[-1])
    y, mean, rstd = k.layernorm_forward(x, weight, bias, 1e-3)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3) * weight + bias
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert mean.shape == rstd.shape == (*shape[:-1], 1)
    s, y2, *_ = k.add_layernorm_forward(x - 1, np.ones_like(x), weight, bias, 1e-3)
    np.testing.assert_allclose(s, x, rtol=1e-14)
    np.testing.assert_allclose(y2, y, rtol=1e-9, atol=1e-9)


def test_layernorm_with_a_large_mean_in_float32():
    """The variance is computed from centered values: mean(x^2) - mean(x)^2 would lose all precision at 1e4."""
    x = R.normal(size=(4, 64))
    y = k.layernorm_forward((x + 1e4).astype(np.float32), np.float32(1), np.float32(0), 1e-5)[0]
    np.testing.assert_allclose(y, (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), atol=5e-3)


# Attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "n_head", "D"), [(1, 1, 1), (1, 3, 2), (13, 2, 5), (127, 1, 3), (128, 1, 3), (129, 2, 1)]
)
@pytest.mark.parametrize("key", [None, KEY], ids=["no dropout", "dropout"])
def test_attention_equals_its_formula(T, n_head, D, key):
    qkv = R.normal(size=(2, T, 3 * n_head * D))
    mask = 1.0
    if key is not None:
        first = key.first_sample * n_head * T * T
        mask = k.dropout_scale(key, first, 2 * n_head * T * T, 0.3, np.float64).reshape(2, n_head, T, T)
    out, lse = k.attention_forward(qkv, n_head, 0.3, key)
    expected, expected_lse = naive_attention(qkv, n_head, mask)
    np.testing.assert_allclose(out, expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1000])
def test_attention_does_not_depend_on_the_block_size(monkeypatch, rows):
    qkv, dout = R.normal(size=(2, 11, 12)), R.normal(size=(2, 11, 4))
    out, lse = k.attention_forward(qkv, 2, 0.3, KEY)
    dqkv = k.attention_backward(dout, qkv, out, lse, 2, 0.3, KEY)
    monkeypatch.setattr(k, "QUERY_ROWS", rows)
    out2, lse2 = k.attention_forward(qkv, 2, 0.3, KEY)
    np.testing.assert_allclose(out2, out, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(k.attention_backward(dout, qkv, out2, lse2, 2, 0.3, KEY), dqkv, rtol=1e-10, atol=1e-14)


def test_attention_is_causal():
    qkv, dout = R.normal(size=(1, 140, 6)), R.normal(size=(1, 140, 2))
    changed = qkv.copy()
    changed[:, 70:] += 1
    out, lse = k.attention_forward(qkv, 1, 0.0, None)
    np.testing.assert_array_equal(out[:, :70], k.attention_forward(changed, 1, 0.0, None)[0][:, :70])
    dout[:, 70:] = 0
    assert not k.attention_backward(dout, qkv, out, lse, 1, 0.0, None)[:, 70:].any()


def test_attention_with_large_scores_is_finite():
    qkv = R.normal(size=(1, 9, 6)) * 1e3
    out, lse = k.attention_forward(qkv.astype(np.float32), 1, 0.0, None)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 1, 3]])
def test_cached_attention_equals_attention(pieces):
    qkv, cache, outs, length = R.normal(size=(2, 9, 12)), np.full((2, 2, 2, 10, 2), np.nan), [], 0
    for n in pieces:
        outs.append(k.attention_cached(qkv[:, length : length + n], cache, length, 2))
        length += n
    np.testing.assert_allclose(np.concatenate(outs, axis=1), naive_attention(qkv, 2)[0], rtol=1e-12)
    assert np.isnan(cache[:, :, :, 9:]).all()


# GELU ---------------------------------------------------------------------------------------------------------------


def test_erf_has_full_precision():
    x = np.concatenate(
        [np.linspace(-7, 7, 20_001), [0.46875, -0.46875, 4.0, -4.0, 1e-300, 5e-324, 1e-8, 30.0, -1e10, np.inf, -np.inf]]
    )
    got, expected = k.erf(x), vectorized(math.erf)(x)
    assert np.abs(got - expected).max() <= 4e-16
    small = np.abs(x) < 0.5
    np.testing.assert_allclose(got[small], expected[small], rtol=6e-16)
    assert np.isnan(k.erf(np.array([np.nan])))
    np.testing.assert_array_equal(k.erf(-x), -got)


def test_erf_has_full_precision_in_float32():
    x = np.linspace(-7, 7, 5001, dtype=np.float32)
    got = k.erf(x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, vectorized(math.erf)(x), atol=1.2e-7)


@pytest.mark.parametrize("bias", [None, np.array([0.5, -1.0, 2.0])])
def test_gelu_equals_its_formula(bias):
    x = R.normal(size=(40, 3)) * 3
    u = x if bias is None else x + bias
    tanh_form = vectorized(lambda u: 0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))))
    exact_form = vectorized(lambda u: u * 0.5 * (1 + math.erf(u / math.sqrt(2))))
    np.testing.assert_allclose(k.gelu_forward(x, bias), tanh_form(u), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(k.gelu_exact_forward(x, bias), exact_form(u), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("backward", [k.gelu_backward, k.gelu_exact_backward])
def test_gelu_of_large_arguments_is_linear(backward):
    x = np.array([-1e4, -40.0, 40.0, 1e4], dtype=np.float32)
    np.testing.assert_array_equal(backward(np.ones_like(x), x, None, None), [0, 0, 1, 1])


# Softmax, cross-entropy, head ---------------------------------------------------------------------------------------


def test_softmax_equals_its_formula():
    x = R.normal(size=(2, 3, 7))
    np.testing.assert_allclose(k.softmax_forward(x), naive_softmax(x), rtol=1e-13)
    np.testing.assert_allclose(k.softmax_forward(x + 1e4), naive_softmax(x), rtol=1e-10)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
def test_cross_entropy_equals_its_formula(shape):
    logits, targets = R.normal(size=(*shape, 7)), R.integers(0, 7, shape)
    loss, log_total = k.cross_entropy_forward(logits, targets)
    p = naive_softmax(logits)
    expected = -np.mean([math.log(p[index][targets[index]]) for index in np.ndindex(shape)])
    assert loss == pytest.approx(expected, rel=1e-13)
    largest = logits.max(-1)
    np.testing.assert_allclose(largest + log_total[..., 0], np.log(np.exp(logits).sum(-1)), rtol=1e-12)
    assert k.cross_entropy_forward(logits + 1e4, targets)[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_cross_entropy_backward_for_any_memory_layout(order):
    logits = np.ascontiguousarray(R.normal(size=(2, 3, 7)).transpose(order)).transpose(np.argsort(order))
    targets = R.integers(0, 7, (2, 3))
    _, log_total = k.cross_entropy_forward(logits, targets)
    expected = (naive_softmax(logits) - np.eye(7)[targets]) / 6
    np.testing.assert_allclose(k.cross_entropy_backward(1.0, logits, targets, log_total), expected, atol=1e-15)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
def test_lm_head_equals_linear_and_cross_entropy(shape):
    x, weight, targets = R.normal(size=(*shape, 4)), R.normal(size=(7, 4)), R.integers(0, 7, shape)
    loss, dlogits = k.lm_head_forward(x, weight, targets)
    logits = x @ weight.T
    expected, log_total = k.cross_entropy_forward(logits, targets)
    assert loss == pytest.approx(expected, rel=1e-13)
    expected_dlogits = k.cross_entropy_backward(1.0, logits, targets, log_total)
    np.testing.assert_allclose(dlogits.reshape(logits.shape), expected_dlogits, rtol=1e-11, atol=1e-15)
    dweight = np.ones_like(weight)
    dx = k.lm_head_backward(3.0, dlogits, x, weight, dweight)
    np.testing.assert_allclose(dx, 3 * expected_dlogits @ weight, rtol=1e-10, atol=1e-14)
    expected_dweight = 3 * np.einsum("nv,nc->vc", expected_dlogits.reshape(-1, 7), x.reshape(-1, 4))
    np.testing.assert_allclose(dweight - 1, expected_dweight, rtol=1e-10, atol=1e-14)


# Optimizer ----------------------------------------------------------------------------------------------------------


def test_squared_norm_and_norm():
    x = R.normal(size=101)
    squares = k.squared_norm(x)
    assert squares.shape == (3,)
    assert squares[0] == pytest.approx(sum(value**2 for value in x))
    assert squares[1] == squares[0] * 2.0**-128
    assert k.norm(squares) == math.sqrt(squares[0])


def test_adamw_step_changes_only_the_documented_arrays():
    value, grad, m, v = (R.random(9) for _ in range(4))
    grad.flags.writeable = False
    before = value.copy(), m.copy(), v.copy()
    scale, lr, step = np.array(0.5), np.array(0.1), np.array(3.0)
    k.adamw_step(value, grad, m, v, np.array(np.nan), lr, 0.9, 0.99, 1e-8, 0.01, step)
    for array, old in zip((value, m, v), before, strict=True):
        np.testing.assert_array_equal(array, old)
    k.adamw_step(value, grad, m, v, scale, lr, 0.9, 0.99, 1e-8, 0.01, step)
    g = 0.5 * grad
    np.testing.assert_allclose(m, 0.9 * before[1] + 0.1 * g, rtol=1e-14)
    np.testing.assert_allclose(v, 0.99 * before[2] + 0.01 * g * g, rtol=1e-14)
    step = (m / (1 - 0.9**3)) / (np.sqrt(v / (1 - 0.99**3)) + 1e-8) + 0.01 * before[0]
    np.testing.assert_allclose(value, before[0] - 0.1 * step, rtol=1e-13)
