"""The time of each operation in a training step, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinygrad2.backend import Backend, Timestamp


class Profiler:
    """A context manager that times every kernel call of a backend. Enter it once per step.

    On a GPU, times are measured by events in the device's stream; `table` waits for them.
    """

    def __init__(self, backend: Backend):
        self.backend = backend
        self.steps = 0
        self._kernels = dict(vars(backend.kernels))
        self._spans: list[tuple[str, Timestamp, Timestamp]] = []  # kernel ("" for the whole step), start, stop

    def __enter__(self) -> Profiler:
        for name, function in self._kernels.items():
            if callable(function) and not isinstance(function, type):
                setattr(self.backend.kernels, name, self._timed(name, function))
        self._started = self.backend.timestamp()
        return self

    def __exit__(self, *_: object) -> None:
        self._spans.append(("", self._started, self.backend.timestamp()))
        vars(self.backend.kernels).update(self._kernels)
        self.steps += 1

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = self.backend.timestamp()
            result = function(*arguments)
            self._spans.append((name, start, self.backend.timestamp()))
            return result

        return call

    def totals(self) -> dict[str, tuple[int, float]]:
        """The number of calls and the total seconds of each kernel over all steps; "" stands for the entire step."""
        found: dict[str, tuple[int, float]] = {}
        for name, start, stop in self._spans:
            calls, seconds = found.get(name, (0, 0.0))
            found[name] = calls + 1, seconds + self.backend.seconds(start, stop)
        return found

    def table(self) -> list[str]:
        """One line per operation, slowest first: calls and milliseconds per step, and share of the time."""
        totals = self.totals()
        whole = totals.pop("", (0, 0.0))[1]
        seconds: dict[str, list[float]] = {}  # by operation: forward, backward, calls
        for name, (count, spent) in totals.items():
            operation, _, way = name.rpartition("_")
            row = seconds.setdefault(operation if way in ("forward", "backward") else name, [0.0, 0.0, 0.0])
            row[way == "backward"] += spent
            row[2] += count
        lines = [f"{'operation':<20}{'calls':>7}{'forward ms':>13}{'backward ms':>13}{'share':>8}"]
        steps = max(1, self.steps)
        for name, (forward, backward, calls) in sorted(seconds.items(), key=lambda item: -sum(item[1][:2])):
            times = f"{1000 * forward / steps:13.2f}{1000 * backward / steps:13.2f}"
            lines.append(f"{name:<20}{calls / steps:7.0f}{times}{(forward + backward) / whole:8.1%}")
        rest = whole - sum(forward + backward for forward, backward, _ in seconds.values())
        lines.append(f"{'outside kernels':<20}{'':7}{1000 * rest / steps:13.2f}{'':13}{rest / whole:8.1%}")
        lines.append(f"{'step':<20}{'':7}{1000 * whole / steps:13.2f}{'':13}{1:8.1%}")
        return lines
