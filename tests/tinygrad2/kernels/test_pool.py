"""kernels/pool.py runs parts concurrently, and never hangs: errors, Ctrl-C, forks, sleeping workers, exit."""

import faulthandler
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from tinygrad2 import threads

pool = pytest.importorskip("tinygrad2.kernels.pool")
from numba import carray, cfunc, types  # noqa: E402
from numba.extending import intrinsic  # noqa: E402

TWO = [(0, 1), (1, 2)]


@pytest.fixture(autouse=True)
def deadline():
    """If a test hangs, print the stacks of all threads and exit, instead of blocking the test run."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def ranges(n):
    return [(i, i + 1) for i in range(n)]


def usable(parts=3):
    """Whether the pool runs parts concurrently, each on its own thread."""
    meeting, seen = threading.Barrier(parts, timeout=20), []

    def task(start, stop):
        meeting.wait()
        seen.append((start, threading.get_ident()))

    pool.each(task, ranges(parts))
    return sorted(start for start, _ in seen) == list(range(parts)) and len({who for _, who in seen}) == parts


@intrinsic
def _words(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.int64), generate


@cfunc(types.void(types.int64, types.int64, types.int64))
def count_up(arguments, start, stop):
    """Add 1 to the word of each part. arguments: the address of the words, and the number of iterations to spend."""
    a = carray(_words(arguments), (2,))
    result = carray(_words(a[0]), (stop,))
    for part in range(start, stop):
        value = result[part]
        for i in range(a[1]):
            value = (value * 5 + i) ^ (value >> 3)
        result[part] += 1 + (value == 12345)  # so that the loop is not optimized away


def counted(parts, work=0):
    """The words of `parts` parts after one call of count_up."""
    result = np.zeros(parts, dtype=np.int64)
    pool.each_compiled(count_up, np.array([result.ctypes.data, work], dtype=np.int64), ranges(parts))
    return result


def test_parts_run_concurrently_and_nested_calls_run_in_place():
    meeting = threading.Barrier(3, timeout=20)
    seen = []

    def task(start, stop):
        meeting.wait()
        me = threading.get_ident()
        pool.each(lambda a, b: seen.append((me, threading.get_ident(), a)), TWO)
        assert counted(5).tolist() == [1] * 5

    pool.each(task, ranges(3))
    assert [outer for outer, _, _ in seen] == [inner for _, inner, _ in seen]
    assert sorted(a for _, _, a in seen) == [0, 0, 0, 1, 1, 1]
    assert len({outer for outer, _, _ in seen}) == 3


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_an_error_in_a_part_is_raised_after_all_parts_have_ended(where, error):
    done = []

    def task(start, stop):
        if start == where:
            raise error("of a part")
        time.sleep(0.02)
        done.append(start)

    with pytest.raises(error, match="of a part"):
        pool.each(task, ranges(3))
    assert sorted(done) == sorted({0, 1, 2} - {where})
    assert usable()


def test_one_part_runs_on_the_calling_thread():
    seen = []
    pool.each(lambda a, b: seen.append((a, b, threading.get_ident())), [(3, 9)])
    assert seen == [(3, 9, threading.get_ident())]


@pytest.mark.parametrize("count", [1, 2, 5, 2 * (os.cpu_count() or 1) + 3])
def test_each_compiled_part_is_computed_once(count):
    for work in (0, 1, 100, 100_000):
        assert counted(count, work).tolist() == [1] * count


def test_the_number_of_parts_may_change_between_calls():
    for count in (2, 7, 1, 3, 9, 2, 12, 5):
        assert counted(count).tolist() == [1] * count
        assert usable(count)


@pytest.mark.parametrize("wait", [0, 0.5, 1, 3])
def test_sleeping_workers_are_woken(wait):
    assert usable()
    for _ in range(20):
        time.sleep(wait * pool.SPIN_SECONDS)
        assert counted(3).tolist() == [1] * 3
        time.sleep(wait * pool.SPIN_SECONDS)
        assert usable()
    time.sleep(50 * pool.SPIN_SECONDS)
    assert all(worker.slot[pool.ASLEEP] for worker in pool._workers)


def test_several_threads_may_call_concurrently():
    wrong = []

    def ask(seed):
        R = random.Random(seed)
        for _ in range(200):
            count = R.randrange(1, 6)
            done = []
            pool.each(lambda a, b, done=done: done.append(a), ranges(count))
            if sorted(done) != list(range(count)) or counted(count, R.randrange(1000)).tolist() != [1] * count:
                wrong.append(seed)

    callers = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong
    assert usable()


def test_parts_of_any_duration_with_any_pause():
    """Durations are close to SPIN_SECONDS, so that threads fall asleep just as work arrives."""
    R = random.Random(0)
    stop = time.perf_counter() + 1.5
    while time.perf_counter() < stop:
        count, delays = R.randrange(1, 5), [R.choice((0, 0, 1, 1.1)) * pool.SPIN_SECONDS * R.random() for _ in range(5)]
        done = []

        def task(start, stop, delays=delays, done=done):
            time.sleep(delays[start])
            done.append(start)

        if R.random() < 0.5:
            pool.each(task, ranges(count))
            assert sorted(done) == list(range(count))
        else:
            assert counted(count, R.randrange(3000)).tolist() == [1] * count
        time.sleep(delays[-1])


def test_a_worker_uses_the_callers_context():
    def divide(start, stop):
        return np.ones(1) / np.zeros(1)

    with np.errstate(divide="raise"):
        for part in range(2):
            with pytest.raises(FloatingPointError):
                pool.each(lambda a, b, part=part: divide(a, b) if a == part else None, TWO)
    with np.errstate(divide="ignore"):
        pool.each(divide, TWO)


def test_blas_uses_one_thread_inside_a_part_and_is_restored_afterwards():
    def blas_threads():
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    before, inside = blas_threads(), []
    pool.each(lambda a, b: inside.extend(blas_threads()), TWO)
    assert set(inside) == {1}
    assert blas_threads() == before


# Interrupts ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_a_part_that_outlives_its_caller_does_not_affect_the_next_call():
    release, done = threading.Event(), []
    assert usable()
    worker = pool._get_workers(1)[0]
    worker.task, worker.slot[pool.FUNCTION] = release.wait, pool.PYTHON  # as if interrupted here
    pool._post(pool._slots.ctypes.data, 1)
    worker.wake_up()
    later = threading.Timer(0.05, release.set)
    later.start()
    pool.each(lambda start, stop: done.append(start), ranges(2))
    assert sorted(done) == [start for start, _ in ranges(2)]
    later.join()


def test_ctrl_c_at_any_moment_leaves_the_pool_usable():
    """Alarms interrupt the caller anywhere: between the steps of the handshake, in its part, and while it waits."""

    def interrupt(*_):
        raise KeyboardInterrupt

    R, caught = random.Random(0), 0
    assert usable()
    assert counted(3).tolist() == [1] * 3  # everything is compiled, so that no alarm interrupts the compiler
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        stop = time.perf_counter() + 2
        while time.perf_counter() < stop:
            running = []

            def task(start, stop, running=running):
                running.append(start)
                time.sleep(0.0005 * start)
                running.pop()

            result = np.zeros(3, dtype=np.int64)
            words = np.array([result.ctypes.data, 20_000], dtype=np.int64)
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + R.random() * 0.0015)
                if R.random() < 0.5:
                    pool.each(task, ranges(3))
                else:
                    pool.each_compiled(count_up, words, ranges(3))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                caught += 1
            # Python may raise between entering `finally` and its first statement. A part may then outlive its caller.
            deadline = time.perf_counter() + 10
            while any(worker.slot[pool.DONE] != worker.slot[pool.TICKET] for worker in pool._workers):
                assert time.perf_counter() < deadline
                time.sleep(1e-4)
            assert result.tolist() in ([0] * 3, [1] * 3)
            if pool._busy.locked():  # interrupted after taking the lock: other callers do not use the pool
                pool._busy.release()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert caught > 50
    assert usable()


def test_an_interrupt_of_a_waiting_caller_is_raised_after_all_parts_have_ended(monkeypatch):
    wait, pending = pool._wait, [KeyboardInterrupt, KeyboardInterrupt]

    def interrupted(*arguments):
        if pending and pool._slots[0, pool.DONE] != pool._slots[0, pool.TICKET]:  # only after work was posted
            raise pending.pop()
        return wait(*arguments)

    ended = []

    def task(start, stop):
        time.sleep(0.05 * start)
        ended.append(start)

    monkeypatch.setattr(pool, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.each(task, TWO)
    assert ended == [0, 1]
    monkeypatch.undo()
    assert usable()


def test_a_thread_that_cannot_be_started_raises_instead_of_hanging(monkeypatch):
    pool._stop_workers()
    start, started = threading.Thread.start, []

    def failing(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with pytest.raises(RuntimeError, match="can't start"):
        counted(5)
    monkeypatch.undo()
    assert usable(5)
    assert counted(5).tolist() == [1] * 5


# Processes -----------------------------------------------------------------------------------------------------------


def _in_a_fork(results):
    results.put((usable(), counted(4).tolist(), len(pool._workers) > 0))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("pause", [0, 0.02])
def test_a_forked_process_has_its_own_threads(pause):
    assert usable()
    time.sleep(pause)  # the workers spin or sleep
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_a_fork, args=(results,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert results.get() == (True, [1] * 4, True)
    assert usable()


EXITS = {
    "while workers spin": "",
    "while workers sleep": "time.sleep(0.03)",
    "with an error": "raise ZeroDivisionError",
    "while a daemon thread computes": (
        "def work():\n"
        "    while True: pool.each(lambda a, b: time.sleep(0), RANGES)\n"
        "threading.Thread(target=work, daemon=True).start(); time.sleep(0.05)"
    ),
}
SCRIPT = """
import atexit, sys, threading, time
def last():  # registered before the pool's exit function, so called after it
    computed = []
    pool.each(lambda a, b: computed.append(a), RANGES)
    assert sorted(computed) == [0, 1, 2]
