"""gpt2/formats/model_file.py: the tensors and sizes that a file in any layout must have."""

import re
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt2 import GPT2, GPT2Config, convert
from gpt2.formats import model_file, torch_file
from gpt2.formats.stored import Stored
from tests.gpt2.formats.models import assert_equal, linear, nanogpt, random_model, stored, values


@pytest.fixture
def model():
    return random_model()


def test_a_single_missing_bias_is_an_error(model, tmp_path):
    arrays = linear(model)
    del arrays["transformer.h.1.attn.c_attn.bias"]
    with pytest.raises(ValueError, match=r"ckpt.pt: tensor h.1.attn.c_attn.bias is missing"):
        GPT2.from_pretrained(nanogpt(tmp_path / "ckpt.pt", arrays))


def test_the_padding_of_gpt2s_vocabulary_is_removed(tmp_path):
    model = random_model(vocab_size=50304)
    found = GPT2.from_pretrained(nanogpt(tmp_path / "ckpt.pt", linear(model), vocab_size=50304))
    assert found.config.vocab_size == 50257
    assert np.array_equal(found.wte.weight.data, model.wte.weight.data[:50257])


def test_a_padded_vocabulary_in_config_json_is_kept(tmp_path):
    model = random_model(vocab_size=50304)
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b.pt", "pt")
    assert_equal(model, GPT2.from_pretrained(tmp_path / "b.pt"))


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
def test_an_invalid_config_is_rejected_before_a_model_is_created(change, message, model, tmp_path):
    path = nanogpt(tmp_path / "ckpt.pt", linear(model), **change)
    with pytest.raises(ValueError, match=r"ckpt.pt: ") as error:
        GPT2.from_pretrained(path)
    assert message in str(error.value)


