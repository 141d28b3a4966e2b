"""gpt2/tokenizer.py: published ids, round trips, all kinds of vocabulary files, and errors."""

import base64
import json
import shutil
import sys

import numpy as np
import pytest
import requests
import tiktoken

from gpt2.tokenizer import HF_MERGES, HF_TOKENIZER, HF_VOCAB, RANKS_FILE, VOCABULARY_FILE, Tokenizer

HF_FILES = {HF_MERGES: "6d1cbeee0f20b3d9449abfede4726ed8212e3aee", HF_VOCAB: "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"}


TEXTS = [
    "Hello world",
    "",
    " \n\n  leading, trailing \t\n",
    "I'll say: it's 2024, naïve café — 日本語テキスト 🙂👩‍👩‍👧",
    "<|endoftext|> is plain text here",
    "def f(x):\n    return x ** 2\n\n\nclass A:\r\n\tpass\n",
    "\x00\x1f\x7f\ufeff\u00a0",
]


@pytest.fixture(scope="module")
def gpt2(gpt2_files):
    return Tokenizer.load("gpt2")


@pytest.fixture
def without_tokenizers(monkeypatch):
    """Simulate that the package tokenizers is not installed."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)


@pytest.fixture
def hugging_face(gpt2_files, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, cached in HF_FILES.items():
        (folder / name).write_bytes((gpt2_files / cached).read_bytes())
    return folder


@pytest.fixture
def tiny(tmp_path):
    """A folder with a vocabulary of the 256 bytes, in GPT-2's order, and two merges, `th` and `the`."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocab = {token: i for i, token in enumerate([*letters, "th", "the", "<|endoftext|>"])}
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / HF_VOCAB).write_text(json.dumps(vocab))
    (folder / HF_MERGES).write_text("#version: 0.2\nt h\nth e\n")
    return folder


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("hello world", [31373, 995]),
        (" the", [262]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
        ("\n\n", [628]),
    ],
)
def test_gpt2_ids_equal_published_ids(gpt2, text, ids):
    assert gpt2.encode(text).tolist() == ids
    assert gpt2.decode(ids) == text


