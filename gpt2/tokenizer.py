"""Encodes text as token ids, and decodes ids to text. tiktoken computes GPT-2's byte-level BPE. If the library
`tokenizers` is installed, it runs any tokenizer in a Hugging Face folder."""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeGuard

import numpy as np
import tiktoken

from gpt2 import pickles
from gpt2.file_kinds import printable, read_json
from gpt2.huggingface_tokenizer import (
    END_OF_TEXT,
    HF_CONFIG,
    HF_MERGES,
    HF_TOKENIZER,
    HF_VOCAB,
    ONLY_PLAIN,
    OPENAI_MERGES,
    AddedToken,
    LibraryEncoding,
    as_ids,
    byte_of,
    incomplete,
    is_tokenizer_folder,
    library,
    read_files,
)
from tinygrad2.checkpoint import JsonObject

VOCABULARY_FILE, RANKS_FILE = "vocabulary.json", "vocabulary.tiktoken"  # written by `save`
CHARACTERS_FILE = "meta.pkl"  # nanoGPT's file with a vocabulary of characters
BUILT_IN = ("bytes", "gpt2")

# GPT-2's pre-tokenizer. Before bytes are merged, it splits text (Radford et al., 2019, section 2.2) into contractions,
# words, numbers and punctuation, each with the preceding space, and whitespace. The possessive quantifiers are from
# tiktoken; they are faster and give the same pieces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
BYTES_PATTERN = r"(?s:.+)"  # does not split, since this vocabulary has no merges
NO_ID = (1 << 32) - 1  # represents a missing id in a fingerprint


class Encoding(Protocol):
    """Encodes plain text as ids.

    tokens      the bytes of each token, by id.
    byte_level  whether the bytes of a text are the concatenated bytes of its tokens.
    """

    @property
    def tokens(self) -> Mapping[int, bytes]: ...
    @property
    def byte_level(self) -> bool: ...

    def encode(self, text: str, special_tokens: bool, continues: bool) -> np.ndarray:
        """The ids (uint32) of a text.

        special_tokens  whether added tokens are recognized.
        continues       whether the text follows another part of the same text.
        """

    def identity(self) -> bytes:
        """Bytes that, together with the tokens, determine the ids."""


