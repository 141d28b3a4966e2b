"""Complete training steps with the CUDA kernels and the GEMM module, on a machine without a GPU.

The CUDA C++ of the kernels runs in the simulator (tests/stand_ins/cudasim). Matrix products use a stand-in for
cuBLASLt, and arrays follow CuPy's rules (tests/stand_ins/strict_cupy.py). The tests of each family are in
test_cuda_FAMILY.py.
"""

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from tests.gpt2 import test_gpu
from tests.stand_ins import cudasim, strict_cupy
from tests.tinygrad2.copies import copy_of
from tinygrad2 import Key, no_grad, ops, optim
from tinygrad2.backend import get_backend

CONFIG = GPT2Config(vocab_size=101, n_positions=80, n_embd=128, n_layer=2, n_head=2)  # heads of 64, dropout 0.1
BOUND = 2e-2  # |a - b| / |b| in bfloat16, which has 8 significant bits
BOUNDS = {"bfloat16": BOUND, "tf32": 3e-3, "float32": 2e-5}


@pytest.fixture
def device(cublaslt):
    with strict_cupy.registered(plain=False) as counters:
        yield counters


def batch(rows=3, length=70):
    windows = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(rows, length + 1))
    windows[:, ::3] = 7  # a frequent token
    return windows[:, :-1], windows[:, 1:]


def distance(a, b):
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64))


def step(device, dtype, **options):
    """Run one training step. Returns the loss, the norm, the gradients, the model, and the count of implicit syncs."""
    model = GPT2(CONFIG, device=device, dtype=dtype, **options)
    optimizer = optim.AdamW(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    loss = model.loss(*batch(), Key(3, 1, first_sample=5)) * 0.5
    loss.backward()
    fetch = model.backend.fetch(loss.data, optimizer.step(max_norm=1.0))
    waits = strict_cupy.device.syncs  # before the test itself reads values
    gradients = {name: model.backend.to_host(p.grad).copy() for name, p in model.named_parameters()}
    return *fetch.get(), gradients, model, waits


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "tf32"))]
)
def test_a_training_step_agrees_with_the_cpu(device, dtype):
    loss, norm, gradients, model, waits = step("cuda", dtype)
    true_loss, true_norm, true_gradients, true_model, _ = step("cpu", "float32")
    bound = BOUNDS[dtype]
    assert waits == 0
    assert device.float64 == 0
    assert loss == pytest.approx(true_loss, rel=bound / 10)
    assert norm == pytest.approx(true_norm, rel=bound)
    errors = {
        name: distance(gradients[name], true) for name, true in true_gradients.items() if "attn.c_attn.bias" not in name
    }
    assert {name: error for name, error in errors.items() if not error < bound} == {}
    for (name, p), q in zip(model.named_parameters(), true_model.parameters(), strict=True):
        # AdamW's first step depends on the gradient's sign, and the gradient of the keys' bias is only rounding error.
        assert "c_attn.bias" in name or distance(p.numpy(), q.numpy()) < 0.1, name
        if dtype == "bfloat16":
            copy = copy_of(p)
            assert copy.dtype.name == "bfloat16"
            np.testing.assert_array_equal(copy, p.numpy().astype(copy.dtype), err_msg=name)


@pytest.mark.slow
def test_gradients_are_bit_identical_with_every_schedule(device, monkeypatch):
    results = []
    for order in range(3):
        monkeypatch.setattr(cudasim, "schedule", order)
        results.append(step("cuda", "bfloat16"))
    for loss, norm, gradients, *_ in results[1:]:
        assert (loss, norm) == results[0][:2]
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, results[0][2][name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"recompute": "block"}, {"head_rows": 64}], ids=str)
def test_options_that_save_memory_give_the_same_result(device, options):
    loss, _, gradients, *_ = step("cuda", "bfloat16")
    other_loss, _, others, *_ = step("cuda", "bfloat16", **options)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        if "recompute" in options:
            np.testing.assert_array_equal(others[name], gradient, err_msg=name)
        else:
            assert distance(others[name], gradient) < BOUND, name


@pytest.mark.slow
def test_logits_propagate_gradients(device):
    results = {}
    for device_name, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        model = GPT2(CONFIG, device=device_name, dtype=dtype)
        tokens, targets = batch()
        loss = ops.cross_entropy(model(tokens), targets)
        loss.backward()
        results[device_name] = loss.item(), model.wte.weight.backend.to_host(model.wte.weight.grad).copy()
    (loss, gradient), (true_loss, true_gradient) = results["cuda"], results["cpu"]
    assert loss == pytest.approx(true_loss, rel=BOUND / 4)
    assert distance(gradient, true_gradient) < BOUND


@pytest.mark.slow
def test_generation_uses_the_bfloat16_copies(device):
    model = GPT2(CONFIG, device="cuda", dtype="bfloat16")
    there = GPT2(CONFIG)
    with no_grad():
        logits, true = model(batch()[0]), there(batch()[0])
    assert logits.dtype.name == "bfloat16"
    assert distance(logits.numpy(), true.numpy()) < BOUND
    (tokens,) = model.generate(list(range(10)), 12, temperature=0)
    (uncached,) = model.generate(list(range(10)), 12, temperature=0, cache=False)
    assert len(tokens) == 12
    assert tokens[0] == uncached[0]


@pytest.mark.slow
def test_training_agrees_with_the_cpu(device):
    losses = {}
    for device_name, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        model = GPT2(CONFIG, device=device_name, dtype=dtype)
        optimizer = optim.AdamW(model, lr=1e-3)
        fetched = []
        for i in range(10):
            loss = model.loss(*batch(2, 33), Key(0, i))
            loss.backward()
            optimizer.step(max_norm=1.0)
            optimizer.zero_grad()
            fetched.append(model.backend.fetch(loss.data))
        losses[device_name] = [fetch.get()[0] for fetch in fetched]
    assert losses["cpu"][-1] < 0.8 * losses["cpu"][0]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=BOUND)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("case", test_gpu.KERNELS)
def test_the_kernel_tests_for_a_gpu_pass_in_the_simulator(device, case, precision, bound):
    """Check that the tests for a GPU are correct, since a GPU is rarely available."""
    test_gpu.test_every_kernel_agrees_with_the_cpu(get_backend("cuda"), case, precision, bound)


@pytest.mark.slow
@pytest.mark.parametrize("precision", test_gpu.BOUNDS)
def test_the_model_test_for_a_gpu_passes_in_the_simulator(device, precision):
    there = get_backend("cuda")
    test_gpu.test_logits_loss_and_gradients_agree_with_the_cpu(there, precision, test_gpu.SMALL, 2, 40, 1)
