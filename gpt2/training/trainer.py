"""The training step, evaluation and checkpoints, for any LanguageModel. The loop is in train.py."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from gpt2.training.bad_step import Batch, LaunchedStep, Span, explain_step, too_many
from gpt2.training.dataset import SampleOrder, TokenDataset
from gpt2.training.evaluation import evaluate_task, mean_loss
from gpt2.training.options import Options
from gpt2.training.run import Progress, RunFolder, RunOptions
from gpt2.training.tasks import Questions
from tinygrad2 import Key, optim
from tinygrad2.array import Array
from tinygrad2.checkpoint import JsonObject
from tinygrad2.gradient_sum import GradientSum
from tinygrad2.profiler import Profiler

COMPARE_INTERVAL = 100  # steps between checks that the parameters of all ranks are equal
SHOW_AFTER = 2.0  # seconds before a step or an evaluation shows its progress


class Trainer:
    """A model in training.

    model, optimizer, options     a LanguageModel, its optimizer, and the options of train.py.
    train, validation, tokenizer  the data.
    folder                        the out-dir, for checkpoints; its `comm` connects the ranks of the job.
    progress                      the counters of the run, updated by every step.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: optim.Optimizer,
        options: Options,
        data: tuple[TokenDataset, TokenDataset, Tokenizer],
        folder: RunFolder,
        progress: Progress,
    ):
        self.model, self.optimizer, self.options = model, optimizer, options
        self.train, self.validation, self.tokenizer = data
        self.folder, self.comm, self.progress = folder, folder.comm, progress
        self.gradient_sum = GradientSum(model, self.comm, share_only=options.zero)
        self.order = SampleOrder(self.train.windows(options.block_size), options.seed)
        self.first_step = progress.step + 1  # the first step after this start
        self.profiler = Profiler(model.backend) if options.profile else None
        self.stopping = False  # whether a rank was requested to stop
        self.loss_before: float | None = None  # the validation loss before the first step of a new run
        self._launched: deque[LaunchedStep] = deque()  # steps whose loss has not arrived from the device yet
        self.first_skipped: int | None = None  # the first step that was skipped since this start
        self.explanation: list[str] = []  # the reason why it was skipped
        cuda = model.backend.cuda
        self._peak = cuda.peak(model.precision) if cuda else None  # TFLOP/s, if known
        self._started = time.perf_counter()
        self._mark, self._waited = model.backend.timestamp(), self.comm.waited
        self._spans: list[Span] = []  # spans of time of the step that is being launched

    def step(self, stop_requested: Callable[[], bool] = lambda: False) -> bool:
        """Launch one step. Returns whether it was completed. `finished_steps` returns its loss, since on a GPU the host
        does not wait for the loss here.
        stop_requested  returns whether this rank is requested to stop; called after each micro-step. If any rank is,
                        `stopping` is set on all ranks, and an incomplete step is discarded.
        """
        # The first step also compiles and allocates, so it is not profiled.
        with self.profiler if self.profiler and self.progress.step >= self.first_step else nullcontext():
            # 1. Forward and backward: the gradients of the mean loss are summed over the micro-steps and the ranks.
            if (summed := self.accumulate_gradients(stop_requested)) is None:
                self.optimizer.zero_grad()
                self.stopping = True
                return False
            loss, step_tokens, stopping = summed
            # Receive the previous losses before the weights change again, to examine a skipped step with its weights.
            for launched in self._launched:
                self._receive(launched)
            # 2. The learning rate of this step.
            self.optimizer.lr = self.options.learning_rate_at(self.progress.step)
            # 3. Clip by the global norm, and update the parameters.
            before = self.model.backend.timestamp()
            norm = self.optimizer.step(max_norm=self.options.grad_clip or None, loss=loss)
            self.optimizer.zero_grad()
            self._spans.append((self._mark, end := self.model.backend.timestamp()))
            pending = self.model.backend.fetch(loss, norm)
        self.stopping = bool(stopping)
        samples = self.progress.samples
        self.progress.step += 1
        self.progress.samples += self.options.micro_steps(self.comm.size) * self.comm.size * self.options.batch_size
        self.progress.tokens += int(step_tokens)
        counts, waited = (int(step_tokens), self.progress.tokens), self.comm.waited - self._waited
        step = self.progress.step, samples, self.optimizer.lr, *counts, pending, self._spans, waited, (before, end)
        self._launched.append(LaunchedStep(*step))
        self._mark, self._spans, self._waited = end, [], self.comm.waited
        if self.progress.step == self.first_step or self.progress.step % COMPARE_INTERVAL == 0:
            self.model.arena().check_equal(self.comm)
        return True

    def accumulate_gradients(self, stop_requested: Callable[[], bool]) -> tuple[Array | float, float, float] | None:
        """Accumulate the gradients of the step's mean loss. Returns the mean loss and the number of tokens over all
        ranks, and the number of ranks requested to stop; None if that was before the last micro-step."""
        options, rank, size = self.options, self.comm.rank, self.comm.size
        micro_steps = options.micro_steps(size)
        share = 1 / (micro_steps * size)
        loss: Array | float = 0.0
        hidden = True if rank or micro_steps == 1 else None  # for tqdm, None means shown on a terminal
        for micro in tqdm(range(micro_steps), "micro-steps", leave=False, delay=SHOW_AFTER, disable=hidden):
            if micro and self.comm.all_gather(np.array(stop_requested())).any():
                return None
            batch = self.batch(self.progress.step, self.progress.samples, micro * size + rank)
            if micro == micro_steps - 1:
                self.gradient_sum.start()  # the all-reduce of complete gradients overlaps with the backward pass
            loss = loss + share * self.model.backward(batch.tokens, batch.targets, batch.key, share)
        own_tokens = micro_steps * options.batch_size * options.block_size
        mean_loss, step_tokens, stopping = self.gradient_sum.finish(loss, own_tokens, stop_requested())
        return mean_loss, step_tokens, stopping

    def batch(self, step: int, samples: int, position: int) -> Batch:
        """The batch at a position in the global batch of the step that follows `step` steps and `samples` samples."""
        first_sample = position * self.options.batch_size
        indices = self.order.indices(samples + first_sample, self.options.batch_size)
        tokens, targets = self.train.batch(indices, self.options.block_size)
        return Batch(Key(self.options.seed, step, first_sample), tokens, targets)

    def finished_steps(self, wait: bool) -> Iterator[JsonObject]:
        """Yield a log row for each step whose loss has arrived: on a GPU one step later, unless `wait` is set.

        If the optimizer skipped the step because its loss or gradient norm is not finite, the row has "skipped".
        `explanation` describes the cause in the first skipped step.
        Raises ValueError after `max_bad_steps` consecutive skipped steps.
        """
        while self._launched and (wait or len(self._launched) > 1 or self._launched[0].result.ready()):
            launched = self._launched.popleft()
            self._receive(launched)
            row = launched.row(self.model.backend, profiled=self.profiler is not None)
            if self._peak is not None:
                flops = row["tokens_per_s"] * self.model.config.flops_per_token(self.options.block_size)
                row["mfu"] = round(flops / (self._peak * 1e12 * self.comm.size), 4)  # each rank has its own GPU
            self.progress.seconds += row["seconds"]
            yield row
            if self.progress.bad_steps >= self.options.max_bad_steps:
                raise ValueError(too_many(self, launched))

    def _receive(self, launched: LaunchedStep) -> None:
        """Wait for the loss and the norm of a step, which are the same on all ranks. If it was skipped, explain it."""
        if launched.numbers is not None:
            return
        launched.numbers = tuple(launched.result.get())
        finite = all(map(math.isfinite, launched.numbers))
        self.progress.bad_steps = 0 if finite else self.progress.bad_steps + 1
        if not finite and self.first_skipped is None:
            self._spans.append((self._mark, self.model.backend.timestamp()))  # excludes the explanation
            self.first_skipped, self.explanation = launched.step, explain_step(self, launched)
            self._mark = self.model.backend.timestamp()

    def elapsed(self) -> float:
        """Seconds since this start."""
        return time.perf_counter() - self._started

    def restart_clock(self) -> None:
        """Start timing the next step now, so that evaluation and checkpoints are not included."""
        self._mark, self._waited, self._spans = self.model.backend.timestamp(), self.comm.waited, []
        if self.progress.step < self.first_step:
            self._started = time.perf_counter()

    def validation_loss(self) -> float:
        """The mean loss on the first --eval-iters batches of the validation split, in nats per token."""
        sizes = self.options.batch_size, self.options.block_size, self.options.eval_iters
        return mean_loss(self.model, self.validation, *sizes, self.comm, SHOW_AFTER)

    def evaluate(self, questions: Questions) -> dict[str, float]:
        """Compute the validation loss `val_loss` and the metrics of the tasks, and update `progress.best`."""
        found = {"val_loss": self.validation_loss()}
        for task, items in questions:
            results = evaluate_task(task, self.model, self.tokenizer, items, self.options.batch_size, self.comm)
            found |= {f"{task.name}_{key}": result for key, result in results.items()}
        best = self.progress.best
        if math.isfinite(found["val_loss"]) and (best is None or found["val_loss"] < best["val_loss"]):
            self.progress.best = {"step": self.progress.step, "val_loss": found["val_loss"]}
        return found

    def save(self, run_options: RunOptions) -> Path:
        """Write a checkpoint: the model, the optimizer state, and the options for a resumed run."""
        state = self.model, self.optimizer, self.tokenizer, self.progress
        return self.folder.save(*state, run_options, self.train.fingerprint)
