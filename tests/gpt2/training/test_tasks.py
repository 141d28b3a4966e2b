"""gpt2/training/tasks.py: scores of HellaSwag and LAMBADA compared with known values, with one forward pass per ending
and with PyTorch; reading and downloading task files."""

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer
from gpt2.training import tasks
from gpt2.training.tasks import TASKS, Item, load_items, score
from tests.stand_ins import strict_cupy
from tinygrad2 import no_grad

HELLASWAG, LAMBADA = TASKS["hellaswag"], TASKS["lambada"]
BYTES = Tokenizer.load("bytes")
WORDS = (
    "a",
    "man",
    "is",
    "sitting",
    "on",
    "the",
    "roof",
    "and",
    "starts",
    "pulling",
    "shingles",
    "while",
    "his",
    "dog",
)


def random_items(count, endings, seed=0):
    """Questions of random words, with very different lengths."""
    random = np.random.default_rng(seed)

    def text(least, most):
        return " ".join(random.choice(WORDS, size=random.integers(least, most)))

    return [
        Item(text(0, 8), tuple(" " + text(1, 6) for _ in range(endings)), int(random.integers(endings)))
        for _ in range(count)
    ]


def make_model(n_positions=160, seed=3, **place):
    config = GPT2Config(vocab_size=257, n_positions=n_positions, n_embd=32, n_layer=2, n_head=4)
    model = GPT2(config, seed=seed, **place)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * 8  # far from uniform, so that a wrong position is detected
    return model


def unigram_model(logits):
    """A model that predicts every token with these logits, independent of the preceding tokens."""
    model = GPT2(GPT2Config(vocab_size=257, n_positions=64, n_embd=4, n_layer=1, n_head=1), seed=None)
    parameters = dict(model.named_parameters())
    parameters["ln_f.weight"].data = np.zeros(4, dtype=np.float32)
    parameters["ln_f.bias"].data = np.array([1, 0, 0, 0], dtype=np.float32)
    wte = np.zeros((257, 4), dtype=np.float32)
    wte[:, 0] = logits
    parameters["wte.weight"].data = wte
    return model


def one_by_one(model, tokenizer, items):
    """For the endings of each item, (loss, length, whether it is the greedy continuation), with one forward pass per
    ending."""
    found = []
    for item in items:
        rows = []
        for ending in item.endings:
            before = tokenizer.encode(item.context).tolist() or [tokenizer.end_of_text]
            ids = before + tokenizer.encode(ending).tolist()
            with no_grad():
                logits = model(np.array([ids])).numpy()[0, len(before) - 1 : -1].astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            after = ids[len(before) :]
            rows.append((-log_p[np.arange(len(after)), after].sum(), len(after), (logits.argmax(-1) == after).all()))
        found.append(rows)
    return found


def sums_of(items, found):
    """The expected result of `score`, computed from the result of one_by_one."""
    sums = dict.fromkeys(("items", "right_by_sum", "right_by_mean", "nats", "greedy", "cut"), 0)
    for item, rows in zip(items, found, strict=True):
        losses, lengths, greedy = map(np.array, zip(*rows, strict=True))
        sums["items"] += 1
        sums["right_by_sum"] += losses.argmin() == item.label
        sums["right_by_mean"] += (losses / lengths).argmin() == item.label
        sums["nats"] += losses[item.label]
        sums["greedy"] += greedy[item.label]
    return sums


def test_scores_of_uniform_probabilities():
    """The shortest ending has the lowest sum of losses. All endings have the same mean, so the first one is chosen."""
    model = unigram_model(0)
    items = [Item("a b", (" long ending", " short", " longer ending"), label) for label in (0, 1, 2)]
    sums = score(HELLASWAG, model, BYTES, items, batch_size=4)
    nats = pytest.approx((12 + 6 + 14) * np.log(257))
    assert sums == {"items": 3, "right_by_sum": 1, "right_by_mean": 1, "nats": nats, "greedy": 3, "cut": 0}
    assert HELLASWAG.metrics(sums) == {"acc_norm": 1 / 3, "acc": 1 / 3}


