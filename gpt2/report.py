"""The report of a run, out/report.html: a single HTML file that needs no server, network or library.

`python -m gpt2.report OUT` rewrites the report of a run; `python -m gpt2.report OUT1 OUT2 ...` compares runs. A curve
has at most BINS points, each of which is the mean of the values in an interval of the axis. The table below a chart
contains the same values, and the readout at the pointer shows a row of it. All text is escaped, and the page's
Content-Security-Policy (see page.py) forbids all scripts but its own, so text in a sample cannot be executed.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TypeGuard

from gpt2 import console
from gpt2.console import Parser, duration
from gpt2.page import page, printable, resource, write
from gpt2.training.options import GROUPS, flag
from gpt2.training.run import LOG, SAMPLES, STARTS, read_log
from tinygrad2.checkpoint import JsonObject

REPORT, COMPARISON = "report.html", "comparison.html"
BINS, DOTS = 200, 40  # maximum number of points per curve; up to DOTS points are marked with dots
SAMPLES_SHOWN = 20
COLOURS = 8  # the number of colours in the style sheet; further curves reuse them with dashed lines
SHARE = 0.01  # maximum fraction of a run's time that is spent on its report
REFRESH = 30  # seconds after which a browser reloads the page of a running run

LABELS = {
    "loss": "Training loss, nats per token",
    "val_loss": "Validation loss, nats per token",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_s": "Tokens per second",
    "comm_seconds": "Seconds per step spent waiting for other ranks",
    "mfu": "Model FLOP utilization (MFU), as a fraction of the device's peak",
}
NOT_DRAWN = ("step", "seconds", "tokens")  # numbers in the log that have no chart


@dataclass
class Run:
    """The contents of an out-dir: the rows of the log, the samples, and a record of each start."""

    name: str
    rows: list[JsonObject]
    samples: list[JsonObject]
    starts: list[JsonObject]

    @staticmethod
    def load(out: Path) -> Run:
        """Read the files in an out-dir. Raises FileNotFoundError if the folder is not the out-dir of a run."""
        if not (out / LOG).is_file():
            raise FileNotFoundError(f"{out}: no {LOG} in this folder; expected the out-dir of a train.py run")
        return Run(str(out), *(read_log(out / name) for name in (LOG, SAMPLES, STARTS)))

    def started(self, part: str) -> JsonObject:
        """A part of the record of the last start: "given", "options", "model", "data" or "machine"."""
        value = self.starts[-1].get(part) if self.starts else None
        return value if isinstance(value, dict) else {}

    def values(self, key: str, x: str = "step") -> list[tuple[float, float]]:
        """The (x, value) pairs of all rows in which both are finite numbers."""
        first = self.starts[:1] if key == "val_loss" and x == "step" else []  # has the loss before the first step
        pairs = ((row.get(x), row.get(key)) for row in [*first, *self.rows])
        return [(float(a), float(b)) for a, b in pairs if is_number(a) and is_number(b)]

    def others(self) -> list[str]:
        """The keys of all numbers in the log except the losses: first those in LABELS, then the others by name."""
        found = {key for row in self.rows for key, value in row.items() if is_number(value)}
        found -= {"loss", "val_loss", *NOT_DRAWN}
        if not any(seconds for _, seconds in self.values("comm_seconds")):
            found.discard("comm_seconds")  # there is only one rank
        return [*(key for key in LABELS if key in found), *sorted(found - LABELS.keys())]

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return self.rows[-1]["step"] if self.rows else 0

    def baselines(self) -> dict[str, float]:
        """The losses of n-gram models, by name, from the record of the first start."""
        found = self.starts[0].get("baselines") if self.starts else None
        return {name: y for name, y in found.items() if is_number(y)} if isinstance(found, dict) else {}

    def bits_per_byte(self, loss: float) -> float | None:
        """A loss in nats per token, converted to bits per byte of the validation text; None if the number of bytes is
        not recorded."""
        size = self.started("data").get("bytes per token")
        return loss / (math.log(2) * size) if is_number(size) and size > 0 else None

    def tokenizer(self) -> object:
        """The identity of the tokenizer: its fingerprint, or, in records of earlier versions, its name."""
        data = self.started("data")
        return data.get("tokenizer fingerprint", data.get("tokenizer"))

    def best(self) -> tuple[float, float] | None:
        """The step and the value of the lowest validation loss."""
        trained = (point for point in self.values("val_loss") if point[0] > 0)
        return min(trained, key=lambda point: point[1], default=None)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value in a log can be plotted: finite, and not so large that an axis overflows."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and axes
# ---------------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """A number for a table: 12,000, 1.557, 3.00e-04."""
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def short(value: float) -> str:
    """A number for an axis: 12k, 1.5M, 0.003, 3e-4."""
    for size, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{sign}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Three to eight round numbers from low to high; on a logarithmic axis, powers of ten if there are enough."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for mantissas in ((1,), (1, 2, 5), tuple(range(1, 10))):
            found = [m * 10.0**e for e in decades for m in mantissas if low <= m * 10.0**e <= high]
            if len(found) >= 3:
                return found[:: -(-len(found) // 7)]
    power = 10.0 ** math.floor(math.log10(high - low))
    for each in (5 * power, 2 * power, power, power / 2, power / 5):
        first, last = math.ceil(low / each - 1e-9), math.floor(high / each + 1e-9)
        if last - first >= 2:
            break
    return [i * each for i in range(first, last + 1)]


@dataclass
class Axis:
    """Maps the interval from `low` to `high` to [0, 1], linearly or logarithmically."""

    low: float
    high: float
    log: bool

    @staticmethod
    def over(values: Iterable[float], log: bool = False, from_zero: bool = False, margin: float = 0.0) -> Axis:
        """The axis that covers these values. It is linear if any value is not positive."""
        low, high = min(values := list(values)), max(values)
        log = log and low > 1e-100
        if from_zero and low > 0 and not log:
            low = 0.0
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        elif log:
            low, high = low / (high / low) ** margin, high * (high / low) ** margin
        else:
            low, high = (low if from_zero else low - margin * (high - low)), high + margin * (high - low)
        return Axis(low, high, log)

    def at(self, value: float) -> float:
        """A value's position on the axis: the lowest is at 0, the highest at 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


