"""The web service for a model: its page, OpenAI's completions API, and protection from other web pages.

The service is for programs and browsers on this machine, but a page of another site that is open in the same browser
can also send requests to it. Each request must therefore name this host (which prevents DNS rebinding), must not have
the Origin of another site, and must be JSON if it has a body (which a form cannot send). There are no cookies.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gpt2.completions import (
    END,
    Answer,
    Piece,
    Request,
    RequestError,
    TokenInfo,
    Worker,
    parse_json,
    parse_request,
    pieces,
)
from gpt2.config import GPT2Config
from gpt2.model import GPT2
from gpt2.tokenizer import Tokenizer
from tinygrad2.checkpoint import JsonObject

BODY_BYTES, BODY_SECONDS, CONNECTIONS = 1 << 20, 10, 256
CHOICES = 10  # number of alternatives that the page shows for a token
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page has its own, stricter policy
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# inspect(tokens, prompt) returns the inspector's data; the first `prompt` tokens are the prompt.
Inspect = Callable[[Sequence[int], int], JsonObject]
FreeMemory = Callable[[], float]


class Service:
    """Answers requests about one model.

    name     the name of the model for clients.
    label    returns a token as the page displays it.
    inspect  see Inspect.
    memory   returns the free memory in bytes.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        name: str,
        worker: Worker,
        page: str,
        label: Callable[[int], str],
        inspect: Inspect,
        memory: FreeMemory,
    ):
        self.model, self.tokenizer, self.name, self.worker = model, tokenizer, name, worker
        self._page, self._label, self._inspect, self._memory = page, label, inspect, memory

    def app(self, hosts: Sequence[str]) -> Guard:
        """The ASGI application.

        hosts  the accepted values of the header Host, such as localhost:8000.
        """
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/generate", self.generate, methods=["POST"]),
            Route("/inspect", self.inspect, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {RequestError: failed, MemoryError: failed, HTTPException: failed, Exception: failed}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), hosts)

    async def page(self, request: HTTPRequest) -> Response:
        return HTMLResponse(self._page)

    async def health(self, request: HTTPRequest) -> Response:
        running, waiting = self.worker.load()
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def models(self, request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: HTTPRequest) -> Response:
        if (name := request.path_params["name"]) != self.name:
            raise RequestError(f"model is {name[:80]!r}; this server has {self.name!r}", "model", 404)
        return JSONResponse(self._model())

    def _model(self) -> JsonObject:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "tinygrad2"}

    async def completions(self, request: HTTPRequest) -> Response:
        """OpenAI's API: one response, or a stream of server-sent events."""
        asked = self._parse(await body_of(request))
        answer = Answer(asked, self.tokenizer, self.name)
        results = self._run(request, lambda: pieces(self.model, self.tokenizer, asked))
        if asked.stream:
            return StreamingResponse(events(results, answer, asked.usage), media_type="text/event-stream")
        async for piece in results:
            answer.add(piece)
        return JSONResponse(answer.whole())

    async def generate(self, request: HTTPRequest) -> Response:
        """Generate for the page: the response consists of lines of JSON, first the prompt, then each piece with the
        alternatives of its tokens."""
        values = await body_of(request)
        asked = self._parse({**values, "logprobs": CHOICES})
        if len(asked.prompts) > 1 or asked.n > 1 or asked.echo:
            raise RequestError("expected one prompt, n of 1, and no echo", "prompt")
        prompt = asked.prompts[0]
        kept = prompt[-self.model.config.n_positions :]
        head = {"prompt": kept, "dropped": len(prompt) - len(kept), "seed": asked.seed}
        results = self._run(request, lambda: pieces(self.model, self.tokenizer, asked))
        return StreamingResponse(lines(results, head, self._shown), media_type="application/x-ndjson")

    async def inspect(self, request: HTTPRequest) -> Response:
        """The inspector's data for a text: {"tokens": ids, "prompt": the number of prompt tokens}."""
        values = await body_of(request)
        tokens, prompt = values.get("tokens"), values.get("prompt", 0)
        if not isinstance(tokens, list) or not tokens:
            raise RequestError("tokens: expected a list of at least one id", "tokens")
        (tokens,) = self._parse({"prompt": tokens, "max_tokens": 0}).prompts
        if not isinstance(prompt, int) or isinstance(prompt, bool) or not 0 <= prompt <= len(tokens):
            raise RequestError(f"prompt: expected the number of prompt tokens, at most {len(tokens)}", "prompt")
        dropped = max(0, len(tokens) - self.model.config.n_positions)
        kept, given = tokens[dropped:], max(0, prompt - dropped)

        def compute() -> Iterator[object]:
            yield json.dumps(self._inspect(kept, given), separators=(",", ":"), allow_nan=False)

        async for result in self._run(request, compute):
            text = result
        return Response(text, media_type="application/json")

    def _parse(self, values: JsonObject) -> Request:
        """Parse a request. Raises RequestError if it is not valid, or needs more memory than is free."""
        config: GPT2Config = self.model.config
        asked = parse_request(values, self.model, self.tokenizer, self.name)
        longest = max(map(len, asked.prompts))
        parts = config.memory_to_generate(asked.n, longest, asked.max_tokens, self.model.precision.activation_bytes)
        if (need := sum(parts.values())) > (free := self._memory()):
            tokens = min(longest + asked.max_tokens, config.n_positions)
            raise RequestError(
                f"out of memory: {asked.n} choices of {tokens:,} tokens need {need / 1e9:,.2f} GB; {free / 1e9:,.2f} "
                "GB are free; request fewer choices or tokens",
                "n",
                503,
            )
        return asked

    def _shown(self, token: TokenInfo) -> JsonObject:
        """A token for the page. Each entry of "top" is an id, its label, its log-probability, and its complete
        characters."""
        top = [
            [i, self._label(i), logprob, self.tokenizer.decode_bytes([i]).decode("utf-8", "ignore")]
            for i, logprob in token.top
        ]
        return {"id": token.id, "label": self._label(token.id), "logprob": token.logprob, "top": top}

    def _run(self, request: HTTPRequest, start: Callable[[], Iterator[object]]) -> AsyncIterator[Any]:
        """Submit a job, and return an iterator over its results. The job is cancelled if the client disconnects.

        Raises RequestError if the worker is busy. The iterator raises the job's exceptions, and ClientDisconnect.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def deliver(result: object) -> None:
            with suppress(RuntimeError):  # the loop is closed if the server has stopped
                loop.call_soon_threadsafe(queue.put_nowait, result)

        job = self.worker.submit(start, deliver)
        watch = asyncio.create_task(disconnected(request))

        def gone(task: asyncio.Task[None]) -> None:
            job.cancel()
            queue.put_nowait(ClientDisconnect())

        watch.add_done_callback(gone)

        async def results() -> AsyncIterator[Any]:
            try:
                while (result := await queue.get()) is not END:
                    if isinstance(result, Exception):
                        raise result
                    yield result
            finally:
                watch.cancel()

        return results()


async def disconnected(request: HTTPRequest) -> None:
    """Wait until the client disconnects. The body must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def body_of(request: HTTPRequest) -> JsonObject:
    """The JSON object in the body. Raises RequestError if the body is too long, arrives too slowly, or is not valid."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > BODY_BYTES:
                    raise RequestError(f"the body is longer than {BODY_BYTES:,} bytes", status=413)
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {BODY_SECONDS} seconds", status=408) from None
    return parse_json(bytes(body))


async def events(results: AsyncIterator[Piece], answer: Answer, usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events. An error ends the stream; its event has the format of an error response."""
    try:
        async for piece in results:
            yield f"data: {json.dumps(answer.chunk(piece))}\n\n"
        if usage:
            yield f"data: {json.dumps(answer.last_chunk())}\n\n"
        yield "data: [DONE]\n\n"
    except (RequestError, ValueError, MemoryError) as error:
        yield f"data: {json.dumps(as_request_error(error).describe())}\n\n"


