"""The CUDA backend on a stand-in for CuPy (tests/stand_ins/strict_cupy.py) gives the same results as NumPy."""

import importlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import train
from data.prepare import prepare
from gpt2 import GPT2, GPT2Config, verify
from gpt2.training.run import RunFolder, read_log
from gpt2.training.trainer import Trainer
from tests.spoiled import spoil_steps
from tests.stand_ins import strict_cupy
from tests.stand_ins.strict_cupy import RaceError
from tinygrad2 import Key, Tensor, autograd, backend, checkpoint, gpus, gradcheck, ops, optim, reference
from tinygrad2.backend import CudaBackend, backend_of, get_backend
from tinygrad2.gradcheck import CASES
from tinygrad2.profiler import Profiler

ROOT = Path(__file__).parents[2]
CONFIG = GPT2Config(vocab_size=61, n_positions=150, n_embd=16, n_layer=2, n_head=2)  # default dropout, 0.1
LENGTH = 140  # two blocks of queries in attention


@pytest.fixture(autouse=True)
def numpy_on_the_cpu(monkeypatch):
    """Use reference.py on the CPU too, so that results can be compared bit by bit."""
    kernels = get_backend("cpu").kernels
    for name in vars(kernels):
        monkeypatch.setattr(kernels, name, getattr(reference, name))


@pytest.fixture
def device():
    """The stand-in as the device "cuda", without checks against CuPy's names."""
    with strict_cupy.registered() as counters:
        yield counters


@pytest.fixture(params=["rules", pytest.param("rules and names", marks=pytest.mark.extras("cupy"))])
def checked_device(request):
    """The stand-in, once without CuPy, and once with names and arguments checked against the installed CuPy."""
    real = pytest.importorskip("cupy") if "names" in request.param else None
    with strict_cupy.registered(real) as counters:
        yield counters


