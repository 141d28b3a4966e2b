"""Import rules: a module imports only from lower layers, including imports for type checking."""

import ast
import functools
import re
from pathlib import Path

import pytest

import tinygrad2

ROOT = Path(__file__).parent.parent

# The layers of each package, lowest first. A module imports only from lower layers. The name of a subpackage
# stands for all modules in it, which may import each other without cycles.
ENGINE = (
    ("missing_names",),
    ("array", "files", "forks", "gpus", "machine", "precision", "tracer"),
    ("random", "autograd", "checkpoint", "threads", "memory"),
    ("blas",),
    ("reference",),
    ("kernels",),
    ("backend",),
    ("arguments", "distributed", "initializers", "profiler"),
    ("protocols",),
    ("methods",),
    ("comparisons", "names"),
    ("tensor",),
    ("checks", "recipes"),
    ("gradient_checkpointing", "ops", "params"),
    ("functional", "state"),
    ("numpy_functions",),
    ("nn",),
    ("optim", "gradient_sum", "gradcheck", "diagnose", "not_finite"),
    ("__init__",),
)
MODEL = (
    ("interrupts",),
    ("config", "console", "familiar_options", "page", "pickles"),
    ("device_options", "file_kinds", "memory_model"),
    ("cost_model",),
    ("huggingface_tokenizer",),
    ("tokenizer",),
    ("language_model",),
    ("cpu_decode", "decode", "trace"),
    ("generate",),
    ("completions", "formats"),
    ("model",),
    ("training",),
    ("cpu_rates", "inspection", "parity", "web"),
    # commands: python -m gpt2.NAME
    ("convert", "doctor", "evaluate", "inspect", "plan", "replay", "report", "serve", "verify"),
    ("__init__",),
)
RANK = {
    f"{package}.{name}": rank
    for package, rows in (("tinygrad2", ENGINE), ("gpt2", MODEL))
    for rank, row in enumerate(rows)
    for name in row
}
SUBPACKAGES = ("tinygrad2.kernels", "tinygrad2.optim", "gpt2.formats", "gpt2.training")
# The level of each package: the engine does not import the model, and the model does not import the scripts.
PACKAGES = {"tinygrad2": 0, "gpt2": 1, "data": 2, "train": 3, "sample": 3, "examples": 3, "tests": 4}
# The engine's modules that gpt2 and the scripts may import, in addition to the names that the package exports.
PUBLIC_MODULES = {
    "array",
    "backend",
    "blas",
    "checkpoint",
    "distributed",
    "files",
    "functional",
    "gpus",
    "gradcheck",
    "gradient_sum",
    "machine",
    "nn",
    "not_finite",
    "ops",
    "optim",
    "precision",
    "profiler",
    "random",
    "threads",
    "tracer",
}
ONLY_IN = {
    "cupy": ("tinygrad2.backend", "tinygrad2.kernels"),
    "mpi4py": ("tinygrad2.distributed",),
    "starlette": ("gpt2.web", "tests"),
    "uvicorn": ("gpt2.web", "tests"),
}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def sources():
    """The source of every module, by its dotted name."""
    paths = [path for folder in ("tinygrad2", "gpt2", "data", "examples") for path in (ROOT / folder).rglob("*.py")]
    return {module_of(path): path.read_text(encoding="utf-8") for path in (*paths, *ROOT.glob("*.py"))}


@functools.cache  # most sources are the same in every test
def imports(source):
    """Return (module, name) for all imports anywhere in the source; name is None for `import module`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def target_of(module, name, modules):
    """The imported module: `from package import module` imports the module, not the package."""
    for candidate in (f"{module}.{name}", f"{module}.{name}.__init__", module):
        if candidate in modules:
            return candidate
    return f"{module}.__init__" if f"{module}.__init__" in modules else module


def rank_of(module):
    """The layer of a module or of its subpackage; None if it is not in any layer."""
    return next((rank for name, rank in RANK.items() if module == name or module.startswith(f"{name}.")), None)


def subpackage_of(module):
    """The module's subpackage, if it is in one of SUBPACKAGES; otherwise the module itself."""
    return next((name for name in SUBPACKAGES if module.startswith(f"{name}.")), module)


