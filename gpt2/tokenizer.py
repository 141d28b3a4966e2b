"""Text to token ids and back: byte-level BPE vocabularies, all through tiktoken."""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, RANKS = "vocabulary.json", "vocabulary.tiktoken"  # what `save` writes
HF_VOCAB, HF_MERGES, HF_CONFIG = "vocab.json", "merges.txt", "tokenizer_config.json"
HF_WHOLE = "tokenizer.json"  # what tokenizers and transformers 5 write: vocabulary, merges and how text is cut
BUILT_IN = ("bytes", "gpt2")

# How GPT-2 cuts text before it merges bytes (Radford et al., 2019, section 2.2): contractions, words, numbers, other
# signs, each with the blank before it, and white space. Possessive, as tiktoken writes it: the same pieces, faster.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
BYTES_PATTERN = r"(?s:.+)"  # no two bytes ever merge, so nothing need be cut


class Tokenizer:
    """A vocabulary: tokens 0 ... vocab_size - 1 are byte strings, one of them the mark <|endoftext|>.

    name         "bytes", "gpt2", or the name of the file or folder that it came from.
    vocab_size   how many ids there are, the mark included.
    end_of_text  the mark's id. `encode` never gives it: the text "<|endoftext|>" is plain text.

    Make one with `Tokenizer.load`.
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

        "bytes"   256 bytes and the mark; needs no file.
        "gpt2"    GPT-2's, which tiktoken downloads once into TIKTOKEN_CACHE_DIR (by default a temporary folder).
        a path    a .tiktoken file (lines of base64 token and rank), a folder with vocab.json and merges.txt or with
                  tokenizer.json, or a folder that `save` wrote to. Text is cut by GPT-2's pattern. The mark takes the
                  first id that no token has.

        Raises ValueError or FileNotFoundError for an unknown name and for files that make no vocabulary.
        """
        path = Path(name)
        if name == "bytes":
            ranks = {bytes([byte]): byte for byte in range(256)}
            return Tokenizer("bytes", _encoding("bytes", ranks, BYTES_PATTERN, 256), BYTES_PATTERN, built_in=True)
        if name == "gpt2":
            return Tokenizer("gpt2", _download_gpt2(), GPT2_PATTERN, built_in=True)
        if (path / VOCABULARY).is_file():
            return _load_saved(path)
        if (path / HF_VOCAB).is_file() and (path / HF_MERGES).is_file():
            return _make(path.resolve().name, _read_hugging_face(path), path)
        whole = path if path.is_file() else path / HF_WHOLE
        if whole.name == HF_WHOLE and whole.is_file():
            return _make(whole.resolve().parent.name, _read_whole(whole), whole)
        if path.is_file():
            return _make(path.stem, _read_ranks(path), path)
        if path.is_dir():
            raise FileNotFoundError(
                f"tokenizer {path}: the folder has neither {VOCABULARY} nor {HF_VOCAB} and {HF_MERGES} nor {HF_WHOLE}"
            )
        raise FileNotFoundError(
            f"tokenizer {str(name)!r} is unknown; choose {', '.join(BUILT_IN)}, or the path of a .tiktoken file or of "
            f"a folder with {HF_VOCAB} and {HF_MERGES} or {HF_WHOLE}"
        )

    @staticmethod
    def for_model(folder: str | Path, vocab_size: int) -> Tokenizer:
        """The tokenizer of the model in `folder`: the one saved there, else the built-in one of this vocabulary size.

        For a model that is a file, the one saved beside it, unless its size differs and a built-in one's does not.
        Raises ValueError where that is not known, or where the folder's has more tokens than the model.
        """
        folder, alone = (Path(folder).parent, True) if Path(folder).is_file() else (Path(folder), False)
        saved = any((folder / name).is_file() for name in (VOCABULARY, HF_MERGES, HF_WHOLE))
        tokenizer = Tokenizer.load(folder) if saved else None
        if tokenizer is None or (alone and tokenizer.vocab_size != vocab_size):
            built_in = {257: "bytes", 50257: "gpt2", 50304: "gpt2"}.get(
                vocab_size
            )  # the last: padded with ids never used
            tokenizer = Tokenizer.load(built_in) if built_in else tokenizer
        if tokenizer is None:
            raise ValueError(
                f"{folder}: no tokenizer is known for a vocabulary of {vocab_size}; add {HF_VOCAB} and {HF_MERGES}, "
                f"or {HF_WHOLE}"
            )
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}")
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """The vocabulary's identity: SHA-256 (hex) of the pattern, every token in the order of ids, and the mark's id.

        Equal for the same vocabulary read from another kind of file, whatever its name.
        """
        sha = hashlib.sha256(self._pattern.encode())
        for i in range(self.vocab_size):
            token = self._encoding.decode_single_token_bytes(i)
            sha.update(len(token).to_bytes(4, "little") + token)
        sha.update(self.end_of_text.to_bytes(4, "little"))
        return sha.hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids (uint32) of `text`. Lone surrogates, which no UTF-8 text has, become U+FFFD. Releases the GIL."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._encoding.encode_to_numpy(whole, disallowed_special=())

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `ids`: what a stream needs, since a character may be spread over tokens.

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
        """Write into `folder` what `load(folder)` needs: name, fingerprint, and the tokens if they are not built in."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._built_in:
            tokens = ((i, self._encoding.decode_single_token_bytes(i)) for i in range(self.vocab_size))
            lines = (f"{base64.b64encode(token).decode()} {i}\n" for i, token in tokens if i != self.end_of_text)
            (folder / RANKS).write_text("".join(lines), encoding="ascii")
        text = json.dumps(self.describe(), indent=2)
        (folder / VOCABULARY).write_text(text + "\n", encoding="utf-8")

    def save_hugging_face(self, folder: str | Path, n_positions: int) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json into `folder`, from which transformers makes the same
        tokenizer. Raises ValueError for a vocabulary that is not made by merges of two tokens each.

        n_positions  the model's context, which transformers keeps with the tokenizer.
        """
        folder = Path(folder)
        sign = {byte: character for character, byte in _byte_of().items()}
        tokens = [self._encoding.decode_single_token_bytes(i) for i in range(self.vocab_size) if i != self.end_of_text]
        ranks = {token: i for i, token in enumerate(tokens)}

        def text(token: bytes) -> str:
            return "".join(sign[byte] for byte in token)

        merges = [" ".join(map(text, _parts(token, ranks))) for token in tokens if len(token) > 1]
        ids = range(self.vocab_size)
        named = {
            END_OF_TEXT if i == self.end_of_text else text(self._encoding.decode_single_token_bytes(i)): i for i in ids
        }
        marks = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": n_positions, **marks}
        (folder / HF_VOCAB).write_text(json.dumps(named, ensure_ascii=False), encoding="utf-8")
        (folder / HF_MERGES).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        (folder / HF_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def describe(self) -> dict[str, str | int]:
        """What other files say of the tokenizer that they were made with."""
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
        raise ValueError(f"tokenizer {path}: byte {missing[0]} has no token; every one of the 256 bytes needs one")
    if len(ids) != len(ranks) or ids | {end_of_text} != set(range(len(ids) + 1)):
        raise ValueError(
            f"tokenizer {path}: the {len(ranks)} tokens have ids up to {max(ids)}; expected every id from 0 on once, "
            f"with at most one left out for {END_OF_TEXT}"
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
    file = folder / VOCABULARY
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        name, fingerprint = saved["name"], saved["fingerprint"]
        if not isinstance(name, str) or not isinstance(fingerprint, str) or not fingerprint.isalnum():
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"tokenizer {file}: expected a JSON object with name and fingerprint; write it anew") from None
    if (folder / RANKS).is_file():
        tokenizer = _make(name, _read_ranks(folder / RANKS), folder / RANKS)
    elif name in BUILT_IN:
        tokenizer = Tokenizer.load(name)
    else:
        raise FileNotFoundError(
            f"tokenizer {folder / RANKS}: there is no such file; {VOCABULARY} says that it is {name[:80]!r}"
        )
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"tokenizer {file}: the vocabulary has fingerprint {tokenizer.fingerprint[:12]}, expected "
            f"{fingerprint[:12]}; a file was changed, so restore it"
        )
    return tokenizer