class Tokenizer:
    """A vocabulary that maps ids 0 ... vocab_size - 1 to byte strings, and the rule that splits text into these.

    name         "bytes", "gpt2", or the name of the file or folder that it was loaded from.
    vocab_size   the number of ids, including added tokens.
    added        the added tokens, such as <|endoftext|>. By default, `encode` treats their text as plain text; in a
                 prompt, it becomes the added token.
    end_of_text  the id that separates documents and ends a generated text; None for a vocabulary of characters.
    end_ids      every id that ends a generated text, end_of_text first.
    begin        the id that starts a text generated without a prompt.

    Use `Tokenizer.load` to create a tokenizer.
    """

    def __init__(
        self,
        name: str,
        encoding: Encoding,
        added: Sequence[AddedToken] = (),
        begin_id: int | None = None,
        end_ids: Sequence[int] = (),
        *,
        built_in: bool = False,
        plain: BytePairs | None = None,
        portable: bool = True,
    ):
        """plain     an encoding by tiktoken that gives the same ids for plain text as `encoding`, or None.
        portable  whether tiktoken also gives the same ids for prompts, so that `save` can write files for it."""
        self.name, self.added = name, tuple(added)
        self._encoding, self._plain, self._built_in, self._portable = encoding, plain, built_in, portable
        if isinstance(encoding, BytePairs):
            self._plain = encoding
        marks = [token.id for token in added if token.content == END_OF_TEXT]
        self.end_ids = tuple(end_ids) or tuple(marks)
        self.end_of_text = self.end_ids[0] if self.end_ids else None
        self._begin_id = begin_id

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size})"

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        """The bytes of each token, by id."""
        return {**self._encoding.tokens, **{token.id: token.content.encode("utf-8", "replace") for token in self.added}}

    @cached_property
    def vocab_size(self) -> int:
        """The number of ids, including added tokens."""
        return max(self.tokens) + 1

    @cached_property
    def unused_ids(self) -> list[int]:
        """The ids below vocab_size that have no token."""
        return [] if len(self.tokens) == self.vocab_size else sorted(set(range(self.vocab_size)) - self.tokens.keys())

    @cached_property
    def begin(self) -> int:
        known = [i for i in (self._begin_id, self.end_of_text) if i is not None]
        newlines = (i for i, token in self.tokens.items() if token == b"\n")
        return known[0] if known else next(newlines, min(self.tokens))

    @staticmethod
    def load(name: str | Path) -> Tokenizer:
        """Load a tokenizer by name or path.

        "bytes"   256 bytes and <|endoftext|>; no file is needed.
        "gpt2"    GPT-2's vocabulary, which tiktoken downloads once to TIKTOKEN_CACHE_DIR (by default a temporary
                  folder).
        a path    a .tiktoken file (lines with a base64 token and a rank), for which GPT-2's pattern is used, and the
                  first unused id is <|endoftext|>; a Hugging Face folder with tokenizer.json, or with vocab.json and
                  merges.txt (or encoder.json and vocab.bpe), including its added tokens; nanoGPT's meta.pkl; or a
                  folder written by `save`.

        Raises ValueError or FileNotFoundError if the name is unknown or the files are not a valid vocabulary.
        """
        path = Path(name)
        if name == "bytes":
            ranks = {bytes([byte]): byte for byte in range(256)}
            return _make("bytes", ranks, path, BYTES_PATTERN, built_in=True)
        if name == "gpt2":
            encoding = BytePairs(_download_gpt2(), GPT2_PATTERN, range(50256))
            return Tokenizer("gpt2", encoding, [AddedToken(END_OF_TEXT, 50256)], built_in=True)
        if (path / VOCABULARY_FILE).is_file():
            return _load_saved(path)
        if is_tokenizer_folder(path) or (path.name == HF_TOKENIZER and path.is_file()):
            return _load_hugging_face(path)
        characters = path if path.suffix == ".pkl" else path / CHARACTERS_FILE
        if characters.is_file():
            return Tokenizer(characters.resolve().parent.name, Characters(_read_characters(characters)))
        if path.is_file():
            return _make(path.stem, _read_ranks(path), path)
        if path.is_dir():
            raise FileNotFoundError(
                f"tokenizer {path}: the folder has none of {VOCABULARY_FILE}, {HF_TOKENIZER}, {HF_VOCAB} with "
                f"{HF_MERGES}, and {CHARACTERS_FILE}{incomplete(path)}"
            )
        raise FileNotFoundError(
            f"tokenizer {str(name)!r} is unknown; choose {', '.join(BUILT_IN)}, or the path of a .tiktoken file or a "
            f"folder with {HF_VOCAB} and {HF_MERGES}, {HF_TOKENIZER} or {CHARACTERS_FILE}"
        )

    @staticmethod
    def for_model(folder: str | Path, vocab_size: int) -> Tokenizer:
        """The tokenizer of the model in `folder`: the tokenizer saved there, or else the built-in tokenizer of this
        size.

        For a model file, it is the tokenizer saved next to the file, unless only a built-in tokenizer has the right
        size. Added tokens whose ids are outside the model's vocabulary are omitted. Raises ValueError if no tokenizer
        of this size is known, or if the tokenizer in the folder has more tokens than the model.
        """
        folder, is_file = (Path(folder).parent, True) if Path(folder).is_file() else (Path(folder), False)
        names = (VOCABULARY_FILE, HF_MERGES, OPENAI_MERGES, HF_TOKENIZER, CHARACTERS_FILE)
        saved = any((folder / name).is_file() for name in names)
        tokenizer = Tokenizer.load(folder) if saved else None
        if tokenizer is None or (is_file and tokenizer.vocab_size != vocab_size):
            built_in = {257: "bytes", 50257: "gpt2", 50304: "gpt2"}.get(vocab_size)  # 50304 is padded
            tokenizer = Tokenizer.load(built_in) if built_in else tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{folder}: no tokenizer is known for a vocabulary of {vocab_size}; add {HF_VOCAB} and {HF_MERGES}, "
                f"or {HF_TOKENIZER}, or nanoGPT's {CHARACTERS_FILE} for a character-level model"
            )
        limited = tokenizer if tokenizer.vocab_size <= vocab_size else tokenizer._limited(vocab_size)
        if limited.vocab_size > vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens; the model has {vocab_size}")
        return limited

    def _limited(self, vocab_size: int) -> Tokenizer:
        """This tokenizer without added tokens whose ids are vocab_size or more, except <|endoftext|>."""
        dropped = {token.id for token in self.added if token.id >= vocab_size and token.content != END_OF_TEXT}
        added = [token for token in self.added if token.id not in dropped]
        encoding = self._encoding.without(dropped) if isinstance(self._encoding, LibraryEncoding) else self._encoding
        ends = [i for i in self.end_ids if i not in dropped]
        begin = None if self._begin_id in dropped else self._begin_id
        return self._with(encoding, added, begin, ends)

    def _with(
        self, encoding: Encoding, added: Sequence[AddedToken], begin: int | None, ends: Sequence[int]
    ) -> Tokenizer:
        kept = {"built_in": self._built_in, "portable": self._portable}
        return Tokenizer(self.name, encoding, added, begin, ends, plain=self._plain, **kept)

    @property
    def _written(self) -> Encoding:
        """The encoding that `save` writes to files."""
        return self._plain if self._plain is not None and self._portable else self._encoding

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the vocabulary for plain text: the SHA-256 hash, in hexadecimal, of the pattern, the tokens
        in the order of their ids, and the id of <|endoftext|>. It does not depend on the name or format of the file, or
        on other added tokens."""
        encoding = self._plain or self._encoding
        if isinstance(encoding, LibraryEncoding):
            return hashlib.sha256(encoding.identity()).hexdigest()
        sha = hashlib.sha256(encoding.identity())
        mark = next((token.id for token in self.added if token.content == END_OF_TEXT), NO_ID)
        tokens = {**encoding.tokens, **({mark: END_OF_TEXT.encode()} if mark != NO_ID else {})}
        for i in range(max(tokens) + 1):
            token = tokens.get(i)
            sha.update(NO_ID.to_bytes(4, "little") if token is None else len(token).to_bytes(4, "little") + token)
        sha.update(mark.to_bytes(4, "little"))
        return sha.hexdigest()

    def includes(self, other: Tokenizer) -> bool:
        """Whether every id of `other` is the same token in this tokenizer, so that a model with this tokenizer can use
        data encoded by `other`."""
        added = {(token.content, token.id) for token in self.added}
        ids = self.tokens.keys()
        return self.fingerprint == other.fingerprint and all(
            (token.content, token.id) in added or (token.content == END_OF_TEXT and token.id not in ids)
            for token in other.added
        )

    def encode(self, text: str, special_tokens: bool = False, continues: bool = False) -> np.ndarray:
        """The ids (uint32) of `text`. Lone surrogates, which are not valid in UTF-8, become U+FFFD. Releases the GIL.

        special_tokens  encode the text of each added token as one token; otherwise, treat it as plain text.
        continues       whether the text follows another part of the same text. If so, a tokenizer that adds a leading
                        space to a text does not add one.

        Raises ValueError for a character that is not in a vocabulary of characters.
        """
        try:
            return self._encode(text, special_tokens, continues)
        except (UnicodeEncodeError, TypeError):  # raised by tiktoken, and by tokenizers
            replaced = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encode(replaced, special_tokens, continues)

    def _encode(self, text: str, special_tokens: bool, continues: bool) -> np.ndarray:
        if isinstance(self._encoding, LibraryEncoding) or not special_tokens or not self.added:
            return self._encoding.encode(text, special_tokens, continues)
        pieces = self._added_pattern.split(text)  # plain text and added tokens, alternating
        ids = [
            np.array([self._added_ids[piece]], np.uint32) if i % 2 else self._encoding.encode(piece, False, continues)
            for i, piece in enumerate(pieces)
            if piece
        ]
        return np.concatenate(ids) if ids else np.array([], np.uint32)

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        """Matches an added token; if several begin at the same character, the longest."""
        texts = sorted(self._added_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, texts))})")

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        return {token.content: token.id for token in self.added}

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of a prompt. Added tokens are recognized, and tokens that the tokenizer adds before or after a text,
        such as a begin token, are included."""
        if not isinstance(self._encoding, LibraryEncoding):
            return self.encode(text, special_tokens=True)
        try:
            return self._encoding.encode_prompt(text)
        except TypeError:
            return self._encoding.encode_prompt(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8, such as part of a character, become U+FFFD."""
        if isinstance(self._encoding, LibraryEncoding) and not self._encoding.byte_level:
            return self._encoding.decode(self._checked(ids))
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `ids`, for streaming, since a character may span several tokens. If the tokenizer is not
        byte-level, these are the bytes that each token adds when it follows another token.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join(self.tokens.get(i, b"") for i in self._checked(ids))

    def _checked(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if len(outside):
            raise ValueError(
                f"decode: id {outside[0]} is outside the vocabulary {self.name}, 0 to {self.vocab_size - 1}"
            )
        return array.tolist()

    def save(self, folder: str | Path) -> None:
        """Write the files that `load(folder)` reads: the name, the fingerprint, the added tokens, and the tokens unless
        they are built in."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described: JsonObject = self.describe()
        encoding = self._written
        marks = [token.id for token in self.added if token.content == END_OF_TEXT]
        usual = len(self.added) == len(marks) == 1 and marks[0] == _first_free(encoding.tokens)
        if not usual or isinstance(encoding, LibraryEncoding):
            described["added_tokens"] = [asdict(token) for token in self.added]
        if self._begin_id not in (None, self.end_of_text) or self.end_ids != tuple(marks):
            described |= {"begin_id": self._begin_id, "end_ids": list(self.end_ids)}
        if isinstance(encoding, Characters):
            described["characters"] = encoding.characters
        elif isinstance(encoding, LibraryEncoding):
            (folder / HF_TOKENIZER).write_text(json.dumps(encoding.document, ensure_ascii=False), encoding="utf-8")
        elif not self._built_in:
            lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in sorted(encoding.tokens.items()))
            (folder / RANKS_FILE).write_text("".join(lines), encoding="ascii")
        (folder / VOCABULARY_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def save_hugging_face(self, folder: str | Path, n_positions: int) -> None:
        """Write the files that transformers reads: tokenizer_config.json, and either vocab.json and merges.txt, or
        tokenizer.json.

        n_positions  the model's context length, which transformers stores with the tokenizer.
        Raises ValueError if the vocabulary cannot be built by merging pairs of tokens.
        """
        folder, encoding = Path(folder), self._written
        text_of = {token.id: token.content for token in self.added}
        end = text_of.get(-1 if self.end_of_text is None else self.end_of_text, END_OF_TEXT)
        special = {"bos_token": text_of.get(self.begin, end), "eos_token": end, "unk_token": end}
        if isinstance(encoding, LibraryEncoding):
            (folder / HF_TOKENIZER).write_text(json.dumps(encoding.document, ensure_ascii=False), encoding="utf-8")
            del special["unk_token"]
            kind = "PreTrainedTokenizerFast"
        elif isinstance(encoding, BytePairs):
            self._save_vocabulary(folder, encoding)
            kind = "GPT2Tokenizer"
        else:
            raise ValueError(f"the tokenizer {self.name} has characters as tokens, which transformers does not support")
        config: JsonObject = {"tokenizer_class": kind, "model_max_length": n_positions, **special}
        if len(self.added) > 1:
            config["added_tokens_decoder"] = {
                str(token.id): {key: value for key, value in asdict(token).items() if key != "id"}
                for token in self.added
            }
        (folder / HF_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _save_vocabulary(self, folder: Path, encoding: BytePairs) -> None:
        character_of = {byte: character for character, byte in byte_of().items()}
        tokens = dict(sorted(encoding.tokens.items()))
        ranks = {token: i for i, token in enumerate(tokens.values())}

        def text(token: bytes) -> str:
            return "".join(character_of[byte] for byte in token)

        merges = [" ".join(map(text, _parts(token, ranks))) for token in tokens.values() if len(token) > 1]
        marks = {token.id: END_OF_TEXT for token in self.added if token.content == END_OF_TEXT}
        named = {name: i for i, name in sorted([*((i, text(token)) for i, token in tokens.items()), *marks.items()])}
        (folder / HF_VOCAB).write_text(json.dumps(named, ensure_ascii=False), encoding="utf-8")
        (folder / HF_MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")

    def describe(self) -> dict[str, str | int]:
        """The identity of the tokenizer, for other files to record."""
        return {"name": self.name, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size}


class BytePairs:
    """Byte-level BPE, computed by tiktoken.

    pattern  splits text into pieces, within which bytes are merged.
    ids      the ids of the tokens.
    """

    byte_level = True

    def __init__(self, encoding: tiktoken.Encoding, pattern: str, ids: Sequence[int]):
        self._encoding, self._pattern, self._ids = encoding, pattern, ids

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        return {i: self._encoding.decode_single_token_bytes(i) for i in self._ids}

    def encode(self, text: str, special_tokens: bool, continues: bool) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def identity(self) -> bytes:
        return self._pattern.encode()


class Characters:
    """An encoding with one token per character, as in nanoGPT's first example.

    characters  the characters, by id.
    """

    byte_level = True

    def __init__(self, characters: list[str]):
        self.characters = characters
        self._ids = {character: i for i, character in enumerate(characters)}

    @cached_property
    def tokens(self) -> dict[int, bytes]:
        return {i: character.encode("utf-8", "replace") for i, character in enumerate(self.characters)}

    def encode(self, text: str, special_tokens: bool, continues: bool) -> np.ndarray:
        try:
            return np.array([self._ids[character] for character in text], np.uint32)
        except KeyError as error:
            raise ValueError(
                f"tokenizer: {error.args[0]!r} is not in the vocabulary of {len(self.characters)} characters"
            ) from None

    def identity(self) -> bytes:
        return b"characters"


def _make(
    name: str, ranks: dict[bytes, int], path: Path, pattern: str = GPT2_PATTERN, built_in: bool = False
) -> Tokenizer:
    """The tokenizer with these tokens. Their ranks are their ids, and pairs with a lower rank are merged first.
    <|endoftext|> gets the first unused id."""
    mark = AddedToken(END_OF_TEXT, _first_free(ranks.values()))
    _check_ids(ranks, [mark], path)
    return Tokenizer(name, _byte_pairs(name, ranks, pattern), [mark], built_in=built_in)


def _byte_pairs(name: str, ranks: dict[bytes, int], pattern: str = GPT2_PATTERN) -> BytePairs:
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return BytePairs(encoding, pattern, list(ranks.values()))


def _first_free(ids: Iterable[int]) -> int:
    """The lowest unused id."""
    taken = set(ids)
    return next(i for i in range(len(taken) + 1) if i not in taken)


def _check_ids(ranks: dict[bytes, int], added: Sequence[AddedToken], path: Path) -> None:
    """Raise ValueError unless each byte has a token, and each id belongs to a token or an added token."""
    ids = set(ranks.values())
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"tokenizer {path}: byte {missing[0]} has no token; expected a token for each of the 256 bytes"
        )
    others = {token.id for token in added}
    below = {i for i in others if i < max(ids)}
    if len(ids) != len(ranks) or ids & others or min(ids) < 0 or max(ids) + 1 != len(ids) + len(below):
        raise ValueError(
            f"tokenizer {path}: the {len(ranks)} tokens have ids up to {max(ids)}; expected every id from 0 once, "
            f"except at most one, the id of {END_OF_TEXT}"
        )


def _download_gpt2() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, a cache that is not writable, or a wrong checksum
        raise FileNotFoundError(
            f"tokenizer gpt2: its vocabulary could not be downloaded ({type(error).__name__}); connect to the network "
            f"once, set TIKTOKEN_CACHE_DIR to a folder with tiktoken's two files, or pass a folder with {HF_VOCAB} and "
            f"{HF_MERGES}"
        ) from None


def _load_hugging_face(path: Path) -> Tokenizer:
    """Load a Hugging Face tokenizer, with the library `tokenizers` if it is installed. If tiktoken computes the same
    ids, `save` writes files for tiktoken, so the saved tokenizer does not need the library."""
    files = read_files(path)
    name = files.file.resolve().parent.name
    plain, reason, portable = None, None, True
    try:
        ranks = files.plain_ranks()
        if not files.end_ids and all(token.content != END_OF_TEXT for token in files.added):
            files.added.append(AddedToken(END_OF_TEXT, _first_free([*ranks.values(), *(t.id for t in files.added)])))
        _check_ids(ranks, files.added, files.file)
        plain = _byte_pairs(name, ranks)
        files.check_prompts()
    except ValueError as error:
        reason, portable = error, False
    encoding: Encoding | None = plain if portable else None
    if library() is not None:
        try:
            encoding = LibraryEncoding(files.library_document(), files.file)
        except ValueError as error:
            reason = error if reason is None or ONLY_PLAIN in str(reason) else reason
    if encoding is None:
        assert reason is not None
        raise reason
    return Tokenizer(name, encoding, files.added, files.begin_id, files.end_ids, plain=plain, portable=portable)


def _load_saved(folder: Path) -> Tokenizer:
    file = folder / VOCABULARY_FILE
    try:
        saved = read_json(file)
        name, fingerprint = saved["name"], saved["fingerprint"]
        if not isinstance(name, str) or not isinstance(fingerprint, str) or not fingerprint.isalnum():
            raise TypeError
        added = [AddedToken(**values) for values in saved["added_tokens"]] if "added_tokens" in saved else None
        if not all(isinstance(token.content, str) and type(token.id) is int and token.id >= 0 for token in added or ()):
            raise TypeError
        begin, ends, characters = saved.get("begin_id"), as_ids(saved.get("end_ids")), saved.get("characters")
        if not (begin is None or type(begin) is int) or not (characters is None or _is_characters(characters)):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"tokenizer {file}: expected a JSON object with name and fingerprint; save the tokenizer again"
        ) from None
    tokenizer = _saved_vocabulary(folder, name, characters, added)
    if added is not None or begin is not None or ends:
        tokenizer = tokenizer._with(tokenizer._encoding, tokenizer.added if added is None else added, begin, ends)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"tokenizer {file}: the vocabulary has fingerprint {tokenizer.fingerprint[:12]}; expected "
            f"{fingerprint[:12]}; a file was changed; restore it from a backup"
        )
    return tokenizer