def test_gpt2_sizes_and_end_of_text(gpt2):
    assert (gpt2.name, gpt2.vocab_size, gpt2.end_of_text) == ("gpt2", 50257, 50256)
    assert gpt2.decode([15496, 50256]) == "Hello<|endoftext|>"


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_equals_tiktoken_and_round_trips(gpt2, text):
    ids = gpt2.encode(text)
    assert ids.tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_the_bytes_tokenizer_are_byte_values(text):
    tokenizer = Tokenizer.load("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("bytes", 257, 256)


def test_decoding_an_incomplete_character_and_a_lone_surrogate():
    tokenizer = Tokenizer.load("bytes")
    assert tokenizer.decode(list("é".encode()[:1])) == "\ufffd"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(np.array([104, 105, 256], dtype=np.uint16)) == "hi<|endoftext|>"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("bad", [257, -1])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(bad):
    with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary bytes, 0 to 256"):
        Tokenizer.load("bytes").decode([65, bad])


def test_a_hugging_face_folder_gives_the_same_vocabulary(gpt2, hugging_face):
    loaded = Tokenizer.load(hugging_face)
    assert loaded.fingerprint == gpt2.fingerprint
    assert loaded.end_of_text == gpt2.end_of_text
    for text in TEXTS:
        assert loaded.encode(text).tolist() == gpt2.encode(text).tolist()


def test_a_tiktoken_file_gives_the_same_vocabulary(gpt2, hugging_face, tmp_path):
    Tokenizer.load(hugging_face).save(tmp_path / "saved")
    file = shutil.copy(tmp_path / "saved" / RANKS_FILE, tmp_path / "own.tiktoken")
    loaded = Tokenizer.load(file)
    assert (loaded.name, loaded.fingerprint) == ("own", gpt2.fingerprint)


def test_merges_of_a_tiny_vocabulary(tiny):
    tokenizer = Tokenizer.load(tiny)
    assert tokenizer.encode("the th").tolist() == [257, 220, 256]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (259, 258)


def test_merges_are_read_without_a_final_newline_and_with_windows_line_ends(tiny):
    expected = Tokenizer.load(tiny).fingerprint
    for merges in ("#version: 0.2\nt h\nth e", "t h\nth e\n", "#version: 0.2\r\nt h\r\nth e\r\n"):
        (tiny / HF_MERGES).write_bytes(merges.encode())
        assert Tokenizer.load(tiny).fingerprint == expected


def test_an_edited_file_is_read_again(tiny):
    before = Tokenizer.load(tiny)
    vocab = json.loads((tiny / HF_VOCAB).read_text())
    vocab = {token: i for i, token in enumerate(token for token in vocab if token != "the")}
    (tiny / HF_VOCAB).write_text(json.dumps(vocab))
    (tiny / HF_MERGES).write_text("t h\n")
    after = Tokenizer.load(tiny)
    assert after.vocab_size == before.vocab_size - 1
    assert after.fingerprint != before.fingerprint


def test_end_of_text_may_be_the_first_id(tiny):
    vocab = json.loads((tiny / HF_VOCAB).read_text())
    (tiny / HF_VOCAB).write_text(json.dumps({token: (i + 1) % 259 for token, i in vocab.items()}))
    tokenizer = Tokenizer.load(tiny)
    assert tokenizer.end_of_text == 0
    assert tokenizer.encode("the").tolist() == [258]


@pytest.mark.parametrize("which", ["bytes", "gpt2", "tiny"])
def test_save_and_load(request, tmp_path, which):
    tokenizer = Tokenizer.load(request.getfixturevalue("tiny")) if which == "tiny" else None
    tokenizer = tokenizer or (request.getfixturevalue("gpt2") if which == "gpt2" else Tokenizer.load("bytes"))
    tokenizer.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / VOCABULARY_FILE).read_text())
    assert saved == {"name": which, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    assert (tmp_path / "saved" / RANKS_FILE).exists() == (which == "tiny")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert (loaded.name, loaded.fingerprint) == (tokenizer.name, tokenizer.fingerprint)
    assert loaded.encode("the other").tolist() == tokenizer.encode("the other").tolist()
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").fingerprint == tokenizer.fingerprint


def test_a_folder_may_have_the_name_of_a_built_in_tokenizer(tiny, tmp_path):
    folder = tiny.rename(tmp_path / "gpt2")
    Tokenizer.load(folder).save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").vocab_size == 259


def test_fingerprint_is_pinned():
    """Data sets and checkpoints store it, so it must not change between versions of this code or tiktoken."""
    bytes_fingerprint = "b350629b73b250ca61dff26670d616b24221b24c4698d6c872ed0bef805fcab7"
    assert Tokenizer.load("bytes").fingerprint == bytes_fingerprint


def edit_saved(folder):
    saved = json.loads((folder / VOCABULARY_FILE).read_text())
    (folder / VOCABULARY_FILE).write_text(json.dumps(saved | {"fingerprint": "0" * 64}))


def drop_ranks(folder):
    (folder / RANKS_FILE).unlink()


def damage_json(folder):
    (folder / VOCABULARY_FILE).write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_saved, "has fingerprint .* expected 000000000000"),
        (drop_ranks, "no such file"),
        (damage_json, "expected a JSON object"),
    ],
)
def test_a_damaged_saved_folder_is_rejected(tiny, tmp_path, damage, message):
    Tokenizer.load(tiny).save(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Tokenizer.load(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (HF_VOCAB, "[]", "expected one JSON object"),
        (HF_VOCAB, "{", "expected one JSON object"),
        (HF_VOCAB, '{"日": 0}', "does not represent a byte"),
        (HF_VOCAB, '{"a": 0}', "line 2 .* does not form the next token"),
        (HF_MERGES, "#version\nt h\n", "1 merges and 256 bytes form 257 tokens"),
        (HF_MERGES, "th e\nt h\n", "line 2 .* does not form the next token"),
        (HF_MERGES, "t h\nt x\n", "line 2 .* does not form the next token"),
        (HF_MERGES, "t h\nth\u3042 e\n", "line 2 .* does not form the next token"),
    ],
)
@pytest.mark.usefixtures("without_tokenizers")
def test_damaged_hugging_face_files_are_rejected(tiny, file, text, message):
    (tiny / file).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(tiny)
    assert str(tiny / file) in str(caught.value) or file == HF_VOCAB
    assert "\n" not in str(caught.value)


# tokenizer.json -------------------------------------------------------------------------------------------------------


def as_one_file(folder, target, pairs=True):
    """Write the tokenizer.json that the package tokenizers would write, from vocab.json and merges.txt."""
    merges = [line.split(" ") for line in (folder / HF_MERGES).read_text(encoding="utf-8").splitlines()[1:]]
    vocab = json.loads((folder / HF_VOCAB).read_text(encoding="utf-8"))
    target.mkdir(exist_ok=True)
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": "",
            "vocab": vocab,
            "merges": merges if pairs else [" ".join(pair) for pair in merges],
        },
    }
    (target / HF_TOKENIZER).write_text(json.dumps(whole), encoding="utf-8")
    return whole


