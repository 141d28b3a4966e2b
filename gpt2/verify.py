"""Verify the complete model: compare it with PyTorch, or its gradients with finite differences.

The comparison with PyTorch covers the residual stream after each part of each layer, the logits, the loss, the gradient
of each parameter, and the text from greedy decoding (see gpt2/parity.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
from safetensors import SafetensorError, safe_open

from gpt2 import console, parity
from gpt2.config import PRESETS, GPT2Config
from gpt2.console import Parser, print_error, say
from gpt2.formats import huggingface
from gpt2.formats.model_file import find_model
from gpt2.model import GPT2
from tinygrad2 import Key, Tensor, record
from tinygrad2.array import Array
from tinygrad2.backend import DEVICES, get_backend
from tinygrad2.checkpoint import JsonObject, save_arrays, write_json
from tinygrad2.gradcheck import check

BOUND = 1e-6
SCALE = 0.2  # scales the step of `check`, which is chosen for values around 1; this model has larger derivatives
FORMS = {"gelu_new": "tanh form", "gelu": "exact form"}
BATCH, LENGTH = 3, 9  # shorter than the context, so the last positions are unused and have no gradient


def small_model(activation: str, seed: int = 0, device: str = "cpu") -> GPT2:
    """A float64 GPT-2 with dropout in which every parameter affects the loss. It has random gains and biases, matrices
    that preserve the size of the activations, and queries and keys that are large enough to make attention far from
    uniform. (With the usual initial weights, the gradients of attention are tiny.)
    """
    config = GPT2Config(
        vocab_size=31,
        n_positions=12,
        n_embd=12,
        n_layer=2,
        n_head=3,
        activation_function=activation,
        embd_pdrop=0.1,
        attn_pdrop=0.2,
        resid_pdrop=0.1,
    )
    model = GPT2(config, device=device, dtype="float64")
    random = numpy.random.default_rng(seed)
    for name, parameter in model.named_parameters():
        values = random.standard_normal(parameter.shape)
        if parameter.ndim == 1:
            parameter.data = 0.2 * values + (1 if ".weight" in name else 0)
        elif name in ("wte.weight", "wpe.weight"):
            parameter.data = values * 2 / math.sqrt(config.n_embd)
        else:
            parameter.data = values * (2.2 if "c_attn" in name else 1) / math.sqrt(parameter.shape[0])
    return model


def gradient_errors(model: GPT2, seed: int = 0) -> dict[str, float]:
    """The relative error of the gradient of model.loss (with dropout) compared with finite differences, by parameter.

    The biases of queries, keys and values are checked as one parameter. The gradient of the key bias is zero, since
    adding a constant to every key shifts all scores of a row equally, so its relative error alone would be meaningless.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    text = numpy.random.default_rng(seed).integers(model.config.vocab_size, size=(BATCH, LENGTH + 1))
    key = Key(seed, step=1, first_sample=BATCH)

    def loss(*values: Tensor) -> Tensor:
        """model.loss with parameters SCALE * values, and the gradients of the model's own backward pass."""
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = SCALE * value.data
        model.zero_grad()
        result = model.loss(text[:, :-1], text[:, 1:], key)
        if result.requires_grad:
            result.backward()
        return record(result.data, values, _scaled, saved=tuple(parameter.grad for parameter in parameters))

    errors = check(loss, [p.numpy() / SCALE for p in parameters], seed=seed, device=model.backend.device)
    return dict(zip(names, errors, strict=True))


def _scaled(saved: tuple[Array | None, ...], dy: Array, into: object) -> tuple[Array | None, ...]:
    return tuple(None if gradient is None else dy * SCALE * gradient for gradient in saved)


def verify_gradients(seed: int = 0, device: str = "cpu") -> bool:
    """Check the gradients with both forms of GELU, and print a row for each parameter. Returns whether all errors are
    within BOUND."""
    failed = 0
    say("gradients of a small GPT-2 with dropout, float64, against finite differences")
    for activation, form in FORMS.items():
        model = small_model(activation, seed, device)
        shapes = {name: str(parameter.shape) for name, parameter in model.named_parameters()}
        say(f"\n{f'{activation} ({form})':24}{'shape':>12}{'error':>11}{'bound':>9}")
        for name, error in gradient_errors(model, seed).items():
            verdict = "ok" if error <= BOUND else "FAILED"
            failed += verdict == "FAILED"
            say(f"{name:24}{shapes[name]:>12}{error:11.1e}{BOUND:9.0e}  {verdict}")
    say(f"\n{failed} gradients are wrong" if failed else "\nall gradients are correct")
    return not failed


