"""Interleaved measurements of several programs, for the CPU benchmarks in this folder.

On a shared machine, the results of two separate measurements depend on the load as much as on the programs. So every
contender has its own process, which stays alive, and in each round all contenders run the same task in turn: A B C,
A B C. Only ratios within a round are compared. A contender returns a result only after its threads have gone to sleep,
and then blocks on a read until its next turn, so that no thread pool computes or spins while another program is
measured.

The machine's limits (matrix products, reading and copying memory) are measured in the same rounds.

This module imports no large package, so that the peak memory is that of the contender alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
MATRIX, BUFFER = 3072, 1 << 29  # for the machine's limits: rows of the square matrices, and bytes to read or copy
LIMITS = "the machine's limits"
MACHINE = ("sgemm, NumPy", "sgemm, tinygrad2", "bfloat16, tinygrad2", "read", "copy")  # the tasks that measure LIMITS
SETTINGS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # environment variables that can slow a library down; removed
PACKAGES = ("numpy", "numba", "mkl", "onednn-cpu-gomp", "torch", "transformers", "ctranslate2")

Tasks = dict[str, Callable[[], float]]  # name -> function that runs the task once and returns its time in seconds


class Work(NamedTuple):
    """The amount of work in a task; 0 means not reported. Bytes are the minimum that must be read and written."""

    tokens: int = 0
    flops: float = 0
    read: float = 0
    written: float = 0


@dataclass(frozen=True)
class Contender:
    """One program. make(*arguments) is called in the program's own process and returns its tasks.

    peer  True for another project's program, which ours is compared with.
    """

    name: str
    make: Callable[..., Tasks]
    arguments: tuple
    works: dict[str, Work]
    peer: bool = False


def slug() -> str:
    """The processor and today's date, for the name of a result file: results are stored per processor."""
    from tinygrad2.machine import processor_model

    words = processor_model().rsplit(" ", 1)[0]  # without the checksum of the instruction sets
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + f"-{datetime.date.today().isoformat()}"


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Wrap a function so that it returns its time in seconds."""

    def call() -> float:
        started = time.perf_counter()
        function()
        return time.perf_counter() - started

    return call


def warm(task: Callable[[], float]) -> Callable[[], float]:
    """Run a task twice and return the time of the second run: the system may have reclaimed unused pages."""

    def call() -> float:
        task()
        return task()

    return call


def versions(*packages: str) -> dict[str, str]:
    """The versions of those of the given packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


# In the process of a contender ----------------------------------------------------------------------------------------

_tasks: Tasks = {}


def blas_title() -> str:
    """The BLAS library that this project uses."""
    from tinygrad2 import blas

    return blas.chosen().title


def _begin(make: Callable[..., Tasks], arguments: tuple) -> None:
    _tasks.update(make(*arguments))
    _settle()


def _measure(task: str, least: float) -> float:
    """The median time of the task in seconds; it is repeated until `least` seconds have passed."""
    seconds = [_tasks[task]()]
    while sum(seconds) < least:
        seconds.append(_tasks[task]())
    _settle()
    return statistics.median(seconds)


