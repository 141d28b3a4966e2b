"""tinygrad2/distributed.py and gradient_sum.py with threads as ranks. (test_mpirun.py uses real processes.)"""

import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config
from gpt2.config import is_matrix
from tests.stand_ins import nccl as fake_nccl
from tests.stand_ins import strict_cupy
from tests.stand_ins.thread_comm import ThreadComm, on_ranks
from tests.tinygrad2.copies import with_copies
from tinygrad2 import Key, Tensor, backend, distributed, nn, optim, params, recompute
from tinygrad2.distributed import Comm, MPIComm, NcclComm, SoloComm, fair_threads, share
from tinygrad2.gradient_sum import GradientSum

ROOT = Path(__file__).parents[2]
CONFIG = GPT2Config(vocab_size=61, n_positions=8, n_embd=16, n_layer=2, n_head=2)


@pytest.fixture(autouse=True)
def many_buckets(monkeypatch):
    monkeypatch.setattr(params, "BUCKET_SIZE", 1000)


# Shares and threads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 21, 1000])
def test_shares_cover_every_element_once(n, size):
    parts = [share(n, rank, size) for rank in range(size)]
    assert [i for a, b in parts for i in range(a, b)] == list(range(n))
    assert max(b - a for a, b in parts) - min(b - a for a, b in parts) <= 1


@pytest.mark.parametrize(
    ("masks", "threads"),
    [
        ([{0, 1, 2, 3}] * 2, [2, 2]),  # not bound: the ranks share all cores
        ([{0}, {1}], [1, 1]),  # each rank is bound to one core
        ([{0, 1, 2}, {3, 4, 5}], [3, 3]),  # each rank is bound to three cores
        ([{0, 1}] * 4, [1, 1, 1, 1]),  # more ranks than cores
        ([{0, 1, 2, 3}, {0, 1, 2, 3}, {4, 5, 6, 7}], [2, 2, 4]),  # two ranks on one socket, one on the other
        ([set(range(10))] * 3, [3, 3, 3]),
    ],
)
def test_each_rank_uses_its_share_of_its_cores(masks, threads):
    assert [fair_threads(masks, rank) for rank in range(len(masks))] == threads


# Launchers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched_by(monkeypatch):
    def set_variables(**given):
        for names in distributed.LAUNCHERS:
            for name in names:
                monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "_world", None)

    return set_variables


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_NTASKS": "8"},  # in a batch script, without srun
        {"PMI_SIZE": "", "PMI_RANK": ""},
    ],
)
def test_a_single_process_uses_a_solo_comm(launched_by, variables):
    launched_by(**variables)
    assert isinstance(distributed.world(), SoloComm)
    assert distributed.world() is distributed.world()


def test_a_single_process_does_not_import_mpi4py():
    code = (
        "import sys, train; from tinygrad2 import distributed; distributed.world(); assert 'mpi4py' not in sys.modules"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI_", "SLURM_"))}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)


@pytest.mark.parametrize(("size", "rank"), [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")])
def test_without_mpi4py_the_error_says_what_to_install(launched_by, monkeypatch, size, rank):
    launched_by(**{size: "4", rank: "2"})
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r'^rank 2 of 4: mpi4py does not work .*; pip install -e "\.\[mpi\]"$'):
        distributed.world()


def fake_mpi4py(size):
    world = types.SimpleNamespace(size=size)
    MPI = types.SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "Open MPI v5.0.11, package: a wheel")
    return types.SimpleNamespace(MPI=MPI)


def test_an_mpi_that_does_not_match_mpirun_is_rejected(launched_by, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", fake_mpi4py(1))
    launched_by(PMI_SIZE="2", PMI_RANK="0")
    with pytest.raises(ValueError, match=r"^2 ranks were started, but mpi4py's MPI \(Open MPI v5.0.11\) sees 1: "):
        distributed.world()
    launched_by(PMI_SIZE="2", PMI_RANK="1")
    with pytest.raises(SystemExit, match="1"):  # rank 0 prints the message
        distributed.world()


def test_a_failing_single_process_prints_the_error_and_returns(launched_by, capsys):
    launched_by()
    assert distributed.fail("train.py: what happened", 3) == 3
    assert capsys.readouterr().err == "train.py: what happened\n"


def test_a_solo_comm_implements_comm():
    comm: Comm = SoloComm()
    flat, gathered = np.arange(3.0), np.zeros(3)
    assert comm.from_root(lambda: 7) == 7
    np.testing.assert_array_equal(comm.all_gather(flat), [flat])
    comm.gather_shares(flat, gathered)
    np.testing.assert_array_equal(gathered, flat)
    comm.start_sum(flat, False, lambda: None).result()
    np.testing.assert_array_equal(flat, gathered)


def test_each_process_of_a_machine_uses_its_own_gpu(monkeypatch):
    used = []
    cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(
            getDeviceCount=lambda: 4, getDevice=lambda: used[-1], CUDARuntimeError=RuntimeError
        ),
        Device=lambda number: types.SimpleNamespace(use=lambda: used.append(number)),
    )
    core = types.SimpleNamespace(_routines_linalg=strict_cupy.Linalg)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, ndarray=None, _core=core))
    for number in (0, 3, 5):
        monkeypatch.setattr(backend, "_backends", {})
        monkeypatch.setattr(backend, "_by_type", {})
        backend.choose_gpu(number)
        backend.get_backend("cuda")
    monkeypatch.setattr(backend, "_gpu", 0)
    assert used == [0, 3, 1]


