"""gpt2/training/setup.py: starting a run, settings that a resumed run keeps, and invalid input."""

import contextlib
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

import sample
import train
from data.prepare import prepare
from gpt2 import GPT2, GPT2Config, Tokenizer, convert
from gpt2.generate import stream_text
from gpt2.training import options, setup
from gpt2.training.run import RunOptions
from gpt2.training.tasks import TASKS
from tests.training_runs import QUICK, TEXT, assert_same_run, one_line, rows, run, update_checksums
from tinygrad2 import blas, checkpoint, machine


def test_a_task_that_cannot_be_downloaded_is_reported_before_training(workspace, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(workspace / "cache"))
    monkeypatch.setitem(TASKS, "lambada", dataclasses.replace(TASKS["lambada"], url="http://127.0.0.1:9/words.jsonl"))
    monkeypatch.setenv("no_proxy", "*")
    run("--eval", "lambada", "--max-iters", "2", code=1)
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: lambada: http://127.0.0.1:9/words.jsonl could not be downloaded (")
    assert said.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--preset", "gpt2"], "--preset nano; it cannot be resumed with gpt2"),
        (["--block-size", "8"], "--block-size 16; it cannot be resumed with 8"),
        (["--seed", "3"], "--seed 1337; it cannot be resumed with 3"),
        (["--dtype", "float64"], "--dtype float32; it cannot be resumed with float64"),
    ],
)
def test_a_run_cannot_be_resumed_with_other_settings(workspace, capsys, option, message):
    run("--max-iters", "2")
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert train.main(["--max-iters", "4", *option]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "--fresh to start a new run" in error
    assert len(error.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


def test_the_data_of_a_run_may_be_renamed_but_not_changed(workspace, capsys):
    run("--max-iters", "2")
    assert train.main(["--max-iters", "3", "--data", "./data/text/"]) == 0
    (workspace / "data" / "text").rename(workspace / "data" / "mine")
    assert train.main(["--max-iters", "4", "--data", "mine"]) == 0
    assert train.main(["--max-iters", "5"]) == 0
    assert [row["step"] for row in rows("out")] == [1, 2, 3, 4, 5]
    (workspace / "other.txt").write_text(TEXT.replace("times", "plus"))
    prepare([str(workspace / "other.txt")], "bytes", workspace / "data" / "other")
    capsys.readouterr()
    assert train.main(["--max-iters", "6", "--data", "other"]) == 1
    assert "data/other is not the data that out/ was trained on: it is another data set, or" in one_line(capsys)


def test_fine_tuning_starts_from_the_weights(workspace, capsys):
    run("--max-iters", "3", "--out-dir", "base")
    base = checkpoint.newest(Path("base"))[0]
    run("--max-iters", "1", "--init", str(base), "--learning-rate", "1e-12", "--weight-decay", "0")
    trained, start = GPT2.from_pretrained(checkpoint.newest(Path("out"))[0]), GPT2.from_pretrained(base)
    for (name, a), (_, b) in zip(trained.named_parameters(), start.named_parameters(), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-9, err_msg=name)


def damage_shard(workspace, change):
    shard = workspace / "data" / "text" / "train-00000.bin"
    shard.write_bytes(change(shard.read_bytes()))


def update_manifest(workspace, **changes):
    """Change the manifest and update its checksums, so that only the content of the shard is wrong."""
    from gpt2.training.dataset import file_sha256

    file = workspace / "data" / "text" / "manifest.json"
    manifest = json.loads(file.read_text())
    for shard in manifest["shards"]:
        shard["sha256"] = file_sha256(workspace / "data" / "text" / shard["file"])
    file.write_text(json.dumps({**manifest, **changes}))


def foreign_ids(workspace):
    damage_shard(workspace, lambda data: b"\xff\x7f" * (len(data) // 2))
    update_manifest(workspace)


def make_small(workspace):
    (workspace / "small.txt").write_text("too little\n" * 30)
    prepare([str(workspace / "small.txt")], "bytes", workspace / "data" / "small")


BAD = {
    "no such data set": (None, ["--data", "nothing"], r"data 'nothing': no such data set \(data/ contains text\)"),
    "an empty folder": (
        lambda folder: (folder / "empty").mkdir(),
        ["--data", "empty"],
        "data 'empty': no such data set",
    ),
    "a truncated shard": (
        lambda folder: damage_shard(folder, lambda data: data[:-10]),
        [],
        r"train-00000\.bin: the shard has [\d,]+ bytes; expected",
    ),
    "a changed shard": (
        lambda folder: damage_shard(folder, lambda data: bytes([data[0] ^ 1]) + data[1:]),
        [],
        r"train-00000\.bin: the shard's checksum differs",
    ),
    "ids outside the vocabulary": (
        foreign_ids,
        [],
        r"train-00000\.bin: contains the id 32767, but the vocabulary has 257",
    ),
    "an invalid manifest": (
        lambda folder: (folder / "data" / "text" / "manifest.json").write_text("[1]"),
        [],
        r"manifest\.json: not a valid manifest",
    ),
    "a context longer than the model's": (
        lambda folder: GPT2(GPT2Config.preset("nano")).save_pretrained("short"),
        ["--init", "short", "--block-size", "65"],
        "65 is longer than the model's context of 64",
    ),
    "too little data": (
        make_small,
        ["--data", "small", "--block-size", "64"],
        r"small: the splits have \d+ \(train\) and \d\d \(val\) tokens; --block-size 64 needs at least 65 in each: use "
        r"--block-size \d\d or less, or about \d times as much text",
    ),
    "a batch that does not divide": (
        None,
        ["--total-batch-size", "100"],
        r"100 is not a multiple of --batch-size 2 x --block-size 16 = 32 tokens; the nearest multiple is 96 or 128",
    ),
    "another vocabulary": (
        None,
        ["--preset", "gpt2"],
        r"tokenizer bytes \(257 tokens\); expected the one of the preset gpt2 \(50,257 tokens\)",
    ),
    "no such model": (
        None,
        ["--init", "nowhere"],
        "nowhere: no such file or folder; expected a model, the out-dir of a run",
    ),
    "init with a preset": (
        None,
        ["--init", "x", "--preset", "nano"],
        "--init determines the sizes of the model; remove --preset",
    ),
    "an out-dir that is a file": (
        lambda folder: (folder / "taken").write_text("x"),
        ["--out-dir", "taken"],
        r"--out-dir taken is a file; expected a folder",
    ),
    "an out-dir that is a file, with --fresh": (
        lambda folder: (folder / "taken").write_text("x"),
        ["--out-dir", "taken", "--fresh"],
        r"--out-dir taken is a file; expected a folder",
    ),
    "init with sizes": (
        None,
        ["--init", "x", "--n-layer", "2", "--n-embd", "8"],
        "--init determines the sizes of the model; remove --n-layer and --n-embd",
    ),
    "heads that do not divide": (
        None,
        ["--n-embd", "100", "--n-head", "3"],
        "--n-embd 100 is not a multiple of --n-head 3; the nearest multiple is 99",
    ),
    "early stop without evaluations": (
        None,
        ["--early-stop", "2", "--eval-interval", "0"],
        "--early-stop needs evaluations during the run; expected an --eval-interval of 1 or more",
    ),
    "a rate that ends above its peak": (
        None,
        ["--min-lr", "1e-2", "--learning-rate", "1e-3"],
        "--min-lr 0.01 is more than --learning-rate 0.001",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_prints_one_line(workspace, capsys, case):
    prepare_case, options, message = BAD[case]
    if prepare_case:
        prepare_case(workspace)
    run("--max-iters", "3", *options, code=1)
    assert re.search(message, one_line(capsys))
    if case != "ids outside the vocabulary":  # detected when ids are read; all other errors before the run starts
        assert not list(Path().rglob("log.jsonl"))
    assert not Path("out").exists() or not list(Path("out").glob("ckpt-*"))


def test_other_data_with_the_same_name_is_detected(workspace, capsys):
    run("--max-iters", "2")
    (workspace / "other.txt").write_text(TEXT.replace("times", "plus"))
    prepare([str(workspace / "other.txt")], "bytes", workspace / "data" / "text", fresh=True)
    run("--max-iters", "4", code=1)
    assert "data/text is not the data that out/ was trained on" in one_line(capsys)


def test_another_vocabulary_next_to_the_data_is_detected(workspace, capsys):
    Tokenizer.load("bytes").save(workspace / "data" / "text")
    manifest = workspace / "data" / "text" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(Tokenizer.load("bytes").fingerprint, "0" * 64))
    run("--max-iters", "1", code=1)
    assert "have different tokenizers" in one_line(capsys)


def test_fresh_renames_nothing_if_there_is_an_error(workspace, capsys):
    run("--max-iters", "2")
    assert train.main(["--fresh", "--data", "nothing"]) == 1
    assert train.main(["--fresh", "--data", "text", "--total-batch-size", "100"]) == 1
    assert not list(Path().glob("out-*"))


def test_the_default_data_may_be_given_explicitly(workspace, monkeypatch):
    (workspace / "data" / "text").rename(workspace / "data" / "pydoc")
    assert train.main([*QUICK, "--max-iters", "2"]) == 0
    assert train.main(["--data", "pydoc", "--max-iters", "3"]) == 0


def test_init_accepts_the_out_dir_of_a_run(workspace):
    run("--max-iters", "2", "--out-dir", "base")
    run("--max-iters", "1", "--init", "base")


def test_a_resumed_run_keeps_the_defaults_of_its_start(workspace, monkeypatch):
    run("--max-iters", "2", "--out-dir", "newer")
    run("--max-iters", "2", "--out-dir", "older")
    state = Path("older/ckpt-000002/trainer.json")
    values = json.loads(state.read_text())
    assert values.pop("defaults")["beta2"] == 0.95
    state.write_text(json.dumps(values))  # as in earlier versions; starts.jsonl has the defaults
    update_checksums(state.parent)
    monkeypatch.setattr(options, "SIZE_DEFAULTS", {"small": {**options.SIZE_DEFAULTS["small"], "learning_rate": 1e-5}})
    monkeypatch.setattr(options.Options.__dataclass_fields__["beta2"], "default", 0.5)
    for folder in ("newer", "older"):
        assert train.main(["--out-dir", folder, "--max-iters", "4"]) == 0
        start = json.loads(Path(folder, "starts.jsonl").read_text().splitlines()[-1])["options"]
        assert (start["beta2"], start["learning_rate"], start["min_lr"]) == (0.95, 1e-2, 0)
        assert start["lr_decay_iters"] == 4  # follows --max-iters


@pytest.mark.parametrize("stored", ["defaults", "starts", "nothing"])
def test_a_run_of_an_earlier_version_keeps_adamw_and_the_cosine_schedule(workspace, stored):
    run("--max-iters", "2", "--optimizer", "adamw", "--out-dir", "today")
    run("--max-iters", "2", "--optimizer", "adamw")
    state, starts = Path("out/ckpt-000002/trainer.json"), Path("out/starts.jsonl")
    values, start = json.loads(state.read_text()), json.loads(starts.read_text())
    del values["options"]["optimizer"], start["given"]["optimizer"]  # AdamW was the default
    for settings in (values["defaults"], start["options"]):
        del settings["lr_schedule"]  # the option did not exist
        settings["optimizer"] = "adamw"
    if stored != "defaults":
        del values["defaults"]
    state.write_text(json.dumps(values))
    update_checksums(state.parent)
    starts.write_text(json.dumps(start) + "\n")
    if stored == "nothing":
        starts.unlink()
    for folder in ("today", "out"):
        assert train.main(["--max-iters", "4", "--out-dir", folder]) == 0
    now = json.loads(starts.read_text().splitlines()[-1])["options"]
    assert (now["optimizer"], now["lr_schedule"], now["momentum"]) == ("adamw", "cosine", None)
    assert (now["learning_rate"], now["min_lr"]) == (3e-3, 3e-3 / 10)
    if stored != "nothing":  # (otherwise the number of warm-up steps is also unknown)
        assert_same_run("today", "out")


def test_a_resumed_run_keeps_its_schedule_unless_it_is_changed(workspace):
    run("--max-iters", "4", "--lr-schedule", "wsd", "--learning-rate", "1e-3", "--warmup-iters", "0")
    assert train.main(["--max-iters", "10"]) == 0
    assert [row["lr"] for row in rows("out")[4:]] == pytest.approx([1e-3] * 5 + [5e-4])
    assert train.main(["--max-iters", "12", "--lr-schedule", "cosine"]) == 0
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 12)) / 2 for step in (10, 11)]
    assert [row["lr"] for row in rows("out")[10:]] == pytest.approx(cosine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "sgd", "--beta1", "0.8"], "--beta1 is only for --optimizer adamw and muon; this run has sgd"),
        (
            ["--optimizer", "adamw", "--momentum", "0.8"],
            "--momentum is only for --optimizer muon and sgd; this run has",
        ),
        (["--nesterov"], "--nesterov is only for --optimizer sgd; this run has muon"),
        (["--optimizer", "adam"], "--optimizer is adam; expected adamw, muon, sgd"),
    ],
)
def test_options_of_another_optimizer_are_rejected(workspace, capsys, options, message):
    with contextlib.suppress(SystemExit):
        train.main(["--data", "text", *QUICK, "--max-iters", "2", *options])
    assert message in capsys.readouterr().err


