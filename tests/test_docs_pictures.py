"""The pictures in docs/, drawn by docs/pictures.py. (For those of the tutorial, see test_tutorial.py.)"""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
DRAWN = ("rooms", "op", "ranks")  # drawn without other files
MEASURED = ("speed", "curves-nano", "curves-gpt2")  # drawn from saved results, which may be newer


def test_every_picture_is_shown_once_with_a_description():
    shown = []
    for page in DOCS.glob("*.md"):
        for description, file in re.findall(r"!\[([^\]]*)\]\(([\w-]+\.svg)\)", page.read_text(encoding="utf-8")):
            assert len(description) > 40, file
            shown.append(file)
    assert sorted(shown) == sorted(file.name for file in DOCS.glob("*.svg"))
    assert sorted(shown) == sorted(f"{name}.svg" for name in DRAWN + MEASURED)


@pytest.mark.slow
@pytest.mark.extras("matplotlib")
@pytest.mark.parametrize("name", DRAWN + MEASURED)
def test_the_script_draws_the_picture(name, tmp_path):
    spec = importlib.util.spec_from_file_location("docs_pictures", DOCS / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.OUT = tmp_path
    assert set(pictures.PICTURES) == {*DRAWN, *MEASURED}
    with pictures.plt.rc_context(pictures.RC):
        pictures.PICTURES[name]()
    drawn = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
    assert pictures.drawing.STYLE in drawn
    assert "#ffffff" not in drawn.replace(pictures.drawing.STYLE, "")  # the background color is a CSS variable
    kept = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    texts = [re.findall(r">([^<>\n]+)</text>", svg) for svg in (drawn, kept)]
    assert len(texts[0]) > 5
    if name in DRAWN:
        assert texts[0] == texts[1]
