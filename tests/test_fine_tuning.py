"""A transformers model with added tokens and its own end token is fine-tuned, sampled, and exported."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

import sample
import train
from data import prepare
from gpt2 import Tokenizer, convert
from gpt2.training.run import read_log
from tests.training_runs import ROOT

SENTENCES = [
    f"{one} {two} {three} {four}."
    for one, two, three, four in itertools.product(
        ("the", "a"),
        ("red", "small", "old"),
        ("house", "bird", "river", "bridge"),
        ("sings", "stands by the road", "fell"),
    )
]
LONGER = ["--batch-size", "8", "--block-size", "32", "--max-iters", "250", "--learning-rate", "1e-2", "--threads", "1"]
QUICK = ["--batch-size", "8", "--block-size", "32", "--eval-iters", "2", "--warmup-iters", "5", "--log-interval", "40"]


def make_folder(folder):
    """Save a tokenizer trained on SENTENCES, and a model; see save_model. Returns the id of the end token."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder.mkdir()
    tokenizer.model.save(str(folder))
    return save_model(transformers.GPT2Tokenizer.from_pretrained(folder), folder)


def save_model(tokenizer, folder):
    """Save the tokenizer with two added tokens, and a new two-layer model. Returns the id of the end token."""
    import transformers

    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"], "eos_token": "<|end|>"})
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=end, bos_token_id=end
    )
    transformers.set_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return end


@pytest.mark.slow
@pytest.mark.extras("torch", "transformers", "tokenizers")
def test_a_transformers_model_learns_to_stop_at_its_own_end_token(tmp_path, monkeypatch, capsys):
    import transformers

    monkeypatch.chdir(tmp_path)
    end = make_folder(tmp_path / "hf")
    lines = [json.dumps({"text": f"<|user|>{sentence}"}) for sentence in SENTENCES * 3]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    assert prepare.main(["own.jsonl", "--tokenizer", "hf", "--special-tokens", "--val-fraction", "0.2"]) == 0
    tokens = Tokenizer.load("hf")
    assert tokens.end_ids == (end,)

    run = ["--init", "hf", "--data", "own", "--out-dir", "out", *QUICK]
    assert train.main([*run, "--max-iters", "120", "--learning-rate", "5e-3", "--eval-interval", "60"]) == 0
    losses = [row["val_loss"] for row in read_log(tmp_path / "out" / "log.jsonl") if "val_loss" in row]
    assert losses[-1] < 1 < 5 < read_log(tmp_path / "out" / "log.jsonl")[0]["loss"]
    assert convert.main(["out", "back", "--to", "hf"]) == 0

    for name in ("generation_config.json", "config.json"):
        ours, theirs = (json.loads((tmp_path / folder / name).read_text()) for folder in ("back", "hf"))
        assert (
            (ours["bos_token_id"], ours["eos_token_id"])
            == (theirs["bos_token_id"], theirs["eos_token_id"])
            == (end, end)
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained("back")
    model = transformers.GPT2LMHeadModel.from_pretrained("back").eval()
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == end
    for prompt in ("<|user|>the red", "<|user|>a", "<|user|>the old river"):
        inputs = tokenizer(prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == tokens.encode_prompt(prompt).tolist()
        generated = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=end)[0].tolist()
        assert generated[-1] == end
        for folder in ("out", "back"):
            capsys.readouterr()
            assert sample.main(["--checkpoint", folder, "-p", prompt, "-t", "0", "-m", "40"]) == 0
            assert capsys.readouterr().out == tokenizer.decode(generated[:-1]) + "\n"


# The commands, as a new user runs them

ENGLISH = itertools.product(
    ("A", "The", "Every", "One"),
    ("red", "small", "old", "quiet", "wooden", "narrow"),
    ("house", "bridge", "river", "garden", "boat", "village"),
    ("lies", "stands", "begins", "ends"),
    ("by the sea.", "near the road.", "behind the hills.", "between two trees.", "beyond the forest."),
)
GERMAN = itertools.product(
    ("Ein Haus", "Mein Garten", "Kein Weg", "Dieser Fluss", "Unser Dorf"),
    ("liegt", "steht", "beginnt", "endet", "bleibt"),
    ("heute", "morgen", "früh", "spät", "plötzlich", "natürlich"),
    ("am Meer", "hinter den Hügeln", "über der Brücke", "zwischen zwei Bäumen", "neben der Straße"),
    ("und wird größer.", "und wird schöner.", "und gehört niemandem."),
)


def run(*command, folder):
    """Run a command of the repository. Returns its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.extras("torch", "transformers", "tokenizers")
def test_own_text_in_two_languages_is_learned_and_exported_to_transformers(tmp_path, gpt2_files):
    """Fine-tune a two-layer Hugging Face model with added tokens on 300 KB of text, using only the commands."""
    import transformers

    texts = [" ".join(words) for words in (*ENGLISH, *GERMAN)]
    lines = [json.dumps({"text": f"<|user|>{text}"}, ensure_ascii=False) for text in texts * 2]
    (tmp_path / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert (tmp_path / "own.jsonl").stat().st_size > 300_000
    Tokenizer.load("gpt2").save_hugging_face(tmp_path, 64)
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    end = save_model(tokenizer, tmp_path / "hf")
    assert end == 50257

    prepare_command = (ROOT / "data" / "prepare.py", "own.jsonl", "--tokenizer", "hf", "--special-tokens")
    assert "next: python" in run(*prepare_command, folder=tmp_path)
    output = run(ROOT / "train.py", "--init", "hf", "--data", "own", "--out-dir", "out", *LONGER, folder=tmp_path)
    first = float(re.search(r"step 0: validation loss ([\d.]+), before training", output)[1])
    best = float(re.search(r"best validation loss ([\d.]+)", output)[1])
    assert best < 1 < 9 < first
    run("-m", "gpt2.convert", "out", "back", "--to", "hf", folder=tmp_path)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval()
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == end
    for prompt in ("<|user|>The red", "<|user|>Unser Dorf bleibt"):
        inputs = tokenizer(prompt, return_tensors="pt")
        generated = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=end)[0].tolist()
        assert generated[-1] == end
        greedy = ("-p", prompt, "-t", "0", "-m", "40")
        for folder in ("out", "back"):
            found = run(ROOT / "sample.py", "--checkpoint", folder, *greedy, folder=tmp_path)
            assert found == tokenizer.decode(generated[:-1]) + "\n"