def test_the_optimizer_of_a_run_cannot_be_changed(workspace, capsys):
    run("--max-iters", "2")
    assert train.main(["--max-iters", "4", "--optimizer", "sgd"]) == 1
    assert "--optimizer muon; it cannot be resumed with sgd" in capsys.readouterr().err


# The vocabularies of a model and of the data


def save_hugging_face(folder, vocab_size, tokenizer="bytes", added=None, **config):
    """Save a model folder in the Hugging Face layout with a byte-level tokenizer, and prepare data with it."""
    GPT2(GPT2Config(vocab_size=vocab_size, n_positions=16, n_embd=16, n_layer=1, n_head=2, **config)).save_pretrained(
        folder
    )
    Tokenizer.load(tokenizer).save_hugging_face(Path(folder), 16)
    if added:
        (Path(folder) / "added_tokens.json").write_text(json.dumps(added))
    prepare(["data/text.txt"], folder, "data/own")


@pytest.fixture
def own_text(workspace):
    (workspace / "data" / "text.txt").write_text(TEXT)
    return workspace


def test_a_model_with_a_padded_vocabulary_is_trained_sampled_and_converted(own_text, capsys):
    save_hugging_face("hf", 300)
    assert train.main(["--init", "hf", "--data", "own", *QUICK, "--max-iters", "2"]) == 0
    assert convert.main(["out", "back", "--to", "hf"]) == 0
    for folder in (checkpoint.find(Path("out"))[0], Path("back")):
        model = GPT2.from_pretrained(folder)
        assert model.config.vocab_size == len(model.wte.weight.data) == 300
        tokenizer = Tokenizer.for_model(folder, 300)
        assert tokenizer.vocab_size == 257
        model.wte.weight.data[257:] = 50  # padding ids would win if they were sampled
        texts = stream_text(model, tokenizer, [1], 30, temperature=2.0, samples=2)
        assert len("".join(text for _, text in texts)) > 10
    capsys.readouterr()
    assert train.main(["--data", "own", *QUICK, "--max-iters", "4"]) == 0  # resume


