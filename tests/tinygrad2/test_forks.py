"""tinygrad2/forks.py: forks while other threads compute, and several threads that compute concurrently."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tinygrad2 import forks, threads

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
TRAIN = """
import os, signal, sys, threading, time
import numpy as np
from gpt2 import GPT2, GPT2Config
from tinygrad2 import Key, optim

def train(seed, steps):
    model = GPT2(GPT2Config.preset("nano"), seed=seed)
    optimizer, draw, losses = optim.AdamW(model, lr=1e-3), np.random.default_rng(seed), []
    for step in range(steps):
        tokens = draw.integers(0, 257, (2, 33))
        loss = model.loss(tokens[:, :-1], tokens[:, 1:], Key(seed, step, 0))
        loss.backward()
        optimizer.step(max_norm=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

expected = train(1, 2)
"""
PRODUCT = """
import os, signal, sys, threading, time
import numpy as np
from tinygrad2 import Tensor

def train(seed, steps):  # a product by NumPy
    x = Tensor(np.full((300, 300), seed, "f"))
    return [float((x @ x).data.sum()) for _ in range(steps)]

expected = train(1, 2)
"""
FORKS = """
ended = threading.Event()
def other():
    while not ended.is_set():
        train(3, 5)
threading.Thread(target=other).start()
failed = []
for k in range(20):
    time.sleep(0.003 * (k % 7))
    child = os.fork()
    if not child:
        signal.alarm(30)  # ends the process if it hangs
        os._exit(0 if train(1, 2) == expected else 7)
    if status := os.waitpid(child, 0)[1]:
        failed.append(status)
        break
ended.set()
assert not failed, failed
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_fork
@pytest.mark.parametrize(
    ("work", "kernels"),
    [
        pytest.param(PRODUCT, "", id="matmul"),
        pytest.param(PRODUCT, "reference", id="matmul of the reference"),
        pytest.param(TRAIN, "", id="training", marks=pytest.mark.slow),
    ],
)
def test_a_process_forks_while_another_thread_computes(work, kernels):
    run(work + FORKS, TINYGRAD2_KERNELS=kernels)


def test_two_threads_train_two_models_as_fast_as_one_after_the_other():
    """With threadpoolctl 3.8, the second thread could not limit OpenBLAS's threads, and took 10 to 50 times as long."""
    out = run(
        TRAIN + "losses = {}\n"
        "def seconds(seeds):\n"
        "    jobs = [threading.Thread(target=lambda s=s: losses.update({s: train(s, 20)})) for s in seeds]\n"
        "    started = time.perf_counter()\n"
        "    for job in jobs: job.start()\n"
        "    for job in jobs: job.join()\n"
        "    return time.perf_counter() - started\n"
        "alone = seconds([1]) + seconds([2])\n"
        "expected = dict(losses)\n"
        "at_once = seconds([1, 2])\n"
        "assert losses == expected\n"
        "print(at_once / alone)\n"
    )
    assert float(out) < 3


def test_every_thread_limits_blas():
    seen = []

    def work():
        with threads.blas_on_one_thread():
            seen.append({library.get_num_threads() for library in threads._blas()})

    before = threads.count()
    try:
        threads.set_count(2)
        with threads.blas_on_one_thread():
            pass
        for _ in range(3):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    finally:
        threads.set_count(before)
    assert seen == [{1}] * 3


def in_a_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


@needs_fork
@pytest.mark.parametrize("kind", [forks.computing, threads.blas_on_one_thread])
def test_a_fork_waits_for_products_of_other_threads_but_not_of_its_own_thread(kind):
    entered, leave, forked = threading.Event(), threading.Event(), threading.Event()

    def compute():
        with kind():
            entered.set()
            leave.wait(20)

    def fork():
        with kind():  # the context of the same thread does not block the fork
            forks._before_fork()
            forked.set()
            forks._after_fork()

    computing = in_a_thread(compute)
    assert entered.wait(20)
    forking = in_a_thread(fork)
    assert not forked.wait(0.2)
    leave.set()
    assert forked.wait(20)
    computing.join(20)
    forking.join(20)


@needs_fork
def test_new_products_wait_for_a_pending_fork_but_nested_ones_do_not():
    entered, nested, leave, order = threading.Event(), threading.Event(), threading.Event(), []

    def compute():
        with forks.computing():
            entered.set()
            leave.wait(20)
            with forks.computing():
                nested.set()
            time.sleep(0.05)
        with forks.computing():
            order.append("product")

    def fork():
        forks._before_fork()
        time.sleep(0.05)
        order.append("fork")
        forks._after_fork()

    computing = in_a_thread(compute)
    assert entered.wait(20)
    forking = in_a_thread(fork)
    while not forks._waiting:
        time.sleep(0.001)
    leave.set()
    assert nested.wait(20)
    computing.join(20)
    forking.join(20)
    assert order == ["fork", "product"]


def test_a_context_lost_to_an_interrupt_does_not_block_forks():
    lost = forks.computing()
    lost.__enter__()
    assert threading.get_ident() in forks._threads()
    del lost
    assert not forks._threads()


def test_products_of_the_reference_run_in_the_context(monkeypatch):
    entered = []
    monkeypatch.setattr(forks.computing, "__enter__", lambda self: entered.append(self))
    monkeypatch.setattr(forks.computing, "__exit__", lambda self, *_: None)
    a, out = np.arange(6.0).reshape(2, 3), np.empty((2, 2))
    assert (forks.guarded_numpy.matmul(a, a.T, out=out) == a @ a.T).all()
    assert forks.guarded_numpy.dot(a[0], a[1]) == a[0] @ a[1]
    assert len(entered) == 2


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_signal_handler_may_fork_during_a_computation():
    """The thread that computes forks inside a task, and both processes complete the task."""
    pool = pytest.importorskip("tinygrad2.kernels.pool")
    computed, children = np.zeros(3), []

    def task(start, stop):
        computed[start:stop] += 1
        if start == 0:
            children.append(os.fork())

    pool.each(task, [(0, 1), (1, 2), (2, 3)])
    if not children[0]:
        again = np.zeros(3)
        pool.each(lambda start, stop: again.__setitem__(start, 1), [(0, 1), (1, 2), (2, 3)])
        os._exit(0 if computed.tolist() == again.tolist() == [1, 1, 1] else 7)
    end = time.monotonic() + 30
    while not (status := os.waitpid(children[0], os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.01)
    if not status[0]:
        os.kill(children[0], 9)
        os.waitpid(children[0], 0)
    assert status == (children[0], 0)
    assert computed.tolist() == [1, 1, 1]
