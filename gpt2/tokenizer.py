"""Encoding of text to token ids and decoding, with byte-level BPE vocabularies. tiktoken computes it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_FILE, RANKS_FILE = "vocabulary.json", "vocabulary.tiktoken"  # written by `save`
HF_VOCAB, HF_MERGES, HF_CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
HF_TOKENIZER = "tokenizer.json"  # of tokenizers and transformers 5: vocabulary, merges, normalizer and pre-tokenizer
BUILT_IN = ("bytes", "gpt2")

# GPT-2's pre-tokenizer: it splits text before bytes are merged (Radford et al., 2019, section 2.2) into contractions,
# words, numbers and punctuation, each with the space before it, and white space. With possessive quantifiers, as in
# tiktoken: the same pieces, faster.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
BYTES_PATTERN = r"(?s:.+)"  # no split: this vocabulary has no merges


class Tokenizer:
    """A vocabulary: tokens 0 ... vocab_size - 1 are byte strings, except one, the special token <|endoftext|>.

    name         "bytes", "gpt2", or the name of the file or folder that it was loaded from.
    vocab_size   the number of ids, the special token included.
    end_of_text  the id of the special token. `encode` never returns it: "<|endoftext|>" in a text is plain text.

    Create one with `Tokenizer.load`.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding, pattern: str, built_in: bool):
        self.name = name
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token
        self._encoding = encoding
        self._pattern = pattern
        self._built_in = built_in

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size})"

    @staticmethod
    def load(name: str | Path) -> Tokenizer:
        """The tokenizer called `name`.

        "bytes"   256 bytes and <|endoftext|>; needs no file.
        "gpt2"    GPT-2's, which tiktoken downloads once into TIKTOKEN_CACHE_DIR (by default a temporary folder).
        a path    a .tiktoken file (lines of base64 token and rank), a folder with vocab.json and merges.txt or with
                  tokenizer.json, or a folder written by `save`. Text is split by GPT-2's pattern. <|endoftext|> gets
                  the first id that no token has.

        Raises ValueError or FileNotFoundError for an unknown name and for files that are not a valid vocabulary.
        """
        path = Path(name)
        if name == "bytes":
            ranks = {bytes([byte]): byte for byte in range(256)}
            return Tokenizer("bytes", _encoding("bytes", ranks, BYTES_PATTERN, 256), BYTES_PATTERN, built_in=True)
        if name == "gpt2":
            return Tokenizer("gpt2", _download_gpt2(), GPT2_PATTERN, built_in=True)
        if (path / VOCABULARY_FILE).is_file():
            return _load_saved(path)
        if (path / HF_VOCAB).is_file() and (path / HF_MERGES).is_file():
            return _make(path.resolve().name, _read_hf_vocab(path), path)
        file = path if path.is_file() else path / HF_TOKENIZER
        if file.name == HF_TOKENIZER and file.is_file():
            return _make(file.resolve().parent.name, _read_hf_tokenizer(file), file)
        if path.is_file():
            return _make(path.stem, _read_ranks(path), path)
        if path.is_dir():
            raise FileNotFoundError(
                f"tokenizer {path}: the folder has none of {VOCABULARY_FILE}, {HF_VOCAB} with {HF_MERGES}, and "
                f"{HF_TOKENIZER}"
            )
        raise FileNotFoundError(
            f"tokenizer {str(name)!r} is unknown; choose {', '.join(BUILT_IN)}, or the path of a .tiktoken file or of "
            f"a folder with {HF_VOCAB} and {HF_MERGES} or {HF_TOKENIZER}"
        )

    @staticmethod
    def for_model(folder: str | Path, vocab_size: int) -> Tokenizer:
        """The tokenizer of the model in `folder`: the one saved there, else the built-in one of this vocabulary size.

        If the model is a file, the tokenizer saved beside it, unless only a built-in one has the right size.
        Raises ValueError if no tokenizer of this size is known, or if the folder's has more tokens than the model.
        """
        folder, is_file = (Path(folder).parent, True) if Path(folder).is_file() else (Path(folder), False)
        saved = any((folder / name).is_file() for name in (VOCABULARY_FILE, HF_MERGES, HF_TOKENIZER))
        tokenizer = Tokenizer.load(folder) if saved else None
        if tokenizer is None or (is_file and tokenizer.vocab_size != vocab_size):
            built_in = {257: "bytes", 50257: "gpt2", 50304: "gpt2"}.get(vocab_size)  # the last is padded
            tokenizer = Tokenizer.load(built_in) if built_in else tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{folder}: no tokenizer is known for a vocabulary of {vocab_size}; add {HF_VOCAB} and {HF_MERGES}, "
                f"or {HF_TOKENIZER}"
            )
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}")
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the vocabulary: SHA-256 (hex) of the pattern, the tokens in order of their ids, and
        end_of_text. It depends neither on the name nor on the format of the file."""
        sha = hashlib.sha256(self._pattern.encode())
        for i in range(self.vocab_size):
            token = self._encoding.decode_single_token_bytes(i)
            sha.update(len(token).to_bytes(4, "little") + token)
        sha.update(self.end_of_text.to_bytes(4, "little"))
        return sha.hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids (uint32) of `text`. Lone surrogates, which are not valid in UTF-8, become U+FFFD. Releases the GIL."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            replaced = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encoding.encode_to_numpy(replaced, disallowed_special=())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`. Bytes that are not valid UTF-8, such as a part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `ids`, for streaming: a character may be spread over several tokens.

        Raises ValueError for an id outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if len(outside):
            raise ValueError(
                f"decode: id {outside[0]} is outside the vocabulary {self.name}, 0 to {self.vocab_size - 1}"
            )
        return self._encoding.decode_bytes(array.tolist())

    def save(self, folder: str | Path) -> None:
        """Write the files that `load(folder)` reads: name, fingerprint, and the tokens if they are not built in."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._built_in:
            tokens = ((i, self._encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size))
            lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in tokens if i != self.end_of_text)
            (folder / RANKS_FILE).write_text("".join(lines), encoding="ascii")
        text = json.dumps(self.describe(), indent=2)
        (folder / VOCABULARY_FILE).write_text(text + "\n", encoding="utf-8")

    def save_hugging_face(self, folder: str | Path, n_positions: int) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, from which transformers makes the same tokenizer.

        Raises ValueError if the vocabulary cannot be built by merging pairs of tokens.

        n_positions  the model's context, which transformers stores with the tokenizer.
        """
        folder = Path(folder)
        character_of = {byte: character for character, byte in _byte_of().items()}
        tokens = [self._encoding.decode_single_token_bytes(i) for i in range(self.vocab_size) if i != self.end_of_text]
        ranks = {token: i for i, token in enumerate(tokens)}

        def text(token: bytes) -> str:
            return "".join(character_of[byte] for byte in token)

        merges = [" ".join(map(text, _parts(token, ranks))) for token in tokens if len(token) > 1]
        ids = range(self.vocab_size)
        named = {
            END_OF_TEXT if i == self.end_of_text else text(self._encoding.decode_single_token_bytes(i)): i for i in ids
        }
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": n_positions, **special}
        (folder / HF_VOCAB).write_text(json.dumps(named, ensure_ascii=False), encoding="utf-8")
        (folder / HF_MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        (folder / HF_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def describe(self) -> dict[str, str | int]:
        """The identity of the tokenizer, as other files record it."""
        return {"name": self.name, "fingerprint": self.fingerprint, "vocab_size": self.vocab_size}


def _encoding(name: str, ranks: dict[bytes, int], pattern: str, end_of_text: int) -> tiktoken.Encoding:
    special = {END_OF_TEXT: end_of_text}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _make(name: str, ranks: dict[bytes, int], path: Path) -> Tokenizer:
    """The tokenizer of these tokens and their ranks, which are the ids; a lower rank merges first."""
    ids = set(ranks.values())
    end_of_text = next(i for i in range(len(ids) + 1) if i not in ids)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"tokenizer {path}: byte {missing[0]} has no token; each of the 256 bytes needs one")
    if len(ids) != len(ranks) or ids | {end_of_text} != set(range(len(ids) + 1)):
        raise ValueError(
            f"tokenizer {path}: the {len(ranks)} tokens have ids up to {max(ids)}; expected every id from 0 on once, "
            f"except at most one, which is that of {END_OF_TEXT}"
        )
    return Tokenizer(name, _encoding(name, ranks, GPT2_PATTERN, end_of_text), GPT2_PATTERN, built_in=False)


def _download_gpt2() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, a cache that cannot be written, a wrong checksum
        raise FileNotFoundError(
            f"tokenizer gpt2: its vocabulary could not be downloaded ({type(error).__name__}); connect once, or set "
            f"TIKTOKEN_CACHE_DIR to a folder that has tiktoken's two files, or name a folder with {HF_VOCAB} and "
            f"{HF_MERGES}"
        ) from None


def _load_saved(folder: Path) -> Tokenizer:
    file = folder / VOCABULARY_FILE
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        name, fingerprint = saved["name"], saved["fingerprint"]
        if not isinstance(name, str) or not isinstance(fingerprint, str) or not fingerprint.isalnum():
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"tokenizer {file}: expected a JSON object with name and fingerprint; save the tokenizer again"
        ) from None
    if (folder / RANKS_FILE).is_file():
        tokenizer = _make(name, _read_ranks(folder / RANKS_FILE), folder / RANKS_FILE)
    elif name in BUILT_IN:
        tokenizer = Tokenizer.load(name)
    else:
        raise FileNotFoundError(
            f"tokenizer {folder / RANKS_FILE}: no such file; it is the vocabulary {name[:80]!r} of {VOCABULARY_FILE}"
        )
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"tokenizer {file}: the vocabulary has fingerprint {tokenizer.fingerprint[:12]}, expected "
            f"{fingerprint[:12]}; a file has been changed, restore it from a backup"
        )
    return tokenizer


def _read_ranks(file: Path) -> dict[bytes, int]:
    """A .tiktoken file. Not with tiktoken's own reader: it caches by path and misses later changes of a file."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"tokenizer {file}: line {number} is not a base64 token and a rank") from None
    return ranks


