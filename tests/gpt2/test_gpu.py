"""On a real GPU: the same numbers as on the CPU, the same bits twice. `pytest -m gpu`; elsewhere these are skipped."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, verify
from tinygrad2 import Key, optim
from tinygrad2.backend import get_backend
from tinygrad2.gradcheck import CASES

pytestmark = pytest.mark.gpu

NANO = replace(GPT2Config.preset("nano"), embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
SMALL = replace(NANO, n_layer=2)
WIDE = GPT2Config(n_layer=2)  # the layers, the heads and the vocabulary of the published 124M model
TEXT = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype(np.int64)


@pytest.fixture(autouse=True)
def cuda():
    try:
        return get_backend("cuda")
    except ValueError as error:
        pytest.skip(str(error))


def batch(step, rows, length, scale=1):
    """Windows of this file's bytes; `scale` spreads them over a larger vocabulary."""
    starts = np.random.default_rng(step).integers(len(TEXT) - length - 1, size=rows)
    windows = scale * TEXT[starts[:, None] + np.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


def distance(a, b):
    """|a - b| / |b|, summed in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def train(place, steps):
    """The losses of a training run, and the model."""
    model = GPT2(SMALL, device=place)
    optimizer = optim.AdamW(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    fetched = []
    for step in range(steps):
        loss = model.loss(*batch(step, 4, 64), Key(0, step))
        loss.backward()
        norm = optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        fetched.append(model.backend.fetch(loss.data, norm))
    return np.array([fetch.get() for fetch in fetched]), model


@pytest.mark.parametrize(
    ("config", "rows", "length", "scale"), [(NANO, 4, 64, 1), (WIDE, 1, 200, 199)], ids=["nano", "124M wide"]
)
def test_logits_loss_and_every_gradient_are_the_cpus(config, rows, length, scale):
    tokens, targets = batch(0, rows, length, scale)
    results = {}
    for place in ("cpu", "cuda"):
        model = GPT2(config, device=place)
        loss = model.loss(tokens, targets, Key(0, 1))  # with dropout: the masks are the same
        loss.backward()
        gradients = {name: p.backend.to_host(p.grad).copy() for name, p in model.named_parameters()}
        results[place] = model(tokens).numpy(), loss.item(), gradients
    (logits, loss, gradients), (true_logits, true_loss, true_gradients) = results["cuda"], results["cpu"]
    assert distance(logits, true_logits) < 1e-4
    assert loss == pytest.approx(true_loss, rel=1e-5)
    errors = {name: distance(gradients[name], true) for name, true in true_gradients.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}


def test_a_hundred_steps_follow_the_cpu():
    there, _ = train("cpu", 100)
    here, _ = train("cuda", 100)
    assert there[-1, 0] < 0.8 * there[0, 0]  # it learns
    np.testing.assert_allclose(here[:, 0], there[:, 0], rtol=1e-3)


def test_two_runs_give_the_same_bits():
    (first, a), (second, b) = train("cuda", 10), train("cuda", 10)
    np.testing.assert_array_equal(first, second)
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        np.testing.assert_array_equal(p.numpy(), q.numpy(), err_msg=name)


@pytest.mark.filterwarnings("ignore:cupyx.allow_synchronize")
def test_a_step_does_not_wait_for_the_gpu():
    cupyx = pytest.importorskip("cupyx")
    model = GPT2(SMALL, device="cuda")
    optimizer = optim.AdamW(model)
    for step in range(3):
        tokens, targets = batch(step, 4, 64)
        with cupyx.allow_synchronize(step == 0):  # the first one may, while it compiles
            model.loss(tokens, targets, Key(0, step)).backward()
            optimizer.step(max_norm=1.0)
            optimizer.zero_grad()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_in_float64(case):
    assert case.error(device="cuda") <= case.bound


def test_every_gradient_of_a_small_model_in_float64():
    errors = verify.gradient_errors(verify.small_model("gelu_new", device="cuda"))
    assert max(errors.values()) < verify.BOUND


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_k": 50, "seed": 1, "samples": 3}])
def test_generation_gives_the_cpus_tokens(sampling):
    _, model = train("cpu", 10)
    there = model.generate(TEXT[:20].tolist(), 100, **sampling)  # past the context
    assert model.to("cuda").generate(TEXT[:20].tolist(), 100, **sampling) == there


def test_a_model_moves_there_and_back_unchanged():
    model = GPT2(SMALL)
    before = [p.numpy().copy() for p in model.parameters()]
    assert {p.backend.device for p in model.to("cuda").parameters()} == {"cuda"}
    for values, p in zip(before, model.to("cpu").parameters(), strict=True):
        np.testing.assert_array_equal(values, p.numpy())


def test_uploads_arrive_whole(cuda):
    sent = [np.random.default_rng(i).integers(1 << 60, size=1 + (i * 7919) % 50_000) for i in range(300)]
    arrived = [cuda.upload(values) for values in sent]
    for values, array in zip(sent, arrived, strict=True):
        np.testing.assert_array_equal(cuda.to_host(array), values)


def test_memory_is_counted(cuda):
    pool = cuda.np.get_default_memory_pool()
    pool.free_all_blocks()
    free, total = cuda.memory()
    held = cuda.zeros((1 << 26,), np.float32)  # 256 MiB
    assert 0 < cuda.memory()[0] <= free - (1 << 27)
    assert free <= total
    del held
    pool.free_all_blocks()
    assert cuda.memory()[0] > free - (1 << 27)
