"""Reads and writes PyTorch files (`torch.save`) without PyTorch. Nothing in a file is ever executed.

Such a file is a zip archive of uncompressed entries: a pickle, data.pkl, and the storages of the tensors, data/0,
data/1 and so on. Before PyTorch 1.6 it was a sequence of pickles followed by the storages. gpt2.pickles interprets the
pickles. It accepts only the few names that are needed to build tensors; any other name is an error.
"""

from __future__ import annotations

import io
import json
import math
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from gpt2.config import GPT2_VOCAB_SIZE, PADDED_VOCAB_SIZE, GPT2Config, is_matrix
from gpt2.file_kinds import open_zip, printable
from gpt2.formats.stored import Stored, read_at
from gpt2.formats.torch_optimizer import TrainingState, pack, unpack
from gpt2.pickles import PICKLE_LIMIT, Meanings, interpret
from tinygrad2.checkpoint import JsonObject

GENERATION, TRAINER = "generation_config", "trainer"  # keys of JSON strings that only gpt2.convert writes and reads
LM_HEAD = "lm_head.weight"  # the output layer, tied to the token embedding
STATE_DICTS = ("model", "state_dict", "model_state_dict")  # keys of the parameters in a checkpoint
ZIP_START, LEGACY_START = b"PK\x03\x04", b"\x80\x02\x8a\x0a"  # first bytes; the second is a pickle of a 10-byte integer
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR, REBUILD_PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
CONFIG_SUFFIXES = ("Config", "Namespace")  # an object whose class name ends with one of these is read as a Record


# Errors that zipfile, struct and seek raise for a damaged file.
READ_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error, EOFError, OverflowError, OSError)


@dataclass
class Record:
    """A pickled object of a config class: the name of the class and the values of the object's attributes."""

    name: str
    values: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class _Name:
    """A name that a pickle refers to. It is never looked up: `_Tensors.call` defines its effect."""

    text: str


@dataclass(frozen=True)
class _Storage:
    """The memory of one or more tensors: `count` elements."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * np.dtype(self.dtype).itemsize


def read_pickle(path: Path) -> object:
    """The object that `torch.save` wrote. It consists of dicts, lists, tuples, strings and numbers, with a Stored for
    each tensor and a Record for each config object. Raises ValueError for anything else, before it allocates memory for
    tensors."""
    with path.open("rb") as file:
        try:
            return _read_zip(path, file) if file.read(len(ZIP_START)) == ZIP_START else _read_legacy(path, file)
        except READ_ERRORS as error:
            raise ValueError(f"it is not a torch.save file, or it is damaged ({error})") from None


def _read_zip(path: Path, file: BinaryIO) -> object:
    with open_zip(path) as archive:
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = info.filename.partition("/")[2]  # all entries are in a common folder
            if name in entries:
                raise ValueError(f"its archive has the entry {name} twice")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError(f"its entry {name} is compressed; torch.save does not compress")
            entries[name] = info
        if "data.pkl" not in entries:
            raise ValueError("its archive has no entry data.pkl; expected a torch.save file")
        if entries["data.pkl"].file_size > PICKLE_LIMIT:
            raise ValueError(
                f"its data.pkl has {entries['data.pkl'].file_size:,} bytes; expected at most {PICKLE_LIMIT:,}"
            )
        if "byteorder" in entries and archive.read(entries["byteorder"]) != sys.byteorder.encode():
            raise ValueError(f"its numbers are not {sys.byteorder}-endian, as this machine's are")
        program = io.BytesIO(archive.read(entries["data.pkl"]))
    places: dict[str, int] = {}
    tensors = _Tensors(path, places)
    tree, storages = interpret(program, tensors), tensors.storages
    for storage in storages:
        entry = entries.get(f"data/{storage.key}")
        if entry is None:
            raise ValueError(f"its archive has no entry data/{storage.key}")
        if entry.file_size != storage.nbytes:
            raise ValueError(f"its entry data/{storage.key} has {entry.file_size:,} bytes; expected {storage.nbytes:,}")
        file.seek(entry.header_offset)
        name_length, extra_length = struct.unpack("<26xHH", file.read(30))  # from the local header before the contents
        places[storage.key] = file.tell() + name_length + extra_length
    _refuse_truncated(file, places, storages)
    return tree


def _read_legacy(path: Path, file: BinaryIO) -> object:
    places: dict[str, int] = {}
    file.seek(0)
    tensors = _Tensors(path, places)
    magic, protocol, machine = (_interpret_next(file, tensors) for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL or not isinstance(machine, dict):
        raise ValueError("it is not a torch.save file")
    if machine.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError(f"its numbers are not {sys.byteorder}-endian, as this machine's are")
    tree = _interpret_next(file, tensors)
    storages = tensors.storages
    keys = _interpret_next(file, tensors)
    by_key = {storage.key: storage for storage in storages}
    if not isinstance(keys, list) or any(type(key) is not str for key in keys) or set(keys) != by_key.keys():
        raise ValueError("the list of its storages is damaged")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        if count != by_key[key].count:
            raise ValueError(f"its storage {key} has {count:,} elements; expected {by_key[key].count:,}")
        places[key] = file.tell()
        file.seek(by_key[key].nbytes, io.SEEK_CUR)
    _refuse_truncated(file, places, storages)
    return tree


def _interpret_next(file: BinaryIO, tensors: _Tensors) -> Any:
    """Interpret the next pickle in a file, and move the file's position past it."""
    start = file.tell()
    program = io.BytesIO(file.read(PICKLE_LIMIT))
    found = interpret(program, tensors)
    file.seek(start + program.tell())
    return found