# ---------------------------------------------------------------------------------------------------------------------
# A chart
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """A named curve: its points and the number of its colour.

    spread  whether to show the range of values in each bin.
    level   whether the curve is constant; it is drawn as a dashed line from the first point to the last.
    """

    name: str
    points: list[tuple[float, float]]
    colour: int = 0
    spread: bool = False
    level: bool = False

    def classes(self) -> str:
        """The CSS classes of the colour and the line."""
        return colour(self.colour) + " level" * self.level


@dataclass
class Bin:
    """The points of a curve within one interval of the axis."""

    xs: list[float]
    ys: list[float]

    @property
    def x(self) -> float:
        return sum(self.xs) / len(self.xs)

    @property
    def y(self) -> float:
        return sum(self.ys) / len(self.ys)


def binned(points: list[tuple[float, float]], axis: Axis) -> dict[int, Bin]:
    """The points grouped by intervals of the axis, from left to right."""
    bins: dict[int, Bin] = {}
    for x, y in sorted(points):
        group = bins.setdefault(min(int(axis.at(x) * BINS), BINS - 1), Bin([], []))
        group.xs.append(x)
        group.ys.append(y)
    return bins


def chart(
    title: str,
    curves: Sequence[Curve],
    over: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
    kind: str = "",
) -> str:
    """A figure: the title, the legend, the chart, the values at the pointer, and a table of the values.

    The chart scales with the page. The curves are in a box of 1000 x 1000 units, which is scaled without changing the
    line widths. The labels are positioned by percentages, so their size does not change.
    """
    curves = [curve for curve in curves if curve.points]
    if len({x for curve in curves if not curve.level for x, _ in curve.points}) < 2:
        return ""  # there is nothing to draw
    x_axis = Axis.over([x for curve in curves for x, _ in curve.points], log_x)
    drawn = [binned(curve.points, x_axis) for curve in curves]
    pairs = [(curve, group) for curve, bins in zip(curves, drawn, strict=True) for group in bins.values()]
    heights = [y for curve, group in pairs for y in (group.ys if curve.spread else [group.y])]
    y_axis = Axis.over(heights, log_y, from_zero, margin=0.04)

    def point(x: float, y: float) -> str:
        return f"{1000 * x_axis.at(x):.1f} {1000 - 1000 * y_axis.at(y):.1f}"

    paths = []
    for curve, bins in zip(curves, drawn, strict=True):
        line = [point(b.x, b.y) for b in bins.values()]
        if curve.spread:
            above = [point(b.x, max(b.ys)) for b in bins.values()]
            below = [point(b.x, min(b.ys)) for b in bins.values()]
            paths.append(f'<path class="spread {colour(curve.colour)}" d="M{" ".join((*above, *reversed(below)))}Z"/>')
        paths.append(f'<path class="line {curve.classes()}" d="M{" ".join(line)}"/>')
        if len(line) <= DOTS and not curve.level:
            paths.append(f'<path class="dots {colour(curve.colour)}" d="{"".join(f"M{place}h0" for place in line)}"/>')

    grid = []
    for value in ticks(y_axis.low, y_axis.high, y_axis.log):
        y = f"{100 - 100 * y_axis.at(value):.2f}%"
        grid.append(f'<line x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        grid.append(f'<text class="y" x="-8" y="{y}" dy=".32em">{short(value)}</text>')
    for value in ticks(x_axis.low, x_axis.high, x_axis.log):
        grid.append(f'<text class="x" x="{100 * x_axis.at(value):.2f}%" y="100%" dy="1.6em">{short(value)}</text>')

    rows = []
    for index in sorted({index for bins in drawn for index in bins}):
        here = [bins.get(index) for bins in drawn]
        xs = [x for group in here if group for x in group.xs]
        where = number(min(xs)) + (f" to {number(max(xs))}" if max(xs) > min(xs) else "")
        cells = [
            number(curve.points[0][1]) if curve.level else number(group.y) if group else ""
            for curve, group in zip(curves, here, strict=True)
        ]
        rows.append((f'data-x="{x_axis.at(sum(xs) / len(xs)):.4f}"', [where, *cells]))

    names = [escape(curve.name) for curve in curves]
    values = [f"{curve.name} {number(curve.points[0][1])} to {number(curve.points[-1][1])}" for curve in curves]
    label = f"{title}: {'; '.join(values)}"
    key = "".join(f'<span class="{curve.classes()}">{escape(curve.name)}</span>' for curve in curves)
    return (
        f'<figure class="{kind}"><figcaption><h3>{escape(title)}</h3>'
        + (f'<p class="key">{key}</p>' if kind else "")
        + '</figcaption><div class="frame">'
        f'<svg class="plot" role="img" aria-label="{escape(label)}">'
        f'<rect class="ground" width="100%" height="100%"/><g class="grid">{"".join(grid)}</g>'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{"".join(paths)}</svg>'
        f'<line class="cross" x1="-1%" x2="-1%" y1="0" y2="100%"/></svg></div><p class="over">'
        f'<span class="readout" aria-hidden="true"></span><span>{escape(over)}</span></p>'
        f"<details><summary>Table</summary>{table([escape(over), *names], rows)}</details></figure>"
    )


def colour(i: int) -> str:
    """The CSS classes of the i-th curve."""
    return f"c{i % COLOURS}" + " dashed" * (i >= COLOURS)


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A scrollable table with these column headers and rows. A row consists of its attributes and its cells, the first
    of which is its header. All arguments are HTML."""
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = (
        f'<tr {attributes}><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for attributes, (name, *cells) in rows
    )
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="scroll" tabindex="0"><table>{top}<tbody>{"".join(body)}</tbody></table></div>'


# ---------------------------------------------------------------------------------------------------------------------
# The parts of a page
# ---------------------------------------------------------------------------------------------------------------------


def report_page(run: Run, previous: Run | None = None, refresh: int | None = None) -> str:
    """The page of one run.

    previous  an earlier run on the same data, whose loss is shown for comparison.
    refresh   seconds after which the browser reloads the page.
    """
    total = run.started("options").get("max_iters")
    steps, bar = f"{run.step:,} steps", ""
    if is_number(total) and total > 0:
        steps = f"{run.step:,} of {total:,} steps"
        bar = f'<progress max="{total}" value="{run.step}">{steps}</progress>'
    loss = loss_curves(run, previous)
    title = "Loss, nats per token"
    linear = chart(title, loss, "step", kind="wide linear")
    logarithmic = chart(title, loss, "step", log_x=True, log_y=True, kind="wide logarithmic")
    switch = '<label class="switch"><input type="checkbox"> logarithmic axes</label>'
    others = boxes("charts", (chart_of(key, [run]) for key in run.others()))
    body = (
        f"<header><p>Training run</p><h1>{escape(run.name)}</h1><p>{steps}</p>{bar}</header>",
        f'<dl class="tiles">{"".join(map(tile, figures(run)))}</dl>',
        section("Curves", f"{units(run)}<div>{switch}{linear}{logarithmic}</div>" if linear else "", others),
        section("Samples", samples(run)),
        section("Configuration", configuration(run)),
    )
    return page(
        f"{run.name}: training run", "".join(body), resource("report.css"), resource("report.js"), refresh=refresh
    )


def units(run: Run) -> str:
    """A sentence that relates nats per token to bits per byte, if the size of the validation text is recorded."""
    bits, size = run.bits_per_byte(1.0), run.started("data").get("bytes per token")
    if bits is None or not is_number(size):
        return ""
    return (
        "<p>Bits per byte can be compared between tokenizers; nats per token cannot. The validation text has "
        f"{size:.4g} bytes per token, so 1 nat per token is 1 / ({size:.4g} ln\u00a02) = {bits:.4g} bits per byte.</p>"
    )


def loss_curves(run: Run, previous: Run | None) -> list[Curve]:
    """The losses of a run, the validation loss of an earlier run at the same number of tokens, and the baselines."""
    training = run.values("loss")
    curves = [Curve("training", training, spread=True), Curve("validation", run.values("val_loss"), colour=1)]
    if not training:
        return curves
    ends, tokens = (training[0][0], training[-1][0]), run.values("tokens")
    if previous is not None and tokens and tokens[-1][1]:
        steps_per_token = tokens[-1][0] / tokens[-1][1]
        last = max(ends[1], total) if is_number(total := run.started("options").get("max_iters")) else ends[1]
        earlier = [(x * steps_per_token, y) for x, y in previous.values("val_loss", "tokens")]
        points = [point for point in earlier if point[0] <= last]
        curves.append(Curve(f"validation of {previous.name}", points, colour=2))
    for i, (name, value) in enumerate(run.baselines().items()):
        curves.append(Curve(f"{name} model", [(x, value) for x in ends], colour=6 + i, level=True))
    return curves


def previous_run(out: Path) -> Run | None:
    """The most recent earlier run on the same data in a folder next to `out`, or None."""
    own = read_log(out / STARTS)
    data = _data_fingerprint(own)
    if data is None:
        return None
    found: list[tuple[float, Path]] = []
    for file in out.resolve().parent.glob(f"*/{STARTS}"):
        starts = read_log(file)
        same = file.parent != out.resolve() and _data_fingerprint(starts) == data
        if same and (file.parent / LOG).is_file() and _time(starts) < _time(own):
            found.append((_time(starts), file.parent))
    return replace(Run.load(max(found)[1]), name=max(found)[1].name) if found else None


def _data_fingerprint(starts: Sequence[JsonObject]) -> object:
    data = starts[0].get("data") if starts else None
    return data.get("fingerprint") if isinstance(data, dict) else None


def _time(starts: Sequence[JsonObject]) -> float:
    """The time at which a run was started, in seconds since 1970."""
    moment = starts[0].get("time")
    return moment if is_number(moment) else 0.0


def comparison_page(runs: Sequence[Run]) -> str:
    """The page that compares runs: results, differences, curves, last samples."""
    keys = dict.fromkeys(key for run in runs for key in run.others())
    in_bytes = len({run.tokenizer() for run in runs}) > 1 and all(run.bits_per_byte(1.0) for run in runs)
    losses = boxes("charts large", (chart_of(key, runs, "wide", in_bytes) for key in ("val_loss", "loss")))
    others = boxes("charts", (chart_of(key, runs, "run") for key in keys))
    last = boxes("samples", (sample(run.name, run.samples[-1]) for run in runs if run.samples))
    body = (
        f"<header><p>Training runs</p><h1>{len(runs)} runs compared</h1></header>",
        section("Results", results(runs)),
        section("Differences", differences(runs)),
        section("Curves", losses, others),
        section("Last samples", last),
    )
    return page(f"{len(runs)} runs compared", "".join(body), resource("report.css"), resource("report.js"))


def boxes(kind: str, parts: Iterable[str]) -> str:
    """Parts that are laid out next to each other, as many as fit in a row."""
    inside = "".join(parts)
    return f'<div class="{kind}">{inside}</div>' if inside else ""


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if any(parts) else ""


def chart_of(key: str, runs: Sequence[Run], kind: str = "", in_bytes: bool = False) -> str:
    """The chart of a value in the log, over steps, or over tokens if the number of tokens per step differs.

    in_bytes  convert a loss from nats per token to bits per byte.
    """
    ends = [point for run in runs for point in run.values("tokens")[-1:]]
    over = "tokens" if len({round(tokens / max(step, 1)) for step, tokens in ends}) > 1 else "step"
    single = len(runs) == 1
    curves = [Curve(key if single else run.name, run.values(key, over), i, spread=single) for i, run in enumerate(runs)]
    if in_bytes:
        for curve, run in zip(curves, runs, strict=True):
            curve.points = [(x, run.bits_per_byte(y) or 0.0) for x, y in curve.points]
    label = LABELS.get(key, key)
    return chart(
        label.replace("nats per token", "bits per byte") if in_bytes else label,
        curves,
        over,
        log_y=key == "grad_norm",
        from_zero=key in ("tokens_per_s", "mfu"),
        kind=kind,
    )


def figures(run: Run) -> list[tuple[str, str, str]]:
    """The (name, value, remark) of each result of a run."""
    best, losses, speeds = run.best(), run.values("loss"), sorted(y for _, y in run.values("tokens_per_s"))
    before = [(f"{loss:.4f}", "before training") for step, loss in run.values("val_loss") if step == 0]
    last = [y for _, y in losses[-max(1, len(losses) // 50) :]]
    tokens, seconds = run.values("tokens"), sum(y for _, y in run.values("seconds"))
    in_bytes = f", {bits:.4f} bits per byte" if best and (bits := run.bits_per_byte(best[1])) else ""
    of_last = f"mean of the last {len(last):,}" if len(last) > 1 else "at the last step"
    validation = before[0] if before else ("-", "not measured")
    if best:
        validation = (f"{best[1]:.4f}", f"at step {number(best[0])}{in_bytes}")
    return [
        ("best validation loss", *validation),
        ("training loss", *((f"{sum(last) / len(last):.4f}", of_last) if last else ("-", ""))),
        ("tokens", short(tokens[-1][1]) if tokens else "-", "seen"),
        ("tokens per second", number(round(speeds[len(speeds) // 2])) if speeds else "-", "median"),
        ("time", duration(seconds), "in steps"),
    ]


def tile(figure: tuple[str, str, str]) -> str:
    name, value, remark = figure
    return f"<div><dt>{name}</dt><dd>{value} <small>{remark}</small></dd></div>"


def results(runs: Sequence[Run]) -> str:
    """The table of results. The best run is highlighted. Runs are compared by bits per byte if the tokenizers differ,
    otherwise by validation loss."""
    losses = [best[1] if (best := run.best()) else math.inf for run in runs]
    if len({run.tokenizer() for run in runs}) > 1:
        bits = [run.bits_per_byte(loss) for run, loss in zip(runs, losses, strict=True)]
        losses = [math.inf if None in bits or bit is None else bit for bit in bits]
    rows = []
    for i, run in enumerate(runs):
        name = f'<span class="{colour(i)}">{escape(run.name)}</span>'
        cells = [f"{value} <small>{remark}</small>" for _, value, remark in figures(run)]
        best_class = 'class="best"' if losses[i] == min(losses) < math.inf else ""
        rows.append((best_class, [name, f"{run.step:,}", *cells]))
    return f'<div class="key">{table(["run", "steps", *(name for name, _, _ in figures(runs[0]))], rows)}</div>'


def differences(runs: Sequence[Run]) -> str:
    """The table of differences between the runs: options, models, data and machines."""
    rows = []
    for part in ("options", "model", "data", "machine"):
        recorded = [run.started(part) for run in runs]
        for name in dict.fromkeys(name for one in recorded for name in one):
            values = [shown(one.get(name)) for one in recorded]
            if len(set(values)) > 1 and name != "out_dir":
                rows.append(
                    ("", [escape(flag(name) if part == "options" else f"{part}: {name}"), *map(escape, values)])
                )
    if not rows:
        return "<p>No differences are recorded.</p>"
    return table(["option", *(escape(run.name) for run in runs)], rows)


def samples(run: Run) -> str:
    """The samples, newest first. If there are many, an evenly spaced selection is shown."""
    count = len(run.samples)
    if not count:
        return ""
    spread = list(range(count))
    note = ""
    if count > SAMPLES_SHOWN:
        spread = sorted({round(i * (count - 1) / (SAMPLES_SHOWN - 1)) for i in range(SAMPLES_SHOWN)})
        note = f"<p>{len(spread)} of {count:,} samples, newest first; {SAMPLES} contains all of them.</p>"
    cards = (sample(f"step {run.samples[i]['step']:,}", run.samples[i]) for i in reversed(spread))
    return note + boxes("samples", cards)


def sample(title: str, row: JsonObject) -> str:
    text = printable(str(row.get("text", ""))).strip()
    return f'<article><h3>{escape(title)}</h3><pre dir="auto">{escape(text)}</pre></article>'


def configuration(run: Run) -> str:
    """The command, the options and the machine of the run, and a line for each start."""
    if not run.starts:
        return ""
    given, command = run.started("given"), run.starts[-1].get("command")
    if not isinstance(command, str):  # the record was written by an earlier version
        command = shlex.join([*console.script("train").split(), *(word(name, value) for name, value in given.items())])
    tables = [*option_groups(run), *((part.capitalize(), run.started(part)) for part in ("model", "data", "machine"))]
    parts = []
    for title, values in tables:
        rows = [
            (
                'class="given"' * (name.startswith("--") and name in map(flag, given)),
                [escape(name), escape(shown(value))],
            )
            for name, value in values.items()
        ]
        parts.append(f"<div><h3>{title}</h3>{table([], rows)}</div>")
    starts = "".join(f"<li>{escape(start(row))}</li>" for row in run.starts)
    shown_command = f'<pre class="command">{escape(printable(command))}</pre>'
    return f'{shown_command}<ol>{starts}</ol><div class="parts">{"".join(parts)}</div>'


def option_groups(run: Run) -> list[tuple[str, JsonObject]]:
    """The options by flag, in the groups of `train.py --help`. Options of other versions are in a separate group."""
    options = run.started("options")
    other = options.keys() - {name for names in GROUPS.values() for name in names}
    groups = {**GROUPS, "others": tuple(name for name in options if name in other)}
    found = {title: {flag(name): options[name] for name in names if name in options} for title, names in groups.items()}
    return [(f"Options: {title}", values) for title, values in found.items() if values]


def word(name: str, value: object) -> str:
    """An option as written on the command line."""
    if isinstance(value, bool):
        return flag(name if value else f"no-{name}")
    return f"{flag(name)}={value}"


def start(row: JsonObject) -> str:
    """The time, the step and the machine of a start."""
    moment, machine = row.get("time"), row.get("machine")
    when = (
        f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(moment))}: "
        if is_number(moment) and 0 <= moment < 1e11
        else ""
    )
    known = machine if isinstance(machine, dict) else {}
    where = ", ".join(shown(known[name]) for name in ("device", "processor", "threads") if name in known)
    return f"{when}from step {row['step']:,}" + (f" ({where} threads)" if where else "")


def shown(value: object) -> str:
    """A value of the configuration as text. A fingerprint is shortened to its first digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value):
        return value[:12]
    return printable(number(value) if isinstance(value, float) and is_number(value) else str(value))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class Writer:
    """Updates out/report.html during training, using at most the fraction SHARE of the time.

    say  prints one line if the page cannot be written; training continues.
    """

    def __init__(self, out: Path, say: Callable[[str], None]):
        self.out, self.say = out, say
        self.cost, self.written = 0.0, -math.inf
        self.previous: Run | None = None

    def is_old(self) -> bool:
        """Whether the last update is at least REFRESH seconds old, or older if SHARE requires it."""
        return time.perf_counter() - self.written >= max(REFRESH, self.cost / SHARE)

    def update(self, last: bool = False) -> None:
        """Write the page, unless the last update is so recent that SHARE would be exceeded.

        last  write the page in any case, without automatic reloading.
        """
        began = time.perf_counter()
        if not last and began - self.written < self.cost / SHARE:
            return
        try:
            if self.written == -math.inf:
                self.previous = previous_run(self.out)
            text = report_page(Run.load(self.out), self.previous, None if last else REFRESH)
            write(text, self.out / REPORT)
        except Exception as error:  # a failure to write the report must not stop the run
            self.say(f"{self.out / REPORT} was not written: {type(error).__name__}: {error}")
        self.written = time.perf_counter()
        self.cost = self.written - began


def command_line() -> Parser:
    parser = Parser("python -m gpt2.report", "Write the report of a run, or a comparison of several runs.", "OUT...")
    group = parser.add_argument_group("input and output")
    group.add_argument("out", nargs="+", type=Path, metavar="OUT", help="the out-dir of a run")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the HTML file to write [default: {REPORT} in the out-dir, or for several runs {COMPARISON} in the "
        "current folder]",
    )
    return parser


@console.command("gpt2.report")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0; 1 if a folder is not an out-dir; 2 for an invalid option."""
    parser = command_line()
    options = parser.parse_args(arguments)
    parser.check_output("--output", options.output)
    runs = [Run.load(out) for out in options.out]
    file = options.output or (options.out[0] / REPORT if len(runs) == 1 else Path(COMPARISON))
    write(report_page(runs[0], previous_run(options.out[0])) if len(runs) == 1 else comparison_page(runs), file)
    console.say(f"page: {file}; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