def _byte_of() -> dict[str, int]:
    """The byte that each character in vocab.json and merges.txt represents: printable bytes are the characters of the
    same number, the others are U+0100, U+0101, ..."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that merge into `token`: the result of the merges of lower rank on its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        best = min(pairs)
        if best >= ranks[token]:
            raise ValueError(f"the token {token!r} is not the merge of two tokens")
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _read_hf_vocab(folder: Path) -> dict[bytes, int]:
    """vocab.json and merges.txt."""
    try:
        vocab = json.loads((folder / HF_VOCAB).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        vocab = None
    lines = (folder / HF_MERGES).read_text(encoding="utf-8", errors="replace").split("\n")
    merges = [
        (f"line {number} ({line!r})", line.rstrip("\r").split(" "))
        for number, line in enumerate(lines, 1)
        if line.strip() and not (number == 1 and line.startswith("#version"))
    ]
    return _ranks(vocab, folder / HF_VOCAB, merges, folder / HF_MERGES)


def _read_hf_tokenizer(file: Path) -> dict[bytes, int]:
    """tokenizer.json. Raises ValueError, naming the kind of the tokenizer, if it is not byte-level BPE as GPT-2's."""
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        model, splitter = contents["model"], contents.get("pre_tokenizer") or {"type": "none"}
        kinds = [splitter["type"], *(part["type"] for part in splitter.get("pretokenizers", []))]
        settings = {name: value for part in (contents, splitter, model) for name, value in part.items()}
        added = {token["content"]: token["id"] for token in contents.get("added_tokens") or []}
        vocab, merges = model["vocab"], model.get("merges")
        special = [token for token in added if token in vocab and token != END_OF_TEXT]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"tokenizer {file}: expected one JSON object with a model and its vocabulary") from None

    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"tokenizer {file}: {reason}; only byte-level BPE with GPT-2's pre-tokenizer is supported")

    kind = model.get("type", "BPE" if merges else "unknown")  # old files have no "type"
    if kind != "BPE" or kinds != ["ByteLevel"] or not isinstance(merges, list):
        refuse(f"its model is {str(kind)[:80]!r} and its pre-tokenizer {', '.join(map(str, kinds))[:80]!r}")
    for name, expected in HF_SETTINGS.items():
        if (value := settings.get(name, expected)) != expected and (value or expected):
            refuse(f"its {name} is {str(value)[:80]!r}")
    if special:
        refuse(f"its vocabulary has the special token {special[0][:80]!r}")

    parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    ranks = _ranks(vocab, file, [(f"merge {i} ({str(pair)[:80]})", pair) for i, pair in enumerate(parts, 1)], file)
    end = added.get(END_OF_TEXT)
    if END_OF_TEXT in added and (type(end) is not int or end in ranks.values() or not 0 <= end <= len(ranks)):
        refuse(f"{END_OF_TEXT} has the id {str(end)[:80]}, which is not the one that its other tokens leave free")
    return ranks


