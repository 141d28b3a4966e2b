"""Models with different precisions in one process, on the stand-ins for CuPy and cuBLASLt.

Each model computes in its own precision.
"""

import ctypes
import itertools

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from tests.stand_ins import strict_cupy
from tinygrad2 import Key, Tensor, no_grad, ops
from tinygrad2.backend import get_backend

CONFIG = GPT2Config(vocab_size=37, n_positions=12, n_embd=32, n_layer=1, n_head=2)  # heads of 16, dropout 0.1
TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 9))


@pytest.fixture
def products(fake_cublaslt, cublaslt):
    """A function that returns the number of float32 products since its last call, by precision (CuPy and cuBLASLt)."""
    counters = (ctypes.c_int * 2).in_dll(ctypes.CDLL(fake_cublaslt), "cublaslt_products")

    def count_products():
        counts = dict(zip(("float32", "tf32"), counters, strict=True))
        counters[:] = 0, 0
        found = strict_cupy.device.products + strict_cupy.Counter(counts)
        strict_cupy.device.products.clear()
        return found

    count_products()
    return count_products


def launch(model, **options):
    """Run the forward pass twice. Returns the model's loss, and a loss computed from its logits."""
    return model.loss(TOKENS[:, :-1], TOKENS[:, 1:], Key(1)), ops.cross_entropy(model(TOKENS), TOKENS)


def collect(model, losses):
    """Run the backward passes. Returns the losses and all gradients, copied to the host."""
    for loss in losses:
        loss.backward()
    arrays = [*(loss.data for loss in losses), *(p.grad for p in model.parameters())]
    return [get_backend("cuda").to_host(array).copy() for array in arrays]


def run_alone(precision, plain, **options):
    with strict_cupy.registered(plain=plain):
        model = GPT2(CONFIG, device="cuda", dtype=precision, **options)
        return collect(model, launch(model))


def distances(a, b):
    """The distances between the arrays of two results, relative to their norms."""
    return [np.linalg.norm(x - y) / (np.linalg.norm(y) or 1) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"recompute": "block", "head_rows": 5}, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    ("plain", "precisions"), [(True, ("float32", "tf32")), (False, ("float32", "tf32", "bfloat16"))]
)
def test_models_with_different_precisions_do_not_affect_each_other(products, plain, precisions, options):
    expected = {precision: run_alone(precision, plain, **options) for precision in precisions}
    for a, b in itertools.combinations(expected.values(), 2):
        assert min(distances(a, b)[1:]) > 1e-6  # every gradient differs
        assert max(distances(a[:2], b[:2])) < 1e-2
    for order in (precisions, precisions[::-1]):
        with strict_cupy.registered(plain=plain):
            models = {precision: GPT2(CONFIG, device="cuda", dtype=precision, **options) for precision in order}
            products()
            losses = {}
            for precision, model in models.items():  # all forward passes run before all backward passes
                losses[precision] = launch(model)
                assert set(products()) == {precision} - {"bfloat16"}
            for precision, model in models.items():
                found = collect(model, losses[precision])
                assert set(products()) == {precision} - {"bfloat16"}
                for got, correct in zip(found, expected[precision], strict=True):
                    np.testing.assert_array_equal(got, correct)


@pytest.mark.parametrize("plain", [True, False])
def test_each_operation_multiplies_in_the_requested_precision(products, plain):
    R = np.random.default_rng(0)
    with strict_cupy.registered(plain=plain):
        cuda = get_backend("cuda")

        def tensor(*shape, requires_grad=True):
            return Tensor(cuda.asarray(R.normal(size=shape).astype(np.float32)), requires_grad)

        x, w, table, qkv = tensor(4, 6), tensor(6, 5), tensor(7, 6), tensor(1, 4, 12)
        for name in ("float32", "tf32", "float32"):
            tf32 = name == "tf32"
            for call in (
                lambda tf32: ops.linear(x, w, tf32=tf32),
                lambda tf32: ops.logits(x, table, tf32=tf32),
                lambda tf32: ops.lm_head(x, table, [0, 1, 2, 3], tf32=tf32),
                lambda tf32: ops.lm_head(x, table, [0, 1, 2, 3], 2, tf32=tf32),  # all products are in the forward pass
                lambda tf32: ops.attention(qkv, 2, 0.1, Key(0), tf32),
            ):
                y = call(tf32)
                forward = products()
                y.backward(cuda.asarray(np.ones(y.shape, np.float32)))
                backward = products()
                assert set(forward) == {name} == set(forward + backward)
                assert forward.total() + backward.total() >= 3
                ops.lm_head_gradients(x, table, [0, 1, 2, 3], 1.0, 2, tf32)
                assert products() == {name: 6}  # three products per chunk
                ((x @ w) * 2).sum().backward()  # operators never use TF32
                assert set(products()) == {"float32"}
            with no_grad():
                ops.attention_cached(qkv.detach(), cuda.zeros((2, 1, 2, 8, 2), "float32"), 0, 2, tf32)
            assert set(products()) == {name} or not plain  # the other kernels do not use TF32


def test_cupys_compute_type_is_restored_if_a_product_fails(products):
    with strict_cupy.registered():
        kernels = get_backend("cuda").kernels_for(True)
        with pytest.raises(AttributeError):
            kernels.linear_forward(None, None, None)
        assert strict_cupy.Linalg.compute_type == strict_cupy.Linalg.COMPUTE_TYPE_DEFAULT
