"""Try a model in the browser: write a prompt, watch the text, choose another token, and continue from there.

Next to the text, the page shows the inspector. OpenAI's completions API is served at /v1. The server is accessible only
on this machine: it listens on 127.0.0.1 and rejects requests from other web pages. Ctrl-C stops it.
"""

from __future__ import annotations

from gpt2 import console  # first, so that Ctrl-C during the other imports exits silently

# isort: split
import argparse
import errno
import math
import socket
import sys
import webbrowser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from gpt2 import decode, device_options
from gpt2.completions import Worker
from gpt2.console import Parser, visible
from gpt2.formats.model_file import default_model, find_model
from gpt2.generate import begin_id, generate
from gpt2.inspection import Vocabulary, inspect
from gpt2.model import GPT2
from gpt2.page import page, resource
from gpt2.tokenizer import Tokenizer
from tinygrad2 import machine
from tinygrad2.checkpoint import JsonObject

HOST, PORT = "127.0.0.1", 8000


def command_line() -> Parser:
    parser = Parser("python -m gpt2.serve", __doc__)
    group = parser.add_argument_group("server")
    group.add_argument("--port", type=int, default=PORT, metavar="N", help="port on 127.0.0.1; 0 selects a free one")
    group.add_argument("--open", action="store_true", help="open the page in the browser")
    group = parser.add_argument_group("model and device")
    group.add_argument(
        "--checkpoint", metavar="MODEL", help="a model, as in sample.py --help [default: checkpoint/, then out/]"
    )
    device_options.add(group)
    device_options.add_dtype(group)
    decode.add_option(group)
    return parser


@console.command("gpt2.serve")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command until Ctrl-C. Returns its exit status: 0; 1 if it cannot start; 2 for an invalid option."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 2**16:
        parser.error(f"--port is {options.port}; expected 0 to 65535")
    if options.checkpoint == "":
        parser.error("--checkpoint is empty; expected a model")
    device_options.set_threads(parser, options)
    web = web_module()
    with listen(options.port) as listening:
        load_and_serve(web, options, listening.getsockname()[1], listening)
    return 0


def web_module() -> ModuleType:
    """The module gpt2.web. Raises ValueError if the server library is not installed."""
    try:
        from gpt2 import web
    except ImportError as error:
        raise ValueError(f'{error.name} is not installed; pip install -e ".[serve]"') from None
    return web


def listen(port: int) -> socket.socket:
    """A socket that listens on a port of this machine. Raises OSError, which names the port, if this is not
    possible."""
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} of {HOST} is in use; --port 0 selects a free one") from None
        raise OSError(f"port {port} of {HOST}: {error.strerror}; choose another --port") from None


def load_and_serve(web: ModuleType, options: argparse.Namespace, port: int, listening: socket.socket) -> None:
    """Load the model and serve it until the process is interrupted."""
    model, tokenizer, name = load_model(options)
    decode.set_decode(model, options.decode)
    vocabulary = Vocabulary(tokenizer, model.config.vocab_size)
    worker = Worker()
    served = web.Service(
        model,
        tokenizer,
        name,
        worker,
        page=live_page(model, name),
        label=vocabulary.label,
        inspect=partial(inspect, model, tokenizer, name=name),
        memory=lambda: (model.backend.memory() or machine.memory() or (math.inf,))[0],
    )
    # Generating two tokens calls all kernels, so they are compiled before the first request, while the page opens.
    worker.submit(lambda: generate(model, [begin_id(model, tokenizer)], 2), lambda result: None)
    url = f"http://{HOST}:{port}"
    console.say(f"{url} serves the page, {url}/v1 OpenAI's API; Ctrl-C stops the server")
    if options.open:
        webbrowser.open(url)
    try:
        web.serve(served, listening)
    except KeyboardInterrupt:
        console.print_error("stopped")


def load_model(options: argparse.Namespace) -> tuple[GPT2, Tokenizer, str]:
    """Load the model that the options select. Returns the model, its tokenizer, and its name for clients."""
    say = console.print_error
    folder = find_model(Path(options.checkpoint), say) if options.checkpoint else default_model(say)
    if folder is None:
        raise ValueError("no trained model in checkpoint/ or out/; train one (python train.py), or pass --checkpoint")
    model = GPT2.from_pretrained(folder, device=options.device, dtype=options.dtype)
    tokenizer = Tokenizer.for_model(folder, model.config.vocab_size)
    console.say(f"model: {folder}, {model.config.summary()}, {model.n_parameters():,} parameters")
    return model, tokenizer, visible(options.checkpoint or str(folder))


def live_page(model: GPT2, name: str) -> str:
    """The server's page: the playground, with the inspector next to it."""
    about: JsonObject = {"name": name, "context": model.config.n_positions}
    body = resource("serve.html").replace("<!-- inspector -->", resource("inspect.html"))
    style, script = (resource(f"inspect.{kind}") + resource(f"serve.{kind}") for kind in ("css", "js"))
    return page(f"{name}: a language model", body, style, script, about, live=True)


if __name__ == "__main__":
    sys.exit(console.run(main))
