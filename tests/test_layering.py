"""Who may import whom: never sideways, never up, no foreign array library outside its room."""

import ast
from pathlib import Path

import pytest

import tinygrad2

ROOT = Path(__file__).parent.parent

# The engine, bottom up: a module imports only from rows above its own.
ROWS = (
    ("array",),
    ("random", "autograd", "checkpoint", "threads", "memory"),
    ("blas",),
    ("reference",),
    ("kernels",),
    ("backend",),
    ("tensor", "distributed", "profiler"),
    ("ops", "params"),
    ("nn",),
    ("optim", "gradcheck"),
    ("__init__",),
)
RANK = {f"tinygrad2.{name}": rank for rank, row in enumerate(ROWS) for name in row}
# For gpt2 and the scripts, besides the names that the package itself gives.
PUBLIC_MODULES = {
    "array",
    "backend",
    "checkpoint",
    "distributed",
    "gradcheck",
    "nn",
    "ops",
    "optim",
    "profiler",
    "random",
    "threads",
}
ROOMS = {"cupy": ("tinygrad2.backend", "tinygrad2.kernels"), "mpi4py": ("tinygrad2.distributed",)}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def sources():
    """The source of every module, by its dotted name."""
    paths = [path for folder in ("tinygrad2", "gpt2", "data") for path in (ROOT / folder).rglob("*.py")]
    return {module_of(path): path.read_text(encoding="utf-8") for path in (*paths, *ROOT.glob("*.py"))}


def type_checking_only(tree):
    """The nodes under `if TYPE_CHECKING:`, which never run."""
    return {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }


def imports(source):
    """(module, name) of everything that the source imports, wherever it stands; name is None for `import module`."""
    tree = ast.parse(source)
    skipped = type_checking_only(tree)
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def target_of(module, name, modules):
    """The module that an import reaches: `from package import module` reaches the module, not the package."""
    for candidate in (f"{module}.{name}", module):
        if candidate in modules:
            return candidate
    return f"{module}.__init__" if f"{module}.__init__" in modules else module


def rank_of(module):
    """The row of a module of the engine; what lies in a folder has the folder's."""
    return next((rank for name, rank in RANK.items() if module == name or module.startswith(f"{name}.")), None)


def violations(modules):
    """A line for every forbidden import in `modules`, a source by dotted name."""
    bad = []
    edges = {}
    for module, source in modules.items():
        package = module.split(".")[0]
        for imported, name in imports(source):
            said = f"{module} imports {imported}{'' if name is None else f'.{name}'}"
            target = target_of(imported, name, modules)
            top = imported.split(".")[0]
            if top in ROOMS and not module.startswith(ROOMS[top]):
                bad.append(f"{said}: only {' and '.join(ROOMS[top])} may")
            if package == "tinygrad2" and top in ("gpt2", "data", "train", "sample", "tests"):
                bad.append(f"{said}: the engine knows no model")
            elif package == "gpt2" and top in ("data", "train", "sample", "tests"):
                bad.append(f"{said}: that is above it")
            elif top in ("train", "sample", "tests"):
                bad.append(f"{said}: a script is not imported")
            if package == "tinygrad2" and top == "tinygrad2":
                lower, upper = rank_of(target), rank_of(module)
                if lower is None or upper is None:
                    bad.append(f"{said}: a module without a row in ROWS")
                elif lower >= upper and not (lower == upper == RANK["tinygrad2.kernels"]):
                    bad.append(f"{said}: not a lower row")
            elif top == "tinygrad2" and not is_public(target, name):
                bad.append(f"{said}: not public")
            if name is not None and name.startswith("_") and top in ("tinygrad2", "gpt2", "data"):
                bad.append(f"{said}: a private name")
            if package == top != "tinygrad2":
                edges.setdefault(module, set()).add(target)
    return bad + [f"{' -> '.join(cycle)}: a cycle" for cycle in cycles(edges)]


def is_public(target, name):
    if target == "tinygrad2.__init__":
        return name is None or name in tinygrad2.__all__
    return target.split(".")[1] in PUBLIC_MODULES


def cycles(edges):
    """A path for every module that reaches itself."""
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


def found_by_planting(module, line):
    """The violations that one more line in a module brings."""
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
        ("tinygrad2.reference", "from tinygrad2 import backend", "not a lower row"),
        ("tinygrad2.reference", "import tinygrad2.tensor", "not a lower row"),
        ("tinygrad2.ops", "from tinygrad2.nn import Linear", "not a lower row"),
        ("tinygrad2.ops", "def f():\n    from tinygrad2 import params", "not a lower row"),
        ("tinygrad2.tensor", "from tinygrad2 import no_grad", "not a lower row"),
        ("tinygrad2.autograd", "from tinygrad2.random import Key", "not a lower row"),
        ("tinygrad2.nn", "from gpt2.config import GPT2Config", "the engine knows no model"),
        ("tinygrad2.utils", "from tinygrad2.random import Key", "a module without a row"),
        ("tinygrad2.kernels.cpu", "from tinygrad2 import backend", "not a lower row"),
        ("tinygrad2.tensor", "import cupy", "only tinygrad2.backend and tinygrad2.kernels may"),
        ("gpt2.model", "import cupy as cp", "only tinygrad2.backend and tinygrad2.kernels may"),
        ("gpt2.model", "from mpi4py import MPI", "only tinygrad2.distributed may"),
        ("gpt2.model", "from tinygrad2 import reference", "not public"),
        ("gpt2.model", "from tinygrad2.kernels import cpu", "not public"),
        ("gpt2.model", "import tinygrad2.autograd", "not public"),
        ("gpt2.model", "from tinygrad2 import Node", "not public"),
        ("gpt2.model", "from tinygrad2.backend import _secret", "a private name"),
        ("gpt2.model", "from data.prepare import prepare", "that is above it"),
        ("gpt2.config", "from gpt2.model import GPT2", "a cycle"),
        ("train", "from tinygrad2.tensor import record", "not public"),
        ("data.prepare", "import train", "a script is not imported"),
    ],
)
def test_a_planted_import_is_found(module, line, reason):
    found = found_by_planting(module, line)
    assert found
    assert all(reason in violation for violation in found)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tinygrad2.backend", "import cupy"),
        ("tinygrad2.backend", "from tinygrad2.kernels import cpu"),
        ("tinygrad2.kernels.cuda", "import cupy\nfrom tinygrad2 import reference"),
        ("tinygrad2.distributed", "def world():\n    from mpi4py import MPI"),
        ("gpt2.config", "if TYPE_CHECKING:\n    from gpt2.model import GPT2"),
        ("gpt2.model", "from tinygrad2 import nn, record"),
    ],
)
def test_an_allowed_import_is_not(module, line):
    assert found_by_planting(module, line) == []


def test_what_may_be_missing_is_imported_where_it_is_used():
    for module, source in sources().items():
        top = [statement for statement in ast.parse(source).body if isinstance(statement, ast.Import | ast.ImportFrom)]
        names = {imported.split(".")[0] for statement in top for imported, _ in imports(ast.unparse(statement))}
        optional = {"cupy", "huggingface_hub", "mpi4py", "pyarrow", "tensorboardX", "torch", "transformers"}
        assert module.startswith("tinygrad2.kernels.") or not names & optional, module
