import math
import tracemalloc

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from tinygrad2 import Key, Tensor, memory, no_grad, ops
from tinygrad2.backend import get_backend

SIZES = {"vocab_size": 29, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3}
RATES = {"embd_pdrop": 0.1, "attn_pdrop": 0.2, "resid_pdrop": 0.3}
KEY = Key(seed=5, step=7)


@pytest.fixture
def text():
    return np.random.default_rng(0).integers(SIZES["vocab_size"], size=(3, 8))


@pytest.fixture
def model():
    return GPT2(GPT2Config(**SIZES, **RATES), dtype="float64")


def gradients(model):
    return {name: parameter.grad.copy() for name, parameter in model.named_parameters()}


def test_names_and_shapes_are_those_of_transformers(model):
    layer = {
        "ln_1.weight": (12,),
        "ln_1.bias": (12,),
        "attn.c_attn.weight": (12, 36),
        "attn.c_attn.bias": (36,),
        "attn.c_proj.weight": (12, 12),
        "attn.c_proj.bias": (12,),
        "ln_2.weight": (12,),
        "ln_2.bias": (12,),
        "mlp.c_fc.weight": (12, 48),
        "mlp.c_fc.bias": (48,),
        "mlp.c_proj.weight": (48, 12),
        "mlp.c_proj.bias": (12,),
    }
    expected = {"wte.weight": (29, 12), "wpe.weight": (11, 12), "ln_f.weight": (12,), "ln_f.bias": (12,)}
    expected |= {f"h.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == expected


def test_initial_weights():
    """Matrices are normal(0, 0.02), residual projections scaled by 1 / sqrt(2 n_layer); biases are 0, gains are 1. No
    two matrices are equal."""
    config = GPT2Config(vocab_size=300, n_positions=200, n_embd=96, n_layer=3, n_head=3)
    first_numbers = set()
    for name, parameter in GPT2(config).named_parameters():
        values = parameter.numpy()
        if parameter.ndim == 1:
            assert (values == (1 if ".ln_" in f".{name}" and name.endswith("weight") else 0)).all(), name
            continue
        std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
        error_of_std = 1 / math.sqrt(2 * values.size)
        assert abs(values.std() / std - 1) < 4 * error_of_std, name
        assert abs(values.mean() / std) < 4 / math.sqrt(values.size), name
        first_numbers.add(values.flat[0] / std)
    assert len(first_numbers) == 2 + 4 * 3


def test_initializer_range_is_used():
    narrow, wide = (GPT2(GPT2Config(**SIZES, initializer_range=r), dtype="float64") for r in (0.02, 0.1))
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        np.testing.assert_allclose(b.data, a.data * 5 if a.ndim == 2 else a.data, rtol=1e-12)


def test_the_weights_depend_on_the_seed_but_not_on_the_dtype():
    config = GPT2Config(**SIZES)
    single, double, other = GPT2(config, seed=1), GPT2(config, seed=1, dtype="float64"), GPT2(config, seed=2)
    for a, b, c in zip(single.parameters(), double.parameters(), other.parameters(), strict=True):
        assert (a.dtype, b.dtype) == ("float32", "float64")
        np.testing.assert_array_equal(a.data, b.data.astype("float32"))
        assert (a.data != c.data).all() == (a.ndim == 2)


def test_initial_loss_is_that_of_a_uniform_distribution():
    config = GPT2Config(vocab_size=1000, n_positions=64, n_embd=64, n_layer=4, n_head=4)
    text = np.random.default_rng(0).integers(1000, size=(4, 65))
    assert GPT2(config).loss(text[:, :-1], text[:, 1:]).item() == pytest.approx(math.log(1000), abs=0.05)


def test_loss_is_the_cross_entropy_of_the_logits(model, text):
    logits = model(text[:, :-1])
    assert logits.shape == (3, 7, 29)
    assert logits.dtype == "float64"
    loss = model.loss(text[:, :-1], text[:, 1:])
    assert loss.shape == ()
    assert loss.item() == pytest.approx(ops.cross_entropy(logits, text[:, 1:]).item(), rel=1e-13)


def test_logits_do_not_depend_on_later_positions(model, text):
    changed = text.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % 29
    before, after = model(text).numpy(), model(changed).numpy()
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(axis=-1).all()


def test_dropout_is_applied_only_with_a_key(model, text):
    tokens, targets = text[:, :-1], text[:, 1:]
    plain = model.loss(tokens, targets).item()
    assert plain == GPT2(GPT2Config(**SIZES), dtype="float64").loss(tokens, targets).item()
    assert model.loss(tokens, targets, KEY).item() == model.loss(tokens, targets, KEY).item() != plain
    assert model.loss(tokens, targets, Key(seed=5, step=8)).item() != model.loss(tokens, targets, KEY).item()


@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_rate_has_an_effect(rate, text):
    none = dict.fromkeys(RATES, 0.0)
    model = GPT2(GPT2Config(**SIZES, **{**none, rate: 0.5}), dtype="float64")
    for parameter in model.parameters():  # with initial weights, attention would hardly affect the loss
        parameter.data = parameter.data * (10 if parameter.ndim == 2 else 1)
    with_key, without = (model.loss(text[:, :-1], text[:, 1:], key).item() for key in (KEY, None))
    assert abs(with_key - without) > 1e-4


def test_every_dropout_site_has_its_own_key(model, text, monkeypatch):
    from tinygrad2.backend import get_backend

    sites, kernels = [], get_backend().kernels
    dropout, attention = kernels.dropout_forward, kernels.attention_forward
    monkeypatch.setattr(kernels, "dropout_forward", lambda x, p, key: sites.append(key.site) or dropout(x, p, key))
    monkeypatch.setattr(kernels, "attention_forward", lambda *given: sites.append(given[-1].site) or attention(*given))
    with no_grad():
        model.loss(text[:, :-1], text[:, 1:], KEY)
    assert sorted(sites) == list(range(1 + 3 * SIZES["n_layer"]))


def test_a_split_batch_has_the_same_dropout(model, text):
    """Parts of 1 and 2 samples, weighted by their sizes, give the loss and gradients of the batch of 3."""
    tokens, targets = text[:, :-1], text[:, 1:]
    whole = model.loss(tokens, targets, KEY)
    whole.backward()
    expected = gradients(model)
    model.zero_grad()
    total = 0.0
    for part in (slice(0, 1), slice(1, 3)):
        key = Key(seed=KEY.seed, step=KEY.step, first_sample=part.start)
        loss = model.loss(tokens[part], targets[part], key) * ((part.stop - part.start) / 3)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-13)
    for name, gradient in gradients(model).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-11, atol=1e-15, err_msg=name)


