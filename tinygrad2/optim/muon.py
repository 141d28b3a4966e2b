"""Muon: orthogonalized momentum for the hidden layers' matrices, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Mapping

from tinygrad2.array import Array
from tinygrad2.distributed import Comm, SoloComm, all_gather
from tinygrad2.optim.adamw import AdamW
from tinygrad2.optim.matrix_blocks import MatrixBlocks
from tinygrad2.params import Bucket, HasParameters


class Muon(AdamW):
    """Momentum orthogonalized by Newton-Schulz iterations (Jordan et al. 2024). For the math, see `muon_momentum`,
    `orthogonalize` and `muon_step` in reference.py. Embeddings, gains and biases are updated by AdamW. The lr is the
    same, since both kinds of updates have the same size (arXiv:2502.16982).

    matrices    the parameters that Muon updates, by name: the weights (in, out) of hidden layers. The value is the
                number of column blocks that are orthogonalized separately: 3 if a matrix contains queries, keys and
                values, otherwise 1.
    momentum    decay rate of Muon's momentum.
    betas, eps  as in AdamW.
    ranks       the ranks that share the orthogonalization; see MatrixBlocks.
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
        self._blocks = MatrixBlocks(model, matrices, shared_by or ranks or SoloComm())
        super().__init__(model, lr, betas, eps, weight_decay, shared_by)

    def state_names(self, parameter: str) -> tuple[str, ...]:
        return ("momentum_buffer",) if parameter in self.matrices else super().state_names(parameter)

    def update_all(self, scale: Array, lr: Array, step: Array) -> None:
        for part in self.parts:
            if part.state_names != ("momentum_buffer",):
                self.update(part, scale, lr, step)
        blocks = self._blocks.map(self._arena, lambda bucket: self._momentum(bucket, scale), self.kernels.orthogonalize)
        for matrix, direction in blocks:
            self.kernels.muon_step(matrix, direction, scale, lr, self.weight_decay)
        self.gather_values([bucket for bucket in self._arena.buckets if not self.matrices.keys() >= set(bucket.names)])

    def _momentum(self, bucket: Bucket, scale: Array) -> Array:
        """Update the momentum of the matrices in a bucket. Returns the Nesterov momentum of the entire bucket."""
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
