"""gpt2/huggingface_tokenizer.py: tokenization with tokenizers and with tiktoken, added tokens from all files, settings
that change ids, and BOS and EOS ids."""

import json
import random
import sys

import numpy as np
import pytest

from gpt2.huggingface_tokenizer import byte_of, read_files, with_prefix_space
from gpt2.tokenizer import CHARACTERS_FILE, VOCABULARY_FILE, Tokenizer

MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "he"), ("Ġ", "h"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("'", "s"), ("1", "2"))
needs_library = pytest.mark.extras("tokenizers")


def write_vocabulary(folder, first=(), last=("<|endoftext|>",), names=("vocab.json", "merges.txt")):
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(byte_of(), key=lambda c: byte_of()[c])
    tokens = [*first, *characters, *("".join(pair) for pair in MERGES), *last]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / names[0]).write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (folder / names[1]).write_text("\n".join(lines), encoding="utf-8")
    return vocab


def write_json(file, values):
    file.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    write_vocabulary(tmp_path / "tok")
    return tmp_path / "tok"


SIZE = 256 + len(MERGES) + 1  # the size of the vocabulary, including <|endoftext|>


@pytest.fixture(params=[pytest.param("tokenizers", marks=pytest.mark.extras("tokenizers")), "tiktoken"])
def implementation(request, monkeypatch):
    """Tokenize with the package tokenizers, and with tiktoken."""
    if request.param == "tiktoken":
        monkeypatch.setitem(sys.modules, "tokenizers", None)
    return request.param


def random_texts(count, seed=0):
    """Strings of letters of many scripts, whitespace, control characters, marks, symbols, emoji and added tokens."""
    rng = random.Random(seed)
    ranges = [
        (0x20, 0x7F), (0x00, 0x20), (0x7F, 0x100), (0x300, 0x370), (0x400, 0x500), (0x5D0, 0x600), (0x900, 0x980),
        (0x2000, 0x2070), (0x3000, 0x3100), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xE100), (0xFE00, 0xFE10),
        (0xFF00, 0xFFF0), (0x1F300, 0x1F650), (0x10FFF0, 0x110000),
    ]  # fmt: skip
    pieces = [
        *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085", "\u2028", "\ufeff", "\x00"),
        *("'s", "'ll", "'S", "he", "hell", " he", " 12", "12", "<|endoftext|>", "<|user|>", "<|us", "|>"),
    ]
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(24)):
            if rng.random() < 0.4:
                parts.append(rng.choice(pieces))
            else:
                low, high = rng.choice(ranges)
                parts.append("".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 5))))
        yield "".join(parts)


def with_user_token(folder):
    write_json(folder / "added_tokens.json", {"<|user|>": SIZE, "<|us": SIZE + 1})
    return folder


@needs_library
@pytest.mark.parametrize("which", ["small", "gpt2"])
def test_both_implementations_give_the_same_ids_for_2000_random_texts(which, tmp_path, gpt2_files, monkeypatch):
    if which == "small":
        folder = with_user_token(tmp_path)
        write_vocabulary(folder)
    else:
        folder = tmp_path
        Tokenizer.load("gpt2").save_hugging_face(folder, 1024)
    by_library = Tokenizer.load(folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        by_tiktoken = Tokenizer.load(folder)
    assert type(by_library._encoding) is not type(by_tiktoken._encoding)
    assert by_library.fingerprint == by_tiktoken.fingerprint
    assert by_library.tokens == by_tiktoken.tokens
    for text in random_texts(2000):
        for special_tokens in (False, True):
            expected = by_tiktoken.encode(text, special_tokens).tolist()
            assert by_library.encode(text, special_tokens).tolist() == expected, repr(text)
            assert by_library.decode(expected) == by_tiktoken.decode(expected) == text
        assert by_library.encode_prompt(text).tolist() == by_tiktoken.encode_prompt(text).tolist()


@needs_library
@pytest.mark.extras("transformers")
def test_prompt_ids_equal_those_of_transformers(folder):
    import transformers

    with_user_token(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|user|>"})
    theirs, ours = transformers.GPT2Tokenizer.from_pretrained(folder), Tokenizer.load(folder)
    assert ours.end_ids == (theirs.eos_token_id,)
    for text in random_texts(300, seed=1):
        assert ours.encode_prompt(text).tolist() == theirs.encode(text), repr(text)


def test_a_lone_surrogate_is_replaced(folder, implementation):
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode_prompt("a\ud800b")) == "a\ufffdb"


# Added tokens


def by_added_tokens(folder):
    write_json(folder / "added_tokens.json", {"<|user|>": SIZE})


def by_decoder(folder):
    token = {"content": "<|user|>", "special": True, "lstrip": False}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {str(SIZE): token}})


