"""python -m gpt2.plan: its output, defaults and errors."""

import json
import math
import os
import re
from pathlib import Path

import pytest

from gpt2 import console, cost_model, cpu_rates, plan
from gpt2.config import PRESETS
from gpt2.cost_model import Device, Rate
from gpt2.training.options import command_line
from tests.stand_ins import strict_cupy
from tinygrad2 import machine

STEP = ("--preset", "gpt2", "--device", "h200", "--dtype", "bfloat16", "--total-batch-size", "524288")


@pytest.fixture
def steady_cpu(monkeypatch):
    """A CPU with 100 GFLOP/s and 10 GB/s, instead of measured rates."""

    def measure(step):
        rates = dict.fromkeys(cost_model.FAMILIES, Rate(1e11, 1e10))
        return Device("this CPU", 16e9, rates, 0.0, 1e-5, 1e9, asynchronous=False)

    monkeypatch.setattr(cpu_rates, "measure", measure)


def printed(capsys, *arguments):
    assert plan.main(list(arguments)) == 0
    return capsys.readouterr().out


def found(capsys, *arguments):
    return json.loads(printed(capsys, *arguments, "--json"))


def failed(capsys, *arguments):
    try:
        status = plan.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    assert status != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_printed_report(capsys):
    text = printed(capsys, *STEP, "--ranks", "8", "--batch-size", "64")
    assert text.startswith(
        "model      124,439,808 parameters (12 layers, 12 heads, embedding size 768, context 1024)\n"
    )
    assert "batch      524,288 tokens per step = 64 x 1,024 tokens x 1 (micro-steps) x 8 (ranks)\n" in text
    for name in ("weights", "gradients", "moments", "activations", "logits", "buffers", "libraries", "total"):
        assert re.search(rf"^  {name} +[\d.]+$", text, re.M)
    assert re.search(r"^  available +141.000  sufficient for any --batch-size up to \d+$", text, re.M)
    for name in ("products up", "attention backward", "layernorm forward", "cross entropy", "optimizer"):
        assert re.search(rf"^  {name} +[\d.]+ +[\d.]+% +[\d,]+ +[\d.]+ +[\d.]+$", text, re.M)
    assert re.search(r"^  communication +[\d.]+ +[\d.]+%  of [\d.]+ ms; the rest overlaps", text, re.M)
    assert re.search(r"^rate       4,\d{3},\d{3} tokens/s, 4\d% MFU$", text, re.M)
    assert re.search(r"^run        9,999,745,024 tokens = 19,073 steps: \d\d min, without", text, re.M)


def test_figures_in_the_documentation_are_current(capsys):
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    command = re.search(r"^python -m gpt2.plan (.*)$", page, re.M)[1]
    assert f"```text\n{printed(capsys, *command.split())}```\n" in page
    scaled = ("--recipe", "modern", "--device", "h200", "--dtype", "bfloat16", "--batch-size", "8", "--ranks")
    for model, preset in (("124M", "gpt2"), ("355M", "gpt2-medium"), ("774M", "gpt2-large"), ("1.5B", "gpt2-xl")):
        rows = [found(capsys, "--preset", preset, *scaled, ranks) for ranks in ("1", "8", "64")]
        cells = [f"{row['tokens_per_s']:,.0f}, {console.duration(3600 * row['hours'])}" for row in rows]
        assert f"| {model} | {' | '.join(cells)} | {rows[-1]['memory_total'] / 1e9:.1f} GB |\n" in page


def test_json_figures_are_consistent(capsys):
    figures = found(capsys, *STEP, "--ranks", "8")
    assert (figures["batch_size"], figures["micro_steps"], figures["ranks"]) == (4, 16, 8)
    assert figures["memory_total"] == sum(figures["memory"].values())
    parts = sum(row["seconds"] for row in figures["kernels"].values())
    parts += figures["python_seconds"] + figures["communication_waited_seconds"]
    assert figures["step_seconds"] == pytest.approx(parts)
    assert figures["tokens_per_s"] == pytest.approx(524_288 / figures["step_seconds"])
    assert figures["hours"] == pytest.approx(figures["tokens"] / figures["tokens_per_s"] / 3600)
    products = sum(row["flops"] for row in figures["kernels"].values())
    assert products == pytest.approx(524_288 / 8 * PRESETS["gpt2"].flops_per_token(1024), rel=0.05)


def test_options_have_the_defaults_of_train_py(capsys, steady_cpu):
    nano = found(capsys, "--device", "cpu")
    assert (nano["batch_size"], nano["block_size"], nano["step_tokens"]) == (16, 64, 1024)
    assert nano["tokens"] == 600 * 1024
    assert "orthogonalize" in nano["kernels"]
    large = found(capsys, "--device", "cpu", "--preset", "gpt2", "--recipe", "modern")
    assert (large["batch_size"], large["micro_steps"], large["tokens"]) == (4, 128, 19_073 * 524_288)
    assert found(capsys, "--device", "cpu", "--tokens", "1000000")["tokens"] == 1_000_000
    train = {text: action.help for action in command_line(None)._actions for text in action.option_strings}
    ours = {text: action.help for action in plan.command_line()._actions for text in action.option_strings}
    own = {"--device", "--ranks", "--link", "--tokens", "--json", "--help", "-h"}
    assert {text: train[text] for text in ours.keys() - own} == {text: ours[text] for text in ours.keys() - own}


