"""gpt2/verify.py and gpt2/parity.py: gradient checks, and comparisons with PyTorch and with stored references."""

import dataclasses
import json
import math
import shutil
import sys

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, parity, verify
from gpt2.config import PRESETS
from tests.stand_ins import strict_cupy
from tinygrad2 import Tensor, no_grad, reference
from tinygrad2.backend import get_backend


@pytest.mark.parametrize("activation", verify.FORMS)
def test_every_gradient_is_correct_with_a_margin(activation):
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
    ["linear_backward", "attention_backward", *(pytest.param(kernel, marks=pytest.mark.slow) for kernel in (
     "layernorm_backward", "add_layernorm_backward", "gelu_exact_backward", "lm_head_backward", "dropout_backward"))],
)  # fmt: skip
def test_an_error_of_a_thousandth_is_detected(kernel, monkeypatch):
    original = getattr(reference, kernel)
    monkeypatch.setattr(get_backend().kernels, kernel, lambda *arguments: original(*arguments) * 1.001)
    errors = verify.gradient_errors(verify.small_model("gelu"))
    assert max(errors.values()) > 100 * verify.BOUND


def test_a_missing_gradient_is_detected(monkeypatch):
    original = reference.embedding_backward
    monkeypatch.setattr(
        get_backend().kernels,
        "embedding_backward",
        lambda dy, ids, first, dwte, dwpe: original(dy, ids, first, dwte, None),
    )
    errors = verify.gradient_errors(verify.small_model("gelu"))
    assert [name for name, error in errors.items() if error > verify.BOUND] == ["wpe.weight"]


def test_the_command_prints_a_table_of_gradients(capsys):
    assert verify.main(["--gradients"]) == 0
    table = capsys.readouterr().out
    assert table.count("  ok\n") == 2 * 28
    assert "h.1.attn.c_attn.bias           (36,)" in table
    assert table.endswith("all gradients are correct\n")


def test_the_command_fails_if_a_gradient_is_wrong(monkeypatch, capsys):
    original = reference.gelu_exact_backward
    monkeypatch.setattr(get_backend().kernels, "gelu_exact_backward", lambda *arguments: original(*arguments) * 1.001)
    assert verify.main(["--gradients"]) == 1
    table = capsys.readouterr().out
    tanh_form, exact_form = table.split("gelu (exact form)")
    assert "FAILED" not in tanh_form
    assert "FAILED" in exact_form


SMALL = GPT2Config(vocab_size=61, n_positions=20, n_embd=24, n_layer=2, n_head=3)
SITES = ["embedding", "h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp", "ln_f"]


@pytest.fixture
def small_nano(monkeypatch):
    monkeypatch.setitem(PRESETS, "nano", SMALL)