def test_a_plain_state_dict_uses_the_config_next_to_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    for name, arrays in (("linear.pt", linear(model)), ("conv.bin", values(model))):
        torch_file.write_pickle(tmp_path / name, stored(arrays))
        assert_equal(model, GPT2.from_pretrained(tmp_path / name))
    assert_equal(model, GPT2.from_pretrained(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"linear.pt: it has no config, .* put its config.json next to it"):
        model_file.open_model(tmp_path / "linear.pt")


def test_published_sizes_need_no_config():
    """The test uses shapes only, because the arrays are large."""
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = GPT2Config.preset(name)
        arrays = {key: Stored(shape, "float32", lambda: None) for key, shape in config.shapes()}
        assert model_file._published(arrays) == config


# Names


def embedding_only(arrays):
    """Names with the prefix of another trainer."""
    return {f"policy.base_model.transformer.{name}": a for name, a in arrays.items()}


def wrapped(name):
    def change(arrays):
        parts = ((key.split("."), a) for key, a in arrays.items())
        return {".".join(["transformer", *key[:2], name, *key[2:]]): a for key, a in parts}

    return change


def everywhere(arrays):
    inside = {f"h.{key[2:]}" if key.startswith("h.") else key: a for key, a in arrays.items()}
    return {f"module._orig_mod.transformer.{key.replace('.', '._orig_mod.', 1)}": a for key, a in inside.items()}


def head_only(arrays):
    renamed = {f"transformer.{key}": a for key, a in arrays.items() if key != "wte.weight"}
    return renamed | {"lm_head.weight": arrays["wte.weight"]}


def head_only_below_a_prefix(arrays):
    return {f"model.{key}": a for key, a in head_only(arrays).items()}


WRAPPERS = (
    "_orig_mod",
    "module",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
    "_some_other",
)
NAMINGS = [embedding_only, everywhere, head_only, head_only_below_a_prefix, *map(wrapped, WRAPPERS)]


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_names_with_any_prefix_or_wrapper_are_read(naming, form, model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    arrays = naming(values(model))
    if form == "model.safetensors":
        save_file(arrays, tmp_path / form, {"format": "pt"})
    else:
        torch_file.write_pickle(tmp_path / form, stored(arrays))
    assert_equal(model, GPT2.from_pretrained(tmp_path))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("prefix", ["", "transformer.", "pretrained_model.transformer."])
def test_other_heads_are_ignored_and_reported(prefix, model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    outer = prefix.removesuffix("transformer.")
    more = {f"v_head.summary.{i}": np.ones(8, "float32") for i in range(5)} | {
        "score.weight": np.ones((2, 8), "float32")
    }
    arrays = {prefix + name: a for name, a in values(model).items()} | {f"{outer}{name}": a for name, a in more.items()}
    save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
    assert_equal(model, GPT2.from_pretrained(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"{tmp_path / 'model.safetensors'}: ignored, since they are not part of the language model: "
    )
    assert f"{outer}v_head.summary.0" in line
    assert line.endswith(" and 1 more")


@pytest.mark.parametrize("name", ["lm_head.bias", "model.lm_head.bias"])
def test_a_bias_of_the_output_layer_is_rejected_unless_it_is_zero(name, model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    for value in (0.0, 0.5):
        arrays = values(model) | {name: np.full(257, value, "float32")}
        save_file(arrays, tmp_path / "model.safetensors", {"format": "pt"})
        if value == 0:
            assert_equal(model, GPT2.from_pretrained(tmp_path))
            assert capsys.readouterr().err == ""
        else:
            with pytest.raises(ValueError, match=r"model.safetensors: lm_head.bias is not zero; this model's output"):
                GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "base_model.model.h.0.attn.c_attn.lora_A.default.weight",
            "it has an unmerged adapter (peft, LoRA)",
        ),
        ("h.1.mlp.c_fc.qweight", "it has quantized weights (GPTQ, AWQ), which are not supported"),
        ("h.1.mlp.c_fc.weight_scale", "it has quantized weights, which are not supported"),
        ("h.0.adapter.weight", "tensor h.0.adapter.weight is not a parameter of this model"),
    ],
)
def test_adapters_and_quantized_weights_are_rejected_by_name(name, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    save_file(values(model) | {name: np.ones(8, "float32")}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(message)):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["model", "state_dict", "module", "net", "ema"])
def test_a_single_dictionary_of_tensors_is_read_as_the_model(key, model, tmp_path):
    model.save_pretrained(tmp_path)
    torch_file.write_pickle(tmp_path / "x.pt", {"epoch": 3, key: stored(values(model)), "options": {"lr": 1e-3}})
    assert_equal(model, GPT2.from_pretrained(tmp_path / "x.pt"))


def test_several_dictionaries_of_tensors_are_an_error(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch_file.write_pickle(tmp_path / "x.pt", {"net": stored(values(model)), "ema": stored(values(model))})
    with pytest.raises(ValueError, match=r"it has no state dict, or several; .*; its keys are net, ema"):
        GPT2.from_pretrained(tmp_path / "x.pt")


def test_two_models_in_one_file_are_an_error(model, tmp_path):
    arrays = {f"{part}.{name}": a for part in ("policy", "reference") for name, a in values(model).items()}
    torch_file.write_pickle(tmp_path / "x.pt", stored(arrays))
    with pytest.raises(ValueError, match=r"it has 2 models, with policy.wte.weight and reference.wte.weight"):
        model_file.open_model(tmp_path / "x.pt")


def test_a_duplicate_name_is_an_error(model, tmp_path):
    arrays = values(model) | {"module.wpe.weight": values(model)["wpe.weight"]}
    torch_file.write_pickle(tmp_path / "x.pt", stored(arrays))
    with pytest.raises(ValueError, match=r"tensor wpe.weight occurs twice"):
        model_file.open_model(tmp_path / "x.pt")


# Files that would take much time or memory


def test_a_name_with_millions_of_prefixes_is_rejected_immediately(tmp_path):
    for count, message in ((1_000_000, "has 7,000,010 characters"), (1_500_000, "its header has 10,500,0.. bytes")):
        save_file({"module." * count + "wte.weight": np.zeros(1, "float32")}, tmp_path / "x.safetensors")
        begin = time.process_time()
        with pytest.raises(ValueError, match=message):
            model_file.open_model(tmp_path / "x.safetensors")
        assert time.process_time() - begin < 2


def test_tensors_that_share_their_memory_are_rejected(model, tmp_path):
    """A model with 500 layers that all share the same arrays: a small file, but large in memory."""
    whole = linear(model, "")
    arrays = {name: a for name, a in whole.items() if not name.startswith("h.")}
    parts = {name.removeprefix("h.0."): a for name, a in whole.items() if name.startswith("h.0.")}
    tree = stored(arrays | parts)
    layers = 500
    tree |= {f"h.{i}.{name}": tree[name] for i in range(layers) for name in parts}
    for name in parts:
        del tree[name]
    sizes = {"n_layer": layers, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 257}
    torch_file.write_pickle(tmp_path / "x.pt", {"model": tree, "model_args": sizes})
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"its tensors need 1,.* bytes, but it has .*: several tensors share memory"):
        model_file.open_model(tmp_path / "x.pt")
    assert time.process_time() - begin < 5


def test_the_error_for_a_run_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\n")
    (tmp_path / "samples.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="this run has not saved a checkpoint yet"):
        model_file.find_model(tmp_path, print)