# Gradients summed over ranks ------------------------------------------------------------------------------------------


def text(first, rows):
    tokens = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(12, 9))[first : first + rows]
    return tokens[:, :-1], tokens[:, 1:]


def trained(comm, steps=3, micro_steps=1, make=optim.AdamW, **options):
    """Train for some steps of 12 samples on any number of ranks. Returns the model and the sums of every step."""
    model = GPT2(CONFIG, dtype="float64")
    optimizer = make(model, lr=1e-2, weight_decay=0.1, **options)
    sums = GradientSum(model, comm, share_only=optimizer.shared_by is not None)
    rows = 12 // comm.size // micro_steps
    totals = []
    for step in range(steps):
        loss = 0.0
        for micro in range(micro_steps):
            first = (micro * comm.size + comm.rank) * rows
            part = model.loss(*text(first, rows), Key(0, step, first)) * (1 / comm.size / micro_steps)
            if micro == micro_steps - 1:
                sums.start()
            part.backward()
            loss = loss + part.data
        totals.append(sums.finish(loss, 12 // comm.size, comm.rank == 1))
        norm = optimizer.step(0.5)
        optimizer.zero_grad()
    model.arena().check_equal(comm)
    return model, optimizer, totals, norm


def muon(model, **options):
    matrices = {name: 3 if "c_attn" in name else 1 for name, _ in model.named_parameters() if is_matrix(name)}
    return optim.Muon(model, matrices, **options)


every_optimizer = pytest.mark.parametrize("make", [optim.AdamW, optim.SGD, muon])


@every_optimizer
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("size", "micro_steps"), [(2, 1), (2, 3), (3, 2)])
def test_ranks_compute_the_same_as_one_process(size, micro_steps, shared, make):
    alone, optimizer, totals, norm = trained(SoloComm(), micro_steps=4, make=make)
    moments = {name: array.copy() for name, array in optimizer.state().items()}

    def rank(comm):
        shared_by = comm if shared else None
        model, own, sums, own_norm = trained(comm, micro_steps=micro_steps, make=make, shared_by=shared_by)
        kept = sum(part.state[0].size for part in own.parts)
        return {name: p.data for name, p in model.named_parameters()}, own.state(), sums, own_norm, kept

    results = on_ranks(size, rank)
    for parameters, state, sums, own_norm, _ in results:
        for name, p in alone.named_parameters():
            assert np.linalg.norm(parameters[name] - p.data) < 1e-9 * np.linalg.norm(p.data), name
        for name in state:
            assert np.linalg.norm(state[name] - moments[name]) < 1e-9 * np.linalg.norm(moments[name]), name
        np.testing.assert_allclose([row[0] for row in sums], [row[0] for row in totals], rtol=1e-12)
        assert [row[1:] for row in sums] == [[12, 1]] * 3
        assert own_norm == pytest.approx(norm, rel=1e-12)
    assert results[0][1].keys() == moments.keys()
    if shared:
        assert [state for _, state, *_ in results[1:]] == [{}] * (size - 1)
        kept = [kept for *_, kept in results]
        buckets = len(alone.arena().buckets)
        assert sum(kept) == alone.n_parameters()
        assert max(kept) <= alone.n_parameters() / size + buckets


def test_bfloat16_copies_include_updates_of_other_ranks():
    def rank(comm):
        model = with_copies(GPT2(CONFIG))
        optimizer = optim.AdamW(model, lr=1e-2, shared_by=comm)
        for region in optimizer.arena.regions:
            region.grads[...] = np.random.default_rng(0).standard_normal(region.grads.shape)
        before = [region.copies.copy() for region in optimizer.arena.regions]
        optimizer.step()
        return list(zip(optimizer.arena.regions, before, strict=True))

    for regions in on_ranks(2, rank):
        for region, old in regions:
            np.testing.assert_array_equal(region.copies, region.values.astype("bfloat16"))
            assert (region.copies != old).mean() > 0.5


@every_optimizer
def test_sharded_state_can_be_loaded_on_any_number_of_ranks(make):
    _, optimizer, *_ = trained(SoloComm(), make=make)
    state = optimizer.state()

    def reloaded(comm):
        other = make(GPT2(CONFIG, dtype="float64"), shared_by=comm)
        other.load_state(state, 3)
        return other.state()

    for size in (1, 2, 3):
        first, *others = on_ranks(size, reloaded)
        assert others == [{}] * (size - 1)
        assert first.keys() == state.keys()
        for name, array in state.items():
            np.testing.assert_array_equal(first[name], array)


class Echo(ThreadComm):
    """One of two ranks. The other rank always has the same values."""

    def __init__(self):
        super().__init__(0, 2, None, None)

    def _exchange(self, value):
        return [value, value]

    def start_all_gather(self, flat, after):
        raise AssertionError


def test_buckets_are_transferred_while_the_backward_pass_runs():
    comm, model = Echo(), GPT2(CONFIG)
    sums, started = GradientSum(model, comm), {}
    arena = model.arena()
    loss = model.loss(*text(0, 2))
    sums.start()
    last = arena.parameters["wte.weight"].leaf
    before = last.on_final
    last.on_final = lambda: started.update(sizes=list(comm.log)) or before()
    loss.backward()
    sizes = [bucket.stop - bucket.start for bucket in arena.buckets]
    assert comm.log == sizes
    assert all(size <= 1000 or len(bucket.names) == 1 for size, bucket in zip(sizes, arena.buckets, strict=True))
    assert sum(sizes) == model.n_parameters()
    assert 0 < len(started["sizes"]) < len(sizes)  # the sums of all other buckets had started
    assert len(sizes) - len(started["sizes"]) <= 2
    sums.finish()
    assert all(p.leaf.on_final is None for p in model.parameters())


def test_unused_parameters_are_summed_too():
    class Model(nn.Module):
        def __init__(self):
            self.used, self.unused = nn.Linear(2, 3), nn.Linear(3, 2)

    model, comm = Model(), Echo()
    arena = model.arena()
    sums = GradientSum(model, comm)
    arena.parameters["unused.weight"].grad = np.ones((3, 2))
    sums.start()
    model.used(Tensor(np.ones((1, 2), "float32"))).sum().backward()
    own = {name: p.grad.copy() for name, p in arena.parameters.items()}
    sums.finish()
    for name, p in arena.parameters.items():
        np.testing.assert_array_equal(p.grad, 2 * own[name])
    assert sum(comm.log) == model.n_parameters()


def test_a_gradient_that_changes_after_its_sum_has_started_raises(monkeypatch):
    monkeypatch.setattr(params, "BUCKET_SIZE", 2)

    class Model(nn.Module):
        def __init__(self):
            self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)

        def __call__(self, x):
            return recompute(self.last, self.last(self.first(x))).sum()

    model = Model()
    sums = GradientSum(model, Echo())
    x = Tensor(np.ones((1, 2), "float32"))
    sums.start()
    with pytest.raises(RuntimeError, match=r"^GradientSum: last\.\w+ got a gradient after its sum had started"):
        model(x).backward()
    other = GradientSum(Model(), Echo())
    other.model(x).backward()
    own = [p.grad.copy() for p in other.model.parameters()]
    other.finish()
    for p, grad in zip(other.model.parameters(), own, strict=True):
        np.testing.assert_array_equal(p.grad, 2 * grad)