def text(seed, rows=2, length=LENGTH):
    tokens = np.random.default_rng(seed).integers(CONFIG.vocab_size, size=(rows, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def train_step(model, optimizer, step):
    """One complete step, as in train.py. Returns the pending loss and gradient norm."""
    loss = model.loss(*text(step), Key(0, step))
    loss.backward()
    norm = optimizer.step(max_norm=0.2)
    optimizer.zero_grad()
    return model.backend.fetch(loss.data, norm)


def arrays(model):
    return {name: parameter.numpy().copy() for name, parameter in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)


# The engine on the device --------------------------------------------------------------------------------------------


def test_training_steps_equal_numpys_without_synchronization_or_float64(checked_device):
    device = checked_device
    models = [GPT2(CONFIG, device="cpu"), GPT2(CONFIG, device="cuda")]
    optimizers = [optim.AdamW(model, lr=1e-2) for model in models]
    fetched, launches = [], []
    for step in range(3):
        expected = train_step(models[0], optimizers[0], step).get()
        device.launches = device.syncs = device.float64 = 0
        fetched.append((expected, train_step(models[1], optimizers[1], step)))
        assert (device.syncs, device.float64) == (0, 0)
        launches.append(device.launches)
    assert max(launches) - min(launches) < 0.01 * max(launches)  # the number does not grow from step to step
    for expected, fetch in fetched:
        assert fetch.get() == expected
    assert_same(arrays(models[0]), arrays(models[1]))
    assert_same(optimizers[0].state(), optimizers[1].state())


def test_every_operation_gives_the_same_bits_as_numpy(checked_device):
    for case in CASES:
        results = {}
        for name in ("cpu", "cuda"):
            random = np.random.default_rng(0)
            inputs = [
                Tensor(get_backend(name).asarray(case.draw(random, shape), dtype="float32"), requires_grad=True)
                for shape in case.shapes
            ]
            checked_device.float64 = checked_device.syncs = 0
            y = case.fn(*inputs)
            outputs = y if isinstance(y, tuple) else (y,)
            first, *rest = (output.sum() for output in outputs)
            sum(rest, start=first).backward()
            assert (checked_device.syncs, checked_device.float64) == (0, 0), case.name
            gradients = [leaf.grad for leaf in inputs if leaf.grad is not None]
            results[name] = [get_backend(name).to_host(a) for a in (*(y.data for y in outputs), *gradients)]
        for a, b in zip(results["cpu"], results["cuda"], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=case.name)


def test_options_that_save_memory_give_the_same_bits_as_numpy(checked_device):
    """The options recompute blocks, and process the output layer in chunks of rows."""
    for options in ({"recompute": "block"}, {"head_rows": 50}, {"recompute": "block", "head_rows": 7}):
        models = [GPT2(CONFIG, device=name, **options) for name in ("cpu", "cuda")]
        losses = []
        for model in models:
            tokens, targets = text(0)
            checked_device.syncs = checked_device.float64 = 0
            loss = model.loss(tokens, targets, Key(0, 1))
            loss.backward()
            assert (checked_device.syncs, checked_device.float64) == (0, 0)
            losses.append(loss.item())
        assert losses[0] == losses[1]
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            np.testing.assert_array_equal(p.grad, q.grad.get(), err_msg=name)


def test_the_profiler_measures_a_step_on_the_device(checked_device, monkeypatch):
    """Events in the stream measure time. The host waits for them only to print the table."""
    clock = iter(range(10**6))
    monkeypatch.setattr(strict_cupy.time, "perf_counter", lambda: next(clock) / 1000)
    model, profiler = GPT2(CONFIG, device="cuda"), Profiler(get_backend("cuda"))
    kernels = dict(vars(get_backend("cuda").kernels))
    for step in range(2):
        checked_device.syncs = checked_device.waits = 0
        with profiler:
            model.loss(*text(step), Key(0, step)).backward()
        assert (checked_device.syncs, checked_device.waits) == (0, 0)
    assert vars(get_backend("cuda").kernels) == kernels
    rows = {line[:20].strip(): line[20:].split() for line in profiler.table()}
    assert checked_device.waits > 0
    # With this clock, each of these takes 1 ms: a kernel, a gap between two kernels, and the event of each of the two
    # uploads (tokens and targets). A kernel that another kernel calls is not counted again.
    calls = {name: int(row[0]) for name, row in rows.items() if name not in ("operation", "outside kernels", "step")}
    assert calls["attention"] == 2 * CONFIG.n_layer
    assert calls["linear"] == 8 * CONFIG.n_layer
    assert calls["lm_head"] == 2
    assert rows["attention"][1:3] == ["2.00", "2.00"]
    assert "dropout_scale" not in calls
    assert float(rows["step"][0]) == 2 * sum(calls.values()) + 1 + 2
    assert float(rows["outside kernels"][0]) == sum(calls.values()) + 1 + 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_gradient_changes_nothing_and_does_not_synchronize(device, bad):
    model = GPT2(CONFIG, device="cuda")
    optimizer = optim.AdamW(model, lr=1e-2)
    train_step(model, optimizer, 0)
    before, moments = arrays(model), optimizer.state()
    model.ln_f.weight.grad[3] = bad
    device.syncs = 0
    norm = optimizer.step(max_norm=1.0)
    assert device.syncs == 0
    assert not np.isfinite(norm.get())
    assert_same(before, arrays(model))
    assert_same(moments, optimizer.state())


@pytest.mark.parametrize("cache", [True, False])
def test_generation_gives_the_same_tokens_as_numpy(checked_device, cache):
    prompt, sampling = [3, 1, 4], {"samples": 2, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 1}
    count = 160 if cache else 12  # exceeds the context, so that the cache is refilled
    result, expected = (
        GPT2(CONFIG, device=name).generate(prompt, count, cache=cache, **sampling) for name in ("cuda", "cpu")
    )
    assert result == expected
    assert len(result[0]) == count


@pytest.mark.slow
def test_gradcheck_passes_on_the_device(device, capsys):
    assert gradcheck.main(["--device", "cuda"]) == 0
    table = capsys.readouterr().out
    assert table.count("  ok\n") == len(CASES)
    assert device.launches > 1000 * len(CASES) / 2


def test_gradcheck_detects_a_wrong_gradient_on_the_device(device, monkeypatch):
    kernels = get_backend("cuda").kernels
    original = kernels.gelu_backward
    monkeypatch.setattr(kernels, "gelu_backward", lambda *arguments: original(*arguments) * 1.001)
    (case,) = (case for case in CASES if case.name == "gelu")
    assert case.error(device="cuda") > 1e-4
    assert case.error(device="cpu") < 1e-8


@pytest.mark.slow
def test_verify_passes_on_the_device(device):
    model = verify.small_model("gelu_new", device="cuda")
    errors = verify.gradient_errors(model)
    assert errors.keys() == dict(model.named_parameters()).keys()
    assert max(errors.values()) < verify.BOUND / 10
    assert device.launches > 10_000


def test_a_model_and_its_optimizer_move_between_devices(device):
    models = [GPT2(CONFIG) for _ in range(2)]
    optimizers = [optim.AdamW(model, lr=1e-2) for model in models]
    for step, device_name in enumerate(("cpu", "cuda", "cuda", "cpu", "cuda")):
        models[1].to(device_name)
        assert {p.backend.device for p in models[1].parameters()} == {device_name}
        assert train_step(models[0], optimizers[0], step).get() == train_step(models[1], optimizers[1], step).get()
    assert type(optimizers[1].parts[0].state[0]) is strict_cupy.ndarray
    assert_same(optimizers[0].state(), optimizers[1].state())
    assert_same(arrays(models[0]), arrays(models[1].to("cpu")))


def test_a_saved_model_loads_on_the_other_device(device, tmp_path):
    model = GPT2(CONFIG, device="cuda")
    model.save_pretrained(tmp_path)
    for device_name in ("cpu", "cuda"):
        loaded = GPT2.from_pretrained(tmp_path, device=device_name)
        assert loaded.backend.device == device_name
        assert_same(arrays(model), arrays(loaded))


def test_embedding_accepts_a_single_token(device):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    y = ops.embedding(np.int64(2), Tensor(get_backend("cuda").asarray(rows), requires_grad=True))
    assert y.shape == (3,)
    np.testing.assert_array_equal(y.numpy(), rows[2])


# Transfers to the device and back ------------------------------------------------------------------------------------


def test_uploads_share_few_buffers_and_are_correct(device):
    gpu = get_backend("cuda")
    sent = [np.full((5, 7), i, dtype=np.int64) for i in range(100)]
    arrived = [gpu.upload(values) for values in sent]
    assert device.pinned <= CudaBackend.PINNED
    assert device.syncs == 0
    assert device.waits == 100 - CudaBackend.PINNED  # no copy is complete without a wait
    device.finish()
    for values, array in zip(sent, arrived, strict=True):
        np.testing.assert_array_equal(gpu.to_host(array), values)


def test_a_larger_upload_uses_a_larger_buffer(device):
    gpu = get_backend("cuda")
    sent = [np.arange(1 + 13 * (i % 5), dtype=np.int64) for i in range(60)]
    arrived = [gpu.upload(values) for values in sent]
    device.finish()
    for values, array in zip(sent, arrived, strict=True):
        np.testing.assert_array_equal(gpu.to_host(array), values)


def test_buffers_whose_copy_is_complete_are_reused(device):
    gpu = get_backend("cuda")
    for i in range(50):
        gpu.upload(np.full(9, i))
        device.finish()
    assert device.pinned == 1
    assert device.waits == 49  # for copies that have already finished


def test_the_callers_array_may_be_changed_after_an_upload(device):
    gpu = get_backend("cuda")
    values = np.arange(6)
    array = gpu.upload(values)
    values[:] = -1
    device.finish()
    np.testing.assert_array_equal(gpu.to_host(array), np.arange(6))


def test_a_buffer_that_is_reused_too_early_is_detected(device, monkeypatch):
    def without_waiting(self, nbytes):
        if len(self._pinned) >= 2:
            return self._pinned.popleft()[0]
        return np.frombuffer(self.np.cuda.alloc_pinned_memory(nbytes), dtype=np.uint8, count=nbytes)

    monkeypatch.setattr(CudaBackend, "_take_pinned", without_waiting)
    for i in range(3):
        get_backend("cuda").upload(np.full(4, i))
    with pytest.raises(RaceError, match="changed or freed before it was copied"):
        device.finish()


def test_a_buffer_that_is_freed_too_early_is_detected(device):
    gpu = get_backend("cuda")
    gpu.upload(np.arange(4))
    gpu._pinned.clear()
    with pytest.raises(RaceError, match="changed or freed before it was copied"):
        device.finish()


def test_a_fetched_value_is_available_after_waiting(device):
    gpu = get_backend("cuda")
    x = gpu.asarray(np.float32(1.5))
    fetch = gpu.fetch(x, x + x)
    x += 1  # launched after the copy
    assert not fetch.ready()
    assert np.isnan(fetch._host).all()
    assert fetch.get() == [1.5, 3.0]
    assert fetch.ready()
    assert (device.syncs, device.float64) == (0, 0)


def test_a_fetch_may_be_discarded(device):
    gpu = get_backend("cuda")
    for _ in range(9):
        gpu.fetch(gpu.asarray(np.float32(1)))
    device.finish()
    assert gpu.fetch(gpu.asarray(np.float32(2))).get() == [2.0]
    assert len(gpu._fetched) == 1  # completed fetches are not kept
    gpu.fetch(gpu.asarray(np.float32(3)))
    gpu._fetched.clear()
    with pytest.raises(RaceError, match="freed before a result was copied"):
        device.finish()


def test_a_fetch_that_does_not_wait_is_detected(device, monkeypatch):
    monkeypatch.setattr(backend.CudaPendingScalars, "get", lambda self: self._host.tolist())
    model = GPT2(CONFIG, device="cuda")
    assert np.isnan(train_step(model, optim.AdamW(model), 0).get()).all()


def test_numpy_arrays_are_not_transferred():
    cpu = get_backend("cpu")
    values = np.arange(3.0)
    assert cpu.upload(values) is values
    fetch = cpu.fetch(np.float32(0.5), np.asarray(2.0))
    assert fetch.ready()
    assert fetch.get() == [0.5, 2.0]
    assert cpu.memory() is None
    assert cpu.name() == "cpu"


def test_the_name_of_the_gpu_is_readable(device):
    assert get_backend("cuda").name() == "cuda: stand-in"
    assert get_backend("cuda").cuda.gpu_name() == "stand-in"
    assert get_backend("cpu").cuda is None


# train.py ------------------------------------------------------------------------------------------------------------

RUN = ["--data", "text", "--batch-size", "2", "--block-size", "8", "--eval-iters", "2", "--eval-interval", "3"]
SAME = ("step", "loss", "lr", "grad_norm", "tokens", "val_loss")


@pytest.fixture
def user(tmp_path, monkeypatch, device):
    """A new current directory that contains data/text. Signal handlers are restored after the test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(300)))
    prepare(["text.txt"], "bytes", tmp_path / "data" / "text")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(out, device_name, steps, *options, code=0):
    assert train.main([*RUN, "--out-dir", out, "--device", device_name, "--max-iters", str(steps), *options]) == code


def log(out):
    return [{key: row[key] for key in SAME if key in row} for row in read_log(Path(out) / "log.jsonl")]


def saved(out):
    folder, damaged = checkpoint.newest(Path(out))
    assert not damaged
    files = ("model.safetensors", "optimizer.safetensors")
    return {name: values for file in files for name, values in checkpoint.load_arrays(folder / file).items()}


def test_training_on_the_device_gives_the_same_log_as_on_the_cpu(user, monkeypatch, capsys):
    monkeypatch.setattr(train, "sample_text", lambda *arguments: "")
    options = ["--dropout", "0.1", "--total-batch-size", "32", "--save-interval", "2"]
    run("host", "cpu", 4, *options)
    run("device", "cuda", 4, *options)
    assert "cuda, float32" in capsys.readouterr().out
    assert log("host") == log("device")
    assert_same(saved("host"), saved("device"))
    # A run that was stopped on one device resumes on the other.
    for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
        shutil.copytree("host" if first == "cpu" else "device", f"{first}-{second}")
        run(f"{first}-{second}", second, 6, *options)
    run("host", "cpu", 6, *options)
    for out in ("cpu-cuda", "cuda-cpu"):
        assert log("host") == log(out)
        assert_same(saved("host"), saved(out))


def test_a_skipped_step_is_stored_and_explained_in_the_same_way_on_the_device(user, monkeypatch, capsys):
    """On the device, the next step's gradients already exist when the host receives the result of the skipped step."""
    monkeypatch.setattr(train, "sample_text", lambda *arguments: "")
    spoil_steps(monkeypatch, 2)
    reports = []
    for device_name in ("cpu", "cuda"):
        run(device_name, device_name, 6, "--eval-interval", "0", "--log-interval", "1")
        lines = capsys.readouterr().out.replace(f"{device_name}/", "").splitlines()
        reports.append(lines[next(i for i, line in enumerate(lines) if "step 3/6 | skipped" in line) :][:4])
    assert reports[0] == reports[1]
    assert "spoil after h.2.mlp.c_proj" in reports[0][1]
    assert log("cpu") == log("cuda")
    assert_same(saved("cpu"), saved("cuda"))
    for file in ("model.safetensors", "batch.safetensors", "step.json"):
        first, second = (Path(device_name, "bad-step-3", file).read_bytes() for device_name in ("cpu", "cuda"))
        assert first.replace(b'"cpu"', b'"cuda"') == second, file


def test_training_waits_for_a_step_only_after_launching_the_next_one(user, device, monkeypatch):
    monkeypatch.setattr(train, "sample_text", lambda *arguments: "")
    order, syncs = [], set()
    accumulate, get = Trainer.accumulate_gradients, backend.CudaPendingScalars.get

    def launched(*given):
        result = accumulate(*given)
        order.append("launched")  # the forward and backward passes; the update follows
        syncs.add(device.syncs)
        return result

    monkeypatch.setattr(Trainer, "accumulate_gradients", launched)
    monkeypatch.setattr(backend.CudaPendingScalars, "get", lambda given: order.append("logged") or get(given))
    run("out", "cuda", 5, "--eval-interval", "0", "--save-interval", "0")
    assert order == ["launched", *["launched", "logged"] * 4, "logged"]
    assert len(syncs) == 1  # the host does not wait between the launches of the first and the last step


def test_training_skips_a_step_whose_loss_is_nan(user, monkeypatch, capsys):
    monkeypatch.setattr(train, "sample_text", lambda *arguments: "")
    kernels = get_backend("cuda").kernels
    original, calls = kernels.lm_head_forward, []

    def wrong(*arguments):
        loss, dlogits = original(*arguments)
        calls.append(autograd.is_recording())  # False in evaluation
        if calls[-1] and sum(calls) == 3:
            loss, dlogits = loss * np.nan, dlogits * np.nan
        return loss, dlogits

    monkeypatch.setattr(kernels, "lm_head_forward", wrong)
    run("out", "cuda", 5, "--eval-interval", "0", "--save-interval", "0", "--max-bad-steps", "1", code=1)
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"train.py: error: step 3: the loss is nan and the gradient norm nan; the step was skipped, and the weights.*"
        r"This is skipped step 1 in a row, and --max-bad-steps is 1\. There is no checkpoint yet\. .*\n",
        error,
    )
    assert [row["step"] for row in log("out")] == [1, 2, 3]
    calls.clear()
    run("again", "cuda", 5, "--eval-interval", "0", "--save-interval", "0")
    lines = capsys.readouterr().out.splitlines()
    assert "step 3/5 | skipped: the loss is nan and the gradient norm nan; the weights are unchanged" in lines
    rows = read_log(Path("again/log.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in rows if "skipped" in row] == [3]


@pytest.mark.parametrize("device_name", ["cpu", "cuda"])
def test_the_time_of_a_step_excludes_other_work(user, monkeypatch, device_name):
    """This includes the steps after a skipped or saved step, whose results reach the host together."""
    monkeypatch.setattr(train, "sample_text", lambda *arguments: "")
    accumulate, now, slow = Trainer.accumulate_gradients, [0.0], []

    def compute(trainer, stop_requested):
        now[0] += 100
        slow.append(len(trainer._launched))
        return accumulate(trainer, stop_requested)

    def explain(trainer, launched):
        now[0] += 7000
        return []

    write = RunFolder.save
    monkeypatch.setattr(Trainer, "accumulate_gradients", compute)
    monkeypatch.setattr("gpt2.training.trainer.explain_step", explain)
    monkeypatch.setattr(RunFolder, "save", lambda *given: (now.__setitem__(0, now[0] + 3000), write(*given))[1])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    spoil_steps(monkeypatch, 2)
    run("out", device_name, 6, "--eval-interval", "0", "--save-interval", "5", "--max-bad-steps", "2")
    assert [row["seconds"] for row in read_log(Path("out/log.jsonl"))] == [100] * 6
    assert max(slow) == (1 if device_name == "cuda" else 0)  # only a device returns a step's results one step later


def test_training_explains_the_memory_needed_if_memory_runs_out(user, monkeypatch, capsys):
    def full(*arguments):
        raise MemoryError("Out of memory allocating 1,024 bytes (allocated so far: 1,024 bytes).")

    monkeypatch.setattr(get_backend("cuda").kernels, "lm_head_forward", full)
    run("out", "cuda", 9, code=1)
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"train.py: error: out of memory: 2 sequences of 8 tokens need [\d.]+ weights \+ .* = [\d.]+ GB; 3.22 of the "
        r"device's 4.29 GB are free; use --batch-size 1 or less, with --total-batch-size to keep the tokens per step\n",
        error,
    )


@pytest.mark.extras("cupy")
def test_cupys_out_of_memory_error_is_a_memory_error():
    assert issubclass(pytest.importorskip("cupy").cuda.memory.OutOfMemoryError, MemoryError)


# A missing device ------------------------------------------------------------------------------------------


class DriverError(RuntimeError):
    """The error that the CUDA runtime raises."""


def broken(count):
    """A stand-in for the module cupy, whose getDeviceCount is `count`."""
    module = types.ModuleType("cupy")
    module.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDeviceCount=count, CUDARuntimeError=DriverError)
    )
    return module