def _refuse_truncated(file: BinaryIO, places: dict[str, int], storages: list[_Storage]) -> None:
    size = file.seek(0, io.SEEK_END)
    for storage in storages:
        end = places[storage.key] + storage.nbytes
        if end > size:
            raise ValueError(f"it has {size:,} bytes, but its storage {storage.key} ends at {end:,}: it is truncated")


class _Tensors(Meanings):
    """Defines the names in a torch.save file: tensors, their storages, and config objects.

    places    the offset of each storage in `path`, by key; filled in later, and looked up when an array is read.
    storages  the storages that the pickle refers to.
    """

    def __init__(self, path: Path, places: dict[str, int]):
        self.path, self.places = path, places
        self._storages: dict[_Storage, None] = {}

    @property
    def storages(self) -> list[_Storage]:
        return list(self._storages)

    def name(self, text: str) -> _Name:
        known = text in STORAGES or text in (ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER)
        if known or text.endswith(CONFIG_SUFFIXES):
            return _Name(text)
        raise ValueError(
            f"its pickle refers to {text}, which is not part of a model; the file is rejected: save only "
            "model.state_dict() with torch.save"
        )

    def stored(self, identity: object) -> _Storage:
        """The storage with this persistent id: ("storage", class, key, device, number of elements)."""
        is_storage = type(identity) is tuple and len(identity) >= 5 and identity[0] == "storage"
        if type(identity) is tuple and is_storage and identity[5:] in ((), (None,)):
            _, kind, key, _, count = identity[:5]
            if type(kind) is _Name and kind.text in STORAGES and type(key) is str and _is_count(count):
                storage = _Storage(key, STORAGES[kind.text], count)
                self._storages[storage] = None
                return storage
        raise ValueError("its pickle describes a storage in a way that torch.save does not")

    def call(self, function: object, arguments: object) -> object:
        """The result of a call that a pickle requests. Nothing is called: this returns an equivalent object."""
        if type(function) is _Name and type(arguments) is tuple:
            if function.text == ORDERED_DICT and arguments == ():
                return {}
            if function.text == REBUILD_TENSOR and len(arguments) >= 4:
                return _tensor(arguments, self.path, self.places)
            if function.text == REBUILD_PARAMETER and arguments and type(arguments[0]) is Stored:
                return arguments[0]
            if function.text.endswith(CONFIG_SUFFIXES) and arguments == ():
                return Record(function.text)
        raise ValueError("its pickle makes a call that torch.save does not write")

    def contents(self, value: object) -> list[object]:
        return list(value.values.values()) if type(value) is Record else []

    def build(self, target: object, state: object) -> None:
        """Set an object's attributes. Attributes of dictionaries (`_metadata` of a state dict) are ignored."""
        if type(target) is Record and type(state) is dict:
            target.values.update(state)
        elif type(target) is not dict:
            raise ValueError("its pickle sets the attributes of an object that is not a config")


