"""Measure which statements of tinygrad2/ and gpt2/ the tests execute: python tests/coverage_report.py [PART ...]

    python tests/coverage_report.py                   run all parts of CI one after the other, then report (takes hours)
    python tests/coverage_report.py fast mpi          run these parts; data from earlier calls are kept and included
    python tests/coverage_report.py --report          only report, from the data measured so far
    python tests/coverage_report.py --tests ARGS...   run other tests: ARGS are passed to pytest

Processes that the tests start are measured too. Functions that Numba compiles are excluded, since Python does not
execute their bodies ([tool.coverage] in pyproject.toml). The data are in build/coverage/; delete the folder to start
over. The report is written to docs/coverage.md, between two markers, and as JSON to
tests/benchmarks/results/coverage.json. Failing tests are reported but do not stop the measurement: coverage slows down
every process, and some tests have time limits.

The exit status is 1 if less than 90 % of a package is covered, or if a function has five or more lines that are neither
covered nor explained by REASONS.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA, PAGE = ROOT / "build" / "coverage", ROOT / "docs" / "coverage.md"
RESULT = ROOT / "tests" / "benchmarks" / "results" / "coverage.json"
MARKS = "<!-- measured -->", "<!-- end of what was measured -->"
LEAST = 90.0  # minimum coverage of each package, in percent
FEW = 5  # a function with fewer uncovered lines than this needs no reason
PACKAGES = ("tinygrad2", "gpt2")

# The tests that .ci/run runs, as arguments of pytest's -m.
PARTS = {
    "fast": "not slow and not gpu and not mpi",
    "mpi": "mpi",
    "slow": "(slow or extras or parity) and not gpu and not mpi",
}

# Why functions are not covered: (pattern for FILE: FUNCTION, reason). The first pattern that matches is used.
GPU = "needs an NVIDIA GPU: `pytest -m gpu` executes it"
ENDS = "it ends the process, by MPI_Abort or a signal, before data are written; `pytest -m mpi` tests the effect"
REASONS: tuple[tuple[str, str], ...] = (
    (r"tinygrad2/kernels/cuda\.py: driver$", GPU),
    (r"tinygrad2/kernels/cuda\.py: CudaKernels\.(launch_alone|blocks_at_once|clusters_at_once|properties)$", GPU),
    (r"tinygrad2/backend\.py: Cuda\.(launch_alone|blocks_at_once|clusters_at_once|limits|address)$", GPU),
    (
        r"tinygrad2/machine\.py: nvidia_driver$",
        "needs NVIDIA's driver; its callers are tested with all of its possible results",
    ),
    (
        r"tinygrad2/distributed\.py: MPIComm\.nccl$",
        "needs one GPU per rank; tests/stand_ins/nccl.py stands in for NCCL",
    ),
    (r"tinygrad2/distributed\.py: MPIComm\.(abort|_leave)$", ENDS),
    (r"tinygrad2/distributed\.py: _join$", "needs Slurm, or the mpirun of a different MPI library than mpi4py's"),
    (
        r"tinygrad2/files\.py: (_try_lock|flush_entry|Lock\.release)$",
        "branches for Windows, and for file systems without locks",
    ),
    (r"tinygrad2/blas\.py: _mkl$", "needs MKL, which no part installs"),
    (r"gpt2/formats/hub\.py: download$", "needs a network"),
    (r"tinygrad2/kernels/gemm\.py: _in_wheels$", "needs the CUDA wheels"),
    (r"tinygrad2/diagnose\.py: gpu$", GPU),
    (r"gpt2/parity\.py: (torch_model|torch_results)$", "needs PyTorch: the part slow executes it"),
    (r"tinygrad2/arguments\.py: of_numpy$", "needs PyTorch: the part slow executes it"),
    (r"tinygrad2/gradcheck\.py: run$", "the entry point, which tests replace or interrupt"),
    (r"gpt2/training/watch\.py: Watch\._end$", ENDS),
)


def measure(selection: Sequence[str]) -> None:
    """Run pytest under coverage. The data of every process are added to the existing data."""
    DATA.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COVERAGE_FILE": str(DATA / "data")}
    command = [sys.executable, "-m", "coverage", "run", "-m", "pytest", *selection]
    status = subprocess.run(command, cwd=ROOT, env=environment).returncode
    with (DATA / "measured").open("a", encoding="utf-8") as file:
        file.write(f"`pytest {shlex.join(selection)}`\n")
    if status:
        print(f"pytest {' '.join(selection)}: status {status}; the report covers what was executed", flush=True)


def combined() -> dict[str, Any]:
    """The combined report of all data, as `coverage json` writes it."""
    environment = {**os.environ, "COVERAGE_FILE": str(DATA / "combined")}
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run(
        [*coverage, "combine", "--keep", "--quiet", *map(str, DATA.glob("data.*"))],
        cwd=ROOT,
        env=environment,
        check=True,
    )
    out = DATA / "report.json"
    # Errors to ignore: files of copies of the repository that tests made and have removed.
    command = [*coverage, "json", "--quiet", "--ignore-errors", "-o", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return json.loads(out.read_text(encoding="utf-8"))


def missing(report: dict[str, Any]) -> dict[str, list[int]]:
    """The lines that no test executed, by FILE: FUNCTION, or by FILE for lines outside functions."""
    return {
        f"{name}: {function}" if function else name: found["missing_lines"]
        for name, file in sorted(report["files"].items())
        for function, found in file["functions"].items()
        if found["missing_lines"]
    }


def reason_of(location: str, lines: list[int]) -> str:
    """Why these lines are not covered; "" if there is no reason."""
    few = f"fewer than {FEW} lines each, listed in tests/benchmarks/results/{RESULT.name}" if len(lines) < FEW else ""
    return next((reason for pattern, reason in REASONS if re.match(pattern, location)), few)


def percent(covered: int, statements: int) -> float:
    return 100 * covered / statements if statements else 100.0


def table(report: dict[str, Any]) -> list[str]:
    """The rows of docs/coverage.md: packages, files below LEAST, and uncovered lines by reason."""
    files = report["files"]
    lines = ["| | statements | covered |", "|---|---|---|"]
    for package in PACKAGES:
        rows = [file["summary"] for name, file in files.items() if name.startswith(f"{package}/")]
        statements, covered = (sum(row[key] for row in rows) for key in ("num_statements", "covered_lines"))
        lines.append(f"| `{package}/` | {statements:,} | {percent(covered, statements):.1f} % |")
    for name, file in sorted(files.items()):
        row = file["summary"]
        if row["percent_covered"] < LEAST:
            lines.append(f"| `{name}` | {row['num_statements']:,} | {row['percent_covered']:.1f} % |")
    lines += ["", "| not covered | lines | reason |", "|---|---|---|"]
    by_reason: dict[str, dict[str, int]] = {}
    for location, numbers in missing(report).items():
        by_reason.setdefault(reason_of(location, numbers), {})[location] = len(numbers)
    for reason, locations in sorted(by_reason.items(), key=lambda item: -sum(item[1].values())):
        few = reason.startswith("fewer than")
        names = f"{len(locations):,} functions" if few else ", ".join(f"`{location}`" for location in locations)
        lines.append(f"| {names} | {sum(locations.values()):,} | {reason} |")
    return lines


def write(report: dict[str, Any]) -> bool:
    """Write the page and the JSON file, and print the totals. Returns whether everything is covered or explained."""
    date, lines = datetime.date.today().isoformat(), table(report)
    locations = missing(report)
    record = {
        "benchmark": "coverage",
        "date": date,
        "files": {name: file["summary"]["percent_covered"] for name, file in sorted(report["files"].items())},
        "missing": {location: ", ".join(map(str, numbers)) for location, numbers in locations.items()},
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    commands = (DATA / "measured").read_text(encoding="utf-8").splitlines()
    measured = "\n".join([f"Measured on {date}, with {', '.join(dict.fromkeys(commands))}.", "", *lines])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{measured}\n\n{MARKS[1]}{after}", encoding="utf-8")
    unexplained = [location for location, numbers in locations.items() if not reason_of(location, numbers)]
    print(*lines[2 : 2 + len(PACKAGES)], sep="\n")
    unused = [pattern for pattern, _ in REASONS if not any(re.match(pattern, location) for location in locations)]
    print(*(f"no reason given: {location}" for location in unexplained), sep="\n")
    print(*(f"reason not needed: {pattern}" for pattern in unused), f"written to {PAGE}", sep="\n")
    totals = [float(line.split("|")[3].strip(" %")) for line in lines[2 : 2 + len(PACKAGES)]]
    return min(totals) >= LEAST and not unexplained


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--report", action="store_true", help="only report, from the data measured so far")
    parser.add_argument(
        "--tests", nargs=argparse.REMAINDER, metavar="ARGS", help="arguments of pytest instead of parts"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; expected {', '.join(PARTS)}")
    if given.tests is not None:
        measure(given.tests)
    elif not given.report:
        for part in given.parts or PARTS:
            measure(["-m", PARTS[part]])
    return 0 if write(combined()) else 1


if __name__ == "__main__":
    sys.exit(main())
