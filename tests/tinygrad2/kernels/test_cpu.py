"""Compare every kernel in tinygrad2/kernels/cpu.py with the function of the same name in reference.py."""

import inspect
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tinygrad2 import Key, reference
from tinygrad2.backend import kernel_table

cpu = pytest.importorskip("tinygrad2.kernels.cpu")
NAMES = [
    name
    for name, function in vars(cpu).items()
    if inspect.isfunction(function) and function.__module__ == cpu.__name__ and not name.startswith("_")
]
KEY = Key(11, step=3, first_sample=5, site=2)
SHAPES = [(1, 1, 4), (2, 5, 12), (3, 131, 20), (1, 300, 8), (2, 64, 96)]  # B, T, C


def arguments(name, shape, seed=0):
    """Arguments for a kernel in float64, including arrays that it changes in place."""
    R = np.random.default_rng(seed)
    B, T, C = shape
    H, V = 2, 37

    def array(*sizes):
        return R.normal(size=sizes)

    x, tokens = array(B, T, C), R.integers(0, V, (B, T))
    _, mean, rstd = reference.layernorm_forward(x, array(C), array(C), 1e-5)
    qkv = 2 * array(B, T, 3 * C)
    attended = {key: reference.attention_forward(qkv, H, 0.3, key) for key in (None, KEY)}
    weight = array(V, C)
    _, dlogits = reference.lm_head_forward(x, weight, tokens)
    flat = [array(B * T * C) for _ in range(3)] + [array(B * T * C) ** 2]
    lr, step = np.float64(1e-2), np.float64(3)
    adam = [lr, 0.9, 0.95, 1e-8, 0.1, step]
    return {
        "linear_forward": [[x, array(C, 7), array(7)], [x, array(C, 7), None]],
        "linear_backward": [
            [array(B, T, 7), x, array(C, 7), array(C, 7), array(7)],
            [array(B, T, 7), x, array(C, 7), None, None],
        ],
        "embedding_forward": [[tokens, array(V, C), array(T + 3, C), 2], [tokens, array(V, C), None, 0]],
        "embedding_backward": [
            [x, tokens, 2, array(V, C), array(T + 3, C)],
            [x, tokens, 0, None, None],
        ],
        "dropout_forward": [[x, 0.3, KEY], [x[1:] if B > 1 else x, 0.7, KEY]],
        "dropout_backward": [[x, 0.3, KEY]],
        "layernorm_forward": [[x, array(C), array(C), 1e-5]],
        "layernorm_backward": [
            [array(B, T, C), x, array(C), mean, rstd, array(C), array(C)],
            [array(B, T, C), x, array(C), mean, rstd, None, None],
        ],
        "add_layernorm_forward": [[x, array(B, T, C), array(C), array(C), 1e-5]],
        "add_layernorm_backward": [[array(B, T, C), array(B, T, C), x, array(C), mean, rstd, array(C), array(C)]],
        "attention_forward": [[qkv, H, 0.0, None], [qkv, H, 0.3, KEY]],
        "attention_backward": [[array(B, T, C), qkv, *attended[key], H, 0.3, key] for key in (None, KEY)],
        "attention_cached": [
            [qkv[:, :n], array(2, B, H, T + 9, C // H), before, H] for n, before in ((T, 0), (T, 9), (1, 5))
        ],
        "gelu_forward": [[3 * x, array(C)], [3 * x, None]],
        "gelu_backward": [[array(B, T, C), 3 * x, array(C), array(C)], [array(B, T, C), 3 * x, None, None]],
        "cross_entropy_forward": [[3 * array(B, T, V), tokens]],
        "cross_entropy_backward": [
            [np.float64(0.5), logits, tokens, reference.cross_entropy_forward(logits, tokens)[1]]
            for logits in [3 * array(B, T, V)]
        ],
        "lm_head_forward": [[x, weight, tokens]],
        "lm_head_backward": [[np.float64(0.5), dlogits, x, weight, array(V, C)]],
        "squared_norm": [[flat[0]]],
        "muon_momentum": [[*flat[:2], np.float64(0.7), 0.95]],
        "orthogonalize": [[array(7, 5), array(C, 7), array(2, 9)]],
        "muon_step": [[array(C, 7), array(C, 7), np.float64(scale), lr, 0.1] for scale in (0.7, np.nan)],
        "sgd_step": [
            [*flat[:3], np.float64(scale), lr, 0.9, nesterov, 0.1]
            for scale, nesterov in ((0.7, False), (0.7, True), (np.nan, True))
        ]
        + [[*flat[:2], None, np.float64(0.7), lr, 0.0, False, 0.1]],
        "adamw_step": [[*flat, np.float64(scale), *adam] for scale in (0.7, np.nan)],
    }[name]


CHANGED = {  # positions of the arguments that a kernel may change
    "linear_backward": {3, 4},
    "embedding_backward": {3, 4},
    "attention_cached": {1},
    "layernorm_backward": {5, 6},
    "add_layernorm_backward": {6, 7},
    "gelu_backward": {3},
    "lm_head_backward": {4},
    "adamw_step": {0, 2, 3},
    "sgd_step": {0, 2},
    "muon_momentum": {1},
    "orthogonalize": {0, 1, 2},
    "muon_step": {0},
}


def convert(value, dtype, how=np.array):
    is_float = isinstance(value, np.ndarray | np.floating) and value.dtype == np.float64
    return how(value.astype(dtype)) if is_float else value


def strided_view(array):
    """A read-only view with the same values and gaps between the elements."""
    if array.ndim == 0:
        return array
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), np.nan, dtype=array.dtype)
    wide[..., ::2] = array
    view = wide[..., ::2]
    view.flags.writeable = False
    return view