def test_gpu_gradients_are_summed_through_pinned_memory():
    """The stand-in for CuPy delays copies, and detects data that is read too early, or changed while it is copied."""

    def steps(device):
        model = GPT2(CONFIG, device=device)
        optimizer, sums = optim.AdamW(model, lr=1e-2), GradientSum(model, Echo())
        found = []
        for step in range(3):
            loss = model.loss(*text(2 * step, 2), Key(0, step)) * 0.5
            sums.start()
            loss.backward()
            found.append(sums.finish(loss.data, 16))
            optimizer.step(0.5)
            optimizer.zero_grad()
        syncs = strict_cupy.device.syncs
        return found, {name: p.numpy().copy() for name, p in model.named_parameters()}, syncs

    with strict_cupy.registered():
        found, parameters, syncs = steps("cuda")
        assert syncs == 0
    expected, on_host, _ = steps("cpu")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name, values in parameters.items():
        np.testing.assert_allclose(values, on_host[name], rtol=2e-3, atol=2e-5, err_msg=name)


# Sums from GPU to GPU -------------------------------------------------------------------------------------------------


class DirectEcho(Echo):
    """One of two ranks with their own GPUs. The other rank always has the same values."""

    def __init__(self, sums=NcclComm):
        super().__init__()
        self._sums, self._created = sums, []

    def nccl(self, device):
        if not self._created:
            nccl = device.cuda.nccl()
            self._created.append(self._sums(device, nccl, 0, 2, nccl.get_unique_id()))
        return self._created[0]

    def start_sum(self, flat, share_only, after):
        raise AssertionError


