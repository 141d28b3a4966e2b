"""The figures that the inspector computes, and its page in a real browser."""

import itertools
import math
import re

import numpy as np
import pytest

from gpt2 import GPT2, GPT2Config, Tokenizer, inspect, inspection
from gpt2.generate import KVCache
from gpt2.page import write
from tests.browsing import HOSTILE, opened
from tests.gpt2.inspected import TEXT, data_of, make_model
from tests.stand_ins import strict_cupy
from tinygrad2 import no_grad


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load("bytes")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(model, tokenizer):
    return inspection.inspect(model, tokenizer, tokenizer.encode(TEXT).tolist(), len(TEXT), "a model")


def softmax(logits):
    weights = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits, axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_surprise_ranks_choices_and_bits_per_byte_agree_with_the_logits(data, model, tokenizer):
    tokens = tokenizer.encode(TEXT).astype(np.int64)
    p = softmax(model(tokens[None]).numpy()[0])
    own = p[np.arange(len(tokens) - 1), tokens[1:]]
    assert data["surprise"][0] is data["rank"][0] is None
    assert np.allclose(data["surprise"][1:], -np.log2(own), rtol=1e-5)
    assert data["rank"][1:] == [int((row > value).sum()) + 1 for row, value in zip(p[:-1], own, strict=True)]
    assert data["bits_per_byte"] == pytest.approx(-np.log2(own).sum() / (len(TEXT) - 1), rel=1e-5)
    ids, chances = (inspection.unpacked(data["choices"][name]) for name in ("ids", "p"))
    assert ids.shape == chances.shape == (len(tokens), 10)
    assert np.allclose(chances, np.sort(p)[:, :-11:-1], rtol=1e-5)
    assert np.allclose(np.take_along_axis(p, ids.astype(int), 1), chances, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("h.0.attn.c_proj.weight", 3e38, "the attention of layer 1 has values that are not finite"),
        ("h.1.mlp.c_proj.weight", 3e38, "the MLP of layer 2 has values that are not finite"),
        ("ln_f.weight", math.nan, "inspect: the model's logits are not finite numbers"),
    ],
)
def test_a_result_that_is_not_finite_is_named(tokenizer, name, value, message):
    model = make_model()
    parameter = dict(model.named_parameters())[name]
    parameter.data = np.full(parameter.shape, value, np.float32)
    with pytest.raises(ValueError, match=message):
        inspection.inspect(model, tokenizer, [97, 98], 2, "a model")


