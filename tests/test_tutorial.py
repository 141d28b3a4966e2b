"""docs/tutorial/: the Python blocks of all pages form one program, which prints the output that the pages show.

`python -m tests.test_tutorial 4` prints the program formed by pages 1 to 4.
"""

import __future__

import ast
import importlib.util
import io
import math
import re
import sys
import types
from contextlib import redirect_stdout
from dataclasses import dataclass

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from examples import gpt2_in_one_file as one_file
from gpt2 import GPT2
from tests.documents import ROOT, TUTORIAL, blocks
from tests.test_documents import statements

EXAMPLE = ROOT / "examples" / "gpt2_in_one_file.py"
FOLDER = ROOT / "docs" / "tutorial"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?")
SPEED = re.compile(r"[\d,]+ tokens/s")


def program(pages=None):
    """The Python blocks of the first pages, or of all pages."""
    return [block for page in TUTORIAL[:pages] for block in blocks(page) if block.language == "python"]


def checks():
    """The blocks that are not part of examples/gpt2_in_one_file.py: checks and their helpers."""
    return [block for block in program() if "quotes" not in block.options]


def difference(printed, expected):
    """A description of the first difference between the printed and the expected output, or None.

    Numbers with a decimal point may differ by 2 %, because rounding errors grow during training. Numbers below 1e-8 are
    rounding errors and may have any value. Speeds are not compared.
    """
    printed, expected = SPEED.sub("tokens/s", printed), SPEED.sub("tokens/s", expected)
    if [text.split() for text in NUMBER.split(printed)] != [text.split() for text in NUMBER.split(expected)]:
        return f"printed {printed!r}; the page says {expected!r}"
    for found, shown in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
        a, b = (float(number.replace(",", "")) for number in (found, shown))
        exact = not {".", "e"} & {*found, *shown}
        if a != b and (exact or max(abs(a), abs(b)) > 1e-8) and (exact or not math.isclose(a, b, rel_tol=0.02)):
            return f"printed {found}; the page says {shown}, in {expected!r}"
    return None


@dataclass
class Run:
    module: types.ModuleType
    printed: dict[str, str]  # by the name of the block


@pytest.fixture(scope="module")
def run():
    """The program, executed block by block as if it were a file in examples/."""
    module = types.ModuleType("tutorial")
    module.__file__ = str(EXAMPLE.with_name("mine.py"))
    sys.modules["tutorial"] = module  # where dataclasses look up the module
    printed = {}
    try:
        with threadpool_limits(1):
            for block in program():
                code = "\n" * block.line + block.code
                flags = __future__.annotations.compiler_flag
                with redirect_stdout(io.StringIO()) as output:
                    exec(compile(code, block.page, "exec", flags, dont_inherit=True), vars(module))
                printed[block.name] = output.getvalue()
        yield Run(module, printed)
    finally:
        del sys.modules["tutorial"]


def with_outputs(page):
    """Each Python block of a page, with the text block that shows its output, or None."""
    found = blocks(page)
    for block, following in zip(found, [*found[1:], None], strict=True):
        if block.language == "python":
            yield block, following if following and following.language == "text" else None


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIAL, ids=lambda page: page.stem)
def test_the_program_prints_the_output_shown_on_the_page(page, run):
    for block, output in with_outputs(page):
        printed = run.printed[block.name]
        if output is None:
            assert printed == "", f"{block.name}: prints {printed!r}, which the page does not show"
        elif "varies" in output.options:
            assert len(printed.splitlines()) == len(output.code.splitlines()), block.name
        else:
            assert difference(printed, output.code) is None, f"{block.name}: {difference(printed, output.code)}"


def test_wrong_output_is_detected():
    text = "gelu: largest difference 3.6e-11\nstep 10  loss 3.455  710 tokens/s\n[0.  0.5]"
    assert difference(text, text) is None
    for old, new in (("3.6e-11", "9.9e-09"), ("3.455", "3.456"), ("710", "1,710"), ("0.  0.5", "0.0 0.500")):
        assert difference(text.replace(old, new), text) is None
    for old, new in (
        ("3.6e-11", "1.1e-05"),
        ("3.455", "3.555"),
        ("10 ", "11 "),
        ("gelu", "relu"),
        (" 0.5", ""),
        ("0.5", "-0.5"),
    ):
        assert difference(text.replace(old, new), text) is not None, new


