"""Ranks as threads of one process, for tests of what the ranks compute."""

import threading
from concurrent.futures import Future
from contextlib import nullcontext

import numpy as np

from tinygrad2.distributed import share


class ThreadComm:
    """A rank that is a thread of this process."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self.waited, self.idle_cores = rank, size, 0.0, 0
        self._board, self._barrier = board, barrier
        self.log = []

    def _exchange(self, value):
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values

    def nccl(self, device):
        return None

    def from_root(self, function):
        return self._exchange(function() if self.rank == 0 else None)[0]

    def all_gather(self, array):
        return np.stack(self._exchange(array.copy()))

    def gather_shares(self, own, whole):
        shares = self._exchange(own.copy())
        assert (whole is None) == (self.rank != 0)
        if whole is not None:
            whole[...] = np.concatenate(shares)

    def start_sum(self, flat, share_only, after):
        after()
        self.log.append(len(flat))
        total = self.all_gather(flat).sum(axis=0)
        own = slice(*share(len(flat), self.rank, self.size)) if share_only else slice(None)
        flat[own] = total[own]
        return self._done()

    def start_all_gather(self, flat, after):
        after()
        flat[:] = np.concatenate(self._exchange(flat[slice(*share(len(flat), self.rank, self.size))].copy()))
        return self._done()

    def _done(self):
        done = Future()
        done.set_result(None)
        return done

    def waiting(self):
        return nullcontext()

    def silence_other_ranks(self):
        pass

    def abort(self, code):
        self._barrier.abort()


def on_ranks(size, function):
    """Run function(comm) for all ranks concurrently. Returns the results by rank."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=20)
    results, errors = [None] * size, []

    def work(rank):
        try:
            results[rank] = function(ThreadComm(rank, size, board, barrier))
        except Exception as error:
            errors.append(error)
            barrier.abort()

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return results
