"""The command gpt2.inspect: its output, its page, and invalid input."""

import itertools
import math
import re

import pytest

from gpt2 import GPT2Config, Tokenizer, inspect
from gpt2.generate import generate
from tests.browsing import HOSTILE
from tests.gpt2.inspected import CONFIG, TEXT, data_of, make_model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("bytes")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def run(capsys, *arguments):
    """Run the command. Returns (status, lines on stdout, lines on stderr)."""
    status = inspect.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err.splitlines()


def test_a_summary_and_the_path_of_the_page_are_printed(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    status, lines, errors = run(capsys, "-p", TEXT, "--checkpoint", folder, "--out", out)
    assert (status, errors) == (0, [])
    assert lines[0] == f"model: {folder}, {CONFIG.summary()}, {make_model().n_parameters():,} parameters"
    assert re.fullmatch(r"19 tokens, \d+\.\d{3} bits per byte", lines[1])
    assert re.fullmatch(r"most surprising .*; (expected|it was the first choice, before) '.*%", lines[2])
    assert lines[3].startswith("heads by what they look at: ")
    assert lines[4] == f"page: {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser"
    data = data_of(out)
    assert (data["text"], data["prompt"]) == (TEXT, len(TEXT))


def test_generated_tokens_equal_those_of_generate(folder, model, tokenizer, tmp_path, capsys):
    out = tmp_path / "page.html"
    arguments = ("--checkpoint", folder, "--out", out, "--seed", 3, "-t", 0.5)
    assert run(capsys, "-p", "ab", "-m", 12, *arguments)[0] == 0
    expected = [int(token[0]) for token in generate(model, [97, 98], 12, temperature=0.5, seed=3)]
    data = data_of(out)
    assert data["tokens"] == [97, 98, *itertools.takewhile(lambda token: token != 256, expected)]
    assert data["prompt"] == 2


@pytest.mark.parametrize("prompt", [(), ("-p", "")])
def test_the_model_generates_a_text_if_there_is_no_prompt(folder, tmp_path, capsys, prompt):
    status, _, errors = run(capsys, *prompt, "--checkpoint", folder, "--out", tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert (status, data["prompt"]) == (0, 0)
    assert errors == ["no prompt given; the model generates 100 tokens"]
    assert 1 <= len(data["tokens"]) <= 100


@pytest.mark.parametrize("text", ["a", "ab", "\n", "\x00", "é", "a" * 128, "a" * 129])
def test_pages_of_short_and_unusual_texts(folder, tmp_path, capsys, text):
    status, lines, errors = run(capsys, "-p", text, "--checkpoint", folder, "--out", tmp_path / "page.html")
    assert (status, errors) == (0, [])
    assert lines[1].startswith(f"{len(text.encode())} token")
    assert data_of(tmp_path / "page.html")["attention"]["exact"] == (len(text.encode()) <= 128)


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, HOSTILE * 1000])
def test_the_page_of_an_overlong_text_shows_its_end(folder, tmp_path, capsys, text):
    status, _, errors = run(capsys, "-p", text, "--checkpoint", folder, "--out", tmp_path / "page.html")
    assert status == 0
    assert errors == [f"the text has {len(text):,} tokens; the page shows the last 160, the model's context"]
    data = data_of(tmp_path / "page.html")
    assert bytes(data["tokens"]) == text[-160:].encode()
    assert data["notes"] == [f"The text has {len(text):,} tokens; these are the last 160, the model's context."]
    assert not data["attention"]["exact"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-p", "a", "--checkpoint", "nowhere"], 1, "nowhere: no such file or folder"),
        (["-p", "a", "--checkpoint", "llama"], 1, "model_type"),
        (["-p", "a", "--checkpoint", "text.txt"], 1, "text.txt"),
        (["-p", "a", "--checkpoint", ""], 2, "--checkpoint is empty"),
        (["-p", "", "-m", "0"], 2, "--prompt is empty and --max-tokens is 0"),
        (["-p", "a", "-m", "-1"], 2, "--max-tokens is -1; expected 0 or more"),
        (["-p", "a", "--threads", "0"], 2, "--threads is 0"),
        (["-p", "a", "--seed", "-1"], 2, "--seed is -1"),
        (["-p", "a", "-t", "-1"], 2, "--temperature is -1.0"),
        (["-p", "a", "--out", "no/page.html"], 2, "the folder no/ does not exist"),
        (["-p", "a", "--out", "."], 2, "--out . is a folder"),
        (["-p", "a"], 1, "no trained model in checkpoint/ or out/"),
    ],
)
def test_errors_print_one_line(tmp_path, capsys, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no model at all")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    try:
        found = inspect.main(arguments)
    except SystemExit as end:
        found = end.code
    said = capsys.readouterr()
    assert (found, said.out) == (status, "")
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("gpt2.inspect: error: ")
    assert message in said.err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("h.1.mlp.c_fc.weight", math.nan, r"parameter h.1.mlp.c_fc.weight \[0, 5\] is nan \(1 of 2,304 values\)"),
        ("wte.weight", math.inf, r"parameter wte.weight \[0, 5\] is inf \(1 of 6,168 values\)"),
        ("ln_f.weight", 3e38, r"parameter ln_f.weight \[5\] is 3e\+38 \(19 of 24 values\)"),
    ],
)
def test_damaged_weights_are_reported(tmp_path, capsys, name, value, message):
    model = make_model()
    parameter = dict(model.named_parameters())[name]
    values = parameter.numpy().copy()
    values.flat[5:] = value if math.isfinite(value) else values.flat[5:]
    values.flat[5] = value
    parameter.data = values
    model.save_pretrained(tmp_path)
    status, _, errors = run(capsys, "-p", "ab", "--checkpoint", tmp_path, "--out", tmp_path / "page.html")
    assert status == 1
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_the_page_of_1024_tokens_with_12_layers_and_heads_is_smaller_than_8_mb(gpt2_files, tmp_path, capsys):
    config = GPT2Config(n_layer=12, n_head=12, n_embd=48, n_positions=1024, vocab_size=50257)
    make_model(config).save_pretrained(tmp_path)
    text = " ".join(str(i * i) for i in range(1000))
    assert run(capsys, "-p", text, "--checkpoint", tmp_path, "--out", tmp_path / "page.html")[0] == 0
    assert len(data_of(tmp_path / "page.html")["tokens"]) == 1024
    assert (tmp_path / "page.html").stat().st_size < 8e6
