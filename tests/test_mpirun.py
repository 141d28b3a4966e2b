"""train.py under a real mpirun: the same results for any layout, elastic resume, no surviving ranks after failures."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from data.prepare import prepare
from gpt2.training.run import read_log
from tinygrad2 import checkpoint

ROOT = Path(__file__).parents[1]
TEXT = "".join(f"{i} times {j} is {i * j}; the rest of line {i + j} is here.\n" for i in range(60) for j in range(12))
MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
ENV = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI_", "PMIX_", "SLURM_"))},
    "PYTHONPATH": str(ROOT),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
QUICK = ["--data", "text", "--block-size", "16", "--eval-iters", "2", "--eval-interval", "0", "--log-interval", "1"]
PROGRAM = """
import os, signal, sys, time
import numpy as np
import train
from gpt2.training import trainer
from gpt2.training.dataset import SampleOrder
from tinygrad2 import checkpoint, distributed, optim, params
params.BUCKET_SIZE, distributed.RECEIVE_BUFFER = 50_000, 30_000  # many buckets, and sums in many parts
comm = distributed.world()
{}
sys.exit(train.main(sys.argv[1:]))
"""

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(MPIRUN is None, reason='needs mpirun and mpi4py: pip install -e ".[mpi]"'),
]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpi")
    (folder / "text.txt").write_text(TEXT)
    prepare([str(folder / "text.txt")], "bytes", folder / "data" / "text")
    return folder / "data"


@pytest.fixture
def user(prepared, tmp_path, monkeypatch):
    """A current directory that contains data/text."""
    shutil.copytree(prepared, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Job:
    """`mpirun -n RANKS python train.py OPTIONS`. Each rank first runs `patch`. It is killed after `limit` seconds."""

    def __init__(self, ranks, *options, patch="", limit=90, env=None, launcher=None):
        program = ["-c", PROGRAM.format(patch)] if patch is not None else [str(ROOT / "train.py")]
        launcher = [MPIRUN, "--oversubscribe", "-n", str(ranks)] if launcher is None else launcher
        # Files instead of pipes: the daemon of a disconnected host may keep a pipe open after the job has ended.
        self.files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]  # noqa: SIM115
        self.process = subprocess.Popen(
            [*launcher, sys.executable, *program, *QUICK, *options],
            stdin=subprocess.DEVNULL,
            stdout=self.files[0],
            stderr=self.files[1],
            env={**ENV, **(env or {})},
            start_new_session=True,
        )
        self.ends_at = time.monotonic() + limit

    def end(self, status=0):
        """Wait for the job. `status` is the expected exit status, or None for any but 0. Returns (stdout, stderr)."""
        try:
            got = self.process.wait(self.ends_at - time.monotonic())
        except subprocess.TimeoutExpired:
            pytest.fail("the job hung\n" + "\n".join(self.kill()))
        assert got == status or (status is None and got), "\n".join(self.outputs())
        return self.outputs()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return self.outputs()

    def outputs(self):
        for file in self.files:
            file.seek(0)
        return [file.read() for file in self.files]


def run(ranks, *options, status=0, **more):
    return Job(ranks, *options, **more).end(status)


def losses(out):
    return [row["loss"] for row in read_log(Path(out) / "log.jsonl")]


def validation(out):
    return [row["val_loss"] for row in read_log(Path(out) / "log.jsonl") if "val_loss" in row]


def arrays(out, file="model.safetensors"):
    folder, damaged = checkpoint.newest(Path(out))
    assert not damaged
    return checkpoint.load_arrays(folder / file)


def distance(a, b):
    """The largest distance between two arrays with the same name, relative to the norm of the second."""
    assert a.keys() == b.keys()
    return max(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(b[name]) for name in a)


def wait_for(condition, limit=60):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.02)


# Same results ---------------------------------------------------------------------------------------------------------

SAME = ["--batch-size", "2", "--total-batch-size", "128", "--dropout", "0.1", "--max-iters", "10"]
SAME += ["--warmup-iters", "2"]
FIRST_GRADIENTS = """
step = optim.AdamW.step
def recorded(self, **given):
    norm = step(self, **given)
    if self.steps == 1 and comm.rank == 0:
        np.savez("gradients-" + sys.argv[-1], **{n: p.grad for n, p in self.arena.parameters.items()})
    return norm
