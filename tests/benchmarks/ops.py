"""Single operations on the CPU, compared with PyTorch's: python tests/benchmarks/ops.py [--json FILE]

Measures the operations in a training step of the 124M model on one sequence of 1,024 tokens, forward and backward, in
float32. The contenders run interleaved: this project's kernels, reference.py with NumPy, and PyTorch, if it is
installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a repository that is not installed

from tests.benchmarks.alternate import Contender, Tasks, Work, command, parser, positive, report, timed, versions

RATE = 0.1  # dropout rate
LEAST = 0.1  # an operation is repeated for at least this many seconds per turn


def works(T: int, C: int, V: int) -> dict[str, Work]:
    """The FLOPs of operations with matrix products; the minimum bytes read and written of all others."""
    linear, attention, narrow, wide, table = 8 * T * C * C, 2 * T * T * C, 4 * T * C, 16 * T * C, 4 * V * C
    return {
        "linear forward": Work(flops=linear),
        "linear backward": Work(flops=2 * linear),
        "attention forward": Work(flops=attention),
        "attention backward": Work(flops=2 * attention),
        "lm_head forward + backward": Work(flops=6 * T * C * V),
        "gelu forward": Work(read=wide, written=wide),
        "gelu backward": Work(read=2 * wide, written=wide),
        "layernorm forward": Work(read=narrow, written=narrow),
        "layernorm backward": Work(read=2 * narrow, written=narrow),
        "dropout forward": Work(read=narrow, written=narrow),
        "dropout backward": Work(read=narrow, written=narrow),
        "adamw of the embedding": Work(read=4 * table, written=3 * table),
    }


def arrays(T: int, C: int, V: int) -> dict[str, Any]:
    """The operands by name; they are the same for all contenders."""
    import numpy as np

    generator = np.random.default_rng(0)
    shapes = {
        "x": (1, T, C), "dy": (1, T, C), "wide": (1, T, 4 * C), "dwide": (1, T, 4 * C), "qkv": (1, T, 3 * C),
        "gain": (C,), "bias": (C,), "wide_bias": (4 * C,), "weight": (C, 4 * C), "wte": (V, C), "dwte": (V, C),
    }  # fmt: skip
    values = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name in ("weight", "wte", "dwte"):
        values[name] *= np.float32(0.02)
    return {**values, "targets": generator.integers(V, size=(1, T))}


def ours(T: int, C: int, V: int, H: int, count: int, kernels: str | None) -> Tasks:
    """This project's kernels; kernels="reference" uses reference.py with NumPy."""
    if kernels is not None:
        os.environ["TINYGRAD2_KERNELS"] = kernels
    import numpy as np

    from tinygrad2 import Key, threads
    from tinygrad2.backend import get_backend

    threads.set_count(count)
    k, a = get_backend("cpu").kernels, arrays(T, C, V)
    x, dy, wide, dwide, weight, wte = (a[name] for name in ("x", "dy", "wide", "dwide", "weight", "wte"))
    dweight, dwide_bias, dgain, dbias, dwte, m, v = (
        np.zeros_like(array) for array in (weight, a["wide_bias"], a["gain"], a["bias"], wte, wte, wte)
    )
    key, one, lr = Key(0), np.ones((), np.float32), np.full((), 1e-4, np.float32)
    out, lse = k.attention_forward(a["qkv"], H, 0.0, None)
    _, mean, rstd = k.layernorm_forward(x, a["gain"], a["bias"], 1e-5)

    def lm_head() -> None:
        dlogits = k.lm_head_forward(x, wte, a["targets"])[1]
        k.lm_head_backward(one, dlogits, x, wte, dwte)

    def adamw() -> None:
        flat = (array.reshape(-1) for array in (wte, a["dwte"], m, v))
        k.adamw_step(*flat, one, lr, 0.9, 0.95, 1e-8, 0.1, one)

    return ready(
        {
            "linear forward": lambda: k.linear_forward(x, weight, a["wide_bias"]),
            "linear backward": lambda: k.linear_backward(dwide, x, weight, dweight, dwide_bias),
            "attention forward": lambda: k.attention_forward(a["qkv"], H, 0.0, None),
            "attention backward": lambda: k.attention_backward(dy, a["qkv"], out, lse, H, 0.0, None),
            "lm_head forward + backward": lm_head,
            "gelu forward": lambda: k.gelu_forward(wide, a["wide_bias"]),
            "gelu backward": lambda: k.gelu_backward(dwide, wide, a["wide_bias"], dwide_bias),
            "layernorm forward": lambda: k.layernorm_forward(x, a["gain"], a["bias"], 1e-5),
            "layernorm backward": lambda: k.layernorm_backward(dy, x, a["gain"], mean, rstd, dgain, dbias),
            "dropout forward": lambda: k.dropout_forward(x, RATE, key),
            "dropout backward": lambda: k.dropout_backward(dy, RATE, key),
            "adamw of the embedding": adamw,
        }
    )


