import dataclasses

import pytest

from gpt2 import GPT2, GPT2Config
from gpt2.config import PRESETS
from gpt2.generate import KVCache

PUBLISHED = {  # numbers of parameters in transformers
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    config = GPT2Config.preset(name)
    assert config.n_parameters == PUBLISHED[name]
    assert (config.vocab_size, config.n_positions, config.activation_function) == (50257, 1024, "gelu_new")
    assert config.embd_pdrop == config.attn_pdrop == config.resid_pdrop == 0.1


def test_the_error_for_an_unknown_preset_lists_the_presets():
    with pytest.raises(
        ValueError, match=r"preset 'gpt3' is unknown.*nano, micro, gpt2, gpt2-medium, gpt2-large, gpt2-xl"
    ):
        GPT2Config.preset("gpt3")


@pytest.mark.parametrize(
    "config", [PRESETS["nano"], GPT2Config(vocab_size=7, n_positions=5, n_embd=6, n_layer=3, n_head=2)]
)
def test_n_parameters_equals_that_of_the_model(config):
    assert GPT2(config).n_parameters() == config.n_parameters


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_a_dictionary(name):
    config = dataclasses.replace(PRESETS[name], activation_function="gelu", embd_pdrop=0.25, layer_norm_epsilon=1e-6)
    values = config.to_dict()
    assert GPT2Config.from_dict(values) == config
    assert values["model_type"] == "gpt2"
    assert values["n_ctx"] == config.n_positions
    assert values["bos_token_id"] == values["eos_token_id"] == config.vocab_size - 1


def test_missing_keys_have_the_published_defaults():
    assert GPT2Config.from_dict({"unrelated": 1}) == GPT2Config()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size is 0; expected a positive integer"),
        ("n_positions", -1, "n_positions is -1; expected a positive integer"),
        ("n_embd", 12.0, "n_embd is 12.0; expected a positive integer"),
        ("n_layer", True, "n_layer is True; expected a positive integer"),
        ("n_head", "3", "n_head is '3'; expected a positive integer"),
        ("n_head", 5, "n_embd = 768 is not a multiple of n_head = 5"),
        ("embd_pdrop", 1.0, "embd_pdrop is 1.0; expected 0 <= rate < 1"),
        ("attn_pdrop", -0.1, "attn_pdrop is -0.1; expected 0 <= rate < 1"),
        ("resid_pdrop", float("nan"), "resid_pdrop is nan; expected 0 <= rate < 1"),
        ("resid_pdrop", None, "resid_pdrop is None; expected 0 <= rate < 1"),
        ("layer_norm_epsilon", 0, "layer_norm_epsilon is 0; expected a positive number"),
        ("layer_norm_epsilon", "1e-5", "layer_norm_epsilon is '1e-5'; expected a positive number"),
        ("activation_function", "relu", "activation_function is 'relu'; expected 'gelu_new' or 'gelu'"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True, which is not supported"),
        ("scale_attn_weights", False, "scale_attn_weights is False, which is not supported; expected True"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False, which is not supported"),
        ("add_cross_attention", True, "add_cross_attention is True, which is not supported"),
        ("model_type", "llama", "model_type is 'llama', which is not supported; expected 'gpt2'"),
        ("quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}, which is not supported"),
        ("n_inner", 2048, "n_inner is 2048, which is not supported; expected 4 * n_embd"),
    ],
)
def test_unsupported_settings_are_rejected(field, value, message):
    with pytest.raises(ValueError, match=r"^config: ") as error:
        GPT2Config.from_dict({field: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"), [("n_inner", None), ("n_inner", 3072), ("activation_function", "gelu_pytorch_tanh")]
)
def test_other_spellings_of_supported_settings_are_accepted(field, value):
    GPT2Config.from_dict({field: value})


@pytest.mark.parametrize(("prompt", "more", "tokens", "read"), [(5, 3, 8, 5), (5, 30, 20, 10), (70, 1, 20, 20)])
def test_memory_to_generate_includes_the_cache_and_the_prompt(prompt, more, tokens, read):
    config = GPT2Config(vocab_size=11, n_positions=20, n_embd=8, n_layer=3, n_head=2)
    need = config.memory_to_generate(7, prompt, more)
    assert need["keys and values"] == sum(layer.nbytes for layer in KVCache(GPT2(config), 7, tokens).layers)
    assert need["activations"] == 19 * 7 * read * 8 * 4
    assert need["logits"] == 7 * 11 * 9
    assert config.memory_to_generate(14, prompt, more) == {name: 2 * size for name, size in need.items()}


@pytest.mark.parametrize("ends", [None, 3, (3, 5)])
def test_bos_and_eos_ids_are_written_unchanged(ends):
    values = GPT2Config(vocab_size=7, bos_token_id=2, eos_token_id=ends).to_dict()
    assert values["eos_token_id"] == (list(ends) if isinstance(ends, tuple) else ends)
    assert "generation_config" not in values
    found = GPT2Config.from_dict(values)
    assert (found.bos_token_id, found.eos_token_id, found.to_dict()) == (2, ends, values)


def test_ids_are_not_guessed_from_the_vocabulary_size():
    config = GPT2Config(vocab_size=300)
    assert (config.to_dict()["bos_token_id"], config.to_dict()["eos_token_id"]) == (None, None)
    assert (config.begin_id, config.end_ids) == (None, ())
    assert config.with_ids(4, (5, 6)).ids() == {"bos_token_id": 4, "eos_token_id": [5, 6]}
    assert config.with_ids(4, (5,)).ids() == {"bos_token_id": 4, "eos_token_id": 5}
    known = GPT2Config(vocab_size=300, bos_token_id=1, eos_token_id=2)
    assert known.with_ids(4, (5,)).ids() == {"bos_token_id": 1, "eos_token_id": 2}


def test_generation_config_takes_precedence_and_ids_outside_the_vocabulary_are_ignored():
    config = GPT2Config(
        vocab_size=9, bos_token_id=1, eos_token_id=2, generation_config={"eos_token_id": [3, 50256], "top_k": 4}
    )
    assert (config.begin_id, config.end_ids) == (1, (3,))
    assert GPT2Config(vocab_size=9, bos_token_id=50256, eos_token_id=50256).end_ids == ()
    # Equality ignores the ids, because they do not affect the model's outputs.
    assert config == dataclasses.replace(config, eos_token_id=5, generation_config=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bos_token_id", "x"), ("bos_token_id", [1]), ("eos_token_id", [1, "x"]), ("eos_token_id", True)],
)
def test_ids_of_another_type_are_rejected(name, value):
    with pytest.raises(ValueError, match=f"config: {name} is .*; expected an id"):
        GPT2Config.from_dict({name: value})
