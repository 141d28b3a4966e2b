"""gpt2/decode.cu: decoding a token in one launch equals the separate operations, at any position and batch size.

The kernel runs in the simulator, where its blocks wait for each other's messages as on a GPU, in several schedules.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, decode
from gpt2.decode import MAX_TEXTS, Decoder, set_decode
from gpt2.generate import KVCache, generate, next_logits
from tests.stand_ins import cudasim, strict_cupy
from tests.stand_ins.faults import inject_in, replace_source, without
from tinygrad2 import no_grad
from tinygrad2.kernels import cuda

# 3 C is not a multiple of a tile's columns; V is prime; the head size is 32.
CONFIG = GPT2Config(vocab_size=101, n_positions=80, n_embd=96, n_layer=2, n_head=3)
SOURCE = Path(decode.__file__).with_suffix(".cu")
BOUNDS = {"float32": 3e-6, "bfloat16": 2e-2}


@pytest.fixture
def device(cublaslt):
    with strict_cupy.registered(plain=False) as counters:
        yield counters


def model_of(config=CONFIG, dtype="float32", device="cuda"):
    """A model in which all weights and biases affect the logits."""
    model = GPT2(config, device=device, dtype=dtype)
    R = np.random.default_rng(0)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data = model.backend.asarray((p.numpy() + 0.3 * R.standard_normal(p.shape)).astype(np.float32))
        elif "wte" not in name:
            p.data = model.backend.asarray((4 * p.numpy()).astype(np.float32))
    model.fused_decode = device == "cuda"
    return model


def logits_of(model, tokens, prompt, decoder=True):
    """Decode `tokens` (B, T) one by one, after the first `prompt` of them. Returns the logits (B, T - prompt, V) and
    the cache."""
    cache = KVCache(model, len(tokens), tokens.shape[1])
    if not decoder:
        cache.decoder = None
    elif model.backend.device == "cuda":
        assert cache.decoder is not None
    with no_grad():
        next_logits(model, tokens[:, :prompt], cache)
        steps = [next_logits(model, tokens[:, i : i + 1], cache).numpy() for i in range(prompt, tokens.shape[1])]
    return np.stack(steps, axis=1), [model.backend.to_host(layer) for layer in cache.layers]


def tokens_of(config, texts, length, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(texts, length))


def distance(a, b):
    return np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64))


@pytest.mark.parametrize(
    ("texts", "dtype"),
    [
        (1, "float32"),
        pytest.param(1, "bfloat16", marks=pytest.mark.slow),
        *(pytest.param(texts, dtype, marks=pytest.mark.slow) for texts in (2, 5) for dtype in BOUNDS),
    ],
)
def test_a_token_in_one_launch_equals_the_separate_operations(device, dtype, texts):
    tokens = tokens_of(CONFIG, texts, 12)
    logits, cache = logits_of(model_of(dtype=dtype), tokens, 5)
    expected, true_cache = logits_of(model_of(device="cpu"), tokens, 5)
    assert distance(logits, expected) < BOUNDS[dtype]
    for layer, true in zip(cache, true_cache, strict=True):
        assert distance(layer.astype(np.float32), true) < BOUNDS[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=33, n_positions=20, n_embd=128, n_layer=1, n_head=2, activation_function="gelu"),
        GPT2Config(vocab_size=300, n_positions=20, n_embd=320, n_layer=1, n_head=4),  # head size 80, not a power of 2
        GPT2Config(vocab_size=50, n_positions=20, n_embd=16, n_layer=3, n_head=1),  # more blocks than work
    ],
    ids=str,
)
def test_other_model_sizes(device, config):
    tokens = tokens_of(config, 2, 8)
    logits, _ = logits_of(model_of(config), tokens, 3)
    assert distance(logits, logits_of(model_of(config, device="cpu"), tokens, 3)[0]) < BOUNDS["float32"]


def set_limits(monkeypatch, model, **changes):
    """Change these limits of the model's GPU."""
    limits = model.backend.cuda.limits()._replace(**changes)
    monkeypatch.setattr(model.backend.cuda, "limits", lambda: limits)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [8, 9])  # without and with thread block clusters
