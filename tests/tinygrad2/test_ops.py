import math
import tracemalloc

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tinygrad2 import Key, Tensor, autograd, memory, no_grad, ops
from tinygrad2.backend import backend_of, get_backend
from tinygrad2.gradcheck import CASES
from tinygrad2.kernels import onednn
from tinygrad2.params import Parameter

R = np.random.default_rng(0)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def values(case, dtype="float64"):
    random = np.random.default_rng(0)
    return [np.array(case.draw(random, shape), dtype=dtype) for shape in case.shapes]


def run(case, arrays):
    """The results, and the gradients of their weighted sum."""
    inputs = [Tensor(array, requires_grad=True) for array in arrays]
    y = case.fn(*inputs)
    results = y if isinstance(y, tuple) else (y,)
    total = None
    for result in results:
        weights = np.linspace(0.5, 1.5, result.size, dtype=result.dtype).reshape(result.shape)
        part = (result * weights).sum()
        total = part if total is None else total + part
    total.backward()
    return [result.data for result in results], [np.zeros_like(x.data) if x.grad is None else x.grad for x in inputs]


def strided(array):
    """Every second element of a larger array."""
    spread = np.full(tuple(2 * n for n in array.shape), np.nan, dtype=array.dtype)
    view = spread[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@every_case
@pytest.mark.parametrize("layout", [np.asfortranarray, strided, read_only])
def test_results_do_not_depend_on_the_memory_layout(case, layout):
    arrays = values(case)
    placed = [layout(array) for array in arrays]
    for got, expected in zip(run(case, placed), run(case, arrays), strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    for array, same in zip(arrays, placed, strict=True):
        np.testing.assert_array_equal(array, same)


@every_case
def test_float32_inputs_give_only_float32_arrays(case, monkeypatch):
    """This includes results, gradients, all saved arrays and all intermediate gradients."""
    seen = []
    node = autograd.Node

    def watched(parents, backward, saved, forms, name, kernel=False):
        def watching(*arguments):
            out = backward(*arguments)
            dy = arguments[0 if kernel else 1]
            seen.extend([*(dy if isinstance(dy, tuple) else (dy,)), *(out if isinstance(out, tuple) else (out,))])
            return out

        seen.extend(saved)
        return node(parents, watching, saved, forms, name, kernel)

    monkeypatch.setattr(autograd, "Node", watched)
    results, gradients = run(case, values(case, "float32"))
    floats = [a for a in [*results, *gradients, *seen] if getattr(a, "dtype", np.dtype(int)).kind == "f"]
    assert len(floats) > len(results) + len(gradients)
    assert {a.dtype for a in floats} == {np.dtype("float32")}
    for got, expected in zip(results, run(case, values(case))[0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-4)


@every_case
def test_nan_propagates(case):
    """A NaN in an input reaches the results, except in operations that ignore some elements."""
    arrays = values(case)
    for array in arrays:
        array.reshape(-1)[-1] = np.nan
    ignoring = {"getitem, pairs", "getitem, repeated integers", "getitem, slices", "embedding", "embedding, positions"}
    ignoring |= {"nan_to_num", "tril", "tril, diagonal", "diagonal", "trace", "gather", "nll_loss"}
    with np.errstate(all="ignore"):
        results, _ = run(case, arrays)
    assert case.name in ignoring or any(np.isnan(result).any() for result in results)


@pytest.mark.parametrize("dropped", [0, 1])
def test_add_layernorm_with_an_unused_result_equals_separate_operations(dropped):
    arrays = [R.normal(size=shape) for shape in ((2, 3, 5), (2, 3, 5), (5,), (5,))]
    fused, separate = ([Tensor(a, requires_grad=True) for a in arrays] for _ in range(2))
    dy = R.normal(size=(2, 3, 5))
    ops.add_layernorm(*fused)[1 - dropped].backward(dy)
    s = separate[0] + separate[1]
    (ops.layernorm(s, *separate[2:]) if dropped == 0 else s).backward(dy)
    for a, b in zip(fused, separate, strict=True):
        if b.grad is None:
            assert a.grad is None or not a.grad.any()
        else:
            np.testing.assert_allclose(a.grad, b.grad, rtol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_gelu_with_a_bias_equals_gelu_of_the_sum(exact):
    x, bias = Tensor(R.normal(size=(4, 3)), requires_grad=True), Tensor(R.normal(size=3), requires_grad=True)
    y = ops.gelu(x, bias, exact)
    np.testing.assert_array_equal(y.data, ops.gelu(x + bias, exact=exact).data)


def test_a_constant_weight_has_no_gradient():
    x, weight, bias = (Tensor(R.normal(size=shape)) for shape in ((2, 3), (3, 4), (4,)))
    for wanted in (x, weight, bias):
        leaf = Tensor(wanted.data, requires_grad=True)
        arguments = [leaf if t is wanted else t for t in (x, weight, bias)]
        ops.linear(*arguments).sum().backward()
        assert leaf.grad.any()
        assert all(t.grad is None for t in arguments if t is not leaf)


def test_a_weight_may_be_the_result_of_an_operation():
    """into() also supports a weight that is not a leaf. Its gradient is propagated to its inputs."""
    x, weight = Tensor(R.normal(size=(2, 3))), Tensor(R.normal(size=(3, 4)), requires_grad=True)
    shared = weight * 2
    (ops.linear(x, shared).sum() + ops.linear(x, shared).sum() + shared.sum()).backward()
    np.testing.assert_allclose(weight.grad, 2 * (2 * x.data.sum(0)[:, None] + 1) * np.ones((3, 4)), rtol=1e-12)


def test_a_tied_embedding_sums_both_gradients():
    tokens, targets = np.array([[0, 2, 2]]), np.array([[2, 2, 1]])
    wte = Tensor(R.normal(size=(4, 3)), requires_grad=True)
    head, table = Tensor(wte.data, requires_grad=True), Tensor(wte.data, requires_grad=True)
    ops.lm_head(ops.embedding(tokens, wte), wte, targets).backward()
    ops.lm_head(ops.embedding(tokens, table), head, targets).backward()
    np.testing.assert_allclose(wte.grad, head.grad + table.grad, rtol=1e-13)


def test_dropout_without_a_key_or_with_rate_zero_is_the_identity():
    x = Tensor(R.normal(size=(2, 3)), requires_grad=True)
    assert ops.dropout(x, 0.5, None) is x
    assert ops.dropout(x, 0.0, Key(0)) is x
    qkv = Tensor(R.normal(size=(1, 4, 6)))
    np.testing.assert_array_equal(ops.attention(qkv, 1, 0.0, Key(0)).data, ops.attention(qkv, 1, 0.5, None).data)
    assert (ops.attention(qkv, 1, 0.5, Key(0)).data != ops.attention(qkv, 1).data).any()


@pytest.mark.parametrize("split", [1, 3])
def test_splitting_a_batch_gives_the_same_masks_and_gradients(split):
    arrays = R.normal(size=(6, 5, 12)), R.normal(size=(6, 5, 4))

    def gradient(parts):
        out = []
        for start, part, dy in parts:
            key = Key(1, 2, first_sample=start)
            x = Tensor(part, requires_grad=True)
            ops.dropout(ops.attention(x, 2, 0.4, key.at(1)), 0.4, key.at(2)).backward(dy)
            out.append(x.grad)
        return np.concatenate(out)

    parts = [(i, arrays[0][i : i + split], arrays[1][i : i + split]) for i in range(0, 6, split)]
    np.testing.assert_allclose(gradient(parts), gradient([(0, *arrays)]), rtol=1e-10, atol=1e-14)


def saved_bytes(y):
    return sum(a.nbytes for a in y._edge[0].saved if isinstance(a, np.ndarray))


def test_attention_saves_memory_linear_in_T():
    sizes = []
    for T in (64, 128, 256, 512):
        y = ops.attention(Tensor(np.ones((1, T, 12), dtype=np.float32), requires_grad=True), 2, 0.1, Key(0))
        sizes.append(saved_bytes(y))
        assert sizes[-1] == 4 * T * (12 + 4 + 2)  # qkv, the result, lse
    assert sizes[-1] == 8 * sizes[0]


def test_attention_uses_memory_linear_in_T(monkeypatch):
    peaks = []
    for T in (512, 1024):
        monkeypatch.setattr(memory, "memory_pool", memory.MemoryPool())
        qkv = Tensor(np.ones((1, T, 6), dtype=np.float32), requires_grad=True)
        tracemalloc.start()
        ops.attention(qkv, 1).backward(np.ones((1, T, 2), dtype=np.float32))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2.5 * peaks[0]


def test_dropout_does_not_save_a_mask():
    y = ops.dropout(Tensor(np.ones((4, 100)), requires_grad=True), 0.5, Key(0))
    assert saved_bytes(y) == 0


def test_tokens_may_be_lists_integer_arrays_or_tensors():
    wte = Tensor(R.normal(size=(4, 3)))
    expected = wte.data[[[0, 3, 1]]]
    for tokens in ([[0, 3, 1]], ((0, 3, 1),), np.array([[0, 3, 1]], dtype=np.uint16), Tensor(np.array([[0, 3, 1]]))):
        np.testing.assert_array_equal(ops.embedding(tokens, wte).data, expected)


def ones(*shape):
    return Tensor(np.ones(shape))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.linear(ones(2, 3), ones(4, 5)),
            ValueError,
            "linear: x has shape (2, 3), weight (4, 5); expected (..., C_in), (C_in, C_out)",
        ),
        (lambda: ops.linear(ones(2, 3), ones(3)), ValueError, "linear: x has shape (2, 3), weight (3,)"),
        (lambda: ops.linear(ones(), ones(3, 3)), ValueError, "linear: x has shape (), weight (3, 3)"),
        (
            lambda: ops.linear(ones(2, 3), ones(3, 4), ones(3)),
            ValueError,
            "linear: bias has shape (3,); expected (4,)",
        ),
        (
            lambda: ops.embedding([[0, 4]], ones(4, 3)),
            ValueError,
            "embedding: tokens contain 4; expected integers in [0, 4)",
        ),
        (
            lambda: ops.embedding([[0, -1]], ones(4, 3)),
            ValueError,
            "embedding: tokens contain -1; expected integers in [0, 4)",
        ),
        (lambda: ops.embedding(np.ones((1, 2)), ones(4, 3)), TypeError, "embedding: tokens have dtype float64"),
        (
            lambda: ops.embedding([[0, 1]], ones(4, 3), ones(5, 4)),
            ValueError,
            "embedding: wpe has shape (5, 4); expected (5, 3)",
        ),
        (
            lambda: ops.embedding([[0, 1, 2]], ones(4, 3), ones(5, 3), 3),
            ValueError,
            "embedding: positions 3 to 5 requested; wpe has 5",
        ),
        (
            lambda: ops.dropout(ones(2), 1.0, None),
            ValueError,
            "dropout: the dropout rate is 1.0; expected 0 <= rate < 1",
        ),
        (lambda: ops.dropout(ones(2), -0.1, None), ValueError, "dropout: the dropout rate is -0.1"),
        (lambda: ops.dropout(ones(2), float("nan"), None), ValueError, "dropout: the dropout rate is nan"),
        (
            lambda: ops.layernorm(ones(2, 3), ones(2), ones(3)),
            ValueError,
            "layernorm: weight has shape (2,); expected (3,)",
        ),
        (
            lambda: ops.layernorm(ones(2, 3), ones(3), ones(1)),
            ValueError,
            "layernorm: bias has shape (1,); expected (3,)",
        ),
        (
            lambda: ops.add_layernorm(ones(2, 3), ones(3), ones(3), ones(3)),
            ValueError,
            "add_layernorm: delta has shape (3,); expected (2, 3)",
        ),
        (
            lambda: ops.add_layernorm(ones(2, 3), ones(2, 3), ones(2), ones(3)),
            ValueError,
            "add_layernorm: weight has shape (2,); expected (3,)",
        ),
        (
            lambda: ops.add_layernorm(ones(2, 3), ones(2, 3), ones(3), ones(2)),
            ValueError,
            "add_layernorm: bias has shape (2,); expected (3,)",
        ),
        (
            lambda: ops.attention(ones(2, 5, 100), 4),
            ValueError,
            "attention: qkv has shape (2, 5, 100); expected (B, T, 3 * n_head * head_dim) with n_head = 4",
        ),
        (lambda: ops.attention(ones(5, 12), 4), ValueError, "attention: qkv has shape (5, 12)"),
        (lambda: ops.attention(ones(1, 5, 12), 4, 1.5), ValueError, "attention: the dropout rate is 1.5"),
        (lambda: ops.gelu(ones(2, 3), ones(2)), ValueError, "gelu: bias has shape (2,); expected (3,)"),
        (
            lambda: ops.cross_entropy(ones(2, 3), [0, 3]),
            ValueError,
            "cross_entropy: targets contain 3; expected integers in [0, 3)",
        ),
        (
            lambda: ops.cross_entropy(ones(2, 3), [0]),
            ValueError,
            "cross_entropy: targets has shape (1,); expected (2,)",
        ),
        (lambda: ops.cross_entropy(ones(1, 3), [0.5]), TypeError, "cross_entropy: targets have dtype float64"),
        (
            lambda: ops.lm_head(ones(2, 3), ones(3, 4), [0, 1]),
            ValueError,
            "lm_head: x has shape (2, 3), weight (3, 4); expected (..., C) and (V, C)",
        ),
        (lambda: ops.lm_head(ones(2, 3), ones(4, 3), [0, 4]), ValueError, "lm_head: targets contain 4"),
        (
            lambda: ops.lm_head(ones(2, 3), ones(4, 3), [0]),
            ValueError,
            "lm_head: targets has shape (1,); expected (2,)",
        ),
        (
            lambda: ops.attention_cached(ones(1, 3, 6), np.zeros((2, 1, 1, 4, 2)), 2, 1),
            ValueError,
            "attention_cached: 5 positions needed; the cache has space for 4",
        ),
        (
            lambda: ops.attention_cached(
                Tensor(np.ones((1, 1, 6)), requires_grad=True), np.zeros((2, 1, 1, 4, 2)), 0, 1
            ),
            RuntimeError,
            "attention_cached: there is no backward pass; call it inside no_grad()",
        ),
    ],
)
def test_an_invalid_argument_raises_a_one_line_error(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.linear(x, Tensor(w.data.astype("f8"))), "linear: weight is float64; expected float32"),
        (lambda x, w: ops.linear(x.data, w), "expected Tensors, got ndarray"),
        (lambda x, w: ops.softmax(Tensor(np.arange(3))), "dtypes int64; expected one floating-point dtype"),
        (lambda x, w: ops.embedding([0, 1], w, w, first_position=-1), "positions -1 to 0 requested"),
        (lambda x, w: ops.embedding(np.int64(1), w, w), r"tokens have shape \(\); with positions"),
        (lambda x, w: ops.embedding([[0], [1, 2]], w), "rows of different lengths"),
        (lambda x, w: ops.attention(Tensor(np.ones((1, 2, 6))), 0), "n_head = 0"),
        (lambda x, w: ops.cross_entropy(Tensor(1.0), 0), r"logits have shape \(\)"),
        (lambda x, w: ops.cross_entropy(x, None), "targets have type NoneType"),
        (lambda x, w: ops.layernorm(Tensor(1.0), Tensor(1.0), Tensor(1.0)), r"layernorm: x has shape \(\); expected"),
    ],
)
def test_arguments_that_would_be_promoted_or_misinterpreted_are_rejected(call, message):
    x, w = Tensor(np.ones((2, 3), dtype=np.float32)), Tensor(np.ones((3, 3), dtype=np.float32))
    with pytest.raises((TypeError, ValueError), match=message):
        call(x, w)


