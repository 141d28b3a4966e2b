"""Estimate the memory and time of a training run: `python -m gpt2.plan --preset gpt2 --device h200 --ranks 8`.

memory_model.py computes the memory, and cost_model.py the time. The rates of a GPU are from its data sheet; those of
this machine's CPU are measured in a second or two. The options are those of train.py, with the same defaults.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from gpt2 import console, cost_model, cpu_rates
from gpt2.console import Parser
from gpt2.cost_model import CARDS, Communication, Device, Kernel
from gpt2.memory_model import Step, largest_batch, needed, step_memory
from gpt2.training import setup
from gpt2.training.options import OptionValues, UsageError, add_options, validate_options
from tinygrad2 import machine, threads
from tinygrad2.backend import get_backend
from tinygrad2.gpus import find_gpu, peak_tflops

GROUPS = {
    "model": ("preset", "n_layer", "n_head", "n_embd", "init", "dropout"),
    "batches": ("batch_size", "block_size", "total_batch_size", "max_iters"),
    "optimizer": ("optimizer", "zero"),
    "computation": ("threads", "dtype", "recompute", "head_rows"),
    "sets of options": ("recipe",),
}
THIS_MACHINE = ("auto", "cpu", "cuda")
MODELS = {name.lower().replace(" ", "-"): name for name in CARDS}  # GPUs by the name that --device accepts


@dataclass(frozen=True)
class Row:
    """One line of the table of times, for a family of kernels: calls, seconds, FLOPs and bytes per step and rank."""

    calls: int
    seconds: float
    flops: float
    nbytes: float


@dataclass(frozen=True)
class Plan:
    """A planned run.

    step             a micro-step of one rank.
    micro_steps      micro-steps per step.
    tokens           tokens in the entire run.
    largest_batch    the largest --batch-size that fits; 0 if none fits.
    dividing         the largest --batch-size that fits and divides the tokens per step evenly; 0 if there is none.
    rows             the kernels of a step by family.
    communication    the communication per step.
    python           seconds per step in which only Python runs.
    seconds          seconds per step.
    peak             the device's peak FLOP/s, or None if unknown.
    """

    step: Step
    device: Device
    micro_steps: int
    tokens: int
    largest_batch: int
    dividing: int
    rows: dict[str, Row]
    communication: Communication
    python: float
    seconds: float
    peak: float | None

    @property
    def step_tokens(self) -> int:
        return self.step.rows * self.micro_steps * self.step.ranks

    @property
    def tokens_per_second(self) -> float:
        return self.step_tokens / self.seconds

    @property
    def mfu(self) -> float | None:
        """The model's FLOPs as a fraction of the devices' peak, or None if the peak is unknown."""
        flops = self.tokens_per_second * self.step.config.flops_per_token(self.step.block_size)
        return None if self.peak is None else flops / (self.peak * self.step.ranks)

    @property
    def waited(self) -> float:
        """Seconds per step of communication that does not overlap with computation."""
        return self.communication.seconds - self.communication.overlapped

    @property
    def hours(self) -> float:
        return self.tokens / self.tokens_per_second / 3600


def make_plan(step: Step, device: Device, total_batch_size: int, tokens: int) -> Plan:
    """Plan a run over `tokens` tokens, with total_batch_size tokens per step."""
    micro_steps = total_batch_size // (step.rows * step.ranks)
    shards = step.ranks if step.zero else 1
    once = cost_model.micro_step(
        step.config,
        step.batch_size,
        step.block_size,
        step.precision,
        step.recompute,
        step.head_rows,
        step.cuda,
    )
    update = cost_model.update(step.config, step.precision, step.optimizer, shards)
    computing, python = (
        micro_steps * a + b for a, b in zip(_seconds(device, once), _seconds(device, update), strict=True)
    )
    backward = _seconds(device, [kernel for kernel in once if kernel.backward])[0]
    shared = cost_model.communication(step.config, device, step.ranks, step.zero, backward)
    waiting = max(0.0, python - computing) if device.asynchronous else python
    available = device.memory or 0
    largest = largest_batch(step, available)
    sequences = total_batch_size // step.block_size
    dividing = next((b for b in range(min(largest, sequences), 0, -1) if sequences % (b * step.ranks) == 0), 0)
    peak = peak_tflops(device.name, step.precision.name) if step.cuda else None
    return Plan(
        step,
        device,
        micro_steps,
        tokens,
        largest,
        dividing,
        _rows(device, [(kernel, micro_steps) for kernel in once] + [(kernel, 1) for kernel in update]),
        shared,
        waiting,
        computing + waiting + shared.seconds - shared.overlapped,
        None if peak is None else 1e12 * peak,
    )


def _seconds(device: Device, kernels: list[Kernel]) -> tuple[float, float]:
    """The time of the kernels on the device, and of the Python code that calls them."""
    on_device = sum(kernel.calls * device.seconds(kernel.cost) for kernel in kernels)
    return on_device, device.host * sum(kernel.calls for kernel in kernels)


def _rows(device: Device, kernels: list[tuple[Kernel, int]]) -> dict[str, Row]:
    """Group the kernels, each with its number of repetitions, by family."""
    rows: dict[str, Row] = {}
    for kernel, repetitions in kernels:
        calls = repetitions * kernel.calls
        row = rows.get(_label(kernel), Row(0, 0.0, 0.0, 0.0))
        rows[_label(kernel)] = Row(
            row.calls + calls,
            row.seconds + calls * device.seconds(kernel.cost),
            row.flops + calls * kernel.cost.flops,
            row.nbytes + calls * kernel.cost.nbytes,
        )
    return rows


def _label(kernel: Kernel) -> str:
    if kernel.name == "orthogonalize":
        return kernel.name
    if kernel.cost.family in cost_model.PRODUCTS:
        return f"products {kernel.name.split()[0]}"
    if kernel.cost.family in ("squared_norm", "zero_grad", "update", "copies"):
        return "optimizer"
    family = kernel.cost.family.replace("reference_attention", kernel.name)
    return {"column_sums": "bias gradients", "sum": "sums of gradients"}.get(family, family.replace("_", " "))


# Devices -------------------------------------------------------------------------------------------------------------


def find_device(name: str) -> tuple[str, float | None]:
    """The name of the device ("cpu" or a name in CARDS), and the memory of this machine's GPU if it is selected,
    otherwise None.

    Raises UsageError if the name is unknown, and ValueError if the device does not exist or its rates are unknown.
    """
    if name in MODELS:
        return MODELS[name], None
    if name not in THIS_MACHINE:
        known = [*THIS_MACHINE, *MODELS]
        raise UsageError(f"--device is {name}; expected {', '.join(known)}{console.nearest(name, known)}")
    backend = get_backend(name)
    if backend.cuda is None:
        return "cpu", None
    gpu, memory = backend.cuda.gpu_name(), backend.memory()
    found = find_gpu(gpu, CARDS)
    if found is None:
        raise ValueError(f"the rates of the GPU {gpu} are unknown; pass a similar GPU, such as --device h100")
    return found, None if memory is None else memory[1]


def device_of(name: str, memory: float | None, step: Step) -> Device:
    """The device to plan for. Raises ValueError if it does not support the precision of the step."""
    if name == "cpu":
        if reason := get_backend("cpu").unsupported_reason(step.precision):
            raise ValueError(f"--dtype {reason}")
        return cpu_rates.measure(step)
    if step.precision.copies and step.config.head_size not in cost_model.FUSED_HEAD_SIZES:
        raise ValueError(
            f"--dtype {step.precision.name} needs a head size that is a multiple of 16, at most 128; got "
            f"{step.config.head_size}"
        )
    found = cost_model.gpu(name, step.precision)
    return found if memory is None else dataclasses.replace(found, memory=memory)


# The report ----------------------------------------------------------------------------------------------------------


def report(plan: Plan) -> list[str]:
    """The lines of the report."""
    step, config = plan.step, plan.step.config
    rates = "estimated rates" if step.cuda else f"{step.threads} threads, rates measured now"
    factors = (
        f"{step.batch_size} x {step.block_size:,} tokens x {plan.micro_steps} (micro-steps) x {step.ranks} (ranks)"
    )
    return [
        f"model      {config.n_parameters:,} parameters ({config.summary()})",
        f"device     {plan.device.name}, {step.precision.name}; {rates}",
        *([] if step.cuda else _busy(machine.load_average(), os.cpu_count() or 1)),
        f"batch      {plan.step_tokens:,} tokens per step = {factors}",
        "",
        f"{'memory per rank':<24}{'GB':>10}",
        *(f"  {name:<22}{nbytes / 1e9:10.3f}" for name, nbytes in step_memory(step).items()),
        f"  {'total':<22}{needed(step) / 1e9:10.3f}",
        *_fit(plan),
        "",
        *_times(plan),
        "",
        f"rate       {plan.tokens_per_second:,.0f} tokens/s" + (f", {plan.mfu:.0%} MFU" if plan.mfu else ""),
        f"run        {plan.tokens:,} tokens = {plan.tokens / plan.step_tokens:,.0f} steps: "
        f"{console.duration(3600 * plan.hours)}, without evaluations and checkpoints",
    ]


def _times(plan: Plan) -> list[str]:
    """The lines of the table of times."""

    def line(name: str, seconds: float, work: str = "") -> str:
        return f"  {name:<22}{1e3 * seconds:10.2f}{seconds / plan.seconds:9.1%}{work}"

    lines = [f"{'time per step':<24}{'ms':>10}{'share':>9}{'calls':>9}{'TFLOP':>10}{'GB':>10}"]
    for name, row in sorted(plan.rows.items(), key=lambda item: -item[1].seconds):
        work = f"{row.calls:9,}{row.flops / 1e12:10.3f}{row.nbytes / 1e9:10.2f}"
        lines.append(line(name, row.seconds, work))
    if plan.python:
        lines.append(line("Python", plan.python))
    if plan.step.ranks > 1:
        shared = f"  of {1e3 * plan.communication.seconds:.2f} ms; the rest overlaps with the backward pass"
        lines.append(line("communication", plan.waited, shared))
    return [*lines, line("total", plan.seconds)]


def _fit(plan: Plan) -> list[str]:
    """The device's memory, whether the step fits in it, and other batch sizes that fit."""
    memory, batch = plan.device.memory, plan.step.batch_size
    if memory is None:
        return []
    fits = needed(plan.step) <= memory
    if not plan.largest_batch:
        text = "too small, even for --batch-size 1; see --recompute block, --head-rows, --zero"
    elif not fits:
        text = f"too small; --batch-size {plan.largest_batch:,} or less fits"
    else:
        text = f"sufficient for any --batch-size up to {plan.largest_batch:,}"
    if plan.dividing and (not fits or plan.dividing > batch):
        micro_steps = plan.step_tokens // (plan.dividing * plan.step.block_size * plan.step.ranks)
        unit = "micro-step" if micro_steps == 1 else "micro-steps"
        text += f" ({plan.dividing:,} processes the same tokens per step in {micro_steps:,} {unit})"
    return [f"  {'available':<22}{memory / 1e9:10.3f}  {text}"]


