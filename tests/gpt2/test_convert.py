"""Model files of every kind, read as they are and converted into each other."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import sample
import train
from data.prepare import prepare
from gpt2 import GPT2, GPT2Config, Tokenizer, convert
from gpt2.config import is_matrix
from gpt2.formats import hub, model_file, torch_file
from gpt2.formats.model_file import find_model
from gpt2.formats.stored import Stored

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": 257, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def random_model(**changes):
    """Its biases and gains are random too, so that no tensor can be taken for another one."""
    model = GPT2(GPT2Config(**{**SIZES, **NO_DROPOUT, **changes}))
    random = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data = random.standard_normal(parameter.shape).astype("float32")
    return model


@pytest.fixture
def model():
    return random_model()


def values(model):
    return {name: parameter.data for name, parameter in model.named_parameters()}


def linear(model, prefix="transformer."):
    """The state dict as nanoGPT and build-nanogpt have it: matrices as (out, in), the output layer, tied."""
    arrays = {prefix + name: a.T.copy() if is_matrix(name) else a for name, a in values(model).items()}
    return arrays | {f"{prefix.removesuffix('transformer.')}lm_head.weight": arrays[f"{prefix}wte.weight"]}


def stored(arrays):
    return {name: Stored(a.shape, a.dtype.name, lambda a=a: a) for name, a in arrays.items()}


def assert_equal(model, other):
    assert other.config == model.config
    for name, array in values(model).items():
        assert np.array_equal(array, values(other)[name]), name


NANOGPT = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True, "vocab_size": 257, "dropout": 0.2}


def nanogpt(path, arrays, **changes):
    checkpoint = {"model": stored(arrays), "optimizer": {"state": {}}, "model_args": {**NANOGPT, **changes}}
    torch_file.write_pickle(path, {**checkpoint, "iter_num": 5, "config": {"dataset": "x", "n_layer": 2, "n_head": 2}})
    return path


def test_round_trips_are_equal_bit_by_bit(model, tmp_path):
    """Each format into each, and back: six files from one."""
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


def test_a_config_survives_a_file_of_pytorch(tmp_path):
    model = random_model(activation_function="gelu", layer_norm_epsilon=1e-6, attn_pdrop=0.3, initializer_range=0.1)
    model.save_pretrained(tmp_path / "start")
    convert.convert(tmp_path / "start", tmp_path / "model.pt", "pt")
    assert_equal(model, GPT2.from_pretrained(tmp_path / "model.pt"))


@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer.", "module._orig_mod.transformer."])
def test_checkpoints_of_nanogpt(prefix, model, tmp_path):
    """They compute GELU's exact form, and are compiled or not."""
    found = GPT2.from_pretrained(nanogpt(tmp_path / "ckpt.pt", linear(model, prefix)))
    rates = dict.fromkeys(NO_DROPOUT, 0.2)
    assert found.config == GPT2Config(**SIZES, **rates, activation_function="gelu")
    assert all(np.array_equal(array, values(found)[name]) for name, array in values(model).items())


def test_a_nanogpt_without_biases(model, tmp_path):
    arrays = {name: array for name, array in linear(model).items() if not name.endswith(".bias")}
    found = GPT2.from_pretrained(nanogpt(tmp_path / "ckpt.pt", arrays, bias=False))
    for name, array in values(model).items():
        assert np.array_equal(values(found)[name], np.zeros_like(array) if name.endswith(".bias") else array)


def test_one_bias_that_is_missing_is_an_error(model, tmp_path):
    arrays = linear(model)
    del arrays["transformer.h.1.attn.c_attn.bias"]
    with pytest.raises(ValueError, match=r"ckpt.pt: tensor h.1.attn.c_attn.bias is missing"):
        GPT2.from_pretrained(nanogpt(tmp_path / "ckpt.pt", arrays))


def test_the_padded_vocabulary_of_gpt2_is_cut(tmp_path):
    model = random_model(vocab_size=50304)
    found = GPT2.from_pretrained(nanogpt(tmp_path / "ckpt.pt", linear(model), vocab_size=50304))
    assert found.config.vocab_size == 50257
    assert np.array_equal(found.wte.weight.data, model.wte.weight.data[:50257])


def test_a_vocabulary_that_a_config_json_pads_is_kept(tmp_path):
    model = random_model(vocab_size=50304)
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b.pt", "pt")
    assert_equal(model, GPT2.from_pretrained(tmp_path / "b.pt"))