def violations(modules):
    """One line for every forbidden import in `modules`, a dictionary of sources by dotted name."""
    bad = []
    edges = {}
    for module, source in modules.items():
        package = module.split(".")[0]
        for imported, name in imports(source):
            top = imported.split(".")[0]
            target = target_of(imported, name, modules)
            reason = forbidden(module, package, top, target, name)
            if reason:
                bad.append(f"{module} imports {imported}{'' if name is None else f'.{name}'}: {reason}")
            if package == top:
                edges.setdefault(module, set()).add(target)
    return bad + [f"{' -> '.join(cycle)}: a cycle" for cycle in cycles(edges)]


def forbidden(module, package, top, target, name):
    """Why a module may not import a name from another module, or None if it may."""
    if top in ONLY_IN and not module.startswith(ONLY_IN[top]):
        return f"only {' and '.join(ONLY_IN[top])} may import it"
    if top not in PACKAGES:
        return None
    if name is not None and name.startswith("_"):
        return "a private name"
    if PACKAGES[top] > PACKAGES[package] or (top != package and PACKAGES[top] == PACKAGES[package]):
        return "a higher-level package"
    if package == top and package in ("tinygrad2", "gpt2"):
        lower, upper = rank_of(target), rank_of(module)
        if lower is None or upper is None:
            return "a module without a layer"
        if lower >= upper and subpackage_of(module) != subpackage_of(target):
            return "not a lower layer"
    if top == "tinygrad2" != package and not is_public(target, name):
        return "not public"
    return None


def is_public(target, name):
    if target == "tinygrad2.__init__":
        return name is None or name in tinygrad2.__all__
    return target.split(".")[1] in PUBLIC_MODULES


def cycles(edges):
    """One path for every module that imports itself indirectly."""
    for start in edges:
        stack = [(start, (start,))]
        seen = set()
        while stack:
            module, path = stack.pop()
            for target in edges.get(module, ()):
                if target == start:
                    yield (*path, target)
                elif target not in seen:
                    seen.add(target)
                    stack.append((target, (*path, target)))


def found_by_injection(module, line):
    """The violations after adding one line to a module."""
    modules = sources()
    before = violations(modules)
    modules[module] = f"{modules.get(module, '')}\n{line}\n"
    return [violation for violation in violations(modules) if violation not in before]


def test_no_forbidden_import():
    modules = sources()
    assert {"tinygrad2.reference", "tinygrad2.__init__", "gpt2.model", "train", "sample"} <= set(modules)
    assert violations(modules) == []


@pytest.mark.parametrize(
    ("module", "line", "reason"),
    [
        ("tinygrad2.reference", "from tinygrad2 import backend", "not a lower layer"),
        ("tinygrad2.reference", "import tinygrad2.tensor", "not a lower layer"),
        ("tinygrad2.ops", "from tinygrad2.nn import Linear", "not a lower layer"),
        ("tinygrad2.ops", "def f():\n    from tinygrad2 import params", "not a lower layer"),
        ("tinygrad2.tensor", "from tinygrad2 import no_grad", "not a lower layer"),
        ("tinygrad2.autograd", "from tinygrad2.random import Key", "not a lower layer"),
        ("tinygrad2.nn", "from gpt2.config import GPT2Config", "a higher-level package"),
        ("tinygrad2.utils", "from tinygrad2.random import Key", "a module without a layer"),
        ("tinygrad2.kernels.cpu", "from tinygrad2 import backend", "not a lower layer"),
        ("tinygrad2.tensor", "import cupy", "only tinygrad2.backend and tinygrad2.kernels may"),
        ("gpt2.model", "import cupy as cp", "only tinygrad2.backend and tinygrad2.kernels may"),
        ("gpt2.model", "from mpi4py import MPI", "only tinygrad2.distributed may"),
        ("gpt2.serve", "import uvicorn", "only gpt2.web and tests may"),
        ("gpt2.model", "from tinygrad2 import reference", "not public"),
        ("gpt2.model", "from tinygrad2.kernels import cpu", "not public"),
        ("gpt2.model", "import tinygrad2.autograd", "not public"),
        ("gpt2.model", "from tinygrad2 import Node", "not public"),
        ("gpt2.model", "from tinygrad2.backend import _secret", "a private name"),
        ("gpt2.model", "from data.prepare import prepare", "a higher-level package"),
        ("gpt2.config", "from gpt2.model import GPT2", "not a lower layer"),
        ("gpt2.config", "if TYPE_CHECKING:\n    from gpt2.model import GPT2", "not a lower layer"),
        ("gpt2.generate", "from gpt2.model import GPT2", "not a lower layer"),
        ("gpt2.formats.hub", "from gpt2.training.options import Options", "not a lower layer"),
        ("gpt2.formats.hub", "from gpt2.formats.model_file import open_model", "a cycle"),
        ("gpt2.training.run", "from gpt2 import report", "not a lower layer"),
        ("gpt2.report", "from gpt2 import doctor", "not a lower layer"),
        ("gpt2.helpers", "from gpt2.config import GPT2Config", "a module without a layer"),
        ("train", "from tinygrad2.tensor import record", "not public"),
        ("data.prepare", "import train", "a higher-level package"),
    ],
)
def test_an_injected_import_is_detected(module, line, reason):
    found = found_by_injection(module, line)
    assert reason in found[0]
    assert all(violation.endswith("a cycle") for violation in found[1:])


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tinygrad2.backend", "import cupy"),
        ("tinygrad2.backend", "from tinygrad2.kernels import cpu"),
        ("tinygrad2.kernels.cuda", "import cupy\nfrom tinygrad2 import reference"),
        ("tinygrad2.distributed", "def world():\n    from mpi4py import MPI"),
        ("gpt2.formats.model_file", "from gpt2.formats import llmc"),
        ("gpt2.model", "from tinygrad2 import nn, record"),
    ],
)
def test_an_allowed_import_is_accepted(module, line):
    assert found_by_injection(module, line) == []


