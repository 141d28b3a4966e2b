"""Training in bfloat16 on a CPU: gradients and steps compared with float32, bit-identical results after resuming and
with any number of threads, and the message if the processor has no bfloat16 instructions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from tests.training_runs import newest_arrays, rows, run
from tinygrad2 import Key, optim
from tinygrad2.backend import get_backend

onednn = pytest.importorskip("tinygrad2.kernels.onednn")

NANO = replace(GPT2Config.preset("nano"), embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
TEXT = np.frombuffer(Path(__file__).read_bytes(), dtype=np.uint8).astype(np.int64)
NO_INSTRUCTIONS = "this processor has no instructions for bfloat16 (avx512_bf16 or amx_bf16)"


@pytest.fixture(params=["float32 products", "oneDNN"])
def products(request, monkeypatch):
    """Compute products with the portable path, and with oneDNN."""
    if request.param == "float32 products":
        monkeypatch.setattr(onednn, "library", lambda: None)
    elif onednn.library() is None:
        pytest.skip(onednn.unavailable_reason())


@pytest.fixture
def without_instructions(monkeypatch):
    """A processor without bfloat16 instructions."""
    monkeypatch.setattr(onednn, "library", lambda: None)
    monkeypatch.setattr(onednn, "unavailable_reason", lambda: NO_INSTRUCTIONS)


@pytest.fixture
def with_instructions(monkeypatch):
    """A processor with bfloat16 instructions; products are still computed by the portable path."""
    monkeypatch.setattr(onednn, "library", lambda: None)
    monkeypatch.setattr(onednn, "unavailable_reason", lambda: None)


def batch(step, rows=4, length=64):
    """Windows of this file's bytes."""
    starts = np.random.default_rng(step).integers(len(TEXT) - length - 1, size=rows)
    windows = TEXT[starts[:, None] + np.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


def gradients(precision, config=NANO, **options):
    model = GPT2(config, dtype=precision, **options)
    loss = model.loss(*batch(0), Key(0, 1))
    loss.backward()
    return loss.item(), {name: p.grad.copy() for name, p in model.named_parameters()}


def steps(precision, count, **options):
    """Do `count` training steps. Returns the losses and the model."""
    model = GPT2(NANO, dtype=precision, **options)
    optimizer, losses = optim.AdamW(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1), []
    for step in range(count):
        loss = model.loss(*batch(step), Key(0, step))
        loss.backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_gradients_are_close_to_float32(products, activation):
    config = replace(NANO, activation_function=activation)
    loss, found = gradients("bfloat16", config)
    true_loss, expected = gradients("float32", config)
    assert loss == pytest.approx(true_loss, rel=2e-3)
    for name, true in expected.items():
        assert found[name].dtype == np.float32
        error = np.linalg.norm(found[name] - true) / np.linalg.norm(true)
        assert 1e-4 < error < 2e-2, name  # a smaller error would mean float32 products


def test_training_losses_are_close_to_float32(products):
    found, expected = (np.array(steps(precision, 40)[0]) for precision in ("bfloat16", "float32"))
    assert expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=2e-2)


def test_parameters_are_float32_and_their_copies_are_rounded(products):
    _, model = steps("bfloat16", 2)
    for name, p in model.named_parameters():
        assert p.dtype == np.float32, name
        np.testing.assert_array_equal(p.read_as("bfloat16", name), p.data.astype("bfloat16"))
    logits = model(batch(0)[0])
    assert logits.dtype.name == "bfloat16"
    assert np.isfinite(logits.data.astype(np.float32)).all()


@pytest.mark.parametrize("options", [{"recompute": "block"}, {"head_rows": 100}], ids=str)
def test_memory_saving_options_give_the_same_gradients(products, options):
    loss, found = gradients("bfloat16", **options)
    true_loss, expected = gradients("bfloat16")
    assert loss == pytest.approx(true_loss, rel=1e-6)
    for name, gradient in expected.items():
        if "recompute" in options:
            np.testing.assert_array_equal(found[name], gradient, name)
        else:
            assert np.linalg.norm(found[name] - gradient) < 2e-2 * np.linalg.norm(gradient), name