def no_driver():
    raise DriverError("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (None, r"CuPy is not installed; pip install -e \"\.\[cuda13\]\""),
        (broken(no_driver), r"no working NVIDIA driver was found \(cudaErrorInsufficientDriver.*nvidia-smi"),
        (broken(lambda: 0), r"the driver reports no GPU; CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_missing_device_is_reported_in_one_line(monkeypatch, capsys, cupy, message):
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(backend, "_backends", {"cpu": get_backend("cpu")})
    with pytest.raises(ValueError, match=f"^device 'cuda': {message}") as caught:
        get_backend("cuda")
    assert "\n" not in str(caught.value)
    assert get_backend("auto").device == "cpu"
    for command, name in (
        (gradcheck.main, "tinygrad2.gradcheck"),
        (lambda given: verify.main(["--gradients", *given]), "gpt2.verify"),
    ):
        assert command(["--device", "cuda"]) == 2
        assert capsys.readouterr().err == f"{name}: error: {caught.value}\n"


def test_a_cupy_that_cannot_be_imported_is_reported_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("import a_library_that_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(backend, "_backends", {})
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"^device 'cuda': CuPy cannot be imported \(No module named 'a_library"):
        get_backend("cuda")


def test_auto_selects_the_device_if_there_is_one(device):
    assert get_backend("auto").device == "cuda"
    assert GPT2(CONFIG, device="auto").backend is get_backend("cuda")


def test_an_unknown_device_is_rejected():
    with pytest.raises(ValueError, match="device 'tpu' is unknown; choose one of auto, cpu, cuda"):
        get_backend("tpu")


@pytest.mark.slow
def test_the_tests_for_a_gpu_pass_on_the_stand_in():
    """Run the tests for a GPU on the stand-in, so that errors in the tests are found without a GPU."""
    # Counting memory requires a device, float64 is tested above, bfloat16 and one-launch decoding require the CUDA
    # kernels, and NCCL requires a GPU.
    which = "not free_memory and not float64 and not bfloat16 and not one_launch and not nccl"
    script = (
        "import pytest, sys; from tests.stand_ins import strict_cupy\n"
        "with strict_cupy.registered(): sys.exit(pytest.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "-m", "gpu", "tests/gpt2/test_gpu.py", "-k", which]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed, \d+ deselected", done.stdout, re.MULTILINE), done.stdout


# The stand-in itself -------------------------------------------------------------------------------------------------


def on_device(values):
    return strict_cupy.library.asarray(np.asarray(values))


X, I = np.ones((3, 4), dtype=np.float32), np.array([0, 0])  # noqa: E741


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda np_, x: x * X, "Unsupported type"),
        (lambda np_, x: X * x, "Unsupported type"),
        (lambda np_, x: np_.exp(X), "Unsupported type"),
        (lambda np_, x: np_.exp([1.0]), "Unsupported type"),
        (lambda np_, x: np_.sum(X), "expected device arrays"),
        (lambda np_, x: np_.stack([x, X]), "expected device arrays"),
        (lambda np_, x: np.asarray(x), "Implicit conversion"),
        (lambda np_, x: x.__setitem__(0, X[0]), "Unsupported type"),
        (lambda np_, x: x.__setitem__(I, 1.0), "repeated indices"),
        (lambda np_, x: x.__setitem__((I, I), 1.0), "repeated indices"),
        (lambda np_, x: x[on_device([5])], "out of bounds"),
        (lambda np_, x: np_.broadcast_to(x[0], (9, 4)).__setitem__(0, 1.0), "read-only"),
        (lambda np_, x: x.astype("int64").__iadd__(1.5), "Cannot cast"),
        (lambda np_, x: x.set(X.astype("float64")), "expected a NumPy array of float32"),
        (lambda np_, x: x.set(X, stream=np_.cuda.get_current_stream()), "not pinned"),
        (lambda np_, x: x.get(out=X.copy(), blocking=False), "not pinned"),
    ],
)
def test_the_stand_in_rejects_invalid_operations(device, fault, error):
    with pytest.raises((TypeError, ValueError, IndexError, AssertionError), match=error):
        fault(strict_cupy.library, on_device(X))


