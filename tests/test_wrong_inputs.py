"""Wrong inputs to every command: one line, which names what came and what to do, and no traceback."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer, familiar_options
from tests.training_runs import ROOT

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 548118077\n"

WRONG = [  # command, arguments, what the line says
    # Options of other programs, and misspelt ones.
    ("train", "--n-layers 6", "unknown option --n-layers; did you mean --n-layer?"),
    ("train", "--init_from=gpt2", "unknown option --init-from=gpt2; use --init MODEL to fine-tune"),
    ("train", "--eval_only=True", "use python -m gpt2.evaluate MODEL --data NAME"),
    ("train", "--gradient_accumulation_steps=8", "use --total-batch-size TOKENS: micro-steps x --batch-size"),
    ("train", "--compile=False", "unknown option --compile=False; leave it out: the kernels are always compiled"),
    ("train", "--wandb_log=True", "read the report.html and log.jsonl that every run writes"),
    ("train", "--wandb-projekt=x", "read the report.html and log.jsonl"),
    ("train", "--dataset=shakespeare_char", "use --data NAME"),
    ("train", "--no-bias", "unknown option --no-bias; leave it out: GPT-2 has biases"),
    ("train", "--num-train-epochs 3", "use --max-iters STEPS: epochs x training tokens / tokens per step"),
    ("train", "--lr 3e-4", "unknown option --lr; use --learning-rate X"),
    ("train", "--config gradient.toml", "gradient.toml: unknown option gradient_accumulation_steps; use --total-batch"),
    ("train", "config/train_gpt2.py", "unexpected argument 'config/train_gpt2.py'"),
    ("sample", "--start hello", "unknown option --start; use -p TEXT (--prompt), or --prompt-file FILE"),
    ("sample", "--num_samples=3", "unknown option --num-samples=3; use -n N (--samples)"),
    ("sample", "--max_new_tokens 20", "use -m N (--max-tokens)"),
    ("sample", "--temprature 1", "unknown option --temprature; did you mean --temperature?"),
    ("data.prepare", "a.txt --val-split 0.1", "unknown option --val-split; use --val-fraction X"),
    # Values out of range, and options that contradict each other.
    ("train", "--n-layer 0", "--n-layer is 0; expected more than 0 and less than 2**31"),
    ("train", "--data text --n-embd 100 --n-head 8", "--n-embd 100 is not a multiple of --n-head 8; the nearest"),
    ("train", "--batch-size 2.5", "--batch-size: invalid int value: '2.5'"),
    ("train", "--early-stop -1", "--early-stop is -1; expected 0 or more"),
    ("train", "--init model --n-head 2 --data text", "--init determines the sizes of the model; remove --n-head"),
    ("train", "--preset gpt2 --data text --block-size 64", "the tokenizer bytes (257 tokens); expected that of the"),
    ("sample", "-t -1", "--temperature is -1.0; expected 0 (greedy) or more"),
    ("sample", "-p a --prompt-file a.txt", "--prompt and --prompt-file are both given; expected one of them"),
    ("sample", "-i -p -", "--interactive and a prompt from stdin (-) exclude each other; use --prompt-file FILE"),
    ("data.prepare", "a.txt --val-fraction 5", "--val-fraction is 5.0; expected 0 < fraction < 1"),
    ("data.prepare", "a.txt --encoding utf8mb4", "--encoding utf8mb4: unknown; expected a name that Python knows"),
    ("data.prepare", "a.csv --delimiter comma", "--delimiter is 'comma'; expected one character, or tab"),
    # Files that are missing, damaged, or of another kind.
    ("train", "--data nowhere", "data 'nowhere': no such data set (data/ contains text); make one with"),
    ("train", "--data text --init nowhere", "nowhere: no such file or folder; expected a model"),
    ("train", "--config nowhere.toml", "nowhere.toml: No such file or directory"),
    ("sample", "--checkpoint a.txt", "a.txt: "),
    ("sample", "--checkpoint lfs", "git lfs pull"),
    ("sample", "--checkpoint model --prompt-file latin.txt", "latin.txt: byte 2 is not UTF-8 (0xef); convert"),
    ("sample", "--checkpoint model --prompt-file nowhere.txt", "nowhere.txt: No such file or directory"),
    ("data.prepare", "latin.txt", "latin.txt: byte 2 is not UTF-8 (0xef); name the --encoding, such as cp1252"),
    ("data.prepare", "nowhere.txt", "nowhere.txt: no such file or folder; expected a path"),
    ("data.prepare", "a.csv", "a.csv: no column 'text' (--text-column); the columns are 'id', 'body'"),
    ("data.prepare", "picture.png", "picture.png: not text; expected text in UTF-8"),
    ("data.prepare", "a.txt --tokenizer gpt5", "tokenizer 'gpt5' is unknown; choose bytes, gpt2"),
    ("gpt2.convert", "model model --to hf", "model"),
    ("gpt2.convert", "nowhere new --to hf", "nowhere: no such file or folder"),
    ("gpt2.convert", "model new --to onnx", "invalid choice: 'onnx'"),
    ("gpt2.evaluate", "model", "--data"),
    ("gpt2.evaluate", "model --data nowhere", "data 'nowhere': no such data set"),
    ("gpt2.report", "nowhere", "nowhere: no log.jsonl in this folder; expected the out-dir of a run"),
    ("gpt2.verify", "--preset gpt9", "gpt9"),
    ("gpt2.plan", "--device h20", "--device is h20; expected auto, cpu, cuda"),
    ("gpt2.doctor", "now", "unexpected argument 'now'"),
    ("gpt2.inspect", "--checkpoint nowhere", "nowhere"),
]


@pytest.fixture
def inputs(workspace):
    """A current directory with a data set, a model, and files that are not what they seem."""
    GPT2(GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained("model")
    Tokenizer.load("bytes").save(Path("model"))
    Path("lfs").mkdir()
    Path("lfs/model.safetensors").write_bytes(LFS)
    Path("lfs/config.json").write_bytes(Path("model/config.json").read_bytes())
    Path("a.txt").write_text("some text\n" * 9)
    Path("a.csv").write_text("id;body\n1;some text\n")
    Path("latin.txt").write_bytes("naïve text".encode("cp1252"))
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    Path("gradient.toml").write_text("gradient_accumulation_steps = 8\n")
    return workspace


@pytest.mark.parametrize(("command", "arguments", "message"), WRONG, ids=[f"{c} {a}" for c, a, _ in WRONG])
def test_one_line(inputs, capsys, command, arguments, message):
    before = {path for path in inputs.rglob("*") if path.name != "lock" and ".partial" not in str(path)}
    try:
        status = importlib.import_module(command).main(arguments.split())
    except SystemExit as end:
        status = end.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("model: ", "compiling "))]
    assert status not in (0, None)
    assert len(lines) == 1, lines
    assert ": error: " in lines[0]
    assert message in lines[0]
    after = {path for path in inputs.rglob("*") if path.name != "lock" and ".partial" not in str(path)}
    assert after == before


def test_the_table_is_large_enough():
    assert len(WRONG) >= 40
    assert {command for command, _, _ in WRONG} >= {"train", "sample", "data.prepare", "gpt2.convert", "gpt2.report"}


@pytest.mark.parametrize("names", [familiar_options.TRAIN, familiar_options.SAMPLE, familiar_options.PREPARE])
def test_answers_name_options_that_exist_and_no_known_option_is_listed(names):
    commands = {id(familiar_options.TRAIN): "train.py", id(familiar_options.SAMPLE): "sample.py"}
    script = commands.get(id(names), "data/prepare.py")
    text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True).stdout
    text = " ".join(text.split())
    for flag, answer in names.items():
        assert f"{flag} " not in text, flag
        for word in answer.replace("(", " ").replace(")", " ").replace(":", " ").replace(",", " ").split():
            if word.startswith("--") and "prepare" not in answer and "evaluate" not in answer:
                assert word in text, (flag, word)


def test_a_shard_that_shrinks_during_a_run_is_one_line(workspace, capsys, monkeypatch):
    """A shorter file is copied over an open one."""
    from gpt2.training.dataset import SampleOrder
    from tests.training_runs import run

    shard, original = Path("data/text/train-00000.bin"), SampleOrder.indices

    def indices(self, first, count):
        if first >= 4:
            shard.write_bytes(b"\0\0")
        return original(self, first, count)

    monkeypatch.setattr(SampleOrder, "indices", indices)
    run("--max-iters", "9", code=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "data/text/train-00000.bin: the shard has shrunk from" in line
    assert "do not change the data during a run" in line


@pytest.mark.parametrize("suffix", ["bin", "npy"])
def test_shards_of_other_programs_are_read_by_position_too(tmp_path, suffix):
    from gpt2.training.dataset import TokenDataset

    ids = np.arange(5000, dtype="<u2")
    for split in ("train", "val"):
        if suffix == "npy":
            np.save(tmp_path / f"x_{split}_000.npy", ids)
        else:
            ids.tofile(tmp_path / f"{split}.bin")
    data = TokenDataset.open(tmp_path, "train")
    assert data.read(17, 1000).tolist() == ids[17:1017].tolist()
    file = next(tmp_path.glob("*train*"))
    file.write_bytes(file.read_bytes()[:3000])
    assert data.read(0, 100).tolist() == ids[:100].tolist()
    with pytest.raises(ValueError, match="the shard has shrunk from"):
        data.read(2000, 100)