def by_name(folder):
    """A special token without an id gets the next free id, as in transformers."""
    write_json(folder / "special_tokens_map.json", {"pad_token": {"content": "<|user|>", "lstrip": False}})


def by_list(folder):
    write_json(folder / "tokenizer_config.json", {"additional_special_tokens": ["<|user|>"]})


def by_dictionary(folder):
    write_json(folder / "tokenizer_config.json", {"extra_special_tokens": {"user_token": "<|user|>"}})


def by_document(folder):
    """The token is only in tokenizer.json, next to the other two files."""
    document = read_files(folder).library_document()
    document["added_tokens"].append({"id": SIZE, "content": "<|user|>", "special": False})
    write_json(folder / "tokenizer.json", document)


PLACES = [by_added_tokens, by_decoder, by_name, by_list, by_dictionary, by_document]


@pytest.mark.parametrize("place", PLACES)
def test_an_added_token_is_one_token_in_a_prompt_and_plain_text_in_data(place, folder, implementation):
    plain = Tokenizer.load(folder)
    place(folder)
    tokenizer = Tokenizer.load(folder)
    text = "he<|user|>hello"
    one = [*plain.encode("he").tolist(), SIZE, *plain.encode("hello").tolist()]
    assert tokenizer.encode_prompt(text).tolist() == one
    assert tokenizer.encode(text, special_tokens=True).tolist() == one
    assert tokenizer.encode(text).tolist() == plain.encode(text).tolist()
    assert tokenizer.decode([SIZE]) == "<|user|>"
    assert tokenizer.vocab_size == SIZE + 1
    assert tokenizer.fingerprint == plain.fingerprint
    assert tokenizer.includes(plain)
    assert not plain.includes(tokenizer)


@pytest.mark.parametrize("place", PLACES)
def test_added_tokens_are_saved(place, folder, tmp_path, implementation):
    place(folder)
    before = Tokenizer.load(folder)
    before.save(tmp_path / "saved")
    for name in ("saved", "hf"):
        if name == "hf":
            (tmp_path / "hf").mkdir()
            before.save_hugging_face(tmp_path / "hf", 64)
        found = Tokenizer.load(tmp_path / name)
        assert found.added == before.added
        assert (found.fingerprint, found.begin, found.end_ids) == (before.fingerprint, before.begin, before.end_ids)
        assert found.encode_prompt("a<|user|>b").tolist() == before.encode_prompt("a<|user|>b").tolist()


def test_special_tokens_before_the_bytes(tmp_path, implementation):
    """Trainers of tokenizers use this order."""
    vocab = write_vocabulary(tmp_path, first=("<|endoftext|>", "<pad>"), last=())
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": "<|endoftext|>", "pad_token": "<pad>"})
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (len(vocab), 0)
    assert tokenizer.encode_prompt("<pad>hell").tolist() == [1, vocab["hell"]]