def test_each_page_ends_with_a_check_and_exercises():
    text = {page.name: page.read_text(encoding="utf-8") for page in TUTORIAL}
    numbers = [int(number) for page in text.values() for number in re.findall(r"^\*\*Exercise (\d+)\.", page, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 10
    for i, (name, page) in enumerate(text.items(), 1):
        assert name.startswith(f"{i:02}_")
        assert page.startswith(f"# {i}. ")
        assert page.count("<details><summary>Answer</summary>") == page.count("**Exercise ") > 0, name
        assert "## The check\n" in page or page == [*text.values()][-1], name


# Comparison with examples/gpt2_in_one_file.py


def test_the_quoted_blocks_form_the_complete_example():
    quoted = [s for block in program() if "quotes" in block.options for s in statements(block.code)]
    assert all(block.options.get("quotes", EXAMPLE.name).endswith(EXAMPLE.name) for block in program())
    assert sorted(quoted) == sorted(statements(EXAMPLE.read_text(encoding="utf-8")))


def names_of(code):
    """The names that a piece of code defines at module level, except imports."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.For | ast.With):
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))


def test_the_checks_do_not_redefine_names_of_the_example():
    parts = set(names_of(EXAMPLE.read_text(encoding="utf-8")))
    assert "Tensor" in parts
    for block in checks():
        assert not parts & set(names_of(block.code)), block.name


@pytest.mark.slow
def test_the_program_the_example_and_the_engine_compute_the_same(run):
    mine, engine = run.module, GPT2.from_pretrained(ROOT / "checkpoint", dtype="float64")
    config = {name: getattr(engine.config, name) for name in one_file.Config.__dataclass_fields__}
    values = {name: p.numpy() for name, p in engine.named_parameters()}
    ids, targets = np.random.default_rng(0).integers(256, size=(2, 2, 30))
    results = []
    for module in (mine, one_file):
        with threadpool_limits(1):
            model = module.GPT2(module.Config(**config), {name: value.copy() for name, value in values.items()})
            logits, loss = model.logits(ids).data, model.loss(ids, targets)
            loss.backward()
        results.append((logits, loss.data, {name: p.grad for name, p in model.parameters.items()}))
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(results[0][0], engine(ids).numpy(), rtol=0, atol=1e-11)
    expected = engine.loss(ids, targets)
    expected.backward()
    assert float(results[0][1]) == pytest.approx(expected.item(), rel=1e-12)
    largest = max(np.abs(p.grad).max() for p in engine.parameters())
    for name, p in engine.named_parameters():
        np.testing.assert_array_equal(results[0][2][name], results[1][2][name], err_msg=name)
        assert np.abs(results[0][2][name] - p.grad).max() < 1e-12 * largest, name


# Pictures


def picture_names():
    tree = ast.parse((FOLDER / "pictures.py").read_text(encoding="utf-8"))
    (table,) = (n for n in tree.body if isinstance(n, ast.AnnAssign) and n.target.id == "PICTURES")
    return [name.id for name in table.value.generators[0].iter.elts]


def test_every_picture_is_shown_once_with_a_description():
    shown = []
    for page in TUTORIAL:
        for description, file in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text(encoding="utf-8")):
            assert len(description) > 40, file
            shown.append(file)
    assert sorted(shown) == sorted(file.name for file in FOLDER.glob("*.svg"))
    assert sorted(shown) == sorted(f"{name}.svg" for name in picture_names())


@pytest.mark.slow
@pytest.mark.extras("matplotlib")
@pytest.mark.parametrize("name", picture_names())
def test_the_script_draws_the_picture(name, tmp_path):
    spec = importlib.util.spec_from_file_location("tutorial_pictures", FOLDER / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.OUT = tmp_path
    with pictures.plt.rc_context(pictures.RC):
        pictures.PICTURES[name](name)
    drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
    kept = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert pictures.drawing.STYLE in drawn
    assert "#ffffff" not in drawn.replace(pictures.drawing.STYLE, "")  # the background color is a CSS variable
    texts = [re.findall(r">([^<>\n]+)</text>", svg) for svg in (drawn, kept)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("pages", [1, len(TUTORIAL)])
def test_main_prints_the_program_as_one_file(pages, capsys):
    main(pages)
    printed = ast.parse(capsys.readouterr().out)
    compile(printed, "mine.py", "exec")
    assert len(printed.body) == sum(len(ast.parse(block.code).body) for block in program(pages))


def main(pages):
    print("\n\n".join(block.code.rstrip("\n") for block in program(int(pages))))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else len(TUTORIAL))
