"""gpt2/trace.py: traces compared with a plain float64 implementation and with transformers; other architectures."""

import math
from itertools import pairwise

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from gpt2.trace import attention_weights, trace
from tinygrad2 import Tensor, nn, ops, tracer

CONFIG = GPT2Config(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=61)
TOKENS = np.random.default_rng(3).integers(61, size=20)


def scaled(model, scale=6.0):
    """Scale the model's matrices, so that attention is far from uniform and every layer affects the result."""
    for _, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * scale
    return model


def plain_gpt2(p, config, tokens):
    """A plain implementation of GPT-2. Returns (streams, attention outputs, MLP outputs, attention weights, features,
    logits)."""

    def norm(x, name):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + config.layer_norm_epsilon) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    T, D = len(tokens), config.n_embd // config.n_head
    x = p["wte.weight"][tokens] + p["wpe.weight"][:T]
    streams, attended, added, weights = [x], [], [], []
    for layer in range(config.n_layer):
        name = f"h.{layer}"
        heads = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").reshape(T, 3, config.n_head, D)
        result = np.empty((T, config.n_head, D))
        rows = np.zeros((config.n_head, T, T))
        for head in range(config.n_head):
            for t in range(T):
                scores = heads[: t + 1, 1, head] @ heads[t, 0, head] / math.sqrt(D)
                exponentials = np.exp(scores - scores.max())
                rows[head, t, : t + 1] = exponentials / exponentials.sum()
                result[t, head] = rows[head, t, : t + 1] @ heads[: t + 1, 2, head]
        attended.append(linear(result.reshape(T, -1), f"{name}.attn.c_proj"))
        x = x + attended[-1]
        hidden = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        hidden = hidden / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        added.append(linear(hidden, f"{name}.mlp.c_proj"))
        x = x + added[-1]
        streams.append(x)
        weights.append(rows)
    features = norm(x, "ln_f")
    return streams, attended, added, weights, features, features @ p["wte.weight"].T


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def assert_equal(found, expected, bound):
    streams, attended, added, weights, features, logits = expected
    assert len(found.layers) == len(added)
    assert distance(found.embedding, streams[0]) < bound
    for layer, *values in zip(found.layers, streams[:-1], attended, added, weights, strict=True):
        for own, value in zip((layer.stream, layer.attention, layer.mlp, layer.weights()), values, strict=True):
            assert own.shape == value.shape
            assert distance(own, value) < bound
    assert distance(found.stream, streams[-1]) < bound
    assert distance(found.features, features) < bound
    assert distance(found.logits, logits) < bound


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("length", [1, 2, 20])
def test_trace_agrees_with_a_plain_float64_implementation(dtype, bound, length):
    model = scaled(GPT2(CONFIG, seed=1, dtype=dtype))
    parameters = {name: p.numpy().astype(np.float64) for name, p in model.named_parameters()}
    assert_equal(model.trace(TOKENS[:length]), plain_gpt2(parameters, CONFIG, TOKENS[:length]), bound)


def test_layer_outputs_sum_to_the_residual_stream_and_logits_are_bit_identical():
    model = scaled(GPT2(CONFIG, seed=1))
    found = model.trace(TOKENS)
    streams = [found.embedding, *(layer.stream for layer in found.layers[1:]), found.stream]
    for layer, (before, after) in zip(found.layers, pairwise(streams), strict=True):
        assert np.array_equal(layer.stream, before)
        assert np.array_equal(layer.stream + layer.attention + layer.mlp, after)
        assert np.abs(layer.weights().sum(-1) - 1).max() < 1e-6
        assert np.all(layer.weights()[:, ~np.tri(20, dtype=bool)] == 0)
    assert np.array_equal(found.logits, model(TOKENS[None]).numpy()[0])
    assert np.array_equal(found.tokens, TOKENS)


def test_recomputed_blocks_and_bfloat16_weights_can_be_traced():
    model = GPT2(CONFIG, seed=1, recompute="block")
    assert np.array_equal(model.trace(TOKENS).layers[2].mlp, GPT2(CONFIG, seed=1).trace(TOKENS).layers[2].mlp)
    found = GPT2(CONFIG, seed=1, dtype="bfloat16_weights").trace(TOKENS)
    assert len(found.layers) == 3
    assert found.stream.dtype == np.float32


