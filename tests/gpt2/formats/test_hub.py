"""gpt2/formats/hub.py: downloading OpenAI's weights from a local hub."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpt2 import GPT2Config, convert
from gpt2.formats import hub
from gpt2.formats.model_file import find_model
from tests.gpt2.formats.models import (
    random_model,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture
def model():
    return random_model()


class Hub(BaseHTTPRequestHandler):
    """Handles the requests of huggingface_hub: the list of a repository's files, and the files."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def answer(self, content, **headers):
        self.send_response(200)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        repository, revision = "openai-community/gpt2", hub.REVISIONS["gpt2"]
        files = [path.name for path in self.folder.iterdir()]
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/{repository}/resolve/{revision}/")
        if path.startswith(f"/api/models/{repository}/tree/{revision}"):
            tree = [
                {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": name}
                for name in files
            ]
            self.answer(json.dumps(tree).encode(), Content_Type="application/json")
        elif path.startswith(f"/api/models/{repository}/revision/{revision}"):
            info = {"id": repository, "sha": revision, "siblings": [{"rfilename": name} for name in files]}
            self.answer(json.dumps(info).encode(), Content_Type="application/json")
        elif name in files:
            content = (self.folder / name).read_bytes()
            self.answer(content, ETag=f'"{name}"', X_Repo_Commit=revision)
        else:
            self.send_error(404)


def run_sample(folder, endpoint, *, code=0, **environment):
    command = [sys.executable, ROOT / "sample.py", "--checkpoint", "gpt2", "-m", "4", "-t", "0"]
    network = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **network, **environment}, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.extras("huggingface_hub")
def test_a_named_model_is_downloaded_once(model, tmp_path):
    (tmp_path / "gpt2").mkdir()  # as in the repository, which has a folder with this name but without a model
    model.save_pretrained(tmp_path / "a")
    convert.convert(tmp_path / "a", tmp_path / "served", "hf")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        first = run_sample(tmp_path, endpoint)
        server.shutdown()
    assert f"snapshots/{hub.REVISIONS['gpt2']}" in first.stderr
    assert not list((tmp_path / "cache").rglob("generation_config.json"))  # only needed files are downloaded
    again = run_sample(tmp_path, endpoint)  # the server is no longer running
    assert again.stdout == first.stdout != ""


UNREACHABLE = "sample.py: error: gpt2: it could not be downloaded from the Hugging Face Hub"


@pytest.mark.extras("huggingface_hub")
def test_a_missing_network_prints_one_line(tmp_path):
    (line,) = run_sample(tmp_path, "http://127.0.0.1:9", code=1, HF_HUB_OFFLINE="1").stderr.splitlines()
    assert line.startswith(UNREACHABLE)


@pytest.mark.extras("huggingface_hub")
@pytest.mark.slow
def test_a_hub_that_does_not_respond_is_retried(tmp_path):
    """huggingface_hub reports five retries before it fails."""
    *retries, line = run_sample(tmp_path, "http://127.0.0.1:9", code=1).stderr.splitlines()
    assert sum("Retry" in retry for retry in retries) == 5
    assert line.startswith(UNREACHABLE)


def test_a_missing_library_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'gpt2-xl: to download it, install .* pip install -e "\.\[hub\]"'):
        find_model(Path("gpt2-xl"), print)


def test_every_name_on_the_hub_is_a_preset():
    assert all(name in hub.REVISIONS for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"))
    assert all(GPT2Config.preset(name).vocab_size == 50257 for name in hub.REVISIONS)