def test_optional_packages_are_imported_where_they_are_used():
    for module, source in sources().items():
        top = [statement for statement in ast.parse(source).body if isinstance(statement, ast.Import | ast.ImportFrom)]
        names = {imported.split(".")[0] for statement in top for imported, _ in imports(ast.unparse(statement))}
        optional = {"cupy", "huggingface_hub", "mpi4py", "pyarrow", "tokenizers", "torch", "transformers"}
        optional |= {"starlette", "uvicorn"}
        # gpt2.web needs them at the top. It is itself imported only where it is used (tests/gpt2/test_serve.py).
        assert module.startswith(("tinygrad2.kernels.", "gpt2.web")) or not names & optional, module


# Modules that have no test file of the same name, and the files that test them (mypy checks the protocol in array.py).
TESTED_BY = {
    "data.parquet_pages": "data/test_hostile_sources.py",
    "gpt2.familiar_options": "test_wrong_inputs.py",
    "setup": "test_packages.py",
    "gpt2.formats.stored": "gpt2/formats/test_model_file.py",
    "tinygrad2.array": "",
    "tinygrad2.checks": "tinygrad2/test_ops.py",
    "tinygrad2.diagnose": "gpt2/test_doctor.py",
    "tinygrad2.gpus": "tinygrad2/test_backend.py",
    "tinygrad2.gradient_sum": "tinygrad2/test_distributed.py",
    "tinygrad2.kernels.gemm": "tinygrad2/kernels/test_cuda_gemm.py",
    "tinygrad2.optim.matrix_blocks": "tinygrad2/optim/test_muon.py",
    "tinygrad2.precision": "tinygrad2/test_params.py",
    "tinygrad2.state": "tinygrad2/test_nn.py",
}


def test_every_module_has_a_test_file_with_its_name():
    for module in sources():
        *folders, name = module.split(".")
        file = "/".join((*folders, f"test_{name}.py"))
        assert name == "__init__" or (ROOT / "tests" / TESTED_BY.get(module, file)).exists(), f"tests/{file} is missing"


def test_a_file_that_needs_an_extra_is_marked():
    """CI uses the marks `extras("package")` and `slow` to select the tests that the quick run skips."""
    extras = ("cupy", "huggingface_hub", "openai", "playwright", "pyarrow", "tokenizers", "torch", "transformers")
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        module_marks = [ast.unparse(node) for node in tree.body if "pytestmark" in ast.unparse(node)[:11]]
        for node in tree.body:
            text = ast.unparse(node)
            if re.search(rf"importorskip\('({'|'.join(extras)})", text):
                marks = " ".join([*module_marks, *map(ast.unparse, getattr(node, "decorator_list", []))])
                assert re.search("extras|slow|gpu", marks), f"{path}: {text.splitlines()[0]}"