def error(result, expected):
    return np.linalg.norm(np.asarray(result, dtype=np.float64) - expected) / max(np.linalg.norm(expected), 1e-300)


def results(returned, given, name):
    """All results of a kernel: its return values, and the arguments that it changed."""
    returned = returned if isinstance(returned, tuple) else (returned,)
    if name == "squared_norm":
        returned = (reference.norm(returned[0]),)
    changed = [given[i] for i in sorted(CHANGED.get(name, ())) if given[i] is not None]
    return [array for array in returned if array is not None] + changed


def test_the_kernels_have_the_names_and_signatures_of_the_reference():
    assert len(NAMES) >= 17
    for name in NAMES:
        assert list(inspect.signature(getattr(cpu, name)).parameters) == list(
            inspect.signature(getattr(reference, name)).parameters
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_equals_the_reference(name, shape):
    for values in arguments(name, shape):
        expected_arguments = [convert(value, np.float64) for value in values]
        expected = results(getattr(reference, name)(*expected_arguments), expected_arguments, name)
        for dtype, bound in ((np.float64, 1e-13), (np.float32, 1e-5 if "backward" in name else 2e-6)):
            given = [convert(value, dtype) for value in values]
            got = results(getattr(cpu, name)(*given), given, name)
            assert len(got) == len(expected)
            for result, correct in zip(got, expected, strict=True):
                assert result.dtype == dtype
                assert result.shape == correct.shape
                assert error(result, correct) <= bound
            for i, (value, before) in enumerate(zip(given, values, strict=True)):
                if isinstance(value, np.ndarray) and i not in CHANGED.get(name, ()):
                    np.testing.assert_array_equal(value, convert(before, dtype), f"{name} changed argument {i}")


@pytest.mark.parametrize("name", NAMES)
def test_strided_read_only_inputs_give_the_same_results(name):
    for values in arguments(name, (2, 67, 12)):
        plain, strided = ([convert(value, np.float32) for value in values] for _ in range(2))
        for i, value in enumerate(strided):
            if isinstance(value, np.ndarray) and value.dtype == np.float32 and i not in CHANGED.get(name, ()):
                strided[i] = strided_view(value)
        got = results(getattr(cpu, name)(*strided), strided, name)
        for result, correct in zip(got, results(getattr(cpu, name)(*plain), plain, name), strict=True):
            assert error(result, correct.astype(np.float64)) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("adamw_step", "embedding_backward")])
def test_nonfinite_values_propagate_as_in_the_reference(name, bad):
    values = arguments(name, (2, 67, 12))[0]
    spoiled = next(i for i, value in enumerate(values) if isinstance(value, np.ndarray) and value.dtype.kind == "f")
    values[spoiled] = values[spoiled].copy()
    values[spoiled].reshape(-1)[5] = bad
    with np.errstate(all="ignore"):
        expected_arguments, given = ([convert(value, np.float32) for value in values] for _ in range(2))
        expected = results(getattr(reference, name)(*expected_arguments), expected_arguments, name)
        got = results(getattr(cpu, name)(*given), given, name)
    for result, correct in zip(got, expected, strict=True):
        nonfinite, expected_nonfinite = ~np.isfinite(result), ~np.isfinite(correct)
        if name == "attention_backward":  # in the reference, NaN times 0 reaches masked keys too
            assert nonfinite.any() == expected_nonfinite.any()
            assert not (nonfinite & ~expected_nonfinite).any()
        else:
            np.testing.assert_array_equal(nonfinite, expected_nonfinite)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("linear", "lm_head"))])
def test_sums_do_not_depend_on_the_number_of_threads(name, set_threads):
    """Matrix products are excluded: BLAS may round differently if a product is divided differently."""
    outcomes = []
    for count in (1, 2, 3, 5):
        set_threads(count)
        given = [convert(value, np.float32) for value in arguments(name, (3, 131, 96))[0]]
        outcomes.append(results(getattr(cpu, name)(*given), given, name))
    for outcome in outcomes[1:]:
        for result, correct in zip(outcome, outcomes[0], strict=True):
            np.testing.assert_array_equal(result, correct)