# Settings of tokenizer.json, with the values that are supported (and null, "" or 0 for each that is not True).
HF_SETTINGS = {
    "normalizer": None,
    "add_prefix_space": False,
    "use_regex": True,
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "ignore_merges": False,
}


def _ranks(
    vocab: object, vocab_file: Path, merges: Sequence[tuple[str, object]], merges_file: Path
) -> dict[bytes, int]:
    """The tokens and their ids, from a vocabulary in GPT-2's characters for bytes, and merges, each with its place in
    the file.

    tiktoken merges the pair of lowest rank first. Raises ValueError if the merges are not in the order of the ids of
    their results.
    """
    byte_of = _byte_of()
    try:
        if not isinstance(vocab, dict):
            raise TypeError
        ranks = {bytes(byte_of[c] for c in token): int(i) for token, i in vocab.items() if token != END_OF_TEXT}
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"tokenizer {vocab_file}: expected one JSON object of tokens and ids") from None
    except KeyError as error:
        raise ValueError(
            f"tokenizer {vocab_file}: the character {error} represents no byte; expected a byte-level vocabulary"
        ) from None
    previous = -1
    for place, pair in merges:
        is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        text = "".join(pair) if is_pair and isinstance(pair, list) else ""
        token = bytes(byte_of[c] for c in text) if all(c in byte_of for c in text) else b""
        if ranks.get(token, -1) <= previous:
            raise ValueError(f"tokenizer {merges_file}: {place} does not make the next token of {vocab_file.name}")
        previous = ranks[token]
    if len(merges) + 256 != len(ranks):
        raise ValueError(
            f"tokenizer {merges_file}: {len(merges)} merges and 256 bytes make {len(merges) + 256} tokens; "
            f"{vocab_file.name} has {len(ranks)} besides {END_OF_TEXT}"
        )
    return ranks