def test_tokens_that_a_model_does_not_have_are_dropped(folder, implementation):
    """For example, a padding token that was added to the tokenizer, but has no row in the model's embedding."""
    by_name(folder)
    tokenizer = Tokenizer.for_model(folder, SIZE)
    assert tokenizer.vocab_size == SIZE
    assert tokenizer.encode_prompt("<|user|>").tolist() == tokenizer.encode("<|user|>").tolist()
    assert Tokenizer.for_model(folder, SIZE + 1).vocab_size == SIZE + 1
    with pytest.raises(ValueError, match=f"the tokenizer has {SIZE + 1} tokens, the model only {SIZE - 1}"):
        Tokenizer.for_model(folder, SIZE - 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"<|user|>": 3}, r"<\|user\|> has the id 3; expected its id in the vocabulary"),
        ({"<|user|>": -1}, r"<\|user\|> has the id -1; expected its id in the vocabulary"),
        ({"<|user|>": 1 << 40}, r"<\|user\|> has the id 1099511627776; expected its id in the vocabulary"),
        ({"<|user|>": "x"}, r"<\|user\|> has the id x; expected its id in the vocabulary"),
        ({"<|user|>": SIZE, "<|bot|>": SIZE}, rf"<\|bot\|> has the id {SIZE}; expected its id in the vocabulary"),
        ({"": SIZE}, "expected a string"),
        ([], "added_tokens.json: expected a JSON object"),
    ],
)
def test_invalid_added_tokens_are_rejected(values, message, folder, implementation):
    write_json(folder / "added_tokens.json", values)
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(folder)
    assert "\n" not in str(error.value)


def test_gaps_in_the_ids_are_unused_ids(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    write_json(folder / "added_tokens.json", {"<|user|>": SIZE + 3})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.unused_ids == [SIZE, SIZE + 1, SIZE + 2]
    assert tokenizer.decode([SIZE + 1, SIZE + 3]) == "<|user|>"


# Settings that change ids


SETTINGS = [
    ("tokenizer_config.json", {"add_prefix_space": True}, "its add_prefix_space is 'True'"),
    ("tokenizer_config.json", {"add_bos_token": True}, "its add_bos_token is 'True'"),
    (
        "tokenizer_config.json",
        {"mask_token": {"content": "<mask>", "lstrip": True}},
        "its added token '<mask>' is matched with lstrip",
    ),
    ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "its normalizer is .*Lowercase"),
    (
        "tokenizer.json",
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True},
         {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}},
        "its pre-tokenizer 'Sequence, Digits, ByteLevel'",
    ),
]  # fmt: skip


def change(folder, name, changes):
    if name == "tokenizer.json":
        changes = read_files(folder).library_document() | changes
    write_json(folder / name, changes)


@pytest.mark.parametrize(("name", "changes", "message"), SETTINGS)
def test_a_setting_that_needs_the_library_is_rejected_without_it(name, changes, message, folder, monkeypatch):
    change(folder, name, changes)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=message + '.* pip install -e ".*tokenizers') as error:
        Tokenizer.load(folder)
    assert str(error.value).startswith(f"tokenizer {folder / name}: " if message != SETTINGS[2][2] else "tokenizer ")
    assert "\n" not in str(error.value)


@needs_library
@pytest.mark.parametrize(("name", "changes", "message"), SETTINGS)
def test_a_setting_that_needs_the_library_is_applied_and_saved_with_it(name, changes, message, folder, tmp_path):
    plain = Tokenizer.load(folder)
    change(folder, name, changes)
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "hf").mkdir()
    tokenizer.save_hugging_face(tmp_path / "hf", 64)
    text = "He said 1234 <mask> hello"
    assert tokenizer.encode_prompt(text).tolist() != plain.encode_prompt(text).tolist()
    for name in ("saved", "hf"):
        again = Tokenizer.load(tmp_path / name)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode_prompt(text).tolist() == tokenizer.encode_prompt(text).tolist()
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


@needs_library
def test_a_prefix_space_is_added_before_a_text_but_not_before_its_parts(folder):
    plain = Tokenizer.load(folder)
    write_json(folder / "tokenizer_config.json", {"add_prefix_space": True})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("hello").tolist() == plain.encode(" hello").tolist()
    assert tokenizer.encode("hello", continues=True).tolist() == plain.encode("hello").tolist()
    assert tokenizer.encode("\nhello", continues=True).tolist() == plain.encode("\nhello").tolist()


@needs_library
def test_a_bos_token_is_added_only_to_prompts(folder):
    write_json(folder / "tokenizer_config.json", {"add_bos_token": True})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode_prompt("he").tolist() == [tokenizer.begin, *tokenizer.encode("he").tolist()]
    assert len(tokenizer.encode("he")) == 1


