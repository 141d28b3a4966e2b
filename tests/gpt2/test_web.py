"""gpt2/web.py over real sockets: OpenAI's client, concurrent clients, disconnects, and requests from other pages."""

import http.client
import json
import math
import random
import resource
import socket
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer
from gpt2.completions import Worker
from gpt2.generate import stream_text

pytestmark = pytest.mark.extras("starlette", "uvicorn")

BYTES = Tokenizer.load("bytes")
NAME = "tiny"
POST = {"Content-Type": "application/json"}


def make_model():
    model = GPT2(GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=2, n_head=2), seed=2)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * 10  # far from uniform
    return model


def start_server(model, worker, **given):
    """Start a server in a thread of this process. Returns its server, port, thread, worker and model."""
    from gpt2 import web

    page = given.get("page", "<!doctype html><title>page</title>")
    service = web.Service(
        model, BYTES, NAME, worker, page, repr, lambda tokens, prompt: {"tokens": [*tokens], "prompt": prompt},
        given.get("memory", lambda: math.inf),
    )  # fmt: skip
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    server = web.Server(service.app([f"127.0.0.1:{port}", f"localhost:{port}"]), worker)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    return SimpleNamespace(server=server, port=port, thread=thread, worker=worker, model=model)


def stop_server(running):
    running.worker.stop()
    running.server.should_exit = True
    running.thread.join(timeout=10)
    assert not running.thread.is_alive()


@pytest.fixture(scope="module")
def running():
    running = start_server(make_model(), Worker(waiting=300))
    yield running
    stop_server(running)