def engine_results(model, tokens, dtype):
    """Replaces parity.torch_results with results of this engine, for tests that need no independent values."""
    assert model.precision.name == dtype
    found = {"tokens": tokens}
    found |= {f"activation.{site}": x for site, x in parity.engine_activations(model, tokens[:, :-1]).items()}
    with no_grad():
        found["logits"] = model(tokens[:, :-1]).numpy()
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    found["loss"] = loss.numpy()
    found |= {f"gradient.{name}": p.grad for name, p in model.named_parameters()}
    prompt = tokens[0, : (tokens.shape[1] - 1) // 2].tolist()
    text = model.generate(prompt, min(parity.NEW, model.config.n_positions - len(prompt) + 1), temperature=0)
    return {**found, "text": np.array(text[0])}


@pytest.fixture
def stand_in(monkeypatch, small_nano):
    """Use this engine instead of PyTorch and transformers."""
    monkeypatch.setattr(parity, "torch_model", lambda folder: folder)
    monkeypatch.setattr(parity, "torch_versions", lambda: "a stand-in")
    monkeypatch.setattr(
        parity,
        "torch_results",
        lambda folder, tokens, dtype: engine_results(GPT2.from_pretrained(folder, dtype=dtype), tokens, dtype),
    )


@pytest.fixture
def recorded(stand_in, tmp_path, capsys):
    """A reference file for nano with both forms of GELU."""
    file = tmp_path / "reference.safetensors"
    assert verify.main(["--preset", "nano", "--record", str(file)]) == 0
    assert "MB; without PyTorch: python -m gpt2.verify --against" in capsys.readouterr().out
    return file


def expected_rows():
    names = [name for name, _ in GPT2(SMALL, seed=None).named_parameters()]
    return [*(f"activation.{s}" for s in SITES), "logits", "loss", *(f"gradient.{n}" for n in reversed(names))]


def test_a_recorded_reference_needs_no_torch(recorded, monkeypatch, tmp_path, capsys):
    for name in ("torch_model", "torch_versions", "torch_results"):
        monkeypatch.delattr(parity, name)
    json_file = tmp_path / "report.json"
    assert verify.main(["--against", str(recorded), "--json", str(json_file)]) == 0
    table = capsys.readouterr().out
    assert table.count("everything agrees") == 2
    assert "nano, random weights, gelu (exact form): " in table
    assert "float32, cpu; a stand-in\n" in table
    report = json.loads(json_file.read_text())
    assert report["ok"]
    assert [case["activation"] for case in report["cases"]] == ["gelu_new", "gelu"]
    for case in report["cases"]:
        assert case["ok"]
        assert case["same_text"]
        assert case["first_deviation"] is None
        assert [row["name"] for row in case["rows"]] == expected_rows()
        assert all(row["relative"] <= row["bound"] for row in case["rows"])


@pytest.mark.parametrize(
    ("kernel", "first"),
    [
        ("embedding_forward", "activation.embedding"),
        ("attention_forward", "activation.h.0.attn"),
        ("gelu_forward", "activation.h.0.mlp"),
        ("lm_head_forward", "loss"),
        ("attention_backward", "gradient.h.1.attn.c_attn.bias"),
        ("gelu_backward", "gradient.h.1.mlp.c_fc.weight"),
        ("attention_cached", "text"),
    ],
)
def test_the_first_deviation_is_reported(kernel, first, recorded, monkeypatch, tmp_path, capsys):
    original = getattr(get_backend().kernels, kernel)

    def wrong(*arguments):
        results = original(*arguments)
        if kernel == "attention_cached":  # a small error would not change the most probable token, hence the text
            return -results
        return (results[0] * 1.001, *results[1:]) if isinstance(results, tuple) else results * 1.001

    monkeypatch.setattr(get_backend().kernels, kernel, wrong)
    json_file = tmp_path / "report.json"
    assert verify.main(["--against", str(recorded), "--json", str(json_file)]) == 1
    report = json.loads(json_file.read_text())
    case = report["cases"][0]
    assert (report["ok"], case["ok"], case["first_deviation"]) == (False, False, first)
    assert f"first difference: {first}\n" in capsys.readouterr().out


def test_nan_counts_as_a_deviation(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(
        get_backend().kernels, "lm_head_backward", lambda *arguments: np.full((2, 20, 24), np.nan, "f4")
    )
    json_file = tmp_path / "report.json"
    assert verify.main(["--against", str(recorded), "--json", str(json_file)]) == 1
    case = json.loads(json_file.read_text())["cases"][0]
    assert case["first_deviation"] == "gradient.ln_f.bias"
    assert [row["relative"] for row in case["rows"] if row["name"] == "gradient.ln_f.bias"] == [None]


def test_random_weights_depend_only_on_the_seed():
    one, same, other = (parity.random_model(SMALL, seed) for seed in (0, 0, 1))
    assert parity.fingerprint(one) == parity.fingerprint(same) != parity.fingerprint(other)
    # A recorded value: if it changed, existing reference files would become invalid.
    assert parity.fingerprint(one)[:16] == "ffc8d5088c6d73c3"


def test_a_reference_can_be_used_after_its_model_was_moved(stand_in, tmp_path, capsys):
    parity.random_model(SMALL, 3).save_pretrained(tmp_path / "model")
    file = tmp_path / "reference.safetensors"
    assert verify.main(["--against", str(tmp_path / "model"), "--record", str(file), "--dtype", "float64"]) == 0
    shutil.move(tmp_path / "model", tmp_path / "moved")
    assert verify.main(["--against", str(file)]) == 2
    assert "model: no such file or folder" in capsys.readouterr().err
    assert verify.main(["--against", str(file), "--model", str(tmp_path / "moved")]) == 0
    assert "moved: " in (table := capsys.readouterr().out)
    assert "float64, cpu" in table
    parity.random_model(SMALL, 4).save_pretrained(tmp_path / "moved")
    assert verify.main(["--against", str(file), "--model", str(tmp_path / "moved")]) == 2
    assert "differ from the recorded weights" in capsys.readouterr().err


def test_verification_on_a_device(recorded, capsys):
    with strict_cupy.registered():
        assert verify.main(["--against", str(recorded), "--device", "cuda"]) == 0
    assert "float32, cuda; a stand-in" in capsys.readouterr().out


def rewritten(file, cases=None, **arrays):
    """Rewrite the reference with other arrays (None removes an array) or another list of cases."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    with safe_open(file, framework="numpy") as stored:
        held = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    held |= {name.replace("__", "/").replace("_", "."): array for name, array in arrays.items()}
    save_file({name: array for name, array in held.items() if array is not None}, file,
              {**metadata, verify.COMPARISONS: metadata[verify.COMPARISONS] if cases is None else cases})  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0__logits": None}, "0/logits"),
        ({"0__loss": np.zeros(3)}, "the reference's loss has shape (3,); this model's has ()"),
        ({"cases": "[{]"}, "its list of cases is damaged"),
        ({"cases": '[{"model": null}]'}, "its list of cases is damaged"),
    ],
)
def test_a_damaged_reference_is_reported_in_one_line(change, said, recorded, capsys):
    rewritten(recorded, **change)
    assert verify.main(["--against", str(recorded)]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to verify; pass --against, --preset or --gradients"),
        (["--against", "gpt2", "--preset", "nano"], "pass only one of them"),
        (["--preset", "nona"], "invalid choice: 'nona'"),
        (["--preset", "nano", "--json", "no/such/f.json"], "no/such/f.json: the folder no/such/ does not exist"),
        (["--preset", "nano", "--seed", "-1"], "--seed is -1; expected 0 or more"),
        (["--gradients", "--record", "file"], "--record needs --preset, or --against with a model"),
        (["--preset", "nano"], 'is not installed; use pip install -e ".[parity]"'),
        (["--against", "no/such/model"], "no/such/model: no such file or folder"),
    ],
)
def test_errors_print_one_line(options, said, monkeypatch, small_nano, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(verify.main(options))
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.removeprefix("python -m ").startswith("gpt2.verify: error: ")
    assert said in printed
    assert printed.count("\n") == 1


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_results_agree_with_pytorch(dtype, small_nano, monkeypatch, tmp_path, capsys):
    """Compares both forms of GELU with PyTorch, and then with a file that was recorded with PyTorch."""
    assert verify.main(["--preset", "nano", "--dtype", dtype]) == 0
    assert capsys.readouterr().out.count("everything agrees") == 2
    file = str(tmp_path / "reference.safetensors")
    assert verify.main(["--preset", "nano", "--dtype", dtype, "--record", file]) == 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert verify.main(["--against", file]) == 0
    assert " on torch " in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_the_wrong_form_of_gelu_is_detected(tmp_path, monkeypatch, capsys):
    """transformers reads the model from a folder. The two forms of GELU differ by less than 0.001."""
    parity.random_model(SMALL, 0).save_pretrained(tmp_path)
    assert verify.main(["--against", str(tmp_path)]) == 0
    capsys.readouterr()
    kernels = get_backend().kernels
    monkeypatch.setattr(kernels, "gelu_forward", kernels.gelu_exact_forward)
    assert verify.main(["--against", str(tmp_path)]) == 1
    assert "first difference: activation.h.0.mlp\n" in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_a_published_model_is_downloaded_by_name(tmp_path, monkeypatch, capsys):
    parity.random_model(SMALL, 0).save_pretrained(tmp_path)
    monkeypatch.setattr("gpt2.formats.hub.download", {"gpt2": tmp_path}.__getitem__)
    assert verify.main(["--against", "gpt2"]) == 0
    assert "\ngpt2: 16,440 parameters" in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_verification_with_a_context_of_one_token(tmp_path):
    parity.random_model(dataclasses.replace(SMALL, n_positions=1), 0).save_pretrained(tmp_path)
    assert verify.main(["--against", str(tmp_path)]) == 0


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
@pytest.mark.slow
@pytest.mark.parametrize("activation", verify.FORMS)
def test_a_model_of_the_published_size_agrees_with_pytorch(activation, capsys):
    assert verify.main(["--preset", "gpt2", "--activation", activation]) == 0
    assert "gpt2, random weights" in capsys.readouterr().out