def _busy(load: float, cores: int) -> list[str]:
    """A warning if other programs used this machine while its rates were measured."""
    if load <= cores / 2:
        return []
    return [f"load       other programs use the cores (load average {load:.1f} on {cores}): the rates are too low; "
            "plan again when those programs have finished"]  # fmt: skip


def as_json(plan: Plan) -> str:
    """The plan as a JSON object, in bytes, seconds and FLOPs."""
    return json.dumps(
        {
            "parameters": plan.step.config.n_parameters,
            "device": plan.device.name,
            "dtype": plan.step.precision.name,
            "ranks": plan.step.ranks,
            "batch_size": plan.step.batch_size,
            "block_size": plan.step.block_size,
            "micro_steps": plan.micro_steps,
            "step_tokens": plan.step_tokens,
            "memory": step_memory(plan.step),
            "memory_total": needed(plan.step),
            "memory_available": plan.device.memory,
            "largest_batch_size": plan.largest_batch,
            "kernels": {name: dataclasses.asdict(row) for name, row in plan.rows.items()},
            "python_seconds": plan.python,
            "communication_seconds": plan.communication.seconds,
            "communication_waited_seconds": plan.waited,
            "step_seconds": plan.seconds,
            "tokens_per_s": plan.tokens_per_second,
            "mfu": plan.mfu,
            "tokens": plan.tokens,
            "hours": plan.hours,
        },
        indent=2,
    )