def test_results_are_bit_identical_with_any_number_of_threads(set_threads):
    if onednn.library() is None:
        pytest.skip(onednn.unavailable_reason())
    found = []
    for count in (1, 2, 3):
        set_threads(count)
        losses, model = steps("bfloat16", 3)
        found.append((losses, [p.numpy().copy() for p in model.parameters()]))
    for losses, parameters in found[1:]:
        assert losses == found[0][0]
        for a, b in zip(parameters, found[0][1], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("more", [[], ["--recompute", "block"], ["--optimizer", "muon"]], ids=str)
def test_a_resumed_run_is_bit_identical(workspace, with_instructions, more):
    options = ["--dtype", "bfloat16", "--lr-decay-iters", "8", "--dropout", "0.1", *more]
    run(*options, "--max-iters", "8", "--out-dir", "whole")
    run(*options, "--max-iters", "5", "--out-dir", "parts")
    run("--max-iters", "8", "--out-dir", "parts")
    whole, parts = newest_arrays("whole"), newest_arrays("parts")
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], name)
    assert [row["loss"] for row in rows("whole")] == [row["loss"] for row in rows("parts")]
    (state,) = Path("whole").glob("ckpt-000008/trainer.json")
    assert json.loads(state.read_text())["options"]["dtype"] == "bfloat16"


def test_a_new_run_without_bfloat16_instructions_uses_float32_even_after_resuming(
    workspace, without_instructions, monkeypatch, capsys
):
    run("--dtype", "bfloat16", "--max-iters", "2", "--out-dir", "a")
    lines = capsys.readouterr().out.splitlines()
    assert f"--dtype bfloat16: {NO_INSTRUCTIONS}; computing in float32" in lines
    assert any(line.startswith("device     cpu, float32, ") for line in lines)
    run("--max-iters", "4", "--out-dir", "b")
    monkeypatch.setattr(onednn, "unavailable_reason", lambda: None)  # resume on a processor with the instructions
    run("--max-iters", "4", "--out-dir", "a")
    assert "device     cpu, float32, " in capsys.readouterr().out
    with_float32 = [line.split() for line in Path("b/log.jsonl").read_text().splitlines()]
    assert len(with_float32) == 4


def test_a_run_in_bfloat16_resumes_without_the_instructions_and_can_change_to_float32(
    workspace, with_instructions, monkeypatch, capsys
):
    run("--dtype", "bfloat16", "--max-iters", "2", "--keep", "1")
    assert "device     cpu, bfloat16, " in capsys.readouterr().out
    monkeypatch.setattr(onednn, "unavailable_reason", lambda: NO_INSTRUCTIONS)
    run("--max-iters", "3", "--keep", "1")
    lines = capsys.readouterr().out.splitlines()
    said = next(line for line in lines if line.startswith("--dtype"))
    assert said.startswith(
        f"--dtype bfloat16: {NO_INSTRUCTIONS}; products are computed in float32 from the same values"
    )
    assert any(line.startswith("device     cpu, bfloat16, ") for line in lines)
    run("--max-iters", "4", "--keep", "1", "--dtype", "float32")
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("--dtype") for line in lines)
    assert any(line.startswith("device     cpu, float32, ") for line in lines)


def test_a_run_in_float32_cannot_change_to_bfloat16_without_the_instructions(workspace, without_instructions, capsys):
    run("--max-iters", "2")
    run("--max-iters", "3", "--dtype", "bfloat16")
    assert f"--dtype bfloat16: {NO_INSTRUCTIONS}; computing in float32" in capsys.readouterr().out


def test_reasons_why_bfloat16_is_slow_or_unsupported_on_a_cpu(without_instructions, monkeypatch):
    cpu = get_backend("cpu")
    assert cpu.slow_reason("bfloat16") == NO_INSTRUCTIONS
    assert cpu.slow_reason("float32") is None
    assert cpu.unsupported_reason("bfloat16") is None
    monkeypatch.setenv("TINYGRAD2_KERNELS", "reference")
    assert cpu.unsupported_reason("bfloat16").startswith("bfloat16 needs the compiled kernels, which need Numba")
    assert cpu.slow_reason("bfloat16") is None