optim.AdamW.step = recorded
"""


@pytest.mark.parametrize(("optimizer", "dtype"), [("adamw", "float32"), ("adamw", "float64"), ("muon", "float64")])
def test_one_two_and_four_ranks_compute_the_same_results(user, optimizer, dtype):
    """Ranks x micro-steps: 1 x 4, 2 x 2 and 4 x 1, with dropout; also with sharded optimizer state."""
    recompute = ["--recompute", "block"]
    layouts = [("1", 1, []), ("2", 2, []), ("4", 4, []), ("r2", 2, recompute)]
    layouts += [("z2", 2, ["--zero"]), ("z4", 4, ["--zero"])]
    for name, ranks, more in layouts:
        options = [*SAME, "--optimizer", optimizer, "--dtype", dtype, *more]
        run(ranks, *options, "--out-dir", name, patch=FIRST_GRADIENTS)
    for name in ("2", "4", "z2", "z4", "r2"):
        np.testing.assert_allclose(losses(name), losses("1"), rtol=1e-5)
        np.testing.assert_allclose(validation(name), validation("1"), rtol=1e-5)
        if dtype == "float64":
            assert distance(arrays(name), arrays("1")) < 1e-9
            assert distance(arrays(name, "optimizer.safetensors"), arrays("1", "optimizer.safetensors")) < 1e-9
    for name in ("2", "4", "r2"):
        assert distance(np.load(f"gradients-{name}.npz"), np.load("gradients-1.npz")) < 1e-6


def test_ranks_compute_the_same_results_in_bfloat16(user):
    """All processors use the portable path. The losses differ from those of one rank by bfloat16 rounding errors."""
    patch = FIRST_GRADIENTS + "from tinygrad2.kernels import onednn\nonednn.library = lambda: None\n"
    patch += "onednn.unavailable_reason = lambda: None\n"
    for name, ranks, more in (("1", 1, []), ("2", 2, []), ("z2", 2, ["--zero"]), ("r2", 2, ["--recompute", "block"])):
        options = [*SAME, "--optimizer", "adamw", "--dtype", "bfloat16", *more]
        run(ranks, *options, "--out-dir", name, patch=patch)
        np.testing.assert_allclose(losses(name), losses("1"), rtol=2e-3)
    np.testing.assert_array_equal(losses("r2"), losses("2"))
    assert distance(arrays("r2"), arrays("2")) == 0
    assert distance(np.load("gradients-2.npz"), np.load("gradients-1.npz")) < 2e-2


@pytest.mark.parametrize("more", [[], ["--zero"]])
def test_two_runs_with_the_same_layout_are_bit_identical(user, more):
    for out in ("a", "b"):
        run(4, *SAME, *more, "--out-dir", out)
    assert losses("a") == losses("b")
    for file in ("model.safetensors", "optimizer.safetensors"):
        first, second = arrays("a", file), arrays("b", file)
        assert all(np.array_equal(first[name], second[name]) for name in first)


# Elastic resume -------------------------------------------------------------------------------------------------------

SEEN = """
indices = SampleOrder.indices
def seen(self, first, count):
    with open(f"seen-{sys.argv[-1]}-{comm.rank}", "a") as file:
        print(first, count, file=file)
    return indices(self, first, count)