def send(port, method="GET", path="/health", body=None, headers=None):
    """Send a request. Returns (status, headers, text)."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        data = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
        connection.request(method, path, data, {**(POST if method == "POST" else {}), **(headers or {})})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


def complete(port, **values):
    status, _, text = send(port, "POST", "/v1/completions", values)
    assert status == 200, text
    return json.loads(text)


def alone(model, prompt, max_tokens, **sampling):
    ids = BYTES.encode(prompt).tolist() or [BYTES.end_of_text]
    return "".join(piece for _, piece in stream_text(model, BYTES, ids, max_tokens, **sampling))


def wait_until_idle(worker, seconds=10):
    """Wait until the worker is idle."""
    until = time.monotonic() + seconds
    while worker.load() != (0, 0):
        assert time.monotonic() < until, worker.load()
        time.sleep(0.01)


# OpenAI's API --------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(running):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{running.port}/v1", api_key="none", max_retries=0)


@pytest.mark.extras("openai")
def test_the_client_gets_the_same_text_as_the_command_line(running, client):
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    found = client.completions.create(model=NAME, prompt="Hello", max_tokens=60, n=2, **sampling)
    expected = ["", ""]
    for i, piece in stream_text(running.model, BYTES, [*b"Hello"], 60, samples=2, **sampling):
        expected[i] += piece
    assert [choice.text for choice in found.choices] == expected
    assert found.usage.prompt_tokens == 5
    assert {choice.finish_reason for choice in found.choices} <= {"stop", "length"}
    chunks = list(client.completions.create(model=NAME, prompt="Hello", max_tokens=60, n=2, stream=True, **sampling))
    for i in range(2):
        assert "".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) == expected[i]
    assert len(chunks) > 10


@pytest.mark.extras("openai")
def test_the_client_gets_log_probabilities_stop_reasons_and_usage(client):
    found = client.completions.create(model=NAME, prompt="ab", max_tokens=8, logprobs=3, echo=True, seed=1)
    logprobs = found.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert all(len(top) == 3 for top in logprobs.top_logprobs[1:])
    text = found.choices[0].text[2:]
    stop = text[3:5]
    stopped = client.completions.create(model=NAME, prompt="ab", max_tokens=8, seed=1, stop=stop)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    *_, last = client.completions.create(
        model=NAME, prompt="ab", max_tokens=8, seed=1, stream=True, stream_options={"include_usage": True}
    )
    assert last.choices == []
    assert last.usage.completion_tokens == 8


@pytest.mark.extras("openai")
def test_the_client_lists_models_and_understands_errors(client):
    openai = pytest.importorskip("openai")
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="a")
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match=r"temperature is -1\.0") as wrong:
        client.completions.create(model=NAME, prompt="a", temperature=-1)
    assert wrong.value.param == "temperature"


def test_health(running):
    status, headers, text = send(running.port)
    assert (status, json.loads(text)) == (200, {"status": "ok", "running": 0, "waiting": 0})
    assert headers["Cache-Control"] == "no-store"
    assert "Set-Cookie" not in headers


# Rejected requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:PORT", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "localhost:PORT", "Origin": "http://localhost:PORT"}, 200),
        ({"Host": "LOCALHOST:PORT"}, 200),
        ({"Host": "rebound.example:PORT"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "http://rebound.example"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_requests_from_other_web_pages_are_rejected(running, headers, status):
    headers = {name: value.replace("PORT", str(running.port)) for name, value in headers.items()}
    body = {"prompt": "a", "max_tokens": 1}
    found, sent, text = send(running.port, "POST", "/v1/completions", body, headers)
    assert found == status, text
    assert "Access-Control-Allow-Origin" not in sent
    if status != 200:
        assert json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("GET", "/nowhere", None, 404, None),
        ("GET", "/v1/completions", None, 405, None),
        ("POST", "/health", {}, 405, None),
        ("GET", "/v1/models/other", None, 404, "model"),
        ("POST", "/v1/completions", "{", 400, None),
        ("POST", "/v1/completions", b" " * ((1 << 20) + 1), 413, None),
        ("POST", "/v1/completions", {"prompt": "a", "seed": "x"}, 400, "seed"),
        ("POST", "/v1/completions", {"prompt": "a", "stream": True, "n": 0}, 400, "n"),
        ("POST", "/generate", {"prompt": ["a", "b"]}, 400, "prompt"),
        ("POST", "/inspect", {"tokens": []}, 400, "tokens"),
        ("POST", "/inspect", {"tokens": [1, 999]}, 400, "prompt"),
        ("POST", "/inspect", {"tokens": [1, 2], "prompt": 3}, 400, "prompt"),
    ],
)
def test_the_error_for_invalid_input_names_the_field(running, method, path, body, status, field):
    found, _, text = send(running.port, method, path, body)
    assert found == status, text
    error = json.loads(text)["error"]
    assert (error["param"], error["type"]) == (field, "invalid_request_error")


def test_a_request_that_needs_more_than_the_free_memory_is_rejected():
    running = start_server(make_model(), Worker(), memory=lambda: 1000.0)
    status, _, text = send(running.port, "POST", "/v1/completions", {"prompt": "a", "n": 4})
    assert status == 503
    assert json.loads(text)["error"]["message"].startswith("out of memory: 4 choices of 17 tokens need")
    stop_server(running)


def test_a_damaged_model_ends_the_stream_with_an_error():
    model = make_model()
    model.parameters().__next__().data[:] = math.nan
    running = start_server(model, Worker())
    status, _, text = send(running.port, "POST", "/v1/completions", {"prompt": "a"})
    assert status == 500
    assert "logits are not finite" in text
    status, _, text = send(running.port, "POST", "/v1/completions", {"prompt": "a", "stream": True})
    assert status == 200
    assert text.startswith('data: {"error": {"message": "ValueError: generate: the model')
    assert "[DONE]" not in text
    stop_server(running)


# Requests of the page ------------------------------------------------------------------------------------------------


def test_the_page_gets_tokens_with_alternatives(running):
    sampling = {"temperature": 0.8, "seed": 4}
    status, _, text = send(running.port, "POST", "/generate", {"prompt": "é", "max_tokens": 20, **sampling})
    assert status == 200
    head, *pieces = map(json.loads, text.splitlines())
    assert head == {"prompt": [0xC3, 0xA9], "dropped": 0, "seed": 4}
    assert "".join(piece["text"] for piece in pieces) == alone(running.model, "é", 20, **sampling)
    tokens = [token for piece in pieces for token in piece["tokens"]]
    assert all(len(token["top"]) == 10 for token in tokens)
    assert pieces[-1]["finish"] == "length"
    status, _, text = send(running.port, "POST", "/inspect", {"tokens": [*range(70)], "prompt": 68})
    assert json.loads(text) == {"tokens": [*range(6, 70)], "prompt": 62}


def test_the_start_of_an_overlong_prompt_is_dropped(running):
    status, _, text = send(running.port, "POST", "/generate", {"prompt": "a" * 100_000, "max_tokens": 1})
    assert status == 200
    head = json.loads(text.splitlines()[0])
    assert (len(head["prompt"]), head["dropped"]) == (64, 99_936)


# Disconnects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_ends_the_request(running, stream):
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    values = {"prompt": "a", "max_tokens": 8192, "n": 4, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(values), POST)
    while running.worker.load() == (0, 0):
        time.sleep(0.005)
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    connection.close()
    wait_until_idle(running.worker, seconds=5)


def test_too_many_requests_get_status_429():
    running = start_server(make_model(), Worker(running=1, waiting=1))
    values = {"prompt": "a", "max_tokens": 8192, "stream": True}
    held = []
    for expected in ((1, 0), (1, 1)):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        connection.request("POST", "/v1/completions", json.dumps(values), POST)
        held.append(connection)
        while running.worker.load() != expected:
            time.sleep(0.005)
    status, _, text = send(running.port, "POST", "/v1/completions", values)
    assert status == 429
    assert json.loads(text)["error"]["type"] == "rate_limit_error"
    for connection in held:
        connection.close()
    wait_until_idle(running.worker)
    stop_server(running)


# Concurrent requests -------------------------------------------------------------------------------------------------

WRONG = ({"n": 0}, {"temperature": "x"}, {"max_tokens": -1}, {"prompt": [999]}, {"surprise": 1})


def one_of_many(running, i):
    """Send request i. A fifth of all requests disconnect, a tenth are invalid, and half of the others are streamed."""
    rng = random.Random(i)
    prompt = "".join(rng.choices("abc é☃ \n", k=rng.randint(0, 80)))
    sampling = {"temperature": rng.choice([0, 0.7, 1.0]), "seed": i}
    values = {"prompt": prompt, "max_tokens": rng.randint(1, 90), **sampling, "stream": i % 2 == 0}
    if i % 10 == 3:
        wrong = WRONG[i // 10 % len(WRONG)]
        status, _, text = send(running.port, "POST", "/v1/completions", {**values, **wrong})
        error = json.loads(text)["error"]
        assert (status, error["param"]) == (400, next(iter(wrong)))
    elif i % 5 == 1:
        with closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)) as connection:
            connection.request("POST", "/v1/completions", json.dumps({**values, "max_tokens": 8000}), POST)
            time.sleep(rng.random() / 10)
    else:
        status, _, text = send(running.port, "POST", "/v1/completions", values)
        assert status == 200, text
        if values["stream"]:
            *events, done = [line for line in text.split("\n\n") if line]
            assert done == "data: [DONE]"
            found = "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)
        else:
            found = json.loads(text)["choices"][0]["text"]
        assert found == alone(running.model, prompt, values["max_tokens"], **sampling)


def crowd(running, requests, at_once):
    """Send many requests, `at_once` of them concurrently. Returns the error messages."""
    numbers, errors, lock = iter(range(requests)), [], threading.Lock()

    def client():
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            try:
                one_of_many(running, i)
            except Exception as error:
                errors.append(f"request {i}: {type(error).__name__}: {error}")

    clients = [threading.Thread(target=client) for _ in range(at_once)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    return errors


def test_many_concurrent_requests_get_correct_texts(running):
    assert crowd(running, 30, 6) == []
    wait_until_idle(running.worker)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_requests(running):
    assert crowd(running, 200, 20) == []
    wait_until_idle(running.worker)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        assert crowd(running, 200, 20) == []
    wait_until_idle(running.worker)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB, server and clients together
    assert grown < 16 * 1024
