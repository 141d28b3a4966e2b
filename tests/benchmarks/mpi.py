"""The speed of two ranks with one core each, relative to one rank with both cores: python tests/benchmarks/mpi.py

Trains GPT-2 124M with sequences of T = 512 tokens, one sequence per micro-step. One rank and two ranks process the same
number of tokens per step. The two ranks do four micro-steps each, the same with sharded moments (--zero), or a single
micro-step each. The runs are interleaved, so that a machine that slows down affects all of them. Prints tokens/s, the
seconds per step that a rank waits for the other, the peak memory of a rank, and the ratio to the run with one rank in
the same round. Takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# name, ranks, micro-steps per rank, sharded moments (--zero), index of the row to compare with, required ratio
ROWS = (
    ("1 rank, 2 cores, 8 micro-steps", 1, 8, False, 0, None),
    ("2 ranks, 1 core each, 4 micro-steps", 2, 4, False, 0, 0.95),
    ("2 ranks, 1 core each, 4 micro-steps, --zero", 2, 4, True, 0, 0.95),
    ("1 rank, 2 cores, 2 micro-steps", 1, 2, False, 3, None),
    ("2 ranks, 1 core each, 1 micro-step", 2, 1, False, 3, 0.85),
)


def measure(preset: str, T: int, micro_steps: int, zero: bool, steps: int, cores: list[int]) -> None:
    """Train on one rank of one row; rank 0 prints a line of JSON."""
    rank, size = (
        int(os.environ.get(f"OMPI_COMM_WORLD_{name}", default)) for name, default in (("RANK", 0), ("SIZE", 1))
    )
    os.sched_setaffinity(0, {cores[rank]} if size > 1 else set(cores))  # before NumPy counts the cores

    import resource

    import numpy as np

    from gpt2 import GPT2, GPT2Config
    from tinygrad2 import Key, distributed, optim, threads
    from tinygrad2.gradient_sum import GradientSum

    comm = distributed.world()
    assert threads.count() == (1 if size > 1 else len(cores)), threads.count()
    model = GPT2(GPT2Config.preset(preset), seed=0)
    optimizer = optim.AdamW(model, weight_decay=0.1, shared_by=comm if zero else None)
    sums = GradientSum(model, comm, share_only=zero)
    tokens = np.random.default_rng(rank).integers(model.config.vocab_size, size=(micro_steps, 1, T + 1))
    seconds, waits = [], []
    for step in range(steps + 1):
        began, waited = time.perf_counter(), comm.waited
        for micro in range(micro_steps):
            key = Key(0, step, micro * size + rank)
            loss = model.loss(tokens[micro, :, :-1], tokens[micro, :, 1:], key) * (1 / micro_steps / size)
            if micro == micro_steps - 1:
                sums.start()
            loss.backward()
        sums.finish(loss.data)
        optimizer.step(1.0)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        waits.append(comm.waited - waited)
    peak = comm.all_gather(np.array(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    if rank == 0:
        each = size * micro_steps * T / statistics.median(seconds[1:])  # the first step compiles kernels
        row = {"tokens_per_s": each, "comm": statistics.median(waits[1:]), "peak_MiB": peak.max()}
        print(json.dumps(row), flush=True)


def run(row: tuple, given: argparse.Namespace) -> dict[str, float]:
    _, ranks, micro_steps, zero, _, _ = row
    command = [sys.executable, __file__, "--micro-steps", str(micro_steps), "--steps", str(given.steps), "--length"]
    command += [str(given.length), "--preset", given.preset, *(["--zero"] if zero else [])]
    if ranks > 1:
        mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if mpirun is None:
            raise SystemExit('mpi.py: mpirun is not installed; pip install -e ".[mpi]"')
        command = [mpirun, "--bind-to", "none", "--oversubscribe", "-n", str(ranks), *command]
    env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    out = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each run, after one warm-up step")
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--micro-steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--zero", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("mpi.py: requires two cores")
    if given.micro_steps:
        measure(given.preset, given.length, given.micro_steps, given.zero, given.steps, cores)
        return
    ratios: dict[str, list[float]] = {}
    for turn in range(given.rounds):
        print(f"round {turn + 1}{'':41}  tokens/s   comm s  peak MiB   ratio")
        results = []
        for row in ROWS:
            results.append(run(row, given))
            ratio = results[-1]["tokens_per_s"] / results[row[4]]["tokens_per_s"]
            ratios.setdefault(row[0], []).append(ratio)
            now = results[-1]
            print(
                f"{row[0]:48} {now['tokens_per_s']:9.1f} {now['comm']:8.3f} {now['peak_MiB']:9.0f} {ratio:7.3f}",
                flush=True,
            )
    for name, *_, wanted in ROWS:
        if wanted:
            got = statistics.median(ratios[name])
            print(f"{name}: {got:.3f} of one rank's tokens/s; {wanted} required: {'ok' if got >= wanted else 'MISSED'}")


if __name__ == "__main__":
    main()