class StagedEcho(Echo):
    """Like Echo, but also supports start_all_gather. Data pass through host memory."""

    def start_all_gather(self, flat, after):
        after()
        return self._done()


def steps_on_the_stand_in(comm, shared, make=optim.AdamW):
    """Return the losses and norms of three steps, the parameters, the number of implicit synchronizations, and NCCL."""
    with strict_cupy.registered() as device, fake_nccl.installed(fake_nccl.Echo()) as nccl:
        model = GPT2(CONFIG, device="cuda")
        options = {"ranks": comm} if make is muon else {}
        optimizer = make(model, lr=1e-2, shared_by=comm if shared else None, **options)
        sums = GradientSum(model, comm, share_only=shared)
        fetched = []
        for step in range(3):
            loss = model.loss(*text(2 * step, 2), Key(0, step)) * 0.5
            sums.start()
            loss.backward()
            total, tokens, stop = sums.finish(loss.data, 16, step == 1)
            assert (tokens, stop) == (32, 2 * (step == 1))
            fetched.append(model.backend.fetch(total, optimizer.step(0.5)))
            optimizer.zero_grad()
        numbers = np.array([fetch.get() for fetch in fetched])
        syncs = device.syncs
        return numbers, {name: p.numpy().copy() for name, p in model.named_parameters()}, syncs, nccl


@every_optimizer
@pytest.mark.parametrize("shared", [False, True])
def test_nccl_sums_equal_sums_through_host_memory(shared, make):
    expected, on_host, *_ = steps_on_the_stand_in(StagedEcho(), shared, make)
    found, parameters, syncs, nccl = steps_on_the_stand_in(DirectEcho(), shared, make)
    assert syncs == 0
    np.testing.assert_array_equal(found, expected)
    for name, values in parameters.items():
        np.testing.assert_array_equal(values, on_host[name], err_msg=name)
    calls = {"allReduce", "reduce", "bcast"} if shared else {"allReduce", "bcast"} if make is muon else {"allReduce"}
    assert set(nccl.calls) == calls
    assert nccl.group is None


def test_with_nccl_buckets_are_transferred_while_the_backward_pass_runs():
    with strict_cupy.registered(), fake_nccl.installed(fake_nccl.Echo()) as nccl:
        model, comm = GPT2(CONFIG, device="cuda"), DirectEcho()
        sums, started = GradientSum(model, comm), {}
        arena = model.arena()
        loss = model.loss(*text(0, 2))
        sums.start()
        last = arena.parameters["wte.weight"].leaf
        before = last.on_final
        last.on_final = lambda: started.update(count=len(nccl.calls)) or before()
        loss.backward()
        assert 0 < started["count"] < len(nccl.calls) == len(arena.buckets)
        assert np.isnan(arena.buckets[0].region.grads.get()).all()  # the sums are not complete yet
        sums.finish()
        assert not any(np.isnan(region.grads.get()).any() for region in arena.regions)