atexit.register(last)
from tinygrad2.kernels import pool
RANGES = [(0, 1), (1, 2), (2, 3)]
pool.each(lambda a, b: None, RANGES)
"""


@pytest.mark.parametrize("repeats", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", EXITS)
def test_the_interpreter_exits_cleanly(case, repeats):
    """Two processes run at a time. An exit function that runs after the pool has stopped computes in place."""
    script = SCRIPT + EXITS[case]
    for _ in range(repeats):
        processes = [
            subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)
        ]
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert process.returncode == (1 if "error" in case else 0), err
            assert out == b""
            assert (b"ZeroDivisionError" in err) if "error" in case else err == b""


def test_set_count_sets_the_number_of_threads(set_threads):
    for count in (1, 4, 2):
        set_threads(count)
        seen = []
        pool.each(lambda a, b, seen=seen: seen.append(threading.get_ident()), threads.parts(100, 1))
        assert len(set(seen)) == count


# Tables of tasks ------------------------------------------------------------------------------------------------------


@cfunc(types.void(types.int64, types.int64, types.int64))
def shift(arguments, start, stop):
    """Set next[i] = 3 row[n - 1 - i] + i. arguments: the addresses of the row and of the next row, and n."""
    a = carray(_words(arguments), (3,))
    before, after = carray(_words(a[0]), (a[2],)), carray(_words(a[1]), (a[2],))
    for i in range(start, stop):
        after[i] = 3 * before[a[2] - 1 - i] + i


def chained(steps, parts, size=60):
    """A table of steps, each of which reads what other threads wrote in the previous step, and the expected rows."""
    rows = np.zeros((steps + 1, size), dtype=np.int64)
    arguments = [np.array([rows[i].ctypes.data, rows[i + 1].ctypes.data, size], dtype=np.int64) for i in range(steps)]
    count = [parts if i % 3 else 1 for i in range(steps)]  # some steps have fewer parts
    ranges = [[(size * k // n, size * (k + 1) // n) for k in range(n)] for n in count]
    expected = [rows[0]]
    with np.errstate(over="ignore"):
        for _ in range(steps):
            expected.append(3 * expected[-1][::-1] + np.arange(size))
    return rows, arguments, pool.table(list(zip([shift.address] * steps, arguments, ranges, strict=True))), expected


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_steps_of_a_table_run_in_order(parts):
    rows, _arguments, table, expected = chained(200, parts)
    for pause in (0, 0, 5 * pool.SPIN_SECONDS):  # after the pause, the workers are asleep
        rows[1:] = 0
        time.sleep(pause)
        pool.run_table(table)
        np.testing.assert_array_equal(rows, expected)


def test_workers_that_fall_asleep_within_a_table_are_woken():
    slow, words = 30_000_000, np.zeros(3, dtype=np.int64)  # takes longer than workers spin
    alone = np.array([words[:1].ctypes.data, slow], dtype=np.int64)
    both = np.array([words[1:].ctypes.data, 1], dtype=np.int64)
    table = pool.table([(count_up.address, a, r) for a, r in ((both, TWO), (alone, [(0, 1)])) for _ in range(2)])
    pool.run_table(table)
    np.testing.assert_array_equal(words, [2, 2, 2])
    pool.run_table(pool.table([(count_up.address, *row) for row in ((alone, [(0, 1)]), (both, TWO), (both, TWO))]))
    np.testing.assert_array_equal(words, [3, 4, 4])


def test_a_table_inside_a_task_or_while_the_pool_is_busy_runs_in_place():
    rows, _arguments, table, expected = chained(20, 2)
    errors = []

    def task(start, stop):
        try:
            if start == 1:
                pool.run_table(table)
        except BaseException as error:
            errors.append(error)

    pool.each(task, TWO)
    assert not errors
    np.testing.assert_array_equal(rows, expected)
