"""Kill a rank at random moments, repeatedly: every run must end by itself, and the next one must resume from it.

    python tests/benchmarks/kill.py             20 runs of 4 ranks, in about five minutes

The same training is done once without interruption. At the end the log of the killed runs must have every step once, with
the very same loss: a sample that was lost or repeated would change it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from gpt2.training.run import read_log  # noqa: E402
from tinygrad2 import checkpoint  # noqa: E402

LIMIT = 30.0  # seconds in which a job must have ended after one of its ranks was killed
RANK = """
import os, sys
sys.path.insert(0, {root!r})
import train
from tinygrad2 import distributed
with open(f"pid-{{distributed.world().rank}}.new", "w") as file:
    file.write(str(os.getpid()))
os.replace(file.name, file.name.removesuffix(".new"))
sys.exit(train.main(sys.argv[1:]))
"""


def start(ranks: int, out: str, steps: int) -> subprocess.Popen:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpirun is None:
        raise SystemExit('kill.py: there is no mpirun; pip install -e ".[mpi]"')
    env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = f"--batch-size 1 --block-size 64 --dropout 0.1 --max-iters {steps} --save-interval 3 --eval-interval 0"
    command = [mpirun, "--oversubscribe", "-n", str(ranks), sys.executable, "-c", RANK.format(root=str(ROOT))]
    return subprocess.Popen(
        [*command, *options.split(), "--eval-iters", "2", "--out-dir", out],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(job: subprocess.Popen, limit: float) -> str:
    """The output of the job; a job that does not end is a failure."""
    try:
        return job.communicate(timeout=limit)[1].decode()
    except subprocess.TimeoutExpired:
        job.kill()
        raise SystemExit(f"FAILED: the job still ran {limit:.0f} s later") from None


def outlived(pids: list[int]) -> list[int]:
    """Which of these processes still run five seconds after their mpirun has ended."""
    end = time.monotonic() + 5
    while pids and time.monotonic() < end:
        time.sleep(0.05)
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    return pids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="runs to kill")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the whole training")
    parser.add_argument("--longest", type=float, default=8.0, help="seconds after which a rank is killed at the latest")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        job = start(given.ranks, "whole", given.steps)
        said = finish(job, 600)
        if job.returncode:
            raise SystemExit(f"FAILED: the uninterrupted run ended with {job.returncode}\n{said}")
        slowest, reached = 0.0, 0
        for run in range(1, given.runs + 1):
            for file in Path().glob("pid-*"):
                file.unlink()
            job = start(given.ranks, "killed", given.steps)
            rank, after = draw.randrange(given.ranks), draw.uniform(0.2, given.longest)
            began = time.monotonic()
            file = Path(f"pid-{rank}")
            while job.poll() is None and (time.monotonic() - began < after or not file.exists()):
                time.sleep(0.005)
            if job.poll() is not None:
                raise SystemExit(f"run {run} reached its last step before a rank could be killed; take more --steps")
            pids = [int(path.read_text()) for path in Path().glob("pid-[0-9]*") if path.suffix == ""]
            os.kill(int(file.read_text()), signal.SIGKILL)
            killed = time.monotonic()
            finish(job, LIMIT)
            seconds = time.monotonic() - killed
            slowest = max(slowest, seconds)
            left = outlived(pids)
            newest, damaged = checkpoint.newest(Path("killed"))
            step = checkpoint.step_of(newest) if newest else 0
            print(
                f"run {run:2}: rank {rank} killed after {after:4.1f} s, the job ended {seconds:.1f} s later (status "
                f"{job.returncode}), checkpoint at step {step}",
                flush=True,
            )
            if not job.returncode or left or damaged or step < reached:
                raise SystemExit(
                    f"FAILED: status {job.returncode}, processes left {left}, damaged {damaged}, step {step}"
                )
            reached = step
        job = start(given.ranks, "killed", given.steps)
        said = finish(job, 600)
        if job.returncode:
            raise SystemExit(f"FAILED: the last run ended with {job.returncode}\n{said}")
        rows = {
            out: [(row["step"], row["loss"]) for row in read_log(Path(out) / "log.jsonl")]
            for out in ("whole", "killed")
        }
        os.chdir(ROOT)
    if rows["killed"] != rows["whole"]:
        raise SystemExit("FAILED: the losses differ from those of the uninterrupted run")
    print(
        f"{run} runs killed, each ended within {slowest:.1f} s; all {given.steps} steps are there once, with the very "
        f"losses of an uninterrupted run"
    )


if __name__ == "__main__":
    main()