class Other:
    """An exchange among three ranks. The other ranks have different values."""

    def total(self, values):
        return values * 3 + 1

    def from_root(self, values, root):
        return values - root


def check_sums(sums_of):
    """Check every method of a NcclComm, with arrays that were just computed, and one that is freed immediately."""
    with strict_cupy.registered(), fake_nccl.installed(Other()) as nccl:
        on = backend.get_backend("cuda")
        sums = sums_of(on, nccl, 1, 3, nccl.get_unique_id())
        for dtype in ("float32", "float64"):
            full, shared, gathered = (on.asarray(np.arange(10), dtype) * 2 for _ in range(3))
            sums.start_sum(full)
            later = gathered + 0  # computed during the sums
            sums.start_sum(shared, share_only=True)
            sums.start_sum(on.zeros((5,), dtype))
            sums.start_all_gather(gathered)
            sums.join()
            result = on.np.stack([full, shared, gathered, later])
            even = 2 * np.arange(10)
            own = np.where((np.arange(10) >= 3) & (np.arange(10) < 6), 3 * even + 1, even)
            others = even - np.repeat([0, 0, 2], [3, 3, 4])
            np.testing.assert_array_equal(result.get(), [3 * even + 1, own, others, even])
        assert nccl.group is None


def test_nccl_comm_computes_correct_sums():
    check_sums(NcclComm)


