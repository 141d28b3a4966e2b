"""gpt2/cost_model.py: the FLOPs and bytes of a training step, and predicted times on a device."""

import math
from dataclasses import replace

import pytest

from gpt2 import cost_model
from gpt2.config import PRESETS
from tinygrad2.gpus import BANDWIDTH, PEAK_TFLOPS

GPT2 = replace(PRESETS["gpt2"], embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)


def total(kernels, figure):
    return sum(kernel.calls * getattr(kernel.cost, figure) for kernel in kernels)


@pytest.mark.parametrize("preset", ["nano", "gpt2", "gpt2-xl"])
def test_flops_of_a_step_agree_with_palm_appendix_b(preset):
    """The formula is 6 N + 12 L H Q T per token, where N excludes the position embedding.

    Causal attention computes only half of the second term. Its backward pass recomputes S, so there are 7 products
    (2 + 5) instead of the formula's 6 (2 + 4).
    """
    config = PRESETS[preset]
    B, T = 2, config.n_positions
    counted = total(cost_model.micro_step(config, B, T, cuda=False), "flops") / (B * T)
    gains = config.n_parameters - sum(math.prod(shape) for _, shape in config.shapes() if len(shape) == 2)
    weights = config.n_parameters - T * config.n_embd - gains
    assert counted == pytest.approx(6 * weights + 7 / 6 * 12 * config.n_layer * config.n_embd * T / 2)
    assert counted == pytest.approx(config.flops_per_token(T), rel=0.05)


def test_recomputing_blocks_adds_a_forward_pass_and_chunked_logits_add_no_flops():
    plain, block = (cost_model.micro_step(GPT2, 4, 1024, recompute=name) for name in ("none", "block"))
    chunked = cost_model.micro_step(GPT2, 4, 1024, head_rows=1000)
    forward = sum(k.calls * k.cost.flops for k in plain if not k.backward and "head" not in k.name)
    assert total(block, "flops") - total(plain, "flops") == pytest.approx(forward)
    assert total(chunked, "flops") == pytest.approx(total(plain, "flops"))
    assert {k.name: k.calls for k in chunked}["head wgrad"] == 5


def test_every_kernel_has_a_family_with_rates():
    device = cost_model.gpu("H200", "bfloat16")
    assert set(device.rates) == set(cost_model.FAMILIES)
    for optimizer in ("adamw", "muon", "sgd"):
        for precision in ("float32", "tf32", "bfloat16"):
            config = PRESETS["gpt2"]
            kernels = cost_model.micro_step(config, 8, 1024, precision) + cost_model.update(
                config, precision, optimizer
            )
            assert {kernel.cost.family for kernel in kernels} <= set(cost_model.FAMILIES)
            assert all(math.isfinite(device.seconds(kernel.cost)) for kernel in kernels)


def test_cards_are_those_in_the_table_of_peaks():
    assert list(cost_model.CARDS) == list(PEAK_TFLOPS)
    assert set(cost_model.CARDS) <= set(BANDWIDTH)


@pytest.mark.parametrize(
    ("card", "batch_size", "tokens_per_s"),
    [("H200", 64, 546e3), ("A100", 64, 223e3), ("RTX 4090", 16, 128e3), ("RTX 5090", 16, 168e3)],
)
def test_predicted_tokens_per_second_of_the_124m_model(card, batch_size, tokens_per_s):
    """The expected values were estimated by hand, kernel by kernel, in bfloat16."""
    device = cost_model.gpu(card, "bfloat16")
    kernels = cost_model.micro_step(GPT2, batch_size, 1024, "bfloat16") + cost_model.update(GPT2, "bfloat16")
    seconds = sum(kernel.calls * device.seconds(kernel.cost) for kernel in kernels)
    assert batch_size * 1024 / seconds == pytest.approx(tokens_per_s, rel=0.03)


def test_time_of_a_kernel_is_the_maximum_of_arithmetic_and_memory_traffic():
    device = cost_model.gpu("H200", "bfloat16")
    rate = device.rates["product"]
    large, thin = cost_model.product(8192, 8192, 8192, 2), cost_model.product(8192, 8192, 1, 2)
    assert device.seconds(large) == pytest.approx(large.flops / rate.flops + device.call)
    assert device.seconds(thin) == pytest.approx(thin.nbytes / rate.nbytes + device.call)
    assert device.milliseconds(large) == 1e3 * device.seconds(large)


def test_an_unknown_precision_is_an_error():
    with pytest.raises(ValueError, match="the peak of H200 in float64 is unknown; choose one of float32"):
        cost_model.gpu("H200", "float64")


@pytest.mark.parametrize("zero", [False, True])
def test_communication_time_of_a_ring(zero):
    device = cost_model.gpu("H200", "bfloat16")
    P, table = GPT2.n_parameters, GPT2.vocab_size * GPT2.n_embd
    link = cost_model.RING * device.link
    long = cost_model.communication(GPT2, device, 8, zero, backward=1.0)
    assert long.seconds == pytest.approx(2 * 7 / 8 * 4 * P / link)
    assert long.overlapped == pytest.approx((1 if zero else 2) * 7 / 8 * 4 * (P - table) / link)
    short = cost_model.communication(GPT2, device, 8, zero, backward=1e-5)
    assert short.overlapped == 1e-5
    assert cost_model.communication(GPT2, device, 1, zero, 1.0) == (0, 0)
    across = cost_model.communication(GPT2, cost_model.with_link(device, 10e9), 64, zero, 1.0)
    assert across.seconds == pytest.approx(2 * 63 / 64 * 4 * P / (cost_model.RING * 10e9))