@pytest.mark.parametrize("processors", [1, 2, 7, 40])  # with 40 there are five clusters, of which two have no head
def test_results_do_not_depend_on_the_number_of_processors(device, monkeypatch, processors, capability):
    model, tokens = model_of(), tokens_of(CONFIG, 1, 8)
    set_limits(monkeypatch, model, processors=processors, capability=capability)
    logits, _ = logits_of(model, tokens, 1)
    assert distance(logits, logits_of(model_of(device="cpu"), tokens, 1)[0]) < BOUNDS["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [3, 1])
def test_no_more_clusters_are_launched_than_can_run_at_once(device, monkeypatch, clusters):
    device.clusters = clusters
    model, tokens = model_of(), tokens_of(CONFIG, 1, 8)
    set_limits(monkeypatch, model, processors=40)
    cache = KVCache(model, 1, 8)
    with no_grad():
        next_logits(model, tokens[:, :5], cache)
        found = [next_logits(model, tokens[:, i : i + 1], cache).numpy() for i in (5, 6)]
    assert cache.decoder._plan.clusters == clusters
    expected, _ = logits_of(model_of(device="cpu"), tokens, 5)
    assert distance(np.stack(found, axis=1), expected[:, :2]) < BOUNDS["float32"]


@pytest.mark.slow
def test_hardware_clusters_are_not_used_if_none_can_run(device):
    device.clusters = 0
    tokens = tokens_of(CONFIG, 1, 4)
    logits, _ = logits_of(model_of(), tokens, 1)
    assert distance(logits, logits_of(model_of(device="cpu"), tokens, 1)[0]) < BOUNDS["float32"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [8, 9])
def test_tags_wrap_around_at_32_bits(device, monkeypatch, capability):
    model, tokens = model_of(), tokens_of(CONFIG, 1, 12)
    set_limits(monkeypatch, model, processors=24, capability=capability)
    monkeypatch.setattr(Decoder, "first_tag", 2**32 - 12)
    logits, _ = logits_of(model, tokens, 5)
    assert distance(logits, logits_of(model_of(device="cpu"), tokens, 5)[0]) < BOUNDS["float32"]


@pytest.mark.slow
def test_all_schedules_give_bit_identical_results(device, monkeypatch):
    model, tokens = model_of(dtype="bfloat16"), tokens_of(CONFIG, 2, 40)
    results = []
    for order in range(5):
        monkeypatch.setattr(cudasim, "schedule", order)
        results.append(logits_of(model, tokens, 36))
    for logits, cache in results[1:]:
        np.testing.assert_array_equal(logits, results[0][0])
        for layer, first in zip(cache, results[0][1], strict=True):
            np.testing.assert_array_equal(layer, first)


@pytest.mark.slow
def test_generated_texts_equal_those_on_the_cpu(device):
    sampling = {"samples": 3, "temperature": 0.8, "seed": 3}
    texts = model_of().generate([5, 9, 2], 15, **sampling)
    assert texts == model_of(device="cpu").generate([5, 9, 2], 15, **sampling)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("samples", [1, 3])
def test_greedy_tokens_equal_those_on_the_cpu(device, monkeypatch, samples, capability):
    """The tokens are chosen on the device, even beyond the context of 32 tokens, and padding ids are never chosen."""
    config = replace(CONFIG, n_positions=32)
    model, on_cpu = model_of(config), model_of(config, device="cpu")
    set_limits(monkeypatch, model, processors=24, capability=capability)
    positions = np.random.default_rng(1).standard_normal((32, 96)).astype(np.float32)  # so that tokens vary
    for m in (model, on_cpu):
        m.wpe.weight.data = m.backend.asarray(positions)
    for vocab_size in (None, 60):
        options = {"samples": samples, "temperature": 0, "vocab_size": vocab_size}
        texts = [[*generate(m, [5, 9, 2], 35, **options)] for m in (model, on_cpu)]
        np.testing.assert_array_equal(*texts)
        assert len(np.unique(texts[0])) > 10, "the tokens do not vary enough for this test"
        assert texts[0][0].dtype == np.int64
        assert vocab_size is None or np.max(texts) < vocab_size


def test_the_next_launch_does_not_wait_for_the_host(device):
    model = model_of()
    tokens = generate(model, [5, 9, 2], 8, temperature=0)
    next(tokens)  # processes the prompt
    before = device.launches
    next(tokens)
    kernels = device.launches - before
    before, syncs = device.launches, device.syncs
    next(tokens)
    assert 1 <= device.launches - before < kernels
    assert device.syncs == syncs, "a token must not synchronize the device"
    tokens.close()
    device.finish()  # the target memory of pending copies must not have been freed


def test_the_first_of_equal_logits_is_chosen(device):
    model = model_of()
    model.wte.weight.data[...] = model.backend.asarray(np.zeros((101, 96), np.float32))
    np.testing.assert_array_equal([*generate(model, [5, 9, 2], 4, temperature=0)], np.zeros((4, 1)))


def test_nan_logits_are_an_error(device):
    model = model_of()
    tokens = generate(model, [5, 9, 2], 9, temperature=0)
    assert 0 <= next(tokens)[0] < 101
    model.wte.weight.data[100] = np.float32(np.inf)
    with pytest.raises(ValueError, match="the model's logits are not finite numbers"):
        list(tokens)


def test_unsupported_models_use_the_operations(device, monkeypatch):
    model = model_of()
    assert KVCache(model, MAX_TEXTS, 8).decoder is not None
    assert KVCache(model, MAX_TEXTS + 1, 8).decoder is None
    small = GPT2Config(n_embd=36, n_head=6, n_layer=1, vocab_size=9)
    for other in (GPT2(small, device="cuda"), GPT2(CONFIG, device="cuda", dtype="float64"), GPT2(CONFIG)):
        other.fused_decode = True
        assert Decoder.fitting(other, KVCache(other, 1, 8)) is None
    set_limits(monkeypatch, model, shared_memory=32 << 10)
    assert KVCache(model, MAX_TEXTS, 8).decoder is None


def test_the_kernel_is_used_only_if_selected(device):
    model = model_of()
    for option, fused in (("ordinary", False), ("fused", True)):
        set_decode(model, option)
        assert (KVCache(model, 1, 8).decoder is not None) == fused
    with pytest.raises(ValueError, match="--decode fused needs a GPU, but the model is on the cpu"):
        set_decode(GPT2(CONFIG), "fused")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [8, 9])