@pytest.mark.extras("cupy")
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda np_, x: np_.errstate(all="ignore"), "no attribute 'errstate'"),
        (lambda np_, x: x.setflags(write=False), "no attribute 'setflags'"),
        (lambda np_, x: np_.sum(x, where=x > 0), "where"),
        (lambda np_, x: x.sum(where=x > 0), "does not accept where"),
        (lambda np_, x: np_.exp(x, subok=False), "does not accept subok"),
        (lambda np_, x: np_.take_along_axis(x, x.astype("int64")), "axis"),
    ],
)
def test_the_stand_in_rejects_names_that_cupy_does_not_have(fault, error):
    with (
        strict_cupy.registered(pytest.importorskip("cupy")),
        pytest.raises((AttributeError, TypeError), match=error),
    ):
        fault(strict_cupy.library, on_device(X))


@pytest.mark.extras("cupy")
def test_cupy_has_all_names_of_the_stand_in():
    def missing(ours, theirs, path):
        for name, value in vars(ours).items():
            if not name.startswith("__") or name == "__version__":
                if not hasattr(theirs, name):
                    yield f"{path}.{name}"
                elif isinstance(value, types.SimpleNamespace):
                    yield from missing(value, getattr(theirs, name), f"{path}.{name}")

    cupy = pytest.importorskip("cupy")
    assert list(missing(strict_cupy.Library, cupy, "cupy")) == []
    public = [name for name in vars(strict_cupy.ndarray) if not name.startswith("_")]
    assert [name for name in public if not hasattr(cupy.ndarray, name)] == []
    for ours, theirs in ((strict_cupy.Event, cupy.cuda.Event), (strict_cupy.Stream, cupy.cuda.Stream)):
        assert [name for name in vars(ours) if not name.startswith("_") and not hasattr(theirs, name)] == []


