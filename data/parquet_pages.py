"""The sizes of the pages of a Parquet file, read from the page headers.

A column is stored in compressed pages. A library allocates memory for an entire page according to the header of the
page. The headers are therefore checked first, since even a small file can declare a page of gigabytes. They are structs
in Thrift's compact protocol: https://github.com/apache/parquet-format (PageHeader: 1 type, 2 uncompressed size,
3 compressed size, ...).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

BOOLEANS, BYTE, INTEGERS, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
UNCOMPRESSED_SIZE, COMPRESSED_SIZE = 2, 3
DEPTH_LIMIT = 10  # maximum nesting depth of structs


def page_sizes(stream: BinaryIO, start: int, length: int) -> Iterator[int]:
    """Yield the decompressed size in bytes of each page of a column. The column has `length` bytes, from `start` on.

    Raises ValueError if a header is damaged.
    """
    end = start + length
    while start < end:
        stream.seek(start)
        sizes = {UNCOMPRESSED_SIZE: -1, COMPRESSED_SIZE: -1}
        for field, kind in _fields(stream):
            if field in sizes and kind in INTEGERS:
                number = _varint(stream)
                sizes[field] = number >> 1 ^ -(number & 1)  # zigzag
            else:
                _skip(stream, kind, 0)
        if min(sizes.values()) < 0:
            raise ValueError("a page header has no size")
        yield sizes[UNCOMPRESSED_SIZE]
        start = stream.tell() + sizes[COMPRESSED_SIZE]


def _fields(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield (number, type) of each field of a struct. The value of the field follows in the stream."""
    field = 0
    while head := _byte(stream):
        delta, kind = head >> 4, head & 15
        field = field + delta if delta else _varint(stream) >> 1
        yield field, kind


def _skip(stream: BinaryIO, kind: int, depth: int) -> None:
    """Skip a value of type `kind`."""
    if depth > DEPTH_LIMIT:
        raise ValueError("a page header is nested too deeply")
    if kind in BOOLEANS:
        return  # the value is part of the type
    if kind == BYTE:
        _byte(stream)
    elif kind in INTEGERS:
        _varint(stream)
    elif kind in (DOUBLE, BINARY):
        stream.seek(8 if kind == DOUBLE else _varint(stream), io.SEEK_CUR)
    elif kind in LISTS:
        head = _byte(stream)
        count = head >> 4 if head >> 4 < 15 else _varint(stream)
        for _ in range(count):
            _skip(stream, BYTE if head & 15 in BOOLEANS else head & 15, depth + 1)
    elif kind == STRUCT:
        for _, inner in _fields(stream):
            _skip(stream, inner, depth + 1)
    else:
        raise ValueError(f"a page header has the unknown type {kind}")


def _varint(stream: BinaryIO) -> int:
    number = 0
    for shift in range(0, 70, 7):
        byte = _byte(stream)
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise ValueError("a page header has a number with more than 64 bits")


def _byte(stream: BinaryIO) -> int:
    byte = stream.read(1)
    if not byte:
        raise ValueError("a page header is truncated")
    return byte[0]