def test_tied_embedding_gets_the_sum_of_both_gradients(model, text):
    tokens, targets, wte = text[:, :-1], text[:, 1:], model.wte.weight
    model.loss(tokens, targets).backward()
    both = wte.grad.copy()
    model.zero_grad()
    ops.lm_head(model.features(tokens).detach(), wte, targets).backward()
    as_head = wte.grad.copy()
    model.zero_grad()
    ops.lm_head(model.features(tokens), wte.detach(), targets).backward()
    as_embedding = wte.grad.copy()
    unused = np.setdiff1d(np.arange(29), tokens)
    assert (as_embedding[unused] == 0).all()
    assert (as_head != 0).all()
    np.testing.assert_allclose(both, as_head + as_embedding, rtol=1e-13, atol=1e-17)


def test_tokens_may_be_lists_small_integers_or_tensors(model, text):
    expected = model(text).numpy()
    for tokens in (text.tolist(), text.astype("uint16"), Tensor(text)):
        np.testing.assert_array_equal(model(tokens).numpy(), expected)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (np.zeros(5, int), ValueError, r"tokens have shape \(5,\); expected \(B, T\)"),
        (np.zeros((1, 2, 3), int), ValueError, r"tokens have shape \(1, 2, 3\); expected \(B, T\)"),
        (np.zeros((1, 12), int), ValueError, "12 tokens given; the model's context is 11"),
        (np.zeros((2, 0), int), ValueError, r"tokens have shape \(2, 0\), which is empty"),
        ([[0, 29]], ValueError, r"tokens contain 29; expected integers in \[0, 29\)"),
        ([[0, -1]], ValueError, r"tokens contain -1; expected integers in \[0, 29\)"),
        ([[0.0, 1.0]], TypeError, "tokens have dtype float64; expected integers"),
    ],
)
def test_invalid_tokens_are_rejected(model, tokens, error, message):
    with pytest.raises(error, match=message):
        model(tokens)


def test_invalid_targets_are_rejected(model, text):
    with pytest.raises(ValueError, match=r"targets contain 29; expected integers in \[0, 29\)"):
        model.loss(text, np.full_like(text, 29))
    with pytest.raises(ValueError, match=r"targets has shape \(3, 7\); expected \(3, 8\)"):
        model.loss(text, text[:, 1:])


@pytest.mark.parametrize(("name", "value"), [("device", "tpu"), ("dtype", "float16")])
def test_unknown_device_and_dtype_are_rejected(name, value):
    with pytest.raises(ValueError, match=f"{name} '{value}' is (unknown|not supported); choose one of"):
        GPT2(GPT2Config(**SIZES), **{name: value})


def test_a_full_context_is_accepted(model):
    with no_grad():
        assert model(np.zeros((1, 11), int)).shape == (1, 11, 29)


