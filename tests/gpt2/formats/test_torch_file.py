"""gpt2/formats/torch_file.py: files written by this module and by PyTorch, if it is installed, and models in them."""

import copyreg
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, convert
from gpt2.formats import model_file, torch_file
from gpt2.formats.stored import Stored
from gpt2.formats.torch_file import Record, read_pickle, write_pickle
from gpt2.pickles import PICKLE_LIMIT
from tests.gpt2.formats.models import (
    NANOGPT,
    NO_DROPOUT,
    SIZES,
    assert_equal,
    linear,
    nanogpt,
    random_model,
    stored,
    values,
)


def plain(value):
    """The pickle opcodes for plain data."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(key="0", kind="FloatStorage", count=6, offset=0, shape=(2, 3), strides=(3, 1)):
    storage = b"(" + plain("storage") + f"ctorch\n{kind}\n".encode() + b"".join(map(plain, (key, "cpu", count))) + b"tQ"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(map(plain, (offset, shape, strides, False)))
        + b"ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def dictionary(**items):
    return b"}(" + b"".join(plain(key) + value for key, value in items.items()) + b"u"


def archive(path, program, storages=(), *, compression=zipfile.ZIP_STORED, extra=()):
    """Write a file in the format of torch.save; `program` is the pickle without its first and last opcode."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("model/data.pkl", b"\x80\x02" + program + b".")
        for i, memory in enumerate(storages):
            file.writestr(f"model/data/{i}", memory)
        for name, content in extra:
            file.writestr(name, content)
    return path


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.pt"


SIX = np.arange(6, dtype="float32")


def assert_rejected(path, message):
    with pytest.raises(ValueError, match=message) as error:
        read_pickle(path)
    assert "\n" not in str(error.value)


def test_a_written_file_is_read_bit_for_bit(file):
    bfloat16 = np.array([[1.5, -2.25]], "bfloat16")
    arrays = [SIX.reshape(2, 3), np.array(7, "int64"), np.zeros((0, 4), "float16"), bfloat16, np.array([True, False])]
    stored = [Stored(a.shape, a.dtype.name, lambda a=a: a) for a in arrays]
    data = {"a": [1, -1, 2**40, -(2**31)], "b": (True, False, None, 0.1), "é": {3: "x" * 300}, "": [], "t": ()}
    write_pickle(file, {"arrays": stored, "again": stored[0], **data})
    tree = read_pickle(file)
    assert {key: tree[key] for key in data} == data
    for found, array in zip([*tree["arrays"], tree["again"]], [*arrays, arrays[0]], strict=True):
        assert (found.shape, found.dtype) == (array.shape, array.dtype.name)
        assert found.read().tobytes() == array.tobytes()
    with zipfile.ZipFile(file) as written:
        assert sum("/data/" in name for name in written.namelist()) == len(arrays)


def test_unsupported_values_are_rejected_when_writing(file):
    with pytest.raises(TypeError, match="values of type set are not supported"):
        write_pickle(file, {"a": {1}})


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        ({}, SIX.reshape(2, 3)),
        ({"shape": (3, 2), "strides": (1, 3)}, SIX.reshape(2, 3).T),
        ({"shape": (2,), "strides": (2,), "offset": 3}, [3, 5]),
        ({"shape": (), "strides": (), "offset": 5}, 5),
        ({"shape": (1, 6), "strides": (0, 1)}, [SIX]),
        ({"shape": (0, 9), "strides": (9, 1), "offset": 6}, np.zeros((0, 9))),
    ],
)
def test_views_of_a_storage_are_read(geometry, expected, file):
    stored = read_pickle(archive(file, tensor(**geometry), [SIX.tobytes()]))
    np.testing.assert_array_equal(stored.read(), expected)
    assert stored.read().shape == stored.shape == np.shape(expected)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"shape": (2, 4), "strides": (4, 1)}, "needs 8 elements; its storage has 6"),
        ({"offset": 1}, "needs 7 elements; its storage has 6"),
        ({"offset": -1}, "not non-negative integers"),
        ({"strides": (-3, 1)}, "not non-negative integers"),
        ({"shape": (-2, 3)}, "not non-negative integers"),
        ({"shape": (2.0, 3)}, "not non-negative integers"),
        ({"shape": (True, 3)}, "not non-negative integers"),
        ({"shape": (2**63, 3)}, "not non-negative integers"),
        ({"shape": (2**62, 2**62), "strides": (2**62, 1)}, "needs .* elements; its storage has 6"),
        ({"shape": (10**9, 10**9), "strides": (0, 0)}, "overlap"),
        ({"shape": (2, 2), "strides": (1, 1)}, "overlap"),
        ({"shape": (3, 2), "strides": (1, 2)}, "overlap"),
        ({"shape": (6,), "strides": (1, 1)}, "in a way that torch.save does not"),
        ({"shape": [2, 3]}, "in a way that torch.save does not"),
        ({"shape": (1,) * 9, "strides": (1,) * 9}, "in a way that torch.save does not"),
        ({"count": 7}, "data/0 has 24 bytes; expected 28"),
        ({"count": 2**62}, "data/0 has 24 bytes; expected"),
        ({"count": -6}, "memory in a way"),
        ({"key": "1"}, "no entry data/1"),
        ({"key": "../data.pkl"}, "no entry data/../data.pkl"),
        ({"key": 0}, "memory in a way"),
        ({"kind": "ComplexFloatStorage"}, "torch.ComplexFloatStorage"),
    ],
)
def test_a_view_that_does_not_fit_its_storage_is_rejected(geometry, message, file):
    assert_rejected(archive(file, tensor(**geometry), [SIX.tobytes()]), message)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