async def lines(
    results: AsyncIterator[Piece], head: JsonObject, shown: Callable[[TokenInfo], JsonObject]
) -> AsyncIterator[str]:
    """Yield lines of JSON for the page. An error is reported in the last line."""
    yield json.dumps(head) + "\n"
    try:
        async for piece in results:
            tokens = [*piece.tokens, *([piece.ending] if piece.ending else [])]
            yield json.dumps({"text": piece.text, "tokens": [*map(shown, tokens)], "finish": piece.finish}) + "\n"
    except (RequestError, ValueError, MemoryError) as error:
        yield json.dumps(as_request_error(error).describe()) + "\n"


def as_request_error(error: Exception) -> RequestError:
    """Convert any error to a RequestError, with a status and a message for the client."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, HTTPException):
        return RequestError(error.detail, status=error.status_code)
    if isinstance(error, MemoryError):
        return RequestError(f"out of memory: {error}; request fewer or shorter texts", status=503)
    return RequestError(f"{type(error).__name__}: {error}", status=500)


async def failed(request: HTTPRequest, error: Exception) -> Response:
    """The response to a request that raised an error."""
    converted = as_request_error(error)
    return JSONResponse(converted.describe(), converted.status)


Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """Rejects requests from other web pages, and adds HEADERS to every response."""

    def __init__(self, app: Any, hosts: Sequence[str]):
        self._app = app
        self._hosts = set(hosts)
        self._origins = {f"http://{host}" for host in hosts}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            rejected = self.rejection(HTTPRequest(scope))
            response = JSONResponse(rejected.describe(), rejected.status) if rejected else self._app
            with suppress(ClientDisconnect):
                await response(scope, receive, send_with_headers)

    def rejection(self, request: HTTPRequest) -> RequestError | None:
        """The reason for which a request is rejected, or None."""
        headers = request.headers
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            expected = ", ".join(sorted(self._hosts))
            return RequestError(f"the header Host is {str(hosts)[:80]}; expected one of {expected}", status=421)
        if not self._origins.issuperset(origins) or headers.get("sec-fetch-site", "none") not in (
            "none",
            "same-origin",
        ):
            return RequestError("requests from other web pages are rejected", status=403)
        media = headers.get("content-type", "").split(";")[0].strip().lower()
        if request.method == "POST" and media != "application/json":
            return RequestError(f"the header Content-Type is {media[:80]!r}; expected application/json", status=415)
        return None


class Server(uvicorn.Server):
    """A server that stops immediately on Ctrl-C. Open streams are closed, and the worker stops after its current
    token."""

    def __init__(self, app: Any, worker: Worker):
        super().__init__(
            uvicorn.Config(
                app,
                log_level="critical",
                access_log=False,
                server_header=False,
                ws="none",
                limit_concurrency=CONNECTIONS,
                timeout_graceful_shutdown=0,
            )
        )
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._worker.stop()
        super().handle_exit(sig, frame)


def serve(service: Service, listening: socket.socket) -> None:
    """Serve until the process is interrupted."""
    port = listening.getsockname()[1]
    app = service.app([f"127.0.0.1:{port}", f"localhost:{port}"])
    Server(app, service.worker).run(sockets=[listening])
