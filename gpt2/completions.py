"""Completions for concurrent clients: requests and responses of OpenAI's API, and the worker thread.

A single thread does all computation. It serves the running requests round-robin, one token at a time, so each text is
the same as if its request ran alone, no request waits for another to finish, and a cancelled request stops after its
current token. This module does not depend on the web framework; see serve.py.
"""

from __future__ import annotations

import codecs
import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from gpt2.generate import TextPieces, begin_id, check_sampling, end_ids, generate
from gpt2.language_model import LanguageModel
from gpt2.tokenizer import Tokenizer
from tinygrad2 import Tensor, no_grad
from tinygrad2.checkpoint import JsonObject

RUNNING, WAITING = 8, 64  # the maximum numbers of running and waiting requests
SECONDS = 600.0  # time limit from a request's arrival to its last token
MAX_TOKENS, MAX_CHOICES, MAX_PROMPTS, MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS = 8192, 16, 16, 4, 1000, 20
PROMPT_ROWS = 64  # number of prompt positions whose logits are computed at a time

T = TypeVar("T")

# Parameters of OpenAI's API that are not supported, and the values at which they have no effect.
WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}


class RequestError(ValueError):
    """A request that cannot be served.

    status  the status of the HTTP response.
    field   the name of the invalid field, if any.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400):
        super().__init__(message)
        self.field, self.status = field, status

    def describe(self) -> JsonObject:
        """The error in the format of OpenAI's API."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": None}}


# ---------------------------------------------------------------------------------------------------------------------
# A request
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """A request for continuations of one or more prompts. Lengths are in tokens.

    prompts      the ids of each prompt, at least one per prompt.
    n            the number of continuations per prompt.
    top_k        not part of OpenAI's API, like first_step; see `gpt2.generate.generate`.
    logprobs     the number of most probable tokens to report at each position, or None.
    echo         whether the continuations begin with the prompt.
    usage        whether a stream ends with the token counts.
    first_step   the number of the first sampling step.
    """

    prompts: list[list[int]]
    max_tokens: int = 16
    n: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: list[str] = field(default_factory=list)
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    usage: bool = False
    first_step: int = 0