FAULTS = [  # in NcclComm: a pattern and its replacement
    (r"self\._stream\.wait_event\(.*\)", "pass"),
    (r"self\._stream\.wait_event\(.*\)", "self._stream.wait_event(self._event(self._stream))"),
    (r"self\._cuda\.get_current_stream\(\)\.wait_event\(.*\)", "pass"),
    (r"wait_event\(self\._event\(self\._stream\)\)", "wait_event(self._event())"),
    (r"self\._in_flight\.append\(flat\)", "pass"),
    (r"self\._nccl\.groupStart\(\)", "pass"),
    (r"self\._nccl\.groupEnd\(\)", "pass"),
    (r"pointer \+ start", "pointer"),
    (r"flat\.size, code", "flat.nbytes, code"),
    (r"start \* flat\.itemsize", "start"),
    (r"NCCL_FLOAT64", "NCCL_FLOAT32"),
    (r"bcast\((.*), root,", r"bcast(\1, 0,"),
    (r"add, root,", "add, 0,"),
    (r"add, root,", "add, root + 1,"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=range(len(FAULTS)))
def test_a_fault_in_nccl_comm_is_detected(fault):
    source, count = re.subn(*fault, inspect.getsource(NcclComm))
    assert count
    names = dict(vars(distributed))
    exec("from __future__ import annotations\n" + source, names)
    with pytest.raises((strict_cupy.RaceError, fake_nccl.NcclError, AssertionError)):
        check_sums(names["NcclComm"])


@pytest.mark.parametrize("method", ["_begin", "join"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_missing_wait_in_a_training_run_is_detected(monkeypatch, method, shared):
    wait = strict_cupy.Stream.wait_event

    def sometimes(self, event):
        if inspect.currentframe().f_back.f_code.co_name != method:
            wait(self, event)

    monkeypatch.setattr(strict_cupy.Stream, "wait_event", sometimes)
    if method == "_begin":
        with pytest.raises(strict_cupy.RaceError, match="has not waited"):
            steps_on_the_stand_in(DirectEcho(), shared)
    else:
        found, *_ = steps_on_the_stand_in(DirectEcho(), shared)
        assert np.isnan(found).all()


def test_writing_to_memory_during_a_sum_is_detected():
    with strict_cupy.registered(), fake_nccl.installed(fake_nccl.Echo()) as nccl:
        on = backend.get_backend("cuda")
        sums = NcclComm(on, nccl, 0, 2, nccl.get_unique_id())
        values = on.zeros((4,), "float32")
        sums.start_sum(values)
        values += np.float32(1)
        values[...] = 0
        with pytest.raises(strict_cupy.RaceError, match="written to"):
            sums.join()


def test_nccl_comm_with_a_single_rank():
    with strict_cupy.registered(), fake_nccl.installed(fake_nccl.Echo(1)) as nccl:
        on = backend.get_backend("cuda")
        sums = NcclComm(on, nccl, 0, 1, nccl.get_unique_id())
        arrays = [on.asarray(np.arange(7), "float32") for _ in range(3)]
        sums.start_sum(arrays[0])
        sums.start_sum(arrays[1], share_only=True)
        sums.start_all_gather(arrays[2])
        sums.join()
        for values in arrays:
            np.testing.assert_array_equal(values.get(), np.arange(7))


def test_nccl_uses_a_fixed_order_unless_the_user_chooses_an_algorithm(monkeypatch):
    for chosen, expected in ((None, "Ring"), ("Tree", "Tree")):
        monkeypatch.setenv("NCCL_ALGO", chosen or "")
        if chosen is None:
            monkeypatch.delenv("NCCL_ALGO")
        check_sums(NcclComm)
        assert os.environ["NCCL_ALGO"] == expected


def mpi_rank(others):
    """Rank 0 of an MPIComm, and a list of the GPU addresses that it sends to the other ranks."""
    comm, sent = MPIComm.__new__(MPIComm), []
    comm.rank, comm.size, comm._nccl_comms = 0, 1 + len(others), {}
    comm._calls = types.SimpleNamespace(
        allgather=lambda address: sent.append(address) or [address, *(other(address) for other in others)],
        bcast=lambda identity: identity,
    )
    return comm, sent


@pytest.mark.parametrize(
    ("others", "direct"),
    [
        ([lambda address: "elsewhere 0000:00:00.0"], True),
        ([lambda address: address and address.replace("0000:00", "0000:01"), lambda address: "elsewhere"], True),
        ([lambda address: address], False),  # two ranks share a GPU
        ([lambda address: "elsewhere", lambda address: "elsewhere"], False),
        ([lambda address: None], False),  # one rank has no NCCL
    ],
)
def test_nccl_is_used_if_every_rank_has_nccl_and_its_own_gpu(others, direct):
    with strict_cupy.registered():
        on = backend.get_backend("cuda")
        with fake_nccl.installed(fake_nccl.Echo()):
            comm, sent = mpi_rank(others)
            assert isinstance(comm.nccl(on), NcclComm) == direct
            assert comm.nccl(on) is comm.nccl(on)
            assert len(sent) == 1
            assert sent[0].endswith(" 0000:00:00.0")
            assert comm.nccl(backend.get_backend("cpu")) is None
        comm, sent = mpi_rank(others)
        assert comm.nccl(on) is None  # this rank has no NCCL
        assert sent == [None]


@pytest.mark.extras("cupy")
def test_the_stand_in_for_nccl_has_the_same_names():
    nccl = pytest.importorskip("cupy.cuda.nccl")
    if not nccl.available:
        pytest.skip("NCCL is not installed")
    fake = fake_nccl.NCCL(fake_nccl.Echo())
    for name in ("NCCL_SUM", "NCCL_FLOAT32", "NCCL_FLOAT64"):
        assert getattr(nccl, name) == getattr(fake, name)
    for name in ("groupStart", "groupEnd", "get_unique_id", "NcclError"):
        assert callable(getattr(nccl, name))
    identity = nccl.get_unique_id()
    assert (type(identity), len(identity)) == (bytes, 128) == (type(fake.get_unique_id()), len(fake.get_unique_id()))
    for name in ("allReduce", "reduce", "bcast"):
        signature = re.search(r"\((.*)\)", getattr(nccl.NcclCommunicator, name).__doc__.splitlines()[0])[1]
        theirs = [part.split(" ")[-1] for part in signature.split(", ")]
        assert list(inspect.signature(getattr(fake_nccl.NcclCommunicator, name)).parameters) == theirs


# Diverging ranks ------------------------------------------------------------------------------------------------------


def test_the_first_parameter_that_differs_is_named():
    def drifted(comm):
        model = GPT2(CONFIG)
        arena = model.arena()
        arena.check_equal(comm)
        if comm.rank == 2:
            model.h[1].attn.c_attn.bias.data[5] = 1e-30
            model.h[1].mlp.c_fc.weight.data[0, 0] += 1
        with pytest.raises(ValueError, match=r"have diverged: h\.1\.attn\.c_attn\.bias on rank 2 differs from rank 0"):
            arena.check_equal(comm)

    on_ranks(3, drifted)
