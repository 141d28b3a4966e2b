"""PTX instructions on the CPU follow NVIDIA's specification, and reveal errors that cudasim misses."""

import types

import numpy as np
import pytest
from ml_dtypes import bfloat16

from tests.stand_ins import cudasim
from tinygrad2 import reference
from tinygrad2.kernels import cuda

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
try:
    nvrtc.getVersion()
except RuntimeError:
    pytest.skip("NVRTC is not installed: pip install -e '.[cuda-check]'", allow_module_level=True)
from tests.stand_ins import ptxsim  # noqa: E402

pytestmark = pytest.mark.slow  # about twenty kernels are compiled

MODULE = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry numbers(
	.param .u64 numbers_param_0,
	.param .u32 numbers_param_1,
	.param .f32 numbers_param_2
)
.maxntid 32, 1, 1
{
	.reg .pred 	%p<3>;
	.reg .b16 	%rs<3>;
	.reg .b32 	%r<9>;
	.reg .f32 	%f<4>;
	.reg .b64 	%rd<5>;
	ld.param.u64 	%rd1, [numbers_param_0];
	ld.param.u32 	%r1, [numbers_param_1];
	ld.param.f32 	%f1, [numbers_param_2];
	mov.u32 	%r2, 0;
	mov.f32 	%f2, 0f00000000;
	BODY
	st.global.u32 	[%rd1], %r2;
	st.global.f32 	[%rd1+4], %f2;
	ret;
}
"""
N = -7
# The result of each instruction for %r1 = -7 and %f1 = 2.5, in %r2 or %f2.
INSTRUCTIONS = {
    "shr.s32 %r2, %r1, 1;": -4,
    "shr.u32 %r2, %r1, 28;": 15,
    "shl.b32 %r2, %r1, 40;": 0,
    "div.s32 %r2, %r1, 2;": -3,
    "rem.s32 %r2, %r1, 4;": -3,
    "mul.hi.s32 %r2, %r1, 1073741824;": -2,
    "mul.hi.u32 %r2, %r1, 16;": 15,
    "mul.wide.s32 %rd2, %r1, 3; cvt.u32.u64 %r2, %rd2;": -21,
    "mad.lo.s32 %r2, %r1, 3, 1;": -20,
    "min.u32 %r2, %r1, 5;": 5,
    "min.s32 %r2, %r1, 5;": -7,
    "bfi.b32 %r2, %r1, 0, 4, 3;": 16,
    "cvt.s64.s32 %rd2, %r1; shr.u64 %rd3, %rd2, 60; cvt.u32.u64 %r2, %rd3;": 15,
    "cvt.u64.u32 %rd2, %r1; shr.u64 %rd3, %rd2, 32; cvt.u32.u64 %r2, %rd3;": 0,
    "mov.b32 {%rs1, %rs2}, %r1; cvt.u32.u16 %r2, %rs1;": 65529,
    "mov.b32 %f2, %r1; mov.b32 %r2, %f2; mov.f32 %f2, 0f00000000;": -7,
    "setp.lt.s32 %p1, %r1, 0; selp.b32 %r2, 3, 4, %p1;": 3,
    "setp.lt.u32 %p1, %r1, 0; selp.b32 %r2, 3, 4, %p1;": 4,
    "setp.gt.s32 %p1, %r1, 0; @!%p1 bra $L1; mov.u32 %r2, 9; $L1:": 0,
    "setp.lt.s32 %p1, %r1, 0; @!%p1 bra $L1; mov.u32 %r2, 9; $L1:": 9,
    "{ .reg .b32 %tmp; add.s32 %tmp, %r1, 1; mov.u32 %r2, %tmp; }": -6,
    "fma.rn.ftz.f32 %f2, %f1, 0f40000000, 0f3F800000;": 6.0,
    "cvt.rzi.ftz.s32.f32 %r2, %f1;": 2,
    "cvt.rn.f32.s32 %f2, %r1;": -7.0,
    "copysign.f32 %f2, 0fBF800000, %f1;": -2.5,
    "max.ftz.f32 %f2, %f1, 0f7FC00000;": 2.5,
    "setp.leu.ftz.f32 %p1, %f1, 0f7FC00000; selp.f32 %f2, 0f3F800000, 0f00000000, %p1;": 1.0,
    "setp.neu.ftz.f32 %p1, %f1, %f1; selp.f32 %f2, 0f3F800000, 0f00000000, %p1;": 0.0,
    "cvt.rn.bf16x2.f32 %r2, 0f00000000, %f1;": 0x4020,
    "ex2.approx.ftz.f32 %f2, 0f40400000;": 8.0,
    "shfl.sync.bfly.b32 %r2|%p1, %r1, 1, 31, -1;": -7,
    "mov.u32 %r3, %tid.x; shfl.sync.idx.b32 %r2|%p1, %r3, 5, 31, -1;": 5,
    "mov.u32 %r3, %tid.x; shfl.sync.down.b32 %r2|%p1, %r3, 3, 31, -1; @%p1 mov.u32 %r2, 8;": 31,
}


def run(body):
    ptx = MODULE.replace("BODY", body.replace("$L1:", "\n$L1:\n"))
    cpp, static = ptxsim.translate(ptx)
    kernel = ptxsim.Function(cudasim.compiled(cpp, []), "numbers", static)
    memory = np.zeros(2, np.int32)
    kernel((1,), (32,), (memory, np.int32(N), np.float32(2.5)))
    return memory[0], memory[1:].view(np.float32)[0]


def test_every_instruction_gives_its_result():
    for body, expected in INSTRUCTIONS.items():
        integer, fraction = run(body)
        found = fraction if isinstance(expected, float) else integer
        assert found == expected, body


def test_an_unknown_instruction_is_rejected_by_name():
    with pytest.raises(NotImplementedError, match=r"not supported: frobnicate.b32 %r2, %r1"):
        run("frobnicate.b32 %r2, %r1;")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u32 %r2, [%rd1+8];", "an access outside the arrays"),
        ("ld.global.v2.u32 {%r2, %r3}, [%rd1+4];", "a misaligned access"),
        ("st.shared.u32 [%r2], %r1;", "an access outside shared memory"),
        ("trap;", "__trap"),
    ],
)
def test_an_error_on_a_gpu_is_reported(body, message):
    with pytest.raises(RuntimeError, match=message):
        run(body)


def attention(monkeypatch, fault=None):
    """The norm-wise error of the flash attention kernel's PTX, optionally with a part of common.cuh replaced."""
    source = cuda.source("attention_forward")
    if fault:
        assert source.count(fault[0]) == 1
    monkeypatch.setattr(cuda, "source", lambda family: source.replace(*fault) if fault else source)
    library = types.SimpleNamespace(
        RawModule=ptxsim.RawModule,
        empty=lambda shape, dtype: np.full(shape, np.nan, dtype),
        ascontiguousarray=np.ascontiguousarray,
    )
    qkv = np.random.default_rng(0).standard_normal((1, 70, 3 * 64)).astype(bfloat16)
    table = cuda.CudaKernels(library, None)
    table.processor = cuda.Multiprocessor(228 << 10, 2048)
    out, _ = table.attention_forward(qkv, 1, 0.0, None)
    expected, _ = reference.attention_forward(qkv.astype("d"), 1, 0.0, None)
    return np.linalg.norm(out.astype("d") - expected) / np.linalg.norm(expected)


def test_the_compiled_kernel_is_correct(monkeypatch):
    assert attention(monkeypatch) < 4e-3


@pytest.mark.parametrize(
    "fault",
    [
        ('"f"(second), "f"(first)', '"f"(first), "f"(second)'),
        ('"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
        ("m8n8.x4.trans.shared", "m8n8.x4.shared"),
        ("x4.shared.b16 {%0,%1,%2,%3}", "x4.shared.b16 {%0,%2,%1,%3}"),
        ('"cp.async.wait_group %0;" ::"n"(N)', '"cp.async.wait_group %0;" ::"n"(N + 1)'),
    ],
    ids=["swapped halves", "swapped b registers", "not transposed", "swapped matrices", "waits for too few copies"],
)  # fmt: skip
def test_faults_in_inline_ptx_are_detected(monkeypatch, fault):
    try:
        error = attention(monkeypatch, fault)
    except RuntimeError:
        return  # a copy that is never waited for
    assert not error < 4e-3