def test_blocks_that_cannot_all_run_at_once_are_an_error(device, monkeypatch, capability):
    device.blocks = 0
    model = model_of()
    set_limits(monkeypatch, model, capability=capability)
    with pytest.raises(ValueError, match="do not fit on this GPU; generate with --decode ordinary"):
        list(generate(model, [5, 9, 2], 3, temperature=0))


def test_the_error_for_a_gpu_failure_suggests_ordinary_decoding(device, monkeypatch):
    def fails(self):
        raise RuntimeError("cudaErrorLaunchFailure: unspecified launch failure")

    tokens = generate(model_of(), [5, 9, 2], 8, temperature=0)
    next(tokens), next(tokens)
    monkeypatch.setattr(strict_cupy.Event, "synchronize", fails)
    with pytest.raises(OSError, match=r"cudaErrorLaunchFailure.*in a new process, generate with --decode ordinary"):
        list(tokens)


def test_a_decoder_waits_for_earlier_work_on_another_stream(device):
    model = model_of()
    caches = [KVCache(model, 1, 8) for _ in range(2)]
    main, other = strict_cupy.library.cuda.get_current_stream(), strict_cupy.Stream()
    token = np.array([1])
    caches[0].decoder(token, 0)
    assert main.others_seen == other.others_seen == -1
    launched = device.launches
    with other:
        caches[1].decoder(token, 0)
        caches[1].decoder(token, 1)
    assert other.others_seen >= launched
    assert main.others_seen == -1
    caches[0].decoder(token, 1)
    assert main.others_seen > launched


def test_a_token_or_position_out_of_range_is_rejected(device):
    cache = KVCache(model := model_of(), 1, 4)
    with no_grad():
        next_logits(model, np.array([[1, 2, 3]]), cache)
        for token in (-1, CONFIG.vocab_size):
            with pytest.raises(ValueError, match=r"token ids are .* expected 0 to 100"):
                next_logits(model, np.array([[token]]), cache)
        assert cache.length == 3
        next_logits(model, np.array([[0]]), cache)
        with pytest.raises(ValueError, match="position 4 is out of range; the cache has 4"):
            next_logits(model, np.array([[0]]), cache)
        with pytest.raises(ValueError, match="position 5 is out of range; the cache has 4"):
            next(cache.decoder.greedy(np.array([0]), 2, 4, 101))