def _tensor(arguments: tuple[object, ...], path: Path, places: dict[str, int]) -> Stored:
    """A tensor: the elements of a storage from `offset`, with the given shape and strides. Elements must not overlap,
    so that no tensor is larger than its file."""
    storage, offset, shape, strides = arguments[:4]
    if (
        type(storage) is not _Storage
        or type(shape) is not tuple
        or type(strides) is not tuple
        or not len(shape) == len(strides) <= 8
    ):
        raise ValueError("its pickle describes a tensor in a way that torch.save does not")
    if not _is_count(offset) or not all(map(_is_count, (*shape, *strides))):
        raise ValueError("it has a tensor whose offset, shape or strides are not non-negative integers")
    reach = 0  # the largest offset over the axes so far
    for stride, length in sorted(zip(strides, shape, strict=True)) if math.prod(shape) else ():
        if length > 1 and stride <= reach:
            raise ValueError("it has a tensor whose elements overlap")
        reach += stride * (length - 1)
    count = reach + 1 if math.prod(shape) else 0
    if offset + count > storage.count:
        raise ValueError(f"it has a tensor that needs {offset + count:,} elements; its storage has {storage.count:,}")
    size = np.dtype(storage.dtype).itemsize

    def read() -> np.ndarray:
        flat = read_at(path, storage.dtype, places[storage.key] + offset * size, (count,))
        return np.array(np.lib.stride_tricks.as_strided(flat, shape, [stride * size for stride in strides]))

    return Stored(shape, storage.dtype, read)


def _is_count(number: object) -> TypeGuard[int]:
    return type(number) is int and 0 <= number < 1 << 63


def write_pickle(path: Path, tree: Mapping[str, object]) -> None:
    """Write a file that torch.load(weights_only=True) can read. `tree` may contain dicts, lists, tuples, strings,
    numbers, and Stored arrays, which become tensors. An array that occurs several times is stored once. Only one array
    is in memory at a time."""
    storages: dict[int, tuple[str, Stored]] = {}
    program = b"\x80\x02" + _pickled(tree, storages) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in (("data.pkl", program), ("byteorder", sys.byteorder.encode()), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # dated 1980, for reproducible files
        for key, stored in storages.values():
            with archive.open(zipfile.ZipInfo(f"archive/data/{key}"), "w", force_zip64=True) as entry:
                entry.write(np.ascontiguousarray(stored.read()).reshape(-1).view(np.uint8).data)


def _pickled(value: object, storages: dict[int, tuple[str, Stored]]) -> bytes:
    """The opcodes (protocol 2) that build a value. The arrays in it are added to `storages`."""

    def each(values: Iterable[object]) -> bytes:
        return b"".join(_pickled(item, storages) for item in values)

    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            number = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(number)]) + number
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return b"X" + struct.pack("<I", len(text)) + text
        case tuple():
            return b"(" + each(value) + b"t"
        case list():
            return b"](" + each(value) + b"e"
        case dict():
            return b"}(" + each(item for pair in value.items() for item in pair) + b"u"
        case _Name():
            module, _, attribute = value.text.rpartition(".")
            return f"c{module}\n{attribute}\n".encode()
        case Stored():
            key, _ = storages.setdefault(id(value), (str(len(storages)), value))
            kind = next(name for name, dtype in STORAGES.items() if dtype == value.dtype)
            memory = each([("storage", _Name(kind), key, "cpu", math.prod(value.shape))]) + b"Q"
            strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
            hooks = each([_Name(ORDERED_DICT), ()]) + b"R"
            return (
                each([_Name(REBUILD_TENSOR)]) + b"(" + memory + each([0, value.shape, strides, False]) + hooks + b"tR"
            )
        case _:
            raise TypeError(f"write_pickle: values of type {type(value).__name__} are not supported")