SampleOrder.indices = seen
"""


def test_a_run_on_four_ranks_resumes_on_one_two_or_three(user):
    schedule = ["--lr-decay-iters", "26", "--warmup-iters", "2"]  # by default, they depend on --max-iters
    common = ["--batch-size", "1", "--total-batch-size", "192", "--dropout", "0.1", *schedule]
    run(4, *common, "--max-iters", "26", "--out-dir", "complete", "--zero")
    run(4, *common, "--max-iters", "6", "--out-dir", "stopped", patch=SEEN)
    expected = losses("complete")
    assert len(expected) == 26
    for ranks in (1, 2, 3):
        out = f"on-{ranks}"
        shutil.copytree("stopped", out)
        for file in Path().glob("seen-stopped-*"):
            shutil.copy(file, file.name.replace("stopped", out))
        run(ranks, "--max-iters", "26", "--out-dir", out, patch=SEEN)
        np.testing.assert_allclose(losses(out), expected, rtol=1e-5)
        pairs = [map(int, line.split()) for file in Path().glob(f"seen-{out}-*") for line in file.open()]
        assert sorted(i for first, count in pairs for i in range(first, first + count)) == list(range(26 * 12))


def test_a_new_run_has_the_same_tokens_per_step_on_any_number_of_ranks(user):
    common = ["--max-iters", "3", "--dtype", "float64", "--dropout", "0"]
    for ranks in (1, 2, 4):
        out, _ = run(ranks, *common, "--out-dir", f"n{ranks}")
        assert "batch      256 tokens per step" in out
        assert [row["tokens"] for row in read_log(Path(f"n{ranks}/log.jsonl"))] == [256, 512, 768]
        np.testing.assert_allclose(losses(f"n{ranks}"), losses("n1"), rtol=1e-9)
    out, _ = run(3, *common, "--out-dir", "n3")
    assert "batch      16 sequences per step cannot be divided among 3 ranks; using 18" in out
    run(2, "--max-iters", "5", "--out-dir", "n4")  # on fewer ranks
    assert [row["tokens"] for row in read_log(Path("n4/log.jsonl"))][-1] == 5 * 256


def test_a_batch_that_cannot_be_divided_among_the_ranks_is_rejected(user):
    run(2, "--batch-size", "2", "--total-batch-size", "64", "--max-iters", "2")
    _, err = run(3, "--max-iters", "4", status=1)
    assert (
        "train.py: error: --total-batch-size 64 is not a multiple of 3 ranks x --batch-size 2 x --block-size 16 = 96 "
        "tokens; the nearest multiple is 96. Its 4 sequences can be divided among 1, 2, 4 ranks\n"
    ) in err
    assert err.count("train.py:") == 1
    _, err = run(4, "--max-iters", "4", status=1)
    assert "the nearest multiple is 128, or --batch-size 1\n" in err
    run(4, "--max-iters", "4", "--batch-size", "1")
    assert len(losses("out")) == 4


def test_zero_can_be_turned_on_and_off_at_any_checkpoint(user):
    common = ["--batch-size", "1", "--total-batch-size", "64", "--lr-decay-iters", "8", "--dtype", "float64"]
    run(1, *common, "--max-iters", "8", "--out-dir", "expected")
    run(2, *common, "--max-iters", "2", "--out-dir", "a")
    for ranks, steps in ((4, "5"), (1, "6"), (2, "8")):
        run(ranks, "--max-iters", steps, "--out-dir", "a", "--zero")
    assert distance(arrays("a"), arrays("expected")) < 1e-9
    assert distance(arrays("a", "optimizer.safetensors"), arrays("expected", "optimizer.safetensors")) < 1e-9


# Failing ranks --------------------------------------------------------------------------------------------------------

LONG = ["--batch-size", "1", "--max-iters", "100000", "--save-interval", "2"]
PIDS = "open(f'pid-{comm.rank}', 'w').write(str(os.getpid()))\n"


def steps_made(out="out"):
    return len(read_log(Path(out) / "log.jsonl"))


def pid_of(rank):
    return int(Path(f"pid-{rank}").read_text())


def assert_resumes(out="out"):
    """Check that the last checkpoint is complete and that a run resumed from it continues."""
    folder, damaged = checkpoint.newest(Path(out))
    assert folder is not None
    assert not damaged
    step = checkpoint.step_of(folder)
    run(2, "--max-iters", str(step + 2), "--total-batch-size", "64", "--batch-size", "1")
    assert [row["step"] for row in read_log(Path(out) / "log.jsonl")] == list(range(1, step + 3))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("RuntimeError('power cut')", "rank {rank} of 4:\nTraceback"),
        ("ValueError('data: a bad shard')", "train.py: error: data: a bad shard\n"),
    ],
)
def test_an_error_on_one_rank_ends_all_ranks_and_is_printed(user, rank, error, expected):
    code = f"""