@pytest.mark.parametrize(
    "wait",
    [
        lambda np_, x: float(x[0, 0]),
        lambda np_, x: int(x[0, 0]),
        lambda np_, x: bool(x.any()),
        lambda np_, x: x[0, 0].item(),
        lambda np_, x: x.tolist(),
        lambda np_, x: x.get(),
        lambda np_, x: np_.asnumpy(x),
        lambda np_, x: repr(x),
        lambda np_, x: [1, 2, 3][on_device(1)],
        lambda np_, x: 5 in x[0],
        lambda np_, x: x[x > 0],
        lambda np_, x: np_.nonzero(x),
        lambda np_, x: x.nonzero(),
        lambda np_, x: np_.flatnonzero(x),
        lambda np_, x: np_.argwhere(x),
        lambda np_, x: np_.where(x > 0),
        lambda np_, x: np_.unique(x),
    ],
)
def test_the_stand_in_counts_synchronizations(device, wait):
    x = on_device(X)
    device.syncs = 0
    wait(strict_cupy.library, x)
    assert device.syncs > 0


@pytest.mark.parametrize(
    ("promote", "count"),
    [
        (lambda np_, x: x * np.float64(2), 1),
        (lambda np_, x: x * on_device(np.ones(4)), 2),  # including the new array
        (lambda np_, x: x.__iadd__(on_device(np.ones(4))), 2),
        (lambda np_, x: x.astype("float64"), 1),
        (lambda np_, x: np_.sum(x, dtype="float64"), 1),
        (lambda np_, x: np_.mean(x.astype("int64")), 1),
        (lambda np_, x: np_.zeros((3,)), 1),
        (lambda np_, x: np_.arange(3.0), 1),
        (lambda np_, x: np_.asarray(1.5), 1),
        (lambda np_, x: (x * 2.0 + np.float32(1) - 1) ** 2 / 3, 0),
        (lambda np_, x: np_.where(x > 0, x, -np.inf), 0),
        (lambda np_, x: np_.mean(x) * 2.0, 0),
    ],
)
def test_the_stand_in_counts_float64(device, promote, count):
    x = on_device(X)
    device.float64 = 0
    promote(strict_cupy.library, x)
    assert device.float64 == count


