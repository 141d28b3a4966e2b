"""Repeat a skipped training step with checks, and report the first value that is not finite.

train.py skips a step whose loss or gradient is not finite, and saves the first skipped step of a run in the folder
bad-step-N of its out-dir: the weights, the batch, the dropout keys, and the options. This command reports the first
tensor with a value that is not finite, its operation and layer in the forward or backward pass, and the likely cause.
Run it with --dtype float64 to check whether the cause is an overflow.
"""

from __future__ import annotations

from gpt2 import console  # first, so that Ctrl-C during the other imports exits silently

# isort: split
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2 import device_options
from gpt2.config import RECOMPUTE
from gpt2.console import Parser, say
from gpt2.formats import model_file
from gpt2.model import GPT2
from gpt2.training import bad_step
from tinygrad2.backend import get_backend
from tinygrad2.checkpoint import CheckpointError, write_json
from tinygrad2.precision import TRAINING


def command_line() -> Parser:
    parser = Parser("python -m gpt2.replay", __doc__, "FOLDER")
    group = parser.add_argument_group("what to run")
    group.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of the step, such as out/bad-step-17")
    group = parser.add_argument_group("device and precision")
    device_options.add(group)
    group.add_argument(
        "--dtype",
        choices=TRAINING,
        help="precision of the computation [default: that of the run, or float32 if the device does not support it]",
    )
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the findings to FILE [default: none]")
    return parser


@console.command("gpt2.replay")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0; 1 if the step cannot be repeated; 2 for an invalid option."""
    parser = command_line()
    options = parser.parse_args(arguments)
    parser.check_output("--json", options.json)
    device_options.set_threads(parser, options)
    step = bad_step.read(options.folder)
    model = load_model(options.folder, step, options.device, options.dtype)
    say(
        f"{options.folder}: step {step.step:,}; its loss was {shown(step.loss)}, and its gradient norm "
        f"{shown(step.grad_norm)}; {model.precision.name} on {model.backend.device}"
    )
    found, lines = bad_step.explain(model, step.batches, len(step.batches), step.lr)
    for line in lines:
        say(line)
    if options.json:
        dtype, device = model.precision.name, model.backend.device
        write_json(options.json, {"step": step.step, "dtype": dtype, "device": device, "found": found, "lines": lines})
    return 0


def load_model(folder: Path, step: bad_step.BadStep, device: str, dtype: str | None) -> GPT2:
    """Load the model of the step, with the options of the run."""
    recompute, head_rows = step.options.get("recompute"), step.options.get("head_rows")
    own = step.options.get("dtype")
    if recompute not in RECOMPUTE or own not in TRAINING or not isinstance(head_rows, int | None):
        raise CheckpointError(f"{folder / bad_step.STEP}: its options are not those of a train.py run")
    if dtype is None:
        dtype = own
        if reason := get_backend(device).unsupported_reason(own):
            say(f"--dtype {reason}; computing in float32")
            dtype = "float32"
    config = model_file.load_config(folder)
    model = GPT2(config, seed=None, device=device, dtype=dtype, recompute=recompute, head_rows=head_rows)
    model_file.load_into(model, folder, damaged=True)  # the damage is what replay locates
    return model


def shown(number: float | None) -> str:
    return "not finite" if number is None else f"{number:.4g}"


if __name__ == "__main__":
    sys.exit(console.run(main))
