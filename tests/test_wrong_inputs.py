"""Invalid input to every command gives one line that says what is wrong and what to do, and no traceback."""

import importlib
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer, familiar_options
from tests.training_runs import ROOT

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 548118077\n"

WRONG = [  # command, arguments, part of the expected line
    # Options of other programs, and misspelled ones.
    ("train", "--n-layers 6", "unknown option --n-layers; did you mean --n-layer?"),
    ("train", "--init_from=gpt2", "unknown option --init-from=gpt2; use --init MODEL to fine-tune"),
    ("train", "--eval_only=True", "use python -m gpt2.evaluate MODEL --data NAME"),
    ("train", "--gradient_accumulation_steps=8", "use --total-batch-size TOKENS: micro-steps x --batch-size"),
    ("train", "--compile=False", "unknown option --compile=False; omit it: the kernels are always compiled"),
    ("train", "--wandb_log=True", "read the report.html and log.jsonl that every run writes"),
    ("train", "--wandb-projekt=x", "read the report.html and log.jsonl"),
    ("train", "--dataset=shakespeare_char", "use --data NAME"),
    ("train", "--no-bias", "unknown option --no-bias; omit it: GPT-2 has biases"),
    ("train", "--num-train-epochs 3", "use --max-iters STEPS: epochs x training tokens / tokens per step"),
    ("train", "--lr 3e-4", "unknown option --lr; use --learning-rate X"),
    ("train", "--config gradient.toml", "gradient.toml: unknown option gradient_accumulation_steps; use --total-batch"),
    ("train", "config/train_gpt2.py", "unexpected argument 'config/train_gpt2.py'"),
    ("sample", "Hello world", "unexpected argument 'Hello'; use -p \"Hello world\" ("),
    ("sample", "model", "unexpected argument 'model'; use --checkpoint \"model\" ("),
    ("sample", "a.txt", "unexpected argument 'a.txt'; use --prompt-file \"a.txt\" ("),
    (
        "sample",
        "-p -x",
        "argument -p/--prompt: expected one argument; write a value that begins with - after =, as in --prompt=-x",
    ),
    ("sample", "-m -t 1", "argument -m/--max-tokens: expected one argument ("),
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
    ("train", "--preset gpt2 --data text --block-size 64", "with tokenizer bytes (257 tokens); expected the one"),
    ("sample", "-t -1", "--temperature is -1.0; expected 0 (greedy) or more"),
    ("sample", "-p a --prompt-file a.txt", "--prompt and --prompt-file are both given; expected one of them"),
    ("sample", "-i -p -", "--interactive and a prompt from stdin (-) cannot be combined; use --prompt-file FILE"),
    ("data.prepare", "a.txt --val-fraction 5", "--val-fraction is 5.0; expected 0 < fraction < 1"),
    ("data.prepare", "a.txt --encoding utf8mb4", "--encoding utf8mb4: unknown; expected a name that Python knows"),
    ("data.prepare", "a.csv --delimiter comma", "--delimiter is 'comma'; expected one character, or tab"),
    # Files that are missing, damaged, or of the wrong kind.
    ("train", "--data nowhere", "data 'nowhere': no such data set (data/ contains text); prepare one with"),
    ("train", "--data text --init nowhere", "nowhere: no such file or folder; expected a model"),
    ("train", "--config nowhere.toml", "nowhere.toml: No such file or directory"),
    ("sample", "--checkpoint a.txt", "a.txt: "),
    ("sample", "--checkpoint lfs", "git lfs pull"),
    ("sample", "--checkpoint model --prompt-file latin.txt", "latin.txt: byte 2 is not UTF-8 (0xef); convert"),
    ("sample", "--checkpoint model --prompt-file nowhere.txt", "nowhere.txt: No such file or directory"),
    ("data.prepare", "latin.txt", "latin.txt: byte 2 is not UTF-8 (0xef); specify the --encoding, such as cp1252"),
    ("data.prepare", "nowhere.txt", "nowhere.txt: no such file or folder; expected a path"),
    ("data.prepare", "a.csv", "a.csv: no column 'text' (--text-column); the columns are 'id', 'body'"),
    ("data.prepare", "picture.png", "picture.png: not text; expected text in UTF-8"),
    ("data.prepare", "a.txt --tokenizer gpt5", "tokenizer 'gpt5' is unknown; choose bytes, gpt2"),
    ("gpt2.convert", "model model --to hf", "model"),
    ("gpt2.convert", "nowhere new --to hf", "nowhere: no such file or folder"),
    ("gpt2.convert", "model new", "arguments are required: --to; --to is one of hf, pt, llmc, run ("),
    ("gpt2.convert", "model new --to onnx", "invalid choice: 'onnx'"),
    ("gpt2.evaluate", "model", "--data"),
    ("gpt2.evaluate", "model --data nowhere", "data 'nowhere': no such data set"),
    ("gpt2.report", "nowhere", "nowhere: no log.jsonl in this folder; expected the out-dir of a train.py run"),
    ("gpt2.verify", "--preset gpt9", "gpt9"),
    ("gpt2.plan", "--device h20", "--device is h20; expected auto, cpu, cuda"),
    ("gpt2.doctor", "now", "unexpected argument 'now'"),
    ("gpt2.inspect", "--checkpoint nowhere", "nowhere"),
    # Numbers too large for any machine, and paths that cannot be written.
    ("train", "--data text --batch-size 100000000", "out of memory: "),
    ("train", "--data text --threads 100000", "threads: the number of threads is 100,000; expected 1 to 1,024"),
    (
        "train",
        "--data text --block-size 100000",
        "--block-size 100,000 needs at least 100,001 in each: use --block-size",
    ),
    ("train", "--data text --warmup-iters 9 --lr-decay-iters 8", "--warmup-iters 9 is more than --lr-decay-iters 8"),
    ("train", "--data -x", "--data: expected one argument; write a value that begins with - after =, as in --data=-x"),
    ("train", "--data text --min-lr 1 --learning-rate 0.1", "--min-lr 1 is more than --learning-rate 0.1"),
    ("train", "--data text --learning-rate nan", "--learning-rate is nan; expected more than 0"),
    ("train", "--data text --optimizer sgd --beta1 0.5", "--beta1 is only for --optimizer adamw and muon"),
    ("train", "--data text --preset gpt3", "--preset is gpt3; expected nano, micro, gpt2"),
    ("train", "--data text --out-dir a.txt", "--out-dir a.txt is a file; expected a folder"),
    ("train", "--config utf16.toml", "save it as UTF-8"),
    ("train", "--config words.toml", "words.toml: max_iters is 'ten'; expected a value of type int"),
    (
        "train",
        "--data a.txt",
        "data 'a.txt': a file, not a data set; prepare it with",
    ),
    ("sample", "--checkpoint model --threads 0", "--threads is 0; expected 1 to 1,024"),
    ("sample", "--checkpoint model -n 100000000", "out of memory: 100,000,000 samples"),
    ("sample", "--checkpoint model --top-p 2", "--top-p is 2.0; expected 0 < top-p <= 1"),
    ("sample", "--checkpoint model --prompt-file .", ".: Is a directory"),
    ("sample", "--checkpoint model --prompt-file utf16.toml", "utf16.toml: byte 0 is not UTF-8 (0xff); convert"),
    ("sample", "--checkpoint model/config.json", "it is text, not a model: '{"),
    ("sample", "--checkpoint openai-community/gpt2", "openai-community/gpt2: no such file or folder; expected a model"),
    ("sample", "--checkpoint openai-community/gpt2-medium", "; use gpt2-medium"),
    ("sample", "--checkpoint distilbert/distilgpt2", "hf download distilbert/distilgpt2 --local-dir distilgpt2"),
    ("sample", "--checkpoint https://huggingface.co/distilbert/distilgpt2", "hf download distilbert/distilgpt2 --lo"),
    ("data.prepare", "", "the following arguments are required: SOURCE"),
    ("data.prepare", "empty.txt", "sources empty.txt: no text found"),
    ("data.prepare", "number.jsonl", "number.jsonl: line 1: expected a JSON object with a string under 'text'"),
    ("data.prepare", "a.txt --out a.txt", "a.txt: already exists; choose another --out"),
    ("data.prepare", "a.txt --tokenizer a.txt", "a.txt: line 1 is not valid; expected a base64 token and a rank"),
    ("data.prepare", "a.txt --tokenizer halves", "halves: the folder has none of"),
    ("gpt2.convert", "'' new --to hf", "SRC or DST is empty"),
    ("gpt2.convert", "model no/such/new --to hf", "no/such/new: the folder no/such/ does not exist"),
    ("gpt2.convert", "model new --to run", "it has no training state; expected a checkpoint of nanoGPT"),
    ("gpt2.convert", "model new --to llmc --dtype float16", "llm.c does not support float16; choose float32 or"),
    ("gpt2.evaluate", "'' --data text", "CHECKPOINT is empty; expected a model"),
    ("gpt2.evaluate", "model --data text --block-size 99", "--block-size 99 is longer than the model's context"),
    ("gpt2.evaluate", "model --hellaswag a.txt", "a.txt: line 1 is not a question of hellaswag"),
    ("gpt2.report", "text --output no/page.html", "--output no/page.html: the folder no/ does not exist"),
    ("gpt2.inspect", "--checkpoint model -p a --out no/page.html", "the folder no/ does not exist"),
    ("gpt2.inspect", "--checkpoint model -p a -t nan", "--temperature is nan; expected 0 (greedy) or more"),
    ("gpt2.inspect", "--checkpoint model --prompt-file a", "unknown option --prompt-file; did you mean --prompt?"),
    ("gpt2.serve", "--port 99999", "--port is 99999; expected 0 to 65535"),
    ("gpt2.serve", "--host 0.0.0.0", "unknown option --host"),
    ("gpt2.serve", "--checkpoint model --threads -1", "--threads is -1; expected 1 to 1,024"),
    ("gpt2.plan", "--device abacus", "--device"),
    ("gpt2.plan", "--ranks 0", "--ranks is 0"),
    ("gpt2.plan", "--preset gpt3", "--preset is gpt3; expected nano, micro, gpt2"),
    ("gpt2.replay", "nowhere", "nowhere: not a skipped step; expected the folder bad-step-N of a run"),
    ("gpt2.replay", "model", "model: not a skipped step; expected the folder bad-step-N of a run"),
    ("gpt2.replay", "nowhere --threads 0", "--threads is 0; expected 1 to 1,024"),
    ("gpt2.replay", "nowhere --json no/x.json", "--json no/x.json: the folder no/ does not exist"),
    ("tinygrad2.gradcheck", "--sed 1", "unrecognized arguments: --sed 1"),
]