def test_settings_of_prefix_spaces_in_other_components():
    metaspace = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"}
    assert with_prefix_space({"type": "Sequence", "pretokenizers": [metaspace]}, False)["pretokenizers"] == [
        {**metaspace, "prepend_scheme": "never", "add_prefix_space": False}
    ]
    assert with_prefix_space({"type": "Prepend", "prepend": "_"}, False) is None
    assert with_prefix_space(None, True) is None


@needs_library
def test_word_pieces(tmp_path):
    """The vocabulary is not byte-level, but consists of word pieces, as in Chinese GPT-2 models."""
    import tokenizers

    words = ["[UNK]", "[CLS]", "[SEP]", "hello", "world", "wor", "##ld", "你", "好"]
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.decoder = tokenizers.decoders.WordPiece()
    made.add_special_tokens(["[SEP]"])
    made.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": "[SEP]"})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("Hello 你好").tolist() == [3, 7, 8]
    assert tokenizer.decode([3, 4]) == "hello world"
    assert tokenizer.decode_bytes([4]) == b" world"
    assert tokenizer.end_ids == (2,)
    assert tokenizer.encode_prompt("hello[SEP]").tolist() == [3, 2]
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@needs_library
@pytest.mark.parametrize("document", ['{"model": {"vocab": {}}}', '{"model": {"type": "BPE", "vocab": {"a": "x"}}}'])
def test_a_document_that_the_library_cannot_read_is_a_one_line_error(document, tmp_path):
    (tmp_path / "tokenizer.json").write_text(document)
    with pytest.raises(ValueError, match=r"^tokenizer .*tokenizer.json: ") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "RobertaTokenizerFast", "LlamaTokenizer"])