def read(file: Path) -> tuple[GPT2Config | None, dict[str, Stored]]:
    """The config, or None if the file has none, and the parameters. The form of the config depends on the program that
    wrote the file:

    a config.json with model_type  gpt2.convert
    model_args                     nanoGPT, which uses exact GELU
    config, a pickled GPTConfig    build-nanogpt, which uses GELU's tanh form and no dropout, or nanoGPT if it has
                                   the field dropout
    """
    tree = read_pickle(file)
    if not isinstance(tree, dict):
        raise ValueError(f"it is a pickled {type(tree).__name__}; expected a dictionary with the parameters of a model")
    stored = _state_dict(tree)
    config = _scalars(tree.get("config"))
    if "model_type" in config:
        settings = _parsed(config.get(GENERATION))
        return replace(GPT2Config.from_dict(config), generation_config=settings), stored
    values = _scalars(tree.get("model_args")) or config
    if "n_head" not in values:
        return None, stored
    rate = values.get("dropout", 0.0)
    return GPT2Config(
        vocab_size=GPT2_VOCAB_SIZE if values["vocab_size"] == PADDED_VOCAB_SIZE else values["vocab_size"],
        n_positions=values["block_size"],
        n_embd=values["n_embd"],
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        activation_function="gelu" if "dropout" in values else "gelu_new",
        embd_pdrop=rate,
        attn_pdrop=rate,
        resid_pdrop=rate,
    ), stored


def _state_dict(tree: dict[Any, Any]) -> dict[str, Stored]:
    """The parameters: the entry of `tree` under one of STATE_DICTS, or its only dictionary of tensors, or `tree`
    itself. Raises ValueError if there are none."""

    def is_one(values: object) -> TypeGuard[dict[str, Stored]]:
        return (
            isinstance(values, dict)
            and bool(values)
            and all(isinstance(name, str) and isinstance(value, Stored) for name, value in values.items())
        )

    usual = [key for key in STATE_DICTS if isinstance(tree.get(key), dict)]
    found = usual[:1] or [key for key, values in tree.items() if is_one(values)]
    stored = tree[found[0]] if len(found) == 1 else tree
    if not is_one(stored):
        keys = ", ".join(map(printable, map(str, tree)))
        raise ValueError(
            "it has no state dict, or several; expected a dictionary of tensors, possibly under the key `model`; its "
            f"keys are {keys[:200]}"
        )
    return stored


def _scalars(config: object) -> JsonObject:
    """The numbers and strings in a config. Any other value is replaced by the name of its type, which GPT2Config
    rejects."""
    values = config.values if isinstance(config, Record) else config if isinstance(config, dict) else {}
    kinds = (str, int, float, type(None))
    scalars = {str(key): value if isinstance(value, kinds) else type(value).__name__ for key, value in values.items()}
    ends = values.get("eos_token_id")
    is_list = isinstance(ends, list) and all(type(i) is int for i in ends)
    return scalars | ({"eos_token_id": ends} if is_list else {})


def _parsed(text: object) -> JsonObject | None:
    """The JSON object in a string, or None for anything else."""
    try:
        values = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_training(file: Path, config: GPT2Config, names: Mapping[str, object]) -> TrainingState:
    """The training state in a nanoGPT checkpoint, for a model with this config.

    names  the names of the parameters in its state dict.
    Raises ValueError if the file has no training state.
    """
    tree = read_pickle(file)
    if not isinstance(tree, dict):
        raise ValueError(f"it is a pickled {type(tree).__name__}; expected a checkpoint of nanoGPT")
    return unpack({**tree, TRAINER: _parsed(tree.get(TRAINER))}, config, names)


def write(path: Path, config: GPT2Config, arrays: dict[str, Stored], state: TrainingState | None = None) -> None:
    """Write a checkpoint that nanoGPT can load, with matrices as in nn.Linear. It also contains our config, which has
    more settings.

    state  the training state, with which nanoGPT can resume the run; optional.
    """
    named = {f"transformer.{name}": a.transposed() if is_matrix(name) else a for name, a in arrays.items()}
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "bias": True}
    rates = {"block_size": config.n_positions, "vocab_size": config.vocab_size, "dropout": float(config.resid_pdrop)}
    checkpoint: JsonObject = {
        "model": {**named, LM_HEAD: named["transformer.wte.weight"]},
        "model_args": {**sizes, **rates},
        "config": config.to_dict(),
    }
    if config.generation_config is not None:
        checkpoint["config"][GENERATION] = json.dumps(config.generation_config)
    if state is not None:
        checkpoint["config"] |= state.options
        checkpoint |= {**pack(config, state), TRAINER: json.dumps(state.trainer)}
    write_pickle(path, checkpoint)