def test_numpy_scalars_as_arguments_do_not_promote():
    x, w = Tensor(np.ones((2, 3), dtype=np.float32)), Tensor(np.ones(3, dtype=np.float32))
    assert ops.layernorm(x, w, w, np.float64(1e-5)).dtype == np.float32
    assert ops.dropout(x, np.float64(0.5), Key(0)).dtype == np.float32
    assert (x ** np.float64(2)).dtype == np.float32


@pytest.mark.parametrize("head_rows", [1, 4, 7, 14, 100])
def test_lm_head_in_chunks_of_rows_equals_lm_head(head_rows):
    rng = np.random.default_rng(0)
    values, targets = (rng.normal(size=(2, 7, 4)), rng.normal(size=(11, 4))), rng.integers(0, 11, (2, 7))
    results = []
    for rows in (None, head_rows):
        x, weight = (Tensor(value, requires_grad=True) for value in values)
        loss = ops.lm_head(x, weight, targets, rows)
        (loss * 0.7).backward()
        results.append((loss.data, x.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("head_rows", [None, 4, 100])
@pytest.mark.parametrize("kind", ["leaf", "computed", "constant"])
def test_lm_head_gradients_equals_lm_head_and_its_backward_pass(kind, head_rows):
    """The weight is a leaf, is computed from a leaf, or is a constant."""
    rng = np.random.default_rng(0)
    values, targets = (rng.normal(size=(2, 7, 4)), rng.normal(size=(11, 4))), rng.integers(0, 11, (2, 7))
    results = []
    for at_once in (False, True):
        x, weight = (Tensor(value, requires_grad=True) for value in values)
        for _ in range(2):
            used = {"leaf": weight, "computed": weight * 2, "constant": weight.detach()}[kind]
            if at_once:
                loss = ops.lm_head_gradients(x * 1, used, targets, 0.7, head_rows)
            else:
                loss = ops.lm_head(x * 1, used, targets).data
                (ops.lm_head(x * 1, used, targets) * 0.7).backward()
        results.append((loss, x.grad, 0 if weight.grad is None else weight.grad))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_lm_head_gradients_of_empty_inputs_and_of_constants():
    x, weight = Tensor(np.ones((2, 3)), requires_grad=True), Tensor(np.ones((5, 3)), requires_grad=True)
    assert np.isnan(ops.lm_head_gradients(x[:0], weight, []))
    np.testing.assert_array_equal(weight.grad, 0)
    with pytest.raises(RuntimeError, match="nothing is recorded here"):
        ops.lm_head_gradients(x.detach(), weight.detach(), [0, 1])
    with pytest.raises(ValueError, match="head_rows is 0; expected 1 or more"):
        ops.lm_head_gradients(x, weight, [0, 1], head_rows=0)


@pytest.mark.parametrize("head_rows", [None, 3])
def test_lm_head_without_gradients_computes_only_the_loss(head_rows, monkeypatch):
    calls, kernels = [], backend_of(np.ones(1)).kernels
    monkeypatch.setattr(kernels, "lm_head_backward", lambda *arguments: calls.append(arguments))
    x, weight = Tensor(np.ones((2, 4, 3)), requires_grad=True), Tensor(np.ones((5, 3)), requires_grad=True)
    with no_grad():
        loss = ops.lm_head(x, weight, np.zeros((2, 4), int), head_rows)
    assert loss.item() == pytest.approx(math.log(5))
    ops.lm_head(x.detach(), weight.detach(), np.zeros((2, 4), int), head_rows)
    assert not calls


def test_lm_head_rejects_chunks_of_zero_rows():
    with pytest.raises(ValueError, match="head_rows is 0; expected 1 or more"):
        ops.lm_head(Tensor(np.ones((2, 3))), Tensor(np.ones((5, 3))), [0, 1], 0)


def half(*shape):
    return Parameter(R.normal(size=shape).astype(bfloat16))


def wide(x):
    return Tensor(x.data.astype(np.float32))


@pytest.mark.parametrize("rows", [1, 7, 32, 33, 150])  # 32 or fewer rows use gemv
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operations_with_bfloat16_weights_equal_those_with_rounded_weights(rows, dtype):
    x, w, b = Tensor(R.normal(size=(rows, 24)).astype(dtype)), half(24, 40), Tensor(R.normal(size=40).astype(dtype))
    table, wpe, tokens = half(40, 24), half(rows + 3, 24), R.integers(0, 40, (2, rows))
    with no_grad():
        for y, weight, bias in ((ops.linear(x, w, b), w.data, b.data), (ops.logits(x, table), table.data.T, 0)):
            expected = x.data @ weight.astype(np.float64) + bias
            assert y.dtype == dtype
            if dtype == "float32" and rows > 32 and onednn.library():  # x is rounded to bfloat16 too
                assert np.linalg.norm(y.data - expected) < 2**-8 * np.linalg.norm(expected)
            else:
                np.testing.assert_allclose(y.data, expected, rtol=1e-5, atol=1e-5)
        for positions in (None, wpe):
            y = ops.embedding(tokens, table, positions, 2) if positions is not None else ops.embedding(tokens, table)
            expected = table.data.astype(np.float32)[tokens]
            if positions is not None:
                expected = expected + wpe.data.astype(np.float32)[2 : 2 + rows]
            assert y.dtype == np.float32
            np.testing.assert_array_equal(y.data, expected)
        targets = tokens[0]
        for head_rows in (None, 5):
            loss = ops.lm_head(x, table, targets, head_rows)
            expected = ops.lm_head(x, Tensor(table.data.astype(dtype)), targets, head_rows)
            assert loss.dtype == dtype
            np.testing.assert_allclose(loss.data, expected.data, rtol=1e-6)


@pytest.mark.parametrize("slow", [None, "this processor has no instructions for it"])
def test_attention_over_a_prompt_in_bfloat16(monkeypatch, slow):
    monkeypatch.setattr(type(get_backend("cpu")), "slow_reason", lambda self, precision: slow)
    n_head, D, T = 2, 16, 70
    tokens = [Tensor(R.normal(size=(1, count, 3 * n_head * D)).astype(np.float32)) for count in (T, 40, 1)]
    caches = [np.zeros((2, 1, n_head, 128, D), np.float32) for _ in range(2)]
    length = 0
    with no_grad():
        for qkv in tokens:
            got = ops.attention_cached(qkv, caches[0], length, n_head, prompt_dtype="bfloat16")
            rounds = qkv.shape[1] > 1 and slow is None
            read = Tensor(qkv.data.astype(bfloat16).astype(np.float32)) if rounds else qkv
            expected = ops.attention_cached(read, caches[1], length, n_head)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(caches[0], caches[1])
            difference = np.linalg.norm(got.data - expected.data) / np.linalg.norm(expected.data)
            assert difference < 2**-8 if rounds else difference == 0
            assert not rounds or difference > 0  # the probabilities and the result are rounded too
            length += qkv.shape[1]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_bfloat16_weights_have_no_gradients(requires_grad):
    x = Tensor(np.ones((2, 4), np.float32), requires_grad)
    for what, call in (
        ("linear: weight", lambda: ops.linear(x, half(4, 3))),
        ("logits: weight", lambda: ops.logits(x, half(3, 4))),
        ("embedding: wte", lambda: ops.embedding([1], half(4, 3))),
        ("lm_head: weight", lambda: ops.lm_head(x, half(3, 4), [0, 1])),
    ):
        with pytest.raises(TypeError) as error:
            call()
        assert str(error.value) == f"{what} is stored in bfloat16 only and has no gradient; compute inside no_grad()"


def test_only_matrices_may_be_stored_in_bfloat16_only():
    x, w, b = wide(half(2, 4)), wide(half(4, 3)), wide(half(3))
    with no_grad():
        for call, message in (
            (lambda: ops.linear(half(2, 4), w), "linear: weight is float32; expected bfloat16"),
            (lambda: ops.linear(x, w, half(3)), "linear: bias is bfloat16; expected float32"),
            (lambda: ops.linear(x, half(4, 3), half(3)), "linear: bias is bfloat16; expected float32"),
            (
                lambda: ops.lm_head(half(2, 4), Tensor(w.data.T), [0, 1]),
                "lm_head: weight is float32; expected bfloat16",
            ),
            (lambda: ops.layernorm(x, half(4), half(4)), "layernorm: weight is bfloat16; expected float32"),
            (lambda: ops.gelu(wide(b), half(3)), "gelu: bias is bfloat16; expected float32"),
            (lambda: ops.embedding([1], w, dtype="float64"), "embedding: wte is float32; expected float64"),
        ):
            with pytest.raises(TypeError) as raised:
                call()
            assert str(raised.value) == f"{message}, the dtype of the activations"


def test_tf32_is_rejected_if_not_supported():
    x, w = Tensor(np.ones((2, 6), np.float32)), Tensor(np.ones((6, 6), np.float32))
    for call in (
        lambda: ops.linear(x, w, tf32=True),
        lambda: ops.logits(x, w, tf32=True),
        lambda: ops.lm_head(x, w, [0, 1], tf32=True),
        lambda: ops.attention(x.reshape(1, 2, 6), 1, tf32=True),
    ):
        with pytest.raises(ValueError, match=r"^tf32 needs a GPU; the arrays are on cpu$"):
            call()
