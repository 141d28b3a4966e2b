"""README.md: its code runs, and the code it quotes is the code there is."""

import inspect
import re
from pathlib import Path

from tinygrad2 import reference

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


def test_the_quoted_backward_pass_is_the_code():
    (quoted,) = (block for block in BLOCKS if block.startswith("def layernorm_backward"))
    source = inspect.getsource(reference.layernorm_backward)
    assert quoted == re.sub(r'    """.*?"""\n', "", source, flags=re.DOTALL)


def test_the_examples_run(capsys):
    examples = [block for block in BLOCKS if "squared_relu" in block or "class MLP" in block]
    assert len(examples) == 2
    names = {}
    for block in examples:
        exec(block, names)
    errors, loss = capsys.readouterr().out.splitlines()
    assert float(errors.strip("[]")) < 1e-9
    assert float(loss) < 0.3
