"""Reads the tokenizer files in a Hugging Face folder, and tokenizes text with the library `tokenizers`.

tokenizer.json                        vocabulary, merges, added tokens, normalizer, pre-tokenizer, post-processor
vocab.json, merges.txt                vocabulary and merges; OpenAI names them encoder.json and vocab.bpe
tokenizer_config.json                 settings that take precedence, names of special tokens, added tokens by id
special_tokens_map.json               names of special tokens
added_tokens.json                     ids of added tokens
generation_config.json, config.json   ids of the tokens that begin and end a text
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gpt2.file_kinds import kind_of, printable, read_json
from tinygrad2.checkpoint import JsonObject
from tinygrad2.machine import install_command

END_OF_TEXT = "<|endoftext|>"
HF_VOCAB, HF_MERGES, HF_CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
HF_TOKENIZER, HF_SPECIAL, HF_ADDED = "tokenizer.json", "special_tokens_map.json", "added_tokens.json"
OPENAI_VOCAB, OPENAI_MERGES = "encoder.json", "vocab.bpe"
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_FILE, MODEL_FILE = "generation_config.json", "config.json"
TOKENIZER_BYTES = 64 << 20  # maximum size of tokenizer.json and vocab.json; with 256,000 tokens they have 33 MB
MERGES_PER_TOKEN = 8  # maximum; several pairs may merge into the same token
ID_LIMIT = 1 << 24  # upper bound for the ids of added tokens
INSTALL = install_command("tokenizers")
ONLY_PLAIN = f"only byte-level BPE with GPT-2's pre-tokenizer is supported without the package tokenizers: {INSTALL}"
GPT2_CLASSES = (  # classes of transformers that split text like GPT-2, without the suffix "Fast"
    "GPT2Tokenizer",
    "CodeGenTokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
)
# Settings in tokenizer.json that affect the ids, with GPT-2's values. For those that are not True, null, "" and 0 are
# equivalent.
HF_SETTINGS = {
    "normalizer": None,
    "add_prefix_space": False,
    "use_regex": True,
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "ignore_merges": False,
}
MATCHING = ("lstrip", "rstrip", "single_word")  # settings of an added token that affect which text it matches


@dataclass(frozen=True)
class AddedToken:
    """A token that is not the result of a merge. Where special tokens are recognized, its text becomes this one token.

    The other fields have the same meaning as in `tokenizers`: whether the token marks structure (special) or is a word,
    and how it is matched.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass
