"""gpt2/cpu_rates.py: the CPU's rates, measured by profiling a small model."""

import pytest

from gpt2 import cost_model, cpu_rates
from gpt2.config import PRESETS
from gpt2.memory_model import Step
from tinygrad2 import machine
from tinygrad2.precision import Precision

NANO = PRESETS["nano"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measured_rates_are_complete(dtype):
    step = Step(NANO, 2, 64, Precision.of(dtype))
    device = cpu_rates.measure(step)
    assert set(device.rates) == set(cost_model.FAMILIES)
    assert all(rate.flops > 0 and rate.nbytes > 0 for rate in device.rates.values())
    assert device.host > 0
    assert not device.asynchronous
    assert 0 < device.memory <= machine.memory()[1]


def test_rates_reproduce_the_profile(monkeypatch):
    """The predicted step time of the profiled model equals the time in its profile."""
    milliseconds = {
        "": 100, "linear_forward": 10, "linear_backward": 22, "attention_forward": 4, "attention_backward": 9,
        "layernorm_forward": 1, "add_layernorm_forward": 3, "layernorm_backward": 2, "add_layernorm_backward": 1,
        "gelu_forward": 3, "gelu_backward": 5, "embedding_forward": 1, "embedding_backward": 2, "lm_head_forward": 9,
        "lm_head_backward": 12, "squared_norm": 1, "adamw_step": 4,
    }  # fmt: skip
    profile = {name: value / 1e3 for name, value in milliseconds.items()}
    sizes = []

    def profiled(config, B, T, precision):
        sizes.append((config.n_layer, config.n_embd, B, T))
        return dict(profile), 2e-3

    monkeypatch.setattr(cpu_rates, "_profiled", profiled)
    device = cpu_rates.measure(Step(NANO, 500, 64))
    assert sizes == [(1, 128, cpu_rates.ROWS // 64, 64)]
    one_layer = cpu_rates.replace(NANO, n_layer=1)
    kernels = cost_model.micro_step(one_layer, 16, 64, cuda=False) + cost_model.update(one_layer)
    seconds = sum(kernel.calls * (device.seconds(kernel.cost) + device.host) for kernel in kernels)
    assert seconds == pytest.approx(0.1)
    by_family = {
        kernel.cost.family: sum(
            k.calls * device.seconds(k.cost) for k in kernels if k.cost.family == kernel.cost.family
        )
        for kernel in kernels
    }
    assert by_family["attention_backward"] == pytest.approx(9e-3)
    assert by_family["product"] + by_family["small product"] == pytest.approx(32e-3)
    assert by_family["head product"] + by_family["cross_entropy"] == pytest.approx(21e-3)
    assert by_family["layernorm_forward"] == pytest.approx(4e-3)
    assert by_family["zero_grad"] == pytest.approx(2e-3)