@pytest.mark.parametrize("pairs", [True, False])
def test_tokenizer_json_gives_the_same_vocabulary(gpt2, hugging_face, tmp_path, pairs):
    as_one_file(hugging_face, tmp_path / "alone", pairs)
    for name in (tmp_path / "alone", tmp_path / "alone" / HF_TOKENIZER):
        loaded = Tokenizer.load(name)
        assert (loaded.name, loaded.fingerprint, loaded.end_of_text) == ("alone", gpt2.fingerprint, 50256)
    assert Tokenizer.for_model(tmp_path / "alone", 50304).name == "alone"


def set_value(whole, path, value):
    *parts, last = path.split(".")
    place = whole
    for part in parts:
        place = place[part]
    place[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("added_tokens", []),
        ("added_tokens", [{"id": 258, "content": "<|endoftext|>"}, {"id": 259, "content": "<pad>"}]),
        ("post_processor", {"type": "ByteLevel"}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False}),  # as in files from 2020
        ("model.dropout", 0.0),
    ],
)
def test_tokenizer_json_may_have_more_or_fewer_settings(tiny, tmp_path, path, value):
    whole = as_one_file(tiny, tmp_path / "alone")
    set_value(whole, path, value)
    del whole["model"]["type"]
    (tmp_path / "alone" / HF_TOKENIZER).write_text(json.dumps(whole))
    assert Tokenizer.load(tmp_path / "alone").fingerprint == Tokenizer.load(tiny).fingerprint


WORDS = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel", "use_regex": False}]}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.type", "WordPiece", "its model is 'WordPiece' and its pre-tokenizer 'ByteLevel'; only byte-level BPE"),
        ("model", {"type": "Unigram", "vocab": [["a", -1.5]]}, "its model is 'Unigram'"),
        ("model", {"vocab": {"a": 0}}, "its model is 'unknown'"),
        ("pre_tokenizer", WORDS, "its pre-tokenizer 'Sequence, Split, ByteLevel'"),
        ("pre_tokenizer", {"type": "Metaspace"}, "its pre-tokenizer 'Metaspace'"),
        ("pre_tokenizer", None, "its pre-tokenizer 'none'"),
        ("pre_tokenizer.add_prefix_space", True, "its add_prefix_space is 'True'"),
        ("pre_tokenizer.use_regex", False, "its use_regex is 'False'"),
        ("normalizer", {"type": "NFC"}, "its normalizer is .*NFC"),
        ("model.dropout", 0.1, "its dropout is '0.1'"),
        ("model.end_of_word_suffix", "</w>", "its end_of_word_suffix is '</w>'"),
        ("added_tokens", [{"id": 0, "content": "!"}], "its vocabulary has the special token '!'"),
        ("added_tokens", [{"id": 7, "content": "<|endoftext|>"}], "has the id 7; expected its id in"),
        ("added_tokens", [{"id": 259, "content": "<|endoftext|>"}], "has the id 259; expected its id in"),
        ("added_tokens", [{"id": "x", "content": "<|endoftext|>"}], "has the id x; expected its id in"),
        ("added_tokens", [1], "expected one JSON object with a model"),
        ("pre_tokenizer", [], "its pre-tokenizer 'none'"),
        ("pre_tokenizer", [1], "expected one JSON object with a model"),
        ("model", 3, "expected one JSON object with a model"),
        ("model.vocab", {"a": {}}, "expected one JSON object of tokens and ids"),
        ("model.vocab", {"\u65e5": 0}, "does not represent a byte"),
        ("model.merges", {"t": "h"}, "its model is 'BPE'"),
        ("model.merges", ["th e", "t h"], "merge 2 .* does not form the next token"),
        ("model.merges", [["t", "h"], ["th", 3]], "merge 2 .* does not form the next token"),
        ("model.merges", ["t h"], "1 merges and 256 bytes form 257 tokens; tokenizer.json has 258 besides"),
    ],
)
@pytest.mark.usefixtures("without_tokenizers")
def test_an_unsupported_tokenizer_json_is_rejected(tiny, tmp_path, path, value, message):
    whole = as_one_file(tiny, tmp_path / "alone")
    set_value(whole, path, value)
    file = tmp_path / "alone" / HF_TOKENIZER
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(tmp_path / "alone")
    assert str(caught.value).startswith(f"tokenizer {file}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.extras("tokenizers")
def test_files_written_by_tokenizers_are_read(tmp_path):
    """<|endoftext|> has id 0, because trainers place special tokens first."""
    import tokenizers

    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(TEXTS, trainer)
    theirs.save(str(tmp_path / HF_TOKENIZER))
    ours = Tokenizer.load(tmp_path)
    assert (ours.vocab_size, ours.end_of_text) == (theirs.get_vocab_size(), 0)
    for text in TEXTS:
        if "<|endoftext|>" not in text:
            assert ours.encode(text).tolist() == theirs.encode(text).ids


@pytest.mark.extras("transformers")
def test_files_written_by_transformers_are_read(hugging_face, tmp_path):
    """Version 5 of transformers writes only tokenizer.json."""
    import transformers

    theirs = transformers.GPT2TokenizerFast.from_pretrained(hugging_face)
    theirs.save_pretrained(tmp_path / "saved")
    for name in (HF_VOCAB, HF_MERGES):
        (tmp_path / "saved" / name).unlink(missing_ok=True)
    assert Tokenizer.load(tmp_path / "saved").fingerprint == Tokenizer.load(hugging_face).fingerprint


def ranks_file(ranks):
    return "".join(f"{base64.b64encode(token).decode()} {i}\n" for token, i in ranks.items())


SINGLE = {bytes([b]): b for b in range(256)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AA== 0\nnot a line\n", "line 2"),
        ("%%% 0\n", "line 1"),
        (ranks_file({b"a": 0}), "byte 0 has no token"),
        (ranks_file(SINGLE | {b"ab": 258, b"abc": 260}), "expected every id from 0 once"),
        (ranks_file(SINGLE | {b"ab": 255}), "expected every id from 0 once"),
    ],
)
def test_a_damaged_tiktoken_file_is_rejected(tmp_path, text, message):
    file = tmp_path / "own.tiktoken"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(file)
    assert str(file) in str(caught.value)


