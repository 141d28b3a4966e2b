"""Kill train.py at many points: every run must end with the same bytes as an uninterrupted run.

    python tests/benchmarks/kill.py                      200 kills of single processes, in at least 60 runs
    python tests/benchmarks/kill.py --kills 20 --runs 6  a short test
    python tests/benchmarks/kill.py --ranks 4            50 kills of one of 4 ranks (mpirun)

A process is killed at a random time, before its k-th change to the file system, or at a random time on a disk with slow
flushes. The same command then resumes the run, and may be killed again. At the end, all files are compared with those
of an uninterrupted run. The comparison ignores times (seconds and rates in trainer.json and log.jsonl) and all records
of starts but the first. report.html must equal the page that is generated from its folder, except for the date.

When a rank is killed, its job must also end within 30 s.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from gpt2 import report  # noqa: E402
from gpt2.training.run import read_log  # noqa: E402
from tinygrad2 import checkpoint  # noqa: E402

OPTIONS = (
    "--block-size 16 --batch-size 2 --max-iters 40 --eval-interval 10 --eval-iters 2 --save-interval 3 "
    "--log-interval 10 --dropout 0.1"
)
TIMES = ("seconds", "comm_seconds", "tokens_per_s")  # fields in the rows of the log
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate", "os.utime", "shutil.rmtree"}
MODES = ("change", "change", "slow", "random")  # "change" is drawn twice as often
MOST_CHANGES = 420  # about the number of changes in a run
SLOW_FLUSH = 0.03  # seconds
LIMIT = 30.0  # seconds; a job must end this soon after one of its ranks is killed
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


# Single processes


def kill_before_change(k: int, out: Path) -> None:
    """Kill this process before its k-th change to files in `out`; a flush counts as a change."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == k:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and out.name in str(arguments[0]):
            tick()

    fsync = os.fsync
    os.fsync = lambda handle: (tick(), fsync(handle))[1]  # type: ignore[assignment]
    sys.addaudithook(watch)


