"""gpt2/device_options.py: --device, --threads and --dtype."""

import pytest

from gpt2 import device_options
from gpt2.console import Parser
from tinygrad2 import threads


def parser(dtype=False):
    made = Parser("python -m gpt2.example", "An example.")
    group = made.add_argument_group("device")
    device_options.add(group)
    if dtype:
        device_options.add_dtype(group)
    return made


@pytest.fixture(autouse=True)
def unchanged():
    before = threads.count()
    yield
    threads.set_count(before)


def test_defaults():
    options = parser(dtype=True).parse_args([])
    assert vars(options) == {"device": "auto", "threads": None, "dtype": "float32"}
    before = threads.count()
    device_options.set_threads(parser(), options)
    assert threads.count() == before


def test_the_number_of_threads_is_set():
    device_options.set_threads(parser(), parser().parse_args(["--threads", "1"]))
    assert threads.count() == 1


@pytest.mark.parametrize("number", ["0", "-1", "1025", "100000000000000000000"])
def test_a_number_of_threads_out_of_range_prints_one_line(number, capsys):
    with pytest.raises(SystemExit) as end:
        device_options.set_threads(parser(), parser().parse_args(["--threads", number]))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert f"gpt2.example: error: --threads is {number}; expected 1 to 1,024" in line