def test_the_stand_in_returns_views_and_arrays_like_cupy(device):
    x = on_device(np.arange(6, dtype=np.float32))
    x[0] += 5  # x[0] is a 0-d view
    last = x[-1]
    last *= 2
    x.reshape(2, 3)[1, 0] = 9
    np.testing.assert_array_equal(x.get(), [5, 1, 2, 9, 4, 10])
    device.launches = 0
    assert type(x.sum()) is type(x[1]) is type(x[1] > 0) is strict_cupy.ndarray
    assert device.launches == 2
    assert backend_of(np.float32(2) * x) is get_backend("cuda")  # with a NumPy scalar on the left
    assert strict_cupy.library.asarray(x) is x


def test_a_process_uses_one_gpu(device):
    x = on_device(X)
    gpu = strict_cupy.GPU
    gpu(1).use()
    try:
        for use in (lambda: get_backend("cuda"), lambda: get_backend("auto"), lambda: Tensor([1.0]).to("cuda")):
            with pytest.raises(ValueError, match=r"computes on GPU 0, got GPU 1; .*CUDA_VISIBLE_DEVICES.*mpirun"):
                use()
        foreign = on_device(X)
    finally:
        gpu(0).use()
    get_backend("cuda").asarray(x)
    with pytest.raises(ValueError, match="computes on GPU 0, got GPU 1"):
        get_backend("cuda").asarray(foreign)
    with pytest.raises(ValueError, match="must be chosen before it is used"):
        backend.choose_gpu(1)
    with pytest.raises(ValueError, match=r"'cuda:1' is unknown; .*CUDA_VISIBLE_DEVICES=1 selects this one"):
        get_backend("cuda:1")


