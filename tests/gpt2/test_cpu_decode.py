"""gpt2/cpu_decode.py: one compiled call per token, bit-identical to the separate operations."""

import threading

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from gpt2.cpu_decode import CpuDecoder
from gpt2.generate import KVCache, generate, next_logits
from tinygrad2 import no_grad

pytest.importorskip("tinygrad2.kernels.program")
from tinygrad2.kernels import cpu, pool

SIZES = {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 131, "n_positions": cpu.CACHE_BLOCK + 30}


def model_of(dtype="float32", **sizes):
    return GPT2(GPT2Config(**{**SIZES, **sizes}), seed=1, dtype=dtype)


def compare(model, texts, before, steps, capacity=None):
    """Assert that the decoder and the separate operations give bit-identical logits and caches for several tokens."""
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (texts, before + steps))
    caches = [KVCache(model, texts, capacity or before + steps) for _ in range(2)]
    assert isinstance(caches[0].decoder, CpuDecoder)
    caches[1].decoder = None
    with no_grad():
        for cache in caches:
            next_logits(model, tokens[:, :before], cache)
        for i in range(before, before + steps):
            found, expected = (next_logits(model, tokens[:, i : i + 1], cache).numpy() for cache in caches)
            np.testing.assert_array_equal(found, expected)
            assert caches[0].length == i + 1
    for found, expected in zip(*(cache.layers for cache in caches), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("texts", [1, 3, 7, cpu.GEMV_ROWS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16_weights"])
def test_logits_are_bit_identical_to_the_operations(dtype, texts):
    compare(model_of(dtype), texts, before=5, steps=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16_weights"])
def test_caches_with_more_than_one_block(dtype):
    compare(model_of(dtype), 2, before=cpu.CACHE_BLOCK - 2, steps=6)


@pytest.mark.parametrize("sizes", [{"n_layer": 1}, {"n_head": 4}, {"vocab_size": 1001}, {"layer_norm_epsilon": 1e-3}])
def test_other_model_sizes(sizes):
    compare(model_of(**sizes), 2, before=3, steps=2)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads(count, set_threads):
    set_threads(count)
    compare(model_of(), 2, before=cpu.CACHE_BLOCK - 1, steps=3)


def test_generated_text_is_the_same(monkeypatch):
    model = model_of(n_positions=24)
    options = [{"temperature": 0}, {"samples": 3, "seed": 4}, {"top_k": 20, "top_p": 0.9}]
    texts = [[tokens.tolist() for tokens in generate(model, [1, 2, 3], 40, **given)] for given in options]
    monkeypatch.setattr(CpuDecoder, "fitting", lambda *_: None)
    assert [[tokens.tolist() for tokens in generate(model, [1, 2, 3], 40, **given)] for given in options] == texts


@pytest.mark.parametrize("change", ["assign", "arena", "precision"])
def test_weights_that_change_between_tokens_are_used(change):
    model = model_of()
    tokens, caches = np.array([[7]]), [KVCache(model, 1, 8) for _ in range(2)]
    caches[1].decoder = None
    with no_grad():
        for step in range(2):
            found, expected = (next_logits(model, tokens, cache).numpy() for cache in caches)
            np.testing.assert_array_equal(found, expected)
            if step == 0 and change == "assign":
                model.wte.weight.data = 2 * model.wte.weight.data
            elif step == 0 and change == "arena":
                for region in model.arena().regions:
                    region.values[...] *= 1.5
            elif step == 0:
                model.to(precision="bfloat16_weights")


def test_logits_are_not_overwritten_by_the_next_token():
    model = model_of()
    seen = []
    tokens = generate(model, [1, 2, 3], 4, temperature=0, on_logits=lambda logits: seen.append((logits, logits.copy())))
    list(tokens)
    for logits, copy in seen:
        np.testing.assert_array_equal(logits, copy)


def test_unsupported_models_use_the_operations():
    for model in (
        model_of("float64"), model_of("bfloat16"), model_of(activation_function="gelu"), model_of(n_embd=20, n_head=2),
    ):  # fmt: skip
        assert KVCache(model, 1, 8).decoder is None
        assert len(list(generate(model, [1, 2], 3, temperature=0))) == 3
    model = model_of()
    assert KVCache(model, cpu.GEMV_ROWS, 8).decoder is not None
    assert KVCache(model, cpu.GEMV_ROWS + 1, 8).decoder is None


def test_tokens_and_positions_out_of_range_are_rejected():
    model = model_of()
    cache = KVCache(model, 1, 4)
    with no_grad():
        next_logits(model, np.array([[1, 2, 3]]), cache)
        with pytest.raises(ValueError, match="tokens contain 131"):
            next_logits(model, np.array([[131]]), cache)
        next_logits(model, np.array([[0]]), cache)
        with pytest.raises(ValueError, match="position 4 is out of range; expected 0 to 3"):
            next_logits(model, np.array([[0]]), cache)


def test_generation_fails_if_logits_are_not_finite():
    model = model_of()
    tokens = generate(model, [5, 9, 2], 9, temperature=0)
    next(tokens)
    model.h[1].mlp.c_fc.weight.data[3, 4] = np.nan
    with pytest.raises(ValueError, match="logits are not finite numbers"):
        list(tokens)


def test_decoding_while_another_caller_uses_the_thread_pool(set_threads):
    """All parts then run on the calling thread, with the same result."""
    set_threads(2)
    model = model_of()
    started, end = threading.Event(), threading.Event()

    def wait(start, stop):
        started.set()
        assert end.wait(60)

    other = threading.Thread(target=pool.each, args=(wait, [(0, 1), (1, 2)]))
    other.start()
    try:
        assert started.wait(60)
        compare(model, 1, before=3, steps=3)
    finally:
        end.set()
        other.join()