def _read_ranks(file: Path) -> dict[bytes, int]:
    """A .tiktoken file. Not by tiktoken's own reader, which caches by path and would serve an edited file stale."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"tokenizer {file}: line {number} is no base64 token and rank") from None
    return ranks


def _byte_of() -> dict[str, int]:
    """The byte that a character of vocab.json and merges.txt stands for: printable ones are themselves, others begin at
    U+0100."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes `token`: what the merges before it, of a lower rank, leave of its bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        best = min(pairs)
        if best >= ranks[token]:
            raise ValueError(f"the token {token!r} is no merge of two tokens")
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _read_hugging_face(folder: Path) -> dict[bytes, int]:
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


def _read_whole(file: Path) -> dict[bytes, int]:
    """tokenizer.json, if it holds a tokenizer of GPT-2's kind. Raises ValueError saying of which kind it is instead."""
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        model, cutter = whole["model"], whole.get("pre_tokenizer") or {"type": "none"}
        kinds = [cutter["type"], *(part["type"] for part in cutter.get("pretokenizers", []))]
        settings = {name: value for part in (whole, cutter, model) for name, value in part.items()}
        marks = {mark["content"]: mark["id"] for mark in whole.get("added_tokens") or []}
        vocab, merges = model["vocab"], model.get("merges")
        special = [mark for mark in marks if mark in vocab and mark != END_OF_TEXT]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"tokenizer {file}: expected one JSON object with a model and its vocabulary") from None

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"tokenizer {file}: {what}; only byte-level BPE that cuts text as GPT-2's does is read")

    kind = model.get("type", "BPE" if merges else "unknown")  # old files do not say that they are BPE
    if kind != "BPE" or kinds != ["ByteLevel"] or not isinstance(merges, list):
        refuse(f"its model is {str(kind)[:80]!r} and its pre-tokenizer {', '.join(map(str, kinds))[:80]!r}")
    for name, plain in WHOLE_SETTINGS.items():
        if (value := settings.get(name, plain)) != plain and (value or plain):
            refuse(f"its {name} is {str(value)[:80]!r}")
    if special:
        refuse(f"its vocabulary has the special token {special[0][:80]!r}")

    parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    ranks = _ranks(vocab, file, [(f"merge {i} ({str(pair)[:80]})", pair) for i, pair in enumerate(parts, 1)], file)
    end = marks.get(END_OF_TEXT)
    if END_OF_TEXT in marks and (type(end) is not int or end in ranks.values() or not 0 <= end <= len(ranks)):
        refuse(f"{END_OF_TEXT} has the id {str(end)[:80]}, which is not the one that its other tokens leave out")
    return ranks


