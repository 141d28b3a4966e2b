"""gpt2/evaluate.py: the evaluation command."""

import json
import math

import pytest

from gpt2 import GPT2, Tokenizer, evaluate
from gpt2.training.dataset import TokenDataset
from gpt2.training.evaluation import evaluate_data, evaluate_task
from gpt2.training.tasks import TASKS, load_items
from tests.gpt2.evaluation_data import make_folder
from tests.stand_ins import strict_cupy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("user"))


@pytest.fixture
def user(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_printed_and_json_figures(user, tmp_path, capsys):
    json_file = tmp_path / "figures.json"
    command = ["model", "--data", "text", "--hellaswag", "h.jsonl", "--lambada", "l.jsonl", "--json", str(json_file)]
    assert evaluate.main([*command, "--device", "cpu"]) == 0
    model, tokenizer = GPT2.from_pretrained("model"), Tokenizer.load("bytes")
    hellaswag, lambada = (
        evaluate_task(TASKS[name], model, tokenizer, load_items(TASKS[name], f"{name[0]}.jsonl"), 16) for name in TASKS
    )
    data = evaluate_data(model, tokenizer, TokenDataset.open("data/text", "val"), 16, 16)
    assert json.loads(json_file.read_text()) == {
        "model": "model",
        "parameters": model.n_parameters(),
        "data": {"path": "data/text", "split": "val", **data},
        "hellaswag": hellaswag,
        "lambada": lambada,
    }
    n, accuracy = hellaswag["items"], hellaswag["acc_norm"]
    assert (n, hellaswag["cut"]) == (7, 0)
    assert lambada["cut"] == 5  # every item exceeds the context: 17 bytes precede the last byte of its word
    first, of_data, of_hellaswag, of_lambada = capsys.readouterr().out.splitlines()
    assert first == (
        f"model: {model.n_parameters():,} parameters, float32 on cpu; "
        f"evaluating {data['tokens']:,} tokens, 7 items of hellaswag, 5 items of lambada ..."
    )
    assert of_data.startswith(f"data/text val: {data['tokens']:,} tokens in sequences of 16, loss {data['loss']:.4f} ")
    assert of_data.endswith(f"{data['bits_per_byte']:.4f} bits per byte")
    error = math.sqrt(accuracy * (1 - accuracy) / 7)
    assert of_hellaswag.startswith("hellaswag: acc ")
    assert f"acc_norm {accuracy:.4f} ± {error:.4f} (7 items)" in of_hellaswag
    assert f"perplexity {lambada['perplexity']:.4f} (5 items; 5 exceed the model's context" in of_lambada


def test_bfloat16_weights_are_compared_with_float32(user, tmp_path, capsys, monkeypatch):
    onednn = pytest.importorskip("tinygrad2.kernels.onednn")
    json_file = tmp_path / "figures.json"
    command = ["model", "--data", "text", "--batches", "3", "--hellaswag", "h.jsonl", "--lambada", "l.jsonl"]
    assert evaluate.main([*command, "--device", "cpu", "--json", str(json_file), "--dtype", "bfloat16"]) == 0
    again = json.loads(json_file.read_text())["bfloat16"]["data"]["loss"]
    capsys.readouterr()
    # Without oneDNN, which would also round activations in products with many rows.
    monkeypatch.setattr(onednn, "library", lambda: None)
    assert evaluate.main([*command, "--device", "cpu", "--json", str(json_file)]) == 0
    plain = json.loads(json_file.read_text())
    lines = capsys.readouterr().out.splitlines()
    assert evaluate.main([*command, "--device", "cpu", "--json", str(json_file), "--dtype", "bfloat16"]) == 0
    both = json.loads(json_file.read_text())
    narrow = both.pop("bfloat16")
    assert both == plain
    rounded, tokenizer = GPT2.from_pretrained("model"), Tokenizer.load("bytes")
    for p in rounded.parameters():
        if p.ndim == 2:
            p.data = p.data.astype("bfloat16").astype("float32")
    data = evaluate_data(rounded, tokenizer, TokenDataset.open("data/text", "val"), 16, 16, 3)
    assert narrow["data"]["loss"] == pytest.approx(data["loss"], rel=1e-7)
    assert narrow["loss_difference"] == narrow["data"]["loss"] - plain["data"]["loss"] != 0
    for name in TASKS:
        figures = evaluate_task(TASKS[name], rounded, tokenizer, load_items(TASKS[name], f"{name[0]}.jsonl"), 16)
        assert narrow[name] == pytest.approx(figures, rel=1e-6)
    assert narrow["lambada"] != plain["lambada"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[:4] == lines
    assert printed[4] == "with weights in bfloat16:"
    assert printed[5].startswith("data/text val: ")
    assert f"change the loss by {narrow['loss_difference']:+.6f} nats per token" in printed[-1]
    assert f"({plain['data']['loss']:.6f} before)" in printed[-1]
    assert len(printed) == 9
    assert again == pytest.approx(narrow["data"]["loss"], rel=1e-3)


def test_unsupported_bfloat16_weights_are_rejected_before_the_evaluation(user, capsys):
    with strict_cupy.registered():
        assert evaluate.main(["model", "--data", "text", "--device", "cuda", "--dtype", "bfloat16"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    reason = "bfloat16 needs the CUDA kernels, which TINYGRAD2_KERNELS=reference disables"
    assert printed.err == f"gpt2.evaluate: error: --dtype {reason}\n"


def test_options_limit_the_evaluation(user, tmp_path):
    json_file = tmp_path / "figures.json"
    command = [
        "model",
        "--data",
        "text",
        "--split",
        "train",
        "--batches",
        "2",
        "--batch-size",
        "3",
        "--block-size",
        "8",
    ]
    assert evaluate.main([*command, "--hellaswag", "h.jsonl", "--items", "3", "--json", str(json_file)]) == 0
    figures = json.loads(json_file.read_text())
    assert (figures["data"]["split"], figures["data"]["tokens"], figures["hellaswag"]["items"]) == ("train", 48, 3)


def test_a_batch_that_does_not_fit_is_reported(user, monkeypatch, capsys):
    def too_much(*_):
        raise MemoryError

    monkeypatch.setattr(GPT2, "loss", too_much)
    assert evaluate.main(["model", "--data", "text", "--batch-size", "9"]) == 1
    assert capsys.readouterr().err == "gpt2.evaluate: error: out of memory; use a --batch-size below 9\n"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 2, "required: CHECKPOINT"),
        (["model"], 2, "nothing to evaluate; pass --data NAME, --hellaswag, --lambada"),
        (["model", "--data", "text", "--batches", "0"], 2, "--batches is 0; expected 1 or more"),
        (["model", "--data", "text", "--json", "no/such/f.json"], 2, "the folder no/such/ does not exist"),
        (["model", "--dat", "text"], 2, "unknown option --dat; did you mean --data?"),
        (["nowhere", "--data", "text"], 1, "nowhere: no such file or folder"),
        (["model", "--data", "none"], 1, "data 'none': no such data set (data/ contains pairs, text)"),
        (["model", "--data", "pairs"], 1, "expected the model's"),
        (["model", "--data", "text", "--block-size", "17"], 1, "longer than the model's context of 16 tokens"),
        (["model", "--hellaswag", "l.jsonl"], 1, "l.jsonl: line 1 is not a question of hellaswag"),
        (["model", "--lambada", "none.jsonl"], 1, "none.jsonl"),
    ],
)
def test_errors_print_one_line(options, code, said, user, capsys):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(evaluate.main(options))
    assert stop.value.code == code
    printed = capsys.readouterr()
    assert printed.err.removeprefix("python -m ").startswith("gpt2.evaluate: error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1
