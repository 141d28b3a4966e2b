"""The inspector: its numbers, its texts, its page in a real browser, and bad input."""

import itertools
import json
import math
import re

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer, inspect
from gpt2.generate import generate
from tests.browsing import HOSTILE, opened

CONFIG = GPT2Config(n_layer=2, n_head=3, n_embd=24, n_positions=160, vocab_size=257)
TEXT = "to be, or not to be"


def made(config=CONFIG, scale=8.0, seed=1):
    """A model whose attention is not almost even."""
    model = GPT2(config, seed=seed)
    for _, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data * scale
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("bytes")


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(model, tokenizer):
    return inspect.inspect(model, tokenizer, tokenizer.encode(TEXT).tolist(), len(TEXT), "a model")


def softmax(logits):
    weights = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_surprise_rank_choices_and_bits_per_byte_are_those_of_the_model(data, model, tokenizer):
    tokens = tokenizer.encode(TEXT).astype(np.int64)
    p = softmax(model(tokens[None]).numpy()[0])
    own = p[np.arange(len(tokens) - 1), tokens[1:]]
    assert data["surprise"][0] is data["rank"][0] is None
    assert np.allclose(data["surprise"][1:], -np.log2(own), rtol=1e-5)
    assert data["rank"][1:] == [int((row > value).sum()) + 1 for row, value in zip(p[:-1], own, strict=True)]
    assert data["bits_per_byte"] == pytest.approx(-np.log2(own).sum() / (len(TEXT) - 1), rel=1e-5)
    ids, chances = (inspect.unpacked(data["choices"][name]) for name in ("ids", "p"))
    assert ids.shape == chances.shape == (len(tokens), 10)
    assert np.allclose(chances, np.sort(p)[:, :-11:-1], rtol=1e-5)
    assert np.allclose(np.take_along_axis(p, ids.astype(int), 1), chances, rtol=1e-5)