def parse_json(body: bytes) -> JsonObject:
    """The JSON object in a request body. Raises RequestError if it is not valid."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise RequestError(f"the body is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise RequestError(f"the body is a JSON {type(value).__name__}; expected an object")
    return value


def parse_request(values: JsonObject, model: LanguageModel, tokenizer: Tokenizer, model_name: str) -> Request:
    """Parse a request in the format of OpenAI's API. Raises RequestError, which names the field, if a field is not
    valid."""
    fields = Fields(values)
    name = fields.text("model", model_name)
    if name != model_name:
        raise RequestError(f"model is {name[:80]!r}; this server has {model_name!r}", "model", 404)
    request = Request(
        prompts=_prompts(fields.take("prompt"), tokenizer, begin_id(model, tokenizer)),
        max_tokens=fields.integer("max_tokens", 16, 0, MAX_TOKENS),
        n=fields.integer("n", 1, 1, MAX_CHOICES),
        temperature=fields.number("temperature", 1.0),
        top_k=fields.optional("top_k", lambda name: fields.integer(name, 1, 1, 2**31)),
        top_p=fields.optional("top_p", lambda name: fields.number(name, 1.0)),
        seed=fields.integer("seed", secrets.randbits(32), 0, 2**64 - 1),
        stop=_stops(fields.take("stop")),
        logprobs=fields.optional("logprobs", lambda name: fields.integer(name, 0, 0, MAX_LOGPROBS)),
        echo=fields.flag("echo"),
        stream=fields.flag("stream"),
        usage=_usage(fields.take("stream_options")),
        first_step=fields.integer("first_step", 0, 0, 2**32 - 1),
    )
    fields.take("user")  # identifies the client's user; it has no effect
    fields.finish()
    try:
        check_sampling(request.temperature, request.top_k, request.top_p)
    except ValueError as error:
        raise RequestError(str(error), str(error).split()[0].replace("-", "_")) from None
    if (choices := request.n * len(request.prompts)) > MAX_CHOICES:
        raise RequestError(f"n is {request.n} for {len(request.prompts)} prompts: {choices} choices; expected at most "
                           f"{MAX_CHOICES}", "n")  # fmt: skip
    longest, n_positions = max(map(len, request.prompts)), model.config.n_positions
    if request.echo and request.logprobs is not None and longest > n_positions:
        raise RequestError(f"prompt has {longest:,} tokens; echo with logprobs needs at most {n_positions:,}", "prompt")
    return request


class Fields:
    """The fields of a JSON object. Each field is taken once. Errors name the field."""

    def __init__(self, values: JsonObject):
        self._values = dict(values)

    def take(self, name: str) -> Any:
        return self._values.pop(name, None)

    def optional(self, name: str, read: Callable[[str], T]) -> T | None:
        return self.take(name) if self._values.get(name) is None else read(name)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise RequestError(f"{name} is {_shown(value)}; expected an integer from {low} to {high:,}", name)
        return value

    def number(self, name: str, default: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e300 < value < 1e300:
            raise RequestError(f"{name} is {_shown(value)}; expected a number", name)
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool | None):
            raise RequestError(f"{name} is {_shown(value)}; expected true or false", name)
        return bool(value)

    def text(self, name: str, default: str) -> str:
        value = self.take(name)
        if not isinstance(value, str | None):
            raise RequestError(f"{name} is {_shown(value)}; expected a string", name)
        return default if value is None else value

    def finish(self) -> None:
        """Raise RequestError for a field that was not taken, unless its value has no effect."""
        for name, value in self._values.items():
            if name not in WITHOUT_EFFECT:
                raise RequestError(f"{name[:80]!r} is not a supported field", name[:80])
            if value not in WITHOUT_EFFECT[name]:
                raise RequestError(f"{name} is {_shown(value)}, which is not supported; omit it", name)


def _shown(value: object) -> str:
    return json.dumps(value)[:80] if not isinstance(value, int) or abs(value) < 10**40 else "too large"


def _prompts(value: object, tokenizer: Tokenizer, begin: int) -> list[list[int]]:
    """The ids of each prompt: a string, a list of strings, a list of ids, or a list of lists of ids."""
    several = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
    prompts: list[Any] = value if several else [value]  # type: ignore[assignment]
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"prompt is a list of {len(prompts):,} prompts; expected at most {MAX_PROMPTS}", "prompt")
    return [_prompt(one, tokenizer, begin) for one in prompts]


def _prompt(value: object, tokenizer: Tokenizer, begin: int) -> list[int]:
    if value is None or value == "" or value == []:
        return [begin]
    if isinstance(value, str):
        return tokenizer.encode_prompt(value).tolist() or [begin]
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise RequestError("prompt: expected a string, a list of strings, or lists of token ids", "prompt")
    outside = [i for i in value if not 0 <= i < tokenizer.vocab_size]
    if outside:
        raise RequestError(
            f"prompt has the id {_shown(outside[0])}; expected ids from 0 to {tokenizer.vocab_size - 1}", "prompt"
        )
    return value


def _stops(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise RequestError("stop: expected a non-empty string or a list of non-empty strings", "stop")
    if len(stops) > MAX_STOPS or max(map(len, stops), default=0) > MAX_STOP_LENGTH:
        raise RequestError(
            f"stop: expected at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters", "stop"
        )
    return stops


def _usage(value: object) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict) or not isinstance(value.get("include_usage", False), bool):
        raise RequestError("stream_options: expected an object with include_usage, true or false", "stream_options")
    return bool(value.get("include_usage"))


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of a response
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class TokenInfo:
    """A token of a text.

    start    the number of characters before it in the continuation (with `echo`, in the prompt and the continuation).
    logprob  the log-probability of the token in nats, at temperature 1 and over all tokens; None if not requested, and
             for the first token of a text, which is not predicted.
    top      the most probable tokens at this position with their log-probabilities, in descending order.
    """

    id: int
    start: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Piece:
    """A part of one continuation.

    choice  the index of the continuation: prompt * n + sample.
    text    the text of this part, which is final.
    tokens  the tokens whose text this piece completes.
    finish  why the continuation ends here: "stop" (an end-of-text token or a stop string), "length", or None.
    ending  the end-of-text token, if the model generated one; it is not part of the text.
    echo    whether this piece is the prompt.
    """

    choice: int
    text: str
    tokens: list[TokenInfo]
    finish: str | None = None
    ending: TokenInfo | None = None
    echo: bool = False


class Choice:
    """Converts the tokens of a continuation to pieces. Tokens are held back until their text is final.

    ends   the ids that end a text.
    start  the number of characters before the continuation.
    """

    def __init__(self, number: int, text: TextPieces, ends: Sequence[int], start: int = 0):
        self.number, self.text, self._ends = number, text, ends
        self._start, self._final = start, 0
        self._waiting: list[TokenInfo] = []

    def add(self, token: TokenInfo, last: bool) -> Piece | None:
        """Add a token. Returns the piece that it completes, or None.

        last  whether this is the last token.
        """
        token.start = self._start + self.text.decoded
        text = self.text.add(token.id)
        ending = token if token.id in self._ends else None
        if ending is None:
            self._waiting.append(token)
        finish = "stop" if self.text.ended else None
        if last and finish is None:
            text, finish = text + self.text.finish(), "length"
        self._final += len(text)
        ready: list[TokenInfo] = []
        if finish or not self.text.holding:
            ready, self._waiting = self._waiting, []
        if finish == "stop" and ending is None:  # a stop string and the text after it are removed
            ready = [token for token in ready if token.start < self._start + self._final]
        return Piece(self.number, text, ready, finish, ending) if text or ready or finish else None


def pieces(model: LanguageModel, tokenizer: Tokenizer, request: Request) -> Iterator[Piece | None]:
    """Yield the pieces of a request's continuations as they are generated, and None after a step that completes none.

    Raises MemoryError if the continuations need more memory than is free, and ValueError if the model's logits are not
    finite.
    """
    for i, prompt in enumerate(request.prompts):
        yield from _continuations(model, tokenizer, request, prompt, i * request.n)


def _continuations(
    model: LanguageModel, tokenizer: Tokenizer, request: Request, prompt: list[int], first: int
) -> Iterator[Piece | None]:
    """The pieces of the continuations of one prompt."""
    start = 0
    if request.echo:
        text = "" if prompt == [begin_id(model, tokenizer)] else tokenizer.decode(prompt)
        start = len(text)
        tokens = _prompt_tokens(model, tokenizer, prompt, request.logprobs)
        for i in range(request.n):
            yield Piece(first + i, text, tokens, None if request.max_tokens else "length", echo=True)
    elif not request.max_tokens:
        for i in range(request.n):
            yield Piece(first + i, "", [], "length")
    ends = end_ids(model, tokenizer)
    choices = [Choice(first + i, TextPieces(tokenizer, ends, request.stop), ends, start) for i in range(request.n)]
    if not request.echo:
        for choice in choices:
            choice.text.after(tokenizer.decode_bytes(prompt[-4:]))
    latest: list[np.ndarray] = []
    steps = generate(
        model,
        prompt,
        request.max_tokens,
        samples=request.n,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        seed=request.seed,
        vocab_size=tokenizer.vocab_size,
        never=tokenizer.unused_ids,
        first_step=request.first_step,
        on_logits=None if request.logprobs is None else latest.append,
    )
    for step, ids in enumerate(steps, 1):
        running = [choice for choice in choices if not choice.text.ended]
        rows = [choice.number - first for choice in running]
        infos = describe_tokens(latest.pop()[rows] if latest else None, ids[rows], request.logprobs)
        for choice, info in zip(running, infos, strict=True):
            yield choice.add(info, last=step == request.max_tokens)
        if all(choice.text.ended for choice in choices):
            return


def describe_tokens(logits: np.ndarray | None, ids: np.ndarray, count: int | None) -> list[TokenInfo]:
    """The tokens `ids` (B,) with their log-probabilities and the `count` most probable tokens, from logits (B, V)."""
    if logits is None or count is None:
        return [TokenInfo(int(i), 0) for i in ids]
    logp = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    logp -= np.log(np.exp(logp).sum(axis=-1, keepdims=True))
    found = []
    for i, row in zip(ids.tolist(), logp, strict=True):
        best = np.argpartition(-row, min(count, len(row) - 1))[:count]
        best = best[np.argsort(-row[best], kind="stable")]
        found.append(TokenInfo(i, 0, float(row[i]), [(int(j), float(row[j])) for j in best]))
    return found


def _prompt_tokens(
    model: LanguageModel, tokenizer: Tokenizer, prompt: list[int], logprobs: int | None
) -> list[TokenInfo]:
    """The tokens of a prompt. The first one has no log-probability."""
    tokens = [TokenInfo(i, 0) for i in prompt]
    if logprobs is not None and len(prompt) > 1:
        with no_grad():
            features = model.features(np.array([prompt[:-1]]))
            for at in range(0, len(prompt) - 1, PROMPT_ROWS):
                logits = model.head(Tensor(features.data[0, at : at + PROMPT_ROWS])).numpy()
                logits = logits[:, : tokenizer.vocab_size].astype(np.float32)
                following = np.array(prompt[at + 1 : at + 1 + len(logits)])
                tokens[at + 1 : at + 1 + len(logits)] = describe_tokens(logits, following, logprobs)
    decoder, start = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token in tokens:
        token.start = start
        start += len(decoder.decode(tokenizer.decode_bytes([token.id])))
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# The responses of OpenAI's API
# ---------------------------------------------------------------------------------------------------------------------


class Answer:
    """The response to one request: chunks of a stream, or one object with the complete text."""

    def __init__(self, request: Request, tokenizer: Tokenizer, model_name: str):
        self._request, self._tokenizer = request, tokenizer
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }
        self._parts: dict[int, list[Piece]] = {i: [] for i in range(request.n * len(request.prompts))}
        self._generated = 0

    def chunk(self, piece: Piece) -> JsonObject:
        """A chunk of the stream."""
        self._count(piece)
        return {**self._head, "choices": [self._choice(piece.choice, [piece])]}

    def add(self, piece: Piece) -> None:
        """Store a piece for `whole`."""
        self._count(piece)
        self._parts[piece.choice].append(piece)

    def whole(self) -> JsonObject:
        """The response that contains all pieces."""
        choices = [self._choice(i, parts) for i, parts in self._parts.items()]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def last_chunk(self) -> JsonObject:
        """The last chunk of a stream, with the token counts."""
        return {**self._head, "choices": [], "usage": self._usage()}

    def _count(self, piece: Piece) -> None:
        self._generated += 0 if piece.echo else len(piece.tokens) + (piece.ending is not None)

    def _usage(self) -> JsonObject:
        prompt = sum(map(len, self._request.prompts))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
        }

    def _choice(self, index: int, parts: Sequence[Piece]) -> JsonObject:
        tokens = [token for part in parts for token in part.tokens]
        return {
            "index": index,
            "text": "".join(part.text for part in parts),
            "logprobs": None if self._request.logprobs is None else self._logprobs(tokens),
            "finish_reason": next((part.finish for part in parts if part.finish), None),
        }

    def _logprobs(self, tokens: Sequence[TokenInfo]) -> JsonObject:
        name = self._name
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {name(i): logprob for i, logprob in token.top} if token.logprob is not None else None
                for token in tokens
            ],
            "text_offset": [token.start for token in tokens],
        }

    def _name(self, token: int) -> str:
        """A token in the format of OpenAI's API: its text, or "bytes:" and its bytes if they are not valid UTF-8."""
        data = self._tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


