"""The --help output of every command: groups, defaults and width; and the uniform format of errors."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r'^if __name__ == "__main__":\n +(?:try:\n +)?(sys\.exit|raise SystemExit)', re.MULTILINE)
FILES = [
    file
    for pattern in ("*.py", "data/*.py", "gpt2/**/*.py", "tinygrad2/**/*.py")
    for file in sorted(ROOT.glob(pattern))
    if COMMAND.search(file.read_text())
]
COMMANDS = [file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in FILES]


def module_of(command):
    return importlib.import_module(command)


def parser_of(command):
    if command == "train":
        return importlib.import_module("gpt2.training.options").command_line(module_of(command).__doc__)
    return module_of(command).command_line()


def test_all_commands_are_found():
    assert {"train", "sample", "data.prepare", "gpt2.verify", "gpt2.doctor", "tinygrad2.gradcheck"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_group_a_description_and_a_default(command):
    parser = parser_of(command)
    text = parser.format_help()
    titled = {
        id(action): group.title
        for group in parser._action_groups
        if group not in (parser._positionals, parser._optionals)
        for action in group._group_actions
    }
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = action.option_strings[0] if action.option_strings else action.metavar
        assert titled.get(id(action)), f"{name} is not in a titled group"
        shown = formatter._expand_help(action)
        assert re.fullmatch(r".{10,}( \[default: [^\[\]]+\]| \[required\])", shown, re.DOTALL), f"{name}: {shown}"
        assert "None" not in shown
        assert "_" not in name
        if action.option_strings:
            assert len(re.findall(rf"^  (?:-\w, )?(?:--[\w-]+, )*{name}\b(?!-)", text, re.MULTILINE)) == 1, name


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("tinygrad2")])
@pytest.mark.parametrize("columns", [72, 80, 300])
def test_help_fits_the_terminal_and_is_never_wider_than_100_columns(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = parser_of(command).format_help().splitlines()
    assert max(map(len, lines)) <= min(columns, 100)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "tinygrad2.gradcheck"])
def test_an_unknown_option_gives_a_one_line_error_with_the_usual_prefix(command, capsys):
    with pytest.raises(SystemExit) as end:
        parser_of(command).parse_args(["--colour=red\x1b[31m"])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    name = command if command.startswith("gpt2.") else command.replace(".", "/") + ".py"
    assert line.startswith(f"{name}: error: ")
    assert "--help lists the options" in line


def test_an_error_escapes_control_characters(capsys):
    with pytest.raises(SystemExit):
        parser_of("sample").parse_args(["--colour=red\x1b[31m"])
    assert "unknown option --colour=red\\x1b[31m" in capsys.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("gpt2.", "data", "sample", "train"))])
def test_commands_print_with_functions_that_escape_control_characters(command):
    """print() would send text from a model, a name or a file to the terminal without escaping it."""
    text = Path(module_of(command).__file__).read_text()
    bare = [line for line in text.splitlines() if re.match(r"\s*print\(", line)]
    assert [line for line in bare if "--- sample" not in line] == []
