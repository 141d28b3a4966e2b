"""Tests for all scripts in examples/ that save a plot."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("spiral_mlp", "name_gru", "seq2seq_attention", "llama")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_matplotlib_prints_a_note_and_succeeds(name, run, prepared_text, tmp_path):
    printed = run(name, "--steps", 1, *(("--data", prepared_text) if name == "llama" else ()))
    assert printed.splitlines()[-1] == ('no plot: matplotlib is not installed; pip install -e ".[examples]"')
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
@pytest.mark.extras("matplotlib")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_saves_a_plot(name, run, prepared_text, tmp_path):
    data = ("--data", prepared_text) if name == "llama" else ()
    printed = run(name, "--steps", 6, "--picture", "made.png", *data, pictures=True)
    assert printed.splitlines()[-1] == "picture: made.png"
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_at_most_250_lines_long(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
