"""A pickle reader that executes nothing. (A file can make Python's unpickler call any function.)

A pickle is a program. `interpret` implements the opcodes for plain data: dictionaries, lists, tuples, text and numbers.
A subclass of `Meanings` defines the names that a program refers to, the calls that it makes and the objects that it
stores elsewhere; by default, each is an error.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PICKLE_LIMIT = 2 << 20  # bytes of a pickle; GPT-2 XL's, with its optimizer, has less than 1 MB
KEY_LIMIT = 1 << 31  # upper bound for integer keys: larger ones can be chosen to have equal hashes
NUMBER_OPCODES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
TEXT_OPCODES = ("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES")


class Meanings:
    """Defines the meaning of a program's names, calls, attributes and references to stored objects. Here, all of them
    are errors."""

    def name(self, text: str) -> object:
        """The object that stands for a name, such as `collections.OrderedDict`."""
        raise ValueError(f"its pickle refers to {text}, which is not plain data; the file is rejected")

    def call(self, function: object, arguments: object) -> object:
        """The result of a call."""
        raise ValueError("its pickle makes a call; expected plain data")

    def stored(self, identity: object) -> object:
        """The object with a persistent id."""
        raise ValueError("its pickle refers to an object outside the pickle; expected plain data")

    def build(self, target: object, state: object) -> None:
        """Set an object's attributes."""
        raise ValueError("its pickle sets the attributes of an object; expected plain data")


def read_plain(file: Path) -> object:
    """The plain data in a file that `pickle.dump` wrote. Raises ValueError, naming the file, for anything else."""
    size = file.stat().st_size
    try:
        if size > PICKLE_LIMIT:
            raise ValueError(f"it has {size:,} bytes; expected at most {PICKLE_LIMIT:,}")
        return interpret(io.BytesIO(file.read_bytes()), Meanings())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def interpret(program: io.BytesIO, meanings: Meanings) -> Any:
    """The object that a pickle describes. Moves the position of `program` past it. Raises ValueError."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, object] = {}

    def since_mark() -> list[object]:
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    try:
        for opcode, arg in _opcodes(program):
            match opcode:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode == "NEWTRUE")
                case name if name in NUMBER_OPCODES or name in TEXT_OPCODES:
                    stack.append(arg)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "MARK":
                    marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "APPEND" | "APPENDS":
                    items = [stack.pop()] if opcode == "APPEND" else since_mark()
                    target = stack[-1]
                    if type(target) is not list:
                        raise ValueError("its pickle is damaged: it appends to an object that is not a list")
                    target.extend(items)
                case "SETITEM" | "SETITEMS":
                    items = [stack.pop(-2), stack.pop()] if opcode == "SETITEM" else since_mark()
                    _set_items(stack[-1], items)
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GLOBAL":
                    stack.append(meanings.name(".".join(arg.split(" "))))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    if type(module) is not str or type(attribute) is not str:
                        raise ValueError("its pickle is damaged: a name in it is not text")
                    stack.append(meanings.name(f"{module}.{attribute}"))
                case "BINPERSID":
                    stack.append(meanings.stored(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments = stack.pop()
                    stack.append(meanings.call(stack.pop(), arguments))
                case "BUILD":
                    state = stack.pop()
                    meanings.build(stack[-1], state)
                case _:
                    raise ValueError(f"its pickle has the opcode {opcode}, which torch.save does not write")
    except (IndexError, KeyError, TypeError, AttributeError):  # for example an empty stack, or an unknown memo
        pass
    raise ValueError("its pickle is damaged")


def _opcodes(program: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """The name and the argument of each opcode (a number, text or bytes, depending on the opcode)."""
    try:
        yield from ((opcode.name, argument) for opcode, argument, _ in pickletools.genops(program))
    except ValueError as error:
        raise ValueError(f"its pickle is damaged ({error})") from None


def _set_items(target: object, items: list[object]) -> None:
    keys, values = items[::2], items[1::2]
    if type(target) is not dict or len(keys) != len(values) or not all(map(_is_key, keys)):
        raise ValueError("its pickle is damaged: expected a dictionary whose keys are text or small integers")
    target.update(zip(keys, values, strict=True))


def _is_key(key: object) -> bool:
    return type(key) is str or (type(key) is int and 0 <= key < KEY_LIMIT)
