"""The CPU benchmarks: interleaving, derived figures, equal results of the compared programs, a tiny run of each."""

import datetime
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from tests.benchmarks import alternate, bfloat16, decode, ops, plan, recipe, small, train_step
from tests.benchmarks.alternate import Contender, Measured, Work
from tinygrad2.backend import get_backend

TINY = GPT2Config(
    vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
)


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(alternate, "MATRIX", 64)
    monkeypatch.setattr(alternate, "BUFFER", 1 << 20)


# Contenders for the tests. Their worker processes import these functions.


def append_name(name, path):
    turns = iter(range(100))

    def task():
        with open(path, "a") as file:
            file.write(name)
        if name == "B" and next(turns) == 1:
            raise MemoryError("no room\nfor B")
        return 0.5

    return {"task": task}


def exits(path):
    return {"task": lambda: os._exit(3)}


@pytest.mark.slow
def test_contenders_alternate_and_one_that_fails_is_excluded(tmp_path):
    path = tmp_path / "turns"
    contenders = [Contender(name, append_name, (name, path), {"task": Work()}) for name in "ABC"]
    contenders.append(Contender("D", exits, (path,), {"task": Work()}))
    found = alternate.alternate(contenders, rounds=3)
    assert path.read_text() == "ABC" * 2 + "AC"
    assert found.seconds == {"task": {"A": [0.5] * 3, "B": [0.5], "C": [0.5] * 3}}
    assert found.errors["B"] == "MemoryError: no room for B"
    assert found.errors["D"].startswith("BrokenProcessPool: ")
    assert found.peak_bytes.keys() == {"A", "C"}
    assert all(1 << 22 < peak < 1 << 40 for peak in found.peak_bytes.values())


def test_apart_returns_the_result_of_another_process():
    assert alternate.in_subprocess(divmod, 7, 3) == (2, 1)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        alternate.in_subprocess(os.stat, "nowhere")


def figures():
    """Figures from two rounds. The second sgemm is faster; memory is read at 20 bytes/s and copied at 40 bytes/s."""
    work = {"step": Work(tokens=10, flops=300), "copying": Work(read=10, written=10)}
    machine = dict(zip(alternate.MACHINE, (*[Work(flops=200)] * 3, Work(read=20), Work(20, 0, 20, 20)), strict=True))
    contenders = [
        Contender(alternate.LIMITS, None, (), machine),
        Contender("ours", None, (), work),
        Contender("slow", None, (), work, peer=True),
        Contender("fast", None, (), work, peer=True),
    ]
    seconds = {
        **{task: {alternate.LIMITS: [s, s]} for task, s in zip(alternate.MACHINE, (1, 0.5, 0.25, 1, 1), strict=True)},
        "step": {"ours": [1.0, 2.0], "slow": [3.0, 4.0], "fast": [2.0]},
        "copying": {"ours": [1.0, 1.0]},
    }
    return alternate.figures(contenders, Measured(seconds, {alternate.LIMITS: 9, "ours": 5 * 10**9}, {"fast": "gone"}))


def test_figures():
    found = figures()
    step = found["tasks"]["step"]["ours"]
    assert (step["median"], step["min"], step["max"]) == (1.5, 1.0, 2.0)
    assert step["tokens_per_s"] == pytest.approx(10 / 1.5)
    assert step["share_of_sgemm"] == pytest.approx(200 / 400)
    assert step["share_of_bfloat16"] == pytest.approx(200 / 800)
    assert step["times_as_fast_as"] == {
        "slow": {"median": 2.5, "min": 2.0, "max": 3.0},
        "fast": {"median": 2.0, "min": 2.0, "max": 2.0},  # from the only round that both have completed
    }
    assert "times_as_fast_as" not in found["tasks"]["step"]["slow"]
    assert found["tasks"]["copying"]["ours"]["bytes_per_s"] == 20
    assert found["tasks"]["copying"]["ours"]["share_of_memory"] == pytest.approx(0.5)
    assert found["peak_bytes"] == {"ours": 5 * 10**9}