def test_a_class_that_splits_text_differently_needs_tokenizer_json(name, folder, implementation):
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": name})
    with pytest.raises(ValueError, match=f"tokenizer_class is '{name}'; expected GPT2Tokenizer, or the file tokenizer"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer", None])
def test_a_class_that_splits_text_like_gpt2_does_not_need_tokenizer_json(name, folder, implementation):
    expected = Tokenizer.load(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": name})
    assert Tokenizer.load(folder).fingerprint == expected.fingerprint


# BOS and EOS ids


@pytest.mark.parametrize(
    ("generation", "config", "special", "expected"),
    [
        ({"eos_token_id": [SIZE, 5], "bos_token_id": 7}, {"eos_token_id": 3}, {}, (7, (SIZE, 5))),
        ({}, {"eos_token_id": SIZE, "bos_token_id": 4}, {"eos_token": "<|endoftext|>"}, (4, (SIZE,))),
        (None, {"eos_token_id": None}, {"eos_token": "<|user|>"}, (SIZE - 1, (SIZE,))),
        (None, {"eos_token_id": 50256}, {"eos_token": "<|user|>"}, (SIZE - 1, (SIZE,))),
        (None, {"eos_token_id": 50256}, {}, (SIZE - 1, (SIZE - 1,))),
        (None, None, {"eos_token": {"content": "<|user|>"}, "bos_token": "<|user|>"}, (SIZE, (SIZE,))),
    ],
)
def test_bos_and_eos_ids(generation, config, special, expected, folder, implementation, tmp_path):
    by_added_tokens(folder)
    for name, values in (("generation_config", generation), ("config", config), ("special_tokens_map", special)):
        if values is not None:
            write_json(folder / f"{name}.json", values)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.begin, tokenizer.end_ids) == expected
    assert tokenizer.end_of_text == expected[1][0]
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert (saved.begin, saved.end_ids) == expected


# Other files


def test_openais_file_names(tmp_path, implementation):
    write_vocabulary(tmp_path / "openai", names=("encoder.json", "vocab.bpe"))
    write_vocabulary(tmp_path / "hf")
    ours, expected = Tokenizer.load(tmp_path / "openai"), Tokenizer.load(tmp_path / "hf")
    assert ours.fingerprint == expected.fingerprint
    assert ours.encode("hello 12").tolist() == expected.encode("hello 12").tolist()
    assert Tokenizer.for_model(tmp_path / "openai", SIZE).name == "openai"


def test_a_byte_order_mark_is_ignored(folder, implementation):
    by_added_tokens(folder)
    by_name(folder)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|user|>"})
    expected = Tokenizer.load(folder)
    for file in folder.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    found = Tokenizer.load(folder)
    assert (found.fingerprint, found.added, found.end_ids) == (expected.fingerprint, expected.added, expected.end_ids)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_identified(name, folder, implementation):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n")
    with pytest.raises(ValueError, match=f"{name}: it is a Git LFS pointer"):
        Tokenizer.load(folder)


def test_character_vocabularies_of_nanogpt(tmp_path):
    import pickle

    characters = ["\n", " ", "a", "b", "é"]
    meta = {"vocab_size": 5, "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    (tmp_path / CHARACTERS_FILE).write_bytes(pickle.dumps(meta))
    for name in (tmp_path, tmp_path / CHARACTERS_FILE):
        tokenizer = Tokenizer.load(name)
        assert tokenizer.encode("bé\na").tolist() == [3, 4, 0, 2]
        assert tokenizer.decode(np.array([3, 4, 0, 2])) == "bé\na"
        assert (tokenizer.vocab_size, tokenizer.end_of_text, tokenizer.end_ids, tokenizer.begin) == (5, None, (), 0)
    with pytest.raises(ValueError, match="vocabulary of 5 characters has no 'x'"):
        tokenizer.encode("ax")
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert (saved.fingerprint, saved.encode("ba").tolist()) == (tokenizer.fingerprint, [3, 2])
    with pytest.raises(ValueError, match="has characters as tokens"):
        tokenizer.save_hugging_face(tmp_path, 8)


@pytest.mark.parametrize("itos", [{}, {0: "ab"}, {0: "a", 1: "a"}, {1: "a"}, {0: 3}, None])
def test_a_meta_pkl_without_characters_is_rejected(itos, tmp_path):
    import pickle

    (tmp_path / CHARACTERS_FILE).write_bytes(pickle.dumps({"itos": itos}))
    with pytest.raises(ValueError, match="no characters under the key itos"):
        Tokenizer.load(tmp_path)


def test_an_invalid_edit_of_a_saved_tokenizer_is_rejected(folder, tmp_path):
    by_added_tokens(folder)
    Tokenizer.load(folder).save(tmp_path)
    saved = json.loads((tmp_path / VOCABULARY_FILE).read_text())
    for key, value in (("added_tokens", [{"id": "x"}]), ("added_tokens", 3), ("begin_id", "x"), ("characters", [1])):
        write_json(tmp_path / VOCABULARY_FILE, saved | {key: value})
        with pytest.raises(ValueError, match="expected a JSON object with name and fingerprint"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("number", [1 << 31, 1 << 40, -5])
def test_an_id_far_out_of_range_is_rejected_without_allocating_memory(number, folder, implementation):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    write_json(folder / "vocab.json", vocab | {"he": number})
    with pytest.raises(ValueError, match=r"^tokenizer ") as error:
        Tokenizer.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vocab: vocab.pop("7"), "byte 55 has no token"),
        (lambda vocab: vocab.update({"7": vocab["8"]}), "'7' and '8' have the same id"),
    ],
)
@needs_library
def test_a_vocabulary_that_cannot_decode_its_own_ids_is_rejected(folder, change, message):
    """The package tokenizers would silently drop a byte that has no token."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    change(vocab)
    write_json(folder / "vocab.json", vocab)
    write_json(folder / "tokenizer_config.json", {"add_prefix_space": True})  # so that tiktoken is not used
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(folder)
    assert str(error.value).startswith(f"tokenizer {folder}")


def test_more_merges_than_a_vocabulary_can_have_are_rejected(folder, implementation):
    (folder / "merges.txt").write_text("h e\n" * 10_000)
    with pytest.raises(ValueError, match=r"merges\.txt: 10,000 merges for 266 tokens; expected at most 4,176"):
        Tokenizer.load(folder)
