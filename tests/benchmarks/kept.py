"""The stored results of the CPU benchmarks, by processor: python tests/benchmarks/kept.py

For every task of train_step.py and decode.py in tests/benchmarks/results/, prints this project's tokens per second and
its speedup over the fastest other program in the same run (median, minimum and maximum over the rounds). Float32 is
compared with float32 only, bfloat16 with any precision. Only the newest result of each processor and benchmark is used.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import RESULTS, command

BENCHMARKS = {"train_step": "step, 124M", "train_step-small": "step, 6 layers", "decode": "generation, 124M"}


class Row(NamedTuple):
    processor: str
    date: str
    work: str
    name: str
    tokens_per_s: float
    peer: str
    ratio: dict[str, float]  # median, min, max


def records(benchmark: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The newest record of the benchmark for each processor."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("cpu-*.json"))]
    kept = sorted((r for r in found if r["benchmark"] == benchmark), key=lambda r: r["date"])
    return list({r["processor"]: r for r in kept}.values())


def narrow(name: str) -> bool:
    """Whether a program with this name computes in fewer than 32 bits."""
    return "bfloat16" in name or "int8" in name


def rows(folder: Path = RESULTS) -> list[Row]:
    found = []
    for benchmark, title in BENCHMARKS.items():
        for record in records(benchmark, folder):
            for task, by_name in record["tasks"].items():
                for name, entry in by_name.items():
                    every = entry.get("times_as_fast_as", {})
                    if peers := {peer: ratio for peer, ratio in every.items() if narrow(name) or not narrow(peer)}:
                        peer = min(peers, key=lambda peer: by_name[peer]["median"])
                        work = title if task == "step" else f"{title}, {task}"
                        rate, ratio = entry["tokens_per_s"], peers[peer]
                        found.append(Row(record["processor"], record["date"], work, name, rate, peer, ratio))
    return sorted(found, key=lambda row: row.processor)


def main() -> int:
    processor = ""
    for row in rows():
        if row.processor != processor:
            processor = row.processor
            print(f"{processor}, {row.date}")
        ratio = "{median:.2f} ({min:.2f} to {max:.2f})".format(**row.ratio)
        print(f"  {row.work:<44}{row.name:<24}{row.tokens_per_s:>8,.1f} tokens/s   {ratio} times {row.peer}")
    return 0


if __name__ == "__main__":
    raise SystemExit(command(main))