def _saved_vocabulary(
    folder: Path, name: str, characters: list[str] | None, added: Sequence[AddedToken] | None
) -> Tokenizer:
    """The vocabulary in a folder that `save` wrote, without the listed added tokens."""
    ranks_file = folder / RANKS_FILE
    if characters is not None:
        return Tokenizer(name, Characters(characters))
    if ranks_file.is_file():
        ranks = _read_ranks(ranks_file)
        if added is None:
            return _make(name, ranks, ranks_file)
        _check_ids(ranks, added, ranks_file)
        return Tokenizer(name, _byte_pairs(name, ranks), added)
    if name in BUILT_IN:
        return Tokenizer.load(name)
    if (folder / HF_TOKENIZER).is_file():
        tokenizer = _load_hugging_face(folder / HF_TOKENIZER)
        tokenizer.name = name
        return tokenizer
    raise FileNotFoundError(
        f"tokenizer {ranks_file}: no such file; {VOCABULARY_FILE} requires it for the vocabulary {printable(name)!r}"
    )


def _read_characters(file: Path) -> list[str]:
    """The characters in nanoGPT's meta.pkl, by id."""
    meta = pickles.read_plain(file)
    characters = meta.get("itos") if isinstance(meta, dict) else None
    listed = [characters.get(i) for i in range(len(characters))] if isinstance(characters, dict) else None
    if not _is_characters(listed):
        raise ValueError(f"tokenizer {file}: no characters under the key itos; expected nanoGPT's meta.pkl")
    return listed


def _is_characters(values: object) -> TypeGuard[list[str]]:
    return (
        isinstance(values, list)
        and len(values) > 0
        and all(isinstance(value, str) and len(value) == 1 for value in values)
        and len(set(values)) == len(values)
    )


def _read_ranks(file: Path) -> dict[bytes, int]:
    """Read a .tiktoken file. tiktoken's own reader is not used, because it caches by path and misses later changes to
    the file."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"tokenizer {file}: line {number} is not valid; expected a base64 token and a rank"
            ) from None
    return ranks


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that merge into `token`: the result of applying all merges with a lower rank to its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        best = min(pairs)
        if best >= ranks[token]:
            raise ValueError(f"the token {token!r} is not the merge of two tokens")
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