COMPARISONS = "cases"  # the metadata key of the list of cases in a reference file; a case's arrays are NUMBER/NAME
Expected = Callable[[str], numpy.ndarray]  # returns the reference result with a name


@dataclass
class Comparison:
    """The weights of a comparison, and the libraries that computed the reference.

    model        a folder or a name; None for random weights, which preset, activation and seed determine.
    fingerprint  the fingerprint of the weights.
    reference    the names and versions of the libraries.
    """

    model: str | None
    preset: str | None
    activation: str | None
    seed: int
    dtype: str
    fingerprint: str = ""
    reference: str = ""

    def __str__(self) -> str:
        return self.model or f"{self.preset}, random weights, {self.activation} ({FORMS.get(str(self.activation))})"

    def random_model(self, device: str) -> GPT2:
        config = GPT2Config.preset(str(self.preset))
        config = dataclasses.replace(config, activation_function=str(self.activation))
        return parity.random_model(config, self.seed, device, self.dtype)


def requested(options: argparse.Namespace) -> list[Comparison]:
    """The cases that --against MODEL or --preset selects."""
    if options.against is not None:
        return [Comparison(options.against, None, None, options.seed, options.dtype)]
    forms = [options.activation] if options.activation else FORMS
    return [Comparison(None, options.preset, form, options.seed, options.dtype) for form in forms]


def live(case: Comparison, device: str) -> tuple[GPT2, dict[str, numpy.ndarray]]:
    """This engine's model for a case, and the results of transformers with the same weights."""
    with tempfile.TemporaryDirectory() as copy:
        source: str | Path = copy
        if case.model is None:
            model = case.random_model(device)
        else:
            found = find_model(Path(case.model), print_error)
            model = GPT2.from_pretrained(found, device, case.dtype)
            source = found if (found / huggingface.CONFIG_FILE).is_file() else copy
        if source == copy:
            model.save_pretrained(copy)
        theirs = parity.torch_model(source)
        case.fingerprint, case.reference = parity.fingerprint(model), parity.torch_versions()
        print_error(f"{case}: {case.reference} computes the reference")
        return model, parity.torch_results(theirs, parity.random_tokens(model.config, case.seed), case.dtype)


def write_reference(path: Path, cases: Sequence[Comparison], device: str) -> None:
    """Write a reference file: the results of transformers for these cases."""
    arrays: dict[str, numpy.ndarray] = {}
    for number, case in enumerate(cases):
        arrays |= {f"{number}/{name}": values for name, values in live(case, device)[1].items()}
    save_arrays(path, arrays, {COMPARISONS: json.dumps([asdict(case) for case in cases])})
    say(f"{path}: {path.stat().st_size / 1e6:,.1f} MB; without PyTorch: python -m gpt2.verify --against {path}")


def is_reference(path: Path) -> bool:
    """Whether a file was written by `write_reference`; if not, it is a model."""
    try:
        with safe_open(path, framework="numpy") as file:
            return COMPARISONS in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def stored(path: Path, device: str, folder: str | None) -> Iterator[tuple[Comparison, GPT2, Expected]]:
    """The cases in a reference file, each with this engine's model that has the same weights, and the expected results.

    folder  the model's folder, if it has been moved since the recording.
    Raises ValueError if the file is damaged, or if the weights differ from the recorded weights.
    """
    with safe_open(path, framework="numpy") as file:
        try:
            cases = [Comparison(**case) for case in json.loads(file.metadata()[COMPARISONS])]
        except (ValueError, TypeError):
            raise ValueError(f"{path}: its list of cases is damaged; record it again") from None
        for number, case in enumerate(cases):
            if case.model is None:
                model = case.random_model(device)
            else:
                case.model = folder or case.model
                model = GPT2.from_pretrained(find_model(Path(case.model), print_error), device, case.dtype)
            if parity.fingerprint(model) != case.fingerprint:
                raise ValueError(f"{path}: the weights of {case} differ from the recorded weights; record it again")

            def expected(name: str, number: int = number) -> numpy.ndarray:
                try:
                    return file.get_tensor(f"{number}/{name}")
                except SafetensorError as error:
                    raise ValueError(f"{path}: {error}; record it again") from None

            yield case, model, expected


