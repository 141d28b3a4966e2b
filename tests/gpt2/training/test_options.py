"""gpt2/training/options.py: flags, TOML files, recipes, and errors."""

from dataclasses import fields

import pytest

from gpt2 import GPT2Config
from gpt2.training.options import RECIPES, Options, flag, parse_options, resolve_options

NANO, SMALL = GPT2Config.preset("nano"), GPT2Config.preset("gpt2")


def given(*argv):
    return parse_options(argv, "")


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        given(*argv)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def example(f):
    texts = {
        "preset": "gpt2",
        "recipe": "paper",
        "dtype": "float64",
        "recompute": "block",
        "eval": "lambada",
        "lr_schedule": "wsd",
        "optimizer": "muon",
    }
    return {int: "3", float: "0.25", str: texts.get(f.name, "cpu")}[f.metadata["kind"]]


@pytest.mark.parametrize("f", [f for f in fields(Options) if f.type != "bool"], ids=lambda f: f.name)
def test_every_option_has_both_spellings_and_can_be_set_in_a_file(f, tmp_path):
    text = example(f)
    value = f.metadata["kind"](text)
    assert given(flag(f.name), text) == given("--" + f.name, text) == given(f"{flag(f.name)}={text}") == {f.name: value}
    file = tmp_path / "options.toml"
    written = f'"{text}"' if f.metadata["kind"] is str else text
    for name in (f.name, flag(f.name)[2:]):
        file.write_text(f"{name} = {written}\n")
        assert given("--config", str(file)) == {f.name: value}


def test_a_byte_order_mark_in_a_file_is_ignored(tmp_path):
    (tmp_path / "options.toml").write_bytes(b"\xef\xbb\xbfmax-iters = 7\r\n")
    assert given("--config", str(tmp_path / "options.toml")) == {"max_iters": 7}


def test_options_that_other_code_relies_on_exist():
    names = (
        "preset device dtype data out_dir batch_size block_size total_batch_size max_iters eval_interval eval_iters "
        "save_interval log_interval learning_rate min_lr warmup_iters lr_decay_iters weight_decay beta1 beta2 "
        "grad_clip dropout seed fresh init recipe"
    )
    assert set(names.split()) <= {f.name for f in fields(Options)}


