"""gpt2/formats/huggingface.py: folders written by transformers, with and without shards, and damaged folders."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gpt2 import GPT2, GPT2Config
from gpt2.formats import model_file, torch_file
from tests.gpt2.formats.models import assert_equal, random_model, stored, values

SIZES = {"vocab_size": 13, "n_positions": 6, "n_embd": 8, "n_layer": 2, "n_head": 2}


@pytest.fixture
def model():
    return random_model(**SIZES, activation_function="gelu", attn_pdrop=0.3, layer_norm_epsilon=1e-4)


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change, metadata=None):
    """Load the file, let `change` modify or replace the dictionary of arrays, and save the file."""
    arrays = load_file(folder / "model.safetensors")
    arrays = change(arrays) or arrays
    save_file(arrays, folder / "model.safetensors", metadata)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_saved_model_is_loaded_bit_for_bit(dtype, tmp_path):
    model = GPT2(GPT2Config(**SIZES), seed=4, dtype=dtype)
    model.arena()  # makes the parameters views of flat buffers, as after training
    model.save_pretrained(tmp_path / "made" / "here")
    assert_equal(GPT2.from_pretrained(tmp_path / "made" / "here", dtype=dtype), model)


def test_saving_replaces_existing_files(model, folder):
    other = GPT2(GPT2Config(**{**SIZES, "n_layer": 1}), seed=9)
    other.save_pretrained(folder)
    assert_equal(GPT2.from_pretrained(folder), other)


def test_saved_folders_have_the_hugging_face_layout(folder):
    values = json.loads((folder / "config.json").read_text())
    assert values["architectures"] == ["GPT2LMHeadModel"]
    assert values["torch_dtype"] == "float32"
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers rejects files without it
        names = set(file.keys())
        assert file.get_tensor("transformer.h.1.mlp.c_fc.weight").shape == (8, 32)
    assert "lm_head.weight" not in names
    assert len(names) == 2 + 12 * 2 + 2
    assert all(name.startswith("transformer.") for name in names)


def unprefixed(arrays):
    return {name.removeprefix("transformer."): values for name, values in arrays.items()}


def with_head(arrays):
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"].copy()


def with_buffers(arrays):
    for layer in range(2):
        arrays[f"transformer.h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 6, 6), "uint8"))
        arrays[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, "float32")


def published(arrays):
    """The layout of the published `gpt2`: no prefix, with causal masks, without head."""
    with_buffers(arrays)
    return unprefixed(arrays)


@pytest.mark.parametrize("change", [unprefixed, with_head, with_buffers, published])
def test_every_common_layout_is_read(change, model, folder):
    rewrite(folder, change)
    assert_equal(GPT2.from_pretrained(folder), model)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_other_dtypes_are_converted(stored, dtype, model, folder):
    stored = np.dtype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    rewrite(folder, lambda arrays: {name: values.astype(stored) for name, values in arrays.items()})
    for parameter, original in zip(
        GPT2.from_pretrained(folder, dtype=dtype).parameters(), model.parameters(), strict=True
    ):
        assert parameter.dtype == dtype
        np.testing.assert_array_equal(parameter.data, original.data.astype(stored).astype(dtype))


def test_a_tied_head_in_half_precision_is_accepted(model, folder):
    def change(arrays):
        with_head(arrays)
        return {name: values.astype(ml_dtypes.bfloat16) for name, values in arrays.items()}

    rewrite(folder, change)
    GPT2.from_pretrained(folder)


def missing(arrays):
    del arrays["transformer.h.1.ln_2.bias"]


def unexpected(arrays):
    arrays["transformer.h.2.ln_1.weight"] = np.ones(8, "float32")


def misshapen(arrays):
    arrays["transformer.wpe.weight"] = np.zeros((7, 8), "float32")


def transposed(arrays):
    arrays["transformer.h.1.attn.c_attn.weight"] = np.zeros((24, 8), "float32")


def integers(arrays):
    arrays["transformer.ln_f.bias"] = np.zeros(8, "int32")


def untied(arrays):
    arrays["lm_head.weight"] = arrays["transformer.wte.weight"] + 1


def other_vocabulary(arrays):
    arrays["lm_head.weight"] = np.zeros((16, 8), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, "tensor h.1.ln_2.bias is missing"),
        (unexpected, "tensor h.2.ln_1.weight is not a parameter of this model"),
        (misshapen, "tensor wpe.weight has shape (7, 8); expected (6, 8)"),
        (transposed, "tensor h.1.attn.c_attn.weight has shape (24, 8); expected (8, 24)"),
        (integers, "tensor ln_f.bias has dtype I32; expected one of float64, float32, float16, bfloat16"),
        (untied, "lm_head.weight differs from wte.weight"),
        (other_vocabulary, "lm_head.weight differs from wte.weight"),
    ],
)
def test_the_error_names_the_invalid_tensor(change, message, folder):
    rewrite(folder, change)
    assert_load_fails(folder, "model.safetensors", message)


def assert_load_fails(folder, file, message, kind=ValueError):
    with pytest.raises(kind) as error:
        GPT2.from_pretrained(folder)
    text = str(error.value)
    assert text.startswith(f"{folder / file}: ")
    assert re.search(re.escape(message), text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, which is not supported"),
        ({"activation_function": "silu"}, "activation_function is 'silu'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_inner": 16}, "n_inner is 16"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"vocab_size": "13"}, "vocab_size is '13'"),
    ],
)
def test_unsupported_configurations_are_rejected(changes, message, folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert_load_fails(folder, "config.json", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is an empty file"),
        (b'{"n_layer": 2,', "Expecting property name"),
        (b"[1, 2]", "it is not a JSON object"),
        (b"\xff\xfe{", "codec can't decode"),
    ],
)
def test_a_damaged_config_is_rejected(content, message, folder):
    (folder / "config.json").write_bytes(content)
    assert_load_fails(folder, "config.json", message)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_rejected(keep, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert_load_fails(folder, "model.safetensors", "header")


def test_a_file_in_another_format_is_rejected(folder):
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(1000))
    assert_load_fails(folder, "model.safetensors", "File is not a zip file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_an_error(name, folder):
    (folder / name).unlink()
    assert_load_fails(folder, name, "no such file; a model folder has config.json and", FileNotFoundError)


def test_a_missing_folder_is_an_error(tmp_path):
    assert_load_fails(tmp_path / "nowhere", "config.json", "no such file", FileNotFoundError)


# Shards


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_folders(kind, shards, model, tmp_path):
    """Folders with and without shards are read, in safetensors format and in PyTorch's."""
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
def test_an_invalid_shard_index_is_rejected(places, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    with pytest.raises(ValueError, match=r"model.safetensors.index.json: ") as error:
        model_file.open_model(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parity
@pytest.mark.extras("transformers")
def test_shards_written_by_transformers_are_read(tmp_path):
    import transformers

    sizes = {"vocab_size": 99, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    theirs.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = values(GPT2.from_pretrained(tmp_path))
    for name, tensor in theirs.transformer.named_parameters():
        assert np.array_equal(found[name], tensor.detach().numpy())