@pytest.mark.parametrize("offset", [1e4, 1e7, 1e12])
def test_an_offset_of_all_logits_does_not_change_the_losses(offset):
    sums = score(LAMBADA, unigram_model(offset), BYTES, [Item("a", (" word",), 0)], batch_size=1)
    assert sums["nats"] == pytest.approx(5 * np.log(257), rel=1e-6)


def test_scores_of_known_probabilities():
    """p(a) = 1/2, p(b) = 1/4, p(space) = 1/8, and all other probabilities are tiny."""
    logits = np.full(257, -30.0)
    logits[[ord("a"), ord("b"), ord(" ")]] = np.log([1 / 2, 1 / 4, 1 / 8])
    logits -= np.log(np.exp(logits).sum())
    model = unigram_model(logits)
    cost = {c: -logits[ord(c)] for c in "ab "}
    items = [Item("what", (" aaaaa", " b"), 0), Item("what", (" aaaaa", " b"), 1)]
    sums = score(HELLASWAG, model, BYTES, items, batch_size=2)
    assert cost[" "] + 5 * cost["a"] > cost[" "] + cost["b"]  # lower sum: second ending; lower mean: first
    assert (sums["right_by_sum"], sums["right_by_mean"]) == (1, 1)
    assert score(HELLASWAG, model, BYTES, items[:1], 2)["right_by_mean"] == 1
    assert sums["nats"] == pytest.approx(2 * cost[" "] + 5 * cost["a"] + cost["b"], rel=1e-6)
    # A word costs its space and its letters. The space is not the most probable byte, so no word is generated.
    sums = score(LAMBADA, model, BYTES, [Item("a", (" a",), 0), Item("a", (" ab",), 0)], batch_size=1)
    per_word = (2 * cost[" "] + 2 * cost["a"] + cost["b"]) / 2
    assert LAMBADA.metrics(sums) == {"acc": 0, "perplexity": pytest.approx(np.exp(per_word), rel=1e-5)}
    assert score(LAMBADA, model, BYTES, [Item("b", ("aa",), 0), Item("b", ("ab",), 0)], 2)["greedy"] == 1


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_batches_of_different_lengths_equal_single_forward_passes(batch_size):
    model, items = make_model(dtype="float64"), random_items(12, endings=4)
    assert any(item.context == "" for item in items)
    expected = sums_of(items, one_by_one(model, BYTES, items))
    assert 0 < expected["right_by_sum"] < 12
    sums = score(HELLASWAG, model, BYTES, items, batch_size)
    assert sums == {**expected, "nats": pytest.approx(expected["nats"], rel=1e-5)}


def test_greedy_words_equal_generated_words():
    model = make_model()
    model.wte.weight.data[128:] = 0  # so that the model generates only ASCII
    items = [item._replace(context=item.context or "a") for item in random_items(6, endings=1, seed=1)]
    written = [model.generate(BYTES.encode(item.context).tolist(), 3, temperature=0)[0] for item in items]
    own = [Item(item.context, (bytes(ids).decode(),), 0) for item, ids in zip(items, written, strict=True)]
    assert score(LAMBADA, model, BYTES, own, 4)["greedy"] == 6
    assert score(LAMBADA, model, BYTES, items, 4)["greedy"] == 0


def test_scores_of_parts_add_up():
    model, items = make_model(dtype="float64"), random_items(9, endings=3)
    whole = score(HELLASWAG, model, BYTES, items, 5)
    parts = [score(HELLASWAG, model, BYTES, items[first::2], 5) for first in (0, 1)]
    assert {name: sum(part[name] for part in parts) for name in whole} == pytest.approx(whole, rel=1e-6)
    assert set(score(HELLASWAG, model, BYTES, [], 5).values()) == {0}


def test_the_start_of_a_row_longer_than_the_context_is_dropped():
    model = make_model(n_positions=8)
    item = Item("0123456789", (" abc", " de"), 0)
    sums = score(HELLASWAG, model, BYTES, [item], 4)
    assert sums["cut"] == 1
    with no_grad():  # nine tokens: eight inputs and the last target
        logits = model(np.frombuffer(b"56789 ab", dtype=np.uint8).astype(np.int64)[None]).numpy()[0, -4:]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert sums["nats"] == pytest.approx(-log_p[range(4), list(b" abc")].sum(), rel=1e-5)
    assert score(HELLASWAG, model, BYTES, [Item("012345", (" ab", " c"), 0)], 4)["cut"] == 0
    # If an ending itself is too long, its last eight tokens are scored; the ninth from the end is only an input.
    cut = score(LAMBADA, model, BYTES, [Item("x", (" a long word",), 0)], 4)
    assert cut["cut"] == 1
    same = score(LAMBADA, model, BYTES, [Item("l", ("ong word",), 0)], 4)
    assert cut["nats"] == pytest.approx(same["nats"], rel=1e-6)