def test_a_model_with_added_tokens_can_be_trained_on_data_without_them(own_text):
    """The model keeps its added tokens and its EOS token."""
    save_hugging_face("hf", 259, added={"<|user|>": 257, "<|end|>": 258}, bos_token_id=256, eos_token_id=258)
    Path("plain").mkdir()
    Tokenizer.load("bytes").save_hugging_face(Path("plain"), 16)
    prepare(["data/text.txt"], "plain", "data/plain")
    assert train.main(["--data", "plain", "--init", "hf", *QUICK, "--max-iters", "1"]) == 0
    folder = checkpoint.find(Path("out"))[0]
    tokenizer = Tokenizer.for_model(folder, 259)
    assert [token.content for token in tokenizer.added] == ["<|endoftext|>", "<|user|>", "<|end|>"]
    assert tokenizer.end_ids == (258,)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 258)


def test_data_with_added_tokens_that_the_model_lacks_is_rejected(own_text, capsys):
    save_hugging_face("hf", 259, added={"<|user|>": 257, "<|end|>": 258})
    GPT2(GPT2Config(vocab_size=300, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained("other")
    Tokenizer.load("bytes").save_hugging_face(Path("other"), 16)
    assert train.main(["--init", "other", "--data", "own", *QUICK, "--max-iters", "1"]) == 1
    assert "prepare the data with the model's tokenizer, --tokenizer other" in one_line(capsys)


def test_the_error_for_data_with_another_tokenizer_names_that_of_the_model(own_text, gpt2_files, capsys):
    GPT2(GPT2Config.preset("nano")).save_pretrained("model")
    Tokenizer.load("bytes").save("model")
    prepare(["data/text.txt"], "gpt2", "data/words")
    assert train.main(["--init", "model", "--data", "words", *QUICK]) == 1
    assert "the model's tokenizer, --tokenizer bytes" in one_line(capsys)


def test_a_new_model_gets_bos_and_eos_ids_from_its_data(own_text):
    save_hugging_face("hf", 259, added={"<|user|>": 257, "<|end|>": 258}, eos_token_id=(258, 256))
    run_options = [*QUICK, "--max-iters", "1", "--out-dir", "new"]
    assert train.main(["--data", "own", *run_options]) == 0
    config = json.loads((checkpoint.find(Path("new"))[0] / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (259, 256, [258, 256])


def test_training_on_character_data_of_nanogpt(workspace):
    import pickle

    characters = sorted(set(TEXT))
    folder = workspace / "data" / "characters"
    folder.mkdir()
    (folder / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": len(characters), "itos": dict(enumerate(characters))})
    )
    ids = np.array([characters.index(c) for c in TEXT], np.uint16)
    for name, part in (("train", ids[:9000]), ("val", ids[9000:])):
        part.tofile(folder / f"{name}.bin")
    assert train.main(["--data", "characters", *QUICK, "--max-iters", "1"]) == 0
    saved = checkpoint.find(Path("out"))[0]
    assert Tokenizer.load(saved).decode(ids[:50]) == TEXT[:50]
    assert sample.main(["--checkpoint", "out", "-m", "3"]) == 0


# The BLAS library -------------------------------------------------------------------------------------------------


@pytest.fixture
def with_mkl(monkeypatch):
    """Add a second library named mkl, which is as fast as NumPy's."""
    mkl = dataclasses.replace(blas.NUMPYS, name="mkl", title="MKL 9.9")
    monkeypatch.delenv("TINYGRAD2_BLAS")
    monkeypatch.setattr(blas, "_mkl", lambda: mkl)
    monkeypatch.setattr(blas, "_fastest", lambda: blas.NUMPYS)
    monkeypatch.setattr(blas, "_chosen", None)


def stored_blas():
    (state,) = Path("out").glob("ckpt-*/trainer.json")
    return state, json.loads(state.read_text())


def test_the_blas_library_is_printed_and_stored_in_the_checkpoint(workspace, capsys):
    run("--max-iters", "1", "--save-interval", "0")
    title = blas.NUMPYS.title
    assert f"\nproducts   {title}, " in capsys.readouterr().out
    assert stored_blas()[1]["blas"] == {"name": "numpy", "title": title, "processor": machine.processor_model()}


@pytest.mark.parametrize(
    ("changes", "name", "note"),
    [
        ({}, "mkl", ""),  # although NumPy's would be chosen here
        ({"processor": "P"}, "numpy", "until now by MKL 9.9 on another processor, from now on by OpenBLAS"),
        ({"title": "MKL 8"}, "mkl", "until now by MKL 8, from now on by MKL 9.9: rounding differs"),
        ({"name": "atlas", "title": "ATLAS"}, "numpy", "until now by ATLAS, from now on by OpenBLAS"),
    ],
)
def test_a_resumed_run_uses_the_blas_library_of_its_start(workspace, capsys, with_mkl, changes, name, note):
    run("--max-iters", "1", "--keep", "1")
    state, values = stored_blas()
    before = {"name": "mkl", "title": "MKL 9.9", "processor": machine.processor_model(), **changes}
    state.write_text(json.dumps({**values, "blas": before}))
    update_checksums(state.parent)
    capsys.readouterr()
    run("--max-iters", "2", "--keep", "1")
    assert blas.chosen().name == name
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("products   until")]
    assert len(lines) == bool(note)
    assert note in "".join(lines)
    best, latest = sorted(Path("out").glob("ckpt-*/trainer.json"))[0], sorted(Path("out").glob("ckpt-*"))[-1]
    assert best.exists()
    assert json.loads((latest / "trainer.json").read_text())["blas"]["name"] == name


def test_ranks_on_equal_processors_use_the_library_of_rank_0(with_mkl, monkeypatch):
    class Root:
        """The communicator of rank 1, after rank 0 has chosen a library."""

        def __init__(self, *decided):
            self.decided = decided

        def from_root(self, function):
            return self.decided

    for processor, name in ((machine.processor_model(), "mkl"), ("another", "numpy")):
        monkeypatch.setattr(blas, "_chosen", None)
        settled = options.resolve_options({"device": "cpu"}, GPT2Config.preset("nano"))
        setup.choose_blas(settled, RunOptions({}, {}), None, Root(processor, "mkl"))
        assert blas.chosen().name == name
