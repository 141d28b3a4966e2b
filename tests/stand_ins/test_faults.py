"""Every fault that a test injects still matches the source. Faults are located by function, not by layout."""

import importlib
from pathlib import Path

import pytest

from tests.gpt2 import test_decode
from tests.stand_ins.faults import inject, without
from tinygrad2.kernels import cuda, gemm

SOURCE = """
// twice(x) is called below.
struct Pair {
  int first;
  int twice() const { return 2 * first; }
};
constexpr int STEP = 3;
int twice(int x);
int twice(int x) {
  return  2
      * x;
}
int main() { return twice(2 * STEP); }
"""


def test_a_fault_is_injected_only_into_its_function():
    assert inject(SOURCE, "twice", "return 2 * x;", "return 3 * x;") == SOURCE.replace("2\n      * x", "3 * x").replace(
        "return  3", "return 3"
    )
    assert inject(SOURCE, "Pair", "2 *", "4 *") == SOURCE.replace("2 * first", "4 * first")
    assert inject(SOURCE, "STEP", "3", "5") == SOURCE.replace("STEP = 3", "STEP = 5")
    assert "2 * STEP" not in inject(SOURCE, "main, Pair", "2 *", "")


def test_one_occurrence_is_removed():
    assert without("int f() { a; a; }", "f", "a;", 1) == "int f() { a;  }"
    with pytest.raises(AssertionError, match="'f' contains 'a;' 2 times, not 3"):
        without("int f() { a; a; }", "f", "a;", 2)


def test_a_fault_is_injected_into_a_python_function():
    source = "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return 1\n"
    assert inject(source, "g", "return 1", "return 2").count("return 1") == 1


def test_a_fault_that_matches_nothing_raises_a_helpful_error():
    with pytest.raises(AssertionError, match="'main' no longer contains 'x'; update the fault"):
        inject(SOURCE, "main", "x", "y")
    with pytest.raises(AssertionError, match="no function 'thrice' in the source"):
        inject(SOURCE, "thrice", "x", "y")


@pytest.mark.parametrize(
    ("family", "table"),
    [
        *((family, "FAULTS") for family in ("attention_backward", "attention_cached", "attention_forward", "columns")),
        *((family, "FAULTS") for family in ("cross_entropy", "dropout", "embedding", "gelu", "layernorm", "optimizer")),
        ("attention_forward", "DROPOUT_FAULTS"),
    ],
)
def test_every_fault_of_a_kernel_matches_the_source(family, table):
    faults = getattr(importlib.import_module(f"tests.tinygrad2.kernels.test_cuda_{family}"), table)
    for fault in faults.values() if isinstance(faults, dict) else faults:
        source = fault[0] if isinstance(faults, dict) else family
        inject(cuda.source(source), *fault[-3:])


def test_every_fault_of_decode_and_gemm_matches_the_source():
    for fault in test_decode.FAULTS.values():
        inject(cuda.source(test_decode.SOURCE), *fault)
    tests = importlib.import_module("tests.tinygrad2.kernels.test_cuda_gemm")
    for fault in tests.FAULTS:
        inject(Path(gemm.__file__).read_text(encoding="utf-8"), *fault)
