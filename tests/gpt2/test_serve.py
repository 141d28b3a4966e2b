"""gpt2/serve.py: the command in a separate process, and its page in a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer, serve
from gpt2.generate import stream_text
from tests.browsing import HOSTILE

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
SERVER = pytest.mark.extras("starlette", "uvicorn")
IN_BROWSER = pytest.mark.extras("starlette", "uvicorn", "playwright")


def save_model(folder, broken=False):
    model = GPT2(GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    if broken:
        dict(model.named_parameters())["wte.weight"].data[3, 5] = np.nan
    model.save_pretrained(folder)
    Tokenizer.load("bytes").save(folder)
    return folder


def start(*options, cwd=ROOT):
    """Start a server. Returns the process and its address."""
    command = [sys.executable, "-m", "gpt2.serve", "--port", "0", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs of a shell ignore SIGINT
    process = subprocess.Popen(command, **pipes, env=ENV, cwd=cwd, preexec_fn=reset)
    for line in process.stdout:
        if address := re.search(r"http://[\w.:]+", line):
            return process, address[0]
    raise AssertionError(process.stderr.read())


def end(process):
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def run(capsys, *options, code):
    try:
        status = serve.main(list(options))
    except SystemExit as ended:
        status = ended.code
    assert status == code
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    return line


# The command ---------------------------------------------------------------------------------------------------------


@SERVER
def test_the_server_prints_its_address_and_ctrl_c_stops_it_during_a_stream():
    process, address = start()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
    body = json.dumps({"prompt": "a", "max_tokens": 8000, "stream": True}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as stream:
        assert stream.readline().startswith(b"data: ")
        began = time.monotonic()
        assert end(process) == (0, "stopped\n")
        assert time.monotonic() - began < 5  # one second on an idle machine


@SERVER
def test_the_server_listens_only_on_localhost():
    process, address = start()
    port = int(address.rsplit(":", 1)[1])
    assert [address for address, listening in _listening() if listening == port] == ["0100007F"]  # 127.0.0.1
    end(process)


def _listening():
    """Yield (address in hexadecimal, port) of every listening socket, from Linux's tables in /proc/net."""
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, port = local.split(":")
            if state == "0A":
                yield address, int(port, 16)


@SERVER
def test_a_port_in_use_prints_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = run(capsys, "--port", str(port), code=1)
    assert line == f"gpt2.serve: error: port {port} of 127.0.0.1 is in use; --port 0 selects a free one"


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_library_prints_one_line(capsys, monkeypatch, missing):
    for name in [name for name in sys.modules if name == "gpt2.web" or name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("gpt2.web", raising=False)
    for name in ("starlette", "uvicorn") if missing == "starlette" else ("uvicorn",):
        monkeypatch.setitem(sys.modules, name, None)
    line = run(capsys, "--port", "0", code=1)
    assert line.startswith("gpt2.serve: error: ")
    assert line.endswith(' is not installed; pip install -e ".[serve]"')


@SERVER
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--port", "70000"], 2, "error: --port is 70000; expected 0 to 65535"),
        (["--threads", "0"], 2, "error: --threads is 0; expected 1 to 1,024"),
        (["--checkpoint", ""], 2, "error: --checkpoint is empty; expected a model"),
        (["--port", "0"], 1, "error: no trained model in checkpoint/ or out/"),
        (["--port", "0", "--checkpoint", "nowhere"], 1, "error: nowhere"),
        (
            ["--port", "0", "--checkpoint", "broken"],
            1,
            "error: broken/model.safetensors: the weights are damaged: parameter wte.weight [3, 5] is nan (1 of 4,112",
        ),
    ],
)
def test_errors_print_one_line(capsys, tmp_path, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "broken", broken=True)
    assert message in run(capsys, *options, code=code)


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address():
    process, address = start("--checkpoint", "checkpoint")
    yield address
    end(process)


@pytest.fixture(scope="module")
def expected_text():
    """A function that returns the continuation of a prompt with the page's settings, generated as in sample.py."""
    model, tokenizer = GPT2.from_pretrained(ROOT / "checkpoint"), Tokenizer.load("bytes")

    def continuation(prompt, length):
        pieces = stream_text(model, tokenizer, tokenizer.encode(prompt).tolist(), length, temperature=0.8, seed=0)
        return "".join(piece for _, piece in pieces)

    return continuation


