"""A pickle reader that does not execute code. (A file can make Python's unpickler call any function.)

A pickle is a program. `interpret` implements the opcodes for plain data: dictionaries, lists, tuples, strings and
numbers. A subclass of `Meanings` defines the names that a program refers to, the calls that it makes, and the objects
that are stored outside the pickle. By default, each of these is an error.

Time and memory are bounded in three ways: the size of the program and the number of its opcodes are limited; the keys
of dictionaries are restricted, so that a file cannot make their hashes collide; and every occurrence of an object in
the result is counted, since a small program can describe a tuple of two references to a tuple of two references, and so
on.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

PICKLE_LIMIT = 2 << 20  # bytes of a pickle; GPT-2 XL with its optimizer has less than 1 MB
OPCODE_LIMIT = 1 << 18  # opcodes of a pickle; GPT-2 XL with its optimizer has fewer than 100,000
OBJECT_LIMIT = 1 << 20  # objects in the result, each counted once per occurrence
DEPTH_LIMIT = 100  # nested containers
KEY_LIMIT = 1 << 31  # upper bound for integer keys, since larger integers can be chosen so that their hashes collide


class Meanings:
    """Defines the meaning of a program's names, calls, attributes and references to stored objects. In this base class,
    all of them are errors."""

    def name(self, text: str) -> object:
        """The object that represents a name, such as `collections.OrderedDict`."""
        raise ValueError(f"its pickle refers to {text[:200]}, which is not plain data; the file is rejected")

    def call(self, function: object, arguments: object) -> object:
        """The result of a call."""
        raise ValueError("its pickle makes a call; expected plain data")

    def stored(self, identity: object) -> object:
        """The object with a persistent id."""
        raise ValueError("its pickle refers to an object outside the pickle; expected plain data")

    def build(self, target: object, state: object) -> None:
        """Set an object's attributes."""
        raise ValueError("its pickle sets the attributes of an object; expected plain data")

    def contents(self, value: object) -> list[object]:
        """The objects contained in an object that `call` returned."""
        return []


def read_plain(file: Path) -> object:
    """Read the plain data in a file that `pickle.dump` wrote. Raises ValueError, which names the file, for anything
    else."""
    size = file.stat().st_size
    try:
        if size > PICKLE_LIMIT:
            raise ValueError(f"it has {size:,} bytes; expected at most {PICKLE_LIMIT:,}")
        return interpret(io.BytesIO(file.read_bytes()), Meanings())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def interpret(program: io.BytesIO, meanings: Meanings) -> Any:
    """The object that a pickle describes. The position of `program` is moved past the pickle. Raises ValueError if the
    pickle is damaged or contains anything else than plain data."""
    machine = _Machine(program.getvalue(), program.tell(), meanings)
    try:
        result = machine.run()
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error):
        raise ValueError("its pickle is damaged") from None  # for example an empty stack, or an unknown memo index
    _check_size(result, meanings)
    program.seek(machine.position)
    return result