def test_command_line_overrides_file_and_file_overrides_recipe(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('recipe = "modern"\nlearning_rate = 1e-3\nbeta2 = 0.9\nmax-iters = 5\nfresh = true\n')
    options = resolve_options(given("--config", str(file), "--beta2", "0.99"), SMALL)
    assert (options.beta2, options.learning_rate, options.warmup_iters) == (0.99, 1e-3, 715)
    assert (options.max_iters, options.fresh, options.min_lr) == (5, True, 1e-4)


def test_an_integer_in_a_file_is_accepted_as_a_float(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("grad_clip = 2\n")
    assert given("--config", str(file)) == {"grad_clip": 2.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batchsize", "3"], "unknown option --batchsize; did you mean --batch-size?"),
        (["--learning_rat=3"], "unknown option --learning-rat=3; did you mean --learning-rate?"),
        (
            ["--batch", "3"],
            "unknown option --batch;",
        ),  # no abbreviations: new options could make them ambiguous
        (["--nonsense"], "unknown option --nonsense ("),
        (["nonsense"], "unexpected argument 'nonsense' ("),
        (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        (["--batch-size", "0"], "--batch-size is 0; expected more than 0"),
        (["--max-iters", "-1"], "--max-iters is -1; expected more than 0"),
        (["--dropout", "1"], "--dropout is 1.0; expected at least 0 and less than 1"),
        (["--learning-rate", "nan"], "--learning-rate is nan; expected more than 0"),
        (["--learning-rate", "0"], "--learning-rate is 0.0; expected more than 0"),
        (["--grad-clip", "-1"], "--grad-clip is -1.0; expected 0 or more"),
        (["--weight-decay", "inf"], "--weight-decay is inf; expected 0 or more"),
        (["--beta2", "1.0"], "--beta2 is 1.0; expected at least 0 and less than 1"),
        (["--seed", "-1"], "--seed is -1; expected 0 to 2**64 - 1"),
        (["--preset", "gpt3"], "--preset is gpt3; expected nano, micro, gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        (["--recipe", "best"], "--recipe is best; expected paper, modern"),
        (["--eval", "lambada,helaswag"], "--eval is lambada,helaswag; expected hellaswag, lambada, or several: hella"),
        (["--dtype", "float16"], "--dtype is float16; expected float32, tf32, bfloat16, float64"),
        (["--device", "tpu"], "--device is tpu; expected auto, cpu, cuda"),
    ],
)
def test_an_invalid_option_prints_one_line(capsys, argv, message):
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3", "unknown option batchsize; did you mean batch_size?"),
        ("batch_size = 'three'", "batch_size is 'three'; expected a value of type int"),
        ("batch_size = 1.5", "batch_size is 1.5; expected a value of type int"),
        ("batch_size = true", "batch_size is True; expected a value of type int"),
        ("preset = 3", "preset is 3; expected a value of type str"),
        ("fresh = 1", "fresh is 1; expected a value of type bool"),
        ("[train]\nbatch_size = 3", "unknown option train"),
        ("batch_size = 0", "--batch-size is 0; expected more than 0"),
        ("import os", "not valid TOML"),
    ],
)
def test_an_invalid_file_prints_one_line(capsys, tmp_path, text, message):
    file = tmp_path / "options.toml"
    file.write_text(text)
    assert message in error_of(capsys, "--config", str(file))


def test_a_missing_file_prints_one_line(capsys):
    assert "nowhere.toml: No such file" in error_of(capsys, "--config", "nowhere.toml")


def test_recipes_have_the_published_values():
    paper, modern = (resolve_options({"recipe": name, "preset": "gpt2"}, SMALL) for name in ("paper", "modern"))
    assert (paper.learning_rate, paper.weight_decay, paper.dropout) == (2.5e-4, 0.01, 0.1)
    assert (paper.total_batch_size, paper.block_size) == (512 * 1024, 1024)
    assert (modern.learning_rate, modern.min_lr, modern.warmup_iters) == (6e-4, pytest.approx(6e-5), 715)
    assert (modern.beta1, modern.beta2, modern.weight_decay, modern.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (modern.dropout, modern.total_batch_size, modern.block_size) == (0.0, 524_288, 1024)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_adapted_to_a_shorter_context(recipe):
    options = resolve_options({"recipe": recipe}, NANO)
    assert options.block_size == NANO.n_positions
    assert options.total_batch_size == 512 * NANO.n_positions


def test_defaults_that_depend_on_other_options():
    nano, small = resolve_options({}, NANO), resolve_options({"preset": "gpt2"}, SMALL)
    assert (nano.block_size, small.block_size) == (NANO.n_positions, 1024)
    assert nano.lr_decay_iters == nano.max_iters
    assert (nano.min_lr, small.min_lr) == (0, small.learning_rate / 10)
    assert resolve_options({"lr_schedule": "cosine"}, NANO).min_lr == nano.learning_rate / 10
    assert resolve_options({"lr_schedule": "wsd", "preset": "gpt2"}, SMALL).min_lr == 0
    assert resolve_options({"max_iters": 7}, NANO).lr_decay_iters == 7
    assert resolve_options({"init": "somewhere"}, NANO).learning_rate == pytest.approx(3e-4)
    assert resolve_options({"init": "somewhere", "learning_rate": 1e-3}, NANO).learning_rate == 1e-3


CHOSEN = ("optimizer", "lr_schedule", "learning_rate", "min_lr", "warmup_iters", "max_iters", "eval_interval")
EARLIER = ("cosine", 3e-3, 3e-4, 100, 3000, 500)  # the defaults of small models without Muon


@pytest.mark.parametrize(
    ("given", "config", "expected"),
    [
        ({}, NANO, ("muon", "linear", 1e-2, 0, 40, 600, 120)),
        ({"optimizer": "muon"}, NANO, ("muon", "linear", 1e-2, 0, 40, 600, 120)),
        ({"optimizer": "adamw"}, NANO, ("adamw", *EARLIER)),
        ({"optimizer": "sgd"}, NANO, ("sgd", *EARLIER)),
        ({"init": "model"}, NANO, ("adamw", "cosine", 3e-4, 3e-5, 100, 3000, 500)),
        ({"init": "model", "optimizer": "muon"}, NANO, ("muon", "cosine", 3e-4, 3e-5, 100, 3000, 500)),
        ({"recipe": "paper"}, NANO, ("adamw", "cosine", 2.5e-4, 0, 2000, 3000, 500)),
        ({"recipe": "modern"}, NANO, ("adamw", "cosine", 6e-4, 6e-5, 715, 3000, 500)),
        ({"recipe": "modern", "optimizer": "muon"}, NANO, ("muon", "cosine", 6e-4, 6e-5, 715, 3000, 500)),
        ({}, SMALL, ("adamw", "cosine", 6e-4, 6e-5, 715, 19_073, 250)),
        ({"optimizer": "muon"}, SMALL, ("muon", "cosine", 6e-4, 6e-5, 715, 19_073, 250)),
    ],
)
def test_defaults_depend_on_size_optimizer_recipe_and_init(given, config, expected):
    options = resolve_options(given, config)
    assert tuple(getattr(options, name) for name in CHOSEN) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", [0.1, 0.5, 0.5 * (1 + 0.5**0.5), 0.5, 0.5 * (1 - 0.5**0.5), 0.0]),
        ("linear", [0.1, 0.5, 0.75, 0.5, 0.25, 0.0]),
        ("wsd", [0.1, 0.5, 1.0, 1.0, 1.0, 0.0]),
    ],
)
def test_learning_rates_of_each_schedule(schedule, rates):
    """Checks two steps of the warm-up (10 steps), and a quarter, half, three quarters and the end of the decay (to step
    110)."""
    options = Options(lr_schedule=schedule, learning_rate=1.0, min_lr=0.0, warmup_iters=10, lr_decay_iters=110)
    assert [options.learning_rate_at(step) for step in (0, 4, 35, 60, 85, 110)] == pytest.approx(rates)
    assert options.learning_rate_at(9) == options.learning_rate_at(10) == 1.0
    assert options.stable_iters == 88
    wsd = [Options(**{**options.__dict__, "lr_schedule": "wsd"}).learning_rate_at(step) for step in (88, 99, 110, 111)]
    assert wsd == pytest.approx([1.0, 0.5, 0.0, 0.0])