# What tokenizer.json may set, and the only value read here, but for those that say as little (null, "", 0).
WHOLE_SETTINGS = {
    "normalizer": None,
    "add_prefix_space": False,
    "use_regex": True,
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "ignore_merges": False,
}


def _ranks(vocab: Any, vocab_file: Path, merges: list[tuple[str, Any]], merges_file: Path) -> dict[bytes, int]:
    """The tokens and their ids, from a vocabulary in GPT-2's signs for bytes, and merges, each with its place in the
    file.

    tiktoken merges the pair of lowest rank first, so the merges must stand in the order of their results' ids: checked.
    """
    byte_of = _byte_of()
    try:
        ranks = {bytes(byte_of[c] for c in token): int(i) for token, i in vocab.items() if token != END_OF_TEXT}
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"tokenizer {vocab_file}: expected one JSON object of tokens and ids") from None
    except KeyError as error:
        raise ValueError(
            f"tokenizer {vocab_file}: the character {error} stands for no byte; this is no byte-level vocabulary"
        ) from None
    previous = -1
    for place, pair in merges:
        known = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        known = known and all(c in byte_of for c in "".join(pair))
        token = bytes(byte_of[c] for c in "".join(pair)) if known else b""
        if ranks.get(token, -1) <= previous:
            raise ValueError(f"tokenizer {merges_file}: {place} does not make the next token of {vocab_file.name}")
        previous = ranks[token]
    if len(merges) + 256 != len(ranks):
        raise ValueError(
            f"tokenizer {merges_file}: {len(merges)} merges and 256 bytes make {len(merges) + 256} tokens; "
            f"{vocab_file.name} has {len(ranks)} besides {END_OF_TEXT}"
        )
    return ranks
