import inspect
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from tinygrad2 import Tensor, gradcheck, gradient_checkpointing, methods, ops, reference, tensor
from tinygrad2.backend import get_backend
from tinygrad2.gradcheck import CASES, check
from tinygrad2.tensor import record

KERNELS = get_backend().kernels

# For each backward kernel: the number of arrays that it returns, and the buffers to which it adds.
RESULTS = {
    "add_backward": (2, ()),
    "subtract_backward": (2, ()),
    "multiply_backward": (2, ()),
    "divide_backward": (2, ()),
    "power_backward": (1, ()),
    "exp_backward": (1, ()),
    "log_backward": (1, ()),
    "tanh_backward": (1, ()),
    "sum_backward": (1, ()),
    "max_backward": (1, ()),
    "getitem_backward": (0, ("dx",)),
    "matmul_backward": (2, ()),
    "linear_backward": (1, ("dweight", "dbias")),
    "embedding_backward": (0, ("dwte", "dwpe")),
    "dropout_backward": (1, ()),
    "layernorm_backward": (1, ("dweight", "dbias")),
    "add_layernorm_backward": (1, ("dweight", "dbias")),
    "attention_backward": (1, ()),
    "gelu_backward": (1, ("dbias",)),
    "gelu_exact_backward": (1, ("dbias",)),
    "softmax_backward": (1, ()),
    "cross_entropy_backward": (1, ()),
    "lm_head_backward": (1, ("dweight",)),
}
INJECTED = [(name, part) for name, (returned, buffers) in RESULTS.items() for part in (*range(returned), *buffers)]
WITHOUT_KERNELS = {  # operations without a backward kernel of their own
    "_shift_backward": tensor,
    "_scale_backward": tensor,
    "_negate_backward": tensor,
    "_astype_backward": tensor,
    "_reshape_backward": tensor,
    "_transpose_backward": tensor,
    "_recompute_backward": gradient_checkpointing,
    "_lm_head_in_chunks_backward": ops,
    "_maximum_backward": methods,
    "_where_backward": methods,
    "_cumsum_backward": methods,
    "_minimum_backward": methods,
    "_power_backward": methods,
    "_remainder_backward": methods,
    "_logaddexp_backward": methods,
    "_arctan2_backward": methods,
    "_hypot_backward": methods,
    "_prod_backward": methods,
    "_broadcast_to_backward": methods,
    "_pad_backward": methods,
    "_concatenate_backward": methods,
    "_logits_backward": ops,
}


def scaled(gradient):
    """The gradient, with all elements wrong by 0.1 %."""
    return gradient * 1.001


def one_element(gradient):
    """The gradient, with its largest element wrong by 0.1 %."""
    wrong = np.array(gradient)
    wrong[np.unravel_index(np.argmax(np.abs(wrong)), wrong.shape)] *= 1.001
    return wrong


def injected(kernel, part, damage):
    """The backward kernel, with `damage` applied to one of the arrays that it returns or adds to a buffer."""
    signature = inspect.signature(kernel)

    def wrong(*arguments):
        if isinstance(part, int):
            given = kernel(*arguments)
            if not isinstance(given, tuple):
                return damage(given)
            return tuple(damage(array) if i == part else array for i, array in enumerate(given))
        buffer = signature.bind(*arguments).arguments[part]
        before = None if buffer is None else buffer.copy()
        given = kernel(*arguments)
        if buffer is not None:
            buffer[...] = before + damage(buffer - before)
        return given

    return wrong


def caught(operation):
    """Whether at least one of this operation's rows in the table fails."""
    rows = [case for case in CASES if case.name.startswith(operation)]
    assert rows
    return any(case.error() > case.bound for case in rows)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_gradient_is_correct(case):
    assert case.error(seed=1) <= case.bound


@pytest.mark.parametrize("damage", [scaled, one_element])
@pytest.mark.parametrize(("kernel", "part"), INJECTED)
def test_a_relative_error_of_one_thousandth_in_a_kernel_is_detected(monkeypatch, kernel, part, damage):
    monkeypatch.setattr(KERNELS, kernel, injected(getattr(KERNELS, kernel), part, damage))
    assert caught(kernel.removesuffix("_backward"))