def _settle() -> None:
    """Wait (with a time limit) until all threads of this process are idle: many thread pools spin before they sleep."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(0.02)
        if time.process_time() - before < 0.002:
            return


def peak_memory() -> int:
    """The peak memory of this process in bytes. (On Linux, ru_maxrss would include the parent's memory at the fork.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limits(count: int, matrix: int, nbytes: int) -> Tasks:
    """The contender that measures the machine's limits: float32 products with two libraries, bfloat16 products (in
    float32 if the processor has no bfloat16 instructions), and reading and copying memory."""
    import numpy as np

    from tinygrad2 import threads
    from tinygrad2.backend import get_backend

    threads.set_count(count)
    kernels = get_backend("cpu").kernels
    a, b = np.random.default_rng(0).standard_normal((2, matrix, matrix), dtype=np.float32)
    c = np.empty_like(a)
    narrow = a.astype("bfloat16"), b.astype("bfloat16")
    source = np.ones(nbytes // 4, np.float32)
    target = np.ones_like(source)
    parts, workers = threads.parts(len(source), 1), ThreadPoolExecutor(count)

    def read() -> None:
        with threads.blas_on_one_thread():
            list(workers.map(lambda part: np.dot(source[slice(*part)], source[slice(*part)]), parts))

    def copy() -> None:
        list(workers.map(lambda part: np.copyto(target[slice(*part)], source[slice(*part)]), parts))

    passes = (
        lambda: np.matmul(a, b, out=c),
        lambda: kernels.linear_forward(a, b, None),
        lambda: kernels.linear_forward(*narrow, None),
        read,
        copy,
    )
    return dict(zip(MACHINE, map(warm, map(timed, passes)), strict=True))


# In the measuring process ---------------------------------------------------------------------------------------------


def _process(stack: contextlib.ExitStack) -> ProcessPoolExecutor:
    """A new worker process, which exits silently on Ctrl-C."""
    return stack.enter_context(
        ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
        )
    )


def in_subprocess(function: Callable, *arguments: Any) -> Any:
    """Call function(*arguments) in a separate process, so that this one stays small."""
    with contextlib.ExitStack() as stack:
        return _process(stack).submit(function, *arguments).result()


class Measured(NamedTuple):
    """Seconds by task, contender and round; peak bytes by contender; an error for each contender that failed."""

    seconds: dict[str, dict[str, list[float]]]
    peak_bytes: dict[str, int]
    errors: dict[str, str]


def alternate(contenders: Sequence[Contender], rounds: int, least: float = 0.0) -> Measured:
    """Run every task in every round, one contender after the other, for at least `least` seconds per turn.

    A contender that fails is excluded from the remaining turns; its earlier results are kept.
    """
    from tqdm import tqdm

    tasks = dict.fromkeys(task for contender in contenders for task in contender.works)
    found = Measured({task: {} for task in tasks}, {}, {})
    turns = len(contenders) + rounds * sum(len(contender.works) for contender in contenders)
    with contextlib.ExitStack() as stack, tqdm(total=turns, unit=" turns", leave=False, disable=None) as bar:
        processes: dict[str, ProcessPoolExecutor] = {}

        def ask(contender: Contender, function: Callable, *arguments: Any) -> Any:
            """The result from the contender's process, or None if this call or an earlier one failed."""
            bar.set_description(contender.name)
            try:
                if contender.name not in found.errors:
                    return processes[contender.name].submit(function, *arguments).result()
            except Exception as error:
                text = " ".join(str(error).split())[:300]
                found.errors[contender.name] = f"{type(error).__name__}: {text}"
            finally:
                bar.update(function is not peak_memory)
            return None

        for contender in contenders:
            processes[contender.name] = _process(stack)
            ask(contender, _begin, contender.make, contender.arguments)
        for _ in range(rounds):
            for task in tasks:
                for contender in contenders:
                    if task in contender.works and (seconds := ask(contender, _measure, task, least)) is not None:
                        found.seconds[task].setdefault(contender.name, []).append(seconds)
        for contender in contenders:
            if (peak := ask(contender, peak_memory)) is not None:
                found.peak_bytes[contender.name] = peak
    return found


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compared(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Our speedup over theirs, from the rounds that both completed."""
    return spread(b / a for a, b in zip(ours, theirs, strict=False))


def figures(contenders: Sequence[Contender], found: Measured) -> dict[str, Any]:
    """Derived figures: rates, their fractions of the machine's limits, and ratios to each peer.

    A limit is the median over the rounds; for float32 products, the median of the faster library. Memory rates are
    compared with the rate of reading or copying; a task whose data fits into the caches may exceed it.
    """
    work = {contender.name: contender.works for contender in contenders}
    rate = {
        task: {
            name: {
                "seconds": seconds,
                **spread(seconds),
                "tokens_per_s": work[name][task].tokens / statistics.median(seconds),
                "flop_per_s": work[name][task].flops / statistics.median(seconds),
                "bytes_per_s": (work[name][task].read + work[name][task].written) / statistics.median(seconds),
            }
            for name, seconds in by_name.items()
        }
        for task, by_name in found.seconds.items()
    }
    machine = {task: rate.pop(task).get(LIMITS) for task in MACHINE}
    rates = {task: entry["flop_per_s"] for task, entry in machine.items() if entry}
    sgemm = max((rate for task, rate in rates.items() if task.startswith("sgemm")), default=0)
    bfloat16 = rates.get("bfloat16, tinygrad2", 0)
    for task, by_name in rate.items():
        for contender in contenders:
            if (entry := by_name.get(contender.name)) is None:
                continue
            limit = machine["copy" if contender.works[task].written else "read"]
            entry["share_of_sgemm"] = entry["flop_per_s"] / sgemm if sgemm else None
            entry["share_of_bfloat16"] = entry["flop_per_s"] / bfloat16 if bfloat16 else None
            entry["share_of_memory"] = entry["bytes_per_s"] / limit["bytes_per_s"] if limit else None
            if not contender.peer:
                peers = [peer.name for peer in contenders if peer.peer and peer.name in by_name]
                entry["times_as_fast_as"] = {
                    peer: compared(entry["seconds"], by_name[peer]["seconds"]) for peer in peers
                }
    peaks = {name: peak for name, peak in found.peak_bytes.items() if name != LIMITS}
    return {"limits": machine, "tasks": rate, "peak_bytes": peaks, "errors": found.errors}


def table(record: dict[str, Any]) -> list[str]:
    """The lines to print: every task and contender, the machine's limits, and the peak memory."""
    lines = [
        f"{record['processor']}, {record['threads']} threads, {record['date']}, {record['rounds']} rounds, "
        f"load average before {record['load_average']:.2f}",
        ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + f"; tinygrad2's products in float32: {record['blas']}",
    ]
    for task, entry in record["limits"].items():
        if entry:
            scale, unit = (entry["flop_per_s"], "GFLOP/s") if entry["flop_per_s"] else (entry["bytes_per_s"], "GB/s")
            lines.append(f"{task:<20}{scale / 1e9:8.1f} {unit}")
    for task, by_name in record["tasks"].items():
        lines += ["", *_rows(task, by_name)]
    lines += ["", "peak memory"]
    lines += [f"  {name:<26}{peak / 1e9:8.2f} GB" for name, peak in record["peak_bytes"].items()]
    return lines + [f"FAILED  {name}: {error}" for name, error in record["errors"].items()]


# Heading, width, and a function that formats the figure of one contender and task; empty columns are omitted.
COLUMNS: tuple[tuple[str, int, Callable[[dict[str, Any]], str | None]], ...] = (
    ("median ms", 12, lambda e: f"{1e3 * e['median']:,.3f}"),
    ("min", 11, lambda e: f"{1e3 * e['min']:,.3f}"),
    ("max", 11, lambda e: f"{1e3 * e['max']:,.3f}"),
    ("tokens/s", 11, lambda e: f"{e['tokens_per_s']:,.1f}" if e["tokens_per_s"] else None),
    ("GFLOP/s", 10, lambda e: f"{e['flop_per_s'] / 1e9:.1f}" if e["flop_per_s"] else None),
    ("of sgemm", 10, lambda e: f"{e['share_of_sgemm']:.0%}" if e["flop_per_s"] and e["share_of_sgemm"] else None),
    ("of bf16", 10, lambda e: f"{e['share_of_bfloat16']:.0%}" if e["flop_per_s"] and e["share_of_bfloat16"] else None),
    ("GB/s", 8, lambda e: f"{e['bytes_per_s'] / 1e9:.1f}" if e["bytes_per_s"] else None),
    ("of memory", 11, lambda e: f"{e['share_of_memory']:.0%}" if e["bytes_per_s"] and e["share_of_memory"] else None),
)


def _rows(task: str, by_name: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The heading and one line per contender. Our lines end with the ratio to the fastest peer."""
    columns = [column for column in COLUMNS if any(column[2](entry) for entry in by_name.values())]
    yield f"{task:<28}" + "".join(f"{heading:>{width}}" for heading, width, _ in columns)
    for name, entry in by_name.items():
        line = f"  {name:<26}" + "".join(f"{text(entry) or '':>{width}}" for _, width, text in columns)
        if peers := entry.get("times_as_fast_as"):
            fastest = min(peers, key=lambda peer: by_name[peer]["median"])
            line += "   {median:.2f}x ({min:.2f} to {max:.2f}) ".format(**peers[fastest]) + fastest
        yield line


# The command line -----------------------------------------------------------------------------------------------------


def command(main: Callable[[], int]) -> int:
    """Call main(). For errors and Ctrl-C, print one line instead of a traceback."""
    try:
        return main()
    except (ValueError, OSError, BrokenExecutor) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        return 130


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have in common."""
    from gpt2.console import Parser
    from tinygrad2 import threads

    parser = Parser(f"python tests/benchmarks/{prog}", description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="number of rounds [%(default)s]")
    parser.add_argument(
        "--threads", type=positive, default=threads.count(), metavar="N", help="threads per program [%(default)s]"
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="[in results/ next to this file]")
    return parser


def positive(text: str) -> int:
    """Parse the integer value of an option, which must be at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"is {value}; expected 1 or more")
    return value


def new_file(text: str) -> Path:
    """Parse the file name of an option; its folder must exist."""
    if not (path := Path(text)).parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent}/ does not exist")
    return path


def report(
    name: str, options: argparse.Namespace, contenders: Sequence[Contender], least: float = 0.0, **more: Any
) -> int:
    """Measure, write the JSON file and print the table. Returns 0 if nothing failed, else 1.

    name  the name of the benchmark, used in the file name.  more  additional entries of the record.
    """
    from tinygrad2.machine import processor_model

    removed = {name: os.environ.pop(name) for name in SETTINGS if os.environ.get(name)}
    if removed:
        print(f"removed from the environment: {' '.join(f'{name}={value}' for name, value in removed.items())}")
    product = Work(flops=2 * MATRIX**3)
    works = dict(
        zip(MACHINE, (product, product, product, Work(read=BUFFER), Work(read=BUFFER, written=BUFFER)), strict=True)
    )
    everyone = [Contender(LIMITS, limits, (options.threads, MATRIX, BUFFER), works), *contenders]
    out = options.json or RESULTS / f"cpu-{name}-{slug()}.json"
    out.parent.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    found = alternate(everyone, options.rounds, least)
    record = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "processor": processor_model(),
        "threads": options.threads,
        "python": platform.python_version(),
        "versions": versions(*PACKAGES),
        "blas": in_subprocess(blas_title),
        "removed_settings": removed,
        "rounds": options.rounds,
        "load_average": load,
        **more,
        **figures(everyone, found),
    }
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(*table(record), f"\nwritten to {out}", sep="\n", flush=True)
    return 1 if found.errors else 0