def test_end_of_text_gets_the_only_unused_id(tmp_path):
    file = tmp_path / "own.tiktoken"
    file.write_text(ranks_file(SINGLE | {b"ab": 256, b"abc": 258}))
    assert Tokenizer.load(file).end_of_text == 257


def test_unknown_names_and_incomplete_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer 'gpt3' is unknown; choose bytes, gpt2, or the path"):
        Tokenizer.load("gpt3")
    with pytest.raises(FileNotFoundError, match=r"has none of .* and meta.pkl$"):
        Tokenizer.load(tmp_path)
    for name, message in (
        ("tokenizer.model", "tokenizer.model is a SentencePiece model: save it with transformers as tokenizer.json"),
        ("vocab.bpe", "vocab.bpe exists, but encoder.json is missing"),
        ("vocab.json", "vocab.json exists, but merges.txt is missing"),
    ):
        (tmp_path / name).write_text("{}")
        with pytest.raises(FileNotFoundError, match=message):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "error", [requests.exceptions.ConnectionError("down\nreally"), ValueError("hash"), OSError(28)]
)
def test_the_error_for_a_failed_download_suggests_a_remedy(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(FileNotFoundError, match="connect once, or set TIKTOKEN_CACHE_DIR") as caught:
        Tokenizer.load("gpt2")
    assert "\n" not in str(caught.value)


# Tokenizers for models


def test_the_gpt2_tokenizer_is_written_as_published(gpt2_files, tmp_path):
    tokenizer = Tokenizer.load("gpt2")
    tokenizer.save_hugging_face(tmp_path, 1024)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    published = (gpt2_files / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").read_text(encoding="utf-8")  # vocab.bpe
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8") == published
    names = json.loads((gpt2_files / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == names


def test_the_tokenizer_for_a_model_file(tmp_path, gpt2_files):
    """It is the tokenizer next to the file, or GPT-2's if the model has GPT-2's vocabulary size."""
    Tokenizer.load("bytes").save(tmp_path)
    (tmp_path / "model.pt").touch()
    assert Tokenizer.for_model(tmp_path / "model.pt", 257).name == "bytes"
    assert Tokenizer.for_model(tmp_path / "model.pt", 300).name == "bytes"
    assert Tokenizer.for_model(tmp_path / "model.pt", 50257).name == "gpt2"
    assert Tokenizer.for_model(tmp_path / "model.pt", 50304).name == "gpt2"
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens, the model only 99"):
        Tokenizer.for_model(tmp_path / "model.pt", 99)