indices = SampleOrder.indices
def failing(self, first, count):
    if comm.rank == {rank} and first >= 5 * 4:
        raise {error}
    return indices(self, first, count)
SampleOrder.indices = failing
"""
    began = time.monotonic()
    _, err = run(4, *LONG, patch=code, status=1, limit=60)
    assert expected.format(rank=rank) in err
    assert err.count(error.split("'")[1]) <= 2  # in the error, and in the source line of a traceback
    assert time.monotonic() - began < 30
    assert_resumes()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_ends_all_ranks(user, rank, how):
    job = Job(4, *LONG, patch=PIDS)
    wait_for(lambda: steps_made() >= 5)
    os.kill(pid_of(rank), how)
    began = time.monotonic()
    _, err = job.end(status=None)
    assert time.monotonic() - began < 30
    if how == signal.SIGSTOP:
        assert f"rank {rank} has not responded for" in err
    else:
        assert "signal 9" in err
    assert_resumes()


def test_a_rank_that_computes_forever_is_reported_and_ends_all_ranks(user):
    """Its heartbeat continues. Rank 0 waits for it in the same step, and both ranks report that."""
    code = """
indices = SampleOrder.indices
def forever(self, first, count):
    while comm.rank == 1 and first >= 5 * 4:
        pass
    return indices(self, first, count)
SampleOrder.indices = forever
"""
    _, err = run(2, *LONG, "--hang-timeout", "20", patch=code, status=1)
    for rank in (0, 1):
        assert f"rank {rank}: this step has taken" in err
    assert "in forever" in err
    assert "in _await" in err
    assert "--hang-timeout is 20; ending the job. The last checkpoint is out/ckpt-" in err
    assert_resumes()


def test_slow_saves_and_steps_are_not_failures(user):
    """Rank 0 saves for six seconds and rank 1 computes for six, which is longer than the timeout in this test."""
    code = """
distributed.HEARTBEAT, distributed.TIMEOUT = 0.2, 3.0
save, indices = checkpoint.write_json, SampleOrder.indices
def slow_save(*args):
    time.sleep(3)
    save(*args)
def slow_step(self, first, count):
    end = time.monotonic() + 6 * (comm.rank == 1 and first == 3)
    while time.monotonic() < end:
        pass
    return indices(self, first, count)
checkpoint.write_json, SampleOrder.indices = slow_save, slow_step
"""
    run(2, "--batch-size", "1", "--max-iters", "3", "--save-interval", "2", patch=code)
    assert_resumes()


def test_a_suspended_job_continues(user):
    """After a laptop or a batch system has suspended the job, no rank considers another one dead."""
    job = Job(2, *LONG, patch=PIDS + "distributed.HEARTBEAT, distributed.TIMEOUT = 0.2, 3.0")
    wait_for(lambda: steps_made() >= 3)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (0, 1):
            os.kill(pid_of(rank), number)
        time.sleep(5)
    job.process.send_signal(signal.SIGUSR1)
    out, err = job.end()
    assert "stopped after step" in out
    assert "answered" not in err


@pytest.mark.parametrize("to", ["mpirun", "rank"])
def test_a_signal_makes_all_ranks_finish_the_step_and_save(user, to):
    job = Job(4, *LONG, patch=PIDS)
    wait_for(lambda: steps_made() >= 5)
    if to == "mpirun":
        job.process.send_signal(signal.SIGUSR1)
    else:
        os.kill(pid_of(2), signal.SIGTERM)
    out, _ = job.end()
    step = steps_made()
    assert out.count("stopped after step") == 1
    assert checkpoint.newest(Path("out"))[0].name == checkpoint.name(step)
    assert_resumes()


def test_terminating_mpirun_leaves_the_last_checkpoint_intact(user):
    job = Job(2, *LONG, "--total-batch-size", "64", patch=PIDS)
    wait_for(lambda: steps_made() >= 5)
    job.process.terminate()
    job.end(status=None)
    assert_resumes()


@pytest.mark.parametrize("more", [[], ["--zero"]], ids=["replicated", "sharded"])
def test_all_ranks_skip_the_step_if_one_has_a_nan(user, more):
    code = """
