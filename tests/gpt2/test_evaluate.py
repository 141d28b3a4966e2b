"""gpt2/evaluate.py: losses and bits per byte by hand, sums over parts, and the command."""

import base64
import json
import math

import numpy as np
import pytest

from data.prepare import prepare
from gpt2 import GPT2, GPT2Config, Tokenizer, evaluate
from gpt2.training.dataset import TokenDataset
from gpt2.training.evaluation import evaluate_data, evaluate_task, mean_loss, summed_loss
from gpt2.training.tasks import TASKS, load_items
from tests.stand_ins import strict_cupy
from tinygrad2 import no_grad
from tinygrad2.distributed import SoloComm

TEXT = "".join(f"{i} times {j} is {i * j}; ab, abba and a cab.\n\n" for i in range(30) for j in range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, data sets of two tokenizers, and files of both tasks."""
    folder = tmp_path_factory.mktemp("user")
    lines = (json.dumps({"text": text}) + "\n" for text in TEXT.split("\n\n"))
    (folder / "text.jsonl").write_text("".join(lines))
    prepare([str(folder / "text.jsonl")], "bytes", folder / "data" / "text", val_fraction=0.3)
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab"]
    lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    (folder / "ab.tiktoken").write_text("".join(lines))
    prepare([str(folder / "text.jsonl")], str(folder / "ab.tiktoken"), folder / "data" / "pairs", val_fraction=0.3)
    make_model(257).save_pretrained(folder / "model")
    Tokenizer.load("bytes").save(folder / "model")
    items = [{"ctx": f"{i} times", "endings": ["2", f"{i} is", "ab", "a"], "label": i % 4} for i in range(7)]
    (folder / "h.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "l.jsonl").write_text("".join(json.dumps({"text": f"ab, abba and {i} cabs"}) + "\n" for i in range(5)))
    return folder


@pytest.fixture
def user(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def make_model(vocab_size, seed: int | None = 1):
    return GPT2(GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=16, n_layer=1, n_head=2), seed=seed)


def test_mean_loss_counts_every_window_alike(folder):
    model, data = make_model(257), TokenDataset.open(folder / "data" / "text", "val")
    with no_grad():
        losses = [model.loss(*data.batch([i], 16)).item() for i in range(7)]
    assert max(losses) > min(losses) + 0.01
    assert mean_loss(model, data, 2, 16, 3) == pytest.approx(np.mean(losses[:6]), rel=1e-6)
    windows = data.windows(16)
    assert windows % 5 != 0  # the last batch is not full
    whole = mean_loss(model, data, 5, 16, 10**6)
    assert whole == pytest.approx(mean_loss(model, data, 1, 16, windows), rel=1e-6)
    parts = [summed_loss(model, data, range(windows)[part::3], 4, 16) for part in range(3)]
    assert sum(parts) / (windows * 16) == pytest.approx(whole, rel=1e-6)


class Both(SoloComm):
    """Two ranks, one after the other: what the first one gathers, the second one adds its own to."""

    size = 2

    def __init__(self):
        self.gathered = []

    def all_gather(self, array):
        self.gathered.append(array)
        return np.stack(self.gathered)


def test_ranks_share_an_evaluation(user):
    model, tokenizer = make_model(257), Tokenizer.load("bytes")
    data, whole, parts = TokenDataset.open(user / "data" / "text", "val"), Both(), Both()
    for rank in range(2):
        whole.rank = parts.rank = rank
        loss = mean_loss(model, data, 2, 16, 5, whole)
        task = evaluate_task(TASKS["hellaswag"], model, tokenizer, load_items(TASKS["hellaswag"], "h.jsonl"), 4, parts)
    assert loss == pytest.approx(mean_loss(model, data, 2, 16, 5), rel=1e-6)
    alone = evaluate_task(TASKS["hellaswag"], model, tokenizer, load_items(TASKS["hellaswag"], "h.jsonl"), 4)
    assert task == pytest.approx(alone, rel=1e-6)
    assert [array[0] for array in parts.gathered] == [4, 3]  # of the seven items


@pytest.mark.parametrize("name", ["text", "pairs"])
def test_bits_per_byte_by_hand(name, folder):
    """Where every token is as likely, a token costs log2(V) bits; its bytes are those of the text."""
    data = TokenDataset.open(folder / "data" / name, "val")
    tokenizer = Tokenizer.load(folder / "data" / name)
    V = tokenizer.vocab_size
    ids = data.read(1, data.windows(16) * 16)
    text = tokenizer.decode_bytes(ids[ids != tokenizer.end_of_text])
    assert {tokenizer.end_of_text, 256} <= set(ids.tolist())
    figures = evaluate_data(make_model(V, seed=None), tokenizer, data, 8, 16)
    assert figures == {
        "loss": pytest.approx(math.log(V), rel=1e-6),
        "perplexity": pytest.approx(V, rel=1e-5),
        "bits_per_byte": pytest.approx(math.log2(V) * len(ids) / len(text), rel=1e-6),
        "tokens": len(ids),
        "bytes": len(text),
        "block_size": 16,
    }


def test_the_first_batches_only(folder):
    data, tokenizer = TokenDataset.open(folder / "data" / "text", "val"), Tokenizer.load("bytes")
    model = make_model(257)
    figures = evaluate_data(model, tokenizer, data, 3, 8, batches=2)
    assert figures["tokens"] == 2 * 3 * 8
    assert figures["loss"] == pytest.approx(mean_loss(model, data, 3, 8, 2), rel=1e-6)


def test_data_of_another_tokenizer_is_refused(folder):
    with pytest.raises(ValueError, match=r"pairs: it was made with the tokenizer ab; expected the model's, bytes"):
        evaluate_data(
            make_model(257), Tokenizer.load("bytes"), TokenDataset.open(folder / "data" / "pairs", "val"), 2, 8
        )


def test_shards_of_another_program_are_of_gpt2s_tokenizer(gpt2_files, tmp_path):
    gpt2 = Tokenizer.load("gpt2")
    gpt2.encode(TEXT).astype("<u2").tofile(tmp_path / "val.bin")
    data = TokenDataset.open(tmp_path, "val")
    figures = evaluate_data(make_model(50257), gpt2, data, 2, 8, batches=3)
    assert figures["bytes"] == len(gpt2.decode_bytes(data.read(1, 48)))
    with pytest.raises(ValueError, match=r"with the tokenizer gpt2; expected the model's, bytes"):
        evaluate_data(make_model(257), Tokenizer.load("bytes"), data, 2, 8)


def test_a_damaged_model_is_said(folder):
    model = make_model(257)
    model.wte.weight.data = np.full(model.wte.weight.shape, np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="the model's loss is nan"):
        evaluate_data(model, Tokenizer.load("bytes"), TokenDataset.open(folder / "data" / "text", "val"), 2, 8, 1)


def test_command_line(user, tmp_path, capsys):
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
    assert lambada["cut"] == 5  # 17 bytes are read before the word's last
    first, of_data, of_hellaswag, of_lambada = capsys.readouterr().out.splitlines()
    assert first == f"model: {model.n_parameters():,} parameters, float32 on cpu"
    assert of_data.startswith(f"data/text val: {data['tokens']:,} tokens in sequences of 16, loss {data['loss']:.4f} ")
    assert of_data.endswith(f"{data['bits_per_byte']:.4f} bits a byte")
    error = math.sqrt(accuracy * (1 - accuracy) / 7)
    assert of_hellaswag.startswith("hellaswag: acc ")
    assert f"acc_norm {accuracy:.4f} ± {error:.4f} (7 items)" in of_hellaswag
    assert f"perplexity {lambada['perplexity']:.4f} (5 items; 5 exceed the model's context" in of_lambada


def test_what_weights_in_bfloat16_cost(user, tmp_path, capsys):
    json_file = tmp_path / "figures.json"
    command = ["model", "--data", "text", "--batches", "3", "--hellaswag", "h.jsonl", "--lambada", "l.jsonl"]
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
    assert printed[4] == "the same with weights in bfloat16:"
    assert printed[5].startswith("data/text val: ")
    assert f"change the loss by {narrow['loss_difference']:+.6f} nats a token" in printed[-1]
    assert f"({plain['data']['loss']:.6f} before)" in printed[-1]
    assert len(printed) == 9


def test_weights_in_bfloat16_are_refused_on_a_device_before_anything_is_measured(user, capsys):
    with strict_cupy.registered():
        assert evaluate.main(["model", "--data", "text", "--device", "cuda", "--dtype", "bfloat16"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    reason = "bfloat16 needs the CUDA kernels, which TINYGRAD2_KERNELS=reference leaves out"
    assert printed.err == f"gpt2.evaluate: --dtype {reason}\n"


def test_limits(user, tmp_path):
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


def test_too_large_a_batch_is_said(user, monkeypatch, capsys):
    def too_much(*_):
        raise MemoryError

    monkeypatch.setattr(GPT2, "loss", too_much)
    assert evaluate.main(["model", "--data", "text", "--batch-size", "9"]) == 1
    assert capsys.readouterr().err == "gpt2.evaluate: out of memory; use a smaller --batch-size than 9\n"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], 2, "required: CHECKPOINT"),
        (["model"], 2, "nothing to evaluate: give --data NAME, --hellaswag, --lambada"),
        (["model", "--data", "text", "--batches", "0"], 2, "--batches is 0; expected 1 or more"),
        (["model", "--data", "text", "--json", "no/such/f.json"], 2, "there is no folder no/such/"),
        (["model", "--dat", "text"], 2, "unknown option --dat; did you mean --data?"),
        (["nowhere", "--data", "text"], 1, "nowhere: no such file or folder"),
        (["model", "--data", "none"], 1, "data 'none': no such data set (data/ has pairs, text)"),
        (["model", "--data", "pairs"], 1, "expected the model's"),
        (["model", "--data", "text", "--block-size", "17"], 1, "longer than the model's context of 16 tokens"),
        (["model", "--hellaswag", "l.jsonl"], 1, "l.jsonl: line 1 is not a question of hellaswag"),
        (["model", "--lambada", "none.jsonl"], 1, "none.jsonl"),
    ],
)
def test_mistakes_are_one_line(options, code, said, user, capsys):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(evaluate.main(options))
    assert stop.value.code == code
    printed = capsys.readouterr()
    assert printed.err.removeprefix("python -m ").startswith("gpt2.evaluate: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1