# bfloat16 -------------------------------------------------------------------------------------------------------------

STATISTICS = {  # positions of the arguments that are float32 when the others are bfloat16
    "linear_backward": {3, 4},
    "embedding_backward": {3, 4},
    "layernorm_forward": {1, 2},
    "layernorm_backward": {2, 3, 4, 5, 6},
    "add_layernorm_forward": {2, 3},
    "add_layernorm_backward": {3, 4, 5, 6, 7},
    "attention_backward": {3},
    "gelu_backward": {3},
    "cross_entropy_backward": {0, 3},
    "lm_head_backward": {0, 4},
}
SUMS = {  # positions of the results that are float32
    "layernorm_forward": {1, 2},
    "add_layernorm_forward": {2, 3},
    "attention_forward": {1},
    "cross_entropy_forward": {0, 1},
    "lm_head_forward": {0},
    "embedding_forward": {0},  # the operation rounds it to the dtype of the activations
    "embedding_backward": {0, 1},
}
UPDATES = ("squared_norm", "muon_momentum", "orthogonalize", "muon_step", "sgd_step", "adamw_step")  # float32 only
IN_BFLOAT16 = [name for name in NAMES if name not in UPDATES]


@pytest.fixture(params=["float32 products", "oneDNN"])
def products(request, monkeypatch):
    """Compute bfloat16 products with the portable path, or with oneDNN."""
    if request.param == "float32 products":
        monkeypatch.setattr(cpu.onednn, "library", lambda: None)
    elif cpu.onednn.library() is None:
        pytest.skip(cpu.onednn.unavailable_reason())


def in_bfloat16(name, values, how=np.array):
    """The arguments rounded to bfloat16, or to float32 if they are statistics or sums."""
    kinds = ("float32" if i in STATISTICS.get(name, ()) else bfloat16 for i in range(len(values)))
    return [convert(value, kind, how) for value, kind in zip(values, kinds, strict=True)]


def as_float64(value):
    return value.astype(np.float64) if hasattr(value, "dtype") and value.dtype in (bfloat16, np.float32) else value


@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 131, 20), (2, 64, 96)], ids=str)
@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_a_bfloat16_kernel_equals_the_reference_on_the_same_values(products, name, shape):
    for values in arguments(name, shape):
        given = in_bfloat16(name, values)
        wider = [as_float64(value) for value in given]
        expected = results(getattr(reference, name)(*wider), wider, name)
        before = [value.copy() if isinstance(value, np.ndarray) else value for value in given]
        got = results(getattr(cpu, name)(*given), given, name)
        assert len(got) == len(expected)
        changed = len([i for i in CHANGED.get(name, ()) if given[i] is not None])
        for i, (result, correct) in enumerate(zip(got, expected, strict=True)):
            parameter = i >= len(got) - changed and name != "attention_cached"
            narrow = not parameter and i not in SUMS.get(name, ())
            assert result.dtype == (bfloat16 if narrow else np.float32)
            assert result.shape == correct.shape
            # A result is rounded once, by at most 2^-9. Sums and logits are rounded before the kernel continues.
            bound = {"add_layernorm_forward": 4e-3, "lm_head_forward": 2e-2}.get(name, 4e-3 if narrow else 1e-3)
            assert error(result, correct) <= bound, i
        for i, (value, old) in enumerate(zip(given, before, strict=True)):
            if isinstance(value, np.ndarray) and i not in CHANGED.get(name, ()):
                np.testing.assert_array_equal(value, old, f"{name} changed argument {i}")


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_strided_read_only_bfloat16_inputs_give_the_same_results(products, name):
    for values in arguments(name, (2, 67, 12)):
        plain, strided = (in_bfloat16(name, values) for _ in range(2))
        for i, value in enumerate(strided):
            if isinstance(value, np.ndarray) and value.dtype == bfloat16 and i not in CHANGED.get(name, ()):
                strided[i] = strided_view(value)
        got = results(getattr(cpu, name)(*strided), strided, name)
        for result, correct in zip(got, results(getattr(cpu, name)(*plain), plain, name), strict=True):
            assert error(result, as_float64(correct)) < 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [name for name in IN_BFLOAT16 if name != "embedding_backward"])