class _Machine:
    """The state of a running program: its position, a stack, marks in the stack, and the memo (numbered objects)."""

    def __init__(self, program: bytes, position: int, meanings: Meanings):
        self.program, self.position, self.meanings = program, position, meanings
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        for _ in range(OPCODE_LIMIT):
            code = self.program[self.position : self.position + 1]
            self.position += 1
            if code == b".":
                return self.stack.pop()
            if (operation := OPERATIONS.get(code)) is None:
                known = next((op for op in pickletools.opcodes if op.code.encode("latin-1") == code), None)
                if known is None:
                    raise ValueError("its pickle is damaged: it ends too early, or has an unknown opcode")
                raise ValueError(f"its pickle has the opcode {known.name}, which torch.save does not write")
            operation(self)
        raise ValueError(f"its pickle has more than {OPCODE_LIMIT:,} opcodes; the file is rejected")

    def read(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if count < 0 or self.position > len(self.program):
            raise ValueError("its pickle is damaged: it ends too early")
        return self.program[start : self.position]

    def number(self, format: str) -> Any:
        return struct.unpack(format, self.read(struct.calcsize(format)))[0]

    def line(self) -> str:
        end = self.program.find(b"\n", self.position)
        text = self.read(end - self.position).decode("ascii")
        self.position += 1
        return text

    def pop_to_mark(self) -> list[object]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def pop_tuple(self, count: int) -> tuple[object, ...]:
        return tuple(reversed([self.stack.pop() for _ in range(count)]))

    def global_name(self) -> object:
        return self.meanings.name(f"{self.line()}.{self.line()}")

    def stack_global(self) -> object:
        attribute, module = self.stack.pop(), self.stack.pop()
        if type(module) is not str or type(attribute) is not str:
            raise ValueError("its pickle is damaged: a name in it is not a string")
        return self.meanings.name(f"{module}.{attribute}")

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("its pickle is damaged: it appends to an object that is not a list")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target, keys, values = self.stack[-1], items[::2], items[1::2]
        if type(target) is not dict or len(keys) != len(values) or not all(map(_is_key, keys)):
            raise ValueError("its pickle is damaged: expected a dictionary whose keys are strings or small integers")
        target.update(zip(keys, values, strict=True))

    def remember(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    def call(self) -> object:
        arguments = self.stack.pop()
        return self.meanings.call(self.stack.pop(), arguments)

    def build(self) -> None:
        state = self.stack.pop()
        self.meanings.build(self.stack[-1], state)


def _is_key(key: object) -> bool:
    return type(key) is str or (type(key) is int and 0 <= key < KEY_LIMIT)


def _check_size(result: object, meanings: Meanings) -> None:
    """Raise ValueError if the result is nested too deeply or contains too many objects, counting every occurrence.
    (No operation before this check takes time that depends on the contents of an object.)"""
    sizes: dict[int, int] = {}  # the sizes of containers, by id()

    def size(value: object, depth: int) -> int:
        if (known := sizes.get(id(value))) is not None:
            return known
        if isinstance(value, dict):
            contents = list(value.values())
        else:
            contents = list(value) if isinstance(value, list | tuple) else meanings.contents(value)
        if not contents:
            return 1
        if depth == DEPTH_LIMIT:
            raise ValueError(f"its pickle is nested more than {DEPTH_LIMIT} levels deep; the file is rejected")
        sizes[id(value)] = total = 1 + sum(size(item, depth + 1) for item in contents)
        if total > OBJECT_LIMIT:
            raise ValueError(f"its pickle has more than {OBJECT_LIMIT:,} objects; the file is rejected")
        return total

    size(result, 0)


def _push(value: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


def _text(length: str, encoding: str, errors: str = "strict") -> Callable[[_Machine], None]:
    return _push(lambda machine: machine.read(machine.number(length)).decode(encoding, errors))


OPERATIONS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda machine: machine.read(1),  # PROTO
    b"\x95": lambda machine: machine.read(8),  # FRAME
    b"N": _push(lambda machine: None),
    b"\x88": _push(lambda machine: True),  # NEWTRUE
    b"\x89": _push(lambda machine: False),  # NEWFALSE
    b"J": _push(lambda machine: machine.number("<i")),  # BININT
    b"K": _push(lambda machine: machine.number("<B")),  # BININT1
    b"M": _push(lambda machine: machine.number("<H")),  # BININT2
    b"\x8a": _push(lambda machine: int.from_bytes(machine.read(machine.number("<B")), "little", signed=True)),  # LONG1
    b"G": _push(lambda machine: machine.number(">d")),  # BINFLOAT
    b"X": _text("<I", "utf-8", "surrogatepass"),  # BINUNICODE
    b"\x8c": _text("<B", "utf-8", "surrogatepass"),  # SHORT_BINUNICODE
    b"T": _text("<i", "latin-1"),  # BINSTRING
    b"U": _text("<B", "latin-1"),  # SHORT_BINSTRING
    b"B": _push(lambda machine: machine.read(machine.number("<I"))),  # BINBYTES
    b"C": _push(lambda machine: machine.read(machine.number("<B"))),  # SHORT_BINBYTES
    b"}": _push(lambda machine: {}),
    b"]": _push(lambda machine: []),
    b")": _push(lambda machine: ()),
    b"(": lambda machine: machine.marks.append(len(machine.stack)),  # MARK
    b"t": _push(lambda machine: tuple(machine.pop_to_mark())),  # TUPLE
    b"\x85": _push(lambda machine: machine.pop_tuple(1)),  # TUPLE1
    b"\x86": _push(lambda machine: machine.pop_tuple(2)),  # TUPLE2
    b"\x87": _push(lambda machine: machine.pop_tuple(3)),  # TUPLE3
    b"a": lambda machine: machine.append([machine.stack.pop()]),  # APPEND
    b"e": lambda machine: machine.append(machine.pop_to_mark()),  # APPENDS
    b"s": lambda machine: machine.set_items(list(machine.pop_tuple(2))),  # SETITEM
    b"u": lambda machine: machine.set_items(machine.pop_to_mark()),  # SETITEMS
    b"h": _push(lambda machine: machine.memo[machine.number("<B")]),  # BINGET
    b"j": _push(lambda machine: machine.memo[machine.number("<I")]),  # LONG_BINGET
    b"q": lambda machine: machine.remember(machine.number("<B")),  # BINPUT
    b"r": lambda machine: machine.remember(machine.number("<I")),  # LONG_BINPUT
    b"\x94": lambda machine: machine.remember(len(machine.memo)),  # MEMOIZE
    b"c": _push(_Machine.global_name),  # GLOBAL
    b"\x93": _push(_Machine.stack_global),  # STACK_GLOBAL
    b"Q": _push(lambda machine: machine.meanings.stored(machine.stack.pop())),  # BINPERSID
    b"R": _push(_Machine.call),  # REDUCE
    b"\x81": _push(_Machine.call),  # NEWOBJ
    b"b": _Machine.build,  # BUILD
}
