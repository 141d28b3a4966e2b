"""examples/llama.py, and its model compared with transformers' model."""

import re

import numpy as np
import pytest

from examples import llama
from gpt2 import GPT2Config
from gpt2.generate import KVCache, generate
from tinygrad2 import no_grad

SMALL = llama.LlamaConfig(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=4, n_kv_head=2, n_hidden=24)


@pytest.mark.slow
def test_llama_and_gpt2_are_trained(run, losses, prepared_text):
    printed = run("llama", "--steps", 12, "--data", prepared_text)
    for name in ("Llama: 832,768", "GPT-2: 834,432"):
        found = losses(printed.split(name)[1])
        assert found[0] == pytest.approx(np.log(257), abs=0.6)
        assert found[5] < 4  # the sixth loss printed for this model
    last = re.search(r"validation loss after 12 steps: Llama (\S+), GPT-2 (\S+) nats per byte", printed).groups()
    assert all(float(loss) < 4 for loss in last)


def test_llama_has_as_many_parameters_as_gpt2_nano():
    config = llama.LlamaConfig()
    parameters = llama.Llama(config).n_parameters()
    expected = GPT2Config.preset("nano").n_parameters
    assert 0.997 * expected < parameters <= expected
    gains = (2 * config.n_layer + 1) * config.n_embd
    assert parameters == config.n_weights + gains


def test_llama_is_causal():
    model, ids = llama.Llama(SMALL), np.random.default_rng(0).integers(31, size=(2, 12))
    other = ids.copy()
    other[:, 7] = (other[:, 7] + 1) % 31
    with no_grad():
        first, second = model.features(ids).numpy(), model.features(other).numpy()
    np.testing.assert_allclose(first[:, :7], second[:, :7], rtol=0, atol=1e-5)
    assert np.abs(first[:, 7:] - second[:, 7:]).max() > 1e-3


def test_features_with_a_cache_equal_those_without():
    model, ids = llama.Llama(SMALL), np.random.default_rng(0).integers(31, size=(2, 12))
    for parameter in model.parameters():
        parameter.data = parameter.data * 5  # far from uniform attention, so that a wrong position is detected
    cache = KVCache(model, batch=2, capacity=12)
    with no_grad():
        whole = model.features(ids).numpy()
        parts = [model.features(ids[:, start:stop], cache=cache).numpy() for start, stop in ((0, 5), (5, 6), (6, 12))]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=1e-4)


def test_llama_generates_beyond_its_context():
    model = llama.Llama(SMALL)
    texts = [
        [int(tokens[0]) for tokens in generate(model, [3, 1, 4], 30, temperature=1.0, seed=2, cache=cache)]
        for cache in (True, False)
    ]
    assert len(texts[0]) == len(texts[1]) == 30
    assert texts[0][:9] == texts[1][:9]  # up to the context of 12 tokens


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_llama_equals_transformers(tmp_path):
    """Compares logits and gradients after copying the weights to transformers' model."""
    import torch
    import transformers

    c, ours = SMALL, llama.Llama(SMALL)
    rng = np.random.default_rng(1)
    for parameter in ours.parameters():
        parameter.data = (parameter.data + rng.normal(0, 0.2, parameter.shape)).astype(np.float32)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_hidden,
            num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
            max_position_embeddings=c.n_positions, rms_norm_eps=1e-5, tie_word_embeddings=True,
        )
    )  # fmt: skip
    layer = {
        "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
        "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm",
    }  # fmt: skip
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    for i in range(c.n_layer):
        names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in layer.items()}
    parameters = dict(ours.named_parameters())
    assert names.keys() == parameters.keys()
    is_transposed = {name: p.ndim == 2 and name != "embedding.weight" for name, p in parameters.items()}
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            values = parameter.numpy().T if is_transposed[name] else parameter.numpy()
            named[names[name]].copy_(torch.tensor(values.copy()))

    ids, targets = rng.integers(c.vocab_size, size=(2, 2, c.n_positions))
    with no_grad():
        logits = ours.head(ours.features(ids)).numpy()
    result = theirs(torch.tensor(ids)).logits
    np.testing.assert_allclose(logits, result.detach().numpy(), rtol=0, atol=2e-5 * np.abs(logits).max())
    torch.nn.functional.cross_entropy(result.reshape(-1, c.vocab_size), torch.tensor(targets.reshape(-1))).backward()
    ours.loss(ids, targets).backward()
    for name, parameter in parameters.items():
        expected = named[names[name]].grad.numpy()
        expected = expected.T if is_transposed[name] else expected
        error = np.linalg.norm(parameter.grad - expected) / np.linalg.norm(expected)
        assert error < 1e-4, name
