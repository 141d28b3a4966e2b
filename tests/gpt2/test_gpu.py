"""Tests on a real GPU (`pytest -m gpu`): results agree with the CPU's, and two runs are bit-identical."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from gpt2 import GPT2, GPT2Config, verify
from gpt2.decode import set_decode
from gpt2.generate import KVCache, next_logits
from tinygrad2 import Key, no_grad, optim, reference
from tinygrad2.backend import get_backend
from tinygrad2.distributed import NcclComm
from tinygrad2.gradcheck import CASES

pytestmark = pytest.mark.gpu

NANO = replace(GPT2Config.preset("nano"), embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
SMALL = replace(NANO, n_layer=2)
WIDE = GPT2Config(n_layer=2)  # the width, heads and vocabulary of the published 124M model
TEXT = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype(np.int64)


lost: list[str] = []  # the test that lost the GPU: after a kernel fault, its process can no longer use it


@pytest.fixture(autouse=True)
def cuda(request):
    if lost:
        pytest.exit(f"{lost[0]} lost the GPU", returncode=2)  # tests/benchmarks/gpu.py then runs the remaining tests
    try:
        backend = get_backend("cuda")
    except ValueError as error:
        pytest.skip(str(error))
    yield backend
    try:
        backend.np.cuda.get_current_stream().synchronize()  # so that the test that caused a fault reports it
    except Exception:
        lost.append(request.node.name)
        raise


def batch(step, rows, length, scale=1):
    """Windows of this file's bytes; `scale` spreads the ids over a larger vocabulary."""
    starts = np.random.default_rng(step).integers(len(TEXT) - length - 1, size=rows)
    windows = scale * TEXT[starts[:, None] + np.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


def distance(a, b):
    """|a - b| / |b|, computed in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def needs(backend, precision):
    """Skip the test if the GPU does not support the precision."""
    if reason := backend.unsupported_reason(precision):
        pytest.skip(reason)


def train(place, steps, precision="float32"):
    """Train for some steps. Returns (loss, gradient norm) per step, and the model."""
    model = GPT2(SMALL, device=place, dtype=precision)
    optimizer = optim.AdamW(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    fetched = []
    for step in range(steps):
        loss = model.loss(*batch(step, 4, 64), Key(0, step))
        loss.backward()
        norm = optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        fetched.append(model.backend.fetch(loss.data, norm))
    return np.array([fetch.get() for fetch in fetched]), model


# Bounds on the difference from float32 on the CPU: for logits, loss, the gradient of a parameter, and all gradients.
BOUNDS = {
    "float32": (1e-4, 1e-5, 1e-4, 1e-4),
    "tf32": (1e-2, 1e-3, 3e-2, 1e-2),
    "bfloat16": (2e-2, 5e-3, 5e-2, 2e-2),
}


@pytest.mark.parametrize(
    ("config", "rows", "length", "scale"), [(NANO, 4, 64, 1), (WIDE, 1, 200, 199)], ids=["nano", "124M wide"]
)
@pytest.mark.parametrize("precision", BOUNDS)
def test_logits_loss_and_gradients_agree_with_the_cpu(cuda, precision, config, rows, length, scale):
    needs(cuda, precision)
    logits_bound, loss_bound, gradient_bound, all_bound = BOUNDS[precision]
    tokens, targets = batch(0, rows, length, scale)
    results = {}
    for place in ("cpu", "cuda"):
        model = GPT2(config, device=place, dtype=precision if place == "cuda" else "float32")
        loss = model.loss(tokens, targets, Key(0, 1))  # with dropout; the masks are the same
        loss.backward()
        gradients = {name: p.backend.to_host(p.grad).copy() for name, p in model.named_parameters()}
        results[place] = model(tokens).numpy(), loss.item(), gradients
    (logits, loss, gradients), (true_logits, true_loss, true_gradients) = results["cuda"], results["cpu"]
    assert distance(logits, true_logits) < logits_bound
    assert loss == pytest.approx(true_loss, rel=loss_bound)
    errors = {name: distance(gradients[name], true) for name, true in true_gradients.items()}
    assert {name: error for name, error in errors.items() if not error < gradient_bound} == {}
    everything = (np.concatenate([found[name].ravel() for name in errors]) for found in (gradients, true_gradients))
    assert distance(*everything) < all_bound


def test_losses_of_100_steps_agree_with_the_cpu():
    on_cpu, _ = train("cpu", 100)
    on_gpu, _ = train("cuda", 100)
    assert on_cpu[-1, 0] < 0.8 * on_cpu[0, 0]  # the model learns
    np.testing.assert_allclose(on_gpu[:, 0], on_cpu[:, 0], rtol=1e-3)


def test_losses_of_200_steps_in_bfloat16_agree_with_float32_on_the_cpu(cuda):
    needs(cuda, "bfloat16")
    on_cpu, _ = train("cpu", 200)
    on_gpu, _ = train("cuda", 200, "bfloat16")
    assert on_cpu[-1, 0] < 0.7 * on_cpu[0, 0]
    np.testing.assert_allclose(on_gpu[:, 0], on_cpu[:, 0], rtol=2e-2)


@pytest.mark.parametrize("precision", BOUNDS)
def test_two_runs_are_bit_identical(cuda, precision):
    needs(cuda, precision)
    (first, a), (second, b) = train("cuda", 10, precision), train("cuda", 10, precision)
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
        with cupyx.allow_synchronize(step == 0):  # the first step may wait, because it compiles
            model.loss(tokens, targets, Key(0, step)).backward()
            optimizer.step(max_norm=1.0)
            optimizer.zero_grad()


B, T, C, H, V = 2, 200, 768, 12, 1003  # a layer of the 124M model; T is not a multiple of a tile
KEY = Key(7, step=3, first_sample=5, site=2)


class Draw:
    """Draws the arguments of kernels. Activations are bfloat16 values, so that rounding them to bfloat16 is exact;
    statistics and parameter gradients are float32."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def real(self, *shape, scale=1.0):
        return (scale * self.generator.standard_normal(shape)).astype(bfloat16)

    def wide(self, *shape):
        return self.generator.standard_normal(shape).astype(np.float32)

    def ids(self, *shape):
        return self.generator.integers(V, size=shape)


def normalized(draw, x):
    """A LayerNorm weight, and the mean and reciprocal standard deviation of x."""
    _, mean, rstd = reference.layernorm_forward(x.astype(np.float64), 1.0, 0.0, 1e-5)
    return draw.wide(C), mean.astype(np.float32), rstd.astype(np.float32)


def attended(draw, key):
    """The arguments of attention_backward."""
    qkv = draw.real(B, T, 3 * C)
    out, lse = reference.attention_forward(qkv.astype(np.float64), H, 0.1, key)
    return draw.real(B, T, C), qkv, out.astype(bfloat16), lse.astype(np.float32), H, 0.1, key


def adamw(draw):
    value, grad, m, v = draw.wide(5001), draw.wide(5001), draw.wide(5001), draw.wide(5001) ** 2
    half, lr, step = (np.array(x, dtype=np.float32) for x in (0.5, 1e-2, 3))
    return value, grad, m, v, half, lr, 0.9, 0.95, 1e-8, 0.1, step


def head(draw):
    """The arguments of lm_head_backward."""
    x, weight, targets = draw.real(B, T, C), draw.real(V, C, scale=0.05), draw.ids(B, T)
    _, dlogits = reference.lm_head_forward(x.astype(np.float64), weight.astype(np.float64), targets)
    return np.array(0.5, np.float32), dlogits.astype(bfloat16), x, weight, draw.wide(V, C)


X, WIDTH = (B, T, C), (C, 3 * C)
KERNELS = {  # name: (function that draws the arguments, positions of those that the kernel changes)
    "linear_forward": (lambda d: (d.real(*X), d.real(*WIDTH, scale=0.05), d.real(3 * C)), ()),
    "linear_backward": (
        lambda d: (d.real(B, T, 3 * C), d.real(*X), d.real(*WIDTH, scale=0.05), d.wide(*WIDTH), d.wide(3 * C)),
        (3, 4),
    ),
    "embedding_forward": (lambda d: (d.ids(B, T), d.real(V, C), d.real(1024, C), 7), ()),
    "embedding_backward": (lambda d: (d.real(*X), d.ids(B, T) % 17, 7, d.wide(V, C), d.wide(1024, C)), (3, 4)),
    "layernorm_forward": (lambda d: (d.real(*X), d.wide(C), d.wide(C), 1e-5), ()),
    "layernorm_backward": (
        lambda d: (d.real(*X), x := d.real(*X), *normalized(d, x), d.wide(C), d.wide(C)),
        (5, 6),
    ),
    "add_layernorm_forward": (lambda d: (d.real(*X), d.real(*X), d.wide(C), d.wide(C), 1e-5), ()),
    "add_layernorm_backward": (
        lambda d: (d.real(*X), d.real(*X), x := d.real(*X), *normalized(d, x), d.wide(C), d.wide(C)),
        (6, 7),
    ),
    "attention_forward": (lambda d: (d.real(B, T, 3 * C), H, 0.0, None), ()),
    "attention_forward, dropout": (lambda d: (d.real(B, T, 3 * C), H, 0.1, KEY), ()),
    "attention_backward": (lambda d: attended(d, None), ()),
    "attention_backward, dropout": (lambda d: attended(d, KEY), ()),
    "attention_cached": (lambda d: (d.real(B, 1, 3 * C), d.real(2, B, H, T, C // H), 150, H), (1,)),
    "gelu_forward": (lambda d: (d.real(B, T, 4 * C), d.real(4 * C)), ()),
    "gelu_backward": (lambda d: (d.real(*X), d.real(*X), d.real(C), d.wide(C)), (3,)),
    "gelu_exact_forward": (lambda d: (d.real(*X), None), ()),
    "gelu_exact_backward": (lambda d: (d.real(*X), d.real(*X), d.real(C), d.wide(C)), (3,)),
    "lm_head_forward": (lambda d: (d.real(*X), d.real(V, C, scale=0.05), d.ids(B, T)), ()),
    "lm_head_backward": (head, (4,)),
    "dropout_forward": (lambda d: (d.real(*X), 0.1, KEY), ()),
    "dropout_backward": (lambda d: (d.real(*X), 0.1, KEY), ()),
    "squared_norm": (lambda d: (d.wide(100_003),), ()),
    "adamw_step": (adamw, (0, 2, 3)),
}


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("case", KERNELS)
def test_every_kernel_agrees_with_the_cpu(cuda, case, precision, bound):
    needs(cuda, precision)
    arguments, changed = KERNELS[case]
    name, on_gpu, on_cpu = case.split(",")[0], [], []
    for i, x in enumerate(arguments(Draw())):
        if name == "embedding_backward" and i == 1:
            on_gpu.append(x)  # the tokens stay on the host
            on_cpu.append(x)
        elif isinstance(x, np.ndarray):
            wide = x.dtype.kind != "i"
            narrow = x.dtype == bfloat16 and precision == "float32"
            on_gpu.append(cuda.asarray(x.astype(np.float32) if narrow else x))
            on_cpu.append(x.astype(np.float64) if wide else x.copy())
        else:
            on_gpu.append(x)
            on_cpu.append(x)
    results = []
    for table, given in ((cuda.kernels, on_gpu), (reference, on_cpu)):
        returned = getattr(table, name)(*given)
        if name == "squared_norm":
            returned = table.norm(returned)
        returned = returned if isinstance(returned, tuple) else (returned,)
        results.append([x for x in (*returned, *(given[i] for i in changed)) if x is not None])
    for i, (found, true) in enumerate(zip(*results, strict=True)):
        found = cuda.to_host(found)
        assert found.shape == true.shape
        error = distance(found, true)
        limit = 1e-2 if found.dtype == bfloat16 else bound
        assert error < limit, f"result {i} differs from the CPU's by {error:.1e}, relative"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_in_float64(case):
    assert case.error(device="cuda") <= case.bound


def test_gradients_of_a_small_model_in_float64():
    errors = verify.gradient_errors(verify.small_model("gelu_new", device="cuda"))
    assert max(errors.values()) < verify.BOUND


def test_a_model_moves_to_the_gpu_and_back_unchanged():
    model = GPT2(SMALL)
    before = [p.numpy().copy() for p in model.parameters()]
    assert {p.backend.device for p in model.to("cuda").parameters()} == {"cuda"}
    for values, p in zip(before, model.to("cpu").parameters(), strict=True):
        np.testing.assert_array_equal(values, p.numpy())


def test_uploads_are_complete(cuda):
    sent = [np.random.default_rng(i).integers(1 << 60, size=1 + (i * 7919) % 50_000) for i in range(300)]
    arrived = [cuda.upload(values) for values in sent]
    for values, array in zip(sent, arrived, strict=True):
        np.testing.assert_array_equal(cuda.to_host(array), values)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nccl_accepts_the_calls(cuda, dtype):
    """With a single rank, sums change nothing, but computations before and after them must be ordered."""
    if (nccl := cuda.cuda.nccl()) is None:
        pytest.skip("NCCL is not installed")
    sums = NcclComm(cuda, nccl, 0, 1, nccl.get_unique_id())
    values = cuda.zeros((1 << 20,), dtype)
    for _ in range(20):
        values += 1
        sums.start_sum(values)
        sums.start_sum(values[3:1003], share_only=True)
        sums.start_all_gather(values)
        sums.join()
        values *= 2
    np.testing.assert_array_equal(cuda.to_host(values), np.full(1 << 20, 2.0**21 - 2))


def test_free_memory_reflects_allocations(cuda):
    pool = cuda.np.get_default_memory_pool()
    pool.free_all_blocks()
    free, total = cuda.memory()
    held = cuda.zeros((1 << 26,), np.float32)  # 256 MiB
    assert 0 < cuda.memory()[0] <= free - (1 << 27)
    assert free <= total
    del held
    pool.free_all_blocks()
    assert cuda.memory()[0] > free - (1 << 27)


# Generation comes last: the blocks of its kernel wait for each other, so a fault could hang the GPU.


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("texts", [1, 5])
def test_decoding_in_one_launch_agrees_with_the_cpu(cuda, precision, bound, texts):
    """Decodes a full context, in which blocks exchange messages in more than a thousand half layers."""
    needs(cuda, precision)
    config = replace(WIDE, n_positions=256)
    tokens = 190 * TEXT[: texts * 256].reshape(texts, 256)
    model, on_cpu = GPT2(config, device="cuda", dtype=precision), GPT2(config)
    model.fused_decode = True
    cache = KVCache(model, texts, 256)
    assert cache.decoder is not None
    with no_grad():
        expected = on_cpu(tokens).numpy()
        for i in range(256):
            logits = next_logits(model, tokens[:, i : i + 1], cache).numpy()
            assert distance(logits, expected[:, i]) < bound, i


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "top_k": 50, "seed": 1, "samples": 3}])
@pytest.mark.parametrize("decode", ["ordinary", "fused"])
def test_generated_tokens_equal_those_on_the_cpu(sampling, decode):
    _, model = train("cpu", 10)
    on_cpu = model.generate(TEXT[:20].tolist(), 100, **sampling)  # beyond the context
    model.to("cuda")
    set_decode(model, decode)
    assert model.generate(TEXT[:20].tolist(), 100, **sampling) == on_cpu