def test_nonfinite_bfloat16_values_propagate_as_in_the_reference(products, name, bad):
    values = in_bfloat16(name, arguments(name, (2, 67, 12))[0])
    spoiled = next(i for i, v in enumerate(values) if isinstance(v, np.ndarray) and v.dtype == bfloat16)
    values[spoiled].reshape(-1)[5] = bad
    with np.errstate(all="ignore"):
        wider = [np.array(value, np.float32) if isinstance(value, np.ndarray) and value.dtype == bfloat16 else value
                 for value in values]  # fmt: skip
        wider = [value.copy() if isinstance(value, np.ndarray) else value for value in wider]
        expected = results(getattr(reference, name)(*wider), wider, name)
        got = results(getattr(cpu, name)(*values), values, name)
    for result, correct in zip(got, expected, strict=True):
        nonfinite, expected_nonfinite = (~np.isfinite(as_float64(array)) for array in (result, correct))
        if name == "attention_backward":
            assert nonfinite.any() == expected_nonfinite.any()
            assert not (nonfinite & ~expected_nonfinite).any()
        else:
            np.testing.assert_array_equal(nonfinite, expected_nonfinite)


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16_results_do_not_depend_on_the_number_of_threads(name, set_threads):
    """Products are included: they are divided by rows, and oneDNN computes a row in the same way in every part."""
    if cpu.onednn.library() is None and name.startswith(("linear", "lm_head")):
        pytest.skip(cpu.onednn.unavailable_reason())
    outcomes = []
    for count in (1, 2, 3, 5):
        set_threads(count)
        given = in_bfloat16(name, arguments(name, (3, 131, 96))[0])
        outcomes.append(results(getattr(cpu, name)(*given), given, name))
    for outcome in outcomes[1:]:
        for result, correct in zip(outcome, outcomes[0], strict=True):
            np.testing.assert_array_equal(result, correct)


def test_operations_without_a_bfloat16_kernel_are_computed_in_float32():
    R = np.random.default_rng(0)
    x, y = (R.normal(size=(3, 40, 40)).astype(bfloat16) for _ in range(2))
    for name, given in {
        "softmax_forward": (x,), "softmax_backward": (x, y), "matmul_forward": (x, y), "matmul_backward": (x, x, y),
        "gelu_exact_forward": (x, None), "gelu_exact_backward": (x, y, None, None),
    }.items():  # fmt: skip
        found, correct = (
            results(function(*arrays), [], name)
            for function, arrays in (
                (getattr(cpu, name), given),
                (getattr(reference, name), [as_float64(array) for array in given]),
            )
        )
        for result, expected in zip(found, correct, strict=True):
            assert result.dtype == bfloat16
            assert error(result, expected) < 4e-3


def test_gelu_of_large_arguments():
    x = np.array([-1e12, -100, -50, -10, -6, 6, 10, 50, 1e12], dtype=np.float32)
    np.testing.assert_allclose(cpu.gelu_forward(x, None), reference.gelu_forward(x.astype("d"), None), atol=1e-7)
    slope = cpu.gelu_backward(np.ones_like(x)[None, :-1], x[None, :-1], None, None)
    np.testing.assert_allclose(slope[0], reference.gelu_backward(np.ones(8), x[:-1].astype("d"), None, None), atol=1e-6)


def test_the_kernel_table_overrides_some_functions_and_keeps_the_others():
    table = kernel_table(reference, cpu)
    assert table.gelu_forward is cpu.gelu_forward
    assert table.exp_forward is reference.exp_forward
    assert kernel_table(reference, None).gelu_forward is reference.gelu_forward


@pytest.mark.parametrize(
    ("before", "module"),
    [
        ("import os; os.environ['TINYGRAD2_KERNELS'] = 'reference'", "tinygrad2.reference"),
        ("import sys; sys.modules['numba'] = None", "tinygrad2.reference"),
        ("", "tinygrad2.kernels.cpu"),
    ],
)
def test_the_kernel_table_depends_on_the_environment(before, module):
    code = f"{before}\nfrom tinygrad2.backend import get_backend\nprint(get_backend().kernels.gelu_forward.__module__)"
    env = {key: value for key, value in os.environ.items() if key != "TINYGRAD2_KERNELS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == module


TRAIN = """
import hashlib, sys
import numpy as np
from gpt2 import GPT2, GPT2Config
from tinygrad2 import Key, optim
model = GPT2(GPT2Config.preset("nano"), seed=0, dtype=sys.argv[1])
optimizer, draw = optim.AdamW(model, lr=1e-2), np.random.default_rng(0)
for step in range(12):
    tokens = draw.integers(0, 257, (1, 65))
    model.backward(tokens[:, :-1], tokens[:, 1:], Key(1, step))
    optimizer.step(max_norm=1.0)
    optimizer.zero_grad()
print(hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.parameters())).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_that_compiles_computes_the_same_bits_as_one_that_reads_the_cache(dtype, tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    results = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", TRAIN, dtype], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results.append((done.stdout, "compiling kernels" in done.stderr))
    assert results == [(results[0][0], True), (results[0][0], False)]