from gpt2 import GPT2
from gpt2.language_model import LanguageModel
loss = GPT2.loss
def broken(self, *args):
    result = loss(self, *args)
    training = len(args) > 2 and args[2]  # evaluation passes no key
    return result * float("nan") if training and comm.rank == 1 and args[2].step == 2 else result
GPT2.loss, GPT2.backward = broken, LanguageModel.backward
"""
    options = ["--batch-size", "1", "--max-iters", "6", *more]
    output, _ = run(4, *options, patch=code)
    assert output.count("step 3/6 | skipped: the loss is nan and the gradient norm nan; the weights are unchanged") == 1
    assert output.count("the first value that is not finite: ") == 1  # by rank 1
    assert output.count("python -m gpt2.replay out/bad-step-3") == 1
    assert [loss is None for loss in losses("out")] == [False, False, True, False, False, False]
    keys = checkpoint.load_arrays(Path("out/bad-step-3/batch.safetensors"))["keys"]
    assert keys.tolist() == [[2, 0], [2, 1], [2, 2], [2, 3]]  # the keys of all ranks
    _, err = run(4, *options, "--out-dir", "ended", "--max-bad-steps", "1", patch=code, status=1)
    assert err.count("step 3: the loss is nan and the gradient norm nan; the step was skipped") == 1
    assert len(losses("ended")) == 3


def test_ranks_that_diverge_are_detected(user):
    code = """
trainer.COMPARE_INTERVAL = 4
step = optim.AdamW.step
def drifting(self, **given):
    norm = step(self, **given)
    if comm.rank == 1 and self.steps == 3:
        self.arena.parameters["h.2.mlp.c_fc.weight"].data[0, 0] += 1e-7
        self.arena.parameters["h.3.ln_1.bias"].data[0] += 1e-7
    return norm
optim.AdamW.step = drifting
"""
    _, err = run(2, "--batch-size", "1", "--max-iters", "9", patch=code, status=1)
    assert err.count("the ranks have diverged: h.2.mlp.c_fc.weight on rank 1 differs from rank 0") == 1
    assert len(losses("out")) == 3


# Starting -------------------------------------------------------------------------------------------------------------


def test_only_one_rank_prints_and_writes(user):
    out, _ = run(4, "--batch-size", "1", "--max-iters", "2", patch=None)
    assert [line.split()[0] for line in out.splitlines()].count("model") == 1
    assert "64 tokens per step = 1 sequence x 16 tokens x 1 micro-step x 4 ranks" in out
    assert " | comm " in out
    rows = read_log(Path("out/log.jsonl"))
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 < row["comm_seconds"] <= row["seconds"] for row in rows)


def test_only_one_rank_prints_that_kernels_are_compiled(user):
    patch = """
from tinygrad2.backend import get_backend
get_backend().kernels.gelu_forward(np.ones((2, 3, 4)), np.zeros(4))
sys.exit()
"""
    _, error = run(2, patch=patch, env={"NUMBA_CACHE_DIR": str(user / "kernels")})
    assert error.count("compiling kernels") == 1


def test_help_and_errors_are_printed_once(user):
    out, _ = run(3, "--help")
    assert out.count("usage: python train.py") == 1
    _, err = run(3, "--batch-sise", "2", status=2)
    assert err.count("train.py: error: unknown option --batch-sise; did you mean --batch-size?") == 1
    _, err = run(3, "--data", "nowhere", status=1)
    assert err.count("no such data set") == 1


def test_each_rank_uses_its_share_of_the_cores(user):
    code = """
from threadpoolctl import threadpool_info
from tinygrad2 import threads
def count():
    with open(f"threads-{comm.rank}", "w") as file:
        print(threads.count(), *{i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}, file=file)