def ready(functions: dict[str, Callable[[], Any]]) -> Tasks:
    """The tasks, after one warm-up run of each."""
    for function in functions.values():
        function()
    return {name: timed(function) for name, function in functions.items()}


def theirs(T: int, C: int, V: int, H: int, count: int) -> Tasks:
    """PyTorch's operations. A backward task runs only the backward pass, on a retained graph."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(count)
    a = {name: torch.from_numpy(array) for name, array in arrays(T, C, V).items()}
    for name in ("x", "wide", "qkv", "gain", "bias", "wide_bias", "weight", "wte"):
        a[name].requires_grad_()
    x, wte = a["x"], a["wte"]
    weight = a["weight"].detach().T.contiguous().requires_grad_()  # (out, in), as in nn.Linear
    wte.grad = a["dwte"]
    optimizer = torch.optim.AdamW([wte], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def attention(qkv: Any) -> Any:
        q, k, v = (part.view(1, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=2))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(1, T, C)

    def lm_head() -> None:
        loss = functional.cross_entropy(functional.linear(x, wte).flatten(0, 1), a["targets"].flatten())
        torch.autograd.grad(loss, (x, wte))

    def both(name: str, function: Callable, dy: Any, *inputs: Any) -> dict[str, Callable[[], Any]]:
        y = function(*inputs)
        return {
            f"{name} forward": lambda: function(*inputs),
            f"{name} backward": lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True),
        }

    return ready(
        {
            **both("linear", functional.linear, a["dwide"], x, weight, a["wide_bias"]),
            **both("attention", attention, a["dy"], a["qkv"]),
            "lm_head forward + backward": lm_head,
            **both(
                "gelu",
                lambda x, bias: functional.gelu(x + bias, approximate="tanh"),
                a["dwide"],
                a["wide"],
                a["wide_bias"],
            ),
            **both("layernorm", lambda x, w, b: functional.layer_norm(x, (C,), w, b), a["dy"], x, a["gain"], a["bias"]),
            **both("dropout", lambda x: functional.dropout(x, RATE), a["dy"], x),
            "adamw of the embedding": optimizer.step,
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    from gpt2.config import PRESETS, GPT2Config

    options = parser("ops.py", __doc__)
    options.add_argument("--preset", default="gpt2", choices=tuple(PRESETS), help="sizes of the model [%(default)s]")
    options.add_argument("--block", type=positive, default=1024, metavar="T", help="tokens [%(default)s]")
    given = options.parse_args(arguments)
    config = GPT2Config.preset(given.preset)
    sizes = (given.block, config.n_embd, config.vocab_size)
    work, rest = works(*sizes), (config.n_head, given.threads)
    contenders = [
        Contender("tinygrad2", ours, (*sizes, *rest, None), work),
        Contender("reference.py", ours, (*sizes, *rest, "reference"), work),
    ]
    if versions("torch"):
        contenders.append(Contender("PyTorch", theirs, (*sizes, *rest), work, peer=True))
    return report("ops", given, contenders, LEAST, preset=given.preset, block_size=given.block)


if __name__ == "__main__":
    raise SystemExit(command(main))