@pytest.fixture
def visit(browser, address):
    """A function that opens the page. After the test, its console must be empty, and all requests must have gone to
    this server."""
    pages, said, asked = [], [], []

    def opened(width=1440, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert said == []
    assert asked
    assert all(url.startswith(f"{address}/") for url in asked)


def generate(page, prompt, length):
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Length").fill(str(length))
    page.get_by_role("button", name="Generate").click()


def written(page):
    return page.locator('[data-play="text"]').text_content()


def wait_until_idle(page):
    page.wait_for_selector("[data-play=stop]:disabled", timeout=60_000)


def wait_for_inspector(page):
    page.wait_for_selector(".inspector", timeout=60_000)  # until it is visible
    page.wait_for_selector("[data-play=waiting]", state="hidden", timeout=60_000)


@IN_BROWSER
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_text_is_generated_and_inspected(visit, expected_text, width, scheme):
    page = visit(width, scheme)
    generate(page, "Return the", 40)
    wait_until_idle(page)
    assert written(page) == "Return the" + expected_text("Return the", 40)
    wait_for_inspector(page)
    assert page.locator('.inspector [data-part="text"] .token').count() == 50
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beside = page.locator(".beside").bounding_box()["x"] > page.locator(".play").bounding_box()["width"]
    assert beside == (width == 1440)
    sizes = "all => all.filter(e => e.checkVisibility()).map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(page.eval_on_selector_all(".play *", sizes)) >= 12
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(251, 250, 248)" if scheme == "light" else "rgb(20, 23, 28)")


@IN_BROWSER
@pytest.mark.parametrize(("width", "rows"), [(390, [3, 2]), (1280, [3, 2]), (1600, [5])])
def test_settings_are_evenly_distributed_over_rows(visit, width, rows):
    tops = visit(width).eval_on_selector_all(".settings label", "all => all.map(label => label.offsetTop)")
    assert [tops.count(top) for top in sorted(set(tops))] == rows


@IN_BROWSER
def test_the_page_shows_that_the_inspector_is_working(visit):
    page = visit()
    page.route("**/inspect", lambda route: None)  # no response
    generate(page, "Return the", 5)
    page.get_by_text(re.compile(r"^Looking inside the model\u2026 [1-9]\d* s$")).wait_for()


@IN_BROWSER
def test_a_stopped_and_continued_text_equals_an_uninterrupted_text(visit, expected_text):
    page = visit()
    generate(page, "Return the", 200)
    page.wait_for_selector(".piece:nth-of-type(10)")
    page.get_by_role("button", name="Stop").click()
    wait_until_idle(page)
    first = written(page)
    assert 10 < len(first) < 210
    assert page.get_by_role("status").text_content().startswith("Stopped.")
    page.get_by_label("Length").fill("30")
    page.get_by_role("button", name="Continue").click()
    wait_until_idle(page)
    assert written(page) == "Return the" + expected_text("Return the", len(first) + 20)
    assert written(page).startswith(first)


@IN_BROWSER
def test_the_text_can_be_continued_from_an_alternative_token(visit, expected_text):
    page = visit()
    generate(page, "Return the", 30)
    wait_until_idle(page)
    before = written(page)
    page.locator(".piece").nth(5).click()
    panel = page.locator(".alternatives")
    shown = before[15].replace(" ", "\u2423")
    assert panel.locator("h3").text_content() == f"Instead of \u201c{shown}\u201d"
    buttons = panel.locator("button:not(.taken)")
    assert buttons.count() >= 9
    chosen = buttons.first.locator(".mono").text_content().replace("\u2423", " ").replace("\u21b5", "\n")
    buttons.first.click()
    wait_until_idle(page)
    after = written(page)
    assert after[:16] == before[:15] + chosen
    assert len(after) == 16 + 30
    assert not panel.is_visible()


@IN_BROWSER
def test_the_page_can_be_used_with_the_keyboard_alone(visit):
    page = visit()
    page.wait_for_selector('[data-play="prompt"]:focus')  # without a click
    page.keyboard.type("def f")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".piece:nth-of-type(50)", timeout=60_000)
    wait_until_idle(page)
    for _ in range(30):
        if page.evaluate("document.activeElement.classList.contains('piece')"):
            break
        page.keyboard.press("Tab")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.closest('.alternatives') !== null")
    page.keyboard.press("Escape")
    assert page.evaluate("[...document.querySelectorAll('.piece')].indexOf(document.activeElement)") == 1
    before = written(page)
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    wait_until_idle(page)
    assert written(page)[:6] == before[:6]
    assert written(page) != before


@IN_BROWSER
def test_a_malicious_prompt_is_shown_as_text(visit):
    page = visit()
    prompt = HOSTILE.replace("\x1b", "") + "\u202e right to left \u05d0"
    generate(page, prompt, 5)
    wait_until_idle(page)
    assert written(page).startswith(prompt)
    wait_for_inspector(page)
    assert "taken" not in page.title()
    assert page.locator(".play img, .inspector img").count() == 0


@IN_BROWSER
def test_the_page_reports_that_an_overlong_prompt_was_shortened(visit):
    page = visit()
    generate(page, "a" * 100_000, 3)
    wait_until_idle(page)
    assert "The first 99,744 tokens of the prompt were omitted" in page.get_by_role("status").text_content()
    wait_for_inspector(page)


@IN_BROWSER
def test_a_text_can_be_generated_without_a_prompt(visit):
    page = visit()
    generate(page, "", 10)
    wait_until_idle(page)
    assert page.locator(".piece").count() > 0


@IN_BROWSER
def test_an_invalid_setting_is_highlighted(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.evaluate("document.querySelector('form').noValidate = true")
    page.get_by_label("Top-p").fill("7")
    generate(page, "a", 5)
    page.wait_for_selector(".status.failed")
    assert "top-p is 7.0" in page.get_by_role("status").text_content()
    assert page.get_by_label("Top-p").get_attribute("aria-invalid") == "true"
    page.close()


@IN_BROWSER
def test_the_page_reports_that_the_server_does_not_respond(browser, tmp_path):
    shutil.copytree(ROOT / "checkpoint", tmp_path / "checkpoint")
    process, address = start(cwd=tmp_path)
    page = browser.new_page()
    page.goto(address)
    end(process)
    generate(page, "a", 5)
    page.wait_for_selector(".status.failed")
    assert page.get_by_role("status").text_content() == "The server does not respond. Is it still running?"
    page.close()


@IN_BROWSER
def test_two_pages_generate_concurrently(visit, expected_text):
    pages = [visit(), visit()]
    for page, prompt in zip(pages, ("Return the", "class "), strict=True):
        generate(page, prompt, 60)
    for page, prompt in zip(pages, ("Return the", "class "), strict=True):
        wait_until_idle(page)
        assert written(page) == prompt + expected_text(prompt, 60)