def test_a_wait_in_another_thread_uses_the_gpu_of_the_process():
    gpu = strict_cupy.GPU
    gpu(1).use()
    try:
        with strict_cupy.registered():
            on = get_backend("cuda")
            array = on.asarray(X)
            host = on.staging(array.reshape(-1), None)
            wait = on.download(array.reshape(-1), host)
            with ThreadPoolExecutor(1) as pool:  # a new thread uses GPU 0 initially
                pool.submit(wait).result()
            np.testing.assert_array_equal(host, X.reshape(-1))
    finally:
        gpu(0).use()


def test_events_for_ordering_do_not_record_time(device):
    on = get_backend("cuda")
    times = [on.timestamp(), on.timestamp()]
    assert on.seconds(*times) >= 0
    with pytest.raises(strict_cupy.CUDARuntimeError, match="timing is disabled"):
        on.seconds(times[0], on.cuda.event())


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bfloat16", 989.0),
        ("NVIDIA H100 80GB HBM3", "float32", 67.0),
        ("NVIDIA H100 PCIe", "tf32", 378.0),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA L40S", "float32", 91.6),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA GeForce RTX 4090", "tf32", 82.6),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "tf32", None),
        ("NVIDIA GeForce RTX 4090 D", "tf32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA GeForce RTX 5090", "bfloat16", 209.5),
        ("NVIDIA GeForce RTX 3090", "bfloat16", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", None),
        ("NVIDIA A10", "bfloat16", 125.0),
        ("NVIDIA A10G", "bfloat16", None),
        ("Tesla T4", "float32", 8.1),
        ("Tesla T4", "bfloat16", None),
        ("NVIDIA H200", "float64", None),
    ],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(name, precision, peak):
    assert gpus.peak_tflops(name, precision) == peak


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-40GB", 1555.0),
        ("NVIDIA A100-PCIE-40GB", 1555.0),
        ("NVIDIA A100-SXM4-80GB", 2039.0),
        ("NVIDIA A100 80GB PCIe", 1935.0),
        ("Tesla T4", 320.0),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_the_bandwidth_of_a_gpu_is_found_by_its_name(name, bandwidth):
    assert gpus.bandwidth(name) == bandwidth


def test_every_gpu_with_a_peak_has_a_bandwidth():
    assert gpus.PEAK_TFLOPS.keys() <= gpus.BANDWIDTH.keys()


def test_a_registered_stand_in_is_removed_afterwards():
    before = dict(backend._backends)
    with strict_cupy.registered():
        assert get_backend("cuda").np is strict_cupy.library
    assert backend._backends == before
    assert strict_cupy.ndarray not in backend._by_type


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("n", [1, 1000, 3_000_001])
def test_a_flat_array_is_cleared_and_converted(monkeypatch, kernels, n):
    monkeypatch.setenv("TINYGRAD2_KERNELS", kernels)
    backend, x = get_backend("cpu"), np.arange(n, dtype=np.float32)
    copies = np.zeros(n, "bfloat16")
    backend.convert(x, copies)
    np.testing.assert_array_equal(copies, x.astype("bfloat16"))
    backend.clear(x)
    assert not x.any()
