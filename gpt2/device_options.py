"""The options --device, --threads and --dtype, which are common to several commands."""

from __future__ import annotations

import argparse

from gpt2.config import WEIGHT_DTYPES
from gpt2.console import Parser
from tinygrad2 import threads
from tinygrad2.backend import DEVICES


def add(group: argparse._ArgumentGroup) -> None:
    """Add --device and --threads to a group of a parser."""
    group.add_argument("--device", default="auto", choices=DEVICES, help="the device to use")
    group.add_argument("--threads", type=int, metavar="N", help="number of CPU threads [default: available cores]")


def add_dtype(group: argparse._ArgumentGroup) -> None:
    """Add --dtype, the dtype of the weights for generation."""
    group.add_argument(
        "--dtype",
        default="float32",
        choices=WEIGHT_DTYPES,
        help="dtype of the weights: bfloat16 halves the bytes read per token",
    )


def set_threads(parser: Parser, options: argparse.Namespace) -> None:
    """Set the number of threads to --threads. An invalid number is reported as an invalid option."""
    if options.threads is None:
        return
    if not 1 <= options.threads <= threads.MAX_COUNT:
        parser.error(f"--threads is {options.threads}; expected 1 to {threads.MAX_COUNT:,}")
    threads.set_count(options.threads)
