"""The report page: its contents, its safety (no text in it is executed or fetched), and its layout in a browser."""

import html.parser
import itertools
import json
import math
import os
import re

import pytest

from gpt2 import report
from gpt2.training.run import LOG, SAMPLES, STARTS
from tests.browsing import HOSTILE, opened

VOID = {"meta", "link", "input"}


def make_run(out, steps=300, evaluate=50, tokens=512, **start):
    """Write an out-dir like that of train.py."""
    out.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 2 + 3 / step, "lr": 1e-3 * step / steps, "grad_norm": 1 + 5 / step, "seconds": 0.5}
        row |= {"tokens_per_s": 1000 + step % 7, "tokens": step * tokens}
        rows.append(row | ({"val_loss": 2.1 + 3 / step} if step % evaluate == 0 else {}))
    samples = [{"step": row["step"], "text": f"sample of {row['step']}"} for row in rows if "val_loss" in row]
    first = {
        "step": 0,
        "time": 1.7e9,
        "given": {"data": "a b", "profile": True},
        "options": {"max_iters": steps, "learning_rate": 1e-3, "seed": 1337, "out_dir": str(out)},
        "model": {"n_layer": 4},
        "data": {"path": "data/text"},
        "machine": {"device": "cpu", "threads": 2, "processor": "a processor"},
    }
    for name, lines in ((LOG, rows), (SAMPLES, samples), (STARTS, [first | start])):
        write_rows(out / name, lines)
    return out


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Reader(html.parser.HTMLParser):
    """Parses a page into elements and their texts, and asserts that all elements are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def of_class(self, name):
        return [attributes for _, attributes in self.found if name in (attributes.get("class") or "").split()]


def page_of(*outs):
    runs = [report.Run.load(out) for out in outs]
    return Reader(report.report_page(runs[0]) if len(runs) == 1 else report.comparison_page(runs))


def test_the_page_shows_the_run(tmp_path):
    page = page_of(make_run(tmp_path / "out"))
    titles = [page.texts["h3"].index(title) for title in ("Loss, nats per token", "Learning rate", "Tokens per second")]
    assert titles == [0, 2, 4]
    assert page.texts["article"][0] == "step 300sample of 300"
    assert len(page.texts["article"]) == 6
    assert "300 of 300 steps" in page.texts["header"][0]
    assert page.texts["dd"][0] == "2.1100 at step 300"
    assert page.texts["dd"][1] == "2.0101 mean of the last 6"
    assert page.texts["dd"][-1] == "2 min in steps"
    assert page.texts["pre"][-1] == "python train.py '--data=a b' --profile"
    assert "from step 0 (cpu, a processor, 2 threads)" in page.texts["li"][0]
    assert {"--max-iters300", "--learning-rate0.001", "--seed1337", "n_layer4", "pathdata/text", "threads2"} <= {
        *page.texts["tr"]
    }


def test_the_page_converts_nats_per_token_to_bits_per_byte(tmp_path):
    text = report.report_page(report.Run.load(make_run(tmp_path / "out", data={"bytes per token": 4.0})))
    assert "so 1 nat per token is 1 / (4 ln\u00a02) = 0.3607 bits per byte." in text
    assert "1 nat per token" not in report.report_page(report.Run.load(make_run(tmp_path / "unknown")))


def test_options_are_shown_as_command_line_flags_in_groups(tmp_path):
    options = {"max_iters": 300, "profile": True, "zero": False, "seed": 7, "init": None, "of_another_version": "x"}
    page = page_of(make_run(tmp_path / "out", options=options))
    titles = [title for title in page.texts["h3"] if title.startswith("Options: ")]
    assert titles == [
        f"Options: {group}" for group in ("model", "data and batches", "optimizer", "output", "computation", "others")
    ]
    rows = ["--init-", "--max-iters300", "--zerooff", "--profileon", "--seed7", "--of-another-versionx"]
    assert [row for row in page.texts["tr"] if row.startswith("--")] == rows
    assert [found["class"] for tag, found in page.found if tag == "tr" and found.get("class")] == ["given"]


def test_all_text_in_a_run_is_escaped(tmp_path):
    out = make_run(tmp_path / HOSTILE[:3].replace("/", "") / "<b>", given={"data": HOSTILE}, options={HOSTILE: HOSTILE})
    write_rows(
        out / SAMPLES, [{"step": 1, "text": HOSTILE}, {"step": 2, "text": "lone \ud800, \u202e, \x00"}, {"step": 3}]
    )
    rows = [{"step": 1, "loss": 2.0, HOSTILE: 1.0}, {"step": 2, "loss": 1.0, HOSTILE: 2.0}]
    write_rows(out / LOG, rows)
    for page in (page_of(out), page_of(out, out)):
        tags = [tag for tag, _ in page.found]
        assert tags.count("script") == 1
        assert not {"img", "b", "iframe"} & set(tags)
        assert not any(name.startswith("on") or name in ("style", "src") for _, found in page.found for name in found)
        assert HOSTILE in page.texts["h3"]
    assert page_of(out).texts["article"][1:] == [
        "step 2lone \ufffd, \ufffd, \ufffd",
        "step 1" + HOSTILE.replace("\x1b", "\ufffd"),
    ]
    report.write(report.report_page(report.Run.load(out)), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<script>") == 1


def test_values_that_cannot_be_plotted_are_omitted(tmp_path):
    out = make_run(tmp_path / "out", steps=3, evaluate=1)
    strange = [math.nan, math.inf, None, "text", True, [1], 10**400, -1e308]
    rows = [
        {"step": i, "loss": value, "val_loss": value, "tokens": value, "lr": value} for i, value in enumerate(strange)
    ]
    write_rows(out / LOG, rows)
    write_rows(out / STARTS, [{"step": 0, "options": "none", "machine": 3, "time": "now"}, {"step": 1, "time": 1e50}])
    page = page_of(out)
    assert page.of_class("plot") == []
    assert page.texts["dd"][0] == "- not measured"
    page_of(out, out)
    write_rows(out / LOG, [*rows, {"step": 20, "loss": 3.0}, {"step": 21, "loss": 1.0}])
    assert len(page_of(out).of_class("line")) == 2  # linear and logarithmic


def test_a_run_without_steps_has_a_page(tmp_path):
    out = make_run(tmp_path / "out", steps=0)
    (out / SAMPLES).unlink()
    (out / STARTS).unlink()
    assert page_of(out).texts["h1"] == [str(out)]


def test_a_long_run_is_plotted_with_few_points_that_keep_the_extremes(tmp_path):
    points = [(float(x), 9.0 if x == 30_000 else 5.0 + x % 2) for x in range(1, 50_001)]
    figure = report.chart("Loss", [report.Curve("loss", points, spread=True)], "step")
    assert len(figure) < 60_000
    line = re.search(r'class="line c0" d="M([^"]+)"', figure)[1].split()
    assert len(line) == 2 * report.BINS
    axis = report.Axis.over([5.0, 9.0], margin=0.04)
    heights = [axis.low + (1 - float(y) / 1000) * (axis.high - axis.low) for y in line[1::2]]
    assert heights[0] == pytest.approx(5.5, abs=0.01)
    assert max(heights) == pytest.approx(5.5 + 3.5 / 250, abs=0.01)
    spread = re.search(r'class="spread c0" d="M([^"]+)Z"', figure)[1].split()
    top = min(float(y) for y in spread[1::2])
    assert axis.low + (1 - top / 1000) * (axis.high - axis.low) == pytest.approx(9, abs=0.01)
    assert figure.count("<tr ") == report.BINS


def test_the_table_contains_the_plotted_values():
    curves = [report.Curve("a", [(1, 4.0), (2, 3.0), (3, 2.0)]), report.Curve("b", [(2, 0.5)], colour=1)]
    page = Reader(report.chart("Loss", curves, "step"))
    assert page.texts["tr"] == ["stepab", "14", "230.5", "32"]
    assert [found["data-x"] for tag, found in page.found if tag == "tr" and found] == ["0.0000", "0.5000", "1.0000"]
    (label,) = [found["aria-label"] for tag, found in page.found if tag == "svg" and "aria-label" in found]
    assert label == "Loss: a 4 to 2; b 0.5 to 0.5"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (1.4, 5.6), (3e-5, 3e-3), (1, 19_073), (2.30, 2.31), (-3, 8), (1e9, 1e12), (1e-90, 1e90)],
)
def test_ticks_are_few_distinct_and_within_the_axis(low, high, log):
    axis = report.Axis.over([low, high], log)
    assert axis.log == (log and low > 0)
    found = report.ticks(axis.low, axis.high, axis.log)
    assert 3 <= len(found) <= 8
    assert found == sorted(found)
    assert all(-1e-9 <= axis.at(value) <= 1 + 1e-9 for value in found)
    assert len({report.short(value) for value in found}) == len(found)


@pytest.mark.parametrize("value", [0.0, 5.0, -2.0, 1e-200, 1e99])
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_for_a_single_value_has_a_margin(value, log):
    axis = report.Axis.over([value], log)
    assert axis.low < value < axis.high
    assert 0 < axis.at(value) < 1
    assert report.ticks(axis.low, axis.high, axis.log)


@pytest.mark.parametrize(
    ("value", "text", "brief"),
    [
        (0, "0", "0"),
        (12000, "12,000", "12k"),
        (1234.5, "1,234", "1.234k"),
        (-2.5e6, "-2,500,000", "-2.5M"),
        (1.55764, "1.558", "1.55764"),
        (0.0003, "3.00e-04", "3e-4"),
        (2.5e-7, "2.50e-07", "2.5e-7"),
    ],
)
def test_numbers_are_formatted_for_text_and_for_axes(value, text, brief):
    assert (report.number(value), report.short(value)) == (text, brief)


def test_runs_are_compared(tmp_path):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", options={"max_iters": 300, "learning_rate": 2e-3, "seed": 1337, "out_dir": "b"})
    rows = report.Run.load(b).rows
    write_rows(b / LOG, [row | {"val_loss": row["val_loss"] - 1} if "val_loss" in row else row for row in rows])
    page = page_of(a, b)
    (winner,) = [i for i, (tag, found) in enumerate(page.found) if tag == "tr" and found.get("class") == "best"]
    assert sum(tag == "tr" for tag, _ in page.found[:winner]) == 2  # the heads and run a
    differing = [row for row in page.texts["tr"] if row.startswith("--")]
    assert differing == ["--learning-rate0.0010.002"]
    assert page.texts["h3"][:5] == [
        *(report.LABELS[key] for key in ("val_loss", "loss", "lr", "grad_norm", "tokens_per_s"))
    ]
    assert len(page.of_class("line")) == 10
    assert {text for text in page.texts["span"] if text in ("step", "tokens")} == {"step"}


def test_runs_with_different_step_sizes_are_compared_over_tokens(tmp_path):
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", tokens=1024))
    assert {text for text in page.texts["span"] if text in ("step", "tokens")} == {"tokens"}


def test_a_run_keeps_its_colour_if_another_run_has_no_values(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    write_rows(
        a / LOG, [{key: value for key, value in row.items() if key != "val_loss"} for row in report.Run.load(a).rows]
    )
    validation = report.chart_of("val_loss", [report.Run.load(a), report.Run.load(b)])
    assert 'class="line c1"' in validation
    assert "c0" not in validation


def test_the_ninth_run_uses_the_first_colour_with_a_dashed_line(tmp_path):
    figure = report.chart_of("loss", [report.Run.load(make_run(tmp_path / "a", steps=3))] * 9)
    assert figure.count('class="line c0"') == figure.count('class="line c0 dashed"') == 1


def test_a_selection_of_many_samples_includes_the_first_and_the_last(tmp_path):
    out = make_run(tmp_path / "out")
    write_rows(out / SAMPLES, [{"step": step, "text": "x"} for step in range(1, 1001)])
    page = page_of(out)
    assert len(page.texts["article"]) == report.SAMPLES_SHOWN
    assert page.texts["article"][0] == "step 1,000x"
    assert page.texts["article"][-1] == "step 1x"


# Baselines and earlier runs -------------------------------------------------------------------------------------------


def test_baselines_are_horizontal_lines_with_a_value_in_every_row(tmp_path):
    out = make_run(tmp_path / "out", baselines={"unigram": 3.25, "bigram": 2.5, "damaged": None})
    page = page_of(out)
    assert len(page.of_class("level")) == 2 * 2 * 2  # two lines and two names in two charts
    (head,) = {text for text in page.texts["tr"] if text.startswith("steptraining")}
    assert head == "steptrainingvalidationunigram modelbigram model"
    rows = [text for text in page.texts["tr"] if text.startswith("50") and "2.16" in text]
    assert rows
    assert all(row.endswith("3.252.5") for row in rows)


def test_the_previous_run_on_the_same_data_is_plotted_at_equal_token_counts(tmp_path):
    data = {"path": "data/text", "fingerprint": "f" * 64}
    make_run(tmp_path / "older", time=1.0e9, data=data)
    make_run(tmp_path / "before", steps=600, tokens=1024, time=1.5e9, data=data)
    make_run(tmp_path / "other", time=1.6e9, data={"fingerprint": "0" * 64})
    make_run(tmp_path / "later", time=1.8e9, data=data)
    (tmp_path / "folder").mkdir()
    out = make_run(tmp_path / "out", time=1.7e9, data=data)
    assert report.previous_run(tmp_path / "older") is None
    previous = report.previous_run(out)
    assert previous.name == "before"
    run = report.Run.load(out)
    *_, curve = report.loss_curves(run, previous)
    assert curve.name == "validation of before"
    assert curve.points[0] == (100.0, 2.1 + 3 / 50)  # its step 50 is at the token count of this run's step 100
    assert curve.points[-1][0] == 300.0  # not beyond the end of this run
    assert "validation of before" in report.report_page(run, previous)
    assert report.previous_run(make_run(tmp_path / "unknown", data={})) is None


def test_fingerprints_are_shortened(tmp_path):
    page = page_of(make_run(tmp_path / "out", data={"fingerprint": "0123456789ab" + "c" * 52}))
    assert "fingerprint0123456789ab" in page.texts["tr"]


def test_the_command_is_shown_as_it_was_typed(tmp_path):
    command = "mpirun -n 2 python train.py --data 'a b' </pre>"
    assert page_of(make_run(tmp_path / "out", command=command)).texts["pre"][-1] == command


def test_a_chart_with_too_few_points_is_omitted(tmp_path):
    assert report.chart("Loss", [report.Curve("a", [(1, 4.0)]), report.Curve("b", [(1, 2.0)])], "step") == ""
    level = report.Curve("unigram", [(1, 3.0), (9, 3.0)], level=True)
    assert report.chart("Loss", [report.Curve("a", [(1, 4.0)]), level], "step") == ""
    page = page_of(make_run(tmp_path / "out", steps=1, evaluate=1))
    assert page.of_class("plot") == []
    assert "Curves" not in page.texts["h2"]


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    a = make_run(tmp_path / "a", data={"tokenizer": "bytes", "tokenizer fingerprint": "a", "bytes per token": 1.0})
    b = make_run(tmp_path / "b", data={"tokenizer": "gpt2", "tokenizer fingerprint": "b", "bytes per token": 4.0})
    rows = report.Run.load(b).rows
    write_rows(b / LOG, [row | {"val_loss": 2 * row["val_loss"]} if "val_loss" in row else row for row in rows])
    page = page_of(a, b)
    bits = [2.11 / math.log(2), 2 * 2.11 / 4 / math.log(2)]
    cells = [text for text in page.texts["td"] if "bits per byte" in text]
    assert cells == [
        f"{loss:.4f} at step 300, {x:.4f} bits per byte" for loss, x in zip((2.11, 4.22), bits, strict=True)
    ]
    (winner,) = [i for i, (tag, found) in enumerate(page.found) if tag == "tr" and found.get("class") == "best"]
    assert sum(tag == "tr" for tag, _ in page.found[:winner]) == 2  # the heads and run a: b has more nats, fewer bits
    assert page.texts["h3"][:2] == ["Validation loss, bits per byte", "Training loss, bits per byte"]
    unknown = make_run(tmp_path / "unknown", data={"tokenizer": "mine"})
    page = page_of(a, unknown)
    assert not any(found.get("class") == "best" for _, found in page.found)
    assert page.texts["h3"][0] == "Validation loss, nats per token"


# Writing the page ----------------------------------------------------------------------------------------------------


def test_the_page_reloads_itself_until_the_last_write(tmp_path):
    writer = report.Writer(make_run(tmp_path / "out"), pytest.fail)
    again = f'<meta http-equiv="refresh" content="{report.REFRESH}">'
    writer.update()
    assert again in (tmp_path / "out" / report.REPORT).read_text()
    writer.update(last=True)
    assert "refresh" not in (tmp_path / "out" / report.REPORT).read_text().split("<title>")[0]


def test_the_page_is_replaced_atomically(tmp_path, monkeypatch):
    file = tmp_path / "report.html"
    report.write("old", file)
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        report.write("new", file)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_training_spends_at_most_one_percent_of_its_time_on_the_page(tmp_path, monkeypatch):
    clock = [100.0]
    written = []

    def slowly(text, file):
        written.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(report, "write", slowly)
    writer = report.Writer(make_run(tmp_path / "out"), pytest.fail)
    for _ in range(50):
        writer.update()
        clock[0] += 10
    assert written == [100.0, 302.0, 504.0]
    writer.update(last=True)
    assert len(written) == 4


def test_training_updates_the_page_every_30_seconds(tmp_path, monkeypatch):
    clock, written = [100.0], []
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(report, "write", lambda text, file: written.append(clock[0]))
    writer = report.Writer(make_run(tmp_path / "out"), pytest.fail)
    assert writer.is_old()
    for _ in range(70):
        if writer.is_old():
            writer.update()
        clock[0] += 1
    assert written == [100.0, 130.0, 160.0]


def test_a_page_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    out = make_run(tmp_path / "out")
    (out / report.REPORT).mkdir()
    said = []
    report.Writer(out, said.append).update()
    assert len(said) == 1
    assert "report.html was not written: IsADirectoryError" in said[0]


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    assert report.main(["a"]) == 0
    assert report.main(["a", "b"]) == 0
    assert report.main(["a", "b", "--output", "both.html"]) == 0
    pages = ["a/report.html", "comparison.html", "both.html"]
    assert capsys.readouterr().out.splitlines() == [f"page: {page}; open it in a browser" for page in pages]
    assert "<h1>a</h1>" in (tmp_path / "a" / "report.html").read_text()
    assert "<h1>2 runs compared</h1>" in (tmp_path / "both.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere"], 1, "nowhere: no log.jsonl in this folder; expected the out-dir of a train.py run"),
        (["a", "nowhere"], 1, "nowhere: no log.jsonl in this folder"),
        (
            ["a", "--output", "no/such/folder.html"],
            2,
            "--output no/such/folder.html: the folder no/such/ does not exist",
        ),
    ],
)
def test_errors_print_one_line(tmp_path, capsys, monkeypatch, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    try:
        found = report.main(arguments)
    except SystemExit as end:
        found = end.code
    assert found == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"gpt2.report: error: {message}")
    assert len(said.err.splitlines()) == 1


# In a browser --------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """The page of a run with a malicious sample, and the comparison page of two runs."""
    a = make_run(tmp_path / "a-run-with-a-name-that-is-quite-a-bit-longer-than-a-phone-is-wide", steps=150)
    b = make_run(tmp_path / "b")
    with (a / SAMPLES).open("a") as file:
        file.write(json.dumps({"step": 300, "text": HOSTILE + "x" * 300}) + "\n")
    assert report.main([str(a)]) == 0
    assert report.main([str(a), str(b), "--output", str(tmp_path / "both.html")]) == 0
    return a / "report.html", tmp_path / "both.html"


@pytest.mark.extras("playwright")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_open_without_errors_requests_or_horizontal_scrolling(browser, files, width, scheme):
    grounds = set()
    for file, curves in zip(files, (5, 10), strict=True):
        page, said, asked = opened(browser, file, width, scheme)
        assert said == []
        assert asked == [file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = page.eval_on_selector_all(
            "path.line", "all => all.filter(p => p.checkVisibility()).map(p => p.getBoundingClientRect().toJSON())"
        )
        assert len(boxes) == curves
        assert all(box["width"] > 50 and box["height"] > 1 for box in boxes)
        sizes = "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
        assert min(page.eval_on_selector_all("body *", sizes)) >= 12
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert "taken" not in page.title()
        page.close()
    assert grounds == {"rgb(251, 250, 248)" if scheme == "light" else "rgb(20, 23, 28)"}


@pytest.mark.extras("playwright")
def test_labels_do_not_overlap(browser, files):
    page, _, _ = opened(browser, files[0])
    for axis, start, end in (("x", "left", "right"), ("y", "bottom", "top")):
        charts = page.eval_on_selector_all(
            "svg.plot",
            f"all => all.filter(p => p.checkVisibility()).map(p => [...p.querySelectorAll('text.{axis}')]"
            ".map(t => t.getBoundingClientRect().toJSON()))",
        )
        assert len(charts) == 4
        for labels in charts:
            sign = 1 if axis == "x" else -1
            assert all(sign * a[end] < sign * b[start] for a, b in itertools.pairwise(labels))


@pytest.mark.extras("playwright")
def test_the_pointer_shows_values_and_the_checkbox_changes_the_axes(browser, files):
    page, said, _ = opened(browser, files[0], 1000)
    figure = page.locator("figure:visible").first
    box = figure.locator("svg.plot").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 49 / 149, box["y"] + 20)
    readout = figure.locator(".readout")
    assert readout.text_content() == "step 50 · training 2.06 · validation 2.16"
    page.mouse.move(0, 0)
    assert readout.text_content() == ""
    assert figure.get_attribute("class") == "wide linear"
    page.get_by_label("logarithmic axes").check()
    assert page.locator("figure:visible").first.get_attribute("class") == "wide logarithmic"
    page.locator("figure:visible summary").first.click()
    assert page.locator("figure:visible table").first.is_visible()
    assert said == []


@pytest.mark.extras("playwright")
def test_the_policy_blocks_foreign_scripts(browser, files):
    text = files[0].read_text(encoding="utf-8")
    files[0].write_text(
        text.replace("<main>", '<main><script>document.title = "taken"</script><img src="http://127.0.0.1:9/">')
    )
    page, said, _ = opened(browser, files[0])
    assert page.title() != "taken"
    assert len([line for line in said if "Content Security Policy" in line]) == len(said) == 2