def test_recomputing_blocks_is_bit_identical():
    """Compares the losses and all gradients of two micro-steps with dropout."""
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    tokens, targets = np.random.default_rng(0).integers(0, 50, (2, 4, 16))
    outcomes = []
    for recompute in ("none", "block"):
        model = GPT2(config, recompute=recompute)
        losses = []
        for micro in range(2):
            rows = slice(2 * micro, 2 * micro + 2)
            loss = model.loss(tokens[rows], targets[rows], Key(3, 5, 2 * micro))
            loss.backward()
            losses.append(loss.item())
        outcomes.append((losses, {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert outcomes[0][0] == outcomes[1][0]
    for name, gradient in outcomes[0][1].items():
        np.testing.assert_array_equal(outcomes[1][1][name], gradient, err_msg=name)


def test_unknown_recompute_option_is_rejected():
    with pytest.raises(ValueError, match="recompute is 'all'; choose one of none, block"):
        GPT2(GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=1), recompute="all")


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("head_rows", [None, 64])
@pytest.mark.parametrize(("width", "saved"), [(128, 16), (256, 14), (768, 10)])
def test_number_of_arrays_that_a_layer_saves(width, saved, recompute, head_rows):
    """A block saves the arrays that memory_model.py counts, or its two inputs with recompute; the last normalization
    saves two. Chunks of logits are not saved; instead, the gradients of the last normalization's output and of the
    output layer's weight are."""
    config = GPT2Config(vocab_size=500, n_positions=128, n_embd=width, n_layer=2 if width > 128 else 6, n_head=4)
    model = GPT2(config, recompute=recompute, head_rows=head_rows)
    tokens, targets = np.random.default_rng(0).integers(0, 500, (2, 4, 128))
    model.loss(tokens, targets, KEY)

    def held():
        memory.memory_pool.trim()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    before = held()
    loss = model.loss(tokens, targets, KEY)
    kept = held() - before
    tracemalloc.stop()
    loss.backward()
    array = 4 * 128 * width * 4
    # With recompute, each block saves two inputs, except for the first, which has only one.
    layers = 2 * config.n_layer - 1 if recompute == "block" else saved * config.n_layer
    expected = (layers + 2) * array + (512 * 500 * 4 if head_rows is None else 500 * width * 4)
    assert kept == pytest.approx(expected, abs=(3 if width == 128 else 1.5) * array)


def test_backward_equals_the_backward_pass_of_the_loss(monkeypatch):
    """Loss and gradients are bit-identical if the logits are computed in one chunk, and equal up to rounding
    otherwise."""
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    tokens, targets = np.random.default_rng(0).integers(0, 50, (2, 4, 32))

    def gradients(run, head_rows=None):
        model = GPT2(config, head_rows=head_rows)
        model.arena()
        losses = [
            float(run(model, key)) for key in (KEY, KEY.at(1))
        ]  # the second pass adds to the gradients of the first
        return losses, {name: p.grad for name, p in model.named_parameters()}

    def separately(model, key):
        loss = model.loss(tokens, targets, key)
        (loss * 0.3).backward()
        return loss.data

    def at_once(model, key):
        return model.backward(tokens, targets, key, 0.3)

    expected = gradients(separately)
    same, chunks = gradients(at_once), gradients(at_once, 50)
    monkeypatch.setattr(get_backend(), "logits_bytes", 50 * 50 * 4)
    limited = gradients(at_once)
    assert same[0] == expected[0]
    assert chunks[0] == limited[0] == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        np.testing.assert_array_equal(same[1][name], gradient, err_msg=name)
        np.testing.assert_array_equal(chunks[1][name], limited[1][name], err_msg=name)
        assert np.linalg.norm(chunks[1][name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name


class Doubling:
    def loss(self, tokens, targets, key=None):
        return super().loss(tokens, targets, key) * 2


class Doubled(Doubling, GPT2):
    """GPT2 with its loss overridden by a mixin that has no `backward`."""


class DoubledByHand(Doubled):
    def backward(self, tokens, targets, key=None, dloss=1.0):
        return 2 * GPT2(self.config).backward(tokens, targets, key, dloss)


def test_backward_uses_an_overridden_loss():
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    tokens, targets = np.random.default_rng(0).integers(0, 50, (2, 4, 32))
    model, doubled, tripled, by_hand = GPT2(config), Doubled(config), GPT2(config), DoubledByHand(config)
    loss = model.backward(tokens, targets, KEY, 0.5)
    assert doubled.backward(tokens, targets, KEY, 0.5) == 2 * loss
    np.testing.assert_array_equal(doubled.wpe.weight.grad, 2 * model.wpe.weight.grad)
    tripled.loss = lambda tokens, targets, key: GPT2.loss(tripled, tokens, targets, key) * 3
    assert tripled.backward(tokens, targets, KEY, 0.5) == 3 * loss
    assert by_hand.backward(tokens, targets, KEY, 0.5) == 2 * loss
    assert by_hand.wpe.weight.grad is None  # the method above was called, not LanguageModel.backward


def test_recomputing_layer_results_is_bit_identical(monkeypatch):
    """The model is wide enough that all results that can be recomputed are."""
    tokens, targets = np.random.default_rng(0).integers(0, 50, (2, 2, 40))

    def gradients():
        model = GPT2(GPT2Config(vocab_size=50, n_positions=40, n_embd=768, n_layer=2, n_head=12))
        loss = model.backward(tokens, targets, KEY)
        return loss, {name: p.grad for name, p in model.named_parameters()}

    recomputed = gradients()
    monkeypatch.setattr(get_backend(), "recompute_outputs", np.inf)
    saved = gradients()
    assert recomputed[0] == saved[0]
    for name, gradient in saved[1].items():
        np.testing.assert_array_equal(recomputed[1][name], gradient, err_msg=name)
