import math

import numpy as np
import pytest

from gpt2 import verify
from tinygrad2 import Tensor, no_grad, reference
from tinygrad2.backend import get_backend


@pytest.mark.parametrize("activation", verify.FORMS)
def test_every_gradient_is_right_by_a_margin(activation):
    model = verify.small_model(activation)
    errors = verify.gradient_errors(model)
    assert errors.keys() == dict(model.named_parameters()).keys()
    assert max(errors.values()) < verify.BOUND / 10


def test_attention_is_far_from_uniform():
    model = verify.small_model("gelu")
    tokens = np.random.default_rng(0).integers(31, size=(3, 9))
    block = model.h[0]
    with no_grad():
        x = model.wte.weight.data[tokens] + model.wpe.weight.data[:9]
        qkv = block.attn.c_attn(block.ln_1(Tensor(x))).numpy()
    q, k, _ = (part.reshape(3, 9, 3, 4).swapaxes(1, 2) for part in np.split(qkv, 3, axis=-1))
    scores = np.where(np.tri(9, dtype=bool), q @ k.swapaxes(-1, -2) / math.sqrt(4), -np.inf)
    weights = reference.softmax_forward(scores)
    assert weights[:, :, 5:].max(axis=-1).mean() > 0.5


@pytest.mark.parametrize(
    "kernel",
    ["linear_backward", "attention_backward", "layernorm_backward", "add_layernorm_backward", "gelu_exact_backward",
     "lm_head_backward", "dropout_backward"],
)  # fmt: skip
def test_an_error_of_a_thousandth_is_found(kernel, monkeypatch):
    right = getattr(reference, kernel)
    monkeypatch.setattr(get_backend().kernels, kernel, lambda *arguments: right(*arguments) * 1.001)
    errors = verify.gradient_errors(verify.small_model("gelu"))
    assert max(errors.values()) > 100 * verify.BOUND


def test_a_gradient_that_never_arrives_is_found(monkeypatch):
    right = reference.embedding_backward
    monkeypatch.setattr(
        get_backend().kernels,
        "embedding_backward",
        lambda dy, ids, first, dwte, dwpe: right(dy, ids, first, dwte, None),
    )
    errors = verify.gradient_errors(verify.small_model("gelu"))
    assert [name for name, error in errors.items() if error > verify.BOUND] == ["wpe.weight"]


def test_command_line(capsys):
    assert verify.main(["--gradients"]) == 0
    table = capsys.readouterr().out
    assert table.count("  ok\n") == 2 * 28
    assert "h.1.attn.c_attn.bias           (36,)" in table
    assert table.endswith("every gradient is right\n")


def test_command_line_fails_with_the_gradients(monkeypatch, capsys):
    right = reference.gelu_exact_backward
    monkeypatch.setattr(get_backend().kernels, "gelu_exact_backward", lambda *arguments: right(*arguments) * 1.001)
    assert verify.main(["--gradients"]) == 1
    table = capsys.readouterr().out
    tanh_form, exact_form = table.split("gelu (exact form)")
    assert "FAILED" not in tanh_form
    assert "FAILED" in exact_form


def test_command_line_without_a_task_prints_help(capsys):
    assert verify.main([]) == 2
    assert "--gradients" in capsys.readouterr().err
