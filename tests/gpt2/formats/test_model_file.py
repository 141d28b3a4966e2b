"""gpt2/formats/model_file.py: which tensors and sizes a file of any layout must have."""

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, convert
from gpt2.formats import model_file, torch_file
from gpt2.formats.stored import Stored
from tests.gpt2.formats.models import assert_equal, linear, nanogpt, random_model, stored, values


@pytest.fixture
def model():
    return random_model()


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
