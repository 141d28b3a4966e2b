"""gpt2/pickles.py: plain data is read, and anything else is rejected in little time and memory. See
tests/gpt2/formats/test_torch_file.py for tensors and malicious files."""

import os
import pickle
import struct

import pytest

from gpt2.pickles import KEY_LIMIT, PICKLE_LIMIT, read_plain


@pytest.fixture
def file(tmp_path):
    return tmp_path / "meta.pkl"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_read(file, protocol):
    meta = {
        "vocab_size": 3,
        "itos": {0: "a", 1: "é", 2: "\n"},
        "stoi": {"a": 0},
        "more": [1.5, None, True, (1, 2, 3, 4)],
    }
    file.write_bytes(pickle.dumps(meta, protocol))
    assert read_plain(file) == meta


class Call:
    def __reduce__(self):
        return os.system, ("true",)


def integer(number):
    digits = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


NEST = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(34))  # 2**34 tuples
COLLIDING = b"".join(integer((2**61 - 1) * (i + 1)) + b"N" for i in range(100_000))  # keys with equal hashes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Call(), 4), "refers to posix.system, which is not plain data"),
        (pickle.dumps({1, 2}, 2), "refers to __builtin__.set, which is not plain data"),
        (b"\x80\x04" + NEST + text("a") + b"\x93.", "a name in it is not a string"),
        (b"\x80\x04" + text("a") + NEST + b"\x93.", "a name in it is not a string"),
        (b"\x80\x04}(" + COLLIDING + b"u.", "keys are strings or small integers"),
        (b"\x80\x04}" + integer(KEY_LIMIT) + b"Ns.", "keys are strings or small integers"),
        (b"\x80\x04}" + integer(-1) + b"Ns.", "keys are strings or small integers"),
        (b"\x80\x04" + NEST + b"Q.", "an object outside the pickle"),
        (b"\x80\x04}N}b.", "sets the attributes"),
        (b"\x80\x04N)R.", "makes a call"),
        (b"", "damaged"),
        (b"N" * (PICKLE_LIMIT + 1), "expected at most 2,097,152"),
    ],
)
def test_anything_else_is_rejected(file, content, message):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_plain(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02)" + b"\x85" * 1_000_000 + b".", "more than 262,144 opcodes"),
        (b"\x80\x02" + b"(" * 1_000_000 + b".", "more than 262,144 opcodes"),
        (b"\x80\x02)" + b"\x85" * 101 + b".", "nested more than 100 levels deep"),
        (b"\x80\x02}" + text("a") + NEST + b"s.", "more than 1,048,576 objects"),
        (b"\x80\x02]q\x00h\x00a.", "nested more than 100 levels deep"),  # a list that contains itself
        (b"\x80\x02\x86.", "damaged"),
        (b"\x80\x02X\xff\xff\xff\xffa.", "ends too early"),
        (b"\x80\x02T\xff\xff\xff\xffa.", "ends too early"),
        (b"\x80\x02V\\u0041\n.", "the opcode UNICODE"),
        (b"\x80\x02cos", "ends too early"),
        (b"\x80\x02\xff", "unknown opcode"),
    ],
)
def test_size_and_nesting_of_a_pickle_are_limited(file, content, message):
    test_anything_else_is_rejected(file, content, message)
