"""Random programs compared with NumPy and PyTorch: python tests/benchmarks/programs.py [--count 10000] [--first 0]

Compares values and gradients in float64 of the programs that tests/tinygrad2/programs.py generates. Prints each program
that differs, with the seed that reproduces it, and the number of failures.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import command, positive, versions


def check(seeds: range) -> tuple[list[tuple[int, str]], Counter[str]]:
    """(seed, message) for every program that differs or raises an error, and the number of uses of each operation."""
    from tqdm import tqdm

    from tests.tinygrad2.programs import draw_program, failure, from_generator

    torch = importlib.import_module("torch") if versions("torch") else None
    failures, used = [], Counter[str]()
    for seed in tqdm(seeds, unit=" programs", leave=False, disable=None):
        program = None
        try:
            with np.errstate(all="ignore"):
                program = draw_program(from_generator(np.random.default_rng(seed)))
                used.update(step.operation.name for step in program.steps)
                reason = failure(program, torch)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            failures.append((seed, f"{reason}\n{program}"))
    return failures, used


def main(arguments: Sequence[str] | None = None) -> int:
    from gpt2.console import Parser

    parser = Parser("python tests/benchmarks/programs.py", __doc__)
    parser.add_argument("--count", type=positive, default=10_000, metavar="N", help="number of programs [%(default)s]")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="seed of the first program [%(default)s]")
    options = parser.parse_args(arguments)
    failures, used = check(range(options.first, options.first + options.count))
    for seed, message in failures:
        print(f"seed {seed}: {message}\n")
    peers = "NumPy and PyTorch" if versions("torch") else "NumPy (PyTorch is not installed)"
    print(f"{options.count:,} programs compared with {peers}: {len(failures)} failures")
    print(f"{sum(used.values()):,} operations of {len(used)} kinds; least frequent: {used.most_common()[-1]}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(command(main))