def test_table():
    head = {"processor": "P", "threads": 2, "date": "D", "rounds": 2, "load_average": 0.25, "versions": {"a": "1"}}
    lines = alternate.table({**head, "blas": "B", **figures()})
    assert lines[0] == "P, 2 threads, D, 2 rounds, load average before 0.25"
    step = lines.index(next(line for line in lines if line.startswith("step")))
    assert lines[step].split() == [
        "step",
        "median",
        "ms",
        "min",
        "max",
        "tokens/s",
        "GFLOP/s",
        "of",
        "sgemm",
        "of",
        "bf16",
    ]
    assert lines[step + 1].endswith("25%   2.00x (2.00 to 2.00) fast")  # compared with the fastest
    assert "GB/s" not in lines[step]
    assert lines[-2].split() == ["ours", "5.00", "GB"]
    assert lines[-1] == "FAILED  fast: gone"


@pytest.mark.extras("torch")
def test_pytorch_computes_the_same_training_steps():
    import torch

    model, theirs = GPT2(TINY), train_step.torch_model(TINY)
    with torch.no_grad():
        for (name, ours), parameter in zip(model.named_parameters(), theirs.parameters(), strict=True):
            parameter.copy_(
                torch.from_numpy(ours.numpy().T.copy() if ".c_" in name and ours.ndim > 1 else ours.numpy())
            )
    ours = train_step.our_step(model, 2, 12)
    theirs = train_step.torch_step(theirs, TINY.vocab_size, 2, 12, fused=True)
    losses = [ours() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.005
    np.testing.assert_allclose(losses, [theirs() for _ in range(20)], rtol=2e-5)


@pytest.mark.extras("torch")
def test_pytorch_computes_the_same_steps_of_small_models():
    import torch

    torch.manual_seed(0)
    ours, theirs = small.our_steps(), small.torch_steps()
    np.testing.assert_allclose(
        [ours["GRU, SGD"]() for _ in range(20)], [theirs["GRU, SGD"]() for _ in range(20)], rtol=1e-4
    )
    for step in (*ours.values(), *theirs.values()):
        first = step()
        assert [step() for _ in range(200)][-1] < first


@pytest.mark.slow
def test_small_benchmark(small_limits, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "LEAST", 0.0)
    out = tmp_path / "small.json"
    assert small.main(["--rounds", "1", "--json", str(out)]) == 0
    tasks = json.loads(out.read_text())["tasks"]
    assert tasks.keys() == set(small.TASKS)
    assert all("tinygrad2" in by_name for by_name in tasks.values())


@pytest.mark.extras("transformers")
def test_ctranslate2_generates_the_same_tokens(tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")  # in none of the extras: only a benchmark uses it
    model = GPT2(TINY)
    model.save_pretrained(tmp_path)
    decode.convert(str(tmp_path), str(tmp_path / "theirs"))
    found = ctranslate2.Generator(str(tmp_path / "theirs")).generate_batch(
        [["3", "1", "4"]], max_length=10, min_length=10, sampling_topk=1, include_prompt_in_result=False
    )
    assert [int(word) for word in found[0].sequences[0]] == model.generate([3, 1, 4], 10, temperature=0)[0]


@pytest.mark.slow
def test_train_step_benchmark(small_limits, tmp_path, capsys):
    out = tmp_path / "step.json"
    options = ["--preset", "nano", "--block", "32", "--no-compile", "--rounds", "2", "--json", str(out)]
    assert train_step.main(options) == 0
    record = json.loads(out.read_text())
    step = record["tasks"]["step"]
    assert len(step["tinygrad2"]["seconds"]) == 2
    assert step["tinygrad2"]["tokens_per_s"] == pytest.approx(32 / step["tinygrad2"]["median"])
    assert any(name.startswith("tinygrad2, BLAS: ") for name in step) == ("mkl" in record["versions"])
    assert ("PyTorch fused AdamW" in step) == ("torch" in record["versions"])
    narrow = get_backend("cpu").slow_reason("bfloat16") is None
    assert ("tinygrad2 bfloat16" in step) == narrow
    assert ("PyTorch bfloat16, fused" in step) == (narrow and "torch" in record["versions"])
    assert record["peak_bytes"].keys() == step.keys()
    assert record["limits"].keys() == set(alternate.MACHINE)
    assert re.search(r"\n  tinygrad2 +[\d.,]+ ", capsys.readouterr().out)


@pytest.mark.slow
def test_decode_benchmark(small_limits, tmp_path):
    out = tmp_path / "decode.json"
    options = ["--preset", "nano", "--batch", "1", "3", "--context", "31", "--prompt", "60", "--rounds", "1"]
    assert decode.main([*options, "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    tasks, config = record["tasks"], GPT2Config.preset("nano")
    assert tasks.keys() == {"batch 1", "batch 3", "batch 1, context of 31", "prompt of 60"}
    wide, half = (tasks["batch 3"][f"tinygrad2 {dtype}"] for dtype in ("float32", "bfloat16"))
    weights = (config.n_parameters - config.n_positions * config.n_embd) * decode.NEW
    difference = wide["bytes_per_s"] * wide["median"] - half["bytes_per_s"] * half["median"]
    assert difference == pytest.approx(2 * weights)  # caches are float32 in both
    assert wide["tokens_per_s"] == pytest.approx(3 * decode.NEW / wide["median"])
    longer, shorter = (tasks[name]["tinygrad2 float32"] for name in ("batch 1, context of 31", "batch 1"))
    difference = longer["bytes_per_s"] * longer["median"] - shorter["bytes_per_s"] * shorter["median"]
    assert difference == pytest.approx(decode.NEW * 4 * 2 * config.n_layer * config.n_embd * (31 - decode.CONTEXT))
    versions = record["versions"]
    assert ("CTranslate2 int8" in tasks["batch 1"]) == ({"ctranslate2", "torch", "transformers"} <= versions.keys())
    assert ("transformers bfloat16" in tasks["batch 1"]) == ({"torch", "transformers"} <= versions.keys())


@pytest.mark.slow
def test_ops_benchmark(small_limits, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "LEAST", 0.0)
    out = tmp_path / "ops.json"
    assert ops.main(["--preset", "nano", "--block", "16", "--rounds", "1", "--json", str(out)]) == 0
    tasks = json.loads(out.read_text())["tasks"]
    assert tasks.keys() == ops.works(16, 128, 257).keys()
    assert all({"tinygrad2", "reference.py"} <= by_name.keys() for by_name in tasks.values())


@pytest.mark.slow
def test_plan_benchmark(tmp_path, capsys):
    """The model is small, and its times are too short to agree with the plan."""
    file = tmp_path / "plan.json"
    for _ in range(2):  # the first run may compile kernels, which takes memory
        plan.main(["--only", "nano", "--rounds", "1", "--threads", "1", "--json", str(file)])
    assert re.search(r"^nano( +[\d.,]+){3} \([\d.]+ to [\d.]+\)( +[\d.]+){3}$", capsys.readouterr().out, re.M)
    found = json.loads(file.read_text())["results"]["nano"]
    assert found["time_ratio"] == pytest.approx(found["planned_seconds"] / found["measured_seconds"])
    assert found["memory_ratio"] == pytest.approx(1, abs=0.2)
    for changes, agrees in (({}, True), ({"time_ratio": 1.21}, False), ({"planned_bytes": 2e9}, False)):
        exact = {"time_ratio": 1.0, "planned_bytes": 1e9, "measured_bytes": 1e9}
        assert plan.within({**exact, **changes}) == agrees


@pytest.mark.slow
def test_bfloat16_weights_change_the_loss_only_slightly(tmp_path):
    model = GPT2(TINY)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        np.save(tmp_path / "data" / f"x_{split}_0.npy", (np.arange(100) % 31).astype(np.uint16))
    found = decode.bfloat16_loss(str(tmp_path / "model"), str(tmp_path / "data"), 5)
    assert found["difference"] == found["bfloat16"] - found["float32"]
    assert 0 < abs(found["difference"]) < 1e-3
    assert found["float32"] == pytest.approx(np.log(31), abs=0.1)


@pytest.mark.parametrize(
    ("main", "options", "said"),
    [
        (train_step.main, ["--rounds", "0"], "argument --rounds: is 0; expected 1 or more"),
        (train_step.main, ["--block", "2000"], "--block 2000 is longer than the model's context of 1024 tokens"),
        (train_step.main, ["--json", "nowhere/x.json"], "argument --json: the folder nowhere/ does not exist"),
        (decode.main, ["--preset", "nano"], "--prompt 512 needs 512 positions; the model has 64"),
        (decode.main, ["--data", "x"], "--checkpoint and --data must be used together"),
    ],
)
def test_an_invalid_option_prints_one_line(main, options, said, capsys):
    with pytest.raises(SystemExit):
        main(options)
    file = r"tests/benchmarks/\w+\.py"
    line = rf"{file}: error: {re.escape(said)} \(python {file} --help lists the options\)\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_an_error_in_a_file_prints_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks/decode.py", "--checkpoint", "nowhere", "--data", "nothing"])
    assert alternate.command(decode.main) == 1
    assert re.fullmatch(r"decode\.py: data 'nothing': no such data set .*\n", capsys.readouterr().err)


def test_an_interrupted_command_prints_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert alternate.command(interrupted) == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


def test_settings_that_slow_a_library_down_are_removed_and_reported(monkeypatch, tmp_path, capsys, small_limits):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    options = SimpleNamespace(threads=1, rounds=1, json=tmp_path / "limits.json")
    assert alternate.report("limits", options, []) == 0
    assert "removed from the environment: OPENBLAS_CORETYPE=Haswell\n" in capsys.readouterr().out
    record = json.loads((tmp_path / "limits.json").read_text())
    assert record["removed_settings"] == {"OPENBLAS_CORETYPE": "Haswell"}
    assert "Haswell" not in record["blas"]
    assert "OPENBLAS_CORETYPE" not in os.environ


def test_names_of_result_files_contain_processor_and_date(monkeypatch):
    monkeypatch.setattr("tinygrad2.machine.processor_model", lambda: "AMD EPYC(TM) 25 17 1 0a1b2c3d")
    assert alternate.slug() == f"amd-epyc-tm-25-17-1-{datetime.date.today().isoformat()}"


def test_runs_are_compared_by_smoothed_training_loss_and_final_validation_loss():
    rows = [{"loss": 4 - 0.01 * i} for i in range(50)]
    wide = [*rows, {"loss": 3.5, "val_loss": 2.0}]
    narrow = [{**row, "loss": 1.003 * row["loss"]} for row in rows] + [{"loss": 3.5, "val_loss": 2.01}]
    found = bfloat16.differences(wide, narrow)
    assert found["training"] == pytest.approx(0.003)
    assert found["validation"] == pytest.approx(0.005)


def recipe_rows(losses, seconds):
    """The log of a run with 100 steps per loss; each loss is the evaluation at the last of its steps."""
    rows = [{"step": step, "seconds": seconds} for step in range(1, 100 * len(losses) + 1)]
    for i, loss in enumerate(losses):
        rows[100 * i + 99]["val_loss"] = loss
    return rows


def test_seconds_to_target_end_at_the_first_evaluation_that_reaches_it():
    found = recipe.summary(recipe_rows([1.7, 1.55, 1.56, 1.5], 0.25), 1.55)
    assert (found["steps"], found["seconds"], found["final_loss"]) == (400, 100, 1.5)
    assert (found["steps_to_target"], found["seconds_to_target"]) == (200, 50)
    never = recipe.summary(recipe_rows([1.7, 1.6], 0.5), 1.55)
    assert (never["steps_to_target"], never["seconds_to_target"]) == (None, None)
    old, new = ({"recipe": name, "seed": 1} for name in (recipe.OLD, recipe.NEW))
    runs = [{**old, **never}, {**new, **found}, {**old, **found}, {**new, **never}]
    assert recipe.ratios(runs) == [50 / 100, None]  # the old recipe never reaches it: its total time counts
    widths = {len(text) for text in (recipe.heading(1.55), *map(recipe.line, runs))}
    assert len(widths) == 1
    assert recipe.line(runs[0]).split()[-2:] == ["never", "1.6000"]


@pytest.mark.slow
def test_recipe_benchmark(workspace, tmp_path, capsys):
    out = tmp_path / "recipe.json"
    options = ["--data", "text", "--max-iters", "4", "--seeds", "3", "4", "--target", "5.6", "--json", str(out)]
    assert recipe.main(options) == 0
    record = json.loads(out.read_text())
    runs = record["runs"]
    assert [(run["recipe"], run["seed"]) for run in runs] == [
        (name, seed) for seed in (3, 4) for name in (recipe.OLD, recipe.NEW)
    ]
    assert all(run["steps"] == run["steps_to_target"] == 4 for run in runs)
    assert len({run["final_loss"] for run in runs}) == 4
    assert record["ratios"] == recipe.ratios(runs)
    assert f"{recipe.NEW:<15}     4       4" in capsys.readouterr().out
    assert recipe.main([*options, "--target", "0.1"]) == 1  # not reached