# The command ---------------------------------------------------------------------------------------------------------


def command_line() -> Parser:
    parser = Parser("python -m gpt2.plan", "Estimate the memory and time of a training run before it starts.")
    own = parser.add_argument_group("device and length")
    devices = ", ".join([*THIS_MACHINE, *MODELS])
    own.add_argument(
        "--device", metavar="NAME", default="auto", help=f"a device of this machine, or a GPU model: {devices}"
    )
    own.add_argument(
        "--ranks", metavar="N", type=int, default=1, help="number of processes, each with its own GPU or machine"
    )
    own.add_argument(
        "--link",
        metavar="GB/S",
        type=float,
        help="bandwidth between neighbouring ranks in each direction [default: NVLink or PCIe, 400 Gbit/s per GPU "
        "for more than 8 ranks, and 10 Gbit/s for CPUs]",
    )
    own.add_argument("--tokens", metavar="N", type=int, help="number of tokens to train on [default: from --max-iters]")
    own.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    for title, names in GROUPS.items():
        add_options(parser.add_argument_group(title), names)
    return parser


def plan_of(given: OptionValues, device: str, ranks: int, tokens: int | None, link: float | None) -> Plan:
    """Plan a run of train.py with these options and this number of ranks.

    link  GB/s between neighbouring ranks, or None for the rate of the device.

    Raises UsageError for an invalid option, and ValueError if the device is unavailable or does not support the
    precision.
    """
    for flag, value in (("--ranks", ranks), ("--tokens", tokens), ("--link", link)):
        if value is not None and not 0 < value < 1e18:
            raise UsageError(f"{flag} is {value}; expected more than 0")
    options, config, run_options = setup.new_run(validate_options(given))
    options.fit_batch(run_options.options, ranks)
    if options.threads:
        threads.set_count(options.threads)
    name, memory = find_device(device)
    step = setup.planned_step(config, options, ranks, cuda=name != "cpu")
    found = cost_model.with_link(device_of(name, memory, step), None if link is None else 1e9 * link)
    assert options.total_batch_size is not None  # fit_batch sets it
    return make_plan(step, found, options.total_batch_size, tokens or options.max_iters * options.total_batch_size)


@console.command("gpt2.plan")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line()
    given = vars(parser.parse_args(arguments))
    device, ranks, tokens, link, print_json = (
        given.pop(name) for name in ("device", "ranks", "tokens", "link", "json")
    )
    try:
        plan = plan_of(given, device.lower(), ranks, tokens, link)
    except UsageError as error:
        parser.error(str(error))
    console.say(as_json(plan) if print_json else "\n".join(report(plan)))
    return 0


if __name__ == "__main__":
    sys.exit(console.run(main))