@pytest.mark.parametrize("damage", [scaled, one_element])
@pytest.mark.parametrize("name", WITHOUT_KERNELS)
def test_a_relative_error_of_one_thousandth_outside_the_kernels_is_detected(monkeypatch, name, damage):
    original = getattr(WITHOUT_KERNELS[name], name)

    def wrong(*arguments):
        first, *others = original(*arguments)
        return damage(first), *others

    monkeypatch.setattr(WITHOUT_KERNELS[name], name, wrong)
    assert caught(name.removeprefix("_").removesuffix("_backward"))


WITH_A_SLOPE = """
    abs sqrt rsqrt square reciprocal exp2 expm1 log1p log2 log10 sin cos tan sinh cosh arcsin arccos arctan
    arcsinh arccosh arctanh erf nan_to_num relu leaky_relu elu sigmoid softplus hardtanh hardswish clip std
"""


@pytest.mark.parametrize("name", WITH_A_SLOPE.split())
def test_a_relative_error_of_one_thousandth_in_a_slope_is_detected(monkeypatch, name):
    original = methods.Slope.__call__

    def wrong(self, saved, dy, into):
        (dx,) = original(self, saved, dy, into)
        return (scaled(dx) if self.__name__ == {"std": "sqrt"}.get(name, name) else dx,)

    monkeypatch.setattr(methods.Slope, "__call__", wrong)
    assert caught(name)


def test_every_slope_has_an_injected_error():
    source = inspect.getsource(methods)
    without = {"sign", "floor", "ceil", "round", "trunc"}
    assert set(re.findall(r'_map\(\s*"(\w+)"', source)) - without == set(WITH_A_SLOPE.split()) - {"std"}


@pytest.mark.parametrize("kernel", ["linear_backward", "attention_backward", "gelu_backward", "add_layernorm_backward"])
def test_the_transformer_rows_detect_an_error_too(monkeypatch, kernel):
    monkeypatch.setattr(KERNELS, kernel, injected(getattr(KERNELS, kernel), 0, scaled))
    assert caught("transformer block")
    assert caught("transformer, two blocks")


def test_every_backward_function_has_injected_errors_and_rows():
    backward = {name for name in vars(reference) if name.endswith("_backward")}
    assert backward == set(RESULTS)
    assert {f"_{name}" for name in backward} | set(WITHOUT_KERNELS) >= {
        name
        for module in (tensor, ops, methods, gradient_checkpointing)
        for name in vars(module)
        if name.endswith("_backward")
    } - {"_empty_backward"}  # its gradients are zeros; see test_empty.py
    for name, (_, buffers) in RESULTS.items():
        assert hasattr(reference, name.replace("_backward", "_forward"))
        last = list(inspect.signature(getattr(reference, name)).parameters)[-2:]
        assert set(buffers) == {argument for argument in last if argument in ("dx", "dweight", "dbias", "dwte", "dwpe")}


def wrong_by(factor):
    """x^2, with a gradient that is wrong by a factor."""
    return lambda x: record(x.data**2, (x,), lambda saved, dy, into: (factor * 2 * saved[0] * dy,), saved=(x.data,))


def test_check_returns_a_relative_error_for_each_input():
    x = np.array([[1.0, -2.0], [0.5, 3.0]])
    wrong = wrong_by(1.001)
    first, second = check(lambda a, b: a * wrong(b), [x, x])
    assert first < 1e-9
    assert second == pytest.approx(1e-3, rel=1e-6)


def test_a_failed_check_raises_a_one_line_error_that_names_the_input():
    x = np.ones((2, 3))
    check(wrong_by(1), [x], raises=True)
    with pytest.raises(
        AssertionError, match=r"^gradcheck: input hidden of shape \(2, 3\): relative error 1\.0e-03"
    ) as e:
        check(lambda a, b: a * wrong_by(1.001)(b), [x, x], raises=True, names=("x", "hidden"))
    assert "\n" not in str(e.value)