MARK = "executed"


HOSTILE = {
    "os.system": (pickle.dumps(Evil(os.system, f"touch {MARK}"), 2)[2:-1], f"{os.system.__module__}.system"),
    "builtins.eval": (pickle.dumps(Evil(eval, f"open('{MARK}', 'w')"), 4)[2:-1], "builtins.eval"),
    "builtins.exec": (pickle.dumps(Evil(exec, f"open('{MARK}', 'w')"), 2)[2:-1], "builtin.*exec"),
    "nested": (pickle.dumps({"model": [Evil(os.system, f"touch {MARK}")]}, 2)[2:-1], "system"),
    "in a key": (pickle.dumps({Evil(os.system, f"touch {MARK}"): 1}, 2)[2:-1], "system"),
    "created and popped": (plain(Evil(os.system, f"touch {MARK}")) + b"0}", "system"),
    "getattr": (b"c__builtin__\ngetattr\n", "getattr"),
    "copyreg": (b"ccopyreg\n_reconstructor\n(cos\nsystem\ncbuiltins\nobject\nNtR", "copyreg._reconstructor"),
    "extension": (b"\x82\x01", "opcode EXT1"),
    "instance": (b"(X\x04\x00\x00\x00true" + b"ios\nsystem\n", "opcode INST"),
    "object": (b"(cos\nsystem\nX\x04\x00\x00\x00trueo", "os.system"),
    "dotted name": (plain("torch._utils") + plain("_rebuild_tensor_v2.__globals__") + b"\x93", "__globals__"),
    "dotted module": (b"ccollections.OrderedDict\n__init__\n", "OrderedDict.__init__"),
    "pretending to be a config": (b"cos\nsystemConfig\n(X\x04\x00\x00\x00truetR", "a call that torch.save does not"),
    "a config with arguments": (b"c__main__\nGPTConfig\n(K\x01t\x81", "a call that torch.save does not"),
    "calling a tensor": (tensor() + b")R", "a call that torch.save does not"),
    "calling text": (plain("os.system") + b")R", "a call that torch.save does not"),
    "calling a storage's name": (b"ctorch\nFloatStorage\n)R", "a call that torch.save does not"),
    "attributes of a function": (
        b"ctorch._utils\n_rebuild_tensor_v2\n" + plain({"__code__": 1}) + b"b",
        "attributes of an object that is not a config",
    ),
    "attributes of a class": (
        b"ccollections\nOrderedDict\n" + plain((None, {"__init__": 1})) + b"b",
        "attributes of an object that is not a config",
    ),
    "attributes of a tensor": (tensor() + plain({"read": 1}) + b"b", "attributes of an object that is not a config"),
    "a state that is a pair": (
        b"c__main__\nGPTConfig\n)\x81" + plain((None, {"a": 1})) + b"b",
        "an object that is not a config",
    ),
    "keys that hash slowly": (
        b"}" + b"(" + b"".join([b")\x85q\x00"] + [b"h\x00h\x00\x86q\x00"] * 60) + b"K\x01u",
        "keys",
    ),
    "appending to a tensor": (tensor() + b"K\x01a", "not a list"),
    "a missing opcode": (b"", "damaged"),
    "an unknown memo": (b"j\xff\xff\xff\xff", "damaged"),
    "a missing mark": (b"K\x01u", "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malicious_file_is_rejected_and_nothing_is_executed(case, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    program, message = HOSTILE[case]
    assert_rejected(archive(file, program, [SIX.tobytes()]), message)
    assert not (file.parent / MARK).exists()


def test_the_malicious_programs_are_malicious(file, monkeypatch):
    """Python's unpickler executes the programs above; otherwise the tests would prove nothing."""
    monkeypatch.chdir(file.parent)
    for case in ("os.system", "builtins.eval", "builtins.exec", "nested"):
        program, _ = HOSTILE[case]
        pickle.loads(b"\x80\x02" + program + b".")
        (file.parent / MARK).unlink()


def test_extensions_of_copyreg_are_not_looked_up(file, monkeypatch):
    copyreg.add_extension(os.system.__module__, "system", 201)
    try:
        assert_rejected(archive(file, b"\x82\xc9" + plain((f"touch {MARK}",)) + b"R"), "opcode EXT1")
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 201)


def test_a_memo_of_four_billion_entries_takes_no_memory(file):
    assert read_pickle(archive(file, b"Nr\xff\xff\xff\xff")) is None


def test_shared_lists_are_not_expanded(file):
    """Sixty lists, each contained twice in the next: copying or printing them would visit 2**60 elements."""
    assert_rejected(archive(file, b"".join([b"]q\x00"] + [b"](h\x00h\x00eq\x00"] * 60)), "more than 1,048,576 objects")


def test_config_objects_are_read_as_records(file):
    program = b"ctrain_gpt2\nGPTConfig\n)\x81" + plain({"n_layer": 12, "__class__": "x"}) + b"b"
    assert read_pickle(archive(file, program)) == Record("train_gpt2.GPTConfig", {"n_layer": 12, "__class__": "x"})


def test_the_attributes_of_an_ordered_dictionary_are_ignored(file):
    """state_dict() has the attribute `_metadata`."""
    program = b"ccollections\nOrderedDict\n)R" + plain({"_metadata": 1, "items": 2}) + b"b"
    assert read_pickle(archive(file, program)) == {}


def test_zip_bombs_are_rejected(file):
    assert_rejected(archive(file, plain("x" * 10**7), compression=zipfile.ZIP_DEFLATED), "is compressed")
    assert_rejected(archive(file, plain("x" * PICKLE_LIMIT)), "at most")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_entries_are_rejected(file):
    assert_rejected(archive(file, tensor(), [SIX.tobytes()], extra=[("model/data/0", bytes(24))]), "data/0 twice")
    assert_rejected(archive(file, tensor(), [SIX.tobytes()], extra=[("other/data/0", bytes(24))]), "data/0 twice")


def test_other_files_are_rejected(file):
    with zipfile.ZipFile(file, "w") as empty:
        empty.writestr("a/b", "c")
    assert_rejected(file, "no entry data.pkl")
    assert_rejected(archive(file, tensor(), [SIX.tobytes()], extra=[("model/byteorder", "big")]), "not little-endian")
    file.write_bytes(b"PK\x03\x04" + bytes(100))
    assert_rejected(file, "File is not a zip file")
    file.write_bytes(pickle.dumps({}, 2) * 3)
    assert_rejected(file, "it is not a torch.save file")


def test_a_flipped_bit_in_the_pickle_is_detected(file):
    content = bytearray(archive(file, dictionary(weight=tensor()), [SIX.tobytes()]).read_bytes())
    content[content.index(b"weight")] ^= 1
    file.write_bytes(content)
    assert_rejected(file, "CRC")


def test_a_truncated_file_is_rejected(file):
    archive(file, tensor(), [SIX.tobytes()])
    stored = read_pickle(file)
    file.write_bytes(file.read_bytes()[:100])
    assert_rejected(file, "not a zip file")
    with pytest.raises(ValueError, match=r"truncated: .* bytes are missing"):
        stored.read()


def legacy(path, *, magic=0x1950A86A20F9469CFC6C, little_endian=True, keys=("0",), count=6, memory=bytes(24)):
    pickles = magic, 1001, {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {"int": 4}}
    head = b"".join(pickle.dumps(value, 2) for value in pickles)
    body = b"\x80\x02" + dictionary(weight=tensor()) + b"." + pickle.dumps(list(keys), 2)
    path.write_bytes(head + body + struct.pack("<q", count) + memory)
    return path


def test_legacy_files_are_read(file):
    stored = read_pickle(legacy(file, memory=SIX.tobytes()))["weight"]
    np.testing.assert_array_equal(stored.read(), SIX.reshape(2, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": 0x1950A86A20F9469CFC6D}, "not a torch.save file"),
        ({"little_endian": False}, "not little-endian"),
        ({"keys": ()}, "list of its storages"),
        ({"keys": ("0", 1)}, "list of its storages"),
        ({"count": 7}, "storage 0 has 7 elements; expected 6"),
        ({"memory": bytes(23)}, "truncated"),
        ({"memory": b""}, "truncated"),
    ],
)
def test_damaged_legacy_files_are_rejected(change, message, file):
    assert_rejected(legacy(file, **change), message)


def test_a_large_claimed_size_takes_no_memory(file):
    """The file is read in a separate process that may use 1 GiB of address space beyond its initial size."""
    archive(file, dictionary(a=tensor(count=2**40, shape=(2**40,), strides=(1,))), [SIX.tobytes()])
    program = (
        "import resource, sys; from pathlib import Path; from gpt2.formats.torch_file import read_pickle\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)\n"
        "try:\n    read_pickle(Path(sys.argv[1]))\nexcept ValueError as error:\n    print(error)"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("requires /proc")
    said = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=True, cwd=".")
    assert "expected 4,398,046,511,104" in said.stdout


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize(("zipped", "protocol"), [(True, 2), (True, 4), (False, 2)])
def test_files_written_by_pytorch_are_read(zipped, protocol, file, monkeypatch):
    import torch

    class GPTConfig:
        def __init__(self):
            self.n_layer = 12

    GPTConfig.__module__, GPTConfig.__qualname__ = "__main__", "GPTConfig"
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    layer = torch.nn.Linear(3, 4)
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {kind: torch.arange(12).reshape(3, 4).to(getattr(torch, kind)) for kind in kinds}
    tree = {
        "model": layer.state_dict(),
        "config": GPTConfig(),
        "loss": torch.tensor(1.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "view": tensors["float32"].T[1:],
        "optimizer": torch.optim.AdamW(layer.parameters(), betas=(0.9, 0.95)).state_dict(),
        **tensors,
    }
    torch.save(tree, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    found = read_pickle(file)
    assert found["config"] == Record("__main__.GPTConfig", {"n_layer": 12})
    assert found["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    for key in (*kinds, "loss", "parameter", "view"):
        theirs = tree[key].detach()
        assert found[key].shape == tuple(theirs.shape)
        np.testing.assert_array_equal(found[key].read().astype("float64"), theirs.to(torch.float64).numpy())
        if key in kinds:
            assert found[key].dtype == key
    np.testing.assert_array_equal(found["model"]["weight"].read(), layer.weight.detach().numpy())


@pytest.mark.parity
@pytest.mark.extras("torch")
@pytest.mark.parametrize("mmap", [False, True])
def test_pytorch_reads_the_written_file(mmap, file):
    import torch

    arrays = {
        kind: np.arange(12).reshape(3, 4).astype(kind)
        for kind in ("float64", "float32", "float16", "bfloat16", "int64", "bool")
    }
    stored = {kind: Stored(array.shape, kind, lambda array=array: array) for kind, array in arrays.items()}
    write_pickle(file, {**stored, "plain": [1, -5, 2**35, 0.5, None, True, ("a", {"b": 1})], "again": stored["int64"]})
    tree = torch.load(file, weights_only=True, mmap=mmap)
    assert tree["plain"] == [1, -5, 2**35, 0.5, None, True, ("a", {"b": 1})]
    assert tree["again"].data_ptr() == tree["int64"].data_ptr()
    for kind, array in arrays.items():
        assert tree[kind].dtype == getattr(torch, kind)
        np.testing.assert_array_equal(tree[kind].to(torch.float64).numpy(), array.astype("float64"))


# Models in PyTorch files


@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer.", "module._orig_mod.transformer."])
def test_nanogpt_checkpoints_are_read(prefix, model, tmp_path):
    """nanoGPT uses exact GELU, and names have a prefix if the model was compiled."""
    found = GPT2.from_pretrained(nanogpt(tmp_path / "ckpt.pt", linear(model, prefix)))
    rates = dict.fromkeys(NO_DROPOUT, 0.2)
    assert found.config == GPT2Config(**SIZES, **rates, activation_function="gelu")
    assert all(np.array_equal(array, values(found)[name]) for name, array in values(model).items())


def test_a_nanogpt_checkpoint_without_biases_is_read(model, tmp_path):
    arrays = {name: array for name, array in linear(model).items() if not name.endswith(".bias")}
    found = GPT2.from_pretrained(nanogpt(tmp_path / "ckpt.pt", arrays, bias=False))
    for name, array in values(model).items():
        assert np.array_equal(values(found)[name], np.zeros_like(array) if name.endswith(".bias") else array)


def with_config_object(path, arrays, attributes, name="__main__\nGPTConfig"):
    """Write a build-nanogpt checkpoint, in which torch.save pickles the config with the name of its class."""
    import pickle
    import zipfile

    torch_file.write_pickle(path, {"model": stored(arrays), "config": "HERE", "step": 5, "val_loss": 3.5})
    with zipfile.ZipFile(path) as file:
        content = {info.filename: file.read(info) for info in file.infolist()}
    state = pickle.dumps(attributes, 2)[2:-1]
    here = b"X\x04\x00\x00\x00HERE"
    program = content["archive/data.pkl"]
    assert program.count(here) == 1
    content["archive/data.pkl"] = program.replace(here, f"c{name}\n)\x81".encode("latin-1") + state + b"b")
    with zipfile.ZipFile(path, "w") as file:
        for entry, data in content.items():
            file.writestr(entry, data)
    return path


CONFIG = {"block_size": 16, "vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 8}


def test_build_nanogpt_checkpoints_are_read(model, tmp_path):
    """build-nanogpt uses the tanh form of GELU and no dropout."""
    assert_equal(model, GPT2.from_pretrained(with_config_object(tmp_path / "a.pt", linear(model), CONFIG)))
    other = with_config_object(tmp_path / "b.pt", linear(model), CONFIG, "train_gpt2\nGPTConfig")
    assert_equal(model, GPT2.from_pretrained(other))


def test_a_config_object_of_nanogpt_implies_exact_gelu(model, tmp_path):
    path = with_config_object(tmp_path / "a.pt", linear(model), {**CONFIG, "dropout": 0.0, "bias": True})
    assert model_file.load_config(path).activation_function == "gelu"


def test_a_missing_value_in_a_config_object_is_an_error(model, tmp_path):
    path = with_config_object(tmp_path / "a.pt", linear(model), {"n_head": 2, "vocab_size": 257})
    with pytest.raises(ValueError, match=r"a.pt: 'block_size' is missing"):
        model_file.load_config(path)


@pytest.mark.parametrize("tree", [[1], {"a": 1}, {"model": {}}, {"model": {"wte.weight": 3}}])
def test_a_pytorch_file_without_a_model_is_rejected(tree, tmp_path):
    torch_file.write_pickle(tmp_path / "x.pt", tree)
    with pytest.raises(ValueError, match=r"x.pt: it (is a pickled|has no state dict)"):
        model_file.open_model(tmp_path / "x.pt")


@pytest.mark.parity
@pytest.mark.extras("torch")
def test_pytorch_reads_the_exported_state_dict(model, tmp_path):
    import torch

    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "b.pt", "pt")
    checkpoint = torch.load(tmp_path / "b.pt", weights_only=True)
    assert checkpoint["model_args"] == {**NANOGPT, "dropout": 0.0}
    expected = linear(model)
    assert checkpoint["model"].keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(checkpoint["model"][name].numpy(), array)
    tied = [checkpoint["model"][name] for name in ("lm_head.weight", "transformer.wte.weight")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