class TokenizerFiles:
    """The contents of a folder's tokenizer files.

    file       the file that error messages name: tokenizer.json or vocab.json.
    vocab      ids by token; of any type if the file is damaged.
    merges     pairs of the position in the file, for error messages, and the two tokens.
    document   the contents of tokenizer.json, or None.
    config     the contents of tokenizer_config.json.
    added      every added token.
    begin_id, end_ids   the ids that begin and end a text; None and () if no file specifies them.
    """

    folder: Path
    file: Path
    merges_file: Path
    vocab: Any
    merges: list[tuple[str, Any]]
    document: JsonObject | None
    config: JsonObject
    added: list[AddedToken]
    begin_id: int | None
    end_ids: tuple[int, ...]

    def refuse(self, reason: str, file: Path | None = None) -> ValueError:
        return ValueError(f"tokenizer {file or self.file}: {reason}; {ONLY_PLAIN}")

    def plain_ranks(self) -> dict[bytes, int]:
        """The ids of the tokens that merges form, for byte-level BPE like GPT-2's, which tiktoken can compute.

        Raises ValueError, which names the setting or the file, if a setting affects the ids or a file has an error.
        """
        if self.document is not None:
            self._check_document(self.document)
        elif not self._is_gpt2:
            raise self.refuse(self._class_message, self.folder / HF_CONFIG)
        self._check_setting("add_prefix_space")
        made = {"".join(pair) for _, pair in self.merges if isinstance(pair, list) and all(map(_is_text, pair))}
        made |= set(byte_of())
        special = [token.content for token in self.added if token.content in made]
        if special:
            raise self.refuse(f"its vocabulary has the special token {printable(special[0])!r}")
        others = {token.content for token in self.added} | {END_OF_TEXT}
        return _ranks(self.vocab, self.file, self.merges, self.merges_file, others)

    def check_prompts(self) -> None:
        """Raise ValueError, which names the setting, if tokens are added around a prompt, or if added tokens match more
        than their own text."""
        for name in ("add_bos_token", "add_eos_token"):
            self._check_setting(name)
        for token in self.added:
            for setting in MATCHING:
                if getattr(token, setting):
                    raise self.refuse(f"its added token {printable(token.content)!r} is matched with {setting}")
        around = (self.document or {}).get("post_processor")
        if isinstance(around, dict) and around.get("type") != "ByteLevel":
            raise self.refuse(f"its post_processor is {str(around.get('type'))[:80]!r}")

    def _check_setting(self, name: str) -> None:
        if self.config.get(name):
            raise self.refuse(f"its {name} is {str(self.config[name])[:80]!r}", self.folder / HF_CONFIG)

    def _check_document(self, document: JsonObject) -> None:
        model, splitter = document["model"], document.get("pre_tokenizer") or {"type": "none"}
        kinds = [splitter["type"], *(part["type"] for part in splitter.get("pretokenizers", []))]
        settings = {name: value for part in (document, splitter, model) for name, value in part.items()}
        kind = model.get("type", "BPE" if model.get("merges") else "unknown")  # old files have no "type"
        if kind != "BPE" or kinds != ["ByteLevel"] or not isinstance(model.get("merges"), list):
            names = ", ".join(map(str, kinds))
            raise self.refuse(f"its model is {str(kind)[:80]!r} and its pre-tokenizer {names[:80]!r}")
        for name, expected in HF_SETTINGS.items():
            if (value := settings.get(name, expected)) != expected and (value or expected):
                raise self.refuse(f"its {name} is {str(value)[:80]!r}")

    def library_document(self) -> JsonObject:
        """The contents of a tokenizer.json that combines all files. Raises ValueError if the files are insufficient."""
        document = dict(self.document) if self.document is not None else self._own_document()
        document |= {"truncation": None, "padding": None, "added_tokens": [asdict(token) for token in self.added]}
        if "add_prefix_space" in self.config:
            document["pre_tokenizer"] = with_prefix_space(
                document.get("pre_tokenizer"), self.config["add_prefix_space"] is True
            )
        begin, end = self.config.get("add_bos_token") is True, self.config.get("add_eos_token") is True
        if begin or end:
            document["post_processor"] = self._template(begin, end)
        return document

    @property
    def _class(self) -> str:
        return str(self.config.get("tokenizer_class") or GPT2_CLASSES[0])

    @property
    def _is_gpt2(self) -> bool:
        """Whether the class in tokenizer_config.json splits text like GPT-2's. The vocabulary and the merges do not
        determine this."""
        return self._class.removesuffix("Fast") in GPT2_CLASSES

    @property
    def _class_message(self) -> str:
        return (
            f"tokenizer_class is {printable(self._class)!r}; expected {GPT2_CLASSES[0]}, or the file {HF_TOKENIZER} "
            "(transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )

    def _own_document(self) -> JsonObject:
        if not self._is_gpt2:
            raise ValueError(f"tokenizer {self.folder / HF_CONFIG}: {self._class_message}")
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": self.vocab,
            "merges": [pair for _, pair in self.merges],
        }
        parts = {"normalizer": None, "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level}
        return {"version": "1.0", **parts, "model": model}

    def _template(self, begin: bool, end: bool) -> JsonObject:
        """A post-processor that adds special tokens before and after a text."""
        around = [_named(self.config, self.folder, name) for name in ("bos_token", "eos_token")]
        before, after = around[:1] if begin else [], around[1:] if end else []
        ids = {token.content: token.id for token in self.added}
        for text in (*before, *after):
            if text not in ids:
                raise ValueError(f"tokenizer {self.file}: it adds the token {printable(text)} to texts, but has no id")
        single = [{"SpecialToken": {"id": text, "type_id": 0}} for text in before]
        single += [{"Sequence": {"id": "A", "type_id": 0}}]
        single += [{"SpecialToken": {"id": text, "type_id": 0}} for text in after]
        special = {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in (*before, *after)}
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def copied_files(folder: Path) -> list[tuple[Path, str]]:
    """The tokenizer files in the folder, and their names in the Hugging Face layout. Empty if there are none."""
    if not is_tokenizer_folder(folder):
        return []
    pair = _pair_of_files(folder) or ()
    named = [*zip(pair, (HF_VOCAB, HF_MERGES), strict=False)]
    others = (HF_TOKENIZER, HF_CONFIG, HF_SPECIAL, HF_ADDED, CHAT_TEMPLATE)
    return named + [(folder / name, name) for name in others if (folder / name).is_file()]


def is_tokenizer_folder(folder: Path) -> bool:
    """Whether the folder has tokenizer files, in the Hugging Face layout or with OpenAI's names."""
    return (folder / HF_TOKENIZER).is_file() or _pair_of_files(folder) is not None


def incomplete(folder: Path) -> str:
    """A note for the end of an error message about related files in a folder without a tokenizer; "" if there are
    none."""
    for pair in ((HF_VOCAB, HF_MERGES), (OPENAI_VOCAB, OPENAI_MERGES)):
        there = [name for name in pair if (folder / name).is_file()]
        if there:
            return f"; {there[0]} exists, but {next(name for name in pair if name not in there)} is missing"
    if found := next((name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None):
        return f"; {found} is a SentencePiece model: save it with transformers as {HF_TOKENIZER}"
    return ""


def _pair_of_files(folder: Path) -> tuple[Path, Path] | None:
    pairs = ((folder / HF_VOCAB, folder / HF_MERGES), (folder / OPENAI_VOCAB, folder / OPENAI_MERGES))
    return next((pair for pair in pairs if all(file.is_file() for file in pair)), None)


def read_files(path: Path) -> TokenizerFiles:
    """Read the tokenizer files in the folder `path`, or the file tokenizer.json `path` and the files next to it. Raises
    ValueError if a file is damaged."""
    folder, alone = (path.parent, path) if path.is_file() else (path, path / HF_TOKENIZER)
    config = _read_object(folder / HF_CONFIG)
    document, places = None, _pair_of_files(folder)
    if alone.is_file():
        document = _read_document(alone)
        file, merges_file, vocab, pairs = alone, alone, document["model"]["vocab"], document["model"].get("merges")
        split = (
            [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs] if isinstance(pairs, list) else []
        )
        merges = [(f"merge {i} ({str(pair)[:80]})", pair) for i, pair in enumerate(split, 1)]
    else:
        assert places is not None
        file, merges_file = places
        try:
            vocab = read_json(file, TOKENIZER_BYTES)
        except ValueError as error:
            raise ValueError(f"tokenizer {file}: {error}; expected one JSON object of tokens and ids") from None
        merges = _read_merges(merges_file, len(vocab) if isinstance(vocab, dict) else 0)
    if not isinstance(vocab, dict) and (document is None or not isinstance(vocab, list)):
        raise ValueError(f"tokenizer {file}: expected one JSON object of tokens and ids")
    ids = vocab if isinstance(vocab, dict) else {}
    added = _added_tokens(file, folder, document, config, ids)
    begin, ends = _begin_and_ends(folder, config, {token.content: token.id for token in added} | _integers(ids))
    return TokenizerFiles(folder, file, merges_file, vocab, merges, document, config, added, begin, ends)


def _integers(vocab: Mapping[str, object]) -> dict[str, int]:
    return {token: i for token, i in vocab.items() if type(i) is int}


def _read_document(file: Path) -> JsonObject:
    try:
        document = read_json(file, TOKENIZER_BYTES)
        if not isinstance(document["model"], dict) or "vocab" not in document["model"]:
            raise TypeError
        splitter = document.get("pre_tokenizer") or {"type": "none"}
        for part in (splitter, *splitter.get("pretokenizers", [])):
            str(part["type"])
        for token in document.get("added_tokens") or []:
            token["content"], token["id"]
        return document
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        said = f"{error}; " if isinstance(error, ValueError) else ""
        raise ValueError(f"tokenizer {file}: {said}expected one JSON object with a model and its vocabulary") from None


def _read_object(file: Path) -> JsonObject:
    """The JSON object in a file, or an empty one if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        values = read_json(file)
    except ValueError as error:
        raise ValueError(f"tokenizer {file}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"tokenizer {file}: expected a JSON object")
    return values


def _read_merges(file: Path, tokens: int) -> list[tuple[str, Any]]:
    """The merges in a file with their positions, for a vocabulary with this number of tokens."""
    if kind := kind_of(file):
        raise ValueError(f"tokenizer {file}: it is {kind}")
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    count, most = text.count("\n"), MERGES_PER_TOKEN * (tokens + 256)
    if count > most:
        raise ValueError(f"tokenizer {file}: {count:,} merges for {tokens:,} tokens; expected at most {most:,}")
    return [
        (f"line {number} ({line[:80]!r})", line.rstrip("\r").split(" "))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip() and not (number == 1 and line.startswith("#version"))
    ]


def _added_tokens(
    file: Path, folder: Path, document: JsonObject | None, config: JsonObject, vocab: Mapping[str, object]
) -> list[AddedToken]:
    """All added tokens, in the order of their ids, from all files that list them. A special token without an id gets
    the next unused id, as in transformers."""
    found: dict[str, AddedToken] = {}
    texts: dict[int, str] = {}
    of_vocab = {i: token for token, i in _integers(vocab).items()}

    def add(values: JsonObject | str, number: object) -> None:
        text = values if isinstance(values, str) else values.get("content")
        if not isinstance(text, str) or not text:
            raise ValueError(f"tokenizer {file}: an added token has the text {str(text)[:80]!r}; expected a string")
        number = int(number) if isinstance(number, str) and number.isdecimal() else number
        free = type(number) is int and 0 <= number < ID_LIMIT and of_vocab.get(number, text) == text
        if (
            not free
            or not isinstance(number, int)
            or vocab.get(text, number) != number
            or texts.get(number, text) != text
        ):
            raise ValueError(
                f"tokenizer {file}: {printable(text)} has the id {str(number)[:80]}; expected its id in the vocabulary "
                f"or one from 0 to {ID_LIMIT - 1} that no other token has"
            )
        if text in found and found[text].id != number:
            raise ValueError(f"tokenizer {file}: {printable(text)} has the ids {found[text].id} and {number}")
        if text not in found:
            texts[number] = text
            flags = {} if isinstance(values, str) else {name: values.get(name) is True for name in FLAGS}
            found[text] = AddedToken(text, number, **(flags or {"special": False}))

    for token in (document or {}).get("added_tokens") or []:
        add(token, token["id"])
    by_id = config.get("added_tokens_decoder")
    for number, token in by_id.items() if isinstance(by_id, dict) else ():
        add(token if isinstance(token, dict) else {}, number)
    for text, number in _read_object(folder / HF_ADDED).items():
        add(text, number)
    for special in _special_tokens(config, _read_object(folder / HF_SPECIAL)):
        text = special if isinstance(special, str) else str(special.get("content", ""))
        if not text:
            continue
        if text not in found:
            unused = 1 + max([-1, *of_vocab, *texts])
            add(special if isinstance(special, dict) else {"content": text}, vocab.get(text, unused))
        found[text] = replace(found[text], special=True)
    if END_OF_TEXT in vocab and END_OF_TEXT not in found:
        add({"content": END_OF_TEXT, "special": True}, vocab[END_OF_TEXT])
    return sorted(found.values(), key=lambda token: token.id)


FLAGS = ("special", *MATCHING, "normalized")


def _special_tokens(config: JsonObject, special: JsonObject) -> Iterator[str | JsonObject]:
    """The special tokens in the two files: bos_token and so on, and the lists of additional special tokens."""
    for values in (config, special):
        for key, value in values.items():
            if key.endswith("_token") and isinstance(value, str | dict):
                yield value
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = values.get(key)
            listed = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
            yield from (value for value in listed if isinstance(value, str | dict))


def _named(config: JsonObject, folder: Path, key: str) -> str:
    """The text of the special token `key`, such as "eos_token"."""
    for values in (config, _read_object(folder / HF_SPECIAL)):
        value = values.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            return text
    return END_OF_TEXT


def _begin_and_ends(folder: Path, config: JsonObject, ids: Mapping[str, int]) -> tuple[int | None, tuple[int, ...]]:
    """The ids that begin and end a text: from generation_config.json, or else from config.json, or else the ids of the
    special tokens bos_token and eos_token."""
    begin: int | None = None
    ends: tuple[int, ...] = ()
    for name in (GENERATION_FILE, MODEL_FILE):
        try:
            values = read_json(folder / name) if (folder / name).is_file() else {}
        except ValueError:  # not a tokenizer file; reading the model reports the error
            values = {}
        if isinstance(values, dict):
            begin = begin if begin is not None else next(iter(as_ids(values.get("bos_token_id"))), None)
            ends = ends or as_ids(values.get("eos_token_id"))
    known = set(ids.values())
    if begin not in known:
        begin = ids.get(_named(config, folder, "bos_token"))
    return begin, tuple(i for i in ends if i in known) or as_ids(ids.get(_named(config, folder, "eos_token")))


def as_ids(value: object) -> tuple[int, ...]:
    """The ids in a setting that is an id, a list of ids, or null."""
    listed = value if isinstance(value, list | tuple) else [value]
    return tuple(i for i in listed if type(i) is int and i >= 0)


def byte_of() -> dict[str, int]:
    """The byte that each character in vocab.json and merges.txt represents. A printable byte is represented by the
    character with the same code point, and other bytes by U+0100, U+0101, ..."""
    printable_bytes = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable_bytes]
    return {chr(byte): byte for byte in printable_bytes} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _ranks(
    vocab: object, vocab_file: Path, merges: list[tuple[str, Any]], merges_file: Path, others: set[str]
) -> dict[bytes, int]:
    """The tokens and their ids, from a vocabulary that represents bytes by GPT-2's characters.

    merges  the merges with their positions in the file.
    others  the texts of tokens that are not the result of a merge.

    tiktoken merges the pair with the lowest rank first, so the merges must be in the order of the ids of their results;
    otherwise, this raises ValueError.
    """
    bytes_of = byte_of()
    try:
        if not isinstance(vocab, dict):
            raise TypeError
        ranks = {bytes(bytes_of[c] for c in token): int(i) for token, i in vocab.items() if token not in others}
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"tokenizer {vocab_file}: expected one JSON object of tokens and ids") from None
    except KeyError as error:
        raise ValueError(
            f"tokenizer {vocab_file}: the character {error} does not represent a byte; expected a byte-level vocabulary"
        ) from None
    previous = -1
    for place, pair in merges:
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair))
        text = "".join(pair) if is_pair else ""
        token = bytes(bytes_of[c] for c in text) if all(c in bytes_of for c in text) else b""
        if ranks.get(token, -1) <= previous:
            raise ValueError(f"tokenizer {merges_file}: {place} does not form the next token of {vocab_file.name}")
        previous = ranks[token]
    if len(merges) + 256 != len(ranks):
        raise ValueError(
            f"tokenizer {merges_file}: {len(merges)} merges and 256 bytes form {len(merges) + 256} tokens; "
            f"{vocab_file.name} has {len(ranks)} besides {END_OF_TEXT}"
        )
    return ranks


# Tokenization with the library


def library() -> ModuleType | None:
    """The package tokenizers, or None if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        return None
    return tokenizers


def with_prefix_space(splitter: Any, wanted: bool) -> Any:
    """The pre-tokenizer or normalizer, changed so that it adds a space before the first word (if `wanted`) or does
    not."""
    if not isinstance(splitter, dict):
        return splitter
    for key in ("pretokenizers", "normalizers"):
        if isinstance(splitter.get(key), list):
            parts = [with_prefix_space(part, wanted) for part in splitter[key]]
            return {**splitter, key: [part for part in parts if part is not None]}
    match splitter.get("type"):
        case "ByteLevel":
            return {**splitter, "add_prefix_space": wanted}
        case "Metaspace" if not wanted:
            return {**splitter, "prepend_scheme": "never", "add_prefix_space": False}
        case "Prepend" if not wanted:
            return None
    return splitter


class LibraryEncoding:
    """Encoding by the library `tokenizers`.

    document  the contents of a tokenizer.json.
    file      the file that error messages name.
    Raises ValueError if the library is not installed, cannot read the document, or assigns an added token a different
    id.
    """

    def __init__(self, document: JsonObject, file: Path):
        self.document, self._file = document, file
        recognizing = self._recognizing
        largest = max(recognizing.get_vocab(with_added_tokens=True).values(), default=0)
        if largest >= ID_LIMIT:
            raise ValueError(f"tokenizer {file}: it has the id {largest}; expected ids below {ID_LIMIT}")
        for token in document["added_tokens"]:
            if (given := recognizing.token_to_id(token["content"])) != token["id"]:
                raise ValueError(
                    f"tokenizer {file}: its added token {printable(token['content'])!r} has the id {token['id']}; the "
                    f"package tokenizers gives it {given}"
                )
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        """Raise ValueError if two tokens have the same id, or if a byte has no token. The library drops such bytes, so
        decoding would not restore the text."""
        model = self.document["model"]
        found: dict[object, str] = {}
        for token, i in model["vocab"].items() if isinstance(model["vocab"], dict) else ():
            if found.setdefault(i, token) != token:
                tokens = f"{printable(found[i])!r} and {printable(token)!r}"
                raise ValueError(f"tokenizer {self._file}: {tokens} have the same id {i}")
        if self.byte_level and model.get("unk_token") is None:
            vocab = self._recognizing.get_vocab(with_added_tokens=True)
            missing = [byte for character, byte in byte_of().items() if character not in vocab]
            if missing:
                raise ValueError(
                    f"tokenizer {self._file}: byte {missing[0]} has no token; expected a token for each of the 256 "
                    "bytes, or an unk_token"
                )

    def _made(self, **changes: object) -> Any:
        tokenizers = library()
        if tokenizers is None:
            raise ValueError(f"tokenizer {self._file}: it needs the package tokenizers; {INSTALL}")
        try:
            return tokenizers.Tokenizer.from_str(json.dumps({**self.document, **changes}))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic in the library is not a subclass of Exception
            raise ValueError(
                f"tokenizer {self._file}: the package tokenizers cannot read it ({printable(str(error))})"
            ) from None

    @cached_property
    def _recognizing(self) -> Any:
        return self._made()

    @cached_property
    def _plain(self) -> Any:
        return self._made(added_tokens=[])

    @cached_property
    def _continuing(self) -> tuple[Any, Any]:
        """Two encoders that add no space before the text: one recognizes added tokens, and the other does not."""
        kinds = ("pre_tokenizer", "normalizer")
        changes = {kind: with_prefix_space(self.document.get(kind), False) for kind in kinds}
        if all(changes[kind] == self.document.get(kind) for kind in kinds):
            return self._recognizing, self._plain
        return self._made(**changes), self._made(**changes, added_tokens=[])

    def encode(self, text: str, special_tokens: bool, continues: bool) -> np.ndarray:
        """The ids of a text. With `continues`, it is a part of a text that follows another part."""
        if continues:
            encoding = self._continuing[0 if special_tokens else 1]
        else:
            encoding = self._recognizing if special_tokens else self._plain
        return np.array(encoding.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of a text, including those that the post-processor adds."""
        return np.array(self._recognizing.encode(text).ids, np.uint32)

    def decode(self, ids: list[int]) -> str:
        return self._recognizing.decode(ids, skip_special_tokens=False)

    @cached_property
    def byte_level(self) -> bool:
        """Whether the bytes of a text are the concatenated bytes of its tokens."""
        decoder = self.document.get("decoder") or {}
        return "ByteLevel" in [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))]

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        """The bytes of each token, by id. If the encoding is not byte-level, these are the bytes that the token adds
        when it follows another token."""
        added = {token["content"]: token["id"] for token in self.document["added_tokens"]}
        vocab = self._recognizing.get_vocab(with_added_tokens=True)
        if self.byte_level:
            bytes_of = byte_of()
            whole = {i: token for token, i in vocab.items()}
            return {
                i: token.encode("utf-8", "replace")
                if token in added or not all(c in bytes_of for c in token)
                else bytes(bytes_of[c] for c in token)
                for i, token in whole.items()
            }
        before = max(vocab.values())
        text = self.decode([before])
        found = {i: self.decode([before, i]).removeprefix(text).encode("utf-8", "replace") for i in vocab.values()}
        hexadecimal = {i: token[3:5] for token, i in vocab.items() if len(token) == 6 and token.startswith("<0x")}
        return found | {i: bytes.fromhex(digits) for i, digits in hexadecimal.items()}

    def identity(self) -> bytes:
        """The bytes that determine the ids of plain text."""
        ignored = ("added_tokens", "post_processor", "decoder", "truncation", "padding", "version")
        return json.dumps({k: v for k, v in self.document.items() if k not in ignored}, sort_keys=True).encode()

    def without(self, ids: set[int]) -> LibraryEncoding:
        """The same encoding without some of the added tokens."""
        kept = [token for token in self.document["added_tokens"] if token["id"] not in ids]
        return LibraryEncoding({**self.document, "added_tokens": kept}, self._file)
