"""The scripts in examples/, shortened, and their models beside PyTorch's and transformers'."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from examples import llama, name_gru, seq2seq_attention, spiral_mlp
from gpt2 import GPT2Config
from gpt2.generate import generate
from tinygrad2 import Tensor, no_grad

ROOT = Path(__file__).parents[2]
SCRIPTS = ("spiral_mlp", "name_gru", "seq2seq_attention", "llama")


@pytest.fixture
def run(tmp_path):
    """Runs a script in an empty folder, in which `matplotlib` cannot be imported unless `pictures`."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError('hidden by a test')\n")

    def start(name, *options, pictures=False):
        path = [str(ROOT)] if pictures else [str(tmp_path / "hidden"), str(ROOT)]
        return subprocess.run(
            [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, options)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    return start


def losses(printed):
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d{4})", printed)]


def test_spiral_mlp_classifies_new_points(run):
    printed = run("spiral_mlp")
    seen, new = re.search(r"accuracy (\S+) on 600 training points, (\S+) on 600 new ones", printed).groups()
    assert float(seen) == pytest.approx(0.997, abs=0.005)  # of the docstring
    assert float(new) == pytest.approx(0.982, abs=0.005)


def test_the_same_output_each_time(run):
    assert run("spiral_mlp", "--steps", 20) == run("spiral_mlp", "--steps", 20)


def test_name_gru_learns(run):
    printed = run("name_gru", "--steps", 60)
    assert losses(printed)[0] == pytest.approx(3.30, abs=0.05)
    assert float(re.search(r"(\S+) on words that it has not seen", printed)[1]) < 2.7  # single letters: 2.85
    assert re.search(r"\d+ of 40 words are new: [a-z]+, [a-z]+", printed)


def test_seq2seq_attention_learns(run):
    printed = run("seq2seq_attention", "--steps", 40)
    assert losses(printed)[-1] < 2.0  # from 2.7; equal probabilities have 2.30
    assert re.search(r"correct: \d+\.\d% of 500 new inputs reversed, \d+\.\d% sorted", printed)


@pytest.mark.slow
def test_seq2seq_attention_solves_both_tasks(run):
    printed = run("seq2seq_attention", "--steps", 400)
    right = re.search(r"correct: (\S+)% of 500 new inputs reversed, (\S+)% sorted", printed).groups()
    assert all(float(share) > 90 for share in right)


