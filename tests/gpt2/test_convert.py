"""gpt2/convert.py: conversion between all formats of model files, with their tokenizers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, Tokenizer, convert
from gpt2.formats import model_file
from tests.gpt2.formats.models import assert_equal, random_model, values

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model():
    return random_model()


def test_round_trips_are_bit_identical(model, tmp_path):
    """The model is converted to each format, and from there to each format again."""
    model.save_pretrained(tmp_path / "start")
    for first in convert.FORMATS:
        convert.convert(tmp_path / "start", tmp_path / first, first)
        for second in convert.FORMATS:
            convert.convert(tmp_path / first, tmp_path / f"{first}-{second}", second)
            assert_equal(model, GPT2.from_pretrained(tmp_path / f"{first}-{second}"))
    for form in ("pt", "llmc"):
        first, again = tmp_path / form, tmp_path / f"hf-{form}"
        assert first.read_bytes() == again.read_bytes()
    name = "model.safetensors"
    for folder in ("hf", "pt-hf", "llmc-hf", "hf-hf"):
        assert (tmp_path / folder / name).read_bytes() == (tmp_path / "start" / name).read_bytes()


def test_a_pytorch_file_preserves_the_config(tmp_path):
    model = random_model(activation_function="gelu", layer_norm_epsilon=1e-6, attn_pdrop=0.3, initializer_range=0.1)
    model.save_pretrained(tmp_path / "start")
    convert.convert(tmp_path / "start", tmp_path / "model.pt", "pt")
    assert_equal(model, GPT2.from_pretrained(tmp_path / "model.pt"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["hf", "pt"])
def test_weights_are_rounded_to_two_byte_dtypes(dtype, form, model, tmp_path):
    model.save_pretrained(tmp_path / "start")
    convert.convert(tmp_path / "start", tmp_path / "half", form, dtype)
    found = values(GPT2.from_pretrained(tmp_path / "half"))
    for name, array in values(model).items():
        assert np.array_equal(found[name], array.astype(dtype).astype("float32"))
    if form == "hf":
        assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype


def run(*arguments, code=0):
    assert convert.main([str(argument) for argument in arguments]) == code


def test_the_command_line(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "a")
    run(tmp_path / "a", tmp_path / "b.pt", "--to", "pt")
    written, command = capsys.readouterr().out.splitlines()
    assert written == f"{tmp_path / 'b.pt'}: written from {tmp_path / 'a'}"
    assert command == f"next: python sample.py --checkpoint {tmp_path / 'b.pt'}"
    run(tmp_path / "b.pt", tmp_path / "c", "--to", "hf", "--activation", "gelu", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (config["activation_function"], config["torch_dtype"]) == ("gelu", "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.pt", "c"]


def test_errors_are_one_line_and_leave_no_file(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "there.pt").write_text("mine")
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    exact = random_model(activation_function="gelu")
    exact.save_pretrained(tmp_path / "exact")
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ([tmp_path / "a", tmp_path / "there.pt", "--to", "pt"], "there.pt: already exists"),
        ([tmp_path / "x.pt", tmp_path / "y", "--to", "hf"], "x.pt: it is not a torch.save file"),
        ([tmp_path / "nowhere", tmp_path / "y", "--to", "hf"], "nowhere: no such file or folder"),
        ([tmp_path / "exact", tmp_path / "y", "--to", "llmc"], "llm.c supports only GELU's tanh form"),
        ([tmp_path / "a", tmp_path / "y", "--to", "llmc", "--dtype", "float16"], "llm.c does not support float16"),
        ([tmp_path / "a", tmp_path / "no" / "y", "--to", "pt"], "the folder"),
    ):
        run(*arguments, code=1)
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith("gpt2.convert: error: ")
        assert message in line
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_a_failed_conversion_leaves_no_file(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "a")
    for form in convert.FORMATS:
        reads = iter(range(5))
        read = model_file.ModelFile.read

        def failing(self, name, read=read, reads=reads):
            if next(reads, None) is None:
                raise OSError("the disk is gone")
            return read(self, name)

        monkeypatch.setattr(model_file.ModelFile, "read", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            convert.convert(tmp_path / "a", tmp_path / "b", form)
        monkeypatch.setattr(model_file.ModelFile, "read", read)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_conversion_does_not_need_torch(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from gpt2.convert import main\n"
        "sys.exit(main(['a', 'b', '--to', 'pt']) or main(['b', 'c', '--to', 'llmc']) or main(['c', 'd', '--to', 'hf']))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, check=True)
    assert_equal(model, GPT2.from_pretrained(tmp_path / "d"))


# The tokenizer


def test_a_converted_folder_contains_the_tokenizer(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", "hf")
    assert Tokenizer.for_model(tmp_path / "b", 257).fingerprint == Tokenizer.load("bytes").fingerprint
    ids = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 256, "eos_token_id": 256}


def test_a_model_without_a_tokenizer_is_converted_without_one(tmp_path, capsys):
    random_model(vocab_size=99).save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", "hf")
    assert "no tokenizer is known for a vocabulary of 99" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


# PyTorch and transformers


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_transformers_computes_the_same_with_an_exported_folder(tmp_path, gpt2_files):
    """After conversion through both other formats, logits, greedy text and token ids are equal."""
    import torch
    import transformers

    model = random_model(vocab_size=50257, n_positions=48, n_embd=16, n_head=4)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.4
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "a.pt", "pt")
    convert.convert(tmp_path / "a.pt", tmp_path / "a.bin", "llmc")
    convert.convert(tmp_path / "a.bin", tmp_path / "c", "hf")
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.generation_config.eos_token_id == 50256
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    ours = Tokenizer.for_model(tmp_path / "c", 50257)
    text = "It's 3 o'clock,  naïve 🙂 Ünïcode\n\n\tand so on "
    assert words.encode(text) == ours.encode(text).tolist()
    prompt = words("The meaning of", return_tensors="pt")
    with torch.no_grad():
        logits = theirs.eval()(prompt["input_ids"]).logits.numpy()
    mine = GPT2.from_pretrained(tmp_path / "c")
    assert np.abs(mine(prompt["input_ids"].numpy()).numpy() - logits).max() <= 1e-5 * np.abs(logits).max()
    new = 40
    generated = theirs.generate(**prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    expected = generated[0, prompt["input_ids"].shape[1] :].tolist()
    assert len(set(expected)) > 1
    assert mine.generate(prompt["input_ids"][0].tolist(), new, temperature=0) == [expected]


# BOS and EOS ids


def write_ids(folder, config, generation):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))


def ids_of(folder):
    """The ids in config.json, and the contents of generation_config.json."""
    config = json.loads((folder / "config.json").read_text())
    file = folder / "generation_config.json"
    return {name: config[name] for name in ("bos_token_id", "eos_token_id")}, json.loads(file.read_text())


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"bos_token_id": 7, "eos_token_id": 9}, {"eos_token_id": [9, 11], "bos_token_id": 7, "top_k": 40}),
        ({"bos_token_id": 0, "eos_token_id": [0, 5]}, None),
        ({"bos_token_id": 256, "eos_token_id": 256}, {"_from_model_config": True, "eos_token_id": 3}),
    ],
)
def test_ids_are_preserved(config, generation, model, tmp_path):
    """save_pretrained and convert keep the ids, in every format that can store them."""
    model.save_pretrained(tmp_path / "a")
    write_ids(tmp_path / "a", config, generation)
    expected = config, generation or config
    GPT2.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "generation_config.json").exists() == (generation is not None)
    for source in ("a", "b"):
        convert.convert(tmp_path / source, tmp_path / f"{source}-hf", "hf")
        convert.convert(tmp_path / source, tmp_path / f"{source}.pt", "pt")
        convert.convert(tmp_path / f"{source}.pt", tmp_path / f"{source}-pt-hf", "hf")
        assert ids_of(tmp_path / f"{source}-hf") == ids_of(tmp_path / f"{source}-pt-hf") == expected


def test_a_model_without_ids_gets_those_of_its_tokenizer(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    for name in ("bos_token_id", "eos_token_id"):
        assert json.loads((tmp_path / "a" / "config.json").read_text())[name] is None
    convert.convert(tmp_path / "a", tmp_path / "b", "hf")
    assert ids_of(tmp_path / "b") == ({"bos_token_id": 256, "eos_token_id": 256},) * 2


def test_the_files_of_a_tokenizer_are_copied(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    Tokenizer.load("bytes").save_hugging_face(tmp_path / "a", 16)
    for old, new in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (tmp_path / "a" / old).rename(tmp_path / "a" / new)
    (tmp_path / "a" / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    convert.convert(tmp_path / "a", tmp_path / "b", "hf")
    names = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
    for name in (
        "encoder.json",
        "vocab.bpe",
        "special_tokens_map.json",
        "chat_template.jinja",
        "tokenizer_config.json",
    ):
        assert (tmp_path / "b" / names.get(name, name)).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_note_reports_that_nanogpt_uses_exact_gelu(model, tmp_path, capsys):
    for activation, said in (("gelu_new", True), ("gelu", False)):
        random_model(activation_function=activation).save_pretrained(tmp_path / activation)
        run(tmp_path / activation, tmp_path / f"{activation}.pt", "--to", "pt")
        assert ("nanoGPT computes exact GELU" in capsys.readouterr().err) == said
    x = np.linspace(-8, 8, 100_001)
    exact = x * np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert 4e-4 < np.abs(exact - tanh).max() < 5e-4