def test_the_lens_is_the_output_layer_on_the_stream_of_every_layer(data, model, tokenizer):
    found = model.trace(tokenizer.encode(TEXT))
    weight, bias = (getattr(model.ln_f, name).numpy() for name in ("weight", "bias"))
    ids, chances = (inspect.unpacked(data["lens"][name]) for name in ("ids", "p"))
    for layer, stream in enumerate([*(one.stream for one in found.layers), found.stream]):
        x = stream.astype(np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias
        p = softmax(x @ model.wte.weight.numpy().T)
        assert np.allclose(chances[layer], p.max(-1), rtol=2e-4)
        assert np.array_equal(ids[layer], p.argmax(-1))
    assert np.array_equal(ids[-1], inspect.unpacked(data["choices"]["ids"])[:, 0])


def test_attention_up_to_128_tokens_is_exact_with_the_mean_of_the_heads_last(data, model, tokenizer):
    found, T = model.trace(tokenizer.encode(TEXT)), len(TEXT)
    stored = inspect.unpacked(data["attention"]["weights"])
    assert data["attention"]["exact"]
    assert stored.shape == (2, 4, T * (T + 1) // 2)
    for layer, one in enumerate(found.layers):
        expected = one.weights()[:, np.tri(T, dtype=bool)]
        assert np.array_equal(stored[layer, :3], expected)
        assert np.allclose(stored[layer, 3], expected.mean(0), atol=1e-7)


def test_sizes_and_neighbours(data, model, tokenizer):
    found = model.trace(tokenizer.encode(TEXT))
    sizes = {name: inspect.unpacked(value) for name, value in data["sizes"].items()}
    assert sizes["stream"][2, 5] == pytest.approx(math.sqrt((found.stream[5].astype(float) ** 2).mean()), rel=1e-6)
    assert sizes["mlp"][1, 3] == pytest.approx(math.sqrt((found.layers[1].mlp[3].astype(float) ** 2).mean()), rel=1e-6)
    assert sizes["attention"].shape == (2, len(TEXT))
    table = model.wte.weight.numpy().astype(float)
    cosine = table @ table[98] / np.linalg.norm(table, axis=1) / np.linalg.norm(table[98])
    best = [i for i in np.argsort(-cosine) if i != 98][:8]
    assert [i for i, _ in data["neighbours"]["98"]] == best
    assert [value for _, value in data["neighbours"]["98"]] == pytest.approx(cosine[best], abs=1e-4)


def test_of_a_longer_text_the_strongest_links_and_an_overview_are_kept():
    rng = np.random.default_rng(0)
    T = 150
    weights = np.tril(rng.random((2, T, T)).astype(np.float32) ** 20)
    weights /= weights.sum(-1, keepdims=True)
    keys, links, overview = inspect.strongest_links(weights)
    for head, query in itertools.product(range(2), (0, 7, 149)):
        expected = np.sort(weights[head, query])[::-1][:8]
        assert np.abs(links[head, query] / 255 - expected).max() <= 0.5 / 255 + 1e-6
        assert np.allclose(weights[head, query, keys[head, query]], expected)
    first = [i * T // 64 for i in range(65)]
    rows, columns = slice(first[40], first[41]), slice(first[7], first[8])
    assert overview.shape == (2, 64, 64)
    assert overview[1, 40, 7] == np.rint(255 * weights[1, rows, columns].sum(-1).mean())
    assert np.abs(overview.sum(-1) - 255).max() <= 32  # each of the 64 groups is rounded


def test_a_head_is_described_by_the_pattern_that_it_follows(tokenizer):
    text = "one two one two one two three"
    tokens = tokenizer.encode(text).astype(np.int64)
    T = len(tokens)
    begins = np.array([c == " " for c in text])
    masks = inspect.patterns(tokens, begins)
    assert list(masks) == list(inspect.PATTERNS)

    def head(mask):
        weights = np.where(mask, 1.0, 1e-3) * np.tri(T)
        return weights / weights.sum(-1, keepdims=True)

    heads = inspect.describe_heads(np.stack([*map(head, masks.values()), head(np.zeros((T, T)))]), masks)
    assert [one["kind"] for one in heads] == [*inspect.PATTERNS, "spreads"]
    assert heads[0]["previous"] == [
        pytest.approx(0.98, abs=0.02),
        pytest.approx(np.mean(1 / np.arange(2, T + 1)), abs=1e-4),
        T - 1,
    ]
    assert heads[-1]["spread"] == pytest.approx((T + 1) / 2, rel=1e-4)
    assert heads[1]["spread"] < 1.5


def test_patterns_are_what_their_names_say(tokenizer):
    text = "ab ab"
    masks = inspect.patterns(tokenizer.encode(text).astype(np.int64), np.array([c == " " for c in text]))
    found = {name: [(int(q), int(k)) for q, k in np.argwhere(mask)] for name, mask in masks.items()}
    assert found == {
        "previous": [(1, 0), (2, 1), (3, 2), (4, 3)],
        "first": [(1, 0), (2, 0), (3, 0), (4, 0)],
        "word": [(1, 0), (3, 2), (4, 2)],
        "same": [(3, 0), (4, 1)],
        "induction": [(3, 1), (4, 2)],
        "itself": [(1, 1), (2, 2), (3, 3), (4, 4)],
    }


def test_words_are_found_where_they_have_several_tokens(data, tokenizer):
    vocabulary = inspect.Vocabulary(tokenizer, 257)
    found = {int(at): TEXT[int(at) : word["end"]] for at, word in data["words"].items()}
    assert found == {3: "be", 7: "or", 10: "not", 14: "to", 17: "be"}  # the first word is predicted by nothing
    assert vocabulary.words(tokenizer.encode("a b, c").astype(np.int64)) == []


def test_the_probability_of_a_word_is_that_of_its_tokens_and_of_ending_there(data, model, tokenizer):
    """Computed again from the whole text each time, without a cache; and no one-letter or greedy word is missed."""
    start = 10
    letters = {i for i in range(256) if (chr(i).isascii() and chr(i).isalnum()) or chr(i) == "_" or i >= 128}
    ends = [i for i in range(257) if i not in letters]

    def probability(word):
        ids = [*TEXT[:start].encode(), *word]
        p = softmax(model(np.array([ids])).numpy()[0])
        each = [p[start - 1 + i, token] for i, token in enumerate(word)]
        return np.prod(each) * p[-1, ends].sum()

    place = data["words"]["10"]
    assert place["p"] == pytest.approx(probability(b"not"), rel=1e-4)
    vocabulary = inspect.Vocabulary(tokenizer, 257)
    read = inspect.KVCache(model, 1, start)
    with inspect.no_grad():
        model.features(np.array([[*TEXT[:start].encode()]]), cache=read)
    first = softmax(model(np.array([[*TEXT[:start].encode()]])).numpy()[0, -1])
    found = inspect.beam_search(model, vocabulary, read, start, first)
    assert len(found) == inspect.WORDS
    assert [p for p, _ in found] == sorted((p for p, _ in found), reverse=True)
    for p, word in found:
        assert p == pytest.approx(probability(word), rel=1e-4)
    assert place["begins"] == pytest.approx(first[sorted(letters)].sum(), rel=1e-4)
    best = max(letters, key=lambda i: first[i])
    assert found[0][0] >= probability([best]) * (1 - 1e-4)


def test_gpt2_s_own_tokens(gpt2_files):
    vocabulary = inspect.Vocabulary(Tokenizer.load("gpt2"), 50304)
    tokens = vocabulary.tokenizer.encode(" tokenizers the\u202e\n").astype(np.int64)
    assert [vocabulary.label(int(i)) for i in tokens][:2] == [" token", "izers"]
    assert "".join(vocabulary.label(int(i)) for i in tokens).startswith(" tokenizers the\\")
    assert vocabulary.label(50256) == "<|endoftext|>"
    assert vocabulary.label(50300) == "<unused 50300>"
    assert vocabulary.words(vocabulary.tokenizer.encode("It is tokenizers old").astype(np.int64)) == [slice(2, 4)]


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_the_numbers_on_the_page_equal_transformers(tmp_path, tokenizer):
    import torch
    import transformers

    config = transformers.GPT2Config(
        n_layer=3, n_head=4, n_embd=32, n_positions=64, vocab_size=257, initializer_range=0.2, bos_token_id=256,
        eos_token_id=256, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    out = tmp_path / "page.html"
    assert inspect.main(["-p", TEXT, "--checkpoint", str(tmp_path / "model"), "--out", str(out)]) == 0
    data, tokens = data_of(out), torch.tensor(tokenizer.encode(TEXT).astype(np.int64))[None]
    with torch.no_grad():
        expected = theirs(tokens, output_attentions=True, output_hidden_states=True)
        seen = [theirs.lm_head(theirs.transformer.ln_f(x))[0] for x in expected.hidden_states[:-1]]
    weights, T = inspect.unpacked(data["attention"]["weights"]), len(TEXT)
    for layer, one in enumerate(expected.attentions):
        assert relative(weights[layer, :4], one[0].numpy()[:, np.tri(T, dtype=bool)]) < 2e-5
    p = softmax(expected.logits[0].numpy())
    assert relative(inspect.unpacked(data["choices"]["p"]), np.sort(p)[:, :-11:-1]) < 2e-5
    assert relative(np.array(data["surprise"][1:]), -np.log2(p[np.arange(T - 1), tokens[0, 1:]])) < 2e-5
    lens = np.stack([softmax(x.numpy()).max(-1) for x in (*seen, expected.logits[0])])
    assert relative(inspect.unpacked(data["lens"]["p"]), lens) < 2e-5
    sizes = inspect.unpacked(data["sizes"]["stream"])[:-1]
    norms = np.stack([np.sqrt((x[0].numpy() ** 2).mean(-1)) for x in expected.hidden_states[:-1]])
    assert relative(sizes, norms) < 2e-5


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def data_of(file):
    """The data in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)[1])


# The command ---------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    """(status, lines on stdout, lines on stderr)."""
    status = inspect.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out.splitlines(), said.err.splitlines()


def test_it_says_where_the_page_is_and_what_is_in_it(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    status, lines, errors = run(capsys, "-p", TEXT, "--checkpoint", folder, "--out", out)
    assert (status, errors) == (0, [])
    assert lines[0] == f"model: {folder}, {CONFIG.summary()}, {made().n_parameters():,} parameters"
    assert re.fullmatch(r"19 tokens, \d+\.\d{3} bits per byte", lines[1])
    assert re.fullmatch(r"most surprising .*; expected '.*%", lines[2])
    assert lines[3].startswith("heads by what they look at: ")
    assert lines[4] == f"page: {out} ({out.stat().st_size / 1e6:.1f} MB); open it in a browser"
    data = data_of(out)
    assert (data["text"], data["prompt"]) == (TEXT, len(TEXT))


def test_it_generates_what_generate_does(folder, model, tokenizer, tmp_path, capsys):
    out = tmp_path / "page.html"
    arguments = ("--checkpoint", folder, "--out", out, "--seed", 3, "-t", 0.5)
    assert run(capsys, "-p", "ab", "-m", 12, *arguments)[0] == 0
    expected = [int(token[0]) for token in generate(model, [97, 98], 12, temperature=0.5, seed=3)]
    data = data_of(out)
    assert data["tokens"] == [97, 98, *itertools.takewhile(lambda token: token != 256, expected)]
    assert data["prompt"] == 2


@pytest.mark.parametrize("prompt", [(), ("-p", "")])
def test_without_a_prompt_the_model_generates_one(folder, tmp_path, capsys, prompt):
    status, _, errors = run(capsys, *prompt, "--checkpoint", folder, "--out", tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert (status, data["prompt"]) == (0, 0)
    assert errors == ["there is no prompt: the model generates 100 tokens"]
    assert 1 <= len(data["tokens"]) <= 100


@pytest.mark.parametrize("text", ["a", "ab", "\n", "\x00", "é", "a" * 128, "a" * 129])
def test_short_and_strange_texts_have_a_page(folder, tmp_path, capsys, text):
    status, lines, errors = run(capsys, "-p", text, "--checkpoint", folder, "--out", tmp_path / "page.html")
    assert (status, errors) == (0, [])
    assert lines[1].startswith(f"{len(text.encode())} token")
    assert data_of(tmp_path / "page.html")["attention"]["exact"] == (len(text.encode()) <= 128)


@pytest.mark.parametrize("text", ["x" * 100_000, "word " * 20_000, HOSTILE * 1000])
def test_of_a_text_beyond_the_context_the_end_is_taken(folder, tmp_path, capsys, text):
    status, _, errors = run(capsys, "-p", text, "--checkpoint", folder, "--out", tmp_path / "page.html")
    assert status == 0
    assert errors == [f"the text has {len(text):,} tokens; the page shows the last 160, the model's context"]
    data = data_of(tmp_path / "page.html")
    assert bytes(data["tokens"]) == text[-160:].encode()
    assert data["notes"] == [f"The text has {len(text):,} tokens; these are the last 160, the model's context."]
    assert not data["attention"]["exact"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-p", "a", "--checkpoint", "nowhere"], 1, "nowhere: no such file or folder"),
        (["-p", "a", "--checkpoint", "llama"], 1, "model_type"),
        (["-p", "a", "--checkpoint", "text.txt"], 1, "text.txt"),
        (["-p", "a", "--checkpoint", ""], 2, "--checkpoint is empty"),
        (["-p", "", "-m", "0"], 2, "--prompt is empty and --max-tokens 0"),
        (["-p", "a", "-m", "-1"], 2, "--max-tokens is -1; expected 0 or more"),
        (["-p", "a", "--threads", "0"], 2, "--threads is 0"),
        (["-p", "a", "--seed", "-1"], 2, "--seed is -1"),
        (["-p", "a", "-t", "-1"], 2, "--temperature is -1.0"),
        (["-p", "a", "--out", "no/page.html"], 2, "the folder no/ does not exist"),
        (["-p", "a", "--out", "."], 2, "--out . is a folder"),
        (["-p", "a"], 1, "no trained model in checkpoint/ or out/"),
    ],
)
def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no model at all")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    try:
        found = inspect.main(arguments)
    except SystemExit as end:
        found = end.code
    said = capsys.readouterr()
    assert (found, said.out) == (status, "")
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("gpt2.inspect: error: ")
    assert message in said.err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("h.1.mlp.c_fc.weight", math.nan, "1 of 2,304 values of tensor h.1.mlp.c_fc.weight are not finite numbers"),
        ("wte.weight", math.inf, "1 of 6,168 values of tensor wte.weight are not finite numbers"),
        ("h.0.mlp.c_proj.weight", 3e38, "the MLP of layer 1 gives values that are not finite numbers"),
        ("ln_f.weight", 3e38, "inspect: the model's logits are not finite numbers"),
    ],
)
def test_damaged_weights_are_named(tmp_path, capsys, name, value, message):
    model = made()
    parameter = dict(model.named_parameters())[name]
    values = parameter.numpy().copy()
    values.flat[5:] = value if math.isfinite(value) else values.flat[5:]
    values.flat[5] = value
    parameter.data = values
    model.save_pretrained(tmp_path)
    status, _, errors = run(capsys, "-p", "ab", "--checkpoint", tmp_path, "--out", tmp_path / "page.html")
    assert status == 1
    assert len(errors) == 1
    assert re.search(message, errors[0])
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_1024_tokens_of_12_layers_of_12_heads_take_less_than_8_mb(gpt2_files, tmp_path, capsys):
    config = GPT2Config(n_layer=12, n_head=12, n_embd=48, n_positions=1024, vocab_size=50257)
    made(config).save_pretrained(tmp_path)
    text = " ".join(str(i * i) for i in range(1000))
    assert run(capsys, "-p", text, "--checkpoint", tmp_path, "--out", tmp_path / "page.html")[0] == 0
    assert len(data_of(tmp_path / "page.html")["tokens"]) == 1024
    assert (tmp_path / "page.html").stat().st_size < 8e6


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(model, tokenizer, tmp_path_factory):
    """Pages of a usual text, of hostile ones, of one token, and of more than 128 tokens."""
    path = tmp_path_factory.mktemp("pages")
    texts = {
        "usual": TEXT,
        "hostile": HOSTILE,
        "strange": "\u202eabc\u2066 \x1b[31m א<b>&amp;\u0301é\r\n\t\x00",
        "one": "a",
        "long": "the cat sat on the mat. " * 6,
    }
    for name, text in texts.items():
        tokens = tokenizer.encode(text).tolist()
        data = inspect.inspect(model, tokenizer, tokens, len(tokens), "a <model>")
        inspect.write(inspect.inspector_page(data), path / f"{name}.html")
    return {name: path / f"{name}.html" for name in texts}


@pytest.mark.extras("playwright")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["usual", "hostile", "strange", "one", "long"])
def test_it_opens_without_errors_requests_or_sideways_scrolling(browser, pages, name, width, scheme):
    page, said, asked = opened(browser, pages[name], width, scheme)
    assert said == []
    assert asked == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(page.eval_on_selector_all("body *", sizes)) >= 12
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(251, 250, 248)" if scheme == "light" else "rgb(20, 23, 28)")
    assert page.title() != "taken"
    assert page.locator("main img, main b, main iframe, main script").count() == 0
    page.close()


@pytest.mark.extras("playwright")
def test_tokens_are_shown_with_their_surprise_and_what_was_expected(browser, pages, data):
    page, said, _ = opened(browser, pages["usual"], 1280)
    tokens = page.locator('[data-part="text"] .token')
    assert tokens.count() == len(TEXT)
    assert "".join(tokens.all_text_contents()) == TEXT
    at = int(np.argmax([0, *data["surprise"][1:]]))
    assert tokens.nth(at).get_attribute("aria-selected") == "true"  # the most surprising one, at first
    shade = "all => all.map(e => parseFloat(e.style.getPropertyValue('--s')))"
    found = page.eval_on_selector_all('[data-part="text"] .token', shade)
    assert found == pytest.approx([min(1, (bits or 0) / 10) for bits in data["surprise"]], abs=1e-4)
    panel = page.locator('[data-part="expected"]')
    tokens.nth(4).hover()
    assert panel.locator("h3").text_content() == "Token 5: “e”"
    ids, p = (inspect.unpacked(data["choices"][name])[3] for name in ("ids", "p"))
    rows = panel.locator(".bars").filter(has_not_text="be").first
    names = rows.locator(".mono").all_text_contents()
    assert names[:10] == [data["labels"][str(i)].replace(" ", "␣") for i in ids]
    assert rows.locator(".value").first.text_content().startswith(f"{100 * p[0]:.0f}"[:1])
    page.mouse.move(1, 1)
    assert panel.locator("h3").text_content().startswith(f"Token {at + 1}:")
    tokens.nth(4).click()
    page.mouse.move(1, 1)
    assert panel.locator("h3").text_content() == "Token 5: “e”"
    assert "the whole word “be”" in panel.text_content() or "where “be” begins" in panel.text_content()
    tokens.nth(0).click()
    assert "nothing before it" in panel.text_content()
    assert said == []


@pytest.mark.extras("playwright")
def test_a_head_is_enlarged_and_described_and_its_links_are_drawn(browser, pages, data):
    page, said, _ = opened(browser, pages["usual"], 1280)
    maps = page.locator(".map")
    assert maps.count() == 2 * (3 + 1)
    page.locator('[data-part="text"] .token').nth(8).click()
    maps.nth(4 + 2).click()
    assert page.locator('[data-part="head"] h3').text_content() == "Layer 2, head 3"
    T = len(TEXT)
    weights = np.zeros((T, T))
    weights[np.tri(T, dtype=bool)] = inspect.unpacked(data["attention"]["weights"])[1, 2]
    best = int(weights[8].argmax())
    said_of_it = page.locator('[data-part="arcs-text"]').text_content()
    assert said_of_it.startswith("From “r” (token 9), head 3 of layer 2 looks most at ")
    strongest = page.locator('[data-part="arcs-text"] strong').text_content()
    assert (f"(token {best + 1})" in strongest) or (best == 8 and strongest.startswith("itself"))
    assert page.locator(".strip path").count() == int((weights[8] >= 0.01).sum())
    described = page.locator('[data-part="head"]').text_content()
    kind = data["attention"]["heads"][1][2]["kind"]
    assert (data["patterns"].get(kind, ["spreads"])[0]).lower() in described.lower()
    # the map itself: a pixel is as opaque as its weight is large, and what lies ahead is the same everywhere
    pixel = "c => [...c.getContext('2d').getImageData({0}, {1}, 1, 1).data][3]"
    canvas = page.locator(".large canvas")
    for query, key in ((8, best), (8, 3), (18, 18)):
        expected = 255 * min(1, weights[query, key]) ** 0.6
        assert canvas.evaluate(pixel.format(key, query)) == pytest.approx(expected, abs=1.5)
    assert canvas.evaluate(pixel.format(9, 2)) == 110
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * (best + 0.5) / T, box["y"] + box["height"] * 8.5 / T)
    assert f"(token {best + 1}):" in page.locator(".readout").text_content()
    maps.nth(4 + 3).click()
    assert page.locator('[data-part="head"] h3').text_content() == "Layer 2, mean over the heads"
    assert [line for line in said if "willReadFrequently" not in line] == []  # (that is because the test reads pixels)


@pytest.mark.extras("playwright")
def test_heads_are_sorted_by_what_they_do(browser, pages, data):
    page, said, _ = opened(browser, pages["usual"], 1280)
    page.get_by_label("Order").select_option("previous")
    found = page.locator(".maps .hint").all_text_contents()
    heads = {f"{i}.{j}": head["previous"][0] for i, row in enumerate(data["attention"]["heads"], 1)
             for j, head in enumerate(row, 1)}  # fmt: skip
    assert [text.split()[0] for text in found] == sorted(heads, key=lambda name: -heads[name])
    page.get_by_label("Order").select_option("")
    assert page.locator(".maps .hint").count() == 0
    assert page.locator(".map").count() == 8
    assert said == []


@pytest.mark.extras("playwright")
def test_everything_is_reached_by_the_keyboard_alone(browser, pages):
    page, said, _ = opened(browser, pages["usual"], 1280)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[data-part]')?.dataset.part"))
    assert {"text", "order", "maps", "head", "arcs"} <= set(reached)
    page.locator('[data-part="text"] [aria-selected="true"]').focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator('[data-part="expected"] h3').text_content() == "Token 3: “␣”"
    assert page.evaluate("document.activeElement.textContent") == " "
    page.keyboard.press("End")
    assert page.locator('[data-part="expected"] h3').text_content() == f"Token {len(TEXT)}: “e”"
    page.locator('.map[aria-selected="true"]').focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.locator('[data-part="head"] h3').text_content() == "Layer 2, head 2"
    assert said == []


@pytest.mark.extras("playwright")
def test_the_lens_shows_the_prediction_of_every_layer(browser, pages, data):
    page, said, _ = opened(browser, pages["usual"], 1280)
    ids = inspect.unpacked(data["lens"]["ids"])
    rows = page.locator(".lens tbody tr")
    assert rows.count() == 3
    for layer in range(3):
        shown = rows.nth(layer).locator("td").all_text_contents()
        assert shown == [data["labels"][str(i)].replace(" ", "␣") for i in ids[layer]]
    page.locator(".lens thead th").nth(4).click()
    assert page.locator('[data-part="lens-text"]').text_content().startswith("After “e” (token 4)") or (
        page.locator('[data-part="lens-text"]').text_content().startswith("After “b” (token 4)")
    )
    assert page.locator(".chips span.mono").count() == 8
    assert page.locator(".chart polyline").count() == 6
    assert said == []


@pytest.mark.extras("playwright")
def test_a_long_text_is_said_to_be_abridged(browser, pages):
    page, said, _ = opened(browser, pages["long"], 1280)
    assert "the 8 strongest links" in page.locator('[data-part="maps-note"]').text_content()
    assert "128 of 144" in page.locator('[data-part="lens-text"]').text_content()
    assert page.locator(".large canvas").evaluate("c => c.width") == 64
    page.locator('[data-part="text"] .token').nth(143).click()
    assert 1 <= page.locator(".strip path").count() <= 8
    assert said == []


@pytest.mark.extras("playwright")
def test_the_maps_follow_the_colours_of_the_page(browser, pages):
    page, said, _ = opened(browser, pages["usual"], 1280, "light")
    pixel = "c => [...c.getContext('2d').getImageData(0, 0, 1, 1).data].slice(0, 3)"
    light = page.locator(".map canvas").first.evaluate(pixel), page.locator(".large canvas").evaluate(pixel)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(100)
    dark = page.locator(".map canvas").first.evaluate(pixel), page.locator(".large canvas").evaluate(pixel)
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    assert [line for line in said if "willReadFrequently" not in line] == []


@pytest.mark.extras("playwright")
def test_other_data_replaces_what_is_shown(browser, pages):
    """As a page does that shows one text after another."""
    page, said, _ = opened(browser, pages["usual"], 1280)
    other = data_of(pages["one"])
    page.evaluate("data => inspector(document.querySelector('.inspector'), data)", other)
    assert page.locator("h1").text_content() == "a"
    assert page.locator('[data-part="text"] .token').count() == 1
    assert page.locator(".map").count() == 8
    assert said == []