def test_python_overhead_does_not_overlap_on_a_cpu(capsys, steady_cpu):
    figures = found(capsys, "--device", "cpu", "--threads", "2")
    calls = sum(row["calls"] for row in figures["kernels"].values())
    assert figures["python_seconds"] == pytest.approx(1e-5 * calls)
    assert figures["mfu"] is None
    assert "rates measured now" in printed(capsys, "--device", "cpu")
    assert "communication" not in printed(capsys, "--device", "cpu")


def test_the_host_limits_small_batches_on_a_gpu(capsys):
    small, large = (found(capsys, *STEP[:-2], "--batch-size", str(n)) for n in (1, 64))
    assert small["python_seconds"] > 0
    assert large["python_seconds"] == 0


def test_zero_recompute_and_head_rows_save_memory(capsys):
    plain = found(capsys, *STEP, "--ranks", "8")
    zero = found(capsys, *STEP, "--ranks", "8", "--zero")
    assert zero["memory"]["moments"] == pytest.approx(plain["memory"]["moments"] / 8, rel=1e-6)
    assert zero["communication_waited_seconds"] > plain["communication_waited_seconds"]
    for option, value, part in (("--recompute", "block", "activations"), ("--head-rows", "512", "logits")):
        other = found(capsys, *STEP, "--ranks", "8", option, value)
        assert other["memory"][part] < plain["memory"][part] / 2
        assert other["largest_batch_size"] > plain["largest_batch_size"]
        assert other["step_seconds"] > plain["step_seconds"]


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_plans_for_other_optimizers(optimizer, capsys):
    figures = found(capsys, *STEP, "--optimizer", optimizer)
    assert ("orthogonalize" in figures["kernels"]) == (optimizer == "muon")
    assert math.isfinite(figures["hours"])


def test_the_report_states_whether_the_model_fits(capsys):
    text = printed(capsys, "--preset", "gpt2-xl", "--device", "rtx-4090")
    assert re.search(r"available +24.000  too small, even for --batch-size 1; see --recompute block", text)
    text = printed(capsys, "--preset", "gpt2", "--device", "rtx-4090", "--batch-size", "512")
    assert re.search(
        r"too small; --batch-size \d+ or less fits \(\d+ processes the same tokens per step in \d+ micro-s", text
    )
    text = printed(capsys, *STEP, "--ranks", "8", "--batch-size", "16")
    assert re.search(
        r"sufficient for any --batch-size up to \d+ \(64 processes the same .* step in 1 micro-step\)\n", text
    )


def test_a_busy_machine_is_reported(capsys, steady_cpu, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for load, lines in ((1.9, 0), (2.1, 1)):
        monkeypatch.setattr(machine, "load_average", lambda load=load: load)
        text = printed(capsys, "--device", "cpu")
        assert text.count("load       other programs use the cores (load average 2.1 on 4)") == lines
    assert "load average" not in printed(capsys, *STEP)


def test_communication_takes_longer_with_more_ranks_or_a_slower_link(capsys):
    waits = [
        found(capsys, *STEP, "--batch-size", "8", "--ranks", ranks, *link)["communication_waited_seconds"]
        for ranks, link in (("1", ()), ("8", ()), ("64", ()), ("64", ("--link", "10")))
    ]
    assert waits == sorted(set(waits))
    assert waits[0] == 0


def test_device_cuda_is_the_gpu_of_this_machine(capsys, monkeypatch):
    with strict_cupy.registered():
        from tinygrad2.backend import get_backend

        cuda = get_backend("cuda")
        monkeypatch.setattr(type(cuda.cuda), "gpu_name", lambda self: "NVIDIA H200")
        figures = found(capsys, "--preset", "gpt2", "--device", "cuda")
        assert figures["device"] == "H200"
        assert figures["memory_available"] == cuda.memory()[1]
        monkeypatch.setattr(type(cuda.cuda), "gpu_name", lambda self: "NVIDIA GTX 1080")
        assert "the rates of the GPU NVIDIA GTX 1080 are unknown" in failed(capsys, "--device", "cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "h20"], "--device is h20; expected auto, cpu, cuda, .*; did you mean h200?"),
        (["--preset", "gtp2"], "--preset is gtp2; expected nano, .*; did you mean gpt2?"),
        (["--device", "h200", "--ranks", "0"], "--ranks is 0; expected more than 0"),
        (["--device", "h200", "--link", "-1"], "--link is -1.0; expected more than 0"),
        (["--device", "h200", "--dtype", "float64"], "the peak of H200 in float64 is unknown; choose one of"),
        (["--device", "cpu", "--dtype", "tf32"], "--dtype tf32 needs a GPU"),
        (
            ["--device", "h200", "--dtype", "bfloat16", "--n-embd", "60", "--n-head", "3"],
            "--dtype bfloat16 needs a head size that is a multiple of 16, at most 128; got 20",
        ),
        (
            ["--device", "h200", "--ranks", "3", "--total-batch-size", "1000"],
            "--total-batch-size 1,000 is not a multiple",
        ),
        (["--batchsize", "3"], "unknown option --batchsize; did you mean --batch-size?"),
    ],
)
def test_errors_print_one_line(arguments, message, capsys):
    assert re.match(rf"gpt2.plan: error: {message}", failed(capsys, *arguments))