def test_a_check_passes_up_to_the_tolerance():
    check(wrong_by(1.001), [[1.0, 2.0]], raises=True, tolerance=2e-3)
    with pytest.raises(AssertionError, match="expected at most 5e-04"):
        check(wrong_by(1.001), [[1.0, 2.0]], raises=True, tolerance=5e-4)


def test_a_missing_gradient_is_an_error():
    detached = [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
    assert check(lambda a, b: a * b.detach(), detached)[1] == pytest.approx(1)
    assert check(lambda a: a.detach() * 2, detached[:1]) == [pytest.approx(1)]
    with pytest.raises(AssertionError, match="the gradient is missing"):
        check(lambda a, b: a * b.detach(), detached, raises=True)


def test_an_unused_input_is_not_an_error():
    assert check(lambda a, b: a * 2, [np.ones(3), np.ones(3)])[1] == 0


@pytest.mark.parametrize("n", [5, 300])
def test_a_gradient_that_is_exactly_zero_is_not_an_error(n):
    x = np.random.default_rng(0).normal(size=(7, n))
    assert check(lambda x: ops.softmax(x).sum(-1), [x])[0] < 1e-7

    def key_bias(b):  # adds the same value to all scores of a row
        return ops.attention(Tensor(np.tile(x[None, :, :2], 3)) + Tensor(np.eye(3, dtype=float)[1].repeat(2)) * b, 1)

    assert check(key_bias, [[0.5]])[0] < 1e-7


def test_a_nonzero_result_for_a_zero_gradient_is_an_error():
    def shifted(x):
        y = ops.softmax(x).data.sum(-1)
        return record(y, (x,), lambda saved, dy, into: (1e-6 * np.ones(saved[0]),), saved=(x.shape,))

    assert check(shifted, [np.random.default_rng(0).normal(size=(7, 5))])[0] > 1e-7


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_give_an_infinite_error(value):
    def in_gradient(x):
        return record(x.data * 1, (x,), lambda saved, dy, into: (dy * np.array([1, value]),))

    assert check(in_gradient, [np.ones(2)]) == [math.inf]
    assert check(lambda x: x * Tensor(np.array([1, value])), [np.ones(2)]) == [math.inf]
    with pytest.raises(AssertionError, match="relative error inf"):
        check(in_gradient, [np.ones(2)], raises=True)


def test_inputs_may_be_lists_tensors_or_float32_and_are_not_changed():
    array = np.array([[1.0, 2.0]], dtype=np.float32)
    leaf = Tensor(array, requires_grad=True)
    before = array.copy()
    assert max(check(lambda a, b, c: a * b * c, [array, leaf, [[3, 4]]])) < 1e-9
    np.testing.assert_array_equal(array, before)
    assert leaf.grad is None
    with pytest.raises(ValueError, match="read-only"):
        check(lambda x: record(np.negative(x.data, out=x.data), (x,), lambda saved, dy, into: (-dy,)), [array])


def test_several_results_and_scalars():
    assert max(check(lambda a, b: (a * b, a.sum(), b.exp()), [np.array(0.5), np.array(1.5)])) < 1e-9


def test_invalid_arguments_are_rejected():
    with pytest.raises(TypeError, match="inputs has type ndarray; expected a list"):
        check(lambda x: x, np.ones(3))
    with pytest.raises(TypeError, match="fn returned float; expected a Tensor"):
        check(lambda x: 1.0, [np.ones(3)])


def test_the_command_prints_a_table_and_exits_with_zero(capsys):
    assert gradcheck.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CASES) + 2
    assert all(line.endswith("  ok") for line in lines[1:-1])
    assert lines[-1].startswith(f"{len(CASES)} of {len(CASES)} gradients are correct")


def test_a_closed_pipe_is_not_an_error():
    command = [sys.executable, "-m", "tinygrad2.gradcheck"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_the_command_exits_with_one_when_a_gradient_is_wrong(capsys, monkeypatch):
    original = methods._cumsum_backward
    monkeypatch.setattr(methods, "_cumsum_backward", lambda *arguments: (1.001 * original(*arguments)[0],))
    assert gradcheck.main(["--seed", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("FAILED")] == ["cumsum", "cumsum,"]
    assert lines[-1].startswith(f"{len(CASES) - 2} of {len(CASES)}")