def test_llama_trains_beside_gpt2(run, prepared_text):
    printed = run("llama", "--steps", 12, "--data", prepared_text)
    for name in ("Llama: 832,768", "GPT-2: 834,432"):
        found = losses(printed.split(name)[1])
        assert found[0] == pytest.approx(np.log(257), abs=0.6)
        assert found[5] < 4  # the sixth report of this model
    last = re.search(r"validation loss after 12 steps: Llama (\S+), GPT-2 (\S+) nats per byte", printed).groups()
    assert all(float(loss) < 4 for loss in last)


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_matplotlib_it_says_so_and_ends_well(name, run, prepared_text, tmp_path):
    printed = run(name, "--steps", 1, *(("--data", prepared_text) if name == "llama" else ()))
    assert printed.splitlines()[-1] == ('no picture: it needs matplotlib; install it with pip install -e ".[examples]"')
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.extras("matplotlib")
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_draws(name, run, prepared_text, tmp_path):
    data = ("--data", prepared_text) if name == "llama" else ()
    printed = run(name, "--steps", 6, "--picture", "made.png", *data, pictures=True)
    assert printed.splitlines()[-1] == "picture: made.png"
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_student_reads_it_in_ten_minutes(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250


# The spiral.


def test_points_of_the_spiral():
    x, y = spiral_mlp.spiral(10, np.random.default_rng(0))
    assert (x.shape, x.dtype, y.tolist()) == ((30, 2), np.float32, [0] * 10 + [1] * 10 + [2] * 10)
    np.testing.assert_allclose(np.hypot(*x.T), np.tile(np.linspace(0.05, 1, 10), 3), rtol=1e-6)


# The words.


def test_words_are_encoded_with_their_ends():
    rows = name_gru.encode(["abc", "z" * 12])
    assert rows[0].tolist() == [0, 1, 2, 3, 0] + [-1] * 9
    assert rows[1].tolist() == [0] + [26] * 12 + [0]


def test_words_are_found_in_pydoc():
    words = name_gru.find_words()
    assert len(words) > 1500
    assert {"function", "statement", "operator"} <= set(words)
    assert all(re.fullmatch("[a-z]{4,12}", word) for word in words)


def test_padding_has_no_part_in_the_loss():
    model = name_gru.GRU(width=8)
    short, padded = (name_gru.encode(["word"])[:, :n] for n in (6, 14))
    assert model.loss(padded).item() == pytest.approx(model.loss(short).item(), rel=1e-6)


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_the_gru_is_pytorchs():
    import torch

    model = name_gru.GRU(width=8)
    theirs = torch.nn.GRU(32, 8, batch_first=True)
    z, r, n = np.split(np.arange(24), 3)
    order = np.concatenate([r, z, n])  # PyTorch's
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.tensor(model.of_input.weight.numpy()[:, order].T))
        theirs.weight_hh_l0.copy_(torch.tensor(model.of_state.weight.numpy()[:, order].T))
        theirs.bias_ih_l0.zero_()
        theirs.bias_hh_l0.zero_()
        ids = np.random.default_rng(0).integers(27, size=(3, 7))
        states, _ = theirs(torch.tensor(model.embedding(ids).numpy()))
    expected = model.output(Tensor(states.numpy())).numpy()
    np.testing.assert_allclose(model(ids).numpy(), expected, rtol=0, atol=1e-5)


# The encoder-decoder.


def test_batches_have_the_right_answers():
    inputs, outputs = seq2seq_attention.make_batch(4, np.random.default_rng(0))
    for (command, *digits), answer in zip(inputs.tolist(), outputs.tolist(), strict=True):
        assert answer == (digits[::-1] if command == seq2seq_attention.REVERSE else sorted(digits))
    assert inputs[:, 0].tolist() == [seq2seq_attention.REVERSE] * 2 + [seq2seq_attention.SORT] * 2
    assert seq2seq_attention.shifted(outputs)[:, 0].tolist() == [seq2seq_attention.START] * 4


def test_the_decoder_does_not_see_what_it_predicts():
    model = seq2seq_attention.Transformer()
    inputs, outputs = seq2seq_attention.make_batch(2, np.random.default_rng(0))
    other = outputs.copy()
    other[:, 5:] = (other[:, 5:] + 1) % 10
    with no_grad():
        first = model(inputs, seq2seq_attention.shifted(outputs)).numpy()
        weights = model.cross_attention.weights
        second = model(inputs, seq2seq_attention.shifted(other)).numpy()
    np.testing.assert_allclose(first[:, :6], second[:, :6], rtol=0, atol=1e-6)
    assert np.abs(first[:, 6:] - second[:, 6:]).max() > 1e-3
    assert weights.shape == (2, seq2seq_attention.H, 8, 9)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)


# Llama.

SMALL = llama.LlamaConfig(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=4, n_kv_head=2, n_hidden=24)


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


def test_llama_generates_the_same_with_and_without_its_cache():
    model = llama.Llama(SMALL)
    for parameter in model.parameters():
        parameter.data = parameter.data * 5  # far from uniform, so that a wrong position shows
    texts = [
        [int(tokens[0]) for tokens in generate(model, [3, 1, 4], 30, temperature=0, cache=cache)]
        for cache in (True, False)
    ]
    assert texts[0][:9] == texts[1][:9]  # up to the context of 12 tokens
    assert len(texts[0]) == len(texts[1]) == 30
    assert len(set(texts[0])) > 3


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_llama_is_that_of_transformers(tmp_path):
    """Logits and gradients, with the weights under transformers' names."""
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
