"""Run the PTX that NVRTC generates on a CPU, by translating it to C++ instruction by instruction.

cudasim runs a kernel's source, with replacements for the functions that are written in PTX, so it cannot detect errors
in those functions or in the compiler's output. Here the PTX itself runs, as one line of C++ per instruction; cudasim.h
provides the barriers and collectives. In addition, every access is checked to be aligned and to be inside the arrays or
the shared memory of the launch.

`pytest --ptx` runs the kernel tests this way. The instructions are defined in NVIDIA's "Parallel Thread Execution
ISA".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from tests import nvrtc
from tests.stand_ins import cudasim

ARCHITECTURE = "compute_90"
TYPES = {
    **{f"{kind}{bits}": f"{'' if kind == 's' else 'u'}int{bits}_t" for kind in "sub" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
REGISTER = re.compile(r"%([a-z]+)(\d*)$")
SPECIAL = {"tid": "threadIdx", "ctaid": "blockIdx", "ntid": "blockDim", "nctaid": "gridDim"}
COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "div": "/", "rem": "%"}
FUNCTIONS = {
    "abs": "fabsf", "copysign": "ptx_copysign", "ex2": "exp2f", "fma": "fmaf", "lg2": "log2f", "max": "fmaxf",
    "min": "fminf", "rcp": "1.0f / ", "rsqrt": "rsqrtf", "sqrt": "sqrtf",
}  # fmt: skip
PARAMETER = re.compile(
    r"\.param\s+(?:\.align \d+ )?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align \d+ )?)?(\w+)(?:\[(\d+)\])?"
)
SHARED = re.compile(r"\.shared \.align (\d+) \.[a-z]+(\d+) (\w+)(?:\[(\d+)\])?;")
FUNCTION = re.compile(r"^(?:\.visible )?\.(entry|func)\s+(\w+)\(([^)]*)\)([^{;]*)\{\n(.*?)^\}", re.M | re.S)

HEAD = """
template <int N>
struct Bytes {
  char bytes[N];
};
inline float ptx_copysign(float sign, float x) { return copysignf(x, sign); }
template <class T, class F>
inline T ptx_bits(F x) {
  static_assert(sizeof(T) == sizeof(F));
  T y;
  memcpy(&y, &x, sizeof y);
  return y;
}
// The address of an access, after checking it.
inline char* ptx_shared(uint64_t at, size_t size) {
  if (at % size) cudasim::stop("a misaligned access to shared memory");
  if (at + size > cudasim::dynamic_size) cudasim::stop("an access outside shared memory");
  return cudasim::dyn_smem() + at;
}
inline char* ptx_global(uint64_t at, size_t size) {
  if (at % size) cudasim::stop("a misaligned access");
  for (auto& span : cudasim::arrays)
    if ((uint64_t)span.start <= at && at + size <= (uint64_t)span.start + span.size) return (char*)at;
  if (!cudasim::arrays.empty()) cudasim::stop("an access outside the arrays");
  return (char*)at;
}
inline char* ptx_generic(uint64_t at, size_t size) {  // shared memory of any block that is running, or global memory
  for (auto* block : cudasim::living) {
    uint64_t start = (uint64_t)block->dynamic();
    if (start <= at && at + size <= start + cudasim::dynamic_size && at % size == 0) return (char*)at;
  }
  return ptx_global(at, size);
}
inline uint32_t ptx_shfl(uint32_t x, uint32_t mask, int from, int most, bool& in_range) {
  in_range = from <= most;
  return cudasim_shfl(mask, x, in_range ? from : cudasim::cur % 32);
}
"""


def translate(ptx: str) -> tuple[str, int]:
    """C++ for the kernels in a PTX module, and the size of static shared memory, which precedes the dynamic part."""
    static, addresses = 0, {}
    for alignment, bits, name, count in SHARED.findall(ptx):
        static = -(-static // int(alignment)) * int(alignment)
        addresses[name] = static
        static += int(bits) // 8 * int(count or 1)
    static = -(-static // 128) * 128
    addresses |= dict.fromkeys(re.findall(r"\.extern \.shared [^;]*?(\w+)\[\];", ptx), static)
    cluster = re.search(r"\.reqnctapercluster (\d+)", ptx)
    functions = [_Function(*found, addresses, int(cluster[1]) if cluster else 1) for found in FUNCTION.findall(ptx)]
    functions.sort(key=lambda function: function.kind == "entry")  # called functions come first
    return HEAD + "\n".join(map(str, functions)), static


class _Function:
    """A kernel, or a function that kernels call."""

    def __init__(
        self, kind: str, name: str, parameters: str, attributes: str, body: str, addresses: dict[str, int], cluster: int
    ):
        self.kind, self.name, self.addresses, self.cluster = kind, name, addresses, cluster
        self.parameters = [
            (f"Bytes<{count}>" if count else TYPES[type_], each) for type_, each, count in PARAMETER.findall(parameters)
        ]
        threads = re.search(r"\.maxntid (\d+)", attributes)
        self.bound = int(threads[1]) if threads else 1024
        self.types: dict[str, str] = {}  # of registers, by their prefix
        self.lines = list(self._lines(body))

    def __str__(self) -> str:
        kernel = self.kind == "entry"
        given = ", ".join(
            f"{type_ if kernel else 'char*'} {name}{'_' if kernel else ''}" for type_, name in self.parameters
        )
        begin = [f"char* {name} = (char*)&{name}_;" for _, name in self.parameters] if kernel else []
        linkage = 'extern "C"' if kernel else "static"
        text = "\n  ".join(
            [f"{linkage} void {self.name}({given}) {{", "unsigned polls = 0;", "(void)polls;", *begin, *self.lines]
        )
        return text + "\n}" + (f"\nCUDASIM_EXPORT({self.name}, {self.bound})" if kernel else "")

    def _lines(self, body: str) -> Iterator[str]:
        """The C++ of each statement in the body."""
        statement = ""
        for line in re.sub(r"//.*", "", body).splitlines():
            line = line.strip()
            if not statement and line.startswith("{"):  # a scope
                yield "{"
                line = line[1:].strip()
            if re.fullmatch(r"[$\w]+:", line):
                yield line.replace("$", "") + ";"
            elif line:
                statement += " " + line
                while ";" in statement:
                    first, _, statement = statement.partition(";")
                    yield from self._statement(first.strip())
                if statement.strip() == "}":
                    yield "}"
                    statement = ""

    def _statement(self, text: str) -> Iterator[str]:
        if text.startswith(".reg"):
            declared = re.fullmatch(r"\.reg \.(\w+)\s+%?(\w+)(?:<(\d+)>)?", text)
            assert declared, text
            self.types[declared[2]] = declared[1]
            yield f"{TYPES[declared[1]]} {declared[2]}" + (f"[{declared[3]}];" if declared[3] else ";")
        elif text.startswith(".param"):
            ((type_, name, count),) = PARAMETER.findall(text)
            yield f"alignas(16) char {name}[{count or f'sizeof({TYPES[type_]})'}];"
        elif not text.startswith((".pragma", ".shared")) and text:
            guard = re.match(r"@(!?)%p(\d+)\s+", text)
            if guard:
                yield f"if ({guard[1]}p[{guard[2]}])"
                text = text[guard.end() :]
            opcode, _, rest = text.partition(" ") if " " in text else text.partition("\t")
            opcode, _, tabbed = opcode.partition("\t")
            yield "{ " + self._instruction(opcode.split("."), _operands(tabbed + " " + rest)) + " }"

    def _value(self, operand: str, type_: str) -> str:
        """A C++ expression for the value of an operand, with this type."""
        wanted = TYPES[type_]
        if REGISTER.match(operand):
            value, is_float = self._register(operand)
            if is_float != (type_ in ("f32", "f64")) and type_ != "pred":
                return f"ptx_bits<{wanted}>({value})"
            return f"({wanted}){value}"
        if match := re.match(r"%(\w+)\.([xyz])$", operand):
            return f"{SPECIAL[match[1]]}.{match[2]}"
        if operand == "%laneid":
            return "(uint32_t)(cudasim::cur % 32)"
        if match := re.match(r"0f([0-9A-F]{8})$", operand):
            return f"ptx_bits<{wanted}>(0x{match[1]}u)"
        if operand in self.addresses:
            return f"({wanted}){self.addresses[operand]}"
        if re.match(r"-?\d", operand):
            return f"({wanted}){operand}" + ("ll" if "64" in wanted else "")
        return f"({wanted}){operand}"  # the address of a parameter

    def _register(self, operand: str) -> tuple[str, bool]:
        """The C++ name of a register, and whether it contains a float."""
        match = REGISTER.match(operand)
        assert match, operand
        return match[1] + (f"[{match[2]}]" if match[2] else ""), self.types[match[1]] in ("f32", "f64")

    def _assign(self, target: str, value: str, type_: str) -> str:
        register, is_float = self._register(target)
        if is_float != (type_ in ("f32", "f64")):
            value = f"ptx_bits<std::remove_reference_t<decltype({register})>>(({TYPES[type_]})({value}))"
        return f"{register} = {value};"

    def _pointer(self, operand: str, space: str, size: int) -> str:
        base, _, offset = operand.strip("[]").partition("+")
        at = f"{self._value(base, 'u64')} + {int(offset or 0)}"
        if space == "param":
            return f"((char*)({at}))"
        return f"ptx_{space}({at}, {size})"

    def _instruction(self, op: list[str], a: list[str]) -> str:
        root, type_ = op[0], op[-1]
        write = self._assign
        if root in ("ld", "st"):
            return self._access(op, a)
        if root == "mov" and "{" in a[0] + a[1]:  # between a value and its halves or quarters, lowest first
            parts = _members(a[0] if "{" in a[0] else a[1])
            part = f"b{int(type_[1:]) // len(parts)}"
            both = f"{TYPES[type_]} x; {TYPES[part]} n[{len(parts)}]; "
            if "{" in a[0]:
                pieces = "".join(write(each, f"n[{i}]", part) for i, each in enumerate(parts) if each != "_")
                return both + f"x = {self._value(a[1], type_)}; memcpy(n, &x, sizeof x); {pieces}"
            pieces = "".join(f"n[{i}] = {self._value(each, part)}; " for i, each in enumerate(parts))
            return both + f"{pieces} memcpy(&x, n, sizeof x); {write(a[0], 'x', type_)}"
        if root == "mov":
            return write(a[0], self._value(a[1], type_), type_)
        if root == "setp":
            x, y = (self._value(each, type_) for each in a[1:3])
            order = op[1]
            if order in ("num", "nan"):
                test = f"{'!' if order == 'num' else ''}(isnan({x}) || isnan({y}))"
            elif type_.startswith("f") and order.endswith("u"):
                test = f"isnan({x}) || isnan({y}) || {x} {COMPARE[order[:-1]]} {y}"
            elif type_.startswith("f") and order == "ne":
                test = f"!isnan({x}) && !isnan({y}) && {x} != {y}"
            else:
                test = f"{x} {COMPARE[order]} {y}"
            if len(a) == 4:
                test = f"({test}) {INFIX[op[2]]} {self._value(a[3], 'pred')}"
            return write(a[0], test, "pred")
        if root == "selp":
            return write(
                a[0], f"{self._value(a[3], 'pred')} ? {self._value(a[1], type_)} : {self._value(a[2], type_)}", type_
            )
        if root == "cvt":
            return self._convert(op, a)
        if root == "cvta":
            value = self._value(a[1], "u64")
            if "shared" in op:
                value = (
                    f"{value} - (uint64_t)cudasim::dyn_smem()"
                    if "to" in op
                    else f"(uint64_t)cudasim::dyn_smem() + {value}"
                )
            return write(a[0], value, "u64")
        if type_ in ("f32", "f64") and root in FUNCTIONS:
            return write(a[0], f"{FUNCTIONS[root]}({', '.join(self._value(each, type_) for each in a[1:])})", type_)
        if root in ("mul", "mad") and "wide" in op:
            wide = type_[0] + str(2 * int(type_[1:]))
            value = f"({TYPES[wide]}){self._value(a[1], type_)} * ({TYPES[wide]}){self._value(a[2], type_)}"
            return write(a[0], value + (f" + {self._value(a[3], wide)}" if root == "mad" else ""), wide)
        if root == "mul" and "hi" in op:
            wide = "__int128" if type_ == "s64" else "unsigned __int128" if "64" in type_ else TYPES[type_[0] + "64"]
            value = f"(({wide}){self._value(a[1], type_)} * ({wide}){self._value(a[2], type_)}) >> {type_[1:]}"
            return write(a[0], f"({TYPES[type_]})({value})", type_)
        if root in INFIX or root == "mad":
            counted = type_.replace("s", "u") if root in ("add", "sub", "mul", "mad") else type_  # to wrap around
            values = [self._value(each, counted) for each in a[1:]]
            if root == "mad":
                return write(a[0], f"{values[0]} * {values[1]} + {values[2]}", counted)
            return write(a[0], f"{values[0]} {INFIX[root]} {values[1]}", counted)
        if root in ("min", "max"):
            return write(a[0], f"std::{root}({self._value(a[1], type_)}, {self._value(a[2], type_)})", type_)
        if root in ("neg", "not", "abs"):
            sign = "!" if type_ == "pred" else {"neg": "-", "not": "~", "abs": "std::abs"}[root]
            return write(a[0], f"{sign}({self._value(a[1], type_)})", type_)
        if root in ("shl", "shr"):
            bits = int(type_[1:])
            amount = self._value(a[2], "u32")
            shifted = f"{self._value(a[1], type_)} {'<<' if root == 'shl' else '>>'}"
            if root == "shr" and type_[0] == "s":
                return write(a[0], f"{shifted} std::min({amount}, {bits - 1}u)", type_)
            return write(a[0], f"{amount} < {bits} ? {shifted} {amount} : 0", type_)
        if root == "bfi":
            x, y = (self._value(each, type_) for each in a[1:3])
            first, count = a[3], a[4]
            mask = f"(((({TYPES[type_]})1 << {count}) - 1) << {first})"
            return write(a[0], f"({y} & ~{mask}) | (({x} << {first}) & {mask})", type_)
        if root == "shfl":
            value, lane, clamp, mask = (self._value(each, "u32") for each in a[1:])
            target, _, found = a[0].partition("|")
            segment = f"int segment = {clamp} >> 8 & 31, lane = cudasim::cur % 32; bool in_range; "
            most = f"(lane & segment) | ({clamp} & 31 & ~segment)"
            start = {
                "bfly": f"lane ^ {lane}",
                "idx": f"(lane & segment) | ({lane} & ~segment)",
                "down": f"lane + {lane}",
            }[op[2]]
            after = write(found, "in_range", "pred") if found else ""
            return segment + write(target, f"ptx_shfl({value}, {mask}, {start}, {most}, in_range)", "b32") + after
        if root == "mma":
            d, x, y, c = (_members(each) for each in a)
            sums = ", ".join(self._value(each, "f32") for each in c)
            first = ", ".join(self._value(each, "b32") for each in x)
            second = ", ".join(self._value(each, "b32") for each in y)
            after = "".join(write(each, f"d[{i}]", "f32") for i, each in enumerate(d))
            return f"float d[4] = {{{sums}}}; unsigned x[4] = {{{first}}}; mma_bf16_16816(d, x, {second}); {after}"
        if root == "ldmatrix":
            call = f"ldmatrix_x4{'_trans' if 'trans' in op else ''}(m, {self._pointer(a[1], 'shared', 16)});"
            return f"unsigned m[4]; {call} " + "".join(
                write(each, f"m[{i}]", "b32") for i, each in enumerate(_members(a[0]))
            )
        if op[:2] == ["cp", "async"]:
            if "commit_group" in op:
                return "cp_async_commit();"
            if "wait_group" in op:
                return f"cp_async_wait<{a[0]}>();"
            read = self._value(a[3], "u32") if len(a) > 3 else "16"
            source = self._value(a[1].strip("[]"), "u64")
            return f"cp_async16({self._pointer(a[0], 'shared', 16)}, (const void*)({source}), {read});"
        if root == "mapa":
            mapped = f"in_block<{self.cluster}>((char*){self._value(a[1], 'u64')}, {self._value(a[2], 'u32')})"
            return write(a[0], f"(uint64_t){mapped}", "u64")
        if op[:2] == ["barrier", "cluster"]:
            return f"cluster_barrier<{self.cluster}>();" if "wait" in op else ""
        if root == "bar":
            return f"__syncwarp({self._value(a[0], 'u32')});" if "warp" in op else "__syncthreads();"
        if root == "bra":
            return f"goto {a[0].replace('$', '')};"
        if root == "call":
            return f"{a[0]}({', '.join(_members(a[1].replace('(', '{').replace(')', '}')))});"
        simple = {"ret": "return;", "trap": "__trap();", "prefetch": "", "membar": "", "fence": ""}
        if root in simple:
            return simple[root]
        raise NotImplementedError(f"PTX instruction not supported: {'.'.join(op)} {', '.join(a)}")

    def _access(self, op: list[str], a: list[str]) -> str:
        space = next((part for part in op if part in ("global", "shared", "param")), "generic")
        type_, count = op[-1], next((int(part[1:]) for part in op if re.fullmatch(r"v[24]", part)), 1)
        one = TYPES[type_]
        size = count * int(type_[1:]) // 8
        target, memory = (a[0], a[1]) if op[0] == "ld" else (a[1], a[0])
        members = _members(target) if count > 1 else [target]
        pointer = f"char* at = {self._pointer(memory, space, size)}; {one} n[{count}]; "
        if op[0] == "st":
            values = "".join(f"n[{i}] = {self._value(each, type_)}; " for i, each in enumerate(members))
            return f"{pointer}{values}memcpy(at, n, sizeof n);"
        read = "".join(self._loaded(each, f"n[{i}]", type_) for i, each in enumerate(members))
        wait = " if (++polls % 64 == 0) backoff();" if "volatile" in op or "relaxed" in op else ""  # it may be polling
        return f"{pointer}memcpy(n, at, sizeof n); {read}{wait}"

    def _loaded(self, target: str, value: str, type_: str) -> str:
        """Assign a loaded value. A wider register gets its sign or zero extension."""
        register, is_float = self._register(target)
        return self._assign(target, value, type_) if type_[0] == "f" or is_float else f"{register} = {value};"

    def _convert(self, op: list[str], a: list[str]) -> str:
        to, of = op[-2:]
        if to == "bf16x2":
            high, low = (self._value(each, "f32") for each in a[1:])
            return self._assign(a[0], f"bf16_pair({low}, {high})", "b32")
        if to == "bf16":
            return self._assign(a[0], f"__float2bfloat16_rn({self._value(a[1], 'f32')}).u", "b16")
        if of == "bf16":
            return self._assign(a[0], f"ptx_bits<float>({self._value(a[1], 'b16')} << 16)", "f32")
        value = self._value(a[1], of)
        if of[0] == "f" and to[0] != "f":
            value = {"rzi": "truncf", "rmi": "floorf", "rpi": "ceilf", "rni": "rintf"}[op[1]] + f"({value})"
        return f"{self._register(a[0])[0]} = ({TYPES[to]})({value});"


def _operands(text: str) -> list[str]:
    """Split at commas that are not inside braces or parentheses."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\([^)]*\)|\[[^\]]*\]|[^,{\[(])+", text) if part.strip()]


def _members(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",") if part.strip()]


class RawModule(cudasim.RawModule):
    """Like cudasim.RawModule, but runs the PTX."""

    def __init__(self, code: str, options: tuple[str, ...] = (), enable_cooperative_groups: bool = False):
        cudasim.need_compiler()
        defines = dict(option.removeprefix("-D").split("=", 1) for option in options if option.startswith("-D"))
        cpp, self._static = translate(nvrtc.ptx(code, ARCHITECTURE, defines))
        self.library = cudasim.compiled(cpp, ["-O1", "-DCUDASIM_STACK=512"])

    def get_function(self, name: str) -> Function:
        return Function(self.library, name, self._static)


class Function(cudasim.Function):
    """A kernel. PTX does not specify which parameters are pointers or signed."""

    def cell(self, i, value, kind):
        value = cudasim.array_of(value)
        if kind == "u8" and (value is None or isinstance(value, np.ndarray)):
            return super().cell(i, value, "p")
        if isinstance(value, np.generic) and kind[0] in "ui" and value.dtype.kind in "iu":
            kind = value.dtype.kind + kind[1:]
        return super().cell(i, value, kind)