def with_config_object(path, arrays, attributes, name="__main__\nGPTConfig"):
    """A checkpoint of build-nanogpt: torch.save pickles the config with the name of its class."""
    import pickle
    import zipfile

    torch_file.write_pickle(path, {"model": stored(arrays), "config": "HERE", "step": 5, "val_loss": 3.5})
    with zipfile.ZipFile(path) as file:
        content = {info.filename: file.read(info) for info in file.infolist()}
    state = pickle.dumps(attributes, 2)[2:-1]
    here = b"X\x04\x00\x00\x00HERE"
    program = content["archive/data.pkl"]
    assert program.count(here) == 1
    content["archive/data.pkl"] = program.replace(here, f"c{name}\n)\x81".encode("latin-1") + state + b"b")
    with zipfile.ZipFile(path, "w") as file:
        for entry, data in content.items():
            file.writestr(entry, data)
    return path


CONFIG = {"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 8}


def test_checkpoints_of_build_nanogpt(model, tmp_path):
    """The tanh form, and no dropout."""
    assert_equal(model, GPT2.from_pretrained(with_config_object(tmp_path / "a.pt", linear(model), CONFIG)))
    other = with_config_object(tmp_path / "b.pt", linear(model), CONFIG, "train_gpt2\nGPTConfig")
    assert_equal(model, GPT2.from_pretrained(other))


def test_a_config_object_of_nanogpt_has_the_exact_form(model, tmp_path):
    path = with_config_object(tmp_path / "a.pt", linear(model), {**CONFIG, "dropout": 0.0, "bias": True})
    assert model_file.load_config(path).activation_function == "gelu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": "2"}, "n_layer is '2'"),
        ({"n_layer": [[]]}, "n_layer is 'list'"),
        ({"n_layer": 10**9}, "tensor h.2.ln_1.weight is missing"),
        ({"n_layer": 2**40}, "n_layer is 1099511627776; expected a positive integer"),
        ({"n_embd": 2**30}, "tensor wte.weight has shape (257, 8); expected (257, 1073741824)"),
        ({"n_head": 3}, "is not a multiple"),
        ({"dropout": "x"}, "embd_pdrop is 'x'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_a_model_is_made(change, message, model, tmp_path):
    path = nanogpt(tmp_path / "ckpt.pt", linear(model), **change)
    with pytest.raises(ValueError, match=r"ckpt.pt: ") as error:
        GPT2.from_pretrained(path)
    assert message in str(error.value)


def test_a_config_without_a_value(model, tmp_path):
    path = with_config_object(tmp_path / "a.pt", linear(model), {"n_head": 2, "vocab_size": 257})
    with pytest.raises(ValueError, match=r"a.pt: 'block_size' is missing"):
        model_file.load_config(path)


@pytest.mark.parametrize("tree", [[1], {"a": 1}, {"model": {}}, {"model": {"wte.weight": 3}}])
def test_a_file_of_pytorch_without_a_model(tree, tmp_path):
    torch_file.write_pickle(tmp_path / "x.pt", tree)
    with pytest.raises(ValueError, match=r"x.pt: it (is a pickled|has no state dict)"):
        model_file.open_model(tmp_path / "x.pt")


def test_a_plain_state_dict_takes_the_config_beside_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    for name, arrays in (("linear.pt", linear(model)), ("conv.bin", values(model))):
        torch_file.write_pickle(tmp_path / name, stored(arrays))
        assert_equal(model, GPT2.from_pretrained(tmp_path / name))
    assert_equal(model, GPT2.from_pretrained(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"linear.pt: it has no config, .* put its config.json beside it"):
        model_file.open_model(tmp_path / "linear.pt")


def test_the_published_sizes_need_no_config():
    """Checked on shapes alone: their arrays are large."""
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = GPT2Config.preset(name)
        arrays = {key: Stored(shape, "float32", lambda: None) for key, shape in config.shapes()}
        assert model_file._published(arrays) == config


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_folders_of_hugging_face(kind, shards, model, tmp_path):
    """Whole and in shards, safetensors and PyTorch's."""
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    items = list(values(model).items())
    stem, suffix = kind.split(".")
    names = [kind] if shards == 1 else [f"{stem}-{i:05}-of-{shards:05}.{suffix}" for i in range(shards)]
    for i, name in enumerate(names):
        part = dict(items[i::shards])
        if suffix == "bin":
            torch_file.write_pickle(tmp_path / name, stored(part))
        else:
            save_file(part, tmp_path / name)
    if shards > 1:
        places = {key: names[i % shards] for i, (key, _) in enumerate(items)}
        (tmp_path / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_equal(model, GPT2.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([], "weight_map"),
        ({"weight_map": ["model.safetensors"]}, "does not map each tensor to a file"),
        ({"weight_map": {"wte.weight": 3}}, "does not map each tensor to a file"),
        ({"weight_map": {"wte.weight": "../model.safetensors"}}, "is not the name of a file in this folder"),
        ({"weight_map": {"wte.weight": "/etc/passwd"}}, "is not the name of a file in this folder"),
        ({"weight_map": {"wte.weight": "model.safetensors.index.json"}}, "is not the name of a file in this folder"),
        ({"weight_map": {"wte.weight": "other.safetensors"}}, "the shard 'other.safetensors' is missing"),
        ({"weight_map": {"nonsense": "part.safetensors"}}, "tensor nonsense is not in part.safetensors"),
        ({"weight_map": {"wte.weight": "config.json"}}, "config.json: "),
    ],
)
def test_a_list_of_shards_that_is_wrong(places, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: ") as error:
        model_file.open_model(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def write_llmc(path, model, version=3, padded=384, dtype="<f4"):
    """As llm.c's train_gpt2.py writes it, on its own."""
    c = model.config
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, version, c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded
    arrays = values(model)
    parts = [np.pad(arrays["wte.weight"], ((0, padded - c.vocab_size), (0, 0))), arrays["wpe.weight"]]
    for kind in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for part in ("weight", "bias"):
            parts += [arrays[f"h.{layer}.{kind}.{part}"].T for layer in range(c.n_layer)]
    parts += [arrays["ln_f.weight"], arrays["ln_f.bias"]]
    path.write_bytes(header.tobytes() + b"".join(np.ascontiguousarray(part).astype(dtype).tobytes() for part in parts))
    return path


def test_files_of_llmc_have_its_layout(model, tmp_path):
    written = write_llmc(tmp_path / "theirs.bin", model)
    assert_equal(model, GPT2.from_pretrained(written))
    model.save_pretrained(tmp_path / "hf")
    convert.convert(tmp_path / "hf", tmp_path / "ours.bin", "llmc")
    assert (tmp_path / "ours.bin").read_bytes() == written.read_bytes()


def test_bfloat16_files_of_llmc(model, tmp_path):
    written = write_llmc(tmp_path / "theirs.bin", model, version=5, dtype="bfloat16")
    found = GPT2.from_pretrained(written)
    for name, array in values(model).items():
        assert np.array_equal(values(found)[name], array.astype("bfloat16").astype("float32"))
    convert.convert(written, tmp_path / "wide.bin", "llmc")
    convert.convert(tmp_path / "wide.bin", tmp_path / "again.bin", "llmc", "bfloat16")
    assert (tmp_path / "again.bin").read_bytes() == written.read_bytes()


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (1, 4, "version 4"),
        (1, 1, "version 1"),
        (2, 17, "from its header"),
        (3, 400, "the padded vocabulary has 384 tokens"),
        (4, 2**31 - 1, "from its header"),
        (4, -1, "n_layer is -1"),
        (5, 3, "is not a multiple"),
        (6, 2**30, "from its header"),
        (7, 2**31 - 1, "from its header"),
    ],
)
def test_a_header_of_llmc_that_is_wrong(word, value, message, model, tmp_path):
    path = write_llmc(tmp_path / "x.bin", model)
    content = bytearray(path.read_bytes())
    content[4 * word : 4 * word + 4] = value.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.bin: ") as error:
        GPT2.from_pretrained(path)
    assert message in str(error.value)


@pytest.mark.parametrize("keep", [4, 1023, 1024, -1])
def test_a_truncated_file_of_llmc(keep, model, tmp_path):
    path = write_llmc(tmp_path / "x.bin", model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x.bin: it "):
        GPT2.from_pretrained(path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("form", ["hf", "pt"])
def test_values_of_two_bytes(dtype, form, model, tmp_path):
    model.save_pretrained(tmp_path / "start")
    convert.convert(tmp_path / "start", tmp_path / "half", form, dtype)
    found = values(GPT2.from_pretrained(tmp_path / "half"))
    for name, array in values(model).items():
        assert np.array_equal(found[name], array.astype(dtype).astype("float32"))
    if form == "hf":
        assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == dtype


def run(*arguments, code=0):
    assert convert.main([str(argument) for argument in arguments]) == code


def test_the_command(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "a")
    run(tmp_path / "a", tmp_path / "b.pt", "--to", "pt")
    assert capsys.readouterr().out == f"{tmp_path / 'b.pt'}: written from {tmp_path / 'a'}\n"
    run(tmp_path / "b.pt", tmp_path / "c", "--to", "hf", "--activation", "gelu", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (config["activation_function"], config["torch_dtype"]) == ("gelu", "bfloat16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.pt", "c"]


def test_mistakes_get_one_line_and_leave_nothing(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "there.pt").write_text("mine")
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    exact = random_model(activation_function="gelu")
    exact.save_pretrained(tmp_path / "exact")
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        ([tmp_path / "a", tmp_path / "there.pt", "--to", "pt"], "there.pt: it exists already"),
        ([tmp_path / "x.pt", tmp_path / "y", "--to", "hf"], "x.pt: it is not a file of torch.save"),
        ([tmp_path / "nowhere", tmp_path / "y", "--to", "hf"], "nowhere: no such file or folder"),
        ([tmp_path / "exact", tmp_path / "y", "--to", "llmc"], "llm.c computes GELU's tanh form"),
        ([tmp_path / "a", tmp_path / "y", "--to", "llmc", "--dtype", "float16"], "llm.c does not support float16"),
        ([tmp_path / "a", tmp_path / "no" / "y", "--to", "pt"], "No such file or directory"),
    ):
        run(*arguments, code=1)
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith("gpt2.convert: ")
        assert message in line
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_what_fails_in_the_middle_leaves_nothing(model, tmp_path, monkeypatch):
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


def test_torch_is_not_needed(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from gpt2.convert import main\n"
        "sys.exit(main(['a', 'b', '--to', 'pt']) or main(['b', 'c', '--to', 'llmc']) or main(['c', 'd', '--to', 'hf']))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, check=True)
    assert_equal(model, GPT2.from_pretrained(tmp_path / "d"))


# The tokenizer


def test_a_folder_has_the_tokenizer(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", "hf")
    assert Tokenizer.for_model(tmp_path / "b", 257).fingerprint == Tokenizer.load("bytes").fingerprint
    ids = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 256, "eos_token_id": 256}


def test_gpt2s_tokenizer_is_written_as_published(gpt2_files, tmp_path):
    tokenizer = Tokenizer.load("gpt2")
    tokenizer.save_hugging_face(tmp_path, 1024)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    published = (gpt2_files / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").read_text(encoding="utf-8")  # vocab.bpe
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == published
    names = json.loads((gpt2_files / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == names


def test_a_model_without_a_tokenizer_is_written_without(tmp_path, capsys):
    random_model(vocab_size=99).save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b", "hf")
    assert "no tokenizer is known for a vocabulary of 99" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_the_tokenizer_of_a_model_file(model, tmp_path, gpt2_files):
    """The one beside it, but GPT-2's for GPT-2's vocabulary."""
    Tokenizer.load("bytes").save(tmp_path)
    (tmp_path / "model.pt").touch()
    assert Tokenizer.for_model(tmp_path / "model.pt", 257).name == "bytes"
    assert Tokenizer.for_model(tmp_path / "model.pt", 300).name == "bytes"
    assert Tokenizer.for_model(tmp_path / "model.pt", 50257).name == "gpt2"
    assert Tokenizer.for_model(tmp_path / "model.pt", 50304).name == "gpt2"
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model only 99"):
        Tokenizer.for_model(tmp_path / "model.pt", 99)


# sample.py and train.py take every format


@pytest.fixture
def user(model, tmp_path, monkeypatch):
    """A folder with the same model in every format, and where it is to be found."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    for form in ("pt", "llmc"):
        convert.convert("model", f"model.{form}", form)
    return tmp_path


def said(capsys, *options):
    assert sample.main(["-m", "8", "-t", "0", *options]) == 0
    return capsys.readouterr()


def test_sample_takes_every_format(user, capsys):
    expected = said(capsys, "--checkpoint", "model").out
    for name in ("model.pt", "model.llmc", "model/model.safetensors"):
        found = said(capsys, "--checkpoint", name)
        assert found.out == expected
        assert found.err == f"model: {name}\n"


def test_pt_files_in_checkpoint_and_out_are_found(user, capsys):
    Path("out").mkdir()
    for age, name in ((30, "ckpt.pt"), (20, "a.pt"), (40, "b.pt")):
        Path("out", name).write_bytes(Path("model.pt").read_bytes())
        os.utime(Path("out", name), (10**9 - age, 10**9 - age))
    assert said(capsys).err == "model: out/a.pt\n"
    assert said(capsys, "--checkpoint", "out").err == "model: out/a.pt\n"
    Path("checkpoint").mkdir()
    Path("model.pt").rename("checkpoint/gpt2.pt")
    assert said(capsys).err == "model: checkpoint/gpt2.pt\n"


@pytest.mark.parametrize("name", ["model", "model.pt", "model.llmc", "model/model.safetensors"])
def test_training_starts_from_every_format(user, name, capsys):
    Path("text.txt").write_text("".join(f"{i} times {i + 1} is {i * (i + 1)}\n" for i in range(400)))
    prepare(["text.txt"], "bytes", Path("data/text"))
    quick = ["--data", "text", "--max-iters", "1", "--batch-size", "2", "--eval-iters", "1", "--learning-rate", "1e-9"]
    assert train.main([*quick, "--init", name]) == 0
    found = values(GPT2.from_pretrained("out/ckpt-000001"))
    for key, array in values(GPT2.from_pretrained("model")).items():
        np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-6)


# The hub


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the list of a repository's files, and the files."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def answer(self, content, **headers):
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        repository, revision = "openai-community/gpt2", hub.REVISIONS["gpt2"]
        files = [path.name for path in self.folder.iterdir()]
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/{repository}/resolve/{revision}/")
        if path.startswith(f"/api/models/{repository}/tree/{revision}"):
            tree = [
                {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": name}
                for name in files
            ]
            self.answer(json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/models/{repository}/revision/{revision}"):
            info = {"id": repository, "sha": revision, "siblings": [{"rfilename": name} for name in files]}
            self.answer(json.dumps(info).encode(), Content_Type="application/json")
        elif name in files:
            content = (self.folder / name).read_bytes()
            self.answer(content, ETag=f'"{name}"', X_Repo_Commit=revision)
        else:
            self.send_error(404)


def run_sample(folder, endpoint, *, code=0, **environment):
    command = [sys.executable, ROOT / "sample.py", "--checkpoint", "gpt2", "-m", "4", "-t", "0"]
    network = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **network, **environment}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


def test_names_are_downloaded_once(model, tmp_path):
    pytest.importorskip("huggingface_hub")
    (tmp_path / "gpt2").mkdir()  # as in the repository: a folder of this name that holds no model
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "served", "hf")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        first = run_sample(tmp_path, endpoint)
        server.shutdown()
    assert f"snapshots/{hub.REVISIONS['gpt2']}" in first.stderr
    assert not list((tmp_path / "cache").rglob("generation_config.json"))  # only what is read
    again = run_sample(tmp_path, endpoint)  # the server is gone
    assert again.stdout == first.stdout != ""


UNREACHABLE = "sample.py: gpt2: it could not be downloaded from the Hugging Face hub"


def test_without_a_network_there_is_one_line(tmp_path):
    pytest.importorskip("huggingface_hub")
    (line,) = run_sample(tmp_path, "http://127.0.0.1:9", code=1, HF_HUB_OFFLINE="1").stderr.splitlines()
    assert line.startswith(UNREACHABLE)


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_asked_again(tmp_path):
    """The library says so, five times, before it gives up."""
    pytest.importorskip("huggingface_hub")
    *retries, line = run_sample(tmp_path, "http://127.0.0.1:9", code=1).stderr.splitlines()
    assert sum("Retry" in retry for retry in retries) == 5
    assert line.startswith(UNREACHABLE)


def test_without_the_library_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'gpt2-xl: to download it, install .* pip install -e "\.\[hub\]"'):
        find_model(Path("gpt2-xl"), print)


def test_every_name_is_a_preset():
    assert all(name in hub.REVISIONS for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    assert all(GPT2Config.preset(name).vocab_size == 50257 for name in hub.REVISIONS)


# PyTorch and transformers


@pytest.mark.parity
def test_transformers_computes_the_same_from_an_exported_folder(tmp_path, gpt2_files):
    """By way of both other formats to a folder: equal logits, equal greedy text, equal ids of a text."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
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


@pytest.mark.parity
def test_transformers_shards_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    theirs.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = values(GPT2.from_pretrained(tmp_path))
    for name, tensor in theirs.transformer.named_parameters():
        assert np.array_equal(found[name], tensor.detach().numpy())


@pytest.mark.parity
def test_pytorch_reads_the_exported_state_dict(model, tmp_path):
    torch = pytest.importorskip("torch")
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b.pt", "pt")
    checkpoint = torch.load(tmp_path / "b.pt", weights_only=True)
    assert checkpoint["model_args"] == {**NANOGPT, "dropout": 0.0}
    expected = linear(model)
    assert checkpoint["model"].keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(checkpoint["model"][name].numpy(), array)
    tied = [checkpoint["model"][name] for name in ("lm_head.weight", "transformer.wte.weight")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
