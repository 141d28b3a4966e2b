"""sample.py as a user runs it."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sample
from gpt2 import GPT2, GPT2Config, Tokenizer
from tests.gpt2.formats.models import write_every_format
from tests.stand_ins import strict_cupy
from tinygrad2 import checkpoint, machine

ROOT = Path(__file__).parents[1]


def save_model(folder, seed=0, vocab_size=257, tokenizer="bytes"):
    model = GPT2(GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=16, n_layer=1, n_head=2), seed=seed)
    with checkpoint.writing(Path(folder)) as partial:
        model.save_pretrained(partial)
        if tokenizer:
            Tokenizer.load(tokenizer).save(partial)
    return model


@pytest.fixture
def user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *options, code=0):
    assert sample.main(list(options)) == code
    return capsys.readouterr()


def test_the_model_in_use_is_printed(user, capsys):
    assert "sampling from an untrained model" in run(capsys, "-m", "2").err
    save_model("out/ckpt-000001")
    save_model("out/ckpt-000010")
    assert run(capsys, "-m", "2").err == "model: out/ckpt-000010\n"
    assert run(capsys, "-m", "2", "--checkpoint", "out").err == "model: out/ckpt-000010\n"
    assert run(capsys, "-m", "2", "--checkpoint", "out/ckpt-000001").err == "model: out/ckpt-000001\n"
    save_model("checkpoint")
    assert run(capsys, "-m", "2").err == "model: checkpoint (your own: --checkpoint out)\n"


def test_a_damaged_newest_checkpoint_is_skipped(user, capsys):
    save_model("out/ckpt-000001")
    save_model("out/ckpt-000002")
    (user / "out/ckpt-000002/config.json").write_text("{}")
    output = run(capsys, "-m", "2").err
    assert "skipping a damaged checkpoint: out/ckpt-000002/config.json" in output
    assert "model: out/ckpt-000001" in output


def test_the_prompt_is_continued_and_the_seed_determines_the_text(user, capsys):
    save_model("checkpoint")
    first = run(capsys, "-p", "Hello", "-m", "40", "--seed", "3").out
    assert first.startswith("Hello")
    assert len(first) > len("Hello\n")
    assert first == run(capsys, "-p", "Hello", "-m", "40", "--seed", "3").out
    assert first != run(capsys, "-p", "Hello", "-m", "40", "--seed", "4").out
    assert run(capsys, "-p", "Hello", "-m", "0").out == "Hello\n"


def test_short_and_long_options_are_equivalent(user, capsys):
    save_model("checkpoint")
    short = ["-p", "x", "-m", "5", "-n", "2", "-t", "0.7", "-k", "9", "--top-p", "0.9", "--seed", "1", "--stop", "qq"]
    long = ["--prompt", "x", "--max_tokens", "5", "--samples", "2", "--temperature", "0.7", "--top_k", "9"]
    long += ["--top_p", "0.9", "--seed", "1", "--stop", "qq", "--device", "cpu"]
    assert run(capsys, *short).out == run(capsys, *long).out


def test_samples_are_printed_in_order_and_the_first_one_does_not_depend_on_their_number(user, capsys):
    save_model("checkpoint")
    one = run(capsys, "-p", "x", "-m", "30").out
    three = run(capsys, "-p", "x", "-m", "30", "-n", "3").out
    parts = re.split(r"--- sample \d of 3 ---\n", three)
    assert parts[0] == ""
    assert parts[1] == one
    assert len(parts) == 4
    assert all(part.startswith("x") for part in parts[1:])


def test_greedy_text_longer_than_the_context(user, capsys):
    model = save_model("checkpoint")
    output = run(capsys, "-p", "ab", "-m", "100", "-t", "0").out
    (expected,) = model.generate(list(b"ab"), 100, stop=256, temperature=0)
    assert output == "ab" + bytes(expected).decode("utf-8", "replace") + "\n"


def test_a_prompt_longer_than_the_context_is_reported(user, capsys):
    save_model("checkpoint")
    assert run(capsys, "-p", 32 * "a", "-m", "2").err == "model: checkpoint\n"
    output = run(capsys, "-p", 33 * "a", "-m", "2").err
    assert output == "model: checkpoint\nthe prompt has 33 tokens; the model reads only the last 32\n"


def test_a_stop_string_ends_the_text(user, capsys):
    save_model("checkpoint")
    text = run(capsys, "-p", "ab", "-m", "60", "--seed", "2").out.removeprefix("ab").rstrip("\n")
    stop = next(c for c in text if c.isascii() and c.isprintable())
    assert run(capsys, "-p", "ab", "-m", "60", "--seed", "2", "--stop", stop).out == "ab" + text.split(stop)[0] + "\n"


def test_an_empty_prompt_starts_from_end_of_text(user, capsys):
    model = save_model("checkpoint")
    (expected,) = model.generate([256], 20, stop=256, temperature=0)
    assert run(capsys, "-m", "20", "-t", "0").out == bytes(expected).decode("utf-8", "replace") + "\n"


def test_bfloat16_weights_are_reported_and_used(user, capsys):
    assert "an untrained model, weights in bfloat16\n" in run(capsys, "-m", "2", "--dtype", "bfloat16").err
    model = save_model("checkpoint")
    for p in model.parameters():  # larger, so that rounding has an effect
        p.data = 3 * p.data
    model.save_pretrained("checkpoint")
    options = ["-p", "ab", "-m", "60", "-n", "20", "-t", "1", "--seed", "3"]
    texts = {dtype: run(capsys, *options, "--dtype", dtype) for dtype in ("float32", "bfloat16")}
    assert texts["float32"].err.splitlines()[0] == "model: checkpoint"
    assert texts["bfloat16"].err.splitlines()[0] == "model: checkpoint, weights in bfloat16"
    model.to(precision="bfloat16_weights")
    rows = model.generate(list(b"ab"), 60, stop=256, samples=20, temperature=1, seed=3)
    expected = [
        f"--- sample {i} of 20 ---\nab{bytes(row).decode('utf-8', 'replace')}\n" for i, row in enumerate(rows, 1)
    ]
    assert texts["bfloat16"].out == "".join(expected)
    assert texts["bfloat16"].out != texts["float32"].out


def test_bfloat16_weights_require_the_kernels_on_a_device(user, capsys):
    save_model("checkpoint")
    with strict_cupy.registered():
        lines = run(capsys, "-p", "x", "--device", "cuda", "--dtype", "bfloat16", code=1).err.splitlines()
    assert lines[0] == "model: checkpoint, weights in bfloat16"
    assert (
        lines[1]
        == "sample.py: error: GPT2: bfloat16 needs the CUDA kernels, which TINYGRAD2_KERNELS=reference disables"
    )
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float16"], "--dtype: invalid choice: 'float16' (choose from"),
        (["-m", "-1"], "--max-tokens is -1; expected 0 or more"),
        (["-n", "0"], "--samples is 0; expected 1 or more"),
        (["-t", "-0.1"], "temperature is -0.1; expected 0"),
        (["-k", "0"], "top-k is 0; expected 1 or more"),
        (["--top-p", "0"], "top-p is 0.0; expected 0 < top-p <= 1"),
        (["--seed", "-1"], "--seed is -1; expected 0 to 2**64 - 1"),
        (["--stop", ""], "--stop is empty"),
        (["--checkpoint", ""], "--checkpoint is empty; expected a model"),
        (["--temprature", "1"], "unknown option --temprature; did you mean --temperature?"),
        (["-m", "x"], "invalid int value: 'x'"),
    ],
)
def test_an_invalid_option_gives_a_one_line_error(user, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        sample.main(options)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def broken(name, content):
    def change(user):
        save_model("checkpoint")
        (user / "checkpoint" / name).write_text(content)

    return change


BAD = {
    "no such folder": (None, ["--checkpoint", "nowhere"], "nowhere: no such file or folder"),
    "a folder with no model": (
        lambda user: (user / "x").mkdir(),
        ["--checkpoint", "x"],
        "x: no model or checkpoint in this folder",
    ),
    "damaged weights": (broken("model.safetensors", "x"), [], "model.safetensors: "),
    "a damaged config": (broken("config.json", "{"), [], "config.json: "),
    "a model of another kind": (broken("config.json", '{"model_type": "llama"}'), [], "model_type is 'llama'"),
    "an unknown vocabulary": (
        lambda user: save_model("checkpoint", vocab_size=99, tokenizer=None),
        [],
        "checkpoint: no tokenizer is known for a vocabulary of 99",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_a_one_line_error(user, capsys, case):
    change, options, message = BAD[case]
    if change:
        change(user)
    lines = run(capsys, *options, code=1).err.splitlines()
    assert message in lines[-1]
    assert all(line.startswith(("sample.py: error: ", "model: ")) for line in lines)


def test_text_is_streamed(user):
    """The first characters are printed long before the last ones."""
    save_model("checkpoint")
    command = [sys.executable, "-u", ROOT / "sample.py", "-p", "abc", "-m", "100000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout.read(40).startswith(b"abc")
    assert process.poll() is None
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_compilation_is_announced_before_any_text(user):
    """The cache of compiled kernels is empty, as after a fresh clone."""
    save_model("checkpoint")
    command = [sys.executable, ROOT / "sample.py", "-p", "abc", "-m", "20", "-n", "2", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(user / "cache")}
    outputs = [
        subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, check=True).stdout
        for _ in range(2)
    ]
    first, second = (output.split(b"\n", 2) for output in outputs)
    assert first[0] == second[0] == b"model: checkpoint"
    assert first[1].startswith(b"compiling kernels")
    assert second[1] == b"--- sample 1 of 2 ---"
    assert first[2] == b"\n".join(second[1:])


@pytest.mark.parametrize(
    ("pieces", "options", "reported"),
    [
        ([], [], ["the sample is empty: the model generated no visible text; try another --seed"]),
        ([(0, " \n"), (0, "\n")], [], ["the sample is empty"]),
        ([(0, "\n"), (0, "a")], [], []),
        ([], ["-m", "0"], []),
        ([(0, "a"), (2, "b")], ["-n", "3"], ["sample 2 is empty"]),
    ],
)
def test_an_empty_sample_is_reported(user, capsys, monkeypatch, pieces, options, reported):
    save_model("checkpoint")
    monkeypatch.setattr(sample, "stream_text", lambda *arguments, **options: iter(pieces))
    lines = run(capsys, *options).err.splitlines()[1:]
    assert len(lines) == len(reported)
    assert all(line.startswith(start) for line, start in zip(lines, reported, strict=True))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
def test_on_a_terminal_text_is_wrapped_and_control_characters_are_escaped(user):
    save_model("checkpoint")
    controller, terminal = os.openpty()
    command = [sys.executable, ROOT / "sample.py", "-p", 12 * "words and " + "\x1b[31m", "-m", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "40"}
    subprocess.run(command, stdout=terminal, stderr=subprocess.DEVNULL, env=environment, check=True)
    os.close(terminal)
    lines = os.read(controller, 10_000).decode().splitlines()
    os.close(controller)
    assert lines == 3 * ["words and words and words and words and"] + ["\\x1b[31m"]


def test_padding_tokens_are_never_sampled(user, capsys):
    model = GPT2(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    model.wte.weight.data[257:] *= 50
    model.save_pretrained("checkpoint")
    Tokenizer.load("bytes").save("checkpoint")
    run(capsys, "-p", "x", "-m", "60", "-t", "3")


def test_nan_weights_are_reported(user, capsys):
    model = save_model("checkpoint")
    model.ln_f.weight.data[...] = float("nan")
    model.save_pretrained("checkpoint")
    assert "the weights are damaged: parameter ln_f.weight [0] is nan (16 of 16 values)" in run(capsys, code=1).err


def test_sampling_ends_silently_when_the_pipe_is_closed(user):
    save_model("checkpoint")
    command = [sys.executable, ROOT / "sample.py", "-p", "abc", "-m", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)})
    process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == b"model: checkpoint\n"
    process.stderr.close()
    assert process.wait(60) == 0


def test_too_many_samples_for_the_memory_are_rejected_with_the_number_that_fits(user, capsys, monkeypatch):
    save_model("checkpoint")
    monkeypatch.setattr(machine, "memory", lambda: (5e6, 20e6))
    monkeypatch.setattr(sample, "stream_text", lambda *arguments, **options: iter(()))
    # 10 positions with 2 x 16 values, 3 prompt tokens with 19 x 16 values, 257 logits: 7,241 bytes per sample.
    output = run(capsys, "-p", "abc", "-m", "7", "-n", "1000000", code=1)
    assert output.out == ""
    assert output.err.splitlines()[1:] == [
        "sample.py: error: out of memory: 1,000,000 samples of 10 tokens need 1.28 keys and values + 3.65 activations "
        "+ 2.31 logits = 7.24 GB; 0.01 of 0.02 GB are free; -n 621 fits"
    ]
    run(capsys, "-p", "abc", "-m", "7", "-n", "621")
    monkeypatch.setattr(machine, "memory", lambda: (1e3, 20e6))
    assert "not even one fits: use a smaller --max-tokens" in run(capsys, "-p", "abc", code=1).err
    monkeypatch.setattr(machine, "memory", lambda: None)  # the system does not report its memory
    run(capsys, "-p", "abc", "-n", "1000")


# Model files from other programs


def greedy(capsys, *options):
    return run(capsys, "-m", "8", "-t", "0", *options)


def test_every_format_is_read(user, capsys):
    write_every_format()
    expected = greedy(capsys, "--checkpoint", "model").out
    for name in ("model.pt", "model.llmc", "model/model.safetensors"):
        found = greedy(capsys, "--checkpoint", name)
        assert found.out == expected
        assert found.err == f"model: {name}\n"


def test_pt_files_in_checkpoint_and_out_are_found(user, capsys):
    write_every_format()
    Path("out").mkdir()
    for age, name in ((30, "ckpt.pt"), (20, "a.pt"), (40, "b.pt")):
        Path("out", name).write_bytes(Path("model.pt").read_bytes())
        os.utime(Path("out", name), (10**9 - age, 10**9 - age))
    assert greedy(capsys).err == "model: out/a.pt\n"
    assert greedy(capsys, "--checkpoint", "out").err == "model: out/a.pt\n"
    Path("checkpoint").mkdir()
    Path("model.pt").rename("checkpoint/gpt2.pt")
    assert greedy(capsys).err == "model: checkpoint/gpt2.pt\n"


def test_added_tokens_in_the_prompt_and_a_custom_end_token(user, capsys):
    """The model always generates the added token 258, which is its end token."""
    model = save_model("checkpoint", vocab_size=259, tokenizer=None)
    Tokenizer.load("bytes").save_hugging_face(Path("checkpoint"), 32)
    Path("checkpoint", "added_tokens.json").write_text('{"<|user|>": 257, "<|end|>": 258}')
    Path("checkpoint", "generation_config.json").write_text('{"eos_token_id": [258, 0]}')
    model.ln_f.weight.data[:] = 0
    model.ln_f.bias.data[:] = 1
    model.wte.weight.data[258] = 3
    model.save_pretrained("checkpoint")
    assert run(capsys, "-p", "\ufeff<|user|>hello", "-m", "20", "-t", "0").out == "<|user|>hello\n"
    model.wte.weight.data[257] = 4
    model.save_pretrained("checkpoint")
    assert run(capsys, "-p", "<|user|>", "-m", "3", "-t", "0").out == "<|user|>" * 4 + "\n"
    tokenizer = Tokenizer.for_model("checkpoint", 259)
    assert tokenizer.encode_prompt("<|user|>hi").tolist() == [257, *b"hi"]


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e38])
def test_the_damaged_tensor_is_named(user, capsys, value):
    model = save_model("damaged")
    values = model.h[0].ln_1.bias.numpy().copy()
    values[3] = value
    model.h[0].ln_1.bias.data = values
    model.save_pretrained("damaged")
    Path("damaged/manifest.json").unlink()
    output = run(capsys, "--checkpoint", "damaged", "-m", "2", "-p", "1", code=1).err
    error = "sample.py: error: damaged/model.safetensors: the weights are damaged: parameter h.0.ln_1.bias [3] is "
    assert f"{error}{value:.7g} (1 of 16 values); expected finite values" in output


# Sources of the prompt


class FakeStdin:
    """A stand-in for stdin with these bytes, which is a terminal if `terminal` is true."""

    def __init__(self, text, terminal=False):
        self.buffer, self.lines, self.isatty = io.BytesIO(text), iter(text.decode().splitlines()), lambda: terminal


@pytest.mark.parametrize("options", [["-p", "-"], ["--prompt-file", "-"], ["--prompt-file", "prompt.txt"]])
@pytest.mark.parametrize("text", ["twelve", "twelve\n", "twelve\r\n", "\ufefftwelve"])
def test_a_prompt_from_a_file_or_stdin(user, capsys, monkeypatch, options, text):
    save_model("checkpoint")
    expected = run(capsys, "-p", "twelve", "-m", "4").out
    Path("prompt.txt").write_bytes(text.encode())
    monkeypatch.setattr(sys, "stdin", FakeStdin(text.encode()))
    assert run(capsys, *options, "-m", "4").out == expected


def interactive(monkeypatch, capsys, lines, *options, code=0):
    typed = iter(lines)

    def read(prompt=""):
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", FakeStdin(b"", terminal=True))
    return run(capsys, "-i", "-m", "4", "-t", "0", *options, code=code)


def test_an_interactive_session(user, capsys, monkeypatch):
    save_model("checkpoint")
    texts = [run(capsys, "-p", prompt, "-m", "4", "-t", "0").out for prompt in ("first", "one", "two")]
    output = interactive(monkeypatch, capsys, ["one", "two"], "-p", "first")
    assert output.out == "".join(texts)
    assert "type a prompt and press Enter; an empty line begins a new text, Ctrl-D exits" in output.err
    assert interactive(monkeypatch, capsys, ["one", "two"]).out == "".join(texts[1:])
    assert "interrupted" in interactive(monkeypatch, capsys, [KeyboardInterrupt], code=130).err


def test_control_c_ends_the_text_but_not_the_session(user, capsys, monkeypatch):
    save_model("checkpoint")
    expected = run(capsys, "-p", "two", "-m", "4", "-t", "0").out
    original = sample.print_samples

    def interrupted(model, tokenizer, options):
        if options.prompt == "one":
            raise KeyboardInterrupt
        original(model, tokenizer, options)

    monkeypatch.setattr(sample, "print_samples", interrupted)
    assert interactive(monkeypatch, capsys, ["one", "two"]).out == expected


def test_repeating_a_prompt_gives_a_different_text(user, capsys, monkeypatch):
    save_model("checkpoint")
    first, second = interactive(monkeypatch, capsys, ["one", "one"], "-t", "2", "-m", "12").out.splitlines()[:2]
    assert first != second
