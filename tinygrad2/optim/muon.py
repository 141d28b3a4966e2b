"""Muon: orthogonalized momentum for the hidden layers' matrices, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tinygrad2.array import Array
from tinygrad2.distributed import Comm, SoloComm, Staging, all_gather
from tinygrad2.optim.adamw import AdamW
from tinygrad2.params import Bucket, HasParameters


@dataclass
class Block:
    """Columns first ... last - 1 of a matrix, which one rank orthogonalizes, and their start in the common buffer."""

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

    def direction(self, buffer: Array) -> Array:
        """The part of the flat buffer of all directions that belongs to this block."""
        return buffer[self.start : self.start + self.size].reshape(self.rows, self.last - self.first)


class Muon(AdamW):
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024). The math: `muon_momentum`, `orthogonalize` and
    `muon_step` in reference.py. Embeddings, gains and biases are updated by AdamW, with the same lr: updates of both
    kinds have the same size (arXiv:2502.16982).

    matrices  names of the parameters that Muon updates: the weights (in, out) of hidden layers. The value is the number
              of column blocks that are orthogonalized separately: 3 for queries, keys and values in one matrix, else 1.
    momentum  of Muon;  betas, eps  of AdamW.
    ranks     share the work: each orthogonalizes some of the blocks, and an all-gather distributes the results. Every
              block is computed by one call on one rank, so the result has the same bits on any number of ranks.
    """

    def __init__(
        self,
        model: HasParameters,
        matrices: Mapping[str, int],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        shared_by: Comm | None = None,
        ranks: Comm | None = None,
    ):
        self._require("momentum", momentum, 0 <= momentum < 1)
        self.matrices, self.momentum = dict(matrices), momentum
        self.ranks: Comm = shared_by or ranks or SoloComm()
        self._staging = Staging()
        self._blocks = self._divide(model)
        super().__init__(model, lr, betas, eps, weight_decay, shared_by)

    def state_names(self, parameter: str) -> tuple[str, ...]:
        return ("momentum_buffer",) if parameter in self.matrices else super().state_names(parameter)

    def update_all(self, scale: Array, lr: Array, step: Array) -> None:
        for part in self.parts:
            if part.state_names != ("momentum_buffer",):
                self.update(part, scale, lr, step)
        if self._blocks:
            directions = self._directions(scale)
            for block in self._blocks:
                value = block.of(self._arena.parameters[block.name].data)
                self.kernels.muon_step(value, block.direction(directions), scale, lr, self.weight_decay)
        self.gather_values([bucket for bucket in self._arena.buckets if not self.matrices.keys() >= set(bucket.names)])

    def _directions(self, scale: Array) -> Array:
        """A flat buffer of the orthogonalized momentum of all blocks, in the order of the ranks that computed them."""
        own = [block for block in self._blocks if block.rank == self.ranks.rank]
        directions = self._zeros(self._segment * self.ranks.size)
        for bucket in self._arena.buckets:
            if self.matrices.keys() & set(bucket.names):
                momentum = self._bucket_momentum(bucket, scale)
                for block in own:
                    if block.name in bucket.names:
                        start, stop = (bound - bucket.start for bound in bucket.region.where[block.name])
                        matrix = momentum[start:stop].reshape(block.rows, -1)
                        block.direction(directions)[...] = block.of(matrix)
        self.kernels.orthogonalize(*(block.direction(directions) for block in own))
        if self.ranks.size > 1:
            all_gather(self.ranks, self._arena.backend, [(directions, self._staging)])
        return directions

    def _bucket_momentum(self, bucket: Bucket, scale: Array) -> Array:
        """Update the momentum of the matrices in a bucket; returns the Nesterov momentum of the whole bucket."""
        momentum = self._zeros(bucket.stop - bucket.start)
        for part in self.parts:
            start, stop = max(part.start, bucket.start), min(part.stop, bucket.stop)
            if part.region is bucket.region and part.state_names == ("momentum_buffer",) and start < stop:
                buffer = part.state[0][start - part.start : stop - part.start]
                new = self.kernels.muon_momentum(part.region.grads[start:stop], buffer, scale, self.momentum)
                momentum[start - bucket.start : stop - bucket.start] = new
        if self.shared_by is not None:
            all_gather(self.shared_by, self._arena.backend, [(momentum, bucket.staging)])
        return momentum

    def _divide(self, model: HasParameters) -> list[Block]:
        """All blocks, distributed over the ranks: the most expensive first, one rank after the other."""
        blocks, parameters = [], dict(model.named_parameters())
        for name, n in self.matrices.items():
            if name not in parameters or parameters[name].ndim != 2:
                raise ValueError(f"Muon: {name} is not a matrix of the model")
            rows, columns = parameters[name].shape
            if n < 1 or columns % n:
                raise ValueError(
                    f"Muon: {name} is to be divided into {n} blocks; expected a divisor of its {columns} columns"
                )
            width = columns // n
            blocks += [Block(name, first, first + width, rows) for first in range(0, columns, width)]
        blocks.sort(key=lambda block: -block.size * min(block.rows, block.last - block.first))
        lengths = [0] * self.ranks.size
        for i, block in enumerate(blocks):
            block.rank = i % self.ranks.size
            block.start = lengths[block.rank]
            lengths[block.rank] += block.size
        self._segment = max(lengths)  # of the buffer, for each rank
        for block in blocks:
            block.start += block.rank * self._segment
        return blocks