import atexit
atexit.register(count)
"""
    cores = len(os.sched_getaffinity(0))
    for binding, expected in (("none", max(1, cores // 2)), ("core", 1)):
        if binding == "core" and cores < 2:
            continue
        launcher = [MPIRUN, "--bind-to", binding, "--oversubscribe", "-n", "2"]
        out, _ = run(2, "--batch-size", "1", "--max-iters", "1", "--fresh", launcher=launcher, patch=code)
        assert [Path(f"threads-{rank}").read_text().split() for rank in range(2)] == 2 * [[str(expected)] * 2]
        assert ("of this machine idle" in out) == (binding == "core" and cores > 2)


def test_a_launcher_of_another_mpi_library_is_rejected(user):
    """If MPICH's mpiexec starts processes whose mpi4py uses Open MPI, each process is a separate job of one rank."""
    _, err = run(2, "--max-iters", "1", launcher=[], env={"PMI_SIZE": "2", "PMI_RANK": "0"}, patch=None, status=1)
    assert "train.py: error: 2 ranks were started, but mpi4py's MPI (Open MPI" in err
    assert not Path("out").exists()


def test_gpu_gradients_are_staged_in_host_memory(user):
    """Runs on the stand-in for CuPy, which detects memory that is read or changed before its copy has finished."""
    code = "from tests.stand_ins import strict_cupy\ncontext = strict_cupy.registered()\ncontext.__enter__()\n"
    quick = ["--batch-size", "1", "--max-iters", "3", "--dropout", "0.1", "--block-size", "8"]
    for more in ([], ["--zero"]):
        run(2, *quick, *more, "--out-dir", "host")
        run(2, *quick, *more, "--out-dir", "device", "--device", "cuda", patch=code)
        np.testing.assert_allclose(losses("device"), losses("host"), rtol=1e-5)
        shutil.rmtree("host"), shutil.rmtree("device")


def test_nccl_reduces_gradients_from_gpu_to_gpu(user):
    """Runs on the stand-ins for CuPy and NCCL, which detect memory that is read, changed or freed during a sum."""
    code = """
from mpi4py import MPI
from tests.stand_ins import nccl as fake_nccl, strict_cupy
contexts = [strict_cupy.registered()]
if {direct}:
    ranks = fake_nccl.Ranks(MPI.COMM_WORLD.Dup())
    contexts.append(fake_nccl.installed(ranks, address=f"0000:{{comm.rank:02x}}:00.0"))
for context in contexts:
    context.__enter__()
"""
    quick = ["--batch-size", "1", "--max-iters", "3", "--dropout", "0.1", "--block-size", "8", "--device", "cuda"]
    for more in ([], ["--zero"]):
        for folder, path in (("host", "through host memory"), ("direct", "GPU to GPU (NCCL)")):
            out, _ = run(2, *quick, *more, "--out-dir", folder, patch=code.format(direct=folder == "direct"))
            assert f"all-reduce {path}\n" in out
        np.testing.assert_allclose(losses("direct"), losses("host"), rtol=1e-6)
        assert distance(arrays("direct"), arrays("host")) < 1e-5
        shutil.rmtree("direct"), shutil.rmtree("host")


# Several hosts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_hosts(tmp_path):
    """mpirun for two ranks on each of two hosts, a function that disconnects them, and a function that counts bytes.

    Each host is a network namespace and a UTS namespace on this machine. A virtual Ethernet cable connects them.
    """
    names, wires = [f"tg{os.getpid()}{end}" for end in "ab"], [f"tg{os.getpid()}{end}" for end in "xy"]
    if not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("two hosts on one machine need the programs ip and unshare")
    if subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("this process may not create network namespaces (root is required)")
    try:
        subprocess.run(["ip", "netns", "add", names[1]], check=True)
        cable = ["ip", "link", "add", wires[0], "netns", names[0], "type", "veth"]
        subprocess.run([*cable, "peer", "name", wires[1], "netns", names[1]], check=True)
        for i, (name, wire) in enumerate(zip(names, wires, strict=True)):
            subprocess.run(["ip", "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", wire], check=True)
            for device in ("lo", wire):
                subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True)
        agent = tmp_path / "agent"  # used by mpirun in place of ssh
        agent.write_text(
            f'#!/bin/sh\nshift\nexec ip netns exec {names[1]} unshare --uts sh -c "hostname {names[1]}; $*"\n'
        )
        agent.chmod(0o755)
        inside = [
            "ip",
            "netns",
            "exec",
            names[0],
            "unshare",
            "--uts",
            "sh",
            "-c",
            f'hostname {names[0]}; exec "$@"',
            "sh",
        ]
        stall = ["ip", "-n", names[0], "neigh", "replace", "10.77.0.2", "lladdr", "02:00:00:00:00:99"]
        hosts = ["--host", "10.77.0.1:2,10.77.0.2:2", "-n", "4", "--bind-to", "none"]
        yield (
            [*inside, MPIRUN, "--prtemca", "plm_ssh_agent", str(agent), *hosts],
            {
                "cut": lambda: subprocess.run(["ip", "-n", names[0], "link", "set", wires[0], "down"], check=True),
                # Every packet is lost, because it is sent to an unused hardware address.
                "stalled": lambda: subprocess.run([*stall, "dev", wires[0], "nud", "permanent"], check=True),
            },
            lambda: bytes_sent(names[0], wires[0]),
        )
    finally:
        for name in names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
            for pid in map(int, pids.split()):
                os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)