def start(out: Path, log: Path, mode: str, k: int) -> int:
    """Run train.py in a fork of this process. Returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if mode == "change":
        kill_before_change(k, out)
    elif mode == "slow":
        fsync = os.fsync
        os.fsync = lambda handle: (time.sleep(SLOW_FLUSH), fsync(handle))[1]  # type: ignore[assignment]
    status = train.main([*OPTIONS.split(), "--out-dir", str(out)])
    sys.stdout.flush()
    os._exit(status)


def wait(pid: int, seconds: float) -> int:
    """Wait for a process, and kill it after `seconds`. Returns its exit status, negative for a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(out: Path) -> dict[str, object]:
    """The contents of an out-dir that must not depend on interruptions, by file."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for folder in checkpoint.find(out):
        state = checkpoint.read_json(folder / "trainer.json")
        state["progress"].pop("seconds")
        state["options"].pop("out_dir")
        listed = checkpoint.read_json(folder / "manifest.json")["files"]
        listed.pop("trainer.json")
        found |= {f"{folder.name}/trainer.json": state, f"{folder.name}/manifest.json": listed}
        checkpoint.verify(folder)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found["log.jsonl"] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    found["starts.jsonl"] = [row["step"] for row in read_log(out / "starts.jsonl")][:1]
    page = (out / "report.html").read_text(encoding="utf-8")
    current = report.report_page(report.Run.load(out), report.previous_run(out))
    found["report.html"] = undated(page) == undated(current)
    return found


def undated(page: str) -> str:
    return re.sub(r"\d\d\d\d-\d\d-\d\d at \d\d:\d\d:\d\d", "", page)


def kill_one_run(draw: random.Random, folder: Path, run: int, most: int) -> tuple[Path, Counter, str]:
    """Do a run that is killed up to `most` times. Returns its folder, the kills by mode, and an error message."""
    out, log, kills = folder / f"run{run:03}", folder / f"run{run:03}.txt", Counter[str]()
    for _ in range(most):
        mode = draw.choice(MODES)
        k, seconds = draw.randint(1, MOST_CHANGES), draw.uniform(0, 6 if mode == "slow" else 3)
        status = wait(start(out, log, mode, k), 120 if mode == "change" else seconds)
        if status == -signal.SIGKILL:
            kills[mode] += 1
        elif status:
            return out, kills, f"a start ended with {status}: {log.read_text()[-500:]}"
    status = wait(start(out, log, "", 0), 300)
    return out, kills, f"the last start ended with {status}: {log.read_text()[-500:]}" if status else ""


def kill_processes(kills: int, runs: int, seed: int, folder: Path) -> None:
    draw, done, run = random.Random(seed), Counter[str](), 0
    whole = folder / "whole"
    if status := wait(start(whole, folder / "whole.txt", "", 0), 600):
        raise SystemExit(
            f"FAILED: the uninterrupted run ended with {status}: {(folder / 'whole.txt').read_text()[-500:]}"
        )
    expected = contents(whole)
    while done.total() < kills or run < runs:
        run += 1
        out, found, failed = kill_one_run(draw, folder, run, draw.randint(1, max(2, round(2 * kills / runs))))
        done += found
        got = {} if failed else contents(out)
        differing = sorted(name for name in expected.keys() | got.keys() if got.get(name) != expected.get(name))
        print(f"run {run:3}: killed {dict(found)}, {done.total()} in total", flush=True)
        if failed or differing:
            kept = Path(tempfile.mkdtemp(prefix="killed-")) / "run"
            shutil.copytree(out, kept, symlinks=True)
            raise SystemExit(f"FAILED: {failed or f'different contents: {differing}'}\nkept in {kept}, --seed {seed}")
        shutil.rmtree(out)
    listed = ", ".join(f"{count} {mode}" for mode, count in sorted(done.items()))
    print(f"{run} runs, {done.total()} kills ({listed}): each ended with the same bytes as the uninterrupted run")


# Ranks


def start_ranks(ranks: int, out: str, steps: int) -> subprocess.Popen:
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if mpirun is None:
        raise SystemExit('kill.py: mpirun is not installed; pip install -e ".[mpi]"')
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
    """Wait for the job and return its output; exit if it does not end within `limit` seconds."""
    try:
        return job.communicate(timeout=limit)[1].decode()
    except subprocess.TimeoutExpired:
        job.kill()
        raise SystemExit(f"FAILED: the job was still running {limit:.0f} s later") from None


def still_running(pids: list[int]) -> list[int]:
    """The processes that are still running five seconds after their mpirun has ended."""
    end = time.monotonic() + 5
    while pids and time.monotonic() < end:
        time.sleep(0.05)
        pids = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    return pids


def finish_uninterrupted(job: subprocess.Popen) -> None:
    said = finish(job, 600)
    if job.returncode:
        raise SystemExit(f"FAILED: a run without a kill ended with {job.returncode}\n{said}")


def kill_a_rank(
    draw: random.Random, job: subprocess.Popen, ranks: int, longest: float, reached: int
) -> tuple[int, float]:
    """Kill one rank of a job. Returns the step of the newest checkpoint and the seconds until the job ended."""
    rank, after = draw.randrange(ranks), draw.uniform(0.2, longest)
    began, file = time.monotonic(), Path(f"pid-{rank}")
    while job.poll() is None and (time.monotonic() - began < after or not file.exists()):
        time.sleep(0.005)
    if job.poll() is not None:
        raise SystemExit("a run reached its last step before a rank could be killed; use more --steps")
    pids = [int(path.read_text()) for path in Path().glob("pid-[0-9]*") if path.suffix == ""]
    os.kill(int(file.read_text()), signal.SIGKILL)
    killed = time.monotonic()
    finish(job, LIMIT)
    seconds, left = time.monotonic() - killed, still_running(pids)
    newest, damaged = checkpoint.newest(Path("killed"))
    step = checkpoint.step_of(newest) if newest else 0
    print(f"rank {rank} killed after {after:4.1f} s, the job ended {seconds:.1f} s later, step {step}", flush=True)
    if not job.returncode or left or damaged or step < reached:
        raise SystemExit(f"FAILED: status {job.returncode}, processes left {left}, damaged {damaged}, step {step}")
    return step, seconds


def kill_ranks(kills: int, ranks: int, steps: int, longest: float, seed: int, folder: Path) -> None:
    draw = random.Random(seed)
    os.chdir(folder)
    finish_uninterrupted(start_ranks(ranks, "whole", steps))
    slowest, reached = 0.0, 0
    for _ in range(kills):
        for file in Path().glob("pid-*"):
            file.unlink()
        reached, seconds = kill_a_rank(draw, start_ranks(ranks, "killed", steps), ranks, longest, reached)
        slowest = max(slowest, seconds)
    finish_uninterrupted(start_ranks(ranks, "killed", steps))
    whole, killed = (
        [(row["step"], row["loss"]) for row in read_log(Path(out, "log.jsonl"))] for out in ("whole", "killed")
    )
    os.chdir(ROOT)
    for i, (expected, found) in enumerate(itertools.zip_longest(whole, killed), 1):
        if found != expected:
            raise SystemExit(f"FAILED: row {i} of the log: step and loss {found}; without a kill {expected}")
    print(
        f"{kills} jobs killed, each ended within {slowest:.1f} s; the log contains each of the {steps} steps once, "
        f"with the same losses"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="number of kills [default: 200, or 50 with --ranks]")
    parser.add_argument("--runs", type=int, default=60, help="minimum number of runs")
    parser.add_argument("--ranks", type=int, default=1, help="ranks per run")
    parser.add_argument("--steps", type=int, default=2000, help="steps per run with several ranks")
    parser.add_argument("--longest", type=float, default=8.0, help="maximum number of seconds before a rank is killed")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.ranks > 1:
            kill_ranks(given.kills or 50, given.ranks, given.steps, given.longest, given.seed, Path(folder))
        else:
            os.chdir(folder)
            kill_processes(given.kills or 200, given.runs, given.seed, Path(folder))
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