FAULTS = {
    "a token does not attend to itself": ("attend", "if (i > position) continue;", "if (i >= position) continue;"),
    "all blocks use the keys of the first block": ("attend", "int i = rank() + (start", "int i = (start"),
    "a key is stored at the wrong position": (
        "attend", "(size_t)position * D + i % D", "(size_t)(position / 2) * D + i % D"
    ),
    "the kernel does not wait for the weights": (
        "product", "cp_async_wait<PREFETCH - PART>", "cp_async_wait<PREFETCH - PART + 1>"
    ),
    "inputs start at the wrong column": ("product", "x -= (first_of_half(MATRIX) ? rank() : cluster()) * ROWS;", ""),
    "rows have the wrong stride": (
        "Traversal", "stride(at_once(matrix) * outputs", "stride(at_once(matrix) * columns"
    ),
    "the kernel waits for a cluster without heads": (
        "decode", "receive_sum<ATTENTION_CLUSTERS>", "receive_sum<CLUSTERS>"
    ),
    "the sum of squares covers only one block": ("layernorm", "of[2 * r + 1]", "of[1]"),
    "blocks do not wait until all blocks have started": ("decode", "cluster_barrier<RANKS>();", ""),
    "a block reads the messages of an earlier half layer": (
        "decode", "entry, B * C, tag - 1));", "entry, B * C, tag - 2));"
    ),
    "shared memory is not cleared": ("decode", "(Message)(tag - 1) << 32;", "mailbox[i];"),
    "half layers share their result buffers": ("decode", "half % 4 * CLUSTERS", "half % 4 * 0"),
}  # fmt: skip
BARRIERS = {
    "product": 2,
    "layernorm": 2,
    "attend": 2,
    "combine_heads": 1,
    "choose_token": 1,
    "half_layer": 1,
    "decode": 1,
}


def test_faults_include_every_barrier():
    text = cuda.source(SOURCE)
    own = text[text.index("struct Layer {") :]  # without the included headers
    assert own.count("__syncthreads();") == sum(BARRIERS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", [None, *FAULTS, *((name, i) for name, n in BARRIERS.items() for i in range(n))], ids=str
)
def test_injected_faults_are_detected(device, monkeypatch, fault):
    """A fault (name, i) is the removal of the i-th __syncthreads in that function."""
    config = GPT2Config(vocab_size=70, n_positions=20, n_embd=64, n_layer=2, n_head=2)
    if isinstance(fault, tuple):
        replace_source(monkeypatch, SOURCE, without(cuda.source(SOURCE), fault[0], "__syncthreads()", fault[1]))
    elif fault == "half layers share their result buffers":
        inject_in(monkeypatch, SOURCE, FAULTS[fault], ("decode", "(half + 3) % 4 * CLUSTERS", "half % 4 * 0"))
    elif fault:
        inject_in(monkeypatch, SOURCE, FAULTS[fault])
    model, tokens, caught = model_of(config), tokens_of(config, 2, 8), False
    monkeypatch.setattr(Decoder, "first_tag", 2**32 - 12)  # shared memory initially contains the tag 2^32 - 1
    expected, _ = logits_of(on_cpu := model_of(config, device="cpu"), tokens, 3)
    text = [*generate(on_cpu, [5], 3, samples=2, temperature=0)]
    # 8 processors: two heads per cluster; 24: a cluster without heads; 2: two blocks with all heads in several steps.
    runs = [(processors, order) for processors in ((8,) if isinstance(fault, tuple) else (24, 2)) for order in range(6)]
    for processors, order in runs:
        set_limits(monkeypatch, model, processors=processors)
        monkeypatch.setattr(cudasim, "schedule", order)
        try:
            found = logits_of(model, tokens, 3)[0]
            greedy = [*KVCache(model, 2, 8).decoder.greedy(np.array([5, 5]), 0, 3, 70)]
        except (RuntimeError, OSError):
            caught = True
        else:
            caught = not (distance(found, expected) < BOUNDS["float32"] and np.array_equal(greedy, text))
        if caught:
            break
    assert caught == (fault is not None)