# ---------------------------------------------------------------------------------------------------------------------
# The worker
# ---------------------------------------------------------------------------------------------------------------------

END = object()  # delivered after the last result of a job


@dataclass(eq=False)
class Job:
    """A computation that consists of steps.

    start    starts the computation and returns an iterator over the results of its steps; called in the worker thread.
    deliver  called in the worker thread with every result, then with END or with the exception that ended it.
    """

    start: Callable[[], Iterator[object]]
    deliver: Callable[[object], None]
    deadline: float
    cancelled: bool = False
    steps: Iterator[object] | None = None

    def cancel(self) -> None:
        """Stop the job: no more steps are computed, and nothing more is delivered."""
        self.cancelled = True


class Worker:
    """The worker thread. It runs the active jobs round-robin, one step at a time.

    running, waiting  the maximum numbers of running and waiting jobs.
    seconds           the time limit of a job, counted from its submission; a job that exceeds it ends with an error.
    """

    def __init__(self, running: int = RUNNING, waiting: int = WAITING, seconds: float = SECONDS):
        self._limits, self._seconds = (running, waiting), seconds
        self._running: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="completions", daemon=True)
        self._thread.start()

    def submit(self, start: Callable[[], Iterator[object]], deliver: Callable[[object], None]) -> Job:
        """Add a job. Raises RequestError (429) if too many jobs are waiting."""
        job = Job(start, deliver, time.monotonic() + self._seconds)
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            if len(self._waiting) >= self._limits[1]:
                raise RequestError(f"{len(self._waiting)} requests are already waiting; try again later", status=429)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def load(self) -> tuple[int, int]:
        """The numbers of running and waiting jobs."""
        with self._changed:
            return len(self._running), sum(not job.cancelled for job in self._waiting)

    def stop(self) -> None:
        """Stop the thread after the current step. Unfinished jobs deliver no further results."""
        with self._changed:
            self._stopped = True
            self._changed.notify()

    def _work(self) -> None:
        while self._next_round():
            for job in list(self._running):
                if self._stopped:
                    return
                if not self._step(job):
                    with self._changed:
                        self._running.remove(job)

    def _next_round(self) -> bool:
        """Wait for jobs, and start as many as the limit allows. Returns False if the worker has been stopped."""
        with self._changed:
            while not (self._stopped or self._running or self._waiting):
                self._changed.wait()
            while self._waiting and len(self._running) < self._limits[0]:
                self._running.append(self._waiting.popleft())
            return not self._stopped

    def _step(self, job: Job) -> bool:
        """Compute one step of a job. Returns whether the job has more steps."""
        if job.cancelled:
            job.steps = None  # frees its memory
            return False
        try:
            if time.monotonic() > job.deadline:
                raise RequestError(f"not finished within {self._seconds:.0f} seconds; request fewer tokens", status=503)
            if job.steps is None:
                job.steps = job.start()
            result = next(job.steps, END)
        except Exception as error:
            result = error
        ended = result is END or isinstance(result, Exception)
        if ended:
            job.steps = None
        if not job.cancelled and result is not None:
            job.deliver(result)
        return not ended