@pytest.fixture
def inputs(workspace):
    """A current directory with a data set, a model, and files with unexpected contents."""
    GPT2(GPT2Config(vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained("model")
    Tokenizer.load("bytes").save(Path("model"))
    Path("lfs").mkdir()
    Path("lfs/model.safetensors").write_bytes(LFS)
    Path("lfs/config.json").write_bytes(Path("model/config.json").read_bytes())
    Path("a.txt").write_text("some text\n" * 9)
    Path("a.csv").write_text("id;body\n1;some text\n")
    Path("latin.txt").write_bytes("naïve text".encode("cp1252"))
    Path("empty.txt").touch()
    Path("number.jsonl").write_text('{"text": 3}\n')
    Path("words.toml").write_text('max_iters = "ten"\n')
    Path("utf16.toml").write_text("max_iters = 3\n", encoding="utf-16")
    Path("halves").mkdir()
    Path("halves/vocab.json").write_text("{}")
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    Path("gradient.toml").write_text("gradient_accumulation_steps = 8\n")
    return workspace


@pytest.mark.parametrize(("command", "arguments", "message"), WRONG, ids=[f"{c} {a}" for c, a, _ in WRONG])
def test_invalid_input_gives_a_one_line_error(inputs, capsys, command, arguments, message):
    before = {path for path in inputs.rglob("*") if path.name != "lock" and ".partial" not in str(path)}
    try:
        status = importlib.import_module(command).main(shlex.split(arguments))
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
    """It covers every command, most of them with several rows."""
    counts = Counter(command for command, _, _ in WRONG)
    end = "\n    sys.exit(console.run(main))\n"
    modules = {f"gpt2.{file.stem}" for file in (ROOT / "gpt2").glob("*.py") if end in file.read_text()}
    assert counts.keys() >= {"train", "sample", "data.prepare", "tinygrad2.gradcheck"} | modules
    assert counts.total() >= 80


@pytest.mark.parametrize("names", [familiar_options.TRAIN, familiar_options.SAMPLE, familiar_options.PREPARE])
def test_the_advice_refers_to_existing_options(names):
    commands = {id(familiar_options.TRAIN): "train.py", id(familiar_options.SAMPLE): "sample.py"}
    script = commands.get(id(names), "data/prepare.py")
    text = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True).stdout
    text = " ".join(text.split())
    for flag, answer in names.items():
        assert f"{flag} " not in text, flag
        for word in answer.replace("(", " ").replace(")", " ").replace(":", " ").replace(",", " ").split():
            if word.startswith("--") and "prepare" not in answer and "evaluate" not in answer:
                assert word in text, (flag, word)


def test_a_shard_that_shrinks_during_a_run_gives_a_one_line_error(workspace, capsys, monkeypatch):
    """A shorter file replaces one that is open."""
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
def test_a_shard_of_another_program_that_shrinks_is_detected(tmp_path, suffix):
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
