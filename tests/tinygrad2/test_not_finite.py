"""Injected values that are not finite are found, and reported with their tensor, operation and layer."""

import math

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from tests.spoiled import spoil, spoil_steps
from tinygrad2 import Key, Tensor, nn, no_grad, ops
from tinygrad2.not_finite import CHUNK, LARGE, Checker, bad_parameters, damage, largest

CONFIG = GPT2Config(vocab_size=31, n_positions=12, n_embd=12, n_layer=3, n_head=3)
TOKENS = np.arange(24).reshape(2, 12) % 20
VALUES = [np.inf, -np.inf, np.nan, 1e38]


def injected(name, index, value, **options):
    model = GPT2(CONFIG, **options)
    parameter = dict(model.named_parameters())[name]
    values = parameter.numpy().copy()
    values[index] = value
    parameter.data = values
    return model


def checked(model, key=None):
    checker = Checker(model)
    checker.run(lambda: model.loss(TOKENS, TOKENS, key).backward())
    return checker


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("options", [{}, {"recompute": "block"}, {"dtype": "float64"}, {"head_rows": 5}], ids=str)
@pytest.mark.parametrize(
    ("name", "index", "operation", "layer"),
    [
        ("h.2.mlp.c_fc.weight", (3, 5), "linear", "h.2.mlp.c_fc"),
        ("h.0.attn.c_attn.bias", (7,), "linear", "h.0.attn.c_attn"),
        ("h.1.ln_2.weight", (4,), "add_layernorm", "h.1.ln_2"),
        ("h.1.mlp.c_fc.bias", (4,), "gelu", "h.1.mlp.c_fc"),
        ("wte.weight", (4, 2), "embedding", "wte and wpe"),  # a token in the batch
        ("wte.weight", (29, 2), "lm_head", "wte"),  # a token that only the output layer uses
        ("wpe.weight", (11, 0), "embedding", "wte and wpe"),
    ],
)
def test_an_injected_weight_is_reported(name, index, operation, layer, value, options):
    operation += "_in_chunks" if "head_rows" in options and operation == "lm_head" else ""
    origin = checked(injected(name, index, value, **options)).origin
    assert (origin.phase, origin.operation, origin.layer) == ("forward", operation, layer)
    assert (origin.parameter, origin.index, origin.bad) == (name, index, 1)
    assert origin.value == pytest.approx(value, nan_ok=True)
    assert f"{operation} in {layer}, forward pass: parameter {name} [" in str(origin)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_gradient_of_a_user_defined_operation_is_reported(value, recompute, monkeypatch):
    spoil_steps(monkeypatch, 0, value=value)
    origin = checked(GPT2(CONFIG, recompute=recompute), Key(0)).origin
    assert (origin.phase, origin.operation, origin.layer) == ("backward", "spoil", "after h.2.mlp.c_proj")
    assert (origin.index, origin.bad) == ((0, 0, 7), 1)
    where = "spoil after h.2.mlp.c_proj, backward pass: the gradient of the result of dropout after h.2.mlp.c_proj "
    assert str(origin).startswith(f"{where}[0, 0, 7] is ")


def test_the_gradient_of_a_parameter_is_reported():
    """The gradients are finite, but their sum overflows."""
    layer = nn.Linear(2, 2)
    checker = Checker(layer)
    checker.run(lambda: spoil(layer(Tensor(np.full((1, 2), 1e10, "float32"))), 1e37, 0).sum().backward())
    assert str(checker.first).startswith("linear in the model, backward pass: the gradient of weight [0, 0] is inf (")
    assert checker.origin is checker.large


def test_without_an_injected_value_everything_is_finite():
    model, same = GPT2(CONFIG), GPT2(CONFIG)
    checker = Checker(model)
    assert checker.run(lambda: model.loss(TOKENS, TOKENS, Key(0)).backward())
    assert checker.origin is None
    assert not list(bad_parameters(model))
    same.loss(TOKENS, TOKENS, Key(0)).backward()
    for (_, ours), (_, theirs) in zip(model.named_parameters(), same.named_parameters(), strict=True):
        assert np.array_equal(ours.grad, theirs.grad)


def test_a_forward_pass_without_gradients_is_checked():
    model = injected("h.1.attn.c_proj.weight", (0, 1), np.nan)
    checker = Checker(model)
    with no_grad():
        assert not checker.run(lambda: model(TOKENS))
    assert checker.first.parameter == "h.1.attn.c_proj.weight"


def test_the_result_of_an_operation_is_reported():
    checker = Checker(nn.Linear(1, 1))
    checker.run(lambda: ops.gelu(Tensor([1.0, -2.0])).log())
    assert str(checker.first) == "log at the start, forward pass: its result [1] is nan (1 of 2 values)"
    checker.run(lambda: Tensor(2.0, requires_grad=True) * Tensor(1e30) * Tensor(1e30))
    assert checker.large.value == pytest.approx(2e30)


def test_damage_is_a_parameter_or_the_first_bad_value():
    wte = injected("wte.weight", (4, 2), np.nan)
    assert damage(wte).startswith("its weights are damaged: parameter wte.weight [4, 2]")
    model = GPT2(CONFIG)
    finite = "its weights are finite; the first bad value: "
    assert damage(model) == finite + "could not be reproduced"
    assert damage(model, lambda: model.loss(TOKENS, TOKENS)) == finite + "could not be reproduced"
    found = damage(model, lambda: Tensor([np.inf, 1.0]) * 2)
    assert found == finite + "scale at the start, forward pass: its input 0 [0] is inf (1 of 2 values)"


def test_every_bad_parameter_is_listed():
    model = injected("h.1.ln_1.weight", 3, -1e20)
    model.wpe.weight.data = np.full(model.wpe.weight.shape, np.nan)
    assert [str(place) for place in bad_parameters(model)] == [
        "parameter wpe.weight [0, 0] is nan (144 of 144 values)",
        "parameter h.1.ln_1.weight [3] is -1e+20 (1 of 12 values)",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_largest_reads_every_chunk(dtype):
    x = np.zeros(CHUNK + 5, dtype=np.dtype(dtype))
    assert largest(x) == 0
    x[-1] = -3
    assert largest(x) == 3
    x[-2] = np.nan
    assert math.isnan(largest(x))
    assert largest(np.arange(3)) == largest(np.zeros(0)) == 0
    assert float(np.finfo("float32").max) < LARGE**2
