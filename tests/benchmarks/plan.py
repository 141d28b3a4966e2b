"""python -m gpt2.plan compared with real training steps on this CPU: python tests/benchmarks/plan.py [--only NAME ...]

Plans and trains three models of different sizes, each in its own process, and compares the time of a step and the peak
memory of the process. In each round, first the rates that the plan needs are measured, then the step; the ratio is the
median over the rounds. The exit status is 1 if a planned time is off by more than 20%, or a planned memory by more
than 5 % and 30 MB (the memory of the loaded libraries varies by that much). The 124M model needs 4 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for a repository that is not installed

from gpt2 import GPT2, GPT2Config, cpu_rates  # noqa: E402
from gpt2.memory_model import Step, needed  # noqa: E402
from gpt2.plan import make_plan  # noqa: E402
from tests.benchmarks.alternate import peak_memory  # noqa: E402
from tests.benchmarks.train_step import our_step  # noqa: E402
from tinygrad2 import machine, threads  # noqa: E402

NO_DROPOUT = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
SIZES = {  # config, B and T
    "nano": (GPT2Config.preset("nano"), 8, 64),
    "small": (GPT2Config(vocab_size=512, n_positions=128, n_embd=384, n_layer=6, n_head=6, **NO_DROPOUT), 12, 128),
    "gpt2": (GPT2Config(**{**vars(GPT2Config.preset("gpt2")), **NO_DROPOUT}), 1, 1024),
}
TIME_WITHIN, MEMORY_WITHIN, LIBRARIES_WITHIN = 0.2, 0.05, 30e6
SECONDS = 2.0  # steps are repeated for at least this long in a round


def compare(name: str, rounds: int) -> dict[str, Any]:
    """The planned and measured seconds of a step, and bytes of this process."""
    config, B, T = SIZES[name]
    step = Step(config, B, T, threads=threads.count())
    make_step = our_step(GPT2(config), B, T)
    make_step(), make_step()
    memory = peak_memory()
    planned, measured = [], []
    for _ in range(rounds):
        device = cpu_rates.measure(step)
        planned.append(make_plan(step, device, B * T, B * T).seconds)
        seconds: list[float] = []
        while sum(seconds) < SECONDS or len(seconds) < 2:
            started = time.perf_counter()
            make_step()
            seconds.append(time.perf_counter() - started)
        measured.append(statistics.median(seconds))
    ratios = [a / b for a, b in zip(planned, measured, strict=True)]
    return {
        "planned_seconds": statistics.median(planned),
        "measured_seconds": statistics.median(measured),
        "time_ratio": statistics.median(ratios),
        "time_ratios": ratios,
        "planned_bytes": needed(step),
        "measured_bytes": memory,
        "memory_ratio": needed(step) / memory,
    }


def within(found: dict[str, Any]) -> bool:
    """Whether time and memory are within their bounds."""
    excess = abs(found["planned_bytes"] - found["measured_bytes"])
    near = excess <= max(MEMORY_WITHIN * found["measured_bytes"], LIBRARIES_WITHIN)
    return near and abs(found["time_ratio"] - 1) <= TIME_WITHIN


def line(name: str, found: dict[str, Any]) -> str:
    return (
        f"{name:<8}{1e3 * found['planned_seconds']:12,.1f}{1e3 * found['measured_seconds']:12,.1f}"
        f"{found['time_ratio']:8.2f} ({min(found['time_ratios']):.2f} to {max(found['time_ratios']):.2f})"
        f"{found['planned_bytes'] / 1e9:12.3f}{found['measured_bytes'] / 1e9:12.3f}{found['memory_ratio']:8.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), help="only these models")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds [default: %(default)s]")
    parser.add_argument("--threads", type=int, default=threads.count(), metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the process of one model
    options = parser.parse_args(arguments)
    threads.set_count(options.threads)
    if options.inside:
        print(json.dumps(compare(options.only[0], options.rounds)))
        return 0
    print(f"{'':8}{'planned ms':>12}{'measured':>12}{'ratio':>8}{'':16}{'planned GB':>12}{'measured':>12}{'ratio':>8}")
    results = {}
    for name in options.only:
        command = [sys.executable, __file__, "--inside", "--only", name]
        command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output)
        print(line(name, results[name]), flush=True)
    if options.json:
        about = {"processor": machine.processor(), "threads": options.threads, "python": platform.python_version()}
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        record = {**about, "load": load, "results": results}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if all(map(within, results.values())) else 1


if __name__ == "__main__":
    raise SystemExit(main())
