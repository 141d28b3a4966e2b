"""data/parquet_pages.py: page sizes agree with pyarrow's, and damaged page headers are errors."""

import io

import pytest

from data.parquet_pages import page_sizes


def header(uncompressed, compressed, more=b""):
    """A page header: type 0, the two sizes (zigzag varints), other fields, and the end marker."""

    def number(value):
        value, out = value << 1, b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    return b"\x15\x00\x15" + number(uncompressed) + b"\x15" + number(compressed) + more + b"\x00"


def sizes(content, start=0):
    return list(page_sizes(io.BytesIO(content), start, len(content) - start))


def test_sizes_of_consecutive_pages():
    content = b"PAR1" + header(100, 3) + b"abc" + header(1 << 30, 2) + b"de" + header(0, 0)
    assert sizes(content, 4) == [100, 1 << 30, 0]


def test_other_fields_are_skipped():
    statistics = b"\x5c" + b"\x18\x03max" + b"\x18\x03min" + b"\x16\x04" + b"\x00"  # a struct: two strings, a number
    lists = b"\x19\x35\x02\x04\x06" + b"\x19\x21\x01\x02"  # lists of three numbers and of two booleans
    others = b"\x11" + b"\x13\x07" + b"\x17" + bytes(8)  # a boolean, a byte, a double
    assert sizes(header(5, 1, statistics + lists + others) + b"x" + header(6, 0)) == [5, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x15", "truncated"),
        (header(5, 1)[:-1], "truncated"),
        (b"\x15\x00\x00", "no size"),
        (b"\x15\x00\x15\x01\x15\x02\x00", "no size"),  # a negative size
        (b"\x15" + b"\xff" * 11, "more than 64 bits"),
        (b"\x1d\x00", "unknown type 13"),
        (b"\x1c" * 30, "nested too deeply"),
    ],
)
def test_damaged_headers_are_rejected(content, message):
    with pytest.raises(ValueError, match=message):
        sizes(content)


@pytest.mark.extras("pyarrow")
@pytest.mark.parametrize("dictionary", [True, False])
def test_page_sizes_of_a_file_written_by_pyarrow(tmp_path, dictionary):
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    texts = [f"text {i % 7} " * 50 for i in range(2000)]
    file = tmp_path / "a.parquet"
    parquet.write_table(
        arrow.table({"text": texts}), file, use_dictionary=dictionary, compression="zstd", data_page_size=10_000
    )
    column = parquet.ParquetFile(file).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset if dictionary else column.data_page_offset
    with file.open("rb") as stream:
        found = list(page_sizes(stream, start, column.total_compressed_size))
    assert len(found) > 1
    headers = column.total_uncompressed_size - sum(found)
    assert 0 < headers < 2000 * len(found)  # headers contain the minimum and maximum of the page