def test_the_logit_lens_applies_the_output_layer_to_the_residual_stream_of_every_layer(data, model, tokenizer):
    found = model.trace(tokenizer.encode(TEXT))
    weight, bias = (getattr(model.ln_f, name).numpy() for name in ("weight", "bias"))
    ids, chances = (inspection.unpacked(data["lens"][name]) for name in ("ids", "p"))
    for layer, stream in enumerate([*(one.stream for one in found.layers), found.stream]):
        x = stream.astype(np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias
        p = softmax(x @ model.wte.weight.numpy().T)
        assert np.allclose(chances[layer], p.max(-1), rtol=2e-4)
        assert np.array_equal(ids[layer], p.argmax(-1))
    assert np.array_equal(ids[-1], inspection.unpacked(data["choices"]["ids"])[:, 0])


def test_attention_is_stored_exactly_up_to_128_tokens_followed_by_the_mean_over_heads(data, model, tokenizer):
    found, T = model.trace(tokenizer.encode(TEXT)), len(TEXT)
    stored = inspection.unpacked(data["attention"]["weights"])
    assert data["attention"]["exact"]
    assert stored.shape == (2, 4, T * (T + 1) // 2)
    for layer, one in enumerate(found.layers):
        expected = one.weights()[:, np.tri(T, dtype=bool)]
        assert np.array_equal(stored[layer, :3], expected)
        assert np.allclose(stored[layer, 3], expected.mean(0), atol=1e-7)


def test_rms_sizes_and_nearest_neighbours(data, model, tokenizer):
    found = model.trace(tokenizer.encode(TEXT))
    sizes = {name: inspection.unpacked(value) for name, value in data["sizes"].items()}
    assert sizes["stream"][2, 5] == pytest.approx(math.sqrt((found.stream[5].astype(float) ** 2).mean()), rel=1e-6)
    assert sizes["mlp"][1, 3] == pytest.approx(math.sqrt((found.layers[1].mlp[3].astype(float) ** 2).mean()), rel=1e-6)
    assert sizes["attention"].shape == (2, len(TEXT))
    table = model.wte.weight.numpy().astype(float)
    cosine = table @ table[98] / np.linalg.norm(table, axis=1) / np.linalg.norm(table[98])
    best = [i for i in np.argsort(-cosine) if i != 98][:8]
    assert [i for i, _ in data["neighbours"]["98"]] == best
    assert [value for _, value in data["neighbours"]["98"]] == pytest.approx(cosine[best], abs=1e-4)


def test_the_strongest_links_and_an_overview_are_stored_for_a_longer_text():
    rng = np.random.default_rng(0)
    T = 150
    weights = np.tril(rng.random((2, T, T)).astype(np.float32) ** 20)
    weights /= weights.sum(-1, keepdims=True)
    keys, links, overview = inspection.strongest_links(weights)
    for head, query in itertools.product(range(2), (0, 7, 149)):
        expected = np.sort(weights[head, query])[::-1][:8]
        assert np.abs(links[head, query] / 255 - expected).max() <= 0.5 / 255 + 1e-6
        assert np.allclose(weights[head, query, keys[head, query]], expected)
    first = [i * T // 64 for i in range(65)]
    rows, columns = slice(first[40], first[41]), slice(first[7], first[8])
    assert overview.shape == (2, 64, 64)
    assert overview[1, 40, 7] == np.rint(255 * weights[1, rows, columns].sum(-1).mean())
    assert np.abs(overview.sum(-1) - 255).max() <= 32  # each of the 64 groups is rounded


def test_heads_are_labelled_with_the_patterns_that_they_follow(tokenizer):
    text = "one two one two one two three"
    tokens = tokenizer.encode(text).astype(np.int64)
    T = len(tokens)
    begins = np.array([c == " " for c in text])
    masks = inspection.patterns(tokens, begins)
    assert list(masks) == list(inspection.PATTERNS)

    def head(mask):
        weights = np.where(mask, 1.0, 1e-3) * np.tri(T)
        return weights / weights.sum(-1, keepdims=True)

    heads = inspection.describe_heads(np.stack([*map(head, masks.values()), head(np.zeros((T, T)))]), masks, tokens)
    assert [one["kind"] for one in heads] == [*inspection.PATTERNS, "spreads"]
    assert heads[0]["previous"] == [
        pytest.approx(0.98, abs=0.02),
        pytest.approx(np.mean(1 / np.arange(2, T + 1)), abs=1e-4),
        T - 1,
    ]
    assert heads[-1]["spread"] == pytest.approx((T + 1) / 2, rel=1e-4)
    assert heads[1]["spread"] < 1.5
    assert heads[1]["most"][:2] == [ord("o"), pytest.approx(1, abs=0.05)]  # the first token
    shares = [np.mean([text[: t + 1].count("o") / (t + 1) for t in range(T)]), heads[1]["most"][2]]
    assert shares[0] == pytest.approx(shares[1], abs=1e-4)


def test_patterns_match_their_names(tokenizer):
    text = "ab ab"
    masks = inspection.patterns(tokenizer.encode(text).astype(np.int64), np.array([c == " " for c in text]))
    found = {name: [(int(q), int(k)) for q, k in np.argwhere(mask)] for name, mask in masks.items()}
    assert found == {
        "previous": [(1, 0), (2, 1), (3, 2), (4, 3)],
        "first": [(1, 0), (2, 0), (3, 0), (4, 0)],
        "word": [(1, 0), (3, 2), (4, 2)],
        "same": [(3, 0), (4, 1)],
        "induction": [(3, 1), (4, 2)],
        "itself": [(1, 1), (2, 2), (3, 3), (4, 4)],
    }


def test_words_of_several_tokens_are_found(data, tokenizer):
    vocabulary = inspection.Vocabulary(tokenizer, 257)
    found = {int(at): TEXT[int(at) : word["end"]] for at, word in data["words"].items()}
    assert found == {3: "be", 7: "or", 10: "not", 14: "to", 17: "be"}  # the first word has no prediction
    assert vocabulary.words(tokenizer.encode("a b, c").astype(np.int64)) == []


def test_the_probability_of_a_word_includes_its_end(data, model, tokenizer):
    """The expected probabilities are computed from the complete text, without a cache. The beam search must find at
    least the best one-letter word."""
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
    vocabulary = inspection.Vocabulary(tokenizer, 257)
    read = KVCache(model, 1, start)
    with no_grad():
        model.features(np.array([[*TEXT[:start].encode()]]), cache=read)
    first = softmax(model(np.array([[*TEXT[:start].encode()]])).numpy()[0, -1])
    found = inspection.beam_search(model, vocabulary, read, start, first)
    assert len(found) == inspection.WORDS
    assert [p for p, _ in found] == sorted((p for p, _ in found), reverse=True)
    for p, word in found:
        assert p == pytest.approx(probability(word), rel=1e-4)
    assert place["begins"] == pytest.approx(first[sorted(letters)].sum(), rel=1e-4)
    best = max(letters, key=lambda i: first[i])
    assert found[0][0] >= probability([best]) * (1 - 1e-4)


def test_words_and_labels_of_gpt2_tokens(gpt2_files):
    vocabulary = inspection.Vocabulary(Tokenizer.load("gpt2"), 50304)
    tokens = vocabulary.tokenizer.encode(" tokenizers the\u202e\n").astype(np.int64)
    assert [vocabulary.label(int(i)) for i in tokens][:2] == [" token", "izers"]
    assert "".join(vocabulary.label(int(i)) for i in tokens).startswith(" tokenizers the\\")
    assert vocabulary.label(50256) == "<|endoftext|>"
    assert vocabulary.label(50300) == "<unused 50300>"
    assert vocabulary.words(vocabulary.tokenizer.encode("It is tokenizers old").astype(np.int64)) == [slice(2, 4)]


@pytest.mark.parity
@pytest.mark.extras("torch", "transformers")
def test_figures_on_the_page_agree_with_transformers(tmp_path, tokenizer):
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
    weights, T = inspection.unpacked(data["attention"]["weights"]), len(TEXT)
    for layer, one in enumerate(expected.attentions):
        assert relative(weights[layer, :4], one[0].numpy()[:, np.tri(T, dtype=bool)]) < 2e-5
    p = softmax(expected.logits[0].numpy())
    assert relative(inspection.unpacked(data["choices"]["p"]), np.sort(p)[:, :-11:-1]) < 2e-5
    assert relative(np.array(data["surprise"][1:]), -np.log2(p[np.arange(T - 1), tokens[0, 1:]])) < 2e-5
    lens = np.stack([softmax(x.numpy()).max(-1) for x in (*seen, expected.logits[0])])
    assert relative(inspection.unpacked(data["lens"]["p"]), lens) < 2e-5
    sizes = inspection.unpacked(data["sizes"]["stream"])[:-1]
    norms = np.stack([np.sqrt((x[0].numpy() ** 2).mean(-1)) for x in expected.hidden_states[:-1]])
    assert relative(sizes, norms) < 2e-5


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_results_on_a_device_equal_those_on_the_cpu(data, folder, tokenizer):
    with strict_cupy.registered():
        model = GPT2.from_pretrained(folder, device="cuda")
        found = inspection.inspect(model, tokenizer, tokenizer.encode(TEXT).tolist(), len(TEXT), "a model")
    for mine, expected in ((found, data), (found["lens"], data["lens"])):
        assert list(mine) == list(expected)
    weights = (inspection.unpacked(one["attention"]["weights"]) for one in (found, data))
    assert np.allclose(*weights, atol=1e-5)
    assert found["words"]["10"]["p"] == pytest.approx(data["words"]["10"]["p"], rel=1e-3)


def test_words_at_the_end_of_the_context(tokenizer):
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=257)
    text = "to be or not 2be"
    found = inspection.inspect(make_model(config), tokenizer, tokenizer.encode(text).tolist(), 16, "a model")
    assert [int(at) for at in found["words"]] == [3, 6, 9, 13]
    assert all(1 <= len(word["words"]) <= inspection.WORDS for word in found["words"].values())


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(model, tokenizer, tmp_path_factory):
    """Pages for an ordinary text, malicious and unusual texts, a single token, and more than 128 tokens."""
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
        data = inspection.inspect(model, tokenizer, tokens, len(tokens), "a <model>")
        write(inspection.inspector_page(data), path / f"{name}.html")
    return {name: path / f"{name}.html" for name in texts}


@pytest.mark.extras("playwright")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["usual", "hostile", "strange", "one", "long"])
def test_pages_open_without_errors_requests_or_horizontal_scrolling(browser, pages, name, width, scheme):
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
def test_tokens_are_shown_with_their_surprise_and_expected_tokens(browser, pages, data):
    page, said, _ = opened(browser, pages["usual"], 1280)
    tokens = page.locator('[data-part="text"] .token')
    assert tokens.count() == len(TEXT)
    assert "".join(tokens.all_text_contents()) == TEXT
    at = int(np.argmax([0, *data["surprise"][1:]]))
    assert tokens.nth(at).get_attribute("aria-selected") == "true"  # the most surprising token is initially selected
    shade = "all => all.map(e => parseFloat(e.style.getPropertyValue('--s')))"
    found = page.eval_on_selector_all('[data-part="text"] .token', shade)
    assert found == pytest.approx([min(1, (bits or 0) / 10) for bits in data["surprise"]], abs=1e-4)
    panel = page.locator('[data-part="expected"]')
    tokens.nth(4).hover()
    assert panel.locator("h3").text_content() == "Token 5: “e”"
    ids, p = (inspection.unpacked(data["choices"][name])[3] for name in ("ids", "p"))
    rows = panel.locator(".bars").filter(has_not_text="be").first
    names = rows.locator(".mono").all_text_contents()
    assert names[:10] == [data["labels"][str(i)].replace(" ", "␣") for i in ids]
    assert rows.locator(".value").first.text_content().startswith(f"{100 * p[0]:.0f}"[:1])
    page.mouse.move(1, 1)
    assert panel.locator("h3").text_content().startswith(f"Token {at + 1}:")
    tokens.nth(4).click()
    page.mouse.move(1, 1)
    assert panel.locator("h3").text_content() == "Token 5: “e”"
    titles = panel.locator("h4").all_text_contents()
    if data["words"]["3"]["begins"] >= 0.5:
        assert titles[0] == "Expected word (the text has “be”)"
    else:
        assert titles[-1].startswith("Expected words where “be” begins")
    tokens.nth(0).click()
    assert "no tokens before it" in panel.text_content()
    assert said == []


@pytest.mark.extras("playwright")
def test_a_selected_head_is_enlarged_described_and_drawn_as_arcs(browser, pages, data):
    page, said, _ = opened(browser, pages["usual"], 1280)
    maps = page.locator(".map")
    assert maps.count() == 2 * (3 + 1)
    page.locator('[data-part="text"] .token').nth(8).click()
    maps.nth(4 + 2).click()
    assert page.locator('[data-part="head"] h3').text_content() == "Layer 2, head 3"
    T = len(TEXT)
    weights = np.zeros((T, T))
    weights[np.tri(T, dtype=bool)] = inspection.unpacked(data["attention"]["weights"])[1, 2]
    best = int(weights[8].argmax())
    said_of_it = page.locator('[data-part="arcs-text"]').text_content()
    assert said_of_it.startswith("From “r” (token 9), head 3 of layer 2 looks most at ")
    strongest = page.locator('[data-part="arcs-text"] strong').text_content()
    assert (f"(token {best + 1})" in strongest) or (best == 8 and strongest.startswith("itself"))
    assert page.locator(".strip path").count() == int((weights[8] >= 0.01).sum())
    described = page.locator('[data-part="head"]').text_content()
    kind = data["attention"]["heads"][1][2]["kind"]
    assert (data["patterns"].get(kind, ["no single pattern"])[0]).lower() in described.lower()
    # The opacity of a pixel grows with its weight; all pixels of later keys, which are masked, have the same opacity.
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
    assert [line for line in said if "willReadFrequently" not in line] == []  # (this test reads pixels)


@pytest.mark.extras("playwright")
def test_heads_are_sorted_by_the_selected_pattern(browser, pages, data):
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
def test_all_controls_are_accessible_by_keyboard(browser, pages):
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
def test_the_logit_lens_shows_the_prediction_of_every_layer(browser, pages, data):
    page, said, _ = opened(browser, pages["usual"], 1280)
    ids = inspection.unpacked(data["lens"]["ids"])
    rows = page.locator(".lens tbody tr")
    assert rows.count() == 3
    for layer in range(3):
        shown = rows.nth(layer).locator("td").all_text_contents()
        assert shown == [data["labels"][str(i)].replace(" ", "␣") for i in ids[layer]]
    predicted = inspection.unpacked(data["lens"]["ids"])
    for t in range(len(TEXT)):
        page.locator(".lens thead td, .lens thead th:not(.row)").nth(t).click()
        label = data["labels"][str(predicted[2, t])].replace(" ", "␣")
        hint = page.locator('[data-part="lens-text"]').text_content()
        assert hint.startswith(f"After “{TEXT[t].replace(' ', '␣')}” (token {t + 1}), the model predicts “{label}” (")
        since = 2 if predicted[1, t] != predicted[2, t] else 1 if predicted[0, t] != predicted[2, t] else 0
        assert ("Layer 1 would predict", "from layer 1 on", "from the embedding on")[2 - since] in hint
    assert page.locator(".chips span.mono").count() == 8
    assert page.locator(".chart polyline").count() == 6
    assert said == []


@pytest.mark.extras("playwright")
def test_the_page_of_a_long_text_states_that_weights_are_omitted(browser, pages):
    page, said, _ = opened(browser, pages["long"], 1280)
    assert "the 8 largest weights" in page.locator('[data-part="maps-note"]').text_content()
    assert "128 of 144" in page.locator('[data-part="lens-text"]').text_content()
    assert page.locator(".large canvas").evaluate("c => c.width") == 64
    page.locator('[data-part="text"] .token').nth(143).click()
    assert 1 <= page.locator(".strip path").count() <= 8
    assert said == []


@pytest.mark.extras("playwright")
def test_attention_maps_use_the_colours_of_the_page(browser, pages):
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
@pytest.mark.parametrize("width", [390, 1280])
def test_the_logit_lens_starts_at_the_left_with_complete_labels(browser, pages, width):
    page, _, _ = opened(browser, pages["usual"], width)
    lens = page.locator('[data-part="lens"]')
    assert lens.evaluate("box => box.scrollLeft") == 0
    assert page.eval_on_selector_all(".lens .row", "rows => rows.every(row => row.scrollWidth <= row.clientWidth)")
    shown = lens.evaluate("box => box.clientWidth - box.querySelector('.row').offsetWidth")
    assert shown > 200
    for cell in (page.locator(".lens thead th:not(.row)").first, page.locator(".lens thead th:not(.row)").last):
        cell.evaluate("cell => cell.click()")
    assert (lens.evaluate("box => box.scrollLeft") > 0) == lens.evaluate("box => box.scrollWidth > box.clientWidth")


@pytest.mark.parametrize(
    ("text", "title"),
    [("a\n b", "a b"), ("word " * 12, "word " * 11 + "word"), ("words " * 12, "words " * 9 + "words\u2026")],
)
def test_a_truncated_title_ends_with_an_ellipsis(text, title):
    found = re.search("<title>Inside the model: (.*)</title>", inspection.inspector_page({"text": text}))
    assert found[1] == title


@pytest.mark.extras("playwright")
def test_new_data_replaces_the_shown_data(browser, pages):
    """The web page of gpt2.serve shows one text after another."""
    page, said, _ = opened(browser, pages["usual"], 1280)
    other = data_of(pages["one"])
    page.evaluate("data => inspector(document.querySelector('.inspector'), data)", other)
    assert page.locator("h1").text_content() == "a"
    assert page.locator('[data-part="text"] .token').count() == 1
    assert page.locator(".map").count() == 8
    assert said == []
