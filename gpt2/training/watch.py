"""Detects steps that take far too long: prints the stacks of every rank, and ends the job after a time limit."""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from gpt2.training.trainer import Trainer
from tinygrad2.distributed import Comm

POLL = 1.0  # seconds between checks
SLOW, LEAST = 20.0, 60.0  # a step is reported after SLOW times the median, but not before LEAST seconds
MEDIAN_OF = 100  # number of steps over which the median is computed
GRACE = 2.0  # seconds to wait for the other ranks' reports before the job ends
STDERR = 2  # the file descriptor


class Watch:
    """Watches the steps of this rank in a background thread. Use `with watch:` around training, and `with
    watch.step():` around each step.

    Each rank watches its own steps. If one rank hangs, the others wait in the same step, so every rank prints the
    stacks of its threads to standard error. A heartbeat cannot detect this, since it continues while a step hangs.
    (Code that never releases the GIL blocks this thread, but it also blocks the heartbeat, so the other ranks end the
    job.)

    end_after  if a step takes longer than this number of seconds, the job ends with status 1; 0 for never.
    describe   returns a sentence for that error message, such as the name of the last checkpoint.
    """

    def __init__(self, comm: Comm, end_after: float, describe: Callable[[], str] = lambda: ""):
        self._comm, self._end_after, self._describe = comm, end_after, describe
        self._durations: deque[float] = deque(maxlen=MEDIAN_OF)
        self._steps, self._running = 0, False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    @staticmethod
    def of(trainer: Trainer) -> Watch:
        """Create a watch with the options of a run."""
        return Watch(trainer.comm, trainer.options.hang_timeout, trainer.folder.last_checkpoint)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context manager around each step."""
        started, self._steps, self._running = time.monotonic(), self._steps + 1, True
        try:
            yield
        finally:
            self._running = False
            self._durations.append(time.monotonic() - started)

    def _limit(self) -> float:
        """Seconds after which a step is reported."""
        found = list(self._durations)
        return max(LEAST, SLOW * statistics.median(found)) if found else float("inf")

    def _watch(self) -> None:
        watched, elapsed, reported, last = 0, 0.0, False, time.monotonic()
        while not self._ending.wait(POLL):
            now = time.monotonic()
            gap, last = now - last, now
            if not self._running or self._steps != watched:
                watched, elapsed, reported = self._steps, 0.0, False
                continue
            elapsed += min(gap, 2 * POLL)  # exclude time during which the job was suspended
            limit = self._limit()
            ends = 0 < self._end_after <= elapsed
            if ends or (elapsed > limit and not reported):
                reported = True
                self._report(elapsed)
            if ends:
                time.sleep(GRACE)
                self._end(elapsed)

    def _rank(self) -> str:
        return f"rank {self._comm.rank}: " if self._comm.size > 1 else ""

    def _report(self, elapsed: float) -> None:
        found = list(self._durations)
        usual = f", and the median of the previous steps is {statistics.median(found):.2g} s" if found else ""
        with suppress(OSError):
            print(f"{self._rank()}this step has taken {elapsed:.0f} s{usual}. Stacks of its threads:", file=sys.stderr)
            sys.stderr.flush()
            faulthandler.dump_traceback(file=STDERR, all_threads=True)

    def _end(self, elapsed: float) -> None:
        with suppress(OSError, ValueError):
            line = f"a step has taken {elapsed:.0f} s, and --hang-timeout is {self._end_after:.0f}; ending the job"
            print(f"{self._rank()}error: {line}. {self._describe()}", file=sys.stderr, flush=True)
        self._comm.abort(1)
        os._exit(1)