def test_the_tracer_is_inactive_afterwards():
    GPT2(CONFIG, seed=1).trace(TOKENS)
    assert tracer.active() is None


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], r"trace: tokens have shape \(0,\); expected \(T,\)"),
        ([[1, 2]], r"trace: tokens have shape \(1, 2\)"),
        (range(25), "25 tokens given; the model's context is 24"),
        ([61], "token"),
    ],
)
def test_invalid_tokens_are_rejected(tokens, message):
    with pytest.raises(ValueError, match=message):
        GPT2(CONFIG).trace(tokens)


# Models of other architectures ---------------------------------------------------------------------------------------


class Other(nn.Module):
    """A model that adds positions with +, has an MLP before attention, computes attention from matrix products and
    softmax, and has no LayerNorm."""

    def __init__(self):
        self.config = CONFIG
        self.tokens, self.positions = nn.Embedding(61, 32), nn.Embedding(24, 32)
        self.up, self.down, self.out = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 61)

    def features(self, tokens, key=None, cache=None):
        x = self.tokens(tokens) + self.positions(np.arange(tokens.shape[1])[None])
        x = x + self.down(ops.gelu(self.up(x)))
        mask = Tensor(np.where(np.tri(tokens.shape[1]), 0, -1e9).astype(np.float32))
        scores = x.reshape(1, -1, 2, 16).transpose(0, 2, 1, 3)
        weights = ops.softmax(scores @ scores.transpose(0, 1, 3, 2) + mask)
        return (weights @ scores).transpose(0, 2, 1, 3).reshape(1, -1, 32) + x

    def head(self, features):
        return self.out(features)


def test_another_architecture_is_traced():
    model = Other()
    found = trace(model, TOKENS)
    positions = model.positions.weight.numpy()[: len(TOKENS)]
    assert np.array_equal(found.embedding, model.tokens.weight.numpy()[TOKENS] + positions)
    first, second = found.layers
    assert first.attention is None
    with pytest.raises(ValueError, match="this layer has no attention"):
        first.weights()
    assert np.array_equal(first.stream + first.mlp, second.stream)
    assert np.array_equal(second.stream + second.attention, found.stream)
    assert second.mlp is None
    q = second.stream.reshape(-1, 2, 16).transpose(1, 0, 2)
    packed = np.concatenate([2 * second.stream, 2 * second.stream, second.stream], axis=1)
    assert distance(second.weights(), attention_weights(packed, 2)) < 1e-5  # (2 q)(2 k) / sqrt(16) = q k
    assert second.weights().shape == (2, len(q[0]), len(q[0]))


def test_a_model_without_layers_or_without_an_embedding():
    class Bigram(Other):
        def features(self, tokens, key=None, cache=None):
            return self.tokens(tokens)

    class Nothing(Other):
        def features(self, tokens, key=None, cache=None):
            return Tensor(np.zeros((1, tokens.shape[1], 32), dtype=np.float32))

    found = trace(Bigram(), TOKENS)
    assert found.layers == []
    assert np.array_equal(found.features, found.stream)
    with pytest.raises(ValueError, match="Nothing has no embedding"):
        trace(Nothing(), TOKENS)


# Comparison with transformers ----------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_trace_agrees_with_transformers(tmp_path):
    import torch
    import transformers

    config = transformers.GPT2Config(
        n_layer=3,
        n_head=4,
        n_embd=32,
        n_positions=24,
        vocab_size=61,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS[None]), output_attentions=True, output_hidden_states=True)
    found = GPT2.from_pretrained(tmp_path).trace(TOKENS)
    for layer, weights, stream in zip(found.layers, expected.attentions, expected.hidden_states[:-1], strict=True):
        assert distance(layer.weights(), weights[0].numpy()) < 2e-5
        assert distance(layer.stream, stream[0].numpy()) < 2e-5
    assert distance(found.features, expected.hidden_states[-1][0].numpy()) < 2e-5
    assert distance(found.logits, expected.logits[0].numpy()) < 2e-5
