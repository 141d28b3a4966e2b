"""Optimizer updates of whole matrices, divided among the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from tinygrad2.array import Array
from tinygrad2.distributed import Comm, Staging, all_gather
from tinygrad2.params import Bucket, HasParameters, ParameterArena


@dataclass
class Block:
    """Columns first ... last - 1 of a matrix, the rank that computes them, and their offset in the results buffer."""

    name: str
    first: int
    last: int
    rows: int
    rank: int = 0
    start: int = 0

    @property
    def size(self) -> int:
        return self.rows * (self.last - self.first)

    def of(self, matrix: Array) -> Array:
        """These columns of a matrix."""
        return matrix[:, self.first : self.last]

    def result(self, buffer: Array) -> Array:
        """This block's part of the flat buffer that contains all results."""
        return buffer[self.start : self.start + self.size].reshape(self.rows, self.last - self.first)


class MatrixBlocks:
    """Blocks of columns of a model's matrices. Each block is computed by one call on one rank, and an all-gather
    distributes the results, so they are bitwise identical on any number of ranks.

    matrices  the number of blocks of each matrix, by name.
    """

    def __init__(self, model: HasParameters, matrices: Mapping[str, int], ranks: Comm):
        self._ranks, self._staging = ranks, Staging()
        parameters = dict(model.named_parameters())
        blocks: list[Block] = []
        for name, n in matrices.items():
            if name not in parameters or parameters[name].ndim != 2:
                raise ValueError(f"Muon: {name} is not a matrix of the model")
            rows, columns = parameters[name].shape
            if n < 1 or columns % n:
                raise ValueError(
                    f"Muon: {name} cannot be divided into {n} blocks; expected a divisor of its number of columns, "
                    f"{columns}"
                )
            width = columns // n
            blocks += [Block(name, first, first + width, rows) for first in range(0, columns, width)]
        blocks.sort(key=lambda block: -block.size * min(block.rows, block.last - block.first))
        lengths = [0] * ranks.size
        for i, block in enumerate(blocks):  # assigned round-robin to the ranks, the most expensive first
            block.rank = i % ranks.size
            block.start = lengths[block.rank]
            lengths[block.rank] += block.size
        self._segment = max(lengths)  # the length of each rank's part of the buffer
        for block in blocks:
            block.start += block.rank * self._segment
        self._blocks = blocks

    def map(
        self, arena: ParameterArena, inputs: Callable[[Bucket], Array], function: Callable[..., None]
    ) -> Iterator[tuple[Array, Array]]:
        """Yield each block's values (a view) and its result.

        inputs    returns the flat input array of a bucket; all ranks call it.
        function  is called with the blocks of this rank, and replaces each by its result.
        """
        own = [block for block in self._blocks if block.rank == self._ranks.rank]
        names = {block.name for block in self._blocks}
        results = arena.backend.zeros((self._segment * self._ranks.size,), arena.dtype)
        for bucket in arena.buckets:
            if names & set(bucket.names):
                flat = inputs(bucket)
                for block in own:
                    if block.name in bucket.names:
                        start, stop = (bound - bucket.start for bound in bucket.region.where[block.name])
                        block.result(results)[...] = block.of(flat[start:stop].reshape(block.rows, -1))
        function(*(block.result(results) for block in own))
        if self._ranks.size > 1 and self._blocks:
            all_gather(self._ranks, arena.backend, [(results, self._staging)])
        for block in self._blocks:
            yield block.of(arena.parameters[block.name].data), block.result(results)