def bytes_sent(namespace, device):
    table = subprocess.run(
        ["ip", "netns", "exec", namespace, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True
    ).stdout
    return int(next(line for line in table.splitlines() if device in line).split(":")[1].split()[8])


def test_two_hosts_compute_the_same_results_as_one(user, two_hosts):
    launcher, _, sent = two_hosts
    hosts = "print(os.uname().nodename, file=open(f'host-{comm.rank}', 'w'))"
    for more in ([], ["--zero"]):
        run(4, *SAME, *more, "--out-dir", f"two{len(more)}", launcher=launcher, patch=hosts)
    assert len({Path(f"host-{rank}").read_text() for rank in range(4)}) == 2
    run(4, *SAME, "--out-dir", "one")
    np.testing.assert_array_equal(losses("two0"), losses("one"))
    np.testing.assert_allclose(losses("two1"), losses("one"), rtol=1e-5)
    parameters = sum(array.nbytes for array in arrays("one").values())
    assert sent() > 2 * 10 * parameters  # in each step, each host sends half of the gradient parts and of their sums


@pytest.mark.parametrize("how", ["cut", "stalled"])
def test_a_broken_connection_ends_the_ranks_of_both_hosts(user, two_hosts, how):
    """mpirun keeps waiting for a daemon that it can no longer reach, so the test kills it."""
    launcher, failures, _ = two_hosts
    job = Job(4, *LONG, launcher=launcher, patch=PIDS)
    wait_for(lambda: steps_made() >= 5)
    failures[how]()
    began = time.monotonic()
    wait_for(lambda: not any(Path(f"/proc/{pid_of(rank)}").exists() for rank in range(4)), limit=30)
    print(f"{how}: all ranks ended after {time.monotonic() - began:.1f} s")
    _, err = job.kill()
    assert "has not responded for" in err
    assert_resumes()


def test_with_keepalive_mpirun_also_ends_when_a_connection_loses_every_packet(user, two_hosts):
    launcher, failures, _ = two_hosts
    text = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    keepalive = re.findall(r"--prtemca (oob_tcp_keepalive_\w+) (\d+)", text)
    assert len(keepalive) == 3
    env = {f"PRTE_MCA_{name}": value for name, value in keepalive}
    job = Job(4, *LONG, launcher=launcher, patch=PIDS, env=env)
    wait_for(lambda: steps_made() >= 5)
    failures["stalled"]()
    began = time.monotonic()
    job.process.wait(30)
    print(f"mpirun ended after {time.monotonic() - began:.1f} s")
    wait_for(lambda: not any(Path(f"/proc/{pid_of(rank)}").exists() for rank in range(4)), limit=30)
    assert_resumes()


def test_the_recorded_command_includes_mpirun():
    program = "from gpt2.training.display import typed_command; print(typed_command(None, 2))"
    command = [MPIRUN, "-n", "2", "--oversubscribe", sys.executable, "-c", program]
    recorded = subprocess.run(
        command, env=ENV, capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()
    assert recorded == [shlex.join(["mpirun", *command[1:]])] * 2