def comparisons(options: argparse.Namespace) -> Iterator[tuple[Comparison, GPT2, Expected]]:
    """Yield the cases that the options select, with this engine's model and the expected results."""
    if options.against is not None and is_reference(Path(options.against)):
        yield from stored(Path(options.against), options.device, options.model)
    else:
        for case in requested(options):
            model, results = live(case, options.device)
            yield case, model, results.__getitem__


def verify_parity(options: argparse.Namespace) -> JsonObject:
    """Compare each case and print a table. Returns the contents of the --json file; "ok" is the overall result."""
    reports = []
    for case, model, expected in comparisons(options):
        rows, same_text = parity.compare(model, expected)
        say(f"\n{case}: {model.n_parameters():,} parameters, {case.dtype}, {model.backend.device}; {case.reference}")
        width = max(len(row.name) for row in rows)
        say(f"{'':{width}}{'largest error':>15}{'relative':>10}{'bound':>8}")
        for row in rows:
            verdict = "ok" if row.ok else "DIFFERS"
            say(f"{row.name:{width}}{row.largest:15.1e}{row.relative:10.1e}{row.bound:8.0e}  {verdict}")
        say(f"{'text':{width}}{'the same' if same_text else 'different':>33}  {'ok' if same_text else 'DIFFERS'}")
        first = next((row.name for row in rows if not row.ok), None if same_text else "text")
        say(f"first difference: {first}" if first else "everything agrees")
        reports.append({**asdict(case), "device": model.backend.device, "ok": first is None, "first_deviation": first,
                        "same_text": same_text, "rows": [asdict(row) for row in rows]})  # fmt: skip
    return {"ok": all(report["ok"] for report in reports), "cases": reports}


def command_line() -> Parser:
    parser = Parser("python -m gpt2.verify", __doc__)
    group = parser.add_argument_group("what to verify (at least one)")
    group.add_argument(
        "--against",
        metavar="MODEL|FILE",
        help="compare with transformers, with the weights of MODEL (a folder, or a name such as gpt2); or, without "
        "PyTorch, with a FILE that --record wrote on a machine with PyTorch [default: off]",
    )
    group.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help=f"compare with transformers, with random weights: {', '.join(PRESETS)} [default: off]",
    )
    group.add_argument(
        "--gradients",
        action="store_true",
        help="compare every gradient of a small GPT-2 with dropout, in float64, with finite differences",
    )
    group = parser.add_argument_group("how to compare")
    group.add_argument("--activation", choices=FORMS, help="with --preset: the form of GELU [default: both]")
    group.add_argument("--dtype", choices=tuple(parity.BOUNDS), default="float32", help="dtype of both computations")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the weights, the tokens and the directions"
    )
    group.add_argument("--device", choices=DEVICES, default="cpu", help="the device of this engine")
    group.add_argument(
        "--model", metavar="FOLDER", help="with --against FILE: the model's folder [default: as recorded]"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--record", type=Path, metavar="FILE", help="write the results of transformers to FILE and exit [default: off]"
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison to FILE [default: off]")
    return parser


@console.command("gpt2.verify", failed=2, closed_pipe=2)  # 2: nothing has been verified
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0 if everything agrees; 1 if something differs; 2 if nothing was
    verified."""
    parser = command_line()
    options = parser.parse_args(arguments)
    comparing = options.against is not None or options.preset is not None
    if not comparing and not options.gradients:
        parser.error("nothing to verify; pass --against, --preset or --gradients")
    if options.against is not None and options.preset is not None:
        parser.error("--against selects weights, and --preset creates random weights; pass only one of them")
    for name, file in (("--record", options.record), ("--json", options.json)):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{name} {file}: the folder {file.parent}/ does not exist")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}; expected 0 or more")
    get_backend(options.device)
    if options.record:
        if not comparing or is_reference(Path(options.against or "")):
            raise ValueError("--record needs --preset, or --against with a model")
        write_reference(options.record, requested(options), options.device)
        comparing = False
    report = verify_parity(options) if comparing else {"ok": True}
    if options.json:
        write_json(options.json, report)
    correct = not options.gradients or verify_gradients(options.seed, options.device)
    return 0 if report["ok"] and correct else 1


if __name__ == "__main__":
    sys.exit(console.run(main))