def test_a_damaged_model_is_reported():
    model = make_model()
    model.wte.weight.data = np.full(model.wte.weight.shape, np.nan, dtype=np.float32)
    with pytest.raises(ValueError, match="lambada: the model's losses are not finite"):
        score(LAMBADA, model, BYTES, random_items(2, 1), 2)


def test_scores_on_a_device_equal_those_on_the_cpu():
    items = random_items(5, endings=2)
    expected = score(HELLASWAG, make_model(), BYTES, items, 4)
    with strict_cupy.registered():
        sums = score(HELLASWAG, make_model(device="cuda"), BYTES, items, 4)
    assert sums == {**expected, "nats": pytest.approx(expected["nats"], rel=1e-5)}


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_scores_agree_with_pytorch(tmp_path):
    """The reference works as in build-nanogpt: all rows of an item are padded with 0, and the masked loss is summed and
    averaged."""
    import torch
    import transformers

    model = make_model()
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    items = [item._replace(context=item.context or "the") for item in random_items(25, endings=4, seed=5)]
    right_by_sum, right_by_mean, word_nats, greedy = 0, 0, 0.0, 0
    for item in items:
        context = list(item.context.encode())
        endings = [list(ending.encode()) for ending in item.endings]
        width = len(context) + max(map(len, endings))
        ids, mask = torch.zeros((4, width), dtype=torch.long), torch.zeros((4, width))
        for row, ending in enumerate(endings):
            ids[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[row, len(context) : len(context) + len(ending)] = 1
        with torch.no_grad():
            logits = theirs(ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses = losses.view(4, -1) * mask[:, 1:]
        right_by_sum += int(losses.sum(1).argmin() == item.label)
        right_by_mean += int((losses.sum(1) / mask[:, 1:].sum(1)).argmin() == item.label)
        word_nats += losses.sum(1)[item.label].item()
        hit = (logits.argmax(-1) == ids[:, 1:]) | (mask[:, 1:] == 0)
        greedy += int(hit[item.label].all())
    sums = score(HELLASWAG, model, BYTES, items, batch_size=6)
    assert 0 < right_by_sum < 25
    assert HELLASWAG.metrics(sums) == {"acc_norm": right_by_mean / 25, "acc": right_by_sum / 25}
    metrics = LAMBADA.metrics(sums)
    assert metrics == {"acc": greedy / 25, "perplexity": pytest.approx(np.exp(word_nats / 25), rel=1e-4)}


def test_endings_are_tokenized_as_in_the_published_scripts(gpt2_files):
    """A space belongs to the token after it, so an ending is encoded with its leading space."""
    tokenizer = Tokenizer.load("gpt2")
    item = HELLASWAG.item(
        {"ctx": "A man is sitting on a roof. he", "endings": ["is using wrap.", "starts"], "label": 1}
    )
    (row, _) = tasks._rows(item, tokenizer, 1024)
    assert row.ids.tolist() == tokenizer.encode("A man is sitting on a roof. he is using wrap.").tolist()
    assert tokenizer.decode(row.ids[-row.length :]) == " is using wrap."
    word = LAMBADA.item({"text": "my palm is a clear stone, and inside it is a small ivory statuette"})
    assert word == Item("my palm is a clear stone, and inside it is a small ivory", (" statuette",), 0)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_load_items(tmp_path):
    lines = [{"ind": i, "ctx": f"é{i}", "endings": ["a", "b"], "label": str(i % 2), "more": None} for i in range(10)]
    file = write(tmp_path / "h.jsonl", lines)
    file.write_bytes(file.read_bytes() + b"\n")
    items = load_items(HELLASWAG, file)
    assert items[3] == Item("é3", (" a", " b"), 1)
    assert len(items) == 10
    assert [item.context for item in load_items(HELLASWAG, file, limit=4)] == ["é0", "é2", "é5", "é7"]
    assert load_items(HELLASWAG, file, limit=11) == items
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte-order mark
    assert load_items(HELLASWAG, file) == items


@pytest.mark.parametrize(
    ("task", "line"),
    [
        (HELLASWAG, {"ctx": "a", "endings": ["b", "c"]}),
        (HELLASWAG, {"ctx": "a", "endings": ["b", "c"], "label": ""}),  # the test split
        (HELLASWAG, {"ctx": "a", "endings": ["b", "c"], "label": 2}),
        (HELLASWAG, {"ctx": "a", "endings": ["b", "c"], "label": -1}),
        (HELLASWAG, {"ctx": "a", "endings": ["b", 3], "label": 0}),
        (HELLASWAG, {"ctx": "a", "endings": "bc", "label": 0}),
        (HELLASWAG, {"ctx": 1, "endings": ["b", "c"], "label": 0}),
        (HELLASWAG, {"text": "a b"}),
        (LAMBADA, {"text": "word"}),
        (LAMBADA, {"text": 3}),
        (LAMBADA, ["a b"]),
        (LAMBADA, None),
    ],
)
def test_lines_of_another_format_are_rejected(task, line, tmp_path):
    good = {"ctx": "a", "endings": ["b", "c"], "label": 0} if task is HELLASWAG else {"text": "two words"}
    file = write(tmp_path / "f.jsonl", [good, line])
    with pytest.raises(ValueError, match=rf"f.jsonl: line 2 is not a question of {task.name}; expected {{"):
        load_items(task, file)


@pytest.mark.parametrize(
    ("content", "line"), [(b"\xff\xfe\xfa\n", "line 1"), (b"{\n", "line 1"), (b"[" * 5000, "line 1")]
)
def test_files_that_are_not_json_lines_are_rejected(content, line, tmp_path):
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=line):
        load_items(LAMBADA, tmp_path / "f.jsonl")


def test_an_empty_file_and_a_missing_file_are_errors(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="no questions in this file"):
        load_items(LAMBADA, tmp_path / "f.jsonl")
    with pytest.raises(FileNotFoundError):
        load_items(LAMBADA, tmp_path / "none.jsonl")


@contextmanager
def serving(body, status=200, length=None):
    """Run a local server that sends this response to every request. Yields its address and the list of requested
    paths."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


BODY = b'{"text": "a last word"}\n' * 9000  # several reads


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "tinygrad2"


def published(url, body=BODY):
    return replace(LAMBADA, url=f"{url}/data/words.jsonl", sha256=hashlib.sha256(body).hexdigest())


def test_a_file_is_downloaded_once(cache):
    with serving(BODY) as (url, asked):
        assert len(load_items(published(url))) == 9000
        assert load_items(published(url))[0] == Item("a last", (" word",), 0)
    assert asked == ["/data/words.jsonl"]
    assert [path.name for path in cache.iterdir()] == ["words.jsonl"]
    assert (cache / "words.jsonl").read_bytes() == BODY


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"body": BODY[:-1]}, "checksum"),
        ({"body": BODY[:70_000], "length": len(BODY)}, "checksum|IncompleteRead|read"),  # the connection breaks
        ({"body": b"no such file", "status": 404}, "404|Not Found"),
    ],
)
def test_a_failed_download_leaves_no_file(answer, reason, cache):
    what = rf"lambada: .*words.jsonl could not be downloaded \(.*({reason}).*save the file as"
    with serving(**answer) as (url, _), pytest.raises(OSError, match=what) as error:
        load_items(published(url))
    assert str(cache / "words.jsonl") in str(error.value)
    assert "\n" not in str(error.value)
    assert list(cache.iterdir()) == []


def test_an_unreachable_server_is_an_error(cache):
    with serving(b"") as (url, _):
        pass  # the server is closed
    with pytest.raises(OSError, match=r"could not be downloaded .*refused"):
        load_items(published(url))


def test_a_cache_folder_that_cannot_be_created_is_an_error(cache):
    cache.parent.write_text("a file in the way")
    with serving(BODY) as (url, _), pytest.raises(OSError, match="could not be downloaded"):
        load_items(published(url))
